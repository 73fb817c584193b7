"""Decode updates that are not pairs and belong to no family: whole parameters, IA3, token rows, layer norms.

Whole parameters have the base's names as keys: `modules_to_save`, trained biases, embeddings.

PEFT loads every tensor whose key is a parameter's name into the model, so each such tensor replaces a parameter. PEFT
also saves a copy of an adapted embedding next to its factors. The copy is a replacement, too, and is applied before the
factors.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING

from ...errors import Malformed, ShapeMismatch, Unsupported
from ...io.lazy import DTYPES, Lazy
from .file import File, Findings, Found, Kept, Key, make
from .patterns import matches, unwrapped
from .settings import Settings

if TYPE_CHECKING:
    from ...io.lazy import Shape


def decode_replacement(file: File) -> Findings:
    """Yield the parameters that the file stores whole, not as factors.

    Tensors of integers or booleans were not trained. They are kept for writing, but change nothing.

    Raises:
        Unsupported: a parameter is a scalar.
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
    """Yield the keys of copies of a module that PEFT ignores when it loads the file.

    With `save_embedding_layers`, PEFT 0.21.2 saves a module of `modules_to_save` three times: as `NAME.weight`,
    `NAME.modules_to_save.weight` and `NAME.original_module.weight`. When PEFT loads the file, it uses only the first.
    """
    plain = {key.path for key in file.tensors if not key.part and not key.copy}
    trained = {key.path for key in file.tensors if key.copy == "modules_to_save"}
    for key in file.tensors:
        if key.copy and key.path in (plain if key.copy == "modules_to_save" else plain | trained):
            yield key


def replaced(file: File, path: str, keys: Mapping[str, Key]) -> Found:
    """Create the update of a module's parameters.

    The layout is [in, out] only if the bias fits the weight's second axis.
    """
    tensors = {field: file.tensors[key] for field, key in keys.items()}
    shape, sizes = (tensors[field].shape if field in tensors else () for field in ("weight", "bias"))
    turned = len(shape) > 1 and len(sizes) == 1 and sizes[0] == shape[1] != shape[0]
    return Found(path, make("replacement", tensors), keys, "in out *k" if turned else "out *in")


def place(name: str, axes: int, attentions: Collection[str]) -> tuple[str, str]:
    """Return (target, field) for a parameter: the module and `weight` or `bias`, or else the parameter and `weight`."""
    if not axes:
        raise Unsupported(
            "a single number cannot be replaced", where=name, cure="Remove the parameter from modules_to_save"
        )
    module, _, field = name.rpartition(".")
    if module and (field == "weight" or (field == "bias" and axes == 1)):
        return module, field
    if field == "in_proj_bias" and module in attentions:
        return f"{module}.in_proj_weight", "bias"
    return name, "weight"


# IA3: `ia3_l` scales outputs, [out, 1], or the inputs of `feedforward_modules`, [1, in]; on convolutions, [1, n, 1].


IA3_PART = "ia3_l"


def decode_ia3(file: File) -> Findings:
    """Yield all IA3 updates in a file.

    Raises:
        ShapeMismatch: a vector does not have the shape that the config implies.
    """
    for slots in file.groups({IA3_PART}).values():
        if (IA3_PART, "") not in slots:
            continue
        key = slots[IA3_PART, ""]
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
        why = f"the shape is {list(shape)}, but feedforward_modules requires a scale of {kind}"
        raise ShapeMismatch(why, where=key.text, cure="The config does not belong to this file")
    return inputs


def feedforward(settings: Settings, path: str) -> bool | None:
    """Whether IA3 scales a module's inputs; names match by their ends, as in PEFT. None if the config has no list."""
    named = settings.feedforward_modules
    if named is None:
        return None
    path = unwrapped(path)
    return matches(named, path, whole=True) if isinstance(named, str) else path.endswith(tuple(named))


# Decode trainable tokens. Despite its name, `trainable_tokens_delta` has whole new rows. The config has the token ids.


TOKENS_PART = "trainable_tokens_delta"
ORIGINAL = "trainable_tokens_original"
"""The part of keys for a copy of the base's original rows."""


def decode_rows(file: File) -> Findings:
    """Yield the token rows in a file.

    Raises:
        Malformed: the config has no token ids for the rows.
        ShapeMismatch: the number of token ids is not the number of rows.
    """
    yield from (Kept(key) for key in file.tensors if key.part == ORIGINAL)
    keys = [slots[TOKENS_PART, ""] for slots in file.groups({TOKENS_PART}).values() if (TOKENS_PART, "") in slots]
    for key in keys:
        index, values = _index(file.settings, key.path), file.tensors[key]
        if index is None:
            raise Malformed("the config has no token ids for these rows", where=key.text, cure=_AGAIN)
        if values.shape[:1] != (len(index),) or len(values.shape) != 2:
            why = f"the shape {list(values.shape)} is not that of rows for {len(index)} tokens"
            raise ShapeMismatch(why, where=key.text, cure="The config does not belong to this file")
        update = make("rows", {"index": integers(index), "values": values})
        yield Found(key.path, update, {"values": key}, "in out *k")


def integers(values: list[int]) -> Lazy:
    """Return integers as an int64 tensor."""
    return Lazy((len(values),), DTYPES["I64"], lambda: b"".join(value.to_bytes(8, "little") for value in values))


def _index(settings: Settings, path: str) -> list[int] | None:
    """Return the ids of the tokens whose rows a module has; None if the config does not have them."""
    if settings.peft_type == "TRAINABLE_TOKENS":
        return settings.token_indices
    named = settings.trainable_token_indices
    if not isinstance(named, dict):
        # PEFT uses one list of ids for the input embeddings and for all layers that are tied to them.
        return named
    fitting = [name for name in named if path.endswith(name)]
    exact = [name for name in fitting if name == path]
    if not fitting and len(named) == 1:
        # A head that is tied to the embedding has no entry, so use the only entry.
        return next(iter(named.values()))
    return named[(exact or fitting)[0]] if len(exact or fitting) == 1 else None


_AGAIN = "Save the adapter again with PEFT"


# LN tuning: a trained copy of a module, `<m>.ln_tuning_layers.<parameter>`, replaces the module.
# PEFT uses the copy instead of the module, so every floating-point parameter and buffer of the copy is a replacement.


NORM_PART = "ln_tuning_layers"


def decode_ln_tuning(file: File) -> Findings:
    """Yield the trained copies in a file.

    Tensors of integers or booleans were not trained. They are kept for writing, but change nothing.

    Raises:
        Unsupported: a parameter is a scalar.
    """
    modules: dict[str, dict[str, Key]] = {}
    for key, tensor in file.tensors.items():
        if not key.part.startswith(NORM_PART):
            continue
        if not tensor.dtype.floating:
            yield Kept(key)
            continue
        path, field = place(_norm_name(key), len(tensor.shape), ())
        modules.setdefault(path, {})[field] = key
    yield from (replaced(file, path, keys) for path, keys in modules.items())


def norm_spelled(name: str) -> str:
    """Return the key of the trained copy of a parameter, given the parameter's name in the base."""
    module, _, parameter = name.rpartition(".")
    return f"{module}.{NORM_PART}.{parameter}"


def _norm_name(key: Key) -> str:
    """Return the path of the parameter that a key names.

    The parser of keys mistakes the name of a child module for an adapter's name. This function undoes the mistake.
    """
    inside = [key.adapter or "", key.part.removeprefix(NORM_PART).removeprefix("."), key.leaf]
    words = [part for part in inside if part]
    if len(words) > 2 and words[0] == "default":  # PEFT leaves the adapter's name in the keys of children. Remove it.
        del words[0]
    return ".".join([key.path, *words])
