"""Find suspicious files: by their names, first bytes, pickles, configs and chat templates."""

from __future__ import annotations

import io
import json
import os
import pickletools
import re
import unicodedata
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from ..errors import AdapterkitError, shown
from ..io.inputs import read_input
from ..io.torch_pickle import KNOWN
from .findings import Finding

CODE = frozenset({
    ".py", ".pyc", ".pyd", ".so", ".dll", ".dylib", ".exe", ".sh", ".bat", ".ps1", ".js", ".ipynb", ".cu", ".ptx",
    ".jar", ".whl", ".egg", ".lua",
})  # fmt: skip
"""Suffixes of files that a program may run."""

PLAIN_HIDDEN = frozenset({".gitattributes", ".gitignore", ".cache", ".huggingface", ".adapterkit"})
"""Names of harmless hidden files, which hubs, git and adapterkit write."""

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".npz")
_AUTO = ("auto_map", "custom_pipelines", "trust_remote_code", "model_class_path", "processor_class_path")
_TRUSTED_PARENTS = (
    "__main__.",
    "torch.",
    "transformers.",
    "diffusers.",
    "peft.",
    "adapters.",
    "sentence_transformers.",
)
_PROGRAMS = (b"\x7fELF", b"\xcf\xfa\xed\xfe", b"\xca\xfe\xba\xbe")
_ADDRESS = re.compile(r"(?:https?|wss?|ftp)://[^\s'\"<>){}]+")
MOST = 20
"""For each rule, at most this many findings are reported in a file: a pickle may contain thousands of calls."""

LARGEST_TEXT = 32 << 20
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
            head = _head(file)
            yield from _content(name, head)
            if _is_pickle(head) or head[:2] == b"PK":
                yield from _pickles(name, file)
            if file.suffix in (".json", ".jinja") or file.name == "chat_template.json":
                yield from _texts(name, file)
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
    return ""


def _script(char: str) -> str:
    return unicodedata.name(char, "UNKNOWN").partition(" ")[0]


def _head(file: Path) -> bytes:
    with file.open("rb") as stream:
        return stream.read(512)


def _is_pickle(head: bytes) -> bool:
    """Whether a file with these first bytes is a pickle.

    The first opcodes are parsed too, because the length of a safetensors header may begin with the same two bytes.
    """
    if head[:1] != b"\x80" or not 2 <= head[1] <= 5:
        return False
    count = 0
    with suppress(ValueError, IndexError, KeyError, UnicodeDecodeError, OverflowError):
        for _ in pickletools.genops(head):
            count += 1
    return count > 2


def _content(name: str, head: bytes) -> Iterator[Finding]:
    suffix = Path(name).suffix.lower()
    kind = (
        "a program" if head[:4] in _PROGRAMS or head[:2] == b"MZ"
        else "a script" if head[:2] == b"#!"
        else "a pickle" if _is_pickle(head)
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


def _pickles(name: str, file: Path) -> Iterator[Finding]:
    """Yield a finding for each global in a file's pickles that a state dict does not need."""
    data = file.read_bytes() if file.stat().st_size <= LARGEST_TEXT else b""
    if data[:2] == b"PK" or (not data and zipfile.is_zipfile(file)):
        with zipfile.ZipFile(file) as archive:
            for entry in archive.infolist():
                if entry.filename.endswith((".pkl", ".pickle")) or entry.filename.endswith("data.pkl"):
                    if entry.file_size > LARGEST_TEXT:
                        yield Finding("pickle-call", name, entry.filename, f"a pickle of {entry.file_size:,} bytes")
                        continue
                    yield from _calls(name, entry.filename, archive.read(entry))
                elif Path(entry.filename).suffix in CODE:
                    yield Finding("code-file", name, entry.filename, "a file of code in the archive")
        return
    yield from _calls(name, "", data)


def _calls(name: str, place: str, data: bytes) -> Iterator[Finding]:
    stream = io.BytesIO(data)
    found = 0
    while stream.tell() < len(data) and found < MOST:
        texts: list[str] = []
        try:
            for opcode, argument, position in pickletools.genops(stream):
                if isinstance(argument, str):
                    texts.append(argument)
                asked = ""
                if opcode.name in ("GLOBAL", "INST"):
                    asked = str(argument)
                elif opcode.name == "STACK_GLOBAL":
                    asked = " ".join(texts[-2:]) if len(texts) > 1 else "a name that is computed"
                elif opcode.name in ("EXT1", "EXT2", "EXT4"):
                    asked = "a registered extension"
                if asked and asked not in KNOWN:
                    found += 1
                    where = f"{place} byte {position}".strip()
                    yield Finding("pickle-call", name, where, f"it asks for {shown(asked.replace(' ', '.', 1))}")
                    if found >= MOST:
                        return
        except (ValueError, IndexError, KeyError, UnicodeDecodeError, OverflowError):
            return  # Stop: in files of torch before 1.6, the bytes after the last pickle are data.


def _texts(name: str, file: Path) -> Iterator[Finding]:
    if file.stat().st_size > LARGEST_TEXT:
        return
    text = read_input(file).decode("utf-8", "replace")
    if file.suffix == ".jinja":
        yield from _template(name, "", text)
        return
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        return
    yield from _config(name, "", document, 0)


def _config(name: str, where: str, value: object, depth: int) -> Iterator[Finding]:
    if depth > 20:
        return
    if isinstance(value, Mapping):
        for key, entry in value.items():
            place = f"{where}.{key}" if where else str(key)
            if key in _AUTO and entry not in (None, False, {}, []):
                yield Finding("code-in-config", name, place, f"{key}: {shown(entry)}")
            elif key == "auto_mapping" and isinstance(entry, Mapping):
                parent = entry.get("parent_library")
                if isinstance(parent, str) and not f"{parent}.".startswith(_TRUSTED_PARENTS):
                    # Report this key: peft.auto imports the module with this name.
                    yield Finding("code-in-config", name, place, f"parent_library: {shown(parent)}")
            elif key in ("chat_template", "template") and isinstance(entry, str):
                yield from _template(name, place, entry)
            elif key == "chat_template" and isinstance(entry, list):
                for position, each in enumerate(entry):
                    if isinstance(each, Mapping) and isinstance(each.get("template"), str):
                        yield from _template(name, f"{place}[{position}]", each["template"])
            else:
                yield from _config(name, place, entry, depth + 1)
    elif isinstance(value, list):
        for position, entry in enumerate(value[:1000]):
            yield from _config(name, f"{where}[{position}]", entry, depth + 1)


def _template(name: str, where: str, text: str) -> Iterator[Finding]:
    from jinja2 import TemplateSyntaxError, nodes
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"])
    try:
        tree = environment.parse(text)
    except (TemplateSyntaxError, RecursionError):
        # Parse again without the `generation` blocks, which transformers adds to Jinja's syntax.
        try:
            tree = environment.parse(re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", text))
        except (TemplateSyntaxError, RecursionError) as error:
            yield Finding("template", name, where, f"it cannot be parsed: {shown(str(error))}")
            return
    for node in tree.find_all(nodes.Getattr):
        if node.attr.startswith("_") or node.attr in ("mro", "gi_frame", "cr_frame", "f_globals"):
            yield Finding("template", name, where, f"it reads the attribute {node.attr}")
    for item in tree.find_all(nodes.Getitem):
        key = item.arg.value if isinstance(item.arg, nodes.Const) else None
        if isinstance(key, str) and key.startswith("__"):
            yield Finding("template", name, where, f"it reads the entry {key}")
    for constant in tree.find_all(nodes.Const):
        if isinstance(constant.value, str) and re.search(r"__\w+__", constant.value):
            yield Finding("template", name, where, f"it contains the text {shown(constant.value)}")
    for reached in tree.find_all((nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends)):
        yield Finding("template", name, where, f"it loads another template ({type(reached).__name__.lower()})")
    for filtered in tree.find_all(nodes.Filter):
        if filtered.name == "attr":
            yield Finding("template", name, where, "it uses the filter attr")
    for reference in tree.find_all(nodes.Name):
        if reference.name in ("lipsum", "cycler", "joiner", "self", "config", "request"):
            yield Finding("template", name, where, f"it uses the object {reference.name}")
    for address in _ADDRESS.findall(text)[:MOST]:
        yield Finding("template-address", name, where, shown(address))


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
