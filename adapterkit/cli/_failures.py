"""Turn any exception of a command into one error message and an exit code."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from io import TextIOWrapper

import click

from ..errors import AdapterkitError, StorageError, UsageError, public, storage_error
from ._examples import EXAMPLES
from ._options import CliSettings
from ._render import as_json, printable

CLOSED_PIPE = 141
"""The exit code that shells report for a program that wrote to a closed pipe: 128 + SIGPIPE."""


class Bug(AdapterkitError):
    """An unexpected exception in adapterkit itself. The exit code is EX_SOFTWARE of BSD's sysexits."""

    code = "bug"
    exit_code = 70


class Interrupted(AdapterkitError):
    """The user pressed Ctrl-C, or the process received SIGTERM or SIGHUP."""

    code = "interrupted"
    exit_code = 130


class Carried(Exception):
    """Wrap an exception to hide it from click, which exits on a closed pipe and treats `EOFError` as Ctrl-C."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


@contextmanager
def carried() -> Iterator[None]:
    """Wrap in `Carried` the exceptions that click would misinterpret."""
    try:
        yield
    except (OSError, EOFError) as error:
        raise Carried(error) from error


def answer(run: Callable[[], object], settings: CliSettings) -> int:
    """Run a command and return its exit code. Print errors on standard error, and with --json also as JSON."""
    try:
        _escape_unprintable()
        code = run()
        sys.stdout.flush()
    except BaseException as error:
        if isinstance(error, SystemExit):
            raise
        met = error.error if isinstance(error, Carried) else error
        if isinstance(met, BrokenPipeError):
            _discard_output()
            return CLOSED_PIPE
        return _say(met, settings)
    return code if isinstance(code, int) else 0


def typed(error: BaseException) -> AdapterkitError:
    """Convert any exception to one of adapterkit's error classes."""
    if isinstance(error, AdapterkitError):
        return error
    if isinstance(error, click.Abort | KeyboardInterrupt):
        return Interrupted("Interrupted", cure="Run the same command again; merge and pull resume where they stopped.")
    if isinstance(error, click.UsageError):
        # Click prints choices on separate lines with tabs: join the lines.
        return UsageError(" ".join(error.format_message().split()).removesuffix("."), cure=_usage_cure(error))
    if isinstance(error, OSError):
        return storage_error(error, error.filename or "a file")
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return StorageError(f"not enough memory ({str(error) or 'allocation failed'})", cure=_NO_MEMORY)
    why = f"{type(error).__name__}: {error}".removesuffix(": ")
    return Bug(f"{why} (this is a bug in adapterkit)", cure="Run it again with --debug for the traceback to report")


def _usage_cure(error: click.UsageError) -> str:
    """Return the cure of click's error: an example if an argument is missing, the usage if an option is unknown."""
    context = error.ctx
    if context is None:
        return "Try 'adapterkit --help'"
    examples = EXAMPLES.get(context.info_name or "", ())
    more = f"Try '{context.command_path} --help'"
    if examples and error.format_message().startswith("Missing"):
        return f"For example: {examples[0]}. {more}"
    if isinstance(error, click.NoSuchOption) and context.parent is not None:
        pieces = " ".join(context.command.collect_usage_pieces(context))
        return f"Usage: {context.command_path} {pieces}. {more}"
    return more


def text_of(error: AdapterkitError) -> str:
    """Return the message for the terminal: one line with the fault, and one with the cure."""
    if isinstance(error, Interrupted):
        return f"{error.why}. {error.cure}"
    line = ": ".join(part for part in ("error", error.path, error.where, error.why) if part)
    return as_flags(f"{line}\n  {error.cure}" if error.cure else line)


_BOTH = re.compile(r"\b[a-z_]+=(?:'[^'/]*'|[^\s/()]*)/(--[a-z][a-z-]*)")
_AFTER = re.compile(
    r"(--[a-z][a-z-]*(?: [A-Za-z][\w.-]*| '[^']*')?) "
    r"\((?:in Python )?[a-z_]+=[^()\s]*(?:, [a-z_]+=[^()\s]*)*(?: in Python)?\)"
)


def as_flags(text: str) -> str:
    """Shorten a pair of flag and Python argument, such as `base=/--base` or `--base (base=)`, to the flag."""
    return _AFTER.sub(r"\1", _BOTH.sub(r"\1", text))


def coloured(text: str) -> str:
    """Format an error for a terminal, with `error` in red and the cure in cyan; break lines only between words."""
    import textwrap

    width = max(20, shutil.get_terminal_size().columns)
    fill = partial(textwrap.fill, width=width, break_long_words=False, break_on_hyphens=False)
    first, sign, cure = text.partition("\n  ")
    lines = fill(first, subsequent_indent="  ")
    head, _, rest = lines.partition(":")
    if head == "error":
        lines = click.style("error", fg="red", bold=True) + ":" + rest
    if not sign:
        return lines
    told = "\n".join(fill(line, initial_indent="  ", subsequent_indent="  ") for line in cure.split("\n"))
    return f"{lines}\n{click.style(told, fg='cyan')}"


def _say(error: BaseException, settings: CliSettings) -> int:
    known = typed(error)
    if settings.debug:
        import traceback

        click.echo(public("".join(traceback.format_exception(error))), err=True, nl=False)
    try:
        text = printable(text_of(known), keep="\n")
        if sys.stderr.isatty():
            text = coloured(text) if "NO_COLOR" not in os.environ else click.unstyle(coloured(text))
        click.echo(text, err=True)
        if settings.json:
            click.echo(as_json({"error": known.record()}))
    except BrokenPipeError:
        _discard_output()
    return known.exit_code


def _discard_output() -> None:
    """Redirect standard output to the null device, so that the interpreter's flush at exit does not raise an error."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.close(nowhere)


def _escape_unprintable() -> None:
    """Print characters that the terminal's encoding lacks as escapes, instead of raising `UnicodeEncodeError`."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


_NO_MEMORY = "Free some memory or use a machine with more, then run the same command again"
