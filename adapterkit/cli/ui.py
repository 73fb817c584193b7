"""Open a page on this machine that runs these commands.

Each FOLDER may be read and written; the current one if none is named. The page listens on 127.0.0.1 alone, and the
address that is printed holds the key to it. Each job shows its command, which gives the same bytes when it is typed.
"""

from __future__ import annotations

import json
from pathlib import Path

import click

from . import _options


@click.command(help=__doc__)
@click.argument("folders", metavar="[FOLDER...]", nargs=-1)
@click.option("--port", type=click.IntRange(0, 65535), default=0, show_default="a free one", help="Port to listen on.")
@click.option("--browser/--no-browser", default=True, help="Open the page in the browser; on if absent.")
@click.option("--hubs", is_flag=True, help="Let jobs read adapters and bases from hubs, by address.")
@_options.flags
@click.pass_obj
def command(settings: _options.CliSettings, folders: tuple[str, ...], port: int, browser: bool, hubs: bool) -> None:
    """Runs `adapterkit.ui.server.serve`."""
    from ..ui.server import serve
    from . import adapterkit
    from ._completion import PATHS
    from ._stages import busy

    def started(address: str) -> None:
        # `show` would take the key out of the address, as it does of every address.
        click.echo(json.dumps({"address": address}) if settings.json else f"{address}\nCtrl-C ends it")
        if browser:
            click.launch(address)

    busy.set()  # A page that waits for its reader is not work that takes long.
    try:
        roots = [Path(folder).expanduser() for folder in folders] or [Path.cwd()]
        serve(adapterkit, PATHS, roots, port, started, hubs=hubs)
    finally:
        busy.clear()
