// The address: it leads back to what is shown, in words or by its receipt. What a link asks for.

const visited = new Map(); // by the id in history.state: the picture that Back leads to
let fresh = true; // the current entry of the history stands for no picture yet
let count = 0;

/** What the address asks for, as texts. */
export const asked = () => Object.fromEntries(new URLSearchParams(location.search));

/** Makes `words` the address: of the current entry where it is this picture's already, else of a new one. */
export function visit(picture, words) {
  const url = `?${new URLSearchParams(words)}`;
  if (fresh || visited.get(history.state?.visit) === picture) {
    const id = history.state?.visit ?? newId();
    visited.set(id, picture);
    history.replaceState({ visit: id }, "", url);
  } else {
    const id = newId();
    visited.set(id, picture);
    history.pushState({ visit: id }, "", url);
  }
  fresh = false;
}

const newId = () => `${performance.timeOrigin}-${count++}`; // ids of earlier loads stay in the history

/** Calls `back(picture)` when Back or Forward leads to one that was shown, else `open()`, to draw what is asked. */
export function listen({ back, open }) {
  addEventListener("popstate", () => {
    const picture = visited.get(history.state?.visit);
    fresh = !picture?.stage;
    if (fresh) open();
    else back(picture);
  });
}

/** The model that a link means: the named one, else the first that reads what the link holds. */
export function opening({ model, label }, models) {
  const fitting = label === undefined ? "text" : "class";
  return models.find(({ name }) => name === model) ?? models.find((entry) => entry.conditioning === fitting) ?? models[0];
}

/** Why this link cannot be followed, as [message, field], or null; the receipt is for the server to judge. */
export function wrong(link, models, model) {
  const { label, prompt, seed, steps, plan } = link;
  const asks = (what, value) => `This link asks for the ${what} “${value.slice(0, 64)}”`;
  if (link.model !== undefined && link.model !== model.name)
    return [`${asks("model", link.model)}, which is not loaded. Here: ${list(models.map(({ name }) => name))}.`, "model"];
  if (label !== undefined && model.conditioning === "text")
    return [`${asks("class", label)}, and ${model.name} draws from prompts.`, "prompt"];
  if (label !== undefined && classOf(model, label) === undefined)
    return [`${asks("class", label)}, which ${model.name} does not know. It knows ${list(model.classes)}.`, "label"];
  if (prompt !== undefined && label === undefined && model.conditioning !== "text")
    return [`${asks("prompt", prompt)}, and ${model.name} draws from classes: ${list(model.classes)}.`, "label"];
  if (seed !== undefined && !(/^\d+$/.test(seed) && Number.isSafeInteger(Number(seed))))
    return [`${asks("seed", seed)}; seeds are whole numbers from 0 to 2⁵³ − 1.`, "seed"];
  const { min, max } = model.steps;
  if (steps !== undefined && !(/^\d+$/.test(steps) && min <= Number(steps) && Number(steps) <= max))
    return [`${asks("step budget", steps)}; ${model.name} takes ${min} to ${max}.`, "steps"];
  const offered = model.plans.filter((entry) => entry.offered).map(({ name }) => name);
  if (plan !== undefined && !offered.includes(plan))
    return [`${asks("plan", plan)}, which ${model.name} does not offer. It offers ${list(offered)}.`, "plan"];
  return null;
}

/** A model's class by its name or index, or undefined; what reads as neither may be a synonym of a long list. */
export function classOf(model, label) {
  const { classes } = model;
  const name = label.trim().toLowerCase();
  const found = classes.find((each) => each.toLowerCase() === name) ?? (/^\d+$/.test(name) ? classes[Number(name)] : undefined);
  return found ?? classes.find((each) => each.toLowerCase().split(/, */).includes(name));
}

const LISTED = 12;
const list = (names) => names.slice(0, LISTED).join(", ") + (names.length > LISTED ? `, and ${names.length - LISTED} more` : "");
