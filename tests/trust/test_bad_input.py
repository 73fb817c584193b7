"""Bad files of every format in the registry: a typed error that names what is wrong, and nothing written."""

import re
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from format_vectors import BESIDE, EVERY, ROOT, base, source
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import adapterkit as ak
from adapterkit.errors import AdapterkitError, Malformed
from adapterkit.formats import FORMATS
from adapterkit.io.gguf_file import read_gguf, write_gguf
from adapterkit.io.hdf5 import read_hdf5, write_hdf5
from adapterkit.io.lazy import from_numpy
from adapterkit.io.ort_adapter import OrtAdapter, read_ort_adapter, write_ort_adapter

NATIVE = ROOT / "methods" / "lora.adapter.safetensors"
FIRST = {"adapterhub": "lora_bert", "diffusers": "plain", "lycoris": "locon_rs", "peft": "lora_bias"}
"""Which of a format's vectors is spoilt, where it is not the first; LoRA's, where there is one."""
WITH_BASE = {"gguf", "litgpt", "mlx", "torchtune"}
FACTOR = re.compile(
    r"(?i)lora_?[ab]\b|lora_(embedding|kernel)_[ab]|lora[_.](down|up)|linear_(in|out)|hada_w\d_[ab]"
    r"|\.(down|up)\.weight|\.[ab]$"
)
FOREIGN = "zz.of_another.dialect_w1"


def is_factor(key):
    """Whether a key's tensor makes no sense without another."""
    return bool(FACTOR.search(key)) and not key.endswith("bias")


def vector(name):
    """A folder of files of the format."""
    found = [folder for folder in EVERY if folder.parent.name == name]
    return next((folder for folder in found if folder.name == FIRST.get(name)), None) or next(
        (folder for folder in found if "lora" in folder.name), found[0]
    )


def spoilable(name, folder):
    """A copy of a format's files, what a user names of it, and the base it is read with."""
    folder = folder / "files"
    if name == "adapterkit":
        folder.mkdir()
        return Path(shutil.copy(NATIVE, folder)), None
    own = vector(name)
    shutil.copytree(own, folder, ignore=lambda _, names: [n for n in names if n.startswith(BESIDE)])
    named = source(own)
    on = ROOT / "bases" / "llama" if name in WITH_BASE else base(own)
    return folder if named == own else folder / named.name, on


def whole(name, path, on):
    ak.read(path, name, on).check_values()


def refused(name, path, on, out):
    """It is read by name with a typed error; and converting it writes nothing."""
    with pytest.raises(AdapterkitError) as raised:
        whole(name, path, on)
    error = raised.value
    assert error.why
    assert error.cure
    assert str(path.parent) in str(error) or str(path) in str(error)
    with pytest.raises(AdapterkitError):
        ak.write(ak.read(path, name, on), out, "adapterkit")
    return error


@pytest.fixture(params=list(FORMATS))
def good(request, tmp_path):
    return request.param, *spoilable(request.param, tmp_path)


def of(*names):
    """Of some formats alone."""
    return pytest.mark.parametrize("good", names, indirect=True)


KEYS = set(FORMATS) - {"nemo", "tensorrt_llm"}
"""Formats whose files have keys; NeMo's are in an archive inside another."""


def test_what_is_spoilt_here_was_good(good):
    whole(*good)


def test_a_file_that_is_cut_is_refused(good, tmp_path):
    name, path, on = good
    folder = path if path.is_dir() else path.parent
    for file in sorted(folder.iterdir()):
        data = file.read_bytes()
        # An archive of tar ends in zeros, which nothing is lost without.
        end = len(data.rstrip(b"\0"))
        for cut in (0, 1, end // 3, 2 * end // 3) if file.suffix != ".yaml" else (0,):
            file.write_bytes(data[:cut])
            if file.name == "model_config.yaml":
                continue
            with pytest.raises(AdapterkitError):
                whole(name, path, on)
            with pytest.raises(AdapterkitError):
                ak.write(cut_off(name, path, on), tmp_path / "out", "adapterkit")
            assert not (tmp_path / "out").exists()
        file.write_bytes(data)
    whole(name, path, on)


def cut_off(name, path, on):
    adapter = ak.read(path, name, on)
    adapter.check_values()
    return adapter


def changed(path, change):
    """Gives the file of tensors of a format other tensors."""
    file = next(f for f in sorted(path.iterdir()) if f.suffix in KEYED) if path.is_dir() else path
    KEYED[file.suffix](file, change)


def _safetensors(file, change):
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    save_file(change(load_file(file)), file, metadata)


def _torch(file, change):
    held = torch.load(file, weights_only=True)
    inner = next((key for key in ("model", "model_state_dict", "string_to_param") if key in held), None)
    tensors = change(dict(held if inner is None else held[inner]))
    torch.save(tensors if inner is None else {**held, inner: tensors}, file)


def _gguf(file, change):
    read = read_gguf(file)
    tensors = {key: torch.from_numpy(np.array(leaf.numpy())) for key, leaf in read.tensors.items()}
    write_gguf(file, read.values, {k: from_numpy(v.numpy()) for k, v in change(tensors).items()}, {})


def _ort(file, change):
    read = read_ort_adapter(file)
    tensors = {key: torch.from_numpy(np.array(leaf.numpy())) for key, leaf in read.tensors.items()}
    write_ort_adapter(file, OrtAdapter({k: from_numpy(v.numpy()) for k, v in change(tensors).items()}))


def _npz(file, change):
    arrays = {key: torch.from_numpy(value) for key, value in np.load(file).items()}
    np.savez(file, **{key: value.numpy() for key, value in change(arrays).items()})


def _hdf5(file, change):
    tensors, _ = read_hdf5(file)
    arrays = {key: torch.from_numpy(np.array(leaf.numpy())) for key, leaf in tensors.items()}
    write_hdf5(file, {k: from_numpy(v.numpy()) for k, v in change(arrays).items()}, {})


KEYED = {
    ".safetensors": _safetensors, ".pt": _torch, ".bin": _torch, ".lora": _torch, ".gguf": _gguf,
    ".onnx_adapter": _ort, ".npz": _npz, ".h5": _hdf5,
}  # fmt: skip


@of(*sorted(KEYS))
def test_a_key_of_another_format_is_refused_by_name(good, tmp_path):
    name, path, on = good
    changed(path, lambda tensors: {**tensors, FOREIGN: torch.ones(2, 2)})
    error = refused(name, path, on, tmp_path / "out")
    assert "dialect_w1" in str(error)
    assert not (tmp_path / "out").exists()


@of(*sorted(KEYS - {"textual_inversion"}))
def test_a_factor_without_its_partner_is_refused(good, tmp_path):
    name, path, on = good
    keys = []
    changed(path, lambda tensors: keys.extend(filter(is_factor, tensors)) or tensors)
    assert keys
    folder = path if path.is_dir() else path.parent
    before = {file: file.read_bytes() for file in folder.iterdir()}
    for key in keys[:4]:
        changed(path, lambda tensors, key=key: {k: v for k, v in tensors.items() if k != key})
        refused(name, path, on, tmp_path / "out")
        assert not (tmp_path / "out").exists()
        for file, data in before.items():
            file.write_bytes(data)


BIASED = [
    folder
    for folder in EVERY
    for file in folder.glob("a*.safetensors")
    if any(key.endswith("lora_B.bias") for key in load_file(file))
]


@pytest.mark.parametrize("folder", BIASED, ids=lambda folder: f"{folder.parent.name}-{folder.name}")
def test_a_bias_that_other_modules_have_is_missed(folder, tmp_path):
    path = tmp_path / "files"
    shutil.copytree(folder, path, ignore=lambda _, names: [n for n in names if n.startswith(BESIDE)])
    file = next(path.glob("*.safetensors"))
    name, tensors = folder.parent.name, load_file(file)
    on = path if (path / "adapter_config.json").exists() else file
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    for key in [key for key in tensors if key.endswith("lora_B.bias")]:
        save_file({k: v for k, v in tensors.items() if k != key}, file, metadata)
        assert isinstance(refused(name, on, base(folder), tmp_path / "out"), Malformed)
        assert not (tmp_path / "out").exists()


ALPHA_ZERO = {
    "litgpt": ("hyperparameters.yaml", r"lora_alpha: .*", "lora_alpha: 0"),
    "loralib": ("loralib.json", r'"alpha": [\d.]+', '"alpha": 0'),
    "megatron": ("megatron.json", r'"alpha": [\d.]+', '"alpha": 0'),
    "minlora": ("minlora.json", r'"alpha": [\d.]+', '"alpha": 0'),
    "tinker": ("adapter_config.json", r'"lora_alpha": \d+', '"lora_alpha": 0'),
    "torchtune": ("torchtune.json", r'"alpha": [\d.]+', '"alpha": 0'),
}  # fmt: skip
"""Where formats that need an alpha say it; kohya's and LyCORIS' keys, and NeMo's archive, have tests of their own."""


@pytest.mark.parametrize("name", ALPHA_ZERO)
@pytest.mark.parametrize("absent", [True, False])
def test_an_alpha_of_zero_or_none_is_refused(name, absent, tmp_path):
    path, on = spoilable(name, tmp_path)
    file, pattern, zero = ALPHA_ZERO[name]
    where = (path if path.is_dir() else path.parent) / file
    if not where.exists():
        where.write_text('{"alpha": 4.0}')
    whole(name, path, on)
    text, count = re.subn(pattern, '"other": 1' if absent and file.endswith("json") else "" if absent else zero,
                          where.read_text())  # fmt: skip
    assert count
    where.write_text(text)
    refused(name, path, on, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@of("litgpt", "loralib", "minlora", "nola", "torchtune")
def test_archives_of_torch_that_lie_about_sizes_are_refused(good):
    name, path, on = good
    file = next(f for f in ([*path.iterdir()] if path.is_dir() else [path]) if zipfile.is_zipfile(f))
    with zipfile.ZipFile(file) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    data = next(key for key in members if key.endswith("/data/0"))
    members[data] = members[data][:-4]
    with zipfile.ZipFile(file, "w") as archive:
        for key, content in members.items():
            archive.writestr(key, content)
    with pytest.raises(Malformed):
        whole(name, path, on)
