"""Experts: adapters of their own that a router's file names but does not hold, given to `inject` beside it.

Paths of experts in a file are words like any others: nothing follows them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

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
"""Path -> the LoRA there, of one expert, its tensors loaded."""


def with_experts(names: Callable[[], Sequence[str]], adapter: Adapter, experts: Sequence[Adapter]) -> Adapter:
    """The adapter with its experts in it, whose factors are stacked at each target.

    Args:
        names: tells the model's modules in their order.
        adapter: any; one that lacks nothing is returned as it is.
        experts: plain LoRA adapters, in the order of the router.

    Raises:
        UsageError: experts are missing, or there is nothing that lacks some.
        Unsupported: an expert is not plain LoRA, or there are other updates at the router's target.
        ShapeMismatch: experts do not go together, or not with the router.
        TargetNotFound: an expert changes nothing where the router needs it.
    """
    needy = [(target, update) for target, update in adapter if getattr(update, "lacks_experts", False)]
    if not needy:
        if experts:
            raise UsageError("no update of this adapter lacks experts", where="experts", cure="Leave experts= out")
        return adapter
    if not experts:
        cure = "Pass experts=, a list of their adapters, in the order of the router"
        why = "the experts that it routes to are adapters of their own"
        raise UsageError(why, where=f"{needy[0][0]}: {needy[0][1].method}", cure=cure)
    pairs = [_pairs(expert, position) for position, expert in enumerate(experts)]
    updates: dict[Target, tuple[Update, ...]] = {}
    for target, found in adapter.updates.items():
        if not any(getattr(update, "lacks_experts", False) for update in found):
            updates[target] = found
            continue
        router, *others = found
        if others:
            raise Unsupported("a router beside other updates", where=str(target), cure="Give each its own adapter")
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
            why = f"{update.method} where plain LoRA of a linear layer is needed"
            raise Unsupported(why, where=where, cure="Turn the expert into plain LoRA first")
        found[target.path] = update.map(as_torch)  # type: ignore[assignment]
    return found


def _of_classifier(
    names: Callable[[], Sequence[str]], router: XLoRA, experts: Sequence[Pairs]
) -> dict[Target, tuple[Update, ...]]:
    """X-LoRA at all layers that an expert changes; where one changes nothing its factors are 0."""
    logits, count = router.last.shape[0], len(experts)
    changed = {path for expert in experts for path in expert}
    paths = _in_order(names(), changed) if logits != count else sorted(changed)
    if logits not in (count, count * len(paths)):
        why = f"{logits} logits for {count} experts at {len(paths)} layers"
        raise ShapeMismatch(why, where="(model): xlora.last", cure="Pass its experts, all of them, in their order")
    apart = logits != count
    return {
        Target(path): (router.replace(**_stacked(path, experts), place=position if apart else 0),)
        for position, path in enumerate(paths)
    }


def _in_order(names: Sequence[str], paths: set[str]) -> list[str]:
    """The paths in the order of the model's modules; they may have a prefix more than those, or less."""

    def position(path: str) -> int:
        fits = (at for at, n in enumerate(names) if n == path or n.endswith(f".{path}") or path.endswith(f".{n}"))
        return next(fits, len(names))

    exact = {name: at for at, name in enumerate(names)}
    return sorted(paths, key=lambda path: (exact.get(path, position(path)), path))


def _of_prototypes(target: Target, router: Update, experts: Sequence[Pairs]) -> Update:
    """Arrow at one layer: the mean of the general experts, which come last, is taken off the others."""
    assert isinstance(router, Arrow)
    tasks = router.tasks or len(experts) - router.general
    if tasks + router.general != len(experts) or router.top_k > tasks:
        why = f"{len(experts)} experts, where it has {tasks} of tasks and {router.general} general ones"
        raise UsageError(why, where=f"{target}: arrow", cure="Pass all in experts=, those of tasks first")
    absent = next((position for position, expert in enumerate(experts) if target.path not in expert), None)
    if absent is not None:
        raise TargetNotFound("changes nothing there", where=f"experts[{absent}]: {target}", cure=_ALIKE)
    held = _stacked(target.path, experts, one_rank=True)
    A, B, strengths = (held[name] for name in ("A", "B", "strengths"))
    if router.general:
        A, B = (each[:tasks] - each[tasks:].mean(0) for each in (A, B))
    # Not scaled: the sign and the length of an expert's change do not matter here.
    prototypes = torch.stack([_prototype(*pair) for pair in zip(A, B, strict=True)])
    return router.replace(
        A=A, B=B, strengths=strengths[:tasks], prototypes=prototypes, idle_A=None, idle_B=None, scaling=1.0
    )


def _prototype(A: Tensor, B: Tensor) -> Tensor:
    """The first right singular vector of B @ A, out of matrices of the rank's size."""
    _, R = torch.linalg.qr(B.double())
    _, _, V = torch.linalg.svd(R @ A.double(), full_matrices=False)
    first: Tensor = V[0].to(A.dtype)
    return first


def _stacked(path: str, experts: Sequence[Pairs], *, one_rank: bool = False) -> dict[str, Any]:
    """The experts' factors at a path; smaller ones, and absent ones, filled up with zeros."""
    found = [expert.get(path) for expert in experts]
    present = [pair for pair in found if pair is not None]
    sizes = {(pair.A.shape[1], pair.B.shape[0]) for pair in present}
    ranks = {pair.A.shape[0] for pair in present}
    if len(sizes) > 1 or (one_rank and len(ranks) > 1):
        raise ShapeMismatch("experts of several shapes or ranks", where=path, cure=_ALIKE)
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


_ALIKE = "Pass experts that were made alike, for this base"
