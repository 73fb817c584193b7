"""How a combination is said on the command line: a method, `--set name=value`, weights, or a recipe."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from ..ops.recipes import Recipe

F = TypeVar("F", bound=Callable[..., Any])


def method_and_settings(default: str | None) -> Callable[[F], F]:
    """The options `--method` and `--set`."""
    said = f"; {default} if absent" if default else ""

    def decorated(command: F) -> F:
        for option in (
            click.option(
                "--set", "parameters", multiple=True, metavar="NAME=VALUE",
                help="A parameter of the method: a number, a word, or YAML of a list or mapping.",
            ),
            click.option("--method", metavar="METHOD", help=f"How to combine{said}; see adapterkit list combine."),
        ):  # fmt: skip
            command = option(command)
        return command

    return decorated


def combination(
    adapters: Sequence[str], method: str | None, weights: Sequence[float], parameters: Sequence[str],
    given: Mapping[str, object], recipe: Recipe | None = None,
) -> tuple[list[str], dict[str, Any]]:  # fmt: skip
    """Adapters and the arguments of `ops.combine`; what stands on the command line goes before what a recipe says.

    Raises:
        UsageError: adapters or weights are said twice, or no adapter is named; a setting is not NAME=VALUE.
    """
    from ..errors import UsageError

    options: dict[str, Any] = {}
    sources = list(adapters)
    if recipe is not None:
        if adapters or weights or method:
            why = "adapters, methods and weights are the recipe's to say"
            raise UsageError(why, where="recipe", cure="Leave them out, or the recipe")
        sources, options = list(recipe.adapters), dict(recipe.options)
    elif not adapters:
        raise UsageError("no adapter was given", cure="Name at least one, or a --recipe")
    options |= {"method": method} if method else {}
    options |= {"weights": list(weights)} if weights else {}
    options |= dict(setting(text) for text in parameters)
    return sources, options | {name: value for name, value in given.items() if value is not None}


recipe_option = click.option(
    "--recipe", metavar="FILE", help="Read adapters, method, weights and parameters from a YAML file, as mergekit's."
)


def recipe_of(adapters: Sequence[str], recipe: str | None) -> tuple[Sequence[str], Recipe | None]:
    """The adapters that are named, and the recipe: the option's, or a single argument that ends with .yml or .yaml."""
    from ..ops.recipes import read_recipe

    if recipe is None and len(adapters) == 1 and str(adapters[0]).lower().endswith((".yml", ".yaml")):
        return [], read_recipe(adapters[0])
    return adapters, None if recipe is None else read_recipe(recipe)


@contextmanager
def named_by(recipe: Recipe | None) -> Iterator[None]:
    """Errors about an adapter of a recipe name its key there, too."""
    from ..errors import AdapterkitError

    try:
        yield
    except AdapterkitError as error:
        for place, name in zip(recipe.places, recipe.adapters, strict=True) if recipe is not None else ():
            if error.path is not None and str(error.path).removeprefix("hf://") == name.removeprefix("hf://"):
                error.at(where=f"{place}.model" if error.where is None else f"{place}.model: {error.where}")
                break
        raise


def setting(text: str) -> tuple[str, Any]:
    """`density=0.5` as a name and a value.

    Raises:
        UsageError: it is not NAME=VALUE.
    """
    import yaml

    from ..errors import UsageError
    from ..ops.recipes import ARGUMENTS

    name, sign, value = text.partition("=")
    if not sign or not name.isidentifier() or name in ARGUMENTS:
        raise UsageError(f"{text!r} is not NAME=VALUE of a method's parameter", where="--set", cure="density=0.5")
    try:
        return name, yaml.safe_load(value)
    except yaml.YAMLError:
        raise UsageError(f"{value!r} is no value", where="--set", cure="A number, a word, or YAML") from None
