"""Profiles: consumers of PEFT's folders that heed only a part of the config, and what each of them can run.

All of them take one rank and one alpha for all modules, whatever `rank_pattern` and `alpha_pattern` say, and some do
not know `use_rslora`. So ranks are made equal with zeros, and scalings that differ go into B.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from ...adapter import Foreign, Updates
from .._one_number import one_alpha, whole_number
from .._pairs import expressible, rank_of, to_rank, unfit
from .compose import COMMON, FRESH
from .hints import FORMAT, Hints, fingerprint

if TYPE_CHECKING:
    from ...adapter import Adapter, Target
    from .._pairs import Pair

_LAYER = frozenset({"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"})
_FUSED = frozenset({"qkv_proj", "gate_up_proj"})


@dataclass(frozen=True, slots=True)
class Profile:
    """What one consumer can run.

    Attributes:
        title: its name in messages.
        modules: last words of the modules it knows; empty where it knows those of the model it serves.
        embeddings: whether it runs a LoRA of an embedding.
        narrow: it takes the smaller side of a factor for the rank, so that no module may be as narrow.
        experts: whether it runs a LoRA of single experts.
    """

    title: str
    modules: frozenset[str] = frozenset()
    embeddings: bool = True
    narrow: bool = False
    experts: bool = True


PROFILES = {
    "llama_cpp": Profile("llama.cpp's converter"),
    "nim": Profile("NIM", _LAYER | _FUSED, embeddings=False, narrow=True, experts=False),
    "sglang": Profile("SGLang", _LAYER | _FUSED | {"embed_tokens", "lm_head"}),
    "tensorrt_llm": Profile(
        "TensorRT-LLM",
        _LAYER | _FUSED | {"query_key_value", "dense", "c_fc", "c_proj"},
        embeddings=False,
        narrow=True,
        experts=False,
    ),
    "vllm": Profile("vLLM"),
}
"""Sources: llama.cpp's convert_lora_to_gguf.py, TensorRT-LLM's hf_lora_convert.py, vLLM's lora/peft_helper.py and
SGLang's lora/utils.py."""


def fitted(adapter: Adapter, profile: str, on_loss: str) -> tuple[Adapter, list[str]]:
    """An adapter as a consumer takes it: LoRA of one rank and one alpha; and a line for each change.

    Raises:
        Unrepresentable: it holds what the consumer cannot run, and `on_loss` is not `drop`.
    """
    own = PROFILES[profile]
    pairs, lines = expressible(adapter, own.title, on_loss, lambda target, update: _why_not(own, target, update))
    rank = max(map(rank_of, pairs.values()))
    lines += [f"widened {target} to rank {rank} with zeros" for target, u in pairs.items() if rank_of(u) != rank]
    pairs = {target: to_rank(update, rank) for target, update in pairs.items()}
    alpha, pairs, folded = one_alpha(pairs, dialect=own.title, on_loss="fold")
    updates: Updates = {target: (update,) for target, update in pairs.items()}
    # What else was read of a config, its patterns first of all, is not for this consumer.
    return adapter.replace(updates=updates, foreign=_hints(updates, rank, alpha)), lines + folded


def _hints(updates: Updates, rank: int, alpha: float) -> Foreign:
    """The config that is to be written: some consumers know modules by the last word of their names alone."""
    config = COMMON | FRESH["LORA"] | {
        "lora_alpha": whole_number(alpha),
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": rank,
        "target_modules": sorted({target.path.rpartition(".")[2] for target in updates}),
    }  # fmt: skip
    return Foreign(
        FORMAT, msgspec.to_builtins(Hints(config=config | {"inference_mode": True}, targets=fingerprint(updates)))
    )


def _why_not(profile: Profile, target: Target, update: Pair) -> str:
    if target.stacked:
        return (
            "stacked experts, and it reads one LoRA an expert: convert with --match-base and --base BASE (bind(base)), "
            "where BASE stores its experts one by one"
        )
    if reason := unfit(target, update):
        return reason
    words = target.path.split(".")
    if profile.modules and words[-1] not in profile.modules:
        return f"no module that {profile.title} runs"
    if not profile.experts and "experts" in words:
        return "experts"
    if not profile.embeddings and target.layout == "in out *k":
        return "an embedding, or a weight stored [in, out]"
    if profile.narrow and min(update.A.shape[1], update.B.shape[0]) <= rank_of(update):
        return "a module no wider than the rank, of which it would take the wrong side for the rank"
    return ""
