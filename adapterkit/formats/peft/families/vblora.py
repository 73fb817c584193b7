"""VB-LoRA: `vblora_logits_A` [r, in / b, n], `vblora_logits_B` [out / b, r, n], and one `vblora_vector_bank` [n, b].

With `save_only_topk_weights`, the file has `_topk_indices` and `_topk_weights` instead of logits. The last weight is
omitted, because the weights sum to 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from ....errors import Malformed
from ....io.lazy import Lazy, as_array, as_lazy
from ....methods.vblora import VBLoRA
from ..file import File, Found, Key, make
from ._family import Family, Own, Parts, check_parts
from ._weights import check_size, layout, not_linear, side

if TYPE_CHECKING:
    from ....core.adapter import Target
    from ....core.updates import Update
    from ....io.strict_json import JsonValue

BANK = "vblora_vector_bank"
LOGITS = {"vblora_logits_A": "logits_A", "vblora_logits_B": "logits_B"}
CHOSEN = {
    "vblora_logits_A_topk_indices": "indices_A",
    "vblora_logits_A_topk_weights": "weights_A",
    "vblora_logits_B_topk_indices": "indices_B",
    "vblora_logits_B_topk_weights": "weights_B",
}
"""A map from a word in the keys to the update's field."""


class VBLoRAFields(Own, frozen=True, kw_only=True):
    """The sizes of the bank, the number of mixed vectors, and the form of the file."""

    num_vectors: int = 256
    vector_length: int = 256
    topk: int = 2
    save_only_topk_weights: bool | None = False


class VBLoRAFamily(Family):
    """The family of the peft_type VBLORA."""

    peft_type = "VBLORA"
    method = VBLoRA
    parts = (*LOGITS, *CHOSEN)
    shared = (BANK,)
    own: ClassVar[type[Own]] = VBLoRAFields
    read: ClassVar[Mapping[str, str]] = {
        "num_vectors": "number of vectors in the bank",
        "save_only_topk_weights": "whether the file has indices and weights instead of logits",
        "topk": "number of vectors that are mixed",
        "vector_length": "number of values in a vector",
    }
    harmless: ClassVar[Mapping[str, str]] = {
        "init_logits_std": "initial values",
        "init_vector_bank_bound": "initial values",
        "vblora_dropout": "training only",
    }
    fresh: ClassVar[Mapping[str, Any]] = {"bias": "none", "vblora_dropout": 0.0}

    @classmethod
    def found(cls, file: File, keys: Mapping[str, Key]) -> Found:
        own, fields = file.settings.own, CHOSEN if file.settings.own.save_only_topk_weights else LOGITS
        check_parts(keys, fields)
        if BANK not in file.shared:
            some = next(iter(keys.values()))
            raise Malformed(f"the file lacks {BANK}", where=some.text, cure="Save the adapter again with PEFT")
        bank = file.shared[BANK]
        _check_sizes(file, keys, bank)
        tensors = {fields[part]: _whole(part, file.tensors[key]) for part, key in keys.items()}
        update = make("vblora", {"bank": file.tensors[bank], **tensors}, topk=own.topk)
        path = next(iter(keys.values())).path
        places = {"bank": bank, **{fields[part]: key for part, key in keys.items()}}
        return Found(path, update, places, layout(file, path))

    @classmethod
    def encode(cls, update: VBLoRA) -> Parts:
        fields = LOGITS if update.logits_A is not None else CHOSEN
        tensors = {f: (part, _stored(part, as_lazy(update.tensors[f]))) for part, f in fields.items()}
        return {**tensors, "bank": (BANK, as_lazy(update.bank))}

    @classmethod
    def why_not(cls, target: Target, update: Update) -> str:
        weights = [leaf for field, leaf in update.tensors.items() if field.startswith("weights")]
        if not all(_sums_to_one(as_lazy(leaf)) for leaf in weights):
            return "the weights of this vblora do not sum to 1"
        return not_linear(target, update.method)

    @classmethod
    def numbers(cls, updates: Mapping[Target, tuple[Update, ...]]) -> dict[str, JsonValue]:
        some = next(iter(cls.of_it(updates).values()))
        chosen = some.indices_A is not None
        return {
            "r": int((some.indices_A if chosen else some.logits_A).shape[0]),
            "num_vectors": int(some.bank.shape[0]),
            "vector_length": int(some.bank.shape[1]),
            "topk": int(some.indices_A.shape[2]) if chosen else int(some.topk),
            "save_only_topk_weights": chosen,
            "fan_in_fan_out": any(target.layout == "in out *k" for target in updates),
        }


def _check_sizes(file: File, keys: Mapping[str, Key], bank: Key) -> None:
    own = file.settings.own
    check_size(bank, side(file.tensors[bank], 0, 2), own.num_vectors, "num_vectors")
    check_size(bank, side(file.tensors[bank], 1, 2), own.vector_length, "vector_length")
    for part, key in keys.items():
        tensor = file.tensors[key]
        check_size(key, side(tensor, 0 if "_A" in part else 1, 3), file.settings.r, "r")
        if part in CHOSEN:
            check_size(key, side(tensor, 2, 3), own.topk - part.endswith("weights"), "topk")


def _whole(part: str, tensor: Lazy) -> Lazy:
    """Append the last weight, 1 minus the sum of the others; return other tensors unchanged."""
    if not part.endswith("weights"):
        return tensor

    def fetch() -> bytes:
        import numpy as np

        values = as_array(tensor)
        last = (1 - values.sum(-1, keepdims=True)).astype(values.dtype)
        return np.concatenate([values, last], -1).tobytes()

    return Lazy((*tensor.shape[:-1], tensor.shape[-1] + 1), tensor.dtype, fetch)


def _stored(part: str, tensor: Lazy) -> Lazy:
    if not part.endswith("weights"):
        return tensor
    return tensor.map(lambda values: values[..., :-1], (*tensor.shape[:-1], tensor.shape[-1] - 1))


def _sums_to_one(weights: Lazy) -> bool:
    return weights.shape[-1] > 0 and bytes(_whole("weights", _stored("weights", weights)).fetch()) == bytes(
        weights.fetch()
    )
