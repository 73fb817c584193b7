"""Sign every file of an adapter or a model, and a statement of its lineage, with OpenSSF model signing.

The signature is a Sigstore bundle, so `model_signing verify` can check it. The signed predicate has an additional
entry, `adapterkit`, with the statement. The signature covers this entry, but other verifiers ignore the entry.

The statement is a copy of records in the files: the lineage of an adapter, or the record of a merge. So the signature
also covers the names of the base and the adapters, and the weight that each adapter had in the merge. No error message
contains any part of a private key.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from os import PathLike
from os.path import isdir, isfile
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, NoReturn

from ..core.arguments import checks_types
from ..core.licence_terms import licence_at
from ..core.metadata import METADATA, REPORT, fingerprints_of, shapes_of
from ..errors import (
    AdapterkitError,
    Malformed,
    NetworkError,
    UnknownFormat,
    Unsupported,
    UsageError,
    first_line,
    public,
    storage_error,
)
from ..formats import detect, read
from ..io.checkpoint import opened
from ..io.inputs import open_input
from ..io.locations import NOTE, check_exists, entries_below
from ..io.stages import stage
from ..io.staging import check_beside, check_free, check_inputs, staged
from ..naming.binding.fitting import merge_record

if TYPE_CHECKING:
    from types import ModuleType

    from ..core.adapter import Adapter
    from ..io.strict_json import JsonValue

PASSWORD = "ADAPTERKIT_KEY_PASSWORD"
"""The environment variable with the password of an encrypted private key."""

LARGEST_KEY = 1 << 20
"""The largest number of bytes to read from a file with a key or certificates."""

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
    """Return a model-signing config that signs with a private key and, if given, the certificate of the key.

    Raises:
        Malformed: the key or a certificate is invalid, or the password is wrong.
        Unsupported: the curve of the key is not in `CURVES`, or model-signing is not installed.
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
        why = "the certificate belongs to another key"
        raise Malformed(why, path=certificate, cure="Pass the certificate that belongs to the key") from None


def verifier(key: str | PathLike[str] | None, chain: Sequence[str | PathLike[str]]) -> Any:
    """Return a model-signing config that verifies with a public key, or with the certificates to trust.

    Raises:
        Malformed: a file does not contain a public key or a certificate in PEM form.
        Unsupported: the curve of the key is not in `CURVES`, or model-signing is not installed.
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
    # The errors below do not quote messages of the package `cryptography`: no part of a private key may reach a log.
    if b"ENCRYPTED" in data and password is None:
        cure = f"Set {PASSWORD}, or pass --password-file FILE (password=)"
        raise UsageError(f"the key {path} is encrypted, but no password was given", cure=cure)
    try:
        key: Any = load_pem_private_key(data, password)
    except TypeError:
        cure = f"Unset {PASSWORD}, and omit --password-file (password=)"
        raise UsageError(f"a password was given, but the key {path} is not encrypted", cure=cure) from None
    except (ValueError, UnsupportedAlgorithm):
        if password is not None and b"ENCRYPTED" in data:
            cure = f"Correct the password in {PASSWORD} or in the file of --password-file (password=)"
            raise Malformed("the password does not decrypt this key", path=path, cure=cure) from None
        raise Malformed("the file is not a private key in PEM form", path=path, cure=_NEW_KEY) from None
    _check_curve(path, key)


def _check_public(path: Path) -> None:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    try:
        key: Any = load_pem_public_key(_read(path))
    except (ValueError, UnsupportedAlgorithm):
        cure = "Export the public key: openssl pkey -in KEY.pem -pubout -out PUB.pem"
        raise Malformed("the file is not a public key in PEM form", path=path, cure=cure) from None
    _check_curve(path, key)


def _check_curve(path: Path, key: object) -> None:
    curve = getattr(getattr(key, "curve", None), "name", None)
    if curve not in CURVES:
        raise Unsupported(f"the key does not use one of the curves {', '.join(CURVES)}", path=path, cure=_NEW_KEY)


def _certificates(path: Path) -> None:
    from cryptography import x509

    try:
        x509.load_pem_x509_certificates(_read(path))
    except ValueError:
        cure = "Pass a file with X.509 certificates in PEM form"
        raise Malformed("the file contains no certificate in PEM form", path=path, cure=cure) from None


def _read(path: Path) -> bytes:
    try:
        with open_input(path) as file:
            return file.read(LARGEST_KEY)
    except OSError as error:
        raise storage_error(error, path) from error


PREDICATE = "adapterkit"
"""The key under which the signed predicate contains adapterkit's statement of the lineage. According to the
specification of model signing, verifiers ignore unknown keys."""

VERSION = 1
"""The version of the statement's format."""

_EXACT = 1 << 53
"""Integers with a larger absolute value are stored as strings, because the predicate is a protobuf `Struct`, which
stores every number as a double."""

_OF_FILES = ("written", "norms")
"""The keys of a merge's record that the statement omits. They describe the content of the model's files, which the
signature already covers with a digest of each file."""


def statement_of(path: Path) -> dict[str, JsonValue]:
    """Return the statement of the lineage as plain JSON, from the records in the files at `path`.

    Args:
        path: an adapter, a model with or without the record of a merge, an ONNX graph, or any other file or folder.

    Raises:
        StorageError: a file cannot be read.
    """
    from .. import __version__

    statement = {
        "version": VERSION,
        "adapterkit": __version__,
        "licence": licence_at(path).get("license"),
        **_kind(path),
    }
    plain: dict[str, Any] = _plain(statement)
    return plain


def _kind(path: Path) -> Mapping[str, object]:
    if (path / REPORT).is_file():
        record = merge_record(opened(path))
        return {"kind": "merged", "made_from": {key: value for key, value in record.items() if key not in _OF_FILES}}
    try:
        name = detect(path)
        return _adapter(read(path, name), name)
    except UnknownFormat:
        pass
    except AdapterkitError as error:
        # Sign the adapter even if this function cannot read it: the adapter may need an option, such as `alpha`.
        return {"kind": "adapter", "unread": error.why}
    if path.suffix.lower() == ".onnx":
        return {"kind": "graph", **_original(path)}
    try:
        opened(path)
    except AdapterkitError:
        return {"kind": "files"}
    return {"kind": "model"}


def _adapter(adapter: Adapter, name: str) -> dict[str, object]:
    base = adapter.base
    return {
        "kind": "adapter", "format": name, "digest": adapter.digest(), "methods": list(adapter.methods),
        "targets": len(adapter.updates),
        "base": {
            "id": base and base.id, "revision": base and base.revision, "config_hash": base and base.config_hash,
            "fingerprints": list(fingerprints_of(adapter)), "shapes": list(shapes_of(adapter)),
        },
        "lineage": [{"op": step.op, "args": _without_metadata(step.args)} for step in adapter.recipe],
    }  # fmt: skip


def _original(path: Path) -> dict[str, JsonValue]:
    """Return the SHA-256 that the graph's file had before `onnx.inject`; {} if the graph has no record of it."""
    import onnx

    from ..onnx.injecting import ORIGINAL

    try:
        model = onnx.load(path, load_external_data=False)
        note = next((each.value for each in model.metadata_props if each.key == ORIGINAL), None)
        return {} if note is None else {"original_sha256": json.loads(note)["sha256"]}
    except Exception as error:  # Sign the file even if the graph or its metadata is damaged (protobuf's DecodeError).
        return {"unread": first_line(error)}


def _without_metadata(args: object) -> object:
    """Remove the metadata of training tools: it can take megabytes, and the signed files contain it anyway."""
    if isinstance(args, Mapping):
        return {key: _without_metadata(value) for key, value in args.items() if key != METADATA}
    return [_without_metadata(each) for each in args] if isinstance(args, list | tuple) else args


def _plain(value: object) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, str):
        return public(value)
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > _EXACT:
        return str(value)
    return value


GIT = (".git", ".gitattributes", ".github", ".gitignore")
"""git's files. They are not signed: model signing omits them by default, and refuses a signature that covers them."""


NOTES = (NOTE, ".cache/huggingface")
"""Files that `pull` and huggingface_hub add to a downloaded folder. They are not signed, so the signature is also valid
for a downloaded copy of the folder."""


@dataclass(frozen=True, slots=True)
class Signed:
    """The result of signing.

    Attributes:
        path: the signed file or folder.
        out: the signature file.
        files: the number of signed files.
        statement: the signed statement of the lineage.
        not_covered: existing files that are not signed: git's files, and records of downloads.
    """

    path: str
    out: str
    files: int
    statement: Mapping[str, JsonValue]
    not_covered: tuple[str, ...] = ()

    def record(self) -> dict[str, JsonValue]:
        """Return the result as plain data, for `--json`."""
        return {
            "path": self.path, "out": self.out, "files": self.files, "statement": dict(self.statement),
            "not_covered": list(self.not_covered),
        }  # fmt: skip


@checks_types
def sign(
    path: str | PathLike[str],
    out: str | PathLike[str] | None = None,
    *,
    key: str | PathLike[str] | None = None,
    password: bytes | None = None,
    certificate: str | PathLike[str] | None = None,
    chain: Sequence[str | PathLike[str]] = (),
    sigstore: bool = False,
    identity_token: str | None = None,
    allow_symlinks: bool = False,
    overwrite: bool = False,
    made_from: str | None = None,
) -> Signed:
    """Sign every file of an adapter or a model, and a statement of its lineage.

    Args:
        path: a folder, or one file.
        out: the signature file; `PATH.sig` if None.
        key: the file with the private key, in PEM form. The elliptic curve must be P-256, P-384 or P-521.
        password: the password of an encrypted key.
        certificate: the file with the key's certificate, in PEM form. A verifier then needs to trust only the issuer of
            the certificate.
        chain: files with the certificates between `certificate` and the trusted root.
        sigstore: sign with an OpenID Connect identity instead of a key. This needs a network, and writes the identity
            to a public log.
        identity_token: with `sigstore`, the identity token. If None, the token comes from the environment (in CI), or
            from a login in a browser.
        allow_symlinks: sign the files that symbolic links point to, as in a hub's cache. By default, links are refused.
        overwrite: replace an existing signature file.
        made_from: a digest of the inputs. It is stored with the signature, so that a later run with the same inputs
            recognises the signature.

    Raises:
        StorageError: `path` does not exist, or `out` exists.
        UsageError: neither or both of `key` and `sigstore` are set, the password of an encrypted key is missing, the
            folder has no files, or `out` is a key, a certificate or a file to sign.
        Malformed, Unsupported: the key is invalid or of an unsupported kind, a file's name is not UTF-8, or
            `model-signing` is not installed.
        NetworkError: sigstore cannot be reached, or refuses to sign.

    Example:
        >>> adapterkit.provenance.sign("lora", key="key.pem").out  # doctest: +SKIP
        'lora.sig'
    """
    if (key is None) == (not sigstore):
        cure = "Pass either --key KEY.pem (key=) or --sigstore (sigstore=True)"
        raise UsageError("signing needs exactly one of a key and sigstore", cure=cure)
    if certificate is None and chain:
        cure = "Also pass --certificate CERT.pem (certificate=)"
        raise UsageError("a chain was given without a certificate", cure=cure)
    root = settled(Path(path))
    place = signature_file(Path(path)) if out is None else Path(out)
    files = files_of(root, place)
    _check_names(root, files)
    check_free(place, overwrite)
    check_inputs([place], [Path(each) for each in (key, certificate, *chain) if each is not None])
    check_beside(place, [root], b"sigstore.bundle")
    config = _sigstore(identity_token) if key is None else signer(key, password, certificate, chain)
    stage("reading the lineage")
    statement = statement_of(root)
    stage("hashing files")
    payload = _payload(root, place, allow_symlinks, statement)
    stage("signing")
    data = _signed(config, payload, sigstore)
    with staged(place, overwrite=overwrite, made_from=made_from) as file:
        file.write_text(data, "utf-8")
    return Signed(public(str(path)), str(place), len(files), statement, not_covered(root))


def signature_file(path: Path) -> Path:
    """Return the default path of the signature of a file or folder: `NAME.sig` next to it."""
    settled = path if path.name else path.resolve()
    return settled.with_name(f"{settled.name}.sig")


def files_of(root: Path, signature: Path) -> list[Path]:
    """Return the files to sign.

    Args:
        root: the file or folder.
        signature: the signature file, which is not signed.

    Raises:
        StorageError: `root` does not exist.
    """
    check_exists(root)
    if root.is_file():
        return [root]
    files = [each for each in _entries(root) if isfile(each) and each.absolute() != signature.absolute()]
    return sorted(each for each in files if not _left_out(each.relative_to(root)))


def special_files(root: Path) -> list[Path]:
    """Return what `files_of` omits below `root`: pipes, devices, sockets, and links whose targets are missing."""
    others = [each for each in _entries(root) if not isfile(each) and not isdir(each)]
    return sorted(each for each in others if not _left_out(each.relative_to(root)))


def _left_out(file: Path) -> bool:
    return _below(file, [PurePosixPath(name) for name in (*GIT, *NOTES)])


def _check_names(root: Path, files: Sequence[Path]) -> None:
    """Refuse a folder without files. Also refuse file names that are not UTF-8: the signature cannot contain them."""
    if not files:
        why = "there is no file to sign"
        raise UsageError(why, path=root, cure="Pass the folder or the file of the adapter or the model")
    check_utf8(root, files)


def check_utf8(root: Path, files: Sequence[Path]) -> None:
    """Refuse file names that are not UTF-8.

    Raises:
        Unsupported: a file's name is not UTF-8.
    """
    for file in files:
        try:
            file.relative_to(root).as_posix().encode()
        except UnicodeEncodeError:
            raise Unsupported("the file's name is not UTF-8", path=ascii(str(file)), cure="Rename the file") from None


def _below(file: Path, names: Sequence[PurePosixPath]) -> bool:
    return any(PurePosixPath(file.as_posix()).is_relative_to(name) for name in names)


def not_covered(root: Path) -> tuple[str, ...]:
    """Return the names from `GIT` and `NOTES` that exist in the folder. They are not signed."""
    return tuple(name for name in (*GIT, *NOTES) if root.is_dir() and (root / name).exists())


def _payload(root: Path, signature: Path, allow_symlinks: bool, statement: Mapping[str, JsonValue]) -> Any:
    """Return model-signing's payload with the digests of all files, and with the statement added to the predicate."""
    hashing = model_signing("hashing").Config().set_allow_symlinks(allow_symlinks)
    is_inside = root.is_dir() and root.absolute() in signature.absolute().parents
    inside = [signature.absolute().relative_to(root.absolute())] if is_inside else []
    if linked := linked_folders(root):
        cure = "Copy the folder without links (cp -rL), and sign the copy"
        why = "this is a link to a folder, and model-signing would not sign the files in the linked folder"
        raise Unsupported(why, path=linked[0], cure=cure)
    hashing.set_ignored_paths(paths=[*inside, *NOTES], ignore_git_paths=True)
    try:
        manifest = hashing.hash(root)
    except OSError as error:
        raise storage_error(error, error.filename or root) from error
    except ValueError as error:
        raise _not_hashed(root, error) from None
    payload = model_signing("_signing.signing").Payload(manifest)
    payload.statement.pb.predicate.update({PREDICATE: dict(statement)})
    return payload


def settled(root: Path) -> Path:
    """Return the path; if it is a link, return the target of the link, because model-signing refuses links."""
    return root.resolve() if root.is_symlink() else root


def linked_folders(root: Path) -> list[Path]:
    """Return all symbolic links below `root` that point to folders. model-signing skips the files in these folders."""
    return [each for each in _entries(root) if each.is_symlink() and isdir(each)]


def _entries(root: Path) -> list[Path]:
    """List everything below a folder; nothing if `root` is a file.

    Raises:
        StorageError: a folder cannot be read.
    """

    def failed(error: OSError) -> NoReturn:
        raise storage_error(error, Path(error.filename)) from error

    return entries_below(root, failed) if root.is_dir() else []


def _not_hashed(root: Path, error: ValueError) -> AdapterkitError:
    if any(each.is_symlink() for each in (root, *_entries(root))):
        cure = "Pass --allow-symlinks (allow_symlinks=True) to sign linked files, or sign a copy without links: cp -rL"
        return Unsupported("the folder contains symbolic links", path=root, cure=cure)
    why = f"model-signing cannot hash the files: {first_line(error)}"
    return Unsupported(why, path=root, cure="Sign a folder of plain files")


def _signed(config: Any, payload: Any, sigstore: bool) -> str:
    try:
        # Use the private attribute `_signer`, because the public `Config.sign` cannot add adapterkit's statement.
        bundle = config._signer.sign(payload).bundle
        text: str = bundle.to_json()
    except Exception as error:
        if not sigstore:
            raise
        raise NetworkError(f"sigstore did not sign: {first_line(error)}", cure=_OFFLINE) from None
    return text


def _sigstore(token: str | None) -> Any:
    config = model_signing("signing").Config()
    try:
        return config.use_sigstore_signer(identity_token=token, use_ambient_credentials=token is None)
    except Exception as error:  # For example, the network cannot be reached, or the identity is refused.
        raise NetworkError(f"sigstore cannot be used: {first_line(error)}", cure=_OFFLINE) from None


_OFFLINE = "Try again, or sign offline with --key KEY.pem (key=)"
