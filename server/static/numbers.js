// The metrics as a page, read anew every few seconds: every family with its series since the server's start.

import { $, el } from "./dom.js";
import { quantile, series } from "./metrics.js";

const EVERY_MS = 5000;

/** Families in the order of the text: { name, help, type, rows: [labels, name, value] }. */
function families(text) {
  const found = new Map();
  const family = (name) => found.get(name) ?? found.set(name, { name, help: "", type: "", rows: [] }).get(name);
  for (const line of text.split("\n")) {
    const [, kind, name, words] = /^# (HELP|TYPE) (\S+) ?(.*)$/.exec(line) ?? [];
    if (kind) family(name)[kind.toLowerCase()] = words;
    const sample = kind ? null : series(line);
    if (!sample || sample.name.endsWith("_created")) continue;
    const owner = [sample.name, sample.name.replace(/_(bucket|sum|count|total)$/, "")].find((each) => found.has(each)) ?? sample.name;
    family(owner).rows.push(sample);
  }
  return [...found.values()].filter(({ rows }) => rows.length);
}

const said = (labels) => Object.entries(labels).map(([key, value]) => `${key} ${value}`).join(", ");
const written = (value) => (Number.isInteger(value) ? String(value) : value.toPrecision(4));

/** A histogram's series, each as how many, their mean, p50 and p99. */
function summaries(rows) {
  const groups = new Map();
  for (const { name, labels: { le, ...labels }, value } of rows) {
    const key = said(labels);
    if (!groups.has(key)) groups.set(key, { buckets: new Map(), sum: 0, count: 0 });
    const group = groups.get(key);
    if (le !== undefined) group.buckets.set(le === "+Inf" ? Infinity : Number(le), value);
    else group[name.endsWith("_sum") ? "sum" : "count"] = value;
  }
  const none = { buckets: new Map() };
  return Array.from(groups, ([key, group]) => {
    const numbers = group.count ? [group.sum / group.count, quantile(0.5, none, group), quantile(0.99, none, group)] : [];
    return [key, [group.count, ...numbers]];
  });
}

function section({ name, help, type, rows }) {
  const [heads, lines] =
    type === "histogram"
      ? [["count", "mean", "p50", "p99"], summaries(rows)]
      : [["value"], rows.map(({ labels, value }) => [said(labels), [value]])];
  const shown = type === "gauge" ? lines : lines.filter(([, [first]]) => first); // most of what is counted never happens
  const head = el("tr", {}, el("th", { scope: "col" }, "of"), ...heads.map((text) => el("th", { scope: "col", class: "number" }, text)));
  const body = shown.map(([key, values]) =>
    el("tr", {}, el("th", { scope: "row" }, key || "all"), ...heads.map((_, i) => el("td", { class: "number" }, values[i] === undefined ? "–" : written(values[i])))),
  );
  const table = el("table", {}, el("thead", {}, head), el("tbody", {}, ...body));
  const none = lines.length - shown.length;
  const content = [
    ...(shown.length ? [el("div", { class: "scroll", tabindex: "0" }, table)] : []),
    ...(none ? [el("p", { class: "note" }, `${shown.length ? none : "All"} of ${lines.length} series are 0.`)] : []),
  ];
  return el("section", { class: "card" }, el("h2", {}, el("code", {}, name)), el("p", {}, help), ...content);
}

const tables = () => [...$("doc").querySelectorAll(".scroll")];
const titleOf = (table) => table.parentElement.querySelector("h2").textContent;
// What somebody marks, or has focused to scroll by keys, stays as it is.
const inUse = () => getSelection().toString() || $("doc").contains(document.activeElement);

async function show() {
  try {
    const reply = await fetch("metrics", { cache: "no-store" });
    if (!reply.ok) throw new Error(`The server answered ${reply.status}.`);
    const all = families(await reply.text()).sort((a, b) => Number(b.name.startsWith("dd_")) - Number(a.name.startsWith("dd_")));
    const note =
      "Since the server’s start. p50: half of all took at most so long, p99: 99 of 100; both are estimated within the " +
      "histogram’s buckets. Names that end in _seconds are in seconds, _total only ever grows.";
    const scrolled = new Map(tables().map((table) => [titleOf(table), table.scrollLeft]));
    $("doc").replaceChildren(el("h1", {}, "Metrics"), el("p", {}, note), ...all.map(section));
    for (const table of tables()) table.scrollLeft = scrolled.get(titleOf(table)) ?? 0;
  } catch (error) {
    const said = error instanceof TypeError ? "The server does not answer." : error.message;
    if (!$("gone")) $("doc").prepend(el("p", { id: "gone", class: "error", role: "alert" }, said));
  }
}

// Read aloud anew every few seconds, it would say nothing: only the first time and errors are announced.
await show();
$("doc").removeAttribute("aria-live");
setInterval(() => !document.hidden && !inUse() && show(), EVERY_MS);
