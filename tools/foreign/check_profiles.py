"""Loads adapters in the run times that they are written for: each must do what was trained.

    python tools/foreign/check_profiles.py make DIR                        needs adapterkit and gguf
    ENV/bin/python tools/foreign/check_profiles.py run DIR RUNTIME         needs the run time's own packages
    python tools/foreign/check_profiles.py check DIR                       the table; exit code 1 where one is wrong

The adapter has an alpha other than its rank, and another rank and scale at one module. `make` writes it as adapterkit
writes it for each run time, and as it should not be: with a scale of 1 for llama.cpp, as PEFT's folder for MLX. `run`
lets the run time load both on the base, and weights that were merged by the formula in float64, and keeps the
log-probabilities of the next token. `check` compares: the run time must be right with what was written for it, and
wrong, or refuse, with the other; adapterkit's own merge of the GGUF base (what Ollama gets) must be right, too.
RUNTIME: mlx (packages `mlx`, `mlx-cpu`, `mlx-lm`), llama_cpp (`xllamacpp`).
"""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

LENGTH, COUNT, VOCABULARY = 12, 4, 256
RANK, SCALE = 4, 8.0
OTHER, OTHER_RANK, OTHER_SCALE = "model.layers.1.self_attn.q_proj", 2, 1.5
"""The module with another rank and scale."""

CLOSE, APART = 1e-3, 1e-1
"""Largest difference of log-probabilities of a right run time; smallest of a wrong one."""

SIZES = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": VOCABULARY, "max_position_embeddings": 128, "rms_norm_eps": 1e-5,
    "bos_token_id": 0, "eos_token_id": 0, "tie_word_embeddings": False, "rope_theta": 10000.0,
}  # fmt: skip

Arrays = dict[str, np.ndarray[Any, Any]]


def prompts() -> Any:
    """The token ids that every run time reads."""
    return np.random.default_rng(3).integers(1, VOCABULARY, (COUNT, LENGTH))


# What run times read.


def make(folder: Path) -> None:
    """Write the base, the merged base, and the adapter for each run time."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    import adapterkit as ak
    from adapterkit.io.lazy import from_numpy
    from adapterkit.methods.lora import LoRA

    random, base = np.random.default_rng(0), weights()
    updates, unscaled, merged = {}, {}, dict(base)
    for name in base:
        path = name.removesuffix(".weight")
        if not path.endswith("_proj"):
            continue
        rank, scale = (OTHER_RANK, OTHER_SCALE) if path == OTHER else (RANK, SCALE)
        outputs, inputs = base[name].shape
        A, B = random.normal(size=(rank, inputs)) / 8, random.normal(size=(outputs, rank)) / 20
        A, B = A.astype("f4"), B.astype("f4")
        update = LoRA(A=from_numpy(A), B=from_numpy(B), scaling=scale)
        updates[ak.Target(path)], unscaled[ak.Target(path)] = (update,), (update.replace(scaling=1.0),)
        merged[name] = (base[name] + scale * B.astype("f8") @ A).astype("f4")
    save(folder / "base", base)
    save(folder / "merged", merged)
    in_gguf(folder / "base", folder / "base.gguf")
    in_gguf(folder / "merged", folder / "merged.gguf")
    adapter, there = ak.Adapter(updates), folder / "base"
    ak.write(adapter, folder / "plain", format="peft")
    ak.write(adapter, folder / "mlx", format="mlx", base=there, on_loss="fold")
    ak.write(adapter, folder / "lora.gguf", format="gguf", base=there, on_loss="fold")
    ak.write(ak.Adapter(unscaled), folder / "unscaled.gguf", format="gguf", base=there, on_loss="fold")
    ak.merge(folder / "base.gguf", adapter, folder / "ours.gguf", device="cpu")


def weights() -> Arrays:
    """The weights of a small llama."""
    hidden, inner = SIZES["hidden_size"], SIZES["intermediate_size"]
    keys = hidden * SIZES["num_key_value_heads"] // SIZES["num_attention_heads"]
    block = {
        "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (keys, hidden), "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, hidden), "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner), "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,),
    }  # fmt: skip
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens": (VOCABULARY, hidden), "model.norm": (hidden,), "lm_head": (VOCABULARY, hidden),
    }  # fmt: skip
    for layer in range(SIZES["num_hidden_layers"]):
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in block.items()}
    random = np.random.default_rng(1)
    return {
        f"{name}.weight": (1 + random.normal(size=shape) / 7 if len(shape) == 1 else random.normal(size=shape) / 7)
        .astype("f4") for name, shape in shapes.items()
    }  # fmt: skip


def save(folder: Path, tensors: Mapping[str, Any]) -> None:
    """Write a folder of transformers."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True)
    save_file(dict(tensors), folder / "model.safetensors", {"format": "pt"})
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **SIZES}
    (folder / "config.json").write_text(json.dumps(config))


def letters() -> list[str]:
    """The 256 bytes as GPT-2 writes them in its vocabulary."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return [chr(byte) if byte in plain else chr(256 + others.index(byte)) for byte in range(256)]


def in_gguf(base: Path, path: Path) -> None:
    """Write the base as llama.cpp's converter does, by gguf-py: the halves of each head lie as pairs of rows."""
    import gguf
    from safetensors.numpy import load_file

    writer = gguf.GGUFWriter(path, "llama")
    heads = {"q_proj": SIZES["num_attention_heads"], "k_proj": SIZES["num_key_value_heads"]}
    writer.add_context_length(SIZES["max_position_embeddings"])
    writer.add_embedding_length(SIZES["hidden_size"])
    writer.add_block_count(SIZES["num_hidden_layers"])
    writer.add_feed_forward_length(SIZES["intermediate_size"])
    writer.add_head_count(heads["q_proj"])
    writer.add_head_count_kv(heads["k_proj"])
    writer.add_rope_dimension_count(SIZES["hidden_size"] // SIZES["num_attention_heads"])
    writer.add_layer_norm_rms_eps(SIZES["rms_norm_eps"])
    writer.add_rope_freq_base(10000.0)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_vocab_size(VOCABULARY)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(letters())
    writer.add_token_types([1] * VOCABULARY)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_add_bos_token(False)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, SIZES["num_hidden_layers"])
    for name, array in load_file(base / "model.safetensors").items():
        count = heads.get(name.split(".")[-2])
        if count is not None:
            rows, width = array.shape
            array = array.reshape(count, 2, rows // count // 2, width).swapaxes(1, 2).reshape(rows, width)
        writer.add_tensor(names.get_name(name, (".weight",)), np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# Run times. Each takes a model and an adapter, or None, and gives log-probabilities.


def mlx(model_path: Path, adapter: Path | None) -> Any:
    """MLX-LM."""
    import mlx.core as mx
    from mlx_lm.tuner.utils import load_adapters
    from mlx_lm.utils import load_model

    model, _ = load_model(model_path)
    if adapter is not None:
        load_adapters(model, str(adapter))
    logits = model(mx.array(prompts()))[:, -1].astype(mx.float32)
    return np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))


def llama_cpp(model_path: Path, adapter: Path | None) -> Any:
    """llama.cpp's server in Python."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.warmup, params.n_parallel = str(model_path), 128, False, 1
    params.cpuparams.n_threads = 1
    if adapter is not None:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
    server = xllamacpp.Server(params)
    found = np.full((COUNT, VOCABULARY), -np.inf)
    for at, row in enumerate(prompts()):
        # Nothing is told where a part of a character is drawn: a letter is drawn, and the others stay as they are.
        drawn = {"max_tokens": 1, "temperature": 0.0, "logit_bias": [[ord("A"), 1000.0]]}
        asked = {"prompt": row.tolist(), "logprobs": VOCABULARY, **drawn}
        told = server.handle_completions(asked)
        for each in told["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
            found[at, each["id"]] = each["logprob"]
    return found


Case = tuple[str, str | None]
RUNTIMES: dict[str, tuple[Callable[[Path, Path | None], Any], dict[str, Case]]] = {
    "mlx": (mlx, {
        "expected": ("merged", None), "base": ("base", None), "otherwise": ("base", "plain"),
        "written": ("base", "mlx"),
    }),
    "llama_cpp": (llama_cpp, {
        "expected": ("merged.gguf", None), "base": ("base.gguf", None), "otherwise": ("base.gguf", "unscaled.gguf"),
        "written": ("base.gguf", "lora.gguf"), "merged": ("ours.gguf", None),
    }),
}  # fmt: skip
"""Run time -> what runs it, and the cases: a model and an adapter."""


def run(folder: Path, name: str) -> None:
    """Let a run time compute all its cases."""
    ask, cases = RUNTIMES[name]
    found: dict[str, Any] = {}
    for case, (model, adapter) in cases.items():
        try:
            found[case] = ask(folder / model, None if adapter is None else folder / adapter)
        except Exception as error:  # A refusal is an answer.
            print(f"{name} {case}: {type(error).__name__}: {str(error)[:300]}")
            found[case] = np.array(f"refused ({type(error).__name__})")
    np.savez(folder / f"{name}.npz", **found)


def check(folder: Path) -> int:
    """Print a row for each case of the run times that ran; return 1 where one is wrong."""
    bad = False
    for name in RUNTIMES:
        if not (folder / f"{name}.npz").exists():
            continue
        held = np.load(folder / f"{name}.npz")
        for case in held.files[1:]:
            far = math.inf if held[case].ndim == 0 else float(np.abs(held[case] - held["expected"]).max())
            right = far > APART if case in ("base", "otherwise") else far < CLOSE
            said = str(held[case]) if held[case].ndim == 0 else f"{far:.2e}"
            print(f"{name:<12}{case:<12}{said:<28}{'as it should be' if right else 'WRONG'}")
            bad |= not right
    return int(bad)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["make", there]:
            shutil.rmtree(there, ignore_errors=True)
            make(Path(there))
        case ["run", there, name]:
            run(Path(there), name)
        case ["check", there]:
            sys.exit(check(Path(there)))
        case _:
            sys.exit(__doc__)
