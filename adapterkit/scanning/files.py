"""Find suspicious files: by their names and first bytes, and by the rules for pickles and configs."""

from __future__ import annotations

import os
import re
import stat
import unicodedata
import zipfile
from collections.abc import Iterator
from pathlib import Path

from ..errors import AdapterkitError, shown
from .configs import in_config, in_gguf
from .findings import Finding
from .pickles import CODE, appended_archive, in_pickles, is_pickle, is_tar

PLAIN_HIDDEN = frozenset({".gitattributes", ".gitignore", ".cache", ".huggingface", ".adapterkit"})
"""Names of harmless hidden files, which hubs, git and adapterkit write."""

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".npz")
_PROGRAMS = (b"\x7fELF", b"\xcf\xfa\xed\xfe", b"\xca\xfe\xba\xbe")
_SLASHES = frozenset("\u2044\u2215\u29f8\uff0f")
_BIDI = frozenset("\u200b\u200c\u200d\u2060\ufeff\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def in_folder(root: Path, files: list[Path], unread: list[str]) -> Iterator[Finding]:
    """Yield findings in all files of a folder, or in one file."""
    folder = root if root.is_dir() else root.parent
    for file in files:
        name = file.relative_to(folder).as_posix()
        if file.is_symlink() and not _inside(file, folder):
            yield Finding("link", name, "", f"it points to {os.readlink(file)}")
            continue
        yield from _name(name)
        try:
            if not stat.S_ISREG(file.stat().st_mode):
                if not file.is_dir():
                    yield Finding("other-content", name, "", "it is a pipe, a socket or a device")
                continue
            head = _head(file)
            yield from _content(name, head)
            yield from in_pickles(name, file, unread)
            if head[:2] != b"PK" and not is_tar(head) and appended_archive(file):
                yield Finding("other-content", name, "last bytes", "a zip archive follows its content")
            if file.suffix.lower() in (".json", ".jinja"):
                yield from in_config(name, file, unread)
            elif head[:4] == b"GGUF":
                yield from in_gguf(name, file)
        except (AdapterkitError, OSError, zipfile.BadZipFile) as error:
            unread.append(f"{name}: {error}")
    yield from _twice(folder, files)


def _inside(file: Path, folder: Path) -> bool:
    """Whether a link leads to a file in the folder, or in the hub client's cache that contains the folder."""
    try:
        target, top = file.resolve(), folder.resolve()
    except (OSError, RuntimeError):  # The link leads back to itself.
        return False
    # Allow links to the folder `blobs`: huggingface_hub's snapshots are links to the blobs of the same repository.
    return target.is_relative_to(top) or (
        top.parent.name == "snapshots" and target.is_relative_to(top.parent.parent / "blobs")
    )


def _name(name: str) -> Iterator[Finding]:
    parts = Path(name).parts
    for part in parts:
        if part.startswith(".") and part not in PLAIN_HIDDEN and not part.startswith(".adapterkit"):
            yield Finding("hidden-file", name, "", f"the name {part!r} is hidden")
        strange = confusable(part)
        if strange:
            yield Finding("lookalike-name", name, "", strange)
    suffixes = Path(name).suffixes
    if suffixes and suffixes[-1].lower() in CODE:
        yield Finding("code-file", name, "", f"a {suffixes[-1]} file")
    weights = [suffix for suffix in suffixes[:-1] if suffix.lower() in WEIGHTS]
    if weights and suffixes[-1].lower() not in (*WEIGHTS, ".json", ".lora"):
        yield Finding("hidden-file", name, "", f"it looks like a {weights[-1]} file and is a {suffixes[-1]} file")
    if re.search(r"\s{3,}|\s$", name):
        yield Finding("hidden-file", name, "", "white space hides the end of the name")


def confusable(text: str) -> str:
    """Return the reason why people may misread a text; "" if they cannot."""
    invisible = sorted({f"U+{ord(c):04X}" for c in text if c in _BIDI or unicodedata.category(c) in ("Cf", "Cc")})
    if invisible:
        return f"invisible characters {', '.join(invisible)} in {shown(text)}"
    scripts = {_script(c) for c in text if c.isalpha()}
    if "LATIN" in scripts and scripts & {"CYRILLIC", "GREEK", "ARMENIAN", "CHEROKEE", "FULLWIDTH", "MATHEMATICAL"}:
        others = sorted({f"{c} (U+{ord(c):04X})" for c in text if c.isalpha() and _script(c) != "LATIN"})
        return f"{', '.join(others[:5])} among Latin letters in {shown(text)}"
    alike = sorted({f"{c} (U+{ord(c):04X})" for c in text if _as_ascii(c)})
    return f"{', '.join(alike[:5])} instead of plain characters in {shown(text)}" if alike else ""


def _as_ascii(char: str) -> bool:
    """Whether a letter, space, punctuation mark or symbol outside ASCII looks like an ASCII character."""
    if char.isascii() or unicodedata.category(char)[0] not in "LPZS" or unicodedata.category(char) == "So":
        return False
    return char in _SLASHES or unicodedata.normalize("NFKC", char).isascii()


def _script(char: str) -> str:
    return unicodedata.name(char, "UNKNOWN").partition(" ")[0]


def _head(file: Path) -> bytes:
    with file.open("rb") as stream:
        return stream.read(512)


def _content(name: str, head: bytes) -> Iterator[Finding]:
    suffix = Path(name).suffix.lower()
    kind = (
        "a program" if head[:4] in _PROGRAMS or head[:2] == b"MZ"
        else "a script" if head[:2] == b"#!"
        else "a pickle" if is_pickle(head)
        else "a zip archive" if head[:2] == b"PK"
        else "a GGUF file" if head[:4] == b"GGUF"
        else ""
    )  # fmt: skip
    allowed = {
        "a pickle": (".bin", ".pt", ".pth", ".ckpt", ".pkl"), "a GGUF file": (".gguf",),
        "a zip archive": (".bin", ".pt", ".pth", ".ckpt", ".npz", ".zip", ".keras"),
    }  # fmt: skip
    if kind in ("a program", "a script"):
        yield Finding("code-file", name, "first bytes", f"it is {kind}")
    elif kind and suffix in (*WEIGHTS, ".json", ".md", ".txt", ".jinja", ".model") and suffix not in allowed[kind]:
        yield Finding("other-content", name, "first bytes", f"it is {kind}")


def _twice(folder: Path, files: list[Path]) -> Iterator[Finding]:
    """Yield a finding for two weight files with the same stem but different content: tools may load either file."""
    from ..io import safetensors
    from ..io.torch_file import read_torch_file

    by_name = {file.relative_to(folder).as_posix(): file for file in files}
    for name, file in by_name.items():
        if not name.endswith(".safetensors"):
            continue
        for suffix in (".bin", ".pt"):
            other = by_name.get(name.removesuffix(".safetensors") + suffix)
            if other is None:
                continue
            try:
                ours, theirs = safetensors.read(file), read_torch_file(other)
                if ours.keys() != theirs.keys():
                    why = "the two files have different tensors"
                elif any(bytes(ours[k].fetch()) != bytes(theirs[k].fetch()) for k in ours):
                    why = "the two files have different values"
                else:
                    continue
            except AdapterkitError as error:
                why = f"one of them cannot be read: {error.why}"
            yield Finding("second-weights", name, other.name, why)
