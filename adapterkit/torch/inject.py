"""Injection: an adapter attached to a live model, module tree and state dict unchanged."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..adapter import Adapter
from ..binding import Site, apart, check_site, find_parts, find_sites, fits, with_layouts
from ..errors import Unsupported, UsageError, nearest
from ..tensors.lazy import as_torch
from ..updates import Update
from .context import ContextPart, parts_of
from .handle import Handle
from .layers import layer_of, stored_layout
from .sizes import embedding_of
from .station import Part, Station
from .switch import Switch
from .weights import tensor_at

if TYPE_CHECKING:
    from ..tensors.lazy import Leaf


def inject(
    model: nn.Module, adapter: Adapter, *, name: str = "default", weight: float = 1.0, trainable: bool = False
) -> Handle:
    """Attaches an adapter: the model computes y + weight * (f(x) - y) at each target.

    Args:
        model: any module tree; targets are its dotted names, or differ from them by one prefix.
        adapter: the adapter.
        name: what `route` calls it; one name, one adapter.
        weight: how much of its change is added.
        trainable: its leaves become float32 (or wider) parameters of the handle, cast to the layer's dtype in forward.

    Raises:
        TargetNotFound: a target has no place in the model; names the nearest.
        ShapeMismatch: a shape does not fit.
        Unsupported: a layer cannot take the method.
        UsageError: the name is taken.
    """
    adapter.validate()
    if name in _names(model):
        raise UsageError("an adapter of this name is attached", where=name, cure="Pass another name=")
    weights, context = apart(adapter)
    if weight != 1 and context.updates:
        raise UsageError("context has no half measures", where=name, cure="Leave weight at 1")
    sites, parts = _sites(model, weights), _parts(model, context)
    plans = [_plan(model, site) for site in sites]
    switch, stations, leaves = Switch(name, weight), list[Station](), dict[Any, Tensor]()
    loaded: dict[Any, Any] = {}
    for site, (holder, prefix) in zip(sites, plans, strict=True):
        W = tensor_at(model, site.weight or site.bias or "")
        updates = tuple(_owned(u, W, trainable, leaves) for u in site.updates)
        loaded[site.target] = (*loaded.get(site.target, ()), *updates)
        station = _station(holder)
        below, bias = (path and path.removeprefix(prefix) for path in (site.weight, site.bias))
        station.attach(Part(switch, site.target, updates, below, bias, _is_direct(site, holder, prefix)))
        stations += [station] if station not in stations else []
    for target, updates in parts.items():
        like = _embedded_like(model, target)
        loaded[target] = tuple(_owned(u, like, trainable, leaves) for u in updates)
        for module, part in parts_of(model, ContextPart(switch, target, loaded[target])):
            station = _station(module)
            station.attach(part)
            stations += [station] if station not in stations else []
    return Handle(adapter.replace(updates=loaded), switch, stations, model)


@contextmanager
def route(model: nn.Module, names: Sequence[str | None]) -> Iterator[None]:
    """A different adapter for each row of a batch: inside the `with`, row i goes through `names[i]`, or the base.

    Raises:
        UsageError: no adapter of such a name is attached.
        Unsupported: raised by a forward through a module whose rows cannot be told apart.
        ShapeMismatch: raised by a forward of another number of rows.
    """
    known = _names(model)
    for name in names:
        if name is not None and name not in known:
            raise UsageError("no such adapter is attached", where=name, cure=nearest(name, known) or "Inject it first")
    stations = _stations(model)
    before = [station.route for station in stations]
    try:
        for station in stations:
            station.route = tuple(names)
        yield
    finally:
        for station, old in zip(stations, before, strict=True):
            station.route = old


def _sites(model: nn.Module, adapter: Adapter) -> list[Site]:
    held = [model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)]
    shapes = {name: tuple(tensor.shape) for tensors in held for name, tensor in tensors}
    placed, _, _ = find_sites(adapter, shapes, partial=False)
    config = getattr(model, "config", None)
    words = config.to_dict() if config is not None and hasattr(config, "to_dict") else None
    told = [_told(model, site, shapes) for site in placed]
    asked = iter(with_layouts([site for site, known in told if not known], shapes, words))
    sites = [site if known else next(asked) for site, known in told]
    for site in sites:
        check_site(site, shapes, biasless=True)
    return sites


def _parts(model: nn.Module, context: Adapter) -> dict[Any, Any]:
    """Context updates by the parts of the model that they speak to, checked before anything is attached."""
    names = {f"{name}." for name, _ in model.named_modules() if name}
    found: dict[Any, Any] = find_parts(context, dict.fromkeys(names, ()), None)
    for target, updates in found.items():
        parts_of(model, ContextPart(Switch("", 1), target, updates))
    return found


def _embedded_like(model: nn.Module, target: Any) -> Tensor:
    """A tensor of the dtype and on the device of what context meets."""
    part = model.get_submodule(target.path)
    first = next((p for p in part.parameters() if p.is_floating_point()), None)
    like: Any = embedding_of(part).weight if first is None or hasattr(part, "get_input_embeddings") else first
    return like  # type: ignore[no-any-return]


def _told(model: nn.Module, site: Site, shapes: Any) -> tuple[Site, bool]:
    """The site in the layout of its module's class, where that tells and the updates fit it."""
    if site.weight is None or site.target.stacked:
        return site, False
    layout = stored_layout(model.get_submodule(site.weight.rpartition(".")[0]))
    whole = any("rest" in u.dims() and "in" not in u.dims() for u in site.updates)
    if layout is None or (whole and fits(site.target, site.updates, shapes[site.weight])):
        return site, False
    turned = replace(site, target=replace(site.target, layout=layout))
    return turned, fits(turned.target, turned.updates, shapes[site.weight])


def _plan(model: nn.Module, site: Site) -> tuple[nn.Module, str]:
    """The module whose forward reads the parameter, and its path with a dot."""
    path = (site.weight or site.bias or "").rpartition(".")[0]
    parent = path.rpartition(".")[0]
    if isinstance(model.get_submodule(parent), nn.MultiheadAttention) and path:
        path = parent
    holder = model.get_submodule(path)
    prefix = f"{path}." if path else ""
    parameter = tensor_at(model, site.weight or site.bias or "")
    if not parameter.is_floating_point():
        raise Unsupported(f"weights of {parameter.dtype}", where=str(site.target), cure="Load the base unquantized")
    direct = _is_direct(site, holder, prefix)
    for update in site.updates:
        if update.kind == "context" or (update.kind == "output" and not direct):
            why = f"{update.method} does not apply to a {type(holder).__name__}"
            raise Unsupported(why, where=str(site.target), cure="Choose a linear, convolution or embedding layer")
        if site.bias is None and update.changes_bias and update.needs_bias and not (
            direct and update.kind == "additive"
        ):  # fmt: skip
            why = f"{update.method} changes a bias that the layer does not have"
            raise Unsupported(why, where=str(site.target), cure="Give the layer a bias")
    if torch.nn.utils.parametrize.is_parametrized(holder):
        raise Unsupported("a parametrized weight", where=str(site.target), cure="Remove its parametrizations first")
    _refuse_fast_path(model, path, site)
    return holder, prefix


def _refuse_fast_path(model: nn.Module, path: str, site: Site) -> None:
    """torch's fused encoder layer reads parameters past every forward of the modules that hold them."""
    parts = path.split(".") if path else []
    above = [model.get_submodule(".".join(parts[:count])) for count in range(len(parts))]
    if torch.backends.mha.get_fastpath_enabled() and any(isinstance(m, nn.TransformerEncoderLayer) for m in above):
        why = "inside an nn.TransformerEncoderLayer, whose fused path goes past its modules"
        cure = "Call torch.backends.mha.set_fastpath_enabled(False) before injecting"
        raise Unsupported(why, where=str(site.target), cure=cure)


def _is_direct(site: Site, holder: nn.Module, prefix: str) -> bool:
    layer = layer_of(holder, holder.forward)
    return layer is not None and site.weight == f"{prefix}weight" and _natural(site, layer.layout)


def _natural(site: Site, layout: str) -> bool:
    return site.target.layout == layout and site.target.rows is None


def _owned(update: Update, W: Tensor, trainable: bool, leaves: dict[Any, Tensor]) -> Update:
    owned = {n: _own(leaf, W, trainable and n not in update.frozen, leaves) for n, leaf in update.tensors.items()}
    return update.replace(**owned)


def _own(leaf: Leaf, W: Tensor, trainable: bool, leaves: dict[Any, Tensor]) -> Tensor:
    """A leaf on the layer's device: in its dtype, or as a parameter of at least float32; a shared leaf once."""
    dtype = torch.promote_types(W.dtype, torch.float32) if trainable else W.dtype
    key = id(leaf), W.device, dtype
    if key not in leaves:
        value = as_torch(leaf, W.device, dtype).detach().clone()
        leaves[key] = nn.Parameter(value) if trainable and value.is_floating_point() else value
    return leaves[key]


def _station(module: nn.Module) -> Station:
    standing = getattr(module.__dict__.get("forward"), "__self__", None)
    return standing if isinstance(standing, Station) else Station(module)


def _stations(model: nn.Module) -> list[Station]:
    standing = (getattr(m.__dict__.get("forward"), "__self__", None) for m in model.modules())
    return [station for station in standing if isinstance(station, Station)]


def _names(model: nn.Module) -> set[str]:
    return {switch.name for station in _stations(model) for switch in station.switches}
