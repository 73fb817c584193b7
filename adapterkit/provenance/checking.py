"""Check that the expected signer made a signature, and that no file was changed, added or removed after signing.

A signature file is a Sigstore bundle, as OpenSSF model signing writes it. The signature covers only the payload, which
is a part of this file. In the rest of the file, most tools ignore unknown keys and unused bits of base64, so they
accept several different files as the same signature. This module accepts only known keys and canonical base64.
Therefore, if any bit of a signature file was changed, `read_bundle` or the cryptographic check refuses the file. In
signatures of kind `sigstore`, this module checks only the envelope, and sigstore's library checks the rest.
"""

from __future__ import annotations

import ast
import base64
import binascii
import contextlib
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.arguments import checks_types
from ..core.metadata import FINGERPRINT, SHAPES
from ..errors import Corrupt, NetworkError, UsageError, first_line, public, storage_error
from ..io.checkpoint import PREFIX, fingerprint, opened
from ..io.inputs import open_input
from ..io.locations import check_exists
from ..io.stages import stage
from ..io.strict_json import load_json
from ..naming.binding.fitting import relation
from .signing import PREDICATE, linked_folders, model_signing, settled, verifier

if TYPE_CHECKING:
    from ..io.checkpoint import Checkpoint
    from ..io.strict_json import JsonValue

MEDIA_TYPE = "application/vnd.dev.sigstore.bundle.v0.3+json"
LARGEST = 64 << 20
"""The largest accepted size of a signature file, in bytes. A signature file has about 200 bytes per signed file."""

_PLAIN = {
    "": {"mediaType", "verificationMaterial", "dsseEnvelope"},
    "verificationMaterial": {"publicKey", "x509CertificateChain", "tlogEntries"},
    "verificationMaterial.publicKey": {"hint"},
    "verificationMaterial.x509CertificateChain": {"certificates"},
    "verificationMaterial.x509CertificateChain.certificates": {"rawBytes"},
    "verificationMaterial.tlogEntries": set[str](),
    "dsseEnvelope": {"payload", "payloadType", "signatures"},
    "dsseEnvelope.signatures": {"sig", "keyid"},
}
"""A map from each path in the bundle to the keys that are allowed there. In signatures of kind `sigstore`, only the
paths that begin with `dsseEnvelope` are checked."""

_EXTRA = {"verificationMaterial.publicKey": {"rawBytes", "keyDetails"}}
"""More allowed keys. Versions of model-signing before 1.0 wrote these keys, and model-signing's verifier ignores them.
"""

_BASE64 = {"payload", "sig", "rawBytes"}


@dataclass(frozen=True, slots=True)
class SignatureBundle:
    """The content of a signature file.

    Attributes:
        path: the path of the file.
        kind: `key`, `certificate` or `sigstore`.
        key: the SHA-256 of the public key, copied from the file; None if the file has none.
        payload: the signed payload, an in-toto statement.
    """

    path: Path
    kind: str
    key: str | None
    payload: Mapping[str, JsonValue]

    @property
    def predicate(self) -> Mapping[str, JsonValue]:
        predicate = self.payload.get("predicate")
        return predicate if isinstance(predicate, Mapping) else {}

    @property
    def statement(self) -> Mapping[str, JsonValue] | None:
        """The signed statement of the lineage; None if a tool other than adapterkit made the signature."""
        statement = self.predicate.get(PREDICATE)
        return statement if isinstance(statement, Mapping) else None


def read_bundle(path: Path) -> SignatureBundle:
    """Read a signature file. This does not verify the signature.

    Raises:
        Corrupt: the file is too large, is not a signature file, or has content that signing tools do not write.
        StorageError: the file cannot be read.
    """
    try:
        with open_input(path) as file:
            data = file.read(LARGEST + 1)
    except OSError as error:
        raise storage_error(error, path) from error
    if len(data) > LARGEST:
        raise _corrupt(path, f"it is larger than {LARGEST >> 20} MiB")
    try:
        content = load_json(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise _corrupt(path, f"it is not JSON ({error})") from None
    if not isinstance(content, dict):
        raise _corrupt(path, "it is not a JSON object")
    if content.get("mediaType") != MEDIA_TYPE:
        raise _corrupt(path, f"mediaType is not {MEDIA_TYPE}")
    kind, material = _kind(path, content)
    # Check only the envelope of sigstore bundles: their log entries have more keys, which sigstore's library checks.
    _check(path, content if kind != "sigstore" else {"dsseEnvelope": content.get("dsseEnvelope")})
    return SignatureBundle(path, kind, material, _payload(path, content))


def _kind(path: Path, content: Mapping[str, object]) -> tuple[str, str | None]:
    material = content.get("verificationMaterial")
    if not isinstance(material, dict):
        raise _corrupt(path, "it has no verificationMaterial")
    if isinstance(material.get("publicKey"), dict):
        return "key", material["publicKey"].get("hint")
    if "x509CertificateChain" in material:
        return "certificate", None
    if "certificate" in material:
        return "sigstore", None
    raise _corrupt(path, "verificationMaterial names neither a key nor a certificate")


def _check(path: Path, value: object, place: str = "") -> None:
    if isinstance(value, list):
        for each in value:
            _check(path, each, place)
    elif isinstance(value, dict):
        for key, inner in value.items():
            inside = f"{place}.{key}".lstrip(".")
            if key not in _PLAIN.get(place, ()) and key not in _EXTRA.get(place, ()):
                raise _corrupt(path, f"unknown key {inside!r}")
            if inside in _PLAIN:
                if not isinstance(inner, dict | list):
                    raise _corrupt(path, f"{inside} is neither an object nor a list")
                _check(path, inner, inside)
            elif key in _BASE64:
                _decoded(path, inside, inner)
            elif not isinstance(inner, str) or (key == "keyid" and inner):
                raise _corrupt(path, f"{inside} has a value that signing tools do not write")
    elif place:
        raise _corrupt(path, f"{place} contains values that are not objects")


def _decoded(path: Path, place: str, text: object) -> bytes:
    """Decode base64. Refuse text that is not canonical: it must be padded, and its unused bits must be 0."""
    if not isinstance(text, str):
        raise _corrupt(path, f"{place} is not base64")
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise _corrupt(path, f"{place} is not base64") from None
    if base64.b64encode(data).decode() != text:
        raise _corrupt(path, f"{place} is not canonical base64")
    return data


def _payload(path: Path, content: Mapping[str, object]) -> Mapping[str, JsonValue]:
    envelope = content.get("dsseEnvelope")
    if not isinstance(envelope, dict) or len(envelope.get("signatures") or ()) != 1:
        raise _corrupt(path, "it has no dsseEnvelope with exactly one signature")
    try:
        payload = load_json(_decoded(path, "payload", envelope.get("payload")).decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise _corrupt(path, f"the signed payload is not JSON ({error})") from None
    if not isinstance(payload, dict):
        raise _corrupt(path, "the signed payload is not a JSON object")
    return payload


def _corrupt(path: Path, why: str) -> Corrupt:
    return Corrupt(f"the signature file is not valid: {why}", path=path, cure=DISTRUST)


DISTRUST = "Do not trust these files; get the files and the signature again from their signer"


@dataclass(frozen=True, slots=True)
class SignatureCheck:
    """The result of `check_signature` for a valid signature.

    Attributes:
        path: the signed file or folder.
        signature: the signature file.
        kind: `key`, `certificate` or `sigstore`.
        key: the sha256 of the public key, if `kind` is `key`.
        files: the number of digests that were compared: one per file, or one per shard if the signer hashed shards.
        statement: the signed statement of the lineage; None if a tool other than adapterkit made the signature.
        not_covered: existing files that the signature does not cover.
    """

    path: str
    signature: str
    kind: str
    key: str | None
    files: int
    statement: Mapping[str, JsonValue] | None
    not_covered: tuple[str, ...] = ()

    def record(self) -> dict[str, JsonValue]:
        """Return the result as plain data, for `--json`."""
        return {
            "path": self.path, "file": self.signature, "kind": self.kind, "key": self.key, "files": self.files,
            "statement": None if self.statement is None else dict(self.statement),
            "not_covered": list(self.not_covered),
        }  # fmt: skip


@checks_types
def check_signature(
    path: str | PathLike[str],
    signature: str | PathLike[str],
    *,
    key: str | PathLike[str] | None = None,
    trust: Sequence[str | PathLike[str]] = (),
    identity: str | None = None,
    issuer: str | None = None,
) -> SignatureCheck:
    """Check the signature of an adapter or a model.

    The signature may come from `sign`, or from another tool for OpenSSF model signing.

    Args:
        path: the signed folder or file.
        signature: the signature file.
        key: the file with the signer's public key, in PEM form.
        trust: files with the certificates to trust, in PEM form, instead of a key.
        identity: the expected sigstore identity, such as an e-mail address, instead of a key. This needs a network.
        issuer: the OpenID provider of the identity, such as `https://accounts.google.com`.

    Returns:
        The result for a valid signature, with the number of compared digests and the signed statement.

    Raises:
        Corrupt: a file was changed, added or removed, or the signature was changed or made with another key.
        StorageError: a path does not exist or cannot be read.
        UsageError: none or several of `key`, `trust` and `identity` are set, the argument that is set cannot check this
            kind of signature, or only one of `identity` and `issuer` is set.
        Malformed, Unsupported: the key is invalid or of an unsupported kind, or `model-signing` is not installed.
        NetworkError: sigstore cannot be reached.
    """
    if (key is not None) + bool(trust) + (identity is not None) != 1:
        cure = "Pass one of --key PUB.pem (key=), --trust CERT.pem (trust=) and --identity WHO (identity=)"
        raise UsageError("exactly one of the signer's key, certificates and identity is needed", cure=cure)
    if (identity is None) != (issuer is None):
        cure = "Pass both --identity and --issuer (identity=, issuer=)"
        raise UsageError("an identity needs an issuer, and an issuer needs an identity", cure=cure)
    root, file = settled(Path(path)), Path(signature)
    check_exists(root)
    bundle = read_bundle(file)
    wanted = "key" if key is not None else "certificate" if trust else "sigstore"
    if bundle.kind != wanted:
        why = f"the signature is of kind {bundle.kind}, but the arguments only check signatures of kind {wanted}"
        raise UsageError(f"{file}: {why}", cure=_ASKS[bundle.kind])
    config = _sigstore(identity, issuer) if identity is not None else verifier(key, trust)
    stage("hashing files and checking the signature")
    _verify(config, root, bundle)
    resources = bundle.predicate.get("resources")
    count = len(resources) if isinstance(resources, list) else 0
    return SignatureCheck(
        public(str(path)), str(file), bundle.kind, bundle.key, count, bundle.statement, _left_out(root, bundle)
    )


@checks_types
def other_base(
    statement: Mapping[str, JsonValue] | None, base: Checkpoint | str | PathLike[str]
) -> dict[str, str] | None:
    """Compare a base with the base in a signed statement; return None if the fingerprints are equal.

    If the fingerprints differ, return a record with both fingerprints. The record's entry `how` states whether the two
    bases have the same architecture. If the statement has no digest of the base's shapes, `how` is empty.

    Raises:
        UsageError: the statement has no fingerprint of a base.
    """
    fields: Mapping[str, Any] = statement or {}
    kept = fields.get("made_from") or {}
    recorded = [*((fields.get("base") or {}).get("fingerprints") or ()), kept.get(FINGERPRINT)]
    known = [each for each in recorded if isinstance(each, str) and each.startswith(PREFIX)]
    if not known:
        cure = "Omit --base (base=), or pass --adapter (adapters=) for each merged adapter to compute the merge again"
        raise UsageError("the signed statement has no fingerprint of a base", cure=cure)
    checkpoint = opened(base)
    given = fingerprint(checkpoint)
    if given in known:
        return None
    how = relation(checkpoint, [*map(str, (fields.get("base") or {}).get("shapes") or ()), str(kept.get(SHAPES))])
    return {"named_by": "the signed statement", "expected": known[0], "given": given, "how": how}


def _verify(config: Any, root: Path, bundle: SignatureBundle) -> None:
    if linked := linked_folders(root):
        # Refuse links to folders: model-signing skips such links, so any file could be added through a link unnoticed.
        why = "the signature is not valid: it does not cover this link to a folder"
        raise Corrupt(why, path=linked[0], cure=DISTRUST)
    config.set_hashing_config(_hashing(root, bundle))
    # Silence the warning that model-signing prints if a signature does not name its key. The first versions of
    # model-signing wrote such signatures.
    silent = contextlib.redirect_stdout(io.StringIO()) if bundle.key is None else contextlib.nullcontext()
    try:
        with silent:
            config.verify(root, bundle.path)
    except OSError as error:
        raise storage_error(error, error.filename or root) from error
    except ImportError:
        raise
    except Exception as error:  # Any other error here means that the signature is invalid.
        raise Corrupt(f"the signature is not valid: {_why(error)}", path=root, cure=DISTRUST) from None


def _hashing(root: Path, bundle: SignatureBundle) -> Any:
    """Return a hashing config with the signer's settings. The config also ignores the signature file.

    The settings come from the signature file. It is safe to use them, because they are signed, and model-signing checks
    the signature first. Other settings would give other digests.
    """
    serialization = bundle.predicate.get("serialization")
    args: Mapping[str, Any] = serialization if isinstance(serialization, Mapping) else {}
    hashing = model_signing("hashing").Config()
    # Signatures contain the digest's name (`blake2b`), but model-signing's config expects the algorithm's name
    # (`blake2`).
    algorithm = {"blake2b": "blake2"}.get(str(args.get("hash_type")), args.get("hash_type"))
    # Follow links to files, because a hub's cache consists of links. The content of each linked file is compared.
    names = {"hashing_algorithm": algorithm, "allow_symlinks": True}
    try:
        if args.get("method") == "shards":
            hashing.use_shard_serialization(shard_size=int(args["shard_size"]), **names)
        else:
            hashing.use_file_serialization(**names)
    except (KeyError, TypeError, ValueError) as error:
        raise Corrupt(f"the signature is not valid: {first_line(error)}", path=bundle.path, cure=DISTRUST) from None
    hashing.set_allow_symlinks(True)
    paths = [bundle.path.absolute()] if root.absolute() in bundle.path.absolute().parents else []
    inside = [str(each.relative_to(root.absolute())) for each in paths]
    return hashing.set_ignored_paths(paths=inside, ignore_git_paths=".git" in _ignored(bundle))


def _ignored(bundle: SignatureBundle) -> list[str]:
    """Return the paths that the signer left out."""
    serialization = bundle.predicate.get("serialization")
    listed = serialization.get("ignore_paths") if isinstance(serialization, Mapping) else None
    return [name for name in listed if isinstance(name, str) and name] if isinstance(listed, list) else []


_DIGEST = r"""\\?'Digest\(.*?\\?["']\)\\?'"""
_DIGESTS = re.compile(rf": Expected {_DIGEST}, Actual {_DIGEST}", re.DOTALL)
"""Matches digests in model-signing's messages. The quotes in a message may be escaped: model-signing prints its
messages as a Python list, and Python escapes the single quotes of a message that also contains double quotes."""


def _why(error: Exception) -> str:
    """Return the reason in one line, without the digests, which model-signing prints as unreadable Python bytes."""
    reason = first_line(error)
    if reason == "InvalidSignature":  # The `cryptography` package raises this error without a message.
        return "it was made with another key, or was changed"
    reason = _DIGESTS.sub("", reason).removeprefix("Signature mismatch: ")
    try:
        listed = ast.literal_eval(reason) if reason.startswith("[") else [reason]
    except (ValueError, SyntaxError):
        return reason
    return "; ".join(map(str, listed)) if isinstance(listed, list) else reason


def _left_out(root: Path, bundle: SignatureBundle) -> tuple[str, ...]:
    names = _ignored(bundle)
    itself = bundle.path.resolve()
    return tuple(sorted(n for n in names if root.is_dir() and (root / n).exists() and (root / n).resolve() != itself))


def _sigstore(identity: str, issuer: str | None) -> Any:
    config = model_signing("verifying").Config()
    try:
        return config.use_sigstore_verifier(identity=identity, oidc_issuer=issuer)
    except Exception as error:  # For example, the network or the trust root cannot be reached.
        why = f"sigstore cannot be used: {first_line(error)}"
        raise NetworkError(why, cure="Connect to a network and try again: sigstore needs a network") from None


_ASKS = {
    "key": "Give the signer's public key: --key PUB.pem (key=)",
    "certificate": "Give the certificates to trust: --trust CERT.pem (trust=)",
    "sigstore": "Give the signer's identity: --identity and --issuer (identity=, issuer=)",
}
