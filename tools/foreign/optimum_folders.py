"""Exports folders of graphs with optimum, and compares changed ones with PEFT; run it in optimum's environment.

    python tools/foreign/optimum_folders.py make DIR [MODEL ...]
    python tools/foreign/optimum_folders.py compare DIR MODEL ADAPTER FOLDER

For each tiny random model, `make` writes `base/`, `onnx/` (optimum's folder) and an adapter by PEFT for each method.
`compare` loads FOLDER with optimum's `ORTModelFor...`; slots get their values from the adapter file beside each graph.
It prints the largest difference of the outputs from those of the torch model with PEFT's adapter, and whether both
generate the same tokens. `check_optimum.py` runs both commands.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

SMALL = {"vocab_size": 99, "max_position_embeddings": 64}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
ENDS = {**TOKENS, "decoder_start_token_id": 1}
TYPES = ("lora", "dora", "ia3", "ln")
NORMS = {
    "whisper": ["self_attn_layer_norm", "final_layer_norm"], "t5": ["layer_norm", "final_layer_norm"],
    "bart": ["self_attn_layer_norm", "final_layer_norm"], "gpt2": ["ln_1", "ln_f"],
    "llama": ["input_layernorm", "norm"], "mistral": ["input_layernorm", "norm"], "bert": ["LayerNorm"],
    "vit": ["layernorm_before", "layernorm"],
}  # fmt: skip
"""Model -> its norms, which LN tuning changes."""


def configs() -> dict[str, tuple[Any, str, list[str]]]:
    """Return model -> config, optimum's task, and the names of the modules that an adapter targets."""
    import transformers as t

    llama = {**SMALL, **TOKENS, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
    return {
        "whisper": (t.WhisperConfig(vocab_size=99, d_model=32, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=48,
            decoder_ffn_dim=48, encoder_attention_heads=4, decoder_attention_heads=4, num_mel_bins=8,
            max_source_positions=1500, max_target_positions=64, begin_suppress_tokens=None, suppress_tokens=None,
            **ENDS), "automatic-speech-recognition-with-past", ["q_proj", "v_proj", "fc1", "fc2"]),
        "t5": (t.T5Config(vocab_size=99, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_decoder_layers=2, num_heads=4,
            feed_forward_proj="gated-gelu", decoder_start_token_id=0, pad_token_id=0, eos_token_id=2),
            "text2text-generation-with-past", ["q", "v", "wi_0", "wo"]),
        "bart": (t.BartConfig(**SMALL, d_model=32, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=48,
            decoder_ffn_dim=48, encoder_attention_heads=4, decoder_attention_heads=4, forced_eos_token_id=None, **ENDS),
            "text2text-generation-with-past", ["q_proj", "v_proj", "fc1", "fc2"]),
        "gpt2": (t.GPT2Config(vocab_size=99, n_positions=64, n_embd=32, n_layer=2, n_head=4, bos_token_id=1,
            eos_token_id=2), "text-generation-with-past", ["c_attn", "c_fc", "mlp.c_proj"]),
        "llama": (t.LlamaConfig(**llama), "text-generation-with-past", ["q_proj", "v_proj", "down_proj"]),
        "mistral": (t.MistralConfig(**llama), "text-generation-with-past", ["q_proj", "v_proj", "down_proj"]),
        "bert": (t.BertConfig(**SMALL, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4), "text-classification", ["query", "value", "output.dense"]),
        "vit": (t.ViTConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            image_size=32, patch_size=8), "image-classification", ["query", "value", "output.dense"]),
    }  # fmt: skip


KINDS = {
    "automatic-speech-recognition-with-past": ("AutoModelForSpeechSeq2Seq", "ORTModelForSpeechSeq2Seq"),
    "text2text-generation-with-past": ("AutoModelForSeq2SeqLM", "ORTModelForSeq2SeqLM"),
    "text-generation-with-past": ("AutoModelForCausalLM", "ORTModelForCausalLM"),
    "text-classification": ("AutoModelForSequenceClassification", "ORTModelForSequenceClassification"),
    "image-classification": ("AutoModelForImageClassification", "ORTModelForImageClassification"),
}


def peft_config(kind: str, name: str, targets: list[str]) -> Any:
    """Return PEFT's config of one method."""
    import peft

    if kind == "ln":
        return peft.LNTuningConfig(target_modules=NORMS[name])
    if kind == "ia3":
        return peft.IA3Config(target_modules=targets, feedforward_modules=targets[-1:], init_ia3_weights=False)
    return peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, init_lora_weights=False, use_dora=kind == "dora")


def make(folder: Path, chosen: Sequence[str]) -> None:
    """Write the chosen models, or all, but for what is there already."""
    import peft
    import transformers

    for name, (config, task, targets) in configs().items():
        if chosen and name not in chosen:
            continue
        home = folder / name
        auto = getattr(transformers, KINDS[task][0])
        torch.manual_seed(len(name))
        if not (home / "done").exists():
            _make_model(home, name, auto, config, task)
        for kind in TYPES:
            if (home / kind).exists():
                continue
            changed = peft.get_peft_model(
                auto.from_pretrained(home / "base", trust_remote_code=False), peft_config(kind, name, targets)
            )
            with torch.no_grad():
                for key, parameter in changed.named_parameters():
                    if "lora_" in key or "ia3_" in key or "ln_tuning_" in key:
                        parameter.add_(0.1 * torch.randn_like(parameter))
            changed.save_pretrained(home / kind)


def _make_model(home: Path, name: str, auto: Any, config: Any, task: str) -> None:
    import transformers
    from optimum.exporters.onnx import main_export

    model = auto.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(home / "base")
    if name == "whisper":
        transformers.WhisperFeatureExtractor(feature_size=8).save_pretrained(home / "base")
    if name == "vit":
        transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(home / "base")
    main_export(str(home / "base"), output=home / "onnx", task=task, do_validation=False)
    (home / "task").write_text(task)
    (home / "done").touch()
    print(name, sorted(file.name for file in (home / "onnx").iterdir()), flush=True)


def with_adapters() -> None:
    """Make every session activate the adapter file beside its graph, since optimum's classes load none."""
    import onnxruntime

    plain = onnxruntime.InferenceSession.run

    def run(self: Any, names: Any, feeds: Any, options: Any = None) -> Any:
        file = Path(self._model_path).with_suffix(".onnx_adapter")
        if not file.exists():
            return plain(self, names, feeds, options)
        adapter, options = onnxruntime.LoraAdapter(), options or onnxruntime.RunOptions()
        adapter.Load(str(file))
        options.add_active_adapter(adapter)
        return plain(self, names, feeds, options)

    onnxruntime.InferenceSession.run = run


def compare(folder: Path, name: str, adapter: str, changed: Path) -> dict[str, Any]:
    """Return how far a folder of graphs is from PEFT."""
    import optimum.onnxruntime
    import peft
    import transformers

    home = folder / name
    task = (home / "task").read_text()
    auto, ort = KINDS[task]
    torch.manual_seed(0)
    model = getattr(transformers, auto).from_pretrained(home / "base", trust_remote_code=False)
    if adapter != "none":
        model = peft.PeftModel.from_pretrained(model, home / adapter)
    model = model.eval()
    kind = getattr(optimum.onnxruntime, ort)
    # With one decoder that has both branches, with two decoders, and with the decoder that has no past.
    merged = (changed / "decoder_model_merged.onnx").exists()
    ways = (*([{"use_merged": True}] if merged else []), {"use_merged": False}) if "Seq2Seq" in ort else ({},)
    tokens = torch.randint(3, 99, (2, 7))
    if task.startswith("automatic"):
        given: dict[str, Any] = {"input_features": torch.randn(2, 8, 3000)}
    elif task.startswith("image"):
        given = {"pixel_values": torch.randn(2, 3, 32, 32)}
    else:
        given = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    forward = dict(given)
    if "Seq2Seq" in ort:
        forward |= {"decoder_input_ids": torch.randint(3, 99, (2, 5))}
    writes = "Classification" not in auto
    more = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "num_beams": 1}
    with torch.no_grad():
        wanted = model(**forward).logits.numpy()
        theirs = model.generate(**given, **more) if writes else None
    found: dict[str, Any] = {"difference": 0.0}
    for way in ways:
        graphs = kind.from_pretrained(changed, trust_remote_code=False, **way)
        got = np.asarray(graphs(**forward).logits.detach())
        found["difference"] = max(found["difference"], float(abs(got - wanted).max() / abs(wanted).max()))
        if writes:
            same = bool(torch.equal(theirs, graphs.generate(**given, **more)))
            found["same_tokens"] = same and found.get("same_tokens", True)
    return found


def told(home: Path, words: list[str]) -> dict[str, Any]:
    """Return what a comparison came to."""
    try:
        return compare(home, words[0], words[1], Path(words[2]))
    except Exception as error:  # Whatever the library raises is what came of the folder.
        return {"error": f"{type(error).__name__}: {error}"[:300]}


def main() -> int:
    """Run the command line; `compare DIR` alone answers lines of words on standard input."""
    verb, home, *words = sys.argv[1:]
    with_adapters()
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
