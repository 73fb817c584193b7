"""What other tools call their ways to combine, in this one's methods and parameters."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import Unsupported, UsageError, nearest

if TYPE_CHECKING:
    from ..core.adapter import Adapter

Known = Mapping[str, tuple[str, Mapping[str, Any]]]

PEFT: Known = {
    "linear": ("factors", {"then": "linear"}),
    "ties": ("factors", {"then": "ties"}),
    "dare_linear": ("factors", {"then": "dare_linear"}),
    "dare_ties": ("factors", {"then": "dare_ties"}),
    "magnitude_prune": ("factors", {"then": "magnitude_prune"}),
    "cat": ("linear", {}),
    "svd": ("task_arithmetic", {"rank": "largest"}),
    "ties_svd": ("ties", {"rank": "largest"}),
    "dare_linear_svd": ("dare_linear", {"rank": "largest"}),
    "dare_ties_svd": ("dare_ties", {"rank": "largest"}),
    "magnitude_prune_svd": ("magnitude_prune", {"rank": "largest"}),
}
"""`combination_type` of PEFT's `add_weighted_adapter`."""

MERGEKIT: Known = {
    "linear": ("linear", {}),
    "slerp": ("slerp", {}),
    "nuslerp": ("slerp", {}),
    "multislerp": ("multislerp", {}),
    "karcher": ("karcher", {}),
    "model_stock": ("model_stock", {}),
    "task_arithmetic": ("task_arithmetic", {}),
    "ties": ("ties", {}),
    "dare_linear": ("dare_linear", {}),
    "dare_ties": ("dare_ties", {}),
    "della": ("della", {}),
    "della_linear": ("della", {"sign": "none", "denominator": "none"}),
    "breadcrumbs": ("breadcrumbs", {}),
    "breadcrumbs_ties": ("breadcrumbs", {"sign": "total"}),
    "sce": ("sce", {}),
    "passthrough": ("linear", {"normalize": False}),
    "nearswap": ("nearswap", {}),
    "ram": ("ram", {}),
    "ramplus_tl": ("ramplus_tl", {}),
    "arcee_fusion": ("arcee_fusion", {}),
}
"""`merge_method` of mergekit, for differences to a base."""

PEERS: Mapping[str, Known] = {"mergekit": MERGEKIT, "peft": PEFT}


def resolved(name: str, compat: str | None, count: int = 0) -> tuple[str, dict[str, Any]]:
    """A method's name and the parameters with it, of a peer's name, one put together (`knots_ties`), or its own.

    Args:
        name: as the peer, or adapterkit, calls it.
        compat: the peer.
        count: how many adapters there are; PEFT takes one alone as `linear`, whatever is asked for.

    Raises:
        Unsupported: no method, or no peer, of that name.
    """
    from .combiners import COMBINERS

    if compat is not None:
        return _of_peer("linear" if compat == "peft" and count == 1 and name in PEFT else name, compat)
    plug, _, rest = name.partition("_")
    if name not in COMBINERS and plug in COMBINERS and rest in COMBINERS and COMBINERS[plug].plug:
        return plug, {"then": rest}
    return name, {}


def _of_peer(name: str, compat: str) -> tuple[str, dict[str, Any]]:
    from .combiners import COMBINERS

    if compat not in PEERS:
        raise Unsupported(f"no way of {compat!r} is known", cure=f"Known: {', '.join(PEERS)}")
    known = PEERS[compat]
    if name not in known:
        cure = nearest(name, known) or f"Known: {', '.join(known)}"
        raise UsageError(f"{compat} has no way to combine called {name!r}", where="compat", cure=cure)
    method, values = known[name]
    inner = COMBINERS[values["then"]] if "then" in values else COMBINERS[method]
    return method, {**inner.compat.get(compat, {}), **values}


def peft_result(name: str, adapters: Sequence[Adapter], rank: int | None) -> tuple[int | None, float]:
    """What PEFT makes of a combination beside its formula: the rank it cuts to, and a factor of the result.

    `add_weighted_adapter` copies the first adapter's config and sets alpha to the rank, so that the scaling is to be 1.
    Where that config has `use_rslora`, the scaling is alpha / sqrt(rank), and the result is sqrt(rank) times as large
    (PEFT 0.21.2). This is what the model then computes, and so it is computed here.

    Args:
        name: the combination type.
        adapters: in their order.
        rank: the rank that was asked for.

    Returns:
        the rank to cut to, None for none; and the factor.
    """
    ranks = [_rank(adapter) for adapter in adapters]
    is_cut = name.endswith("svd") and len(adapters) > 1
    cut = (rank or max(ranks)) if is_cut else rank
    new_rank = sum(ranks) if name == "cat" and len(adapters) > 1 else cut if is_cut and cut else ranks[0]
    return cut, math.sqrt(new_rank) if _config(adapters[0]).get("use_rslora") else 1.0


def _config(adapter: Adapter) -> Mapping[str, Any]:
    """The config of PEFT that an adapter was read with; only there it says whether its scalings were rsLoRA's."""
    foreign = adapter.foreign
    config = foreign.data.get("config") if foreign is not None and foreign.format == "peft" else None
    return config if isinstance(config, Mapping) else {}


def _rank(adapter: Adapter) -> int:
    """The rank that PEFT allocates for an adapter: its config's largest."""
    config = _config(adapter)
    pattern = config.get("rank_pattern")
    told = [config.get("r"), *(pattern.values() if isinstance(pattern, Mapping) else ())]
    return max([rank for rank in told if isinstance(rank, int)], default=max(adapter.ranks, default=1))
