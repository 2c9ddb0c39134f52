// The page: what its buttons and keys do. Start reading here.

import { close, filesOfDrop, jsonPathOf, nameOf, open, openFiles, save, saveAll, step, text } from "./files.js";
import { coco, labelMap, labelme } from "./formats.js";
import { findAll } from "./find.js";
import { answer, choose, clear, click, drawBox, finish, light, objectAt, remove, setLabel, undo } from "./objects.js";
import { encoded, loadModels, previewMask } from "./server.js";
import { draw, fit, listen, reveal, visibleWidth, zoom } from "./stage.js";
import { $, canvas, note, say, state } from "./state.js";
import { keepQueue, keepToken, losesWork, restore, restoreToken } from "./storage.js";

Object.assign(window, { $, state, canvas }); // for the browser's console, and for tests

$("undo").onclick = undo;
$("clear").onclick = clear;
$("finish").onclick = () => finish();
$("exclude").onclick = () => exclude(!state.exclude);
$("previous").onclick = () => step(-1);
$("next").onclick = () => step(1);
$("zoom-in").onclick = () => zoom(1.5);
$("zoom-out").onclick = () => zoom(1 / 1.5);
$("fit").onclick = fit;
$("notes").onclick = () => note("");
$("label").oninput = () => setLabel($("label").value);
$("label").onchange = keepQueue;
$("label").onkeydown = (event) => {
  if (event.key !== "Enter") return;
  canvas.focus({ preventScroll: true });
  if (state.picture.hasPrompt || state.base) finish();
};
$("close").onclick = () => closeImages([state.picture]);
$("close-all").onclick = () => closeImages([...state.queue]);

$("model").onchange = () => {
  const { picture } = state, { points, labels, box, base, label } = picture;
  picture.setPrompt({ points, labels, box, base, label });
  encodeAgain();
};
$("token").onchange = async () => {
  keepToken();
  if (!(await loadModels())) return;
  $("token-row").hidden = true;
  encodeAgain();
};

// For another model, or once there is a token.
function encodeAgain() {
  const { picture } = state;
  if (!picture.blob) return;
  if (!picture.image) open(state.index);
  else if (picture.hasPrompt) answer(picture);
  else encoded(picture).catch((error) => say(error.message, true));
}

function exclude(on) {
  state.exclude = on;
  $("exclude").setAttribute("aria-pressed", on);
  $("exclude").classList.toggle("chosen", on);
}

async function closeImages(pictures) {
  const count = pictures.reduce((sum, picture) => sum + picture.objects.length, 0);
  const what = pictures.length > 1 ? `${pictures.length} images` : pictures[0]?.name;
  if (count && !confirm(`Close ${what} with ${count} objects? They are lost unless you have downloaded them.`)) return;
  await close(pictures);
}

// Files

for (const id of ["file", "folder"]) {
  $(id).onchange = (event) => {
    const files = [...event.target.files].map((file) => [file.webkitRelativePath || file.name, file]);
    event.target.value = ""; // so that the same file can be chosen again
    if (files.length) openFiles(files);
  };
}
document.ondragover = (event) => { event.preventDefault(); $("stage").classList.add("over"); };
document.ondragleave = () => $("stage").classList.remove("over");
document.ondrop = async (event) => {
  event.preventDefault();
  $("stage").classList.remove("over");
  const files = await filesOfDrop(event.dataTransfer);
  if (files.length) openFiles(files);
};
window.onbeforeunload = (event) => { if (losesWork()) event.preventDefault(); };

$("sample").onclick = async () => { // discs on a background
  const paint = new OffscreenCanvas(480, 360), brush = paint.getContext("2d");
  brush.fillStyle = "#c9c2b2";
  brush.fillRect(0, 0, 480, 360);
  for (let i = 0; i < 400; i++) {
    brush.fillStyle = `rgba(90, 80, 60, ${Math.random() * 0.12})`;
    brush.fillRect(Math.random() * 480, Math.random() * 360, 6, 6);
  }
  const discs = [
    [120, 110, 60, "#7a4a21"], [300, 90, 45, "#2e6b8a"], [370, 250, 70, "#a8323e"], [160, 270, 50, "#4f7a3a"],
  ];
  for (const [x, y, radius, color] of discs) {
    const shade = brush.createRadialGradient(x - radius / 3, y - radius / 3, radius / 8, x, y, radius);
    shade.addColorStop(0, "#fff"); shade.addColorStop(0.3, color); shade.addColorStop(1, "#222");
    brush.fillStyle = shade;
    brush.beginPath(); brush.arc(x, y, radius, 0, 7); brush.fill();
  }
  const blob = await paint.convertToBlob({ type: "image/png" });
  openFiles([["drawn.png", new File([blob], "drawn.png", { type: "image/png" })]]);
};

// Downloads

// Whether the shapes of the LabelMe file that a picture came with are known: without them a download
// would lose them.
async function isRead(picture) {
  if (picture.settled) { await picture.reading; return true; }
  say("the LabelMe file of this image cannot be read before the image is shown", true);
  return false;
}

for (const button of document.querySelectorAll("[data-save]")) {
  button.onclick = async () => {
    const { picture } = state, kind = button.dataset.save, stem = picture.name.replace(/\.[^.]*$/, "");
    if (kind === "all") { await saveAll(); return; }
    if (!(await isRead(picture))) return;
    if (!picture.objects.length && !picture.document) { say("finish an object first", true); return; }
    if (kind === "png" && picture.objects.filter((item) => item.area).length > 255) {
      say("an 8-bit PNG can hold 255 objects; use COCO or LabelMe", true);
      return;
    }
    if (kind === "png") save(`${stem}_labels.png`, new Blob([await labelMap(picture)], { type: "image/png" }));
    else if (kind === "coco") save(`${stem}_coco.json`, new Blob([text(coco(picture))], { type: "application/json" }));
    else save(nameOf(jsonPathOf(picture)), new Blob([text(await labelme(picture))], { type: "application/json" }));
  };
}
$("copy").onclick = async () => {
  if (!(await isRead(state.picture))) return;
  if (!state.objects.length) { say("finish an object first", true); return; }
  try {
    await navigator.clipboard.writeText(text(await labelme(state.picture)));
    say("copied");
  } catch { say("the browser does not allow copying here; download it", true); }
};

// Pointers and keys

let previewing = false;
listen({
  click,
  box: drawBox,
  hover: (point) => {
    light(point && objectAt(point));
    if (state.preview) { state.preview = null; draw(); }
  },
  rest: async (point) => {
    const { picture } = state, busy = () => picture.hasPrompt || picture.base || picture !== state.picture;
    if (previewing || busy()) return;
    previewing = true;
    const mask = await previewMask(picture, point);
    previewing = false;
    if (!mask || busy()) return;
    picture.preview = mask;
    draw();
  },
});

canvas.onkeydown = (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || !state.image) return;
  const step = Math.max(1, Math.round(visibleWidth() / (event.shiftKey ? 200 : 50)));
  const move = { ArrowLeft: [-step, 0], ArrowRight: [step, 0], ArrowUp: [0, -step], ArrowDown: [0, step] }[event.key];
  if (move) {
    event.preventDefault();
    const [x, y] = state.cross ?? [canvas.width / 2, canvas.height / 2];
    const within = (value, size) => Math.min(Math.max(value, 0), size - 1);
    state.cross = [within(x + move[0], canvas.width), within(y + move[1], canvas.height)];
    reveal(state.cross);
    draw();
  } else if (event.key.toLowerCase() === "x" && state.cross) click([...state.cross], 0);
};

const KEYS = {
  escape: clear, z: undo, e: () => exclude(!state.exclude),
  n: () => step(1), pagedown: () => step(1), p: () => step(-1), pageup: () => step(-1),
  "+": () => zoom(1.5), "=": () => zoom(1.5), "-": () => zoom(1 / 1.5), 0: fit,
  f: findAll, 1: () => choose(0), 2: () => choose(1), 3: () => choose(2),
  delete: () => { if (state.base) remove(state.base); },
};

document.onkeydown = (event) => {
  const { activeElement } = document, key = event.key.toLowerCase();
  const undoes = (event.ctrlKey || event.metaKey) && key === "z";
  if (["INPUT", "SELECT"].includes(activeElement.tagName)) return;
  if ((event.ctrlKey || event.metaKey || event.altKey) && !undoes) return;
  if (key === " " && [canvas, document.body].includes(activeElement)) {
    event.preventDefault(); // the browser's scrolling
    if (!event.repeat) Object.assign(state, { spaceHeld: true, panned: false });
    $("stage").classList.add("pan");
  } else if (key === "enter") {
    if (!["BUTTON", "SUMMARY"].includes(activeElement.tagName)) finish();
  } else if (Object.hasOwn(KEYS, key)) {
    event.preventDefault();
    KEYS[key]();
  }
};

// Space alone clicks at the cross-hair; with a drag it pans.
document.onkeyup = (event) => {
  if (event.key !== " " || !state.spaceHeld) return;
  state.spaceHeld = false;
  $("stage").classList.remove("pan");
  if (!state.panned && state.cross && document.activeElement === canvas) click([...state.cross], state.exclude ? 0 : 1);
};
window.onblur = () => { state.spaceHeld = false; };

// The start

restoreToken();
exclude(false);
const loading = loadModels(), count = await restore(); // the models of a starting server take a while
if ((await loading) && count && !state.image) await open(state.index);
