"""Run a model with slots in onnxruntime: load the model once, and swap adapters between runs."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib import import_module
from numbers import Real
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..core.adapter import Adapter
from ..core.arguments import checks_types
from ..errors import (
    AdapterkitError,
    Malformed,
    ShapeMismatch,
    TargetNotFound,
    Unsupported,
    UsageError,
    first_line,
    nearest,
    shown,
)
from ..formats.olive import has_olives_names
from ..io.lazy import as_array
from ..io.locations import located, path_text
from ..io.ort_adapter import is_ort_adapter, read_ort_adapter
from ..io.safetensors import handles, read_header
from .building import Array, Dtype
from .folders import graphs_in
from .model_file import GraphSource, opened
from .providers import CPU, CUDA, OrtBinding, OrtInput, OrtSession, OrtValue, best_provider, named, quiet_options
from .rowwise import INDEX, ROWS, stacked
from .slot_values import KIND, SAFETENSORS, fit_opened
from .slots import fills_of, neutral
from .trial_inputs import STATE, STATES, sizes_beside, windows_beside

if TYPE_CHECKING:
    import numpy.typing as npt

    from ..io.lazy import Lazy
    from .reading import Base

_KINDS = {
    "float": "float32", "double": "float64", "float16": "float16", "bfloat16": "bfloat16", "bool": "bool",
    **{name: name for name in ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")},
}  # fmt: skip
"""A map from onnxruntime's name for an element type to numpy's name for it."""


def check_slot(name: str, array: Array, slots: Mapping[str, OrtInput], path: str | PathLike[str] | None) -> None:
    """Check that a tensor fits its slot.

    Raises:
        TargetNotFound: there is no such slot; the error gives the nearest name.
        ShapeMismatch: the tensor's dtype or shape does not fit the slot.
    """
    if name not in slots:
        cure = nearest(name, slots) or (
            "Pass an adapter that was made for this model"
            if slots
            else "Give the model slots: inject an adapter with --mode slots (mode='slots')"
        )
        raise TargetNotFound(f"the model has no slot {name}", path=path, cure=cure)
    declared, kind = slots[name].shape, kind_of(slots[name])
    if array.dtype != kind:
        raise ShapeMismatch(
            f"the tensor has dtype {array.dtype}, but its slot has {kind}", path=path, where=name, cure=_WRITE_ADAPTER
        )
    sizes = zip(declared, array.shape, strict=False)
    if len(declared) != array.ndim or any(isinstance(size, int) and size != wanted for size, wanted in sizes):
        raise ShapeMismatch(
            f"the tensor has shape {list(array.shape)}, but its slot has {declared}",
            path=path,
            where=name,
            cure=_WRITE_ADAPTER,
        )


def check_together(feeds: Mapping[str, Array], slots: Mapping[str, OrtInput], path: str | PathLike[str] | None) -> None:
    """Check that each dynamic size, such as the rank, is the same in all tensors of an update.

    If a tensor is missing, its dynamic sizes count as 0.

    Raises:
        ShapeMismatch: a dynamic size differs between two tensors of an update.
    """
    stems = {name.rpartition(".")[0] for name in feeds}
    open_sizes: dict[tuple[str, str], int] = {}
    for name, entry in slots.items():
        stem = name.rpartition(".")[0]
        for axis, size in enumerate(entry.shape):
            if stem not in stems or not isinstance(size, str) or not size.startswith(f"{name}."):
                continue
            row_count = feeds[name].shape[axis] if name in feeds else 0
            word = size.removeprefix(f"{name}.")
            if open_sizes.setdefault((stem, word), row_count) != row_count:
                why = (
                    f"the size {word} is {row_count} in this tensor, but {open_sizes[stem, word]} in another tensor of "
                    "the same update"
                )
                raise ShapeMismatch(why, path=path, where=name, cure=_WRITE_ADAPTER)


def kind_of(entry: OrtInput) -> Dtype:
    """Return the numpy dtype of a session's input or slot.

    Raises:
        Unsupported: numpy has no dtype for the input's type.
    """
    name = _KINDS.get(entry.type.removeprefix("tensor(").removesuffix(")"))
    if name is None:
        raise Unsupported(
            f"numpy has no dtype for the input's type {entry.type}",
            where=entry.name,
            cure="Run the model with onnxruntime itself",
        )
    if name == "bfloat16":
        kind: Dtype = np.dtype(import_module("ml_dtypes").bfloat16)
        return kind
    return np.dtype(name)


PAST = "past_key_values."
"""Prefix of the names of a language model's inputs for cached keys and values."""

MOST_NAMED = 4
"""An error lists at most this many inputs, or this many graphs of a folder."""

MOST_KEPT = 1 << 24
"""A session keeps the parsed graph if its file has at most this many bytes."""

MOST_STACKS = 8
"""A session keeps the stacked values of at most this many sets of adapters, because each set takes memory."""

_WRITE_ADAPTER = "Write the adapter for this model with adapterkit.onnx.write_adapter"


# A session copies the slots' values to its device, and passes them to onnxruntime by name. The session does not use
# onnxruntime's own `LoraAdapter`, for four reasons. A run that outlives the `LoraAdapter` reads freed memory. Bindings
# ignore a `LoraAdapter`. If two adapters set the same slot, onnxruntime silently uses the first adapter. A
# `LoraAdapter` that was created in Python stays in CPU memory.


Provider = str | tuple[str, Mapping[str, Any]]
"""A provider: its name, or its name and options."""

Choice = str | Mapping[str, float] | Sequence[str | None] | None
"""The adapters of a run: one name; a map from names to weights; a list with a name or None for each row of the batch;
or None for the base alone."""


class Session:
    """A model in onnxruntime.

    Args:
        model: an ONNX file, or a folder that contains one graph. Adapters can only be loaded if the graph has slots.
            For a folder of several graphs, see `FolderSession`.
        adapters: adapters to load, by name; see `load`.
        providers: the execution providers, in order of preference. Each provider is a name, or a pair of a name and a
            mapping of options. A name is short, such as `cuda`, `openvino`, `coreml`, `directml` or `cpu`, or is
            onnxruntime's own name for the provider. By default, CUDA if there is a CUDA device, otherwise the CPU.

    Attributes:
        inputs: names of the required inputs.
        outputs: names of the outputs.
        slots: names of the slots.

    Raises:
        StorageError, Malformed: the model cannot be read, or onnxruntime refuses it.
        Unsupported: onnxruntime has no kernel for a node of the model.
        UsageError: a requested provider does not run on this machine, or the folder has several graphs.
    """

    @checks_types
    def __init__(
        self, model: str | PathLike[str], adapters: Mapping[str, Adapter | str | PathLike[str]] | None = None, *,
        providers: Sequence[Provider] | None = None,
    ) -> None:  # fmt: skip
        self._path = _only_graph(located(model))
        source = opened(self._path)  # Refuse bad external data before onnxruntime reads it.
        # Each `load` needs the graph. Keep it, unless its file also holds the weights, which would take memory twice.
        self._source = replace(source, original=b"") if len(source.original) <= MOST_KEPT else None
        self._session = _started(self._path, providers)
        metadata = self._session.get_modelmeta().custom_metadata_map
        fills = fills_of(metadata)
        entries = {entry.name: entry for entry in self._session.get_inputs()}
        self._entries = {name: entry for name, entry in entries.items() if name not in fills}
        # "Overridable initializer" is onnxruntime's term for an input that has a default value.
        self._slots = {entry.name: entry for entry in self._session.get_overridable_initializers()}
        self._slots |= {name: entry for name, entry in entries.items() if name in fills}
        declared = {name: (entry.shape, kind_of(entry)) for name, entry in self._slots.items() if name in fills}
        self._unchanging = neutral(fills, declared)
        self._neutral = {name: _value(array) for name, array in self._unchanging.items()}
        self.inputs, self.slots = tuple(self._entries), tuple(self._slots)
        self.outputs = tuple(entry.name for entry in self._session.get_outputs())
        self._sizes, self._windows = sizes_beside(self._path), windows_beside(self._path)
        self._loaded: dict[str, dict[str, tuple[Array, OrtValue]]] = {}
        self._by_rows = ROWS in metadata
        self._stacks: dict[tuple[str | None, ...], dict[str, OrtValue]] = {}
        for name, adapter in check_mapping(adapters or {}, "adapters").items():
            self.load(name, adapter)

    @property
    def providers(self) -> tuple[str, ...]:
        """The providers that the session runs on."""
        return tuple(self._session.get_providers())

    @property
    def types(self) -> dict[str, tuple[str, tuple[int | str | None, ...]]]:
        """A map from each required input to its dtype and sizes; a dynamic size is a name or None."""
        return {name: (str(kind_of(entry)), tuple(entry.shape)) for name, entry in self._entries.items()}

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the loaded adapters."""
        return tuple(self._loaded)

    @checks_types
    def load(
        self, name: str, adapter: Adapter | str | PathLike[str], *, rename: str | Sequence[str] = (),
        base_weights: Base | None = None,
    ) -> None:  # fmt: skip
        """Load an adapter onto the session's device; if an adapter of this name is already loaded, replace it.

        Args:
            name: the adapter's name in calls of `run`.
            adapter: an adapter, the path of an adapter in any format, or the path of a file that `write_adapter` wrote
                for this model's slots. An `.onnx_adapter` file that Olive wrote for its own graph is also accepted.
            rename: rules for names that cannot be resolved, as in `adapterkit.merge`.
            base_weights: the base's weights, for adapter files whose values depend on them.

        Raises:
            TargetNotFound: the model has no slot for a tensor, or a rule matches no target; the error gives the nearest
                name.
            UsageError: `rename` is given, but the tensors in the file are named after slots, not after targets.
            ShapeMismatch: a tensor does not fit its slot, or the other tensors of its update.
            Malformed: the file is damaged.
        """
        if not isinstance(name, str):  # `run` takes None for the base.
            raise UsageError(f"the adapter's name is {name!r}, not a text", where="name", cure="Pass a text")
        path = None if isinstance(adapter, Adapter) else path_text(adapter)
        values: Mapping[str, Lazy] | None = {} if path is None else _slot_values(path)
        ready_made = values is not None and path is not None
        values = values or {}
        # If Olive wrote the file for another graph, this model has none of the slots that the file names. But Olive's
        # slot names contain the targets' names, so `fit` can read the file like an adapter in any other format.
        if ready_made and path is not None and not values.keys() & self._slots.keys() and has_olives_names(Path(path)):
            ready_made = False
        if ready_made:
            assert path is not None
            if rename:
                cure = "Omit --rename (rename=), or pass the adapter that the file was written from"
                why = "the file's tensors are named after slots, so there are no targets to rename"
                raise UsageError(why, path=path, cure=cure)
            feeds = {key: as_array(leaf) for key, leaf in values.items()}
        else:
            try:
                feeds = fit_opened(self._graph(), adapter, rename=rename, base_weights=base_weights)
            except AdapterkitError as error:
                if not isinstance(error, UsageError):
                    error.at(path=self._path)
                raise
        for key, array in feeds.items():
            check_slot(key, array, self._slots, path)
        check_together(feeds, self._slots, path)
        # If the model's slots are required inputs, an adapter file fills all slots: for targets without an update, the
        # file contains tensors that change nothing. Drop these tensors. Otherwise, two adapters without a common target
        # would fill the same slots, and could not be used together.
        same = {key for key, array in self._unchanging.items() if key in feeds and np.array_equal(feeds[key], array)}
        stems = {key.rpartition(".")[0] for key in feeds.keys() - same}
        feeds = {key: array for key, array in feeds.items() if key.rpartition(".")[0] in stems}
        self._loaded[name] = {key: (array, self._placed(array)) for key, array in feeds.items()}
        self._stacks = {}  # Do not clear the old dictionary: another thread may be about to add a stack to it.

    def _graph(self) -> GraphSource:
        """Return the parsed graph."""
        return self._source or opened(self._path)

    def _restore(self, name: str, values: dict[str, tuple[Array, OrtValue]] | None) -> None:
        """Undo a `load`: `values` are the values that were loaded under this name before it; None if none were."""
        if values is None:
            self._loaded.pop(name, None)
        else:
            self._loaded[name] = values
        self._stacks = {}

    @checks_types
    def unload(self, name: str) -> None:
        """Remove an adapter.

        Raises:
            UsageError: no adapter of this name is loaded.
        """
        self._named(name)
        del self._loaded[name]
        self._stacks = {}

    @checks_types
    def run(
        self, inputs: Mapping[str, npt.ArrayLike], adapter: Choice = None, outputs: Sequence[str] | None = None
    ) -> dict[str, Array]:
        """Run the model.

        Args:
            inputs: an array for each required input (`self.inputs`), and optionally for slots and other optional
                inputs. For one text, a language model only needs `input_ids`: by default, the past is empty, no token
                is masked, and positions count up.
            adapter: the adapter's name. To use several adapters that have no common target, pass a mapping from names
                to weights. If `inject` wrote the model with `mode="rows"`, you can pass a list with a name or None for
                each row of the batch; a row with None uses the base alone. If `adapter` itself is None, the results
                equal the results of the base, bit for bit.
            outputs: the names of the outputs to return; all by default.

        Raises:
            UsageError: an input is missing, unknown or of another dtype; an output is unknown; no adapter of this name
                is loaded; a weight is not a finite number; or a list of adapters does not fit the model or the batch.
            ShapeMismatch: onnxruntime cannot run the model on these inputs, for example because of their shapes.
            Unsupported: two adapters use the same slot; an input and an adapter set the same slot; or an adapter gets
                a weight other than 1, but has no scaling that the weight could multiply.
        """
        check_mapping(inputs, "inputs")
        feeds = {name: _value(self._checked(name, array)) for name, array in inputs.items()}
        if missing := [name for name in self.inputs if name not in feeds]:
            feeds |= {name: _value(array) for name, array in self._usual(inputs, missing).items()}
        if missing := [name for name in self.inputs if name not in feeds]:
            names_text = ", ".join(f"{name} {self._shape(name)}" for name in missing[:MOST_NAMED])
            more = f" and {len(missing) - MOST_NAMED} more" if len(missing) > MOST_NAMED else ""
            raise UsageError(
                f"no input {names_text}{more} was given", path=self._path, cure="Pass an array for each input"
            )
        names = list(self.outputs if outputs is None else check_names(outputs, "outputs"))
        for name in names:
            if name not in self.outputs:
                raise UsageError(
                    f"the model has no output {name!r}",
                    path=self._path,
                    cure=nearest(str(name), self.outputs) or _OUTPUTS,
                )
        if not names:  # onnxruntime would return all outputs.
            return {}
        if adapter is not None and not isinstance(adapter, str | Mapping):
            chosen = self._of_rows(check_names(adapter, "adapter"), inputs)
        else:
            chosen = self._chosen(adapter)
        if both := sorted(feeds.keys() & chosen.keys()):
            cure = "Omit this input, or omit the adapter"
            raise Unsupported(
                "this slot is set twice: by an input and by the adapter", path=self._path, where=both[0], cure=cure
            )
        feeds = self._neutral | feeds | chosen
        try:
            results = self._session.run_with_ort_values(names, feeds)
        except Exception as error:  # onnxruntime's errors have no common base class.
            why = f"onnxruntime cannot run the model ({first_line(error)})"
            cure = "Pass inputs whose sizes match each other"
            raise ShapeMismatch(why, path=self._path, cure=cure) from None
        return {name: _array(result) for name, result in zip(names, results, strict=True)}

    @checks_types
    def generate(
        self, input_ids: object, *, max_new_tokens: int = 32, adapter: Choice = None, end: int | Sequence[int] = (),
        attention_mask: object = None,
    ) -> Array:  # fmt: skip
        """Continue texts greedily, always with the most likely token. For sampling, call `run` in a loop.

        Args:
            input_ids: the tokens, `[batch, length]`, or `[length]` for one text. Pad shorter texts on the left.
            max_new_tokens: the largest number of tokens to add.
            adapter: the adapters, as in `run`.
            end: the token or tokens that end a text, such as `eos_token_id` in the model's `generation_config.json`.
                If a text ends earlier than others, it is padded with the first of these tokens.
            attention_mask: 0 for padding and 1 for tokens, `[batch, length]`; required for several texts.

        Returns:
            all tokens, `[batch, length + new]`.

        Raises:
            UsageError: the model is not a language model with a past; the prompt is empty; the mask is missing, does
                not fit the tokens, or excludes the last token of a text; or the texts are padded, but the model has
                convolutions whose states would include the padding.
            Also the errors of `run`.
        """
        past = [name for name in self.inputs if is_past(name)]
        if "logits" not in self.outputs or not past or "input_ids" not in self.inputs:
            cure = "Export the language model with adapterkit export. For other models, call run"
            why = "generate needs a model with the input input_ids, inputs for a past, and the output logits"
            raise UsageError(why, path=self._path, cure=cure)
        tokens, mask = prompt(input_ids, attention_mask)
        if not mask.all() and any(name.startswith(STATE) for name in past):
            why = "the states of the model's convolutions would include the padding of shorter texts"
            raise UsageError(why, path=self._path, where="attention_mask", cure="Pass texts of equal length")
        ends = tokens_of(end)
        feeds: dict[str, Array] = {"input_ids": tokens}
        done = np.zeros(len(tokens), bool)
        for _ in range(max_new_tokens):
            feeds |= self._places(mask, feeds["input_ids"].shape[1])
            outputs = self.run(as_declared(self, feeds), adapter)
            new = outputs["logits"][:, -1].argmax(-1).astype(np.int64)
            new = np.where(done, ends[0] if ends else 0, new)
            tokens = np.concatenate([tokens, new[:, None]], 1)
            mask = np.concatenate([mask, np.ones_like(new[:, None])], 1)
            done |= np.isin(new, ends)
            if done.all():
                break
            feeds = {"input_ids": new[:, None]} | {name: outputs[new_name(name)] for name in past}
        return tokens

    def _places(self, mask: Array, length: int) -> dict[str, Array]:
        """Return `attention_mask` for all tokens, and `position_ids` for the last `length` tokens.

        An array is left out if the model has no input for it.
        """
        arrays_by_name = {"attention_mask": mask, "position_ids": np.maximum(mask.cumsum(1) - 1, 0)[:, -length:]}
        return {
            name: array.astype(kind_of(self._entries[name]))
            for name, array in arrays_by_name.items()
            if name in self.inputs
        }

    async def run_async(
        self, inputs: Mapping[str, npt.ArrayLike], adapter: Choice = None, outputs: Sequence[str] | None = None
    ) -> dict[str, Array]:
        """Call `run` in a thread, so that the call does not block the event loop."""
        return await asyncio.to_thread(self.run, inputs, adapter, outputs)

    async def generate_async(
        self, input_ids: object, *, max_new_tokens: int = 32, adapter: Choice = None, end: int | Sequence[int] = (),
        attention_mask: object = None,
    ) -> Array:  # fmt: skip
        """Call `generate` in a thread, so that the call does not block the event loop."""
        call = partial(
            self.generate, input_ids, max_new_tokens=max_new_tokens, adapter=adapter, end=end,
            attention_mask=attention_mask,
        )  # fmt: skip
        return await asyncio.to_thread(call)

    def _usual(self, inputs: Mapping[str, npt.ArrayLike], missing: Sequence[str]) -> dict[str, Array]:
        """Return the default values of a language model's missing inputs. Omit inputs that have no default.

        The defaults are an empty past, a mask of ones, and positions that count up from the past's length.
        """
        ids = inputs.get("input_ids", inputs.get("inputs_embeds"))
        if ids is None or np.ndim(ids) not in (2, 3) or not any(is_past(name) for name in self.inputs):
            return {}
        batch, length = np.shape(ids)[:2]
        given = {name: np.shape(array) for name, array in inputs.items() if name.startswith(PAST)}
        # Skip the caches of sliding windows: their length is fixed, so it does not show how many tokens the past has.
        lengths = {shape[2] for name, shape in given.items() if len(shape) == 4 and name not in self._windows}
        if len(lengths) != 1 and given:  # The number of tokens in the past is unknown.
            return {}
        past = lengths.pop() if given else 0
        defaults: dict[str, Array] = {}
        for name in missing:
            entry = self._entries[name]
            if name.startswith(PAST):
                sizes = self._cache_sizes(entry)
                if not given and sizes is not None:
                    window = self._windows.get(name, 0)
                    defaults[name] = np.zeros((batch, sizes[0], window, sizes[1]), kind_of(entry))
            elif name.startswith(STATES):
                state = entry.shape[1:]
                if not given and all(isinstance(size, int) for size in state):
                    defaults[name] = np.zeros((batch, *state), kind_of(entry))
            elif name == "attention_mask" and batch == 1:  # With several texts, require a mask: some may be padded.
                defaults[name] = np.ones((batch, past + length), kind_of(entry))
            elif name == "position_ids" and np.all(np.asarray(inputs.get("attention_mask", 1)) == 1):
                # If a text is padded, the caller must pass the positions: they do not count up from the past's length.
                defaults[name] = np.arange(past, past + length, dtype=kind_of(entry))[None].repeat(batch, 0)
        return defaults

    def _cache_sizes(self, entry: OrtInput) -> tuple[int, int] | None:
        """Return the number of heads and the head size of a cache input; None if one of them is unknown."""
        if len(entry.shape) != 4:
            return None
        # onnxruntime-genai's builder declares the head size as dynamic. The real size is in its genai_config.json.
        known = (self._sizes.get("heads"), self._sizes.get("head_size"))
        heads, size = (
            one if isinstance(one, int) else other for one, other in zip(entry.shape[1::2], known, strict=True)
        )
        return None if heads is None or size is None else (heads, size)

    def _shape(self, name: str) -> str:
        return f"[{', '.join(str(size) for size in self._entries[name].shape)}]"

    def __repr__(self) -> str:
        past = sum(is_past(name) for name in self.inputs)
        inputs = [name for name in self.inputs if not is_past(name)] + ([f"{past} inputs for the past"] if past else [])
        adapters = f", adapters {', '.join(self._loaded)}" if self._loaded else ""
        return f"Session({self._path.name!r}: {', '.join(inputs)}; {len(self.slots):,} slots{adapters})"

    @checks_types
    def binding(self, adapter: Choice = None) -> OrtBinding:
        """Return an onnxruntime binding for `run_bound`, with the values of the adapter's slots already bound.

        Bind the inputs and the outputs to the binding, then call `run_bound`. With a binding, outputs such as past
        keys and values stay on the device. To use an adapter with a binding, pass the adapter here, because onnxruntime
        ignores the adapters in run options if there is a binding.

        Raises:
            UsageError, Unsupported: as in `run`.
        """
        binding = self._session.io_binding()
        if adapter is not None and not isinstance(adapter, str | Mapping):
            raise UsageError(
                "a binding cannot have different adapters for different rows", path=self._path, cure="Call run instead"
            )
        for key, value in (self._neutral | self._chosen(adapter)).items():
            binding.bind_ortvalue_input(key, value)
        return binding

    @checks_types
    def run_bound(self, binding: OrtBinding) -> None:
        """Run the model with the inputs of a binding, and write the outputs to the binding.

        Raises:
            UsageError: onnxruntime cannot run the model, for example because an input is not bound.
        """
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:  # onnxruntime's errors have no common base class.
            why, cure = (
                f"onnxruntime cannot run the model ({first_line(error)})",
                "Bind every input to the binding, and each output that you need",
            )
            raise UsageError(why, path=self._path, cure=cure) from None

    def _checked(self, name: str, given: object) -> Array:
        entry = self._entries.get(name) or self._slots.get(name)
        if entry is None:
            cure = nearest(str(name), self.inputs) or f"The inputs are {', '.join(self.inputs)}"
            raise UsageError(f"the model has no input {name!r}", path=self._path, cure=cure)
        kind = kind_of(entry)
        array = _as_numpy(name, given, self._path)
        if array.dtype != kind:
            raise UsageError(
                f"the array has dtype {array.dtype}, but the input has {kind}",
                path=self._path,
                where=name,
                cure="Cast the array to the input's dtype",
            )
        return array

    def _named(self, name: str) -> dict[str, tuple[Array, OrtValue]]:
        if not isinstance(name, str) or name not in self._loaded:
            cure = nearest(str(name), self._loaded) or f"Loaded: {', '.join(self._loaded) or 'none'}"
            raise UsageError(f"no adapter {name!r} is loaded", path=self._path, cure=cure)
        return self._loaded[name]

    def _chosen(self, adapter: str | Mapping[str, float] | None) -> dict[str, OrtValue]:
        weights = {} if adapter is None else {adapter: 1.0} if isinstance(adapter, str) else dict(adapter)
        feeds: dict[str, OrtValue] = {}
        for name, weight in weights.items():
            loaded = self._named(name)
            if both := sorted(feeds.keys() & loaded.keys()):
                cure = "Combine the two adapters with adapterkit.ops.add, and load the result"
                raise Unsupported(f"{name!r} and another adapter use the same slot", where=both[0], cure=cure)
            feeds |= {key: value for key, (_, value) in loaded.items()}
            if weight != 1:
                feeds |= self._weighed(name, loaded, weight)
        return feeds

    def _of_rows(self, names: list[str | None], inputs: Mapping[str, npt.ArrayLike]) -> dict[str, OrtValue]:
        """Return the values of the stacked slots, and of `adapter_index`, which selects an adapter for each row.

        Raises:
            UsageError: the model has no stacked slots; `names` and the batch have different lengths; or an adapter is
                not loaded.
        """
        if not self._by_rows:
            cure = "Inject the adapter with --mode rows (mode='rows'), or run the rows of each adapter separately"
            why = "this model cannot use a different adapter for each row of the batch"
            raise UsageError(why, path=self._path, cure=cure)
        sizes = {np.shape(array)[0] for array in inputs.values() if np.ndim(array)}
        if len(names) not in sizes:
            why = f"the list has {len(names)} adapters for a batch of {max(sizes, default=0)} rows"
            raise UsageError(why, path=self._path, where="adapter", cure="Pass a list with a name or None for each row")
        # Take the dictionary before the adapters: if another thread replaces an adapter after this line, a stack with
        # the old adapter then goes into a dictionary that later runs do not use.
        stacks = self._stacks
        loaded = {name: self._named(name) for name in names if name is not None}
        order = tuple(sorted(set(names), key=lambda name: (name is not None, name or "")))
        if (stack := stacks.get(order)) is None:
            arrays = {name: {key: array for key, (array, _) in tensors.items()} for name, tensors in loaded.items()}
            arrays_by_slot = stacked(order, arrays, self._slots)
            stack = {key: self._placed(array) for key, array in arrays_by_slot.items() if key != INDEX}
            for oldest in list(stacks)[: max(len(stacks) - MOST_STACKS + 1, 0)]:
                stacks.pop(oldest, None)
            stacks[order] = stack
        index = np.array([order.index(name) for name in names], np.int64)
        return stack | {INDEX: self._placed(index)}

    def _weighed(self, name: str, loaded: Mapping[str, tuple[Array, OrtValue]], weight: float) -> dict[str, OrtValue]:
        """Multiply an adapter's scalings by a weight, and return the products as values for the scaling slots."""
        if not isinstance(weight, Real) or not abs(weight) <= sys.float_info.max:
            why = f"the weight of adapter {name!r} is {shown(weight)}, which is not a finite number"
            raise UsageError(why, path=self._path, where="adapter", cure="Pass a number for each adapter")
        stems = {key.rpartition(".")[0] for key in loaded}
        if bare := sorted(stem for stem in stems if f"{stem}.scaling" not in loaded):
            cure = "Use the adapter with weight 1, or scale the adapter with adapterkit.ops.scale and load the result"
            why = f"adapter {name!r} cannot have a weight other than 1, because this update has no scaling"
            raise Unsupported(why, where=bare[0], cure=cure)
        keys = [f"{stem}.scaling" for stem in sorted(stems)]
        return {key: self._placed((loaded[key][0] * weight).astype(loaded[key][0].dtype)) for key in keys}

    def _placed(self, array: Array) -> OrtValue:
        return _value(array, "cuda" if self.providers[0] == CUDA else "cpu")


def as_declared(session: Session, inputs: Mapping[str, npt.ArrayLike]) -> dict[str, Array]:
    """Return inputs as arrays. Integers are cast to the integer type of the session's input, such as int32.

    Raises:
        UsageError: an input is not an array.
    """
    types = {name: np.dtype(kind) for name, (kind, _) in session.types.items() if "int" in kind}
    arrays = {name: _as_numpy(name, given, session._path) for name, given in inputs.items()}
    return {
        name: array.astype(types[name]) if name in types and array.dtype.kind in "iu" else array
        for name, array in arrays.items()
    }


def new_name(name: str) -> str:
    """Return the name of the output that must be passed as the input `name` in the next run."""
    if name.startswith((PAST, STATE)):
        return f"present.{name.removeprefix(PAST).removeprefix(STATE)}"
    return f"present{name.removeprefix('past')}"


def is_past(name: str) -> bool:
    """Whether an input of a graph belongs to the past of a language model."""
    return name.startswith((PAST, *STATES))


def _only_graph(path: Path) -> Path:
    """Return the path of a folder's only graph; return the path of a file unchanged.

    Raises:
        UsageError: the folder has several graphs.
    """
    if not path.is_dir():
        return path
    files = graphs_in(path)
    if len(files) > 1:
        names = ", ".join(file.relative_to(path).as_posix() for file in files[:MOST_NAMED])
        cure = "Open the folder with adapterkit.onnx.FolderSession, or pass one of the graphs"
        raise UsageError(f"the model is a folder of several graphs: {names}", path=path, cure=cure)
    return files[0] if files else path


def tokens_of(tokens: int | Sequence[int] | None) -> list[int]:
    """Return token ids as a list; `tokens` is one id, a sequence of ids, or None for no id."""
    return [int(token) for token in np.atleast_1d(np.asarray(() if tokens is None else tokens, np.int64))]


def token_ids(input_ids: object) -> Array:
    """Return the token ids of one or more texts as an array, `[batch, length]`.

    Raises:
        UsageError: the texts have different lengths, or are not token ids.
    """
    try:
        return np.atleast_2d(np.asarray(input_ids, np.int64))
    except (TypeError, ValueError) as error:
        cure = "Pass integers, and pad shorter texts so that all texts have the same length"
        raise UsageError(f"not an array of token ids ({first_line(error)})", where="input_ids", cure=cure) from None


def prompt(input_ids: object, attention_mask: object) -> tuple[Array, Array]:
    """Check the tokens and the mask of a prompt; return both as arrays, `[batch, length]`.

    Raises:
        UsageError: there are no tokens; there are several texts but no mask; the mask does not have the tokens' shape;
            the mask has values other than 0 and 1; or the mask excludes the last token of a text.
    """
    tokens = token_ids(input_ids)
    if tokens.ndim != 2 or tokens.shape[1] == 0 or tokens.shape[0] == 0:
        why = f"the prompt must have the shape [batch, length], with sizes above 0; its shape is {list(tokens.shape)}"
        raise UsageError(why, where="input_ids", cure="Pass one or more texts of at least one token")
    if attention_mask is None:
        if len(tokens) > 1:
            cure = "Pass attention_mask= with 0 for padding on the left and 1 for tokens"
            raise UsageError(f"a mask is required for {len(tokens)} texts", where="attention_mask", cure=cure)
        return tokens, np.ones_like(tokens)
    mask = np.atleast_2d(np.asarray(attention_mask, np.int64))
    if mask.shape != tokens.shape or not np.isin(mask, (0, 1)).all():
        why = (
            f"the mask must have the tokens' shape {list(tokens.shape)} and only the values 0 and 1; "
            f"its shape is {list(mask.shape)}"
        )
        raise UsageError(why, where="attention_mask", cure="Pass 0 or 1 for each token (attention_mask=)")
    if not mask[:, -1].all():
        cure = "Pad on the left, for example with tokenizer.padding_side = 'left'"
        raise UsageError("the mask excludes the last token of a text", where="attention_mask", cure=cure)
    return tokens, mask


def _slot_values(path: str | PathLike[str]) -> dict[str, Lazy] | None:
    """Return a map from slot names to the tensors in a file; None if the file's tensors are not named after slots."""
    if is_ort_adapter(path):
        return dict(read_ort_adapter(path).tensors)
    if not str(path).lower().endswith(SAFETENSORS) or not Path(path).is_file():
        return None
    header = read_header(path)
    return handles(header) if header.metadata.get("format") == KIND["format"] else None


def _as_numpy(name: str, given: object, path: Path) -> Array:
    try:
        return np.asarray(given)
    except (TypeError, ValueError, RuntimeError) as error:  # torch raises TypeError and RuntimeError.
        why = f"the input is not an array, and cannot be made one ({first_line(error)})"
        cure = "Pass a numpy array, or a torch tensor that is on the CPU and needs no gradient"
        raise UsageError(why, path=path, where=name, cure=cure) from None


def _value(array: Array, device: str = "cpu") -> OrtValue:
    onnxruntime: Any = import_module("onnxruntime")
    whole = np.ascontiguousarray(array)
    if whole.dtype.kind == "V" or whole.dtype.name == "bfloat16":
        from onnx import TensorProto

        narrow: OrtValue = onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(whole, TensorProto.BFLOAT16)
        return narrow
    # Restore the shape, because ascontiguousarray turns a scalar into shape [1].
    value: OrtValue = onnxruntime.OrtValue.ortvalue_from_numpy(whole.reshape(array.shape), device, 0)
    return value


def _array(value: OrtValue) -> Array:
    """Return a result as an array; convert bfloat16 with torch, because onnxruntime cannot convert it to numpy."""
    if value.data_type() != "tensor(bfloat16)":
        array: Array = value.numpy()
        return array
    torch, ml_dtypes = import_module("torch"), import_module("ml_dtypes")
    bits: Array = torch.from_dlpack(value._ortvalue).view(torch.int16).cpu().numpy()
    return bits.view(ml_dtypes.bfloat16)


def _started(path: Path, providers: Sequence[Provider] | None) -> OrtSession:
    onnxruntime: Any = import_module("onnxruntime")
    options = quiet_options()  # By default, onnxruntime warns about every slot, because no slot is constant.
    given = [_provider(one) for one in _several(providers)]
    asked = [(named(name), options_) for name, options_ in given]
    wanted: list[Any] = [(name, options_here) if options_here else name for name, options_here in asked]
    wanted = wanted if providers is not None else list(dict.fromkeys((best_provider(), CPU)))
    # Check first whether all providers are available. If one is not, some versions of onnxruntime fail, and other
    # versions use another provider, with a warning or silently.
    names = [name for name, _ in asked]
    available: list[str] = onnxruntime.get_available_providers()
    _refuse([name for name in names if name not in available], available)
    try:
        session: OrtSession = onnxruntime.InferenceSession(str(path), options, providers=wanted)
    except Exception as error:
        if "NOT_IMPLEMENTED" in str(error) or type(error).__name__ == "NotImplemented":
            why, cure = (
                f"onnxruntime has no kernel for a node of the model ({first_line(error)})",
                "Export the model in float32 or float16",
            )
            raise Unsupported(why, path=path, cure=cure) from None
        raise Malformed(
            f"onnxruntime refuses the model ({first_line(error)})", path=path, cure="Export the model again"
        ) from None
    _refuse([name for name in names if name not in session.get_providers()], available)
    return session


def _several(providers: Sequence[Provider] | None) -> Sequence[Provider]:
    if providers is not None and (isinstance(providers, str) or not isinstance(providers, Sequence)):
        raise UsageError(f"{shown(providers)} is not a list of providers", where="providers", cure=_PROVIDERS)
    return providers or ()


def _provider(given: Provider) -> tuple[str, dict[str, Any]]:
    match given:
        case str():
            return given, {}
        case (str() as name, Mapping() as options):
            return name, dict(options)
    raise UsageError(f"{shown(given)} is not a provider", where="providers", cure=_PROVIDERS)


def check_mapping(given: Any, name: str) -> Mapping[Any, Any]:
    """Return an argument that must be a mapping from names.

    Raises:
        UsageError: the argument is not a mapping.
    """
    if not isinstance(given, Mapping):
        raise UsageError(f"{shown(given)} is not a mapping", where=name, cure=f"Pass {name}={{NAME: ...}}")
    return given


def check_names(given: Any, name: str) -> list[Any]:
    """Return an argument that must be a list of names.

    Raises:
        UsageError: the argument is not a list of texts. An element may also be None.
    """
    names = list(given) if isinstance(given, Iterable) and not isinstance(given, str | bytes | Mapping) else None
    if names is None or not all(one is None or isinstance(one, str) for one in names):
        raise UsageError(f"{shown(given)} is not a list of names", where=name, cure=f"Pass {name}=[NAME, ...]")
    return names


def _refuse(lacking: Sequence[str], available: Sequence[str]) -> None:
    if lacking:
        cure = f"This onnxruntime was built with {', '.join(available)}; adapterkit doctor shows which of these run"
        raise UsageError(f"{', '.join(lacking)} does not run here", where="providers", cure=cure)


_PROVIDERS = "Pass a list of names, or of pairs of a name and a mapping, such as providers=['cpu']"
_OUTPUTS = "Omit outputs= to get all outputs"
