"""A hub for tests, and repositories on it."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hub_server import TOKEN, HubServer
from safetensors.numpy import save

from adapterkit.hub import reading, web


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    """Start a hub on loopback that huggingface_hub uses as its hub."""
    from huggingface_hub import close_session, constants

    server = HubServer()
    for name, value in environment(server, tmp_path).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(web, "FIRST_WAIT", 0.001)
    monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", server.url)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)
    monkeypatch.setattr(reading, "_seen", {})
    yield server
    close_session()
    server.close()


def environment(server: HubServer, folder: Path) -> dict[str, str]:
    return {
        "HF_ENDPOINT": server.url, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(folder / "hf"), "ADAPTERKIT_CACHE": str(folder / "cache"),
        "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1",
    }  # fmt: skip


def peft_files(base: str = "org/base") -> dict[str, bytes]:
    """Write a LoRA in PEFT's format, with values that no other file has."""
    key, draw = "base_model.model.layers.0.q.lora_{}.weight", np.random.default_rng(5)
    factors = {
        key.format("A"): draw.normal(size=(2, 4)).astype(np.float32),
        key.format("B"): draw.normal(size=(8, 2)).astype(np.float32),
    }
    config = {
        "peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q"], "bias": "none",
        "base_model_name_or_path": base,
    }  # fmt: skip
    return {
        "adapter_model.safetensors": save(factors, {"format": "pt"}),
        "adapter_config.json": json.dumps(config).encode(),
    }


def base_files() -> dict[str, bytes]:
    weight = np.random.default_rng(6).normal(size=(8, 4)).astype(np.float32)
    files = {"model.safetensors": save({"layers.0.q.weight": weight}, {"format": "pt"})}
    return files | {"config.json": b'{"model_type": "tiny"}', "pytorch_model.bin": b"another form"}


def lay(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def laid(folder: Path) -> dict[str, bytes]:
    """Return every file below a folder, except the record of a pull."""
    from adapterkit.io.locations import NOTE

    files = (file for file in folder.rglob("*") if file.is_file() and file.name != NOTE)
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}
