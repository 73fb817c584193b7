"""Computes the expected merged weights in float64, from PEFT's files and the formulas of the papers.

    LoRA      W + s B A                         Hu et al. 2021, arXiv:2106.09685
    rsLoRA    s = alpha / sqrt(r)               Kalajdzievski 2023, arXiv:2312.03732
    DoRA      m * V / |V|, V = W + s B A        Liu et al. 2024, arXiv:2402.09353; |V| is the norm of a row
    IA3       l * W                             Liu et al. 2022, arXiv:2205.05638; l scales rows, or columns at an input
    saved     the module's own trained weight   PEFT's `modules_to_save`

This file does not use adapterkit, because adapterkit is compared with it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

PREFIX = "base_model.model."
PARAMETER = re.compile(r"\.(?:lora_A\.weight|lora_B\.weight|lora_magnitude_vector|ia3_l)$")
LIMIT = 0.501
"""Units in the last place that a merged weight may be away from the exact one."""

Formula = Callable[[Tensor], Tensor]


def read_formulas(adapter: Path) -> dict[str, Formula]:
    """For every weight of the base that the PEFT folder `adapter` changes: float64 weight in, float64 merged out.

    Raises:
        ValueError: the adapter holds something that the table above has no line for.
    """
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    grouped: dict[str, dict[str, Tensor]] = {}
    for key, tensor in load_file(adapter / "adapter_model.safetensors").items():
        name = key.removeprefix(PREFIX)
        found = PARAMETER.search(name)
        target = name[: found.start()] + ".weight" if found else name
        grouped.setdefault(target, {})[found.group()[1:] if found else "saved"] = tensor.double()
    return {target: formula(target, parts, config) for target, parts in grouped.items()}


def formula(target: str, parts: Mapping[str, Tensor], config: Mapping[str, Any]) -> Formula:
    """The line of the table that fits the tensors `parts` found for `target`."""
    match sorted(parts):
        case ["lora_A.weight", "lora_B.weight"]:
            change = low_rank(target, parts, config)
            return lambda W: W + change()
        case ["lora_A.weight", "lora_B.weight", "lora_magnitude_vector"]:
            change = low_rank(target, parts, config)
            return lambda W: with_row_norms(W + change(), parts["lora_magnitude_vector"])
        case ["ia3_l"]:
            return lambda W: W * parts["ia3_l"]
        case ["saved"]:
            return lambda _: parts["saved"]
        case names:
            raise ValueError(f"{target}: no formula for {names}")


def low_rank(target: str, parts: Mapping[str, Tensor], config: Mapping[str, Any]) -> Callable[[], Tensor]:
    """s B A, formed only when asked for: dense changes of a whole model would not fit."""
    A, B = parts["lora_A.weight"], parts["lora_B.weight"]
    s = scaling(target.removesuffix(".weight"), A.shape[0], config)
    return lambda: s * (B @ A)


def scaling(module: str, rank: int, config: Mapping[str, Any]) -> float:
    """s of `module`; of the patterns that fit the end of its path, the first in the file gives its alpha."""
    patterns = config["alpha_pattern"].items()
    fits = (alpha for pattern, alpha in patterns if re.fullmatch(rf"(?:.*\.)?(?:{pattern})", module))
    alpha = float(next(fits, config["lora_alpha"]))
    return alpha / math.sqrt(rank) if config["use_rslora"] else alpha / rank


def with_row_norms(V: Tensor, norms: Tensor) -> Tensor:
    """V [out, in] with every row scaled to the length `norms` [out] gives it."""
    lengths: Tensor = torch.linalg.vector_norm(V, dim=1)
    return V * (norms / lengths)[:, None]


def ulp_error(got: Tensor, want: Tensor) -> Tensor:
    """|got - want| in units in the last place of got's dtype at the magnitude of `want` (float64), each element."""
    info = torch.finfo(got.dtype)
    # frexp's mantissa is in [0.5, 1): its exponent is one more than that of the leading bit.
    exponent = torch.frexp(want).exponent - 1
    exponent = exponent.masked_fill_(want == 0, -(1 << 20)).clamp_(min=round(math.log2(info.smallest_normal)))
    ulp = torch.ldexp(torch.ones_like(want), exponent).mul_(info.eps)
    return (got.double() - want).abs_().div_(ulp)


@dataclass(slots=True)
class Rounding:
    """Rounding errors of many elements, in units in the last place.

    Attributes:
        elements: how many were compared.
        worst: the largest error.
        over_half: how many are beyond 0.5, so not the nearest value.
        over_limit: how many are beyond `LIMIT`.
        where: the tensor that holds the largest.
    """

    elements: int = 0
    worst: float = 0.0
    over_half: int = 0
    over_limit: int = 0
    where: str = ""

    def add(self, name: str, got: Tensor, want: Tensor, rows: int = 1024) -> None:
        """Counts in one tensor, a block of rows at a time."""
        for a, b in zip(got.split(rows), want.split(rows), strict=True):
            error = ulp_error(a, b).nan_to_num_(nan=math.inf)
            largest = float(error.max())
            self.elements += error.numel()
            self.over_half += int((error > 0.5).sum())
            self.over_limit += int((error > LIMIT).sum())
            if largest > self.worst:
                self.worst, self.where = largest, name
