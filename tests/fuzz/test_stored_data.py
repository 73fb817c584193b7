"""The lineage and the kept data in an adapter file are untrusted: any JSON there gives a result or a typed error."""

import copy
import json
import random

import pytest
from format_vectors import EVERY, base_with_config, source
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import adapterkit as ak
import adapterkit.testing
from adapterkit.errors import AdapterkitError
from adapterkit.formats import FORMATS

OTHERS = [5, -1, 10**25, "x", None, True, [], [5], ["x"], [None], [[]], [{}], {}, {"a": 5}, {"a": {"b": None}}]
DRAWS = 8
IN_FORMATS = [f for f in EVERY if f.parent.name in FORMATS]
ONE_EACH = [*{f.parent.name: f for f in reversed(IN_FORMATS)}.values()]
MORE = [f for f in IN_FORMATS if f.name in ("lora_experts", "two_methods", "boft", "embeddings")]


def places(value, before=()):
    """The path of each value in a JSON document, of the first ones in long lists."""
    yield before
    entries = value.items() if isinstance(value, dict) else enumerate(value[:3]) if isinstance(value, list) else ()
    for key, entry in entries:
        yield from places(entry, (*before, key))


def changed(document, path, value):
    document = copy.deepcopy(document)
    *way, last = path
    inside = document
    for key in way:
        inside = inside[key]
    inside[last] = value
    return document


def with_document(file, out, document):
    save_file(load_file(file), out, {"adapterkit": json.dumps(document)})


def document_of(file):
    with safe_open(file, "np") as opened:
        return json.loads(opened.metadata()["adapterkit"])


@pytest.mark.parametrize("folder", [*ONE_EACH, *MORE], ids=lambda folder: f"{folder.parent.name}-{folder.name}")
def test_kept_data_of_another_shape_raises_no_raw_error(folder, tmp_path):
    name, rng = folder.parent.name, random.Random(folder.name)
    base = base_with_config(folder)
    native, odd = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    ak.write(ak.read(source(folder), base=base), native, format="adapterkit")
    document = document_of(native)
    data = document.get("foreign", {}).get("data", {})
    paths = [("foreign", "data", *path) for path in places(data) if path] + [
        ("recipe", *path) for path in places(document.get("recipe")) if path
    ]
    for path in rng.sample(paths, min(DRAWS, len(paths))):
        with_document(native, odd, changed(document, path, rng.choice(OTHERS)))
        try:
            ak.inspect(odd)
            ak.write(ak.read(odd), tmp_path / "out", format=name, base=base, overwrite=True)
        except AdapterkitError:
            pass


OF = [5, "x", [5], {"recipe": [5]}, [{"recipe": 5}], [{"recipe": [5]}], [{"recipe": [{"op": "read", "args": 5}]}],
      [{"recipe": [{"args": {}}]}]]  # fmt: skip


@pytest.mark.parametrize("of", OF, ids=str)
def test_a_combination_of_what_is_no_adapter_counts_as_none(of, tmp_path):
    file = tmp_path / "a.safetensors"
    ak.write(ak.Adapter({ak.Target("q"): (ak.testing.example("lora"),)}).step("create"), file, format="adapterkit")
    document = document_of(file)
    document["recipe"].append({"op": "combine", "args": {"of": of}})
    with_document(file, file, document)
    adapter = ak.read(file)
    assert [step.op for step in adapter.recipe] == ["create", "combine"]
    assert all(not source or source[0].op == "read" for source in adapter.recipe[-1].sources())
    ak.convert(file, tmp_path / "peft", to="peft")
    ak.combine([adapter, adapter], "linear")
    ak.report([file])
