"""Find the attention modules, the token embedding, the sizes and the wrappers of a transformers model."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..core.adapter import Adapter
from ..errors import Unsupported

LLAMA = {"q_proj", "k_proj", "v_proj", "o_proj"}
GPT2 = {"c_attn", "c_proj", "attn_dropout", "resid_dropout"}
"""The names of the child modules in an attention module like Llama's (`LLAMA`) and in one like GPT-2's (`GPT2`).

An attention module with other child modules is refused, because it may compute something else.
"""


class HeadSizes(ABC):
    """Apply the projections of an attention module.

    Attributes:
        width: the number of features of the module's input.
    """

    width: int

    def __init__(self, module: nn.Module) -> None:
        attention: Any = module
        self.module, self.d = attention, int(attention.head_dim)

    def _heads(self, x: Tensor) -> Tensor:
        return x.reshape((*x.shape[:-1], -1, self.d))

    @abstractmethod
    def queries(self, x: Tensor, words: Mapping[str, object]) -> Tensor:
        """Return the queries `[batch, heads, m, d]` of an input `[batch, m, width]`, with rotary positions applied.

        `words` holds the keyword arguments that the model passes to the attention module. Models with rotary positions
        pass the positions' cosines and sines as the argument `position_embeddings`.
        """

    @abstractmethod
    def keys_values(self, P: Tensor) -> tuple[Tensor, Tensor]:
        """Return the keys and values, each `[heads, n, d]`, of a prompt `[n, width]`, without rotary positions."""

    @abstractmethod
    def mixed(self, h: Tensor) -> Tensor:
        """Apply the output projection, without its bias, to the concatenated heads `[batch, m, heads * d]`."""


class Separate(HeadSizes):
    """The projections of Llama: `q_proj`, `k_proj`, `v_proj`, `o_proj`.

    Rotary positions, if the model has them, rotate feature i of a head together with feature i + d / 2.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.width = self.module.q_proj.in_features

    def queries(self, x: Tensor, words: Mapping[str, object]) -> Tensor:
        q: Tensor = self._heads(self.module.q_proj(x)).transpose(1, 2)
        angles: Any = words.get("position_embeddings")
        if angles is None:
            return q
        cos, sin = (each.unsqueeze(1) for each in angles)
        if cos.shape[-1] != self.d:
            raise Unsupported("rotary positions apply to only some of a head's features", cure="Use a model like Llama")
        first, second = q.chunk(2, -1)
        turned: Tensor = q * cos + torch.cat((-second, first), -1) * sin
        return turned

    def keys_values(self, P: Tensor) -> tuple[Tensor, Tensor]:
        k, v = (self._heads(p(P)).transpose(0, 1) for p in (self.module.k_proj, self.module.v_proj))
        groups = self.module.q_proj.out_features // self.module.k_proj.out_features
        return k.repeat_interleave(groups, 0), v.repeat_interleave(groups, 0)

    def mixed(self, h: Tensor) -> Tensor:
        return _without_bias(self.module.o_proj, h)


class Fused(HeadSizes):
    """The projections of GPT-2: `c_attn` for queries, keys and values, and `c_proj` for the output."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.width = self.module.embed_dim

    def queries(self, x: Tensor, words: Mapping[str, object]) -> Tensor:
        q: Tensor = self.module.c_attn(x).chunk(3, -1)[0]
        return self._heads(q).transpose(1, 2)

    def keys_values(self, P: Tensor) -> tuple[Tensor, Tensor]:
        _, k, v = (self._heads(each).transpose(0, 1) for each in self.module.c_attn(P).chunk(3, -1))
        return k, v

    def mixed(self, h: Tensor) -> Tensor:
        return _without_bias(self.module.c_proj, h)


def heads_of(module: nn.Module) -> HeadSizes:
    """Return an object that applies the projections of an attention module: queries, keys and values, and output.

    Raises:
        Unsupported: the attention module is not like Llama's or GPT-2's.
    """
    children = {name for name, _ in module.named_children()}
    if children == LLAMA and hasattr(module, "head_dim"):
        return Separate(module)
    if children == GPT2 and hasattr(module, "head_dim"):
        return Fused(module)
    why = f"a {type(module).__name__} is not an attention like Llama's or GPT-2's"
    raise Unsupported(why, cure="Target the attention modules of a model that is built like Llama or GPT-2")


def _without_bias(module: nn.Module, h: Tensor) -> Tensor:
    layer: Any = module
    y: Tensor = layer(h)
    if layer.bias is None:
        return y
    # Between two forwards, the bias may be on the meta device (accelerate's offloading) or in 8 bits (diffusers'
    # casting). In both cases, run the layer on zeros: the layer's output is then the bias.
    at_hand = not layer.bias.is_meta and layer.bias.dtype.itemsize > 1
    bias: Tensor = layer.bias if at_hand else layer(h.new_zeros(1, h.shape[-1]))
    return y - bias


def is_encoder_decoder(module: nn.Module) -> bool:
    """Whether a model has an encoder with its own input."""
    return bool(getattr(getattr(module, "config", None), "is_encoder_decoder", False)) and hasattr(
        module, "get_encoder"
    )


def sizes_of(module: nn.Module) -> dict[str, int]:
    """Return the sizes of a model's past keys and values: the number of `layers` and `heads`, and the head width `d`.

    For an encoder-decoder model, these are the decoder's sizes. Sizes that are not in the config are omitted.
    """
    config: Any = getattr(module, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config(decoder=True)
    queries, heads = _first(config, "num_attention_heads"), _first(config, "num_key_value_heads", "num_attention_heads")
    d, width = _first(config, "head_dim", "d_kv"), _first(config, "hidden_size")
    d = width // queries if not d and width and queries else d
    sizes = {"layers": _first(config, "num_decoder_layers", "decoder_layers", "num_hidden_layers"), "heads": heads}
    return {name: size for name, size in {**sizes, "d": d}.items() if size}


def _first(config: object, *names: str) -> int:
    return next((value for name in names if isinstance(value := getattr(config, name, None), int)), 0)


def embedding_of(module: nn.Module) -> nn.Module:
    """Return the module that turns a model's token ids into embeddings.

    Raises:
        Unsupported: the model has no `get_input_embeddings()` that returns a module with a weight.
    """
    model: Any = module
    embedding = model.get_input_embeddings() if hasattr(module, "get_input_embeddings") else None
    if not isinstance(embedding, nn.Module) or not isinstance(getattr(embedding, "weight", None), Tensor):
        why = f"a {type(module).__name__} has no get_input_embeddings() that returns a module with a weight"
        raise Unsupported(why, cure="Define get_input_embeddings() on the model, and return the token embedding")
    return embedding


HEADS = ("num_key_value_heads", "num_heads", "num_attention_heads", "n_heads")
WIDTHS = ("head_dim", "attention_head_size", "key_value_proj_dim")
"""Attributes in which an attention module may store its number of key heads (`HEADS`) or its head width (`WIDTHS`)."""


def is_attention(module: nn.Module) -> bool:
    """Whether a module is an attention module that runs one of transformers' `ALL_ATTENTION_FUNCTIONS`.

    The setting `attn_implementation` in the module's config selects the function.
    """
    has_words = all(hasattr(module, name) for name in ("config", "is_causal", "scaling"))
    return has_words and hasattr(sys.modules[type(module).__module__], "ALL_ATTENTION_FUNCTIONS")


def key_sizes(module: nn.Module) -> dict[str, int]:
    """Return an attention module's known sizes: the number of key `heads`, the head width `d`, the input's `width`."""
    config = module.config
    grouped = getattr(config, HEADS[0], None)
    heads = grouped or next((value for name in HEADS if (value := getattr(module, name, None))), None)
    d = next((value for name in WIDTHS if (value := getattr(module, name, None))), None)
    sizes = {"heads": heads, "d": d, "width": getattr(config, "hidden_size", None)}
    return {name: int(size) for name, size in sizes.items() if size}


def positions_of(model: nn.Module, path: str) -> nn.Module | None:
    """Return the attention module that stores the table `relative_attention_bias` for the attention module at `path`.

    In T5, the first attention module of the encoder or decoder stores this table. Return None if the attention module
    at `path` uses no relative positions.
    """
    if not hasattr(model.get_submodule(path), "has_relative_attention_bias"):
        return None
    tables = {name: m for name, m in model.named_modules() if getattr(m, "has_relative_attention_bias", False)}
    return max(tables.items(), key=lambda item: _shared(item[0], path), default=("", None))[1]


def _shared(one: str, other: str) -> int:
    """Return how many leading names two dotted paths have in common."""
    pairs = zip(one.split("."), other.split("."), strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(one.count("."), other.count(".")) + 1)


# Convert between a module's path in the plain base and its path in a wrapped model.
#
# torch.compile, DDP, FSDP1, checkpoint wrappers, PEFT and sentence-transformers add names to the path of a module.
# Adapter files contain the paths of the plain base.


_ALWAYS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
"""Names of attributes that hold a wrapped module. Only torch's wrappers use these names."""

_PARALLEL = ("DistributedDataParallel", "DataParallel", "FullyShardedDataParallel", "DeepSpeedEngine", "AveragedModel")
"""Wrapper classes that hold the wrapped model in the attribute `module`."""

_LIBRARIES = {
    "composer": ("model",),
    "ema_pytorch": ("ema_model", "online_model"),
    "lightning": ("_forward_module", "_original_module"),  # Lightning Fabric's wrapper.
    "lightning_fabric": ("_forward_module", "_original_module"),
    "peft": ("base_model", "model", "base_layer"),
    "sentence_transformers": ("auto_model", "model", "0"),  # `model` since version 5 of the library.
    "trl": ("pretrained_model",),  # Models with a value head.
}
"""A map from each library to the attributes in which the library's wrappers hold the wrapped module."""


def unwrapped(model: nn.Module, path: str) -> str:
    """Return the dotted path of a module or parameter, without the names that wrappers add to it.

    Args:
        model: the model that the path starts at.
        path: the path, as in `named_modules()` or `named_parameters()`.
    """
    kept: list[str] = []
    module: nn.Module | None = model
    for name in path.split(".") if path else ():
        if module is None or not _wraps(module, name):
            kept.append(name)
        module = module._modules.get(name) if module is not None else None  # None if the name is that of a parameter.
    return ".".join(kept)


def wrapped(model: nn.Module, adapter: Adapter) -> Adapter:
    """Return the adapter with its targets' paths replaced by the paths in the wrapped model."""
    renamed = {}
    for path, module in model.named_modules(remove_duplicate=False):
        plain = unwrapped(model, path)
        if plain != path:
            # A wrapper and its wrapped module have the same plain path. Keep the innermost module, which comes last.
            renamed[plain] = path
            renamed |= {f"{plain}.{name}".lstrip("."): f"{path}.{name}" for name in module._parameters}
    renamed.pop("", None)
    if not any(target.path in renamed for target in adapter.updates):
        return adapter
    updates = {replace(t, path=renamed.get(t.path, t.path)): group for t, group in adapter.updates.items()}
    return adapter.replace(updates=updates)


def _wraps(module: nn.Module, name: str) -> bool:
    """Whether a module is a wrapper that holds the wrapped module as its child `name`."""
    if name in _ALWAYS:
        return True
    kinds = type(module).__mro__
    if name == "module" and any(kind.__name__ in _PARALLEL for kind in kinds):
        return True
    libraries = {kind.__module__.partition(".")[0] for kind in kinds}
    return any(library in libraries and name in names for library, names in _LIBRARIES.items())
