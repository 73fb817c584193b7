"""List where the adapters library puts bottleneck adapters, by `model_type`, and the base's module at each position.

The adapters library attaches an adapter to the block whose residual connection the adapter replaces. A target is the
module of the base whose output changes. If this module does not add the residual, `residual` and `norm` name the
modules that do this.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain


@dataclass(frozen=True, slots=True)
class SublayerRule:
    """One kind of position for adapters. A path has a common beginning, followed by `module` or by `target`.

    Attributes:
        models: the values of `model_type` that have this position.
        module: the end of the path of the adapters library's module, which contains the adapter.
        target: the end of the path of the target, whose output changes.
        flag: the config field that switches this position on: `mh_adapter`, `output_adapter` or `cross_adapter`.
        residual: the name of a module in the target's parent. Its input is added to the target's output. Empty if the
            target already adds the residual.
        norm: the name of a module in the target's parent. It normalises the sum. Empty if the target already does so.
        within: a word that must be one of the parts of the common beginning; empty if there is no such condition.
    """

    models: tuple[str, ...]
    module: str
    target: str
    flag: str
    residual: str = ""
    norm: str = ""
    within: str = ""


BERT = ("bert", "bert-generation", "electra", "roberta", "xlm-roberta")
LLAMA = ("llama", "mistral", "qwen2", "qwen3")
T5 = ("mt5", "t5")
PRE_NORM_BART = ("mbart", "whisper")

RULES = (
    SublayerRule(BERT, ".crossattention.output", ".crossattention.output", "mh_adapter"),
    SublayerRule(BERT, ".attention.output", ".attention.output", "mh_adapter"),
    SublayerRule(BERT, ".output", ".output", "output_adapter"),
    SublayerRule(("vit",), ".output.output_adapters", ".output", "output_adapter"),
    SublayerRule(("vit",), ".attention_adapters", ".attention", "mh_adapter", "layernorm_before"),
    SublayerRule(("distilbert",), ".attention_adapters", ".attention", "mh_adapter", "attention", "sa_layer_norm"),
    SublayerRule(("distilbert",), ".output_adapters", ".ffn", "output_adapter", "ffn", "output_layer_norm"),
    SublayerRule(("gpt2",), ".attention_adapters", ".attn", "mh_adapter", "ln_1"),
    SublayerRule(("gpt2",), ".output_adapters", ".mlp", "output_adapter", "ln_2"),
    SublayerRule(LLAMA, ".attention_adapters", ".self_attn", "mh_adapter", "input_layernorm"),
    SublayerRule(LLAMA, ".output_adapters", ".mlp", "output_adapter", "post_attention_layernorm"),
    SublayerRule(T5, ".layer.0", ".layer.0.SelfAttention", "mh_adapter", "layer_norm"),
    SublayerRule(T5, ".layer.1", ".layer.1.EncDecAttention", "cross_adapter", "layer_norm", within="decoder"),
    SublayerRule(T5, ".layer.1", ".layer.1.DenseReluDense", "output_adapter", "layer_norm", within="encoder"),
    SublayerRule(T5, ".layer.2", ".layer.2.DenseReluDense", "output_adapter", "layer_norm", within="decoder"),
    SublayerRule(
        ("bart", "plbart"), ".attention_adapters", ".self_attn", "mh_adapter", "self_attn", "self_attn_layer_norm"
    ),
    SublayerRule(("bart", "plbart"), ".output_adapters", ".fc2", "output_adapter", "fc1", "final_layer_norm"),
    SublayerRule(
        ("bart", "plbart"), ".cross_attention_adapters", ".encoder_attn", "cross_adapter", "encoder_attn",
        "encoder_attn_layer_norm",
    ),
    SublayerRule(PRE_NORM_BART, ".attention_adapters", ".self_attn", "mh_adapter", "self_attn_layer_norm"),
    SublayerRule(PRE_NORM_BART, ".output_adapters", ".fc2", "output_adapter", "final_layer_norm"),
    SublayerRule(
        PRE_NORM_BART, ".cross_attention_adapters", ".encoder_attn", "cross_adapter", "encoder_attn_layer_norm"
    ),
)  # fmt: skip
"""All rules; more specific endings come first."""

MODELS = frozenset(chain.from_iterable(rule.models for rule in RULES))

EMBEDDINGS = {
    **dict.fromkeys((*BERT, "distilbert", "vit"), "embeddings"),
    **dict.fromkeys(LLAMA, "embed_tokens"),
    "gpt2": "drop",
}
"""The last module of the embeddings: invertible adapters change its output, and prompts are prepended to its output."""


def standing(path: str, model_type: str | None) -> tuple[str, SublayerRule] | None:
    """Return the target's path, and the rule, for the path of the library's module; None if no rule fits."""
    found = next((rule for rule in _rules(model_type) if _fits(path, rule.module, rule)), None)
    return None if found is None else (path.removesuffix(found.module) + found.target, found)


def hanging(path: str, residual: str, norm: str, model_type: str | None) -> tuple[str, SublayerRule] | None:
    """Return the path of the adapters library's module, and the rule, for a target's path; None if no rule fits."""
    for rule in _rules(model_type):
        if _fits(path, rule.target, rule) and (rule.residual, rule.norm) == (residual, norm):
            return path.removesuffix(rule.target) + rule.module, rule
    return None


def _rules(model_type: str | None) -> Iterator[SublayerRule]:
    return (rule for rule in RULES if model_type is None or model_type in rule.models)


def _fits(path: str, ending: str, rule: SublayerRule) -> bool:
    stem = path.removesuffix(ending)
    return path.endswith(ending) and stem != path and (not rule.within or rule.within in stem.split("."))
