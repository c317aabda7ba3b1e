// Tiles: pictures that can be picked. The tray of seeds or variations, and what was shown earlier.

import { $, el } from "/static/dom.js";
import { altOf, fileOf } from "/static/picture.js";

const KEPT = 18;

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

export function emptyTray() {
  $("tray").hidden = true;
  $("tiles").replaceChildren();
}

/** Keeps a picture that is no longer shown among the earlier ones, once. */
export function keep(picture, pick) {
  const receipt = picture.stage?.image.receipt;
  const known = [...$("thumbs").children].some((thumb) => thumb.picture.stage.image.receipt === receipt);
  if (!receipt || known) return;
  $("thumbs").prepend(tile(picture, pick));
  while ($("thumbs").children.length > KEPT) $("thumbs").lastChild.remove();
  $("earlier").hidden = false;
}
