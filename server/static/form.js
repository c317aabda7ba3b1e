// The form: what to draw (a class or a prompt, and a seed) and how far to refine it.

import { classOf } from "./address.js";
import { $, el, passes, randomSeed } from "./dom.js";
import { grades, planNamed, planWithin, said, saidOf, usual } from "./picture.js";

const CHIP_LIMIT = 24; // more classes than this are searched, not listed
const GALLERY = 8;
const EXAMPLES = 8; // that are offered, of those that a model has
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

const steps = () => Number($("steps").value);

/** How far: { steps } or { plan }, as the body says it. */
export const budget = () => ($("plan").value ? { plan: $("plan").value } : { steps: steps() });

/** The plan that it leads to. */
export const target = () => ($("plan").value ? planNamed(model, $("plan").value) : planWithin(model, steps()));

/** How many pictures a gallery has. */
export const count = () => Number($("count").value);

/** Whether it can be drawn; says what is missing if not. */
export const complete = () => $("form").reportValidity();

/** Whether there is anything to draw yet: a model of prompts may have no example. */
export const filled = () => !isText() || $("prompt").value.trim() !== "";

/** Shows the form of a model, filled from the address or as well as it goes. */
export function build(entry, { label, prompt, seed, steps, plan }) {
  model = entry;
  const { width, height } = model.image;
  const limit = isText() ? ` A prompt has up to ${model.limits.prompt} characters.` : "";
  $("knows").textContent = `${model.description} Pictures have ${width}×${height} pixels, enlarged here.`;
  $("knows").title = `It knows ${isText() ? "words." + limit : `${classes().length} classes.`}`;
  $("class-field").hidden = isText();
  $("prompt-field").hidden = !isText();
  $("prompt").required = isText();
  $("class-search").hidden = isText() || !searched();
  $("class-list").replaceChildren(...(searched() ? classes().map((name) => el("option", { value: name })) : []));
  $("classes").replaceChildren(...(searched() ? [] : classes().map(chip)));
  const examples = isText() ? (model.examples ?? []).slice(0, EXAMPLES) : [];
  $("examples").replaceChildren(...examples.map((text) => el("button", { type: "button", class: "example" }, text)));
  $("grades").replaceChildren(...grades(model).map(([word, { name, steps }]) => stop(steps, word, `${name}: ${passes(steps)}`)));
  $("stops").replaceChildren(...model.budgets.map(({ from, plan }) => stop(from, String(from), plan)));
  const offered = model.plans.filter((each) => each.offered);
  $("plan").replaceChildren(el("option", { value: "" }, "The best within the budget"), ...offered.map(planOption));
  $("steps").min = model.steps.min;
  $("steps").max = model.steps.max;
  $("count").max = model.limits.n;
  $("count").value = Math.min($("count").value || GALLERY, model.limits.n);
  if (isText()) $("prompt").value = prompt ?? model.examples?.[0] ?? "";
  else setLabel(label ?? model.examples?.[0] ?? classes()[0]);
  if (/^\d+$/.test(seed ?? "") && Number.isSafeInteger(Number(seed))) $("seed").value = seed;
  const wanted = Number(steps);
  const exact = offered.find(({ name }) => name === plan);
  setBudget(Number.isInteger(wanted) && wanted > 0 ? wanted : (exact ?? usual(model)).steps, exact);
}

const chip = (name) =>
  el("label", {}, el("input", { type: "radio", name: "label", value: name }), el("span", { title: name }, name));

const stop = (steps, word, title) => el("button", { type: "button", "data-steps": steps, title }, word);

const fidOf = ({ metrics: { fid } }) => (fid === undefined ? "" : `, FID ${fid.toFixed(1)}`);
const planOption = (plan) => el("option", { value: plan.name }, `${plan.name}: ${passes(plan.steps)}${fidOf(plan)}`);

/** Makes the form say what a picture is of, so that what is drawn next goes on from it. */
export function reflect(picture) {
  const words = "receipt" in picture.source ? said(model, picture.source.receipt) : null;
  const subject = words?.subject ?? picture.source.label ?? picture.source.prompt;
  const seed = words?.seed ?? picture.source.seed;
  if (isText()) $("prompt").value = subject;
  else setLabel(String(subject));
  if (Number.isSafeInteger(seed)) $("seed").value = seed;
  const { target: plan } = picture;
  if (plan && plan !== target()) setBudget(plan.steps, planWithin(model, plan.steps) === plan ? null : plan);
}

function setLabel(text) {
  if (searched()) {
    $("class-name").value = text;
    return;
  }
  const name = classOf(model, text);
  const inputs = [...document.querySelectorAll("input[name=label]")];
  (inputs.find(({ value }) => value === name) ?? inputs[0]).checked = true;
}

/** Sets the step budget, and the exact plan in its place where one is given. */
function setBudget(budget, plan = null) {
  $("steps").value = Math.min(Math.max(budget, model.steps.min), model.steps.max);
  $("plan").value = plan?.offered ? plan.name : "";
  showBudget();
}

function showBudget() {
  const plan = target();
  $("steps-value").textContent = steps();
  $("plan-note").textContent =
    ($("plan").value ? "Exactly " : `Best plan within ${passes(steps())}: `) +
    `${plan.name}, which spends ${plan.steps}${fidOf(plan).replace(",", "; measured")}. In it, ${saidOf(plan)}.`;
  for (const button of $("stops").children) press(button, !$("plan").value && Number(button.dataset.steps) === steps());
  for (const button of $("grades").children) press(button, Number(button.dataset.steps) === plan.steps);
}

const press = (button, on) => button.setAttribute("aria-pressed", String(on));

/**
 * Tells what somebody does with the form: `draw` it, `refine` what is shown up to another budget, `edit`
 * it, so that it no longer says what is shown, or `look` at what it draws: on a phone it is elsewhere, and
 * whoever moves a slider does not want to be taken there.
 */
export function listen({ draw, refine, edit, look }) {
  $("steps").addEventListener("input", () => setBudget(steps()));
  $("steps").addEventListener("change", refine);
  $("plan").addEventListener("change", () => {
    if ($("plan").value) setBudget(target().steps, target());
    else showBudget();
    refine();
  });
  for (const group of ["grades", "stops"]) {
    $(group).addEventListener("click", ({ target: button }) => {
      if (!button.dataset.steps) return;
      setBudget(Number(button.dataset.steps));
      refine();
    });
  }
  for (const field of ["classes", "class-name", "prompt", "seed"]) $(field).addEventListener("input", edit);
  for (const field of ["classes", "class-name", "seed"]) $(field).addEventListener("change", draw);
  $("prompt").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    draw();
    look();
  });
  $("examples").addEventListener("click", ({ target: button }) => {
    if (!button.matches(".example")) return;
    $("prompt").value = button.textContent;
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
