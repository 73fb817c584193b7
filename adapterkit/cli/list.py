"""List formats, methods, combiners, quant schemes or loaders.

'list loaders' lists the known tools that load adapter files. 'list loaders FILE' shows for each tool whether it loads
all keys of the file, some of them, or none. If a tool does not load all keys, the table shows the reason. If a
conversion helps, the table also shows the arguments for adapterkit convert.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import click

from . import _options
from ._render import TextTable, View, part, parts, show, texts

if TYPE_CHECKING:
    from dataclasses import Field

    from ..io.strict_json import JsonValue
    from ..loaders import Answer


@click.command(help=__doc__)
@click.argument("what", type=click.Choice(["formats", "methods", "combine", "quant", "loaders"]))
@click.argument("file", required=False)
@_options.reading
@_options.flags
@click.pass_obj
def command(
    settings: _options.CliSettings, what: str, file: str | None, source_format: str | None, base: str | None,
    compat: str | None,
) -> None:  # fmt: skip
    """List `adapterkit.FORMATS`, `METHODS`, `adapterkit.ops.COMBINERS`, `adapterkit.quant.SCHEMES` or the loaders."""
    if file is not None and what != "loaders":
        raise click.UsageError(f"'list {what}' takes no FILE; only 'list loaders' does")
    stated_options = {"from": source_format, "base": base, "compat": compat, **_options.stated()}
    given = next((name for name, value in stated_options.items() if value is not None), None)
    if file is None and given is not None:
        raise click.UsageError(f"--{given} requires 'list loaders FILE'")
    if file is not None:
        _loaders_of(settings, file, source_format, base, compat)
    elif what == "loaders":
        _loaders(settings)
    elif what == "formats":
        show(settings, {"formats": formats()}, _formats_view)
    elif what == "combine":
        show(settings, {"combine": combiners()}, _combiners_view)
    elif what == "quant":
        show(settings, {"quant": schemes()}, _schemes_view)
    else:
        show(settings, {"methods": methods()}, _methods_view)


def formats() -> list[dict[str, JsonValue]]:
    """Return a record of each format, sorted by name."""
    from ..formats import FORMATS

    return [
        {
            "name": name, "description": entry.description, "methods": sorted(entry.methods),
            "compat": sorted(entry.compat), "url": entry.url,
        }
        for name, entry in FORMATS.items()
    ]  # fmt: skip


def methods() -> list[dict[str, object]]:
    """Return a record of each method, sorted by name, with the tensors' shapes and the attributes' defaults."""
    from ..methods import METHODS

    return [
        {
            "name": name, "kind": entry.kind, "version": entry.version,
            "formula": (entry.__doc__ or "").partition("\n")[0].removesuffix("."),
            "tensors": {f: field.metadata["axes"].text for f, field in entry.tensor_fields().items()},
            "optional": [f for f, field in entry.tensor_fields().items() if field.metadata["optional"]],
            "attributes": {f: _default(field) for f, field in entry.attribute_fields().items()},
            "paper": entry.paper,
        }
        for name, entry in METHODS.items()
    ]  # fmt: skip


def combiners() -> list[dict[str, object]]:
    """Return a record of each combiner, sorted by name, with the parameters' defaults and meanings."""
    from ..ops import COMBINERS

    return [
        {
            "name": name, "title": entry.title, "data": entry.data, "based": entry.based,
            "then": entry.defaults().get("then"),
            "parameters": {n: field.default for n, field in entry.parameters().items()},
            "meanings": {n: field.metadata["meaning"] for n, field in entry.parameters().items()},
            "among": {n: list(f.metadata["among"]) for n, f in entry.parameters().items() if f.metadata["among"]},
            "compat": sorted(entry.compat), "paper": entry.paper,
        }
        for name, entry in COMBINERS.items()
    ]  # fmt: skip


def schemes() -> list[dict[str, JsonValue]]:
    """Return a record of each quantization scheme, sorted by name."""
    from ..quant import SCHEMES

    return [
        {"name": name, "description": entry.description, "oracle": entry.oracle, "url": entry.url}
        for name, entry in SCHEMES.items()
    ]


def _loaders(settings: _options.CliSettings) -> None:
    from ..loaders import loaders

    known = [
        {"name": name, "title": tool.title, "version": tool.version, "kind": tool.kind, "url": tool.url}
        for name, tool in loaders().items()
    ]
    show(settings, {"loaders": known}, _tools_view)


def _loaders_of(
    settings: _options.CliSettings, file: str, source_format: str | None, base: str | None, compat: str | None
) -> None:
    from .. import detect, read
    from ..errors import UsageError
    from ..io.inputs import inputs_kept
    from ..io.locations import located
    from ..loaders import loaders_of
    from ..reporting.inspecting import outline_of

    path = located(file)
    with inputs_kept():
        name = source_format or detect(path)
        outlined = None
        try:
            adapter = read(path, name, base, compat=compat, **_options.stated())
        except UsageError as error:
            outlined = None if base is not None or _options.stated() else outline_of(path, name, compat, error)
            if outlined is None:
                raise
            adapter = outlined[1]
        answers = loaders_of(adapter, name, path)
        if outlined is not None:
            answers = [_with_base(answer) for answer in answers]
        warnings = _options.base_warnings([file], [adapter], base)
    record = {"path": file, "format": name, "loaders": answer_records(answers), "warnings": warnings}
    show(settings, record, _loaders_view)


def _with_base(answer: Answer) -> Answer:
    """Add `--base BASE` to the arguments of a conversion, because the file cannot be read without the base."""
    from dataclasses import replace

    if not answer.convert or "--base" in answer.convert:
        return answer
    return replace(answer, convert=f"{answer.convert} --base BASE")


def answer_records(answers: Sequence[Answer]) -> list[dict[str, str]]:
    """Return a record for each tool: whether the tool loads the file, why it does not, and a conversion that helps."""
    fields = ("tool", "title", "loads", "why", "convert")
    return [{name: getattr(answer, name) for name in fields} for answer in answers]


def _default(field: Field[object]) -> object:
    import dataclasses

    return None if field.default is dataclasses.MISSING else field.default


def _formats_view(record: Mapping[str, object]) -> View:
    rows = [
        [each["name"], each["description"], " ".join(texts(each, "methods")), " ".join(texts(each, "compat"))]
        for each in parts(record, "formats")
    ]
    yield TextTable(("format", "description", "methods", "compat"), rows)


def _combiners_view(record: Mapping[str, object]) -> View:
    rows = [_combiner_row(each) for each in parts(record, "combine")]
    yield TextTable(("method", "what it is", "parameters"), rows)


def _combiner_row(entry: Mapping[str, object]) -> list[object]:
    before = {"then": entry["then"]} if entry["then"] else {}
    values = (f"{name}={_shown(value)}" for name, value in {**before, **part(entry, "parameters")}.items())
    data = "" if entry["data"] is None else "; needs data"
    return [entry["name"], f"{entry['title']}{data}" + ("; needs the base" if entry["based"] else ""), " ".join(values)]


def _shown(value: object) -> str:
    if value is None or isinstance(value, bool):
        return {None: "-", True: "true", False: "false"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)


def _tools_view(record: Mapping[str, object]) -> View:
    rows = [[each["name"], each["title"], each["version"], each["kind"]] for each in parts(record, "loaders")]
    yield TextTable(("loader", "tool", "version", "models"), rows)


def _loaders_view(record: Mapping[str, object]) -> View:
    yield f"{record['path']}: {record['format']}"
    rows = [[each["title"], each["loads"], each["convert"], each["why"]] for each in parts(record, "loaders")]
    yield TextTable(("tool", "loads", "arguments of convert", "why"), rows)
    yield from (f"warning: {warning}" for warning in texts(record, "warnings"))


def _schemes_view(record: Mapping[str, object]) -> View:
    columns = ("scheme", "description", "checked against")
    yield TextTable(columns, [[s["name"], s["description"], s["oracle"]] for s in parts(record, "quant")])


def _methods_view(record: Mapping[str, object]) -> View:
    rows = [_method_row(each) for each in parts(record, "methods")]
    yield TextTable(("method", "kind", "tensors", "formula"), rows)


def _method_row(method: Mapping[str, object]) -> list[object]:
    optional = texts(method, "optional")
    tensors = (f"{f}[{axes}]" + "?" * (f in optional) for f, axes in part(method, "tensors").items())
    return [method["name"], method["kind"], " ".join(tensors), method["formula"]]
