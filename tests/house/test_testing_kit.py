"""The kit for plug-ins, tried on what is built in, on a plug-in package, and on faults that it must find."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hub_repository import hub  # noqa: F401 - a fixture
from safetensors.torch import load_file

from adapterkit.testing import CombinerTests, FormatTests, HubTests, MethodTests, SchemeTests

PLUGIN = Path(__file__).parents[1] / "plugin"
QUANTIZED = Path(__file__).parents[2] / "spec" / "vectors" / "quant"


class TestNative(FormatTests):
    format = "adapterkit"


class TestPeft(FormatTests):
    format = "peft"


class TestMlx(FormatTests):
    format = "mlx"


class TestGguf(FormatTests):
    format = "gguf"
    needs_base = True


class TestKohya(FormatTests):
    format = "kohya"
    targets = {  # noqa: RUF012
        f"unet.down_blocks.1.attentions.0.transformer_blocks.0.attn{n}.to_{x}": (16, 16) for n in (1, 2) for x in "qkv"
    }
    file = "a.safetensors"

    def base(self, folder):
        (super().base(folder) / "config.json").unlink()  # It is no llama.
        return folder


class TestLora(MethodTests):
    method = "lora"

    def change(self, W):
        update = self.update()
        return update.scaling * update.B.double().numpy() @ update.A.double().numpy()


class TestHira(MethodTests):
    method = "hira"

    def change(self, W):
        update = self.update()
        return W * (update.B.double().numpy() @ update.A.double().numpy())


class TestIa3(MethodTests):
    method = "ia3"


class TestTies(CombinerTests):
    combiner = "ties"
    parameters = {"density": 0.5}  # noqa: RUF012


class TestLinear(CombinerTests):
    combiner = "linear"

    def combined(self, changes, weights):
        return sum(weight * change for weight, change in zip(weights, changes, strict=True))


class TestNf4(SchemeTests):
    scheme = "bnb_4bit"
    vector = "nf4_nested_bfloat16"

    def base(self, folder):
        case = QUANTIZED / self.scheme / self.vector
        for file in case.iterdir():
            if file.name != "expected.safetensors":
                shutil.copy(file, folder)
        return {name: tensor.float().numpy() for name, tensor in load_file(case / "expected.safetensors").items()}


class TestFp8(TestNf4):
    scheme = "fp8"
    vector = "block"


@pytest.mark.usefixtures("hub")
@pytest.mark.filterwarnings("ignore:Use 'content:DeprecationWarning")  # Of huggingface_hub's uploads.
class TestHf(HubTests):
    scheme = "hf"

    def address(self, name):
        return f"hf://org/{name}"


QUIET = ["-q", "-p", "no:cacheprovider", "-W", "ignore"]


def run(package):
    """Run the tests of a package that is installed beside adapterkit, as its authors would."""
    path = os.pathsep.join([str(package), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run(
        [sys.executable, "-m", "pytest", *QUIET, str(package)], capture_output=True, text=True, check=False,
        cwd=package, env={**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"},
    )  # fmt: skip


SERVER = """
import json, os, sys, tempfile
import hypothesis, pytest, torch
import adapterkit.testing

for line in sys.stdin:
    package, words = json.loads(line)
    with tempfile.TemporaryFile("w+") as said:
        child = os.fork()
        if child == 0:
            os.dup2(said.fileno(), 1)
            os.dup2(said.fileno(), 2)
            os.chdir(package)
            sys.path.insert(0, package)
            code = int(pytest.main([*words, package]))
            sys.stdout.flush()
            os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        said.seek(0)
        print(json.dumps([code, said.read()]), flush=True)
"""


@pytest.fixture(scope="module")
def forked():
    """Runs tests of a package in forks of one process: to import torch takes longer than the tests."""
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
    )  # fmt: skip

    def run(package, *words):
        server.stdin.write(json.dumps([str(package), [*QUIET, *words]]) + "\n")
        server.stdin.flush()
        return json.loads(server.stdout.readline())

    yield run
    server.communicate()


@pytest.fixture
def package(tmp_path):
    """A copy of the plug-in package, installed: its modules, its entry points and its tests."""
    shutil.copytree(PLUGIN, tmp_path / "plugin")
    return tmp_path / "plugin"


def test_the_example_package_passes(package):
    result = run(package)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "failed" not in result.stdout


def test_the_example_package_passes_in_a_fork_too(package, forked):
    """Else faults below would be found in any package."""
    code, said = forked(package)
    assert code == 0, said


FAULTS = {
    "a writer that loses the scaling": ("acme.py", '"scaling": update.scaling', '"scaling": 1.0', "acme"),
    "a reader that loses the scaling": ("acme.py", 'scaling=entry["scaling"]', "scaling=1.0", "acme"),
    "a reader that swaps two targets": ("acme.py", "Target(path)", "Target(path[::-1])", "acme"),
    "a writer that drops a second update": ("acme.py", "len(updates) > 1", "len(updates) > 2", "acme"),
    "a writer that forgets the rows": ("acme.py", "str(target): _entry", "target.path: _entry", "acme"),
    "a formula that is not the paper's": ("tilt.py", "W + self.by", "W + 2 * self.by", "tilt"),
    "a combiner that forgets the weights": ("halves.py", "weights / 2", "weights * 0 + 0.5", "halves"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_an_addition_fails_its_tests(package, forked, fault):
    file, right, wrong, word = FAULTS[fault]
    path = package / file
    text = path.read_text()
    if "rows" in fault:
        text = text.replace("target.rows is not None or ", "")
    assert right in text
    start = text.index("def ")
    path.write_text(text[:start] + text[start:].replace(right, wrong))
    code, said = forked(package, "-k", word)
    assert code == 1, said


def test_an_addition_with_a_built_in_name_fails(package, forked):
    """The built-in class would be tested in its place, and every test would pass."""
    points = next(package.rglob("entry_points.txt"))
    points.write_text(points.read_text().replace("acme = ", "minlora = "))
    tests = next(path for path in package.rglob("test_*.py") if 'format = "acme"' in path.read_text())
    tests.write_text(tests.read_text().replace('format = "acme"', 'format = "minlora"'))
    code, said = forked(package, "-k", "module_of_its_name")
    assert code == 1, said
    assert "which is built in and cannot be replaced" in said
