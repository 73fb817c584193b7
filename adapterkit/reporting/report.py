"""Create a report about adapters, show it in notebooks, and write it as a page and as pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from ..errors import StorageError, UsageError, storage_error
from .charts import Chart, charts, png, svg
from .facts import Facts, facts_of
from .gate_section import GateFigures
from .measuring import Measurements, measure
from .verdicts import Verdict, verdicts

if TYPE_CHECKING:
    from os import PathLike

    from ..core.adapter import Adapter
    from ..io.checkpoint import Checkpoint
    from ..io.strict_json import JsonValue


@dataclass(frozen=True, eq=False)
class AdapterReport:
    """A report about adapters. Notebooks display it.

    Attributes:
        facts: the values from the headers, one entry per adapter.
        measured: all measured numbers.
        verdicts: sentences about the numbers, faults first.
        base: the name of the base, or None.
        merged: the name of the merged model, or None.
        seconds: the duration of the measurements.
        gate: the figures of a gate, or None.
    """

    facts: tuple[Facts, ...]
    measured: Measurements
    verdicts: tuple[Verdict, ...]
    base: str | None = None
    merged: str | None = None
    seconds: float = 0.0
    gate: GateFigures | None = None

    @cached_property
    def charts(self) -> list[Chart]:
        """The pictures, as Vega-Lite specifications; `html` and `figures` draw them."""
        return charts(self.measured)

    def record(self) -> dict[str, JsonValue]:
        """Return the report as plain data."""
        return {
            "kind": "report", "base": self.base, "merged": self.merged, "seconds": round(self.seconds, 3),
            "facts": [facts.record() for facts in self.facts], "verdicts": [asdict(each) for each in self.verdicts],
            **({} if self.gate is None else {"gate": msgspec.to_builtins(self.gate)}),
            **self.measured.record(),
        }  # fmt: skip

    def html(self) -> str:
        """Return the report as one HTML page that needs no other files.

        Raises:
            Unsupported: the package vl-convert-python is not installed.
        """
        from .page import page

        return page(self)

    def save(self, out: str | PathLike[str], *, overwrite: bool = False, made_from: str | None = None) -> Path:
        """Write the report as one HTML file, atomically.

        Args:
            out: the file.
            overwrite: replace an existing file.
            made_from: a digest of everything that determines the page. The digest is stored with the page, so that a
                later run can skip the work; see `io.staging`.

        Raises:
            StorageError: `out` exists, or cannot be written.
            UsageError: the name of `out` has the suffix of a file type other than HTML.
            Unsupported: the package that draws charts is not installed.
        """
        from ..io.staging import check_free, staged

        path = Path(out)
        if path.is_dir():
            raise StorageError("a folder is there", path=path, cure="Name a file, such as report.html")
        if path.suffix.lower() not in ("", ".html", ".htm"):
            cure = f"Name {path.with_suffix('.html')}; --figures DIR (figures=) writes pictures"
            raise UsageError(f"a report is an HTML page, not {path.suffix}", path=path, cure=cure)
        check_free(path, overwrite)
        data = self.html().encode()
        with staged(path, overwrite=overwrite, made_from=made_from) as place:
            place.write_bytes(data)
        return path

    def figures(self, folder: str | PathLike[str]) -> list[Path]:
        """Write every chart as PNG and SVG into a folder; return the files. Existing files are replaced.

        Raises:
            StorageError: the folder is not writable.
            Unsupported: the package vl-convert-python is not installed.
        """
        from ..io.atomic import write_bytes

        place = Path(folder)
        try:
            place.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise storage_error(error, place) from error
        written = []
        for chart in self.charts:
            for ending, data in ((".svg", svg(chart).encode()), (".png", png(chart))):
                write_bytes(place / f"{chart.name}{ending}", data)
                written.append(place / f"{chart.name}{ending}")
        return written

    def _repr_html_(self) -> str:
        from .page import fragment

        return fragment(self)

    def __repr__(self) -> str:
        names = ", ".join(facts.name for facts in self.facts)
        counts = {level: sum(each.level == level for each in self.verdicts) for level in ("fault", "warning", "note")}
        told = ", ".join(f"{count} {level}{'' if count == 1 else 's'}" for level, count in counts.items() if count)
        return f"<adapterkit report on {names}: {told}>"


def made(
    adapters: Sequence[Adapter], names: Sequence[str], *, paths: Sequence[Path | None] = (),
    base: Checkpoint | None = None, merged: Checkpoint | None = None, rename: str | Sequence[str] = (),
    progress: Callable[[int, int], object] | None = None, gate: GateFigures | None = None,
) -> AdapterReport:  # fmt: skip
    """Create a report.

    Args:
        adapters: the adapters.
        names: the adapters' names in the report, all different.
        paths: the path from which each adapter was read; None for an adapter in memory.
        base: the base of the adapters.
        merged: the model into which the adapters were merged; needs `base`.
        rename: rules for names of targets.
        progress: a function that is called with (units done, total units) of work.
        gate: the figures of a gate, shown in a separate section.

    Raises:
        AdapterkitError: as for `measuring.measure`.
    """
    import time

    started = time.perf_counter()
    where = list(paths) or [None] * len(adapters)
    facts = [facts_of(adapter, name, path) for adapter, name, path in zip(adapters, names, where, strict=True)]
    weights = _weights(merged, len(adapters))
    measured = measure(
        adapters, names, base=_plain(base), merged=_plain(merged), weights=weights, rename=rename,
        progress=progress,
    )  # fmt: skip
    return AdapterReport(
        tuple(facts), measured, tuple(verdicts(measured, facts)), None if base is None else str(base.root),
        None if merged is None else str(merged.root), time.perf_counter() - started, gate,
    )  # fmt: skip


def _plain(base: Checkpoint | None) -> Checkpoint | None:
    """Return the checkpoint with its quantized weights dequantized."""
    from ..quant import dequantized, is_quantized

    return dequantized(base) if base is not None and is_quantized(base) else base


def _weights(merged: Checkpoint | None, count: int) -> list[float] | None:
    """Return the weights of the adapters in a merge, from the record that the merge wrote."""
    if merged is None:
        return None
    from ..naming.binding.fitting import merge_record

    told = merge_record(merged).get("adapters")
    if not isinstance(told, list) or len(told) != count:
        return None
    found = [each.get("weight") if isinstance(each, dict) else None for each in told]
    return [float(value) for value in found] if all(isinstance(value, (int, float)) for value in found) else None  # type: ignore[arg-type]
