"""Write an adapter in another format.

SRC is read in any known format; DST is the file or folder to write. What the target format cannot say is refused and
listed, unless --on-loss allows to rewrite it or to leave it out.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from ..formats._format import ON_LOSS
from . import _options
from ._render import View, counted, show


@click.command(help=__doc__)
@click.argument("src")
@click.argument("dst")
@click.option(
    "--to", "target_format", callback=_options.format_name, metavar="FORMAT", required=True, help="Format of DST."
)
@_options.reading
@click.option(
    "--on-loss", type=click.Choice(ON_LOSS), default="refuse", show_default=True,
    help="What to do with what the format cannot say: fold scales into factors, promote to a wider method, or drop.",
)  # fmt: skip
@click.option("--profile", metavar="NAME", help="Write for a consumer that takes only a part of the format: vllm, ...")
@_options.overwrite
@_options.flags
@click.pass_obj
def command(
    settings: _options.Settings, src: str, dst: str, target_format: str, source_format: str | None, base: str | None,
    compat: str | None, on_loss: str, profile: str | None, overwrite: bool,
) -> None:  # fmt: skip
    """Runs `adapterkit.read` and `adapterkit.write`."""
    from .. import detect, read, write

    name = source_format or detect(src)
    _check_destination(Path(src), Path(dst), overwrite)
    adapter = read(src, name, base, compat=compat)
    losses = write(adapter, dst, target_format, base, on_loss, profile=profile)
    record = {
        "source": src, "out": dst, "from": name, "to": target_format,
        "targets": len(adapter.updates), "updates": len(adapter), "losses": losses,
    }  # fmt: skip
    show(settings, record, _view)


def _check_destination(src: Path, dst: Path, overwrite: bool) -> None:
    from ..errors import StorageError, UsageError

    if dst.exists() and src.samefile(dst):
        raise UsageError("source and destination are the same", path=dst, cure="Write to another path")
    taken = any(dst.iterdir()) if dst.is_dir() else dst.exists()
    if taken and not overwrite:
        raise StorageError("already there", path=dst, cure="Write to another path, or pass --overwrite")


def _view(record: Mapping[str, Any]) -> View:
    updates, targets = counted(record["updates"], "update"), counted(record["targets"], "target")
    yield f"{record['out']}: {record['to']}, {updates} at {targets} from {record['from']}"
    yield from (f"  {loss}" for loss in record["losses"])
