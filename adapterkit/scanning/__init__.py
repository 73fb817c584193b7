"""Scan an untrusted adapter for signs of an attack.

A finding does not prove an attack, and a file without findings may still be harmful. Each finding has a severity, the
evidence, a location, and the reason why the finding matters. Nothing in the files is executed or imported. Pickles
are never loaded; only their opcodes are read.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator
from contextlib import suppress
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.arguments import checks_types
from ..errors import AdapterkitError, public
from ..formats import read, recognised
from ..io.checkpoint import opened
from ..io.lazy import as_lazy, check_finite
from ..io.locations import check_exists, entries_below, located, path_text
from ..io.stages import stage
from ..naming.ties import is_embedding
from .files import WEIGHTS, in_folder
from .findings import RULES, SEVERITIES, Finding, Scan, ScanRule, ordered

if TYPE_CHECKING:
    from ..core.adapter import Adapter, Target
    from ..core.updates import Update
    from ..io.checkpoint import Checkpoint

__all__ = ["RULES", "SEVERITIES", "Finding", "Scan", "ScanRule", "scan"]

MOST_FILES = 10_000


@checks_types
def scan(source: str | PathLike[str], *, base: Checkpoint | str | PathLike[str] | None = None) -> Scan:
    """Scan an untrusted adapter for signs of an attack, without executing anything in the adapter.

    Args:
        source: a file, a folder, or an address on a hub. Files on a hub are downloaded first.
        base: the base. If given, the norm of each change is compared with the norm of the weight that it changes.

    Returns:
        The findings, the most severe first. They are evidence, not proof. An adapter without findings may still be
        harmful.

    Raises:
        StorageError: the source or the base does not exist or cannot be read.
        NetworkError: the hub cannot be reached.

    Example:
        >>> adapterkit.scan("lora").worst  # doctest: +SKIP
        'none'
    """
    stage("scanning files and values")
    text = path_text(source)
    root = located(text)
    check_exists(root, text)
    unread: list[str] = []
    files = _files(root, unread)
    checkpoint = None if base is None else opened(base)
    findings = list(in_folder(root, files, unread))
    for adapter in _adapters(root, files, unread):
        findings += _adapter(adapter, checkpoint, unread)
    return Scan(public(text), ordered(findings), len(files), tuple(unread))


def _adapters(root: Path, files: list[Path], unread: list[str]) -> list[Path]:
    """Return the path of the adapter at `root`, or the paths of the adapters in its subfolders."""
    if _recognised(root):
        return [root]
    folders = dict.fromkeys(file.parent for file in files if file.name.endswith(WEIGHTS) and file.parent != root)
    recognised = [folder for folder in folders if _recognised(folder)]
    if not recognised and any(file.name.endswith(WEIGHTS) for file in files):
        unread.append(f"{root.name}: its targets and values were not read, because no adapter is recognised")
    return recognised


def _recognised(path: Path) -> bool:
    with suppress(AdapterkitError):
        return bool(recognised(path))
    return False


def _adapter(root: Path, checkpoint: Checkpoint | None, unread: list[str]) -> list[Finding]:
    """Return findings about the targets and values of an adapter.

    If adapterkit cannot read the adapter, a line is added to `unread`. Other tools may be able to read the adapter, so
    the user must know that its values were not scanned.
    """
    try:
        adapter = read(root, base=checkpoint)
    except AdapterkitError as error:
        unread.append(f"{root.name}: its targets and values could not be read: {error.why}")
        return []
    name = next((update.file for _, update in adapter if update.file is not None), None)
    file = Path(name).name if name is not None else root.name
    return list(in_adapter(adapter, file, checkpoint, unread))


def _files(root: Path, unread: list[str]) -> list[Path]:
    """Return the files under `root`, at most `MOST_FILES`. Do not follow links to folders; omit the folder `.git`."""
    if not root.is_dir():
        return [root]
    files: list[Path] = []

    def failed(error: OSError) -> None:
        unread.append(f"{Path(error.filename).relative_to(root)}: the folder could not be read: {error.strerror}")

    for path in entries_below(root, failed):
        if path.relative_to(root).parts[0] == ".git" or (not path.is_symlink() and path.is_dir()):
            continue
        if len(files) >= MOST_FILES:
            unread.append(f"{root.name}: only its first {MOST_FILES:,} files were scanned")
            break
        files.append(path)
    return files


FEW_EXPERTS = 0.1
"""A layer's changed experts are reported if they are few: one expert, or at most this share of the layer's experts.

The number of experts per layer is estimated as the highest index of a changed expert in any layer, plus 1. The check
runs only if the paths of all layers with changed experts are equal except for the numbers in the paths.
"""

SPIKE, SPIKE_RANK = 0.995, 4
"""One direction dominates a change if more than the fraction `SPIKE` of the change's energy (squared norm) is in this
direction. Only changes of rank `SPIKE_RANK` or more are checked."""

STRONGER = 5.0
"""A change dominated by one direction is reported if its norm is more than this many times the median norm of the same
module over all layers. If at most a quarter of the changes of rank `SPIKE_RANK` or more are dominated by one direction,
all these dominated changes are reported, whatever their norms are."""

MOST_OF_ALL = 0.8
"""A target is reported if its energy (squared norm) is more than this share of the energy of all targets together."""

ENOUGH = 8
"""Three checks run only if an adapter has at least this many experts, targets or changes. The check with `FEW_EXPERTS`
needs this many experts per layer, and the check with `MOST_OF_ALL` needs this many targets. The second check that
`STRONGER` describes needs this many changes of rank `SPIKE_RANK` or more."""

FOREIGN = 0.005
"""If at most this share of a float32 tensor's values needs more than 16 bits, the tensor was probably trained in 16
bits. The few values that need more bits were probably changed later, so they are reported."""

_NUMBER = re.compile(r"\.\d+(?=\.|$)")


def in_adapter(adapter: Adapter, file: str, base: Checkpoint | None, unread: list[str]) -> Iterator[Finding]:
    """Yield findings about the targets and values of an adapter. This function reads all tensors."""
    yield from _targets(adapter, file)
    finite = True
    for target, update in adapter:
        for name, leaf in update.tensors.items():
            place = f"{target}: {update.method}.{name}"
            try:
                check_finite(leaf)
            except AdapterkitError as error:
                finite = False
                yield Finding("not-finite", file, place, error.why)
            yield from _foreign_bits(file, place, leaf)
    if finite:
        yield from _changes(adapter, file, base, unread)


def _targets(adapter: Adapter, file: str) -> Iterator[Finding]:
    experts: dict[str, set[int]] = defaultdict(set)
    for target, updates in adapter.updates.items():
        path = target.path
        yield from _token_rows(target, updates, file)
        if re.search(r"(^|\.)(lm_head|embed_out|output_projection)$", path):
            yield Finding("head", file, str(target), ", ".join(update.method for update in updates))
        if re.search(r"(^|\.)(router|router\.\w+|gate|wg)$", path):
            yield Finding("router", file, str(target), ", ".join(update.method for update in updates))
        single = re.search(r"^(.*\.experts)\.(\d+)\.", path)
        if single:
            experts[single[1]].add(int(single[2]))
    for path, numbers in experts.items():
        layers = {_NUMBER.sub(".#", each) for each in experts}
        most = max(max(each) for each in experts.values()) + 1
        if len(numbers) <= max(1, FEW_EXPERTS * most) and most >= ENOUGH and len(layers) == 1:
            shown = ", ".join(map(str, sorted(numbers)[:5]))
            yield Finding("single-expert", file, path, f"of at least {most} experts, only these are changed: {shown}")


def _token_rows(target: Target, updates: tuple[Update, ...], file: str) -> Iterator[Finding]:
    for update in updates:
        if update.method == "rows":
            count = next(iter(update.tensors.values())).shape[0]
            yield Finding("token-rows", file, str(target), f"{count:,} rows of single tokens are changed")
        elif is_embedding(f"{target.path}.weight") and update.method == "replacement":
            yield Finding("token-rows", file, str(target), "the whole embedding is replaced")


def _foreign_bits(file: str, place: str, leaf: Any) -> Iterator[Finding]:
    """Yield a finding if nearly all values of a float32 tensor, but not all of them, are exact in 16 bits."""
    import numpy as np

    tensor = as_lazy(leaf)
    if tensor.dtype.name != "F32" or math.prod(tensor.shape) < 64:
        return
    values = tensor.numpy().reshape(-1)
    low = np.count_nonzero(values.view("<u4") & 0xFFFF)
    if not low:
        # All values are exact in bfloat16. Do not test float16: the test would report bfloat16 values that are too
        # small to be exact in float16.
        return
    with np.errstate(over="ignore"):
        half = np.count_nonzero(values.astype("<f2").astype("<f4") != values)
    for name, count in (("bfloat16", int(low)), ("float16", int(half))):
        if 0 < count <= FOREIGN * values.size:
            yield Finding("foreign-bits", file, place, f"{count:,} of {values.size:,} values are not exact in {name}")
            return


def _changes(adapter: Adapter, file: str, base: Checkpoint | None, unread: list[str]) -> Iterator[Finding]:
    """Yield findings about the spectra and norms of changes.

    A line is added to `unread` for each change that cannot be computed.
    """
    from ..ops.alignment import places
    from ..ops.lowrank import svd

    norms: dict[str, float] = {}
    firsts: dict[str, float] = {}
    try:
        _, aligned = places([adapter], lower="scanned")
    except AdapterkitError as error:
        unread.append(f"{file}: its norms and spectra could not be computed: {error.why}")
        return
    for place in aligned:
        try:
            (change,) = place.changes()
            if change is None or not change.changes_weight:
                continue
            for number, delta in enumerate(change.deltas()):
                name = f"{place.target}" + (f" expert {number}" if change.experts is not None else "")
                S = svd(delta)[1]
                norms[name] = float(math.sqrt(float((S * S).sum())))
                rank = min(delta.shape) if delta.rest is not None else min(delta.rank, *delta.shape)
                if rank >= SPIKE_RANK and norms[name] > 0:
                    firsts[name] = float(S[0] ** 2) / norms[name] ** 2
        except AdapterkitError as error:
            unread.append(f"{file}: {place.target}: {error.why}")
    yield from _spikes(file, norms, firsts)
    if base is not None:
        yield from _against(file, norms, base)


def _spikes(file: str, norms: dict[str, float], firsts: dict[str, float]) -> Iterator[Finding]:
    kinds: dict[str, list[float]] = defaultdict(list)
    for name, norm in norms.items():
        kinds[_NUMBER.sub(".#", name)].append(norm)
    for name, share in firsts.items():
        others = sorted(kinds[_NUMBER.sub(".#", name)])
        median = others[len(others) // 2]
        strong = len(others) >= 3 and norms[name] > STRONGER * median
        # If at most a quarter of the changes are dominated by one direction, report them even if their norms are usual.
        lonely = len(firsts) >= ENOUGH and sum(each > SPIKE for each in firsts.values()) <= len(firsts) // 4
        if share > SPIKE and (strong or lonely):
            evidence = f"{share:.2%} of its energy lies in one direction; its norm is {norms[name]:.3g}"
            yield Finding("spike", file, name, f"{evidence}; the module's median norm is {median:.3g}")
    energy = {name: norm * norm for name, norm in norms.items()}
    whole = math.fsum(energy.values())
    for name, each in energy.items():
        if len(energy) >= ENOUGH and whole > 0 and each > MOST_OF_ALL * whole:
            yield Finding(
                "outlier", file, name, f"it has {each / whole:.0%} of the energy of all {len(energy):,} targets"
            )


def _against(file: str, norms: dict[str, float], base: Checkpoint) -> Iterator[Finding]:
    from ..ops.differences import frobenius

    for name, norm in norms.items():
        tensor = base.tensors.get(f"{name}.weight")
        if tensor is None or not tensor.dtype.floating:
            continue
        weight = frobenius(tensor.numpy().view(tensor.dtype.array).astype("<f4"))
        if norm > weight:
            yield Finding("norm", file, name, f"its norm is {norm:.3g}, the norm of the weight is {weight:.3g}")
