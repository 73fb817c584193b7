"""The command line. Each command is a module of this package, and a thin layer over one public function.

For a fast start, only click and the standard library are imported until the name of the command is known.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
from types import FrameType
from typing import NoReturn

import click

from .. import __version__
from ._commands import Commands, discard

__all__ = ["adapterkit", "main"]

_EPILOG = """Exit codes: 0 success, 1 a check failed, 2 wrong usage or invalid input, 3 unsupported or inconclusive,
4 damaged data, 5 network or authentication, 6 storage or memory, 70 a bug in adapterkit, 130 interrupted."""


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
    """Read, check, convert and merge adapters in any known format.

    Results go to standard output; progress and errors go to standard error. Every command accepts --json.
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


def main() -> None:
    """Run the command line; this is the entry point of the console script."""
    _open_closed_streams()
    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        if (
            number is not None and signal.getsignal(number) == signal.SIG_DFL
        ):  # If `nohup` made the process ignore SIGHUP, install no handler: a hangup must not end the command.
            signal.signal(number, _interrupted)
    # Collect garbage less often: a file of 10^5 tensors makes 10^6 long-lived objects, and each collection visits all
    # objects.
    thresholds = gc.get_threshold()
    gc.set_threshold(100_000, *thresholds[1:])
    try:
        adapterkit()
    finally:
        try:
            sys.stderr.flush()
        except OSError:  # The stream may be a file on a full disk. The messages are lost, but the result is not.
            discard(2)
        gc.set_threshold(*thresholds)
        # At exit, the interpreter searches for cycles among all remaining objects that are not frozen. Without
        # `freeze`, this search takes a tenth of a short command's time.
        gc.freeze()


def _open_closed_streams() -> None:
    """Connect each standard stream that is closed, as after `2>&-`, to the null device.

    Python sets such a stream to None. Also, the next opened file would get the number of the closed stream: messages of
    other libraries, which write to number 2, would then be written into an output file.
    """
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        if getattr(sys, name) is None:
            try:
                os.fstat(number)
            except OSError:
                os.open(os.devnull, os.O_RDWR)  # Gets this number: all smaller numbers are open.
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 - open until the process ends


def _interrupted(number: int, _frame: FrameType | None) -> NoReturn:
    """End the command as Ctrl-C does, so that unfinished output is removed.

    If the same signal arrives again, ignore it, so that the removal is not interrupted.
    """
    signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt
