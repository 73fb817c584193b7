"""litgpt's names, from spec/architectures/namings, and what its settings call the modules."""

from __future__ import annotations

import re
from collections.abc import Collection
from functools import cache

from .architectures import namings_of
from .tables import Table

QKV = "attn.qkv"


@cache
def parts() -> dict[str, str]:
    """Which of `lora_query`, `lora_key` and `lora_value` turns it on -> own template; in the order of the rows."""
    return {place.qkv: key for key, place in namings_of("litgpt")[0].places().items() if place.qkv is not None}


@cache
def table() -> Table:
    """Own template -> litgpt's, of the modules that are a weight of their own and may have LoRA."""
    places = namings_of("litgpt")[0].places()
    found = {key: place.name for key, place in places.items() if place.name.endswith(tuple(FLAGS))}
    return Table(found | {"lm_head": "lm_head"})


FLAGS = {"attn.proj": "projection", "mlp.fc_1": "mlp", "mlp.fc_2": "mlp", "mlp.proj": "mlp", "lm_head": "head"}
"""End of a module's name -> which setting turns it on."""

MLP = ("LLaMAMLP", "GemmaMLP")
"""Values of `mlp_class_name` of models that the table is for."""

_KEY = re.compile(r"(?:transformer\.h\.\d+\.(?:attn\.(?:qkv|attn|proj)|mlp\.(?:fc|fc_1|fc_2|proj))|lm_head)\.lora_[AB]")


def is_litgpt(keys: Collection[str]) -> bool:
    """Whether all keys are litgpt's."""
    return any(key.startswith("transformer.h.") for key in keys) and all(_KEY.fullmatch(key) for key in keys)
