"""Context in live models: tokens in front of the input, keys and values before it, prompts to attend to, new tokens.

A model as a whole is any that takes `inputs_embeds` or, for prefixes, a cache of past keys and values: those of
transformers. Its forward is called as ever, with token numbers or embeddings, also by `generate()`, and what it returns
is of the longer input: logits of virtual tokens come first. Where a call begins (no cache, or an empty one) the virtual
tokens go in; where it goes on, the cache has them already. Callers speak of their own tokens alone: masks get ones for
virtual tokens, labels -100, token types 0, and positions are moved up behind them. Prefixes of single attentions are in
prefixes.py: those are no tokens of the model's, and nothing moves.

Several adapters' virtual tokens follow each other in the order in which they were attached; prefixes come before all.
`task_ids=` of a call picks tasks of multitask prompts.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..core.adapter import Target
from ..core.updates import ContextUpdate
from ..errors import ShapeMismatch, Unsupported
from .attention import heads_of
from .call import Call, Words, encoder_words, extended, present
from .leaves import LiveUpdates
from .outputs import Switch
from .prefixes import is_attention, key_sizes, positions_of, with_prefixes
from .sizes import embedding_of, is_encoder_decoder, sizes_of

CACHES = {"cache", "past_key_values"}
"""What a model calls its past keys and values: one word since transformers 5.24, the other before."""


@dataclass(frozen=True, eq=False)
class ContextPart:
    """Context updates at one module.

    Attributes:
        encoder: it is the encoder of the model that they are meant for.
        masks: it is the model around the embeddings behind which tokens stand: its mask gets places for them.
        biased: the attention whose table of relative positions this one uses too, if any.
    """

    switch: Switch
    target: Target
    bound: LiveUpdates
    encoder: bool = False
    masks: bool = False
    biased: nn.Module | None = None

    @property
    def updates(self) -> tuple[ContextUpdate, ...]:
        """The updates over the tensors that the model holds now."""
        found: Any = self.bound.updates
        return cast("tuple[ContextUpdate, ...]", found)


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
    if is_attention(module):
        return _at_attention(module, updates, parts[0].biased, forward, words)
    if place == "embeddings" and not hasattr(module, "get_input_embeddings"):
        return _behind(updates, forward(**words))
    if any(part.masks for part in parts):
        forward = partial(_with_masks, [u for part in parts if part.masks for u in part.updates], forward)
        updates = [update for part in parts if not part.masks for update in part.updates]
        if not updates:
            return forward(**words)
    if any(part.encoder for part in parts):
        return forward(**encoder_words(module, updates, words))
    return Call(module, updates, words, names).run(forward)


def parts_of(model: nn.Module, part: ContextPart) -> list[tuple[nn.Module, ContextPart]]:
    """Where a part is to be attached: for tokens in front of an encoder's input at the encoder too.

    Raises:
        ShapeMismatch: it is made for other sizes than the model's.
        Unsupported: the module does not take such context.
    """
    owner = _owner(model, part)
    if owner is not None:
        return _around(owner, model.get_submodule(part.target.path), part)
    module = _reader(model.get_submodule(part.target.path), part.updates)
    for update in part.updates:
        _check(module, part.target, update)
    if is_attention(module):
        return [(module, replace(part, biased=positions_of(model, part.target.path)))]
    found = [(module, part)]
    if part.updates[0].place == "embeddings" and is_encoder_decoder(module):
        found.append((_encoder(module), replace(part, encoder=True)))
    return found


def _reader(module: nn.Module, updates: Sequence[ContextUpdate]) -> nn.Module:
    """The module that reads past keys and values: a classifier leaves that to the model inside it."""
    inside = getattr(module, "base_model", None)
    takes = CACHES & set(inspect.signature(module.forward).parameters)
    return inside if isinstance(inside, nn.Module) and updates[0].place == "past" and not takes else module


def _owner(model: nn.Module, part: ContextPart) -> nn.Module | None:
    """The model around the embeddings behind which tokens are to stand; None where the target is a model itself."""
    path, _, name = part.target.path.rpartition(".")
    module: Any = model.get_submodule(part.target.path)
    if part.updates[0].place != "embeddings" or hasattr(module, "get_input_embeddings"):
        return None
    owner = model.get_submodule(path)
    takes = "inputs_embeds" in inspect.signature(owner.forward).parameters and hasattr(owner, "get_input_embeddings")
    if not takes or not name or isinstance(module, nn.Dropout):
        why = f"tokens behind a {type(module).__name__} inside a {type(owner).__name__}"
        raise Unsupported(why, where=str(part.target), cure="Target the model itself, or its embeddings")
    return owner


def _around(owner: nn.Module, module: nn.Module, part: ContextPart) -> list[tuple[nn.Module, ContextPart]]:
    """Tokens behind a model's embeddings: in front of its input where these are all that embeds it."""
    config: Any = getattr(owner, "config", None)
    for update in part.updates:
        dim, wanted = update.dims()["dim"], getattr(config, "hidden_size", None)
        if wanted not in (None, dim):
            why = f"made for embeddings of {dim}; the model's have {wanted}"
            raise ShapeMismatch(why, where=f"{part.target}: {update.method}", cure=_WRONG_BASE)
    if embedding_of(owner) is module:
        return [(owner, part)]
    if getattr(config, "is_decoder", False):
        why = "tokens behind the embeddings of a decoder, whose cache goes on without them"
        raise Unsupported(why, where=str(part.target), cure="Target the model itself")
    return [(module, part), (owner, replace(part, masks=True))]


def _behind(updates: Sequence[ContextUpdate], y: Tensor) -> Tensor:
    fronts = present([update.embeddings() for update in updates])
    return torch.cat((*(front.to(y).expand(len(y), *front.shape[-2:]) for front in fronts), y), 1)


def _with_masks(updates: Sequence[ContextUpdate], forward: Callable[..., Any], **words: Any) -> Any:
    mask, extra = words.get("attention_mask"), sum(u.shape[-2] for u in present([u.embeddings() for u in updates]))
    if isinstance(mask, Tensor):
        words["attention_mask"] = extended(mask, extra, mask.shape[1] + extra)
    return forward(**words)


def _with_tokens(
    module: nn.Module, updates: Sequence[ContextUpdate], forward: Callable[..., Any], ids: Tensor, words: Words
) -> Tensor:
    """An embedding with more rows than it has."""
    held: Any = module.weight
    more = torch.cat(present([update.vocabulary() for update in updates])).to(held)
    new = ids >= len(held)
    y: Tensor = forward(torch.where(new, 0, ids), **words)
    return torch.where(new[..., None], more[torch.where(new, ids - len(held), 0)].to(y.dtype), y)


def _at_attention(
    module: nn.Module, updates: Sequence[ContextUpdate], biased: Any, forward: Callable[..., Any], words: Words
) -> Any:
    """An attention with prefixes of its own, and prompts beside what it gives."""
    prompts = [update for update in updates if update.place == "attention"]
    prefixes = [update for update in updates if update.place != "attention"]
    inner = partial(_prefixed, module, prefixes, biased, forward) if prefixes else forward
    return _with_prompts(module, prompts, inner, words) if prompts else inner(**words)


def _prefixed(module: nn.Module, updates: Any, biased: Any, forward: Callable[..., Any], **words: Any) -> Any:
    return with_prefixes(module, updates, biased, forward, words)


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
        added = update.map(lambda leaf: leaf.to(x.dtype)).attention(q, k, v)  # type: ignore[union-attr]
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
    elif is_attention(module) or update.place == "prefix":
        _check_prefix(module, update, where)
        return
    else:
        wanted = _width(module, update, where)
    dims = update.dims()
    if dims.get("dim", wanted) != wanted:
        why = f"made for embeddings of {dims['dim']}; the model's have {wanted}"
        raise ShapeMismatch(why, where=where, cure=_WRONG_BASE)


def _check_prefix(module: nn.Module, update: ContextUpdate, where: str) -> None:
    """Checks that an attention takes a prefix of its own, and that it is made for its keys."""
    if not is_attention(module) or update.place not in ("past", "prefix"):
        why = f"{update.method} at a {type(module).__name__}"
        raise Unsupported(why, where=where, cure="Prefixes are of attentions of transformers', other context of models")
    dims = {"layers": 1, **update.dims()}
    gated = {"width": dims["width"]} if "gate" in update.tensors else {}
    for name, size in {"layers": 1, **key_sizes(module)}.items():
        has = {**dims, **gated}.get(name, size) if name != "width" else gated.get(name, size)
        if has != size:
            why = f"made for {name}={has}; the attention has {size}"
            raise ShapeMismatch(why, where=where, cure=_WRONG_BASE)


def _width(module: nn.Module, update: ContextUpdate, where: str) -> int:
    """The width of a model's embeddings, once it is sure that the model takes the update."""
    names = inspect.signature(module.forward).parameters
    needed = {"inputs_embeds"} if update.place == "embeddings" else CACHES
    if not needed & set(names):
        why = (
            f"{update.method} does not apply to a {type(module).__name__}, which takes no {' or '.join(sorted(needed))}"
        )
        raise Unsupported(why, where=where, cure="Context belongs to models that do, as those of transformers")
    dims, sizes = update.dims(), sizes_of(module)
    for name, size in sizes.items():
        if update.place == "past" and dims[name] != size:
            why = f"made for {name}={dims[name]}; the model has {size}"
            raise ShapeMismatch(why, where=where, cure=_WRONG_BASE)
    weight: Any = embedding_of(module).weight
    return int(weight.shape[1])


_WRONG_BASE = "Is this the base that the adapter was trained on?"
