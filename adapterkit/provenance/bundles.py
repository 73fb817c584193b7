"""Read signature files strictly: the Sigstore bundles that OpenSSF model signing writes.

The signature covers only the payload of the file. In the rest of the file, most tools ignore unknown keys and unused
bits of base64. They therefore accept several different files as the same signature. This reader accepts only known keys
and canonical base64. So either this reader or the cryptographic check refuses a file with any changed bit.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..errors import Corrupt, storage_error
from ..io.inputs import open_input
from ..io.strict_json import load_json

MEDIA_TYPE = "application/vnd.dev.sigstore.bundle.v0.3+json"
LARGEST = 64 << 20
"""The largest size of a signature file, in bytes. A manifest has about 200 bytes per signed file."""

PREDICATE = "adapterkit"
"""The key in the signed predicate for adapterkit's statement of the lineage. According to the specification of model
signing, verifiers ignore unknown keys."""

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
"""Path in the bundle -> the keys that are allowed at this path, for signatures by a key or a certificate."""

_EXTRA = {"verificationMaterial.publicKey": {"rawBytes", "keyDetails"}}
"""Keys that model-signing wrote before 1.0, and that its verifier ignores."""

_BASE64 = {"payload", "sig", "rawBytes"}


@dataclass(frozen=True, slots=True)
class SignatureBundle:
    """The content of a signature file.

    Attributes:
        path: the path of the file.
        kind: `key`, `certificate` or `sigstore`.
        key: the sha256 of the public key that the file names, or None.
        payload: the signed payload, an in-toto statement.
    """

    path: Path
    kind: str
    key: str | None
    payload: Mapping[str, object]

    @property
    def predicate(self) -> Mapping[str, object]:
        found = self.payload.get("predicate")
        return found if isinstance(found, Mapping) else {}

    @property
    def statement(self) -> Mapping[str, object] | None:
        """The statement that adapterkit added when it signed; None in signatures by other tools."""
        found = self.predicate.get(PREDICATE)
        return found if isinstance(found, Mapping) else None


def read_bundle(path: Path) -> SignatureBundle:
    """Read a signature file. This does not verify the signature.

    Raises:
        Corrupt: the file is not a signature file in the form that signing tools write.
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
        told = load_json(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise _corrupt(path, f"it is not JSON ({error})") from None
    if not isinstance(told, dict):
        raise _corrupt(path, "it is not a JSON object")
    if told.get("mediaType") != MEDIA_TYPE:
        raise _corrupt(path, f"mediaType is not {MEDIA_TYPE}")
    kind, material = _kind(path, told)
    # Check only the envelope of sigstore bundles: their log entries have more keys, which sigstore's library checks.
    _check(path, told if kind != "sigstore" else {"dsseEnvelope": told.get("dsseEnvelope")})
    return SignatureBundle(path, kind, material, _payload(path, told))


def _kind(path: Path, told: Mapping[str, object]) -> tuple[str, str | None]:
    material = told.get("verificationMaterial")
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
    """Decode base64, and refuse it unless it is canonical: padded, and without bits after the last byte."""
    if not isinstance(text, str):
        raise _corrupt(path, f"{place} is not base64")
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise _corrupt(path, f"{place} is not base64") from None
    if base64.b64encode(data).decode() != text:
        raise _corrupt(path, f"{place} is not canonical base64")
    return data


def _payload(path: Path, told: Mapping[str, object]) -> Mapping[str, object]:
    envelope = told.get("dsseEnvelope")
    if not isinstance(envelope, dict) or len(envelope.get("signatures") or ()) != 1:
        raise _corrupt(path, "it is not an envelope with one signature")
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
