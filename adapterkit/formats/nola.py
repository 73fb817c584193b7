"""Files of NOLA's reference implementation, https://github.com/UCDvision/NOLA, for GPT-2; read only.

A torch file `{"model_state_dict": ...}` with `nola_query` and `nola_value` in attentions, `p1_nola` and `p2_nola` in
MLPs. It holds the seed of torch's generator for each factor, not the random matrices, so they are drawn once more, by
torch. Neither LoRA's alpha nor the kind of device that drew them is in it: both are read from `nola.json` beside it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec

from ..adapter import Adapter, Step, Target
from ..errors import AdapterkitError, Malformed, ShapeMismatch, Unrepresentable, Unsupported, UsageError
from ..methods.nola import NOLA
from ..tensors.checkpoint import read_json
from ..tensors.dtypes import DTYPES
from ..tensors.lazy import Lazy
from ..tensors.torch_file import is_torch_file, read_torch_file
from ._format import Format

if TYPE_CHECKING:
    from ..tensors.checkpoint import Checkpoint

SETTINGS = "nola.json"
LARGEST = 4 << 30
"""Bytes that the random matrices of one factor may take."""

_PARTS: dict[str, tuple[str, int | None]] = {
    "nola_query": ("c_attn", 0), "nola_value": ("c_attn", 2), "p1_nola": ("c_fc", None), "p2_nola": ("c_proj", None),
}  # fmt: skip
"""Part -> module beside it, and which third of its outputs."""

_KEY = re.compile(
    rf"(?:module\.)?(?P<path>.+)\.(?P<part>{'|'.join(_PARTS)})\.lora_(?P<factor>[AB])\.(?P<slot>weight|seed|coefficients)"
)

_SLOTS = {factor + slot for factor in "AB" for slot in ("weight", "seed", "coefficients")}


class Settings(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """What `nola.json` says: `lora_alpha` of the training, and where the model was: on the CPU or on a CUDA device."""

    alpha: Annotated[float, msgspec.Meta(ge=-(2.0**53), le=2.0**53)]
    device: Literal["cpu", "cuda"]


class Nola(Format):
    """The reference implementation's checkpoints."""

    url = "https://github.com/UCDvision/NOLA"
    description = "NOLA's reference implementation: a torch file beside nola.json; read only"
    methods = frozenset({"nola"})

    def sniff(self, path: Path) -> bool:
        try:
            return is_torch_file(path) and any(_KEY.fullmatch(key) for key in read_torch_file(path))
        except AdapterkitError:
            return False

    def read(self, path: Path, *, compat: str | None = None, base: Checkpoint | None = None) -> Adapter:
        settings = _settings(path.with_name(SETTINGS))
        try:
            groups = _groups(read_torch_file(path))
            updates = {_target(where, slots): (_update(slots, settings),) for where, slots in groups.items()}
        except AdapterkitError as error:
            raise error.at(path=path) from None
        return Adapter(updates, recipe=(Step("read", {"format": "nola", **msgspec.to_builtins(settings)}),))

    def write(
        self, adapter: Adapter, path: Path, *, on_loss: str = "refuse", base: Checkpoint | None = None
    ) -> list[str]:
        why = (
            "a file of NOLA's reference implementation names seeds of torch's generator, which an adapter does not hold"
        )
        raise Unrepresentable(why, cure="Write adapterkit's own format, which says the random matrices themselves")


def _settings(path: Path) -> Settings:
    if not path.exists():
        raise UsageError(
            f"the file does not say LoRA's alpha, nor which device drew its random matrices; {SETTINGS} beside it must",
            path=path, cure='Write it: {"alpha": <--lora_alpha of the training>, "device": "cuda" or "cpu"}',
        )  # fmt: skip
    try:
        return msgspec.convert(read_json(path, strict=True), Settings)
    except msgspec.ValidationError as error:
        raise Malformed(str(error), path=path, cure='It is {"alpha": <number>, "device": "cuda" or "cpu"}') from None


def _groups(tensors: Mapping[str, Lazy]) -> dict[tuple[str, str], dict[str, Lazy]]:
    """(path of an attention or MLP, part) -> factor and slot -> tensor.

    Raises:
        Malformed: a key is of something else, or one is missing.
    """
    groups: dict[tuple[str, str], dict[str, Lazy]] = {}
    for key, tensor in tensors.items():
        found = _KEY.fullmatch(key)
        if found is None:
            raise Malformed("no tensor of NOLA's", where=key, cure="Save lora_state_dict(model) alone")
        groups.setdefault((found["path"], found["part"]), {})[found["factor"] + found["slot"]] = tensor
    for (path, part), slots in groups.items():
        missing = next(iter(sorted(_SLOTS - slots.keys())), None)
        if missing is not None:
            why = f"lora_{missing[0]}.{missing[1:]} is not in the file"
            raise Malformed(why, where=f"{path}.{part}", cure="Save the checkpoint again")
        _check(f"{path}.{part}", slots)
    return groups


def _check(where: str, slots: Mapping[str, Lazy]) -> None:
    for factor in "AB":
        weight, seed, mix = (slots[factor + slot] for slot in ("weight", "seed", "coefficients"))
        if len(weight.shape) != 2 or len(mix.shape) != 1 or seed.shape != (1,) or seed.dtype.name != "I64":
            shapes = f"{list(weight.shape)}, {list(seed.shape)} and {list(mix.shape)}"
            why = f"{shapes} are no weight, seed and coefficients"
            raise ShapeMismatch(why, where=f"{where}.lora_{factor}", cure="Save the checkpoint again")
        size = math.prod(weight.shape) * mix.shape[0] * mix.dtype.itemsize
        if size > LARGEST or mix.dtype.name != "F32":
            why = f"{size} bytes of random matrices of {mix.dtype}; at most {LARGEST} of F32 are drawn"
            raise Unsupported(why, where=f"{where}.lora_{factor}", cure="Train with fewer, in float32")


def _target(where: tuple[str, str], slots: Mapping[str, Lazy]) -> Target:
    path, part = where
    (module, third), out = _PARTS[part], slots["Bweight"].shape[0]
    return Target(f"{path}.{module}", "in out *k", None if third is None else (third * out, (third + 1) * out))


def _update(slots: Mapping[str, Lazy], settings: Settings) -> NOLA:
    rank = slots["Aweight"].shape[0]
    fields: dict[str, Any] = {
        "alpha": slots["Acoefficients"], "A_bases": _bases(slots, "A", settings.device), "A0": slots["Aweight"],
        "beta": slots["Bcoefficients"], "B_bases": _bases(slots, "B", settings.device), "B0": slots["Bweight"],
    }  # fmt: skip
    return NOLA(**fields, scaling=settings.alpha / max(rank, 1))


def _bases(slots: Mapping[str, Lazy], factor: str, device: str) -> Lazy:
    """The random matrices of one factor, drawn when they are fetched."""
    seed, shape = slots[f"{factor}seed"], (*slots[f"{factor}coefficients"].shape, *slots[f"{factor}weight"].shape)

    def fetch() -> bytes:
        import torch

        if device == "cuda" and not torch.cuda.is_available():
            why = "its random matrices were drawn by a CUDA device, whose generator the CPU does not have"
            raise Unsupported(why, where=SETTINGS, cure="Convert the file once, where there is a CUDA device")
        generator = torch.Generator(device).manual_seed(int(seed.numpy()[0]))
        drawn = torch.empty(shape, device=device).uniform_(-1, 1, generator=generator)
        return drawn.cpu().numpy().tobytes()

    return Lazy(shape, DTYPES["F32"], fetch)
