"""The pictures of docs/methods/, drawn: python .ci/pictures.py [FOLDER]. The same bytes on every machine.

Bars are figures of docs/measured.md, read from its tables; curves are computed from the formulas beside them; what is
an illustration alone says so in its words. Colours follow the reader's light or dark.
"""

from __future__ import annotations

import math
import re
import statistics
import sys
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path

import torch

from rarefy.quantization.clustering.kmeans import shared_values
from rarefy.tasks.intervals import paired_drop

ROOT = Path(__file__).resolve().parents[1]
STYLE = (
    "text{font:12px sans-serif;fill:#333}.k{stroke:#888;fill:#888}.a{stroke:#1f6fb4;fill:#1f6fb4}"
    ".b{stroke:#d55e00;fill:#d55e00}.n{stroke:#999;fill:#9994}path{fill:none!important;stroke-width:1.5}"
    "@media(prefers-color-scheme:dark){text{fill:#ddd}.a{stroke:#56b4e9;fill:#56b4e9}.b{stroke:#e69f00;fill:#e69f00}}"
)
Points = Sequence[tuple[float, float]]


class Picture:
    """Shapes in the order they are drawn. Classes: a, b (two colours), k (axes), n (pale)."""

    def __init__(self, title: str, height: int, width: int = 640):
        self.size, self.title, self.parts = (width, height), title, list[str]()

    def text(self, x: float, y: float, words: str, anchor: str = "start") -> None:
        self.parts.append(f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>')

    def box(self, x: float, y: float, width: float, height: float, kind: str = "n", words: str = "") -> None:
        self.parts.append(f'<rect class="{kind}" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}"/>')
        if words:
            self.text(x + width / 2, y + height / 2 + 4, words, "middle")

    def dot(self, x: float, y: float, kind: str = "a", radius: float = 4) -> None:
        self.parts.append(f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}"/>')

    def path(self, points: Points, kind: str = "k", dashed: bool = False) -> None:
        way = "M" + " L".join(f"{x:.1f} {y:.1f}" for x, y in points)
        self.parts.append(
            f'<path class="{kind}" d="{way}"{" stroke-dasharray=" + chr(34) + "4 4" + chr(34) if dashed else ""}/>'
        )

    def arrow(self, x: float, y: float, to: float, kind: str = "k") -> None:
        self.path([(x, y), (to, y), (to - 6, y - 4), (to, y), (to - 6, y + 4)], kind)

    def svg(self) -> str:
        width, height = self.size
        head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">'
        return (
            "\n".join((f"{head}<title>{escape(self.title)}</title>", f"<style>{STYLE}</style>", *self.parts, "</svg>"))
            + "\n"
        )


def table(heading: str) -> list[list[str]]:
    """Rows of the first table below a heading of docs/measured.md, without its head."""
    text = (ROOT / "docs" / "measured.md").read_text(encoding="utf-8").split(f"\n## {heading}\n", 1)[1]
    lines = re.search(r"(?:^\|.*\n)+", text, flags=re.MULTILINE)
    assert lines is not None, heading
    rows = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in lines[0].splitlines()]
    return rows[2:]


def bars(title: str, values: Sequence[tuple[str, float]], unit: str, least: float, most: float) -> Picture:
    made = Picture(title, 24 + 20 * len(values))
    place = lambda value: 150 + 400 * (min(max(value, least), most) - least) / (most - least)
    for row, (name, value) in enumerate(values):
        y = 8 + 20 * row
        made.text(142, y + 12, name, "end")
        left, right = sorted((place(0), place(value)))
        made.box(left, y + 2, max(right - left, 1), 12, "a" if value >= 0 else "b")
        made.text(560, y + 12, f"{value:+.2f}{unit}" if least < 0 else f"{value:.2f}{unit}")
    made.path([(place(0), 4), (place(0), 8 + 20 * len(values))])
    return made


def pruning() -> Picture:
    """A residual block: what leaves together."""
    made = Picture("Which slices leave together in a residual block", 200)
    columns = [("stem", "out"), ("conv1", "in"), ("conv1", "out"), ("conv2", "in"), ("conv2", "out"), ("head", "in")]
    for column, (layer, side) in enumerate(columns):
        x, inner = 40 + 100 * column, column in (2, 3)
        made.text(x + 15, 18, layer, "middle")
        made.text(x + 15, 32, side, "middle")
        for row in range(6):
            leaves = row == (1 if inner else 4)
            made.box(x, 40 + 17 * row, 30, 14, ("a" if inner else "b") if leaves else "n")
    for column in (2, 4):  # between in and out of one layer
        made.arrow(40 + 100 * column - 62, 92, 40 + 100 * column - 8)
    made.path([(55, 146), (55, 162), (455, 162), (455, 146)])
    made.text(255, 157, "shortcut: added channel by channel", "middle")
    made.text(
        40, 188, "orange: one class, four tensors in three layers and a shortcut; blue: one that only two layers know"
    )
    return made


def distillation() -> Picture:
    rows = [(row[0].strip("`"), float(row[3])) for row in table("Distillation losses")]
    return bars("Points over no teacher, by loss", rows, "", -4, 4)


def calibration() -> Picture:
    """Expected squared error of 4-bit codes of |x|, x normal, with one value in 10,000 at 8, by the range's end."""
    made = Picture("Error of rounding and of clipping, by the end of the range", 230)
    density = lambda x: math.sqrt(2 / math.pi) * math.exp(-x * x / 2)
    steps = [0.01 * index for index in range(801)]

    def errors(end: float) -> tuple[float, float]:
        clipped = sum(density(x) * (x - end) ** 2 * 0.01 for x in steps if x > end) + 1e-4 * (8 - end) ** 2
        return (end / 15) ** 2 / 12, clipped

    ends = [1.5 + 0.05 * index for index in range(131)]
    found = [(end, *errors(end)) for end in ends]
    x, y = (lambda end: 60 + 520 * (end - 1.5) / 6.5), (lambda error: 190 - 160 * min(error, 0.024) / 0.024)
    made.path([(60, 20), (60, 190), (590, 190)])
    made.path([(x(end), y(rounding)) for end, rounding, _ in found], "k", True)
    made.path([(x(end), y(clipping)) for end, _, clipping in found if clipping < 0.024], "b", True)
    made.path(
        [(x(end), y(rounding + clipping)) for end, rounding, clipping in found if rounding + clipping < 0.024], "a"
    )
    best = min(found, key=lambda one: one[1] + one[2])
    made.dot(x(best[0]), y(best[1] + best[2]))
    made.text(x(best[0]), y(best[1] + best[2]) + 20, f"mse: {best[0]:.2f}", "middle")
    made.dot(x(8), y(found[-1][1]), "b")
    made.text(x(8) - 6, y(found[-1][1]) - 10, "min-max: 8", "end")
    made.text(330, 208, "end of the range", "middle")
    made.text(60, 225, "dashed: rounding (rises), clipping (falls); 4 bits, |x| of a normal x, one in 10,000 at 8")
    return made


def equalisation() -> Picture:
    made = Picture("Ranges of a value's channels, before and after", 190)
    ranges = (0.4, 6.0, 1.1, 0.7, 2.0, 0.3, 4.4, 0.9)
    evened = [value / math.sqrt(value / 2) for value in ranges]  # s = sqrt(|x| / |W|), |W| = 2
    for side, values, words in (
        (0, ranges, "before: one step for all"),
        (1, evened, "after: channel c / s, weights * s"),
    ):
        left, step = 50 + 310 * side, max(values) / 15
        made.text(left, 20, words)
        for row, value in enumerate(values):
            made.box(left, 30 + 16 * row, 240 * value / 6, 12, "a" if value / step >= 4 else "b")
            made.text(left + 240 * value / 6 + 6, 40 + 16 * row, f"{value / step:.0f} codes")
    made.text(50, 180, "an illustration: 8 channels, 4 bits; orange channels have fewer than 4 codes")
    return made


def rounding() -> Picture:
    found, setting = list[tuple[str, float]](), ""
    for row in table("Few bits"):
        setting = row[0] or setting
        if setting == "W2A8":
            found.append((row[1], float(row[3].split()[0])))
    return bars("ResNet-56 with 2-bit weights, by rounding", found, " %", 0, 100)


def stochastic() -> Picture:
    made = Picture("Nearest and stochastic rounding", 230)
    x, y = (lambda value: 60 + 130 * value), (lambda value: 190 - 42 * value)
    made.path([(60, 15), (60, 190), (600, 190)])
    for code in range(5):
        made.text(x(code), 206, str(code), "middle")
        made.text(50, y(code) + 4, str(code), "end")
    stairs = [(0.0, 0.0)]
    for code in range(4):
        stairs += [(code + 0.5, code), (code + 0.5, code + 1)]
    made.path([(x(a), y(b)) for a, b in [*stairs, (4.0, 4.0)]], "b")
    for index in range(1, 40):
        value = index / 10
        made.dot(x(value), y(math.floor(value + (index * 0.6180339887) % 1)), "n", 3)
    made.path([(x(0), y(0)), (x(4), y(4))], "a")
    made.text(60, 225, "orange: nearest; dots: floor(w / s + u); blue: their mean, which is w / s itself")
    return made


def low_bits() -> Picture:
    """Codes 1 2 3 4 of three bits in two bytes, as docs/format.md has them."""
    made = Picture("Four codes of 3 bits in two bytes", 130)
    codes, width = (1, 2, 3, 4), 34
    bits = [(code >> place & 1, index) for index, code in enumerate(codes) for place in range(3)]
    for place in range(16):
        bit, index = bits[place] if place < len(bits) else (0, -1)
        made.box(40 + width * place, 40, width - 4, 26, "n")
        made.text(40 + width * place + 15, 57, str(bit), "middle")
        if index >= 0 and place % 3 == 1:
            made.text(40 + width * place + 15, 30, f"code {codes[index]}", "middle")
    stream = sum(bit << place for place, (bit, _) in enumerate(bits))
    for byte in range(2):
        left = 40 + width * 8 * byte
        made.path([(left, 74), (left, 80), (left + 8 * width - 4, 80), (left + 8 * width - 4, 74)], "a")
        made.text(left + 4 * width, 98, f"byte {byte}: 0x{stream >> 8 * byte & 255:02x}", "middle")
    made.text(40, 122, "lowest bit first; what is left of the last byte is zero")
    return made


def clustering() -> Picture:
    """A bell of weights, the eight values that k-means gives it, and eight at equal distances."""
    bell = statistics.NormalDist()
    weights = torch.tensor([bell.inv_cdf((place + 0.5) / 4000) for place in range(4000)])
    made = Picture("Eight values for a bell of weights", 190)
    x = lambda weight: 320 + 80 * weight
    made.path([(x(step / 20), 110 - 240 * bell.pdf(step / 20)) for step in range(-70, 71)])
    made.path([(30, 110), (610, 110)])
    edge = float(weights.max())
    for values, y, kind in (
        (shared_values(weights, 8).tolist(), 130, "a"),
        ([edge * (2 * place / 7 - 1) for place in range(8)], 155, "b"),
    ):
        for value in values:
            made.path([(x(value), y - 8), (x(value), y + 8)], kind)
            made.dot(x(value), y, kind)
    made.text(
        30, 182, "blue: k-means, where the weights are; orange: equal distances, as a scale and whole numbers have them"
    )
    return made


def search() -> Picture:
    made = Picture("A front: what no other model beats", 230)
    points = [
        (1.4, 88.1),
        (1.9, 91.0),
        (2.2, 89.2),
        (2.6, 92.6),
        (3.1, 91.4),
        (3.3, 93.3),
        (4.1, 92.2),
        (4.6, 93.8),
        (5.4, 93.5),
    ]
    x, y = (lambda cost: 60 + 100 * (cost - 1)), (lambda score: 190 - 26 * (score - 87.5))
    made.path([(60, 15), (60, 190), (600, 190)])
    best, stairs = -math.inf, list[tuple[float, float]]()
    for cost, score in points:
        if score > best:
            stairs += ([(x(cost), y(best))] if stairs else []) + [(x(cost), y(score))]
        made.path([(x(cost), y(score) - 12), (x(cost), y(score) + 12)], "a" if score > best else "k")
        made.dot(x(cost), y(score), "a" if score > best else "n")
        best = max(best, score)
    made.path([*stairs, (600.0, y(best))], "a")
    made.text(330, 208, "latency", "middle")
    made.text(66, 24, "accuracy")
    made.text(60, 225, "an illustration, no measurement: the front in blue, what is beaten in grey, intervals upright")
    return made


def signing() -> Picture:
    made = Picture("What a signature covers", 150)
    for row, name in enumerate(("graph.json", "weights.safetensors", "model.onnx", "report.html")):
        made.box(20, 12 + 30 * row, 150, 24, "n", name)
        made.arrow(174, 24 + 30 * row, 226)
    made.text(200, 144, "sha256", "middle")
    made.box(230, 12, 150, 114, "n", "list of all files")
    made.arrow(384, 69, 436)
    made.text(410, 60, "key", "middle")
    made.box(440, 48, 170, 42, "n", "model.sig")
    made.text(440, 112, "one byte, file or link more")
    made.text(440, 128, "or less: refused")
    return made


def verdict() -> Picture:
    """Three paired comparisons of 1,000 images against a goal of half a point."""
    made = Picture("Met, not shown, missed", 170)
    x = lambda points: 200 + 100 * (points + 1)
    made.path([(x(0.5), 10), (x(0.5), 130)], "b", True)
    made.text(x(0.5), 145, "asked: at most 0.5", "middle")
    for row, (words, lost, gained, samples) in enumerate(
        (("met", 30, 40, 10_000), ("not shown", 6, 3, 1_000), ("missed", 180, 60, 10_000))
    ):
        drop, (low, high) = paired_drop(lost, gained, samples)
        y = 30 + 40 * row
        made.text(20, y + 4, f"{words}, {samples:,} images")
        made.path([(x(100 * low), y), (x(100 * high), y)], "a")
        made.dot(x(100 * drop), y)
        made.text(640, y + 4, f"{100 * drop:.2f} ({100 * low:.2f} to {100 * high:.2f})", "end")
    made.text(20, 164, "drop in points with its 95 % interval")
    return made


PICTURES: dict[str, Callable[[], Picture]] = {
    "pruning": pruning, "distillation": distillation, "calibration": calibration, "equalisation": equalisation,
    "rounding": rounding, "stochastic": stochastic, "packing": low_bits, "clustering": clustering, "search": search, "signing": signing,
    "verdict": verdict,
}  # fmt: skip


def main(folder: Path) -> None:
    for name, draw in PICTURES.items():
        (folder / f"{name}.svg").write_text(draw().svg(), encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs" / "methods")
