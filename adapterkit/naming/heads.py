"""Attention heads, and the orders in which dialects keep the rows that belong to them.

An order is a list of row numbers: row i of the dialect's tensor is row `order[i]` of the base's own. Rows are outputs:
of B, of a magnitude, of a bias.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import Malformed, ShapeMismatch, UsageError, shown

if TYPE_CHECKING:
    import numpy as np

    Rows = np.ndarray[Any, Any]

_LARGEST = 1 << 24


@dataclass(frozen=True, slots=True)
class Heads:
    """How many heads ask, how many answer, and the width of each."""

    query: int
    kv: int
    dim: int

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Rows of q, k and v."""
        return self.query * self.dim, self.kv * self.dim, self.kv * self.dim


def heads_of(config: Mapping[str, Any] | None, where: str) -> Heads:
    """The heads of a base, by its config.

    Args:
        config: of transformers; in one of several models, that of the language model.
        where: what needs them, for messages.

    Raises:
        UsageError: there is no config, or it does not say.
        Malformed: what it says is no count.
    """
    if config is None:
        raise UsageError("how many heads the base has decides on the order of rows here", where=where, cure=_GIVE)
    inner = config.get("text_config")
    own = inner if isinstance(inner, dict) else config
    query = _count(own, ("num_attention_heads", "n_head"), where)
    # Falcon's config says num_kv_heads = num_attention_heads where its first generation shares one key among all heads.
    one = own.get("multi_query") is True and own.get("new_decoder_architecture") is not True
    kv = 1 if one else _count(own, ("num_key_value_heads", "num_kv_heads"), where, query)
    width = _count(own, ("hidden_size", "n_embd"), where, 0)
    dim = _count(own, ("head_dim",), where, width // query)
    if not dim:
        raise UsageError("the base's config does not say how wide its heads are", where=where, cure=_GIVE)
    return Heads(query, kv, dim)


def _count(config: Any, names: tuple[str, ...], where: str, default: int | None = None) -> int:
    value = next((config[name] for name in names if config.get(name) is not None), default)
    if value is None:
        raise UsageError(f"the base's config does not say {names[0]}", where=where, cure=_GIVE)
    if type(value) is not int or not 0 < value <= _LARGEST:
        if value == 0 == default:
            return 0
        raise Malformed(
            f"{names[0]} is {shown(value)} in the base's config", where=where, cure="Fetch config.json again"
        )
    return value


def rope_pairs(rows: int, heads: int, where: str) -> Rows:
    """Meta's order, in which the two rows that a rotary embedding turns together stand side by side.

    transformers' order is the first halves of a head, then the second ones.

    Raises:
        ShapeMismatch: so many heads do not share the rows evenly.
    """
    import numpy as np

    if rows % (2 * heads):
        why = f"{rows} rows are not shared evenly by {heads} heads of an even width"
        raise ShapeMismatch(why, where=where, cure="Is this the base that the adapter was trained on?")
    return np.arange(rows).reshape(heads, 2, rows // heads // 2).swapaxes(1, 2).reshape(-1)


def by_group(heads: Heads) -> Rows:
    """Megatron's order of q, k and v in one weight: for each group its queries, its key, its value."""
    import numpy as np

    q, k, v = np.split(np.arange(sum(heads.sizes)), np.cumsum(heads.sizes)[:2])
    groups = [part.reshape(heads.kv, -1) for part in (q, k, v)]
    return np.concatenate(groups, axis=1).reshape(-1)


def undone(order: Rows) -> Rows:
    """The order that takes an order back."""
    import numpy as np

    return np.argsort(order, kind="stable")


_GIVE = "Give the base, with its config.json, by base= or --base"
