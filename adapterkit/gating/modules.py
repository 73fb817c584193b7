"""Module by module: where a merged model first computes something else than the base with adapters.

While the base with adapters runs, each module with weights of its own is run three times on the very same input: with
adapters, without, and as the merged model has it. So an early fault does not hide behind what it does to later
modules, and the part of the change that is there shows as a plain number at each of them.

A module whose difference is too large is looked at once more by its weights: what rounding to the dtype of the merged
model does to a weak change is no fault.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from ..errors import AdapterkitError
from .result import ModulePart

if TYPE_CHECKING:
    from torch import Tensor

    from ..torch.handle import Handle

NOISE = 1e-5
"""Relative difference of two outputs in float32 below which they are the same."""

GRAIN = {"F32": 2.0**-23, "F64": 2.0**-23, "F16": 2.0**-10, "BF16": 2.0**-7}
"""Stored dtype -> one step of it, relative to a number."""

ALIKE = 0.9
"""Cosine from which one change is another one."""

QUANTIZED = "quantized"
"""The stored dtype of packed weights."""

UNCHANGED = 0.1
"""Share of the change below which nothing of it is there."""

RESIDUE = 0.2
"""Part of a change that may lie across its direction where it is called a multiple."""

BROKEN = ("has a ", "has no ", "holds numbers that are not finite")
"""How faults of weights begin that cannot be compared with others."""

CERTAIN = 5.0
"""Standard errors of what rounding to a coarse grid adds to the part of a change, beyond which it is a fault."""

OTHER = 0.5
"""Error of quantized weights, relative to their size, from which they are other weights: of 2 bits it is a third."""

MOST_COMPARED = 64
"""Faulty weights whose changes are held against one another."""


@dataclass(slots=True)
class ModuleSums:
    """Squared sizes and products of one module's outputs, summed over inputs."""

    size: float = 0.0
    asked: float = 0.0
    there: float = 0.0
    product: float = 0.0
    apart: float = 0.0
    finite: bool = True
    why: str = ""

    def add(self, base: Tensor, adapted: Tensor, other: Tensor) -> None:
        """Add the outputs of one call."""
        if adapted.shape != other.shape:
            self.why = f"gives {list(other.shape)} where {list(adapted.shape)} belongs"
            return
        b, a, o = base.double(), adapted.double(), other.double()
        if bool(a.isfinite().all()) and not bool(o.isfinite().all()):
            self.finite = False
            return
        asked, there = a - b, o - b
        self.size += float((a * a).sum())
        self.asked += float((asked * asked).sum())
        self.there += float((there * there).sum())
        self.product += float((asked * there).sum())
        self.apart += float(((a - o) ** 2).sum())


@dataclass
class ModuleComparison:
    """All modules of two models of one class.

    Attributes:
        sums: module -> its sums, in the order in which they ran.
        missing: modules that the merged model has not.
        idle: modules with weights that no input reached.
    """

    sums: dict[str, ModuleSums] = field(default_factory=dict)
    missing: tuple[str, ...] = ()
    idle: tuple[str, ...] = ()


class Watched:
    """Compares a merged model's modules while the base with adapters runs."""

    def __init__(self, model: Any, other: Any, handles: Sequence[Handle]) -> None:
        self.other, self.handles, self.on = dict(other.named_modules()), handles, False
        self.names = [
            name for name, module in model.named_modules() if any(True for _ in _own(module)) and name in self.other
        ]
        held = [name for name, module in model.named_modules() if any(True for _ in _own(module))]
        self.missing = tuple(name for name in held if name not in self.other)
        self.sums: dict[str, ModuleSums] = {}
        self.hooks = [
            model.get_submodule(name).register_forward_hook(self._hook(name), with_kwargs=True) for name in self.names
        ]

    @contextmanager
    def looking(self) -> Iterator[None]:
        """Compare the modules of the forwards in the body, which must be of the base with adapters."""
        self.on = True
        try:
            yield
        finally:
            self.on = False

    def close(self) -> ModuleComparison:
        """Take the hooks off, and return what was seen."""
        for hook in self.hooks:
            hook.remove()
        return ModuleComparison(self.sums, self.missing, tuple(name for name in self.names if name not in self.sums))

    def _hook(self, name: str) -> Any:
        def compare(module: Any, args: Any, kwargs: Any, adapted: Any) -> None:
            if not self.on:
                return
            self.on = False  # Running a module again calls its hooks again.
            try:
                with ExitStack() as off:
                    for handle in self.handles:
                        off.enter_context(handle.disable())
                    base = module(*args, **kwargs)
                self._add(name, base, adapted, args, kwargs)
            finally:
                self.on = True

        return compare

    def _add(self, name: str, base: Any, adapted: object, args: Any, kwargs: Any) -> None:
        sums = self.sums.setdefault(name, ModuleSums())
        try:
            other = self.other[name](*args, **kwargs)
        except (RuntimeError, IndexError, ValueError) as error:  # Sizes that do not fit.
            sums.why = f"cannot be run on the same input ({str(error).strip().splitlines()[0]})"
            return
        for three in zip(_floats(base), _floats(adapted), _floats(other), strict=False):
            sums.add(*three)


def _own(module: Any) -> Iterator[Any]:
    """A module's own parameters and floating buffers, those of its children left out."""
    yield from (p for p in module._parameters.values() if p is not None)
    yield from (b for b in module._buffers.values() if b is not None and b.is_floating_point())


def _floats(output: Any) -> Iterator[Tensor]:
    if hasattr(output, "is_floating_point"):
        if output.is_floating_point():
            yield output
    elif isinstance(output, Mapping):
        for each in output.values():
            yield from _floats(each)
    elif isinstance(output, (tuple, list)):
        for each in output:
            yield from _floats(each)


def scale_of(comparison: ModuleComparison) -> float | None:
    """Part of the change that is there, over all modules, each by the size of its change."""
    asked = math.fsum(sums.asked for sums in comparison.sums.values())
    return math.fsum(sums.product for sums in comparison.sums.values()) / asked if asked else None


def judged(
    comparison: ModuleComparison, model: Any, other: Any, handles: Sequence[Handle], *, dtype: str, coarse: float,
    max_scale_error: float, max_part_error: float,
) -> tuple[ModulePart, ...]:  # fmt: skip
    """Return what is wrong at which module. This folds the adapters into the model's weights.

    Args:
        comparison: what was seen while the models ran.
        model: the base with adapters.
        other: the merged model.
        handles: the adapters; they are merged afterwards.
        dtype: the stored dtype of the merged model, or `quantized`.
        coarse: the relative step of the dtype in which both were computed.
        max_scale_error: see `Thresholds`.
        max_part_error: see `Thresholds`.
    """
    parts = {name: _part(name, sums) for name, sums in comparison.sums.items()}
    quantized = dtype == QUANTIZED
    grain = max(GRAIN.get(dtype, GRAIN["BF16"]), coarse)
    suspects = []
    for name, part in parts.items():
        far = part.touched and (abs((part.scale or 0.0) - 1) > max_scale_error or part.error > max_part_error)
        moved = not part.touched and part.error > max(2 * grain, NOISE)
        # A coarse grid moves every module: what is a fault of it, the weights tell.
        if quantized or far or moved or _plain_fault(comparison.sums[name]):
            suspects.append(name)
    # Tokens reach only some experts of a stack, so stacks are always looked at by their weights.
    stacks = [name for name in parts if name not in suspects and _is_stack(model.get_submodule(name))]
    weights = SuspectWeights(model, other, [*suspects, *stacks, *comparison.idle], dtype)
    weights.fold(handles)
    found: dict[str, ModulePart] = {}
    for name in [*parts, *comparison.idle]:
        part = parts.get(name) or ModulePart(name, False, None, 0.0, True)
        found[name] = part
        if name in weights.names:
            found[name] = weights.judged(part, name in suspects, max_scale_error, max_part_error)
        plain = _plain_fault(comparison.sums[name]) if name in parts else ""
        if plain and not found[name].fault.startswith(BROKEN):  # A weight that is broken says more than its output.
            found[name] = replace(part, fault=plain)
    lost = [ModulePart(name, False, None, 1.0, True, "is missing") for name in comparison.missing]
    return (*found.values(), *lost)


def _plain_fault(sums: ModuleSums) -> str:
    return "gives numbers that are not finite" if not sums.finite else sums.why


def _is_stack(module: Any) -> bool:
    return any(p is not None and p.ndim == 3 for p in module._parameters.values()) and not hasattr(module, "stride")


def _part(name: str, sums: ModuleSums) -> ModulePart:
    touched = sums.asked > (NOISE**2) * sums.size
    if touched:
        return ModulePart(
            name, True, sums.product / sums.asked, math.sqrt(sums.apart / sums.asked), sums.finite,
        )  # fmt: skip
    error = math.sqrt(sums.apart / sums.size) if sums.size else float(sums.apart > 0)
    return ModulePart(name, False, None, error, sums.finite)


def named_scale(scale: float, residue: float) -> str:
    """Say what a change is that lies along the right one, or that it does not."""
    if residue > RESIDUE * max(abs(scale), 1.0) and residue > RESIDUE:
        return "holds another change"
    if abs(scale) < UNCHANGED:
        return "holds nothing of the change"
    if scale < 0:
        return f"holds the change with its sign turned (scale {scale:.2g})"
    return f"holds {scale:.3g} times the change"


@dataclass(slots=True, eq=False)
class _Held:
    """One parameter before the adapters are folded in."""

    module: str
    name: str
    before: Tensor


class SuspectWeights:
    """The weights of suspected modules: of the base, of the base with adapters folded in, and of the merged model."""

    def __init__(self, model: Any, other: Any, names: Sequence[str], dtype: str) -> None:
        self.model, self.other, self.names, self.dtype = model, dict(other.named_parameters()), {*names}, dtype
        self.held: list[_Held] = []
        self.why = ""
        for name in dict.fromkeys(names):
            for leaf, parameter in model.get_submodule(name)._parameters.items():
                if parameter is not None:
                    self.held.append(_Held(name, f"{name}.{leaf}" if name else leaf, parameter.detach().clone()))
        self.changes: dict[str, Tensor] = {}

    def fold(self, handles: Sequence[Handle]) -> None:
        """Fold the adapters into the base; where that is impossible, only outputs are judged."""
        if not self.held:
            return
        try:
            for handle in handles:
                handle.merge_()
        except AdapterkitError as error:
            self.why = error.why
            return
        after = dict(self.model.named_parameters())
        self.changes = {each.name: after[each.name].detach() - each.before for each in self.held}

    def judged(self, part: ModulePart, suspected: bool, max_scale_error: float, max_part_error: float) -> ModulePart:
        """Return a module with its fault; none where rounding explains the difference."""
        worst, same, along = "", True, list[tuple[float, float]]()
        touched = part.touched
        for each in (held for held in self.held if held.module == part.module and not self.why):
            found = self._weight(each, max_scale_error, max_part_error)
            same = same and found.same
            touched = touched or found.scale is not None
            if found.fault:
                worst = worst or found.fault
                if found.scale is not None:
                    along.append((found.scale, found.error))
        if worst:
            scale, error = max(along, key=lambda pair: pair[1], default=(part.scale, part.error))
            return replace(part, touched=touched, fault=worst, scale=scale, error=error)
        if not suspected:
            return part
        if self.dtype == QUANTIZED:
            return replace(part, rounded=not same)
        if self.why or not self.changes:
            return replace(part, fault=_by_output(part))
        if same and part.error > 10 * NOISE:
            return replace(part, fault="computes something else with the same weights: the configs differ")
        return replace(part, rounded=True)

    def _weight(self, held: _Held, max_scale_error: float, max_part_error: float) -> _WeightFound:
        there, delta = self.other.get(held.name), self.changes[held.name].double()
        if there is None:
            return _WeightFound(f"has no {held.name.rpartition('.')[2]}", None, 1.0, False)
        if there.shape != held.before.shape:
            return _WeightFound(
                f"has a {held.name.rpartition('.')[2]} of {list(there.shape)} where {list(held.before.shape)} belongs",
                None, 1.0, False,
            )  # fmt: skip
        before = held.before.double()
        wanted, got = before + delta, there.detach().double()
        if not bool(got.isfinite().all()):
            return _WeightFound("holds numbers that are not finite", None, math.inf, False)
        if self.dtype == QUANTIZED:
            return self._packed(held, before, delta, got, max_scale_error)
        rounded = wanted.to(_kind(self.dtype)).double()
        size, apart = float(delta.norm()), float((got - wanted).norm())
        grain = float((rounded - wanted).norm())
        same = apart <= 1e-6 * float(wanted.norm())
        if size <= 1e-6 * float(before.norm()):
            if apart <= 2 * grain + 1e-6 * float(wanted.norm()):
                return _WeightFound("", None, 0.0, same)
            return _WeightFound(
                "holds other weights than the base", None, apart / max(float(wanted.norm()), 1e-30), False
            )
        scale = float(((got - before) * delta).sum()) / size**2
        ideal = float(((rounded - before) * delta).sum()) / size**2
        ok = abs(scale - ideal) <= max_scale_error and apart <= max_part_error * size + 2 * grain
        if ok and before.ndim == 3:
            ok = not self._scrambled(got - before, delta)
        if ok:
            return _WeightFound("", scale, apart / size, same)
        # Rounding lies across the change, too: twice its energy is left out, as other tools round more than once.
        across = (float((got - before - scale * delta).norm()) / size) ** 2
        residue = math.sqrt(max(across - 2 * (grain / size) ** 2, 0.0))
        return _WeightFound(self._named(held, got - before, scale, residue), scale, apart / size, False)

    def _packed(
        self, held: _Held, before: Tensor, delta: Tensor, got: Tensor, max_scale_error: float
    ) -> _WeightFound:  # fmt: skip
        """Judge a weight that a coarse grid has rounded, whose noise may be larger than the change.

        The noise of single numbers averages out along the change: what is far from 1 beyond that is no rounding to the
        nearest of an exact merge, or rounding that has eaten the change.
        """
        there, size, whole = got - before, float(delta.norm()), float((before + delta).norm())
        apart = float((there - delta).norm())
        if apart > OTHER * max(whole, 1e-30) and apart > 2 * size:
            return _WeightFound("holds other weights than the base", None, apart / max(whole, 1e-30), False)
        if size <= 1e-6 * float(before.norm()):
            # Vectors stay in 16 bits or more.
            far = before.ndim < 2 and apart > GRAIN["BF16"] * max(whole, 1e-30)
            return _WeightFound("holds other weights than the base" if far else "", None, 0.0, apart <= 1e-6 * whole)
        scale = _along(there, delta)
        noise = float((there - scale * delta).norm()) / size / math.sqrt(delta.numel())
        if abs(scale - 1) <= max_scale_error + CERTAIN * noise:
            return _WeightFound("", scale, apart / size, False)
        fault = f"holds {scale:.3g} times the change"
        if scale < -CERTAIN * noise - UNCHANGED:
            fault = f"holds the change with its sign turned (scale {scale:.2g})"
        elif abs(scale) < UNCHANGED + CERTAIN * noise:
            fault = self._elsewhere(held, there) or "holds nothing of the change"
        return _WeightFound(fault, scale, apart / size, False)

    def _elsewhere(self, held: _Held, there: Tensor) -> str:
        """Say which other change a quantized weight holds; nothing if it holds none of those that are known."""
        delta = self.changes[held.name].double()
        if there.ndim == 2 and there.shape[0] == there.shape[1] and abs(_along(there, delta.T) - 1) < OTHER:
            return "holds the change transposed"
        for each in self.held[:MOST_COMPARED]:
            other = self.changes[each.name].double()
            same = each.name != held.name and other.shape == there.shape and bool(other.any())
            if same and abs(_along(there, other) - 1) < OTHER:
                return f"holds the change of {each.module}"
        return ""

    def _scrambled(self, there: Tensor, delta: Tensor) -> bool:
        """Whether single experts of a stack hold something else, which is little of the whole."""
        sizes = delta.flatten(1).norm(dim=1)
        apart = (there - delta).flatten(1).norm(dim=1)
        return bool((apart > sizes).any())

    def _named(self, held: _Held, there: Tensor, scale: float, residue: float) -> str:
        """Say what is there instead of the change."""
        plain = named_scale(scale, residue)
        if plain != "holds another change":
            return plain
        delta = self.changes[held.name].double()
        if there.ndim == 2 and there.shape[0] == there.shape[1] and _cosine(there, delta.T) > ALIKE:
            return "holds the change transposed"
        if there.ndim == 3 and _scrambled_rows(there, delta):
            return "holds the changes of its experts in another order"
        for each in self.held[:MOST_COMPARED]:
            other = self.changes[each.name].double()
            if each.name != held.name and other.shape == there.shape and _cosine(there, other) > ALIKE:
                return f"holds the change of {each.module}"
        if float(there.norm()) > 10 * float(delta.norm()):
            return "holds other weights than the base with the change"
        return plain


@dataclass(frozen=True, slots=True)
class _WeightFound:
    """One weight: its fault, the part of the change that is there, the error relative to it, whether it is exact."""

    fault: str
    scale: float | None
    error: float
    same: bool


def _kind(name: str) -> Any:
    """The torch dtype that weights of a stored dtype are rounded to."""
    import torch

    return {"F32": torch.float32, "F64": torch.float32, "F16": torch.float16}.get(name, torch.bfloat16)


def _cosine(one: Tensor, other: Tensor) -> float:
    size = float(one.norm()) * float(other.norm())
    return float((one * other).sum()) / size if size else 0.0


def _along(there: Tensor, delta: Tensor) -> float:
    """The multiple of a change that comes nearest to another."""
    return float((there * delta).sum()) / float((delta * delta).sum())


def _scrambled_rows(there: Tensor, delta: Tensor) -> bool:
    a, b = there.flatten(1), delta.flatten(1)
    a = a / a.norm(dim=1, keepdim=True).clamp_min(1e-30)
    b = b / b.norm(dim=1, keepdim=True).clamp_min(1e-30)
    return bool(((a @ b.T).max(1).values > ALIKE).all())


def _by_output(part: ModulePart) -> str:
    if not part.touched or part.scale is None:
        return "computes something else than the base"
    residue = math.sqrt(max(part.error**2 - (1 - part.scale) ** 2, 0.0))
    return named_scale(part.scale, residue)
