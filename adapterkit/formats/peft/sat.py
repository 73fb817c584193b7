"""SwissArmyTransformer's LoRA for CogVideoX: `matrix_A.N` and `matrix_B.N` for part N of a fused weight.

SAT (sat/model/finetune/lora2.py) adapts the attention of each layer and saves the whole model. Everything except these
matrices is frozen: SAT's configs have `not_trainable_prefixes: ['all']`, and exempt LoRA's matrices by their names.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from ...errors import Unsupported, UsageError
from ...naming.image import families, rooted

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ...io.lazy import Lazy

_KEY = re.compile(r"(.+)\.matrix_([AB])\.(\d+)", re.DOTALL)
OF_FAMILY = "adapterkit.family"
"""The metadata key that states an adapter's family for writers."""

FAMILY = "cogvideox"
"""The only family whose names are known; SAT has other models, too."""


def is_sat(keys: Mapping[str, object]) -> bool:
    """Whether the keys belong to a model with SAT's LoRA."""
    return any(map(_KEY.fullmatch, keys))


def in_peft_names(tensors: Mapping[str, Lazy], alpha: float | None) -> dict[str, Lazy]:
    """Return SAT's matrices under PEFT's keys, with diffusers' names for the modules.

    Args:
        tensors: the tensors of the file by key.
        alpha: LoRA's alpha, which only the training config states.

    Raises:
        UsageError: `alpha` is None.
        Unsupported: a module is not CogVideoX's attention.
    """
    if alpha is None:
        why = "SwissArmyTransformer scales a LoRA by lora_alpha / r, but does not save lora_alpha"
        cure = "State the training config's lora_alpha with --alpha A (alpha=A); it is 1 if the config has none"
        raise UsageError(why, cure=cure)
    family = next(each for each in families() if each.name == FAMILY)
    found = {}
    for key, leaf in tensors.items():
        if (match := _KEY.fullmatch(key)) is None:
            continue
        path, part = rooted(match[1])[1], int(match[3])
        pieces = family.moves(path, "native", "diffusers") if path in family.names("native") else ()
        if part >= len(pieces):
            why = f"SwissArmyTransformer's LoRA adapts a module that {family.title} does not have"
            raise Unsupported(
                why, where=key, cure="Export it with the tool that trained it, with PEFT's or diffusers' keys"
            )
        found[f"transformer.{pieces[part].path}.lora_{match[2]}.weight"] = leaf
    return found
