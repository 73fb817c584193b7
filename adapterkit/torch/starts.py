"""Compute a LoRA's initial factors with the initialisers of PEFT's `init_lora_weights`. The values equal PEFT's.

PEFT draws random numbers from torch's global generator, layer by layer. It first initialises both factors as torch
initialises layers, and then overwrites these values. The functions here draw all these numbers in the same
order. So `create(model, "lora", seed=s)` gives the same factors as `torch.manual_seed(s)` and then `get_peft_model`.

PiSSA, OLoRA and CorDA subtract the LoRA's initial change from the base. LoftQ subtracts the base's rounding error. PEFT
overwrites the base with the result. Here, the base stays unchanged, and an additional update before the LoRA does the
subtraction. `Start.taken` holds this update; its method is `residual`.

CorDA and EVA need data: `moments_of` runs the model over batches, and computes the moments of each layer's inputs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UsageError
from ..methods.residual import Residual
from ..quant.bnb_4bit import quantized


@dataclass(frozen=True, eq=False)
class Start:
    """The initial factors of a LoRA.

    Attributes:
        A: `[r, in, *k]`.
        B: `[out, r]`.
        taken: an update that subtracts the LoRA's initial change from the base. For LoftQ, the update subtracts the
            weight's rounding error instead. None if the initialiser subtracts nothing.
    """

    A: Tensor
    B: Tensor
    taken: Residual | None = None


@dataclass(frozen=True, eq=False)
class StartPlace:
    """The layer and the settings that an initialiser gets.

    Attributes:
        W: the weight, float32, `[out, in, *k]`.
        rank: the rank r of the LoRA.
        scaling: the scaling of the LoRA.
        embedding: whether the layer is an embedding.
        seen: the moments of the layer's inputs; None for initialisers that need no data.
    """

    W: Tensor
    rank: int
    scaling: float
    embedding: bool
    seen: Moments | None

    def zeros(self) -> Tensor:
        """Return zeros for B, so that the LoRA starts without any change."""
        return torch.zeros(len(self.W), self.rank)


def start_of(init: str, place: StartPlace) -> Start:
    """Return the initial factors of a layer's LoRA. This draws random numbers from torch's global generator.

    Args:
        init: one of `KINDS`, `pissa_niter_N`, or `loftq` followed by `_int8`, `_iter_N` or both.
        place: the layer and its settings.

    Raises:
        UsageError: the initialiser is unknown, or does not fit the layer or the rank.
    """
    kind = find(init)
    if init != "default" and init != "gaussian" and (place.embedding or place.W.ndim != 2):
        raise UsageError(f"init={init!r} supports only linear layers", cure="Omit this layer with exclude=")
    shapes = (place.rank, *place.W.shape[1:]), (len(place.W), place.rank)
    if place.embedding:
        A, B = (torch.randn(shape) for shape in shapes)
        return Start(A.zero_(), B.normal_())
    for shape in shapes:
        _drawn(*shape)
    return kind(init, place)


def find(init: str) -> Kind:
    """Return the initialiser with this name: a function that computes the initial factors.

    Raises:
        UsageError: there is no initialiser with this name.
    """
    name = "pissa" if re.fullmatch(r"pissa_niter_\d+", init) else init
    name = "loftq" if re.fullmatch(r"loftq(_int8)?(_iter_[1-9]\d*)?", init) else name
    if name not in KINDS:
        raise UsageError(f"unknown initialiser {init!r}", where="init", cure=f"Choose among {', '.join(KINDS)}")
    return KINDS[name]


Kind = Callable[[str, StartPlace], Start]


def _drawn(*shape: int) -> Tensor:
    """Draw a weight as torch initialises linear layers and convolutions."""
    out: Tensor = nn.init.kaiming_uniform_(torch.empty(shape), a=math.sqrt(5))
    return out


def _default(_: str, place: StartPlace) -> Start:
    return Start(_drawn(place.rank, *place.W.shape[1:]), place.zeros())


def _gaussian(_: str, place: StartPlace) -> Start:
    A = torch.empty(place.rank, *place.W.shape[1:])
    return Start(nn.init.normal_(A, std=1 / place.rank), place.zeros())


def _orthogonal(_: str, place: StartPlace) -> Start:
    """Return nonzero factors in orthogonal subspaces, so that their product is zero."""
    if place.rank % 2:
        raise UsageError(f"init='orthogonal' needs an even rank, got {place.rank}", cure="Pass an even rank=")
    half = place.rank // 2
    Q, _R = torch.linalg.qr(torch.randn(place.rank, place.rank))
    A = torch.randn(place.W.shape[1], half).mm(Q[0::2]).T / 10.0
    return Start(A, torch.randn(half, len(place.W)).T.mm(Q[1::2]) / 10.0)


def _pissa(init: str, place: StartPlace) -> Start:
    """Start from the components of W with the largest singular values.

    `pissa_niter_N` computes these components with N iterations of a randomised SVD.
    """
    r = place.rank
    if init == "pissa":
        U, S, V = torch.linalg.svd(place.W, full_matrices=False)
    else:
        U, S, V = torch.svd_lowrank(place.W, r, niter=int(init.rpartition("_")[2]))
        V = V.mT
    return _split(place, U[:, :r], S[:r], V[:r])


def _olora(_: str, place: StartPlace) -> Start:
    Q, R = torch.linalg.qr(place.W)
    return _without(place, R[: place.rank], Q[:, : place.rank])


def _corda(init: str, place: StartPlace) -> Start:
    """Start from the components of W @ C with the largest singular values; C is the covariance of the layer's inputs.

    The right singular vectors are multiplied by C^-1, so that the sum of all components is W. `corda_kpm` starts from
    the components with the smallest singular values.
    """
    assert place.seen is not None
    C = place.seen.covariance()
    damp = 0.01
    while True:
        fixed = C + torch.eye(len(C)) * (C.diag().mean() * damp)
        inverse = torch.linalg.inv(fixed)
        if torch.dist(fixed @ inverse, torch.eye(len(C))) < 0.05:
            break
        damp *= 2
    U, S, V = torch.linalg.svd(place.W @ fixed, full_matrices=False)
    V, r = V @ inverse, place.rank
    some = slice(len(S) - r, None) if init == "corda_kpm" else slice(r)
    return _split(place, U[:, some], S[some], V[some])


def _eva(_: str, place: StartPlace) -> Start:
    """Start from the directions in which the inputs in the data vary most."""
    assert place.seen is not None
    return Start(place.seen.components()[1][: place.rank], place.zeros())


def _loftq(init: str, place: StartPlace) -> Start:
    """Start from the components of the weight's rounding error that have the largest singular values.

    `taken` subtracts the whole error from the base. As in PEFT, the factors are computed as if the scaling were 1. With
    another scaling, the LoRA is not the best approximation of the error.
    """
    rounded_to = _to_int8 if "int8" in init else _to_nf4
    turns = int(init.rpartition("iter_")[2]) if "iter" in init else 1

    def turn(rest: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        Q = rounded_to(rest)
        U, S, V = torch.linalg.svd(place.W - Q, full_matrices=False)
        root = S[: place.rank].sqrt()
        return Q, root[:, None] * V[: place.rank], U[:, : place.rank] * root

    Q, A, B = turn(place.W)
    for _ in range(turns - 1):
        Q, A, B = turn(place.W - B @ A)
    return Start(A.contiguous(), B.contiguous(), Residual(A=None, B=None, D=place.W - Q, scaling=1.0))


def _to_nf4(W: Tensor) -> Tensor:
    """Round to the nearest levels of bitsandbytes' nf4, with one scale for each block of 64 values."""
    levels = torch.tensor(NF4).numpy()
    q, largest = quantized(W.contiguous().view(-1).numpy(), levels, 64)
    values = torch.from_numpy(levels[q]) * torch.from_numpy(largest).repeat_interleave(64)[: W.numel()]
    return values.view(W.shape).to(W.dtype)


def _to_int8(W: Tensor) -> Tensor:
    """Round to 8 bits as bitsandbytes does, with one scale for each row: its largest absolute value."""
    W = W.half().float()  # bitsandbytes rounds to 16 bits first.
    largest = W.abs().amax(1, keepdim=True)
    q = (W * torch.where(largest == 0, 0.0, 127.0 / largest)).round()
    return q * largest / 127.0


def _split(place: StartPlace, U: Tensor, S: Tensor, V: Tensor) -> Start:
    """Split the singular values evenly between both factors."""
    root = (S / place.scaling).sqrt()
    return _without(place, root[:, None] * V, U * root)


def _without(place: StartPlace, A: Tensor, B: Tensor) -> Start:
    A, B = A.contiguous(), B.contiguous()
    return Start(A, B, Residual(A=A.clone(), B=B.clone(), D=None, scaling=place.scaling))


KINDS: dict[str, Kind] = {
    "default": _default, "gaussian": _gaussian, "orthogonal": _orthogonal, "pissa": _pissa, "olora": _olora,
    "corda": _corda, "corda_kpm": _corda, "eva": _eva, "loftq": _loftq,
}  # fmt: skip
"""A map from each initialiser's name to its function."""

NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""The levels of NF4 (appendix E of https://arxiv.org/abs/2305.14314)."""

OF_DATA = frozenset({"corda", "corda_kpm", "eva"})
"""The initialisers that need data."""


class Moments:
    """Sums over the inputs `[tokens, in]` of one layer; the inputs themselves are not kept."""

    def __init__(self) -> None:
        self.batches, self.tokens = 0, 0
        self.total: Any = 0
        self.square: Any = 0
        self.scaled: Any = 0

    def add(self, x: Tensor, kept: Tensor | None) -> None:
        """Add the inputs of one call to the sums.

        Args:
            x: `[*, in]`.
            kept: a mask `[*]` that is True for the tokens that count for EVA; None: all tokens count.

        Raises:
            UsageError: a value is not finite, or the largest value is 0.
        """
        flat = x.detach().to("cpu", torch.float32).flatten(0, -2)
        largest = flat.max().abs()
        if not torch.isfinite(flat).all() or largest == 0:
            why = "a layer's inputs contain NaN or an infinity, or their largest value is 0"
            raise UsageError(why, where="data", cure="Check the data")
        scaled = flat / largest  # PEFT does the same, so that batches with large values do not dominate.
        self.scaled = self.scaled + scaled.T @ scaled
        self.batches += 1
        flat = (flat if kept is None else flat[kept.flatten().to("cpu")]).double()
        self.total, self.square = self.total + flat.sum(0), self.square + flat.T @ flat
        self.tokens += len(flat)

    def covariance(self) -> Tensor:
        """Return CorDA's covariance `[in, in]`: the mean of x^T x over the calls.

        x holds the inputs of one call, divided by the absolute value of their maximum.
        """
        out: Tensor = self.scaled / self.batches
        return out

    def components(self) -> tuple[Tensor, Tensor]:
        """Return each principal component's share of the variance, and the components as the rows of `[in, in]`.

        The component with the largest share comes first.
        """
        mean = self.total / self.tokens
        spread = self.square / self.tokens - torch.outer(mean, mean)
        values, vectors = torch.linalg.eigh(spread)
        values = values.flip(0).clamp_min(0)
        return (values / values.sum().clamp_min(1e-30)).float(), vectors.T.flip(0).float().contiguous()


@torch.no_grad()
def moments_of(model: nn.Module, paths: Sequence[str], data: Iterable[object]) -> dict[str, Moments]:
    """Run a model over data, and return a map from each module's path to the moments of the module's inputs.

    Args:
        model: the model; it is switched to evaluation mode during the run.
        paths: the paths of the modules.
        data: the batches. A batch that is a mapping is passed to the model as keyword arguments, a list or tuple as
            positional arguments, and any other batch as the only argument. Tokens do not count for EVA if their
            `attention_mask` is 0 or their label in `labels` is -100.

    Raises:
        UsageError: there is no data, a module got no tokens that count, or `Moments.add` refuses a module's inputs.
    """
    moments_by_path = {path: Moments() for path in paths}
    mask: list[Tensor | None] = [None]

    def hook_of(moments: Moments) -> Callable[[nn.Module, tuple[object, ...], dict[str, object]], None]:
        def hook(_module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
            x: Any = args[0] if args else next(iter(kwargs.values()))
            fits = mask[0] is not None and mask[0].shape == x.shape[:-1]
            moments.add(x, mask[0] if fits else None)

        return hook

    modes = {module: module.training for module in model.modules()}
    hooks = [
        model.get_submodule(path).register_forward_pre_hook(hook_of(moments), with_kwargs=True)
        for path, moments in moments_by_path.items()
    ]
    try:
        model.eval()
        for batch in data:
            mask[0] = _mask(batch)
            if isinstance(batch, Mapping):
                model(**batch)
            elif isinstance(batch, list | tuple):
                model(*batch)
            else:
                model(batch)
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in modes.items():
            module.training = training
    idle = next((path for path, moments in moments_by_path.items() if not moments.tokens), None)
    if idle is not None:
        cure = "Pass batches for which the model calls this module, or omit the module with exclude="
        raise UsageError("the module got no unmasked inputs from the data", where=idle, cure=cure)
    return moments_by_path


def _mask(batch: object) -> Tensor | None:
    if not isinstance(batch, Mapping) or "input_ids" not in batch:
        return None
    kept = batch.get("attention_mask")
    kept = torch.ones_like(batch["input_ids"]) if kept is None else kept
    labels = batch.get("labels")
    out: Tensor = kept.bool() if labels is None else kept.bool() & (labels != -100)
    return out
