"""Read recipes: YAML files, close to mergekit's, that say what to combine and how.

    merge_method: ties
    models:
      - model: adapters/one            # a path, or `adapter:`
        parameters: {weight: 1.0, density: 0.5}
      - model: adapters/two
        parameters:
          weight: [0.2, 0.8]           # first layer to last
    parameters: {lambda: 0.7}
    base_model: models/base            # if a method needs it
    compat: mergekit                   # its defaults instead of the papers'

A value may be a number, a list over the layers, a mapping of globs to either, or mergekit's list of `{filter, value}`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

from ..errors import Malformed, StorageError, UsageError, nearest, places_errors, shown

SPELLINGS = {
    "lambda": "scale",
    "select_topk": "select",
    "max_iter": "iterations",
    "tol": "tolerance",
    "normalize_weights": "normalize",
}
"""mergekit's names of parameters -> ours, if they differ."""

FLAGS: Mapping[str, tuple[str, str, str]] = {
    "normalize": ("denominator", "weights", "none"),
    "rescale": ("rescale", "norm", "none"),
}
"""mergekit's switches -> our parameter, its value for true and for false."""

_TASK_ARITHMETIC = frozenset({
    "task_arithmetic", "ties", "dare_linear", "dare_ties", "breadcrumbs", "breadcrumbs_ties", "della", "della_linear",
})  # fmt: skip
READERS = {"normalize": _TASK_ARITHMETIC | {"linear"}, "rescale": _TASK_ARITHMETIC}
"""mergekit's switches -> its methods that look at them; the others ignore them (mergekit 0.1.5)."""

ARGUMENTS = frozenset({
    "adapters", "method", "weights", "base", "dtype", "seed", "compat", "data", "each", "disjoint", "rename",
    "strict_base", "workers", "report", "before", "progress",
})  # fmt: skip
"""Arguments of `combine` that are no parameter of a method, and have a place or an option of their own."""

HARMLESS = {"int8_mask": (True, False), "filter_wise": (False,)}
"""Parameters of mergekit's that change nothing here -> the values for which that is so."""

TOP = (
    "merge_method", "models", "adapters", "parameters", "base_model", "dtype", "out_dtype", "compat", "seed", "rank",
    "disjoint",
)  # fmt: skip
WORDS = ("merge_method", "base_model", "dtype", "out_dtype", "compat")
"""Keys with text values; YAML reads `on` and `1e3` as other types."""

MODEL = ("model", "adapter", "parameters")


@dataclass(frozen=True, slots=True)
class Recipe:
    """The arguments of `combine` from a recipe.

    Attributes:
        adapters: the paths of the adapters.
        options: keyword arguments of `combine`.
    """

    adapters: tuple[str, ...]
    options: Mapping[str, Any] = field(default_factory=dict)


@places_errors
def read_recipe(path: str | PathLike[str]) -> Recipe:
    """Read a recipe from a file; its relative paths start at the working directory, as on the command line.

    Raises:
        Malformed: the file is not YAML, or not a recipe.
        UsageError: a key, method or parameter is unknown.
    """
    from ..io.inputs import read_input
    from ..io.strict_yaml import MAX_BYTES, load_yaml

    try:
        data = read_input(path, MAX_BYTES)
    except StorageError as error:
        raise UsageError(f"cannot be read: {error.why}", path=path, cure="Name a file") from None
    return recipe(load_yaml(data, path=path), Path(path))


def recipe(found: object, path: Path | None = None) -> Recipe:
    """Return a recipe from plain data; see `read_recipe`."""
    top = _mapping(found, "recipe", TOP, path)
    for name in WORDS:
        if not isinstance(top.get(name), str | None):
            why = f"{name} is {shown(top[name])}, not text"
            raise Malformed(why, where=name, path=path, cure="See adapterkit combine --help")
    key = "adapters" if "adapters" in top else "models"
    entries = top.get(key)
    if "merge_method" not in top or not isinstance(entries, list) or not entries:
        raise Malformed("needs merge_method and a list of models", path=path, cure="See adapterkit combine --help")
    models = [_mapping(entry, f"{key}[{i}]", MODEL, path) for i, entry in enumerate(entries)]
    names = [_name(model, f"{key}[{i}]", path) for i, model in enumerate(models)]
    switches = _switches(top["merge_method"], top.get("compat"))
    own = [
        _translated(model.get("parameters"), f"{key}[{i}].parameters", switches, path) for i, model in enumerate(models)
    ]
    shared = _translated(top.get("parameters"), "parameters", switches, path)
    everywhere = shared.pop("weight", 1.0)
    options: dict[str, Any] = {"method": top["merge_method"], **shared}
    options["weights"] = [each.pop("weight", everywhere) for each in own]
    options |= {"each": own} if any(own) else {}
    for name, said in (("base", "base_model"), ("dtype", "out_dtype")):
        options |= {name: top[said]} if top.get(said) is not None else {}
    if "out_dtype" not in top and top.get("dtype") is not None:
        options["dtype"] = top["dtype"]
    options |= {name: top[name] for name in ("compat", "seed", "rank", "disjoint") if top.get(name) is not None}
    return Recipe(tuple(names), options)


def _mapping(found: object, where: str, known: Sequence[str], path: Path | None) -> Mapping[str, Any]:
    if not isinstance(found, Mapping):
        raise Malformed("a mapping was expected", where=where, path=path, cure="See adapterkit combine --help")
    for key in found:
        if key not in known:
            cure = nearest(str(key), known) or f"Known: {', '.join(known)}"
            raise UsageError(f"unknown key {key!r}", where=where, path=path, cure=cure)
    return found


def _name(model: Mapping[str, Any], where: str, path: Path | None) -> str:
    said = [model[key] for key in ("model", "adapter") if key in model]
    if len(said) != 1 or not isinstance(said[0], str):
        raise Malformed("one path was expected, as model or adapter", where=where, path=path, cure="Name the adapter")
    return said[0]


def _translated(found: object, where: str, switches: Mapping[str, bool], path: Path | None) -> dict[str, Any]:
    """Return parameters under our names."""
    if found is None:
        return {}
    if not isinstance(found, Mapping):
        raise Malformed("a mapping was expected", where=where, path=path, cure="Such as {density: 0.5}")
    made: dict[str, Any] = {}
    for key, value in found.items():
        if key in HARMLESS:
            if value not in HARMLESS[key]:
                raise UsageError(f"{key}={value!r} is not known here", where=where, path=path, cure="Leave it out")
            continue
        # mergekit ignores a switch that the method does not read, and so does this reader.
        if key in FLAGS and not switches.get(key, True):
            continue
        if key in ARGUMENTS:
            raise UsageError(f"{key} is no parameter of a method", where=where, path=path, cure="Leave it out")
        name, said = _spelled(str(key), _filtered(value, f"{where}.{key}", path), switches)
        made[name] = said
    return made


def _switches(method: Any, compat: Any) -> Mapping[str, bool]:
    """Return the boolean parameters of the method (True) and the switches of mergekit that it ignores (False).

    mergekit accepts `normalize` and `rescale` for any method; methods that do not read them ignore them.
    """
    from .combiners import COMBINERS
    from .parameters import resolved

    name, values = resolved(str(method), compat)
    classes = [COMBINERS[str(each)] for each in (name, values.get("then")) if each is not None]
    fields = {n: f.metadata["kind"] for cls in classes for n, f in cls.parameters().items()}
    ignored = [
        key for key, (ours, _, _) in FLAGS.items()
        if compat == "mergekit" and (method not in READERS[key] or not {key, ours} & fields.keys())
    ]  # fmt: skip
    return {n: True for n, kind in fields.items() if kind is bool} | dict.fromkeys(ignored, False)


def _spelled(key: str, value: Any, switches: Mapping[str, bool]) -> tuple[str, Any]:
    if key in FLAGS and isinstance(value, bool) and key not in switches:
        name, yes, no = FLAGS[key]
        return name, yes if value else no
    return SPELLINGS.get(key, key), value


def _filtered(value: Any, where: str, path: Path | None) -> Any:
    """Turn mergekit's list of `{filter, value}` into a mapping of globs; a filter matches any part of a name."""
    if not isinstance(value, list) or not any(isinstance(part, Mapping) for part in value):
        return value
    made: dict[str, Any] = {}
    for part in value:
        one = _mapping(part, where, ("filter", "value"), path) if isinstance(part, Mapping) else {"value": part}
        if "value" not in one:
            raise Malformed("a filter without a value", where=where, path=path, cure="Give both")
        name = one.get("filter")
        made["*" if name in (None, "*") else f"*{_literal(str(name))}*"] = one["value"]
    return made


def _literal(text: str) -> str:
    import glob

    return glob.escape(text)
