// The playground: form → POST /generate as a stream → a picture that is refined in place.
//
//   form.js      what to draw              sheet.js     the picture that is shown
//   draw.js      runs, and what they show  gallery.js   tiles: seeds, variations, earlier pictures
//   address.js   links, Back               recent.js    what outlives a reload
//   api.js       keys, refusals            picture.js   an image and its stages; a model's plans
//   sse.js       server-sent events        download.js  sizes, formats, sheets (files.js: their bytes)
//   receipts.js  receipts in files         metrics.js   the numbers of the last minute
//   health.js    the dot

import * as address from "./address.js";
import { ask } from "./api.js";
import { $, el } from "./dom.js";
import { save, saveAll, saveSheet } from "./download.js";
import * as drawing from "./draw.js";
import * as form from "./form.js";
import { inTray, restore } from "./gallery.js";
import { watch } from "./health.js";
import { startStrip } from "./metrics.js";
import { receiptIn } from "./receipts.js";
import * as sheet from "./sheet.js";

async function copyCurl() {
  if (!sheet.current()?.stage) return; // nothing is there yet that a command could make
  const command = sheet.curl(drawing.named());
  try {
    await navigator.clipboard.writeText(command);
    $("copy").textContent = "Copied";
  } catch {
    window.prompt("Copy this command", command); // clipboards need https or localhost
  }
  setTimeout(() => ($("copy").textContent = "Copy as curl"), 1500);
}

/** Files are made outside of runs: what is drawn meanwhile goes on. */
const saving = (work) => work.catch((error) => drawing.showError(error.message, error.param));

function listen() {
  const { draw, refine, edited, look } = drawing;
  form.listen({ draw, refine, edit: edited, look });
  $("gallery").addEventListener("click", drawing.gallery);
  $("compare").addEventListener("click", drawing.compare);
  $("copy").addEventListener("click", copyCurl);
  $("trail").addEventListener("click", () => drawing.remember(sheet.current()));
  $("keep").addEventListener("input", () => ($("keep-value").textContent = `${$("keep").value}%`));
  $("vary").addEventListener("submit", (event) => {
    event.preventDefault();
    drawing.vary();
  });
  $("again").addEventListener("submit", (event) => {
    event.preventDefault();
    drawing.repeat($("receipt").value);
  });
  $("receipt").addEventListener("paste", (event) => {
    const text = event.clipboardData.getData("text");
    if (!receiptIn(text)) return;
    event.preventDefault();
    drawing.repeat(text);
  });
  $("file").addEventListener("change", () => {
    const [file] = $("file").files;
    if (file) drawing.repeatFile(file);
    $("file").value = ""; // the same file may be chosen again
  });
  $("models").addEventListener("change", () => {
    drawing.useModel(drawing.modelNamed($("models").value), {});
    if (form.filled()) draw();
  });
  for (const choice of ["scale", "format"]) $(choice).addEventListener("change", sheet.refresh);
  $("download").addEventListener("click", (event) => saving(save(event, sheet.current())));
  $("save-sheet").addEventListener("click", () => saving(saveSheet(...inTray())));
  $("save-all").addEventListener("click", () => saving(saveAll(...inTray())));
  address.listen({ back: drawing.pick, open: () => drawing.open(address.asked()) });
}

function listenForDrops() {
  const over = (event, on) => {
    if (event.target.matches?.("input, textarea") && !event.dataTransfer.types.includes("Files")) {
      document.body.classList.remove("over"); // it is the field's
      return;
    }
    event.preventDefault();
    document.body.classList.toggle("over", on);
  };
  document.addEventListener("dragover", (event) => over(event, true));
  document.addEventListener("dragleave", (event) => over(event, event.relatedTarget !== null));
  document.addEventListener("drop", async (event) => {
    over(event, false);
    if (!event.defaultPrevented) return; // text that goes into a field
    const [file] = event.dataTransfer.files;
    const text = event.dataTransfer.getData("text");
    await started;
    if (file) drawing.repeatFile(file);
    else drawing.repeat(text);
  });
}

/** Reads what is loaded, whenever the server has become ready; the text beside the dot. */
async function readModels() {
  $("model-text").textContent = "reading the models";
  const reply = await ask("models");
  const models = drawing.useModels((await reply.json()).models);
  const titled = ({ name, conditioning }) => el("option", { value: name }, `${name}, from ${conditioning === "text" ? "text" : "classes"}`);
  const chosen = $("models").value;
  $("models").replaceChildren(...models.map(titled));
  if (models.some(({ name }) => name === chosen)) $("models").value = chosen;
  $("models").hidden = models.length < 2;
  begin(models);
  return models.length > 1 ? "ready" : `${models[0].name}, ready`;
}

/** The first time: draws what the address asks for. */
let begin = async (models) => {
  begin = () => {};
  startStrip();
  listen();
  begun();
  await drawing.open(address.asked());
  restore(models, sheet.current(), drawing.pick);
};
let begun;
const started = new Promise((done) => (begun = done));

listenForDrops();
watch(readModels);
