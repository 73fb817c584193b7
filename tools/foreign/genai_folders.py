"""Builds folders with onnxruntime-genai's builder, and compares changed ones with PEFT; run it in genai's environment.

    python tools/foreign/genai_folders.py make DIR [MODEL ...]
    python tools/foreign/genai_folders.py compare DIR MODEL TYPE ADAPTER FOLDER [FILE.onnx_adapter]

For each tiny random model, `make` writes `base/`, one folder for each type (fp32, fp16, int4), and an adapter by PEFT
for each method. `compare` runs FOLDER with onnxruntime-genai, with FILE in `og.Adapters` if it is given, and the torch
model with PEFT's adapter; for int4, the torch model has the dequantized weights of the graph. It prints the largest
difference of the logits, relative to the largest logit. `check_genai.py` runs both commands.
"""

from __future__ import annotations

import json
import runpy
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

# No layer may have as many outputs as there are tokens: the builder takes such a layer for the head. Its k-quant needs
# inputs that are a multiple of 64.
SIZES = {"vocab_size": 160, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
         "num_attention_heads": 4, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1,
         "eos_token_id": 2}  # fmt: skip
METHODS = ("lora", "dora", "ia3")
TYPES = {
    "fp32": ("fp32", ()), "fp16": ("fp16", ()), "int4": ("int4", ()),
    "int4asym": ("int4", ("is_symmetric=false",)),
    "int4kquant": ("int4", ("algo_config=k_quant_mixed",)),
    "int4apart": ("int4", ("is_symmetric=false", "shared_embeddings=false")),
}  # fmt: skip

TIED = ("gemma",)
"""Models whose head shares the embedding's weight. With zero points, onnxruntime does not load the builder's graph of
them: the embedding reads a tensor of floats as packed numbers. `int4apart` packs the head alone."""


def configs() -> dict[str, tuple[Any, list[str]]]:
    """Return model -> config and the names of the modules that an adapter targets."""
    import transformers as t

    apart = ["q_proj", "v_proj", "gate_proj", "down_proj"]
    grouped = {**SIZES, "num_key_value_heads": 2}
    return {
        "llama": (t.LlamaConfig(**grouped), apart),
        "qwen2": (t.Qwen2Config(**grouped), apart),
        "qwen3": (t.Qwen3Config(**grouped, head_dim=16), apart),
        "phi3": (t.Phi3Config(**grouped, original_max_position_embeddings=128), ["qkv_proj", "o_proj", "gate_up_proj"]),
        "gemma": (t.GemmaConfig(**grouped, head_dim=16), apart),
        **experts(grouped),
    }


def experts(sizes: dict[str, Any]) -> dict[str, tuple[Any, list[str]]]:
    """Return the models whose experts the builder puts into one node."""
    import transformers as t

    several = {**sizes, "num_experts_per_tok": 2}
    kinds = ["sliding_attention", "full_attention"]
    oss = t.GptOssConfig(**several, head_dim=16, num_local_experts=4, layer_types=kinds, sliding_window=8)
    lfm = t.Lfm2MoeConfig(
        **several, moe_intermediate_size=64, num_experts=4, num_dense_layers=1, layer_types=["conv", kinds[1]]
    )
    return {"gptoss": (oss, ["q_proj"]), "lfm2moe": (lfm, ["q_proj"])}


PARAMETERS = {
    "gptoss": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.router.weight"],
    "lfm2moe": ["feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj"],
}
"""Model -> the stacks of experts, and the router, that its LoRA adapts."""


def peft_config(kind: str, targets: list[str], name: str = "") -> Any:
    """Return PEFT's config of one method."""
    import peft

    if name in PARAMETERS:
        return peft.LoraConfig(
            r=4, lora_alpha=8, target_modules=targets, target_parameters=PARAMETERS[name], init_lora_weights=False
        )
    if kind == "ia3":
        return peft.IA3Config(target_modules=targets, feedforward_modules=targets[-1:], init_ia3_weights=False)
    return peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, init_lora_weights=False, use_dora=kind == "dora")


def tokenizer() -> Any:
    """Return a tokenizer of numbers, since the builder copies one."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{str(n): n for n in range(3, SIZES["vocab_size"])}}
    held = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=held, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def make(folder: Path, chosen: Sequence[str]) -> None:
    """Write the chosen models, or all, but for what is there already."""
    import peft
    from transformers import AutoModelForCausalLM

    for name, (config, targets) in configs().items():
        if chosen and name not in chosen:
            continue
        home = folder / name
        if not (home / "base").exists():
            torch.manual_seed(len(name))
            model = AutoModelForCausalLM.from_config(config).eval()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.08 * torch.randn_like(parameter))
            model.save_pretrained(home / "base")
            tokenizer().save_pretrained(home / "base")
            for kind in METHODS if name not in PARAMETERS else METHODS[:1]:
                changed = peft.get_peft_model(
                    AutoModelForCausalLM.from_pretrained(home / "base", trust_remote_code=False),
                    peft_config(kind, targets, name),
                )
                with torch.no_grad():
                    for key, parameter in changed.named_parameters():
                        if "lora_" in key or "ia3_" in key:
                            parameter.add_(0.1 * torch.randn_like(parameter))
                changed.save_pretrained(home / kind)
        for kind, (precision, options) in TYPES.items():
            if name in PARAMETERS and kind != "fp32":  # The dequantized weights of other types are not compared.
                continue
            if kind == "int4apart" and name not in TIED:
                continue
            if (home / kind / "genai_config.json").exists():
                continue
            words = ["-i", home / "base", "-o", home / kind, "-p", precision, "-c", home / "cache",
                     "-e", "cuda" if precision == "fp16" else "cpu"]  # fmt: skip
            error = built([str(word) for word in (*words, *(("--extra_options", *options) if options else ()))])
            print(name, kind, error or "built", flush=True)
            if error:
                (home / f"{kind}.error").write_text(error, encoding="utf-8")


def built(words: list[str]) -> str:
    """Run the builder in this process, since importing its libraries takes longer than a build; return its error."""
    held, sys.argv = sys.argv, ["builder", *words]
    try:
        runpy.run_module("onnxruntime_genai.models.builder", run_name="__main__")
    except (Exception, SystemExit) as error:
        return f"{type(error).__name__}: {error}"
    finally:
        sys.argv = held
    return ""


PROMPT = [5, 17, 44, 90, 3, 61, 8]


def packed_numbers(folder: Path) -> dict[str, np.ndarray]:
    """Return node name -> the numbers of each MatMulNBits' weight, [out, in]."""
    import onnx
    from onnx import numpy_helper

    model = onnx.load(folder / "model.onnx")
    held = {tensor.name: tensor for tensor in model.graph.initializer}
    found = {}
    for node in model.graph.node:
        if node.op_type != "MatMulNBits":
            continue
        told = {each.name: onnx.helper.get_attribute_value(each) for each in node.attribute}
        rows, columns, bits, size = told["N"], told["K"], told["bits"], told["block_size"]
        array = [numpy_helper.to_array(held[name]) if name else None for name in [*node.input[1:4], ""][:3]]
        blocks, per = -(-columns // size), 8 // bits
        q = np.stack([(array[0].reshape(rows, -1) >> (bits * at)) & (2**bits - 1) for at in range(per)], -1)
        q = q.reshape(rows, blocks, size).astype("f4")
        zero: Any = 2 ** (bits - 1)
        if array[2] is not None:
            z = array[2].reshape(rows, -1)
            zero = np.stack([(z >> (bits * at)) & (2**bits - 1) for at in range(per)], -1).reshape(rows, -1)
            zero = zero[:, :blocks, None].astype("f4")
        scale = array[1].reshape(rows, blocks, 1).astype("f4")
        found[node.name] = ((q - zero) * scale).reshape(rows, -1)[:, :columns]
    return found


def with_packed(model: Any, folder: Path) -> None:
    """Give a torch model the numbers of a graph's packed weights."""
    config = model.config
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    queries, keys = config.num_attention_heads * size, config.num_key_value_heads * size
    for name, W in packed_numbers(folder).items():
        words = name.strip("/").split("/")  # model/layers.0/attn/qkv_proj/MatMulNBits
        if words[0] == "lm_head":
            model.lm_head.weight = torch.nn.Parameter(torch.from_numpy(W.copy()))
            # The builder packs both as one tensor, or the head alone.
            if config.tie_word_embeddings and folder.name != "int4apart":
                model.model.embed_tokens.weight = model.lm_head.weight
            continue
        layer = model.model.layers[int(words[1].split(".")[1])]
        block = layer.self_attn if words[2] == "attn" else layer.mlp
        parts: list[tuple[str, np.ndarray]] = [(words[3], W)]
        if words[3] == "qkv_proj" and not hasattr(block, "qkv_proj"):
            cuts = np.split(W, [queries, queries + keys])
            parts = list(zip(("q_proj", "k_proj", "v_proj"), cuts, strict=True))
        if words[3] in ("gate_proj", "up_proj") and hasattr(block, "gate_up_proj"):
            half = block.gate_up_proj.weight.shape[0] // 2
            start = 0 if words[3] == "gate_proj" else half
            block.gate_up_proj.weight.data[start : start + half] = torch.from_numpy(W)
            continue
        for part, rows in parts:
            getattr(block, part).weight.data = torch.from_numpy(rows.copy())


def split_norms(graph: Any) -> None:
    """Compute the norms of queries and keys in nodes before each attention: its CPU kernel does not compute them."""
    from onnx import helper, numpy_helper

    sizes = {tensor.name: tensor.dims[0] for tensor in graph.initializer if len(tensor.dims) == 1}
    nodes = []
    for node in graph.node:
        norms = list(node.input[14:16]) if node.op_type == "GroupQueryAttention" else []
        if not any(norms):
            nodes.append(node)
            continue
        told = {each.name: helper.get_attribute_value(each) for each in node.attribute}
        for at, norm in enumerate(norms):
            stem, size = f"{node.name}/norm_{at}", sizes[norm]
            shapes = {f"{stem}/by_head": [0, 0, -1, size], f"{stem}/whole": [0, 0, -1]}
            graph.initializer.extend(numpy_helper.from_array(np.array(ints), name) for name, ints in shapes.items())
            nodes += [
                helper.make_node("Reshape", [node.input[at], f"{stem}/by_head"], [f"{stem}/heads"]),
                helper.make_node(
                    "SimplifiedLayerNormalization", [f"{stem}/heads", norm], [f"{stem}/normed"], axis=-1,
                    epsilon=told["qk_norm_epsilon"], stash_type=1,
                ),
                helper.make_node("Reshape", [f"{stem}/normed", f"{stem}/whole"], [f"{stem}/out"]),
            ]  # fmt: skip
            node.input[at] = f"{stem}/out"
        kept = [each for each in node.attribute if each.name != "qk_norm_epsilon"]
        del node.attribute[:]
        node.attribute.extend(kept)
        del node.input[14:]
        nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)


def exact(folder: Path) -> Path:
    """Return a copy that runs on the CPU, and whose packed layers do not round what they read."""
    import onnx

    copy = folder.with_name(f"{folder.name}.exact")
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder, copy)
    config = json.loads((copy / "genai_config.json").read_text())
    config["model"]["decoder"]["session_options"]["provider_options"] = []
    (copy / "genai_config.json").write_text(json.dumps(config))
    model = onnx.load(copy / "model.onnx", load_external_data=False)
    for node in model.graph.node:
        kept = [each for each in node.attribute if each.name != "accuracy_level"]
        del node.attribute[:]
        node.attribute.extend(kept)
    split_norms(model.graph)
    onnx.save(model, copy / "model.onnx")
    return copy


def compare(folder: Path, name: str, kind: str, adapter: str, changed: Path, file: Path | None) -> dict[str, Any]:
    """Return how far a folder is from PEFT."""
    import onnxruntime_genai as og
    import peft
    from transformers import AutoModelForCausalLM

    home = folder / name
    if (error := home / f"{kind}.error").exists():
        raise RuntimeError(f"the builder does not build this folder: {error.read_text(encoding='utf-8')}")
    model = AutoModelForCausalLM.from_pretrained(home / "base", dtype=torch.float32, trust_remote_code=False)
    if kind.startswith("int4"):
        with_packed(model, home / kind)
    if adapter != "none":
        model = peft.PeftModel.from_pretrained(model, home / adapter)
    model = model.eval()
    with torch.no_grad():
        wanted = model(torch.tensor([PROMPT])).logits[0].numpy()
        theirs = model.generate(
            torch.tensor([PROMPT]), max_new_tokens=8, min_new_tokens=8, do_sample=False, pad_token_id=0
        )[0]
    copy = exact(changed)
    held = og.Model(str(copy))
    params = og.GeneratorParams(held)
    params.set_search_options(max_length=len(PROMPT) + 8, do_sample=False)
    generator = og.Generator(held, params)
    adapters = None
    if file is not None:
        adapters = og.Adapters(held)
        adapters.load(str(file), "one")
        generator.set_active_adapter(adapters, "one")
    generator.append_tokens(np.array([PROMPT], dtype=np.int32))
    got = np.asarray(generator.get_output("logits"), dtype=np.float32)[0]
    found = {"difference": float(abs(got - wanted).max() / abs(wanted).max())}
    while not generator.is_done():
        generator.generate_next_token()
    written = list(generator.get_sequence(0))
    found["same_tokens"] = [int(one) for one in theirs][: len(written)] == [int(one) for one in written]
    return found


def told(home: Path, words: list[str]) -> dict[str, Any]:
    """Return what a comparison came to."""
    try:
        return compare(home, words[0], words[1], words[2], Path(words[3]), Path(words[4]) if len(words) > 4 else None)
    except Exception as error:  # Whatever the library raises is what came of the folder.
        return {"error": f"{type(error).__name__}: {error}"[:300]}


def main() -> int:
    """Run the command line; `compare DIR` alone answers lines of words on standard input."""
    verb, home, *words = sys.argv[1:]
    if verb == "make":
        make(Path(home), words)
    elif words:
        print(json.dumps(told(Path(home), words)))
    else:
        for line in sys.stdin:
            print(f"told {json.dumps(told(Path(home), json.loads(line)))}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
