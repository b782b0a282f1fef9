// The forms are sent as they are, and answered with pictures: uint8 [N, 1 or 3, height, width]. The canvas of
// Edit has the model's pixels.

const at = (selector, within = document) => within.querySelector(selector);
const all = (selector, within = document) => [...within.querySelectorAll(selector)];
const model = await (await fetch("model")).json();
const canvas = at("#canvas"), pen = canvas.getContext("2d", {willReadFrequently: true});
const shownSize = (least) => model.size * Math.max(1, Math.round(least / model.size));

function say(words, isError = false) {
  at("#message").textContent = words;
  at("#message").classList.toggle("error", isError);
}

// ---- asking ----

async function ask(action, words = {}, body = "") {
  say("working ...");
  const given = Object.entries(words).filter(([, value]) => value !== "");
  const answer = await fetch(`${action}?${new URLSearchParams(given)}`, {method: "POST", body}).catch(() => null);
  if (!answer) throw Error("there is no answer: is trainer.demo still running?");
  if (!answer.ok) throw Error(await answer.text());
  say("");
  return pictures(new Uint8Array(await answer.arrayBuffer()));
}

function pictures(pixels) {
  const area = model.size * model.width, each = area * model.channels, found = [];
  for (let start = 0; start < pixels.length; start += each) {
    const picture = new ImageData(model.width, model.size);
    for (let i = 0; i < area; i++) {
      for (let c = 0; c < 3; c++) picture.data[4 * i + c] = pixels[start + i + area * Math.min(c, model.channels - 1)];
      picture.data[4 * i + 3] = 255;
    }
    found.push(picture);
  }
  return found;
}

// Runs what a user asked for. Meanwhile no button can be pressed, so that answers come in order.
async function run(work) {
  const buttons = all("main button");
  buttons.forEach((button) => (button.disabled = true));
  await work().catch((error) => say(error.message, true));
  buttons.forEach((button) => (button.disabled = false));
}

function onSubmit(form, work) {
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    run(async () => work(Object.fromEntries(new FormData(form))));
  });
}

// ---- showing ----

function show(element, picture, least) {
  Object.assign(element, {width: model.width, height: model.size});
  element.style.width = `${(shownSize(least) * model.width) / model.size}px`;
  element.getContext("2d").putImageData(picture, 0, 0);
}

function showAll(place, found) {
  place.replaceChildren(...found.map((picture) => {
    const element = document.createElement("canvas");
    show(element, picture, 80);
    element.addEventListener("click", () => take(picture));
    return element;
  }));
}

function open(section) {
  all("main > section").forEach((other) => other.classList.toggle("shown", other === section));
  all("nav button").forEach((tab) => tab.setAttribute("aria-current", tab.textContent === section.dataset.tab));
}

function take(picture) {
  if (model.translates) return;
  pen.putImageData(picture, 0, 0);
  open(at("#edit"));
}

// ---- the tabs ----

for (const section of all("main > section")) {
  const tab = document.createElement("button");
  tab.textContent = section.dataset.tab;
  tab.addEventListener("click", () => open(section));
  at("nav").append(tab);
}

const draw = at("#draw form");
onSubmit(draw, async (words) => showAll(at("#draw .images"), await ask("draw", words)));
at("#next").addEventListener("click", () => {
  const seed = draw.elements.seed;
  if (/^\d+$/.test(seed.value)) seed.value = BigInt(seed.value) + 1n; // a seed may be beyond JavaScript's numbers
  draw.requestSubmit();
});

let frames = [];
const place = at("#place"), showFrame = () => show(at("#frame"), frames[place.value], 256);
onSubmit(at("#walk form"), async (words) => {
  frames = await ask("walk", words);
  Object.assign(place, {max: frames.length - 1, value: 0});
  at("#frames").hidden = false;
  showFrame();
});
place.addEventListener("input", showFrame);
at("#frame").addEventListener("click", () => take(frames[place.value]));

const edit = at("#edit form"), way = edit.elements.way;
const choose = (name) => {
  way.value = name;
  edit.elements.upscale.closest("label").hidden = name !== "upscale";
};
way.addEventListener("change", () => choose(way.value));
onSubmit(edit, async (words) => {
  const body = await new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
  showAll(at("#edit .images"), await ask("edit", words, body));
});

const translate = at("#translate form");
let input;
onSubmit(translate, async (words) => {
  if (!input) throw Error("choose a file first");
  showAll(at("#translate .images"), await ask("translate", words, input));
});

// ---- painting ----

function clear() {
  pen.globalCompositeOperation = "source-over";
  pen.fillStyle = "black";
  pen.fillRect(0, 0, model.size, model.size);
}

function placeOf(event) {
  const scale = model.size / canvas.clientWidth;
  return [event.offsetX * scale, event.offsetY * scale];
}

function stroke(from, to) {
  const isPaint = at("[name=tool]:checked").value === "paint", colour = at("#colour");
  pen.globalCompositeOperation = isPaint ? "source-over" : "destination-out";
  pen.strokeStyle = colour.type === "color" ? colour.value : `rgb(${colour.value} ${colour.value} ${colour.value})`;
  pen.lineCap = "round";
  pen.lineWidth = Math.max(1, (model.size * at("#width").value) / 400);
  pen.beginPath();
  pen.moveTo(...from);
  pen.lineTo(...to);
  pen.stroke();
}

let last;
canvas.addEventListener("pointerdown", (event) => {
  canvas.setPointerCapture(event.pointerId);
  last = placeOf(event);
  stroke(last, last);
});
canvas.addEventListener("pointermove", (event) => {
  if (!event.buttons) return;
  const now = placeOf(event);
  stroke(last, now);
  last = now;
});
all("[name=tool]").forEach((tool) => tool.addEventListener("change", () => choose(tool.value === "rub" ? "mask" : "stroke")));
at("#clear").addEventListener("click", clear);

function upload(file) {
  run(async () => {
    if (file.size > model.max_bytes) throw Error(`the file is larger than ${model.max_bytes / 2 ** 20} MB`);
    if (!model.translates) return take((await ask("prepare", {}, file))[0]);
    input = file;
    showAll(at("#translate .images"), await ask("translate", Object.fromEntries(new FormData(translate)), file));
  });
}

for (const chooser of [at("#file"), at("#input")]) chooser.addEventListener("change", ({target}) => {
  if (target.files.length) upload(target.files[0]);
  target.value = ""; // so that the same file can be chosen again
});
document.addEventListener("dragover", (event) => event.preventDefault());
document.addEventListener("drop", (event) => {
  event.preventDefault();
  if (event.dataTransfer.files.length) upload(event.dataTransfer.files[0]);
});

// ---- what this model can do ----

at("#name").textContent = document.title = model.name;
const add = (list, value, words = value) => list.append(new Option(words, value));
for (const list of all(".label")) for (let label = 0; label < model.classes; label++) add(list, label);
for (let step = 1; step <= model.steps; step++) add(edit.elements.start, step);
model.factors.forEach((factor) => add(edit.elements.upscale, factor, `${factor} x ${factor}`));
if (model.classes) at("[name=classes]").value = [0, 1, 2].map((label) => label % model.classes);
for (const [name, most] of Object.entries(model.most)) all(`[name=${name}]`).forEach((field) => (field.max = most));
const isMissing = {class: !model.classes, classes: !model.classes, upscale: true};
all("form [name]").filter((field) => isMissing[field.name]).forEach((field) => (field.closest("label").hidden = true));
if (model.channels === 1) {
  at("[value=colorize]").remove();
  Object.assign(at("#colour"), {type: "range", min: 0, max: 255, value: 255});
}
if (!model.factors.length) at("option[value=upscale]").remove();
if (model.steps === 1) all("[value=stroke], [value=variations]").forEach((option) => option.remove());
Object.assign(canvas, {width: model.size, height: model.size});
canvas.style.width = `${shownSize(320)}px`;
clear();
choose(way.value);
for (const tab of all("nav button")) tab.hidden = model.translates !== (tab.textContent === "Translate");
open(at(model.translates ? "#translate" : "#draw"));
if (!model.translates) draw.requestSubmit();
