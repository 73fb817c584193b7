"""Generate continuations of prompts that contain images, with the ONNX graphs of a vision-language model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from ..errors import ShapeMismatch, UsageError, nearest
from .building import Array
from .session import as_declared, new_name, prompt
from .vision_language import EMBEDDING, GRID, MERGED, NAMED, TYPES, VISION

if TYPE_CHECKING:
    from pathlib import Path

    from .session import Session

    Run = Callable[[str, Mapping[str, Array]], dict[str, Array]]

_PROCESSOR = "Pass all arrays that the model's processor returns"

CAUSAL = -1
"""The token type of generated tokens. Models define the types 0 and 1; a token of any other type attends only to
earlier tokens."""


class ImageTexts:
    """A batch of prompts that may contain images, and the sessions of the graphs that generate the continuations.

    Args:
        parts: the sessions of the model's graphs, by file name.
        inputs: the inputs of all texts, by the names that processors of transformers use.
        mark: the id of the image token. One row of image features replaces the embedding of each image token.
        path: the model's folder, for error messages.

    Raises:
        UsageError: an input is unknown, or missing.
    """

    def __init__(self, parts: Mapping[str, Session], inputs: Mapping[str, object], mark: int, path: Path) -> None:
        self._parts, self._mark, self._path = parts, mark, path
        other_names = {other: name for names in NAMED.values() for name, other in names.items()}
        self._images = {name: other_names.get(name, name) for name in parts[VISION].inputs} if VISION in parts else {}
        known = ["input_ids", "attention_mask", "position_ids", GRID, *TYPES, *self._images.values()]
        if unknown := sorted(set(inputs) - {*known}):
            cure = nearest(unknown[0], known) or f"The inputs are {', '.join(dict.fromkeys(known))}"
            raise UsageError(f"the model has no input {unknown[0]!r}", path=path, cure=cure)
        if "input_ids" not in inputs:
            raise UsageError("the input input_ids is missing", path=path, cure="Pass the token ids of the texts")
        self.tokens, self.mask = prompt(inputs["input_ids"], inputs.get("attention_mask"))
        self._given = {name: np.asarray(array) for name, array in inputs.items()}
        self._decoder = parts[MERGED]
        self._types = next((name for name in TYPES if name in self._decoder.inputs), None)
        if self._types is not None and self._types not in inputs:
            cure = f"Pass {self._types} as the model's processor returns it"
            raise UsageError(f"the input {self._types} is missing", path=path, cure=cure)

    def written(self, run: Run, count: int, ends: Sequence[int]) -> Array:
        """Generate greedily; return the ids of the given and the new tokens, `[batch, length + new]`.

        Args:
            run: a function that takes a graph's file name and its inputs, and returns the graph's outputs.
            count: the largest number of tokens to generate.
            ends: the ids of the tokens that end a text. A text that ends before the others is padded with the first of
                these ids.
        """
        tokens, mask, types = self.tokens, self.mask, self._given.get(self._types or "")
        embedded = self._merged(run)
        places = self._places()
        past: dict[str, Array] = {}
        done = np.zeros(len(tokens), bool)
        for _ in range(count):
            given = {"attention_mask": mask, "position_ids": places, **dict.fromkeys(TYPES, types)}
            feeds = {
                name: np.asarray(array).astype(self._decoder.types[name][0])
                for name, array in given.items()
                if name in self._decoder.inputs
            }
            outputs = run(MERGED, {"inputs_embeds": embedded, **feeds, **past})
            new = np.where(done, ends[0] if ends else 0, outputs["logits"][:, -1].argmax(-1)).astype(np.int64)[:, None]
            tokens, mask = np.concatenate([tokens, new], 1), np.concatenate([mask, np.ones_like(new)], 1)
            done |= np.isin(new[:, 0], ends)
            if done.all():
                break
            past = {name: outputs[new_name(name)] for name in self._decoder.inputs if new_name(name) in outputs}
            embedded = run(EMBEDDING, as_declared(self._parts[EMBEDDING], {"input_ids": new}))["inputs_embeds"]
            if types is not None:
                types = np.concatenate([types, np.full_like(new, CAUSAL)], 1)
            # Positions of shape `[3, batch, length]` give the frame, row and column. A new token has the same value for
            # all three: 1 more than the largest value in its text.
            places = places.max((0, 2))[None, :, None].repeat(3, 0) + 1 if places.ndim == 3 else places[:, -1:] + 1
        return tokens

    def _merged(self, run: Run) -> Array:
        """Return the embeddings of all tokens; image features replace the embeddings of image tokens."""
        embedded = run(EMBEDDING, as_declared(self._parts[EMBEDDING], {"input_ids": self.tokens}))[
            "inputs_embeds"
        ].copy()
        marks = self.tokens == self._mark
        features = self._features(run) if "pixel_values" in self._given else np.zeros((0, embedded.shape[-1]))
        if len(features) != marks.sum():
            why = f"the texts have {marks.sum()} image tokens, but the images have {len(features)} features"
            raise ShapeMismatch(why, path=self._path, where="pixel_values", cure=_PROCESSOR)
        embedded[marks] = features.astype(embedded.dtype)
        return embedded

    def _features(self, run: Run) -> Array:
        """Return the features of all images, `[features, width]`."""
        missing = [other for other in self._images.values() if other not in self._given]
        if missing:
            raise UsageError(f"the input {missing[0]} is missing", path=self._path, cure=_PROCESSOR)
        vision = self._parts[VISION]
        arrays = {name: self._given[other].astype(vision.types[name][0]) for name, other in self._images.items()}
        pixels = arrays["pixel_values"]
        if pixels.ndim == 5:
            # Texts with fewer images than others are padded with images of zeros. Drop the padding, as in transformers.
            real = pixels.reshape(-1, *pixels.shape[2:]).any((1, 2, 3))
            arrays = {name: array.reshape(-1, *array.shape[2:])[real][None] for name, array in arrays.items()}
        if vision.types["pixel_values"][1][0] == 1 and pixels.ndim == 4:
            features = np.concatenate([run(VISION, {"pixel_values": one[None]})["image_features"] for one in pixels])
        else:
            features = run(VISION, arrays)["image_features"]
        rows: Array = features.reshape(-1, features.shape[-1])
        return rows

    def _places(self) -> Array:
        """Return the positions of all tokens.

        The shape is `[batch, length]`, or `[3, batch, length]` if the decoder takes separate positions for the frames,
        rows and columns of images.
        """
        if "position_ids" in self._given:
            return self._given["position_ids"]
        places: Array = np.maximum(self.mask.cumsum(1) - 1, 0)
        shape = self._decoder.types["position_ids"][1] if "position_ids" in self._decoder.inputs else ()
        if len(shape) != 3:
            return places
        threefold, grids = places[None].repeat(3, 0), iter(self._given.get(GRID, self._given.get("grid_thw", ())))
        for row, (tokens, mask) in enumerate(zip(self.tokens, self.mask.astype(bool), strict=True)):
            threefold[:, row, mask] = self._in_images(tokens[mask] == self._mark, grids)
        return threefold

    def _in_images(self, marks: Array, grids: Iterator[Array]) -> Array:
        """Return the positions of one text's tokens, `[3, tokens]`: the frame, the row and the column of each token.

        Outside of images, the three positions of a token are equal. If an image starts at position p and has r rows and
        c columns of tokens, the token after the image has the position p + max(r, c).

        Args:
            marks: whether each token is an image token, `[tokens]`.
            grids: an iterator over the images of the batch. For each image, it yields three numbers: how many frames,
                rows and columns of patches the image has. This function consumes one item for each image of the text.
        """
        pieces, at = [np.zeros((3, 0), np.int64)], 0
        edges = [0, *(np.flatnonzero(np.diff(marks.astype(np.int8))) + 1), len(marks)]
        for first, last in pairwise(edges):
            length = int(last - first)
            if not length or not marks[first]:
                pieces.append(np.arange(at, at + length)[None].repeat(3, 0))
                at += length
                continue
            grid = next(grids, None)
            frames, rows, columns = (0, 0, 0) if grid is None else map(int, grid)
            merge = round((frames * rows * columns / length) ** 0.5)
            if not merge or frames * (rows // merge) * (columns // merge) != length:
                why = f"{length} successive image tokens do not fit an image of {frames} x {rows} x {columns} patches"
                raise ShapeMismatch(why, path=self._path, where=GRID, cure=_PROCESSOR)
            sizes = (frames, rows // merge, columns // merge)
            pieces.append(np.indices(sizes).reshape(3, -1) + at)
            at += max(sizes[1:])
        return np.concatenate(pieces, 1)
