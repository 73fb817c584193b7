"""Show the same help as COMMAND --help.

Without COMMAND, all commands are listed.
"""

from __future__ import annotations

from collections.abc import Mapping

import click

from . import _options
from ._render import View, show


@click.command(help=__doc__)
@click.argument("name", metavar="[COMMAND]", required=False)
@_options.flags
@click.pass_context
def command(ctx: click.Context, name: str | None) -> None:
    """Print what `adapterkit NAME --help` prints."""
    from ..errors import UsageError, nearest
    from . import adapterkit

    parent = ctx.parent
    assert parent is not None
    if name is None:
        text = parent.get_help()
    else:
        known = adapterkit.list_commands(parent)
        subcommand = adapterkit.get_command(parent, name)
        if subcommand is None:
            raise UsageError(f"no such command {name!r}", cure=nearest(name, known) or f"Known: {', '.join(known)}")
        text = subcommand.get_help(subcommand.context_class(subcommand, parent=parent, info_name=name))
    if ctx.obj.json:
        show(ctx.obj, {"command": name, "help": text}, _view)
        return
    click.echo(text)


def _view(record: Mapping[str, object]) -> View:
    yield str(record["help"])
