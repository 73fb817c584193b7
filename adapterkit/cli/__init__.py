"""The command line: each command is a module of this package and a thin layer over one public function.

Only click and the standard library are imported before a command is named.
"""

from __future__ import annotations

import gc
import signal
from types import FrameType
from typing import NoReturn

import click

from .. import __version__
from ._commands import Commands

__all__ = ["adapterkit", "main"]

_EPILOG = """Exit codes: 0 fine, 1 a check failed, 2 wrong usage or invalid input, 3 unsupported, 4 damaged data,
5 network, 6 storage or memory, 70 a bug in adapterkit, 130 interrupted."""


@click.group(
    cls=Commands,
    package=__name__,
    epilog=_EPILOG,
    invoke_without_command=True,
    context_settings={"max_content_width": 120, "help_option_names": ["-h", "--help"]},
)
@click.version_option(__version__, "-V", "--version", prog_name="adapterkit", message="%(prog)s %(version)s")
@click.pass_context
def adapterkit(ctx: click.Context) -> None:
    """Read, check, convert and merge adapters of any format.

    Results go to standard output, progress and errors to standard error. Every command takes --json.
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


def main() -> None:
    """The console script."""
    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) == signal.SIG_DFL:  # `nohup` ignores the second.
            signal.signal(number, _interrupted)
    # A file of 10^5 tensors makes 10^6 objects that stay, which the collector would walk through again and again.
    thresholds = gc.get_threshold()
    gc.set_threshold(100_000, *thresholds[1:])
    try:
        adapterkit()
    finally:
        gc.set_threshold(*thresholds)
        # The interpreter would look for cycles among all that is left, which takes a tenth of a short command's time.
        gc.freeze()


def _interrupted(number: int, _frame: FrameType | None) -> NoReturn:
    """End as Ctrl-C does, so that what is half written is removed; a second such signal does not disturb that."""
    signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt
