"""Run axe-core in the headless browser: it finds faults of a page for people who use a keyboard or a screen reader."""

from __future__ import annotations

import json
import os
from pathlib import Path

import chromium
import pytest

FOLDER = Path(__file__).resolve().parents[2] / ".servers"
SERIOUS = ("serious", "critical")


def faults(page: chromium.Page) -> list[str]:
    """Return the serious faults of a page, each with its rule and its elements.

    axe-core is not part of this repository; tools/servers downloads a pinned version.
    """
    found = sorted(FOLDER.glob("axe-*.min.js"))
    if not found:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("no axe-core here; tools/servers fetches it")
    page.evaluate(found[-1].read_text("utf-8") + "; 0")
    page.evaluate("window.axeFound = null; axe.run().then((result) => { window.axeFound = JSON.stringify("
                  "result.violations.map((each) => ({id: each.id, impact: each.impact, "
                  "nodes: each.nodes.slice(0, 5).map((node) => node.target.join(' '))}))); }); 0")  # fmt: skip
    page.wait("window.axeFound !== null")
    violations = json.loads(page.evaluate("window.axeFound"))
    assert page.evaluate("document.querySelectorAll('*').length") > 20, "the page is there"
    return [f"{each['id']}: {each['nodes']}" for each in violations if each["impact"] in SERIOUS]
