"""Print the script that completes adapterkit in a shell.

Paths, formats, methods and devices are completed, too. For bash, put eval "$(adapterkit completion bash)" into
~/.bashrc; for zsh the same with zsh into ~/.zshrc; for fish, write the script into
~/.config/fish/completions/adapterkit.fish.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from . import _options
from ._completion import script
from ._render import View, show


@click.command(help=__doc__)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@_options.flags
@click.pass_obj
def command(settings: _options.CliSettings, shell: str) -> None:
    """Prints `_completion.script`."""
    if settings.json:
        show(settings, {"shell": shell, "script": script(shell)}, _view)
        return
    click.echo(script(shell))


def _view(record: Mapping[str, Any]) -> View:
    yield record["script"]
