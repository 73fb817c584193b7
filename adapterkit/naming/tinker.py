"""Names that differ between Tinker's adapters and PEFT's.

Source: weights in tinker-cookbook, https://github.com/thinking-machines-lab/tinker-cookbook
"""

from __future__ import annotations

from collections.abc import Iterable

EXPERTS = {
    "model.layers.{n}.mlp.experts.{e}.gate_proj": "model.layers.{n}.mlp.experts.w1",
    "model.layers.{n}.mlp.experts.{e}.down_proj": "model.layers.{n}.mlp.experts.w2",
    "model.layers.{n}.mlp.experts.{e}.up_proj": "model.layers.{n}.mlp.experts.w3",
}
"""Our template for one expert's module -> Tinker's template for the stack."""

HEAD = {"lm_head": "model.unembed_tokens"}

_MARKS = tuple(
    f".{module}.lora_{factor}.weight"
    for module in ("unembed_tokens", *(f"mlp.experts.w{number}" for number in (1, 2, 3)))
    for factor in "AB"
)
"""Ends of keys that only Tinker's files have."""


def is_tinker(keys: Iterable[str]) -> bool:
    """Whether keys have a form that only Tinker uses."""
    return any(key.endswith(_MARKS) for key in keys)
