"""Run the command line in this process, and make a small base with an adapter for it."""

import json
from pathlib import Path

import numpy as np
from click.testing import CliRunner, Result
from safetensors.numpy import save_file

from adapterkit.cli import adapterkit


def run(*words: object, **options: object) -> Result:
    return CliRunner().invoke(adapterkit, [str(word) for word in words], **options)


def record(*words: object, code: int = 0) -> dict[str, object]:
    """Return the data that `--json` prints."""
    result = run(*words, "--json")
    assert result.exit_code == code, result.output
    return json.loads(result.stdout)


def save_base(folder: Path) -> Path:
    folder.mkdir()
    save_file({"layers.0.q.weight": np.zeros((8, 4), np.float32)}, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text('{"model_type": "tiny"}')
    return folder


def save_peft(folder: Path) -> Path:
    folder.mkdir()
    key = "base_model.model.layers.0.q.lora_{}.weight"
    factors = {key.format("A"): np.ones((2, 4), np.float32), key.format("B"): np.ones((8, 2), np.float32)}
    save_file(factors, folder / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder
