"""Good inputs to start from: the specification's vectors, and small graphs, archives and recipes made here."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cases import Case
from containers import pack
from sandbox import REPOSITORY

if TYPE_CHECKING:
    from adapterkit.core.adapter import Adapter

VECTORS = REPOSITORY / "spec" / "vectors"
LARGEST = 400_000
"""Bytes of a seed at most: inputs are written and read thousands of times."""

_BESIDE = ("converted.", "expected.", "forward.")
"""Starts of the names of files that no tool of the format writes."""

_OF_LLAMA = ("gguf", "keras_hub", "litgpt", "mlx", "torchtune", "megatron", "minlora", "nemo", "olive", "tensorrt_llm")
_NEEDS = {**dict.fromkeys(_OF_LLAMA, "llama"), "loralib": "loralib"}
"""Formats whose vectors are read beside one of the bases of `spec/vectors/bases`."""


def seeds() -> dict[str, list[Case]]:
    """All seeds by group. Groups are drawn evenly: a format with one vector is mutated as often as one with 60."""
    groups: dict[str, list[Case]] = {}
    for case in (*_formats(), *_native(), *_bases(), *_graphs(), *_recipes()):
        size = sum(len(content) for content in case.files.values() if isinstance(content, bytes))
        if 0 < size <= LARGEST:
            groups.setdefault(f"{case.kind}-{case.format}" if case.format else case.kind, []).append(case)
    return groups


def _formats() -> Iterator[Case]:
    for folder in sorted({path.parent for path in (VECTORS / "formats").glob("*/*/*") if path.is_file()}):
        if folder.name == "models":
            continue
        own = {p.name: p for p in sorted(folder.iterdir()) if p.is_file() and not p.name.startswith(_BESIDE)}
        name = folder.parent.name
        base = _NEEDS.get(name, "")
        files = {key: path.read_bytes() for key, path in own.items()}
        yield Case(
            f"{name}/{folder.name}",
            "adapter",
            files,
            _subject(name, list(own)),
            name,
            base and f"spec/vectors/bases/{base}",
        )


def _subject(name: str, files: list[str]) -> str:
    """The one file of tensors, or nothing for the folder, where there are several or a config is beside it."""
    weights = [file for file in files if not file.endswith((".json", ".yaml"))]
    alone = len(weights) == 1 and "adapter_config.json" not in files and len(files) <= 2
    return weights[0] if alone or name == "torchtune" else ""


def _native() -> Iterator[Case]:
    for path in sorted((VECTORS / "methods").glob("*.adapter.safetensors")):
        name = path.name.removesuffix(".adapter.safetensors")
        yield Case(
            f"native/{name}", "adapter", {"adapter.safetensors": path.read_bytes()}, "adapter.safetensors", "adapterkit"
        )
    for path in sorted((VECTORS / "invalid").glob("*.safetensors")):
        yield Case(f"invalid/{path.stem}", "adapter", {"x.safetensors": path.read_bytes()}, "x.safetensors", "invalid")


def _bases() -> Iterator[Case]:
    folders = [*(VECTORS / "bases").iterdir(), *(VECTORS / "quant").glob("*/*"), *_folders(VECTORS / "invalid")]
    for folder in sorted(folders):
        files = {
            path.relative_to(folder).as_posix(): path.read_bytes()
            for path in sorted(folder.rglob("*"))
            if path.is_file() and not path.name.startswith(_BESIDE)
        }
        subject = next((name for name in files if name.endswith(".gguf")), "")
        yield Case(f"{folder.parent.name}/{folder.name}", "base", files, subject)


def _folders(parent: Path) -> list[Path]:
    return [path for path in parent.iterdir() if path.is_dir()]


_RECIPES = (
    """merge_method: ties
models:
  - model: a.safetensors
    parameters: {weight: 1.0, density: 0.5}
  - model: a.safetensors
    parameters:
      weight: [0.2, 0.8]
parameters: {lambda: 0.7}
""",
    """merge_method: linear
adapters:
  - adapter: a.safetensors
parameters:
  weight:
    - filter: layers
      value: 0.5
    - value: 1
seed: 3
rank: 2
""",
    """merge_method: dare_ties
models:
  - model: a.safetensors
    parameters:
      weight: {'*.q': 0.5, '*': 1}
compat: mergekit
parameters: {normalize: true, int8_mask: true}
""",
)


def _recipes() -> Iterator[Case]:
    adapter = (VECTORS / "methods" / "lora.adapter.safetensors").read_bytes()
    for at, text in enumerate(_RECIPES):
        yield Case(f"recipe/{at}", "recipe", {"recipe.yaml": text.encode(), "a.safetensors": adapter}, "recipe.yaml")


# ONNX graphs, each with an adapter for its layers --------------------------------------------------


def _graphs() -> Iterator[Case]:
    for name, (model, targets) in _models().items():
        files: dict[str, Any] = {"model.onnx": model.SerializeToString(), "adapter.safetensors": _lora(targets)}
        yield Case(f"graph/{name}", "graph", files, "model.onnx")
    model, targets = _models()["two"]
    yield Case("graph/external", "graph", {**_external(model), "adapter.safetensors": _lora(targets)}, "model.onnx")


def _lora(targets: dict[str, tuple[int, ...]], rank: int = 2) -> bytes:
    """A native adapter with a LoRA at each target."""
    import tempfile

    import adapterkit as ak

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.safetensors"
        ak.write(_adapter(targets, rank), path)
        return path.read_bytes()


def _adapter(targets: dict[str, tuple[int, ...]], rank: int = 2) -> Adapter:
    import numpy as np

    from adapterkit.core.adapter import Adapter, Target
    from adapterkit.io.lazy import from_numpy
    from adapterkit.methods.lora import LoRA

    def numbers(*shape: int) -> Any:
        return from_numpy(np.full(shape, 0.25, np.float32))

    return Adapter(
        {
            Target(name, "in out *k" if name == "emb" else "out *in"): (
                LoRA(A=numbers(rank, shape[1], *shape[2:]), B=numbers(shape[0], rank), scaling=0.5),
            )
            for name, shape in targets.items()
        }
    )


def _models() -> dict[str, tuple[Any, dict[str, tuple[int, ...]]]]:
    """Models by onnx's helper: the layers' names are those of torch's exporter."""
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(0)

    def weight(*shape: int) -> Any:
        return rng.normal(size=shape).astype(np.float32)

    def model(nodes: list[Any], held: dict[str, Any], x: list[Any], y: int, kind: int = TensorProto.FLOAT) -> Any:
        entry, result = ("x", kind, x), ("y", TensorProto.FLOAT, [f"y{n}" for n in range(y)])
        graph = helper.make_graph(
            nodes, "g", [helper.make_tensor_value_info(*entry)], [helper.make_tensor_value_info(*result)],
            [numpy_helper.from_array(array, name) for name, array in held.items()],
        )  # fmt: skip
        opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=10)

    node = helper.make_node
    two = [
        node("MatMul", ["x", "onnx::MatMul_1"], ["h0"], "/q/MatMul"), node("Add", ["q.bias", "h0"], ["h"], "/q/Add"),
        node("Relu", ["h"], ["r"], "/Relu"), node("Gemm", ["r", "o.weight", "o.bias"], ["y"], "/o/Gemm", transB=1),
    ]  # fmt: skip
    held = {"onnx::MatMul_1": weight(16, 8), "q.bias": weight(8), "o.weight": weight(4, 8), "o.bias": weight(4)}
    conv = [node("Conv", ["x", "c.weight", "c.bias"], ["y"], "/c/Conv", pads=[1, 1], strides=[1], group=1)]
    quantized = [
        node("DequantizeLinear", ["q.weight_quantized", "q.weight_scale", "q.weight_zero_point"], ["w"], "/dq", axis=1),
        node("MatMul", ["x", "w"], ["y"], "/q/MatMul"),
    ]
    grid = np.arange(128, dtype=np.int8).reshape(16, 8)
    packed = {"q.weight_quantized": grid, "q.weight_scale": np.full(8, 0.1, np.float32),
              "q.weight_zero_point": np.zeros(8, np.int8)}  # fmt: skip
    four = [node("MatMulNBits", ["x", "q.weight_Q4", "q.weight_scales"], ["y"], "/q/MatMul_Q4", domain="com.microsoft",
                 K=32, N=8, bits=4, block_size=16)]  # fmt: skip
    bits = {
        "q.weight_Q4": np.arange(128, dtype=np.uint8).reshape(8, 2, 8),
        "q.weight_scales": np.full(16, 0.1, np.float32),
    }
    gathered = [node("Gather", ["emb.weight", "x"], ["y"], "/emb/Gather")]
    transposed = [node("Transpose", ["q.weight"], ["t"], perm=[1, 0]), node("MatMul", ["x", "t"], ["y"], "/q/MatMul")]
    return {
        "two": (model(two, held, ["batch", 16], 2), {"q": (8, 16), "o": (4, 8)}),
        "conv": (model(conv, {"c.weight": weight(8, 6, 3), "c.bias": weight(8)}, [1, 6, 5], 3), {"c": (8, 6, 3)}),
        "embedding": (
            model(gathered, {"emb.weight": weight(16, 8)}, [1, 4], 3, TensorProto.INT64),
            {"emb": (8, 16)},
        ),
        "dequantize": (model(quantized, packed, ["batch", 16], 2), {"q": (8, 16)}),
        "nbits": (model(four, bits, ["batch", 32], 2), {"q": (8, 32)}),
        "transposed": (model(transposed, {"q.weight": weight(8, 16)}, ["batch", 16], 2), {"q": (8, 16)}),
    }  # fmt: skip


def _external(model: Any) -> dict[str, bytes]:
    """The model with its initializers in a data file."""
    data = io.BytesIO()
    for tensor in model.graph.initializer:
        raw, start = tensor.raw_data, data.tell()
        data.write(raw)
        tensor.ClearField("raw_data")
        tensor.data_location = 1
        for key, value in (("location", "model.data"), ("offset", str(start)), ("length", str(len(raw)))):
            entry = tensor.external_data.add()
            entry.key, entry.value = key, value
    return {"model.onnx": model.SerializeToString(), "model.data": data.getvalue()}


# What a seed is merged with ------------------------------------------------------------------------


def with_partner(case: Case, folder: Path) -> Case:
    """The case with a base that its adapter merges into, or an adapter for its base, written below `folder`."""
    from dataclasses import replace

    from adapterkit.errors import AdapterkitError

    if case.kind not in ("adapter", "base"):
        return case
    if case.base and case.kind == "adapter":
        return replace(case, partner=str(REPOSITORY / case.base))
    place = folder / case.name.replace("/", "-")
    try:
        source = case.write(place / "seed")
        made = _base_for(source, place) if case.kind == "adapter" else _adapter_for(source, place)
    except AdapterkitError:
        # A vector of `invalid`, or an update that is not one of weights.
        return case
    return replace(case, partner=str(made)) if made else case


def _base_for(source: Path, folder: Path) -> Path | None:
    import adapterkit as ak

    shapes: dict[str, list[int]] = {}
    for target, update in ak.read(source):
        shape = _stored(target, update)
        if shape and target.path:
            shapes[target.path] = max(shape, shapes.get(target.path, []))
    if not shapes:
        return None
    path = folder / "base.safetensors"
    tensors = {}
    for name, shape in shapes.items():
        count = 1
        for size in shape:
            count *= size
        tensors[f"{name}.weight"] = ("F32", shape, bytes(4 * count))
    path.write_bytes(pack(tensors))
    return path


def _stored(target: Any, update: Any) -> list[int] | None:
    """The shape in which a base stores the weight, where the update's tensors tell it."""
    dims = update.dims(target.stacked)
    if "out" not in dims or "in" not in dims:
        return None
    k = dims.get("k", ())
    kernel = list(k) if isinstance(k, tuple) else [k]
    out = target.rows[1] if target.rows else dims["out"]
    pair = [out, dims["in"]] if "out *in" in target.layout else [dims["in"], out]
    return [*([dims["e"]] if target.stacked and "e" in dims else []), *pair, *kernel]


def _adapter_for(source: Path, folder: Path) -> Path | None:
    import adapterkit as ak
    from adapterkit.io.checkpoint import open_checkpoint
    from adapterkit.merging.quantized import as_merged
    from adapterkit.quant import is_quantized

    base = open_checkpoint(source)
    seen = as_merged(base, "dequantize") if is_quantized(base) else base
    found = {
        n.removesuffix(".weight"): t.shape
        for n, t in seen.tensors.items()
        if len(t.shape) == 2 and n.endswith(".weight")
    }
    if not found:
        return None
    path = folder / "adapter.safetensors"
    ak.write(_adapter(dict(list(found.items())[:3])), path)
    return path
