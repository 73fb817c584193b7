"""Print the script that completes adapterkit in a shell.

The script completes commands, options, paths, formats, methods and devices. For bash, add the line
eval "$(adapterkit completion bash)" to ~/.bashrc. For zsh, add eval "$(adapterkit completion zsh)" to ~/.zshrc. For
fish, write the script to ~/.config/fish/completions/adapterkit.fish.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

from . import _options
from ._render import View, show

# Shell completion of paths and of the names of formats, combiners and devices.
#
# click completes commands, flags and choices, but not the values of text parameters. Therefore, when a shell runs the
# program to get completions, each text parameter in `VALUES` or `PATHS` gets a type that completes its values.


VARIABLE = "_ADAPTERKIT_COMPLETE"
"""The environment variable that the shell's completion script sets when it runs the program to get completions."""

PATHS = frozenset({
    "a", "adapter", "adapters", "b", "base", "base_weights", "calibration", "dst", "experts", "figures", "file",
    "folders", "merged", "model", "onto", "out", "recipe", "src", "suite", "tuned",
})  # fmt: skip
"""Names of the parameters whose values are completed as paths."""


def _formats() -> Iterable[str]:
    from ..formats import FORMATS

    return FORMATS


def _combiners() -> Iterable[str]:
    from ..ops import COMBINERS

    return COMBINERS


VALUES: dict[str, Callable[[], Iterable[str]]] = {
    "compat": lambda: ("formula", "rank_major", "grouped_by_expert"),
    "device": lambda: ("auto", "cpu", "cuda", "cuda:0"),
    "dtype": lambda: ("BF16", "F16", "F32", "F64"),
    "method": _combiners,
    "source_format": _formats,
    "target_format": _formats,
    "tied": lambda: ("merge", "untie"),
    "tokenizer": lambda: ("base", "adapter"),
}
"""A map from the names of parameters to functions that return the values to complete."""


if TYPE_CHECKING:
    _Text = click.ParamType[str]
else:
    _Text = click.ParamType  # This type is not generic before click 8.4.


class _Completed(_Text):
    name = "text"

    def __init__(self, items: Callable[[str], list[CompletionItem]]) -> None:
        self.items = items

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        return self.items(incomplete)


def with_completions(command: click.Command) -> click.Command:
    """Set the type of each parameter in `VALUES` or `PATHS` to a type that completes values. Return the command."""
    for param in command.params:
        name = param.name or ""
        if isinstance(param.type, click.Choice):
            continue
        if name in VALUES:
            param.type = _Completed(_named(VALUES[name]))
        elif name in PATHS:
            param.type = _Completed(lambda incomplete: [CompletionItem(incomplete, type="file")])
    return command


def _named(values: Callable[[], Iterable[str]]) -> Callable[[str], list[CompletionItem]]:
    return lambda incomplete: [CompletionItem(value) for value in values() if value.startswith(incomplete)]


def script(shell: str, program: str = "adapterkit") -> str:
    """Return the script that completes adapterkit's command line in a shell.

    Args:
        shell: bash, zsh or fish.
        program: the name of the program that the script completes.
    """
    from click.shell_completion import get_completion_class

    from . import adapterkit

    completion_class = get_completion_class(shell)
    assert completion_class is not None
    completion: Any = completion_class(adapterkit, {}, program, VARIABLE)
    # Use the template directly: `source()` would start bash, just to warn about bash versions before 4.4 (2016).
    return str(completion.source_template % completion.source_vars())


# The command.


@click.command(help=__doc__)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@_options.flags
@click.pass_obj
def command(settings: _options.CliSettings, shell: str) -> None:
    """Print the script."""
    if settings.json:
        show(settings, {"shell": shell, "script": script(shell)}, _view)
        return
    click.echo(script(shell))


def _view(record: Mapping[str, object]) -> View:
    yield str(record["script"])
