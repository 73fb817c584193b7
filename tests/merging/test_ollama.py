"""Modelfiles: their path leads to the merged model from where they lie, and what Ollama cannot read is refused."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
from command_line import run
from safetensors.numpy import save_file

import adapterkit as ak
from adapterkit.errors import StorageError, Unsupported, UsageError
from adapterkit.io.lazy import from_numpy
from adapterkit.merging.companions import write_modelfile
from adapterkit.methods.lora import LoRA

W = np.linspace(-1, 1, 16 * 32, dtype=np.float32).reshape(16, 32)


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    A, B = (from_numpy(np.full(shape, 0.1, np.float32)) for shape in ((2, 32), (16, 2)))
    target = ak.Target("model.layers.0.mlp.down_proj")
    ak.write(ak.Adapter({target: (LoRA(A=A, B=B, scaling=2.0),)}), tmp_path / "lora", format="peft")
    return tmp_path / "lora"


def in_gguf(path: Path) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    kind = gguf.GGMLQuantizationType.Q8_0
    writer.add_tensor("blk.0.ffn_down.weight", gguf.quants.quantize(W, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def folder(path: Path, **config: object) -> Path:
    path.mkdir()
    save_file({"model.layers.0.mlp.down_proj.weight": W}, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    return path


def named(modelfile: Path) -> Path:
    """What FROM names, as Ollama reads it: the rest of the line, relative to the Modelfile."""
    (line,) = modelfile.read_text().splitlines()
    word, _, rest = line.partition(" ")
    assert word == "FROM"
    return (modelfile.parent / rest).resolve()


def test_a_modelfile_beside_a_gguf_model_names_it(lora: Path, tmp_path: Path) -> None:
    base, out = in_gguf(tmp_path / "base.gguf"), tmp_path / "my merged.gguf"
    words = ("merge", base, lora, "-o", out, "--for", "ollama")
    told = json.loads(run(*words, "--json").stdout)
    assert told["modelfile"] == str(tmp_path / "my merged.Modelfile")
    assert named(Path(told["modelfile"])) == out.resolve()
    # The same command again is right, and another Modelfile is not replaced without being asked to.
    assert run(*words).exit_code == 0
    Path(told["modelfile"]).write_text("FROM llama3\n")
    refused = run(*words)
    assert (refused.exit_code, "--overwrite" in refused.output) == (6, True)
    assert run(*words, "--overwrite").exit_code == 0
    assert named(Path(told["modelfile"])) == out.resolve()


def test_a_modelfile_in_a_folder_names_the_folder(lora: Path, tmp_path: Path) -> None:
    out = tmp_path / "merged"
    said = run("merge", folder(tmp_path / "base"), lora, "-o", out, "--for", "ollama")
    assert said.exit_code == 0, said.output
    assert f"ollama create NAME -f {out / 'Modelfile'}" in said.output
    assert named(out / "Modelfile") == out.resolve()
    assert ak.verify(out, tmp_path / "base", lora).ok


def test_what_ollama_cannot_read_is_refused(tmp_path: Path) -> None:
    quantization = {"quant_method": "gptq", "bits": 4, "group_size": -1}
    packed = folder(tmp_path / "packed", quantization_config=quantization)
    with pytest.raises(Unsupported, match="quantized weights only from GGUF"):
        write_modelfile(packed)
    single = tmp_path / "one.safetensors"
    save_file({"w": W}, single)
    with pytest.raises(Unsupported, match="single weight files"):
        write_modelfile(single)
    several = [tmp_path / f"model-0000{at}-of-00002.gguf" for at in (1, 2)]
    in_gguf(several[0])
    several[1].write_bytes(several[0].read_bytes().replace(b"blk.0", b"blk.1"))
    with pytest.raises(Unsupported, match="one file"):
        write_modelfile(several[0])
    with pytest.raises(UsageError, match="cannot contain this name"):
        write_modelfile(in_gguf(tmp_path / "two\nlines.gguf"))
    with pytest.raises(StorageError):
        write_modelfile(tmp_path / "absent.gguf")
    assert not list(tmp_path.glob("**/*odelfile"))
