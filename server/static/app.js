// The playground: reads GET /models, posts to /generate, keeps its state in the address bar.

const $ = (id) => document.getElementById(id);
const KEPT_IMAGES = 18;
const CHIP_LIMIT = 24; // more classes than this are searched, not listed

let model = null;
let running = null; // AbortController of the run in progress
let keyAsked = null; // promise of a key that the form is waiting for

/** An element with attributes and children; text is never parsed as HTML. */
function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

const sleep = (ms) => new Promise((done) => setTimeout(done, ms));
const milliseconds = (ms) => (ms < 10 ? `${ms.toFixed(1)} ms` : ms < 1000 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(2)} s`);
const passes = (n) => (n === 1 ? "1 pass" : `${n} passes`);

function showError(message, param) {
  $("error").textContent = message;
  $("error").hidden = !message;
  for (const [field, input] of [["seed", "seed"], ["steps", "steps"], ["label", "class-name"]]) {
    $(input).setAttribute("aria-invalid", String(field === param));
  }
}

// ---- what the form says

function chosenLabel() {
  if (model.classes.length > CHIP_LIMIT) {
    const text = $("class-name").value.trim();
    return /^\d+$/.test(text) ? Number(text) : text;
  }
  return document.querySelector("input[name=label]:checked").value;
}

const request = (steps) => ({ label: chosenLabel(), steps, seed: Number($("seed").value) });

function planFor(steps) {
  const run = model.budgets.find((budget) => budget.from <= steps && steps <= budget.to);
  return model.plans.find((plan) => plan.name === run.plan);
}

function showBudget() {
  const steps = Number($("steps").value);
  const plan = planFor(steps);
  const fid = plan.metrics.fid;
  $("steps-value").textContent = steps;
  $("plan-note").textContent =
    `Best plan within ${passes(steps)}: ${plan.name}, which spends ${plan.steps}` +
    (fid === undefined ? "." : `; measured FID ${fid.toFixed(1)}.`);
  for (const stop of $("stops").children) stop.setAttribute("aria-pressed", String(Number(stop.dataset.steps) === steps));
}

function setSteps(steps) {
  $("steps").value = steps;
  showBudget();
}

function remember() {
  const { label, steps, seed } = request(Number($("steps").value));
  history.replaceState(null, "", `?${new URLSearchParams({ label, steps, seed })}`);
}

// ---- what the server answers

/** fetch with the tab's API key; a 401 shows the field for it, and what was asked is asked again. */
async function ask(path, options = {}) {
  for (;;) {
    const key = sessionStorage.getItem("dd-api-key");
    const headers = key ? { ...options.headers, authorization: `Bearer ${key}` } : options.headers;
    const reply = await fetch(path, { ...options, headers });
    if (reply.status !== 401) return reply;
    if (sessionStorage.getItem("dd-api-key") !== key) continue; // another request has got one meanwhile
    keyAsked ??= askForKey(key ? "The server does not know this key." : "This server asks for a key.");
    await keyAsked;
  }
}

function askForKey(note) {
  sessionStorage.removeItem("dd-api-key");
  if (!model) $("model-text").textContent = "waiting for a key";
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
      sessionStorage.setItem("dd-api-key", key);
      $("key").value = "";
      $("key-form").hidden = true;
      keyAsked = null;
      done();
    };
  });
}

async function post(body, signal) {
  const reply = await ask("/generate", {
    method: "POST",
    headers: { "content-type": "application/json", accept: "application/json" },
    body: JSON.stringify(body),
    signal,
  });
  const result = await reply.json();
  if (reply.ok) return result;
  const wait = reply.headers.get("retry-after");
  const error = new Error(result.error.message + (wait && reply.status === 503 ? ` (try again in ${wait} s)` : ""));
  error.param = result.error.param;
  throw error;
}

function emptyFigure(title) {
  const frame = el("div", { class: "frame busy" });
  const caption = el("figcaption", {}, el("div", { class: "title" }, el("span", {}, title)));
  return { figure: el("figure", {}, frame, caption), frame, caption };
}

function fact(name, value) {
  return el("div", {}, el("dt", {}, name), el("dd", {}, value));
}

function fill(slot, title, body, reply, compared) {
  const image = reply.images[0];
  const source = `data:image/${image.format};base64,${image.data}`;
  const alt = `${body.label}, seed ${reply.seed}, made in ${passes(reply.steps)}`;
  slot.frame.classList.remove("busy");
  slot.frame.replaceChildren(el("img", { src: source, alt, width: image.width, height: image.height }));
  const facts = el("dl", { class: "facts" }, fact("plan", reply.plan));
  const fid = model.plans.find((plan) => plan.name === reply.plan)?.metrics.fid;
  if (fid !== undefined) facts.append(fact("FID", fid.toFixed(1)));
  if (!compared) facts.append(fact("seed", String(reply.seed)), fact("total", milliseconds(reply.timings.total_ms)));
  slot.caption.replaceChildren(
    el("div", { class: "title" }, el("span", {}, title), el("span", { class: "time" }, milliseconds(reply.timings.compute_ms))),
    facts,
  );
  keep(source, alt, body);
  return source;
}

function keep(source, alt, body) {
  for (const old of [...$("thumbs").children]) if (old.firstChild.src === source) old.remove();
  const thumb = el("button", { type: "button", title: alt }, el("img", { src: source, alt: `Again: ${alt}` }));
  thumb.addEventListener("click", () => {
    restore(body);
    generate();
  });
  $("thumbs").prepend(thumb);
  while ($("thumbs").children.length > KEPT_IMAGES) $("thumbs").lastChild.remove();
  $("history").hidden = $("thumbs").children.length < 2;
}

/** Runs the given budgets one after the other, so that none waits for another's batch. */
async function run(columns) {
  running?.abort();
  const mine = (running = new AbortController());
  if (!$("form").reportValidity()) return;
  showError("");
  remember();
  const slots = columns.map(([title]) => emptyFigure(title));
  $("figures").className = `figures ${columns.length > 1 ? "three" : "one"}`;
  $("figures").replaceChildren(...slots.map((slot) => slot.figure));
  $("tools").hidden = true;
  $("figures").setAttribute("aria-busy", "true");
  try {
    for (const [index, [title, steps]] of columns.entries()) {
      const body = request(steps);
      const reply = await post(body, mine.signal);
      const source = fill(slots[index], title, body, reply, columns.length > 1);
      if (columns.length === 1) {
        $("download").href = source;
        $("download").download = `${body.label}-seed-${reply.seed}-${reply.plan}.png`;
        $("copy").dataset.body = JSON.stringify(body);
        $("tools").hidden = false;
      }
    }
  } catch (error) {
    if (mine.signal.aborted) return;
    for (const slot of slots) slot.frame.classList.remove("busy");
    showError(error instanceof TypeError ? "The server does not answer." : error.message, error.param);
  } finally {
    if (running === mine) $("figures").removeAttribute("aria-busy");
  }
}

function generate() {
  const steps = Number($("steps").value);
  return run([[passes(planFor(steps).steps), steps]]);
}

function compare() {
  const columns = new Map(); // by plan, so that budgets that lead to the same one are drawn once
  for (const steps of [model.steps.min, Math.min(2, model.steps.max), model.steps.max]) {
    const plan = planFor(steps);
    columns.set(plan.name, [passes(plan.steps), steps]);
  }
  return run([...columns.values()]);
}

async function copyCurl() {
  const body = $("copy").dataset.body.replaceAll("'", "'\\''");
  const key = sessionStorage.getItem("dd-api-key") ? `-H "authorization: Bearer $DD_API_KEY" ` : "";
  const command =
    `curl -s ${location.origin}/generate ${key}-H 'accept: image/png' -H 'content-type: application/json' ` +
    `-d '${body}' > image.png`;
  try {
    await navigator.clipboard.writeText(command);
    $("copy").textContent = "Copied";
  } catch {
    window.prompt("Copy this command", command); // clipboards need https or localhost
  }
  setTimeout(() => ($("copy").textContent = "Copy as curl"), 1500);
}

// ---- start

function restore({ label, steps, seed }) {
  if (model.classes.length > CHIP_LIMIT) {
    $("class-name").value = label ?? model.classes[0];
  } else {
    const wanted = [...document.querySelectorAll("input[name=label]")].find((input) => input.value === label);
    (wanted ?? document.querySelector("input[name=label]")).checked = true;
  }
  const budget = Number(steps);
  setSteps(Number.isInteger(budget) && budget > 0 ? Math.min(Math.max(budget, model.steps.min), model.steps.max) : 1);
  if (/^\d+$/.test(String(seed ?? ""))) $("seed").value = seed;
}

function build() {
  if (model.classes.length > CHIP_LIMIT) {
    $("class-search").hidden = false;
    $("class-list").append(...model.classes.map((name) => el("option", { value: name })));
  } else {
    $("classes").append(
      ...model.classes.map((name) =>
        el("label", {}, el("input", { type: "radio", name: "label", value: name }), el("span", { title: name }, name)),
      ),
    );
  }
  $("steps").min = model.steps.min;
  $("steps").max = model.steps.max;
  for (const { from } of model.budgets) {
    const stop = el("button", { type: "button", "data-steps": from, title: planFor(from).name }, String(from));
    stop.addEventListener("click", () => {
      setSteps(from);
      generate();
    });
    $("stops").append(stop);
  }
  $("steps").addEventListener("input", showBudget);
  $("steps").addEventListener("change", generate);
  $("classes").addEventListener("change", generate);
  $("seed").addEventListener("change", generate);
  $("form").addEventListener("submit", (event) => {
    event.preventDefault();
    generate();
  });
  $("shuffle").addEventListener("click", () => {
    $("seed").value = crypto.getRandomValues(new Uint32Array(1))[0] % 1000000;
    generate();
  });
  $("compare").addEventListener("click", compare);
  $("copy").addEventListener("click", copyCurl);
}

async function whenReady() {
  for (;;) {
    try {
      const reply = await fetch("/readyz");
      if (reply.ok) break;
      $("model-text").textContent = (await reply.json()).error.message;
    } catch {
      $("model-text").textContent = "the server does not answer";
    }
    await sleep(500);
  }
}

async function start() {
  await whenReady();
  model = (await (await ask("/models")).json()).models[0];
  $("model-text").textContent = `${model.name}, ${model.image.width}×${model.image.height}`;
  document.querySelector(".dot").classList.add("ready");
  build();
  restore(Object.fromEntries(new URLSearchParams(location.search)));
  await generate();
}

start();
