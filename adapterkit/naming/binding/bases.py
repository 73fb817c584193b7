"""Check whether an adapter was made for a given base, by comparing names, configs and fingerprints of weights."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ...core.adapter import config_hash
from ...core.metadata import FINGERPRINT, REPORT, SHAPES, fingerprints_of, shapes_of
from ...errors import AdapterkitError, CheckFailed, UsageError
from ...io.checkpoint import PREFIX, SHAPES_PREFIX, shapes_digest
from ...io.locations import is_repo, source_of
from ..architectures import STORED_AS

if TYPE_CHECKING:
    from os import PathLike

    from ...core.adapter import Adapter
    from ...io.checkpoint import Checkpoint

_CACHED = re.compile(r"models--(.+)")
"""Matches a repository's folder in huggingface_hub's cache: `models--org--name`."""


def mismatches(name: str, adapter: Adapter, base: Checkpoint, fingerprint: str | None) -> list[str]:
    """Compare the base that the adapter records with the given base; return a sentence for each difference.

    Args:
        name: the adapter's name, to use in the sentences.
        adapter: the adapter.
        base: the base.
        fingerprint: the fingerprint of the base's weights; None if it was not computed.
    """
    found = []
    known = [each for each in fingerprints_of(adapter) if each.startswith(PREFIX)]
    if fingerprint is not None and known and fingerprint not in known:
        how = relation(base, shapes_of(adapter))
        found.append(
            f"{name} was made for a base with the fingerprint {', '.join(known)}; this base has {fingerprint}"
            + (f" ({how})" if how else "")
        )  # fmt: skip
    wanted = adapter.base
    if wanted is None:
        return found
    proven = fingerprint is not None and fingerprint in known
    names = names_of(base)
    if is_repo(wanted.id) and names and not proven and str(wanted.id).lower() not in (each.lower() for each in names):
        found.append(f"{name} was made for {wanted.id}; this base is {' or '.join(names)}")
    # Skip GGUF files: adapterkit builds their config from key-values, so the hash cannot match a recorded hash.
    if wanted.config_hash is not None and base.config is not None and STORED_AS not in base.config:
        given = config_hash(base.config)
        if given != wanted.config_hash:
            found.append(
                f"{name} was made for a base whose config has the hash {wanted.config_hash}; this config has {given}"
            )
    return found


def relation(base: Checkpoint, shapes: Sequence[str]) -> str:
    """Return a phrase that says how a base with another fingerprint differs from the recorded base; empty if unknown.

    Args:
        base: the base.
        shapes: the digests of names and shapes that the adapter records, see `io/checkpoint.py`.
    """
    known = [each for each in shapes if each.startswith(SHAPES_PREFIX)]
    if not known:
        return ""
    return "same architecture, other weights" if shapes_digest(base) in known else "other names or shapes of tensors"


def identity_of(base: Checkpoint) -> dict[str, str]:
    """Return the arguments of a lineage step: a fingerprint of the base's weights, and a digest of its shapes.

    The function reads 16 MiB of the base, spread over all tensors.
    """
    from ...io.checkpoint import fingerprint

    return {FINGERPRINT: fingerprint(base), SHAPES: shapes_digest(base)}


def identified(adapter: Adapter, base: Checkpoint | str | PathLike[str]) -> dict[str, str]:
    """Return `identity_of` for an adapter without a recorded fingerprint; otherwise an empty dict."""
    from ...io.checkpoint import opened

    return {} if fingerprints_of(adapter) else identity_of(opened(base))


def check_bases(
    adapters: Sequence[tuple[str, Adapter]], base: Checkpoint, fingerprint: str | None, strict: bool
) -> tuple[str, ...]:
    """Return the sentences of `mismatches` for all adapters.

    Args:
        adapters: (name, adapter) pairs.
        base: the base.
        fingerprint: the fingerprint of the base's weights; None if it was not computed.
        strict: whether to raise an error instead of returning warnings.

    Raises:
        CheckFailed: `mismatches` returns a sentence, and `strict` is set.
    """
    found = [why for name, adapter in adapters for why in mismatches(name, adapter, base, fingerprint)]
    if found and strict:
        cure = "Give the base that the adapter was made for, or omit --strict-base (strict_base=True)"
        raise CheckFailed("; ".join(found), path=base.root, cure=cure)
    return tuple(dict.fromkeys(found))


def check_base(
    adapters: Sequence[tuple[str, Adapter]], base: Checkpoint | str | PathLike[str] | None, strict: bool
) -> tuple[str, ...]:
    """Call `check_bases`; compute the base's fingerprint only if an adapter records a fingerprint.

    `formats.read` calls this function if a base is given. Functions that accept adapters that are already in memory
    call it as well. Without a base, it compares nothing.

    Raises:
        CheckFailed: see `check_bases`.
        UsageError: `strict` is set, but no base is given.
    """
    from ...io.checkpoint import fingerprint, opened

    if base is None:
        if strict:
            cure = "Give the base with --base (base=), or omit --strict-base (strict_base=True)"
            raise UsageError("without a base, the adapters' recorded bases cannot be checked", cure=cure)
        return ()
    checkpoint = opened(base)
    taken = fingerprint(checkpoint) if any(fingerprints_of(adapter) for _, adapter in adapters) else None
    return check_bases(adapters, checkpoint, taken, strict)


def check_tuned(tuned: Checkpoint, base: Checkpoint, strict: bool) -> tuple[str, ...]:
    """Return a warning if adapterkit merged the tuned weights from another base, as their merge record states.

    Raises:
        CheckFailed: there is a warning, and `strict` is set.
    """
    from ...io.checkpoint import fingerprint

    recorded = merge_record(tuned).get("base_fingerprint")
    if not isinstance(recorded, str) or not recorded.startswith(PREFIX) or recorded == (given := fingerprint(base)):
        return ()
    how = relation(base, [str(merge_record(tuned).get(SHAPES))])
    why = f"{tuned.root} was merged from a base with the fingerprint {recorded}; this base has {given}"
    why += f" ({how})" if how else ""
    if strict:
        cure = "Give the base that the weights were merged from, or omit --strict-base (strict_base=True)"
        raise CheckFailed(why, path=base.root, cure=cure)
    return (why,)


def merge_record(merged: Checkpoint) -> dict[str, Any]:
    """Return the record that adapterkit's merge wrote into its output folder; empty for the output of other tools."""
    from ...io.checkpoint import read_json

    try:
        return read_json(merged.folder / REPORT)
    except AdapterkitError:
        return {}


def names_of(base: Checkpoint) -> tuple[str, ...]:
    """List the repositories named in a base's pull record, in the name of its cache folder, or in its config."""
    names = []
    source = source_of(base.folder)
    if source is not None:
        names.append(source.repo)
    for part in base.folder.absolute().parts:
        cached = _CACHED.fullmatch(part)
        if cached is not None:
            names.append(cached[1].replace("--", "/"))
    if not names and base.config is not None and is_repo(_text(base.config.get("_name_or_path"))):
        names.append(str(base.config["_name_or_path"]))
    return tuple(dict.fromkeys(names))


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None
