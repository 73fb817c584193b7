"""A gate in a report: its figures are those of the gate, escaped, and nothing else is taken for one."""

from __future__ import annotations

import json
import re
from html import unescape
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import record, run
from gated_models import changed, deltas, world

import adapterkit as ak
from adapterkit.errors import Malformed, StorageError, UsageError
from adapterkit.gating import Gate

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

FAST: dict[str, Any] = {"texts": 1, "length": 16, "new_tokens": 0, "null": False, "device": "cpu"}
LOST = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def gated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Gate]:
    """An adapter as a file, and a gate that found a merge without one of its targets."""
    root = tmp_path_factory.mktemp("gated")
    base, adapter = world("llama", str(root))
    ak.write(adapter, root / "lora", format="peft")

    def merge(tensors: dict[str, torch.Tensor]) -> None:
        for name, delta in deltas(adapter).items():
            if not name.startswith(LOST):
                tensors[name] = (tensors[name].float() + delta).to(tensors[name].dtype)

    return root / "lora", ak.gate(base, adapter, merged=changed(base, root / "merged", merge), **FAST)


def section(html: str) -> str:
    found = re.search(r'<section id="gate".*?</section>', html, re.DOTALL)
    assert found is not None
    return unescape(found[0])


def test_the_page_has_every_check_run_verdict_and_where_models_part(gated: tuple[Path, Gate]) -> None:
    lora, gate = gated
    told = section(ak.report(lora, gate=gate).html())
    assert gate.outcome == "failed"
    for check in gate.checks:
        assert check.text in told
        assert check.value is None or f"{check.value:.4g}" in told
    assert all(verdict in told for verdict in gate.verdicts)
    assert f"The first module with a fault is {LOST}." in told
    assert gate.merged is not None
    assert f"{gate.merged.kept:.4g}" in told
    assert gate.merged.path in told
    for block in gate.merged.blocks:
        assert f"{block.difference:.4g}" in told


def test_the_command_reads_what_gate_printed(gated: tuple[Path, Gate], tmp_path: Path) -> None:
    lora, gate = gated
    file = tmp_path / "gate.json"
    file.write_text(json.dumps(gate.record()))
    made = record("report", lora, "--gate", file, "-o", tmp_path / "page.html")
    assert made["gate"]["outcome"] == "failed"
    html = (tmp_path / "page.html").read_text()
    assert section(html) == section(ak.report(lora, gate=gate).html())
    assert 'id="gate"' not in ak.report(lora).html()
    # Another gate is another page: it is written again.
    file.write_text(json.dumps(gate.record() | {"verdicts": ["<b>&"]}))
    assert run("report", lora, "--gate", file, "-o", tmp_path / "page.html", "--overwrite").exit_code == 0
    assert "&lt;b&gt;&amp;" in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize("text", ["{", "[]", '{"kind": "report"}', '{"kind": "gate"}', '{"kind": "gate", "a": NaN}'])
def test_what_is_no_gate_is_refused(gated: tuple[Path, Gate], tmp_path: Path, text: str) -> None:
    file = tmp_path / "gate.json"
    file.write_text(text)
    with pytest.raises(Malformed, match="--gate FILE") as refused:
        ak.report(gated[0], gate=file)
    assert refused.value.path == str(file)
    wrong = gated[1].record() | {"checks": [{"model": "merged", "name": "kept", "text": 7}]}
    with pytest.raises(Malformed, match="checks"):
        ak.report(gated[0], gate=wrong)
    with pytest.raises(StorageError):
        ak.report(gated[0], gate=tmp_path / "nothing.json")
    with pytest.raises(UsageError, match="gate="):
        ak.report(gated[0], gate=7)  # type: ignore[arg-type]
