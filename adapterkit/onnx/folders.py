"""Merge or inject adapters into a folder of graphs that are one model, such as an encoder with its decoders.

Optimum writes `encoder_model.onnx`, `decoder_model.onnx`, `decoder_with_past_model.onnx` and
`decoder_model_merged.onnx` for one model; onnxruntime-genai lists a model's graphs in `genai_config.json`. An adapter
may have targets in several graphs; each graph gets the updates of the targets that it contains. Layer names in an
encoder's graph lack the word `encoder`, so `layers.0.self_attn.q_proj` may be in the encoder or in the decoder.
Therefore, each graph has a role, such as `encoder`, which its file name or `genai_config.json` shows. If the path of a
target shows a role, too, adapterkit looks for the target only in graphs whose role fits.
"""

from __future__ import annotations

import filecmp
import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import takewhile
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from ..core.adapter import Adapter, Target
from ..core.arguments import weights_of
from ..errors import (
    PASS_AN_ADAPTER,
    USE_ITS_BASE,
    Malformed,
    StorageError,
    TargetNotFound,
    Unsupported,
    UsageError,
    nearest,
    storage_error,
)
from ..io.checkpoint import opened as opened_base
from ..io.inputs import read_input
from ..io.staging import files_below, staged
from ..naming.binding import renamed
from .contexts import parted
from .model_file import opened
from .reading import inputs_of, known_config, loaded
from .report import GraphReport
from .resolving import is_named, spots_of, taken
from .roles import PATH_WORDS, role_of, same_layers
from .routed import by_expert

if TYPE_CHECKING:
    import onnx_ir as ir

    from ..core.updates import Update
    from ..io.checkpoint import Checkpoint
    from .reading import Base, Model, Source
    from .resolved import ResolvedTarget
    from .tying import Tying

DEEP = 2
"""The number of folder levels on which adapterkit looks for graphs: the model's folder and its direct subfolders.

diffusers writes each part of a model to a subfolder."""

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack")
"""Suffixes of other frameworks' weight files. These files are not copied to the folder of the changed model, because
they hold the unchanged weights."""

TAKES = {"decoder": {"decoder", "text"}, "text": {"text", "encoder", "decoder"}}
"""A map from a graph's role to the roles of the targets that the graph may have. For example, a graph with role
`decoder` may be the language model of a vision-language model, whose targets have the role `text`. If the map lacks a
graph's role, the graph may only have targets with the same role. Targets without a role may be in any graph."""

GENAI = {"decoder": "decoder", "encoder": "encoder", "vision": "vision", "speech": "audio", "embedding": "embedding"}
"""A map from each section of `genai_config.json` to the role of the graph whose file the section names."""


_NUMBER = re.compile(r"_\d+$")
"""Matches the number at the end of a name such as `text_encoder_2`."""


@dataclass(frozen=True, slots=True)
class GraphPart:
    """One graph of a folder.

    Attributes:
        path: the graph's file.
        name: the file's path relative to the folder.
        role: the part of the model that the graph holds; None if the folder has only one graph, or if neither
            `genai_config.json` nor the file's name shows the part.
        data: the files with the graph's external data.
        folders: the names of the folder's subfolders that hold graphs.
    """

    path: Path
    name: Path
    role: str | None
    data: tuple[Path, ...]
    folders: frozenset[str] = frozenset()

    @property
    def files(self) -> tuple[Path, ...]:
        """The graph's file, and its data."""
        return self.path, *self.data

    def may_hold(self, target: Target) -> bool:
        """Whether the graph may have this target: compare the target's path with the graph's role and subfolder."""
        words = target.path.split(".")
        if words[0] in self.folders:
            # SDXL has the same layer names in `text_encoder` and `text_encoder_2`, so the roles cannot tell them apart.
            return self.name.parts[:-1] == (words[0],)
        role = next((PATH_WORDS[word] for word in words if word in PATH_WORDS), None)
        return role is None or self.role is None or role in TAKES.get(self.role, {self.role})


def folder_of(model: Model, out: str | PathLike[str]) -> Path | None:
    """Return the model's folder if the model and the output are both folders; None if one of them is a single graph.

    Raises:
        UsageError: the model is a folder of several graphs, but `out` is a `.onnx` file.
    """
    if not isinstance(model, str | PathLike) or str(model).lower().endswith(".onnx"):
        return None
    path = Path(model)
    if not path.is_dir():
        return None
    several = len(graphs_in(path)) > 1
    if Path(out).suffix.lower() == ".onnx" and not several:
        return None
    if Path(out).suffix.lower() == ".onnx":
        why = "the model is a folder of several graphs, but the output is one file"
        raise UsageError(why, path=str(out), cure="Pass a folder to write: -o DIR (out=)")
    return path


def only_graph(model: Model) -> Model:
    """If the model is a folder with one graph, return the graph's path; return any other model unchanged."""
    graphs = graphs_in(Path(model)) if isinstance(model, str | PathLike) and Path(model).is_dir() else []
    return graphs[0] if len(graphs) == 1 else model


def graphs_in(folder: Path) -> list[Path]:
    """Return the `.onnx` files in a folder and in its direct subfolders, sorted."""
    files = [file for file in files_below(folder) if file.suffix.lower() == ".onnx"]
    return sorted(file for file in files if len(file.relative_to(folder).parts) <= DEEP)


def parts_of(folder: Path) -> list[GraphPart]:
    """Return the graphs in a model's folder.

    Raises:
        UsageError: the folder has no graph.
        Malformed: `genai_config.json` is damaged.
        Also the errors of `opened`, for each graph.
    """
    graphs = graphs_in(folder)
    if not graphs:
        raise UsageError(
            "the folder has no graph",
            path=folder,
            cure="Pass a folder with .onnx files; to make one: adapterkit export MODEL -o FOLDER",
        )
    roles = _roles_of_genai(folder)
    names = [graph.relative_to(folder) for graph in graphs]
    alone = len(graphs) == 1
    folders = frozenset(name.parts[0] for name in names if len(name.parts) > 1)
    return [
        GraphPart(
            graph, name, None if alone else roles.get(name.as_posix(), role_of(name)), opened(graph).data, folders
        )
        for graph, name in zip(graphs, names, strict=True)
    ]


def _roles_of_genai(folder: Path) -> dict[str, str]:
    file = folder / "genai_config.json"
    if not file.is_file():
        return {}
    try:
        model = json.loads(read_input(file).decode("utf-8"))["model"]
        sections = {key: model[key] for key in GENAI if isinstance(model.get(key), dict)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Malformed(
            f"not a config of onnxruntime-genai ({error})", path=file, cure="Build the model again"
        ) from None
    return {str(section["filename"]): GENAI[key] for key, section in sections.items() if "filename" in section}


# Split an adapter: each graph gets the updates whose targets are in that graph.


@dataclass(frozen=True, slots=True, eq=False)
class Division:
    """An adapter that is split into one adapter for each graph of a folder. The maps' keys are `GraphPart.name`.

    Attributes:
        whole: the adapter before the split.
        of: a map from each graph to the adapter with only the graph's targets, or to None if the graph has none of the
            adapter's targets.
        lost: targets that no graph has.
        lacking: a map from a graph to the targets that it lacks, although another variant of the graph has them.
    """

    whole: Adapter
    of: Mapping[Path, Adapter | None]
    lost: tuple[Target, ...]
    lacking: Mapping[Path, tuple[Target, ...]]

    @property
    def warnings(self) -> tuple[str, ...]:
        """Warnings that name the omitted targets; there is one warning for each reason."""
        lines = [left_line(lost, f"{name.as_posix()} does not have them") for name, lost in self.lacking.items()]
        return (*left_line(self.lost, "no graph has them"), *(line for each in lines for line in each))


def left_line(lost: Sequence[Target], why: str) -> tuple[str, ...]:
    """Return a tuple with one warning that names the targets in `lost`; an empty tuple if `lost` is empty."""
    if not lost:
        return ()
    more = f" and {len(lost) - 3} more" if len(lost) > 3 else ""
    return (f"targets left out, because {why}: {', '.join(str(target) for target in lost[:3])}{more}",)


def left_out(
    model: ir.Model, adapter: Adapter, base: Checkpoint | None, tying: Tying
) -> tuple[Adapter, tuple[str, ...]]:
    """Return an adapter with only the targets that a graph has, and a warning that names the omitted targets.

    If the graph has none of the targets, return the whole adapter and no warning.

    Raises:
        TargetNotFound: as in `taken`.
    """
    kept, lost = taken(model, adapter, base, tying.config, tying.role)
    # If the graph has none of the targets, return the whole adapter. The caller then searches the graph for the
    # targets, and raises a TargetNotFound that names the nearest targets.
    return (kept if kept.updates else adapter), left_line(lost if kept.updates else (), "the graph does not have them")


def divided(parts: Sequence[GraphPart], adapter: Adapter, base: Checkpoint | None, allow_partial: bool) -> Division:
    """Split an adapter into one adapter for each graph, with the updates of the targets in that graph.

    Raises:
        TargetNotFound: no graph has any of the targets, or graphs of two parts of the model have a target, as in
            `refuse_shared`. Without `allow_partial`, this is also raised if a target is in
            no graph, or if a graph lacks a target that another variant of the graph has (such as `model_O2.onnx` beside
            `model.onnx`).
        Unsupported: the adapter has new tokens or prefixes, and there are several graphs. This is also raised if a
            target is one expert of a layer, and a single node of a graph computes all experts of this layer.
    """
    rest, context = parted(adapter)
    if context and len(parts) > 1:
        why = f"{context[0][1].method} cannot be attached in a model of several graphs"
        cure = "Pass one graph (the .onnx file), or export the torch model with the adapter injected"
        raise Unsupported(why, where=str(context[0][0]) or None, cure=cure)
    context_by_target: dict[Target, tuple[Update, ...]] = {}
    for target, update in context:
        context_by_target[target] = (*context_by_target.get(target, ()), update)
    by_part: dict[Path, Adapter | None] = {}
    seen: set[Target] = set()
    for part in parts:
        may = rest.replace(updates={t: updates for t, updates in rest.updates.items() if part.may_hold(t)})
        if not may.updates:
            by_part[part.name] = adapter if context else None
            continue
        model = opened(part.path).model
        kept, _ = taken(model, may, base, known_config(base, part.path), part.role)
        seen |= set(kept.updates)
        updates = {**kept.updates, **context_by_target}
        by_part[part.name] = adapter.replace(updates=updates) if updates else None
    refuse_shared({part.name: each.updates for part in parts if (each := by_part[part.name]) is not None})
    lost = tuple(target for target in rest.updates if target not in seen)
    if lost and (not allow_partial or not seen):
        for part in parts:
            inside = rest.replace(updates={t: rest.updates[t] for t in lost})
            # Raise Unsupported if a lost target is one expert inside a node that computes all experts of a layer.
            by_expert(inside, opened(part.path).model, known_config(base, part.path))
        raise _nowhere(lost, parts, bool(seen))
    lacking = {part.name: missing for part in parts if (missing := _lacking(part, parts, by_part))}
    if lacking and not allow_partial:
        name, missing = next(iter(lacking.items()))
        more = f" ({len(missing)} targets)" if len(missing) > 1 else ""
        why = f"{name.as_posix()} does not have this target, but another variant of the same graph has it{more}"
        cure = (
            "To find layers by their weights, pass the base: --base-weights DIR (base_weights=). To omit such targets: "
            "--allow-partial (allow_partial=True)"
        )
        raise TargetNotFound(why, where=str(next(iter(missing))), cure=cure)
    return Division(adapter, by_part, lost, lacking)


def refuse_shared(targets_by_part: Mapping[Path, Iterable[Target]]) -> None:
    """Refuse a target that two parts of a model have if only a number distinguishes the names of these parts.

    SDXL's `text_encoder` and `text_encoder_2` have layers of the same names, so a target without a folder's name would
    change both. Context updates, such as prompts, are not checked.

    Raises:
        TargetNotFound: there is such a target.
    """
    parts_by_target: dict[Target, list[Path]] = {}
    for part, targets in targets_by_part.items():
        for target in targets:
            parts_by_target.setdefault(target, []).append(part)
    shared: dict[Target, tuple[Path, Path]] = {}
    for target, parts in parts_by_target.items():
        by_number: dict[str, Path] = {}
        for part in parts:
            other = by_number.setdefault(_NUMBER.sub("", part.parts[0] if len(part.parts) > 1 else ""), part)
            if other.parts[:-1] != part.parts[:-1]:
                shared.setdefault(target, (other, part))
    if shared:
        target, both = next(iter(shared.items()))
        # Give one rule for all these targets, because an adapter may have hundreds of them.
        words_at = zip(*(each.path.split(".") for each in shared), strict=False)
        first_words = [words[0] for words in takewhile(lambda words: len(set(words)) == 1, words_at)]
        prefix = ".".join(first_words or target.path.split(".")[:1])
        first, second = (f"{prefix}={part.parts[0]}.{prefix}" for part in both)
        why = " and ".join(part.as_posix() for part in both) + " both have this target"
        cure = f"Name the part that the adapter changes: --rename {first} or --rename {second} (rename=)"
        raise TargetNotFound(why, where=str(target), cure=cure)


def _lacking(part: GraphPart, parts: Sequence[GraphPart], by_part: Mapping[Path, Adapter | None]) -> tuple[Target, ...]:
    """Return the targets that a graph lacks, although another variant of the same graph has them.

    `same_layers` decides by the file names which graphs must have the same layers.
    """
    adapter = by_part[part.name]
    there = {} if adapter is None else adapter.updates
    others = [by_part[each.name] for each in parts if each is not part and same_layers(each.name, part.name)]
    wanted = [target for other in others if other is not None for target in other.updates]
    return tuple(dict.fromkeys(target for target in wanted if target not in there))


def _nowhere(lost: Sequence[Target], parts: Sequence[GraphPart], some: bool) -> TargetNotFound:
    known: dict[str, str] = {}
    for part in parts:
        for spot in spots_of(opened(part.path).model):
            names = spot.names.values() if is_named(spot) else ()
            known.update(
                {name.removesuffix(".weight"): part.name.as_posix() for names_here in names for name in names_here}
            )
    more = f" ({len(lost)} targets)" if len(lost) > 1 else ""
    graphs = ", ".join(part.name.as_posix() for part in parts)
    near = nearest(lost[0].path, known)
    cure = near or USE_ITS_BASE
    if some:
        cure = f"{cure}. To omit such targets: --allow-partial (allow_partial=True)"
    why = f"no graph of the folder has this target{more}; the graphs are {graphs}"
    return TargetNotFound(why, where=str(lost[0]), cure=cure)


# Write a changed folder.


def files_of_folder(folder: Path, parts: Sequence[GraphPart] | None = None) -> list[Path]:
    """Return all files that are read to change a folder: graphs, their external data, and the files to copy."""
    known = parts_of(folder) if parts is None else parts
    return [*dict.fromkeys([*(file for part in known for file in part.files), *_others(folder, known)])]


def _others(folder: Path, parts: Sequence[GraphPart]) -> Iterator[Path]:
    """Yield the files to copy that are not part of a graph, such as configs and tokenizers.

    Hidden files and files with suffixes in `WEIGHTS` are omitted.

    Raises:
        Malformed: a file is a link to a file outside of the folder.
    """
    graph_files = {file.resolve() for part in parts for file in part.files}
    home = folder.resolve()
    # In huggingface_hub's cache, a snapshot's files are links to files in `../../blobs`, so allow links into `../..`.
    root = home.parent.parent if home.parent.name == "snapshots" else home
    for file in files_below(folder):
        hidden = any(word.startswith(".") for word in file.relative_to(folder).parts)
        if hidden or file.suffix.lower() in WEIGHTS or file.resolve() in graph_files or not file.is_file():
            continue
        if not file.resolve().is_relative_to(root):
            raise Malformed("the file links to a file outside of the folder", path=file, cure="Do not use this folder")
        yield file


def inject_folder(
    inject: Callable[..., GraphReport], folder: Path, adapter: Source, out: str | PathLike[str], *,
    base_weights: Base | None, rename: str | Sequence[str],
    allow_partial: bool, overwrite: bool, made_from: str | None, **options: object,
) -> GraphReport:  # fmt: skip
    """Inject an adapter into a folder of graphs: call `inject` for each graph with targets, and copy the other files.

    Raises:
        TargetNotFound: a target is in none of the graphs, and `allow_partial` is not set.
        Also the errors of `inject`.
    """
    parts, (whole,), base = _read(folder, [adapter], base_weights, rename)
    division = divided(parts, whole, base, allow_partial)
    inputs = [*inputs_of(adapter, base_weights), *files_of_folder(folder, parts)]

    def change(part: GraphPart, there: Path) -> GraphReport | None:
        adapter = division.of[part.name]
        more = {"base_weights": base_weights, "allow_partial": allow_partial, **options}
        return None if adapter is None else inject(part.path, adapter, there, **more)

    return _written(folder, parts, Path(out), change, inputs, overwrite, made_from, division.warnings)


def merge_folder(
    merge: Callable[..., GraphReport], folder: Path, adapters: Sequence[Source], out: str | PathLike[str], *,
    weights: Sequence[float] | None,
    base_weights: Base | None, rename: str | Sequence[str], allow_partial: bool, overwrite: bool,
    made_from: str | None, **options: object,
) -> GraphReport:  # fmt: skip
    """Fold adapters into a folder of graphs: call `merge` for each graph with targets, and copy the other files.

    Raises:
        TargetNotFound: a target is in none of the graphs, and `allow_partial` is not set.
        Also the errors of `merge`.
    """
    if not adapters:
        raise UsageError("no adapter was given", cure=PASS_AN_ADAPTER)
    parts, read, base = _read(folder, adapters, base_weights, rename)
    divisions = [divided(parts, one, base, allow_partial) for one in read]
    factors = weights_of(weights, len(read))
    inputs = [*(file for one in adapters for file in inputs_of(one, base_weights)), *files_of_folder(folder, parts)]

    def change(part: GraphPart, there: Path) -> GraphReport | None:
        pairs = [(one.of[part.name], f) for one, f in zip(divisions, factors, strict=True) if one.of[part.name]]
        if not pairs:
            return None
        return merge(
            part.path, [one for one, _ in pairs if one is not None], there, weights=[factor for _, factor in pairs],
            base_weights=base_weights, **options,
        )  # fmt: skip

    warnings = tuple(line for one in divisions for line in one.warnings)
    return _written(folder, parts, Path(out), change, inputs, overwrite, made_from, warnings)


def plan_folder(
    plan: Callable[..., tuple[ResolvedTarget, ...]], folder: Path, adapters: Source | Sequence[Source], *,
    weights: Sequence[float] | None, rename: str | Sequence[str], allow_partial: bool,
    base_weights: Base | None, **options: object,
) -> tuple[ResolvedTarget, ...]:  # fmt: skip
    """Return the targets that `merge_folder` would change, with their layers; write nothing."""
    several = [adapters] if isinstance(adapters, str | PathLike | Adapter) else list(adapters)
    parts, read, base = _read(folder, several, base_weights, rename)
    weights_of(weights, len(read))
    divisions = [divided(parts, one, base, allow_partial) for one in read]
    places: list[ResolvedTarget] = []
    for part in parts:
        part_adapters = [part_adapter for one in divisions if (part_adapter := one.of[part.name]) is not None]
        places += plan(part.path, part_adapters, base_weights=base_weights, **options) if part_adapters else ()
    return tuple(places)


def _read(
    folder: Path, adapters: Sequence[Source], base_weights: Base | None, rename: str | Sequence[str]
) -> tuple[list[GraphPart], list[Adapter], Checkpoint | None]:  # fmt: skip
    read = renamed([loaded(one, base_weights)[0] for one in adapters], rename)
    return parts_of(folder), read, None if base_weights is None else opened_base(base_weights)


def _written(
    folder: Path, parts: Sequence[GraphPart], out: Path, change: Callable[[GraphPart, Path], GraphReport | None],
    inputs: Sequence[Path], overwrite: bool, made_from: str | None, warnings: tuple[str, ...],
) -> GraphReport:  # fmt: skip
    others = list(_others(folder, parts))
    with placed_folder(out, parts, others, folder, inputs, overwrite, made_from) as scratch:
        reports: dict[str, GraphReport] = {}
        for part in parts:
            there = scratch / part.name
            there.parent.mkdir(parents=True, exist_ok=True)
            report = change(part, there)
            if report is None:
                _check_shared(part, there.parent)
                _copied(part.files, part.path.parent, there.parent)
            else:
                reports[part.name.as_posix()] = report
        _copied(others, folder, scratch)
        written = [file.relative_to(scratch) for file in files_below(scratch)]
    return joined(reports, scratch, out, [out / name for name in written], warnings)


@contextmanager
def placed_folder(
    out: Path, parts: Sequence[GraphPart], others: Sequence[Path], folder: Path, inputs: Sequence[Path],
    overwrite: bool, made_from: str | None,
) -> Iterator[Path]:  # fmt: skip
    """Yield a scratch folder to write the changed model to; when the block ends, move the written files to `out`.

    Old files of the model in `out` are removed; unrelated files in `out` stay.

    Raises:
        UsageError: `out` is the model's own folder.
        StorageError: `out` holds a graph of another model, or `out` exists and `overwrite` is not set.
    """
    if out.exists() and folder.exists() and out.is_dir() and out.samefile(folder):
        raise UsageError(
            "the output is the model's own folder", path=out, cure="Write to another folder: -o DIR (out=)"
        )
    names = {part.name.name for part in parts}
    if out.is_dir():
        strange = sorted(file.name for file in graphs_in(out) if file.name not in names)
        if strange:
            why = f"the folder holds {strange[0]}, which is not a graph of this model"
            raise StorageError(why, path=out, cure="Write to another folder")
    owns = {*(f"{name}*" for name in names), "*.onnx_adapter", "*.onnx_adapter.json", *(file.name for file in others)}
    owns |= {file.name for part in parts for file in part.data}
    with staged(out, overwrite=overwrite, owns=owns, inputs=inputs, made_from=made_from) as scratch:
        scratch.mkdir(exist_ok=True)
        yield scratch


def _check_shared(part: GraphPart, there: Path) -> None:
    """Refuse an unchanged graph if another graph's merged data file has the name of this graph's data file."""
    for file in part.data:
        written = there / file.relative_to(part.path.parent)
        if written.exists() and not filecmp.cmp(file, written, shallow=False):
            why = f"the unchanged graph {part.name.as_posix()} also reads this data file, which the merge rewrites"
            cure = f"Save {part.name.as_posix()} with a data file of its own, for example with onnx.save and location="
            raise StorageError(why, path=file, cure=cure)


def _copied(files: Iterable[Path], home: Path, there: Path) -> None:
    for file in files:
        target = there / file.relative_to(home)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            if not target.exists():
                shutil.copyfile(file, target)
        except OSError as error:
            raise storage_error(error, file) from error


def joined(
    reports: Mapping[str, GraphReport], scratch: Path, out: Path, files: Sequence[Path], warnings: tuple[str, ...]
) -> GraphReport:
    """Join the graphs' reports into one report, with the final paths of the files in `out`."""
    moved = {
        name: replace(
            each, out=out / each.out.relative_to(scratch), files=tuple(out / f.relative_to(scratch) for f in each.files)
        )
        for name, each in reports.items()
    }
    differences = [each.difference for each in moved.values() if each.difference is not None]
    unchecked = [f"{name}: {each.note}" for name, each in moved.items() if each.note]
    references = [each.reference for each in moved.values() if each.reference is not None]
    saturations = [each.saturation for each in moved.values() if each.saturation is not None]
    return GraphReport(
        out, tuple(files), tuple(place for each in moved.values() for place in each.found),
        max(differences, default=None), "; ".join(unchecked) or None,
        {target: damage for each in moved.values() for target, damage in each.damage.items()},
        max(references, default=None), saturation=saturations[0] if saturations else None,
        warnings=(*warnings, *dict.fromkeys(line for each in moved.values() for line in each.warnings)), parts=moved,
        beside=tuple(at for each in moved.values() for at in each.beside),
    )  # fmt: skip
