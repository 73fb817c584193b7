"""Trace the recurrences of state space models and linear attention as ONNX `Scan`, for any number of tokens.

In transformers, a layer with a recurrence has two branches. The branch for one token continues the layer's state. The
branch for a sequence calls a sequence kernel: a function that loops in Python, over tokens or over chunks of tokens.
torch cannot trace this loop for a dynamic number of tokens. Some sequence kernels also ignore the state of earlier
tokens, and always begin with an empty state.

This module replaces each sequence kernel by a `Scan` over the tokens. The body of the `Scan` processes a single token
by calling one of the model's own kernels. The `Scan` begins with the layer's state, so the same graph can run a prompt,
a single token, or several tokens after a past. All projections stay outside of the `Scan`, as matrix products over all
tokens.

Sequence kernels are recognized by the names of their parameters. All architectures of transformers use the parameter
names of the packages mamba-ssm and flash-linear-attention.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from .pretrained_types import PretrainedModel

    Kernel = Callable[..., Any]

SELECTIVE = frozenset({"hidden_states", "dt", "A", "B", "C", "delta_bias", "return_last_state"})
"""Parameters of `selective_scan_fn` of mamba-ssm. This kernel has no parameter for the initial state."""

STEP = frozenset({"state", "hidden_states", "dt", "A", "B", "C", "dt_bias", "dt_softplus"})
"""Parameters of `selective_state_update` of mamba-ssm, which runs one token and writes to `state`."""

CHUNKED = frozenset({"hidden_states", "dt", "A", "B", "C", "chunk_size", "initial_states", "return_final_states"})
"""Parameters of `mamba_chunk_scan_combined` of mamba-ssm (Mamba 2)."""

DELTA = frozenset({"query", "key", "value", "g", "beta", "chunk_size", "initial_state", "output_final_state"})
"""Parameters of `chunk_gated_delta_rule` and `chunk_kda` of flash-linear-attention."""

SSM, RECURRENT = "ssm", "recurrent"
"""The two kinds of state: the state of a state space model, and the state of any other recurrence. If an input
or output of the graph is the state of a recurrence, its name contains one of these words."""


@dataclass
class LastState:
    """The state that the current layer read from the cache.

    The state is stored here because transformers does not pass it to the kernels that have the parameters `SELECTIVE`.

    Attributes:
        state: the state; None if the cache has no state for the layer.
        calls: how many times a kernel has used this state. Some layers call the kernel once for each head.
    """

    state: Tensor | None = None
    calls: int = 0

    def read(self, state: Tensor | None) -> None:
        """Store the state that a layer has read. The next calls of a kernel begin with this state."""
        self.state, self.calls = state, 0

    def next(self, like: Tensor) -> Tensor:
        """Return the initial state for the next call of a kernel: the whole state, or the slice for one head.

        If there is no state, return zeros in the shape of `like`.
        """
        import torch

        state, at = self.state, self.calls
        self.calls += 1
        if state is None:
            return torch.zeros_like(like)
        return state if state.ndim == like.ndim else state[:, at]


def kernels_of(model: PretrainedModel) -> Iterator[tuple[ModuleType, str, str]]:
    """Find the sequence kernels in the Python modules that define a model's classes.

    Yields:
        the Python module, the kernel's name in this module, and the kind of its state (`SSM` or `RECURRENT`).
    """
    modules = {type(part).__module__: sys.modules[type(part).__module__] for part in model.modules()}
    for module in modules.values():
        for name, kernel in list(vars(module).items()):
            if not inspect.isfunction(kernel):
                continue
            parameters = {*inspect.signature(inspect.unwrap(kernel)).parameters}
            if parameters >= SELECTIVE or parameters >= CHUNKED:
                yield module, name, SSM
            elif parameters >= DELTA:
                yield module, name, RECURRENT


@contextmanager
def as_scans(model: PretrainedModel, last: LastState) -> Iterator[None]:
    """Inside the `with` block, replace a model's sequence kernels by functions that torch exports as a `Scan`.

    Args:
        model: the model. The kernels are replaced in the Python modules of its classes.
        last: the object in which the caller stores each state that a layer reads from the cache.
    """
    replaced: list[tuple[ModuleType, str, Kernel]] = []
    try:
        for module, name, _ in list(kernels_of(model)):
            kernel = getattr(module, name)
            replaced.append((module, name, kernel))
            setattr(module, name, _scanned(module, kernel, last))
        yield
    finally:
        for module, name, kernel in replaced:
            setattr(module, name, kernel)


def _scanned(module: ModuleType, kernel: Kernel, last: LastState) -> Kernel:
    parameters = {*inspect.signature(inspect.unwrap(kernel)).parameters}
    if parameters >= SELECTIVE:
        step = next(
            value for value in vars(module).values()
            if inspect.isfunction(value) and {*inspect.signature(inspect.unwrap(value)).parameters} >= STEP
        )  # fmt: skip
        return _selective(kernel, step, last)
    return _chunked(kernel) if parameters >= CHUNKED else _delta(kernel)


def _selective(kernel: Kernel, step: Kernel, last: LastState) -> Kernel:
    @functools.wraps(kernel)
    def scanned(
        hidden_states: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None,
        z: Tensor | None = None, delta_bias: Tensor | None = None, delta_softplus: bool = False,
        return_last_state: bool = False, **_: object,
    ) -> Any:  # fmt: skip
        state = last.next(hidden_states.new_zeros(hidden_states.shape[0], A.shape[0], A.shape[1]))

        def body(state: Tensor, columns: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
            x, dt, B, C, *rest = columns
            new = whole(state)  # Copy the state, because the kernel writes to its argument.
            gate = rest[0] if rest else None
            y = step(new, x, dt, A, B, C, D, z=gate, dt_bias=delta_bias, dt_softplus=delta_softplus)
            return new, whole(y)

        columns = (hidden_states, dt, B, C, *(() if z is None else (z,)))
        final, outputs = _scan(body, state, columns, 2)
        return (outputs, final) if return_last_state else outputs

    return scanned


def _chunked(kernel: Kernel) -> Kernel:
    @functools.wraps(kernel)
    def scanned(
        hidden_states: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk_size: int, D: Tensor | None = None,
        initial_states: Tensor | None = None, return_final_states: bool = False, **more: Any,
    ) -> Any:  # fmt: skip
        if not _is_exporting():
            return kernel(
                hidden_states, dt, A, B, C, chunk_size, D=D, initial_states=initial_states,
                return_final_states=return_final_states, **more,
            )  # fmt: skip
        batch, _, heads, width = hidden_states.shape
        state = hidden_states.new_zeros(batch, heads, width, B.shape[-1]) if initial_states is None else initial_states

        def body(state: Tensor, columns: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
            x, dt, B, C = (column[:, None] for column in columns)
            y, new = kernel(x, dt, A, B, C, 1, D=D, initial_states=state, return_final_states=True, **more)
            return whole(new), whole(y[:, 0])

        final, outputs = _scan(body, state.float(), (hidden_states, dt, B, C), 1)
        return (outputs, final) if return_final_states else outputs

    return scanned


def _delta(kernel: Kernel) -> Kernel:
    @functools.wraps(kernel)
    def scanned(
        query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor, chunk_size: int = 64,
        initial_state: Tensor | None = None, output_final_state: bool = False, **more: Any,
    ) -> Any:  # fmt: skip
        if not _is_exporting():
            return kernel(
                query, key, value, g=g, beta=beta, chunk_size=chunk_size, initial_state=initial_state,
                output_final_state=output_final_state, **more,
            )  # fmt: skip
        shape = (value.shape[0], value.shape[2], key.shape[-1], value.shape[-1])
        state = value.new_zeros(*shape) if initial_state is None else initial_state

        def body(state: Tensor, columns: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
            query, key, value, g, beta = (column[:, None] for column in columns)
            y, new = kernel(
                query, key, value, g=g, beta=beta, chunk_size=1, initial_state=state, output_final_state=True, **more
            )
            return whole(new), whole(y[:, 0])

        final, outputs = _scan(body, state.float(), (query, key, value, g, beta), 1)
        return outputs, final if output_final_state else None

    return scanned


def whole(tensor: Tensor) -> Tensor:
    """Return a contiguous copy. torch's `scan` requires a state to have the same strides before and after a step."""
    import torch

    return tensor.clone(memory_format=torch.contiguous_format)


def _is_exporting() -> bool:
    import torch

    # Outside of an export, `_chunked` and `_delta` run transformers' own kernels, so that the check compares the graph
    # with these kernels. `_selective` cannot do this, because the original kernel begins with an empty state.
    return torch.compiler.is_exporting()


def _scan(
    body: Callable[[Tensor, tuple[Tensor, ...]], tuple[Tensor, Tensor]], state: Tensor, columns: tuple[Tensor, ...],
    axis: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Call `body` for each index on `axis` of `columns`; return the last state, and the outputs stacked on `axis`."""
    import torch
    from torch._higher_order_ops.scan import scan

    first, state = tuple(column.movedim(axis, 0) for column in columns), whole(state)
    if _is_exporting():
        state, outputs = scan(body, state, first, dim=0)
        return state, outputs.movedim(0, axis)
    each = []
    for at in range(len(first[0])):
        state, output = body(state, tuple(column[at] for column in first))
        each.append(output)
    return state, torch.stack(each, axis)
