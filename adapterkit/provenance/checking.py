"""Check that a signature is by the expected signer, and that no file was changed, added or removed since."""

from __future__ import annotations

import ast
import contextlib
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.metadata import FINGERPRINT, SHAPES
from ..errors import Corrupt, NetworkError, UsageError, first_line, public, storage_error
from ..io.checkpoint import PREFIX, fingerprint, opened
from ..io.locations import check_exists
from ..io.stages import stage
from ..naming.binding.fitting import relation
from .bundles import DISTRUST, SignatureBundle, read_bundle
from .keys import model_signing, verifier
from .signing import linked_folders, settled

if TYPE_CHECKING:
    from ..io.checkpoint import Checkpoint
    from ..io.strict_json import JsonValue


@dataclass(frozen=True, slots=True)
class SignatureCheck:
    """The result of checking a valid signature.

    Attributes:
        path: the file or folder.
        signature: the signature file.
        kind: `key`, `certificate` or `sigstore`.
        key: the sha256 of the public key, if `kind` is `key`.
        files: the number of compared files.
        statement: the signed statement of the lineage; None in signatures by other tools.
        not_covered: existing files that the signature does not cover.
    """

    path: str
    signature: str
    kind: str
    key: str | None
    files: int
    statement: Mapping[str, Any] | None
    not_covered: tuple[str, ...] = ()

    def record(self) -> dict[str, JsonValue]:
        """Return the result as plain data, for `--json`."""
        return {
            "path": self.path, "file": self.signature, "kind": self.kind, "key": self.key, "files": self.files,
            "statement": None if self.statement is None else dict(self.statement),
            "not_covered": list(self.not_covered),
        }  # fmt: skip


def check_signature(
    path: str | PathLike[str],
    signature: str | PathLike[str],
    *,
    key: str | PathLike[str] | None = None,
    trust: Sequence[str | PathLike[str]] = (),
    identity: str | None = None,
    issuer: str | None = None,
) -> SignatureCheck:
    """Check a signature of an adapter or a model, made by `sign` or by OpenSSF model signing.

    Args:
        path: the folder, or the file.
        signature: the signature file.
        key: the public key of the signer, in PEM form.
        trust: the certificates to trust, in PEM form, instead of a key.
        identity: the expected sigstore identity, such as an e-mail address, instead of a key. This needs a network.
        issuer: the OpenID provider of the identity, such as `https://accounts.google.com`.

    Returns:
        The result, with the number of files and the signed statement. An invalid signature raises an error.

    Raises:
        Corrupt: a file was changed, added or removed, or the signature was changed or made with another key.
        StorageError: a path does not exist or cannot be read.
        UsageError: not exactly one of `key`, `trust` and `identity` is set, or the signature is of another kind.
        Malformed, Unsupported: the key is invalid or of another kind, or `model-signing` is not installed.
        NetworkError: sigstore cannot be reached.
    """
    if (key is not None) + bool(trust) + (identity is not None) != 1:
        cure = "Type one of --key PUB.pem (key=), --trust CERT.pem (trust=) and --identity WHO (identity=)"
        raise UsageError("exactly one of key, certificates and identity of the signer is needed", cure=cure)
    if (identity is None) != (issuer is None):
        cure = "Type both --identity and --issuer (identity=, issuer=)"
        raise UsageError("an identity and its issuer need each other", cure=cure)
    root, file = settled(Path(path)), Path(signature)
    check_exists(root)
    bundle = read_bundle(file)
    wanted = "key" if key is not None else "certificate" if trust else "sigstore"
    if bundle.kind != wanted:
        why = f"the signature was made by {bundle.kind} and cannot be checked by {wanted}"
        raise UsageError(f"{file}: {why}", cure=_ASKS[bundle.kind])
    config = _sigstore(identity, issuer) if identity is not None else verifier(key, trust)
    stage("hashing files and checking the signature")
    _verify(config, root, bundle)
    resources = bundle.predicate.get("resources")
    count = len(resources) if isinstance(resources, list) else 0
    return SignatureCheck(
        public(str(path)), str(file), bundle.kind, bundle.key, count, bundle.statement, _left_out(root, bundle)
    )


def other_base(
    statement: Mapping[str, JsonValue] | None, base: Checkpoint | str | PathLike[str]
) -> dict[str, str] | None:
    """Compare a base with the base in a signed statement; return None if the fingerprints are equal.

    If the fingerprints differ, return a record with both. If the statement also has a digest of the shapes, the entry
    `how` states whether the two bases have the same architecture.

    Raises:
        UsageError: the statement has no fingerprint to compare with.
    """
    told: Mapping[str, Any] = statement or {}
    kept = told.get("made_from") or {}
    recorded = [*((told.get("base") or {}).get("fingerprints") or ()), kept.get(FINGERPRINT)]
    known = [each for each in recorded if isinstance(each, str) and each.startswith(PREFIX)]
    if not known:
        cure = "Omit --base (base=), or also name the adapters with --adapter, to compute the merge again"
        raise UsageError("the signed statement has no fingerprint of a base", cure=cure)
    checkpoint = opened(base)
    given = fingerprint(checkpoint)
    if given in known:
        return None
    how = relation(checkpoint, [*map(str, (told.get("base") or {}).get("shapes") or ()), str(kept.get(SHAPES))])
    return {"named_by": "the signed statement", "expected": known[0], "given": given, "how": how}


def _verify(config: Any, root: Path, bundle: SignatureBundle) -> None:
    if linked := linked_folders(root):
        # Refuse links to folders: model-signing skips them, so they could add any file unnoticed.
        why = "the signature is not valid: it does not cover this link to a folder"
        raise Corrupt(why, path=linked[0], cure=DISTRUST)
    config.set_hashing_config(_hashing(root, bundle))
    # Silence a warning of model-signing about signatures of its first versions, which do not name a key.
    silent = contextlib.redirect_stdout(io.StringIO()) if bundle.key is None else contextlib.nullcontext()
    try:
        with silent:
            config.verify(root, bundle.path)
    except OSError as error:
        raise storage_error(error, error.filename or root) from error
    except ImportError:
        raise
    except Exception as error:  # Treat any error of these packages as an invalid signature.
        raise Corrupt(f"the signature is not valid: {_why(error)}", path=root, cure=DISTRUST) from None


def _hashing(root: Path, bundle: SignatureBundle) -> Any:
    """Return a hashing config with the same settings as the signer's, but without the signature file.

    It is safe to use the settings in the signature file: they are signed, model-signing checks the signature first, and
    other settings would give other digests.
    """
    told = bundle.predicate.get("serialization")
    args: Mapping[str, Any] = told if isinstance(told, Mapping) else {}
    hashing = model_signing("hashing").Config()
    # Convert the name of the digest, which model-signing writes, to the name of the algorithm, which it expects.
    algorithm = {"blake2b": "blake2"}.get(str(args.get("hash_type")), args.get("hash_type"))
    # Follow links to files: the caches of hubs consist of links, and the content of the files is compared.
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
    return hashing.set_ignored_paths(paths=inside, ignore_git_paths=".git" in (args.get("ignore_paths") or ()))


_DIGEST = r"""\\?'Digest\(.*?\\?["']\)\\?'"""
_DIGESTS = re.compile(rf": Expected {_DIGEST}, Actual {_DIGEST}", re.DOTALL)
"""Matches digests in the messages of model-signing. If a digest contains both kinds of quotes, quotes are escaped."""


def _why(error: Exception) -> str:
    """Return the reason in one line, without the digests, which model-signing prints as unreadable Python bytes."""
    told = first_line(error)
    if told == "InvalidSignature":  # Write a message for this error of cryptography, which has none.
        return "it was made with another key, or was changed"
    told = _DIGESTS.sub("", told).removeprefix("Signature mismatch: ")
    try:
        listed = ast.literal_eval(told) if told.startswith("[") else [told]
    except (ValueError, SyntaxError):
        return told
    return "; ".join(map(str, listed)) if isinstance(listed, list) else told


def _left_out(root: Path, bundle: SignatureBundle) -> tuple[str, ...]:
    serialization = bundle.predicate.get("serialization")
    told = serialization.get("ignore_paths") if isinstance(serialization, Mapping) else None
    names = [name for name in told or () if isinstance(name, str) and name]
    itself = bundle.path.resolve()
    return tuple(sorted(n for n in names if root.is_dir() and (root / n).exists() and (root / n).resolve() != itself))


def _sigstore(identity: str, issuer: str | None) -> Any:
    config = model_signing("verifying").Config()
    try:
        return config.use_sigstore_verifier(identity=identity, oidc_issuer=issuer)
    except Exception as error:  # Errors of the network, or of the trust root.
        why = f"sigstore cannot be used: {first_line(error)}"
        raise NetworkError(why, cure="Try again with a network; a signature with a key needs none") from None


_ASKS = {
    "key": "Give the signer's public key: --key PUB.pem (key=)",
    "certificate": "Give the certificates to trust: --trust CERT.pem (trust=)",
    "sigstore": "Give the signer's identity: --identity and --issuer (identity=, issuer=)",
}
