"""model.sig: one form, so that no other bytes say the same, and what it takes to believe it.

A Sigstore bundle (one line of JSON, as the model signing library writes it) around a DSSE envelope, whose payload is an
in-toto statement with the sha256 of every file. Of a bundle that a key or a certificate signed every byte counts: it is
parsed, written again from what was understood, and compared. ECDSA leaves one freedom, (r, -s) fits where (r, s) does:
what rarefy signs has the smaller s, and the other one is refused.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from io import BufferedReader
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from rarefy.artifact.directory import read_at_most
from rarefy.errors import FormatError, InputError, MissingDependency, SignatureRefused
from rarefy.system import strict_json
from rarefy.system.files import content

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey

SIGNATURE = "model.sig"
LARGEST = 16 * 2**20
LARGEST_KEY = 2**16
CURVES = {"secp256r1": "SHA256", "secp384r1": "SHA384", "secp521r1": "SHA512"}  # and the hash that goes with each

_MEDIA = "application/vnd.dev.sigstore.bundle.v0.3+json"
_PAYLOAD = "application/vnd.in-toto+json"
_STATEMENT = "https://in-toto.io/Statement/v1"
_PREDICATE = "https://model_signing/signature/v1.0"

PathLike = str | os.PathLike[str]


class Bundle(NamedTuple):
    """hint: sha256 of the public key; None where there are certificates (DER, the signer's first)."""

    hint: str | None
    certificates: tuple[bytes, ...]
    payload: bytes
    signature: bytes

    @property
    def text(self) -> bytes:
        """The bytes of model.sig."""
        if self.hint is None:
            chain = [{"rawBytes": _base64(one)} for one in self.certificates]
            material: dict[str, object] = {"x509CertificateChain": {"certificates": chain}, "tlogEntries": []}
        else:
            material = {"publicKey": {"hint": self.hint}, "tlogEntries": []}
        envelope = {
            "payload": _base64(self.payload),
            "payloadType": _PAYLOAD,
            "signatures": [{"sig": _base64(self.signature), "keyid": ""}],
        }
        whole = {"mediaType": _MEDIA, "verificationMaterial": material, "dsseEnvelope": envelope}
        return json.dumps(whole, separators=(",", ":")).encode()


def read(file: BufferedReader, path: Path) -> bytes:
    """The bytes of model.sig, read once. Raises SignatureRefused."""
    try:
        return read_at_most(file, LARGEST, path)
    except FormatError as error:
        raise SignatureRefused(
            f"{path}: is no signature (not a file of at most {LARGEST} bytes) [signature-form]"
        ) from error


def by_key(data: bytes, public_key: PathLike, path: Path) -> dict[str, str]:
    """{file: sha256} that the owner of ``public_key`` (PEM) signed. Raises InputError for a key that is none."""
    key = load_public(public_key)
    bundle = parse(data, path)
    if bundle.hint is None:
        raise SignatureRefused(
            f"{path}: is no signature of this kind but one with a certificate; verify with its --chain [signature-kind]"
        )
    if bundle.hint != hint_of(key):
        raise other_key(path)
    return statement(bundle, key, path)[0]


def parse(data: bytes, path: Path) -> Bundle:
    """What model.sig holds. Nothing of it is believed yet."""
    hint: str | None
    certificates: tuple[bytes, ...]
    refused = SignatureRefused(f"{path}: is no signature of this kind; sign the folder again [signature-form]")
    try:
        whole = strict_json.parse(data, path)
        envelope, material = whole["dsseEnvelope"], whole["verificationMaterial"]
        (signature,) = envelope["signatures"]
        if "publicKey" in material:
            hint, certificates = material["publicKey"]["hint"], ()
        else:
            chain = material["x509CertificateChain"]["certificates"]
            hint, certificates = None, tuple(base64.b64decode(one["rawBytes"], validate=True) for one in chain)
        bundle = Bundle(
            hint,
            certificates,
            base64.b64decode(envelope["payload"], validate=True),
            base64.b64decode(signature["sig"], validate=True),
        )
        if hint is not None and not isinstance(hint, str):
            raise refused
        written = bundle.text
    except (FormatError, ValueError, TypeError, KeyError, AttributeError, binascii.Error) as error:
        raise refused from error
    if written != data:
        raise SignatureRefused(
            f"{path}: is no signature of this kind: its bytes are others than a signer writes; "
            "copy it, or sign the folder, again [signature-bytes]"
        )
    return bundle


def statement(bundle: Bundle, key: EllipticCurvePublicKey, path: Path) -> tuple[dict[str, str], bool]:
    """{file: sha256}, once the key is known to have signed it; was it rarefy that wrote it? Raises SignatureRefused."""
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec, utils

    try:
        r, s = utils.decode_dss_signature(bundle.signature)
        if utils.encode_dss_signature(r, s) != bundle.signature:
            raise InvalidSignature
        signed = f"DSSEv1 {len(_PAYLOAD)} {_PAYLOAD} {len(bundle.payload)} ".encode() + bundle.payload
        key.verify(bundle.signature, signed, ec.ECDSA(getattr(hashes, CURVES[key.curve.name])()))
    except (InvalidSignature, ValueError) as error:
        raise other_key(path) from error
    files, ours = _files(bundle.payload, path)
    if ours and s != smaller(s, key):
        raise SignatureRefused(f"{path}: is no signature of this kind: s is the larger one [signature-bytes]")
    return files, ours


def _files(payload: bytes, path: Path) -> tuple[dict[str, str], bool]:
    """The files of a statement and their sha256; was it rarefy that wrote it? (It leaves out nothing but model.sig.)"""
    try:
        whole = strict_json.parse(payload, path)
        predicate = whole["predicate"]
        serialization, listed = predicate["serialization"], predicate["resources"]
        good = whole["_type"] == _STATEMENT and whole["predicateType"] == _PREDICATE
        good = good and serialization["method"] == "files" and all(one["algorithm"] == "sha256" for one in listed)
        found = {one["name"]: one["digest"] for one in listed}
        whole_digest = hashlib.sha256(b"".join(bytes.fromhex(one["digest"]) for one in listed)).hexdigest()
        (subject,) = whole["subject"]
        good = good and len(found) == len(listed) and subject["digest"] == {"sha256": whole_digest}
        ours = serialization.get("ignore_paths") == [SIGNATURE]
    except (FormatError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise SignatureRefused(
            f"{path}: signs no list of files; sign the folder again [signature-statement]"
        ) from error
    if not good:
        raise SignatureRefused(f"{path}: signs no list of files by their sha256; sign the folder again "
                               "[signature-statement]")  # fmt: skip
    return found, ours


def of_any(data: bytes, path: Path) -> dict[str, str]:
    """{file: sha256} of a bundle that someone else has verified (Sigstore's, with entries of a log in it)."""
    try:
        payload = base64.b64decode(strict_json.parse(data, path)["dsseEnvelope"]["payload"], validate=True)
    except (FormatError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise SignatureRefused(
            f"{path}: is no signature of this kind; sign the folder again [signature-form]"
        ) from error
    return _files(payload, path)[0]


def in_one_form(data: bytes, path: Path, key: EllipticCurvePublicKey, certificates: tuple[bytes, ...] = ()) -> bytes:
    """What the library wrote, in the form that rarefy accepts of its own; with these certificates."""
    from cryptography.hazmat.primitives.asymmetric import utils

    bundle = parse(data, path)
    r, s = utils.decode_dss_signature(bundle.signature)
    least = utils.encode_dss_signature(r, smaller(s, key))
    return bundle._replace(signature=least, certificates=certificates).text


def smaller(s: int, key: EllipticCurvePublicKey) -> int:
    """The smaller one of s and its negative, modulo the order of the curve."""
    order = _ORDERS[key.curve.name]
    return min(s, order - s)


# of the curves' groups (SEC 2)
_ORDERS = {
    "secp256r1": 2**256 - 2**224 + 2**192 - 0x4319055258E8617B0C46353D039CDAAF,
    "secp384r1": 2**384 - 0x389CB27E0BC8D220A7E5F24DB74F58851313E695333AD68D,
    "secp521r1": 2**521 - 0x5AE79787C40D069948033FEB708F65A2FC44A36477663B851449048E16EC79BF7,
}


def load_public(path: PathLike) -> EllipticCurvePublicKey:
    """A public key (PEM). Raises InputError, which says what it is instead."""
    try:
        from cryptography.hazmat.primitives import serialization
    except ImportError as error:
        raise MissingDependency("cryptography", "sign") from error
    try:
        data = content(path, LARGEST_KEY)
        if b"PRIVATE KEY" in data:
            raise InputError(f"{path}: can't verify with it (a private key); give the public one, {path}.pub")
        key = serialization.load_pem_public_key(data)
    except InputError as error:
        if "can't verify with it" in str(error):
            raise
        raise InputError(f"{path}: can't verify with it ({_bare(error, path)})") from error
    except Exception as error:  # the library has exceptions of its own for keys that it knows and can't take
        raise InputError(
            f"{path}: can't verify with it (no public key in PEM); give the file that ends in .pub"
        ) from error
    return checked_curve(key, path, "verify")


def checked_curve(key: object, path: PathLike, verb: str) -> EllipticCurvePublicKey:
    """The public key, if it is of a kind that signs models. Raises InputError."""
    from cryptography.hazmat.primitives.asymmetric import ec

    if isinstance(key, ec.EllipticCurvePublicKey) and key.curve.name in CURVES:
        return key
    kind = key.curve.name if isinstance(key, ec.EllipticCurvePublicKey) else type(key).__name__.strip("_")
    raise InputError(
        f"{path}: can't {verb} with it ({kind.removesuffix('PublicKey')} is not a kind of key that signs models); "
        "make a key of the curve P-256 with `rarefy keygen`"
    )


def hint_of(key: EllipticCurvePublicKey) -> str:
    """sha256 of the key's PEM."""
    from cryptography.hazmat.primitives import serialization

    form = serialization.PublicFormat.SubjectPublicKeyInfo
    return hashlib.sha256(key.public_bytes(serialization.Encoding.PEM, form)).hexdigest()


def other_key(path: Path) -> SignatureRefused:
    return SignatureRefused(f"{path}: was changed, or made with another key than this [signature-key]")


def differences(found: Mapping[str, Sequence[str]]) -> str:
    """``changed since it was signed: a, b; added ...``, in one line."""
    told = {what: [name if name.isprintable() else repr(name) for name in names] for what, names in found.items()}
    return "; ".join(
        f"{what} since it was signed: {', '.join(names[:5])}{f' and {len(names) - 5} more' if len(names) > 5 else ''}"
        for what, names in told.items()
        if names
    ) + (f" [signed-{next(what for what, names in told.items() if names)}]" if any(told.values()) else "")


def _bare(error: Exception, path: PathLike) -> str:
    return str(error).removeprefix(f"{path}: ").partition(" [")[0]


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")
