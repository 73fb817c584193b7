"""Write an adapter to a local path or a hub; the destination is checked before any other work starts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .core.tables import html_table
from .errors import UsageError, public
from .formats import FORMATS, files_read
from .io.locations import is_address, is_remote, located, path_text
from .io.staging import check_free, check_inputs, replaced_at, take_over
from .writing import write

if TYPE_CHECKING:
    from os import PathLike

    from .core.adapter import Adapter
    from .io.checkpoint import Checkpoint
    from .io.strict_json import JsonValue


@dataclass(frozen=True, slots=True)
class WriteResult:
    """The result of writing an adapter.

    Attributes:
        out: the path or the URI of the output.
        format: the name of the format in which the adapter was written.
        targets: the number of targets.
        updates: the number of updates.
        losses: one line for each update that was omitted or rewritten; see `on_loss` of `adapterkit.write`.
        warnings: further warnings, for example that the adapter was made for another base.
        already_done: True if nothing was written, because the destination already had the same output.
    """

    out: str
    format: str
    targets: int
    updates: int
    losses: tuple[str, ...]
    warnings: tuple[str, ...] = ()
    already_done: bool = False

    def __repr__(self) -> str:
        summary = f", {len(self.losses):,} losses" if self.losses else ""
        summary += f", {len(self.warnings):,} warnings" if self.warnings else ""
        return f"WriteResult({public(self.out)!r}: {self.format}, {self.updates:,} updates{summary})"

    def _repr_html_(self) -> str:
        rows = [["loss", loss] for loss in self.losses] + [["warning", warning] for warning in self.warnings]
        return html_table(repr(self), ("kind", "what"), rows)

    def record(self) -> dict[str, JsonValue]:
        """Return the result as plain data, for `--json`."""
        return {
            "out": self.out, "to": self.format, "targets": self.targets, "updates": self.updates,
            "losses": list(self.losses), "already_done": self.already_done,
        }  # fmt: skip


class Destination:
    """The destination of an adapter, checked before any work is done.

    Args:
        out: the path or the URI to write to.
        sources: the adapters (or tuned models) that are read. If all their model cards name the same licence, the card
            of a pushed adapter names this licence too.
        overwrite: replace an existing output.
        format: the format to write.
        base: the base, as a path, an address or an opened checkpoint; None if no base is used.
        inputs: the paths or addresses of other inputs, which the output must not replace either.

    Raises:
        UsageError: the destination is on a hub, and a source has the same address.
    """

    def __init__(
        self, out: str, sources: Sequence[str], overwrite: bool, *, format: str,  # noqa: A002 - as in `write`
        base: Checkpoint | str | PathLike[str] | None = None, inputs: Sequence[str] = (),
    ) -> None:  # fmt: skip
        self.out = path_text(out)
        self.sources, self.overwrite, self.format, self.base = sources, overwrite, format, base
        beside = [base] if isinstance(base, (str, Path)) else []
        self.inputs = [*sources, *inputs, *map(str, beside)]
        self.remote = is_address(out)
        if self.remote:
            from .hub import parse

            if any(is_remote(source) and parse(source) == parse(out) for source in sources):
                why = "the source and the destination are the same"
                raise UsageError(why, path=out, cure="Write to another address")

    @cached_property
    def files(self) -> list[Path]:
        """The local files of all inputs, which the output must not replace."""
        return [file for source in self.inputs for file in files_read(located(source))]

    def check(self) -> None:
        """Refuse an output path that already exists, or an output that would replace an input.

        If the destination is on a hub, its files are checked only during the push.

        Raises:
            UsageError: the output would replace an input file.
            StorageError: the path exists, and `overwrite` is not set; or another process is writing to the path.
        """
        if self.remote:
            return
        path = Path(self.out)
        if path.exists() and any(Path(source).exists() and Path(source).samefile(path) for source in self.inputs):
            raise UsageError("the source and the destination are the same", path=path, cure="Write to another path")
        take_over(path)
        check_free(path, self.overwrite)
        check_inputs(replaced_at(path, FORMATS[self.format].owns), self.files)

    def write(
        self, adapter: Adapter, on_loss: str, *, profile: str | None = None, max_error: float | None = None,
        base: Checkpoint | None = None, made_from: str | None = None, warnings: Iterable[str] = (),
    ) -> WriteResult:  # fmt: skip
        """Write the adapter, and push it if the destination is on a hub.

        Args:
            adapter: the adapter.
            on_loss: what to do with updates that the format cannot express; see `adapterkit.write`.
            profile: the name of the program that will load the output, if this program supports only a part of the
                format.
            max_error: with `on_loss="promote"`, the largest relative error that an approximated change may have.
            base: the opened base; None to use the `base` that was passed to the constructor.
            made_from: a digest of all inputs and options. It is stored with the output.
            warnings: warnings to include in the result.
        """
        unchanged: list[bool] = []
        with self._path(lambda: unchanged.append(True)) as path:
            losses = write(
                adapter, path, self.format, self.base if base is None else base, on_loss, profile=profile,
                max_error=max_error, overwrite=self.overwrite or self.remote, made_from=made_from,
            )  # fmt: skip
        updates = len(adapter)
        return WriteResult(
            self.out, self.format, len(adapter.updates), updates, tuple(losses), tuple(warnings), bool(unchanged)
        )

    @contextmanager
    def _path(self, unchanged: Callable[[], object]) -> Iterator[Path]:
        import shutil

        from .io.locations import outgoing

        if not self.remote:
            yield Path(self.out)
            return
        options: Any = {"overwrite": self.overwrite, "sources": self.sources, "unchanged": unchanged}
        with outgoing(self.out, **options) as folder:
            # Start with an empty folder: an interrupted command may have left files of another format.
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            yield folder / FORMATS[self.format].file
