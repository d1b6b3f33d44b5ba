"""The trials of a search, in a storage of Optuna's that any number of workers share, and who works at which.

The storage is a journal in the search's folder, which may lie on a file system that several machines share, or whatever
a URL names (``postgresql://...``, ``grpc://host:port`` for Optuna's proxy). A trial is asked for once, in its turn, and
keeps its number, which is its seed: who carries it out does not matter.

A worker claims a trial by the lock of its folder, which the system drops with the process, however it ends: what a
killed worker left is found unlocked, and taken over where it stood. On file systems without locks, and between
machines, a claim also beats: one whose last beat is older than ``SILENT`` seconds, by the clock of the file system
itself, is free.
"""

from __future__ import annotations

import contextlib
import os
import platform
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, cast

from rarefy.compression.run import locked_folder
from rarefy.compression.search.space import Genome
from rarefy.errors import FormatError, InputError, MissingDependency, first_line
from rarefy.reports.facts import is_number
from rarefy.system.files import plain

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.storages import BaseStorage
    from optuna.study import Study
    from optuna.trial import Trial as OptunaTrial

MOST_BYTES = 2**30  # of the journal
BEAT, SILENT = 15.0, 90.0  # seconds
READY = 20.0  # that a proxy may take to answer first
FILE, STUDY = "trials.journal", "rarefy"
Values = tuple[float, float, float]  # drop, cost in shares of the original's, bytes: all are to be small


def host() -> str:
    """This machine's name; ``$RAREFY_HOST`` gives one to a container whose own is random."""
    return os.environ.get("RAREFY_HOST") or platform.node()


@dataclass(frozen=True)
class Trial:
    """state: "open" (to be done, or being done), "made" (its model is there, not timed), "done" or "failed".

    first: number of the first trial of its generation. told: what was found; empty while open. timing: of its file.
    """

    number: int
    genome: Genome
    state: str
    first: int
    told: Mapping[str, object]
    timing: Mapping[str, object]
    why: str = ""


class Journal:
    """The study of a folder."""

    def __init__(self, folder: Path, url: str | None, seed: int, kind: str = "tpe") -> None:
        needs_optuna()
        import optuna

        self.folder, self.seed, self.kind, self.url = folder, seed, kind, url
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        with self._answering("can't be opened", "check the URL"):
            self.study: Study = optuna.create_study(
                storage=_storage(folder, url),
                study_name=STUDY if url is None else f"{STUDY} {folder.resolve().name}",
                directions=["minimize"] * 3,
                load_if_exists=True,
            )

    @contextlib.contextmanager
    def _answering(
        self, what: str = "does not answer", way_out: str = "start it, and the worker again: it goes on"
    ) -> Iterator[None]:
        """Optuna's errors as ours: of a list that it did not write, FormatError; of a storage elsewhere, InputError."""
        try:
            yield
        except InputError:
            raise
        except Exception as error:
            if self.url is None:
                raise FormatError(
                    f"{self.folder / FILE}: is no list of trials that a search wrote ({first_line(error)}); "
                    "begin in another folder"
                ) from error
            raise InputError(f"--storage {self.url}: {what} ({type(error).__name__}); {way_out}") from error

    def ask(
        self, genomes: Sequence[Genome], space: Mapping[str, BaseDistribution], fixed: Mapping[str, float | str]
    ) -> None:
        """Put these in the list, with plain parameters that Optuna chooses. fixed: those of the first ones."""
        with self._answering():
            first = self._seeded()
            for genome in genomes:
                if fixed:
                    self.study.enqueue_trial(dict(fixed))
                trial = self.study.ask(dict(space))
                trial.set_user_attr("first", first)
                trial.set_user_attr("genome", {**genome.to_json(), "params": trial.params})

    def ask_plain(
        self, count: int, space: Mapping[str, BaseDistribution], genome: Callable[[dict[str, object]], Genome]
    ) -> None:
        """So many that Optuna chooses altogether. genome: of the parameters."""
        with self._answering():
            first = self._seeded()
            for _ in range(count):
                trial = self.study.ask(dict(space))
                trial.set_user_attr("first", first)
                plain = {name: trial.params[name] for name in ("lr", "criterion")}
                trial.set_user_attr("genome", {**genome(trial.params).to_json(), "params": plain})

    def _seeded(self) -> int:
        """How many trials there are: what is asked for next hangs on that and the seed, and on no process."""
        from optuna import samplers

        count = len(self.study.get_trials(deepcopy=False))
        seed = 1000 * self.seed + count
        plain = self.kind == "random"
        self.study.sampler = samplers.RandomSampler(seed=seed) if plain else samplers.TPESampler(seed=seed)
        return count

    def trials(self) -> list[Trial]:
        """Raises FormatError for a list that no search of rarefy's has written."""
        with self._answering():
            return self._trials()

    def _trials(self) -> list[Trial]:
        found = []
        for one in self.study.get_trials(deepcopy=False):
            told = one.user_attrs
            if "genome" not in told:  # its worker ended while it was asked for
                continue
            state = {"COMPLETE": "done", "FAIL": "failed"}.get(one.state.name, "made" if "made" in told else "open")
            genome = Genome.from_json(cast(dict[str, object], told.get("final", told["genome"])))
            found.append(
                Trial(
                    one.number,
                    genome,
                    state,
                    int(told["first"]),
                    _told(told, "made", _MADE),
                    _told(told, "timing", _TIMED),
                    str(told.get("why", "")),
                )
            )
        return found

    def made(self, number: int, genome: Genome, told: Mapping[str, object]) -> None:
        """The model of a trial is there. genome: as it was carried out."""
        with self._answering():
            trial = self._trial(number)
            trial.set_user_attr("final", genome.to_json())
            trial.set_user_attr("made", dict(told))

    def done(self, number: int, timing: Mapping[str, object], values: Values, violation: float | None) -> None:
        """violation: of the budget's drop, above 0 where it is exceeded; None: there is none."""
        with self._answering():
            trial = self._trial(number)
            trial.set_user_attr("timing", dict(timing))
            if violation is not None:
                trial.set_constraint("max_drop", violation)
            self.study.tell(number, list(values), skip_if_finished=True)

    def failed(self, number: int, why: str) -> None:
        from optuna.trial import TrialState

        with self._answering():
            self._trial(number).set_user_attr("why", why)
            self.study.tell(number, state=TrialState.FAIL, skip_if_finished=True)

    def _trial(self, number: int) -> OptunaTrial:
        from optuna.trial import Trial as OptunaTrial

        return OptunaTrial(self.study, self.study.get_trials(deepcopy=False)[number]._trial_id)


_MADE, _TIMED = ("drop", "cost", "size"), ("original_ms",)  # numbers that a trial tells, made and timed


def _told(told: Mapping[str, object], key: str, numbers: Sequence[str]) -> Mapping[str, object]:
    """Raises ValueError where it lacks one of these numbers; empty where it tells nothing yet."""
    found = told.get(key, {})
    if not isinstance(found, Mapping) or (found and not all(is_number(found.get(name)) for name in numbers)):
        raise ValueError(f"{key}: {str(found)[:80]}")
    return found


def needs_optuna() -> None:
    """Raises MissingDependency, with the pip line."""
    if find_spec("optuna") is None:
        raise MissingDependency("optuna", "search")


def _storage(folder: Path, url: str | None) -> BaseStorage | str:
    from optuna import storages
    from optuna.storages import journal

    if url is None:
        if os.path.lexists(folder / FILE):
            plain(folder / FILE, MOST_BYTES)
        return storages.JournalStorage(journal.JournalFileBackend(str(folder / FILE)))
    if url.startswith("grpc://"):
        place, _, port = url.removeprefix("grpc://").partition(":")
        if not port.isdigit():
            raise InputError(f"--storage {url}: names no port; write grpc://host:13000")
        if find_spec("grpc") is None or find_spec("google.protobuf") is None:
            raise MissingDependency("grpcio", "grpc")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Optuna calls it experimental
            proxy = storages.GrpcStorageProxy(host=place, port=int(port))
        proxy.wait_server_ready(timeout=READY)
        return proxy
    return url


# -------------------------------------------------------------------------------------------------------------- claims


@contextlib.contextmanager
def claimed(place: Path) -> Iterator[bool]:
    """Is this trial ours while the block runs? place: its folder."""
    with contextlib.ExitStack() as stack:
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked_folder(place))
        except InputError:
            yield False
            return
        beat = place.with_name(f"{place.name}.claim")
        if _beats_elsewhere(beat):
            yield False
            return
        stop = threading.Event()
        _touch(beat)
        thread = threading.Thread(target=_keep_beating, args=(beat, stop), daemon=True)
        thread.start()
        try:
            yield True
        finally:
            stop.set()
            thread.join()
            with contextlib.suppress(OSError):
                beat.unlink()


def _touch(beat: Path) -> None:
    with contextlib.suppress(OSError):
        beat.write_text(f"{host()} {os.getpid()}\n", encoding="utf-8")


def _keep_beating(beat: Path, stop: threading.Event) -> None:
    while not stop.wait(BEAT):
        _touch(beat)


def _beats_elsewhere(beat: Path) -> bool:
    """Does a worker of another machine hold it? On this one the lock has said so."""
    try:
        who, then = beat.read_text(encoding="utf-8").split()[0], beat.stat().st_mtime
        probe = beat.with_name(f"{beat.name}.{os.getpid()}")
        probe.touch()
        now = probe.stat().st_mtime  # clocks of machines differ: the file system's own counts
        probe.unlink()
    except (OSError, IndexError):
        return False
    return who != host() and now - then < SILENT


@contextlib.contextmanager
def alone(place: Path, seconds: float = 600.0) -> Iterator[None]:
    """One worker at a time, in what takes little time. Raises InputError where another holds it for so long."""
    end = time.monotonic() + seconds
    with contextlib.ExitStack() as stack:
        while True:
            try:
                stack.enter_context(locked_folder(place))
                break
            except InputError:
                if time.monotonic() > end:
                    raise
                time.sleep(0.1)
        yield
