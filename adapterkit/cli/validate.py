"""Check an adapter's file, shapes, values and fit to a base.

Nothing is written. The first error is reported, with the file and the location in the file.
"""

from __future__ import annotations

from collections.abc import Mapping

import click

from . import _options
from ._render import View, counted, integer, show, texts


@click.command(help=__doc__)
@click.argument("src")
@_options.reading
@_options.rename
@_options.flags
@click.pass_obj
def command(
    settings: _options.CliSettings, src: str, source_format: str | None, base: str | None, compat: str | None,
    rename: tuple[str, ...],
) -> None:  # fmt: skip
    """Run `adapterkit.read`, `Adapter.check_values` and `Adapter.bind`."""
    from .. import detect, read
    from ..errors import AdapterkitError
    from ..formats import warnings_of
    from ..io.inputs import inputs_kept

    if rename and base is None:
        raise click.UsageError("--rename requires --base")

    with inputs_kept():
        name = source_format or detect(src)
        adapter = read(src, name, base, compat=compat, **_options.stated())
    try:
        bound = adapter if base is None else adapter.bind(base, rename=rename)
        adapter.check_values()
    except AdapterkitError as error:
        raise error.at(path=src) from None
    record = {
        "ok": True, "path": src, "format": name, "targets": len(bound.updates), "updates": len(bound), "base": base,
        "warnings": warnings_of(adapter),
    }  # fmt: skip
    show(settings, record, _view)


def _view(record: Mapping[str, object]) -> View:
    fits = f", fits {record['base']}" if record["base"] else ""
    targets, updates = counted(integer(record, "targets"), "target"), counted(integer(record, "updates"), "update")
    yield f"{record['path']}: valid {record['format']}, {updates} at {targets}, all values finite{fits}"
    yield from (f"warning: {warning}" for warning in texts(record, "warnings"))
