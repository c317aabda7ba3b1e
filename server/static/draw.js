// What can be drawn, one run at a time, and what is shown of it.

import { generate, Refusal, stream } from "./api.js";
import { opening, visit, wrong } from "./address.js";
import { $, randomSeed } from "./dom.js";
import { offer } from "./download.js";
import * as form from "./form.js";
import { emptyTray, fillTray, keep } from "./gallery.js";
import { grades, Picture, planNamed } from "./picture.js";
import { save } from "./recent.js";
import { readReceipt, receiptIn, receiptOf } from "./receipts.js";
import * as sheet from "./sheet.js";

const VARIATIONS = 7;
const FIELDS = {
  ...{ seed: "seed", steps: "steps", plan: "plan", label: "class-name", prompt: "prompt", receipt: "receipt" },
  ...{ keep: "keep", n: "count", model: "models" },
};

let models = [];
let model = null;
let running = null; // AbortController of the run in progress
let wanted = null; // the picture that is shown or under way; null once the form says something else

export const edited = () => (wanted = null);

/** The model's name, where it has to be said. */
export const named = () => (models.length > 1 ? { model: model.name } : {});

export function showError(message, param) {
  $("error").textContent = message;
  $("error").hidden = !message;
  if (message) reveal($("error"));
  for (const [field, input] of Object.entries(FIELDS)) $(input).setAttribute("aria-invalid", String(field === param));
}

// ---- one run at a time

/** Runs `work` with a signal; whoever begins another run ends the one before, and the server stops computing. */
export async function run(work) {
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

/** One image: of a source as far as the form says, or by a receipt's own plan where `budget` is left out. */
function drawOne(source, budget) {
  const target = budget ? form.target() : planNamed(model, readReceipt(source.receipt)?.plan);
  const picture = (wanted = new Picture(model, source, target));
  return run(async (signal) => {
    let begun = false;
    const begin = () => {
      begun = true;
      show(picture);
      return [picture];
    };
    try {
      await streamInto(bodyOf(source, budget), begin, signal);
    } finally {
      if (!begun && wanted === picture) wanted = null; // refused: what is shown is another
    }
    rememberShown(picture);
    save(picture);
  });
}

export function draw() {
  if (form.complete()) return drawOne(form.source(), form.budget());
}

/** The same image up to another budget; nothing is asked where that is what is shown. */
export function refine() {
  if (!wanted) return draw();
  const [picture, target] = [sheet.current(), form.target()];
  const same = wanted === picture && picture.target === target && !picture.note && (picture.waiting || picture.done);
  return same ? remember(picture) : drawOne(wanted.source, form.budget());
}

/** Several images of one seed. */
export function gallery() {
  if (!form.complete()) return;
  const [source, budget, count, target] = [form.source(), form.budget(), form.count(), form.target()];
  const pictures = Array.from({ length: count }, (_, i) => new Picture(model, i ? { receipt: null } : source, target));
  wanted = pictures[0];
  return run((signal) => {
    const begin = () => {
      fillTray(`${count === 1 ? "1 picture" : `${count} pictures`} of ${subjectOf(source)}, seed ${source.seed}`, pictures, pick);
      show(pictures[0]);
      reveal($("tray"));
      return pictures;
    };
    return streamInto(bodyOf(source, { ...budget, n: count }), begin, signal).then(() => rememberShown(...pictures));
  });
}

const subjectOf = ({ label, prompt }) => prompt ?? (typeof label === "number" ? (model.classes[label] ?? label) : label);

/** Images that share the first blocks of the one that is shown. */
export function vary() {
  const base = sheet.current();
  if (!base?.stage) return;
  const [{ plan, image }, share] = [base.stage, Number($("keep").value)];
  const count = Math.min(VARIATIONS, model.limits.n);
  const pictures = Array.from({ length: count }, () => new Picture(model, { receipt: null }, planNamed(model, plan)));
  return run((signal) => {
    const begin = () => {
      fillTray(`The picture, and variations that keep ${share}% of it`, [base, ...pictures], pick);
      show(base);
      reveal($("tray"));
      return pictures;
    };
    const body = { receipt: image.receipt, keep: share / 100, seed: randomSeed(), n: count };
    return streamInto(body, begin, signal).then(() => rememberShown(...pictures));
  });
}

/** Fast, Better and Best from the same noise, one after the other, so that none waits for another. */
export function compare() {
  if (!wanted && !form.complete()) return;
  const source = wanted?.source ?? form.source();
  const pictures = grades(model).map(([, plan]) => new Picture(model, source, plan, [plan]));
  wanted = new Picture(model, source);
  return run(async (signal) => {
    leave();
    sheet.compare(pictures, sheet.select);
    visit(wanted, { ...wordsOf(source), compare: 1 });
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

function useOwner(receipt) {
  const owner = modelNamed(readReceipt(receipt)?.model);
  if (owner && owner !== model) useModel(owner, {});
}

/** The image of a receipt, or of a text that holds one. */
export function repeat(text) {
  const receipt = receiptIn(text);
  if (!receipt) return showError("This is no receipt: they begin with dd1.", "receipt");
  $("receipt").value = receipt;
  useOwner(receipt);
  look();
  return drawOne({ receipt });
}

export async function repeatFile(file) {
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

/** A tile was chosen, or Back leads to it. */
export function pick(picture) {
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
export function remember(picture) {
  const { source, stage, chosen } = picture;
  const byReceipt = "receipt" in source || chosen !== null;
  visit(picture, byReceipt ? { receipt: stage?.image.receipt ?? source.receipt } : wordsOf(source));
}

/** At the end of a run, by what the picture has become; somebody may look at another meanwhile. */
function rememberShown(...pictures) {
  const picture = sheet.current();
  if (pictures.includes(picture)) remember(picture);
}

const wordsOf = (source) => ("receipt" in source ? source : { ...named(), ...source, ...form.budget() });

export const look = () => reveal($("figures"));

export function reveal(section) {
  const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
  section.scrollIntoView({ block: "nearest", behavior: still ? "auto" : "smooth" });
}

// ---- models and links

/** Takes in what the server has loaded; whoever looks at a model that is still there goes on. */
export function useModels(loaded) {
  const same = (entry) => models.find((known) => JSON.stringify(known) === JSON.stringify(entry));
  models = loaded.map((entry) => same(entry) ?? entry);
  if (model && !models.includes(model)) useModel(modelNamed(model.name) ?? models[0], {});
  return models;
}

export function useModel(entry, state) {
  emptyTray();
  model = entry;
  wanted = null;
  form.build(model, state);
  offer(model);
  $("models").value = model.name;
}

export const modelNamed = (name) => models.find((entry) => entry.name === name);

/** Draws what a link asks for, or says why it cannot. */
export async function open(link) {
  const entry = opening(link, models);
  const problem = link.receipt ? null : wrong(link, models, entry);
  useModel(entry, link);
  if (problem) return showError(...problem);
  if (link.compare) {
    if (link.receipt) useOwner(link.receipt);
    wanted = link.receipt ? new Picture(model, { receipt: link.receipt }) : null;
    return compare();
  }
  if (link.receipt) return repeat(link.receipt);
  if (form.filled()) return draw();
}
