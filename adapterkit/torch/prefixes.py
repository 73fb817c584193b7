"""Prefixes of single attentions, in any model family: keys and values in front of those that the attention computes.

transformers' attentions pass queries, keys and values to a function that their config names. While an attention with a
prefix runs, its config names another function, which puts the prefix in front and calls the original function. The
cache never contains the prefix, and positions are counted without it.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..core.updates import ContextUpdate
from ..errors import ShapeMismatch, Unsupported
from .layers import moved

NAME = "adapterkit_prefix"
"""The name, in a config, of the function that puts prefixes first."""

KNOWN = ("eager", "sdpa")
"""The original attention functions that can be called with a prefix."""

_EXCHANGING = threading.Lock()
"""Lock held while the config of an attention is exchanged."""

HEADS = ("num_key_value_heads", "num_heads", "num_attention_heads", "n_heads")
WIDTHS = ("head_dim", "attention_head_size", "key_value_proj_dim")
"""The names, in attentions, of the number of heads of the keys, and of the width of a head."""


class Prefix(threading.local):
    """The prefix `[batch, 2, heads, n, d]` of an attention in one thread.

    `biased` is the attention with T5's table of relative positions.
    """

    def __init__(self) -> None:  # Set in each thread, because torch.compile guards only attributes of the instance.
        self.past: Tensor | None = None
        self.biased: nn.Module | None = None


class AttentionConfig(Protocol):
    """An attention's config, which names the function that computes it."""

    @property
    def _attn_implementation(self) -> str: ...


class Prefixed:
    """An attention's config while threads run it with their own prefixes; other threads see the original config."""

    def __init__(self, config: AttentionConfig) -> None:
        self.config, self.prefix, self.users = config, Prefix(), 0

    @property
    def _attn_implementation(self) -> str:
        return self.config._attn_implementation if self.prefix.past is None else NAME

    def __getattr__(self, name: str) -> object:
        found: object = getattr(self.config, name)
        return found


def is_attention(module: nn.Module) -> bool:
    """Whether a module passes keys and values to the function that its config names."""
    own = all(hasattr(module, name) for name in ("config", "is_causal", "scaling"))
    return own and hasattr(sys.modules[type(module).__module__], "ALL_ATTENTION_FUNCTIONS")


def key_sizes(module: nn.Module) -> dict[str, int]:
    """Return `heads` and `d` of an attention's keys, and the `width` of its input, as far as they are known."""
    config = module.config
    grouped = getattr(config, HEADS[0], None)
    heads = grouped or next((value for name in HEADS if (value := getattr(module, name, None))), None)
    d = next((value for name in WIDTHS if (value := getattr(module, name, None))), None)
    found = {"heads": heads, "d": d, "width": getattr(config, "hidden_size", None)}
    return {name: int(size) for name, size in found.items() if size}


def positions_of(model: nn.Module, path: str) -> nn.Module | None:
    """Return the attention with the relative positions that the attention at `path` uses: in T5, the first one."""
    if not hasattr(model.get_submodule(path), "has_relative_attention_bias"):
        return None
    tables = {name: m for name, m in model.named_modules() if getattr(m, "has_relative_attention_bias", False)}
    return max(tables.items(), key=lambda item: _shared(item[0], path), default=("", None))[1]


def with_prefixes(
    module: nn.Module, updates: Sequence[ContextUpdate], biased: nn.Module | None, forward: Callable[..., object],
    words: Mapping[str, object],
) -> object:  # fmt: skip
    """Run an attention's forward with prefixes, the first update's in front.

    Raises:
        Unsupported: the attention is computed by a function that cannot take a prefix.
        ShapeMismatch: a prefix has another number of heads than the keys, or heads of another width.
    """
    x = words["hidden_states"]
    assert isinstance(x, Tensor)
    live: list[Any] = [moved(update, x.device, x.dtype) for update in updates]
    pasts: list[Tensor] = [update.prefix(x) for update in live]
    past = torch.cat([each.expand(len(x), *each.shape[1:]) for each in pasts], 3)
    cross = any(words.get(name) is not None for name in ("key_value_states", "encoder_hidden_states"))
    with _named(module, past, None if cross else biased):
        return forward(**words)


@contextmanager
def _named(module: nn.Module, past: Tensor, biased: nn.Module | None) -> Iterator[None]:
    from transformers import AttentionInterface

    with nullcontext() if torch.compiler.is_compiling() else _EXCHANGING:
        held: Any = module.config
        own = held if isinstance(held, Prefixed) else Prefixed(held)
        if own.config._attn_implementation not in KNOWN or getattr(module, "reorder_and_upcast_attn", False):
            why = f"an attention computed by {own.config._attn_implementation!r} cannot take a prefix"
            raise Unsupported(why, cure=f"Load the model with attn_implementation= one of {', '.join(KNOWN)}")
        AttentionInterface.register(NAME, _attend)
        module.__dict__["config"] = own
        own.users += 1
    own.prefix.past, own.prefix.biased = past, biased
    try:
        yield
    finally:
        own.prefix.past, own.prefix.biased = None, None
        with nullcontext() if torch.compiler.is_compiling() else _EXCHANGING:
            own.users -= 1
            if not own.users:
                module.__dict__["config"] = own.config


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **words: object
) -> tuple[Tensor, Tensor | None]:
    """Call the config's original function, with the prefix added to keys and values, and the mask extended."""
    own: Any = module.config
    past: Tensor = own.prefix.past
    made, found = ((each.shape[-3], each.shape[-1]) for each in (past, key))
    if made != found:
        why = f"the prefix has {made[0]} heads of width {made[1]}, but the keys have {found[0]} of width {found[1]}"
        raise ShapeMismatch(why, cure="Is this the base that the adapter was trained on?")
    mask = _mask(module, query, key, attention_mask, words)
    n = past.shape[3]
    bias = words.get("position_bias")
    if isinstance(bias, Tensor):
        words["position_bias"] = _bias(own.prefix.biased, bias, n)
    keys, values = (torch.cat((past[:, i], each), 2) for i, each in enumerate((key, value)))
    before = _function(module, own.config._attn_implementation)
    return before(module, query, keys, values, _padded(mask, n), **words)


def _function(module: nn.Module, name: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    found: Any = sys.modules[type(module).__module__]
    function: Callable[..., tuple[Tensor, Tensor | None]] = found.ALL_ATTENTION_FUNCTIONS.get_interface(
        name, getattr(found, "eager_attention_forward", None)
    )
    return function


def _mask(
    module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None, words: Mapping[str, object]
) -> Tensor | None:
    """Return the mask without the prefix; if sdpa would build a causal mask from the shapes, build it here."""
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.ndim != 4:
            raise Unsupported(
                "a prefix needs a mask of shape [batch, 1, queries, keys]",
                cure="Pass no mask, or a mask [batch, tokens]",
            )
        return mask
    causal, count, total = words.get("is_causal"), query.shape[2], key.shape[2]
    causal = getattr(module, "is_causal", True) if causal is None else causal
    own: Any = module.config
    if not causal or count == 1 or own.config._attn_implementation == "eager":
        return None
    return torch.ones(1, 1, count, total, dtype=torch.bool, device=query.device).tril(total - count)


def _padded(mask: Tensor | None, n: int) -> Tensor | None:
    """Return a mask with n more positions in front, which all queries can see."""
    if mask is None:
        return None
    shape = (*mask.shape[:-1], n)
    seen = mask.new_ones(shape) if mask.dtype == torch.bool else mask.new_zeros(shape)
    return torch.cat((seen, mask), -1)


def _bias(biased: nn.Module | None, bias: Tensor, n: int) -> Tensor:
    """Return T5's bias of relative positions for the longer keys.

    As in AdapterHub's library, keys are counted from the start of the prefix, but queries are not. The bias of the
    prefix is 0 if there is no table, as in attention to an encoder.
    """
    count, total = bias.shape[2:]
    if biased is None:
        return torch.cat((bias.new_zeros(*bias.shape[:3], n), bias), -1)
    attention: Any = biased
    table = attention.relative_attention_bias
    if table.weight.is_meta and not hasattr(table, "_hf_hook"):
        why = "a prefix needs the table of relative positions of another attention, which accelerate has offloaded"
        cure = "Offload without preload_module_classes="
        raise Unsupported(why, cure=cure)
    out: Tensor = attention.compute_bias(count, n + total, device=bias.device, past_seen_tokens=total - count)
    return out.to(bias.dtype)


def _shared(one: str, other: str) -> int:
    """Return how many names two paths share from the start."""
    pairs = zip(one.split("."), other.split("."), strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(one.count("."), other.count(".")) + 1)
