"""The fuzzer sees what it looks for: each misdeed below is done by a planted function, and must be found."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("resource")

ROOT = Path(__file__).parent.parent.parent
TOOL = ROOT / "tools" / "fuzz"

MISDEEDS = {
    "runs a program": ("__import__('os').system('true')", "forbidden"),
    "starts a process": ("__import__('subprocess').run(['true'])", "forbidden"),
    "runs text": ("exec(compile('x = 1', '/tmp/x.py', 'exec'))", "forbidden"),
    "opens a connection": ("__import__('socket').create_connection(('127.0.0.1', 9))", "forbidden"),
    "asks for a name": ("__import__('socket').getaddrinfo('localhost', 80)", "forbidden"),
    "unpickles": ("__import__('pickle').loads(b'cos\\ngetcwd\\n.')", "forbidden"),
    "imports a stranger": ("__import__('no_such_module_anywhere')", "forbidden"),
    "writes elsewhere": ("open('/tmp/adapterkit-elsewhere', 'w')", "forbidden"),
    "makes a folder elsewhere": ("__import__('os').mkdir('/tmp/adapterkit-elsewhere')", "forbidden"),
    "removes elsewhere": ("__import__('os').remove('/tmp/adapterkit-elsewhere')", "forbidden"),
    "reads elsewhere": ("open('/root/.bashrc')", "forbidden"),
    "climbs out": ("open('../../../../../../../etc/hostname')", "forbidden"),
    "hides it": ("hidden(lambda: __import__('os').system('true'))", "forbidden"),
    "never ends": ("forever()", "hang"),
    "takes 3 GB": ("bytearray(3 << 30)", "memory"),
    "takes 1.2 GB": ("bytearray(1200 << 20)", "memory"),
    "raises a KeyError": ("{}['x']", "untyped"),
    "asserts": ("assertion()", "untyped"),
    "names no file": ("typed('no')", "pathless"),
    "repeats a file": ("long()", "long"),
    "leaves half an output": ("half(out)", "leftover"),
    "changes its input": ("(folder / 'in' / 'a').write_bytes(b'other')", "leftover"),
    "does nothing wrong": ("None", None),
    "refuses": ("typed('no', path='x')", None),
    "imports a module of its own": ("__import__('adapterkit.formats.kohya')", None),
    "writes its output": ("(out / 'x').write_bytes(b'x')", None),
}

PLANTED = """
import json, sys
from pathlib import Path
from random import Random
sys.path[:0] = {paths!r}
import exercise
from cases import Case
from adapterkit.errors import Malformed
from sandbox import Sandbox

folder = Path(sys.argv[1]).resolve()
out = folder / "out"

def hidden(act):
    try:
        act()
    except BaseException:
        pass

def forever():
    while True:
        pass

def assertion():
    assert not folder

def typed(why, **more):
    raise Malformed(why, **more)

class Long(Malformed):
    def __str__(self):
        return "x" * 9999

def long():
    raise Long("no", path="x")

def half(out):
    (out / "half").write_bytes(b"x")
    typed("no", path="x")

sandbox = Sandbox(folder, 4)
sandbox.enter()
misdeeds = {{name: eval(f"lambda: {{act}}") for name, act in json.loads(sys.argv[2]).items()}}
run = exercise.Exercise(sandbox, folder)
found = {{}}
for name, act in misdeeds.items():
    exercise._steps = lambda *_: iter([("open", act)])
    case = Case("x", "adapter", {{"a": b"x"}})
    findings = run.run(case, Random(0))
    found[name] = sorted({{finding.kind for finding in findings}})
    print(name, findings, file=sys.stderr)
print(json.dumps(found))
"""


def test_each_misdeed_is_found_and_nothing_else(tmp_path):
    script = PLANTED.format(paths=[str(TOOL), str(ROOT)])
    acts = json.dumps({name: act for name, (act, _) in MISDEEDS.items()})
    command = [sys.executable, "-c", script, str(tmp_path), acts]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert found == {name: [kind] if kind else [] for name, (_, kind) in MISDEEDS.items()}, result.stderr
    assert not Path("/tmp/adapterkit-elsewhere").exists()
