"""The options of a merge as one object, for the planner, the engines and the nodes of a cluster."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

from ..core.arguments import check_fields
from ..errors import StorageError, UsageError
from ..naming.renames import rule_texts
from .ties import parse_tied


@dataclass(frozen=True, slots=True)
class MergeOptions:
    """The options of a merge. Pass them to `plan` or `merge` as `options=`, instead of arguments with the same names.

    Attributes:
        dtype: the dtype to which all floating-point tensors are cast, such as `"bf16"`; default: the base's dtypes.
        shard_size: the largest size of an output file in bytes; default: the same files as the base.
        tied: which layers an update changes if the base ties its head to its embedding; see `merge`.
        allow_partial: whether to skip targets that the base does not have, instead of refusing the adapter.
        seed: the seed of stochastic rounding; default: round to the nearest.
        memory: the largest amount of memory to use, in bytes, not counting the memory of the imported libraries;
            default: half of the free memory.
        link: whether to write hard links to unchanged files of the base instead of copies.
        checksums: whether to compute a sha256 of the bytes while they are written.
        rename: rules for target names that cannot be resolved in the base, each `FROM=TO` or `@FILE`.
        vocab: what to do if an adapter was trained with more tokens than the base has: `grow` or `keep`, see `merge`.
        keep: if `"adapter"`, merged weights are adjusted before they are quantized again, so that rounding does not
            lose the adapters' effect; see `merge`.
        calibration: only with `keep`: a file of activations. The weights are then rounded such that the layers' outputs
            for these activations hardly change; see `merge`.

    Example:
        >>> options = adapterkit.MergeOptions(dtype="bf16", shard_size=5 << 30)  # doctest: +SKIP
        >>> adapterkit.plan("base", "lora", options=options).bytes  # doctest: +SKIP
        >>> adapterkit.merge("base", "lora", "out", options=options)  # doctest: +SKIP
    """

    dtype: str | None = None
    shard_size: int | None = None
    tied: str | Mapping[str, str] | None = None
    allow_partial: bool = False
    seed: int | None = None
    memory: int | None = None
    link: bool = False
    checksums: bool = False
    rename: str | Sequence[str] = ()
    vocab: str | None = None
    keep: str | None = None
    calibration: str | PathLike[str] | None = None

    def __post_init__(self) -> None:
        check_fields(self)


def options_of(given: MergeOptions | None, **named: Any) -> MergeOptions:
    """Return the options of a call as one `MergeOptions`. Normalise `tied`, and read the rename rules in `@FILE`s.

    A caller gives the options as a `MergeOptions` or by name. No option may be given in both ways.

    Raises:
        UsageError: an option is given twice, or `given` is not a `MergeOptions`.
    """
    if given is not None and not isinstance(given, MergeOptions):
        why = f"options has type {type(given).__name__}"
        raise UsageError(why, where="options", cure="Pass options=adapterkit.MergeOptions(...)")
    if not named.get("rename"):  # None and an empty list mean the same as no rules.
        named["rename"] = ()
    plain = MergeOptions()
    twice = [] if given is None else [name for name, value in named.items() if value != getattr(plain, name)]
    if twice:
        why = f"{twice[0]} is given twice, by name and in options"
        cure = f"Give {twice[0]} only in options=MergeOptions({twice[0]}=...), or omit options="
        raise UsageError(why, where=twice[0], cure=cure)
    options = MergeOptions(**named) if given is None else given
    sizes = {"--memory (memory=)": options.memory, "--shard-size (shard_size=)": options.shard_size}
    for flag, size in sizes.items():
        if isinstance(size, str):
            raise UsageError(f"the size {size!r} is a text", cure=f"Pass {flag} as a number of bytes, such as 5 << 30")
    # Callers may also pass a torch.dtype: `str` turns it into a name such as `torch.bfloat16`.
    dtype = None if options.dtype is None else str(options.dtype)
    return replace(options, dtype=dtype, tied=parse_tied(options.tied), rename=rule_texts(options.rename))


# Compute the memory that a merge may use, and the number of workers that fit into this memory.


def allowed(memory: int | None) -> int:
    """Return the number of bytes that a merge may use: `memory`, or by default half of the free memory.

    The free memory is that of the machine or of the container, whichever is smaller.

    Raises:
        UsageError: `memory` is not positive.
    """
    if memory is None:
        return max(min(_of_machine(), _of_container()) // 2, 1)
    if memory <= 0:
        raise UsageError(
            f"the memory limit is {memory} bytes", cure="Pass a positive size, such as --memory 2GB (memory=2 << 30)"
        )
    return memory


def most_workers() -> int:
    """Return the largest number of computing threads, regardless of memory: one per processor, from 2 to 16."""
    return max(2, min(os.cpu_count() or 2, 16))


def workers_within(memory: int, each: int, tensor: str) -> int:
    """Return the number of workers, at most `most_workers()`, that fit into `memory`; each worker needs `each` bytes.

    Raises:
        StorageError: the memory is too small for one worker.
    """
    if each > memory:
        raise StorageError(
            f"the merge needs {each:,} bytes of memory or more, but {memory:,} are allowed", path=None, where=tensor,
            cure="Allow more with --memory (memory=), or merge on a machine with more memory",
        )  # fmt: skip
    return max(1, min(most_workers(), memory // max(each, 1)))


def _of_machine() -> int:
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        pass
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    except (AttributeError, OSError, ValueError):
        return 4 << 30


def _of_container() -> int:
    """Return the free memory of the process's control group (version 2); 2**62 if it has no memory limit."""
    try:
        limit, used = (Path(f"/sys/fs/cgroup/memory.{word}").read_text().strip() for word in ("max", "current"))
        return max(int(limit) - int(used), 0)
    except (OSError, ValueError):
        return 1 << 62
