"""Read a signature file strictly: a Sigstore bundle, as OpenSSF model signing writes it.

The signature itself covers the payload alone. The rest of the file is read leniently by most tools: unknown keys are
ignored, and the spare bits of base64 are dropped, so two different files can count as the same signature. Here every
key must be a known one and all base64 canonical. Then each changed bit of the file is either found here or changes what
is checked by cryptography.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import Corrupt, storage_error
from ..io.inputs import open_input
from ..io.strict_json import load_json

if TYPE_CHECKING:
    pass


MEDIA_TYPE = "application/vnd.dev.sigstore.bundle.v0.3+json"
LARGEST = 64 << 20
"""Largest signature file in bytes. A manifest has about 200 bytes a file."""

PREDICATE = "adapterkit"
"""The key of the statement in the predicate. Model signing says that verifiers ignore further keys of its predicate."""

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
"""Place -> its keys, in bundles that were signed with a key or a certificate."""

_EXTRA = {"verificationMaterial.publicKey": {"rawBytes", "keyDetails"}}
"""Keys that model-signing before 1.0 wrote, and that its verifier drops."""

_BASE64 = {"payload", "sig", "rawBytes"}


@dataclass(frozen=True, slots=True)
class SignatureBundle:
    """A signature file.

    Attributes:
        path: the file.
        kind: `key`, `certificate` or `sigstore`.
        key: sha256 of the public key that it names, or None.
        payload: the signed payload: an in-toto statement.
    """

    path: Path
    kind: str
    key: str | None
    payload: Mapping[str, Any]

    @property
    def predicate(self) -> Mapping[str, Any]:
        found = self.payload.get("predicate")
        return found if isinstance(found, Mapping) else {}

    @property
    def statement(self) -> Mapping[str, Any] | None:
        """The statement that adapterkit recorded when it signed; None in signatures of other tools."""
        found = self.predicate.get(PREDICATE)
        return found if isinstance(found, Mapping) else None


def read_bundle(path: Path) -> SignatureBundle:
    """Read a signature file. Nothing in it is proven by that.

    Raises:
        Corrupt: it is not a signature file, or not one in the form that signing tools write.
        StorageError: it cannot be read.
    """
    try:
        with open_input(path) as file:
            data = file.read(LARGEST + 1)
    except OSError as error:
        raise storage_error(error, path) from error
    if len(data) > LARGEST:
        raise _corrupt(path, f"larger than {LARGEST >> 20} MiB")
    try:
        told = load_json(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise _corrupt(path, f"not JSON ({error})") from None
    if not isinstance(told, dict):
        raise _corrupt(path, "not a JSON object")
    if told.get("mediaType") != MEDIA_TYPE:
        raise _corrupt(path, f"mediaType is not {MEDIA_TYPE}")
    kind, material = _kind(path, told)
    # Sigstore's own library checks its bundles, whose entries of the log have more keys.
    _check(path, told if kind != "sigstore" else {"dsseEnvelope": told.get("dsseEnvelope")})
    return SignatureBundle(path, kind, material, _payload(path, told))


def _kind(path: Path, told: Mapping[str, Any]) -> tuple[str, str | None]:
    material = told.get("verificationMaterial")
    if not isinstance(material, dict):
        raise _corrupt(path, "no verificationMaterial")
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
                raise _corrupt(path, f"{inside} is not what signing tools write")
    elif place:
        raise _corrupt(path, f"{place} holds something else than objects")


def _decoded(path: Path, place: str, text: Any) -> bytes:
    """Decode base64 that has one form only: padded, and without bits beyond the last byte."""
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError, TypeError):
        raise _corrupt(path, f"{place} is not base64") from None
    if base64.b64encode(data).decode() != text:
        raise _corrupt(path, f"{place} is not base64 in its canonical form")
    return data


def _payload(path: Path, told: Mapping[str, Any]) -> Mapping[str, Any]:
    envelope = told.get("dsseEnvelope")
    if not isinstance(envelope, dict) or len(envelope.get("signatures") or ()) != 1:
        raise _corrupt(path, "not an envelope with one signature")
    try:
        payload = load_json(_decoded(path, "payload", envelope.get("payload")).decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise _corrupt(path, f"the signed payload is not JSON ({error})") from None
    if not isinstance(payload, dict):
        raise _corrupt(path, "the signed payload is not a JSON object")
    return payload


def _corrupt(path: Path, why: str) -> Corrupt:
    return Corrupt(f"not a valid signature file: {why}", path=path, cure=DISTRUST)


DISTRUST = "Do not trust these files; fetch them and the signature again from who signed them"
