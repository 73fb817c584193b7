"""Folders that exports write: whole, by rename, or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from ..errors import AdapterkitError, StorageError, storage_error
from .injecting import Report

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx")
"""How files of weights end that an export does not write, `model.onnx` apart."""


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
def published(target: Path) -> Iterator[Path]:
    """A scratch folder beside `target`, which takes its place at the end; after a fault nothing is left of it."""
    try:
        scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise storage_error(error, target) from error
    try:
        yield scratch
        _published(scratch, target)
    except AdapterkitError as error:  # The folder of this name will be gone.
        error.path = error.path and error.path.replace(str(scratch), str(target))
        raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def moved(report: Report, target: Path, carried: Sequence[Path] = ()) -> Report:
    """A report of what was written into a scratch folder, by the names that it has in `target`."""
    files = tuple(target / file.name for file in (*report.files, *carried))
    return replace(report, out=target / "model.onnx", files=files)


def _published(scratch: Path, target: Path) -> None:
    """The finished folder under its name; one that is there is gone only after."""
    try:
        scratch.chmod(0o777 & ~_umask())
        if not target.exists():
            scratch.rename(target)
            return
        old = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        try:
            target.rename(old / "old")
            scratch.rename(target)
        finally:
            if not target.exists():  # Whatever came between the two: nothing else holds what was there.
                (old / "old").rename(target)
            shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise storage_error(error, target) from error


def _umask() -> int:
    held = os.umask(0)
    os.umask(held)
    return held
