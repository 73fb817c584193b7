"""Find tied weights: layers that read one stored tensor, such as an output head and the input embeddings.

A checkpoint stores a tied tensor once, under the embedding's name, or twice with equal bytes.
`spec/architectures/ties` lists the ties of the classes of transformers; the names of its tensors tell those of a base
whose config names no such class.
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

HEADS = (
    "lm_head", "embed_out", "output", "cls.predictions.decoder", "lm_head.decoder", "vocab_projector", "proj_out",
)  # fmt: skip
_ONLY_HEADS = tuple(name for name in HEADS if name != "output")
"""Names of heads that no other layer has."""

EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "tok_embeddings", "embed_in", "shared", "tokens_embed")

_HEAD_OF = {
    "gpt_neox": "embed_out", "bert": "cls.predictions.decoder", "roberta": "lm_head.decoder",
    "xlm-roberta": "lm_head.decoder", "distilbert": "vocab_projector", "whisper": "proj_out",
}  # fmt: skip
"""model_type -> its head, if that is not `lm_head`."""

_WITH_HEAD = ("LMHeadModel", "ForCausalLM", "ForMaskedLM", "ForConditionalGeneration", "ForPreTraining")
"""Endings of the classes that have a head over the vocabulary."""

_HEADLESS = ("Model", "Classification", "Answering", "Choice")
"""Endings of classes without such a head; their configs say `tie_word_embeddings`, too."""

_SCALED = frozenset({"longt5", "pop2piano", "switch_transformers", "t5", "udop"})
"""Model types that multiply the head's input by `d_model ** -0.5`, unless the config says that it is not tied."""


@dataclass(frozen=True, slots=True)
class Tie:
    """Layers that read one tensor.

    Attributes:
        stored: the tensor's name on disk: the embedding's, or `shared`, which no layer of the model reads.
        inputs: names of the input embeddings that read it: `(stored,)`, or those of an encoder and a decoder.
        head: the name of the output head's weight.
        apart: the head is on disk too, although the config ties it.
        beside: further names that transformers ties while the config says so -> the stored tensor that they are: the
            bias of BERT's head.
    """

    stored: str
    inputs: tuple[str, ...]
    head: str
    apart: bool = False
    beside: tuple[tuple[str, str], ...] = ()

    @property
    def layers(self) -> tuple[str, ...]:
        """List all names under which the tensor is read, the head's last."""
        return (*self.inputs, self.head)

    @property
    def aliases(self) -> dict[str, str]:
        """Return the names that are not on disk -> the one that is."""
        kept = {self.stored, self.head} if self.apart else {self.stored}
        return {name: self.stored for name in self.layers if name not in kept}


def find_tie(names: Mapping[str, Any], config: Mapping[str, Any] | None) -> Tie | None:
    """Find the tie between a head and the input embeddings of a base; None if nothing is tied.

    Args:
        names: the stored tensors.
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
    # Other layers are called `output`, too; only a head has the embedding's shape.
    shape = getattr(names[stored], "shape", None)
    heads = [
        name for name in names
        if (name == head or _is(name, HEADS)) and name != stored and getattr(names[name], "shape", None) == shape
    ]  # fmt: skip
    # Llama 3.2 Vision has a head with fewer rows than its embedding, so it is a tensor of its own.
    apart = bool(heads) or any(name == head or _is(name, _ONLY_HEADS) for name in names if name != stored)
    # CSM ties the embeddings of its two decoders, and its config says so by the field of other models' heads.
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
    """Return other names of a tied tensor -> its stored name; empty if nothing is tied.

    The result is cached for each base. Callers ask for every target, and a search through all names each time would
    take time that grows with the square of the base.
    """
    if base not in _ALIASES:
        tie = find_tie(base.tensors, base.config)
        _ALIASES[base] = {} if tie is None else tie.aliases
    return _ALIASES[base]


_ALIASES: WeakKeyDictionary[Checkpoint, Mapping[str, str]] = WeakKeyDictionary()


def says_untied(config: Mapping[str, Any] | None) -> bool:
    """Whether a config says explicitly that head and embeddings are two tensors."""
    return _explicit(config or {}) is False


def says_tied(config: Mapping[str, Any] | None) -> bool:
    """Whether a config says explicitly that head and embeddings are one tensor."""
    return _explicit(config or {}) is True


def ties_by_default(config: Mapping[str, Any]) -> bool:
    """Whether a config says that head and embeddings are one tensor, or else whether its model type does."""
    explicit = _explicit(config)
    return config.get("model_type") in table().defaults if explicit is None else explicit is True


def tie_of(stored: str, inputs: Sequence[str], head: str) -> Tie:
    """Make the tie of layers that share their numbers in a live model or in a graph.

    Args:
        stored: the name of the embedding that an adapter names.
        inputs: the names of the embeddings that share the numbers.
        head: the name of the head's weight.
    """
    return Tie(stored, tuple(inputs), head, apart=True)


def is_embedding(name: str) -> bool:
    """Whether a stored tensor is the table of a model's token embeddings."""
    return _is(name, EMBEDDINGS)


def is_head(name: str) -> bool:
    """Whether a stored tensor has the name of an output head's weight; other layers may be called `output`, too."""
    return _is(name, HEADS)


def untied(config: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the changes to a config whose head gets a tensor of its own."""
    changes: dict[str, Any] = {"tie_word_embeddings": False}
    text = (config or {}).get("text_config")
    if isinstance(text, dict) and "tie_word_embeddings" in text:
        changes["text_config"] = {**text, "tie_word_embeddings": False}
    if "scale_decoder_outputs" in (config or {}):
        changes["scale_decoder_outputs"] = False
    return changes


def kept_tied(config: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the changes to a config whose head stays tied: none if it, or the default of its family, says so."""
    silent = _explicit(config or {}) is None and (config or {}).get("model_type") not in table().defaults
    return {"tie_word_embeddings": True} if silent else {}


def untied_scale(config: Mapping[str, Any] | None) -> float:
    """Return the factor of an untied head's weight that makes the model compute the same as with the tied head.

    T5 and its relatives scale the head's input only while their config says that it is tied.
    """
    width = (config or {}).get("d_model")
    if str((config or {}).get("model_type")) not in _SCALED or not isinstance(width, int) or width < 1:
        return 1.0
    return float(width**-0.5)


def _inputs(stored: str) -> tuple[str, ...]:
    """List the input embeddings that read a tensor: encoder-decoder models store one `shared` table for both halves."""
    prefix, _, name = stored.removesuffix(".weight").rpartition(".")
    if name != "shared":
        return (stored,)
    return tuple(f"{prefix}.{half}.embed_tokens.weight".removeprefix(".") for half in ("encoder", "decoder"))


def _read_by(stored: str, inputs: tuple[str, ...]) -> tuple[str, ...]:
    """List the input embeddings that read a tensor: those of both halves, which call no third, or it and one more."""
    return inputs if len(inputs) > 1 else (stored, *inputs)


class TiesOfClasses(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Classes that tie the same weights.

    Attributes:
        pairs: second name of a parameter -> the parameter.
        classes: names of the classes.
    """

    pairs: dict[str, str]
    classes: list[str]


class TieTable(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The ties of one library's models.

    Attributes:
        format: the version of the file's form.
        defaults: model types that tie where config.json does not say.
        ties: what each class ties.
        sources: where the facts come from.
    """

    format: int
    defaults: frozenset[str]
    ties: list[TiesOfClasses]
    sources: list[str] = []


@cache
def table() -> TieTable:
    """Load the ties of the classes of transformers.

    Raises:
        Malformed: the file is damaged.
    """
    return decoded(folder() / "ties" / "transformers.toml", TieTable)


@cache
def _by_class() -> Mapping[str, dict[str, str]]:
    return {name: each.pairs for each in table().ties for name in each.classes}


def _pairs_of(config: Mapping[str, Any] | None) -> Mapping[str, str]:
    """Return the ties of a base's class, in the names of its live model; empty if its config names no such class."""
    listed = (config or {}).get("architectures")
    names = [name for name in listed if isinstance(name, str)] if isinstance(listed, list) else []
    return next((_by_class()[name] for name in names if name in _by_class()), {})


def _head_and_embedding(pairs: Mapping[str, str]) -> tuple[str, str] | None:
    """Return the pair of a head and the embedding that it reads, among all that a class ties."""
    found = []
    for one, other in pairs.items():
        if one.endswith(".weight") and (_is(other, HEADS) or _is(one, HEADS) or "embed" not in one):
            found.append((other, one) if _is(other, HEADS) else (one, other))
    return found[0] if len(found) == 1 else None


def _stored_as(name: str, names: Mapping[str, Any], config: Mapping[str, Any] | None) -> str | None:
    """Return the stored name of a live model's weight; None if it is not among the base's names."""
    family = architecture_of(config)
    place = None
    if family is not None and name.removesuffix(".weight") in family.record.weights:
        place = family.place(name.removesuffix(".weight"), "hub")
    known = (name, "" if place is None else f"{place.name}.weight")
    return next((each for each in known if each in names), None)


def _says_tied(config: Mapping[str, Any] | None, has_head: bool, known: bool) -> bool:
    """Whether the config, or else its family's default, ties; a class with a head but no weight for it must tie."""
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
    return config.get("model_type") in table().defaults if has_head else with_head


def _explicit(config: Mapping[str, Any]) -> Any:
    text = config.get("text_config")
    inner = text.get("tie_word_embeddings") if isinstance(text, dict) else None
    return config.get("tie_word_embeddings", inner)


def _is(name: str, modules: tuple[str, ...]) -> bool:
    return name.endswith(".weight") and f".{name}".endswith(_endings(modules))


@lru_cache(maxsize=8)
def _endings(modules: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f".{module}.weight" for module in modules)


def _of_another_shape(head: str, stored: str, names: Mapping[str, Any]) -> bool:
    """Whether a base stores a head that is a matrix of another shape than its embeddings, with numbers as wide."""
    one, other = names.get(head), names[stored]
    shapes = [getattr(each, "shape", ()) for each in (one, other)]
    alike = getattr(one, "dtype", None) == getattr(other, "dtype", None)
    return alike and len(shapes[0]) == len(shapes[1]) == 2 and shapes[0] != shapes[1]


def _head_of(config: Mapping[str, Any] | None) -> str:
    return _HEAD_OF.get(str((config or {}).get("model_type")), "lm_head")
