"""Check arguments of public functions. `checks_types` compares their types with the annotations."""

from __future__ import annotations

import ast
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from functools import wraps
from inspect import signature, unwrap
from operator import index
from typing import Any, NoReturn, TypeVar, cast

from ..errors import PASS_ONE_WEIGHT_EACH, UsageError, shown


def weights_of(weights: object, count: int) -> list[float]:
    """Return one finite factor for each of `count` adapters; if `weights` is None, return the factor 1 for each.

    Raises:
        UsageError: `weights` is not a list of numbers, the number of weights is not `count`, or a weight is not finite.
    """
    if weights is None:
        return [1.0] * count
    try:
        if not isinstance(weights, Iterable) or isinstance(weights, str | bytes):
            raise TypeError
        factors = [float(weight) for weight in weights]
    except (TypeError, ValueError):
        raise UsageError(f"weights {shown(weights)} are not a list of numbers", cure=PASS_ONE_WEIGHT_EACH) from None
    except OverflowError:  # A Python integer can be larger than any float.
        factors = [math.inf] * count
    if len(factors) != count:
        raise UsageError(f"{len(factors)} weights for {count} adapters", cure=PASS_ONE_WEIGHT_EACH)
    if not all(math.isfinite(factor) for factor in factors):
        raise UsageError(f"weights {shown(weights)} are not all finite", cure="Pass a finite number for each adapter")
    return factors


def check_factor(factor: object, name: str) -> float:
    """Return an argument as a float.

    Raises:
        UsageError: the argument is not a finite number.
    """
    try:
        finite = math.isfinite(factor)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError, OverflowError):  # Tensors raise ValueError and RuntimeError.
        finite = False
    if not finite:
        raise UsageError(f"{name} {shown(factor)} is not a finite number", where=name, cure=f"Pass {name}= as a number")
    return float(factor)  # type: ignore[arg-type]


def check_count(value: object, name: str, flag: str) -> None:
    """Check that an argument is None or a whole number of at least 1.

    Args:
        value: the argument's value.
        name: the argument's name.
        flag: the text for the error, such as `--sample N (sample=N)`.

    Raises:
        UsageError: the argument is something else.
    """
    if value is None:
        return
    if not _is_whole(value):
        raise UsageError(f"{name} {shown(value)} is not a whole number", where=name, cure=f"Pass {flag}, N >= 1")
    if index(value) < 1:  # type: ignore[arg-type]
        raise UsageError(f"{name} must be at least 1, got {value}", where=name, cure=f"Pass {flag}, N >= 1")


# Check the types of a public function's arguments against its annotations.

_ALIASES = {
    "Adapters": "Source | Sequence[Source] | Mapping[str, Source] | None",
    "Base": "Checkpoint | str | PathLike[str]",
    "Feeds": "Mapping[str, Array]",
    "Licence": "Mapping[str, str]",
    "Model": "ir.Model | str | PathLike[str]",
    "Progress": "Callable[..., object]",
    "Report": "Callable[..., object]",
    "Score": "Callable[..., object]",
    "Source": "Adapter | str | PathLike[str]",
    "Text": "str | PathLike[str]",
    "Weights": "Checkpoint | str | PathLike[str]",
}
"""Type aliases that modules define only for type checkers, because importing their types is slow."""

_CURES = {
    "options": "Pass options=adapterkit.MergeOptions(...)",
    "memory": "Pass --memory (memory=) as a number of bytes, such as 5 << 30",
    "shard_size": "Pass --shard-size (shard_size=) as a number of bytes, such as 5 << 30",
    "weights": PASS_ONE_WEIGHT_EACH,
    "start": "Pass a list with --start (start=), such as start=['karcher']",
    "gate": "Run adapterkit gate ... --json > FILE, and pass --gate FILE (gate=)",
}
"""Cures for arguments whose annotation does not say what to pass."""

_UNCHECKED = {"Any", "Array", "ArrayLike", "JsonValue", "Provider", "Setting", "Spaces", "Value", "object"}
"""Names of types whose values the functions check themselves."""

_LISTS = {"Sequence", "Iterable", "Collection", "Set", "list", "tuple", "set"}
_MAPPINGS = {"Mapping", "MutableMapping", "dict"}


class _Type:
    """A part of an annotation: its names in messages, exact types that pass without the test, and the test.

    `parts` are the types of a union. `absent` is set if None may stand for a list that is empty by default.
    """

    def __init__(self, one: str, many: str, test: Callable[[Any], bool], *exact: type) -> None:
        self.one, self.many, self.test = one, many, test
        self.exact = frozenset(exact)
        self.parts: tuple[_Type, ...] = ()
        self.absent = False

    def passes(self, value: object) -> bool:
        return type(value) in self.exact or self.test(value)


def _is_number(value: object) -> bool:
    """Return whether `value` is a single number: a Python number, a numpy number, or a tensor of one element."""
    if isinstance(value, str | bytes | bytearray):
        return False
    try:
        float(value)  # type: ignore[arg-type]
    except OverflowError:  # A Python integer can be larger than any float.
        return True
    except (TypeError, ValueError, RuntimeError):
        return False
    return True


def _is_whole(value: object) -> bool:
    """Return whether `value` is one whole number: Python's, numpy's, or a tensor of one element."""
    if type(value).__name__ in ("bool", "bool_"):
        return False
    try:
        index(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError):
        return False
    return True


def _is_truth(value: object) -> bool:
    """Return whether `value` is a truth value. A string such as "no" is not: it would count as true."""
    return value is None or type(value).__name__ in ("bool", "bool_") or (_is_number(value) and value in (0, 1))


def _is_text(value: object) -> bool:
    """Return whether `value` is a string, or an object of torch or numpy that a function takes instead of one."""
    return isinstance(value, str) or type(value).__name__ in ("dtype", "device")


_SCALARS = {
    "str": _Type("a string", "strings", _is_text, str),
    "bytes": _Type("bytes", "bytes", lambda value: isinstance(value, bytes | bytearray | memoryview), bytes),
    "bool": _Type("True or False", "truth values", _is_truth, bool),
    "int": _Type("a whole number", "whole numbers", _is_whole),
    "float": _Type("a number", "numbers", _is_number, float, int),
    "SupportsFloat": _Type("a number", "numbers", _is_number, float, int),
    "PathLike": _Type("a path", "paths", lambda value: hasattr(value, "__fspath__")),
    "Path": _Type("a path", "paths", lambda value: hasattr(value, "__fspath__")),
    "None": _Type("None", "None", lambda value: value is None, type(None)),
    "Callable": _Type("a function", "functions", callable),
    "type": _Type("a class", "classes", lambda value: isinstance(value, type), type),
}
_SIZES = {"memory", "shard_size"}
"""Arguments in bytes, which may also be round floats such as 5e9."""

_ROUND = _Type("a whole number", "whole numbers", lambda value: isinstance(value, float) and value.is_integer())
_ANYTHING = _Type("", "", lambda _: True)
_ABSENT = _Type("None", "None", lambda value: value is None, type(None))
"""Lets None pass for a list that is empty by default; the function gets the empty list."""


def _type_of(annotation: object, names: Mapping[str, object]) -> _Type:
    """Return what an annotation says. `names` are the globals of its module."""
    text = annotation if isinstance(annotation, str) else repr(annotation)
    return _parsed(ast.parse(text, mode="eval").body, names)


def _parsed(node: ast.expr, names: Mapping[str, object]) -> _Type:
    if isinstance(node, ast.BinOp):
        return _union([_parsed(part, names) for part in _parts(node)])
    if isinstance(node, ast.Constant):
        return _type_of(node.value, names) if isinstance(node.value, str) else _SCALARS["None"]
    inner: list[ast.expr] = []
    if isinstance(node, ast.Subscript):
        inner = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        node = node.value
    name = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else "object"
    if name in _UNCHECKED:
        return _ANYTHING
    if name in _LISTS:
        elements = [_parsed(part, names) for part in inner if ast.unparse(part) != "..."]
        alike = len({each.one for each in elements}) == 1  # A tuple of different elements is not checked further.
        return _list_of(elements[0] if alike else _ANYTHING)
    if name in _MAPPINGS:
        return _mapping_of(*(_parsed(part, names) for part in inner)) if inner else _mapping_of(_ANYTHING, _ANYTHING)
    if name in _SCALARS:
        return _SCALARS[name]
    return _class_named(name) if isinstance(node, ast.Attribute) else _named(name, names)


def _parts(node: ast.expr) -> Iterator[ast.expr]:
    if isinstance(node, ast.BinOp):
        yield from _parts(node.left)
        yield from _parts(node.right)
    else:
        yield node


def _named(name: str, names: Mapping[str, object]) -> _Type:
    """Return what a name means: an alias, or a class, which is known by its name, because importing it may be slow."""
    value = names.get(name)
    if value is None and name in _ALIASES:
        return _type_of(_ALIASES[name], {})
    if isinstance(value, TypeVar) or getattr(value, "_is_protocol", False):
        return _ANYTHING
    return _class_named(name) if value is None or isinstance(value, type) else _type_of(value, {})


def _class_named(name: str) -> _Type:
    article = "an" if name[0] in "AEIO" else "a"
    return _Type(f"{article} {name}", f"{name}s", lambda value: name in [each.__name__ for each in type(value).__mro__])


def _union(types: Sequence[_Type]) -> _Type:
    parts = tuple(part for each in types for part in each.parts or (each,))
    if _ANYTHING in parts:
        return _ANYTHING
    path = _SCALARS["PathLike"] in parts
    in_messages = [each for each in parts if not (path and each is _SCALARS["str"])]
    union = _Type("", "", lambda value: any(each.passes(value) for each in parts))
    union.parts, union.absent = parts, _ABSENT in parts
    union.exact = frozenset[type]().union(*(each.exact for each in parts))
    ones = list(dict.fromkeys(each.one for each in in_messages))
    union.one = " or ".join([", ".join(ones[:-1]), ones[-1]] if len(ones) > 1 else ones)
    union.many = " or ".join(dict.fromkeys(each.many for each in in_messages))
    return union


def _list_of(element: _Type) -> _Type:
    def test(value: object) -> bool:
        # An array of numbers is not a list of texts.
        if element is not _ANYTHING and hasattr(value, "dtype"):
            value = getattr(value, "tolist", lambda: value)()
        if isinstance(value, list | tuple):
            return element is _ANYTHING or all(map(element.passes, value))
        # An iterator can be read only once, so its elements are not checked here.
        return not isinstance(value, str | bytes | bytearray) and (
            hasattr(value, "__iter__") or hasattr(value, "__getitem__")
        )

    of = "" if element is _ANYTHING else f" of {element.many}"
    return _Type(f"a list{of}", f"lists{of}", test)


def _mapping_of(key: _Type, element: _Type) -> _Type:
    def test(value: object) -> bool:
        if not (hasattr(value, "keys") and hasattr(value, "__getitem__")):
            return False
        return not isinstance(value, dict) or (all(map(key.passes, value)) and all(map(element.passes, value.values())))

    of = "" if key is _ANYTHING or element is _ANYTHING else f" from {key.many} to {element.many}"
    return _Type(f"a dict{of}", f"dicts{of}", test)


def _refuse(name: str, value: object, type_: _Type) -> NoReturn:
    if type_ is _SCALARS["bool"]:
        cure = f"Pass {name}=True or {name}=False"
    else:
        cure = _CURES.get(name, f"Pass {name}= as {type_.one}")
    verb = "are" if name.endswith("s") and type_.one.startswith("a list") else "is"
    raise UsageError(f"{name} {shown(value)} {verb} not {type_.one}", where=name, cure=cure)


def _of_parameter(name: str, annotation: object, default: object, names: Mapping[str, object]) -> _Type:
    """Return the type of a parameter or field. `names` are the globals of its module."""
    type_ = _type_of(annotation, names)
    if type_ is not _ANYTHING and default == ():
        return _union([type_, _ABSENT])
    return _union([type_, _ROUND]) if name in _SIZES else type_


def _types_of(function: Callable[..., Any]) -> tuple[list[_Type], _Type | None, dict[str, _Type], list[str]]:
    """Return the types of the positional parameters, of `*args`, of all named parameters, and all names."""
    function = unwrap(function)
    places: list[_Type] = []
    rest: _Type | None = None
    named: dict[str, _Type] = {}
    order: list[str] = []
    for name, parameter in signature(function).parameters.items():
        kind = parameter.kind
        type_ = _ANYTHING
        if parameter.annotation is not parameter.empty and kind is not parameter.VAR_KEYWORD:
            type_ = _of_parameter(name, parameter.annotation, parameter.default, function.__globals__)
        if kind is parameter.VAR_POSITIONAL:
            rest = type_
        elif kind is not parameter.VAR_KEYWORD:
            named[name] = type_
        if kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            places.append(type_)
        order.append(name)
    return places, rest, named, order


F = TypeVar("F", bound=Callable[..., Any])


def checks_types(function: F) -> F:
    """Decorate a public function, so that it refuses an argument whose type is not the annotated one.

    The annotations are read at the first call. Names in them are not imported: a class is compared by its name.
    A value that does the same as the annotated type passes: numpy's numbers, any iterable for a list, any mapping for a
    dict. A string does not pass for a bool or for a list of strings.
    The function's frame is one deeper in the stack, which matters for the `stacklevel` of warnings.
    """
    types: tuple[list[_Type], _Type | None, dict[str, _Type], list[str]] | None = None

    @wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        nonlocal types
        if types is None:
            types = _types_of(function)
        places, rest, named, order = types
        for position, value in enumerate(args):
            type_ = places[position] if position < len(places) else rest
            if value is None and type_ is not None and type_.absent:
                args = (*args[:position], (), *args[position + 1 :])
            elif type_ is not None and type(value) not in type_.exact and not type_.test(value):
                _refuse(order[min(position, len(places))], value, type_)
        for name, value in kwargs.items():
            type_ = named.get(name)
            if value is None and type_ is not None and type_.absent:
                kwargs[name] = ()
            elif type_ is not None and type(value) not in type_.exact and not type_.test(value):
                _refuse(name, value, type_)
        return function(*args, **kwargs)

    return cast("F", checked)


def check_fields(value: object) -> None:
    """Check that the fields of a dataclass have the annotated types, as `checks_types` does for a function.

    Raises:
        UsageError: a field has another type.
    """
    kind = type(value)
    types = _FIELDS.get(kind)
    if types is None:
        names = vars(sys.modules[kind.__module__])
        types = _FIELDS[kind] = {
            each.name: _of_parameter(each.name, each.type, each.default, names)
            for each in fields(kind)  # type: ignore[arg-type]
        }
    for name, type_ in types.items():
        given = getattr(value, name)
        if given is None and type_.absent:
            object.__setattr__(value, name, ())
        elif not type_.passes(given):
            _refuse(name, given, type_)


_FIELDS: dict[type, dict[str, _Type]] = {}
