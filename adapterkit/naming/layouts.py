"""List the weights that a base stores as [in, out], by the `model_type` of its config.

The list is needed for square weights, whose shape does not show the layout. Sources: `Conv1D` in transformers'
modelling files of these families; for experts stored as `[expert, in, out]`, the entries with `transposed` in
spec/architectures.
"""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from functools import cache

from .architectures import HOLE, Architecture, architecture_of, shape_of

_CONV1D = ("*.c_attn", "*.c_proj", "*.c_fc", "*.q_attn")

IN_OUT = {
    "gpt2": _CONV1D,
    "openai-gpt": _CONV1D,
    "imagegpt": _CONV1D,
    "decision_transformer": _CONV1D,
    "clvp": ("*.mlp.c_fc", "*.mlp.c_proj"),
    "clvp_decoder": _CONV1D,
}
"""For each model_type, globs of the targets that are stored as [in, out]."""


def stored_in_out(path: str, config: Mapping[str, object] | None) -> bool | None:
    """Whether the base stores this target as [in, out]; None if the family is not in the list."""
    globs = IN_OUT.get(str((config or {}).get("model_type")))
    if globs is not None:
        return any(fnmatchcase(path, glob) for glob in globs)
    family = architecture_of(config)
    ends = () if family is None else _transposed(family)
    return any(shape_of(path).endswith(end) for end in ends) if ends else None


@cache
def _transposed(family: Architecture) -> tuple[str, ...]:
    """Return the names of a family's tensors with `transposed`, shortened to the part after the layer's number."""
    places = (family.place(weight, naming) for weight in family.record.weights for naming in ("hub", "transformers5"))
    names = (shape_of(HOLE.sub("0", place.name)) for place in places if place is not None and place.transposed)
    return tuple(dict.fromkeys(name[name.rfind("#") :] for name in names))
