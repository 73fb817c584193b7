"""Compare an exported graph with its torch model on example inputs, without an adapter and with each adapter."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from ..errors import CheckFailed
from .building import Array
from .checking import MOST_NOISE, TOLERANCE, difference_of, is_narrow, most_of_oracles, reference_outputs
from .tracing import quiet

if TYPE_CHECKING:
    from torch import Tensor, nn

    from .session import Session


NARROW_NOISE = 2.0
"""For 16-bit outputs, the graph may differ from torch by this multiple of torch's own rounding error, because both the
graph and torch round."""

Tree = TypeVar("Tree")

Example = tuple[Sequence[object], Mapping[str, object]]
"""Positional and named arguments of a torch model."""

Run = tuple[Callable[[], AbstractContextManager[object]], Path | None]
"""A function that attaches an adapter to the torch model, and the adapter file for the graph's slots (None if the graph
has no slots)."""


def compared(
    model: nn.Module, examples: Sequence[Example], out: Path, session: Session, runs: Mapping[str | None, Run], *,
    judged: bool = True,
) -> float:  # fmt: skip
    """Return the largest difference between the graph and torch, relative to the largest output.

    Args:
        model: the torch model.
        examples: pairs of positional and named arguments.
        out: the path of the graph.
        session: a session of the graph; the loaded adapters stay loaded.
        runs: a map from each adapter's name to its `Run`; the key None is the run without an adapter.
        judged: False to return the difference even if it is too large, instead of raising an error.

    Raises:
        CheckFailed: the difference is larger than rounding explains.
    """
    worst = 0.0
    for name, (attached, file) in runs.items():
        if file is not None and name is not None:
            session.load(name, file)
        with attached():
            wanted = [outputs_of(model, args, kwargs) for args, kwargs in examples]
            got = [session_outputs(session, example, name if file is not None else None) for example in examples]
            differences = [difference_of(one, other) for one, other in zip(got, wanted, strict=True)]
            most = [_most(model, example, one) for example, one in zip(examples, wanted, strict=True)]
        worst = max(worst, *differences)
        if judged:
            for difference, allowed in zip(differences, most, strict=True):
                _judge(difference, allowed, out, name)
    return worst


def compared_packed(packed: Path, plain: Path, examples: Sequence[Example]) -> float:
    """Return the largest difference between a graph with packed weights and the same graph with dequantized weights.

    Raises:
        CheckFailed: the difference is larger than rounding explains.
    """
    from .session import Session

    one, other, worst = Session(packed), Session(plain), 0.0
    for example in examples:
        got, wanted = session_outputs(one, example), session_outputs(other, example)
        worst = max(worst, difference_of(got, wanted))
        _judge(worst, most_of_oracles(got), packed, None)
    return worst


def by_reference(out: Path, session: Session, example: Example) -> float | None:
    """Return the largest difference between onnxruntime and ONNX's reference; None if that cannot run the graph."""
    expected = reference_outputs(out, dict(zip(session.inputs, _numbers(example), strict=True)))
    return None if expected is None else difference_of(expected, session_outputs(session, example))


def session_outputs(session: Session, example: Example, adapter: str | None = None) -> list[Array]:
    """Run the session on a torch model's arguments, and return the outputs."""
    return list(session.run(dict(zip(session.inputs, _numbers(example), strict=True)), adapter).values())


def _most(model: nn.Module, example: Example, wanted: Sequence[Array]) -> float:
    """Return the largest difference that rounding can cause: for 16-bit outputs, twice torch's rounding error.

    Torch's error is measured for each model: a model with a few large activations loses much precision in 16 bits, in
    any runtime.
    """
    if not is_narrow(wanted):
        return MOST_NOISE
    args, kwargs = example
    with in_float32(model):
        exact = outputs_of(model, *_widened((args, kwargs)))
    return max(TOLERANCE["V"], NARROW_NOISE * difference_of(wanted, exact))


@contextmanager
def in_float32(model: nn.Module) -> Iterator[None]:
    """Convert the model's tensors to float32, which represents 16-bit values exactly; restore them after the block."""
    import torch

    narrow = (torch.float16, torch.bfloat16)
    narrow_tensors = [tensor for tensor in (*model.parameters(), *model.buffers()) if tensor.dtype in narrow]
    before = [tensor.data for tensor in narrow_tensors]
    try:
        for tensor in narrow_tensors:
            tensor.data = tensor.data.float()
        yield
    finally:
        for tensor, data in zip(narrow_tensors, before, strict=True):
            tensor.data = data


def _widened(tree: Tree) -> Tree:
    import torch
    from torch.utils._pytree import tree_map

    def wide(leaf: object) -> object:
        return leaf.float() if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() else leaf

    widened: Tree = tree_map(wide, tree)
    return widened


def _judge(difference: float, most: float, out: Path, name: str | None) -> None:
    if difference <= most:
        return
    why = f"the graph's outputs differ from the torch model's by {difference:.3g} times the largest output value"
    raise CheckFailed(why, path=out, where=name, cure=_CURE)


def outputs_of(model: nn.Module, args: Sequence[object], kwargs: Mapping[str, object]) -> list[Array]:
    """Run a torch model, and return its output tensors as arrays."""
    import torch

    with torch.no_grad(), quiet():
        return _numbers(model(*args, **kwargs))


def _numbers(tree: object) -> list[Array]:
    """Return the tensors in a nested value, as arrays, in the order in which torch flattens it."""
    import torch
    from torch.utils._pytree import tree_leaves

    leaves = [leaf.detach().cpu() for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
    return [_array(leaf) for leaf in leaves]


def _array(leaf: Tensor) -> Array:
    import ml_dtypes
    import torch

    # numpy has no bfloat16, so pass the bits through int16.
    if leaf.dtype != torch.bfloat16:
        return np.asarray(leaf)
    return leaf.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)


_CURE = "Report this. To keep the file, turn the check off: --no-check (check=False)"
