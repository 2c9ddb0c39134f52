// LabelMe files to objects and back, as samray reads and writes them; COCO; the label map; ZIP.

import { Item, Mask, fillPolygon } from "./masks.js";
import { crc32, decodePng, encodePng } from "./png.js";

const AREAL_SHAPES = { // how many points each has; a polygon may have more
  polygon: [3], rectangle: [2, 4], oriented_rectangle: [4], rotation: [4], quadrilateral: [4], circle: [2], mask: [2],
};
const MAX_COORDINATE = 1e6;

// The objects of a LabelMe file for an image of this size. Shapes that cover no area, or cannot
// be read, are kept without a mask.
export async function readShapes(document, width, height) {
  const items = [];
  for (const shape of document.shapes) {
    let mask = null;
    try { mask = await rasterized(shape, width, height); } catch { /* kept as it is */ }
    items.push(new Item(labelOf(shape), mask?.area ? mask : null, shape));
  }
  return items;
}

const labelOf = (shape) => String(shape?.label ?? "?");

// Samray's boundary rule: points are floored, and what the outline touches belongs to the mask.
async function rasterized(shape, width, height) {
  const kind = shape.shape_type || "polygon", { points } = shape, numbers = AREAL_SHAPES[kind];
  const fits = numbers?.includes(points.length) || (kind === "polygon" && points.length > 3);
  const isNear = (value) => Math.abs(value) <= MAX_COORDINATE;
  if (!fits || !points.every((point) => point.length === 2 && point.every(isNear))) return null;
  if (kind === "mask") return pastedMask(shape, width, height);
  const outline = outlineOf(kind, points).map(([x, y]) => [Math.floor(x), Math.floor(y)]);
  const [x1, y1, x2, y2] = bounds(outline);
  const left = Math.max(x1, 0), top = Math.max(y1, 0);
  const columns = Math.min(x2 + 1, width) - left, rows = Math.min(y2 + 1, height) - top;
  if (columns <= 0 || rows <= 0) return null;
  const pixels = fillPolygon(outline.map(([x, y]) => [x - left, y - top]), columns, rows);
  return Mask.ofPixels(pixels, [left, top], columns, rows, [height, width]);
}

function outlineOf(kind, points) {
  if (kind === "rectangle") {
    const [x1, y1, x2, y2] = bounds(points);
    return [[x1, y1], [x2, y1], [x2, y2], [x1, y2]];
  }
  if (kind !== "circle") return points;
  const [[x, y], rim] = points, radius = Math.hypot(rim[0] - x, rim[1] - y);
  const steps = Math.max(16, Math.min(720, Math.trunc(radius * 4)));
  return Array.from({ length: steps }, (_, i) => {
    const angle = (2 * Math.PI * i) / steps;
    return [x + radius * Math.cos(angle), y + radius * Math.sin(angle)];
  });
}

function bounds(points) {
  let x1 = Infinity, y1 = Infinity, x2 = -Infinity, y2 = -Infinity;
  for (const [x, y] of points) {
    x1 = Math.min(x1, x); x2 = Math.max(x2, x);
    y1 = Math.min(y1, y); y2 = Math.max(y2, y);
  }
  return [x1, y1, x2, y2];
}

// A PNG at the first corner, rounded as it may have been dragged; cut off at the second if both
// are whole numbers.
async function pastedMask(shape, width, height) {
  const text = atob(shape.mask.replace(/\s/g, ""));
  const png = await decodePng(Uint8Array.from(text, (letter) => letter.charCodeAt(0)));
  const corners = shape.points.map((point) => point.map(rounded)), [x1, y1, x2, y2] = bounds(corners);
  const whole = shape.points.flat().every(Number.isInteger);
  const columns = whole ? Math.min(png.width, x2 - x1 + 1) : png.width;
  const rows = whole ? Math.min(png.height, y2 - y1 + 1) : png.height;
  const left = Math.max(x1, 0), top = Math.max(y1, 0);
  const w = Math.min(x1 + columns, width) - left, h = Math.min(y1 + rows, height) - top;
  if (w <= 0 || h <= 0) return null;
  const pixels = new Uint8Array(w * h);
  for (let y = 0; y < h; y++) {
    const start = (top - y1 + y) * png.width + left - x1;
    pixels.set(png.pixels.subarray(start, start + w), y * w);
  }
  return Mask.ofPixels(pixels, [left, top], w, h, [height, width]);
}

function rounded(value) { // to the even number from halfway, as NumPy does
  const below = Math.floor(value), rest = value - below;
  return rest < 0.5 || (rest === 0.5 && below % 2 === 0) ? below : below + 1;
}

// A LabelMe file's content. What it came with is kept; a shape that was not changed stays as it is.
export async function labelme(picture) {
  const shapes = [];
  for (const item of picture.objects) {
    if (item.shape !== undefined && !item.redrawn) {
      shapes.push(item.label === labelOf(item.shape) ? item.shape : { ...item.shape, label: item.label });
    } else if (item.area) {
      shapes.push({ group_id: null, flags: {}, ...item.shape, label: item.label, ...(await maskShape(item)) });
    }
  }
  const fresh = { version: "5.5.0", flags: {}, imagePath: picture.name, imageData: null };
  return { ...fresh, imageHeight: picture.height, imageWidth: picture.width, ...picture.document, shapes };
}

async function maskShape({ bbox: [x1, y1, x2, y2], pixels }) {
  const png = await encodePng(pixels.map((value) => 255 * value), x2 - x1, y2 - y1);
  let text = "";
  for (let i = 0; i < png.length; i += 8192) text += String.fromCharCode(...png.subarray(i, i + 8192));
  return { shape_type: "mask", points: [[x1, y1], [x2 - 1, y2 - 1]], mask: btoa(text) };
}

export function coco({ name, width, height, objects }) {
  const items = objects.filter((item) => item.area), labels = [...new Set(items.map((item) => item.label))];
  return {
    images: [{ id: 1, file_name: name, width, height }],
    categories: labels.map((label, i) => ({ id: i + 1, name: label })),
    annotations: items.map(({ label, area, rle, bbox: [x1, y1, x2, y2] }, i) => ({
      id: i + 1, image_id: 1, category_id: labels.indexOf(label) + 1, iscrowd: 0, area,
      segmentation: rle, bbox: [x1, y1, x2 - x1, y2 - y1],
    })),
  };
}

// A grey PNG: 0 is the background, i the i-th object with an area; later ones lie on top.
export function labelMap({ width, height, objects }) {
  const map = new Uint8Array(width * height);
  objects.filter((item) => item.area).forEach(({ bbox: [x1, y1, x2, y2], pixels }, number) => {
    for (let y = y1, i = 0; y < y2; y++) {
      for (let x = x1; x < x2; x++, i++) if (pixels[i]) map[y * width + x] = number + 1;
    }
  });
  return encodePng(map, width, height);
}

// A ZIP of [name, text] files, not compressed.
export function zip(files) {
  const parts = [], index = [];
  let place = 0, indexSize = 0;
  for (const [name, text] of files) {
    const path = new TextEncoder().encode(name), content = new TextEncoder().encode(text);
    const head = new DataView(new ArrayBuffer(26)); // what local header and index have in common
    head.setUint16(0, 20, true); head.setUint16(2, 0x0800, true); // version 2.0; names are UTF-8
    head.setUint16(8, 0x21, true); // 1 January 1980
    head.setUint32(10, crc32(content), true);
    head.setUint32(14, content.length, true); head.setUint32(18, content.length, true);
    head.setUint16(22, path.length, true);
    const more = new DataView(new ArrayBuffer(14)); // comment, disk, attributes, place
    more.setUint32(10, place, true);
    parts.push(signature(0x04034b50), head, path, content);
    index.push(signature(0x02014b50), new Uint8Array([20, 0]), head, more, path);
    place += 30 + path.length + content.length;
    indexSize += 46 + path.length;
  }
  const end = new DataView(new ArrayBuffer(18));
  end.setUint16(4, files.length, true); end.setUint16(6, files.length, true);
  end.setUint32(8, indexSize, true); end.setUint32(12, place, true);
  return new Blob([...parts, ...index, signature(0x06054b50), end], { type: "application/zip" });
}

function signature(value) {
  const view = new DataView(new ArrayBuffer(4));
  view.setUint32(0, value, true);
  return view;
}
