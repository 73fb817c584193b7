"""Recognise files that users mistake for adapters, so that an error can say what these files are.

No format reads such files. `spec/other_files.toml` lists their kinds, such as IP-Adapters and ControlNets.
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
    """A kind of file that looks like an adapter but is not read.

    Attributes:
        name: the name of the kind, with its article, such as "an IP-Adapter".
        keys: regular expressions. A file is of this kind if each expression matches at least one of the file's keys.
        why: the reason why such files are not read.
        cure: the advice for the user at the end of the error.
        sources: where the expressions were taken from.
    """

    name: str
    keys: list[str]
    why: str
    cure: str
    sources: list[str]

    def key_of(self, names: Iterable[str]) -> str:
        """Return a key that matches the first regular expression; empty if the file is not of this kind."""
        known = list(names)
        keys_found = [next((name for name in known if re.search(pattern, name)), "") for pattern in self.keys]
        return keys_found[0] if all(keys_found) else ""


class _OtherFiles(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    format: int
    files: list[OtherFile]


@cache
def other_files() -> tuple[OtherFile, ...]:
    """Return the kinds of files in `other_files.toml`, in the order in which `other_file` tries them."""
    installed = Path(__file__).parent / "data" / "other_files.toml"
    path = installed if installed.is_file() else Path(__file__).parents[2] / "spec" / "other_files.toml"
    record = msgspec.toml.decode(read_input(path), type=_OtherFiles)
    if record.format != FORMAT:
        why = f"the file has format {record.format}; this version reads format {FORMAT}"
        raise Malformed(why, path=path, cure="Correct the file")
    return tuple(record.files)


def other_file(names: Iterable[str]) -> tuple[OtherFile, str] | None:
    """Return the kind of a file with these keys, and a key that shows the kind; None if the kind is unknown."""
    known = list(names)
    return next(((kind, key) for kind in other_files() if (key := kind.key_of(known))), None)


# Recognise adapters whose format or module names are unknown, by the endings of their keys.


_ENDINGS = re.compile(
    r"(.+?)\.((?:lora_(?:A|B|down|up|mid|magnitude_vector|a|b)(?:\.[\w-]+)?(?:\.weight|\.bias)?"
    r"|lora(?:_linear_layer)?\.(?:down|up)\.weight|(?:to_\w+|add_\w+)_lora\.(?:down|up)\.weight"
    r"|hada_(?:w[12]_[ab]|t[12])|lokr_(?:w[12](?:_[ab])?|t2)|oft_blocks(?:\.\d+)?|oft_R\.(?:weight|scaled_oft)|dora_scale|diff|diff_b|w_norm|b_norm"
    r"|(?:a1|a2|b1|b2|q_layer|p_layer)\.weight|lambda_layer|matrix_[AB]\.\d+))"
)
_ALPHA = re.compile(r"(.+)\.(alpha)")


def adapter_modules(path: Path) -> dict[str, dict[str, Lazy | safetensors.Entry]]:
    """Group the tensors of an adapter's file by module, then by the ending of the key.

    The keys of adapters have endings such as `.lora_A.weight` and `.alpha`. Return an empty dict if a key has no such
    ending, or if all keys end in `.alpha`.

    Args:
        path: a tensor file. If `path` is anything else, the result is an empty dict.
    """
    try:
        if not path.is_file():
            return {}
        tensors: dict[str, Lazy | safetensors.Entry] = (
            dict(read_torch_file(path)) if is_torch_file(path) else dict(safetensors.read_header(path).entries)
        )
    except AdapterkitError:
        return {}
    modules: dict[str, dict[str, Lazy | safetensors.Entry]] = {}
    recognised = False
    for key, tensor in tensors.items():
        match = _ENDINGS.fullmatch(key)
        recognised = recognised or match is not None
        match = match or _ALPHA.fullmatch(key)
        if match is None:
            return {}
        modules.setdefault(match[1], {})[match[2]] = tensor
    return modules if recognised else {}
