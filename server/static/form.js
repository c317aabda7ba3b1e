// The form: what to draw (a class or a prompt, and a seed) and how far to refine it.

import { $, el, passes, randomSeed } from "/static/dom.js";
import { planWithin, refined, said } from "/static/picture.js";

const CHIP_LIMIT = 24; // more classes than this are searched, not listed
let model = null;

const isText = () => model.conditioning === "text";
const classes = () => model.classes ?? [];
const searched = () => classes().length > CHIP_LIMIT;

/** What is asked for, in words. */
export function source() {
  const seed = Number($("seed").value);
  return isText() ? { prompt: $("prompt").value.trim(), seed } : { label: label(), seed };
}

function label() {
  if (!searched()) return document.querySelector("input[name=label]:checked").value;
  const text = $("class-name").value.trim();
  return /^\d+$/.test(text) ? Number(text) : text;
}

export const steps = () => Number($("steps").value);

/** Whether it can be drawn; says what is missing if not. */
export const complete = () => $("form").reportValidity();

/** Whether there is anything to draw yet: a model of prompts may have no example. */
export const filled = () => !isText() || $("prompt").value.trim() !== "";

/** Shows the form of a model, filled from the address or as well as it goes. */
export function build(entry, { label, prompt, seed, steps }) {
  model = entry;
  $("class-field").hidden = isText();
  $("prompt-field").hidden = !isText();
  $("prompt").required = isText();
  $("class-search").hidden = isText() || !searched();
  $("class-list").replaceChildren(...(searched() ? classes().map((name) => el("option", { value: name })) : []));
  $("classes").replaceChildren(...(searched() ? [] : classes().map(chip)));
  $("examples").replaceChildren(...(model.examples ?? []).map((text) => el("button", { type: "button", class: "example" }, text)));
  $("stops").replaceChildren(...model.budgets.map(stop));
  $("steps").min = model.steps.min;
  $("steps").max = model.steps.max;
  if (isText()) $("prompt").value = prompt ?? model.examples?.[0] ?? "";
  else setLabel(label ?? classes()[0]);
  if (/^\d+$/.test(seed ?? "")) $("seed").value = seed;
  const budget = Number(steps);
  setSteps(Number.isInteger(budget) && budget > 0 ? budget : refined(model));
}

const chip = (name) =>
  el("label", {}, el("input", { type: "radio", name: "label", value: name }), el("span", { title: name }, name));

const stop = ({ from, plan }) => el("button", { type: "button", "data-steps": from, title: plan }, String(from));

/** Makes the form say what a picture is of, so that what is drawn next goes on from it. */
export function reflect(picture) {
  const words = "receipt" in picture.source ? said(model, picture.source.receipt) : null;
  const subject = words?.subject ?? picture.source.label ?? picture.source.prompt;
  const seed = words?.seed ?? picture.source.seed;
  if (isText()) $("prompt").value = subject;
  else setLabel(subject);
  if (Number.isSafeInteger(seed)) $("seed").value = seed;
  if (picture.target && picture.target !== planWithin(model, steps())) setSteps(picture.target.steps, picture.target);
}

function setLabel(name) {
  if (searched()) {
    $("class-name").value = name;
    return;
  }
  const inputs = [...document.querySelectorAll("input[name=label]")];
  (inputs.find(({ value }) => value === name) ?? inputs[name] ?? inputs[0]).checked = true;
}

function setSteps(budget, plan) {
  $("steps").value = Math.min(Math.max(budget, model.steps.min), model.steps.max);
  showBudget(plan);
}

function showBudget(plan = planWithin(model, steps())) {
  const fid = plan.metrics.fid;
  $("steps-value").textContent = steps();
  $("plan-note").textContent =
    `Best plan within ${passes(steps())}: ${plan.name}, which spends ${plan.steps}` +
    (fid === undefined ? "." : `; measured FID ${fid.toFixed(1)}.`);
  for (const button of $("stops").children) {
    button.setAttribute("aria-pressed", String(Number(button.dataset.steps) === steps()));
  }
}

/**
 * Tells what somebody does with the form: `draw` it, `refine` what is shown up to another budget, `edit`
 * it, so that it no longer says what is shown, or `look` at what it draws: on a phone it is elsewhere, and
 * whoever moves a slider does not want to be taken there.
 */
export function listen({ draw, refine, edit, look }) {
  $("steps").addEventListener("input", () => showBudget());
  $("steps").addEventListener("change", refine);
  $("stops").addEventListener("click", ({ target }) => {
    if (!target.dataset.steps) return;
    setSteps(Number(target.dataset.steps));
    refine();
  });
  for (const field of ["classes", "class-name", "prompt", "seed"]) $(field).addEventListener("input", edit);
  for (const field of ["classes", "class-name", "seed"]) $(field).addEventListener("change", draw);
  $("prompt").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    draw();
    look();
  });
  $("examples").addEventListener("click", ({ target }) => {
    if (!target.matches(".example")) return;
    $("prompt").value = target.textContent;
    edit();
    draw();
    look();
  });
  $("shuffle").addEventListener("click", () => {
    $("seed").value = randomSeed();
    edit();
    draw();
  });
  $("form").addEventListener("submit", (event) => {
    event.preventDefault();
    draw();
    look();
  });
}
