"""Read and write diffusers' LoRA files for whole pipelines. A key begins with the name of a component.

Releases of diffusers have written three styles of keys. Since 0.35, the header may contain PEFT's config of each
component, under the key `lora_adapter_metadata`. In files with neither this key nor alphas, every scaling is 1.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ..core.adapter import Target, Updates, canonical
from ..errors import AdapterkitError, Malformed, ShapeMismatch, Unrepresentable, Unsupported
from ..io.arrange import times
from ..io.lazy import as_lazy
from ..io.strict_json import load_json
from ..methods.dense import Dense
from ..methods.dora import DoRA
from ..methods.lokr import LoKr
from ..methods.lora import LoRA
from ..methods.replacement import Replacement
from ..naming.image import PARTS, component_of, families, rooted
from ._image.deciding import candidates, denoiser_targets
from ._image.file import TORCH_SUFFIXES, ImageKey, ImageModule, ImageUpdate, Metadata, Rules, tensor_names
from ._image.hints import ImageHints
from ._image.image_format import ImageFormat, folder_file
from ._image.translate import narrow

if TYPE_CHECKING:
    from ..core.updates import Update
    from ..io.checkpoint import Checkpoint
    from ..io.strict_json import JsonValue
    from ._image.deciding import Origin
    from ._image.translate import Changed, Losses
    from ._image.underscores import TargetPaths
    from .peft.file import PeftSettings


CONFIG = "lora_adapter_metadata"
FILES = ("pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin")

_PART = f"(?:{'|'.join(PARTS)})"
_THIRD = re.compile(
    rf"({_PART}\..+)\.(lora_A(?:\.default)?\.weight|lora_B(?:\.default)?\.weight|lora_B\.bias|lora_down\.weight"
    r"|lora_up\.weight|lora_magnitude_vector(?:(?:\.default)?\.weight)?|magnitude|dora_scale"
    r"|oft_R\.(?:weight|scaled_oft))"
)
_SECOND = re.compile(rf"({_PART}\..+?)\.(?:lora|lora_linear_layer)\.(down|up)\.weight")
_ALPHA = re.compile(rf"({_PART}\..+?)(?:\.lora|\.lora_linear_layer)?\.alpha")
_FIRST = re.compile(
    rf"((?:{_PART}\.)?.+)\.processor\.(to_[qkv]|to_out|add_[kqv]_proj|to_add_out)_lora\.(down|up)\.weight"
)

SLOTS = {
    "down": "lora_A.weight", "up": "lora_B.weight", "bias": "lora_B.bias", "dora": "lora_magnitude_vector",
    "alpha": "alpha",
}  # fmt: skip

SCALE = "set_weight"
"""The slot of a norm's new scale. FLUX's control LoRAs replace the scales of the norms of queries and keys."""

_LOKR = re.compile(rf"({_PART}\..+)\.(lokr_(?:w[12](?:_[ab])?|t2))")

_NORM = re.compile(r"transformer\.(?:single_)?transformer_blocks\.\d+\.attn\.norm_(?:added_)?[qk]")

_WORDS = {word: slot for slot, word in SLOTS.items()} | {
    "lora_magnitude_vector.weight": "dora", "lora_magnitude_vector.default.weight": "dora", "magnitude": "dora",
    "lora_A.default.weight": "down", "lora_B.default.weight": "up",
    "lora_down.weight": "down", "lora_up.weight": "up", "dora_scale": "dora", "oft_R.weight": "oft_R",
    "oft_R.scaled_oft": "oft_scaled",
}  # fmt: skip
"""A map from the endings of keys to slots.

OneTrainer writes `dora_scale` and `oft_R`; ai-toolkit writes `magnitude`.
"""


class Diffusers(ImageFormat):
    """`pytorch_lora_weights.safetensors`, or a folder with this file."""

    url = "https://huggingface.co/docs/diffusers/main/en/api/loaders/lora"
    description = (
        "diffusers' pipelines: LoRA and DoRA for each component, scalings in the header; all three styles of keys"
    )
    identities = True
    methods = frozenset({"dora", "lokr", "lora", "replacement"})
    owns = frozenset(FILES)
    rules = Rules(peft=True, slots=(*SLOTS, SCALE, "lokr_"))
    naming = "diffusers"
    _whole_norms: bool = True
    """Whether updates may replace norms. `renamed` sets this attribute.

    It is true if diffusers' loader accepts replaced norms for at least one family that fits the adapter. It is also
    true if no family fits.
    """

    def chosen(self, path: Path, *, write: bool = False) -> Path:
        if write:
            return path / FILES[0] if path.is_dir() or not path.suffix else path
        return folder_file(path, FILES)

    def rules_in(self, file: Path, hints: ImageHints) -> Rules:
        """Return the rules for writing.

        A torch file has no header that could store scalings. If the source file has alphas, the new file has alphas
        too. Otherwise, a torch file can store only updates whose scaling is 1.
        """
        if file.suffix not in TORCH_SUFFIXES or len(hints.without_alpha) < len(hints.stems):
            return self.rules
        return replace(self.rules, slots=tuple(slot for slot in self.rules.slots if slot != "alpha"))

    def sniff(self, path: Path) -> bool:
        try:
            keys = tensor_names(self.chosen(path))
        except AdapterkitError:
            return False
        # Refuse NOLA's checkpoints of GPT-2, whose keys also begin with `transformer`. Only NOLA's keys end in
        # `coefficients`.
        if any(key.endswith(".coefficients") for key in keys):
            return False
        return any(key for key in map(self.parse, keys) if key is not None and key.slot not in ("alpha", SCALE))

    def parse(self, key: str) -> ImageKey | None:
        if key.startswith(("double_blocks.", "single_blocks.")):
            return None
        if match := _FIRST.fullmatch(key):
            part = "to_out.0" if match[2] == "to_out" else match[2]
            return ImageKey(key, f"{match[1]}.{part}", match[3])
        if match := _SECOND.fullmatch(key):
            return ImageKey(key, match[1], match[2])
        if match := _THIRD.fullmatch(key):
            return ImageKey(key, match[1], _WORDS[match[2]])
        if match := _LOKR.fullmatch(key):
            return ImageKey(key, match[1], match[2])
        stem, _, word = key.rpartition(".")
        if word == "weight" and _NORM.fullmatch(stem):
            return ImageKey(key, stem, SCALE)
        match = _ALPHA.fullmatch(key)
        return ImageKey(key, match[1], "alpha") if match else None

    def spell(self, stem: str, slot: str) -> str:
        return f"{stem}.weight" if slot == SCALE else f"{stem}.{SLOTS.get(slot, slot)}"

    def targets(
        self, modules: Mapping[str, ImageModule], metadata: Mapping[str, str], base: Checkpoint | None
    ) -> dict[str, Target]:
        return {stem: Target(_path(stem)) for stem in modules}

    def switch(self, stem: str) -> str:
        return stem.partition(".")[0]

    def stem(self, target: Target, paths: TargetPaths, update: Update) -> str | None:
        component, (_, rest) = component_of(target.path), rooted(target.path)
        stem = f"{component}.{rest}"
        if component is None or target.rows or (isinstance(update, Replacement) and not _NORM.fullmatch(stem)):
            return None
        return stem

    def prepared(self, updates: Updates) -> Updates:
        """Move each separate bias update into the LoRA of the same module, as diffusers' own converter does."""
        return _with_biases(updates)

    def why_not(self, target: Target, update: Update, rules: Rules) -> str:
        if isinstance(update, Dense) and update.D is not None and len(update.D.shape) == 1:
            if _NORM.fullmatch(target.path) and self._whole_norms:
                return (
                    "it changes a norm by a difference, but FLUX's loader accepts only complete norms: pass the base "
                    "with --base (base=), and --on-loss promote (on_loss='promote')"
                )
            return (
                "it changes a norm by a difference, which diffusers' loaders do not accept; LoRA cannot change a vector"
            )
        if isinstance(update, Replacement) and not self._whole_norms:
            return "it replaces a norm, which only FLUX's loader accepts"
        return super().why_not(target, update, rules)

    def renamed(self, updates: Updates, kept: Collection[str], origin: Origin, *, fold: bool) -> tuple[Changed, Losses]:
        """Rename targets to diffusers' naming.

        A component cannot mix LoKr with LoRA or DoRA. If a component has both kinds, the kind with fewer updates is
        refused.
        """
        fitting = candidates(updates, denoiser_targets(updates, ()), origin)
        self._whole_norms = not fitting or any(family.facts.whole_norms for family in fitting)
        changed, losses = super().renamed(updates, kept, origin, fold=fold)
        kinds: dict[str, dict[bool, list[Target]]] = {}
        for target, group in changed.items():
            for update in group:
                if isinstance(update, (LoKr, LoRA, DoRA)):
                    part = component_of(target.path) or ""
                    kinds.setdefault(part, {}).setdefault(isinstance(update, LoKr), []).append(target)
        mixed = [min(kind.values(), key=len) for kind in kinds.values() if len(kind) > 1]
        return changed, [
            *losses,
            *((target, "one component cannot have both lokr and lora") for each in mixed for target in each),
        ]

    def rescaled(self, decoded_update: ImageUpdate, stem: str, metadata: Mapping[str, str]) -> ImageUpdate:
        part, _, name = stem.partition(".")
        settings = _settings(metadata.get(CONFIG, "")).get(part)
        update = cast(Any, decoded_update.update)
        if settings is None or isinstance(update, Replacement):
            return decoded_update
        if isinstance(update, LoKr):
            raise Unsupported(
                "the header must not have a config for LoKr", where=stem, cure=f"Remove {CONFIG} from the header"
            )
        rank = update.dims()["r"]  # `dims` raises a typed error for wrong shapes.
        if settings.rank(name) != rank:
            why = f"the tensors have rank {rank}; {CONFIG} states {settings.rank(name)}"
            raise ShapeMismatch(why, where=stem, cure="Write the file again: its header belongs to other tensors")
        if bool(settings.use_dora) != isinstance(update, DoRA):
            why = f"the tensors are {update.method}, but {CONFIG} states use_dora={settings.use_dora}"
            raise Malformed(why, where=stem, cure="Write the file again: its header belongs to other tensors")
        if bool(settings.lora_bias) != (update.tensors.get("bias") is not None):
            why = f"{CONFIG} states lora_bias={settings.lora_bias}, which contradicts the module's tensors"
            raise Malformed(why, where=stem, cure="Write the file again: its header belongs to other tensors")
        if update.scaling != 1:
            raise Malformed(f"the file has both an alpha and {CONFIG}", where=stem, cure="Remove one of the two")
        return ImageUpdate(
            update.replace(scaling=settings.scaling(name)),
            decoded_update.fields,
            decoded_update.kept,
            decoded_update.derived,
        )

    def metadata(self, updates: Updates, hints: ImageHints, stems: Mapping[str, str]) -> tuple[Metadata, bool]:
        old = hints.metadata if hints.stems else [("format", "pt")]
        if hints.stems and len(hints.without_alpha) < len(hints.stems):
            return old, False
        pairs = ((stems[str(t)], u) for t, group in updates.items() for u in group)
        each: list[tuple[str, Any]] = [(stem, u) for stem, u in pairs if not isinstance(u, (LoKr, Replacement))]
        scales = {stem: (int(u.A.shape[0]), float(u.scaling), u) for stem, u in each}
        if _say(_settings(dict(old).get(CONFIG, "")), scales):
            return old, True
        config = _composed(scales)
        text = json.dumps(config, indent=2, sort_keys=True)
        return [*((k, v) for k, v in old if k != CONFIG), (CONFIG, text)], True


def _path(stem: str) -> str:
    """Return the target path of a module. A name without a component belongs to the U-Net.

    SimpleTuner writes PEFT's prefix after the component. If the model was wrapped twice, the name repeats the
    component. mflux calls the output of FLUX.2's attention `to_out`; diffusers calls the same module `to_out.0`.
    """
    root, rest = rooted(stem)
    rest = rest.removeprefix("base_model.model.")
    others = [rest.removeprefix(root)] * rest.startswith(root or " ") + [f"{rest}.0"] * rest.endswith(".to_out")
    if others and not any(rest in family for family in families()):
        rest = next((other for other in others if any(other in family for family in families())), rest)
    return f"{root or 'unet.'}{rest}"


def _with_biases(updates: Updates) -> Updates:
    """Move each separate bias update into the LoRA of the same module.

    `lora_bias` is one setting for a whole component. So if one LoRA of a component has a bias, the component's other
    LoRAs get a bias of zeros.
    """
    joined: dict[Target, tuple[Update, ...]] = {}
    for target, group in updates.items():
        if len(group) != 2 or not isinstance(group[0], LoRA) or not isinstance(group[1], Dense):
            continue
        lora, dense = cast(tuple[LoRA, Dense], group)
        if lora.bias is None and lora.scaling and dense.D is None and dense.d is not None:
            bias = times(dense.d, dense.scaling / lora.scaling) if dense.scaling != lora.scaling else as_lazy(dense.d)
            joined[target] = (lora.replace(bias=bias),)
    parts = {component_of(target.path) for target in joined}
    parts |= {
        component_of(target.path)
        for target, group in updates.items()
        if any(isinstance(update, LoRA) and update.bias is not None for update in group)
    }
    for target, group in updates.items():
        alone = group[0] if len(group) == 1 else None
        if target.stacked or not isinstance(alone, LoRA):
            continue  # Keys cannot name experts, so a later step refuses updates of experts.
        if alone.bias is None and component_of(target.path) in parts:
            column = narrow(times(alone.B, 0.0), 1, 0, 1)
            joined[target] = (alone.replace(bias=column.reshape(column.shape[0])),)
    return {target: joined.get(target, group) for target, group in updates.items()}


@lru_cache(maxsize=4)
def _settings(text: str) -> dict[str, PeftSettings]:
    """Parse the PEFT configs in the header, and return the settings of each component.

    Raises:
        Malformed: the text is not a JSON object of configs.
        Unsupported: a config needs a feature that this version does not have.
    """
    from .peft.config import parse

    if not text:
        return {}
    try:
        fields = load_json(text)
    except (ValueError, RecursionError) as error:
        raise Malformed(
            f"the header's {CONFIG} is not valid JSON ({error})", where=CONFIG, cure="Write the file again"
        ) from None
    if not isinstance(fields, dict) or not all("." in name for name in fields):
        why = "the value must be a JSON object whose keys are COMPONENT.FIELD, such as transformer.r"
        raise Malformed(why, where=CONFIG, cure="Write the file again with diffusers")
    parts: dict[str, dict[str, Any]] = {}
    for name, value in fields.items():
        part, _, field = name.partition(".")
        parts.setdefault(part, {"peft_type": "LORA"})[field] = value
    return {part: parse({**config, "peft_type": "LORA"}) for part, config in parts.items()}


def _say(settings: Mapping[str, PeftSettings], scales: Mapping[str, tuple[int, float, object]]) -> bool:
    """Whether the header's configs give each module the same rank, scaling and method as `scales`.

    Without configs, diffusers assumes that each component has a single rank, and that all scalings are 1. So if
    `settings` is empty, return whether this holds for `scales`.
    """
    if not settings:
        parts: dict[str, set[int]] = {}
        for stem, (rank, scaling, _) in scales.items():
            parts.setdefault(stem.partition(".")[0], set()).add(rank if scaling == 1 else -1)
        return all(len(ranks) == 1 and -1 not in ranks for ranks in parts.values())
    for stem, (rank, scaling, update) in scales.items():
        part, _, name = stem.partition(".")
        known = settings.get(part)
        if known is None or known.rank(name) != rank or known.scaling(name) != scaling:
            return False
        if bool(known.use_dora) != isinstance(update, DoRA):
            return False
    return True


def _composed(scales: Mapping[str, tuple[int, float, object]]) -> dict[str, JsonValue]:
    """Create the configs for the header, as one dict. Each field's name begins with its component, as in `unet.r`."""
    parts: dict[str, dict[str, tuple[int, float, Any]]] = {}
    for stem, scale in scales.items():
        part, _, name = stem.partition(".")
        parts.setdefault(part, {})[name] = scale
    config: dict[str, Any] = {}
    for part, fields in parts.items():
        config |= {f"{part}.{field}": value for field, value in _fields(part, fields).items()}
    canonical(config)
    return config


def _fields(part: str, stored_fields: Mapping[str, tuple[int, float, object]]) -> dict[str, JsonValue]:
    from .peft.patterns import number_fields

    fields, inexact = number_fields(
        {name: (rank, scaling) for name, (rank, scaling, _) in stored_fields.items()}, (False, True)
    )
    if inexact:
        items = [f"{part}.{name}: no alpha yields its exact scaling" for name in inexact]
        raise Unrepresentable(
            "diffusers stores a scaling as alpha / r", items=items, cure="Write kohya's format: --to kohya"
        )
    flags = {
        "use_dora": [isinstance(update, DoRA) for _, _, update in stored_fields.values()],
        "lora_bias": [getattr(update, "bias", None) is not None for _, _, update in stored_fields.values()],
    }
    for name, values in flags.items():
        if len(set(values)) > 1:
            why = f"{name} is one setting for all modules of {part}, but its modules need different values"
            raise Unrepresentable(why, cure="Write another format: --to kohya or --to adapterkit")
    return {**fields, **{name: values[0] for name, values in flags.items()}, "target_modules": sorted(stored_fields)}
