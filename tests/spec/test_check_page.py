"""docs/check.html in a browser: files are dropped, checked by the reader in JavaScript, and never leave the machine."""

from __future__ import annotations

import json
import socket
import struct
import subprocess
import sys
from pathlib import Path

import chromium
import pytest

import adapterkit as ak

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "check.html").as_uri()
VECTORS = ROOT / "spec" / "vectors"
PICTURE = "{ onload: () => done('sent'), onerror: () => done('refused') }"
TEXT = "document.querySelector('#results').innerText"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    with chromium.page(tmp_path_factory.mktemp("browser")) as page:
        yield page


@pytest.fixture(autouse=True)
def opened(page):
    page.events.clear()
    page.send("Emulation.clearDeviceMetricsOverride")
    page.open(PAGE)


def drop(page, *files):
    """Drops files as a hand does, and waits for what the page says of them."""
    x, y = page.evaluate("(({x, y}) => [x + 20, y + 20])(document.querySelector('#drop').getBoundingClientRect())")
    data = {"items": [], "files": [str(file) for file in files], "dragOperationsMask": 1}
    for kind in ("dragEnter", "dragOver", "drop"):
        page.send("Input.dispatchDragEvent", type=kind, x=x, y=y, data=data)
    page.wait(f"document.querySelectorAll('article').length === {len(files)}")


def test_the_page_is_built_from_the_reader():
    subprocess.run([sys.executable, ROOT / "tools" / "page", "--check"], check=True)


def test_a_valid_file(page):
    file = VECTORS / "methods" / "lora.adapter.safetensors"
    drop(page, file)
    shown = page.evaluate(TEXT)
    adapter = ak.read(file)
    assert "Valid" in shown.splitlines()
    assert adapter.digest() in shown
    assert f"{len(adapter)} updates" in shown
    assert page.evaluate("document.querySelector('[role=status]').textContent") == f"{file.name} is valid."
    assert page.told("Log.entryAdded") == []


def test_invalid_files_show_class_and_place(page):
    names = ["rows_float", "nan_bf16", "method_unknown", "factors_disagree"]
    drop(page, *(VECTORS / "invalid" / f"{name}.safetensors" for name in names))
    shown = page.evaluate(TEXT)
    for name in names:
        said = json.loads((VECTORS / "invalid" / f"{name}.json").read_text("utf-8"))
        assert f"Not valid: {said['error']}" in shown
        assert said["where"] in shown


def test_hostile_files_do_not_freeze_the_page(page, tmp_path):
    claims = tmp_path / "claims.safetensors"
    claims.write_bytes(struct.pack("<Q", 1 << 63) + b"{}")
    header = b"[" + b"{}," * 3_000_000 + b"{}]"
    huge = tmp_path / "huge.safetensors"
    huge.write_bytes(struct.pack("<Q", len(header)) + header)
    deep = tmp_path / "deep.safetensors"
    deep.write_bytes(struct.pack("<Q", 2_000_000) + b"[" * 2_000_000)
    markup = tmp_path / "<img src=x onerror=document.title='caught'>.safetensors"
    markup.write_bytes(b"")
    drop(page, claims, huge, deep, markup)
    shown = page.evaluate(TEXT)
    assert shown.count("Not valid: Malformed") == 4
    assert shown.count("header length") >= 2
    assert "too deeply, or too much" in shown
    assert page.evaluate("document.title") == "Check an adapter file"
    assert page.evaluate("document.querySelectorAll('img').length") == 0


def test_nothing_leaves_the_machine(page):
    """The policy refuses every connection, and the page makes none."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0)
        address = f"http://127.0.0.1:{server.getsockname()[1]}/"
        drop(page, VECTORS / "methods" / "ia3.adapter.safetensors")
        tries = [
            f"fetch('{address}').then(() => 'sent', () => 'refused')",
            f"new Promise((done) => Object.assign(new Image(), {PICTURE}, {{ src: '{address}x.png' }}))",
            f"navigator.sendBeacon('{address}', 'x') && 'refused'",
        ]
        assert [page.evaluate(each) for each in tries] == ["refused"] * 3
        with pytest.raises(BlockingIOError):
            server.accept()
    addresses = {event["request"]["url"] for event in page.told("Network.requestWillBeSent")}
    assert {url for url in addresses if not url.startswith((PAGE, "blob:", address))} == set()


def test_the_keyboard_and_a_screen_reader_can_use_it(page):
    page.send("Page.setInterceptFileChooserDialog", enabled=True)
    for _ in range(2):  # the link of the text, then the files
        press(page, "Tab")
    assert page.evaluate("document.activeElement.id") == "files"
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    press(page, "Enter")
    page.wait("true")
    assert page.told("Page.fileChooserOpened") != []
    page.send("Page.setInterceptFileChooserDialog", enabled=False)
    drop(page, VECTORS / "methods" / "lora.adapter.safetensors")
    page.send("Accessibility.enable")
    nodes = page.send("Accessibility.getFullAXTree")["nodes"]
    seen = {(node["role"]["value"], node.get("name", {}).get("value", "")) for node in nodes if not node["ignored"]}
    roles = {role for role, _ in seen}
    assert {"main", "status", "table", "columnheader", "heading", "region"} <= roles
    assert ("heading", "lora.adapter.safetensors") in seen
    assert any(role == "button" and "Drop files here, or choose them" in name for role, name in seen)
    assert page.evaluate("document.documentElement.lang") == "en"


def press(page, key):
    codes = {"Tab": 9, "Enter": 13}
    text = {"text": "\r"} if key == "Enter" else {}
    page.send("Input.dispatchKeyEvent", type="keyDown", key=key, code=key, windowsVirtualKeyCode=codes[key], **text)
    page.send("Input.dispatchKeyEvent", type="keyUp", key=key, code=key, windowsVirtualKeyCode=codes[key])


CONTRAST = """(() => {
  const light = (text) => {
    const linear = (c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    const [r, g, b] = text.match(/[\\d.]+/g).map((n) => linear(n / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = (e) => {
    const colour = getComputedStyle(e).backgroundColor;
    return colour === "rgba(0, 0, 0, 0)" ? ground(e.parentElement) : colour;
  };
  const own = (e) => [...e.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
  return [...document.querySelectorAll("main *")].filter(own).map((e) => {
    const [a, b] = [light(getComputedStyle(e).color), light(ground(e))].sort((x, y) => y - x);
    return [e.tagName, (a + 0.05) / (b + 0.05)];
  });
})()"""


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_and_can_be_read(page, width, scheme):
    page.send("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
    page.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    drop(page, VECTORS / "methods" / "lora.adapter.safetensors", VECTORS / "invalid" / "rows_float.safetensors")
    assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    found = page.evaluate(CONTRAST)
    assert len(found) > 20
    assert min(ratio for _, ratio in found) >= 4.5
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(13, 17, 23)"
    assert dark == (scheme == "dark")
