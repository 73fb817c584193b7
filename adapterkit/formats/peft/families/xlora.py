"""X-LoRA: a classifier, `internal_xlora_classifier.layers.<i>`; i also counts activations and dropouts.

The experts are separate adapters. The config has their paths, which are kept as text and never opened.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from ....errors import Malformed, ShapeMismatch, Unsupported
from ....io.lazy import Lazy, as_lazy
from ....methods.xlora import XLoRA
from ..file import File, Found, Key, make
from ._family import Family, Own, Rank, check_parts

if TYPE_CHECKING:
    from ....core.adapter import Target
    from ....core.updates import Update
    from ....io.strict_json import JsonValue
    from ..file import Findings

LAYERS = "internal_xlora_classifier.layers"


class XLoRAFields(Own, frozen=True, kw_only=True):
    """The fields that determine the meaning of the classifier's tensors."""

    hidden_size: Rank = 4096
    adapters: dict[str, str] | None = None
    enable_softmax: bool = True
    enable_softmax_topk: bool = False
    global_scaling_weight: float = 1.0
    layerwise_scalings: bool = False
    scaling_pass_value: float = 0.0
    softmax_temperature: float = 1.0
    top_k_lora: int | None = None
    xlora_depth: Rank = 1
    xlora_dropout_p: float = 0.2


class XloraFamily(Family):
    """The family of the peft_type XLORA."""

    peft_type = "XLORA"
    method = XLoRA
    shared = (f"{LAYERS}.*.weight", f"{LAYERS}.*.bias")
    names_modules = False
    own: ClassVar[type[Own]] = XLoRAFields
    read: ClassVar[Mapping[str, str]] = {
        "adapters": "names of the experts, counted from 0, and their paths, which are not followed",
        "enable_softmax": "whether the weights are a softmax of the logits",
        "enable_softmax_topk": "whether a softmax is applied to the nonzero weights",
        "global_scaling_weight": "factor on the change",
        "hidden_size": "width of the classifier's input",
        "layerwise_scalings": "whether each layer has its own logits",
        "scaling_pass_value": "0; other values use the experts in the first pass, and are refused",
        "softmax_temperature": "divisor of the logits",
        "top_k_lora": "number of weights that are kept",
        "xlora_depth": "number of the classifier's layers",
        "xlora_dropout_p": "above 0, a layer's number also counts the dropouts before it",
    }
    harmless: ClassVar[Mapping[str, str]] = {
        "use_trainable_adapters": "training only",
        "xlora_size": "width of the classifier; the tensors show it",
    }
    fresh: ClassVar[Mapping[str, Any]] = {"xlora_dropout_p": 0.0, "task_type": "CAUSAL_LM"}

    @classmethod
    def decode(cls, file: File) -> Findings:
        own = file.settings.own
        if own.scaling_pass_value:
            why = "this version does not support experts in the first pass"
            raise Unsupported(why, where="scaling_pass_value", cure="Run the adapter with PEFT")
        words = [f"{LAYERS}.{number}" for number in _numbers(own.xlora_depth, own.xlora_dropout_p > 0)]
        lost = next((word for word in words if f"{word}.weight" not in file.shared), None)
        if lost:
            why = "the file lacks a layer of the classifier: some releases mistake its number for an expert's name"
            raise Malformed(
                why, where=f"{lost}.weight", cure="Save the model's state dict with the release that trained it"
            )
        check_parts(file.shared, [f"{word}.{leaf}" for word in words for leaf in ("weight", "bias")])
        yield cls.found(file, {word: file.shared[f"{word}.weight"] for word in words})

    @classmethod
    def found(cls, file: File, keys: Mapping[str, Key]) -> Found:
        own, pairs = file.settings.own, [[file.shared[f"{w}.{leaf}"] for leaf in ("weight", "bias")] for w in keys]
        fields: dict[str, Key] = dict(zip(("last", "last_bias"), pairs[-1], strict=True))
        tensors: dict[str, Lazy] = {field: file.tensors[key] for field, key in fields.items()}
        if len(pairs) > 1:
            fields |= dict(zip(("first", "first_bias"), pairs[0], strict=True))
            tensors |= {field: file.tensors[fields[field]] for field in ("first", "first_bias")}
        for field, column in (("inner", 0), ("inner_bias", 1)) if len(pairs) > 2 else ():
            own_keys = [pair[column] for pair in pairs[1:-1]]
            tensors[field] = _stacked([file.tensors[key] for key in own_keys], own_keys)
            fields |= {f"{field}.{i}": key for i, key in enumerate(own_keys)}
        _check_sizes(own, tensors, pairs)
        update = make("xlora", tensors).replace(
            enable_softmax=own.enable_softmax, enable_softmax_topk=own.enable_softmax_topk, top_k=own.top_k_lora or 0,
            softmax_temperature=float(own.softmax_temperature), scaling=float(own.global_scaling_weight),
        )  # fmt: skip
        return Found("", update, fields)

    @classmethod
    def encode(cls, update: XLoRA) -> dict[str, tuple[str, Lazy]]:
        held = {field: as_lazy(leaf) for field, leaf in update.tensors.items()}
        depth = 1 if update.first is None else 2 if update.inner is None else 2 + update.inner.shape[0]
        words = [f"{LAYERS}.{number}" for number in _numbers(depth, dropout=False)]
        coded = {"last": (f"{words[-1]}.weight", held["last"]), "last_bias": (f"{words[-1]}.bias", held["last_bias"])}
        if depth > 1:
            coded["first"] = f"{words[0]}.weight", held["first"]
            coded["first_bias"] = f"{words[0]}.bias", held["first_bias"]
        for i, word in enumerate(words[1:-1]):
            for field, leaf in (("inner", "weight"), ("inner_bias", "bias")):
                coded[f"{field}.{i}"] = f"{word}.{leaf}", _slice(held[field], i)
        return coded

    @classmethod
    def why_not(cls, target: Target, update: XLoRA) -> str:
        if update.A is not None:
            return "this xlora stores its experts, but PEFT has them in separate folders"
        return "" if not target.path else "PEFT has xlora only for a whole model"

    @classmethod
    def numbers(cls, updates: Mapping[Target, tuple[Update, ...]]) -> dict[str, JsonValue]:
        (update,) = cls.of_it(updates).values()
        reads = update.last if update.first is None else update.first
        return {
            "enable_softmax": update.enable_softmax,
            "enable_softmax_topk": update.enable_softmax_topk,
            "global_scaling_weight": update.scaling,
            "hidden_size": int(reads.shape[1]),
            "softmax_temperature": update.softmax_temperature,
            "top_k_lora": update.top_k or None,
            "xlora_depth": 1 if update.first is None else 2 + (0 if update.inner is None else update.inner.shape[0]),
            "xlora_size": int(update.last.shape[1]),
        }


def _numbers(depth: int, dropout: bool) -> list[int]:
    """Return the numbers of the classifier's layers: an activation, maybe a dropout follow all but the last."""
    return [position * (3 if dropout else 2) for position in range(depth)]


def _check_sizes(own: XLoRAFields, tensors: Mapping[str, Lazy], pairs: list[list[Key]]) -> None:
    reads = tensors.get("first", tensors["last"])
    if len(reads.shape) != 2 or reads.shape[1] != own.hidden_size:
        why = f"the shape is {list(reads.shape)}, but the config states {own.hidden_size} inputs"
        raise ShapeMismatch(why, where=pairs[0][0].text, cure="The config does not belong to this file")
    last = tensors["last"]
    if len(last.shape) != 2:
        raise ShapeMismatch(
            f"the shape {list(last.shape)} is not that of a matrix",
            where=pairs[-1][0].text,
            cure="Save it again with PEFT",
        )
    experts, logits = len(own.adapters or ()), last.shape[0]
    if experts and (logits % experts or (logits != experts and not own.layerwise_scalings)):
        why = f"the file has {logits} logits, but the config has {experts} experts"
        raise ShapeMismatch(why, where=pairs[-1][0].text, cure="The config does not belong to this file")


def _stacked(tensors: list[Lazy], keys: list[Key]) -> Lazy:
    first = tensors[0]
    for tensor, key in zip(tensors, keys, strict=True):
        if (tensor.shape, tensor.dtype) != (first.shape, first.dtype):
            why = f"the shape {list(tensor.shape)} differs from {list(first.shape)}, or the dtypes differ"
            raise ShapeMismatch(why, where=key.text, cure="Save the adapter again with PEFT")
    return Lazy((len(tensors), *first.shape), first.dtype, lambda: b"".join(bytes(t.fetch()) for t in tensors))


def _slice(stack: Lazy, position: int) -> Lazy:
    return stack.map(lambda values: values[position], stack.shape[1:])
