"""Record inputs for formulas while a model runs: token ids, each row's task, and hidden states without the adapter.

A recorder belongs to the model into which an adapter was injected. It keeps the inputs until the call ends. In
training, it keeps them until the next call, because checkpointed blocks run again in the backward pass. If a formula
needs an argument that the model's forward does not accept, the argument is recorded, but not passed to the forward.
"""

from __future__ import annotations

import copy
import inspect
import threading
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from math import prod
from typing import TYPE_CHECKING, Any, Final, Protocol, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..core.updates import Update
from ..errors import USE_ITS_BASE, ShapeMismatch, Unsupported, UsageError
from .context import CACHES
from .scopes import Scope, Switch, switched

if TYPE_CHECKING:
    from ..methods.shadow import Shadow

# The side network of the method Shadow, and its state during a call.
#
# The network has the same class as the model without its head. It also has the same config, but with fewer layers and
# other sizes. It gets the same inputs as the model. It is not a submodule of the model: one tensor of the adapter
# stores all weights of the network.


LAYERS = ("num_hidden_layers", "n_layer", "num_layers")
WIDTHS = ("hidden_size", "n_embd", "d_model")
HEADS = ("num_attention_heads", "n_head", "num_heads")
INNERS = ("intermediate_size", "ffn_dim", "n_inner")
"""These four constants list the names that transformers' configs use for the number of layers, the hidden size, the
number of attention heads, and the inner size of the MLP."""


class ShadowState:
    """The state that each block passes to the next block. At the first block, it is the side network's output."""

    def __init__(
        self, model: nn.Module, words: Mapping[str, object], cached: bool, networks: dict[Hashable, nn.Module]
    ) -> None:
        self.model, self.words, self.cached, self.networks = model, words, cached, networks
        before = words.get("shadow")
        self.value = before if isinstance(before, Tensor) else None

    def state(self, update: Shadow) -> Tensor:
        """Return the state that the previous block passed on. At the first block, return the side network's output.

        Raises:
            Unsupported: the call uses a cache, so the side network would not see the earlier tokens; or gradient
                checkpointing would run the blocks twice.
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
            raise Unsupported("Shadow's side network has no cache of the earlier tokens", cure=cure)
        if self.model.training and getattr(self.model, "is_gradient_checkpointing", False):
            why = "gradient checkpointing runs blocks again, but Shadow does not store the state that each block gets"
            raise Unsupported(why, cure="Train without gradient checkpointing")


class Standing(nn.Module):
    """A module that contains the side network with its weights, and returns the first block's state.

    Its forward gets the network's inputs as positional arguments.

    Args:
        model: the base, or a model of the same structure on the meta device.
        update: one block's update, with its tensors in the dtype to compute in.
        words: the names of the network's inputs, in the order of the positional arguments.
    """

    def __init__(self, model: nn.Module, update: Shadow, words: Sequence[str]) -> None:
        super().__init__()
        self.network, self.words, self.projection = network_of(model, update), tuple(words), update.projection
        given = tensors_of(update)
        for path, module in self.network.named_modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    # If the network uses the base's embedding, the update has no tensor for the network's embedding.
                    # Zeros can take its place, because nothing reads them.
                    value = given.get(f"{path}.{name}" if path else name, parameter.new_zeros(1, 1, device="cpu"))
                    module._parameters[name] = nn.Parameter(value, requires_grad=False)

    def forward(self, *given: Tensor) -> Tensor:
        words = dict(zip(self.words, given, strict=True))
        out: Tensor = self.network(**words, use_cache=False).last_hidden_state
        return out if self.projection is None else out @ self.projection.mT


def network_of(model: nn.Module, update: Shadow) -> nn.Module:
    """Return the side network. Its parameters are on the meta device; callers replace them by the update's tensors.

    Raises:
        Unsupported: a side network cannot be built for this model.
        ShapeMismatch: the shapes of the update's tensors differ from those of the network's parameters.
    """
    body: Any = _body(model)
    config = copy.deepcopy(body.config)
    width = None if update.projection is None else update.projection.shape[1]
    for names, size in ((LAYERS, update.layers), (WIDTHS, width), (INNERS, update.inner), (HEADS, update.heads)):
        if size:
            setattr(config, next((name for name in names if hasattr(config, name)), names[0]), size)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[min(i, len(config.layer_types) - 1)] for i in range(update.layers)]
    with torch.random.fork_rng(devices=[]):  # Do not let the unused random initial values change torch's random state.
        network: nn.Module = type(body)(config)
    _check_parts(network, update)
    network.to(update.network.device)
    for module in network.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)
    return network


def _check_parts(network: nn.Module, update: Shadow) -> None:
    parts, shapes = update.parts, {name: tuple(p.shape) for name, p in network.named_parameters()}
    lost = [name for name in shapes if name not in parts and not (update.shared_embeddings and name == EMBEDDINGS)]
    wrong = next((name for name, shape in parts.items() if shapes.get(name) != shape), lost[0] if lost else None)
    if wrong or sum(map(prod, parts.values())) != update.network.shape[0]:
        why = (
            f"{wrong} has shape {parts.get(wrong or '')}, but a {type(network).__name__} has {shapes.get(wrong or '')}"
        )
        raise ShapeMismatch(why, where="network", cure=USE_ITS_BASE)


def _output(network: nn.Module, model: nn.Module, update: Shadow, words: Mapping[str, object]) -> Tensor:
    given = {name: words[name] for name in ("attention_mask", "position_ids") if words.get(name) is not None}
    ids, embeds = words.get("input_ids"), words.get("inputs_embeds")
    if ids is None and embeds is None:
        why = "Shadow's side network needs the model's input, but the call has neither input_ids nor inputs_embeds"
        raise UsageError(why, cure="Call the model with input_ids= or inputs_embeds=")
    if update.shared_embeddings and embeds is None:
        ids, embeds = None, cast("Any", model).get_input_embeddings()(ids)
    given |= {"input_ids": ids} if embeds is None else {"inputs_embeds": embeds}
    called = functional_call(network, tensors_of(update), (), {**given, "use_cache": False})
    out: Tensor = called.last_hidden_state
    return out if update.projection is None else out @ update.projection.mT


def tensors_of(update: Shadow) -> dict[str, Tensor]:
    """Return the side network's tensors, keyed by name."""
    sizes = [prod(shape) for shape in update.parts.values()]
    network: Any = update.network
    pieces = zip(update.parts.items(), network.split(sizes), strict=True)
    return {name: piece.reshape(shape) for (name, shape), piece in pieces}


def _body(model: nn.Module) -> nn.Module:
    """Return the part of a transformers model that contains its blocks: the model without its head, or its decoder."""
    inner_model: Any = getattr(model, "base_model", model)
    body = (
        inner_model
        if hasattr(inner_model, "layers") or hasattr(inner_model, "h")
        else getattr(inner_model, "decoder", None)
    )
    if body is None or not hasattr(body, "config") or "inputs_embeds" not in inspect.signature(body.forward).parameters:
        why = f"a side network for a {type(model).__name__} cannot be built"
        raise Unsupported(why, cure="Use Shadow with a decoder of transformers")
    found_body: nn.Module = body
    return found_body


EMBEDDINGS = "embed_tokens.weight"
"""The name of the embedding weight in a side network. If the network uses the base's embedding, the update has no
tensor of this name."""


# The recorder.


TOKENS: Final = "input_ids"
FIRST_PASS: Final = "hidden_states"
SHADOW: Final = "shadow"
"""These three constants are names of inputs. The recorder computes these inputs from the call's arguments; see
`OutputUpdate`."""


class KeyValueCache(Protocol):
    """A cache of past keys and values, as in transformers."""

    def get_seq_length(self) -> int: ...


class Recording(threading.local):
    """The inputs that one thread recorded in its current call, and this thread's side networks.

    Threads cannot share side networks, because functional_call replaces a network's parameters during a call.
    """

    def __init__(self) -> None:
        self.words: Mapping[str, object] = {}
        self.networks: dict[Hashable, nn.Module] = {}

    def __deepcopy__(self, memo: dict[int, object]) -> Recording:
        return Recording()

    def __reduce__(self) -> tuple[type[Recording], tuple[()]]:
        return Recording, ()


class CallRecorder:
    """Keep the inputs that one adapter's updates ask for, until the call ends (in training, until the next call)."""

    def __init__(self, switch: Switch, asks: Iterable[str]) -> None:
        self.switch, self.asks = switch, frozenset(asks)
        self.recording, self.last = Recording(), dict[str, object]()
        self.seen: Any = WeakKeyDictionary()

    def __getstate__(self) -> dict[str, object]:
        # A copy starts without recorded inputs, because the recorded inputs belong to calls of the original model.
        return {**self.__dict__, "seen": None, "last": {}}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state, seen=WeakKeyDictionary())

    def take(self) -> dict[str, object]:
        """Return the recorded inputs of the current call."""
        words = self.recording.words
        if not words and not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
            # In a backward pass, return the last call's inputs, because the backward pass runs checkpointed blocks
            # again. On CUDA, it runs them in another thread.
            words = self.last
        return dict(words)

    def record(self, model: nn.Module, words: Mapping[str, object], first_pass: Callable[[], Tensor]) -> None:
        """Store the inputs that the updates ask for.

        Args:
            model: the model that is called.
            words: the call's arguments, keyed by name.
            first_pass: computes the last hidden state without the adapter.
        """
        heard = {name: words[name] for name in self.asks if words.get(name) is not None}
        if TOKENS in heard:
            heard[TOKENS] = self._with_earlier(cast("Tensor", heard[TOKENS]), cache_of(words))
        if FIRST_PASS in self.asks:
            with switched(self.switch, False):
                heard[FIRST_PASS] = first_pass()
        if SHADOW in self.asks:
            cache = cache_of(words)
            cached = cache is not None and cache.get_seq_length() > 0
            heard[SHADOW] = ShadowState(model, words, cached, self.recording.networks)
        self.recording.words = heard
        if model.training:
            self.last = heard

    def remember(self, cache: KeyValueCache | None) -> None:
        """Keep the call's token ids for later calls that continue with the same cache."""
        if cache is not None and TOKENS in self.recording.words:
            self.seen[cache] = self.recording.words[TOKENS]

    def _with_earlier(self, ids: Tensor, cache: KeyValueCache | None) -> Tensor:
        if cache is None or (earlier := self.seen.get(cache)) is None:
            return ids
        earlier = earlier[:, : int(cache.get_seq_length())]
        if len(earlier) != len(ids):
            why = f"the call has {len(ids)} rows, but the cache was filled with {len(earlier)}"
            raise ShapeMismatch(why, where=TOKENS, cure=f"Pass a batch of {len(earlier)} rows")
        return torch.cat((earlier.to(ids.device), ids), 1)


def words_of(model: nn.Module, update: Update) -> set[str]:
    """Return the names of an update's inputs: all required inputs, and each optional input that the forward accepts."""
    heard = set(getattr(update, "hears", ()))
    known = set(inspect.signature(model.forward).parameters) if heard else set()
    return {*getattr(update, "asks", ()), *(heard & known)}


def run_recorded(
    module: nn.Module, recorders: Sequence[CallRecorder], names: Sequence[str], forward: Callable[..., object],
    passes: bool, scope: Scope, args: Sequence[object], kwargs: Mapping[str, object],
) -> object:  # fmt: skip
    """Run the model's forward and record its arguments.

    Some arguments are only for the updates: the model's own forward does not accept them. `run_recorded` passes these
    arguments to `forward` only if `passes` is True. If the model has an active context update, `passes` must be True:
    `forward` then also runs the context update, which reads such arguments.
    """
    words = {**dict(zip(names, args, strict=False)), **kwargs}
    asked = {name for recorder in recorders for name in recorder.asks} - set(names)
    kept = kwargs if passes else {name: value for name, value in kwargs.items() if name not in asked}
    active = [recorder for recorder in recorders if recorder.switch.acts(scope)]
    try:
        for recorder in active:
            recorder.record(module, words, lambda: _first_pass(forward, words, args, kept))
        out = forward(*args, **kept)
        for recorder in active:
            recorder.remember(cache_of(words) or cache_of(out))
        return out
    finally:
        for recorder in active if not (module.training and torch.is_grad_enabled()) else ():
            recorder.recording.words = {}


def cache_of(words: object) -> KeyValueCache | None:
    """Return the cache in a call's arguments or in its output, or None if there is none."""
    caches = (words.get(name) if isinstance(words, Mapping) else getattr(words, name, None) for name in sorted(CACHES))
    cache: Any = next((each for each in caches if each is not None), None)
    return cache if hasattr(cache, "get_seq_length") else None


@torch.no_grad()
def _first_pass(
    forward: Callable[..., object], words: Mapping[str, object], args: Sequence[object], kwargs: Mapping[str, object]
) -> Tensor:
    """Return the last hidden state without the adapter."""
    if cache_of(words) is not None:
        cure = "Pass use_cache=False (in generate() too)"
        raise Unsupported(
            "the adapter runs a first pass over all tokens, but the call uses a cache of earlier tokens", cure=cure
        )
    out = forward(*args, **{**kwargs, "use_cache": False, "output_hidden_states": True, "return_dict": True})
    hidden = getattr(out, "hidden_states", None)
    if not hidden:
        cure = "Use a model that returns hidden_states, such as a transformers model"
        raise Unsupported("the model returns no hidden_states", cure=cure)
    last: Tensor = hidden[-1]
    return last
