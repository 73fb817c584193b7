"""Download an adapter or a model from a hub and verify it.

URI is hf://org/repo[@revision][/path], oci://registry/name:tag, s3://bucket/path, or an address on another hub. DST is
the folder to write. Run an interrupted pull again to resume it.
"""

from __future__ import annotations

from collections.abc import Mapping

import click

from . import _options
from ._progress import progress
from ._render import TextTable, View, counted, integer, parts, show, size


@click.command(help=__doc__)
@click.argument("uri")
@click.argument("dst")
@click.option(
    "--include",
    "include",
    multiple=True,
    metavar="PATTERN",
    help="Download only files whose names match PATTERN, e.g. '*.json'. Repeatable.",
)
@click.option("--dry-run", is_flag=True, help="Show what would be downloaded, but write nothing.")
@click.option(
    "--scan", "scanned", is_flag=True,
    help="Scan the files first, as adapterkit scan does. Write nothing if a finding has medium severity or worse.",
)  # fmt: skip
@_options.overwrite
@_options.flags
@click.pass_obj
def command(
    settings: _options.CliSettings, uri: str, dst: str, include: tuple[str, ...], dry_run: bool, scanned: bool,
    overwrite: bool,
) -> None:  # fmt: skip
    """Run `adapterkit.hub.pull`."""
    from ..hub import pull

    if scanned:
        _scan(uri)

    with progress(settings, "pull") as meter:
        pulled = pull(uri, dst, include=include, overwrite=overwrite, dry_run=dry_run, progress=meter)
    show(settings, pulled.record(), _view)


def _scan(uri: str) -> None:
    """Download the hub's files into the cache and scan them, before anything is written to DST.

    Raises:
        CheckFailed: a finding has medium severity or worse.
    """
    from .. import scan
    from ..errors import CheckFailed

    findings = scan(uri)
    if findings.fails():
        first = findings.findings[0].record()
        place = ": ".join(part for part in (first["file"], first["where"]) if part)
        why = f"the scan has {counted(len(findings.findings), 'finding')}; the worst is in {place}: {first['title']}"
        cure = f"adapterkit scan {uri} shows all findings; to download anyway, pull without --scan"
        raise CheckFailed(why, path=uri, cure=cure)


def _view(record: Mapping[str, object]) -> View:
    listed = parts(record, "files")
    yield TextTable(("file", "bytes", "digest"), [[f["name"], f["bytes"], str(f["digest"])[:23]] for f in listed])
    files = f"{counted(len(listed), 'file')} of {size(integer(record, 'bytes'))}"
    if record["dry_run"]:
        yield f"{record['uri']}: {files} to download"
        return
    if record["already_done"]:
        yield f"already done: {record['out']} contains {files} from {record['uri']}, unchanged"
        return
    plain = sum(str(file["digest"]).startswith("unknown:") for file in listed)
    verified = f"{plain} verified by size alone, because the hub has no digest" if plain else "all verified"
    yield f"{record['out']}: {files} from {record['uri']}, {size(integer(record, 'fetched'))} downloaded, {verified}"
