// The page's answers, printed as predict.py prints them: node check.mjs node|browser MODEL.onnx PICTURE...
// node: the page's core in node, on PICTURE.rgba (width and height of 4 bytes each, then pixels). browser: the page itself.
import { readFileSync } from "node:fs";
import { basename } from "node:path";
import { Model, lines } from "./model.mjs";

const [where, file, ...pictures] = process.argv.slice(2);
const print = (picture, said) => said.forEach((line) => console.log(`${picture}: ${line}`));

async function inNode() {
  const ort = await import("onnxruntime-web");
  ort.env.wasm.numThreads = 1;
  const model = await Model.open(ort, new Uint8Array(readFileSync(file)));
  for (const picture of pictures) {
    const bytes = readFileSync(`${picture}.rgba`);
    const image = { width: bytes.readUInt32LE(0), height: bytes.readUInt32LE(4), data: bytes.subarray(8) };
    print(picture, lines(await model.answer(image)));
  }
}

async function inBrowser() {
  const { server } = await import("./server.mjs");
  const { default: chromium } = await import("@sparticuz/chromium");
  const { chromium: driver } = await import("playwright-core");
  await new Promise((ready) => server.listen(0, "localhost", ready));
  const browser = await driver.launch({ executablePath: process.env.CHROMIUM || (await chromium.executablePath()), args: chromium.args, headless: true });
  try {
    const page = await browser.newPage();
    page.on("pageerror", (error) => console.error(`page: ${error}`));
    page.on("console", (message) => message.type() === "error" && console.error(`page: ${message.text()}`));
    await page.goto(`http://localhost:${server.address().port}/`);
    for (const name of ["original", "compressed"]) await page.setInputFiles(`#${name}`, file);
    for (const picture of pictures) {
      await page.setInputFiles("#picture", picture);
      await page.waitForFunction(
        ([name, count]) => document.querySelectorAll(`section[data-picture="${name}"]`).length === count || document.getElementById("status").dataset.failed,
        [basename(picture), 2],
      );
      const said = await page.$$eval("section", (all) => all.map((one) => one.dataset.said));
      if (said.length !== 2 || said[0] !== said[1]) throw new Error(await page.textContent("#status"));
      print(picture, JSON.parse(said[0]));
    }
  } finally {
    await browser.close();
    server.close();
  }
}

await (where === "browser" ? inBrowser() : inNode());
