"""Exports held against the torch model: on the example inputs, without an adapter and with each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import CheckFailed
from .oracle import told_by_reference
from .rounding import MOST_NOISE, TOLERANCE, difference_of, is_narrow, most_of_oracles
from .tracing import quiet

if TYPE_CHECKING:
    from torch import nn


NARROW_NOISE = 2.0
"""Two ways to round the same outputs in 16 bits are each as far from the truth as one of them."""

Run = tuple[Callable[[], AbstractContextManager[Any]], Path | None]
"""What attaches an adapter to the torch model, and its file for the graph's slots."""


def compared(
    model: nn.Module, examples: Sequence[Any], out: Path, runs: Mapping[str | None, Run], *,
    judged: bool = True,
) -> float:  # fmt: skip
    """The largest difference from torch, as a share of the largest output.

    Args:
        model: the torch model.
        examples: (positional, named) arguments.
        out: the graph.
        runs: what the graph is run with, by the adapter's name.
        judged: whether a difference is an error.

    Raises:
        CheckFailed: they differ by more than rounding.
    """
    from .session import Session

    session, worst = Session(out), 0.0
    for name, (attached, file) in runs.items():
        if file is not None and name is not None:
            session.load(name, file)
        with attached():
            wanted = [outputs_of(model, args, kwargs) for args, kwargs in examples]
            got = [told_by(session, example, name if file is not None else None) for example in examples]
            differences = [difference_of(one, other) for one, other in zip(got, wanted, strict=True)]
            most = [_most(model, example, one) for example, one in zip(examples, wanted, strict=True)]
        worst = max(worst, *differences)
        if judged:
            for difference, allowed in zip(differences, most, strict=True):
                _judge(difference, allowed, out, name)
    return worst


def compared_packed(packed: Path, plain: Path, examples: Sequence[Any]) -> float:
    """The largest difference of a graph with packed weights from one with the numbers that these stand for.

    Raises:
        CheckFailed: they differ by more than rounding.
    """
    from .session import Session

    one, other, worst = Session(packed), Session(plain), 0.0
    for example in examples:
        got, wanted = told_by(one, example), told_by(other, example)
        worst = max(worst, difference_of(got, wanted))
        _judge(worst, most_of_oracles(got), packed, None)
    return worst


def by_reference(out: Path, example: Any) -> float | None:
    """The largest difference of ONNX's reference implementation from onnxruntime; None where it cannot run."""
    from .session import Session

    session = Session(out)
    told = told_by_reference(out, dict(zip(session.inputs, _numbers(example), strict=True)))
    return None if told is None else difference_of(told, told_by(session, example))


def told_by(session: Any, example: Any, adapter: str | None = None) -> list[Any]:
    """The outputs of a session for a torch model's arguments."""
    return list(session.run(dict(zip(session.inputs, _numbers(example), strict=True)), adapter).values())


def _most(model: nn.Module, example: Any, wanted: Sequence[Any]) -> float:
    """The largest difference that rounding explains: of outputs in 16 bits, twice what torch's own rounding makes.

    A model with a few large activations loses much of its precision in 16 bits, whichever way it is run.
    """
    if not is_narrow(wanted):
        return MOST_NOISE
    args, kwargs = example
    with in_float32(model):
        exact = outputs_of(model, *_widened((args, kwargs)))
    return max(TOLERANCE["V"], NARROW_NOISE * difference_of(wanted, exact))


@contextmanager
def in_float32(model: nn.Module) -> Iterator[None]:
    """The model with its numbers in float32, which says those of 16 bits exactly; afterwards it is as it was."""
    import torch

    narrow = (torch.float16, torch.bfloat16)
    held = [tensor for tensor in (*model.parameters(), *model.buffers()) if tensor.dtype in narrow]
    before = [tensor.data for tensor in held]
    try:
        for tensor in held:
            tensor.data = tensor.data.float()
        yield
    finally:
        for tensor, own in zip(held, before, strict=True):
            tensor.data = own


def _widened(tree: Any) -> Any:
    import torch
    from torch.utils._pytree import tree_map

    def wide(leaf: Any) -> Any:
        return leaf.float() if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() else leaf

    return tree_map(wide, tree)


def _judge(difference: float, most: float, out: Path, name: str | None) -> None:
    if difference <= most:
        return
    why = f"the graph differs by {difference:.3g} of its largest output from the torch model"
    raise CheckFailed(why, path=out, where=name, cure=_CURE)


def outputs_of(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """The tensors that a torch model returns, as arrays."""
    import torch

    with torch.no_grad(), quiet():
        return _numbers(model(*args, **kwargs))


def _numbers(tree: Any) -> list[Any]:
    """The tensors in it, as arrays, in the order in which torch flattens it."""
    import torch
    from torch.utils._pytree import tree_leaves

    leaves = [leaf.detach().cpu() for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
    return [_array(leaf) for leaf in leaves]


def _array(leaf: Any) -> Any:
    import ml_dtypes
    import torch

    if leaf.dtype != torch.bfloat16:
        return np.asarray(leaf)
    return leaf.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)


_CURE = "Report this; with check off the file is kept"
