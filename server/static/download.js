// Downloads: a picture in any size and format, several as one sheet or as one file.

import { ask, refusalOf } from "./api.js";
import { $, el } from "./dom.js";
import { withReceipt, zip } from "./files.js";
import { fileName, fileOf } from "./picture.js";

const SHEET_PIXELS = 256; // at least so wide is a picture on a sheet
const GAP = 8;

const scale = () => Number($("scale").value);
const format = () => $("format").value;

/** The sizes on offer, in this model's pixels. */
export function offer({ image: { width, height } }) {
  const chosen = $("scale").value || "1";
  const options = [1, 8, 16].map((n) => el("option", { value: n }, `${n}×: ${width * n}×${height * n}`));
  $("scale").replaceChildren(...options);
  $("scale").value = chosen;
}

/** Makes the link the file of a stage, where that is what is chosen; else `save` makes it when it is pressed. */
export function link({ model, stage }) {
  $("download").href = fileOf(stage);
  $("download").download = nameOf(model, stage);
}

const asItCame = (stage) => scale() === 1 && format() === stage.image.format;

function nameOf(model, stage) {
  const [stem, own] = [fileName(model, stage).replace(/\.\w+$/, ""), scale() === 1];
  return `${stem}${own ? "" : `-${scale()}x`}.${format()}`;
}

/** The file that is chosen, of one stage. */
async function fileFor(stage) {
  if (asItCame(stage)) return new Blob([bytesOf(stage)]);
  if (scale() === 1) {
    const reply = await ask(`images/${stage.image.receipt}?format=${format()}`);
    if (!reply.ok) throw await refusalOf(reply);
    return reply.blob();
  }
  const canvas = canvasOf(stage.image.width * scale(), stage.image.height * scale());
  canvas.getContext("2d", { alpha: false }).drawImage(await scaled(stage, scale()), 0, 0);
  const blob = await encoded(canvas, `image/${format()}`);
  return format() === "png" ? withReceipt(new Uint8Array(await blob.arrayBuffer()), stage.image.receipt) : blob;
}

const bytesOf = ({ image }) => Uint8Array.from(atob(image.data), (character) => character.charCodeAt(0));

async function scaled(stage, times) {
  const image = el("img", { src: fileOf(stage) });
  await image.decode();
  const canvas = canvasOf(stage.image.width * times, stage.image.height * times);
  const pen = canvas.getContext("2d", { alpha: false });
  pen.imageSmoothingEnabled = false;
  pen.drawImage(image, 0, 0, canvas.width, canvas.height);
  return canvas;
}

function canvasOf(width, height) {
  const canvas = el("canvas");
  Object.assign(canvas, { width, height });
  return canvas;
}

async function encoded(canvas, type) {
  const blob = await new Promise((done) => canvas.toBlob(done, type, 0.95));
  if (!blob) throw new Error("The picture is too large.");
  // A browser that cannot write a format gives a PNG in its place.
  if (blob.type !== type) throw new Error(`This browser cannot write ${type} files: choose another format.`);
  return blob;
}

function give(blob, name) {
  const address = URL.createObjectURL(blob);
  el("a", { href: address, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(address), 60_000);
}

/** The press on the link: the browser follows it, or gets the file that is made here. */
export async function save(event, { model, stage }) {
  if (stage && asItCame(stage)) return;
  event.preventDefault();
  if (!stage) return; // the link is still of the picture before
  give(await fileFor(stage), nameOf(model, stage));
}

const stem = (title) => title.toLowerCase().replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-|-$/g, "");

/** Every picture in the chosen size and format, as one ZIP. */
export async function saveAll(title, pictures) {
  if (!pictures.length) return;
  const files = [];
  for (const { model, stage } of pictures) {
    files.push([nameOf(model, stage), new Uint8Array(await (await fileFor(stage)).arrayBuffer())]);
  }
  give(zip(files), `${stem(title)}.zip`);
}

/** All pictures on one PNG, side by side. */
export async function saveSheet(title, pictures) {
  if (!pictures.length) return;
  const { width, height } = pictures[0].stage.image;
  const times = Math.max(scale(), Math.ceil(SHEET_PIXELS / width));
  const columns = Math.ceil(Math.sqrt(pictures.length));
  const [w, h] = [width * times, height * times];
  const rows = Math.ceil(pictures.length / columns);
  const canvas = canvasOf(columns * (w + GAP) + GAP, rows * (h + GAP) + GAP);
  const pen = canvas.getContext("2d", { alpha: false });
  pen.fillStyle = "#fff";
  pen.fillRect(0, 0, canvas.width, canvas.height);
  for (const [i, { stage }] of pictures.entries()) {
    pen.drawImage(await scaled(stage, times), GAP + (i % columns) * (w + GAP), GAP + Math.floor(i / columns) * (h + GAP));
  }
  give(await encoded(canvas, "image/png"), `${stem(title)}.png`);
}
