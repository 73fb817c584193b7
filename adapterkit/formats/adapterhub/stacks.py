"""What a new config must say of bottleneck adapters: one form for all, and which layers of the base have any.

A config names kinds of places and layers that are left out; whatever else it covers the library fills with fresh
adapters, which change the model. So all must be there, and the base must tell how many layers there are.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from .places import model_type_of
from .slots import words_of
from .sublayers import EMBEDDINGS, MODELS, Rule, hanging

if TYPE_CHECKING:
    from ...core.adapter import Target, Updates
    from ...io.checkpoint import Checkpoint


FRESH = {
    "dropout": 0.0,
    "hypercomplex_nonlinearity": "glorot-uniform",
    "init_weights": "bert",
    "init_weights_seed": None,
    "learn_phm": True,
    "phm_c_init": "normal",
    "phm_init_range": 0.0001,
    "stochastic_depth": 0.0,
}
"""What a config says that never was AdapterHub's."""

SAME = ("adapter_residual_before_ln", "non_linearity", "original_ln_after", "original_ln_before")
"""Attributes that a config calls the same."""

FLAGS = ("mh_adapter", "output_adapter", "cross_adapter")
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers")
DECODER_LAYERS = ("num_decoder_layers", "decoder_layers")
ENCODER_DECODER = ("bart", "mbart", "mt5", "plbart", "t5", "whisper")


def placed(updates: Updates) -> list[tuple[Target, Any]]:
    """Every adapter inside a block, with its target."""
    return [(target, update) for target, found in updates.items() for update in found if update.method != "invertible"]


def forms(updates: Updates) -> list[list[tuple[Target, Any]]]:
    """The same, those together that hold the same tensors: a union may have two configs."""
    found: dict[Any, list[tuple[Target, Any]]] = {}
    for target, update in placed(updates):
        found.setdefault((update.method, frozenset(update.tensors)), []).append((target, update))
    return list(found.values())


def compose(updates: Updates, base: Checkpoint | None) -> dict[str, Any]:
    """The fields of a config that says these updates."""
    adapters = placed(updates)
    some, words = adapters[0][1], words_of([update for _, update in adapters])
    flags = {rule.flag for _, rule in _rules(updates, base).values()}
    return {
        **words,
        **{name: some.attributes[name] for name in SAME},
        **{flag: flag in flags for flag in FLAGS},
        "residual_before_ln": {"true": True, "false": False}.get(some.residual_before_ln, "post_add"),
        "is_parallel": some.parallel,
        "leave_out": sorted({*range(_layers(base))} - {_layer(target, base) for target, _ in adapters}),
        **_coupling(updates),
        "phm_dim": _rule_size(some),
        "phm_rank": int(some.tensors["down_left"].shape[2]) if "down_left" in some.tensors else 1,
        "reduction_factor": _factors(adapters, base),
    }


def losses(updates: Updates, base: Checkpoint | None) -> Iterator[tuple[Target, int, str]]:
    """What a new config cannot say."""
    first = next((_form(update) for _, update in placed(updates)), None)
    model_type = model_type_of(base)
    rules = _rules(updates, base)
    patchy, uneven = _patchy(rules, base), _uneven(placed(updates), base)
    for target, found in updates.items():
        for position, update in enumerate(found):
            if update.method == "invertible":
                why = _why_no_coupling(target, update, model_type) if first else "without adapters in the layers"
            elif model_type not in MODELS or not _layers(base):
                why = "the library fills layers that are left out, and which there are only the base tells"
            elif target not in rules:
                why = f"no place where the library puts adapters in a {model_type}"
            elif _form(update) != first:
                why = "another form, size or method than the others': a config has one of each"
            elif not {"down_bias", "up_bias"} <= {*update.tensors, *_unbiased(update)} or _bare_gate(update):
                why = "layers or a gate without a bias"
            elif _layer(target, base) in patchy:
                why = "its layer lacks an adapter that other layers have"
            elif _layer(target, base) in uneven:
                why = "its layer has adapters of several sizes"
            else:
                why = "a second adapter at one place" if position else ""
            if why:
                yield target, position, f"{update.method}: {why}"


def _rules(updates: Updates, base: Checkpoint | None) -> dict[Target, tuple[str, Rule]]:
    model_type = model_type_of(base)
    found = {target: hanging(target.path, u.residual, u.norm, model_type) for target, u in placed(updates)}
    return {target: rule for target, rule in found.items() if rule is not None}


def _patchy(rules: Mapping[Target, tuple[str, Rule]], base: Checkpoint | None) -> set[int]:
    """Layers that lack a kind of adapter that another layer has; an encoder's have none behind attention to itself."""
    kinds: dict[tuple[int, bool], set[str]] = {}
    for target, (_, rule) in rules.items():
        kinds.setdefault((_layer(target, base), _in_decoder(target)), set()).add(rule.flag)
    every = set[str]().union(*kinds.values())
    both = len({decoder for _, decoder in kinds}) > 1
    wanted = {False: every - {"cross_adapter"} if both else every, True: every}
    return {layer for (layer, decoder), flags in kinds.items() if flags != wanted[decoder]}


def _coupling(updates: Updates) -> dict[str, Any]:
    """The fields that call for an invertible adapter."""
    found = [update for each in updates.values() for update in each if update.method == "invertible"]
    if not found:
        return {"inv_adapter": None, "inv_adapter_reduction_factor": None}
    inner, second = found[0].tensors["F_down"].shape
    return {"inv_adapter": "nice", "inv_adapter_reduction_factor": _factor(int(second), int(inner))}


def _why_no_coupling(target: Target, update: Any, model_type: str | None) -> str:
    (a, second), (b, first) = update.F_down.shape, update.G_down.shape
    if update.reverse or not target.path.endswith(EMBEDDINGS.get(model_type or "", "?")):
        return "not behind the embeddings, or nothing tells; pass the base"
    if int(first // _factor(int(second), int(a))) != b or first not in (second, second - 1):
        return "halves of sizes that no reduction factor gives"
    return ""


def _form(update: Any) -> tuple[Any, ...]:
    """All that a config has one word for: everything but the place and, layer by layer, the size."""
    words = {name: value for name, value in update.attributes.items() if name not in ("residual", "norm")}
    dims = {name: size for name, size in update.dims().items() if name != "d"}
    return update.method, words, set(update.tensors), dims


def _unbiased(update: Any) -> tuple[str, ...]:
    """Compacter's layers have no bias where the config says so, both or none."""
    none = update.method == "compacter" and "down_bias" not in update.tensors and "up_bias" not in update.tensors
    return ("down_bias", "up_bias") if none else ()


def _bare_gate(update: Any) -> bool:
    return "gate" in update.tensors and "gate_bias" not in update.tensors


def _factors(adapters: list[tuple[Target, Any]], base: Checkpoint | None) -> float | dict[str, float]:
    """The reduction factor: one for all, or one a layer."""
    factors = {str(_layer(target, base)): _factor(*_sizes(update)) for target, update in adapters}
    return next(iter(factors.values())) if len(set(factors.values())) == 1 else factors


def _uneven(adapters: list[tuple[Target, Any]], base: Checkpoint | None) -> set[int]:
    """Layers whose adapters are of several sizes."""
    sizes: dict[int, set[int]] = {}
    for target, update in adapters:
        sizes.setdefault(_layer(target, base), set()).add(_sizes(update)[1])
    return {layer for layer, found in sizes.items() if len(found) > 1}


def _sizes(update: Any) -> tuple[int, int]:
    """Sizes of the block and of the bottleneck."""
    dims = update.dims()
    return int(dims["hidden"]), int(dims["d"])


def _factor(hidden: int, inner: int) -> float:
    """The factor by which the library divides one size to get the other; it rounds down."""
    factor = hidden / inner
    return factor if int(hidden // factor) == inner else math.nextafter(factor, 0)


def _rule_size(update: Any) -> int:
    rule = update.tensors.get("down_rule", update.tensors.get("down_rule_left"))
    return 4 if rule is None else int(rule.shape[0])


def _layers(base: Checkpoint | None, *, encoder: bool = False) -> int:
    """How many layers there are, a decoder's behind an encoder's; 0 where nothing tells."""
    config = {} if base is None else base.config or {}
    layers = next((config[name] for name in LAYERS if isinstance(config.get(name), int)), 0)
    if model_type_of(base) not in ENCODER_DECODER or encoder:
        return int(layers)
    return int(layers + next((config[name] for name in DECODER_LAYERS if isinstance(config.get(name), int)), layers))


def _layer(target: Target, base: Checkpoint | None = None) -> int:
    """The number of a target's layer, as the library counts them where the base is given."""
    found = re.search(r"(?:^|\.)(\d{1,6})(?:\.|$)", target.path)
    before = _layers(base, encoder=True) if model_type_of(base) in ENCODER_DECODER and _in_decoder(target) else 0
    return before + int(found[1]) if found else 0


def _in_decoder(target: Target) -> bool:
    return "decoder" in target.path.split(".")
