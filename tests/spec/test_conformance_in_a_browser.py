"""The reader in JavaScript in headless Chromium, against all vectors: what node computes, a browser computes."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import chromium
import pytest

from adapterkit.conformance import conformance

SPEC = Path(__file__).parents[2] / "spec"
READER = SPEC / "readers" / "javascript"
MODULES = ("adapterkit.mjs", "formulas.mjs", "merge.mjs", "run.mjs")
LIBRARY = {"methods/psoft", "methods/psoft.2"}  # a path of theirs depends on a library

# A page of a file cannot import files beside it: the modules are given as text, and name each other by blobs.
LOAD = """(async (sources, methods) => {
  const urls = {};
  for (const [name, text] of Object.entries(sources)) {
    const linked = text.replace(/"\\.\\/(\\w+\\.mjs)"/g, (_, other) => JSON.stringify(urls[other]));
    urls[name] = URL.createObjectURL(new Blob([linked], { type: "text/javascript" }));
  }
  window.run = await import(urls["run.mjs"]);
  window.bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  window.asked = {
    check: (file) => run.check(bytes(file), methods),
    canonical: (file) => run.canonicals(bytes(file)),
    rules: (file) => run.rules(bytes(file)),
    base: (files) => typeof files === "string" ? run.baseFile(bytes(files))
      : run.base(Object.keys(files), (name) => bytes(files[name])),
    compute: (adapter, base) => run.computed(bytes(adapter), () => bytes(base), methods),
    merge: (adapter, base) => run.merged(bytes(adapter), () => bytes(base), methods),
  };
  return Object.keys(asked).length;
})"""
ASK = """(async (verb, given) => {
  try {
    return JSON.stringify(await asked[verb](...given));
  } catch (error) {
    return JSON.stringify(run.told(error));
  }
})"""


def encoded(path):
    """A file's bytes as text, or those of a folder's files by name."""
    if path.is_dir():
        return {file.relative_to(path).as_posix(): encoded(file) for file in path.rglob("*") if file.is_file()}
    return base64.b64encode(path.read_bytes()).decode()


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("browser")
    (folder / "page.html").write_text("<!doctype html><title>Vectors</title>")
    sources = {name: (READER / name).read_text("utf-8") for name in MODULES}
    methods = (SPEC / "1.1" / "methods.json").read_text("utf-8")
    with chromium.page(folder / "profile") as page:
        page.open((folder / "page.html").as_uri())
        assert page.evaluate(f"{LOAD}({json.dumps(sources)}, {methods})") == 6

        def ask(verb, paths):
            groups = [paths] if verb in ("compute", "merge") else [[path] for path in paths]
            return [
                json.loads(page.evaluate(f"{ASK}({json.dumps(verb)}, {json.dumps([encoded(p) for p in group])})"))
                for group in groups
                if group
            ]

        return conformance(ask)


def test_no_vector_fails_in_a_browser(outcomes):
    assert [(each.case, each.why) for each in outcomes if each.passed is False] == []
    assert sum(each.passed is True for each in outcomes) > 660


def test_a_browser_computes_all_methods_but_those_of_libraries(outcomes):
    assert {each.case for each in outcomes if each.passed is None} == LIBRARY
