import datetime
import json
import os
import stat
import sys

import pytest

from rarefy.artifact import signing
from rarefy.errors import InputError, MissingDependency, SignatureRefused

pytest.importorskip("model_signing", reason="signing needs pip install 'rarefy[sign]'")


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    return signing.keygen(tmp_path_factory.mktemp("keys") / "me.pem")


@pytest.fixture
def signed(tmp_path, keys):
    folder = tmp_path / "model"
    (folder / "more" / "deep").mkdir(parents=True)
    for name in ("graph.json", "weights.safetensors", ".hidden", "more/report.html", "more/deep/x.bin"):
        (folder / name).write_text(name * 10)
    signing.sign(folder, keys[0])
    return folder


def test_what_was_signed_is_accepted(signed, keys):
    names = [".hidden", "graph.json", "more/deep/x.bin", "more/report.html", "weights.safetensors"]
    assert signing.verify(signed, keys[1]) == names
    moved = signed.rename(signed.with_name("elsewhere"))
    assert signing.verify(moved, public_key=keys[1]) == names


def flip(folder):
    data = bytearray((folder / "weights.safetensors").read_bytes())
    data[7] ^= 1
    (folder / "weights.safetensors").write_bytes(data)


def replace_by_link(folder):
    (folder / "graph.json").rename(folder.parent / "graph.json")
    (folder / "graph.json").symlink_to(folder.parent / "graph.json")


def swap(folder):
    (folder / "graph.json").rename(folder / "x")
    (folder / "weights.safetensors").rename(folder / "graph.json")
    (folder / "x").rename(folder / "weights.safetensors")


CHANGES = {
    "a changed bit": (flip, "changed since it was signed: weights.safetensors"),
    "a changed hidden file": (
        lambda folder: (folder / ".hidden").write_text(""),
        "changed since it was signed: .hidden",
    ),
    "a byte more": (
        lambda folder: (folder / "more/report.html").write_text("more/report.html" * 10 + "x"),
        "changed since it was signed: more/report.html",
    ),
    "an emptied file": (
        lambda folder: (folder / "more/deep/x.bin").write_bytes(b""),
        "changed since it was signed: more/deep/x.bin",
    ),
    "two files swapped": (swap, "changed since it was signed: graph.json, weights.safetensors"),
    "an added file": (lambda folder: (folder / "x").write_text("x"), "added since it was signed: x"),
    "an added empty file": (lambda folder: (folder / "x").touch(), "added since it was signed: x"),
    "an added hidden file": (lambda folder: (folder / ".x").touch(), "added since it was signed: .x"),
    "an added file of git": (lambda folder: (folder / ".gitignore").touch(), "added since it was signed: .gitignore"),
    "an added folder of git": (
        lambda folder: [(folder / ".git").mkdir(), (folder / ".git/config").touch()],
        "added since it was signed: .git/config",
    ),
    "an added signature below": (
        lambda folder: (folder / "more/model.sig").touch(),
        "added since it was signed: more/model.sig",
    ),
    "an added empty folder": (lambda folder: (folder / "empty").mkdir(), "an empty folder"),
    "an added link": (lambda folder: (folder / "x").symlink_to("graph.json"), "x: is a symbolic link"),
    "an added link to nothing": (lambda folder: (folder / "x").symlink_to("nothing"), "x: is a symbolic link"),
    "an added link to a folder": (lambda folder: (folder / "x").symlink_to("more"), "x: is a symbolic link"),
    "a file made a link to itself": (replace_by_link, "graph.json: is a symbolic link"),
    "an added pipe": (lambda folder: os.mkfifo(folder / "x"), "x: is no ordinary file"),
    "an added name that is no text": (lambda folder: (folder / "a\nb").touch(), "not plain text"),
    "a removed file": (lambda folder: (folder / "graph.json").unlink(), "removed since it was signed: graph.json"),
    "a renamed file": (
        lambda folder: (folder / "graph.json").rename(folder / "g"),
        "added since it was signed: g; removed since .*: graph.json",
    ),
    "no signature": (lambda folder: (folder / "model.sig").unlink(), "is not signed"),
    "a signature that is a folder": (
        lambda folder: [
            (folder / "model.sig").unlink(),
            (folder / "model.sig").mkdir(),
            (folder / "model.sig/x").touch(),
        ],
        "no signature",
    ),
    "a signature that is a link": (
        lambda folder: [
            (folder / "model.sig").rename(folder.parent / "s"),
            (folder / "model.sig").symlink_to(folder.parent / "s"),
        ],
        "model.sig: is a symbolic link",
    ),
    "a signature that is no JSON": (lambda folder: (folder / "model.sig").write_bytes(b"\x80\x04"), "no signature"),
    "a signature of nothing": (lambda folder: (folder / "model.sig").write_text("{}"), "no signature"),
    "a deep signature": (lambda folder: (folder / "model.sig").write_text("[" * 100_000), "no signature"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_anything_else_is_refused(change, signed, keys):
    apply, words = CHANGES[change]
    apply(signed)
    with pytest.raises(SignatureRefused, match=words) as refusal:
        signing.verify(signed, keys[1])
    assert "\n" not in str(refusal.value)


def _edit(folder, change):
    path = folder / "model.sig"
    bundle = json.loads(path.read_text())
    change(bundle)
    path.write_text(json.dumps(bundle, separators=(",", ":")))


@pytest.mark.parametrize(
    "change",
    [
        lambda bundle: bundle["dsseEnvelope"]["signatures"][0].update(sig="AAAA"),
        lambda bundle: bundle["dsseEnvelope"].update(signatures=[]),
        lambda bundle: bundle["dsseEnvelope"].update(payloadType="text/plain"),
        lambda bundle: bundle.update(mediaType="text/plain"),
        lambda bundle: bundle["verificationMaterial"]["publicKey"].update(hint=""),
        lambda bundle: bundle["verificationMaterial"]["publicKey"].pop("hint"),
        lambda bundle: bundle["verificationMaterial"].pop("publicKey"),
        lambda bundle: bundle["dsseEnvelope"].update(payload="e30="),
    ],
)
def test_an_edited_signature_is_refused(change, signed, keys, capsys):
    _edit(signed, change)
    with pytest.raises(SignatureRefused, match=r"model\.sig"):
        signing.verify(signed, keys[1])
    assert capsys.readouterr().out == ""


def test_a_forged_list_is_refused(signed, keys):
    """The statement made to fit a changed file: its signature then does not fit."""
    import base64
    import hashlib

    flip(signed)
    digest = hashlib.sha256((signed / "weights.safetensors").read_bytes()).hexdigest()

    def forge(bundle):
        statement = json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"]))
        resources = statement["predicate"]["resources"]
        next(entry for entry in resources if entry["name"] == "weights.safetensors")["digest"] = digest
        root = hashlib.sha256(b"".join(bytes.fromhex(entry["digest"]) for entry in resources)).hexdigest()
        statement["subject"][0]["digest"]["sha256"] = root
        bundle["dsseEnvelope"]["payload"] = base64.b64encode(json.dumps(statement).encode()).decode()

    _edit(signed, forge)
    with pytest.raises(SignatureRefused, match="another key"):
        signing.verify(signed, keys[1])


def test_another_key_is_refused(signed, tmp_path):
    _, other = signing.keygen(tmp_path / "other.pem")
    with pytest.raises(SignatureRefused, match="another key"):
        signing.verify(signed, other)


def test_the_signature_of_another_folder_is_refused(signed, tmp_path, keys):
    other = tmp_path / "other"
    other.mkdir()
    (other / "graph.json").write_text("{}")
    signing.sign(other, keys[0])
    os.replace(other / "model.sig", signed / "model.sig")
    with pytest.raises(SignatureRefused, match="changed since it was signed: graph.json; added"):
        signing.verify(signed, keys[1])


def test_signing_again_replaces_the_signature(signed, keys):
    flip(signed)
    signing.sign(signed, keys[0])
    signing.verify(signed, keys[1])
    assert sorted(path.name for path in signed.iterdir()) == [
        ".hidden",
        "graph.json",
        "model.sig",
        "more",
        "weights.safetensors",
    ]


def test_what_others_signed_with_the_library_is_accepted_and_as_strictly(signed, keys):
    """model_signing's own command skips git's files; verify does not."""
    import model_signing

    (signed / "model.sig").unlink()
    skipping = model_signing.hashing.Config().set_ignored_paths(paths=["model.sig"], ignore_git_paths=True)
    config = model_signing.signing.Config().use_elliptic_key_signer(private_key=keys[0]).set_hashing_config(skipping)
    config.sign(signed, signed / "model.sig")
    signing.verify(signed, keys[1])
    (signed / ".gitignore").touch()
    with pytest.raises(SignatureRefused, match="added since it was signed: .gitignore"):
        signing.verify(signed, keys[1])


def test_the_library_accepts_ours(signed, keys):
    import model_signing

    config = model_signing.verifying.Config().use_elliptic_key_verifier(public_key=keys[1])
    config.verify(signed, signed / "model.sig")


# ----------------------------------------------------------------------------------------------------------------- keys


def test_a_key_is_on_the_disk_before_it_is_told(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.readlink(f"/proc/self/fd/{descriptor}")))
    assert synced == [] and [str(path) for path in signing.keygen(tmp_path / "me.pem")] == synced


def test_a_key_is_private_and_never_overwritten(tmp_path):
    private, public = signing.keygen(tmp_path / "new" / "me.pem")
    assert stat.S_IMODE(private.stat().st_mode) == 0o600
    assert private.read_text().startswith("-----BEGIN PRIVATE KEY-----")
    assert public.read_text().startswith("-----BEGIN PUBLIC KEY-----") and public.name == "me.pem.pub"
    before = private.read_bytes(), public.read_bytes()
    with pytest.raises(InputError, match="never overwritten"):
        signing.keygen(private)
    private.unlink()
    with pytest.raises(InputError, match=r"me\.pem\.pub: is there already"):
        signing.keygen(private)
    assert not private.exists() and public.read_bytes() == before[1]


def test_a_key_with_a_password(tmp_path, signed):
    private, public = signing.keygen(tmp_path / "locked.pem", password="open sesame")
    assert private.read_text().startswith("-----BEGIN ENCRYPTED PRIVATE KEY-----")
    signing.sign(signed, private, password="open sesame")
    signing.verify(signed, public)
    for wrong in (None, "close sesame"):
        with pytest.raises(InputError, match="locked.pem: can't sign with it"):
            signing.sign(signed, private, password=wrong)


def test_wrong_keys_and_folders(signed, keys, tmp_path):
    (tmp_path / "bad.pem").write_text("no key")
    for key in (tmp_path / "missing.pem", tmp_path / "bad.pem", keys[1]):
        with pytest.raises(InputError, match="can't sign with it"):
            signing.sign(signed, key)
    for key in (tmp_path / "missing.pem", tmp_path / "bad.pem", keys[0]):
        with pytest.raises(InputError, match="can't verify with it") as refusal:
            signing.verify(signed, key)
        assert "\n" not in str(refusal.value)
    with pytest.raises(InputError, match="no such folder"):
        signing.sign(tmp_path / "nowhere", keys[0])
    with pytest.raises(InputError, match="no such folder"):
        signing.verify(tmp_path / "nowhere", keys[1])
    with pytest.raises(InputError, match="one of a key"):
        signing.sign(signed)
    with pytest.raises(InputError, match="one of a key"):
        signing.sign(signed, keys[0], sigstore=True)
    with pytest.raises(InputError, match="verify with one of"):
        signing.verify(signed)


def test_what_would_be_refused_is_not_signed(signed, keys):
    (signed / "x").symlink_to("graph.json")
    with pytest.raises(InputError, match="symbolic link"):
        signing.sign(signed, keys[0])
    (signed / "x").unlink()
    (signed / "empty").mkdir()
    with pytest.raises(InputError, match="empty folder"):
        signing.sign(signed, keys[0])


def test_a_private_key_is_not_published(signed, keys):
    inside = signed / "me.pem"
    inside.write_bytes(keys[0].read_bytes())
    with pytest.raises(InputError, match="move the key elsewhere"):
        signing.sign(signed, inside)


# ----------------------------------------------------------------------------------------------- certificates, sigstore


def _certificate(name, key, issuer, issuer_key, ca, *, days=(-1, 1), usages=None, purpose=None, authority=None):
    """days: from now, of its validity. usages, purpose, authority: others than a certificate of its place has."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    def called(text):
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])

    now = datetime.datetime.now(datetime.UTC)
    first, last = (now + datetime.timedelta(days=day) for day in days)
    signs, vouches = (not ca, ca) if usages is None else usages
    usage = x509.KeyUsage(signs, False, False, False, False, vouches, vouches, False, False)
    builder = x509.CertificateBuilder(called(issuer), called(name), key.public_key(), x509.random_serial_number())
    builder = builder.not_valid_before(first).not_valid_after(last)
    basic = x509.BasicConstraints(ca if authority is None else authority, None)
    builder = builder.add_extension(basic, True).add_extension(usage, True)
    if purpose != "none" and (purpose or not ca):
        kinds = {None: ExtendedKeyUsageOID.CODE_SIGNING, "mail": ExtendedKeyUsageOID.EMAIL_PROTECTION}
        builder = builder.add_extension(x509.ExtendedKeyUsage([kinds[purpose]]), False)
    return builder.sign(issuer_key, hashes.SHA256())


def test_certificates(signed, tmp_path):
    from cryptography.hazmat.primitives import serialization

    def made(name):
        private, _ = signing.keygen(tmp_path / f"{name}.pem")
        return private, serialization.load_pem_private_key(private.read_bytes(), None)

    _, root_key = made("root")
    private, key = made("me")
    _, other_key = made("other")
    files = {}
    for name, certificate in {
        "root": _certificate("root", root_key, "root", root_key, True),
        "me": _certificate("me", key, "root", root_key, False),
        "other": _certificate("root", other_key, "root", other_key, True),
    }.items():
        files[name] = tmp_path / f"{name}.crt"
        files[name].write_bytes(certificate.public_bytes(serialization.Encoding.PEM))

    signing.sign(signed, private, certificate=files["me"], chain=[files["root"]])
    assert "graph.json" in signing.verify(signed, chain=[files["root"]])
    with pytest.raises(SignatureRefused):
        signing.verify(signed, chain=[files["other"]])
    with pytest.raises(SignatureRefused, match="no signature of this kind"):
        signing.verify(signed, tmp_path / "me.pem.pub")
    (signed / ".x").touch()
    with pytest.raises(SignatureRefused, match="added since it was signed: .x"):
        signing.verify(signed, chain=[files["root"]])
    with pytest.raises(InputError, match="can't sign with it"):
        signing.sign(signed, private, certificate=files["root"], chain=[files["root"]])


def _signed_by(folder, tmp_path, root, own, between=None):
    """The folder, signed with a chain whose certificates are made with these options; what to trust."""
    from cryptography.hazmat.primitives import serialization

    keys = {}
    for name in ("root", "between", "me"):
        private, _ = signing.keygen(tmp_path / f"{name}.pem")
        keys[name] = private, serialization.load_pem_private_key(private.read_bytes(), None)
    above = "root" if between is None else "between"
    made = {
        "root": _certificate("root", keys["root"][1], "root", keys["root"][1], True, **root),
        "me": _certificate("me", keys["me"][1], above, keys[above][1], False, **own),
    }
    if between is not None:
        made["between"] = _certificate("between", keys["between"][1], "root", keys["root"][1], True, **between)
    files = {name: tmp_path / f"{name}.crt" for name in made}
    for name, one in made.items():
        files[name].write_bytes(one.public_bytes(serialization.Encoding.PEM))
    chain = [files[name] for name in ("root", "between") if name in files]
    signing.sign(folder, keys["me"][0], certificate=files["me"], chain=chain)
    return [files["root"]]


OLD = {"days": (-400, -300)}
LONG = {"days": (-1000, 1000)}


@pytest.mark.parametrize(
    ("root", "own", "between", "words"),
    [
        ({}, {}, None, None),
        ({}, {}, {}, None),
        (LONG, OLD, None, "certificate-(chain|expired)"),
        (OLD, LONG, None, "certificate-(chain|expired)"),
        (LONG, LONG, OLD, "certificate-(chain|expired)"),
        (LONG, {"days": (300, 400)}, None, "certificate-(chain|expired)"),
        ({}, {"purpose": "none"}, None, "certificate-usage"),
        ({}, {"purpose": "mail"}, None, "certificate-usage"),
        ({}, {"usages": (False, False)}, None, "certificate-(chain|usage)"),
        ({}, {}, {"authority": False, "usages": (True, False)}, "certificate-(chain|authority)"),
        ({}, {}, {"purpose": "mail"}, "certificate-(chain|authority)"),
    ],
)
def test_every_certificate_of_a_chain_is_asked(root, own, between, words, signed, tmp_path):
    trusted = _signed_by(signed, tmp_path, root, own, between)
    if words is None:
        assert "graph.json" in signing.verify(signed, chain=trusted)
        return
    with pytest.raises(SignatureRefused, match=rf"\[{words}\]$") as refusal:
        signing.verify(signed, chain=trusted)
    assert "\n" not in str(refusal.value)


def test_an_old_archive_is_verified_for_its_day(signed, tmp_path):
    trusted = _signed_by(signed, tmp_path, LONG, OLD)
    then = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=350)
    assert "graph.json" in signing.verify(signed, chain=trusted, at=then)
    assert "graph.json" in signing.verify(signed, chain=trusted, at=f"{then:%Y-%m-%d}")
    with pytest.raises(SignatureRefused, match="--at"):
        signing.verify(signed, chain=trusted)
    with pytest.raises(InputError, match="is no date; write it as 2026-05-31"):
        signing.verify(signed, chain=trusted, at="yesterday")


def test_what_a_way_to_sign_lacks_is_told(signed, keys, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="pass --chain"):
        signing.sign(signed, keys[0], certificate=tmp_path / "me.crt")
    with pytest.raises(InputError, match="--identity needs --issuer"):
        signing.verify(signed, identity="me@example.org")
    with pytest.raises(InputError, match="pass --chain, or leave it out"):
        signing.verify(signed, keys[1], at="2026-01-01")

    def offline(*_, **__):
        raise OSError("no route to host")

    import model_signing

    monkeypatch.setattr(model_signing.verifying.Config, "use_sigstore_verifier", offline)
    with pytest.raises(InputError, match="come over the network: connect, or verify with --key") as refusal:
        signing.verify(signed, identity="me@example.org", issuer="https://example.org")
    assert "\n" not in str(refusal.value)


def test_a_full_disk_leaves_no_key(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match="nothing is left of it"):
        signing.keygen(tmp_path / "me.pem")
    assert list(tmp_path.iterdir()) == []


def test_sigstore_gets_what_it_is_given(signed, keys, monkeypatch):
    """Sigstore needs a network and a person: the library is asked with our arguments, and signs with a key instead."""
    import model_signing

    asked = []

    def signer(config, **options):
        asked.append(options)
        return config.use_elliptic_key_signer(private_key=keys[0])

    def verifier(config, **options):
        asked.append(options)
        return config.use_elliptic_key_verifier(public_key=keys[1])

    monkeypatch.setattr(model_signing.signing.Config, "use_sigstore_signer", signer)
    monkeypatch.setattr(model_signing.verifying.Config, "use_sigstore_verifier", verifier)
    signing.sign(signed, sigstore=True)
    signing.sign(signed, sigstore={"identity_token": "abc", "use_staging": True})
    signing.verify(signed, identity="me@example.org", issuer="https://example.org", sigstore={"use_staging": True})
    assert asked == [
        {},
        {"identity_token": "abc", "use_staging": True},
        {"identity": "me@example.org", "oidc_issuer": "https://example.org", "use_staging": True},
    ]


def test_a_missing_library_says_how_to_get_it(signed, keys, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "model_signing"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "model_signing", None)
    for action in (
        lambda: signing.sign(signed, keys[0]),
        lambda: signing.verify(signed, keys[1]),
        lambda: signing.keygen("x.pem"),
    ):
        with pytest.raises(MissingDependency, match=r"model-signing is not installed; pip install 'rarefy\[sign\]'"):
            action()
