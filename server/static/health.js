// The dot: whether the server takes requests now.

import { $ } from "./dom.js";

const EVERY_MS = 2500;
const WAITING_MS = 500;
const LONGEST_MS = 5000; // an answer that takes longer is none

/** The server's state: ["ready"], ["waiting", its own words], or ["gone", ours]. */
async function state() {
  try {
    const reply = await fetch("readyz", { cache: "no-store", signal: AbortSignal.timeout(LONGEST_MS) });
    if (reply.ok) return ["ready"];
    return ["waiting", (await reply.json()).error.message];
  } catch {
    return ["gone", "the server does not answer"];
  }
}

/**
 * Asks again and again while the tab can be seen, and shows the answer at the dot; `ready` is called, and
 * gives the text beside it, whenever the server has become ready.
 */
export function watch(ready) {
  let was = null;
  let timer = null;

  async function look() {
    timer = null;
    let [now, message] = await state();
    if (now === "ready" && was !== "ready") {
      try {
        message = await ready();
      } catch {
        [now, message] = ["gone", "the server does not answer"];
      }
    }
    if (message !== undefined) $("model-text").textContent = message;
    $("dot").className = `dot ${now}`;
    was = now;
    if (!document.hidden) timer ??= setTimeout(look, now === "ready" ? EVERY_MS : WAITING_MS);
  }

  document.addEventListener("visibilitychange", () => {
    clearTimeout(timer);
    timer = null;
    if (!document.hidden) look();
  });
  look();
}
