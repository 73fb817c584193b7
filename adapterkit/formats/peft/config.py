"""Parse adapter_config.json. This module lists every field that any release of PEFT writes, and the field's effect."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

import msgspec

from ...errors import SAVE_WITH_PEFT, Malformed, Unsupported
from .families import FAMILIES, PEFT_TYPES, family_of_type

if TYPE_CHECKING:
    from ...io.strict_json import JsonValue

from .file import RESIDUAL, PeftSettings

OTHER_TYPES = {
    "BONE": "the older name of MiSS; rename .bone_ to .miss_ in the tensors' keys, and set peft_type to MISS",
}
"""Known values of `peft_type` that adapterkit cannot read, each with the reason or the remedy."""

READ = {
    "alora_invocation_tokens": "the method is aLoRA, and these tokens activate it",
    "alpha_pattern": "alpha of the modules that a pattern matches",
    "arrow_config": "the method is Arrow; its experts are in separate files",
    "enable_lora": "PEFT before 0.3: one boolean for each equal block of a fused weight; true if the block is adapted",
    "fan_in_fan_out": "whether the base stores its weights as [in, out]; only a hint, because the base's shapes decide",
    "feedforward_modules": "IA3: modules whose inputs are scaled",
    "init_lora_weights": "shows whether PEFT changed the base's weights; pissa and olora have their own formulas",
    "kasa_config": "the method is KaSA",
    "lora_B_layout": "Unsloth's field: the order of lora_B's columns for stacked experts",
    "lora_alpha": "scaling = lora_alpha / r",
    "lora_bias": "whether the adapter has a bias",
    "peft_type": "the method",
    "peft_version": "PEFT before 0.19 swaps inputs and outputs in lora_A and lora_B of most stacked experts",
    "r": "rank",
    "rank_pattern": "rank of the modules that a pattern matches",
    "target_parameters": "names of the parameters of stacked experts, in any order",
    "token_indices": "TRAINABLE_TOKENS: token ids of the stored rows",
    "trainable_token_indices": "token ids of the stored rows",
    "use_bdlora": "which modules have a block-diagonal factor, and the factor's number of blocks",
    "use_dora": "the method is DoRA",
    "use_rslora": "scaling = lora_alpha / sqrt(r)",
}
"""Fields that change the meaning of the tensors, with their effects."""

HARMLESS = {
    "auto_mapping": "the base's class",
    "base_model_name_or_path": "the base's name",
    "bias": "which biases were trained; the file contains these biases",
    "corda_config": "settings of an initialisation; see init_lora_weights",
    "ensure_weight_tying": "ties the adapters of tied layers in training; the file contains the adapter of each layer",
    "eva_config": "settings of an initialisation; see init_lora_weights",
    "exclude_modules": "selects the adapted modules, which the tensors' keys already show",
    "inference_mode": "training only",
    "init_ia3_weights": "initial values",
    "init_weights": "initial values",
    "layers_pattern": "selects the adapted modules, which the tensors' keys already show",
    "layers_to_transform": "selects the adapted modules, which the tensors' keys already show",
    "loftq_config": "settings of an initialisation; see init_lora_weights",
    "lora_dropout": "training only",
    "lora_ga_config": "settings of an initialisation; see init_lora_weights",
    "megatron_core": "the name of the library that megatron_config needs",
    "merge_weights": "PEFT before 0.3: whether to merge the adapter for inference; the outputs are the same",
    "modules_to_save": "which modules were trained whole; the file contains these modules",
    "monteclora_config": "adds noise in training; without the noise, the formula is plain LoRA's",
    "qalora_group_size": "a setting of use_qalora",
    "revision": "the base's revision",
    "runtime_config": "affects only the running process, not the result",
    "target_modules": "selects the adapted modules, which the tensors' keys already show",
    "task_type": "the base's class",
    "velora_config": "compresses the stored activations in training; the formula is plain LoRA's",
}
"""Fields that affect neither a merge nor a forward pass. Each value describes the field, or says why it is harmless."""

REFUSED = {
    "layer_replication": "layers of the base are repeated, and the layer numbers in the keys count the repeated layers",
    "megatron_config": "the tensors are split over the processes of Megatron's tensor parallelism",
    "use_qalora": "QA-LoRA averages groups of inputs before it applies A",
}
"""Fields that must be empty, with the reason why any other value is refused."""

TOOLS = {
    "_from_model_config": "transformers: whether a generation config was derived from the model's config",
    "lora_dtype": "ms-swift: the dtype in training; the tensors show the dtype in the file",
    "lorap_emb_lr": "ms-swift: LoRA+'s learning rate of embeddings",
    "lorap_lr_ratio": "ms-swift: LoRA+'s ratio of the learning rates of B and A",
    "model_type": "Cloudflare Workers AI: the base's type, which the service requires",
    "swift_type": "ms-swift: its name for peft_type",
    "transformers_version": "transformers: its release",
    "unsloth_version": "Unsloth: its release",
}
"""Fields that other tools add and that have no effect."""

PLAIN_INIT = ("eva", "gaussian", "mica", "orthogonal")
"""Values of `init_lora_weights` that leave the base unchanged."""

CHANGED_BASE = ("corda", "loftq", "lora_ga", "pissa_niter")
"""If `init_lora_weights` starts with one of these, PEFT changed the base's weights when it created the adapter."""

WHY_CHANGED = {
    "corda": "values computed from samples of the training data",
    "loftq": "a quantization error, which the file does not contain",
    "lora_ga": "values computed from gradients on the training data",
    "pissa_niter": "the result of a randomised decomposition, whose random numbers are not recorded",
}
"""For each entry of `CHANGED_BASE`, a description of the values that PEFT subtracted from the base. Errors show it."""


def peft_types() -> tuple[str, ...]:
    """Return the sorted values of `peft_type` that adapterkit can read."""
    return tuple(sorted((*PEFT_TYPES, *(family.peft_type for family in FAMILIES.values()))))


def parse(config: Mapping[str, JsonValue], *, strict: bool = False) -> PeftSettings:
    """Check every field of a config, and return the fields that affect the model's outputs.

    Args:
        config: the decoded adapter_config.json.
        strict: whether to refuse every field that PEFT does not define, even a harmless one.

    Raises:
        Malformed: a field has the wrong type.
        Unsupported: a field, or the value of a field, is unknown and may change the model's outputs.
    """
    _check_type(config)
    family = family_of_type(str(config["peft_type"]))
    for name, value in config.items():
        if family is None or name not in {**family.read, **family.harmless}:
            _check_field(name, value, strict)
    own_fields = {"method_fields"} if family is None else {"method_fields", *family.method_fields.__struct_fields__}
    common = {*PeftSettings.__struct_fields__} - own_fields
    known = {name: value for name, value in config.items() if name in common}
    try:
        config_fields = None if family is None else msgspec.convert(dict(config), family.method_fields)
        settings = msgspec.structs.replace(msgspec.convert(known, PeftSettings), method_fields=config_fields)
    except msgspec.ValidationError as error:
        why, _, place = str(error).partition(" - at ")
        where = place.strip("`").removeprefix("$.") or "adapter_config.json"
        raise Malformed(why, where=where, cure=SAVE_WITH_PEFT) from None
    _check_init(settings.init_lora_weights)
    _check_variants(settings)
    return settings


def _check_type(config: Mapping[str, JsonValue]) -> None:
    peft_type = config.get("peft_type")
    if not isinstance(peft_type, str):
        raise Malformed("the config has no peft_type", where="peft_type", cure="Use a config that PEFT wrote")
    if peft_type not in PEFT_TYPES and family_of_type(peft_type) is None:
        if peft_type in OTHER_TYPES:
            raise Unsupported(
                f"PEFT's {peft_type}: {OTHER_TYPES[peft_type]}", where="peft_type", cure="Run the adapter with PEFT"
            )
        known = f"Known: {', '.join(peft_types())}"
        raise Unsupported(f"this version does not know the peft_type {peft_type}", where="peft_type", cure=known)


def unknown_fields(config: Mapping[str, JsonValue]) -> list[str]:
    """Return a sorted list of the nonempty fields that PEFT does not define.

    Call `parse` first: `parse` refuses every such field that may change the model's outputs.
    """
    family = family_of_type(str(config["peft_type"]))
    known = READ.keys() | HARMLESS.keys() | REFUSED.keys()
    if family is not None:
        known = known | family.read.keys() | family.harmless.keys()
    return sorted(name for name, value in config.items() if value and name not in known)


def _check_field(name: str, value: object, strict: bool) -> None:
    if name in READ or name in HARMLESS:
        return
    if name in REFUSED:
        if value:
            raise Unsupported(f"{REFUSED[name]}; this version cannot read such adapters", where=name, cure=_WITH_PEFT)
        return
    if strict:
        why = "PEFT does not define this field"
        cure = "Omit --strict (strict=True) to accept fields that cannot change the maths"
        raise Unsupported(why, where=name, cure=cure)
    if value and name not in TOOLS and not _is_marker(name, value):
        why = f"this version does not know this field, and its value {str(value)[:60]} may change the maths"
        raise Unsupported(why, where=name, cure="Upgrade adapterkit, or remove the field if it is known to be harmless")


def _is_marker(name: str, value: object) -> bool:
    """Whether an unknown field is only a record of the file's origin, such as the author, a date or a training run.

    A string is a record if `_RECORD` matches the field's name, or if the string looks like a version number, a date, a
    UUID or a digest. Any other string, any number and `true` may change the model's outputs. For example, Unsloth's
    `lora_B_layout` is a string that selects the order of lora_B's columns (unslothai/unsloth-zoo#1232). A list or dict
    is a record if each of its values is a record or is empty.
    """
    if isinstance(value, Mapping):
        return all(not inner or _is_marker(str(key), inner) for key, inner in value.items())
    if isinstance(value, list):
        return all(not inner or _is_marker(name, inner) for inner in value)
    if not isinstance(value, str):
        return False
    return _RECORD.fullmatch(name) is not None or _STAMP.fullmatch(value) is not None


_OTHER_FORMULAS = (
    "use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "modules_to_save", "target_parameters",
    "alora_invocation_tokens", "arrow_config", "kasa_config", "use_bdlora", *REFUSED,
)  # fmt: skip


def field_of_another_formula(config: Mapping[str, object]) -> str | None:
    """Return the name of a field that makes the tensors something other than LoRA pairs with one rank and one alpha.

    Return None if there is none. Formats whose folders have PEFT's config, but only such pairs, must refuse a config
    with such a field.
    """
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower() not in PLAIN_INIT:
        return "init_lora_weights"
    return next((name for name in _OTHER_FORMULAS if config.get(name)), None)


def _check_variants(settings: PeftSettings) -> None:
    """Check that the config selects at most one variant of LoRA.

    Also refuse `lora_bias` or `target_parameters` if PEFT cannot combine the field with the selected variant.
    """
    variants_on = {
        "use_bdlora": settings.use_bdlora is not None,
        "kasa_config": settings.kasa_config is not None,
        "init_lora_weights": bool(settings.residual),
        "arrow_config": settings.arrow_config is not None,
        "alora_invocation_tokens": settings.alora_invocation_tokens is not None,
        "use_dora": bool(settings.use_dora),
    }
    named = [name for name, on in variants_on.items() if on]
    biased = bool(named) and named[0] in ("alora_invocation_tokens", "use_dora")
    others = () if not named or named[0] == "use_dora" else ("target_parameters",) if biased else _APART
    named += [name for name in others if getattr(settings, name)]
    if len(named) > 1:
        raise Unsupported(f"{named[0]} and {named[1]} cannot be combined", where=named[0], cure=_WITH_PEFT)


def _check_init(value: bool | str | None) -> None:
    if not isinstance(value, str) or value.lower() in (*PLAIN_INIT, *RESIDUAL):
        return
    known = next((name for name in CHANGED_BASE if value.lower().startswith(name)), None)
    if known:
        raise Unsupported(
            f"with {value}, PEFT changes the base's weights when it creates the adapter: "
            f"PEFT subtracts {WHY_CHANGED[known]}",
            where="init_lora_weights",
            cure="Save a plain LoRA: pass path_initial_model_for_weight_conversion=... to PEFT's save_pretrained",
        )
    raise Unsupported(f"the initialisation {value!r} is unknown", where="init_lora_weights", cure=_WITH_PEFT)


_RECORD = re.compile(
    r"(?i)(?:.*_)?(?:version|uuid|run|(?:run|job|trial|experiment|session|commit)_id|commit|sha\d*|hash|digest|date|timestamp"
    r"|(?:created|saved|trained|written|exported|generated)_(?:at|on|by|with)|author|user|project|experiment|license"
    r"|description|comments?|notes?|tags?)"
)
"""Matches the names of fields whose strings are only records, such as `created_at`."""

_STAMP = re.compile(
    r"v?\d+\.\d+\.\d+[\w.+-]*"  # a version number: 0.18.1.dev0
    r"|\d{4}-\d\d-\d\d(?:[T ][\d:.,]+(?:Z|[+-]\d\d:?\d\d)?)?"  # a date, with or without the time
    r"|(?i:[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}|[0-9a-f]{32}|[0-9a-f]{40}|[0-9a-f]{64})"  # a UUID or a digest
)

_APART = ("lora_bias", "target_parameters")
_WITH_PEFT = "Merge the adapter with PEFT"
