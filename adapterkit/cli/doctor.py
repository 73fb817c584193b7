"""Check this installation and this machine.

Each fault comes with what to do about it; the exit code is 3 where something needed does not work.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from . import _options
from ._render import Table, View, show


@click.command(help=__doc__)
@_options.flags
@click.pass_context
def command(ctx: click.Context) -> None:
    """Runs every check of `adapterkit.cli._checks`."""
    from ._checks import all_checks

    checks = [check.record() for check in all_checks()]
    ok = all(check["status"] != "broken" for check in checks)
    show(ctx.obj, {"ok": ok, "checks": checks}, _view)
    if not ok:
        ctx.exit(3)


def _view(record: Mapping[str, Any]) -> View:
    checks = record["checks"]
    yield Table(("", "what", "found", "cure"), [[c["status"], c["name"], c["found"], c["cure"]] for c in checks])
