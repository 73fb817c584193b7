"""Show the current step of a command on standard error, after two seconds without output; with -v, every step."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import click

from ..io.stages import LOGGER
from ._options import CliSettings
from ._render import folded, printable, size

PATIENCE = 2.0
"""On a terminal, seconds without output after which a line with the current step is printed."""

PLAIN_PATIENCE = 5.0
"""The same limit if standard error is not a terminal (e.g. a log). ADAPTERKIT_PATIENCE overrides both limits."""

AGAIN = 10.0
"""Seconds between two lines about the same step."""

STAGES = "adapterkit.stages"
"""Key in click's `Context.meta` for the `StageLines` of the running command."""

busy = threading.Event()
"""Set while a progress meter reports; this module prints nothing meanwhile."""


class StageLines(logging.Handler):
    """Print the steps of a command: by default, only long steps; with -v, every step; with -vv, also details."""

    def __init__(self, command: str, verbose: int) -> None:
        super().__init__(logging.DEBUG if verbose > 1 else logging.INFO)
        self.command, self.verbose = command, verbose
        self.started = time.monotonic()
        self.text = "working"
        self.patience = _patience()
        self.due = self.started + self.patience
        self.done = threading.Event()
        self.spoken = threading.Lock()
        self.watch = threading.Thread(target=self._watch, daemon=True)

    def emit(self, record: logging.LogRecord) -> None:
        now = time.monotonic()
        with self.spoken:
            if record.levelno >= logging.INFO:
                self.text = record.getMessage()
                # Once a command has run for `patience` seconds, print each further step when it begins.
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
        """Print how long the command took, and with -vv how much memory it used."""
        seconds = time.monotonic() - self.started
        memory = ""
        if self.verbose > 1 and sys.platform != "win32":
            import resource

            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            memory = f", at most {size(peak * (1 if sys.platform == 'darwin' else 1024))} of memory"
        self._print(f"{self.command}: {seconds:.2f} s{memory}")

    def _print(self, line: str) -> None:
        text = printable(line)
        click.echo(click.style(folded(text), dim=True) if sys.stderr.isatty() else text, err=True)


def _patience() -> float:
    usual = PATIENCE if sys.stderr.isatty() else PLAIN_PATIENCE
    try:
        return max(0.1, float(os.environ.get("ADAPTERKIT_PATIENCE", usual)))
    except ValueError:
        return usual


@contextmanager
def stage_lines(settings: CliSettings) -> Iterator[StageLines | None]:
    """Print the steps of a command while it runs; print nothing with --quiet."""
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
