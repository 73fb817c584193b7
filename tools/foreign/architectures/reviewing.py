"""Compares what the tool finds with a committed file, which other tools and reviewers have added to."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from entries import HUB, LIVE, Entries

HOLE = re.compile(r"\{\w\}")
SAVED = "saved"
"""The naming of what `save_pretrained` writes, in files whose `hub` has other names: the publisher's own."""
Weights = Mapping[str, Mapping[str, Any]]

MORE = {
    **dict.fromkeys(
        ("whisper", "marian", "mbart", "pegasus", "blenderbot", "blenderbot-small", "mvp", "plbart", "bart",
         "bigbird_pegasus", "prophetnet"),
        "a union with the class that has the decoder alone, or that has other heads",
    ),
    "rf_detr": "a union with the class of instance segmentation",
}  # fmt: skip
"""Family -> why its file has weights that the tiny model of its main class lacks."""


def differences(made: Entries, committed: Mapping[str, Any]) -> list[str]:
    """What of the tool's finding the committed file does not say alike; empty where it says all of it.

    Only the places in `transformers5` and `hub` are compared: those in other namings are the other tools'. A weight
    that the file has in parts, because another naming stores them apart, is compared by its parts.
    """
    there: Weights = {_unnamed(weight): places for weight, places in committed["weights"].items()}
    found = [
        f"{weight}: {_places(weight, places)}, but the file has {_places(weight, there.get(weight, {}))}"
        for name, places in made.weights.items()
        if ((weight := _unnamed(name)) not in there or _places(weight, there[weight]) != _places(weight, places))
        and not _in_parts(weight, places, there)
    ]
    listed = committed.get("vocabulary", [])
    found += [f"{name} is not in vocabulary" for name in made.vocabulary if name not in listed]
    found += [f"{one} is not tied to {other}" for one, other in made.tied.items() if not committed.get("tied")]
    return found


def additions(made: Entries, committed: Mapping[str, Any]) -> list[str]:
    """Weights of the committed file that the tool did not find."""
    known = {_place(_unnamed(weight), places, LIVE)["name"] for weight, places in made.weights.items()}
    names = {_unnamed(weight) for weight in made.weights}
    return [
        weight
        for weight, places in committed["weights"].items()
        if _unnamed(weight) not in names and _place(_unnamed(weight), places, LIVE).get("name") not in known
    ]


def _unnamed(template: str) -> str:
    """A template with one sign for all holes: GGUF stacks a few lists of layers, which a file counts by `{e}`."""
    return HOLE.sub("#", template)


def _place(weight: str, places: Mapping[str, Any], naming: str) -> dict[str, Any]:
    place = places.get(naming, weight)
    found = {"name": place} if isinstance(place, str) else dict(place)
    return found | {"name": _unnamed(found["name"])}


def _places(weight: str, places: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    return _place(weight, places, LIVE), _place(weight, places, SAVED if SAVED in places else HUB)


def _in_parts(weight: str, places: Mapping[str, Any], there: Weights) -> bool:
    """Whether the file has the weight as parts that are the same runs of rows of its tensors in both namings."""
    live, hub = _places(weight, places)
    parts = [
        held for key, each in there.items() if (held := _places(key, each))[0].get("name") == live["name"]
    ]  # fmt: skip
    alike = all(one.get("part") == two.get("part") and one.get("of") == two.get("of") for one, two in parts)
    return bool(parts) and alike and all(two["name"] == hub["name"] for _, two in parts)
