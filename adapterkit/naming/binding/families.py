"""Families: whether a base is of the family that an adapter was trained on, where the files of both name one.

Families share names and shapes: a Mistral looks like a Llama, an OLMoE like a Mixtral. Only what the files say tells
them apart.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from ...core.adapter import Adapter
from ...core.metadata import model_class_of, model_types_of
from ...errors import TargetNotFound
from ..architectures import is_family, of_gguf
from ..gguf import ARCHITECTURE


def check_family(adapter: Adapter, config: Mapping[str, Any] | None) -> None:
    """Refuse a base of another family than the one that an adapter names.

    A part of a base counts: an adapter of a Llama may go into the language model of a LLaVA that has one. Families that
    this version has no file for are not compared.

    The user's rules for names come first: an adapter that they renamed is not compared.

    Args:
        adapter: the adapter, whose lineage may name a family.
        config: the base's config; without one nothing is compared.

    Raises:
        TargetNotFound: both name families, and they differ.
    """
    if any(step.op == "rename" for step in adapter.recipe):
        return
    trained = [name for name in model_types_of(adapter) if is_family(_plain(name))]
    given = list(dict.fromkeys(_families(config or {})))
    if not trained or not any(is_family(_plain(name)) for name in given):
        return
    known = {_plain(name) for name in given}
    other = next((name for name in trained if _plain(name) not in known), None)
    # EXAONE is a Llama under another model_type in transformers 5: the class tells that both are one model.
    listed = (config or {}).get("architectures")
    same = isinstance(listed, list) and model_class_of(adapter) in listed
    if other is not None and not same:
        cure = (
            f"Give a base of the family {other}; to use this one all the same, give a rule for names, such as "
            "--rename 'model=model' (rename=['model=model'])"
        )
        why = f"the adapter was trained on a model of the family {other}, and the base is of {' with '.join(given)}"
        raise TargetNotFound(why, where=next((target.path for target in adapter.updates), None), cure=cure)


def _families(config: Mapping[str, Any]) -> Iterator[str]:
    """The family of a model, and those of its parts; all that have a GGUF file's `general.architecture`."""
    if isinstance(config.get(ARCHITECTURE), str):
        # DeepSeek-V2, DeepSeek-V3 and GLM-4.7-Flash are all `deepseek2`.
        yield from (name for family in of_gguf(config[ARCHITECTURE]) for name in family.record.model_types)
    if isinstance(config.get("model_type"), str) and config["model_type"]:
        yield config["model_type"]
    for name, part in config.items():
        if name.endswith("_config") and isinstance(part, Mapping):
            yield from _families(part)


def _plain(name: str) -> str:
    """A model type as the name of its module in transformers, without what tells its text and vision parts apart."""
    word = re.sub(r"(?:_(?:text|vision|audio|encoder|decoder))?(?:_model)?$", "", name.lower().replace("-", "_"))
    return _MODULES.get(word, word)


_MODULES = {"kosmos_2": "kosmos2", "openai_gpt": "openai", "modernbert_decoder": "modernbert"}
"""model_type -> module of transformers, where the two differ in more than dashes."""
