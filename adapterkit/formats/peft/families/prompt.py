"""Prompt tuning: `prompt_embeddings` [tokens, dim]."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from ....methods.prompt import Prompt
from ._context import PromptLike


class PromptFamily(PromptLike):
    """The family of the peft_type PROMPT_TUNING."""

    peft_type = "PROMPT_TUNING"
    method = Prompt
    harmless: ClassVar[Mapping[str, str]] = {
        "prompt_tuning_init": "initial values",
        "prompt_tuning_init_text": "initial values",
        "tokenizer_kwargs": "initial values",
        "tokenizer_name_or_path": "initial values",
    }
    fresh: ClassVar[Mapping[str, Any]] = {"prompt_tuning_init": "RANDOM", "task_type": "CAUSAL_LM"}
