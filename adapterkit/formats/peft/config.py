"""Parse the config: every field that PEFT has ever written, its effect, and typed values of the fields that matter."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import msgspec

from ...errors import Malformed, Unsupported
from .families import FAMILIES, PEFT_TYPES, family_of_type
from .settings import RESIDUAL, Settings

if TYPE_CHECKING:
    from ...io.strict_json import JsonValue


OTHER_TYPES = {
    "BONE": "the older name of MiSS: rename .bone_ to .miss_ in the keys, and peft_type to MISS",
}
"""Known types that are not read, with the reason."""

READ = {
    "alora_invocation_tokens": "the law is aLoRA's, and these activate it",
    "alpha_pattern": "alpha of the modules it matches",
    "arrow_config": "the law is Arrow's, of experts in files of their own",
    "enable_lora": "before 0.3: which equal blocks of a fused weight are adapted",
    "fan_in_fan_out": "the base stores its weights [in, out]; a hint, shapes of the base decide",
    "feedforward_modules": "IA3: modules whose inputs are scaled",
    "init_lora_weights": "whether the base was changed when the adapter was made; pissa and olora: laws of their own",
    "kasa_config": "the law is KaSA's",
    "lora_B_layout": "Unsloth's mark: the order of the columns of lora_B of stacked experts",
    "lora_alpha": "scaling = lora_alpha / r",
    "lora_bias": "the adapter carries a bias of its own",
    "peft_type": "which law",
    "peft_version": "before 0.19, lora_A and lora_B of stacked experts changed places",
    "r": "rank",
    "rank_pattern": "rank of the modules it matches",
    "target_parameters": "names of the parameters of stacked experts, in no order",
    "token_indices": "TRAINABLE_TOKENS: numbers of the stored rows",
    "trainable_token_indices": "numbers of the stored rows",
    "use_bdlora": "which modules have a block-diagonal factor, and of how many blocks",
    "use_dora": "the law is DoRA's",
    "use_rslora": "scaling = lora_alpha / sqrt(r)",
}
"""Fields that change what the tensors mean."""

HARMLESS = {
    "auto_mapping": "class of the base",
    "base_model_name_or_path": "name of the base",
    "bias": "which biases were trained; those are in the file",
    "corda_config": "setting of an initialisation, see init_lora_weights",
    "ensure_weight_tying": "ties the adapters of tied layers in training; the file holds each",
    "eva_config": "setting of an initialisation, see init_lora_weights",
    "exclude_modules": "which modules have tensors; the keys say so",
    "inference_mode": "training only",
    "init_ia3_weights": "initial values",
    "init_weights": "initial values",
    "layers_pattern": "which modules have tensors; the keys say so",
    "layers_to_transform": "which modules have tensors; the keys say so",
    "loftq_config": "setting of an initialisation, see init_lora_weights",
    "lora_dropout": "training only",
    "lora_ga_config": "setting of an initialisation, see init_lora_weights",
    "megatron_core": "name of a library, see megatron_config",
    "merge_weights": "before 0.3: when to fold; the sum is the same",
    "modules_to_save": "which modules were trained whole; those are in the file",
    "monteclora_config": "noise in training; without it the law is plain LoRA's",
    "qalora_group_size": "setting of use_qalora",
    "revision": "revision of the base",
    "runtime_config": "settings of one process",
    "target_modules": "which modules have tensors; the keys say so",
    "task_type": "class of the base",
    "velora_config": "compressed gradients in training; the law is plain LoRA's",
}
"""Fields that have no effect on a merge or a forward pass."""

REFUSED = {
    "layer_replication": "it repeats layers of the base, and keys count the repeated ones",
    "megatron_config": "its tensors are split over Megatron's ranks",
    "use_qalora": "QA-LoRA averages groups of inputs before A",
}
"""Fields that must be off, with the reason."""

TOOLS = {
    "_from_model_config": "transformers: whether a generation config was derived from the model's",
    "lora_dtype": "ms-swift: element type in training; the file has its own",
    "lorap_emb_lr": "ms-swift: learning rate of LoRA+",
    "lorap_lr_ratio": "ms-swift: learning rate of LoRA+",
    "model_type": "Cloudflare Workers AI: the base's type, which it asks for",
    "swift_type": "ms-swift: its name for peft_type",
    "transformers_version": "transformers: its release",
    "unsloth_version": "Unsloth: its release",
}
"""Fields that other tools add and that have no effect, whatever their values."""

PLAIN_INIT = ("eva", "gaussian", "mica", "orthogonal")
"""Initialisations that leave the base unchanged."""

CHANGED_BASE = ("corda", "loftq", "lora_ga", "pissa_niter")
"""Initialisations that subtract from the base what they put into the adapter; the first words of the value."""

WHY_CHANGED = {
    "corda": "what samples of its training data gave",
    "loftq": "the error of a quantization that the file does not hold",
    "lora_ga": "what gradients of its training data gave",
    "pissa_niter": "a randomised decomposition, whose random numbers are gone",
}
"""The value that was subtracted."""


def peft_types() -> tuple[str, ...]:
    """List the values of `peft_type` that are read, sorted."""
    return tuple(sorted((*PEFT_TYPES, *(family.peft_type for family in FAMILIES.values()))))


def parse(config: Mapping[str, Any], *, strict: bool = False) -> Settings:
    """Check every field of a config and return the typed settings.

    Args:
        config: the decoded adapter_config.json.
        strict: refuse every field that PEFT does not have, even harmless ones.

    Raises:
        Malformed: a field has the wrong type.
        Unsupported: a field has a value that this version does not know and that may change the function.
    """
    _check_type(config)
    family = family_of_type(config["peft_type"])
    for name, value in config.items():
        if family is None or name not in {**family.read, **family.harmless}:
            _check_field(name, value, strict)
    own_fields = {"own"} if family is None else {"own", *family.own.__struct_fields__}
    common = {*Settings.__struct_fields__} - own_fields
    known = {name: value for name, value in config.items() if name in common}
    try:
        own = None if family is None else msgspec.convert(dict(config), family.own)
        settings = msgspec.structs.replace(msgspec.convert(known, Settings), own=own)
    except msgspec.ValidationError as error:
        why, _, place = str(error).partition(" - at ")
        where = place.strip("`").removeprefix("$.") or "adapter_config.json"
        raise Malformed(why, where=where, cure=_REWRITE) from None
    _check_init(settings.init_lora_weights)
    _check_laws(settings)
    return settings


def _check_type(config: Mapping[str, JsonValue]) -> None:
    found = config.get("peft_type")
    if not isinstance(found, str):
        raise Malformed("no peft_type", where="peft_type", cure="This is not a config of PEFT's")
    if found not in PEFT_TYPES and family_of_type(found) is None:
        if found in OTHER_TYPES:
            raise Unsupported(
                f"PEFT's {found}: {OTHER_TYPES[found]}", where="peft_type", cure="Run it with PEFT itself"
            )
        known = f"Known: {', '.join(peft_types())}"
        raise Unsupported(f"PEFT's {found} is not known to this version", where="peft_type", cure=known)


def unknown_fields(config: Mapping[str, Any]) -> list[str]:
    """List the fields that are set and that PEFT does not have, sorted; `parse` has checked that they are harmless."""
    family = family_of_type(config["peft_type"])
    known = READ.keys() | HARMLESS.keys() | REFUSED.keys()
    if family is not None:
        known = known | family.read.keys() | family.harmless.keys()
    return sorted(name for name, value in config.items() if value and name not in known)


def _check_field(name: str, value: object, strict: bool) -> None:
    if name in READ or name in HARMLESS:
        return
    if name in REFUSED:
        if value:
            raise Unsupported(f"{REFUSED[name]}; not known to this version", where=name, cure=_WITH_PEFT)
        return
    if strict:
        why = "a field that PEFT does not have"
        cure = "Leave --strict (strict=True) out to accept the fields that cannot change the maths"
        raise Unsupported(why, where=name, cure=cure)
    if value and name not in TOOLS and not _is_marker(name, value):
        why = f"a field that this version does not know, set to {str(value)[:60]}: it may change the maths"
        raise Unsupported(
            why, where=name, cure="Upgrade adapterkit, or take the field out if it is known to be harmless"
        )


def _is_marker(name: str, value: object) -> bool:
    """Whether an unknown field only records who wrote the file, when, or in which run.

    Text counts by the field's name or by its own form: a release, a date, a digest. Other text does not: Unsloth's
    `lora_B_layout` has the values `rank_major` and `grouped_by_expert`, which are two orders of the same numbers
    (unslothai/unsloth-zoo#1232). Numbers and true never count. Lists and dicts count if everything in them does.
    """
    if isinstance(value, Mapping):
        return all(not inner or _is_marker(str(key), inner) for key, inner in value.items())
    if isinstance(value, list):
        return all(not inner or _is_marker(name, inner) for inner in value)
    if not isinstance(value, str):
        return False
    return _RECORD.fullmatch(name) is not None or _STAMP.fullmatch(value) is not None


def _check_laws(settings: Settings) -> None:
    """Allow one method a file; PEFT supports some methods only for modules, and without a bias of their own."""
    laws = {
        "use_bdlora": settings.use_bdlora is not None,
        "kasa_config": settings.kasa_config is not None,
        "init_lora_weights": bool(settings.residual),
        "arrow_config": settings.arrow_config is not None,
        "alora_invocation_tokens": settings.alora_invocation_tokens is not None,
        "use_dora": bool(settings.use_dora),
    }
    named = [name for name, on in laws.items() if on]
    biased = bool(named) and named[0] in ("alora_invocation_tokens", "use_dora")
    others = () if not named or named[0] == "use_dora" else ("target_parameters",) if biased else _APART
    named += [name for name in others if getattr(settings, name)]
    if len(named) > 1:
        raise Unsupported(f"{named[0]} and {named[1]} together", where=named[0], cure=_WITH_PEFT)


def _check_init(value: bool | str | None) -> None:
    if not isinstance(value, str) or value.lower() in (*PLAIN_INIT, *RESIDUAL):
        return
    known = next((name for name in CHANGED_BASE if value.lower().startswith(name)), None)
    if known:
        raise Unsupported(
            f"{value} subtracted from the base, when the adapter was made, {WHY_CHANGED[known]}",
            where="init_lora_weights",
            cure="Save it from PEFT once more with path_initial_model_for_weight_conversion, as a plain LoRA",
        )
    raise Unsupported(f"an unknown initialisation {value!r}", where="init_lora_weights", cure=_WITH_PEFT)


_RECORD = re.compile(
    r"(?i)(?:.*_)?(?:version|uuid|run|(?:run|job|trial|experiment|session|commit)_id|commit|sha\d*|hash|digest|date|timestamp"
    r"|(?:created|saved|trained|written|exported|generated)_(?:at|on|by|with)|author|user|project|experiment|license"
    r"|description|comments?|notes?|tags?)"
)
"""Field names whose text is bookkeeping."""

_STAMP = re.compile(
    r"v?\d+\.\d+\.\d+[\w.+-]*"  # a release: 0.18.1.dev0
    r"|\d{4}-\d\d-\d\d(?:[T ][\d:.,]+(?:Z|[+-]\d\d:?\d\d)?)?"  # a date, with or without the time
    r"|(?i:[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}|[0-9a-f]{32}|[0-9a-f]{40}|[0-9a-f]{64})"  # a UUID or a digest
)

_APART = ("lora_bias", "target_parameters")
_REWRITE = "Write the adapter again with PEFT"
_WITH_PEFT = "Merge it with PEFT itself"
