"""Read and write files with ComfyUI's names: `diffusion_model.`, the module's dotted path, and a slot.

ai-toolkit, musubi-tuner and others write the same names with the slots `lora_A` and `lora_B`, without alpha. Files of
DiffSynth, the Lightning distillations, fal and ACE-Step have either PEFT's prefix or none. A file without ComfyUI's
prefix is recognised only if a known family has all modules that the file names, because nothing else in the file
identifies the model.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from ..core.adapter import Target, Updates
from ..errors import WRITE_AGAIN, Malformed, TargetNotFound
from ..methods.dense import Dense
from ..methods.lora import LoRA
from ..naming.image import (
    COMFYUI,
    LLM_PREFIXES,
    ROOTS,
    beside,
    component_of,
    denoiser_of,
    encoder_kind,
    families,
    families_of_names,
    families_with,
    in_other_words,
    rooted,
)
from ..naming.moves import WRAPPERS
from ._image.deciding import (
    CONTROLNET,
    PREFIXES,
    candidates,
    denoiser_targets,
    encoder_kinds,
    has_encoders,
    may_be_controlnet,
    names_family,
    narrowed,
)
from ._image.file import ImageKey, ImageModule, Metadata, Rules, inputs_of, tensor_names
from ._image.hints import ImageHints
from ._image.image_format import ImageFormat

if TYPE_CHECKING:
    from ..core.updates import Update
    from ..io.checkpoint import Checkpoint
    from ..io.lazy import Array, Lazy
    from ..naming.image import ImageFamily
    from ._image.deciding import Origin
    from ._image.translate import Changed, Losses
    from ._image.underscores import TargetPaths

SLOTS = {
    "down": "lora_down.weight", "up": "lora_up.weight", "mid": "lora_mid.weight", "alpha": "alpha",
    "dora": "dora_scale",
    **{f"hada_{x}": f"hada_{x}" for x in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    **{f"lokr_{x}": f"lokr_{x}" for x in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")},
    **{x: x for x in ("diff", "diff_b", "w_norm", "b_norm", "set_weight", "reshape_weight")},
}  # fmt: skip

_WORDS = {word: slot for slot, word in SLOTS.items()} | {
    "lora_A.weight": "down", "lora_B.weight": "up", "lora_A.default.weight": "down", "lora_B.default.weight": "up",
    "lora.down.weight": "down", "lora.up.weight": "up", "lora_linear_layer.down.weight": "down",
    "lora_linear_layer.up.weight": "up", "lora_magnitude_vector": "dora", "lora_magnitude_vector.weight": "dora",
    "lora_magnitude_vector.default.weight": "dora", "magnitude": "dora", "oft_R.weight": "oft_R",
    "oft_R.scaled_oft": "oft_scaled",
}  # fmt: skip

_ENDS = "|".join(re.escape(word) for word in sorted(_WORDS, key=len, reverse=True))
_BARE = {"lora_A": "down", "lora_B": "up"}
"""A map from key endings without `.weight` to slots.

loralib's keys have the same endings. So a key with one of these endings is accepted only if it begins with one of
ComfyUI's prefixes.
"""

_KEY = re.compile(rf"((?:diffusion_model|text_encoders\.\w+\.transformer)\..+?)\.({_ENDS}|{'|'.join(_BARE)})")
_OTHER = re.compile(
    rf"((?:(?:base_model\.model|conditional_transformer|model\.diffusion_model|pipe\.dit)\.)?(.+?))\.({_ENDS})"
)
_DOTTED = re.compile(r"[A-Za-z_]\w*(?:\.[\w-]+)*")

_ENCODERS = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}
"""ComfyUI's names for the CLIP text encoders, by component. The names are used if the adapter's family is unknown."""


class Comfyui(ImageFormat):
    """Files with ComfyUI's names."""

    url = "https://github.com/comfyanonymous/ComfyUI/blob/master/comfy/lora.py"
    description = "ComfyUI's names with the prefix diffusion_model., as ai-toolkit and other trainers write them"
    file = "lora.safetensors"
    differences = True
    methods = frozenset({"dense", "dora", "loha", "lokr", "lora", "replacement", "weight_norm"})
    rules = Rules(slots=(*SLOTS, "hada_", "lokr_"))
    naming = COMFYUI
    _fitting: tuple[str, ...] = ()

    def sniff(self, path: Path) -> bool:
        keys = tensor_names(path)
        if any(map(_KEY.fullmatch, keys)):
            return True
        from .bfl_control import BflControl

        if BflControl().sniff(path):
            return False
        parsed = [_OTHER.fullmatch(key) for key in keys]
        if not parsed or not all(parsed):
            return False
        names = frozenset(_rest(each[1]) for each in parsed if each is not None)
        return any(not family.facts.generic for family in families_of_names(names))

    def parse(self, key: str) -> ImageKey | None:
        match = _KEY.fullmatch(key)
        if match is not None:
            return ImageKey(key, match[1], _WORDS.get(match[2]) or _BARE[match[2]])
        other = _OTHER.fullmatch(key)
        return ImageKey(key, other[1], _WORDS[other[3]]) if other and _DOTTED.fullmatch(other[2]) else None

    def spell(self, stem: str, slot: str) -> str:
        return f"{stem}.{SLOTS.get(slot, slot)}"

    def modules(self, tensors: Mapping[str, Lazy]) -> dict[str, ImageModule]:
        modules = super().modules(tensors)
        return _stacked(modules) if any(key.endswith(".default.weight") for key in tensors) else modules

    def targets(
        self, modules: Mapping[str, ImageModule], metadata: Mapping[str, str], base: Checkpoint | None
    ) -> dict[str, Target]:
        others = {stem: path for stem in modules if (path := in_other_words(stem, beside()))}
        rests = [_rest(stem) for stem in modules if not stem.startswith("text_encoders.") and stem not in others]
        fitting = [each for each in families() if all(rest in each for rest in rests)] if rests else list(families())
        # Ignore generic families: they share names such as `time_embedding.linear_1` with U-Nets.
        parts = {each.component for each in fitting if not each.facts.generic}
        parts = parts - {CONTROLNET} or parts
        part = next(iter(parts)) if rests and len(parts) == 1 else denoiser_of(rests)
        if (
            rests
            and not any(map(_says_part, modules))
            and may_be_controlnet(rests, inputs_of(modules.values()), metadata)
        ):
            part = ""  # The component is unknown. A writer that needs the component raises an error.
        fitting = narrowed(fitting, lambda family: names_family(family, metadata))
        words = {stem.split(".")[1] for stem in modules if stem.startswith("text_encoders.")}
        fitting = narrowed(fitting, lambda family: words <= {each.comfyui for each in family.facts.encoders.values()})
        return {stem: Target(others.get(stem) or _path(stem, part, fitting)) for stem in modules}

    def renamed(self, updates: Updates, kept: Collection[str], origin: Origin, *, fold: bool) -> tuple[Changed, Losses]:
        """Rename targets to ComfyUI's naming, and store the families that fit the targets.

        `stem` needs these families to name text encoders.
        """
        targets = denoiser_targets(updates, ())
        self._fitting = tuple(family.name for family in candidates(updates, targets, origin)) if targets else ()
        changed, losses = super().renamed(updates, kept, origin, fold=fold)
        return {t: tuple(part for u in group for part in _apart(u)) for t, group in changed.items()}, losses

    def stem(self, target: Target, paths: TargetPaths, update: Update) -> str | None:
        component, (_, rest) = component_of(target.path), rooted(target.path)
        if component is None or target.rows:
            return None
        if component in ("unet", "transformer"):
            return f"diffusion_model.{rest}"
        if other := in_other_words(f"{component}.{rest}", {ours: theirs for theirs, ours in beside().items()}):
            return other
        word, name = _encoder(component, rest, paths.paths, self._fitting)
        return f"text_encoders.{word}.transformer.{name}" if word else None

    def metadata(
        self, updates: Mapping[Target, tuple[Update, ...]], hints: ImageHints, stems: Mapping[str, str]
    ) -> tuple[Metadata, bool]:
        return (hints.metadata if hints.stems else [("format", "pt")]), False


def _apart(update: Update) -> tuple[Update, ...]:
    """Split a LoRA with a bias into a LoRA and a `dense` update, as ComfyUI does for BFL's control LoRAs."""
    if not isinstance(update, LoRA) or update.bias is None:
        return (update,)
    return (update.replace(bias=None), Dense(D=None, d=update.bias, scaling=update.scaling))


def _stacked(modules: dict[str, ImageModule]) -> dict[str, ImageModule]:
    """Reorder the rows of fused weights in DiffSynth's files, and remove `default` from the keys.

    This applies only to families with `diffsynth_head`, such as MiniMax-H3. DiffSynth trains them with the row order of
    the model's authors: the queries, keys and values of the first head, then those of the second head, and so on. All
    other tools reorder the rows when they load the model: all queries come first, then all keys, then all values. The
    result has this order. The tensors have the same shapes in both orders, so only PEFT's adapter name `default` in
    the keys identifies DiffSynth's files. The name is removed, because a new file with this name would be read as
    DiffSynth's.

    Raises:
        Malformed: the number of rows is not a multiple of 3 times the head size.
    """
    fitting = families_with({_rest(stem) for stem in modules})
    if not fitting or not all(family.facts.diffsynth_head for family in fitting):
        return modules
    family = fitting[0]
    stacked = {}
    for stem, module in modules.items():
        keys = {slot: key.replace(".default.weight", ".weight") for slot, key in module.keys.items()}
        rest, up = _rest(stem), module.tensors.get("up")
        pieces = family.moves(rest, "native", "diffusers") if rest in family.names("native") else ()
        if up is not None and len({piece.path for piece in pieces}) == 3:
            size, rows = family.facts.diffsynth_head, up.shape[0] if up.shape else 0
            if rows % (3 * size):
                why = f"the number of rows, {rows}, is not a multiple of 3 x {size} (query, key and value of a head)"
                raise Malformed(why, where=module.keys["up"], cure=WRITE_AGAIN)
            module = replace(module, tensors={**module.tensors, "up": _by_part(up, size)})
        stacked[stem] = replace(module, keys=keys)
    return stacked


def _by_part(leaf: Lazy, size: int) -> Lazy:
    """Reorder rows that are ordered by head, so that all queries come first, then all keys, then all values."""

    def ordered(array: Array) -> Array:
        parts = array.reshape(-1, 3, size, *array.shape[1:]).swapaxes(0, 1)
        return parts.reshape(array.shape)

    return leaf.map(ordered, leaf.shape)


def _says_part(stem: str) -> bool:
    """Whether a module's name begins with a component: the U-Net, the transformer or a text encoder."""
    return stem.startswith(("text_encoders.", *(root for root in PREFIXES if root != "base_model.model.")))


def _rest(stem: str) -> str:
    """Remove all prefixes (also repeated prefixes) and the names of torch's wrappers from a module's name."""
    if not WRAPPERS.isdisjoint(words := stem.split(".")):
        stem = ".".join(word for word in words if word not in WRAPPERS)
    while root := next((root for root in PREFIXES if stem.startswith(root)), ""):
        stem = stem.removeprefix(root)
    return stem


def _path(stem: str, part: str, fitting: Sequence[ImageFamily]) -> str:
    """Return the target path of a module.

    Args:
        stem: the module's name in the file.
        part: the component that contains all modules outside the text encoders; empty if unknown.
        fitting: the families that fit all names of the file.
    """
    root, rest = rooted(stem)
    if not stem.startswith("text_encoders."):
        return f"{part}.{_rest(stem)}" if part else _rest(stem)
    word = stem.split(".")[1]
    rest = rest if root.startswith("text_encoders.") else stem.split(".", 3)[3]
    known = {
        (name, each.prefix if each.kind == "llm" else None)
        for family in fitting for name, each in family.facts.encoders.items() if each.comfyui == word
    }  # fmt: skip
    encoders_there = {name for name, _ in known}
    encoder = next((name for name, usual in _ENCODERS.items() if usual == word), "")
    if len(encoders_there) == 1:
        encoder = next(iter(encoders_there))
    elif not encoder and word != "clip_h":
        why = f"the text encoder {word} can be any of {', '.join(sorted(encoders_there))}; the file does not show which"
        cure = "Name the family with --family (family=), or read the file together with the transformer's LoRA"
        raise TargetNotFound(why if known else f"no family has a text encoder {word}", where=stem, cure=cure)
    prefixes = {prefix for _, prefix in known}
    if len(prefixes) == 1 and (prefix := next(iter(prefixes))) is not None:
        rest = prefix + rest.removeprefix("model.")
    return f"{encoder or 'text_encoder'}.{rest}"


@lru_cache(maxsize=64)
def _words(paths: frozenset[str], named: tuple[str, ...]) -> dict[tuple[str, str], tuple[str, str]]:
    """Return a map from (component of a text encoder, kind) to (ComfyUI's name of the encoder, prefix of its modules).

    The map omits a text encoder if the families that fit the targets have different names or prefixes for it.
    """
    targets = [Target(path) for path in paths]
    inside = [rooted(path)[1] for path in paths if not component_is_encoder(path)]
    kinds = encoder_kinds(targets)
    fitting = [family for family in families() if has_encoders(family, kinds)]
    fitting = [f for f in fitting if f.name in named] or [f for f in fitting if all(path in f for path in inside)]
    names_by_word: dict[tuple[str, str], set[tuple[str, str]]] = {}
    for family in fitting:
        for name, each in family.facts.encoders.items():
            names_by_word.setdefault((name, each.kind), set()).add((each.comfyui, each.prefix))
    return {key: next(iter(words)) for key, words in names_by_word.items() if len(words) == 1}


def component_is_encoder(path: str) -> bool:
    """Whether a path is inside a text encoder."""
    return ROOTS.get(rooted(path)[0][:-1], "").startswith("text_encoder")


def _encoder(component: str, rest: str, paths: frozenset[str], named: tuple[str, ...]) -> tuple[str, str]:
    """Return ComfyUI's names for a text encoder and for one of its modules.

    If the encoder has no known name, the first name is empty.
    """
    kind = encoder_kind(rest)
    word, prefix = _words(paths, named).get((component, kind), ("", ""))
    if not word:
        word = {"clip": _ENCODERS.get(component, ""), "t5": "t5xxl"}.get(kind, "")
    if kind == "llm":
        before = next(each for each in reversed(LLM_PREFIXES) if rest.startswith(f"{each}layers."))
        # The reader prepends the family's prefix to the module's name. If the module has another prefix, return no name
        # for the encoder, because the reader would get the path of another module.
        word = word if before == prefix else ""
        rest = f"model.{rest.removeprefix(before)}"
    return word, rest
