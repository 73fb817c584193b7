"""The model card of what is pushed: metadata that hubs index, what it is in a table, and code that runs."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..tensors.locations import is_repo
from .licences import Licence
from .uris import Uri

if TYPE_CHECKING:
    from ..adapter import Adapter

MOST_TARGETS = 12


@dataclass(frozen=True, slots=True)
class Model:
    """What a card says of a model.

    Attributes:
        base: the base's name on its hub, if it is known.
        revision: the commit of the base, if it is known.
        adapters: what a merge recorded of each adapter; none where nothing was merged.
        config: of transformers, if it is a model of that.
    """

    base: str | None = None
    revision: str | None = None
    adapters: Sequence[Mapping[str, Any]] = ()
    config: Mapping[str, Any] = field(default_factory=dict)


def adapter_card(adapter: Adapter, name: str, source_format: str, place: Uri, licence: Licence) -> str:
    """The card of an adapter.

    Args:
        adapter: the adapter.
        name: of the repository.
        source_format: what its files are.
        place: where to read it from.
        licence: passed on as it is.
    """
    base = base_id(adapter)
    data = {
        "base_model": base, "base_model_relation": "adapter" if base else None,
        "library_name": "peft" if source_format == "peft" else "adapterkit", **licence,
        "tags": ["adapterkit", *adapter.methods],
    }  # fmt: skip
    intro = f"A {', '.join(adapter.methods)} adapter" + (f" for [{base}]." if base else ".")
    link = f"[{base}]: https://huggingface.co/{base}" if base else ""
    facts, usage = _adapter_facts(adapter, source_format), _adapter_usage(place, base, source_format)
    return _page(data, f"# {_text(name)}", intro, _table(("", ""), facts), *usage, link)


def model_card(name: str, place: Uri, model: Model, licence: Licence) -> str:
    """The card of a model, merged or not."""
    base, merged = model.base if is_repo(model.base) else None, bool(model.adapters)
    data = {
        "base_model": base, "base_model_relation": "merge" if base and merged else None,
        "library_name": "transformers" if "model_type" in model.config else "adapterkit", **licence,
        "tags": ["adapterkit", *(["merge", *_methods(model.adapters)] if merged else [])],
    }  # fmt: skip
    intro = "Adapters merged into their base with adapterkit." if merged else "Pushed with adapterkit."
    tables = _table(("", ""), _model_facts(model)), _table(ADAPTER_COLUMNS, map(_merged, model.adapters))
    return _page(data, f"# {_text(name)}", intro, *tables, *_model_usage(place, model.config))


ADAPTER_COLUMNS = ("name", "methods", "ranks", "weight", "targets", "lineage", "digest")
"""Of what a merge records of an adapter."""


def base_id(adapter: Adapter) -> str | None:
    """The base's name on a hub; a path of somebody's disk is none and stays out of the card."""
    name = adapter.base.id if adapter.base else None
    return name if is_repo(name) else None


def _page(data: Mapping[str, Any], *parts: str) -> str:
    import yaml

    told = {key: value for key, value in data.items() if value}
    front = f"---\n{yaml.safe_dump(told, sort_keys=True, allow_unicode=True)}---"
    return "\n\n".join([front, *(part for part in parts if part)]) + "\n"


def _methods(adapters: Iterable[Mapping[str, Any]]) -> list[str]:
    listed = (found for adapter in adapters if isinstance(found := adapter.get("methods"), list))
    return sorted({_text(method) for found in listed for method in found})


def _adapter_facts(adapter: Adapter, source_format: str) -> list[tuple[str, str]]:
    targets = sorted({re.sub(r"\.\d+\.", ".*.", str(target)) for target in adapter.updates})
    more = f" and {len(targets) - MOST_TARGETS} more" if len(targets) > MOST_TARGETS else ""
    return [
        ("format", source_format), ("rank", _listed(adapter.ranks)),
        ("targets", f"{len(adapter.updates)}: {', '.join(map(_span, targets[:MOST_TARGETS]))}{more}"),
        ("base's revision", _text(adapter.base.revision) if adapter.base and adapter.base.revision else ""),
        ("lineage", _listed(step.op for step in adapter.recipe)), ("digest", _span(adapter.digest())),
    ]  # fmt: skip


def _model_facts(model: Model) -> list[tuple[str, str]]:
    return [("base", _text(model.base or "")), ("base's revision", _text(model.revision or ""))]


def _merged(adapter: Mapping[str, Any]) -> list[str]:
    """The row of an adapter, by `ADAPTER_COLUMNS`; an older record says less."""
    lists = {key: _listed(adapter.get(key) or ()) for key in ("methods", "ranks", "lineage")}
    plain = {key: _text(adapter.get(key, "")) for key in ("name", "weight", "targets")}
    told = {**plain, **lists, "digest": _span(str(adapter.get("digest", ""))[:16])}
    return [told[key] for key in ADAPTER_COLUMNS]


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Rows that say something beyond their first cell; empty without any."""
    lines = [f"| {' | '.join(cells)} |" for cells in rows if any(cells[1:])]
    return "\n".join([f"| {' | '.join(head)} |", "|---" * len(head) + "|", *lines]) if lines else ""


def _adapter_usage(place: Uri, base: str | None, source_format: str) -> list[str]:
    lines = ["import adapterkit as ak", "", f"adapter = ak.read({_quoted(place)})"]
    if base:
        lines.append(f'ak.merge("hf://{base}", adapter, "merged")')
    parts = ["## Use", _code(lines, "python")]
    if source_format == "peft" and base and place.scheme == "hf":
        loading = [
            "from peft import PeftModel", "from transformers import AutoModelForCausalLM", "",
            f'model = AutoModelForCausalLM.from_pretrained("{base}")',
            f"model = PeftModel.from_pretrained(model, {_loaded(place)})",
        ]  # fmt: skip
        parts += ["or, for a causal language model,", _code(loading, "python")]
    return parts


def _model_usage(place: Uri, config: Mapping[str, Any]) -> list[str]:
    name = _class_of(config)
    inspected = _code([f"adapterkit inspect {shlex.quote(str(place))}"], "sh")
    if name is None:
        return ["## Use", inspected]
    lines = [f"from transformers import {name}", ""]
    if place.scheme == "hf":
        lines.append(f"model = {name}.from_pretrained({_loaded(place)})")
    else:
        pulled = [f'ak.hub.pull({_quoted(place)}, "model")', f'model = {name}.from_pretrained("model")']
        lines = ["import adapterkit as ak", *lines, *pulled]
    return ["## Use", _code(lines, "python"), inspected]


def _class_of(config: Mapping[str, Any]) -> str | None:
    """The class of transformers that loads a model; None where that is not known, or not of transformers itself."""
    if "model_type" not in config or "auto_map" in config:
        return None
    named = config.get("architectures")
    name = named[0] if isinstance(named, list) and named else "AutoModel"
    if not isinstance(name, str) or not re.fullmatch(r"[A-Z][A-Za-z0-9_]{0,99}", name):
        return None
    return "AutoModelForCausalLM" if name.endswith("ForCausalLM") else name


def _loaded(place: Uri) -> str:
    """A place on Hugging Face's hub as the arguments of `from_pretrained`."""
    told = [("revision", place.revision), ("subfolder", place.path)]
    more = [f"{key}={json.dumps(value)}" for key, value in told if value]
    return ", ".join([json.dumps(place.repo), *more])


def _quoted(place: Uri) -> str:
    return json.dumps(str(place), ensure_ascii=False)


def _code(lines: Iterable[str], language: str) -> str:
    return "\n".join([f"```{language}", *lines, "```"])


def _listed(values: Iterable[object]) -> str:
    return ", ".join(map(_text, values))


def _span(value: object) -> str:
    """A name as code, so that its stars and lines are no markup."""
    return f"`{_text(value)}`"


def _text(value: object) -> str:
    """A value as text that cannot break out of a table or become markup."""
    return re.sub(r"[^\w .,:+/@=()*-]", " ", str(value))[:200]
