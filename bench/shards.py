"""A million tiny images in tar shards: is memory flat over an epoch, how fast are they read, and are the broken ones
counted?

    python bench/shards.py [--check]                       1,000,000 images in 100 shards (2 GB, written to --folder and
    kept) python bench/shards.py --images 20000 --shards 4       a small one
    python bench/shards.py --compare-decoders              processes against threads, decoding the JPEG files of
    $RAREFY_DATA

Of each 10,000 images one has bytes that are no image, and one a label that is none. Memory is what this process and its
workers hold of their own (proportional set size without files), read every twenty batches; the highest in the first
tenth of the epoch stands against the highest in all of it. Resuming is timed at the epoch's middle.

``--check`` exits 1 where memory grows by more than 5 %, where a broken member is not counted and named, where
``strict`` is no error, or where resuming gives other bytes.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import io
import json
import sys
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import real_data
from rarefy.cli.terminal import show_table, size_text
from rarefy.errors import DataError
from rarefy.tasks.classification import Classification

SIDE, KINDS, EVERY, CLASSES = 8, 256, 10_000, 10
GROWTH = 1.05


def write(folder: Path, images: int, shards: int) -> None:
    """The shards, unless they are there."""
    done = folder / f"done-{images}-{shards}"
    if done.exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob("*.tar"):
        left.unlink()
    draw = np.random.default_rng(0)
    pictures = []
    for _ in range(KINDS):
        stream = io.BytesIO()
        Image.fromarray(draw.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)).save(stream, "PNG")
        pictures.append(stream.getvalue())
    blocks = [
        np.stack([member("00000000.png", one) for one in (*pictures, b"no image" * 20)]),
        np.stack([member("00000000.cls", one) for one in (*(b"%d" % kind for kind in range(CLASSES)), b"cat")]),
    ]
    bounds = np.linspace(0, images, shards + 1).astype(int)
    for shard, (first, last) in enumerate(zip(bounds[:-1].tolist(), bounds[1:].tolist())):
        index = np.arange(first, last)
        kinds = (
            np.where(index % EVERY == 17, KINDS, index % KINDS),
            np.where(index % EVERY == 23, CLASSES, index % CLASSES),
        )
        made = np.stack([block[kind] for block, kind in zip(blocks, kinds)], 1)  # (images, 2, bytes)
        made[:, :, :8] += (index[:, None] // 10 ** np.arange(7, -1, -1) % 10).astype(np.uint8)[:, None]
        header = made[:, :, :512]
        header[:, :, 148:156] = ord(" ")
        total = header.sum(2, dtype=np.int64)
        header[:, :, 148:154] = (total[..., None] >> np.arange(15, -1, -3)) % 8 + ord("0")
        header[:, :, 154] = 0
        with open(folder / f"train-{shard:06d}.tar", "wb") as file:
            file.write(made.data)
            file.write(b"\0" * 1024)
    done.touch()


def member(name: str, content: bytes) -> np.ndarray:
    """Header and content, a block each; (1024,) uint8."""
    info = tarfile.TarInfo(name)
    info.size = len(content)
    return np.frombuffer(info.tobuf(tarfile.USTAR_FORMAT) + content.ljust(512, b"\0"), np.uint8)


def memory() -> int:
    """Bytes of this process and its children, shared pages divided among them; without files' pages, as libraries are
    shared with whatever else runs on the machine."""
    processes = ["self", *Path("/proc/self/task").joinpath(str(_main_thread()), "children").read_text().split()]
    total = 0
    for one in processes:
        try:
            lines = Path(f"/proc/{one}/smaps_rollup").read_text().splitlines()
        except OSError:  # it has just ended
            continue
        total += 1024 * sum(int(line.split()[1]) for line in lines if line.startswith(("Pss_Anon:", "Pss_Shmem:")))
    return total


def _main_thread() -> int:
    return int(Path("/proc/self/stat").read_text().split()[0])


def epoch(task: Classification, batch_size: int, start: int, steps: int | None) -> dict[str, Any]:
    """Steps of the first epoch, or all of it: peaks of memory, images a second, a digest of what came."""
    total = task.steps("train", batch_size, augment=True)
    peaks, tenths, digest, seen = [0, 0], [0] * 10, hashlib.sha256(), 0
    begun = time.perf_counter()
    for step, (inputs, targets) in enumerate(
        task.batches("train", batch_size, shuffle_seed=0, augment=True, start=start), start
    ):
        if steps is not None and step >= start + steps:
            break
        if step == start:
            waited = time.perf_counter() - begun
        seen += len(inputs)
        digest.update(targets.numpy().tobytes() + inputs.mean((1, 2, 3)).numpy().tobytes())
        if step % 20 == 19:
            now = memory()
            tenths[10 * step // total] = max(tenths[10 * step // total], now)
            peaks = [max(peaks[0], now) if step <= max(20, total // 10) else peaks[0], max(peaks[1], now)]
    spent = time.perf_counter() - begun
    return {
        "images": seen,
        "seconds": spent,
        "first_batch_s": waited,
        "peak_at_10": peaks[0],
        "peak": peaks[1],
        "peak_of_tenths": tenths,
        "digest": digest.hexdigest(),
    }


def decoders(workers: int) -> dict[str, float]:
    """Images a second of the JPEG files of the calibration set, by processes and by threads, taking turns."""
    from rarefy.data.augmentation import Augmentation
    from rarefy.data.decoding import Decoder

    items = real_data.imagenet_calib() * 8
    found: dict[str, list[float]] = {"processes": [], "threads": []}
    for _ in range(3):
        task = Classification(train=items, size=224, workers=workers)
        count = task.length("train") // 32 * 32
        began = time.perf_counter()
        for _ in task.batches("train", 32, shuffle_seed=0, augment=True):
            pass
        found["processes"].append(count / (time.perf_counter() - began))
        decoder = Decoder(
            task.data.source("train"), (3, 224, 224), 0.875, Image.Resampling.BILINEAR, Augmentation(True, None, True)
        )  # type: ignore[arg-type]
        began = time.perf_counter()
        with ThreadPoolExecutor(workers) as pool:
            for batch in torch.arange(count).split(32):
                images = [
                    one.image for one in pool.map(decoder.__getitem__, [(index, (0, 0)) for index in batch.tolist()])
                ]
                task.normalize(torch.stack([one for one in images if one is not None]))
        found["threads"].append(count / (time.perf_counter() - began))
    return {name: sorted(rates)[1] for name, rates in found.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=1_000_000)
    parser.add_argument("--shards", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=Path("out/shards"))
    parser.add_argument("--steps", type=int, help="so many steps of the epoch only")
    parser.add_argument("--compare-decoders", action="store_true")
    parser.add_argument("--check", action="store_true")
    given = parser.parse_args()
    if given.compare_decoders:
        rates = decoders(given.workers)
        show_table(
            "decoding JPEG to 224 pixels", ("by", "images/s"), [(name, f"{rate:.0f}") for name, rate in rates.items()]
        )
        print(json.dumps({"bench": "shards", "workers": given.workers, "decoders": rates}))
        return 0
    begun = time.perf_counter()
    write(given.folder, given.images, given.shards)
    print(f"shards written in {time.perf_counter() - begun:.0f} s", file=sys.stderr, flush=True)
    begun = time.perf_counter()
    task = Classification(
        train=f"tar:{given.folder}",
        size=SIDE,
        class_count=CLASSES,
        mean=0.5,
        std=0.25,
        augment="flip",
        workers=given.workers,
    )
    found = task.length("train")
    indexed = time.perf_counter() - begun
    told = task.unreadable("train")["count"] if task.unreadable("train") else 0
    whole = epoch(task, given.batch_size, 0, given.steps)
    middle = task.steps("train", given.batch_size, augment=True) // 2
    pieces = [epoch(task, given.batch_size, middle, 3), epoch(task, given.batch_size, middle, 3)]
    counted = task.unreadable("train").get("count", 0)
    named = task.unreadable("train").get("first", "")
    try:
        dataclasses.replace(task, strict=True).length("train")
        strict = ""
    except DataError as error:
        strict = str(error)
    wrong_labels = len(range(23, given.images, EVERY))
    wrong_images = len(range(17, given.images, EVERY))
    growth = whole["peak"] / whole["peak_at_10"] if whole["peak_at_10"] else float("nan")
    short = []
    if found + told != given.images or told != wrong_labels:
        short.append(f"{found} images found and {told} left out of {given.images}, {wrong_labels} labels are wrong")
    if given.steps is None and counted != wrong_labels + wrong_images:
        short.append(f"{counted} broken images counted, {wrong_labels + wrong_images} there are")
    if counted and not named:
        short.append("what was left out is not named")
    if told and not strict:
        short.append("strict took broken members without an error")
    if not growth <= GROWTH:
        short.append(f"memory grew {growth:.3f} times over the epoch, more than {GROWTH}")
    if pieces[0]["digest"] != pieces[1]["digest"]:
        short.append("resuming in the middle gave other bytes")
    rows = [
        ("images, shards", f"{found:,} of {given.images:,}, {given.shards}"),
        ("left out, by label and by image", f"{told}, {counted - told}"),
        ("the first of them", named.removeprefix(f"{given.folder}/")),
        ("with strict", strict.partition(": ")[2] or "no error"),
        ("headers walked in, s", f"{indexed:.1f}"),
        ("images/s", f"{whole['images'] / whole['seconds']:,.0f} ({given.workers} workers)"),
        ("highest memory, first tenth", size_text(whole["peak_at_10"])),
        ("highest memory, whole epoch", f"{size_text(whole['peak'])} ({growth:.3f} times)"),
        ("first batch at the epoch's middle, s", f"{pieces[0]['first_batch_s']:.2f}"),
    ]
    show_table("tar shards", ("what", "found"), rows)
    print(
        json.dumps(
            {
                "bench": "shards",
                "options": {name: str(value) for name, value in vars(given).items()},
                "index_s": indexed,
                "left_out": counted,
                "named": named,
                "strict": strict,
                "growth": growth,
                "epoch": whole,
                "resume": pieces[0],
                "torch": torch.__version__,
            }
        )
    )
    for one in short:
        print(f"falls short: {one}", file=sys.stderr)
    return 1 if given.check and short else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except DataError as error:
        print(f"skipped: {error}", file=sys.stderr)
        sys.exit(2)
