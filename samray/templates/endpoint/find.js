// All objects of an image at once: proposals, until somebody keeps, corrects, renames or removes them.

import { Item, Mask, overlap } from "./masks.js";
import { changed, labelFor, refresh } from "./objects.js";
import { everything } from "./server.js";
import { $, say, state } from "./state.js";

const UNNAMED = "object"; // the label that a model gives which knows none
const SAME = 0.5; // IoU of a proposal with a kept object, from which on it is that object

export async function findAll() {
  const { picture } = state, started = performance.now();
  const label = (picture.base ? state.nextLabel : labelFor(picture)).trim() || UNNAMED;
  const seconds = () => ((performance.now() - started) / 1000).toFixed(1);
  if (!picture.image) { say("open an image first", true); return; }
  if (picture.finding) return;
  const clock = setInterval(() => {
    if (picture === state.picture) say(`looking for all objects … ${seconds()} s; you can go on clicking`);
  }, 200);
  picture.finding = true;
  try {
    const answer = await everything(picture);
    clearInterval(clock);
    const count = propose(picture, answer.objects, label);
    if (picture !== state.picture) return;
    const more = answer.left_out ? `; ${answer.left_out} less sure ones are left out` : "";
    const next = count ? "; click on one in the list to correct it, or keep them" : "";
    say(`${count || "no"} new object${count === 1 ? "" : "s"} found in ${seconds()} s${more}${next}`);
  } catch (error) {
    clearInterval(clock);
    if (picture === state.picture) say(error.message, true);
  } finally {
    picture.finding = false;
  }
}

// Add the objects of an answer in place of earlier proposals; returns how many there are. given: the
// label of those that the model gives none.
function propose(picture, found, given) {
  const kept = picture.objects.filter((item) => !item.proposed || item === picture.base);
  const fresh = found
    .map(({ label, ...mask }) => new Item(label === UNNAMED ? given : label, new Mask(mask), undefined, true, true))
    .filter((item) => !kept.some((other) => other.mask && overlap(item.mask, other.mask) > SAME));
  picture.remember();
  Object.assign(picture, { least: 0, hidden: [], objects: [...kept, ...fresh] });
  changed(picture);
  return fresh.length;
}

const bySureness = (one, other) => other.mask.score - one.mask.score;

// Every proposal of a picture, whether it is shown or not.
const proposals = ({ objects, hidden }) => [...objects.filter((item) => item.proposed), ...hidden];

let sliding = false; // one step of undo for a whole drag

// Show the proposals of at least a score.
function setLeast(least) {
  const { picture } = state, all = proposals(picture).sort(bySureness);
  if (!sliding) picture.remember();
  sliding = true;
  const isShown = (item) => item.mask.score >= least || item === picture.base;
  const objects = [...picture.objects.filter((item) => !item.proposed), ...all.filter(isShown)];
  Object.assign(picture, { least, objects, hidden: all.filter((item) => !isShown(item)) });
  refresh();
}

// Keep the proposals that are shown, and forget the others.
export function keepAll() {
  const { picture } = state, kept = (item) => new Item(item.label, item.mask, item.shape, item.redrawn);
  const count = picture.objects.filter((item) => item.proposed).length;
  picture.remember();
  const objects = picture.objects.map((item) => (item.proposed && item !== picture.base ? kept(item) : item));
  Object.assign(picture, { objects, hidden: [], least: 0 });
  say(`${count} objects kept; Undo takes it back`);
  changed(picture);
}

$("find").onclick = findAll;
$("keep").onclick = keepAll;
$("least").oninput = () => setLeast(Number($("least").value));
$("least").onchange = () => { sliding = false; changed(state.picture); };
