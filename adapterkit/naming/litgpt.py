"""Provide litgpt's module names (from spec/architectures/namings) and the settings that enable LoRA for each module."""

from __future__ import annotations

import re
from collections.abc import Collection
from functools import cache

from .architectures import namings_of
from .tables import NameTable

QKV = "attn.qkv"


@cache
def parts() -> dict[str, str]:
    """Return a map from `query`, `key` and `value` to our template for that projection, in the order of rows."""
    return {place.qkv: key for key, place in namings_of("litgpt")[0].places().items() if place.qkv is not None}


@cache
def table() -> NameTable:
    """Return the table of names for litgpt's modules that may have LoRA, without fused projections."""
    places = namings_of("litgpt")[0].places()
    found = {key: place.name for key, place in places.items() if place.name.endswith(tuple(FLAGS))}
    return NameTable(found | {"lm_head": "lm_head"})


FLAGS = {"attn.proj": "projection", "mlp.fc_1": "mlp", "mlp.fc_2": "mlp", "mlp.proj": "mlp", "lm_head": "head"}
"""A map from the end of a module's name to the setting that enables its LoRA."""

MLP = ("LLaMAMLP", "GemmaMLP")
"""Values of `mlp_class_name` that the table supports."""

_KEY = re.compile(r"(?:transformer\.h\.\d+\.(?:attn\.(?:qkv|attn|proj)|mlp\.(?:fc|fc_1|fc_2|proj))|lm_head)\.lora_[AB]")


def is_litgpt(keys: Collection[str]) -> bool:
    """Whether all keys have the form of litgpt's keys."""
    return any(key.startswith("transformer.h.") for key in keys) and all(_KEY.fullmatch(key) for key in keys)
