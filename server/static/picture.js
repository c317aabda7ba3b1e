// A picture is one image as it becomes better: the stages that have come, and those that are expected.

import { milliseconds, passes } from "./dom.js";
import { readReceipt } from "./receipts.js";

/**
 * Tells whoever listens by a `change` event.
 *
 * model      the entry of /models that draws it
 * source     what to ask for, but for how far: { label | prompt, seed }, or { receipt }, which follows the
 *            newest stage and is null before the first one where nothing else names the image
 * target     the plan that was asked for, or undefined where the page does not know it
 * expected   the plans that should come, cheapest first
 * stages     the `image` events that have come
 * chosen     index of the stage that somebody went back to, or null for the newest
 * waiting    whether more is to come
 */
export class Picture extends EventTarget {
  constructor(model, source, target, expected = ladder(model, target)) {
    super();
    Object.assign(this, { model, source, target, expected, stages: [], chosen: null, waiting: true });
  }

  /** The stage that is shown, or undefined before the first one. */
  get stage() {
    return this.stages[this.chosen ?? this.stages.length - 1];
  }

  /** Whether the stage that was asked for, or the one that the server stopped at, has come. */
  get done() {
    return this.stages.at(-1)?.final ?? false;
  }

  /** The steps of the trail as [plan's name, passes, stage or undefined]. */
  get trail() {
    const ahead = this.waiting ? this.expected.slice(this.stages.length) : [];
    return [
      ...this.stages.map((stage) => [stage.plan, stage.steps, stage]),
      ...ahead.map((plan) => [plan.name, plan.steps, undefined]),
    ];
  }

  /** The server's reason for stopping short of what was asked, or an empty text. */
  get note() {
    const last = this.stages.at(-1);
    if (!this.done || last.plan === last.requested_plan) return "";
    return `The server is busy: it drew ${last.plan} (${passes(last.steps)}) instead of ${last.requested_plan}.`;
  }

  add(stage) {
    this.stages.push(stage);
    if ("receipt" in this.source) this.source = { receipt: stage.image.receipt };
    if (stage.final) this.waiting = false;
    this.changed();
  }

  /** Nothing more comes. */
  stop() {
    if (!this.waiting) return;
    this.waiting = false;
    this.changed();
  }

  choose(index) {
    this.chosen = index === this.stages.length - 1 ? null : index;
    this.changed();
  }

  changed() {
    this.dispatchEvent(new Event("change"));
  }
}

/** A stage's file, as an address. */
export const fileOf = ({ image }) => `data:image/${image.format};base64,${image.data}`;

/** What a receipt says in this model's words: { subject, seed, number, variations }. */
export function said(model, receipt) {
  const read = readReceipt(receipt);
  if (!read) return { subject: "", seed: "", number: 0, variations: 0 };
  const subject = typeof read.condition === "number" ? (model.classes?.[read.condition] ?? "") : read.condition;
  return { subject, seed: read.seed, number: read.number, variations: read.changes.length };
}

/** "ship, seed 7", and which image and how often varied where it is so. */
export function titleOf(model, stage) {
  const { subject, seed, number, variations } = said(model, stage.image.receipt);
  const parts = [subject, `seed ${seed}`];
  if (number) parts.push(`image ${number}`);
  if (variations) parts.push(variations === 1 ? "varied" : `varied ${variations} times`);
  return parts.filter(Boolean).join(", ");
}

export const altOf = (model, stage) => `${titleOf(model, stage)}, made in ${passes(stage.steps)}`;

export const timeOf = (stage) => milliseconds(stage.timings.total_ms);

/** A name for the file that says what is in it. */
export function fileName(model, stage) {
  const { subject, seed, number, variations } = said(model, stage.image.receipt);
  const word = String(subject).toLowerCase().replace(/[^\p{L}\p{N}]+/gu, "-").slice(0, 40).replace(/^-|-$/g, "");
  const parts = [word || "image", "seed", seed, ...(number ? [number] : []), ...(variations ? ["varied"] : []), stage.plan];
  return `${parts.join("-")}.${stage.image.format}`;
}

/** The body that gives this very stage again: in words where words are enough, else by its receipt. */
export function bodyOf(model, source, stage) {
  if ("receipt" in source) return { receipt: stage.image.receipt };
  const within = planWithin(model, stage.steps);
  return { ...source, ...(within?.name === stage.plan ? { steps: stage.steps } : { plan: stage.plan }) };
}

// ---- a model's plans

/** The best plan within a budget of passes. */
export function planWithin(model, steps) {
  const run = model.budgets.find(({ from, to }) => from <= steps && steps <= to);
  return run && planNamed(model, run.plan);
}

export const planNamed = (model, name) => model.plans.find((plan) => plan.name === name);

/** The plans that a stream up to `target` goes through. */
export function ladder(model, target) {
  if (!target) return [];
  const cheaper = model.budgets.map(({ plan }) => planNamed(model, plan)).filter(({ steps }) => steps < target.steps);
  return [...cheaper, target];
}

/** The words for a budget, as [word, plan]: the plans that the server measured as its low, medium and high quality. */
export function grades(model) {
  const { low, medium, high } = model.qualities;
  const words = [["Fast", low], ["Better", medium], ["Best", high]];
  const known = new Set();
  return words.filter(([, name]) => !known.has(name) && known.add(name)).map(([word, name]) => [word, planNamed(model, name)]);
}

/** The plan where nobody chose one: one better than the fastest, where there is one. */
export const usual = (model) => (grades(model)[1] ?? grades(model)[0])[1];

/** Who draws what in a plan, in words. */
export function saidOf({ segments }) {
  const parts = segments.map(([actor, start, stop]) => {
    const blocks = stop - start === 1 ? "one block" : `${stop - start} blocks`;
    return `the ${actor} draws ${blocks} of tokens in ${actor === "teacher" ? "a pass each" : "one pass"}`;
  });
  return parts.join(", then ");
}
