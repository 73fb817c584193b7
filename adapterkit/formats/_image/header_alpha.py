"""One alpha for all modules in a file's header, as some families' trainers write it."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

from ...io.lazy import DTYPES, Lazy
from ...naming.image import families_with, rooted

if TYPE_CHECKING:
    from .container import Metadata
    from .dialect import ImageFormat

ALPHA = "alpha"
"""The key, beside the slot of the same name."""

CONFIG = "lora_adapter_metadata"
"""diffusers' config in the header, which says every scaling itself."""


def with_alphas(
    dialect: ImageFormat, tensors: Mapping[str, Lazy], metadata: Metadata
) -> tuple[dict[str, Lazy], Metadata]:
    """Return the tensors with the header's alpha at each LoRA, and the metadata without it.

    Most loaders leave such an alpha out of account; only a family whose `header_alpha` is true has it. Alphas among the
    tensors, or a config, say more than the header and are kept alone.
    """
    value = _number(dict(metadata).get(ALPHA, ""))
    parsed = [key for key in map(dialect.parse, tensors) if key is not None] if value else []
    if not parsed or CONFIG in dict(metadata) or any(key.slot == ALPHA for key in parsed):
        return dict(tensors), metadata
    stems = dict.fromkeys(key.stem for key in parsed if key.slot == "down")
    if not _counts({rooted(stem)[1] for stem in stems}):
        return dict(tensors), metadata
    alpha = Lazy((), DTYPES["F32"], lambda: _bytes(value))
    added = {dialect.spell(stem, ALPHA): alpha for stem in stems}
    return {**tensors, **added}, [(key, text) for key, text in metadata if key != ALPHA]


def _counts(names: Collection[str]) -> bool:
    """Whether all families that have all of these modules take an alpha from the header."""
    fitting = families_with(names)
    return bool(fitting) and all(family.facts.header_alpha for family in fitting)


def _number(text: str) -> float:
    """The number in a text; 0 where there is none."""
    try:
        value = float(text)
    except ValueError:
        return 0.0
    return value if math.isfinite(value) and abs(value) < 1e30 else 0.0


def _bytes(value: float) -> bytes:
    import numpy as np

    return np.array(value, "<f4").tobytes()
