"""Results on standard output: tables for people, aligned text without a terminal, one JSON document if asked."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import click

from ..errors import public
from ._options import Settings


@dataclass(frozen=True, slots=True)
class Table:
    """Cells under headings. A column that is empty in every row is not shown; one of numbers only is set right."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]

    def shown(self) -> Table:
        """The same table without its empty columns."""
        used = [i for i in range(len(self.columns)) if any(row[i] not in (None, "") for row in self.rows)]
        return Table([self.columns[i] for i in used], [[row[i] for i in used] for row in self.rows])

    def numeric(self, column: int) -> bool:
        return all(isinstance(row[column], int | float | None) for row in self.rows)


View = Iterable[Table | str]

_LARGE = 1 << 20
"""Characters of JSON for which another formatter is worth its import."""


def show(settings: Settings, record: Mapping[str, Any], view: Callable[[Mapping[str, Any]], View]) -> None:
    """Prints a result: `record` as JSON, or the lines and tables that `view` makes of it."""
    if settings.json:
        click.echo(as_json(record))
        return
    for part in view(record):
        if isinstance(part, str):
            click.echo(_folded(printable(part)) if sys.stdout.isatty() else printable(part))
        elif sys.stdout.isatty():
            _print_rich(part.shown())
        else:
            click.echo("\n".join(_aligned(part.shown())))


def _folded(line: str) -> str:
    """A line for a terminal: broken between words only, and what follows set in as its beginning is."""
    import shutil
    import textwrap

    width = shutil.get_terminal_size().columns
    if len(line) <= width:
        return line
    margin = len(line) - len(line.lstrip())
    # `  name   value` goes on under the value, where there is room for it.
    pair = re.match(r"  \S+(?: \S+)* {2,}", line)
    inset = len(pair[0]) if pair is not None and len(pair[0]) <= width // 2 else margin + 2
    return textwrap.fill(
        line, max(width, 20), subsequent_indent=" " * inset, break_long_words=False, break_on_hyphens=False,
        drop_whitespace=True, replace_whitespace=False,
    )  # fmt: skip


def as_json(value: Any) -> str:
    """Valid JSON of a record: numbers that JSON does not know become null, paths become text."""
    import json

    text = json.dumps(_plain(value), allow_nan=False)
    if len(text) < _LARGE:
        return json.dumps(json.loads(text), indent=2)
    # With an indent, json.dumps runs in Python: 10 s for 45,000 targets. msgspec's formatter gives the same text.
    from msgspec.json import format as indented

    return indented(text, indent=2)


def printable(text: str, keep: str = "") -> str:
    """Text without secrets, and with control characters escaped: names in files may hold codes for a terminal."""
    shown = public(text)
    if shown.isprintable():
        return shown
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in shown)


def cell(value: Any) -> str:
    """A value as a table shows it."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return printable(f"{value:.6g}" if isinstance(value, float) else str(value))


def size(count: int) -> str:
    """Bytes in decimal units, as `--shard-size` takes them."""
    value, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB", "PB"):
        if value < 999.5:
            break
        value, unit = value / 1000, larger
    return f"{value:.3g} {unit}"


def counted(count: int, noun: str) -> str:
    """A count and its noun: `1 file`, `2 files`."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {public(str(key)): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, bool | int | float) else public(str(value))


def _aligned(table: Table) -> list[str]:
    columns = []
    for i, name in enumerate(table.columns):
        texts = [cell(name), *_cells([row[i] for row in table.rows])]
        distinct, right = set(texts), table.numeric(i)
        width = max(map(len, distinct))
        set_out = {text: text.rjust(width) if right else text.ljust(width) for text in distinct}
        columns.append([set_out[text] for text in texts])
    return ["  ".join(line).rstrip() for line in zip(*columns, strict=True)]


def _cells(values: Sequence[Any]) -> list[str]:
    """Return the text of each cell of a column. Equal values are rendered once: long tables have few different ones."""
    known: dict[tuple[type, Any], str] = {}
    texts = []
    for value in values:
        key = type(value), value if isinstance(value, str | int | float | None) else id(value)
        text = known.get(key)
        if text is None:
            text = known[key] = cell(value)
        texts.append(text)
    return texts


def _print_rich(table: Table) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    console = Console(file=sys.stdout)
    texts = [[cell(name), *_cells([row[i] for row in table.rows])] for i, name in enumerate(table.columns)]
    widths = [max(map(len, column)) for column in texts]
    # Words may be folded, names and numbers may not: their columns must fit as they are.
    least = [max(len(word) for text in column for word in text.split(" ") or [""]) for column in texts]
    room = console.width - 3 * len(least)
    if sum(least) > room:
        _print_records(console, texts)
        return
    while sum(widths) > room:
        widest = max((i for i in range(len(widths)) if widths[i] > least[i]), key=widths.__getitem__)
        widths[widest] -= 1
    drawn = RichTable(box=SIMPLE_HEAD, pad_edge=False)
    for i, name in enumerate(table.columns):
        justify: Any = "right" if table.numeric(i) else "left"
        drawn.add_column(Text(name), justify=justify, overflow="fold", width=widths[i])
    for row in zip(*(column[1:] for column in texts), strict=True):
        drawn.add_row(*map(Text, row))
    console.print(drawn)


def _print_records(console: Any, texts: Sequence[Sequence[str]]) -> None:
    """A table that is wider than the terminal, a row under the other: nothing in it is broken."""
    from rich.text import Text

    names = [column[0] for column in texts[1:]]
    width = max(map(len, names), default=0)
    for first, *rest in zip(*(column[1:] for column in texts), strict=True):
        console.print(Text(first, style="bold"), soft_wrap=True)
        for name, text in zip(names, rest, strict=True):
            if text:
                console.print(Text(f"  {name.ljust(width)}  {text}"), soft_wrap=True)
