// The live strip: what the server went through in the last minute, from differences of its own /metrics.

import { $ } from "./dom.js";

const EVERY_MS = 2500;
const WINDOW_MS = 60_000;
const RECENT_MS = 10_000; // the rate is of these, so that it follows what one does
const CURVE = { width: 120, height: 28 };

const SAMPLE = /^(\w+)(?:\{(.*)\})? (\S+)$/;
const LABEL = /(\w+)="((?:[^"\\]|\\.)*)"/g;

/** A line of the text format as { name, labels, value }, or null where it is no sample. */
export function series(line) {
  const [, name, labels = "", value] = SAMPLE.exec(line) ?? [];
  if (!name) return null;
  return { name, labels: Object.fromEntries(Array.from(labels.matchAll(LABEL), ([, key, word]) => [key, word])), value: Number(value) };
}

/** The numbers that the strip is made of, out of the Prometheus text format; summed over models and plans. */
export function read(text, at) {
  const found = { at, depth: 0, images: 0, buckets: new Map() };
  for (const line of text.split("\n")) {
    if (!line.startsWith("dd_")) continue;
    const { name, labels, value } = series(line);
    if (name === "dd_queue_depth") found.depth = value;
    if (name === "dd_images_total") found.images += value;
    if (name !== "dd_request_duration_seconds_bucket" || labels.outcome !== "ok") continue;
    const edge = labels.le === "+Inf" ? Infinity : Number(labels.le);
    found.buckets.set(edge, (found.buckets.get(edge) ?? 0) + value);
  }
  return found;
}

/**
 * The quantile q of what came between two readings, in seconds, as Prometheus' histogram_quantile has it:
 * linear within a bucket, and the last finite edge for what is beyond. Null where nothing came.
 */
export function quantile(q, before, after) {
  const counts = [...after.buckets].sort(([a], [b]) => a - b).map(([edge, n]) => [edge, n - (before.buckets.get(edge) ?? 0)]);
  const rank = q * (counts.at(-1)?.[1] ?? 0);
  if (!rank) return null;
  let [low, below] = [0, 0];
  for (const [edge, n] of counts) {
    if (n >= rank) return edge === Infinity ? low : low + ((edge - low) * (rank - below)) / (n - below);
    [low, below] = [edge, n];
  }
  return null;
}

/** Pictures a second between two readings. */
export const rate = (before, after) => (1000 * (after.images - before.images)) / (after.at - before.at);

const short = (seconds) => {
  if (seconds === null) return "–";
  const ms = 1000 * seconds;
  return ms < 9.95 ? `${ms.toFixed(1)} ms` : ms < 1000 ? `${Math.round(ms)} ms` : `${seconds.toFixed(1)} s`;
};

/** Fetches /metrics every few seconds while the tab can be seen, and shows the last minute. */
export function startStrip() {
  let readings = [];
  let timer = null;

  async function look() {
    timer = null;
    try {
      const reply = await fetch("metrics", { cache: "no-store" });
      if (reply.ok) readings = added(readings, read(await reply.text(), performance.now()));
      $("live").classList.toggle("stale", !reply.ok);
    } catch {
      $("live").classList.add("stale");
    }
    show(readings);
    if (!document.hidden) timer ??= setTimeout(look, EVERY_MS);
  }

  document.addEventListener("visibilitychange", () => {
    clearTimeout(timer);
    timer = null;
    if (!document.hidden) look();
  });
  look();
}

function added(readings, last) {
  const restarted = readings.length && last.images < readings.at(-1).images; // counters begin at zero again
  const kept = restarted ? [] : readings.filter(({ at }) => last.at - at <= WINDOW_MS);
  return [...kept, last];
}

function show(readings) {
  if (!readings.length) return;
  const [first, last] = [readings[0], readings.at(-1)];
  $("live-depth").textContent = String(last.depth);
  if (readings.length < 2) return;
  $("live-p50").textContent = short(quantile(0.5, first, last));
  $("live-p99").textContent = short(quantile(0.99, first, last));
  const recent = readings.filter(({ at }) => last.at - at <= RECENT_MS);
  $("live-rate").textContent = rate(recent.length > 1 ? recent[0] : readings.at(-2), last).toFixed(1);
  draw(readings);
}

function draw(readings) {
  const last = readings.at(-1);
  const rates = readings.slice(1).map((after, i) => [after.at, rate(readings[i], after)]);
  const most = Math.max(1, ...rates.map(([, value]) => value));
  const points = rates.map(([at, value]) => {
    const x = CURVE.width * (1 - (last.at - at) / WINDOW_MS);
    const y = CURVE.height - 2 - (CURVE.height - 4) * (value / most);
    return `${x.toFixed(1)},${y.toFixed(1)}`;
  });
  $("live-curve").setAttribute("points", points.join(" "));
}
