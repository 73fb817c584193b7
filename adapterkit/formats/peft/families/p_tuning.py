"""P-tuning: `prompt_embeddings` [tokens, dim], the output of the encoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from ....methods.prompt import Prompt
from ._context import PromptLike


class PTuningFamily(PromptLike):
    """The family of the peft_type P_TUNING."""

    peft_type = "P_TUNING"
    method = Prompt
    harmless: ClassVar[Mapping[str, str]] = {
        "encoder_dropout": "training only",
        "encoder_hidden_size": "of the encoder, which the file is without",
        "encoder_num_layers": "of the encoder, which the file is without",
        "encoder_reparameterization_type": "of the encoder, which the file is without",
    }
    fresh: ClassVar[Mapping[str, Any]] = {"task_type": "CAUSAL_LM"}
