"""Open a local web page that runs these commands.

The page can read and write files in each FOLDER; default: the current folder. The page is reachable only from this
machine (127.0.0.1) and only through the printed address, which contains a secret key. For each job, the page shows the
equivalent command line.
"""

from __future__ import annotations

import json
from pathlib import Path

import click

from . import _options


@click.command(help=__doc__)
@click.argument("folders", metavar="[FOLDER...]", nargs=-1)
@click.option("--port", type=click.IntRange(0, 65535), default=0, show_default="a free one", help="Port to listen on.")
@click.option(
    "--browser/--no-browser", default=True, help="Open the page in the browser (default), or only print its address."
)
@click.option("--hubs", is_flag=True, help="Allow jobs to read adapters and bases from hubs, such as hf://org/repo.")
@_options.flags
@click.pass_obj
def command(settings: _options.CliSettings, folders: tuple[str, ...], port: int, browser: bool, hubs: bool) -> None:
    """Run `adapterkit.ui.serve`."""
    from ..ui import serve
    from . import adapterkit
    from ._progress import busy
    from .completion import PATHS

    def started(address: str) -> None:
        # Do not use `show`: it removes secrets, such as the key in this address.
        click.echo(json.dumps({"address": address}) if settings.json else f"{address}\nPress Ctrl-C to stop")
        if browser:
            click.launch(address)

    busy.set()  # Print no "still working" lines: the server may wait for its user for hours.
    try:
        roots = [Path(folder).expanduser() for folder in folders] or [Path.cwd()]
        serve(adapterkit, PATHS, roots, port, started, hubs=hubs)
    finally:
        busy.clear()
