"""The same adapters in two versions of the specification, each record written by hand (README, R-14.1)."""

from __future__ import annotations

from typing import Any

from container import Stored, native, numbers, stored
from invalid.case import LORA, TENSORS


def _update(method: str, attributes: dict[str, Any], **tensors: Stored) -> tuple[dict[str, Any], dict[str, Stored]]:
    names = {field: f"{method}.{field}" for field in tensors}
    update = {"target": {"path": method}, "method": method, "version": 1, "tensors": names, "attributes": attributes}
    return update, {names[field]: tensor for field, tensor in tensors.items()}


def _real(seed: str, *shape: int) -> Stored:
    return stored(numbers(f"migrations.{seed}", *shape), "F32")


LOKR, LOKR_TENSORS = _update("lokr", {"scaling": 2.0}, w1=_real("w1", 1, 2), w2=_real("w2", 3, 2))
OFT, OFT_TENSORS = _update("oft", {"side": "out"}, pairs=_real("pairs", 1, 3), rescale=_real("rescale", 3))
SCALES, SCALES_TENSORS = _update("ia3_weights", {}, w=_real("w", 3))
LINEAGE: dict[str, Any] = {
    "base": {"id": "org/model"},
    "recipe": [{"op": "read", "args": {"format": "kohya"}}],
    "extensions": {"colour": {"hue": 2.5}},
    "foreign": {"format": "kohya", "data": {"ss_epoch": "3"}, "tensors": {"rest": "rest"}},
}

PAIRS: dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]], dict[str, Any], dict[str, Stored]]] = {
    "same_methods": ([LORA], [LORA], {}, TENSORS),
    "new_attribute": (
        [LOKR], [LOKR | {"version": 2, "attributes": {"scaling": 2.0, "stacked": False}}], {}, LOKR_TENSORS,
    ),
    "several": (
        [LORA, OFT, SCALES],
        [
            LORA,
            OFT | {"version": 2, "attributes": {"side": "out", "doubled": False, "on_output": False}},
            SCALES | {"version": 2, "attributes": {"on_output": False}},
        ],
        {}, TENSORS | OFT_TENSORS | SCALES_TENSORS,
    ),
    "all_that_stands_beside": ([LORA], [LORA], LINEAGE, TENSORS | {"rest": _real("rest", 2)}),
}  # fmt: skip
"""Name -> updates in 1.0, updates in 1.1, the record's other fields, and the tensors."""


def migrations() -> dict[str, bytes]:
    """File name -> content."""
    files = {}
    for name, (old, new, beside, tensors) in PAIRS.items():
        for version, updates in (("1.0", old), ("1.1", new)):
            files[f"{name}.{version}.safetensors"] = native({"version": version, "updates": updates, **beside}, tensors)
    return files
