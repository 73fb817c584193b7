"""Decode a module's tensors to updates, with the formulas that kohya, LyCORIS, ComfyUI and diffusers share.

A slot is the kind of a tensor; spec/formats/lycoris.toml describes the slots. Shapes are read from the tensors, never
from metadata.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any, cast

from ...core.adapter import Target, Updates
from ...core.updates import Update
from ...errors import WRITE_AGAIN, Malformed, ShapeMismatch, Unsupported
from ...io.arrange import times
from ...io.lazy import DTYPES, Lazy, NotComputed, as_array, as_lazy, from_numpy, number_of
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
from .file import ImageModule, ImageUpdate, Rules, StoredTensor, rules_at

LOW_RANK = ("down", "up", "mid", "dora", "bias")
OTHERS = {"alpha"}


def decode(module: ImageModule, rules: Rules) -> list[ImageUpdate]:
    """Return the updates that a module's tensors encode, in the order in which they are applied.

    Raises:
        Malformed: a tensor that the method needs is missing, or the tensors belong to methods that cannot be combined.
        ShapeMismatch: the tensors' shapes do not fit the method.
        Unsupported: no method of adapterkit computes the function that the tensors define.
    """
    decoders, rules = _decoders(tuple(module.tensors)), rules_at(rules, module.stem)
    if not decoders:
        raise Malformed("the module has only an alpha", where=module.where, cure=WRITE_AGAIN)
    decoded_updates = [decoder(module, rules) for decoder in decoders]
    changes = [each.update.method for each in decoded_updates if changes_weight(each.update)]
    if len(changes) > 1:
        cure = "Remove the tensors of all but one of these methods from the file"
        raise Malformed(f"{ONE_CHANGE}: {', '.join(changes)}", where=module.where, cure=cure)
    if "dora" in module.tensors and isinstance(decoded_updates[-1].update, (LoHa, LoKr, LoRA)):
        if rules.trained.bypass:
            _check_bypassed(module, decoded_updates[-1].update)
            decoded_updates[-1] = replace(decoded_updates[-1], idle=("dora",))
        else:
            decoded_updates.append(_normed(module, decoded_updates[-1].update))
    used = {slot for each in decoded_updates for slot in (*each.fields.values(), *each.kept, *each.idle)}
    left = next((slot for slot in module.tensors if slot not in used and slot not in OTHERS), None)
    if left is not None:
        raise Malformed(
            "this tensor cannot be combined with the module's other tensors", where=module.keys[left], cure=WRITE_AGAIN
        )
    return decoded_updates


ONE_CHANGE = "the tools that load such files apply only one change to a weight, but the module has several"
"""LyCORIS's loader takes the first method in its list, and ComfyUI's takes the last one. Neither adds the changes."""


def changes_weight(update: Update) -> bool:
    """Whether an update changes the weight by itself, not only the bias, and not only the norm of a changed weight."""
    return not (isinstance(update, WeightNorm) or (isinstance(update, Dense) and update.D is None))


@lru_cache(maxsize=1 << 10)
def _decoders(slots: tuple[str, ...]) -> list[Callable[[ImageModule, Rules], ImageUpdate]]:
    return [decoder for starts, decoder in _DECODERS if any(slot.startswith(starts) for slot in slots)]


def scaling(module: ImageModule, rank: int, rules: Rules) -> float:
    """Return a module's scaling, `alpha / rank`.

    Return 1 if the alpha is missing. Also return 1 if the alpha is 0, unless `by_formula` is set.

    Raises:
        Malformed: the alpha is missing, and both `by_formula` and `alpha_needed` are set. Or the alpha is 0, and
            neither `by_formula` nor `alpha_needed` is set.
        ShapeMismatch: the rank is 0.
    """
    if "alpha" not in module.tensors:
        if rules.alpha_needed and rules.by_formula:
            raise Malformed("the module has no alpha", where=module.where, cure=_WITHOUT_ALPHA)
        return 1.0
    alpha = module.number("alpha")
    if alpha == 0 and not (rules.alpha_needed or rules.by_formula):
        why = "the alpha is 0, so the adapter would have no effect"
        raise Malformed(why, where=module.keys["alpha"], cure=WRITE_AGAIN)
    if rank < 1:
        raise ShapeMismatch("the rank is 0", where=module.where, cure=WRITE_AGAIN)
    return alpha / rank if alpha or rules.by_formula else 1.0


def _lora(module: ImageModule, rules: Rules) -> ImageUpdate:
    down, _ = module.need("down", "up")
    rank = down.shape[0] if down.shape else 0
    fields = {"A": "down", "B": "up"}
    times = drawn(rank, rules.trained.unit)
    leaves: dict[str, Any] = {"A": down, "B": _flat(module, "up", 2), "scaling": scaling(module, rank, rules) * times}
    derived = {}
    if "mid" in module.tensors:
        leaves["A"] = _through(module)
        del fields["A"]
        derived = {"down": "A", "mid": "A"}
    if "bias" in module.tensors:
        leaves["bias"], fields["bias"] = module.tensors["bias"], "bias"
    # DoRA has one magnitude per output. For magnitudes of another shape, `decode` adds a `WeightNorm` to the LoRA. With
    # `bypass_mode`, the magnitudes have no effect.
    is_dora = "dora" in module.tensors and _per_output(module, module.tensors["up"].shape[0])
    if is_dora and not rules.trained.bypass:
        if "bias" in module.tensors:
            raise Unsupported(
                "DoRA cannot have a bias",
                where=module.keys["bias"],
                cure="Merge the adapter with the tool that trained it",
            )
        leaves["magnitude"], fields["magnitude"] = _magnitude(module), "dora"
        return ImageUpdate(DoRA(**leaves), fields, tuple(derived), derived)
    return ImageUpdate(LoRA(**leaves), fields, tuple(derived), derived)


def drawn(rank: int, unit: int) -> int:
    """Return the factor by which a network option multiplies a LoRA's `alpha / r`; see `Arguments.unit`.

    The factor is `unit`, or 1 if `unit` is 0 or does not divide the rank. DyLoRA in LyCORIS has `r / unit` blocks, and
    its scaling is alpha divided by the number of blocks. With split_qkv, sd-scripts trains `unit` parts of a FLUX
    weight separately, and each part's scaling is `alpha / (r / unit)`.
    """
    return unit if unit and rank % unit == 0 else 1


def _through(module: ImageModule) -> Lazy:
    """Multiply the Tucker core `mid` by the factor `down`. The product is a convolution kernel in float32."""
    down, mid = module.need("down", "mid")
    rank, *kernel = mid.shape[1:] if len(mid.shape) > 2 else (0,)
    ones = all(n == 1 for n in down.shape[2:])
    if mid.shape[:2] != (rank, rank) or len(down.shape) < 2 or down.shape[0] != rank or not ones:
        why = (
            f"the Tucker core (mid) must have the shape [r, r, *kernel], and the factor (down) must have the shape "
            f"[r, in, 1, ...]; their shapes are {list(mid.shape)} and {list(down.shape)}"
        )
        raise ShapeMismatch(why, where=module.keys["mid"], cure=WRITE_AGAIN)
    shape = (rank, down.shape[1], *kernel)
    if math.prod(shape) > LARGEST:
        raise Unsupported(
            f"the kernel from this Tucker core is too large: its shape is {list(shape)}",
            where=module.keys["mid"],
            cure=WRITE_AGAIN,
        )

    def fetch() -> bytes:
        import numpy as np

        core = as_array(mid).astype(np.float64).reshape(rank, rank, -1)
        inputs = as_array(down).astype(np.float64).reshape(rank, -1)
        kernel: bytes = np.einsum("pqk,qi->pik", core, inputs).astype("<f4").tobytes()
        return kernel

    return Lazy(shape, DTYPES["F32"], fetch)


LARGEST = 1 << 31
"""The largest number of elements in a kernel that the reader computes from a Tucker core."""


def _per_output(module: ImageModule, out: int) -> bool:
    """Whether the magnitudes have the shape [out, 1, ...], or PEFT's shape for convolutions, [1, out, 1, ...]."""
    shape = module.tensors["dora"].shape
    if "lora_magnitude_vector" in module.keys["dora"] and shape[:2] == (1, out):
        return all(n == 1 for n in shape[2:])
    return shape[:1] == (out,) and all(n == 1 for n in shape[1:])


def _magnitude(module: ImageModule) -> Lazy:
    return module.tensors["dora"].reshape(-1)


def _normed(module: ImageModule, update: Update) -> ImageUpdate:
    """Decode the magnitudes of a LoHa, LoKr or LoRA.

    Their shape is `[out, 1, ...]`, or `[1, in, 1, ...]` if the adapter was trained with `wd_on_output=False`.
    """
    shape = module.tensors["dora"].shape
    sizes = [n for n in shape if n != 1]
    if len(shape) < 2 or len(sizes) > 1 or any(n != 1 for n in shape[2:]):
        why = f"the magnitudes must have the shape [out, 1, ...] or [1, in, 1, ...]; their shape is {list(shape)}"
        raise Unsupported(why, where=module.keys["dora"], cure=WRITE_AGAIN)
    inputs, dims = shape[0] == 1 and shape[1] != 1, update.dims()
    width = dims.get("in" if inputs else "out")
    if width not in (None, sizes[0] if sizes else 1):
        why = f"the magnitudes have shape {list(shape)}, but the module has {width} {'inputs' if inputs else 'outputs'}"
        raise ShapeMismatch(why, where=module.keys["dora"], cure=WRITE_AGAIN)
    leaves: dict[str, Any] = {"into" if inputs else "out": _magnitude(module)}
    return ImageUpdate(WeightNorm(**leaves, eps=EPSILON), dict.fromkeys(leaves, "dora"))


def _check_bypassed(module: ImageModule, update: Update) -> None:
    if isinstance(update, LoRA) and len(update.A.shape) > 2:
        why = (
            "the module is DoRA on a convolution, trained with bypass_mode: LyCORIS uses the magnitude only on grouped "
            "convolutions, and the file does not show whether this convolution is grouped"
        )
        cure = 'To use the magnitude, read the file with --compat formula (compat="formula")'
        raise Unsupported(why, where=module.keys["dora"], cure=cure)


EPSILON = 2.0**-23
"""float32's epsilon, which LyCORIS adds to a norm before dividing by it."""


def _loha(module: ImageModule, rules: Rules) -> ImageUpdate:
    needed = [f"hada_w{n}_{x}" for n in (1, 2) for x in "ab"]
    cored = any(slot.startswith("hada_t") for slot in module.tensors)
    module.need(*needed, *(("hada_t1", "hada_t2") if cored else ()))
    fields, leaves = dict[str, str](), dict[str, Any]()
    for n in (1, 2):
        a, b = module.tensors[f"hada_w{n}_a"], module.tensors[f"hada_w{n}_b"]
        fields |= {f"w{n}_a": f"hada_w{n}_a", (f"w{n}_in" if cored else f"w{n}_b"): f"hada_w{n}_b"}
        leaves |= {f"w{n}_a": _turned(a) if cored else a, (f"w{n}_in" if cored else f"w{n}_b"): b}
        if cored:
            fields[f"t{n}"], leaves[f"t{n}"] = f"hada_t{n}", module.tensors[f"hada_t{n}"]
    rank = module.tensors["hada_w1_b"].shape[0] if module.tensors["hada_w1_b"].shape else 0
    return ImageUpdate(LoHa(**leaves, scaling=scaling(module, rank, rules)), fields)


def _lokr(module: ImageModule, rules: Rules) -> ImageUpdate:
    slots = [slot for slot in module.tensors if slot.startswith("lokr_")]
    cored = "lokr_t2" in module.tensors
    fields = {slot.removeprefix("lokr_"): slot for slot in slots}
    if cored and "w2_b" in fields:
        fields["w2_in"] = fields.pop("w2_b")
    leaves: dict[str, Any] = {field: module.tensors[slot] for field, slot in fields.items()}
    if cored and "w2_a" in leaves:
        leaves["w2_a"] = _turned(leaves["w2_a"])
    factors = [module.tensors[slot] for slot in ("lokr_w1_b", "lokr_w2_b") if slot in module.tensors]
    whole = {"w1", "w2"} <= fields.keys()
    # If both factors are full, LyCORIS ignores the alpha, so the file may contain any alpha. The exception is rs_lora.
    rank = factors[0].shape[0] if factors and factors[0].shape else 0
    # With rs_lora and two full factors, LyCORIS saves `alpha = r * sqrt(r)`, and the scaling is `sqrt(r)`. The tensors
    # do not show r, so compute the scaling as the cube root of alpha.
    root = max(module.number("alpha"), 0.0) ** (1 / 3) if rules.trained.rs and "alpha" in module.tensors else 1.0
    update = LoKr(**leaves, scaling=root if whole else scaling(module, rank, rules))
    try:
        update.check()
    except Malformed as error:
        raise Malformed(error.why, where=module.where, cure=WRITE_AGAIN) from None
    return ImageUpdate(update, fields)


def _oft(module: ImageModule, rules: Rules) -> ImageUpdate:
    _no_dora(module)
    (blocks,) = module.need("oft_blocks")
    if len(blocks.shape) not in (3, 4) or blocks.shape[-1] != blocks.shape[-2] or 0 in blocks.shape:
        raise ShapeMismatch(
            f"the shape {list(blocks.shape)} is not [blocks, b, b] (OFT) or [m, blocks, b, b] (BOFT)",
            where=module.keys["oft_blocks"],
            cure=WRITE_AGAIN,
        )
    fields = {"square": "oft_blocks"}
    leaves: dict[str, Any] = {"square": blocks}
    if "rescale" in module.tensors:
        fields["rescale"], leaves["rescale"] = "rescale", _flat(module, "rescale", 1)
    leaves["constraint"] = _constraint(module, rules) * blocks.shape[-2] * blocks.shape[-3]
    leaves["on_output"] = rules.trained.bypass
    if len(blocks.shape) == 4:
        return ImageUpdate(BOFTOutputs(**leaves), fields)
    return ImageUpdate(OFT(**leaves, side="out"), fields)


def _oft_inputs(module: ImageModule, _: Rules) -> ImageUpdate:
    """Decode OneTrainer's OFT, which rotates blocks of inputs. It is PEFT's OFT with five terms of the Cayley series.

    With `oft_scaled`, OneTrainer divides the stored values by `2 * sqrt(b - 1)`, for blocks of size b. On convolutions,
    OneTrainer applies the inverse rotation. The file does not show which layers are convolutions, so refuse modules
    whose names match `_CONVOLUTION`.
    """
    _no_dora(module)
    (pairs,) = module.need("oft_R")
    if _CONVOLUTION.search(module.stem):
        why = "this is OneTrainer's OFT on a convolution, where OneTrainer uses the inverse rotation"
        raise Unsupported(why, where=module.keys["oft_R"], cure="Merge the adapter with OneTrainer, and extract a LoRA")
    if len(pairs.shape) != 2:
        raise ShapeMismatch(
            f"the shape must be [blocks, b * (b - 1) / 2], but it is {list(pairs.shape)}",
            where=module.keys["oft_R"],
            cure=WRITE_AGAIN,
        )
    five: dict[str, Any] = {"terms": 5}
    if "oft_scaled" not in module.tensors:
        return ImageUpdate(OFT(pairs=cast("Any", pairs), **five), {"pairs": "oft_R"})
    size = (1 + math.isqrt(1 + 8 * pairs.shape[1])) // 2
    scaled = times(pairs, 1 / (2 * math.sqrt(size - 1))) if size > 1 else pairs
    return ImageUpdate(OFT(pairs=cast("Any", scaled), **five), {}, ("oft_scaled", "oft_R"), {"oft_R": "pairs"})


_CONVOLUTION = re.compile(
    r"conv|(?:down|up)samplers|proj_in$|proj_out$|patch|pos_embed|in_layers|out_layers|(?:^|_)op$"
)
"""A pattern for names of modules that are convolutions in some models."""


def _constraint(module: ImageModule, rules: Rules) -> float:
    if "alpha" not in module.tensors:
        raise Malformed(
            "the module has no alpha, which an OFT needs as its constraint", where=module.where, cure=WRITE_AGAIN
        )
    alpha = module.number("alpha")
    if alpha < 0 or (alpha == 0 and not rules.oft_zero):
        why = f"the constraint (alpha) is {alpha}, which allows no rotation"
        raise Malformed(why, where=module.keys["alpha"], cure=WRITE_AGAIN)
    return alpha


def _glora(module: ImageModule, rules: Rules) -> ImageUpdate:
    _no_dora(module)
    slots = ("a1", "a2", "b1", "b2")
    tensors = module.need(*slots)
    if "bm" in module.tensors:
        raise Unsupported(
            "GLoRA cannot have a Tucker core", where=module.keys["bm"], cure="Merge the adapter with LyCORIS"
        )
    leaves: dict[str, Any] = dict(zip(("A1", "A2", "B1", "B2"), tensors, strict=True))
    for field, slot in (("A1", "a1"), ("A2", "a2"), ("B1", "b1")):
        leaves[field] = _flat(module, slot, 2)
    rank = leaves["A2"].shape[0]
    # Multiply by `sqrt(r)`: with rs_lora, other methods save the user's alpha times `sqrt(r)`, but GLoRA saves the
    # user's alpha unchanged.
    times = math.sqrt(rank) if rules.trained.rs else 1.0
    update = GLoRAProducts(**leaves, scaling=scaling(module, rank, rules) * times)
    return ImageUpdate(update, dict(zip(leaves, slots, strict=True)))


def _ia3(module: ImageModule, rules: Rules) -> ImageUpdate:
    _no_dora(module)
    module.need("weight", "on_input")
    on_input = module.number("on_input")
    if on_input not in (0, 1):
        raise Malformed(f"on_input must be 0 or 1, got {on_input}", where=module.keys["on_input"], cure=WRITE_AGAIN)
    field = "w_in" if on_input else "w"
    leaves: dict[str, Any] = {field: module.tensors["weight"].reshape(-1)}
    return ImageUpdate(
        IA3Weights(**leaves, on_output=rules.trained.bypass and not on_input), {field: "weight"}, ("on_input",)
    )


def _dense(module: ImageModule, _: Rules) -> ImageUpdate:
    slots = {"D": "diff", "d": "diff_b"} if "diff" in module.tensors or "diff_b" in module.tensors else _NORM
    fields = {field: slot for field, slot in slots.items() if slot in module.tensors}
    leaves: dict[str, Any] = {field: module.tensors[slot] for field, slot in fields.items()}
    return ImageUpdate(Dense(**leaves), fields)


def _set(module: ImageModule, _: Rules) -> ImageUpdate:
    fields = {field: slot for field, slot in (("weight", "set_weight"), ("bias", "set_bias")) if slot in module.tensors}
    leaves: dict[str, Any] = {field: module.tensors[slot] for field, slot in fields.items()}
    return ImageUpdate(Replacement(**leaves), fields)


def _t_lora(module: ImageModule, _: Rules) -> ImageUpdate:
    slot = next(slot for slot in module.tensors if slot.startswith(T_LORA))
    why = "T-LoRA changes a weight relative to its initial factors, and the file does not have these factors"
    raise Unsupported(
        why, where=module.keys[slot], cure="Merge the adapter with the tool that trained it, and extract a LoRA"
    )


def _reshape(module: ImageModule, _: Rules) -> ImageUpdate:
    why = "the adapter enlarges the weight that it adapts, so no base has a weight of this size"
    raise Unsupported(why, where=module.keys["reshape_weight"], cure="Merge the adapter with ComfyUI")


_NORM = {"D": "w_norm", "d": "b_norm"}
T_LORA = ("q_layer", "p_layer", "lambda_layer")

_DECODERS: tuple[tuple[tuple[str, ...], Callable[[ImageModule, Rules], ImageUpdate]], ...] = (
    (T_LORA, _t_lora),
    (("reshape_weight",), _reshape),
    (("set_",), _set),
    (("down", "up", "mid"), _lora),
    (("hada_",), _loha),
    (("lokr_",), _lokr),
    (("oft_blocks",), _oft),
    (("oft_R", "oft_scaled"), _oft_inputs),
    (("a1", "a2", "b1", "b2"), _glora),
    (("weight", "on_input"), _ia3),
    (("diff", "w_norm", "b_norm"), _dense),
)
"""Pairs of (prefixes of a method's slots, function that decodes these slots). Updates are applied in this order."""


def _no_dora(module: ImageModule) -> None:
    if "dora" in module.tensors:
        why = "the module has a DoRA magnitude, and adapterkit cannot combine it with this method"
        raise Unsupported(why, where=module.keys["dora"], cure="Merge the adapter with LyCORIS, and extract a LoRA")


def _flat(module: ImageModule, slot: str, axes: int) -> Lazy:
    """Keep a tensor's first `axes` axes, and remove the others, which must have size 1."""
    leaf = module.tensors[slot]
    if len(leaf.shape) < axes or any(n != 1 for n in leaf.shape[axes:]):
        raise ShapeMismatch(
            f"a factor must have {axes} axes (further axes must have size 1), but the shape is {list(leaf.shape)}",
            where=module.keys[slot],
            cure=WRITE_AGAIN,
        )
    return leaf.reshape(*leaf.shape[:axes])


def _turned(leaf: Lazy) -> Lazy:
    if len(leaf.shape) != 2:
        raise ShapeMismatch(f"a factor must have two axes, but the shape is {list(leaf.shape)}", cure=WRITE_AGAIN)
    return leaf.map(lambda array: array.T, (leaf.shape[1], leaf.shape[0]))


def number(value: float) -> Lazy:
    """Return a number as a scalar tensor: float32 if it represents the number exactly, otherwise float64."""
    return number_of(float(value).hex())


_WITHOUT_ALPHA = 'Read the file without --compat formula (compat="formula"): adapterkit then uses the rank as alpha'

# Encode an update as one tensor for each slot, or return the reason why the format cannot express the update.


_SLOTS: dict[type[Update], str] = {
    LoRA: "down", DoRA: "dora", LoHa: "hada_", LoKr: "lokr_", OFT: "oft_blocks", GLoRAProducts: "a1",
    BOFTOutputs: "rescale", WeightNorm: "dora", IA3Weights: "on_input", Dense: "diff", Replacement: "set_weight",
}  # fmt: skip
"""A map from each method's class to a slot. A format that has this slot can express the method."""


LARGEST_RANK = 1e290
"""The largest scaling that is written. Readers accept only alphas below 1e300, and the alpha is scaling * rank."""


def why_not(update: Update, rules: Rules) -> str:
    """Return the reason why a format cannot express an update; empty if it can."""
    slot = _SLOTS.get(type(update))
    if slot is None or slot not in rules.slots:
        return f"the format does not have the method {update.method}"
    if isinstance(update, LoRA) and update.bias is not None and "bias" not in rules.slots:
        return "the format cannot store the bias of this lora"
    if abs(update.attributes.get("scaling", 0.0)) > LARGEST_RANK:
        return f"the absolute value of its scaling is above {LARGEST_RANK}, so the alpha would be too large"
    rank_for_zero = "alpha" in rules.slots and not rules.by_formula
    if isinstance(update, (LoRA, DoRA, LoHa, GLoRAProducts)) and update.scaling == 0 and rank_for_zero:
        return "its scaling is 0, but the format's tools replace an alpha of 0 by the rank"
    if isinstance(update, LoKr) and update.stacked:
        return "the format cannot express a lokr on a stack of matrices (PEFT trains such a lokr on Conv1d)"
    if isinstance(update, (OFT, BOFTOutputs, IA3Weights)) and why_not_there(update, rules):
        return why_not_there(update, rules)
    if isinstance(update, OFT):
        return _why_not_oft(update, rules)
    if isinstance(update, WeightNorm):
        if rules.peft:
            return "the format can store magnitudes only for dora"
        return "" if update.eps == EPSILON else f"its epsilon is {update.eps}, but LyCORIS always uses {EPSILON}"
    if _unscaled(update, rules) and update.attributes["scaling"] != 1:
        return f"{update.method} {NO_SLOT_FOR_SCALING}"
    return ""


NO_SLOT_FOR_SCALING = "has a scaling, which the format cannot store"


def why_not_there(update: OFT | BOFTOutputs | IA3Weights, rules: Rules) -> str:
    """Return the reason why the header's `bypass_mode` does not fit an update; empty if it fits.

    The header has one `bypass_mode` for all modules. With `bypass_mode`, every OFT, BOFT and IA3 on outputs also
    changes the bias. Without `bypass_mode`, none of them changes the bias.
    """
    inputs = isinstance(update, IA3Weights) and update.w is None
    if inputs or update.on_output == rules.trained.bypass:
        return ""
    bypass_text = "but ss_network_args has" if rules.trained.bypass else "but ss_network_args does not have"
    return f"{update.method} {'changes' if update.on_output else 'does not change'} the bias, {bypass_text} bypass_mode"


def _why_not_oft(update: OFT, rules: Rules) -> str:
    if update.square is None or update.side != "out" or update.terms or update.coft:
        return "the format needs an oft that rotates outputs by exact Cayley transforms and stores full blocks"
    if update.rescale is not None and "rescale" not in rules.slots:
        return "the format cannot express an oft that rescales the outputs"
    return (
        "the format cannot express an oft without a constraint" if not rules.oft_zero and update.constraint == 0 else ""
    )


def folded(update: Update, rules: Rules) -> Update:
    """Multiply a factor (and the bias, if any) by the update's scaling, and set the scaling to 1. Dtypes stay the same.

    Return the update unchanged if a slot can store the scaling.
    """
    field = _unscaled(update, rules)
    scaling = update.attributes.get("scaling", 1.0)
    if not field or scaling == 1:
        return update
    names = {"D": ("D", "d"), "B": ("B", "bias")}.get(field, (field,))
    return update.replace(scaling=1.0, **{n: times(update.tensors[n], scaling) for n in names if n in update.tensors})


def _unscaled(update: Update, rules: Rules) -> str:
    """Return the field that must be multiplied by the scaling; empty if a slot can store the scaling."""
    if isinstance(update, Dense):
        return "D" if update.D is not None else "d"
    if isinstance(update, LoKr) and rules.peft:
        return "w1" if update.w1 is not None else "w1_a"
    if isinstance(update, LoKr) and update.w1 is not None and update.w2 is not None:
        return "" if rules.trained.rs else "w1"
    has_alpha = "alpha" in rules.slots
    return "" if has_alpha or not isinstance(update, (LoRA, DoRA)) else "B"


def encode(update: Update, rules: Rules, kernel: int = 0) -> list[StoredTensor]:
    """Return the tensors to write for an update, with the alpha last. `why_not` must have accepted the update.

    Args:
        update: the update.
        rules: the format's rules.
        kernel: the number of the weight's kernel axes, for methods whose tensors do not show this number.
    """
    leaves = {name: as_lazy(leaf) for name, leaf in update.tensors.items()}
    if isinstance(update, (LoRA, DoRA)):
        return _low_rank(update, leaves, rules)
    if isinstance(update, LoHa):
        return _loha_slots(update, leaves)
    if isinstance(update, LoKr):
        return _lokr_slots(update, leaves, rules)
    if isinstance(update, OFT | BOFTOutputs):
        if "pairs" in leaves:
            return [
                StoredTensor("oft_R", leaves["pairs"], "pairs")
            ]  # OneTrainer's slot. `why_not` refuses to write such updates, so only `ImageLeftovers` encodes them.
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


def _loha_slots(update: LoHa, leaves: Mapping[str, Lazy]) -> list[StoredTensor]:
    cored, slots = update.t1 is not None, []
    for n in (1, 2):
        a = leaves[f"w{n}_a"]
        slots.append(StoredTensor(f"hada_w{n}_a", _turned_back(a) if cored else a, f"w{n}_a"))
        inner = f"w{n}_in" if cored else f"w{n}_b"
        slots.append(StoredTensor(f"hada_w{n}_b", leaves[inner], inner))
        slots += [StoredTensor(f"hada_t{n}", leaves[f"t{n}"], f"t{n}")] if cored else []
    return [*slots, _alpha(update, leaves["w1_a"].shape[1])]


def _lokr_slots(update: LoKr, leaves: Mapping[str, Lazy], rules: Rules) -> list[StoredTensor]:
    cored = update.t2 is not None
    slots = []
    for name, leaf in leaves.items():
        slot = "lokr_" + ("w2_b" if name == "w2_in" else name)
        slots.append(StoredTensor(slot, _turned_back(leaf) if cored and name == "w2_a" else leaf, name))
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


def _turned_back(leaf: Lazy) -> Lazy:
    return leaf.map(lambda array: array.T, (leaf.shape[1], leaf.shape[0]))


def without_effect(updates: Updates, rules: Rules) -> tuple[Updates, list[str]]:
    """Omit the updates that the format cannot express and that are all zero.

    Return the other updates, and one line for each target that lost updates.

    LoRAs extracted from Wan contain an all-zero `diff` tensor for every norm.
    """
    lines: list[str] = []
    changed: dict[Target, tuple[Update, ...]] = {}
    for target, group in updates.items():
        kept = tuple(update for update in group if not (why_not(update, rules) and _is_zero(update)))
        if len(kept) < len(group):
            lines.append(f"left out {target}: its change is zero")
        if kept:
            changed[target] = kept
    return changed, lines


def _is_zero(update: Update) -> bool:
    """Whether an update is dense and all its values are zero; False if the values are not computed yet."""
    try:
        return isinstance(update, Dense) and not any(as_array(as_lazy(leaf)).any() for leaf in update.tensors.values())
    except NotComputed:
        return False


def rewritten(updates: Updates, rules: Rules, on_loss: str) -> tuple[Updates, list[str]]:
    """Fold a scaling into a factor if the format cannot store the scaling and `on_loss` allows folding.

    Return the updates, and one line for each folded scaling.
    """
    if on_loss not in ("fold", "promote"):
        return updates, []
    lines: list[str] = []
    changed: dict[Target, tuple[Update, ...]] = {}
    for target, group in updates.items():
        changed[target] = tuple(_rewrite(target, update, rules, lines) for update in group)
    return changed, lines


def _rewrite(target: Target, update: Update, rules: Rules, lines: list[str]) -> Update:
    other = folded(update, rules) if why_not(update, rules) else update
    if other is update or why_not(other, rules):
        return update
    lines.append(f"folded the scaling into a factor of {target}")
    return other
