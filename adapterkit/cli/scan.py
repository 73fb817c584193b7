"""Scan an untrusted adapter for signs of an attack.

SRC is a file, a folder, or an address on a hub (the files are downloaded first). Nothing in the files is executed. The
scan looks for pickles that call functions, for code in configs, for chat templates that access anything except the data
passed to them, for misleading names, and for targets or values that training does not produce. Findings are evidence,
not proof. The exit code is 1 if a finding has at least the severity of --fail-on.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import click

from . import _options
from ._render import TextTable, View, counted, integer, parts, show, texts

LEVELS = ("note", "low", "medium", "high", "never")


@click.command(help=__doc__)
@click.argument("src")
@click.option("--base", metavar="BASE", help="Also compare the norms of the changes with the weights of this base.")
@_options.strict_base_of_read
@click.option(
    "--fail-on", type=click.Choice(LEVELS), default="medium", show_default=True,
    help="Exit with code 1 if a finding has at least this severity.",
)  # fmt: skip
@click.option("--sarif", metavar="FILE", help="Also write the findings as SARIF 2.1.0, for code hosts and editors.")
@_options.flags
@click.pass_context
def command(ctx: click.Context, src: str, base: str | None, fail_on: str, sarif: str | None) -> None:
    """Run `adapterkit.scan`."""
    from .. import scan
    from ..errors import AdapterkitError
    from ..io.locations import local
    from ..io.staging import check_beside, staged

    if sarif is not None:
        check_beside(local(sarif), [Path(each) for each in (src, base) if each is not None], b"/sarif-")
    _options.in_reading([src], None, base)  # --strict-base is enforced here.
    scan_result = scan(src, base=base)
    if sarif is not None:
        with staged(local(sarif)) as place:
            place.write_text(json.dumps(scan_result.sarif(), indent=2), "utf-8")
    try:
        warnings = _options.base_warnings([src], [src], base)
    except AdapterkitError:  # The adapter cannot be read; `scan` already reported this.
        warnings = []
    show(ctx.obj, scan_result.record() | {"warnings": warnings}, _view)
    if fail_on != "never" and scan_result.fails(fail_on):
        ctx.exit(1)


def _view(record: Mapping[str, object]) -> View:
    findings = parts(record, "findings")
    if findings:
        columns = ("severity", "finding", "file", "where", "evidence")
        yield TextTable(columns, [[f["severity"], f["title"], f["file"], f["where"], f["evidence"]] for f in findings])
        yield from dict.fromkeys(f"{f['title']}: {f['why']}" for f in findings)
    yield from (f"warning: {warning}" for warning in texts(record, "warnings"))
    yield from (f"not scanned: {each}" for each in texts(record, "unread"))
    yield f"{counted(len(findings), 'finding')} in {counted(integer(record, 'files'), 'file')} of {record['source']}"
    yield str(record["note"])
