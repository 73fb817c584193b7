"""Find tied weights: an output head and input embeddings that use the same tensor.

A checkpoint stores a tied tensor once, under the embedding's name, or twice with equal bytes. `spec/architectures/ties`
lists the ties of transformers' classes. If a base's config names none of these classes, this module searches the stored
tensors for the usual names of heads and embeddings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import msgspec

from .architectures import architecture_of, decoded, folder

if TYPE_CHECKING:
    from ..io.checkpoint import Checkpoint
    from ..io.strict_json import JsonValue

HEADS = (
    "lm_head", "embed_out", "output", "cls.predictions.decoder", "lm_head.decoder", "vocab_projector", "proj_out",
)  # fmt: skip
_ONLY_HEADS = tuple(name for name in HEADS if name != "output")
"""Names that only output heads have; other layers may also be named `output`."""

EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "tok_embeddings", "embed_in", "shared", "tokens_embed")

_HEAD_OF = {
    "gpt_neox": "embed_out", "bert": "cls.predictions.decoder", "roberta": "lm_head.decoder",
    "xlm-roberta": "lm_head.decoder", "distilbert": "vocab_projector", "whisper": "proj_out",
}  # fmt: skip
"""A map from model_type to the name of the output head; the head of all other types is `lm_head`."""

_WITH_HEAD = ("LMHeadModel", "ForCausalLM", "ForMaskedLM", "ForConditionalGeneration", "ForPreTraining")
"""Classes whose names end like this have an output head over the vocabulary."""

_HEADLESS = ("Model", "Classification", "Answering", "Choice")
"""Classes whose names end like this have no output head. Their configs may still have `tie_word_embeddings`."""

_SCALED = frozenset({"longt5", "pop2piano", "switch_transformers", "t5", "udop"})
"""Model types that multiply the head's input by `d_model ** -0.5` if head and embeddings are tied."""


@dataclass(frozen=True, slots=True)
class Tie:
    """A tensor that the output head and the input embeddings share.

    Attributes:
        stored: the tensor's name in the files. This is the embedding's name, or a name such as `shared.weight` if an
            encoder and a decoder share the tensor.
        inputs: the names of the input embeddings that use the tensor: `(stored,)`, or the embeddings of encoder and
            decoder.
        head: the name of the output head's weight.
        apart: whether the files also contain the head's weight, although the head is tied.
        beside: the model class's other ties, such as the bias of BERT's head. Each is a pair (name that the files lack,
            name that the files have).
    """

    stored: str
    inputs: tuple[str, ...]
    head: str
    apart: bool = False
    beside: tuple[tuple[str, str], ...] = ()

    @property
    def layers(self) -> tuple[str, ...]:
        """Return all names of the tensor in the model; the head's name comes last."""
        return (*self.inputs, self.head)

    @property
    def aliases(self) -> dict[str, str]:
        """A map from the tensor's other names, which the files lack, to its name in the files."""
        kept = {self.stored, self.head} if self.apart else {self.stored}
        return {name: self.stored for name in self.layers if name not in kept}


def find_tie(names: Mapping[str, object], config: Mapping[str, object] | None) -> Tie | None:
    """Find the tie between a base's head and its input embeddings; None if they are not tied.

    Args:
        names: the stored tensors, by name.
        config: the base's `config.json`.
    """
    pairs = _pairs_of(config)
    known = _head_and_embedding(pairs)
    head, stored = (None, None) if known is None else (known[0], _stored_as(known[1], names, config))
    if stored is None:
        embeddings = [name for name in names if _is(name, EMBEDDINGS)]
        if len(embeddings) != 1:
            return None
        stored = embeddings[0]
    # Compare shapes, because layers that are not heads may also be named `output`. A tied head always has the shape of
    # the embedding.
    shape = getattr(names[stored], "shape", None)
    heads = [
        name for name in names
        if (name == head or _is(name, HEADS)) and name != stored and getattr(names[name], "shape", None) == shape
    ]  # fmt: skip
    # `apart` is also True if the files have a head of another shape. For example, the head of Llama 3.2 Vision has
    # fewer rows than the embedding, so this head is a separate tensor.
    apart = bool(heads) or any(name == head or _is(name, _ONLY_HEADS) for name in names if name != stored)
    # A stored head with the embedding's dtype, but another shape, is not tied. CSM has such a head: its
    # `tie_word_embeddings` ties the embeddings of two decoders.
    if known is None and not heads and _of_another_shape(f"{_head_of(config)}.weight", stored, names):
        return None
    if not _says_tied(config, apart, head is not None) or len(heads) > 1:
        return None
    head = heads[0] if heads else head or f"{_head_of(config)}.weight"
    inputs = tuple(one for one, other in pairs.items() if known and other == known[1] and one != known[0])
    beside = {}
    for pair in pairs.items():
        missing = [name for name in pair if name not in names]
        if known is not None and len(missing) == 1 and not {*missing} & {known[0], head, *inputs}:
            beside[missing[0]] = next(name for name in pair if name in names)
    return Tie(stored, _read_by(stored, inputs) if inputs else _inputs(stored), head, bool(heads), (*beside.items(),))


def aliases(base: Checkpoint) -> Mapping[str, str]:
    """Return a map from the tied tensor's other names, which the base's files lack, to its name in the files.

    The map is empty if no tensor is tied. It is cached for each base, because callers need it for every target, and
    computing it reads all names of the base. Without a cache, the time would grow with the square of the base's size.
    """
    if base not in _ALIASES:
        tie = find_tie(base.tensors, base.config)
        _ALIASES[base] = {} if tie is None else tie.aliases
    return _ALIASES[base]


_ALIASES: WeakKeyDictionary[Checkpoint, Mapping[str, str]] = WeakKeyDictionary()


def says_untied(config: Mapping[str, object] | None) -> bool:
    """Whether a config states explicitly that head and embeddings are not tied."""
    return _explicit(config or {}) is False


def says_tied(config: Mapping[str, object] | None) -> bool:
    """Whether a config states explicitly that head and embeddings are tied."""
    return _explicit(config or {}) is True


def ties_by_default(config: Mapping[str, object]) -> bool:
    """Whether head and embeddings are tied. If the config does not state it, the model type's default decides."""
    explicit = _explicit(config)
    return str(config.get("model_type")) in table().defaults if explicit is None else explicit is True


def tie_of(stored: str, inputs: Sequence[str], head: str) -> Tie:
    """Return the `Tie` for layers that share a tensor in a live model or in an ONNX graph.

    Args:
        stored: the name of the embedding that the adapter changes, or of any embedding if the adapter changes none.
        inputs: the names of the embeddings that share the tensor.
        head: the name of the head's weight.
    """
    return Tie(stored, tuple(inputs), head, apart=True)


def is_embedding(name: str) -> bool:
    """Whether a stored tensor has the name of the weight of a model's token embeddings."""
    return _is(name, EMBEDDINGS)


def is_head(name: str) -> bool:
    """Whether a stored tensor has the name of an output head's weight; other layers may be named `output`, too."""
    return _is(name, HEADS)


def untied(config: Mapping[str, object] | None) -> dict[str, JsonValue]:
    """Return the config keys and values that untie the head from the embeddings."""
    changes: dict[str, Any] = {"tie_word_embeddings": False}
    text = (config or {}).get("text_config")
    if isinstance(text, dict) and "tie_word_embeddings" in text:
        changes["text_config"] = {**text, "tie_word_embeddings": False}
    if "scale_decoder_outputs" in (config or {}):
        changes["scale_decoder_outputs"] = False
    return changes


def kept_tied(config: Mapping[str, object] | None) -> dict[str, JsonValue]:
    """Return the config keys and values that keep a tied head tied; empty if the config needs no change."""
    silent = _explicit(config or {}) is None and str((config or {}).get("model_type")) not in table().defaults
    return {"tie_word_embeddings": True} if silent else {}


def untied_scale(config: Mapping[str, object] | None) -> float:
    """Return the factor by which the head's weight must be multiplied when the head is untied.

    T5 and similar models scale the head's input, but only if the head is tied. The factor replaces this scale.
    """
    width = (config or {}).get("d_model")
    if str((config or {}).get("model_type")) not in _SCALED or not isinstance(width, int) or width < 1:
        return 1.0
    return float(width**-0.5)


def _inputs(stored: str) -> tuple[str, ...]:
    """List the input embeddings that use a tensor. The encoder and the decoder both use a tensor named `shared`."""
    prefix, _, name = stored.removesuffix(".weight").rpartition(".")
    if name != "shared":
        return (stored,)
    return tuple(f"{prefix}.{half}.embed_tokens.weight".removeprefix(".") for half in ("encoder", "decoder"))


def _read_by(stored: str, inputs: tuple[str, ...]) -> tuple[str, ...]:
    """List the embeddings that share the tensor: `inputs`, preceded by the stored name if `inputs` has one entry."""
    return inputs if len(inputs) > 1 else (stored, *inputs)


class TiesOfClasses(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Model classes that tie the same weights.

    Attributes:
        pairs: a map from a tied parameter's name to the name of the parameter whose tensor it uses, such as from
            `lm_head.weight` to `model.embed_tokens.weight`.
        classes: the names of the classes.
    """

    pairs: dict[str, str]
    classes: list[str]


class TieTable(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The ties of one library's models.

    Attributes:
        format: the version of the file's format.
        defaults: the model types whose head is tied if config.json lacks `tie_word_embeddings`.
        ties: the ties of each class.
        sources: where the data comes from.
    """

    format: int
    defaults: frozenset[str]
    ties: list[TiesOfClasses]
    sources: list[str] = []


@cache
def table() -> TieTable:
    """Load the ties of transformers' classes.

    Raises:
        Malformed: the file is damaged.
    """
    return decoded(folder() / "ties" / "transformers.toml", TieTable)


@cache
def _by_class() -> Mapping[str, dict[str, str]]:
    return {name: each.pairs for each in table().ties for name in each.classes}


def _pairs_of(config: Mapping[str, object] | None) -> Mapping[str, str]:
    """Return `TiesOfClasses.pairs` for the class that a base's config names; empty if the class is unknown."""
    listed = (config or {}).get("architectures")
    names = [name for name in listed if isinstance(name, str)] if isinstance(listed, list) else []
    return next((_by_class()[name] for name in names if name in _by_class()), {})


def _head_and_embedding(pairs: Mapping[str, str]) -> tuple[str, str] | None:
    """Return (name of the head's weight, name of the embedding's weight) from the pairs that a class ties.

    Return None if no pair, or more than one pair, ties a head to an embedding.
    """
    head_pairs = []
    for one, other in pairs.items():
        if one.endswith(".weight") and (_is(other, HEADS) or _is(one, HEADS) or "embed" not in one):
            head_pairs.append((other, one) if _is(other, HEADS) else (one, other))
    return head_pairs[0] if len(head_pairs) == 1 else None


def _stored_as(name: str, names: Mapping[str, object], config: Mapping[str, object] | None) -> str | None:
    """Return the name under which the base's files store the live model's weight `name`; None if they lack it."""
    family = architecture_of(config)
    place = None
    if family is not None and name.removesuffix(".weight") in family.record.weights:
        place = family.place(name.removesuffix(".weight"), "hub")
    known = (name, "" if place is None else f"{place.name}.weight")
    return next((each for each in known if each in names), None)


def _says_tied(config: Mapping[str, object] | None, has_head: bool, known: bool) -> bool:
    """Whether the head is tied. Without a config, return False.

    If the files have no head, and the model's class has no head according to its name and its ties, also return False.
    Otherwise, the config's `tie_word_embeddings` decides. If the config lacks this key, there are two cases. A head in
    the files is tied if heads of this model type are tied by default. If the files have no head, the head is tied if
    the model's class has a head.

    Args:
        config: the base's `config.json`.
        has_head: whether the head's weight is stored.
        known: whether the ties of the model's class include a head.
    """
    if config is None:
        return False
    listed = config.get("architectures")
    classes = [name for name in listed if isinstance(name, str)] if isinstance(listed, list) else []
    with_head = known or any(name.endswith(_WITH_HEAD) for name in classes)
    if not has_head and not with_head and any(name.endswith(_HEADLESS) for name in classes):
        return False
    explicit = _explicit(config)
    if explicit is not None:
        return bool(explicit)
    return str(config.get("model_type")) in table().defaults if has_head else with_head


def _explicit(config: Mapping[str, object]) -> object:
    text = config.get("text_config")
    inner = text.get("tie_word_embeddings") if isinstance(text, dict) else None
    return config.get("tie_word_embeddings", inner)


def _is(name: str, modules: tuple[str, ...]) -> bool:
    return name.endswith(".weight") and f".{name}".endswith(_endings(modules))


@lru_cache(maxsize=8)
def _endings(modules: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f".{module}.weight" for module in modules)


def _of_another_shape(head: str, stored: str, names: Mapping[str, object]) -> bool:
    """Whether a base stores a head with the same dtype as the embeddings, but with another shape."""
    one, other = names.get(head), names[stored]
    shapes = [getattr(each, "shape", ()) for each in (one, other)]
    alike = getattr(one, "dtype", None) == getattr(other, "dtype", None)
    return alike and len(shapes[0]) == len(shapes[1]) == 2 and shapes[0] != shapes[1]


def _head_of(config: Mapping[str, object] | None) -> str:
    return _HEAD_OF.get(str((config or {}).get("model_type")), "lm_head")
