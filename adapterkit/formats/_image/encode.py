"""Encode updates as slots (the tensors of a module in a file), and explain why some updates cannot be encoded."""

from __future__ import annotations

import math
from collections.abc import Mapping

from ...core.adapter import Target, Updates
from ...core.updates import Update
from ...io.arrange import times
from ...io.lazy import Lazy, NotComputed, as_array, as_lazy, from_numpy
from ...methods.boft_outputs import BOFTOutputs
from ...methods.dense import Dense
from ...methods.dora import DoRA
from ...methods.glora_products import GLoRAProducts
from ...methods.ia3_weights import IA3Weights
from ...methods.loha import LoHa
from ...methods.lokr import LoKr
from ...methods.lora import LoRA
from ...methods.oft import OFT
from ...methods.replacement import Replacement
from ...methods.weight_norm import WeightNorm
from .file import Rules, StoredTensor
from .laws import EPSILON, drawn, number

_SLOTS: dict[type[Update], str] = {
    LoRA: "down", DoRA: "dora", LoHa: "hada_", LoKr: "lokr_", OFT: "oft_blocks", GLoRAProducts: "a1",
    BOFTOutputs: "rescale", WeightNorm: "dora", IA3Weights: "on_input", Dense: "diff", Replacement: "set_weight",
}  # fmt: skip
"""A map from each method to one of its slots; a format that has this slot can express the method."""


LARGEST = 1e290
"""The largest scaling that is written; times a rank, it stays below 1e300, the largest alpha that readers accept."""


def why_not(update: Update, rules: Rules) -> str:
    """Return the reason why a format cannot express an update; empty if it can."""
    slot = _SLOTS.get(type(update))
    if slot is None or slot not in rules.slots:
        return f"the format does not have the method {update.method}"
    if isinstance(update, LoRA) and update.bias is not None and "bias" not in rules.slots:
        return "the format cannot store the bias of this lora"
    if abs(update.attributes.get("scaling", 0.0)) > LARGEST:
        return "its scaling is too large for an alpha"
    if isinstance(update, (LoRA, DoRA, LoHa, GLoRAProducts)) and update.scaling == 0 and _rank_for_zero(rules):
        return "its scaling is 0, and the format's tools read an alpha of 0 as the rank"
    if isinstance(update, LoKr) and update.stacked:
        return "the format cannot express a lokr on a stack of matrices, as PEFT trains it on Conv1d"
    if isinstance(update, (OFT, BOFTOutputs, IA3Weights)) and why_not_there(update, rules):
        return why_not_there(update, rules)
    if isinstance(update, OFT):
        return _why_not_oft(update, rules)
    if isinstance(update, WeightNorm):
        if rules.peft:
            return "the format can store magnitudes only for dora"
        return "" if update.eps == EPSILON else f"the epsilon of its norms is not {EPSILON}"
    if _unscaled(update, rules) and update.attributes["scaling"] != 1:
        return f"{update.method} {NO_SLOT_FOR_SCALING}"
    return ""


NO_SLOT_FOR_SCALING = "has a scaling, which the format cannot store"


def why_not_there(update: OFT | BOFTOutputs | IA3Weights, rules: Rules) -> str:
    """Return the reason why a file cannot express how an update treats the bias; empty if it can.

    The header's `bypass_mode` is one setting for all modules, and decides whether updates change the bias.
    """
    inputs = isinstance(update, IA3Weights) and update.w is None
    if inputs or update.on_output == rules.trained.bypass:
        return ""
    said = "but ss_network_args has" if rules.trained.bypass else "but ss_network_args does not have"
    return f"{update.method} {'changes' if update.on_output else 'does not change'} the bias, {said} bypass_mode"


def _rank_for_zero(rules: Rules) -> bool:
    return "alpha" in rules.slots and not rules.by_formula


def _why_not_oft(update: OFT, rules: Rules) -> str:
    if update.square is None or update.side != "out" or update.terms or update.coft:
        return "the format can express only an oft with Cayley transforms of complete blocks of outputs"
    if update.rescale is not None and "rescale" not in rules.slots:
        return "the format cannot express an oft with a factor on outputs"
    return (
        "the format cannot express an oft without a constraint" if not rules.oft_zero and update.constraint == 0 else ""
    )


def folded(update: Update, rules: Rules) -> Update:
    """Fold an update's scaling into a tensor, in the tensor's dtype.

    Return the update unchanged if a slot can store the scaling.
    """
    field = _unscaled(update, rules)
    scaling = update.attributes.get("scaling", 1.0)
    if not field or scaling == 1:
        return update
    names = {"D": ("D", "d"), "B": ("B", "bias")}.get(field, (field,))
    return update.replace(scaling=1.0, **{n: times(update.tensors[n], scaling) for n in names if n in update.tensors})


def _unscaled(update: Update, rules: Rules) -> str:
    """Return the field into which a scaling must be folded because no slot can store it; empty if a slot can."""
    if isinstance(update, Dense):
        return "D" if update.D is not None else "d"
    if isinstance(update, LoKr) and rules.peft:
        return "w1" if update.w1 is not None else "w1_a"
    if isinstance(update, LoKr) and update.w1 is not None and update.w2 is not None:
        return "" if rules.trained.rs else "w1"
    said = "alpha" in rules.slots
    return "" if said or not isinstance(update, (LoRA, DoRA)) else "B"


def encode(update: Update, rules: Rules, kernel: int = 0) -> list[StoredTensor]:
    """Return the tensors to write for an update, with the alpha last. `why_not` must have accepted the update.

    Args:
        update: the update.
        rules: the format's rules.
        kernel: the number of kernel axes of the weight, for methods whose tensors do not show it.
    """
    leaves = {name: as_lazy(leaf) for name, leaf in update.tensors.items()}
    if isinstance(update, (LoRA, DoRA)):
        return _low_rank(update, leaves, rules)
    if isinstance(update, LoHa):
        return _loha(update, leaves)
    if isinstance(update, LoKr):
        return _lokr(update, leaves, rules)
    if isinstance(update, OFT | BOFTOutputs):
        if "pairs" in leaves:
            return [
                StoredTensor("oft_R", leaves["pairs"], "pairs")
            ]  # OneTrainer's slot. Formats read it, but never write it.
        blocks = leaves["square"]
        alpha = update.constraint / (blocks.shape[-3] * blocks.shape[-2])
        rescale = (
            [StoredTensor("rescale", _column(leaves["rescale"], 1 + kernel), "rescale")] if "rescale" in leaves else []
        )
        return [StoredTensor("oft_blocks", blocks, "square"), *rescale, StoredTensor("alpha", number(alpha))]
    if isinstance(update, GLoRAProducts):
        slots = [StoredTensor(name.lower(), leaf, name) for name, leaf in leaves.items()]
        rank = leaves["A2"].shape[0]
        return [*slots, _alpha(update, math.sqrt(rank) if rules.trained.rs else rank)]
    if isinstance(update, WeightNorm):
        ones = [1] * kernel
        shapes = {"out": (-1, 1, *ones), "into": (1, -1, *ones)}
        return [StoredTensor("dora", leaf.reshape(*shapes[name]), name) for name, leaf in leaves.items()]
    if isinstance(update, IA3Weights):
        import numpy as np

        on_input = from_numpy(np.array(int(update.w_in is not None), dtype=np.int64))
        shaped = {n: leaf.reshape(1, -1, *[1] * kernel) if kernel else leaf for n, leaf in leaves.items()}
        return [
            *(StoredTensor("weight", leaf, name) for name, leaf in shaped.items()),
            StoredTensor("on_input", on_input),
        ]
    return _whole(update, leaves, rules)


def _low_rank(update: Update, leaves: Mapping[str, Lazy], rules: Rules) -> list[StoredTensor]:
    A, B = leaves["A"], leaves["B"]
    kernel = len(A.shape) - 2
    slots = [StoredTensor("down", A, "A"), StoredTensor("up", _column(B, kernel), "B")]
    if "magnitude" in leaves:
        lengths = leaves["magnitude"]
        peft = lengths.reshape(1, -1, *[1] * kernel) if kernel else lengths
        slots.append(StoredTensor("dora", peft if rules.peft else _column(lengths, 1 + kernel), "magnitude"))
    if "bias" in leaves:
        slots.append(StoredTensor("bias", leaves["bias"], "bias"))
    return [*slots, _alpha(update, A.shape[0] / drawn(A.shape[0], rules.trained.unit))]


def _loha(update: LoHa, leaves: Mapping[str, Lazy]) -> list[StoredTensor]:
    cored, slots = update.t1 is not None, []
    for n in (1, 2):
        a = leaves[f"w{n}_a"]
        slots.append(StoredTensor(f"hada_w{n}_a", _turned(a) if cored else a, f"w{n}_a"))
        inner = f"w{n}_in" if cored else f"w{n}_b"
        slots.append(StoredTensor(f"hada_w{n}_b", leaves[inner], inner))
        slots += [StoredTensor(f"hada_t{n}", leaves[f"t{n}"], f"t{n}")] if cored else []
    return [*slots, _alpha(update, leaves["w1_a"].shape[1])]


def _lokr(update: LoKr, leaves: Mapping[str, Lazy], rules: Rules) -> list[StoredTensor]:
    cored = update.t2 is not None
    slots = []
    for name, leaf in leaves.items():
        slot = "lokr_" + ("w2_b" if name == "w2_in" else name)
        slots.append(StoredTensor(slot, _turned(leaf) if cored and name == "w2_a" else leaf, name))
    rank = next((leaves[name].shape[1] for name in ("w1_a", "w2_a") if name in leaves), 0)
    return [*slots, _alpha(update, rank or (update.scaling**2 if rules.trained.rs else 1))]


def _whole(update: Update, leaves: Mapping[str, Lazy], rules: Rules) -> list[StoredTensor]:
    if isinstance(update, Replacement):
        return [StoredTensor(f"set_{name}", leaf, name) for name, leaf in leaves.items()]
    norm = rules.norms and "D" in leaves and len(leaves["D"].shape) == 1
    slots = {"D": "w_norm", "d": "b_norm"} if norm else {"D": "diff", "d": "diff_b"}
    return [StoredTensor(slots[name], leaf, name) for name, leaf in leaves.items()]


def _alpha(update: Update, rank: float) -> StoredTensor:
    return StoredTensor("alpha", number(update.attributes["scaling"] * rank))


def _column(leaf: Lazy, ones: int) -> Lazy:
    return leaf.reshape(*leaf.shape, *[1] * ones)


def _turned(leaf: Lazy) -> Lazy:
    return leaf.map(lambda array: array.T, (leaf.shape[1], leaf.shape[0]))


def without_effect(updates: Updates, rules: Rules) -> tuple[Updates, list[str]]:
    """Omit updates that the format cannot express if they change nothing, and return a line for each omitted update.

    LoRAs extracted from Wan contain an all-zero `diff` tensor for every norm.
    """
    lines: list[str] = []
    changed: dict[Target, tuple[Update, ...]] = {}
    for target, found in updates.items():
        kept = tuple(update for update in found if not (why_not(update, rules) and _is_zero(update)))
        if len(kept) < len(found):
            lines.append(f"left out {target}: its change is zero")
        if kept:
            changed[target] = kept
    return changed, lines


def _is_zero(update: Update) -> bool:
    """Whether a dense update is known to be zero; False if its values are not computed yet."""
    try:
        return isinstance(update, Dense) and not any(as_array(as_lazy(leaf)).any() for leaf in update.tensors.values())
    except NotComputed:
        return False


def rewritten(updates: Updates, rules: Rules, on_loss: str) -> tuple[Updates, list[str]]:
    """Fold scalings that the format cannot store, if `on_loss` allows it; return a line for each folded scaling."""
    if on_loss not in ("fold", "promote"):
        return updates, []
    lines: list[str] = []
    changed: dict[Target, tuple[Update, ...]] = {}
    for target, found in updates.items():
        changed[target] = tuple(_rewrite(target, update, rules, lines) for update in found)
    return changed, lines


def _rewrite(target: Target, update: Update, rules: Rules, lines: list[str]) -> Update:
    other = folded(update, rules) if why_not(update, rules) else update
    if other is update or why_not(other, rules):
        return update
    lines.append(f"folded the scaling into a factor of {target}")
    return other
