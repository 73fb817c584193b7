"""List the methods whose files have `lora_A` and `lora_B`. Their `peft_type` is LORA."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ...io.lazy import Lazy, as_lazy
from ...methods.alora import ALoRA
from ...methods.arrow import Arrow
from ...methods.bdlora import BDLoRA
from ...methods.dora import DoRA
from ...methods.grouped_dora import GroupedDoRA
from ...methods.grouped_lora import GroupedLoRA
from ...methods.ia3 import IA3
from ...methods.kasa import KaSA
from ...methods.lora import LoRA
from ...methods.olora import OLoRA
from ...methods.pissa import PiSSA
from ...methods.replacement import Replacement
from ...methods.rows import Rows

if TYPE_CHECKING:
    from ...core.adapter import Target
    from ...core.updates import Update
    from ...io.strict_json import JsonValue

PAIRS = (LoRA, DoRA, KaSA, BDLoRA, ALoRA, Arrow, OLoRA, PiSSA, GroupedLoRA, GroupedDoRA)
"""The methods that store a pair of factors, A and B."""

BESIDE = (*PAIRS, IA3, Replacement, Rows)
"""All methods that belong to no family."""

LINEAR = (KaSA, BDLoRA)
"""The methods that PEFT supports only for linear layers."""

ROUTED = (ALoRA, Arrow)
"""The methods that PEFT supports only for linear layers and Conv1D."""

BIASED = (LoRA, ALoRA, GroupedLoRA)
"""The methods that may have a bias."""

RESIDUAL = (OLoRA, PiSSA)
"""The methods that subtract their initial values from the base. PEFT has them for linear layers and Conv1D."""

OUTPUT_TIMES = 2.0
"""How many times PEFT's forward adds the change of the output projection of an `nn.MultiheadAttention`."""

TOGETHER: tuple[tuple[type[Update], ...], ...] = (
    (LoRA, BDLoRA),
    (LoRA, OLoRA),
    (LoRA, PiSSA),
    (LoRA, GroupedLoRA),
    (DoRA, GroupedDoRA),
)
"""Groups of methods that can be in one file together."""

_KASA = {"beta": 1e-4, "gamma": 1e-3}
"""PEFT's default weights for the terms that KaSA adds to the loss in training."""


def rank_of(update: Update, stacked: bool = False) -> int:
    """Return the rank of a pair."""
    if isinstance(update, BDLoRA):
        blocks: Any = update.B_blocks if update.A_blocks is None else update.A_blocks
        return int(blocks.shape[0]) * int(blocks.shape[1 if update.B_blocks is None else 2])
    A: Any = update.tensors.get("A", update.tensors.get("idle_A"))
    return int(A.shape[int(stacked)])


def from_blocks(leaf: Lazy) -> Lazy:
    """Reshape [n, rows, columns] to PEFT's shape [n * rows, columns]."""
    return leaf.reshape(-1, leaf.shape[-1])


def may_stand(update: Update, method: type[Update] | None) -> bool:
    """Whether an update may be in a file whose main method is `method`."""
    return type(update) is method or any(type(update) in some and method in some for some in TOGETHER)


def law_fields(updates: Mapping[str, Update], before: Mapping[str, JsonValue]) -> dict[str, JsonValue]:
    """Return the config fields that select the formula of these pairs; `before` is the old config."""
    kinds = {type(update) for update in updates.values()}
    residual = next((kind.__name__.lower() for kind in RESIDUAL if kind in kinds), None)
    was = str(before.get("init_lora_weights")).lower() in (kind.__name__.lower() for kind in RESIDUAL)
    return {
        "use_dora": bool(kinds & {DoRA, GroupedDoRA}),
        "lora_bias": any(isinstance(update, BIASED) and update.bias is not None for update in updates.values()),
        "kasa_config": (before.get("kasa_config") or _KASA) if KaSA in kinds else None,
        "use_bdlora": _blocks(updates) if BDLoRA in kinds else None,
        **_invocation(updates, before),
        "arrow_config": _router(updates, before),
        **({"init_lora_weights": residual or True} if residual or was else {}),
    }


def _invocation(updates: Mapping[str, Update], before: Mapping[str, JsonValue]) -> dict[str, JsonValue]:
    """Return the field with the tokens that activate aLoRA; PEFT searches for these tokens only in causal models."""
    some = next((update for update in updates.values() if isinstance(update, ALoRA)), None)
    if some is None:
        return {"alora_invocation_tokens": None}
    tokens = as_lazy(some.invocation).numpy().tolist()
    return {"alora_invocation_tokens": tokens, "task_type": before.get("task_type") or "CAUSAL_LM"}


def _router(updates: Mapping[str, Update], before: Mapping[str, JsonValue]) -> dict[str, JsonValue] | None:
    """Return the settings of Arrow's router, with new names for the experts."""
    some = next((update for update in updates.values() if isinstance(update, Arrow)), None)
    if some is None:
        return None
    names = {"task": some.tasks, "gks": some.general}
    listed = {f"{name}_adapter_names": [f"{name}_{i}" for i in range(count)] for name, count in names.items()}
    said = before.get("arrow_config")
    seed = said.get("rng_seed") if isinstance(said, Mapping) else None
    numbers = {"top_k": some.top_k, "router_temperature": some.temperature, "rng_seed": seed}
    return {**numbers, "use_gks": some.general > 0, **listed}


def _blocks(updates: Mapping[str, Update]) -> dict[str, JsonValue]:
    own = {path: update for path, update in updates.items() if isinstance(update, BDLoRA)}
    A = sorted(path for path, update in own.items() if update.A_blocks is not None)
    some: Any = next(iter(own.values()))
    return {
        "target_modules_bd_a": A or None,
        "target_modules_bd_b": sorted(own.keys() - set(A)) or None,
        "nblocks": int((some.B_blocks if some.A_blocks is None else some.A_blocks).shape[0]),
        "match_strict": len(own) == len(updates),
    }


def why_not_there(target: Target, update: Update) -> str:
    """Return the reason why a file cannot store a pair at this target; empty if no special rule forbids it."""
    if isinstance(update, LINEAR) and target.layout != "out *in":
        return f"PEFT has no {update.method} on a weight stored as [in, out]"
    if isinstance(update, Arrow) and not update.lacks_experts:
        return "this arrow stores its experts, but PEFT has them in separate folders"
    return ""
