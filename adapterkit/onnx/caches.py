"""Describe the cache of a language model for the model's export: the tensors that each layer of the cache holds.

The tensors' sizes are read from the model's own cache after a first call. They are not read from the config, whose keys
for these sizes depend on the architecture. A layer of the cache may hold keys and values, states of convolutions and
recurrences, or both.

The graph's inputs for keys and values have the names that optimum uses, such as `past_key_values.N.key`. The inputs for
states have the names that transformers.js expects, for example in `Lfm2ForCausalLM`: `past_conv.N`, and `past_ssm.N` or
`past_recurrent.N`. If a layer has several states of one kind, the state's number follows: `past_conv.N.0`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ..errors import Unsupported, first_line
from .recurrences import RECURRENT, LastState, as_scans, kernels_of
from .tracing import quiet

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from .pretrained_types import Cache, PretrainedModel

KEY, VALUE, CONV = "key", "value", "conv"
"""Kinds of tensors that a cache holds, apart from recurrent states."""


@dataclass(frozen=True, slots=True)
class PastTensor:
    """A tensor of the cache. The exported graph has an input and an output for this tensor.

    Attributes:
        layer: the index of the layer.
        kind: `key`, `value`, `conv`, or the kind of a recurrent state, such as `ssm`.
        number: the state's index if the layer has several states of this kind; otherwise None.
        sizes: the shape without the batch axis, which is the first axis. The token axis has size 0.
        dtype: the dtype.
    """

    layer: int
    kind: str
    number: int | None
    sizes: tuple[int, ...]
    dtype: torch.dtype

    @property
    def grows(self) -> bool:
        """Whether the tensor has a token axis, which grows with each call."""
        return self.kind in (KEY, VALUE)

    @property
    def axes(self) -> dict[int, str]:
        """The names of the dynamic axes, by index.

        To create an empty cache, transformers.js looks for an axis with the name `batch_size`.
        """
        return {0: "batch_size", 2: "past"} if self.grows else {0: "batch_size"}

    def name(self, present: bool = False) -> str:
        """Return the name of this tensor's graph input, or of its graph output if `present`."""
        if self.grows:
            return f"{'present' if present else 'past_key_values'}.{self.layer}.{self.kind}"
        stem = f"{'present' if present else 'past'}_{self.kind}.{self.layer}"
        return stem if self.number is None else f"{stem}.{self.number}"

    def example(self, batch: int, past: int, rng: torch.Generator) -> Tensor:
        """Return an example of this tensor after `past` tokens: random values, or zeros if `past` is 0."""
        import torch

        sizes = [past if self.grows and at == 1 else size for at, size in enumerate(self.sizes)]
        # Use random numbers instead of zeros, so that the outputs depend on the past.
        drawn = torch.randn(batch, *sizes, generator=rng)
        return (drawn if past else torch.zeros_like(drawn)).to(self.dtype)


class Past:
    """Describes the cached tensors of a language model, and creates transformers caches that hold such tensors.

    Attributes:
        tensors: the tensors, in the order of the graph's inputs.
        last: the recurrent state that was last read from the cache.
        has_attention: whether any layer of the cache holds keys and values.
        has_states: whether any layer of the cache holds states of convolutions or recurrences.
    """

    def __init__(self, model: PretrainedModel, word: str, source: Path, given: Mapping[str, Tensor]) -> None:
        """Run the model once, and read its cache.

        Args:
            model: the model.
            word: the keyword with which the cache is passed to the model's `forward`.
            source: the model's folder, for error messages.
            given: the other arguments of the call.

        Raises:
            Unsupported: the model does not run with transformers' `DynamicCache`, keeps states outside of this cache,
                or leaves this cache empty.
        """
        import torch

        name, cure = type(model).__name__, "Export the torch model with adapterkit.onnx.export"
        kind: Any = import_module("transformers").DynamicCache
        # In old versions of transformers, a `DynamicCache` takes no config and holds no states.
        cache: Cache = kind(config=model.config) if "config" in inspect.signature(kind).parameters else kind()
        before = _attributes(model)
        try:
            with torch.no_grad(), quiet():
                model(**given, **{word: cache}, use_cache=True)
        except Exception as error:  # A model's own code may raise anything.
            why = f"a {name} cannot be run with transformers' DynamicCache ({first_line(error)})"
            raise Unsupported(why, path=source, cure=cure) from None
        outside = [where for where, tensor in _attributes(model).items() if before.get(where) is not tensor]
        if outside:
            why = f"a {name} keeps states outside of its cache, in {outside[0]}"
            raise Unsupported(why, path=source, where=outside[0], cure=cure)
        kinds = {kind for _, _, kind in kernels_of(model)}
        self.layers = list(cache.layers)
        self.tensors = tuple(_tensors(self.layers, kinds.pop() if len(kinds) == 1 else RECURRENT))
        if not self.tensors:
            raise Unsupported(f"a {name} does not keep its past in transformers' DynamicCache", path=source, cure=cure)
        self.last = LastState()
        self.has_attention = any(one.grows for one in self.tensors)
        self.has_states = not all(one.grows for one in self.tensors)

    def names(self, present: bool = False) -> list[str]:
        """Return the names of the tensors' graph inputs, or of their graph outputs if `present`."""
        return [one.name(present) for one in self.tensors]

    def axes(self) -> list[dict[int, str]]:
        """Return the dynamic axes of each tensor."""
        return [one.axes for one in self.tensors]

    def example(self, batch: int, past: int, rng: torch.Generator) -> list[Tensor]:
        """Return an example of each tensor; see `PastTensor.example`."""
        return [one.example(batch, past, rng) for one in self.tensors]

    def cache(self, tensors: Sequence[Tensor] | None, *, first: bool = False) -> Cache:
        """Return a cache that holds `tensors`, or an empty cache if `tensors` is None.

        Args:
            tensors: the tensors, in the order of the graph's inputs.
            first: True to make the cache report that it is empty. Some models use the token types to let image tokens
                attend to each other, and read these types only while the cache is empty. With True, the exported graph
                of such a model reads the token types in every call. In calls after the first, the token types do not
                change the result, because new tokens may attend to all earlier tokens anyway.
        """
        empty: Any = import_module("transformers").DynamicCache
        cache: Any = (type("FirstCache", (empty,), {"is_initialized": False}) if first else empty)()
        if tensors is None and not self.has_states:
            return cast("Cache", cache)
        library: Any = import_module("transformers.cache_utils")
        by_layer: dict[int, dict[tuple[str, int], Tensor]] = {}
        for one, tensor in zip(self.tensors, tensors or (), strict=tensors is not None):
            by_layer.setdefault(one.layer, {})[one.kind, one.number or 0] = tensor
        cache.layers = [
            _layer(layer, by_layer.get(at, {}), library) for at, layer in enumerate(self.layers)
        ]  # fmt: skip
        cache.layer_class_to_replicate = None
        if self.has_states:
            cache.get_recurrent_state = _heard(cache.get_recurrent_state, self.last)
        return cast("Cache", cache)

    def mask(self, mask: Tensor, length: int) -> Tensor:
        """Return the mask to pass to the model.

        This is the whole mask, for past and new tokens, if any layer has attention. Otherwise, it is the mask's last
        `length` columns, for the new tokens.

        Models without any attention multiply the mask by the hidden states, which exist only for the new tokens. If
        only some layers have attention, transformers itself cuts the mask for the other layers.
        """
        return mask if self.has_attention else mask[:, mask.shape[1] - length :]

    def scans(self, model: PretrainedModel) -> AbstractContextManager[None]:
        """Return a context in which the model's recurrences can be traced for any number of tokens."""
        return as_scans(model, self.last) if self.has_states else nullcontext()

    def tensors_of(self, cache: Any) -> list[Tensor]:
        """Return the tensors that a cache holds, in the order of the graph's outputs."""
        return [_tensor_of(cache.layers[one.layer], one) for one in self.tensors]


def _attributes(model: PretrainedModel) -> dict[str, Tensor]:
    """Return a map from paths to the tensors that are plain attributes of modules: no parameters and no buffers."""
    import torch

    return {
        f"{path}.{name}".lstrip("."): value
        for path, part in model.named_modules()
        for name, value in vars(part).items()
        if isinstance(value, torch.Tensor)
    }


def _heard(read: Callable[..., Tensor | None], last: LastState) -> Callable[..., Tensor | None]:
    """Return a function that calls `read`, and also stores the state that `read` returns in `last`."""

    def get_recurrent_state(*args: object, **kwargs: object) -> Tensor | None:
        state = read(*args, **kwargs)
        last.read(state)
        return state

    return get_recurrent_state


def _tensors(layers: Sequence[Any], recurrent: str) -> list[PastTensor]:
    tensors: list[PastTensor] = []
    for at, layer in enumerate(layers):
        for kind in (KEY, VALUE):
            tensor = getattr(layer, f"{kind}s", None)
            if tensor is not None:
                heads, _, width = tensor.shape[1:]
                tensors.append(PastTensor(at, kind, None, (heads, 0, width), tensor.dtype))
        for kind, word in ((CONV, "conv_states"), (recurrent, "recurrent_states")):
            states = {n: state for n, state in getattr(layer, word, {}).items() if state is not None}
            tensors += [
                PastTensor(at, kind, n if len(states) > 1 else None, tuple(state.shape[1:]), state.dtype)
                for n, state in states.items()
            ]
    return tensors


def _layer(like: Any, tensors: Mapping[tuple[str, int], Tensor], library: Any) -> Any:
    """Return a new cache layer that holds the tensors and replaces the layer `like`.

    If `like` has a sliding window, the new layer keeps all keys and values, because the model's mask hides the tokens
    before the window.
    """
    states = hasattr(like, "conv_states")
    if getattr(like, "keys", None) is None and not states:
        return type(like)()  # This layer has no past, or it uses the keys and values of another layer.
    both = states and getattr(like, "keys", None) is not None
    if not states:
        layer = library.DynamicLayer()
    else:
        kind = library.LinearAttentionAndFullAttentionLayer if both else library.LinearAttentionLayer
        layer = kind(number_of_states=like.number_of_states)
    if (KEY, 0) in tensors:
        layer.update(tensors[KEY, 0], tensors[VALUE, 0])
    for (kind, number), tensor in tensors.items():
        if kind in (KEY, VALUE):
            continue
        word = "conv_states" if kind == CONV else "recurrent_states"
        state = tensor.clone()  # A layer overwrites its states, but a graph must not overwrite its inputs.
        getattr(layer, word)[number] = state
        getattr(layer, f"is_{word}_initialized")[number] = True
        layer.has_previous_state[number] = True
        layer.dtype, layer.device = state.dtype, state.device
        if kind == CONV:
            layer.conv_kernel_size[number] = like.conv_kernel_size[number]
    return layer


def _tensor_of(layer: Any, one: PastTensor) -> Tensor:
    if one.grows:
        return getattr(layer, f"{one.kind}s")  # type: ignore[no-any-return]
    return getattr(layer, "conv_states" if one.kind == CONV else "recurrent_states")[one.number or 0]  # type: ignore[no-any-return]
