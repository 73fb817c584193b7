"""List the known formats, methods or quantization schemes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from . import _options
from ._render import Table, View, show


@click.command(help=__doc__)
@click.argument("what", type=click.Choice(["formats", "methods", "quant"]))
@_options.flags
@click.pass_obj
def command(settings: _options.Settings, what: str) -> None:
    """Lists `adapterkit.FORMATS`, `adapterkit.METHODS` or `adapterkit.quant.SCHEMES`."""
    if what == "formats":
        show(settings, {"formats": formats()}, _formats_view)
    elif what == "quant":
        show(settings, {"quant": schemes()}, _schemes_view)
    else:
        show(settings, {"methods": methods()}, _methods_view)


def formats() -> list[dict[str, Any]]:
    """One record a format, in the order of their names."""
    from ..formats import FORMATS

    return [
        {
            "name": name, "description": entry.description, "methods": sorted(entry.methods),
            "compat": sorted(entry.compat), "url": entry.url,
        }
        for name, entry in FORMATS.items()
    ]  # fmt: skip


def methods() -> list[dict[str, Any]]:
    """One record a method, in the order of their names: tensors with shape strings, attributes with defaults."""
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


def schemes() -> list[dict[str, Any]]:
    """One record a quantization scheme, in the order of their names."""
    from ..quant import SCHEMES

    return [
        {"name": name, "description": entry.description, "library": entry.library, "url": entry.url}
        for name, entry in SCHEMES.items()
    ]


def _default(field: Any) -> Any:
    import dataclasses

    return None if field.default is dataclasses.MISSING else field.default


def _formats_view(record: Mapping[str, Any]) -> View:
    columns = ("format", "description", "methods", "compat")
    yield Table(
        columns,
        [[f["name"], f["description"], " ".join(f["methods"]), " ".join(f["compat"])] for f in record["formats"]],
    )


def _schemes_view(record: Mapping[str, Any]) -> View:
    columns = ("scheme", "description", "checked against")
    yield Table(columns, [[s["name"], s["description"], s["library"]] for s in record["quant"]])


def _methods_view(record: Mapping[str, Any]) -> View:
    yield Table(("method", "kind", "tensors", "formula"), [_method_row(m) for m in record["methods"]])


def _method_row(method: Mapping[str, Any]) -> list[str]:
    tensors = (f"{f}[{axes}]" + "?" * (f in method["optional"]) for f, axes in method["tensors"].items())
    return [method["name"], method["kind"], " ".join(tensors), method["formula"]]
