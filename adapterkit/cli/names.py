"""Show which weights of a base an adapter's targets match.

BASE is a folder of weights or one weight file; ADAPTER is an adapter in any known format. Only headers are read. The
rules that map the adapter's names to the base's names are listed below the table; --rename adds your own rules.
Without ADAPTER, the table shows the names of the base and the names that other tools use for the same weights.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import click

from . import _options
from ._render import TextTable, View, counted, integer, part, parts, show, texts


@click.command(help=__doc__)
@click.argument("base")
@click.argument("adapter", required=False)
@_options.rename
@_options.allow_partial
@_options.stating
@_options.strict_base_of_read
@_options.flags
@click.pass_obj
def command(
    settings: _options.CliSettings, base: str, adapter: str | None, rename: tuple[str, ...], allow_partial: bool
) -> None:
    """Run `adapterkit.names`."""
    from ..api import names

    given = None if adapter is None else _options.in_reading((adapter,), None, base)[0]
    record = names(base, given, rename=rename, allow_partial=allow_partial)
    warnings = [] if adapter is None or given is None else _options.base_warnings([adapter], [given], base)
    show(settings, {**record, "adapter": adapter, "warnings": warnings}, _view)


def _view(record: Mapping[str, object]) -> View:
    family = f", architecture {record['family']}" if record["family"] else ", no architecture file"
    yield f"{record['base']}: model_type {record['model_type'] or 'not given'}{family}"
    if "weights" in record:
        weights = parts(record, "weights")
        namings = list(dict.fromkeys(naming for weight in weights for naming in part(weight, "names")))
        rows = [
            [_numbered(str(weight["name"])), weight["tensors"], *(_other(weight, naming) for naming in namings)]
            for weight in weights
        ]
        yield TextTable(("name", "modules", *namings), rows)
        return
    groups: dict[tuple[str, str, str, str], int] = {}
    for each in parts(record, "targets"):
        cut = "" if each["rows"] is None else f"[{':'.join(texts(each, 'rows'))}]"
        layout = "" if each["layout"] == "out *in" else str(each["layout"])
        key = _template(str(each["target"])), _template(str(each["path"])), cut, layout
        groups[key] = groups.get(key, 0) + 1
    yield TextTable(("adapter", "base", "rows", "layout", "targets"), [[*key, count] for key, count in groups.items()])
    for rule in parts(record, "rules"):
        yield f"{rule['rule']}: {counted(integer(rule, 'targets'), 'target')}"
    if record["missing"]:
        yield f"not in the base: {', '.join(texts(record, 'missing'))}"
    yield from (f"warning: {warning}" for warning in texts(record, "warnings"))


def _other(weight: Mapping[str, object], naming: str) -> str:
    name = str(part(weight, "names").get(naming, ""))
    return "" if _numbered(re.sub(r"\{[a-z]\}", "#", name)) == _numbered(str(weight["name"])) else name


def _template(name: str) -> str:
    return re.sub(r"(?<![^.])\d+(?![^.\[])", "{n}", name)


def _numbered(name: str) -> str:
    return name.replace("#", "{n}")
