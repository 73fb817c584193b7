"""Read and write the token embeddings that OneTrainer and AUTOMATIC1111 store in a LoRA file.

The embeddings are textual inversions, and their keys are `bundle_emb.<token>.<slot>`. ComfyUI ignores such keys, and
diffusers refuses a file with such a key. So only the formats of kohya and LyCORIS write embeddings.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from ...core.adapter import Target
from ...errors import WRITE_AGAIN, Malformed, Unsupported
from ...io.lazy import as_lazy
from ...methods.textual_inversion import TextualInversion
from .deciding import candidates, denoiser_targets

if TYPE_CHECKING:
    from ...core.adapter import Updates
    from ...core.updates import Update
    from ...io.lazy import Lazy
    from .deciding import Origin
    from .hints import ImageHints

PREFIX = "bundle_emb."
EMBEDDING = "text_model.embeddings.token_embedding"

PLACES = {"clip": EMBEDDING, "t5": "shared", "llm": "model.embed_tokens"}
"""A map from the kind of a text encoder to the module path of the encoder's token embedding."""

SLOTS = {"clip_l": "clip", "clip_g": "clip", "t5": "t5", "llama": "llm"}
"""A map from OneTrainer's name of a text encoder to the encoder's kind."""

ALONE = ("emb_params", "string_to_param.*")
"""Slots for models with only one text encoder (Stable Diffusion 1 and 2). AUTOMATIC1111 writes the second slot."""

USUAL = {"clip_l": "text_encoder", "clip_g": "text_encoder_2"}
"""A map from OneTrainer's name of a text encoder to its usual name in diffusers. Some families use other names."""


def split(tensors: Mapping[str, Lazy]) -> tuple[dict[str, Lazy], dict[str, Lazy]]:
    """Split a file's tensors into the tensors of LoRAs and the tensors of token embeddings."""
    bundled = {key: leaf for key, leaf in tensors.items() if key.startswith(PREFIX)}
    return {key: leaf for key, leaf in tensors.items() if key not in bundled}, bundled


class ImageBundle:
    """The token embeddings in a file.

    Attributes:
        updates: the embeddings of the tokens by target, in the file's order.
        keys: a map from an embedding's default key, which `keyed` would choose, to the embedding's key in the file.
        shapes: a map from the key of each one-dimensional embedding to its shape in the file. In `updates`, this
            embedding is a matrix with one row.
    """

    def __init__(self, tensors: Mapping[str, Lazy], updates: Updates, origin: Origin) -> None:
        """Parse the keys and collect the token embeddings.

        Args:
            tensors: the embeddings' tensors.
            updates: the LoRAs in the same file. Their targets and shapes help to find the model family.
            origin: what is known about the naming of the file's modules.

        Raises:
            Unsupported: an embedding is not an input embedding of a known text encoder. OneTrainer can, for example,
                also add embeddings to a text encoder's output.
            Malformed: an embedding is neither a vector nor a matrix, or a token has two embeddings for one text
                encoder.
        """
        self.updates: dict[Target, tuple[Update, ...]] = {}
        self.keys: dict[str, str] = {}
        self.shapes: dict[str, list[int]] = {}
        words = _words(updates, origin) if tensors else {}
        slots = {slot for key in tensors for slot in [key.removeprefix(PREFIX).partition(".")[2]]}
        for key, leaf in tensors.items():
            token, _, slot = key.removeprefix(PREFIX).partition(".")
            target = _place(key, slot, words)
            if len(leaf.shape) not in (1, 2) or 0 in leaf.shape or not token:
                raise Malformed(
                    f"the embedding of {token!r} has shape {list(leaf.shape)}; expected [width] or [n, width]",
                    where=key,
                    cure=WRITE_AGAIN,
                )
            if len(leaf.shape) == 1:
                self.shapes[key] = list(leaf.shape)
            group = self.updates.get(target, ())
            if any(update.attributes["token"] == token for update in group):
                raise Malformed(
                    f"the token {token!r} has two embeddings for one text encoder", where=key, cure=WRITE_AGAIN
                )
            rows = leaf.reshape(-1, leaf.shape[-1])
            self.updates[target] = (*group, TextualInversion(P=rows, token=token))  # type: ignore[arg-type]
            default = slot if slot not in ALONE else "clip_l" if "clip_g" in slots else ALONE[0]
            if slot == "clip_l" and slots == {"clip_l"} and "clip_g" not in words:
                default = ALONE[0]
            self.keys[f"{PREFIX}{token}.{default}"] = key


def _words(updates: Updates, origin: Origin) -> dict[str, str]:
    """Map OneTrainer's name of each text encoder to the text encoder's name in diffusers.

    Omit a text encoder that has different names in the possible families.
    """
    targets = denoiser_targets(updates, ())
    fitting = candidates(updates, targets, origin) if targets else []
    names_by_word: dict[str, set[str]] = {}
    for family in fitting:
        for name, encoder in family.facts.encoders.items():
            word = encoder.comfyui if encoder.comfyui in USUAL else {"t5": "t5", "llm": "llama"}.get(encoder.kind, "")
            names_by_word.setdefault(word, set()).add(name)
    return {word: next(iter(names)) for word, names in names_by_word.items() if word and len(names) == 1}


def _place(key: str, slot: str, words: Mapping[str, str]) -> Target:
    if slot in ALONE:
        return Target(f"text_encoder.{EMBEDDING}")
    part = words.get(slot, USUAL.get(slot, ""))
    if slot in SLOTS and part:
        return Target(f"{part}.{PLACES[SLOTS[slot]]}")
    why = "this embedding is not an input embedding of a text encoder that adapterkit knows"
    cure = "Save the LoRA without embeddings, remove the key from the file, or name the family with --family (family=)"
    raise Unsupported(why, where=key, cure=cure)


def is_bundled(target: Target, update: object) -> bool:
    """Whether an update is a token embedding that can be stored in a LoRA file."""
    part, _, rest = target.path.partition(".")
    there = part.startswith("text_encoder") and rest in PLACES.values()
    return there and isinstance(update, TextualInversion) and bool(update.token) and "." not in update.token


def keyed(updates: Updates, hints: ImageHints, origin: Origin) -> tuple[Updates, dict[str, Lazy]]:
    """Separate the embeddings from the other updates. Return the other updates, and the embeddings' tensors by key.

    If an adapter has only embeddings, return all updates and an empty dict.
    """
    bundled = {t: tuple(u for u in each if is_bundled(t, u)) for t, each in updates.items()}
    bundled = {target: each for target, each in bundled.items() if each}
    rest = {t: tuple(u for u in each if not is_bundled(t, u)) for t, each in updates.items()}
    rest = {target: each for target, each in rest.items() if each}
    if not rest or not bundled:
        return updates, {}
    words = _words(rest, origin)
    tensors = {}
    for target, each in bundled.items():
        slot = _slot(target, bundled, words)
        for update in each:
            default = f"{PREFIX}{update.attributes['token']}.{slot}"
            key, leaf = hints.keys.get(default, default), as_lazy(update.tensors["P"])
            shape = hints.shapes.get(key)
            tensors[key] = leaf.reshape(*shape) if shape and leaf.shape[0] == 1 else leaf
    return rest, tensors


def _slot(target: Target, bundled: Iterable[Target], words: Mapping[str, str]) -> str:
    """Return OneTrainer's slot of an embedding: a text encoder's name, or `emb_params` (Stable Diffusion 1 and 2)."""
    part, _, rest = target.path.partition(".")
    kind = next(kind for kind, name in PLACES.items() if name == rest)
    if kind != "clip":
        return next(word for word, each in SLOTS.items() if each == kind)
    slot = next((word for word in USUAL if words.get(word, USUAL[word]) == part), "clip_l")
    several = "clip_g" in words or any(other.path != target.path for other in bundled)
    return slot if slot != "clip_l" or several else ALONE[0]
