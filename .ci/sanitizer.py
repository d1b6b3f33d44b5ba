"""The kernels' tests under NVIDIA's compute-sanitizer: ``make test-gpu-sanitizer``.

memcheck finds what is read or written outside of its memory, racecheck what threads of a block write to shared memory
at the same time. Exit 1 where one finds something, or a test fails; where there is no GPU or no compute-sanitizer, that
is said, and it is no failure.

    python .ci/sanitizer.py PYTHON [pytest's arguments]      the kernels' tests unless others are named
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TESTS = ("tests/kernels/test_low_bit.py", "tests/kernels/test_observe.py", "tests/kernels/cuda")
TOOLS = ("memcheck", "racecheck")
FOUND = 86  # its exit status where it found something
HAZARD = re.compile(r"Race reported between .* at (\S+?)\+0x")
OTHERS = ("nvjet", "cutlass", "cublas", "cudnn", "sm80_", "sm90_")  # kernels of NVIDIA's libraries, whose barriers of
# the copy engine racecheck does not know


def sanitizer(python: str) -> str | None:
    """compute-sanitizer on the path, of CUDA's toolkit, or of the wheel nvidia-cuda-sanitizer-api."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    packages = subprocess.run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
                              capture_output=True, text=True, check=True).stdout.strip()  # fmt: skip
    places = [Path(home) / "bin", Path(home) / "compute-sanitizer", *Path(packages).glob("nvidia/*/bin")]
    return shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer",
        path=os.pathsep.join(map(str, [*places, *Path(packages).glob("nvidia/*/compute-sanitizer")])),
    )


def run(command: list[str], environment: dict[str, str]) -> tuple[int, set[str]]:
    """Shows what is printed; exit status, and names of kernels in which a race was reported."""
    hazards: set[str] = set()
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            hazards.update(HAZARD.findall(line))
    return process.returncode, hazards


def main(python: str, *arguments: str) -> int:
    tool = sanitizer(python)
    if tool is None:
        print("sanitizer: skipped, compute-sanitizer is not found (it comes with CUDA's toolkit; set CUDA_HOME)")
        return 0
    asked = subprocess.run([python, "-c", "import torch; raise SystemExit(not torch.cuda.is_available())"], check=False)
    if asked.returncode:
        print("sanitizer: skipped, there is no NVIDIA GPU that torch can use")
        return 0
    # Without torch's cache every tensor is memory of its own, so that a step beyond its end is seen.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    worst = 0
    for name in TOOLS:
        command = [tool, "--tool", name, "--error-exitcode", str(FOUND), "--target-processes", "all"]
        command += [python, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *(arguments or TESTS)]
        print(f"sanitizer: {name}", flush=True)
        code, hazards = run(command, environment)
        ours = sorted(one for one in hazards if not one.startswith(OTHERS))
        if code == FOUND and hazards and not ours:
            print(f"sanitizer: {name} found something in kernels of libraries alone: {', '.join(sorted(hazards))}")
            code = 0
        told = "found something" if code == FOUND else "a test failed" if code else "found nothing of ours"
        print(f"sanitizer: {name} {told} {' '.join(ours)}".rstrip(), flush=True)
        worst = worst or int(code != 0)
    return worst


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
