"""Decode LoRA, DoRA and LoRA-XS on modules: linear layers, convolutions, embeddings, attention.

An embedding's factors see the table [vocabulary, dimension] transposed, which is the layout `in out *k`. PEFT adapts
both projections of an `nn.MultiheadAttention` with one rank and one alpha, those of the attention's own name; its
forward adds the change of the output projection twice (https://github.com/huggingface/peft/pull/3774).
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from ...errors import Malformed, ShapeMismatch
from .._format import Departure
from . import experts, merged_linear
from .convolutions import zero_padded
from .factors import PeftFactors, adapt, check_rank, find_factors
from .file import File, Findings, Found, Kept
from .pairs import OUTPUT_TIMES

if TYPE_CHECKING:
    from ...io.lazy import Lazy

DEPARTURES = {
    "attention_output_twice": Departure(
        "the change of the output projection of nn.MultiheadAttention is added twice",
        "it is added once",
    ),
    "attention_input_bias": Departure(
        "with lora_bias, the bias of the input projection of nn.MultiheadAttention has no effect",
        "it is added to the projection's bias",
    ),
    "grouped_dora_norm": Departure(
        "DoRA at a convolution in groups divides by the norms of another matrix than the one that it computes with: "
        "that of W and B @ A with the numbers of B read as [out / groups, r]",
        "it divides by the norms of the kernels over all channels that it computes with",
    ),
    "convolution_padding": Departure(
        "at a convolution whose padding_mode is not zeros, or with a dilation and padding=same, which only a live "
        "layer tells: lora_A reads zeros around the input and is not dilated; methods other than LoRA and DoRA are "
        "refused there",
        "the change of the weight, with the padding and the dilation of the layer, as PEFT merges it",
        zero_padded,
    ),
}
"""Departures of PEFT's forward from the formulas of LoRA and its variants."""

TRAINING = ("lora_monteclora_sampler", "lora_velora_embed")
"""First words of the parts that matter only in training."""


def decode(file: File) -> Findings:
    """Return all LoRA and DoRA updates of a file.

    Raises:
        Malformed: a tensor's partner is missing, or the config does not call for the tensor.
        ShapeMismatch: shapes contradict each other or the config's ranks.
    """
    yield from (Kept(key) for key in file.tensors if key.part.startswith(TRAINING))
    modules: list[PeftFactors] = []
    parameters: list[PeftFactors] = []
    for each in find_factors(file):
        (parameters if experts.adapts_parameter(file, each.key.path) else modules).append(each)
    attentions = file.attentions()
    for each in modules:
        if file.settings.enable_lora is not None and len(each.B.shape) == 3 and len(each.A.shape) == 2:
            yield from merged_linear.decode(file.settings, each)
        else:
            yield from _module(file, each, attentions)
    yield from experts.decode(file, parameters)


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
    yield Found(path, update, keys, _layout(file, factors, attentions))


def _blocked(file: File, factors: PeftFactors, factor: str, n: int) -> Found:
    """Decode a BD-LoRA; `factor` holds the n blocks of its diagonal, stacked."""
    name, A, B = factors.key.path, factors.A, factors.B
    rank = file.settings.rank(name)
    inner, rows = rank // n if factor == "B" else rank, factors.tensors[factor].shape[0]
    flat = len(A.shape) == len(B.shape) == 2
    if not flat or (A.shape[0], B.shape[1]) != (rank, inner) or rank % n or rows % n:
        why = f"{list(A.shape)} and {list(B.shape)}, where the config says rank {rank} and {n} blocks of {factor}"
        raise ShapeMismatch(why, where=factors.keys[factor].text, cure="The config is not of this file")
    tensors, keys = dict(factors.tensors), dict(factors.keys)
    tensors[f"{factor}_blocks"] = tensors.pop(factor).reshape(n, rows // n, factors.tensors[factor].shape[1])
    keys[f"{factor}_blocks"] = keys.pop(factor)
    return Found(name, adapt(file.settings, name, tensors), keys)


def _check_plain(factors: PeftFactors, rank: int) -> None:
    if factors.key.depth:
        why = "nested as for parameters, and target_parameters names none here"
        raise Malformed(why, where=factors.key.text, cure="The config is not of this file")
    check_rank(factors, rank, groups=_groups(factors))


def _groups(factors: PeftFactors) -> int:
    """Return the number of groups of a pair's convolution: in PEFT, A reads all channels, B those of its group."""
    rank, share = factors.A.shape[0], factors.B.shape[1]
    return rank // share if len(factors.A.shape) > 2 and 0 < share < rank and rank % share == 0 else 1


def _layout(file: File, factors: PeftFactors, attentions: Collection[str]) -> str:
    if factors.embedding:
        return "in out *k"
    turned = file.settings.fan_in_fan_out and len(factors.A.shape) == 2 and factors.key.module not in attentions
    return "in out *k" if turned else "out *in"


def _flat_output(factors: PeftFactors) -> Lazy:
    """Return B as [out, r]: a convolution's B mixes channels at one place, so all its other axes are 1."""
    A, B = factors.A, factors.B
    if len(A.shape) != len(B.shape) or any(size != 1 for size in B.shape[2:]):
        why = f"{list(B.shape)} does not go with {list(A.shape)}"
        raise ShapeMismatch(why, where=factors.keys["B"].text, cure="Save the adapter again with PEFT")
    return B if len(B.shape) == 2 else B.reshape(*B.shape[:2])


def _vector(factors: PeftFactors, field: str) -> Lazy:
    tensor, out = factors.tensors[field], factors.B.shape[1 if field == "diag" else 0]
    if sorted(tensor.shape)[-1:] != [out] or sorted(tensor.shape)[:-1] != [1] * (len(tensor.shape) - 1):
        why = f"{list(tensor.shape)} are not {out} values, as lora_B says"
        raise ShapeMismatch(why, where=factors.keys[field].text, cure="Save the adapter again with PEFT")
    return tensor if len(tensor.shape) == 1 else tensor.reshape(out)
