"""Build the arguments for the export of a transformers model: a wrapper, example inputs, names and dynamic sizes."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, cast

from ..errors import Unsupported
from .caches import Past
from .tracing import quiet

if TYPE_CHECKING:
    from torch import Tensor, nn

    from .pretrained_types import Cache, PretrainedModel

    Nested = Tensor | Sequence["Nested"] | None
    Open = dict[int, str] | Sequence["Open"] | None

INSIDE = "model"
"""The name of the attribute in which wrapper modules (`ExportWords.module`) store the model."""


@dataclass(frozen=True, slots=True)
class ExportWords:
    """The arguments that `export` needs to trace a model.

    Attributes:
        module: a wrapper that calls the model. It takes tensors as positional arguments, and returns tensors.
        examples: example arguments of several sizes. The first example is traced; the check also uses the others.
        inputs: the name of each input tensor, in the order of the flattened arguments.
        outputs: the name of each output tensor.
        shapes: for each argument, a map from each dynamic axis to its name. `shapes` is nested like the arguments.
    """

    module: nn.Module
    examples: tuple[tuple[Nested, ...], ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    shapes: tuple[Open, ...]


def words_of(model: PretrainedModel, source: Path) -> ExportWords:
    """Return the `ExportWords` of a causal language model, an encoder or a classifier.

    The inputs and outputs depend on the model's class and on the parameters of the model's `forward`.

    Args:
        model: a transformers model in evaluation mode.
        source: the model's folder, for errors.

    Raises:
        Unsupported: the model does not read tokens, or does not keep its past in a transformers cache.
    """
    if "input_ids" not in inspect.signature(model.forward).parameters:
        cure = "Export the torch model with adapterkit.onnx.export"
        raise Unsupported(f"a {type(model).__name__} does not read tokens", path=source, cure=cure)
    names = import_module("transformers.models.auto.modeling_auto").MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    flat = {word for name in names for word in ([name] if isinstance(name, str) else name)}
    return _causal(model, source) if type(model).__name__ in flat else _encoder(model)


def _encoder(model: PretrainedModel) -> ExportWords:
    import torch
    from torch import nn

    asked = inspect.signature(model.forward).parameters
    kinds = getattr(model.config, "type_vocab_size", None) or 0
    inputs = ["input_ids", "attention_mask", *(["token_type_ids"] if "token_type_ids" in asked and kinds > 1 else [])]

    class EncoderCall(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, *given: Tensor) -> list[Tensor]:
            outputs_now = self.model(**dict(zip(inputs, given, strict=True)), return_dict=True)
            return [outputs_now[name] for name in outputs]

    def example(batch: int, length: int) -> tuple[Tensor, ...]:
        mask = torch.ones(batch, length, dtype=torch.int64)
        # Mask out one position, so that the check covers padding.
        mask[0, length - 1 :] = 0 if batch > 1 else 1
        kind = torch.zeros_like(mask)
        kind[:, length // 2 :] = 1
        return (tokens(model, batch, length), mask, kind)[: len(inputs)]

    with torch.no_grad(), quiet():
        outputs_now = model(**dict(zip(inputs, example(1, 2), strict=True)), return_dict=True)
    outputs = [name for name in ("logits", "last_hidden_state", "pooler_output", "start_logits", "end_logits")
               if isinstance(outputs_now.get(name), torch.Tensor)]  # fmt: skip
    shapes = tuple({0: "batch_size", 1: "sequence"} for _ in inputs)
    examples = (example(2, 5), example(1, 3))
    return ExportWords(EncoderCall().eval(), examples, tuple(inputs), tuple(outputs), (shapes,))


def _causal(model: PretrainedModel, source: Path) -> ExportWords:
    import torch
    from torch import nn

    asked = inspect.signature(model.forward).parameters
    word = cache_word(model)
    input_names = ["input_ids", "attention_mask", *(["position_ids"] if "position_ids" in asked else [])]
    past = Past(model, word, source, {"input_ids": tokens(model, 1, 2)})

    class DecoderCall(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: Tensor, mask: Tensor, *rest: Nested) -> tuple[Tensor, list[Tensor]]:
            cache = past.cache(cast("list[Tensor]", rest[-1]))
            given = dict(zip(input_names, (ids, past.mask(mask, ids.shape[1]), *rest[:-1]), strict=True))
            with past.scans(self.model):
                logits = self.model(**given, **{word: cache}, use_cache=True, return_dict=True).logits
            return logits, past.tensors_of(cache)

    rng = torch.Generator().manual_seed(0)

    def example(batch: int, length: int, before: int) -> tuple[Nested, ...]:
        mask = torch.ones(batch, before + length, dtype=torch.int64)
        # Mask out one position of the past, so that the check covers left padding.
        mask[0, : int(batch > 1 and before > 0)] = 0
        positions = torch.arange(before, before + length)[None].repeat(batch, 1)
        places = [positions] if "position_ids" in input_names else []
        return (tokens(model, batch, length), mask, *places, past.example(batch, before, rng))

    axes = {"input_ids": "sequence", "attention_mask": "total", "position_ids": "sequence"}
    return ExportWords(
        DecoderCall().eval(),
        (example(2, 3, 5), example(1, 4, 0), example(1, 1, 4)),
        (*input_names, *past.names()),
        ("logits", *past.names(present=True)),
        (*({0: "batch_size", 1: axes[name]} for name in input_names[:2]),
         (*({0: "batch_size", 1: axes[name]} for name in input_names[2:]), past.axes())),
    )  # fmt: skip


def cache_word(model: PretrainedModel) -> str:
    """Return the name of the parameter of `forward` that takes the cache; transformers 5 renamed this parameter."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def tokens(model: PretrainedModel, batch: int, length: int) -> Tensor:
    """Return random tokens from a model's vocabulary, `[batch, length]`."""
    import torch

    most = int(getattr(model.config.get_text_config(), "vocab_size", 2))
    return torch.randint(0, most, (batch, length), generator=torch.Generator().manual_seed(length))


def pairs(cache: Cache) -> list[tuple[Tensor, Tensor]]:
    """Return the keys and values of each layer of a cache."""
    return [(layer.keys, layer.values) for layer in cache.layers]
