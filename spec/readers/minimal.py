"""Merge the LoRA updates of an adapterkit file into a safetensors base, with numpy alone: a reader to start from.

    python minimal.py ADAPTER BASE OUT

It knows the method `lora` on weights of all layouts, and refuses everything else. It holds the whole base in memory,
takes F32 and F64 alone, and trusts its input; readers of untrusted files check what spec/README.md asks for.
"""

import json
import struct
import sys

import numpy as np

TYPES = {"F32": np.dtype("<f4"), "F64": np.dtype("<f8")}


def load(path):
    """Return the metadata of a safetensors file, and its tensors by name."""
    with open(path, "rb") as file:
        data = file.read()
    start = 8 + struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8:start])
    metadata, tensors = header.pop("__metadata__", None) or {}, {}
    for name, entry in header.items():
        a, b = entry["data_offsets"]
        numbers = np.frombuffer(data[start + a : start + b], TYPES[entry["dtype"]])
        tensors[name] = numbers.reshape(entry["shape"]).copy()
    return metadata, tensors


def save(path, tensors):
    """Write tensors as a safetensors file."""
    header, end = {}, 0
    for name, array in tensors.items():
        dtype = next(name for name, kind in TYPES.items() if kind == array.dtype)
        header[name] = {"dtype": dtype, "shape": array.shape, "data_offsets": [end, end + array.nbytes]}
        end += array.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.writelines(array.tobytes() for array in tensors.values())


def merge(adapter, base):
    """Add scaling * B @ A to each target's weight, and scaling * bias to its bias, in float64; rounded once."""
    metadata, factors = load(adapter)
    record = json.loads(metadata["adapterkit"])
    exact = {}
    for update in record["updates"]:
        if update["method"] != "lora" or record["version"].split(".")[0] != "1" or record.get("requires"):
            raise SystemExit(f"Unsupported: {update['method']} in version {record['version']}")
        target, scaling = update["target"], update["attributes"].get("scaling", 1.0)
        A, B, bias = (factors[n].astype("f8") if n else None for n in map(update["tensors"].get, ("A", "B", "bias")))
        layout, rows = target.get("layout", "out *in"), slice(*(target.get("rows") or (None,)))
        stacked = layout.startswith("e ")
        name = f"{target['path']}.weight"
        W = exact.setdefault(name, base[name].astype("f8"))
        view = W.swapaxes(stacked, stacked + 1) if "in out" in layout else W  # [out, in, *k], or [e, out, in, *k]
        view = view[:, rows] if stacked else view[rows]  # a view: what is added to it is added to W
        flat = A.reshape(*A.shape[: stacked + 1], -1)
        view += scaling * (B @ flat).reshape(view.shape)
        if bias is not None and f"{target['path']}.bias" in base:
            b = exact.setdefault(f"{target['path']}.bias", base[f"{target['path']}.bias"].astype("f8"))
            b[..., rows] += scaling * bias
    return {name: exact.get(name, array).astype(array.dtype) for name, array in base.items()}


if __name__ == "__main__":
    save(sys.argv[3], merge(sys.argv[1], load(sys.argv[2])[1]))
