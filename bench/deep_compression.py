"""Deep Compression's recipe (Han 2015, 1510.00149) on a ResNet for CIFAR-10 with real weights: prune single weights,
let those that are left share values, train the values, code them by their entropy.

    python bench/deep_compression.py [--depth 20] [--sparsity 0.6 0.8 0.9] [--values 16] [--json FILE] [--check]

The network is its own teacher. After each sparsity, and after the values are shared, it is trained for so many steps on
the training images; nothing is chosen by the test images, on which the saved folder, loaded again, is judged at the
end. Beside it stand the figures of the paper (AlexNet: 240 MB to 6.9, 35 times, no drop) and of SqueezeNet
(1602.07360: 4.8 MB to 0.66 by 8 bits with sparse weights, 7.3 times). --check: exit 1 unless the folder is ``--least``
times smaller than the float weights and top-1 falls by at most ``--drop`` points.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

from torch import fx

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import real_data
from rarefy import capture, cluster, evaluate, load, mask, save
from rarefy.cli.terminal import show_table, size_text
from rarefy.distillation.distill import distill
from rarefy.graph.macs import count_parameters
from rarefy.tasks.classification import Classification

DATA = "bench.real_data:cifar10"
PUBLISHED = (
    ("AlexNet, Deep Compression", 240e6, 6.9e6, 0.0),
    ("VGG-16, Deep Compression", 552e6, 11.3e6, 0.33),
    ("SqueezeNet, 8 bits, Deep Compression", 4.8e6, 0.66e6, 0.0),
    ("SqueezeNet, 6 bits, Deep Compression", 4.8e6, 0.47e6, 0.0),
)


def compressed(graph: fx.GraphModule, task: Classification, given: argparse.Namespace) -> fx.GraphModule:
    """Sparse in rounds, then of few values; each is trained to answer as ``graph`` does."""
    common = {"progress": False, "validate_every": 0, "batch_size": given.batch_size, "seed": given.seed}
    small = graph
    for sparsity in given.sparsity:
        small = distill(
            mask(small, sparsity=sparsity, scope="global"), graph, task, steps=given.steps, lr=given.lr, **common
        )
    small = cluster(small, values=given.values, fold=not given.no_fold)
    return distill(small, graph, task, steps=given.value_steps, lr=given.value_lr, clip=1.0, **common)


def folder_bytes(graph: fx.GraphModule, store: str, folder: Path) -> dict[str, int]:
    """Bytes of each file of the saved folder."""
    save(graph, folder, store=store)
    return {file.name: file.stat().st_size for file in sorted(folder.iterdir())}


def measured(given: argparse.Namespace) -> dict[str, object]:
    """What was asked, bytes of every file, and top-1 on the 10,000 test images, in percent."""
    graph = capture(real_data.resnet_cifar(given.depth), (3, 32, 32))
    task = Classification(train=DATA, val=DATA)
    begun = time.monotonic()
    small = compressed(graph, task, given)
    seconds = time.monotonic() - begun
    with tempfile.TemporaryDirectory() as folder:
        files = folder_bytes(small, "smallest", Path(folder) / "small")
        before = evaluate(graph, task)
        after = evaluate(load(Path(folder) / "small"), task, reference=graph)
    model = files["weights.safetensors"] + files["graph.json"]
    float_bytes = 4 * count_parameters(graph)
    masked, shared = ([one for one in small.meta["history"] if one["step"] == step] for step in ("mask", "cluster"))
    return {
        "depth": given.depth, "sparsity": masked[-1]["facts"]["sparsity"], "values": given.values,
        "bits_a_weight": shared[-1]["facts"]["bits"], "seconds": round(seconds), "files": files, "bytes": model,
        "float_bytes": float_bytes, "ratio": float_bytes / model,
        "weights_ratio": float_bytes / files["weights.safetensors"], "before": 100 * before.value,
        "after": 100 * after.value,
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, default=20, choices=real_data.DEPTHS)
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.6, 0.8, 0.9], help="of each round")
    parser.add_argument("--values", type=int, default=16, help="of a layer")
    parser.add_argument("--no-fold", action="store_true", help="batch norm stays")
    parser.add_argument("--steps", type=int, default=120, help="of each round")
    parser.add_argument("--value-steps", type=int, default=80)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=0.02)
    parser.add_argument("--value-lr", type=float, default=0.005)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--least", type=float, default=30, help="times smaller, for --check")
    parser.add_argument("--drop", type=float, default=2.0, help="points of top-1 at most, for --check")
    parser.add_argument("--json", metavar="FILE", type=Path)
    parser.add_argument("--check", action="store_true")
    given = parser.parse_args()
    row = measured(given)
    rows = [
        (f"ResNet-{row['depth']}, here", row["float_bytes"], row["bytes"], row["before"] - row["after"]),
        *PUBLISHED,
    ]
    show_table(
        f"{row['sparsity']:.0%} zeros, {row['values']} values a layer, {row['bits_a_weight']:.2f} bits a weight",
        ("network", "float", "small", "times", "top-1 drop"),
        [(name, size_text(a), size_text(b), f"{a / b:.1f}", f"{drop:.2f}") for name, a, b, drop in rows],
        (1, 2, 3, 4),
    )
    print(json.dumps(row))
    if given.json:
        given.json.write_text(json.dumps(row, indent=1) + "\n", encoding="utf-8")
    return int(given.check and (row["ratio"] < given.least or row["before"] - row["after"] > given.drop))


if __name__ == "__main__":
    sys.exit(main())
