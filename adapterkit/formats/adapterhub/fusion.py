"""Read AdapterFusion: `adapter_fusion_config.json`, and the weights of an attention in each layer.

Keys are `<module>.adapter_fusion_layer.<names, separated by commas>.<query|key|value>.<weight|bias>`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from ...errors import AdapterkitError, Malformed, StorageError, Unsupported
from ...io.checkpoint import read_json
from .._folders import read_tensors
from .sublayers import standing

if TYPE_CHECKING:
    from ...io.lazy import Lazy

CONFIG = "adapter_fusion_config.json"
WEIGHTS = ("model_adapter_fusion.safetensors", "pytorch_model_adapter_fusion.bin")

FIELDS = {
    "query.weight": "query", "query.bias": "query_bias", "key.weight": "key", "key.bias": "key_bias",
    "value.weight": "values",
}  # fmt: skip
"""A map from the end of a key to the field of the fusion that the tensor fills."""

_KEY = re.compile(r"(?P<path>.+)\.adapter_fusion_layer\.(?P<names>[^.]+)\.(?P<slot>\w+\.\w+)", re.DOTALL)


class Fields(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The fields of the sub-dict `config`; the last four matter only in training."""

    key: bool = True
    query: bool = True
    value: bool = True
    query_before_ln: bool = False
    residual_before: bool = False
    value_before_softmax: bool = True
    temperature: bool = False
    regularization: bool = True
    value_initialized: bool | str = True
    dropout_prob: float | None = None


def read_fusion(path: str | PathLike[str]) -> tuple[dict[str, bool], dict[str, dict[str, Lazy]]]:
    """Return the settings of a fusion, and the tensors of each target by field.

    Raises:
        StorageError: a file is missing.
        Malformed: a key does not belong to a fusion, or a layer lacks a tensor.
        Unsupported: the position of a layer in the model is unknown.
    """
    folder = Path(path)
    try:
        return _read(folder)
    except AdapterkitError as error:
        raise error.at(path=folder) from None


def _read(folder: Path) -> tuple[dict[str, bool], dict[str, dict[str, Lazy]]]:
    if not (folder / CONFIG).exists():
        raise StorageError(f"the folder has no {CONFIG}", cure="Give the folder that save_adapter_fusion wrote")
    config = read_json(folder / CONFIG, strict=True)
    try:
        own = msgspec.convert(config.get("config"), Fields)
    except msgspec.ValidationError as error:
        raise Malformed(str(error), where=f"{CONFIG}: config", cure=_AGAIN) from None
    file = next((folder / name for name in WEIGHTS if (folder / name).exists()), None)
    if file is None:
        raise StorageError(f"the folder has neither {WEIGHTS[0]} nor {WEIGHTS[1]}", cure="Fetch the tensor file, too")
    wanted = {f for word, on in (("query", own.query), ("key", own.key), ("value", own.value)) for f in _of(word) if on}
    weights = _by_target(read_tensors(file), config.get("model_type"))
    for target, held in weights.items():
        if held.keys() != wanted:
            why = (
                f"the layer has {', '.join(sorted(held))}, but the config states {', '.join(sorted(wanted)) or 'none'}"
            )
            raise Malformed(why, where=target, cure=_AGAIN)
    said = ("query_before_ln", "residual_before", "value_before_softmax")
    return {name: getattr(own, name) for name in said}, weights


def _of(word: str) -> list[str]:
    return [field for slot, field in FIELDS.items() if slot.startswith(word)]


def _by_target(tensors: Mapping[str, Lazy], model_type: object) -> dict[str, dict[str, Lazy]]:
    found: dict[str, dict[str, Lazy]] = {}
    for text, tensor in tensors.items():
        key = _KEY.fullmatch(text)
        if key is None or key["slot"] not in FIELDS:
            raise Malformed("this is not a key of a fusion with queries and keys", where=text, cure=_AGAIN)
        place = standing(key["path"], model_type if isinstance(model_type, str) else None)
        if place is None:
            why = f"this version does not know the position of {key['path']} in a model of type {model_type!r}"
            raise Unsupported(why, where=text, cure="Run the fusion with the adapters library")
        found.setdefault(place[0], {})[FIELDS[key["slot"]]] = tensor
    return found


_AGAIN = "Save the fusion again with the adapters library"
