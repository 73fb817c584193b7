"""Add experts to a router: adapters that the router's file names but does not contain, passed to `inject`.

The paths of experts in a router's file are not followed: they are plain strings from an untrusted file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ..core.adapter import Adapter, Target
from ..core.updates import Update
from ..errors import ShapeMismatch, TargetNotFound, Unsupported, UsageError
from ..io.lazy import as_torch
from ..methods.arrow import Arrow
from ..methods.lora import LoRA
from ..methods.xlora import XLoRA

Pairs = Mapping[str, LoRA]
"""A map from paths to one expert's LoRA at each path, with its tensors loaded."""


def with_experts(names: Callable[[], Sequence[str]], adapter: Adapter, experts: Sequence[Adapter]) -> Adapter:
    """Return the adapter with its experts, whose factors are stacked at each target.

    Args:
        names: a function that returns the names of the model's modules in their order.
        adapter: any adapter; it is returned unchanged if none of its updates lacks experts.
        experts: plain LoRA adapters, in the router's order.

    Raises:
        UsageError: experts are missing, or experts are given and no update needs them.
        Unsupported: an expert is not plain LoRA, or there are other updates at the router's target.
        ShapeMismatch: the experts do not fit each other or the router.
        TargetNotFound: an expert has no LoRA at a target where the router needs one.
    """
    needy = [(target, update) for target, update in adapter if getattr(update, "lacks_experts", False)]
    if not needy:
        if experts:
            raise UsageError("this adapter needs no separate experts", where="experts", cure="Leave experts= out")
        return adapter
    if not experts:
        cure = "Pass experts=, a list of the expert adapters in the router's order"
        why = "the router's experts are separate adapters, and none are given"
        raise UsageError(why, where=f"{needy[0][0]}: {needy[0][1].method}", cure=cure)
    pairs = [_pairs(expert, position) for position, expert in enumerate(experts)]
    updates: dict[Target, tuple[Update, ...]] = {}
    for target, found in adapter.updates.items():
        if not any(getattr(update, "lacks_experts", False) for update in found):
            updates[target] = found
            continue
        router, *others = found
        if others:
            why = "there are other updates at the router's target"
            raise Unsupported(why, where=str(target), cure="Put each update into a separate adapter")
        if isinstance(router, XLoRA):
            updates |= _of_classifier(names, router, pairs)
        else:
            updates[target] = (_of_prototypes(target, router, pairs),)
    return adapter.replace(updates=updates)


def _pairs(expert: Adapter, position: int) -> Pairs:
    found: dict[str, LoRA] = {}
    for target, update in expert:
        where = f"experts[{position}]: {target}"
        plain = isinstance(update, LoRA) and update.bias is None and len(update.A.shape) == 2
        if not plain or target.stacked or target.rows or target.path in found:
            why = f"the update is {update.method}, but a router needs plain LoRA of a linear layer"
            raise Unsupported(why, where=where, cure="Convert the expert to plain LoRA first")
        found[target.path] = update.map(as_torch)  # type: ignore[assignment]
    return found


def _of_classifier(
    names: Callable[[], Sequence[str]], router: XLoRA, experts: Sequence[Pairs]
) -> dict[Target, tuple[Update, ...]]:
    """Place X-LoRA at all layers that an expert changes; the factors of experts that do not change a layer are 0."""
    logits, count = router.last.shape[0], len(experts)
    changed = {path for expert in experts for path in expert}
    paths = _in_order(names(), changed) if logits != count else sorted(changed)
    if logits not in (count, count * len(paths)):
        why = f"the router has {logits} logits, which do not fit {count} experts at {len(paths)} layers"
        raise ShapeMismatch(why, where="(model): xlora.last", cure="Pass all experts of the router, in its order")
    apart = logits != count
    return {
        Target(path): (router.replace(**_stacked(path, experts), place=position if apart else 0),)
        for position, path in enumerate(paths)
    }


def _in_order(names: Sequence[str], paths: set[str]) -> list[str]:
    """Sort paths by the order of the model's modules; a path may have a longer or shorter prefix than the module."""

    def position(path: str) -> int:
        fits = (at for at, n in enumerate(names) if n == path or n.endswith(f".{path}") or path.endswith(f".{n}"))
        return next(fits, len(names))

    exact = {name: at for at, name in enumerate(names)}
    return sorted(paths, key=lambda path: (exact.get(path, position(path)), path))


def _of_prototypes(target: Target, router: Update, experts: Sequence[Pairs]) -> Update:
    """Build Arrow at one layer: subtract the mean of the general experts, which come last, from the other experts."""
    assert isinstance(router, Arrow)
    tasks = router.tasks or len(experts) - router.general
    if tasks + router.general != len(experts) or router.top_k > tasks:
        why = f"{len(experts)} experts for a router with {tasks} task experts and {router.general} general ones"
        raise UsageError(why, where=f"{target}: arrow", cure="Pass all of them in experts=, task experts first")
    absent = next((position for position, expert in enumerate(experts) if target.path not in expert), None)
    if absent is not None:
        why = "the expert changes nothing at this target"
        raise TargetNotFound(why, where=f"experts[{absent}]: {target}", cure=_ALIKE)
    held = _stacked(target.path, experts, one_rank=True)
    A, B, strengths = (held[name] for name in ("A", "B", "strengths"))
    if router.general:
        A, B = (each[:tasks] - each[tasks:].mean(0) for each in (A, B))
    # B @ A without the scaling, because neither the sign nor the length of an expert's change matters here.
    prototypes = torch.stack([_prototype(*pair) for pair in zip(A, B, strict=True)])
    return router.replace(
        A=A, B=B, strengths=strengths[:tasks], prototypes=prototypes, idle_A=None, idle_B=None, scaling=1.0
    )


def _prototype(A: Tensor, B: Tensor) -> Tensor:
    """Return the first right singular vector of B @ A, computed from matrices of size rank x rank."""
    _, R = torch.linalg.qr(B.double())
    _, _, V = torch.linalg.svd(R @ A.double(), full_matrices=False)
    first: Tensor = V[0].to(A.dtype)
    return first


def _stacked(path: str, experts: Sequence[Pairs], *, one_rank: bool = False) -> dict[str, Tensor]:
    """Stack the experts' factors at a path; pad smaller and missing factors with zeros."""
    found = [expert.get(path) for expert in experts]
    present = [pair for pair in found if pair is not None]
    sizes = {(pair.A.shape[1], pair.B.shape[0]) for pair in present}
    ranks = {pair.A.shape[0] for pair in present}
    if len(sizes) > 1 or (one_rank and len(ranks) > 1):
        raise ShapeMismatch("the experts have different shapes or ranks", where=path, cure=_ALIKE)
    ((inputs, outputs),) = sizes
    A, B = (
        present[0].A.new_zeros(len(found), max(ranks), inputs),
        present[0].B.new_zeros(len(found), outputs, max(ranks)),
    )
    for position, pair in enumerate(found):
        if pair is not None:
            A[position, : len(pair.A)], B[position, :, : len(pair.A)] = pair.A, pair.B
    strengths = A.new_tensor([0.0 if pair is None else pair.scaling for pair in found])
    return {"A": A, "B": B, "strengths": strengths}


_ALIKE = "Pass experts of one configuration that were trained on this base"
