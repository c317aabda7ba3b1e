// The pictures of this tab that outlive a reload, newest first. Bounded, and gone with the tab, as prompts are private.

import { Picture, planNamed } from "./picture.js";

const KEY = "dd-recent";
const TRAY = "dd-tray";
export const KEPT = 18;
const MOST_CHARACTERS = 2_000_000;

function read(key, otherwise) {
  try {
    return JSON.parse(sessionStorage.getItem(key)) ?? otherwise;
  } catch {
    return otherwise;
  }
}

function write(key, value) {
  try {
    sessionStorage.setItem(key, JSON.stringify(value));
  } catch {
    sessionStorage.removeItem(key); // the browser grants less, or nothing: then there is no history
  }
}

const entryOf = ({ model, source, stages }) => ({ model: model.name, source, stage: stages.at(-1) });

/** Puts the newest stage of a picture first; the oldest ones make room. */
export function save(picture) {
  const entry = entryOf(picture);
  if (!entry.stage) return;
  const others = read(KEY, []).filter(({ stage }) => stage.image.receipt !== entry.stage.image.receipt);
  const all = [entry, ...others].slice(0, KEPT);
  while (all.length && JSON.stringify(all).length > MOST_CHARACTERS) all.pop();
  write(KEY, all);
}

/** The saved pictures of the models that are loaded, newest first. */
export const saved = (models) => pictures(read(KEY, []), models);

/** Keeps what is in the tray, if it is not too much. */
export function saveTray(title, shown) {
  const tray = { title, entries: shown.map(entryOf) };
  if (JSON.stringify(tray).length <= MOST_CHARACTERS) write(TRAY, tray);
  else sessionStorage.removeItem(TRAY);
}

/** The tray as [title, pictures]; no pictures where there was none. */
export function savedTray(models) {
  const { title, entries } = read(TRAY, { title: "", entries: [] });
  return [title, pictures(entries, models)];
}

function pictures(entries, models) {
  return entries.flatMap(({ model: name, source, stage }) => {
    const model = models.find((entry) => entry.name === name);
    if (!model) return [];
    const picture = new Picture(model, source, planNamed(model, stage.plan), []);
    Object.assign(picture, { stages: [stage], waiting: false });
    return [picture];
  });
}
