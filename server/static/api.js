// What the server is asked, at addresses relative to the page's own, with the tab's API key, and how its refusals are told.

import { eventsOf } from "./sse.js";
import { $ } from "./dom.js";

const KEY = "dd-api-key";
const ADMIN_KEY = "dd-admin-key";
let keyAsked = null; // promise of a key that the form is waiting for

export const hasKey = () => sessionStorage.getItem(KEY) !== null;

/** What the server, or the way to it, has against a request; `param` is the field, where there is one. */
export class Refusal extends Error {
  constructor(message, param = null) {
    super(message);
    this.param = param;
  }
}

/** fetch with the tab's API key, or admin key; a 401 shows the field for it, and what was asked is asked again. */
export async function ask(path, options = {}) {
  const admin = path.startsWith("admin");
  const slot = admin ? ADMIN_KEY : KEY;
  for (;;) {
    const key = sessionStorage.getItem(slot);
    const headers = key ? { ...options.headers, authorization: `Bearer ${key}` } : options.headers;
    const reply = await fetch(path, { ...options, headers }).catch(unreachable);
    if (reply.status !== 401) return reply;
    if (sessionStorage.getItem(slot) !== key) continue; // another request has got one meanwhile
    const kind = admin ? "admin key" : "key";
    const note = key ? `The server does not know this ${kind}.` : `This ${admin ? "needs an" : "server asks for a"} ${kind}.`;
    keyAsked ??= askForKey(slot, note);
    await keyAsked;
  }
}

/** What fetch and its body reject with is an abort, or a TypeError that says nothing to people. */
function unreachable(error) {
  throw error instanceof TypeError ? new Refusal("The server does not answer.") : error;
}

function askForKey(slot, note) {
  sessionStorage.removeItem(slot);
  $("key-note").textContent = `${note} It is kept until this tab is closed.`;
  $("key-form").hidden = false;
  $("key").focus();
  return new Promise((done) => {
    $("key-form").onsubmit = (event) => {
      event.preventDefault();
      const key = $("key").value.trim();
      if (!/^[\x21-\x7e]+$/.test(key)) {
        $("key-note").textContent = "A key has no spaces and only ASCII characters.";
        return;
      }
      sessionStorage.setItem(slot, key);
      $("key").value = "";
      $("key-form").hidden = true;
      keyAsked = null;
      done();
    };
  });
}

async function post(body, accept, signal) {
  const reply = await ask("generate", {
    method: "POST",
    headers: { "content-type": "application/json", accept },
    body: JSON.stringify(body),
    signal,
  });
  if (reply.ok) return reply;
  throw await refusalOf(reply);
}

/** What a reply that is no success says. */
export async function refusalOf(reply) {
  const { error } = await reply.json().catch(() => ({ error: { message: `The server answered ${reply.status}.` } }));
  const wait = reply.headers.get("retry-after");
  return new Refusal(error.message + (wait && reply.status >= 429 ? ` (try again in ${wait} s)` : ""), error.param);
}

/** Images in one piece: the JSON reply of POST /generate. */
export async function generate(body, signal) {
  return (await post(body, "application/json", signal)).json();
}

/**
 * Images as they become better: the data of each `image` event of POST /generate. Returns once the server
 * has accepted the request; what goes wrong later is thrown by the events.
 */
export async function stream(body, signal) {
  const reply = await post(body, "text/event-stream", signal);
  return pictures(reply.body);
}

async function* pictures(body) {
  const events = eventsOf(body);
  try {
    for (;;) {
      const { done, value } = await events.next().catch(unreachable);
      if (done) break;
      const found = JSON.parse(value.data);
      if (value.event === "image") yield found;
      if (value.event === "done") return;
      if (value.event === "error") throw new Refusal(found.error.message, found.error.param);
    }
  } finally {
    await events.return();
  }
  throw new Refusal("The connection ended before the picture was done.");
}
