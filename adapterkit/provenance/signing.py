"""Sign an adapter or a model by OpenSSF model signing: every file, and what it was made from.

The signature is a Sigstore bundle that `model_signing verify` checks, too. Its predicate has one more key, the
statement of `statement.py`; model signing's own verifier ignores it, and the signature covers it.
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
"""Files that model signing leaves out by default; with them, its command would refuse our signatures."""


NOTES = (NOTE, ".cache/huggingface")
"""Notes that `pull` and huggingface_hub put into a folder that they fetch. Signing says to leave them out, so that what
was fetched is what was signed."""


@dataclass(frozen=True, slots=True)
class Signed:
    """A signature that was written.

    Attributes:
        path: the file or folder.
        out: the signature file.
        files: the number of files whose digests are signed.
        statement: what is recorded of its origin.
        not_covered: files that are there and left out: git's, and notes of fetching.
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
    """Sign every file of an adapter or a model, with a statement of what it was made from.

    Args:
        path: a folder, or one file.
        out: the signature file; `PATH.sig` if absent.
        key: a private key in PEM form, of the elliptic curve P-256, P-384 or P-521.
        password: the key's, if it is encrypted.
        certificate: the certificate of the key, in PEM form; then a verifier needs its issuer instead of the key.
        chain: the certificates between it and the one to trust.
        sigstore: sign with an identity of OpenID Connect instead of a key. This needs a network, and writes the
            identity into a public log.
        identity_token: with `sigstore`, the token; if absent, that of the environment (a runner of CI), or a browser.
        allow_symlinks: sign what links point to, as in the cache of a hub, instead of refusing links.
        overwrite: replace an existing signature file.
        made_from: a digest of what decides the output, kept with it for a later run.

    Raises:
        StorageError: nothing is there, or something is at `out`.
        UsageError: neither a key nor `sigstore`, or both; or an encrypted key without a password.
        Malformed, Unsupported: the key is no key, or one of another kind; `model-signing` is not installed.
        NetworkError: sigstore cannot be reached, or refused.

    Example:
        >>> adapterkit.provenance.sign("lora", key="key.pem").out  # doctest: +SKIP
        'lora.sig'
    """
    if (key is None) == (not sigstore):
        raise UsageError("one of a key and sigstore is needed", cure="Give --key KEY.pem (key=), or --sigstore")
    if certificate is None and chain:
        raise UsageError("a chain without a certificate", cure="Give --certificate CERT.pem (certificate=), too")
    root = settled(Path(path))
    place = signature_file(Path(path)) if out is None else Path(out)
    files = files_of(root, place)
    check_free(place, overwrite)
    check_inputs([place], files)
    config = _sigstore(identity_token) if key is None else signer(key, password, certificate, chain)
    stage("reading what it was made from")
    told = statement_of(root)
    stage("hashing files")
    payload = _payload(root, place, allow_symlinks, told)
    stage("signing")
    data = _signed(config, payload, sigstore)
    with staged(place, overwrite=overwrite, made_from=made_from) as file:
        file.write_text(data, "utf-8")
    return Signed(public(str(path)), str(place), len(files), told, not_covered(root))


def signature_file(path: Path) -> Path:
    """Return where the signature of a file or folder lies if no other place is named: beside it, `NAME.sig`."""
    settled = path if path.name else path.resolve()
    return settled.with_name(f"{settled.name}.sig")


def files_of(root: Path, signature: Path) -> list[Path]:
    """List the files that a signature covers, but for the signature itself.

    Raises:
        StorageError: nothing is there.
    """
    check_exists(root)
    if root.is_file():
        return [root]
    found = [each for each in root.rglob("*") if each.is_file() and each.absolute() != signature.absolute()]
    left_out = [PurePosixPath(name) for name in (*GIT, *NOTES)]
    return sorted(each for each in found if not _below(each.relative_to(root), left_out))


def _below(file: Path, names: Sequence[PurePosixPath]) -> bool:
    return any(PurePosixPath(file.as_posix()).is_relative_to(name) for name in names)


def not_covered(root: Path) -> tuple[str, ...]:
    """List what is there of git's files and of notes of fetching, which signatures do not cover."""
    return tuple(name for name in (*GIT, *NOTES) if root.is_dir() and (root / name).exists())


def _payload(root: Path, signature: Path, allow_symlinks: bool, told: Mapping[str, JsonValue]) -> Any:
    """Return model-signing's payload, which has the digests of all files, with the statement in its predicate."""
    hashing = model_signing("hashing").Config().set_allow_symlinks(allow_symlinks)
    inside = [signature.absolute().relative_to(root.absolute())] if _within(signature, root) else []
    if linked := linked_folders(root):
        cure = "Sign a copy that holds the files themselves: cp -rL"
        raise Unsupported("a link to a folder, whose files would not be signed", path=linked[0], cure=cure)
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
    """Return the file or folder itself, if its path is a link: model-signing takes no links as such."""
    return root.resolve() if root.is_symlink() else root


def linked_folders(root: Path) -> list[Path]:
    """List the links to folders below a folder; model-signing passes over them, so their files would not be covered."""
    return sorted(each for each in root.rglob("*") if each.is_symlink() and each.is_dir())


def _not_hashed(root: Path, error: ValueError) -> AdapterkitError:
    if any(each.is_symlink() for each in (root, *root.rglob("*"))):
        cure = "Pass --allow-symlinks (allow_symlinks=True) to sign what they point to, or sign a copy"
        return Unsupported("it holds symbolic links", path=root, cure=cure)
    return Unsupported(f"cannot be signed: {first_line(error)}", path=root, cure="Sign a folder of plain files")


def _within(file: Path, root: Path) -> bool:
    return root.is_dir() and root.absolute() in file.absolute().parents


def _signed(config: Any, payload: Any, sigstore: bool) -> str:
    try:
        # The public `Config.sign` makes its own payload, which has no place for a statement.
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
    except Exception as error:  # Errors of the network, of the trust root's files, of the identity.
        raise NetworkError(f"sigstore cannot be used: {first_line(error)}", cure=_OFFLINE) from None


_OFFLINE = "Try again, or sign offline with --key KEY.pem (key=)"
