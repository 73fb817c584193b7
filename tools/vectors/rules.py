"""Vectors of expressions of rules (README, section 9): what each comes to, by the text and by hand."""

from __future__ import annotations

from typing import Any

AXES = {"out": 6, "in": 4, "n": 0, "p": 3, "q": 4, "long": 2**64 + 1}
ATTRIBUTES = {"side": "out", "empty": "", "flag": True, "off": False, "low": -7, "share": 2.5, "whole": 2.0}
TENSORS = {"A": 2, "w": 0}

VALUES: list[tuple[str, int | str | None]] = [
    ("out", 6),
    ("in", 4),
    ("'out'", "out"),
    ("side", "out"),
    ("unknown", None),
    # Arithmetic: whole numbers of any size, `//` rounds down, `%` has the sign of what it divides by.
    ("1 + 2 * 3", 7),
    ("(1 + 2) * 3", 9),
    ("7 - 2 - 1", 4),
    ("low // 2", -4),
    ("low % 2", 1),
    ("7 // (0 - 2)", -4),
    ("7 % (0 - 2)", -1),
    ("low // 7", -1),
    ("12 // 5 * 2", 4),
    ("out // n", None),
    ("out % n", None),
    ("n // out", 0),
    ("long * long", 340282366920938463500268095579187314689),
    ("long % 2", 1),
    ("2 ** 63", 9223372036854775808),
    ("2 ** 64", None),
    ("2 ** low", None),
    ("2 ** 3 ** 2", 512),
    ("n ** n", 1),
    ("(2 ** 63) ** 2", 2**126),
    ("2*3", 6),
    ("2  ** 2", 4),
    # Comparisons, `not`, `and` and `or` come to 1 or 0.
    ("out == 6", 1),
    ("out != 6", 0),
    ("out < 6", 0),
    ("out <= 6", 1),
    ("out > 6", 0),
    ("out >= 6", 1),
    ("not out", 0),
    ("not n", 1),
    ("not not out", 1),
    ("out and in", 1),
    ("out and n", 0),
    ("n or out", 1),
    ("n or n", 0),
    ("(out == 6) + (in == 4)", 2),
    ("not out == 5", 1),
    ("1 or n and n", 1),
    ("(1 or n) and n", 0),
    ("not n and n", 0),
    ("out + 1 == 7 and in - 1 == 3", 1),
    # Texts: equal or not, true unless empty, and nothing else.
    ("side == 'out'", 1),
    ("side != 'out'", 0),
    ("side == 'Out'", 0),
    ("not side", 0),
    ("not empty", 1),
    ("empty or 0", 0),
    ("side and 1", 1),
    ("side < 'p'", None),
    ("side >= side", None),
    ("side + 'x'", None),
    ("side * 2", None),
    ("side == 1", None),
    ("side != 1", None),
    ("1 == '1'", None),
    ("not (side == 1)", None),
    ("'1' == '1'", 1),
    # Attributes of type bool are 1 and 0, and those of type float have no value.
    ("flag", 1),
    ("off", 0),
    ("flag == 1", 1),
    ("flag + flag", 2),
    ("off == 0", 1),
    ("flag < 2", 1),
    ("flag == 'out'", None),
    ("not flag", 0),
    ("share", None),
    ("share > 2", None),
    ("whole == 2", None),
    ("not share", None),
    # Tensors.
    ("has(A)", 1),
    ("has(w)", 1),
    ("has(B)", 0),
    ("not has(B)", 1),
    ("has(A) + has(B)", 1),
    ("axes(A)", 2),
    ("axes(w)", 0),
    ("axes(A) >= 2", 1),
    ("axes(B)", None),
    ("axes(B) == 0", None),
    ("axes(B) < 3 or 1", None),
    ("has( A )", 1),
    ("not axes(B)", None),
    ("has(B) and axes(B) >= 3", 0),
    ("not has(B) or axes(B) >= 3", 1),
    # b (b - 1) / 2 = p
    ("block(p)", 3),
    ("block(n)", 1),
    ("block(q)", 0),
    ("block(low)", 0),
    ("block(side)", None),
    ("block(unknown)", None),
    ("block(long)", 0),
    ("block(flag)", 2),
    # What has no value takes all with it, but for parts behind the one that decides.
    ("unknown and 0", None),
    ("0 and unknown", 0),
    ("1 or unknown", 1),
    ("unknown or 1", None),
    ("1 and unknown", None),
    ("0 or unknown", None),
    ("not unknown", None),
    ("unknown == unknown", None),
    ("0 * unknown", None),
    ("0 and (out // n)", 0),
    ("(0 and unknown) + 1", 1),
    ("0 and unknown or 5", 1),
    ("1 or unknown and 0", 1),
]
"""Expression, and its value; None where it has none."""

HUGE: list[tuple[str, dict[str, int], int]] = [
    ("block(p)", {"p": (2**100 + 1) * 2**100 // 2}, 2**100 + 1),
    ("block(p)", {"p": (2**100 + 1) * 2**100 // 2 + 1}, 0),
    ("2 ** 63 * 2 == in", {"in": 2**64}, 1),
    ("in % 2", {"in": 2**53 + 1}, 1),
]
"""Expression, sizes of axes that no binary64 holds, and the value."""


def rules() -> list[dict[str, Any]]:
    """Expressions, what is known beside each, and their values as canonical JSON."""
    known = {"axes": AXES, "attributes": ATTRIBUTES, "tensors": TENSORS}
    each = [{"expression": text, **known, "value": _text(value)} for text, value in VALUES]
    return each + [
        {"expression": text, "axes": axes, "attributes": {}, "tensors": {}, "value": _text(value)}
        for text, axes, value in HUGE
    ]


def _text(value: int | str | None) -> str:
    return "null" if value is None else f'"{value}"' if isinstance(value, str) else str(value)
