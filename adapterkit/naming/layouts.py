"""Weights that a base stores the other way round, by the `model_type` of its config.

Only what shapes cannot tell: a square weight looks the same both ways. Sources: `Conv1D` in transformers' modelling
files of these families, and the experts of gpt-oss, stored `[expert, in, out]`.
"""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

_CONV1D = ("*.c_attn", "*.c_proj", "*.c_fc", "*.q_attn")
_EXPERTS = ("*.experts.gate_up_proj", "*.experts.down_proj")

IN_OUT = {
    "gpt2": _CONV1D,
    "openai-gpt": _CONV1D,
    "imagegpt": _CONV1D,
    "decision_transformer": _CONV1D,
    "clvp_decoder": _CONV1D,
    "gpt_oss": _EXPERTS,
}
"""model_type -> globs of targets stored with `in` before `out`."""


def stored_in_out(path: str, config: Mapping[str, Any] | None) -> bool | None:
    """Whether the base stores this target `in` first; None where the family is not in the table."""
    globs = IN_OUT.get(str((config or {}).get("model_type")))
    return None if globs is None else any(fnmatchcase(path, glob) for glob in globs)
