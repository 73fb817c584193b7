"""Resolve an adapter's targets to nodes of a graph."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from ..core.adapter import Adapter, Target, order_counts
from ..errors import AdapterkitError, TargetNotFound, Unsupported
from ..formats._trained import sites_as_trained
from ..io.stages import stage
from ..naming.binding import Site, check_site, find_sites, fits
from ..naming.moves import NamesByEnd, same_end
from .biases import with_base_bias
from .building import element_type
from .expert_nodes import GEMMS
from .experts import EXPERT, EXPERTS, Experts, in_experts
from .fused_nodes import Attention, FusedConv, FusedGemm
from .heads import in_heads, in_parts
from .integer_layers import INTEGER
from .layers import (
    Conv,
    ConvTranspose,
    Einsum,
    Gather,
    Gemm,
    GraphLayer,
    LeftEinsum,
    LeftMatMul,
    MatMul,
    SingleLeftMatMul,
    SingleMatMul,
)
from .modules import SCOPES, dotted, listed
from .norm_layers import norms_at
from .norms import is_norm, refuse_folded
from .operands import THROUGH, is_constant, nodes_of, sources
from .outlets import outlet
from .packed import ConvInteger, FusedMatMul, MatMulInteger, MatMulNBits
from .recurrent import RECURRENT, Recurrent
from .resolved import METHODS, NEAR, Known, ResolvedTarget, Spot, distance
from .roles import elsewhere
from .routed import by_expert, compare_experts
from .selected import SELECTED, SelectedExperts, product_of
from .unblocking import unblock

if TYPE_CHECKING:
    from ..io.checkpoint import Checkpoint
    from .matching import StoredWeights
    from .tying import Tying


KINDS: tuple[type[GraphLayer], ...] = (
    *GEMMS, MatMul, Gemm, Conv, ConvTranspose, Gather, FusedMatMul, MatMulNBits, MatMulInteger, Attention, LeftMatMul,
    Einsum, FusedGemm, FusedConv, LeftEinsum, SingleMatMul, SingleLeftMatMul, ConvInteger, *INTEGER, *SELECTED,
)  # fmt: skip
"""The kinds of layers whose node has one weight. If several kinds accept a node, the first of them is used."""

SEVERAL: tuple[type[GraphLayer], ...] = (*RECURRENT, *EXPERTS)
"""The kinds of layers whose node has several weights: recurrent layers and experts. Each weight of such a node counts
as a layer with its own kind."""


def kinds_of(node: ir.Node) -> list[type[GraphLayer]]:
    """Return one kind of layer for each weight of a node. The list is empty if the node is not a supported layer."""
    kind = next((kind for kind in KINDS if kind.takes(node)), None)
    return [kind for kind in SEVERAL if kind.takes(node)] if kind is None else [kind]


# Exporters store a layer's name in different places, such as metadata, tensor names and node names. These places are
# searched in the order of `METHODS`. If the base is given, layers without a name are found by comparing their weights
# with the base's weights. If several layers fit a target, an error is raised.


_FOLDED = "pkg.onnxscript.optimizer.folded_from"
_OPERATION = re.compile(r"/(?:MatMul|Gemm|Conv|ConvTranspose|Gather|Einsum)(?:_\d+)?(?:_quant|_Q\d|_matmul_Q\d)?$")
_MARK = re.compile(r"(?:\.(?:MatMul|Gemm|Conv|Gather))?\.weight(?:_quantized|_q|_Bnb4|(?:_DQ)?_Q\d)?$")
_CALL = re.compile(r"_\d+(?=\.weight$)")


def resolve(
    model: ir.Model, adapter: Adapter, base: Checkpoint | None = None, tying: Tying | None = None
) -> list[ResolvedTarget]:
    """Find the layers of a graph that an adapter changes, including layers that are tied to the adapter's targets.

    Args:
        model: the graph.
        adapter: the adapter, whose updates change weights or the outputs of layers.
        base: the weights that the graph was exported from. Layers without names are found by comparing their weights
            with the base's. The weights of layers that were found by name are checked against the base's, too.
        tying: the caller's choice for tied layers, and the base's config, whose `model_type` selects the naming.

    Raises:
        TargetNotFound: the graph has no layer for a target, or several layers that fit equally well; the error gives
            the nearest names.
        ShapeMismatch: the shape of an adapter's tensor does not fit the layer.
        Unsupported: an update cannot be applied in this graph. Or the exporter may have folded a norm into a layer,
            and `base` is None, so that the layer cannot be checked.
        UsageError: layers are tied, and neither the adapter nor `tying` determines which of them an update changes.
    """
    stage("finding the targets in the graph")
    from .tying import Tying, with_tied

    _refuse(adapter)
    tying = tying or Tying.of(base, None)
    left = unblock(model, base)
    spots = spots_of(model)
    known = _without_unclear(by_name(spots), adapter, model, base)
    for target in adapter.updates:
        if elsewhere(target.path, tying.role, known):
            why = f"the graph is the model's {tying.role}, according to its file name, so it does not have this target"
            cure = "Pass the folder of the model. To omit such targets: --allow-partial (allow_partial=True)"
            raise TargetNotFound(why, where=str(target), cure=cure)
    adapter, whole = by_expert(adapter, model, tying.config)
    adapter, _ = in_parts(adapter, _rows_of(_in_words_of(adapter, known)))
    modules = _modules(model, adapter, known)
    norms = norms_at(model, adapter, known, base, tying.role)
    apart = {*modules, *norms}
    layered = adapter.replace(updates={t: updates for t, updates in adapter.updates.items() if t not in apart})
    renamed = _renamed_parts(layered, known)
    try:
        sites = _sites(layered, known, spots, base, tying.config) if layered.updates else []
    except TargetNotFound as error:
        modules_of_several = with_several_weights(spots).items()
        for weights in (names for name, names in modules_of_several if same_end(name, f"{error.where}.weight")):
            why = "the target is a module with several weights, and the target's path does not select one of them"
            cure = f"Use the name of one weight as the target: {', '.join(weights)}" if weights else ""
            cure = cure or "Use the graph before it is optimized: there, each weight has a name"
            raise TargetNotFound(why, where=error.where, cure=cure) from None
        if model.functions:
            names = ", ".join(function.name for function in model.functions.values())
            why = f"the graph has local functions of another operator set ({names}), so their layers cannot be changed"
            cure = "Export the model with one operator set, or call onnx.inliner.inline_local_functions on it"
            raise Unsupported(why, where=error.where, cure=cure) from None
        if (node := _other_operator(model, error.where or "", spots)) is not None:
            unknown = f"a {node.op_type} ({node.name or node.outputs[0].name})"
            why = f"the target's weight is read by {unknown}, and no adapter can be attached to this operator"
            cure = "Merge the adapter before the export, or export the model with this layer as torch.nn.Linear or Conv"
            if any(_is_packed(one) for one in node.inputs):
                cure = "Inject or merge the adapter before quantizing the graph, or quantize the graph to MatMulNBits"
            if len(_lost(layered, known, tying.config)) < len(layered.updates):
                cure = f"{cure}. To omit such targets: --allow-partial (allow_partial=True)"
            raise Unsupported(why, where=error.where, cure=cure) from None
        if (node := _reordered(model, error.where or "", base)) is not None:
            at = f"{node.name or node.op_type} (operator {node.domain}.{node.op_type})"
            why = (
                f"onnxruntime reordered the weights of the graph's convolutions, such as {at}, for one kind of "
                f"processor. The base's order cannot be restored: {left}"
            )
            cure = (
                "Inject the adapter before the graph is optimized, or optimize the graph no further than "
                "GraphOptimizationLevel.ORT_ENABLE_EXTENDED"
            )
            raise Unsupported(why, where=error.where, cure=cure) from None
        raise
    places = _without_modules([_resolved(site, asked, known, renamed, base) for site, asked in sites])
    if base is None:
        refuse_folded(places)
    else:
        from .matching import compare

        places = compare(places, base)
        compare_experts(places, whole, base)
    ended = [replace(at, outlet=outlet(model, at.asked, at.updates, is_layer=True)) for at in places]
    ended = with_tied(ended, adapter, spots, tying)
    _refuse_orders(ended)
    ended = [replace(at, asked=whole.get(at.asked, at.asked)) for at in ended]
    ended += norms.values()
    if base is not None:
        ended = [with_base_bias(place, base) for place in ended]
    # Put layers before modules, and inner modules before outer ones, because an outer module must read the changed
    # outputs of the layers and modules inside it.
    return [*ended, *sorted(modules.values(), key=lambda at: -at.target.path.count("."))]


def _reordered(model: ir.Model, where: str, base: Checkpoint | None) -> ir.Node | None:
    """Return a Conv of the graph that uses onnxruntime's blocked channel layout.

    Return None if no Conv uses this layout, or if the target at `where` is not a convolution in the base.
    """
    weight_name = f"{where}.weight"
    shapes = (
        []
        if base is None
        else [t.shape for name, t in base.tensors.items() if name == weight_name or same_end(name, weight_name)]
    )
    if not any(len(shape) > 2 for shape in shapes):
        return None
    blocked = (node for node in model.graph.all_nodes() if node.domain == "com.microsoft.nchwc")
    return next((node for node in blocked if node.op_type == "Conv"), None)


def taken(
    model: ir.Model, adapter: Adapter, base: Checkpoint | None = None, config: Config = None, role: str | None = None
) -> tuple[Adapter, tuple[Target, ...]]:
    """Remove an adapter's targets that are not in a graph. Return the adapter and the removed targets.

    Args:
        model: a graph that may have only some of the adapter's layers, such as one part of a model.
        adapter: the adapter, whose updates change weights or the outputs of layers.
        base: the weights that the graph was exported from. Layers without names are found by comparing their weights
            with the base's.
        config: the base's config.
        role: the part of the model that the graph holds, such as `encoder`; None if the part is unknown.

    Raises:
        TargetNotFound: a target may be a layer without a name, and `base` is None, so that weights cannot be compared.
            Or two targets match the same layer.
    """
    unblock(model, base)
    spots = spots_of(model)
    known = _without_unclear(by_name(spots), adapter, model, base)
    whole_adapter, refused = adapter, list[Target]()
    away = tuple(target for target in adapter.updates if elsewhere(target.path, role, known))
    adapter = adapter.replace(updates={t: updates for t, updates in adapter.updates.items() if t not in away})
    adapter, stacks = by_expert(adapter, model, config, refused)
    adapter, whole = in_parts(adapter, _rows_of(_in_words_of(adapter, known)))
    whole |= stacks
    modules = _modules(model, adapter, known)
    apart = {*modules, *norms_at(model, adapter, known, base, role)}
    layered = adapter.replace(updates={t: updates for t, updates in adapter.updates.items() if t not in apart})
    lost: tuple[Target, ...] = ()
    if layered.updates:
        lost = _lost(layered, known, config)
        if lost and base is not None:
            from .matching import StoredWeights

            weights = StoredWeights(spots)
            lost = tuple(target for target in lost if not _in_numbers(layered, target, base, weights))
        elif lost:
            _check_named(layered, lost, spots)
    gone = dict.fromkeys([*away, *refused, *(whole.get(target, target) for target in lost)])
    kept = {t: updates for t, updates in whole_adapter.updates.items() if t not in gone}
    return whole_adapter.replace(updates=kept), tuple(gone)


def _rows_of(known: Known) -> Callable[[str], int | None]:
    """Return a function that maps a path to the number of rows of the layer there, or to None if there is no layer."""

    def rows_of(path: str) -> int | None:
        at = known.get(f"{path}.weight") or next(
            (one for name, one in known.items() if same_end(name, f"{path}.weight")), None
        )
        return None if at is None else at[1][0].shape[0]

    return rows_of


def _lost(adapter: Adapter, known: Known, config: Config) -> tuple[Target, ...]:
    """Return the targets that match no name of a layer in the graph."""
    names = _in_words_of(adapter, known)
    shapes = {name: at[0].shape for name, (_, at) in names.items() if len({spot.shape for spot in at}) == 1}
    modules = [name.removesuffix(".weight") for name in shapes]
    try:
        bound = find_sites(adapter, shapes, partial=True, modules=modules, config=config)
    except TargetNotFound:  # The graph has none of the targets.
        return tuple(adapter.updates)
    _check_apart(bound.sites, bound.origins)
    return tuple(bound.missing)


def _check_apart(sites: Sequence[Site], origins: Sequence[Target]) -> None:
    """Refuse two targets that match the same layer.

    The layers' names in an encoder's graph may lack the segment `encoder`. In this case, targets in the decoder match
    the encoder's layers, too.
    """
    seen: dict[tuple[Any, ...], Target] = {}
    for site, origin in zip(sites, origins, strict=True):
        first = seen.setdefault((site.weight or site.target.path, site.target.rows), origin)
        if first.path != origin.path:
            why = f"{first} and {origin} both match the layer {site.target.path} of the graph"
            cure = "Pass the folder with all graphs of the model, so that each graph gets its own targets"
            raise TargetNotFound(why, where=str(origin), cure=cure)


def _in_numbers(adapter: Adapter, target: Target, base: Checkpoint, weights: StoredWeights) -> bool:
    from .matching import by_values

    alone = adapter.replace(updates={target: adapter.updates[target]})
    missing = TargetNotFound("the base has no weight at this path", where=str(target))
    try:
        by_values(alone, base, weights, missing)
    except TargetNotFound as error:
        if error is missing or "no layer of the graph has this weight" not in error.why:
            raise
        return False
    return True


def _check_named(adapter: Adapter, lost: Sequence[Target], spots: Sequence[Spot]) -> None:
    """Raise an error if a target in `lost` fits the shape of a layer without a name: the target may be that layer."""
    nameless = [spot for spot in spots if not is_named(spot)]
    for target in lost if nameless else ():
        plain = replace(target, layout="out *in")
        alike = sum(fits(plain, adapter.updates[target], spot.shape) for spot in nameless)
        if alike:
            why = f"the target may be one of {alike} layers of the graph with a fitting shape, whose names are lost"
            cure = "Pass the weights that the graph was exported from: --base-weights DIR (base_weights=)"
            raise TargetNotFound(why, where=str(target), cure=cure)


NUMBERED = re.compile(r"onnx::|val_\d|_v_\d|\d")
"""A pattern for names that exporters make up, such as `onnx::MatMul_12`, for tensors without a name in the model."""


def is_named(spot: Spot) -> bool:
    """Whether a layer has a name from the model, not only names that an exporter made up."""
    return any(not NUMBERED.match(name) for method in METHODS for name in spot.names.get(method, ()))


def _other_operator(model: ir.Model, path: str, spots: Sequence[Spot]) -> ir.Node | None:
    """Return the node that reads the weight at `path`, if this node is not a supported layer; otherwise None."""
    layers = {spot.node for spot in spots}
    for node in nodes_of(model):
        selects = node.op_type == "Gather" and not is_constant(node.outputs[0])
        if node in layers or (node.op_type in THROUGH and not selects) or not path:
            continue
        constants = [one for one in node.inputs if one is not None and one.producer() is not node and is_constant(one)]
        stored = [source for one in constants for source in sources(one)]
        wide = [one for one in stored if one.shape is None or len(one.shape) > 1 or _is_packed(one)]
        names = [_MARK.sub(".weight", one.name or "") for one in wide]
        names += [name for one in wide for name in listed(one.metadata_props.get(_FOLDED))]
        modules = listed(node.metadata_props.get(SCOPES))[-2:-1] if names else []
        inside = [dotted((node.name or "").rpartition("/")[0])] if names else []
        # Also compare the path without `.weight`, because a target may be a parameter, such as a stack of experts.
        read = any(same_end(name, full) for name in names for full in (f"{path}.weight", path))
        if read or any(same_end(m, path) for m in (*modules, *inside) if m):
            return node
    return None


def _is_packed(value: ir.Value | None) -> bool:
    """Whether a value may be a packed weight: a constant with several elements of at most one byte each.

    A constant with one axis counts, too, because some operators store a packed weight as a flat array of bytes.
    """
    if value is None or not is_constant(value) or element_type(value).itemsize > 1:
        return False
    return any(one.const_value is not None and one.const_value.size > 1 for one in sources(value))


def _modules(model: ir.Model, adapter: Adapter, known: Known) -> dict[Target, ResolvedTarget]:
    """Resolve the targets that are modules without a weight; other targets are omitted."""
    places: dict[Target, ResolvedTarget] = {}
    for target, updates in adapter.updates.items():
        weight = f"{target.path}.weight"
        if any(update.kind != "output" for update in updates) or any(same_end(name, weight) for name in known):
            continue
        # Ignore the error, because `_sites` will look for this target among the layers without a name.
        with contextlib.suppress(TargetNotFound):
            ends = outlet(model, target, updates, is_layer=False)
            places[target] = ResolvedTarget(target, target, updates, (), "scopes", 1.0, outlet=ends)
    return places


def spots_of(model: ir.Model) -> list[Spot]:
    """Return all layers of a graph, including those in subgraphs."""
    nodes = list(nodes_of(model))
    containers, numbered = _containers(nodes), _numbered(nodes)
    spots = []
    for node in nodes:
        for kind in kinds_of(node):
            stored = tuple(sources(kind.operand_of(node)))
            names = _names(node, kind, stored, containers, numbered)
            first, second, *rest = kind.stored_shape(node)
            shape = (second, first, *rest) if kind.turns(node) else (first, second, *rest)  # [out, in, *k]
            spots.append(Spot(node, kind, names, shape, stored))
    return spots


def _numbered(nodes: Sequence[ir.Node]) -> dict[str, str]:
    """Return a map from numbered module paths in node names, such as `q_1`, to the modules that parameters show.

    torch's older exporter numbers equal names. Names may only be equal because they lack a container, which is never
    called: if `/q/Add` belongs to `down.q`, the module `q` may have the node `/q_1/Add`, which reads `q.bias`. A
    parameter that several nodes read shows nothing: the exporter stores equal parameters once.
    """
    modules_by_path: dict[str, set[str]] = {}
    for node in nodes:
        path = dotted((node.name or "").rpartition("/")[0])
        plain = plain_call(path)
        for value in node.inputs if plain != path else ():
            if value is None or value.name is None or value.producer() is not None or not is_constant(value):
                continue
            module = value.name.rpartition(".")[0]
            shows = module and same_end(module, plain) and not same_end(module, path)
            if shows and len(list(value.uses())) == 1:
                modules_by_path.setdefault(path, set()).add(module)
    return {path: module for path, modules in modules_by_path.items() if len(modules) == 1 for module in modules}


def _without_unclear(known: Known, adapter: Adapter, model: ir.Model, base: Checkpoint | None) -> Known:
    """Remove names of layers that may belong to another module, so that these layers are found by their values.

    torch's older exporter numbers equal names, which may only be equal because they lack a container: if no parameter
    has a name, `/q/MatMul` may be `down.q`, and `/q_1/MatMul` may be `q`. But if the adapter also changes `q_1`, these
    are the modules `q` and `q_1`.

    Raises:
        TargetNotFound: an update fits both layers, and `base` is None.
    """
    numbered: dict[str, str] = {}
    for name, (method, _) in known.items():
        plain = _CALL.sub("", name)
        if plain != name and method == "path" and known.get(plain, ("", []))[0] == "path":
            numbered.setdefault(plain, name)
    numbered = {p: name for p, name in numbered.items() if {*known[p][1][0].sources} != {*known[name][1][0].sources}}
    if not numbered:
        return known
    shown, unclear = _containers([*nodes_of(model)]), set[str]()
    numbered_in_graph, targets = (
        NamesByEnd(numbered),
        NamesByEnd([f"{target.path}.weight" for target in adapter.updates]),
    )
    for target, updates in adapter.updates.items():
        for plain in numbered_in_graph.of(f"{target.path}.weight"):
            other = numbered[plain]
            named = any(name.removesuffix(".weight") in shown for name in (plain, other)) or targets.of(other)
            if named or not fits(replace(target, layout="out *in"), updates, known[other][1][0].shape):
                continue
            if base is None:
                nodes = " and ".join(str(known[name][1][0].node.name) for name in (plain, other))
                why = f"the nodes {nodes} may belong to two modules of this name, so it is unclear which is the target"
                cure = "Pass the weights that the graph was exported from: --base-weights DIR (base_weights=)"
                raise TargetNotFound(why, where=str(target), cure=cure)
            unclear |= {plain, other}
    return {name: at for name, at in known.items() if name not in unclear}


def _containers(nodes: Sequence[ir.Node]) -> dict[str, str]:
    """Return a map from each module path in node names to the prefix that is missing before this path.

    torch's older exporter names nodes after the modules that are called. A ModuleList or ModuleDict is never called, so
    a node name such as `/self_attn/q_proj/Add` lacks the list's name. If a parameter kept its name, such as
    `layers.0.self_attn.q_proj.bias`, this name shows the full path, and therefore the prefix `layers.0.`. A module path
    with two different prefixes is omitted, because it is ambiguous.
    """
    prefixes_by_path: dict[str, set[str]] = {}
    for node in nodes:
        path = dotted((node.name or "").rpartition("/")[0])
        for value in node.inputs if path else ():
            if value is None or value.name is None or value.producer() is not None or not is_constant(value):
                continue
            module = value.name.rpartition(".")[0]
            if module == path or module.endswith(f".{path}"):
                words = path.split(".")
                for stop in range(1, len(words) + 1):
                    prefixes_by_path.setdefault(".".join(words[:stop]), set()).add(module.removesuffix(path))
    return {path: next(iter(prefixes)) for path, prefixes in prefixes_by_path.items() if len(prefixes) == 1}


def _refuse_orders(places: Sequence[ResolvedTarget]) -> None:
    """Refuse several targets at one layer if the order of their updates changes the result.

    If several targets change one layer, the graph only adds up their changes, so it cannot apply them in an order.
    """
    by_spot: dict[Spot, list[ResolvedTarget]] = {}
    for at in places:
        if all(update.kind in ("additive", "weight") for update in at.updates):
            for spot in dict.fromkeys(at.spots):
                by_spot.setdefault(spot, []).append(at)
    for here in by_spot.values():
        if order_counts([(at.asked, at.updates) for at in here]):
            why = "several targets of one adapter are at one weight, and the order of their updates changes the result"
            cure = "Merge the adapter into the base (`adapterkit merge`), and export the result"
            raise Unsupported(why, where=str(here[-1].asked), cure=cure)


def _refuse(adapter: Adapter) -> None:
    for target, update in adapter:
        if update.kind == "context":
            why = f"{update.method} changes {update.acts_on}, so it cannot be attached to a layer of a graph"
            raise Unsupported(why, where=str(target), cure="Inject the adapter in torch, and export the torch model")


def _names(
    node: ir.Node,
    kind: type[GraphLayer],
    stored: Sequence[ir.Value],
    containers: Mapping[str, str],
    numbered: Mapping[str, str],
) -> dict[str, tuple[str, ...]]:
    if issubclass(kind, Experts) or EXPERT in node.metadata_props:
        return {}  # `in_experts` finds a name for each part of an expert.
    if issubclass(kind, Recurrent):
        name_here = kind.name(node)
        return {} if name_here is None else {"path": (name_here,)}
    if issubclass(kind, SelectedExperts):
        # A stack is a parameter, not the weight of a module, so its name does not end with `.weight`.
        return {
            "folded_from": tuple(n for value in stored for n in listed(value.metadata_props.get(_FOLDED))),
            "initializer": tuple(value.name for value in stored if value.name),
        }
    names = {
        "scopes": () if is_norm(node) else _scope_names(node),
        "folded_from": tuple(n for value in stored for n in listed(value.metadata_props.get(_FOLDED))),
        "initializer": tuple(_MARK.sub(".weight", value.name) for value in stored if value.name),
        "path": _path_names(node.name or "", containers, numbered),
    }
    return {method: texts for method, texts in names.items() if texts}


def _scope_names(node: ir.Node) -> tuple[str, ...]:
    return tuple(f"{module}.weight" for module in listed(node.metadata_props.get(SCOPES))[-2:-1] if module)


def _path_names(name: str, containers: Mapping[str, str], numbered: Mapping[str, str]) -> tuple[str, ...]:
    if not name.startswith("/") or not _OPERATION.search(name):
        return ()
    path = dotted(_OPERATION.sub("", name))
    if path in numbered:
        return (f"{numbered[path]}.weight",)
    words = path.split(".")
    above = (".".join(words[:stop]) for stop in range(len(words), 0, -1))
    prefix = next((containers[each] for each in above if each in containers), "")
    return (f"{prefix}{path}.weight",) if path else ()


OF_MODULES = ("scopes", "path")
"""The entries of `METHODS` that find only a module's name. The module's weight is assumed to be named `weight`."""


def with_several_weights(spots: Sequence[Spot]) -> dict[str, list[str]]:
    """Find modules with several different weights, such as an LSTMCell that a loop calls.

    Returns:
        a map from each module's path, with `.weight` appended, to the names of the module's stored tensors. The key
        stands for the module, not for one tensor: an LSTMCell `cell` has the key `cell.weight`, and the tensors
        `cell.weight_ih` and `cell.weight_hh`. Names that an exporter made up are omitted.
    """
    by_module: dict[str, list[Spot]] = {}
    for spot in spots:
        for name in {name for method in OF_MODULES for name in spot.names.get(method, ())}:
            by_module.setdefault(name, []).append(spot)
    several = {}
    for name, same in by_module.items():
        # Compare values: if a module is called several times, graph optimizers may store several copies of one weight.
        different = [*{spot.sources: spot for spot in same if not issubclass(spot.kind, Recurrent | Experts)}.values()]
        if len(different) > 1 and not all(_same_weight(different[0], spot) for spot in different[1:]):
            stored = (_stored_names(spot) for spot in different)
            several[name] = [*dict.fromkeys(one for names in stored for one in names)]
    return several


def _same_weight(one: Spot, other: Spot) -> bool:
    turned = one.kind.turns(one.node)
    weight = one.kind.stored_array(one.node)
    far = distance((weight.swapaxes(0, 1) if turned else weight).astype(np.float32), other)
    return far is not None and far <= NEAR


def _stored_names(spot: Spot) -> tuple[str, ...]:
    names = [name for method in ("folded_from", "initializer") for name in spot.names.get(method, ())]
    return tuple(name.removesuffix(".weight") for name in names if not NUMBERED.match(name))


def by_name(spots: Sequence[Spot]) -> Known:
    """Map each weight's name to a pair: the first method that found the name, and all layers with that name."""
    known: Known = {}
    several = with_several_weights(spots)
    spots = [*spots, *in_heads(spots), *in_experts(spots)]
    for method in METHODS:
        some: dict[str, list[Spot]] = {}
        for spot in spots:
            for name in spot.names.get(method, ()):
                if method not in OF_MODULES or name not in several:
                    some.setdefault(name, []).append(spot)
        if method == "path":
            some |= _calls(some)
        for name, at in some.items():
            # Keep the first method that found the name, because earlier methods in `METHODS` are more reliable.
            known.setdefault(
                name, (method, _by_node_name(name, at) if method in ("folded_from", "initializer") else at)
            )
    return known


def plain_call(name: str) -> str:
    """Remove the number that exporters append to a module's name for its later calls: `fc_1` becomes `fc`."""
    return _CALL.sub("", f"{name}.weight").removesuffix(".weight")


def _without_modules(places: Sequence[ResolvedTarget]) -> list[ResolvedTarget]:
    """Remove layers from a target such as `fc` if they also belong to a target such as `fc_1`.

    `fc_1` may be an exporter's name for the second call of `fc`. But if an adapter targets both `fc` and `fc_1`, they
    are two modules. The exporter may store one tensor for both modules if their weights are equal.
    """
    spots_of_modules = {
        place.target.path: {*place.spots} for place in places if plain_call(place.target.path) != place.target.path
    }
    return [
        replace(place, spots=tuple(spot for spot in place.spots if spot not in others)) if others else place
        for place in places
        for others in [
            {
                spot
                for path, spots in spots_of_modules.items()
                if plain_call(path) == place.target.path
                for spot in spots
            }
        ]
    ]


def _calls(some: Mapping[str, list[Spot]]) -> dict[str, list[Spot]]:
    """Return a copy of `some` in which a module's entry also lists the layers of the module's later calls.

    If layers named `fc` and `fc_1` read the same tensor, `fc_1` is a later call of the module `fc`.
    """
    calls = {name: list(at) for name, at in some.items()}
    for name, at in some.items():
        plain = _CALL.sub("", name)
        if plain != name and plain in some and {*at[0].sources} == {*some[plain][0].sources}:
            calls[plain] += at
    return calls


def _by_node_name(name: str, spots: list[Spot]) -> list[Spot]:
    """Return the layers in `spots` whose nodes belong to the module `name`; all of `spots` if there are no such layers.

    Modules with equal weights may share one stored tensor, so the name of the tensor does not identify the module.
    """
    names_of_spots = [
        {*spot.names.get("scopes", ()), *(_CALL.sub("", p) for p in spot.names.get("path", ()))} for spot in spots
    ]
    named_so = [
        spot for spot, names in zip(spots, names_of_spots, strict=True) if any(same_end(name, other) for other in names)
    ]
    return named_so or spots


Placed = list[tuple[Site, Target]]
"""Pairs (site, target). The site's path is the path in the graph. The target's path is the path in the adapter."""

Config = Mapping[str, object] | None


def _sites(adapter: Adapter, known: Known, spots: Sequence[Spot], base: Checkpoint | None, config: Config) -> Placed:
    known |= _in_words_of(adapter, known)
    try:
        return _placed(adapter, known, config)
    except TargetNotFound as error:
        if base is None:
            cure = f"{error.cure}; to find layers by their values, pass the base: --base-weights DIR (base_weights=)"
            raise TargetNotFound(error.why, where=error.where, cure=cure) from None
        from .matching import StoredWeights, by_values

        known |= by_values(adapter, base, StoredWeights(spots), error)
        return _placed(adapter, known, config)


BUILDER_NAMES = (
    ("self_attn", "attn"), ("attn", "self_attn"), ("moe.router", "mlp.router"), ("moe.router", "mlp.gate"),
    ("moe.router", "feed_forward.gate"), ("moe.router", "block_sparse_moe.gate"), ("moe.router", "router.proj"),
)  # fmt: skip
"""Pairs of names for the same layer: the name in the graph, then the name in the adapter. onnxruntime-genai's builder
names every attention layer `attn`, and every router of experts `moe.router`."""


def _in_words_of(adapter: Adapter, known: Known) -> Known:
    """Add aliases to a graph's names: the adapter's names for attention layers and routers, as in `BUILDER_NAMES`.

    Callers must add these aliases before names are translated between families. One family has a layer that is also
    named `attn.q_proj`, but stores its rows in another order. Without the aliases, the builder's `attn.q_proj` could be
    taken for that layer.
    """
    return {alias: known[name] for alias, name in _renamed_parts(adapter, known).items()} | known


def _renamed_parts(adapter: Adapter, known: Known) -> dict[str, str]:
    """Return a map from a weight's name in the adapter to its name in the graph.

    The map has only weights whose two names differ as in `BUILDER_NAMES`.
    """
    renamed: dict[str, str] = {}
    for one, other in BUILDER_NAMES:
        asked = any(f".{other}." in f".{target.path}." for target in adapter.updates)
        there = any(f".{other}." in f".{name}" for name in known)
        if asked and not there:
            renamed |= {name.replace(f".{one}.", f".{other}."): name for name in known if f".{one}." in f".{name}"}
    return renamed


def _placed(adapter: Adapter, known: Known, config: Config) -> Placed:
    shapes = {name: at[0].shape for name, (_, at) in known.items() if len({spot.shape for spot in at}) == 1}
    modules = [name.removesuffix(".weight") for name in shapes]
    bound = find_sites(adapter, shapes, partial=False, modules=modules, config=config)
    sites = sites_as_trained(bound.sites, adapter.recipe, shapes)
    return list(zip(sites, bound.origins, strict=True))


def _resolved(
    site: Site, asked: Target, known: Known, renamed: Mapping[str, str], base: Checkpoint | None
) -> ResolvedTarget:  # fmt: skip
    """Return a site's target with the graph's layers for this target. `renamed` is the result of `_renamed_parts`."""
    name = site.weight
    if name is None:
        raise TargetNotFound("the graph has no such weight", where=str(asked), cure="Target a layer that has a weight")
    method, spots = known[name]
    shape = spots[0].shape
    if site.target.stacked != issubclass(spots[0].kind, SelectedExperts):
        node = spots[0].node
        stack = "a stack of experts" if site.target.stacked else "one weight"
        other = "one weight" if site.target.stacked else "a stack of experts"
        why = f"the update changes {stack}, but the graph has {other} there ({node.name or node.op_type})"
        raise Unsupported(why, where=str(asked), cure="Merge the adapter into the base, and export the result")
    if site.target.stacked:
        product = product_of(spots[0].node)
        by_columns = product is not None and not product.by_rows
        if base is None and shape[1] == shape[2] and by_columns and not site.target.layout.startswith("e in"):
            # Do not trust the target's layout: if the adapter was read without its base, the reader assumed that `out`
            # comes before `in`.
            why = (
                f"the weights of this stack are square ({shape[1]} x {shape[2]}), and the graph reads their rows as "
                "inputs; without the base, it is unknown whether the rows of the update are inputs or outputs"
            )
            cure = "Pass the weights that the graph was exported from: --base-weights DIR (base_weights=)"
            raise Unsupported(why, where=str(asked), cure=cure)
        swapped = replace(site.target, layout="e out *in" if site.target.layout.startswith("e in") else "e in out *k")
        if not fits(site.target, site.updates, shape) and fits(swapped, site.updates, shape):
            site = replace(site, target=swapped)
        try:
            check_site(replace(site, bias=None), {name: shape}, biasless=True)
        except AdapterkitError as error:
            raise error.at(where=str(asked)) from None
        return ResolvedTarget(site.target, asked, site.updates, tuple(spots), method, 1.0)
    turned = _turned(site, shape, spots[0].kind)
    seen = (shape[1], shape[0], *shape[2:]) if turned else shape
    path = site.target.path if name not in renamed else renamed[name].removesuffix(".weight")
    plain = replace(site, target=replace(site.target, path=path, layout="out *in"), bias=None)
    try:
        check_site(plain, {name: seen}, biasless=True)
    except AdapterkitError as error:
        raise error.at(where=str(asked)) from None
    return ResolvedTarget(_in_rows(plain.target, spots[0]), asked, site.updates, tuple(spots), method, 1.0, turned)


def _in_rows(target: Target, spot: Spot) -> Target:
    if spot.rows is None:
        return target
    first, last = target.rows or (0, spot.rows[1] - spot.rows[0])
    return replace(target, rows=(spot.rows[0] + first, spot.rows[0] + last))


def _turned(site: Site, shape: tuple[int, ...], kind: type[GraphLayer]) -> bool:
    """Whether the updates apply to the weight with its first two axes swapped.

    An update of token rows expects the tokens on the axis `in`, as in an embedding. A head has the tokens on the axis
    `out`, so its axes may have to be swapped for such an update. Updates that store whole weights may use the base's
    axis order, which may have `in` first.
    """
    dims = [update.dims() for update in site.updates if update.kind != "output"]
    whole = any("rest" in each for each in dims) and not any("in" in each for each in dims)
    plain = replace(site.target, layout="out *in")
    natural = fits(plain, site.updates, shape)
    other = len(shape) > 1 and fits(plain, site.updates, (shape[1], shape[0], *shape[2:]))
    if any(update.shared_as == "rows" for update in site.updates) and kind.op_type != "Gather":
        return other and (not natural or site.target.layout != "out *in")
    if not whole:
        return not natural and other and kind.op_type == "ConvTranspose"
    declared = site.target.layout == "out *in" and kind.op_type in ("Gather", "ConvTranspose")
    return other and (declared or not natural)
