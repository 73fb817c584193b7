"""Options of LyCORIS that change what its forward computes and that no tensor tells: the header's `ss_network_args`.

sd-scripts writes there, as JSON, what the network was made with. LyCORIS takes every word but `false` for true.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .._format import Departure

OPTIONS = {
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
"""Where LyCORIS's forward departs from what its tensors say."""


@dataclass(frozen=True, slots=True)
class Arguments:
    """How a network of LyCORIS was trained.

    Attributes:
        bypass: modules acted on their layer's output, its bias included; DoRA's magnitudes were left out of account.
        rs: scalings are alpha / sqrt(r).
        unit: how many ranks DyLoRA trained at a time; 0 where the network is none.
    """

    bypass: bool = False
    rs: bool = False
    unit: int = 0


def arguments_in(metadata: Mapping[str, str]) -> Arguments:
    """Return the options in a header; the defaults where it names no network of LyCORIS, or has no such options."""
    if not metadata.get("ss_network_module", "").startswith("lycoris"):
        return Arguments()
    try:
        given: Any = json.loads(metadata.get("ss_network_args", "{}"))
    except (ValueError, RecursionError):
        return Arguments()
    if not isinstance(given, dict):
        return Arguments()
    dylora = str(given.get("algo", "")).lower() == "dylora"
    return Arguments(_is_on(given, "bypass_mode"), _is_on(given, "rs_lora"), _unit(given) if dylora else 0)


def _is_on(given: Mapping[str, Any], name: str) -> bool:
    return name in given and str(given[name]).lower() != "false"


def _unit(given: Mapping[str, Any]) -> int:
    text = str(given.get("block_size") or 4)
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 10 else 4
