"""Architecture files: their form, one to one in every naming, and against what transformers itself stores where."""

import gzip
import json
import tomllib
from pathlib import Path

import numpy as np
import pytest

from adapterkit.core.adapter import Adapter, Target
from adapterkit.errors import Malformed, TargetNotFound
from adapterkit.io.lazy import from_numpy
from adapterkit.methods import METHODS
from adapterkit.naming import architectures
from adapterkit.naming.architectures import architecture_of, faults, fill, folder, load
from adapterkit.naming.binding import find_sites
from adapterkit.naming.moves import stored_in_out

LoRA = METHODS["lora"]
FILES = sorted(folder().glob("*.toml"))
# `exaone:bare` is a base that EXAONE's class without a head saved.
BASES = json.loads(gzip.decompress((Path(__file__).parents[1] / "data" / "bases.json.gz").read_bytes()))
NUMBERS = {"{n}": "3", "{m}": "1", "{k}": "2", "{j}": "0", "{e}": "5"}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_naming_of_a_file_is_one_to_one_both_ways(file):
    architecture = load(file)
    assert architecture.family == file.stem
    for naming in architecture.namings:
        for weight in architecture.record.weights:
            place = architecture.place(weight, naming)
            if place is not None:
                found = architecture.find(fill(place.name, NUMBERS), naming)
                told = (place.part, place.qkv, place.ratio, place.half)
                same = [each for each in found if (each[1].part, each[1].qkv, each[1].ratio, each[1].half) == told]
                assert [each[0] for each in same] == [weight]
                assert fill(place.name, same[0][2]) == fill(place.name, NUMBERS)


def test_a_model_type_has_one_file():
    types = [each for file in FILES for each in load(file).record.model_types]
    assert len(types) == len(set(types))
    for file in FILES:
        for model_type in load(file).record.model_types:
            assert architecture_of({"model_type": model_type}).family == file.stem
    for nothing in (None, {}, {"model_type": None}, {"model_type": "../pyproject"}, {"model_type": "no_such_type"}):
        assert architecture_of(nothing) is None


def config_of(model_type):
    return {"model_type": model_type.partition(":")[0], **BASES[model_type].get("config", {})}


@pytest.mark.parametrize(
    ("model_type", "prefix"), [(each, "") for each in BASES] + [(each, "model.") for each in BASES if ":" in each]
)
def test_an_adapter_of_a_live_model_finds_its_place_in_the_base_as_it_is_stored(model_type, prefix):
    """Rows of B are numbered, so that it shows which part of a target went where.

    With a prefix, the adapter is of the class with a head.
    """
    vector, updates = BASES[model_type], {}
    targets = {prefix + path: each for path, each in vector["targets"].items()}
    for path, each in targets.items():
        *lead, out, into = each["shape"]
        rows = np.arange(np.prod(lead, dtype=int) * out, dtype="f4").reshape(*lead, out, 1)
        update = LoRA(A=from_numpy(np.zeros((*lead, 1, into), "f4")), B=from_numpy(rows))
        updates[Target(path, "e out *in" if lead else "out *in")] = (update,)
    shapes = {name: tuple(shape) for name, shape in vector["base"].items()}
    bound = find_sites(Adapter(updates), shapes, partial=False, config=config_of(model_type))
    found = {}
    for origin, site in zip(bound.origins, bound.sites, strict=True):
        stacked = origin.stacked and not site.target.stacked
        first = int(site.updates[0].B.numpy().ravel()[0])
        out = targets[origin.path]["shape"][-2]
        size = site.updates[0].B.shape[-2]
        place = (first // out if stacked else None, first % out, first % out + size)
        where = site.target.rows[0] if site.target.rows else 0
        found.setdefault(origin.path, set()).add((*place, site.target.path, where))
    for path, each in targets.items():
        expected = {(*piece[:4], piece[5]) for piece in each["pieces"]}
        if len(each["shape"]) == 3 and each["pieces"][0][0] is None:  # A stack that goes to a stack, whole.
            expected = {(None, 0, each["shape"][1], piece[3], 0) for piece in each["pieces"]}
        assert found[path] == expected


@pytest.mark.parametrize("model_type", BASES)
def test_an_adapter_in_stored_names_finds_its_place_in_a_live_model(model_type):
    """The other way: rows of B are numbered through all stored weights, and must come out where the live ones are."""
    vector, updates, expected = BASES[model_type], {}, {}
    first = 0
    for path, each in vector["targets"].items():
        *lead, out, into = each["shape"]
        expected[path] = np.full((*lead, out), -1)
        for expert, start, stop, other, there, row, of in each["pieces"]:
            stacked = len(lead) == 1 and expert is None
            if other not in updates:
                lead_there = tuple(lead) if stacked or there is not None else ()
                rows = out if stacked else of
                ids = np.arange(first, first + np.prod(lead_there, dtype=int) * rows).reshape(*lead_there, rows)
                first += ids.size
                B = from_numpy(ids[..., None].astype("f8"))
                A = from_numpy(np.zeros((*lead_there, 1, into), "f8"))
                updates[other] = ids, "e out *in" if lead_there else "out *in", LoRA(A=A, B=B)
            ids = updates[other][0]
            where = (slice(None),) if stacked else (() if expert is None else (expert,)) + (slice(start, stop),)
            found = ids if stacked else ids[() if there is None else there][row : row + stop - start]
            expected[path][where] = found
    names = {name for path in vector["targets"] for name in (path, f"{path}.weight")}
    shapes = {name: tuple(vector["live"][name]) for name in names if name in vector["live"]}
    adapter = Adapter({Target(path, layout): (update,) for path, (_, layout, update) in updates.items()})
    found = {path: np.full(ids.shape, -1) for path, ids in expected.items()}
    for site in find_sites(adapter, shapes, partial=False, config=config_of(model_type)).sites:
        rows = slice(None) if site.target.rows is None else slice(*site.target.rows)
        found[site.target.path][..., rows] = site.updates[0].B.numpy()[..., 0]
    for path, ids in expected.items():
        np.testing.assert_array_equal(found[path], ids, err_msg=path)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ("format = 1->format = 2", "format 2"),
        ('"b.{n}" = {}->"b.{n}" = { hub = "a.{n}" }', "are both"),
        ('"b.{n}" = {}->"b.{n}" = { hub = "b" }', "placeholders"),
        ('"b.{n}" = {}->"b.{n}" = { hub = { name = "b.{n}", part = 2, of = 2 } }', "part 2 of 2"),
        ('"b.{n}" = {}->"b.{n}" = { hub = { name = "b.{n}", part = 1, parts = 2, of = 2 } }', "part 1 of 2"),
        ('"b.{n}" = {}->"b.{n}" = { hub = { name = "b.{n}", parts = 2 } }', "both part and of"),
        (
            (
                '"a.{n}" = {}\n"b.{n}" = {}->"a.{n}" = { hub = { name = "c.{n}", part = 0, parts = 2, of = 3 } }\n'
                '"b.{n}" = { hub = { name = "c.{n}", part = 1, of = 3 } }'
            ),
            "are both c.{n}",
        ),
        ("[weights]->[pipeline]\nratios = { c = 4 }\n\n[weights]", "c is not one of the weights"),
        ('"b.{n}" = {}->"b.{n}" = { hub = { name = "b.{n}", stacked = true } }', "experts"),
        ('"b.{n}" = {}->"b.{n}" = { hub = { name = "b.{n}", rows = "rope" } }', "rows 'rope' with heads None"),
        ('"b.{n}" = {}->"b.{n}" = { hub = { name = "b.{n}", rows = "z", heads = "kv" } }', "rows 'z' with heads 'kv'"),
        ('"b.{n}" = {}->"b.{n}" = { hub = { name = "b.{n}", interleaved = true } }', "is interleaved"),
        ('"b.{n}" = {}->"b.{n}" = { hub = { nam = "b.{n}" } }', "nam"),
        ('vocabulary = ["a.{n}"]->vocabulary = ["c"]', "c is not one of the weights"),
        ("[weights]->[weight]", "weight"),
    ],
)
def test_a_damaged_file_is_refused_with_the_place(change, why, tmp_path):
    text = 'format = 1\nfamily = "x"\nmodel_types = ["x"]\nkeyed = ["hub"]\nvocabulary = ["a.{n}"]\n\n[weights]\n'
    text += '"a.{n}" = {}\n"b.{n}" = {}\n'
    file = tmp_path / "x.toml"
    file.write_text(text)
    assert not list(faults(load(file).record))
    old, new = change.split("->")
    file.write_text(text.replace(old, new))
    with pytest.raises(Malformed, match=why) as raised:
        load(file)
    assert raised.value.path == str(file)


def test_a_family_that_nothing_names_takes_one_file_and_no_code(tmp_path, monkeypatch):
    (tmp_path / "zebra.toml").write_text(
        'format = 1\nfamily = "zebra"\nmodel_types = ["zebra", "zebra_2"]\nkeyed = []\n[weights]\n'
        '"s.{n}.u.{e}" = { live = { name = "s.{n}.both", stacked = true, part = 0, of = 2 }, hub = "z.{n}.x.{e}.u" }\n'
        '"s.{n}.g.{e}" = { live = { name = "s.{n}.both", stacked = true, part = 1, of = 2 }, hub = "z.{n}.x.{e}.g" }\n'
    )
    monkeypatch.setattr(architectures, "folder", lambda: tmp_path)
    architectures._of_type.cache_clear()
    try:
        rows = np.arange(2 * 6, dtype="f4").reshape(2, 6, 1)
        update = LoRA(A=from_numpy(np.ones((2, 1, 4), "f4")), B=from_numpy(rows))
        shapes = {f"z.0.x.{e}.{name}.weight": (3, 4) for e in range(2) for name in "ug"}
        adapter = Adapter({Target("s.0.both", "e out *in"): (update,)})
        bound = find_sites(adapter, shapes, partial=False, config={"model_type": "zebra_2"})
    finally:
        architectures._of_type.cache_clear()
    found = {site.weight: site.updates[0].B.numpy().ravel().tolist() for site in bound.sites}
    assert found == {
        "z.0.x.0.u.weight": [0, 1, 2], "z.0.x.0.g.weight": [3, 4, 5],
        "z.0.x.1.u.weight": [6, 7, 8], "z.0.x.1.g.weight": [9, 10, 11],
    }  # fmt: skip
    assert [str(rule) for rule in bound.rules] == ["architecture zebra: live -> hub"]


@pytest.mark.parametrize(
    ("model_type", "path", "turned"),
    [
        ("gpt_oss", "model.layers.1.mlp.experts.gate_up_proj", True),
        ("gpt_oss", "model.layers.1.self_attn.q_proj", False),
        ("llama4", "language_model.model.layers.1.feed_forward.experts.down_proj", True),
        ("llama4_text", "model.layers.1.feed_forward.experts.gate_up_proj", True),
        ("llama4_text", "model.layers.1.feed_forward.shared_expert.down_proj", False),
        ("mixtral", "model.layers.1.mlp.experts.gate_up_proj", None),
        ("gpt2", "transformer.h.0.attn.c_attn", True),
    ],
)
def test_what_is_stored_with_inputs_first_is_told_by_the_files(model_type, path, turned):
    assert stored_in_out(path, {"model_type": model_type}) is turned


def test_a_projection_whose_parts_have_no_fixed_ratio_is_not_divided():
    """lara_mini fuses queries to decays in one weight; `1 of 26` was the ratio of a tiny model alone."""
    update = LoRA(A=from_numpy(np.zeros((1, 32), "f4")), B=from_numpy(np.zeros((104, 1), "f4")))
    layer = "model.layers.0.linear_attn."
    rows = {"qkv": 64, "z": 32, "b": 4, "a": 4}
    shapes = {f"{layer}in_proj_{part}.weight": (count, 32) for part, count in rows.items()}
    adapter = Adapter({Target(f"{layer}in_proj"): (update,)})
    with pytest.raises(TargetNotFound, match="in_proj"):
        find_sites(adapter, shapes, partial=False, config={"model_type": "lara_mini"})


def test_every_weight_of_a_tools_naming_is_one_of_its_families():
    found = architectures.namings()
    tools = {"gptqmodel", "litgpt", "megatron", "moonshot", "tensorrt_llm", "torchtune"}
    assert {naming.naming for naming in found} == tools
    for naming in found:
        families = [architecture_of({"model_type": model_type}) for model_type in naming.model_types]
        assert all(naming.naming in family.namings for family in families)
        assert set(naming.weights) <= {key for family in families for key in family.record.weights}
        assert naming.sources


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ("format = 1->format = 2", "format 2"), ("naming = ->name = ", "naming"),
        ('"query", groups->"queries", groups', "qkv 'queries'"),
        ('qkv = "query", groups->groups', "has groups, but no qkv"),
        ('qkv = "query", groups = true->part = 0, of = 3', "divided in different ways"),
        ('"query", groups->"key", groups', "are both"),
    ],
)  # fmt: skip
def test_a_damaged_naming_is_refused(change, why, tmp_path):
    (tmp_path / "namings").mkdir()
    text = (folder() / "namings" / "megatron.toml").read_text()
    (tmp_path / "llama.toml").write_text((folder() / "llama.toml").read_text())
    old, new = change.split("->")
    assert old in text
    (tmp_path / "namings" / "megatron.toml").write_text(text.replace(old, new))
    with pytest.raises(Malformed, match=why):
        load(tmp_path / "llama.toml")


def test_every_name_in_transformers_mapping_has_a_file_or_a_reason():
    found = tomllib.loads((folder() / "model_types" / "conversion.toml").read_text())
    files, same, left = set(found["files"]), set(found["same"]), found["left_out"]
    assert len(files) + len(same) + len(left) == len(files | same | set(left)) > 250
    assert len(left) <= 40
    assert all(len(reason) > 20 for reason in left.values())
    types = [name for name in files if name == name.lower()]
    assert len(types) > 130
    # The encoder of T5Gemma 2 has the names of the whole.
    assert [name for name in types if architecture_of({"model_type": name}) is None] == ["t5gemma2_encoder"]


@pytest.mark.parametrize("family", ["whisper", "marian", "mbart", "pegasus", "blenderbot", "mvp", "plbart", "bart"])
def test_an_encoder_decoder_has_both_halves(family):
    """A tiny model of a class with the decoder alone gave half a file."""
    weights = architectures.named(family).record.weights
    for half in ("encoder", "decoder"):
        assert f"model.{half}.layers.{{n}}.self_attn.q_proj" in weights
        assert f"model.{half}.layers.{{n}}.fc1" in weights
