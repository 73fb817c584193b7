"""Facts about an adapter from its headers: methods, base, size, origin, and the formats and tools that can use it.

No tensor is read here.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ..core.metadata import metadata_of, trigger_words
from ..core.updates import Additive
from ..io.lazy import DTYPES, dtype_of

if TYPE_CHECKING:
    from pathlib import Path

    from ..core.adapter import Adapter
    from ..core.updates import Update
    from ..formats._format import Format
    from ..io.strict_json import JsonValue

WAYS = {
    "native": "stores it natively",
    "LoRA": "stores it exactly, as a LoRA",
    "dense": "stores it as a weight difference; needs the base",
    "nearest": "stores the nearest LoRA, and reports the error",
}
"""The ways in which a format can store an adapter -> their descriptions, the best way first."""


@dataclass(frozen=True, slots=True)
class Facts:
    """Facts about an adapter, from its headers alone.

    Attributes:
        name: the adapter's name in the report.
        path: the path from which the adapter was read; None for an adapter in memory.
        format: the format of the source file, or None.
        base: the base that the adapter names.
        methods: method -> number of updates.
        ranks: rank -> number of updates; updates without a rank are omitted.
        targets: the number of targets.
        parameters: the number of parameters; a tensor that updates share counts once.
        bytes: the size of the adapter's tensors.
        dtypes: dtype -> number of tensors.
        licence: the identifier of the licence in the model card next to the adapter, or None.
        triggers: the trigger words.
        lineage: the steps that produced the adapter, as plain data.
        formats: format -> the way in which this format can store the adapter, a key of `WAYS`. Formats that cannot
            store the adapter are omitted.
        loaders: for each known tool, a record with `title`, `loads` (yes, part or no: whether the tool loads the file
            unchanged) and `why`. Only for files of image models.
    """

    name: str
    path: str | None
    format: str | None
    base: str | None
    methods: dict[str, int]
    ranks: dict[int, int]
    targets: int
    parameters: int
    bytes: int
    dtypes: dict[str, int]
    licence: str | None
    triggers: tuple[str, ...]
    lineage: tuple[dict[str, Any], ...]
    formats: dict[str, str]
    loaders: tuple[dict[str, str], ...] = ()

    def record(self) -> dict[str, JsonValue]:
        """Return the facts as plain data."""
        return {**asdict(self), "ranks": {str(rank): count for rank, count in self.ranks.items()}}


def facts_of(adapter: Adapter, name: str, path: Path | None = None) -> Facts:
    """Return the facts of an adapter.

    Args:
        adapter: the adapter.
        name: its name in the report.
        path: the path from which the adapter was read; a model card at this path states the licence.
    """
    from ..core.licence_terms import licence_at

    leaves = {id(leaf): leaf for _, update in adapter for leaf in update.tensors.values()}
    sizes = [(math.prod(leaf.shape), dtype_of(leaf).name) for leaf in leaves.values()]
    ranks = Counter(
        rank for target, update in adapter if isinstance(rank := update.dims(target.stacked).get("r"), int)
    )  # fmt: skip
    read = next((step for step in adapter.recipe if step.op == "read"), None)
    return Facts(
        name, None if path is None else str(path), None if read is None else read.args.get("format"),
        adapter.base.id if adapter.base else None, dict(Counter(update.method for _, update in adapter).most_common()),
        dict(sorted(ranks.items())), len(adapter.updates), sum(count for count, _ in sizes),
        sum(count * DTYPES[dtype].itemsize for count, dtype in sizes),
        dict(Counter(dtype for _, dtype in sizes).most_common()),
        None if path is None else licence_at(path).get("license"), trigger_words(metadata_of(adapter)),
        tuple({"op": step.op, "args": dict(step.args)} for step in adapter.recipe), formats_of(adapter),
        () if path is None or read is None else _loaders(adapter, read.args.get("format"), path),
    )  # fmt: skip


def _loaders(adapter: Adapter, name: object, path: Path) -> tuple[dict[str, str], ...]:
    from ..formats import FORMATS
    from ..formats._image.dialect import ImageFormat

    if not isinstance(name, str) or name not in FORMATS or not issubclass(FORMATS[name], ImageFormat):
        return ()
    from ..loaders import loaders_of

    answers = loaders_of(adapter, name, path, convert=False)
    return tuple({"title": each.title, "loads": each.loads, "why": each.why} for each in answers)


def formats_of(adapter: Adapter) -> dict[str, str]:
    """Return, for each format, the way in which it can store the adapter, judged by methods and kind of model."""
    from ..formats import FORMATS
    from ..methods import METHODS
    from ..naming.image import component_of, shape

    # Blocks have the same names, so checking one block is enough.
    paths = {shape(target.path): target.path for target in adapter.updates}.values()
    kind = "image" if any(map(component_of, paths)) else "language"
    methods = [METHODS[name] for name in adapter.methods]
    order = [*WAYS]
    found = {}
    for name, entry in FORMATS.items():
        ways = [way(entry, method) for method in methods]
        if ways and all(ways) and entry.models in ("", kind):
            found[name] = max((each for each in ways if each), key=order.index)
    return dict(sorted(found.items(), key=lambda item: (order.index(item[1]), item[0])))


def way(entry: type[Format], method: type[Update]) -> str | None:
    """Return the way in which a format can store a method, a key of `WAYS`; None if the format cannot store it."""
    if method.__module__.rpartition(".")[2] in entry.methods:
        return "native"
    if method.kind not in ("additive", "weight") or "lora" not in entry.methods:
        return None
    if issubclass(method, Additive) and method.pair is not Additive.pair:
        return "LoRA"
    return "dense" if entry.differences else "nearest"
