"""Fresh adapters for a live model, to be trained through `inject`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..adapter import LAYOUTS, Adapter, Target
from ..binding import view
from ..errors import AdapterkitError, TargetNotFound, Unsupported, UsageError, nearest
from ..methods import METHODS
from ..naming.layouts import stored_in_out
from ..updates import ContextUpdate, Update
from .create_context import create_context
from .layers import Conv1D, Quantized, dequantized, stored_layout, stored_shape
from .leaves import is_leaf_name

if TYPE_CHECKING:
    from ..updates import Random

Choice = str | re.Pattern[str] | type[nn.Module]
"""What names targets: a glob, "re:" and a regular expression or a compiled one, a class of modules, "all-linear"."""


def create(
    model: nn.Module, method: str, *, targets: Choice | Sequence[Choice] = "all-linear", rank: int = 16,
    alpha: float | None = None, seed: int = 0, layout: str | None = None, **attributes: Any,
) -> Adapter:  # fmt: skip
    """A fresh adapter.

    Args:
        model: the model it is for.
        method: the method's name.
        targets: one choice or several, each of which must match something. Globs match whole dotted names of modules
            with a weight (of all modules for a method of outputs) and of parameters, or the end of them after a dot;
            regular expressions match whole names.
            "all-linear" is every linear layer (and GPT-2's Conv1D) but the output head: what
            `get_output_embeddings()` of a transformers model returns or, for its classifiers, `score` or `classifier`.
            Context has its own place, but for the attentions of adaption prompts: all, unless globs choose.
        rank: the inner size, for methods that have one; the number of virtual tokens, for those of context.
        alpha: scaling times rank; without it the scaling is 1, or what `scaling=` says.
        seed: of the numbers drawn.
        layout: the axis order of targets that are parameters, where neither the model's family nor its number of
            experts tells it; one of `LAYOUTS`.
        attributes: the method's own plain values, and `sizes`.

    Raises:
        TargetNotFound: no target matches.
        Unsupported: unknown method, or one without an initial value, or a layer that cannot take it.
        UsageError: both alpha and scaling, an attribute that the method lacks, a rank below 1, a regular expression
            that is none, or a parameter whose layout nothing tells.
    """
    cls = METHODS[method]
    if rank < 1 or (alpha is not None and "scaling" in attributes):
        raise UsageError("rank is below 1, or both alpha and scaling are given", cure="Correct the arguments")
    if alpha is not None:
        attributes["scaling"] = alpha / rank
    if issubclass(cls, ContextUpdate):
        return create_context(model, cls, targets, rank, seed, attributes)
    unknown = [name for name in attributes if name not in {*cls.attribute_fields(), *cls.tensor_fields(), *cls.sizes}]
    if unknown:
        known = ", ".join((*cls.attribute_fields(), *cls.sizes))
        raise UsageError(f"{method} has no {unknown[0]}", cure=f"It has {known}")
    generator = torch.Generator().manual_seed(seed)
    places = {path: _target(model, path, layout) for path in _matching(model, targets, cls.kind == "output")}
    shapes = [_shape(model, path, target) for path, target in places.items()]
    given = cls.shared(shapes, rank, _random(generator)) | attributes
    updates = {target: (_fresh(cls, model, path, target, rank, generator, given),) for path, target in places.items()}
    adapter = Adapter(updates).map(_own)
    adapter.validate()
    return adapter


def _own(leaf: object) -> Tensor:
    """In memory of its own, in the order in which a file has it: so training starts alike from either."""
    return torch.as_tensor(leaf).detach().clone(memory_format=torch.contiguous_format)


def _random(generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Random:
    return lambda shape: torch.rand(shape, generator=generator, dtype=dtype) * 2 - 1


def _fresh(
    cls: type[Update], model: nn.Module, path: str, target: Target, rank: int, generator: torch.Generator,
    attributes: dict[str, Any],
) -> Update:  # fmt: skip
    W, b = _weight(model, path, target), _bias(model, path)
    random = _random(generator, W.dtype)
    try:
        cls.check_axes(tuple(W.shape[target.stacked :]))
        if not target.stacked:
            return cls.initial(W, b, rank, random, **attributes)
        each = [cls.initial(w, None if b is None else b[e], rank, random, **attributes) for e, w in enumerate(W)]
    except AdapterkitError as error:
        raise error.at(where=f"{target}: {cls.__name__.lower()}") from None
    tensors: Any = [{name: torch.as_tensor(leaf) for name, leaf in one.tensors.items()} for one in each]
    return each[0].replace(**{name: torch.stack([one[name] for one in tensors]) for name in tensors[0]})


def _target(model: nn.Module, path: str, layout: str | None) -> Target:
    module = _module(model, path)
    if module is not None:
        return Target(path, stored_layout(module) or "out *in")
    return Target(path, layout or _parameter_layout(model, path, model.get_parameter(path)))


def _module(model: nn.Module, path: str) -> nn.Module | None:
    """The module at a path; None where it is a parameter's."""
    parent, _, name = path.rpartition(".")
    return model.get_submodule(parent)._modules.get(name)


def _shape(model: nn.Module, path: str, target: Target) -> tuple[int, ...]:
    """The weight's shape as updates see it, an expert's where they are stacked."""
    module = _module(model, path)
    if module is not None and not _weighted(module):
        return tuple(_as_if_square(module, path).shape)
    stored = tuple(model.get_parameter(path).shape) if module is None else stored_shape(module)
    return tuple(view(torch.empty(stored, device="meta"), target).shape)[int(target.stacked) :]


def _weight(model: nn.Module, path: str, target: Target) -> Tensor:
    """The weight as updates see it, on the CPU in at least float32."""
    module: Any = _module(model, path)
    if module is not None and not _weighted(module):
        return _as_if_square(module, path)
    if module is None:
        stored: Tensor = model.get_parameter(path)
    else:
        stored = dequantized(module) if Quantized.takes(module) else module.weight
    if not stored.is_floating_point() or stored.dtype.itemsize < 2:
        raise Unsupported(f"a weight of {stored.dtype}", where=path, cure="Load the base unquantized")
    return view(stored.detach().to("cpu", torch.promote_types(stored.dtype, torch.float32)), target)


def _weighted(module: nn.Module) -> bool:
    return isinstance(getattr(module, "weight", None), nn.Parameter)


def _as_if_square(module: nn.Module, path: str) -> Tensor:
    """Zeros in the place of the weight of a module without one: as many channels as the last of its parts gives.

    A table comes last where it is a bias on positions, so that it only counts where there is nothing else.
    """
    parts = [part for part in module.modules() if _weighted(part)]
    parts.sort(key=lambda part: not isinstance(part, nn.Embedding))
    if not parts:
        raise Unsupported("a module without a weight inside", where=path, cure="Build the update from tensors instead")
    target = Target(path, stored_layout(parts[-1]) or "out *in")
    size = view(torch.empty(stored_shape(parts[-1]), device="meta"), target).shape[0]
    return torch.zeros(size, size)


def _bias(model: nn.Module, path: str) -> Tensor | None:
    """The bias of a module, or the one that goes with a parameter as `in_proj_bias` does with `in_proj_weight`."""
    stem, found, tail = path.rpartition("weight")
    parameters = dict(model.named_parameters(remove_duplicate=False))
    bias = parameters.get(f"{path}.bias", parameters.get(f"{stem}bias{tail}") if found else None)
    return None if bias is None else bias.detach().to("cpu", torch.promote_types(bias.dtype, torch.float32))


def _parameter_layout(model: nn.Module, path: str, stored: Tensor) -> str:
    """The axis order of a parameter that is no module's weight: by the family, the number of experts, or not at all."""
    config: Any = getattr(model, "config", None)
    words = config.to_dict() if hasattr(config, "to_dict") else {}
    experts = {words.get(name) for name in ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")}
    stacked = stored.ndim > 2 and stored.shape[0] in experts
    turned = stored_in_out(path, words)
    owner = model.get_submodule(path.rpartition(".")[0])
    known = turned is not None or isinstance(owner, nn.MultiheadAttention | nn.RNNBase)
    if stored.ndim < 2 or stacked or (stored.ndim == 2 and known):
        return f"{'e ' if stacked else ''}{'in out *k' if turned else 'out *in'}"
    why = f"a parameter of {list(stored.shape)} whose axes nothing tells"
    raise UsageError(why, where=path, cure=f"Pass layout=, one of {', '.join(map(repr, LAYOUTS))}")


def _matching(model: nn.Module, targets: Choice | Sequence[Choice], outer: bool) -> list[str]:
    choices = [targets] if isinstance(targets, str | re.Pattern | type) else list(targets)
    modules = {n: m for n, m in model.named_modules() if n and isinstance(getattr(m, "weight", None), nn.Parameter)}
    if outer:
        modules = {n: m for n, m in model.named_modules() if n and type(m).forward is not nn.Module.forward}
    weights = {f"{name}.{kind}" for name in modules for kind in ("weight", "bias")}
    held = [name for name, _ in model.named_parameters() if not is_leaf_name(name)]
    parameters = [name for name in held if name not in weights and not outer]
    names = [*modules, *parameters]
    found = {name for choice in choices for name in _chosen(model, choice, modules, names)}
    return [name for name in names if name in found]


def _chosen(model: nn.Module, choice: Choice, modules: dict[str, nn.Module], names: list[str]) -> list[str]:
    if isinstance(choice, type):
        found = [name for name, module in modules.items() if isinstance(module, choice)]
    elif choice == "all-linear":
        head = _head(model)
        found = [name for name, module in modules.items() if module is not head and _is_linear(module)]
    elif isinstance(choice, str) and not choice.startswith("re:"):
        found = [name for name in names if fnmatchcase(name, choice) or fnmatchcase(name, f"*.{choice}")]
    else:
        found = [name for name in names if _pattern(choice).fullmatch(name)]
    if not found:
        cure = nearest(str(choice), names) or "Targets are names in model.named_modules() and named_parameters()"
        raise TargetNotFound("no module with a weight and no parameter matches", where=str(choice), cure=cure)
    return found


def _pattern(choice: str | re.Pattern[str]) -> re.Pattern[str]:
    try:
        return re.compile(choice.removeprefix("re:") if isinstance(choice, str) else choice)
    except re.error as error:
        cure = "Correct it, or leave re: out to give a glob"
        raise UsageError(f"not a regular expression: {error}", where=str(choice), cure=cure) from None


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or Conv1D.takes(module)


def _head(model: nn.Module) -> nn.Module | None:
    """The output head, as PEFT tells it for its own "all-linear"."""
    of: Any = model
    if not hasattr(model, "get_output_embeddings"):
        return None
    head: nn.Module | None = of.get_output_embeddings()
    return head if head is not None else getattr(model, "score", getattr(model, "classifier", None))
