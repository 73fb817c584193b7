"""Upload an adapter or a model to a hub in one commit.

SRC is an adapter in any known format, or a folder of weights. URI is hf://org/repo[@branch][/folder],
oci://registry/name:tag or s3://bucket/path. If SRC has no README.md, a model card is generated. A README.md that a
merge copied from the base is replaced.
"""

from __future__ import annotations

from collections.abc import Mapping

import click

from ..formats._format import ON_LOSS
from . import _options
from ._graphs import warn
from ._render import TextTable, View, show, texts


@click.command(help=__doc__)
@click.argument("src")
@click.argument("uri")
@click.option(
    "--to", "target_format", callback=_options.format_name, metavar="FORMAT",
    help="Convert the adapter to this format first. By default, the files are uploaded unchanged.",
)  # fmt: skip
@_options.base
@click.option(
    "--on-loss", type=click.Choice(ON_LOSS), default="refuse", show_default=True,
    help="How to treat updates that the format of --to cannot store; see adapterkit convert --help.",
)  # fmt: skip
@click.option(
    "--shard-size", callback=_options.byte_count, metavar="SIZE",
    help="Split the weight files of a model into files of at most this size, e.g. 5GB. Default: do not split.",
)  # fmt: skip
@click.option("--private", is_flag=True, help="If the repository does not exist, create it as private.")
@click.option(
    "--revision", metavar="BRANCH", help="Branch to push to; created from the main branch if it does not exist."
)
@click.option("--tag", metavar="TAG", help="Tag to set on the commit.")
@click.option("--message", metavar="TEXT", help="Commit message.")
@click.option("--licence", "--license", "licence", metavar="ID", help="Licence for the model card, e.g. apache-2.0.")
@_options.strict_licence
@click.option("--dry-run", is_flag=True, help="Show what would be uploaded, but write nothing.")
@_options.overwrite
@_options.flags
@click.pass_obj
def command(
    settings: _options.CliSettings, src: str, uri: str, target_format: str | None, base: str | None, on_loss: str,
    shard_size: int | None, private: bool, revision: str | None, tag: str | None, message: str | None,
    licence: str | None, strict_licence: bool, dry_run: bool, overwrite: bool,
) -> None:  # fmt: skip
    """Run `adapterkit.hub.push`."""
    from ..hub import parse, push

    target = parse(uri)
    if revision is not None and target.revision is not None:
        raise click.UsageError("the branch is given twice: type it either after the @ or with --revision, not both")
    pushed = push(
        src, target if revision is None else target.at(revision), format=target_format, base=base, on_loss=on_loss,
        shard_size=shard_size, private=private, tag=tag, message=message, licence=licence,
        strict_licence=strict_licence, overwrite=overwrite, dry_run=dry_run,
    )  # fmt: skip
    warn(pushed.warnings)
    show(settings, pushed.record(), _view)


def _view(record: Mapping[str, object]) -> View:
    kinds = ("added", "replaced", "unchanged", "removed")
    yield TextTable(("file", "state"), [[name, kind] for kind in kinds for name in texts(record, kind)])
    if record["dry_run"]:
        creation = "; the repository would be created" if record["created"] else ""
        yield f"{record['uri']}: nothing was written{creation}"
    elif not any(record[kind] for kind in ("added", "replaced", "removed")):
        yield f"{record['uri']}: nothing to push, the hub already has all files"
    else:
        yield f"{record['uri']}: pushed" + (", in a new repository" if record["created"] else "")
    if record["card"] is not None:
        yield "README.md: generated model card"
    if record["tag"]:
        yield f"tagged {record['tag']}"
