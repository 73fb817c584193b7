"""Read and make folders with a config and one file of tensors, a layout that several libraries share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import Malformed, UsageError, storage_error
from ..io import safetensors
from ..io.torch_file import is_torch_file, read_torch_file
from ._format import TENSORS

if TYPE_CHECKING:
    from ..io.lazy import Lazy


def folder_of(path: Path) -> Path:
    """Return the folder, whether the path names the folder or one of its files."""
    return path if path.is_dir() else path.parent


def read_tensors(path: Path) -> dict[str, Lazy]:
    """Return key -> tensor of a safetensors file or a torch file.

    Raises:
        Malformed: the file is damaged, or is a folder.
    """
    if path.is_dir():
        raise Malformed("a folder where the file of tensors should be", path=path, cure="Fetch the adapter again")
    if path.suffix == ".bin" or is_torch_file(path):
        return read_torch_file(path)
    return safetensors.read(path)


def make_folder(folder: Path) -> None:
    """Make the folder of an adapter, with its parents.

    Raises:
        UsageError: the path has the name of a file of tensors.
        StorageError: the folder cannot be made.
    """
    if folder.suffix.lower() in TENSORS and not folder.is_dir():
        why = "the name of a file, where this format has a folder"
        raise UsageError(why, path=folder, cure="Name a folder, or a format of one file: --to adapterkit, kohya, ...")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise storage_error(error, folder) from error
