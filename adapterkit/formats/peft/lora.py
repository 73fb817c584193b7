"""Decode LoRA, DoRA and LoRA-XS of modules: linear layers, convolutions, embeddings, attention.

The factors of an embedding adapt the transposed table [vocabulary, dimension], which is the layout `in out *k`. In an
`nn.MultiheadAttention`, PEFT adapts the input and output projections with one rank and alpha, which belong to the
attention's name. PEFT's forward adds the change of the output projection twice
(https://github.com/huggingface/peft/pull/3774).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from itertools import pairwise
from typing import TYPE_CHECKING

from ...errors import Malformed, ShapeMismatch
from .._format import Departure
from . import experts
from .convolutions import zero_padded
from .factors import PeftFactors, adapt, check_rank, find_factors
from .file import File, Findings, Found, Kept, make
from .pairs import OUTPUT_TIMES

if TYPE_CHECKING:
    from ...io.lazy import Lazy
    from .settings import Settings

DEPARTURES = {
    "attention_output_twice": Departure(
        "the change of nn.MultiheadAttention's output projection is added twice",
        "the change is added once",
    ),
    "attention_input_bias": Departure(
        "with lora_bias, the bias of nn.MultiheadAttention's input projection has no effect",
        "the bias is added to the projection's bias",
    ),
    "grouped_dora_norm": Departure(
        "DoRA on a grouped convolution divides by the norms of another matrix than the one in its forward: "
        "W + B @ A with B's values read as [out / groups, r]",
        "DoRA divides by the norms of the kernels that it computes with, over all channels",
    ),
    "convolution_padding": Departure(
        "on a convolution whose padding_mode is not zeros, or with a dilation and padding=same (the live layer shows "
        "this, a file does not): lora_A reads zeros around the input and is not dilated; methods other than LoRA and "
        "DoRA are refused there",
        "the change of the weight, with the layer's padding and dilation, as PEFT merges it",
        zero_padded,
    ),
}
"""The cases in which PEFT's forward differs from the formulas of LoRA and its variants."""

TRAINING = ("lora_monteclora_sampler", "lora_velora_embed")
"""The first words of key parts whose tensors matter only in training."""


def decode(file: File) -> Findings:
    """Yield all LoRA and DoRA updates in a file.

    Raises:
        Malformed: a tensor's partner is missing, or a tensor contradicts the config.
        ShapeMismatch: the tensors' shapes contradict each other or the ranks in the config.
    """
    yield from (Kept(key) for key in file.tensors if key.part.startswith(TRAINING))
    modules: list[PeftFactors] = []
    parameters: list[PeftFactors] = []
    for each in find_factors(file):
        (parameters if experts.adapts_parameter(file, each.key.path) else modules).append(each)
    attentions = file.attentions()
    for each in modules:
        if file.settings.enable_lora is not None and len(each.B.shape) == 3 and len(each.A.shape) == 2:
            yield from decode_blocks(file.settings, each)
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
    """Decode a BD-LoRA; `factor` is A or B, whichever is block-diagonal, with its n blocks as a stack."""
    name, A, B = factors.key.path, factors.A, factors.B
    rank = file.settings.rank(name)
    inner, rows = rank // n if factor == "B" else rank, factors.tensors[factor].shape[0]
    flat = len(A.shape) == len(B.shape) == 2
    if not flat or (A.shape[0], B.shape[1]) != (rank, inner) or rank % n or rows % n:
        why = f"A is {list(A.shape)} and B is {list(B.shape)}; the config states rank {rank} and {n} blocks of {factor}"
        raise ShapeMismatch(why, where=factors.keys[factor].text, cure="The config does not belong to this file")
    tensors, keys = dict(factors.tensors), dict(factors.keys)
    tensors[f"{factor}_blocks"] = tensors.pop(factor).reshape(n, rows // n, factors.tensors[factor].shape[1])
    keys[f"{factor}_blocks"] = keys.pop(factor)
    return Found(name, adapt(file.settings, name, tensors), keys)


def _check_plain(factors: PeftFactors, rank: int) -> None:
    if factors.key.depth:
        why = "the key has a parameter's form, but target_parameters lists no parameter of this module"
        raise Malformed(why, where=factors.key.text, cure="The config does not belong to this file")
    check_rank(factors, rank, groups=_groups(factors))


def _groups(factors: PeftFactors) -> int:
    """Return the number of groups of a grouped convolution. In PEFT, only B is split into groups."""
    rank, share = factors.A.shape[0], factors.B.shape[1]
    return rank // share if len(factors.A.shape) > 2 and 0 < share < rank and rank % share == 0 else 1


def _layout(file: File, factors: PeftFactors, attentions: Collection[str]) -> str:
    if factors.embedding:
        return "in out *k"
    turned = file.settings.fan_in_fan_out and len(factors.A.shape) == 2 and factors.key.module not in attentions
    return "in out *k" if turned else "out *in"


def _flat_output(factors: PeftFactors) -> Lazy:
    """Return B as [out, r]. The kernel of a convolution's B has size 1, so all further axes have size 1."""
    A, B = factors.A, factors.B
    if len(A.shape) != len(B.shape) or any(size != 1 for size in B.shape[2:]):
        why = f"B {list(B.shape)} does not fit A {list(A.shape)}"
        raise ShapeMismatch(why, where=factors.keys["B"].text, cure="Save the adapter again with PEFT")
    return B if len(B.shape) == 2 else B.reshape(*B.shape[:2])


def _vector(factors: PeftFactors, field: str) -> Lazy:
    tensor, out = factors.tensors[field], factors.B.shape[1 if field == "diag" else 0]
    if sorted(tensor.shape)[-1:] != [out] or sorted(tensor.shape)[:-1] != [1] * (len(tensor.shape) - 1):
        why = f"the shape is {list(tensor.shape)}, but lora_B implies {out} values"
        raise ShapeMismatch(why, where=factors.keys[field].text, cure="Save the adapter again with PEFT")
    return tensor if len(tensor.shape) == 1 else tensor.reshape(out)


# Decode LoRA of equal blocks of a fused weight (`enable_lora`), which only PEFT 0.1 and 0.2 wrote.
# The outputs of a weight form n equal blocks. Only the enabled blocks are adapted, and B has the rows of these blocks,
# in order. The pair is a grouped convolution: each group of B's rows uses a separate part of A's rows.


def decode_blocks(settings: Settings, factors: PeftFactors) -> Iterator[Found]:
    """Yield a LoRA for each run of adjacent rows of the weight that belong to one group.

    Raises:
        ShapeMismatch: the tensors do not fit these blocks or this rank.
    """
    enabled = [block for block, on in enumerate(settings.enable_lora or ()) if on]
    groups = _block_groups(settings, factors, len(enabled))
    size, high = factors.B.shape[0] // len(enabled), factors.B.shape[0] // groups
    rank, scaling = factors.B.shape[1], settings.scaling(factors.key.path)
    layout = "in out *k" if settings.fan_in_fan_out else "out *in"
    for start, stop in _runs(factors.B.shape[0], size, high):
        group, to = start // high, enabled[start // size] * size + start % size
        A = _rows(factors.A, group * rank, (group + 1) * rank)
        B = _rows(factors.B.reshape(*factors.B.shape[:2]), start, stop)
        update = make("lora", {"A": A, "B": B}, scaling=scaling)
        yield Found(factors.key.path, update, factors.keys, layout, (to, to + stop - start))


def _block_groups(settings: Settings, factors: PeftFactors, blocks: int) -> int:
    """Return the number of groups that A and B have."""
    (rows, _), (outputs, inner, last) = factors.A.shape, factors.B.shape
    groups = rows // inner if inner else 0
    whole = groups and rows == inner * groups and outputs % groups == 0 and blocks and outputs % blocks == 0
    if not whole or last != 1 or rows != settings.r * blocks:
        raise ShapeMismatch(
            f"B {list(factors.B.shape)} and A {list(factors.A.shape)} do not form {blocks} blocks of rank {settings.r}",
            where=factors.key.text, cure="The config does not belong to this file",
        )  # fmt: skip
    return groups


def _runs(outputs: int, size: int, high: int) -> Iterator[tuple[int, int]]:
    """Split B's rows into runs that end at the end of a block or of a group."""
    cuts = sorted({*range(0, outputs, size), *range(0, outputs, high), outputs})
    return pairwise(cuts)


def _rows(tensor: Lazy, start: int, stop: int) -> Lazy:
    return tensor.map(lambda values: values[start:stop], (stop - start, *tensor.shape[1:]))
