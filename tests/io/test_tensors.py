import copy
import errno
import json
import os
import pickle
import struct
from functools import partial

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from adapterkit.errors import Corrupt, Malformed, StorageError, UsageError
from adapterkit.io import safetensors as ours
from adapterkit.io.atomic import replacing, write_bytes
from adapterkit.io.checkpoint import contained, open_checkpoint, read_json
from adapterkit.io.computed import computed, joined
from adapterkit.io.lazy import (
    BY_TORCH,
    DTYPES,
    Lazy,
    as_lazy,
    as_torch,
    dtype_of,
    first_not_finite,
    from_numpy,
    number_of,
)
from adapterkit.io.strict_json import load_json


def bits(name, *shape):
    """A torch tensor of an element type with every byte drawn at random."""
    kind = DTYPES[name]
    count = int(np.prod(shape)) * kind.itemsize
    raw = np.random.default_rng(count).integers(0, 2 if name == "BOOL" else 256, count, dtype=np.uint8)
    if count == 0:
        return torch.empty(shape, dtype=getattr(torch, kind.torch))
    return torch.from_numpy(raw).view(getattr(torch, kind.torch)).reshape(shape)


def raw(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


SHAPES = [(), (3,), (0,), (2, 0, 3), (2, 3, 4)]


@pytest.mark.parametrize("name", DTYPES)
def test_the_library_reads_what_we_write(name, tmp_path):
    tensors = {f"t{len(shape)}{shape}": bits(name, *shape) for shape in SHAPES}
    ours.write(tmp_path / "x.safetensors", {key: as_lazy(t) for key, t in tensors.items()}, {})
    back = safetensors.torch.load_file(tmp_path / "x.safetensors")
    assert {k: (t.shape, t.dtype, raw(t)) for k, t in back.items()} == {
        k: (t.shape, t.dtype, raw(t)) for k, t in tensors.items()
    }


@pytest.mark.parametrize("name", DTYPES)
def test_we_read_what_the_library_writes(name, tmp_path):
    tensors = {f"t{len(shape)}{shape}": bits(name, *shape) for shape in SHAPES}
    safetensors.torch.save_file(tensors, tmp_path / "x.safetensors", {"format": "pt"})
    back = ours.read(tmp_path / "x.safetensors")
    assert ours.read_header(tmp_path / "x.safetensors").metadata == {"format": "pt"}
    assert back.keys() == tensors.keys()
    for key, tensor in tensors.items():
        lazy = back[key]
        assert (lazy.shape, lazy.dtype.torch) == (tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
        assert bytes(lazy.fetch()) == raw(tensor)
        assert (lazy.torch().dtype, raw(lazy.torch())) == (tensor.dtype, raw(tensor))
        assert lazy.nbytes == len(raw(tensor)) == (lazy.span.nbytes if lazy.span else -1)


TEXT = st.text(max_size=6)


@given(
    tensors=st.dictionaries(
        TEXT.filter(lambda name: name != "__metadata__"),
        st.tuples(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 3), max_size=3)),
        max_size=6,
    ),
    metadata=st.dictionaries(TEXT, TEXT, max_size=1),
)
def test_our_bytes_are_the_librarys(tensors, metadata, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bytes")
    made = {name: bits(dtype, *shape) for name, (dtype, shape) in tensors.items()}
    safetensors.torch.save_file(made, folder / "theirs", metadata or None)
    ours.write(folder / "ours", {name: as_lazy(tensor) for name, tensor in made.items()}, metadata)
    assert (folder / "ours").read_bytes() == (folder / "theirs").read_bytes()


def test_data_begins_on_a_multiple_of_eight(tmp_path):
    for length in range(1, 9):
        ours.write(tmp_path / "x", {"t" * length: from_numpy(np.ones(3))}, {})
        (entry,) = ours.read_header(tmp_path / "x").entries.values()
        assert entry.offset % 8 == 0


def test_the_order_of_the_mapping_does_not_matter(tmp_path):
    tensors = {"b": from_numpy(np.ones(2)), "a": from_numpy(np.ones(3, np.float32)), "é": from_numpy(np.ones(1))}
    ours.write(tmp_path / "x", tensors, {})
    ours.write(tmp_path / "y", dict(reversed(tensors.items())), {})
    assert (tmp_path / "x").read_bytes() == (tmp_path / "y").read_bytes()


class Stopped(BaseException):
    """As an interrupt from the keyboard is: no Exception."""


@pytest.mark.parametrize("fault", [ValueError("no"), OSError(errno.EIO, "no"), MemoryError(), Stopped()])
@pytest.mark.parametrize("before", [None, b"what was there"])
def test_a_failing_fetch_leaves_everything_as_it_was(fault, before, tmp_path):
    def fetch():
        raise fault

    path = tmp_path / "x.safetensors"
    if before is not None:
        path.write_bytes(before)
    tensors = {"a": from_numpy(np.ones(1000)), "b": Lazy((3,), DTYPES["F32"], fetch)}
    with pytest.raises(StorageError if isinstance(fault, OSError) else type(fault)):
        ours.write(path, tensors, {})
    assert [file.name for file in tmp_path.iterdir()] == ([] if before is None else [path.name])
    assert before is None or path.read_bytes() == before


def test_bytes_that_are_not_as_many_as_promised_are_refused(tmp_path):
    with pytest.raises(Malformed, match="gave 11 bytes, but its shape needs 12") as raised:
        ours.write(tmp_path / "x", {"t": Lazy((3,), DTYPES["F32"], lambda: bytes(11))}, {})
    assert raised.value.where == "t"
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_a_storage_error(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    for path in (tmp_path / "file" / "x", tmp_path / "absent" / "x"):
        with pytest.raises(StorageError) as raised:
            write_bytes(path, b"x")
        assert raised.value.path == str(path)
        assert raised.value.exit_code == 6
        assert raised.value.cure
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_a_folder_in_the_place_of_the_file_is_a_storage_error(tmp_path):
    (tmp_path / "x").mkdir()
    with pytest.raises(StorageError):
        write_bytes(tmp_path / "x", b"x")
    assert [file.name for file in tmp_path.iterdir()] == ["x"]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no umask")
@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_the_mode_follows_the_umask(mask, tmp_path):
    before = os.umask(mask)
    try:
        write_bytes(tmp_path / "x", b"x")
    finally:
        os.umask(before)
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o666 & ~mask


def test_nothing_is_at_the_path_before_the_end(tmp_path):
    with replacing(tmp_path / "x") as file:
        file.write(b"x")
        file.flush()
        assert not (tmp_path / "x").exists()
    assert (tmp_path / "x").read_bytes() == b"x"


def test_a_file_may_be_written_over_the_one_its_tensors_lie_in(tmp_path):
    path = tmp_path / "x"
    ours.write(path, {"t": from_numpy(np.arange(5.0))}, {})
    ours.write(path, {"u": ours.read(path)["t"]}, {"k": "v"})
    np.testing.assert_array_equal(ours.read(path)["u"].numpy(), np.arange(5.0))


def test_a_file_cut_short_after_its_header_was_read_is_corrupt(tmp_path):
    ours.write(tmp_path / "x", {"t": from_numpy(np.arange(50.0))}, {})
    lazy = ours.read(tmp_path / "x")["t"]
    os.truncate(tmp_path / "x", 100)
    with pytest.raises(Corrupt, match="28 of the 400 bytes") as raised:
        lazy.fetch()
    assert raised.value.exit_code == 4
    (tmp_path / "x").unlink()
    with pytest.raises(StorageError, match="no such file"):
        lazy.fetch()


@given(data=st.binary(max_size=80))
def test_random_bytes_are_refused_with_a_typed_error(data, tmp_path_factory):
    assume(data.strip() != b"{}")  # Behind its length that is a file without tensors.
    path = tmp_path_factory.mktemp("random") / "x"
    for content in (data, struct.pack("<Q", len(data)) + data):
        path.write_bytes(content)
        with pytest.raises(Malformed):
            ours.read_header(path)


@given(data=st.data())
def test_a_changed_byte_never_escapes_the_typed_errors(data, tmp_path_factory):
    path = tmp_path_factory.mktemp("changed") / "x"
    content = bytearray(safetensors.numpy.save({"a": np.ones((2, 3)), "b": np.ones(2, np.int32)}, {"k": "v"}))
    content[data.draw(st.integers(0, len(content) - 60))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try:
        tensors = ours.read(path)
    except Malformed:
        return
    assert sum(len(t.fetch()) for t in tensors.values()) == 56


def test_lazy_arrays_are_rearranged_without_being_loaded():
    fetched = []
    lazy = Lazy((2, 3), DTYPES["F64"], lambda: fetched.append(1) or np.arange(6.0).tobytes())
    turned = lazy.map(lambda array: array.T, (3, 2))
    assert turned.shape == (3, 2)
    assert lazy.reshape(3, -1).shape == (3, 2)
    assert lazy.reshape(6).span is lazy.span
    assert not fetched
    np.testing.assert_array_equal(turned.numpy(), np.arange(6.0).reshape(2, 3).T)
    np.testing.assert_array_equal(lazy.reshape(3, -1).numpy(), np.arange(6.0).reshape(3, 2))
    with pytest.raises(ValueError, match="cannot reshape"):
        lazy.reshape(4)
    with pytest.raises(ValueError, match="cannot reshape"):
        lazy.reshape(4, -1)


@pytest.mark.parametrize("dtype", sorted(BY_TORCH))
def test_torch_tensors_and_lazy_ones_say_the_same(dtype):
    name = BY_TORCH[dtype].name
    tensor = bits(name, 4, 3).T
    lazy = as_lazy(tensor)
    assert (lazy.shape, lazy.dtype, dtype_of(tensor)) == ((3, 4), DTYPES[name], DTYPES[name])
    assert as_lazy(lazy) is lazy
    assert raw(as_torch(lazy)) == raw(tensor) == bytes(lazy.fetch())


def test_a_dtype_is_asked_of_floating_leaves_only():
    assert as_torch(from_numpy(np.ones(2, np.float32)), dtype=torch.float64).dtype == torch.float64
    assert as_torch(from_numpy(np.ones(2, np.int32)), dtype=torch.float64).dtype == torch.int32
    assert as_torch(torch.ones(2), dtype=torch.bfloat16).dtype == torch.bfloat16


def test_bfloat16_is_held_as_its_bits():
    tensor = torch.tensor([1.0, -2.5, float("inf")], dtype=torch.bfloat16)
    held = as_lazy(tensor).numpy()
    assert held.dtype == np.uint16
    assert torch.equal(from_numpy(held, "BF16").torch(), tensor)


@pytest.mark.parametrize("name", [name for name, kind in DTYPES.items() if kind.floating and kind.itemsize < 4])
def test_every_bit_pattern_is_finite_or_not_as_torch_says(name):
    kind = DTYPES[name]
    patterns = np.arange(256**kind.itemsize, dtype=f"<u{kind.itemsize}")
    tensor = Lazy(patterns.shape, kind, patterns.tobytes).torch()
    finite = torch.isfinite(tensor.double()).numpy()
    found = [first_not_finite(Lazy((1, 1), kind, patterns[i : i + 1].tobytes)) for i in range(0, len(patterns), 7)]
    assert found == [None if ok else (0, 0) for ok in finite[::7]]
    first = first_not_finite(Lazy(patterns.shape, kind, patterns.tobytes))
    assert first == (int(np.flatnonzero(~finite)[0]),)
    assert first_not_finite(Lazy((int(finite.sum()),), kind, patterns[finite].tobytes)) is None


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.complex64])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_the_first_bad_position_is_named(dtype, value):
    array = np.zeros((3, 4), dtype)
    array[1, 2:] = value
    array[2] = value
    assert first_not_finite(from_numpy(array)) == (1, 2)
    assert first_not_finite(torch.from_numpy(array)) == (1, 2)
    assert first_not_finite(from_numpy(np.zeros((0, 4), dtype))) is None
    assert first_not_finite(from_numpy(np.array([-1, 2**31 - 1], np.int32))) is None


@pytest.mark.parametrize(
    "text",
    ['{"a":1,"a":1}', '[{"a":{"b":1,"b":2}}]', "NaN", "[Infinity]", "-Infinity", "1e999", '"\\ud800"', "{", "", "1 2"],
)
def test_strict_json_refuses_what_readers_could_differ_on(text):
    with pytest.raises(ValueError, match=r"\S"):
        load_json(text)


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=4), lambda x: st.lists(x, max_size=3)))
def test_strict_json_reads_what_json_does(value):
    assert load_json(json.dumps(value)) == value
    assert load_json(json.dumps({"a": value}, ensure_ascii=False)) == {"a": value}
    assert load_json('"\\ud83d\\ude00"') == "😀"


def sharded(folder):
    parts = {f"model-0000{i}-of-00003.safetensors": {f"l.{i}.w": np.full((2, i), i, np.float32)} for i in (1, 2, 3)}
    for name, tensors in parts.items():
        safetensors.numpy.save_file(tensors, folder / name)
    weight_map = {tensor: name for name, tensors in parts.items() for tensor in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return {name: array for tensors in parts.values() for name, array in tensors.items()}, weight_map


def test_a_sharded_folder_is_one_mapping(tmp_path):
    expected, weight_map = sharded(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    checkpoint = open_checkpoint(tmp_path)
    assert {name: file.name for name, file in checkpoint.home.items()} == weight_map
    assert checkpoint.config == {"model_type": "llama"}
    assert checkpoint.index["weight_map"] == weight_map
    assert checkpoint.folder == checkpoint.root == tmp_path
    assert checkpoint.tensors.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(checkpoint.tensors[name].numpy(), array)


@pytest.mark.parametrize("name", ["model.safetensors", "other.safetensors", "pytorch_model.bin", "weights.pt"])
def test_a_base_may_be_one_file_or_its_folder(name, tmp_path):
    tensors = {"w": torch.arange(6.0).reshape(2, 3)}
    save = safetensors.torch.save_file if name.endswith("safetensors") else torch.save
    save(tensors, tmp_path / name)
    for path in (tmp_path / name, tmp_path)[: 1 if name == "weights.pt" else 2]:
        checkpoint = open_checkpoint(path)
        assert torch.equal(checkpoint.tensors["w"].torch(), tensors["w"])
        assert (checkpoint.index, checkpoint.config, checkpoint.folder) == (None, None, tmp_path)


def test_no_weights_and_no_path_are_told_apart(tmp_path):
    with pytest.raises(UsageError, match="this folder holds no weights"):
        open_checkpoint(tmp_path)
    with pytest.raises(StorageError, match="no such file or folder"):
        open_checkpoint(tmp_path / "absent")


@pytest.mark.parametrize(
    "name", ["", "..", "../x", "a/../../x", "/x", "\\x", "a\\x", "C:x", "http://x/y", "x\0", "a/.."]
)
def test_names_out_of_files_stay_inside_their_folder(name, tmp_path):
    with pytest.raises(Malformed, match="not a plain relative path inside the folder"):
        contained(tmp_path, name)


def test_a_plain_name_may_lie_deeper(tmp_path):
    assert contained(tmp_path, "a/x.safetensors") == tmp_path / "a" / "x.safetensors"


@pytest.mark.parametrize("content", [b"[]", b"{", b"\xff", b"[" * 5000 + b"]" * 5000, b"1" * 5000])
def test_json_files_hold_an_object(content, tmp_path):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(Malformed) as raised:
        read_json(tmp_path / "x.json")
    assert raised.value.path == str(tmp_path / "x.json")
    assert raised.value.cure


@pytest.mark.parametrize("kernel", [True, False])
def test_tensors_of_files_are_copied_with_the_bytes_of_the_library(kernel, tmp_path, monkeypatch):
    if not kernel:
        monkeypatch.delattr(os, "copy_file_range", raising=False)
    rng = np.random.default_rng(3)
    names = [f"{letter}{n}" for letter in "ab" for n in range(9)]
    held = {name: rng.normal(size=(n % 4, 700)).astype("f4") for n, name in enumerate(names)}
    held |= {"c0": rng.normal(size=400_000), "d0": np.arange(3, dtype="i8")}
    for letter in "ab":
        own = {name: value for name, value in held.items() if name.startswith(letter)}
        safetensors.numpy.save_file(own, tmp_path / letter)
    read = {**ours.read(tmp_path / "a"), **ours.read(tmp_path / "b")}
    turned = {name: leaf.map(lambda a: a, leaf.shape) if name in ("a3", "b8") else leaf for name, leaf in read.items()}
    rest = {name: from_numpy(held[name]) for name in ("c0", "d0")}
    ours.write(tmp_path / "ours", {**rest, **turned}, {})
    safetensors.numpy.save_file(held, tmp_path / "theirs")
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


@pytest.mark.parametrize("gone", [True, False])
def test_a_source_that_ends_early_is_named_and_nothing_is_written(gone, tmp_path):
    safetensors.numpy.save_file({"t": np.arange(50.0), "u": np.arange(50.0)}, tmp_path / "x")
    tensors = ours.read(tmp_path / "x")
    if gone:
        (tmp_path / "x").unlink()
    else:
        os.truncate(tmp_path / "x", 300)
    with pytest.raises(StorageError if gone else Corrupt) as raised:
        ours.write(tmp_path / "y", tensors, {})
    assert str(raised.value.path) == str(tmp_path / "x")
    assert [path.name for path in tmp_path.iterdir()] == ([] if gone else ["x"])


@pytest.mark.parametrize("kind", ["from_numpy", "torch", "computed", "joined", "mapped", "scalar"])
def test_a_tensor_that_is_computed_when_it_is_read_can_be_pickled_and_copied(kind):
    values = np.arange(6, dtype="f4").reshape(2, 3)
    leaf = from_numpy(values)
    made = {
        "from_numpy": lambda: leaf, "torch": lambda: as_lazy(torch.from_numpy(values)),
        "computed": lambda: computed((2, 3), DTYPES["F32"], lambda: values.astype("f8")),
        "joined": lambda: joined([leaf.reshape(1, 6), leaf.reshape(1, 6)], 0), "scalar": lambda: number_of("0x1p+0"),
        "mapped": lambda: leaf.map(np.transpose, (3, 2)),
    }[kind]()  # fmt: skip
    for again in (pickle.loads(pickle.dumps(made)), copy.deepcopy(made)):
        assert (again.shape, again.dtype.name) == (made.shape, made.dtype.name)
        assert np.array_equal(again.numpy(), made.numpy())


def test_a_lazy_tensor_whose_source_is_a_partial_can_be_pickled():
    def drawn(count):
        return np.arange(count, dtype="f4").tobytes()

    leaf = pickle.loads(pickle.dumps(Lazy((3,), DTYPES["F32"], partial(drawn, 3))))
    assert torch.equal(leaf.torch(), torch.arange(3.0))


def test_a_tensor_in_a_file_is_pickled_as_its_place(tmp_path):
    safetensors.numpy.save_file({"w": np.ones((100, 100), "f4")}, tmp_path / "a.safetensors")
    leaf = open_checkpoint(tmp_path / "a.safetensors").tensors["w"]
    assert len(pickle.dumps(leaf)) < 1000
    assert pickle.loads(pickle.dumps(leaf)).span == leaf.span
