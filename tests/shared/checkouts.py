"""Make a checkout of the package with an additional family, and run commands in it."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import adapterkit as ak
from adapterkit.naming.architectures import folder

ZEBRA = """
format = 1
family = "zebra"
model_types = ["zebra"]
gguf = ["zebra"]
keyed = ["live"]

[weights]
"net.{n}.mix.q" = { hub = "herd.{n}.ask", gguf = { name = "blk.{n}.attn_q", rows = "rope", heads = "query" }, mlx = "stripes.{n}.query" }
"net.{n}.x.{e}.up" = { live = { name = "net.{n}.x.both", stacked = true, part = 0, of = 2 }, hub = "herd.{n}.zebra.{e}.u", gguf = { name = "blk.{n}.ffn_up_exps", stacked = true }, mlx = { name = "stripes.{n}.zebras.u", stacked = true } }
"net.{n}.x.{e}.gate" = { live = { name = "net.{n}.x.both", stacked = true, part = 1, of = 2 }, hub = "herd.{n}.zebra.{e}.g", gguf = { name = "blk.{n}.ffn_gate_exps", stacked = true }, mlx = { name = "stripes.{n}.zebras.g", stacked = true } }
"""  # noqa: E501


@pytest.fixture
def checkout(tmp_path):
    """Copy the package, and add a family to the known ones."""
    (tmp_path / "adapterkit").symlink_to(Path(ak.__file__).parent)
    shutil.copytree(folder(), tmp_path / "spec" / "architectures")
    for each in folder().parent.iterdir():
        if each.name != "architectures":
            (tmp_path / "spec" / each.name).symlink_to(each)
    (tmp_path / "spec" / "architectures" / "zebra.toml").write_text(ZEBRA)
    return tmp_path


def run(checkout, *commands):
    """Run commands in one process with the package of the checkout; return the output of the last one."""
    lines = [" ".join(map(str, words)) for words in commands]
    done = subprocess.run([sys.executable, "-c", COMMANDS, *lines], cwd=checkout, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


COMMANDS = """
import sys
from click.testing import CliRunner
from adapterkit.cli import adapterkit
for line in sys.argv[1:]:
    done = CliRunner().invoke(adapterkit, line.split())
    if done.exit_code:
        sys.exit(f"{line}: {done.output} {done.exception}")
print(done.output)
"""
