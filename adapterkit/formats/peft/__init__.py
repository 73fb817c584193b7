"""Read and write PEFT's folders: `adapter_config.json` and `adapter_model.safetensors` (or `.bin`).

The tensors and about twelve fields of the config determine the method. The module `config` lists every field and its
effect. The modules in `families` convert tensors to updates; `writer` converts updates to tensors. The file
spec/formats/peft.toml describes the format.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...core.metadata import read_with, with_metadata
from ...errors import AdapterkitError, StorageError, UsageError
from ...io import safetensors
from ...io.atomic import write_bytes
from ...io.checkpoint import INDEX, read_json, read_shards
from ...io.inputs import open_input
from ...io.lazy import Lazy
from ...naming.tool_names import is_shared_outer, is_tinker
from .._containers import folder_of, make_folder, read_tensors
from .._format import FORMULA, Departure, Format, derived

if TYPE_CHECKING:
    from collections.abc import Collection

    from ...core.adapter import Adapter
    from ...core.updates import Update
    from ...io.checkpoint import Checkpoint
    from ...io.strict_json import JsonValue


# Load and save a PEFT folder: a JSON config and one tensor file.


CONFIG = "adapter_config.json"
SAFETENSORS = "adapter_model.safetensors"
TORCH = "adapter_model.bin"
SHARDED = ("adapter_model.safetensors.index.json", INDEX)
"""Possible names of the index of an adapter that is split into `adapter_model-00001-of-00002.safetensors` and so on.

The second name is normally the name of a base model's index. transformers 5.24 also uses it for an adapter's index, but
cannot load such an adapter.
"""

METADATA = {"format": "pt"}
"""The only metadata that PEFT writes."""

MAX_SNIFF = 16 << 20


def sniff(path: Path) -> bool:
    """Whether `path` is a PEFT folder, or the config or tensor file of such a folder.

    The config must have a `peft_type`, and the tensors must not have the keys of Tinker or SGLang.
    """
    if not path.is_dir() and path.name not in (CONFIG, SAFETENSORS, TORCH):
        return False
    config = folder_of(path) / CONFIG
    try:
        with open_input(config) as file:
            if b'"peft_type"' not in file.read(MAX_SNIFF):
                return False
        # Check the keys, too: Tinker and SGLang write a config like PEFT's for tensors that PEFT cannot load.
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
            f"the folder has tensors but no {CONFIG}", path=folder, cure="Download the config, which has rank and alpha"
        )
    tensors = read_shards(weights) if weights.name in SHARDED else read_tensors(weights)
    return read_json(folder / CONFIG, strict=True), tensors


def header_of(path: Path) -> dict[str, str]:
    """Return the metadata in the header of the folder's safetensors file; empty for a `.bin` file.

    PEFT ignores this metadata, but other tools use it.
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
            raise UsageError(why, where=field, cure=f"Omit --{name} ({name}=)")


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
        f"the folder has neither {SAFETENSORS} nor {TORCH}", path=folder, cure="Download the tensor file, too"
    )


# The format.


def _methods() -> frozenset[str]:
    from .families import BESIDE, FAMILIES

    return frozenset(map(_name, (*BESIDE, *(m for f in FAMILIES.values() for m in f.methods()))))


def _name(method: type[Update]) -> str:
    return method.__module__.rpartition(".")[2]


def _departures() -> Mapping[str, Departure]:
    from .decoders import DEPARTURES
    from .families import FAMILIES

    return DEPARTURES | {name: each for family in FAMILIES.values() for name, each in family.departures.items()}


def _departures_of(methods: Collection[str]) -> Mapping[str, Departure] | None:
    """Return the departures of methods without a family; None if any method in `methods` belongs to a family.

    `BESIDE` contains the methods without a family, such as LoRA. If `methods` has only such methods, the departures of
    the families cannot affect the adapter. So this function does not import the modules in `families`.
    """
    from .decoders import DEPARTURES
    from .families import BESIDE

    return DEPARTURES if {*methods} <= {*map(_name, BESIDE)} else None


def _experts_orders() -> frozenset[str]:
    from .factors import ORDERS

    return ORDERS


def _profiles() -> frozenset[str]:
    from .profiles import profiles

    return frozenset(profiles())


class Peft(Format):
    """PEFT's folders: LoRA, its variants, IA3, whole parameters, token rows, and the methods in `families`."""

    url = "https://huggingface.co/docs/peft/developer_guides/checkpoint"
    description = "Hugging Face PEFT: adapter_config.json with adapter_model.safetensors or .bin"
    methods = derived(_methods)
    departures = derived(_departures)
    compat = frozenset({FORMULA})
    options = frozenset({"alpha", "rank", "strict"})
    experts_orders = derived(_experts_orders)
    profiles = derived(_profiles)
    owns = frozenset({CONFIG, SAFETENSORS, TORCH, SHARDED[0], "adapter_model-*-of-*.safetensors"})

    @classmethod
    def departures_of(cls, methods: Collection[str]) -> Mapping[str, Departure]:
        stated = _departures_of(methods)
        return cls.departures if stated is None else stated

    def sniff(self, path: Path) -> bool:
        return sniff(path)

    def sniff_loosely(self, path: Path) -> bool:
        from .bare import sniff as sniff_bare

        return sniff_bare(path)

    def read(
        self, path: Path, *, compat: str | None = None, base: Checkpoint | None = None, alpha: float | None = None,
        rank: int | None = None, strict: bool = False,
    ) -> Adapter:  # fmt: skip
        """Read an adapter, lazily.

        Args:
            path: see `Format.read`. It may also be a tensor file without adapter_config.json, which `bare` reads.
            compat: see `Format.read`.
            base: see `Format.read`.
            alpha: LoRA's alpha. It is needed if neither a config nor the tensor file has alpha, except for image,
                video and audio models, which then use the rank as alpha. It replaces a `lora_alpha` of 0.
            rank: the expected rank. If the shapes or the config have another rank, reading fails.
            strict: whether to refuse a config with any field that PEFT does not define.
        """
        from ..torchtune import check_export
        from . import bare
        from .reader import decode, without_config

        alone, assumed = bare.is_bare(path) and (path.is_dir() or bare.sniff(path)), False
        if alone:
            config, tensors, header = bare.load(path, alpha, rank)
            assumed = bool(config.pop(bare.ASSUMED, False))
        else:
            config, tensors = load(path)
            header = header_of(path)
        try:
            if not alone:
                if alpha is not None and config.get("lora_alpha") == 0:
                    # verl's model merger writes 0 if it does not know alpha, and asks its user to set the field.
                    config = {**config, "lora_alpha": alpha}
                check_stated(config, alpha, rank)
                check_export(folder_of(path), config, tensors, base)
            adapter = decode(config, tensors, compat=compat, base=base, strict=strict)
        except AdapterkitError as error:
            raise error.at(path=path) from None
        if alone:
            adapter = without_config(adapter, config, assumed=assumed)
        further = {key: value for key, value in header.items() if METADATA.get(key) != value}
        return read_with(adapter, further)

    def write(
        self, adapter: Adapter, path: Path, *, on_loss: str = "refuse", base: Checkpoint | None = None
    ) -> list[str]:
        from .writer import encode

        config, tensors, lines = encode(adapter, on_loss=on_loss, base=base)
        save(path, config, tensors, dict(with_metadata(METADATA.items(), adapter)))
        return lines

    def fit(
        self, adapter: Adapter, profile: str, *, on_loss: str = "refuse", base: Checkpoint | None = None
    ) -> tuple[Adapter, list[str]]:
        from .profiles import fitted

        return fitted(adapter, profile, on_loss, base)
