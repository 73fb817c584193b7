"""What other tools call their ways to combine, in this one's methods and parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import Unsupported, UsageError, nearest

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


def resolved(name: str, compat: str | None) -> tuple[str, dict[str, Any]]:
    """A method's name and the parameters with it, of a peer's name, one put together (`knots_ties`), or its own.

    Raises:
        Unsupported: no method, or no peer, of that name.
    """
    from .methods import COMBINERS

    if compat is not None:
        return _of_peer(name, compat)
    plug, _, rest = name.partition("_")
    if name not in COMBINERS and plug in COMBINERS and rest in COMBINERS and COMBINERS[plug].plug:
        return plug, {"then": rest}
    return name, {}


def _of_peer(name: str, compat: str) -> tuple[str, dict[str, Any]]:
    from .methods import COMBINERS

    if compat not in PEERS:
        raise Unsupported(f"no way of {compat!r} is known", cure=f"Known: {', '.join(PEERS)}")
    known = PEERS[compat]
    if name not in known:
        cure = nearest(name, known) or f"Known: {', '.join(known)}"
        raise UsageError(f"{compat} has no way to combine called {name!r}", where="compat", cure=cure)
    method, values = known[name]
    inner = COMBINERS[values["then"]] if "then" in values else COMBINERS[method]
    return method, {**inner.compat.get(compat, {}), **values}
