"""The work of every command grows in proportion to the number of tensors; calls are counted, not seconds."""

from __future__ import annotations

import cProfile
import json
import pstats
from pathlib import Path

import numpy as np
import pytest
from command_line import run
from safetensors.numpy import save_file

import adapterkit as ak

COMMANDS = (
    "bom {base}", "combine {lora} {other} --method ties --rank 2 -o {out}", "convert {lora} {out} --to adapterkit",
    "combine {lora} {other} --method linear --weight 0.7 --weight 0.3 -o {out}",
    "convert {lora} {out} --to gguf --base {base}", "convert {lora} {out} --to mlx",
    "convert {lora} {out} --to peft --profile vllm --on-loss fold --base {base}", "diff {lora} {other} --base {base}",
    "extract {tuned} --base {base} --rank 2 -o {out}", "inspect {base} --all", "inspect {lora} --base {base} --all",
    "inspect {lora} --layers", "merge {base} {lora} -o {out}", "merge {base} {lora} {other} -o {out} --verify",
    "merge {base} {lora} -o {out} --plan", "names {base}", "names {base} {lora}", "report {lora} {other} --base {base}",
    "resize {lora} --energy 0.9 -o {out}", "resize {lora} --rank 1 -o {out}", "scan {base}",
    "scan {lora} --base {base}",
    "validate {lora} --base {base}", "verify {tuned} --base {base} --adapter {lora}",
)  # fmt: skip
LAYERS = (8, 16, 32)
PACKAGE = str(Path(ak.__file__).parent)
MODULES = ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.down_proj")


def save(folder: Path, layers: int) -> dict[str, Path]:
    """Save a Llama model and two LoRAs for it; return the paths, also of outputs, by name."""
    rng = np.random.default_rng(0)
    names = {name: folder / name for name in ("base", "lora", "other", "tuned", "out")}
    for name in ("base", "lora", "other"):
        names[name].mkdir(parents=True)
    weights = {
        f"model.layers.{i}.{name}.weight": rng.standard_normal((8, 8)).astype("f4")
        for i in range(layers)
        for name in (*MODULES, "self_attn.k_proj", "self_attn.o_proj", "mlp.gate_proj")
    }
    norms = [
        "model.norm",
        *(f"model.layers.{i}.{n}_layernorm" for i in range(layers) for n in ("input", "post_attention")),
    ]
    weights |= {f"{name}.weight": np.ones(8, "f4") for name in norms}
    weights |= {
        name: rng.standard_normal((16, 8)).astype("f4") for name in ("model.embed_tokens.weight", "lm_head.weight")
    }
    save_file(weights, names["base"] / "model.safetensors", {"format": "pt"})
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 8, "intermediate_size": 8,
        "num_hidden_layers": layers, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 16,
        "tie_word_embeddings": False,
    }  # fmt: skip
    (names["base"] / "config.json").write_text(json.dumps(config))
    for name in ("lora", "other"):
        factors = {
            f"base_model.model.model.layers.{i}.{module}.lora_{factor}.weight": rng.standard_normal(shape).astype("f4")
            for i in range(layers)
            for module in MODULES
            for factor, shape in (("A", (2, 8)), ("B", (8, 2)))
        }
        save_file(factors, names[name] / "adapter_model.safetensors", {"format": "pt"})
        targets = [module.rpartition(".")[2] for module in MODULES]
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": targets, "bias": "none"}
        (names[name] / "adapter_config.json").write_text(json.dumps(config))
    assert run("merge", names["base"], names["lora"], "-o", names["tuned"]).exit_code == 0
    return names


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Path]]:
    return [save(tmp_path_factory.mktemp("growth") / str(layers), layers) for layers in LAYERS]


@pytest.mark.parametrize("line", COMMANDS)
def test_calls_grow_with_the_number_of_tensors(line: str, models: list[dict[str, Path]], tmp_path: Path) -> None:
    def calls(number: int, names: dict[str, Path]) -> dict[tuple[str, int, str], int]:
        words = line.format(**names | {"out": tmp_path / str(number)}).split()
        profile = cProfile.Profile()
        with profile:
            result = run(*words, "--json")
        assert result.exit_code == (1 if words[0] in ("diff", "scan") and result.exit_code else 0), result.output
        # Leave out other packages: how often they try a lock depends on the load of the machine.
        stats = pstats.Stats(profile).stats
        return {function: counts[1] for function, counts in stats.items() if function[0].startswith(PACKAGE)}

    calls(0, models[0])  # Imports and caches are filled by the first run.
    few, some, many = (calls(number, names) for number, names in enumerate(models, 1))
    # Twice as many tensors: work in proportion to their number adds twice as many calls as the doubling before it did;
    # work that grows with the square adds four times as many. Sorting is between the two, and near 2.
    faster = {
        function: (few.get(function, 0), some.get(function, 0), count)
        for function, count in many.items()
        if count - some.get(function, 0) > 2.7 * (some.get(function, 0) - few.get(function, 0)) + 64
    }
    assert not faster
