"""What others are given: ``rarefy card``, ``push``, ``pull``."""

from __future__ import annotations

from typing import Annotated

import typer

from rarefy.cli.options import Json, Signer, app
from rarefy.cli.terminal import say, show_json

License = Annotated[
    str,
    typer.Option(
        "--license", metavar="NAME", help="The model's licence, as the hub spells it: apache-2.0, mit, cc-by-4.0."
    ),
]
Repo = Annotated[str, typer.Argument(metavar="REPO", help="OWNER/NAME on the Hugging Face hub.")]


@app.command()
def card(
    folder: Annotated[str, typer.Argument(metavar="FOLDER", help="A folder saved by rarefy.")],
    license: License = "",
    source: Annotated[
        str | None, typer.Option("--from", metavar="FILE", help="A page of your own, put in as it is.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write README.md into a saved folder: what the model is, measured, how to feed it, files, licences."""
    from rarefy.evaluation import card as card_

    written = card_.write(folder, license=license, source=source)
    show_json({"file": str(written)}) if as_json else say(f"written: {written}")


@app.command()
def push(
    folder: Annotated[str, typer.Argument(metavar="FOLDER", help="A folder saved by rarefy.")],
    repo: Repo,
    public: Annotated[bool, typer.Option("--public", help="Make a new repository for all to see.")] = False,
    license: License = "",
    as_json: Json = False,
) -> None:
    """Put a saved folder on the Hugging Face hub, with a model card."""
    from rarefy.evaluation import hub

    commit = hub.push(folder, repo, private=not public, license=license)
    show_json({"commit": commit}) if as_json else say(f"pushed: {commit}")


@app.command()
def pull(
    repo: Repo,
    folder: Annotated[str, typer.Argument(metavar="FOLDER", help="Where it goes.")],
    revision: Annotated[str | None, typer.Option(metavar="NAME", help="A branch, tag or commit.")] = None,
    key: Signer = None,
    as_json: Json = False,
) -> None:
    """Fetch a folder from the Hugging Face hub; what is not as it was pushed (with --key: signed) is refused."""
    from rarefy.evaluation import hub

    found = hub.pull(repo, folder, revision=revision, key=key)
    show_json({"folder": str(found)}) if as_json else say(f"pulled: {found}")
