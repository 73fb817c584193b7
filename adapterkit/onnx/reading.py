"""Read an adapter, and open the base's weights and config. Most functions of `adapterkit.onnx` do this first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

import onnx_ir as ir

from ..core.adapter import Adapter
from ..errors import UsageError
from ..io.checkpoint import opened as opened_base
from ..io.checkpoint import read_json

if TYPE_CHECKING:
    from ..io.checkpoint import Checkpoint

    Model = ir.Model | str | PathLike[str]
    Base = Checkpoint | str | PathLike[str]
    Source = Adapter | str | PathLike[str]


def loaded(adapter: Source, base_weights: Base | None) -> tuple[Adapter, Checkpoint | None]:
    """Read and validate an adapter, and open the base's weights."""
    base = None if base_weights is None else opened_base(base_weights)
    if not isinstance(adapter, Adapter):
        from ..formats import read

        adapter = read(adapter, base=base)
    adapter.validate()
    adapter.check_values()
    return adapter, base


def inputs_of(adapter: Source, base_weights: Base | None) -> list[Path]:
    """Return the paths of all files from which an adapter and the base's weights are read."""
    from ..formats import files_of, files_read

    files = [] if base_weights is None else list(opened_base(base_weights).files)
    return files + (list(files_of(adapter)) if isinstance(adapter, Adapter) else files_read(adapter))


def name_of(adapter: Source) -> str:
    """Return the name of an adapter for messages: the name of its file or folder, or `Adapter` for an object."""
    return type(adapter).__name__ if isinstance(adapter, Adapter) else Path(adapter).name


def base_warnings(adapters: Sequence[tuple[str, Adapter]], base: Checkpoint | None, strict: bool) -> tuple[str, ...]:
    """Return one warning for each difference between `base` and the bases that the adapters record.

    If `base` is None, the result is empty.

    Raises:
        CheckFailed: `strict` is set, and there is a difference.
    """
    if base is None:
        return ()
    from ..naming.binding.fitting import check_base

    return check_base(adapters, base, strict)


GENAI_TYPE = "genai_model_type"
"""The key under which `known_config` returns a model type that it read from a `genai_config.json`."""


def known_config(base: Checkpoint | None, path: Path | None) -> Mapping[str, object] | None:
    """Return the exported model's config.

    If there is no config, return `{GENAI_TYPE: type}` with the model type from `genai_config.json` beside the graph. If
    this file is missing or has no model type, return None.
    """
    try:
        return config_of(base, path)
    except UsageError:
        beside = None if path is None else path.parent / "genai_config.json"
    if beside is None or not beside.is_file():
        return None
    model = read_json(beside).get("model")
    kind = model.get("type") if isinstance(model, Mapping) else None
    return {GENAI_TYPE: kind} if isinstance(kind, str) else None


def config_of(base: Checkpoint | None, path: Path | None) -> Mapping[str, object]:
    """Return the config of the exported model: the base's config, or else `config.json` in the graph's folder.

    Raises:
        UsageError: there is no config.
        Malformed: the config is not a JSON object.
    """
    if base is not None and base.config is not None:
        return base.config
    beside = None if path is None else path.parent / "config.json"
    if beside is None or not beside.is_file():
        why = "the base's config.json is needed to build the adapter's network, but there is none beside the graph"
        raise UsageError(why, path=path, cure="Pass the base's folder: --base-weights DIR (base_weights=DIR)")
    return read_json(beside)
