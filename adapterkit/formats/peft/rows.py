"""Decode trainable tokens: despite its name, `trainable_tokens_delta` has complete new rows; the config has numbers."""

from __future__ import annotations

from ...errors import Malformed, ShapeMismatch
from ...io.lazy import DTYPES, Lazy
from .file import File, Findings, Found, Kept, make
from .settings import Settings

PART = "trainable_tokens_delta"
ORIGINAL = "trainable_tokens_original"
"""The part of keys for a copy of the base's rows."""


def decode(file: File) -> Findings:
    """Yield all token rows in a file.

    Raises:
        Malformed: the config has no token numbers for the rows.
        ShapeMismatch: the number of token numbers and of rows differ.
    """
    yield from (Kept(key) for key in file.tensors if key.part == ORIGINAL)
    keys = [slots[PART, ""] for slots in file.groups({PART}).values() if (PART, "") in slots]
    for key in keys:
        index, values = _index(file.settings, key.path), file.tensors[key]
        if index is None:
            raise Malformed("the config has no token numbers for these rows", where=key.text, cure=_AGAIN)
        if values.shape[:1] != (len(index),) or len(values.shape) != 2:
            why = f"the shape {list(values.shape)} is not that of rows for {len(index)} tokens"
            raise ShapeMismatch(why, where=key.text, cure="The config does not belong to this file")
        update = make("rows", {"index": integers(index), "values": values})
        yield Found(key.path, update, {"values": key}, "in out *k")


def integers(values: list[int]) -> Lazy:
    """Return integers as an int64 tensor."""
    return Lazy((len(values),), DTYPES["I64"], lambda: b"".join(value.to_bytes(8, "little") for value in values))


def _index(settings: Settings, path: str) -> list[int] | None:
    """Return the token numbers for the rows of a module; None if the config does not state them."""
    if settings.peft_type == "TRAINABLE_TOKENS":
        return settings.token_indices
    named = settings.trainable_token_indices
    if not isinstance(named, dict):
        # PEFT uses one list for the input embeddings and for every layer tied to them.
        return named
    fitting = [name for name in named if path.endswith(name)]
    exact = [name for name in fitting if name == path]
    if not fitting and len(named) == 1:
        # Use the only entry for a head that is tied to the embedding, because the head has no entry.
        return next(iter(named.values()))
    return named[(exact or fitting)[0]] if len(exact or fitting) == 1 else None


_AGAIN = "Save the adapter again with PEFT"
