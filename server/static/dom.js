// Elements, and how numbers are written.

export const $ = (id) => document.getElementById(id);

/** An element with attributes and children; text is never parsed as HTML. */
export function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

export const sleep = (ms) => new Promise((done) => setTimeout(done, ms));

export const milliseconds = (ms) =>
  ms < 10 ? `${ms.toFixed(1)} ms` : ms < 1000 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(2)} s`;

export const passes = (n) => (n === 1 ? "1 pass" : `${n} passes`);

export const randomSeed = () => crypto.getRandomValues(new Uint32Array(1))[0] % 1_000_000;
