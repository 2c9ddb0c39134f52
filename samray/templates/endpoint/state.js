// What the page knows: a queue of images, each with its prompt, its objects and its history.

export const $ = (id) => document.getElementById(id);
export const canvas = $("canvas");

const MAX_NOTES = 1000, MORE = "; and more"; // letters
const MAX_STEPS = 200; // of undo, for each image

export class Picture {
  constructor(name, blob, path = name) {
    this.key = Array.from(crypto.getRandomValues(new Uint32Array(3)), (n) => n.toString(36)).join("");
    this.name = name;
    this.path = path; // inside the dropped folder, the name included
    this.blob = blob;
    this.shown = null; // a Blob from the server, if the browser cannot show the file itself
    this.image = null; // an ImageBitmap, only while the picture is open
    this.width = this.height = 0; // of the image as shown; 0 before it was opened
    this.id = this.model = null; // the server's id, and the model that has encoded it
    this.encoding = null; // a promise
    this.document = this.jsonPath = null; // the LabelMe file that came with it
    this.reading = null; // a promise, once its shapes are read
    this.points = [];
    this.labels = []; // of the points: 1 include, 0 exclude
    this.box = null;
    this.masks = []; // candidates
    this.chosen = 0;
    this.base = null; // the finished object that the prompt corrects
    this.label = null; // of the object that the prompt makes or corrects; null without one
    this.asked = 0; // number of the last request: earlier answers are out of date
    this.waiting = false; // for an answer
    this.finishing = null; // the label with which to finish the object once the answer is there
    this.preview = null;
    this.objects = [];
    this.finding = false; // all objects
    this.hidden = []; // proposals of a lower score than `least`
    this.least = 0;
    this.history = [];
  }

  // Before each change of the prompt or the objects. Masks and objects are never changed in place.
  remember() {
    const { points, labels, box, masks, chosen, base, label, objects, hidden, least } = this;
    this.history.push({ points, labels, box, masks, chosen, base, label, objects, hidden, least });
    if (this.history.length > MAX_STEPS) this.history.shift();
  }

  setPrompt(prompt) {
    this.asked++;
    Object.assign(this, { points: [], labels: [], box: null, masks: [], chosen: 0, base: null, label: null });
    Object.assign(this, { preview: null, waiting: false, finishing: null }, prompt);
  }

  get hasPrompt() { return this.points.length > 0 || this.box !== null; }

  // The image was opened before, or came without a LabelMe file: its objects are known.
  get settled() { return this.width > 0 || this.document === null; }

  // Free what can be computed again.
  close() {
    this.image?.close();
    this.image = this.preview = null;
    for (const { objects, hidden, masks, base } of [this, ...this.history]) {
      for (const mask of [...masks, base?.mask, ...[...objects, ...hidden].map((item) => item.mask)]) mask?.forget();
    }
  }
}

const nothing = new Picture("image.png", null);

export const state = {
  queue: [],
  index: -1,
  exclude: false, // what a plain click does
  cross: null, // the keyboard's cross-hair
  drag: null,
  spaceHeld: false,
  nextLabel: "object", // of the next new object, in whatever image
  panned: false, // while Space was held
  lit: null, // the object under the pointer, in the list or in the image
  colors: new Map(), // label -> its number in COLORS
  get picture() { return this.queue[this.index] ?? nothing; },
};

// `state.points` is that of the open picture; `state.id` is null until it can be seen and clicked on.
for (const name of Object.keys(nothing)) {
  Object.defineProperty(state, name, {
    get: () => (name === "id" && !state.picture.image ? null : state.picture[name]),
    set: (value) => { state.picture[name] = value; },
  });
}

export function say(text, bad = false) {
  $("live").textContent = text;
  $("status").className = bad ? "bad" : "";
}

// What stays in sight until the next files are opened or somebody clicks on it.
export function note(text) {
  const shown = $("notes").textContent;
  if (text && (shown.includes(text) || shown.endsWith(MORE))) return;
  const whole = text && shown ? `${shown}; ${text}` : text;
  $("notes").textContent = whole.length > MAX_NOTES ? `${shown}${MORE}` : whole;
}

// Okabe and Ito's and Paul Tol's colours, which colour-blind people can tell apart. Blue is the
// prompt's, yellow the preview's.
export const PROMPT_COLOR = [0, 114, 178];
export const PREVIEW_COLOR = [240, 228, 66];
const COLORS = [
  [230, 159, 0], [0, 158, 115], [213, 94, 0], [204, 121, 167], [86, 180, 233],
  [136, 34, 85], [153, 153, 51], [68, 170, 153], [51, 34, 136], [17, 119, 51],
];

// The same label has the same colour in all images; two labels share one only after ten.
export function colorOf(label) {
  if (!state.colors.has(label)) {
    let number = 0;
    for (const letter of label) number = (31 * number + letter.codePointAt(0)) % COLORS.length;
    const taken = new Set(state.colors.values());
    while (taken.has(number) && taken.size < COLORS.length) number = (number + 1) % COLORS.length;
    state.colors.set(label, number);
  }
  return COLORS[state.colors.get(label)];
}
