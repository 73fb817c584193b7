"""Export models as several graphs: encoder-decoders, and language models that read images.

The files have the names that optimum and transformers.js expect. An encoder-decoder becomes `encoder_model.onnx`,
`decoder_model.onnx` for the decoder's first call, and `decoder_with_past_model.onnx` for its later calls. See
`vision_language` for language models that read images.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import Unsupported, first_line
from ..torch.pretrained import silent
from .pretrained_calls import ExportWords, cache_word, pairs, tokens
from .tracing import quiet
from .vision_language import EMBEDDING, MERGED, VISION, image_shape, vision_language

if TYPE_CHECKING:
    from torch import Tensor, nn

    from .pretrained_calls import Nested
    from .pretrained_types import Cache, PretrainedModel

ENCODER, DECODER, WITH_PAST = "encoder_model.onnx", "decoder_model.onnx", "decoder_with_past_model.onnx"

FILES = (ENCODER, DECODER, WITH_PAST, VISION, EMBEDDING, MERGED)
"""All file names that graphs can have if a model is exported as several graphs."""

MASKED = ("input_ids",)
"""The main inputs (transformers' `main_input_name`) of encoders that also read an attention mask."""

UNMASKED = {"input_features": ("whisper",), "pixel_values": ("vision-encoder-decoder",)}
"""The main inputs of encoders that read no mask: a map from `main_input_name` to the supported `model_type`s."""

_WHOLE = "Export the torch model with adapterkit.onnx.export"


def parts_of_model(model: PretrainedModel, source: Path) -> dict[str, ExportWords]:
    """Split a model into the parts that are exported as separate graphs.

    Args:
        model: a transformers model in evaluation mode. If it is split, its attention implementation is set to `eager`,
            which can be traced.
        source: the model's folder, for errors.

    Returns:
        a map from each graph's file name to the `ExportWords` of its part; empty if the model is exported as one graph.

    Raises:
        Unsupported: the model is an encoder-decoder of an unknown type, does not generate tokens, or has parts that
            cannot be called separately.
    """
    if getattr(model.config, "is_encoder_decoder", False):
        return _encoder_decoder(model, source)
    if hasattr(model, "get_image_features") and "pixel_values" in inspect.signature(model.forward).parameters:
        return vision_language(model, source)
    return {}


def _encoder_decoder(model: PretrainedModel, source: Path) -> dict[str, ExportWords]:
    import torch

    main, kind = model.main_input_name, model.config.model_type
    if main not in MASKED and kind not in UNMASKED.get(main, ()):
        why = f"the model is an encoder-decoder of the unknown type {kind}, whose encoder reads {main}"
        raise Unsupported(why, path=source, cure=_WHOLE)
    if not hasattr(model, "lm_head") and not hasattr(model, "proj_out") and not hasattr(model, "decoder"):
        why = f"a {type(model).__name__} does not generate tokens"
        cure = "Pass the folder of a model that generates tokens, or " + _WHOLE.lower()
        raise Unsupported(why, path=source, cure=cure)
    # Use eager attention. If attention has a position bias (T5), torch.export cannot trace the strides of torch's fused
    # attention.
    with silent():
        model.set_attn_implementation("eager")
    masked = main in MASKED
    lengths = {1: 5, 2: 4} if masked else {1: 0, 2: 0}
    inputs = {batch: _main_input(model, main, batch, length) for batch, length in lengths.items()}
    with torch.no_grad(), quiet():
        # Run the encoder to get the sizes of its output, because the config's keys for these sizes depend on the
        # architecture. For audio and images, the number of positions is fixed.
        hidden = {batch: _encode(model, *given).shape[1:] for batch, given in inputs.items()}
    heads = _heads(model, hidden[2], source)
    sequence = {0: "batch_size", 1: "encoder_sequence"} if masked else {0: "batch_size"}
    names = ("input_ids", "attention_mask") if masked else (main,)
    encoder = ExportWords(
        _encoder_module(model), tuple(inputs[batch] for batch in (2, 1)), names, ("last_hidden_state",),
        (sequence, (sequence,)) if masked else (sequence,),
    )  # fmt: skip
    return {
        ENCODER: encoder,
        DECODER: _decoder(model, hidden, heads, masked, past=False),
        WITH_PAST: _decoder(model, hidden, heads, masked, past=True),
    }


def _main_input(model: PretrainedModel, main: str, batch: int, length: int) -> tuple[Tensor, ...]:
    """Return example inputs of the encoder: the main input, and a mask if the encoder reads one."""
    import torch

    rng = torch.Generator().manual_seed(batch)
    if main in MASKED:
        mask = torch.ones(batch, length, dtype=torch.int64)
        mask[0, length - 1 :] = 0 if batch > 1 else 1  # Mask out one position, so that the check covers padding.
        return tokens(model, batch, length), mask
    # Whisper's second convolution halves the number of frames.
    frames = (model.config.num_mel_bins, 2 * model.config.max_source_positions) if main == "input_features" else (0, 0)
    shape = image_shape(model.config.encoder) if main == "pixel_values" else frames
    return (torch.randn(batch, *shape, generator=rng).to(next(model.parameters()).dtype),)


def _encode(model: PretrainedModel, given: Tensor, mask: Tensor | None = None) -> Tensor:
    more = {} if mask is None else {"attention_mask": mask}
    return model.get_encoder()(given, **more, return_dict=True).last_hidden_state


def _encoder_module(model: PretrainedModel) -> nn.Module:
    from torch import nn

    class EncoderPart(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, given: Tensor, *mask: Tensor) -> Tensor:
            return _encode(self.model, given, *mask)

    return EncoderPart().eval()


def _decode(model: PretrainedModel, ids: Tensor, hidden: Tensor, mask: Tensor | None, cache: Cache) -> Tensor:
    more = {} if mask is None else {"attention_mask": mask}
    # T5Gemma reads the attribute `last_hidden_state` of `encoder_outputs`; other models also accept a tuple.
    encoded = import_module("transformers.modeling_outputs").BaseModelOutput(last_hidden_state=hidden)
    return model(
        decoder_input_ids=ids, encoder_outputs=encoded, **more, **{cache_word(model): cache}, use_cache=True,
        return_dict=True,
    ).logits  # fmt: skip


def _empty_cache(past: Sequence[Sequence[Tensor]] = ()) -> Cache:
    """Return a cache that contains the tensors of `past`; an empty cache by default.

    `past` has four tensors for each layer, in the order of `KEPT`. If there is a past, cross-attention layers read
    their keys and values from the cache, and do not compute them from the encoder's output.
    """
    transformers = import_module("transformers")
    parts = [[pair[start : start + 2] for pair in past] for start in (0, 2)]
    cache: Cache = transformers.EncoderDecoderCache(*(transformers.DynamicCache(part) for part in parts))
    for layer in range(len(past)):
        cache.is_updated[layer] = True
    return cache


def _heads(model: PretrainedModel, hidden: Sequence[int], source: Path) -> list[tuple[tuple[int, int], ...]]:
    """For each layer, return the `(heads, head size)` of its four cached tensors, in the order of `KEPT`."""
    import torch

    cache, kind = _empty_cache(), next(model.parameters()).dtype
    try:
        with torch.no_grad(), quiet():
            _decode(model, tokens(model, 1, 2), torch.zeros(1, *hidden, dtype=kind), None, cache)
        both = zip(pairs(cache.self_attention_cache), pairs(cache.cross_attention_cache), strict=True)
        sizes = [tuple((one.shape[1], one.shape[3]) for one in (*self_pairs, *cross)) for self_pairs, cross in both]
    except (AttributeError, IndexError, TypeError, ValueError, RuntimeError) as error:
        why = f"the cache of a {type(model).__name__} does not consist of keys and values ({first_line(error)})"
        raise Unsupported(why, path=source, cure=_WHOLE) from None
    if not sizes:
        raise Unsupported(f"a {type(model).__name__} does not cache keys and values", path=source, cure=_WHOLE)
    return sizes


KEPT = ("decoder.key", "decoder.value", "encoder.key", "encoder.value")
"""Optimum's names for the four cached tensors of each layer."""


def _decoder(
    model: PretrainedModel, hidden: Mapping[int, Sequence[int]], heads: Sequence[tuple[tuple[int, int], ...]],
    masked: bool, past: bool,
) -> ExportWords:  # fmt: skip
    """Return the `ExportWords` of the decoder: for later calls if `past` is set, otherwise for the first call.

    In later calls, the graph does not read the encoder's output, because the past already contains the keys and values
    that were computed from that output.
    """
    import torch
    from torch import nn

    class DecoderPart(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(
            self, ids: Tensor, mask: Tensor | None, states: Tensor | None, pasts: Sequence[Sequence[Tensor]] | None
        ) -> tuple[Tensor, list[list[Tensor]]]:
            if pasts:
                first = pasts[0][2]
                # Pass zeros as the encoder's output. The result does not depend on that output, because cross-attention
                # layers read their keys and values from the past.
                states = first.new_zeros(first.shape[0], first.shape[2], width)
            assert states is not None
            cache = _empty_cache(pasts or ())
            logits = _decode(self.model, ids, states, mask, cache)
            self_pairs, cross = (pairs(part) for part in (cache.self_attention_cache, cache.cross_attention_cache))
            return logits, [[*one] if past else [*one, *other] for one, other in zip(self_pairs, cross, strict=True)]

    kind, rng = next(model.parameters()).dtype, torch.Generator().manual_seed(0)
    width = hidden[2][1]

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng).to(kind)

    def example(batch: int, length: int, before: int) -> tuple[Nested, ...]:
        size = hidden[batch][0]
        mask = torch.ones(batch, size, dtype=torch.int64)
        mask[0, size - 1 :] = 0 if batch > 1 else 1
        counts = (before, before, size, size)
        # Use a random past instead of zeros, so that the outputs depend on it.
        cache = [tuple(drawn(batch, n, c, w) for (n, w), c in zip(layer, counts, strict=True)) for layer in heads]
        return (
            tokens(model, batch, length), mask if masked else None, None if past else drawn(batch, size, width),
            cache if past else None,
        )  # fmt: skip

    across = {1: "encoder_sequence"} if masked else {}
    sequence = {0: "batch_size", **across}
    self_axes, cross = {0: "batch_size", 2: "past"}, {0: "batch_size", **({2: "encoder_sequence"} if masked else {})}
    layers = range(len(heads))
    inputs = (
        "input_ids", *(["encoder_attention_mask"] if masked else []), *([] if past else ["encoder_hidden_states"]),
        *(f"past_key_values.{at}.{each}" for at in layers for each in (KEPT if past else ())),
    )  # fmt: skip
    outputs = ("logits", *(f"present.{at}.{each}" for at in layers for each in (KEPT[:2] if past else KEPT)))
    shapes = (
        {0: "batch_size", 1: "sequence"}, sequence if masked else None, None if past else sequence,
        [(self_axes, self_axes, cross, cross) for _ in layers] if past else None,
    )  # fmt: skip
    examples = (example(2, 3, 4), example(1, 1, 2)) if past else (example(2, 3, 0), example(1, 1, 0))
    return ExportWords(DecoderPart().eval(), examples, inputs, outputs, shapes)
