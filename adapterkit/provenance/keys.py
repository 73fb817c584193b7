"""Keys and certificates that sign and verify, handed to OpenSSF model signing; what they hold is never shown."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import Malformed, Unsupported, UsageError, storage_error
from ..io.inputs import open_input

if TYPE_CHECKING:
    from types import ModuleType

PASSWORD = "ADAPTERKIT_KEY_PASSWORD"
"""Environment variable that holds the password of an encrypted private key."""

LARGEST = 1 << 20
"""Bytes that are read of a file of keys or certificates."""

CURVES = ("secp256r1", "secp384r1", "secp521r1")
"""Elliptic curves that model signing takes: P-256, P-384 and P-521."""

_NEW_KEY = "openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out KEY.pem makes one"


def model_signing(part: str) -> ModuleType:
    """Return a module of the package `model-signing`.

    Raises:
        Unsupported: it is not installed.
    """
    try:
        return import_module(f"model_signing.{part}")
    except ImportError as error:
        why = f"signatures need {error.name}, which is not installed"
        raise Unsupported(why, cure="pip install 'adapterkit[sign]'") from None


def signer(
    key: str | PathLike[str], password: bytes | None, certificate: str | PathLike[str] | None,
    chain: Sequence[str | PathLike[str]],
) -> Any:  # fmt: skip
    """Return a signing config of model-signing with a private key.

    Raises:
        Malformed: the key or a certificate is none, or the password is wrong.
        Unsupported: the key is of another kind, or model-signing is not installed.
        UsageError: an encrypted key without a password.
    """
    config = model_signing("signing").Config()
    _check_private(Path(key), password)
    if certificate is None:
        return config.use_elliptic_key_signer(private_key=str(key), password=password)
    if password is not None:
        why = "model-signing takes no password for the key of a certificate"
        raise Unsupported(why, path=key, cure="Give a key that is not encrypted, or leave --certificate out")
    for each in (certificate, *chain):
        _certificates(Path(each))
    # model-signing refuses an empty chain. The certificate itself in its place changes nothing for a verifier.
    above = [str(each) for each in chain] or [str(certificate)]
    try:
        return config.use_certificate_signer(
            private_key=str(key), signing_certificate=str(certificate), certificate_chain=above
        )
    except ValueError:
        why = "the certificate is not for this key"
        raise Malformed(why, path=certificate, cure="Give the certificate of the key's public half") from None


def verifier(key: str | PathLike[str] | None, chain: Sequence[str | PathLike[str]]) -> Any:
    """Return a verifying config of model-signing with a public key, or with the certificates to trust.

    Raises:
        Malformed: the file holds no public key or certificate.
        Unsupported: the key is of another kind, or model-signing is not installed.
    """
    config = model_signing("verifying").Config()
    if key is not None:
        _check_public(Path(key))
        return config.use_elliptic_key_verifier(public_key=str(key))
    for each in chain:
        _certificates(Path(each))
    return config.use_certificate_verifier(certificate_chain=[str(each) for each in chain])


def _check_private(path: Path, password: bytes | None) -> None:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    data = _read(path)
    # The messages of cryptography are not passed on: no part of a key may get into a log.
    if b"ENCRYPTED" in data and password is None:
        cure = f"Set {PASSWORD}, or give --password-file FILE (password=)"
        raise UsageError(f"the key {path} is encrypted, and no password was given", cure=cure)
    try:
        found: Any = load_pem_private_key(data, password)
    except TypeError:
        cure = f"Unset {PASSWORD}, and leave --password-file (password=) out"
        raise UsageError(f"a password was given, and the key {path} is not encrypted", cure=cure) from None
    except (ValueError, UnsupportedAlgorithm):
        if password is not None and b"ENCRYPTED" in data:
            cure = f"Correct {PASSWORD}, or the file of --password-file (password=)"
            raise Malformed("the password does not open this key", path=path, cure=cure) from None
        raise Malformed("not a private key in PEM form", path=path, cure=_NEW_KEY) from None
    _check_curve(path, found)


def _check_public(path: Path) -> None:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    try:
        found: Any = load_pem_public_key(_read(path))
    except (ValueError, UnsupportedAlgorithm):
        cure = "Give the public half: openssl pkey -in KEY.pem -pubout -out PUB.pem"
        raise Malformed("not a public key in PEM form", path=path, cure=cure) from None
    _check_curve(path, found)


def _check_curve(path: Path, key: object) -> None:
    curve = getattr(getattr(key, "curve", None), "name", None)
    if curve not in CURVES:
        raise Unsupported(f"a key of another kind than {', '.join(CURVES)}", path=path, cure=_NEW_KEY)


def _certificates(path: Path) -> None:
    from cryptography import x509

    try:
        x509.load_pem_x509_certificates(_read(path))
    except ValueError:
        raise Malformed("no certificate in PEM form", path=path, cure="Give a file of X.509 certificates") from None


def _read(path: Path) -> bytes:
    try:
        with open_input(path) as file:
            return file.read(LARGEST)
    except OSError as error:
        raise storage_error(error, path) from error
