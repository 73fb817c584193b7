"""The click group of all commands: import a command's module on first use, write the help, and catch all errors."""

from __future__ import annotations

import os
import pkgutil
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property, partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import click

from ..errors import UsageError, nearest
from ._examples import epilog, next_step
from ._failures import answer, carried
from ._options import RUNNING, CliSettings
from ._render import printable

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
"""Headings in the help -> the parameters under them. All other parameters are listed first, under Options."""

FEW = 12
"""The help of a command with at most this many options has no headings."""


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
            if name == "rank" and reads_rank:  # Here --rank is the expected rank of a file.
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
        max_width: the length of the longest lines.
    """

    def __init__(self, indent_increment: int = 2, width: int | None = None, max_width: int | None = None) -> None:
        columns = shutil.get_terminal_size().columns
        super().__init__(indent_increment, max(columns - 2, 24) if width is None and columns < 52 else width, max_width)

    def write_dl(self, rows: Iterable[tuple[str, str]], col_max: int = 30, col_spacing: int = 2) -> None:
        """Write a list of definitions; the first column takes at most a third of the width."""
        super().write_dl([*rows], min(col_max, max(10, self.width // 3)), col_spacing)


class HelpContext(click.Context):
    """A context whose help fits narrow terminals."""

    formatter_class = Formatter


def completing() -> bool:
    """Whether a shell runs this process to get completions; see `_completion`."""
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
        # Cache the names: reading the folder takes 5 ms, and one run of the command line needs the names two or three
        # times.
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
            from ._completion import with_completions

            return with_completions(command)
        # Commands are plain click commands; their help gets its section headings here.
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
        from ._defaults import for_command
        from ._stages import STAGES

        name, command, rest = super().resolve_command(ctx, args)
        if name is not None and command is not None:
            # Read no defaults for `doctor`: it reports unreadable files of defaults, and must not fail because of them.
            found = {} if name == "doctor" else for_command(name, command)
            ctx.default_map = {name: found}
            lines = ctx.meta.get(STAGES)
            if lines is not None:
                lines.command = name
                for parameter, value in found.items():
                    detail(f"default of {parameter}: {value}")
        return name, command, rest

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, self._summary(name)) for name in self.list_commands(ctx)])

    def _summary(self, name: str) -> str:
        """Return the first line of a module's docstring, read from the source: importing all modules is slow."""
        module = f"{self.package}.{name}"
        loader = getattr(find_spec(module), "loader", None)
        read = getattr(loader, "get_source", None)
        source = read(module) if read else None
        if source and source.startswith('"""') and "\\" not in source.partition("\n")[0]:
            return str(source.partition("\n")[0]).strip('"')  # Parsing 24 modules would take 40 ms.
        return (import_module(module).__doc__ or "").strip().partition("\n")[0]

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: object
    ) -> click.Context:
        self.context_class = HelpContext
        with carried():
            return super().make_context(info_name, args, parent, **extra)

    def invoke(self, ctx: click.Context) -> Any:
        from ._stages import STAGES, stage_lines

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
            click.echo(f"next: {printable(hint)}", err=True)

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
