"""Generates pages of the documentation when the site is built, as a hook of mkdocs; see mkdocs.yml.

There is one page for each method, format and combiner, from the spec and the registries. The reference of the commands
comes from their help; the references of errors and Python functions come from docstrings. These pages are not
committed.
"""

from __future__ import annotations

import inspect
import json
import re
import sys
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import adapterkit as ak  # noqa: E402 - the checkout's own, installed or not
from adapterkit import errors  # noqa: E402
from adapterkit.cli import adapterkit  # noqa: E402
from adapterkit.cli.list import combiners  # noqa: E402
from adapterkit.formats import FORMATS  # noqa: E402
from adapterkit.methods import METHODS  # noqa: E402
from adapterkit.reporting.inspecting import WAYS, way  # noqa: E402

KINDS = {
    "additive": "W' = W + D: merges exactly, and adds and scales exactly, without the base.",
    "weight": "W' = f(W): merges exactly; sums and combinations need the base.",
    "output": "y' = f(x): changes a layer's output, so it is attached to a live model or a graph and never merged.",
    "context": "Extra tokens, keys or values: attached to a live model or a graph, never merged.",
}


NOTEBOOKS = ROOT / "docs" / "notebooks"

SPECIFICATION = {
    "README.md": "specification/index.md", "ADOPTING.md": "specification/adopting.md",
    "CHANGES.md": "specification/changes.md",
}  # fmt: skip
"""Text of spec/ -> its page."""

SOURCE = "https://github.com/adapterkit/adapterkit/blob/main/spec/"


def pages() -> dict[str, str]:
    """Return every generated page: path below docs -> Markdown."""
    made: dict[str, str] = {}
    for name in METHODS:
        made[f"reference/methods/{name}.md"] = method_page(name)
    for name in FORMATS:
        made[f"reference/formats/{name}.md"] = format_page(name)
    for entry in combiners():
        made[f"reference/combiners/{entry['name']}.md"] = combiner_page(entry)
    for source, path in SPECIFICATION.items():
        made[path] = specification_page(source)
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        made[f"notebooks/{path.stem}.md"] = notebook_page(path)
    made["security.md"] = (ROOT / "SECURITY.md").read_text("utf-8")
    made["examples.md"] = examples_page()
    made["reference/commands.md"] = commands_page()
    made["reference/errors.md"] = errors_page()
    made["reference/python.md"] = python_page()
    return made


def on_files(files: Any, config: Any) -> Any:
    """Add the pages to the site; mkdocs calls this."""
    from mkdocs.structure.files import File

    for path, text in pages().items():
        files.append(File.generated(config, path, content=text))
    return files


SHIM = re.compile(r"https://unpkg\.com/iframe-worker/shim")
"""The script that the theme would load from another site for the search on local pages; docs/scripts/ has a copy."""


def on_post_page(output: str, page: Any, **_: Any) -> str:
    """Remove everything that a page would load from other sites; mkdocs calls this."""
    return finished(output, "../" * page.url.count("/"))


def on_post_template(output: str, template_name: str, **_: Any) -> str:
    """Do the same for the page of a missing address, which can be at any depth; mkdocs calls this."""
    return finished(output, "/") if template_name.endswith(".html") else output


def finished(output: str, up: str) -> str:
    """Return a page that loads nothing from other sites and that a screen reader can read.

    Args:
        output: the page that the theme makes.
        up: the relative path from the page to the top of the site.
    """
    output = SHIM.sub(f"{up}scripts/file_worker.js", output)
    # Name the theme's search for people with a screen reader.
    search = '<div class="md-search" data-md-component="search" role="dialog"'
    return output.replace(f"{search}>", f'{search} aria-label="Search">')


def specification_page(source: str) -> str:
    """Return a text of spec/ with links to the pages of the site, and to the repository for other files."""

    def moved(link: re.Match[str]) -> str:
        path = link[1]
        if path in SPECIFICATION:
            return f"]({SPECIFICATION[path].removeprefix('specification/')})"
        return f"]({path.replace('../docs/', '../')})" if path.startswith("../docs/") else f"]({SOURCE}{path})"

    text = (ROOT / "spec" / source).read_text("utf-8")
    return re.sub(r"\]\((?!https?:|#)([^)]+)\)", moved, text)


def notebook_page(path: Path) -> str:
    """Return a notebook as a page: its text, its code and its outputs."""
    lines: list[str] = []
    for cell in json.loads(path.read_text("utf-8"))["cells"]:
        text = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            lines += [text.replace(".ipynb)", ".md)"), ""]
            continue
        lines += ["```python", text, "```", ""]
        for output in cell["outputs"]:
            data = output.get("data", {})
            html = "".join(data.get("text/html", ()))
            if html:
                lines += ['<div class="shown">', html.replace("\n\n", "\n"), "</div>", ""]
            else:
                shown = "".join(output.get("text", data.get("text/plain", ())))
                lines += ["```text", shown.rstrip("\n"), "```", ""]
    first, _, rest = "\n".join(lines).partition("\n")
    there = f"[The notebook](https://github.com/adapterkit/adapterkit/blob/main/docs/notebooks/{path.name}); "
    return f"{first}\n\n{there}it is run by the tests.\n{rest}"


def examples_page() -> str:
    """Return the examples, each with its text."""
    text = (ROOT / "examples" / "README.md").read_text("utf-8")
    kinds = {".yml": "yaml", ".sh": "sh", ".py": "python", ".toml": "toml"}
    names = re.findall(r"\]\(([^)]+)\)", text)
    lines = [re.sub(r"\]\(([^)]+)\)", lambda link: f"](#{link[1].replace('.', '')})", text), ""]
    for name in names:
        path = ROOT / "examples" / name
        lines += [f"## {name}", "", f"```{kinds[path.suffix]}", path.read_text("utf-8").rstrip("\n"), "```", ""]
    return "\n".join(lines)


def method_page(name: str) -> str:
    """Return the page of a method: formula, tensors, attributes, operations, and formats that can store it."""
    entry = _spec("methods", name)
    yields = [
        f"# {entry['title']}",
        "",
        f"`{name}`, of kind *{entry['kind']}*. [Paper or source]({entry['paper']}).",
        "",
    ]
    yields += ["## Formula", "", "```text", entry["formula"].strip(), "```", "", KINDS[entry["kind"]], ""]
    yields += ["## Tensors", "", *_table(("Name", "Shape", "Meaning"), _tensors(entry)), ""]
    if entry.get("attributes"):
        rows = [(f"`{a['name']}`", a["type"], _value(a.get("default")), a["meaning"]) for a in entry["attributes"]]
        yields += ["## Values", "", *_table(("Name", "Type", "Default", "Meaning"), rows), ""]
    yields += ["## Where it can go", ""]
    found: dict[str, list[str]] = {}
    for format_name in FORMATS:
        how = way(FORMATS[format_name], METHODS[name])
        if how is not None:
            found.setdefault(how, []).append(f"[{format_name}](../formats/{format_name}.md)")
    yields += [f"- {', '.join(found[how])}: {text}." for how, text in WAYS.items() if how in found]
    yields += ["", "## Example", "", "```sh", "adapterkit inspect ADAPTER"]
    if entry["kind"] in ("additive", "weight"):
        yields += ["adapterkit merge BASE ADAPTER -o MERGED --verify"]
    yields += [f"adapterkit convert ADAPTER {name}.safetensors --to adapterkit", "```", ""]
    return "\n".join(yields)


def _tensors(entry: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    for tensor in entry.get("tensors", ()):
        optional = " (optional)" if tensor.get("optional") else ""
        yield f"`{tensor['name']}`{optional}", f"`{tensor['shape']}`", _line(tensor["meaning"])


def format_page(name: str) -> str:
    """Return the page of a format: container, keys, reading and writing, known faults of its tool."""
    entry = _spec("formats", name)
    lines = [f"# {entry['title']}", "", f"`{name}`. [Its documentation]({entry['url']}).", ""]
    lines += [f"**Container**: {entry['container']}.", ""]
    for key, title in (("read", "How it is read"), ("write", "How it is written")):
        if entry.get(key):
            lines += [f"## {title}", "", _prose(entry[key]), ""]
    keys = entry.get("keys", {})
    if isinstance(keys, Mapping) and keys.get("grammar"):
        lines += ["## Keys", "", "```text", str(keys["grammar"]).strip(), "```", ""]
    tensors = [t for t in entry.get("tensors", ()) if isinstance(t, Mapping) and "key" in t]
    if tensors:
        rows = [(f"`{t['key']}`", str(t.get("shape", "")), _line(str(t.get("meaning", "")))) for t in tensors]
        lines += ["## Tensors", "", *_table(("Key", "Shape", "Meaning"), rows), ""]
    held = FORMATS[name].methods
    told = "all" if held == frozenset(METHODS) else ", ".join(f"[{m}](../methods/{m}.md)" for m in sorted(held))
    lines += ["## Methods that it can store", "", f"{told}.", "", "## Example", "", "```sh"]
    return "\n".join([*lines, f"adapterkit convert ADAPTER OUT --to {name}", "```", ""])


def combiner_page(entry: Mapping[str, Any]) -> str:
    """Return the page of a combiner: its computation and its parameters."""
    module = sys.modules[type(ak.ops.COMBINERS).__getitem__(ak.ops.COMBINERS, entry["name"]).__module__]
    told = inspect.cleandoc(module.__doc__ or "")
    lines = [
        f"# {entry['title']}",
        "",
        f"`{entry['name']}`. [Paper or source]({entry['paper']}).",
        "",
        _prose(told),
        "",
    ]
    if entry["based"]:
        lines += ["It needs the weights of the base: pass `--base` (`base=`).", ""]
    if entry["data"]:
        lines += [f"It needs data, in Python: `data=` is {entry['data']}.", ""]
    rows = [(f"`{n}`", _value(value), entry["meanings"][n]) for n, value in entry["parameters"].items()]
    if rows:
        lines += ["## Parameters", "", *_table(("Name", "Default", "Meaning"), rows), ""]
    if not entry["data"]:
        base = " --base BASE" if entry["based"] else ""
        lines += ["## Example", "", "```sh", f"adapterkit combine A B --method {entry['name']}{base} -o OUT", "```", ""]
    return "\n".join(lines)


def commands_page() -> str:
    """Return the reference of all commands, with their help."""
    ctx = click.Context(adapterkit, info_name="adapterkit", max_content_width=100, terminal_width=100)
    lines = ["# Commands", "", "The output of `adapterkit COMMAND --help`.", ""]
    for name in adapterkit.list_commands(ctx):
        command = adapterkit.get_command(ctx, name)
        assert command is not None
        inner = click.Context(command, info_name=name, parent=ctx, max_content_width=100, terminal_width=100)
        lines += [f"## {name}", "", "```text", command.get_help(inner).replace("\b\n", ""), "```", ""]
    return "\n".join(lines)


CURES = {
    "usage": "Read the error again: an option is missing, belongs to another command, or excludes another option.",
    "malformed": "Fetch or write the file again. If the tool that wrote it is current, open an issue with the file.",
    "unknown-format": "`adapterkit list formats`; name one with `--from`. A base is no adapter, and BASE comes first.",
    "shape-mismatch": "The adapter is for another base, or for another size of it: `adapterkit names BASE ADAPTER`.",
    "target-not-found": "`adapterkit names BASE ADAPTER`, `--rename FROM=TO`, or `--allow-partial` to leave it out.",
    "unsupported": "The error names what is not supported, and what to use instead.",
    "not-mergeable": "Attach the adapter to a live model or a graph instead: weights cannot store its effect.",
    "unrepresentable": "`--on-loss fold`, `promote` or `drop`, or `--to adapterkit`, which can store everything.",
    "check-failed": "Find out what differs before you use the result: the error names the first difference.",
    "miswritten": "A fault of adapterkit; no output was left behind. Open an issue with the input.",
    "corrupt": "The bytes changed after they were written: fetch or write them again, and check the disk.",
    "storage": "Free space, choose another path, or pass `--overwrite`; the same command then continues.",
    "network": "Run the same command again: what was fetched is kept.",
    "access": "Log in to the hub, or accept the licence on its page.",
    "remote-not-found": "Check the name; private repositories need a token.",
}
"""Code of an error -> its general remedy."""


def errors_page() -> str:
    """Return the reference of all errors, with their codes and exit codes."""
    found = [each for each in vars(errors).values() if isinstance(each, type) and issubclass(each, ak.AdapterkitError)]
    rows = [(f"`{e.code}`", str(e.exit_code), f"`{e.__name__}`", _first(e)) for e in found]
    lines = [
        "# Errors", "",
        "An error is one line on standard error: the file, the place in it, what is wrong, and what to type. With",
        "`--json` it is a record with `code`, `why`, `path`, `where` and `cure`. In Python it is an exception with the",
        "same fields.", "",
        *_table(("Code", "Exit code", "In Python", "Meaning"), sorted(rows)), "", "## What to do", "",
        "The error itself says what to type. In general:", "",
        *_table(("Code", "Cure"), sorted((f"`{code}`", cure) for code, cure in CURES.items())), "",
    ]  # fmt: skip
    return "\n".join(lines)


def python_page() -> str:
    """Return the reference of the public functions, from their docstrings."""
    lines = [
        "# Python functions",
        "",
        "`import adapterkit as ak` is instant; each function is loaded when it is used.",
        "",
    ]
    for name in sorted(ak.__all__):
        value = getattr(ak, name)
        if inspect.isfunction(value):
            lines += [f"## ak.{name}", "", *_function(f"ak.{name}", value)]
    lines += ["## Results, options and other classes", ""]
    for name in sorted(ak.__all__):
        value = getattr(ak, name)
        if inspect.isclass(value):
            lines += [f"### ak.{name}", "", "```text", inspect.getdoc(value) or "", "```", ""]
    lines += ["## ak.ops", ""]
    for name in sorted(ak.ops.__all__):
        value = getattr(ak.ops, name)
        if inspect.isfunction(value) and name not in ak.__all__:
            lines += [f"### ak.ops.{name}", "", *_function(f"ak.ops.{name}", value)]
    return "\n".join(lines)


def _function(name: str, value: Any) -> list[str]:
    signature = re.sub(r"'([^']*)'", r"\1", str(inspect.signature(value)))
    return ["```python", f"{name}{signature}", "```", "", "```text", inspect.getdoc(value) or "", "```", ""]


def _spec(kind: str, name: str) -> dict[str, Any]:
    return tomllib.loads((ROOT / "spec" / kind / f"{name}.toml").read_text("utf-8"))


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [columns, ["---"] * len(columns), *rows]
    return ["| " + " | ".join(_line(text).replace("|", "\\|") for text in line) + " |" for line in lines]


def _line(text: str) -> str:
    return " ".join(text.split())


def _prose(text: str) -> str:
    """Return plain text as Markdown, with escaped brackets, stars and angle brackets."""
    return re.sub(r"(?<!`)([\[\]*<>_])", r"\\\1", text.strip())


def _value(value: Any) -> str:
    return "" if value is None else f"`{value}`"


def _first(cls: type) -> str:
    return (cls.__doc__ or "").strip().partition("\n")[0]


if __name__ == "__main__":
    for place, page in pages().items():
        print(f"{len(page):>8,}  {place}")
