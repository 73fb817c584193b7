"""Compare the model named by an adapter with the models in a base.

PEFT names a module of transformers, such as `gemma3`, and a class in it. A base's config names its own model type and
those of its parts. `spec/architectures/model_types` states the module of each model type.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import msgspec

from .architectures import decoded, folder, is_family, of_gguf
from .gguf import ARCHITECTURE


class ModelTypeTable(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The contents of a model_types file.

    Attributes:
        format: the version of the file's format.
        modules: the module of each model type.
        parts: for each class that is only a part of its module's model, the model types of that part.
        sources: where the facts come from.
    """

    format: int
    modules: dict[str, str]
    parts: dict[str, list[str]]
    sources: list[str] = []


@cache
def table() -> ModelTypeTable:
    """Load the facts about transformers' models.

    Raises:
        Malformed: the file is damaged.
    """
    return decoded(folder() / "model_types" / "transformers.toml", ModelTypeTable)


def module_of(name: str) -> str | None:
    """Return the module of a model type, or of a module's own name; None if both are unknown.

    A family that transformers does not have, for example from a user's own file, is its own module.
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
    """List the model types of parts: those of parts' classes, and all that differ from their module's name."""
    modules = table().modules
    whole = {module for name, module in modules.items() if name.replace("-", "_") == module}
    beside = {name for name, module in modules.items() if module in whole and name.replace("-", "_") != module}
    return frozenset(beside.union(*table().parts.values()))


def models_of(config: Mapping[str, object]) -> dict[str, bool]:
    """Map the model types of a base and of its parts to whether each belongs to the whole base.

    For a GGUF file, these are all model types that llama.cpp's converter writes with its `general.architecture`.
    """
    found: dict[str, bool] = {}
    if isinstance(architecture := config.get(ARCHITECTURE), str):
        # One architecture may have several families: DeepSeek-V2, DeepSeek-V3 and GLM-4.7-Flash are all `deepseek2`.
        found |= {name: True for family in of_gguf(architecture) for name in family.record.model_types}
    if isinstance(model_type := config.get("model_type"), str) and model_type:
        found[model_type] = True
    for part in config.values():
        # Parts are mostly in `text_config` and similar fields; an encoder-decoder has `encoder` and `decoder`.
        if isinstance(part, Mapping):
            found |= {name: False for name in models_of(part) if name not in found}
    return found


def has_model(given: Mapping[str, bool], module: str, trained_class: str | None) -> bool:
    """Whether a base has the model on which an adapter was trained, as far as the names of models show it.

    Args:
        given: the base's models, from `models_of`.
        module: the module of the class on which the adapter was trained.
        trained_class: this class, if the adapter names it.
    """
    types = table().parts.get(trained_class or "")
    there = {name: whole for name, whole in given.items() if module_of(name) == module}
    if trained_class is None:
        return bool(there)
    if types is None:
        # Ignore parts with their own classes: an adapter of the whole AudioFlamingo 3 does not fit MusicFlamingo, which
        # has only its audio encoder. But an adapter of the whole Gemma 3 may fit its text model alone.
        return any(whole or name not in _parts() for name, whole in there.items())
    # Accept whole models, which have all parts of their module. But Parakeet models with different heads are not parts
    # of each other.
    return any(name in types or (whole and name not in _parts()) for name, whole in there.items())
