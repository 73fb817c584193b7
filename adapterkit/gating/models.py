"""Load and run the models that a gate compares: the base with attached adapters, a merged model, and an ONNX graph."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import Unsupported, UsageError
from ..io.inputs import is_gguf
from ..io.lazy import as_torch, files_kept_open
from ..quant import dequantized, is_quantized
from .measuring import ModelOutput, output_of, run_torch

if TYPE_CHECKING:
    from torch import Tensor

    from ..core.adapter import Adapter
    from ..io.checkpoint import Checkpoint
    from ..torch.handle import Handle


def device_of(name: str) -> str:
    """Return the torch device for `auto`, `cpu`, `cuda` or `cuda:N`.

    Raises:
        UsageError: the name is another one, or this machine has no such device.
    """
    import torch

    cure = "Type --device cpu or --device auto (device=)"
    if not re.fullmatch(r"auto|cpu|cuda|cuda:\d{1,4}", name):
        raise UsageError(f"{name!r} is not auto, cpu, cuda or cuda:N", where="device", cure=cure)
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name != "cpu" and int(name.partition(":")[2] or 0) >= torch.cuda.device_count():
        raise UsageError(f"torch finds no CUDA device for {name}", where="device", cure=cure)
    return name


def load(
    checkpoint: Checkpoint, dtype: str, device: str, lacking: list[str] | None = None, like: Checkpoint | None = None
) -> Any:
    """Load a folder with transformers, or a GGUF model. Quantized weights are dequantized.

    Args:
        checkpoint: the folder, or the GGUF file.
        dtype: the name of the torch dtype of the weights.
        device: the device of the model.
        lacking: a list to which the function adds the names of weights that the model has but the files lack.
        like: for a GGUF model, the folder with its config.json.

    Raises:
        Malformed, Unsupported: see `torch.pretrained.load_pretrained`, and `quant.dequantized`.
        UsageError: the checkpoint is a single weight file, or a GGUF model without a folder for its config.
    """
    from ..torch.pretrained import load_pretrained

    source = checkpoint.root
    if is_gguf_model(checkpoint):
        if like is None:
            cure = "Name as BASE the folder from which it was converted, and the GGUF model at --merged (merged=)"
            raise UsageError("a GGUF model cannot run without a config.json", path=checkpoint.root, cure=cure)
        source = like.root
    elif checkpoint.folder != checkpoint.root:
        cure = f"Name the folder {checkpoint.folder} with its config.json"
        raise UsageError("gate needs the folder of a model, not a single weight file", path=checkpoint.root, cure=cure)
    state = None
    if source is not checkpoint.root or is_quantized(checkpoint):
        with files_kept_open():
            state = {name: as_torch(tensor) for name, tensor in dequantized(checkpoint).tensors.items()}
    return load_pretrained(source, dtype, state, lacking).to(device)


def is_gguf_model(checkpoint: Checkpoint) -> bool:
    """Whether all files of a checkpoint are GGUF files."""
    return bool(checkpoint.files) and all(is_gguf(file) for file in checkpoint.files)


def stored_dtype(checkpoint: Checkpoint) -> str:
    """Return the dtype of most weights, or `quantized`."""
    if is_quantized(checkpoint):
        return "quantized"
    sizes = Counter[str]()
    for tensor in checkpoint.tensors.values():
        size = 1
        for axis in tensor.shape:
            size *= axis
        sizes[tensor.dtype.name] += size
    return sizes.most_common(1)[0][0]


class Adapted:
    """A base with attached adapters, and with an attached null adapter, which makes random changes of the same size.

    Either the adapters are active, or the null adapter, or neither.
    """

    def __init__(self, model: Any, adapters: Sequence[Adapter], weights: Sequence[float], **options: Any) -> None:
        self.model, self.device = model, str(next(model.parameters()).device)
        self.weights, self.options = weights, options
        self.handles: list[Handle] = []
        self.null: Handle | None = None
        for at, (adapter, weight) in enumerate(zip(adapters, weights, strict=True)):
            self.handles.append(self._inject(adapter, f"adapter{at}", weight))

    def _inject(self, adapter: Adapter, name: str, weight: float) -> Handle:
        from ..torch.inject import inject

        loaded = adapter.load(self.device)
        return inject(self.model, loaded, name=name, weight=weight, **self.options)

    def add_null(self, null: Adapter) -> None:
        """Attach the null adapter, switched off."""
        self.null = self._inject(null, "null", 1.0)
        self.null.set_active(False)

    def drop_null(self) -> None:
        """Remove the null adapter."""
        if self.null is not None:
            self.null.remove()
            self.null = None

    @contextmanager
    def as_(self, state: str) -> Iterator[None]:
        """Inside the block, activate the adapters (`adapted`), the null adapter (`null`), or neither (other states)."""
        for handle in self.handles:
            handle.set_active(state == "adapted")
        if self.null is not None:
            self.null.set_active(state == "null")
        try:
            yield
        finally:
            for handle in self.handles:
                handle.set_active(True)
            if self.null is not None:
                self.null.set_active(False)

    def run(self, feeds: Mapping[str, Tensor], state: str) -> ModelOutput:
        """Run one input."""
        with self.as_(state):
            return run_torch(self.model, feeds, self.device)

    @contextmanager
    def scaled(self, factor: float) -> Iterator[None]:
        """Inside the block, multiply the change of the adapters by a factor."""
        for handle, weight in zip(self.handles, self.weights, strict=True):
            handle.weight = factor * weight
        try:
            yield
        finally:
            for handle, weight in zip(self.handles, self.weights, strict=True):
                handle.weight = weight


class Graph:
    """An ONNX graph in onnxruntime. If the graph has slots, they are filled with the adapters."""

    def __init__(self, path: Path, adapters: Sequence[Adapter], weights: Sequence[float]) -> None:
        from ..onnx.session import Session

        self.path = path
        self.session = Session(path)
        self.chosen: dict[str, float] | None = None
        if self.session.slots:
            self.chosen = {}
            for at, (adapter, weight) in enumerate(zip(adapters, weights, strict=True)):
                self.session.load(f"adapter{at}", adapter)
                self.chosen[f"adapter{at}"] = weight

    def run(self, feeds: Mapping[str, Tensor]) -> ModelOutput:
        """Run one input.

        Raises:
            Unsupported: the graph outputs neither logits nor hidden states.
            UsageError, ShapeMismatch: the graph needs other inputs.
        """
        import numpy as np
        import torch

        given = {name: value.numpy() for name, value in feeds.items() if name in self.session.inputs}
        ids = feeds.get("input_ids")
        if ids is not None:
            shape = tuple(ids.shape)
            usual = {
                "attention_mask": np.ones(shape, np.int64), "token_type_ids": np.zeros(shape, np.int64),
                "position_ids": np.arange(shape[1], dtype=np.int64)[None].repeat(shape[0], 0),
            }  # fmt: skip
            given |= {name: value for name, value in usual.items() if name in self.session.inputs}
        names = [name for name in ("logits", "last_hidden_state", "start_logits") if name in self.session.outputs]
        if not names:
            cure = "Name the outputs logits or last_hidden_state, as adapterkit export does"
            raise Unsupported("the graph outputs neither logits nor hidden states", path=self.path, cure=cure)
        told = self.session.run(given, self.chosen, names[:1])
        return output_of({name: torch.from_numpy(np.asarray(value, np.float64)) for name, value in told.items()})
