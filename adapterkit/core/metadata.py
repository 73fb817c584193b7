"""Text metadata of adapters: trigger words, training settings, and the fingerprint of the base.

After reading, the metadata is in `Adapter.foreign`, or in the lineage step `read` if the format's reader stores no
metadata in `foreign`. Operations that combine adapters, or extract one, store the metadata in their lineage step.
Operations that change a single adapter, such as `scale`, leave the metadata where it is.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from .adapter import Adapter, Step

METADATA = "metadata"
"""Name of the argument in which a lineage step stores the text metadata of the source files."""

FINGERPRINT = "base_fingerprint"
"""Name of the argument in which a lineage step stores the fingerprint of its base."""

SHAPES = "base_shapes"
"""Name of the argument in which a lineage step stores a digest of its base's tensor names and shapes."""

KEYS_OF_FILES = {FINGERPRINT: "adapterkit.base_fingerprint", SHAPES: "adapterkit.base_shapes"}
"""A map from an argument of a lineage step to a metadata key. Formats without lineage, such as PEFT, store the
argument's value under this key."""

MODEL_TYPE = "model_type"
"""Name of the argument in which a lineage step stores the `model_type` from its base's transformers config."""

DROPOUT_LIST = "dropouts"
"""Name of the argument in which a lineage step stores the dropouts of the combined adapters."""

DROPOUTS = (
    "boft_dropout", "hira_dropout", "lora_dropout", "miss_dropout", "rank_dropout", "vera_dropout",
)  # fmt: skip
"""The fields for the dropout in PEFT's configs. Each `peft_type` has at most one of these fields."""

_MODULE = re.compile(r"transformers\.models\.(\w{1,60})\.modeling_\w{1,60}")

REPORT = "adapterkit_merge.json"
"""Name of the file in a merge's output folder that contains the report of the merge."""

_OF_ONE_FILE = frozenset({
    "modelspec.hash_sha256", "ss_network_alpha", "ss_network_args", "ss_network_dim", "sshs_hash", "sshs_legacy_hash",
    "sshs_model_hash",
})  # fmt: skip
"""Metadata keys whose values become wrong if the adapter is changed: ranks, scales, and hashes of the source file."""

_STRUCTURAL = _OF_ONE_FILE | {"adapterkit", "format", "lora_adapter_metadata", "ss_network_module"}
"""Metadata keys that describe only the source file: its format, ranks, scales, and hashes of its bytes."""

_TRIGGERS = ("modelspec.trigger_phrase", "trigger_words", "trigger_word", "trigger_phrase", "activation text")
"""Metadata keys whose values are comma-separated lists of trigger words."""


def metadata_of(adapter: Adapter) -> dict[str, str]:
    """Return the text metadata of an adapter's source files: trigger words, `ss_*`, `modelspec.*` and others.

    Keys that describe only the source file, such as its rank or a hash of its bytes, are omitted, because their values
    would be wrong in another file.
    """
    metadata: dict[str, str] = {}
    for step in adapter.recipe:
        metadata |= strings_of(step.args.get(METADATA))
    if adapter.foreign is not None:
        metadata |= strings_of(adapter.foreign.data.get(METADATA))
    return {key: value for key, value in metadata.items() if key not in _STRUCTURAL}


def read_with(adapter: Adapter, metadata: Mapping[str, str]) -> Adapter:
    """Return the adapter with `metadata`, the text metadata of its file, added to the last step of its lineage.

    This last step must be the step `read`. Readers that store no metadata in `foreign` call this function.
    """
    if not metadata:
        return adapter
    *before, read = adapter.recipe
    return adapter.replace(recipe=(*before, Step(read.op, {**read.args, METADATA: dict(metadata)})))


def with_metadata(pairs: Iterable[tuple[str, str]], adapter: Adapter) -> list[tuple[str, str]]:
    """Return the (key, value) pairs for a new file's header.

    The result contains `pairs`, then the metadata of the adapter's source files, then the fingerprints and shape
    digests of the adapter's bases. A value in `pairs` overrides other values of the same key.

    Args:
        pairs: the pairs that the format requires, or the pairs from the source file's header.
        adapter: the adapter. If it was changed after reading, ranks and hashes of the source file are omitted.
    """
    changed = bool(adapter.recipe) and adapter.recipe[-1].op != "read"
    kept = {key: value for key, value in pairs if not (changed and key in _OF_ONE_FILE)}
    more = {key: ",".join(known) for name, key in KEYS_OF_FILES.items() if (known := _of_bases(adapter, name))}
    return list(
        (kept | {key: value for key, value in (metadata_of(adapter) | more).items() if key not in kept}).items()
    )


def merged_metadata(adapters: Sequence[Adapter], names: Sequence[str] | None = None) -> dict[str, str]:
    """Merge the text metadata of several adapters.

    If a key has the same value in all adapters, the key is kept. Lists of trigger words are joined. Any other key is
    split into one key per adapter, with the adapter's name in parentheses: `ss_tag_frequency (style)`.

    Args:
        adapters: the adapters, in order.
        names: the names of the adapters. Default: the `ss_output_name` or `modelspec.title` of each adapter. An
            adapter without such a name, or with the same name as another one, gets its position (1, 2, ...) as name.
    """
    each = [metadata_of(adapter) for adapter in adapters]
    called = _names(each) if names is None else list(names)
    merged: dict[str, str] = {}
    for key in dict.fromkeys(key for strings in each for key in strings):
        values = {name: strings[key] for name, strings in zip(called, each, strict=True) if key in strings}
        distinct = list(dict.fromkeys(values.values()))
        if key in _TRIGGERS:
            words = (word.strip() for value in distinct for word in value.split(","))
            merged[key] = ", ".join(dict.fromkeys(word for word in words if word))
        elif len(distinct) == 1 and len(values) == len(each):
            merged[key] = distinct[0]
        else:
            merged |= {f"{key} ({name})": value for name, value in values.items()}
    return merged


def trigger_words(metadata: Mapping[str, str]) -> tuple[str, ...]:
    """Return the trigger words in an adapter's metadata, without duplicates.

    Args:
        metadata: the result of `metadata_of`.
    """
    words = (word.strip() for key in _TRIGGERS for word in metadata.get(key, "").split(","))
    return tuple(dict.fromkeys(word for word in words if word))


def fingerprints_of(adapter: Adapter) -> tuple[str, ...]:
    """Return the base fingerprints that an adapter's lineage and metadata record, without duplicates."""
    return _of_bases(adapter, FINGERPRINT)


def shapes_of(adapter: Adapter) -> tuple[str, ...]:
    """Return the shape digests (see `SHAPES`) that an adapter's lineage and metadata record, without duplicates."""
    return _of_bases(adapter, SHAPES)


def _of_bases(adapter: Adapter, name: str) -> tuple[str, ...]:
    """Return the lineage's values of the argument `name`, and the metadata's values of `KEYS_OF_FILES[name]`."""
    texts = [strings_of(step.args.get(METADATA)) for step in adapter.recipe]
    if adapter.foreign is not None:
        texts.append(strings_of(adapter.foreign.data.get(METADATA)))
    from_files = (each for strings in texts for each in strings.get(KEYS_OF_FILES[name], "").split(",") if each)
    return tuple(dict.fromkeys((*_arguments(adapter.recipe, name), *from_files)))


def model_types_of(adapter: Adapter) -> tuple[str, ...]:
    """Return the model types of the base that an adapter's lineage and config name, without duplicates.

    A PEFT config without a task type contains the name of the Python module that defines the base's class, such as
    `transformers.models.llama.modeling_llama`. This name contains the model type. An AdapterHub config contains
    `model_type`.
    """
    types = [*_arguments(adapter.recipe, MODEL_TYPE)]
    config = None if adapter.foreign is None else adapter.foreign.data.get("config")
    if isinstance(config, Mapping):
        mapping = config.get("auto_mapping")
        library = mapping.get("parent_library") if isinstance(mapping, Mapping) else None
        module = _MODULE.fullmatch(library) if isinstance(library, str) else None
        types += [each for each in (module and module[1], config.get(MODEL_TYPE)) if isinstance(each, str)]
    return tuple(dict.fromkeys(types))


def model_class_of(adapter: Adapter) -> tuple[str, str]:
    """Return the names of the base's class and of its Python module from the PEFT config; "" for an unknown name."""
    config = None if adapter.foreign is None else adapter.foreign.data.get("config")
    mapping = config.get("auto_mapping") if isinstance(config, Mapping) else None
    fields = mapping if isinstance(mapping, Mapping) else {}
    name, library = fields.get("base_model_class"), fields.get("parent_library")
    return name if isinstance(name, str) else "", library if isinstance(library, str) else ""


def _arguments(steps: Iterable[Step], name: str) -> Iterator[str]:
    for step in steps:
        value = step.args.get(name)
        if isinstance(value, str):
            yield value
        for source in step.sources():
            yield from _arguments(source, name)


def strings_of(value: object) -> dict[str, str]:
    """Return the entries whose key and value are text; {} if `value` is neither a mapping nor a list of pairs."""
    pairs = value.items() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return {
        pair[0]: pair[1]
        for pair in pairs
        if isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(part, str) for part in pair)
    }


def _names(each: Sequence[Mapping[str, str]]) -> list[str]:
    wanted = [strings.get("ss_output_name") or strings.get("modelspec.title") or "" for strings in each]
    return [
        name if name and wanted.count(name) == 1 else str(number)
        for number, name in enumerate(wanted, 1)
    ]  # fmt: skip


def dropouts_of(adapter: Adapter) -> list[float]:
    """Return the dropout probabilities with which an adapter was trained; empty if none is recorded.

    The probability comes from the adapter's PEFT config. If the config has none, it is the probability that was passed
    to `create`. A combined adapter has the probabilities of the adapters from which it was combined.
    """
    config = adapter.foreign.data.get("config") if adapter.foreign is not None else None
    fields = config if isinstance(config, dict) else {}
    read = [float(p) for name in DROPOUTS if isinstance(p := fields.get(name), float | int)]
    if read:
        return read[-1:]
    lists = [step.args.get(DROPOUT_LIST) for step in adapter.recipe]
    combined = [float(p) for each in lists if isinstance(each, list) for p in each if isinstance(p, float | int)]
    created = [step.args.get("dropout") for step in adapter.recipe if step.op == "create"]
    return combined or [float(p) for p in created if isinstance(p, float | int)][-1:]


def combined_dropouts(adapters: Sequence[Adapter]) -> list[float]:
    """Return the dropout probabilities of several adapters. An adapter without a recorded probability counts as 0."""
    return [p for adapter in adapters for p in dropouts_of(adapter) or [0.0]]
