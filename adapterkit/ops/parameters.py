"""Check the weights and parameters of a combination, and look up their values at each target.

A weight or parameter may be a value, or a list that is interpolated from the first layer to the last. It may also be a
mapping from globs for target paths to values or lists; the first glob that matches a target is used. This module also
translates the method names of PEFT and mergekit.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, cast

from ..errors import PASS_ONE_WEIGHT_EACH, Unsupported, UsageError, nearest, shown
from .combiners import COMBINERS
from .combiners._combiner import Combiner, combiner_of

if TYPE_CHECKING:
    from ..core.adapter import Adapter, Target
    from ..io.strict_json import JsonValue
    from .alignment import AlignedPlace
    from .combiners._combiner import Value

    Setting = Value | Sequence[float] | Mapping[str, "Setting"]
    """A value, a list over the layers, or a mapping from globs to values or lists."""

_LAYER = re.compile(r"(?:^|\.)(\d+)(?=\.|$)")
_LAYERS = re.compile(r"layers (\d+)-(\d+)", re.ASCII)
FILTER = "filter "
"""The beginning of a key that selects targets as a filter of mergekit does, instead of by a glob."""


class Depths:
    """The relative depth of each target's layer: 0 for layer 0, and 1 for the last layer.

    The last layer is that of the base. Without a base, it is the last layer that contains a target.

    Args:
        targets: all targets.
        base_tensors: the names of the base's tensors; they show its last layer.

    Attributes:
        of_base: whether `base_tensors` show the last layer.
    """

    def __init__(self, targets: Iterable[Target], base_tensors: Iterable[str] = ()) -> None:
        targets = list(targets)
        self.layers = {str(target): layer_of(target.path) for target in targets}
        stacks = {_LAYER.split(target.path, maxsplit=1)[0] for target in targets if layer_of(target.path) is not None}
        in_base = [layer_of(name) for name in base_tensors if _LAYER.split(name, maxsplit=1)[0] in stacks]
        self.last = max((layer for layer in (*self.layers.values(), *in_base) if layer is not None), default=0)
        self.of_base = bool(in_base)

    def known(self, target: Target) -> float | None:
        """Return the depth of a target, or None if the target is not in a numbered layer."""
        return None if self.layers[str(target)] is None else self.of(target)

    def of(self, target: Target) -> float:
        """Return the depth of a target.

        Raises:
            UsageError: the target is not in a numbered layer.
        """
        layer = self.layers[str(target)]
        if layer is None:
            why = "the value is a list over the layers, but this target is not in a numbered layer"
            cure = 'Give the list only to targets in layers, with a mapping such as {"*.layers.*": [0, 1], "*": 1}'
            raise UsageError(why, where=str(target), cure=cure)
        return layer / self.last if self.last else 0.0


def at_target(setting: Setting, target: Target, depths: Depths, otherwise: Value) -> Value:
    """Return the value of a setting at a target; return `otherwise` if the setting is a mapping and no glob matches."""
    if isinstance(setting, Mapping):
        for glob, value in setting.items():
            if _matches(glob, target):
                return at_target(value, target, depths, otherwise)
        return otherwise
    if isinstance(setting, (list, tuple)):
        return interpolated(setting, depths.of(target))
    return cast("Value", setting)


def plain(setting: Setting, where: str) -> Setting:
    """Return a setting as plain data: None, booleans, numbers, strings, lists and dicts.

    Raises:
        UsageError: the setting contains a value of another type, an empty list or an empty mapping.
    """
    if isinstance(setting, Mapping):
        if not setting or not all(isinstance(glob, str) for glob in setting):
            raise UsageError("a mapping must have globs as keys", where=where, cure='For example: {"*.mlp.*": 1}')
        return {glob: plain(value, where) for glob, value in setting.items()}
    if isinstance(setting, (list, tuple)):
        numbers = [value for value in setting if isinstance(value, (int, float)) and not isinstance(value, bool)]
        if any(abs(value) > sys.float_info.max for value in numbers if isinstance(value, int)):
            raise UsageError("a number is larger than any float", where=where, cure="Pass smaller numbers")
        if not setting or len(numbers) < len(setting):
            raise UsageError(
                "a list over the layers must contain only numbers, and at least one",
                where=where,
                cure="For example: [0, 1]",
            )
        return [float(value) for value in setting]
    if setting is not None and not isinstance(setting, (bool, int, float, str)):
        raise UsageError(
            f"a setting cannot have type {type(setting).__name__}", where=where, cure="Give a number, list or mapping"
        )
    return setting


def check_globs(setting: Setting, targets: Sequence[Target], where: str) -> list[str]:
    """Raise an error if the setting is a mapping with a glob that matches no target.

    Returns:
        A note for each filter of mergekit that matches no target. mergekit ignores such a filter, and recipes for whole
        models often have filters for layers that no adapter changes.
    """
    notes: list[str] = []
    for glob in setting if isinstance(setting, Mapping) else ():
        if _LAYERS.fullmatch(glob) or any(_matches(glob, target) for target in targets):
            continue
        if not glob.startswith(FILTER):
            cure = f"Write a glob that matches the path of a target, such as {targets[0].path}"
            raise UsageError(f"no target matches {glob!r}", where=where, cure=cure)
        notes.append(f"{where}: the filter {glob.removeprefix(FILTER)!r} matches no target")
    return notes


def _matches(glob: str, target: Target) -> bool:
    """Whether a target's name matches a glob, or its layer is in a range such as `layers 0-3` (of a recipe's slices).

    A glob cannot select layers, because `*.2.*` also matches expert 2 of any layer. A filter matches if the name of the
    weight contains it.
    """
    if glob.startswith(FILTER):
        return glob.removeprefix(FILTER) in f"{target.path}.weight"
    layers = _LAYERS.fullmatch(glob)
    if layers is None:
        return fnmatchcase(str(target), glob) or fnmatchcase(target.path, glob)
    layer = layer_of(target.path)
    return layer is not None and int(layers[1]) <= layer <= int(layers[2])


def interpolated(values: Sequence[float], depth: float) -> float:
    """Interpolate a list linearly at a depth from 0 (its first value) to 1 (its last value)."""
    place = depth * (len(values) - 1)
    low = min(int(place), len(values) - 1)
    high = min(low + 1, len(values) - 1)
    return float(values[low] + (values[high] - values[low]) * (place - low))


def layer_of(path: str) -> int | None:
    """Return the number of the layer in a path: the first part that is a number. Return None if there is none."""
    match = _LAYER.search(path)
    return None if match is None else int(match.group(1))


# For each method of PEFT and mergekit: the combiner and the parameters that reproduce the method.


Known = Mapping[str, tuple[str, Mapping[str, str | bool]]]

PEFT: Known = {
    "linear": ("factors", {"then": "linear"}),
    "ties": ("factors", {"then": "ties"}),
    "dare_linear": ("factors", {"then": "dare_linear"}),
    "dare_ties": ("factors", {"then": "dare_ties"}),
    "magnitude_prune": ("factors", {"then": "magnitude_prune"}),
    "cat": ("linear", {}),
    "svd": ("task_arithmetic", {"rank": "largest"}),
    "ties_svd": ("ties", {"rank": "largest"}),
    "dare_linear_svd": ("dare_linear", {"rank": "largest"}),
    "dare_ties_svd": ("dare_ties", {"rank": "largest"}),
    "magnitude_prune_svd": ("magnitude_prune", {"rank": "largest"}),
}
"""A map from PEFT's `combination_type` (in `add_weighted_adapter`) to the combiner and its parameters."""

MERGEKIT: Known = {
    "linear": ("linear", {}),
    "slerp": ("slerp", {}),
    "nuslerp": ("slerp", {}),
    "multislerp": ("multislerp", {}),
    "karcher": ("karcher", {}),
    "model_stock": ("model_stock", {}),
    "task_arithmetic": ("task_arithmetic", {}),
    "ties": ("ties", {}),
    "dare_linear": ("dare_linear", {}),
    "dare_ties": ("dare_ties", {}),
    "della": ("della", {}),
    "della_linear": ("della", {"sign": "none", "denominator": "none"}),
    "breadcrumbs": ("breadcrumbs", {}),
    "breadcrumbs_ties": ("breadcrumbs", {"sign": "total"}),
    "sce": ("sce", {}),
    "passthrough": ("linear", {"normalize": False}),
    "nearswap": ("nearswap", {}),
    "ram": ("ram", {}),
    "ramplus_tl": ("ramplus_tl", {}),
    "arcee_fusion": ("arcee_fusion", {}),
}
"""A map from mergekit's `merge_method` to the combiner and its parameters.

The combiner gets differences from a base, not whole models.
"""

PEERS: Mapping[str, Known] = {"mergekit": MERGEKIT, "peft": PEFT}


def resolved(name: str, compat: str | None, count: int = 0) -> tuple[str, dict[str, Setting]]:
    """Translate a method's name to (name of the combiner, parameters that the method's name implies).

    Args:
        name: the method's name in the library `compat`. If `compat` is None, `name` is a key of `COMBINERS`, or two of
            these keys joined, such as `knots_ties`.
        compat: `mergekit`, `peft` or None.
        count: the number of adapters; with a single adapter, PEFT treats every method as `linear`.

    Raises:
        Unsupported: `compat` is the name of another library.
        UsageError: the library has no method with this name.
    """
    if compat is not None:
        return _of_peer("linear" if compat == "peft" and count == 1 and name in PEFT else name, compat)
    plug, _, rest = name.partition("_")
    if name not in COMBINERS and plug in COMBINERS and rest in COMBINERS and COMBINERS[plug].plug:
        return plug, {"then": rest}
    return name, {}


def _of_peer(name: str, compat: str) -> tuple[str, dict[str, Setting]]:
    if compat not in PEERS:
        raise Unsupported(f"compat {compat!r} is not a known library", cure=f"Choose among {', '.join(PEERS)}")
    known = PEERS[compat]
    if name not in known:
        cure = nearest(name, known) or f"Choose among {', '.join(known)}"
        raise UsageError(f"{compat} has no method {name!r}", where="compat", cure=cure)
    method, values = known[name]
    inner = COMBINERS[str(values["then"])] if "then" in values else COMBINERS[method]
    return method, {**inner.compat.get(compat, {}), **values}


def peft_result(name: str, adapters: Sequence[Adapter], rank: int | None) -> tuple[int | None, float]:
    """Return the rank to which PEFT cuts a combination, and the factor by which PEFT multiplies the result.

    `add_weighted_adapter` copies the first adapter's config and sets alpha to the rank, to get a scaling of 1. But if
    the first adapter's config has `use_rslora`, the scaling is alpha / sqrt(rank). In this case, PEFT's result is
    sqrt(rank) times the intended result (PEFT 0.21.2). adapterkit applies the same factor, to reproduce PEFT's result.

    Args:
        name: PEFT's `combination_type`.
        adapters: the adapters, in order.
        rank: the requested rank, or None.

    Returns:
        (the rank to which the result is cut, or None; the factor).
    """
    ranks = [_rank(adapter) for adapter in adapters]
    is_cut = name.endswith("svd") and len(adapters) > 1
    cut = (rank or max(ranks)) if is_cut else rank
    new_rank = sum(ranks) if name == "cat" and len(adapters) > 1 else cut if is_cut and cut else ranks[0]
    return cut, math.sqrt(new_rank) if _config(adapters[0]).get("use_rslora") else 1.0


def _config(adapter: Adapter) -> Mapping[str, Any]:
    """Return the config of an adapter that was read from PEFT's files; empty for other formats."""
    foreign = adapter.foreign
    config = foreign.data.get("config") if foreign is not None and foreign.format == "peft" else None
    return config if isinstance(config, Mapping) else {}


def _rank(adapter: Adapter) -> int:
    """Return the rank that PEFT allocates for an adapter: the largest rank in the adapter's config."""
    config = _config(adapter)
    pattern = config.get("rank_pattern")
    ranks = [config.get("r"), *(pattern.values() if isinstance(pattern, Mapping) else ())]
    return max([rank for rank in ranks if isinstance(rank, int)], default=max(adapter.ranks, default=1))


# Check the arguments of a combination, and look up their values at each target.


class CombineParameters:
    """The checked weights and parameters of one combination.

    Attributes:
        weights: the weight of each adapter, as a `Setting`.
        each: for each adapter, a mapping with the parameters that apply to this adapter only.
        targets: all targets of the combination.
        varies: whether a parameter may differ between targets.
        notes: a message for each filter that matches no target, and for each value by layer whose last layer is not
            that of the base.
    """

    def __init__(
        self, name: str, values: Mapping[str, Setting], weights: Sequence[Setting] | None,
        each: Sequence[Mapping[str, Value]] | None, aligned: Sequence[AlignedPlace], count: int,
        base_tensors: Iterable[str] = (),
    ) -> None:  # fmt: skip
        self.name = name
        self.values = {key: plain(value, key) for key, value in values.items()}
        if weights is not None and (isinstance(weights, str | Mapping) or not isinstance(weights, Iterable)):
            raise UsageError(f"weights {shown(weights)} are not a list", where="weights", cure=PASS_ONE_WEIGHT_EACH)
        self.weights = [plain(w, "weights") for w in ([1.0] * count if weights is None else weights)]
        self.each = self._check_each(each or [], count)
        if len(self.weights) != count:
            raise UsageError(f"{len(self.weights)} weights for {count} adapters", cure=PASS_ONE_WEIGHT_EACH)
        self.targets = [place.target for place in aligned]
        self.depths = Depths(self.targets, base_tensors)
        apart = [item for given in self.each for item in given.items()]
        settings_given = [*self.values.items(), *apart, *(("weights", w) for w in self.weights)]
        notes = [note for key, value in settings_given for note in check_globs(value, self.targets, key)]
        if not self.depths.of_base:
            # Without a base, nothing says how many layers the model has.
            lists = [f"{key}: the list" for key, value in settings_given if _has_list(value)]
            lists += [f"{name}: the depth"] if COMBINERS[name].by_depth else []
            notes += [
                f"{what} over the layers ends at layer {self.depths.last}, the last layer that the adapters change; "
                "pass --base BASE (base=) to end it at the base's last layer"
                for what in lists
            ]
        self.notes = list(dict.fromkeys(notes))
        settings = [*self.values.values(), *(value for _, value in apart)]
        self.varies = any(isinstance(value, (Mapping, list)) for value in settings)

    def _check_each(self, each: Sequence[Mapping[str, Setting]], count: int) -> list[dict[str, Setting]]:
        if each and len(each) != count:
            raise UsageError(
                f"the list has parameters of {len(each)} adapters, but there are {count} adapters",
                where="each",
                cure="Pass one mapping for each adapter",
            )
        if not all(isinstance(given, Mapping) for given in each):
            raise UsageError(
                "the parameters of an adapter must be a mapping", where="each", cure='For example: {"density": 0.5}'
            )
        cls = COMBINERS[self.name]
        if cls.plug is not None:
            cls = COMBINERS[str(self.values.get("then", cls.defaults()["then"]))]
        for key in {key for given in each for key in given} - cls.single:
            known = ", ".join(sorted(cls.single)) or "none"
            raise UsageError(
                f"{key!r} cannot differ between adapters", where="each", cure=f"Parameters that can differ: {known}"
            )
        return [{key: _each_checked(cls, key, plain(value, key)) for key, value in given.items()} for given in each]

    def method(self, target: Target) -> Combiner:
        return combiner_of(COMBINERS[self.name], self._at(target))

    def _at(self, target: Target) -> dict[str, Value]:
        """Return the parameters that the caller set, with their values at a target."""
        values_here = {key: at_target(value, target, self.depths, None) for key, value in self.values.items()}
        return {key: value for key, value in values_here.items() if value is not None}

    @property
    def counts(self) -> bool:
        """Whether the combiner's formula needs statistics of whole adapters (a `Census`) for at least one target."""
        targets = self.targets if self.varies else self.targets[:1]
        values = [(self._at(target), given) for target in targets for given in self.each_at(target) or [{}]]
        return any(combiner_of(COMBINERS[self.name], {**at, **given}).counts for at, given in values)

    def each_at(self, target: Target) -> list[dict[str, JsonValue]]:
        """Return, for each adapter, the parameters that apply to this adapter only, with their values at a target."""
        return [
            {
                key: value_here
                for key, value in given.items()
                if (value_here := at_target(value, target, self.depths, None)) is not None or value is None
            }
            for given in self.each
        ]

    def weights_at(self, target: Target) -> list[float]:
        weights_here = [at_target(weight, target, self.depths, 1.0) for weight in self.weights]
        numbers: list[float] = []
        for weight in weights_here:
            if isinstance(weight, bool) or not isinstance(weight, int | float) or not abs(weight) <= sys.float_info.max:
                why = f"weight {shown(weight)} is not a finite number"
                raise UsageError(why, where=str(target), cure="Give a number")
            numbers.append(float(weight))
        return numbers

    def record(self, method: Combiner) -> dict[str, Setting]:
        return {**method.values(), **self.values}


def _has_list(setting: Setting) -> bool:
    """Whether a setting contains a list of at least two different values over the layers."""
    if isinstance(setting, Mapping):
        return any(map(_has_list, setting.values()))
    return isinstance(setting, list) and len(set(setting)) > 1


def _each_checked(cls: type[Combiner], key: str, value: Setting) -> Setting:
    """Check a parameter that applies to one adapter only; in a list or a mapping, check every value."""
    if isinstance(value, Mapping):
        return {glob: _each_checked(cls, key, inner) for glob, inner in value.items()}
    if isinstance(value, list):
        return [cast("float", cls.checked(key, inner)) for inner in value]
    return cls.checked(key, value)


def one_of(value: Setting, key: str) -> Value:
    """Return the first value in a setting, so that callers can check one value before they know the targets."""
    value = plain(value, key)
    while isinstance(value, (Mapping, list)):
        value = next(iter(value.values())) if isinstance(value, Mapping) else value[0]
    return cast("Value", value)
