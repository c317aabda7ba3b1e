// Files out of bytes: a receipt into a PNG, several files into one ZIP.

const TABLE = Uint32Array.from({ length: 256 }, (_, n) => {
  for (let bit = 0; bit < 8; bit++) n = n & 1 ? 0xedb88320 ^ (n >>> 1) : n >>> 1;
  return n;
});

/** CRC-32 as PNG and ZIP have it. */
export function crc32(bytes) {
  let crc = 0xffffffff;
  for (const byte of bytes) crc = TABLE[(crc ^ byte) & 0xff] ^ (crc >>> 8);
  return (crc ^ 0xffffffff) >>> 0;
}

const utf8 = (text) => new TextEncoder().encode(text);

const PNG_HEAD = 8 + 25; // signature and IHDR

/** A PNG's bytes with a receipt in it, as this server writes it. */
export function withReceipt(png, receipt) {
  const body = utf8(`tEXtdd-receipt\0${receipt}`);
  const chunk = new Uint8Array(body.length + 8); // length of the text, type and text, checksum
  const view = new DataView(chunk.buffer);
  view.setUint32(0, body.length - 4);
  chunk.set(body, 4);
  view.setUint32(4 + body.length, crc32(body));
  return new Blob([png.subarray(0, PNG_HEAD), chunk, png.subarray(PNG_HEAD)], { type: "image/png" });
}

const UTF8_NAMES = 0x0800;
const EPOCH = 0x0021; // 1 January 1980: the same pictures give the same file

/** A ZIP of [name, bytes], stored as they are: pictures are compressed already. Names that come twice are numbered. */
export function zip(files) {
  const [parts, directory, taken] = [[], [], new Set()];
  let at = 0;
  let length = 0;
  for (const [wish, bytes] of files) {
    const name = utf8(unique(wish, taken));
    const fields = [20, UTF8_NAMES, 0, 0, EPOCH, ["u32", crc32(bytes)], ["u32", bytes.length], ["u32", bytes.length], name.length, 0];
    parts.push(packed([["u32", 0x04034b50], ...fields]), name, bytes);
    const entry = packed([["u32", 0x02014b50], 20, ...fields, 0, 0, 0, ["u32", 0], ["u32", at]]);
    directory.push(entry, name);
    at += 30 + name.length + bytes.length;
    length += entry.length + name.length;
  }
  const n = files.length;
  const end = packed([["u32", 0x06054b50], 0, 0, n, n, ["u32", length], ["u32", at], 0]);
  return new Blob([...parts, ...directory, end], { type: "application/zip" });
}

/** Little-endian numbers: 16 bits, or ["u32", number]. */
function packed(fields) {
  const bytes = new Uint8Array(fields.reduce((sum, field) => sum + (Array.isArray(field) ? 4 : 2), 0));
  const view = new DataView(bytes.buffer);
  let at = 0;
  for (const field of fields) {
    if (Array.isArray(field)) view.setUint32(at, field[1], true);
    else view.setUint16(at, field, true);
    at += Array.isArray(field) ? 4 : 2;
  }
  return bytes;
}

function unique(wish, taken) {
  const dot = wish.lastIndexOf(".");
  let name = wish;
  for (let n = 2; taken.has(name); n++) name = `${wish.slice(0, dot)}-${n}${wish.slice(dot)}`;
  taken.add(name);
  return name;
}
