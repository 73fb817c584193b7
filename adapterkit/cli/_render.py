"""Print results on standard output: tables on a terminal, aligned columns elsewhere, or JSON with --json."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import click

from ..errors import public
from ._options import CliSettings


@dataclass(frozen=True, slots=True)
class TextTable:
    """A table with headings. Columns in which every cell is empty are hidden; columns of numbers are right-aligned.

    Attributes:
        columns: the headings.
        rows: the cells of each row.
        spare: headings of the columns that may be dropped on a narrow terminal, in the order in which they are
            dropped. A line below the table names the dropped columns.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[object]]
    spare: Sequence[str] = ()

    def shown(self) -> TextTable:
        """Return the table without its empty columns."""
        used = [i for i in range(len(self.columns)) if any(row[i] not in (None, "") for row in self.rows)]
        return self._of(used)

    def without(self, name: str) -> TextTable:
        """Return the table without one column."""
        return self._of([i for i, column in enumerate(self.columns) if column != name])

    def _of(self, used: Sequence[int]) -> TextTable:
        columns = [self.columns[i] for i in used]
        spare = [name for name in self.spare if name in columns]
        return TextTable(columns, [[row[i] for i in used] for row in self.rows], spare)

    def numeric(self, column: int) -> bool:
        return all(isinstance(row[column], int | float | None) for row in self.rows)


View = Iterable[TextTable | str]

_LARGE = 1 << 20
"""JSON of at least this many characters is indented by msgspec. For shorter JSON, the json module takes less time than
the import of msgspec."""


def show(settings: CliSettings, record: Mapping[str, object], view: Callable[[Mapping[str, object]], View]) -> None:
    """Print a result: `record` as JSON with --json, otherwise the lines and tables that `view` makes from `record`."""
    if settings.json:
        click.echo(as_json(record))
        return
    for piece in view(record):
        if isinstance(piece, str):
            click.echo(folded(printable(piece)) if sys.stdout.isatty() else printable(piece))
        elif sys.stdout.isatty():
            _print_drawn(piece.shown())
        else:
            click.echo("\n".join(_aligned(piece.shown())))


def remark(text: str) -> None:
    """Print a line on standard error. A stream that fails, such as a file on a full disk, does not end the command."""
    with suppress(OSError):
        click.echo(text, err=True)


def part(record: Mapping[str, object], name: str) -> Mapping[str, object]:
    """Return the entry `name` of a record; this entry must itself be a record."""
    value = record[name]
    assert isinstance(value, Mapping), name
    return value


def part_or_none(record: Mapping[str, object], name: str) -> Mapping[str, object] | None:
    """Return the entry `name`, which must be a record; return None if the entry is absent, null or empty."""
    return part(record, name) if record.get(name) else None


def parts(record: Mapping[str, object], name: str) -> Sequence[Mapping[str, object]]:
    """Return the entry `name` of a record; this entry must be a list of records. An absent entry is an empty list."""
    value = record.get(name, ())
    assert isinstance(value, Sequence), name
    return value


def texts(record: Mapping[str, object], name: str) -> list[str]:
    """Return the elements of the list `name` in a record, each as text. An absent entry is an empty list."""
    value = record.get(name, ())
    assert isinstance(value, Iterable), name
    return [str(each) for each in value]


def integer(record: Mapping[str, object], name: str) -> int:
    """Return the entry `name` of a record; this entry must be an integer."""
    value = record[name]
    assert isinstance(value, int), name
    return value


def number(record: Mapping[str, object], name: str) -> float:
    """Return the entry `name` of a record; this entry must be a number."""
    value = record[name]
    assert isinstance(value, (int, float)), name
    return value


def folded(line: str) -> str:
    """Wrap a line between words to the width of the terminal, and indent the continuation lines."""
    import shutil
    import textwrap

    width = shutil.get_terminal_size().columns
    if len(line) <= width:
        return line
    margin = len(line) - len(line.lstrip())
    # In a line such as `  name   value`, align the continuation lines with the value. In other lines, or if the value
    # starts in the right half of the terminal, indent the continuation lines two spaces more than the first line.
    pair = re.match(r"  \S+(?: \S+)* {2,}", line)
    inset = len(pair[0]) if pair is not None and len(pair[0]) <= width // 2 else margin + 2
    # Words are never broken, so a long name needs room: reduce the indent until the longest word fits.
    inset = max(margin, min(inset, width - max(map(len, line.split()))))
    return textwrap.fill(
        line, max(width, 20), subsequent_indent=" " * inset, break_long_words=False, break_on_hyphens=False,
        drop_whitespace=True, replace_whitespace=False,
    )  # fmt: skip


def as_json(value: object) -> str:
    """Return a record as valid JSON. Infinities and NaN become null, paths become text, and secrets are removed."""
    import json

    text = json.dumps(_plain(value), allow_nan=False)
    if len(text) < _LARGE:
        return json.dumps(json.loads(text), indent=2)
    # With an indent, json.dumps runs in pure Python and takes 10 s for 45,000 targets. msgspec returns the same text.
    from msgspec.json import format as indented

    return indented(text, indent=2)


def printable(text: str, keep: str = "") -> str:
    """Remove secrets from a text and escape its control characters, because names in files may contain terminal codes.

    Args:
        text: the text.
        keep: control characters to leave unescaped.
    """
    shown = public(text)
    if shown.isprintable():
        return shown
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in shown)


def cell(value: object) -> str:
    """Return the text of a table cell."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return printable(f"{value:.6g}" if isinstance(value, float) else str(value))


def size(count: int) -> str:
    """Return a number of bytes as text with a decimal unit, such as `1.25 GB`.

    `--shard-size` accepts such texts, except those with the unit PB.
    """
    value, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB", "PB"):
        if value < 999.5:
            break
        value, unit = value / 1000, larger
    return f"{value:.3g} {unit}"


def counted(count: int, noun: str) -> str:
    """Return a count with its noun: `1 file`, `2 files`."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def _plain(value: object) -> object:
    if isinstance(value, Mapping):
        return {public(str(key)): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, bool | int | float) else public(str(value))


def _aligned(table: TextTable) -> list[str]:
    columns = []
    for i, name in enumerate(table.columns):
        texts = [cell(name), *_cells([row[i] for row in table.rows])]
        distinct, right = set(texts), table.numeric(i)
        width = max(map(len, distinct))
        set_out = {text: text.rjust(width) if right else text.ljust(width) for text in distinct}
        columns.append([set_out[text] for text in texts])
    return ["  ".join(line).rstrip() for line in zip(*columns, strict=True)]


def _cells(values: Sequence[object]) -> list[str]:
    """Return the text of each cell of a column.

    Equal values are formatted only once, because a long column often consists of a few values that repeat.
    """
    known: dict[tuple[type, object], str] = {}
    texts = []
    for value in values:
        key = type(value), value if isinstance(value, str | int | float | None) else id(value)
        text = known.get(key)
        if text is None:
            text = known[key] = cell(value)
        texts.append(text)
    return texts


GAP = 2
"""Number of spaces between two columns of a table."""


def _print_drawn(table: TextTable) -> None:
    """Print a table. If it is too wide, first drop spare columns, then wrap cells.

    If the table is still too wide, print each row as a list of names and values.
    """
    import shutil
    import textwrap

    width = max(20, shutil.get_terminal_size().columns)
    left: list[str] = []
    texts = _texts(table)
    while table.spare and sum(_widths(texts)) + GAP * (len(texts) - 1) > width:
        left.append(table.spare[0])
        table = table.without(table.spare[0])
        texts = _texts(table)
    widths = _widths(texts)
    # Cells are wrapped between words, never inside names or numbers: a column is at least as wide as its longest word.
    least = [max(len(word) for text in column for word in text.split(" ") or [""]) for column in texts]
    room = width - GAP * (len(texts) - 1)
    if sum(least) > room:
        _print_records(texts)
    else:
        while sum(widths) > room:
            widest = max((i for i in range(len(widths)) if widths[i] > least[i]), key=widths.__getitem__)
            widths[widest] -= 1
        right = [table.numeric(i) for i in range(len(texts))]
        for number, row in enumerate(zip(*texts, strict=True)):
            wrapped = [
                textwrap.wrap(text, size, break_long_words=False, break_on_hyphens=False) or [""]
                for text, size in zip(row, widths, strict=True)
            ]
            for line in range(max(map(len, wrapped))):
                parts = [cells[line] if line < len(cells) else "" for cells in wrapped]
                set_out = [
                    part.rjust(size) if at_right else part.ljust(size)
                    for part, size, at_right in zip(parts, widths, right, strict=True)
                ]
                text = (" " * GAP).join(set_out).rstrip()
                click.echo(click.style(text, bold=True) if number == 0 else text)
            if number == 0:
                click.echo(click.style("─" * (sum(widths) + GAP * (len(widths) - 1)), dim=True))
    if left:
        click.echo(folded(f"hidden columns: {', '.join(left)}; a wider terminal or --json shows them"))


def _texts(table: TextTable) -> list[list[str]]:
    """Return a list for each column: the heading, followed by the texts of the cells."""
    return [[cell(name), *_cells([row[i] for row in table.rows])] for i, name in enumerate(table.columns)]


def _widths(texts: Sequence[Sequence[str]]) -> list[int]:
    return [max(map(len, column)) for column in texts]


def _print_records(texts: Sequence[Sequence[str]]) -> None:
    """Print each row over several lines: the first cell, then the heading and the text of each other non-empty cell."""
    names = [column[0] for column in texts[1:]]
    width = max(map(len, names), default=0)
    for first, *rest in zip(*(column[1:] for column in texts), strict=True):
        click.echo(click.style(folded(first), bold=True))
        for name, text in zip(names, rest, strict=True):
            if text:
                click.echo(folded(f"  {name.ljust(width)}  {text}"))


# Tables of targets. If there are more than `FEW` targets, a table has one row for each module, which covers all layers.
# With --all, each target has its own row.


FEW = 24
"""Without --all, a table with more targets or tensors than this has one row for each module."""

every = click.option(
    "--all", "every", is_flag=True,
    help="List every target. By default, a table of more than 24 targets has one row for each module.",
)  # fmt: skip

HINT = "--all lists every target"


Record = Mapping[str, object]


def in_order(records: Sequence[Record]) -> list[Record]:
    """Return the records in the order of their targets' names. Numbers in names are compared by value: 2 before 10."""
    from ..reporting.grid import natural

    return sorted(records, key=lambda record: natural(_target(record)))


def _target(record: Record) -> str:
    return str(record["target"] or "")


def by_module(records: Sequence[Record]) -> list[tuple[str, list[Record], dict[str, str]]]:
    """Group the records of targets by module, in the order in which a transformer block computes its modules.

    Returns:
        a tuple for each module: the module's name, its records, and a map from every target to its layer.
    """
    from ..reporting.grid import cells, reading_order

    where = cells(_target(record) for record in records)
    layers = {target: cell.layer for target, cell in where.items()}
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(where[_target(record)].module, []).append(record)
    return [(module or "(model)", groups[module], layers) for module in sorted(groups, key=reading_order)]


def ranges(layers: Sequence[str]) -> str:
    """Return layers as ranges, such as `0-21` or `0-3, 8`.

    If a layer is not numeric, return only the count of layers. If there are more than four ranges, return the count of
    layers, the first three ranges and the last range, such as `7: 0, 2, 4, ... 10-11`.
    """
    if not all(layer.isdecimal() for layer in layers):
        return f"{len(layers):,}"
    runs: list[list[int]] = []
    for layer in sorted(map(int, layers)):
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    texts = [f"{first}-{last}" if last > first else str(first) for first, last in runs]
    return ", ".join(texts) if len(texts) <= 4 else f"{len(layers):,}: {', '.join(texts[:3])}, ... {texts[-1]}"


def layers_of(group: Sequence[Record], layers: Mapping[str, str]) -> str:
    """Return the layers of a module's records as text; see `ranges`."""
    named = dict.fromkeys(layers[_target(each)] for each in group)
    return ranges([layer for layer in named if layer])


def largest(group: Sequence[Record], name: str) -> Record | None:
    """Return the record with the largest value of the field `name`, or None if every value is zero or unknown."""
    return max((each for each in group if each[name]), key=lambda each: number(each, name), default=None)


def together(group: Sequence[Record], name: str) -> object:
    """Return the root of the sum of the squared norms in the field `name`, or None if one of the norms is unknown."""
    if any(each[name] is None for each in group):
        return None
    return short(math.hypot(*(number(each, name) for each in group)))


def short(value: object) -> object:
    """Round a float to four significant digits, which keeps tables narrow; return other values unchanged."""
    return float(f"{value:.4g}") if isinstance(value, float) else value


def span(values: Sequence[object]) -> object:
    """Return the smallest and the largest value as `2-8`, one value if all are equal, or None if all are unknown.

    Args:
        values: numbers, numbers as strings, or None. Strings are compared character by character, so all of them must
            have the same number of digits before and after the decimal point.
    """
    numbers = [value for value in values if isinstance(value, (int, float))]
    if numbers:
        return min(numbers) if min(numbers) == max(numbers) else f"{min(numbers)}-{max(numbers)}"
    names = [value for value in values if isinstance(value, str)]
    if not names:
        return None
    return min(names) if min(names) == max(names) else f"{min(names)}-{max(names)}"
