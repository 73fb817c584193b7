"""The code of docs/python.md, block after block, on small models of transformers' own."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from command_line import run
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from gated_models import lora, make

import adapterkit as ak

PAGE = Path(__file__).resolve().parents[2] / "docs" / "python.md"
BLOCK = re.compile(r"^```(sh|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
TOKENS = torch.tensor([[5, 7, 11, 3], [9, 2, 8, 8], [4, 4, 6, 1]])


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the page names: bases, adapters and keys."""
    monkeypatch.chdir(tmp_path)
    for name in ("path/to/base", "MODEL"):
        make("llama", Path(name))
    model = transformers.AutoModelForCausalLM.from_pretrained("MODEL")
    for seed, name in enumerate(("path/to/peft-folder", "another/adapter", "other", "A", "B")):
        ak.write(lora("llama", model, seed=seed + 1), name, format="peft")
    key = ec.generate_private_key(ec.SECP256R1())
    form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    Path("key.pem").write_bytes(key.private_bytes(*form))
    public = key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    Path("key.pub.pem").write_bytes(public)


def given(code: str) -> dict[str, Any]:
    """What a block takes as there: a fresh model where it adapts one, and what is run through it."""
    names: dict[str, Any] = {"torch": torch, "transformers": transformers}
    model = transformers.AutoModelForCausalLM.from_pretrained("MODEL")
    if "batch" in code:
        names["batch"] = {"input_ids": TOKENS}
    if "Trainer(" in code:
        rows = [{"input_ids": row, "labels": row} for row in TOKENS]
        settings = {"max_steps": 2, "report_to": [], "use_cpu": True, "save_steps": 1, "disable_tqdm": True}
        names |= {"data": rows, "settings": transformers.TrainingArguments("trained", **settings)}
    if "onnx" in code:
        names |= {"input_ids": TOKENS[:1].numpy()}
        names["inputs"] = {"input_ids": TOKENS.numpy(), "attention_mask": torch.ones_like(TOKENS).numpy()}
        model = torch.nn.Sequential(torch.nn.Linear(8, 8)).eval()
        names |= {"x": torch.randn(2, 8), "adapter": ak.torch.create(model, "lora", rank=2)}
    return names | {"model": model}


@pytest.mark.usefixtures("folder")
def test_the_page_of_python_runs() -> None:
    names: dict[str, Any] = {}
    for language, code in BLOCK.findall(PAGE.read_text("utf-8")):
        if language == "python":
            names |= given(code)
            exec(compile(code, PAGE.name, "exec"), names)
            continue
        for line in code.splitlines():
            done = run(*shlex.split(line, comments=True)[1:])
            assert done.exit_code == 0, (line, done.output)
