"""Merge the LoRA updates of an adapterkit file into a safetensors base with numpy: python minimal.py ADAPTER BASE OUT

It knows the method `lora` at modules, in all layouts, and refuses the rest. It trusts its input; see README.md."""

import json
import sys
from pathlib import Path

import numpy as np

TYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}


def load(path):
    """Return the bytes of a safetensors file, its metadata, and name -> (dtype, shape, where its bytes are)."""
    data = Path(path).read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    metadata = header.pop("__metadata__", None) or {}
    spans = {name: slice(*(start + at for at in entry["data_offsets"])) for name, entry in header.items()}
    return data, metadata, {name: (entry["dtype"], entry["shape"], spans[name]) for name, entry in header.items()}


def numbers(data, dtype, shape, span):
    """Return the numbers of a tensor in 64 bits; BF16 is the upper half of F32."""
    values = np.frombuffer(data[span], TYPES[dtype])
    return ((values.astype("<u4") << 16).view("<f4") if dtype == "BF16" else values).astype("f8").reshape(shape)


def rounded(values, dtype):
    """Return the bytes of 64-bit numbers in a type, to nearest, ties to even."""
    if dtype != "BF16":
        return values.astype(TYPES[dtype]).tobytes()
    bits = values.astype("<f4").view("<u4")
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype("<u2").tobytes()


adapter, metadata, factors = load(sys.argv[1])
base, _, stored = load(sys.argv[2])
record, exact, merged = json.loads(metadata["adapterkit"]), {}, bytearray(base)
for update in record["updates"]:
    if record["version"][:2] != "1." or record.get("requires") or (update["method"], update["version"]) != ("lora", 1):
        sys.exit(f"Unsupported: {update['method']} {update['version']} in version {record['version']}")
    fields = {field: numbers(adapter, *factors[name]) for field, name in update["tensors"].items()}
    target, layout = update["target"], update["target"].get("layout", "out *in")
    experts, scaling = int(layout.startswith("e ")), update["attributes"].get("scaling", 1.0)
    flat = fields["A"].reshape(*fields["A"].shape[: experts + 1], -1)
    for leaf, change in (("weight", fields["B"] @ flat), ("bias", fields.get("bias")))[: 1 + ("bias" in fields)]:
        name = f"{target['path']}.{leaf}"
        whole = exact.setdefault(name, numbers(base, *stored[name]))
        view = whole.swapaxes(experts, experts + 1) if leaf == "weight" and "in out" in layout else whole
        view = view[(slice(None),) * experts + (slice(*(target.get("rows") or [None])),)]
        view += scaling * change.reshape(view.shape)  # the numbers are those of `whole`
for name, values in exact.items():
    dtype, shape, span = stored[name]
    merged[span] = rounded(values, dtype)
    if not np.isfinite(numbers(merged[span], dtype, shape, slice(None))).all():
        sys.exit(f"Malformed: {name} has no number of {dtype}")
Path(sys.argv[3]).write_bytes(merged)
