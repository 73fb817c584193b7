"""Adapt adapters to consumers of PEFT's folders that read only a part of the config, and can run only some methods.

All of them use one rank and one alpha for all modules, whatever `rank_pattern` and `alpha_pattern` say, and some ignore
`use_rslora`, or alpha. So ranks are padded with zeros to one rank, and scalings that differ, or all, go into B. The
limits of each are data, `spec/profiles`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import msgspec

from ...core.adapter import Foreign, Updates
from ...errors import Malformed, Unrepresentable, UsageError
from ...io.arrange import times
from ...io.inputs import read_input
from ...io.lazy import as_lazy
from ...naming.architectures import WEIGHT, architecture_of
from ...naming.binding.translating import moves_of, translated
from .._one_number import one_alpha, whole_number
from .._pairs import expressible, rank_of, to_rank, unfit
from .compose import COMMON, FRESH
from .hints import FORMAT, PeftHints, fingerprint, hints_of

if TYPE_CHECKING:
    from ...core.adapter import Adapter, Target
    from ...io.checkpoint import Checkpoint
    from ...naming.architectures import Architecture
    from .._pairs import Pair, Pairs

VERSION = 1
"""Version of the form of `spec/profiles` that this code reads."""


class Profile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The capabilities of one consumer; `spec/profiles/README.md` says what each field means."""

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


@cache
def profiles() -> Mapping[str, Profile]:
    """Name -> consumer, in the order of their names.

    Raises:
        Malformed: a file does not have the form of the README.
    """
    installed = Path(__file__).parents[1] / "data" / "profiles"
    folder = installed if installed.is_dir() else Path(__file__).parents[3] / "spec" / "profiles"
    return {file.stem: _load(file) for file in sorted(folder.glob("*.toml"))}


def _load(path: Path) -> Profile:
    try:
        found = msgspec.toml.decode(read_input(path), type=Profile)
    except (ValueError, msgspec.MsgspecError) as error:
        raise Malformed(f"not a profile ({error})", path=path, cure="Correct the file") from error
    if found.format != VERSION:
        raise Malformed(f"format {found.format}, and this version reads format {VERSION}", path=path, cure="Correct it")
    return found


def fitted(adapter: Adapter, profile: str, on_loss: str, base: Checkpoint | None = None) -> tuple[Adapter, list[str]]:
    """Rewrite an adapter for a consumer: LoRA of one rank and one alpha; return it and a line for each change.

    Stacks of experts are taken apart if the base tells the family; vLLM reads PEFT's own stacks for models whose files
    store their experts in stacks.

    Raises:
        Unrepresentable: it has an update that the consumer cannot run, and `on_loss` is not `drop`; its rank or its
            file is too large for the consumer.
        UsageError: the consumer reads the base's model type, and no base is given.
    """
    own = profiles()[profile]
    if own.order is not None:
        hints = msgspec.structs.replace(hints_of(adapter), experts_order=own.order)
        return adapter.replace(foreign=_foreign(adapter, hints)), []
    adapter = _apart(adapter, own, base)
    told = own.stacks and base is not None
    pairs, lines = expressible(adapter, own.title, on_loss, lambda target, update: _why_not(own, target, update, told))
    rank = _rank_for(own, max(rank_of(update, target.stacked) for target, update in pairs.items()))
    narrow = [target for target, update in pairs.items() if rank_of(update, target.stacked) != rank]
    lines += [f"widened {target} to rank {rank} with zeros" for target in narrow]
    pairs = {target: to_rank(update, rank, target.stacked) for target, update in pairs.items()}
    if own.scale == "folded":
        alpha, (pairs, folded) = float(rank), _folded(pairs)
    else:
        alpha, pairs, folded = one_alpha(pairs, dialect=own.title, on_loss="fold")
    updates: Updates = {target: (update,) for target, update in pairs.items()}
    _check_size(own, updates)
    more = {"model_type": _model_type(own, base)} if own.model_type else {}
    # The rest of a config that was read, its patterns first of all, would mislead this consumer.
    return adapter.replace(updates=updates, foreign=_hints(updates, rank, alpha, more)), lines + folded


def _rank_for(profile: Profile, rank: int) -> int:
    """Return the rank to write, wider where the consumer takes no smaller one."""
    if profile.ranks is None:
        return rank
    least, most = profile.ranks
    if rank > most:
        raise Unrepresentable(
            f"rank {rank}, and {profile.title} takes ranks up to {most}", cure=f"adapterkit resize --rank {most}"
        )
    return max(least, rank)


def _folded(pairs: Pairs) -> tuple[Pairs, list[str]]:
    """Return the updates with scaling 1, the scale multiplied into B, and a line for each that had another."""
    held = {}
    for target, update in pairs.items():
        B = update.B if update.scaling == 1 else times(as_lazy(update.B), update.scaling)
        held[target] = update.replace(B=B, scaling=1.0)
    return held, [f"folded the scale of {target} into B" for target in pairs if pairs[target].scaling != 1]


def _check_size(profile: Profile, updates: Updates) -> None:
    leaves = [as_lazy(leaf) for found in updates.values() for update in found for leaf in update.tensors.values()]
    size = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)
    if profile.bytes is not None and size > profile.bytes:
        why = f"{size:,} bytes of weights, and {profile.title} takes files of less than {profile.bytes:,}"
        raise Unrepresentable(why, cure="adapterkit resize --rank R --dtype BF16")


def _model_type(profile: Profile, base: Checkpoint | None) -> str:
    """Return the model type for the config."""
    found = None if base is None else (base.config or {}).get("model_type")
    if not isinstance(found, str):
        why = f"{profile.title} reads model_type from the adapter's config, and nothing here tells it"
        raise UsageError(why, where="base", cure="Name the base with its config.json: --base BASE (base=)")
    return found


def _foreign(adapter: Adapter, hints: PeftHints) -> Foreign:
    """Return the leftovers with other hints; tensors that are only kept stay."""
    kept = adapter.foreign.tensors if adapter.foreign is not None and adapter.foreign.format == FORMAT else {}
    return Foreign(FORMAT, msgspec.to_builtins(hints), kept)


def _hints(updates: Updates, rank: int, alpha: float, more: Mapping[str, str]) -> Foreign:
    """Return the config to write; some consumers know modules only by the last word of their names."""
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
    """Return the adapter with one LoRA an expert, under a hub's names, if the consumer reads experts that way."""
    family = architecture_of(None if base is None else base.config)
    if family is None or not profile.experts:
        return adapter
    stacks = {target: found for target, found in adapter.updates.items() if target.stacked}
    moves = {
        path: found
        for path, found in moves_of(stacks, family, WEIGHT).items()
        if not (profile.stacks and _stored_in_stacks(family, path))
    }
    apart = translated(stacks, moves)
    own = {target: found for target, found in adapter.updates.items() if target.path not in moves}
    return adapter.replace(updates={**own, **apart})


def _stored_in_stacks(family: Architecture, path: str) -> bool:
    """Whether a parameter's experts are in one tensor on a hub, too."""
    keys = [key for key, place, _ in family.find(path, "transformers5") if place.stacked]
    places = [family.place(key, "hub") for key in keys]
    return bool(places) and all(place is not None and place.stacked for place in places)


def _why_not(profile: Profile, target: Target, update: Pair, told: bool) -> str:
    """Say why a consumer cannot run an update; `told`: it reads stacks, and the base says that these are such."""
    if target.stacked and not told:
        return (
            "stacked experts, and it reads one LoRA an expert: give the base by --base (base=), which tells their "
            "names, or convert with --match-base and --base BASE (bind(base)), where BASE stores them one by one"
        )
    if reason := unfit(target, update, stacked=True):
        return reason
    words = target.path.split(".")
    if profile.modules and words[-1] not in profile.modules and ".".join(words[-2:]) not in profile.modules:
        return f"no module that {profile.title} runs"
    if not profile.experts and "experts" in words:
        return "experts"
    if not profile.embeddings and target.layout == "in out *k":
        return "an embedding, or a weight stored [in, out]"
    if profile.narrow and min(update.A.shape[1], update.B.shape[0]) <= rank_of(update):
        return "a module no wider than the rank, of which it would take the wrong side for the rank"
    return ""
