"""LN tuning: a trained copy of each module, `<m>.ln_tuning_layers.<parameter>`, which replaces the module.

PEFT replaces the module with its copy, so every floating-point parameter and buffer in the copy is a replacement.
"""

from __future__ import annotations

from .file import File, Findings, Kept, Key
from .replacement import place, replaced

PART = "ln_tuning_layers"


def decode(file: File) -> Findings:
    """Yield all copies in a file; tensors with other dtypes were not trained, and are only kept.

    Raises:
        Unsupported: a parameter is a single number.
    """
    modules: dict[str, dict[str, Key]] = {}
    for key, tensor in file.tensors.items():
        if not key.part.startswith(PART):
            continue
        if not tensor.dtype.floating:
            yield Kept(key)
            continue
        path, field = place(_name(key), len(tensor.shape), ())
        modules.setdefault(path, {})[field] = key
    yield from (replaced(file, path, keys) for path, keys in modules.items())


def spelled(name: str) -> str:
    """Return the key of a parameter of the base, without the file's prefix."""
    module, _, parameter = name.rpartition(".")
    return f"{module}.{PART}.{parameter}"


def _name(key: Key) -> str:
    """Return the base's parameter of a key, in which a child module has the place of an adapter's name."""
    inside = [key.adapter or "", key.part.removeprefix(PART).removeprefix("."), key.leaf]
    words = [part for part in inside if part]
    if len(words) > 2 and words[0] == "default":  # PEFT keeps its adapter name in the keys of children; remove it.
        del words[0]
    return ".".join([key.path, *words])
