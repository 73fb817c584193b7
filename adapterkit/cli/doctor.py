"""Check this installation and this machine.

Each problem is shown with a remedy. The exit code is 3 if something that adapterkit needs does not work.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import click

from .. import __version__
from ..errors import AdapterkitError
from . import _options
from ._render import TextTable, View, parts, show, size

NEEDED = ("click", "msgspec", "numpy", "rich", "safetensors", "torch")
"""Packages that the commands import; `doctor` reports every package that is missing or broken."""

LOW_SPACE = 10 * 10**9
LOW_MEMORY = 2 * 10**9
FICLONE = 0x40049409
"""Linux's ioctl that makes a file share the disk blocks of another file (reflink); see ioctl_ficlone(2)."""


@dataclass(frozen=True, slots=True)
class Check:
    """The result of one check.

    Attributes:
        name: the package, device, folder or feature that was checked.
        status: `ok`, `warn` (works with a limitation) or `broken` (something necessary does not work).
        found: the result of the check, as text.
        cure: the remedy, or None if there is nothing to repair.
    """

    name: str
    status: str
    found: str
    cure: str | None = None

    def record(self) -> dict[str, str | None]:
        return asdict(self)


def all_checks() -> Iterator[Check]:
    """Run every check, the most basic first."""
    yield Check("python", "ok", sys.version.split()[0])
    yield Check("adapterkit", "ok", __version__)
    for package in NEEDED:
        yield imported(package, "broken")
    yield imported("onnx", "warn")
    yield providers()
    yield devices()
    yield kernel()
    for name, folder in (("space here", Path.cwd()), ("space for temporary files", Path(tempfile.gettempdir()))):
        yield space(name, folder)
    usable = getattr(os, "sched_getaffinity", None)
    yield Check("cores", "ok", str(len(usable(0)) if usable else os.cpu_count() or 1))
    yield memory()
    yield from copies(Path.cwd())
    yield from plugins()
    yield from defaults()


def kernel() -> Check:
    """Check whether merges can use compiled loops, which may be missing on platforms without a binary wheel."""
    from ..native import OFF, loops

    if loops() is not None:
        return Check("compiled merge", "ok", "yes")
    if os.environ.get(OFF):
        return Check("compiled merge", "ok", f"switched off by {OFF}: merges use numpy")
    cure = "Install a C compiler, then: pip install --force-reinstall --no-deps --no-binary adapterkit adapterkit"
    state = "missing: merges use numpy, which takes about three times as long and gives the same bits"
    return Check("compiled merge", "warn", state, cure)


def plugins() -> Iterator[Check]:
    """Report the methods, formats and other plug-ins that installed packages add. Warn if a plug-in cannot be used."""
    from ..formats import FORMATS
    from ..formats.adapterhub.families import FAMILIES as ADAPTERHUB
    from ..formats.peft.families import FAMILIES as PEFT
    from ..hub.hubs import HUBS
    from ..methods import METHODS
    from ..ops.combiners import COMBINERS
    from ..quant import SCHEMES

    for registry in (FORMATS, METHODS, COMBINERS, SCHEMES, HUBS, PEFT, ADAPTERHUB):
        refused = registry.refused()
        for name, package in registry.packages().items():
            if name in refused:
                cure = f"Rename the {registry.noun} in the package, or: pip uninstall {package.split()[0]}"
                yield Check(f"{registry.noun} {name}", "warn", refused[name], cure)
            else:
                yield Check(f"{registry.noun} {name}", "ok", f"by {package}")


def defaults() -> Iterator[Check]:
    """Report the defaults that environment variables and files set for options. Warn about settings without effect."""
    from . import adapterkit
    from ._options import TYPED, files, settings_of, unknown

    ctx = click.Context(adapterkit)
    try:
        commands = {name: adapterkit.get_command(ctx, name) for name in adapterkit.list_commands(ctx)}
        known = {name: command for name, command in commands.items() if command is not None}
        read = [str(path) for path, _ in files()]
        yield Check("defaults", "ok", f"from {', '.join(read)}" if read else "no file with defaults")
        checks: dict[str, Check] = {}
        for name, command in known.items():
            decided: set[str] = set()
            for each in settings_of(name, command):
                if each.parameter not in decided:
                    decided.add(each.parameter)
                    scope = f"{each.command} " if each.command else ""
                    value = " ".join(map(str, each.value)) if isinstance(each.value, list) else str(each.value)
                    checks.setdefault(each.source, Check(f"{scope}{each.option}", "ok", f"{value}, by {each.source}"))
        yield from checks.values()
        for source, why in unknown(known):
            key = source.rpartition(": ")[2].removeprefix("ADAPTERKIT_").lower().replace("-", "_")
            cure = "Type it on the command line: it cannot have a default" if key in TYPED else f"Remove it; {why}"
            yield Check("defaults", "warn", f"{source} is not used", cure)
    except AdapterkitError as error:
        yield Check("defaults", "broken", str(error), error.cure)


def imported(package: str, otherwise: str) -> Check:
    """Check that a package can be imported, because an installed package may be broken.

    Args:
        package: the name of the package.
        otherwise: the status of the check if the import fails.
    """
    try:
        module = import_module(package)
    except Exception as error:
        cure = f"pip install --force-reinstall {package}"
        return Check(package, otherwise, f"cannot be imported: {type(error).__name__}: {error}", cure)
    return Check(package, "ok", _version(package) or str(getattr(module, "__version__", "version unknown")))


def providers() -> Check:
    """Check onnxruntime and its devices.

    Warn if onnxruntime-gpu is installed too, because the two packages overwrite each other's files.
    """
    both = [name for name in ("onnxruntime", "onnxruntime-gpu") if _version(name)]
    check = imported("onnxruntime", "warn")
    if len(both) > 1:
        cure = "pip uninstall onnxruntime onnxruntime-gpu, then pip install one of the two"
        return Check("onnxruntime", "warn", "onnxruntime and onnxruntime-gpu overwrite each other's files", cure)
    if check.status != "ok":
        return check
    version = _version(both[0]) if both else check.found
    try:
        from ..onnx.providers import runs_on
    except Exception as error:  # The import failed because of another broken package, which has its own check.
        return Check("onnxruntime", "warn", f"{version}, not tested: {type(error).__name__}", "Repair onnx first")
    built = import_module("onnxruntime").get_available_providers()
    running = [name for name in built if runs_on(name)]
    idle = [name for name in built if name not in running]
    state = f"{version} (runs on {_plainly(running)}"
    state += f"; also built for {_plainly(idle)}, where no session starts)" if idle else ")"
    return Check("onnxruntime", "ok" if running else "warn", state, None if running else "pip install onnxruntime")


def _plainly(names: Sequence[str]) -> str:
    return ", ".join(name.removesuffix("ExecutionProvider") for name in names) or "nothing"


def devices() -> Check:
    """Report the CUDA devices that torch can use. If there are none, warn only if a CUDA driver is installed."""
    try:
        import torch

        cards = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    except Exception as error:
        return Check("CUDA devices", "warn", f"{type(error).__name__}: {error}", "Repair torch first")
    if cards:
        return Check("CUDA devices", "ok", ", ".join(f"{d.name} ({size(d.total_memory)})" for d in cards))
    if Path("/proc/driver/nvidia/version").exists():
        why = "this torch has no CUDA" if torch.version.cuda is None else "torch cannot use the driver"
        return Check("CUDA devices", "warn", f"none: {why}", "Install a torch built for the CUDA of your driver")
    return Check("CUDA devices", "ok", "none; merges run on the CPU")


def space(name: str, folder: Path) -> Check:
    """Check that the file system of a folder has at least `LOW_SPACE` bytes of free space."""
    import shutil

    free = shutil.disk_usage(folder).free
    state = f"{size(free)} free in {folder}"
    if free < LOW_SPACE:
        return Check(name, "warn", state, "Free some space; a merge writes as many bytes as the base has")
    return Check(name, "ok", state)


def memory() -> Check:
    """Report the available and the total memory, if they are known. Warn if less than `LOW_MEMORY` is available."""
    free, total = _memory()
    if total is None:
        return Check("memory", "ok", "unknown: the system does not report it")
    state = size(total) if free is None else f"{size(free)} available of {size(total)}"
    if free is not None and free < LOW_MEMORY:
        return Check("memory", "warn", state, "Close other programs")
    return Check("memory", "ok", state)


def copies(folder: Path) -> Iterator[Check]:
    """Check which fast file operations work: copies inside the kernel, shared disk blocks, and direct writes."""
    cure = "Run in a folder that you may write to, on a local file system"
    kernel = _try_in(folder, _copy_range)
    if kernel is None:
        yield Check("copy_file_range", "ok", "works here")
    else:
        yield Check("copy_file_range", "warn", f"{kernel}; copies take longer", cure)
    shared = _try_in(folder, _reflink)
    # Do not warn if reflink fails, because most file systems cannot share blocks.
    yield Check("reflink", "ok", "works here" if shared is None else "not on this file system; bytes are copied")
    direct = _try_in(folder, _direct_write)
    state = "works here" if direct is None else f"not here ({direct}); files are written through the page cache"
    yield Check("direct writes", "ok", state)


def _copy_range(source: int, target: int) -> None:
    if os.copy_file_range(source, target, 4096) != 4096:
        raise OSError("copied too little")


def _reflink(source: int, target: int) -> None:
    import fcntl

    fcntl.ioctl(target, FICLONE, source)


def _direct_write(_: int, target: int) -> None:
    import fcntl
    import mmap

    fcntl.fcntl(target, fcntl.F_SETFL, fcntl.fcntl(target, fcntl.F_GETFL) | os.O_DIRECT)
    os.write(target, mmap.mmap(-1, mmap.PAGESIZE))


def _try_in(folder: Path, act: Callable[[int, int], None]) -> str | None:
    """Try an operation on two temporary files in a folder. Return why it fails, or None if it works."""
    try:
        with tempfile.TemporaryFile(dir=folder) as source, tempfile.TemporaryFile(dir=folder) as target:
            source.write(bytes(4096))
            source.flush()
            source.seek(0)
            act(source.fileno(), target.fileno())
    except (OSError, AttributeError, ImportError) as error:
        return str(getattr(error, "strerror", None) or error)
    return None


def _memory() -> tuple[int | None, int | None]:
    """Return the available and the total memory in bytes. Neither exceeds the container's memory limit."""
    lines = _text("/proc/meminfo").splitlines()
    sizes = {name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in lines) if rest}
    free, total = sizes.get("MemAvailable"), sizes.get("MemTotal")
    limit, used = _text("/sys/fs/cgroup/memory.max").strip(), _text("/sys/fs/cgroup/memory.current").strip()
    if free is not None and total is not None and limit.isdigit() and used.isdigit():
        free, total = min(free, max(int(limit) - int(used), 0)), min(total, int(limit))
    return free, total


def _text(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


@click.command(help=__doc__)
@_options.flags
@click.pass_context
def command(ctx: click.Context) -> None:
    """Run every check of `adapterkit.cli.doctor`."""
    checks = [check.record() for check in all_checks()]
    ok = all(check["status"] != "broken" for check in checks)
    show(ctx.obj, {"ok": ok, "checks": checks}, _view)
    if not ok:
        ctx.exit(3)


def _view(record: Mapping[str, object]) -> View:
    checks = parts(record, "checks")
    yield TextTable(("", "what", "found", "cure"), [[c["status"], c["name"], c["found"], c["cure"]] for c in checks])
