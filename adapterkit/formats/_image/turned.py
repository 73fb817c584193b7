"""Read kohya's OFT for FLUX: each part of a fused weight is rotated separately; its blocks are `oft_blocks.0` etc.

Queries, keys and values are the first three parts; in linear1 the MLP is the fourth. Other weights have one part. All
modules in a file have the same number of blocks and the same alpha. Source: `networks/oft_flux.py` of sd-scripts.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from ...core.adapter import Target, Updates
from ...errors import Malformed, ShapeMismatch
from ...methods.oft import OFT
from ...naming.image import component_of, families_of, rooted
from .file import AGAIN, ImageModule

PART = re.compile(r"oft_blocks\.(\d+)")
_PARTS = {"qkv": 3, "linear1": 4}
"""A map from the last word of a fused weight's path to the number of its parts."""


def parts(module: ImageModule) -> list[ImageModule]:
    """Split a module into one for each part, named with `.` and the part's number; other modules stay unchanged.

    Raises:
        Malformed: a part is missing, or the module has both numbered and unnumbered blocks.
    """
    numbered = {int(found[1]): slot for slot in module.tensors if (found := PART.fullmatch(slot))}
    if not numbered:
        return [module]
    lost = next((number for number in range(len(numbered)) if number not in numbered), None)
    if lost is not None or "oft_blocks" in module.tensors:
        why = "it has blocks without a number, too" if lost is None else f"the file lacks its part {lost}"
        raise Malformed(why, where=module.where, cure=AGAIN)
    return [_part(module, number, numbered[number]) for number in range(len(numbered))]


def _part(module: ImageModule, number: int, slot: str) -> ImageModule:
    slots = {"oft_blocks": slot} | ({"alpha": "alpha"} if "alpha" in module.tensors else {})
    tensors = {name: module.tensors[own] for name, own in slots.items()}
    return ImageModule(f"{module.stem}.{number}", tensors, {name: module.keys[own] for name, own in slots.items()})


def rows_of(modules: Mapping[str, ImageModule]) -> dict[str, tuple[int, int]]:
    """Return the rows of each part by the part's name, for weights with more than one part.

    Raises:
        ShapeMismatch: a part does not have square blocks.
    """
    found: dict[str, tuple[int, int]] = {}
    for stem, module in modules.items():
        bare, _, number = stem.partition(".")
        if not number or f"{bare}.1" not in modules:
            continue
        shape = module.tensors["oft_blocks"].shape
        if len(shape) != 3:
            raise ShapeMismatch(
                f"the shape {list(shape)} is not that of square blocks", where=module.keys["oft_blocks"], cure=AGAIN
            )
        start = 0 if number == "0" else found[f"{bare}.{int(number) - 1}"][1]
        found[stem] = (start, start + shape[0] * shape[1])
    return found


def number_of(target: Target) -> int | None:
    """Return the number of the part of FLUX's weight that a target names; None for other targets."""
    if not of_flux(target):
        return None
    count = _PARTS.get(target.path.rpartition(".")[2], 1)
    if target.rows is None:
        return 0 if count == 1 else None
    start, size = target.rows[0], target.rows[1] - target.rows[0]
    if count == 4 and 4 * start == 3 * size:
        return 3
    return start // size if start % size == 0 and start // size < min(count, 3) and count > 1 else None


def of_flux(target: Target) -> bool:
    """Whether a target is in FLUX's transformer, by its native name."""
    rest = rooted(target.path)[1]
    return component_of(target.path) == "transformer" and any(f.name == "flux" for f in families_of(rest, "native"))


def uneven(updates: Updates) -> Iterator[tuple[Target, str]]:
    """Yield targets whose OFT sd-scripts would misread: parts are missing, or block counts or constraints differ."""
    turned = {t: u for t, found in updates.items() for u in found if isinstance(u, OFT) and u.square is not None}
    held: dict[str, set[int | None]] = {}
    for target in turned:
        held.setdefault(target.path, set()).add(number_of(target))
    said = {target: _said(update) for target, update in turned.items()}
    for target in turned:
        count = _PARTS.get(target.path.rpartition(".")[2], 1) if of_flux(target) else 0
        if count and held[target.path] != set(range(count)):
            yield (
                target,
                f"oft must adapt all {count} parts of a fused weight separately" if count > 1 else "oft of rows",
            )
        elif said[target] != next(iter(said.values())):
            yield (
                target,
                "the number of blocks or the constraint of this oft, relative to its size, differs from the others",
            )


def _said(update: OFT) -> tuple[int, float]:
    n, size = (int(axis) for axis in update.square.shape[:2])  # type: ignore[union-attr]
    return n, update.constraint / (n * size)
