"""Shadow: a small network runs in parallel with the model.

Each block uses the difference between its input and a second hidden state s, which starts as the network's output.

The formula is that of ShadowPEFT in PEFT 0.21. The input x of a block becomes x' = x + alpha * up @ down @ (x - s). The
block's output y determines the state for the next block: s' = (1 - g) * s + g * t, with t = T(y) and g = sigmoid(G(y)).
T and G each consist of two linear layers with a GELU between them. The first s is the small network's output for the
same call, multiplied by `projection` if there is one. The network has the same model class as the base, but few layers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, cast

from ..core.updates import OutputUpdate, Rule, attribute, tensor
from ..errors import Malformed, Unsupported, UsageError
from ..io.inputs import decimal_number
from ..linalg.activations import ACTIVATIONS, sigmoid

if TYPE_CHECKING:
    from torch import Tensor

    from ..core.updates.update import Layer


class Shadow(OutputUpdate):
    """The tensors of one block, and the small network, which all blocks share."""

    paper = "https://huggingface.co/docs/peft/package_reference/shadow"
    bound_to = "the classes of transformers"
    acts_on = "each token's output (depending on a network in parallel with the model)"
    asks = ("shadow",)
    moves_input = True

    fits: ClassVar[tuple[Rule, ...]] = (
        Rule(
            require="hidden == out and hidden == in",
            meaning="the adapter was made for blocks with another number of channels",
        ),
    )

    down: Tensor = tensor("r hidden")
    up: Tensor = tensor("hidden r")
    transform_in: Tensor = tensor("m hidden")
    transform_in_bias: Tensor = tensor("m")
    transform_out: Tensor = tensor("hidden m")
    transform_out_bias: Tensor = tensor("hidden")
    gate_in: Tensor = tensor("m hidden")
    gate_in_bias: Tensor = tensor("m")
    gate_out: Tensor = tensor("hidden m")
    gate_out_bias: Tensor = tensor("hidden")
    network: Tensor = tensor("size")
    projection: Tensor | None = tensor("hidden width", optional=True)
    names: str = ""
    layers: int = attribute(1, least=1)
    heads: int = attribute(0, least=0)
    inner: int = attribute(0, least=0)
    shared_embeddings: bool = True
    alpha: float = 0.1

    @property
    def parts(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the network's tensors, by name; `network` contains these tensors one after another."""
        shapes = {}
        for line in self.names.splitlines():
            name, *sizes = line.split(" ")
            shape = [decimal_number(size) for size in sizes]
            if not name or None in shape:
                why = "a line is not a tensor name and its sizes"
                raise Malformed(why, where="names", cure="Write the adapter again")
            shapes[name] = tuple(size for size in shape if size is not None)
        return shapes

    def forward(self, x: Tensor, layer: Layer) -> Tensor:
        if len(layer.shape) > 2:
            why = "Shadow needs inputs whose last axis is the channels, so it cannot run at a convolution"
            raise Unsupported(why, cure="Target the model's blocks")
        shadow = layer.call["shadow"]
        s = shadow.state(self)
        if s.shape != x.shape:
            why = f"the layer's input has the shape {list(x.shape)}, but the parallel network returns {list(s.shape)}"
            raise UsageError(why, cure="Target the model's blocks, and use one call for all rows")
        y = layer(x + self.alpha * ((x - s) @ self.down.mT @ self.up.mT))
        t, g = self._update("transform", y), sigmoid(self._update("gate", y))
        shadow.keep((1 - g) * s + g * t)
        return y

    def _update(self, name: str, y: Tensor) -> Tensor:
        W, b, V, c = (cast("Tensor", self.tensors[f"{name}_{end}"]) for end in ("in", "in_bias", "out", "out_bias"))
        return ACTIVATIONS["gelu"](y @ W.mT + b) @ V.mT + c
