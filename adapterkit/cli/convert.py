"""Convert an adapter to another format.

SRC is an adapter in any known format; DST is the file, folder or hub URI to write. If the target format cannot express
some updates, the command lists these updates and writes nothing, unless --on-loss allows it to rewrite or drop them.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import click

from ..core.adapter import collection_off
from . import _options, _writing
from ._render import View, counted, integer, texts


@click.command(help=__doc__)
@click.argument("src")
@click.argument("dst")
@click.option(
    "--to", "target_format", callback=_options.format_name, metavar="FORMAT", required=True, help="Format of DST."
)
@_options.reading
@_writing.on_loss
@_writing.max_error
@click.option(
    "--profile", metavar="NAME", help="Write for a program, such as vllm, that supports only a part of the format."
)
@click.option(
    "--match-base", is_flag=True,
    help="Name the targets as in --base, and split or fuse targets so that each one matches a weight of --base.",
)  # fmt: skip
@_options.rename
@_options.overwrite
@_options.flags
@click.pass_obj
def command(
    settings: _options.CliSettings, src: str, dst: str, target_format: str, source_format: str | None, base: str | None,
    compat: str | None, on_loss: str, max_error: float | None, profile: str | None, match_base: bool,
    rename: tuple[str, ...], overwrite: bool,
) -> None:  # fmt: skip
    """Run `adapterkit.convert`."""
    from .. import convert, detect
    from ..io.inputs import inputs_kept

    with _without_collection(), inputs_kept():
        name = source_format or detect(src)
        destination = _writing.CommandDestination(dst, [src], overwrite, target_format=target_format, base=base)
        if destination.is_done(settings):
            return
        result = convert(
            src, dst, to=target_format, format=name, base=base, compat=compat, on_loss=on_loss, max_error=max_error,
            profile=profile, match_base=match_base, rename=rename, overwrite=overwrite,
            made_from=destination.made_from, **_options.stated(),
        )  # fmt: skip
    record = {"source": src, "from": name, **result.record(), "warnings": list(result.warnings)}
    _writing.show_written(settings, record, _view, destination.made_from)


@contextmanager
def _without_collection() -> Iterator[None]:
    """Switch garbage collection off inside the block, and exclude the existing objects from later collections.

    Garbage collection took a quarter of the time of a conversion, and freed no memory.
    """
    with collection_off():
        try:
            yield
        finally:
            gc.freeze()


def _view(record: Mapping[str, object]) -> View:
    updates, targets = counted(integer(record, "updates"), "update"), counted(integer(record, "targets"), "target")
    if record.get("already_done"):
        yield f"already done: {record['out']} contains this result"
        return
    yield f"{record['out']}: {record['to']}, {updates} at {targets} from {record['from']}"
    yield from (f"  {loss}" for loss in texts(record, "losses"))
    yield from (f"warning: {warning}" for warning in texts(record, "warnings"))
