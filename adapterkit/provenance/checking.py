"""Check a signature: that nothing was changed, added or removed since it was signed, and by whom it was."""

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
from ..naming.binding.bases import relation
from .bundles import DISTRUST, SignatureBundle, read_bundle
from .keys import model_signing, verifier
from .signing import linked_folders, settled

if TYPE_CHECKING:
    from ..io.checkpoint import Checkpoint
    from ..io.strict_json import JsonValue


@dataclass(frozen=True, slots=True)
class SignatureCheck:
    """A signature that holds.

    Attributes:
        path: the file or folder.
        signature: the signature file.
        kind: `key`, `certificate` or `sigstore`.
        key: sha256 of the public key, for `key`.
        files: the number of files that were compared.
        statement: what the signer recorded of its origin; None in signatures of other tools.
        not_covered: files that the signer left out, if they are there.
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
    """Check the signature of an adapter or a model, as `sign` and OpenSSF model signing write it.

    Args:
        path: the folder, or the file.
        signature: the signature file.
        key: the public key of the signer, in PEM form.
        trust: instead of a key, the certificates to trust, in PEM form.
        identity: instead of a key, who signed with sigstore, such as an address of e-mail. This needs a network.
        issuer: who vouches for the identity, such as `https://accounts.google.com`.

    Returns:
        The signed files and statement. A signature that does not hold is an error.

    Raises:
        Corrupt: a file was changed, added or removed; the signature was changed, or made with another key.
        StorageError: nothing is there, or it cannot be read.
        UsageError: not exactly one of a key, certificates and an identity; or the signature is of another kind.
        Malformed, Unsupported: the key is no key, or one of another kind; `model-signing` is not installed.
        NetworkError: sigstore cannot be reached.
    """
    if (key is not None) + bool(trust) + (identity is not None) != 1:
        cure = "Give one of --key PUB.pem (key=), --trust CERT.pem (trust=) and --identity WHO (identity=)"
        raise UsageError("whose signature it should be is not told, or told twice", cure=cure)
    if (identity is None) != (issuer is None):
        raise UsageError("an identity needs its issuer", cure="Give --identity and --issuer (identity=, issuer=) both")
    root, file = settled(Path(path)), Path(signature)
    check_exists(root)
    bundle = read_bundle(file)
    wanted = "key" if key is not None else "certificate" if trust else "sigstore"
    if bundle.kind != wanted:
        why = f"the signature is one by {bundle.kind}, and was to be checked by {wanted}"
        raise UsageError(f"{file}: {why}", cure=_ASKS[bundle.kind])
    config = _sigstore(identity, issuer) if identity is not None else verifier(key, trust)
    stage("hashing files and checking the signature")
    _verify(config, root, bundle)
    return SignatureCheck(
        public(str(path)), str(file), bundle.kind, bundle.key, len(bundle.predicate.get("resources") or ()),
        bundle.statement, _left_out(root, bundle),
    )  # fmt: skip


def other_base(
    statement: Mapping[str, JsonValue] | None, base: Checkpoint | str | PathLike[str]
) -> dict[str, str] | None:
    """Return the recorded and the given fingerprint, if a base is not the one that a signed statement names.

    `how` says how the base relates to the recorded one, where the statement tells the shapes.

    Raises:
        UsageError: the statement names no fingerprint, so there is nothing to compare.
    """
    told: Mapping[str, Any] = statement or {}
    kept = told.get("made_from") or {}
    recorded = [*((told.get("base") or {}).get("fingerprints") or ()), kept.get(FINGERPRINT)]
    known = [each for each in recorded if isinstance(each, str) and each.startswith(PREFIX)]
    if not known:
        cure = "Leave --base (base=) out, or name the adapters, too: the merge is then computed again"
        raise UsageError("the signed statement holds no fingerprint of a base", cure=cure)
    checkpoint = opened(base)
    given = fingerprint(checkpoint)
    if given in known:
        return None
    how = relation(checkpoint, [*map(str, (told.get("base") or {}).get("shapes") or ()), str(kept.get(SHAPES))])
    return {"named_by": "the signed statement", "expected": known[0], "given": given, "how": how}


def _verify(config: Any, root: Path, bundle: SignatureBundle) -> None:
    if linked := linked_folders(root):
        # model-signing passes over them: anything could be added by such a link.
        raise Corrupt(
            "the signature does not hold: a link to a folder, which none covers", path=linked[0], cure=DISTRUST
        )
    config.set_hashing_config(_hashing(root, bundle))
    # For signatures of its first versions, which name no key, model-signing prints a warning.
    silent = contextlib.redirect_stdout(io.StringIO()) if bundle.key is None else contextlib.nullcontext()
    try:
        with silent:
            config.verify(root, bundle.path)
    except OSError as error:
        raise storage_error(error, error.filename or root) from error
    except ImportError:
        raise
    except Exception as error:  # cryptography's, pydantic's, model-signing's own: each means that it does not hold.
        raise Corrupt(f"the signature does not hold: {_why(error)}", path=root, cure=DISTRUST) from None


def _hashing(root: Path, bundle: SignatureBundle) -> Any:
    """Return how files are hashed: as the signer says, and without the signature file itself.

    The signer's word is not trusted here: model-signing checks the signature of the same bytes first, and any other
    way of hashing gives other digests.
    """
    told = bundle.predicate.get("serialization")
    args: Mapping[str, Any] = told if isinstance(told, Mapping) else {}
    hashing = model_signing("hashing").Config()
    # model-signing writes the digest's name, and asks for the algorithm's.
    algorithm = {"blake2b": "blake2"}.get(str(args.get("hash_type")), args.get("hash_type"))
    # Links to files are followed whatever was signed: caches of hubs consist of them, and their targets are compared.
    names = {"hashing_algorithm": algorithm, "allow_symlinks": True}
    try:
        if args.get("method") == "shards":
            hashing.use_shard_serialization(shard_size=int(args["shard_size"]), **names)
        else:
            hashing.use_file_serialization(**names)
    except (KeyError, TypeError, ValueError) as error:
        raise Corrupt(f"the signature does not hold: {first_line(error)}", path=bundle.path, cure=DISTRUST) from None
    hashing.set_allow_symlinks(True)
    paths = [bundle.path.absolute()] if root.absolute() in bundle.path.absolute().parents else []
    inside = [str(each.relative_to(root.absolute())) for each in paths]
    return hashing.set_ignored_paths(paths=inside, ignore_git_paths=".git" in (args.get("ignore_paths") or ()))


_DIGEST = r"""\\?'Digest\(.*?\\?["']\)\\?'"""
_DIGESTS = re.compile(rf": Expected {_DIGEST}, Actual {_DIGEST}", re.DOTALL)
"""Quotes are escaped where the bytes of a digest hold both kinds."""


def _why(error: Exception) -> str:
    """Return the reason in one line; model-signing quotes digests as Python's bytes, which tell nobody anything."""
    told = first_line(error)
    if told == "InvalidSignature":  # cryptography's, which has no message.
        return "it is not by this key, or was changed"
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
    except Exception as error:  # Errors of the network, and of the trust root's files.
        why = f"sigstore cannot be used: {first_line(error)}"
        raise NetworkError(why, cure="Try again with a network; a signature by a key needs none") from None


_ASKS = {
    "key": "Give the signer's public key: --key PUB.pem (key=)",
    "certificate": "Give the certificates to trust: --trust CERT.pem (trust=)",
    "sigstore": "Give who signed it: --identity and --issuer (identity=, issuer=)",
}
