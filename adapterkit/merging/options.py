"""What may be asked of a merge beside its inputs and its output: one record for planner, engines and nodes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Options:
    """As the arguments of `adapterkit.merge` of the same names."""

    dtype: str | None = None
    shard_size: int | None = None
    tied: str | None = None
    allow_partial: bool = False
    seed: int | None = None
    memory: int | None = None
    link: bool = False
    checksums: bool = False
    rename: tuple[str, ...] = ()
    vocab: str | None = None
