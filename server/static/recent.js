// The pictures of this tab that outlive a reload, newest first. Bounded, and gone with the tab, as prompts are private.

import { Picture, planNamed } from "./picture.js";

const KEY = "dd-recent";
export const KEPT = 18;
const MOST_CHARACTERS = 2_000_000;

function entries() {
  try {
    return JSON.parse(sessionStorage.getItem(KEY)) ?? [];
  } catch {
    return [];
  }
}

/** Puts the newest stage of a picture first; the oldest ones make room. */
export function save({ model, source, stages }) {
  const stage = stages.at(-1);
  if (!stage) return;
  const others = entries().filter((entry) => entry.stage.image.receipt !== stage.image.receipt);
  const all = [{ model: model.name, source, stage }, ...others].slice(0, KEPT);
  while (all.length && JSON.stringify(all).length > MOST_CHARACTERS) all.pop();
  try {
    sessionStorage.setItem(KEY, JSON.stringify(all));
  } catch {
    sessionStorage.removeItem(KEY); // the browser grants less, or nothing: then there is no history
  }
}

/** The saved pictures of the models that are loaded, newest first. */
export function saved(models) {
  return entries().flatMap(({ model: name, source, stage }) => {
    const model = models.find((entry) => entry.name === name);
    if (!model) return [];
    const picture = new Picture(model, source, planNamed(model, stage.plan), []);
    Object.assign(picture, { stages: [stage], waiting: false });
    return [picture];
  });
}
