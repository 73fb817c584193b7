"""Public functions refuse arguments of wrong types before any work, and take what does the same as the type."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

import adapterkit as ak
import adapterkit.quant
import adapterkit.testing
from adapterkit.core.arguments import _ALIASES, _UNCHECKED, checks_types
from adapterkit.errors import UsageError

CLASSES = ("Adapter", "Session", "FolderSession", "TextData", "Bom", "AdapterReport", "Plan")
"""Classes whose methods users call with arguments. Those of `Remote` are called by adapterkit alone."""


def exported(module: ModuleType, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every public value that is no module, with its name, also of the subpackages."""
    for name in module.__all__:
        value = getattr(module, name)
        if inspect.ismodule(value):
            yield from exported(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def public(module: ModuleType) -> Iterator[tuple[str, Callable[..., Any]]]:
    """Every public function, and every method of `CLASSES`, with its name."""
    for name, value in exported(module):
        if inspect.isfunction(value):
            yield name, value
        elif name.rpartition(".")[2] in CLASSES:
            for own, method in vars(value).items():
                if inspect.isfunction(method) and not own.startswith("_") and not inspect.iscoroutinefunction(method):
                    yield f"{name}.{own}", method


ANYTHING = (
    "object", "object | None", "npt.ArrayLike", "Mapping[str, npt.ArrayLike] | npt.ArrayLike", "Spaces", "OrtBinding",
)  # fmt: skip
"""Annotations that say nothing, or whose values the functions check themselves."""

FUNCTIONS = dict(public(ak))
ARGUMENTS = [
    (name, parameter.name, parameter.kind)
    for name, function in FUNCTIONS.items()
    for parameter in inspect.signature(function).parameters.values()
    if parameter.kind is not parameter.VAR_KEYWORD and parameter.name != "self" and parameter.annotation not in ANYTHING
]


@pytest.mark.parametrize(("name", "argument", "kind"), ARGUMENTS, ids=[f"{a}-{b}" for a, b, _ in ARGUMENTS])
def test_a_wrong_type_is_refused_with_what_to_pass(name: str, argument: str, kind: Any) -> None:
    """The check precedes all others, so no other argument is needed."""
    function, wrong = FUNCTIONS[name], type("Wrong", (), {})()
    args, kwargs = ((wrong,), {}) if kind is inspect.Parameter.VAR_POSITIONAL else ((), {argument: wrong})
    with pytest.raises(UsageError) as refused:
        function(*args, **kwargs)
    assert refused.value.where == argument
    assert refused.value.cure is not None
    assert f"{argument}=" in refused.value.cure or kind is inspect.Parameter.VAR_POSITIONAL


def test_arguments_in_another_order_are_refused(tmp_path: Path) -> None:
    adapter = ak.Adapter({})
    with pytest.raises(UsageError, match="Pass adapter= as an Adapter"):
        ak.write(tmp_path, adapter)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="Pass model= as a Module"):
        ak.torch.inject(adapter, torch.nn.Linear(2, 2))  # type: ignore[arg-type]


def described(given: dict[str, Any]) -> str:
    ((name, value),) = given.items()
    return f"{name}-{type(value).__name__}"


@checks_types
def example(
    one: str, *rest: int, path: ak.Checkpoint | str | Path = "", share: float = 0.0, whole: int = 0, on: bool = False,
    names: list[str] | tuple[str, ...] = (), table: dict[str, int] | None = None,
) -> str:  # fmt: skip
    """The docstring."""
    del rest, path, share, whole, on, names, table
    return one


@pytest.mark.parametrize(
    "given",
    [
        {"share": np.float32(0.5)}, {"share": torch.tensor(0.5)}, {"share": 10**400}, {"share": 1},
        {"whole": np.int64(3)},
        {"whole": torch.tensor(3)}, {"on": np.bool_(True)}, {"on": 1}, {"path": Path("a")},
        {"names": iter(["a"])}, {"names": (name for name in "ab")}, {"names": {"a"}}, {"names": np.array(["a"])},
        {"names": None}, {"names": []}, {"table": None}, {"table": {"a": 1}},
    ],
    ids=described,
)  # fmt: skip
def test_what_does_the_same_as_the_type_passes(given: dict[str, Any]) -> None:
    assert example("a", 1, 2, **given) == "a"


@pytest.mark.parametrize(
    "given",
    [
        {"share": "1"}, {"share": np.ones(2)}, {"share": None}, {"whole": 2.5}, {"whole": True},
        {"whole": float("nan")}, {"whole": "1"},
        {"on": "no"}, {"on": 2}, {"path": b"a"}, {"path": 3}, {"names": "ab"}, {"names": [3]}, {"names": 3},
        {"names": np.ones(2)},
        {"table": {"a": "b"}}, {"table": {1: 1}}, {"table": []},
    ],
    ids=described,
)  # fmt: skip
def test_another_type_is_refused(given: dict[str, Any]) -> None:
    (name,) = given
    with pytest.raises(UsageError, match=f"Pass {name}="):
        example("a", **given)


def test_arguments_by_position_are_checked() -> None:
    with pytest.raises(UsageError, match="Pass one= as a string"):
        example(3)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="rest 'x' is not a whole number"):
        example("a", 1, "x")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="missing 1 required positional argument"):
        example()  # type: ignore[call-arg]
    assert example.__doc__ == "The docstring."
    assert [*inspect.signature(example).parameters][:2] == ["one", "rest"]


def test_none_for_a_list_that_is_empty_by_default_is_the_empty_list() -> None:
    @checks_types
    def chosen(*, names: list[str] | tuple[str, ...] = ()) -> object:
        return names

    assert chosen(names=None) == ()  # type: ignore[arg-type]


def test_options_of_a_merge_are_checked(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="Pass allow_partial=True"):
        ak.MergeOptions(allow_partial="no")  # type: ignore[arg-type]
    save_file({"q.weight": np.ones((2, 2), "f4")}, tmp_path / "base.safetensors")
    with pytest.raises(UsageError, match=r"--shard-size \(shard_size=\)"):
        ak.plan(tmp_path / "base.safetensors", [], shard_size="5GB")  # type: ignore[arg-type]


def aliases_for_type_checkers() -> Iterator[tuple[str, str]]:
    """Each alias that a module of the package defines only for type checkers, with what it stands for."""
    for file in sorted(Path(ak.__file__).parent.rglob("*.py")):
        for block in ast.parse(file.read_text("utf-8")).body:
            if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING":
                for line in block.body:
                    if isinstance(line, ast.Assign) and isinstance(line.targets[0], ast.Name):
                        yield line.targets[0].id, ast.unparse(line.value)
                    elif isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name) and line.value:
                        yield line.target.id, ast.unparse(line.value)


def test_aliases_for_type_checkers_mean_what_they_mean_at_run_time() -> None:
    """The check at run time cannot import them; an alias that it does not know would count as a class."""
    aliases = dict[str, set[str]]()
    for name, meaning in aliases_for_type_checkers():
        aliases.setdefault(name, set()).add(meaning)

    def types(text: str) -> list[str]:
        """The names in an annotation, with those of every alias in place of its own."""
        names = re.findall(r"[\w.]+", text)
        return sorted(one for name in names for one in (types(min(aliases[name])) if name in aliases else [name]))

    annotations = [
        re.sub(r"Callable\[\[.*?\], .*?\]", "Callable", str(parameter.annotation))
        for function in FUNCTIONS.values()
        for parameter in inspect.signature(function).parameters.values()
    ]
    used = {name for annotation in annotations for name in re.findall(r"\w+", annotation)} & aliases.keys()
    assert used - _UNCHECKED <= _ALIASES.keys()
    for name in used - _UNCHECKED:
        if not _ALIASES[name].startswith("Callable"):
            assert types(_ALIASES[name]) in [types(meaning) for meaning in aliases[name]], name


def annotated(module: ModuleType) -> Iterator[tuple[str, Callable[..., Any]]]:
    """Every public function, and every public method, property and constructor of a public class, with its name."""
    for name, value in exported(module):
        if inspect.isfunction(value):
            yield name, value
        elif inspect.isclass(value):
            members = [
                item for cls in value.__mro__ if cls.__module__.startswith("adapterkit") for item in vars(cls).items()
            ]
            for member, item in members:
                function = item.fget if isinstance(item, property) else getattr(item, "__func__", item)
                if inspect.isfunction(function) and (not member.startswith("_") or member == "__init__"):
                    yield f"{name}.{member}", function


SIGNATURES = {name: function for module in (ak, ak.quant, ak.testing) for name, function in annotated(module)}


def test_no_public_signature_says_any() -> None:
    """A value of JSON is a `JsonValue`. A value that may have any type is an `object`, so users must look at it."""
    vague = {
        f"{name}: {argument}"
        for name, function in SIGNATURES.items()
        for argument, note in inspect.get_annotations(inspect.unwrap(function)).items()
        if re.search(r"\bAny\b", str(note))
    }
    assert vague == set()
    assert len(SIGNATURES) > 200
