"""Print the script that completes adapterkit in a shell.

It completes commands, options, paths, formats, methods and devices. For bash, add the line
eval "$(adapterkit completion bash)" to ~/.bashrc. For zsh, add eval "$(adapterkit completion zsh)" to ~/.zshrc. For
fish, write the script to ~/.config/fish/completions/adapterkit.fish.
"""

from __future__ import annotations

from collections.abc import Mapping

import click

from . import _options
from ._completion import script
from ._render import View, show


@click.command(help=__doc__)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@_options.flags
@click.pass_obj
def command(settings: _options.CliSettings, shell: str) -> None:
    """Print `_completion.script`."""
    if settings.json:
        show(settings, {"shell": shell, "script": script(shell)}, _view)
        return
    click.echo(script(shell))


def _view(record: Mapping[str, object]) -> View:
    yield str(record["script"])
