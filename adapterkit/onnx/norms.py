"""Find batch normalisations that exporters folded into the layer before them.

torch's exporters, onnxruntime and onnxsim fold `y' = s * (y - mean) + beta` with `s = gamma / sqrt(var + eps)` into a
convolution or linear layer. The graph then holds `s * W`, and the base holds `W`. An adapter changes `W`, so its change
must be multiplied by `s` in the graph. The scale `s` is computed from the base's statistics, and must match the graph's
weight.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from ..errors import TargetNotFound, Unsupported
from ..io.lazy import as_array
from .building import Array, element_type
from .integer_layers import IntegerLayer
from .layers import Conv, ConvTranspose, Gemm, LeftMatMul, MatMul, bias_after, dequantized, only_reader, weight_at
from .modules import CLASSES, SCOPES, listed, same_end
from .operands import attribute, is_constant, numbers, sources
from .packed import ConvInteger, is_packed
from .resolved import APART, NEAR, FoldedNorm, distance

if TYPE_CHECKING:
    from ..io.checkpoint import Checkpoint
    from .layers import GraphLayer
    from .outlets import Ended
    from .resolved import ResolvedTarget, Spot

ALIKE = 1e-3
"""A norm with all scales within this distance of 1 is ignored, if the layer also matches the base without the norm."""

EPSILONS = (1e-5, 1e-3, 1e-4, 1e-6, 1e-2, 1e-8)
"""Candidates for `eps`, which weight files do not store. The first is torch's default, the second TensorFlow's."""

_FUSED = re.compile(r"bn_?fusion|fuse_?bn|bn_?fuse", re.IGNORECASE)
_PARAMETER = re.compile(r"(?:.*\.)?(?:weight|bias)$")


def groups_of(spot: Spot) -> int:
    """Return the number of groups of a transposed convolution; 1 for layers that have all outputs on one axis."""
    return int(attribute(spot.node, "group", 1)) if issubclass(spot.kind, ConvTranspose) else 1


def computes_apart(layer: GraphLayer | Ended, place: ResolvedTarget) -> bool:
    """Whether a formula must compute `W @ x` itself, because the layer's output differs from `W @ x` plus the bias.

    There are two such cases. The node may add a fused residual to the product. Or a batch norm is folded into a packed
    weight: formulas see the base's weight, but the node computes with a rounded weight.
    """
    return layer.adds_more or (place.norm is not None and any(is_packed(spot) for spot in place.spots))


def refuse_folded(places: Sequence[ResolvedTarget]) -> None:
    """Refuse layers that may have a folded norm, if there are no base weights to verify the norm.

    Raises:
        Unsupported: the graph has signs of a folded norm.
    """
    for place in places:
        for spot in place.spots:
            if (trace := _trace(spot, place.target.path)) is not None:
                why = f"a batch normalisation may be folded into this layer ({trace}), and would also scale the change"
                cure = "Pass the base's weights, which show whether there is one: --base-weights DIR (base_weights=)"
                raise Unsupported(why, where=str(place.asked), cure=cure)


def is_norm(node: ir.Node) -> bool:
    """Whether the exporter's metadata says that a node computes a batch normalisation, alone or fused with others."""
    notes = [*listed(node.metadata_props.get(CLASSES)), *listed(node.metadata_props.get(SCOPES))[-1:]]
    return any("batchnorm" in word.lower() or "batch_norm" in word.lower() for word in notes[-3:])


def _trace(spot: Spot, path: str) -> str | None:
    """Return the evidence that a norm may be folded into a layer, or None."""
    bias = _bias_of(spot)
    if not issubclass(spot.kind, Conv | Gemm | MatMul) or bias is None:
        return None  # A folded norm always leaves a bias.
    if only_reader(dequantized(spot.node.outputs[0]), "BatchNormalization") is not None:
        return None
    if is_norm(spot.node):
        return "the node's metadata names one"
    names = [*spot.names.get("initializer", ()), *spot.names.get("folded_from", ())]
    # Ignore the sizes of a Reshape, which are int64.
    biases = [source.name or "" for source in sources(bias) if element_type(source) != np.int64]
    if any(_FUSED.search(name) for name in (*names, *biases, spot.node.name or "")):
        return "a tensor's name shows it"
    # Check the names of a convolution's parameters: exporters keep these names, but folding a norm writes new tensors
    # with made-up names. For a linear layer, a made-up name proves nothing, because an exporter that transposes the
    # weight also drops its name.
    if not issubclass(spot.kind, Conv) or path in names:  # The stored tensor has the target's name.
        return None
    if not any(same_end(name, f"{path}.weight") for name in names):
        return f"its weight has the name {names[0]}" if names else "its weight has no name"
    if not numbers(bias).any():
        return None
    plain = [re.sub(r"_(?:quantized|q|scale|zero_point)(?:_scale|_zero_point)?$", "", name) for name in biases]
    return None if all(_PARAMETER.match(name) for name in plain) else f"its bias has the name {biases[0]}"


def _bias_of(spot: Spot) -> ir.Value | None:
    """Return the constant vector that the layer itself or an Add after the layer adds."""
    if issubclass(spot.kind, IntegerLayer):
        return spot.kind.float_bias(spot.node)
    if issubclass(spot.kind, ConvInteger):
        added = spot.kind.added(spot.node)
        return None if added is None else added[1]
    if issubclass(spot.kind, MatMul) and not issubclass(spot.kind, Gemm):
        channel = -2 if issubclass(spot.kind, LeftMatMul) else -1
        after = bias_after(spot.node, dequantized(spot.node.outputs[0]), spot.shape[0], channel)
        return None if after is None else after[1]
    bias = weight_at(spot.node, 2) if len(spot.node.inputs) > 2 else None
    return bias if is_constant(bias) else None


@dataclass(frozen=True, slots=True, eq=False)
class _Guess:
    """A candidate for a folded norm: a norm of the base, a value of `eps`, and the distance from the graph's weight."""

    name: str
    scale: Array
    shift: Array
    distance: float


def with_norms(place: ResolvedTarget, base: Checkpoint, name: str) -> ResolvedTarget:
    """Compare a layer that was found by name with the base's weight, and find a norm that is folded into the layer.

    Args:
        place: the target.
        base: the base's weights.
        name: the name of the target's weight in the base.

    Raises:
        TargetNotFound: the layer's weight differs from the base's weight; or it is about equally near to the base's
            weight and to that weight with a norm folded in.
    """
    spot, stored = place.spots[0], as_array(base.tensors[name]).astype(np.float64)
    far = distance(stored.astype(np.float32), spot)
    if not issubclass(spot.kind, Conv | Gemm | MatMul) or (bias := _bias_of(spot)) is None:
        return _plain(place, far)
    W = stored.swapaxes(0, 1) if issubclass(spot.kind, ConvTranspose) else stored
    if W.shape != spot.shape:
        return _plain(place, far)
    b = _bias_in_base(base, name)
    guesses = sorted(_guesses(base, spot, W, b, numbers(bias).reshape(-1)), key=lambda guess: guess.distance)
    best = guesses[0] if guesses else None
    if best is None or best.distance > NEAR or (far is not None and far <= best.distance):
        return _plain(place, far, is_scaled(spot, stored))
    alike = abs(best.scale - 1).max() <= ALIKE
    if far is not None and far <= NEAR and far < APART * best.distance:
        if alike:
            return place
        why = (
            f"the layer is about as near to the base's weight ({far:.3f}) as to that weight times the norm {best.name}"
        )
        raise TargetNotFound(why, where=str(place.asked), cure="Use a graph with less rounded weights")
    return replace(place, norm=FoldedNorm(best.name, best.scale, best.shift, W, b))


def _plain(place: ResolvedTarget, far: float | None, scaled: bool = False) -> ResolvedTarget:
    if far is not None and far <= NEAR:
        return place
    how = "another shape" if far is None else f"a distance of {far:.2f}"
    cure = "Is this the base that the graph was exported from?"
    if scaled:
        how = "those of the base, with each channel multiplied by a factor that no batch normalisation of the base has"
        cure = "Pass the weights with the statistics of the norms (running_mean, running_var): --base-weights DIR"
    raise TargetNotFound(f"the layer of this name holds other values ({how})", where=str(place.asked), cure=cure)


def _bias_in_base(base: Checkpoint, weight: str) -> Array | None:
    bias = base.tensors.get(f"{weight.removesuffix('weight')}bias") if weight.endswith("weight") else None
    return None if bias is None else as_array(bias).astype(np.float64)


def _by_channel(spot: Spot, W: Array) -> Array:
    """Return a weight `[out, in, *k]` as a matrix with one row per output channel."""
    groups = groups_of(spot)
    if groups == 1:
        return W.reshape(len(W), -1)
    parts = W.reshape(len(W), groups, W.shape[1] // groups, -1)
    return parts.swapaxes(0, 1).reshape(groups * len(W), -1)


def _weight_of(spot: Spot) -> Array:
    weight = spot.kind.stored_array(spot.node).astype(np.float64)
    return _by_channel(spot, weight.swapaxes(0, 1) if spot.kind.turns(spot.node) else weight)


def is_scaled(spot: Spot, W: Array) -> bool:
    """Whether a layer's weight equals the base's weight `W` if each output channel is multiplied by some factor."""
    W = W.swapaxes(0, 1) if issubclass(spot.kind, ConvTranspose) else W
    if W.shape != spot.shape:
        return False
    V, rows = _weight_of(spot), _by_channel(spot, W)
    if rows.shape[1] < 2:  # One number for each channel is a multiple of any other number.
        return False
    # Compute the best factor of each channel by least squares.
    factors = (V * rows).sum(1) / np.maximum((rows * rows).sum(1), 1e-300)
    return bool(np.linalg.norm(V - factors[:, None] * rows) <= 1e-3 * np.linalg.norm(V))


def _guesses(base: Checkpoint, spot: Spot, W: Array, b: Array | None, weight: Array) -> Iterator[_Guess]:
    V, rows = _weight_of(spot), _by_channel(spot, W)
    size, most = max(float(np.linalg.norm(V)), 1e-300), max(float(abs(weight).max()), 1e-300)
    for name, gamma, beta, mean, var in _norms(base, len(V)):
        for eps in EPSILONS:
            scale = gamma / np.sqrt(np.maximum(var, 0) + eps)
            shift = beta - scale * mean
            by_weight = float(np.linalg.norm(V - scale[:, None] * rows)) / size
            wanted = shift if b is None else scale * b + shift
            by_bias = float(abs(weight - wanted).max()) / most
            # The weight and the bias must both match, because several norms can have similar scales. So use the larger
            # of the two distances.
            yield _Guess(name, scale, shift, max(by_weight, by_bias))


def _norms(base: Checkpoint, channels: int) -> Iterator[tuple[str, Array, Array, Array, Array]]:
    """Yield name, gamma, beta, mean and variance of the base's batch normalisations with this number of channels."""
    for key, leaf in base.tensors.items():
        name, _, field = key.rpartition(".")
        mean = base.tensors.get(f"{name}.running_mean")
        if field != "running_var" or mean is None or leaf.shape != (channels,) or mean.shape != (channels,):
            continue
        affine = [base.tensors.get(f"{name}.{word}") for word in ("weight", "bias")]
        gamma, beta = (
            np.full(channels, fill) if one is None else as_array(one).astype(np.float64)
            for one, fill in zip(affine, (1.0, 0.0), strict=True)
        )
        yield name, gamma, beta, as_array(mean).astype(np.float64), as_array(leaf).astype(np.float64)
