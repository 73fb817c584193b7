"""Compare the model that an adapter names with the models of a base.

PEFT names a module of transformers, such as `gemma3`, and a class in it; a base's config names model types, its own and
those of its parts. `spec/architectures/model_types` says which module each model type is of.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import msgspec

from .architectures import decoded, folder, is_family, of_gguf
from .gguf import ARCHITECTURE


class ModelTypeTable(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One file.

    Attributes:
        format: the version of the file's form.
        modules: model type -> module.
        parts: class -> its model types, for the classes that are of a part of their module's model.
        sources: where the facts come from.
    """

    format: int
    modules: dict[str, str]
    parts: dict[str, list[str]]
    sources: list[str] = []


@cache
def table() -> ModelTypeTable:
    """Load what is known of transformers.

    Raises:
        Malformed: the file is damaged.
    """
    return decoded(folder() / "model_types" / "transformers.toml", ModelTypeTable)


def module_of(name: str) -> str | None:
    """Return the module of a model type, or of a module's own name; None if neither is known.

    A family that transformers does not have, such as one of a user's own file, is its own module.
    """
    word = name.lower().replace("-", "_")
    found = table().modules.get(name) or _by_word().get(word)
    return found or (word if word in _modules() or is_family(word) else None)


@cache
def _by_word() -> Mapping[str, str]:
    return {name.lower().replace("-", "_"): module for name, module in table().modules.items()}


@cache
def _modules() -> frozenset[str]:
    return frozenset(table().modules.values())


@cache
def _parts() -> frozenset[str]:
    """List the model types of parts: those of parts' classes, and all beside the one that a module is called by."""
    modules = table().modules
    whole = {module for name, module in modules.items() if name.replace("-", "_") == module}
    beside = {name for name, module in modules.items() if module in whole and name.replace("-", "_") != module}
    return frozenset(beside.union(*table().parts.values()))


def models_of(config: Mapping[str, Any]) -> dict[str, bool]:
    """Return the model types of a base and of its parts, each with whether it is that of the whole base.

    For a GGUF file they are all those that llama.cpp's converter writes under its `general.architecture`.
    """
    found: dict[str, bool] = {}
    if isinstance(config.get(ARCHITECTURE), str):
        # DeepSeek-V2, DeepSeek-V3 and GLM-4.7-Flash are all `deepseek2`.
        found |= {name: True for family in of_gguf(config[ARCHITECTURE]) for name in family.record.model_types}
    if isinstance(config.get("model_type"), str) and config["model_type"]:
        found[config["model_type"]] = True
    for part in config.values():
        # Mostly `text_config` and its like; an encoder-decoder of two models has `encoder` and `decoder`.
        if isinstance(part, Mapping):
            found |= {name: False for name in models_of(part) if name not in found}
    return found


def has_model(given: Mapping[str, bool], module: str, trained_class: str | None) -> bool:
    """Whether a base has the model that an adapter was trained on, as far as names of models tell.

    Args:
        given: the models of the base, as `models_of` returns them.
        module: the module of the class that the adapter was trained on.
        trained_class: that class, if the adapter names it.
    """
    types = table().parts.get(trained_class or "")
    there = {name: whole for name, whole in given.items() if module_of(name) == module}
    if trained_class is None:
        return bool(there)
    if types is None:
        # MusicFlamingo has the audio encoder of AudioFlamingo 3: an adapter of that whole model is not one of its
        # encoder. Gemma 3's text model alone can be meant by an adapter of the whole model.
        return any(whole or name not in _parts() for name, whole in there.items())
    # A whole model has all parts of its module. Parakeet with one head is no part of Parakeet with another.
    return any(name in types or (whole and name not in _parts()) for name, whole in there.items())
