"""CPT: `prompt_embeddings` [tokens, dim], the embeddings of examples plus the trained change."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from ....methods.prompt import Prompt
from ._context import PromptLike


class CptFamily(PromptLike):
    """The family of the peft_type CPT."""

    peft_type = "CPT"
    method = Prompt
    harmless: ClassVar[Mapping[str, str]] = {
        "cpt_mask": "training only",
        "cpt_token_ids": "initial values, and labels in training",
        "cpt_tokens_type_mask": "training only",
        "opt_loss_decay_factor": "training only",
        "opt_projection_epsilon": "training only",
        "opt_projection_format_epsilon": "training only",
        "opt_weighted_loss_type": "training only",
        "tokenizer_name_or_path": "initial values",
    }
    fresh: ClassVar[Mapping[str, Any]] = {"task_type": "CAUSAL_LM"}
