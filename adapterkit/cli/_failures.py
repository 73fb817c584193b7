"""Turn an exception at the top of the command line into one error with its words and an exit code."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from io import TextIOWrapper
from typing import Any

import click

from ..errors import AdapterkitError, StorageError, UsageError, public, storage_error
from ._examples import EXAMPLES
from ._options import CliSettings
from ._render import as_json, printable

CLOSED_PIPE = 141
"""Exit code of a program that wrote to a closed pipe, as shells report it: 128 + SIGPIPE."""


class Bug(AdapterkitError):
    """Something that adapterkit did not foresee; the exit code is that of EX_SOFTWARE in BSD's sysexits."""

    code = "bug"
    exit_code = 70


class Interrupted(AdapterkitError):
    """The user pressed Ctrl-C, or the process was told to end by SIGTERM or SIGHUP."""

    code = "interrupted"
    exit_code = 130


class Carried(Exception):
    """Takes an exception past click, which exits on a closed pipe and calls an `EOFError` an interruption."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


@contextmanager
def carried() -> Iterator[None]:
    """Carries what click would take for something else."""
    try:
        yield
    except (OSError, EOFError) as error:
        raise Carried(error) from error


def answer(run: Callable[[], Any], settings: CliSettings) -> int:
    """Runs a command and returns the exit code; says on standard error, and as JSON if asked, what went wrong."""
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
    """Any exception as one of adapterkit's own."""
    if isinstance(error, AdapterkitError):
        return error
    if isinstance(error, click.Abort | KeyboardInterrupt):
        return Interrupted("Interrupted", cure="Run the same command again; merge and pull go on where they stopped.")
    if isinstance(error, click.UsageError):
        # Click sets choices one below the other, with tabs.
        return UsageError(" ".join(error.format_message().split()).removesuffix("."), cure=_usage_cure(error))
    if isinstance(error, OSError):
        return storage_error(error, error.filename or "a file")
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return StorageError(f"not enough memory ({str(error) or 'allocation failed'})", cure=_NO_MEMORY)
    why = f"{type(error).__name__}: {error}".removesuffix(": ")
    return Bug(f"{why} (this is a bug in adapterkit)", cure="Run it again with --debug for the traceback to report")


def _usage_cure(error: click.UsageError) -> str:
    """Say what to type instead: an example if something is missing, the call if an option is unknown."""
    context = error.ctx
    if context is None:
        return "Try 'adapterkit --help'"
    examples = EXAMPLES.get(context.info_name or "", ())
    more = f"Try '{context.command_path} --help'"
    if examples and error.format_message().startswith("Missing"):
        return f"For example: {examples[0]}. {more}"
    if isinstance(error, click.NoSuchOption) and context.parent is not None:
        pieces = " ".join(context.command.collect_usage_pieces(context))
        return f"It is called by {context.command_path} {pieces}. {more}"
    return more


def text_of(error: AdapterkitError) -> str:
    """The words for people: one line for what is wrong, one for the cure."""
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
    """Name the flag alone where the library's words name its argument, too: `base=/--base`, `--base (base=)`."""
    return _AFTER.sub(r"\1", _BOTH.sub(r"\1", text))


def coloured(text: str) -> str:
    """An error for a terminal: the word in red, the cure apart; names and numbers are not broken."""
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
    """Points standard output at nothing, so that the interpreter's last flush does not complain."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.close(nowhere)


def _escape_unprintable() -> None:
    """A name that the terminal's encoding cannot show is shown with escapes instead of ending the command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


_NO_MEMORY = "Free some memory or use a machine with more, then run the same command again"
