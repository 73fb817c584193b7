"""Slots of bottleneck adapters: which tensors a config calls for, under which names, and the config of given tensors.

`adapter_down` is a sequence, so that its layer has the number 0, or 1 behind a norm of the adapter's own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

PHM = {
    "W": "W",
    "W_left": "left",
    "W_right": "right",
    "b": "bias",
    "phm_rule": "rule",
    "phm_rule_left": "rule_left",
    "phm_rule_right": "rule_right",
}
"""Slot of a Compacter layer -> field, but for `down_` or `up_`."""

COUPLING = {
    f"{half}.{position}.{leaf}": f"{half}_{way}{'_bias' if leaf == 'bias' else ''}"
    for half in ("F", "G")
    for position, way in ((0, "down"), (2, "up"))
    for leaf in ("weight", "bias")
}
"""Slot of an invertible adapter -> field."""

Words = Mapping[str, Any]
"""Fields of a config."""


def own_slots(words: Words) -> dict[str, str]:
    """Slot -> field, of what each adapter has for itself."""
    layers = {f"adapter_down.{int(words['ln_before'])}": "down", "adapter_up": "up"}
    if words["phm_layer"]:
        names = [*_rules(words, shared=False), *_factors(words, shared=False), *(["b"] if words["phm_bias"] else [])]
        fields = {f"{layer}.{name}": f"{way}_{PHM[name]}" for layer, way in layers.items() for name in names}
    else:
        fields = {f"{layer}.weight": way for layer, way in layers.items()}
        fields |= {f"{layer}.bias": f"{way}_bias" for layer, way in layers.items()}
    for on, slot, field in (
        (words["ln_before"], "adapter_down.0", "norm_before"),
        (words["ln_after"], "adapter_norm_after", "norm_after"),
        (words["use_gating"], "gate", "gate"),
    ):
        fields |= {f"{slot}.weight": field, f"{slot}.bias": f"{field}_bias"} if on else {}
    scaling = {"learned": "scaling_factor", "channel": "channel_scaling"}.get(str(words["scaling"]))
    return fields | ({"scaling": scaling} if scaling else {})


def shared_slots(words: Words) -> dict[str, tuple[str, ...]]:
    """Slot -> the fields that it fills in every adapter, of what the whole model shares."""
    if not words["phm_layer"]:
        return {}
    found: dict[str, tuple[str, ...]] = {}
    for name in _rules(words, shared=True):
        found[name] = (f"down_{PHM[name]}", f"up_{PHM[name]}")
    for way in ("down", "up"):
        found |= {name.replace("W", f"W_{way}"): (f"{way}_{PHM[name]}",) for name in _factors(words, shared=True)}
    return found


def words_of(updates: Sequence[Any]) -> dict[str, Any]:
    """The words of a config that say which tensors these updates have; all have the same."""
    tensors = updates[0].tensors
    phm = updates[0].method == "compacter"
    scaling = {"scaling_factor": "learned", "channel_scaling": "channel"}
    factors = [field for field in tensors if field.partition("_")[2] in ("W", "left", "right")]
    return {
        "ln_before": "norm_before" in tensors,
        "ln_after": "norm_after" in tensors,
        "use_gating": "gate" in tensors,
        "scaling": next((word for field, word in scaling.items() if field in tensors), updates[0].scaling),
        "phm_layer": phm,
        "phm_bias": not phm or "down_bias" in tensors,
        "factorized_phm_rule": "down_rule_left" in tensors,
        "factorized_phm_W": not phm or "down_left" in tensors,
        "shared_phm_rule": not phm or _one_rule(updates),
        "shared_W_phm": phm and len(updates) > 1 and all(_is_one(updates, field) for field in factors),
    }


def _one_rule(updates: Sequence[Any]) -> bool:
    """Whether the rules of all updates, down and up, are the same tensors."""
    ends = [field.removeprefix("down_") for field in updates[0].tensors if field.startswith("down_rule")]
    same = (u.tensors[f"down_{end}"] is u.tensors.get(f"up_{end}") for end in ends for u in updates)
    return all(same) and all(_is_one(updates, f"down_{end}") for end in ends)


def _is_one(updates: Sequence[Any], field: str) -> bool:
    return all(update.tensors.get(field) is updates[0].tensors[field] for update in updates)


def _rules(words: Words, *, shared: bool) -> list[str]:
    if bool(words["shared_phm_rule"]) != shared:
        return []
    return ["phm_rule_left", "phm_rule_right"] if words["factorized_phm_rule"] else ["phm_rule"]


def _factors(words: Words, *, shared: bool) -> list[str]:
    if bool(words["shared_W_phm"]) != shared:
        return []
    return ["W_left", "W_right"] if words["factorized_phm_W"] else ["W"]
