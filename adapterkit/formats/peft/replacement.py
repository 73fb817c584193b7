"""Decode parameters that are stored whole under the base's names: `modules_to_save`, trained biases, embeddings.

PEFT loads each tensor with the name of a parameter into the model, so each such tensor is a replacement. PEFT also
saves a copy of an adapted embedding next to its factors; the copy is a replacement, too, and is applied before them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

from ...errors import Unsupported
from .file import File, Findings, Found, Kept, Key, make


def decode(file: File) -> Findings:
    """Yield all whole parameters in a file; tensors without floating-point values were not trained, and are only kept.

    Raises:
        Unsupported: a parameter is a single number.
    """
    whole = {key for key, tensor in file.tensors.items() if not key.part and not tensor.dtype.floating}
    whole |= set(_unread(file))
    packed = tuple(f"{key.text}." for key in whole)
    attentions = file.attentions()
    modules: dict[str, dict[str, Key]] = {}
    for key, tensor in file.tensors.items():
        if key in whole or (not key.part and key.text.startswith(packed)):
            yield Kept(key)
        elif not key.part:
            path, field = place(key.path, len(tensor.shape), attentions)
            modules.setdefault(path, {})[field] = key
    for path, keys in modules.items():
        yield replaced(file, path, keys)


def _unread(file: File) -> Iterator[Key]:
    """Yield the copies of a module that PEFT ignores when it loads the file.

    With `save_embedding_layers` PEFT 0.21.2 saves a module of `modules_to_save` three times: as `NAME.weight`,
    `NAME.modules_to_save.weight` and `NAME.original_module.weight`. It loads the trained module from the first.
    """
    plain = {key.path for key in file.tensors if not key.part and not key.copy}
    trained = {key.path for key in file.tensors if key.copy == "modules_to_save"}
    for key in file.tensors:
        if key.copy and key.path in (plain if key.copy == "modules_to_save" else plain | trained):
            yield key


def replaced(file: File, path: str, keys: Mapping[str, Key]) -> Found:
    """Create the update of a module's parameters; its layout is [in, out] only if the bias fits the second axis."""
    tensors = {field: file.tensors[key] for field, key in keys.items()}
    shape, sizes = (tensors[field].shape if field in tensors else () for field in ("weight", "bias"))
    turned = len(shape) > 1 and len(sizes) == 1 and sizes[0] == shape[1] != shape[0]
    return Found(path, make("replacement", tensors), keys, "in out *k" if turned else "out *in")


def place(name: str, axes: int, attentions: Collection[str]) -> tuple[str, str]:
    """Return (target, field) of a parameter; for a weight or bias, these are the module and its field."""
    if not axes:
        raise Unsupported("a single number cannot be replaced", where=name, cure="Remove it from modules_to_save")
    module, _, field = name.rpartition(".")
    if module and (field == "weight" or (field == "bias" and axes == 1)):
        return module, field
    if field == "in_proj_bias" and module in attentions:
        return f"{module}.in_proj_weight", "bias"
    return name, "weight"
