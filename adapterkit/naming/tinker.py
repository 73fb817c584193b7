"""Translate names in Tinker's adapters that differ from PEFT's names.

Source: weights in tinker-cookbook, https://github.com/thinking-machines-lab/tinker-cookbook
"""

from __future__ import annotations

from collections.abc import Iterable

EXPERTS = {
    "model.layers.{n}.mlp.experts.{e}.gate_proj": "model.layers.{n}.mlp.experts.w1",
    "model.layers.{n}.mlp.experts.{e}.down_proj": "model.layers.{n}.mlp.experts.w2",
    "model.layers.{n}.mlp.experts.{e}.up_proj": "model.layers.{n}.mlp.experts.w3",
}
"""A map from our template for a single expert's module to Tinker's template for the stack."""

HEAD = {"lm_head": "model.unembed_tokens"}

_MARKS = tuple(
    f".{module}.lora_{factor}.weight"
    for module in ("unembed_tokens", *(f"mlp.experts.w{number}" for number in (1, 2, 3)))
    for factor in "AB"
)
"""Endings of keys that occur only in Tinker's files."""


def is_tinker(keys: Iterable[str]) -> bool:
    """Whether some keys occur only in Tinker's files."""
    return any(key.endswith(_MARKS) for key in keys)
