"""torch's own files read without torch: bits against `torch.load`, and files that mean harm."""

from __future__ import annotations

import builtins
import contextlib
import copyreg
import functools
import io
import operator
import os
import pickle
import random
import struct
import subprocess
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import adapterkit
from adapterkit.errors import AdapterkitError, Corrupt, Malformed, StorageError, Unsupported
from adapterkit.io import torch_file as torch_containers
from adapterkit.io import torch_pickle
from adapterkit.io.lazy import DTYPES
from adapterkit.io.torch_file import is_torch_file, read_torch_file

ROOT = Path(adapterkit.__file__).parents[1]
ZIP, LEGACY = True, False


def save(value, path, zipped=ZIP, protocol=2):
    torch.save(value, path, _use_new_zipfile_serialization=zipped, pickle_protocol=protocol)
    return path


def values(dtype, *shape):
    count = torch.Size(shape).numel()
    generator = torch.Generator().manual_seed(count)
    noise = torch.randint(0, 256, (count * 16,), dtype=torch.uint8, generator=generator)
    if dtype is torch.bool:
        return (noise[:count] > 99).reshape(shape)
    return noise.view(dtype)[:count].reshape(shape)


def bits(tensor):
    flat = tensor.detach().clone(memory_format=torch.contiguous_format).as_strided((tensor.numel(),), (1,))
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def unreadable(dtype, zipped):
    """Whether torch writes storages of this kind and cannot read them back, so that what was saved is the truth."""
    return zipped == LEGACY and str(dtype).startswith(("torch.float8", "torch.uint"))


def check_against_torch(path, tensors=None):
    expected = tensors or torch.load(path, weights_only=True)
    found = read_torch_file(path)
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        lazy = found[name]
        assert (lazy.shape, f"torch.{lazy.dtype.torch}") == (tuple(tensor.shape), str(tensor.dtype)), name
        assert bytes(lazy.fetch()) == bits(tensor), name
        if tensor.is_contiguous():
            assert path.read_bytes()[lazy.span.offset :][: lazy.span.nbytes] == bits(tensor), name
        else:
            assert lazy.span is None, name
    return found


containers = pytest.mark.parametrize("zipped", [ZIP, LEGACY], ids=["zip", "legacy"])


@containers
@pytest.mark.parametrize("name", [d.torch for d in DTYPES.values()])
def test_element_types(tmp_path, name, zipped):
    dtype = getattr(torch, name)
    tensors = {"a": values(dtype, 3, 5), "scalar": values(dtype), "b": values(dtype, 4)}
    path = save(tensors, tmp_path / "x.bin", zipped)
    assert is_torch_file(path)
    check_against_torch(path, tensors if unreadable(dtype, zipped) else None)


@containers
@pytest.mark.parametrize("name", ["float32", "bfloat16", "float8_e4m3fn", "uint16", "complex64"])
def test_views(tmp_path, name, zipped):
    x = values(getattr(torch, name), 4, 6)
    y = values(getattr(torch, name), 2, 3, 4, 5)
    tensors = {
        "whole": x,
        "transposed": x.t(),
        "rows": x[1:3],
        "columns": x[:, 2:5],
        "steps": x[::2, 1::3],
        "one": x[2, 3],
        "expanded": x[:1].expand(7, 6),
        "expanded inside": x.unsqueeze(1).expand(4, 3, 6),
        "overlapping": x.reshape(-1).unfold(0, 5, 2),
        "size one": x[:, :1],
        "odd strides": torch.as_strided(x, (1, 6, 1), (99, 1, 77)),
        "empty": x[:0],
        "empty of much": x.new_empty(0, 1 << 40),
        "empty tail": x.reshape(-1)[24:],
        "permuted": y.permute(3, 0, 2, 1),
        "channels last": y.to(memory_format=torch.channels_last),
        "again": x,
    }
    path = save(tensors, tmp_path / "x.bin", zipped)
    found = check_against_torch(path, tensors if unreadable(x.dtype, zipped) else None)
    assert found["whole"].span == found["again"].span


@settings(max_examples=60, deadline=None)
@given(
    zipped=st.booleans(),
    dims=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 9)), max_size=5),
    offset=st.integers(0, 9),
)
def test_any_strided_view(tmp_path_factory, zipped, dims, offset):
    base = values(torch.int16, 160)
    view = torch.as_strided(base, [n for n, _ in dims], [s for _, s in dims], offset)
    path = save({"base": base, "view": view}, tmp_path_factory.getbasetemp() / "strided.bin", zipped)
    check_against_torch(path)


@containers
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_pickle_protocols(tmp_path, protocol, zipped):
    tensors = {"a": torch.arange(6.0), "b": torch.arange(300).reshape(3, 100).t(), "c": torch.ones(2).half()}
    path = save(tensors, tmp_path / "x.pt", zipped, protocol)
    assert is_torch_file(path)
    check_against_torch(path, tensors)


@containers
@pytest.mark.parametrize("wrapper", [None, "state_dict", "model"])
def test_state_dict_of_a_module(tmp_path, wrapper, zipped):
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Embedding(5, 6))
    state = module.state_dict()
    assert state._metadata
    path = save({wrapper: state} if wrapper else state, tmp_path / "x.pth", zipped)
    check_against_torch(path, state)


@containers
def test_parameters_and_many_names(tmp_path, zipped):
    tied = torch.nn.Parameter(torch.randn(3, 2))
    many = OrderedDict((f"layer.{i}.w", torch.full((i % 5,), float(i))) for i in range(400))
    path = save(
        OrderedDict(a=tied, b=torch.nn.Parameter(torch.ones(2), requires_grad=False), c=tied, d=tied.data, **many),
        tmp_path / "x",
        zipped,
    )
    found = check_against_torch(path)
    assert found["a"].span == found["c"].span == found["d"].span


@pytest.mark.parametrize("root", ["archive", "a b", "größe", ".x", "data"])
def test_any_root_name_and_no_byteorder(tmp_path, root):
    buffer = io.BytesIO()
    tensors = {"a": torch.arange(5.0), "b": torch.arange(6).reshape(2, 3).t()}
    torch.save(tensors, buffer)
    with zipfile.ZipFile(buffer) as source, zipfile.ZipFile(tmp_path / "x.bin", "w") as target:
        for name in source.namelist():
            if not name.endswith("byteorder"):
                with target.open(root + name[name.index("/") :], "w", force_zip64=True) as entry:
                    entry.write(source.read(name))
    check_against_torch(tmp_path / "x.bin", tensors)


def test_file_like_objects_need_not_be_named_by_a_string(tmp_path):
    path = save({"a": torch.ones(2)}, tmp_path / "x.bin")
    assert read_torch_file(str(path))["a"].span == read_torch_file(path)["a"].span


def test_what_is_not_a_torch_file(tmp_path):
    (tmp_path / "text").write_text("weights")
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "pickle").write_bytes(pickle.dumps({"a": 1}))
    with zipfile.ZipFile(tmp_path / "zip", "w") as archive:
        archive.writestr("arr_0.npy", b"")
    for name in ("text", "empty", "pickle", "zip"):
        assert not is_torch_file(tmp_path / name)
        with pytest.raises(Malformed) as caught:
            read_torch_file(tmp_path / name)
        assert caught.value.path == str(tmp_path / name)
    assert not is_torch_file(tmp_path)
    assert not is_torch_file(tmp_path / "nowhere")
    with pytest.raises(StorageError):
        read_torch_file(tmp_path / "nowhere")
    with pytest.raises(StorageError, match="Pass a file"):
        read_torch_file(tmp_path)


@containers
def test_a_file_that_changes_after_it_was_read(tmp_path, zipped):
    x = torch.randn(50, 40)
    path = save({"a": x, "b": x.t()}, tmp_path / "x.bin", zipped)
    found = read_torch_file(path)
    os.truncate(path, found["a"].span.offset + 3999)
    for name in "ab":
        with pytest.raises(Corrupt, match="3999 of the 8000 bytes"):
            found[name].fetch()
    path.unlink()
    for name in "ab":
        with pytest.raises(StorageError) as caught:
            found[name].fetch()
        assert caught.value.path == str(path)


ONE = torch.ones(2)


@containers
@pytest.mark.parametrize(
    ("value", "place"),
    [
        (ONE, "top level"),
        ([ONE], "top level"),
        (3, "top level"),
        ({"a": ONE, "epoch": 3}, "entry 'epoch'"),
        ({"a": ONE, "note": None}, "entry 'note'"),
        ({"a": ONE, "rows": [ONE]}, "entry 'rows'"),
        ({"a": ONE, 7: ONE}, "entry '7'"),
        ({"a\nb": ONE}, "entry 'a\\nb'"),
        ({"state_dict": {"a": ONE}, "epoch": 3}, "entry 'epoch'"),
        ({"state_dict": {"a": ONE}, "model": {"a": ONE}}, "entry 'model'"),
        ({"state_dict": {"a": ONE, "lr": 0.5}}, "entry 'lr'"),
        ({"model": {"state_dict": {"a": ONE}}}, "entry 'state_dict'"),
        ({"weights": {"a": ONE}}, "entry 'weights'"),
        ({"storage": ONE.untyped_storage()}, "entry 'storage'"),
        ({1.5: ONE}, ""),
        ({("a", "b"): ONE}, ""),
    ],
)
def test_anything_but_a_state_dict_is_named(tmp_path, value, place, zipped):
    path = save(value, tmp_path / "x.bin", zipped)
    with pytest.raises(Malformed) as caught:
        read_torch_file(path)
    assert place in caught.value.where
    assert caught.value.path == str(path)
    assert caught.value.cure


@containers
@pytest.mark.parametrize(
    "value",
    [
        torch.zeros(2, dtype=torch.complex64).conj(),
        torch.zeros(2, dtype=torch.complex64).conj().imag,
        torch.zeros(2, dtype=torch.complex128),
        torch.eye(3).to_sparse(),
        torch.empty(2, device="meta"),
        torch.float32,
        torch.device("cpu"),
    ],
    ids=["conjugate", "negative", "complex128", "sparse", "meta", "dtype", "device"],
)
def test_tensors_that_are_not_plain_are_refused(tmp_path, value, zipped):
    with pytest.raises((Malformed, Unsupported)):
        read_torch_file(save({"a": value}, tmp_path / "x.bin", zipped))


# Hostile files, as bytes. Those that get a command to run leave a file `mark` in the current folder.


class Call:
    """Pickles as a call of `function`, whatever that does."""

    def __init__(self, function, *args):
        self.call = (function, args)

    def __reduce__(self):
        return self.call


class Id:
    """Pickles as a persistent id."""

    def __init__(self, value):
        self.value = value


class Pickler(pickle.Pickler):
    def persistent_id(self, value):
        return value.value if isinstance(value, Id) else None


def pickled(value, protocol=2):
    buffer = io.BytesIO()
    Pickler(buffer, protocol).dump(value)
    return buffer.getvalue()


STORAGE = Id(("storage", torch.FloatStorage, "0", "cpu", 6))


def rebuild(shape=(2, 3), stride=(3, 1), offset=0, storage=STORAGE, hooks=None, *rest):
    return Call(torch._utils._rebuild_tensor_v2, storage, offset, shape, stride, False, hooks or OrderedDict(), *rest)


SHELL = "touch mark"
COMMAND = SHELL.encode()
FLOATS = struct.pack("<q", 6) + bytes(24)


def archive(data, storage=bytes(24), byteorder=b"little", compress=(), extra=()):
    entries = {"data.pkl": data, "byteorder": byteorder, "data/0": storage}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as target:
        for name, content in [(f"x/{name}", entries[name]) for name in entries] + list(extra):
            target.writestr(name, content, zipfile.ZIP_DEFLATED if name[2:] in compress else zipfile.ZIP_STORED)
    return buffer.getvalue()


def entry(value, **given):
    return archive(pickled({"a": value}), **given)


def opcodes(code):
    return archive(b"\x80\x02" + code + b".")


def call(function, *args):
    return entry(Call(function, *args))


def tensor(**given):
    return entry(rebuild(**given))


def persistent(*pid):
    return tensor(storage=Id(pid))


def stack_global(module, name):
    return opcodes(text(module.encode()) + text(name.encode()) + b"\x93)R")


def text(value):
    return b"X" + struct.pack("<I", len(value)) + value


def legacy(value=None, keys=("0",), storages=FLOATS, **system):
    header = [torch.serialization.MAGIC_NUMBER, torch.serialization.PROTOCOL_VERSION, {"little_endian": True, **system}]
    return b"".join(map(pickled, [*header, {"a": value or rebuild()}, list(keys)])) + storages


def patched(old, new, nth=1):
    """A good archive where `new` is written over the `nth` place from the end that holds `old`."""
    data = entry(rebuild())
    at = len(data)
    for _ in range(nth):
        at = data.rindex(old, 0, at)
    return data[:at] + new + data[at + len(new) :]


def directory_claims(**fields):
    """A good archive whose end record says something else."""
    data = entry(rebuild())
    end = list(struct.unpack("<4s4H2LH", data[-22:]))
    end[3:7] = [fields.get(name, end[i]) for i, name in enumerate(("here", "total", "size", "offset"), 3)]
    return data[:-22] + struct.pack("<4s4H2LH", *end)


CENTRAL = b"PK\1\2"
PAIRS = b"h\x00h\x00\x86q\x00" * 60
DEEP = b"K\x01" + b"\x85" * 200_000
COLLIDING = b"".join(b"\x8a\x0a" + (i * sys.hash_info.modulus).to_bytes(10, "little") + b"N" for i in range(1, 1000))
HOSTILE = {
    # Code by way of REDUCE.
    "os.system": call(os.system, SHELL),
    "eval": call(builtins.eval, "open('mark', 'w')"),
    "exec": call(builtins.exec, "open('mark', 'w')"),
    "open": call(builtins.open, "mark", "w"),
    "subprocess.Popen": call(subprocess.Popen, ["touch", "mark"]),
    "torch.load": call(torch.load, "mark"),
    "getattr": opcodes(b"c__builtin__\ngetattr\ncos\nsystem\n" + text(COMMAND) + b"\x85R"),
    "import": opcodes(b"cbuiltins\n__import__\n" + text(b"os") + b"\x85R"),
    "attrgetter": call(operator.attrgetter("system"), 1),
    "partial": call(functools.partial, os.system, SHELL),
    "in the value of a wrapper": entry({"b": [({}, Call(os.system, SHELL))]}),
    "in _metadata": opcodes(
        b"ccollections\nOrderedDict\n)R}" + text(b"_metadata") + b"cos\nsystem\n" + text(COMMAND) + b"\x85Rsb"
    ),
    "as a storage type": persistent("storage", Call(os.system, SHELL), "0", "cpu", 6),
    "legacy os.system": legacy(Call(os.system, SHELL)),
    "legacy, in the header": legacy(type_sizes=Call(os.system, SHELL)),
    "legacy, in the keys": legacy(keys=["0", Call(os.system, SHELL)]),
    # Globals that look like allowed ones.
    "python 2 name": opcodes(b"c__builtin__\ngetattr\n)R"),
    "dotted global": opcodes(b"ctorch._utils\n_rebuild_tensor_v2.__globals__\n)R"),
    "dotted stack global": stack_global("torch._utils", "_rebuild_tensor_v2.__globals__"),
    "method of an allowed class": stack_global("collections", "OrderedDict.fromkeys"),
    "unicode stack global": stack_global("\u043es", "system"),
    "stack global with a null": stack_global("torch", "FloatStorage\0"),
    "stack global of no text": opcodes(b"K\x01K\x02\x93"),
    "escapes in a global": opcodes(b"c\\x6fs\nsys\\qtem\n" + text(COMMAND) + b"\x85R"),
    "global without an end": archive(b"\x80\x02cos\nsystem"),
    # Other opcodes that make or call things.
    "inst": opcodes(b"(" + text(COMMAND) + b"ios\nsystem\n"),
    "obj": opcodes(b"(cos\nsystem\n" + text(COMMAND) + b"o"),
    "obj of a known global": opcodes(b"(ccollections\nOrderedDict\n" + text(COMMAND) + b"o"),
    "newobj": opcodes(b"ccollections\nOrderedDict\n)\x81"),
    "newobj_ex": opcodes(b"ccollections\nOrderedDict\n)}\x92"),
    "ext1": opcodes(b"\x82\xf0" + text(COMMAND) + b"\x85R"),
    "ext2": opcodes(b"\x83\xf0\x00" + text(COMMAND) + b"\x85R"),
    "ext4": opcodes(b"\x84\xf0\x00\x00\x00" + text(COMMAND) + b"\x85R"),
    "text persistent id": opcodes(b"Pstorage\n"),
    "string with bad escapes": opcodes(b"S'\\q'\n"),
    "out-of-band buffer": opcodes(b"\x97"),
    "bytearray of 2**60": opcodes(b"\x96" + struct.pack("<Q", 1 << 60)),
    "text of 2**32": opcodes(b"X\xff\xff\xff\xff"),
    "unknown opcode": opcodes(b"\xff"),
    # Stand-ins handled oddly.
    "call of text": opcodes(text(COMMAND) + b")R"),
    "call of a storage type": opcodes(b"ctorch\nFloatStorage\n)R"),
    "call without a tuple": opcodes(b"ccollections\nOrderedDict\n" + text(COMMAND) + b"R"),
    "OrderedDict of pairs": call(OrderedDict, [("b", 1)]),
    "too few arguments": call(torch._utils._rebuild_tensor_v2, 1),
    "tensor of text": tensor(storage="0"),
    "parameter of text": call(torch._utils._rebuild_parameter, "0", True, OrderedDict()),
    "hooks": tensor(hooks={"hook": 1}),
    "attributes on a dict": opcodes(b"ccollections\nOrderedDict\n)R}" + text(b"__class__") + b"K\x01sb"),
    "attributes on a global": opcodes(b"ccollections\nOrderedDict\n}" + text(b"_metadata") + b"Nsb"),
    "attributes on a tensor": archive(pickled({"a": rebuild()})[:-2] + b"}bs."),
    "append to a dict": opcodes(b"}K\x01a"),
    "items into a list": opcodes(b"](" + text(COMMAND) + b"K\x01u"),
    "items without a value": opcodes(b"}(" + text(COMMAND) + b"u"),
    "stack underflow": opcodes(b"R"),
    "mark underflow": opcodes(b"t"),
    "two values left": opcodes(b"}}"),
    "memo never written": opcodes(b"h\x07"),
    "bytes after the pickle": opcodes(b"}.cos\nsystem\n" + text(COMMAND) + b"\x85R"),
    # Persistent ids.
    "id of text": archive(b"\x80\x02" + text(b"0") + b"Q."),
    "id of nothing": persistent(),
    "id too short": persistent("storage", torch.FloatStorage, "0"),
    "id too long": persistent("storage", torch.FloatStorage, "0", "cpu", 6, None, None),
    "id of a module": persistent("module", torch.FloatStorage, "0", "cpu", 6),
    "id with a dtype for a type": persistent("storage", OrderedDict, "0", "cpu", 6),
    "id with a negative count": persistent("storage", torch.FloatStorage, "0", "cpu", -6),
    "id with a count of text": persistent("storage", torch.FloatStorage, "0", "cpu", "6"),
    "id with a huge count": persistent("storage", torch.FloatStorage, "0", "cpu", 1 << 200),
    "id with a number for a key": persistent("storage", torch.FloatStorage, 0, "cpu", 6),
    "id with a view": persistent("storage", torch.FloatStorage, "0", "cpu", 6, ("1", 0, 6)),
    "id of no entry": persistent("storage", torch.FloatStorage, "../../0", "cpu", 6),
    "one storage, two sizes": archive(
        pickled({"a": rebuild(), "b": rebuild(storage=Id(("storage", torch.LongStorage, "0", "cpu", 6)))})
    ),
    # Views.
    "view past the end": tensor(shape=(2, 4), stride=(4, 1)),
    "offset past the end": tensor(offset=1),
    "stride past the end": tensor(shape=(2,), stride=(6,)),
    "negative offset": tensor(offset=-1),
    "negative size": tensor(shape=(-2, -3)),
    "negative stride": tensor(shape=(2,), stride=(-1,), offset=3),
    "fewer strides than sizes": tensor(stride=(1,)),
    "a size of text": tensor(shape=("2", 3)),
    "a list of sizes": tensor(shape=[2, 3]),
    "a size past 64 bits": tensor(shape=(1 << 64,), stride=(0,)),
    "sizes past 64 bits together": tensor(shape=(0, 1 << 40, 1 << 40), stride=(0, 0, 0)),
    "a thousand dimensions": tensor(shape=(1,) * 1000, stride=(1,) * 1000),
    "expanded to terabytes": tensor(shape=(1 << 40, 6), stride=(0, 1)),
    "many expanded to gigabytes": archive(
        pickled({f"{i}": rebuild(shape=(1 << 20, 6), stride=(0, 1)) for i in range(20)})
    ),
    # Containers.
    "storage shorter than claimed": entry(rebuild(), storage=bytes(20)),
    "storage longer than claimed": entry(rebuild(), storage=bytes(28)),
    "big-endian": entry(rebuild(), byteorder=b"big"),
    "byte order of its own": entry(rebuild(), byteorder=b"little" * 9),
    "compressed storage": entry(rebuild(), compress=("data/0",)),
    "compressed pickle": entry(rebuild(), compress=("data.pkl",)),
    "entry above the archive": archive(pickled({}), extra=[("x/../../y", b"")]),
    "entry at the root": archive(pickled({}), extra=[("/y", b"")]),
    "entry with a backslash": archive(pickled({}), extra=[("x\\..\\y", b"")]),
    "two pickles": archive(pickled({}), extra=[("y/data.pkl", pickled({}))]),
    "two entries of one name": entry(rebuild(), extra=[("x/data/1", b"")]).replace(b"x/data/1", b"x/data/0"),
    "entry of 4 GB": patched(struct.pack("<LL", 24, 24), b"\xfe\xff\xff\xff" * 2),
    "pickle of 4 GB": patched(CENTRAL, CENTRAL + bytes(16) + b"\xfe" * 8, nth=3),
    "no local header": patched(b"PK\3\4", b"PK\3\5"),
    "local header of another length": patched(struct.pack("<HH", 8, 0) + b"x/data/0", b"\xff\xff\xff\xff"),
    "encrypted": patched(CENTRAL, CENTRAL + bytes(4) + b"\x01"),
    "zip version of the future": patched(CENTRAL, CENTRAL + b"\xff\xff\xff\xff"),
    "directory of 4 GB": directory_claims(size=0xFFFFFFF0),
    "directory past the end": directory_claims(offset=0xFFFFFFF0),
    "directory of zip64": directory_claims(here=0xFFFF, total=0xFFFF, size=0xFFFFFFFF, offset=0xFFFFFFFF),
    "legacy, big-endian": legacy(little_endian=False),
    "legacy, no byte order": legacy(little_endian=None),
    "legacy, a key not used": legacy(keys=["0", "1"]),
    "legacy, a key not listed": legacy(keys=[]),
    "legacy, a key twice": legacy(keys=["0", "0"]),
    "legacy, another count": legacy(storages=struct.pack("<q", 7) + bytes(28)),
    "legacy, bytes behind": legacy(storages=struct.pack("<q", 6) + bytes(25)),
    # What would hang or kill an unpickler.
    "keys that hash for ever": opcodes(b"K\x00q\x00" + PAIRS + b"}h\x00Ns"),
    "a key nested too deep to hash": opcodes(b"}" + DEEP + b"Ns"),
    "a value nested as deep": opcodes(b"}" + text(b"a") + DEEP + b"s"),
    "a million marks": opcodes(b"(" * 1_000_000),
    "colliding keys": opcodes(b"}(" + COLLIDING + b"u"),
    "a memo index of 2**32": opcodes(b"K\x01r\xff\xff\xff\xff"),
    "a dict in itself": opcodes(b"}q\x00" + text(b"state_dict") + b"h\x00s"),
    "a list in itself": opcodes(b"]q\x00h\x00a"),
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files(folder, name):
    path = folder / "x.bin"
    path.write_bytes(HOSTILE[name])
    with pytest.raises((Malformed, Unsupported)) as caught:
        read_torch_file(path)
    assert list(folder.iterdir()) == [path]
    assert caught.value.path == str(path)
    assert caught.value.where
    assert caught.value.cure
    assert len(str(caught.value)) < 1000
    assert str(caught.value).isprintable()


AUDIT = """
import encodings.cp437, resource, sys
from adapterkit.errors import AdapterkitError
from adapterkit.io.torch_file import read_torch_file
resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
good, *paths = sys.argv[1:]
assert list(read_torch_file(good)) == ["a"]
seen = []
sys.addaudithook(lambda event, args: seen.append((event, *map(str, args[:2]))))
for path in paths:
    seen.clear()
    try:
        read_torch_file(path)
    except AdapterkitError:
        pass
    else:
        seen.append("read")
    assert {event[:2] for event in seen} == {("open", path)}, (path, seen)
print(len(paths), "torch" in sys.modules, "numpy" in sys.modules)
"""


def python(script, *args):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "error", "-c", script, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)


def test_hostile_files_set_off_nothing_but_reads_of_themselves_in_a_gigabyte(folder):
    pytest.importorskip("resource")
    paths = [folder / f"{i}.bin" for i in range(len(HOSTILE))]
    for path, data in zip(paths, HOSTILE.values(), strict=True):
        path.write_bytes(data)
    good = save({"a": ONE}, folder / "good.bin")
    result = python(AUDIT, good, *paths)
    assert (result.stdout, result.stderr) == (f"{len(HOSTILE)} False False\n", "")
    assert set(folder.iterdir()) == {good, *paths}


def test_extension_codes_are_refused_even_when_registered(folder):
    copyreg.add_extension("posix", "system", 0xF0)
    try:
        test_hostile_files(folder, "ext1")
    finally:
        copyreg.remove_extension("posix", "system", 0xF0)


def test_neither_torch_nor_numpy_is_imported(tmp_path):
    script = """
import sys
from adapterkit.io.torch_file import is_torch_file, read_torch_file
for path in sys.argv[1:]:
    assert is_torch_file(path)
    found = read_torch_file(path)
    assert len(found["a"].fetch()) == 24 and "numpy" not in sys.modules
for path in sys.argv[1:]:
    assert len(read_torch_file(path)["b"].fetch()) == 24
assert "torch" not in sys.modules
"""
    x = torch.ones(2, 3)
    result = python(script, *[save({"a": x, "b": x.t()}, tmp_path / f"{z}.bin", z) for z in (ZIP, LEGACY)])
    assert (result.returncode, result.stderr) == (0, "")


def test_limits_on_pickles(tmp_path, monkeypatch):
    path = save({f"layer.{i}": ONE.clone() for i in range(50)}, tmp_path / "x.bin")
    monkeypatch.setattr(torch_pickle, "_LENGTH", 700)
    with pytest.raises(Unsupported, match="more than 700 opcodes"):
        read_torch_file(path)
    monkeypatch.undo()
    monkeypatch.setattr(torch_containers, "LIMIT", 1000)
    with pytest.raises(Unsupported, match="at most 1000 are read"):
        read_torch_file(path)


@containers
def test_truncated_anywhere(tmp_path, zipped):
    tensors = {f"layer.{i}.weight": torch.randn(5, 3) for i in range(4)}
    whole = save(tensors, tmp_path / "x.bin", zipped).read_bytes()
    path = tmp_path / "cut.bin"
    for length in sorted({len(whole) * i // 40 for i in range(40)} | set(range(len(whole) - 40, len(whole)))):
        path.write_bytes(whole[:length])
        with pytest.raises(Malformed) as caught:
            read_torch_file(path)
        assert caught.value.path == str(path)
        assert caught.value.where


@containers
def test_damaged_bytes_raise_typed_errors_or_read(tmp_path, zipped):
    x = torch.randn(3, 5)
    whole = save(OrderedDict(a=x, b=x.t(), c=ONE.bfloat16()), tmp_path / "x.bin", zipped).read_bytes()
    path, dice = tmp_path / "damaged.bin", random.Random(7)
    for _ in range(400):
        data = bytearray(whole)
        for _ in range(dice.choice((1, 1, 2, 8))):
            data[dice.randrange(len(data))] = dice.choice((0, 1, 0x7F, 0x80, 0xFF, dice.randrange(256)))
        path.write_bytes(data)
        with contextlib.suppress(AdapterkitError):
            assert all(len(lazy.fetch()) == lazy.nbytes for lazy in read_torch_file(path).values())
