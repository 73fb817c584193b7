"""Read and write files of NOLA's reference implementation, https://github.com/UCDvision/NOLA, for GPT-2.

A file is a torch dict `{"model_state_dict": ...}`. The tensors' keys contain `nola_query` or `nola_value` for attention
layers, and `p1_nola` or `p2_nola` for MLPs. The file stores a seed for each factor, but no random matrices. The reader
draws these matrices again from the seed, with torch's generator. `nola.json` next to the file has LoRA's alpha and the
type of the device that drew the matrices. The adapter keeps the file's seeds; only an adapter with seeds can be written
in this format.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec

from ..core.adapter import Adapter, Foreign, Step, Target
from ..errors import AdapterkitError, Malformed, ShapeMismatch, Unrepresentable, Unsupported, UsageError
from ..io.checkpoint import read_json
from ..io.lazy import DTYPES, Lazy, as_lazy
from ..io.torch_file import is_torch_file, read_torch_file
from ..methods.nola import NOLA
from ._containers import save, write_settings
from ._format import LEFT_OUT, Format
from ._kit import Leftovers, in_order, leftovers

if TYPE_CHECKING:
    from ..core.updates import Update
    from ..io.checkpoint import Checkpoint
    from ..io.lazy import Leaf

FORMAT = "nola"

SETTINGS = "nola.json"
LARGEST = 4 << 30
"""The size limit, in bytes, of the random matrices of one factor."""

_PARTS: dict[str, tuple[str, int | None]] = {
    "nola_query": ("c_attn", 0), "nola_value": ("c_attn", 2), "p1_nola": ("c_fc", None), "p2_nola": ("c_proj", None),
}  # fmt: skip
"""A map from a name in the file's keys to (name of the adapted module, adapted third of the module's outputs).

The outputs of `c_attn` are queries (third 0), keys (1) and values (2). The third is None if all outputs are adapted.
"""

_KEY = re.compile(
    rf"(?:module\.)?(?P<path>.+)\.(?P<part>{'|'.join(_PARTS)})\.lora_(?P<factor>[AB])\.(?P<slot>weight|seed|coefficients)"
)

_ENDS = ("weight", "seed", "coefficients")

_SLOTS = {factor + slot for factor in "AB" for slot in _ENDS}


class NolaSettings(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """The contents of `nola.json`: LoRA's alpha, and the type of the device that drew the random matrices."""

    alpha: Annotated[float, msgspec.Meta(ge=-(2.0**53), le=2.0**53)]
    device: Literal["cpu", "cuda"]


class NolaHints(Leftovers, total=False):
    """The settings in `nola.json`, which the reader keeps for the writer. `Foreign.tensors` contains the seeds."""

    alpha: float
    device: Literal["cpu", "cuda"]


class Nola(Format):
    """Checkpoints of NOLA's reference implementation."""

    url = "https://github.com/UCDvision/NOLA"
    description = "NOLA's reference implementation: a torch file with nola.json"
    methods = frozenset({"nola"})
    owns = frozenset({SETTINGS})

    def sniff(self, path: Path) -> bool:
        try:
            return is_torch_file(path) and any(_KEY.fullmatch(key) for key in read_torch_file(path))
        except AdapterkitError:
            return False

    def read(self, path: Path, *, compat: str | None = None, base: Checkpoint | None = None) -> Adapter:
        settings = _settings(path.with_name(SETTINGS))
        try:
            tensors = read_torch_file(path)
            updates = {_target(where, slots): (_update(slots, settings),) for where, slots in _groups(tensors).items()}
        except AdapterkitError as error:
            raise error.at(path=path) from None
        stated = msgspec.to_builtins(settings)
        seeds = {key: tensor for key, tensor in tensors.items() if key.endswith(".seed")}
        foreign = Foreign(FORMAT, {"order": list(tensors), **stated}, seeds)
        return Adapter(updates, recipe=(Step("read", {"format": FORMAT, **stated}),), foreign=foreign)

    def write(
        self, adapter: Adapter, path: Path, *, on_loss: str = "refuse", base: Checkpoint | None = None
    ) -> list[str]:
        hints = leftovers(adapter, FORMAT, NolaHints)
        seeds = adapter.foreign.tensors if hints and adapter.foreign is not None else {}
        stems, tensors, alphas = _stems(seeds), dict[str, Lazy](), set[float]()
        lost: list[str] = []
        for target, update in adapter:
            # The adapted third of the module's outputs; None if all outputs are adapted.
            third = None if target.rows is None else target.rows[0] // max(target.rows[1] - target.rows[0], 1)
            stem = stems.get((target.path, third))
            why = _why_not(update, stem, seeds, hints.get("device", "cpu"))
            if why:
                lost.append(f"{target}: {why}")
            elif isinstance(update, NOLA):
                tensors |= _spelled(update, str(stem), seeds)
                alphas.add(_alpha(update, hints.get("alpha", 0.0)))
        if len(alphas) > 1:
            lost.append(f"the updates need more than one alpha: {', '.join(f'{a:g}' for a in sorted(alphas))}")
        if lost and (on_loss != "drop" or len(alphas) != 1):
            cure = "Write adapterkit's format, which stores the random matrices: --to adapterkit"
            raise Unrepresentable(
                "files of NOLA's reference implementation cannot express these updates", items=lost, cure=cure
            )
        save(path, in_order(tensors, hints), "model_state_dict")
        write_settings(path.with_name(SETTINGS), {"alpha": alphas.pop(), "device": hints.get("device", "cpu")})
        return [f"{LEFT_OUT}{item}" for item in lost]


def _stems(seeds: Mapping[str, object]) -> dict[tuple[str, int | None], str]:
    """Map each (module, adapted third of its outputs) in `seeds` to the prefix that the keys of its A and B share."""
    matches = {key.removesuffix(".lora_A.seed"): _KEY.fullmatch(key) for key in seeds if key.endswith(".lora_A.seed")}
    parts = {stem: (match["path"], *_PARTS[match["part"]]) for stem, match in matches.items() if match}
    return {(f"{path}.{module}", third): stem for stem, (path, module, third) in parts.items()}


def _why_not(update: Update, stem: str | None, seeds: Mapping[str, Leaf], device: str) -> str:
    """Return the reason why NOLA's files cannot express an update; empty if they can."""
    from numpy import array_equal

    if not isinstance(update, NOLA):
        return "the method is not NOLA"
    factors = {"A": (update.alpha, update.A0, update.A_bases), "B": (update.beta, update.B0, update.B_bases)}
    for factor, (mix, start, bases) in factors.items():
        seed = seeds.get(f"{stem}.lora_{factor}.seed")
        if seed is None or start is None or bases is None:
            return "the file needs the seeds of torch's generator, but the adapter has no seeds for this update"
        if as_lazy(mix).dtype.name != "F32":
            return "its coefficients are not F32"
        tensors = {factor + slot: as_lazy(leaf) for slot, leaf in zip(_ENDS, (start, seed, mix), strict=True)}
        if not array_equal(_bases(tensors, factor, device).numpy(), as_lazy(bases).numpy()):
            return "its random matrices differ from those that the source file's seed yields"
    return ""


def _spelled(update: NOLA, stem: str, seeds: Mapping[str, Leaf]) -> dict[str, Lazy]:
    tensors: dict[str, Lazy] = {}
    for factor, start, mix in (("A", update.A0, update.alpha), ("B", update.B0, update.beta)):
        assert start is not None  # `_why_not` has refused updates without A0 or B0.
        leaves = (start, seeds[f"{stem}.lora_{factor}.seed"], mix)
        tensors |= {f"{stem}.lora_{factor}.{end}": as_lazy(leaf) for end, leaf in zip(_ENDS, leaves, strict=True)}
    return tensors


def _alpha(update: NOLA, known: float) -> float:
    """Return LoRA's alpha: `known` if `known / rank` is exactly the update's scaling, otherwise `scaling * rank`."""
    rank = max(update.A0.shape[0], 1) if update.A0 is not None else 1
    return known if known / rank == update.scaling else update.scaling * rank


def _settings(path: Path) -> NolaSettings:
    if not path.exists():
        raise UsageError(
            f"{SETTINGS} is missing; it must state LoRA's alpha and the device that drew the random matrices",
            path=path, cure='Write the file: {"alpha": <--lora_alpha of the training>, "device": "cuda" or "cpu"}',
        )  # fmt: skip
    try:
        return msgspec.convert(read_json(path, strict=True), NolaSettings)
    except msgspec.ValidationError as error:
        raise Malformed(str(error), path=path, cure='Write {"alpha": <number>, "device": "cuda" or "cpu"}') from None


def _groups(tensors: Mapping[str, Lazy]) -> dict[tuple[str, str], dict[str, Lazy]]:
    """Group the tensors by (path, key of `_PARTS`), where `path` is the path of an attention layer or an MLP.

    Each group is a dict of tensors. Its keys consist of the factor and the slot, such as `Aseed`.

    Raises:
        Malformed: a key is not one of NOLA's keys, or a tensor of a group is missing.
    """
    groups: dict[tuple[str, str], dict[str, Lazy]] = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise Malformed("the key is not one of NOLA's keys", where=key, cure="Save only lora_state_dict(model)")
        groups.setdefault((match["path"], match["part"]), {})[match["factor"] + match["slot"]] = tensor
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
            why = f"weight, seed and coefficients have shapes {shapes}, not [n, m], [1] (dtype I64) and [k]"
            raise ShapeMismatch(why, where=f"{where}.lora_{factor}", cure="Save the checkpoint again")
        size = math.prod(weight.shape) * mix.shape[0] * mix.dtype.itemsize
        if size > LARGEST or mix.dtype.name != "F32":
            why = f"the random matrices are {mix.dtype}, {size} bytes in total; supported: F32, up to {LARGEST} bytes"
            raise Unsupported(why, where=f"{where}.lora_{factor}", cure="Train with fewer random matrices, in float32")


def _target(where: tuple[str, str], slots: Mapping[str, Lazy]) -> Target:
    path, part = where
    (module, third), out = _PARTS[part], slots["Bweight"].shape[0]
    return Target(f"{path}.{module}", "in out *k", None if third is None else (third * out, (third + 1) * out))


def _update(slots: Mapping[str, Lazy], settings: NolaSettings) -> NOLA:
    rank = slots["Aweight"].shape[0]
    fields: dict[str, Any] = {
        "alpha": slots["Acoefficients"], "A_bases": _bases(slots, "A", settings.device), "A0": slots["Aweight"],
        "beta": slots["Bcoefficients"], "B_bases": _bases(slots, "B", settings.device), "B0": slots["Bweight"],
    }  # fmt: skip
    return NOLA(**fields, scaling=settings.alpha / max(rank, 1))


def _bases(slots: Mapping[str, Lazy], factor: str, device: str) -> Lazy:
    """Return the random matrices of one factor, lazily: the generator runs when the values are read."""
    seed, shape = slots[f"{factor}seed"], (*slots[f"{factor}coefficients"].shape, *slots[f"{factor}weight"].shape)

    def fetch() -> bytes:
        import torch

        if device == "cuda" and not torch.cuda.is_available():
            why = "a CUDA device drew the random matrices; from the same seed, the CPU's generator yields other values"
            raise Unsupported(why, where=SETTINGS, cure="Convert the file on a machine with a CUDA device")
        generator = torch.Generator(device).manual_seed(int(seed.numpy()[0]))
        drawn = torch.empty(shape, device=device).uniform_(-1, 1, generator=generator)
        return drawn.cpu().numpy().tobytes()

    return Lazy(shape, DTYPES["F32"], fetch)
