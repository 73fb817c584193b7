"""Sign every file of an adapter or a model, and a statement of its lineage, with OpenSSF model signing.

The signature is a Sigstore bundle, which `model_signing verify` can check too. The signed predicate has an additional
key with the statement of `statement.py`. The signature covers this key, but other verifiers ignore the key.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from ..errors import (
    AdapterkitError,
    NetworkError,
    Unsupported,
    UsageError,
    first_line,
    public,
    storage_error,
)
from ..io.locations import NOTE, check_exists
from ..io.stages import stage
from ..io.staging import check_free, check_inputs, staged
from .bundles import PREDICATE
from .keys import model_signing, signer
from .statement import statement_of

if TYPE_CHECKING:
    from ..io.strict_json import JsonValue


GIT = (".git", ".gitattributes", ".github", ".gitignore")
"""Files that are not signed: model signing omits them by default, and would refuse a signature that covers them."""


NOTES = (NOTE, ".cache/huggingface")
"""Files that `pull` and huggingface_hub add to a downloaded folder. They are not signed, so that the check accepts a
download of the signed files."""


@dataclass(frozen=True, slots=True)
class Signed:
    """The result of signing.

    Attributes:
        path: the signed file or folder.
        out: the signature file.
        files: the number of signed files.
        statement: the signed statement of the lineage.
        not_covered: existing files that are not signed: files of git and of downloads.
    """

    path: str
    out: str
    files: int
    statement: Mapping[str, Any]
    not_covered: tuple[str, ...] = ()

    def record(self) -> dict[str, JsonValue]:
        """Return the result as plain data, for `--json`."""
        return {
            "path": self.path, "out": self.out, "files": self.files, "statement": dict(self.statement),
            "not_covered": list(self.not_covered),
        }  # fmt: skip


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
        key: a private key of the elliptic curve P-256, P-384 or P-521, in PEM form.
        password: the password of an encrypted key.
        certificate: the certificate of the key, in PEM form; a verifier then needs to trust only its issuer.
        chain: the certificates between `certificate` and the trusted root.
        sigstore: sign with an OpenID Connect identity instead of a key. This needs a network, and writes the identity
            to a public log.
        identity_token: with `sigstore`, the identity token; if None, the token in the environment (in CI), or the token
            from a login in a browser.
        allow_symlinks: sign the targets of links, as in the cache of a hub, instead of refusing links.
        overwrite: replace an existing signature file.
        made_from: a digest of the inputs. It is stored with the signature, so that a later run with the same inputs
            recognises the signature.

    Raises:
        StorageError: `path` does not exist, or `out` exists.
        UsageError: neither or both of `key` and `sigstore` are set, the password of an encrypted key is missing, or the
            folder has no files.
        Malformed, Unsupported: the key is invalid or of another kind, a file's name is not UTF-8, or `model-signing` is
            not installed.
        NetworkError: sigstore cannot be reached, or refuses to sign.

    Example:
        >>> adapterkit.provenance.sign("lora", key="key.pem").out  # doctest: +SKIP
        'lora.sig'
    """
    if (key is None) == (not sigstore):
        cure = "Type either --key KEY.pem (key=) or --sigstore (sigstore=True)"
        raise UsageError("signing needs exactly one of a key and sigstore", cure=cure)
    if certificate is None and chain:
        cure = "Also type --certificate CERT.pem (certificate=)"
        raise UsageError("a chain was given without a certificate", cure=cure)
    root = settled(Path(path))
    place = signature_file(Path(path)) if out is None else Path(out)
    files = files_of(root, place)
    _check_names(root, files)
    check_free(place, overwrite)
    check_inputs([place], files)
    config = _sigstore(identity_token) if key is None else signer(key, password, certificate, chain)
    stage("reading the lineage")
    told = statement_of(root)
    stage("hashing files")
    payload = _payload(root, place, allow_symlinks, told)
    stage("signing")
    data = _signed(config, payload, sigstore)
    with staged(place, overwrite=overwrite, made_from=made_from) as file:
        file.write_text(data, "utf-8")
    return Signed(public(str(path)), str(place), len(files), told, not_covered(root))


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
    found = [each for each in root.rglob("*") if each.is_file() and each.absolute() != signature.absolute()]
    left_out = [PurePosixPath(name) for name in (*GIT, *NOTES)]
    return sorted(each for each in found if not _below(each.relative_to(root), left_out))


def _check_names(root: Path, files: Sequence[Path]) -> None:
    """Refuse a folder without files, and names that a statement in JSON cannot hold."""
    if not files:
        why = "there is no file to sign"
        raise UsageError(why, path=root, cure="Name the folder or the file of the adapter or the model")
    for file in files:
        try:
            file.relative_to(root).as_posix().encode()
        except UnicodeEncodeError:
            raise Unsupported("the file's name is not UTF-8", path=ascii(str(file)), cure="Rename the file") from None


def _below(file: Path, names: Sequence[PurePosixPath]) -> bool:
    return any(PurePosixPath(file.as_posix()).is_relative_to(name) for name in names)


def not_covered(root: Path) -> tuple[str, ...]:
    """Return the files of git and of downloads in the folder, which are not signed."""
    return tuple(name for name in (*GIT, *NOTES) if root.is_dir() and (root / name).exists())


def _payload(root: Path, signature: Path, allow_symlinks: bool, told: Mapping[str, JsonValue]) -> Any:
    """Return model-signing's payload with the digests of all files, and with the statement added to the predicate."""
    hashing = model_signing("hashing").Config().set_allow_symlinks(allow_symlinks)
    inside = [signature.absolute().relative_to(root.absolute())] if _within(signature, root) else []
    if linked := linked_folders(root):
        cure = "Sign a copy without links: cp -rL"
        why = "this is a link to a folder, and model-signing would not sign the files in it"
        raise Unsupported(why, path=linked[0], cure=cure)
    hashing.set_ignored_paths(paths=[*inside, *NOTES], ignore_git_paths=True)
    try:
        manifest = hashing.hash(root)
    except OSError as error:
        raise storage_error(error, error.filename or root) from error
    except ValueError as error:
        raise _not_hashed(root, error) from None
    payload = model_signing("_signing.signing").Payload(manifest)
    payload.statement.pb.predicate.update({PREDICATE: dict(told)})
    return payload


def settled(root: Path) -> Path:
    """Return the path; if it is a link, return the target of the link, because model-signing refuses links."""
    return root.resolve() if root.is_symlink() else root


def linked_folders(root: Path) -> list[Path]:
    """Return the links to folders below a folder. model-signing skips them, so it does not cover their files."""
    return sorted(each for each in root.rglob("*") if each.is_symlink() and each.is_dir())


def _not_hashed(root: Path, error: ValueError) -> AdapterkitError:
    if any(each.is_symlink() for each in (root, *root.rglob("*"))):
        cure = "Pass --allow-symlinks (allow_symlinks=True) to sign their targets, or sign a copy without links: cp -rL"
        return Unsupported("the folder contains symbolic links", path=root, cure=cure)
    why = f"model-signing cannot hash the files: {first_line(error)}"
    return Unsupported(why, path=root, cure="Sign a folder of plain files")


def _within(file: Path, root: Path) -> bool:
    return root.is_dir() and root.absolute() in file.absolute().parents


def _signed(config: Any, payload: Any, sigstore: bool) -> str:
    try:
        # Use the private signer: the public `Config.sign` creates a payload without a statement.
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
    except Exception as error:  # Errors of the network, of the trust root, or of the identity.
        raise NetworkError(f"sigstore cannot be used: {first_line(error)}", cure=_OFFLINE) from None


_OFFLINE = "Try again, or sign offline with --key KEY.pem (key=)"
