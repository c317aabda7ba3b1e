// Tiles: pictures that can be picked. The tray of seeds or variations, and what was shown earlier.

import { $, el } from "./dom.js";
import { altOf, fileOf } from "./picture.js";
import { KEPT, save, saved, saveTray, savedTray } from "./recent.js";

/** A button that shows a picture as it is refined, and picks it. */
export function tile(picture, pick) {
  const image = el("img", { alt: "" });
  const button = el("button", { type: "button", class: "tile", "aria-pressed": "false" }, image);
  button.picture = picture;
  button.addEventListener("click", () => pick(picture));
  const show = () => {
    const { stage } = picture;
    button.classList.toggle("busy", picture.waiting);
    button.disabled = !stage;
    if (!stage) return;
    setPicture(image, stage, altOf(picture.model, stage));
    button.title = image.alt;
  };
  picture.addEventListener("change", show);
  show();
  return button;
}

/** Puts a stage into an image: small ones are drawn as the pixels that they are. */
export function setPicture(image, stage, alt) {
  image.src = fileOf(stage);
  image.alt = alt;
  image.width = stage.image.width;
  image.height = stage.image.height;
  image.classList.toggle("smooth", stage.image.width > 128);
}

/** Marks the tiles of the picture that is shown. */
export function mark(picture) {
  for (const button of document.querySelectorAll(".tile")) {
    button.setAttribute("aria-pressed", String(button.picture === picture));
  }
}

/** Shows pictures in the tray, in place of those before. */
export function fillTray(title, pictures, pick) {
  $("tray-title").textContent = title;
  $("tiles").replaceChildren(...pictures.map((picture) => tile(picture, pick)));
  $("tray").hidden = false;
}

/** The tray's title, and its pictures that have come. */
export function inTray() {
  const pictures = Array.from($("tiles").children, ({ picture }) => picture);
  return [$("tray-title").textContent, pictures.filter(({ stage }) => stage)];
}

export function emptyTray() {
  $("tray").hidden = true;
  $("tiles").replaceChildren();
}

const receiptOf = (picture) => picture.stage?.image.receipt;
const isKept = (receipt) => [...$("thumbs").children].some((thumb) => receiptOf(thumb.picture) === receipt);

/** Keeps a picture that is no longer shown among the earlier ones, once. */
export function keep(picture, pick) {
  if (!picture.stage || isKept(receiptOf(picture))) return;
  save(picture);
  $("thumbs").prepend(tile(picture, pick));
  while ($("thumbs").children.length > KEPT) $("thumbs").lastChild.remove();
  $("earlier").hidden = false;
}

/**
 * Shows the pictures from before a reload, earlier ones and those in the tray; `shown` is on the sheet already, or
 * null where it was refused.
 */
export function restore(models, shown, pick) {
  const isShown = (picture) => shown && receiptOf(picture) === receiptOf(shown);
  const before = saved(models).filter((picture) => !isShown(picture) && !isKept(receiptOf(picture)));
  $("thumbs").append(...before.map((picture) => tile(picture, pick)));
  $("earlier").hidden = !$("thumbs").children.length;
  const [title, pictures] = savedTray(models);
  const current = shown?.model.name ?? $("models").value;
  if (pictures.length && $("tray").hidden && pictures.every(({ model }) => model.name === current)) {
    fillTray(title, pictures.map((picture) => (isShown(picture) ? shown : picture)), pick);
    mark(shown);
  }
  addEventListener("pagehide", () => saveTray(...inTray()));
}
