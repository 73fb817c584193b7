"""Run a folder of graphs as one model, such as an encoder with its decoders, and swap adapters in all of them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from functools import partial
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..core.adapter import Adapter, Target
from ..core.arguments import checks_types
from ..errors import Malformed, TargetNotFound, UsageError, nearest
from ..io.inputs import read_input
from ..io.locations import located
from ..io.ort_adapter import read_ort_adapter
from ..naming.binding import renamed
from .building import Array
from .folders import parts_of, refuse_shared
from .image_texts import ImageTexts
from .pretrained_parts import DECODER, ENCODER, FILES, WITH_PAST
from .reading import loaded
from .session import PAST, Provider, Session, as_declared, check_mapping, token_ids, tokens_of
from .slot_values import slotted
from .vision_language import EMBEDDING, IMAGE_TOKENS, MERGED

if TYPE_CHECKING:
    import numpy.typing as npt

    from .reading import Base, Source

ENDS = ("generation_config.json", "config.json")
"""Config files that may contain the ids of special tokens. An id is read from the first file that contains it."""


class FolderSession:
    """Run a folder of graphs, which `adapterkit export` or optimum wrote, as one model in onnxruntime.

    Args:
        folder: the folder with the graphs.
        adapters: a map from names to the adapters to load; see `load`.
        providers: the execution providers, as for `Session`.

    Attributes:
        parts: a map from the path of each graph in the folder to the graph's `Session`.

    Raises:
        UsageError: the folder has no graph, or onnxruntime does not support one of the providers on this computer.
        StorageError, Malformed: a graph cannot be read.
    """

    @checks_types
    def __init__(
        self, folder: str | PathLike[str], adapters: Mapping[str, Adapter | str | PathLike[str]] | None = None, *,
        providers: Sequence[Provider] | None = None,
    ) -> None:  # fmt: skip
        self._path = located(folder)
        if not self._path.is_dir():
            raise UsageError("not a folder", path=self._path, cure="Open a single graph with adapterkit.onnx.Session")
        self._graphs = parts_of(self._path)
        self.parts = {
            part.name.as_posix(): Session(part.path, providers=providers) for part in self._graphs
        }  # fmt: skip
        self._adapters: dict[str, set[str]] = {}
        for name, adapter in check_mapping(adapters or {}, "adapters").items():
            self.load(name, adapter)

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the loaded adapters."""
        return tuple(self._adapters)

    def __repr__(self) -> str:
        adapters = f"; adapters {', '.join(self._adapters)}" if self._adapters else ""
        return f"FolderSession({self._path.name!r}: {', '.join(self.parts)}{adapters})"

    @checks_types
    def load(
        self, name: str, adapter: Adapter | str | PathLike[str] | None = None, *, rename: str | Sequence[str] = (),
        base_weights: Base | None = None,
    ) -> None:  # fmt: skip
        """Load an adapter into all graphs that have slots for its targets.

        If an adapter of that name is already loaded, the new adapter replaces it. If an error is raised, the loaded
        adapters stay as they were.

        Args:
            name: the name to pass as `adapter` to `run` and `generate`.
            adapter: an adapter, or its path. By default, the files `PART.NAME.onnx_adapter` that `export` wrote to the
                folder.
            rename: rules for names that cannot be resolved, as in `adapterkit.merge`; only with `adapter`.
            base_weights: the base's weights, needed for adapter files whose values are computed from the base.

        Raises:
            TargetNotFound: no graph has slots for a target, two parts such as `text_encoder` and `text_encoder_2` have
                slots for it, a rule matches no target, or the folder has no adapter files of that name.
            UsageError: `rename` is given, but `adapter` is not.
            ShapeMismatch: a tensor does not fit its slot.
            Malformed: a file is damaged.
        """
        if adapter is None and rename:
            cure = "Pass the adapter or its path (adapter=)"
            raise UsageError("rename needs an adapter to rename", path=self._path, cure=cure)
        by_part: Mapping[str, Source] = (
            self._files(name)
            if adapter is None
            else self._parts(renamed([loaded(adapter, base_weights)[0]], rename)[0])
        )
        before = {key: session._loaded.get(name) for key, session in self.parts.items()}
        try:
            for key, source in by_part.items():
                self.parts[key].load(name, source, base_weights=base_weights)
        except BaseException:
            # Restore the graphs that were loaded before the error, so that all graphs have the old adapter again.
            for key, values in before.items():
                self.parts[key]._restore(name, values)
            raise
        old = self._adapters.get(name, set())
        self._adapters[name] = set(by_part)
        for key in old - by_part.keys():
            self.parts[key].unload(name)

    def _files(self, name: str) -> dict[str, Path]:
        """Return a map from each graph to the file that an export wrote beside it for the adapter `name`.

        Graphs without such a file are omitted.

        Raises:
            TargetNotFound: no graph has such a file, or only one of the decoder's two graphs has one.
        """
        files = {key: self._path / f"{key.removesuffix('.onnx')}.{name}.onnx_adapter" for key in self.parts}
        there = {key: file for key, file in files.items() if file.is_file()}
        if not there:
            stems = [file.name.removesuffix(".onnx_adapter") for file in self._path.glob("*.*.onnx_adapter")]
            known = {stem.partition(".")[2] for stem in stems}
            cure = nearest(name, known) or "Pass the adapter or its path (adapter=)"
            raise TargetNotFound(f"no file of an adapter {name!r} is in the folder", path=self._path, cure=cure)
        # Both graphs of a decoder hold the same layers: with one file missing, an adapter would change only the first
        # token, or only the later tokens.
        for one, other in ((DECODER, WITH_PAST), (WITH_PAST, DECODER)):
            if one not in there or other not in files or other in there:
                continue
            if read_ort_adapter(there[one]).tensors.keys() & set(self.parts[other].slots):
                why = f"the adapter {name!r} has no file for {other}, which has the same slots as {one}"
                cure = f"Copy {files[other].name} to the folder, or pass the adapter or its path (adapter=)"
                raise TargetNotFound(why, path=self._path, cure=cure)
        return there

    def _parts(self, adapter: Adapter) -> dict[str, Adapter]:
        """Return a map from each graph to an adapter with only the updates that have slots in that graph.

        Raises:
            TargetNotFound: no graph has slots for a target, or two parts have slots for it, as in `refuse_shared`.
        """
        by_part: dict[str, Adapter] = {}
        seen: set[Target] = set()
        for part in self._graphs:
            key = part.name.as_posix()
            may = adapter.replace(updates={t: updates for t, updates in adapter.updates.items() if part.may_hold(t)})
            if not self.parts[key].slots or not may.updates:
                continue
            slotted_part, _ = slotted(self.parts[key]._graph(), may)
            if slotted_part.updates:
                by_part[key] = slotted_part
                seen |= set(slotted_part.updates)
        refuse_shared({Path(key): each.updates for key, each in by_part.items()})
        lost = [target for target in adapter.updates if target not in seen]
        if lost:
            cure = "To add the slots, inject an adapter that has this target with --mode slots (mode='slots')"
            raise TargetNotFound("no graph of the folder has slots for this target", where=str(lost[0]), cure=cure)
        return by_part

    @checks_types
    def unload(self, name: str) -> None:
        """Remove an adapter from all graphs.

        Raises:
            UsageError: no adapter of this name is loaded.
        """
        self._check_loaded(name)
        for key in self._adapters.pop(name):
            self.parts[key].unload(name)

    @checks_types
    def run(self, part: str, inputs: Mapping[str, npt.ArrayLike], adapter: str | None = None) -> dict[str, Array]:
        """Run one graph.

        Args:
            part: the graph's path in the folder, such as `encoder_model.onnx`.
            inputs: the graph's inputs, as for `Session.run`.
            adapter: the adapter's name; None for the bare model.

        Raises:
            UsageError: the folder has no such graph, or no adapter of this name is loaded.
            Also the errors of `Session.run`.
        """
        if part not in self.parts:
            cure = nearest(part, self.parts) or f"The graphs of the folder are {', '.join(self.parts)}"
            raise UsageError(f"no graph {part!r}", path=self._path, cure=cure)
        if adapter is not None:
            self._check_loaded(adapter)
        name_here = adapter if adapter is not None and part in self._adapters[adapter] else None
        return self.parts[part].run(inputs, name_here)

    @checks_types
    def generate(
        self, inputs: Mapping[str, npt.ArrayLike] | npt.ArrayLike, *, max_new_tokens: int = 32,
        adapter: str | None = None, start: int | None = None, end: int | Sequence[int] | None = None,
    ) -> Array:  # fmt: skip
        """Generate texts greedily, with an encoder-decoder or with a language model that reads images.

        If the config files of an encoder-decoder have a `forced_bos_token_id`, this is the first generated token. Other
        settings that change how tokens are chosen, such as `suppress_tokens` or `bad_words_ids`, have no effect.

        Args:
            inputs: a mapping from input names to arrays, like the output of a transformers processor, or only the array
                of `input_ids`. An encoder-decoder takes the encoder's inputs; without an `attention_mask`, no token is
                masked. A language model that reads images takes `input_ids`, `attention_mask`, `pixel_values`, and
                the other inputs of its graphs, such as `image_grid_thw`. If such a model gets several texts,
                `attention_mask` is required, and the texts must be padded on the left.
            max_new_tokens: the largest number of tokens to generate.
            adapter: the adapter's name; None for the bare model.
            start: the id of the first token that an encoder-decoder's decoder reads; by default, the
                `decoder_start_token_id` in the folder's config files.
            end: the id or ids of the tokens that end a text; by default, the `eos_token_id` in the config files.

        Returns:
            the token ids; `new` is the number of generated tokens. An encoder-decoder gives `[batch, 1 + new]`, where
            the first token is `start`. A language model that reads images gives `[batch, length + new]`, which includes
            the given texts. If a text ends before the other texts, it is padded with the first id of `end`.

        Raises:
            UsageError: the folder holds neither an encoder-decoder nor a language model that reads images. Or an input
                is unknown or missing. Or no config file has the id of the first token or of the image token.
            ShapeMismatch: the images do not fit the image tokens of the texts.
            Also the errors of `run`.
        """
        if {EMBEDDING, MERGED} <= {*self.parts}:
            return self._continued(inputs, max_new_tokens, adapter, end)
        if not {*FILES[:3]} <= {*self.parts}:
            lacking = ", ".join(name for name in FILES[:3] if name not in self.parts)
            cure = "Export the model with adapterkit export, or call FolderSession.run for each graph"
            why = f"neither an encoder-decoder nor a language model that reads images: the folder lacks {lacking}"
            raise UsageError(why, path=self._path, cure=cure)
        given = dict(inputs) if isinstance(inputs, Mapping) else {"input_ids": token_ids(inputs)}
        if "attention_mask" in self.parts[ENCODER].inputs and "attention_mask" not in given and "input_ids" in given:
            given["attention_mask"] = np.ones_like(given["input_ids"])
        first = self._named_token("decoder_start_token_id", "start") if start is None else start
        ends = tokens_of(self._token("eos_token_id") if end is None else end)
        forced = tokens_of(self._token("forced_bos_token_id"))
        hidden = self.run(ENCODER, as_declared(self.parts[ENCODER], given), adapter)["last_hidden_state"]
        tokens = np.full((len(hidden), 1), first, np.int64)
        more = {"encoder_attention_mask": given.get("attention_mask"), "encoder_hidden_states": hidden}
        past: dict[str, Array] = {}
        done = np.zeros(len(tokens), bool)
        for step in range(max_new_tokens):
            part = WITH_PAST if step else DECODER
            feeds = {"input_ids": tokens[:, -1:], **more, **past}
            wanted = self.parts[part].inputs
            inputs_now = {name: array for name in wanted if (array := feeds.get(name)) is not None}
            outputs = self.run(part, as_declared(self.parts[part], inputs_now), adapter)
            past |= {name.replace("present.", PAST, 1): array for name, array in outputs.items() if name != "logits"}
            likely = outputs["logits"][:, -1].argmax(-1)
            if forced and not step:  # mBART and others choose the language of the text by its first token.
                likely = np.full_like(likely, forced[0])
            new = np.where(done, ends[0] if ends else 0, likely).astype(np.int64)
            tokens = np.concatenate([tokens, new[:, None]], 1)
            done |= np.isin(new, ends)
            if done.all():
                break
        return tokens

    def _continued(
        self, inputs: Mapping[str, npt.ArrayLike] | npt.ArrayLike, count: int, adapter: str | None,
        end: int | Sequence[int] | None,
    ) -> Array:  # fmt: skip
        given = dict(inputs) if isinstance(inputs, Mapping) else {"input_ids": inputs}
        marks = [token for name in IMAGE_TOKENS if isinstance(token := self._token(name), int)]
        if not marks:
            cure = "Copy the model's config.json to the folder"
            raise UsageError("no config file in the folder has image_token_id", path=self._path, cure=cure)
        texts = ImageTexts(self.parts, given, marks[0], self._path)
        ends = tokens_of(self._token("eos_token_id") if end is None else end)
        return texts.written(lambda part, feeds: self.run(part, feeds, adapter), count, ends)

    async def generate_async(
        self, inputs: Mapping[str, npt.ArrayLike] | npt.ArrayLike, *, max_new_tokens: int = 32,
        adapter: str | None = None, start: int | None = None, end: int | Sequence[int] | None = None,
    ) -> Array:  # fmt: skip
        """Run `generate` in a thread, with the same arguments."""
        call = partial(
            self.generate, inputs, max_new_tokens=max_new_tokens, adapter=adapter, start=start, end=end
        )  # fmt: skip
        return await asyncio.to_thread(call)

    def _check_loaded(self, name: str) -> None:
        if name not in self._adapters:
            cure = nearest(name, self._adapters) or f"Loaded adapters: {', '.join(self._adapters) or 'none'}"
            raise UsageError(f"no adapter {name!r} is loaded", path=self._path, cure=cure)

    def _named_token(self, word: str, argument: str) -> int:
        token = self._token(word)
        if not isinstance(token, int):
            raise UsageError(f"no config file in the folder has {word}", path=self._path, cure=f"Pass {argument}=")
        return token

    def _token(self, word: str) -> int | list[int] | None:
        for name in ENDS:
            file = self._path / name
            if not file.is_file():
                continue
            try:
                value = json.loads(read_input(file).decode("utf-8")).get(word)
            except (ValueError, AttributeError, RecursionError) as error:
                raise Malformed(f"not a config ({error})", path=file, cure="Copy the model's file again") from None
            if isinstance(value, int) or (isinstance(value, list) and all(isinstance(one, int) for one in value)):
                return value
        return None
