// What a reload keeps: images and objects in IndexedDB, apart for each tab; the token for this tab.

import { Item, Mask } from "./masks.js";
import { $, Picture, note, state } from "./state.js";

const MAX_BYTES = 2 ** 30; // of the images of one tab
const HOUR = 3600 * 1000; // ms
const OLD = 7 * 24 * HOUR; // after which the work of a closed tab is deleted
const WAIT = 1000; // ms for a lock; a page that is reloaded may still hold its own
const FULL = "this browser's storage is full: a reload loses what you do from now on; download it";
const OFF = "this browser stores nothing: a reload loses your work; download it";

const newSession = () => Math.random().toString(36).slice(2);
let session = sessionStorage.getItem("samray-session") ?? newSession();
let database = null, bytes = 0;
const kept = new Set(), unkept = new Set(); // keys of pictures

const lockOf = (name) => `samray-session-${name}`;

// Hold a session for as long as this tab is open; false if another tab does. Browsers copy
// sessionStorage to a duplicated tab, and two tabs would delete each other's work.
function hold(name) {
  if (!navigator.locks) return true; // plain HTTP from another machine: duplicates go unnoticed
  return new Promise((done) => {
    const untilClosed = () => { done(true); return new Promise(() => {}); };
    navigator.locks.request(lockOf(name), { signal: AbortSignal.timeout(WAIT) }, untilClosed).catch(() => done(false));
  });
}

const isOwn = hold(session); // at once: of two tabs the later one gets the copy
setInterval(keepQueue, HOUR); // with the time, so that seven days begin when the tab is closed

export function keepToken() { sessionStorage.setItem("samray-token", $("token").value); }
export function restoreToken() { $("token").value = sessionStorage.getItem("samray-token") ?? ""; }

// Whether closing the tab would lose objects.
export function losesWork() {
  return state.queue.some((picture) => unkept.has(picture.key) && picture.objects.length > 0);
}

// Bring back what this tab had, or a copy of what the tab has that it is a duplicate of; returns the
// number of images.
export async function restore() {
  const before = session, isCopy = !(await isOwn);
  if (isCopy) { session = newSession(); hold(session); }
  try {
    database = await openDatabase();
    await forgetOldSessions();
    await bringBack(before);
    if (isCopy) await keepCopy();
  } catch {
    if (!database) note(OFF);
  }
  sessionStorage.setItem("samray-session", session); // not before: a reload would find half a copy
  return state.queue.length;
}

function openDatabase() {
  return new Promise((done, fail) => {
    const opening = indexedDB.open("samray", 1);
    opening.onupgradeneeded = () => {
      for (const name of ["files", "work", "queues"]) opening.result.createObjectStore(name);
    };
    opening.onsuccess = () => done(opening.result);
    opening.onerror = opening.onblocked = () => fail(opening.error);
  });
}

async function bringBack(before) {
  const queue = await read("queues", before);
  if (!queue) return;
  for (const key of queue.order) {
    const file = await read("files", [before, key]), work = await read("work", [before, key]);
    if (file) state.queue.push(restored(key, file, work));
  }
  state.colors = new Map(queue.colors);
  $("label").value = state.nextLabel = queue.label;
  state.index = Math.min(queue.index, state.queue.length - 1);
  if (session === before) state.queue.forEach(count);
}

async function keepCopy() {
  await keepQueue(); // first: what no queue names would never be deleted
  for (const picture of state.queue) {
    await keepFile(picture);
    await keepWork(picture);
  }
}

function restored(key, { name, path, blob, document, jsonPath }, work) {
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
  count(picture);
}

function count({ key, blob }) {
  if (!kept.has(key)) bytes += blob.size;
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
    const unlessOpen = (lock) => lock && forgetSession(old);
    if (navigator.locks) await navigator.locks.request(lockOf(old), { ifAvailable: true }, unlessOpen);
    else await forgetSession(old); // an open tab has told its time
  }
}

async function forgetSession(old) {
  const range = IDBKeyRange.bound([old], [old, []]);
  await remove("files", range);
  await remove("work", range);
  await remove("queues", old);
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
