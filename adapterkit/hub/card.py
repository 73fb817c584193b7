"""The model card of what is pushed: metadata that hubs index, what it is in a table, and code that runs."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..adapter import Adapter

REPO = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
MOST_TARGETS = 12


def adapter_card(adapter: Adapter, name: str, source_format: str, place: str, licence: str | None) -> str:
    """The card of an adapter.

    Args:
        adapter: the adapter.
        name: of the repository.
        source_format: what its files are.
        place: the uri to read it from.
        licence: an identifier such as `apache-2.0`, passed on as it is.
    """
    base = base_id(adapter)
    methods = sorted({update.method for _, update in adapter})
    library = "peft" if source_format == "peft" else "adapterkit"
    data = {
        "base_model": base, "base_model_relation": "adapter" if base else None, "library_name": library,
        "license": licence, "tags": ["adapterkit", *methods],
    }  # fmt: skip
    parts = [
        _front(data),
        f"# {_text(name)}",
        f"A {', '.join(methods)} adapter" + (f" for [{base}].\n" if base else ".\n"),
    ]
    parts += [_facts(adapter, source_format), _usage(place, base, library == "peft")]
    if base:
        parts.append(f"[{base}]: https://huggingface.co/{base}")
    return "\n\n".join(part.strip("\n") for part in parts if part) + "\n"


def model_card(
    name: str, place: str, base: str | None, adapters: Iterable[Mapping[str, Any]], licence: str | None
) -> str:
    """The card of a base, merged or not; `adapters` are what a merge recorded."""
    data = {
        "base_model": base, "base_model_relation": "merge" if base else None, "library_name": "transformers",
        "license": licence, "tags": ["adapterkit", "merge"],
    }  # fmt: skip
    rows = [
        f"| {_text(a.get('name'))} | {_text(a.get('weight'))} | `{_text(a.get('digest'))[:16]}` |" for a in adapters
    ]
    table = "\n".join(["| adapter | weight | digest |", "|---|---|---|", *rows]) if rows else ""
    use = _code([f"adapterkit inspect {place}"], "sh")
    intro = "Merged with adapterkit." if rows else "Pushed with adapterkit."
    return (
        "\n\n".join(part for part in (_front(data).strip("\n"), f"# {_text(name)}", intro, table, use) if part) + "\n"
    )


def base_id(adapter: Adapter) -> str | None:
    """The base's name on a hub; a path of somebody's disk is none and stays out of the card."""
    name = adapter.base.id if adapter.base else None
    return name if name and REPO.fullmatch(name) else None


def licence_of(text: str) -> str | None:
    """The licence that a card's metadata names."""
    match = re.match(r"---\r?\n(.*?)\r?\n---", text, re.DOTALL)
    found = (
        re.search(r"^license:[ \t]*[\"']?([A-Za-z0-9.+-]{1,64})[\"']?[ \t]*\r?$", match[1], re.MULTILINE)
        if match
        else None
    )
    return found[1] if found else None


def licence_at(path: Path) -> str | None:
    """The licence that the card in a folder, or beside a file, names."""
    card = (path if path.is_dir() else path.parent) / "README.md"
    try:
        return licence_of(card.read_text("utf-8"))
    except (OSError, ValueError):
        return None


def _front(data: Mapping[str, Any]) -> str:
    import yaml

    told = {key: value for key, value in data.items() if value}
    return f"---\n{yaml.safe_dump(told, sort_keys=True, allow_unicode=True)}---\n"


def _facts(adapter: Adapter, source_format: str) -> str:
    ranks = sorted({rank for target, update in adapter if (rank := update.dims(target.stacked).get("r")) is not None})
    targets = sorted({re.sub(r"\.\d+\.", ".*.", str(target)) for target in adapter.updates})
    shown = ", ".join(f"`{_text(target)}`" for target in targets[:MOST_TARGETS])
    more = f" and {len(targets) - MOST_TARGETS} more" if len(targets) > MOST_TARGETS else ""
    revision = adapter.base.revision if adapter.base else None
    rows = [
        ("format", source_format), ("rank", ", ".join(map(str, ranks))),
        ("targets", f"{len(adapter.updates)}: {shown}{more}"),
        ("base's revision", _text(revision) if revision else ""),
        ("lineage", " → ".join(_text(step.op) for step in adapter.recipe)), ("digest", f"`{adapter.digest()}`"),
    ]  # fmt: skip
    return "\n".join(["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows if value)])


def _usage(place: str, base: str | None, peft: bool) -> str:
    lines = ["import adapterkit as ak", "", f'adapter = ak.read("{place}")']
    if base:
        lines.append(f'ak.merge("hf://{base}", adapter, "merged")')
    text = f"## Use\n\n{_code(lines, 'python')}"
    repo = place.removeprefix("hf://").partition("@")[0]
    if peft and base and REPO.fullmatch(repo):
        peft_lines = [
            "from peft import PeftModel", "from transformers import AutoModelForCausalLM", "",
            f'model = AutoModelForCausalLM.from_pretrained("{base}")',
            f'model = PeftModel.from_pretrained(model, "{repo}")',
        ]  # fmt: skip
        text += f"\n\nor, for a causal language model,\n\n{_code(peft_lines, 'python')}"
    return text


def _code(lines: Iterable[str], language: str) -> str:
    return "\n".join([f"```{language}", *lines, "```"])


def _text(value: object) -> str:
    """A value as text that cannot break out of a table or become markup."""
    return re.sub(r"[^\w .,:+/@=()*-]", " ", str(value))[:200]
