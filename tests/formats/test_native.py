import hashlib
import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import adapterkit as ak
from adapterkit.core.adapter import Adapter, BaseRef, Foreign, Step, Target
from adapterkit.errors import Malformed, StorageError, UnknownFormat, Unsupported, UsageError
from adapterkit.formats.adapterkit import FILE, KEY, canonical
from adapterkit.io.lazy import as_lazy, from_numpy
from adapterkit.methods import METHODS

SPEC = Path(__file__).parents[2] / "spec"
LoRA, IA3 = METHODS["lora"], METHODS["ia3"]


def header(path):
    data = Path(path).read_bytes()
    return json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])


def record(path):
    return json.loads(header(path)["__metadata__"][KEY])


def lora(A=None, B=None, **fields):
    return LoRA(
        A=from_numpy(np.ones((2, 4))) if A is None else A, B=from_numpy(np.ones((3, 2))) if B is None else B, **fields
    )


def plain(adapter):
    """Everything an adapter says, in values that can be compared."""
    return {
        "updates": [
            (target, update.method, update.version, update.attributes, {n: same(t) for n, t in update.tensors.items()})
            for target, update in adapter
        ],
        "base": adapter.base,
        "recipe": [(step.op, dict(step.args)) for step in adapter.recipe],
        "foreign": adapter.foreign
        and (adapter.foreign.format, adapter.foreign.data, {n: same(t) for n, t in adapter.foreign.tensors.items()}),
        "extensions": dict(adapter.extensions),
    }


def same(leaf):
    lazy = as_lazy(leaf)
    return lazy.shape, lazy.dtype.name, bytes(lazy.fetch())


@given(data=st.data())
def test_what_is_written_is_read_back_and_written_to_the_same_bytes(data, made, tmp_path_factory):
    folder = tmp_path_factory.mktemp("native")
    adapter = data.draw(made.adapters())
    before = plain(adapter)
    assert ak.write(adapter, folder / "a.safetensors") == []
    back = ak.read(folder / "a.safetensors", format="adapterkit")
    assert plain(back) == plain(adapter) == before
    assert back.digest() == adapter.digest()
    ak.write(back, folder / "b.safetensors")
    assert (folder / "b.safetensors").read_bytes() == (folder / "a.safetensors").read_bytes()


def test_the_file_is_an_ordinary_safetensors_file(tmp_path):
    ak.write(Adapter({Target("q"): (lora(scaling=0.5),)}), tmp_path / "x")
    tensors = load_file(tmp_path / "x")
    assert {name: array.shape for name, array in tensors.items()} == {"q.A": (2, 4), "q.B": (3, 2)}
    assert list(header(tmp_path / "x")["__metadata__"]) == ["adapterkit"]
    assert record(tmp_path / "x") == {
        "version": "1.0",
        "updates": [
            {
                "target": {"path": "q"},
                "method": "lora",
                "version": 1,
                "tensors": {"A": "q.A", "B": "q.B"},
                "attributes": {"scaling": 0.5},
            }
        ],
    }


def test_a_shared_tensor_is_stored_once_and_stays_shared(tmp_path):
    A = from_numpy(np.arange(8.0).reshape(2, 4))
    adapter = Adapter({Target("q"): (lora(A),), Target("k"): (lora(A), lora(A))}, foreign=Foreign("peft", {}, {"x": A}))
    ak.write(adapter, tmp_path / "x")
    assert sorted(load_file(tmp_path / "x")) == ["k.B", "k.B:2", "q.A", "q.B"]
    back = ak.read(tmp_path / "x", format="adapterkit")
    leaves = [update.A for _, update in back]
    assert leaves[0] is leaves[1] is leaves[2] is back.foreign.tensors["x"]
    calls = []
    back.map(lambda leaf: calls.append(leaf) or leaf)
    assert len(calls) == 4


def test_equal_tensors_that_are_not_shared_are_stored_apart(tmp_path):
    ak.write(Adapter({Target("q"): (lora(), lora())}), tmp_path / "x")
    assert sorted(load_file(tmp_path / "x")) == ["q.A", "q.A:2", "q.B", "q.B:2"]


def test_order_at_a_target_is_kept(tmp_path):
    updates = (IA3(l=from_numpy(np.ones(3))), lora(), IA3(l_in=from_numpy(np.ones(4))), lora())
    ak.write(Adapter({Target("z"): updates, Target("a"): (lora(),)}), tmp_path / "x")
    back = ak.read(tmp_path / "x", format="adapterkit")
    assert [(t.path, u.method) for t, u in back] == [
        ("z", "ia3"),
        ("z", "lora"),
        ("z", "ia3"),
        ("z", "lora"),
        ("a", "lora"),
    ]


def test_rows_and_stacks_and_layouts_are_kept(tmp_path):
    stack = lora(from_numpy(np.ones((5, 2, 4))), from_numpy(np.ones((5, 3, 2))))
    targets = [Target("qkv", rows=(0, 3)), Target("qkv", rows=(3, 6)), Target("c", "in out *k", (6, 9))]
    adapter = Adapter({**{target: (lora(),) for target in targets}, Target("e", "e in out *k"): (stack,)})
    ak.write(adapter, tmp_path / "x")
    assert list(ak.read(tmp_path / "x", format="adapterkit").updates) == [*targets, Target("e", "e in out *k")]


def rewritten(path, **changes):
    """The file with other top-level fields in its record, written by the safetensors library."""
    save_file(load_file(path), path, {KEY: json.dumps(record(path) | changes)})


def test_fields_of_a_newer_minor_are_kept_under_extensions(tmp_path):
    ak.write(Adapter({Target("q"): (lora(),)}, extensions={"old": [1]}), tmp_path / "x")
    rewritten(tmp_path / "x", version="1.7", colour={"hue": 3}, licence="Apache-2.0")
    back = ak.read(tmp_path / "x", format="adapterkit")
    assert back.extensions == {"old": [1], "colour": {"hue": 3}, "licence": "Apache-2.0"}
    ak.write(back, tmp_path / "y")
    assert record(tmp_path / "y")["version"] == "1.0"
    assert record(tmp_path / "y")["extensions"] == back.extensions
    assert plain(ak.read(tmp_path / "y", format="adapterkit")) == plain(back)


def test_an_older_or_equal_minor_has_no_unknown_fields(tmp_path):
    ak.write(Adapter({Target("q"): (lora(),)}), tmp_path / "x")
    rewritten(tmp_path / "x", colour="red")
    with pytest.raises(Malformed, match="colour"):
        ak.read(tmp_path / "x", format="adapterkit")


def test_a_newer_minor_may_not_require_what_is_unknown(tmp_path):
    ak.write(Adapter({Target("q"): (lora(),)}), tmp_path / "x")
    rewritten(tmp_path / "x", version="1.7", requires=["gates"])
    with pytest.raises(Unsupported, match="requires gates"):
        ak.read(tmp_path / "x", format="adapterkit")


def test_a_whole_number_in_a_floats_place_is_that_float(tmp_path):
    ak.write(Adapter({Target("q"): (lora(scaling=2),)}), tmp_path / "x")
    ak.write(Adapter({Target("q"): (lora(scaling=2.0),)}), tmp_path / "y")
    assert (tmp_path / "x").read_bytes() == (tmp_path / "y").read_bytes()
    updates = record(tmp_path / "x")["updates"]
    rewritten(tmp_path / "x", updates=[updates[0] | {"attributes": {"scaling": 2}}])
    adapters = [ak.read(tmp_path / name, format="adapterkit") for name in "xy"]
    assert adapters[0].digest() == adapters[1].digest()


def test_the_record_is_written_in_canonical_json(tmp_path):
    adapter = Adapter({Target("é.q"): (lora(scaling=1e-7),)}, recipe=(Step("ä", {"b": 1, "a": [1.5, None, True]}),))
    ak.write(adapter, tmp_path / "x")
    text = header(tmp_path / "x")["__metadata__"][KEY]
    assert text == canonical(json.loads(text))
    assert '"recipe":[{"args":{"a":[1.5,null,true],"b":1},"op":"ä"}]' in text
    assert " " not in text


def test_the_same_adapter_gives_the_same_bytes_whichever_way_it_came_to_be(tmp_path):
    """Defaults included: a layout that was read, typed or left out is the same layout."""
    typed = " ".join(["out", "*in"])
    for name, target in {"a": Target("q"), "b": Target("q", typed), "c": Target("q", rows=None)}.items():
        ak.write(Adapter({target: (lora(),)}), tmp_path / name)
    update = record(tmp_path / "a")["updates"][0]
    save_file(load_file(tmp_path / "a"), tmp_path / "d", {KEY: json.dumps(record(tmp_path / "a"))})
    explicit = update | {"target": {"path": "q", "layout": "out *in", "rows": None}}
    save_file(load_file(tmp_path / "a"), tmp_path / "e", {KEY: json.dumps({"version": "1.0", "updates": [explicit]})})
    for source, copy in zip("de", "fg", strict=True):
        ak.write(ak.read(tmp_path / source, format="adapterkit"), tmp_path / copy)
    assert len({(tmp_path / name).read_bytes() for name in "abcfg"}) == 1


@pytest.mark.parametrize(
    "text", ["0.5", "2.0", "1e-05", "0.0001", "1e+16", "1000000000000000.0", "-0.0", "1.5e-300", "7"]
)
def test_numbers_are_written_as_the_specification_says(text):
    assert canonical(json.loads(text)) == text


def test_loaded_adapters_are_written_like_lazy_ones(tmp_path):
    lazy = Adapter({Target("q"): (lora(),)})
    ak.write(lazy, tmp_path / "x")
    ak.write(lazy.load(), tmp_path / "y")
    ak.write(lazy.load(dtype=torch.bfloat16), tmp_path / "z")
    assert (tmp_path / "x").read_bytes() == (tmp_path / "y").read_bytes()
    assert {entry["dtype"] for name, entry in header(tmp_path / "z").items() if name != "__metadata__"} == {"BF16"}


def test_a_folder_holds_the_adapter_under_its_name(tmp_path):
    ak.write(Adapter({Target("q"): (lora(),)}), tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == [FILE]
    assert len(ak.read(tmp_path, format="adapterkit")) == 1


def test_native_files_are_detected(tmp_path):
    ak.write(Adapter({Target("q"): (lora(),)}), tmp_path)
    native = ak.FORMATS["adapterkit"]()
    assert native.sniff(tmp_path)
    assert native.sniff(tmp_path / FILE)
    assert ak.detect(tmp_path) == ak.detect(tmp_path / FILE) == "adapterkit"
    assert plain(ak.read(tmp_path)) == plain(ak.read(tmp_path, format="adapterkit"))


def test_other_files_are_not(tmp_path):
    save_file({"q.A": np.ones(2)}, tmp_path / "plain.safetensors", {"format": "pt"})
    (tmp_path / "text").write_text("adapterkit")
    for path in (tmp_path / "plain.safetensors", tmp_path / "text", tmp_path):
        assert not ak.FORMATS["adapterkit"]().sniff(path)
        with pytest.raises(UnknownFormat, match="not an adapter in any known format"):
            ak.detect(path)
    with pytest.raises(StorageError, match="no such file"):
        ak.read(tmp_path / "plain.safetensor")


def test_an_adapter_that_says_nothing_or_wrong_things_is_not_written(tmp_path):
    with pytest.raises(UsageError, match="has no updates"):
        ak.write(Adapter({}), tmp_path / "x")
    for adapter, error in [
        (Adapter({Target("q"): (lora(scaling=float("nan")),)}), Malformed),
        (Adapter({Target(""): (lora(),)}), Malformed),
        (Adapter({Target("q", "in *out"): (lora(),)}), Malformed),
        (Adapter({Target("q", rows=(4, 1)): (lora(),)}), Malformed),
        (Adapter({Target("q", rows=(-3, 0)): (lora(),)}), Malformed),
    ]:
        with pytest.raises(error):
            ak.write(adapter, tmp_path / "x")
    with pytest.raises(UsageError, match="unknown on_loss"):
        ak.write(Adapter({Target("q"): (lora(),)}), tmp_path / "x", on_loss="ignore")
    with pytest.raises(Unsupported, match="unknown format 'nativ'"):
        ak.write(Adapter({Target("q"): (lora(),)}), tmp_path / "x", format="nativ")
    assert not list(tmp_path.iterdir())


def test_the_digest_is_of_the_function_alone():
    adapter = Adapter({Target("q"): (lora(),), Target("k"): (lora(scaling=2.0),)})
    turned = Adapter(dict(reversed(adapter.updates.items())), BaseRef("x"), (Step("y"),), Foreign("peft"), {"z": 1})
    assert adapter.digest() == turned.digest()
    assert len(adapter.digest()) == 64
    others = [
        Adapter({Target("q"): (lora(),), Target("k"): (lora(scaling=2.5),)}),
        Adapter({Target("q"): (lora(),), Target("v"): (lora(scaling=2.0),)}),
        Adapter({Target("q", "in out *k"): (lora(),), Target("k"): (lora(scaling=2.0),)}),
        Adapter({Target("q"): (lora(), lora()), Target("k"): (lora(scaling=2.0),)}),
        Adapter({Target("q"): (lora(from_numpy(np.zeros((2, 4)))),), Target("k"): (lora(scaling=2.0),)}),
        Adapter({Target("q"): (lora(from_numpy(np.ones((2, 4), np.float32))),), Target("k"): (lora(scaling=2.0),)}),
    ]
    digests = {adapter.digest(), *(other.digest() for other in others)}
    assert len(digests) == 7


def test_the_digest_is_the_one_that_the_specification_describes():
    """Written out by hand from section 6, for one update."""
    A, B = np.arange(8.0).reshape(2, 4), np.arange(6, dtype=np.float32).reshape(3, 2)
    adapter = Adapter({Target("é", rows=(0, 3)): (lora(from_numpy(A), from_numpy(B), scaling=2),)})
    head = b'["\xc3\xa9","out *in",[0,3],"lora",1,{"scaling":2.0}]'
    parts = [head, b'["A","F64",[2,4]]', A.tobytes(), b'["B","F32",[3,2]]', B.tobytes()]
    expected = hashlib.sha256(b"".join(parts)).hexdigest()
    assert adapter.digest() == expected


def test_updates_that_disagree_at_one_target_are_refused():
    for second in (
        IA3(l=from_numpy(np.ones(4))),
        IA3(l_in=from_numpy(np.ones(3))),
        lora(A=from_numpy(np.ones((2, 5)))),
    ):
        with pytest.raises(ak.AdapterkitError, match="in the target's rows or an earlier update"):
            Adapter({Target("q"): (lora(), second)}).validate()
    dense = METHODS["dense"](D=from_numpy(np.ones((3, 5))))
    with pytest.raises(ak.AdapterkitError, match="in is 5 in this update, but 4"):
        Adapter({Target("q"): (lora(), dense)}).validate()
    with pytest.raises(ak.AdapterkitError, match="out is 3 in this update, but 2"):
        Adapter({Target("q", rows=(4, 6)): (lora(),)}).validate()


def test_a_shape_without_elements_that_no_array_has():
    """numpy and torch raise errors of their own at [0, 2**62, 2**62]; a file may hold it, and its values are finite."""
    adapter = ak.read(SPEC / "vectors" / "valid" / "no_elements.safetensors")
    adapter.check_values()
    (leaf,) = (leaf for _, update in adapter for name, leaf in update.tensors.items() if name == "A")
    for held in (leaf.numpy, leaf.torch):
        with pytest.raises(Unsupported, match="arrays cannot have the shape"):
            held()
