"""Find the family of a GGUF file, and compute how its row order differs from that of the Hugging Face Hub's weights.

The names of tensors and the orders of rows are data in spec/architectures, under the naming `gguf`.
`tools/foreign/architectures` measures this data by converting tiny models with llama.cpp. Tensors that the data does
not list are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING

from ..errors import PASS_BASE_WITH_CONFIG, Unsupported, UsageError, shown
from .architectures import SPLIT, Architecture, WeightPlace, gguf_architectures, of_gguf, shape_of
from .heads import (
    Heads,
    by_group,
    by_value_head,
    latent,
    linear_heads,
    linear_qkv,
    linear_qkvz,
    rope_pairs,
    rotary_halves,
    sharing,
    undone,
)

if TYPE_CHECKING:
    from .heads import LinearHeads, Rows

NAMING = "gguf"

ARCHITECTURE = "general.architecture"


def family_of(name: str, modules: Collection[str], keys: Collection[str] = ()) -> Architecture:
    """Find the family of a GGUF model or adapter.

    Several families can share one `general.architecture`: Llama, Mistral and Mixtral are all `llama`. The file of such
    a family can have a `gguf_key`: a key that GGUF files of the other families lack. If the GGUF file has such a key,
    only families with this key are considered. Otherwise, only families without a `gguf_key` are considered, or all
    families if each has one.

    The function chooses the family whose file lists the most tensors of the GGUF file. To break ties, it first counts
    the weights in each family's file that have no GGUF name, then the GGUF names in each family's file that do not
    occur in the GGUF file. In both counts, the lowest number wins.

    Args:
        name: the file's `general.architecture`.
        modules: the names of the file's tensors, without endings such as `.weight`.
        keys: the names of the file's key-values.

    Raises:
        Unsupported: no family's file lists this `general.architecture`.
    """
    families = of_gguf(name)
    if not families:
        known = f"Known: {', '.join(gguf_architectures())}. Or use the weights from which the file was converted"
        raise Unsupported(f"GGUF files of the architecture {name!r} are not supported", where=ARCHITECTURE, cure=known)
    marked = [each for each in families if each.record.gguf_key and f"{name}.{each.record.gguf_key}" in keys]
    plain = [each for each in families if each.record.gguf_key is None]
    return min(marked or plain or families, key=lambda each: _rank(each, modules))


def _rank(family: Architecture, modules: Collection[str]) -> tuple[int, int, int, str]:
    known = sum(bool(family.find(module, NAMING)) for module in modules)
    absent = len(set(family.templates(NAMING)) - {shape_of(module) for module in modules})
    lacking = sum(family.place(weight, NAMING) is None for weight in family.record.weights)
    return -known, lacking, absent, family.family


def is_projector(values: Mapping[str, object]) -> bool:
    """Whether a GGUF file's key-values show that it is an `mmproj` file, which holds a model's vision or audio part."""
    kind, name = values.get("general.type"), values.get(ARCHITECTURE)
    return kind == "mmproj" or name == "clip"


def place_of(family: Architecture, module: str) -> tuple[str, WeightPlace, dict[str, str]] | None:
    """Return which weight a GGUF tensor stores, as (weight, place, numbers).

    `weight` is the template of the weight's name in the family's file. `place` is the weight's name and layout in GGUF.
    `numbers` maps the template's placeholders to the numbers in `module`. Return None if the family does not list the
    tensor, or if the tensor stores several weights.
    """
    places = family.find(module, NAMING)
    return places[0] if len(places) == 1 else None


FUSED = {"attn_qkv": ("attn_q", "attn_k", "attn_v"), "ffn_gate_up_exps": ("ffn_gate_exps", "ffn_up_exps")}
"""A map from each fused tensor to its parts, in the order of their rows.

llama.cpp's options `--fuse-qkv` and `--fuse-gate-up-exps` create these fused tensors. Each part's rows have the same
order as in a tensor that stores only this part. In `ffn_gate_up_exps`, each expert has its gate rows first, then its up
rows.
"""


def fused_places(family: Architecture, module: str) -> list[tuple[str, WeightPlace, dict[str, str]]]:
    """Return the result of `place_of` for each part of a tensor in `FUSED`.

    The list is empty if the tensor is not in `FUSED`, or if the family does not list one of the parts.
    """
    stem, _, leaf = module.rpartition(".")
    places = [place_of(family, f"{stem}.{part}") for part in FUSED.get(leaf, ())]
    return [each for each in places if each is not None] if None not in places else []


def fused_rows(module: str, rows: int, values: Mapping[str, object], name: str) -> list[int]:
    """Return the number of rows of each part of a fused tensor.

    Args:
        module: the tensor, without `.weight`.
        rows: the number of rows of the tensor; if the tensor stacks experts, the number of rows of one expert.
        values: the file's key-values.
        name: the file's `general.architecture`.

    Raises:
        Unsupported: the key-values do not state the numbers of heads, or the parts' rows do not add up to `rows`.
    """
    if module.endswith("ffn_gate_up_exps"):
        return [rows // 2, rows // 2]
    heads = heads_in(values, name, module)
    value = values.get(f"{name}.attention.value_length", heads.dim)
    sizes = [heads.query * heads.dim, heads.kv * heads.dim, heads.kv * (value if type(value) is int else heads.dim)]
    if sum(sizes) != rows:
        why = f"the tensor has {rows} rows, but the heads need {' + '.join(map(str, sizes))} (queries, keys, values)"
        raise Unsupported(why, where=module, cure=_MERGE)
    return sizes


def row_order(place: WeightPlace, rows: int, heads: Heads, where: str) -> Rows | None:
    """Return `order`: row i of the file's tensor is row `order[i]` of the weight. Return None if no rows are moved.

    Raises:
        UsageError: the vision tower's number of heads is needed, but unknown.
        ShapeMismatch: the rows cannot be divided evenly among the heads.
        Unsupported: the weight's rows are divided between two tensors; or the heads of linear attention or the number
            of rotary rows are needed, but unknown.
    """
    if place.rows is None:
        return None
    if place.rows == "rope":
        return rope_pairs(rows, sharing(heads, place.heads, where), where)
    if place.rows == "rotary":
        if not heads.rotary:
            why = "the order of the tensor's rows depends on the number of rotary rows per head, which is unknown"
            raise Unsupported(why, where=where, cure="Pass a base whose config.json has partial_rotary_factor")
        return rotary_halves(rows, sharing(heads, place.heads, where), heads.rotary, where)
    if place.rows in SPLIT:
        raise Unsupported(
            f"the weight is split into two tensors, {place.name} and {place.beside}", where=where, cure=_MERGE
        )
    if place.rows == "linear_value":
        return by_value_head(rows, _linear(heads, where), where)
    if place.rows == "linear_qkv":
        return linear_qkv(rows, _linear(heads, where), where)
    sizes = Heads(heads.query, heads.kv, rows // (heads.query + 2 * heads.kv))
    return undone(by_group(sizes))


def column_order(place: WeightPlace, columns: int, heads: Heads, where: str) -> Rows | None:
    """Return `order`: column i of the file's tensor is column `order[i]` of the weight.

    Return None if no columns are moved.

    Raises:
        ShapeMismatch, Unsupported: see `row_order`.
    """
    return None if place.columns is None else by_value_head(columns, _linear(heads, where), where)


def rows_apart(
    place: WeightPlace, shapes: tuple[tuple[int, ...], tuple[int, ...]], heads: Callable[[], Heads], where: str
) -> tuple[tuple[Rows, Rows], bool, int]:
    """Return how the rows of a weight are divided between the two GGUF tensors that store it.

    Args:
        place: the weight's name and layout in GGUF.
        shapes: the shapes of the two tensors that store the weight.
        heads: a function that returns the model's heads; it is called only if needed.
        where: the tensor, for errors.

    Returns:
        a tuple (rows, transposed, length). `rows` has two arrays: the indices of the weight's rows that are stored in
        the first tensor, and the indices of those that are stored in the second tensor. `transposed` states whether the
        first tensor stores each head's matrix transposed. `length` is the length of a row of the weight.

    Raises:
        Unsupported: the shapes of the two tensors do not match, or the heads of linear attention are unknown.
        ShapeMismatch: the rows cannot be divided evenly among the heads.
    """
    first, second = shapes
    if place.rows == "latent" and len(first) == len(second) == 3 and (first[0], first[1]) == (second[0], second[2]):
        return latent(first[0], first[2], second[1]), True, first[1]
    if place.rows == "linear_qkvz" and len(first) == len(second) == 2 and first[1] == second[1]:
        return linear_qkvz(first[0] + second[0], _linear(heads(), where), where), False, first[1]
    why = f"the two tensors that store the weight have shapes that do not match: {list(first)} and {list(second)}"
    raise Unsupported(why, where=where, cure=_MERGE)


def _linear(heads: Heads, where: str) -> LinearHeads:
    if heads.linear is None:
        why = "the order of the tensor's rows depends on the heads of linear attention, which are unknown"
        raise Unsupported(why, where=where, cure=PASS_BASE_WITH_CONFIG)
    return heads.linear


def heads_in(values: Mapping[str, object], name: str, where: str) -> Heads:
    """Read the numbers of heads from a GGUF file's key-values.

    Raises:
        Unsupported: the key-values do not state the numbers of heads, or layers with attention have different numbers.
    """
    query = _in_attention(values.get(f"{name}.attention.head_count"))
    kv = _in_attention(values.get(f"{name}.attention.head_count_kv", query))
    if type(query) is not int or type(kv) is not int or not (query > 0 and kv > 0):
        heads_text = f"attention.head_count is {shown(query)} and head_count_kv is {shown(kv)}"
        why = f"the order of rows depends on the numbers of heads, but {heads_text}"
        raise Unsupported(why, where=where, cure=_MERGE)
    width = values.get(f"{name}.embedding_length")
    dim = values.get(f"{name}.attention.key_length", width // query if type(width) is int else 1)
    linear = [values.get(f"{name}.ssm.{key}") for key in ("group_count", "time_step_rank", "state_size", "inner_size")]
    if type(linear[1]) is int and type(linear[3]) is int and linear[1] > 0:
        linear[3] //= linear[1]  # `inner_size` is the width of all value heads together; get the width of one head.
    rotary = values.get(f"{name}.rope.dimension_count")
    turned = rotary if type(rotary) is int and rotary > 0 else 0
    return Heads(query, kv, dim if type(dim) is int and dim > 0 else 1, linear_heads(*linear), turned)


def _in_attention(count: object) -> object:
    """Return the number of heads in a layer that has attention. If such layers have different numbers, return `count`.

    In hybrid models, `count` is a list with one number per layer, which is 0 for layers without attention.
    """
    several = {each for each in count if each != 0} if isinstance(count, list | tuple) else {count}
    return several.pop() if len(several) == 1 else count


def name_for(config: Mapping[str, object] | None) -> tuple[str, Architecture]:
    """Return (general.architecture, family) of the GGUF file that llama.cpp writes for a base.

    Args:
        config: the base's config.

    Raises:
        UsageError: the base has no config.
        Unsupported: llama.cpp's converter is not known to support the family.
    """
    from .architectures import architecture_of, named

    if config is None:
        why = "the names and the row order in a GGUF file depend on the base's architecture, but no config was given"
        raise UsageError(why, where=ARCHITECTURE, cure=PASS_BASE_WITH_CONFIG)
    for each in (config, config.get("text_config")):
        architecture = architecture_of(each) if isinstance(each, dict) else None
        if architecture is not None and architecture.record.gguf:
            name = _chosen(architecture, config)
            other = architecture.record.gguf_as.get(name)
            return name, architecture if other is None else named(other)
    known = ", ".join(gguf_architectures())
    why = f"GGUF files of bases with model_type {config.get('model_type')!r} are not supported"
    raise Unsupported(why, where="config.json", cure=f"Known architectures: {known}")


def _chosen(family: Architecture, config: Mapping[str, object]) -> str:
    when = family.record.gguf_when
    for name in family.record.gguf:
        if name not in when or when[name].holds(config):
            return name
    classes = sorted({each for condition in when.values() for each in condition.classes})
    why = f"{shown(config.get('architectures'))} is not supported for a base with model_type {family.family}"
    known = f"Supported classes: {', '.join(classes)}; llama.cpp's converter treats other classes as another family"
    raise Unsupported(why, where="config.json", cure=f"{known}. Merge the adapter into the GGUF model")


_MERGE = "Merge the adapter into the weights from which the file was converted"
