"""Compare the model that an adapter records with the models that a base contains.

PEFT records a Python module of transformers, such as `gemma3`, and a class in the module. A base's config has a model
type for the whole model and one for each part. `spec/architectures/model_types` maps model types to modules.
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
        modules: a map from each model type to transformers' Python module.
        parts: for each class that implements only a part of a model, the model types of that part.
        sources: where the data comes from.
    """

    format: int
    modules: dict[str, str]
    parts: dict[str, list[str]]
    sources: list[str] = []


@cache
def table() -> ModelTypeTable:
    """Load the table of transformers' models.

    Raises:
        Malformed: the file is damaged.
    """
    return decoded(folder() / "model_types" / "transformers.toml", ModelTypeTable)


def module_of(name: str) -> str | None:
    """Return transformers' module for `name`, which is a model type or a module; None if the name is unknown.

    For a family that only has a file, such as a user's own file, the module is the family's name.
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
    """List the model types of parts of models.

    These are the types listed for the classes of parts, and the types whose name differs from their module, if the
    module is also a model type.
    """
    modules = table().modules
    whole = {module for name, module in modules.items() if name.replace("-", "_") == module}
    beside = {name for name, module in modules.items() if module in whole and name.replace("-", "_") != module}
    return frozenset(beside.union(*table().parts.values()))


def models_of(config: Mapping[str, object]) -> dict[str, bool]:
    """Return a map from each model type in a base's config to True for the whole model, or False for a part.

    For a GGUF file, the map has every model type for which llama.cpp's converter writes the file's
    `general.architecture`.
    """
    found: dict[str, bool] = {}
    if isinstance(architecture := config.get(ARCHITECTURE), str):
        # One architecture may have several families: DeepSeek-V2, DeepSeek-V3 and GLM-4.7-Flash are all `deepseek2`.
        found |= {name: True for family in of_gguf(architecture) for name in family.record.model_types}
    if isinstance(model_type := config.get("model_type"), str) and model_type:
        found[model_type] = True
    for part in config.values():
        # The configs of parts are mostly in fields such as `text_config`; an encoder-decoder has `encoder` and
        # `decoder`.
        if isinstance(part, Mapping):
            found |= {name: False for name in models_of(part) if name not in found}
    return found


def has_model(given: Mapping[str, bool], module: str, trained_class: str | None) -> bool:
    """Whether a base contains the model on which an adapter was trained, judged by model types.

    Args:
        given: the result of `models_of` for the base.
        module: transformers' module with the class on which the adapter was trained.
        trained_class: the name of the class, if the adapter records it.
    """
    types = table().parts.get(trained_class or "")
    there = {name: whole for name, whole in given.items() if module_of(name) == module}
    if trained_class is None:
        return bool(there)
    if types is None:
        # The adapter was trained on a whole model. Do not accept a base that only has a part in common: MusicFlamingo
        # contains AudioFlamingo 3's audio encoder. But an adapter of the whole Gemma 3 may fit the text model alone.
        return any(whole or name not in _parts() for name, whole in there.items())
    # The adapter was trained on a part. Accept whole models, because they contain all parts of their module. But
    # Parakeet models with different heads are not parts of each other.
    return any(name in types or (whole and name not in _parts()) for name, whole in there.items())
