"""push() and pull(): a saved folder as a repository of the Hugging Face hub, and back.

What goes up is what the manifest lists, the manifest, the signature, and a model card; nothing else of the folder, in
one commit. What comes down is what the manifest of one commit lists: names and sizes are compared before anything is
fetched, each file is as the manifest has it, and with a key as its owner signed it, before it takes its place. Other
files of the repository (a pickle, code) are neither fetched nor opened.

Where and as whom is ``huggingface_hub``'s to know: ``HF_ENDPOINT``, ``HF_TOKEN``, ``hf auth login``.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rarefy.artifact import folder as folder_
from rarefy.artifact.snapshot import FILE_NAME, MANIFEST, SIGNATURE, hold, read_manifest
from rarefy.errors import FormatError, InputError, first_line
from rarefy.evaluation import card
from rarefy.system.dependencies import needs
from rarefy.system.files import check_room, replacing
from rarefy.system.strict_json import MOST_BYTES

Foreign = Any  # an object of huggingface_hub's

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?")


def push(folder: str | os.PathLike[str], repo: str, *, private: bool = True, license: str = "") -> str:
    """Put a saved folder into the hub's repository ``repo`` ("owner/name"), which is made where there is none.

    private: who makes a repository decides who sees it; True: nobody else. license: of the card, where the folder has
    no README.md of its own.

    Returns the address of the commit. Raises FormatError for a folder that is not as it was saved, InputError where the
    hub refuses.
    """
    hub = _hub(repo)
    with hold(folder) as held, tempfile.TemporaryDirectory(prefix="rarefy-") as place:
        listed = held.manifest["files"]
        if license and card.README in listed:
            raise InputError(f"{folder}: has a README.md; write the licence there: `rarefy card FOLDER --license NAME`")
        for name in listed:
            held.copy(name, Path(place) / name)  # what is sent is what is listed
        _take(Path(folder), Path(place))
        with hold(place) as copied:
            copied.check()
        if card.README not in listed:
            (Path(place) / card.README).write_text(card.of_folder(place, license=license), encoding="utf-8")
        with _told(repo):
            api = hub.HfApi()
            api.create_repo(repo, private=private, exist_ok=True)
            added = [hub.CommitOperationAdd(one.name, str(one)) for one in sorted(Path(place).iterdir())]
            done = api.create_commit(repo, added, commit_message="A model saved by rarefy")
    return str(done.commit_url)


def pull(
    repo: str, folder: str | os.PathLike[str], *, revision: str | None = None, key: str | os.PathLike[str] | None = None
) -> Path:
    """The folder that was pushed to ``repo``, at ``folder``; one of ours that is there is replaced.

    revision: a branch, tag or commit; None: the newest. key: the public key of who must have signed it. Raises
    FormatError or SignatureRefused for what is not as it was saved, and InputError where the hub refuses; what was at
    ``folder`` is still there then.
    """
    hub = _hub(repo)
    target = Path(os.path.realpath(folder))
    folder_.check_replaceable(target)
    with tempfile.TemporaryDirectory(prefix="rarefy-") as place:
        with _told(repo):
            found = hub.HfApi().model_info(repo, revision=revision, files_metadata=True)
            sizes = {one.rfilename: one.size for one in found.siblings}
            _check_sizes(repo, sizes, {MANIFEST: None})
            _fetch(hub, repo, found.sha, MANIFEST, place)
        listed = read_manifest(place)["files"]
        wanted = {name: int(one["size"]) for name, one in listed.items()}
        _check_sizes(repo, sizes, wanted)
        _check_room(place, target, wanted)
        with _told(repo):
            for name in [*listed, *({SIGNATURE} & sizes.keys())]:
                _fetch(hub, repo, found.sha, name, place)
        with hold(place, key) as held:
            held.check()
            held.graph()
            target.parent.mkdir(parents=True, exist_ok=True)
            with replacing(target, durable=True, folder=True, check=lambda: folder_.check_replaceable(target)) as whole:
                for name in listed:
                    held.copy(name, whole / name)
                _take(Path(place), whole)
    return Path(folder)


def _take(source: Path, target: Path) -> None:
    """The manifest and the signature, which it does not list."""
    for name in (MANIFEST, SIGNATURE):
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def _check_sizes(repo: str, there: Mapping[str, int | None], wanted: Mapping[str, int | None]) -> None:
    """Is each file there, under a name and of the size that it may have? Raises FormatError."""
    for name, size in wanted.items():
        if name not in there:
            raise FormatError(f"{repo}: has no {name}; push a folder that rarefy saved")
        most = MOST_BYTES if size is None else size
        held = there[name]
        if not FILE_NAME.fullmatch(name) or held is None or held > most or (size is not None and held != size):
            raise FormatError(
                f"{repo}: {name} has {held} bytes there, and the manifest lists {most}; it is not as pushed"
            )


def _check_room(place: str, target: Path, sizes: Mapping[str, int]) -> None:
    """Before anything large is fetched: each file is there twice for a moment, and all of them at either place."""
    whole, most = sum(sizes.values()), max(sizes.values(), default=0)
    check_room(place, whole + most, "what is fetched", "make room there, or set TMPDIR to another folder")
    check_room(target, whole, "what is pulled", "make room, or pull to another place; what is there is unchanged")


def _fetch(hub: Foreign, repo: str, commit: str, name: str, place: str) -> None:
    """One file of one commit, as a regular file of that name in the folder."""
    with tempfile.TemporaryDirectory(prefix="rarefy-") as cache:
        shutil.copyfile(hub.HfApi().hf_hub_download(repo, name, revision=commit, cache_dir=cache), Path(place) / name)


def _hub(repo: str) -> Foreign:
    if not _NAME.fullmatch(repo):
        raise InputError(f"{repo}: is no repository of the hub; give OWNER/NAME")
    return needs("huggingface_hub", "hub")


@contextlib.contextmanager
def _told(repo: str) -> Iterator[None]:
    """What the hub and the network refuse, in one line."""
    errors = needs("huggingface_hub.errors", "hub")
    try:
        yield
    except errors.RepositoryNotFoundError as error:
        raise InputError(
            f"{repo}: is not there, or not yours to see; log in with `hf auth login`, or set HF_TOKEN"
        ) from error
    except errors.HfHubHTTPError as error:
        code = getattr(error.response, "status_code", None)
        way = "log in with `hf auth login`, or set HF_TOKEN" if code in (401, 403) else "try again later"
        raise InputError(f"{repo}: the hub refuses ({first_line(error)}); {way}") from error
    except errors.LocalTokenNotFoundError as error:
        raise InputError(f"{repo}: nobody is logged in; `hf auth login`, or set HF_TOKEN") from error
    except (OSError, ValueError, errors.OfflineModeIsEnabled, errors.HTTPError) as error:
        raise InputError(
            f"{repo}: can't be reached ({first_line(error)}); look at the network and HF_ENDPOINT"
        ) from error
