"""LoRA on parameters, `target_parameters`: stacked experts, one pair of factors an expert, all pairs in two matrices.

A file says `experts.lora_A` and `experts.base_layer.lora_A`, not which parameter each belongs to: PEFT wraps the module
once a parameter, in the order in which the module declares them. The config has the names, the shapes tell the rest.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import permutations
from typing import TYPE_CHECKING, Any

from ...errors import Malformed, ShapeMismatch, Unsupported, UsageError
from ...tensors.lazy import Lazy, bytes_of
from .config import names_module
from .factors import Factors, adapt, check_rank
from .file import File, Findings, Found

if TYPE_CHECKING:
    import numpy as np

    from ...tensors.lazy import Buffer, Shape

MAX_NAMES = 6
"""Adapted parameters of one module; real ones have two."""

IN_ORDER = ("gate_up_proj", "down_proj")
"""Parameters of the experts in transformers, in the order in which they are declared."""


def adapts_parameter(file: File, path: str) -> bool:
    """Whether the factors at a module belong to a parameter of it: `target_modules` comes first, as in PEFT."""
    return bool(_names(file, path)) and not names_module(file.settings.target_modules, path)


def decode(file: File, factors: Iterable[Factors]) -> Findings:
    """The updates of parameters.

    Raises:
        UsageError: several parameters could be meant, and the base would tell.
        Unsupported: several could be meant, and nothing tells.
        ShapeMismatch: a rank is not the config's.
    """
    modules: dict[str, list[Factors]] = {}
    for each in factors:
        modules.setdefault(each.key.path, []).append(each)
    for path, group in modules.items():
        for each in group:
            _check_matrices(each)
        for each, name in zip(group, _assign(file, path, group), strict=True):
            yield _parameter(file, each, f"{path}.{name}")


def stack(B: Lazy, experts: int) -> Lazy:
    """PEFT's [out, r * e], expert fastest, as [e, out, r]."""
    out, r = B.shape[0], B.shape[1] // experts

    def part(first: int, count: int) -> Buffer:
        """A run of elements; of whole experts, only theirs are put in order."""
        each = out * r
        start, stop = first // each, -(-(first + count) // each)
        slices = _values(B).reshape(out, r, experts)[:, :, start:stop].transpose(2, 0, 1)
        size = B.dtype.itemsize
        return bytes_of(slices)[(first - start * each) * size : (first + count - start * each) * size]

    return Lazy((experts, out, r), B.dtype, lambda: part(0, experts * out * r), part=part)


@lru_cache(maxsize=2)
def _values(B: Lazy) -> np.ndarray[Any, Any]:
    """The numbers of B, kept for the next expert: one expert's columns are all over the file.

    A merge into a base of one tensor an expert asks for the slices one after another, of two parameters in turn.
    """
    return B.numpy()


def unstack(B: Lazy) -> Lazy:
    """[e, out, r] as PEFT stores it, [out, r * e]."""
    experts, out, r = B.shape
    return B.map(lambda b: b.transpose(1, 2, 0).reshape(out, r * experts), (out, r * experts))


def _parameter(file: File, factors: Factors, path: str) -> Found:
    rank = file.settings.rank(path)
    experts = max(factors.A.shape[0] // rank, 1)
    check_rank(factors, rank, experts)
    keys = {name: factors.keys[name] for name in ("A", "B")}
    shape = file.base_shape(path)
    if experts == 1 and (shape is None or len(shape) == 2):
        return Found(path, adapt(file.settings, path, {"A": factors.A, "B": factors.B}), keys)
    tensors = {"A": factors.A.reshape(experts, rank, factors.A.shape[1]), "B": stack(factors.B, experts)}
    turned = shape is not None and shape[1:] == (factors.A.shape[1], factors.B.shape[0]) != shape[:0:-1]
    return Found(path, adapt(file.settings, path, tensors), keys, "e in out *k" if turned else "e out *in")


def _check_matrices(factors: Factors) -> None:
    for field in ("A", "B"):
        if len(factors.tensors[field].shape) != 2:
            why = f"a factor of a parameter is a matrix, not {list(factors.tensors[field].shape)}"
            raise ShapeMismatch(why, where=factors.keys[field].text, cure="Write the adapter again with PEFT")


def _names(file: File, path: str) -> list[str]:
    """Names of the parameters of a module that `target_parameters` could mean."""
    known = [name.rpartition(".") for name in file.settings.target_parameters or ()]
    names = [name for module, _, name in known if not module or path == module or path.endswith(f".{module}")]
    return list(dict.fromkeys(names))


def _assign(file: File, path: str, group: Sequence[Factors]) -> tuple[str, ...]:
    if all(each.stem in file.parameters for each in group):
        return tuple(file.parameters[each.stem].rpartition(".")[2] for each in group)
    names = _names(file, path)
    if len(names) > MAX_NAMES or len(group) > len(names):
        why = f"{len(group)} nested pairs for {len(names)} parameters of target_parameters"
        raise Malformed(why, where=group[0].key.text, cure="The config is not of this file")
    options = [option for option in permutations(names, len(group)) if _fits(file, path, group, option)]
    if len(options) == 1:
        return options[0]
    if not options:
        why = f"no parameter of {', '.join(names)} has the shape for these factors"
        raise Malformed(why, where=group[0].key.text, cure="The config or the base is not of this file")
    where, which = group[0].key.text, " or ".join(sorted({option[0] for option in options}))
    if file.base is None:
        raise UsageError(f"the file does not say whether this adapts {which}", where=where, cure="Pass base=")
    why = f"nothing tells whether this adapts {which}: both have the same shape"
    raise Unsupported(why, where=where, cure="Merge it with PEFT itself")


def _fits(file: File, path: str, group: Sequence[Factors], names: Sequence[str]) -> bool:
    sizes = {name: _size(file, each, f"{path}.{name}") for each, name in zip(group, names, strict=True)}
    if None in sizes.values():
        return False
    shapes = {name: file.base_shape(f"{path}.{name}") for name in _names(file, path)}
    if any(shapes.values()):
        # Where the base has any of these parameters, it has all: what it does not have, the file cannot mean.
        return all(_fits_base(shapes[name], size) for name, size in sizes.items() if size)
    return len({size[0] for size in sizes.values() if size}) == 1 and _fits_gate(sizes)


def _size(file: File, factors: Factors, path: str) -> tuple[int, int, int] | None:
    """(experts, out, in) if the factors are of the parameter's rank."""
    (rows, in_), (out, columns) = factors.A.shape, factors.B.shape
    experts, rest = divmod(rows, file.settings.rank(path))
    return None if rest or rows != columns else (experts, out, in_)


def _fits_base(shape: Shape | None, size: tuple[int, int, int]) -> bool:
    experts, out, in_ = size
    return shape in ((experts, out, in_), (experts, in_, out)) or (experts == 1 and shape == (out, in_))


def _fits_gate(sizes: dict[str, tuple[int, int, int] | None]) -> bool:
    """Whether gate and up together are twice as wide as what down reads, and read what down writes."""
    gate_up, down = (sizes.get(name) for name in IN_ORDER)
    return not gate_up or not down or (gate_up[1] == 2 * down[2] and gate_up[2] == down[1])


def told_apart(names: Sequence[str]) -> bool:
    """Whether the order of a module's adapted parameters is known."""
    return len(names) == 1 or set(names) <= set(IN_ORDER)


def depths(names: Sequence[str]) -> Iterator[tuple[str, int]]:
    """Parameter -> wrappers around it, for a module of which all these are adapted; the first declared is innermost."""
    ordered = sorted(names, key=lambda name: (IN_ORDER.index(name) if name in IN_ORDER else -1, name))
    return ((name, len(ordered) - 1 - position) for position, name in enumerate(ordered))
