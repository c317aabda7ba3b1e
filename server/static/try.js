// "Try it": a form that sends the request which is described, and shows what comes back.

import { ask } from "./api.js";
import { el } from "./dom.js";

const LONG = 200; // characters of a text in an answer: pictures are shown as pictures

/** The form of one operation; `example` is its body, undefined where it has none. */
export function tryIt(path, verb, parameters, example) {
  const inputs = parameters.filter((each) => ["path", "query"].includes(each.in)).map(input);
  const body = example && el("textarea", { rows: 4, "aria-label": "Body", spellcheck: "false" }, JSON.stringify(example, null, 1));
  const button = el("button", { type: "submit" }, "Send");
  const answer = el("div", { "aria-live": "polite" });
  const form = el("form", { autocomplete: "off" }, ...inputs.map(([, label]) => label), ...(body ? [body] : []), button);
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    button.disabled = true;
    answer.replaceChildren("Sending …");
    try {
      const began = performance.now();
      const reply = await ask(addressOf(path, inputs), {
        method: verb.toUpperCase(),
        ...(body && { headers: { "content-type": "application/json" }, body: body.value }),
      });
      const shown = await shownOf(reply);
      const took = `${Math.round(performance.now() - began)} ms`;
      answer.replaceChildren(el("p", {}, `${reply.status} ${reply.statusText}, ${reply.headers.get("content-type") ?? "no body"}, ${took}`), ...shown);
    } catch (error) {
      answer.replaceChildren(el("p", { class: "error" }, error.message));
    } finally {
      button.disabled = false;
    }
  });
  return el("div", { class: "try" }, form, answer);
}

function input(parameter) {
  const field = el("input", { type: "text", spellcheck: "false", autocapitalize: "off" });
  field.required = parameter.in === "path";
  return [parameter, el("label", {}, parameter.name, field), field];
}

function addressOf(path, inputs) {
  const query = new URLSearchParams();
  let address = path.slice(1); // relative: the server may be behind a prefix
  for (const [{ name, in: place }, , { value }] of inputs) {
    if (place === "path") address = address.replace(`{${name}}`, encodeURIComponent(value.trim()));
    else if (value.trim()) query.set(name, value.trim());
  }
  return query.size ? `${address}?${query}` : address;
}

async function shownOf(reply) {
  const type = reply.headers.get("content-type") ?? "";
  if (type.startsWith("image/")) return [figure([URL.createObjectURL(await reply.blob())])];
  const text = await reply.text();
  if (!text) return [];
  if (!type.includes("json")) return [pre(text.replace(/[A-Za-z0-9+/=]{200,}/g, shortened))];
  const found = [];
  const value = JSON.parse(text, function (key, part) {
    if (typeof part !== "string" || part.length <= LONG) return part;
    if (key === "data" && this.format) found.push(`data:image/${this.format};base64,${part}`);
    if (key === "b64_json") found.push(`data:image/png;base64,${part}`);
    return shortened(part);
  });
  return [...(found.length ? [figure(found)] : []), pre(JSON.stringify(value, null, 2))];
}

const shortened = (text) => `${text.slice(0, 24)}… (${text.length} characters)`;
const pre = (text) => el("pre", { class: "answer", tabindex: "0" }, text);
const figure = (addresses) => el("figure", {}, ...addresses.map((src) => el("img", { src, alt: "The picture that came back" })));
