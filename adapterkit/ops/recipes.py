"""Read recipes: YAML files, similar to mergekit's, that list adapters, a method and its parameters.

    merge_method: ties
    models:
      - model: adapters/one            # a path; the key may also be `adapter`
        parameters: {weight: 1.0, density: 0.5}
      - model: adapters/two
        parameters:
          weight: [0.2, 0.8]           # interpolated from the first layer to the last
    parameters: {lambda: 0.7}
    base_model: models/base            # only if the method needs a base
    compat: mergekit                   # use mergekit's default parameters, not the defaults of the papers

A value may be a number, a list over the layers, a mapping from globs to numbers or lists, or mergekit's list of
`{filter, value}`. As in mergekit, a model may be written as `base+lora`, which names a base and an adapter. mergekit's
`slices` are accepted if no layer moves to another position.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import Malformed, StorageError, UsageError, nearest, places_errors, shown

if TYPE_CHECKING:
    from ..core.adapter import Target
    from ..io.strict_json import JsonValue

SPELLINGS = {
    "lambda": "scale",
    "select_topk": "select",
    "max_iter": "iterations",
    "tol": "tolerance",
    "normalize_weights": "normalize",
}
"""A map from mergekit's parameter names to adapterkit's names, for parameters whose names differ."""

FLAGS: Mapping[str, tuple[str, str, str]] = {
    "normalize": ("denominator", "weights", "none"),
    "rescale": ("rescale", "norm", "none"),
}
"""For each of mergekit's switches: (adapterkit's parameter, its value if the switch is true, its value if it is false).
"""

_TASK_ARITHMETIC = frozenset({
    "task_arithmetic", "ties", "dare_linear", "dare_ties", "breadcrumbs", "breadcrumbs_ties", "della", "della_linear",
})  # fmt: skip
DIFFERENCES = _TASK_ARITHMETIC | {"sce", "model_stock", "arcee_fusion", "nearswap"}
"""mergekit's methods that combine differences from the base.

If a recipe for such a method also lists the base as a model, the result is the same as without this model.
"""

READERS = {"normalize": _TASK_ARITHMETIC | {"linear"}, "rescale": _TASK_ARITHMETIC}
"""A map from each of mergekit's switches to the methods that use the switch; other methods ignore it (mergekit 0.1.5).
"""

ARGUMENTS = frozenset({
    "adapters", "method", "weights", "base", "dtype", "seed", "compat", "data", "each", "disjoint", "rename",
    "strict_base", "workers", "report", "before", "progress",
})  # fmt: skip
"""Arguments of `combine` that are not parameters of a method. A recipe with one of them in `parameters` is refused."""

HARMLESS = {"int8_mask": (True, False), "filter_wise": (False,)}
"""A map from mergekit's parameters to the values that are ignored, because these values do not affect the result."""

TOP = (
    "merge_method", "models", "adapters", "parameters", "base_model", "dtype", "out_dtype", "compat", "seed", "rank",
    "disjoint", "slices", "tokenizer", "tokenizer_source", "chat_template", "name",
)  # fmt: skip
REFUSED: Mapping[str, tuple[str, str]] = {
    "modules": (
        "merging parts of a model separately", "Write one recipe for each part, with adapters of only that part",
    ),
    "genome": ("searching for a recipe", "Write the recipe itself: merge_method, models, parameters"),
    "tasks": ("searching for a recipe", "Write the recipe itself: merge_method, models, parameters"),
    "experts": ("building a mixture of experts from models", "Use mergekit-moe; adapterkit cannot build one"),
    "gate_mode": ("building a mixture of experts from models", "Use mergekit-moe; adapterkit cannot build one"),
    "models_to_slice": ("an old form of slices", "Use slices or models instead"),
}  # fmt: skip
"""Keys that show that a mergekit file is not a recipe for `combine`.

Each key maps to (purpose of a file with this key, cure).
"""

WORDS = ("merge_method", "base_model", "dtype", "out_dtype", "compat")
"""Keys whose value must be a string. The type is checked, because YAML reads `on` as a boolean and `16` as a number."""

MODEL = ("model", "adapter", "parameters")
SLICE = ("sources", "parameters", "base_model")
SOURCE = ("model", "adapter", "parameters", "layer_range")


@dataclass(frozen=True, slots=True)
class Recipe:
    """A parsed recipe, as arguments of `combine`.

    Attributes:
        adapters: the paths of the adapters.
        options: keyword arguments of `combine`.
        places: for each adapter, the key path of its entry in the file, such as `models[0]`.
        tokenizer: the value of `tokenizer_source` or `tokenizer.source`; only merges use it, because adapters have no
            tokenizer.
        notes: messages for the user. If a key in the file has no effect, a message says so.
        layers: the number of layers that the file's slices cover; None if the file has no slices.
    """

    adapters: tuple[str, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    places: tuple[str, ...] = ()
    tokenizer: str | None = None
    notes: tuple[str, ...] = ()
    layers: int | None = None

    def check_layers(self, targets: Iterable[Target]) -> None:
        """Check that the slices, if there are any, cover all layers that the adapters change.

        Raises:
            UsageError: a target is in a layer after the last slice; or a target is in no layer, and a parameter has
                different values in the first and the last slice.
        """
        from .parameters import layer_of

        settings = [("weight", weight) for weight in self.options.get("weights", ())]
        settings += [item for each in self.options.get("each", ()) for item in each.items()]
        differing = [key for key, value in (*settings, *self.options.items()) if _only_in_layers(value)]
        for target in targets if self.layers is not None else ():
            layer = layer_of(target.path)
            if layer is None and differing:
                why = f"{differing[0]} differs between the slices, but {target} is not in a numbered layer"
                cure = "Give the first and the last slice the same value, or list models instead of slices"
                raise UsageError(why, where="slices", cure=cure)
            if layer is not None and self.layers is not None and layer >= self.layers:
                why = f"the slices cover only layers 0 to {self.layers - 1}, but {target} is in layer {layer}"
                cure = f"End the last slice's layer_range at {layer + 1} or higher, or list models instead of slices"
                raise UsageError(why, where="slices", cure=cure)


@places_errors
def read_recipe(path: str | PathLike[str]) -> Recipe:
    """Read a recipe from a file; relative paths in it are relative to the working directory, as on the command line.

    Raises:
        Malformed: the file is not YAML, or not a recipe.
        UsageError: the file cannot be read; or a key, method or parameter is unknown or not supported.
    """
    from ..io.inputs import read_input
    from ..io.strict_yaml import MAX_BYTES, load_yaml

    try:
        data = read_input(path, MAX_BYTES)
    except StorageError as error:
        raise UsageError(f"cannot be read: {error.why}", path=path, cure="Pass the path of a recipe") from None
    return recipe(load_yaml(data, path=path), Path(path))


def recipe(content: object, path: Path | None = None) -> Recipe:
    """Convert the parsed content of a recipe's YAML file to a `Recipe`; see `read_recipe` for the errors."""
    if isinstance(content, Mapping):
        for key, (what, cure) in REFUSED.items():
            if key in content:
                raise UsageError(f"the key {key} is for {what}", where=key, path=path, cure=cure)
    top = _mapping(content, "recipe", TOP, path)
    for name in WORDS:
        if not isinstance(top.get(name), str | None):
            why = f"{name} is {shown(top[name])}, not text"
            raise Malformed(why, where=name, path=path, cure="See adapterkit combine --help")
    models, slices = _models(top, path)
    top = {**top, **_base_of_slices(top, path)} if slices else top
    if "merge_method" not in top or not models:
        why = "a recipe needs merge_method and a list of models"
        raise Malformed(why, path=path, cure="See adapterkit combine --help")
    switches = _switches(top["merge_method"], top.get("compat"))
    if top["merge_method"] == "slerp":  # For slerp, the first model is the one in base_model.
        models = sorted(models, key=lambda each: each.name != top.get("base_model"))
    base, names, notes = _named_base(top, models, path)
    kept = [each for each, name in zip(models, names, strict=True) if name is not None]
    shared = _translated(top.get("parameters"), "parameters", switches, path)
    each_model = [{}] * len(kept) if slices else [_translated(*each.parameters[0], switches, path) for each in kept]
    if slices:
        each_model, shared = _parameters_by_slice(kept, slices, shared, _single(top), switches, path)
    # With slices, the weights of the models already include the recipe's weight.
    stated, everywhere = "weight" in shared and not slices, shared.pop("weight", 1.0)
    options: dict[str, Any] = {"method": top["merge_method"], **shared}
    weights = [each.pop("weight", everywhere) for each in each_model]
    options["weights"] = [_first_of(w, everywhere) if stated and isinstance(w, Mapping) else w for w in weights]
    options |= {"each": each_model} if any(each_model) else {}
    options |= {"base": base} if base is not None else {}
    dtype = top.get("dtype") if top.get("out_dtype") is None else top["out_dtype"]
    options |= {"dtype": dtype} if dtype is not None else {}
    options |= {name: top[name] for name in ("compat", "seed", "rank", "disjoint") if top.get(name) is not None}
    tokenizer = _tokenizer(top, path)
    if "chat_template" in top and top["chat_template"] not in (None, "auto"):
        notes.append("chat_template is not used: adapters have no template; after a merge, edit chat_template.jinja")
    adapters = tuple(name for name in names if name is not None)
    places = tuple(each.place for each in kept)
    return Recipe(adapters, options, places, tokenizer, tuple(notes), slices[-1].layers[1] if slices else None)


@dataclass(frozen=True, slots=True)
class _Model:
    """A model of the recipe: the key path of its first entry in the file, its name, and its parameters.

    `parameters` has one pair (parameters, key path) per slice, or a single pair if the file has no slices.
    """

    place: str
    name: str
    parameters: tuple[tuple[Any, str], ...]


@dataclass(frozen=True, slots=True)
class _Slice:
    """A slice of the recipe: its first layer and its last layer plus 1, its parameters, and their key path."""

    layers: tuple[int, int]
    parameters: Any
    where: str


def _models(top: Mapping[str, object], path: Path | None) -> tuple[list[_Model], list[_Slice]]:
    """Return the models and the slices, which are an empty list if the file has no slices."""
    if "slices" in top:
        if "models" in top or "adapters" in top:
            cure = "Remove one of them"
            raise UsageError("models and slices contradict each other", where="slices", path=path, cure=cure)
        return _sliced(top["slices"], path)
    key = "adapters" if "adapters" in top else "models"
    entries = top.get(key)
    if not isinstance(entries, list):
        return [], []
    models = [_mapping(entry, f"{key}[{i}]", MODEL, path) for i, entry in enumerate(entries)]
    return [
        _Model(f"{key}[{i}]", _name(model, f"{key}[{i}]", path), ((model.get("parameters"), f"{key}[{i}].parameters"),))
        for i, model in enumerate(models)
    ], []


def _sliced(content: object, path: Path | None) -> tuple[list[_Model], list[_Slice]]:
    """Return the models and the slices.

    All slices must list the same models. The first slice must start at layer 0, and each other slice must start at the
    layer at which the previous slice ends.

    Raises:
        UsageError: a slice lists other models than the first slice, the sources of a slice have different layer ranges,
            or a slice moves layers to other positions. An adapter with moved layers would not fit its base.
    """
    if not isinstance(content, list) or not content:
        raise Malformed("a list was expected", where="slices", path=path, cure="See adapterkit combine --help")
    slices: list[_Slice] = []
    names: list[str] = []
    parameters: list[list[tuple[Any, str]]] = []
    for i, entry in enumerate(content):
        where = f"slices[{i}]"
        one = _mapping(entry, where, SLICE, path)
        sources = one.get("sources")
        if not isinstance(sources, list) or not sources:
            raise Malformed("a list was expected", where=f"{where}.sources", path=path, cure="List the slice's models")
        read = [_mapping(source, f"{where}.sources[{j}]", SOURCE, path) for j, source in enumerate(sources)]
        mine = [_name(source, f"{where}.sources[{j}]", path) for j, source in enumerate(read)]
        spans = [_span(source, f"{where}.sources[{j}].layer_range", path) for j, source in enumerate(read)]
        start = slices[-1].layers[1] if slices else 0
        for j, span in enumerate(spans):
            if span[0] != start or span != spans[0]:
                _refuse_range(f"{where}.sources[{j}].layer_range", span, spans[0], start, path)
        if names and mine != names:
            cure = "Name the same models in every slice; to omit a model, set its weight to 0"
            why = "this slice lists other models than the first slice"
            raise UsageError(why, where=f"{where}.sources", path=path, cure=cure)
        names = mine
        slices.append(_Slice(spans[0], one.get("parameters"), f"{where}.parameters"))
        for j, source in enumerate(read):
            if i == 0:
                parameters.append([])
            parameters[j].append((source.get("parameters"), f"{where}.sources[{j}].parameters"))
    places = [f"slices[0].sources[{j}]" for j in range(len(names))]
    models = [_Model(*each) for each in zip(places, names, map(tuple, parameters), strict=True)]
    return models, slices


def _base_of_slices(top: Mapping[str, Any], path: Path | None) -> dict[str, str]:
    """Return the `base_model` that the slices set instead of the recipe's; empty if no slice sets one.

    Raises:
        UsageError: the slices have different bases.
    """
    bases = [one.get("base_model") or top.get("base_model") for one in top["slices"]]
    if all(base is None for base in bases):
        return {}
    wrong = next((i for i, base in enumerate(bases) if base != bases[0] or not isinstance(base, str)), None)
    if wrong is not None:
        why = f"the base is {shown(bases[wrong])}, but the first slice has {shown(bases[0])}"
        cure = "Name one base for all slices, as the recipe's base_model"
        raise UsageError(why, where=f"slices[{wrong}].base_model", path=path, cure=cure)
    return {"base_model": str(bases[0])}


def _span(source: Mapping[str, object], where: str, path: Path | None) -> tuple[int, int]:
    span = source.get("layer_range")
    whole = isinstance(span, list) and len(span) == 2 and all(type(each) is int for each in span)
    if not whole or not 0 <= span[0] < span[1]:  # type: ignore[index]
        why = "layer_range must be two integers: the first layer, and the last layer plus 1"
        raise Malformed(why, where=where, path=path, cure="Write a range such as [0, 32]")
    return span[0], span[1]  # type: ignore[index]


def _refuse_range(where: str, span: tuple[int, int], first: tuple[int, int], start: int, path: Path | None) -> None:
    why = f"layer {span[0]} would become layer {start}, but each layer of an adapter must keep its number in the base"
    if span[0] == start:
        why = f"the layer range is {list(span)}, but the first source of this slice has {list(first)}"
    cure = (
        "Give all sources of a slice the same layer_range. Start the first slice at layer 0, and each later slice at "
        "the layer at which the previous slice ends. Or stack the layers with mergekit, and train an adapter for the "
        "result"
    )
    raise UsageError(why, where=where, path=path, cure=cure)


def _named_base(
    top: Mapping[str, Any], models: Sequence[_Model], path: Path | None
) -> tuple[str | None, list[str | None], list[str]]:
    """Return the base, the adapter of each model (None for a model that is the base), and notes.

    An entry `base+lora` names both the base and an adapter. Some recipes of mergekit also list the base as a model,
    which does not affect the result of the methods in `DIFFERENCES`.
    """
    base_name, notes = top.get("base_model"), list[str]()
    names: list[str | None] = []
    bases: dict[str, str] = {}
    for model in models:
        front, plus, adapter = model.name.partition("+")
        if plus and not Path(model.name).exists():
            bases[front] = model.place
            names.append(adapter)
        else:
            names.append(model.name)
    if base_name is not None and "+" in base_name and not Path(base_name).exists():
        front, _, adapter = base_name.partition("+")
        names = [None if name == adapter and adapter else name for name in names]
        why = f"base_model names an adapter together with the base ({base_name})"
        cure = f"Merge the adapter first: adapterkit merge {front} {adapter} -o BASE, then write base_model: BASE"
        raise UsageError(why, where="base_model", path=path, cure=cure)
    others = [front for front in bases if front not in (base_name, next(iter(bases)))]
    if others or (base_name is not None and bases and base_name not in bases):
        differing = others[0] if others else next(iter(bases))
        where, cure = (
            bases[differing],
            "Name the same base in every model and in base_model",
        )
        raise UsageError(
            f"the base {differing} differs from the base {base_name or next(iter(bases))}",
            where=where,
            path=path,
            cure=cure,
        )
    method, needed = top["merge_method"], _is_based(top)
    if base_name is not None and base_name in names and len(names) > 1:
        if method == "slerp":
            return None, names, notes
        if method not in DIFFERENCES:
            why = f"models contains the base, which {method} would combine like any other model"
            cure = (
                "Remove the base from models, and divide the weight of each other model by the sum of all weights, "
                "including the base's"
            )
            raise UsageError(why, where="base_model", path=path, cure=cure)
        # Drop the base from the models: these methods combine differences from the base, and the base's own difference
        # is zero.
        names = [None if name == base_name else name for name in names]
    base = base_name if base_name is not None else next(iter(bases), None)
    if base is not None and not needed and not Path(base).exists():
        notes.append(f"base_model {base} is not read, because {method} needs no base; to use a base, add --base BASE")
        base = None
    return base, names, notes


def _single(top: Mapping[str, Any]) -> frozenset[str]:
    """Return the parameters of the recipe's method that may differ between adapters."""
    from .combiners import COMBINERS
    from .parameters import resolved

    name, values = resolved(str(top["merge_method"]), top.get("compat"))
    return COMBINERS[str(values.get("then", name))].single


def _is_based(top: Mapping[str, Any]) -> bool:
    """Whether the recipe's method needs the weights of the base."""
    from .combiners import COMBINERS
    from .parameters import resolved

    name, _ = resolved(str(top["merge_method"]), top.get("compat"))
    return bool(COMBINERS[name].based)


def _parameters_by_slice(
    models: Sequence[_Model], slices: Sequence[_Slice], shared: Mapping[str, JsonValue],
    single: frozenset[str], switches: Mapping[str, bool], path: Path | None,
) -> tuple[list[dict[str, JsonValue]], dict[str, JsonValue]]:  # fmt: skip
    """Return each model's parameters, and the parameters of the method, with their values in every layer.

    As in mergekit, a source's parameter has precedence over its slice's, and this over the recipe's. A list is
    interpolated from the first layer of each slice to the slice's last layer.
    """
    of_slices = [_translated(one.parameters, one.where, switches, path) for one in slices]
    per_adapter = {"weight"} | single

    def everywhere(key: str, parts: Sequence[Mapping[str, JsonValue]], where: str) -> Any:
        values = [
            _first_of(part.get(key), _first_of(of_slice.get(key), shared.get(key)))
            for part, of_slice in zip(parts, of_slices, strict=True)
        ]
        if None in values:
            why = f"{key} is not set in every slice"
            cure = f"Set {key} in every slice, or in the recipe's parameters"
            raise UsageError(why, where=where, path=path, cure=cure)
        return _by_layer([one.layers for one in slices], values)

    each_model: list[dict[str, JsonValue]] = []
    for model in models:
        parts = [_translated(content, where, switches, path) for content, where in model.parameters]
        keys = dict.fromkeys(key for part in parts for key in part)
        keys |= dict.fromkeys(key for part in of_slices for key in part if key in per_adapter)
        each_model.append({key: everywhere(key, parts, model.parameters[0][1]) for key in keys})
    keys = dict.fromkeys(
        key for part in (shared, *of_slices) for key in part if part is shared or key not in per_adapter
    )
    nothing: list[dict[str, JsonValue]] = [{}] * len(slices)
    return each_model, {key: everywhere(key, nothing, slices[0].where) for key in keys}


def _first_of(setting: Any, otherwise: Any) -> Any:
    """Return a setting that has the value of `otherwise` where `setting` is None, or none of its globs matches."""
    if setting is None or otherwise is None:
        return otherwise if setting is None else setting
    if not isinstance(setting, Mapping):
        return setting
    rest = otherwise if isinstance(otherwise, Mapping) else {"*": otherwise}
    return {**setting, **{glob: value for glob, value in rest.items() if glob not in setting}}


def _by_layer(ranges: Sequence[tuple[int, int]], values: Sequence[Any]) -> Any:
    """Return one setting for all slices: a value, or a mapping from ranges of layers to values.

    As in mergekit, a target before the first layer has the first value of the first slice, and a target after the last
    layer has the last value of the last slice. The mapping applies to targets outside layers only if these are equal.
    """
    if all(value == values[0] and not _has_list(value) for value in values):
        return values[0]
    by_layer: dict[str, Any] = {}
    for (first, last), value in zip(ranges, values, strict=True):
        if not _has_list(value):
            by_layer[f"layers {first}-{last - 1}"] = value
            continue
        for layer in range(first, last):
            by_layer[f"layers {layer}-{layer}"] = _at_depth(
                value, (layer - first) / (last - first - 1) if last - first > 1 else 1.0
            )
    start, end = _at_depth(values[0], 0.0), _at_depth(values[-1], 1.0)
    return by_layer | ({"*": start} if start == end else {})


def _has_list(value: object) -> bool:
    return isinstance(value, list) or (isinstance(value, Mapping) and any(map(_has_list, value.values())))


def _at_depth(value: Any, depth: float) -> Any:
    """Return a value with each list in it interpolated at a depth from 0 to 1."""
    from .parameters import interpolated

    if isinstance(value, Mapping):
        return {glob: _at_depth(inner, depth) for glob, inner in value.items()}
    numeric = isinstance(value, list) and value and all(type(each) in (int, float) for each in value)
    return interpolated(value, depth) if numeric else value


def _only_in_layers(setting: object) -> bool:
    """Whether a setting has values for ranges of layers, but no value for targets outside layers."""
    return isinstance(setting, Mapping) and "*" not in setting and any(glob.startswith("layers ") for glob in setting)


def _tokenizer(top: Mapping[str, object], path: Path | None) -> str | None:
    """Return the recipe's source of the tokenizer: `base` or a folder; None if the recipe does not set a source."""
    if "tokenizer" in top and "tokenizer_source" in top:
        cure = "Remove tokenizer_source"
        raise UsageError(
            "tokenizer and tokenizer_source contradict each other", where="tokenizer_source", path=path, cure=cure
        )
    source = top.get("tokenizer_source")
    where = "tokenizer_source"
    if top.get("tokenizer") is not None:
        given = _mapping(top["tokenizer"], "tokenizer", ("source", "tokens", "pad_to_multiple_of"), path)
        for key in ("tokens", "pad_to_multiple_of"):
            if given.get(key) is not None:
                cure = f"Remove {key}; to add tokens, train them in an adapter, and merge with --vocab grow"
                raise UsageError(f"{key} would add rows of embeddings", where=f"tokenizer.{key}", path=path, cure=cure)
        source, where = given.get("source"), "tokenizer.source"
    if source is None:
        return None
    if not isinstance(source, str):
        raise Malformed(f"{where} is {shown(source)}, not text", where=where, path=path, cure="Write base, or a folder")
    if source == "union":
        cure = (
            "Write base, or a model's folder; to add tokens, merge an adapter that was trained with them (--vocab grow)"
        )
        raise UsageError(
            "a union of tokenizers is not supported, because new tokens would get invented embeddings",
            where=where,
            path=path,
            cure=cure,
        )
    return source


def _mapping(content: object, where: str, known: Sequence[str], path: Path | None) -> Mapping[str, Any]:
    if not isinstance(content, Mapping):
        raise Malformed("a mapping was expected", where=where, path=path, cure="See adapterkit combine --help")
    for key in content:
        if key not in known:
            cure = nearest(str(key), known) or f"Choose among {', '.join(known)}"
            raise UsageError(f"unknown key {key!r}", where=where, path=path, cure=cure)
    return content


def _name(model: Mapping[str, Any], where: str, path: Path | None) -> str:
    names = [model[key] for key in ("model", "adapter") if key in model]
    if len(names) != 1 or not isinstance(names[0], str):
        raise Malformed(
            "the entry needs exactly one path, under the key model or the key adapter",
            where=where,
            path=path,
            cure="Write model: PATH",
        )
    return names[0]


def _translated(content: object, where: str, switches: Mapping[str, bool], path: Path | None) -> dict[str, JsonValue]:
    """Return the parameters with mergekit's names and switches translated to adapterkit's."""
    if content is None:
        return {}
    if not isinstance(content, Mapping):
        raise Malformed("a mapping was expected", where=where, path=path, cure="For example: {density: 0.5}")
    parameters_made: dict[str, Any] = {}
    for key, value in content.items():
        if key in HARMLESS:
            if value not in HARMLESS[key]:
                raise UsageError(f"{key}={value!r} is not supported", where=where, path=path, cure=f"Remove {key}")
            continue
        # Ignore a switch that the method does not use, as mergekit does.
        if key in FLAGS and not switches.get(key, True):
            continue
        if key in ARGUMENTS:
            raise UsageError(f"{key} is not a parameter of a method", where=where, path=path, cure=f"Remove {key}")
        name, filtered = _spelled(str(key), _filtered(value, f"{where}.{key}", path), switches)
        parameters_made[name] = filtered
    return parameters_made


def _switches(method: object, compat: str | None) -> Mapping[str, bool]:
    """Return a map from names to booleans: True for the method's boolean parameters, False for ignored switches.

    `_spelled` translates one of mergekit's switches only if its name is not in this map. mergekit accepts the switches
    `normalize` and `rescale` for every method, although some methods ignore them.
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


def _filtered(value: object, where: str, path: Path | None) -> Any:
    """Convert mergekit's list of `{filter, value}`, or a single one, to a mapping from `FILTER` keys to values.

    As in mergekit, the first filter that matches is used.
    """
    from .parameters import FILTER

    if isinstance(value, Mapping) and "value" in value and value.keys() <= {"filter", "value"}:
        value = [value]
    if not isinstance(value, list) or not any(isinstance(part, Mapping) for part in value):
        return value
    by_pattern: dict[str, Any] = {}
    for part in value:
        one = _mapping(part, where, ("filter", "value"), path) if isinstance(part, Mapping) else {"value": part}
        if "value" not in one:
            raise Malformed("a filter has no value", where=where, path=path, cure="Give filter and value")
        name = one.get("filter")
        by_pattern.setdefault("*" if name in (None, "*") else f"{FILTER}{name}", one["value"])
    return by_pattern
