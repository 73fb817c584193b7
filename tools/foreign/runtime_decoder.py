"""A language model, its adapters and the wanted logits, for check_runtimes.py.

transformers makes a small random Llama, and PEFT two LoRAs and two IA3s. adapterkit exports the model, gives it each
kind of adapter, and writes the adapter files. The wanted logits are those of PEFT's model in float64, which reads all
tokens at once. Runtimes read the tokens in two steps, so the second step also reads the keys and values of the first.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import adapterkit as ak

STEPS = [[5, 17, 4, 29, 3, 11, 8], [21], [9]]

SIZES: dict[str, Any] = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0,
         "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip

TARGETS = ["q_proj", "v_proj", "gate_proj", "down_proj"]


class Decoder:
    """The model in a folder, and the cases that each runtime runs.

    Args:
        home: the folder to write to; graphs and adapter files are in `decoder` below it.
    """

    def __init__(self, home: Path) -> None:
        self.home, self.folder = home, home / "decoder"

    def cases(self) -> list[dict[str, Any]]:
        """Write graphs and adapter files; return each graph with the file to feed and the wanted logits."""
        import torch
        from transformers import AutoModelForCausalLM, LlamaConfig

        self.folder.mkdir(exist_ok=True)
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        model.save_pretrained(self.folder / "base")
        plain = self._logits(None)
        ak.onnx.export_pretrained(self.folder / "base", self.folder / "graph", overwrite=True)
        found = []
        for method in ("lora", "ia3"):
            known = self._adapters(method)
            first = [*known][-1]
            for mode in ("constant", "inputs"):
                ak.onnx.inject(self.folder / "graph", known[first], self.folder / f"{method}-{mode}", mode=mode)
            ak.onnx.merge(self.folder / "graph", known[first], self.folder / f"{method}-merged")
            changed = self._logits(known[first])
            found += [self._case(f"{method}-{mode}", first, None, changed) for mode in ("constant", "merged")]
            inputs = self.folder / f"{method}-inputs" / "model.onnx"
            neutral = inputs.with_name("model.onnx.neutral.onnx_adapter")
            for name, adapter in known.items():
                file = self.folder / f"{method}-{name.replace(' ', '-')}.onnx_adapter"
                ak.onnx.write_adapter(inputs, adapter, file)
                found.append(self._case(f"{method}-inputs", name, file, self._logits(adapter)))
                found.append(self._case(f"{method}-inputs", "none", neutral, plain))
        return found

    def _case(self, graph: str, adapter: str, slots: Path | None, wanted: Any) -> dict[str, Any]:
        return {
            "graph": f"decoder/{graph}/model.onnx", "adapter": adapter,
            "slots": None if slots is None else slots.relative_to(self.home).as_posix(), "wanted": wanted,
            "steps": STEPS, "heads": SIZES["num_key_value_heads"],
            "size": SIZES["hidden_size"] // SIZES["num_attention_heads"],
            "past": [f"past_key_values.{at}.{word}" for at in range(SIZES["num_hidden_layers"])
                     for word in ("key", "value")],
        }  # fmt: skip

    def _adapters(self, method: str) -> dict[str, Path]:
        """Return name -> the folder of an adapter that PEFT wrote."""
        import peft
        import torch
        from transformers import AutoModelForCausalLM

        more: dict[str, Any] = {"target_modules": TARGETS}
        configs: dict[str, Any] = {
            f"rank {rank}": peft.LoraConfig(r=rank, lora_alpha=8, init_lora_weights=False, **more) for rank in (2, 5)
        }  # fmt: skip
        if method == "ia3":
            words: dict[str, Any] = {**more, "feedforward_modules": TARGETS[-1:], "init_ia3_weights": False}
            configs = {name: peft.IA3Config(**words) for name in ("first", "second")}
        found = {}
        for seed, (name, config) in enumerate(configs.items()):
            torch.manual_seed(seed)
            base = AutoModelForCausalLM.from_pretrained(self.folder / "base", trust_remote_code=False)
            changed = peft.get_peft_model(base, config)
            with torch.no_grad():
                for key, parameter in changed.named_parameters():
                    if "lora_" in key or "ia3_" in key:
                        parameter.add_(0.2 * torch.randn_like(parameter))
            found[name] = self.folder / f"peft-{method}-{name.replace(' ', '-')}"
            changed.save_pretrained(found[name])
        return found

    def _logits(self, adapter: Path | None) -> Any:
        """Return the logits of PEFT's model in float64."""
        import peft
        import torch
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(self.folder / "base", trust_remote_code=False)
        if adapter is not None:
            model = peft.PeftModel.from_pretrained(model, adapter)
        with torch.no_grad():
            return model.double().eval()(torch.tensor([[token for step in STEPS for token in step]])).logits[0].numpy()
