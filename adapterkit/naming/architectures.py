"""Load architectures: each tool's names and layouts for the weights of a model family.

A naming is the set of names that one tool (or hub) uses for a family's weights.

Each family has one TOML file, `spec/architectures/<family>.toml`; `spec/architectures/README.md` defines the format.
If a base's config names its family, only this family's file is parsed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cache, cached_property
from pathlib import Path
from typing import Protocol, TypeVar

import msgspec

from ..errors import Malformed

WEIGHT = "weight"
"""A naming in which each weight is a separate tensor. GGUF files are read with this naming.

If the hub also stores a weight as a separate tensor, in the same layout, then this naming has the hub's name for the
weight. For any other weight, such as one that the hub fuses or stacks, the name is the weight's key in the family's
file.
"""

STORED_AS = "stored_as"
"""A key of the config that adapterkit builds for a GGUF file. Its value `gguf` selects the naming `WEIGHT`."""

COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
"""Fields of configs that state the number of experts in a layer."""

FORMAT = 1
"""The version of the architecture files' format that this code reads."""


TURNED = ("rope", "rotary")
"""Values of `WeightPlace.rows` for orders that depend on rotary embeddings.

A `WeightPlace` with one of these values must also set `heads`.
"""

SHARED = ("query", "kv", "vision")
"""Values of `WeightPlace.heads`: the query heads, the heads of keys and values, or the heads of the vision tower."""

LINEAR = ("linear_value", "linear_qkv")
"""Values of `WeightPlace.rows` for orders that depend on the heads of linear attention."""

SPLIT = ("latent", "linear_qkvz")
"""Values of `WeightPlace.rows` for weights whose rows are divided between two tensors."""

QKV = ("query", "key", "value")
"""Values of `WeightPlace.qkv`: the weights in a fused projection, in the order of their rows."""


class WeightPlace(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """The name and layout of one weight in one naming: which tensor contains the weight, and in which rows.

    Attributes:
        name: a template for the tensor's name without `.weight` or `.bias`. Placeholders such as `{n}` stand for
            numbers; `{e}` stands for an expert's number.
        stacked: whether all experts are in one tensor, along its first axis.
        part: the tensor is divided into `of` equal runs of rows. `part` is the index of the weight's first run. None if
            the tensor is not divided into equal runs.
        parts: the number of consecutive runs that belong to the weight.
        of: the number of equal runs of rows in the tensor.
        interleaved: whether the weight has every `of`-th row of the tensor, starting at row `part`, instead of
            consecutive rows.
        qkv: `query`, `key` or `value` if the tensor has all queries, then all keys, then all values. The head counts in
            the base's config determine how many rows each of the three has.
        groups: only with `qkv`. If True, the tensor does not have all queries first. Instead, it has one group of rows
            for each key head: the queries that share the key head, then the key, then the value.
        half: set only if the experts of two weights are numbered together. The value is 0 if this weight's experts have
            the first half of the numbers, and 1 if they have the second half.
        flat: whether the tensor has shape `[in]`, so that the weight has one row.
        transposed: whether the tensor is stored as `[in, out]`.
        rows: the order of the tensor's rows. `rope`: Meta's order, in which rotated pairs of rows are adjacent. `qkv`:
            the tensor has all queries, then all keys, then all values, but the family's own layout of this fused weight
            is ordered by groups. `spec/architectures/README.md` lists the other orders.
        heads: the kind of heads to which the rows belong, one of `SHARED`; only if `rows` is one of `TURNED`.
        columns: the order of the tensor's inputs: None, or `linear_value` with the same meaning as for `rows`.
        beside: a template for the name of a second tensor, which has the weight's remaining rows.
        ratio: the tensor's number of outputs divided by its number of inputs. Set only if this ratio distinguishes two
            weights with the same name. For example, the last block's modulation may have fewer outputs than the other
            blocks' modulations.
    """

    name: str
    stacked: bool = False
    part: int | None = None
    parts: int = 1
    of: int | None = None
    interleaved: bool = False
    qkv: str | None = None
    groups: bool = False
    half: int | None = None
    flat: bool = False
    transposed: bool = False
    rows: str | None = None
    heads: str | None = None
    columns: str | None = None
    beside: str | None = None
    ratio: float | None = None


class GgufCondition(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A condition on a base's config. If it is met, llama.cpp's converter writes a certain `general.architecture`.

    Attributes:
        classes: the condition is met if the first entry of the config's `architectures` is in this list.
        field: the condition is also met if the config has this field.
        only: a map from a config field to allowed strings. Each of these fields must be a non-empty list of allowed
            strings. If `only` is set, `classes` and `field` are ignored.
        zero: a config field that must be absent or 0. Used only if `only` is set.
    """

    classes: list[str] = []
    field: str = ""
    only: dict[str, list[str]] = {}
    zero: str = ""

    def holds(self, config: Mapping[str, object]) -> bool:
        """Return whether a base's config meets the condition."""
        if self.only:
            listed = [(config.get(field), set(words)) for field, words in self.only.items()]
            return not config.get(self.zero) and all(
                isinstance(each, list) and each and {*map(str, each)} <= words for each, words in listed
            )
        named = config.get("architectures")
        first = named[0] if isinstance(named, list) and named else None
        return first in self.classes or config.get(self.field) is not None


class TextEncoder(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One text encoder of a pipeline.

    Attributes:
        kind: the kind of model: `clip`, `t5` or `llm`.
        comfyui: the encoder's name in ComfyUI; empty if ComfyUI does not have it.
        prefix: for an `llm`, the text before `layers.` in diffusers' names.
    """

    kind: str
    comfyui: str = ""
    prefix: str = ""


class PipelineRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Facts about a family whose models are part of a diffusers pipeline.

    The fields are the family's names in several tools, and properties that identify the family of an adapter file.

    Attributes:
        component: the part of the pipeline: `unet`, `transformer` or `controlnet`.
        title: the family's name in messages; empty to use the name of its file.
        classes: the values of `_class_name` in configs of diffusers.
        words: the family's names in the metadata of files, reduced to letters and digits, such as `flux1`.
        sd_scripts: whether sd-scripts trains the family. If not, the family has no OFT adapters from sd-scripts.
        kohya: the naming from which sd-scripts and similar tools make their keys, by replacing dots with underscores.
        distinctive: True if no language model uses this family's names. The names then identify the family even without
            a prefix.
        generic: whether the names fit any number of blocks. A generic family is chosen only if no other family fits.
        unlikely: whether the family shares names with another family that has far more adapters. An unlikely family is
            chosen only if no other family fits, or if one of these identifies it: metadata, a base, or the width
            together with the number of blocks.
        no_inputs: input sizes that no weight of this family has, such as the width of a text encoder that only other
            models use.
        outputs: a map from an input size to the output sizes of weights with that input size, in the published models.
        widths: input sizes of the blocks in the published models.
        blocks: a map from the first part of a block's name, such as `double_blocks`, to the number of such blocks in
            the largest published model.
        ratios: a map from a weight to its number of outputs divided by its number of inputs; a list of ratios if the
            published models differ.
        encoders: the text encoders, by their names in diffusers, such as `text_encoder_2`.
        prefixes: a map from a part of the pipeline to the prefix of its keys in kohya's files. Parts with the prefix
            `lora_unet` or `lora_te` are not listed.
        beside: ComfyUI's names for modules in other parts of the pipeline. Each key is such a module's name in
            diffusers, or a prefix of such names.
        modules: templates for the names of the modules in other parts of the pipeline. Each key names a part, such as
            `text_conditioner`, and must also be a key of `beside`. Kohya's keys are the modules' names, with
            underscores instead of dots.
        diffsynth_head: the number of rows of one head, if DiffSynth's files order fused q, k and v head by head.
            Otherwise 0.
        header_alpha: whether an alpha in a file's header applies to every module, if the file has no alpha tensors.
        whole_norms: whether diffusers' loader accepts adapter files with new weights for the norms of queries and keys.
    """

    component: str = "transformer"
    title: str = ""
    classes: list[str] = []
    words: list[str] = []
    sd_scripts: bool = False
    kohya: str = "native"
    distinctive: bool = False
    generic: bool = False
    unlikely: bool = False
    no_inputs: list[int] = []
    outputs: dict[str, list[int]] = {}
    widths: list[int] = []
    blocks: dict[str, int] = {}
    ratios: dict[str, float | list[float]] = {}
    encoders: dict[str, TextEncoder] = {}
    prefixes: dict[str, str] = {}
    beside: dict[str, str] = {}
    modules: dict[str, list[str]] = {}
    diffsynth_head: int = 0
    header_alpha: bool = False
    whole_norms: bool = False


class ArchitectureRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The contents of one family's file. `spec/architectures/README.md` explains the fields."""

    format: int
    family: str
    model_types: list[str]
    weights: dict[str, dict[str, str | WeightPlace]]
    sources: list[str] = []
    gguf: list[str] = []
    gguf_when: dict[str, GgufCondition] = {}
    gguf_as: dict[str, str] = {}
    gguf_key: str | None = None
    keyed: list[str] = []
    extends: dict[str, str] = {}
    vocabulary: list[str] = []
    tied: dict[str, str] = {}
    rare: bool = False
    pipeline: PipelineRecord | None = None


class Naming(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The contents of one file in `spec/architectures/namings`.

    The file has one tool's names for the weights of several families. `load` adds them to the names in each family's
    own file.
    """

    format: int
    naming: str
    model_types: list[str]
    weights: dict[str, str | WeightPlace]
    sources: list[str] = []

    def places(self) -> dict[str, WeightPlace]:
        """Return a map from each weight's key to the weight's place."""
        return {key: WeightPlace(place) if isinstance(place, str) else place for key, place in self.weights.items()}


class Architecture:
    """One family's file, with methods that look up names in every naming.

    Args:
        record: the contents of the family's file.
        apart: whether to add the naming `WEIGHT`.
    """

    def __init__(self, record: ArchitectureRecord, *, apart: bool = False) -> None:
        self.record = record
        self.family = record.family
        self.apart = apart

    @cached_property
    def namings(self) -> tuple[str, ...]:
        """List the family's namings: those in `keyed`, then those in the entries of `weights`, then those in `extends`.

        If `apart` is true, the list ends with `WEIGHT`.
        """
        named = (naming for places in self.record.weights.values() for naming in places)
        names = [*self.record.keyed, *named, *self.record.extends]
        return tuple(dict.fromkeys([*names, *((WEIGHT,) if self.apart else ())]))

    def place(self, weight: str, naming: str) -> WeightPlace | None:
        """Return the name and layout of a weight in a naming; None if the naming does not have the weight."""
        if naming == WEIGHT:
            hub = self.place(weight, "hub")
            return hub if hub is not None and hub == WeightPlace(hub.name) else WeightPlace(weight)
        place = self.record.weights[weight].get(naming)
        if place is None and naming in self.record.extends:
            return self.place(weight, self.record.extends[naming])
        if place is None:
            return WeightPlace(weight) if naming in self.record.keyed else None
        if place == "":
            return None
        return WeightPlace(place) if isinstance(place, str) else place

    def find(self, name: str, naming: str) -> list[tuple[str, WeightPlace, dict[str, str]]]:
        """Return (weight, place, numbers) for each weight whose tensor is called `name` in a naming.

        `numbers` maps each placeholder to its number in `name`.
        """
        places = []
        for weight, place, words in self._index(naming).get(shape_of(name), ()):
            numbers = _numbers(words, name.split("."))
            if numbers is not None:
                places.append((weight, place, numbers))
        return places

    def namings_with(self, name: str) -> tuple[str, ...]:
        """List the namings that have `name`, or a name that differs from `name` only in numbers.

        If `WEIGHT` is one of them, it comes last.
        """
        shape = shape_of(name)
        if shape not in self._namings:
            every = dict.fromkeys((*self.namings, WEIGHT))
            self._namings[shape] = tuple(naming for naming in every if shape in self._index(naming))
        return self._namings[shape]

    def templates(self, naming: str) -> Iterator[str]:
        """Yield each weight name of one naming scheme, with `#` in place of every placeholder and every number."""
        return iter(self._index(naming))

    def _index(self, naming: str) -> Mapping[str, list[tuple[str, WeightPlace, tuple[str, ...]]]]:
        if naming not in self._indexes:
            index: dict[str, list[tuple[str, WeightPlace, tuple[str, ...]]]] = {}
            for weight in self.record.weights:
                place = self.place(weight, naming)
                if place is not None:
                    key = shape_of(HOLE.sub("0", place.name))
                    index.setdefault(key, []).append((weight, place, tuple(place.name.split("."))))
            self._indexes[naming] = index
        return self._indexes[naming]

    @cached_property
    def _indexes(self) -> dict[str, Mapping[str, list[tuple[str, WeightPlace, tuple[str, ...]]]]]:
        return {}

    @cached_property
    def _namings(self) -> dict[str, tuple[str, ...]]:
        return {}


def architecture_of(config: Mapping[str, object] | None) -> Architecture | None:
    """Load the architecture of a base from the `model_type` in its config; None if no file describes that type.

    Raises:
        Malformed: the file is damaged.
    """
    kind = (config or {}).get("model_type")
    architecture = _of_type(kind) if isinstance(kind, str) and _WORD.fullmatch(kind) else None
    if architecture is not None and (config or {}).get(STORED_AS) == "gguf":
        return Architecture(architecture.record, apart=True)
    return architecture


def is_family(module: str) -> bool:
    """Return whether there is a file for the family `module`, such as `llama` or `blip_2`."""
    return module in _modules()


@cache
def _modules() -> frozenset[str]:
    """Return the names of the families' files. Drop the ending `.toml`, and replace dashes with underscores."""
    return frozenset(file.stem.replace("-", "_") for file in folder().glob("*.toml"))


@cache
def _of_type(model_type: str) -> Architecture | None:
    # Most families' files are named after the family's first model type, so try the file with this name first.
    own_file = folder() / f"{model_type}.toml"
    if own_file.exists():
        return load(own_file)
    for file in sorted(folder().glob("*.toml")):
        # Read only the start of each file: it lists the family's model types.
        listed = _TYPES.search(_head(file))
        if listed and f'"{model_type}"' in listed[1]:
            return load(file)
    return None


def expert_count(config: Mapping[str, object] | None) -> int:
    """Return the number of experts in a layer, from the base's config; 0 if the config does not state it."""
    config = config or {}
    text = config.get("text_config")
    inner = text if isinstance(text, dict) else config
    return next((count for key in COUNTS if type(count := inner.get(key)) is int and count > 0), 0)


def of_gguf(name: str) -> list[Architecture]:
    """List the families for which llama.cpp's converter writes `name` as `general.architecture`, sorted by family."""
    quoted = f'"{name}"'
    return [
        _loaded(file)
        for file in sorted(folder().glob("*.toml"))
        if (listed := _GGUF.search(_head(file))) and quoted in listed[1]
    ]


def gguf_architectures() -> list[str]:
    """List every `general.architecture` that any family's file mentions, sorted."""
    names_of_each = (
        re.findall(r'"(.*?)"', listed[1]) for file in folder().glob("*.toml") if (listed := _GGUF.search(_head(file)))
    )
    return sorted({name for names in names_of_each for name in names})


def with_stacks(names: Iterable[str]) -> Iterator[Architecture]:
    """Yield the families in which one of these names is a stack of experts.

    The function compares only the part of each name after the last number, such as `mlp.experts.gate_up_proj`.
    """
    tails = {shape_of(name).rpartition(".#.")[2] for name in names}
    for file in _files_with_stacks():
        architecture = _loaded(file)
        # Ignore MLX-LM's names of rare families: in far more common families, the same names mean other weights.
        namings = [naming for naming in architecture.namings if not (architecture.record.rare and naming == "mlx")]
        stacks = {
            shape_of(HOLE.sub("0", place.name)).rpartition(".#.")[2]
            for naming in namings
            for weight in architecture.record.weights
            if (place := architecture.place(weight, naming)) is not None and place.stacked
        }
        if tails & stacks:
            yield architecture


def with_names(names: Iterable[str]) -> Iterator[Architecture]:
    """Yield the families that have one of these names in any naming, except families of diffusers pipelines.

    The function compares only the part of each name after the last number, such as `mlp.experts.gate_up_proj`.
    """
    tails = {shape_of(name).rpartition("#.")[2] for name in names}
    for file in sorted(folder().glob("*.toml")):
        text = file.read_text(encoding="utf-8")
        if "\n[pipeline]\n" not in text and any(f'{tail}"' in text for tail in tails):
            yield _loaded(file)


def with_naming(naming: str) -> Iterator[Architecture]:
    """Yield the families whose files contain names in this naming."""
    words = f"{naming} = ".encode()
    files = (file for file in sorted(folder().glob("*.toml")) if words in file.read_bytes())
    return (each for each in map(_loaded, files) if naming in each.namings)


class Head(msgspec.Struct, frozen=True):
    """Two fields of a family's file, parsed from the text before the table `[weights]`."""

    family: str
    pipeline: PipelineRecord


def of_pipelines() -> Iterator[tuple[Head, str]]:
    """Yield (head, whole text of the file) for each family that is part of a diffusers pipeline.

    There are about thirty such files, and parsing all of them takes longer than reading an adapter. So this function
    does not parse the table `[weights]`. To parse one whole file, call `named`.

    Raises:
        Malformed: a file is damaged.
    """
    for file in sorted(folder().glob("*.toml")):
        text = file.read_bytes()
        if b"\n[pipeline]\n" in text:
            try:
                yield msgspec.toml.decode(text.partition(b"\n[weights]\n")[0], type=Head), text.decode()
            except (ValueError, msgspec.MsgspecError) as error:
                raise Malformed(
                    f"the architecture file is damaged ({error})", path=file, cure="Correct the file"
                ) from error


@cache
def texts_of_models() -> tuple[str, ...]:
    """Return the text of each architecture file whose family is not part of a diffusers pipeline.

    Most of these families are models in the transformers library.
    """
    texts = (file.read_text(encoding="utf-8") for file in sorted(folder().glob("*.toml")))
    return tuple(text for text in texts if "\n[pipeline]\n" not in text)


@cache
def named(family: str) -> Architecture:
    """Return the architecture in the file `<family>.toml`."""
    return _loaded(folder() / f"{family}.toml")


@cache
def _loaded(path: Path) -> Architecture:
    return load(path)


@cache
def _head(file: Path) -> str:
    """Return the first 4 KiB of a file. They contain the lists `model_types` and `gguf`."""
    with file.open("rb") as stream:
        return stream.read(1 << 12).decode("utf-8", "replace")


@cache
def _files_with_stacks() -> tuple[Path, ...]:
    return tuple(file for file in sorted(folder().glob("*.toml")) if b"stacked = true" in file.read_bytes())


def load(path: Path) -> Architecture:
    """Parse a family's file, add the names from the folder `namings`, and check the result.

    Raises:
        Malformed: a file does not follow `spec/architectures/README.md`, or a naming gives two weights the same name
            and the same rows.
    """
    record = decoded(path, ArchitectureRecord)
    for naming in namings(path.parent / "namings"):
        for key, place in naming.weights.items() if set(naming.model_types) & set(record.model_types) else ():
            if key in record.weights:
                record.weights[key].setdefault(naming.naming, place)
    why = next(faults(record), None)
    if why is not None:
        raise Malformed(why, path=path, cure="Correct the file")
    return Architecture(record)


@cache
def namings(where: Path | None = None) -> tuple[Naming, ...]:
    """Load all files in the folder `namings`. Each file has one tool's names for the weights of several families.

    Args:
        where: the folder; None for `spec/architectures/namings`.

    Raises:
        Malformed: a file does not follow `spec/architectures/README.md`.
    """
    files = sorted((where or folder() / "namings").glob("*.toml"))
    return tuple(decoded(file, Naming) for file in files)


def namings_of(name: str) -> tuple[Naming, ...]:
    """Load all files for the naming `name`; each of them covers different model types."""
    return tuple(naming for naming in namings(folder() / "namings") if naming.naming == name)


class Versioned(Protocol):
    """A parsed file that states the version of its format."""

    @property
    def format(self) -> int:
        """Return the version."""
        ...


_T = TypeVar("_T", bound=Versioned)


def decoded(path: Path, kind: type[_T]) -> _T:
    """Parse a data file and check its version.

    Raises:
        Malformed: the file is damaged, or has another version of the format.
    """
    try:
        record = msgspec.toml.decode(path.read_bytes(), type=kind)
    except (ValueError, msgspec.MsgspecError) as error:
        raise Malformed(f"the architecture file is damaged ({error})", path=path, cure="Correct the file") from error
    if record.format != FORMAT:
        why = f"the file has format {record.format}; this version reads format {FORMAT}"
        raise Malformed(why, path=path, cure="Correct the file")
    return record


def faults(record: ArchitectureRecord) -> Iterator[str]:
    """Yield a message for each error in a family's file that parsing does not detect.

    For example, it is an error if two weights have the same name and rows in one naming.
    """
    if record.format != FORMAT:
        yield f"the file has format {record.format}; this version reads format {FORMAT}"
    architecture = Architecture(record)
    for naming in architecture.namings:
        taken: dict[tuple[str, int | str | None], str] = {}
        divisions: dict[str, set[int | str | None]] = {}
        for weight in record.weights:
            place = architecture.place(weight, naming)
            if place is None:
                continue
            yield from _place_faults(weight, naming, place)
            runs: Iterable[int | str | None] = [place.qkv]
            if place.part is not None:
                runs = range(place.part, place.part + place.parts)
            name = place.name if place.ratio is None else f"{place.name}, {place.ratio:g} outputs per input"
            name = name if place.half is None else f"{name}, half {place.half} of the experts"
            names = [(name, run) for run in runs] + ([(place.beside, None)] if place.beside else [])
            others = {taken.setdefault(each, weight) for each in names} - {weight}
            yield from (f"{naming}: {weight} and {other} are both {place.name}" for other in sorted(others))
            divisions.setdefault(name, set()).add("qkv" if place.qkv else place.of)
        yield from (f"{naming}: {name} is divided in different ways" for name, of in divisions.items() if len(of) > 1)
    for naming, other in record.extends.items():
        if other not in architecture.namings or other in record.extends or naming in record.keyed:
            yield f"extends: {naming} cannot extend {other}"
    yield from (f"gguf_when: {name} is not in gguf" for name in record.gguf_when if name not in record.gguf)
    yield from (f"gguf_as: {name} is not in gguf" for name in record.gguf_as if name not in record.gguf)
    ratios = () if record.pipeline is None else record.pipeline.ratios
    for name in (*record.vocabulary, *record.tied, *record.tied.values(), *ratios):
        if name not in record.weights:
            yield f"{name} is not one of the weights"


def _place_faults(weight: str, naming: str, place: WeightPlace) -> Iterator[str]:
    holes, there = set(HOLE.findall(weight)), set(HOLE.findall(place.name))
    if holes - {"{e}"} != there - {"{e}"}:
        yield f"{naming}: {place.name} does not have the placeholders of {weight}"
    if ("{e}" in holes) != (place.stacked or "{e}" in there) or (place.stacked and "{e}" in there):
        yield f"{naming}: {place.name} needs stacked or {{e}}, not both, if {weight} has experts; otherwise neither"
    first, of = place.part, place.of
    if (first is None) != (of is None) or (first is None and place.parts != 1):
        yield f"{naming}: {place.name} must have both part and of, or neither"
    elif first is not None and of is not None and not (0 <= first < first + place.parts <= of):
        yield f"{naming}: {place.name} has part {first} of {of}, but 0 <= part < part + parts <= of must hold"
    known = (None, "qkv", *TURNED, *LINEAR, *SPLIT)
    if place.rows not in known or (place.rows in TURNED) != (place.heads in SHARED):
        yield f"{naming}: {place.name} cannot have rows {place.rows!r} with heads {place.heads!r}"
    if place.columns not in (None, "linear_value"):
        yield f"{naming}: {place.name} cannot have columns {place.columns!r}"
    if (place.beside is None) != (place.rows not in SPLIT) or set(HOLE.findall(place.beside or place.name)) != there:
        yield f"{naming}: {place.name} cannot have rows {place.rows!r} with beside {place.beside!r}"
    if place.qkv not in (None, *QKV) or (place.qkv is not None and place.of is not None):
        yield f"{naming}: {place.name} cannot have qkv {place.qkv!r} with of {place.of!r}"
    if place.groups and place.qkv is None:
        yield f"{naming}: {place.name} has groups, but no qkv"
    if place.half is not None and (place.half not in (0, 1) or "{e}" not in there):
        yield f"{naming}: {place.name} has half {place.half}; half must be 0 or 1, and the name must contain {{e}}"
    if place.interleaved and place.of is None:
        yield f"{naming}: {place.name} is interleaved, but has no part"


@cache
def folder() -> Path:
    """Return the folder of the families' files: `data` next to this module, or `spec/architectures` in a checkout."""
    installed = Path(__file__).parent / "data"
    return installed if installed.is_dir() else Path(__file__).parents[2] / "spec" / "architectures"


def shape_of(name: str) -> str:
    """Return a name with `#` for each dotted part that is a number."""
    return _NUMBER.sub("#", name)


def fill(template: str, numbers: Mapping[str, str]) -> str:
    """Replace the placeholders of a template with numbers."""
    return HOLE.sub(lambda hole: numbers[hole[0]], template)


def _numbers(template: tuple[str, ...], words: list[str]) -> dict[str, str] | None:
    """Match the parts of a name to a template; return a map from each placeholder to its number.

    Return None if the name does not match: a fixed part of the template differs from the name's part, or a placeholder
    would get two different numbers.
    """
    numbers: dict[str, str] = {}
    for pattern, word in zip(template, words, strict=True):
        if pattern.startswith("{"):
            if numbers.setdefault(pattern, word) != word:
                return None
        elif pattern != word:
            return None
    return numbers


_NUMBER = re.compile(r"(?<![^.])(?:0|[1-9][0-9]{0,8})(?![^.])")
HOLE = re.compile(r"\{[a-z]\}")
_WORD = re.compile(r"[A-Za-z0-9_.-]{1,100}")
_GGUF = re.compile(r"^gguf\s*=\s*\[(.*?)\]", re.DOTALL | re.MULTILINE)
_TYPES = re.compile(r"^model_types\s*=\s*\[(.*?)\]", re.DOTALL | re.MULTILINE)
