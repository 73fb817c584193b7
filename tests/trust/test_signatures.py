"""Signatures: OpenSSF model signing verifies ours and we its own; no changed bit passes; keys are never shown."""

from __future__ import annotations

import base64
import json
import os
import random
import shutil
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from command_line import record, run, save_base, save_peft
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from model_signing import hashing, signing, verifying
from model_signing._cli import main as model_signing
from model_signing._hashing.hashing import Digest

import adapterkit as ak
from adapterkit.errors import Corrupt, Malformed, NetworkError, StorageError, Unsupported, UsageError
from adapterkit.provenance import check_signature, sign
from adapterkit.provenance.checking import _why

CURVES = {"P-256": ec.SECP256R1(), "P-384": ec.SECP384R1(), "P-521": ec.SECP521R1()}
PASSWORD = b"openSesame"


def write_key(folder: Path, key: Any, name: str = "key", password: bytes | None = None) -> tuple[Path, Path]:
    encryption = NoEncryption() if password is None else BestAvailableEncryption(password)
    private, public = folder / f"{name}.pem", folder / f"{name}.pub.pem"
    private.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption))
    public.write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return private, public


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, Path]:
    return write_key(tmp_path, ec.generate_private_key(ec.SECP256R1()))


@pytest.fixture
def merged(tmp_path: Path) -> Path:
    base, lora = save_base(tmp_path / "base"), save_peft(tmp_path / "lora")
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A base\n")
    ak.merge(base, [lora], tmp_path / "merged", weights=[0.5])
    return tmp_path / "merged"


def payload_of(signature: Path) -> dict[str, Any]:
    envelope = json.loads(signature.read_text())["dsseEnvelope"]
    found: dict[str, Any] = json.loads(base64.b64decode(envelope["payload"]))
    return found


# Ours by model-signing, theirs by us


@pytest.mark.parametrize("curve", CURVES)
@pytest.mark.parametrize("kind", ["folder", "file", "inside"])
def test_model_signing_verifies_ours_and_we_theirs(tmp_path: Path, merged: Path, curve: str, kind: str) -> None:
    private, public = write_key(tmp_path, ec.generate_private_key(CURVES[curve]))
    path = merged / "model.safetensors" if kind == "file" else merged
    ours = sign(path, merged / "model.sig" if kind == "inside" else tmp_path / "ours.sig", key=private)
    verifying.Config().use_elliptic_key_verifier(public_key=public).verify(path, Path(ours.out))
    words = ["verify", "key", str(path), "--signature", ours.out, "--public_key", str(public)]
    assert CliRunner().invoke(model_signing, words).exit_code == 0
    assert check_signature(path, ours.out, key=public).files == ours.files == (1 if kind == "file" else 4)

    Path(ours.out).unlink()
    theirs = Path(ours.out).with_name("theirs.sig")
    words = ["sign", "key", str(path), "--signature", str(theirs), "--private_key", str(private)]
    assert CliRunner().invoke(model_signing, words).exit_code == 0
    checked = check_signature(path, theirs, key=public)
    assert (checked.kind, checked.files, checked.statement) == ("key", ours.files, None)
    (path if path.is_file() else path / "config.json").write_bytes(b"{}")
    with pytest.raises(Corrupt, match="Hash mismatch"):
        check_signature(path, theirs, key=public)


@pytest.mark.parametrize("config", [
    lambda: hashing.Config().use_file_serialization(hashing_algorithm="blake3"),
    lambda: hashing.Config().use_file_serialization(hashing_algorithm="blake2"),
    lambda: hashing.Config().use_shard_serialization(shard_size=100),
    lambda: hashing.Config().set_ignored_paths(paths=["README.md"], ignore_git_paths=False),
])  # fmt: skip
def test_other_ways_of_hashing(tmp_path: Path, merged: Path, keys: tuple[Path, Path], config: Any) -> None:
    (merged / ".gitattributes").write_text("* text\n")
    (merged / "README.md").write_text("# hello\n")
    signer = signing.Config().use_elliptic_key_signer(private_key=keys[0]).set_hashing_config(config())
    signer.sign(merged, tmp_path / "theirs.sig")
    checked = check_signature(merged, tmp_path / "theirs.sig", key=keys[1])
    ignored = payload_of(tmp_path / "theirs.sig")["predicate"]["serialization"].get("ignore_paths", [])
    assert set(checked.not_covered) == {name for name in ignored if (merged / name).exists()} != set()
    (merged / "more.bin").write_bytes(b"x")
    with pytest.raises(Corrupt, match="Extra files"):
        check_signature(merged, tmp_path / "theirs.sig", key=keys[1])


def test_certificates_both_ways(tmp_path: Path, merged: Path) -> None:
    root_key, leaf_key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    root = certificate("root", root_key, "root", root_key, ca=True)
    leaf = certificate("leaf", leaf_key, "root", root_key, ca=False)
    private, _ = write_key(tmp_path, leaf_key)
    for name, each in (("root", root), ("leaf", leaf)):
        (tmp_path / f"{name}.crt").write_bytes(each.public_bytes(Encoding.PEM))
    roots = tmp_path / "root.crt"
    ours = sign(merged, tmp_path / "ours.sig", key=private, certificate=tmp_path / "leaf.crt")
    verifying.Config().use_certificate_verifier(certificate_chain=[roots]).verify(merged, Path(ours.out))
    assert check_signature(merged, ours.out, trust=[roots]).kind == "certificate"
    theirs = tmp_path / "theirs.sig"
    signer = signing.Config().use_certificate_signer(
        private_key=private, signing_certificate=tmp_path / "leaf.crt", certificate_chain=[roots]
    )
    signer.sign(merged, theirs)
    assert check_signature(merged, theirs, trust=[roots]).files == ours.files
    other = certificate("root", leaf_key, "root", leaf_key, ca=True)
    (tmp_path / "other.crt").write_bytes(other.public_bytes(Encoding.PEM))
    with pytest.raises(Corrupt, match="is not valid"):
        check_signature(merged, ours.out, trust=[tmp_path / "other.crt"])
    with pytest.raises(UsageError, match="of kind certificate"):
        check_signature(merged, ours.out, key=write_key(tmp_path, leaf_key, "leaf")[1])
    with pytest.raises(Malformed, match="belongs to another key"):
        sign(merged, tmp_path / "x.sig", key=private, certificate=roots)
    with pytest.raises(Malformed, match="no certificate"):
        sign(merged, tmp_path / "x.sig", key=private, certificate=private)


def certificate(name: str, key: Any, issuer: str, issuer_key: Any, *, ca: bool) -> x509.Certificate:
    names = [x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, each)]) for each in (name, issuer)]
    now = datetime.now(UTC)
    built = x509.CertificateBuilder(names[1], names[0], key.public_key(), x509.random_serial_number())
    built = built.not_valid_before(now - timedelta(days=1)).not_valid_after(now + timedelta(days=1))
    usage = dict.fromkeys(
        (
            "content_commitment",
            "key_encipherment",
            "data_encipherment",
            "key_agreement",
            "encipher_only",
            "decipher_only",
        ),
        False,
    )
    built = built.add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
    built = built.add_extension(
        x509.KeyUsage(digital_signature=not ca, key_cert_sign=ca, crl_sign=ca, **usage), critical=True
    )
    if not ca:
        built = built.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CODE_SIGNING]), critical=False)
    return built.sign(issuer_key, hashes.SHA256())


# What is signed


def test_the_statement_says_what_a_merge_was_made_of(tmp_path: Path, merged: Path, keys: tuple[Path, Path]) -> None:
    lora = ak.read(tmp_path / "lora")
    signed = sign(merged, key=keys[0])
    assert signed.out == str(tmp_path / "merged.sig")
    told = check_signature(merged, signed.out, key=keys[1]).statement
    assert told == signed.statement == payload_of(Path(signed.out))["predicate"]["adapterkit"]
    (adapter,) = told["made_from"]["adapters"]
    assert (adapter["digest"], adapter["weight"], told["kind"]) == (lora.digest(), 0.5, "merged")
    assert told["made_from"]["base_fingerprint"].startswith("sampled-")
    assert (told["licence"], told["adapterkit"]) == ("apache-2.0", ak.__version__)


def test_the_statement_of_an_adapter_has_its_lineage_and_base(tmp_path: Path, keys: tuple[Path, Path]) -> None:
    secret = "hf://org/base?token=openSesame"
    adapter = ak.read(save_peft(tmp_path / "lora"))
    adapter = adapter.replace(base=ak.BaseRef(secret, "main", "0" * 64), recipe=(
        *adapter.recipe, ak.Step("scale", {"factor": 0.1, "metadata": {"ss_tag_frequency": "x" * 9999}, "seed": 2**60}),
    ))  # fmt: skip
    ak.write(adapter, tmp_path / "a.safetensors", format="adapterkit")
    signed = sign(tmp_path / "a.safetensors", key=keys[0])
    told = check_signature(tmp_path / "a.safetensors", signed.out, key=keys[1]).statement
    assert told["digest"] == adapter.digest()
    assert told["lineage"][-1] == {"op": "scale", "args": {"factor": 0.1, "seed": str(2**60)}}
    assert told["base"] == {
        "id": "hf://org/base?...", "revision": "main", "config_hash": "0" * 64, "fingerprints": [], "shapes": []
    }  # fmt: skip
    assert "openSesame" not in base64.b64decode(
        json.loads(Path(signed.out).read_text())["dsseEnvelope"]["payload"]
    ).decode()  # fmt: skip


def test_what_no_reader_reads_is_signed_all_the_same(tmp_path: Path, keys: tuple[Path, Path]) -> None:
    folder = tmp_path / "things"
    folder.mkdir()
    (folder / "notes.txt").write_text("hello")
    assert sign(folder, key=keys[0]).statement["kind"] == "files"
    (save_base(tmp_path / "base") / "config.json").unlink()
    assert sign(tmp_path / "base", key=keys[0]).statement["kind"] == "model"
    lora = save_peft(tmp_path / "lora")
    (lora / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 3, "lora_alpha": 4, "target_modules": ["q"]}')
    assert "unread" in sign(lora, key=keys[0]).statement
    assert "the lineage could not be read" in run("sign", lora, "--key", keys[0], "--overwrite").stdout


# What must be refused


FLIPS = 1000


def test_every_single_bit_that_changes_is_refused(tmp_path: Path, merged: Path, keys: tuple[Path, Path]) -> None:
    """In files, in the record of a merge, in the signed statement, in the signature file: 250 of each."""
    signature, rng = tmp_path / "merged.sig", random.Random(25)
    sign(merged, signature, key=keys[0])
    whole = signature.read_bytes()
    files = {name: (merged / name).read_bytes() for name in os.listdir(merged)}
    refused = dict.fromkeys(("files", "lineage", "statement", "signature"), 0)
    for at in range(FLIPS):
        place = list(refused)[at % 4]
        if place == "statement":
            signature.write_bytes(in_payload(whole, rng))
        elif place == "signature":
            signature.write_bytes(flipped(whole, rng))
        else:
            name = "adapterkit_merge.json" if place == "lineage" else rng.choice(sorted(files))
            (merged / name).write_bytes(flipped(files[name], rng))
        with pytest.raises(Corrupt) as raised:
            check_signature(merged, signature, key=keys[1])
        assert raised.value.exit_code == 4
        refused[place] += 1
        signature.write_bytes(whole)
        for name, data in files.items() if place in ("files", "lineage") else ():
            (merged / name).write_bytes(data)
    check_signature(merged, signature, key=keys[1])
    assert sum(refused.values()) == FLIPS


def test_every_byte_of_a_signature_file(tmp_path: Path, keys: tuple[Path, Path]) -> None:
    """Each byte that is not the payload: keys of JSON, the media type, padding of base64, the key's name."""
    (tmp_path / "file").write_bytes(b"x")
    signature = tmp_path / "file.sig"
    sign(tmp_path / "file", signature, key=keys[0])
    whole = signature.read_bytes()
    start = whole.index(b'"payload":"') + len(b'"payload":"')
    end = whole.index(b'"', start)
    for at in [*range(start), *range(end - 4, len(whole))]:
        # The last characters of base64 have bits that decoders drop: all of theirs, and one of any other byte.
        for bit in range(8) if {*whole[at : at + 4]} & {*b'="'} and whole[at : at + 1].isalnum() else [at % 8]:
            signature.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1 :])
            with pytest.raises(Corrupt):
                check_signature(tmp_path / "file", signature, key=keys[1])


def flipped(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data))
    return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]


def in_payload(bundle: bytes, rng: random.Random) -> bytes:
    """The bundle with one bit changed in the statement inside its payload, packed again as base64."""
    told = json.loads(bundle)
    payload = base64.b64decode(told["dsseEnvelope"]["payload"])
    start = payload.index(b'"adapterkit"')
    changed = payload[:start] + flipped(payload[start:], rng)
    told["dsseEnvelope"]["payload"] = base64.b64encode(changed).decode()
    return json.dumps(told, separators=(",", ":")).encode()


def test_files_that_come_go_and_move(merged: Path, keys: tuple[Path, Path]) -> None:
    signature = Path(sign(merged, key=keys[0]).out)
    (merged / "extra.py").write_text("import os")
    with pytest.raises(Corrupt, match=r"Extra files.*extra\.py"):
        check_signature(merged, signature, key=keys[1])
    (merged / "extra.py").unlink()
    (merged / "config.json").rename(merged / "config2.json")
    with pytest.raises(Corrupt, match="config"):
        check_signature(merged, signature, key=keys[1])
    (merged / "config2.json").unlink()
    with pytest.raises(Corrupt, match=r"Missing files.*config\.json"):
        check_signature(merged, signature, key=keys[1])


def test_no_files_and_names_that_are_not_text_are_refused(tmp_path: Path, keys: tuple[Path, Path]) -> None:
    (tmp_path / "empty" / "folder").mkdir(parents=True)
    with pytest.raises(UsageError, match="there is no file to sign"):
        sign(tmp_path / "empty", key=keys[0])
    lora = save_peft(tmp_path / "lora")
    signature = sign(lora, key=keys[0]).out
    with open(os.fsencode(lora) + b"/a\xff.txt", "w") as file:
        file.write("x")
    with pytest.raises(Unsupported, match="not UTF-8"):
        sign(lora, tmp_path / "other.sig", key=keys[0])
    refused = run("verify", lora, "--signature", signature, "--key", keys[1])
    assert refused.exit_code == 4
    assert "Extra files" in refused.stderr


def test_another_key_and_another_signature(tmp_path: Path, merged: Path, keys: tuple[Path, Path]) -> None:
    signature = Path(sign(merged, key=keys[0]).out)
    _, other = write_key(tmp_path, ec.generate_private_key(ec.SECP256R1()), "other")
    with pytest.raises(Corrupt, match="Key mismatch"):
        check_signature(merged, signature, key=other)
    of_lora = Path(sign(tmp_path / "lora", key=keys[0]).out)
    with pytest.raises(Corrupt, match="is not valid"):
        check_signature(merged, of_lora, key=keys[1])
    told = json.loads(signature.read_text())
    told["verificationMaterial"]["publicKey"]["hint"] = payload_hint(other)
    signature.write_text(json.dumps(told))
    with pytest.raises(Corrupt, match="made with another key"):
        check_signature(merged, signature, key=other)


def payload_hint(public: Path) -> str:
    import hashlib

    return hashlib.sha256(public.read_bytes()).hexdigest()


@pytest.mark.parametrize("text", [
    "", "{}", "[]", "null", "\xff", '{"mediaType": 1}', "{" * 5000, '{"mediaType": "a", "mediaType": "b"}',
])  # fmt: skip
def test_files_that_are_no_signature(tmp_path: Path, keys: tuple[Path, Path], text: str) -> None:
    (tmp_path / "file").write_bytes(b"x")
    (tmp_path / "file.sig").write_bytes(text.encode("latin-1"))
    with pytest.raises(Corrupt, match="the signature file is not valid"):
        check_signature(tmp_path / "file", tmp_path / "file.sig", key=keys[1])


# Files around it


def test_links_are_refused_or_followed(tmp_path: Path, merged: Path, keys: tuple[Path, Path]) -> None:
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for file in merged.iterdir():
        (snapshot / file.name).symlink_to(file)
    with pytest.raises(Unsupported, match="symbolic links") as raised:
        sign(snapshot, key=keys[0])
    assert "--allow-symlinks" in str(raised.value)
    signed = sign(snapshot, key=keys[0], allow_symlinks=True)
    assert check_signature(snapshot, signed.out, key=keys[1]).files == 4
    (merged / "config.json").write_text("{}")
    with pytest.raises(Corrupt, match="Hash mismatch"):
        check_signature(snapshot, signed.out, key=keys[1])


def test_links_on_the_way_and_in_what_was_fetched(tmp_path: Path, merged: Path, keys: tuple[Path, Path]) -> None:
    (tmp_path / "current").symlink_to(merged)
    signed = sign(tmp_path / "current", key=keys[0])
    assert signed.out == str(tmp_path / "current.sig")
    for path in (merged, tmp_path / "current"):
        assert check_signature(path, signed.out, key=keys[1]).files == 4
    cache = tmp_path / "cache"
    cache.mkdir()
    for file in merged.iterdir():
        (cache / file.name).symlink_to(file)
    assert check_signature(cache, signed.out, key=keys[1]).files == 4
    (tmp_path / "evil").mkdir()
    (tmp_path / "evil" / "modeling.py").write_text("import os")
    (cache / "code").symlink_to(tmp_path / "evil")
    with pytest.raises(Corrupt, match="link to a folder"):
        check_signature(cache, signed.out, key=keys[1])
    with pytest.raises(Unsupported, match="a link to a folder"):
        sign(cache, key=keys[0], allow_symlinks=True)


def test_what_git_keeps_is_said_not_to_be_signed(merged: Path, keys: tuple[Path, Path]) -> None:
    (merged / ".git").mkdir()
    (merged / ".git" / "HEAD").write_text("ref: refs/heads/main\n")
    signed = sign(merged, merged / "model.sig", key=keys[0])
    assert signed.not_covered == (".git",)
    checked = check_signature(merged, merged / "model.sig", key=keys[1])
    assert (checked.not_covered, checked.files) == ((".git",), signed.files)


def test_what_is_fetched_is_what_was_signed(tmp_path: Path, merged: Path, keys: tuple[Path, Path]) -> None:
    """`pull` and huggingface_hub leave notes in the folder; model-signing's own command leaves them out, too."""
    signed = sign(merged, tmp_path / "m.sig", key=keys[0])
    (merged / ".cache" / "huggingface").mkdir(parents=True)
    for note in (".adapterkit-source.json", ".cache/huggingface/CACHEDIR.TAG"):
        (merged / note).write_text("x")
    checked = check_signature(merged, signed.out, key=keys[1])
    assert checked.not_covered == (".adapterkit-source.json", ".cache/huggingface")
    words = ["verify", "key", str(merged), "--signature", signed.out, "--public_key", str(keys[1])]
    assert CliRunner().invoke(model_signing, words).exit_code == 0
    again = sign(merged, tmp_path / "m.sig", key=keys[0], overwrite=True)
    assert (again.files, again.not_covered) == (signed.files, checked.not_covered)
    (merged / ".cache" / "else").write_text("x")
    with pytest.raises(Corrupt, match="Extra files"):
        check_signature(merged, signed.out, key=keys[1])


def test_pipes_are_refused_instead_of_waited_for(tmp_path: Path, merged: Path, keys: tuple[Path, Path]) -> None:
    os.mkfifo(tmp_path / "pipe")
    good = sign(merged, key=keys[0]).out
    for call in (
        lambda: sign(merged, tmp_path / "x.sig", key=tmp_path / "pipe"),
        lambda: check_signature(merged, tmp_path / "pipe", key=keys[1]),
        lambda: check_signature(merged, good, key=tmp_path / "pipe"),
    ):
        with pytest.raises(Malformed, match="not a regular file"):
            call()
    (tmp_path / "pipe").rename(merged / "pipe")
    with pytest.raises(Unsupported, match="cannot hash the files"):
        sign(merged, tmp_path / "x.sig", key=keys[0])
    with pytest.raises(Corrupt):
        check_signature(merged, good, key=keys[1])


# Keys and passwords


def test_encrypted_keys(tmp_path: Path, merged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    private, public = write_key(tmp_path, ec.generate_private_key(ec.SECP256R1()), password=PASSWORD)
    said = [run("sign", merged, "--key", private, "--debug")]
    assert (said[0].exit_code, "ADAPTERKIT_KEY_PASSWORD" in said[0].output) == (2, True), said[0].output
    monkeypatch.setenv("ADAPTERKIT_KEY_PASSWORD", "wrongSesame")
    said.append(run("sign", merged, "--key", private, "--debug"))
    assert (said[-1].exit_code, "the password does not decrypt" in said[-1].output) == (2, True), said[-1].output
    (tmp_path / "password").write_bytes(PASSWORD + b"\n")
    said.append(run("sign", merged, "--key", private, "--password-file", tmp_path / "password", "--json"))
    assert said[-1].exit_code == 0, said[-1].output
    monkeypatch.setenv("ADAPTERKIT_KEY_PASSWORD", PASSWORD.decode())
    said.append(run("sign", merged, "--key", private, "--overwrite", "-vv"))
    assert said[-1].exit_code == 0, said[-1].output
    check_signature(merged, tmp_path / "merged.sig", key=public)
    plain, _ = write_key(tmp_path, ec.generate_private_key(ec.SECP256R1()), "plain")
    said.append(run("sign", merged, "--key", plain, "-o", tmp_path / "x.sig"))
    assert "is not encrypted" in said[-1].output
    key_lines = [line for key in (private, plain) for line in key.read_text().splitlines() if "----" not in line]
    for result in said:
        assert not any(line in result.output for line in [*key_lines, "openSesame", "wrongSesame"])
    written = [file for file in tmp_path.rglob("*.sig") if file.is_file()]
    assert written
    assert not any(b"Sesame" in file.read_bytes() for file in written)


@pytest.mark.parametrize("kind", ["ed25519", "rsa", "secp256k1", "public", "text", "missing"])
def test_keys_of_other_kinds(tmp_path: Path, merged: Path, kind: str) -> None:
    made = {
        "ed25519": ed25519.Ed25519PrivateKey.generate, "secp256k1": lambda: ec.generate_private_key(ec.SECP256K1()),
        "rsa": lambda: rsa.generate_private_key(65537, 2048),
    }.get(kind, lambda: ec.generate_private_key(ec.SECP256R1()))()  # fmt: skip
    private, public = write_key(tmp_path, made)
    sign(
        tmp_path / "lora",
        tmp_path / "good.sig",
        key=write_key(tmp_path, ec.generate_private_key(ec.SECP256R1()), "g")[0],
    )
    if kind == "public":
        private, public = public, private
    elif kind == "text":
        private.write_text("hello")
        public.write_text("hello")
    elif kind == "missing":
        private = public = tmp_path / "none.pem"
    expected = {"text": Malformed, "public": Malformed, "missing": StorageError}.get(kind, Unsupported)
    with pytest.raises(expected) as raised:
        sign(merged, tmp_path / "x.sig", key=private)
    assert raised.value.cure
    with pytest.raises(expected) as raised:
        check_signature(tmp_path / "lora", tmp_path / "good.sig", key=public)
    assert raised.value.cure
    assert not (tmp_path / "x.sig").exists()


def test_calls_that_do_not_say_who_signs(tmp_path: Path, merged: Path, keys: tuple[Path, Path]) -> None:
    for options in ({}, {"key": keys[0], "sigstore": True}, {"key": keys[0], "chain": [keys[0]]}):
        with pytest.raises(UsageError):
            sign(merged, **options)
    signature = sign(merged, key=keys[0]).out
    for options in ({}, {"key": keys[1], "identity": "a@b"}, {"identity": "a@b"}, {"key": keys[1], "issuer": "x"}):
        with pytest.raises(UsageError):
            check_signature(merged, signature, **options)
    with pytest.raises(StorageError, match="already there"):
        sign(merged, key=keys[0])
    with pytest.raises(StorageError):
        check_signature(tmp_path / "none", signature, key=keys[1])
    with pytest.raises(StorageError):
        check_signature(merged, tmp_path / "none.sig", key=keys[1])


def test_without_the_package(monkeypatch: pytest.MonkeyPatch, merged: Path, keys: tuple[Path, Path]) -> None:
    signature = sign(merged, key=keys[0]).out
    for name in [name for name in sys.modules if name.partition(".")[0] == "model_signing"]:
        monkeypatch.setitem(sys.modules, name, None)
    for call in (
        lambda: sign(merged, key=keys[0], overwrite=True),
        lambda: check_signature(merged, signature, key=keys[1]),
    ):
        with pytest.raises(Unsupported, match=r"pip install 'adapterkit\[sign\]'"):
            call()


def test_sigstore_is_passed_on_to_model_signing(
    monkeypatch: pytest.MonkeyPatch, merged: Path, keys: tuple[Path, Path]
) -> None:
    """Its own signer is not run here, as that needs a network; what it is asked for, and how it fails, is."""
    asked: list[dict[str, Any]] = []

    def signs_with_a_key(self: Any, **options: Any) -> Any:
        asked.append(options)
        return self.use_elliptic_key_signer(private_key=keys[0])

    def fails(_: Any, **options: Any) -> Any:
        asked.append(options)
        raise OSError("no network")

    monkeypatch.setattr(signing.Config, "use_sigstore_signer", signs_with_a_key)
    signed = sign(merged, sigstore=True, identity_token="a.b.c")
    assert asked == [{"identity_token": "a.b.c", "use_ambient_credentials": False}]
    monkeypatch.setattr(signing.Config, "use_sigstore_signer", fails)
    with pytest.raises(NetworkError, match="no network"):
        sign(merged, sigstore=True, overwrite=True)
    monkeypatch.setattr(verifying.Config, "use_sigstore_verifier", fails)
    with pytest.raises(UsageError, match="of kind key"):
        check_signature(merged, signed.out, identity="a@b.org", issuer="https://b.org")
    told = json.loads(Path(signed.out).read_text())
    told["verificationMaterial"] = {"certificate": {"rawBytes": ""}, "tlogEntries": [{"logIndex": "1"}]}
    Path(signed.out).write_text(json.dumps(told))
    with pytest.raises(NetworkError, match="no network"):
        check_signature(merged, signed.out, identity="a@b.org", issuer="https://b.org")
    assert asked[-1] == {"identity": "a@b.org", "oidc_issuer": "https://b.org"}


# The commands


def test_sign_and_verify_on_the_command_line(tmp_path: Path, merged: Path, keys: tuple[Path, Path]) -> None:
    words = ["sign", merged, "--key", keys[0]]
    first = record(*words)
    assert (first["out"], first["files"]) == (str(tmp_path / "merged.sig"), 4)
    inode = (tmp_path / "merged.sig").stat().st_ino
    again = run(*words)
    assert again.stdout.startswith("already done: ")
    assert (tmp_path / "merged.sig").stat().st_ino == inode
    checks = ["verify", merged, "--signature", tmp_path / "merged.sig", "--key", keys[1]]
    found = record(*checks)
    assert (found["ok"], found["signature"]["statement"]) == (True, first["statement"])
    said = run(*checks, "--base", tmp_path / "base")
    assert (said.exit_code, "lora with weight 0.5" in said.stdout) == (0, True), said.output
    assert run(*checks, "--base", tmp_path / "base", "--adapter", tmp_path / "lora", "-w", 0.5).exit_code == 0
    assert run(*checks, "--base", tmp_path / "base", "--adapter", tmp_path / "lora").exit_code == 1
    shutil.copytree(tmp_path / "base", tmp_path / "base2")
    (tmp_path / "base2" / "model.safetensors").write_bytes(
        (tmp_path / "base" / "model.safetensors").read_bytes()[:-1] + b"\1"
    )
    other = run(*checks, "--base", tmp_path / "base2")
    assert (other.exit_code, "the given base has" in other.stdout) == (1, True), other.output
    (merged / "config.json").write_text("{}")
    changed = run(*checks)
    assert (changed.exit_code, "config.json" in changed.stderr) == (4, True), changed.output
    assert record(*checks, code=4)["error"]["code"] == "corrupt"
    refused = run(*words)
    assert (refused.exit_code, "already there" in refused.stderr) == (6, True), refused.output
    assert run(*words, "--overwrite").exit_code == 0
    assert run(*checks).exit_code == 0
    damaged = (tmp_path / "merged.sig").read_bytes()
    (tmp_path / "merged.sig").write_bytes(b" " + damaged)
    assert run(*words).exit_code == 6


def test_a_signature_replaces_only_an_earlier_signature(merged: Path, keys: tuple[Path, Path]) -> None:
    for place in (keys[0], merged / "config.json", merged / "model.safetensors"):
        before = place.read_bytes()
        with pytest.raises(UsageError, match="would replace its input"):
            sign(merged, place, key=keys[0], overwrite=True)
        assert place.read_bytes() == before
    first, second = (sign(merged, merged / "model.sig", key=keys[0], overwrite=True).files for _ in range(2))
    assert first == second


def test_verify_refuses_keys_without_a_signature(merged: Path, keys: tuple[Path, Path]) -> None:
    assert "require --signature" in run("verify", merged, "--key", keys[1]).stderr
    assert "--base and --adapter require each other" in run("verify", merged, "--base", merged).stderr


@pytest.mark.parametrize("quote", ["'", "\"'"])
def test_a_changed_file_is_named_without_the_bytes_of_its_digests(quote: str) -> None:
    """model-signing quotes digests as Python's bytes, and escapes the quotes around them where they hold both kinds."""
    digest = repr(Digest("sha256", b"\xfe)" + quote.encode() + b")\x00"))
    told = [f"Hash mismatch for 'README.md': Expected '{digest}', Actual '{digest}'", "Extra files found"]
    assert _why(ValueError(f"Signature mismatch: {told}")) == "Hash mismatch for 'README.md'; Extra files found"
    assert _why(ValueError("[no list")) == "[no list"
