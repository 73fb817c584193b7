"""Names in Tinker's adapters where they are not PEFT's.

Source: weights in tinker-cookbook, https://github.com/thinking-machines-lab/tinker-cookbook
"""

from __future__ import annotations

import re
from collections.abc import Iterable

EXPERTS = {
    "model.layers.{n}.mlp.experts.{e}.gate_proj": "model.layers.{n}.mlp.experts.w1",
    "model.layers.{n}.mlp.experts.{e}.down_proj": "model.layers.{n}.mlp.experts.w2",
    "model.layers.{n}.mlp.experts.{e}.up_proj": "model.layers.{n}.mlp.experts.w3",
}
"""Own template of one expert's module -> Tinker's template of the stack."""

HEAD = {"lm_head": "model.unembed_tokens"}

_MARK = re.compile(r".*\.(?:unembed_tokens|mlp\.experts\.w[123])\.lora_[AB]\.weight")


def is_tinker(keys: Iterable[str]) -> bool:
    """Whether keys are in a form that only Tinker has."""
    return any(_MARK.fullmatch(key) for key in keys)
