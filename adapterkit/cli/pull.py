"""Fetch an adapter or a model from a hub, verified.

URI is hf://org/repo[@revision][/path], oci://registry/name:tag, s3://bucket/path, or of another hub; DST is the folder
to write. An interrupted pull goes on where it stopped when the same command is run again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from . import _options
from ._progress import progress
from ._render import TextTable, View, counted, show, size


@click.command(help=__doc__)
@click.argument("uri")
@click.argument("dst")
@click.option(
    "--include", "include", multiple=True, metavar="PATTERN", help="Only files that match, e.g. '*.json'; repeatable."
)
@click.option("--dry-run", is_flag=True, help="Show what would be fetched, and write nothing.")
@click.option("--scan", "scanned", is_flag=True, help="Scan the files first, as adapterkit scan does; findings refuse.")
@_options.overwrite
@_options.flags
@click.pass_obj
def command(
    settings: _options.CliSettings, uri: str, dst: str, include: tuple[str, ...], dry_run: bool, scanned: bool,
    overwrite: bool,
) -> None:  # fmt: skip
    """Runs `adapterkit.hub.pull`."""
    from ..hub import pull

    if scanned:
        _scan(uri)

    with progress(settings, "pull") as meter:
        pulled = pull(uri, dst, include=include, overwrite=overwrite, dry_run=dry_run, progress=meter)
    show(settings, pulled.record(), _view)


def _scan(uri: str) -> None:
    """Scan what is on the hub, in the cache, before anything is written to DST.

    Raises:
        CheckFailed: a finding is of medium severity or worse.
    """
    from .. import scan
    from ..errors import CheckFailed

    found = scan(uri)
    if found.fails():
        first = found.findings[0].record()
        place = ": ".join(part for part in (first["file"], first["where"]) if part)
        why = f"the scan found {counted(len(found.findings), 'thing')}, the worst in {place}: {first['title']}"
        raise CheckFailed(
            why, path=uri, cure=f"adapterkit scan {uri} shows all of them; pull without --scan to have it"
        )


def _view(record: Mapping[str, Any]) -> View:
    yield TextTable(("file", "bytes", "digest"), [[f["name"], f["bytes"], f["digest"][:23]] for f in record["files"]])
    files = f"{counted(len(record['files']), 'file')} of {size(record['bytes'])}"
    if record["dry_run"]:
        yield f"{record['uri']}: {files} to fetch"
        return
    if record["already_done"]:
        yield f"already done: {record['out']} holds {files} from {record['uri']}, unchanged"
        return
    plain = sum(file["digest"].startswith("unknown:") for file in record["files"])
    verified = f"{plain} by their sizes alone, no digests are told" if plain else "all verified"
    yield f"{record['out']}: {files} from {record['uri']}, {size(record['fetched'])} fetched, {verified}"
