"""Loads adapters in the runtimes that they are written for: each must do what was trained.

    python tools/foreign/check_profiles.py make DIR                        needs adapterkit and gguf
    ENV/bin/python tools/foreign/check_profiles.py run DIR RUNTIME         needs the runtime's own packages
    python tools/foreign/check_profiles.py check DIR                       the table; exit code 1 where one is wrong

The adapter has an alpha other than its rank, and another rank and scale at one module. `make` writes it as adapterkit
writes it for each runtime, and as it should not be: with a scale of 1 for llama.cpp and Keras Hub, as PEFT's folder
for the others. `run` lets the runtime load both on the base, and weights that were merged by the formula in float64,
and keeps log-probabilities of the next token. `check` compares: the runtime must be right with what was written for
it, and wrong, or refuse, with the other; adapterkit's own merge must be right, too. Tunix reads no adapters of other
tools, and Ollama refuses adapters: they get the merge.

| RUNTIME | packages |
|---|---|
| mlx | `mlx`, `mlx-cpu`, `mlx-lm` |
| llama_cpp | `xllamacpp` |
| openvino_genai | `openvino-genai`; `optimum-intel` and its transformers, which export the model |
| executorch | `executorch`, `torchao`; the model is compiled to a .pte file and run by the portable kernels |
| keras_hub | `keras-hub`, `torch` |
| tunix | `google-tunix`, `qwix`, `jax` |
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

FEW = {"model.layers.1.self_attn.v_proj", "model.layers.1.mlp.down_proj"}
"""The modules of an adapter that leaves a layer out."""

CLOSE, APART = 1e-3, 1e-1
"""Largest difference of log-probabilities of a right runtime; smallest of a wrong one."""

SIZES = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": VOCABULARY, "max_position_embeddings": 128, "rms_norm_eps": 1e-5,
    "bos_token_id": 0, "eos_token_id": 0, "tie_word_embeddings": False, "rope_theta": 10000.0,
}  # fmt: skip

Arrays = dict[str, np.ndarray[Any, Any]]


def prompts() -> Any:
    """The token ids that every runtime reads."""
    return np.random.default_rng(3).integers(1, VOCABULARY, (COUNT, LENGTH))


# What runtimes read.


def make(folder: Path) -> None:
    """Write the base, the merged base, and the adapter for each runtime."""
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
    ak.write(adapter, folder / "written.lora.h5", format="keras_hub", base=there, on_loss="fold")
    ak.write(ak.Adapter(unscaled), folder / "unscaled.lora.h5", format="keras_hub", base=there)
    ak.write(adapter, folder / "openvino_genai", format="peft", profile="openvino_genai")
    ak.write(adapter, folder / "executorch", format="peft", profile="executorch")
    few = adapter.replace(updates={target: found for target, found in updates.items() if target.path in FEW})
    ak.write(few, folder / "few", format="peft")
    ak.write(few, folder / "few_executorch", format="peft", base=there, profile="executorch")
    ak.merge(there, few, folder / "few_merged", device="cpu")
    ak.merge(there, adapter, folder / "ours", device="cpu")
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


# Runtimes. Each takes a model and an adapter, or None, and gives log-probabilities.


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


def openvino_genai(model_path: Path, adapter: Path | None) -> Any:
    """OpenVINO GenAI: it tells one number for a continuation, the sum of its log-probabilities."""
    import openvino
    import openvino_genai as genai

    exported = model_path.with_suffix(".ov")
    if not exported.exists():
        _export_for_openvino(model_path, exported)
    loaded = {} if adapter is None else {"adapters": genai.AdapterConfig(genai.Adapter(_weights(adapter)), 1.0)}
    exact = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
    pipeline = genai.LLMPipeline(str(exported), "CPU", **exact, **loaded)
    found = []
    for row in prompts():
        ids, mask = openvino.Tensor(row[None].astype("i8")), openvino.Tensor(np.ones((1, LENGTH), "i8"))
        told = pipeline.generate(genai.TokenizedInputs(ids, mask), max_new_tokens=6, ignore_eos=True, logprobs=1)
        found.append(told.scores[0])
    return np.array(found)


def _export_for_openvino(model_path: Path, exported: Path) -> None:
    """Export a model of transformers, and a tokenizer, without which no pipeline starts."""
    import openvino
    from openvino_tokenizers import convert_tokenizer
    from optimum.intel import OVModelForCausalLM
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    model = OVModelForCausalLM.from_pretrained(model_path, export=True, compile=False, load_in_8bit=False)
    model.save_pretrained(exported)
    bytes_ = Tokenizer(models.BPE(vocab={letter: at for at, letter in enumerate(letters())}, merges=[]))
    bytes_.pre_tokenizer, bytes_.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bytes_, eos_token=letters()[0])
    parts = convert_tokenizer(tokenizer, with_detokenizer=True)
    for name, part in zip(("tokenizer", "detokenizer"), parts, strict=True):
        openvino.save_model(part, exported / f"openvino_{name}.xml")


def _weights(adapter: Path) -> str:
    return str(adapter / "adapter_model.safetensors")


META = {
    "self_attn.q_proj": "attention.wq", "self_attn.k_proj": "attention.wk", "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo", "mlp.gate_proj": "feed_forward.w1", "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3", "post_attention_layernorm": "ffn_norm", "input_layernorm": "attention_norm",
    "model.embed_tokens": "tok_embeddings", "lm_head": "output", "model.norm": "norm", "model.layers": "layers",
}  # fmt: skip
"""Names of transformers -> names of ExecuTorch's llama."""


def executorch(model_path: Path, adapter: Path | None) -> Any:
    """ExecuTorch: its own llama with its own LoRA, compiled, and run by its runtime."""
    import torch
    from executorch.examples.models.llama.model import Llama2Model
    from executorch.exir import to_edge
    from executorch.extension.llm.export.config.llm_config import LlmConfig, LoraConfig
    from executorch.runtime import Runtime
    from safetensors.torch import load_file

    tensors = {}
    for name, tensor in load_file(model_path / "model.safetensors").items():
        for theirs, meta in META.items():
            name = name.replace(theirs, meta)
        tensors[name] = tensor
    torch.save(tensors, model_path / "meta.pth")
    sizes = {
        "dim": SIZES["hidden_size"], "hidden_dim": SIZES["intermediate_size"], "n_layers": SIZES["num_hidden_layers"],
        "n_heads": SIZES["num_attention_heads"], "n_kv_heads": SIZES["num_key_value_heads"], "vocab_size": VOCABULARY,
        "norm_eps": SIZES["rms_norm_eps"], "rope_theta": SIZES["rope_theta"], "use_hf_rope": True,
        "use_scaled_rope": False,
    }  # fmt: skip
    (model_path / "params.json").write_text(json.dumps(sizes))
    config = LlmConfig()
    config.base.checkpoint, config.base.params = str(model_path / "meta.pth"), str(model_path / "params.json")
    config.export.max_seq_length = config.export.max_context_length = 32
    if adapter is not None:
        config.base.lora_config = LoraConfig(
            adapter_checkpoint=_weights(adapter), adapter_config=str(adapter / "adapter_config.json")
        )
    model, ids = Llama2Model(config).get_eager_model().eval(), torch.tensor(prompts())
    with torch.no_grad():
        program = to_edge(torch.export.export(model, (ids[:1],))).to_executorch()
    method = Runtime.get().load_program(program.buffer).load_method("forward")
    return np.stack([torch.log_softmax(method.execute([row[None]])[0][0].flatten(), -1).numpy() for row in ids])


KERAS = [
    "query", "key", "value", "attention_output", "feedforward_gate_dense", "feedforward_intermediate_dense",
    "feedforward_output_dense",
]  # fmt: skip
"""The layers of Keras Hub's llama that the adapter changes; without them, Keras Hub loads only query and value."""


def keras_hub(model_path: Path, adapter: Path | None) -> Any:
    """Keras Hub: it converts folders of transformers."""
    import os

    os.environ["KERAS_BACKEND"] = "torch"
    import h5py
    import keras_hub
    import torch

    model = keras_hub.models.LlamaBackbone.from_preset(str(model_path), dtype="float32")
    if adapter is not None:
        with h5py.File(adapter) as file:
            rank = int(file["lora/vars/rank"][()])
        model.enable_lora(rank, target_layer_names=KERAS)
        model.load_lora_weights(str(adapter))
    with torch.no_grad():
        hidden = model({"token_ids": prompts(), "padding_mask": np.ones_like(prompts())})
        return torch.log_softmax(model.token_embedding(hidden, reverse=True)[:, -1].float(), -1).cpu().numpy()


def tunix(model_path: Path, adapter: Path | None) -> Any:
    """Tunix: it loads weights of transformers into its own models."""
    # Tunix 0.1.7 ignores rope_theta and uses 1,000,000, so base and merge differ from transformers in the same way.
    import jax
    import jax.numpy as jnp
    from tunix.models.llama3.model import ModelConfig
    from tunix.models.llama3.params import create_model_from_safe_tensors

    assert adapter is None
    config = ModelConfig(
        num_layers=SIZES["num_hidden_layers"], vocab_size=VOCABULARY, embed_dim=SIZES["hidden_size"],
        hidden_dim=SIZES["intermediate_size"], num_heads=SIZES["num_attention_heads"],
        head_dim=SIZES["hidden_size"] // SIZES["num_attention_heads"], num_kv_heads=SIZES["num_key_value_heads"],
        rope_theta=int(SIZES["rope_theta"]), norm_eps=SIZES["rms_norm_eps"],
    )  # fmt: skip
    model = create_model_from_safe_tensors(str(model_path), config, dtype=jnp.float32)
    ids = jnp.array(prompts())
    places = jnp.broadcast_to(jnp.arange(LENGTH), ids.shape)
    mask = jnp.broadcast_to(jnp.tril(jnp.ones((LENGTH, LENGTH), bool)), (COUNT, LENGTH, LENGTH))
    logits, _ = model(ids, places, None, mask)
    return np.array(jax.nn.log_softmax(logits[:, -1].astype(jnp.float32)))


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
    "openvino_genai": (openvino_genai, {
        "expected": ("merged", None), "base": ("base", None), "otherwise": ("base", "plain"),
        "written": ("base", "openvino_genai"), "merged": ("ours", None),
    }),
    "executorch": (executorch, {
        "expected": ("merged", None), "base": ("base", None), "otherwise": ("base", "plain"),
        "written": ("base", "executorch"), "merged": ("ours", None),
    }),
    "executorch_few": (executorch, {
        "expected": ("few_merged", None), "base": ("base", None), "otherwise": ("base", "few"),
        "written": ("base", "few_executorch"),
    }),
    "tunix": (tunix, {
        "expected": ("merged", None), "base": ("base", None), "merged": ("ours", None),
    }),
    "keras_hub": (keras_hub, {
        "expected": ("merged", None), "base": ("base", None), "otherwise": ("base", "unscaled.lora.h5"),
        "written": ("base", "written.lora.h5"), "merged": ("ours", None),
    }),
}  # fmt: skip
"""Runtime -> what runs it, and the cases: a model and an adapter."""


def run(folder: Path, name: str) -> None:
    """Let a runtime compute all its cases."""
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
    """Print a row for each case of the runtimes that ran; return 1 where one is wrong."""
    bad = False
    for name in RUNTIMES:
        if not (folder / f"{name}.npz").exists():
            continue
        held = np.load(folder / f"{name}.npz")
        for case in held.files[1:]:
            far = math.inf if held[case].ndim == 0 else float(np.abs(held[case] - held["expected"]).max())
            right = far > APART if case in ("base", "otherwise") else far < CLOSE
            said = str(held[case]) if held[case].ndim == 0 else f"{far:.2e}"
            print(f"{name:<16}{case:<12}{said:<28}{'as it should be' if right else 'WRONG'}")
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
