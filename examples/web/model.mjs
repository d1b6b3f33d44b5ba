// An exported file, a picture as it takes it, and its answer: what predict.py does. No DOM: the browser and node share it.

const text = new TextDecoder();

// What the file says of itself: the JSON under "rarefy" in an ONNX file's metadata_props (field 14 of ModelProto).
export function description(bytes) {
  for (const { field, data } of fields(bytes)) {
    if (field !== 14) continue;
    const entry = Object.fromEntries([...fields(data)].map((one) => [one.field, text.decode(one.data)]));
    if (entry[1] === "rarefy") return JSON.parse(entry[2]);
  }
  throw new Error("the file does not say how it is fed; export it with rarefy");
}

// Fields of a protobuf message that hold bytes; others are passed over.
function* fields(bytes) {
  let at = 0;
  const varint = () => {
    let value = 0;
    for (let shift = 1; at < bytes.length; shift *= 128) {
      const byte = bytes[at++];
      value += (byte & 127) * shift;
      if (byte < 128) return value;
    }
    throw new Error("not a whole ONNX file");
  };
  while (at < bytes.length) {
    const key = varint(), kind = key & 7;
    if (kind === 0) varint();
    else if (kind === 1) at += 8;
    else if (kind === 5) at += 4;
    else if (kind === 2) {
      const size = varint();
      if (at + size > bytes.length) throw new Error("not a whole ONNX file");
      yield { field: Math.floor(key / 8), data: bytes.subarray(at, at + size) };
      at += size;
    } else throw new Error("not an ONNX file");
  }
}

const even = (x) => (Math.abs(x % 1) === 0.5 ? 2 * Math.round(x / 2) : Math.round(x)); // halves to even, as Python has it
const clamp = (x, low, high) => Math.min(Math.max(x, low), high);

// {width, height, data: RGBA bytes} -> {width, height, channels, data: floats from 0 to 255}
function plain(image, channels) {
  const data = new Float32Array(image.width * image.height * channels);
  for (let i = 0, from = image.data; i < image.width * image.height; ++i)
    if (channels === 1) data[i] = (from[4 * i] * 19595 + from[4 * i + 1] * 38470 + from[4 * i + 2] * 7471 + 32768) >> 16;
    else for (let c = 0; c < 3; ++c) data[3 * i + c] = from[4 * i + c];
  return { width: image.width, height: image.height, channels, data };
}

// Along one axis, as Pillow does it (weights of 22 bits, a whole number after each axis); two: the two neighbours alone.
function along(from, size, across, how, two) {
  const own = across ? from.width : from.height;
  if (own === size) return from;
  const to = { ...from, [across ? "width" : "height"]: size };
  to.data = new Float32Array(to.width * to.height * to.channels);
  const step = own / size, spread = Math.max(step, 1), reach = (how === "bicubic" ? 2 : 1) * spread;
  const weight = (x) => {
    x = Math.abs(x);
    if (how !== "bicubic") return Math.max(0, 1 - x);
    return x < 1 ? (1.5 * x - 2.5) * x * x + 1 : x < 2 ? ((-0.5 * x + 2.5) * x - 4) * x + 2 : 0;
  };
  for (let place = 0; place < size; ++place) {
    const centre = (place + 0.5) * step, low = clamp(centre - 0.5, 0, own - 1);
    let first = Math.max(0, Math.trunc(centre - reach + 0.5)), last = Math.min(own, Math.trunc(centre + reach + 0.5));
    if (two) [first, last] = [Math.floor(low), Math.min(Math.floor(low) + 2, own)];
    if (how === "nearest") [first, last] = [Math.min(Math.floor(centre), own - 1), Math.min(Math.floor(centre), own - 1) + 1];
    const share = [];
    for (let i = first; i < last; ++i)
      share.push(how === "nearest" ? 1 : two ? 1 - Math.abs(low - i) : weight((i - centre + 0.5) / spread));
    const sum = share.reduce((a, b) => a + b, 0);
    const whole = two ? share : share.map((one) => Math.sign(one) * Math.round(Math.abs(one / sum) * 2 ** 22));
    for (let line = 0; line < (across ? from.height : from.width); ++line)
      for (let c = 0; c < from.channels; ++c) {
        let total = 0;
        for (let i = first; i < last; ++i)
          total += whole[i - first] * from.data[((across ? line : i) * from.width + (across ? i : line)) * from.channels + c];
        to.data[((across ? line : place) * to.width + (across ? place : line)) * to.channels + c] =
          two ? total : clamp(Math.floor((total + 2 ** 21) / 2 ** 22), 0, 255);
      }
  }
  return to;
}

function resized(from, width, height, how, two = false) {
  if (!two) return along(along(from, width, true, how, two), height, false, how, two);
  const to = along(along(from, height, false, how, two), width, true, how, two);
  return { ...to, data: to.data.map((one) => clamp(even(one), 0, 255)) };
}

function moved(from, width, height, left, top, fill = [0, 0, 0]) {
  const data = new Float32Array(width * height * from.channels);
  for (let y = 0; y < height; ++y)
    for (let x = 0; x < width; ++x)
      for (let c = 0; c < from.channels; ++c) {
        const row = y + top, column = x + left;
        const inside = row >= 0 && row < from.height && column >= 0 && column < from.width;
        data[(y * width + x) * from.channels + c] = inside ? from.data[(row * from.width + column) * from.channels + c] : fill[c];
      }
  return { width, height, channels: from.channels, data };
}

// (1, C, H, W) of a classifier, as it was judged on.
function prepared(image, about) {
  const [height, width] = about.size, channels = about.channels === "L" ? 1 : 3, crop = about.crop;
  let picture = plain(image, channels), [wide, high] = [width, height];
  if (crop !== null && (crop < 1 || picture.width !== width || picture.height !== height)) {
    const least = Math.min(picture.width, picture.height), side = Math.max(even(Math.max(height, width) / crop), height, width);
    [wide, high] = [picture.width, picture.height].map((one) => (one === least ? side : Math.trunc((side * one) / least)));
  }
  picture = resized(picture, wide, high, about.interpolation);
  picture = moved(picture, width, height, even((wide - width) / 2), even((high - height) / 2));
  const data = new Float32Array(picture.data.length);
  for (let c = 0; c < channels; ++c)
    for (let i = 0; i < height * width; ++i)
      data[c * height * width + i] = (Math.fround(picture.data[i * channels + c] / 255) - about.mean[c]) / about.std[c];
  return { data, dims: [1, channels, height, width] };
}

// (1, H, W, 3) of a detector, and how its boxes become the picture's: minus (left, top), over (across, down).
function placed(image, feed) {
  const from = plain(image, 3), [height, width] = feed.size, two = !feed.antialias;
  if (feed.resize === "stretch")
    return { picture: resized(from, width, height, "bilinear", two), left: 0, top: 0, across: width / from.width, down: height / from.height };
  const ratio = Math.min(height / from.height, width / from.width);
  const scaled = (own) => Math.max(1, feed.centred ? even(own * ratio) : Math.trunc(own * ratio));
  const [wide, high] = [scaled(from.width), scaled(from.height)];
  const [left, top] = feed.centred ? [even((width - wide) / 2 - 0.1), even((height - high) / 2 - 0.1)] : [0, 0];
  const fill = [0, 1, 2].map((c) => even(Array.isArray(feed.fill) ? feed.fill[c] : feed.fill));
  const picture = moved(resized(from, wide, high, "bilinear", two), width, height, -left, -top, fill);
  return { picture, left, top, across: ratio, down: ratio };
}

export class Model {
  // ort: onnxruntime-web. bytes: of an ONNX file that rarefy exported.
  static async open(ort, bytes) {
    const model = new Model();
    [model.ort, model.about] = [ort, description(bytes)];
    model.session = await ort.InferenceSession.create(bytes, { executionProviders: ["wasm"] });
    return model;
  }

  name(place) {
    return this.about.class_names?.[place] ?? String(place);
  }

  // image: {width, height, data: RGBA bytes} -> [{name, score, box: [left, top, right, bottom] or null}], the best first
  async answer(image, least = 0.3) {
    const { about } = this, at = about.feed && placed(image, about.feed);
    const { data, dims } = at
      ? { data: Uint8Array.from(at.picture.data), dims: [1, at.picture.height, at.picture.width, 3] }
      : prepared(image, about.preprocessing);
    const input = new this.ort.Tensor(at ? "uint8" : "float32", data, dims);
    const begin = performance.now();
    const outputs = await this.session.run({ [about.inputs[0].name]: input }, [about.answer]);
    this.milliseconds = performance.now() - begin;
    let numbers = Array.from(outputs[about.answer].data);
    if (at) {
      const boxes = [];
      for (let i = 0; i < numbers.length; i += 6) {
        const [left, top, right, bottom, kind, score] = numbers.slice(i, i + 6);
        if (kind < 0 || score < least) continue;
        const box = [(left - at.left) / at.across, (top - at.top) / at.down, (right - at.left) / at.across, (bottom - at.top) / at.down];
        boxes.push({ name: about.class_names ? this.name(kind) : `class ${kind}`, score, box });
      }
      return boxes;
    }
    if (numbers.length === 1 && about.class_names?.length === 2) // one number for two classes
      numbers = [about.answer_ends_in === "sigmoid" ? 1 - numbers[0] : 0, numbers[0]];
    const order = numbers.map((score, place) => ({ name: this.name(place), score, box: null }));
    return order.sort((a, b) => b.score - a.score).slice(0, 5);
  }
}

// What predict.py prints of a picture.
export function lines(answer) {
  if (answer.some((one) => one.box))
    return answer.map((one) => `${one.name} ${one.score.toFixed(4)} at ${one.box.map((x) => x.toFixed(1)).join(", ")}`);
  return answer.length ? [answer.map((one) => `${one.name} ${one.score.toFixed(4)}`).join(", ")] : [];
}
