"""Bad files of language models' formats: a typed error that names the place, quickly, and nothing written."""

import io
import json
import pickle
import struct
import tarfile

import numpy as np
import pytest
import torch
import yaml
from llm_adapters import BASE, FILES, VECTORS, content, deltas, llama, lora, place, write_base
from safetensors.numpy import load_file, save_file
from torch import nn

import adapterkit as ak
from adapterkit.core.adapter import Foreign, Target
from adapterkit.errors import (  # fmt: skip
    AdapterkitError,
    Malformed,
    ShapeMismatch,
    StorageError,
    TargetNotFound,
    UnknownFormat,
    Unrepresentable,
    Unsupported,
    UsageError,
)
from adapterkit.formats import FORMATS
from adapterkit.io.ggml_blocks import encoded
from adapterkit.io.gguf_file import GgufValue, read_gguf, write_gguf
from adapterkit.io.lazy import from_numpy
from adapterkit.io.numpy_files import read_npy, read_npz
from adapterkit.io.ort_adapter import OrtAdapter, read_ort_adapter, write_ort_adapter

SINGLE = sorted(name for name, file in FILES.items() if "." in file)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A small file of each format that has one."""
    folder = tmp_path_factory.mktemp("files")
    paths = {name: place(folder, name) for name in FILES}
    for name, path in paths.items():
        ak.write(llama(layers=(0,)), path, name, BASE, "fold")
    return paths


def copied(path, tmp_path):
    """The files beside a path, to be spoilt."""
    for name, data in content(path).items():
        target = tmp_path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
    return tmp_path / path.name


@pytest.mark.parametrize("name", SINGLE)
def test_a_file_that_is_cut_is_refused(name, files, tmp_path):
    path = copied(files[name], tmp_path)
    data = path.read_bytes()
    for length in {*range(0, min(len(data), 400), 7), *np.linspace(0, len(data) - 1, 40).astype(int).tolist()}:
        path.write_bytes(data[:length])
        if name == "nemo" and length >= len(data) - 20480:
            continue
        with pytest.raises(AdapterkitError):
            ak.read(path, name, BASE).check_values()


@pytest.mark.parametrize("name", ["gguf", "onnx_adapter"])
def test_no_byte_of_a_header_can_do_harm(name, files, tmp_path):
    path = copied(files[name], tmp_path)
    data = path.read_bytes()
    rng = np.random.default_rng(0)
    for at in rng.permutation(min(len(data), 1500))[:150]:
        for value in {0, 0xFF, data[at] ^ 1, int(rng.integers(256))} - {data[at]}:
            path.write_bytes(data[:at] + bytes([value]) + data[at + 1 :])
            harmless(path, name)


def harmless(path, name):
    """Whatever a file says: it is read, or refused with its path."""
    try:
        ak.read(path, name, BASE)
    except AdapterkitError as error:
        refused = str(error)
    else:
        return
    assert str(path.parent) in refused


def gguf_header(tensors=0, values=0, version=3):
    return b"GGUF" + struct.pack("<IQQ", version, tensors, values)


def text(value):
    return struct.pack("<Q", len(value)) + value


LIES = {
    "more tensors than bytes": gguf_header(tensors=1 << 60),
    "many tensors": gguf_header(tensors=1 << 19),
    "more keys than bytes": gguf_header(values=1 << 60),
    "a key of all bytes there are": gguf_header(values=1) + struct.pack("<Q", 1 << 63),
    "a value of all bytes there are": gguf_header(values=1) + text(b"a") + struct.pack("<IQ", 8, 1 << 62),
    "an array of all numbers there are": gguf_header(values=1) + text(b"a") + struct.pack("<IIQ", 9, 4, 1 << 62),
    "an array of texts": gguf_header(values=1) + text(b"a") + struct.pack("<IIQ", 9, 8, 1 << 40),
    "arrays in arrays": gguf_header(values=1) + text(b"a") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 50,
    "no type": gguf_header(values=1) + text(b"a") + struct.pack("<I", 77),
    "a key twice": gguf_header(values=2) + (text(b"a") + struct.pack("<IB", 0, 1)) * 2,
    "not UTF-8": gguf_header(values=1) + text(b"\xff\xfe") + struct.pack("<IB", 0, 1),
    "many axes": gguf_header(tensors=1) + text(b"a") + struct.pack("<I", 1 << 30),
    "a huge tensor": gguf_header(tensors=1) + text(b"a") + struct.pack("<IQQIQ", 2, 1 << 40, 1 << 40, 0, 0),
    "an offset beyond the end": gguf_header(tensors=1) + text(b"a") + struct.pack("<IQIQ", 1, 4, 0, 1 << 62),
    "an alignment of zero": gguf_header(values=1) + text(b"general.alignment") + struct.pack("<II", 4, 0),
}


@pytest.mark.parametrize("lie", LIES)
def test_gguf_lies_about_sizes(lie, tmp_path):
    (tmp_path / "a.gguf").write_bytes(LIES[lie] + bytes(64))
    with pytest.raises(Malformed, match=r"a\.gguf"):
        read_gguf(tmp_path / "a.gguf")


def test_gguf_tensors_that_overlap_are_refused(tmp_path):
    entries = b"".join(text(name) + struct.pack("<IQIQ", 1, 8, 0, 0) for name in (b"a", b"b"))
    (tmp_path / "a.gguf").write_bytes(gguf_header(tensors=2) + entries + bytes(256))
    with pytest.raises(Malformed, match="overlaps another"):
        read_gguf(tmp_path / "a.gguf")


def test_other_versions_and_types_of_gguf_are_refused(tmp_path):
    for version in (1, 4, 3 << 24):
        (tmp_path / "a.gguf").write_bytes(gguf_header(version=version) + bytes(64))
        with pytest.raises(Unsupported, match="GGUF"):
            read_gguf(tmp_path / "a.gguf")
    entry = text(b"a") + struct.pack("<IQIQ", 1, 256, 12, 0)
    (tmp_path / "a.gguf").write_bytes(gguf_header(tensors=1) + entry + bytes(512))
    with pytest.raises(Unsupported, match="type 12"):
        read_gguf(tmp_path / "a.gguf")


VALUES = {
    "general.architecture": GgufValue("string", "llama"), "general.type": GgufValue("string", "adapter"),
    "adapter.type": GgufValue("string", "lora"), "adapter.lora.alpha": GgufValue("f32", 4.0),
}  # fmt: skip


def gguf_tensors(name="blk.0.ffn_up", rank=2):
    A, B = np.ones((rank, 16), "f4"), np.ones((24, rank), "f4")
    return {f"{name}.weight.lora_a": from_numpy(A), f"{name}.weight.lora_b": from_numpy(B)}


def gguf_embedding():
    A, B = np.ones((12, 2), "f4"), np.ones((16, 2), "f4")
    return {"token_embd.weight.lora_a": from_numpy(A), "token_embd.weight.lora_b": from_numpy(B)}


TOKENS = "adapter.alora.invocation_tokens"

GGUFS = {
    "another architecture": (VALUES | {"general.architecture": GgufValue("string", "x")}, gguf_tensors(), Unsupported),
    "a control vector": (VALUES | {"adapter.type": GgufValue("string", "control_vector")}, gguf_tensors(), Unsupported),
    "a model": (VALUES | {"general.type": GgufValue("string", "model")}, gguf_tensors(), Unsupported),
    "an invocation of nothing": (VALUES | {TOKENS: GgufValue("[u32]", [])}, gguf_tensors(), Malformed),
    "an invocation of text": (VALUES | {TOKENS: GgufValue("string", "x")}, gguf_tensors(), Malformed),
    "an activated embedding": (VALUES | {TOKENS: GgufValue("[u32]", [1])}, gguf_embedding(), Unsupported),
    "alpha as text": (VALUES | {"adapter.lora.alpha": GgufValue("string", "4")}, gguf_tensors(), Malformed),
    "alpha infinite": (VALUES | {"adapter.lora.alpha": GgufValue("f32", float("inf"))}, gguf_tensors(), Malformed),
    "a factor alone": (VALUES, {k: v for k, v in gguf_tensors().items() if k.endswith("a")}, Malformed),
    "another format's key": (VALUES, gguf_tensors() | {"m.lora_A.weight": from_numpy(np.ones(2, "f4"))}, Malformed),
    "no tensors": (VALUES, {}, Malformed),
    "a name without a place": (VALUES, gguf_tensors("blk.9.ffn_up"), TargetNotFound),
    "a name that is none": (VALUES, gguf_tensors("blk.0.mystery"), TargetNotFound),
    "whole numbers": (VALUES, {k: from_numpy(v.numpy().astype("i4")) for k, v in gguf_tensors().items()}, Unsupported),
}  # fmt: skip


@pytest.mark.parametrize("case", GGUFS)
def test_a_gguf_file_that_is_no_such_adapter(case, tmp_path):
    values, tensors, error = GGUFS[case]
    write_gguf(tmp_path / "a.gguf", values, tensors, {})
    with pytest.raises(error, match=r"a\.gguf"):
        ak.read(tmp_path / "a.gguf", "gguf", BASE)


@pytest.mark.parametrize("alpha", [{}, {"adapter.lora.alpha": GgufValue("f32", 0.0)}])
def test_llama_cpp_takes_no_alpha_for_a_scaling_of_one(alpha, tmp_path):
    values = {key: value for key, value in VALUES.items() if key != "adapter.lora.alpha"} | alpha
    write_gguf(tmp_path / "a.gguf", values, gguf_tensors(), {})
    adapter = ak.read(tmp_path / "a.gguf")
    assert [update.scaling for _, update in adapter] == [1.0]
    ak.write(adapter, tmp_path / "b.gguf", "gguf", on_loss="fold")
    again = {t: u.scaling * 24 for t, u in ak.read(tmp_path / "b.gguf")}
    assert len(again) == 1
    assert deltas(ak.read(tmp_path / "b.gguf"))["model.layers.0.mlp.up_proj"].max() == 2


def test_q8_0_is_what_gguf_py_has(tmp_path):
    import gguf

    numbers = np.random.default_rng(0).normal(size=(7, 64)).astype("f4")
    numbers[2, :32] = 0
    assert encoded("Q8_0", numbers) == gguf.quants.quantize(numbers, gguf.GGMLQuantizationType.Q8_0).tobytes()
    write_gguf(tmp_path / "q.gguf", {}, {"a": from_numpy(numbers)}, {"a": "Q8_0"})
    (tensor,) = gguf.GGUFReader(tmp_path / "q.gguf").tensors
    theirs = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    ours = read_gguf(tmp_path / "q.gguf")
    assert np.array_equal(ours.tensors["a"].numpy(), theirs)
    write_gguf(tmp_path / "r.gguf", {}, ours.tensors, ours.types)
    assert (tmp_path / "r.gguf").read_bytes() == (tmp_path / "q.gguf").read_bytes()


def ggla(path, tensors, rank=2, alpha=4, version=1):
    data = b"algg" + struct.pack("<3i", version, rank, alpha)
    for name, value in tensors.items():
        data += struct.pack("<3i", value.ndim, len(name), 0) + struct.pack(f"<{value.ndim}i", *value.shape[::-1])
        data += name.encode()
        data += bytes(-len(data) % 32) + value.astype("<f4").tobytes()
    path.write_bytes(data)
    return path


def legacy(name, out=16, in_=16):
    rng = np.random.default_rng(1)
    A, B = rng.normal(size=(2, in_)).astype("f4"), rng.normal(size=(out, 2)).astype("f4")
    return {f"{name}.weight.loraA": A.T, f"{name}.weight.loraB": B}, 2.0 * (B.astype("f8") @ A.astype("f8"))


def test_ggla_is_read_as_it_was_trained(tmp_path):
    tensors, delta = legacy("layers.0.attention.wq")
    path = ggla(tmp_path / "a.bin", tensors)
    assert ak.detect(path) == "gguf"
    assert np.abs(deltas(ak.read(path))["model.layers.0.self_attn.q_proj"] - delta).max() < 1e-6
    # llama.cpp added the rows to a weight in another order; as it computed is what its own training meant.
    applied = deltas(ak.read(path, base=BASE, compat="finetune"))["model.layers.0.self_attn.q_proj"]
    order = np.arange(16).reshape(4, 2, 2).swapaxes(1, 2).reshape(-1)
    assert np.abs(applied[order] - delta).max() < 1e-6


def test_ggla_rows_are_not_guessed(tmp_path):
    tensors, delta = legacy("blk.0.attn_q")
    path = ggla(tmp_path / "a.bin", tensors)
    with pytest.raises(UsageError, match="the tool that wrote the file"):
        ak.read(path, base=BASE)
    read = ak.read(path, compat="convert-lora-to-ggml")
    assert np.abs(deltas(read)["model.layers.0.self_attn.q_proj"] - delta).max() < 1e-6


def test_bad_ggla_files_are_refused(tmp_path):
    good = ggla(tmp_path / "a.bin", legacy("blk.0.ffn_up", 24)[0]).read_bytes()
    for length in range(0, len(good), 5):
        (tmp_path / "b.bin").write_bytes(good[:length])
        with pytest.raises(AdapterkitError):
            ak.read(tmp_path / "b.bin", "gguf")
    for at in range(4, 60):
        for value in (0xFF, 0):
            (tmp_path / "b.bin").write_bytes(good[:at] + bytes([value]) + good[at + 1 :])
            harmless(tmp_path / "b.bin", "gguf")


@pytest.mark.parametrize(
    ("name", "file"),
    [(name, f"{name}.json") for name in ("loralib", "minlora", "megatron", "torchtune")],
)  # fmt: skip
def test_alpha_is_needed_and_not_zero(name, file, files, tmp_path):
    path = copied(files[name], tmp_path)
    for settings in ('{"alpha": 0}', '{"alpha": "4"}', "{}", '{"alpha": 4, "beta": 1}', "[]", "{", '{"alpha": 1e999}'):
        (tmp_path / file).write_text(settings)
        with pytest.raises(Malformed):
            ak.read(path, name, BASE)
    (tmp_path / file).unlink()
    with pytest.raises(UsageError, match="alpha"):
        ak.read(path, name, BASE)


def mlx(tmp_path, config=None, **tensors):
    plain = {"m.lora_a": np.ones((4, 2), "f4"), "m.lora_b": np.ones((2, 3), "f4")}
    own = {"fine_tune_type": "lora", "lora_parameters": {"scale": 2.0}} if config is None else config
    held = {key.replace("__", "."): value for key, value in tensors.items()}
    save_file(
        {key: value for key, value in (plain | held).items() if value is not None}, tmp_path / "adapters.safetensors"
    )
    (tmp_path / "adapter_config.json").write_text(json.dumps(own))
    return tmp_path


def test_bad_mlx_folders_are_refused(tmp_path):
    for parameters in ({}, {"alpha": 4.0}, {"scale": "2"}, {"scale": None}, {"scale": True}):
        with pytest.raises(Malformed, match="scale"):
            ak.read(mlx(tmp_path, {"fine_tune_type": "lora", "lora_parameters": parameters}))
    with pytest.raises(Unsupported, match="adalora"):
        ak.read(mlx(tmp_path, {"fine_tune_type": "adalora", "lora_parameters": {"scale": 1}}))
    for wrong, error in (
        ({"m__lora_b": None}, Malformed), ({"m__m": np.ones(3, "f4")}, Malformed),
        ({"n__lora_A__weight": np.ones((2, 2), "f4")}, Malformed),
        ({"m__lora_b": np.ones((3, 3), "f4")}, ShapeMismatch),
        ({"m__lora_a": np.ones((2, 4, 2), "f4")}, ShapeMismatch), ({"m__lora_a": np.ones((4, 2), "i4")}, Unsupported),
    ):  # fmt: skip
        with pytest.raises(error):
            ak.read(mlx(tmp_path, **wrong))
    (mlx(tmp_path) / "adapters.safetensors").unlink()
    with pytest.raises(StorageError, match=r"adapters\.safetensors"):
        ak.read(tmp_path)
    dora = {"fine_tune_type": "dora", "lora_parameters": {"scale": 1.0}}
    with pytest.raises(Unsupported, match="norm"):
        ak.read(mlx(tmp_path, dora, m__m=np.ones(4, "f4")))


@pytest.mark.parametrize("part", ["²", "00", "9" * 5000])
def test_bad_numbers_of_mlx_parts_are_refused(part, tmp_path):
    A, B = np.ones((4, 2), "f4"), np.ones((2, 3), "f4")
    with pytest.raises(Malformed):
        ak.read(mlx(tmp_path, **{f"n__lora_a__{part}": A, f"n__lora_b__{part}": B}))


@pytest.mark.parametrize("name", ["n#y", "n#0"])
def test_mlx_modules_are_not_named_as_parts(name, tmp_path):
    A, B = np.ones((4, 2), "f4"), np.ones((2, 3), "f4")
    with pytest.raises(Malformed, match="contains #"):
        ak.read(mlx(tmp_path, **{f"{name}__lora_a": A, f"{name}__lora_b": B}))


def test_the_configs_of_three_tools_are_told_apart(tmp_path):
    ak.write(llama(), tmp_path / "peft", "peft")
    ak.write(llama(), tmp_path / "mlx", "mlx")
    assert ak.detect(tmp_path / "peft") == "peft"
    assert ak.detect(tmp_path / "mlx") == "mlx"


def test_a_torch_file_that_cannot_be_read_says_why(tmp_path):
    parameters = nn.ParameterDict({"*": nn.Parameter(torch.ones(2, 8))})
    torch.save({"string_to_param": parameters}, tmp_path / "old.pt")
    with pytest.raises(UnknownFormat, match=r"torch.nn.modules.container.ParameterDict.*Convert the file"):
        ak.read(tmp_path / "old.pt")
    torch.save({"a.lora_A": torch.ones(2, 8), "a.lora_B": torch._neg_view(torch.ones(8, 2))}, tmp_path / "view.pt")
    with pytest.raises(UnknownFormat, match="negative view"):
        ak.read(tmp_path / "view.pt")


def test_the_index_of_a_model_is_refused_with_its_folder(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {}}')
    with pytest.raises(UnknownFormat, match="the index of a model in several files") as caught:
        ak.read(tmp_path / "model.safetensors.index.json")
    assert f"{tmp_path}/" in caught.value.cure


def test_a_loralib_merged_linear_needs_to_be_told(tmp_path):
    folder = VECTORS / "formats" / "loralib" / "layers"
    path = copied(folder / "lora.pt", tmp_path)
    (tmp_path / "loralib.json").write_text('{"alpha": 4}')
    with pytest.raises(UsageError, match="MergedLinear"):
        ak.read(path)
    for enabled in ([True, True, True], [False] * 3, "yes", [1, 0, 1]):
        (tmp_path / "loralib.json").write_text(json.dumps({"alpha": 4, "enable_lora": enabled}))
        with pytest.raises((Malformed, ShapeMismatch)):
            ak.read(path)


def test_bad_litgpt_folders_are_refused(files, tmp_path):
    path = copied(files["litgpt"] / "lit_model.pth.lora", tmp_path).parent
    good = yaml.safe_load((path / "hyperparameters.yaml").read_text())
    wrong = ({"lora_r": 3}, {"lora_r": None}, {"lora_alpha": 0}, {"lora_alpha": "x"}, {"lora_key": False})
    for change in wrong:
        (path / "hyperparameters.yaml").write_text(yaml.safe_dump(good | change))
        with pytest.raises((Malformed, ShapeMismatch)):
            ak.read(path, base=BASE)
    for words in ("!!python/object/apply:os.system [id]", "[1, 2", "&a [*a]", "1: 2", "x" * (2 << 20)):
        (path / "hyperparameters.yaml").write_text(words)
        with pytest.raises(Malformed):
            ak.read(path, base=BASE)
    (path / "hyperparameters.yaml").write_text(yaml.safe_dump(good))
    (path / "model_config.yaml").write_text("mlp_class_name: GptNeoxMLP")
    with pytest.raises(Unsupported, match="GptNeoxMLP"):
        ak.read(path, base=BASE)
    (path / "hyperparameters.yaml").unlink()
    with pytest.raises(StorageError, match="hyperparameters"):
        ak.read(path, base=BASE)


def archive(path, **members):
    with tarfile.open(path, "w") as file:
        for name, data in members.items():
            entry = tarfile.TarInfo({"config": "model_config.yaml", "tensors": "model_weights.ckpt"}.get(name, name))
            entry.size = len(data)
            if name == "link":
                entry.type, entry.linkname = tarfile.SYMTYPE, "/etc/passwd"
            file.addfile(entry, io.BytesIO(data))
    return path


def test_bad_nemo_archives_are_refused(tmp_path):
    saved = io.BytesIO()
    torch.save({"x": torch.ones(2)}, saved)
    config = {"peft": {"lora_tuning": {"alpha": 4, "adapter_dim": 2}}, "tensor_model_parallel_size": 2}
    tensors = saved.getvalue()
    cases = (
        ({"config": yaml.safe_dump(config).encode(), "tensors": tensors}, Unsupported),
        ({"config": b"peft: {lora_tuning: {alpha: 0}}", "tensors": tensors}, Malformed),
        ({"config": b"a: 1", "tensors": tensors}, Malformed),
        ({"config": b"peft: {lora_tuning: {alpha: 4}}", "tensors": tensors}, Malformed),
        ({"config": b"peft: {lora_tuning: {alpha: 4}}"}, Malformed),
        ({"config": b"a: 1", "link": b""}, Malformed),
        ({"config": b"a: 1", "mp_rank_00": b"x", "tensors": tensors}, Unsupported),
        ({"config": b"peft: {lora_tuning: {alpha: 4}}", "tensors": pickle.dumps(print)}, Malformed),
    )
    for members, error in cases:
        with pytest.raises(error):
            ak.read(archive(tmp_path / "a.nemo", **members), "nemo")


def test_a_flatbuffer_lies_about_its_tensors(tmp_path):
    write_ort_adapter(tmp_path / "a.onnx_adapter", OrtAdapter({"m": from_numpy(np.ones((2, 3), "f4"))}))
    data = (tmp_path / "a.onnx_adapter").read_bytes()
    dims = data.index(struct.pack("<qq", 2, 3))
    for sizes in ((2, 4), (-2, -3), (1 << 62, 4), (2, 0)):
        (tmp_path / "b.onnx_adapter").write_bytes(data[:dims] + struct.pack("<qq", *sizes) + data[dims + 16 :])
        with pytest.raises(Malformed, match="bytes, which do not fit its shape"):
            read_ort_adapter(tmp_path / "b.onnx_adapter")
    count = data.index(struct.pack("<I", 24), dims)
    for size in (1 << 31, 0xFFFFFFFF, 25):
        (tmp_path / "b.onnx_adapter").write_bytes(data[:count] + struct.pack("<I", size) + data[count + 4 :])
        with pytest.raises(Malformed):
            read_ort_adapter(tmp_path / "b.onnx_adapter")


def test_an_onnx_adapter_without_its_record_is_refused(tmp_path):
    write_ort_adapter(tmp_path / "a.onnx_adapter", OrtAdapter({"m": from_numpy(np.ones((2, 3), "f4"))}))
    assert ak.detect(tmp_path / "a.onnx_adapter") == "onnx_adapter"
    with pytest.raises(UsageError, match=r"a\.onnx_adapter\.json"):
        ak.read(tmp_path / "a.onnx_adapter")
    for record in ("{}", "[", '{"version": "1.0", "updates": []}', "\ud800".encode("utf-8", "surrogatepass")):
        (tmp_path / "a.onnx_adapter.json").write_bytes(record if isinstance(record, bytes) else record.encode())
        with pytest.raises(Malformed):
            ak.read(tmp_path / "a.onnx_adapter")


def test_olives_numbers_of_four_bits_are_refused(tmp_path):
    names = ("lora_A.quant.weight", "lora_A.quant.scale", "lora_B.quant.weight", "lora_B.quant.scale")
    tensors = {f"model.layers.0.mlp.up_proj.{name}": from_numpy(np.ones((2, 3), "f4")) for name in names}
    write_ort_adapter(tmp_path / "a.onnx_adapter", OrtAdapter(tensors))
    assert ak.detect(tmp_path / "a.onnx_adapter") == "olive"
    with pytest.raises(Unsupported, match="quantized, so their values were rounded"):
        ak.read(tmp_path / "a.onnx_adapter")


def test_tensorrt_llms_arrays_must_fit_the_base(files, tmp_path):
    path = copied(files["tensorrt_llm"] / "model.lora_config.npy", tmp_path).parent
    with pytest.raises(UsageError, match="base"):
        ak.read(path)
    good, weights = np.load(path / "model.lora_config.npy"), np.load(path / "model.lora_weights.npy")
    wrong = (
        (good * [1, 1, 40], ShapeMismatch), (good * [1, 1, 0], Malformed), (good * [1, -1, 1] - [0, 1, 0], Malformed),
        (good * [99, 1, 1] + [9, 0, 0], Unsupported), (np.add(good, [0, 7, 0]), TargetNotFound),
        (good[:, :1], ShapeMismatch),
        (np.concatenate([good, good[..., :1] * 0 + 1], 2), Unsupported), (good[:, [0] * 7], Malformed),
    )  # fmt: skip
    for config, error in wrong:
        np.save(path / "model.lora_config.npy", config.astype("i4"))
        with pytest.raises(error):
            ak.read(path, base=BASE)
    np.save(path / "model.lora_config.npy", good.astype("f4"))
    with pytest.raises(Unsupported):
        ak.read(path, base=BASE)
    np.save(path / "model.lora_config.npy", good)
    np.save(path / "model.lora_weights.npy", weights.astype(object), allow_pickle=True)
    with pytest.raises(Unsupported, match="O"):
        ak.read(path, base=BASE)


def test_arrays_of_numpys_are_read_as_numpy_reads_them(tmp_path):
    arrays = {"a": np.arange(6, dtype="<f2").reshape(2, 3), "b": np.ones((), "<i8"), "c": np.zeros((0, 4), "<f8")}
    np.savez(tmp_path / "a.npz", **arrays)
    for name, leaf in read_npz(tmp_path / "a.npz").items():
        assert np.array_equal(leaf.numpy(), arrays[name])
        np.save(tmp_path / "one.npy", arrays[name])
        assert np.array_equal(read_npy(tmp_path / "one.npy").numpy(), arrays[name])
    data = (tmp_path / "a.npz").read_bytes()
    for length in range(0, len(data) - 1, 5):
        (tmp_path / "b.npz").write_bytes(data[:length])
        with pytest.raises(AdapterkitError):
            read_npz(tmp_path / "b.npz")


def test_bad_tinker_folders_are_refused(tmp_path):
    key = "base_model.model.model.layers.0.mlp.experts.w1"
    ok = {f"{key}.lora_A.weight": np.ones((1, 2, 4), "f4"), f"{key}.lora_B.weight": np.ones((3, 4, 2), "f4")}

    def read(tensors=ok, **config):
        save_file(tensors, tmp_path / "adapter_model.safetensors")
        whole = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, **config}
        (tmp_path / "adapter_config.json").write_text(json.dumps(whole))
        assert ak.detect(tmp_path) == "tinker"
        return ak.read(tmp_path)

    assert len(read()) == 3
    for config in ({"r": 0}, {"r": 2.5}, {"lora_alpha": 0}, {"lora_alpha": None}):
        with pytest.raises(Malformed):
            read(**config)
    for config in ({"use_dora": True}, {"use_rslora": True}, {"rank_pattern": {"a": 1}}):
        with pytest.raises(Unsupported):
            read(**config)
    for shape in ((2, 2, 4), (1, 3, 4)):
        with pytest.raises(ShapeMismatch):
            read(ok | {f"{key}.lora_A.weight": np.ones(shape, "f4")})
    with pytest.raises(Malformed):
        read(ok | {"base_model.model.x.lora_down.weight": np.ones((2, 2), "f4")})


OTHER_FORMULAS = {
    "alora_invocation_tokens": [1, 2], "arrow_config": {"top_k": 2}, "init_lora_weights": "pissa",
    "kasa_config": {"beta": 0.1}, "layer_replication": [[0, 2], [1, 3]], "use_bdlora": {"nblocks": 2},
    "use_dora": True, "use_qalora": True, "use_rslora": True,
}  # fmt: skip


@pytest.mark.parametrize("field", OTHER_FORMULAS)
@pytest.mark.parametrize("name", ["shared_outer", "tinker"])
def test_a_folder_of_plain_loras_with_a_field_of_another_formula_is_refused(name, field, tmp_path):
    key = "base_model.model.model.layers.0.mlp.experts." + {"tinker": "w1", "shared_outer": "gate_proj"}[name]
    stacks = {f"{key}.lora_A.weight": np.ones((1, 2, 4), "f4"), f"{key}.lora_B.weight": np.ones((3, 4, 2), "f4")}
    save_file(stacks, tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "init_lora_weights": "gaussian"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    assert ak.detect(tmp_path) == name
    assert len(ak.read(tmp_path)) == 3
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {field: OTHER_FORMULAS[field]}))
    with pytest.raises(Unsupported, match=field):
        ak.read(tmp_path)


@pytest.mark.parametrize("name", ["gguf", "litgpt", "megatron", "nemo", "tensorrt_llm", "torchtune"])
def test_a_target_without_a_name_there_is_refused(name, tmp_path):
    adapter = ak.Adapter({**llama().updates, Target("model.layers.0.mystery"): (lora(4, 4),)})
    path = place(tmp_path, name)
    with pytest.raises(Unrepresentable, match="mystery"):
        ak.write(adapter, path, name, BASE, "fold")
    assert not content(path)


@pytest.mark.parametrize("name", ["gguf", "megatron", "tinker", "torchtune"])
def test_a_name_that_fits_two_places_is_refused(name, files, tmp_path):
    held = load_file(BASE / "model.safetensors")
    shapes = {f"{p}{key}": v.shape for key, v in held.items() if ".layers." in key for p in ("", "language_model.")}
    base = write_base(tmp_path / "base", json.loads((BASE / "config.json").read_text()), shapes)
    path = files[name]
    if name == "tinker":
        path = tmp_path / "t"
        ak.write(ak.Adapter({**llama().updates, Target("lm_head"): (lora(12, 16),)}), path, name)
    with pytest.raises(TargetNotFound, match=r"exactly one module must have this name|2 modules with this name"):
        ak.read(path, name, base)


def test_sniffing_never_raises(tmp_path):
    rng = np.random.default_rng(0)
    for start in (b"", b"GGUF", b"algg", b"PK\3\4", b"\x93NUMPY", b"xxxxTORT", b"\x80\2"):
        for suffix in ("gguf", "pt", "npz", "nemo", "safetensors", "onnx_adapter", "npy"):
            path = tmp_path / f"a.{suffix}"
            path.write_bytes(start + rng.bytes(100))
            assert all(FORMATS[name]().sniff(path) in (True, False) for name in FORMATS)


@pytest.mark.parametrize("name", FILES)
def test_damaged_leftovers_are_refused_or_do_no_harm(name, files, tmp_path):
    adapter = ak.read(files[name], name if name != "tinker" else "tinker", BASE)
    for key in adapter.foreign.data:
        for value in (None, -1, "text", [1], {"a": []}, [["a", "b", {}]], {"lora_parameters": 5}):
            data = {**adapter.foreign.data, key: value}
            spoilt = adapter.replace(foreign=Foreign(name, data, adapter.foreign.tensors))
            path = place(tmp_path, name)
            try:
                ak.write(spoilt, path, name, BASE, "fold")
            except AdapterkitError:
                continue
            assert deltas(ak.read(path, name, BASE)).keys() == deltas(adapter).keys()
