"""The click group of all commands. It imports a command's module on first use, writes the help, and catches all errors.

The help of each command ends with examples. After some commands succeed, the group suggests the next command. If a
command raises any exception, the group prints one error message and returns an exit code.
"""

from __future__ import annotations

import os
import pkgutil
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from importlib import import_module
from importlib.util import find_spec
from io import TextIOWrapper
from typing import Any

import click

from ..errors import AdapterkitError, StorageError, UsageError, nearest, public, storage_error
from ._options import RUNNING, CliSettings
from ._render import as_json, printable, remark

# `EXAMPLES` has the example lines in the help of each command. `NEXT` has the command to suggest after a success.
#
# Tests run these lines in a folder with the base `base`, the adapters `lora` and `other`, and the merged model `tuned`.
# Lines that name a hub, a graph, a transformers model or another program are only parsed.


EXAMPLES: Mapping[str, tuple[str, ...]] = {
    "bom": ("adapterkit bom tuned", "adapterkit bom lora -o lora.cdx.json"),
    "combine": (
        "adapterkit combine lora other --method ties --base base --rank 8 -o combined",
        "adapterkit combine lora other --method linear --weight 0.7 --weight 0.3 --base base --rank 8 -o mix",
    ),
    "completion": (
        'eval "$(adapterkit completion bash)"',
        "adapterkit completion fish > ~/.config/fish/completions/adapterkit.fish",
    ),
    "conformance": ("adapterkit conformance -- python my_reader.py",),
    "convert": (
        "adapterkit convert lora lora.safetensors --to adapterkit",
        "adapterkit convert lora for-vllm --to peft --profile vllm --on-loss fold --base base",
        "adapterkit convert hf://org/lora lora.gguf --to gguf --base model",
    ),
    "demo": ("adapterkit demo",),
    "diff": ("adapterkit diff lora lora", "adapterkit diff lora lora --base base --no-signs --json"),
    "doctor": ("adapterkit doctor",),
    "export": (
        "adapterkit export MODEL -o graph",
        "adapterkit export MODEL -o graph --adapter lora --adapter other --mode slots",
    ),
    "extract": ("adapterkit extract tuned --base base --rank 12 -o extracted",),
    "gate": (
        "adapterkit gate MODEL lora",
        "adapterkit gate MODEL lora --merged merged --data texts.jsonl --min-kept 0.95",
        "adapterkit gate MODEL lora --onnx graph/model.onnx --json",
    ),
    "help": ("adapterkit help merge",),
    "inject": (
        "adapterkit inject model.onnx lora -o attached.onnx",
        "adapterkit inject model.onnx lora -o swappable.onnx --mode slots",
    ),
    "inspect": (
        "adapterkit inspect lora",
        "adapterkit inspect lora --layers",
        "adapterkit inspect lora --base base --all",
        "adapterkit inspect base",
    ),
    "list": ("adapterkit list formats", "adapterkit list combine"),
    "merge": (
        "adapterkit merge base lora -o merged --plan",
        "adapterkit merge base lora -o merged --verify",
        "adapterkit merge base lora other --weight 0.7 --weight 0.3 -o both",
        "adapterkit merge hf://org/model hf://org/lora -o merged --stream",
    ),
    "names": ("adapterkit names base", "adapterkit names base lora"),
    "pull": ("adapterkit pull hf://org/lora lora-from-hub", "adapterkit pull hf://org/model@main model --dry-run"),
    "push": ("adapterkit push lora hf://org/lora --private", "adapterkit push lora hf://org/lora --dry-run"),
    "report": (
        "adapterkit report lora -o report.html",
        "adapterkit report lora other --base base -o both.html --figures pictures",
        "adapterkit report lora --base base --merged tuned -o merged.html",
    ),
    "resize": ("adapterkit resize lora --rank 2 -o small", "adapterkit resize lora --energy 0.99 -o smaller"),
    "scan": ("adapterkit scan base", "adapterkit scan hf://org/lora --fail-on high"),
    "search": (
        "adapterkit search math code --data validation.jsonl --base MODEL -o best.yml",
        "adapterkit search math code --data validation.jsonl --base MODEL --method ties --budget 30 -o ties.yml",
        "adapterkit search math code --data validation.jsonl --base MODEL --start best.yml --start karcher -o new.yml",
    ),
    "sign": ("adapterkit sign lora --key key.pem", "adapterkit sign tuned --key key.pem -o tuned.sig --overwrite"),
    "ui": ("adapterkit ui", "adapterkit ui ~/models ~/adapters --port 7878 --no-browser"),
    "validate": ("adapterkit validate lora", "adapterkit validate lora --base base"),
    "verify": (
        "adapterkit verify tuned --base base --adapter lora",
        "adapterkit verify tuned --signature tuned.sig --key key.pub.pem",
    ),
}
"""Command -> one to four example lines."""

NEXT: Mapping[str, str] = {
    "combine": "adapterkit inspect {out}",
    "convert": "adapterkit inspect {dst}",
    "extract": "adapterkit diff {out} ADAPTER --base {base}",
    "merge": "adapterkit verify {out} --base {base} --adapter {adapters}",
    "pull": "adapterkit inspect {dst}",
    "resize": "adapterkit inspect {out}",
    "search": "adapterkit combine {out} -o OUT",
    "validate": "adapterkit merge {base} {src} -o MERGED --plan",
}
"""Command -> the command line to suggest after its success.

The name of a parameter in braces is replaced by the parameter's value. If the parameter has no value, nothing is
suggested.
"""


def epilog(command: str) -> str | None:
    """Return the examples for the end of a command's help."""
    lines = EXAMPLES.get(command, ())
    return "\b\n" + "\n".join(["Examples:", *(f"  {line}" for line in lines)]) if lines else None


def next_step(command: str, given: Mapping[str, object]) -> str | None:
    """Return the command line to suggest after a command has succeeded.

    Args:
        command: the name of the command that succeeded.
        given: the values of that command's parameters.

    Returns:
        The command line. None if `NEXT` has no suggestion for `command`, if `given` has no value for a parameter in the
        suggestion, or if the command ran with --plan or --verify.
    """
    import shlex
    import string

    text = NEXT.get(command)
    if text is None or given.get("only_plan") or given.get("verified"):
        return None
    values = {}
    for _, name, _, _ in string.Formatter().parse(text):
        value = given.get(name) if name else None
        if name and not value:
            return None
        if name:
            many = value if isinstance(value, tuple) else (value,)
            flag = " --adapter " if name == "adapters" else " "
            values[name] = flag.join(shlex.quote(str(each)) for each in many)
    return text.format(**values)


# Errors: one message and an exit code.


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
    """A wrapper that hides an exception from click.

    click itself would exit on a closed pipe, and would treat `EOFError` as Ctrl-C.
    """

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


@contextmanager
def carried() -> Iterator[None]:
    """Wrap the exceptions that click would misinterpret (`OSError` and `EOFError`) in `Carried`."""
    try:
        yield
    except (OSError, EOFError) as error:
        raise Carried(error) from error


def answer(run: Callable[[], object], settings: CliSettings) -> int:
    """Run a command and return its exit code.

    Errors are printed on standard error; with --json, they are also printed as JSON on standard output.
    """
    try:
        _escape_unprintable()
        code = run()
        sys.stdout.flush()
    except BaseException as error:
        if isinstance(error, SystemExit):
            raise
        met = error.error if isinstance(error, Carried) else error
        if isinstance(met, BrokenPipeError):
            discard(1)
            return CLOSED_PIPE
        return _say(met, settings)
    return code if isinstance(code, int) else 0


def typed(error: BaseException) -> AdapterkitError:
    """Convert any exception to one of adapterkit's error classes."""
    # On Python 3.14, an interrupt while h5py writes through a Python file reaches us as a chain of SystemErrors. Its
    # first cause is the interrupt.
    while isinstance(error, SystemError) and error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, AdapterkitError):
        return error
    if isinstance(error, click.Abort | KeyboardInterrupt):
        return Interrupted("Interrupted", cure="Run the same command again; merge and pull resume where they stopped.")
    if isinstance(error, click.UsageError):
        # Click puts each possible value of an option on a separate line: join the lines.
        return UsageError(" ".join(error.format_message().split()).removesuffix("."), cure=_usage_cure(error))
    if isinstance(error, OSError):
        return storage_error(error, error.filename or "a file")
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return StorageError(f"not enough memory ({str(error) or 'allocation failed'})", cure=_NO_MEMORY)
    why = f"{type(error).__name__}: {error}".removesuffix(": ")
    return Bug(f"{why} (this is a bug in adapterkit)", cure="Run the command with --debug, and report the traceback")


def _usage_cure(error: click.UsageError) -> str:
    """Return the cure for an error from click.

    If an argument or a required option is missing, the cure shows an example. If an option is unknown, the cure shows
    the usage line. The cure always names --help, too.
    """
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
    r"(--[a-z][a-z-]*(?: [A-Za-z0-9][\w.=-]*| '[^']*')?) "
    r"\((?:in Python )?[a-z_]+=(?:\{[^{}]*\}|[^()\s]*)(?:, [a-z_]+=[^()\s]*)*(?: in Python)?\)"
)


def as_flags(text: str) -> str:
    """Remove the Python arguments from a message: write `base=/--base` and `--base (base=)` as `--base`."""
    return _AFTER.sub(r"\1", _BOTH.sub(r"\1", text))


def coloured(text: str) -> str:
    """Format an error for a terminal: the word `error` in red, the cure in cyan, and line breaks only between words."""
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
    hint = "\n".join(fill(line, initial_indent="  ", subsequent_indent="  ") for line in cure.split("\n"))
    return f"{lines}\n{click.style(hint, fg='cyan')}"


def _say(error: BaseException, settings: CliSettings) -> int:
    known = typed(error)
    if settings.debug:
        import traceback

        click.echo(public("".join(traceback.format_exception(error))), err=True, nl=False)
    text = printable(text_of(known), keep="\n")
    if sys.stderr.isatty():
        text = coloured(text) if "NO_COLOR" not in os.environ else click.unstyle(coloured(text))
    # Print to both streams even if one of them fails: standard error may be a closed pipe or a file on a full disk.
    remark(text)
    if settings.json:
        try:
            click.echo(as_json({"error": known.record()}))
        except OSError:  # Often the error to report is the same: the result could not be printed.
            discard(1)
    return known.exit_code


def discard(number: int) -> None:
    """Redirect the standard stream with this number to the null device.

    Then the interpreter's flush at exit does not fail. If it failed, the exit code would be 120.
    """
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, number)
    os.close(nowhere)


def _escape_unprintable() -> None:
    """If the terminal's encoding lacks a character, print a backslash escape instead of raising an error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


_NO_MEMORY = "Free some memory, or use a machine with more memory, then run the same command again"


# The group of commands.


SECTIONS: Mapping[str, tuple[str, ...]] = {
    "Output": (
        "out", "dst", "target_format", "on_loss", "max_error", "profile", "match_base", "dtype", "shard_size", "link",
        "share_weights", "checksums",
        "overwrite", "figures", "gate", "sarif", "only_plan", "verified", "check", "dry_run", "every", "layers",
        "private", "message", "tag", "revision", "license", "licence",
    ),
    "Computation": (
        "weights", "method", "parameters", "recipe", "rank", "energy", "error", "seed", "disjoint", "tied", "quantized",
        "onto", "keep", "consumer", "keep_change", "remainder",
        "quantize", "mode", "opset", "calibration", "sample", "tolerance", "signs", "tokenizer", "vocab",
        "embeddings", "targets", "scope", "data", "texts",
        "length", "new_tokens", "null", "promote", "frobenius", "sv_ratio", "sv_fro", "sv_cumulative",
    ),
    "Reading adapters and bases": (
        "source_format", "base", "base_weights", "strict_base", "strict_licence", "compat", "alpha", "strict", "family",
        "rename", "allow_partial", "experts", "call", "words", "merged", "onnx",
    ),
    "Thresholds": (
        "min_effect", "min_kept", "max_scale_error", "max_part_error", "min_agreement", "max_perplexity",
        "min_over_null",
    ),
    "Execution": ("device", "engine", "address", "memory", "stream"),
    "Messages": ("json", "quiet", "verbose", "debug", "help", "_click_default_help"),
}  # fmt: skip
"""Heading in the help -> the parameters under this heading. All other parameters come first, under Options."""

FEW = 12
"""If a command has at most this many options, its help lists all of them under Options."""


def write_options(command: click.Command, ctx: click.Context, formatter: click.HelpFormatter) -> None:
    """Write the list of options in the --help of a command."""
    home = {name: heading for heading, names in SECTIONS.items() for name in names}
    options = [param for param in command.get_params(ctx) if isinstance(param, click.Option)]
    given = [(param, param.get_help_record(ctx)) for param in options]
    shown = [(param.name or "", record) for param, record in given if record is not None]
    if len(shown) <= FEW:
        with formatter.section("Options"):
            formatter.write_dl([record for _, record in shown])
        return
    reads_rank = any(param.name == "rank" and not param.expose_value for param in command.params)
    for heading in ("Options", *SECTIONS):
        rows = []
        for name, record in shown:
            at = home.get(name, "Options")
            if name == "rank" and reads_rank:  # --rank is the rank that `read` expects, not the rank of the result.
                at = "Reading adapters and bases"
            if at == heading:
                rows.append(record)
        if rows:
            with formatter.section(heading):
                formatter.write_dl(rows)


class Formatter(click.HelpFormatter):
    """A help formatter that also fits terminals of fewer than 50 columns, unlike click's own formatter.

    Args:
        indent_increment: as in click.
        width: the width in columns; the terminal's width if None.
        max_width: the maximum width if `width` is None; click's default if both are None.
    """

    def __init__(self, indent_increment: int = 2, width: int | None = None, max_width: int | None = None) -> None:
        columns = shutil.get_terminal_size().columns
        super().__init__(indent_increment, max(columns - 2, 24) if width is None and columns < 52 else width, max_width)

    def write_dl(self, rows: Iterable[tuple[str, str]], col_max: int = 30, col_spacing: int = 2) -> None:
        """Write a list of definitions.

        Limit the first column to a third of the width, or to 10 characters if a third is less.
        """
        super().write_dl([*rows], min(col_max, max(10, self.width // 3)), col_spacing)


class HelpContext(click.Context):
    """A context whose help fits narrow terminals."""

    formatter_class = Formatter


def completing() -> bool:
    """Whether a shell started this process only to complete a command line; see the command `completion`."""
    return "_ADAPTERKIT_COMPLETE" in os.environ


class Commands(click.Group):
    """A click group that finds its commands as modules of a package.

    The command `x` is the object `command` in module `x`. The module's docstring is the help of the command.

    Args:
        package: the dotted name of the package; modules whose names begin with an underscore are not commands.
        attributes: the arguments of `click.Group`.
    """

    def __init__(self, *, package: str, **attributes: Any) -> None:
        super().__init__(**attributes)
        self.package = package

    @cached_property
    def _names(self) -> list[str]:
        # Cache the names of the commands: listing the modules takes 5 ms, and a run needs the names two or three times.
        modules = pkgutil.iter_modules(import_module(self.package).__path__)
        return sorted(module.name for module in modules if not module.name.startswith("_"))

    def list_commands(self, ctx: click.Context) -> list[str]:
        return self._names

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self._names:
            return None
        command: click.Command = import_module(f"{self.package}.{cmd_name}").command
        command.epilog = epilog(cmd_name)
        if completing():
            from .completion import with_completions

            return with_completions(command)
        # `command` is a plain `click.Command`, which lists all options in one section. Make its help use `SECTIONS`.
        command.context_class = HelpContext
        command.format_options = partial(write_options, command)  # type: ignore[method-assign]
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        known = self.list_commands(ctx)
        if args[0] not in known and not args[0].startswith("-"):
            cure = nearest(args[0], known) or f"Known: {', '.join(known)}"
            raise UsageError(f"no such command {args[0]!r}", cure=cure)
        from ..io.stages import detail
        from ._options import for_command
        from ._progress import STAGES

        name, command, rest = super().resolve_command(ctx, args)
        if name is not None and command is not None:
            # `doctor` loads the defaults itself and reports all errors. Loading them here would raise the first error.
            defaults = {} if name == "doctor" else for_command(name, command)
            ctx.default_map = {name: defaults}
            lines = ctx.meta.get(STAGES)
            if lines is not None:
                lines.command = name
                for parameter, value in defaults.items():
                    detail(f"default of {parameter}: {value}")
        return name, command, rest

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, self._summary(name)) for name in self.list_commands(ctx)])

    def _summary(self, name: str) -> str:
        """Return the first line of the docstring of a command's module.

        The line is read from the source file, because importing all commands is slow.
        """
        module = f"{self.package}.{name}"
        loader = getattr(find_spec(module), "loader", None)
        read = getattr(loader, "get_source", None)
        source = read(module) if read else None
        if source and source.startswith('"""') and "\\" not in source.partition("\n")[0]:
            return str(source.partition("\n")[0]).strip('"')  # Do not parse the source: 24 modules would take 40 ms.
        return (import_module(module).__doc__ or "").strip().partition("\n")[0]

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: object
    ) -> click.Context:
        self.context_class = HelpContext
        with carried():
            return super().make_context(info_name, args, parent, **extra)

    def invoke(self, ctx: click.Context) -> Any:
        from ._progress import STAGES, stage_lines

        with carried(), stage_lines(ctx.obj) as lines:
            ctx.meta[STAGES] = lines
            done = super().invoke(ctx)
        self._say_next(ctx)
        return done

    def _say_next(self, ctx: click.Context) -> None:
        """Print a hint about the next command, if standard output and standard error are terminals."""
        settings, name = ctx.obj, ctx.invoked_subcommand
        if settings.json or settings.quiet or name is None or not (sys.stderr.isatty() and sys.stdout.isatty()):
            return
        running = ctx.meta.get(RUNNING)
        hint = None if running is None else next_step(name, running.params)
        if hint is not None:
            remark(f"next: {printable(hint)}")

    def main(  # type: ignore[override]
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> int:
        """Run the command line. Exit with the command's exit code, or return the code if `standalone_mode` is off."""
        settings = CliSettings.of(sys.argv[1:] if args is None else args)
        run = super().main
        code = answer(
            lambda: run(args, prog_name or "adapterkit", complete_var, standalone_mode=False, obj=settings, **extra),
            settings,
        )
        if standalone_mode:
            sys.exit(code)
        return code
