"""Put an adapter or a model on a hub, in one commit.

SRC is an adapter in any known format or a folder of weights; URI is hf://org/repo[@branch][/folder],
oci://registry/name:tag or s3://bucket/path. Without a README.md a model card is
generated; that of a base which came along with a merge counts for none.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from ..formats._format import ON_LOSS
from . import _options
from ._graphs import warn
from ._render import TextTable, View, show


@click.command(help=__doc__)
@click.argument("src")
@click.argument("uri")
@click.option(
    "--to", "target_format", callback=_options.format_name, metavar="FORMAT",
    help="Push the adapter in this format; as it lies there if absent.",
)  # fmt: skip
@_options.base
@click.option("--on-loss", type=click.Choice(ON_LOSS), default="refuse", show_default=True, help="As for convert.")
@click.option(
    "--shard-size", callback=_options.byte_count, metavar="SIZE",
    help="Largest weight file of a model, e.g. 5GB; larger ones are parted. As they lie there if absent.",
)  # fmt: skip
@click.option("--private", is_flag=True, help="Make a private repository, where there is none.")
@click.option("--revision", metavar="BRANCH", help="The branch to push to; made from the main one where there is none.")
@click.option("--tag", metavar="TAG", help="Set this tag on the commit.")
@click.option("--message", metavar="TEXT", help="Message of the commit.")
@click.option("--licence", "--license", "licence", metavar="ID", help="Licence for the model card, e.g. apache-2.0.")
@_options.strict_licence
@click.option("--dry-run", is_flag=True, help="Show what would be pushed, and write nothing.")
@_options.overwrite
@_options.flags
@click.pass_obj
def command(
    settings: _options.CliSettings, src: str, uri: str, target_format: str | None, base: str | None, on_loss: str,
    shard_size: int | None, private: bool, revision: str | None, tag: str | None, message: str | None,
    licence: str | None, strict_licence: bool, dry_run: bool, overwrite: bool,
) -> None:  # fmt: skip
    """Runs `adapterkit.hub.push`."""
    from ..hub import parse, push

    target = parse(uri)
    if revision is not None and target.revision is not None:
        raise click.UsageError("name the branch once: after the @ or by --revision")
    pushed = push(
        src, target if revision is None else target.at(revision), format=target_format, base=base, on_loss=on_loss,
        shard_size=shard_size, private=private, tag=tag, message=message, licence=licence,
        strict_licence=strict_licence, overwrite=overwrite, dry_run=dry_run,
    )  # fmt: skip
    warn(pushed.warnings)
    show(settings, pushed.record(), _view)


def _view(record: Mapping[str, Any]) -> View:
    kinds = ("added", "replaced", "unchanged", "removed")
    yield TextTable(("file", "state"), [[name, kind] for kind in kinds for name in record[kind]])
    if record["dry_run"]:
        yield f"{record['uri']}: nothing was written" + ("; the repository would be made" if record["created"] else "")
    elif not any(record[kind] for kind in ("added", "replaced", "removed")):
        yield f"{record['uri']}: all there already"
    else:
        yield f"{record['uri']}: pushed" + (", in a new repository" if record["created"] else "")
    if record["card"] is not None:
        yield "README.md: a model card, generated"
    if record["tag"]:
        yield f"tagged {record['tag']}"
