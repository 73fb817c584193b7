"""Whether a base is the one that an adapter was made for: by its name, its config and a fingerprint of its weights."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..adapter import config_hash
from ..errors import CheckFailed
from ..metadata import fingerprints_of
from ..quant import config_file
from ..tensors.locations import is_repo, source_of

if TYPE_CHECKING:
    from ..adapter import Adapter
    from ..tensors.checkpoint import Checkpoint

_CACHED = re.compile(r"models--(.+)")
"""How the cache of huggingface_hub calls the folder of a repository: `models--org--name`."""


def mismatches(name: str, adapter: Adapter, base: Checkpoint, fingerprint: str | None) -> list[str]:
    """Return the adapter's statements about its base that this base contradicts, a sentence each.

    Args:
        name: of the adapter, for the sentences.
        adapter: the adapter.
        base: the base.
        fingerprint: of the base's weights; None where it was not taken.
    """
    found = []
    known = fingerprints_of(adapter)
    if fingerprint is not None and known and fingerprint not in known:
        found.append(
            f"{name} was made at a base with the fingerprint {', '.join(known)}; this one has {fingerprint}"
        )  # fmt: skip
    wanted = adapter.base
    if wanted is None:
        return found
    proven = fingerprint is not None and fingerprint in known
    names = names_of(base)
    if is_repo(wanted.id) and names and not proven and str(wanted.id).lower() not in (each.lower() for each in names):
        found.append(f"{name} was made for {wanted.id}; this base is {' or '.join(names)}")
    if wanted.config_hash is not None and (config := config_file(base)) is not None:
        given = config_hash(config)
        if given != wanted.config_hash:
            found.append(
                f"{name} was made for a base whose config has the hash {wanted.config_hash}; here it is {given}"
            )
    return found


def check_bases(
    adapters: Sequence[tuple[str, Adapter]], base: Checkpoint, fingerprint: str | None, strict: bool
) -> tuple[str, ...]:
    """Return the warnings of `mismatches` for all adapters.

    Args:
        adapters: (name, adapter) of each.
        base: the base.
        fingerprint: of the base's weights; None where it was not taken.
        strict: refuse instead.

    Raises:
        CheckFailed: there are some, and `strict`.
    """
    found = [why for name, adapter in adapters for why in mismatches(name, adapter, base, fingerprint)]
    if found and strict:
        cure = "Give the base that the adapter was made for, or leave out --strict-base (strict_base=True)"
        raise CheckFailed("; ".join(found), path=base.root, cure=cure)
    return tuple(dict.fromkeys(found))


def check_base(adapters: Sequence[tuple[str, Adapter]], base: Checkpoint, strict: bool) -> tuple[str, ...]:
    """`check_bases` with the fingerprint of the base, which is taken where an adapter has one to compare it with."""
    from ..tensors.fingerprint import fingerprint

    taken = fingerprint(base) if any(fingerprints_of(adapter) for _, adapter in adapters) else None
    return check_bases(adapters, base, taken, strict)


def names_of(base: Checkpoint) -> tuple[str, ...]:
    """The repositories that a base says it is: by the note of a pull, the cache it lies in, or its config."""
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
