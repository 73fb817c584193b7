"""Find batch normalisations and scales that exporters and optimizers folded into the layer before them.

torch's exporters, onnxruntime and onnxsim fold `y' = s * (y - mean) + beta` with `s = gamma / sqrt(var + eps)` into a
convolution or linear layer. The graph then holds `s * W`, and the base holds `W`. An adapter changes `W`, so its change
must be multiplied by `s` in the graph. The scale `s` is computed from the base's statistics and verified with the
graph's weight.

Optimizers also fold a vector of the base that multiplies a layer's output, as the layer scale of ConvNeXt. Any vector
of the base can be one, so it must be much nearer to the graph's weight than every other explanation.
"""

from __future__ import annotations

import math
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

CHANCE = 16.0
"""By how many mean squares chance alone can make a wrong `eps` seem nearer: the square of four standard deviations."""

_FUSED = re.compile(r"bn_?fusion|fuse_?bn|bn_?fuse|mul_?fusion|_weight_fused$", re.IGNORECASE)
_PARAMETER = re.compile(r"(?:.*\.)?(?:weight|bias)$")


def groups_of(spot: Spot) -> int:
    """Return the number of groups of a transposed convolution; 1 for layers that have all outputs on one axis."""
    return int(attribute(spot.node, "group", 1)) if issubclass(spot.kind, ConvTranspose) else 1


def computes_apart(layer: GraphLayer | Ended, place: ResolvedTarget) -> bool:
    """Whether a formula must compute `W @ x` itself, because the layer's output differs from `W @ x` plus the bias.

    There are two such cases. The node may add a fused residual to the product. Or a batch norm is folded into a packed
    weight: formulas see the base's weight, but the node computes with a rounded weight.
    """
    return layer.adds_more or (place.norm is not None and place.norm.is_rounded)


def refuse_folded(places: Sequence[ResolvedTarget]) -> None:
    """Refuse layers that may have a folded norm, if there are no base weights to verify the norm.

    Raises:
        Unsupported: the graph has signs of a folded norm.
    """
    for place in places:
        for spot in place.spots:
            if (trace := _trace(spot, place.target.path)) is not None:
                why = (
                    f"a batch normalisation or a scale may be folded into this layer ({trace}), and would also scale "
                    "the change"
                )
                cure = "Pass the base's weights, which show whether there is one: --base-weights DIR (base_weights=)"
                raise Unsupported(why, where=str(place.asked), cure=cure)


def is_norm(node: ir.Node) -> bool:
    """Whether the exporter's metadata says that a node computes a batch normalisation, alone or fused with others."""
    notes = [*listed(node.metadata_props.get(CLASSES)), *listed(node.metadata_props.get(SCOPES))[-1:]]
    return any("batchnorm" in word.lower() or "batch_norm" in word.lower() for word in notes[-3:])


def _trace(spot: Spot, path: str) -> str | None:
    """Return the evidence that a norm may be folded into a layer, or None."""
    if not issubclass(spot.kind, Conv | Gemm | MatMul):
        return None
    bias = _bias_of(spot)
    if only_reader(dequantized(spot.node.outputs[0]), "BatchNormalization") is not None:
        return None
    if is_norm(spot.node):
        return "the node's metadata names one"
    names = [*spot.names.get("initializer", ()), *spot.names.get("folded_from", ())]
    # Ignore the sizes of a Reshape, which are int64.
    stored_array = () if bias is None else sources(bias)
    biases = [source.name or "" for source in stored_array if element_type(source) != np.int64]
    if any(_FUSED.search(name) for name in (*names, *biases, spot.node.name or "")):
        return "a tensor's name shows it"
    # Check the names of a convolution's parameters: exporters keep these names, but folding a norm writes new tensors
    # with made-up names. For a linear layer, a made-up name proves nothing, because an exporter that transposes the
    # weight also drops its name.
    if not issubclass(spot.kind, Conv) or path in names:  # The stored tensor has the target's name.
        return None
    if not any(same_end(name, f"{path}.weight") for name in names):
        return f"its weight has the name {names[0]}" if names else "its weight has no name"
    if bias is None or not numbers(bias).any():  # A folded norm always leaves a bias.
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
    """A candidate for what is folded: a norm of the base with a value of `eps`, or a vector; and its distances."""

    name: str
    scale: Array
    shift: Array
    of_weight: float
    of_bias: float
    is_vector: bool = False

    @property
    def distance(self) -> float:
        """The larger distance: both must match, because several norms can have similar scales."""
        return max(self.of_weight, self.of_bias)


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
    W = stored.swapaxes(0, 1) if issubclass(spot.kind, ConvTranspose) else stored
    if far is None or not _may_hold(spot, W):
        return _plain(place, far)
    b, rounded = _bias_in_base(base, name), any(is_packed(one) for one in place.spots)
    guesses = sorted(_guesses(base, spot, W, b), key=lambda guess: guess.distance)
    best = next((guess for guess in guesses if not guess.is_vector), None)
    if (scale := _vector_of(guesses, far, place)) is not None:
        return replace(place, norm=FoldedNorm(scale.name, scale.scale, scale.shift, W, b, "scale", rounded))
    if best is None or best.distance > NEAR or far <= best.distance:
        return _plain(place, far, is_scaled(spot, stored))
    alike = abs(best.scale - 1).max() <= ALIKE
    if far <= NEAR and far < APART * best.distance:
        if alike:
            return place
        why = (
            f"the layer is about as near to the base's weight ({far:.3f}) as to that weight times the norm {best.name}"
        )
        raise TargetNotFound(
            why, where=str(place.asked), cure="Use a graph whose weights are quantized less, or not at all"
        )
    return replace(place, norm=FoldedNorm(best.name, best.scale, best.shift, W, b, is_rounded=rounded))


def _vector_of(guesses: Sequence[_Guess], far: float, place: ResolvedTarget) -> _Guess | None:
    """Return the vector of the base that is folded into a layer, or None.

    Args:
        guesses: the guesses for the layer, the nearest first.
        far: the distance between the graph's weight and the base's weight without any scale.
        place: the target, for the error.

    Raises:
        TargetNotFound: two vectors that differ are about equally near.
    """
    best = next((guess for guess in guesses if guess.is_vector), None)
    norm = next((guess.distance for guess in guesses if not guess.is_vector), float("inf"))
    # Do not accept a vector just because the plain weight is far: the many vectors of a base may include one that
    # explains a part of what quantization did. Quantization leaves a rest that no vector explains.
    if best is None or best.distance > NEAR or APART * best.distance > min(far, norm):
        return None
    size = float(abs(best.scale).max())
    other = next((one for one in guesses if one.is_vector and abs(one.scale - best.scale).max() > ALIKE * size), None)
    if other is not None and other.distance < APART * best.distance:
        why = f"the layer is about as near to the base's weight times {best.name} as times {other.name}"
        raise TargetNotFound(
            why, where=str(place.asked), cure="Use a graph whose weights are quantized less, or not at all"
        )
    return best


def scaled_distance(base: Checkpoint, name: str, spot: Spot) -> float | None:
    """Return the relative distance between a layer's weight and a base weight with the nearest norm or scale.

    Args:
        base: the base's weights.
        name: the name of the weight in the base.
        spot: the layer.

    Returns:
        The distance; None if no norm or vector of the base fits the layer.
    """
    W = as_array(base.tensors[name]).astype(np.float64)
    W = W.swapaxes(0, 1) if issubclass(spot.kind, ConvTranspose) else W
    if not _may_hold(spot, W):
        return None
    return min((guess.distance for guess in _guesses(base, spot, W, _bias_in_base(base, name))), default=None)


def _may_hold(spot: Spot, W: Array) -> bool:
    """Whether a layer is of a kind into which norms and scales are folded, and has the shape of a base weight."""
    return issubclass(spot.kind, Conv | Gemm | MatMul) and spot.rows is None and W.shape == spot.shape


def _plain(place: ResolvedTarget, far: float | None, scaled: bool = False) -> ResolvedTarget:
    if far is not None and far <= NEAR:
        return place
    how = "another shape" if far is None else f"a distance of {far:.2f}"
    cure = "Is this the base that the graph was exported from?"
    if scaled:
        how = (
            "those of the base, with each channel multiplied by a factor that no batch normalisation of the base has, "
            "nor any of its vectors"
        )
        cure = (
            "Pass the weights with the statistics of the norms (running_mean, running_var) and the layers' scales: "
            "--base-weights DIR (base_weights=)"
        )
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
    _, rest, _ = _factors(V, rows)
    return bool(rest <= 1e-3 * np.linalg.norm(V))


def _factors(V: Array, rows: Array) -> tuple[Array, float, Array]:
    """Return the best factor of each channel by least squares, what it leaves of the weight, and each row's square."""
    squares = (rows * rows).sum(1)
    factors = (V * rows).sum(1) / np.maximum(squares, 1e-300)
    return factors, float(np.linalg.norm(V - factors[:, None] * rows)), squares


def _guesses(base: Checkpoint, spot: Spot, W: Array, b: Array | None) -> Iterator[_Guess]:
    """Yield the norms and vectors of the base that may be folded into a layer with the base's weight and bias."""
    V, rows = _weight_of(spot), _by_channel(spot, W)
    bias_value = _bias_of(spot)
    weight = None if bias_value is None else numbers(bias_value).reshape(-1).astype(np.float64)
    factors, rest, squares = _factors(V, rows)
    size = max(float(np.linalg.norm(V)), 1e-300)

    def guess(name: str, scale: Array, shift: Array, is_vector: bool) -> _Guess:
        # The rest after the best factors is orthogonal to the rows, so this is the norm of `V - scale * rows`.
        off, of_bias = float(np.sqrt(rest**2 + float(((scale - factors) ** 2 * squares).sum()))) / size, 0.0
        if weight is not None:
            wanted = shift if b is None else scale * b + shift
            of_bias = float(abs(weight - wanted).max()) / max(float(abs(weight).max()), 1e-300)
        return _Guess(name, scale, shift, off, of_bias, is_vector)

    for name, gamma, beta, mean, var in _norms(base, len(V)) if weight is not None else ():
        scales = [gamma / np.sqrt(np.maximum(var, 0) + eps) for eps in EPSILONS]
        ways = [guess(name, scale, beta - scale * mean, False) for scale in scales]
        # A weight in few bits is rounded by more than `eps` changes it, so the nearest weight can have a wrong `eps`.
        # The bias decides, because integer graphs store it in 32 bits. After that, take the first `eps` that the weight
        # does not exclude: by chance, a wrong one lowers the sum of the squares by a few of their mean.
        least = min(one.of_bias for one in ways)
        ways = [one for one in ways if one.of_bias <= APART * least]
        best = min(one.of_weight for one in ways)
        yield next(one for one in ways if V.size * (one.of_weight**2 - best**2) <= CHANCE * best**2)
    # One number for each channel is a multiple of any other number. A bias that is not at the layer may be scaled or
    # not.
    if rows.shape[1] > 1 and (weight is not None or b is None):
        for name, scale in _vectors(base, len(V)):
            yield guess(name, scale, np.zeros_like(scale), True)


def _vectors(base: Checkpoint, channels: int) -> Iterator[tuple[str, Array]]:
    """Yield name and numbers of the base's tensors that have one number for each channel, as a layer scale has."""
    for name, leaf in base.tensors.items():
        if leaf.dtype.floating and leaf.shape and max(leaf.shape) == channels == math.prod(leaf.shape):
            yield name, as_array(leaf).astype(np.float64).reshape(-1)


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
