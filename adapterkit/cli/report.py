"""Write an HTML page that shows what adapters change.

Each A is an adapter in any known format. The page shows norms by layer, spectra and ranks, overlaps and conflicts
between the adapters, and conclusions as sentences. The page works without a network. With --base, the page also
compares the adapters' changes with the weights of the base.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import click

from . import _options
from ._progress import progress
from ._render import View, counted, integer, parts, show, size, texts
from ._writing import is_done, made_from, show_written


@click.command(help=__doc__)
@click.argument("adapters", metavar="A...", nargs=-1, required=True)
@_options.base
@_options.strict_base_of_read
@click.option(
    "--merged", metavar="OUT",
    help="Merged model. The page shows how much of each adapter's change the merged model contains. Requires --base.",
)  # fmt: skip
@click.option(
    "--gate", metavar="FILE", help="Output of 'adapterkit gate ... --json'. The page shows it in a separate section."
)
@click.option("-o", "--out", metavar="HTML", help="Page to write; without it, only the conclusions are printed.")
@click.option("--figures", metavar="DIR", help="Folder to write every chart to, as PNG and SVG.")
@_options.rename
@_options.overwrite
@_options.flags
@click.pass_obj
def command(
    settings: _options.CliSettings, adapters: tuple[str, ...], base: str | None, merged: str | None, out: str | None,
    figures: str | None, gate: str | None, rename: tuple[str, ...], overwrite: bool,
) -> None:  # fmt: skip
    """Run `adapterkit.report`."""
    from .. import report
    from ..formats import files_read
    from ..io.locations import located
    from ..io.staging import check_free, check_inputs
    from ._writing import refuse_place

    if merged is not None and base is None:
        raise click.UsageError("--merged requires --base")
    decided = None
    if out is not None:
        refuse_place(out)
        sources = [*adapters, *(each for each in (base, merged) if each is not None)]
        files = [file for source in sources for file in files_read(located(source))]
        files += [] if gate is None else [Path(gate)]
        decided = made_from(files)
        drawn = figures is None or (Path(figures).is_dir() and any(Path(figures).iterdir()))
        if drawn and is_done(settings, out, decided, overwrite):
            return
        check_free(Path(out), overwrite)
        check_inputs([Path(out)], files)
    _options.in_reading(adapters, None, base)  # --strict-base is enforced here.
    with progress(settings, "report", sizes=False) as meter:
        page = report(list(adapters), base=base, merged=merged, rename=rename, gate=gate, progress=meter)
    record = page.record() | {"warnings": _options.base_warnings(adapters, adapters, base)}
    if out is not None:
        page.save(out, overwrite=overwrite, made_from=decided)
        record |= {"out": out, "bytes": Path(out).stat().st_size}
    if figures is not None:
        record["figures"] = [str(path) for path in page.figures(figures)]
    if out is None:
        show(settings, record, _view)
    else:
        show_written(settings, record, _view, decided)


def _view(record: Mapping[str, object]) -> View:
    for verdict in parts(record, "verdicts"):
        yield f"{verdict['level']}: {verdict['text']}"
    yield from (f"warning: {warning}" for warning in texts(record, "warnings"))
    if figures := texts(record, "figures"):
        yield f"{counted(len(figures), 'figure')} in {Path(figures[0]).parent}"
    if "out" in record:
        yield f"{record['out']}: {size(integer(record, 'bytes'))}, opens in any browser"
    else:
        yield "Add -o report.html to write the page with all numbers and charts"
