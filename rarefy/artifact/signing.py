"""keygen(), sign() and verify(): who made the folder, and that every byte of it is theirs.

The signature is OpenSSF's model signing (model.sig: a Sigstore bundle around an in-toto statement that lists the sha256
of every file), made by its own library, so ``model_signing verify`` reads it too. Three ways to sign:

    a key pair     keygen("me.pem"); sign(folder, "me.pem"); verify(folder, "me.pem.pub")      EC P-256, no network
    a certificate  sign(folder, key, certificate=..., chain=[...]); verify(folder, chain=[...])
    Sigstore       sign(folder, sigstore=True); verify(folder, identity="me@example.org", issuer="https://...")

What the library leaves open is closed here: it skips git's files, does not see folders, and asks little of certificates
(``rarefy.artifact.certificates``). ``verify`` reads every entry below the folder once, through the folder's own handle,
and compares it with the signed list, so a file added, hidden or not, a link, an empty folder, or a device is refused as
a changed byte is. ``load(folder, key=...)`` checks the very bytes that it loads (``rarefy.artifact.snapshot``).
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rarefy.artifact import certificates, signature, snapshot
from rarefy.artifact.directory import Directory
from rarefy.artifact.signature import LARGEST_KEY, SIGNATURE, PathLike
from rarefy.errors import FormatError, InputError, MissingDependency, RarefyError, SignatureRefused
from rarefy.system.files import content, replacing

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey

MOST_FILES = 100_000  # of a folder to sign
DEEPEST = 32


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
        with _gone_if_it_fails(private):
            _write_new(private, secret, 0o600)
            with _gone_if_it_fails(public):
                _write_new(public, known, 0o644)
    except OSError as error:
        raise InputError(
            f"{error.filename or private}: can't be written ({error.strerror}), and nothing is left of it; choose "
            "another place for the key"
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

    key: the private key, PEM: of the curve P-256, P-384 or P-521. password: of that key.
    certificate: the key's certificate, and chain: those up to the root, PEM.
    sigstore: sign with Sigstore instead; a dictionary is passed to model_signing's ``use_sigstore_signer``
        (identity_token, use_ambient_credentials, use_staging, oidc_issuer, trust_config, ...).

    Raises InputError if the folder holds what can't be signed (links, empty folders, a private key) or the key is none;
    nothing is written then.
    """
    library = _library()
    root = Path(folder)
    if (key is None) == (not sigstore):
        raise InputError("sign with one of a key and sigstore=True; make a key with keygen")
    if certificate is not None and key is None:
        raise InputError(f"{certificate}: a certificate signs with its private key; pass key=")
    if certificate is not None and not chain:
        raise InputError(f"{certificate}: needs those that vouch for it, up to the root; pass --chain")
    if key is not None and Path(key).resolve().is_relative_to(root.resolve()):
        raise InputError(f"{key}: lies in the folder to sign, and would be published with it; move the key elsewhere")
    _check_signable(root)
    public = None if key is None else _public_of(key, password)
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
    except Exception as error:  # of files, of cryptography, of Sigstore's network
        way_out = _NETWORK if sigstore else "give a private key, and its certificates, in PEM"
        raise InputError(
            f"{certificate or key or 'sigstore'}: can't sign with it ({_line(error)}); {way_out}"
        ) from error
    try:
        with tempfile.TemporaryDirectory(prefix="rarefy-") as place:
            written = Path(place) / SIGNATURE
            config.sign(root, written)
            data = written.read_bytes()
        if public is not None:
            data = _in_one_form(data, root / SIGNATURE, public)
        with replacing(root / SIGNATURE) as temporary:
            temporary.write_bytes(data)
    except Exception as error:  # the library passes on what its network, crypto and file layers raise
        way_out = f"; {_NETWORK}" if sigstore else ""
        raise InputError(f"{root}: can't be signed ({_line(error)}){way_out}") from error
    return root / SIGNATURE


_NETWORK = "Sigstore needs a network, and who you are; sign with a key of `rarefy keygen` where there is none"


def _in_one_form(data: bytes, path: Path, public: EllipticCurvePublicKey) -> bytes:
    own, *others = signature.parse(data, path).certificates or (b"",)
    chain = certificates.in_order(own, others) if own else ()
    return signature.in_one_form(data, path, public, chain)


def _public_of(key: PathLike, password: str | None) -> EllipticCurvePublicKey:
    """The public half of a private key (PEM). Raises InputError for a key that is none, or of no kind that signs."""
    from cryptography.hazmat.primitives import serialization

    try:
        data = content(key, LARGEST_KEY)
        private = serialization.load_pem_private_key(data, password.encode() if password else None)
    except Exception as error:  # the library has exceptions of its own for keys that it knows and can't take
        told = str(error).removeprefix(f"{key}: ").partition(" [")[0]
        raise InputError(f"{key}: can't sign with it ({' '.join(told.split())[:200]}); give a private key in PEM, its "
                         "password in $RAREFY_KEY_PASSWORD") from error  # fmt: skip
    return signature.checked_curve(private.public_key(), key, "sign")


def _check_signable(root: Path) -> None:
    """Raises InputError for a folder that holds nothing, what can't be signed, or somebody's private key."""
    with _directory(root) as directory:
        found: dict[str, str] = {}
        for name, kept, entry in _walk(directory, InputError):
            with kept.open(entry) as file:
                start = file.read(LARGEST_KEY)
                file.seek(0)
                found[name] = hashlib.file_digest(file, "sha256").hexdigest()
            if _is_private(start):
                raise InputError(
                    f"{root / name}: is a private key, which would be published with the folder; move it elsewhere"
                )
    found.pop(SIGNATURE, None)
    if not found:
        raise InputError(f"{root}: holds no file to sign")
    _check_manifest(root, found, InputError)


def _is_private(start: bytes) -> bool:
    """Does a file begin like a private key, in PEM or in DER?"""
    if b"PRIVATE KEY-----" in start:
        return True
    if len(start) >= LARGEST_KEY or not start.startswith(b"\x30"):
        return False
    from cryptography.hazmat.primitives import serialization

    try:
        serialization.load_der_private_key(start, None)
    except TypeError:
        return True  # an encrypted one
    except Exception:  # whatever the library raises of bytes that are no key
        return False
    return True


def verify(
    folder: PathLike,
    public_key: PathLike | None = None,
    *,
    chain: Sequence[PathLike] = (),
    at: str | datetime.datetime | None = None,
    identity: str | None = None,
    issuer: str | None = None,
    sigstore: Mapping[str, object] | None = None,
) -> list[str]:
    """Is every file of ``folder`` as it was signed, and none added or removed? Returns their names, sorted.

    public_key: PEM, for a folder signed with a key.
    chain: root (and intermediate) certificates to trust, PEM, for one signed with a certificate. at: the day on which
        they must be valid, "2026-05-31" or a datetime; None: today.
    identity, issuer: who must have signed, and who must have vouched for them, for one signed with Sigstore;
        ``sigstore``: further arguments of model_signing's ``use_sigstore_verifier`` (use_staging, trust_config).

    Raises SignatureRefused, which names the files, and InputError for a folder or a key that is none.
    """
    library = _library()
    if (public_key is not None) + bool(chain) + (identity is not None) != 1:
        raise InputError("verify with one of a public key, a certificate chain, and identity= with issuer=")
    if at is not None and not chain:
        raise InputError("--at is the day on which certificates must be valid; pass --chain, or leave it out")
    if identity is not None and not issuer:
        raise InputError("--identity needs --issuer, who vouched for it: https://accounts.google.com, for example")
    path = Path(folder) / SIGNATURE
    moment = certificates.day(at) if isinstance(at, str) else at
    if public_key is not None:
        signature.load_public(public_key)  # what is no key is told first
    with _directory(Path(folder)) as directory:
        data = _signature_of(directory)
        if public_key is not None:
            signed = signature.by_key(data, public_key, path)
        elif chain:
            signed = certificates.by_chain(data, chain, moment, path)
        else:
            signed = _by_sigstore(library, data, Path(folder), {"identity": identity, "oidc_issuer": issuer,
                                                               **(sigstore or {})})  # fmt: skip
        found = {}
        for name, kept, entry in _walk(directory, SignatureRefused):
            with kept.open(entry) as file:
                found[name] = hashlib.file_digest(file, "sha256").hexdigest()
    found.pop(SIGNATURE, None)
    told = signature.differences(
        {
            "changed": sorted(name for name in found.keys() & signed.keys() if found[name] != signed[name]),
            "added": sorted(found.keys() - signed.keys()),
            "removed": sorted(signed.keys() - found.keys()),
        }
    )
    if told:
        raise SignatureRefused(f"{folder}: {told}")
    _check_manifest(Path(folder), found, SignatureRefused)
    return sorted(found)


def _check_manifest(root: Path, found: Mapping[str, str], refusal: type[RarefyError]) -> None:
    """Does the manifest of a saved folder list what is there? ``found``: {file: sha256}. Raises ``refusal``."""
    if not snapshot.is_saved(root):
        return
    manifest = snapshot.read_manifest(root)
    listed = {name: one["sha256"] for name, one in manifest["files"].items()}
    differing = {name for name in found.keys() | listed.keys() if found.get(name) != listed.get(name)}
    odd = sorted(differing - {snapshot.MANIFEST, SIGNATURE})
    if odd:
        raise refusal(
            f"{root}: {', '.join(odd[:5])} is not as {snapshot.MANIFEST} lists it; save it again, or move out of the "
            "folder what is not the model's [file-unlisted]"
        )
    try:
        snapshot.check_content(manifest, root)
    except FormatError as error:
        raise refusal(str(error)) from error


def is_signed(folder: PathLike) -> bool:
    """Is there a signature at all? (``verify`` says what it is worth.)"""
    return os.path.lexists(Path(folder) / SIGNATURE)


def _directory(path: Path) -> Directory:
    if not path.is_dir():
        raise InputError(f"{path}: no such folder")
    return Directory(path)


def _signature_of(directory: Directory) -> bytes:
    path = directory.path / SIGNATURE
    if not os.path.lexists(path):
        raise SignatureRefused(f"{directory.path}: is not signed ({SIGNATURE} is missing) [signature-missing]")
    try:
        with directory.open(SIGNATURE, most=signature.LARGEST) as file:
            return signature.read(file, path)
    except FormatError as error:
        why = str(error).removeprefix(f"{path}: ").partition(" [")[0]
        raise SignatureRefused(
            f"{path}: {why}, so it is no signature; copy the folder again [signature-form]"
        ) from error


def _by_sigstore(library: Any, data: bytes, root: Path, options: Mapping[str, object]) -> dict[str, str]:
    config = library.verifying.Config()
    try:
        config.use_sigstore_verifier(**options)
    except Exception as error:  # of its network, and of its options
        raise InputError(
            f"{options['identity']}: can't verify with it ({_line(error)}); Sigstore's keys come over the network: "
            "connect, or verify with --key or --chain"
        ) from error
    with tempfile.TemporaryDirectory(prefix="rarefy-") as place:
        copy = Path(place) / SIGNATURE  # what is read here is what the library verifies
        copy.write_bytes(data)
        try:
            config.verify(root, copy)
        except Exception as error:  # a hostile signature may raise anything in the library's parsers
            if "Signature mismatch" not in str(error):
                raise SignatureRefused(
                    f"{root / SIGNATURE}: was changed, or made by another than {options['identity']} ({_line(error)}) "
                    "[signature-key]"
                ) from error
    return signature.of_any(data, root / SIGNATURE)


def _walk(directory: Directory, refusal: type[RarefyError], above: str = "") -> Iterator[tuple[str, Directory, str]]:
    """(name below the folder, its folder, its name there) of every file; ``refusal`` is raised for what is none."""
    try:
        names = directory.names(MOST_FILES)
        if above and not names:
            raise refusal(f"{directory.path}: an empty folder can't be signed; remove it [signed-kind]")
        if above.count("/") > DEEPEST:
            raise refusal(f"{directory.path}: lies more than {DEEPEST} folders deep [signed-kind]")
        for name in names:
            shown = repr(str(directory.path / name))[1:-1]
            kind = directory.kind(name)
            if kind not in ("file", "folder"):
                what = "a symbolic link" if kind == "symbolic link" else "no ordinary file"
                raise refusal(f"{shown}: is {what}, which can't be signed; remove it [signed-kind]")
            if not name.isprintable():
                raise refusal(f"{shown}: has a name that is not plain text; rename it [signed-kind]")
            if kind == "file":
                yield f"{above}{name}", directory, name
                continue
            with directory.folder(name) as inner:
                yield from _walk(inner, refusal, f"{above}{name}/")
    except (FormatError, OSError) as error:
        raise refusal(
            str(error) if isinstance(error, FormatError) else f"{directory.path}: {error.strerror}"
        ) from error


@contextlib.contextmanager
def _gone_if_it_fails(path: Path) -> Iterator[None]:
    try:
        yield
    except FileExistsError:
        raise  # another's
    except BaseException:
        path.unlink(missing_ok=True)
        raise


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
