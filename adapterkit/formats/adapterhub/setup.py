"""Read and write compositions of adapters, and read AdapterFusion."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from ...core.adapter import Foreign
from ...errors import AdapterkitError, Malformed, StorageError, Unsupported, UsageError, storage_error
from ...io.atomic import write_bytes
from ...io.checkpoint import read_json
from .._containers import read_tensors
from . import save
from .conversion import FORMAT, AdapterHubHints, encode, hints_of
from .file import RELEASE, standing

if TYPE_CHECKING:
    from ...core.adapter import Adapter
    from ...io.checkpoint import Checkpoint
    from ...io.lazy import Lazy
    from ...io.strict_json import JsonValue


# Read and write compositions: `adapter_setup.json` contains a tree of blocks, and each adapter has its own folder.


CONFIG = "adapter_setup.json"

WORDS: Mapping[str, str] = {
    "Average": "weights", "BatchSplit": "batch_sizes", "Fuse": "", "MultiTask": "", "Parallel": "", "Split": "splits",
    "Stack": "",
}  # fmt: skip
"""For each kind of block, the field of `kwargs` that has one number per child; empty if the kind has no such field."""

MAX_DEPTH = 32


@dataclass(frozen=True, slots=True)
class Setup:
    """One block of a composition, such as a stack of adapters.

    Attributes:
        kind: the kind of block, such as `Stack`; see `WORDS`.
        children: the children in order; a child is the name of an adapter or another block.
        numbers: one number per child: the weights of an `Average`, or the sizes of the parts of a `BatchSplit` or
            `Split`. Other kinds have none.
    """

    kind: str
    children: tuple[Setup | str, ...]
    numbers: tuple[float, ...] = field(default=())

    def names(self) -> Iterator[str]:
        """Yield the names of the adapters in the tree, in order. A name may occur several times."""
        for child in self.children:
            yield from [child] if isinstance(child, str) else child.names()

    def fusions(self) -> Iterator[str]:
        """Yield the names of the fusions in the tree. A fusion's folder has the same name."""
        if self.kind == "Fuse":
            yield self.fusion
        for child in self.children:
            yield from [] if isinstance(child, str) else child.fusions()

    @property
    def fusion(self) -> str:
        """Return this fusion's name in the adapters library: the last adapter of each child, joined by commas."""
        return ",".join(child if isinstance(child, str) else list(child.names())[-1] for child in self.children)


def read_setup(folder: str | PathLike[str]) -> Setup:
    """Read the composition in a folder.

    Raises:
        StorageError: the folder has no `adapter_setup.json`.
        Malformed: the contents of `adapter_setup.json` are not a tree of blocks.
    """
    path = Path(folder) / CONFIG
    if not path.is_file():
        raise StorageError(
            f"the folder has no {CONFIG}", path=folder, cure="Pass the folder that save_adapter_setup wrote"
        )
    try:
        return _block(read_json(path, strict=True).get("adapter_setup"), "adapter_setup", 0)
    except Malformed as error:
        raise error.at(path=path) from None


def write_setup(
    folder: str | PathLike[str], setup: Setup, adapters: Mapping[str, Adapter], *,
    fusions: Mapping[str, str | PathLike[str]] | None = None, base: Checkpoint | None = None,
) -> None:  # fmt: skip
    """Write a composition that the adapters library's `load_adapter_setup` can read.

    `adapter_setup.json` is written last.

    Args:
        folder: the folder to write.
        setup: the tree of blocks.
        adapters: the adapters, by their name in the tree.
        fusions: the source folder of each fusion, by the fusion's name; the folders are copied.
        base: the base. Without the base, some adapters may be refused, such as bottleneck adapters.

    Raises:
        UsageError: an adapter or a fusion is missing, or the tree of blocks is invalid.
        Unrepresentable: AdapterHub's format cannot express an adapter.
        StorageError: the folder cannot be written.
    """
    copied = fusions or {}
    for word, names, given in (("adapters", setup.names(), adapters), ("fusions", setup.fusions(), copied)):
        missing = next((name for name in names if name not in given), None)
        if missing is not None:
            raise UsageError(
                f"{missing!r} is in the setup, but not in the argument {word}",
                where=word,
                cure=f"Add {missing!r} to {word}=",
            )
    written = {"adapter_setup": _written(setup), "head_setup": None, "version": RELEASE}
    try:
        _block(written["adapter_setup"], "setup", 0)
    except Malformed as error:
        raise UsageError(error.why, where=error.where or "setup", cure=error.cure or _BLOCKS) from None
    contents = {name: encode(_named(adapters[name], name), on_loss="refuse", base=base)[0] for name in setup.names()}
    for name, content in contents.items():
        save(Path(folder) / name, content)
    try:
        for name in setup.fusions():
            shutil.copytree(copied[name], Path(folder) / name, dirs_exist_ok=True)
    except OSError as error:
        raise storage_error(error, Path(folder)) from error
    write_bytes(Path(folder) / CONFIG, json.dumps(written, indent=2).encode())


def _block(node: object, at: str, depth: int) -> Setup:
    node = node if isinstance(node, dict) else {}
    kind, children = node.get("type"), node.get("children")
    if (
        not isinstance(kind, str)
        or kind not in WORDS
        or not isinstance(children, list)
        or not children
        or depth > MAX_DEPTH
    ):
        why = f"the block {str(kind)[:60]!r} is of an unknown kind, has no list of children, or is nested too deep"
        raise Malformed(why, where=at, cure=_BLOCKS)
    members = tuple(_child(child, f"{at}.children[{i}]", depth) for i, child in enumerate(children))
    return Setup(kind, members, _numbers(node.get("kwargs"), WORDS[kind], len(members), at))


def _numbers(node: object, word: str, count: int, at: str) -> tuple[float, ...]:
    if not word:
        return ()
    numbers = node.get(word) if isinstance(node, Mapping) else None
    if not isinstance(numbers, list) or len(numbers) != count or not all(type(n) in (int, float) for n in numbers):
        raise Malformed(
            f"{word} does not have one number for each of {count} children", where=f"{at}.kwargs", cure=_BLOCKS
        )
    return tuple(numbers)


def _child(node: object, at: str, depth: int) -> Setup | str:
    if not isinstance(node, dict) or node.get("type") != "single":
        return _block(node, at, depth + 1)
    names = node.get("children")
    name = names[0] if isinstance(names, list) and len(names) == 1 else None
    if not isinstance(name, str) or not name or re.search(r"[./\\,\0]", name):
        raise Malformed(
            f"{str(name)[:60]!r} is not a valid adapter name", where=at, cure="Save the adapter under another name"
        )
    return name


def _written(setup: Setup) -> dict[str, JsonValue]:
    single: list[JsonValue] = [
        {"type": "single", "children": [c]} if isinstance(c, str) else _written(c) for c in setup.children
    ]
    word = WORDS.get(setup.kind, "")
    kwargs: dict[str, JsonValue] = {"kwargs": {word: list(setup.numbers)}} if word else {}
    return {"type": setup.kind, "children": single, **kwargs}


def _named(adapter: Adapter, name: str) -> Adapter:
    hints = hints_of(adapter)
    if hints.config.get("name") == name:
        return adapter
    hints_of_part = AdapterHubHints(config={"name": name}, root=hints.root, interface=hints.interface)
    return replace(adapter, foreign=Foreign(FORMAT, msgspec.to_builtins(hints_of_part), {}))


_BLOCKS = f"Known blocks: {', '.join(WORDS)}; nested at most {MAX_DEPTH} deep"

# Read AdapterFusion: `adapter_fusion_config.json`, and the tensors of each layer's attention over the adapters.
#
# Keys are `<module>.adapter_fusion_layer.<names, separated by commas>.<query|key|value>.<weight|bias>`.


FUSION_CONFIG = "adapter_fusion_config.json"
WEIGHTS = ("model_adapter_fusion.safetensors", "pytorch_model_adapter_fusion.bin")

FIELDS = {
    "query.weight": "query", "query.bias": "query_bias", "key.weight": "key", "key.bias": "key_bias",
    "value.weight": "values",
}  # fmt: skip
"""A map from the end of a key to the name of the field in which `read_fusion` returns the key's tensor."""

_KEY = re.compile(r"(?P<path>.+)\.adapter_fusion_layer\.(?P<names>[^.]+)\.(?P<slot>\w+\.\w+)", re.DOTALL)


class FusionFields(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The fields of `config` in a fusion's config file.

    `read_fusion` ignores the last four fields, which are for training. In the adapters library, `temperature` also
    affects inference. If it is true, the softmax temperature falls from 50 to 1 over the first 980 forward passes after
    loading.
    """

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
    """Read the fusion in a folder. Return (settings, tensors), with the tensors by target path and then by field.

    Raises:
        StorageError: a file is missing.
        Malformed: a key does not belong to a fusion, or a layer lacks a tensor.
        Unsupported: this version does not know the module that a fusion layer changes.
    """
    folder = Path(path)
    try:
        return _read(folder)
    except AdapterkitError as error:
        raise error.at(path=folder) from None


def _read(folder: Path) -> tuple[dict[str, bool], dict[str, dict[str, Lazy]]]:
    if not (folder / FUSION_CONFIG).exists():
        raise StorageError(f"the folder has no {FUSION_CONFIG}", cure="Pass the folder that save_adapter_fusion wrote")
    config = read_json(folder / FUSION_CONFIG, strict=True)
    try:
        fields = msgspec.convert(config.get("config"), FusionFields)
    except msgspec.ValidationError as error:
        raise Malformed(str(error), where=f"{FUSION_CONFIG}: config", cure=_AGAIN) from None
    file = next((folder / name for name in WEIGHTS if (folder / name).exists()), None)
    if file is None:
        raise StorageError(
            f"the folder has neither {WEIGHTS[0]} nor {WEIGHTS[1]}", cure="Download the tensor file, too"
        )
    wanted = {
        field
        for word, on in (("query", fields.query), ("key", fields.key), ("value", fields.value))
        for slot, field in FIELDS.items()
        if on and slot.startswith(word)
    }
    weights = _by_target(read_tensors(file), config.get("model_type"))
    for target, slots in weights.items():
        if slots.keys() != wanted:
            why = (
                f"the layer has the tensors {', '.join(sorted(slots))}, but the config states "
                f"{', '.join(sorted(wanted)) or 'none'}"
            )
            raise Malformed(why, where=target, cure=_AGAIN)
    flags = ("query_before_ln", "residual_before", "value_before_softmax")
    return {name: getattr(fields, name) for name in flags}, weights


def _by_target(tensors: Mapping[str, Lazy], model_type: object) -> dict[str, dict[str, Lazy]]:
    by_target: dict[str, dict[str, Lazy]] = {}
    for text, tensor in tensors.items():
        key = _KEY.fullmatch(text)
        if key is None or key["slot"] not in FIELDS:
            raise Malformed("this is not the name of a query, key or value in AdapterFusion", where=text, cure=_AGAIN)
        place = standing(key["path"], model_type if isinstance(model_type, str) else None)
        if place is None:
            why = f"this version does not know which module {key['path']} changes in a {model_type!r} model"
            raise Unsupported(why, where=text, cure="Run the fusion with the adapters library")
        by_target.setdefault(place[0], {})[FIELDS[key["slot"]]] = tensor
    return by_target


_AGAIN = "Save the fusion again with the adapters library"
