"""Folders that exports write: whole, by rename, or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from ..errors import StorageError
from ..tensors.staging import staged
from .injecting import Report

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx")
"""How files of weights end that an export does not write, `model.onnx` apart."""

CARRIED = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model",
    "sentencepiece.bpe.model", "chat_template.jinja", "chat_template.json", "preprocessor_config.json",
)  # fmt: skip
"""Files that come along: what a tokenizer and a config are made of."""

OWNS = frozenset({"model.onnx", "model.onnx.data", "*.onnx_adapter", "*.onnx_adapter.json", *CARRIED})
"""Files of an export, of which none of an older one stays."""


def check_folder(target: Path, overwrite: bool) -> None:
    """Refuses a place that is taken, but for a folder, without other weights, that an export wrote and may replace.

    Raises:
        StorageError: it is taken, or has no folder to lie in.
    """
    if not target.absolute().parent.is_dir():
        raise StorageError("no such folder", path=target.absolute().parent, cure="Make the folder first")
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not overwrite:
        raise StorageError("already there", path=target, cure="Write to another path, or pass --overwrite")
    cure = "Remove it yourself, or write beside"
    if not (target / "model.onnx").is_file():
        raise StorageError("not a folder that an export wrote", path=target, cure=cure)
    held = sorted(name for name in os.listdir(target) if name.endswith(WEIGHTS) and name != "model.onnx")
    if held:
        raise StorageError(f"it holds {held[0]}, which no export wrote", path=target, cure=cure)


@contextmanager
def published(target: Path, inputs: Iterable[Path] = (), made_from: str | None = None) -> Iterator[Path]:
    """Give a folder to write an export to; it takes the place of `target` at the end.

    Files in `target` that no export writes stay there; none of the inputs is replaced.
    """
    with staged(target, owns=OWNS, inputs=inputs, made_from=made_from) as folder:
        folder.mkdir(exist_ok=True)
        yield folder


def moved(report: Report, target: Path, carried: Sequence[Path] = ()) -> Report:
    """A report of what was written into a scratch folder, by the names that it has in `target`."""
    files = tuple(target / file.name for file in (*report.files, *carried))
    return replace(report, out=target / "model.onnx", files=files)
