"""Keep a model call's arguments for formulas: token ids, the tasks of rows, the hidden states without the adapter.

A recorder belongs to the model that an adapter was injected into. It keeps the arguments until the call ends. In
training, it keeps the arguments until the next call, because checkpointed blocks run again in the backward pass. An
argument for which the model's forward has no parameter is not passed to the model.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, Final, Protocol, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..core.updates import Update
from ..errors import ShapeMismatch, Unsupported
from .context import CACHES
from .scopes import Scope, Switch, switched
from .shadows import ShadowState

TOKENS: Final = "input_ids"
FIRST_PASS: Final = "hidden_states"
SHADOW: Final = "shadow"
"""The names of inputs that are not plain arguments of the call; see `OutputUpdate`."""


class KeyValueCache(Protocol):
    """A cache of past keys and values, as transformers has it."""

    def get_seq_length(self) -> int: ...


class Recording(threading.local):
    """The arguments of one thread's call, and the thread's Shadow networks.

    Threads cannot share the networks, because functional_call exchanges their parameters.
    """

    def __init__(self) -> None:
        self.words: Mapping[str, object] = {}
        self.networks: dict[Hashable, nn.Module] = {}

    def __deepcopy__(self, memo: dict[int, object]) -> Recording:
        return Recording()

    def __reduce__(self) -> tuple[type[Recording], tuple[()]]:
        return Recording, ()


class CallRecorder:
    """Keep the inputs that one adapter's updates ask for, until the call ends."""

    def __init__(self, switch: Switch, asks: Iterable[str]) -> None:
        self.switch, self.asks = switch, frozenset(asks)
        self.recording, self.last = Recording(), dict[str, object]()
        self.seen: Any = WeakKeyDictionary()

    def __getstate__(self) -> dict[str, object]:
        # A copy starts without the token ids of caches, because these ids belong to the original's calls in progress.
        return {**self.__dict__, "seen": None, "last": {}}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state, seen=WeakKeyDictionary())

    def take(self) -> dict[str, object]:
        """Return the inputs of the call in progress."""
        words = self.recording.words
        if not words and not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
            # In a backward pass, return the last call's inputs: a checkpointed block is run again during the pass (on
            # CUDA, in another thread).
            words = self.last
        return dict(words)

    def record(self, model: nn.Module, words: Mapping[str, object], first_pass: Callable[[], Tensor]) -> None:
        """Keep the arguments of a call that the updates ask for."""
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
        """Keep the token ids for later calls that continue with the cache."""
        if cache is not None and TOKENS in self.recording.words:
            self.seen[cache] = self.recording.words[TOKENS]

    def _with_earlier(self, ids: Tensor, cache: KeyValueCache | None) -> Tensor:
        if cache is None or (earlier := self.seen.get(cache)) is None:
            return ids
        earlier = earlier[:, : int(cache.get_seq_length())]
        if len(earlier) != len(ids):
            why = f"the call has {len(ids)} rows, but the cache was filled with {len(earlier)}"
            raise ShapeMismatch(why, where=TOKENS, cure="Continue with the number of rows that the cache has")
        return torch.cat((earlier.to(ids.device), ids), 1)


def words_of(model: nn.Module, update: Update) -> set[str]:
    """Return the call inputs that an update needs, and those it can use if the model's forward takes them."""
    heard = set(getattr(update, "hears", ()))
    known = set(inspect.signature(model.forward).parameters) if heard else set()
    return {*getattr(update, "asks", ()), *(heard & known)}


def run_recorded(
    module: nn.Module, recorders: Sequence[CallRecorder], names: Sequence[str], forward: Callable[..., object],
    passes: bool, scope: Scope, args: Sequence[object], kwargs: Mapping[str, object],
) -> object:  # fmt: skip
    """Run the model's forward and record its arguments.

    An argument that only the updates ask for is not passed on, unless `passes` is set because the model's context reads
    the argument.
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
    found = (words.get(name) if isinstance(words, Mapping) else getattr(words, name, None) for name in sorted(CACHES))
    cache: Any = next((each for each in found if each is not None), None)
    return cache if hasattr(cache, "get_seq_length") else None


@torch.no_grad()
def _first_pass(
    forward: Callable[..., object], words: Mapping[str, object], args: Sequence[object], kwargs: Mapping[str, object]
) -> Tensor:
    """Return the last hidden state without the adapter."""
    if cache_of(words) is not None:
        cure = "Pass use_cache=False (in generate() too)"
        raise Unsupported(
            "the adapter runs a first pass over all tokens, but the call continues with a cache", cure=cure
        )
    out = forward(*args, **{**kwargs, "use_cache": False, "output_hidden_states": True, "return_dict": True})
    hidden = getattr(out, "hidden_states", None)
    if not hidden:
        cure = "Use a model that returns them, such as one of transformers"
        raise Unsupported("the model returns no hidden_states", cure=cure)
    last: Tensor = hidden[-1]
    return last
