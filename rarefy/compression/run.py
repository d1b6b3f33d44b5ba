"""A run of compress(): what was asked, its working folder, and how a step becomes a candidate in it.

::

    run.json            what the run belongs to: hash of the model, data, budget, recipe, ... (``Run.identity``)
    0-original/         the original, and of each step that was done
    1-prune/            the model (``rarefy.artifact``), the exported file, and what was measured of it, in the manifest
    2-distill.training/ a training's own checkpoint
    3-quantize.failed.json      why a step could not be done: it is not tried again
    final.json          the report's facts, once all is done

Each is put in place by one rename, so a kill at any moment leaves whole steps; the next run reads them, and goes on
behind the last.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, fx

from rarefy import plugins
from rarefy.artifact import folder as folder_
from rarefy.compression.budget import Budget, Step
from rarefy.compression.candidate import RUN, SEAL, Candidate, belongs, digest_of, seal
from rarefy.compression.gates import ORIGINAL
from rarefy.compression.steps import FLOAT_ONLY, QUANTISED, VERBS, Context
from rarefy.data.items import Split
from rarefy.deployment import latency
from rarefy.deployment.runtime import Runtime
from rarefy.errors import CheckFailed, FormatError, InputError
from rarefy.evaluation.evaluate import evaluate
from rarefy.graph import history
from rarefy.kernels import is_quantised
from rarefy.system import strict_json
from rarefy.system.files import LOCK, content, locked, replacing, why
from rarefy.system.logs import Callback, Logger, part
from rarefy.system.progress import say
from rarefy.tasks.task import Task

BATCH = 64  # of evaluation
CLOCKED = ("timing", "seconds")  # facts of a record that depend on a clock
FINAL, FIRST = "final.json", f"0-{ORIGINAL}"


@dataclass(frozen=True)
class Run:
    """What is asked of compress(), checked.

    steps: of the recipe; optional: one that can't be done is left out. runtime: with its threads set.
    corruptions: of the final evaluation. progress: says on stderr what is being done.
    start: a candidate's folder, from whose model the steps begin, and which teaches beside the original; None: they
        begin with the original. timed: is each step's model timed? If not, gates look at the rest, and whoever asks
        times the result (a search, whose trials may run on other machines than the one that counts).
    logs: who is told the numbers of each training, and of each step's model.
    priced: ``prices`` and ``about`` of the report, as the user's file says.
    """

    task: Task
    budget: Budget
    steps: Sequence[Step]
    runtime: Runtime
    seed: int = 0
    device: str | None = None
    corruptions: tuple[str, ...] = ()
    optional: bool = False
    progress: bool = True
    start: Path | None = None
    timed: bool = True
    logs: Sequence[Logger | Callback] = ()
    priced: Mapping[str, object] = field(default_factory=dict)

    @property
    def model_file(self) -> str:
        """Name of the file that the runtime runs, in each folder."""
        return f"model{self.runtime.suffix}"

    def identity(self, original: fx.GraphModule) -> dict[str, object]:
        """What a working folder belongs to, as JSON has it."""
        data, described = self.task.data, self.task.describe()
        splits: tuple[tuple[Split, object], ...] = (("train", data.train), ("val", data.val))
        present = [split for split, images in splits if images is not None]
        identity = {
            "model": folder_.content_of(original).hash,
            "data": {split: data.fingerprint(split) for split in present},
            # Descriptions of the splits name places, not content.
            "task": {key: value for key, value in described.items() if key not in present},
            "budget": dataclasses.asdict(self.budget),
            "recipe": self.steps,
            "runtime": plugins.describe(self.runtime),
            "seed": self.seed,
            "device": self.device,
            "corruptions": list(self.corruptions),
            **({} if self.start is None else {"start": folder_.content_hash(self.start)}),
        }
        known: dict[str, object] = json.loads(json.dumps(identity, default=str))
        return known

    def images(self, count: int) -> Tensor:
        """(count, ...): validation images, as the model takes them."""
        return torch.cat(list(self.task.data.inputs("val", count, BATCH, seed=self.seed)))

    def say(self, text: str) -> None:
        if self.progress:
            say(f"compress: {text}")


@dataclass(frozen=True)
class Folder:
    """The working folder of a run."""

    path: Path
    run: Run

    def locked(self) -> AbstractContextManager[None]:
        """Nobody else works there meanwhile. Raises InputError."""
        return locked_folder(self.path)

    def claim(self, original: fx.GraphModule) -> None:
        """Make it this run's. Raises InputError where something else lies there, or another run that did a step."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            present = {path.name for path in self.path.iterdir()} - {LOCK}
        except OSError as error:
            raise InputError(
                f"workdir={self.path}: can't be written ({error.strerror}); name a folder that can"
            ) from error
        if present and RUN not in present and not all(name.startswith(f".{Path(RUN).stem}") for name in present):
            raise InputError(
                f"workdir={self.path}: is in use for something else ({min(present)} lies there); name another folder"
            )
        for left in self.path.glob(".*"):  # of a run that was killed while writing
            if left.name != LOCK:
                shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
        ours = self.run.identity(original)
        if RUN not in present:
            write_json(self.path / RUN, ours)
            return
        theirs = read_json(self.path / RUN)
        differing = [name for name in ours if theirs.get(name) != ours[name]]
        if not differing:
            return
        if not all(name in (RUN, FIRST) or name.startswith(".") for name in present):
            raise InputError(
                f"workdir={self.path}: holds an unfinished run with another {' and '.join(differing)}; "
                "delete it to start anew, name another folder, or go on with what it was started with"
            )
        shutil.rmtree(self.path / FIRST, ignore_errors=True)  # no step was done: nothing is lost
        write_json(self.path / RUN, ours)

    def place(self, index: int) -> Path:
        """Where the candidate of step ``index`` lies, 0: the original's."""
        return self.path / (f"{index}-{self.run.steps[index - 1]['do']}" if index else FIRST)

    def beside(self, index: int, suffix: str) -> Path:
        place = self.place(index)
        return place.with_name(place.name + suffix)

    def stored(self, index: int) -> Candidate | str | None:
        """What an earlier run made of step ``index``: a candidate, or why there is none; None: it was not tried."""
        failure = self.beside(index, ".failed.json")
        if failure.exists():
            return str(read_json(failure)["why"])
        return Candidate.read(self.place(index), index) if self.place(index).exists() else None

    def original(self, graph: fx.GraphModule) -> Candidate:
        """The original, saved and judged."""
        if not self.place(0).exists():
            self._put(0, ORIGINAL, graph, {"step": ORIGINAL}, 0.0)
        return Candidate.read(self.place(0), 0)

    def adopted(self, known: Candidate) -> Candidate:
        """The original, as another run has judged it."""
        if not self.place(0).exists():
            self._seal(0, known.graph, known.record, known.folder / self.run.model_file)
        return Candidate.read(self.place(0), 0)

    def attempt(self, index: int, parent: Candidate, original: Candidate) -> Candidate | str:
        """The candidate that step ``index`` makes of ``parent``, or why there is none; read, if it was tried before."""
        stored = self.stored(index)
        if stored is not None:
            return stored
        run, step = self.run, self.run.steps[index - 1]
        verb = str(step["do"])
        run.say(f"step {index} of {len(run.steps)}: {verb}")
        begin = time.monotonic()
        if verb in FLOAT_ONLY and is_quantised(parent.graph):  # a second choice, for where the first is undone
            return f"the model {QUANTISED}"
        options = {key: value for key, value in step.items() if key != "do"}
        checkpoint = self.beside(index, ".training")
        begins = folder_.load(run.start) if run.start is not None else None
        logs = part(run.logs, f"compress/{self.place(index).name}")
        teachers = [(1.0, original.graph), *([] if begins is None else [(1.0, begins)])]
        context = Context(run.task, teachers, run.runtime, run.seed, run.device, checkpoint, run.progress, logs)
        try:
            graph = VERBS[verb].run(
                begins if begins is not None and not parent.index else parent.graph, context, options
            )
        except (InputError, CheckFailed) as error:
            if isinstance(error, InputError) and not run.optional:
                raise
            write_json(self.beside(index, ".failed.json"), {"why": str(error)})
            return str(error)
        record = history.last(graph)
        facts = {} if record is None else record["facts"]
        timing = facts.get("timing") or {}
        plain = {key: value for key, value in facts.items() if isinstance(value, (int, float, str, bool))}
        told = {"step": verb, "options": options, "facts": {**plain, **timing}, "curve": facts.get("curve")}
        # Of a training that went on after a kill, all of it counts.
        seconds = max(time.monotonic() - begin, timing.get("seconds", 0.0))
        name = verb if parent.index == 0 else f"{parent.name} + {verb}"
        self._put(index, name, without_clocks(graph).to("cpu").eval(), told, seconds, (original, parent))
        return Candidate.read(self.place(index), index)

    def _put(
        self,
        index: int,
        name: str,
        graph: fx.GraphModule,
        told: Mapping[str, object],
        seconds: float,
        others: Sequence[Candidate] = (),
    ) -> None:
        """Export, judge, measure, put it all in place at once. others: the original, and what the step started from."""
        run, runtime = self.run, self.run.runtime
        with tempfile.TemporaryDirectory(prefix="rarefy-") as temporary:
            file = Path(temporary) / run.model_file
            runtime.export(graph, file)
            session = runtime.open(file)
            run.say(f"judging {name}")
            reference = runtime.open(others[0].folder / run.model_file) if others else None
            judged = evaluate(session, run.task, reference=reference, batch_size=BATCH, progress=run.progress)
            files = {**{one.name: one.folder / run.model_file for one in others}, name: file}
            untimed: Mapping[str, object] = {"speedup": {}}
            times = latency.timed(files, run.images(1), runtime=runtime)[name] if run.timed else untimed
            found = {
                **told,
                "name": name,
                "seconds": seconds,
                "evaluation": {**judged.to_json(), "reference": None},
                **times,
            }
            self._seal(index, graph, found, file)

    def _seal(self, index: int, graph: fx.GraphModule, found: Mapping[str, object], file: Path) -> None:
        place = self.place(index)
        whole = seal(found, folder_.content_of(graph).hash, digest_of(file), *belongs(place))
        folder_.save(graph, place, manifest={"found": dict(found), SEAL: whole}, files={self.run.model_file: file})


@contextlib.contextmanager
def locked_folder(path: Path) -> Iterator[None]:
    """A working folder that nobody else works in meanwhile. Raises InputError."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked(path, "wait for it, or name another folder"))
        except OSError as error:
            raise InputError(f"workdir={path}: can't be written ({why(error)}); name a folder that can") from error
        yield


def without_clocks(graph: fx.GraphModule) -> fx.GraphModule:
    """The graph, its history without the seconds it tells: what is saved must not depend on a clock."""
    graph.meta["history"] = [
        {**record, "facts": {key: value for key, value in record.get("facts", {}).items() if key not in CLOCKED}}
        for record in history.records(graph)
    ]
    return graph


def write_json(path: Path, value: Mapping[str, object]) -> None:
    """Put in place whole."""
    sealed = {**value, SEAL: seal(value)}
    with replacing(path, durable=True) as partial:
        partial.write_text(json.dumps(sealed, allow_nan=False), encoding="utf-8")


def read_json(path: Path) -> dict[str, object]:
    """Raises FormatError."""
    try:
        value = strict_json.parse(content(path, strict_json.MOST_BYTES), path)
    except FormatError as error:
        raise FormatError(f"{error}; delete the working folder to start anew") from error
    if value.pop(SEAL, None) != seal(value):
        raise FormatError(f"{path}: was changed since it was written; delete the working folder to start anew")
    return value
