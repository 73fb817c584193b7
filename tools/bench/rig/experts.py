"""Writes bases and adapters with tens of thousands of targets: mixtures of experts in sparse files of zeros.

Only the headers take space on the disk. Names, shapes and shards are those of the published models.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

Shape = tuple[int, ...]
Tensor = tuple[str, str, Shape]
"""Name, dtype in safetensors' notation, shape."""

SIZES = {"BF16": 2, "F32": 4}


@dataclass(frozen=True, slots=True)
class Model:
    """The shape of a mixture of experts.

    Attributes:
        model_type: the `model_type` of the config.
        layers: the number of layers.
        dense: the number of first layers with one feed-forward network instead of experts.
        experts: the number of experts in each other layer.
        shared: whether those layers also have a shared expert.
        hidden: the width of the residual stream.
        ffn: the inner width of a dense network.
        moe: the inner width of an expert.
        vocabulary: the number of rows of the embedding.
        shards: the number of weight files.
        attention: module -> `[out, in]`.
    """

    model_type: str
    layers: int
    dense: int
    experts: int
    shared: bool
    hidden: int
    ffn: int
    moe: int
    vocabulary: int
    shards: int
    attention: Mapping[str, tuple[int, int]]

    def linears(self, layer: int) -> Iterator[tuple[str, tuple[int, int]]]:
        """Return path and `[out, in]` of every linear layer of a block, except the router."""
        at = f"model.layers.{layer}"
        for name, shape in self.attention.items():
            yield f"{at}.self_attn.{name}", shape
        if layer < self.dense:
            yield from self._network(f"{at}.mlp", self.ffn)
            return
        for expert in range(self.experts):
            yield from self._network(f"{at}.mlp.experts.{expert}", self.moe)
        if self.shared:
            yield from self._network(f"{at}.mlp.shared_experts", self.moe)

    def _network(self, at: str, inner: int) -> Iterator[tuple[str, tuple[int, int]]]:
        yield f"{at}.gate_proj", (inner, self.hidden)
        yield f"{at}.up_proj", (inner, self.hidden)
        yield f"{at}.down_proj", (self.hidden, inner)

    def targets(self) -> dict[str, tuple[int, int]]:
        """Return path and `[out, in]` of every linear layer."""
        return {path: shape for layer in range(self.layers) for path, shape in self.linears(layer)}

    def weights(self) -> Iterator[Tensor]:
        """Return every tensor of the base."""
        yield "model.embed_tokens.weight", "BF16", (self.vocabulary, self.hidden)
        for layer in range(self.layers):
            for path, shape in self.linears(layer):
                yield f"{path}.weight", "BF16", shape
            at = f"model.layers.{layer}"
            if layer >= self.dense:
                yield f"{at}.mlp.gate.weight", "BF16", (self.experts, self.hidden)
            yield f"{at}.input_layernorm.weight", "BF16", (self.hidden,)
            yield f"{at}.post_attention_layernorm.weight", "BF16", (self.hidden,)
        yield "model.norm.weight", "BF16", (self.hidden,)
        yield "lm_head.weight", "BF16", (self.vocabulary, self.hidden)

    def of_width(self, width: int) -> Model:
        """Return a model with the same modules, in which every matrix is `[width, width]`."""
        attention = dict.fromkeys(self.attention, (width, width))
        return replace(self, hidden=width, ffn=width, moe=width, vocabulary=width, shards=8, attention=attention)


MODELS = {
    "deepseek_v3": Model(
        "deepseek_v3", 61, 3, 256, True, 7168, 18432, 2048, 129280, 163,
        {
            "q_a_proj": (1536, 7168), "q_b_proj": (24576, 1536), "kv_a_proj_with_mqa": (576, 7168),
            "kv_b_proj": (32768, 512), "o_proj": (7168, 16384),
        },
    ),
    "qwen3_moe": Model(
        "qwen3_moe", 48, 0, 128, False, 2048, 6144, 768, 151936, 16,
        {"q_proj": (4096, 2048), "k_proj": (512, 2048), "v_proj": (512, 2048), "o_proj": (2048, 4096)},
    ),
}  # fmt: skip
"""DeepSeek-V3, 671 B parameters, and Qwen3-30B-A3B."""


def write_base(dest: Path, model: Model) -> None:
    """Write config, index and shards of about equal size."""
    dest.mkdir(parents=True)
    weights = list(model.weights())
    limit = math.ceil(sum(nbytes(dtype, shape) for _, dtype, shape in weights) / model.shards)
    cut: list[list[Tensor]] = [[]]
    filled = 0
    for name, dtype, shape in weights:
        if filled >= limit * len(cut):
            cut.append([])
        cut[-1].append((name, dtype, shape))
        filled += nbytes(dtype, shape)
    index: dict[str, str] = {}
    for number, shard in enumerate(cut, 1):
        file = f"model-{number:05}-of-{len(cut):06}.safetensors"
        index |= {name: file for name, _, _ in shard}
        write_sparse(dest / file, shard)
    record = {"metadata": {"total_size": filled}, "weight_map": index}
    (dest / "model.safetensors.index.json").write_text(json.dumps(record), encoding="utf-8")
    config = {
        "architectures": ["CausalLM"], "model_type": model.model_type, "hidden_size": model.hidden,
        "num_hidden_layers": model.layers, "vocab_size": model.vocabulary, "tie_word_embeddings": False,
    }  # fmt: skip
    (dest / "config.json").write_text(json.dumps(config), encoding="utf-8")


def write_adapter(dest: Path, model: Model, kind: str, rank: int = 1) -> None:
    """Write a PEFT adapter of every linear layer.

    Args:
        dest: the folder to create.
        model: the model to adapt.
        kind: `lora` has two tensors per target, `dora` three; `stacked` adapts experts by `target_parameters`, with one
            pair of factors for all experts of a layer's parameter.
        rank: the rank of every pair.
    """
    dest.mkdir(parents=True)
    config: dict[str, Any] = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": None, "r": rank, "lora_alpha": rank,
        "rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False, "use_dora": kind == "dora", "lora_dropout": 0.0,
        "bias": "none", "fan_in_fan_out": False, "modules_to_save": None, "inference_mode": True,
        "peft_version": "0.21.2",
    }  # fmt: skip
    paths = model.targets()
    if kind == "stacked":
        paths = {path: shape for path, shape in paths.items() if ".experts." not in path}
        config["target_parameters"] = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config["target_modules"] = sorted({path.rpartition(".")[2] for path in paths})
    if kind == "stacked":
        config["target_modules"] = sorted({".".join(path.rsplit(".", 2)[1:]) for path in paths})
    tensors = [each for path, shape in paths.items() for each in _factors(path, shape, rank, kind == "dora")]
    if kind == "stacked":
        for layer in range(model.dense, model.layers):
            at = f"model.layers.{layer}.mlp.experts"
            columns = rank * model.experts
            tensors += _factors(f"{at}.base_layer", (2 * model.moe, model.hidden), columns, False)
            tensors += _factors(at, (model.hidden, model.moe), columns, False)
    write_sparse(dest / "adapter_model.safetensors", sorted(tensors))
    (dest / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")


def _factors(path: str, shape: tuple[int, int], rank: int, dora: bool) -> list[Tensor]:
    out, width = shape
    key = f"base_model.model.{path}.lora_"
    magnitude = [(f"{key}magnitude_vector", "BF16", (out,))] if dora else []
    return [
        (f"{key}A.weight", "BF16", (rank, width)),
        (f"{key}B.weight", "BF16", (out, rank)),
        *magnitude,
    ]


def write_sparse(path: Path, tensors: Iterable[Tensor]) -> None:
    """Write a safetensors file whose data is a hole."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, dtype, shape in tensors:
        start, end = end, end + nbytes(dtype, shape)
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        out.truncate(out.tell() + end)


def nbytes(dtype: str, shape: Shape) -> int:
    """Return the size of a tensor."""
    return math.prod(shape) * SIZES[dtype]
