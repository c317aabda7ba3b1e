// The sheet: the picture that is shown, large, or several side by side; its stages, and what can be done with it.

import { hasKey } from "./api.js";
import { $, el, milliseconds, passes } from "./dom.js";
import { link } from "./download.js";
import { mark, setPicture, tile } from "./gallery.js";
import { altOf, bodyOf, planNamed, timeOf, titleOf } from "./picture.js";

let shown = null;
const one = $("one");
const frame = one.firstElementChild;

/** The picture that is shown, or null. */
export const current = () => shown;

/** Shows one picture, large. What was there stays until the first stage has come. */
export function show(picture) {
  $("figures").className = "figures one";
  if ($("figures").firstElementChild !== one) $("figures").replaceChildren(one);
  select(picture);
}

/** Shows pictures side by side, and the first one's panel; `pick` is told when another one is chosen. */
export function compare(pictures, pick) {
  $("figures").className = "figures several";
  $("figures").replaceChildren(...pictures.map((picture) => compared(picture, pick)));
  select(pictures[0]);
}

/** Makes the panel that of a picture which can be seen already. */
export function select(picture) {
  shown?.removeEventListener("change", refresh);
  shown = picture;
  shown.addEventListener("change", refresh);
  mark(picture);
  refresh();
}

function compared(picture, pick) {
  const time = el("span", { class: "time" }, "…");
  const facts = el("dl", { class: "facts" });
  const title = el("span", {}, passes(picture.target.steps));
  const show = () => {
    const { stage } = picture;
    if (!stage) return;
    title.textContent = passes(stage.steps);
    time.textContent = milliseconds(stage.timings.compute_ms);
    facts.replaceChildren(...factsOf(picture));
  };
  picture.addEventListener("change", show);
  const caption = el("figcaption", {}, el("div", { class: "title" }, title, time), facts);
  facts.append(fact("plan", picture.target.name));
  return el("figure", {}, tile(picture, pick), caption);
}

export function refresh() {
  if (!shown) return;
  const { stage, waiting } = shown;
  const single = $("figures").firstElementChild === one;
  if (single) {
    frame.classList.toggle("busy", waiting);
    frame.classList.toggle("stale", !stage);
  }
  showTrail();
  if (!stage) return;
  if (single) setPicture(frame.firstElementChild ?? frame.appendChild(el("img")), stage, altOf(shown.model, stage));
  $("panel").classList.remove("empty");
  $("title").textContent = titleOf(shown.model, stage);
  $("facts").replaceChildren(...factsOf(shown));
  $("busy-note").textContent = shown.note;
  $("busy-note").hidden = !shown.note;
  link(shown);
  $("open").href = `images/${stage.image.receipt}`;
  $("open").hidden = hasKey(); // a link cannot bring the key
  if (shown.chosen === null) announce();
}

function announce() {
  const { stage, stages, waiting, model } = shown;
  const what = `${passes(stage.steps)}, ${timeOf(stage)}`;
  if (!waiting) $("status").textContent = `${titleOf(model, stage)}: ${what}. ${shown.note}`;
  else if (stages.length === 1) $("status").textContent = `${titleOf(model, stage)}: ${what}, being refined.`;
}

const fact = (name, value) => el("div", {}, el("dt", {}, name), el("dd", {}, value));

function factsOf({ model, stage }) {
  const fid = planNamed(model, stage.plan)?.metrics.fid;
  return [fact("plan", stage.plan), ...(fid === undefined ? [] : [fact("FID", fid.toFixed(1))])];
}

/** The stages, each a button that goes back to it; changed in place, so that none loses the focus. */
function showTrail() {
  const { trail, stage: current } = shown;
  const items = $("trail").children;
  while (items.length > trail.length) $("trail").lastChild.remove();
  while (items.length < trail.length) $("trail").append(trailItem());
  trail.forEach(([plan, steps, stage], index) => {
    const button = items[index].firstChild;
    const [cost, time] = button.children;
    cost.textContent = passes(steps);
    time.textContent = stage ? timeOf(stage) : "…";
    button.title = plan;
    button.disabled = !stage;
    button.onclick = () => shown.choose(index);
    if (stage && stage === current) button.setAttribute("aria-current", "step");
    else button.removeAttribute("aria-current");
  });
}

const trailItem = () =>
  el("li", {}, el("button", { type: "button" }, el("span", { class: "cost" }), el("span", { class: "time" })));

/** The command that makes the stage which is shown; `model` names its model where several are loaded. */
export function curl(named) {
  const source = "receipt" in shown.source ? shown.source : { ...shown.source, ...named };
  const body = JSON.stringify(bodyOf(shown.model, source, shown.stage)).replaceAll("'", "'\\''");
  const key = hasKey() ? `-H "authorization: Bearer $DD_API_KEY" ` : "";
  return (
    `curl -s ${new URL("generate", location.href)} ${key}-H 'accept: image/png' -H 'content-type: application/json' ` +
    `-d '${body}' > image.png`
  );
}
