"""Build the HTML tables that `_repr_html_` methods return, so that a notebook shows a result as a table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

MOST_ROWS = 60
"""The maximum number of rows in a table: a table with tens of thousands of rows makes a notebook unusable."""


def html_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return an HTML table. All text is escaped, because names come from untrusted files.

    Args:
        title: the text above the table.
        columns: the column headers.
        rows: the cells of each row. The table shows the first `MOST_ROWS` rows and the number of further rows.
    """
    every = list(rows)
    head = "".join(f"<th>{escape(name)}</th>" for name in columns)
    body = "".join("<tr>" + "".join(f"<td>{_cell(cell)}</td>" for cell in row) + "</tr>" for row in every[:MOST_ROWS])
    left = len(every) - MOST_ROWS
    more = f"<p>... and {left:,} more rows</p>" if left > 0 else ""
    return f"<p><b>{escape(title)}</b></p><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{more}"


def _cell(value: object) -> str:
    if value is None:
        return ""
    return escape(f"{value:.4g}" if isinstance(value, float) else str(value))


def counts(names: Iterable[str]) -> str:
    """Count each name and return the counts as text, the most frequent name first: `14 lora, 2 ia3`."""
    counts_by_name: dict[str, int] = {}
    for name in names:
        counts_by_name[name] = counts_by_name.get(name, 0) + 1
    return ", ".join(
        f"{count:,} {name}" for name, count in sorted(counts_by_name.items(), key=lambda item: (-item[1], item[0]))
    )
