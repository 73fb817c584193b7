"""The options of commands that write an adapter, and the check whether an earlier run already wrote the same output."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ..formats._format import ON_LOSS
from . import _options, _render
from ._options import CliSettings, stated
from ._render import TextTable, View, counted, integer, number, parts, show, texts

if TYPE_CHECKING:
    from ..core.adapter import Adapter
    from ..io.strict_json import JsonValue


PLACES = {"out", "dst", "overwrite", "every"}
"""Names of parameters that do not change the content of the output; `made_from` ignores them."""


def made_from(files: Iterable[Path], packages: Sequence[str] = ()) -> str:
    """Return a digest of everything that determines a command's output: arguments, input files, package versions.

    Args:
        files: all files that the command reads.
        packages: names of distributions whose versions can change the output. adapterkit's version is always included.

    Raises:
        StorageError: a file cannot be read.
    """
    from importlib.metadata import PackageNotFoundError, version

    from .. import __version__
    from ..errors import storage_error
    from ..io.staging import digest_of, listed

    ctx = click.get_current_context()
    words = {name: value for name, value in ctx.params.items() if name not in PLACES} | stated()
    try:
        read = listed(files)
    except OSError as error:
        raise storage_error(error, error.filename or "a file") from error
    versions = {}
    for name in packages:
        # A package may be missing: for example, onnxruntime if only onnxruntime-gpu is installed.
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return digest_of([__version__, versions, ctx.command.name, words, read])


def is_done(settings: CliSettings, out: str, digest: str | None, overwrite: bool) -> bool:
    """Whether `out` is the unchanged output of an earlier run with the same digest. If so, print "already done".

    With --json, also print all that the earlier run printed.
    """
    from ..io.staging import Staging, kept_result, take_over

    if overwrite or digest is None:
        return False
    take_over(Path(out))  # Undo a killed run's unfinished renames, which may have moved the previous output away.
    if not Staging(Path(out)).is_finished(digest):
        return False
    show(settings, kept_result(Path(out)) | {"out": out, "already_done": True}, _view)
    return True


def show_written(
    settings: CliSettings, record: Mapping[str, object], view: Callable[[Mapping[str, object]], View],
    digest: str | None,
) -> None:  # fmt: skip
    """Print the result of a command that wrote the output `record["out"]`, and store the result for `is_done`.

    Args:
        settings: the settings of the command line.
        record: the result as plain data.
        view: see `show`.
        digest: the digest with which the output was written; None if it was written without one.
    """
    from ..io.staging import keep_result

    record = {**record, "already_done": record.get("already_done", False)}
    if digest is not None:
        keep_result(Path(str(record["out"])), digest, record)
    show(settings, record, view)


def _view(record: Mapping[str, object]) -> View:
    yield f"already done: {record['out']} was made from the same inputs and is unchanged"


F = TypeVar("F", bound=Callable[..., Any])

on_loss = click.option(
    "--on-loss", type=click.Choice(ON_LOSS), default="refuse", show_default=True,
    help="How to treat updates that the format cannot store. refuse: write nothing; fold: multiply scales into the "
    "factors; promote: convert the updates to a more general method; drop: omit the updates.",
)  # fmt: skip
max_error = click.option(
    "--max-error", type=click.FloatRange(0, 1, min_open=True, max_open=True), metavar="E",
    help="With --on-loss promote: a change that the format cannot store exactly may become a LoRA with a relative "
    "error of at most E.",
)  # fmt: skip
dtype = click.option("--dtype", metavar="D", help="Dtype of computed factors, e.g. BF16. Default: float32 or float64.")


def writing(default: str) -> Callable[[F], F]:
    """Add the options for the destination and the format of the result.

    Args:
        default: the text that describes the default format in the help.
    """
    out = click.option("-o", "--out", metavar="DST", required=True, help="File, folder or hub URI to write.")
    target_format = click.option(
        "--to", "target_format", callback=_options.format_name, metavar="FORMAT",
        help=f"Format of DST. Default: {default}.",
    )  # fmt: skip

    def decorated(command: F) -> F:
        for option in (_options.overwrite, on_loss, target_format, out):
            command = option(command)
        return command

    return decorated


class CommandDestination:
    """The destination of a command. It recognises the output of an earlier run of the same command.

    The arguments are those of `adapterkit.destination.Destination`, except that `format` is called `target_format`.
    """

    def __init__(
        self, out: str, sources: Sequence[str], overwrite: bool, *, target_format: str, base: str | None = None,
        inputs: Sequence[str] = (),
    ) -> None:  # fmt: skip
        from ..destination import Destination as Place

        self.place = Place(out, sources, overwrite, format=target_format, base=base, inputs=inputs)
        self.made_from: str | None = None

    def is_done(self, settings: _options.CliSettings) -> bool:
        """Whether an earlier run wrote this output from the same inputs. If so, print "already done".

        Raises:
            UsageError: the destination is one of the sources.
            StorageError: the destination exists and has other content.
        """
        if self.place.remote:
            return False
        self.made_from = made_from(self.place.files)
        if is_done(settings, self.place.out, self.made_from, self.place.overwrite):
            return True
        self.place.check()
        return False

    def write(self, adapter: Adapter, on_loss: str) -> dict[str, JsonValue]:
        """Write the adapter, and return the record of the `WriteResult`."""
        return self.place.write(adapter, on_loss, made_from=self.made_from).record()


def refuse_place(out: str) -> None:
    """Refuse an output on a hub, for commands that can write only to disk.

    Raises:
        Unsupported: `out` is an address on a hub.
    """
    from ..errors import Unsupported
    from ..io.locations import is_address

    if is_address(out):
        raise Unsupported("this command cannot write to a hub", path=out, cure="Write to a path on this disk")


def outcome(record: Mapping[str, object]) -> Iterable[str]:
    """Yield a line about the output, a line for each update that was omitted or rewritten, and the warnings."""
    updates, targets = counted(integer(record, "updates"), "update"), counted(integer(record, "targets"), "target")
    if record.get("already_done"):
        yield f"already done: {record['out']} contains this result"
        return
    yield f"{record['out']}: {record['to']}, {updates} at {targets}"
    yield from (f"  {loss}" for loss in texts(record, "losses"))
    yield from (f"warning: {warning}" for warning in texts(record, "warnings"))


def cuts_view(record: Mapping[str, object], every: bool) -> View:
    """Yield the report of a rank cut: a table of ranks, norms and errors, then lines about the output and the error.

    The table has a row for each target or, if there are many targets, for each module.
    """
    cuts = _render.in_order(parts(record, "cuts"))
    if every or len(cuts) <= _render.FEW:
        columns = ("target", "method", "rank before", "rank", "norm", "relative error")
        rows = [[c["target"], c["method"], c["before"], c["rank"], c["norm"], c["relative_error"]] for c in cuts]
        yield TextTable(columns, rows)
    else:
        headings = ("module", "targets", "layers", "rank before", "rank", "norm", "largest error", "in layer")
        yield TextTable(headings, [_cuts_row(*group) for group in _render.by_module(cuts)], ("layers", "norm"))
    yield from outcome(record)
    yield f"relative error over all targets: {number(record, 'relative_error'):.4g}"
    if len(cuts) > _render.FEW and not every:
        yield _render.HINT


def _cuts_row(module: str, group: Sequence[Mapping[str, object]], layers: Mapping[str, str]) -> list[object]:
    most = _render.largest(group, "relative_error")
    return [
        module, len(group), _render.layers_of(group, layers), _render.span([each["before"] for each in group]),
        _render.span([each["rank"] for each in group]), _render.together(group, "norm"),
        None if most is None else _render.short(most["relative_error"]), most and layers[str(most["target"])],
    ]  # fmt: skip
