"""Output folders of exports: complete, by a rename, or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from ..errors import StorageError
from ..io.staging import staged
from .injecting import Report

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx")
"""Suffixes of weight files that an export does not write, apart from `model.onnx`."""

CARRIED = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model",
    "sentencepiece.bpe.model", "chat_template.jinja", "chat_template.json", "preprocessor_config.json",
)  # fmt: skip
"""Config and tokenizer files that are copied along."""

OWNS = frozenset({"model.onnx", "model.onnx.data", "*.onnx_adapter", "*.onnx_adapter.json", *CARRIED})
"""Files of an export; those of an older export are removed."""


def check_folder(target: Path, overwrite: bool) -> None:
    """Refuse an existing folder, unless an export wrote it, it has no other weights, and it may be replaced.

    Raises:
        StorageError: it exists, or its parent folder does not.
    """
    if not target.absolute().parent.is_dir():
        raise StorageError("no such folder", path=target.absolute().parent, cure="Make the folder first")
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not overwrite:
        cure = "Write to another path, or pass --overwrite (in Python overwrite=True)"
        raise StorageError("already there", path=target, cure=cure)
    cure = "Remove it yourself, or write beside"
    if not (target / "model.onnx").is_file():
        raise StorageError("not a folder that an export wrote", path=target, cure=cure)
    # A folder with other weights is a model of its own, which an export must not replace.
    held = sorted(name for name in os.listdir(target) if name.endswith(WEIGHTS) and name != "model.onnx")
    if held:
        raise StorageError(f"it holds {held[0]}, which no export wrote", path=target, cure=cure)


@contextmanager
def published(target: Path, inputs: Iterable[Path] = (), made_from: str | None = None) -> Iterator[Path]:
    """Yield a folder to write an export to; at the end it replaces `target`.

    Files in `target` that no export writes stay. The inputs are never replaced.
    """
    with staged(target, owns=OWNS, inputs=inputs, made_from=made_from) as folder:
        folder.mkdir(exist_ok=True)
        yield folder


def moved(report: Report, target: Path, carried: Sequence[Path] = ()) -> Report:
    """Return the report of an export in a scratch folder, with the paths that the files have in `target`."""
    files = tuple(target / file.name for file in (*report.files, *carried))
    return replace(report, out=target / "model.onnx", files=files)
