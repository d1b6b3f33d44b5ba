"""A signature with a certificate: who vouches for the key, up to a root that the verifier trusts.

Asked of every certificate of the chain, the signer's and the root's included: valid on that day (today, or ``at`` for
old archives), and signed by the next one (OpenSSL's check). Of the signer's: the usages digitalSignature and code
signing. Of all others: that they are authorities that may sign certificates. The signature holds the chain below the
root in order, so that there is one form of it.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rarefy.artifact import signature
from rarefy.artifact.signature import LARGEST, PathLike
from rarefy.errors import FormatError, InputError, SignatureRefused
from rarefy.system.files import content

if TYPE_CHECKING:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
    from cryptography.x509 import Certificate

LONGEST = 10  # certificates of a chain


def day(text: str) -> datetime.datetime:
    """``2026-05-31``, or with a time: the moment, in UTC. Raises InputError."""
    try:
        found = datetime.datetime.fromisoformat(text)
    except ValueError:
        raise InputError(f"--at {text!r}: is no date; write it as 2026-05-31") from None
    return found if found.tzinfo is not None else found.replace(tzinfo=datetime.UTC)


def by_chain(data: bytes, trusted: Sequence[PathLike], at: datetime.datetime | None, path: Path) -> dict[str, str]:
    """{file: sha256} that was signed by whom one of the roots in ``trusted`` (PEM) vouches for, on the day ``at``."""
    roots = load(trusted)
    bundle = signature.parse(data, path)
    if bundle.hint is not None:
        raise SignatureRefused(
            f"{path}: is no signature of this kind but one with a key alone; verify with --key [signature-kind]"
        )
    from cryptography import x509

    try:
        given = [x509.load_der_x509_certificate(one) for one in bundle.certificates[:LONGEST]]
        if not given or len(given) < len(bundle.certificates):
            raise ValueError("1 to 10 certificates are wanted")
    except ValueError as error:
        raise SignatureRefused(f"{path}: holds no chain of certificates ({_line(error)}) [certificate-form]") from error
    moment = at or datetime.datetime.now(datetime.UTC)
    chain = _verified(given, roots, moment, path)
    told = complaint(chain, moment)
    if told is not None:
        raise SignatureRefused(f"{path}: {told}")
    files, ours = signature.statement(bundle, _key(chain[0], path), path)
    if given != (chain[:-1] or chain) and (ours or given != chain):
        raise SignatureRefused(
            f"{path}: does not hold the chain below its root in order, and no other one; sign again with --chain "
            "[certificate-order]"
        )
    return files


def load(paths: Sequence[PathLike]) -> list[Certificate]:
    """The certificates of PEM files. Raises InputError."""
    from cryptography import x509

    found: list[Certificate] = []
    for path in paths:
        try:
            found += x509.load_pem_x509_certificates(content(path, LARGEST))
        except FormatError as error:
            raise InputError(str(error).replace("can't be read", "can't verify with it: can't be read")) from error
        except ValueError as error:
            raise InputError(f"{path}: can't verify with it (no certificate in PEM); give one that begins with "
                             "-----BEGIN CERTIFICATE-----") from error  # fmt: skip
    return found


def in_order(own: bytes, others: Sequence[bytes]) -> tuple[bytes, ...]:
    """Certificates (DER): the signer's, who vouches for it, and so on; roots, and others, are left out."""
    from cryptography import x509

    left = [x509.load_der_x509_certificate(one) for one in others]
    found = [x509.load_der_x509_certificate(own)]
    while following := [one for one in left if one.subject == found[-1].issuer != one.issuer]:
        found.append(following[0])
        left.remove(following[0])
    return tuple(one.public_bytes(_der()) for one in found)


def doubt(certificate: PathLike, chain: Sequence[PathLike]) -> str | None:
    """Why nobody will accept, today, what is signed with this certificate; None: nothing is known against it."""
    own, others = load([certificate])[:1], load(chain)
    now = datetime.datetime.now(datetime.UTC)
    try:
        return complaint(_verified([*own, *others], others, now, Path(certificate)), now)
    except SignatureRefused as error:
        return str(error)


def _verified(
    given: Sequence[Certificate], roots: Sequence[Certificate], at: datetime.datetime, path: Path
) -> list[Certificate]:
    """From the first of ``given`` up to one of the roots. Raises SignatureRefused."""
    from OpenSSL import crypto

    store = crypto.X509Store()
    for root in roots:
        store.add_cert(crypto.X509.from_cryptography(root))
    store.set_time(at.astimezone(datetime.UTC).replace(tzinfo=None))
    first, *others = [crypto.X509.from_cryptography(one) for one in given]
    try:
        found = crypto.X509StoreContext(store, first, others).get_verified_chain()
    except crypto.X509StoreContextError as error:
        subject = error.certificate.to_cryptography().subject.rfc4514_string()
        raise SignatureRefused(
            f"{path}: the certificate {subject[:100]!r} is not accepted on {at:%Y-%m-%d} ({_line(error)}); "
            f"{_way_out(error)} [certificate-chain]"
        ) from error
    return [one.to_cryptography() for one in found]


def complaint(chain: Sequence[Certificate], at: datetime.datetime) -> str | None:
    """What is wrong with a chain whose signatures are right; None: nothing."""
    from cryptography import x509
    from cryptography.x509.oid import ExtendedKeyUsageOID

    for place, one in enumerate(chain):
        name = f"the certificate {one.subject.rfc4514_string()[:100]!r}"
        if not one.not_valid_before_utc <= at <= one.not_valid_after_utc:
            return (
                f"{name} is valid from {one.not_valid_before_utc:%Y-%m-%d} to {one.not_valid_after_utc:%Y-%m-%d}, not "
                f"on {at:%Y-%m-%d}; for an old archive pass --at with the day it was signed [certificate-expired]"
            )
        try:
            found = {type(extension.value): extension.value for extension in one.extensions}
        except ValueError as error:
            return f"{name} can't be read ({_line(error)}) [certificate-form]"
        usage, extended, basic = (
            found.get(kind) for kind in (x509.KeyUsage, x509.ExtendedKeyUsage, x509.BasicConstraints)
        )
        purposes = {*extended} if isinstance(extended, x509.ExtendedKeyUsage) else set()
        authority = isinstance(basic, x509.BasicConstraints) and basic.ca
        signs = isinstance(usage, x509.KeyUsage) and usage.digital_signature
        vouches = authority and (not isinstance(usage, x509.KeyUsage) or usage.key_cert_sign)
        if place == 0 and not signs:
            return f"{name} has not the key usage digitalSignature; sign with one that has it [certificate-usage]"
        if place == 0 and ExtendedKeyUsageOID.CODE_SIGNING not in purposes:
            return f"{name} has not the extended key usage codeSigning; sign with one that has it [certificate-usage]"
        if place == 0 and authority and len(chain) > 1:
            return f"{name} is one of an authority; sign with one of a signer [certificate-usage]"
        broad = {ExtendedKeyUsageOID.CODE_SIGNING, ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE}
        if place > 0 and one.subject != one.issuer and purposes and not broad & purposes:
            return f"{name} vouches for no code signing; use a chain of authorities that do [certificate-authority]"
        if place > 0 and not vouches:
            return (
                f"{name} is not one of an authority (CA, keyCertSign), and vouches for another [certificate-authority]"
            )
    return None


def _der() -> serialization.Encoding:
    from cryptography.hazmat.primitives import serialization

    return serialization.Encoding.DER


def _key(certificate: Certificate, path: Path) -> EllipticCurvePublicKey:
    try:
        return signature.checked_curve(certificate.public_key(), path, "verify")
    except (InputError, ValueError) as error:
        raise SignatureRefused(
            f"{path}: the certificate's key is of no kind that signs models [certificate-key]"
        ) from error


def _way_out(error: Exception) -> str:
    if "expired" in str(error) or "not yet valid" in str(error):
        return "for an old archive pass --at with the day it was signed"
    return "pass the certificates up to the right root with --chain"


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
