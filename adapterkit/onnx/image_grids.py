"""Trace vision towers that read the patches of several images as one sequence, for any number and size of images.

Such towers (Qwen2-VL and others) get the patches `[patches, values]` and a grid `[images, 3]`: the numbers of frames,
patch rows and patch columns of each image. In transformers, loops over the images compute the positions of patches,
the windows of patches, and the segments in which patches attend to each other. A trace of these loops is valid only for
the traced grid. But the towers also accept the results of the loops as arguments. This module computes these arguments
from the index of each patch, with operations on whole tensors, which torch can trace.

The towers' attention runs once over all patches, with a mask that separates the images, windows or frames.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

    from .pretrained_types import PretrainedModel

SEGMENTED = "adapterkit_flash_segments"
"""Name under which the attention function is registered in transformers. It must contain `flash`: otherwise, the towers
do not pass the segments to the function."""

POSITIONS, SEGMENTS, WINDOWS, TAPS = (
    "get_vision_position_ids", "get_vision_attention_seqlens", "get_vision_window_index",
    "get_vision_interpolation_indices_and_weights",
)  # fmt: skip
"""Names of the transformers functions that compute the positions, segments, windows and interpolation of a tower,
unless the caller passes the results as arguments."""


def tower_of(model: PretrainedModel) -> nn.Module | None:
    """Return the first module that takes `grid_thw` and calls the functions named by `POSITIONS` and `SEGMENTS`.

    Return None if there is no such module.
    """
    for part in model.modules():
        names = inspect.signature(part.forward).parameters
        if "grid_thw" in names and {POSITIONS, SEGMENTS} <= _used(part):
            return part
    return None


def _used(tower: nn.Module) -> set[str]:
    return {*inspect.unwrap(type(tower).forward).__code__.co_names}


@dataclass(frozen=True, slots=True)
class Patches:
    """The location of each patch in its image, as `patches_of` computes it. All tensors have shape `[patches]`.

    Attributes:
        image: the index of the patch's image.
        frame: the index of the frame in the image.
        row: the index of the row in the frame.
        column: the index of the column in the frame.
        rows: how many rows of patches the image has.
        columns: how many columns of patches the image has.
    """

    image: Tensor
    frame: Tensor
    row: Tensor
    column: Tensor
    rows: Tensor
    columns: Tensor


def patches_of(grid: Tensor, count: Tensor, merge: int) -> Patches:
    """Compute the location of each patch in its image.

    The patches of a frame come square by square; a square has `merge` rows and `merge` columns of patches.

    Args:
        grid: the numbers of frames, patch rows and patch columns of each image, `[images, 3]`.
        count: the index of each patch, `[patches]`. The numbering continues from one image to the next.
        merge: the side length of a square, in patches.
    """
    sizes = grid[:, 0] * grid[:, 1] * grid[:, 2]
    ends = sizes.cumsum(0)
    image = (count[:, None] >= ends[None]).sum(1)
    rows, columns, start = (each[image] for each in (grid[:, 1], grid[:, 2], ends - sizes))
    inside = count - start
    frame, inside = inside // (rows * columns), inside % (rows * columns)
    square, inside = inside // merge**2, inside % merge**2
    squares = columns // merge
    row = square // squares * merge + inside // merge
    column = square % squares * merge + inside % merge
    return Patches(image, frame, row, column, rows, columns)


def arguments_of(tower: Any, grid: Tensor, patches: Tensor) -> dict[str, Any]:
    """Return the tower's arguments that transformers would otherwise compute with loops over the grid.

    Args:
        tower: the tower, whose attributes give the sizes of squares and windows.
        grid: the numbers of frames, patch rows and patch columns of each image, `[images, 3]`.
        patches: the tower's input, `[patches, values]`.
    """
    import torch

    merge, used = int(tower.spatial_merge_size), _used(tower)
    count = torch.arange(patches.shape[0])
    each = patches_of(grid, count, merge)
    # `_attention` compares segment indices, so `cu_seqlens` has the segment index of each patch instead of the
    # segments' ends. Each frame of each image is one segment.
    given: dict[str, Any] = {
        "position_ids": torch.stack([each.row, each.column], 1), "max_seqlen": 1,
        "cu_seqlens": each.image * (each.frame.max() + 1) + each.frame,
    }  # fmt: skip
    if WINDOWS in used:
        order, windows = _windows(tower, grid, patches)
        given |= {"window_index": order, "cu_window_seqlens": windows, "max_window_seqlen": 1}
    if TAPS in used:
        given["interp_indices"], given["interp_weights"] = _taps(tower, each)
    return given


def _windows(tower: Any, grid: Tensor, patches: Tensor) -> tuple[Tensor, Tensor]:
    """Sort the squares by window. Return the sorted squares' indices, and the window index of each of their patches.

    A square has `spatial_merge_size` rows and columns of patches. The results have shapes `[squares]` and `[patches]`.
    """
    import torch

    merge = int(tower.spatial_merge_size)
    size = int(tower.window_size) // merge // int(tower.patch_size)
    squares = grid // torch.tensor([1, merge, merge])
    each = patches_of(squares, torch.arange(patches.shape[0] // merge**2), 1)
    across, down = (each.columns + size - 1) // size, (each.rows + size - 1) // size
    # The number of windows of each image, over all its frames.
    places = squares[:, 0] * ((squares[:, 1] + size - 1) // size) * ((squares[:, 2] + size - 1) // size)
    window = (places.cumsum(0) - places)[each.image] + each.frame * down * across
    window = window + each.row // size * across + each.column // size
    # Sort the squares as if every window had `size * size` squares: then the sort keys of one window come before the
    # keys of the next window. Windows at the edge of an image have fewer squares and leave some keys unused.
    order = (window * size**2 + each.row % size * size + each.column % size).argsort()
    return order, window[order][:, None].expand(-1, merge**2).reshape(-1)


def _taps(tower: Any, each: Patches) -> tuple[Tensor, Tensor]:
    """Return the indices and the weights with which the position of each patch is interpolated.

    The indices select entries of the position table. Both tensors have shape `[patches, entries]`.
    """
    library = import_module("transformers.vision_utils")
    side = int(tower.num_grid_per_side)
    options = (
        side, getattr(tower, "interpolation_mode", "bilinear"), getattr(tower, "interpolation_align_corners", False),
        getattr(tower, "interpolation_padding", "border"),
    )  # fmt: skip
    down, down_weights = library._interpolation_axis_taps_weights(each.row, each.rows, *options)
    across, across_weights = library._interpolation_axis_taps_weights(each.column, each.columns, *options)
    count = down.shape[1] ** 2
    indices = (down[:, :, None] * side + across[:, None, :]).reshape(-1, count)
    return indices, (down_weights[:, :, None] * across_weights[:, None, :]).reshape(-1, count)


@contextmanager
def in_segments(tower: Any) -> Iterator[None]:
    """Inside a `with` block, the tower's attention runs once over all patches; a mask separates the segments."""
    functions: Any = import_module("transformers.modeling_utils").ALL_ATTENTION_FUNCTIONS
    functions.register(SEGMENTED, _attention)
    before = tower.config._attn_implementation
    tower.config._attn_implementation = SEGMENTED
    try:
        yield
    finally:
        tower.config._attn_implementation = before


def _attention(
    _: nn.Module, query: Tensor, key: Tensor, value: Tensor, *, scaling: float, cu_seq_lens_q: Tensor, **_more: object
) -> tuple[Tensor, None]:
    """Compute attention between patches of the same segment.

    `query`, `key` and `value` have shape `[1, heads, patches, width]`. `cu_seq_lens_q` has the segment index of each
    patch, `[patches]`; in transformers, this argument has the ends of the segments instead.
    """
    import torch

    weights = (query @ key.transpose(-1, -2)) * scaling
    apart = cu_seq_lens_q[:, None] != cu_seq_lens_q[None]
    weights = weights.masked_fill(apart, torch.finfo(weights.dtype).min)
    weights = weights.softmax(-1, dtype=torch.float32).to(query.dtype)
    return (weights @ value).transpose(1, 2).contiguous(), None
