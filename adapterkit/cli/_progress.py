"""Show on standard error what a command does: the current step, and the progress of long work.

By default, steps are printed only after a command has run for a few seconds; with -v, every step is printed. On a
terminal, progress is a bar; in a log, it is a line every few seconds. For short work, no progress is shown.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

import click

from ..io.stages import LOGGER
from ._options import CliSettings
from ._render import folded, printable, remark, size

if TYPE_CHECKING:
    from rich.progress import Progress

PATIENCE = 2.0
"""On a terminal, the steps of a command are printed only after the command has run for this many seconds."""

PLAIN_PATIENCE = 5.0
"""Used instead of `PATIENCE` if standard error is not a terminal. ADAPTERKIT_PATIENCE overrides both values."""

AGAIN = 10.0
"""The number of seconds after which the line of a running step is printed again."""

STAGES = "adapterkit.stages"
"""Key in click's `Context.meta` for the `StageLines` of the running command."""

busy = threading.Event()
"""Set while a progress meter is active. While it is set, `StageLines` prints no step unless -v is given."""


class StageLines(logging.Handler):
    """Print the steps of a command.

    By default, steps are printed only after the command has run for `PATIENCE` seconds (`PLAIN_PATIENCE` if standard
    error is not a terminal). With -v, every step is printed; with -vv, details are printed too.
    """

    def __init__(self, command: str, verbose: int) -> None:
        super().__init__(logging.DEBUG if verbose > 1 else logging.INFO)
        self.command, self.verbose = command, verbose
        self.started = time.monotonic()
        self.text = "working"
        self.patience = _seconds("ADAPTERKIT_PATIENCE", PATIENCE if sys.stderr.isatty() else PLAIN_PATIENCE)
        self.due = self.started + self.patience
        self.done = threading.Event()
        self.spoken = threading.Lock()
        self.watch = threading.Thread(target=self._watch, daemon=True)

    def emit(self, record: logging.LogRecord) -> None:
        now = time.monotonic()
        with self.spoken:
            if record.levelno >= logging.INFO:
                self.text = record.getMessage()
                # Once a command has run for `patience` seconds, print every new step as soon as the step begins.
                late = now - self.started >= self.patience and not busy.is_set()
                if self.verbose or late:
                    self._say(now)
            else:
                self._print(f"{self.command}: {record.getMessage()}")

    def _watch(self) -> None:
        while not self.done.wait(max(0.05, self.due - time.monotonic())):
            now = time.monotonic()
            with self.spoken:
                if now >= self.due and not busy.is_set():
                    self._say(now)
                elif now >= self.due:
                    self.due = now + AGAIN

    def _say(self, now: float) -> None:
        self.due = now + AGAIN
        seconds = now - self.started
        self._print(f"{self.command}: {self.text}" + (f" ({seconds:.0f} s)" if seconds >= 1 else ""))

    def finish(self) -> None:
        """Print how long the command took and, with -vv, the peak memory of the process."""
        seconds = time.monotonic() - self.started
        memory = ""
        if self.verbose > 1 and sys.platform != "win32":
            import resource

            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            memory = f", at most {size(peak * (1 if sys.platform == 'darwin' else 1024))} of memory"
        self._print(f"{self.command}: {seconds:.2f} s{memory}")

    def _print(self, line: str) -> None:
        text = printable(line)
        remark(click.style(folded(text), dim=True) if sys.stderr.isatty() else text)


def _seconds(variable: str, usual: float) -> float:
    """Return the seconds in an environment variable, at least 0.1; `usual` if it is unset or not a number."""
    try:
        return max(0.1, float(os.environ.get(variable, usual)))
    except ValueError:
        return usual


@contextmanager
def stage_lines(settings: CliSettings) -> Iterator[StageLines | None]:
    """Print the steps of the command that runs in the block, as `StageLines` does; with --quiet, print nothing."""
    if settings.quiet:
        yield None
        return
    logger = logging.getLogger(LOGGER)
    handler = StageLines("adapterkit", settings.verbose)
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(handler.level)
    handler.watch.start()
    try:
        yield handler
    finally:
        handler.done.set()
        handler.watch.join()
        if settings.verbose:
            handler.finish()
        logger.removeHandler(handler)
        logger.setLevel(level)


DELAY = 1.0
"""A bar appears after this many seconds, so that short work shows no bar."""

INTERVAL = 5.0
"""The default number of seconds between two plain lines of progress; ADAPTERKIT_PROGRESS overrides it."""

TELLING = 0.02
"""The remaining time is shown once this share of the work is done; earlier estimates would be too inexact."""

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
        self.interval = _seconds("ADAPTERKIT_PROGRESS", INTERVAL)
        self.due = self.start + self.interval

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if now >= self.due:
            self.due = now + self.interval
            remark(line(self.label, done, total, now - self.start, sizes=self.sizes))

    def close(self) -> None:
        """Do nothing: only a bar must be closed."""


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
        """Stop the updates of the bar, and leave its last state on the terminal."""
        if self.drawn is not None:
            self.drawn.stop()


class _Heard:
    """A meter that wraps another meter, and keeps `busy` set until the work is done."""

    def __init__(self, meter: Meter) -> None:
        self.meter = meter

    def __call__(self, done: int, total: int) -> None:
        if done < total:
            busy.set()
        else:
            busy.clear()  # Let `StageLines` print again: the steps after this work may also take long.
        self.meter(done, total)

    def close(self) -> None:
        self.meter.close()


@contextmanager
def progress(settings: CliSettings, label: str, *, sizes: bool = True) -> Iterator[Meter | None]:
    """Yield a progress meter for the work in the block; with --quiet, yield None.

    Args:
        settings: the output settings of the command.
        label: the text in front of the progress bar or line.
        sizes: whether the work is counted in bytes. If not, bytes and speed are not shown.
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


def line(label: str, done: int, total: int, seconds: float, *, sizes: bool = True) -> str:
    """Return a line of progress as plain text: percentage, bytes, speed and remaining time."""
    speed = done / seconds if seconds > 0 else 0.0
    share = f"{done / total:.0%}" if total else "100%"
    # Show no remaining time at first: imports and slow starts lower the initial speed, so the time would be too long.
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

    counters: tuple[rich.ProgressColumn, ...] = (
        (rich.DownloadColumn(), rich.TransferSpeedColumn()) if sizes else (rich.TaskProgressColumn(),)
    )
    console = Console(file=sys.stderr)
    if console.width < NARROW:
        counters = (rich.TaskProgressColumn(),)
    columns = (rich.TextColumn("{task.description}"), rich.BarColumn(None if console.width < NARROW else 40), *counters)
    drawn = rich.Progress(*columns, rich.TimeRemainingColumn(), console=console, expand=console.width < NARROW)
    drawn.add_task(label, total=total)
    drawn.start()
    return drawn
