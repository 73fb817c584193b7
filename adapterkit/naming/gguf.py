"""GGUF files: which family one is of, and how its rows relate to those of the family's own weights.

Names and orders of rows are data, the naming `gguf` of spec/architectures, which `tools/foreign/architectures` finds by
converting tiny models with llama.cpp itself. What has no place there is refused, never guessed.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from ..errors import Unsupported, UsageError, shown
from .architectures import Architecture, Place, gguf_architectures, of_gguf
from .heads import Heads, by_group, rope_pairs, undone

if TYPE_CHECKING:
    from .heads import Rows

NAMING = "gguf"

ARCHITECTURE = "general.architecture"


def family_of(name: str, modules: Collection[str]) -> Architecture:
    """The family of a model or adapter file.

    Several families share one `general.architecture` (Llama, Mistral and Mixtral are all `llama`): the one that knows
    most of the file's names is taken, and of those that know as many the one with the fewest weights that GGUF lacks.

    Args:
        name: the file's `general.architecture`.
        modules: names of its tensors without `.weight` and the like.

    Raises:
        Unsupported: no family has it.
    """
    families = of_gguf(name)
    if not families:
        known = f"Known: {', '.join(gguf_architectures())}. Or use the weights that it was converted from"
        raise Unsupported(f"GGUF files of architecture {name!r}", where=ARCHITECTURE, cure=known)
    return min(families, key=lambda each: _rank(each, modules))


def _rank(family: Architecture, modules: Collection[str]) -> tuple[int, int, str]:
    known = sum(bool(family.find(module, NAMING)) for module in modules)
    lacking = sum(family.place(weight, NAMING) is None for weight in family.record.weights)
    return -known, lacking, family.family


def is_projector(values: Mapping[str, Any]) -> bool:
    """Whether a file's key-values say that it is the vision or audio part of a model, an `mmproj` file."""
    kind, name = values.get("general.type"), values.get(ARCHITECTURE)
    return kind == "mmproj" or name == "clip"


def place_of(family: Architecture, module: str) -> tuple[str, Place, dict[str, str]] | None:
    """(key, place, numbers) of the one weight that a module of a file is; None where it is none, or holds several."""
    found = family.find(module, NAMING)
    return found[0] if len(found) == 1 else None


def row_order(place: Place, rows: int, heads: Heads, where: str) -> Rows | None:
    """Row i of the file's tensor is row `order[i]` of the weight; None where both have the same order.

    Raises:
        ShapeMismatch: so many heads do not share the rows evenly.
    """
    if place.rows is None:
        return None
    if place.rows == "rope":
        return rope_pairs(rows, heads.query if place.heads == "query" else heads.kv, where)
    sizes = Heads(heads.query, heads.kv, rows // (heads.query + 2 * heads.kv))
    return undone(by_group(sizes))


def heads_in(values: Mapping[str, Any], name: str, where: str) -> Heads:
    """The heads that a model file's key-values say.

    Raises:
        Unsupported: they do not say one number for all layers.
    """
    query = values.get(f"{name}.attention.head_count")
    kv = values.get(f"{name}.attention.head_count_kv", query)
    if type(query) is not int or type(kv) is not int or not (query > 0 and kv > 0):
        said = f"attention.head_count says {shown(query)} and head_count_kv {shown(kv)}"
        why = f"{said}, and the order of rows depends on it"
        raise Unsupported(why, where=where, cure="Merge into the weights that it was converted from")
    width = values.get(f"{name}.embedding_length")
    dim = values.get(f"{name}.attention.key_length", width // query if type(width) is int else 1)
    return Heads(query, kv, dim if type(dim) is int and dim > 0 else 1)


def name_for(config: Mapping[str, Any] | None) -> tuple[str, Architecture]:
    """(general.architecture, family) of the GGUF file that llama.cpp makes of a base.

    Args:
        config: the base's config.

    Raises:
        UsageError: there is no config.
        Unsupported: llama.cpp's converter is not known to take the family.
    """
    from .architectures import architecture_of

    if config is None:
        why = "the base's architecture decides on names and the order of rows in a GGUF file"
        raise UsageError(why, where=ARCHITECTURE, cure="Give the base, with its config.json, by base= or --base")
    for each in (config, config.get("text_config")):
        found = architecture_of(each) if isinstance(each, dict) else None
        if found is not None and found.record.gguf:
            return found.record.gguf[0], found
    known = ", ".join(gguf_architectures())
    why = f"bases of model_type {config.get('model_type')!r}"
    raise Unsupported(why, where="config.json", cure=f"GGUF files of these architectures are known: {known}")
