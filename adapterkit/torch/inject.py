"""Attach an adapter to a live model without changing its module tree or state dict."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from ..core.adapter import Adapter, Target, check_adapter
from ..core.arguments import check_factor, checks_types
from ..core.updates import Update
from ..errors import ShapeMismatch, TargetNotFound, Unsupported, UsageError
from ..formats._trained import as_trained
from ..io.lazy import as_torch
from ..merging.planned_update import PlannedUpdate
from ..merging.ties import UNTIE, acting, loses_bias, parse_tied, same
from ..methods.arrow import Arrow
from ..methods.lora import LoRA
from ..methods.xlora import XLoRA
from ..naming.binding import Site, apart, check_site, find_parts, find_sites, fits, with_layouts
from ..naming.moves import same_end
from ..naming.renames import Rename, parse_renames
from ..naming.ties import tie_of
from .call_recorder import CallRecorder, words_of
from .context import ContextPart, parts_of
from .folding import change_alike
from .forward_hook import ForwardHook, hook_at, names_of
from .handle import Handle
from .layers import check_dropout, device_of, dropout_of, is_packed, layer_of, stored_layout, stored_shape
from .leaves import (
    LiveUpdates,
    Registration,
    base_parameters,
    casts_layerwise,
    compute_dtype,
    is_leaf_name,
    loading_device,
    names_sharing,
)
from .parts import OutputSite, Part, find_output_site
from .scopes import Switch
from .sharding import check_gathered, check_unwrapped
from .structure import embedding_of, unwrapped, wrapped
from .transaction import all_or_nothing
from .weights import tensor_at

# Add experts to a router. A router is stored in a file that contains the names of the experts, but not their tensors.
# The names may be paths, but adapterkit never opens these paths, because the file is untrusted. So callers pass the
# experts.


Pairs = Mapping[str, LoRA]
"""The LoRA updates of one expert, keyed by the target's path. The tensors of the updates are torch tensors."""


def with_experts(names: Callable[[], Sequence[str]], adapter: Adapter, experts: Sequence[Adapter]) -> Adapter:
    """Add experts to a router: the router's updates get the experts' LoRA factors, stacked along a new first axis.

    Args:
        names: a function that returns the names of the model's modules, in the order of the modules in the model.
        adapter: any adapter. If it needs no experts, it is returned unchanged.
        experts: plain LoRA adapters, in the router's order.

    Raises:
        UsageError: experts are missing, or no update needs the given experts, or the number of experts does not fit an
            Arrow router.
        Unsupported: an expert is not plain LoRA, or the adapter has other updates at the router's target.
        ShapeMismatch: the experts have different shapes (for Arrow: different shapes or ranks), or the number of
            experts does not fit an X-LoRA router.
        TargetNotFound: an expert has no LoRA at the target of an Arrow router.
    """
    needy = [(target, update) for target, update in adapter if getattr(update, "lacks_experts", False)]
    if not needy:
        if experts:
            raise UsageError("this adapter needs no separate experts", where="experts", cure="Omit experts=")
        return adapter
    if not experts:
        cure = "Pass experts=, a list of the expert adapters in the router's order"
        why = "the router's experts are separate adapters, and none are given"
        raise UsageError(why, where=f"{needy[0][0]}: {needy[0][1].method}", cure=cure)
    pairs = [_pairs(expert, position) for position, expert in enumerate(experts)]
    updates: dict[Target, tuple[Update, ...]] = {}
    for target, group in adapter.updates.items():
        if not any(getattr(update, "lacks_experts", False) for update in group):
            updates[target] = group
            continue
        router, *others = group
        if others:
            why = "there are other updates at the router's target"
            raise Unsupported(why, where=str(target), cure="Put each update into a separate adapter")
        if isinstance(router, XLoRA):
            updates |= _of_classifier(names, router, pairs)
        else:
            updates[target] = (_of_prototypes(target, router, pairs),)
    return adapter.replace(updates=updates)


def _pairs(expert: Adapter, position: int) -> Pairs:
    pairs: dict[str, LoRA] = {}
    for target, update in expert:
        where = f"experts[{position}]: {target}"
        plain = isinstance(update, LoRA) and update.bias is None and len(update.A.shape) == 2
        if not plain or target.stacked or target.rows or target.path in pairs:
            why = (
                f"the update is {update.method}, but a router needs plain LoRA "
                "(one update for a whole layer, without a bias)"
            )
            raise Unsupported(why, where=where, cure="Convert the expert to plain LoRA first")
        pairs[target.path] = update.map(as_torch)  # type: ignore[assignment]
    return pairs


def _of_classifier(
    names: Callable[[], Sequence[str]], router: XLoRA, experts: Sequence[Pairs]
) -> dict[Target, tuple[Update, ...]]:
    """Return an X-LoRA update for each layer that at least one expert changes.

    If an expert does not change a layer, its factors in the layer's update are zeros.
    """
    logits, count = router.last.shape[0], len(experts)
    changed = {path for expert in experts for path in expert}
    paths = _in_order(names(), changed) if logits != count else sorted(changed)
    if logits not in (count, count * len(paths)):
        why = (
            f"the router has {logits} logits, which do not fit {count} experts at {len(paths)} layers: there must be "
            f"{count} or {count * len(paths)} logits"
        )
        raise ShapeMismatch(why, where="(model): xlora.last", cure="Pass all experts in experts=, in router order")
    apart = logits != count
    return {
        Target(path): (router.replace(**_stacked(path, experts), place=position if apart else 0),)
        for position, path in enumerate(paths)
    }


def _in_order(names: Sequence[str], paths: set[str]) -> list[str]:
    """Sort paths in the order of the model's modules.

    A path and a module's name also match if one ends with the other: `layers.0` matches `model.layers.0`.
    """

    def position(path: str) -> int:
        return next((at for at, name in enumerate(names) if same_end(name, path)), len(names))

    exact = {name: at for at, name in enumerate(names)}
    return sorted(paths, key=lambda path: (exact.get(path, position(path)), path))


def _of_prototypes(target: Target, router: Update, experts: Sequence[Pairs]) -> Update:
    """Return the Arrow update of one layer, with the factors and the prototypes of the task experts.

    The general experts come last in `experts`. The mean of the general experts' factors is subtracted from the factors
    of each task expert.
    """
    assert isinstance(router, Arrow)
    tasks = router.tasks or len(experts) - router.general
    if tasks + router.general != len(experts) or router.top_k > tasks:
        why = (
            f"the router has {tasks} task experts (top_k is {router.top_k}) and {router.general} general experts, "
            f"which does not fit the {len(experts)} experts that are given"
        )
        raise UsageError(why, where=f"{target}: arrow", cure="Pass all experts in experts=, task experts first")
    absent = next((position for position, expert in enumerate(experts) if target.path not in expert), None)
    if absent is not None:
        why = "the expert changes nothing at this target"
        raise TargetNotFound(why, where=f"experts[{absent}]: {target}", cure=_ALIKE)
    stacked = _stacked(target.path, experts, one_rank=True)
    A, B, strengths = (stacked[name] for name in ("A", "B", "strengths"))
    if router.general:
        A, B = (each[:tasks] - each[tasks:].mean(0) for each in (A, B))
    # Compute the prototypes from `B @ A` without the scaling: a scaling changes at most the sign of the first right
    # singular vector, and Arrow ignores the sign.
    prototypes = torch.stack([_prototype(*pair) for pair in zip(A, B, strict=True)])
    return router.replace(
        A=A, B=B, strengths=strengths[:tasks], prototypes=prototypes, idle_A=None, idle_B=None, scaling=1.0
    )


def _prototype(A: Tensor, B: Tensor) -> Tensor:
    """Return the first right singular vector of `B @ A`. The product itself, `[out, in]`, is not computed."""
    _, R = torch.linalg.qr(B.double())
    _, _, V = torch.linalg.svd(R @ A.double(), full_matrices=False)
    first: Tensor = V[0].to(A.dtype)
    return first


def _stacked(path: str, experts: Sequence[Pairs], *, one_rank: bool = False) -> dict[str, Tensor]:
    """Stack the experts' LoRA factors for one path.

    Factors of smaller rank are padded with zeros. An expert without factors for the path gets zeros.
    """
    pairs_of_experts = [expert.get(path) for expert in experts]
    present = [pair for pair in pairs_of_experts if pair is not None]
    sizes = {(pair.A.shape[1], pair.B.shape[0]) for pair in present}
    ranks = {pair.A.shape[0] for pair in present}
    if len(sizes) > 1 or (one_rank and len(ranks) > 1):
        raise ShapeMismatch("the experts have different shapes or ranks", where=path, cure=_ALIKE)
    ((inputs, outputs),) = sizes
    # A narrower dtype would round the factors of the other experts, and the scalings.
    dtype = reduce(torch.promote_types, (tensor.dtype for pair in present for tensor in (pair.A, pair.B)))
    A = present[0].A.new_zeros(len(pairs_of_experts), max(ranks), inputs, dtype=dtype)
    B = present[0].B.new_zeros(len(pairs_of_experts), outputs, max(ranks), dtype=dtype)
    for position, pair in enumerate(pairs_of_experts):
        if pair is not None:
            A[position, : len(pair.A)], B[position, :, : len(pair.A)] = pair.A, pair.B
    scalings = [0.0 if pair is None else pair.scaling for pair in pairs_of_experts]
    strengths = A.new_tensor(scalings, dtype=torch.promote_types(dtype, torch.float32))
    return {"A": A, "B": B, "strengths": strengths}


_ALIKE = "Pass experts that were trained on this base with the same LoRA config"


# Attach an adapter.


@checks_types
def inject(
    model: nn.Module, adapter: Adapter, *, name: str = "default", weight: float = 1.0, trainable: bool = False,
    freeze: bool = True, dropout: float | None = None, active: bool = True, experts: Sequence[Adapter] = (),
    tied: str | Mapping[str, str] | None = None, rename: str | Sequence[str] = (),
) -> Handle:  # fmt: skip
    """Attach an adapter to a model. Each target then returns `y + weight * (f(x) - y)`.

    Here `y` is the target's output without the adapter, and `f(x)` its output with the adapter.

    With `trainable=True`, the adapter's trained tensors become parameters of the model. All other tensors of the
    adapter become non-persistent buffers. So optimizers, Trainers, DDP, FSDP2 and `model.to()` find the adapter's
    tensors. The base's module tree and the keys of its state dict do not change. To save the adapter, get it from
    `handle.adapter()`. Or set `handle.checkpoint = "adapter"`: the model's state dict, which training frameworks save
    and load, then contains the adapter instead of the base.

    Args:
        model: the model. The adapter's targets must be names of the model's modules, or names that can be resolved to
            these, as in `adapterkit.merge`. Updates of an embedding's token rows also change a head that shares the
            embedding's parameter (a tied head), as in PEFT's forward. They do not change the head if the adapter has
            separate updates of the head's token rows.
        adapter: the adapter.
        name: the adapter's name for `route`. Each attached adapter needs a different name.
        weight: the factor by which the adapter's change is multiplied.
        trainable: whether to train the adapter. Its tensors become parameters in float32 or wider, which the forward
            casts to the layer's dtype. Tensors that the method lists as `frozen` do not become parameters.
        freeze: with `trainable=True`, whether to set `requires_grad` of all parameters of the base to False, as every
            method assumes. `handle.remove()` restores the setting. Pass False to train the base too.
        dropout: with `trainable=True`, the dropout probability while the module is in training mode. As in PEFT,
            dropout sets elements of the adapter's input to 0 (`lora_dropout`). For some methods, dropout instead sets
            rows of the weight change to 0, or replaces rotations by the identity. If not given, the probability comes
            from the adapter's PEFT config, or else from `create`.
        active: whether the adapter is on; see `handle.set_active`.
        experts: the experts of a router whose file does not contain them (X-LoRA, Arrow): plain LoRA adapters, in the
            router's order.
        tied: which layers an update changes if an embedding and a head share their parameter: `untie` (only the layer
            that the update names), `merge` (all layers that share the parameter), or a choice for each kind of update,
            as in `adapterkit.merge`. If not given, the update changes the same layers as in the tool that trained the
            adapter. If this tool is unknown, the update changes only the layer that it names; updates of an embedding's
            token rows are the exception (see `model`).
        rename: rules for names that cannot be resolved, as in `adapterkit.merge`.

    Raises:
        TargetNotFound: a target is not in the model. The message suggests the nearest names.
        ShapeMismatch: the shape of a tensor does not fit its layer.
        Unsupported: a layer does not support a method, or does not support it together with the adapters that are
            already attached.
        UsageError: the name is taken or no text, a router lacks its experts, `tied` is not a known choice, dropout is
            not a probability, or the weight is not a finite number.

        If an error is raised, nothing is attached.
    """
    check_adapter(adapter)
    if not isinstance(model, nn.Module):
        cure = "Pass a torch.nn.Module as the first argument"
        raise UsageError(f"the model is a {type(model).__name__}, not a torch module", cure=cure)
    adapter.validate()
    check_factor(weight, "weight")
    if not isinstance(name, str):  # `route` takes None for the base.
        raise UsageError(f"the adapter's name is {name!r}, not a text", where="name", cure="Pass a text, or omit name=")
    if name in names_of(model):
        raise UsageError("an adapter with this name is attached", where=name, cure="Pass another name=")
    check_gathered(model)
    if trainable:
        check_unwrapped(model)
    adapter = wrapped(model, adapter)
    drop = (dropout_of(adapter) if dropout is None else dropout) if trainable else 0.0
    for _, update in adapter:
        check_dropout(drop, type(update), update.method)
    adapter = with_experts(lambda: [name for name, _ in model.named_modules() if name], adapter, experts)
    adapter.validate()
    live_names = [name for name, _ in (*model.named_modules(), *model.named_parameters(remove_duplicate=False))]
    rules = parse_renames(rename, [target.path for target in adapter.updates], live_names)
    weights, context = apart(adapter)
    if weight != 1 and context.updates:
        why = "an adapter that adds context can only have the weight 1"
        raise UsageError(why, where=name, cure="Omit weight=")
    for target, updates in weights.updates.items():
        _refuse_parameter(model, target, updates)
    switch, registration = Switch(name, weight, active), Registration(model, name, trainable)
    around = _contexts(model, context, switch, registration, rules)
    recorder = CallRecorder(switch, {word for _, update in weights for word in words_of(model, update)})
    attached: list[tuple[ForwardHook, Part]] = []
    together: dict[int, tuple[ForwardHook, list[Part]]] = {}
    live_by_part: dict[int, LiveUpdates] = {}
    given: dict[int, Update] = {}
    sites = [_trained(model, site, adapter, given) for site in _sites(model, weights, rules)]
    shared = _tied(model, sites, adapter, parse_tied(tied))
    once: dict[Hashable, tuple[Part, Part]] = {}
    twice: list[tuple[Target, Part]] = []
    for site in [piece for whole in (*sites, *shared) for piece in _pieces(whole)]:
        outer = site.updates[0].kind == "output"
        holder, part = _outer(model, site, switch, recorder) if outer else _inner(model, site, switch)
        # If a module has several names, parts that target it by different names get the same key.
        place = id(holder), part.weight, part.bias, part.target.rows, part.output_site is None
        first, standing = once.get(place, (part, part))
        if first.target.path != part.target.path:
            _check_twin(first, part)
            twice.append((part.target, standing))
            continue
        bound = registration.bind(site.updates, holder, _like(model, site, holder), _where(model, site.target))
        part = replace(part, bound=bound, dropout=drop)
        once[place] = (first, part)
        if drop and not part.direct:
            why = "dropout is not supported for a module that runs its own forward on a changed weight"
            raise Unsupported(why, where=str(site.target), cure="Pass dropout=0, or omit this target")
        live_by_part[id(part)] = _as_given(bound, site.updates, given)
        if id(holder) not in together:
            together[id(holder)] = hook_at(holder), []
        hook, others = together[id(holder)]
        _check_together(hook, [part, *others])
        others.append(part)
        attached.append((hook, part))
    loaded: dict[Target, tuple[LiveUpdates, ...]] = {}
    along = {site.target for site in shared}
    with all_or_nothing(model):
        leaves = registration.commit()  # All checks have passed, so no error about the arguments can follow.
        for hook, part in attached:
            hook.attach(part)
            if part.target in along:
                continue
            loaded[part.target] = (*loaded.get(part.target, ()), live_by_part[id(part)])
        for target, part in twice:
            loaded[target] = (*loaded.get(target, ()), live_by_part[id(part)])
        hooks = [*(hook for hook, _ in attached), *_readers(part.output_site for _, part in attached)]
        if recorder.asks:
            hooks.append(hook_at(model))
            hooks[-1].record_call(recorder)
        for module, surrounding in around:
            hooks.append(hook_at(module))
            hooks[-1].attach(surrounding)
            loaded[surrounding.target] = (surrounding.bound,)
        for hook in hooks:
            hook.home = hook.home or weakref.ref(model)
        handle = Handle(adapter, loaded, switch, list(dict.fromkeys(hooks)), model, leaves)
        handle._enter(frozen=trainable and freeze)
        return handle


def _check_twin(first: Part, second: Part) -> None:
    """Check that two parts, which target one module by different names, have the same updates.

    Only the first part is attached.

    Raises:
        Unsupported: the updates differ.
    """
    if not change_alike([first, second]):
        why = f"this target and {first.target} are the same module, but their updates differ"
        raise Unsupported(why, where=str(second.target), cure="Omit one of the two targets")


def _where(model: nn.Module, target: Target) -> str:
    """Return the target as text, without the names of wrapper modules, which checkpoints do not contain."""
    return str(replace(target, path=unwrapped(model, target.path)))


def _trained(model: nn.Module, site: Site, adapter: Adapter, given: dict[int, Update]) -> Site:
    """Replace a site's updates so that the layer computes the same as in the tool that trained the adapter.

    The function adds an entry to `given` for each update: the id of the new update is the key, and the update that the
    adapter stores is the value.
    """
    if site.weight is None or site.target.stacked or site.target.rows is not None:
        return site
    module = model.get_submodule(site.weight.rpartition(".")[0])
    layer = layer_of(module, module.forward)
    if layer is None:
        return site

    def rewritten(update: Update) -> Update:
        # A composition block has the updates of several adapters; one is None where its adapter has no update.
        children: Sequence[Update | None] = getattr(update, "children", ())
        if not children:
            return as_trained((update,), adapter.recipe, layer.shape, site.target, layer.padding)[0]
        new = tuple(None if child is None else rewritten(child) for child in children)
        same = all(one is other for one, other in zip(new, children, strict=True))
        return update if same else update.replace(children=new)

    updates = tuple(map(rewritten, site.updates))
    given |= {id(new): old for new, old in zip(updates, site.updates, strict=True)}
    return replace(site, updates=updates)


def _as_given(bound: LiveUpdates, updates: Sequence[Update], given: Mapping[int, Update]) -> LiveUpdates:
    """Convert the updates of `bound` back to the methods of the adapter's own updates, with the same live tensors.

    The model may run an update of another method, because `_trained` may have replaced the adapter's own update.
    """
    before = [given.get(id(update), update) for update in updates]
    if all(old is new for old, new in zip(before, updates, strict=True)):
        return bound
    live = zip(before, bound.updates, strict=True)
    return LiveUpdates([old.replace(**new.tensors) for old, new in live], bound.leaves)


def _contexts(
    model: nn.Module, context: Adapter, switch: Switch, registration: Registration, rules: Sequence[Rename]
) -> list[tuple[nn.Module, ContextPart]]:
    """Return the modules that need context updates, each with the part to attach to it."""
    names = {f"{name}.": () for name, _ in model.named_modules() if name}
    placed_contexts: dict[Any, Any] = find_parts(context, names, None, rules)
    around = []
    for target, updates in placed_contexts.items():
        part = ContextPart(switch, target, LiveUpdates(updates))
        holder = parts_of(model, part)[0][0]
        bound = registration.bind(updates, holder, _met(model, target), _where(model, target))
        around += parts_of(model, replace(part, bound=bound))
    return around


def _met(model: nn.Module, target: Target) -> Tensor:
    """Return a tensor with the dtype and device that a target's context updates compute with."""
    part = model.get_submodule(target.path)
    # Search the whole model too: a quantized attention module may have only packed weights.
    around = [*part.modules(), *model.modules()]
    first = next(((m, p) for m in around for p in base_parameters(m, False) if p.is_floating_point()), None)
    if first is None or hasattr(part, "get_input_embeddings"):
        embedding: Any = embedding_of(part)
        first = embedding, embedding.weight
    return _computed(model, *first, str(target))


def config_of_model(model: nn.Module) -> dict[str, Any] | None:
    """Return the config of a live transformers model as plain data; None for other models."""
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "to_dict"):
        return None
    words: dict[str, Any] = config.to_dict()
    # `to_dict()` may contain another model type: `LlamaForCausalLM.from_pretrained` of an EXAONE model makes a
    # LlamaConfig whose `model_type` is `exaone`, but its `to_dict()` contains `llama`.
    model_type = getattr(config, "model_type", None)
    return words | ({"model_type": model_type} if isinstance(model_type, str) and model_type else {})


def _sites(model: nn.Module, adapter: Adapter, rules: Sequence[Rename]) -> list[Site]:
    tensor_lists = [model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)]
    shapes = {
        name: tuple(tensor.shape)
        for tensors in tensor_lists
        for name, tensor in tensors
        if not is_leaf_name(name) and not is_lazy(tensor)
    }
    shapes |= {f"{name}.weight": stored_shape(m) for name, m in model.named_modules() if is_packed(m)}
    words = config_of_model(model)
    try:
        modules = [name for name, _ in model.named_modules()]
        placed = find_sites(adapter, shapes, partial=False, modules=modules, config=words, rename=rules).sites
    except TargetNotFound as error:
        _refuse_packed(model, adapter)
        raise error from None
    for site in placed:
        if is_parametrized(model.get_submodule((site.weight or site.bias or "").rpartition(".")[0])):
            why = "the layer is parametrized"
            raise Unsupported(why, where=str(site.target), cure="Remove its parametrizations first")
    sites_known = [_with_class_layout(model, site, shapes) for site in placed]
    asked = iter(with_layouts([site for site, known in sites_known if not known], shapes, words, rules=rules))
    sites = [site if known else next(asked) for site, known in sites_known]
    try:
        for site in sites:
            check_site(site, shapes, biasless=True)
    except TargetNotFound:
        _refuse_packed(model, adapter)
        raise
    return sites


def _tied(
    model: nn.Module, sites: list[Site], adapter: Adapter, tied: str | None
) -> list[Site]:  # fmt: skip
    """Return additional sites for tied layers: an update of one layer may have to change the layer tied to it, too.

    As in merges, `merging.ties` decides which layers each update changes. Live layers are tied if they share one
    parameter object.
    """
    modules = model.named_modules(remove_duplicate=False)
    embeddings = {f"{name}.weight" for name, module in modules if isinstance(module, nn.Embedding)}
    alike: dict[int, list[str]] = {}
    for name, each in model.named_parameters(remove_duplicate=False):
        alike.setdefault(id(each), []).append(name)
    seen: set[tuple[str, ...]] = set()
    added: list[Site] = []
    plain = [s.weight for s in sites if s.weight and not is_packed(model.get_submodule(s.weight.rpartition(".")[0]))]
    for parameter in list({id(p): p for p in (tensor_at(model, path) for path in plain)}.values()):
        names = names_sharing(model, parameter) if parameter.is_meta else alike.get(id(parameter), [])
        # In an offloaded model, tied layers have separate parameters, but `names` is the same for all of these layers.
        # Process each list of names once.
        if tuple(names) in seen:
            continue
        seen.add(tuple(names))
        inputs, heads = [n for n in names if n in embeddings], [n for n in names if n not in embeddings]
        if not inputs or len(heads) != 1:
            continue
        folds_by_weight: dict[str, list[PlannedUpdate]] = {}
        for site in sites:
            if site.weight in names and (fold := _fold(site, tuple(parameter.shape))) is not None:
                folds_by_weight.setdefault(site.weight or "", []).append(fold)
        stored = next((name for name in folds_by_weight if name in inputs), inputs[0])
        # T5 and BART store the embedding as `shared`. If the encoder and the decoder have their own embedding modules,
        # the model never calls the module `shared`.
        read = [name for name in inputs if name.split(".")[-2] != "shared"] or inputs
        choice = tied if tied is not None or _lineage_tells(adapter) else UNTIE
        changed = acting(tie_of(stored, read, heads[0]), folds_by_weight, adapter, choice, [])
        head = model.get_submodule(heads[0].rpartition(".")[0])
        if getattr(head, "bias", None) is not None and loses_bias(changed.get(heads[0], ()), [adapter]):
            _warn_of_bias(heads[0])
        for name, folds in changed.items():
            here = {fold.target for fold in folds_by_weight.get(name, ())}
            for fold in folds:
                if fold.target not in here and not any(same(fold, one) for one in folds_by_weight.get(name, ())):
                    target = replace(fold.target, path=name.removesuffix(".weight"))
                    added.append(Site(target, fold.updates, name, None))
    return added


def _warn_of_bias(head: str) -> None:
    layer = head.removesuffix(".weight")
    warnings.warn(
        f"the bias of {layer} is kept, as in PEFT's own merge; PEFT's forward pass omits this bias if "
        f"token rows of a tied head were trained. To get the same logits as in training, set the bias to zero: "
        f"model.get_submodule({layer!r}).bias.data.zero_()",
        stacklevel=5,  # `_warn_of_bias`, its caller, `inject` and the check of its arguments.
    )


def _fold(site: Site, shape: tuple[int, ...]) -> PlannedUpdate | None:
    updates = tuple(update for update in site.updates if update.kind != "output" and update.changes_weight)
    return PlannedUpdate(site.target, updates, 1.0, 0, False, shape) if updates else None


def _lineage_tells(adapter: Adapter) -> bool:
    """Whether the recipe shows that the adapter was read from a file, or was made by `create` or `extract`.

    The recipe of an adapter that was built in Python does not show where the adapter comes from.
    """
    return any(step.op in ("read", "create", "extract") for step in adapter.recipe)


def _refuse_packed(model: nn.Module, adapter: Adapter) -> None:
    """Raise an error if the weight of a target's module is not a parameter, or does not exist yet."""
    modules = dict(model.named_modules())
    for target in adapter.updates:
        module = modules.get(target.path)
        if module is None:
            continue
        where, kind = str(target), type(module).__name__
        if any(is_lazy(p) for p in module.parameters(recurse=False)):
            cure = "Call the model once, so that the module gets its sizes from the input"
            raise Unsupported(f"this {kind} has no weight yet", where=where, cure=cure)
        weight = module.__dict__.get("weight")
        if isinstance(weight, Tensor) and "weight" not in module._parameters:
            cure = "Call torch.nn.utils.remove_weight_norm, remove_spectral_norm or prune.remove first"
            raise Unsupported(f"a hook computes the weight of this {kind} from other tensors", where=where, cure=cure)
        if not list(base_parameters(module)) and list(module.buffers(recurse=False)):
            raise Unsupported(f"this {kind} stores its weight in its own format", where=where, cure=_UNPACKED)


def _check_together(hook: ForwardHook, parts: list[Part]) -> None:
    """Check that a hook's parts can run together.

    Some parts can run only as formulas. Others can run only in the layer's own forward, with changed parameters. One
    forward cannot do both.
    """
    together = [part for part in (*hook.parts, *parts) if part.output_site is None]
    outer = next((part for part in together if not part.foldable), None)
    inner = next((part for part in together if not part.direct), None)
    if outer and inner:
        methods = [f"{update.method} at {part.target}" for part in (outer, inner) for update in part.updates]
        why = f"{' and '.join(dict.fromkeys(methods))} cannot be attached together"
        cure = "Merge the adapter that changes weights into the base, instead of attaching it"
        raise Unsupported(why, where=str(parts[0].target), cure=cure)


def _pieces(site: Site) -> list[Site]:
    """Split a site in two: the first site gets the updates of weights, the second gets the updates of the output.

    A site that gets no updates is omitted.
    """
    outer = [update.kind == "output" for update in site.updates]
    if outer != sorted(outer):
        why = "an update of weights follows an update of the output"
        raise Unsupported(why, where=str(site.target), cure="Order updates of weights before those of outputs")
    return [
        replace(site, updates=part)
        for part in (site.updates[: outer.count(False)], site.updates[outer.count(False) :])
        if part
    ]


def _refuse_parameter(model: nn.Module, target: Target, updates: Sequence[Update]) -> None:
    """Raise an error if an update changes a module's output, but the target is a parameter."""
    output = next((update.method for update in updates if update.kind == "output"), None)
    parent, _, name = target.path.rpartition(".")
    module: Any = model if output else None
    for part in parent.split(".") if parent else ():
        module = getattr(module, part, None)
    if isinstance(module, nn.Module) and name in module._parameters:
        why = f"{output} changes a module's output, but this target is a parameter, which has no output"
        raise Unsupported(why, where=str(target), cure="Target the module that reads the parameter")


def _outer(model: nn.Module, site: Site, switch: Switch, recorder: CallRecorder) -> tuple[nn.Module, Part]:
    """Return the module whose output changes, and the part that changes the output."""
    path = site.target.path
    _refuse_parameter(model, site.target, site.updates)
    parent, holder = path.rpartition(".")[0], model.get_submodule(path)
    if isinstance(model.get_submodule(parent), nn.MultiheadAttention) and path:
        why = "an nn.MultiheadAttention never calls its output projection, but only reads the projection's weight"
        raise Unsupported(why, where=str(site.target), cure=f"Target {parent}")
    _refuse_fast_path(model, f"{path}.", site)
    output_site = find_output_site(
        holder, site.updates, site.target, switch, lambda name: model.get_submodule(f"{parent}.{name}".lstrip("."))
    )
    asks = any(words_of(model, update) for update in site.updates)
    output_site = replace(output_site, call_words=recorder.take) if asks else output_site
    return holder, Part(switch, site.target, LiveUpdates(site.updates), None, None, False, output_site)


def _inner(model: nn.Module, site: Site, switch: Switch) -> tuple[nn.Module, Part]:
    """Return the module whose forward reads the site's weight or bias, and the part that changes the parameters."""
    holder, prefix = _holder(model, site)
    below, bias = (path and path.removeprefix(prefix) for path in (site.weight, site.bias))
    return holder, Part(switch, site.target, LiveUpdates(site.updates), below, bias, _is_direct(site, holder, prefix))


def _like(model: nn.Module, site: Site, holder: nn.Module) -> Tensor:
    """Return a tensor with the device and dtype that the site's updates compute with."""
    if is_packed(holder):
        return torch.empty(0, device=device_of(holder))
    if site.weight or site.bias:
        return _computed(model, holder, tensor_at(model, site.weight or site.bias or ""), str(site.target))
    # Stop at the first parameter: listing the model's parameters for each site would take quadratic time.
    floating = (p for module in (holder, model) for p in base_parameters(module) if p.is_floating_point())
    first = next(floating, None)
    return torch.empty(0) if first is None else _loaded(model, holder, first, str(site.target))


def _computed(model: nn.Module, holder: nn.Module, W: Tensor, where: str) -> Tensor:
    """Return a tensor with the device and dtype that W has during a forward. Hooks of other tools may change both."""
    W = _loaded(model, holder, W, where)
    return torch.empty(0, dtype=compute_dtype(holder), device=W.device) if casts_layerwise(holder) else W


def _loaded(model: nn.Module, holder: nn.Module, W: Tensor, where: str) -> Tensor:
    """Return W. If W is offloaded, return an empty tensor of W's dtype on the device where W's module computes.

    Raises:
        Unsupported: W is on the meta device, and no hook loads its values. Products with W would be uninitialised
            memory.
    """
    if W.device.type != "meta":
        return W
    device = loading_device(model, holder)
    if device is None:
        why = "the module's weight is on the meta device"
        cure = "Load the weights first: model.load_state_dict(state, assign=True), or from_pretrained"
        raise Unsupported(why, where=where, cure=cure)
    return torch.empty(0, dtype=W.dtype, device=device)


def _readers(sites: Iterable[OutputSite | None]) -> Iterator[ForwardHook]:
    """Add each site's recorder to the hook of the module that reads the residual, and yield this hook."""
    for each in sites:
        if each is not None and each.reader is not None and each.recorder is not None:
            hook = hook_at(each.reader)
            hook.record_input(each.recorder)
            yield hook


def _with_class_layout(model: nn.Module, site: Site, shapes: Mapping[str, tuple[int, ...]]) -> tuple[Site, bool]:
    """Set the target's layout to the axis order in which the module's class stores its weight.

    Returns:
        The site, and whether the layout is known and fits the updates. If False, `with_layouts` must choose the layout.
    """
    if site.weight is None or site.target.stacked:
        return site, False
    layout = stored_layout(model.get_submodule(site.weight.rpartition(".")[0]))
    whole = any("rest" in u.dims() and "in" not in u.dims() for u in site.updates)
    if layout is None or (whole and fits(site.target, site.updates, shapes[site.weight])):
        return site, False
    turned = replace(site, target=replace(site.target, layout=layout))
    return turned, fits(turned.target, turned.updates, shapes[site.weight])


def _holder(model: nn.Module, site: Site) -> tuple[nn.Module, str]:
    """Return the module whose forward reads the site's parameter, and the prefix of this module's parameter names.

    Raises:
        Unsupported: the module does not support one of the updates.
    """
    path = (site.weight or site.bias or "").rpartition(".")[0]
    parent = path.rpartition(".")[0]
    if isinstance(model.get_submodule(parent), nn.MultiheadAttention) and path:
        path = parent
    holder = model.get_submodule(path)
    prefix = f"{path}." if path else ""
    if isinstance(holder, torch.jit.ScriptModule):
        cure = "Inject into the module before torch.jit.script, or torch.jit.trace the model with its adapter"
        raise Unsupported("torch.jit has compiled this module", where=str(site.target), cure=cure)
    direct = _is_direct(site, holder, prefix)
    if is_packed(holder):
        if not direct:
            why = (
                f"only a part of the packed weight of a {type(holder).__name__} would change, but packed weights can "
                "only change as a whole"
            )
            raise Unsupported(why, where=str(site.target), cure=_UNPACKED)
    else:
        parameter = tensor_at(model, site.weight or site.bias or "")
        narrow = parameter.dtype.itemsize < 2 and not casts_layerwise(holder)
        if not parameter.is_floating_point() or narrow:
            why = f"the weight has dtype {parameter.dtype}, but only floats of at least 16 bits can be changed"
            raise Unsupported(why, where=str(site.target), cure=_UNPACKED)
    for update in site.updates:
        lost = site.bias is None and update.changes_bias and update.needs_bias
        if lost and not (direct and update.kind == "additive"):
            why = f"{update.method} changes a bias that the layer does not have"
            raise Unsupported(why, where=str(site.target), cure="Give the layer a bias")
    _refuse_fast_path(model, path, site)
    return holder, prefix


def _refuse_fast_path(model: nn.Module, path: str, site: Site) -> None:
    """Raise an error for a module inside an `nn.TransformerEncoderLayer` if torch's fused path is enabled.

    The fused path reads the parameters of the modules inside the layer, but does not call the modules.
    """
    parts = path.split(".") if path else []
    above = [model.get_submodule(".".join(parts[:count])) for count in range(len(parts))]
    if torch.backends.mha.get_fastpath_enabled() and any(isinstance(m, nn.TransformerEncoderLayer) for m in above):
        why = "the layer is inside an nn.TransformerEncoderLayer, whose fused path bypasses its modules"
        cure = "Call torch.backends.mha.set_fastpath_enabled(False) before injecting"
        raise Unsupported(why, where=str(site.target), cure=cure)


def _is_direct(site: Site, holder: nn.Module, prefix: str) -> bool:
    """Whether the updates can run as formulas over the layer.

    Three conditions must hold: formulas can run on this kind of layer (`TorchLayer.direct`), the updates change the
    layer's whole weight, and the updates' target has the layer's layout.
    """
    layer = layer_of(holder, holder.forward)
    if layer is None or not layer.direct or site.weight != f"{prefix}weight":
        return False
    return site.target.layout == layer.layout and site.target.rows is None


_UNPACKED = "Load the base unquantized, or quantized by bitsandbytes"
