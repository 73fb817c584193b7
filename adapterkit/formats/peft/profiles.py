"""Adapt adapters to consumers of PEFT's folders that read only part of the config and can run only some methods.

All of them use one rank and one alpha for all modules and ignore `rank_pattern` and `alpha_pattern`; some ignore
`use_rslora`, too. So ranks are padded with zeros to one rank, and different scalings are folded into B.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from ...core.adapter import Foreign, Updates
from ...naming.architectures import WEIGHT, architecture_of
from ...naming.binding.translating import moves_of, translated
from .._one_number import one_alpha, whole_number
from .._pairs import expressible, rank_of, to_rank, unfit
from .compose import COMMON, FRESH
from .experts import GROUPED, PEFT_0_18
from .hints import FORMAT, PeftHints, fingerprint, hints_of

if TYPE_CHECKING:
    from ...core.adapter import Adapter, Target
    from ...io.checkpoint import Checkpoint
    from ...naming.architectures import Architecture
    from .._pairs import Pair

_LAYER = frozenset({"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"})
_FUSED = frozenset({"qkv_proj", "gate_up_proj"})


@dataclass(frozen=True, slots=True)
class Profile:
    """The abilities of one consumer.

    Attributes:
        title: the consumer's name in messages.
        modules: the last words of the modules that it supports; empty if that depends on the model it serves.
        embeddings: whether it runs a LoRA on an embedding.
        narrow: whether it reads the smaller side of a factor as the rank, so that modules must be wider than the rank.
        experts: whether it runs a LoRA on single experts.
        stacks: whether it runs PEFT's stacks of experts, for models whose files store experts in stacks.
        order: the layout in which it reads the factors of stacked experts. A consumer with an order is PEFT, or trains
            with PEFT, and runs everything that PEFT runs.
    """

    title: str
    modules: frozenset[str] = frozenset()
    embeddings: bool = True
    narrow: bool = False
    experts: bool = True
    stacks: bool = False
    order: str | None = None


PROFILES = {
    "llama_cpp": Profile("llama.cpp's converter"),
    "nim": Profile("NIM", _LAYER | _FUSED, embeddings=False, narrow=True, experts=False),
    "peft_0.18": Profile("PEFT 0.18", order=PEFT_0_18),
    "sglang": Profile("SGLang", _LAYER | _FUSED | {"embed_tokens", "lm_head", "w1", "w2", "w3"}),
    "tensorrt_llm": Profile(
        "TensorRT-LLM",
        _LAYER | _FUSED | {"query_key_value", "dense", "c_fc", "c_proj", "w1", "w2", "w3"},
        embeddings=False,
        narrow=True,
    ),
    "unsloth_grouped": Profile("Unsloth before September 2026", order=GROUPED),
    "vllm": Profile("vLLM", stacks=True),
}
"""Sources: llama.cpp's convert_lora_to_gguf.py, TensorRT-LLM's hf_lora_convert.py and lora_manager.py, vLLM's
lora/peft_helper.py and SGLang's lora/utils.py."""


def fitted(adapter: Adapter, profile: str, on_loss: str, base: Checkpoint | None = None) -> tuple[Adapter, list[str]]:
    """Rewrite an adapter for a consumer: LoRA with one rank and one alpha; return it and a line for each change.

    Stacks of experts are split if the base shows the family. vLLM reads PEFT's own stacks for models whose files store
    experts in stacks.

    Raises:
        Unrepresentable: the consumer cannot run an update, and `on_loss` is not `drop`.
    """
    own = PROFILES[profile]
    if own.order is not None:
        hints = msgspec.structs.replace(hints_of(adapter), experts_order=own.order)
        return adapter.replace(foreign=_foreign(adapter, hints)), []
    adapter = _apart(adapter, own, base)
    told = own.stacks and base is not None
    pairs, lines = expressible(adapter, own.title, on_loss, lambda target, update: _why_not(own, target, update, told))
    rank = max(rank_of(update, target.stacked) for target, update in pairs.items())
    narrow = [target for target, update in pairs.items() if rank_of(update, target.stacked) != rank]
    lines += [f"widened {target} to rank {rank} with zeros" for target in narrow]
    pairs = {target: to_rank(update, rank, target.stacked) for target, update in pairs.items()}
    alpha, pairs, folded = one_alpha(pairs, dialect=own.title, on_loss="fold")
    updates: Updates = {target: (update,) for target, update in pairs.items()}
    # Replace the source config completely, because its other fields, above all its patterns, would mislead consumers.
    return adapter.replace(updates=updates, foreign=_hints(updates, rank, alpha)), lines + folded


def _foreign(adapter: Adapter, hints: PeftHints) -> Foreign:
    """Return the leftovers with other hints; tensors that are only kept stay in them."""
    kept = adapter.foreign.tensors if adapter.foreign is not None and adapter.foreign.format == FORMAT else {}
    return Foreign(FORMAT, msgspec.to_builtins(hints), kept)


def _hints(updates: Updates, rank: int, alpha: float) -> Foreign:
    """Return the config to write; it names modules by their last word, because some consumers know only that."""
    config = COMMON | FRESH["LORA"] | {
        "lora_alpha": whole_number(alpha),
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": rank,
        "target_modules": sorted({target.path.rpartition(".")[2] for target in updates}),
    }  # fmt: skip
    return Foreign(
        FORMAT, msgspec.to_builtins(PeftHints(config=config | {"inference_mode": True}, targets=fingerprint(updates)))
    )


def _apart(adapter: Adapter, profile: Profile, base: Checkpoint | None) -> Adapter:
    """Return the adapter with one LoRA per expert, in a hub's names, if the consumer reads experts that way."""
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
    """Whether hubs also store a parameter's experts in one tensor."""
    keys = [key for key, place, _ in family.find(path, "transformers5") if place.stacked]
    places = [family.place(key, "hub") for key in keys]
    return bool(places) and all(place is not None and place.stacked for place in places)


def _why_not(profile: Profile, target: Target, update: Pair, told: bool) -> str:
    """Return the reason why a consumer cannot run an update; empty if it can.

    Args:
        profile: the consumer.
        target: the update's target.
        update: the update.
        told: whether the consumer reads stacks, and the base shows that the model's files have them.
    """
    if target.stacked and not told:
        return (
            "it has stacked experts, but the consumer reads one LoRA per expert: give the base, which shows the "
            "experts' names, with --base (base=), or convert with --match-base and --base BASE (bind(base)), for a "
            "BASE that stores experts one by one"
        )
    if reason := unfit(target, update, stacked=True):
        return reason
    words = target.path.split(".")
    if profile.modules and words[-1] not in profile.modules:
        return f"{profile.title} does not adapt this module"
    if not profile.experts and "experts" in words:
        return f"{profile.title} does not adapt experts"
    if not profile.embeddings and target.layout == "in out *k":
        return f"{profile.title} adapts neither embeddings nor weights stored as [in, out]"
    if profile.narrow and min(update.A.shape[1], update.B.shape[0]) <= rank_of(update):
        return f"the rank is not smaller than the module, so {profile.title} would read the wrong side as the rank"
    return ""
