// The stage: the open image under its masks, zoom and pan, and what pointers do on it.

import { $, PREVIEW_COLOR, PROMPT_COLOR, canvas, colorOf, state } from "./state.js";

const MAX_SCALE = 40; // screen pixels an image pixel
const NEAR = 6; // screen pixels that a click may slip
const MAX_LINE = 1000; // points; drawing a tangle of more takes seconds
const REST = 120; // ms until the pointer rests
const HOLD = 450; // ms until a finger that stays excludes

const stage = $("stage"), overlay = $("overlay");
const context = canvas.getContext("2d"), marks = overlay.getContext("2d");
const view = { scale: 1, x: 0, y: 0, fitted: true }; // image pixel -> screen pixel of the stage
let frame = 0;

// The whole image, in the middle.
export function fit() {
  if (!state.image) return;
  const scale = fittingScale(), x = (stage.clientWidth - canvas.width * scale) / 2;
  Object.assign(view, { scale, x, y: (stage.clientHeight - canvas.height * scale) / 2, fitted: true });
  place();
}

function fittingScale() {
  return Math.min(stage.clientWidth / canvas.width, stage.clientHeight / canvas.height, MAX_SCALE);
}

// Zoom, with what lies at the point of the stage staying there, or moving to another point.
export function zoom(factor, [x, y] = [stage.clientWidth / 2, stage.clientHeight / 2], to = [x, y]) {
  if (!state.image) return;
  const least = fittingScale(), scale = Math.min(Math.max(view.scale * factor, least), MAX_SCALE);
  view.x = to[0] - ((x - view.x) * scale) / view.scale;
  view.y = to[1] - ((y - view.y) * scale) / view.scale;
  view.scale = scale;
  view.fitted = scale === least;
  if (view.fitted) fit();
  else place();
}

export function pan(dx, dy) {
  view.x += dx;
  view.y += dy;
  view.fitted = false;
  place();
}

// Pan until a point of the image is in sight.
export function reveal([x, y]) {
  const margin = 20, left = view.x + x * view.scale, top = view.y + y * view.scale;
  const dx = Math.max(margin - left, 0) + Math.min(stage.clientWidth - margin - left, 0);
  const dy = Math.max(margin - top, 0) + Math.min(stage.clientHeight - margin - top, 0);
  if (!view.fitted) pan(dx, dy);
}

// How many image pixels the stage shows from left to right.
export const visibleWidth = () => Math.min(canvas.width, stage.clientWidth / view.scale);

function place() {
  view.x = inside(view.x, stage.clientWidth, canvas.width * view.scale);
  view.y = inside(view.y, stage.clientHeight, canvas.height * view.scale);
  canvas.style.transform = `translate(${view.x}px, ${view.y}px) scale(${view.scale})`;
  canvas.style.imageRendering = view.scale * devicePixelRatio >= 2 ? "pixelated" : "auto";
  draw();
}

// The image reaches to the middle at least; more would leave the point of a zoom.
const inside = (start, room, size) => Math.min(Math.max(start, room / 2 - size), room / 2);

new ResizeObserver(() => {
  overlay.width = stage.clientWidth * devicePixelRatio;
  overlay.height = stage.clientHeight * devicePixelRatio;
  if (view.fitted) fit();
  else if (state.image) zoom(1);
}).observe(stage);

// Show the open picture from now on.
export function show() {
  const { image, blob } = state;
  stage.className = blob ? "full" : "";
  canvas.style.visibility = overlay.style.visibility = image ? "visible" : "hidden"; // not the one before
  if (!image) return;
  canvas.width = image.width;
  canvas.height = image.height;
  fit();
}

// Draw soon, once for all changes until then.
export function draw() {
  frame ||= requestAnimationFrame(() => {
    frame = 0;
    if (!state.image) return;
    drawImage();
    drawMarks();
  });
}

function drawImage() {
  const { picture, lit } = state, current = picture.masks[picture.chosen];
  context.drawImage(picture.image, 0, 0);
  for (const item of picture.objects) {
    if (!item.area || item === picture.base) continue;
    tint(item.mask, colorOf(item.label), item === lit ? 160 : item.proposed ? 50 : 90, item === lit ? 3 : 1);
  }
  if (current) tint(current, PROMPT_COLOR, 130, 2);
  else if (picture.base?.area) tint(picture.base.mask, PROMPT_COLOR, 110, 2);
  if (picture.preview) tint(picture.preview, PREVIEW_COLOR, 120, 3);
}

// edge: in screen pixels when the whole image is shown.
function tint(mask, color, alpha, edge) {
  if (!mask.area) return;
  const thickness = Math.max(1, Math.round(edge / fittingScale()));
  context.drawImage(mask.layer(color, alpha, thickness), mask.bbox[0], mask.bbox[1]);
}

// Points, box, cross-hair and shapes without an area, in screen pixels.
function drawMarks() {
  const { picture, drag, cross } = state, onStage = ([x, y]) => [view.x + x * view.scale, view.y + y * view.scale];
  marks.setTransform(devicePixelRatio, 0, 0, devicePixelRatio, 0, 0);
  marks.clearRect(0, 0, stage.clientWidth, stage.clientHeight);
  for (const item of picture.objects) {
    const points = item.mask || !Array.isArray(item.shape?.points) ? [] : item.shape.points.filter(Array.isArray);
    if (!points.length || points.length > MAX_LINE) continue;
    stroke(points.map(onStage), `rgb(${colorOf(item.label)})`, item === state.lit);
  }
  const box = drag?.moved ? corners(drag) : picture.box;
  if (box) {
    const [x1, y1, x2, y2] = [...onStage(box), ...onStage(box.slice(2))];
    stroke([[x1, y1], [x2, y1], [x2, y2], [x1, y2], [x1, y1]], `rgb(${PROMPT_COLOR})`, false, [6, 6]);
  }
  picture.points.forEach((point, i) => dot(onStage(point), picture.labels[i]));
  if (cross && document.activeElement === canvas) {
    const [x, y] = onStage(cross);
    stroke([[x - 14, y], [x + 14, y]], "#000");
    stroke([[x, y - 14], [x, y + 14]], "#000");
  }
}

function stroke(points, color, lit = false, dash = []) {
  marks.beginPath();
  points.forEach(([x, y]) => marks.lineTo(x, y));
  if (points.length === 1) marks.arc(...points[0], 3, 0, 7);
  for (const [style, width, pattern] of [["#fff", lit ? 7 : 4, []], [color, lit ? 4 : 2, dash]]) {
    marks.strokeStyle = style; marks.lineWidth = width; marks.setLineDash(pattern);
    marks.stroke();
  }
}

// A plus on green includes, a minus on red excludes: not by colour alone.
function dot([x, y], include) {
  marks.setLineDash([]);
  marks.beginPath();
  marks.arc(x, y, 7, 0, 7);
  marks.fillStyle = include ? "#007a3d" : "#c00000";
  marks.fill();
  marks.strokeStyle = "#fff"; marks.lineWidth = 2;
  marks.stroke();
  marks.beginPath();
  marks.moveTo(x - 3.5, y); marks.lineTo(x + 3.5, y);
  if (include) { marks.moveTo(x, y - 3.5); marks.lineTo(x, y + 3.5); }
  marks.stroke();
}

const corners = ({ from, to }) => [
  Math.min(from[0], to[0]), Math.min(from[1], to[1]), Math.max(from[0], to[0]), Math.max(from[1], to[1]),
];

// Let pointers work on the stage. click(point, include), box(corners), hover(point or null) and
// rest(point) are called with points of the image.
export function listen({ click, box, hover, rest }) {
  const down = new Map(); // pointers that are down -> where
  let gesture = null, timer = 0, pinched = null; // draw, pan, pinch, or none until all pointers are up

  // A finger has stayed where it was put: as the right button.
  const hold = () => {
    const { drag } = state;
    if (gesture !== "draw" || !drag || drag.moved || drag.outside) return;
    gesture = "none";
    state.drag = null;
    click(drag.from, 0);
  };

  stage.onpointerdown = (event) => {
    if (!state.image) return;
    stage.setPointerCapture(event.pointerId);
    down.set(event.pointerId, [event.clientX, event.clientY]);
    clearTimeout(timer);
    state.cross = state.drag = null;
    if (down.size > 1) {
      gesture = down.size === 2 ? "pinch" : "none";
      pinched = { start: { ...view }, from: [...down.values()] };
    } else if (event.button === 1 || state.spaceHeld) { gesture = "pan"; state.panned = true; }
    else {
      gesture = "draw";
      const point = pointAt(event), exclude = event.shiftKey || event.button === 2 || state.exclude;
      state.drag = { from: point, to: point, moved: false, exclude, outside: !isOnImage(event) };
      if (event.pointerType === "touch") timer = setTimeout(hold, HOLD);
    }
    if (event.button === 1) event.preventDefault(); // the browser's own scrolling
    draw();
  };

  stage.onpointermove = (event) => {
    if (!state.image) return;
    const at = [event.clientX, event.clientY];
    if (!down.has(event.pointerId)) {
      clearTimeout(timer);
      const point = isOnImage(event) ? pointAt(event) : null;
      hover(point);
      if (point && event.pointerType !== "touch") timer = setTimeout(() => rest(point), REST);
      return;
    }
    const last = down.get(event.pointerId);
    down.set(event.pointerId, at);
    if (gesture === "pan") pan(at[0] - last[0], at[1] - last[1]);
    else if (gesture === "pinch") pinch(pinched, [...down.values()]);
    else if (gesture === "draw") {
      state.drag.to = pointAt(event);
      const { from, to } = state.drag, way = Math.hypot(to[0] - from[0], to[1] - from[1]) * view.scale;
      state.drag.moved ||= way > NEAR;
      draw();
    }
  };

  stage.onpointerup = stage.onpointercancel = (event) => {
    down.delete(event.pointerId);
    clearTimeout(timer);
    const { drag } = state;
    state.drag = null;
    if (gesture === "draw" && drag && event.type === "pointerup") {
      const [x1, y1, x2, y2] = corners(drag);
      if (drag.moved && x2 - x1 >= 1 && y2 - y1 >= 1) box([x1, y1, x2, y2]);
      else if (!drag.outside) click(drag.from, drag.exclude ? 0 : 1);
    }
    gesture = down.size ? "none" : null;
    draw();
  };

  stage.onpointerleave = () => { clearTimeout(timer); hover(null); };
  stage.oncontextmenu = (event) => { if (state.image) event.preventDefault(); }; // excludes
  stage.addEventListener("wheel", (event) => {
    if (!state.image) return;
    event.preventDefault();
    const lines = event.deltaMode === 1 ? 16 : 1, speed = event.ctrlKey ? 0.01 : 0.002; // Ctrl: a touchpad's pinch
    zoom(Math.exp(-event.deltaY * lines * speed), onStage([event.clientX, event.clientY]));
  }, { passive: false });
  canvas.onblur = canvas.onfocus = draw;
}

// Two fingers that were at `from` when the view was `start`: what lay between them stays there.
// From the start each time, so that a border met on the way leaves no offset.
function pinch({ start, from }, to) {
  const middle = ([p, q]) => onStage([(p[0] + q[0]) / 2, (p[1] + q[1]) / 2]);
  const distance = ([p, q]) => Math.max(Math.hypot(p[0] - q[0], p[1] - q[1]), 1);
  const [x, y] = middle(from);
  Object.assign(view, start);
  zoom(distance(to) / distance(from), [x, y], middle(to));
}

function onStage([x, y]) {
  const area = stage.getBoundingClientRect();
  return [x - area.left - stage.clientLeft, y - area.top - stage.clientTop];
}

function isOnImage({ clientX, clientY }) {
  const area = canvas.getBoundingClientRect();
  return clientX >= area.left && clientX < area.right && clientY >= area.top && clientY < area.bottom;
}

// The point of the image under a pointer; its border if the pointer is outside.
function pointAt({ clientX, clientY }) {
  const area = canvas.getBoundingClientRect();
  const x = ((clientX - area.left) * canvas.width) / area.width;
  const y = ((clientY - area.top) * canvas.height) / area.height;
  return [Math.min(Math.max(x, 0), canvas.width - 0.01), Math.min(Math.max(y, 0), canvas.height - 0.01)];
}
