"""The section of a report's page about a gate: the checks against limits, and the first modules that differ."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import msgspec

from ..errors import Malformed, UsageError, shown
from ..gating.result import AdapterEffect, GateCheck, KeptEffect
from ..io.inputs import read_input
from ..io.strict_json import check_size, load_json

CURE = "Pass the output of adapterkit gate ... --json: --gate FILE (gate=)"

RESULTS = {True: "holds", False: "fails", None: "cannot be told"}

MOST_MODULES = 40
"""The most modules that are shown for a model: first modules with a fault, then others, each in running order."""


class GateFigures(msgspec.Struct, frozen=True):
    """The fields of a gate's record that the page shows."""

    outcome: str
    base: str
    adapters: tuple[str, ...]
    data: str
    effect: AdapterEffect
    checks: tuple[GateCheck, ...]
    kept: tuple[KeptEffect, ...]
    verdicts: tuple[str, ...]
    seed: int = 0
    device: str = ""
    dtype: str = ""
    kind: str = ""


def gate_figures(source: Mapping[str, object] | str | os.PathLike[str]) -> GateFigures:
    """Return the figures of a gate from its result, its record, or a file with the record.

    Raises:
        Malformed: the file is not JSON, or not the record of a gate.
        StorageError: the file cannot be read.
        UsageError: `source` is something else.
    """
    path = None
    told: Any = source
    if isinstance(source, (str, os.PathLike)):
        path = Path(source)
        try:
            data = read_input(path)
            check_size(data)
            told = load_json(data.decode())
        except (ValueError, RecursionError) as error:
            raise Malformed(f"not valid JSON ({error})", path=path, cure=CURE) from None
    elif not isinstance(source, Mapping):
        why = f"{shown(source)} of type {type(source).__name__} is not the result of a gate"
        raise UsageError(why, where="gate", cure=CURE)
    kind = told.get("kind") if isinstance(told, Mapping) else None
    if kind != "gate":
        raise Malformed("not the record of a gate", path=path, where="kind", cure=CURE)
    try:
        return msgspec.convert(dict(told), GateFigures)
    except msgspec.ValidationError as error:
        raise Malformed(f"not the record of a gate ({error})", path=path, cure=CURE) from None


def gate_section(gate: GateFigures) -> str:
    """Return the content of the section, as HTML."""
    made = f"{', '.join(gate.adapters)} on {gate.base}, run on {gate.data}"
    where = ", ".join(each for each in (gate.device, gate.dtype, f"seed {gate.seed}") if each)
    parts = [f'<p class="fine"><b>{escape(gate.outcome)}</b>: {escape(made)} ({escape(where)}).</p>']
    if gate.verdicts:
        parts.append(f"<ul>{''.join(f'<li>{escape(each)}</li>' for each in gate.verdicts)}</ul>")
    checks = [(c.model, c.name, RESULTS[c.ok], c.value, c.limit, c.text) for c in gate.checks]
    parts.append(_table("Checks of the gate", ("model", "check", "result", "value", "limit", "what it says"), checks))
    parts.append(_table("Runs of the gate", ("run", "KL", "kept", "perplexity", "same greedy tokens"), _runs(gate)))
    for each in gate.kept:
        if each.why is not None:
            parts.append(f"<p>{escape(each.path)} could not be run: {escape(each.why)}</p>")
        parts += [*_modules(each), *_blocks(each)]
    return "".join(parts)


Cell = float | str | None
"""A cell of a table."""


def _runs(gate: GateFigures) -> list[tuple[Cell, ...]]:
    effect = gate.effect
    return [
        ("base", None, None, effect.perplexity_base, effect.agreement),
        ("base + adapters", effect.divergence, None, effect.perplexity, None),
        ("base + random changes", effect.null, None, None, None),
        *((f"{k.model}: {k.path}", k.divergence, k.kept, k.perplexity, k.agreement) for k in gate.kept),
    ]


def _modules(kept: KeptEffect) -> list[str]:
    found = [part for part in kept.parts if part.touched or part.fault]
    if not found:
        return []
    several = sorted(found, key=lambda part: not part.fault)[:MOST_MODULES]
    first = next((part.module for part in kept.parts if part.fault), None)
    told = f"The first wrong module is {first}." if first is not None else "No module is wrong."
    left = len(found) - len(several)
    more = f" The gate's record has {left:,} further modules." if left else ""
    rows = [
        (part.module, part.scale, part.error, part.fault or ("rounding alone" if part.rounded else ""))
        for part in several
    ]
    names = ("module", "part of the change", "error relative to it", "fault")
    return [f"<h3>Modules of {escape(kept.path)}</h3><p>{escape(told + more)}</p>", _table("Modules", names, rows)]


def _blocks(kept: KeptEffect) -> list[str]:
    if not kept.blocks:
        return []
    rows = [(each.block, each.difference, each.change) for each in kept.blocks]
    names = ("block", "difference from the base with adapters", "what the adapters change")
    return [f"<h3>Hidden states of {escape(kept.path)}</h3>", _table("Hidden states, block by block", names, rows)]


def _table(label: str, names: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in names)
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(label)}">{table}</div>'


def _cell(value: Cell) -> str:
    if value is None:
        return "<td></td>"
    return f"<td>{escape(value)}</td>" if isinstance(value, str) else f'<td class="n">{value:.4g}</td>'
