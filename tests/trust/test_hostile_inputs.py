"""Small files that ask for hours or gigabytes, and inputs that are no files: refused with a typed error.

The files are read in one process with a gigabyte of address space; a case that takes a minute is stopped.
"""

import ast
import contextlib
import gzip
import io
import json
import os
import struct
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import adapterkit as ak
from adapterkit.errors import AdapterkitError, Malformed
from adapterkit.io.numpy_files import read_npy, read_npz
from adapterkit.io.safetensors import encode_header
from adapterkit.io.strict_json import load_json
from adapterkit.io.strict_yaml import load_yaml
from adapterkit.merging import plan
from adapterkit.ops.recipes import read_recipe

ROOT = Path(__file__).parents[2]

READ = """
import json, resource, signal, sys
import adapterkit as ak
from adapterkit.errors import AdapterkitError
from adapterkit.io.numpy_files import read_npz
from adapterkit.io.torch_file import read_torch_file, read_torch_value
from adapterkit.io.gguf_file import read_model
import numpy, yaml, msgspec
from adapterkit.formats import FORMATS

def stop(*_):
    raise TimeoutError("a minute has passed")

def model(path):
    read_model(path)

readers = {"read": ak.read, "detect": ak.detect, "npz": read_npz, "torch": read_torch_file, "value": read_torch_value,
           "model": model, "gguf": lambda path: ak.read(path, "gguf")}
for name in FORMATS:
    FORMATS[name]
signal.signal(signal.SIGALRM, stop)
resource.setrlimit(resource.RLIMIT_AS, (3 << 29, 3 << 29))
found = {}
for name, (reader, path) in json.loads(sys.argv[1]).items():
    signal.alarm(60)
    try:
        readers[reader](path)
        found[name] = ["read", "", 0]
    except AdapterkitError as error:
        found[name] = ["typed", str(error.path), len(str(error))]
    except BaseException as error:
        found[name] = [repr(error)[:200], "", 0]
    signal.alarm(0)
print(json.dumps(found))
"""


def litgpt(folder: Path, text: bytes) -> tuple[str, Path]:
    """A checkpoint of litgpt's with these settings."""
    import torch

    folder.mkdir()
    key = "transformer.h.0.attn.proj.lora_{}"
    torch.save({key.format("A"): torch.ones(2, 4), key.format("B"): torch.ones(4, 2)}, folder / "lit_model.pth.lora")
    (folder / "hyperparameters.yaml").write_bytes(text)
    return "read", folder


def nemo(file: Path, config: bytes, name: str = "model_config.yaml", *, kind: bytes = tarfile.REGTYPE) -> Path:
    with tarfile.open(file, "w") as archive:
        member = tarfile.TarInfo(name)
        member.size, member.type = len(config), kind
        archive.addfile(member, io.BytesIO(config))
    return file


def pax(file: Path) -> Path:
    """3 GB of zeros as the header of a member, in 3 MB."""
    header = tarfile.TarInfo("x")
    header.size, header.type = 3 << 30, tarfile.XHDTYPE
    zeros = gzip.compress(bytes(16 << 20), 1)
    file.write_bytes(gzip.compress(header.tobuf(tarfile.USTAR_FORMAT)) + zeros * 192)
    return file


def npz(file: Path) -> Path:
    """An archive whose directory claims that 100 KB are 2 GB."""
    head = b"{'descr': '<f4', 'fortran_order': False, 'shape': (%d,), }"
    size = 500_000_000
    text = head % size
    text += b" " * (-(len(text) + 11) % 64) + b"\n"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.npy", b"\x93NUMPY\1\0" + struct.pack("<H", len(text)) + text + bytes(1 << 20))
    data, held = file.read_bytes(), struct.pack("<I", 10 + len(text) + (1 << 20))
    claimed = struct.pack("<I", 10 + len(text) + 4 * size)
    file.write_bytes(data.replace(held, claimed))
    return file


def pickled(file: Path, levels: int = 7, width: int = 60) -> Path:
    """Dicts whose values are one dict of which the values are one dict ..., named again by the pickle's memo."""
    data = bytearray(b"\x80\x02}q\x00")
    for level in range(levels):
        data += b"}q" + bytes([level + 1]) + b"("
        for key in range(width):
            data += b"X" + struct.pack("<I", 2) + f"{key:02}".encode() + b"h" + bytes([level])
        data += b"u"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("x/data.pkl", bytes(data) + b".")
    return file


def entries(file: Path, count: int = 600_000) -> Path:
    """A zip archive of many empty entries."""
    entry = struct.pack("<4s4B4HL2L5H2L", b"PK\1\2", 20, 0, 20, 0, 0, 0, 0, 0, 0, 0, 0, 6, 0, 0, 0, 0, 0, 0)
    directory = b"".join(entry + b"%06d" % number for number in range(count))
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, count % 65536, count % 65536, len(directory), 0, 0)
    end64 = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, count, count, len(directory), 0)
    locator = struct.pack("<4sLQL", b"PK\6\7", 0, len(directory), 1)
    file.write_bytes(directory + end64 + locator + end)
    return file


def gguf(file: Path, inner: int, length: int, size: int) -> Path:
    """A file with one array, of zeros that are a hole on disk."""
    key = b"tokenizer.ggml.scores"
    head = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", len(key)) + key
    head += struct.pack("<IIQ", 9, inner, length)
    with open(file, "wb") as out:
        out.write(head)
        out.truncate(len(head) + size + 64)
    return file


def header(file: Path, text: bytes) -> Path:
    file.write_bytes(struct.pack("<Q", len(text)) + text)
    return file


ALIASES = b"a: &a [x, x, x, x, x, x, x, x, x]\n" + b"".join(
    b"%c: &%c [%s]\n" % (at, at, b", ".join([b"*%c" % (at - 1)] * 9)) for at in range(ord("b"), ord("k"))
)
YAMLS = {
    "aliases": ALIASES, "colons": b"lora_r: " + b":".join([b"1"] * 120_000), "items": b"a:\n" + b"- 1\n" * 60_000,
    "itself": b"a: &a [*a]", "a tag": b"lora_r: !!bool 3", "a date": b"lora_r: !!timestamp 1",
    "hex": b"lora_r: 0x" + b"f" * 5000, "nan": b"lora_alpha: .nan", "keys": b'a: {1: a, "1": b}',
    "surrogate": b'a: "\\ud800"', "deep": b"a: " + b"[" * 5000, "large": b"# " + b"x" * (1 << 20),
    "huge": b"lora_alpha: " + b"9" * 5000, "no text": b"a: \xff",
}  # fmt: skip


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[object]]:
    pytest.importorskip("resource")
    folder = tmp_path_factory.mktemp("hostile")
    cases: dict[str, tuple[str, Path]] = {
        f"litgpt {name}": litgpt(folder / name.replace(" ", "-"), text) for name, text in YAMLS.items()
    }
    cases |= {
        f"nemo {name}": ("read", nemo(folder / f"{name.replace(' ', '-')}.nemo", text)) for name, text in YAMLS.items()
    }
    cases |= {
        "pax": ("detect", pax(folder / "pax.nemo")),
        "npz": ("npz", npz(folder / "a.npz")),
        "pickle": ("value", pickled(folder / "a.pt")),
        "entries": ("detect", entries(folder / "b.pt")),
        "numbers": ("gguf", gguf(folder / "a.gguf", 6, 62_000_000, 248_000_000)),
        "texts": ("gguf", gguf(folder / "b.gguf", 8, 31_000_000, 248_000_000)),
        "objects": ("read", header(folder / "a.safetensors", b'{"a":[' + b"{}," * 31_000_000 + b"{}]}")),
        "lists": ("read", header(folder / "b.safetensors", b'{"a":[' + b"[]," * 31_000_000 + b"[]]}")),
    }
    told = json.dumps({name: (reader, str(path)) for name, (reader, path) in cases.items()})
    done = subprocess.run(
        [sys.executable, "-c", READ, told], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: dict[str, list[object]] = json.loads(done.stdout)
    for name, (_, path) in cases.items():
        found[name] += [str(path)]
    return found


CASES = [f"{kind} {name}" for kind in ("litgpt", "nemo") for name in YAMLS] + [
    "pax", "npz", "pickle", "entries", "numbers", "texts", "objects", "lists",
]  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_hostile_file_is_refused_in_bounded_time_and_memory(name: str, results: dict[str, list[object]]) -> None:
    how, path, length, own = results[name]
    assert (how, str(path).startswith(str(own))) == ("typed", True), results[name]
    assert isinstance(length, int)
    assert length < 2_000


def test_a_large_array_of_a_models_header_is_read_as_it_is(tmp_path: Path) -> None:
    """Vocabularies are large: what is not listed is still there."""
    from adapterkit.io.gguf_file import read_model

    model = read_model(gguf(tmp_path / "a.gguf", 6, 2_000_000, 8_000_000))
    value = model.values["tokenizer.ggml.scores"].value
    assert (len(value), float(value[-1])) == (2_000_000, 0.0)


KINDS = ("pipe", "device")


def put(place: Path, kind: str) -> None:
    if kind == "pipe":
        os.mkfifo(place)
    else:
        place.symlink_to("/dev/zero")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes as files here")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [
    "adapter_config.json", "adapter_model.safetensors", "hyperparameters.yaml", "adapter.nemo", "a.safetensors", "a.pt",
    "a.gguf", "a.npz", "a.onnx_adapter", "config.json", "model.safetensors.index.json", "model.safetensors", "a.bin",
])  # fmt: skip
def test_what_is_no_file_is_refused_and_not_read(tmp_path: Path, name: str, kind: str) -> None:
    """Reading a pipe waits for ever, and a device has no end."""
    folder = tmp_path / "folder"
    folder.mkdir()
    key = "base_model.model.q.lora_{}.weight"
    factors = {key.format("A"): np.ones((1, 2), np.float32), key.format("B"): np.ones((2, 1), np.float32)}
    save_file(factors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 1, "target_modules": ["q"]}')
    save_file({"q.weight": np.ones((2, 2), np.float32)}, folder / "model.safetensors")
    (folder / name).unlink(missing_ok=True)
    put(folder / name, kind)
    for path in (folder, folder / name):
        for act in (ak.detect, ak.read, lambda p: plan(p, [])):
            with contextlib.suppress(AdapterkitError):
                act(path)


@pytest.mark.parametrize("kind", KINDS)
def test_a_config_that_is_no_file_is_named(tmp_path: Path, kind: str) -> None:
    put(tmp_path / "adapter_config.json", kind)
    put(tmp_path / "recipe.yaml", kind)
    save_file({"q": np.ones(1, np.float32)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(Malformed, match="not a regular file") as raised:
        ak.read(tmp_path, "peft")
    assert raised.value.path == str(tmp_path / "adapter_config.json")
    with pytest.raises(Malformed, match="not a regular file"):
        read_recipe(tmp_path / "recipe.yaml")


OWN = {"core/registry.py", "formats/nemo.py", "io/atomic.py", "io/inputs.py", "io/staging.py"}
"""Modules that also open what adapterkit itself has written, or has read before."""


def test_readers_open_files_by_way_of_inputs() -> None:
    """A reader that opens by itself would wait for a pipe."""
    package, opened = ROOT / "adapterkit", []
    for file in [path for room in ("formats", "io", "core") for path in (package / room).rglob("*.py")]:
        name = file.relative_to(package).as_posix()
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if not isinstance(node, ast.Call) or name in OWN:
                continue
            words = [ast.unparse(word) for word in (*node.args, *(key.value for key in node.keywords))]
            called = ast.unparse(node.func)
            reads = called == "open" and not {"'wb'", "'xb'", "'r+b'", "'ab'", "mode"} & set(words)
            if reads or called.endswith((".read_text", ".read_bytes")):
                opened.append(f"{name}:{node.lineno}")
    assert opened == []


def test_yaml_of_the_tools_is_read_as_they_do() -> None:
    import yaml

    text = b"""
a: 1
b: [1, 2.5, true, null, ~, "x", 'y', 1_000, 0x1F, 010, -3, +4, 1.5e+3, yes, off]
c: {d: {e: [], f: {}}, 'g h': "1:30", i: '2020-01-01'}
k: |
  text
l: >-
  more
  text
"""
    assert load_yaml(text) == yaml.safe_load(text)
    assert load_yaml(b"a: 1:30\nb: 2020-01-01") == {"a": "1:30", "b": "2020-01-01"}


@pytest.mark.parametrize("shape", ["(0x" + "f" * 9000 + ",)", "(1e400,)", "(-1,)", "(9223372036854775808,)", "((),)"])
def test_shapes_that_no_array_has(tmp_path: Path, shape: str) -> None:
    text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    (tmp_path / "a.npy").write_bytes(b"\x93NUMPY\1\0" + struct.pack("<H", len(text)) + text)
    with pytest.raises(Malformed):
        read_npy(tmp_path / "a.npy")
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.write(tmp_path / "a.npy", "a.npy")
    with pytest.raises(Malformed):
        read_npz(tmp_path / "a.npz")


def test_an_element_type_that_cannot_be_shown(tmp_path: Path) -> None:
    text = b"{'descr': (0x" + b"f" * 9000 + b",), 'fortran_order': False, 'shape': (1,), }\n"
    (tmp_path / "a.npy").write_bytes(b"\x93NUMPY\1\0" + struct.pack("<H", len(text)) + text)
    with pytest.raises(AdapterkitError):
        read_npy(tmp_path / "a.npy")


@pytest.mark.parametrize("name", ["model_config.yaml", "model_weights.ckpt"])
def test_a_folder_in_the_place_of_an_archives_file(tmp_path: Path, name: str) -> None:
    with pytest.raises(AdapterkitError):
        ak.read(nemo(tmp_path / "a.nemo", b"", name, kind=tarfile.DIRTYPE), "nemo")


@pytest.mark.parametrize(
    "value", [float("nan"), float("inf"), {1: "a", "1": "b"}, "\ud800", object(), [{2: 1, "a": 1}]]
)
def test_what_json_cannot_say_is_not_written_into_a_native_file(tmp_path: Path, value: object) -> None:
    lora = ak.METHODS["lora"](A=np.ones((1, 2), np.float32), B=np.ones((2, 1), np.float32))
    for adapter in (
        ak.Adapter({ak.Target("q"): (lora,)}, foreign=ak.Foreign("nemo", {"config": value})),
        ak.Adapter({ak.Target("q"): (lora,)}, recipe=(ak.Step("read", {"said": value}),)),
    ):
        with pytest.raises(Malformed):
            ak.write(adapter, tmp_path / "a.safetensors", "adapterkit")
    assert not list(tmp_path.iterdir())


def test_a_name_that_utf8_cannot_say_is_not_written() -> None:
    from adapterkit.io.lazy import DTYPES

    with pytest.raises(Malformed, match="surrogate"):
        encode_header([("a\ud800", DTYPES["F32"], (1,))], {})
    with pytest.raises(Malformed, match="surrogate"):
        encode_header([], {"a": "\ud800"})


@pytest.mark.parametrize(
    "text", ["[" * 101 + "]" * 101, '{"a":' * 200 + "1" + "}" * 200, "[" * 100_000, '"' * 9_000_000]
)
def test_json_that_is_too_deep_or_too_full(text: str) -> None:
    with pytest.raises(ValueError, match=r"are nested|quotation marks|Unterminated|Expecting"):
        load_json(text)


def test_a_native_record_nested_too_deeply(tmp_path: Path) -> None:
    deep = '{"a":' * 400 + "1" + "}" * 400
    record = {
        "version": "1.0", "recipe": [{"op": "read", "args": {"x": "HERE"}}],
        "updates": [{"target": {"path": "q"}, "method": "lora", "version": 1, "tensors": {"A": "A", "B": "B"},
                     "attributes": {}}],
    }  # fmt: skip
    save_file(
        {"A": np.ones((1, 2), np.float32), "B": np.ones((2, 1), np.float32)}, tmp_path / "a.safetensors",
        {"adapterkit": json.dumps(record).replace('"HERE"', deep)},
    )  # fmt: skip
    with pytest.raises(Malformed) as raised:
        ak.read(tmp_path / "a.safetensors")
    assert raised.value.path == str(tmp_path / "a.safetensors")


def test_strings_full_of_brackets_are_text() -> None:
    text = json.dumps({"record": json.dumps([[[{"a": "[[[{\\"}]]] * 200), "b": "\\\\"})
    assert load_json(text) == json.loads(text)
