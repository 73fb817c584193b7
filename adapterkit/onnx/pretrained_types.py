"""Protocols for the models, configs and caches of transformers, with only the attributes that an export uses."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor, nn


class ModelConfig(Protocol):
    """A transformers config. `__getattr__` accepts any name, because the attributes depend on the architecture."""

    model_type: str

    def get_text_config(self) -> ModelConfig: ...

    def __getattr__(self, name: str) -> Any: ...


class PretrainedOutput(Protocol):
    """The outputs of a transformers model, by name."""

    logits: Tensor
    last_hidden_state: Tensor

    def __getitem__(self, name: str) -> Tensor: ...

    def get(self, name: str) -> object: ...


class CacheLayer(Protocol):
    """The cached keys and values of one layer."""

    keys: Tensor
    values: Tensor


class Cache(Protocol):
    """A transformers cache. All attributes except `layers` exist only if the cache is an `EncoderDecoderCache`."""

    layers: Sequence[CacheLayer]
    self_attention_cache: Cache
    cross_attention_cache: Cache
    is_updated: dict[int, bool]


class PretrainedModel(Protocol):
    """The attributes of transformers' `PreTrainedModel` that an export uses."""

    config: ModelConfig
    main_input_name: str

    @property
    def forward(self) -> Callable[..., object]: ...

    def __call__(self, *args: object, **kwargs: object) -> PretrainedOutput: ...

    def parameters(self) -> Iterator[Tensor]: ...

    def modules(self) -> Iterator[nn.Module]: ...

    def named_modules(self) -> Iterator[tuple[str, nn.Module]]: ...

    def get_encoder(self) -> Callable[..., PretrainedOutput]: ...

    def get_input_embeddings(self) -> nn.Embedding: ...

    def get_image_features(self, *, pixel_values: Tensor) -> object: ...

    def prepare_inputs_for_generation(self, ids: Tensor, **given: object) -> dict[str, Any]: ...

    def set_attn_implementation(self, name: str) -> None: ...
