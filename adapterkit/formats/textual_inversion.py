"""Read and write textual inversions, which are embeddings of new tokens.

The files have the layouts of AUTOMATIC1111, diffusers, kohya and SDXL's trainers. AUTOMATIC1111 writes a torch file
with the tensors in a dict `string_to_param`. diffusers writes one tensor, whose key is the token. kohya writes
`emb_params`, and does not store the token. Files for SDXL have one tensor for each text encoder, `clip_l` and `clip_g`;
files for SD 3 also have `t5xxl`.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, cast

from ..core.adapter import Adapter, Foreign, Step, Target
from ..errors import WRITE_ADAPTERKIT, WRITE_AGAIN, AdapterkitError, Malformed, Unrepresentable, Unsupported
from ..io.atomic import write_bytes
from ..io.lazy import Lazy, as_lazy, as_torch
from ..io.torch_file import is_torch_file, read_torch_value
from ..methods.textual_inversion import TextualInversion
from ..naming.image import rooted
from ._format import CHANGED, Format
from ._image.bundles import EMBEDDING
from ._image.file import TORCH_SUFFIXES, Metadata, load_tensors, save_tensors
from ._image.image_format import folder_file
from ._kit import leftovers

if TYPE_CHECKING:
    from ..io.checkpoint import Checkpoint
    from ..io.strict_json import JsonValue

FILES = ("learned_embeds.safetensors", "learned_embeds.bin")
WRAPPED = "string_to_param"
KOHYA = "emb_params"
TOKEN = "*"

ENCODERS = {"clip_l": "text_encoder", "clip_g": "text_encoder_2"}
"""A map from the key of a text encoder's tensor to the text encoder's name in a diffusers pipeline."""

_BESIDE = ("adapter_config.json", "config.json")
"""Config files of other formats. A tensor file next to one of them is not detected as a textual inversion."""


class InversionHints(TypedDict, total=False):
    """Data of the source file other than the embeddings, kept for the writer."""

    metadata: list[tuple[str, str]]
    keys: dict[str, str]
    """The key of each text encoder's embedding."""
    flat: list[str]
    """The keys of the embeddings that have one dimension."""
    wrapper: dict[str, object]
    """The other entries of the dict of a file from AUTOMATIC1111."""


class TextualInversionFiles(Format):
    """Files with token embeddings.

    The writer uses the source file's layout. An adapter from another format is written in SDXL's layout if it has an
    embedding for the second text encoder, and otherwise in diffusers' layout.
    """

    url = "https://huggingface.co/docs/diffusers/main/en/using-diffusers/textual_inversion_inference"
    description = "Embeddings of new tokens: AUTOMATIC1111's .pt, diffusers' learned_embeds, kohya's, SDXL's"
    methods = frozenset({"textual_inversion"})
    owns = frozenset(FILES)

    def sniff(self, path: Path) -> bool:
        try:
            file = folder_file(path, FILES)
            if any((file.parent / name).exists() for name in _BESIDE):
                return False
            tensors, _, _ = _load(file)
            return _form(tensors) != ""
        except AdapterkitError:
            return False

    def read(self, path: Path, *, compat: str | None = None, base: Checkpoint | None = None) -> Adapter:
        try:
            file = folder_file(path, FILES)
            tensors, metadata, wrapper = _load(file)
            return _decode(tensors, metadata, wrapper, file)
        except AdapterkitError as error:
            raise error.at(path=path) from None

    def write(
        self, adapter: Adapter, path: Path, *, on_loss: str = "refuse", base: Checkpoint | None = None
    ) -> list[str]:
        inversions, lines = _expressible(adapter, on_loss)
        hints = leftovers(adapter, FORMAT, InversionHints)
        file = path / FILES[0] if path.is_dir() or not path.suffix else path
        file.parent.mkdir(parents=True, exist_ok=True)
        wrapper = hints.get("wrapper") if file.suffix in TORCH_SUFFIXES else None
        tensors = _keys(inversions, hints, wrapped=wrapper is not None)
        if not _form(tensors):
            why = "in a file of diffusers, readers would take this token for the name of a parameter"
            raise Unrepresentable(why, items=[next(iter(tensors))], cure=WRITE_ADAPTERKIT)
        if wrapper is not None:
            _save_wrapped(file, tensors, {**wrapper, "name": _token_of(inversions)})
            return lines
        save_tensors(file, tensors, hints.get("metadata", [("format", "pt")]))
        return lines + _renamed(inversions, tensors, file)


FORMAT = "textual_inversion"

_PARAMETER = re.compile(r"[A-Za-z_]\w*(?:\.\w+)*\.[A-Za-z_]\w*")
"""A pattern for names of parameters, such as `fc.weight`. Tokens may have dots, too, such as `<cat-v1.5>`."""


def _load(path: Path) -> tuple[dict[str, Lazy], Metadata, dict[str, JsonValue] | None]:
    """Return the tensors, the metadata, and the other entries of AUTOMATIC1111's dict (None for other tools' files)."""
    if path.suffix not in TORCH_SUFFIXES and not is_torch_file(path):
        return *load_tensors(path), None
    value = read_torch_value(path)
    if not isinstance(value, dict):
        raise Malformed("this is not a dict of tensors", where="top level", cure=WRITE_AGAIN)
    wrapped = value.get(WRAPPED)
    if wrapped is None:
        return _tensors(value), [], None
    if not isinstance(wrapped, dict):
        raise Malformed("this is not a dict of tensors", where=WRAPPED, cure=WRITE_AGAIN)
    around = {name: inner for name, inner in value.items() if name != WRAPPED}
    bad = next((name for name, inner in around.items() if not _plain(inner)), None)
    if bad is not None:
        raise Malformed(
            "the value must be null, a string, a number, a boolean, or a dict of such values",
            where=str(bad),
            cure=WRITE_AGAIN,
        )
    return _tensors(wrapped), [], around


def _tensors(value: Mapping[object, object]) -> dict[str, Lazy]:
    bad = next((name for name, leaf in value.items() if not (isinstance(name, str) and isinstance(leaf, Lazy))), None)
    if bad is not None:
        raise Malformed("this is not a tensor", where=str(bad), cure=WRITE_AGAIN)
    return cast("dict[str, Lazy]", dict(value))


def _plain(value: object) -> bool:
    if isinstance(value, dict):
        return all(isinstance(name, str) and _plain(inner) for name, inner in value.items())
    return value is None or isinstance(value, str | int | float | bool)


def _form(tensors: Mapping[str, Lazy]) -> str:
    """Return the layout of a file with these tensors: `sdxl`, `kohya` or `diffusers`; empty for other layouts."""
    if not tensors or any(len(leaf.shape) not in (1, 2) or not leaf.dtype.floating for leaf in tensors.values()):
        return ""
    if tensors.keys() <= ENCODERS.keys():
        return "sdxl"
    if tensors.keys() == {KOHYA}:
        return "kohya"
    # In diffusers' layout, the key is the token.
    return "diffusers" if len(tensors) == 1 and not _PARAMETER.fullmatch(next(iter(tensors))) else ""


def _decode(
    tensors: Mapping[str, Lazy], metadata: Metadata, wrapper: Mapping[str, JsonValue] | None, path: Path
) -> Adapter:
    if "t5xxl" in tensors:
        raise Unsupported(
            "the file has an embedding for T5, but only embeddings for CLIP text encoders are supported",
            where="t5xxl",
            cure="Remove the tensor t5xxl from the file",
        )
    format_name = _form(tensors)
    if not format_name:
        others = [name for name in tensors if name not in ENCODERS]
        odd = next((name for name in others if "." in name), next(iter(others or tensors), None))
        raise Malformed("this is not the embedding of a token", where=odd, cure=WRITE_AGAIN)
    token = _token(tensors, wrapper, format_name, path)
    updates = {}
    for name, leaf in tensors.items():
        if 0 in leaf.shape:
            raise Malformed(
                f"the embedding has no elements; its shape is {list(leaf.shape)}", where=name, cure=WRITE_AGAIN
            )
        part = ENCODERS.get(name, "text_encoder")
        rows = leaf if len(leaf.shape) == 2 else leaf.reshape(1, *leaf.shape)
        updates[Target(f"{part}.{EMBEDDING}")] = (TextualInversion(P=cast(Any, rows), token=token),)
    data: dict[str, Any] = {
        "metadata": [list(pair) for pair in metadata],
        "keys": {ENCODERS.get(name, "text_encoder"): name for name in tensors},
        "flat": [name for name, leaf in tensors.items() if len(leaf.shape) == 1],
    }
    if wrapper is not None:
        data["wrapper"] = wrapper
    return Adapter(updates, None, (Step("read", {"format": FORMAT}),), Foreign(FORMAT, data))


def _token(tensors: Mapping[str, Lazy], wrapper: Mapping[str, JsonValue] | None, format_name: str, path: Path) -> str:
    """Return the token: the tensor's key (diffusers), the `name` entry (AUTOMATIC1111), or else the file's name."""
    if wrapper is not None:
        return str(wrapper.get("name") or path.stem)
    return next(iter(tensors)) if format_name == "diffusers" else path.stem


def _expressible(adapter: Adapter, on_loss: str) -> tuple[dict[str, TextualInversion], list[str]]:
    """Return a map from each text encoder's name to its embedding, and a line for each omitted update."""
    inversions: dict[str, TextualInversion] = {}
    items = []
    for target, update in adapter:
        root, rest = rooted(target.path)
        part = root[:-1] or "text_encoder"
        fits = rest == EMBEDDING and part in ENCODERS.values() and part not in inversions
        if isinstance(update, TextualInversion) and fits:
            inversions[part] = update
        else:
            items.append(f"{target}: the file cannot store {update.method} for this target")
    tokens = {update.token for update in inversions.values()}
    if len(tokens) > 1:
        items.append("the adapter has several tokens, but a file can have only one")
    if (items and on_loss != "drop") or not inversions or len(tokens) > 1:
        cure = WRITE_ADAPTERKIT
        raise Unrepresentable("a file can store only the CLIP embeddings of one token", items=items, cure=cure)
    return inversions, [f"left out {item}" for item in items]


def _token_of(inversions: Mapping[str, TextualInversion]) -> str:
    return next(iter(inversions.values())).token


def _keys(inversions: Mapping[str, TextualInversion], hints: InversionHints, *, wrapped: bool) -> dict[str, Lazy]:
    """Return the tensors by key. Keep the source file's keys and shapes if the new file has the same layout."""
    words = {part: name for name, part in ENCODERS.items()}
    hints = hints if wrapped or "wrapper" not in hints else {}
    old, flat = hints.get("keys", {}), hints.get("flat", [])
    several = len(inversions) > 1 or set(inversions) != {"text_encoder"}
    tensors = {}
    for part, update in inversions.items():
        read = old.get(part, "")
        # In diffusers' layout, the key is the token, and the token may have changed since the file was read.
        fixed = wrapped or read in ENCODERS or (read == KOHYA and not several)
        key = read if read and fixed else words[part] if several else TOKEN if wrapped else update.token or TOKEN
        leaf = as_lazy(update.P)
        tensors[key] = leaf.reshape(leaf.shape[1]) if read in flat and leaf.shape[0] == 1 else leaf
    return tensors


def _save_wrapped(path: Path, tensors: Mapping[str, Lazy], around: Mapping[str, object]) -> None:
    import torch

    buffer = io.BytesIO()
    torch.save({**around, WRAPPED: {name: as_torch(leaf) for name, leaf in tensors.items()}}, buffer)
    write_bytes(path, buffer.getvalue())


def _renamed(inversions: Mapping[str, TextualInversion], tensors: Mapping[str, Lazy], file: Path) -> list[str]:
    """Return a line for each text encoder whose token will be different when the file is read.

    Files of kohya and SDXL do not store the token, so readers use the file's name. diffusers' files store the token as
    the key. AUTOMATIC1111's files also store the token; this function is not called for them.
    """
    token = next(iter(tensors)) if _form(tensors) == "diffusers" else file.stem
    why = f"becomes {token!r}, the name of the file; it was {_token_of(inversions)!r}"
    changed = [part for part, update in inversions.items() if update.token != token]
    return [f"{CHANGED}{part}.{EMBEDDING}:textual_inversion.token {why}" for part in changed]
