"""Embeddings of tokens in a file of LoRAs: `bundle_emb.<token>.<slot>`, as OneTrainer writes and AUTOMATIC1111 reads.

They are textual inversions beside the LoRAs. ComfyUI leaves such keys out and diffusers refuses the whole file, so that
only kohya's and LyCORIS's files have them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ...core.adapter import Target
from ...errors import Malformed, Unsupported
from ...io.lazy import as_lazy
from ...methods.textual_inversion import TextualInversion
from .file import AGAIN

if TYPE_CHECKING:
    from ...core.adapter import Updates
    from ...io.lazy import Lazy
    from .hints import Hints

PREFIX = "bundle_emb."
EMBEDDING = "text_model.embeddings.token_embedding"

PARTS = {
    "clip_l": "text_encoder", "clip_g": "text_encoder_2", "emb_params": "text_encoder",
    "string_to_param.*": "text_encoder",
}  # fmt: skip
"""Slot -> text encoder; `string_to_param.*` comes from AUTOMATIC1111's own files of embeddings."""

Bundle = dict[Target, tuple[TextualInversion, ...]]


def apart(tensors: Mapping[str, Lazy]) -> tuple[dict[str, Lazy], Bundle, dict[str, str], dict[str, list[int]]]:
    """Take the embeddings out of a file's tensors.

    Returns:
        the other tensors; the embeddings by target; key that `keyed` would choose -> key of the file; key -> shape
        of the file where that is no matrix.

    Raises:
        Unsupported: an embedding is of no input of CLIP's, such as one that OneTrainer adds to the encoder's output.
        Malformed: it is no matrix of rows.
    """
    rest = {key: leaf for key, leaf in tensors.items() if not key.startswith(PREFIX)}
    found: Bundle = {}
    keys, shapes = dict[str, str](), dict[str, list[int]]()
    for key, leaf in tensors.items():
        if key in rest:
            continue
        token, _, slot = key.removeprefix(PREFIX).partition(".")
        if slot not in PARTS:
            why = "an embedding that OneTrainer has put into the file, and that is no input of a CLIP"
            cure = "Save the LoRA without its embeddings, or take this key out into a file of its own"
            raise Unsupported(why, where=key, cure=cure)
        if len(leaf.shape) not in (1, 2) or 0 in leaf.shape or not token:
            raise Malformed(f"an embedding of shape {list(leaf.shape)}", where=key, cure=AGAIN)
        if len(leaf.shape) == 1:
            shapes[key] = list(leaf.shape)
        target = Target(f"{PARTS[slot]}.{EMBEDDING}")
        rows = leaf.reshape(-1, leaf.shape[-1])
        if any(update.token == token for update in found.get(target, ())):
            raise Malformed("a second embedding of the same token", where=key, cure=AGAIN)
        found[target] = (*found.get(target, ()), TextualInversion(P=rows, token=token))  # type: ignore[arg-type]
        keys[f"{target} {token}"] = key
    return rest, found, {_default(found, *name.split(" ", 1)): key for name, key in keys.items()}, shapes


def _default(found: Mapping[Target, object], path: str, token: str) -> str:
    """The key to choose: SD 1 and 2 have one encoder, whose slot is `emb_params`."""
    several = any(target.path.startswith("text_encoder_2.") for target in found)
    slot = "clip_g" if path.startswith("text_encoder_2.") else "clip_l" if several else "emb_params"
    return f"{PREFIX}{token}.{slot}"


def is_bundled(target: Target, update: object) -> bool:
    """Whether an update is an embedding that a file of LoRAs can have beside them."""
    there = target.path.partition(".")[2] == EMBEDDING and target.path.partition(".")[0] in PARTS.values()
    return there and isinstance(update, TextualInversion) and bool(update.token) and "." not in update.token


def keyed(updates: Updates, hints: Hints) -> tuple[Updates, dict[str, Lazy]]:
    """The updates without embeddings, and the embeddings by key; all are updates where there is no LoRA beside them."""
    found = {t: tuple(u for u in each if is_bundled(t, u)) for t, each in updates.items()}
    found = {target: each for target, each in found.items() if each}
    rest = {t: tuple(u for u in each if not is_bundled(t, u)) for t, each in updates.items()}
    rest = {target: each for target, each in rest.items() if each}
    if not rest or not found:
        return updates, {}
    tensors = {}
    for target, each in found.items():
        for update in each:
            default = _default(found, target.path, update.token)  # type: ignore[attr-defined]
            key, leaf = hints.keys.get(default, default), as_lazy(update.tensors["P"])
            shape = hints.shapes.get(key)
            tensors[key] = leaf.reshape(*shape) if shape and leaf.shape[0] == 1 else leaf
    return rest, tensors
