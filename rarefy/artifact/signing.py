"""keygen(), sign() and verify(): who made the folder, and that every byte of it is theirs.

The signature is OpenSSF's model signing (model.sig: a Sigstore bundle around an in-toto statement that lists the sha256
of every file), made and checked by its own library, so ``model_signing verify`` reads it too. Three ways to sign:

    a key pair     keygen("me.pem"); sign(folder, "me.pem"); verify(folder, "me.pem.pub")      EC P-256, no network
    a certificate  sign(folder, key, certificate=..., chain=[...]); verify(folder, chain=[...])
    Sigstore       sign(folder, sigstore=True); verify(folder, identity="me@example.org", issuer="https://...")

What the library leaves open is closed here: it skips git's files and does not see folders. ``verify`` compares every
entry below the folder with the signed list, so a file added, hidden or not, a link, an empty folder, or a device is
refused as a changed byte is.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rarefy.errors import InputError, MissingDependency, RarefyError, SignatureRefused
from rarefy.system.files import replacing

SIGNATURE = "model.sig"

_LARGEST_SIGNATURE = 16 * 2**20
_PREDICATE = "https://model_signing/signature/v1.0"

PathLike = str | os.PathLike[str]


def keygen(path: PathLike, *, password: str | None = None) -> tuple[Path, Path]:
    """A new EC P-256 key pair: the private key at ``path`` (PEM, PKCS 8, mode 0600), the public one at "path.pub".

    Returns both paths. Raises InputError if either is there already: a key is never overwritten.
    """
    _library()
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    private, public = Path(path), Path(f"{os.fspath(path)}.pub")
    for existing in (private, public):
        if os.path.lexists(existing):
            raise InputError(f"{existing}: is there already, and a key is never overwritten; choose another name")
    key = ec.generate_private_key(ec.SECP256R1())
    encryption = serialization.BestAvailableEncryption(password.encode()) if password else serialization.NoEncryption()
    secret = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)
    known = key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    try:
        private.parent.mkdir(parents=True, exist_ok=True)
        _write_new(private, secret, 0o600)
        _write_new(public, known, 0o644)
    except OSError as error:
        raise InputError(
            f"{error.filename or private}: can't be written ({error.strerror}); choose another place for the key"
        ) from error
    return private, public


def sign(
    folder: PathLike,
    key: PathLike | None = None,
    *,
    password: str | None = None,
    certificate: PathLike | None = None,
    chain: Sequence[PathLike] = (),
    sigstore: bool | Mapping[str, object] = False,
) -> Path:
    """Sign every file of ``folder``; returns the path of its model.sig, which replaces an older one.

    key: the private key, PEM. password: of that key.
    certificate: the key's certificate, and chain: those up to the root, PEM.
    sigstore: sign with Sigstore instead; a dictionary is passed to model_signing's ``use_sigstore_signer``
        (identity_token, use_ambient_credentials, use_staging, oidc_issuer, trust_config, ...).

    Raises InputError if the folder holds what can't be signed (links, empty folders, the private key) or the key is
    none.
    """
    library = _library()
    root = Path(folder)
    if (key is None) == (not sigstore):
        raise InputError("sign with one of a key and sigstore=True; make a key with keygen")
    if certificate is not None and key is None:
        raise InputError(f"{certificate}: a certificate signs with its private key; pass key=")
    if key is not None and Path(key).resolve().is_relative_to(root.resolve()):
        raise InputError(f"{key}: lies in the folder to sign, and would be published with it; move the key elsewhere")
    names = _entries(root, InputError)
    if not names:
        raise InputError(f"{root}: holds no file to sign")
    config = library.signing.Config()
    config.set_hashing_config(library.hashing.Config().set_ignored_paths(paths=[SIGNATURE], ignore_git_paths=False))
    try:
        if sigstore:
            config.use_sigstore_signer(**({} if sigstore is True else sigstore))
        elif certificate is not None:
            config.use_certificate_signer(
                private_key=key, signing_certificate=certificate, certificate_chain=list(chain)
            )
        else:
            config.use_elliptic_key_signer(private_key=key, password=password.encode() if password else None)
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{certificate or key or 'sigstore'}: can't sign with it ({_line(error)})") from error
    try:
        with replacing(root / SIGNATURE) as temporary:
            config.sign(root, temporary)
    except Exception as error:  # the library passes on what its network, crypto and file layers raise
        raise InputError(f"{root}: can't be signed ({_line(error)})") from error
    return root / SIGNATURE


def verify(
    folder: PathLike,
    public_key: PathLike | None = None,
    *,
    chain: Sequence[PathLike] = (),
    identity: str | None = None,
    issuer: str | None = None,
    sigstore: Mapping[str, object] | None = None,
) -> list[str]:
    """Is every file of ``folder`` as it was signed, and none added or removed? Returns their names, sorted.

    public_key: PEM, for a folder signed with a key.
    chain: root (and intermediate) certificates to trust, PEM, for one signed with a certificate.
    identity, issuer: who must have signed, and who must have vouched for them, for one signed with Sigstore;
        ``sigstore``: further arguments of model_signing's ``use_sigstore_verifier`` (use_staging, trust_config).

    Raises SignatureRefused, which names the files, and InputError for a folder or a key that is none.
    """
    library = _library()
    root = Path(folder)
    if (public_key is not None) + bool(chain) + (identity is not None) != 1:
        raise InputError("verify with one of a public key, a certificate chain, and identity= with issuer=")
    config = library.verifying.Config()
    try:
        if public_key is not None:
            config.use_elliptic_key_verifier(public_key=public_key)
        elif chain:
            config.use_certificate_verifier(certificate_chain=list(chain))
        else:
            config.use_sigstore_verifier(identity=identity, oidc_issuer=issuer, **(sigstore or {}))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{public_key or list(chain) or identity}: can't verify with it ({_line(error)})") from error

    names = _entries(root, SignatureRefused)
    signed = _signed(root, has_key=public_key is not None)
    try:
        config.verify(root, root / SIGNATURE)
    except Exception as error:  # a hostile signature may raise anything in the library's parsers
        if "Signature mismatch" in str(error):
            raise SignatureRefused(f"{root}: {_differences(root, names, signed) or _line(error)}") from error
        raise SignatureRefused(
            f"{root}: {SIGNATURE} was changed, or made with another key than this ({_line(error)})"
        ) from error
    if set(names) != signed.keys():
        raise SignatureRefused(f"{root}: {_differences(root, names, signed)}")
    return names


def is_signed(folder: PathLike) -> bool:
    """Is there a signature at all? (``verify`` says what it is worth.)"""
    return os.path.lexists(Path(folder) / SIGNATURE)


def _entries(root: Path, refusal: type[RarefyError]) -> list[str]:
    """Every file below ``root`` but its signature; ``refusal`` is raised for what is no file and no folder of files."""
    if not root.is_dir():
        raise InputError(f"{root}: no such folder")

    def unreadable(error: OSError) -> None:
        raise refusal(f"{error.filename}: can't be read ({error.strerror})") from error

    found = []
    for place, folders, files in os.walk(root, onerror=unreadable):
        where = Path(place)
        if where != root and not folders and not files:
            raise refusal(f"{where}: an empty folder can't be signed; remove it")
        for name in (*folders, *files):
            path = where / name
            mode = path.lstat().st_mode
            shown = repr(str(path))[1:-1]
            if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
                what = "a symbolic link" if stat.S_ISLNK(mode) else "no ordinary file"
                raise refusal(f"{shown}: is {what}, which can't be signed; remove it")
            if not name.isprintable():
                raise refusal(f"{shown}: has a name that is not plain text; rename it")
        found += [(where / name).relative_to(root).as_posix() for name in files]
    return sorted(name for name in found if name != SIGNATURE)


def _signed(root: Path, has_key: bool) -> dict[str, str]:
    """The files that the signature lists, and their sha256 where it says so.

    Read before it is verified, so not to be believed yet.
    """
    path = root / SIGNATURE
    if not os.path.lexists(path):
        raise SignatureRefused(f"{root}: is not signed ({SIGNATURE} is missing)")
    if not path.is_file() or path.stat().st_size > _LARGEST_SIGNATURE:
        raise SignatureRefused(f"{path}: is no signature (not a file of at most {_LARGEST_SIGNATURE} bytes)")
    with contextlib.suppress(ValueError, TypeError, KeyError, AttributeError, RecursionError):
        bundle = json.loads(path.read_bytes())
        statement = json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"]))
        named = not has_key or bundle["verificationMaterial"]["publicKey"]["hint"]
        predicate = statement["predicate"]
        if named and statement["predicateType"] == _PREDICATE:
            sharded = predicate["serialization"]["method"] == "shards"
            listed = [
                (entry["name"].rsplit(":", 2)[0] if sharded else entry["name"], entry)
                for entry in predicate["resources"]
            ]
            return {
                name: entry["digest"] if entry["algorithm"] == "sha256" and not sharded else ""
                for name, entry in listed
            }
    raise SignatureRefused(f"{path}: is no signature of this kind; sign the folder again")


def _differences(root: Path, names: list[str], signed: Mapping[str, str]) -> str:
    added, removed = sorted(set(names) - signed.keys()), sorted(signed.keys() - set(names))
    changed = [name for name in names if signed.get(name) and signed[name] != _sha256(root / name)]
    found = {"changed": changed, "added": added, "removed": removed}
    return "; ".join(f"{what} since it was signed: {_listed(files)}" for what, files in found.items() if files)


def _listed(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_new(path: Path, data: bytes, mode: int) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(descriptor)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _library() -> Any:
    try:
        import model_signing.hashing
        import model_signing.signing
        import model_signing.verifying
    except ImportError as error:
        raise MissingDependency("pyOpenSSL" if error.name == "OpenSSL" else "model-signing", "sign") from error
    return model_signing
