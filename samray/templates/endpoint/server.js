// The endpoint: images are encoded, prompts answered. Errors are said in words for annotators.

import { Mask } from "./masks.js";
import { $, note, say, state } from "./state.js";

const BYTES = "application/octet-stream", JSON_TYPE = "application/json";
const WAITS = 30; // seconds for a busy or starting server
const WORDS = {
  forbidden: "the server refuses this address; open the page at the address that samray serve prints",
  unknown_model: "this model is not served any more; choose another one",
  too_busy: "the server is busy; try again in a moment",
  not_ready: "the server is still starting; try again in a moment",
  timed_out: "the server took too long; try again",
  too_slow: "sending took too long; try again",
  internal: "the server had an error; try again",
  invalid_request: "the server cannot use this prompt; undo the last step and try again",
};
export const ABOUT_THE_FILE = ["invalid_image", "unsupported_format", "too_large"];

// The answer to a request: JSON, or a Blob for an image.
export async function ask(method, path, body, type, waits = WAITS) {
  const token = $("token").value, headers = token ? { Authorization: "Bearer " + token } : {};
  if (type) headers["Content-Type"] = type;
  let response;
  try { response = await fetch(path, { method, body, headers }); }
  catch { throw new Error("the server does not answer; is it running? Try again once it is"); }
  if (response.ok) return response.headers.get("Content-Type") === "image/png" ? response.blob() : response.json();
  const { code, message } = (await response.json().catch(() => ({}))).error ?? { code: "internal" };
  if ((code === "too_busy" || code === "not_ready") && waits > 0) {
    say(code === "too_busy" ? "the server is busy; waiting …" : "the server is starting; waiting …");
    await new Promise((done) => setTimeout(done, 1000));
    return ask(method, path, body, type, waits - 1);
  }
  const error = new Error(ABOUT_THE_FILE.includes(code) ? message : WORDS[code] ?? WORDS.internal);
  error.code = code;
  if (code === "unauthorized") {
    $("token-row").hidden = false;
    error.message = token ? "this is not the server's token" : "this server wants a token";
  }
  throw error;
}

export async function loadModels() {
  try {
    let { models } = await ask("GET", "/v1/models");
    while (!models.length) {
      say("the server is starting; waiting …");
      await new Promise((done) => setTimeout(done, 1000));
      ({ models } = await ask("GET", "/v1/models"));
    }
    const before = $("model").value;
    $("model").replaceChildren(...models.map((model) => new Option(model.name, model.name)));
    if (models.some((model) => model.name === before)) $("model").value = before;
    if (!state.blob) say("ready; open an image");
    return true;
  } catch (error) {
    say(error.message, true);
    return false;
  }
}

// The image as the model sees it, for files that a browser shows otherwise or not at all.
export function fetchPreview(blob) {
  return ask("POST", "/v1/preview", blob, BYTES);
}

// Resolves once the server has encoded the picture for the chosen model; all clicks until then wait
// for one encoding. Another model may be chosen meanwhile.
export async function encoded(picture) {
  while (!picture.id || picture.model !== $("model").value) {
    picture.encoding ??= encode(picture, $("model").value).finally(() => { picture.encoding = null; });
    await picture.encoding;
  }
}

async function encode(picture, model) {
  const started = performance.now(), seconds = () => ((performance.now() - started) / 1000).toFixed(1);
  const tell = () => {
    if (picture !== state.picture) return;
    const isFinishing = picture.finishing !== null, after = "your object is finished after it, and you can click on";
    const wait = picture.hasPrompt ? "your click is answered once it is done" : "you can click already";
    say(`encoding the image … ${seconds()} s; ${isFinishing ? after : wait}`);
  };
  const clock = setInterval(tell, 100);
  try {
    const answer = await ask("POST", `/v1/images?model=${encodeURIComponent(model)}`, picture.blob, BYTES);
    Object.assign(picture, { id: answer.image_id, model });
    if (picture.width && (picture.width !== answer.width || picture.height !== answer.height)) {
      note(`${picture.name}: the browser shows another size than the model sees`);
    }
    clearInterval(clock);
    if (picture !== state.picture || picture.hasPrompt || model !== $("model").value) return;
    const ready = answer.cache === "hit" ? "ready (was encoded before)" : `encoded in ${seconds()} s`;
    say(`${ready}; click on an object`);
  } catch (error) {
    if (model !== $("model").value) return; // not wanted any more
    if (error.code === "unknown_model" && (await loadModels()) && !model) return; // asked before there was a list
    if (ABOUT_THE_FILE.includes(error.code)) error.message = `${picture.name}: ${error.message}`;
    throw error;
  } finally {
    clearInterval(clock);
  }
}

// Ask for the mask of the picture's prompt. Returns true once it is there, false after an error, and
// null if the prompt has changed meanwhile: then a later request is in charge.
export async function predict(picture) {
  const number = ++picture.asked;
  try {
    await encoded(picture);
    if (number !== picture.asked) return null;
    const prompt = promptOf(picture);
    const answer = await answerTo(picture, "/v1/predict", () => request(picture, prompt), prompt);
    if (number !== picture.asked) return null;
    Object.assign(picture, { masks: answer.results[0].masks.map((mask) => new Mask(mask)), chosen: 0, preview: null });
    const [best] = picture.masks;
    if (picture === state.picture) {
      const time = `mask in ${answer.timing_ms.total.toFixed(0)} ms`;
      if (best.area) say(`${time}, predicted IoU ${best.score.toFixed(2)}`);
      else say(`${time}, but it is empty; click elsewhere or drag a box`);
    }
    return true;
  } catch (error) {
    if (number !== picture.asked) return null;
    if (picture === state.picture) say(error.message, true);
    return false;
  }
}

// The mask that the pointer rests on, or null.
export async function previewMask(picture, point) {
  if (!picture.id || picture.model !== $("model").value) return null;
  try {
    const prompt = { point_coords: [point], point_labels: [1] };
    const answer = await ask("POST", "/v1/predict", request(picture, prompt), JSON_TYPE, 0);
    return new Mask(answer.results[0].masks[0]);
  } catch {
    return null;
  }
}

function promptOf(picture) {
  const { points, labels, base } = picture, box = picture.box ?? (base?.mask && boxAround(base.bbox, points, labels));
  const prompt = { point_coords: points, point_labels: labels };
  if (box) prompt.box = box;
  const last = picture.masks[picture.chosen] ?? base?.mask;
  if (last?.mask_token && (points.length > 1 || base)) prompt.mask_token = last.mask_token;
  return prompt;
}

// The box of a mask that is corrected; points that are to be included as well enlarge it.
function boxAround([x1, y1, x2, y2], points, labels) {
  const more = points.filter((_, i) => labels[i]);
  const xs = more.map(([x]) => x), ys = more.map(([, y]) => y);
  return [Math.min(x1, ...xs), Math.min(y1, ...ys), Math.max(x2, ...xs), Math.max(y2, ...ys)];
}

// All objects of the picture, the surest first.
export async function everything(picture) {
  await encoded(picture);
  const body = () => JSON.stringify({ image_id: picture.id, model: picture.model, mask_format: "rle" });
  return answerTo(picture, "/v1/segment", body);
}

// What the server has lost since, in a restart or from a full cache, is sent again.
async function answerTo(picture, path, body, prompt = {}) {
  for (let tries = 0; tries < 4; tries++) {
    try {
      return await ask("POST", path, body(), JSON_TYPE);
    } catch (error) {
      if (error.code === "unknown_image") {
        picture.id = null;
        await encoded(picture);
      } else if (error.code === "unknown_mask_token") delete prompt.mask_token;
      else {
        if (error.code === "unknown_model") await loadModels();
        throw error;
      }
    }
  }
  throw new Error("the server does not keep this image; its cache may be too small");
}

function request(picture, prompt) {
  return JSON.stringify({ image_id: picture.id, model: picture.model, prompts: [prompt], mask_format: "rle" });
}
