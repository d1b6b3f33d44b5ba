"""Asks the advisory services whether a release in constraints.txt has a known hole: ``make audit``.

Exit 1 for a hole that is known. Where pip-audit or the services can't be reached, that is said, and it is no failure:
what can't be asked was not answered.

    python .ci/audit.py PYTHON      an environment of its own, in which pip-audit is installed on first use
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TOOL = "pip-audit>=2.10"


def skipped(why: str) -> int:
    print(f"audit: skipped, nothing in constraints.txt was asked about ({why})")
    return 0


def last_line(text: str) -> str:
    return next((line.strip()[:200] for line in reversed(text.splitlines()) if line.strip()), "no reason given")


def main(python: str) -> int:
    install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", TOOL]
    installed = subprocess.run(install, capture_output=True, text=True, check=False)
    if installed.returncode:
        return skipped(f"{TOOL} can't be installed: {last_line(installed.stderr)}")
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        pinned = ["--requirement", str(ROOT / "constraints.txt"), "--no-deps", "--disable-pip"]
        options = ["--format", "json", "--output", str(answer), "--progress-spinner", "off", "--timeout", "20"]
        command = [python, "-m", "pip_audit", *pinned, *options]
        try:
            asked = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
        except subprocess.TimeoutExpired:
            return skipped("the services did not answer within 300 s")
        if not answer.exists() or not answer.read_text(encoding="utf-8").strip():
            return skipped(last_line(asked.stderr))
        packages = json.loads(answer.read_text(encoding="utf-8"))["dependencies"]
    unknown = [one["name"] for one in packages if "skip_reason" in one]
    if len(unknown) == len(packages):
        return skipped("the package index answers no question about advisories")
    holes = [(one, hole) for one in packages for hole in one.get("vulns", ())]
    print(f"audit: {len(packages) - len(unknown)} releases asked about, {len(holes)} known holes")
    if unknown:
        print(f"audit: the services do not know {len(unknown)} of them: {', '.join(unknown[:9])} ...")
    for one, hole in holes:
        mended = ", ".join(hole["fix_versions"]) or "no release yet"
        print(f"  {one['name']} {one['version']}: {hole['id']}, mended in {mended}; raise it in constraints.txt")
    return 1 if holes else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
