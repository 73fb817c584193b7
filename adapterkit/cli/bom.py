"""Write a bill of materials for an adapter or a model.

PATH is an adapter, a merged model or an ONNX graph. The result is a CycloneDX 1.6 ML-BOM. It lists every file with its
SHA-256 digest, and each licence with its obligations. It names the base and the adapters as ancestors. The document has
a timestamp only if SOURCE_DATE_EPOCH is set. With the same timestamp and without --serial, the same files give the same
document.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

import click

from . import _options
from ._render import View, counted, integer, part, parts, show
from ._writing import is_done, made_from, refuse_place, show_written


@click.command(help=__doc__)
@click.argument("path")
@click.option("-o", "--out", metavar="FILE", help="File to write. Default: print the document.")
@click.option("--serial", is_flag=True, help="Add a random serial number to the document, for publishing.")
@_options.overwrite
@_options.flags
@click.pass_obj
def command(settings: _options.CliSettings, path: str, out: str | None, serial: bool, overwrite: bool) -> None:
    """Run `adapterkit.provenance.bom`."""
    from ..io.locations import local, located
    from ..io.staging import check_beside, digest_of
    from ..provenance import bom
    from ..provenance.bom import EPOCH
    from ..provenance.signing import files_of

    if out is None:
        sbom = bom(path, serial=serial)
        show(settings, sbom.data, lambda _: sbom.text().splitlines())
        return
    refuse_place(out)
    place, root = local(out), located(path)
    files = files_of(root, place)
    decided = digest_of([made_from(files), os.environ.get(EPOCH)])
    if is_done(settings, str(place), decided, overwrite):
        return
    check_beside(place, [root], b"cyclonedx")
    sbom = bom(path, serial=serial, leave_out=place)
    sbom.save(place, overwrite=overwrite, made_from=decided)
    main, ancestors = part(part(sbom.data, "metadata"), "component"), parts(sbom.data, "components")
    record = {"out": str(place), "name": main["name"], "files": len(files), "ancestors": len(ancestors)}
    show_written(settings, record, _view, decided)


def _view(record: Mapping[str, object]) -> View:
    files, ancestors = counted(integer(record, "files"), "file"), counted(integer(record, "ancestors"), "ancestor")
    yield f"{record['out']}: {record['name']}, {files}, {ancestors}"
