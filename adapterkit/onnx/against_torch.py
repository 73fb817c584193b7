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
"""16-bit outputs of the graph may differ from torch's outputs by this many times torch's own rounding error. The factor
is above 1 because the graph rounds too."""

Tree = TypeVar("Tree")

Example = tuple[Sequence[object], Mapping[str, object]]
"""The positional arguments and the keyword arguments of one call of a torch model."""

Run = tuple[Callable[[], AbstractContextManager[object]], Path | None]
"""A function, and the path of an adapter file. The function returns a context in which the adapter is attached to the
torch model. The file is loaded into the graph's slots; if the path is None, no file is loaded."""


def compared(
    model: nn.Module, examples: Sequence[Example], out: Path, session: Session, runs: Mapping[str | None, Run], *,
    judged: bool = True,
) -> float:  # fmt: skip
    """Return the largest difference between the graph and torch, relative to the largest output.

    Args:
        model: the torch model.
        examples: the arguments of each call.
        out: the path of the graph.
        session: a session of the graph. The adapters that are loaded for the comparison stay loaded.
        runs: a map from each adapter's name to its `Run`; the key None is the run without an adapter.
        judged: True to raise an error if the difference is too large. False to return the difference in any case.

    Raises:
        CheckFailed: the difference is larger than rounding can explain.
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
        CheckFailed: the difference is larger than rounding can explain.
    """
    from .session import Session

    one, other, worst = Session(packed), Session(plain), 0.0
    for example in examples:
        got, wanted = session_outputs(one, example), session_outputs(other, example)
        worst = max(worst, difference_of(got, wanted))
        _judge(worst, most_of_oracles(got), packed, None)
    return worst


def by_reference(out: Path, session: Session, example: Example) -> float | None:
    """Return the largest difference between onnxruntime's outputs and those of ONNX's reference implementation.

    Returns:
        None if the reference implementation cannot run the graph.
    """
    expected = reference_outputs(out, dict(zip(session.inputs, _numbers(example), strict=True)))
    return None if expected is None else difference_of(expected, session_outputs(session, example))


def session_outputs(session: Session, example: Example, adapter: str | None = None) -> list[Array]:
    """Run a graph on the arguments of a torch model's call, and return the graph's outputs."""
    return list(session.run(dict(zip(session.inputs, _numbers(example), strict=True)), adapter).values())


def _most(model: nn.Module, example: Example, wanted: Sequence[Array]) -> float:
    """Return the largest difference that rounding can cause, relative to the largest output.

    For 16-bit outputs, compare torch's outputs with those of a run in float32, and allow `NARROW_NOISE` times their
    difference. A fixed limit would be wrong for some models: a model with a few large activations loses much precision
    in 16 bits, in any runtime.
    """
    if not is_narrow(wanted):
        return MOST_NOISE
    args, kwargs = example
    with in_float32(model):
        exact = outputs_of(model, *_widened((args, kwargs)))
    return max(TOLERANCE["V"], NARROW_NOISE * difference_of(wanted, exact))


@contextmanager
def in_float32(model: nn.Module) -> Iterator[None]:
    """Convert the model's 16-bit tensors to float32, which changes no value; restore the 16-bit tensors at the end."""
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
    why = (
        "the graph's outputs differ from the torch model's outputs (or, if the graph is quantized, from the outputs of "
        f"its dequantized copy) by {difference:.3g} times the largest output value"
    )
    raise CheckFailed(why, path=out, where=name, cure=_CURE)


def outputs_of(model: nn.Module, args: Sequence[object], kwargs: Mapping[str, object]) -> list[Array]:
    """Run a torch model, and return its output tensors as arrays."""
    import torch

    with torch.no_grad(), quiet():
        return _numbers(model(*args, **kwargs))


def _numbers(tree: object) -> list[Array]:
    """Return the tensors in a nested value as arrays, in the order in which torch flattens the nested value."""
    import torch
    from torch.utils._pytree import tree_leaves

    leaves = [leaf.detach().cpu() for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
    return [_array(leaf) for leaf in leaves]


def _array(leaf: Tensor) -> Array:
    import ml_dtypes
    import torch

    # torch cannot convert bfloat16 to numpy, so view the bits as int16, and then as ml_dtypes' bfloat16.
    if leaf.dtype != torch.bfloat16:
        return np.asarray(leaf)
    return leaf.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)


_CURE = "Report this bug. To keep the file, turn the check off: --no-check (check=False)"
