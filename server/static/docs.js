// Renders the OpenAPI document: every path with its fields, replies, a curl command, and a form that sends.

import { el } from "./dom.js";
import { tryIt } from "./try.js";

const VERBS = ["get", "post", "put", "delete"];
let schemas = {};

/** Text with `code` spans. */
function prose(text = "") {
  return text.split("`").map((part, index) => (index % 2 ? el("code", {}, part) : part));
}

const resolve = (schema) => (schema?.$ref ? schemas[schema.$ref.split("/").pop()] : schema);

function typeOf(schema) {
  if (schema.$ref) return schema.$ref.split("/").pop();
  if (schema.anyOf) return schema.anyOf.map(typeOf).filter((type) => type !== "null").join(" or ");
  if (schema.enum) return schema.enum.join(" | ");
  if (schema.type === "array") return `list of ${typeOf(schema.items)}`;
  return schema.type ?? "any";
}

function limits(schema) {
  const place = schema.anyOf?.find((part) => part.minimum !== undefined || part.maximum !== undefined) ?? schema;
  const parts = [];
  if (place.minimum !== undefined) parts.push(`from ${place.minimum}`);
  if (place.maximum !== undefined) parts.push(`to ${BigInt(place.maximum) > 2n ** 53n ? "2⁶³ − 1" : place.maximum}`);
  if (schema.default !== undefined && schema.default !== null) parts.push(`default ${schema.default}`);
  return parts.length ? `(${parts.join(", ")})` : "";
}

function fieldTable(schema) {
  const rows = Object.entries(schema.properties ?? {}).map(([name, field]) =>
    el(
      "tr",
      {},
      el("th", { scope: "row" }, el("code", {}, name)),
      el("td", {}, typeOf(field)),
      el("td", {}, ...prose([field.description ?? resolve(field)?.description, limits(field)].filter(Boolean).join(" "))),
    ),
  );
  return el("div", { class: "scroll" }, el("table", {}, el("tbody", {}, ...rows)));
}

function curl(path, verb, body) {
  const command = `curl -s ${verb === "get" || body ? "" : `-X ${verb.toUpperCase()} `}${new URL(".", location.href)}${path.slice(1)}`;
  if (!body) return command;
  return `${command} -H 'content-type: application/json' \\\n  -d '${JSON.stringify(body.example)}'`;
}

function section(path, verb, operation) {
  const body = operation.requestBody?.content["application/json"];
  const parts = [
    el("h2", {}, el("span", { class: "verb" }, verb.toUpperCase()), el("code", {}, path), operation.summary ?? ""),
    el("p", {}, ...prose(operation.description)),
  ];
  if (body) parts.push(el("h3", {}, "Fields"), fieldTable(body.schema));
  parts.push(el("h3", {}, "Try it"), el("pre", { tabindex: "0" }, curl(path, verb, body)));
  parts.push(tryIt(path, verb, operation.parameters ?? [], body?.example ?? (body && {})));
  const replies = Object.entries(operation.responses ?? {}).filter(([status]) => status !== "422");
  parts.push(el("h3", {}, "Replies"));
  const rows = replies.map(([status, reply]) =>
    el("tr", {}, el("th", { scope: "row" }, status), el("td", {}, ...prose(reply.description))),
  );
  parts.push(el("table", {}, el("tbody", {}, ...rows)));
  const success = resolve(operation.responses?.["200"]?.content?.["application/json"]?.schema);
  if (success?.properties) parts.push(el("h3", {}, "The JSON reply"), fieldTable(success));
  return el("section", { class: "card" }, ...parts);
}

const description = await (await fetch("openapi.json")).json();
schemas = description.components?.schemas ?? {};
const sections = Object.entries(description.paths).flatMap(([path, operations]) =>
  VERBS.filter((verb) => operations[verb]).map((verb) => section(path, verb, operations[verb])),
);
const errors = el(
  "section",
  { class: "card" },
  el("h2", {}, "Errors"),
  el("p", {}, "Every reply that is not a success has this body; param names the offending field, or is null."),
  el("pre", { tabindex: "0" }, '{"error": {"code": "invalid_request", "message": "…", "param": "steps"}}'),
);
document.getElementById("doc").replaceChildren(
  el("h1", {}, `${description.info.title} API`),
  el("p", {}, `Version ${description.info.version}. ${description.info.summary ?? ""}`),
  ...sections,
  errors,
);
