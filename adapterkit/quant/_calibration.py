"""Read calibration files: safetensors files with the inputs of each target, recorded while the model read texts.

`adapterkit.gating.calibrate` runs the model and writes the file. A merge reads the inputs of one target after another.
Targets with the same input, such as the query, key and value projections, share one tensor in the file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import Malformed
from ..io.lazy import Lazy
from ..io.locations import located
from ..io.safetensors import handles, read_header

if TYPE_CHECKING:
    from ..io.lazy import Array

KEY = "adapterkit_calibration"
"""Metadata key of a calibration file; its value is JSON with `version`, `shared` and `made_from`."""

VERSION = 1
"""Version of the calibration file that this code reads and writes."""

_WRITE = "Write the file with adapterkit.gating.calibrate(BASE, ADAPTERS, FILE), or pass texts: --calibration TEXTS"

_CHUNK = 1 << 22


@dataclass(frozen=True, slots=True, eq=False)
class Calibration:
    """The inputs of targets, recorded in a run of a base with adapters.

    Attributes:
        path: the file.
        digest: the sha256 of the file.
        made_from: the base, adapters and texts of the run, as `adapterkit.gating.calibrate` recorded them.
        tensors: a map from a target to the values of its input, `[tokens, width]`. If several targets have the same
            input, only the first of them is a key.
        shared: a map from each target to the key of its input in `tensors`.
        drawn: whether the model read random token ids instead of texts.
    """

    path: Path
    digest: str
    made_from: Mapping[str, object]
    tensors: Mapping[str, Lazy]
    shared: Mapping[str, str]
    drawn: bool = False

    def width(self, path: str) -> int | None:
        """Return the number of input features of a target; None if the file has no inputs for the target."""
        tensor = self.tensors.get(self.shared.get(path, path))
        return None if tensor is None else tensor.shape[1]

    def inputs(self, path: str) -> Array | None:
        """Return the inputs of a target, `[tokens, width]`, in float64; None if the file has no inputs for the target.

        Raises:
            Malformed: a value of the inputs is not a finite number.
        """
        import numpy as np

        tensor = self.tensors.get(self.shared.get(path, path))
        if tensor is None:
            return None
        values: Array = np.frombuffer(tensor.fetch(), tensor.dtype.array).reshape(tensor.shape).astype(np.float64)
        if not np.isfinite(values).all():
            raise Malformed("a value of the inputs is not a finite number", path=self.path, where=path, cure=_WRITE)
        return values


def read_calibration(path: str | PathLike[str]) -> Calibration:
    """Open a calibration file.

    Raises:
        Malformed: the file is not a calibration file, is damaged, or has another version.
        StorageError: the file cannot be read.
    """
    file = located(path)
    header = read_header(file)
    text = header.metadata.get(KEY)
    if text is None:
        raise Malformed("the file is not a calibration file", path=file, cure=_WRITE)
    try:
        record = json.loads(text)
        version, shared, made_from = record["version"], record["shared"], record["made_from"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise Malformed(f"the metadata {KEY} cannot be read ({error})", path=file, cure=_WRITE) from None
    if version != VERSION:
        why = f"the calibration has version {version}, but this release reads version {VERSION}"
        raise Malformed(why, path=file, cure=_WRITE)
    tensors = handles(header)
    good = isinstance(shared, dict) and isinstance(made_from, dict) and tensors
    if not good or any(first not in tensors for first in shared.values()):
        raise Malformed(f"the metadata {KEY} does not match the file's tensors", path=file, cure=_WRITE)
    for name, tensor in tensors.items():
        if tensor.dtype.name != "F32" or len(tensor.shape) != 2 or not tensor.shape[0]:
            why = f"the inputs are {tensor.dtype} of shape {list(tensor.shape)}, not F32 [tokens, width]"
            raise Malformed(why, path=file, where=name, cure=_WRITE)
    return Calibration(file, digest_of(file), made_from, tensors, shared, record.get("drawn") is True)


def digest_of(file: Path) -> str:
    """Return the sha256 of a file."""
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while chunk := opened.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
