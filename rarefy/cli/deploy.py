"""What leaves the house: ``rarefy export``, ``sign``, ``verify``, ``keygen``."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from rarefy.cli.inputs import prepared
from rarefy.cli.options import Chain, DataOptions, Json, ModelOptions, Output, Runtime, Signer, app, grouped
from rarefy.cli.outputs import claim_file, claim_parent, claim_pictures
from rarefy.cli.terminal import say, show_json, show_table, size_text
from rarefy.errors import InputError, SelfCheckFailed

WHERE = (
    "Where the model will run (`rarefy list runtimes`); default: by the file's name, .onnx for "
    "onnxruntime, .xml for openvino, .zip for inductor, .cuda for cuda, .tflite for litert, "
    ".pte for executorch; "
    "all: a file for each, into the folder --output, with a table."
)


@app.command()
@grouped
def export(
    model: ModelOptions,
    data: DataOptions,
    output: Output,
    runtime: Annotated[str | None, typer.Option(metavar="NAME", help=WHERE)] = None,
    compare: Annotated[bool, typer.Option(help="Run the file, and compare it with the model.")] = True,
    boxes: Annotated[
        bool,
        typer.Option(
            "--nms/--no-nms",
            help="Of a detector: from pictures (uint8, of its size) to boxes, or its core alone, to raw outputs; "
            "a certificate is of the core.",
        ),
    ] = True,
    certify: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Write the certificate of parity there, as JSON; with data, the metric is in it."
        ),
    ] = None,
    also: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="A further runtime that reads the file, for the certificate; with all, one of your own; may repeat.",
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(metavar="N", min=1, help="Judge on the first N images only.")] = None,
    key: Signer = None,
    as_json: Json = False,
) -> None:
    """Write the file that the runtime runs, and check that it answers like the model."""
    from rarefy.deployment import description
    from rarefy.deployment import export as export_
    from rarefy.evaluation import certify as certify_

    if runtime == "all":
        return _everywhere(model, data, output, also or (), compare, boxes, not certify and limit is None, key, as_json)
    if certify is None and (also or limit is not None or data.options()):
        raise InputError("--also, --limit and data belong to the certificate; name its file with --certify")
    chosen = export_.runtime_of(Path(output), runtime)
    certify_.readers_of(chosen, also or ())
    target = claim_file(output, export_.suffixes_of(chosen))
    if certify is not None:
        claim_parent(certify, "--certify")
    source, graph, task = prepared(model, data, needed=False, key=key)
    description.remember_source(description.remember(graph, task), source.preprocessing)
    if certify is None:
        parity = export_.export(graph, target, runtime=chosen, compare=compare, boxes=boxes)
    else:
        parity = _certified(graph, target, certify, chosen, also or (), task, limit)
    _tell(target, parity, as_json)


def _everywhere(
    model: ModelOptions,
    data: DataOptions,
    output: str,
    also: Sequence[str],
    compare: bool,
    boxes: bool,
    alone: bool,
    key: str | None,
    as_json: bool,
) -> None:
    """The file of every runtime, and the table of them. Raises SelfCheckFailed where one differs or failed."""
    from rarefy.deployment import description, everywhere

    folder = Path(output)
    if not alone or data.options():
        raise InputError("--certify, --limit and data belong to one runtime's file; leave them out with --runtime all")
    source, graph, task = prepared(model, data, needed=False, key=key)
    description.remember_source(description.remember(graph, task), source.preprocessing)
    rows = everywhere.export_all(graph, claim_pictures(str(folder)), also=also, compare=compare, boxes=boxes)
    if as_json:
        show_json({"folder": str(folder), "runtimes": rows})
    else:
        table = [everywhere.shown(row) for row in rows]
        show_table(f"exported to {folder}", everywhere.COLUMNS, table)
    bad = [f"{row['runtime']}: {row['note'] or row['state']}" for row in rows if row["state"] in ("failed", "differs")]
    if bad:
        raise SelfCheckFailed(f"{folder}: {'; '.join(bad)}; the other files are good")


def _tell(target: Path, parity: dict[str, Any], as_json: bool) -> None:
    """What was written, and how it compares. Raises SelfCheckFailed where it answers otherwise."""
    from rarefy.deployment.export import doubt

    size = target.stat().st_size
    if as_json:
        show_json({"file": str(target), "size_bytes": size, "parity": parity})
    else:
        found = [(name, value) for name, value in parity.items() if not isinstance(value, (list, dict))]
        rows = [
            ("file", target),
            ("size", size_text(size)),
            *((name.replace("_", " "), value) for name, value in found),
        ]
        show_table("exported", ("what", "found"), rows)
    if parity.get("passed") is False:
        raise SelfCheckFailed(f"{target}: {doubt(parity, 'inputs')}")


def _certified(
    graph: Any, target: Path, certificate: Path, runtime: Any, also: Sequence[str], task: Any, limit: int | None
) -> dict[str, Any]:
    """The file and its certificate, written; what is shown of it."""
    from rarefy import plugins
    from rarefy.artifact.folder import placing
    from rarefy.deployment import export as export_
    from rarefy.evaluation import certify as certify_

    export_.export(graph, target, runtime=runtime, compare=False, boxes=False)
    inputs = None if task is None else next(iter(task.data.inputs("val", 64, 64, seed=0)))
    facts = certify_.certify(graph, target, runtime=runtime, also=also, inputs=inputs, task=task, limit=limit)
    with placing(certificate) as place:
        place.write_text(json.dumps(facts, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    own = facts["runtimes"][plugins.describe(plugins.resolve("runtimes", runtime))]
    last = {key: facts[key] for key in ("first_diverging_layer", "passed")}
    return {"certificate": str(certificate), **own, **last}


@app.command()
def sign(
    folder: Annotated[str, typer.Argument(metavar="FOLDER", help="A folder saved by rarefy.")],
    key: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="The private key that `rarefy keygen` wrote, or the certificate's."),
    ] = None,
    certificate: Annotated[str | None, typer.Option(metavar="FILE", help="The key's certificate (PEM).")] = None,
    chain: Chain = None,
    sigstore: Annotated[
        bool, typer.Option("--sigstore", help="Sign with Sigstore: as who you are, without a key.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Sign a folder: every file in it. A key's password is taken from $RAREFY_KEY_PASSWORD."""
    from rarefy.artifact import certificates, signing

    password = os.environ.get("RAREFY_KEY_PASSWORD")
    signature = signing.sign(
        folder, key, password=password, certificate=certificate, chain=chain or (), sigstore=sigstore
    )
    doubt = certificates.doubt(certificate, chain or ()) if certificate is not None else None
    if as_json:
        show_json({"folder": folder, "signature": str(signature), **({"warning": doubt} if doubt else {})})
    else:
        say(f"signed: {signature}")
        if doubt:
            say(f"warning: it will not be accepted: {doubt}")


@app.command()
@grouped
def verify(
    folder: Annotated[str, typer.Argument(metavar="FOLDER", help="A signed folder.")],
    data: DataOptions,
    key: Annotated[str | None, typer.Option(metavar="FILE", help="The public key.")] = None,
    chain: Chain = None,
    at: Annotated[
        str | None,
        typer.Option(metavar="DATE", help="The day on which certificates must be valid, for old archives: 2026-05-31."),
    ] = None,
    identity: Annotated[str | None, typer.Option(metavar="NAME", help="Who must have signed with Sigstore.")] = None,
    issuer: Annotated[str | None, typer.Option(metavar="URL", help="Who must have vouched for that identity.")] = None,
    claims: Annotated[
        bool,
        typer.Option("--claims", help="Measure again what the folder says of itself; accuracy and parity on --data."),
    ] = False,
    runtime: Runtime = "onnxruntime",
    limit: Annotated[int | None, typer.Option(metavar="N", min=1, help="Judge on the first N images only.")] = None,
    as_json: Json = False,
) -> None:
    """Refuse (exit 1) a folder in which a file was changed, added or removed, or that another key signed.

    With --claims also one of which what it says does not hold; a key may be left out then.
    """
    from rarefy.artifact import signing

    if not claims and (data.options() or limit is not None):
        raise InputError("data and --limit are for --claims; pass it, or leave them out")
    names: list[str] = []
    if not claims or key or chain or identity:
        names = signing.verify(folder, key, chain=chain or (), at=at, identity=identity, issuer=issuer)
    found = _claims(folder, data, key, runtime, limit) if claims else []
    if as_json:
        told = [one._asdict() for one in found]
        show_json({"folder": folder, "verified": names, **({"claims": told} if claims else {})})
    else:
        if names:
            say(f"verified: all {len(names)} files of {folder} are as they were signed")
        _show_claims(folder, found)
    failed = [one.name for one in found if one.holds is False]
    if failed:
        raise SelfCheckFailed(f"{folder}: {', '.join(failed)} is not as claimed; do not rely on it: measure it "
                              "with `rarefy report --data`")  # fmt: skip


def _claims(folder: str, data: DataOptions, key: str | None, runtime: str, limit: int | None) -> Any:
    from rarefy import plugins
    from rarefy.evaluation import claims

    source, graph, task = prepared(ModelOptions(folder), data, needed=False, key=key)
    if source.folder is None:
        raise InputError(f"{folder}: --claims are those of a folder that rarefy saved; give one")
    return claims.check(source.folder, graph, task, plugins.resolve("runtimes", runtime), limit)


def _show_claims(folder: str, found: Sequence[Any]) -> None:
    if not found:
        return
    words = {True: "holds", False: "does not hold", None: "not judged"}
    rows = [(one.name.replace("_", " "), one.claimed, one.found, words[one.holds], one.note) for one in found]
    show_table(f"claims of {folder}", ("what", "claimed", "found", "", "how"), rows)


@app.command()
def keygen(
    path: Annotated[
        str,
        typer.Argument(metavar="PATH", help="Where the private key goes; the public one lies beside it, with .pub."),
    ],
    as_json: Json = False,
) -> None:
    """Make a pair of keys to sign with. With $RAREFY_KEY_PASSWORD, the private one is encrypted."""
    from rarefy.artifact import signing

    private, public = signing.keygen(path, password=os.environ.get("RAREFY_KEY_PASSWORD"))
    if as_json:
        show_json({"private": str(private), "public": str(public)})
    else:
        say(f"private key: {private} (keep it to yourself)\npublic key:  {public} (give it to whoever verifies)")
