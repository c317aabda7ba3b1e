// Receipts: read from a file, from a text, and what they say. Whether one is true is for the server to say.

const WORD = /dd1\.[\w-]+/;
const CHUNK = "dd-receipt"; // of PNG
const WHOLE = /"(?:[^"\\]|\\.)*"|-?\d+/g; // a string, or a whole number, of JSON
const isNumber = (part) => !part.startsWith('"');
const DESCRIPTION = 0x010e; // of EXIF, in JPEG and WebP

/** The receipt in a text (the word alone, or a link that holds it), or null. */
export const receiptIn = (text) => WORD.exec(text)?.[0] ?? null;

/**
 * What an image follows from, or null where the word cannot be read. `condition` is a class index or a
 * prompt; each of `changes` is [block, seed, number], from that block on. Seeds that JavaScript's numbers
 * cannot hold are texts.
 */
export function readReceipt(receipt) {
  try {
    const bytes = bytesOf(atob(receipt.slice("dd1.".length).replaceAll("-", "+").replaceAll("_", "/")));
    const text = new TextDecoder().decode(bytes.slice(0, -6)); // a checksum of 6 bytes ends it
    const fields = JSON.parse(text.replace(WHOLE, (part) => (isNumber(part) && !Number.isSafeInteger(Number(part)) ? `"${part}"` : part)));
    const [model, , condition, plan, seed, number, changes] = fields;
    return { model, condition, plan, seed, number, changes };
  } catch {
    return null;
  }
}

/** The receipt in the bytes of a PNG, JPEG or WebP file, or null. */
export function receiptOf(bytes) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  try {
    if (ascii(bytes, 1, 3) === "PNG") return inPng(bytes, view);
    if (view.getUint16(0) === 0xffd8) return inJpeg(bytes, view);
    if (ascii(bytes, 8, 4) === "WEBP") return inWebp(bytes, view);
  } catch (error) {
    if (!(error instanceof RangeError)) throw error; // cut short: it holds nothing that we can find
  }
  return null;
}

const bytesOf = (binary) => Uint8Array.from(binary, (character) => character.charCodeAt(0));
const ascii = (bytes, start, length) => String.fromCharCode(...bytes.subarray(start, start + length));

function inPng(bytes, view) {
  for (let at = 8; at < bytes.length; at += 12 + view.getUint32(at)) { // length, type, data, checksum
    const [keyword, text] = ascii(bytes, at + 4, 4) === "tEXt" ? ascii(bytes, at + 8, view.getUint32(at)).split("\0") : [];
    if (keyword === CHUNK) return receiptIn(text);
  }
  return null;
}

function inJpeg(bytes, view) {
  for (let at = 2; view.getUint8(at) === 0xff && view.getUint8(at + 1) !== 0xda; at += 2 + view.getUint16(at + 2)) {
    if (ascii(bytes, at + 4, 4) === "Exif") return inExif(bytes, view, at + 10);
  }
  return null;
}

function inWebp(bytes, view) {
  for (let at = 12; at < bytes.length; ) {
    const length = view.getUint32(at + 4, true);
    if (ascii(bytes, at, 4) === "EXIF") return inExif(bytes, view, at + 8 + (ascii(bytes, at + 8, 4) === "Exif" ? 6 : 0));
    at += 8 + length + (length % 2);
  }
  return null;
}

/** ImageDescription in the TIFF structure at `base`; all its offsets count from there. */
function inExif(bytes, view, base) {
  const little = ascii(bytes, base, 2) === "II";
  const directory = base + view.getUint32(base + 4, little);
  for (let entry = 0; entry < view.getUint16(directory, little); entry++) {
    const at = directory + 2 + 12 * entry; // tag, type, count, offset
    if (view.getUint16(at, little) !== DESCRIPTION) continue;
    return receiptIn(ascii(bytes, base + view.getUint32(at + 8, little), view.getUint32(at + 4, little)));
  }
  return null;
}
