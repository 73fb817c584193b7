"""Show progress on standard error: a bar on a terminal, a line every few seconds in a log; nothing for short work."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

import click

from ._options import CliSettings
from ._render import printable, size
from ._stages import busy

if TYPE_CHECKING:
    from rich.progress import Progress

DELAY = 1.0
"""Seconds until a bar appears; work that takes less time shows no bar."""

INTERVAL = 5.0
"""Default of the seconds between two plain lines; ADAPTERKIT_PROGRESS overrides it."""

TELLING = 0.02
"""The remaining time is estimated once this share of the work is done."""

NARROW = 72
"""On a terminal with fewer columns, the bar is shown without bytes and speed."""


class Meter(Protocol):
    """A callback to which the library reports its progress."""

    def __call__(self, done: int, total: int) -> None: ...

    def close(self) -> None: ...


class Lines:
    """A meter that prints a plain line every few seconds."""

    def __init__(self, label: str, sizes: bool = True) -> None:
        self.label, self.sizes, self.start = label, sizes, time.monotonic()
        self.interval = _interval()
        self.due = self.start + self.interval

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if now >= self.due:
            self.due = now + self.interval
            click.echo(line(self.label, done, total, now - self.start, sizes=self.sizes), err=True)

    def close(self) -> None:
        """Do nothing: a plain meter has nothing to close."""


class Bar:
    """A meter that draws a bar with bytes, speed and remaining time."""

    def __init__(self, label: str, sizes: bool = True) -> None:
        self.label, self.sizes, self.due = label, sizes, time.monotonic() + DELAY
        self.drawn: Progress | None = None

    def __call__(self, done: int, total: int) -> None:
        if self.drawn is None and time.monotonic() >= self.due:
            self.drawn = _draw(self.label, total, self.sizes)
        if self.drawn is not None:
            self.drawn.update(self.drawn.task_ids[0], completed=done, total=total)

    def close(self) -> None:
        """Stop drawing and leave the last state of the bar on the terminal."""
        if self.drawn is not None:
            self.drawn.stop()


class _Heard:
    """A meter that calls another meter, and stops `_stages` from printing lines until the work is done."""

    def __init__(self, meter: Meter) -> None:
        self.meter = meter

    def __call__(self, done: int, total: int) -> None:
        if done < total:
            busy.set()
        else:
            busy.clear()  # Let `_stages` print again: steps after the last byte may also take long.
        self.meter(done, total)

    def close(self) -> None:
        self.meter.close()


@contextmanager
def progress(settings: CliSettings, label: str, *, sizes: bool = True) -> Iterator[Meter | None]:
    """Yield a progress meter for some work, or None with --quiet.

    Args:
        settings: the output settings of the command.
        label: the name of the work.
        sizes: whether progress is counted in bytes; if not, only the percentage is shown.
    """
    if settings.quiet:
        yield None
        return
    label = printable(label)
    meter: Meter = Bar(label, sizes) if sys.stderr.isatty() else Lines(label, sizes)
    try:
        yield _Heard(meter)
    finally:
        busy.clear()
        meter.close()


def _interval() -> float:
    try:
        return max(0.1, float(os.environ.get("ADAPTERKIT_PROGRESS", INTERVAL)))
    except ValueError:
        return INTERVAL


def line(label: str, done: int, total: int, seconds: float, *, sizes: bool = True) -> str:
    """Return a line of progress as plain text: percentage, bytes, speed and remaining time."""
    speed = done / seconds if seconds > 0 else 0.0
    share = f"{done / total:.0%}" if total else "100%"
    # Estimate no time at first, because the early speed includes imports and slow starts.
    left = f", {clock((total - done) / speed)} left" if speed > 0 and done >= total * TELLING else ""
    if not sizes:
        return f"{label}: {share}{left}"
    return f"{label}: {share}, {size(done)} of {size(total)}, {size(round(speed))}/s{left}"


def clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _draw(label: str, total: int, sizes: bool) -> Progress:
    from rich import progress as rich
    from rich.console import Console

    told: tuple[rich.ProgressColumn, ...] = (
        (rich.DownloadColumn(), rich.TransferSpeedColumn()) if sizes else (rich.TaskProgressColumn(),)
    )
    console = Console(file=sys.stderr)
    if console.width < NARROW:
        told = (rich.TaskProgressColumn(),)
    columns = (rich.TextColumn("{task.description}"), rich.BarColumn(None if console.width < NARROW else 40), *told)
    drawn = rich.Progress(*columns, rich.TimeRemainingColumn(), console=console, expand=console.width < NARROW)
    drawn.add_task(label, total=total)
    drawn.start()
    return drawn
