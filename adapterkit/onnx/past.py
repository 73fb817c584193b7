"""Find a graph's inputs of past keys and values by their names."""

from __future__ import annotations

import re
from collections.abc import Mapping

import onnx_ir as ir

_PAST = re.compile(r"(?:^|[._])(\d+)[._](key|value)s?$")


def past_inputs(graph: ir.Graph) -> Mapping[tuple[int, str], ir.Value]:
    """Return (layer, `key` or `value`) -> input."""
    found: dict[tuple[int, str], ir.Value] = {}
    for value in graph.inputs:
        told = _PAST.search(value.name or "") if "past" in (value.name or "") else None
        if told is not None:
            found[int(told[1]), told[2]] = value
    return found
