import * as ort from "./node_modules/onnxruntime-web/dist/ort.wasm.bundle.min.mjs";
import { Model, lines } from "./model.mjs";

ort.env.wasm.wasmPaths = new URL("./node_modules/onnxruntime-web/dist/", import.meta.url).href;
ort.env.wasm.numThreads = 1; // more need headers that a plain server does not send
const RUNS = 5;
const models = {}, opening = {}; // by the name of their input
const find = (id) => document.getElementById(id);
const say = (words) => (find("status").textContent = words);

async function open(name, file) {
  say(`opening ${file.name} ...`);
  models[name] = await Model.open(ort, new Uint8Array(await file.arrayBuffer()));
  models[name].title = `${name}: ${file.name}, ${(file.size / 1000).toFixed(0)} kB`;
  say("");
}

async function pixels(file) {
  const options = { colorSpaceConversion: "none", premultiplyAlpha: "none", imageOrientation: "none" };
  const bitmap = await createImageBitmap(file, options);
  const canvas = new OffscreenCanvas(bitmap.width, bitmap.height);
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(bitmap, 0, 0);
  return { image: context.getImageData(0, 0, bitmap.width, bitmap.height), bitmap };
}

async function show(file) {
  await Promise.all(Object.values(opening));
  if (!Object.keys(models).length) throw new Error("choose an ONNX file first");
  const { image, bitmap } = await pixels(file);
  const sections = [];
  for (const name of ["original", "compressed"].filter((one) => models[one])) {
    const model = models[name], times = [];
    let answer;
    for (let run = 0; run <= RUNS; ++run) {
      answer = await model.answer(image);
      if (run) times.push(model.milliseconds); // the first run warms up
    }
    const middle = times.sort((a, b) => a - b)[RUNS >> 1];
    sections.push(section(`${model.title}, ${middle.toFixed(1)} ms`, file, bitmap, answer));
  }
  find("answers").replaceChildren(...sections);
}

function section(title, file, bitmap, answer) {
  const made = document.createElement("section"), head = document.createElement("h2"), list = document.createElement("ol");
  const canvas = document.createElement("canvas"), context = canvas.getContext("2d");
  [canvas.width, canvas.height] = [bitmap.width, bitmap.height];
  context.drawImage(bitmap, 0, 0);
  context.lineWidth = Math.max(1, bitmap.width / 200);
  context.strokeStyle = "#e0218a";
  for (const { box } of answer.filter((one) => one.box)) context.strokeRect(box[0], box[1], box[2] - box[0], box[3] - box[1]);
  head.textContent = title;
  for (const line of answer.some((one) => one.box) ? lines(answer) : answer.map((one) => `${one.name} ${one.score.toFixed(4)}`)) {
    const item = document.createElement("li");
    item.textContent = line;
    list.append(item);
  }
  made.dataset.said = JSON.stringify(lines(answer));
  made.dataset.picture = file.name;
  made.append(head, canvas, list);
  return made;
}

const told = (work) => async (event) => {
  try {
    await work(event);
  } catch (error) {
    say(`${error.message ?? error}`.split("\n")[0]);
    find("status").dataset.failed = "yes";
  }
};
for (const name of ["original", "compressed"])
  find(name).addEventListener("change", told((event) => (opening[name] = open(name, event.target.files[0]))));
const all = async (files) => {
  for (const file of files) await show(file);
};
find("picture").addEventListener("change", told((event) => all(event.target.files)));
const drop = find("drop");
drop.addEventListener("dragover", (event) => (event.preventDefault(), drop.classList.add("over")));
drop.addEventListener("dragleave", () => drop.classList.remove("over"));
drop.addEventListener("drop", told((event) => (event.preventDefault(), drop.classList.remove("over"), all(event.dataTransfer.files))));
