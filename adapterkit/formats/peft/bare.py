"""Read state dicts of PEFT models without adapter_config.json: bare files, and checkpoints of DeepSpeed, FSDP and SAT.

This module builds a config from the keys and shapes, which determine the method and the ranks. Alpha comes from the
file's metadata, from tensors `<module>.alpha`, or from the caller. Some trainers of image, video and audio models write
files without alpha. Every loader of these models then uses the rank as alpha, and so does this module.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import AdapterkitError, Malformed, ShapeMismatch, Unsupported, UsageError, storage_error
from ...io import safetensors
from ...io.inputs import open_input, read_input
from ...io.lazy import Lazy
from ...io.torch_file import is_torch_file, read_torch_file, read_torch_value
from ...naming.image import families, looks_of_pipeline, rooted
from . import CONFIG, SAFETENSORS, TORCH
from . import sniff as sniff_config
from .file import PREFIX, Key, parse_key

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ...io.lazy import Lazy
    from ...io.strict_json import JsonValue


_LORA = re.compile(r".+\.lora_(?:[AB](?:\.[^.]+)?\.weight|embedding_[AB](?:\.[^.]+)?)", re.DOTALL)
_ALPHA = ".alpha"
_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")

_ZERO = re.compile(r"mp_rank_(\d+)_model_states\.pt")
"""Matches the name of a file that DeepSpeed writes without ZeRO-3.

Without tensor parallelism, there is only one such file, with all weights.
"""
_ZERO3 = re.compile(r"zero_pp_rank_\d+_mp_rank_\d+_model_states\.pt")
"""Matches the name of a file that DeepSpeed writes with ZeRO-3. The file has no weights: each rank writes its part of
the weights to another file.
"""

_ALPHA_FIELDS = ("lora_alpha", "alpha", "ss_network_alpha")
_CONFIG_FIELD = "lora_adapter_metadata"
"""The metadata key under which diffusers stores PEFT's config as JSON. The fields are named `COMPONENT.FIELD`, such as
`transformer.lora_alpha`.
"""
ASSUMED = "alpha_assumed"
"""A field in configs that this module builds. It is true if alpha was set to the rank because the file has no alpha."""

_SCALING_FIELDS = ("lora_alpha", "alpha_pattern", "rank_pattern", "use_rslora")

_MAX_SCAN = 64 << 20


def sniff(path: Path) -> bool:
    """Whether `path` is a file or folder of LoRA tensors with PEFT's names, without a config.

    The result is also true for a tensor file next to PEFT's config. For a checkpoint of DeepSpeed, only the file names
    are checked.
    """
    if not is_bare(path):
        # Next to PEFT's config, accept a tensor file with any name. Check the config's contents, because other tools
        # also write an `adapter_config.json`.
        return path.is_file() and _file(path) is not None and sniff_config(path.parent)
    try:
        folder = _tag(path) if path.is_dir() else path
        if folder.is_dir() and (_is_zero3(folder) or _is_distributed(folder)):
            return True
        file = _file(folder)
        if file is None:
            return False
        if _ZERO.fullmatch(file.name) or _ZERO3.fullmatch(file.name):
            return True
        return any(_LORA.fullmatch(key) for key in _names(file))
    except (AdapterkitError, OSError):
        return False


def is_bare(path: Path) -> bool:
    """Whether the folder (`path`, or the folder that contains the file `path`) has no config."""
    return not ((path if path.is_dir() else path.parent) / CONFIG).exists()


def load(
    path: Path, alpha: float | None, rank: int | None
) -> tuple[dict[str, JsonValue], dict[str, Lazy], dict[str, str]]:
    """Build a config from the keys and shapes. Return the config, the tensors by key, and the file's metadata.

    Args:
        path: a tensor file, or a folder with adapter_model.safetensors or .bin, or with DeepSpeed's model states.
        alpha: LoRA's alpha. It is needed if the file does not have alpha, except for image, video and audio models,
            which then use the rank as alpha.
        rank: the rank that every module must have; None allows any rank.

    Raises:
        UsageError: the folder has no tensor file. Or alpha is needed but not given, or differs from the file's alpha.
        ShapeMismatch: a module's rank is not `rank`.
        Unsupported: the weights are split over several files that only torch or DeepSpeed can read. Or the adapter
            changes stacked experts, which need a config.
        Malformed: the file also has the base's weights, and does not show which weights were trained. Or a tensor has
            no elements.
    """
    folder = _tag(path) if path.is_dir() else path
    _refuse_split(folder)
    file = _file(folder)
    if file is None:
        cure = "Download the tensor file and adapter_config.json"
        raise UsageError(f"the folder has neither {CONFIG} nor {SAFETENSORS} nor {TORCH}", path=path, cure=cure)
    header = dict(safetensors.read_header(file).metadata) if file.suffix == ".safetensors" else {}
    tensors = _without_wrapper(_tensors(file))
    if is_sat(tensors):
        try:
            tensors, header = in_peft_names(tensors, alpha), {OF_FAMILY: FAMILY}
        except AdapterkitError as error:
            raise error.at(path=file) from None
    alphas = {
        key: tensors.pop(key) for key in list(tensors) if key.endswith(_ALPHA) and math.prod(tensors[key].shape) == 1
    }
    try:
        return _config(tensors, alphas, header, alpha, rank), tensors, header
    except AdapterkitError as error:
        raise error.at(path=file) from None


def _config(
    tensors: Mapping[str, Lazy], alphas: Mapping[str, Lazy], header: Mapping[str, str], alpha: float | None,
    rank: int | None,
) -> dict[str, JsonValue]:  # fmt: skip
    prefix = PREFIX if any(key.startswith(PREFIX) for key in tensors) else ""
    keys = [parse_key(text, prefix) for text in tensors]
    _check_trained(keys)
    empty = next((key for key in keys if key.part.startswith("lora_") and not math.prod(tensors[key.text].shape)), None)
    if empty is not None:
        why = "the tensor has no elements, because ZeRO-3 or FSDP held them on other ranks when the file was saved"
        raise Malformed(why, where=empty.text, cure="Gather the parameters before save_pretrained")
    ranks = {
        key.module: tensors[key.text].shape[0]
        for key in keys if key.part in ("lora_A", "lora_embedding_A") and tensors[key.text].shape
    }  # fmt: skip
    wrong = next((module for module, size in ranks.items() if rank is not None and size != rank), None)
    if wrong is not None:
        cure = "Correct --rank (rank=), or omit it: the shapes state the rank"
        raise ShapeMismatch(f"the file has rank {ranks[wrong]}, not {rank}", where=wrong, cure=cure)
    usual = Counter(ranks.values()).most_common(1)[0][0] if ranks else 8
    config: dict[str, Any] = {"peft_type": "LORA", "r": usual}
    config["rank_pattern"] = {f"^{re.escape(name)}$": size for name, size in ranks.items() if size != usual}
    parts = {key.part for key in keys}
    config["use_dora"] = "lora_magnitude_vector" in parts
    config["lora_bias"] = any(key.part == "lora_B" and key.leaf == "bias" for key in keys)
    return config | _scaling(alphas, prefix, header, alpha, usual, ranks)


def _scaling(
    alphas: Mapping[str, Lazy], prefix: str, header: Mapping[str, str], alpha: float | None, rank: int,
    ranks: Mapping[str, int],
) -> dict[str, JsonValue]:  # fmt: skip
    """Return `lora_alpha` and the other config fields that determine the scaling.

    Alpha comes from the file or the caller. If neither of them states alpha, and the module names look like those of
    an image, video or audio model, alpha is the rank.

    Raises:
        UsageError: alpha is unknown, or the file and the caller state different alphas.
    """
    stated = _scaling_fields(header)
    if alpha is None and not stated and not alphas and looks_of_pipeline(ranks):
        return {
            "lora_alpha": rank,
            "alpha_pattern": {f"^{re.escape(name)}$": size for name, size in ranks.items() if size != rank},
            ASSUMED: True,
        }
    if alphas:
        scalings = {
            parse_key(key.removesuffix(_ALPHA), prefix).path: float(leaf.numpy().ravel()[0])
            for key, leaf in alphas.items()
        }
        usual = Counter(scalings.values()).most_common(1)[0][0]
        pattern = {f"^{re.escape(name)}$": value for name, value in scalings.items() if value != usual}
        stated = {"lora_alpha": usual, "alpha_pattern": pattern}
    if alpha is None and not stated:
        why = "without adapter_config.json, LoRA's alpha is unknown; the scaling of the adapter is alpha / rank"
        cure = (
            "State alpha with --alpha A (alpha=A), or put adapter_config.json next to the file. Loaders of image, "
            f"video and audio models use the rank if alpha is unknown: --alpha {rank} (alpha={rank})"
        )
        raise UsageError(why, cure=cure)
    if alpha is None:
        return stated
    if stated and stated["lora_alpha"] != alpha:
        why = f"the file states alpha {stated['lora_alpha']:g}, but --alpha (alpha=) is {alpha:g}"
        raise UsageError(why, cure="Omit --alpha (alpha=)")
    return stated or {"lora_alpha": alpha}


def _scaling_fields(header: Mapping[str, str]) -> dict[str, JsonValue]:
    """Return the scaling fields in the header of a safetensors file; empty if the header has no alpha."""
    for name in _ALPHA_FIELDS:
        try:
            value = float(header[name])
        except (KeyError, ValueError):
            continue
        if math.isfinite(value):
            return {"lora_alpha": value}
    try:
        config = json.loads(header.get(_CONFIG_FIELD, "{}"))
    except (ValueError, RecursionError):
        return {}
    fields = {} if not isinstance(config, dict) else {
        str(name).rpartition(".")[2]: value for name, value in config.items() if value
    }  # fmt: skip
    return {name: fields[name] for name in _SCALING_FIELDS if name in fields} if "lora_alpha" in fields else {}


def _check_trained(keys: Iterable[Key]) -> None:
    """Refuse stacked experts, which need a config. Also refuse the state dict of a whole model.

    The keys of such a state dict do not show which weights were trained.
    """
    adapted = {key.stem: key for key in keys if key.part == "lora_A"}
    base = {key.stem.removesuffix(".weight") for key in keys if not key.part}
    whole = next((key for stem, key in adapted.items() if f"{stem}.base_layer" in base), None)
    if whole is not None:
        why = "the file also has the base's weights, and does not show which weights were trained"
        cure = "Save get_peft_model_state_dict(model), or keep only the keys of trained weights"
        raise Malformed(why, where=f"{whole.stem}.base_layer.weight", cure=cure)
    stacked = next((key for stem, key in adapted.items() if stem.rpartition(".")[2] in ("experts", "base_layer")), None)
    if stacked is not None:
        why = (
            "LoRA adapts stacked experts here; only adapter_config.json states the adapted parameter "
            "(target_parameters) and the number of experts"
        )
        raise Unsupported(why, where=stacked.text, cure=f"Put {CONFIG} next to the file")


def _file(path: Path) -> Path | None:
    """Return `path` if it is a tensor file, or the tensor file in the folder `path`; None if there is no such file."""
    if not path.is_dir():
        return path if path.suffix in _SUFFIXES and path.is_file() else None
    for name in (SAFETENSORS, TORCH):
        if (path / name).is_file():
            return path / name
    states = sorted(file for file in path.iterdir() if _ZERO.fullmatch(file.name))
    return states[0] if states else None


def _tag(folder: Path) -> Path:
    """Return the subfolder with the newest weights of a DeepSpeed checkpoint; if there is none, return `folder`.

    The file `latest` contains the subfolder's name.
    """
    latest = folder / "latest"
    if _file(folder) is not None or not latest.is_file() or latest.stat().st_size > 255:
        return folder
    name = read_input(latest).decode("utf-8", "replace").strip()
    return folder / name if name and Path(name).name == name and (folder / name).is_dir() else folder


def _is_zero3(folder: Path) -> bool:
    return any(_ZERO3.fullmatch(file.name) for file in folder.iterdir())


def _is_distributed(folder: Path) -> bool:
    """Whether torch.distributed.checkpoint wrote LoRA tensors into this folder.

    The function searches the pickle file `.metadata` for names of LoRA tensors, without unpickling it.
    """
    metadata = folder / ".metadata"
    if not metadata.is_file() or not any(file.suffix == ".distcp" for file in folder.iterdir()):
        return False
    with open_input(metadata) as file:
        return b".lora_A." in file.read(_MAX_SCAN)


def _refuse_split(path: Path) -> None:
    """Raise Unsupported if the weights are split over ranks. The error contains a command that joins the weights."""
    try:
        zero3 = _is_zero3(path) if path.is_dir() else _ZERO3.fullmatch(path.name) is not None
        distributed = path.is_dir() and _is_distributed(path)
        ranks = [f for f in path.iterdir() if _ZERO.fullmatch(f.name)] if path.is_dir() and not zero3 else []
    except OSError as error:
        raise storage_error(error, path) from error
    if distributed:
        why = "this is a checkpoint of torch.distributed; its index is a pickle that runs code when it is loaded"
        command = f"python -m torch.distributed.checkpoint.format_utils dcp_to_torch {path} adapter_model.bin"
        raise Unsupported(why, path=path, cure=f"If you trust the checkpoint, convert it first: {command}")
    if zero3 or len(ranks) > 1:
        folder = path if path.is_dir() else path.parent
        what = "ZeRO-3" if zero3 else "tensor parallelism"
        why = f"this is a DeepSpeed checkpoint, and {what} has split its weights over ranks"
        command = f"python zero_to_fp32.py {folder.parent} OUT, with the zero_to_fp32.py in that folder"
        raise Unsupported(why, path=path, cure=f"If you trust the checkpoint, join its files first: {command}")


def _names(file: Path) -> Iterable[str]:
    if file.suffix == ".safetensors":
        return safetensors.read_header(file).entries
    return _tensors(file) if is_torch_file(file) else ()


def _tensors(file: Path) -> dict[str, Lazy]:
    """Return the tensors of a file by key. From DeepSpeed's model states, return only the trained tensors.

    Raises:
        Malformed: the file does not contain a state dict.
    """
    if file.suffix == ".safetensors":
        return safetensors.read(file)
    if _ZERO.fullmatch(file.name) is None:
        return read_torch_file(file)
    states = read_torch_value(file)
    states = states if isinstance(states, dict) else {}
    module = states.get("module")
    if not isinstance(module, dict) or not all(isinstance(leaf, Lazy) for leaf in module.values()):
        raise Malformed(
            "the value is not a dict of tensors",
            path=file,
            where="module",
            cure="Join the checkpoint with zero_to_fp32.py",
        )
    groups = states.get("param_shapes")
    groups = groups if isinstance(groups, list) else [groups]
    trained = {name for group in groups if isinstance(group, dict) for name in group}
    return {name: leaf for name, leaf in module.items() if not trained or name in trained}


def _without_wrapper(tensors: dict[str, Lazy]) -> dict[str, Lazy]:
    """Remove the prefix `module.` that DistributedDataParallel adds to every key."""
    if tensors and all(key.startswith("module.") for key in tensors):
        return {key.removeprefix("module."): leaf for key, leaf in tensors.items()}
    return tensors


# Read LoRA that SwissArmyTransformer (SAT) trained for CogVideoX. Part N of a fused weight has the tensors `matrix_A.N`
# and `matrix_B.N`.
#
# SAT (sat/model/finetune/lora2.py) adapts the attention module of each layer, and saves the whole model. Only LoRA's
# matrices are read, because all other tensors are frozen: SAT's configs have `not_trainable_prefixes: ['all']`, with an
# exception for the names of LoRA's matrices.


_KEY = re.compile(r"(.+)\.matrix_([AB])\.(\d+)", re.DOTALL)
OF_FAMILY = "adapterkit.family"
"""The metadata key for the adapter's model family. Writers choose module names by this family."""

FAMILY = "cogvideox"
"""The only model family whose module names in SAT are known."""


def is_sat(keys: Mapping[str, object]) -> bool:
    """Whether any of the keys is the name of a LoRA matrix in SAT."""
    return any(map(_KEY.fullmatch, keys))


def in_peft_names(tensors: Mapping[str, Lazy], alpha: float | None) -> dict[str, Lazy]:
    """Return SAT's LoRA matrices under PEFT's keys, with the module names of diffusers. Leave out all other tensors.

    Args:
        tensors: the tensors of the file, by key.
        alpha: LoRA's alpha. SAT saves alpha only in the training config, not in the file.

    Raises:
        UsageError: `alpha` is None.
        Unsupported: a key names a module, or a part of a fused weight, that CogVideoX does not have.
    """
    if alpha is None:
        why = "SwissArmyTransformer scales a LoRA by lora_alpha / r, but does not save lora_alpha"
        cure = "State the training config's lora_alpha with --alpha A (alpha=A); lora_alpha is 1 if the config has none"
        raise UsageError(why, cure=cure)
    family = next(each for each in families() if each.name == FAMILY)
    renamed = {}
    for key, leaf in tensors.items():
        if (match := _KEY.fullmatch(key)) is None:
            continue
        path, part = rooted(match[1])[1], int(match[3])
        pieces = family.moves(path, "native", "diffusers") if path in family.names("native") else ()
        if part >= len(pieces):
            why = f"SwissArmyTransformer's LoRA adapts a module that {family.title} does not have"
            raise Unsupported(
                why, where=key, cure="Export the adapter with the tool that trained it, with PEFT's or diffusers' keys"
            )
        renamed[f"transformer.{pieces[part].path}.lora_{match[2]}.weight"] = leaf
    return renamed
