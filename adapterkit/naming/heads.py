"""Compute the orders in which file formats store the rows of attention heads.

An order is an array of row indices: row i of the tensor in the file is row `order[i]` of the base's tensor. A row is
one output of the layer: a row of a weight or of LoRA's B, or an element of a magnitude or bias.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import PASS_BASE_WITH_CONFIG, USE_ITS_BASE, Malformed, ShapeMismatch, Unsupported, UsageError, shown

if TYPE_CHECKING:
    import numpy as np

    Rows = np.ndarray[Any, Any]

_LARGEST = 1 << 24

LINEAR_FIELDS = (
    "linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim",
)  # fmt: skip
"""The config fields for linear attention: the numbers of its key and value heads, and the widths of such heads."""


@dataclass(frozen=True, slots=True)
class LinearHeads:
    """The heads of linear attention: the numbers of key heads and value heads, and the width of a head of each kind."""

    keys: int
    values: int
    key_dim: int
    value_dim: int


@dataclass(frozen=True, slots=True)
class Heads:
    """The numbers of attention heads in a model, and the width of a head.

    Attributes:
        query: the number of query heads.
        kv: the number of key heads, which equals the number of value heads.
        dim: the number of rows of a head.
        linear: the heads of linear attention, if some layers use linear attention; otherwise None.
        rotary: the number of rows per head that the rotary embedding rotates; 0 if unknown.
        vision: the number of heads of the vision tower; 0 if it is unknown or the model has no vision tower.
    """

    query: int
    kv: int
    dim: int
    linear: LinearHeads | None = None
    rotary: int = 0
    vision: int = 0

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Return the numbers of rows of the query, key and value projections."""
        return self.query * self.dim, self.kv * self.dim, self.kv * self.dim


def heads_of(config: Mapping[str, object] | None, where: str) -> Heads:
    """Read the numbers of heads from a base's config.

    Args:
        config: a config in transformers' format. If it contains a `text_config`, the numbers of the language model's
            heads are read from there.
        where: the tensor or file that needs the heads, for error messages.

    Raises:
        UsageError: there is no config, or the config does not state the number of query heads or the width of a head.
        Malformed: a field that must be a positive integer has another value, or its value is too large.
        Unsupported: the blocks have different numbers of query heads per key head.
    """
    if config is None:
        raise UsageError("the row order depends on the base's heads, and no config was given", where=where, cure=_GIVE)
    inner = config.get("text_config")
    attention_config = inner if isinstance(inner, dict) else config
    query = _count(attention_config, ("num_attention_heads", "n_head", "n_heads"), where)
    # Check multi_query before num_kv_heads: if multi_query is set, all query heads share one key head, but Falcon's
    # config still has num_kv_heads = num_attention_heads.
    one = attention_config.get("multi_query") is True and attention_config.get("new_decoder_architecture") is not True
    fields = ("num_key_value_heads", "num_kv_heads", "n_kv_heads")
    kv = 1 if one else _count(attention_config, fields, where, _shared(attention_config, query, where))
    width = _count(attention_config, ("hidden_size", "n_embd", "d_model"), where, 0)
    dim = _count(attention_config, ("head_dim",), where, width // query)
    if not dim:
        raise UsageError("the base's config does not state the width of its heads", where=where, cure=_GIVE)
    parameters = attention_config.get("rope_parameters")
    factor = (parameters if isinstance(parameters, dict) else attention_config).get("partial_rotary_factor")
    rotary = int(dim * factor) if isinstance(factor, int | float) and 0 < factor <= 1 else 0
    vision = config.get("vision_config")
    tower = _count(vision, ("num_attention_heads", "num_heads"), where, 0) if isinstance(vision, dict) else 0
    return Heads(query, kv, dim, linear_of(attention_config), rotary, tower)


def _shared(config: Mapping[str, object], query: int, where: str) -> int:
    """Return the number of key heads. If the config does not list blocks, this is `query`, the number of query heads.

    The config of a Nemotron NAS states, for each block, how many query heads share a key head.

    Raises:
        Unsupported: the blocks have different numbers of query heads per key head.
    """
    blocks = config.get("block_configs")
    attentions = [b.get("attention") for b in blocks if isinstance(b, dict)] if isinstance(blocks, list) else []
    groups = {a.get("n_heads_in_group") for a in attentions if isinstance(a, dict)} - {None}
    if len(groups) > 1:
        why = f"the blocks differ in query heads per key head: {', '.join(map(str, sorted(groups, key=str)))}"
        raise Unsupported(why, where=where, cure="Merge the adapter into the GGUF model of this base")
    group = groups.pop() if groups else 1
    return query // group if type(group) is int and 0 < group <= query else query


def linear_of(config: Mapping[str, object]) -> LinearHeads | None:
    """Read the heads of linear attention from a base's config; return None if the base has no linear attention."""
    return linear_heads(*(config.get(name) for name in LINEAR_FIELDS))


def linear_heads(keys: object, values: object, key_dim: object, value_dim: object) -> LinearHeads | None:
    """Build a `LinearHeads`; return None if an argument is not a positive integer or is too large.

    Also return None if the number of value heads is not a multiple of the number of key heads.
    """
    counts = [count for count in (keys, values, key_dim, value_dim) if type(count) is int and 0 < count <= _LARGEST]
    return LinearHeads(*counts) if len(counts) == 4 and counts[1] % counts[0] == 0 else None


def _count(config: Mapping[str, object], names: tuple[str, ...], where: str, default: int | None = None) -> int:
    value = next((config[name] for name in names if config.get(name) is not None), default)
    if value is None:
        raise UsageError(f"the base's config does not state {names[0]}", where=where, cure=_GIVE)
    if type(value) is not int or not 0 < value <= _LARGEST:
        if value == 0 == default:
            return 0
        raise Malformed(
            f"the base's config has an invalid {names[0]}: {shown(value)}",
            where=where,
            cure="Download config.json again",
        )
    return value


def sharing(heads: Heads, which: str | None, where: str) -> int:
    """Return the number of heads among which a tensor's rows are divided.

    Args:
        heads: the model's numbers of heads.
        which: the kind of heads: `query`, `kv`, or `vision` for the heads of the vision tower. None means `kv`.
        where: the tensor, for errors.

    Raises:
        UsageError: `which` is `vision`, but the vision tower's number of heads is unknown.
    """
    if which == "query":
        return heads.query
    if which != "vision":
        return heads.kv
    if not heads.vision:
        why = "the base's config does not state the number of its vision tower's heads"
        raise UsageError(why, where=where, cure=_GIVE)
    return heads.vision


def rope_pairs(rows: int, heads: int, where: str) -> Rows:
    """Return Meta's order of query or key rows, in which two rows that RoPE rotates together are adjacent.

    In transformers' order, row i of a head's first half is rotated together with row i of the head's second half.

    Raises:
        ShapeMismatch: the rows cannot be divided evenly among the heads.
    """
    import numpy as np

    if rows % (2 * heads):
        why = f"the {rows} rows cannot be divided into {heads} heads of an even width"
        raise ShapeMismatch(why, where=where, cure=USE_ITS_BASE)
    return np.arange(rows).reshape(heads, 2, rows // heads // 2).swapaxes(1, 2).reshape(-1)


def rotary_halves(rows: int, heads: int, rotary: int, where: str) -> Rows:
    """Return llama.cpp's order of query or key rows, for M-RoPE models that rotate adjacent rows together.

    In each head, these models rotate rows 2i and 2i + 1 together. llama.cpp's kernel instead rotates row i of the first
    half of the rotary rows together with row i of the second half. So for each head, the file stores the rotary rows
    with even index first, then the rotary rows with odd index, then the rows that are not rotated.

    Raises:
        ShapeMismatch: the rows cannot be divided evenly among the heads.
    """
    import numpy as np

    if rows % heads or rotary % 2 or not 0 < rotary <= rows // heads:
        why = f"the {rows} rows do not match {heads} heads with {rotary} rotary rows"
        raise ShapeMismatch(why, where=where, cure=USE_ITS_BASE)
    each = np.arange(rows // heads)
    one = np.concatenate([each[:rotary:2], each[1:rotary:2], each[rotary:]])
    order: Rows = np.arange(heads)[:, None] * len(each) + one
    return order.reshape(-1)


def by_group(heads: Heads) -> Rows:
    """Return Megatron's order of the rows of fused queries, keys and values.

    For each key head, the rows of all query heads that share it come first, then its key rows, then its value rows.
    """
    import numpy as np

    q, k, v = np.split(np.arange(sum(heads.sizes)), np.cumsum(heads.sizes)[:2])
    groups = [part.reshape(heads.kv, -1) for part in (q, k, v)]
    return np.concatenate(groups, axis=1).reshape(-1)


def by_value_head(rows: int, heads: LinearHeads, where: str) -> Rows:
    """Return llama.cpp's order of the rows of value heads in linear attention.

    In transformers, the value heads that share a key head are adjacent. llama.cpp stores the first value head of each
    key head, then the second value head of each key head, and so on. The reason is that ggml repeats the whole list of
    key heads (0, 1, 0, 1), not each key head by itself (0, 0, 1, 1); see llama.cpp #19468.

    Raises:
        ShapeMismatch: the rows cannot be divided evenly among the value heads.
    """
    import numpy as np

    if rows % heads.values:
        why = f"the {rows} rows cannot be divided into {heads.values} value heads"
        raise ShapeMismatch(why, where=where, cure=USE_ITS_BASE)
    return np.arange(rows).reshape(heads.keys, heads.values // heads.keys, -1).swapaxes(0, 1).reshape(-1)


def linear_qkv(rows: int, heads: LinearHeads, where: str) -> Rows:
    """Return llama.cpp's order of fused query, key and value rows in linear attention.

    Only the order of the value rows differs from transformers' order, as in `by_value_head`.

    Raises:
        ShapeMismatch: the number of rows does not match the numbers and widths of the heads.
    """
    import numpy as np

    values = heads.values * heads.value_dim
    if rows != 2 * heads.keys * heads.key_dim + values:
        why = f"the {rows} rows do not match {heads.keys} key and {heads.values} value heads"
        raise ShapeMismatch(why, where=where, cure=USE_ITS_BASE)
    return np.concatenate([np.arange(rows - values), rows - values + by_value_head(values, heads, where)])


def linear_qkvz(rows: int, heads: LinearHeads, where: str) -> tuple[Rows, Rows]:
    """Return two arrays of row indices of a fused weight: one for queries, keys and values, and one for the gates.

    The weight is ordered by key heads, as in transformers' `in_proj_qkvz` of Qwen3-Next: each key head has its query
    rows, then its key rows, then its value rows, then the gate rows for these values.

    Raises:
        ShapeMismatch: the number of rows does not match the numbers and widths of the heads.
    """
    import numpy as np

    each = heads.values // heads.keys * heads.value_dim
    if rows != heads.keys * 2 * (heads.key_dim + each):
        why = f"the {rows} rows do not match {heads.keys} key and {heads.values} value heads"
        raise ShapeMismatch(why, where=where, cure=USE_ITS_BASE)
    parts = np.split(np.arange(rows).reshape(heads.keys, -1), np.cumsum([heads.key_dim, heads.key_dim, each]), axis=1)
    return np.concatenate([part.reshape(-1) for part in parts[:3]]), parts[3].reshape(-1)


def latent(heads: int, keys: int, values: int) -> tuple[Rows, Rows]:
    """Return the row indices of keys, and those of values, in a weight that stores each head's keys, then its values.

    DeepSeek's MLA stores `kv_b_proj` in this order.
    """
    import numpy as np

    rows = np.arange(heads * (keys + values)).reshape(heads, -1)
    return rows[:, :keys].reshape(-1), rows[:, keys:].reshape(-1)


def undone(order: Rows) -> Rows:
    """Return the inverse of `order`. Indexing reordered rows with the inverse restores their original order."""
    import numpy as np

    return np.argsort(order, kind="stable")


_GIVE = PASS_BASE_WITH_CONFIG
