"""Exports held against the torch model: on the example inputs, without an adapter and with each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import CheckFailed
from .checking import MOST_NOISE, TOLERANCE, difference_of
from .oracle import told_by_reference
from .tracing import quiet

if TYPE_CHECKING:
    from torch import nn


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
        for example, told in zip(examples, wanted, strict=True):
            got = told_by(session, example, name if file is not None else None)
            worst = max(worst, difference_of(got, told))
            if judged:
                _judge(worst, got, out, name)
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
        _judge(worst, got, packed, None)
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


def _judge(worst: float, got: Sequence[Any], out: Path, name: str | None) -> None:
    narrow = any(array.dtype.kind in "fV" and array.dtype.itemsize < 4 for array in got)
    if worst <= (TOLERANCE["V"] if narrow else MOST_NOISE):
        return
    why = f"the graph differs by {worst:.3g} of its largest output from the torch model"
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
