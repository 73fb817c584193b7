"""Compiles adapterkit/native, the inner loops of merging and quantizing, for this machine or for another.

    python tools/build_kernel.py [--target x86_64-linux-gnu.2.17]

Hatchling also calls this script to build a wheel and for `pip install -e .`. It needs a C compiler (`CC`, cc, gcc or
clang); for another platform, it needs ziglang from PyPI, which compiles for all platforms. Without a compiler, and on
processors that the loops do not support, the package uses numpy, which is slower and gives the same bits.
"""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

try:
    from hatchling.builders.hooks.plugin.interface import BuildHookInterface
except ImportError:  # run by hand
    BuildHookInterface = object

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "adapterkit" / "native"
SOURCES = tuple(sorted(FOLDER.glob("*.c")))
HEADERS = tuple(sorted(FOLDER.glob("*.h")))

PROCESSORS = {
    "x86_64": ("-mavx2", "-mfma", "-mf16c"),
    "amd64": ("-mavx2", "-mfma", "-mf16c"),
    "aarch64": (),
    "arm64": (),
}
"""Compiler flags by processor; `lanes.h` has no conversions for other processors."""

EXACT = dict.fromkeys(("ggml.c", "quantize.c", "dropping.c"), ("-ffp-contract=off",))
"""Additional flags for sources that must round as often as numpy does."""

WIDE = dict.fromkeys(("x86_64", "amd64"), ("-DLANES_512", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"))
"""By processor: the flags for the second compilation of the sources in TWICE, for AVX-512."""

TWICE = ("merge.c", "normalize.c")
"""Sources that compute eight numbers at a time, and sixteen on processors with AVX-512."""

TARGETS = {
    "x86_64-linux-gnu.2.17": "manylinux_2_17_x86_64.manylinux2014_x86_64",
    "aarch64-linux-gnu.2.17": "manylinux_2_17_aarch64.manylinux2014_aarch64",
    "x86_64-macos.11.0": "macosx_11_0_x86_64",
    "aarch64-macos.11.0": "macosx_11_0_arm64",
    "x86_64-windows-gnu": "win_amd64",
    "aarch64-windows-gnu": "win_arm64",
}
"""ziglang's name of each target of a release -> the platform tag of its wheel."""


def library(target: str | None = None) -> Path:
    """Return the path of the compiled library: for this machine, beside its sources; for a target, under build/."""
    windows = sys.platform == "win32" if target is None else "windows" in target
    folder = FOLDER if target is None else ROOT / "build" / target
    return folder / ("_kernel.dll" if windows else "_kernel.so")


def compiler(target: str | None) -> list[str] | None:
    """Return the command of a C compiler; None if there is none."""
    if target is not None:
        return [sys.executable, "-m", "ziglang", "cc", "-target", target]
    if named := os.environ.get("CC"):
        return shlex.split(named)
    found = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    return None if found is None else [found]


def compile_kernel(target: str | None = None) -> Path | None:
    """Compile the loops beside their sources; return None, and print the reason to stderr, if this is not possible."""
    processor = (platform.machine() if target is None else target.split("-")[0]).lower()
    command = compiler(target)
    if command is None or processor not in PROCESSORS:
        why = f"they do not support {processor}" if command else "there is no C compiler (set CC to one)"
        print(f"merges will use numpy, without the compiled loops: {why}", file=sys.stderr)
        return None
    path = library(target)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Replace the file: another process may have the old library open, and keeps the old file.
    fresh = path.with_name(f"{path.name}.{os.getpid()}")
    flags = ["-O3", "-fno-math-errno", "-fno-trapping-math", "-std=gnu11", *PROCESSORS[processor]]
    if path.suffix == ".so":
        flags += ["-fPIC", "-fvisibility=hidden"]
    with tempfile.TemporaryDirectory() as name:
        compiled = [(source, EXACT.get(source.name, ())) for source in SOURCES]
        if processor in WIDE:
            compiled += [(FOLDER / name, WIDE[processor]) for name in TWICE]
        objects = [Path(name, f"{number}.o") for number in range(len(compiled))]
        steps = [
            [*command, *flags, *more, "-c", source, "-o", each]
            for (source, more), each in zip(compiled, objects, strict=True)
        ]
        steps.append([*command, "-shared", "-s", "-o", fresh, *objects, *([] if path.suffix == ".dll" else ["-lm"])])
        for step in steps:
            done = subprocess.run(step, capture_output=True, text=True, check=False)
            if done.returncode:
                print(
                    f"merges will use numpy, without the compiled loops: {done.stderr.strip()[-2000:]}", file=sys.stderr
                )
                fresh.unlink(missing_ok=True)
                return None
    fresh.replace(path)
    return path


class KernelHook(BuildHookInterface):  # type: ignore[misc, valid-type]
    """Adds the library to the wheel. `KERNEL_TARGET` names another platform; `none` builds without the library."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile before the files are collected, and tag the wheel for its platform and any version of Python."""
        target = os.environ.get("KERNEL_TARGET") or None
        # The source archive contains only the sources.
        if target == "none" or self.target_name == "sdist":
            return
        path = compile_kernel(target)
        if path is None and target is not None:
            raise SystemExit(f"no library for {target}")
        if path is None or version == "editable":
            return
        from packaging.tags import platform_tags

        build_data["force_include"][str(path)] = f"adapterkit/native/{path.name}"
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{TARGETS[target] if target else next(platform_tags())}"


def main() -> int:
    """Compile for one target; exit with 1 if that is not possible."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--target", choices=sorted(TARGETS), help="a platform other than this one")
    parser.add_argument("--if-older", action="store_true", help="compile only if the library is older than its sources")
    arguments = parser.parse_args()
    path = library(arguments.target)
    if (
        arguments.if_older
        and path.exists()
        and path.stat().st_mtime >= max(source.stat().st_mtime for source in (*SOURCES, *HEADERS))
    ):
        return 0
    return int(compile_kernel(arguments.target) is None)


if __name__ == "__main__":
    sys.exit(main())
