"""Recognise adapters by the endings of their keys, for files whose format or module names are unknown."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from ..errors import AdapterkitError
from ..io import safetensors
from ..io.torch_file import is_torch_file, read_torch_file

if TYPE_CHECKING:
    from pathlib import Path

    from ..io.lazy import Lazy

_ENDINGS = re.compile(
    r"(.+?)\.((?:lora_(?:A|B|down|up|mid|magnitude_vector|a|b)(?:\.[\w-]+)?(?:\.weight|\.bias)?"
    r"|lora(?:_linear_layer)?\.(?:down|up)\.weight|(?:to_\w+|add_\w+)_lora\.(?:down|up)\.weight"
    r"|hada_(?:w[12]_[ab]|t[12])|lokr_(?:w[12](?:_[ab])?|t2)|oft_blocks(?:\.\d+)?|oft_R\.(?:weight|scaled_oft)|dora_scale|diff|diff_b|w_norm|b_norm"
    r"|(?:a1|a2|b1|b2|q_layer|p_layer)\.weight|lambda_layer|matrix_[AB]\.\d+))"
)
_ALPHA = re.compile(r"(.+)\.(alpha)")


def adapter_modules(path: Path) -> dict[str, dict[str, Lazy | safetensors.Entry]]:
    """Group tensors as module -> slot -> tensor if every key ends like an adapter's; otherwise return an empty dict.

    Args:
        path: a tensor file; anything else returns an empty dict.
    """
    try:
        if not path.is_file():
            return {}
        tensors: dict[str, Lazy | safetensors.Entry] = (
            dict(read_torch_file(path)) if is_torch_file(path) else dict(safetensors.read_header(path).entries)
        )
    except AdapterkitError:
        return {}
    found: dict[str, dict[str, Lazy | safetensors.Entry]] = {}
    told = False
    for key, tensor in tensors.items():
        match = _ENDINGS.fullmatch(key)
        told = told or match is not None
        match = match or _ALPHA.fullmatch(key)
        if match is None:
            return {}
        found.setdefault(match[1], {})[match[2]] = tensor
    return found if told else {}
