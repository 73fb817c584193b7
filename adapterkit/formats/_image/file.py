"""Define classes for the keys, modules, updates and decoding rules of a file. Load and save tensor files."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...core.updates import Update
from ...errors import WRITE_AGAIN, AdapterkitError, Malformed, UsageError
from ...io import safetensors
from ...io.atomic import write_bytes
from ...io.inputs import decimal_number
from ...io.lazy import Lazy, as_torch, value_of
from ...io.torch_file import is_torch_file, read_torch_file
from .._format import FORMULA, Departure

if TYPE_CHECKING:
    from ...io.lazy import Leaf


# Read the network options in the header (`ss_network_args`). The options change the forward, and no tensor shows which
# options were set.
#
# sd-scripts writes the options as JSON. LyCORIS treats every value except `false` as true.


FLUX = "networks.lora_flux"
"""sd-scripts' LoRA network for FLUX."""

OPTIONS = {
    "split_qkv": Departure(
        "with split_qkv=True in ss_network_args of sd-scripts' networks.lora_flux, a LoRA's scaling is 3 alpha / r "
        "on a double block's qkv, and 4 alpha / r on a single block's linear1, because the parts of these fused "
        "weights were trained as separate LoRAs",
        "the scaling is alpha / r",
    ),
    "bypass_mode": Departure(
        "with bypass_mode in ss_network_args of a LyCORIS network, OFT, BOFT and IA3 on outputs also change the bias, "
        "and a dora_scale has no effect",
        "OFT, BOFT and IA3 change only the weight, and a dora_scale is DoRA's magnitude",
    ),
    "rs_lora": Departure(
        "with rs_lora in ss_network_args of a LyCORIS network, GLoRA's scaling is alpha / sqrt(r); the scaling of "
        "a LoKr with two full factors is sqrt(r); adapterkit computes this scaling as the cube root of the LoKr's "
        "alpha, because LyCORIS saves r * sqrt(r) as this alpha",
        "GLoRA's scaling is alpha / r, and the scaling of a LoKr with two full factors is 1",
    ),
    "dylora": Departure(
        "with algo=dylora in ss_network_args of a LyCORIS network, the scaling is "
        "alpha / (r / block_size) if all ranks are used",
        "the scaling is alpha / r",
    ),
}
"""The network options that change the forward of LyCORIS or sd-scripts, each with a description of the change."""


@dataclass(frozen=True, slots=True)
class Arguments:
    """The network options with which an adapter was trained.

    Attributes:
        bypass: whether training used LyCORIS's bypass mode. In this mode, the adapter changes the layer's output,
            including the bias, instead of the layer's weight, and DoRA's magnitudes have no effect.
        rs: whether training used LyCORIS's `rs_lora`, which divides the user's alpha by `sqrt(r)` instead of `r`.
            For most methods, LyCORIS saves that alpha times `sqrt(r)`. So the scaling is still `alpha / r`, with the
            file's alpha.
        unit: the number by which a LoRA's `alpha / r` is multiplied; 0 means 1. For DyLoRA, this is the number of ranks
            that are trained together.
        split: whether sd-scripts trained a separate LoRA for each part of FLUX's fused weights, and saved all LoRAs of
            a weight as one LoRA.
    """

    bypass: bool = False
    rs: bool = False
    unit: int = 0
    split: bool = False

    def at(self, stem: str) -> Arguments:
        """Return the options for the module whose name in the file's keys is `stem`."""
        if not self.split:
            return self
        fused = {"qkv": 3 if "double" in stem else 0, "linear1": 4 if "single" in stem else 0}
        return replace(self, unit=next((parts for word, parts in fused.items() if word in stem), 0))


def arguments_in(metadata: Mapping[str, str]) -> Arguments:
    """Return the network options in a file's header.

    Return the defaults if the header has no options, or if the network that the header names is neither a LyCORIS
    network nor `FLUX`.
    """
    network = metadata.get("ss_network_module", "")
    if not (network.startswith("lycoris") or network == FLUX):
        return Arguments()
    try:
        given: Any = json.loads(metadata.get("ss_network_args", "{}"))
    except (ValueError, RecursionError):
        return Arguments()
    if not isinstance(given, dict):
        return Arguments()
    if network == FLUX:
        return Arguments(split=str(given.get("split_qkv")) == "True")
    dylora = str(given.get("algo", "")).lower() == "dylora"
    return Arguments(_is_on(given, "bypass_mode"), _is_on(given, "rs_lora"), _unit(given) if dylora else 0)


def _is_on(given: Mapping[str, object], name: str) -> bool:
    return name in given and str(given[name]).lower() != "false"


def _unit(given: Mapping[str, object]) -> int:
    size = decimal_number(str(given.get("block_size") or 4))
    return 4 if size is None else size


@dataclass(frozen=True, slots=True)
class ImageKey:
    """A parsed key: the complete text, the module's name in the file (the stem), and the kind of tensor (the slot)."""

    text: str
    stem: str
    slot: str


@dataclass(frozen=True, slots=True, eq=False)
class ImageModule:
    """The tensors of one module in a file. A slot is the kind of a tensor, such as `down`, `up` or `alpha`.

    Attributes:
        stem: the module's name in the keys.
        tensors: the tensors by slot.
        keys: the complete keys by slot.
    """

    stem: str
    tensors: Mapping[str, Lazy]
    keys: Mapping[str, str]

    @property
    def where(self) -> str:
        """Return the module's first key. Errors name the module by this key."""
        return next(iter(self.keys.values()))

    def need(self, *slots: str) -> list[Lazy]:
        """Return the tensors of several slots, which must all be present.

        Raises:
            Malformed: a slot is missing.
        """
        missing = next((slot for slot in slots if slot not in self.tensors), None)
        if missing is not None:
            raise Malformed(
                f"the file lacks a tensor that this one needs: {missing}", where=self.where, cure=WRITE_AGAIN
            )
        return [self.tensors[slot] for slot in slots]

    def number(self, slot: str) -> float:
        """Return the value of a slot whose tensor has one element.

        Raises:
            Malformed: the tensor does not have exactly one element, or the element is not finite.
        """
        leaf = self.tensors[slot]
        if leaf.nbytes != leaf.dtype.itemsize:
            raise Malformed(
                f"the tensor must have one element, but its shape is {list(leaf.shape)}",
                where=self.keys[slot],
                cure=WRITE_AGAIN,
            )
        value = value_of(leaf)
        if not -1e300 < value < 1e300:
            raise Malformed(f"{value} is not a finite number", where=self.keys[slot], cure=WRITE_AGAIN)
        return value


@dataclass(frozen=True, slots=True)
class Rules:
    """A format's rules for decoding and encoding tensors.

    Attributes:
        alpha_needed: whether the format's trainers write an alpha for every module. If an alpha is missing or 0, the
            forward of these trainers uses the rank as alpha. In other formats, a missing alpha gives a scaling of 1,
            and an alpha of 0 is an error unless `by_formula` is set.
        by_formula: whether to follow the paper's formula. If so, an alpha of 0 gives a scaling of 0, and a missing
            alpha is an error in formats with `alpha_needed`.
        oft_zero: whether an alpha of 0 means that an OFT's rotation has no constraint. If false, an alpha of 0 is
            an error, because it would allow no rotation at all.
        norms: whether changes of one-dimensional weights are stored in the slots `w_norm` and `b_norm`.
        peft: whether DoRA's magnitude has PEFT's shape: `[out]`, or `[1, out, 1, ...]` for a convolution. If false, the
            shape is `[out, 1, ...]`.
        slots: names or prefixes of the slots that the format has.
        trained: the network options in the file's header.
    """

    alpha_needed: bool = False
    by_formula: bool = False
    oft_zero: bool = True
    norms: bool = False
    peft: bool = False
    slots: tuple[str, ...] = ()
    trained: Arguments = field(default_factory=Arguments)


def rules_at(rules: Rules, stem: str) -> Rules:
    """Return the rules for the module whose name in the file's keys is `stem`."""
    there = rules.trained.at(stem)
    return rules if there is rules.trained else replace(rules, trained=there)


def rules_for(rules: Rules, compat: str | None, metadata: Mapping[str, str]) -> Rules:
    """Return a format's rules with `by_formula` and `trained` set from the caller's `compat` and a file's metadata."""
    by_formula = compat == FORMULA
    return replace(rules, by_formula=by_formula, trained=Arguments() if by_formula else arguments_in(metadata))


@dataclass(frozen=True, slots=True, eq=False)
class ImageUpdate:
    """An update that was decoded from a module's slots.

    Attributes:
        update: the decoded update.
        fields: a map from field to slot, for each field that has the same values as one slot's tensor. The field may
            have another shape.
        kept: slots whose original tensors the adapter stores, so that the writer can write the same file again.
        derived: a map from slots in `kept` to the field that was computed from the slot's tensor.
        idle: slots whose tensors have no effect. The adapter stores these tensors too, so that the writer can write
            them again.
    """

    update: Update
    fields: Mapping[str, str]
    kept: tuple[str, ...] = ()
    derived: Mapping[str, str] = field(default_factory=dict)
    idle: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class StoredTensor:
    """A tensor to write, and its slot.

    `field` is the update's field that the tensor comes from. It is empty for tensors such as an alpha.
    """

    slot: str
    leaf: Leaf
    field: str = ""


def inputs_of(modules: Iterable[ImageModule]) -> set[int]:
    """Return the input sizes of all modules that have a `down` (LoRA's A)."""
    downs = (module.tensors["down"].shape for module in modules if "down" in module.tensors)
    return {shape[1] for shape in downs if len(shape) > 1}


# Load and save tensor files: safetensors with metadata, and torch files.


TORCH_SUFFIXES = {".bin", ".ckpt", ".pt", ".pth"}
"""Suffixes of torch files."""

NATIVE = "adapterkit"
"""The metadata key that marks files in adapterkit's own format. The image formats do not read such files."""

Metadata = list[tuple[str, str]]
"""Metadata as (key, value) pairs. The pairs keep the file's order, which need not be alphabetical."""


def load_tensors(path: Path) -> tuple[dict[str, Lazy], Metadata]:
    """Load the tensors and the metadata of a file.

    Raises:
        Malformed: the file is not a tensor file, or is in adapterkit's own format.
        StorageError: the file cannot be read.
        UsageError: the path is a folder.
    """
    if path.is_dir():
        raise UsageError("this is a folder; a tensor file is expected here", path=path, cure="Pass the file itself")
    if path.suffix in TORCH_SUFFIXES or is_torch_file(path):
        return read_torch_file(path), []
    header = safetensors.read_header(path)
    if NATIVE in header.metadata:
        raise Malformed(
            "this file is in adapterkit's format",
            path=path,
            where="__metadata__",
            cure="Read the file with --from adapterkit (format='adapterkit')",
        )
    tensors = safetensors.handles(header)
    return tensors, list(header.metadata.items())


def tensor_names(path: Path) -> list[str]:
    """Return the keys of a file, for detection; an empty list if the file is not a tensor file."""
    try:
        if not path.is_file():
            return []
        if path.suffix in TORCH_SUFFIXES or is_torch_file(path):
            return list(read_torch_file(path))
        header = safetensors.read_header(path)
        return [] if NATIVE in header.metadata else list(header.entries)
    except AdapterkitError:
        return []


def save_tensors(path: Path, tensors: Mapping[str, Lazy], metadata: Metadata) -> None:
    """Write tensors to a file atomically.

    If the suffix is in `TORCH_SUFFIXES`, write a torch file, which has no metadata. Otherwise, write safetensors.
    """
    if path.suffix not in TORCH_SUFFIXES:
        return safetensors.write(path, tensors, dict(metadata))
    import torch

    buffer = io.BytesIO()
    torch.save({key: as_torch(leaf) for key, leaf in tensors.items()}, buffer)
    return write_bytes(path, buffer.getvalue())
