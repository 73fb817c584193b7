"""Defaults of options: from the environment, from a project's file, and from the user's own file.

    ADAPTERKIT_DEVICE=cpu                      every command that has --device
    ADAPTERKIT_MERGE_DEVICE=cpu                only merge
    [tool.adapterkit]            device = "cpu"      in pyproject.toml, here or in a folder above
    [tool.adapterkit.merge]      device = "cpu"
    device = "cpu"  /  [merge]                       in adapterkit.toml, or in ~/.config/adapterkit/config.toml

The command line has precedence over the environment, the environment over the project's file, and the project's file
over the user's file. Within one source, a default for one command has precedence over a default for all commands.
ADAPTERKIT_CONFIG names the only file to read; if it is empty, no file is read.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import Malformed, StorageError, UsageError, nearest

if TYPE_CHECKING:
    from ..io.strict_json import JsonValue


PREFIX = "ADAPTERKIT_"
_OWN = ("CACHE", "CONFIG", "DEBUG", "KERNEL", "PATIENCE", "PROGRESS", "QUIET", "VERBOSE")

OWN_VARIABLES = frozenset(f"{PREFIX}{word}" for word in _OWN)
"""Environment variables of adapterkit that are not defaults of options."""

TYPED = frozenset({
    "address", "dst", "engine", "figures", "json", "only_plan", "out", "overwrite", "sarif", "uri",
})  # fmt: skip
"""Parameters without a default: they choose the files to write or replace, and the machine that does the work.

They must be typed, because a file of defaults in a downloaded folder could otherwise choose their values.
"""

_MOST = 1 << 20
"""The largest size of a file of defaults, in bytes."""


@dataclass(frozen=True, slots=True)
class Default:
    """A default of an option that the user or a project has set.

    Attributes:
        option: the option, such as `--device`.
        command: the command that the default applies to, or None for all commands with this option.
        value: the value from the file or variable.
        source: the environment variable, or the file and the key.
        parameter: click's name for the option.
    """

    option: str
    command: str | None
    value: Any
    source: str
    parameter: str = ""


def for_command(name: str, command: click.Command) -> dict[str, JsonValue]:
    """Return a command's defaults (parameter -> value) in the form of click's `default_map`.

    Raises:
        UsageError: a file sets an option that does not exist, or that must be typed on the command line.
        Malformed: a file is not valid TOML.
    """
    return {each.parameter: each.value for each in reversed([*settings_of(name, command)])}


def settings_of(name: str, command: click.Command) -> Iterator[Default]:
    """Yield the defaults of a command, those with the highest precedence first."""
    options = options_of(command)
    for scope in (f"{name.upper()}_", ""):
        for key, parameter in options.items():
            variable = f"{PREFIX}{scope}{key.replace('-', '_').upper()}"
            value = os.environ.get(variable)
            if value:
                words: Any = value.split() if parameter.multiple else value
                yield Default(f"--{key}", name if scope else None, words, variable, parameter.name or "")
    for path, table in files():
        own = table.get(name)
        if isinstance(own, Mapping):
            yield from _entries(own, name, options, path, every=False)
        elif own is not None:
            cure = f"Write [{name}], then a line for each option"
            raise Malformed("the value is not a table", path=path, where=name, cure=cure)
        yield from _entries(table, None, options, path, every=True)


def options_of(command: click.Command) -> dict[str, click.Option]:
    """Return the options of a command that may have a default, by their long names without dashes."""
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
                cure = "Type it on the command line: options that choose what is written or replaced have no default"
            why = f"{command} has no option --{word} that can have a default"
            raise UsageError(why, path=path, where=str(key), cure=cure)


def files() -> Iterator[tuple[Path, Mapping[str, JsonValue]]]:
    """Yield the files of defaults and their content, those with the highest precedence first.

    Raises:
        Malformed: a file is not valid TOML.
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
    own = Path(home) / "adapterkit" / "config.toml"
    if own.is_file():
        yield own, _table(own)


def _project() -> tuple[Path, Mapping[str, JsonValue]] | None:
    """Return the nearest adapterkit.toml or pyproject.toml with a table for adapterkit, here or in a folder above."""
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
        found: Any = tomllib.loads(_bytes(path, needed=needed).decode("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        cure = "Correct the file, or set ADAPTERKIT_CONFIG= to read no file"
        raise Malformed(f"the file is not valid TOML: {error}", path=path, cure=cure) from None
    if path.name == "pyproject.toml":
        tool = found.get("tool", {})
        found = tool.get("adapterkit", {}) if isinstance(tool, Mapping) else {}
    if not isinstance(found, Mapping):
        raise Malformed("the value is not a table", path=path, where="tool.adapterkit", cure="Write [tool.adapterkit]")
    return found


def _bytes(path: Path, *, needed: bool = False) -> bytes:
    try:
        with open(path, "rb") as file:
            data = file.read(_MOST + 1)
    except OSError as error:
        if not needed:
            return b""
        cure = "Set ADAPTERKIT_CONFIG to a file, or to nothing to read no file"
        raise StorageError(f"the file cannot be read: {error.strerror}", path=path, cure=cure) from None
    if len(data) > _MOST:
        if not needed:
            return b""
        cure = "Set ADAPTERKIT_CONFIG to a file of defaults"
        raise Malformed(f"the file is larger than {_MOST} bytes", path=path, cure=cure)
    return data


def unknown(commands: Mapping[str, click.Command]) -> Iterator[tuple[str, str]]:
    """Yield (source, why) for every variable and key that no command uses; `doctor` reports them."""
    options = {name: options_of(command) for name, command in commands.items()}
    everywhere = {key for found in options.values() for key in found}
    variables = {f"{PREFIX}{key.replace('-', '_').upper()}" for key in everywhere} | OWN_VARIABLES
    variables |= {
        f"{PREFIX}{name.upper()}_{key.replace('-', '_').upper()}" for name, found in options.items() for key in found
    }
    for variable in sorted(os.environ):
        if variable.startswith(PREFIX) and variable not in variables:
            yield variable, nearest(variable, variables) or "no command uses it"
    for path, table in files():
        for key in table:
            if key not in commands and str(key).replace("_", "-") not in everywhere:
                yield f"{path}: {key}", nearest(str(key), [*commands, *everywhere]) or "no command uses it"
