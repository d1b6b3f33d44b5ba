"""How long a search would take with 1 to 1,000 workers: a simulation from the seconds of its own trials.

    python bench/search_scale.py FOLDER            of `rarefy compress --search`
    python bench/search_scale.py                   without one: 60 trials of 60 s to 20 min, as an example

Assumptions, none of them measured at these sizes:

* a trial takes as long as one drawn from the measured ones, on any worker;
* a generation is planned once the one before is done, so it waits for its slowest trial; with W workers generations are
  as large as max(trials / 4, W), up to all trials but four generations' worth;
* timing takes ``--timing`` seconds a trial on one machine alone, beside the making of others;
* what is planned, read and written takes no time.
"""

from __future__ import annotations

import argparse
import heapq
import json
import sys

import numpy as np

from rarefy.compression.search.front import read

WORKERS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1000)


def simulated(seconds: np.ndarray, workers: int, generation: int, timing: float) -> float:
    """Seconds until the last trial is timed."""
    now = 0.0
    for begin in range(0, len(seconds), generation):
        free, clock = [now] * workers, now
        made = []
        for one in seconds[begin : begin + generation]:
            done = heapq.heappop(free) + float(one)
            heapq.heappush(free, done)
            made.append(done)
        for done in sorted(made):
            clock = max(clock, done) + timing
        now = clock
    return now


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?")
    parser.add_argument("--trials", type=int, default=1000, help="of the search that is modelled")
    parser.add_argument("--timing", type=float, default=5.0, help="seconds")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    random = np.random.default_rng(asked.seed)
    measured = (
        np.array([one["seconds"] for one in read(asked.folder).points])
        if asked.folder
        else np.exp(random.uniform(np.log(60), np.log(1200), 60))
    )
    seconds = random.choice(measured, asked.trials)
    rows = []
    for workers in WORKERS:
        size = max(12, min(workers, asked.trials // 4))
        took = simulated(seconds, workers, size, asked.timing)
        rows.append(
            {
                "workers": workers,
                "hours": took / 3600,
                "gain": float(seconds.sum() + asked.timing * asked.trials) / took,
            }
        )
    source = f"{len(measured)} trials of {asked.folder}" if asked.folder else "an example, not a measurement"
    print(f"{asked.trials} trials, {seconds.sum() / 3600:.1f} hours of work; from {source}\nworkers    hours     gain")
    for row in rows:
        print(f"{row['workers']:7} {row['hours']:8.2f} {row['gain']:8.1f}")
    print(json.dumps({"trials": asked.trials, "measured": bool(asked.folder), "rows": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
