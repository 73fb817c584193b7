"""Recognise SGLang's and Megatron-Bridge's form of adapters whose experts share the outer LoRA factors.

Sources: SGLang's lora/mem_pool.py (`--experts-shared-outer-loras`, sglang #21466 and #25141) and Megatron-Bridge's
export of such adapters (#5588, #6076).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from .tinker import is_tinker

if TYPE_CHECKING:
    from ..io.lazy import Lazy
    from ..io.safetensors import Entry

INNER = ("gate_proj", "up_proj", "gate_up_proj", "w1", "w3")
"""Modules whose inputs are the hidden states; their experts share A."""

OUTER = ("down_proj", "w2")
"""Modules whose outputs are the hidden states; their experts share B."""

STACK = re.compile(rf"(?P<stem>.*\.experts)\.(?P<leaf>{'|'.join((*INNER, *OUTER))})")
"""Matches the key of a stack with the factors of all experts."""

EXPERT = re.compile(rf"(?P<stem>.*\.experts)\.(?P<e>\d{{1,9}})\.(?P<leaf>{'|'.join((*INNER, *OUTER))})")
"""Matches the key of one expert's factor; the factor that the experts share may be in a stack."""


def is_shared_outer(entries: Mapping[str, Lazy | Entry]) -> bool:
    """Whether a file's keys and shapes have this form: tensors with three axes contain the factors of the experts."""
    # Check shapes first: counting axes excludes nearly every other file, and is faster than parsing 90,000 keys.
    stacks = [key for key, entry in entries.items() if len(entry.shape) == 3]
    return any(map(_is_stack, stacks)) and not is_tinker(entries)


def _is_stack(key: str) -> bool:
    return key.endswith(_ENDS) and STACK.fullmatch(key[: -len(_ENDS[0])]) is not None


_ENDS = (".lora_A.weight", ".lora_B.weight")
