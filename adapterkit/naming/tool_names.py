"""Translate module names between spec/architectures and tools for language models, in both directions.

"Our name" is the key of a weight in spec/architectures. A table has pairs of templates: the template of our name, and
the template of the tool's name for the same module.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from functools import cache, cached_property
from typing import TYPE_CHECKING

from ..errors import PASS_BASE, USE_ITS_BASE, TargetNotFound, nearest
from .architectures import namings_of

if TYPE_CHECKING:
    from ..io.lazy import Lazy
    from ..io.safetensors import Entry


PREFIXES = ("base_model.model.", "language_model.model.", "model.language_model.", "language_model.")
"""Prefixes that PEFT (`base_model.model.`) and multimodal bases put before the names of the language model."""


class NameTable:
    """A one-to-one table between our names and a tool's names.

    Args:
        pairs: a map from our templates to the tool's templates; both have the same placeholders.
    """

    def __init__(self, pairs: Mapping[str, str]) -> None:
        self.pairs = dict(pairs)
        assert len({*self.pairs.values()}) == len(self.pairs), "two of our names have the same name in the tool"

    def there(self, name: str) -> str | None:
        """Translate our name `name` to the tool's name; None if the table does not have our name."""
        return _translate(name, self._there)

    def back(self, foreign: str) -> str | None:
        """Translate the tool's name `foreign` to our name; None if the table does not have the tool's name."""
        return _translate(foreign, self._back)

    @cached_property
    def _there(self) -> dict[str, str]:
        return {_shape(name): foreign for name, foreign in self.pairs.items()}

    @cached_property
    def _back(self) -> dict[str, str]:
        return {_shape(foreign): name for name, foreign in self.pairs.items()}


class TableNames:
    """Translate names with a `NameTable`, for a base whose names may have a prefix that the table's names lack.

    Args:
        table: the table of the base's family.
        modules: the base's names, if known. `back` then returns only names that the base has. The returned names have
            the base's prefix, such as `language_model.`.
    """

    def __init__(self, table: NameTable, modules: Iterable[str] | None = None) -> None:
        self.table = table
        self.walked: dict[str, list[str]] | None = None
        if modules is not None:
            self.walked = {}
            for name in dict.fromkeys(modules):
                foreign = self.there(name)
                if foreign is not None:
                    self.walked.setdefault(foreign, []).append(name)

    def there(self, hub_path: str) -> str | None:
        """Translate our name, with or without a prefix, to the tool's name; None if the table lacks our name."""
        return next(filter(None, (self.table.there(name) for name in without_prefix(hub_path))), None)

    def known(self, foreign: str) -> bool:
        """Whether the base has at least one module with this name of the tool."""
        return self.walked is None or foreign in self.walked

    def back(self, foreign: str) -> str:
        """Translate a tool's name to our name.

        Raises:
            TargetNotFound: the table does not have the tool's name. Or `modules` was given, and this name stands for no
                module of the base, or for more than one.
        """
        if self.walked is None:
            name = self.table.back(foreign)
            if name is None:
                cure = nearest(foreign, self.table.pairs.values()) or PASS_BASE
                raise TargetNotFound("the family's table does not have this name", where=foreign, cure=cure)
            return name
        names = self.walked.get(foreign, [])
        if len(names) != 1:
            why = f"exactly one module must have this name, but the base has {', '.join(names) or 'none'}"
            cure = nearest(foreign, self.walked) or USE_ITS_BASE
            raise TargetNotFound(why, where=foreign, cure=cure)
        return names[0]


def without_prefix(name: str) -> Iterable[str]:
    """Yield the name. If it begins with a prefix in `PREFIXES`, also yield the name without this prefix.

    A shortened name may begin with another prefix, which is removed in the same way. If a shortened name does not begin
    with `model.`, also yield it with `model.` in front.
    """
    yield name
    for prefix in PREFIXES:
        if name.startswith(prefix):
            rest = name.removeprefix(prefix)
            yield from without_prefix(rest)
            if not rest.startswith("model."):
                yield from without_prefix(f"model.{rest}")


def modules_of(names: Iterable[str]) -> Iterable[str]:
    """Yield the name of each stored tensor and, for a weight or a bias, also the name of its module."""
    for name in names:
        yield name
        module, _, leaf = name.rpartition(".")
        if leaf in ("weight", "bias"):
            yield module


_NUMBER = re.compile(r"(?<![^.])(0|[1-9][0-9]{0,8})(?![^.])")
_HOLE = re.compile(r"\{[a-z]\}")


def _shape(template: str) -> str:
    return _HOLE.sub("#", template)


def _translate(name: str, table: Mapping[str, str]) -> str | None:
    template = table.get(_NUMBER.sub("#", name))
    if template is None:
        return None
    numbers = iter(_NUMBER.findall(name))
    return _HOLE.sub(lambda _: next(numbers), template)


# litgpt's names of modules (from spec/architectures/namings), and the setting that enables LoRA for each module.


LITGPT_QKV = "attn.qkv"


@cache
def litgpt_parts() -> dict[str, str]:
    """Return a map from `query`, `key` and `value` to our templates, in the order of the fused projection's rows."""
    return {place.qkv: key for key, place in namings_of("litgpt")[0].places().items() if place.qkv is not None}


@cache
def litgpt_table() -> NameTable:
    """Return the `NameTable` of litgpt's modules that may have LoRA, except the fused projection `attn.qkv`."""
    places = namings_of("litgpt")[0].places()
    names = {key: place.name for key, place in places.items() if place.name.endswith(tuple(FLAGS))}
    return NameTable(names | {"lm_head": "lm_head"})


FLAGS = {"attn.proj": "projection", "mlp.fc_1": "mlp", "mlp.fc_2": "mlp", "mlp.proj": "mlp", "lm_head": "head"}
"""A map from the end of a module's name to litgpt's setting that enables LoRA for this module.

The names of the settings are written without `lora_`.
"""

MLP = ("LLaMAMLP", "GemmaMLP")
"""The MLP classes (litgpt's setting `mlp_class_name`) whose modules are in the table."""

_LITGPT_KEY = re.compile(
    r"(?:transformer\.h\.\d+\.(?:attn\.(?:qkv|attn|proj)|mlp\.(?:fc|fc_1|fc_2|proj))|lm_head)\.lora_[AB]"
)


def is_litgpt(keys: Collection[str]) -> bool:
    """Whether all keys match the pattern of litgpt's LoRA keys, and at least one is in a transformer layer."""
    return any(key.startswith("transformer.h.") for key in keys) and all(_LITGPT_KEY.fullmatch(key) for key in keys)


# Megatron's names of adapter modules. Each name is mapped to the transformers modules whose weights Megatron fuses into
# the adapted layer.
#
# Sources: Megatron-Bridge's peft/lora.py and peft/canonical_lora.py; NeMo 1's adapter_mixins.py.


QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
"""The parts of the fused projection. For each group of query heads, the projection has the rows of these query heads,
then the rows of their key head, then the rows of their value head."""

GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
"""The parts of the fused MLP projection. All rows of gate come before all rows of up, as in a model without tensor
parallelism."""


@cache
def bridge() -> dict[str, tuple[str, ...]]:
    """Return a map from each adapter module of Megatron-Bridge and NeMo 2 to our modules.

    Names are relative to the layer.

    Canonical LoRA has separate factors for each part of a fused weight. The factors of `q_proj`, for example, are in
    the adapter module `adapter_q`.
    """
    fused: dict[str, list[str]] = {}
    for key, place in namings_of("megatron")[0].places().items():
        fused.setdefault(place.name.rpartition("{n}.")[2], []).append(key.rpartition("{n}.")[2])
    by_module: dict[str, tuple[str, ...]] = {}
    for module, names in fused.items():
        by_module[f"{module}.adapter"] = tuple(names)
        for each in names if len(names) > 1 else ():
            by_module[f"{module}.adapter.adapter_{each.rpartition('.')[2].partition('_')[0]}"] = (each,)
    return by_module


_ATTENTION, _MLP = "self_attention.adapter_layer.", "mlp.adapter_layer."
NEMO = {
    _ATTENTION + "lora_kqv_adapter": QKV,
    _ATTENTION + "lora_unfused_kqv_adapter.q_adapter": QKV[:1],
    _ATTENTION + "lora_unfused_kqv_adapter.k_adapter": QKV[1:2],
    _ATTENTION + "lora_unfused_kqv_adapter.v_adapter": QKV[2:],
    _ATTENTION + "lora_dense_attention_adapter": ("self_attn.o_proj",),
    _MLP + "lora_hto4h_adapter": GATE_UP,
    _MLP + "lora_unfused_hto4h_adapter.gate_adapter": GATE_UP[:1],
    _MLP + "lora_unfused_hto4h_adapter.up_adapter": GATE_UP[1:],
    _MLP + "lora_4htoh_adapter": ("mlp.down_proj",),
}
"""A map from each adapter module of NeMo 1 to our modules; names are relative to the layer."""

LAYER = re.compile(r"(?P<prefix>(?:\w+\.)*layers\.)(?P<n>\d{1,9})\.(?P<module>.+)")
"""Matches the name of a module in a layer. Any prefix is allowed, because each wrapper around a model adds a prefix."""

LAYER_PATH = re.compile(r"(?:\w+\.)*layers\.(?P<n>\d{1,9})\.(?P<module>.+)")

# The names in Tinker's adapters that differ from PEFT's names.
#
# Source: weights in tinker-cookbook, https://github.com/thinking-machines-lab/tinker-cookbook


EXPERTS = {
    "model.layers.{n}.mlp.experts.{e}.gate_proj": "model.layers.{n}.mlp.experts.w1",
    "model.layers.{n}.mlp.experts.{e}.down_proj": "model.layers.{n}.mlp.experts.w2",
    "model.layers.{n}.mlp.experts.{e}.up_proj": "model.layers.{n}.mlp.experts.w3",
    "model.layers.{n}.mixer.experts.{e}.up_proj": "model.layers.{n}.mixer.experts.w1",
    "model.layers.{n}.mixer.experts.{e}.down_proj": "model.layers.{n}.mixer.experts.w2",
}
"""A map from our template for one expert's module to Tinker's template for the stack of all experts."""

HEAD = {"lm_head": "model.unembed_tokens"}

ATTENTION = NameTable(
    {f"model.layers.{{n}}.self_attn.{part}_proj": f"model.layers.{{n}}.attn.{part}_proj" for part in "qkvo"}
)
"""Tinker's names of the attention in gpt-oss. In its other models, the attention has the same name as in ours."""

FUSED = {
    "linear_attn.in_proj_qkv": ("linear_attn.in_proj_q", "linear_attn.in_proj_k", "linear_attn.in_proj_v"),
    "mixer.in_proj": ("mixer.gate_proj", "mixer.x_proj"),
}
"""The parts of a fused weight that have separate adapters in Tinker: Qwen3.5's linear attention and Nemotron 3's Mamba.
The parts have consecutive rows of the weight, from the first row on."""

_MARKS = tuple(
    f".{module}.lora_{factor}.weight"
    for module in (
        "unembed_tokens",
        *(f"mlp.experts.w{number}" for number in (1, 2, 3)),
        *(f"mixer.experts.w{number}" for number in (1, 2)),
        *(parts[0] for parts in FUSED.values()),
    )
    for factor in "AB"
)
"""Endings of keys that occur only in Tinker's files. They include only the first part of each fused weight, because
Mamba also has a module `mixer.x_proj`."""


def is_tinker(keys: Iterable[str]) -> bool:
    """Whether at least one key is of a kind that occurs only in Tinker's files."""
    return any(key.endswith(_MARKS) for key in keys)


# Recognise adapters whose experts share the outer LoRA factors, as SGLang and Megatron-Bridge store them.
#
# Sources: SGLang's lora/mem_pool.py (`--experts-shared-outer-loras`, sglang #21466 and #25141) and Megatron-Bridge's
# export of such adapters (#5588, #6076).


INNER = ("gate_proj", "up_proj", "gate_up_proj", "w1", "w3")
"""Expert modules that read the hidden states. All experts have the same factor A for such a module."""

OUTER = ("down_proj", "w2")
"""Expert modules that output the hidden states. All experts have the same factor B for such a module."""

STACK = re.compile(rf"(?P<stem>.*\.experts)\.(?P<leaf>{'|'.join((*INNER, *OUTER))})")
"""Matches the module's name in the key of a tensor that stacks the factors of all experts."""

EXPERT = re.compile(rf"(?P<stem>.*\.experts)\.(?P<e>\d{{1,9}})\.(?P<leaf>{'|'.join((*INNER, *OUTER))})")
"""Matches the module's name in the key of one expert's factor.

A file with such keys may also have a key without an expert's number, for the factor that all experts share. `STACK`
matches the module's name in this key.
"""


def is_shared_outer(entries: Mapping[str, Lazy | Entry]) -> bool:
    """Whether a file stores shared outer factors as SGLang does: tensors with three axes hold the experts' factors."""
    # Check shapes first: counting axes excludes nearly every other file, and is faster than parsing 90,000 keys.
    stacks = [key for key, entry in entries.items() if len(entry.shape) == 3]
    return any(map(_is_stack, stacks)) and not is_tinker(entries)


def _is_stack(key: str) -> bool:
    return key.endswith(_ENDS) and STACK.fullmatch(key[: -len(_ENDS[0])]) is not None


_ENDS = (".lora_A.weight", ".lora_B.weight")
