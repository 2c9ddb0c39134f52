// What a reload keeps: images and objects in IndexedDB, apart for each tab; the token for this tab.

import { Item, Mask } from "./masks.js";
import { $, Picture, note, state } from "./state.js";

const MAX_BYTES = 2 ** 30; // of the images of one tab
const OLD = 7 * 24 * 3600 * 1000; // ms after which the work of a closed tab is deleted
const FULL = "this browser's storage is full: a reload loses what you do from now on; download it";
const OFF = "this browser stores nothing: a reload loses your work; download it";

const session = sessionStorage.getItem("samray-session") ?? Math.random().toString(36).slice(2);
sessionStorage.setItem("samray-session", session);
let database = null, bytes = 0;
const kept = new Set(), unkept = new Set(); // keys of pictures

export function keepToken() { sessionStorage.setItem("samray-token", $("token").value); }
export function restoreToken() { $("token").value = sessionStorage.getItem("samray-token") ?? ""; }

// Whether closing the tab would lose objects.
export function losesWork() {
  return state.queue.some((picture) => unkept.has(picture.key) && picture.objects.length > 0);
}

// Bring back what this tab had; returns the number of images.
export async function restore() {
  try {
    database = await new Promise((done, fail) => {
      const opening = indexedDB.open("samray", 1);
      opening.onupgradeneeded = () => {
        for (const name of ["files", "work", "queues"]) opening.result.createObjectStore(name);
      };
      opening.onsuccess = () => done(opening.result);
      opening.onerror = opening.onblocked = () => fail(opening.error);
    });
    await forgetOldSessions();
    const queue = await read("queues", session);
    if (!queue) return 0;
    for (const key of queue.order) {
      const file = await read("files", [session, key]), work = await read("work", [session, key]);
      if (file) state.queue.push(restored(key, file, work));
    }
    state.colors = new Map(queue.colors);
    $("label").value = state.nextLabel = queue.label;
    state.index = Math.min(queue.index, state.queue.length - 1);
  } catch {
    if (!database) note(OFF);
  }
  return state.queue.length;
}

function restored(key, { name, path, blob, document, jsonPath }, work) {
  bytes += blob.size;
  kept.add(key);
  const picture = Object.assign(new Picture(name, blob, path), { key, document, jsonPath });
  if (!work) return picture;
  const { width, height, hidden = [], least = 0 } = work, item = ({ label, mask, shape, redrawn, proposed }) =>
    new Item(label, mask && new Mask(mask), shape, redrawn, proposed);
  return Object.assign(picture, { width, height, least, objects: work.objects.map(item), hidden: hidden.map(item) });
}

// Keep a picture's file, and the LabelMe file it came with.
export async function keepFile(picture) {
  const { key, name, path, blob, document, jsonPath } = picture, more = kept.has(key) ? 0 : blob.size;
  const file = { name, path, blob, document, jsonPath };
  if (bytes + more > MAX_BYTES || !(await write("files", [session, key], file))) { lose(picture); return; }
  bytes += more;
  kept.add(key);
}

// Keep a picture's objects, once they are known.
export async function keepWork(picture) {
  if (unkept.has(picture.key) || !picture.width) return;
  const plain = ({ label, mask, shape, redrawn, proposed }) => {
    const { bbox, area, rle, score, mask_token } = mask ?? {};
    return { label, shape, redrawn, proposed, mask: mask && { bbox, area, rle, score, mask_token } };
  };
  const { width, height, least } = picture;
  const work = { width, height, least, objects: picture.objects.map(plain), hidden: picture.hidden.map(plain) };
  if (!(await write("work", [session, picture.key], work))) lose(picture);
}

// Keep which images there are and which one is open.
export function keepQueue() {
  const { index, queue, colors, nextLabel: label } = state, order = queue.map((picture) => picture.key);
  return write("queues", session, { order, index, colors: [...colors], label, time: Date.now() });
}

export async function forget(picture) {
  unkept.delete(picture.key);
  if (kept.delete(picture.key)) bytes -= picture.blob.size;
  await remove("files", [session, picture.key]);
  await remove("work", [session, picture.key]);
}

function lose(picture) {
  unkept.add(picture.key);
  note(database ? FULL : OFF);
}

async function forgetOldSessions() {
  for (const old of await all("queues")) {
    const queue = old === session ? null : await read("queues", old);
    if (!queue || Date.now() - queue.time < OLD) continue;
    const range = IDBKeyRange.bound([old], [old, []]);
    await remove("files", range);
    await remove("work", range);
    await remove("queues", old);
  }
}

const read = (store, key) => finished(store, "readonly", (table) => table.get(key));
const all = (store) => finished(store, "readonly", (table) => table.getAllKeys());
const remove = (store, key) => finished(store, "readwrite", (table) => table.delete(key)).catch(() => {});
const write = (store, key, value) =>
  finished(store, "readwrite", (table) => table.put(value, key)).then(() => true, () => false);

// The result of one request, once its transaction is complete.
async function finished(store, mode, send) {
  if (!database) throw new Error("no database");
  return new Promise((done, fail) => {
    const transaction = database.transaction(store, mode), request = send(transaction.objectStore(store));
    if (mode === "readwrite") transaction.commit(); // at once: the page may be reloaded now
    transaction.oncomplete = () => done(request.result);
    transaction.onabort = transaction.onerror = () => fail(transaction.error);
  });
}
