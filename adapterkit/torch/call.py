"""One call of a model with virtual tokens: in front of its input's embeddings, and as keys and values in its cache."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core.updates import ContextUpdate
from ..errors import ShapeMismatch, Unsupported
from .sizes import embedding_of, is_encoder_decoder

Words = dict[str, Any]
"""Arguments of a call, by name."""


@dataclass(eq=False)
class Call:
    """One call of a model with virtual tokens.

    Attributes:
        module: the model.
        updates: in the order in which they were attached.
        words: what it is called with; changed on the way.
        names: of its parameters.
    """

    module: nn.Module
    updates: Sequence[ContextUpdate]
    words: Words
    names: Sequence[str]

    def __post_init__(self) -> None:
        self.pair = is_encoder_decoder(self.module)
        self.own = "decoder_" if self.pair else ""
        self.cache_word = "cache" if "cache" in self.names else "past_key_values"
        if self.cache_word == "cache" and "past_key_values" in self.words:
            self.words["cache"] = self.words.pop("past_key_values")
        task = self.words.pop("task_ids", None)
        if self.pair and task is not None:
            raise Unsupported("tasks of rows in a model with an encoder", cure="Set the update's own task")
        fronts = [u.decoder_embeddings(task) if self.pair else u.embeddings(task) for u in self.updates]
        self.fronts, self.pasts = present(fronts), present([update.past() for update in self.updates])
        self.front, self.past = (sum(t.shape[-2] for t in some) for some in (self.fronts, self.pasts))

    @property
    def seen(self) -> int:
        cache = self.words.get(self.cache_word)
        return 0 if cache is None else int(cache.get_seq_length())

    def run(self, forward: Callable[..., Any]) -> Any:
        seen, given = self.seen, self.words.get(self.cache_word)
        if self.pair:
            self._extend_encoder_mask()
        if self.past or self.front:
            self._extend_decoder(seen)
        out = forward(**self.words)
        if self.past and self.seen <= seen + self.past * (not seen):
            raise Unsupported("the model did not read its past keys and values", cure="Use a model with a cache")
        # A caller that wants no cache gets none, or it would go on with it and repeat its tokens.
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
        mask = f"{self.own}attention_mask"
        self.words[mask] = extended(self.words.get(mask), extra, seen + new + (0 if seen else extra))
        self._move_positions(seen, extra)
        self.words = {name: value for name, value in self.words.items() if value is not None}

    def _length(self) -> int:
        """How many tokens of its own the call brings."""
        ids, embeds = (self.words.get(f"{self.own}{name}") for name in ("input_ids", "inputs_embeds"))
        if ids is None and embeds is None and self.pair and self.words.get("labels") is not None:
            shifted: Any = self.module
            ids = shifted.prepare_decoder_input_ids_from_labels(labels=self.words["labels"])
            self.words["decoder_input_ids"] = ids
        tokens = ids if embeds is None else embeds
        if tokens is None:
            raise Unsupported("a call without tokens", cure=f"Pass {self.own}input_ids or {self.own}inputs_embeds")
        self.batch = int(tokens.shape[0])
        return int(tokens.shape[1])

    def _put_in_front(self) -> None:
        words, own = self.words, self.own
        words[f"{own}inputs_embeds"] = _joined(self.module, self.fronts, words, own)
        words.pop(f"{own}input_ids", None)
        for name, value in (("labels", -100), ("token_type_ids", 0)):
            given = words.get(name)
            if given is not None and given.ndim == 2:
                words[name] = torch.cat((given.new_full((len(given), self.front), value), given), 1)

    def _fill(self) -> None:
        """The cache with the prefix in it."""
        cache: Any = self.words.get(self.cache_word)
        cache = _new_cache(self.pair) if cache is None else cache
        if getattr(cache, "is_compileable", False):
            cure = "Leave generate's cache_implementation at its default"
            raise Unsupported("a prefix in a cache of fixed size", cure=cure)
        if self.module.training and any(getattr(m, "gradient_checkpointing", False) for m in self.module.modules()):
            raise Unsupported("gradient checkpointing does away with the prefix", cure="Train without it")
        like: Any = embedding_of(self.module).weight
        past = torch.cat([past.to(like) for past in self.pasts], 3)
        for layer, (keys, values) in enumerate(past):
            into = getattr(cache, "self_attention_cache", cache)
            into.update(keys.expand(self.batch, *keys.shape), values.expand(self.batch, *values.shape), layer)
        self.words[self.cache_word] = cache

    def _move_positions(self, seen: int, extra: int) -> None:
        name = f"{self.own}position_ids"
        given = self.words.get(name)
        if given is None:
            return
        moved = given + extra
        if not seen and self.front:
            virtual = torch.arange(self.past, extra, device=given.device, dtype=given.dtype)
            moved = torch.cat((virtual.expand(*given.shape[:-1], -1), moved), -1)
        self.words[name] = moved

    def _extend_encoder_mask(self) -> None:
        """The encoder adds its virtual tokens itself; a decoder looks back at them."""
        hidden = self.words.get("encoder_outputs")
        tokens = [self.words.get(name) for name in ("inputs_embeds", "input_ids")]
        given = next((each for each in tokens if each is not None), None)
        extra = sum(front.shape[-2] for front in present([update.embeddings() for update in self.updates]))
        if hidden is not None:
            total = hidden[0].shape[1]
        elif given is not None:
            total = given.shape[1] + extra
        else:
            return
        self.words["attention_mask"] = extended(self.words.get("attention_mask"), extra, total)


def encoder_words(module: nn.Module, updates: Sequence[ContextUpdate], words: Words) -> Words:
    """What an encoder is called with once virtual tokens stand in front of its input."""
    fronts = present([update.embeddings() for update in updates])
    given = words.get("inputs_embeds") if words.get("input_ids") is None else words.get("input_ids")
    if given is None:
        raise Unsupported("a call without tokens", cure="Pass input_ids or inputs_embeds")
    extra = sum(front.shape[-2] for front in fronts)
    embeds = _joined(module, fronts, words, "")
    mask = extended(words.get("attention_mask"), extra, embeds.shape[1])
    rest = {name: value for name, value in words.items() if name != "input_ids"}
    return {**rest, "inputs_embeds": embeds, "attention_mask": mask}


def present(found: Sequence[Tensor | None]) -> list[Tensor]:
    """Without those that are not there."""
    return [each for each in found if each is not None]


def _joined(module: nn.Module, fronts: Sequence[Tensor], words: Words, own: str) -> Tensor:
    """Virtual tokens and the embeddings of the input."""
    embeds: Any = words.get(f"{own}inputs_embeds")
    if embeds is None:
        embeds = embedding_of(module)(words[f"{own}input_ids"])
    rows = [front.to(embeds).expand(len(embeds), *front.shape[-2:]) for front in fronts]
    return torch.cat((*rows, embeds), 1)


def extended(mask: Any, extra: int, total: int) -> Any:
    """A mask with ones for `extra` virtual tokens, unless it has all `total` already."""
    if mask is None or not extra:
        return mask
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        cure = "Pass a mask [batch, tokens], and leave generate's cache_implementation at its default"
        raise Unsupported("virtual tokens under a mask that is not [batch, tokens]", cure=cure)
    if mask.shape[1] == total:
        return mask
    if mask.shape[1] != total - extra:
        why = f"a mask of {mask.shape[1]} tokens, where the input and the cache have {total - extra}"
        raise ShapeMismatch(why, where="attention_mask", cure="Pass one number for each token of the input")
    return torch.cat((mask.new_ones(len(mask), extra), mask), 1)


def _new_cache(pair: bool) -> Any:
    from transformers import DynamicCache, EncoderDecoderCache

    return EncoderDecoderCache(DynamicCache(), DynamicCache()) if pair else DynamicCache()
