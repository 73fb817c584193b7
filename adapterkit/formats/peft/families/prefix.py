"""Prefix tuning: `prompt_embeddings` [tokens, layers * 2 * heads * d]."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from ....methods.prefix import Prefix
from ._context import PrefixLike


class PrefixFamily(PrefixLike):
    """The family of the peft_type PREFIX_TUNING."""

    peft_type = "PREFIX_TUNING"
    method = Prefix
    harmless: ClassVar[Mapping[str, str]] = {
        "encoder_hidden_size": "of the encoder, which the file is without",
        "init_weights": "initial values",
        "prefix_projection": "an encoder computed the prefix, which the file holds",
    }
    fresh: ClassVar[Mapping[str, Any]] = {"prefix_projection": False, "task_type": "CAUSAL_LM"}
