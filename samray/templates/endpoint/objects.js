// The prompt, its candidates and the finished objects: what clicks and keys change, and the list.

import { Item } from "./masks.js";
import { predict } from "./server.js";
import { draw } from "./stage.js";
import { $, canvas, colorOf, say, state } from "./state.js";
import { keepQueue, keepWork } from "./storage.js";

const MAX_POINTS = 64; // the server's limit for one object

// Whether Finish was pressed before the mask is there: what comes now is meant for another object.
function isFinishing(picture) {
  if (picture.finishing === null) return false;
  say("the object before is not finished yet; try again once it is", true);
  return true;
}

export function click(point, include) {
  const { picture } = state;
  if (isFinishing(picture)) return;
  if (picture.points.length >= MAX_POINTS) {
    say(`an object takes ${MAX_POINTS} clicks; finish it, then correct it`, true);
    return;
  }
  picture.remember();
  picture.label ??= state.nextLabel;
  picture.points = [...picture.points, point];
  picture.labels = [...picture.labels, include];
  answer(picture);
}

export function drawBox(box) {
  const { picture } = state;
  if (isFinishing(picture)) return;
  picture.remember();
  picture.label ??= state.nextLabel;
  Object.assign(picture, { box, masks: [] });
  answer(picture);
}

// Ask for the prompt's mask, and finish the object with it if somebody was faster than the server.
export async function answer(picture) {
  picture.preview = null;
  picture.waiting = true;
  refresh();
  const answered = await predict(picture);
  if (answered === null) return;
  const { finishing } = picture;
  Object.assign(picture, { waiting: false, finishing: null });
  if (picture === state.picture) refresh();
  if (answered && finishing !== null) finish(picture, finishing);
}

export function choose(number) {
  const { picture } = state;
  if (number >= picture.masks.length) return;
  picture.chosen = number;
  say(`predicted IoU ${picture.masks[number].score.toFixed(2)}`);
  refresh();
}

export function undo() {
  const { picture } = state, last = picture.history.pop();
  if (!last) { say("nothing to undo"); return; }
  const { objects, ...prompt } = last; // hidden proposals and their score, too
  const goesOn = picture.base === prompt.base && picture.label !== null && prompt.label !== null;
  if (goesOn) prompt.label = picture.label; // to type is no step
  picture.setPrompt(prompt);
  picture.objects = objects;
  say("");
  changed(picture);
  if (picture.hasPrompt && !picture.masks.length) answer(picture);
}

export function clear() {
  const { picture } = state;
  state.drag = null;
  say("");
  if (!picture.hasPrompt && !picture.base) { draw(); return; }
  picture.remember();
  picture.setPrompt({});
  refresh();
}

export function finish(picture = state.picture, text = labelFor(picture)) {
  const { base } = picture, mask = picture.masks[picture.chosen], label = text.trim() || "object";
  if (picture.waiting) {
    picture.finishing ??= label; // from now on the field is the next object's
    say("finishing the object once its mask is there …");
    refresh();
    return;
  }
  if (!mask && !base) { say("click on an object first", true); return; }
  if (mask && !mask.area) { say("this mask is empty; click elsewhere or drag a box", true); return; }
  picture.remember();
  const item = mask ? new Item(label, mask, base?.shape, true) : new Item(label, base.mask, base.shape, base.redrawn);
  picture.objects = base ? picture.objects.map((other) => (other === base ? item : other)) : [...picture.objects, item];
  picture.setPrompt({});
  if (picture === state.picture) say(`${base ? "corrected" : "finished"}; click on the next object`);
  changed(picture);
}

// Let the next clicks correct a finished object.
export function select(item) {
  const { picture } = state;
  if (picture.base === item || isFinishing(picture)) return;
  picture.remember();
  picture.setPrompt({ base: item, label: item.label });
  const way = item.area ? "click to correct it" : "change its label";
  say(`${item.label}: ${way}, Enter keeps the change, Esc leaves it as it is`);
  refresh();
}

export function remove(item) {
  const { picture } = state;
  picture.remember();
  picture.objects = picture.objects.filter((other) => other !== item);
  if (picture.base === item) picture.setPrompt({});
  state.lit = null;
  say(`${item.label} removed; Undo brings it back`);
  changed(picture);
}

function relabel(picture, item, label) {
  const renamed = new Item(label, item.mask, item.shape, item.redrawn);
  picture.remember();
  picture.objects = picture.objects.map((other) => (other === item ? renamed : other));
  if (picture.base === item) Object.assign(picture, { base: renamed, label });
  changed(picture);
}

// The label field is the prompt's; without one, and once Finish was pressed, the next object's.
const hasField = ({ label, finishing }) => label !== null && finishing === null;
export const labelFor = (picture) => (hasField(picture) ? picture.label : state.nextLabel);

// Somebody has typed in the label field. A new object's label is also the one of those after it.
export function setLabel(label) {
  const { picture } = state, isPrompts = hasField(picture);
  if (isPrompts) picture.label = label;
  if (!isPrompts || !picture.base) state.nextLabel = label;
}

// The objects are others than before: show and keep them.
export function changed(picture) {
  if (picture === state.picture) refresh();
  keepWork(picture);
  keepQueue(); // the labels' colours
}

// Show the open picture's prompt, candidates and objects.
export function refresh() {
  $("label").value = labelFor(state.picture);
  showCandidates();
  showProposals();
  showList();
  draw();
}

function showCandidates() {
  $("candidates").replaceChildren(...state.masks.map((mask, i) => {
    const button = document.createElement("button");
    button.textContent = `${i + 1}: ${mask.score.toFixed(2)}`;
    button.className = i === state.chosen ? "chosen" : "";
    button.setAttribute("aria-pressed", i === state.chosen);
    button.onclick = () => choose(i);
    return button;
  }));
}

// The slider for the score, as long as there is a proposal.
function showProposals() {
  const { objects, hidden, least } = state.picture, shown = objects.filter((item) => item.proposed);
  const lowest = Math.min(...[...shown, ...hidden].map((item) => item.mask.score));
  $("proposals").hidden = !shown.length && !hidden.length;
  if ($("proposals").hidden) return;
  $("least").min = Math.floor(100 * lowest) / 100;
  $("least").value = Math.max(least, $("least").min);
  $("least-shown").textContent = Number($("least").value).toFixed(2);
  $("keep").textContent = `Keep ${shown.length}`;
}

let shown = {}; // what the list shows; many objects take time

function showList() {
  const { picture, queue, index } = state, count = picture.objects.length;
  $("count").textContent = count;
  $("position").textContent = queue.length ? `${index + 1} of ${queue.length}` : "no image";
  $("name").textContent = queue.length ? picture.name : "";
  $("name").title = picture.path;
  if (shown.objects === picture.objects && shown.base === picture.base) return;
  shown = { objects: picture.objects, base: picture.base };
  const list = $("objects"), focused = placeOfFocus();
  list.replaceChildren(...picture.objects.map(entry));
  $("labels").replaceChildren(...[...state.colors.keys()].map((label) => new Option(label)));
  if (!focused) return;
  const again = list.children[Math.min(focused[0], count - 1)]?.querySelector(focused[1]) ?? canvas;
  again.focus({ preventScroll: true });
}

// [number of the entry, what is focused in it], or null.
function placeOfFocus() {
  const item = document.activeElement.closest("#objects li");
  if (!item) return null;
  const kind = ["input", "button"].find((name) => document.activeElement.matches(name)) ?? ".pick";
  return [[...item.parentElement.children].indexOf(item), kind];
}

function entry(item, i) {
  const { picture } = state;
  const tags = ["li", "span", "input", "span", "button"];
  const [row, swatch, name, pick, button] = tags.map((tag) => document.createElement(tag));
  swatch.className = "swatch";
  swatch.style.background = `rgb(${colorOf(item.label)})`;
  name.value = item.label; name.maxLength = 200; name.title = "change the label";
  name.setAttribute("aria-label", `label of object ${i + 1}`);
  // Once the focus has moved; by then another picture may be open.
  name.onchange = () => setTimeout(() => relabel(picture, item, name.value.trim() || item.label));
  name.onkeydown = (event) => {
    if (event.key === "Enter") canvas.focus({ preventScroll: true });
    if (event.key === "Escape") { name.value = item.label; canvas.focus({ preventScroll: true }); }
  };
  pick.className = "pick"; pick.tabIndex = 0; pick.setAttribute("role", "button");
  const size = item.proposed ? `${item.mask.score.toFixed(2)} · ${item.area}` : `${item.area} px`;
  pick.textContent = item.area ? size : `${item.shape?.shape_type ?? "shape"}, kept`;
  const action = item.proposed ? "score and pixels; correct this object" : "correct this object";
  pick.title = item.area ? action : "samray trains on no such shape; it is written back as it came";
  pick.setAttribute("aria-label", `correct ${item.label} ${i + 1}, ${pick.textContent}`);
  button.textContent = "remove";
  button.setAttribute("aria-label", `remove ${item.label} ${i + 1}`);
  button.onclick = () => remove(item);
  row.className = item === state.base ? "chosen" : item === state.lit ? "lit" : "";
  row.classList.toggle("proposed", item.proposed);
  row.onclick = (event) => { if (event.target !== name && event.target !== button) select(item); };
  row.onkeydown = (event) => {
    if (event.target === pick && (event.key === "Enter" || event.key === " ")) { event.preventDefault(); select(item); }
    if (event.target === pick && event.key === "Delete") remove(item);
    if (["Enter", " ", "Delete"].includes(event.key)) event.stopPropagation(); // not the page's keys
  };
  row.onpointerenter = () => light(item);
  row.addEventListener("focusin", () => light(item));
  row.onpointerleave = () => light(null);
  row.append(swatch, name, pick, button);
  return row;
}

// Mark an object in the list and in the image.
export function light(item) {
  if (state.lit === item) return;
  state.lit = item;
  state.objects.forEach((other, i) => $("objects").children[i]?.classList.toggle("lit", other === item));
  const row = $("objects").children[state.objects.indexOf(item)], list = $("objects");
  if (row && !row.matches(":hover")) {
    if (row.offsetTop < list.scrollTop) list.scrollTop = row.offsetTop;
    const below = row.offsetTop + row.offsetHeight - list.clientHeight;
    if (below > list.scrollTop) list.scrollTop = below;
  }
  draw();
}

// The topmost finished object at a point of the image.
export const objectAt = ([x, y]) => state.objects.findLast((item) => item.mask?.has(x, y)) ?? null;
