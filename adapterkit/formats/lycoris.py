"""Read and write LyCORIS's files: LoHa, LoKr, OFT, BOFT, GLoRA, IA3, LoCon and full weight differences.

As in kohya's sd-scripts, a key consists of a prefix for the model's component, the module's path with underscores
instead of dots, and a slot such as `hada_w1_a`. If the prefix is `lycoris_`, the file may be for any kind of model, not
only for an image model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from ..core.adapter import Target
from ._format import FORMULA, Departure
from ._image.file import OPTIONS, ImageKey, ImageModule, Metadata, Rules, tensor_names
from ._image.hints import ImageHints
from ._image.image_format import ALPHAS, PADDING, ImageFormat
from ._image.underscores import TargetPaths, resolve, stem_of
from .kohya import LYCORIS
from .kohya import SLOTS as LOCON

if TYPE_CHECKING:
    from ..core.updates import Update
    from ..io.checkpoint import Checkpoint

SLOTS = {
    **LOCON,
    **{f"hada_{x}": f"hada_{x}" for x in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    **{f"lokr_{x}": f"lokr_{x}" for x in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")},
    **{x: f"{x}.weight" for x in ("a1", "a2", "b1", "b2", "bm", "q_layer", "p_layer")},
    **{x: x for x in ("rescale", "weight", "on_input", "diff", "diff_b", "w_norm", "b_norm", "lambda_layer")},
}

_WORDS = {word: slot for slot, word in SLOTS.items()}
_KEY = re.compile(r"((?:lora_unet|lora_transformer|lora_te[1234]?|lora_prior_(?:unet|te)|lycoris)_[^.]+)\.(.+)")


class Lycoris(ImageFormat):
    """Files of LyCORIS, and of tools that write the same keys."""

    url = "https://github.com/KohakuBlueleaf/LyCORIS"
    description = "LyCORIS: LoHa, LoKr, OFT, BOFT, GLoRA, IA3 and complete weight differences for image models"
    models = ""
    departures: ClassVar[Mapping[str, Departure]] = ALPHAS | OPTIONS | PADDING
    compat = frozenset({FORMULA})
    bundles = True
    file = "lycoris.safetensors"
    differences = True
    methods = frozenset(
        {"boft_outputs", "dense", "dora", "glora_products", "ia3_weights", "loha", "lokr", "lora", "oft", "weight_norm"}
    )
    rules = Rules(alpha_needed=True, norms=True, slots=(*SLOTS, "hada_", "lokr_"))

    def sniff(self, path: Path) -> bool:
        keys = [key for key in tensor_names(path) if self.parse(key)]
        return any(key.startswith("lycoris_") or key.partition(".")[2].startswith(LYCORIS) for key in keys)

    def parse(self, key: str) -> ImageKey | None:
        match = _KEY.fullmatch(key)
        return ImageKey(key, match[1], _WORDS[match[2]]) if match and match[2] in _WORDS else None

    def spell(self, stem: str, slot: str) -> str:
        return f"{stem}.{SLOTS[slot]}"

    def targets(
        self, modules: Mapping[str, ImageModule], metadata: Mapping[str, str], base: Checkpoint | None
    ) -> dict[str, Target]:
        return {stem: Target(path) for stem, path in resolve(modules, metadata, base).items()}

    def stem(self, target: Target, paths: TargetPaths, update: Update) -> str | None:
        return None if target.rows else stem_of(target.path, paths, lycoris=True)

    def metadata(
        self, updates: Mapping[Target, tuple[Update, ...]], hints: ImageHints, stems: Mapping[str, str]
    ) -> tuple[Metadata, bool]:
        return (hints.metadata if hints.stems else [("ss_network_module", "lycoris.kohya")]), False
