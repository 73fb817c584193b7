"""Mutations of ONNX models: by the fields that protobuf declares, and of the wire format."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random
from typing import Any

import trees

_NUMBERS = (0, 1, -1, 2, 3, 7, 16, 99, 2**31 - 1, -(2**31), 2**31, 2**62, 2**63 - 1, -(2**63))


def onnx(data: bytes, rng: Random) -> bytes:
    """A model with one change: a field set, cleared, copied, moved or given the value of another of its kind."""
    if rng.random() < 0.1:
        return trees.raw(data, rng)
    import onnx as library
    from google.protobuf.message import DecodeError

    model = library.ModelProto()
    try:
        model.ParseFromString(data)
    except DecodeError:
        return trees.raw(data, rng)
    spots = [(message, field) for message in _messages(model) for field in message.DESCRIPTOR.fields]
    # Fields that hold something are more telling than the many that do not.
    filled = [(message, field) for message, field in spots if _holds(message, field)]
    message, field = rng.choice(filled if rng.random() < 0.85 and filled else spots)
    try:
        _change(message, field, rng, sorted(_texts(model)))
        return bytes(model.SerializeToString())
    except (ValueError, TypeError, UnicodeError):
        return trees.raw(data, rng)


def _messages(message: Any) -> Iterator[Any]:
    yield message
    for field, value in message.ListFields():
        if field.type == field.TYPE_MESSAGE:
            for inner in value if _repeated(field) else [value]:
                yield from _messages(inner)


def _repeated(field: Any) -> bool:
    return bool(field.is_repeated)


def _holds(message: Any, field: Any) -> bool:
    return bool(len(getattr(message, field.name))) if _repeated(field) else bool(message.HasField(field.name))


def _texts(message: Any) -> set[str]:
    found = set()
    for each in _messages(message):
        for field, value in each.ListFields():
            if field.type == field.TYPE_STRING:
                found |= set(value) if _repeated(field) else {value}
    return found


def _change(message: Any, field: Any, rng: Random, texts: list[str]) -> None:
    if _repeated(field):
        _change_list(message, field, rng, texts)
    elif rng.random() < 0.2:
        message.ClearField(field.name)
    elif field.type == field.TYPE_MESSAGE:
        getattr(message, field.name).SetInParent()
    else:
        setattr(message, field.name, _value(getattr(message, field.name), field, rng, texts))


def _change_list(message: Any, field: Any, rng: Random, texts: list[str]) -> None:
    values = list(getattr(message, field.name))
    plain = field.type != field.TYPE_MESSAGE
    how = rng.randrange(5)
    if values and how == 0:
        values.pop(rng.randrange(len(values)))
    elif values and how == 1:
        values.insert(rng.randrange(len(values) + 1), rng.choice(values))
    elif values and how == 2:
        rng.shuffle(values)
    elif values and plain and how == 3:
        at = rng.randrange(len(values))
        values[at] = _value(values[at], field, rng, texts)
    elif plain:
        default = {"string": "", "bytes": b""}.get(_kind(field), 0)
        values.append(_value(default, field, rng, texts))
    else:
        getattr(message, field.name).add()
        return
    copies = [value if plain else type(value).FromString(value.SerializeToString()) for value in values]
    message.ClearField(field.name)
    getattr(message, field.name).extend(copies)


def _kind(field: Any) -> str:
    return {field.TYPE_STRING: "string", field.TYPE_BYTES: "bytes"}.get(field.type, "number")


def _value(old: Any, field: Any, rng: Random, texts: list[str]) -> Any:
    if _kind(field) == "string":
        new = rng.choice(texts) if texts and rng.random() < 0.5 else trees.text(old, rng)
        return new.encode("utf-8", "replace").decode()
    if _kind(field) == "bytes":
        return trees.raw(bytes(old), rng)
    if field.type in (field.TYPE_FLOAT, field.TYPE_DOUBLE):
        return rng.choice((0.0, -1.0, 1e30, float("inf"), float("nan"), -float(old)))
    if field.type == field.TYPE_ENUM:
        return rng.choice((0, 1, 2, 3, 7, 10, 11, 16, 17, 22, 99))
    number = rng.choice((*_NUMBERS, old + 1, old - 1))
    bits = 32 if field.type in (field.TYPE_INT32, field.TYPE_UINT32) else 64
    return max(-(2 ** (bits - 1)), min(number, 2 ** (bits - 1) - 1))
