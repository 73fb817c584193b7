"""Mutations of nested values (JSON, YAML, plain Python literals) and of the text that they are written as."""

from __future__ import annotations

import json
import math
import re
import sys
from random import Random
from typing import Any


class Pairs(list[tuple[str, Any]]):
    """An object as a list of pairs, since a file may hold a key twice."""


NUMBERS = (
    0, 1, -1, 2, 3, 7, 8, 16, 255, 2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**63 - 1, 2**63, 2**64, -(2**63), 10**18,
    10**400, 0.0, -0.0, 0.5, 1.0, 1.5, -1.5, 1e-320, 1e308, 3.0, 1e16, math.inf, -math.inf, math.nan,
)  # fmt: skip
TEXTS = (
    "", " ", ".", "..", "/", "a", "0", "-1", "1e999", "None", "null", "true", "nan", "all", "all-linear", "none",
    "../../../etc/passwd", "/etc/passwd", "C:\\x", "file:///etc/passwd", "hf://a/b", "x\0y", "\ud800", "é",
    "\u202e", "\x1b[31m", "a" * 300, "A" * 70_000, "9" * 5000, "0x" + "f" * 5000, "1" * 400, "[", "(", "*", ".*",
    "(a+)+$", "((\\w|\\.)+)+Q", "a{1000}{1000}", "\\", "(?P<x>", "(?<=a+)", "model.layers.0.self_attn.q_proj",
    "lora_A", "default", "LORA", "lora", "__class__", "{0}", "%s", "torch.float99", "F32", "BF16", "U8",
)  # fmt: skip


def load(text: str) -> Any:
    """A JSON value with its objects as `Pairs`."""
    return json.loads(text, object_pairs_hook=Pairs)


def dump(value: Any) -> str:
    """JSON text of any value, also of what JSON lacks: repeated keys, NaN, integers of 5000 digits, lone surrogates."""
    if isinstance(value, Pairs):
        return "{" + ", ".join(f"{json.dumps(str(key))}: {dump(inner)}" for key, inner in value) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(dump, value)) + "]"
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > 10**100:
        return _digits(value)
    return json.dumps(value)


def _digits(value: int) -> str:
    """Decimal digits past Python's own limit, for powers of ten."""
    power = round(math.log10(abs(value)))
    return ("-" if value < 0 else "") + "1" + "0" * power


def mutate(value: Any, rng: Random) -> Any:
    """A copy with one change somewhere."""
    places = list(_places(value, ()))
    # Few changes at the root: most readers refuse those at once.
    place = rng.choice(places[1:] or places) if rng.random() > 0.02 else ()
    return _changed(value, place, rng, value)


def _places(value: Any, at: tuple[int, ...]) -> Any:
    yield at
    for index, inner in enumerate(value if isinstance(value, list) else ()):
        yield from _places(inner[1] if isinstance(value, Pairs) else inner, (*at, index))


def _changed(value: Any, place: tuple[int, ...], rng: Random, root: Any) -> Any:
    if not place:
        return _other(value, rng, root)
    index, rest = place[0], place[1:]
    copy = Pairs(value) if isinstance(value, Pairs) else list(value)
    if rest or rng.random() < 0.6:
        own = copy[index]
        copy[index] = (
            (own[0], _changed(own[1], rest, rng, root)) if isinstance(copy, Pairs) else _changed(own, rest, rng, root)
        )
        return copy
    return _rearranged(copy, index, rng, root)


def _rearranged(copy: Any, index: int, rng: Random, root: Any) -> Any:
    """One entry of a list or an object removed, repeated, moved or renamed."""
    how = rng.randrange(5)
    if how == 0:
        del copy[index]
    elif how == 1:
        copy.insert(rng.randrange(len(copy) + 1), copy[index])
    elif how == 2:
        other = rng.randrange(len(copy))
        if isinstance(copy, Pairs):
            copy[index], copy[other] = (copy[index][0], copy[other][1]), (copy[other][0], copy[index][1])
        else:
            copy[index], copy[other] = copy[other], copy[index]
    elif isinstance(copy, Pairs):
        copy[index] = (text(copy[index][0], rng, root), copy[index][1])
    else:
        copy.extend([copy[index]] * rng.choice((1, 2, 70)))
    return copy


def _as_float(value: int) -> float:
    """The number as a float; the largest one where it is beyond all of them."""
    return float(value) if abs(value) < 2**1023 else sys.float_info.max * (1 if value > 0 else -1)


def _other(value: Any, rng: Random, root: Any) -> Any:
    """Another value in the place of one: near it, of another type, or from elsewhere in the same tree."""
    how = rng.randrange(10)
    if how < 5:
        if isinstance(value, bool) or value is None:
            return rng.choice((True, False, None, 0, 1, "true", 2, []))
        if isinstance(value, int):
            return rng.choice(
                (value + 1, value - 1, -value, value * 2, _as_float(value), str(value), 0, 1, rng.choice(NUMBERS))
            )
        if isinstance(value, float):
            whole = int(value) if math.isfinite(value) else 0  # A mutation before this one may have made it infinite.
            return rng.choice((whole, -value, value * 1e300, 0.0, str(value), rng.choice(NUMBERS)))
        if isinstance(value, str):
            return text(value, rng, root)
    if how == 5:
        return rng.choice(NUMBERS)
    if how == 6:
        return rng.choice(TEXTS)
    if how == 7:
        return rng.choice(
            (None, True, [], Pairs(), [None], [[]], Pairs([("", None)]), [value], Pairs([("a", value)]), _deep(rng))
        )
    return rng.choice(_leaves(root) or [0])


def _deep(rng: Random) -> Any:
    value: Any = 0
    for _ in range(rng.choice((20, 70, 990))):
        value = [value]
    return value


def _leaves(root: Any) -> list[Any]:
    if isinstance(root, Pairs):
        return [leaf for _, inner in root for leaf in _leaves(inner)]
    if isinstance(root, list):
        return [leaf for inner in root for leaf in _leaves(inner)]
    return [root]


def text(value: str, rng: Random, root: Any = None) -> str:
    """A text near another: cut, doubled, one letter changed, another one of the tree, or a hostile one."""
    how = rng.randrange(9)
    at = rng.randrange(len(value) + 1)
    if how == 0:
        return value[:at]
    if how == 1:
        return value[at:]
    if how == 2:
        return value[:at] + rng.choice((".", "_", "0", "9", "-", "/", "A", "\0", "é", " ", "..")) + value[at:]
    if how == 3:
        return value[:at] + value[at + 1 :]
    if how == 4:
        return re.sub(r"\d+", lambda _: str(rng.choice(NUMBERS[:14])), value, count=1)
    if how == 5:
        names = sorted(_names(root))
        return rng.choice(names) if names else value + value
    if how == 6:
        return value.swapcase()
    if how == 7:
        parts = re.split(r"([._])", value)
        parts.insert(rng.randrange(len(parts) + 1), parts[rng.randrange(len(parts))])
        return "".join(parts)
    return rng.choice(TEXTS)


def _names(root: Any) -> set[str]:
    if isinstance(root, Pairs):
        return {key for key, _ in root}.union(*(_names(inner) for _, inner in root))
    if isinstance(root, list):
        return set().union(*(_names(inner) for inner in root))
    return {root} if isinstance(root, str) else set()


def json_file(data: bytes, rng: Random) -> bytes:
    """A JSON file with one change of its value or its text."""
    if rng.random() < 0.12:
        return raw(data, rng)
    try:
        value = load(data.decode("utf-8"))
    except (ValueError, RecursionError):
        return raw(data, rng)
    return dump(mutate(value, rng)).encode("utf-8", "surrogatepass")


_YAML = (
    "&a [*a]", "!!bool 3", "!!timestamp 1", "!!int 0x", "!!float x", "!!binary ///",
    "!!python/object/apply:os.system [id]", "!!python/name:os.system", ":".join("1" * 3000), ".nan", ".inf",
    "-.inf", "0x" + "f" * 4000, "{1: a, '1': b}", "{<<: 3}", "{<<: [1]}", "{<<: {a: 1}}", "? [a]\n: b",
    "!!set {a}", "!!omap [a: 1]", "!!pairs [a: 1]", '"\\ud800"', "2020-01-01", "99999-99-99", "0o9", "1_000", "~",
    "null", "!!str", "!", "!<x>", "|", ">", "%", "@", "`", "*b", "&b", "{[a]: 1}", "{{a: 1}: 2}", "- - - -",
    "!!seq {}", "!!map []", "!!null x", "[" * 200 + "]" * 200, "=", "<<", "y", "on",
)  # fmt: skip


def yaml_file(data: bytes, rng: Random) -> bytes:
    """A YAML file with one change: a changed value, written as JSON, which YAML includes, or a hostile scalar."""
    if rng.random() < 0.3:
        try:
            import yaml

            value = load(json.dumps(yaml.safe_load(data)))
            return dump(mutate(value, rng)).encode("utf-8", "surrogatepass")
        except Exception:  # not YAML any more after an earlier change
            return raw(data, rng)
    lines = data.split(b"\n")
    at = rng.randrange(len(lines))
    key, colon, _ = lines[at].partition(b":")
    lines[at] = key + colon + b" " + rng.choice(_YAML).encode()
    if rng.random() < 0.2:
        lines.insert(at, lines[rng.randrange(len(lines))])
    return b"\n".join(lines) if rng.random() < 0.9 else raw(data, rng)


def raw(data: bytes, rng: Random, start: int = 0, stop: int | None = None) -> bytes:
    """Bytes with one change anywhere between two positions, without knowing what they mean."""
    stop = len(data) if stop is None else min(stop, len(data))
    if stop <= start:
        return rng.choice((b"", b"\0", b"{}", bytes(64)))
    at, how = rng.randrange(start, stop), rng.randrange(9)
    if how == 0:
        return data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :]
    if how == 1:
        return data[:at] + bytes([rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))]) + data[at + 1 :]
    if how in (2, 3):
        width = rng.choice((2, 4, 8))
        number = rng.choice((0, 1, 2**7, 2**15, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1, len(data)))
        return data[:at] + (number & (256**width - 1)).to_bytes(width, "little") + data[at + width :]
    if how == 4:
        return data[:at]
    if how == 5:
        return data[:at] + data[at + rng.randrange(1, 9) :]
    if how == 6:
        length = rng.randrange(1, 65)
        return data[:at] + data[at : at + length] + data[at:]
    if how == 7:
        other = rng.randrange(start, stop)
        length = rng.randrange(1, 33)
        return data[:at] + data[other : other + length] + data[at + length :]
    return data + rng.choice((b"\0", bytes(64), data[:32]))
