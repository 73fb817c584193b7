"""A file means what its trainer's forward computed; where that departs from the paper, both readings are listed."""

import ast
import tomllib
from pathlib import Path

import pytest

from adapterkit.formats import FORMATS
from adapterkit.formats._format import FORMULA

ROOT = Path(__file__).parents[2]
SPEC = ROOT / "spec" / "formats"


def listed(name):
    """The departures in a format's entry of the specification, and in those of its families."""
    files = [SPEC / f"{name}.toml", *sorted((SPEC / name).glob("*.toml"))]
    found = [tomllib.loads(path.read_text("utf-8")).get("departures", {}) for path in files if path.exists()]
    merged = {key: value for each in found for key, value in each.items()}
    assert len(merged) == sum(map(len, found)), "one name twice"
    return merged


@pytest.mark.parametrize("name", FORMATS)
def test_the_specification_and_the_code_list_the_same_departures(name):
    said = {key: (value["trained"], value["formula"]) for key, value in listed(name).items()}
    assert said == {key: (each.trained, each.formula) for key, each in FORMATS[name].departures.items()}
    assert (FORMULA in FORMATS[name].compat) == bool(said)


@pytest.mark.parametrize(("name", "departure"), [(name, key) for name in FORMATS for key in listed(name)])
def test_every_departure_names_a_test(name, departure):
    path, _, function = listed(name)[departure]["test"].partition("::")
    tree = ast.parse((ROOT / path).read_text("utf-8"))
    assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_no_reader_asks_for_the_faults_of_a_tool():
    """The names of tools are no readings of these formats: their forward is the default."""
    for name in ("adapterhub", "comfyui", "diffusers", "kohya", "lycoris", "peft"):
        assert FORMATS[name].compat <= {FORMULA, "direft", "noreft"}
