"""Options that define how adapters are combined: a method, `--set name=value`, weights, or a recipe."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from ..core.adapter import Adapter
    from ..ops.recipes import Recipe

F = TypeVar("F", bound=Callable[..., Any])


def method_and_settings(default: str | None) -> Callable[[F], F]:
    """Add the options `--method`, `--set` and `--data`."""
    said = f"; {default} if absent" if default else ""

    def decorated(command: F) -> F:
        for option in (
            click.option(
                "--data", metavar="FILE", multiple=True,
                help="Texts for methods that learn from data: one per line, JSON Lines with a 'text' field, or "
                "'builtin'. Repeat it to give each adapter its own. Requires a base.",
            ),
            click.option(
                "--set", "parameters", multiple=True, metavar="NAME=VALUE",
                help="Set a parameter of --method to a number, a word, or a YAML list or mapping. Repeatable.",
            ),
            click.option(
                "--method", metavar="METHOD",
                help=f"Method to combine the adapters{said}. 'adapterkit list combine' shows all.",
            ),
        ):  # fmt: skip
            command = option(command)
        return command

    return decorated


def learned_data(files: Sequence[str], sources: Sequence[Adapter | str], options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the argument `data` of `ops.combine` from files of texts; nothing without files.

    Args:
        files: the values of `--data`.
        sources: the adapters.
        options: the arguments of `ops.combine`.

    Raises:
        UsageError: no base is given, the method does not learn from texts, or the number of files is wrong.
    """
    from ..errors import UsageError
    from ..ops.combiners import COMBINERS
    from ..ops.parameters import resolved

    if not files:
        return {}
    name = options.get("method", "linear")
    if COMBINERS[resolved(name, options.get("compat"), len(sources))[0]].data is None:
        raise UsageError(f"{name} does not use data", where="--data", cure="Omit --data, or choose another --method")
    if options.get("base") is None:
        raise UsageError("texts need a model that reads them", where="--data", cure="Add --base BASE")
    from ..searching import TextData

    found = TextData(
        options["base"], sources, files[0] if len(files) == 1 else files, rename=options.get("rename") or (),
        seed=options.get("seed") or 0,
    )  # fmt: skip
    return {"data": found.learned_by(name)}


S = TypeVar("S")


def combination(
    adapters: Sequence[S], method: str | None, weights: Sequence[float], parameters: Sequence[str],
    given: Mapping[str, object], recipe: Recipe | None = None,
) -> tuple[list[S] | list[str], dict[str, Any]]:  # fmt: skip
    """Return the adapters and the arguments of `ops.combine`; the command line takes precedence over the recipe.

    Raises:
        UsageError: adapters, weights or the method are typed in addition to a recipe, no adapter is named, or a setting
            is not NAME=VALUE.
    """
    from ..errors import UsageError

    options: dict[str, Any] = {}
    sources: list[S] | list[str] = list(adapters)
    if recipe is not None:
        if adapters or weights or method:
            why = "a recipe already names adapters, method and weights"
            cure = "Remove the adapters, --method and --weight from the command line, or remove --recipe"
            raise UsageError(why, where="--recipe", cure=cure)
        sources, options = list(recipe.adapters), dict(recipe.options)
    elif not adapters:
        raise UsageError("no adapter was given", cure="Name at least one, or a --recipe")
    options |= {"method": method} if method else {}
    options |= {"weights": list(weights)} if weights else {}
    options |= dict(setting(text) for text in parameters)
    return sources, options | {name: value for name, value in given.items() if value is not None}


recipe_option = click.option(
    "--recipe", metavar="FILE",
    help="Read adapters, method, weights and parameters from a YAML file like mergekit's.",
)  # fmt: skip


def recipe_of(adapters: Sequence[str], recipe: str | None) -> tuple[Sequence[str], Recipe | None]:
    """Return the adapters and the recipe: --recipe, or a single argument that ends in .yml or .yaml."""
    from ..ops.recipes import read_recipe

    if recipe is None and len(adapters) == 1 and str(adapters[0]).lower().endswith((".yml", ".yaml")):
        return [], read_recipe(adapters[0])
    return adapters, None if recipe is None else read_recipe(recipe)


@contextmanager
def named_by(recipe: Recipe | None) -> Iterator[None]:
    """In errors about an adapter, add the key of the recipe that names the adapter."""
    from ..errors import AdapterkitError

    try:
        yield
    except AdapterkitError as error:
        for place, name in zip(recipe.places, recipe.adapters, strict=True) if recipe is not None else ():
            if error.path is not None and str(error.path).removeprefix("hf://") == name.removeprefix("hf://"):
                error.at(where=f"{place}.model" if error.where is None else f"{place}.model: {error.where}")
                break
        raise


def setting(text: str) -> tuple[str, object]:
    """Split `density=0.5` into a name and a value.

    Raises:
        UsageError: the text is not NAME=VALUE.
    """
    import yaml

    from ..errors import UsageError
    from ..ops.recipes import ARGUMENTS

    name, sign, value = text.partition("=")
    if not sign or not name.isidentifier() or name in ARGUMENTS:
        why = f"{text!r} does not set a parameter of a method"
        raise UsageError(why, where="--set", cure="Type NAME=VALUE, such as --set density=0.5")
    try:
        return name, yaml.safe_load(value)
    except yaml.YAMLError:
        cure = "Type a number, a word, or a YAML list or mapping"
        raise UsageError(f"{value!r} is not valid YAML", where="--set", cure=cure) from None
