"""Run context updates in live models: virtual tokens, prefixes of keys and values, attention prompts, and new tokens.

For virtual tokens, the model's forward must accept `inputs_embeds`. For prefixes, the forward must accept a cache of
past keys and values. transformers' models accept both. Callers use the model as before, with token ids or embeddings,
including through `generate()`. The output also covers the virtual tokens: their logits come first. Virtual tokens are
added if a call has no cache or an empty cache. In later calls, the cache already contains the virtual tokens' keys and
values.

Callers pass arguments only for their own tokens. This file extends masks by ones, labels by -100 and token types by 0.
It shifts `position_ids` by the number of virtual tokens, plus the length of a prefix of the whole model. A prefix of a
single attention module (see below) does not shift `position_ids`, because its keys and values do not count as tokens
of the model.

If several adapters add virtual tokens, the tokens come in the order in which the adapters were attached. Prefixes come
before all virtual tokens. If a prompt was trained for several tasks, callers choose each row's task with `task_ids=`.
"""

from __future__ import annotations

import dataclasses
import inspect
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from torch import Tensor, nn

from ..core.adapter import Target
from ..core.updates import ContextUpdate, Update
from ..errors import USE_ITS_BASE, ShapeMismatch, Unsupported, UsageError
from .layers import moved
from .leaves import LiveUpdates, compute_dtype
from .scopes import Switch
from .structure import (
    embedding_of,
    heads_of,
    is_attention,
    is_encoder_decoder,
    key_sizes,
    positions_of,
    sizes_of,
)

if TYPE_CHECKING:
    from transformers import Cache

# Put a prefix (more keys and values) in front of the keys and values of a single attention module, in any model family.
#
# transformers' attention modules pass queries, keys and values to a function that their config names. While an
# attention module with a prefix runs, its config names `_attend` instead. `_attend` puts the prefix in front of the
# keys and values, and calls the original function. The cache never contains the prefix, and the prefix does not shift
# `position_ids`. T5 has no `position_ids`; `_bias` extends its position bias for the prefix.


NAME = "adapterkit_prefix"
"""The name of `_attend` in configs and in transformers' registry of attention functions."""

KNOWN = ("eager", "sdpa")
"""The names of transformers' attention functions that `_attend` can call with a prefix."""

_EXCHANGING = threading.Lock()
"""Lock held while the config of an attention module is replaced."""


class PrefixState(threading.local):
    """The prefix of an attention module in one thread.

    `past` is the prefix `[batch, 2, heads, n, d]`, or None while the attention module does not run. `biased` is the T5
    attention module whose table of relative positions is used, or None if there is no such table.
    """

    # Set `past` and `biased` on the instance, not on the class, because torch.compile guards only attributes of the
    # instance.
    def __init__(self) -> None:
        self.past: Tensor | None = None
        self.biased: nn.Module | None = None


class AttentionConfig(Protocol):
    """The config of an attention module. It names the function that computes the attention."""

    @property
    def _attn_implementation(self) -> str: ...


class Prefixed:
    """The config that an attention module has while at least one thread runs it with a prefix.

    In these threads, the config names `_attend`. In all other threads, it has the values of the original config.
    """

    def __init__(self, config: AttentionConfig) -> None:
        self.config, self.prefix, self.users = config, PrefixState(), 0

    @property
    def _attn_implementation(self) -> str:
        return self.config._attn_implementation if self.prefix.past is None else NAME

    def __getattr__(self, name: str) -> object:
        value: object = getattr(self.config, name)
        return value


def with_prefixes(
    module: nn.Module, updates: Sequence[ContextUpdate], biased: nn.Module | None, forward: Callable[..., object],
    words: Mapping[str, object],
) -> object:  # fmt: skip
    """Run an attention module's forward with the updates' prefixes in front of its keys and values.

    The prefixes come in the order of `updates`.

    Raises:
        Unsupported: the attention module uses a function that cannot take a prefix.
        ShapeMismatch: a prefix and the keys have different numbers of heads, or heads of different widths.
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
        config: Any = module.config
        prefixed = config if isinstance(config, Prefixed) else Prefixed(config)
        implementation = prefixed.config._attn_implementation
        if implementation not in KNOWN:
            why = f"an attention computed by {implementation!r} cannot take a prefix"
            raise Unsupported(why, cure=f"Load the model with attn_implementation= one of {', '.join(KNOWN)}")
        # GPT-2's option reorder_and_upcast_attn has no effect with 'sdpa'.
        if implementation == "eager" and getattr(module, "reorder_and_upcast_attn", False):
            why = "an attention with reorder_and_upcast_attn cannot take a prefix if it is computed by 'eager'"
            raise Unsupported(why, cure="Load the model with attn_implementation='sdpa'")
        AttentionInterface.register(NAME, _attend)
        module.__dict__["config"] = prefixed
        prefixed.users += 1
    prefixed.prefix.past, prefixed.prefix.biased = past, biased
    try:
        yield
    finally:
        prefixed.prefix.past, prefixed.prefix.biased = None, None
        with nullcontext() if torch.compiler.is_compiling() else _EXCHANGING:
            prefixed.users -= 1
            if not prefixed.users:
                module.__dict__["config"] = prefixed.config


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **words: object
) -> tuple[Tensor, Tensor | None]:
    """Put the prefix in front of keys and values, extend the mask, and call the model's own attention function."""
    prefixed: Any = module.config
    past: Tensor = prefixed.prefix.past
    past_sizes, key_sizes = ((each.shape[-3], each.shape[-1]) for each in (past, key))
    if past_sizes != key_sizes:
        of_keys = f"the keys have {key_sizes[0]} heads of width {key_sizes[1]}"
        why = f"the prefix has {past_sizes[0]} heads of width {past_sizes[1]}, but {of_keys}"
        raise ShapeMismatch(why, cure=USE_ITS_BASE)
    mask = _mask(module, query, key, attention_mask, words)
    n = past.shape[3]
    bias = words.get("position_bias")
    if isinstance(bias, Tensor):
        words["position_bias"] = _bias(prefixed.prefix.biased, bias, n)
    keys, values = (torch.cat((past[:, i], each), 2) for i, each in enumerate((key, value)))
    module_of: Any = sys.modules[type(module).__module__]
    eager = getattr(module_of, "eager_attention_forward", None)
    function: Callable[..., tuple[Tensor, Tensor | None]] = module_of.ALL_ATTENTION_FUNCTIONS.get_interface(
        prefixed.config._attn_implementation, eager
    )
    return function(module, query, keys, values, _padded(mask, n), **words)


def _mask(
    module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None, words: Mapping[str, object]
) -> Tensor | None:
    """Return the mask for the keys without the prefix.

    If there is no mask and sdpa would build a causal mask, build the causal mask here, because sdpa would count the
    prefix as tokens.
    """
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.ndim != 4:
            raise Unsupported(
                "an attention with a prefix needs a mask of shape [batch, 1, queries, keys]",
                cure="Call the model without attention_mask, or with one of shape [batch, tokens]",
            )
        return mask
    causal, count, total = words.get("is_causal"), query.shape[2], key.shape[2]
    causal = getattr(module, "is_causal", True) if causal is None else causal
    prefixed: Any = module.config
    if not causal or count == 1 or prefixed.config._attn_implementation == "eager":
        return None
    return torch.ones(1, 1, count, total, dtype=torch.bool, device=query.device).tril(total - count)


def _padded(mask: Tensor | None, n: int) -> Tensor | None:
    """Return the mask with `n` more keys in front. All queries can see these keys."""
    if mask is None:
        return None
    shape = (*mask.shape[:-1], n)
    seen = mask.new_ones(shape) if mask.dtype == torch.bool else mask.new_zeros(shape)
    return torch.cat((seen, mask), -1)


def _bias(biased: nn.Module | None, bias: Tensor, n: int) -> Tensor:
    """Return T5's position bias for all keys. The prefix's keys come first, then the attention module's own keys.

    As in AdapterHub's library, the prefix shifts the positions of keys, but not the positions of queries.
    Cross-attention has no table of relative positions (`biased` is None), so there the bias of the prefix is 0.
    """
    count, total = bias.shape[2:]
    if biased is None:
        return torch.cat((bias.new_zeros(*bias.shape[:3], n), bias), -1)
    attention: Any = biased
    table = attention.relative_attention_bias
    if table.weight.is_meta and not hasattr(table, "_hf_hook"):
        why = "a prefix needs another attention's table of relative positions, but accelerate has offloaded this table"
        cure = "Offload the model without preload_module_classes="
        raise Unsupported(why, cure=cure)
    out: Tensor = attention.compute_bias(count, n + total, device=bias.device, past_seen_tokens=total - count)
    return out.to(bias.dtype)


# Run context updates of all kinds, and add virtual tokens, or past keys and values, to the calls of a model.


CACHES = {"cache", "past_key_values"}
"""Names of the argument for past keys and values: `cache` since transformers 5.24, `past_key_values` before that."""


@dataclass(frozen=True, eq=False)
class ContextPart:
    """Context updates that are attached to one module.

    Attributes:
        switch: turns the adapter on and off.
        target: the target of the updates in the adapter.
        bound: the updates, with their tensors in the model.
        encoder: whether the target is an encoder-decoder model and the module is its encoder.
        masks: whether this part only extends the attention mask of a model. If so, a second part at an embedding inside
            the model adds the virtual tokens.
        biased: if the module is a T5 attention module, the attention module that stores the table of relative positions
            for it; None for other modules.
        tokens: if the module is an `nn.Embedding`, its number of rows when the adapter was attached. The ids of new
            tokens start at this number.
    """

    switch: Switch
    target: Target
    bound: LiveUpdates
    encoder: bool = False
    masks: bool = False
    biased: nn.Module | None = None
    tokens: int | None = None

    @property
    def updates(self) -> tuple[ContextUpdate, ...]:
        """The updates, with the tensors that the model holds now."""
        updates: Any = self.bound.running
        return cast("tuple[ContextUpdate, ...]", updates)


def surround(
    module: nn.Module, parts: Sequence[ContextPart], names: Sequence[str], forward: Callable[..., object],
    args: Sequence[object], kwargs: Mapping[str, object],
) -> object:  # fmt: skip
    """Run the module's forward with the parts' context added. `names` are the names of the forward's parameters."""
    words: Words = {**dict(zip(names, args, strict=False)), **kwargs}
    updates = [update for part in parts for update in part.updates]
    place = updates[0].place
    if place == "vocabulary":
        _check_tokens(module, parts)
        ids = words.pop(names[0])
        assert isinstance(ids, Tensor)
        return _with_tokens(module, updates, forward, ids, words)
    if is_attention(module):
        return _at_attention(module, updates, parts[0].biased, forward, words)
    if place == "embeddings" and not hasattr(module, "get_input_embeddings"):
        y = forward(**words)
        assert isinstance(y, Tensor)
        fronts = present([update.embeddings() for update in updates])
        return torch.cat((*(front.to(y).expand(len(y), *front.shape[-2:]) for front in fronts), y), 1)
    if any(part.masks for part in parts):
        forward = partial(_with_masks, [u for part in parts if part.masks for u in part.updates], forward)
        updates = [update for part in parts if not part.masks for update in part.updates]
        if not updates:
            return forward(**words)
    if any(part.encoder for part in parts):
        return forward(**encoder_words(module, updates, words))
    return ContextCall(module, updates, words, names).run(forward)


def parts_of(model: nn.Module, part: ContextPart) -> list[tuple[nn.Module, ContextPart]]:
    """Return pairs (module, variant of `part`). The caller attaches each variant to the module of its pair.

    If the target is an encoder-decoder model, and the updates add virtual tokens, the encoder also gets a variant.

    Raises:
        ShapeMismatch: the update's sizes differ from the model's.
        Unsupported: the context cannot be added to the target.
    """
    owner = _owner(model, part)
    if owner is not None:
        return _around(owner, model.get_submodule(part.target.path), part)
    module = _reader(model.get_submodule(part.target.path), part.updates)
    for update in part.updates:
        _check(module, part.target, update)
    if is_attention(module):
        return [(module, replace(part, biased=positions_of(model, part.target.path)))]
    parts_placed = [(module, replace(part, tokens=module.num_embeddings) if isinstance(module, nn.Embedding) else part)]
    if part.updates[0].place == "embeddings" and is_encoder_decoder(module):
        parts_placed.append((cast("Any", module).get_encoder(), replace(part, encoder=True)))
    return parts_placed


def _reader(module: nn.Module, updates: Sequence[ContextUpdate]) -> nn.Module:
    """Return the module that accepts the updates' context: `module` or its inner model (`base_model`).

    The inner model is used if the updates add past keys and values, but `module` (such as a classifier) accepts no
    cache.
    """
    inside = getattr(module, "base_model", None)
    takes = CACHES & set(inspect.signature(module.forward).parameters)
    return inside if isinstance(inside, nn.Module) and updates[0].place == "past" and not takes else module


def _owner(model: nn.Module, part: ContextPart) -> nn.Module | None:
    """Return the model that contains the target, if the updates put virtual tokens in front of the target's output.

    Return None if the target is itself a model, or if the updates add other context.
    """
    path, _, name = part.target.path.rpartition(".")
    module: Any = model.get_submodule(part.target.path)
    if part.updates[0].place != "embeddings" or hasattr(module, "get_input_embeddings"):
        return None
    owner = model.get_submodule(path)
    takes = "inputs_embeds" in inspect.signature(owner.forward).parameters and hasattr(owner, "get_input_embeddings")
    if not takes or not name or isinstance(module, nn.Dropout):
        kinds = f"the output of a {type(module).__name__} inside a {type(owner).__name__}"
        why = f"virtual tokens cannot be put in front of {kinds}"
        raise Unsupported(why, where=str(part.target), cure="Target the model itself, or its embeddings")
    return owner


def _around(owner: nn.Module, module: nn.Module, part: ContextPart) -> list[tuple[nn.Module, ContextPart]]:
    """Return pairs (module, variant of `part`) that together put virtual tokens in front of an embedding's output.

    If the embedding is the model's input embedding, the virtual tokens are put in front of the model's input instead.
    """
    config: Any = getattr(owner, "config", None)
    for update in part.updates:
        dim, wanted = update.dims()["dim"], getattr(config, "hidden_size", None)
        if wanted not in (None, dim):
            why = f"the update was made for embeddings of width {dim}, but the model's have {wanted}"
            raise ShapeMismatch(why, where=f"{part.target}: {update.method}", cure=USE_ITS_BASE)
    if embedding_of(owner) is module:
        return [(owner, part)]
    if getattr(config, "is_decoder", False):
        why = "virtual tokens cannot be put in front of a decoder's embeddings: its cache would not count the tokens"
        raise Unsupported(why, where=str(part.target), cure="Target the model itself")
    return [(module, part), (owner, replace(part, masks=True))]


def _with_masks(updates: Sequence[ContextUpdate], forward: Callable[..., object], **words: object) -> object:
    mask, extra = words.get("attention_mask"), sum(u.shape[-2] for u in present([u.embeddings() for u in updates]))
    if isinstance(mask, Tensor):
        words["attention_mask"] = extended(mask, extra, mask.shape[1] + extra)
    return forward(**words)


def _check_tokens(module: nn.Module, parts: Sequence[ContextPart]) -> None:
    """Check that an embedding still has the number of rows that it had when the adapter was attached.

    transformers' resize_token_embeddings changes the number of rows in place.

    Raises:
        ShapeMismatch: the number of rows changed, so the ids of the adapter's new tokens are no longer right.
    """
    rows, part = len(cast("Tensor", module.weight)), parts[0]
    if part.tokens is not None and rows != part.tokens:
        why = f"the ids of the adapter's new tokens start at {part.tokens}, but the embedding has {rows} rows now"
        cure = "Call handle.remove() before the embedding changes its size, and inject the adapter again afterwards"
        raise ShapeMismatch(why, where=f"{part.target}: {part.updates[0].method}", cure=cure)


def _with_tokens(
    module: nn.Module, updates: Sequence[ContextUpdate], forward: Callable[..., object], ids: Tensor, words: Words
) -> Tensor:
    """Return an embedding's output for token ids that may include the adapter's new tokens."""
    table: Any = module.weight
    more = torch.cat(present([update.vocabulary() for update in updates])).to(table)
    new = ids >= len(table)
    y = forward(torch.where(new, 0, ids), **words)
    assert isinstance(y, Tensor)
    return torch.where(new[..., None], more[torch.where(new, ids - len(table), 0)].to(y.dtype), y)


def _at_attention(
    module: nn.Module, updates: Sequence[ContextUpdate], biased: nn.Module | None, forward: Callable[..., object],
    words: Words,
) -> object:  # fmt: skip
    """Run an attention module with its prefixes, and apply its prompts to the output (see `_with_prompts`).

    `updates` contains the prefixes and the prompts.
    """
    prompts = [update for update in updates if update.place == "attention"]
    prefixes = [update for update in updates if update.place != "attention"]
    inner: Callable[..., object] = forward
    if prefixes:
        inner = lambda **words: with_prefixes(module, prefixes, biased, forward, words)  # noqa: E731
    return _with_prompts(module, prompts, inner, words) if prompts else inner(**words)


def _with_prompts(
    module: nn.Module, updates: Sequence[ContextUpdate], forward: Callable[..., object], words: Words
) -> object:
    """Run an attention module. Then let the same queries attend to each prompt, and add the results to the output."""
    heads, x = heads_of(module), words["hidden_states"]
    assert isinstance(x, Tensor)
    out = forward(**words)
    y = out[0] if isinstance(out, tuple) else out
    assert isinstance(y, Tensor)
    q = heads.queries(x, words)
    for update in updates:
        prompt: Any = update
        k, v = heads.keys_values(prompt.P.to(x.dtype))
        added = update.map(lambda leaf: leaf.to(x.dtype)).attention(q, k, v)  # type: ignore[union-attr]
        added = added.transpose(1, 2).flatten(2)
        y = y + (heads.mixed(added) if prompt.projected else added)
    return (y, *out[1:]) if isinstance(out, tuple) else y


def _check(module: nn.Module, target: Target, update: ContextUpdate) -> None:
    where = f"{target}: {update.method}"
    if update.place == "vocabulary":
        if not isinstance(module, nn.Embedding):
            why = f"new tokens cannot be added to a {type(module).__name__}"
            raise Unsupported(why, where=where, cure="Target an nn.Embedding")
        wanted = module.embedding_dim
    elif update.place == "attention":
        wanted = heads_of(module).width
    elif is_attention(module) or update.place == "prefix":
        _check_prefix(module, update, where)
        return
    else:
        wanted = _width(module, update, where)
    dims = update.dims()
    if dims.get("dim", wanted) != wanted:
        why = f"the update was made for embeddings of width {dims['dim']}, but the model's have {wanted}"
        raise ShapeMismatch(why, where=where, cure=USE_ITS_BASE)


def _check_prefix(module: nn.Module, update: ContextUpdate, where: str) -> None:
    """Check that `module` is an attention module, that the update is a prefix, and that the prefix fits the keys."""
    if not is_attention(module) or update.place not in ("past", "prefix"):
        why = f"{update.method} cannot be applied to a {type(module).__name__}"
        cure = "Target an attention if the update is a prefix, and a whole model otherwise"
        raise Unsupported(why, where=where, cure=cure)
    dims = {"layers": 1, **update.dims()}
    gated = {"width": dims["width"]} if "gate" in update.tensors else {}
    for name, size in {"layers": 1, **key_sizes(module)}.items():
        has = {**dims, **gated}.get(name, size) if name != "width" else gated.get(name, size)
        if has != size:
            why = f"the prefix was made for {name}={has}, but the attention has {size}"
            raise ShapeMismatch(why, where=where, cure=USE_ITS_BASE)


def _width(module: nn.Module, update: ContextUpdate, where: str) -> int:
    """Check that a model supports the update, and return the width of the model's embeddings."""
    names = inspect.signature(module.forward).parameters
    needed = {"inputs_embeds"} if update.place == "embeddings" else CACHES
    if not needed & set(names):
        why = (
            f"{update.method} does not apply to a {type(module).__name__}, which takes no {' or '.join(sorted(needed))}"
        )
        cure = "Use a model that accepts one of these arguments, such as a transformers model"
        raise Unsupported(why, where=where, cure=cure)
    dims, sizes = update.dims(), sizes_of(module)
    for name, size in sizes.items():
        if update.place == "past" and dims[name] != size:
            why = f"the update was made for {name}={dims[name]}, but the model has {size}"
            raise ShapeMismatch(why, where=where, cure=USE_ITS_BASE)
    weight: Any = embedding_of(module).weight
    return int(weight.shape[1])


Words = dict[str, object]
"""Arguments of a call, keyed by name."""


def check_tasks(updates: Sequence[Update], tasks: object) -> None:
    """Check the task ids of a call. Without this check, the id -1 would select the last task.

    Raises:
        UsageError: a task id is not in the range from 0 to n - 1, where n is the number of tasks of an update.
    """
    if not isinstance(tasks, Tensor) or type(tasks) is not Tensor or tasks.is_meta or not tasks.numel():
        return
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return
    for update in updates:
        count: Any = update.dims().get("tasks")
        if count is not None and not (int(tasks.min()) >= 0 and int(tasks.max()) < count):
            why = f"an update has {count} tasks, but the call has the task ids {tasks.tolist()}"
            raise UsageError(why, where="task_ids", cure=f"Pass task ids from 0 to {count - 1}")


@dataclass(eq=False)
class ContextCall:
    """One call of a model. `run` adds virtual tokens, or past keys and values, to the call.

    Attributes:
        module: the model.
        updates: the updates, in the order in which they were attached.
        words: the arguments of the call, keyed by name; `run` changes this dict.
        names: the parameter names of the model's forward.
    """

    module: nn.Module
    updates: Sequence[ContextUpdate]
    words: Words
    names: Sequence[str]

    def __post_init__(self) -> None:
        self.pair = is_encoder_decoder(self.module)
        self.argument_prefix = "decoder_" if self.pair else ""
        self.cache_word = "cache" if "cache" in self.names else "past_key_values"
        if self.cache_word == "cache" and "past_key_values" in self.words:
            self.words["cache"] = self.words.pop("past_key_values")
        task = cast("int | Tensor | None", self.words.pop("task_ids", None))
        if self.pair and task is not None:
            raise Unsupported("an encoder-decoder model takes no task ids", cure="Set the update's `task` instead")
        check_tasks(self.updates, task)
        fronts = [u.decoder_embeddings(task) if self.pair else u.embeddings(task) for u in self.updates]
        self.fronts, self.pasts = present(fronts), present([update.past() for update in self.updates])
        self.front, self.past = (sum(t.shape[-2] for t in some) for some in (self.fronts, self.pasts))

    @property
    def seen(self) -> int:
        cache: Any = self.words.get(self.cache_word)
        return 0 if cache is None else int(cache.get_seq_length())

    def run(self, forward: Callable[..., object]) -> object:
        seen, given = self.seen, self.words.get(self.cache_word)
        if self.pair:
            self._extend_encoder_mask()
        if self.past or self.front:
            self._extend_decoder(seen)
        out: Any = forward(**self.words)
        if self.past and self.seen <= seen + self.past * (not seen):
            why = "the model did not use the past keys and values that the adapter added"
            raise Unsupported(why, cure="Use a model with a cache")
        # Return no cache to a caller that asked for none. Such a caller passes all tokens in every call, so the tokens
        # of a returned cache would be in the input twice.
        unwanted = self.past and given is None and self.words.get("use_cache") is False
        return (
            dataclasses.replace(out, **{self.cache_word: None}) if unwanted and hasattr(out, self.cache_word) else out
        )

    def _extend_decoder(self, seen: int) -> None:
        new = self._length()
        if not seen and self.front:
            self._put_in_front()
        if not seen and self.past:
            self._fill()
        extra = self.past + self.front
        mask = f"{self.argument_prefix}attention_mask"
        self.words[mask] = extended(self.words.get(mask), extra, seen + new + (0 if seen else extra))
        self._move_positions(seen, extra)
        self.words = {name: value for name, value in self.words.items() if value is not None}

    def _length(self) -> int:
        """Return the number of tokens that the caller passed, and set `self.batch` to the number of rows."""
        ids, embeds = (self.words.get(f"{self.argument_prefix}{name}") for name in ("input_ids", "inputs_embeds"))
        if ids is None and embeds is None and self.pair and self.words.get("labels") is not None:
            shifted: Any = self.module
            ids = shifted.prepare_decoder_input_ids_from_labels(labels=self.words["labels"])
            self.words["decoder_input_ids"] = ids
        tokens: Any = ids if embeds is None else embeds
        if tokens is None:
            raise Unsupported(
                "the call has no tokens",
                cure=f"Pass {self.argument_prefix}input_ids or {self.argument_prefix}inputs_embeds",
            )
        self.batch = int(tokens.shape[0])
        return int(tokens.shape[1])

    def _put_in_front(self) -> None:
        words, prefix = self.words, self.argument_prefix
        words[f"{prefix}inputs_embeds"] = _joined(self.module, self.fronts, words, prefix)
        words.pop(f"{prefix}input_ids", None)
        for name, value in (("labels", -100), ("token_type_ids", 0)):
            given: Any = words.get(name)
            if given is not None and given.ndim == 2:
                words[name] = torch.cat((given.new_full((len(given), self.front), value), given), 1)

    def _fill(self) -> None:
        """Put the updates' past keys and values into the call's cache; create a cache if the call has none."""
        cache: Any = self.words.get(self.cache_word)
        cache = _new_cache(self.pair) if cache is None else cache
        if getattr(cache, "is_compileable", False):
            cure = "Leave generate's cache_implementation at its default"
            raise Unsupported("a cache of fixed size has no room for a prefix", cure=cure)
        if self.module.training and any(getattr(m, "gradient_checkpointing", False) for m in self.module.modules()):
            raise Unsupported("gradient checkpointing discards the prefix", cure="Train without gradient checkpointing")
        trains = self.module.training and torch.is_grad_enabled()
        if trains and any(type(module).__name__ == "CheckpointWrapper" for module in self.module.modules()):
            why = "a block in a CheckpointWrapper runs again in the backward pass, and would extend the cache twice"
            raise Unsupported(why, cure="Train without activation checkpointing")
        device, dtype = self._met()
        past = torch.cat([past.to(device, dtype) for past in self.pasts], 3)
        for layer, (keys, values) in enumerate(past):
            into = getattr(cache, "self_attention_cache", cache)
            into.update(keys.expand(self.batch, *keys.shape), values.expand(self.batch, *values.shape), layer)
        self.words[self.cache_word] = cache

    def _met(self) -> tuple[torch.device, torch.dtype]:
        """Return the device and dtype of the input embeddings in this call.

        The embedding's weight may have another device and dtype. Between two forwards, it may be on the meta device
        (accelerate's offloading) or in 8 bits (diffusers' layerwise casting).
        """
        embeds: Any = self.words.get(f"{self.argument_prefix}inputs_embeds")
        if embeds is not None:
            return embeds.device, embeds.dtype
        embedding: Any = embedding_of(self.module)
        weight = embedding.weight
        tokens: Any = self.words[f"{self.argument_prefix}input_ids"] if weight.is_meta else weight
        return tokens.device, compute_dtype(embedding) or weight.dtype

    def _move_positions(self, seen: int, extra: int) -> None:
        name = f"{self.argument_prefix}position_ids"
        given: Any = self.words.get(name)
        if given is None:
            return
        moved = given + extra
        if not seen and self.front:
            virtual = torch.arange(self.past, extra, device=given.device, dtype=given.dtype)
            moved = torch.cat((virtual.expand(*given.shape[:-1], -1), moved), -1)
        self.words[name] = moved

    def _extend_encoder_mask(self) -> None:
        """Extend the mask for the encoder's output by the virtual tokens that the encoder's hook adds."""
        hidden: Any = self.words.get("encoder_outputs")
        tokens = [self.words.get(name) for name in ("inputs_embeds", "input_ids")]
        given: Any = next((each for each in tokens if each is not None), None)
        extra = sum(front.shape[-2] for front in present([update.embeddings() for update in self.updates]))
        if hidden is not None:
            total = hidden[0].shape[1]
        elif given is not None:
            total = given.shape[1] + extra
        else:
            return
        self.words["attention_mask"] = extended(self.words.get("attention_mask"), extra, total)


def encoder_words(module: nn.Module, updates: Sequence[ContextUpdate], words: Words) -> Words:
    """Return the arguments for an encoder, with virtual tokens in front of its input."""
    fronts = present([update.embeddings() for update in updates])
    given = words.get("inputs_embeds") if words.get("input_ids") is None else words.get("input_ids")
    if given is None:
        raise Unsupported("the call has no tokens", cure="Pass input_ids or inputs_embeds")
    extra = sum(front.shape[-2] for front in fronts)
    embeds = _joined(module, fronts, words, "")
    mask = extended(words.get("attention_mask"), extra, embeds.shape[1])
    rest = {name: value for name, value in words.items() if name != "input_ids"}
    return {**rest, "inputs_embeds": embeds, "attention_mask": mask}


def present(optional: Sequence[Tensor | None]) -> list[Tensor]:
    """Return the tensors that are not None."""
    return [each for each in optional if each is not None]


def _joined(module: nn.Module, fronts: Sequence[Tensor], words: Words, prefix: str) -> Tensor:
    """Return the virtual tokens followed by the embeddings of the input."""
    embeds: Any = words.get(f"{prefix}inputs_embeds")
    if embeds is None:
        embeds = embedding_of(module)(words[f"{prefix}input_ids"])
    rows = [front.to(embeds).expand(len(embeds), *front.shape[-2:]) for front in fronts]
    return torch.cat((*rows, embeds), 1)


def extended(mask: object, extra: int, total: int) -> object:
    """Put ones for `extra` virtual tokens in front of a mask, unless the mask already covers all `total` tokens."""
    if mask is None or not extra:
        return mask
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        cure = "Pass a mask [batch, tokens], and leave generate's cache_implementation at its default"
        raise Unsupported("virtual tokens need a mask of shape [batch, tokens]", cure=cure)
    if mask.shape[1] == total:
        return mask
    if mask.shape[1] != total - extra:
        why = f"the mask covers {mask.shape[1]} tokens, but the cache and the input together have {total - extra}"
        cure = f"Pass a mask of shape [batch, {total - extra}], without the virtual tokens"
        raise ShapeMismatch(why, where="attention_mask", cure=cure)
    return torch.cat((mask.new_ones(len(mask), extra), mask), 1)


def _new_cache(pair: bool) -> Cache:
    from transformers import DynamicCache, EncoderDecoderCache

    return EncoderDecoderCache(DynamicCache(), DynamicCache()) if pair else DynamicCache()
