"""Describe commands as forms, and convert filled-in forms to command lines.

All paths must be inside the *open folders*: the folders with which the user started `adapterkit ui`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..errors import UsageError, public
from ..io.locations import is_address, path_text

if TYPE_CHECKING:
    from ..io.strict_json import JsonValue


COMMANDS = (
    "inspect", "report", "convert", "combine", "resize", "merge", "diff", "validate", "names", "extract", "verify",
    "scan",
)  # fmt: skip
"""The commands on the page, in the page's order. Commands that run other programs or use hubs are omitted."""

LEFT_OUT = frozenset({
    "address", "bandwidth", "debug", "engine", "from_sarif", "help", "json", "node_tasks", "nodes", "price", "quiet",
    "recipe", "sarif", "stream", "suite", "verbose",
})  # fmt: skip
"""Options that forms omit, such as options for the output in a terminal, options for a Ray cluster, and options that
take a file with further paths in it. The page checks only the paths in the form itself, not the paths in such a file.
"""

LONGEST = 4096
"""The maximum number of characters in one value of a field."""

MANY = 64
"""The maximum number of values in a field that accepts several values."""


@dataclass(frozen=True, slots=True)
class Field:
    """A form field for one argument or option of a command."""

    name: str
    label: str
    help: str
    kind: str
    many: bool
    required: bool
    choices: tuple[str, ...]
    default: str
    output: bool

    def record(self) -> dict[str, JsonValue]:
        """Return the field as plain data."""
        return {
            "name": self.name, "label": self.label, "help": self.help, "kind": self.kind, "many": self.many,
            "required": self.required, "choices": list(self.choices), "default": self.default,
        }  # fmt: skip


OUTPUTS = frozenset({"dst", "figures", "out"})
"""The names of the parameters that take the path of an output."""


def fields_of(command: click.Command, paths: Collection[str]) -> Iterator[Field]:
    """Yield the fields of a command, arguments first.

    Args:
        command: the command.
        paths: the names of the parameters that take paths.
    """
    for param in sorted(command.params, key=lambda each: isinstance(each, click.Option)):
        name = param.name or ""
        if name in LEFT_OUT or (isinstance(param, click.Option) and param.hidden):
            continue
        choices = tuple(map(str, param.type.choices)) if isinstance(param.type, click.Choice) else ()
        flag = isinstance(param, click.Option) and param.is_flag
        kind = "flag" if flag else "choice" if choices else "path" if name in paths else "text"
        text = param.help or "" if isinstance(param, click.Option) else ""
        long = next((word for word in param.opts if word.startswith("--")), name)
        label = long if isinstance(param, click.Option) else name.upper().replace("_", " ")
        off = f"{long} / {param.secondary_opts[0]}" if flag and param.secondary_opts else label
        many = param.multiple or param.nargs == -1
        default = param.default if isinstance(param.default, str | int | float | bool) else ""
        shown = "" if default is False or default == "" else str(default)
        yield Field(name, off, text, kind, many, param.required, choices, shown, name in OUTPUTS)


class Forms:
    """The forms of a page.

    Args:
        group: the commands.
        paths: the names of the commands' parameters that take paths.
        roots: the open folders, in which jobs may read and write.
        hubs: whether adapters and bases may also be addresses on hubs. Outputs must always be paths.
    """

    def __init__(
        self, group: click.Group, paths: Collection[str], roots: Sequence[Path], *, hubs: bool = False
    ) -> None:  # fmt: skip
        self.hubs = hubs
        ctx = click.Context(group)
        commands = {name: group.get_command(ctx, name) for name in COMMANDS}
        self.commands: dict[str, click.Command] = {name: each for name, each in commands.items() if each is not None}
        self.paths = frozenset(paths)
        self.roots = tuple(root.resolve() for root in roots)
        self.fields = {name: list(fields_of(command, paths)) for name, command in self.commands.items()}

    def record(self) -> list[dict[str, JsonValue]]:
        """Return all forms as plain data."""
        return [
            {"name": name, "help": (self.commands[name].help or "").strip(),
             "fields": [field.record() for field in fields]}
            for name, fields in self.fields.items()
        ]  # fmt: skip

    def inside(self, value: str, *, output: bool = False) -> Path:
        """Check that a path is inside an open folder, and return it as an absolute path without symbolic links.

        Args:
            value: the path; a relative path starts at the first open folder.
            output: whether a command will write to the path.

        Raises:
            UsageError: the path is invalid, is an address on a hub, is outside the open folders, or is an open folder
                that a command would replace.
        """
        if is_address(value):
            cure = "Start the page with --hubs, or download the files first with adapterkit pull"
            why = "the page does not write to hubs" if self.hubs else "the page does not open addresses"
            raise UsageError(why, where=public(value), cure="Choose a folder" if self.hubs else cure)
        if "\0" in value or len(value) > LONGEST:
            raise UsageError("the path is too long or contains a NUL character", cure="Choose a file or a folder")
        given = Path(path_text(value))
        path = given if given.is_absolute() else self.roots[0] / given
        try:
            real = path.resolve()
        except (OSError, RuntimeError) as error:
            raise UsageError(f"the path is invalid: {error}", where=value, cure="Choose a file or a folder") from None
        if not any(real == root or root in real.parents for root in self.roots):
            cure = (
                f"Open its folder too: adapterkit ui FOLDER...; the open folders are {', '.join(map(str, self.roots))}"
            )
            raise UsageError("the path is outside the open folders", where=value, cure=cure)
        if output and real in self.roots:
            raise UsageError("an open folder itself cannot be replaced", where=value, cure="Choose a folder inside it")
        return real

    def words(self, command: str, values: Mapping[str, object]) -> list[str]:
        """Return the command line for a filled-in form, as a list of arguments.

        Raises:
            UsageError: the command or a field is unknown, a value does not fit its field, or `inside` refuses a path.
        """
        if command not in self.fields:
            raise UsageError(f"the page has no command {command!r}", cure=f"Choose one of {', '.join(self.fields)}")
        if not isinstance(values, Mapping):
            raise UsageError("the values of a form must be a mapping", cure="Fill in the form")
        fields = {field.name: field for field in self.fields[command]}
        for name in values:
            if name not in fields:
                raise UsageError(f"{command} has no field {name!r}", cure=f"Choose one of {', '.join(fields)}")
        params = {param.name: param for param in self.commands[command].params}
        options: list[str] = []
        arguments: list[str] = []
        for name, field in fields.items():
            given = [*self._given(field, values.get(name))]
            if isinstance(params[name], click.Argument):
                arguments += given
                continue
            long = next(word for word in params[name].opts if word.startswith("--"))
            if field.kind == "flag":
                option = params[name]
                off = option.secondary_opts
                options += [long if given[0] == "yes" else off[0]] if given and (given[0] == "yes" or off) else []
            else:
                options += [f"{long}={value}" for value in given]
        return [command, *options, *(["--", *arguments] if arguments else [])]

    def _given(self, field: Field, value: object) -> Iterator[str]:
        if value is None or (value in ("", [], False) and field.kind != "flag"):
            return
        if field.kind == "flag":
            if not isinstance(value, bool):
                raise UsageError("the value must be yes or no", where=field.label, cure="Tick the box or clear it")
            if value != (field.default == "True"):
                yield "yes" if value else "no"
            return
        many = value if isinstance(value, list) else [value]
        if len(many) > (MANY if field.many else 1):
            raise UsageError(
                "the field has too many values", where=field.label, cure=f"Give at most {MANY if field.many else 1}"
            )
        for each in many:
            if not isinstance(each, str | int | float) or isinstance(each, bool):
                raise UsageError("the value must be text or a number", where=field.label, cure="Type text or a number")
            text = str(each)
            if len(text) > LONGEST or "\0" in text:
                why = f"the value has more than {LONGEST} characters, or contains a NUL character"
                raise UsageError(why, where=field.label, cure="Type a shorter value, without NUL")
            yield self._checked(field, text)

    def _checked(self, field: Field, text: str) -> str:
        if self.hubs and field.kind == "path" and not field.output and is_address(text):
            return text
        if field.kind == "path" or (field.name == "tokenizer" and text not in ("base", "adapter")):
            return str(self.inside(text, output=field.output))
        if field.name == "rename" and text.startswith("@"):
            return f"@{self.inside(text[1:])}"
        return text

    def listing(self, folder: str | None) -> dict[str, JsonValue]:
        """List the entries of a folder with their likely kinds, for the dialog in which the user chooses a path.

        If `folder` is empty or None, list the open folders. Hidden entries are omitted.
        """
        if not folder:
            entries = [{"name": str(root), "path": str(root), "kind": "folder"} for root in self.roots]
            return {"path": "", "parent": None, "entries": entries, "left_out": 0}
        path = self.inside(folder)
        try:
            with os.scandir(path) as dir_entries:
                names = sorted((each for each in dir_entries if not each.name.startswith(".")), key=_natural)
        except OSError as error:
            raise UsageError(
                f"the folder cannot be listed: {error.strerror}", where=folder, cure="Choose another folder"
            ) from None
        entries = [{"name": each.name, "path": str(path / each.name), "kind": _kind(each)} for each in names[:LISTED]]
        parent = "" if path in self.roots else str(path.parent)
        return {"path": str(path), "parent": parent, "entries": entries, "left_out": max(0, len(names) - LISTED)}


LISTED = 1000
"""The maximum number of entries that `Forms.listing` returns for one folder."""

_WEIGHTS = (".safetensors", ".gguf", ".bin", ".pt", ".pth", ".npz", ".ckpt", ".nemo")


def _kind(entry: os.DirEntry[str]) -> str:
    """Return the likely kind of an entry: adapter, base, weights, graph, page, folder or file.

    The kind depends only on names: a file's own name, or the names of the first 200 entries in a folder.
    """
    if entry.is_dir():
        try:
            with os.scandir(entry.path) as inside:
                names = {each.name for _, each in zip(range(200), inside, strict=False)}
        except OSError:
            return "folder"
        if names & {"adapter_config.json", "adapters.safetensors", "adapter.safetensors"}:
            return "adapter"
        if any(name.endswith(_WEIGHTS) for name in names):
            return "base" if "config.json" in names else "weights"
        return "folder"
    name = entry.name.lower()
    if name.endswith(_WEIGHTS):
        return "weights"
    return "graph" if name.endswith(".onnx") else "page" if name.endswith((".html", ".htm")) else "file"


def _natural(entry: os.DirEntry[str]) -> tuple[bool, list[int | str]]:
    parts = re.split(r"(\d+)", entry.name.lower())
    return not entry.is_dir(), [int(part) if part.isdecimal() else part for part in parts]
