"""Context in live models: tokens in front of the input, keys and values before it, prompts to attend to, new tokens.

A model as a whole is any that takes `inputs_embeds` or, for prefixes, a cache of past keys and values: those of
transformers. Its forward is called as ever, with token numbers or embeddings, also by `generate()`, and what it returns
is of the longer input: logits of virtual tokens come first. Where a call begins (no cache, or an empty one) the virtual
tokens go in; where it goes on, the cache has them already. Callers speak of their own tokens alone: masks get ones for
virtual tokens, labels -100, token types 0, and positions are moved up behind them.

Several adapters' virtual tokens follow each other in the order in which they were attached; prefixes come before all.
`task_ids=` of a call picks tasks of multitask prompts.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..adapter import Target
from ..errors import ShapeMismatch, Unsupported
from ..updates import ContextUpdate
from .attention import heads_of
from .switch import Switch

Words = dict[str, Any]
"""Arguments of a call, by name."""


@dataclass(frozen=True, eq=False)
class ContextPart:
    """Context updates at one module; `encoder` where it is the encoder of the model that they are meant for."""

    switch: Switch
    target: Target
    updates: tuple[ContextUpdate, ...]
    encoder: bool = False


def surround(
    module: nn.Module, parts: Sequence[ContextPart], names: Sequence[str], forward: Callable[..., Any], args: Any,
    kwargs: Words,
) -> Any:  # fmt: skip
    """The module's forward with more context; `names` are its parameters' names."""
    words = {**dict(zip(names, args, strict=False)), **kwargs}
    updates = [update for part in parts for update in part.updates]
    place = updates[0].place
    if place == "vocabulary":
        return _with_tokens(module, updates, forward, words.pop(names[0]), words)
    if place == "attention":
        return _with_prompts(module, updates, forward, words)
    if any(part.encoder for part in parts):
        return forward(**_encoder_words(module, updates, words))
    return Call(module, updates, words, names).run(forward)


def parts_of(model: nn.Module, part: ContextPart) -> list[tuple[nn.Module, ContextPart]]:
    """Where a part is to be attached: for tokens in front of an encoder's input at the encoder too.

    Raises:
        ShapeMismatch: it is made for other sizes than the model's.
        Unsupported: the module does not take such context.
    """
    module = model.get_submodule(part.target.path)
    for update in part.updates:
        _check(module, part.target, update)
    found = [(module, part)]
    if part.updates[0].place == "embeddings" and is_encoder_decoder(module):
        found.append((_encoder(module), ContextPart(part.switch, part.target, part.updates, encoder=True)))
    return found


def is_encoder_decoder(module: nn.Module) -> bool:
    """Whether a model has an encoder whose input is its own."""
    return bool(getattr(getattr(module, "config", None), "is_encoder_decoder", False)) and hasattr(module, "get_encoder")


def sizes_of(module: nn.Module) -> dict[str, int]:
    """`layers`, `heads` and `d` of the past keys and values of a model, as far as its config tells; a decoder's."""
    config: Any = getattr(module, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config(decoder=True)
    queries, heads = _first(config, "num_attention_heads"), _first(config, "num_key_value_heads", "num_attention_heads")
    d, width = _first(config, "head_dim", "d_kv"), _first(config, "hidden_size")
    d = width // queries if not d and width and queries else d
    found = {"layers": _first(config, "num_decoder_layers", "decoder_layers", "num_hidden_layers"), "heads": heads}
    return {name: size for name, size in {**found, "d": d}.items() if size}


def _first(config: Any, *names: str) -> int:
    return next((value for name in names if isinstance(value := getattr(config, name, None), int)), 0)


def embedding_of(module: nn.Module) -> nn.Module:
    """What turns a model's token numbers into embeddings.

    Raises:
        Unsupported: the model does not say.
    """
    found: Any = module.get_input_embeddings() if hasattr(module, "get_input_embeddings") else None
    if not isinstance(found, nn.Module) or not isinstance(getattr(found, "weight", None), Tensor):
        why = f"a {type(module).__name__} does not say what embeds its tokens"
        raise Unsupported(why, cure="Give it a get_input_embeddings() that returns that module")
    return found


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
        self.fronts = [front for front in fronts if front is not None]
        self.pasts = [past for u in self.updates if (past := u.past()) is not None]
        self.front, self.past = (sum(t.shape[-2] for t in some) for some in (self.fronts, self.pasts))

    @property
    def seen(self) -> int:
        cache = self.words.get(self.cache_word)
        return 0 if cache is None else int(cache.get_seq_length())

    def run(self, forward: Callable[..., Any]) -> Any:
        seen = self.seen
        if self.pair:
            self._extend_encoder_mask()
        if self.past or self.front:
            self._extend_decoder(seen)
        out = forward(**self.words)
        if self.past and self.seen <= seen + self.past * (not seen):
            raise Unsupported("the model did not read its past keys and values", cure="Use a model with a cache")
        return out

    def _extend_decoder(self, seen: int) -> None:
        new = self._length()
        if not seen and self.front:
            self._put_in_front()
        if not seen and self.past:
            self._fill()
        extra = self.past + self.front
        mask = f"{self.own}attention_mask"
        self.words[mask] = _extended(self.words.get(mask), extra, seen + new + (0 if seen else extra))
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
        like = embedding_of(self.module).weight
        past = torch.cat([past.to(like) for past in self.pasts], 3)  # type: ignore[arg-type]
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
        extra = sum(e.shape[-2] for u in self.updates if (e := u.embeddings()) is not None)
        if hidden is not None:
            total = hidden[0].shape[1]
        elif given is not None:
            total = given.shape[1] + extra
        else:
            return
        self.words["attention_mask"] = _extended(self.words.get("attention_mask"), extra, total)


def _encoder_words(module: nn.Module, updates: Sequence[ContextUpdate], words: Words) -> Words:
    fronts = [front for update in updates if (front := update.embeddings()) is not None]
    given = words.get("inputs_embeds") if words.get("input_ids") is None else words.get("input_ids")
    if given is None:
        raise Unsupported("a call without tokens", cure="Pass input_ids or inputs_embeds")
    extra = sum(front.shape[-2] for front in fronts)
    embeds = _joined(module, fronts, words, "")
    mask = _extended(words.get("attention_mask"), extra, embeds.shape[1])
    rest = {name: value for name, value in words.items() if name != "input_ids"}
    return {**rest, "inputs_embeds": embeds, "attention_mask": mask}


def _joined(module: nn.Module, fronts: Sequence[Tensor], words: Words, own: str) -> Tensor:
    """Virtual tokens and the embeddings of the input."""
    embeds: Any = words.get(f"{own}inputs_embeds")
    if embeds is None:
        embeds = embedding_of(module)(words[f"{own}input_ids"])
    rows = [front.to(embeds).expand(len(embeds), *front.shape[-2:]) for front in fronts]
    return torch.cat((*rows, embeds), 1)


def _extended(mask: Any, extra: int, total: int) -> Any:
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


def _with_tokens(
    module: nn.Module, updates: Sequence[ContextUpdate], forward: Callable[..., Any], ids: Tensor, words: Words
) -> Tensor:
    """An embedding with more rows than it has."""
    held: Any = module.weight
    more = torch.cat([rows for update in updates if (rows := update.vocabulary()) is not None]).to(held)
    new = ids >= len(held)
    y: Tensor = forward(torch.where(new, 0, ids), **words)
    return torch.where(new[..., None], more[torch.where(new, ids - len(held), 0)].to(y.dtype), y)


def _with_prompts(
    module: nn.Module, updates: Sequence[ContextUpdate], forward: Callable[..., Any], words: Words
) -> Any:
    """An attention that attends to prompts beside its input."""
    heads, x = heads_of(module), words["hidden_states"]
    out = forward(**words)
    y = out[0] if isinstance(out, tuple) else out
    q = heads.queries(x, words)
    for update in updates:
        prompt: Any = update
        k, v = heads.keys_values(prompt.P.to(x.dtype))
        added = update.map(lambda leaf: leaf.to(x.dtype)).attention(q, k, v)  # type: ignore[union-attr, arg-type]
        added = added.transpose(1, 2).flatten(2)
        y = y + (heads.mixed(added) if prompt.projected else added)
    return (y, *out[1:]) if isinstance(out, tuple) else y


def _encoder(module: nn.Module) -> nn.Module:
    model: Any = module
    encoder: nn.Module = model.get_encoder()
    return encoder


def _check(module: nn.Module, target: Target, update: ContextUpdate) -> None:
    where = f"{target}: {update.method}"
    if update.place == "vocabulary":
        if not isinstance(module, nn.Embedding):
            why = f"new tokens in a {type(module).__name__}"
            raise Unsupported(why, where=where, cure="Their target is an nn.Embedding")
        wanted = module.embedding_dim
    elif update.place == "attention":
        wanted = heads_of(module).width
    else:
        wanted = _width(module, update, where)
    dims = update.dims()
    if dims.get("dim", wanted) != wanted:
        why = f"made for embeddings of {dims['dim']}; the model's have {wanted}"
        raise ShapeMismatch(why, where=where, cure=_WRONG_BASE)


def _width(module: nn.Module, update: ContextUpdate, where: str) -> int:
    """The width of a model's embeddings, once it is sure that the model takes the update."""
    names = inspect.signature(module.forward).parameters
    needed = {"embeddings": {"inputs_embeds"}, "past": {"cache", "past_key_values"}}[update.place]
    if not needed & set(names):
        why = f"a {type(module).__name__} takes no {' or '.join(sorted(needed))}"
        raise Unsupported(why, where=where, cure="Context belongs to models that do, as those of transformers")
    dims, sizes = update.dims(), sizes_of(module)
    for name, size in sizes.items():
        if update.place == "past" and dims[name] != size:
            why = f"made for {name}={dims[name]}; the model has {size}"
            raise ShapeMismatch(why, where=where, cure=_WRONG_BASE)
    weight: Any = embedding_of(module).weight
    return int(weight.shape[1])


_WRONG_BASE = "Is this the base that the adapter was trained on?"
