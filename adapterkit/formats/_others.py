"""Recognise files that users mistake for adapters and that no format reads, so that an error can name their kind.

`spec/other_files.toml` lists the kinds: an IP-Adapter, a ControlNet, a file packed for a library.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from ..errors import AdapterkitError, Malformed
from ..io import safetensors
from ..io.inputs import read_input
from ..io.torch_file import is_torch_file, read_torch_file

if TYPE_CHECKING:
    from ..io.lazy import Lazy

FORMAT = 1


class OtherFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A kind of file that is not read.

    Attributes:
        name: the name of the kind, with its article.
        keys: patterns; in a file of this kind, each pattern matches some key.
        why: the reason why such files are not read.
        cure: the advice for the user.
        sources: where the patterns come from.
    """

    name: str
    keys: list[str]
    why: str
    cure: str
    sources: list[str]

    def key_of(self, names: Iterable[str]) -> str:
        """Return a key that matches the first pattern, if all patterns match some key; otherwise an empty string."""
        known = list(names)
        found = [next((name for name in known if re.search(pattern, name)), "") for pattern in self.keys]
        return found[0] if all(found) else ""


class _Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    format: int
    files: list[OtherFile]


@cache
def other_files() -> tuple[OtherFile, ...]:
    """Return the kinds of files, in the order in which they are tried."""
    installed = Path(__file__).parent / "data" / "other_files.toml"
    path = installed if installed.is_file() else Path(__file__).parents[2] / "spec" / "other_files.toml"
    found = msgspec.toml.decode(read_input(path), type=_Record)
    if found.format != FORMAT:
        why = f"the file has format {found.format}; this version reads format {FORMAT}"
        raise Malformed(why, path=path, cure="Correct the file")
    return tuple(found.files)


def other_file(names: Iterable[str]) -> tuple[OtherFile, str] | None:
    """Return the kind of a file with these keys, and the key that identifies it; None for every other file."""
    known = list(names)
    return next(((kind, key) for kind in other_files() if (key := kind.key_of(known))), None)


# Recognise adapters by the endings of their keys, for files whose format or module names are unknown.


_ENDINGS = re.compile(
    r"(.+?)\.((?:lora_(?:A|B|down|up|mid|magnitude_vector|a|b)(?:\.[\w-]+)?(?:\.weight|\.bias)?"
    r"|lora(?:_linear_layer)?\.(?:down|up)\.weight|(?:to_\w+|add_\w+)_lora\.(?:down|up)\.weight"
    r"|hada_(?:w[12]_[ab]|t[12])|lokr_(?:w[12](?:_[ab])?|t2)|oft_blocks(?:\.\d+)?|oft_R\.(?:weight|scaled_oft)|dora_scale|diff|diff_b|w_norm|b_norm"
    r"|(?:a1|a2|b1|b2|q_layer|p_layer)\.weight|lambda_layer|matrix_[AB]\.\d+))"
)
_ALPHA = re.compile(r"(.+)\.(alpha)")


def adapter_modules(path: Path) -> dict[str, dict[str, Lazy | safetensors.Entry]]:
    """Group tensors as module -> slot -> tensor if every key ends like an adapter's; otherwise return an empty dict.

    Args:
        path: a tensor file; anything else returns an empty dict.
    """
    try:
        if not path.is_file():
            return {}
        tensors: dict[str, Lazy | safetensors.Entry] = (
            dict(read_torch_file(path)) if is_torch_file(path) else dict(safetensors.read_header(path).entries)
        )
    except AdapterkitError:
        return {}
    found: dict[str, dict[str, Lazy | safetensors.Entry]] = {}
    told = False
    for key, tensor in tensors.items():
        match = _ENDINGS.fullmatch(key)
        told = told or match is not None
        match = match or _ALPHA.fullmatch(key)
        if match is None:
            return {}
        found.setdefault(match[1], {})[match[2]] = tensor
    return found if told else {}
