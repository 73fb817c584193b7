"""What commands that write an adapter share: where to, in which format, over what."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ..formats._format import ON_LOSS
from . import _options
from ._done import is_done, made_from
from ._render import Table, counted

if TYPE_CHECKING:
    from ..adapter import Adapter

F = TypeVar("F", bound=Callable[..., Any])

on_loss = click.option(
    "--on-loss", type=click.Choice(ON_LOSS), default="refuse", show_default=True,
    help="What to do with what the format cannot say: fold scales into factors, promote to a wider method, or drop.",
)  # fmt: skip
max_error = click.option(
    "--max-error", type=click.FloatRange(0, 1, min_open=True, max_open=True), metavar="E",
    help="With --on-loss promote: the relative error of a change that its nearest LoRA may have.",
)  # fmt: skip
dtype = click.option("--dtype", metavar="D", help="Type of computed factors, e.g. BF16; float32 or wider if absent.")


def writing(command: F) -> F:
    """Where the result goes and how."""
    out = click.option("-o", "--out", metavar="DST", required=True, help="File, folder or uri to write.")
    target_format = click.option(
        "--to", "target_format", callback=_options.format_name, metavar="FORMAT",
        help="Format of DST; that of the source if absent, or adapterkit's own.",
    )  # fmt: skip
    for option in (_options.overwrite, on_loss, target_format, out):
        command = option(command)
    return command


class Destination:
    """Where a command writes an adapter: a path, or a place on a hub.

    Refuses, before any work, to write over a source, or over anything on this disk without leave; a hub is asked for
    leave when the adapter is made.

    Args:
        out: the path or uri.
        sources: what is read; a licence that all their model cards name is passed on to a hub.
        overwrite: replace what is there.
        target_format: the format to write.
        base: the base that is read, too.
        inputs: other files that are read.

    Raises:
        UsageError: the destination is a source.
        StorageError: something is there.
    """

    def __init__(
        self, out: str, sources: Sequence[str], overwrite: bool, *, target_format: str, base: str | None = None,
        inputs: Sequence[str] = (),
    ) -> None:  # fmt: skip
        from ..tensors.locations import is_address

        self.out, self.sources, self.overwrite, self.base = out, sources, overwrite, base
        self.target_format = target_format
        self.inputs = [*sources, *inputs, *([] if base is None else [base])]
        self.remote = is_address(out)
        self.made_from: str | None = None
        self.unchanged = False
        if self.remote:
            _check_place(sources, out)

    def is_done(self, settings: _options.Settings) -> bool:
        """Whether an earlier run made the same output from the same inputs; then this says so.

        Raises:
            UsageError: the destination is a source.
            StorageError: something else is there.
        """
        from ..formats import files_read
        from ..tensors.locations import located

        if self.remote:
            return False
        files = [file for source in self.inputs for file in files_read(located(source))]
        self.made_from = made_from(files)
        if is_done(settings, self.out, self.made_from, self.overwrite):
            return True
        self._check_path(files)
        return False

    def write(
        self, adapter: Adapter, on_loss: str, profile: str | None = None, max_error: float | None = None
    ) -> dict[str, Any]:
        """Writes the adapter, and pushes it where it is to be on a hub; what was written as plain data."""
        from .. import write

        with self._path() as path:
            losses = write(
                adapter, path, self.target_format, self.base, on_loss, profile=profile, max_error=max_error,
                overwrite=self.overwrite or self.remote, made_from=self.made_from,
            )  # fmt: skip
        return {
            "out": self.out, "to": self.target_format, "targets": len(adapter.updates), "updates": len(adapter),
            "losses": losses, **({"already_done": True} if self.unchanged else {}),
        }  # fmt: skip

    @contextmanager
    def _path(self) -> Iterator[Path]:
        import shutil

        from ..formats import FORMATS
        from ..tensors.locations import outgoing

        if not self.remote:
            yield Path(self.out)
            return

        def unchanged() -> None:
            self.unchanged = True

        options: Any = {"overwrite": self.overwrite, "sources": self.sources, "unchanged": unchanged}
        with outgoing(self.out, **options) as folder:
            # What an interrupted command left may be of another format: it is made anew, not gone on with.
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            yield folder / FORMATS[self.target_format].file

    def _check_path(self, files: Sequence[Path]) -> None:
        """Refuse, before any work, what is taken and what would replace a source."""
        from ..errors import UsageError
        from ..formats import FORMATS
        from ..tensors.staging import check_free, check_inputs, replaced_at, take_over

        path = Path(self.out)
        if path.exists() and any(Path(source).exists() and Path(source).samefile(path) for source in self.inputs):
            raise UsageError("source and destination are the same", path=path, cure="Write to another path")
        take_over(path)
        check_free(path, self.overwrite)
        check_inputs(replaced_at(path, FORMATS[self.target_format].owns), files)


def refuse_place(out: str) -> None:
    """Refuses to write what no hub takes from adapterkit: graphs.

    Raises:
        Unsupported: `out` is a place on a hub.
    """
    from ..errors import Unsupported
    from ..tensors.locations import is_address

    if is_address(out):
        raise Unsupported("graphs are not pushed to hubs", path=out, cure="Write to a path on this disk")


def _check_place(sources: Iterable[str], out: str) -> None:
    from ..errors import UsageError
    from ..hub import parse
    from ..tensors.locations import is_remote

    if any(is_remote(source) and parse(source) == parse(out) for source in sources):
        raise UsageError("source and destination are the same", path=out, cure="Write to another place")


def outcome(record: Mapping[str, Any]) -> Iterable[str]:
    """The lines for people: what was written, and what was lost by that."""
    updates, targets = counted(record["updates"], "update"), counted(record["targets"], "target")
    if record.get("already_done"):
        yield f"already done: {record['out']} holds the same"
        return
    yield f"{record['out']}: {record['to']}, {updates} at {targets}"
    yield from (f"  {loss}" for loss in record["losses"])
    yield from (f"warning: {warning}" for warning in record.get("warnings", ()))


def cuts_table(cuts: Sequence[Mapping[str, Any]]) -> Table:
    """What became of each target."""
    columns = ("target", "method", "rank before", "rank", "norm", "relative error")
    return Table(
        columns,
        [[c["target"], c["method"], c["before"], c["rank"], c["norm"], c["relative_error"]] for c in cuts],
    )
