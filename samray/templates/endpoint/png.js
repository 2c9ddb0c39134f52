// PNG as masks need it: written in 8-bit grey, read as zero or not.

const SIGNATURE = [137, 80, 78, 71, 13, 10, 26, 10];

// An 8-bit grey PNG; values are width x height bytes.
export async function encodePng(values, width, height) {
  const rows = new Uint8Array((width + 1) * height); // a filter byte of 0 before each row
  for (let y = 0; y < height; y++) rows.set(values.subarray(y * width, (y + 1) * width), y * (width + 1) + 1);
  const header = new Uint8Array(13), view = new DataView(header.buffer);
  view.setUint32(0, width); view.setUint32(4, height);
  header[8] = 8; // bits; colour type 0 is grey
  const stream = new Blob([rows]).stream().pipeThrough(new CompressionStream("deflate"));
  const body = new Uint8Array(await new Response(stream).arrayBuffer());
  const chunks = [chunk("IHDR", header), chunk("IDAT", body), chunk("IEND", new Uint8Array())];
  return new Uint8Array(await new Blob([new Uint8Array(SIGNATURE), ...chunks]).arrayBuffer());
}

function chunk(kind, content) {
  const bytes = new Uint8Array(content.length + 12), view = new DataView(bytes.buffer);
  view.setUint32(0, content.length);
  for (let i = 0; i < 4; i++) bytes[4 + i] = kind.charCodeAt(i);
  bytes.set(content, 8);
  view.setUint32(content.length + 8, crc32(bytes.subarray(4, content.length + 8)));
  return bytes;
}

const CRC = Uint32Array.from({ length: 256 }, (_, n) => {
  for (let k = 0; k < 8; k++) n = n & 1 ? 0xedb88320 ^ (n >>> 1) : n >>> 1;
  return n;
});

export function crc32(bytes) {
  let crc = 0xffffffff;
  for (const byte of bytes) crc = CRC[(crc ^ byte) & 255] ^ (crc >>> 8);
  return (crc ^ 0xffffffff) >>> 0;
}

// A PNG's width, height and one byte a pixel: 1 where it is not 0. A palette's index counts, not
// its colour, as in samray. Throws if it is no whole PNG.
export async function decodePng(bytes) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.length);
  if (SIGNATURE.some((value, i) => bytes[i] !== value)) throw new Error("not a PNG");
  const width = view.getUint32(16), height = view.getUint32(20);
  if (width * height > 170e6) throw new Error("too large");
  const bits = bytes[24], kind = bytes[25], interlaced = bytes[28];
  if ((kind !== 0 && kind !== 3) || bits > 8 || interlaced) return pixelsOf(bytes, width, height);
  const parts = [];
  for (let place = 8; place + 8 < bytes.length; place += view.getUint32(place) + 12) {
    const name = String.fromCharCode(...bytes.subarray(place + 4, place + 8));
    if (name === "IDAT") parts.push(bytes.subarray(place + 8, place + 8 + view.getUint32(place)));
  }
  const line = Math.ceil((width * bits) / 8), rows = await inflated(parts, (line + 1) * height);
  const pixels = new Uint8Array(width * height), mask = (1 << bits) - 1;
  for (let y = 0; y < height; y++) {
    unfilter(rows, y * (line + 1) + 1, line, y > 0);
    for (let x = 0; x < width; x++) {
      const byte = rows[y * (line + 1) + 1 + ((x * bits) >> 3)];
      pixels[y * width + x] = (byte >> (8 - bits - ((x * bits) & 7))) & mask ? 1 : 0;
    }
  }
  return { width, height, pixels };
}

// At most so many bytes are kept, whatever the stream holds.
async function inflated(parts, length) {
  const reader = new Blob(parts).stream().pipeThrough(new DecompressionStream("deflate")).getReader();
  const rows = new Uint8Array(length);
  let filled = 0;
  while (filled < length) {
    const { value, done } = await reader.read();
    if (done) throw new Error("cut short");
    rows.set(value.subarray(0, length - filled), filled);
    filled += value.length;
  }
  reader.cancel().catch(() => {});
  return rows;
}

// PNG's filters for one byte a pixel or less, in place.
function unfilter(rows, start, length, hasAbove) {
  const kind = rows[start - 1];
  for (let i = 0; i < length; i++) {
    const left = i ? rows[start + i - 1] : 0;
    const above = hasAbove ? rows[start + i - length - 1] : 0;
    const corner = i && hasAbove ? rows[start + i - length - 2] : 0;
    const guess = [0, left, above, (left + above) >> 1, paeth(left, above, corner)][kind];
    rows[start + i] += guess;
  }
}

function paeth(left, above, corner) {
  const a = Math.abs(above - corner), b = Math.abs(left - corner), c = Math.abs(left + above - 2 * corner);
  return a <= b && a <= c ? left : b <= c ? above : corner;
}

// Colours and 16 bits: by the browser.
async function pixelsOf(bytes, width, height) {
  const image = await createImageBitmap(new Blob([bytes], { type: "image/png" }));
  const brush = new OffscreenCanvas(width, height).getContext("2d");
  brush.drawImage(image, 0, 0);
  const { data } = brush.getImageData(0, 0, width, height);
  const pixels = new Uint8Array(width * height);
  for (let i = 0; i < pixels.length; i++) pixels[i] = data[4 * i] || data[4 * i + 1] || data[4 * i + 2] ? 1 : 0;
  return { width, height, pixels };
}
