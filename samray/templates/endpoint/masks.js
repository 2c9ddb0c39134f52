// Objects and their masks: COCO's run lengths, the pixels of a mask's box, polygons as samray fills them.

const MAX_OUTLINE = 4e6; // pixels, as in samray

export class Mask {
  // bbox: x1, y1, x2, y2, the last two exclusive; rle: COCO's compressed counts of the whole image.
  constructor({ bbox, area, rle, score = null, mask_token = null }) {
    Object.assign(this, { bbox, area, rle, score, mask_token, layers: new Map() });
  }

  // pixels: width x height of 0 and 1, row by row, whose top left corner is at (x1, y1); they may
  // have empty borders. size: height and width of the image.
  static ofPixels(pixels, [x1, y1], width, height, size) {
    let left = width, top = height, right = 0, bottom = 0, area = 0;
    for (let y = 0, i = 0; y < height; y++) {
      for (let x = 0; x < width; x++, i++) {
        if (!pixels[i]) continue;
        area++;
        if (x < left) left = x;
        if (x >= right) right = x + 1;
        if (y < top) top = y;
        bottom = y + 1;
      }
    }
    const bbox = area ? [x1 + left, y1 + top, x1 + right, y1 + bottom] : [0, 0, 0, 0];
    const counts = [];
    let place = 0, end = -1;
    for (let x = left; x < right; x++) {
      for (let y = top; y < bottom; y++) {
        if (!pixels[y * width + x]) continue;
        const at = (x1 + x) * size[0] + y1 + y;
        if (at === end) counts[counts.length - 1]++;
        else { counts.push(at - place, 1); }
        place = end = at + 1;
      }
    }
    if (place < size[0] * size[1]) counts.push(size[0] * size[1] - place);
    return new Mask({ bbox, area, rle: { size, counts: compressed(counts) } });
  }

  // The pixels of its box alone, row by row, so that large images stay fast.
  get pixels() {
    if (this.unpacked) return this.unpacked;
    const height = this.rle.size[0], [x1, y1, x2, y2] = this.bbox, width = x2 - x1;
    const pixels = new Uint8Array(width * (y2 - y1));
    let place = 0, inside = false;
    for (const run of runs(this.rle.counts)) {
      if (inside) {
        let x = Math.floor(place / height) - x1, y = (place % height) - y1;
        for (let i = 0; i < run; i++) {
          pixels[y * width + x] = 1;
          if (++y + y1 === height) { y = -y1; x++; }
        }
      }
      place += run;
      inside = !inside;
    }
    return (this.unpacked = pixels);
  }

  has(x, y) {
    const [x1, y1, x2, y2] = this.bbox;
    if (x < x1 || y < y1 || x >= x2 || y >= y2) return false;
    return this.pixels[(Math.floor(y) - y1) * (x2 - x1) + Math.floor(x) - x1] === 1;
  }

  // A canvas of its box: the colour, and an opaque edge of so many pixels. Kept, as it is drawn
  // with each movement of the pointer.
  layer(color, alpha, edge) {
    const key = `${color} ${alpha} ${edge}`;
    if (!this.layers.has(key)) {
      if (this.layers.size > 2) this.layers.clear();
      this.layers.set(key, painted(this, color, alpha, edge));
    }
    return this.layers.get(key);
  }

  forget() {
    this.unpacked = undefined;
    this.layers.clear();
  }
}

function painted(mask, [red, green, blue], alpha, edge) {
  const [x1, y1, x2, y2] = mask.bbox, width = x2 - x1, height = y2 - y1, { pixels } = mask;
  const layer = document.createElement("canvas");
  layer.width = width; layer.height = height;
  const brush = layer.getContext("2d"), data = brush.createImageData(width, height);
  const packed = new Uint32Array(data.data.buffer), color = (blue << 16) | (green << 8) | red;
  const inner = ((alpha << 24) | color) >>> 0, outer = ((255 << 24) | color) >>> 0;
  for (let y = 0, i = 0; y < height; y++) {
    for (let x = 0; x < width; x++, i++) {
      if (!pixels[i]) continue;
      const middle = x >= edge && x + edge < width && y >= edge && y + edge < height &&
        pixels[i - edge] && pixels[i + edge] && pixels[i - edge * width] && pixels[i + edge * width];
      packed[i] = edge && !middle ? outer : inner;
    }
  }
  brush.putImageData(data, 0, 0);
  return layer;
}

// The IoU of two masks of one image.
export function overlap(one, other) {
  const [x1, y1, x2, y2] = one.bbox, [u1, v1, u2, v2] = other.bbox;
  const left = Math.max(x1, u1), top = Math.max(y1, v1), right = Math.min(x2, u2), bottom = Math.min(y2, v2);
  let both = 0;
  for (let y = top; y < bottom; y++) {
    for (let x = left; x < right; x++) if (one.has(x, y) && other.has(x, y)) both++;
  }
  return both / (one.area + other.area - both || 1);
}

// A finished object. It is never changed, but replaced, so that undo can bring it back.
export class Item {
  // mask: null if its shape covers no area, as a line. shape: its entry in the LabelMe file it came with.
  // redrawn: whether the mask is no longer the shape's. proposed: found with all others, not kept yet.
  constructor(label, mask, shape = undefined, redrawn = false, proposed = false) {
    Object.assign(this, { label, mask, shape, redrawn, proposed });
  }

  get area() { return this.mask?.area ?? 0; }
  get bbox() { return this.mask?.bbox ?? [0, 0, 0, 0]; }
  get rle() { return this.mask?.rle ?? null; }
  get pixels() { return this.mask?.pixels ?? new Uint8Array(); }
}

// COCO's compressed counts, as pycocotools reads and writes them: 5 bits a letter, and from the
// fourth run on the difference to the run two before it.
function runs(counts) {
  const found = [];
  let place = 0;
  while (place < counts.length) {
    let value = 0, shift = 0, more = true;
    while (more) {
      const code = counts.charCodeAt(place++) - 48;
      value |= (code & 31) << (5 * shift++);
      more = (code & 32) !== 0;
      if (!more && code & 16) value |= -1 << (5 * shift);
    }
    if (found.length > 2) value += found[found.length - 2];
    found.push(value);
  }
  return found;
}

function compressed(counts) {
  let text = "";
  counts.forEach((count, i) => {
    let value = i > 2 ? count - counts[i - 2] : count, more = true;
    while (more) {
      const code = value & 31;
      value >>= 5;
      more = code & 16 ? value !== -1 : value !== 0;
      text += String.fromCharCode((more ? code | 32 : code) + 48);
    }
  });
  return text;
}

// The pixels of a polygon inside width x height, as `fill_by_counting` of samray's
// geometry/polygons.py: those that the outline touches, and those inside by the even-odd rule.
// points: whole numbers. Throws if the outline is longer than any drawn or traced one.
export function fillPolygon(points, width, height) {
  let outline = 0;
  const pixels = new Uint8Array(width * height), crossings = new Uint8Array((width + 1) * height);
  points.forEach((point, i) => {
    const next = points[(i + 1) % points.length];
    const backward = point[0] > next[0] || (point[0] === next[0] && point[1] > next[1]);
    const [left, right] = backward ? [next, point] : [point, next];
    outline += drawLine(pixels, left, right, width, height);
    if (outline > MAX_OUTLINE) throw new Error("the outline is too long");
    const [top, bottom] = left[1] <= right[1] ? [left, right] : [right, left];
    const dx = bottom[0] - top[0], dy = bottom[1] - top[1];
    for (let y = Math.max(top[1], 0); y < Math.min(bottom[1], height); y++) {
      const x = top[0] - Math.floor(((top[1] - y) * dx) / dy);
      crossings[y * (width + 1) + Math.min(Math.max(x, 0), width)] ^= 1;
    }
  });
  for (let y = 0; y < height; y++) {
    let inside = 0;
    for (let x = 0; x < width; x++) {
      inside ^= crossings[y * (width + 1) + x];
      pixels[y * width + x] |= inside;
    }
  }
  return pixels;
}

// Along the longer axis one pixel a step; midway between two, the one nearer to the left end.
function drawLine(pixels, left, right, width, height) {
  const dx = right[0] - left[0], dy = right[1] - left[1];
  const [along, across] = Math.abs(dx) >= Math.abs(dy) ? [0, 1] : [1, 0];
  const length = Math.max(Math.abs(dx), Math.abs(dy), 1);
  const rise = [dx, dy][across], limit = [width, height];
  const first = Math.max(Math.min(left[along], right[along]), 0);
  const last = Math.min(Math.max(left[along], right[along]), limit[along] - 1);
  for (let place = first; place <= last; place++) {
    const steps = Math.floor((2 * Math.abs(place - left[along]) * Math.abs(rise) + length - 1) / (2 * length));
    const other = left[across] + Math.sign(rise) * steps;
    if (other < 0 || other >= limit[across]) continue;
    pixels[along === 0 ? other * width + place : place * width + other] = 1;
  }
  return Math.max(last - first, 0);
}
