"""Reads `.onnx_adapter` files, and runs a language model step by step, without adapterkit; see check_runtimes.py.

Other environments import this file, which needs only numpy.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

Arrays = dict[str, Any]


def read_adapter(path: str | Path) -> Arrays:
    """Return the float32 tensors of an adapter file of onnxruntime, a flatbuffer, by name."""
    data = Path(path).read_bytes()

    def number(kind: str, at: int) -> int:
        found: int = struct.unpack_from(f"<{kind}", data, at)[0]
        return found

    def field(table: int, position: int) -> int:
        return table + number("H", table - number("i", table) + 4 + 2 * position)

    def follow(at: int) -> int:
        return at + number("I", at)

    if data[4:8] != b"TORT":
        raise ValueError(f"{path} is not an adapter file")
    listed, found = follow(field(follow(0), 3)), {}
    for position in range(number("I", listed)):
        table = follow(listed + 4 + 4 * position)
        name, sizes, numbers = (follow(field(table, at)) for at in (0, 1, 3))
        if number("i", field(table, 2)) != 1:
            raise ValueError(f"{path} has other numbers than float32")
        shape = struct.unpack_from(f"<{number('I', sizes)}q", data, sizes + 4)
        array = np.frombuffer(data, "<f4", number("I", numbers) // 4, numbers + 4)
        found[data[name + 4 : name + 4 + number("I", name)].decode()] = array.reshape(shape).copy()
    return found


def logits_of(run: Callable[[Arrays], Mapping[str, Any]], case: Mapping[str, Any], held: Arrays) -> list[float]:
    """Return the logits of all tokens of a case; each step reads the keys and values of the steps before.

    Args:
        run: runs the model.
        case: the tokens of each step (`steps`), and the names and sizes of cached keys and values.
        held: the adapter's tensors.
    """
    past = {name: np.zeros((1, case["heads"], 0, case["size"]), "f4") for name in case["past"]}
    seen, told = 0, list[float]()
    for tokens in case["steps"]:
        stop = seen + len(tokens)
        feeds = {
            "input_ids": np.array([tokens]), "attention_mask": np.ones((1, stop), "i8"),
            "position_ids": np.arange(seen, stop)[None],
        }  # fmt: skip
        found, seen = run({**held, **past, **feeds}), stop
        told += np.asarray(found["logits"]).ravel().tolist()
        past = {name: np.array(found[name.replace("past_key_values", "present")]) for name in past}
    return told
