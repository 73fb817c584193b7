"""Loads adapters in the run times that profiles are for: what is written for a run time must do what was trained.

    python tools/foreign/check_profiles.py make DIR                        needs adapterkit, transformers and gguf
    ENV/bin/python tools/foreign/check_profiles.py run DIR RUNTIME         needs the run time's own packages
    python tools/foreign/check_profiles.py check DIR                       the table; exit code 1 where one is wrong

The adapter has alpha = 4 r, rank-stabilised scaling and another alpha and rank at one module, which most run times do
not read. `make` writes it as PEFT trained it (for llama.cpp: as a GGUF file with a scale of 1) and as adapterkit writes
it for each run time. `run` lets the run time load both, next to the base, and keeps the log-probabilities of the next
token. `check` compares them with transformers on weights merged by the formula in float64: the run time must be right
with what was written for it, and wrong, or refuse, with the other; otherwise the profile would not be needed. RUNTIME:
mlx (`mlx`, `mlx-cpu`, `mlx-lm`), llama_cpp (`xllamacpp`), executorch (`executorch`), openvino_genai (`openvino-genai`,
`optimum-intel`).
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

LENGTH, COUNT, VOCABULARY = 12, 4, 256
RANK, ALPHA = 4, 16
OTHER, OTHER_RANK, OTHER_ALPHA = "layers.1.self_attn.q_proj", 2, 3
"""The module whose rank and alpha are in the patterns."""

CLOSE, APART = 2e-3, 2e-2
"""Largest difference of log-probabilities of a right run time; smallest of a wrong one."""

SIZES = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": VOCABULARY, "max_position_embeddings": 128, "initializer_range": 0.1,
    "rms_norm_eps": 1e-5, "bos_token_id": 0, "eos_token_id": 0, "tie_word_embeddings": False,
}  # fmt: skip


def prompts() -> Any:
    """The token ids that every run time reads."""
    return np.random.default_rng(3).integers(1, VOCABULARY, (COUNT, LENGTH))


# What run times read.


def make(folder: Path) -> None:
    """Write the base, the adapter as PEFT and for each run time, and what transformers computes."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    import torch
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import load_file
    from transformers import LlamaConfig, LlamaForCausalLM

    import adapterkit as ak

    torch.manual_seed(0)
    base = folder / "base"
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(base)
    tokenizer(base)
    config = LoraConfig(
        r=RANK, lora_alpha=ALPHA, use_rslora=True, target_modules="all-linear", rank_pattern={OTHER: OTHER_RANK},
        alpha_pattern={OTHER: OTHER_ALPHA},
    )  # fmt: skip
    adapted = get_peft_model(LlamaForCausalLM.from_pretrained(base), config)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    adapted.save_pretrained(folder / "plain")
    for profile in ("executorch", "openvino_genai"):
        ak.convert(folder / "plain", folder / profile, to="peft", profile=profile, on_loss="fold")
    ak.convert(folder / "plain", folder / "mlx", to="mlx", base=base, on_loss="fold")
    ak.convert(folder / "plain", folder / "llama_cpp.gguf", to="gguf", base=base, on_loss="fold")
    adapter = ak.read(folder / "plain")
    unscaled = {target: tuple(each.replace(scaling=1.0) for each in found) for target, found in adapter.updates.items()}
    ak.write(
        adapter.replace(updates=unscaled), folder / "llama_cpp_plain.gguf", format="gguf", base=base, on_loss="fold"
    )
    in_gguf(base, folder / "base.gguf")
    lora = load_file(folder / "plain" / "adapter_model.safetensors")
    model = LlamaForCausalLM.from_pretrained(base)
    with torch.no_grad():
        alone = model(torch.from_numpy(prompts())).logits[:, -1].log_softmax(-1)
        for name, parameter in model.named_parameters():
            module = f"base_model.model.{name.removesuffix('.weight')}"
            if f"{module}.lora_A.weight" in lora:
                A, B = (lora[f"{module}.lora_{one}.weight"].double() for one in "AB")
                alpha = OTHER_ALPHA if OTHER in name else ALPHA
                parameter += (alpha / math.sqrt(len(A)) * B @ A).float()
        adapted = model(torch.from_numpy(prompts())).logits[:, -1].log_softmax(-1)
    np.savez(folder / "expected.npz", alone=alone, adapted=adapted)


def letters() -> list[str]:
    """The 256 bytes as GPT-2 writes them in its vocabulary."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return [chr(byte) if byte in plain else chr(256 + others.index(byte)) for byte in range(256)]


def tokenizer(base: Path) -> None:
    """Write a tokenizer of single bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE({letter: at for at, letter in enumerate(letters())}, []))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=made, eos_token=letters()[0]).save_pretrained(base)


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


# Run times. Each takes the folder and an adapter, or None for the base alone, and gives log-probabilities.


def mlx(folder: Path, adapter: Path | None) -> Any:
    """MLX-LM."""
    import mlx.core as mx
    from mlx_lm.tuner.utils import load_adapters
    from mlx_lm.utils import load_model

    model, _ = load_model(folder / "base")
    if adapter is not None:
        load_adapters(model, str(adapter))
    logits = model(mx.array(prompts()))[:, -1].astype(mx.float32)
    return np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))


def llama_cpp(folder: Path, adapter: Path | None) -> Any:
    """llama.cpp's server in Python; it refuses a folder."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.warmup, params.n_parallel = str(folder / "base.gguf"), 128, False, 1
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


def executorch(folder: Path, adapter: Path | None) -> Any:
    """The model that ExecuTorch's llama example exports, with its own reader of adapters."""
    import torch
    from executorch.examples.models.llama.model import Llama2Model
    from executorch.extension.llm.export.config.llm_config import LlmConfig, LoraConfig
    from safetensors.torch import load_file

    words = {
        "model.embed_tokens": "tok_embeddings", "model.norm": "norm", "lm_head": "output", "model.layers": "layers",
        "self_attn.q_proj": "attention.wq", "self_attn.k_proj": "attention.wk", "self_attn.v_proj": "attention.wv",
        "self_attn.o_proj": "attention.wo", "mlp.gate_proj": "feed_forward.w1", "mlp.down_proj": "feed_forward.w2",
        "mlp.up_proj": "feed_forward.w3", "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm",
    }  # fmt: skip
    state = {}
    for name, tensor in load_file(folder / "base" / "model.safetensors").items():
        for old, new in words.items():
            name = name.replace(old, new)
        state[name] = tensor
    torch.save(state, folder / "executorch.pth")
    params = {
        "dim": SIZES["hidden_size"], "hidden_dim": SIZES["intermediate_size"], "n_layers": SIZES["num_hidden_layers"],
        "n_heads": SIZES["num_attention_heads"], "n_kv_heads": SIZES["num_key_value_heads"],
        "vocab_size": VOCABULARY, "norm_eps": SIZES["rms_norm_eps"], "use_hf_rope": True,
    }  # fmt: skip
    (folder / "executorch.json").write_text(json.dumps(params))
    config = LlmConfig()
    config.base.checkpoint, config.base.params = str(folder / "executorch.pth"), str(folder / "executorch.json")
    config.model.use_kv_cache, config.debug.generate_full_logits = False, True
    config.model.enable_dynamic_shape = False
    if adapter is not None:
        weights, said = (str(adapter / name) for name in ("adapter_model.safetensors", "adapter_config.json"))
        config.base.lora_config = LoraConfig(adapter_checkpoint=weights, adapter_config=said)
    model = Llama2Model(config).get_eager_model().eval()
    with torch.no_grad():
        rows = [model(torch.from_numpy(row[None])) for row in prompts()]
    logits = torch.cat([row[0] if isinstance(row, tuple) else row for row in rows])
    return (logits[:, -1] if logits.ndim == 3 else logits).log_softmax(-1).numpy()


def openvino_genai(folder: Path, adapter: Path | None) -> Any:
    """Log-probabilities are not to be had for all tokens: 1 where the greedy continuation has a token, 0 elsewhere."""
    import openvino
    import openvino_genai as genai
    from openvino_tokenizers import convert_tokenizer
    from optimum.intel import OVModelForCausalLM
    from transformers import AutoTokenizer

    there = folder / "openvino"
    if not there.exists():
        OVModelForCausalLM.from_pretrained(folder / "base", export=True, load_in_8bit=False).save_pretrained(there)
        pair = convert_tokenizer(AutoTokenizer.from_pretrained(folder / "base"), with_detokenizer=True)
        for model, name in zip(pair, ("openvino_tokenizer", "openvino_detokenizer"), strict=True):
            openvino.save_model(model, there / f"{name}.xml")
    more = {}
    if adapter is not None:
        more["adapters"] = genai.AdapterConfig(genai.Adapter(str(adapter / "adapter_model.safetensors")), 1.0)
    pipeline = genai.LLMPipeline(str(there), "CPU", INFERENCE_PRECISION_HINT="f32", **more)
    found = np.zeros((COUNT, VOCABULARY))
    for at, row in enumerate(prompts()):
        ids = openvino.Tensor(row[None].astype(np.int64))
        given = genai.TokenizedInputs(ids, openvino.Tensor(np.ones_like(row[None], np.int64)))
        told = pipeline.generate(given, max_new_tokens=1, do_sample=False, ignore_eos=True)
        found[at, told.tokens[0][0]] = 1
    return found


RUNTIMES: dict[str, tuple[Callable[[Path, Path | None], Any], str, str]] = {
    "mlx": (mlx, "plain", "mlx"), "llama_cpp": (llama_cpp, "llama_cpp_plain.gguf", "llama_cpp.gguf"),
    "executorch": (executorch, "plain", "executorch"), "openvino_genai": (openvino_genai, "plain", "openvino_genai"),
}  # fmt: skip
"""Run time -> what runs it, what it must not get right, and what adapterkit wrote for it."""


def run(folder: Path, name: str) -> None:
    """Let a run time load the base, the plain folder and what was written for it."""
    ask, plain, written = RUNTIMES[name]
    found: dict[str, Any] = {}
    for case, adapter in {"alone": None, "plain": folder / plain, "written": folder / written}.items():
        try:
            found[case] = ask(folder, adapter)
        except Exception as error:  # A refusal is an answer.
            print(f"{name} {case}: {type(error).__name__}: {str(error)[:300]}")
            found[case] = np.array(f"{type(error).__name__}: {str(error).strip().splitlines()[0][:80]}")
    np.savez(folder / f"{name}.npz", **found)


def check(folder: Path) -> int:
    """Print a row for each run time that ran; return 1 where one is wrong."""
    expected, bad = np.load(folder / "expected.npz"), 0
    print(f"{'run time':<16}{'the base':<14}{'plain folder':<44}{'written for it':<14}")
    for name in RUNTIMES:
        if not (folder / f"{name}.npz").exists():
            continue
        held = np.load(folder / f"{name}.npz")
        wanted = {"alone": expected["alone"], "plain": expected["adapted"], "written": expected["adapted"]}
        said = {case: _apart(held[case], want) for case, want in wanted.items()}
        right = said["alone"] < CLOSE and said["written"] < CLOSE and said["plain"] > APART
        bad |= not right
        plain = str(held["plain"])[:42] if held["plain"].ndim == 0 else f"{said['plain']:.2e}"
        verdict = "" if right else "WRONG"
        print(f"{name:<16}{said['alone']:<14.2e}{plain:<44}{said['written']:<14.2e}{verdict}")
    return int(bad)


def _apart(found: Any, wanted: Any) -> float:
    """The largest difference; of greedy tokens, the part that differs; infinite for a refusal."""
    if found.ndim == 0:
        return math.inf
    if set(np.unique(found)) <= {0.0, 1.0}:
        return float((found.argmax(1) != wanted.argmax(1)).mean())
    return float(np.abs(found - wanted).max())


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["make", there]:
            make(Path(there))
        case ["run", there, name]:
            run(Path(there), name)
        case ["check", there]:
            sys.exit(check(Path(there)))
        case _:
            sys.exit(__doc__)
