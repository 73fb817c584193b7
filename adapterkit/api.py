"""The edge: functions that take names of files and hubs where the modules below take what is opened already.

`adapterkit.names` is a function, so the package that it is about is called `adapterkit.naming`: a module and a function
of one name would replace each other, depending on what is imported first.
"""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any

from .adapter import Adapter
from .binding.bases import check_base
from .binding.tables import name_map
from .errors import ShapeMismatch, TargetNotFound, UsageError, places_errors, public
from .formats import read
from .tensors.checkpoint import opened

if TYPE_CHECKING:
    from .reporting.report import Report
    from .tensors.checkpoint import Checkpoint


@places_errors
def names(
    base: Checkpoint | str | PathLike[str],
    adapter: Adapter | str | PathLike[str] | None = None,
    *,
    rename: str | Sequence[str] = (),
    allow_partial: bool = False,
    strict_base: bool = False,
) -> dict[str, Any]:
    """Say where an adapter's targets lie in a base, and by which rules; headers alone are read.

    Args:
        base: a folder, a weight file, an address on a hub, or an open checkpoint.
        adapter: the adapter, or where it is; without one, the base's own names are listed with what other tools call
            them.
        rename: rules for names that cannot be told, each `FROM=TO` or `@FILE`, as in `adapterkit.merge`.
        allow_partial: list targets that have no place under `missing` instead of refusing.
        strict_base: refuse a base whose name, config or fingerprint is not the one that the adapter names.

    Returns:
        `base`, `model_type`, `family` (the architecture file that is for the base, or None), and with an adapter
        `targets`, a list of records with `target` (the adapter's name), `path` (the base's), `rows` and `layout` and
        `tensor`; `rules`, each with the number of targets that it placed; and `missing`. Without an adapter `weights`:
        one record for each stored name, with `#` for numbers, the number of such modules, and `names` by naming.

    Raises:
        CheckFailed: the base is not the one that the adapter names, and `strict_base`.
        TargetNotFound: a target has no place, or two readings of its name fit.
        ShapeMismatch: a shape does not fit.
        UsageError: a rule that cannot be read.
    """
    checkpoint = opened(base)
    given = read(adapter, base=checkpoint) if isinstance(adapter, (str, PathLike)) else adapter
    if strict_base and given is not None:
        check_base([("the adapter" if isinstance(adapter, Adapter) else str(adapter), given)], checkpoint, strict=True)
    return name_map(checkpoint, given, rename=rename, partial=allow_partial)


@places_errors
def report(
    adapters: Adapter | str | PathLike[str] | Sequence[Adapter | str | PathLike[str]],
    *,
    base: Checkpoint | str | PathLike[str] | None = None,
    merged: Checkpoint | str | PathLike[str] | None = None,
    out: str | PathLike[str] | None = None,
    rename: str | Sequence[str] = (),
    overwrite: bool = False,
) -> Report:
    """Measure adapters and tell what stands out, in numbers, sentences and pictures; notebooks show the result.

    Args:
        adapters: one adapter or several, each an `Adapter` or where it is.
        base: their base. With it changes are held against weights, and adapters that need weights are measured.
        merged: what they were merged into; with `base` this tells how much of each change is there.
        out: write the report to this HTML file, too.
        rename: rules for names that cannot be told, each `FROM=TO` or `@FILE`, as in `adapterkit.merge`.
        overwrite: replace what is at `out`.

    Returns:
        the report: `verdicts`, `measured`, `facts`, `record()`, `html()`, `save(path)` and `figures(folder)`.

    Raises:
        UsageError: no adapter, or `merged` without `base`.
        StorageError: something is at `out`.
        Unsupported: the package that draws charts is not installed; raised where `out` is given.
        AdapterkitError: adapters that cannot be read, or are of different models.
    """
    from pathlib import Path

    from .reporting.report import made
    from .tensors.inputs import inputs_kept
    from .tensors.locations import located
    from .tensors.staging import check_free

    given = [adapters] if isinstance(adapters, (Adapter, str, PathLike)) else list(adapters)
    if not given:
        raise UsageError("no adapter was given", cure="Name at least one")
    if merged is not None and base is None:
        raise UsageError("merged needs base", where="merged", cure="Pass the base as well: --base BASE (base=)")
    if out is not None:
        check_free(Path(out), overwrite)
    checkpoint = None if base is None else opened(base)
    with inputs_kept():
        held = [each if isinstance(each, Adapter) else _read_for(each, checkpoint) for each in given]
    paths = [None if isinstance(each, Adapter) else located(each) for each in given]
    found = made(
        held, _names_for(given), paths=paths, base=checkpoint, merged=None if merged is None else opened(merged),
        rename=rename,
    )  # fmt: skip
    if out is not None:
        found.save(out, overwrite=overwrite)
    return found


def _read_for(path: str | PathLike[str], base: Checkpoint | None) -> Adapter:
    """The adapter, read with the base if it fits that: a report tells of one that does not."""
    if base is None:
        return read(path)
    try:
        return read(path, base=base)
    except (TargetNotFound, ShapeMismatch):
        return read(path)


def _names_for(adapters: Sequence[Adapter | str | PathLike[str]]) -> list[str]:
    """A short name for each adapter, all different: the end of its path, with more of the path where that is shared."""
    from os import fspath

    parts = [
        [f"adapter {at}"] if isinstance(each, Adapter) else fspath(each).rstrip("/").replace("\\", "/").split("/")
        for at, each in enumerate(adapters, 1)
    ]  # fmt: skip
    plain = ("adapter_model.safetensors", "adapter.safetensors", "pytorch_lora_weights.safetensors")
    parts = [each[:-1] if len(each) > 1 and each[-1] in plain else each for each in parts]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(each[-length:]) for each in parts]
        short = [name.removesuffix(".safetensors").removesuffix(".gguf") for name in names]
        if len(set(short)) == len(short):
            return [public(name) for name in short]
    return [f"{public(name)} ({at})" for at, name in enumerate(names, 1)]
