"""Check keys and certificates, and pass them to OpenSSF model signing. No message shows their content."""

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
"""The environment variable with the password of an encrypted private key."""

LARGEST = 1 << 20
"""The most bytes to read from a file of keys or certificates."""

CURVES = ("secp256r1", "secp384r1", "secp521r1")
"""The elliptic curves that model signing supports: P-256, P-384 and P-521."""

_NEW_KEY = "Make a key: openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out KEY.pem"


def model_signing(part: str) -> ModuleType:
    """Return a module of the package `model-signing`.

    Raises:
        Unsupported: the package is not installed.
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
        Malformed: the key or a certificate is invalid, or the password is wrong.
        Unsupported: the key is of another kind, or model-signing is not installed.
        UsageError: the password of an encrypted key is missing.
    """
    config = model_signing("signing").Config()
    _check_private(Path(key), password)
    if certificate is None:
        return config.use_elliptic_key_signer(private_key=str(key), password=password)
    if password is not None:
        why = "model-signing cannot use an encrypted key together with a certificate"
        cure = "Use a key that is not encrypted, or omit --certificate (certificate=)"
        raise Unsupported(why, path=key, cure=cure)
    for each in (certificate, *chain):
        _certificates(Path(each))
    # If the chain is empty, pass the certificate as the chain: model-signing refuses an empty chain, and verifiers
    # accept a chain with only the certificate.
    above = [str(each) for each in chain] or [str(certificate)]
    try:
        return config.use_certificate_signer(
            private_key=str(key), signing_certificate=str(certificate), certificate_chain=above
        )
    except ValueError:
        why = "the certificate is not for this key"
        raise Malformed(why, path=certificate, cure="Name the certificate that belongs to the key") from None


def verifier(key: str | PathLike[str] | None, chain: Sequence[str | PathLike[str]]) -> Any:
    """Return a verifying config of model-signing with a public key, or with the certificates to trust.

    Raises:
        Malformed: the file does not contain a public key or a certificate.
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
    # Do not include the messages of cryptography: no part of a key may reach a log.
    if b"ENCRYPTED" in data and password is None:
        cure = f"Set {PASSWORD}, or type --password-file FILE (password=)"
        raise UsageError(f"the key {path} is encrypted, but no password was given", cure=cure)
    try:
        found: Any = load_pem_private_key(data, password)
    except TypeError:
        cure = f"Unset {PASSWORD}, and omit --password-file (password=)"
        raise UsageError(f"a password was given, but the key {path} is not encrypted", cure=cure) from None
    except (ValueError, UnsupportedAlgorithm):
        if password is not None and b"ENCRYPTED" in data:
            cure = f"Correct {PASSWORD}, or the file at --password-file (password=)"
            raise Malformed("the password does not decrypt this key", path=path, cure=cure) from None
        raise Malformed("the file is not a private key in PEM form", path=path, cure=_NEW_KEY) from None
    _check_curve(path, found)


def _check_public(path: Path) -> None:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    try:
        found: Any = load_pem_public_key(_read(path))
    except (ValueError, UnsupportedAlgorithm):
        cure = "Export the public key: openssl pkey -in KEY.pem -pubout -out PUB.pem"
        raise Malformed("the file is not a public key in PEM form", path=path, cure=cure) from None
    _check_curve(path, found)


def _check_curve(path: Path, key: object) -> None:
    curve = getattr(getattr(key, "curve", None), "name", None)
    if curve not in CURVES:
        raise Unsupported(f"the key is not of one of the curves {', '.join(CURVES)}", path=path, cure=_NEW_KEY)


def _certificates(path: Path) -> None:
    from cryptography import x509

    try:
        x509.load_pem_x509_certificates(_read(path))
    except ValueError:
        cure = "Name a file of X.509 certificates"
        raise Malformed("the file contains no certificate in PEM form", path=path, cure=cure) from None


def _read(path: Path) -> bytes:
    try:
        with open_input(path) as file:
            return file.read(LARGEST)
    except OSError as error:
        raise storage_error(error, path) from error
