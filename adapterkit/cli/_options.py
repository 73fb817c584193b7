"""The options that several commands share, and the defaults that users can set for options."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ..errors import Malformed, StorageError, UsageError, nearest
from ..io.inputs import decimal_number

if TYPE_CHECKING:
    from ..core.adapter import Adapter
    from ..io.strict_json import JsonValue
    from ..ops.recipes import Recipe

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class CliSettings:
    """The options that control what a command prints.

    Attributes:
        json: print one JSON document on standard output, even for errors.
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
        """Read the settings from the raw arguments and the environment, before click parses the arguments.

        The settings also apply to click's parsing errors: with `--json`, such an error is printed as JSON.
        """
        given = words[: words.index("--")] if "--" in words else words
        debug, quiet = (os.environ.get(f"ADAPTERKIT_{word}", "") not in ("", "0") for word in ("DEBUG", "QUIET"))
        verbose = sum({"-v": 1, "--verbose": 1, "-vv": 2}.get(word, 0) for word in given)
        verbosity = os.environ.get("ADAPTERKIT_VERBOSE", "")
        verbose = verbose or min(decimal_number(verbosity) or 0, 2)
        quiet = bool({"-q", "--quiet"} & {*given}) or (quiet and not verbose)
        return cls("--json" in given, quiet, debug or "--debug" in given, verbose)


def format_name(_ctx: click.Context, _param: click.Parameter, value: str | None) -> str | None:
    """Check that a value is the name of a format, or None."""
    from ..formats import FORMATS

    if value is not None and value not in FORMATS:
        known = nearest(value, FORMATS) or f"Known: {', '.join(FORMATS)}"
        raise click.BadParameter(f"unknown format {value!r}. {known}")
    return value


_PLAIN = 1_000_000
"""The smallest size that is accepted without a unit. Someone who types `--memory 5` probably means 5GB."""


def byte_count(_ctx: click.Context, _param: click.Parameter, value: str | None) -> int | None:
    """Convert a size such as 5GB, 500MB, 2GiB or 1000000 to a number of bytes; None stays None."""
    if value is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([kmgt])(i?))?b?", value.strip(), re.IGNORECASE)
    if match is None:
        raise click.BadParameter(f"{value!r} is not a size such as 5GB, 500MB or 2GiB")
    number, unit, binary = match.groups()
    plain = decimal_number(value.strip())
    if plain is not None and plain < _PLAIN:
        number = value.strip()
        raise click.BadParameter(f"{number} has no unit: type {number}GB or {number}MB")
    scale: int = (1024 if binary else 1000) ** " kmgt".index((unit or " ").lower())
    return round(float(number) * scale)


class ComputeType(click.Choice[str]):
    """A choice of torch dtypes that accepts every usual name of a dtype: float16, fp16, half, F16, torch.float16."""

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
    """Return the rename rules, with each `@FILE` replaced by the rules in that file.

    The digest that identifies a finished run is computed from these rules, not from the name of the file. If a rule in
    the file changes, the digest changes too, so a repeated command does not stop with "already done".
    """
    from ..naming.renames import rule_texts

    return rule_texts(value) if value else ()


RUNNING = "adapterkit.running"
"""Key in click's `Context.meta` for the context of the running command.

After a command, the command group may print a hint about the next command. The hint depends on the parameters of the
command that ran, and click does not pass these parameters to the group.
"""


def _remember(ctx: click.Context, _param: click.Parameter, value: bool) -> bool:
    ctx.meta[RUNNING] = ctx
    return value


def flags(command: F) -> F:
    """Add --json, --quiet, --verbose and --debug to a command. `CliSettings` holds their values."""
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
"""Key in click's `Context.meta` for the keyword arguments of `adapterkit.read` that options such as `--alpha` set."""


V = TypeVar("V")


def _state(ctx: click.Context, param: click.Parameter, value: V) -> V:
    if value not in (None, False):
        ctx.meta.setdefault(STATED, {})[param.name] = value
    return value


def stated() -> dict[str, Any]:
    """Return the arguments for `adapterkit.read` that were set with options, such as `--alpha` or `--family`."""
    return dict(click.get_current_context().meta.get(STATED, {}))


def stating(command: F) -> F:
    """Add the options that `compat` adds, except `--compat` and `--rank`.

    The options are `--alpha`, `--strict` and `--family`. They are for commands without `--rank`, and for commands whose
    `--rank` is the rank of the result.
    """
    for option in (_family, _strict, _alpha):
        command = option(command)
    return command


def compat(command: F) -> F:
    """Add the options for interpreting and checking adapter files.

    The options are `--compat`, `--alpha`, `--rank`, `--strict` and `--family`.
    """
    for option in (_family, _strict, _rank, _alpha, _compat):
        command = option(command)
    return command


def reading(command: F) -> F:
    """Add `--strict-base`, `--base`, `--from` and the options that `compat` adds, for commands that read an adapter."""
    for option in (compat, strict_base_of_read, base, source_format):
        command = option(command)
    return command


def reading_to_cut(command: F) -> F:
    """Add the options that `reading` adds, except `--rank`, for commands whose `--rank` is the rank of the result."""
    for option in (_family, _strict, _alpha, _compat, strict_base_of_read, base, source_format):
        command = option(command)
    return command


def in_reading(
    adapters: Sequence[Adapter | str], compat: str | None, base: str | None
) -> tuple[Adapter | str, ...]:  # fmt: skip
    """Read the adapters if an option changes how they are read; otherwise return their paths unchanged.

    Args:
        adapters: paths of adapters, or adapters in memory. Adapters in memory are returned unchanged.
        compat: the value of `--compat`, which names a formula or a layout of stacked experts.
        base: the base, which some formats need to resolve names.
    """
    options = stated()
    if compat is None and not options:
        return tuple(adapters)
    from ..formats import FORMATS, read

    # One command may read adapters of several formats. Therefore, if `compat` names a layout of stacked experts, pass
    # it as `experts_order`: formats without stacked experts ignore `experts_order`, but refuse a layout as `compat`.
    name = "experts_order" if compat in FORMATS["peft"].experts_orders else "compat"
    options |= {} if compat is None else {name: compat}
    return tuple(
        read(adapter, base=base, **options) if isinstance(adapter, str) else adapter for adapter in adapters
    )  # fmt: skip


def base_warnings(sources: Sequence[str], adapters: Sequence[Adapter | str], base: str | None) -> list[str]:
    """Return a warning for each difference between `base` and the base that an adapter's files record.

    Args:
        sources: the names of the adapters, for the warnings.
        adapters: the adapters or their paths.
        base: the command's base; if None, no warnings are returned.
    """
    if base is None:
        return []
    from ..formats import read
    from ..naming.binding.fitting import TO_REFUSE, check_base

    loaded = [read(each, base=base) if isinstance(each, str) else each for each in adapters]
    differences = check_base([*zip(sources, loaded, strict=True)], base, strict=False)
    return [f"{why}{TO_REFUSE}" for why in differences]


base = click.option("--base", metavar="BASE", help="The base model of the adapter: a folder or a weight file.")
source_format = click.option(
    "--from", "source_format", callback=format_name, metavar="FORMAT",
    help="Format of the adapter. Default: detected from the file headers.",
)  # fmt: skip
_compat = click.option(
    "--compat", "--experts-order", "compat", metavar="NAME",
    help="How to interpret the adapter. Default: as its training tool does. formula: compute the paper's formula. "
    "rank_major, grouped_by_expert or peft_0.18: the layout of stacked experts, if the file does not state the layout.",
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
    help="Replace FROM by TO in the names of targets that are FROM or start with FROM and a dot; {n} stands for a "
    "number. @FILE reads one rule per line from FILE. For a base without config.json, write "
    "family:NAME, where NAME is the base's model_type. "
    "Repeatable.",
)  # fmt: skip
overwrite = click.option("--overwrite", is_flag=True, help="Replace existing output.")
weights = click.option(
    "-w", "--weight", "weights", type=float, multiple=True, metavar="W",
    help="Weight of an adapter. Repeat the option for each adapter, in the order of the adapters. Default: 1 each.",
)  # fmt: skip
tied = click.option(
    "--tied", metavar="CHOICE",
    help="Which layers an update changes if the output head shares its weight with the embedding. merge: both layers. "
    "untie: only the layer that the update names; token rows still change both layers. Each kind of update can have "
    "its own choice, e.g. rows=untie,embedding=merge. Default: the layers that the adapter's training tool changed.",
)  # fmt: skip
_STRICT_BASE = "If the base differs from the base that an adapter names, stop with an error instead of a warning."
strict_base = click.option("--strict-base", is_flag=True, help=_STRICT_BASE)
strict_licence = click.option(
    "--strict-licence", "--strict-license", "strict_licence", is_flag=True,
    help="Refuse unknown or conflicting licences, instead of printing a warning.",
)  # fmt: skip
strict_base_of_read = click.option(
    "--strict-base", is_flag=True, callback=_state, expose_value=False, help=_STRICT_BASE
)  # fmt: skip
"""`--strict-base` for commands that read every adapter with `adapterkit.read`. It makes `read` check the base."""


# Options that define how adapters are combined: a method, `--set name=value`, weights, or a recipe.


def method_and_settings(default: str | None) -> Callable[[F], F]:
    """Add the options `--method`, `--set` and `--data`."""
    default_text = f" (default: {default})" if default else ""

    def decorated(command: F) -> F:
        for option in (
            click.option(
                "--data", metavar="FILE", multiple=True,
                help="Texts for methods that learn from data: a file with one text per line, a JSON Lines file with a "
                "'text' field, or 'builtin'. Repeat the option to give each adapter its own texts. Requires --base.",
            ),
            click.option(
                "--set", "parameters", multiple=True, metavar="NAME=VALUE",
                help="Set a parameter of --method to a number, a word, or a YAML list or mapping. Repeatable.",
            ),
            click.option(
                "--method", metavar="METHOD",
                help=f"Method to combine the adapters{default_text}. 'adapterkit list combine' shows all methods.",
            ),
        ):  # fmt: skip
            command = option(command)
        return command

    return decorated


def learned_data(files: Sequence[str], sources: Sequence[Adapter | str], options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the argument `data` of `ops.combine`, for methods that learn from texts.

    The result is {"data": function}, or {} if there are no files.

    Args:
        files: the values of `--data`.
        sources: the adapters.
        options: the arguments of `ops.combine`.

    Raises:
        UsageError: no base is given; the method does not learn from texts; or the number of files is neither 1 nor
            the number of adapters.
    """
    from ..ops.combiners import COMBINERS
    from ..ops.parameters import resolved

    if not files:
        return {}
    name = options.get("method", "linear")
    if COMBINERS[resolved(name, options.get("compat"), len(sources))[0]].data is None:
        raise UsageError(f"{name} does not use data", where="--data", cure="Omit --data, or choose another --method")
    if options.get("base") is None:
        raise UsageError("learning from texts requires a base model", where="--data", cure="Also pass --base BASE")
    from ..searching import TextData

    source = TextData(
        options["base"], sources, files[0] if len(files) == 1 else files, rename=options.get("rename") or (),
        seed=options.get("seed") or 0,
    )  # fmt: skip
    return {"data": source.learned_by(name)}


S = TypeVar("S")


def combination(
    adapters: Sequence[S], method: str | None, weights: Sequence[float], parameters: Sequence[str],
    given: Mapping[str, object], recipe: Recipe | None = None,
) -> tuple[list[S] | list[str], dict[str, Any]]:  # fmt: skip
    """Return the adapters and the arguments of `ops.combine`, from the command line and the recipe.

    Args:
        adapters: the adapters from the command line.
        method: the value of `--method`.
        weights: the values of `--weight`.
        parameters: the values of `--set`. Each value replaces the recipe's value of the same parameter.
        given: further arguments of `ops.combine`. Each argument that is not None replaces the recipe's value.
        recipe: the recipe, which names adapters, weights and the method.

    Raises:
        UsageError: a recipe is given together with adapters, weights or a method; no adapter is given; or a value of
            `--set` is invalid (see `setting`).
    """
    options: dict[str, Any] = {}
    sources: list[S] | list[str] = list(adapters)
    if recipe is not None:
        if adapters or weights or method:
            why = "a recipe already names adapters, method and weights"
            cure = "Remove the adapters, --method and --weight from the command line, or remove --recipe"
            raise UsageError(why, where="--recipe", cure=cure)
        sources, options = list(recipe.adapters), dict(recipe.options)
    elif not adapters:
        raise UsageError("no adapter was given", cure="Pass at least one adapter, or --recipe FILE")
    options |= {"method": method} if method else {}
    options |= {"weights": list(weights)} if weights else {}
    options |= dict(setting(text) for text in parameters)
    return sources, options | {name: value for name, value in given.items() if value is not None}


recipe_option = click.option(
    "--recipe", metavar="FILE",
    help="Read adapters, method, weights and parameters from a YAML file in mergekit's format.",
)  # fmt: skip


def recipe_of(adapters: Sequence[str], recipe: str | None) -> tuple[Sequence[str], Recipe | None]:
    """Return the adapters, and the recipe or None.

    The recipe is the file of `--recipe`. If `adapters` is a single file whose name ends in .yml or .yaml, this file is
    the recipe, and no adapters are returned, because the recipe names them.
    """
    from ..ops.recipes import read_recipe

    if recipe is None and len(adapters) == 1 and str(adapters[0]).lower().endswith((".yml", ".yaml")):
        return [], read_recipe(adapters[0])
    return adapters, None if recipe is None else read_recipe(recipe)


@contextmanager
def named_by(recipe: Recipe | None) -> Iterator[None]:
    """If the block raises an error about an adapter of the recipe, add the adapter's key in the recipe to the error."""
    from ..errors import AdapterkitError

    try:
        yield
    except AdapterkitError as error:
        for place, name in zip(recipe.places, recipe.adapters, strict=True) if recipe is not None else ():
            if error.path is not None and str(error.path).removeprefix("hf://") == name.removeprefix("hf://"):
                error.at(where=f"{place}.model" if error.where is None else f"{place}.model: {error.where}")
                break
        raise


def setting(text: str) -> tuple[str, object]:
    """Split a text such as `density=0.5` into a name and a value.

    Raises:
        UsageError: the text is not NAME=VALUE; NAME is an argument of `combine`, such as `weights`, and not a
            parameter of a method; or VALUE is not valid YAML.
    """
    import yaml

    from ..ops.recipes import ARGUMENTS

    name, sign, value = text.partition("=")
    if not sign or not name.isidentifier() or name in ARGUMENTS:
        why = f"{text!r} does not set a parameter of a method"
        raise UsageError(why, where="--set", cure="Type NAME=VALUE for a method's parameter, such as density=0.5")
    try:
        return name, yaml.safe_load(value)
    except yaml.YAMLError:
        cure = "Type a number, a word, or a YAML list or mapping"
        raise UsageError(f"{value!r} is not valid YAML", where="--set", cure=cure) from None


# Users can set defaults of options in environment variables, in a project's defaults file, and in their own defaults
# file, which applies to all projects.
#
# In the environment:
#     ADAPTERKIT_DEVICE=cpu                          for every command that has --device
#     ADAPTERKIT_MERGE_DEVICE=cpu                    only for merge
# In pyproject.toml, in the working directory or one of its parents:
#     [tool.adapterkit]            device = "cpu"    for every command that has --device
#     [tool.adapterkit.merge]      device = "cpu"    only for merge
# In adapterkit.toml in one of these folders, or in ~/.config/adapterkit/config.toml, the tables have no prefix:
#     device = "cpu"                                 at the top of the file, for every command that has --device
#     [merge]                      device = "cpu"    only for merge
#
# The command line has the highest precedence. The environment comes second, the project's file third, and the user's
# file last. Within one source, a default for one command has precedence over a default for all commands.
# If ADAPTERKIT_CONFIG is set, only the file that it names is read; if it is empty, no file is read.


PREFIX = "ADAPTERKIT_"
_PROGRAM_VARIABLES = ("CACHE", "CONFIG", "DEBUG", "KERNEL", "PATIENCE", "PROGRESS", "QUIET", "VERBOSE")

OWN_VARIABLES = frozenset(f"{PREFIX}{word}" for word in _PROGRAM_VARIABLES)
"""Environment variables that adapterkit reads, but not as defaults of options."""

TYPED = frozenset({
    "address", "dst", "engine", "figures", "json", "only_plan", "out", "overwrite", "sarif", "uri",
})  # fmt: skip
"""Parameters for which users cannot set defaults. They choose what is written or replaced, or which machine is used.

Users must type these options, because otherwise a defaults file in a downloaded folder could set them.
"""

_MOST = 1 << 20
"""The largest size of a defaults file, in bytes."""


@dataclass(frozen=True, slots=True)
class Default:
    """A default value that the user or a project has set for an option.

    Attributes:
        option: the option, such as `--device`.
        command: the command to which the default applies; None for all commands with this option.
        value: the value from the file or variable.
        source: the name of the environment variable, or the file and the key.
        parameter: the name of the option's parameter in click.
    """

    option: str
    command: str | None
    value: Any
    source: str
    parameter: str = ""


def for_command(name: str, command: click.Command) -> dict[str, JsonValue]:
    """Return a command's defaults (parameter -> value) in the form of click's `default_map`.

    Raises:
        UsageError: the command's table in a file sets an option that does not exist or cannot have a default.
        Malformed: a file is not valid TOML, or a value in it does not fit its option.
        StorageError: the file that ADAPTERKIT_CONFIG names cannot be read.
    """
    return {each.parameter: each.value for each in reversed([*settings_of(name, command)])}


def settings_of(name: str, command: click.Command) -> Iterator[Default]:
    """Yield the defaults of a command, highest precedence first."""
    options = options_of(command)
    for scope in (f"{name.upper()}_", ""):
        for key, parameter in options.items():
            variable = f"{PREFIX}{scope}{key.replace('-', '_').upper()}"
            value = os.environ.get(variable)
            if value:
                words: Any = value.split() if parameter.multiple else value
                yield Default(f"--{key}", name if scope else None, words, variable, parameter.name or "")
    for path, table in files():
        section = table.get(name)
        if isinstance(section, Mapping):
            yield from _entries(section, name, options, path, every=False)
        elif section is not None:
            cure = f"Write [{name}], then a line for each option"
            raise Malformed("the value is not a table", path=path, where=name, cure=cure)
        yield from _entries(table, None, options, path, every=True)


def options_of(command: click.Command) -> dict[str, click.Option]:
    """Return the options for which users can set a default, keyed by their long names without the leading `--`."""
    return {
        word.removeprefix("--"): option
        for option in command.params
        if isinstance(option, click.Option) and option.name not in TYPED and not option.required
        and option.name not in ("debug", "quiet", "verbose", "help", "version")
        for word in option.opts if word.startswith("--")
    }  # fmt: skip


def _entries(
    table: Mapping[str, JsonValue], command: str | None, options: Mapping[str, click.Option], path: Path, *, every: bool
) -> Iterator[Default]:
    for key, value in table.items():
        word = str(key).replace("_", "-")
        if word in options:
            parameter = options[word]
            if isinstance(value, Mapping) or (isinstance(value, list) and not parameter.multiple):
                why = f"the value does not fit --{word}"
                raise Malformed(why, path=path, where=str(key), cure="Write text or a number")
            if parameter.multiple and not isinstance(value, list):
                value = [value]
            yield Default(f"--{word}", command, value, f"{path}: {key}", parameter.name or "")
        elif not every:
            cure = nearest(word, options) or "Remove the line"
            if word.replace("-", "_") in TYPED:
                cure = "Type it on the command line: this option cannot have a default"
            why = f"{command} has no option --{word}, or this option cannot have a default"
            raise UsageError(why, path=path, where=str(key), cure=cure)


def files() -> Iterator[tuple[Path, Mapping[str, JsonValue]]]:
    """Yield the path and the content of each defaults file, highest precedence first.

    Raises:
        Malformed: a file is not valid TOML, its `tool.adapterkit` is not a table, or the file that ADAPTERKIT_CONFIG
            names is too large.
        StorageError: the file that ADAPTERKIT_CONFIG names cannot be read.
    """
    named = os.environ.get("ADAPTERKIT_CONFIG")
    if named is not None:
        if named:
            yield Path(named), _table(Path(named), needed=True)
        return
    here = _project()
    if here is not None:
        yield here
    home = os.environ.get("XDG_CONFIG_HOME") or os.path.join(os.path.expanduser("~"), ".config")
    user_file = Path(home) / "adapterkit" / "config.toml"
    if user_file.is_file():
        yield user_file, _table(user_file)


def _project() -> tuple[Path, Mapping[str, JsonValue]] | None:
    """Return the path and the content of the project's defaults file; None if there is no such file.

    The search starts in the working directory and goes up to its parents. The first adapterkit.toml, or
    pyproject.toml with `tool.adapterkit`, is used.
    """
    try:
        folder = Path.cwd()
    except OSError:  # The folder was removed.
        return None
    for place in (folder, *folder.parents):
        alone, shared = place / "adapterkit.toml", place / "pyproject.toml"
        if alone.is_file():
            return alone, _table(alone)
        if shared.is_file() and b"tool.adapterkit" in _bytes(shared):
            return shared, _table(shared)
    return None


def _table(path: Path, *, needed: bool = False) -> Mapping[str, JsonValue]:
    import tomllib

    try:
        content: Any = tomllib.loads(_bytes(path, needed=needed).decode("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        cure = "Correct the file, or set ADAPTERKIT_CONFIG= to read no file"
        raise Malformed(f"the file is not valid TOML: {error}", path=path, cure=cure) from None
    if path.name == "pyproject.toml":
        tool = content.get("tool", {})
        content = tool.get("adapterkit", {}) if isinstance(tool, Mapping) else {}
    if not isinstance(content, Mapping):
        raise Malformed("the value is not a table", path=path, where="tool.adapterkit", cure="Write [tool.adapterkit]")
    return content


def _bytes(path: Path, *, needed: bool = False) -> bytes:
    try:
        with open(path, "rb") as file:
            data = file.read(_MOST + 1)
    except OSError as error:
        if not needed:
            return b""
        cure = "Set ADAPTERKIT_CONFIG to a readable file, or to an empty text to read no file"
        raise StorageError(f"the file cannot be read: {error.strerror}", path=path, cure=cure) from None
    if len(data) > _MOST:
        if not needed:
            return b""
        cure = "Set ADAPTERKIT_CONFIG to a file with default values for options"
        raise Malformed(f"the file is larger than {_MOST} bytes", path=path, cure=cure)
    return data


def unknown(commands: Mapping[str, click.Command]) -> Iterator[tuple[str, str]]:
    """Yield (source, hint) for each default that no command uses. `doctor` reports these pairs.

    The source is an environment variable that starts with `ADAPTERKIT_`, or a key in a defaults file. The hint names
    a similar variable or key; if there is none, the hint is "no command uses it".
    """
    options = {name: options_of(command) for name, command in commands.items()}
    everywhere = {key for known in options.values() for key in known}
    variables = {f"{PREFIX}{key.replace('-', '_').upper()}" for key in everywhere} | OWN_VARIABLES
    variables |= {
        f"{PREFIX}{name.upper()}_{key.replace('-', '_').upper()}" for name, known in options.items() for key in known
    }
    for variable in sorted(os.environ):
        if variable.startswith(PREFIX) and variable not in variables:
            yield variable, nearest(variable, variables) or "no command uses it"
    for path, table in files():
        for key in table:
            if key not in commands and str(key).replace("_", "-") not in everywhere:
                yield f"{path}: {key}", nearest(str(key), [*commands, *everywhere]) or "no command uses it"
