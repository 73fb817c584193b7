"""Compare a merged model with the base and its adapters module by module, to find the first module that is wrong.

While the base with adapters runs, each module that has weights runs three times on the same input: with adapters,
without adapters, and with the weights of the merged model. So a fault in an early module does not affect the comparison
of later modules, and the result shows how much of the change each module contains.

If the outputs of a module differ too much, its weights are compared too. The difference is not a fault if rounding to
the merged model's dtype explains it, which happens for weak changes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from ..errors import AdapterkitError
from .result import UNCHANGED, ModulePart

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from ..torch.handle import Handle

NOISE = 1e-5
"""Two float32 outputs count as equal if their relative difference is below this."""

GRAIN = {"F32": 2.0**-23, "F64": 2.0**-23, "F16": 2.0**-10, "BF16": 2.0**-7}
"""The relative rounding step of each stored dtype. For F64 it is the step of F32, because no model runs in float64."""

ALIKE = 0.9
"""Two changes count as the same if their cosine similarity is above this."""

QUANTIZED = "quantized"
"""The name that results give as the dtype of a quantized model."""


RESIDUE = 0.2
"""The limit below which a wrong change is described as a multiple of the right change.

A wrong change is the sum of a multiple of the right change and an orthogonal component. The wrong change is called a
multiple if the norm of the orthogonal component is small: at most `RESIDUE` times the norm of the multiple or of the
right change, whichever norm is larger.
"""

BROKEN = ("has a ", "has no ", "contains values that are not finite")
"""If a weight cannot be compared, its fault begins with one of these prefixes."""

CERTAIN = 5.0
"""In a quantized weight, the scale of the change may differ from 1 by `max_scale_error` plus this many standard errors.
The standard error of the scale is estimated from the rounding noise. A larger difference is a fault."""

OTHER = 0.5
"""A quantized weight counts as a different weight only if its relative error is larger than this. The limit allows for
2-bit rounding, which has a relative error of 1/3."""

MOST_COMPARED = 64
"""To find swapped changes, a wrong weight is compared with the changes of at most this many weights."""


@dataclass(slots=True)
class ModuleSums:
    """Squared norms and inner products of a module's outputs, summed over the inputs.

    The module runs with the weights of the base (`base`), with adapters (`adapted`), and with the weights of the merged
    model (`other`).

    Attributes:
        size: `|adapted|^2`.
        asked: `|adapted - base|^2`.
        there: `|other - base|^2`.
        product: the inner product of `adapted - base` and `other - base`.
        apart: `|adapted - other|^2`.
        finite: False if `other` has NaN or infinities in a call where `adapted` has none.
        why: the reason why the outputs cannot be compared; empty if they can be compared.
    """

    size: float = 0.0
    asked: float = 0.0
    there: float = 0.0
    product: float = 0.0
    apart: float = 0.0
    finite: bool = True
    why: str = ""

    def add(self, base: Tensor, adapted: Tensor, other: Tensor) -> None:
        """Update the sums with the module's three outputs for one input."""
        if adapted.shape != other.shape:
            self.why = f"gives an output of the shape {list(other.shape)} instead of {list(adapted.shape)}"
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
    """The comparison of the modules of a merged model with those of the base with adapters.

    Attributes:
        sums: a map from each module's name to its sums, in the order in which the modules ran.
        missing: names of the base's modules that the merged model does not have.
        idle: names of modules that have weights but never ran.
    """

    sums: dict[str, ModuleSums] = field(default_factory=dict)
    missing: tuple[str, ...] = ()
    idle: tuple[str, ...] = ()


class Watched:
    """Forward hooks on the base with adapters.

    They compare the outputs of each module with those of the merged model's module of the same name.
    """

    def __init__(self, model: nn.Module, other: nn.Module, handles: Sequence[Handle]) -> None:
        self.other, self.handles, self.on = dict(other.named_modules()), handles, False
        self.names = [
            name
            for name, module in model.named_modules()
            if any(True for _ in _tensors_of(module)) and name in self.other
        ]
        with_parameters = [name for name, module in model.named_modules() if any(True for _ in _tensors_of(module))]
        self.missing = tuple(name for name in with_parameters if name not in self.other)
        self.sums: dict[str, ModuleSums] = {}
        self.hooks = [
            model.get_submodule(name).register_forward_hook(self._hook(name), with_kwargs=True) for name in self.names
        ]

    @contextmanager
    def looking(self) -> Iterator[None]:
        """Enable the hooks inside the `with` block, where the caller runs the base with adapters."""
        self.on = True
        try:
            yield
        finally:
            self.on = False

    def close(self) -> ModuleComparison:
        """Remove the hooks and return the comparison."""
        for hook in self.hooks:
            hook.remove()
        return ModuleComparison(self.sums, self.missing, tuple(name for name in self.names if name not in self.sums))

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[object, ...], dict[str, object], object], None]:
        def compare(
            module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], adapted: object
        ) -> None:  # fmt: skip
            if not self.on:
                return
            self.on = False  # Running the module again below would call this hook again.
            try:
                with ExitStack() as off:
                    for handle in self.handles:
                        off.enter_context(handle.disable())
                    base = module(*args, **kwargs)
                self._add(name, base, adapted, args, kwargs)
            finally:
                self.on = True

        return compare

    def _add(
        self, name: str, base: object, adapted: object, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> None:  # fmt: skip
        sums = self.sums.setdefault(name, ModuleSums())
        try:
            other = self.other[name](*args, **kwargs)
        except (RuntimeError, IndexError, ValueError) as error:  # The merged module needs another input shape.
            sums.why = f"cannot be run on the same input ({str(error).strip().splitlines()[0]})"
            return
        for three in zip(_floats(base), _floats(adapted), _floats(other), strict=False):
            sums.add(*three)


def _tensors_of(module: nn.Module) -> Iterator[Tensor]:
    """Yield the parameters and floating-point buffers of a module, but not those of its children."""
    yield from (p for p in module._parameters.values() if p is not None)
    yield from (b for b in module._buffers.values() if b is not None and b.is_floating_point())


def _floats(output: object) -> Iterator[Tensor]:
    import torch

    if isinstance(output, torch.Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, Mapping):
        for each in output.values():
            yield from _floats(each)
    elif isinstance(output, (tuple, list)):
        for each in output:
            yield from _floats(each)


def scale_of(comparison: ModuleComparison) -> float | None:
    """Return the factor by which the merged model scales the adapters' change; None if the adapters change no module.

    The factor is a mean over the modules. Each module counts in proportion to the squared norm of the adapters' change
    to the module's output.
    """
    asked = math.fsum(sums.asked for sums in comparison.sums.values())
    return math.fsum(sums.product for sums in comparison.sums.values()) / asked if asked else None


def judged(
    comparison: ModuleComparison, model: nn.Module, other: nn.Module, handles: Sequence[Handle], *, dtype: str,
    coarse: float, max_scale_error: float, max_part_error: float,
) -> tuple[ModulePart, ...]:  # fmt: skip
    """Find the fault of each module, if it has one.

    If weights must be compared too, this function merges the adapters into `model`.

    Args:
        comparison: the comparison of the modules' outputs.
        model: the base with adapters.
        other: the merged model.
        handles: the handles of the adapters that are attached to `model`.
        dtype: the stored dtype of the merged model, or `quantized`.
        coarse: the relative rounding step of the dtype in which the models ran.
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
        # If the model is quantized, compare the weights of all modules, because quantization changes all outputs.
        if quantized or far or moved or _plain_fault(comparison.sums[name]):
            suspects.append(name)
    # Always compare the weights of stacked experts, because the tokens reach only some of the experts.
    stacks = [name for name in parts if name not in suspects and _is_stack(model.get_submodule(name))]
    weights = SuspectWeights(model, other, [*suspects, *stacks, *comparison.idle], dtype)
    weights.fold(handles)
    parts_by_name: dict[str, ModulePart] = {}
    for name in [*parts, *comparison.idle]:
        part = parts.get(name) or ModulePart(name, False, None, 0.0, True)
        parts_by_name[name] = part
        if name in weights.names:
            parts_by_name[name] = weights.judged(part, name in suspects, max_scale_error, max_part_error)
        plain = _plain_fault(comparison.sums[name]) if name in parts else ""
        # If a weight cannot be compared, keep its fault, because it explains why the output is wrong.
        if plain and not parts_by_name[name].fault.startswith(BROKEN):
            parts_by_name[name] = replace(part, fault=plain)
    lost = [ModulePart(name, False, None, 1.0, True, "is missing") for name in comparison.missing]
    return (*parts_by_name.values(), *lost)


def _plain_fault(sums: ModuleSums) -> str:
    return "gives values that are not finite" if not sums.finite else sums.why


def _is_stack(module: nn.Module) -> bool:
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
    """Return a phrase that describes a module's wrong change, such as `contains 0.5 times the change`.

    The wrong change is a sum: `scale` times the right change, plus a component that is orthogonal to the right change.
    If the orthogonal component is too large (see `RESIDUE`), the phrase is `contains another change`.

    Args:
        scale: the factor of the right change in this sum.
        residue: the norm of the orthogonal component, divided by the norm of the right change.
    """
    if residue > RESIDUE * max(abs(scale), 1.0) and residue > RESIDUE:
        return "contains another change"
    if abs(scale) < UNCHANGED:
        return "contains none of the change"
    if scale < 0:
        return f"contains the change with the opposite sign (scale {scale:.2g})"
    return f"contains {scale:.3g} times the change"


@dataclass(slots=True, eq=False)
class _WeightCopy:
    """A copy of a parameter of the base, made before the adapters are merged."""

    module: str
    name: str
    before: Tensor


class SuspectWeights:
    """The weights of suspected modules in the base, in the base with merged adapters, and in the merged model."""

    def __init__(self, model: nn.Module, other: nn.Module, names: Sequence[str], dtype: str) -> None:
        self.model, self.other, self.names, self.dtype = model, dict(other.named_parameters()), {*names}, dtype
        self.copies: list[_WeightCopy] = []
        self.why = ""
        for name in dict.fromkeys(names):
            for leaf, parameter in model.get_submodule(name)._parameters.items():
                if parameter is not None:
                    self.copies.append(
                        _WeightCopy(name, f"{name}.{leaf}" if name else leaf, parameter.detach().clone())
                    )
        self.changes: dict[str, Tensor] = {}

    def fold(self, handles: Sequence[Handle]) -> None:
        """Merge the adapters into the base. If the adapters cannot be merged, weights are not compared."""
        if not self.copies:
            return
        try:
            for handle in handles:
                handle.merge_()
        except AdapterkitError as error:
            self.why = error.why
            return
        after = dict(self.model.named_parameters())
        self.changes = {each.name: after[each.name].detach() - each.before for each in self.copies}

    def judged(self, part: ModulePart, suspected: bool, max_scale_error: float, max_part_error: float) -> ModulePart:
        """Compare a module's weights, and return `part` with the result.

        If a weight has a fault, the result has this fault. If no weight has a fault but the module is suspected, the
        result still has a fault, unless the merged model is quantized or rounding explains the outputs' difference.
        """
        worst, same, along = "", True, list[tuple[float, float]]()
        touched = part.touched
        for each in (weight for weight in self.copies if weight.module == part.module and not self.why):
            result = self._weight(each, max_scale_error, max_part_error)
            same = same and result.same
            touched = touched or result.scale is not None
            if result.fault:
                worst = worst or result.fault
                if result.scale is not None:
                    along.append((result.scale, result.error))
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
            return replace(part, fault="gives another output with the same weights: the configs differ")
        return replace(part, rounded=True)

    def _weight(self, weight: _WeightCopy, max_scale_error: float, max_part_error: float) -> _WeightFound:
        there, delta = self.other.get(weight.name), self.changes[weight.name].double()
        if there is None:
            return _WeightFound(f"has no {weight.name.rpartition('.')[2]}", None, 1.0, False)
        if there.shape != weight.before.shape:
            return _WeightFound(
                f"has a {weight.name.rpartition('.')[2]} of the shape {list(there.shape)} instead of "
                f"{list(weight.before.shape)}", None, 1.0, False,
            )  # fmt: skip
        before = weight.before.double()
        wanted, got = before + delta, there.detach().double()
        if not bool(got.isfinite().all()):
            return _WeightFound("contains values that are not finite", None, math.inf, False)
        if self.dtype == QUANTIZED:
            return self._packed(weight, before, delta, got, max_scale_error)
        rounded = wanted.to(_kind(self.dtype)).double()
        size, apart = float(delta.norm()), float((got - wanted).norm())
        grain = float((rounded - wanted).norm())
        same = apart <= 1e-6 * float(wanted.norm())
        if size <= 1e-6 * float(before.norm()):
            if apart <= 2 * grain + 1e-6 * float(wanted.norm()):
                return _WeightFound("", None, 0.0, same)
            return _WeightFound(
                "has other weights than the base", None, apart / max(float(wanted.norm()), 1e-30), False
            )
        scale = float(((got - before) * delta).sum()) / size**2
        ideal = float(((rounded - before) * delta).sum()) / size**2
        ok = abs(scale - ideal) <= max_scale_error and apart <= max_part_error * size + 2 * grain
        if ok and before.ndim == 3:
            ok = not self._scrambled(got - before, delta)
        if ok:
            return _WeightFound("", scale, apart / size, same)
        # Rounding errors are mostly orthogonal to the change, so `across` contains their squared norm. Subtract the
        # squared norm of this dtype's rounding error twice, because other tools round twice.
        across = (float((got - before - scale * delta).norm()) / size) ** 2
        residue = math.sqrt(max(across - 2 * (grain / size) ** 2, 0.0))
        return _WeightFound(self._named(weight, got - before, scale, residue), scale, apart / size, False)

    def _packed(
        self, weight: _WeightCopy, before: Tensor, delta: Tensor, got: Tensor, max_scale_error: float
    ) -> _WeightFound:  # fmt: skip
        """Compare a quantized weight, whose rounding errors may be larger than the change.

        The scale is a projection onto the adapters' change. In this projection, the rounding errors of single elements
        mostly cancel. If the scale still differs too much from 1, the merge was wrong, or rounding removed the change.
        """
        there, size, whole = got - before, float(delta.norm()), float((before + delta).norm())
        apart = float((there - delta).norm())
        if apart > OTHER * max(whole, 1e-30) and apart > 2 * size:
            return _WeightFound("has other weights than the base", None, apart / max(whole, 1e-30), False)
        if size <= 1e-6 * float(before.norm()):
            # Vectors are not quantized. Their error is a fault if it is larger than a 16-bit rounding error.
            far = before.ndim < 2 and apart > GRAIN["BF16"] * max(whole, 1e-30)
            return _WeightFound("has other weights than the base" if far else "", None, 0.0, apart <= 1e-6 * whole)
        scale = _along(there, delta)
        noise = float((there - scale * delta).norm()) / size / math.sqrt(delta.numel())
        if abs(scale - 1) <= max_scale_error + CERTAIN * noise:
            return _WeightFound("", scale, apart / size, False)
        fault = f"contains {scale:.3g} times the change"
        if scale < -CERTAIN * noise - UNCHANGED:
            fault = f"contains the change with the opposite sign (scale {scale:.2g})"
        elif abs(scale) < UNCHANGED + CERTAIN * noise:
            fault = self._elsewhere(weight, there) or "contains none of the change"
        return _WeightFound(fault, scale, apart / size, False)

    def _elsewhere(self, weight: _WeightCopy, there: Tensor) -> str:
        """Return a message if a quantized weight contains the transpose of its change, or the change of another weight.

        Return an empty string for all other weights.
        """
        delta = self.changes[weight.name].double()
        if there.ndim == 2 and there.shape[0] == there.shape[1] and abs(_along(there, delta.T) - 1) < OTHER:
            return "contains the change transposed"
        for each in self.copies[:MOST_COMPARED]:
            other = self.changes[each.name].double()
            same = each.name != weight.name and other.shape == there.shape and bool(other.any())
            if same and abs(_along(there, other) - 1) < OTHER:
                return f"contains the change of {each.module}"
        return ""

    def _scrambled(self, there: Tensor, delta: Tensor) -> bool:
        """Whether the change of any expert in a stack has an error that is larger than the right change.

        The norm of the whole stack may not show such an error.
        """
        sizes = delta.flatten(1).norm(dim=1)
        apart = (there - delta).flatten(1).norm(dim=1)
        return bool((apart > sizes).any())

    def _named(self, weight: _WeightCopy, there: Tensor, scale: float, residue: float) -> str:
        """Return a phrase that describes a weight's wrong change, such as `contains the change transposed`."""
        plain = named_scale(scale, residue)
        if plain != "contains another change":
            return plain
        delta = self.changes[weight.name].double()
        if there.ndim == 2 and there.shape[0] == there.shape[1] and _cosine(there, delta.T) > ALIKE:
            return "contains the change transposed"
        if there.ndim == 3 and _scrambled_rows(there, delta):
            return "contains the changes of the experts in another order"
        for each in self.copies[:MOST_COMPARED]:
            other = self.changes[each.name].double()
            if each.name != weight.name and other.shape == there.shape and _cosine(there, other) > ALIKE:
                return f"contains the change of {each.module}"
        if float(there.norm()) > 10 * float(delta.norm()):
            return "has other weights than the base plus the change"
        return plain


@dataclass(frozen=True, slots=True)
class _WeightFound:
    """The comparison of one weight.

    Attributes:
        fault: a phrase that describes the fault; empty if the weight is right.
        scale: the factor by which the weight scales the adapters' change; None if the adapters do not change the
            weight, or if the weight cannot be compared.
        error: the norm of the error, divided by the norm of the adapters' change. If `scale` is None, the divisor is
            the norm of the weight instead. If the error was not measured, `error` is a placeholder: 0, 1 or infinity.
        same: whether the weight equals the right weight up to float32 rounding; always False for a quantized weight
            that the adapters change.
    """

    fault: str
    scale: float | None
    error: float
    same: bool


def _kind(name: str) -> torch.dtype:
    """Return the torch dtype for a stored dtype. For all dtypes except F32, F64 and F16, this is bfloat16.

    For F64, return float32, because no model runs in float64.
    """
    import torch

    return {"F32": torch.float32, "F64": torch.float32, "F16": torch.float16}.get(name, torch.bfloat16)


def _cosine(one: Tensor, other: Tensor) -> float:
    size = float(one.norm()) * float(other.norm())
    return float((one * other).sum()) / size if size else 0.0


def _along(there: Tensor, delta: Tensor) -> float:
    """Return the factor f for which `f * delta` is closest to `there`."""
    return float((there * delta).sum()) / float((delta * delta).sum())


def _scrambled_rows(there: Tensor, delta: Tensor) -> bool:
    a, b = there.flatten(1), delta.flatten(1)
    a = a / a.norm(dim=1, keepdim=True).clamp_min(1e-30)
    b = b / b.norm(dim=1, keepdim=True).clamp_min(1e-30)
    return bool(((a @ b.T).max(1).values > ALIKE).all())


def _by_output(part: ModulePart) -> str:
    if not part.touched or part.scale is None:
        return "gives another output than the base"
    residue = math.sqrt(max(part.error**2 - (1 - part.scale) ** 2, 0.0))
    return named_scale(part.scale, residue)
