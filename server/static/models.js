// The models as a page: what each knows, what its plans cost and were measured to reach.

import { ask, refusalOf } from "./api.js";
import { $, el, passes } from "./dom.js";
import { saidOf } from "./picture.js";

const COLUMNS = [
  ["FID", "fid", 1, "how far many of its pictures are from real ones; lower is better"],
  ["right class", "class_accuracy", 2, "share of pictures in which a classifier sees the class that was asked for"],
  ["right caption", "right_caption", 2, "share of pictures that are matched with their prompt among 100"],
  ["ms an image", "ms_per_image", 0, "alone, on the machine that it was measured on"],
];

const fact = (name, ...value) => [el("dt", {}, name), el("dd", {}, ...value)];

function knows({ conditioning, classes, examples, limits }) {
  if (conditioning === "class") return fact(`${classes.length} classes`, classes.slice(0, 50).join(", ") + (classes.length > 50 ? ", …" : ""));
  const links = examples.flatMap((text) => [", ", text]).slice(1);
  return [...fact("prompts", `up to ${limits.prompt} characters`), ...(links.length ? fact("for example", ...links) : [])];
}

function planTable({ plans, qualities }) {
  const columns = COLUMNS.filter(([, key]) => plans.some(({ metrics }) => metrics[key] !== undefined));
  const word = (name) => Object.entries(qualities).filter(([, plan]) => plan === name).map(([quality]) => quality).join(", ");
  const head = el(
    "tr", {}, ...["plan", "passes"].map((text) => el("th", { scope: "col" }, text)),
    ...columns.map(([title, , , note]) => el("th", { scope: "col", class: "number", title: note }, title)),
    el("th", { scope: "col" }, "quality"), el("th", { scope: "col" }, "who draws"),
  );
  const rows = plans.filter(({ offered }) => offered).map((plan) =>
    el(
      "tr", {}, el("th", { scope: "row" }, el("code", {}, plan.name)), el("td", {}, passes(plan.steps)),
      ...columns.map(([, key, digits]) => el("td", { class: "number" }, plan.metrics[key]?.toFixed(digits) ?? "–")),
      el("td", {}, word(plan.name)), el("td", { class: "wide" }, saidOf(plan)),
    ),
  );
  const notes = columns.map(([title, , , note]) => `${title}: ${note}.`).join(" ");
  return [el("div", { class: "scroll", tabindex: "0" }, el("table", {}, el("thead", {}, head), el("tbody", {}, ...rows))), el("p", { class: "note" }, notes)];
}

function section(model) {
  const { name, description, image, data, licence, family, weights } = model;
  const facts = [
    ...fact("pictures", `${image.width}×${image.height} pixels`), ...knows(model), ...fact("licence", licence), ...fact("data", data),
    ...fact("family", family), ...fact("weights", el("code", {}, weights)),
  ];
  return el(
    "section", { class: "card" }, el("h2", {}, name), el("p", {}, description),
    el("p", {}, el("a", { href: `./?${new URLSearchParams({ model: name })}` }, "Draw with it")),
    el("dl", { class: "facts" }, ...facts), el("h3", {}, "Plans"), ...planTable(model),
  );
}

try {
  const reply = await ask("models");
  if (!reply.ok) throw await refusalOf(reply);
  const { models } = await reply.json();
  $("doc").replaceChildren(el("h1", {}, "Models"), ...models.map(section));
} catch (error) {
  $("doc").replaceChildren(el("p", { class: "error", role: "alert" }, error.message));
}
