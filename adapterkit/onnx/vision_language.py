"""Export vision-language models of transformers to the ONNX graphs that transformers.js loads.

`vision_encoder.onnx` computes image features from pixels, and `embed_tokens.onnx` computes embeddings from tokens. The
caller replaces the embeddings of image tokens by image features. `decoder_model_merged.onnx` computes logits from the
result.

The export finds the parts of a model by the names of methods and parameters, such as `get_image_features`,
`image_grid_thw`, `token_type_ids` and `get_rope_index`. Before it writes the graphs, it compares the logits of the
parts with the logits of the whole model.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ..errors import Unsupported, first_line
from ..torch.pretrained import silent
from .caches import Past
from .image_grids import arguments_of, in_segments, tower_of
from .pretrained_calls import ExportWords, cache_word, tokens
from .tracing import quiet

if TYPE_CHECKING:
    from torch import Tensor, nn

    from .pretrained_calls import Nested, Open
    from .pretrained_types import ModelConfig, PretrainedModel

VISION, EMBEDDING, MERGED = "vision_encoder.onnx", "embed_tokens.onnx", "decoder_model_merged.onnx"

CLOSE = 1e-4
"""Largest accepted relative difference between the parts' logits and the whole torch model's logits, in float32."""

CLOSE_NARROW = 3e-2
"""The limit that replaces `CLOSE` if the model's dtype is not float32."""

TYPES = ("token_type_ids", "mm_token_type_ids")
"""Possible names of the model's argument whose elements are 1 for image tokens and 0 for other tokens."""

IMAGE_TOKENS = ("image_token_id", "image_token_index")
"""Possible config keys of the image token's id. In a text, each image token stands for a part of an image."""

GRID = "image_grid_thw"
"""Name of the argument that contains each image's grid: `(frames, rows of patches, columns of patches)`."""

NAMED = {"qwen2_vl": {GRID: "grid_thw"}}
"""A map from the model type to the vision encoder's inputs that transformers.js names differently. Each entry maps the
name in transformers to the name in transformers.js."""

GRIDS = (((1, 4, 6), (1, 8, 4)), ((1, 10, 2),))
"""The grids `(frames, rows, columns)` of the images in two examples, for a vision tower that merges 2 x 2 patches.
`_grids` scales the rows and columns for other towers. All images differ in size."""

_WHOLE = "Export the torch model with adapterkit.onnx.export"


@dataclass(frozen=True, slots=True)
class Images:
    """A module that computes a model's image features, and the arguments that the module takes.

    Attributes:
        module: the module.
        names: the names that the model gives to the module's arguments.
        examples: examples of the module's arguments; the first example is traced.
        shapes: the names of the dynamic axes of each argument.
    """

    module: nn.Module
    names: tuple[str, ...]
    examples: tuple[tuple[Tensor, ...], ...]
    shapes: tuple[Open, ...]


def vision_language(model: PretrainedModel, source: Path) -> dict[str, ExportWords]:
    """Describe the graphs into which a vision-language model is exported. Return a map from file name to description.

    Args:
        model: a transformers model in evaluation mode. The function sets its attention implementation to `eager`.
        source: the model's folder, for error messages.

    Raises:
        Unsupported: the vision encoder, the embeddings and the decoder cannot be called separately, or their logits
            differ from the logits of the whole model.
    """
    import torch

    with silent():
        model.set_attn_implementation("eager")
    try:
        images = _images(model)
        decoder = _decoder_of(model, images, source)
    except (AttributeError, KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:
        why = f"a {type(model).__name__} cannot be split into graphs for transformers.js ({first_line(error)})"
        raise Unsupported(why, path=source, cure=_WHOLE) from None
    rng, past = torch.Generator().manual_seed(0), decoder.past
    width = decoder.embed(tokens(model, 1, 1)).shape[-1]

    def example(batch: int, length: int, before: int) -> tuple[Nested, ...]:
        total = before + length
        mask = torch.ones(batch, total, dtype=torch.int64)
        mask[0, : int(batch > 1 and before > 0)] = 0  # Mask out one position, so that the check covers padding.
        embedded = torch.randn(batch, length, width, generator=rng).to(decoder.dtype)
        kinds = torch.randint(0, 2, (batch, total), generator=rng)
        places = decoder.positions(mask)[..., before:]
        given = {"attention_mask": mask, "position_ids": places, **dict.fromkeys(TYPES, kinds)}
        return (embedded, *(given[name] for name in decoder.words), past.example(batch, before, rng))

    named = NAMED.get(model.config.model_type, {})
    axes: dict[str, dict[int, str]] = {name: {0: "batch_size", 1: "total"} for name in ("attention_mask", *TYPES)}
    axes["position_ids"] = {1: "batch_size", 2: "sequence"} if decoder.rotary else {0: "batch_size", 1: "sequence"}
    sequence = {0: "batch_size", 1: "sequence"}
    return {
        VISION: ExportWords(
            images.module, images.examples, tuple(named.get(name, name) for name in images.names), ("image_features",),
            images.shapes,
        ),
        EMBEDDING: ExportWords(
            decoder.embedding, ((tokens(model, 2, 3),), (tokens(model, 1, 1),)), ("input_ids",), ("inputs_embeds",),
            (sequence,),
        ),
        MERGED: ExportWords(
            decoder.module, (example(2, 3, 5), example(1, 4, 0), example(1, 1, 4)),
            ("inputs_embeds", *decoder.words, *past.names()), ("logits", *past.names(present=True)),
            (sequence, (*(axes[name] for name in decoder.words), past.axes())),
        ),
    }  # fmt: skip


# Image features.


def _images(model: PretrainedModel) -> Images:
    """Describe how a model takes images. The parameters of the model's method `get_image_features` show this."""
    asked = inspect.signature(model.get_image_features).parameters
    tower = tower_of(model) if GRID in asked else None
    if tower is not None:
        return _grids(model, tower)
    unknown = [
        name for name, one in asked.items()
        if one.default is one.empty and one.kind is not one.VAR_KEYWORD and name != "pixel_values"
    ]  # fmt: skip
    if unknown or GRID in asked:
        raise ValueError(f"the features of its images depend on {unknown[0] if unknown else GRID}")
    masked = next((part for part in model.modules() if _reads(part, "patch_attention_mask")), None)
    if "pixel_attention_mask" in asked and masked is not None:
        return _masked(model)
    return _pictures(model)


def _reads(part: nn.Module, name: str) -> bool:
    return name in inspect.signature(part.forward).parameters


def _pictures(model: PretrainedModel) -> Images:
    """Describe images that all have the config's size, `[images, channels, height, width]`."""
    import torch
    from torch import nn

    class PicturePart(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, pixels: Tensor) -> Tensor:
            output = self.model.get_image_features(pixel_values=pixels)
            features: Any = getattr(output, "pooler_output", output)
            return features if isinstance(features, torch.Tensor) else torch.stack(list(features))

    shape = image_shape(model.config.vision_config)
    examples = tuple((_drawn(model, 1, *shape, seed=seed),) for seed in (0, 1))
    return Images(PicturePart().eval(), ("pixel_values",), examples, ({},))


def _masked(model: PretrainedModel) -> Images:
    """Describe images, `[texts, images, channels, height, width]`, with a mask of their pixels (Idefics 3, SmolVLM).

    If a text has fewer images than another, processors pad it with images of zeros, and transformers' model drops these
    padding images. The graph does not drop padding images, so the caller must not pass any.
    """
    import torch
    from torch import nn

    base: Any = next(part for part in model.modules() if hasattr(part, "vision_model") and hasattr(part, "connector"))
    patch = int(model.config.vision_config.patch_size)

    class MaskedImagePart(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, pixels: Tensor, mask: Tensor) -> Tensor:
            pixels, mask = pixels.flatten(0, 1), mask.flatten(0, 1)
            # A patch is visible if at least one of its pixels is visible.
            images, height, width = mask.shape
            squares = mask.reshape(images, height // patch, patch, width // patch, patch).to(torch.int64)
            visible = squares.sum((2, 4)) > 0
            hidden = base.vision_model(pixel_values=pixels, patch_attention_mask=visible).last_hidden_state
            features: Tensor = base.connector(hidden)
            return features

    channels, height, width = image_shape(model.config.vision_config)
    examples = []
    for seed, (texts, images) in enumerate(((2, 3), (1, 1))):
        mask = torch.ones(texts, images, height, width, dtype=torch.bool)
        mask[0, 0, height - patch :] = False  # Mask out some pixels, so that the check covers masks.
        examples.append((_drawn(model, texts, images, channels, height, width, seed=seed), mask))
    shapes = ({0: "batch_size", 1: "images"}, {0: "batch_size", 1: "images"})
    return Images(MaskedImagePart().eval(), ("pixel_values", "pixel_attention_mask"), tuple(examples), shapes)


def _grids(model: PretrainedModel, tower: Any) -> Images:
    """Describe images of any size, which are passed as patches, with a grid for each image (Qwen2-VL and others).

    Some towers also return deep features, which the decoder's first layers read. Then each row of the module's output
    consists of the image features, followed by the deep features.
    """
    import torch
    from torch import nn

    class PatchPart(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, pixels: Tensor, grid: Tensor) -> Tensor:
            with in_segments(tower):
                output = tower(pixels, grid_thw=grid, return_dict=True, **arguments_of(tower, grid, pixels))
            deep: Sequence[Tensor] = getattr(output, "deepstack_features", None) or ()
            return torch.cat([output.pooler_output, *deep], -1)

    config, merge = model.config.vision_config, int(tower.spatial_merge_size)
    channels = int(getattr(config, "in_channels", getattr(config, "in_chans", 3)))
    numbers = channels * int(getattr(config, "temporal_patch_size", 1)) * int(config.patch_size) ** 2
    examples = []
    for seed, rows in enumerate(GRIDS):
        grid = torch.tensor([(frames, high // 2 * merge, wide // 2 * merge) for frames, high, wide in rows])
        examples.append((_drawn(model, int(grid.prod(1).sum()), numbers, seed=seed), grid))
    return Images(PatchPart().eval(), ("pixel_values", GRID), tuple(examples), ({0: "patches"}, {0: "images"}))


def image_shape(config: ModelConfig) -> tuple[int, int, int]:
    """Return the number of channels, the height and the width of a model's images."""
    size = config.image_size
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return int(getattr(config, "num_channels", 3)), int(height), int(width)


def _drawn(model: PretrainedModel, *shape: int, seed: int) -> Tensor:
    import torch

    rng = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=rng).to(next(model.parameters()).dtype)


# The embeddings and the decoder.


class Decoder:
    """Two parts of a model: one computes embeddings from tokens, the other computes logits from embeddings.

    Attributes:
        model: the whole model.
        words: the names of the arguments that the decoder takes after the embeddings and before the past.
        word: the name of the model's parameter for the cache.
        past: a description of the model's past.
        rotary: whether a token has three position ids: its frame, row and column in an image.
        offset: the position id that transformers gives to the first token. In the graph, position ids start at 0.
        deep: the number of decoder layers that read deep features. These layers are the decoder's first layers. Deep
            features are image features, and each of these layers reads different ones. In each row of the embeddings,
            the deep features for all these layers follow the embedding.
        embedding: the module that computes embeddings from tokens.
        module: the module that computes logits from embeddings.
    """

    def __init__(self, model: PretrainedModel, types: str | None, source: Path) -> None:
        from torch import nn

        asked = inspect.signature(model.forward).parameters
        self.model, self.word = model, cache_word(model)
        self.dtype = next(model.parameters()).dtype
        self.base: Any = next((part for part in model.modules() if hasattr(part, "get_rope_index")), None)
        self.rotary = self.base is not None
        places = self.rotary or "position_ids" in asked
        self.words = ("attention_mask", *(["position_ids"] if places else []), *([types] if types else []))
        self.past = Past(model, self.word, source, {"input_ids": tokens(model, 1, 2)})
        self.offset = 0 if self.rotary or not places else _offset(model)
        self.text = next((part for part in model.modules() if _reads(part, "deepstack_visual_embeds")), None)
        self.deep = 0
        mark = _image_token(model)
        self.outside = mark if mark >= model.get_input_embeddings().weight.shape[0] else None
        decoder = self

        class EmbeddingPart(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.model = model

            def forward(self, ids: Tensor) -> Tensor:
                return decoder.embed(ids)

        class TextDecoderPart(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.model = model

            def forward(self, embedded: Tensor, *rest: Nested) -> tuple[Tensor, list[Tensor]]:
                return decoder.logits(embedded, cast("list[Tensor]", rest[:-1]), cast("list[Tensor]", rest[-1]))

        self.embedding, self.module = EmbeddingPart().eval(), TextDecoderPart().eval()

    def embed(self, ids: Tensor) -> Tensor:
        """Return the embeddings of tokens. Zeros follow each embedding, in place of the deep features."""
        import torch

        if self.outside is not None:
            ids = ids.masked_fill(ids == self.outside, 0)  # The image token has no embedding.
        embedded: Tensor = self.model.get_input_embeddings()(ids)
        return torch.nn.functional.pad(embedded, (0, embedded.shape[-1] * self.deep))

    def positions(self, mask: Tensor) -> Tensor:
        """Return the position ids of texts without images, `[batch, tokens]`, or `[3, batch, tokens]` if `rotary`."""
        places = (mask.cumsum(1) - 1).clamp(min=0)
        return places[None].expand(3, -1, -1) if self.rotary else places

    def logits(
        self, embedded: Tensor, given: Sequence[Tensor], past: list[Tensor] | None
    ) -> tuple[Tensor, list[Tensor]]:
        """Return the logits and the new past."""
        words = dict(zip(self.words, given, strict=True))
        if self.offset:
            words["position_ids"] = words["position_ids"] + self.offset
        words["attention_mask"] = self.past.mask(words["attention_mask"], embedded.shape[1])
        cache = self.past.cache(past, first=any(name in TYPES for name in self.words))
        with self._deep(embedded) as embedded, self.past.scans(self.model):
            logits = self.model(
                inputs_embeds=embedded, **words, **{self.word: cache}, use_cache=True, return_dict=True
            ).logits
        return logits, self.past.tensors_of(cache)

    @contextmanager
    def _deep(self, embedded: Tensor) -> Iterator[Tensor]:
        """Yield the embeddings without the deep features.

        Inside the `with` block, a hook passes the deep features to the text model.
        """
        import torch

        if not self.deep or self.text is None:
            yield embedded
            return
        embedded, *deep = embedded.chunk(self.deep + 1, -1)
        # The text model adds the deep features to `hidden_states[visual_pos_masks]`. transformers passes a mask of the
        # image tokens. The index below selects all tokens instead. The result is the same, because the deep features
        # are zero for all tokens that are not image tokens.
        more = {"visual_pos_masks": torch.arange(embedded.shape[0]), "deepstack_visual_embeds": deep}

        def add(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
            return args, kwargs | more

        hook = self.text.register_forward_pre_hook(add, with_kwargs=True)
        try:
            yield embedded
        finally:
            hook.remove()


def _offset(model: PretrainedModel) -> int:
    """Return the position id of the first token in a call by `generate`; 0 if `generate` passes no position ids."""
    import torch

    ids = tokens(model, 1, 3)
    prepare = model.prepare_inputs_for_generation
    # In transformers 4, `generate` also passes the tokens' positions in the cache.
    more = {"cache_position": torch.arange(3)} if "cache_position" in inspect.signature(prepare).parameters else {}
    prepared = prepare(ids, attention_mask=torch.ones_like(ids), is_first_iteration=True, **more)
    places = prepared.get("position_ids")
    return 0 if places is None else int(places.reshape(-1)[0])


def _image_token(model: PretrainedModel) -> int:
    for word in IMAGE_TOKENS:
        if getattr(model.config, word, None) is not None:
            return int(getattr(model.config, word))
    raise ValueError("its config has neither image_token_id nor image_token_index")


def _decoder_of(model: PretrainedModel, images: Images, source: Path) -> Decoder:
    """Return a decoder with which the parts compute the same logits as the whole model.

    First try a decoder without token types as an argument. If the logits differ, try a decoder with token types: some
    models need to know which tokens are image tokens, for example for an attention mask that is not causal.

    Raises:
        ValueError: with every decoder, the logits of the parts differ from the logits of the whole model. The exported
            graphs would run, but give wrong results.
    """
    import torch

    asked = inspect.signature(model.forward).parameters
    apart = 0.0
    for types in (None, *(name for name in TYPES if name in asked)):
        decoder = Decoder(model, types, source)
        with torch.no_grad(), quiet():
            apart = max(_compared(model, images, given, decoder) for given in images.examples)
        if apart <= (CLOSE if decoder.dtype == torch.float32 else CLOSE_NARROW):
            return decoder
    raise ValueError(f"the logits differ by {apart:.2g} between the parts and the whole model")


def _compared(model: PretrainedModel, images: Images, given: Sequence[Tensor], decoder: Decoder) -> float:
    """Return the largest difference between the logits of the parts and the logits of the whole model.

    The difference is relative to the whole model's largest logit. The function also sets `decoder.deep`.
    """
    import torch

    mark, features = _image_token(model), images.module(*given)
    features = features.reshape(-1, features.shape[-1])
    width = model.get_input_embeddings().weight.shape[1]
    decoder.deep = features.shape[-1] // width - 1
    around = tokens(model, 1, 6)
    around[around == mark] = (mark + 1) % int(model.config.get_text_config().vocab_size)
    sizes = given[images.names.index(GRID)].prod(1) if GRID in images.names else torch.ones(1, dtype=torch.int64)
    pieces = [around[:, :2]]
    for count in (sizes * len(features) // sizes.sum()).tolist():  # The tokens of each image, with text between images.
        pieces += [torch.full((1, count), mark), around[:, 2:4]]
    ids = torch.cat([*pieces, around[:, 4:]], 1)
    asked = inspect.signature(model.forward).parameters
    # Pass the token types, as processors do: some models use them to let image tokens attend to each other.
    kinds = {name: (ids == mark).long() for name in TYPES if name in asked}
    mask = torch.ones_like(ids)
    # This call has a single text. If the example has images of several texts, assign all images to this text.
    one = [each.flatten(0, 1)[None] if given[0].ndim == 5 else each for each in given]
    pixels: Mapping[str, Tensor] = dict(zip(images.names, one, strict=True))
    whole = model(input_ids=ids, attention_mask=mask, **pixels, **kinds, return_dict=True).logits
    embedded = decoder.embed(ids).clone()
    embedded[ids == mark] = features.to(embedded.dtype)
    places = decoder.positions(mask)
    if decoder.rotary:
        names = inspect.signature(decoder.base.get_rope_index).parameters
        known = {"input_ids": ids, "attention_mask": mask, **pixels, **kinds}
        places = decoder.base.get_rope_index(**{name: known[name] for name in names if name in known})[0]
    by_name = {"attention_mask": mask, "position_ids": places, **kinds}
    logits, _ = decoder.logits(embedded, [by_name[name] for name in decoder.words], None)
    return float((whole.float() - logits.float()).abs().max() / whole.float().abs().max())
