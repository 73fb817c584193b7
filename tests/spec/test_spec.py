import copy
import dataclasses
import hashlib
import json
import os
import re
import struct
import subprocess
import sys
import tomllib
from pathlib import Path

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

import adapterkit as ak
from adapterkit.core.shapes import names_in
from adapterkit.errors import AdapterkitError
from adapterkit.formats import FORMATS
from adapterkit.formats.adapterkit import KEY, SPEC, Record
from adapterkit.linalg.activations import ACTIVATIONS
from adapterkit.methods import METHODS

ROOT = Path(__file__).parents[2] / "spec"
MANIFEST = tomllib.loads((ROOT / SPEC / "manifest.toml").read_text("utf-8"))
RELEASED = tomllib.loads((ROOT / "1.0" / "manifest.toml").read_text("utf-8"))
FORMAT_ENTRIES = sorted((ROOT / "formats").glob("*.toml"))
VECTORS = sorted((ROOT / "vectors" / "methods").glob("*.adapter.safetensors"))


def entry(folder, name):
    return tomllib.loads((ROOT / folder / f"{name}.toml").read_text("utf-8"))


def record(path):
    """The record in a file, read without adapterkit."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(json.loads(data[8 : 8 + length])["__metadata__"][KEY])


@pytest.fixture(scope="session")
def schema():
    return jsonschema.Draft202012Validator(json.loads((ROOT / SPEC / "record.schema.json").read_text("utf-8")))


def test_module_entry_and_vector_exist_in_threes():
    entries = {path.stem for path in (ROOT / "methods").glob("*.toml")}
    vectors = {path.name.partition(".")[0] for path in VECTORS}
    assert entries == vectors == set(METHODS) == set(MANIFEST["methods"])
    assert all(path.with_name(path.name.replace(".adapter.", ".expected.")).exists() for path in VECTORS)


@pytest.mark.parametrize("name", METHODS)
def test_a_methods_entry_says_what_its_class_does(name):
    said, cls = entry("methods", name), METHODS[name]
    assert (said["name"], said["version"], said["kind"]) == (name, cls.version, cls.kind)
    assert (said["paper"], said["needs_bias"], said["since"]) == (cls.paper, cls.needs_bias, list(cls.since))
    assert said.get("axes") == ("out in" if cls.linear_only else None)
    assert said.get("bound_to", "") == cls.bound_to
    assert said.get("of_model", False) == getattr(cls, "of_model", False)
    assert said.get("one_of", []) == [[list(names) for names in group] for group in cls.forms]
    rules = [{k: v for k, v in dataclasses.asdict(rule).items() if v} for rule in cls.rules]
    assert said.get("rules", []) == [
        {k: v for k, v in rule.items() if not (k == "error" and "define" in rule)} for rule in rules
    ]
    fits = [{k: v for k, v in dataclasses.asdict(rule).items() if v and k != "error"} for rule in cls.fits]
    assert said.get("fits", []) == fits
    assert said["blocks"] == sorted(cls.blocks)
    assert MANIFEST["methods"][name] == cls.version
    assert said["title"]
    assert said["formula"]


WEIGHTS = [name for name, cls in METHODS.items() if cls.kind in ("additive", "weight")]


def holds(expression, update):
    """An expression over tensors and attributes, evaluated without adapterkit."""
    words = re.sub(r"has\((\w+)\)", r'("\1" in tensors)', expression)
    return bool(eval(words, {"tensors": update.tensors, **update.attributes}))


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_methods_entry_says_what_its_formula_changes(name):
    """For every update of the vectors, and for each with one optional tensor or one flag more or less."""
    said, seen = entry("methods", name), set()
    for path in (path for path in VECTORS if path.name.startswith(f"{name}.")):
        for _, update in (each for each in ak.read(path) if each[1].method == name):
            flags = [{key: not value} for key, value in update.attributes.items() if isinstance(value, bool)]
            for change in [{}, *({key: None} for key in update.tensors), *flags]:
                each = copy.copy(update)
                for key, value in change.items():
                    object.__setattr__(each, key, value)
                changes = each.changes_weight, each.changes_bias
                says = holds(said.get("changes_weight", "1"), each), holds(said.get("changes_bias", "0"), each)
                assert says == changes, change
                seen.add(changes)
    assert ("changes_bias" in said) == any(bias for _, bias in seen)
    assert ("changes_weight" in said) == (not all(weight for weight, _ in seen))


OWN_CHECKS = {"rows"}
"""Methods whose classes add a hint to a check that the entry has as data."""


@pytest.mark.parametrize("name", WEIGHTS)
def test_all_that_a_formula_asks_of_a_weight_is_data(name):
    own = {cls.__module__ for cls in METHODS[name].__mro__ if "check_against" in vars(cls)}
    assert own - {"adapterkit.core.updates.update"} == ({METHODS[name].__module__} if name in OWN_CHECKS else set())


@pytest.mark.parametrize("name", METHODS)
def test_a_methods_entry_fits_its_schema(name):
    checker = jsonschema.Draft202012Validator(json.loads((ROOT / "method.schema.json").read_text("utf-8")))
    checker.validate(entry("methods", name))


@pytest.mark.parametrize("name", METHODS)
def test_a_methods_rules_read_what_it_has(name):
    cls = METHODS[name]
    axes = {
        word for field in cls.tensor_fields().values() for word in re.findall(r"[a-z]\w*", field.metadata["axes"].text)
    }
    axes |= {rule.define for rule in cls.rules}
    assert not axes & set(cls.attribute_fields())
    for rule in cls.fits:
        for text in filter(None, (rule.when, rule.require)):
            assert set(names_in(text)) <= axes | set(cls.attribute_fields()) | {"out", "in", "columns", "kernel"}
    for rule in cls.rules:
        for text in filter(None, (rule.when, rule.require, rule.value)):
            assert set(names_in(text)) <= axes | set(cls.attribute_fields())
            assert set(re.findall(r"(?:has|axes)\((\w+)\)", text)) <= set(cls.tensor_fields())


@pytest.mark.parametrize("name", METHODS)
def test_a_methods_tensors_are_its_fields_in_order(name):
    said = [
        (t["name"], t["shape"], t.get("optional", False), t.get("integer", False))
        for t in entry("methods", name)["tensors"]
    ]
    fields = METHODS[name].tensor_fields().items()
    assert said == [(n, f.metadata["axes"].text, f.metadata["optional"], f.metadata["integer"]) for n, f in fields]
    assert all(tensor["meaning"] for tensor in entry("methods", name)["tensors"])
    said = [(t.get("below", []), t.get("distinct", False)) for t in entry("methods", name)["tensors"]]
    assert said == [(list(f.metadata["below"]), f.metadata["distinct"]) for _, f in fields]


@pytest.mark.parametrize("name", METHODS)
def test_a_methods_attributes_are_its_fields_in_order(name):
    attributes = entry("methods", name).get("attributes", [])
    said = [(a["name"], a["type"], a.get("default", dataclasses.MISSING)) for a in attributes]
    assert said == [(n, f.type, f.default) for n, f in METHODS[name].attribute_fields().items()]
    assert all(type(a["default"]).__name__ == a["type"] for a in attributes if "default" in a)
    assert all(attribute["meaning"] for attribute in attributes)
    rules = [
        (a.get("among", []), a.get("least"), a.get("most"), a.get("positive", False), a.get("since", 1))
        for a in attributes
    ]
    fields = [field.metadata for field in METHODS[name].attribute_fields().values()]
    assert rules == [
        (list(f.get("among", ())), f.get("least"), f.get("most"), f.get("positive", False), f.get("since", 1))
        for f in fields
    ]


@pytest.mark.parametrize("name", METHODS)
def test_vectors_use_every_field_and_every_default(name):
    updates = [update for path in VECTORS if path.name.startswith(f"{name}.") for update in record(path)["updates"]]
    own = [update for update in updates if update["method"] == name]
    fields, attributes = METHODS[name].tensor_fields(), METHODS[name].attribute_fields()
    for field, declared in fields.items():
        assert any(field in update["tensors"] for update in own)
        assert not declared.metadata["optional"] or any(field not in update["tensors"] for update in own)
    for attribute, declared in attributes.items():
        assert any(attribute in update["attributes"] for update in own)
        required = declared.default is dataclasses.MISSING
        assert required or any(attribute not in update["attributes"] for update in own)
    layouts = {"out *in"} if METHODS[name].kind == "context" else {"out *in", "in out *k"}
    assert {update["target"]["layout"] for update in own} >= layouts


@pytest.mark.parametrize("path", FORMAT_ENTRIES, ids=lambda path: path.stem)
def test_a_formats_entry_says_what_its_class_does(path):
    said, cls = entry("formats", path.stem), FORMATS[path.stem]
    assert said["name"] == path.stem
    parts = [tomllib.loads(part.read_text("utf-8")) for part in path.with_suffix("").glob("*.toml")]
    own = MANIFEST["methods"] if said["methods"] == "all" else said["methods"]
    assert {*own, *(name for part in parts for name in part["methods"])} == cls.methods
    assert said["url"] == cls.url
    assert all(said[key] for key in ("title", "container", "read", "write"))
    assert set(own) <= set(MANIFEST["methods"])


def test_every_format_has_an_entry_and_the_manifest_lists_them():
    assert {path.stem for path in FORMAT_ENTRIES} == set(FORMATS) == set(MANIFEST["formats"])


def test_the_manifest_is_of_the_version_that_is_written():
    assert MANIFEST["version"] == SPEC
    assert (ROOT / MANIFEST["schema"]).exists()
    assert f"## {SPEC}\n" in (ROOT / "CHANGES.md").read_text("utf-8")
    assert (ROOT / "README.md").read_text("utf-8").startswith(f"# The adapterkit container, version {SPEC}\n")


@pytest.mark.parametrize("name", RELEASED["vectors"])
def test_a_vector_of_an_older_version_is_unchanged(name):
    assert hashlib.sha256((ROOT / "vectors" / name).read_bytes()).hexdigest() == RELEASED["vectors"][name]


def test_an_older_version_has_the_methods_that_say_so():
    older = {name: sum(since <= "1.0" for since in cls.since) for name, cls in METHODS.items()}
    cure = "1.0 is released: a new method says since = ('1.1',) in its class and since = ['1.1'] in its entry"
    assert {name: version for name, version in older.items() if version} == RELEASED["methods"], cure
    assert RELEASED["released"]


@pytest.mark.parametrize("name", MANIFEST["vectors"])
def test_a_listed_vector_is_unchanged(name):
    assert hashlib.sha256((ROOT / "vectors" / name).read_bytes()).hexdigest() == MANIFEST["vectors"][name]


def test_every_vector_of_a_method_is_listed():
    on_disk = {path.relative_to(ROOT / "vectors").as_posix() for path in (ROOT / "vectors" / "methods").iterdir()}
    assert on_disk == {name for name in MANIFEST["vectors"] if name.startswith("methods/")}


def test_what_is_made_by_machine_is_what_the_machine_makes():
    root = ROOT.parent
    done = subprocess.run(
        [
            sys.executable, root / "tools" / "vectors", "--check", "--methods", "--formats", "--invalid", "--schema",
            "--tables",
        ],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(root)}, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("path", VECTORS, ids=lambda path: path.name)
def test_every_vectors_record_fits_the_schema(path, schema):
    schema.validate(record(path))


def test_every_native_file_of_a_foreign_vector_fits_the_schema(schema):
    native = set((ROOT / "vectors" / "formats").rglob("*native.safetensors"))
    assert native
    for path in (ROOT / "vectors" / "formats").rglob("*.safetensors"):
        data = path.read_bytes()
        metadata = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]]).get("__metadata__")
        if KEY in (metadata or {}):
            schema.validate(json.loads(metadata[KEY]))
            native.discard(path)
    assert not native


def test_the_schema_is_one_and_the_page_s_example_fits_it(schema):
    schema.check_schema(schema.schema)
    (example,) = re.findall(r"```json\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)
    schema.validate(json.loads(example))


def test_the_page_s_example_is_read_as_it_stands(tmp_path):
    (example,) = re.findall(r"```json\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)
    q, c = "model.layers.0.self_attn.q_proj", "transformer.h.0.attn.c_attn"
    tensors = {f"{q}.A": np.ones((2, 3)), f"{q}.B": np.ones((4, 2)), f"{c}.l": np.ones(768)}
    save_file(tensors, tmp_path / "x", {KEY: example})
    adapter = ak.read(tmp_path / "x", format="adapterkit")
    assert [(str(target), update.method) for target, update in adapter] == [(q, "lora"), (f"{c}[0:768]", "ia3")]


def test_the_page_defines_every_activation():
    page = (ROOT / "README.md").read_text("utf-8").partition("Activations are")[2].partition("\n\n")[0]
    assert set(re.findall(r"`(\w+)`", page)) == set(ACTIVATIONS)


def test_the_page_names_every_field_of_the_record(schema):
    page = (ROOT / "README.md").read_text("utf-8")
    for definition in schema.schema["$defs"].values():
        for name in definition["properties"]:
            assert re.search(rf"[`{{\" ,]{name}[`}}\",]", page), name
    assert set(schema.schema["$defs"]["Record"]["properties"]) == set(Record.__struct_fields__)


# Copied, because a later change may be made inside of a drawn list.
VALUES = st.sampled_from(
    [None, True, 0, 1, -1, 2, 1.5, "", "q", "1.0", "out *in", "e in out *k", [], [0, 2], [1, "a"], {}]
).map(copy.deepcopy)


@settings(max_examples=300)
@given(data=st.data())
def test_the_schema_accepts_whatever_the_reader_does(data, tmp_path_factory, schema):
    """Records changed at random places: none that the schema rejects may pass the reader."""
    path = tmp_path_factory.getbasetemp() / "mutated.safetensors"
    update = {
        "target": {"path": "q", "rows": [0, 2]},
        "method": "ia3",
        "version": 1,
        "tensors": {"l": "t"},
        "attributes": {},
    }
    good = {
        "version": "1.0",
        "updates": [update],
        "base": {"id": "x"},
        "recipe": [{"op": "x", "args": {}}],
        "requires": [],
    }
    changed = copy.deepcopy(good)
    for _ in range(data.draw(st.integers(0, 2))):
        _change(changed, data)
    save_file({"t": np.ones(2)}, path, {KEY: json.dumps(changed)})
    try:
        ak.read(path, format="adapterkit")
    except AdapterkitError:
        return
    schema.validate(changed)


def _change(value, data):
    """Sets, adds or removes one field or item somewhere inside `value`."""
    inside = value
    while True:
        keys = list(inside) if isinstance(inside, dict) else list(range(len(inside)))
        if not keys:
            return
        key = data.draw(st.sampled_from(keys))
        if not isinstance(inside[key], dict | list) or data.draw(st.integers(0, 2)) == 0:
            break
        inside = inside[key]
    if isinstance(inside, dict) and data.draw(st.booleans()):
        inside.pop(key)
        inside[data.draw(st.sampled_from(["layout", "rows", "id", "extensions", "colour", "foreign"]))] = data.draw(
            VALUES
        )
    else:
        inside[key] = data.draw(VALUES)
