"""The page of `adapterkit ui`: strangers are kept out, and its jobs write what the command line writes."""

from __future__ import annotations

import http.client
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import axe
import chromium
import numpy as np
import pytest
from command_line import run, save_peft
from safetensors.numpy import load_file, save_file

import adapterkit as ak
from adapterkit.cli import adapterkit
from adapterkit.cli.completion import PATHS
from adapterkit.errors import UsageError
from adapterkit.ui.forms import COMMANDS, Forms
from adapterkit.ui.jobs import Jobs

ROOT = Path(ak.__file__).parent.parent
DATA = Path(ak.__file__).parent / "demo" / "data"


@dataclass
class Served:
    """A page that runs: its address with the token, and the folder that is open."""

    address: str
    folder: Path

    @property
    def port(self) -> int:
        return int(self.address.partition("/open")[0].rpartition(":")[2])

    @property
    def token(self) -> str:
        return self.address.partition("token=")[2]

    def ask(
        self, path: str, body: Any = None, headers: dict[str, str] | None = None, *, method: str | None = None
    ) -> tuple[int, Any, dict[str, str]]:
        own = {"Host": f"127.0.0.1:{self.port}", "Authorization": f"Bearer {self.token}"}
        data = None
        if body is not None:
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            own |= {"Content-Type": "application/json", "Origin": f"http://127.0.0.1:{self.port}"}
        given = {name: value for name, value in (own | (headers or {})).items() if value}
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.putrequest(method or ("GET" if body is None else "POST"), path, skip_host=True)
        for name, value in given.items():
            connection.putheader(name, value)
        if data is not None:
            connection.putheader("Content-Length", str(len(data)))
        connection.endheaders(data)
        answer = connection.getresponse()
        text = answer.read()
        found = dict(answer.getheaders())
        connection.close()
        return answer.status, json.loads(text) if text[:1] in (b"{", b"[") else text.decode(), found

    def job(self, command: str, **values: Any) -> dict[str, Any]:
        """Run a command to its end."""
        status, found, _ = self.ask("/api/jobs", {"command": command, "values": values})
        assert status == 200, found
        return self.ended(found["number"])

    def ended(self, number: int) -> dict[str, Any]:
        until = time.monotonic() + 120
        while time.monotonic() < until:
            _, found, _ = self.ask(f"/api/jobs/{number}")
            if found["state"] not in ("waiting", "running"):
                return dict(found)
            time.sleep(0.1)
        raise AssertionError("the job does not end")


SLOWLY = """
import os, time

copy = os.copy_file_range

def slowly(source, target, count, *places, **named):
    if not os.path.exists("slowly"):
        return copy(source, target, count, *places, **named)
    time.sleep(0.1)
    return copy(source, target, min(count, 1 << 18), *places, **named)

os.copy_file_range = slowly
"""
"""Copy at 2.5 MB/s in jobs while a file `slowly` is in the open folder, so that a merge can be cancelled midway."""


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("open")
    for there, here in (("base", "base"), ("rotated", "lora"), ("negative", "other")):
        shutil.copytree(DATA / there, folder / here)
    (folder.parent / "outside").mkdir(exist_ok=True)
    (folder / "link").symlink_to(folder.parent / "outside")
    site = tmp_path_factory.mktemp("site")
    (site / "sitecustomize.py").write_text(SLOWLY)
    env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{site}", "HOME": str(folder)}
    command = [sys.executable, "-m", "adapterkit", "ui", "--no-browser", "--json", str(folder)]
    process = subprocess.Popen(command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    text = ""
    while not text.rstrip().endswith("}"):
        line = process.stdout.readline()
        assert line, process.communicate()[1]
        text += line
    yield Served(json.loads(text)["address"], folder)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode in (0, 130)


STRANGERS: dict[str, tuple[dict[str, str], Any]] = {
    "without the token": ({"Authorization": ""}, None),
    "with another token": ({"Authorization": "Bearer x"}, None),
    "by another name of the machine": ({"Host": "evil.example"}, None),
    "by another port": ({"Host": "127.0.0.1:1"}, None),
    "from another page": ({"Origin": "http://evil.example"}, None),
    "from a sandbox": ({"Origin": "null"}, None),
    "that the browser calls cross-site": ({"Sec-Fetch-Site": "cross-site"}, None),
    "from a form of another page": ({"Content-Type": "text/plain"}, {"command": "inspect", "values": {}}),
    "without an origin": ({"Origin": ""}, {"command": "inspect", "values": {}}),
    "from another port's page": ({"Origin": "http://127.0.0.1:1"}, {"command": "inspect", "values": {}}),
}


@pytest.mark.parametrize("case", STRANGERS)
def test_strangers_are_refused(served: Served, case: str) -> None:
    headers, body = STRANGERS[case]
    for path in ("/", "/api/start", "/api/jobs") if body is None else ("/api/jobs",):
        status, told, _ = served.ask(path, body, headers)
        assert (status, isinstance(told, str)) == (403, True), path
        assert served.token not in told


def test_the_key_opens_the_page_and_every_answer_is_guarded(served: Served) -> None:
    status, _, headers = served.ask(f"/open?token={served.token}", headers={"Authorization": ""})
    assert status == 303
    cookie = headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=strict" in cookie
    status, page, headers = served.ask("/", headers={"Authorization": "", "Cookie": cookie.partition(";")[0]})
    assert (status, "<title>adapterkit</title>" in page) == (200, True)
    assert "default-src 'none'" in headers["content-security-policy"]
    assert headers["cache-control"] == "no-store"
    assert served.ask("/open?token=no", headers={"Authorization": ""})[0] == 403
    assert served.ask("/", headers={"Authorization": "", "Cookie": "adapterkit-1=x; other"})[0] == 403
    for method in ("PUT", "DELETE", "TRACE", "OPTIONS"):
        assert served.ask("/api/jobs", {}, method=method)[0] in (403, 405)


def test_only_this_machine_is_listened_to(served: Served) -> None:
    listening = Path("/proc/net/tcp").read_text()
    assert f"0100007F:{served.port:04X}" in listening
    assert f"00000000:{served.port:04X}" not in listening


def test_more_than_it_can_hold_is_refused(served: Served) -> None:
    assert served.ask("/api/jobs", b" " * (65 * 1024))[0] == 413
    assert served.ask("/api/jobs", b"[" * 60_000)[0] == 400
    assert served.ask("/api/jobs", [1])[0] == 400
    status, told, _ = served.ask("/api/sums", {"adapters": ["lora"] * 9})
    assert (status, "2 to 8" in told["error"]["cure"]) == (400, True)


OUTSIDE = {
    "above": ("inspect", {"src": "../outside"}),
    "by a link": ("inspect", {"src": "link"}),
    "absolute": ("inspect", {"src": "/etc/passwd"}),
    "of another user": ("inspect", {"src": "~root"}),
    "an output": ("convert", {"src": "lora", "dst": "/tmp/x", "target_format": "peft"}),
    "an output through a link": ("convert", {"src": "lora", "dst": "link/x", "target_format": "peft"}),
    "the folder itself": ("merge", {"base": "base", "adapters": ["lora"], "out": "."}),
    "a hub": ("inspect", {"src": "hf://org/lora"}),
    "by an address of this machine": ("inspect", {"src": "file:///etc/passwd"}),
    "rules of a file": ("names", {"base": "base", "adapter": "lora", "rename": ["@/etc/passwd"]}),
    "a tokenizer": ("merge", {"base": "base", "adapters": ["lora"], "out": "m", "tokenizer": "/etc"}),
    "pictures": ("report", {"adapters": ["lora"], "figures": "/tmp/pictures"}),
}


@pytest.mark.parametrize("case", OUTSIDE)
def test_what_is_outside_is_neither_read_nor_written(served: Served, case: str) -> None:
    command, values = OUTSIDE[case]
    before = served.ask("/api/jobs")[1]["jobs"]
    status, told, _ = served.ask("/api/jobs", {"command": command, "values": values})
    assert status == 400, told
    assert told["error"]["cure"]
    assert len(served.ask("/api/jobs")[1]["jobs"]) == len(before)


@pytest.mark.parametrize(
    ("command", "values"),
    [
        ("doctor", {}), ("pull", {"uri": "x"}), ("ui", {}), ("conformance", {}), ("merge", {"engine": "ray"}),
        ("merge", {"address": "x"}), ("combine", {"recipe": "r.yml"}), ("inspect", {"src": ["a", "b"]}),
        ("inspect", {"src": {"a": 1}}), ("inspect", {"src": "x" * 5000}), ("inspect", {"src": "a\0b"}),
        ("merge", {"weights": [1] * 65}), ("inspect", {"every": "yes"}), ("inspect", []),
    ],
)  # fmt: skip
def test_forms_take_what_they_show_and_nothing_else(served: Served, command: str, values: Any) -> None:
    status, told, _ = served.ask("/api/jobs", {"command": command, "values": values})
    assert status == 400, told


def test_hubs_are_read_but_not_written_if_asked_for(tmp_path: Path) -> None:
    forms = Forms(adapterkit, PATHS, [tmp_path], hubs=True)
    given = {"base": "hf://org/model@main", "adapters": ["oci://127.0.0.1:5000/lora:1"], "out": "merged"}
    words = forms.words("merge", given)
    assert words[-2:] == ["hf://org/model@main", "oci://127.0.0.1:5000/lora:1"]
    for wrong in ({"out": "hf://org/merged"}, {"base": "/etc"}, {"base": "file:///etc"}, {"base": "nohub://x/y"}):
        with pytest.raises(UsageError):
            forms.words("merge", {**given, **wrong})
    with pytest.raises(UsageError, match="does not open addresses"):
        Forms(adapterkit, PATHS, [tmp_path]).words("merge", {**given, "adapters": ["lora"]})


def test_words_that_look_like_options_are_values(tmp_path: Path) -> None:
    forms = Forms(adapterkit, PATHS, [tmp_path])
    (tmp_path / "--help").mkdir()
    words = forms.words("combine", {"adapters": ["--help"], "method": "--out=/x", "out": "o", "weights": [-1.5]})
    assert words[-2:] == ["--", str(tmp_path / "--help")]
    assert "--method=--out=/x" in words
    assert "--weight=-1.5" in words
    with pytest.raises(UsageError, match="no field"):
        forms.words("combine", {"json": True})
    assert set(forms.commands) == set(COMMANDS)
    merge = {field.name: field for field in forms.fields["merge"]}
    assert merge["check"].default == "True"
    assert "--no-check" in forms.words("merge", {"check": False})
    assert "--plan" in forms.words("merge", {"only_plan": True})


def test_listing_shows_what_entries_are_and_hides_dotfiles(served: Served) -> None:
    (served.folder / ".secret").write_text("x")
    _, found, _ = served.ask(f"/api/files?path={served.folder}")
    kinds = {entry["name"]: entry["kind"] for entry in found["entries"]}
    assert {"lora": "adapter", "base": "base"}.items() <= kinds.items()
    assert ".secret" not in kinds
    assert found["parent"] == ""
    assert served.ask("/api/files?path=")[1]["entries"][0]["path"] == str(served.folder)
    assert served.ask("/api/files?path=/etc")[0] == 400


JOBS: dict[str, dict[str, Any]] = {
    "convert": {"src": "lora", "dst": "{out}.safetensors", "target_format": "adapterkit"},
    "combine": {
        "adapters": ["lora", "other"], "method": "ties", "base": "base", "rank": 8, "weights": [0.7, 0.3],
        "out": "{out}",
    },
    "resize": {"src": "lora", "rank": 2, "out": "{out}"},
    "merge": {"base": "base", "adapters": ["lora"], "out": "{out}", "verified": True},
    "extract": {"tuned": "base", "base": "base", "rank": 2, "out": "{out}"},
}  # fmt: skip


def bytes_of(path: Path) -> dict[str, bytes]:
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    return {str(file.relative_to(path.parent)).replace(path.name, "", 1): file.read_bytes() for file in files}


@pytest.mark.parametrize("command", JOBS)
def test_a_job_writes_the_bytes_that_its_command_writes(served: Served, command: str) -> None:
    values = json.loads(json.dumps(JOBS[command]).replace("{out}", f"page-{command}"))
    if command == "extract":
        merged = run("merge", served.folder / "base", served.folder / "lora", "-o", served.folder / "tuned")
        assert merged.exit_code == 0, merged.output
        values["tuned"] = "tuned"
    job = served.job(command, **values)
    assert (job["state"], job["code"]) == ("done", 0), job
    written = served.folder / values.get("out", values.get("dst"))
    before = bytes_of(written)
    assert before
    words = shlex.split(job["command"])
    assert words[0] == "adapterkit"
    shutil.rmtree(written) if written.is_dir() else written.unlink()
    done = run(*words[1:])
    assert done.exit_code == 0, done.output
    assert bytes_of(written) == before
    # The same job again finds its work done.
    status, again, _ = served.ask(f"/api/jobs/{job['number']}/again", {})
    assert (status, served.ended(again["number"])["out"].startswith("already done")) == (200, True)


def test_inspect_shows_what_the_terminal_shows(served: Served) -> None:
    job = served.job("inspect", src="lora", layers=True)
    assert job["out"] == run("inspect", "--layers", "--", served.folder / "lora").stdout


def test_a_job_that_fails_says_so(served: Served) -> None:
    job = served.job("merge", base="lora", adapters=["base"], out="none")
    assert (job["state"], job["code"]) == ("failed", 2)
    assert "BASE comes first" in "\n".join(job["said"])


def test_the_report_is_in_a_sandbox(served: Served) -> None:
    job = served.job("report", adapters=["lora", "other"], base="base")
    assert job["page"] is True
    status, page, headers = served.ask(f"/api/jobs/{job['number']}/report")
    assert (status, "<h1" in page) == (200, True)
    assert "sandbox allow-scripts" in headers["content-security-policy"]
    assert served.ask("/api/jobs/99999/report")[0] == 404
    assert served.ask("/api/jobs/99999")[0] == 400


def test_sums_are_those_of_dense_matrices(served: Served) -> None:
    _, found, _ = served.ask("/api/sums", {"adapters": ["lora", "other"], "base": "base"})
    base = served.folder / "base"
    read = [ak.read(served.folder / name, base=base) for name in ("lora", "other")]
    assert found["adapters"] == ["lora", "other"]
    for each in found["targets"]:
        deltas = []
        for adapter in read:
            held = any(target.path == each["target"] for target in adapter.updates)
            deltas.append(np.asarray(adapter.delta(each["target"], base=base), "f8") if held else None)
        for i, one in enumerate(deltas):
            for j, two in enumerate(deltas):
                expected = 0.0 if one is None or two is None else float((one * two).sum())
                assert each["products"][i][j] == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_a_job_is_cancelled_and_another_takes_its_place(tmp_path: Path) -> None:
    """Jobs end as by Ctrl-C; those that wait never start; too many are refused."""
    jobs = Jobs(tmp_path, tmp_path)
    # A shell that starts a program in the background lets it ignore Ctrl-C, and all that it starts.
    heed = "signal.signal(signal.SIGINT, signal.default_int_handler); signal.pthread_sigmask(signal.SIG_SETMASK, [])"
    said = "print('merge: 40%, x', file=sys.stderr, flush=True); time.sleep(60)"
    slow = f"import signal, sys, time; {heed}; {said}"
    real = subprocess.Popen

    def sleeping(_: list[str], **options: Any) -> Any:
        return real([sys.executable, "-c", slow], **options)

    patch = pytest.MonkeyPatch()
    patch.setattr("adapterkit.ui.jobs.subprocess.Popen", sleeping)
    try:
        first, second = jobs.start(["merge"]), jobs.start(["merge"])
        waiting = [jobs.start(["merge"]) for _ in range(8)]
        with pytest.raises(UsageError, match="are already waiting"):
            jobs.start(["merge"])
        until = time.monotonic() + 120
        while first.part is None and time.monotonic() < until:
            time.sleep(0.02)
        assert first.record()["part"] == 40
        assert [job.state for job in waiting] == ["waiting"] * 8
        jobs.end(waiting[0].number)
        assert waiting[0].state == "ended"
        jobs.end(first.number)
        while waiting[1].state == "waiting" and time.monotonic() < until:
            time.sleep(0.02)
        assert first.state == "ended"
        assert (second.state, waiting[1].state) == ("running", "running")
    finally:
        jobs.close()
        patch.undo()
    assert all(job.state == "ended" or job.asked_to_end for job in jobs.jobs.values())
    with pytest.raises(UsageError, match="the page is closing"):
        jobs.start(["merge"])


def test_without_its_packages_the_page_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("uvicorn", "starlette.applications"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, name, None)
            done = run("ui", tmp_path, "--no-browser")
            assert done.exit_code == 3
            assert "pip install 'adapterkit[ui]'" in done.stderr
    assert run("ui", tmp_path / "none", "--no-browser").exit_code == 2


@pytest.fixture(scope="module")
def page(served: Served, tmp_path_factory: pytest.TempPathFactory) -> Iterator[chromium.Page]:
    with chromium.page(tmp_path_factory.mktemp("browser")) as page:
        page.open(served.address)
        page.wait("document.querySelectorAll('#commands button').length > 5")
        yield page


def fill(page: chromium.Page, command: str, **values: Any) -> None:
    click = f"[...document.querySelectorAll('#commands button')].find((b) => b.textContent === '{command}').click()"
    page.evaluate(click)
    for name, value in values.items():
        for at, each in enumerate(value if isinstance(value, list) else [value]):
            node = f"document.querySelectorAll('#form [name={name}]')[{at}]"
            if isinstance(each, bool):
                page.evaluate(f"{node}.checked = {json.dumps(each)}")
                continue
            if at:
                page.evaluate(f"{node} ?? document.querySelector('#form [name={name}]').closest('.field')"
                              ".querySelector('.help button').click()")  # fmt: skip
            page.evaluate(f"{node}.value = {json.dumps(str(each))}; {node}.dispatchEvent(new Event('input'))")


def press(page: chromium.Page, text: str) -> None:
    page.evaluate(f"[...document.querySelectorAll('button')].find((b) => b.textContent === {json.dumps(text)}).click()")


STATE = "document.getElementById('job-state').textContent"


def test_jobs_are_run_from_the_page(page: chromium.Page, served: Served) -> None:
    fill(page, "merge", base="base", adapters=["lora", "other"], weights=[0.5, 0.25], out="in-the-page")
    press(page, "Plan")
    page.wait(f"{STATE}.startsWith('done')")
    assert "to write" in page.evaluate("document.getElementById('job-out').textContent")
    assert not (served.folder / "in-the-page").exists()
    press(page, "Run merge")
    page.wait("document.getElementById('job-out').textContent.includes('merged')")
    words = shlex.split(page.evaluate("document.getElementById('job-command').textContent"))
    written = served.folder / "in-the-page"
    before = bytes_of(written)
    shutil.rmtree(written)
    assert run(*words[1:]).exit_code == 0
    assert bytes_of(written) == before
    press(page, "See what a sum keeps")
    page.wait("document.querySelectorAll('#bars .bar').length > 5")
    told = page.evaluate("document.getElementById('conflicts-told').textContent")
    page.evaluate("const s = document.querySelectorAll('#weights input')[0]; s.value = '-1'; "
                  "s.dispatchEvent(new Event('input'))")  # fmt: skip
    assert page.evaluate("document.getElementById('conflicts-told').textContent") != told
    assert page.evaluate("document.querySelectorAll('#form [name=weights]')[0].value") == "-1"
    fill(page, "report", adapters=["lora"], base="base")
    press(page, "Run report")
    page.wait("document.querySelector('#job-report iframe') !== null")
    fill(page, "inspect", src="../outside")
    press(page, "Run inspect")
    page.wait("document.getElementById('form-error').textContent.includes('outside')")


def test_a_merge_is_cancelled_in_the_page_and_goes_on(page: chromium.Page, served: Served) -> None:
    """What was done stays on disk; the same job again ends with the bytes of a merge that nobody disturbed."""
    large = served.folder / "large"
    large.mkdir()
    rng = np.random.default_rng(0)
    idle = {f"layers.{i}.idle": rng.normal(size=(256, 1024)).astype("f4") for i in range(16)}
    weights = {f"layers.{i}.q.weight": np.zeros((8, 4), np.float32) for i in range(16)}
    save_file({**idle, **weights}, large / "model.safetensors", {"format": "pt"})
    save_peft(served.folder / "small")
    (served.folder / "slowly").touch()
    page.open(served.address)  # The form remembers what the test before filled in.
    page.wait("document.querySelectorAll('#commands button').length > 5")
    fill(page, "merge", base="large", adapters="small", out="disturbed")
    press(page, "Run merge")
    page.wait("document.getElementById('job-part').value > 0.1 && !document.getElementById('end').hidden")
    assert not (served.folder / "disturbed").exists()
    page.evaluate("document.getElementById('end').click()")
    page.wait(f"{STATE}.startsWith('cancelled')")
    assert (served.folder / ".disturbed.merging").is_dir()
    assert "resume where they stopped" in page.evaluate("document.getElementById('job-said').textContent")
    (served.folder / "slowly").unlink()
    page.evaluate("document.getElementById('again').click()")
    page.wait(f"{STATE}.startsWith('done')")
    words = shlex.split(page.evaluate("document.getElementById('job-command').textContent"))
    found = bytes_of(served.folder / "disturbed")
    shutil.rmtree(served.folder / "disturbed")
    assert run(*words[1:]).exit_code == 0
    assert bytes_of(served.folder / "disturbed") == found
    assert load_file(served.folder / "disturbed" / "model.safetensors")["layers.3.idle"].tobytes() == (
        idle["layers.3.idle"].tobytes()
    )  # fmt: skip


def test_a_path_is_chosen_with_the_keyboard(page: chromium.Page, served: Served) -> None:
    fill(page, "inspect")
    page.evaluate("document.querySelector('#form .value button').focus(); document.activeElement.click()")
    page.wait("document.querySelectorAll('#chooser-list button').length > 2")
    page.evaluate("[...document.querySelectorAll('#chooser-list button')].find((b) => b.textContent.startsWith('lora'))"
                  ".click()")  # fmt: skip
    page.wait("document.getElementById('chooser-path').textContent.endsWith('lora')")
    press(page, "Take this folder")
    assert page.evaluate("document.querySelector('#form [name=src]').value") == str(served.folder / "lora")
    assert page.evaluate("document.activeElement.name") == "src"


def test_nothing_leaves_the_machine_and_nothing_is_wrong(page: chromium.Page, served: Served) -> None:
    assert page.told("Runtime.exceptionThrown") == []
    errors = [event["entry"]["text"] for event in page.told("Log.entryAdded") if event["entry"]["level"] == "error"]
    assert all("400" in text for text in errors), errors  # The refused path, which the page shows.
    asked = {event["request"]["url"].partition("?")[0] for event in page.told("Network.requestWillBeSent")}
    assert all(url.startswith((f"http://127.0.0.1:{served.port}/", "data:", "about:")) for url in asked), asked


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_and_is_usable_by_everyone(page: chromium.Page, width: int, scheme: str) -> None:
    page.send("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
    page.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    fill(page, "merge")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert axe.faults(page) == []
