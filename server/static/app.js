// The playground: form → POST /generate as a stream → a picture that is refined in place.
//
//   form.js      what to draw              sheet.js     the picture that is shown
//   api.js       keys, refusals            gallery.js   tiles: seeds, variations, earlier pictures
//   sse.js       server-sent events        picture.js   an image and its stages; a model's plans
//   receipts.js  receipts in files         metrics.js   the live strip

import { Refusal, ask, generate, stream } from "/static/api.js";
import { $, el, randomSeed, sleep } from "/static/dom.js";
import * as form from "/static/form.js";
import { emptyTray, fillTray, keep } from "/static/gallery.js";
import { startStrip } from "/static/metrics.js";
import { Picture, planNamed, planWithin } from "/static/picture.js";
import { readReceipt, receiptIn, receiptOf } from "/static/receipts.js";
import * as sheet from "/static/sheet.js";

const GALLERY = 8;
const FIELDS = { seed: "seed", steps: "steps", label: "class-name", prompt: "prompt", receipt: "receipt", keep: "keep" };

let models = [];
let model = null;
let running = null; // AbortController of the run in progress
let wanted = null; // the picture that is shown or under way; null once the form says something else

/** The model's name, where it has to be said. */
const named = () => (models.length > 1 ? { model: model.name } : {});

function showError(message, param) {
  $("error").textContent = message;
  $("error").hidden = !message;
  if (message) reveal($("error"));
  for (const [field, input] of Object.entries(FIELDS)) $(input).setAttribute("aria-invalid", String(field === param));
}

// ---- one run at a time

/** Runs `work` with a signal; whoever begins another run ends the one before, and the server stops computing. */
async function run(work) {
  running?.abort();
  const mine = (running = new AbortController());
  showError("");
  $("figures").setAttribute("aria-busy", "true");
  try {
    await work(mine.signal);
  } catch (error) {
    if (mine.signal.aborted) return;
    showError(error.message, error.param);
    if (!(error instanceof Refusal)) throw error;
  } finally {
    if (running === mine) $("figures").removeAttribute("aria-busy");
  }
}

/** Streams the images of `body` into the pictures that `begin` gives once the server has accepted it. */
async function streamInto(body, begin, signal) {
  const stages = await stream(body, signal);
  const pictures = begin();
  try {
    for await (const stage of stages) (pictures.length > 1 ? pictures[stage.image.index] : pictures[0]).add(stage);
  } finally {
    for (const picture of pictures) picture.stop();
  }
}

const bodyOf = (source, more) => ("receipt" in source ? { ...source, ...more } : { ...named(), ...source, ...more });

// ---- what can be drawn

/** One image: of a source within a budget, or by a receipt's own plan where `budget` is left out. */
function drawOne(source, budget) {
  const target = budget ? planWithin(model, budget) : planNamed(model, readReceipt(source.receipt)?.plan);
  const picture = (wanted = new Picture(model, source, target));
  return run(async (signal) => {
    const begin = () => {
      show(picture);
      return [picture];
    };
    await streamInto(bodyOf(source, budget ? { steps: budget } : {}), begin, signal);
    remember(picture);
  });
}

function draw() {
  if (form.complete()) return drawOne(form.source(), form.steps());
}

/** The same image up to another budget; nothing is asked where that is what is shown. */
function refine() {
  if (!wanted) return draw();
  const [picture, target] = [sheet.current(), planWithin(model, form.steps())];
  const same = wanted === picture && picture.target === target && !picture.note && (picture.waiting || picture.done);
  return same ? remember(picture) : drawOne(wanted.source, form.steps());
}

/** Several images of one seed. */
function gallery() {
  if (!form.complete()) return;
  const [source, steps, count] = [form.source(), form.steps(), Math.min(GALLERY, model.limits.n)];
  const target = planWithin(model, steps);
  const pictures = Array.from({ length: count }, (_, i) => new Picture(model, i ? { receipt: null } : source, target));
  wanted = pictures[0];
  return run((signal) => {
    const begin = () => {
      fillTray(`${count} images of seed ${source.seed}`, pictures, pick);
      show(pictures[0]);
      reveal($("tray"));
      return pictures;
    };
    return streamInto(bodyOf(source, { steps, n: count }), begin, signal);
  });
}

/** Images that share the first blocks of the one that is shown. */
function vary() {
  const base = sheet.current();
  if (!base?.stage) return;
  const [{ plan, image }, share] = [base.stage, Number($("keep").value)];
  const count = Math.min(GALLERY - 1, model.limits.n);
  return run((signal) => {
    const begin = () => {
      const target = planNamed(model, plan);
      const pictures = Array.from({ length: count }, () => new Picture(model, { receipt: null }, target));
      fillTray(`The picture, and variations that keep ${share}% of it`, [base, ...pictures], pick);
      show(base);
      reveal($("tray"));
      return pictures;
    };
    const body = { receipt: image.receipt, keep: share / 100, seed: randomSeed(), n: count };
    return streamInto(body, begin, signal);
  });
}

/** One step, two steps and the teacher from the same noise, one after the other, so that none waits for another. */
function compare() {
  if (!wanted && !form.complete()) return;
  const source = wanted?.source ?? form.source();
  const budgets = [model.steps.min, Math.min(2, model.steps.max), model.steps.max];
  const plans = new Set(budgets.map((budget) => planWithin(model, budget)));
  const pictures = Array.from(plans, (plan) => new Picture(model, source, plan, [plan]));
  wanted = new Picture(model, source);
  return run(async (signal) => {
    leave();
    sheet.compare(pictures, sheet.select);
    look();
    try {
      for (const picture of pictures) {
        const { images, ...reply } = await generate(bodyOf(source, { steps: picture.target.steps, brownout: false }), signal);
        picture.add({ ...reply, image: images[0], final: true });
      }
    } finally {
      for (const picture of pictures) picture.stop();
    }
  });
}

/** The image of a receipt, or of a text that holds one. */
function repeat(text) {
  const receipt = receiptIn(text);
  if (!receipt) return showError("This is no receipt: they begin with dd1.", "receipt");
  $("receipt").value = receipt;
  const owner = models.find(({ name }) => name === readReceipt(receipt)?.model);
  if (owner && owner !== model) useModel(owner, {});
  look();
  return drawOne({ receipt });
}

async function repeatFile(file) {
  const receipt = receiptOf(new Uint8Array(await file.arrayBuffer()));
  if (receipt) return repeat(receipt);
  showError(`${file.name} holds no receipt: it was not made by this server, or another program saved it anew.`, "receipt");
}

// ---- what is shown

/** Shows a picture, and makes form and address say what it is. */
function show(picture) {
  leave(picture);
  sheet.show(picture);
  if (wanted === picture) form.reflect(picture); // else somebody has gone on typing
  remember(picture);
}

/** A tile was chosen. */
function pick(picture) {
  if (picture.model !== model) useModel(picture.model, {});
  wanted = picture;
  show(picture);
}

/** What is no longer shown goes to the earlier pictures. */
function leave(next) {
  const before = sheet.current();
  if (before && before !== next) keep(before, pick);
}

/** The address leads back to what is shown: in words where words name it, else by its receipt. */
function remember(picture) {
  const { source, stage, chosen } = picture;
  const byReceipt = "receipt" in source || chosen !== null;
  const words = byReceipt ? { receipt: stage?.image.receipt ?? source.receipt } : { ...source, steps: form.steps(), ...named() };
  history.replaceState(null, "", `?${new URLSearchParams(words)}`);
}

const look = () => reveal($("figures"));

function reveal(section) {
  const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
  section.scrollIntoView({ block: "nearest", behavior: still ? "auto" : "smooth" });
}

async function copyCurl() {
  if (!sheet.current()?.stage) return; // nothing is there yet that a command could make
  const command = sheet.curl(named());
  try {
    await navigator.clipboard.writeText(command);
    $("copy").textContent = "Copied";
  } catch {
    window.prompt("Copy this command", command); // clipboards need https or localhost
  }
  setTimeout(() => ($("copy").textContent = "Copy as curl"), 1500);
}

// ---- start

function useModel(entry, state) {
  emptyTray();
  model = entry;
  $("models").value = model.name;
  $("model-text").textContent = `${models.length > 1 ? "" : `${model.name}, `}${model.image.width}×${model.image.height}`;
  form.build(model, state);
}

function listen() {
  form.listen({ draw, refine, edit: () => (wanted = null), look });
  $("gallery").addEventListener("click", gallery);
  $("compare").addEventListener("click", compare);
  $("copy").addEventListener("click", copyCurl);
  $("trail").addEventListener("click", () => remember(sheet.current()));
  $("keep").addEventListener("input", () => ($("keep-value").textContent = `${$("keep").value}%`));
  $("vary").addEventListener("submit", (event) => {
    event.preventDefault();
    vary();
  });
  $("again").addEventListener("submit", (event) => {
    event.preventDefault();
    repeat($("receipt").value);
  });
  $("receipt").addEventListener("paste", (event) => {
    const text = event.clipboardData.getData("text");
    if (!receiptIn(text)) return;
    event.preventDefault();
    repeat(text);
  });
  $("file").addEventListener("change", () => {
    const [file] = $("file").files;
    if (file) repeatFile(file);
    $("file").value = ""; // the same file may be chosen again
  });
  $("models").addEventListener("change", () => {
    wanted = null;
    useModel(models.find(({ name }) => name === $("models").value), {});
    if (form.filled()) draw();
  });
  listenForDrops();
}

function listenForDrops() {
  const over = (event, on) => {
    if (event.target.matches?.("input, textarea") && !event.dataTransfer.types.includes("Files")) return;
    event.preventDefault();
    $("again").classList.toggle("over", on);
  };
  document.addEventListener("dragover", (event) => over(event, true));
  document.addEventListener("dragleave", (event) => over(event, event.relatedTarget !== null));
  document.addEventListener("drop", (event) => {
    over(event, false);
    if (!event.defaultPrevented) return; // text that goes into a field
    const [file] = event.dataTransfer.files;
    if (file) repeatFile(file);
    else repeat(event.dataTransfer.getData("text"));
  });
}

async function whenReady() {
  for (;;) {
    try {
      const reply = await fetch("/readyz");
      if (reply.ok) break;
      $("model-text").textContent = (await reply.json()).error.message;
    } catch {
      $("model-text").textContent = "the server does not answer";
    }
    await sleep(500);
  }
}

async function start() {
  await whenReady();
  startStrip();
  $("model-text").textContent = "reading the models";
  models = (await (await ask("/models")).json()).models;
  const titled = ({ name, conditioning }) => el("option", { value: name }, `${name}, from ${conditioning === "text" ? "text" : "classes"}`);
  $("models").append(...models.map(titled));
  $("models").hidden = models.length < 2;
  $("dot").classList.add("ready");
  const state = Object.fromEntries(new URLSearchParams(location.search));
  const fitting = state.label === undefined ? "text" : "class";
  const opening = models.find(({ name }) => name === state.model) ?? models.find((entry) => entry.conditioning === fitting);
  useModel(opening ?? models[0], state);
  listen();
  if (state.receipt) await repeat(state.receipt);
  else if (form.filled()) await draw();
}

start();
