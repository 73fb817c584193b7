"""Find code that configs name, and chat templates that access more than their data."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import shown
from ..io.gguf_file import read_gguf
from ..io.inputs import read_input
from .findings import Finding
from .pickles import MOST

if TYPE_CHECKING:
    from jinja2 import nodes

_AUTO = ("auto_map", "custom_pipelines", "trust_remote_code", "model_class_path", "processor_class_path")
_TRUSTED_PARENTS = (
    "__main__.",
    "torch.",
    "transformers.",
    "diffusers.",
    "peft.",
    "adapters.",
    "sentence_transformers.",
)
_ADDRESS = re.compile(r"(?:https?|wss?|ftp)://[^\s'\"<>){}]+")
_COMPUTING = ("join", "format", "replace", "reverse")
"""Filters and methods that make a name from pieces."""

_BY_ATTRIBUTE = ("map", "selectattr", "rejectattr", "groupby", "sort", "sum", "min", "max", "unique")
"""Filters of Jinja that take the name of an attribute."""

LARGEST_TEXT = 32 << 20


def in_config(name: str, file: Path, unread: list[str]) -> Iterator[Finding]:
    """Yield the findings in a JSON file or in a file of a chat template.

    Args:
        name: the file's name in findings.
        file: the file.
        unread: gets a line if the file cannot be scanned.
    """
    if file.stat().st_size > LARGEST_TEXT:
        unread.append(f"{name}: it has more than {LARGEST_TEXT >> 20} MiB of text")
        return
    text = read_input(file).decode("utf-8-sig", "replace")
    if file.suffix.lower() == ".jinja":
        yield from _template(name, "", text)
        return
    twice: list[str] = []

    def pairs(held: list[tuple[str, object]]) -> dict[str, object]:
        found = dict(held)
        if len(found) < len(held):
            keys = [key for key, _ in held]
            twice.extend(key for key in found if keys.count(key) > 1)
        return found

    try:
        document = json.loads(text, object_pairs_hook=pairs)
    except (ValueError, RecursionError) as error:
        unread.append(f"{name}: it is not valid JSON: {error}")
        return
    for key in twice[:MOST]:
        yield Finding("other-content", name, shown(key), "the key occurs twice, and programs read different values")
    if file.name == "modules.json" and isinstance(document, list):
        yield from _modules(name, document)
    yield from _config(name, "", document, 0)


def in_gguf(name: str, file: Path) -> Iterator[Finding]:
    """Yield the findings in the chat templates of a GGUF file."""
    for key, value in read_gguf(file, tensors=False).values.items():
        if key.startswith("tokenizer.chat_template") and isinstance(value.value, str):
            yield from _template(name, key, value.value)


def _modules(name: str, document: list[Any]) -> Iterator[Finding]:
    """Yield the classes that sentence-transformers imports by name and that are not its own."""
    for position, entry in enumerate(document):
        kind = entry.get("type") if isinstance(entry, Mapping) else None
        if isinstance(kind, str) and not kind.startswith(_TRUSTED_PARENTS):
            yield Finding("code-in-config", name, f"[{position}].type", f"type: {shown(kind)}")


def _config(name: str, where: str, value: object, depth: int) -> Iterator[Finding]:
    if depth > 20:
        return
    if isinstance(value, Mapping):
        for key, entry in value.items():
            place = f"{where}.{key}" if where else str(key)
            if key in _AUTO and entry not in (None, False, {}, []):
                yield Finding("code-in-config", name, place, f"{key}: {shown(entry)}")
            elif key == "auto_mapping" and isinstance(entry, Mapping):
                parent = entry.get("parent_library")
                if isinstance(parent, str) and not f"{parent}.".startswith(_TRUSTED_PARENTS):
                    # peft.auto imports the module with this name.
                    yield Finding("code-in-config", name, place, f"parent_library: {shown(parent)}")
            elif key == "megatron_core" and isinstance(entry, str) and not f"{entry}.".startswith("megatron."):
                # peft.tuners.lora.tp_layer imports the module with this name.
                yield Finding("code-in-config", name, place, f"{key}: {shown(entry)}")
            elif key == "chat_template":
                yield from _templates(name, place, entry, depth)
            elif key == "template" and isinstance(entry, str):
                yield from _template(name, place, entry)
            else:
                yield from _config(name, place, entry, depth + 1)
    elif isinstance(value, list):
        for position, entry in enumerate(value[:1000]):
            yield from _config(name, f"{where}[{position}]", entry, depth + 1)


def _templates(name: str, where: str, value: object, depth: int) -> Iterator[Finding]:
    """Yield the findings in one template, or in several by name."""
    if isinstance(value, str):
        yield from _template(name, where, value)
    elif isinstance(value, Mapping) and depth <= 20:
        for key, entry in value.items():
            yield from _templates(name, f"{where}.{key}", entry, depth + 1)
    elif isinstance(value, list) and depth <= 20:
        for position, entry in enumerate(value):
            template = entry.get("template") if isinstance(entry, Mapping) else entry
            yield from _templates(name, f"{where}[{position}]", template, depth + 1)


def _template(name: str, where: str, text: str) -> Iterator[Finding]:
    from jinja2 import TemplateSyntaxError, nodes
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"])
    try:
        tree = environment.parse(text)
    except (TemplateSyntaxError, RecursionError):
        # Remove the `generation` block, which transformers adds to Jinja's syntax, and parse again.
        try:
            tree = environment.parse(re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", text))
        except (TemplateSyntaxError, RecursionError) as error:
            yield Finding("template", name, where, f"it cannot be parsed: {shown(str(error))}")
            return
    for node in tree.find_all(nodes.Getattr):
        if node.attr.startswith("_") or node.attr in ("mro", "gi_frame", "cr_frame", "f_globals"):
            yield Finding("template", name, where, f"it reads the attribute {node.attr}")
    for item in tree.find_all(nodes.Getitem):
        key = item.arg.value if isinstance(item.arg, nodes.Const) else None
        if isinstance(key, str) and key.startswith("__"):
            yield Finding("template", name, where, f"it reads the entry {key}")
        elif _is_computed(item.arg):
            yield Finding("template", name, where, "it reads an entry whose name it computes")
    for constant in tree.find_all(nodes.Const):
        if isinstance(constant.value, str) and "__" in constant.value:
            yield Finding("template", name, where, f"it contains the text {shown(constant.value)}")
    for reached in tree.find_all((nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends)):
        yield Finding("template", name, where, f"it loads another template ({type(reached).__name__.lower()})")
    for filtered in tree.find_all(nodes.Filter):
        if filtered.name == "attr":
            yield Finding("template", name, where, "it uses the filter attr")
        elif filtered.name in _BY_ATTRIBUTE and any(
            _is_computed(each) for each in (*filtered.args, *(pair.value for pair in filtered.kwargs))
        ):
            yield Finding("template", name, where, "it reads an attribute whose name it computes")
    for reference in tree.find_all(nodes.Name):
        if reference.name in ("lipsum", "cycler", "joiner", "self", "config", "request"):
            yield Finding("template", name, where, f"it uses the object {reference.name}")
    for address in _ADDRESS.findall(text)[:MOST]:
        yield Finding("template-address", name, where, shown(address))


def _is_computed(node: nodes.Expr) -> bool:
    """Whether an expression puts a name together from pieces."""
    from jinja2 import nodes

    def is_text(part: nodes.Node) -> bool:
        return isinstance(part, nodes.Const) and isinstance(part.value, str)

    match node:
        case nodes.Concat():
            return True
        case nodes.Add() | nodes.Mod() | nodes.Mul():
            return is_text(node.left) or is_text(node.right) or _is_computed(node.left) or _is_computed(node.right)
        case nodes.Filter():
            return node.name in _COMPUTING
        case nodes.Call():
            return isinstance(node.node, nodes.Getattr) and node.node.attr in _COMPUTING
    return False
