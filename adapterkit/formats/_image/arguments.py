"""Read the header's `ss_network_args`: network options that change the forward but are not stored in a tensor.

sd-scripts stores the options under this key, as JSON. LyCORIS treats every value except `false` as true.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from .._format import Departure

FLUX = "networks.lora_flux"
"""sd-scripts' LoRA network for FLUX."""

OPTIONS = {
    "split_qkv": Departure(
        "with split_qkv=True in ss_network_args of sd-scripts' networks.lora_flux, a LoRA's scaling is 3 alpha / r "
        "on a double block's qkv, and 4 alpha / r on a single block's linear1: their parts were trained separately",
        "the scaling is alpha / r",
    ),
    "bypass_mode": Departure(
        "with bypass_mode in ss_network_args of a LyCORIS network, OFT, BOFT and IA3 of outputs also change the bias, "
        "and a dora_scale has no effect",
        "they change only the weight, and a dora_scale is DoRA's magnitude",
    ),
    "rs_lora": Departure(
        "with rs_lora in ss_network_args of a LyCORIS network, GLoRA's scaling is alpha / sqrt(r), and that of a "
        "LoKr with two full factors is the cube root of alpha, which is sqrt(r)",
        "GLoRA's scaling is alpha / r, and the scaling of a LoKr with two full factors is 1",
    ),
    "dylora": Departure(
        "with algo=dylora in ss_network_args of a LyCORIS network, the scaling of all ranks together is "
        "alpha / (r / block_size)",
        "the scaling is alpha / r",
    ),
}
"""Options with which the forward of LyCORIS or sd-scripts computes another function than the tensors alone suggest."""


@dataclass(frozen=True, slots=True)
class Arguments:
    """The network options with which an adapter was trained.

    Attributes:
        bypass: whether modules changed the layer's output, including the bias; then DoRA's magnitudes had no effect.
        rs: whether scalings are alpha / sqrt(r).
        unit: the number by which a LoRA's alpha / r is multiplied; 0 means 1. For DyLoRA, it is the number of ranks
            that are trained together.
        split: whether sd-scripts trained the parts of FLUX's fused weights separately, each with rank r, and saved
            them as one LoRA.
    """

    bypass: bool = False
    rs: bool = False
    unit: int = 0
    split: bool = False

    def at(self, stem: str) -> Arguments:
        """Return the options for one module, given the module's name in the keys."""
        if not self.split:
            return self
        fused = {"qkv": 3 if "double" in stem else 0, "linear1": 4 if "single" in stem else 0}
        return replace(self, unit=next((parts for word, parts in fused.items() if word in stem), 0))


def arguments_in(metadata: Mapping[str, str]) -> Arguments:
    """Return the options in a header; the defaults if the header is from another network or has no such options."""
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


def _is_on(given: Mapping[str, object], name: str) -> bool:
    return name in given and str(given[name]).lower() != "false"


def _unit(given: Mapping[str, object]) -> int:
    text = str(given.get("block_size") or 4)
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 10 else 4
