"""Create new adapters for a live model. To train such an adapter, pass it to `inject`."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..core.adapter import LAYOUTS, Adapter, BaseRef, Target
from ..core.arguments import checks_types
from ..core.updates import ContextUpdate, Update
from ..errors import AdapterkitError, TargetNotFound, Unsupported, UsageError, nearest
from ..io.checkpoint import opened
from ..linalg.rotations import seeded
from ..methods import METHODS
from ..methods.dora import DoRA
from ..methods.lora import LoRA
from ..naming.binding import view
from ..naming.binding.fitting import identity_of
from ..naming.moves import stored_in_out
from .layers import Conv1D, check_dropout, dequantized, is_packed, stored_layout, stored_shape
from .leaves import casts_layerwise, check_on_hand, is_leaf_name, names_sharing, put_away
from .sharding import check_gathered, whole
from .starts import OF_DATA, Moments, StartPlace, find, moments_of, start_of
from .structure import embedding_of, heads_of, is_attention, sizes_of, unwrapped

if TYPE_CHECKING:
    from ..core.updates import Random
    from ..io.strict_json import JsonValue


Value = TypeVar("Value")

Choice = str | re.Pattern[str] | type[nn.Module]
"""A glob, "re:" followed by a regular expression, a compiled regular expression, a module class, or "all-linear"."""


@checks_types
def create(
    model: nn.Module, method: str, *, targets: Choice | Sequence[Choice] = "all-linear",
    exclude: Choice | Sequence[Choice] = (), layers: int | Sequence[int] | None = None, rank: int = 16,
    alpha: float | None = None, rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None, use_rslora: bool = False, init: str = "default",
    data: Iterable[object] | None = None, rho: float = 2.0, dropout: float = 0.0, seed: int = 0,
    layout: str | None = None, **attributes: object,
) -> Adapter:  # fmt: skip
    """Return a new adapter. To train it, call `inject(model, adapter, trainable=True)`.

    A new `lora` or `dora` adapter has the same values as one that PEFT creates after `torch.manual_seed(seed)`.

    No initialiser changes the model. With PiSSA, OLoRA, CorDA and LoftQ, PEFT changes the base: it subtracts a part
    from each adapted weight. Here the base stays unchanged: the adapter gets an additional update, `residual`, which
    subtracts this part and is not trained. So the adapter's file fits the original base, and `handle.remove()` restores
    the original model. A format that supports only LoRA can store both updates as one LoRA of twice the rank, if the
    adapter is written with `on_loss="promote"`. For LoftQ, this is impossible, because LoftQ's `residual` is not
    low-rank.

    Args:
        model: the model for which the adapter is made. The adapter's target names do not contain the names of wrappers
            (`torch.compile`, DDP, PEFT).
        method: the method's name.
        targets: one or several choices (see `Choice`). Each choice must match a module or a parameter. Globs and
            regular expressions are compared with the names of all modules that have a weight. They are also compared
            with the names of all parameters except the `weight` and `bias` of these modules. If the method changes
            outputs, globs and regular expressions are compared only with the names of all modules that have a forward.
            A glob must match the whole dotted name, or the part after any dot. A regular expression must match the
            whole name. "all-linear" matches every linear layer (and GPT-2's Conv1D) except the output head. In a
            transformers model, the head is the result of `get_output_embeddings()`; in a classifier, it is the module
            `score` or `classifier`. Most methods that add context ignore `targets`. Only `adaption_prompt`,
            `gated_prefix` and `gated_prefix_mlp` use it: they adapt the attention modules whose names match globs in
            `targets`, or all attention modules if `targets` is "all-linear".
        exclude: choices to remove from the targets. Each choice must match a module or a parameter.
        layers: the numbers of the blocks to adapt. A block's number is the first number in a target's name that has
            names before and after it (3 in `model.layers.3.mlp`). If not given, all blocks are adapted.
        rank: the rank, for methods that have one. For methods that add context, the number of virtual tokens.
        alpha: the numerator of the scaling, `alpha / rank`. If alpha is not given, the scaling is the attribute
            `scaling`, which is 1 by default.
        rank_pattern: a map from regular expression to rank, for targets that need another rank. An expression must
            match the target's whole name, or the end of the name after a dot. If several match, the first one is used.
        alpha_pattern: a map from regular expression to alpha. Expressions are matched as in `rank_pattern`.
        use_rslora: whether to divide alpha by the square root of the rank instead of by the rank.
        init: the initialiser of `lora` and `dora`: `default`, `gaussian`, `orthogonal`, `pissa`, `olora`, `loftq`,
            `corda` or `eva`. `pissa_niter_N` runs N iterations of a randomised SVD. `loftq` compensates for rounding to
            nf4, and `loftq_int8` for rounding to 8 bits. `loftq_iter_N` and `loftq_int8_iter_N` run N iterations.
            `corda_kpm` is CorDA's knowledge-preserved mode. `corda`, `corda_kpm` and `eva` need `data`.
        data: batches for `corda`, `corda_kpm` and `eva`. A batch that is a mapping is passed to the model as keyword
            arguments, a list or tuple as positional arguments, and any other batch as the only argument.
        rho: for `eva`, the largest allowed ratio of a layer's new rank to its old rank. `eva` moves rank to the layers
            in which additional directions explain the most variance. 1 leaves the ranks unchanged.
        dropout: in training, the probability that an element of an update's input is set to 0, as in PEFT's
            `lora_dropout`. For LoHa and LoKr, it is the probability that a row of the weight change is set to 0
            (`rank_dropout`); for OFT and BOFT, the share of blocks that do not rotate.
        seed: the seed of the random numbers.
        layout: the axis order of targets that are parameters, not modules; one of `LAYOUTS`. It is needed only if the
            order cannot be inferred from the model's family, the parameter's module, or the number of experts.
        attributes: the method's other settings, and the sizes of axes that the weight's shape does not determine.

    Raises:
        TargetNotFound: a choice matches nothing, or no target remains after `exclude` and `layers`.
        Unsupported: the method is unknown, the method cannot create new updates, or a layer does not support it.
        UsageError: arguments contradict each other, the method lacks an attribute, a rank is below 1, a regular
            expression is invalid, data is missing, or the layout of a parameter is unknown.
    """
    cls = METHODS[method]
    if rank < 1 or (alpha is not None and "scaling" in attributes):
        cure = "Pass a rank= of at least 1, and only one of alpha= and scaling="
        raise UsageError("rank is below 1, or both alpha and scaling are given", cure=cure)
    check_dropout(dropout, cls, method)
    check_gathered(model)
    if issubclass(cls, ContextUpdate):
        words = {"exclude": exclude, "layers": layers, "rank_pattern": rank_pattern, "alpha_pattern": alpha_pattern}
        _refuse(method, {**words, "use_rslora": use_rslora, "init": init != "default", "data": data})
        attributes |= {} if alpha is None else {"scaling": alpha / rank}
        return create_context(model, cls, targets, rank, seed, attributes)
    unknown = [name for name in attributes if name not in {*cls.attribute_fields(), *cls.tensor_fields(), *cls.sizes}]
    if unknown:
        known = ", ".join((*cls.attribute_fields(), *cls.sizes))
        raise UsageError(f"{method} has no attribute {unknown[0]!r}", cure=f"Choose among {known}")
    starts = cls in (LoRA, DoRA)
    find(init)
    if init != "default" and not starts:
        raise UsageError(f"{method} has only one initialiser", where="init", cure="Omit init=, or use lora or dora")
    paths = _matching(model, targets, exclude, layers, cls.kind == "output")
    sizes = {path: _Size.of(unwrapped(model, path), rank, alpha, rank_pattern, alpha_pattern) for path in paths}
    seen = _seen(model, paths, init, data)
    if init == "eva":
        sizes = _shared_out(sizes, seen, rho)
    generator = torch.Generator().manual_seed(seed)
    places = {path: _target(model, path, layout) for path in sizes}
    stored = ((path, _parameter(model, name)) for path in places for name in (f"{path}.weight", path, f"{path}.bias"))
    check_on_hand(model, ((path, tensor) for path, tensor in stored if tensor is not None))
    shapes = [_shape(model, path, target) for path, target in places.items()]
    shared = cls.shared(shapes, rank, _random(generator))
    if shared and rank_pattern:
        raise UsageError(f"{method} has one rank for all layers", where="rank_pattern", cure="Omit rank_pattern=")
    updates: dict[Target, tuple[Update, ...]] = {}
    with seeded(seed), torch.no_grad():
        for path, target in places.items():
            given = shared | attributes | sizes[path].attributes(use_rslora)
            plain = replace(target, path=unwrapped(model, path))
            if starts and not target.stacked:
                updates[plain] = _started(cls, model, path, target, init, sizes[path].rank, given, seen.get(path))
            else:
                updates[plain] = (_fresh(cls, model, path, target, sizes[path].rank, generator, given),)
    chosen: dict[str, JsonValue] = {"init": init, "dropout": dropout, "seed": seed}
    unsaid = {"init": "default", "dropout": 0.0, "seed": None}
    arguments: dict[str, JsonValue] = {name: value for name, value in chosen.items() if value != unsaid[name]}
    name = _loaded_from(model)
    base = None if name is None else BaseRef(name)  # PEFT writes the same name into its config.
    adapter = Adapter(updates, base).map(_copied).step("create", method=method, **arguments, **_stored_base(model))
    adapter.validate()
    return adapter


def _stored_base(model: nn.Module) -> dict[str, str]:
    """Return the fingerprint of the files from which the model was loaded; {} if these files are not on this computer.

    The weights in memory cannot be used instead: they may be cast, quantized, on other devices or under other names.
    """
    name = _loaded_from(model)
    if name is None:
        return {}
    try:
        folder = Path(name) if Path(name).is_dir() else _cached(name)
        return {} if folder is None else identity_of(opened(folder))
    except AdapterkitError:
        return {}


def _loaded_from(model: nn.Module) -> str | None:
    """Return the repository or folder that a model's config names as its source."""
    config = getattr(model, "config", None)
    name = config.get("_name_or_path") if isinstance(config, Mapping) else getattr(config, "_name_or_path", None)
    return name if isinstance(name, str) and name else None


def _cached(repo: str) -> Path | None:
    """Return the folder of a repository in the hub's cache, without downloading."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        config_file = try_to_load_from_cache(repo, "config.json")
    except HFValidationError:
        return None
    return Path(config_file).parent if isinstance(config_file, str) else None


@dataclass(frozen=True)
class _Size:
    """The rank at one target, and alpha if it was given."""

    rank: int
    alpha: float | None

    @classmethod
    def of(
        cls, name: str, rank: int, alpha: float | None, ranks: Mapping[str, int] | None,
        alphas: Mapping[str, float] | None,
    ) -> _Size:  # fmt: skip
        size = cls(_by_pattern(ranks, name, rank), _by_pattern(alphas, name, alpha))
        if size.rank < 1:
            why = f"rank_pattern gives this layer the rank {size.rank}, which is below 1"
            raise UsageError(why, where=name, cure="Pass a rank of at least 1 in rank_pattern=")
        return size

    def attributes(self, use_rslora: bool) -> dict[str, float]:
        if self.alpha is None:
            if use_rslora:
                raise UsageError("use_rslora=True divides alpha, which is not given", where="alpha", cure="Pass alpha=")
            return {}
        return {"scaling": self.alpha / (self.rank**0.5 if use_rslora else self.rank)}


def _by_pattern(patterns: Mapping[str, Value] | None, name: str, otherwise: Value) -> Value:
    """Return the value of the first pattern that matches the end of `name`, as in PEFT; `otherwise` if none matches."""
    for pattern, value in (patterns or {}).items():
        if _pattern(f"re:(.*\\.)?({pattern})").fullmatch(name):
            return value
    return otherwise


def _refuse(method: str, given: Mapping[str, object]) -> None:
    name = next((name for name, value in given.items() if value), None)
    if name is not None:
        raise UsageError(f"{method} does not use {name}", where=name, cure=f"Omit {name}=")


def _seen(model: nn.Module, paths: Sequence[str], init: str, data: Iterable[object] | None) -> dict[str, Moments]:
    if (data is not None) != (init in OF_DATA):
        why = f"init={init!r} {'needs data' if data is None else 'does not use data'}"
        raise UsageError(why, where="data", cure=f"Pass data= only if init= is one of {', '.join(sorted(OF_DATA))}")
    return {} if data is None else moments_of(model, paths, data)


def _shared_out(sizes: Mapping[str, _Size], seen: Mapping[str, Moments], rho: float) -> dict[str, _Size]:
    """Redistribute ranks as EVA does: keep the directions that explain the largest shares of their layers' variance.

    The sum of all ranks stays the same. A layer's new rank is at most `rho` times its old rank. A layer's alpha is
    scaled with its rank, so alpha / rank stays the same. The result omits layers that keep no direction.
    """
    most = {path: round(size.rank * rho) for path, size in sizes.items()}
    shares = [seen[path].components()[0][: most[path]] for path in sizes]
    owners = [path for path, share in zip(sizes, shares, strict=True) for _ in share]
    order = torch.cat(shares).argsort(descending=True, stable=True)[: sum(size.rank for size in sizes.values())]
    counts = Counter(owners[i] for i in order.tolist())
    return {
        path: _Size(counts[path], None if size.alpha is None else size.alpha * counts[path] / size.rank)
        for path, size in sizes.items()
        if counts[path]
    }


def _started(
    cls: type[Update], model: nn.Module, path: str, target: Target, init: str, rank: int,
    attributes: Mapping[str, object], seen: Moments | None,
) -> tuple[Update, ...]:  # fmt: skip
    """Return a new LoRA or DoRA update.

    If the initialiser subtracts a part of the weight, return two updates: a `residual` update, which subtracts this
    part, and then the LoRA or DoRA update.
    """
    W, module = _weight(model, path, target), _module(model, path)
    try:
        cls.check_axes(tuple(W.shape))
        like = cls.initial(W, None, rank, lambda shape: W.new_zeros(shape), **attributes)
        scaling: Any = like.attributes["scaling"]
        place = StartPlace(W.float(), rank, float(scaling), isinstance(module, nn.Embedding), seen)
        start = start_of(init, place)
    except AdapterkitError as error:
        raise error.at(where=f"{path}: {cls.__name__.lower()}") from None
    update = like.replace(A=start.A.to(W.dtype), B=start.B.to(W.dtype))
    return (update,) if start.taken is None else (start.taken.map(lambda leaf: torch.as_tensor(leaf).to(W)), update)


def _copied(leaf: object) -> Tensor:
    """Copy a tensor to new, contiguous memory, as if it had been read from a file."""
    return torch.as_tensor(leaf).detach().clone(memory_format=torch.contiguous_format)


def _random(generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Random:
    return lambda shape: torch.rand(shape, generator=generator, dtype=dtype) * 2 - 1


def _fresh(
    cls: type[Update], model: nn.Module, path: str, target: Target, rank: int, generator: torch.Generator,
    attributes: Mapping[str, object],
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
    """Return the module at a path, or None if the path names a parameter."""
    parent, _, name = path.rpartition(".")
    return model.get_submodule(parent)._modules.get(name)


def _shape(model: nn.Module, path: str, target: Target) -> tuple[int, ...]:
    """Return the weight's shape as `(out, in, *k)`; for stacked experts, the shape of one expert's weight."""
    module = _module(model, path)
    if module is not None and not _weighted(module):
        return tuple(_as_if_square(module, path).shape)
    weight: Any = getattr(module, "weight", None)
    if is_lazy(weight):
        cure = "Call the model once, so that the module gets its sizes from the input"
        raise Unsupported(f"this {type(module).__name__} has no weight yet", where=path, cure=cure)
    stored = tuple(model.get_parameter(path).shape) if module is None else stored_shape(module)
    return tuple(view(torch.empty(stored, device="meta"), target).shape)[int(target.stacked) :]


def _weight(model: nn.Module, path: str, target: Target) -> Tensor:
    """Return the weight, `[out, in, *k]` or `[e, out, in, *k]`, on the CPU, in at least float32."""
    module: Any = _module(model, path)
    if module is not None and not _weighted(module):
        return _as_if_square(module, path)
    if module is None:
        stored: Tensor = model.get_parameter(path)
    else:
        stored = dequantized(module) if is_packed(module) else module.weight
    narrow = stored.dtype.itemsize < 2 and (module is None or not casts_layerwise(module))
    if not stored.is_floating_point() or narrow:
        raise Unsupported(f"the weight has dtype {stored.dtype}", where=path, cure="Load the base unquantized")
    return view(_read(model, stored, path), target)


def _read(model: nn.Module, stored: Tensor, where: str) -> Tensor:
    """Return a tensor of the base on the CPU, in at least float32. Call `check_on_hand` before.

    Raises:
        Unsupported: the tensor is on the meta device and has no values.
    """
    if stored.is_meta:
        tensor = put_away(model, stored)
        if tensor is None or tensor.is_meta:
            cure = "Load the weights first: model.load_state_dict(state, assign=True), or from_pretrained"
            raise Unsupported("the weight is on the meta device", where=where, cure=cure)
        stored = tensor
    wide = torch.float32 if stored.dtype.itemsize < 2 else torch.promote_types(stored.dtype, torch.float32)
    return whole(stored.detach()).to("cpu", wide)


def _weighted(module: nn.Module) -> bool:
    return isinstance(getattr(module, "weight", None), nn.Parameter) or is_packed(module)


def _as_if_square(module: nn.Module, path: str) -> Tensor:
    """Return zeros of shape `[out, out]`, to be used as the weight of a module that has no weight of its own.

    `out` is the number of outputs of the last submodule that has a weight. Embeddings are used only if no other
    submodule has a weight. T5's attention, for example, ends with an embedding that stores position biases. The number
    of outputs of this embedding is the number of heads, not the attention's number of outputs.
    """
    parts = [part for part in module.modules() if _weighted(part)]
    parts.sort(key=lambda part: not isinstance(part, nn.Embedding))
    if not parts:
        why = "neither this module nor any submodule has a weight, so its number of outputs is unknown"
        raise Unsupported(why, where=path, cure="Build the update from tensors instead")
    target = Target(path, stored_layout(parts[-1]) or "out *in")
    size = view(torch.empty(stored_shape(parts[-1]), device="meta"), target).shape[0]
    return torch.zeros(size, size)


def _bias(model: nn.Module, path: str) -> Tensor | None:
    """Return a module's bias, or the bias that belongs to a parameter (`in_proj_bias` for `in_proj_weight`)."""
    stem, weight_word, tail = path.rpartition("weight")
    bias = _parameter(model, f"{path}.bias")
    if bias is None and weight_word:
        bias = _parameter(model, f"{stem}bias{tail}")
    return None if bias is None else _read(model, bias, path)


def _parameter(model: nn.Module, path: str) -> Tensor | None:
    """Return the parameter at a path, or None. The search does not list all parameters: it runs for each target."""
    module: nn.Module | None = model
    *names, last = path.split(".")
    for name in names:
        module = None if module is None else module._modules.get(name)
    return None if module is None else module._parameters.get(last)


def _parameter_layout(model: nn.Module, path: str, stored: Tensor) -> str:
    """Return the axis order of a target that is a parameter, not a module.

    The order follows from the model's family, from the class of the parameter's module, or from the number of experts.
    """
    config: Any = getattr(model, "config", None)
    words = config.to_dict() if hasattr(config, "to_dict") else {}
    experts = {words.get(name) for name in ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")}
    stacked = stored.ndim > 2 and stored.shape[0] in experts
    turned = stored_in_out(path, words)
    owner = model.get_submodule(path.rpartition(".")[0])
    known = turned is not None or isinstance(owner, nn.MultiheadAttention | nn.RNNBase)
    if stored.ndim < 2 or stacked or (stored.ndim == 2 and known):
        return f"{'e ' if stacked else ''}{'in out *k' if turned else 'out *in'}"
    why = f"the axis order of this parameter of shape {list(stored.shape)} is unknown"
    raise UsageError(why, where=path, cure=f"Pass layout=, one of {', '.join(map(repr, LAYOUTS))}")


def _matching(
    model: nn.Module, targets: Choice | Sequence[Choice], exclude: Choice | Sequence[Choice],
    layers: int | Sequence[int] | None, outer: bool,
) -> list[str]:  # fmt: skip
    modules = {n: m for n, m in model.named_modules() if n and _weighted(m)}
    if outer:
        modules = {n: m for n, m in model.named_modules() if n and type(m).forward is not nn.Module.forward}
    weights = {f"{name}.{kind}" for name in modules for kind in ("weight", "bias")}
    module_parameters = [name for name, _ in model.named_parameters() if not is_leaf_name(name)]
    parameters = [name for name in module_parameters if name not in weights and not outer]
    names = {name: unwrapped(model, name) for name in (*modules, *parameters)}
    matching = {name for choice in _choices(targets) for name in _chosen(model, choice, modules, names)}
    matching -= {name for choice in _choices(exclude) for name in _chosen(model, choice, modules, names)}
    if layers is not None:
        wanted = {layers} if isinstance(layers, int) else set(layers)
        numbers = {name: re.match(r".*?\.[^.]*\.(\d+)\.", f".{names[name]}") for name in matching}
        matching = {name for name, match in numbers.items() if match and int(match[1]) in wanted}
    if not matching:
        cure = "Correct targets=, exclude= or layers="
        raise TargetNotFound("no target remains", where=f"exclude={exclude}, layers={layers}", cure=cure)
    return [name for name in names if name in matching]


def _choices(given: Choice | Sequence[Choice]) -> list[Choice]:
    return [given] if isinstance(given, str | re.Pattern | type) else list(given)


def _chosen(model: nn.Module, choice: Choice, modules: dict[str, nn.Module], names: Mapping[str, str]) -> list[str]:
    if isinstance(choice, type):
        selected = [name for name, module in modules.items() if isinstance(module, choice)]
    elif choice == "all-linear":
        head = _head(model)
        selected = [name for name, module in modules.items() if module is not head and _is_linear(module)]
    elif isinstance(choice, str) and not choice.startswith("re:"):
        selected = [name for name, plain in names.items() if _matches(plain, [choice])]
    else:
        selected = [name for name, plain in names.items() if _pattern(choice).fullmatch(plain)]
    if not selected:
        cure = nearest(str(choice), names.values()) or "Use names from model.named_modules() and named_parameters()"
        why = "no matching module or parameter that the method can adapt"
        raise TargetNotFound(why, where=str(choice), cure=cure)
    return selected


def _pattern(choice: str | re.Pattern[str]) -> re.Pattern[str]:
    try:
        return re.compile(choice.removeprefix("re:") if isinstance(choice, str) else choice)
    except re.error as error:
        cure = "Correct the expression, or pass a glob without the prefix re:"
        raise UsageError(f"not a regular expression: {error}", where=str(choice), cure=cure) from None


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or Conv1D.takes(module) or is_packed(module)


def _head(model: nn.Module) -> nn.Module | None:
    """Return the output head, which "all-linear" skips. The head is determined as in PEFT."""
    of: Any = model
    if not hasattr(model, "get_output_embeddings"):
        return None
    head: nn.Module | None = of.get_output_embeddings()
    return head if head is not None else getattr(model, "score", getattr(model, "classifier", None))


def create_context(
    model: nn.Module, cls: type[ContextUpdate], targets: Choice | Sequence[Choice], tokens: int, seed: int,
    attributes: Mapping[str, object],
) -> Adapter:  # fmt: skip
    """Return a new adapter that adds context to the model, with sizes that fit the model and its config.

    Args:
        model: the model that the adapter is for.
        cls: the method's class.
        targets: for methods that adapt attention modules, globs for the names of these modules; other methods ignore
            `targets`.
        tokens: the number of virtual tokens.
        seed: the seed of the random numbers.
        attributes: the method's attributes. If the method stores embeddings of tokens, its attributes may include
            `index`, a list of token ids. The virtual tokens then start as the embeddings of these ids.

    Raises:
        TargetNotFound: no attention module has a name that matches `targets`.
        UsageError: `attributes` contains an attribute that the method does not have.
        Unsupported: the model's config does not contain the sizes that the method needs.
    """
    embedding: Any = embedding_of(model)
    check_on_hand(model, [("input embedding", embedding.weight)])
    W = _read(model, embedding.weight, "input embedding").mT
    generator = torch.Generator().manual_seed(seed)

    def random(shape: tuple[int, ...]) -> torch.Tensor:
        return torch.rand(shape, generator=generator, dtype=W.dtype) * 2 - 1

    given: dict[str, Any] = dict(attributes)
    if cls.place in ("past", "prefix"):
        given.setdefault("sizes", sizes_of(model))
        if given["sizes"].keys() != {"layers", "heads", "d"}:
            why = "the model's config does not give its number of layers and heads"
            raise Unsupported(why, cure="Pass sizes=dict(layers=, heads=, d=)")

    def new_update() -> ContextUpdate:
        try:
            return cls.initial(W, None, tokens, random, **given).map(_copied)
        except TypeError as error:
            known = ", ".join(("index", *cls.attribute_fields()))
            raise UsageError(
                str(error).rpartition("() ")[2], where=cls.__name__, cure=f"Choose among {known}"
            ) from None

    paths = _paths(model, cls, targets, embedding.weight)
    # Embeddings that share one weight get the same update, and so the same new tokens.
    same = new_update() if cls.place == "vocabulary" else None
    adapter = Adapter({Target(path): (same or new_update(),) for path in paths})
    stored = _stored_base(model)
    adapter = adapter.step("create", **stored) if stored else adapter
    adapter.validate()
    return adapter


def _paths(model: nn.Module, cls: type[ContextUpdate], targets: Choice | Sequence[Choice], table: Tensor) -> list[str]:
    if cls.place == "vocabulary":
        sharing = set(names_sharing(model, table))
        alike = [name for name, module in model.named_modules() if isinstance(module, nn.Embedding)]
        return [name for name in alike if f"{name}.weight".lstrip(".") in sharing]
    if cls.place not in ("attention", "prefix"):
        return [""]
    globs = ["*"] if targets == "all-linear" else [str(choice) for choice in _choices(targets)]
    takes = is_attention if cls.place == "prefix" else _has_heads
    paths = [name for name, module in model.named_modules() if takes(module) and _matches(name, globs)]
    if not paths:
        cure = "Pass globs that match names of model.named_modules()"
        kind = "from the transformers library" if cls.place == "prefix" else "like Llama's or GPT-2's"
        raise TargetNotFound(f"no attention module {kind} matches", where=str(targets), cure=cure)
    return paths


def _matches(name: str, globs: list[str]) -> bool:
    return any(fnmatchcase(name, glob) or fnmatchcase(name, f"*.{glob}") for glob in globs)


def _has_heads(module: nn.Module) -> bool:
    try:
        heads_of(module)
    except Unsupported:
        return False
    return True
