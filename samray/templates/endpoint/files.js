// From dropped or chosen files to the queue, and from one image to the next.

import { labelme, readShapes, zip } from "./formats.js";
import { changed, refresh } from "./objects.js";
import { ABOUT_THE_FILE, encoded, fetchPreview } from "./server.js";
import { show } from "./stage.js";
import { $, Picture, canvas, note, say, state } from "./state.js";
import { forget, keepFile, keepQueue, keepWork } from "./storage.js";

const MAX_IMAGES = 500, MAX_FILES = 20000, MAX_JSON_BYTES = 256 * 2 ** 20;
const IMAGE = /\.(jpe?g|jfif|jpe|jif|pjpeg|pjp|png|bmp|tiff?|webp)$/i;
const TURNED_BY_XMP = /tiff:Orientation(?:="|>)[2-8]/; // as samray's image library looks for it
const PACKED_XMP = ["XML:com.adobe.xmp\0\x01", "zTXtXML:com.adobe.xmp"]; // compressed texts of a PNG
const byName = new Intl.Collator(undefined, { numeric: true });

const folderOf = (path) => path.slice(0, path.lastIndexOf("/") + 1);
export const nameOf = (path) => path.slice(path.lastIndexOf("/") + 1);
const stemOf = (path) => nameOf(path).replace(/\.[^.]*$/, "");

// The files of a drop, folders included: [path, File] each. Reads the transfer at once, as the
// browser empties it after the event.
export async function filesOfDrop(transfer) {
  const given = [...transfer.items]
    .filter((item) => item.kind === "file")
    .map((item) => item.webkitGetAsEntry() ?? item.getAsFile());
  const found = [];
  for (const entry of given) {
    if (entry instanceof File) found.push([entry.name, entry]);
    else await walk(entry, found);
  }
  return found;
}

async function walk(entry, found) {
  if (found.length >= MAX_FILES) return;
  if (entry.isFile) {
    const file = await new Promise((done, fail) => entry.file(done, fail)).catch(() => null);
    if (file) found.push([entry.fullPath.replace(/^\//, ""), file]);
    return;
  }
  const reader = entry.createReader();
  for (;;) { // a reader gives a part at a time
    const part = await new Promise((done, fail) => reader.readEntries(done, fail)).catch(() => []);
    if (!part.length) return;
    for (const child of part) await walk(child, found);
  }
}

// Add images to the queue, with the LabelMe files that belong to them, and open the first.
export async function openFiles(given) {
  note("");
  const files = given.filter(([path]) => !nameOf(path).startsWith(".")); // of the system
  files.sort(([a], [b]) => byName.compare(a, b));
  const isJson = ([path, file]) => /\.json$/i.test(path) || file.type === "application/json";
  const images = files.filter((file) => !isJson(file) && (files.length === 1 || IMAGE.test(file[0])));
  const jsons = files.filter(isJson);
  const others = files.filter((file) => !images.includes(file) && !jsons.includes(file));
  if (others.length === 1) note(`${others[0][0]} is left out: samray reads no such file`);
  if (others.length > 1) note(`${others.length} other files are left out`);
  const added = images.map(([path, file]) => known(path, file) ?? new Picture(nameOf(path), file, path));
  const fresh = added.filter((picture) => !state.queue.includes(picture));
  const room = MAX_IMAGES - state.queue.length;
  if (fresh.length > room) note(`at most ${MAX_IMAGES} images are open at once; ${fresh.length - room} are left out`);
  state.queue.push(...fresh.splice(0, room));
  const annotated = await attach(jsons);
  const { picture } = state, first = added.find((other) => state.queue.includes(other)) ?? annotated[0] ?? picture;
  if (annotated.includes(picture)) changed(picture);
  await Promise.all([
    first === picture ? null : open(state.queue.indexOf(first)),
    keepFiles([...added, ...annotated]),
    settleAll(annotated.filter((other) => other !== first)),
  ]);
  refresh();
}

async function keepFiles(pictures) {
  for (const picture of new Set(pictures)) if (state.queue.includes(picture)) await keepFile(picture);
  keepQueue();
}

// So that files that do not fit are named now and not when their images are opened.
async function settleAll(pictures) {
  for (const picture of pictures) {
    if (!picture.settled) await settle(picture).catch((error) => note(`${picture.name}: ${error.message}`));
  }
}

// The same file, opened before.
const known = (path, file) => state.queue.find((picture) =>
  picture.path === path && ["size", "lastModified"].every((name) => picture.blob[name] === file[name]));

// Give each LabelMe file to its image; returns the images.
async function attach(jsons) {
  const annotated = [], own = ([path]) => state.queue.some((picture) => isBeside(picture, path, stemOf(path)));
  jsons.sort((a, b) => own(b) - own(a)); // of two for one image, the one with its stem wins
  for (const [path, file] of jsons) {
    const document = await parsed(file), isLabelme = Array.isArray(document?.shapes);
    const picture = isLabelme ? imageOf(path, document.imagePath) : null;
    if (!isLabelme) note(`${nameOf(path)} is not a LabelMe file`);
    else if (!picture) note(`${nameOf(path)} belongs to none of these images`);
    else if (picture.document || picture.objects.length) {
      note(`${nameOf(path)} is not used: ${picture.name} has objects already`);
    } else {
      Object.assign(picture, { document, jsonPath: path });
      if (picture.width) await (picture.reading = readDocument(picture));
      annotated.push(picture);
    }
  }
  return annotated;
}

async function parsed(file) {
  if (file.size > MAX_JSON_BYTES) return null;
  return file.text().then(JSON.parse).catch(() => null);
}

// The image that a LabelMe file is for, found as `samray prepare` does: the one that it names; else
// by a stem, beside the file or in the folder parallel to it. Null if there is none, or if several
// could be meant: nothing is guessed.
function imageOf(path, imagePath) {
  const name = typeof imagePath === "string" ? imagePath.replaceAll("\\", "/") : "", stem = stemOf(path);
  const named = resolved(folderOf(path) + name), ways = [({ path: other }) => other === named];
  for (const wanted of name ? [stem, stemOf(name)] : [stem]) {
    ways.push((picture) => isBeside(picture, path, wanted), (picture) => isParallel(picture, path, wanted));
  }
  const found = ways.map((way) => state.queue.filter(way)).find((pictures) => pictures.length) ?? [];
  return found.length === 1 ? found[0] : null;
}

const isBeside = (picture, path, stem) => folderOf(picture.path) === folderOf(path) && stemOf(picture.name) === stem;

function isParallel(picture, path, stem) {
  const a = folderOf(path).split("/"), b = folderOf(picture.path).split("/");
  const differing = a.length === b.length ? a.filter((part, i) => part !== b[i]).length : 0;
  return differing === 1 && stemOf(picture.name) === stem;
}

function resolved(path) {
  const parts = [];
  for (const part of path.split("/")) {
    if (part === "..") parts.pop();
    else if (part && part !== ".") parts.push(part);
  }
  return parts.join("/");
}

// Show an image of the queue, and let the server encode it, then the next one.
export async function open(index) {
  state.picture.close();
  Object.assign(state, { index, lit: null, drag: null, cross: null });
  const { picture } = state;
  say(picture.blob ? "opening the image …" : "");
  show();
  refresh();
  keepQueue();
  if (!picture.blob) return;
  try {
    await settle(picture);
    if (picture !== state.picture) return;
    canvas.focus({ preventScroll: true });
    show();
    refresh();
    await encoded(picture);
    const next = state.queue[index + 1];
    if (next && picture === state.picture) encoded(next).catch(() => {});
  } catch (error) {
    const isUseless = ABOUT_THE_FILE.includes(error.code) && isUntouched(picture);
    if (isUseless) { note(error.message); await close([picture]); }
    else if (picture === state.picture) say(error.message, true);
  }
}

// What has objects is not closed unasked: another server, or this one with other limits, may take it.
const isUntouched = ({ objects, hidden, document }) => !objects.length && !hidden.length && !document;

export function step(by) {
  const index = state.index + by;
  if (index >= 0 && index < state.queue.length) open(index);
  else say(by > 0 ? "this is the last image" : "this is the first image");
}

// Take images out of the queue.
export async function close(pictures) {
  const { picture, queue } = state, gone = new Set(pictures);
  const index = queue.slice(0, state.index).filter((other) => !gone.has(other)).length;
  state.queue = queue.filter((other) => !gone.has(other));
  for (const other of gone) { other.close(); forget(other); }
  if (gone.has(picture)) await open(Math.min(index, state.queue.length - 1));
  else { state.index = index; refresh(); }
  keepQueue();
}

// Find out an image's size, and with it its objects; keep its pixels if it is the open one.
async function settle(picture) {
  const before = picture.settled && picture.width, image = await bitmap(picture);
  Object.assign(picture, { width: image.width, height: image.height });
  if (picture === state.picture) picture.image = image;
  else image.close();
  if (picture.document && !before) await (picture.reading ??= readDocument(picture));
  if (!before) keepWork(picture);
}

async function readDocument(picture) {
  const { width, height, name, document } = picture, { imageWidth, imageHeight } = document;
  if ((imageWidth ?? width) !== width || (imageHeight ?? height) !== height) {
    const sizes = `it is for ${imageWidth} x ${imageHeight} pixels, ${name} has ${width} x ${height}`;
    note(`${nameOf(picture.jsonPath)} is not used: ${sizes}`);
    picture.document = picture.jsonPath = null;
    if (state.queue.includes(picture)) await keepFile(picture); // else a reload brings the document back, unchecked
    return;
  }
  const shapes = await readShapes(document, width, height);
  for (const step of [picture, ...picture.history]) step.objects = [...shapes, ...step.objects]; // clicked meanwhile
}

// The pixels that the model sees, or what the browser shows if that is the same.
async function bitmap(picture) {
  if (!picture.shown && !(await needsPreview(picture.blob))) {
    const image = await createImageBitmap(picture.blob, { imageOrientation: "from-image" }).catch(() => null);
    if (image) return image;
  }
  try { picture.shown ??= await fetchPreview(picture.blob); }
  catch (error) {
    if (ABOUT_THE_FILE.includes(error.code)) error.message = `${picture.name}: ${error.message}`;
    throw error;
  }
  return createImageBitmap(picture.shown);
}

// Browsers show JPEG and BMP as samray reads them; not PNG of 16 bits, of transparent colours or
// turned by EXIF; not turned WebP; nothing that XMP alone turns; and no TIFF at all.
async function needsPreview(blob) {
  const head = new Uint8Array(await blob.slice(0, 32).arrayBuffer()), kind = String.fromCharCode(...head);
  if (kind.startsWith("BM")) return false;
  if (kind.startsWith("\xff\xd8")) return TURNED_BY_XMP.test(await latin1(await headOfJpeg(blob)));
  const isPng = kind.startsWith("\x89PNG"), isWebp = kind.startsWith("RIFF") && kind.slice(8, 12) === "WEBP";
  if (!isPng && !isWebp) return true;
  if (isPng && (head[24] === 16 || head[25] >= 4)) return true;
  const text = await latin1(blob);
  const words = isPng ? ["eXIf", "Raw profile type", "tRNS", ...PACKED_XMP] : ["EXIF", "ALPH", "VP8L"];
  return TURNED_BY_XMP.test(text) || words.some((word) => text.includes(word));
}

const latin1 = async (blob) => new TextDecoder("latin1").decode(await blob.arrayBuffer());

// What stands before a JPEG's pixels: to decode a large photo as text takes half a second.
async function headOfJpeg(blob) {
  for (let place = 2;;) {
    const [mark, kind, high, low] = new Uint8Array(await blob.slice(place, place + 4).arrayBuffer());
    if (mark !== 0xff) return blob; // damaged, or no JPEG
    if (kind === 0xda) return blob.slice(0, place);
    place += kind === 0xff ? 1 : 2 + 256 * high + low;
  }
}

export function save(name, blob) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

// Where a picture's LabelMe file was, or belongs: imagePath is relative to it.
export const jsonPathOf = ({ jsonPath, path, name }) => jsonPath ?? `${folderOf(path)}${stemOf(name)}.json`;
export const text = (content) => JSON.stringify(content, null, 2);

// The LabelMe files of all images that have objects, or came with such a file, in one ZIP.
export async function saveAll() {
  const files = new Map();
  for (const picture of state.queue) {
    try { await (picture.settled ? picture.reading : settle(picture)); }
    catch (error) { note(`${picture.name}: ${error.message}`); continue; }
    if (!picture.objects.length && !picture.document) continue;
    const path = jsonPathOf(picture);
    let free = path;
    for (let number = 2; files.has(free); number++) free = path.replace(/\.json$/i, ` (${number}).json`);
    files.set(free, text(await labelme(picture)));
  }
  if (!files.size) { say("finish an object first", true); return; }
  save("annotations.zip", zip([...files]));
  say(`${files.size} files in annotations.zip`);
}
