"""IA3: `ia3_l` scales outputs, [out, 1], or inputs in `feedforward_modules`, [1, in]; on convolutions [1, n, 1]."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...errors import ShapeMismatch
from .file import File, Findings, Found, Key, make
from .patterns import matches, unwrapped
from .settings import Settings

if TYPE_CHECKING:
    from ...io.lazy import Shape

PART = "ia3_l"


def decode(file: File) -> Findings:
    """Yield all IA3 updates in a file.

    Raises:
        ShapeMismatch: a vector does not have the shape that the config implies.
    """
    for slots in file.groups({PART}).values():
        if (PART, "") not in slots:
            continue
        key = slots[PART, ""]
        tensor = file.tensors[key]
        inputs = _scales_inputs(file.settings, key, tensor.shape)
        vector = tensor.reshape(max(tensor.shape))
        field = "l_in" if inputs else "l"
        turned = file.settings.fan_in_fan_out and len(tensor.shape) == 2
        yield Found(key.path, make("ia3", {field: vector}), {field: key}, "in out *k" if turned else "out *in")


def _scales_inputs(settings: Settings, key: Key, shape: Shape) -> bool:
    named = feedforward(settings, key.path)
    inputs = shape[:1] == (1,) if named is None else named
    fits = len(shape) > 1 and sum(size != 1 for size in shape) <= 1
    if not fits or (shape[1 if not inputs and len(shape) == 2 else 0] != 1):
        kind = "inputs, [1, in]" if inputs else "outputs, [out, 1]"
        why = f"the shape is {list(shape)}, but by feedforward_modules it scales {kind}"
        raise ShapeMismatch(why, where=key.text, cure="The config does not belong to this file")
    return inputs


def feedforward(settings: Settings, path: str) -> bool | None:
    """Whether a module's inputs are scaled; names match by endings, as in PEFT. None if the config has no list."""
    named = settings.feedforward_modules
    if named is None:
        return None
    path = unwrapped(path)
    return matches(named, path, whole=True) if isinstance(named, str) else path.endswith(tuple(named))
