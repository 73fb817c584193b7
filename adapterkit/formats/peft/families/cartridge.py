"""Cartridges: `prompt_embeddings` [tokens, layers * 2 * heads * d]."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from ....methods.prefix import Prefix
from ._context import PrefixLike


class CartridgeFamily(PrefixLike):
    """The family of the peft_type CARTRIDGE."""

    peft_type = "CARTRIDGE"
    method = Prefix
    harmless: ClassVar[Mapping[str, str]] = {"num_frozen_tokens": "training only"}
    fresh: ClassVar[Mapping[str, Any]] = {"task_type": "CAUSAL_LM"}
