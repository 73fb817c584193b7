"""Load and save a PEFT folder: a JSON config and one tensor file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import AdapterkitError, StorageError, UsageError
from ...io import safetensors
from ...io.atomic import write_bytes
from ...io.checkpoint import INDEX, read_json, read_shards
from ...io.inputs import open_input
from ...io.lazy import Lazy
from ...naming.shared_outer import is_shared_outer
from ...naming.tinker import is_tinker
from .._folders import folder_of, make_folder, read_tensors

if TYPE_CHECKING:
    from ...io.strict_json import JsonValue


CONFIG = "adapter_config.json"
SAFETENSORS = "adapter_model.safetensors"
TORCH = "adapter_model.bin"
SHARDED = ("adapter_model.safetensors.index.json", INDEX)
"""Names of the index file of an adapter in several files, `adapter_model-00001-of-00002.safetensors` etc.

transformers 5.24 names this index like a base's index, and cannot load such adapters.
"""

METADATA = {"format": "pt"}
"""The only metadata that PEFT writes."""

MAX_SNIFF = 16 << 20


def sniff(path: Path) -> bool:
    """Whether the folder at `path`, or around the file `path`, has PEFT's config, which has a `peft_type`."""
    if not path.is_dir() and path.name not in (CONFIG, SAFETENSORS, TORCH):
        return False
    config = folder_of(path) / CONFIG
    try:
        with open_input(config) as file:
            if b'"peft_type"' not in file.read(MAX_SNIFF):
                return False
        # Check the keys: Tinker and SGLang write PEFT's config, too, for tensors that PEFT cannot load.
        entries = safetensors.read_header(folder_of(path) / SAFETENSORS).entries
        return not is_tinker(entries) and not is_shared_outer(entries)
    except OSError:
        return False
    except AdapterkitError:
        return True


def load(path: Path) -> tuple[dict[str, Any], dict[str, Lazy]]:
    """Load the config and the tensors by key.

    Args:
        path: the folder, its config or its tensor file. In a folder, a safetensors file takes precedence over `.bin`.

    Raises:
        StorageError: the config or the tensor file is missing.
        Malformed: the config or the tensor file is damaged.
    """
    folder = folder_of(path)
    weights = path if path.is_file() and path.name != CONFIG else _weights(folder)
    if not (folder / CONFIG).exists():
        raise StorageError(
            f"the folder of the tensors has no {CONFIG}", path=folder, cure="Fetch the config, which has rank and alpha"
        )
    tensors = read_shards(weights) if weights.name in SHARDED else read_tensors(weights)
    return read_json(folder / CONFIG, strict=True), tensors


def header_of(path: Path) -> dict[str, str]:
    """Return the strings in the header of the folder's safetensors file.

    PEFT ignores them, but other tools use them.
    """
    folder = folder_of(path)
    weights = path if path.is_file() and path.name != CONFIG else _weights(folder)
    return dict(safetensors.read_header(weights).metadata) if weights.suffix == ".safetensors" else {}


def check_stated(config: Mapping[str, JsonValue], alpha: float | None, rank: int | None) -> None:
    """Check that the caller's alpha and rank, if any, agree with the config.

    Raises:
        UsageError: the config has another alpha or rank.
    """
    for name, field, stated in (("alpha", "lora_alpha", alpha), ("rank", "r", rank)):
        if stated is not None and config.get(field) != stated:
            why = f"{CONFIG} states {field} {config.get(field)}, but --{name} ({name}=) is {stated:g}"
            raise UsageError(why, where=field, cure=f"Omit --{name} ({name}=): the config has it")


def save(
    folder: Path, config: Mapping[str, JsonValue], tensors: Mapping[str, Lazy], header: Mapping[str, str] = METADATA
) -> None:
    """Write the folder. The config is written last, so that readers reject a folder whose writing was interrupted.

    Raises:
        StorageError: the folder cannot be created or written.
    """
    text = json.dumps(config, indent=2, sort_keys=True, allow_nan=False)
    make_folder(folder)
    safetensors.write(folder / SAFETENSORS, tensors, header)
    write_bytes(folder / CONFIG, text.encode())


def _weights(folder: Path) -> Path:
    for name in (SAFETENSORS, TORCH):
        if (folder / name).exists():
            return folder / name
    for name in SHARDED:
        if (folder / name).exists() and any(folder.glob("adapter_model-*-of-*.safetensors")):
            return folder / name
    raise StorageError(
        f"the folder has neither {SAFETENSORS} nor {TORCH}", path=folder, cure="Fetch the tensor file, too"
    )
