"""Run a model on texts and record the inputs of each target. A quantized merge uses these inputs for its rounding.

The base runs once over the texts, with the adapters attached, so that its activations are those of the merged model.
The run needs the memory of the model, plus 4 bytes for each element of the recorded inputs, `[tokens, width]`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING

from ..core.adapter import Adapter
from ..errors import TargetNotFound, Unsupported, UsageError, places_errors
from ..formats import read
from ..io.checkpoint import Checkpoint, fingerprint, opened
from ..io.inputs import inputs_kept
from ..io.lazy import from_numpy
from ..io.locations import exists, located
from ..io.safetensors import write
from ..io.stages import stage
from ..naming.binding import bind
from ..naming.ties import aliases
from ..quant import dequantized, is_quantized
from ..quant._calibration import KEY, VERSION, Calibration, read_calibration
from .models import inputs_for, texts_of

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ..io.lazy import Array

    Base = Checkpoint | str | PathLike[str]
    Source = Adapter | str | PathLike[str]

TEXTS, LENGTH = 16, 64
"""The default number of texts, and the default maximum number of tokens of a text."""


@places_errors
def calibrate(
    base: Base,
    adapters: Source | Sequence[Source],
    out: str | PathLike[str],
    *,
    data: str | PathLike[str] = "builtin",
    weights: Sequence[float] | None = None,
    texts: int = TEXTS,
    length: int = LENGTH,
    seed: int = 0,
    device: str = "auto",
    overwrite: bool = False,
    tied: str | Mapping[str, str] | None = None,
    rename: str | Sequence[str] = (),
    allow_partial: bool = False,
    progress: Callable[[int, int], object] | None = None,
) -> Calibration:
    """Run a base with adapters over texts, and write the inputs of each target to a file.

    Only targets that are linear layers are recorded. `adapterkit.merge(..., quantized="requantize", keep="adapter",
    calibration=out)` uses the file for rounding. If `out` already exists and was made from the same base, adapters,
    texts and settings (`weights`, `texts`, `length`, `seed`), the function reads `out` and does not run the model.

    Args:
        base: a folder of a transformers model, quantized or not. For a GGUF model, the folder from which it was
            converted.
        adapters: one adapter or several: paths, addresses or `Adapter`s.
        out: the `.safetensors` file to write.
        data: `builtin`, a file with one text per line, or a JSON Lines file with a field `text`. Texts that are similar
            to the adapter's training data are best.
        weights: the weight of each adapter, as in the merge; 1 each if None.
        texts: the number of texts, which are chosen at random.
        length: the maximum number of tokens of each text.
        seed: the seed for the random choice of texts.
        device: `auto`, `cpu` or `cuda:N`.
        overwrite: replace `out` if it was made from another base, or with other adapters, texts or settings.
        tied: as in `adapterkit.merge`.
        rename: as in `adapterkit.merge`.
        allow_partial: as in `adapterkit.merge`: omit targets that the base lacks.
        progress: a function that is called with (number of texts done, number of all texts).

    Returns:
        The calibration, as read from `out`.

    Raises:
        UsageError: adapters or texts are missing; `out` does not end in `.safetensors`; or `overwrite` is False and
            `out` already exists, but its base, adapters, texts or settings differ from those of this call.
        Unsupported: the model does not read text, or the base is a GGUF model.
        TargetNotFound, ShapeMismatch: an adapter does not fit the base, or no target is a linear layer.
        Malformed: transformers cannot load the base, or the existing file is not a calibration.

    Example:
        >>> adapterkit.gating.calibrate("base-nf4", "lora", "acts.safetensors", data="texts.txt")  # doctest: +SKIP
        >>> adapterkit.merge("base-nf4", "lora", "out", quantized="requantize", keep="adapter",
        ...                  calibration="acts.safetensors")  # doctest: +SKIP
    """
    from ..torch.pretrained import check_transformers
    from .models import Adapted, device_of, is_gguf_model, load
    from .runner import checked

    target = Path(fspath(out))
    if target.suffix != ".safetensors":
        raise UsageError(
            "the calibration file must end in .safetensors", path=target, cure="Use a name such as acts.safetensors"
        )
    given = [adapters] if isinstance(adapters, (Adapter, str, PathLike)) else list(adapters)
    factors = checked(given, weights, "float32", {"texts": (texts, 1), "length": (length, 2)})
    lines = texts_of(data)
    with inputs_kept():
        checkpoint = opened(base)
        if is_gguf_model(checkpoint):
            cure = (
                "Run adapterkit.gating.calibrate on the folder that the GGUF model was converted from, and pass the "
                "written file with --calibration FILE.safetensors (calibration=)"
            )
            raise Unsupported("a GGUF model cannot run, because it has no config.json", path=checkpoint.root, cure=cure)
        check_transformers(checkpoint.folder, "running models")
        loaded = [each if isinstance(each, Adapter) else read(each, base=checkpoint) for each in given]
        if allow_partial:
            loaded = [_present(each, checkpoint, rename) for each in loaded]
    made_from: dict[str, object] = {
        "base": fingerprint(checkpoint), "adapters": [each.digest() for each in loaded], "weights": list(factors),
        "texts": "builtin" if lines is None else hashlib.sha256("\n".join(lines).encode()).hexdigest(),
        "count": texts, "length": length, "seed": seed,
    }  # fmt: skip
    if exists(located(target)):
        known = read_calibration(target)
        if dict(known.made_from) == made_from:
            return known
        if not overwrite:
            cure = "Pass --overwrite (overwrite=True), or choose another file name"
            raise UsageError(
                "the file exists, but is from another base, other adapters or other texts, or has other settings",
                path=target,
                cure=cure,
            )
    model = load(checkpoint, "float32", device_of(device))
    inputs = inputs_for(
        model, checkpoint.folder, lines, count=texts, length=length, seed=seed, option="--calibration (data=)"
    )
    if not inputs.tokens:
        raise Unsupported(
            "the model does not read text", path=checkpoint.root, cure="Omit --calibration (calibration=)"
        )
    adapted = Adapted(model, loaded, factors, tied=tied, rename=rename)
    stage("reading activations")

    def run() -> None:
        for at, feeds in enumerate(inputs.feeds, 1):
            adapted.run(feeds, "adapted")
            if progress is not None:
                progress(at, len(inputs.feeds))

    return recorded(model, run, target, made_from, inputs.drawn)


def recorded(
    model: nn.Module, run: Callable[[], object], file: Path, made_from: Mapping[str, object], drawn: bool = False
) -> Calibration:
    """Run a model, record the inputs of the linear layers that have adapters, and write these inputs to a file.

    Args:
        model: a model with attached adapters.
        run: a function that runs the model on all texts.
        file: the `.safetensors` file to write.
        made_from: a dict that describes everything that determines the inputs: base, adapters, texts and settings. The
            dict is stored in the file.
        drawn: whether the model reads random ids instead of texts.

    Raises:
        TargetNotFound: no target is a linear layer that ran.
    """
    with _recording(model) as recorder:
        run()
    if not recorder.rows:
        why = "no target of the adapters is a linear layer that ran on the texts"
        raise TargetNotFound(why, cure="Omit --calibration (calibration=), or choose a method that needs no texts")
    record = {"version": VERSION, "made_from": made_from, "shared": recorder.shared, "drawn": drawn}
    tensors = {path: from_numpy(recorder.joined(path)) for path in sorted(recorder.rows)}
    write(file, tensors, {KEY: json.dumps(record, sort_keys=True)})
    return read_calibration(file)


def _present(adapter: Adapter, base: Checkpoint, rename: str | Sequence[str]) -> Adapter:
    """Return the adapter without the targets that the base does not have."""
    weights = dequantized(base) if is_quantized(base) else base
    bound = bind(adapter, weights, partial=True, aliases=aliases(weights), rename=rename, distinct=False)
    missing = set(bound.missing)
    kept = {target: updates for target, updates in adapter.updates.items() if target not in missing}
    return adapter.replace(updates=kept) if missing else adapter


class _Recorder:
    """Record the inputs of linear layers.

    Attributes:
        rows: a map from a target's path to its inputs: a list with one array, `[tokens, width]`, for each call. If
            several targets read the same tensor, only the first of them is a key.
        shared: a map from the path of each target to the path of the first target that reads the same tensor.
    """

    def __init__(self) -> None:
        self.rows: dict[str, list[Array]] = {}
        self.shared: dict[str, str] = {}
        self._last: tuple[str, Tensor] | None = None

    def add(self, paths: Sequence[str], x: Tensor) -> None:
        """Record `x`, the input of one call of a layer, for the layer's targets `paths`."""
        first = paths[0]
        known = self.shared.get(first)
        # Store a tensor only once if several layers read it. Such layers (queries, keys, values) are called one after
        # another, so comparing with the last tensor is enough.
        same = self._last is not None and self._last[1] is x
        if known is None:
            known = self._last[0] if same and self._last is not None else first
            self.shared |= dict.fromkeys(paths, known)
        if known == first:
            self.rows.setdefault(first, []).append(x.detach().reshape(-1, x.shape[-1]).float().cpu().numpy().copy())
        self._last = (known, x)

    def joined(self, path: str) -> Array:
        """Return all inputs of one target, `[tokens, width]`, and release the recorded arrays."""
        import numpy as np

        return np.concatenate(self.rows.pop(path))


def _keep(recorder: _Recorder, paths: Sequence[str], _: nn.Module, args: tuple[Tensor, ...]) -> None:
    if args:
        recorder.add(paths, args[0])


@contextmanager
def _recording(model: nn.Module) -> Iterator[_Recorder]:
    """Record the inputs of linear layers that have adapters, while the `with` block runs."""
    from torch import nn

    from ..torch.forward_hook import hooks_of
    from ..torch.layers import Conv1D

    recorder, handles = _Recorder(), []
    for hook in hooks_of(model):
        paths = [part.target.path for part in hook.parts if part.weight == "weight"]
        if not paths or not (isinstance(hook.module, nn.Linear) or Conv1D.takes(hook.module)):
            continue

        handles.append(hook.module.register_forward_pre_hook(partial(_keep, recorder, tuple(paths))))
    try:
        yield recorder
    finally:
        for handle in handles:
            handle.remove()
