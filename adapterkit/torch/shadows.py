"""The side network of Shadow: its state during a call, and the network itself.

The network has the class and config of the model's own body, except for fewer layers and other sizes, and gets the same
inputs as the model. The network is not a module of the model: one tensor of the adapter holds all of its weights.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Hashable, Mapping, Sequence
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..errors import ShapeMismatch, Unsupported, UsageError

if TYPE_CHECKING:
    from ..methods.shadow import Shadow

LAYERS = ("num_hidden_layers", "n_layer", "num_layers")
WIDTHS = ("hidden_size", "n_embd", "d_model")
HEADS = ("num_attention_heads", "n_head", "num_heads")
INNERS = ("intermediate_size", "ffn_dim", "n_inner")
"""The names that configs of transformers use for each size."""


class ShadowState:
    """The state that each block passes to the next, from the network's output to the result of the last block."""

    def __init__(
        self, model: nn.Module, words: Mapping[str, object], cached: bool, networks: dict[Hashable, nn.Module]
    ) -> None:
        self.model, self.words, self.cached, self.networks = model, words, cached, networks
        before = words.get("shadow")
        self.value = before if isinstance(before, Tensor) else None

    def state(self, update: Shadow) -> Tensor:
        """Return the state that the previous block left; at the first block, the network's output.

        Raises:
            Unsupported: in this call the network would not see the same tokens, or blocks would run twice.
        """
        if self.value is None:
            self._check()
            key = update.names, update.network.device
            if key not in self.networks:
                self.networks[key] = network_of(self.model, update)
            network = self.networks[key].train(self.model.training)
            self.value = _output(network, self.model, update, self.words)
        return self.value

    def keep(self, value: Tensor) -> None:
        """Pass a state to the next block."""
        self.value = value

    def _check(self) -> None:
        if self.cached:
            cure = "Pass use_cache=False (in generate() too)"
            raise Unsupported("the side network has no cache of the earlier tokens", cure=cure)
        if self.model.training and getattr(self.model, "is_gradient_checkpointing", False):
            why = "gradient checkpointing runs blocks again, but the state between them exists only once"
            raise Unsupported(why, cure="Train without gradient checkpointing")


class Standing(nn.Module):
    """The network with its values as a separate module: it takes its inputs by position and returns the state.

    Args:
        model: the base, or a model like it without values.
        update: one block's update, with its tensors in the dtype to compute in.
        words: the names of the network's inputs.
    """

    def __init__(self, model: nn.Module, update: Shadow, words: Sequence[str]) -> None:
        super().__init__()
        self.network, self.words, self.projection = network_of(model, update), tuple(words), update.projection
        given = tensors_of(update)
        for path, module in self.network.named_modules():
            for name, own in module._parameters.items():
                if own is not None:  # An embedding that is shared with the base is never read.
                    held = given.get(f"{path}.{name}" if path else name, own.new_zeros(1, 1, device="cpu"))
                    module._parameters[name] = nn.Parameter(held, requires_grad=False)

    def forward(self, *given: Tensor) -> Tensor:
        words = dict(zip(self.words, given, strict=True))
        out: Tensor = self.network(**words, use_cache=False).last_hidden_state
        return out if self.projection is None else out @ self.projection.mT


def network_of(model: nn.Module, update: Shadow) -> nn.Module:
    """Return the network without values; each call passes the tensors in.

    Raises:
        Unsupported: no such network can be built for this model.
        ShapeMismatch: the update's tensors do not fit such a network.
    """
    body: Any = _body(model)
    config = copy.deepcopy(body.config)
    width = None if update.projection is None else update.projection.shape[1]
    for names, size in ((LAYERS, update.layers), (WIDTHS, width), (INNERS, update.inner), (HEADS, update.heads)):
        if size:
            setattr(config, next((name for name in names if hasattr(config, name)), names[0]), size)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[min(i, len(config.layer_types) - 1)] for i in range(update.layers)]
    with torch.random.fork_rng(devices=[]):  # The network's initial values are drawn and then discarded.
        network: nn.Module = type(body)(config)
    _check_parts(network, update)
    network.to(update.network.device)
    for module in network.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)
    return network


def _check_parts(network: nn.Module, update: Shadow) -> None:
    parts, own = update.parts, {name: tuple(p.shape) for name, p in network.named_parameters()}
    lost = [name for name in own if name not in parts and not (update.shared_embeddings and name == EMBEDDINGS)]
    wrong = next((name for name, shape in parts.items() if own.get(name) != shape), lost[0] if lost else None)
    if wrong or sum(map(prod, parts.values())) != update.network.shape[0]:
        why = f"{wrong} has shape {parts.get(wrong or '')}, but a {type(network).__name__} has {own.get(wrong or '')}"
        raise ShapeMismatch(why, where="network", cure="Is this the base that the adapter was trained on?")


def _output(network: nn.Module, model: nn.Module, update: Shadow, words: Mapping[str, object]) -> Tensor:
    given = {name: words[name] for name in ("attention_mask", "position_ids") if words.get(name) is not None}
    ids, embeds = words.get("input_ids"), words.get("inputs_embeds")
    if ids is None and embeds is None:
        why = "its formula needs the model's own input, which the model was not called with"
        raise UsageError(why, cure="Call the model that it was injected into, with input_ids= or inputs_embeds=")
    if update.shared_embeddings and embeds is None:
        ids, embeds = None, _embed(model)(ids)
    given |= {"input_ids": ids} if embeds is None else {"inputs_embeds": embeds}
    called = functional_call(network, tensors_of(update), (), {**given, "use_cache": False})
    out: Tensor = called.last_hidden_state
    return out if update.projection is None else out @ update.projection.mT


def tensors_of(update: Shadow) -> dict[str, Tensor]:
    """Return the network's tensors, by name."""
    sizes = [prod(shape) for shape in update.parts.values()]
    network: Any = update.network
    pieces = zip(update.parts.items(), network.split(sizes), strict=True)
    return {name: piece.reshape(shape) for (name, shape), piece in pieces}


def _embed(model: nn.Module) -> nn.Module:
    found: Any = model
    embed: nn.Module = found.get_input_embeddings()
    return embed


def _body(model: nn.Module) -> nn.Module:
    """Return the part of a transformers model that holds its blocks."""
    found: Any = getattr(model, "base_model", model)
    body = found if hasattr(found, "layers") or hasattr(found, "h") else getattr(found, "decoder", None)
    if body is None or not hasattr(body, "config") or "inputs_embeds" not in inspect.signature(body.forward).parameters:
        why = f"a network like a {type(model).__name__} cannot be built"
        raise Unsupported(why, cure="Use Shadow with a decoder of transformers")
    found_body: nn.Module = body
    return found_body


EMBEDDINGS = "embed_tokens.weight"
"""The embeddings, which are missing in a network that uses the base's."""
