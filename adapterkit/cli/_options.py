"""Options that several commands share, each written once."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ..errors import nearest

if TYPE_CHECKING:
    from ..core.adapter import Adapter

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class CliSettings:
    """The options that control what a command prints.

    Attributes:
        json: print one JSON document on standard output, also for errors.
        quiet: print no progress and no hints on standard error.
        debug: print a traceback with every error.
        verbose: 1 prints a line for each step; 2 also prints the details behind each result.
    """

    json: bool = False
    quiet: bool = False
    debug: bool = False
    verbose: int = 0

    @classmethod
    def of(cls, words: Sequence[str]) -> CliSettings:
        """Read these options from the unparsed arguments: they must also apply to errors of the parser."""
        given = words[: words.index("--")] if "--" in words else words
        debug, quiet = (os.environ.get(f"ADAPTERKIT_{word}", "") not in ("", "0") for word in ("DEBUG", "QUIET"))
        verbose = sum({"-v": 1, "--verbose": 1, "-vv": 2}.get(word, 0) for word in given)
        told = os.environ.get("ADAPTERKIT_VERBOSE", "")
        verbose = verbose or (min(int(told), 2) if told.isdecimal() else 0)
        quiet = bool({"-q", "--quiet"} & {*given}) or (quiet and not verbose)
        return cls("--json" in given, quiet, debug or "--debug" in given, verbose)


def format_name(_ctx: click.Context, _param: click.Parameter, value: str | None) -> str | None:
    """Check the name of a format. The formats are imported only if the option is given."""
    from ..formats import FORMATS

    if value is not None and value not in FORMATS:
        known = nearest(value, FORMATS) or f"Known: {', '.join(FORMATS)}"
        raise click.BadParameter(f"unknown format {value!r}. {known}")
    return value


_PLAIN = 1_000_000
"""A number without a unit must be at least this many bytes: someone who types `5` means 5GB."""


def byte_count(_ctx: click.Context, _param: click.Parameter, value: str | None) -> int | None:
    """Parse a number of bytes with an optional decimal or binary unit: 5GB, 500MB, 2GiB, 1000000."""
    if value is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([kmgt])(i?))?b?", value.strip(), re.IGNORECASE)
    if match is None:
        raise click.BadParameter(f"{value!r} is not a size such as 5GB, 500MB or 2GiB")
    number, unit, binary = match.groups()
    if value.strip().isdigit() and int(value) < _PLAIN:
        number = value.strip()
        raise click.BadParameter(f"{number} has no unit: type {number}GB or {number}MB")
    scale: int = (1024 if binary else 1000) ** " kmgt".index((unit or " ").lower())
    return round(float(number) * scale)


class ComputeType(click.Choice[str]):
    """A torch dtype by any of its usual names: float16, fp16, half, F16, torch.float16."""

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        from ..io.lazy import dtype_named

        kind = dtype_named(value)
        return super().convert(value if kind is None else kind.torch, param, ctx)


def device_name(_ctx: click.Context, _param: click.Parameter, value: str) -> str:
    """Check that a value is `auto`, `cpu`, `cuda`, or a list of numbered CUDA devices."""
    if not re.fullmatch(r"auto|cpu|cuda|cuda:\d+(,cuda:\d+)*", value):
        raise click.BadParameter(f"{value!r} is not auto, cpu, cuda, cuda:N or cuda:0,cuda:1")
    return value


def _rules(_ctx: click.Context, _param: click.Parameter, value: Sequence[str]) -> tuple[str, ...]:
    """Return the rename rules, with @FILE replaced by the rules in the file, so that the digest covers these rules."""
    from ..naming.renames import rule_texts

    return rule_texts(value) if value else ()


RUNNING = "adapterkit.running"
"""Key in click's `Context.meta` for the context of the running command. The group has no other access to it."""


def _remember(ctx: click.Context, _param: click.Parameter, value: bool) -> bool:
    ctx.meta[RUNNING] = ctx
    return value


def flags(command: F) -> F:
    """Add the options that every command has; `CliSettings` holds their values."""
    for name, text in (
        ("--debug", "Show a traceback with each error. ADAPTERKIT_DEBUG=1 does the same."),
        ("--verbose", "Show each step; -vv also shows details."),
        ("--quiet", "Show no progress."),
        ("--json", "Print the result, or the error, as one JSON document."),
    ):
        kind: dict[str, Any] = {"count": True} if name == "--verbose" else {"is_flag": True}
        names = (f"-{name[2]}", name) if name in ("--quiet", "--verbose") else (name,)
        option = click.option(*names, **kind, expose_value=False, help=text, callback=_remember)
        command = option(command)
    return command


STATED = "adapterkit.stated"
"""Key in click's `Context.meta` for the arguments of `adapterkit.read` that supply values missing from a file."""


V = TypeVar("V")


def _state(ctx: click.Context, param: click.Parameter, value: V) -> V:
    if value not in (None, False):
        ctx.meta.setdefault(STATED, {})[param.name] = value
    return value


def stated() -> dict[str, Any]:
    """Return the values of options that `adapterkit.read` takes as arguments: `--alpha`, `--rank`, `--family`, ..."""
    return dict(click.get_current_context().meta.get(STATED, {}))


def stating(command: F) -> F:
    """Add the options `--alpha`, `--strict` and `--family`, for commands whose `--rank` has another meaning."""
    for option in (_family, _strict, _alpha):
        command = option(command)
    return command


def compat(command: F) -> F:
    """Add the options for the interpretation of adapters, and for values that the files of adapters do not state."""
    for option in (_family, _strict, _rank, _alpha, _compat):
        command = option(command)
    return command


def reading(command: F) -> F:
    """Add the options for reading a single adapter."""
    for option in (compat, strict_base_of_read, base, source_format):
        command = option(command)
    return command


def reading_to_cut(command: F) -> F:
    """Add the options for reading a single adapter, for commands whose `--rank` is the rank of the result."""
    for option in (_family, _strict, _alpha, _compat, strict_base_of_read, base, source_format):
        command = option(command)
    return command


def in_reading(
    adapters: Sequence[Adapter | str], compat: str | None, base: str | None
) -> tuple[Adapter | str, ...]:  # fmt: skip
    """Read the adapters if an option changes their interpretation; otherwise return the paths unchanged."""
    options = stated()
    if compat is None and not options:
        return tuple(adapters)
    from ..formats import FORMATS, read

    # Pass a layout of stacked experts as `experts_order`. Formats without stacked experts ignore this argument, so one
    # command can name adapters of several formats.
    name = "experts_order" if compat in FORMATS["peft"].experts_orders else "compat"
    options |= {} if compat is None else {name: compat}
    return tuple(
        read(adapter, base=base, **options) if isinstance(adapter, str) else adapter for adapter in adapters
    )  # fmt: skip


def base_warnings(sources: Sequence[str], adapters: Sequence[Adapter | str], base: str | None) -> list[str]:
    """Return a warning for each value in an adapter's files about its base that differs from the base of the command.

    Args:
        sources: the names of the adapters, for the warnings.
        adapters: the adapters or their paths.
        base: the base of the command; None gives no warnings.
    """
    if base is None:
        return []
    from ..formats import read
    from ..naming.binding.fitting import check_base

    held = [read(each, base=base) if isinstance(each, str) else each for each in adapters]
    found = check_base([*zip(sources, held, strict=True)], base, strict=False)
    return [f"{why}; --strict-base (strict_base=True) refuses it" for why in found]


base = click.option("--base", metavar="BASE", help="The base model of the adapter: a folder or a weight file.")
source_format = click.option(
    "--from", "source_format", callback=format_name, metavar="FORMAT",
    help="Format of the adapter; detected from the file headers if absent.",
)  # fmt: skip
_compat = click.option(
    "--compat", "--experts-order", "compat", metavar="NAME",
    help="Do not interpret the adapter as its training tool did; 'formula' follows the paper. For stacked "
    "experts whose layout the file does not state: rank_major, grouped_by_expert or peft_0.18.",
)  # fmt: skip
_alpha = click.option(
    "--alpha", type=float, callback=_state, expose_value=False, metavar="A",
    help="LoRA's alpha, for a file that does not state it.",
)  # fmt: skip
_rank = click.option(
    "--rank", type=click.IntRange(1), callback=_state, expose_value=False, metavar="R",
    help="Expected rank: refuse an adapter with any other rank.",
)  # fmt: skip
_strict = click.option(
    "--strict", is_flag=True, callback=_state, expose_value=False,
    help="Refuse a file with any setting that its format does not define, even a harmless one.",
)  # fmt: skip
_family = click.option(
    "--family", callback=_state, expose_value=False, metavar="NAME",
    help="Family of the image, video or audio model, such as flux, for a file whose names fit several families.",
)  # fmt: skip
allow_partial = click.option("--allow-partial", is_flag=True, help="Skip targets that the base does not have.")
rename = click.option(
    "--rename", multiple=True, callback=_rules, metavar="FROM=TO|@FILE|family:NAME",
    help="Rename a target, or the start of its name; {n} stands for a number. @FILE reads one rule from each line. "
    "family:NAME gives the model_type of a base without config.json. Repeatable.",
)  # fmt: skip
overwrite = click.option("--overwrite", is_flag=True, help="Replace existing output.")
weights = click.option(
    "-w", "--weight", "weights", type=float, multiple=True, metavar="W",
    help="Weight of an adapter; repeat it in the order of the adapters. Default: 1 each.",
)  # fmt: skip
tied = click.option(
    "--tied", metavar="CHOICE",
    help="If the output head shares its weight with the embedding: merge (an update changes both), untie (an update "
    "changes only the layer it names; token rows change both), or a choice for each kind of update, e.g. "
    "rows=untie,embedding=merge. Default: what PEFT did in training.",
)  # fmt: skip
_STRICT_BASE = "Refuse a base other than the one that an adapter names, instead of printing a warning."
strict_base = click.option("--strict-base", is_flag=True, help=_STRICT_BASE)
strict_licence = click.option(
    "--strict-licence", "--strict-license", "strict_licence", is_flag=True,
    help="Refuse unknown or conflicting licences, instead of printing a warning.",
)  # fmt: skip
strict_base_of_read = click.option(
    "--strict-base", is_flag=True, callback=_state, expose_value=False, help=_STRICT_BASE
)  # fmt: skip
"""`--strict-base` for commands that read all adapters with `adapterkit.read`, which then compares the base."""
