"""A disk that fills up in the middle of any step, and shared memory of 64 kB: real ones, where mounts are allowed.

What was there is as it was, nothing half written is left, and the line says that the disk is full.
"""

from __future__ import annotations

import functools
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
pytest.importorskip("model_signing", reason="signing needs pip install 'rarefy[sign]'")


@functools.cache
def mounts() -> bool:
    """May this user mount in a namespace of its own?"""
    tried = ("unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", "/mnt")
    return (
        shutil.which("unshare") is not None and subprocess.run(tried, capture_output=True, check=False).returncode == 0
    )


def alone(*command: str) -> subprocess.CompletedProcess[str]:
    """The command in a mount namespace of its own."""
    if not mounts():
        pytest.skip("mounts are not allowed here (unshare -rm)")
    return subprocess.run(["unshare", "-rm", *command], capture_output=True, text=True, check=False, timeout=500)


@pytest.mark.slow
def test_each_step_on_a_full_disk(tmp_path: Path) -> None:
    done = alone(sys.executable, str(HERE / "full_disk.py"), str(tmp_path))
    assert done.returncode == 0, done.stderr[-2000:]
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(found) == 12
    wrong = {one["step"]: one["wrong"] for one in found if one["wrong"]}
    assert not wrong, json.dumps(wrong, indent=1)
    assert all(one["refused"] for one in found), found


SHM = """
import sys, numpy as np, torch
from rarefy.tasks import Classification
images = np.arange(40 * 3 * 64 * 64, dtype=np.uint64).astype(np.uint8).reshape(40, 3, 64, 64)
class Set:
    def __len__(self): return 40
    def __getitem__(self, index): return images[index], index % 3
def seen(workers):
    task = Classification(train=Set(), val=Set(), workers=workers, mean=0.0, std=1.0, augment="none")
    return [one.clone() for split in ("val", "train") for one, _ in task.data.batches(split, 16, shuffle_seed=1)]
for one, other in zip(seen(0), seen(2), strict=True):
    assert torch.equal(one, other)
print("same")
"""


@pytest.mark.slow
def test_little_shared_memory_hangs_nobody() -> None:
    """Workers find 64 kB of /dev/shm, too little for one batch: the same images come, another way."""
    mounted = 'mount -t tmpfs -o size=64k tmpfs /dev/shm && exec "$@"'
    done = alone("sh", "-c", mounted, "sh", sys.executable, "-c", SHM)
    assert done.returncode == 0 and done.stdout == "same\n", done.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.parametrize("size", ["200k", "300k", "400k", "600k", "900k", "2m"])
def test_compress_on_a_small_disk_is_refused_or_whole(size: str, tmp_path: Path) -> None:
    """All of `rarefy compress` with its working folder there; with room again, it goes on from what was done."""
    text = (
        "import json, sys, subprocess\\nfrom pathlib import Path\\nfrom rarefy.cli.main import run\\n"
        "disk = Path(sys.argv[1]); disk.mkdir()\\n"
        "def mount(options): subprocess.run(['mount', '-t', 'tmpfs', '-o', options, 'tmpfs', str(disk)], check=True)\\n"
        "mount(f'size={sys.argv[2]}')\\n"
        "given = ['compress', 'rarefy.demo:model', '--data', 'sklearn:digits', '-o', str(disk / 'small'), '--step',"
        " 'prune macs=0.3', '--step', 'distill epochs=1']\\n"
        "first = run(given)\\n"
        "mount('remount,size=100m')\\n"
        "second = run(given) if first else 0\\n"
        "import rarefy; rarefy.load(disk / 'small')\\n"
        "print(json.dumps([first, second, sorted(path.name for path in disk.iterdir())]))\\n"
    ).replace("\\n", "\n")
    done = alone(sys.executable, "-c", text, str(tmp_path / "disk"), size)
    assert done.returncode == 0, done.stderr[-2000:]
    first, second, left = json.loads(done.stdout.splitlines()[-1])
    assert first in (0, 2) and second == 0 and left == ["small"]
    if first:
        told = [line for line in done.stderr.splitlines() if line.startswith("rarefy: ")]
        assert len(told) == 1 and ("No space left" in told[0] or "disk is full" in told[0]), done.stderr[-2000:]
