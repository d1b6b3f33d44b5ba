"""Bytes of saved folders at 8, 4, 3 and 2 bits, beside the zeroth-order entropy of their codes and what other tools
write; and how long they take to load.

    python bench/sizes.py [--only resnet56 --bits 8 4] [--peers] [--loading] [--json FILE] [--check]

Weights alone are rounded (to the nearest code), a scale an output channel. ResNet-56, EfficientNet-Lite0 and
MobileNetV2 have their trained weights (bench/panel_networks.py), ViT-Tiny those it begins with. Entropy is of each
tensor by itself: what the best coder of single codes takes that knows how often each occurs.

--peers: ONNX Runtime's dynamic quantiser at 8 bits, and NNCF's compression of weights at 8 and 4 bits in OpenVINO's
files (in the environment of ``make bench-setup``), as they are and after zstandard at level 19; below 4 bits neither
writes a file. --loading (on Linux): median seconds of ``load`` and the most memory it took, the loaded model among it,
each in a process of its own. --check:
exit 1 where the codes of a smallest folder take more than 1.05 of their entropy or, with --loading, where a fastest
folder loads no faster than the smallest.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import zstandard
from torch import Tensor, fx

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import rarefy
from bench import parity, peers
from rarefy.artifact import weights
from rarefy.artifact.words import STORES
from rarefy.cli.terminal import show_table

MOST = 1.05  # of the entropy
NAMES = ("resnet56", "efficientnet-lite0", "mobilenetv2", "vit-tiny")
LOADS = 5
LOADING = """
import re, sys, time
from pathlib import Path
from rarefy.artifact import folder
folder.load(sys.argv[2])  # imports, and what torch allocates once
status = lambda name: int(re.search(name + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
before = status("VmRSS")
loaded = folder.load(sys.argv[1])
grown = status("VmHWM") - before
times = []
for _ in range(int(sys.argv[3])):
    begun = time.perf_counter()
    folder.load(sys.argv[1])
    times.append(time.perf_counter() - begun)
print(sorted(times)[len(times) // 2], grown)
"""


def entropy_bytes(codes: Tensor) -> float:
    """Of one tensor's codes, by how often each occurs in it."""
    counts = torch.bincount(codes.reshape(-1).to(torch.int64) + 128, minlength=384).double()
    share = counts[counts > 0] / codes.numel()
    return float(-(share * share.log2()).sum()) * codes.numel() / 8


def rounded(graph: fx.GraphModule, bits: int) -> fx.GraphModule:
    return rarefy.quantize(graph, weights=f"int{bits}", activations="float", rounding="nearest", progress=False)


def coded_bytes(quantised: fx.GraphModule) -> tuple[int, int, float]:
    """How many codes there are, what the smallest form takes for all that has symbols in it, tables and all, and the
    entropy of just that; codes that are stored in another way count as what they take."""
    entries, stored = weights.described(quantised, "smallest")
    tensors = {**dict(quantised.named_parameters()), **dict(quantised.named_buffers())}
    codes = [name for name, one in tensors.items() if one.dtype in (torch.int8, torch.uint8) and name in entries]
    symbols = [name for name in entries if entries[name].get("stored") in ("coded", "codebook", "sparse")]
    least = 0.0
    for name in {*codes, *symbols}:
        flat = tensors[name].detach().reshape(-1)
        if name in codes:
            least += entropy_bytes(flat)
        elif entries[name]["stored"] == "codebook":
            least += entropy_bytes(flat.unique(return_inverse=True)[1] - 128)
        else:
            least += entropy_bytes((flat != 0).to(torch.int64))
    beside = sum(
        weights.joined.plain_bytes(entries[name], tensors[name].dtype) for name in codes if name not in symbols
    )
    return sum(tensors[name].numel() for name in codes), stored["coded"].nbytes + beside, least


def folder_bytes(folder: Path) -> int:
    """Of the model: its weights and its graph."""
    return sum((folder / name).stat().st_size for name in ("weights.safetensors", "graph.json"))


def loaded(folder: Path, warm: Path) -> tuple[float, int]:
    """Median seconds of a load, and bytes of memory that the first took at most. warm: a small folder, loaded first."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", LOADING, str(folder), str(warm), str(LOADS)],
        check=True, capture_output=True, text=True, timeout=600, env=environment,
    )  # fmt: skip
    seconds, grown = done.stdout.split()
    return float(seconds), int(grown)


def measured(name: str, graph: fx.GraphModule, bits: int, loading: bool) -> dict[str, object]:
    quantised = rounded(graph, bits)
    count, taken, least = coded_bytes(quantised)
    row: dict[str, object] = {
        "network": name, "bits": bits, "codes": count, "coded_bytes": taken, "entropy_bytes": round(least),
        "ratio": round(taken / least, 4),
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as place:
        warm = Path(place) / "warm"
        rarefy.save(rarefy.capture(torch.nn.Linear(2, 2), (2,)), warm)
        for store in STORES:
            folder = Path(place) / store
            rarefy.save(quantised, folder, store=store)
            row[store] = folder_bytes(folder)
            if loading:
                row[f"{store}_load_s"], row[f"{store}_memory"] = loaded(folder, warm)
    return row


def peer_bytes(graph: fx.GraphModule) -> dict[str, tuple[int, int]]:
    """Bytes of each peer's files, and of the same after zstandard; without those that are not there or refuse."""
    found: dict[str, tuple[int, int]] = {}
    with tempfile.TemporaryDirectory() as place:
        source = Path(place) / "float.onnx"
        rarefy.export(graph, source, runtime="onnxruntime")
        for name, suffix in (("ort-int8", "onnx"), ("nncf-int8", "xml"), ("nncf-int4", "xml")):
            target = Path(place) / f"{name}.{suffix}"
            python = sys.executable if name.startswith("ort") else peers.python()
            if python is None:
                continue
            command = [python, str(Path(__file__).with_name("peers.py")), "weights", name, str(source), str(target)]
            done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=600)
            files = [file for file in (target, target.with_suffix(".bin")) if file.is_file()]
            if done.returncode or not files:
                print(f"{name}: {(done.stderr.strip().splitlines() or ['no file'])[-1][:150]}", file=sys.stderr)
                continue
            data = b"".join(file.read_bytes() for file in files)
            found[name] = len(data), len(zstandard.ZstdCompressor(level=19).compress(data))
    return found


def show(rows: list[dict[str, object]], others: dict[str, dict[str, tuple[int, int]]], loading: bool) -> None:
    number = lambda value: f"{value:,}"
    show_table(
        "bytes",
        ("network", "bits", "codes", "coded", "entropy", "ratio", *STORES),
        [
            (row["network"], row["bits"], *(number(row[key]) for key in ("codes", "coded_bytes", "entropy_bytes")),
             f"{row['ratio']:.4f}", *(number(row[store]) for store in STORES))
            for row in rows
        ],
        tuple(range(1, 9)),
    )  # fmt: skip
    if others:
        listed = [(name, peer, *map(number, pair)) for name, found in others.items() for peer, pair in found.items()]
        show_table("peers", ("network", "file", "bytes", "zstandard"), listed, (2, 3))
    if loading:
        listed = [
            (row["network"], row["bits"], *(f"{1000 * row[f'{one}_load_s']:.0f}" for one in STORES),
             *(f"{row[f'{one}_memory'] / 1e6:.0f}" for one in STORES))
            for row in rows
        ]  # fmt: skip
        heads = (*(f"{one}, ms" for one in STORES), *(f"{one}, MB" for one in STORES))
        show_table("load", ("network", "bits", *heads), listed, tuple(range(1, 8)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=NAMES, default=list(NAMES))
    parser.add_argument("--bits", nargs="+", type=int, default=[8, 4, 3, 2])
    parser.add_argument("--peers", action="store_true")
    parser.add_argument("--loading", action="store_true")
    parser.add_argument("--json", metavar="FILE", type=Path)
    parser.add_argument("--check", action="store_true", help="exit 1 where a goal is missed")
    given = parser.parse_args()
    known = parity.known()
    rows: list[dict[str, object]] = []
    others: dict[str, dict[str, tuple[int, int]]] = {}
    for name in given.only:
        try:
            network = known[name]
            shapes = [array.shape[1:] for array in next(iter(network.inputs("train", 1)))]
            graph = rarefy.capture(network.model(), shapes[0])
        except (OSError, ImportError, rarefy.RarefyError) as error:
            print(f"{name}: skipped: {error}", file=sys.stderr)
            continue
        rows += [measured(name, graph, bits, given.loading) for bits in given.bits]
        if given.peers:
            others[name] = peer_bytes(graph)
    show(rows, others, given.loading)
    found = {"most": MOST, "rows": rows, "peers": others}
    print(json.dumps(found))
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    large = not rows or any(row["ratio"] > MOST for row in rows)
    slow = given.loading and any(row["fastest_load_s"] >= row["smallest_load_s"] for row in rows)
    return int(given.check and (large or slow))


if __name__ == "__main__":
    sys.exit(main())
