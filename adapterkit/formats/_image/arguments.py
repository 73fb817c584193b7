"""Read network options that change the forward but are in no tensor: the header's `ss_network_args`.

sd-scripts writes there, as JSON, the arguments of the network. LyCORIS reads every word except `false` as true.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from .._format import Departure

FLUX = "networks.lora_flux"
"""sd-scripts' network of LoRA for FLUX."""

OPTIONS = {
    "split_qkv": Departure(
        "with split_qkv=True in ss_network_args of sd-scripts' networks.lora_flux, a LoRA of a double block's qkv "
        "counts 3 times alpha / r, and one of a single block's linear1 4 times: its parts were trained apart",
        "they count alpha / r times",
    ),
    "bypass_mode": Departure(
        "with bypass_mode in ss_network_args of a network of LyCORIS, OFT, BOFT and IA3 of outputs act on the bias, "
        "too, and a dora_scale has no effect",
        "they act on the weight alone, and a dora_scale is DoRA's magnitude",
    ),
    "rs_lora": Departure(
        "with rs_lora in ss_network_args of a network of LyCORIS, GLoRA counts alpha / sqrt(r) times, and a LoKr of "
        "two whole factors the cube root of alpha, which is sqrt(r)",
        "GLoRA counts alpha / r times, and a LoKr of two whole factors once",
    ),
    "dylora": Departure(
        "with algo=dylora in ss_network_args of a network of LyCORIS, all ranks together count "
        "alpha / (r / block_size) times",
        "they count alpha / r times",
    ),
}
"""Departures of the forward of LyCORIS and sd-scripts from the meaning of their tensors."""


@dataclass(frozen=True, slots=True)
class Arguments:
    """The options with which a network of LyCORIS was trained.

    Attributes:
        bypass: modules changed their layer's output, its bias included; DoRA's magnitudes had no effect.
        rs: scalings are alpha / sqrt(r).
        unit: a LoRA counts this many times alpha / r: the ranks that DyLoRA trained at a time; 0 for once.
        split: sd-scripts trained the parts of FLUX's fused weights apart, each with r ranks, and saved them as one.
    """

    bypass: bool = False
    rs: bool = False
    unit: int = 0
    split: bool = False

    def at(self, stem: str) -> Arguments:
        """Return the options at one module, by its name in the keys."""
        if not self.split:
            return self
        fused = {"qkv": 3 if "double" in stem else 0, "linear1": 4 if "single" in stem else 0}
        return replace(self, unit=next((parts for word, parts in fused.items() if word in stem), 0))


def arguments_in(metadata: Mapping[str, str]) -> Arguments:
    """Return the options in a header; the defaults if it names no such network, or has no such options."""
    network = metadata.get("ss_network_module", "")
    if not (network.startswith("lycoris") or network == FLUX):
        return Arguments()
    try:
        given: Any = json.loads(metadata.get("ss_network_args", "{}"))
    except (ValueError, RecursionError):
        return Arguments()
    if not isinstance(given, dict):
        return Arguments()
    if network == FLUX:
        return Arguments(split=str(given.get("split_qkv")) == "True")
    dylora = str(given.get("algo", "")).lower() == "dylora"
    return Arguments(_is_on(given, "bypass_mode"), _is_on(given, "rs_lora"), _unit(given) if dylora else 0)


def _is_on(given: Mapping[str, Any], name: str) -> bool:
    return name in given and str(given[name]).lower() != "false"


def _unit(given: Mapping[str, Any]) -> int:
    text = str(given.get("block_size") or 4)
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 10 else 4
