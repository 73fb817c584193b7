"""Find batch normalisations and scales that exporters and optimizers folded into the layer before them.

torch's exporters, onnxruntime and onnxsim fold `y' = s * (y - mean) + beta` with `s = gamma / sqrt(var + eps)` into a
convolution or linear layer. The graph then holds `s * W`, and the base holds `W`. An adapter changes `W`, so its change
must be multiplied by `s` in the graph. The scale `s` is computed from the norm's statistics in the base, and is checked
against the graph's weight.

Some models multiply a layer's output by a vector, such as the layer scale of ConvNeXt. Optimizers fold this vector into
the layer too. Any vector of the base can be such a scale. Therefore, a vector is accepted only if the base's weight
times this vector is much nearer to the graph's weight than all other candidates are.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from ..errors import USE_EXPORTED_BASE, TargetNotFound, Unsupported
from ..io.lazy import as_array
from ..naming.moves import same_end
from .building import Array, element_type
from .integer_layers import IntegerLayer
from .layers import Conv, ConvTranspose, Gemm, LeftMatMul, MatMul, bias_after, dequantized, only_reader, weight_at
from .modules import CLASSES, SCOPES, listed
from .operands import attribute, is_constant, numbers, sources
from .packed import ConvInteger, is_packed
from .resolved import APART, NEAR, FoldedNorm, distance

if TYPE_CHECKING:
    from ..io.checkpoint import Checkpoint
    from .layers import GraphLayer
    from .outlets import Ended
    from .resolved import ResolvedTarget, Spot

ALIKE = 1e-3
"""Two scales count as equal if their relative difference is at most `ALIKE`. A norm is ignored if all its scales equal
1 in this sense, and the layer also matches the base's weight without the norm."""

EPSILONS = (1e-5, 1e-3, 1e-4, 1e-6, 1e-2, 1e-8)
"""Candidates for `eps`, which weight files do not store: torch's default, then TensorFlow's, then other values."""

CHANCE = 16.0
"""Tolerance for the choice of `eps`. Two values of `eps` fit equally well if their sums of squared errors differ by at
most this multiple of the mean squared error. 16 is 4 squared, for four standard deviations."""

_FUSED = re.compile(r"bn_?fusion|fuse_?bn|bn_?fuse|mul_?fusion|_weight_fused$", re.IGNORECASE)
_PARAMETER = re.compile(r"(?:.*\.)?(?:weight|bias)$")


def groups_of(spot: Spot) -> int:
    """Return the number of groups of a transposed convolution; 1 for other layers.

    The weight of a transposed convolution is `[in, out / groups, *k]`. With several groups, this weight has no axis
    that contains all output channels. The weights of other layers have such an axis, even those of grouped
    convolutions.
    """
    return int(attribute(spot.node, "group", 1)) if issubclass(spot.kind, ConvTranspose) else 1


def computes_apart(layer: GraphLayer | Ended, place: ResolvedTarget) -> bool:
    """Whether a formula must compute `W @ x` itself, because the layer's output differs from `W @ x` plus the bias.

    The output differs in two cases. First, the node also adds a value other than the bias, such as a fused residual.
    Second, a norm or scale is folded into a packed weight: formulas get the base's weight, but the node computes with a
    rounded weight.
    """
    return layer.adds_more or (place.norm is not None and place.norm.is_rounded)


def refuse_folded(places: Sequence[ResolvedTarget]) -> None:
    """Raise an error if a norm may be folded into a layer. Called only for layers whose base weight is not given.

    Raises:
        Unsupported: the metadata, the names or the bias of a layer's node suggest a folded norm.
    """
    for place in places:
        for spot in place.spots:
            if (trace := _trace(spot, place.target.path)) is not None:
                why = (
                    f"a batch normalisation or a scale may be folded into this layer ({trace}); in this case, the "
                    "adapter's change must be scaled too"
                )
                cure = "Pass the base's weights, to compare the layer with them: --base-weights DIR (base_weights=)"
                raise Unsupported(why, where=str(place.asked), cure=cure)


def is_norm(node: ir.Node) -> bool:
    """Whether the exporter's metadata says that a node is a batch normalisation, perhaps fused with another layer."""
    notes = [*listed(node.metadata_props.get(CLASSES)), *listed(node.metadata_props.get(SCOPES))[-1:]]
    return any("batchnorm" in word.lower() or "batch_norm" in word.lower() for word in notes[-3:])


def _trace(spot: Spot, path: str) -> str | None:
    """Return the evidence that a norm may be folded into a layer, as a clause for the error; None without evidence."""
    if not issubclass(spot.kind, Conv | Gemm | MatMul):
        return None
    bias = _bias_of(spot)
    if only_reader(dequantized(spot.node.outputs[0]), "BatchNormalization") is not None:
        return None
    if is_norm(spot.node):
        return "the node's metadata names a batch normalisation"
    names = [*spot.names.get("initializer", ()), *spot.names.get("folded_from", ())]
    # Skip int64 tensors: they are the sizes of a Reshape, not a bias.
    stored_array = () if bias is None else sources(bias)
    biases = [source.name or "" for source in stored_array if element_type(source) != np.int64]
    if any(_FUSED.search(name) for name in (*names, *biases, spot.node.name or "")):
        return "the node or one of its tensors has a name that optimizers give to fused layers"
    # Check the names of a convolution's parameters: exporters keep these names, but folding a norm writes new tensors
    # with generated names. For a linear layer, a generated name proves nothing, because an exporter that transposes the
    # weight also drops its name. The names prove nothing either if the target itself is a stored tensor, i.e. if `path`
    # is in `names`.
    if not issubclass(spot.kind, Conv) or path in names:
        return None
    if not any(same_end(name, f"{path}.weight") for name in names):
        return f"its weight has the name {names[0]}" if names else "its weight has no name"
    if bias is None or not numbers(bias).any():  # Folding a norm gives the layer a bias.
        return None
    plain = [re.sub(r"_(?:quantized|q|scale|zero_point)(?:_scale|_zero_point)?$", "", name) for name in biases]
    return None if all(_PARAMETER.match(name) for name in plain) else f"its bias has the name {biases[0]}"


def _bias_of(spot: Spot) -> ir.Value | None:
    """Return the layer's bias, which the layer itself or an Add after it adds; None if there is no constant bias."""
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
    """A candidate for folding: a norm of the base with one value of `eps`, or a vector of the base.

    Attributes:
        name: the name of the norm or vector in the base.
        scale: the factor of each output channel, `[out]`.
        shift: the term that is added to each output channel, `[out]`.
        of_weight: the relative distance between the graph's weight and the base's weight with the candidate folded in.
        of_bias: the same for the bias; 0 if the graph's layer has no bias.
        is_vector: whether the candidate is a vector.
    """

    name: str
    scale: Array
    shift: Array
    of_weight: float
    of_bias: float
    is_vector: bool = False

    @property
    def distance(self) -> float:
        """The larger of the two distances: the bias must match too, because several norms can have similar scales."""
        return max(self.of_weight, self.of_bias)


def with_norms(place: ResolvedTarget, base: Checkpoint, name: str) -> ResolvedTarget:
    """Compare a layer's weight with the base's weight, and find out which norm or vector is folded into the layer.

    The layer was found by its name only. Return `place`, with its `norm` set if a norm or vector is folded in.

    Args:
        place: the target.
        base: the base's weights.
        name: the name of the target's weight in the base.

    Raises:
        TargetNotFound: the layer's weight matches neither the base's weight nor the base's weight scaled by a norm or
            vector; or two of these candidates match about equally well.
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
            f"the layer's weight is about as near to the base's weight (distance {far:.3f}) as to the base's weight "
            f"scaled by the norm {best.name}"
        )
        raise TargetNotFound(
            why, where=str(place.asked), cure="Use a graph whose weights are quantized less, or not at all"
        )
    return replace(place, norm=FoldedNorm(best.name, best.scale, best.shift, W, b, is_rounded=rounded))


def _vector_of(guesses: Sequence[_Guess], far: float, place: ResolvedTarget) -> _Guess | None:
    """Return the vector of the base that is folded into a layer, or None.

    Args:
        guesses: the candidates for the layer, the nearest first.
        far: the distance between the graph's weight and the base's weight if no vector is folded into it.
        place: the target, for the error.

    Raises:
        TargetNotFound: two different vectors match the layer about equally well.
    """
    best = next((guess for guess in guesses if guess.is_vector), None)
    norm = next((guess.distance for guess in guesses if not guess.is_vector), float("inf"))
    # Do not accept a vector just because it fits better than no vector: a base has many vectors, and one of them may
    # reduce the quantization error a little by chance. No vector removes most of this error by chance.
    if best is None or best.distance > NEAR or APART * best.distance > min(far, norm):
        return None
    size = float(abs(best.scale).max())
    other = next((one for one in guesses if one.is_vector and abs(one.scale - best.scale).max() > ALIKE * size), None)
    if other is not None and other.distance < APART * best.distance:
        why = f"the base's weight matches the layer about equally well if scaled by {best.name} or by {other.name}"
        raise TargetNotFound(
            why, where=str(place.asked), cure="Use a graph whose weights are quantized less, or not at all"
        )
    return best


def scaled_distance(base: Checkpoint, name: str, spot: Spot) -> float | None:
    """Return the smallest relative distance between a layer and a base weight with a norm or vector folded in.

    The function tries all norms and vectors of the base that can be folded into the layer.

    Args:
        base: the base's weights.
        name: the name of the weight in the base.
        spot: the layer.

    Returns:
        The distance; None if no norm or vector of the base can be folded into the layer.
    """
    W = as_array(base.tensors[name]).astype(np.float64)
    W = W.swapaxes(0, 1) if issubclass(spot.kind, ConvTranspose) else W
    if not _may_hold(spot, W):
        return None
    return min((guess.distance for guess in _guesses(base, spot, W, _bias_in_base(base, name))), default=None)


def _may_hold(spot: Spot, W: Array) -> bool:
    """Whether a norm or scale can be folded into a layer, and the layer's weight has the shape of `W`."""
    return issubclass(spot.kind, Conv | Gemm | MatMul) and spot.rows is None and W.shape == spot.shape


def _plain(place: ResolvedTarget, far: float | None, scaled: bool = False) -> ResolvedTarget:
    if far is not None and far <= NEAR:
        return place
    how = "the shapes differ" if far is None else f"the relative distance is {far:.2f}"
    cure = USE_EXPORTED_BASE
    if scaled:
        how = "each output channel is scaled, but no batch normalisation and no vector of the base gives the factors"
        cure = (
            "Pass base weights that contain the norms' statistics (running_mean, running_var) and the layers' scales: "
            "--base-weights DIR (base_weights=)"
        )
    raise TargetNotFound(
        f"the layer's weight differs from the base's weight ({how})", where=str(place.asked), cure=cure
    )


def _bias_in_base(base: Checkpoint, weight: str) -> Array | None:
    bias = base.tensors.get(f"{weight.removesuffix('weight')}bias") if weight.endswith("weight") else None
    return None if bias is None else as_array(bias).astype(np.float64)


def _by_channel(spot: Spot, W: Array) -> Array:
    """Return a weight as a matrix with one row per output channel.

    `W` is `[out, in, *k]`, or `[out / groups, in, *k]` for a transposed convolution.
    """
    groups = groups_of(spot)
    if groups == 1:
        return W.reshape(len(W), -1)
    parts = W.reshape(len(W), groups, W.shape[1] // groups, -1)
    return parts.swapaxes(0, 1).reshape(groups * len(W), -1)


def _weight_of(spot: Spot) -> Array:
    weight = spot.kind.stored_array(spot.node).astype(np.float64)
    return _by_channel(spot, weight.swapaxes(0, 1) if spot.kind.turns(spot.node) else weight)


def is_scaled(spot: Spot, W: Array) -> bool:
    """Whether a layer's weight is the base's weight `W` with each output channel multiplied by some factor."""
    W = W.swapaxes(0, 1) if issubclass(spot.kind, ConvTranspose) else W
    if W.shape != spot.shape:
        return False
    V, rows = _weight_of(spot), _by_channel(spot, W)
    if rows.shape[1] < 2:  # With one element per channel, a factor always exists.
        return False
    _, rest, _ = _factors(V, rows)
    return bool(rest <= 1e-3 * np.linalg.norm(V))


def _factors(V: Array, rows: Array) -> tuple[Array, float, Array]:
    """Return each channel's least-squares factor, the norm of the remaining error, and each row's sum of squares."""
    squares = (rows * rows).sum(1)
    factors = (V * rows).sum(1) / np.maximum(squares, 1e-300)
    return factors, float(np.linalg.norm(V - factors[:, None] * rows)), squares


def _guesses(base: Checkpoint, spot: Spot, W: Array, b: Array | None) -> Iterator[_Guess]:
    """Yield the norms and vectors that may be folded into a layer. `W` and `b` are its weight and bias in the base."""
    V, rows = _weight_of(spot), _by_channel(spot, W)
    bias_value = _bias_of(spot)
    weight = None if bias_value is None else numbers(bias_value).reshape(-1).astype(np.float64)
    factors, rest, squares = _factors(V, rows)
    size = max(float(np.linalg.norm(V)), 1e-300)

    def guess(name: str, scale: Array, shift: Array, is_vector: bool) -> _Guess:
        # Each row of `V - factors * rows` is orthogonal to the same row of `rows`. So the square root in the next line
        # equals the norm of `V - scale * rows`.
        off, of_bias = float(np.sqrt(rest**2 + float(((scale - factors) ** 2 * squares).sum()))) / size, 0.0
        if weight is not None:
            wanted = shift if b is None else scale * b + shift
            of_bias = float(abs(weight - wanted).max()) / max(float(abs(weight).max()), 1e-300)
        return _Guess(name, scale, shift, off, of_bias, is_vector)

    for name, gamma, beta, mean, var in _norms(base, len(V)) if weight is not None else ():
        scales = [gamma / np.sqrt(np.maximum(var, 0) + eps) for eps in EPSILONS]
        ways = [guess(name, scale, beta - scale * mean, False) for scale in scales]
        # Rounding a weight to a few bits changes the weight more than a different `eps` does. So a wrong `eps` can have
        # the smallest distance. Therefore, first compare the biases, which integer graphs store in 32 bits. Then use
        # the first `eps` whose weight fits about as well as the best-fitting weight; see `CHANCE`.
        least = min(one.of_bias for one in ways)
        ways = [one for one in ways if one.of_bias <= APART * least]
        best = min(one.of_weight for one in ways)
        yield next(one for one in ways if V.size * (one.of_weight**2 - best**2) <= CHANCE * best**2)
    # Try no vectors in two cases. If the weight has one element per output channel, some factors always convert the
    # base's weight to the layer's weight, even if no scale is folded in. If the base has a bias and the layer does not,
    # the graph adds the bias elsewhere, and this function cannot check whether the graph scales the bias.
    if rows.shape[1] > 1 and (weight is not None or b is None):
        for name, scale in _vectors(base, len(V)):
            yield guess(name, scale, np.zeros_like(scale), True)


def _vectors(base: Checkpoint, channels: int) -> Iterator[tuple[str, Array]]:
    """Yield the name and the array of each base tensor that has one element per channel, as a layer scale does."""
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
