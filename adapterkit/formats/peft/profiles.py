"""Rewrite adapters for programs (consumers) that read PEFT's folders but support only a part of the format.

Most of these programs use one rank and one alpha for all modules, and ignore `rank_pattern` and `alpha_pattern`. Some
also ignore `use_rslora` or alpha. So all factors are padded with zeros to the same rank. If a program ignores alpha,
all scalings are folded into B. Otherwise one alpha is chosen, and only scalings that differ from alpha / rank are
folded. For releases of PEFT and for programs that train with PEFT, only the layout of stacked experts changes.
`spec/profiles` lists each program's limits.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import msgspec

from ...core.adapter import Foreign, Updates
from ...errors import Malformed, Unrepresentable, UsageError
from ...io.arrange import times, zeros
from ...io.inputs import read_input
from ...io.lazy import as_lazy
from ...naming.architectures import WEIGHT, architecture_of
from ...naming.binding.moving import moves_of, translated
from .._kit import expressible, one_alpha, rank_of, to_rank, unfit, whole_number
from .file import FORMAT, PeftHints, fingerprint, hints_of
from .spelling import COMMON, FRESH

if TYPE_CHECKING:
    from ...core.adapter import Adapter, Target
    from ...io.checkpoint import Checkpoint
    from ...naming.architectures import Architecture
    from .._kit import Pair, Pairs

VERSION = 1
"""The `format` of the files in `spec/profiles` that this version reads."""

_LAYER = re.compile(r"(?P<start>(?:\w+\.)*layers\.)(?P<layer>\d{1,9})\.(?P<module>.+)")


class Profile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The features that one program supports; `spec/profiles/README.md` explains each field."""

    format: int
    title: str
    url: str
    about: str
    modules: frozenset[str] = frozenset()
    embeddings: bool = True
    narrow: bool = False
    experts: bool = True
    stacks: bool = False
    ranks: tuple[int, int] | None = None
    scale: Literal["alpha", "folded"] = "alpha"
    model_type: bool = False
    bytes: int | None = None
    order: str | None = None
    complete: bool = False


@cache
def profiles() -> Mapping[str, Profile]:
    """Return all profiles by name, in alphabetical order.

    Raises:
        Malformed: a profile's file does not have the fields that `spec/profiles/README.md` defines.
    """
    installed = Path(__file__).parents[1] / "data" / "profiles"
    folder = installed if installed.is_dir() else Path(__file__).parents[3] / "spec" / "profiles"
    return {file.stem: _load(file) for file in sorted(folder.glob("*.toml"))}


def _load(path: Path) -> Profile:
    try:
        profile = msgspec.toml.decode(read_input(path), type=Profile)
    except (ValueError, msgspec.MsgspecError) as error:
        raise Malformed(f"this is not a valid profile ({error})", path=path, cure="Correct the file") from error
    if profile.format != VERSION:
        raise Malformed(
            f"the file has format {profile.format}; this version reads format {VERSION}",
            path=path,
            cure="Correct the file",
        )
    return profile


def fitted(adapter: Adapter, profile: str, on_loss: str, base: Checkpoint | None = None) -> tuple[Adapter, list[str]]:
    """Rewrite an adapter as LoRA with one rank and one alpha, for one program; also return a line for each change.

    Stacks of experts are split into single experts if the base shows the model family. There is one exception: a stack
    is kept if the model's checkpoint also stores these experts in one tensor and the program reads PEFT's stacks, as
    vLLM does. For a profile with `order`, the only change is the layout in which stacked experts will be written.

    Raises:
        Unrepresentable: the program cannot run an update, and `on_loss` is not `drop`; or the rank or the weight file
            is too large for the program.
        UsageError: the program needs the base's model type in the config, and no base is given.
    """
    chosen = profiles()[profile]
    if chosen.order is not None:
        hints = msgspec.structs.replace(hints_of(adapter), experts_order=chosen.order)
        return adapter.replace(foreign=_foreign(adapter, hints)), []
    adapter = _apart(adapter, chosen, base)
    in_stacks = chosen.stacks and base is not None
    pairs, lines = expressible(
        adapter, chosen.title, on_loss, lambda target, update: _why_not(chosen, target, update, in_stacks)
    )
    rank = _rank_for(chosen, max(rank_of(update, target.stacked) for target, update in pairs.items()))
    narrow = [target for target, update in pairs.items() if rank_of(update, target.stacked) != rank]
    lines += [f"widened {target} to rank {rank} with zeros" for target in narrow]
    pairs = {target: to_rank(update, rank, target.stacked) for target, update in pairs.items()}
    if chosen.complete:
        added = _absent(pairs, base)
        lines += [
            f"wrote zeros for {target}, because {chosen.title} needs this module in every layer" for target in added
        ]
        pairs |= added
    if chosen.scale == "folded":
        alpha, (pairs, folded) = float(rank), _folded(pairs)
    else:
        alpha, pairs, folded = one_alpha(pairs, format_name=chosen.title, on_loss="fold")
    updates: Updates = {target: (update,) for target, update in pairs.items()}
    _check_size(chosen, updates)
    more = {"model_type": _model_type(chosen, base)} if chosen.model_type else {}
    # Replace the whole source config, because the program would misread its other fields, above all the patterns.
    return adapter.replace(updates=updates, foreign=_hints(updates, rank, alpha, more)), lines + folded


def _rank_for(profile: Profile, rank: int) -> int:
    """Return the smallest rank that the program accepts and that is not below `rank`."""
    if profile.ranks is None:
        return rank
    least, most = profile.ranks
    if rank > most:
        raise Unrepresentable(
            f"the rank is {rank}, but {profile.title} accepts ranks up to {most}",
            cure=f"adapterkit resize --rank {most}",
        )
    return max(least, rank)


def _absent(pairs: Pairs, base: Checkpoint | None) -> Pairs:
    """If the adapter changes a module in some layers but not in all, return updates of zeros for the other layers.

    The base shows which layers the model has. Without a base, only the layers that the adapter changes are known.
    """
    of_module: dict[tuple[str, str], Target] = {}
    layers: dict[str, set[int]] = {}
    for target in pairs:
        if place := _LAYER.fullmatch(target.path):
            of_module.setdefault((place["start"], place["module"]), target)
            layers.setdefault(place["start"], set()).add(int(place["layer"]))
    for place in filter(None, map(_LAYER.fullmatch, () if base is None else base.tensors)):
        if place["start"] in layers:
            layers[place["start"]].add(int(place["layer"]))
    added: Pairs = {}
    for (start, module), like in of_module.items():
        A, B = as_lazy(pairs[like].A), as_lazy(pairs[like].B)
        nothing = pairs[like].replace(A=zeros(A.shape, A.dtype), B=zeros(B.shape, B.dtype))
        targets = (replace(like, path=f"{start}{layer}.{module}") for layer in sorted(layers[start]))
        added |= {target: nothing for target in targets if target not in pairs}
    return added


def _folded(pairs: Pairs) -> tuple[Pairs, list[str]]:
    """Multiply every scaling into B; return the updates, and a line for each scaling that was not 1."""
    folded = {}
    for target, update in pairs.items():
        B = update.B if update.scaling == 1 else times(as_lazy(update.B), update.scaling)
        folded[target] = update.replace(B=B, scaling=1.0)
    return folded, [f"folded the scale of {target} into B" for target in pairs if pairs[target].scaling != 1]


def _check_size(profile: Profile, updates: Updates) -> None:
    leaves = [as_lazy(leaf) for group in updates.values() for update in group for leaf in update.tensors.values()]
    size = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)
    if profile.bytes is not None and size > profile.bytes:
        why = f"the weights have {size:,} bytes, but {profile.title} accepts files of at most {profile.bytes:,} bytes"
        raise Unrepresentable(why, cure="adapterkit resize --rank R --dtype BF16")


def _model_type(profile: Profile, base: Checkpoint | None) -> str:
    model_type = None if base is None else (base.config or {}).get("model_type")
    if not isinstance(model_type, str):
        why = f"{profile.title} reads model_type from the adapter's config, but the base's model_type is unknown"
        raise UsageError(why, where="base", cure="Pass a base that has a config.json: --base BASE (base=)")
    return model_type


def _foreign(adapter: Adapter, hints: PeftHints) -> Foreign:
    """Return a `Foreign` with these hints. If the adapter's own `Foreign` has PEFT's format, keep its tensors."""
    kept = adapter.foreign.tensors if adapter.foreign is not None and adapter.foreign.format == FORMAT else {}
    return Foreign(FORMAT, msgspec.to_builtins(hints), kept)


def _hints(updates: Updates, rank: int, alpha: float, more: Mapping[str, str]) -> Foreign:
    """Return a `Foreign` that contains the config to write.

    `target_modules` lists only the last word of each module's path, such as `q_proj`, because some programs do not
    work with whole paths.
    """
    config = COMMON | FRESH["LORA"] | {
        "lora_alpha": whole_number(alpha),
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": rank,
        "target_modules": sorted({target.path.rpartition(".")[2] for target in updates}),
        **more,
    }  # fmt: skip
    return Foreign(
        FORMAT, msgspec.to_builtins(PeftHints(config=config | {"inference_mode": True}, targets=fingerprint(updates)))
    )


def _apart(adapter: Adapter, profile: Profile, base: Checkpoint | None) -> Adapter:
    """Split stacks into one LoRA per expert, with the names that the model's checkpoints on the hub use.

    The adapter stays unchanged if the base does not show the model family, or if the program supports no experts. For
    programs that read PEFT's stacks, a stack is kept if the checkpoints on the hub store its experts in one tensor.
    """
    family = architecture_of(None if base is None else base.config)
    if family is None or not profile.experts:
        return adapter
    stacks = {target: group for target, group in adapter.updates.items() if target.stacked}
    moves = {
        path: moves
        for path, moves in moves_of(stacks, family, WEIGHT).items()
        if not (profile.stacks and _stored_in_stacks(family, path))
    }
    apart = translated(stacks, moves)
    plain = {target: group for target, group in adapter.updates.items() if target.path not in moves}
    return adapter.replace(updates={**plain, **apart})


def _stored_in_stacks(family: Architecture, path: str) -> bool:
    """Whether transformers and the checkpoints on the hub both store all experts of this parameter in one tensor."""
    keys = [key for key, place, _ in family.find(path, "transformers5") if place.stacked]
    places = [family.place(key, "hub") for key in keys]
    return bool(places) and all(place is not None and place.stacked for place in places)


def _why_not(profile: Profile, target: Target, update: Pair, in_stacks: bool) -> str:
    """Return the reason why a program cannot run an update; empty if it can.

    Args:
        profile: the program.
        target: the update's target.
        update: the update.
        in_stacks: whether a base is given and the program reads PEFT's stacks. If the base shows the model family,
            `_apart` has already split each stack whose experts are separate tensors in the model's files.
    """
    if target.stacked and not in_stacks:
        return (
            f"this is a stack of experts, but {profile.title} reads one LoRA per expert: give the base, which shows "
            "the experts' names, with --base BASE (base=); or give a BASE that stores experts one by one, with "
            "--match-base --base BASE (bind(base))"
        )
    if reason := unfit(target, update, stacked=True):
        return reason
    words = target.path.split(".")
    if profile.modules and words[-1] not in profile.modules and ".".join(words[-2:]) not in profile.modules:
        return f"{profile.title} does not adapt this module"
    if not profile.experts and "experts" in words:
        return f"{profile.title} does not adapt experts"
    if not profile.embeddings and target.layout == "in out *k":
        return f"{profile.title} adapts neither embeddings nor weights stored as [in, out]"
    if profile.narrow and min(update.A.shape[1], update.B.shape[0]) <= rank_of(update):
        return (
            f"{profile.title} assumes that a factor's smaller side is the rank, so the rank must be smaller than the "
            "module's numbers of inputs and outputs"
        )
    return ""
