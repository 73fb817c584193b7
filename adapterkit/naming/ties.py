"""Find tied weights: layers that read one stored tensor, such as an output head and the input embeddings.

A checkpoint stores a tied tensor once, under the embedding's name, or twice with equal bytes. Names are those of
transformers' model families; they come from `_tied_weights_keys` of its model classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

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

_TIED_BY_DEFAULT = frozenset({
    "albert", "bart", "bert", "big_bird", "bigbird_pegasus", "biogpt", "blenderbot", "bloom", "camembert", "cohere",
    "cohere2", "ctrl", "deberta", "deberta-v2", "distilbert", "electra", "ernie4_5", "ernie4_5_moe", "falcon",
    "falcon_mamba", "gemma", "gemma2", "gemma3", "gemma3_text", "gemma3n", "gemma3n_text", "gemma4", "gemma4_text",
    "gpt2", "gpt_bigcode", "gpt_neo", "lfm2", "lfm2_moe", "longt5", "m2m_100", "mamba", "marian", "mbart", "modernbert",
    "mpt", "openai-gpt", "opt", "paligemma", "pegasus", "recurrent_gemma", "roberta", "smollm3", "starcoder2",
    "switch_transformers", "t5", "t5gemma", "udop", "umt5", "whisper", "xglm", "xlm-roberta", "zamba", "zamba2",
})  # fmt: skip
"""Model types whose config class ties if config.json does not say; the others of transformers do not."""

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
    """

    stored: str
    inputs: tuple[str, ...]
    head: str
    apart: bool = False

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
    embeddings = [name for name in names if _is(name, EMBEDDINGS)]
    if len(embeddings) != 1:
        return None
    stored = embeddings[0]
    # Other layers are called `output`, too; only a head has the embedding's shape.
    shape = getattr(names[stored], "shape", None)
    heads = [name for name in names if _is(name, HEADS) and getattr(names[name], "shape", None) == shape]
    # Llama 3.2 Vision has a head with fewer rows than its embedding, so it is a tensor of its own.
    apart = bool(heads) or any(_is(name, _ONLY_HEADS) for name in names)
    if not _says_tied(config, apart) or len(heads) > 1:
        return None
    return Tie(stored, _inputs(stored), heads[0] if heads else f"{_head_of(config)}.weight", bool(heads))


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
    silent = _explicit(config or {}) is None and (config or {}).get("model_type") not in _TIED_BY_DEFAULT
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


def _says_tied(config: Mapping[str, Any] | None, has_head: bool) -> bool:
    """Whether the config, or else its family's default, ties; a class with a head but no weight for it must tie."""
    if config is None:
        return False
    listed = config.get("architectures")
    classes = [name for name in listed if isinstance(name, str)] if isinstance(listed, list) else []
    with_head = any(name.endswith(_WITH_HEAD) for name in classes)
    if not has_head and not with_head and any(name.endswith(_HEADLESS) for name in classes):
        return False
    explicit = _explicit(config)
    if explicit is not None:
        return bool(explicit)
    return config.get("model_type") in _TIED_BY_DEFAULT if has_head else with_head


def _explicit(config: Mapping[str, Any]) -> Any:
    text = config.get("text_config")
    inner = text.get("tie_word_embeddings") if isinstance(text, dict) else None
    return config.get("tie_word_embeddings", inner)


def _is(name: str, modules: tuple[str, ...]) -> bool:
    return name.endswith(".weight") and f".{name}".endswith(_endings(modules))


@lru_cache(maxsize=8)
def _endings(modules: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f".{module}.weight" for module in modules)


def _head_of(config: Mapping[str, Any] | None) -> str:
    return _HEAD_OF.get(str((config or {}).get("model_type")), "lm_head")
