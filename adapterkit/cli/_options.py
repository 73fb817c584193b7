"""Options that several commands share, each written once."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import click

from ..errors import nearest

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class CliSettings:
    """How a command talks.

    Attributes:
        json: one JSON document on standard output, errors included.
        quiet: no progress and no notes on standard error.
        debug: a traceback with every error.
        verbose: 1: a line for each step; 2: what explains each result, too.
    """

    json: bool = False
    quiet: bool = False
    debug: bool = False
    verbose: int = 0

    @classmethod
    def of(cls, words: Sequence[str]) -> CliSettings:
        """Read straight from the words of the command line: they must hold for errors in reading those words, too."""
        given = words[: words.index("--")] if "--" in words else words
        debug, quiet = (os.environ.get(f"ADAPTERKIT_{word}", "") not in ("", "0") for word in ("DEBUG", "QUIET"))
        verbose = sum({"-v": 1, "--verbose": 1, "-vv": 2}.get(word, 0) for word in given)
        told = os.environ.get("ADAPTERKIT_VERBOSE", "")
        verbose = verbose or (min(int(told), 2) if told.isdecimal() else 0)
        quiet = bool({"-q", "--quiet"} & {*given}) or (quiet and not verbose)
        return cls("--json" in given, quiet, debug or "--debug" in given, verbose)


def format_name(_ctx: click.Context, _param: click.Parameter, value: str | None) -> str | None:
    """Checks the name of a format; the formats are listed only when one is named."""
    from ..formats import FORMATS

    if value is not None and value not in FORMATS:
        known = nearest(value, FORMATS) or f"Known: {', '.join(FORMATS)}"
        raise click.BadParameter(f"unknown format {value!r}. {known}")
    return value


_PLAIN = 1_000_000
"""Bytes from which on a size needs no unit: `5` is meant to be 5GB."""


def byte_count(_ctx: click.Context, _param: click.Parameter, value: str | None) -> int | None:
    """A number of bytes with an optional unit, decimal or binary: 5GB, 500MB, 2GiB, 1000000."""
    if value is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([kmgt])(i?))?b?", value.strip(), re.IGNORECASE)
    if match is None:
        raise click.BadParameter(f"{value!r} is not a size such as 5GB, 500MB or 2GiB")
    number, unit, binary = match.groups()
    if value.strip().isdigit() and int(value) < _PLAIN:
        raise click.BadParameter(f"{value.strip()} bytes: give a unit, such as {value.strip()}GB or {value.strip()}MB")
    scale: int = (1024 if binary else 1000) ** " kmgt".index((unit or " ").lower())
    return round(float(number) * scale)


class ComputeType(click.Choice[str]):
    """One of torch's element types under any of its names: float16, fp16, half, F16, torch.float16."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        from ..io.lazy import dtype_named

        kind = dtype_named(value) if isinstance(value, str) else None
        return super().convert(value if kind is None else kind.torch, param, ctx)


def device_name(_ctx: click.Context, _param: click.Parameter, value: str) -> str:
    """Checks for `auto`, `cpu`, `cuda`, or CUDA devices by number."""
    if not re.fullmatch(r"auto|cpu|cuda|cuda:\d+(,cuda:\d+)*", value):
        raise click.BadParameter(f"{value!r} is not auto, cpu, cuda, cuda:N or cuda:0,cuda:1")
    return value


def _rules(_ctx: click.Context, _param: click.Parameter, value: Sequence[str]) -> tuple[str, ...]:
    """The rules for names, those of files included, so that a record of the command holds what was done."""
    from ..naming.renames import rule_texts

    return rule_texts(value) if value else ()


RUNNING = "adapterkit.running"
"""Key in the context's `meta`: the context of the command itself, which its group does not see."""


def _remember(ctx: click.Context, _param: click.Parameter, value: bool) -> bool:
    ctx.meta[RUNNING] = ctx
    return value


def flags(command: F) -> F:
    """The options of every command; `Settings` holds what they say."""
    for name, text in (
        ("--debug", "Show a traceback with an error; so does ADAPTERKIT_DEBUG=1."),
        ("--verbose", "Show each step; -vv shows what explains it, too."),
        ("--quiet", "Show no progress."),
        ("--json", "Print one JSON document, for errors too."),
    ):
        kind: dict[str, Any] = {"count": True} if name == "--verbose" else {"is_flag": True}
        names = (f"-{name[2]}", name) if name in ("--quiet", "--verbose") else (name,)
        option = click.option(*names, **kind, expose_value=False, help=text, callback=_remember)
        command = option(command)
    return command


STATED = "adapterkit.stated"
"""Key in the context's `meta`: arguments of `adapterkit.read` that say what a file does not."""


def _state(ctx: click.Context, param: click.Parameter, value: object) -> Any:
    if value not in (None, False):
        ctx.meta.setdefault(STATED, {})[param.name] = value
    return value


def stated() -> dict[str, Any]:
    """Return the values of options that `adapterkit.read` takes as arguments: `--alpha`, `--rank`, `--family`, ..."""
    return dict(click.get_current_context().meta.get(STATED, {}))


def stating(command: F) -> F:
    """Add the options `--alpha`, `--strict` and `--family`, for commands whose own `--rank` means something else."""
    for option in (_family, _strict, _alpha):
        command = option(command)
    return command


def compat(command: F) -> F:
    """How adapters are read: in which of their meanings, and what their files do not tell."""
    for option in (_family, _strict, _rank, _alpha, _compat):
        command = option(command)
    return command


def reading(command: F) -> F:
    """How one adapter is read."""
    for option in (compat, strict_base_of_read, base, source_format):
        command = option(command)
    return command


def reading_to_cut(command: F) -> F:
    """How one adapter is read, by a command whose own `--rank` is the result's."""
    for option in (_family, _strict, _alpha, _compat, strict_base_of_read, base, source_format):
        command = option(command)
    return command


def in_reading(adapters: Sequence[Any], compat: str | None, base: str | None) -> tuple[Any, ...]:
    """The adapters to pass on: their names, or what they hold in the reading that the options ask for."""
    options = stated()
    if compat is None and not options:
        return tuple(adapters)
    from ..formats import FORMATS, read

    # One adapter of several may be of a format that has no such layouts; it needs no choice.
    name = "experts_order" if compat in FORMATS["peft"].experts_orders else "compat"
    options |= {} if compat is None else {name: compat}
    return tuple(
        read(adapter, base=base, **options) if isinstance(adapter, (str, os.PathLike)) else adapter
        for adapter in adapters
    )


def base_warnings(sources: Sequence[Any], adapters: Sequence[Any], base: str | None) -> list[str]:
    """Return warnings about what adapters say of a base that is not true of the given one; none without a base.

    Args:
        sources: what the adapters are called.
        adapters: the adapters, or where they are.
        base: the base.
    """
    if base is None:
        return []
    from ..formats import read
    from ..naming.binding.bases import check_base

    held = [read(each, base=base) if isinstance(each, (str, os.PathLike)) else each for each in adapters]
    found = check_base([*zip(map(str, sources), held, strict=True)], base, strict=False)
    return [f"{why}; --strict-base (strict_base=True) refuses it" for why in found]


base = click.option("--base", metavar="BASE", help="The base that the adapter is for: a folder or a weight file.")
source_format = click.option(
    "--from", "source_format", callback=format_name, metavar="FORMAT",
    help="Format of SRC; found from its headers if absent.",
)  # fmt: skip
_compat = click.option(
    "--compat", "--experts-order", "compat", metavar="NAME",
    help="Another reading of the adapter than what its trainer computed; formula: the paper's formula. Layouts of "
    "stacked experts that a file does not tell: rank_major, grouped_by_expert, peft_0.18.",
)  # fmt: skip
_alpha = click.option(
    "--alpha", type=float, callback=_state, expose_value=False, metavar="A",
    help="LoRA's alpha, for a file that does not tell it.",
)  # fmt: skip
_rank = click.option(
    "--rank", type=click.IntRange(1), callback=_state, expose_value=False, metavar="R",
    help="The rank that is expected: an adapter of another is refused.",
)  # fmt: skip
_strict = click.option(
    "--strict", is_flag=True, callback=_state, expose_value=False,
    help="Refuse every setting in a file that its format does not have, also the harmless ones.",
)  # fmt: skip
_family = click.option(
    "--family", callback=_state, expose_value=False, metavar="NAME",
    help="Family of the image, video or audio model, such as flux, for a file whose names fit several.",
)  # fmt: skip
allow_partial = click.option("--allow-partial", is_flag=True, help="Leave out targets that the base does not have.")
rename = click.option(
    "--rename", multiple=True, callback=_rules, metavar="FROM=TO|@FILE|family:NAME",
    help="Another name for a target, or for the front of it; {n} is a number. @FILE holds one rule a line. family:NAME "
    "is the model_type of a base without config.json. Repeatable.",
)  # fmt: skip
overwrite = click.option("--overwrite", is_flag=True, help="Replace what is already there.")
weights = click.option(
    "-w", "--weight", "weights", type=float, multiple=True, metavar="W",
    help="Weight of an adapter, in the adapters' order; 1 each if absent.",
)  # fmt: skip
tied = click.option(
    "--tied", metavar="CHOICE",
    help="Where the head shares its weight with the embedding: merge (updates change both), untie (each changes the "
    "layer it names, token rows both), or by kind, e.g. rows=untie,embedding=merge. If absent, as PEFT trained.",
)  # fmt: skip
_STRICT_BASE = "Refuse a base that is not the one that an adapter names, instead of a warning."
strict_base = click.option("--strict-base", is_flag=True, help=_STRICT_BASE)
strict_licence = click.option(
    "--strict-licence", "--strict-license", "strict_licence", is_flag=True,
    help="Refuse licences that contradict each other or are not known, instead of a warning.",
)  # fmt: skip
strict_base_of_read = click.option(
    "--strict-base", is_flag=True, callback=_state, expose_value=False, help=_STRICT_BASE
)  # fmt: skip
"""For commands whose adapters are all read by `adapterkit.read`, which compares them with the base."""
