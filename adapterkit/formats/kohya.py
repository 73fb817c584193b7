"""Read and write files of kohya's sd-scripts: LoRA, LoCon, DoRA and OFT for image models and their text encoders.

A key has three parts: a prefix that stands for a component of the pipeline, the module's path with underscores instead
of dots, and a slot such as `lora_down.weight`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from ..core.adapter import Target, Updates
from ..errors import WRITE_AGAIN, Malformed, ShapeMismatch
from ..methods.oft import OFT
from ..naming.image import KOHYA, component_of, families, families_of, is_not_xl, is_xl, rooted
from ._format import FORMULA, Departure
from ._image.file import OPTIONS, ImageKey, ImageModule, Metadata, Rules, tensor_names
from ._image.hints import ImageHints
from ._image.image_format import ALPHAS, PADDING, ImageFormat
from ._image.underscores import TargetPaths, prefixes_of, resolve, stem_of

if TYPE_CHECKING:
    from ..core.updates import Update
    from ..io.checkpoint import Checkpoint
    from ..io.lazy import Lazy
    from ._image.deciding import Origin
    from ._image.translate import Changed, Losses


SLOTS = {
    "down": "lora_down.weight", "up": "lora_up.weight", "mid": "lora_mid.weight", "alpha": "alpha",
    "dora": "dora_scale", "oft_blocks": "oft_blocks",
}  # fmt: skip

_WORDS = {word: slot for slot, word in SLOTS.items()} | {"oft_R.weight": "oft_R", "oft_R.scaled_oft": "oft_scaled"}
"""A map from the ends of keys to slots. The keys with `oft_R` are OneTrainer's; they are read, but never written."""

_KEY = re.compile(
    r"((?:lora_unet|lora_transformer|lora_te[1234]?|lora_prior_(?:unet|te)|oft_unet|Hunyuan_video_I2V_lora)_[^.]+)\.(.+)"
)


class Kohya(ImageFormat):
    """Files of sd-scripts, and of tools that write the same keys."""

    url = "https://github.com/kohya-ss/sd-scripts"
    description = "kohya's sd-scripts: LoRA, LoCon, DoRA and OFT for image models; module names have underscores"
    departures: ClassVar[Mapping[str, Departure]] = ALPHAS | OPTIONS | PADDING
    compat = frozenset({FORMULA})
    bundles = True
    file = "lora.safetensors"
    methods = frozenset({"dora", "lora", "oft", "weight_norm"})
    rules = Rules(alpha_needed=True, oft_zero=False, slots=tuple(SLOTS))

    def sniff(self, path: Path) -> bool:
        keys = tensor_names(path)
        return any(map(self.parse, keys)) and not any(key.startswith("lycoris_") or _foreign(key) for key in keys)

    def parse(self, key: str) -> ImageKey | None:
        match = _KEY.fullmatch(key)
        if match is None or not (match[2] in _WORDS or PART.fullmatch(match[2])):
            return None
        if match[1].startswith("oft_unet_") != match[2].startswith("oft_blocks") and match[2] != "alpha":
            return None
        return ImageKey(key, match[1], _WORDS.get(match[2], match[2]))

    def spell(self, stem: str, slot: str) -> str:
        bare, _, part = stem.partition(".")
        word = SLOTS.get(slot, slot)
        return f"{bare}.{word}.{part}" if part and slot == "oft_blocks" else f"{bare}.{word}"

    def modules(self, tensors: Mapping[str, Lazy]) -> dict[str, ImageModule]:
        return {part.stem: part for module in super().modules(tensors).values() for part in parts(module)}

    def targets(
        self, modules: Mapping[str, ImageModule], metadata: Mapping[str, str], base: Checkpoint | None
    ) -> dict[str, Target]:
        # The parts of a fused weight, such as q, k and v, have the stems `NAME.0`, `NAME.1` and so on. Resolve only
        # `NAME`, because the model has no modules with the numbered names.
        whole = {stem.partition(".")[0]: module for stem, module in modules.items()}
        paths = resolve(whole, metadata, base)
        rows = rows_of(modules)
        return {stem: Target(paths[stem.partition(".")[0]], rows=rows.get(stem)) for stem in modules}

    def renamed(self, updates: Updates, kept: Collection[str], origin: Origin, *, fold: bool) -> tuple[Changed, Losses]:
        """Rename targets to the names that sd-scripts uses.

        sd-scripts uses LDM's names for SDXL, diffusers' names for Stable Diffusion 1 and 2, and native names for other
        models.
        """
        from ._image.deciding import candidates, denoiser_targets
        from ._image.translate import in_naming

        inside = {target: each for target, each in updates.items() if component_of(target.path) == "unet"}
        others = {target: each for target, each in updates.items() if target not in inside}
        paths = [rooted(target.path)[1] for target in inside]
        # If all targets are modules of the base, set the naming to KOHYA: targets that fit no known family then keep
        # their names. With another naming, these targets would be refused. A reader that has the base can resolve the
        # kept names, because `resolve` also compares names with the base's names.
        origin = replace(origin, naming=KOHYA) if origin.inside else origin
        turned_there = [t for t, each in others.items() if any(isinstance(update, OFT) for update in each)]
        if turned_there and not origin.families:
            trained = tuple(family.name for family in families() if family.facts.sd_scripts)
            fitting = candidates(others, denoiser_targets(others, kept), origin)
            if fitting and not any(family.name in trained for family in fitting):
                why = f"sd-scripts has no OFT for {fitting[0].title}"
                return dict(updates), [(target, why) for target in turned_there]
            origin = replace(origin, families=trained)
        moved, losses = in_naming(others, KOHYA, kept, origin, fold=fold)
        stated = is_xl(paths) or is_not_xl(paths) or prefixes_of([target.path for target in inside])
        unets, more = in_naming(inside, KOHYA, kept, origin, fold=fold) if stated else (inside, [])
        changed = {**unets, **moved}
        return changed, [*losses, *more, *uneven(changed), *mixed(changed)]

    def stem(self, target: Target, paths: TargetPaths, update: Update) -> str | None:
        if not isinstance(update, OFT):
            return None if target.rows else stem_of(target.path, paths)
        stem = stem_of(target.path, paths, tag="oft_unet")
        if stem is None or not stem.startswith("oft_unet_"):
            return None
        part = number_of(target)
        if of_flux(target):
            return None if part is None else f"{stem}.{part}"
        return None if target.rows else stem

    def metadata(self, updates: Updates, hints: ImageHints, stems: Mapping[str, str]) -> tuple[Metadata, bool]:
        return (hints.metadata if hints.stems else [("ss_network_module", "networks.lora")]), False


def _foreign(key: str) -> bool:
    """Whether LyCORIS, not sd-scripts, wrote a key.

    LyCORIS uses kohya's prefixes, but its own slots; see `LYCORIS`.
    """
    match = _KEY.fullmatch(key)
    slot = match[2] if match else ""
    return bool(match) and slot.startswith(LYCORIS) and not key.startswith("oft_unet_")


LYCORIS = (
    "hada_", "lokr_", "oft_blocks", "a1.", "a2.", "b1.", "b2.", "bm.", "w_norm", "b_norm", "diff", "on_input",
    "q_layer", "p_layer", "lambda_layer", "rescale",
)  # fmt: skip
"""The prefixes of LyCORIS's slots.

sd-scripts uses only one of these prefixes, `oft_blocks`, and only in keys that begin with `oft_unet_`.
"""


# Read kohya's OFT for FLUX, which rotates each part of a fused weight separately. Part N has the slot `oft_blocks.N`:
# queries, keys and values are parts 0 to 2, and the MLP in linear1 is part 3. Weights that are not fused have only part
# 0. All modules in a file have the same number of blocks and the same alpha. Source: `networks/oft_flux.py` of
# sd-scripts.


PART = re.compile(r"oft_blocks\.(\d+)")
_PARTS = {"qkv": 3, "linear1": 4}
"""A map from the last name in a fused weight's path to the number of the weight's parts."""


def parts(module: ImageModule) -> list[ImageModule]:
    """Split a module into its numbered parts, named `MODULE.NUMBER`. A module without parts is returned unchanged.

    Raises:
        Malformed: a part is missing, or the module has both `oft_blocks` and `oft_blocks.N`.
    """
    numbered = {int(match[1]): slot for slot in module.tensors if (match := PART.fullmatch(slot))}
    if not numbered:
        return [module]
    lost = next((number for number in range(len(numbered)) if number not in numbered), None)
    if lost is not None or "oft_blocks" in module.tensors:
        why = "the module has both oft_blocks and oft_blocks.0" if lost is None else f"oft_blocks.{lost} is missing"
        raise Malformed(why, where=module.where, cure=WRITE_AGAIN)
    return [_part(module, number, numbered[number]) for number in range(len(numbered))]


def _part(module: ImageModule, number: int, slot: str) -> ImageModule:
    slots = {"oft_blocks": slot} | ({"alpha": "alpha"} if "alpha" in module.tensors else {})
    tensors = {name: module.tensors[slot_name] for name, slot_name in slots.items()}
    return ImageModule(
        f"{module.stem}.{number}", tensors, {name: module.keys[slot_name] for name, slot_name in slots.items()}
    )


def rows_of(modules: Mapping[str, ImageModule]) -> dict[str, tuple[int, int]]:
    """Return a map from each part of a fused weight, named `MODULE.NUMBER`, to its range of rows in the weight.

    Raises:
        ShapeMismatch: the tensor of a part does not have three axes, [blocks, size, size].
    """
    rows: dict[str, tuple[int, int]] = {}
    for stem, module in modules.items():
        bare, _, number = stem.partition(".")
        if not number or f"{bare}.1" not in modules:
            continue
        shape = module.tensors["oft_blocks"].shape
        if len(shape) != 3:
            raise ShapeMismatch(
                f"the shape is {list(shape)}, not [blocks, size, size]",
                where=module.keys["oft_blocks"],
                cure=WRITE_AGAIN,
            )
        start = 0 if number == "0" else rows[f"{bare}.{int(number) - 1}"][1]
        rows[stem] = (start, start + shape[0] * shape[1])
    return rows


def number_of(target: Target) -> int | None:
    """Return the number N in the slot `oft_blocks.N` for a target in FLUX; None if the target has no such slot.

    N is 0 for a weight that is not fused. For a fused weight, the target's rows must be exactly those of one part.
    """
    if not of_flux(target):
        return None
    count = _PARTS.get(target.path.rpartition(".")[2], 1)
    if target.rows is None:
        return 0 if count == 1 else None
    start, size = target.rows[0], target.rows[1] - target.rows[0]
    if count == 4 and 4 * start == 3 * size:
        return 3
    return start // size if start % size == 0 and start // size < min(count, 3) and count > 1 else None


def of_flux(target: Target) -> bool:
    """Whether a target has the native name of a module in FLUX's transformer."""
    rest = rooted(target.path)[1]
    return component_of(target.path) == "transformer" and any(f.name == "flux" for f in families_of(rest, "native"))


def mixed(updates: Updates) -> Iterator[tuple[Target, str]]:
    """Yield (target, reason) for each target of the rarer kind, if some updates are OFT and others are not.

    Each network of sd-scripts reads only one of the two kinds, and ignores the other keys.
    """
    kinds: dict[bool, list[Target]] = {}
    for target, group in updates.items():
        kinds.setdefault(any(isinstance(update, OFT) for update in group), []).append(target)
    if len(kinds) > 1:
        why = "a file of sd-scripts has either oft or other methods, because each of its networks reads only one kind"
        yield from ((target, why) for target in min(kinds.values(), key=len))


def uneven(updates: Updates) -> Iterator[tuple[Target, str]]:
    """Yield (target, reason) for each OFT that sd-scripts would misread.

    Every part of a fused weight needs an update. All updates need the same number of blocks and the same constraint.
    """
    turned = {t: u for t, group in updates.items() for u in group if isinstance(u, OFT) and u.square is not None}
    numbers: dict[str, set[int | None]] = {}
    for target in turned:
        numbers.setdefault(target.path, set()).add(number_of(target))
    forms_of = {target: _settings_of(update) for target, update in turned.items()}
    for target in turned:
        count = _PARTS.get(target.path.rpartition(".")[2], 1) if of_flux(target) else 0
        if count and numbers[target.path] != set(range(count)):
            yield (
                target,
                (
                    f"OFT must adapt all {count} parts of a fused weight separately"
                    if count > 1
                    else "OFT must adapt this weight as a whole, not only some rows"
                ),
            )
        elif forms_of[target] != next(iter(forms_of.values())):
            yield (
                target,
                "its number of blocks, or its constraint per output, differs from that of the other updates",
            )


def _settings_of(update: OFT) -> tuple[int, float]:
    n, size = (int(axis) for axis in update.square.shape[:2])  # type: ignore[union-attr]
    return n, update.constraint / (n * size)
