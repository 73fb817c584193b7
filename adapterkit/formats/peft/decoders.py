"""Decode the updates that have no `Family`: LoRA and its variants, whole parameters, IA3, token rows and LN tuning."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from itertools import pairwise
from typing import TYPE_CHECKING

from ...errors import SAVE_WITH_PEFT, USE_ITS_CONFIG, Malformed, ShapeMismatch, Unsupported
from ...io.lazy import DTYPES, Lazy
from ...methods.dora import DoRA
from ...methods.grouped_dora import GroupedDoRA
from ...methods.ia3 import IA3
from ...methods.oft import OFT
from ...methods.oft_patches import OFTPatches
from ...methods.replacement import Replacement
from .._format import Departure
from .._trained import lora_among_zeros, refused
from .factors import PeftFactors, adapt, adapts_parameter, check_rank, decode_parameters, find_factors
from .families import OUTPUT_TIMES
from .file import DecodedUpdate, File, Findings, Kept, Key, PeftSettings, make
from .patterns import matches, unwrapped

if TYPE_CHECKING:
    from ...core.updates import Update
    from ...io.lazy import Shape
    from .._format import LayerFacts


# Decode LoRA and its variants on modules: linear layers, convolutions, embeddings and attention modules.
#
# The weight of an embedding is [vocabulary, dimension]. B @ A is the change of the transposed weight, so the target has
# the layout `in out *k`. In an `nn.MultiheadAttention`, PEFT adapts the input and output projections with the same rank
# and alpha, which the config lists under the attention module's name. PEFT's forward adds the change of the output
# projection twice (https://github.com/huggingface/peft/pull/3774).


# On a convolution, compute the same outputs as PEFT's forward, even if they differ from the outputs of a merged weight.
#
# PEFT's LoRA creates `lora_A` with the class, kernel, stride and padding of the base layer, but without the base
# layer's padding mode and dilation. So `lora_A` pads with zeros and is not dilated, even if the base layer has another
# padding mode or is dilated. PEFT's other methods call `torch.nn.functional.conv2d` with the base layer's padding. Like
# `lora_A`, `conv2d` pads with zeros, whatever the padding mode is. IA3 and OFT are exceptions: they call the base layer
# itself, which uses its own padding mode. OFT first rotates the patches of the input; see `on_patches`.


UNPADDED = (IA3, OFTPatches, Replacement)
"""Methods that `zero_padded` leaves unchanged.

With these methods, PEFT runs no convolution besides the base layer's. The base layer uses its own padding mode.
"""


def turns_patches(shape: tuple[int, ...]) -> bool:
    """Whether PEFT's OFT rotates patches of the input: true for a Conv2d with a kernel larger than 1 x 1."""
    return len(shape) == 4 and math.prod(shape[2:]) > 1


def on_patches(update: Update, layer: LayerFacts) -> Update:
    """Convert an OFT to an `OFTPatches` if PEFT rotates patches at this layer. Other updates stay unchanged."""
    if not isinstance(update, OFT) or update.side == "out" or not turns_patches(layer.shape) or update.pairs is None:
        return update
    same = {name: getattr(update, name) for name in ("terms", "doubled", "coft", "eps")}
    return OFTPatches(pairs=update.pairs, **same)


def zero_padded(update: Update, layer: LayerFacts) -> Update:
    """Rewrite an update so that it pads a convolution's input with zeros, as PEFT's forward does.

    The update stays unchanged if no rewrite is needed, for example if the layer itself pads with zeros and is not
    dilated.

    Raises:
        Unsupported: no method of adapterkit computes PEFT's forward at this layer.
    """
    if not layer.padding or isinstance(update, UNPADDED) or update.kind not in ("additive", "weight", "output"):
        return update
    if isinstance(update, DoRA):
        pair = {name: getattr(update, name) for name in ("A", "B", "magnitude", "scaling")}
        return GroupedDoRA(**pair, zero_padded=True)
    changed = lora_among_zeros(update)
    if changed is None:
        raise refused(update, layer, "PEFT")
    return changed


DEPARTURES = {
    "attention_output_twice": Departure(
        "the change of nn.MultiheadAttention's output projection is added twice",
        "the change is added once",
    ),
    "attention_input_bias": Departure(
        "with lora_bias, the adapter's bias of nn.MultiheadAttention's input projection has no effect",
        "the adapter's bias is added to the projection's bias",
    ),
    "grouped_dora_norm": Departure(
        "on a grouped convolution, DoRA divides by the norms of W + B @ A with B reshaped to [out / groups, r], "
        "although its forward uses other kernels",
        "DoRA divides by the norms of the changed kernels that its forward uses; each norm covers all channels",
    ),
    "convolution_padding": Departure(
        "on a convolution whose padding_mode is not zeros, or with a dilation and padding=same, lora_A pads its input "
        "with zeros and is not dilated; methods other than LoRA and DoRA are refused; these rules need a live layer, "
        "because a file does not show a layer's padding and dilation",
        "the change is added to the weight, as in PEFT's merge, so the layer's padding and dilation apply to it",
        zero_padded,
    ),
}
"""The cases in which PEFT's forward differs from the formulas of LoRA and its variants."""

TRAINING = ("lora_monteclora_sampler", "lora_velora_embed")
"""Beginnings of `Key.part` for tensors that are used only in training."""


def decode(file: File) -> Findings:
    """Yield all updates that the file stores as lora_A and lora_B: LoRA, DoRA and the other variants of LoRA.

    Raises:
        Malformed: a module lacks a tensor, or has a tensor that the config does not enable.
        ShapeMismatch: the tensors' shapes contradict each other or the ranks in the config.
    """
    yield from (Kept(key) for key in file.tensors if key.part.startswith(TRAINING))
    modules: list[PeftFactors] = []
    parameters: list[PeftFactors] = []
    for each in find_factors(file):
        (parameters if adapts_parameter(file, each.key.path) else modules).append(each)
    attentions = file.attentions()
    for each in modules:
        if file.settings.enable_lora is not None and len(each.B.shape) == 3 and len(each.A.shape) == 2:
            yield from decode_blocks(file.settings, each)
        else:
            yield from _module(file, each, attentions)
    yield from decode_parameters(file, parameters)


def _module(file: File, factors: PeftFactors, attentions: Collection[str]) -> Findings:
    key = factors.key
    name, path = (key.module, key.path) if key.wrapped else (key.stem, key.stem)
    blocks = file.settings.use_bdlora
    if blocks is not None and blocks.factor(name) and not factors.embedding:
        yield _blocked(file, factors, blocks.factor(name), blocks.nblocks)
        return
    _check_plain(factors, file.settings.rank(name))
    tensors = {"A": factors.A, "B": _flat_output(factors)}
    for field in ("magnitude", "diag", "bias"):
        if field in factors.tensors:
            tensors[field] = _vector(factors, field)
    if "R" in factors.tensors:
        tensors["R"] = factors.tensors["R"]
    keys, times = factors.keys, 1.0
    if name in attentions and not file.by_formula:
        if name == path and "bias" in tensors:
            del tensors["bias"]
            yield Kept(keys["bias"])
            keys = {field: key for field, key in keys.items() if field != "bias"}
        times = 1.0 if name == path else OUTPUT_TIMES
    if path == name and path in attentions:
        path = f"{path}.in_proj_weight"
    update = adapt(file.settings, name, tensors, times, embedding=factors.embedding, by_formula=file.by_formula)
    if update.method == "arrow":
        idle = {field: f"idle_{field}" for field in keys if f"idle_{field}" in update.tensors}
        keys = {idle.get(field, field): key for field, key in keys.items()}
    matrix = len(factors.A.shape) == 2
    turned = factors.embedding or (file.settings.fan_in_fan_out and matrix and factors.key.module not in attentions)
    yield DecodedUpdate(path, update, keys, "in out *k" if turned else "out *in")


def _blocked(file: File, factors: PeftFactors, factor: str, n: int) -> DecodedUpdate:
    """Decode a BD-LoRA. `factor` names the block-diagonal factor, A or B, which becomes a stack of n blocks."""
    name, A, B = factors.key.path, factors.A, factors.B
    rank = file.settings.rank(name)
    inner, rows = rank // n if factor == "B" else rank, factors.tensors[factor].shape[0]
    flat = len(A.shape) == len(B.shape) == 2
    if not flat or (A.shape[0], B.shape[1]) != (rank, inner) or rank % n or rows % n:
        why = f"A is {list(A.shape)} and B is {list(B.shape)}; the config states rank {rank} and {n} blocks of {factor}"
        raise ShapeMismatch(why, where=factors.keys[factor].text, cure=USE_ITS_CONFIG)
    tensors, keys = dict(factors.tensors), dict(factors.keys)
    tensors[f"{factor}_blocks"] = tensors.pop(factor).reshape(n, rows // n, factors.tensors[factor].shape[1])
    keys[f"{factor}_blocks"] = keys.pop(factor)
    return DecodedUpdate(name, adapt(file.settings, name, tensors), keys)


def _check_plain(factors: PeftFactors, rank: int) -> None:
    if factors.key.depth:
        why = "the key contains .base_layer, as if a parameter were adapted, but the config adapts no parameter here"
        raise Malformed(why, where=factors.key.text, cure=USE_ITS_CONFIG)
    check_rank(factors, rank, groups=_groups(factors))


def _groups(factors: PeftFactors) -> int:
    """Return the number of groups of a grouped convolution; 1 for any other layer. PEFT splits only B into groups."""
    rank, share = factors.A.shape[0], factors.B.shape[1]
    return rank // share if len(factors.A.shape) > 2 and 0 < share < rank and rank % share == 0 else 1


def _flat_output(factors: PeftFactors) -> Lazy:
    """Return B as [out, r]. On a convolution, B has a kernel of size 1, so all axes after the first two have size 1."""
    A, B = factors.A, factors.B
    if len(A.shape) != len(B.shape) or any(size != 1 for size in B.shape[2:]):
        why = f"B has the shape {list(B.shape)}, which does not fit the shape of A, {list(A.shape)}"
        raise ShapeMismatch(why, where=factors.keys["B"].text, cure=SAVE_WITH_PEFT)
    return B if len(B.shape) == 2 else B.reshape(*B.shape[:2])


def _vector(factors: PeftFactors, field: str) -> Lazy:
    tensor, out = factors.tensors[field], factors.B.shape[1 if field == "diag" else 0]
    if sorted(tensor.shape)[-1:] != [out] or sorted(tensor.shape)[:-1] != [1] * (len(tensor.shape) - 1):
        why = f"the shape is {list(tensor.shape)}, but a vector that fits lora_B has {out} elements"
        raise ShapeMismatch(why, where=factors.keys[field].text, cure=SAVE_WITH_PEFT)
    return tensor if len(tensor.shape) == 1 else tensor.reshape(out)


# Decode LoRA with `enable_lora`, which adapts blocks of a fused weight. Only PEFT 0.1 and 0.2 wrote such files.
# The outputs of the weight form n equal blocks. Only the enabled blocks are adapted, and B contains only the rows of
# the enabled blocks. A and B form a grouped convolution: each group of B's rows is multiplied by its own rows of A.


def decode_blocks(settings: PeftSettings, factors: PeftFactors) -> Iterator[DecodedUpdate]:
    """Yield a LoRA for each range of adjacent output rows that belong to the same block and the same group.

    Raises:
        ShapeMismatch: the tensors do not fit the number of enabled blocks or the rank in the config.
    """
    enabled = [block for block, on in enumerate(settings.enable_lora or ()) if on]
    groups = _block_groups(settings, factors, len(enabled))
    size, high = factors.B.shape[0] // len(enabled), factors.B.shape[0] // groups
    rank, scaling = factors.B.shape[1], settings.scaling(factors.key.path)
    layout = "in out *k" if settings.fan_in_fan_out else "out *in"
    # Cut B's rows at the end of each block and of each group.
    outputs = factors.B.shape[0]
    cuts = sorted({*range(0, outputs, size), *range(0, outputs, high), outputs})
    for start, stop in pairwise(cuts):
        group, to = start // high, enabled[start // size] * size + start % size
        A = _rows(factors.A, group * rank, (group + 1) * rank)
        B = _rows(factors.B.reshape(*factors.B.shape[:2]), start, stop)
        update = make("lora", {"A": A, "B": B}, scaling=scaling)
        yield DecodedUpdate(factors.key.path, update, factors.keys, layout, (to, to + stop - start))


def _block_groups(settings: PeftSettings, factors: PeftFactors, blocks: int) -> int:
    """Return the number of groups of the grouped convolution that A and B form."""
    (rows, _), (outputs, inner, last) = factors.A.shape, factors.B.shape
    groups = rows // inner if inner else 0
    whole = groups and rows == inner * groups and outputs % groups == 0 and blocks and outputs % blocks == 0
    if not whole or last != 1 or rows != settings.r * blocks:
        raise ShapeMismatch(
            f"B {list(factors.B.shape)} and A {list(factors.A.shape)} do not form {blocks} blocks of rank {settings.r}",
            where=factors.key.text, cure=USE_ITS_CONFIG,
        )  # fmt: skip
    return groups


def _rows(tensor: Lazy, start: int, stop: int) -> Lazy:
    return tensor.map(lambda values: values[start:stop], (stop - start, *tensor.shape[1:]))


# Decode updates that are not pairs of factors and belong to no family: whole parameters, IA3, token rows, layer norms.
#
# The key of a whole parameter is the parameter's name in the base. Such parameters come from `modules_to_save`, trained
# biases and embeddings.
#
# PEFT loads a whole parameter into the model in place of the base's parameter. For an adapted embedding, PEFT may save
# both the factors and a copy of the weight. Then the copy replaces the base's weight, and the factors change the copy.


def decode_replacement(file: File) -> Findings:
    """Yield a replacement for each module whose parameters the file stores whole, not as factors.

    Tensors of integers or booleans were not trained. The adapter keeps them only so that the writer can write them.

    Raises:
        Unsupported: a parameter is a scalar.
    """
    whole = {key for key, tensor in file.tensors.items() if not key.part and not tensor.dtype.floating}
    whole |= set(_unread(file))
    packed = tuple(f"{key.text}." for key in whole)
    attentions = file.attentions()
    modules: dict[str, dict[str, Key]] = {}
    for key, tensor in file.tensors.items():
        if key in whole or (not key.part and key.text.startswith(packed)):
            yield Kept(key)
        elif not key.part:
            path, field = place(key.path, len(tensor.shape), attentions)
            modules.setdefault(path, {})[field] = key
    for path, keys in modules.items():
        yield replaced(file, path, keys)


def _unread(file: File) -> Iterator[Key]:
    """Yield the keys of redundant copies of a module. PEFT ignores these copies when it loads the file.

    With `save_embedding_layers`, PEFT 0.21.2 saves a module of `modules_to_save` three times: as `NAME.weight`,
    `NAME.modules_to_save.weight` and `NAME.original_module.weight`. When PEFT loads the file, it uses `NAME.weight`.
    """
    plain = {key.path for key in file.tensors if not key.part and not key.copy}
    trained = {key.path for key in file.tensors if key.copy == "modules_to_save"}
    for key in file.tensors:
        if key.copy and key.path in (plain if key.copy == "modules_to_save" else plain | trained):
            yield key


def replaced(file: File, path: str, keys: Mapping[str, Key]) -> DecodedUpdate:
    """Create the update that replaces a module's parameters.

    The layout is [in, out] only if the bias is as long as the weight's second axis, but not as long as the first axis.
    """
    tensors = {field: file.tensors[key] for field, key in keys.items()}
    shape, sizes = (tensors[field].shape if field in tensors else () for field in ("weight", "bias"))
    turned = len(shape) > 1 and len(sizes) == 1 and sizes[0] == shape[1] != shape[0]
    return DecodedUpdate(path, make("replacement", tensors), keys, "in out *k" if turned else "out *in")


def place(name: str, axes: int, attentions: Collection[str]) -> tuple[str, str]:
    """Return (target's path, update's field) for a parameter, given its name in the base and its number of axes.

    The target of a `weight` or a `bias` is its module. The target of an attention module's `in_proj_bias` is the same
    module's `in_proj_weight`. Any other parameter is itself the target, with the field `weight`.
    """
    if not axes:
        raise Unsupported(
            "a scalar parameter cannot be replaced", where=name, cure="Remove the parameter from modules_to_save"
        )
    module, _, field = name.rpartition(".")
    if module and (field == "weight" or (field == "bias" and axes == 1)):
        return module, field
    if field == "in_proj_bias" and module in attentions:
        return f"{module}.in_proj_weight", "bias"
    return name, "weight"


# IA3: `ia3_l` of shape [out, 1] scales a module's outputs. In modules listed in `feedforward_modules`, `ia3_l` has the
# shape [1, in] and scales the inputs. On convolutions, the shapes are [1, out, 1, ...] and [1, in, 1, ...].


IA3_PART = "ia3_l"


def decode_ia3(file: File) -> Findings:
    """Yield all IA3 updates in a file.

    Raises:
        ShapeMismatch: a vector does not have the shape that the config implies.
    """
    for slots in file.groups({IA3_PART}).values():
        if (IA3_PART, "") not in slots:
            continue
        key = slots[IA3_PART, ""]
        tensor = file.tensors[key]
        inputs = _scales_inputs(file.settings, key, tensor.shape)
        vector = tensor.reshape(max(tensor.shape))
        field = "l_in" if inputs else "l"
        turned = file.settings.fan_in_fan_out and len(tensor.shape) == 2
        yield DecodedUpdate(key.path, make("ia3", {field: vector}), {field: key}, "in out *k" if turned else "out *in")


def _scales_inputs(settings: PeftSettings, key: Key, shape: Shape) -> bool:
    named = feedforward(settings, key.path)
    inputs = shape[:1] == (1,) if named is None else named
    fits = len(shape) > 1 and sum(size != 1 for size in shape) <= 1
    if not fits or (shape[1 if not inputs and len(shape) == 2 else 0] != 1):
        kind = "inputs, [1, in]" if inputs else "outputs, [out, 1]"
        why = f"the shape is {list(shape)}, but this module needs an IA3 vector for its {kind}"
        raise ShapeMismatch(why, where=key.text, cure=USE_ITS_CONFIG)
    return inputs


def feedforward(settings: PeftSettings, path: str) -> bool | None:
    """Whether IA3 scales a module's inputs; None if the config has no `feedforward_modules`.

    As in PEFT, `feedforward_modules` is a regular expression for the whole path, or a list of endings of paths.
    """
    named = settings.feedforward_modules
    if named is None:
        return None
    path = unwrapped(path)
    return matches(named, path, whole=True) if isinstance(named, str) else path.endswith(tuple(named))


# Decode trainable tokens. Despite its name, `trainable_tokens_delta` contains the new rows, not their differences from
# the old rows. The config has the token ids.


TOKENS_PART = "trainable_tokens_delta"
ORIGINAL = "trainable_tokens_original"
"""The `Key.part` of a copy of the base's original rows."""


def decode_rows(file: File) -> Findings:
    """Yield an update for each module for which the file contains token rows.

    Raises:
        Malformed: the config has no token ids for the rows.
        ShapeMismatch: the number of token ids is not the number of rows.
    """
    yield from (Kept(key) for key in file.tensors if key.part == ORIGINAL)
    keys = [slots[TOKENS_PART, ""] for slots in file.groups({TOKENS_PART}).values() if (TOKENS_PART, "") in slots]
    for key in keys:
        index, values = _index(file.settings, key.path), file.tensors[key]
        if index is None:
            raise Malformed("the config has no token ids for these rows", where=key.text, cure=SAVE_WITH_PEFT)
        if values.shape[:1] != (len(index),) or len(values.shape) != 2:
            why = f"the shape is {list(values.shape)}, but the config lists {len(index)} token ids, one for each row"
            raise ShapeMismatch(why, where=key.text, cure=USE_ITS_CONFIG)
        update = make("rows", {"index": integers(index), "values": values})
        yield DecodedUpdate(key.path, update, {"values": key}, "in out *k")


def integers(values: list[int]) -> Lazy:
    """Return integers as an int64 tensor."""
    return Lazy((len(values),), DTYPES["I64"], lambda: b"".join(value.to_bytes(8, "little") for value in values))


def _index(settings: PeftSettings, path: str) -> list[int] | None:
    """Return the token ids of a module's rows in the file; None if the config does not state the ids."""
    if settings.peft_type == "TRAINABLE_TOKENS":
        return settings.token_indices
    named = settings.trainable_token_indices
    if not isinstance(named, dict):
        # PEFT uses one list of ids for the input embeddings and for all layers that are tied to them.
        return named
    fitting = [name for name in named if path.endswith(name)]
    exact = [name for name in fitting if name == path]
    if not fitting and len(named) == 1:
        # An LM head that is tied to the embedding has no entry of its own. If there is only one entry, it belongs to
        # the embedding, so use it for the head too.
        return next(iter(named.values()))
    return named[(exact or fitting)[0]] if len(exact or fitting) == 1 else None


# LN tuning: `<m>.ln_tuning_layers.<parameter>` is a parameter or buffer of a trained copy of the module <m>. PEFT uses
# the copy instead of the module, so each floating-point tensor of the copy replaces the module's tensor.


NORM_PART = "ln_tuning_layers"


def decode_ln_tuning(file: File) -> Findings:
    """Yield a replacement for each module that has a trained copy in the file.

    Tensors of integers or booleans were not trained. The adapter keeps them only so that the writer can write them.

    Raises:
        Unsupported: a parameter is a scalar.
    """
    modules: dict[str, dict[str, Key]] = {}
    for key, tensor in file.tensors.items():
        if not key.part.startswith(NORM_PART):
            continue
        if not tensor.dtype.floating:
            yield Kept(key)
            continue
        path, field = place(_norm_name(key), len(tensor.shape), ())
        modules.setdefault(path, {})[field] = key
    yield from (replaced(file, path, keys) for path, keys in modules.items())


def norm_spelled(name: str) -> str:
    """Return the key under which LN tuning stores a parameter, given the parameter's name in the base."""
    module, _, parameter = name.rpartition(".")
    return f"{module}.{NORM_PART}.{parameter}"


def _norm_name(key: Key) -> str:
    """Return the name, in the base, of the parameter that LN tuning stores under `key`.

    If the parameter belongs to a child module, `parse_key` mistakes the child's name for an adapter's name. This
    function puts the child's name back into the parameter's name.
    """
    inside = [key.adapter or "", key.part.removeprefix(NORM_PART).removeprefix("."), key.leaf]
    words = [part for part in inside if part]
    if len(words) > 2 and words[0] == "default":  # PEFT leaves the adapter's name in the keys of child modules.
        del words[0]
    return ".".join([key.path, *words])
