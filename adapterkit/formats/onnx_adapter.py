"""Read and write onnxruntime's `.onnx_adapter` files, which hold named values for the inputs of an ONNX graph.

The adapter file has only names and values. A second file, adapterkit's record, states methods and targets. The record's
file name is the adapter file's name plus `.json`. The record is the JSON that adapterkit's own format stores under the
metadata key `adapterkit`. An adapter file without a record can be read with the format `olive`, if the values have
Olive's names.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec

from ..core.adapter import Adapter, Foreign, canonical
from ..errors import AdapterkitError, Malformed, UsageError, storage_error
from ..io.atomic import write_bytes
from ..io.inputs import read_input
from ..io.lazy import as_lazy
from ..io.ort_adapter import OrtAdapter, is_ort_adapter, read_ort_adapter, write_ort_adapter
from ..methods import METHODS
from ._format import Format
from ._kit import Leftovers, in_order, leftovers
from .adapterkit import MAX_RECORD, ForeignRecord, decode_record, encode_record
from .olive import has_olives_names

if TYPE_CHECKING:
    from ..io.checkpoint import Checkpoint
    from ..io.lazy import Leaf
    from ..io.strict_json import JsonValue

FORMAT = "onnx_adapter"


class OnnxAdapterHints(Leftovers, total=False):
    """The adapter's version and the model's version, as an `.onnx_adapter` file states them."""

    adapter_version: Annotated[int, msgspec.Meta(ge=-(1 << 31), lt=1 << 31)]
    model_version: Annotated[int, msgspec.Meta(ge=-(1 << 31), lt=1 << 31)]


class OnnxAdapter(Format):
    """Files from `onnxruntime.AdapterFormat`. Next to each file is a JSON file with adapterkit's record."""

    url = "https://onnxruntime.ai/docs/genai/tutorials/finetune.html"
    description = "onnxruntime: an .onnx_adapter file, and a record that says what its values mean"
    file = "adapter.onnx_adapter"
    methods = frozenset(METHODS)
    owns = frozenset({"*.onnx_adapter.json"})

    def sniff(self, path: Path) -> bool:
        if not is_ort_adapter(path):
            return False
        return sidecar(path).exists() or not has_olives_names(path)

    def read(self, path: Path, *, compat: str | None = None, base: Checkpoint | None = None) -> Adapter:
        file = read_ort_adapter(path)
        record = sidecar(path)
        if not record.exists():
            why = f"the record {record.name} is missing; it states the methods and targets of the file's values"
            cure = f"Download {record.name}. If Olive wrote the file, name the format: --from olive (format='olive')"
            raise UsageError(why, path=path, cure=cure)
        try:
            if record.stat().st_size > MAX_RECORD:
                raise UsageError(
                    f"the record has more than {MAX_RECORD} bytes", path=record, cure="Download the record again"
                )
            adapter = decode_record(read_input(record).decode("utf-8"), file.tensors)
        except UnicodeDecodeError as error:
            cure = "Download the file again"
            raise Malformed("the file is not valid UTF-8", path=record, cure=cure) from error
        except OSError as error:
            raise storage_error(error, record) from error
        except AdapterkitError as error:
            raise error.at(path=record) from None
        data: dict[str, JsonValue] = {
            "adapter_version": file.adapter_version, "model_version": file.model_version, "order": list(file.tensors),
        }  # fmt: skip
        is_ours = adapter.foreign is None or adapter.foreign.format == FORMAT
        return adapter.replace(foreign=Foreign(FORMAT, data)) if is_ours else adapter

    def write(
        self, adapter: Adapter, path: Path, *, on_loss: str = "refuse", base: Checkpoint | None = None
    ) -> list[str]:
        hints = leftovers(adapter, FORMAT, OnnxAdapterHints)
        without_hints = adapter.replace(foreign=None) if hints else adapter
        tensors: dict[str, Leaf] = {}
        record = encode_record(without_hints, tensors)
        values = in_order({name: as_lazy(leaf) for name, leaf in tensors.items()}, hints)
        versions = (int(hints.get("adapter_version", 1)), int(hints.get("model_version", 1)))
        write_ort_adapter(path, OrtAdapter(values, *versions))
        write_bytes(sidecar(path), canonical(msgspec.to_builtins(record)).encode())
        return []


def write_slots_record(
    adapter: Adapter, names: Sequence[Mapping[str, str]], others: Iterable[str], path: Path
) -> Path:  # fmt: skip
    """Write the record for an adapter file whose values are named after the inputs of an ONNX graph.

    Args:
        adapter: the adapter in the adapter file.
        names: one map for each update, in the adapter's order. A map's keys are the names of the update's tensors, and
            its values are the names of the graph's inputs.
        others: the names of the file's other values, which are scalings. The record contains the scalings, too.
        path: the adapter file.
    """
    record = encode_record(adapter.replace(foreign=None), {})
    updates = [msgspec.structs.replace(u, tensors=dict(n)) for u, n in zip(record.updates, names, strict=True)]
    foreign = ForeignRecord(FORMAT, {}, {name: name for name in others})
    completed = msgspec.structs.replace(record, updates=updates, foreign=foreign)
    write_bytes(sidecar(path), canonical(msgspec.to_builtins(completed)).encode())
    return sidecar(path)


def sidecar(path: Path) -> Path:
    """Return the path of the record that belongs to an adapter file."""
    return path.with_name(path.name + ".json")
