"""Create a report about adapters, and write it as an HTML page (`AdapterReport.save`) or as pictures (`figures`).

A notebook also displays the report.

The page is one HTML file that does not load any other file. The page is complete even if the browser runs no scripts:
the drawings are SVG, and the table is plain HTML. The script `page.js` adds search, sorting, tooltips on the drawings,
and a switch between light and dark colours. All text from files is escaped, so a name in an adapter cannot add markup
to the page. A content security policy in the page's head forbids the browser to load anything.
"""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from html import escape
from importlib.resources import files
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from .. import __version__
from ..core.arguments import checks_types
from ..errors import Malformed, StorageError, UsageError, shown, storage_error
from ..gating.result import AdapterEffect, GateCheck, KeptEffect
from ..io.inputs import read_input
from ..io.stages import stage
from ..io.strict_json import check_size, load_json
from .charts import PALETTE, Chart, charts, inline, png, svg
from .inspecting import WAYS, Facts, facts_of
from .measuring import Measurements, measure
from .verdicts import LEVELS, Verdict, percent, verdicts

if TYPE_CHECKING:
    from os import PathLike

    from ..core.adapter import Adapter
    from ..io.checkpoint import Checkpoint
    from ..io.strict_json import JsonValue
    from .measuring import Effect

CURE = "Run adapterkit gate ... --json > FILE, and pass --gate FILE (gate=)"

RESULTS = {True: "holds", False: "fails", None: "undecided"}

MOST_MODULES = 40
"""The largest number of modules to show for one model. Modules with a fault come first, then modules without a fault,
both in the order in which the model runs them."""


class GateFigures(msgspec.Struct, frozen=True):
    """The part of a gate's record that the page shows. `adapterkit gate --json` prints such a record."""

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
    """Read a gate's record, and return the fields that the page shows.

    Args:
        source: the gate's result, the record of the result, or the path of a JSON file with the record.

    Raises:
        Malformed: the file is not JSON, or the record was not written by a gate.
        StorageError: the file cannot be read.
        UsageError: `source` is not a result, a record or a path.
    """
    path = None
    record: Any = source
    if isinstance(source, (str, os.PathLike)):
        path = Path(source)
        try:
            data = read_input(path)
            check_size(data)
            record = load_json(data.decode())
        except (ValueError, RecursionError) as error:
            raise Malformed(f"not valid JSON ({error})", path=path, cure=CURE) from None
    elif not isinstance(source, Mapping):
        why = f"{shown(source)} of type {type(source).__name__} is not the result of a gate"
        raise UsageError(why, where="gate", cure=CURE)
    kind = record.get("kind") if isinstance(record, Mapping) else None
    if kind != "gate":
        raise Malformed("not the record of a gate", path=path, where="kind", cure=CURE)
    try:
        return msgspec.convert(dict(record), GateFigures)
    except msgspec.ValidationError as error:
        raise Malformed(f"not the record of a gate ({error})", path=path, cure=CURE) from None


def gate_section(gate: GateFigures) -> str:
    """Return the page's section about a gate, as HTML without the heading."""
    description = f"{', '.join(gate.adapters)} on {gate.base}, run on {gate.data}"
    where = ", ".join(each for each in (gate.device, gate.dtype, f"seed {gate.seed}") if each)
    parts = [f'<p class="fine"><b>{escape(gate.outcome)}</b>: {escape(description)} ({escape(where)}).</p>']
    if gate.verdicts:
        parts.append(f"<ul>{''.join(f'<li>{escape(each)}</li>' for each in gate.verdicts)}</ul>")
    checks = [(c.model, c.name, RESULTS[c.ok], c.value, c.limit, c.text) for c in gate.checks]
    parts.append(
        _gate_table("Checks of the gate", ("model", "check", "result", "value", "limit", "explanation"), checks)
    )
    parts.append(
        _gate_table("Runs of the gate", ("run", "KL", "kept", "perplexity", "same greedy tokens"), _runs(gate))
    )
    for each in gate.kept:
        if each.why is not None:
            parts.append(f"<p>{escape(each.path)} could not be run: {escape(each.why)}</p>")
        parts += [*_modules(each), *_blocks(each)]
    return "".join(parts)


Cell = float | str | None
"""The value in a table cell; None leaves the cell empty."""


def _runs(gate: GateFigures) -> list[tuple[Cell, ...]]:
    effect = gate.effect
    return [
        ("base", None, None, effect.perplexity_base, effect.agreement),
        ("base + adapters", effect.divergence, None, effect.perplexity, None),
        ("base + random changes", effect.null, None, None, None),
        *((f"{k.model}: {k.path}", k.divergence, k.kept, k.perplexity, k.agreement) for k in gate.kept),
    ]


def _modules(kept: KeptEffect) -> list[str]:
    parts_shown = [part for part in kept.parts if part.touched or part.fault]
    if not parts_shown:
        return []
    several = sorted(parts_shown, key=lambda part: not part.fault)[:MOST_MODULES]
    first = next((part.module for part in kept.parts if part.fault), None)
    lead = f"The first module with a fault is {first}." if first is not None else "No module has a fault."
    left = len(parts_shown) - len(several)
    more = f" The gate's record has {left:,} further modules." if left else ""
    rows = [
        (part.module, part.scale, part.error, part.fault or ("none: only rounding" if part.rounded else ""))
        for part in several
    ]
    names = ("module", "scale of the change", "error relative to the change", "fault")
    return [f"<h3>Modules of {escape(kept.path)}</h3><p>{escape(lead + more)}</p>", _gate_table("Modules", names, rows)]


def _blocks(kept: KeptEffect) -> list[str]:
    if not kept.blocks:
        return []
    rows = [(each.block, each.difference, each.change) for each in kept.blocks]
    names = ("block", "difference from the base with adapters", "change by the adapters")
    return [f"<h3>Hidden states of {escape(kept.path)}</h3>", _gate_table("Hidden states, block by block", names, rows)]


def _gate_table(label: str, names: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in names)
    body = "".join(f"<tr>{''.join(map(_gate_cell, row))}</tr>" for row in rows)
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(label)}">{table}</div>'


def _gate_cell(value: Cell) -> str:
    if value is None:
        return "<td></td>"
    return f"<td>{escape(value)}</td>" if isinstance(value, str) else f'<td class="n">{value:.4g}</td>'


MOST_ROWS = 2000
"""The largest number of rows in the table of targets: 45,000 rows would make a page of 10 MB. If there are more rows,
the table shows the rows with the largest changes. The report's record always has all rows."""

HEADINGS = {"fault": "Faults", "warning": "Worth a look", "note": "Good to know"}

HIDDEN = ("metadata", "of", "base_fingerprint")
"""Arguments that are not printed with a lineage step, because they are shown elsewhere or are too long."""


def page(report: AdapterReport) -> str:
    """Return the whole page as HTML."""
    stage("drawing")
    title = escape(f"adapterkit report: {', '.join(facts.name for facts in report.facts)}")
    folder = files("adapterkit.reporting")
    style, script = (folder.joinpath(name).read_text("utf-8") for name in ("page.css", "page.js"))
    sources = " ".join(
        f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" for text in (script,)
    )
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src {sources}; img-src data:"
    parts = "\n".join(_parts(report))
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="generator" content="adapterkit {__version__}">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<a class="skip" href="#verdicts">Skip to the verdicts</a>
<header>
<p class="brand">adapterkit report</p>
<h1>{_heading(report)}</h1>
<p class="lead">{_lead(report)}</p>
<button id="theme" type="button" hidden>Dark page</button>
</header>
<main>
{parts}
</main>
<footer>Made by adapterkit {__version__}. Norms, angles and spectra are exact up to rounding errors.
Statistics of signs and single elements come from a sample: evenly spread rows and columns of each weight.</footer>
<div id="tip" role="status" hidden></div>
<script>{script}</script>
</body>
</html>
"""


def fragment(report: AdapterReport) -> str:
    """Return the HTML that a notebook shows: the verdicts and the drawings.

    The HTML contains no scripts and no style sheets, because these would affect other cells of the notebook.
    """
    verdicts = "".join(
        f'<li><b>{escape(HEADINGS[each.level])}</b>: {escape(each.text)}</li>' for each in report.verdicts
    )  # fmt: skip
    drawings = "".join(
        f'<figure style="margin:0 1.5em 1.5em 0;display:inline-block;vertical-align:top">'
        f"<figcaption><b>{escape(chart.title)}</b></figcaption>{inline(chart)}</figure>"
        for chart in report.charts
    )
    return f"<div><h3>{_heading(report)}</h3><ul>{verdicts}</ul>{drawings}</div>"


def _heading(report: AdapterReport) -> str:
    return escape(", ".join(facts.name for facts in report.facts))


def _lead(report: AdapterReport) -> str:
    measured = report.measured
    targets = len({effect.target for effect in measured.effects})
    sentences = [f"{len(report.facts)} adapter{'' if len(report.facts) == 1 else 's'} at {targets:,} targets"]
    bases = dict.fromkeys(facts.base for facts in report.facts if facts.base)
    if bases:
        sentences.append(f"made for {', '.join(map(escape, bases))}")
    if report.base:
        sentences.append(f"compared with {escape(report.base)}")
    if report.merged:
        sentences.append(f"and the merged model {escape(report.merged)}")
    return ", ".join(sentences) + "."


def _parts(report: AdapterReport) -> Iterable[str]:
    yield _section("verdicts", "Verdicts", _verdicts(report))
    if report.gate is not None:
        yield _section("gate", "The effect when models run", gate_section(report.gate))
    yield _section("adapters", "The adapters" if len(report.facts) > 1 else "The adapter", _facts(report.facts))
    for group, drawn in groupby(report.charts, key=lambda chart: chart.group):
        yield _section(group.lower().replace(" ", "-"), group, "".join(map(_figure, drawn)), "charts")
    yield _section("targets", "All targets", _table(report))
    yield _section("lineage", "Lineage", _lineage(report.facts))
    yield _section("fits", "Formats and tools", _formats(report.facts))


def _section(name: str, title: str, inside: str, kind: str = "") -> str:
    of = f' class="{kind}"' if kind else ""
    head = f'<h2 id="{name}-h">{title}</h2>'
    return f'<section id="{name}" aria-labelledby="{name}-h">{head}<div{of}>{inside}</div></section>'


def _verdicts(report: AdapterReport) -> str:
    sections = []
    for level in LEVELS:
        here = [each for each in report.verdicts if each.level == level]
        if here:
            items = "".join(f"<li>{escape(each.text)}</li>" for each in here)
            sections.append(f'<div class="verdicts {level}"><h3>{HEADINGS[level]}</h3><ul>{items}</ul></div>')
    if all(each.level == "note" for each in report.verdicts):
        sections.insert(0, '<p class="fine">Nothing is out of the ordinary.</p>')
    return "".join(sections)


def _facts(all_facts: Sequence[Facts]) -> str:
    several = len(all_facts) > 1
    rows = []
    for at, facts in enumerate(all_facts):
        mark = f'<i class="dot" style="background:{PALETTE[at % len(PALETTE)]}"></i>' if several else ""
        cells = [
            f'<th scope="row">{mark}{escape(facts.name)}</th>', _cell(facts.base or "unknown"),
            _cell(", ".join(f"{name} ({count:,})" for name, count in facts.methods.items())),
            _cell(", ".join(map(str, facts.ranks)) or "none"), _cell(f"{facts.targets:,}", "n"),
            _cell(f"{facts.parameters:,}", "n"), _cell(size(facts.bytes), "n"), _cell(", ".join(facts.dtypes)),
            _cell(facts.format or "in memory"), _cell(facts.licence or "unknown"), _cell(", ".join(facts.triggers)),
        ]  # fmt: skip
        rows.append(f"<tr>{''.join(cells)}</tr>")
    names = (
        "adapter",
        "for",
        "method",
        "rank",
        "targets",
        "parameters",
        "size",
        "dtype",
        "format",
        "licence",
        "trigger words",
    )
    head = "".join(f'<th scope="col">{name}</th>' for name in names)
    return _scrolled(
        f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>", "Table of the adapters"
    )


def size(count: int) -> str:
    """Return a number of bytes as text in decimal units, such as `1.5 MB`."""
    value, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 999.5:
            break
        value, unit = value / 1000, larger
    return f"{value:.3g} {unit}"


def _cell(text: str, kind: str = "") -> str:
    of = f' class="{kind}"' if kind else ""
    return f"<td{of}>{escape(text)}</td>"


def _scrolled(table: str, label: str) -> str:
    """Return a table in a frame that can be scrolled sideways with the mouse or the keyboard."""
    return f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(label)}">{table}</div>'


def _figure(chart: Chart) -> str:
    name = escape(chart.name)
    return (
        f'<figure id="f-{name}"><h3>{escape(chart.title)}</h3><div class="scroll" tabindex="0" role="region" '
        f'aria-label="{escape(chart.title)}, drawing">{inline(chart)}</div>'
        f"<figcaption>{escape(chart.caption)}</figcaption></figure>"
    )


COLUMNS: Mapping[str, Any] = {
    "target": lambda each, _: each.target,
    "adapter": lambda each, report: report.facts[each.adapter].name,
    "method": lambda each, _: each.method,
    "shape": lambda each, _: "x".join(map(str, each.shape or ())),
    "rank": lambda each, _: each.rank,
    "norm": lambda each, _: each.norm,
    "share": lambda each, report: _share(each, report),
    "effective rank": lambda each, _: each.effective_rank,
    "first direction": lambda each, _: each.spike,
    "of the weight": lambda each, _: each.relative,
    "intruders": lambda each, _: each.intruders,
    "kept": lambda each, report: report.kept.get(each.target),
    "note": lambda each, _: each.why,
}
"""Column heading -> function that returns the column's value for one effect. A column with no values is omitted."""

SHARES = ("share", "first direction", "of the weight", "kept")


class _TableRows:
    """The second argument of the functions in `COLUMNS`: the adapters' facts, the total norms and the kept shares."""

    def __init__(self, report: AdapterReport) -> None:
        self.facts = report.facts
        self.totals = [report.measured.norm(at) for at in range(len(report.facts))]
        self.kept = {each.target: each.kept for each in report.measured.merged}


def _share(effect: Effect, rows: _TableRows) -> float | None:
    total = rows.totals[effect.adapter]
    return None if effect.norm is None or not total else (effect.norm / total) ** 2


def _table(report: AdapterReport) -> str:
    effects = report.measured.effects
    rows = _TableRows(report)
    shown = sorted(effects, key=lambda each: -(each.norm or 0.0))[:MOST_ROWS]
    columns = {
        name: [value(each, rows) for each in shown]
        for name, value in COLUMNS.items() if name != "adapter" or len(report.facts) > 1
    }  # fmt: skip
    columns = {
        name: values_here
        for name, values_here in columns.items()
        if any(value not in (None, "") for value in values_here)
    }
    head = "".join(
        f'<th scope="col" aria-sort="{"descending" if name == "norm" else "none"}">'
        f'<button type="button">{name}</button></th>'
        for name in columns
    )
    body = "".join(
        "<tr>" + "".join(_value(name, values_here[at]) for name, values_here in columns.items()) + "</tr>"
        for at in range(len(shown))
    )
    count_text = (
        f"{len(effects):,} rows, the largest changes first."
        if len(shown) == len(effects)
        else f"The {len(shown):,} rows with the largest changes. The output of --json has all {len(effects):,} rows."
    )
    return (
        '<p class="search" hidden><label for="q">Search the targets</label>'
        '<input id="q" type="search" placeholder="layers.11 o_proj" autocomplete="off"></p>'
        f'<p id="count" role="status">{count_text}</p>'
        + _scrolled(
            f'<table id="rows"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>', "Table of all targets"
        )
    )


def _value(name: str, value: float | str | None) -> str:
    if value is None:
        return "<td></td>"
    if isinstance(value, str):
        return f"<td>{escape(value)}</td>"
    shown = percent(value) if name in SHARES else f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
    return f'<td class="n" data-v="{value:.6g}">{shown}</td>'


def _lineage(all_facts: Sequence[Facts]) -> str:
    trees = "".join(
        f"<li>{_node('adapter', facts.name)}{_steps([*facts.lineage], facts.base)}</li>" for facts in all_facts
    )  # fmt: skip
    return f'<ul class="tree">{trees}</ul>'


def _steps(steps: Sequence[Mapping[str, Any]], base: str | None) -> str:
    """Return a lineage as nested HTML lists. The newest step is outermost; each step contains the step before it."""
    if not steps:
        return f"<ul><li>{_node('base', base)}</li></ul>" if base else ""
    *before, last = steps
    args = last.get("args") or {}
    of = args.get("of")
    details = ", ".join(
        f"{key} {_brief(value)}" for key, value in args.items() if key not in HIDDEN and value is not None
    )
    inside = _steps(before, base if not before and not isinstance(of, list) else None if isinstance(of, list) else base)
    if isinstance(of, list):
        branches_of = [each for each in of if isinstance(each, Mapping)]
        branches = "".join(f"<li>{_branch(each)}</li>" for each in branches_of)
        inside = f"<ul>{branches}</ul>"
    return f"<ul><li>{_node(str(last.get('op')), details)}{inside}</li></ul>"


def _branch(source: Mapping[str, Any]) -> str:
    recipe = source.get("recipe")
    steps = [step for step in recipe if isinstance(step, Mapping)] if isinstance(recipe, list) else []
    return _node("adapter", "") + _steps(steps, source.get("base"))


def _node(kind: str, text: str | None) -> str:
    return f'<span class="node"><b>{escape(kind)}</b> {escape(text or "")}</span>'


def _brief(value: object) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _formats(all_facts: Sequence[Facts]) -> str:
    parts = []
    for facts in all_facts:
        rows = "".join(
            f'<tr><th scope="row">{escape(facts.name)}</th><td>{escape(text)}</td><td>{_listed(facts, way)}</td></tr>'
            for way, text in WAYS.items() if way in facts.formats.values()
        )  # fmt: skip
        parts.append(rows)
    head = '<thead><tr><th scope="col">adapter</th><th scope="col">how</th><th scope="col">formats</th></tr></thead>'
    table = _scrolled(f"<table>{head}<tbody>{''.join(parts)}</tbody></table>", "Table of formats")
    tools = "".join(
        f'<tr><th scope="row">{escape(facts.name)}</th>'
        f"{''.join(_cell(each[name]) for name in ('title', 'loads', 'why'))}</tr>"
        for facts in all_facts for each in facts.loaders
    )  # fmt: skip
    if tools:
        head = "".join(f'<th scope="col">{name}</th>' for name in ("adapter", "tool", "loads it", "why"))
        table += "<p>The next table shows whether each tool can load the file without conversion.</p>" + _scrolled(
            f"<table><thead><tr>{head}</tr></thead><tbody>{tools}</tbody></table>", "Table of tools"
        )
    return (
        "<p>This table shows which formats can store each adapter. It considers only the adapter's methods and the "
        "kind of model (image or language). <code>adapterkit convert</code> also checks the names of modules and the "
        "other limits of a format.</p>"
        f"{table}"
    )


def _listed(facts: Facts, way: str) -> str:
    return escape(", ".join(name for name, how in facts.formats.items() if how == way))


@dataclass(frozen=True, eq=False)
class AdapterReport:
    """A report about adapters. Notebooks display it.

    Attributes:
        facts: the facts about the adapters, one entry per adapter.
        measured: all measurements.
        verdicts: sentences about the measurements, faults first.
        base: the path of the base, or None.
        merged: the path of the merged model, or None.
        seconds: the duration of the measurements in seconds.
        gate: the fields of a gate's record, or None.
    """

    facts: tuple[Facts, ...]
    measured: Measurements
    verdicts: tuple[Verdict, ...]
    base: str | None = None
    merged: str | None = None
    seconds: float = 0.0
    gate: GateFigures | None = None

    @cached_property
    def charts(self) -> list[Chart]:
        """The pictures, as Vega-Lite specifications. The methods `html` and `figures` draw the pictures."""
        return charts(self.measured)

    def record(self) -> dict[str, JsonValue]:
        """Return the report as plain data."""
        return {
            "kind": "report", "base": self.base, "merged": self.merged, "seconds": round(self.seconds, 3),
            "facts": [facts.record() for facts in self.facts], "verdicts": [asdict(each) for each in self.verdicts],
            **({} if self.gate is None else {"gate": msgspec.to_builtins(self.gate)}),
            **self.measured.record(),
        }  # fmt: skip

    def html(self) -> str:
        """Return the report as one HTML page that needs no other files.

        Raises:
            Unsupported: the package vl-convert-python is not installed.
        """
        return page(self)

    @checks_types
    def save(self, out: str | PathLike[str], *, overwrite: bool = False, made_from: str | None = None) -> Path:
        """Write the report as one HTML file, atomically.

        Args:
            out: the path of the file to write.
            overwrite: whether to replace an existing file.
            made_from: a digest of everything that determines the page. The digest is stored with the page, so that a
                later run with the same digest can skip the work; see `io.staging`.

        Raises:
            StorageError: `out` is a folder, `out` exists and `overwrite` is False, or `out` cannot be written.
            UsageError: `out` has a suffix other than `.html` and `.htm`.
            Unsupported: the package vl-convert-python is not installed.
        """
        from ..io.staging import check_free, staged

        path = Path(out)
        if path.is_dir():
            raise StorageError("the path is a folder", path=path, cure="Name a file, such as report.html")
        if path.suffix.lower() not in ("", ".html", ".htm"):
            cure = f"Name the file {path.with_suffix('.html').name}; to write pictures, pass --figures DIR (figures=)"
            raise UsageError(f"a report is an HTML page, not {path.suffix}", path=path, cure=cure)
        check_free(path, overwrite)
        data = self.html().encode()
        with staged(path, overwrite=overwrite, made_from=made_from) as place:
            place.write_bytes(data)
        return path

    @checks_types
    def figures(self, folder: str | PathLike[str]) -> list[Path]:
        """Write every chart as PNG and SVG into a folder, and return the paths. Existing files are replaced.

        Raises:
            StorageError: the folder is not writable.
            Unsupported: the package vl-convert-python is not installed.
        """
        from ..io.atomic import write_bytes

        place = Path(folder)
        try:
            place.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise storage_error(error, place) from error
        written = []
        for chart in self.charts:
            for ending, data in ((".svg", svg(chart).encode()), (".png", png(chart))):
                write_bytes(place / f"{chart.name}{ending}", data)
                written.append(place / f"{chart.name}{ending}")
        return written

    def _repr_html_(self) -> str:

        return fragment(self)

    def __repr__(self) -> str:
        names = ", ".join(facts.name for facts in self.facts)
        counts = {level: sum(each.level == level for each in self.verdicts) for level in ("fault", "warning", "note")}
        counts_text = ", ".join(
            f"{count} {level}{'' if count == 1 else 's'}" for level, count in counts.items() if count
        )
        return f"<adapterkit report on {names}: {counts_text}>"


def build_page(
    adapters: Sequence[Adapter], names: Sequence[str], *, paths: Sequence[Path | None] = (),
    base: Checkpoint | None = None, merged: Checkpoint | None = None, rename: str | Sequence[str] = (),
    progress: Callable[[int, int], object] | None = None, gate: GateFigures | None = None,
) -> AdapterReport:  # fmt: skip
    """Measure adapters, and return a report about them.

    Args:
        adapters: the adapters.
        names: the adapters' names in the report, all different.
        paths: the path from which each adapter was read; None for an adapter in memory.
        base: the base of the adapters.
        merged: the model into which the adapters were merged; requires `base`.
        rename: rules that rename targets; see `adapterkit.ops.compare`.
        progress: a function that is called after each step with the number of completed steps and the total number of
            steps.
        gate: the fields of a gate's record. The page shows these fields in a separate section.

    Raises:
        AdapterkitError: the adapters belong to different models; see `adapterkit.ops.compare`.
    """
    import time

    started = time.perf_counter()
    where = list(paths) or [None] * len(adapters)
    facts = [facts_of(adapter, name, path) for adapter, name, path in zip(adapters, names, where, strict=True)]
    weights = _weights(merged, len(adapters))
    measured = measure(
        adapters, names, base=_plain(base), merged=_plain(merged), weights=weights, rename=rename,
        progress=progress,
    )  # fmt: skip
    return AdapterReport(
        tuple(facts), measured, tuple(verdicts(measured, facts)), None if base is None else str(base.root),
        None if merged is None else str(merged.root), time.perf_counter() - started, gate,
    )  # fmt: skip


def _plain(base: Checkpoint | None) -> Checkpoint | None:
    """Return the checkpoint, with dequantized weights if it is quantized."""
    from ..quant import dequantized, is_quantized

    return dequantized(base) if base is not None and is_quantized(base) else base


def _weights(merged: Checkpoint | None, count: int) -> list[float] | None:
    """Return the weight of each adapter in the merge, as written in the merged model's merge record.

    Return None if the record does not list exactly `count` adapters, each with a weight.
    """
    if merged is None:
        return None
    from ..naming.binding.fitting import merge_record

    recorded = merge_record(merged).get("adapters")
    if not isinstance(recorded, list) or len(recorded) != count:
        return None
    weights = [each.get("weight") if isinstance(each, dict) else None for each in recorded]
    return [float(value) for value in weights] if all(isinstance(value, (int, float)) for value in weights) else None  # type: ignore[arg-type]
