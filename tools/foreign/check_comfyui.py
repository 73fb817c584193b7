"""Check files that adapterkit writes for ComfyUI: its loader must accept every key, and compute the same weights.

    python tools/foreign/check_comfyui.py CHECKOUT [--method METHOD...] [WORD...]     families whose names have a word
    python tools/foreign/check_comfyui.py CHECKOUT --memory 2                         at most 2 GB a case

Each case is a family and a method. It runs in a separate process with limited memory. The widths of ComfyUI's models
are divided by 16. Changes that are whole matrices are written to several files with a few modules each.

CHECKOUT is a folder with ComfyUI's source; see comfyui_keys.py for its requirements. For each family that ComfyUI has a
model of, the script writes an adapter with diffusers' names, and one update for each module of the first blocks, in
ComfyUI's and in kohya's format. `comfy.lora.load_lora` must accept each key of ComfyUI's format, and `calculate_weight`
must compute the change of the formula within 1e-5, for a sample of the weights. If ComfyUI also reads diffusers' names,
these must give the same change. OFT, BOFT and GLoRA are written in LyCORIS's format. For DoRA, ComfyUI must compute the
change that spec/loaders/comfyui.toml describes. The exit code is 1 if something differs.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import sys
import tempfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import comfyui_keys
import numpy as np
from comfyui_keys import MODELS, ROOT, Absent, is_norm, key_map

TOLERANCE = 1e-5
METHODS = ("lora", "dora", "loha", "lokr", "oft", "boft", "glora", "diff", "diff_b", "norm")
IMAGE_FORMATS = {"lora": ("comfyui", "kohya"), "oft": ("lycoris",), "boft": ("lycoris",), "glora": ("lycoris",)}
"""The formats of a method's files, where they are not ComfyUI's alone."""
SAMPLE = 3
"""Weights of a file that are computed; keys are compared for all."""

BY = 16
"""What the published widths are divided by."""

VALUES = 1 << 25
"""Values of whole matrices in one file."""

RANDOM = np.random.default_rng(0)


class Different(Exception):
    """ComfyUI holds not every key, or makes another weight."""


def main() -> int:
    """Run the families that were asked for; return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("checkout", type=Path)
    parser.add_argument("words", nargs="*")
    parser.add_argument("--method", action="append", choices=METHODS)
    parser.add_argument("--memory", type=float, default=4.0, metavar="GB", help="memory limit of one case")
    arguments = parser.parse_args()
    sys.path[:0] = [str(ROOT), str(arguments.checkout)]
    sys.meta_path.insert(0, Absent())
    import comfy.cli_args

    comfy.cli_args.args.cpu = True
    import comfy.lora  # Imported once, before the processes part.
    import torch  # noqa: F401

    import adapterkit  # noqa: F401

    chosen = [name for name in MODELS if not arguments.words or any(word in name for word in arguments.words)]
    cases = [(name, method, arguments.memory) for name in chosen for method in arguments.method or METHODS]
    failed = 0
    # What a case holds is given back when its process ends. Twelve gigabytes were held by the end of one run before.
    with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as pool:
        for right, line in pool.imap(judged, cases, chunksize=1):
            failed += not right
            print(line, flush=True)
    print(f"{len(cases) - failed} of {len(cases)} right")
    return int(bool(failed))


def judged(case: tuple[str, str, float]) -> tuple[bool, str]:
    """Check one case within its memory; return whether it is right, and its line."""
    name, method, gigabytes = case
    limit = int(gigabytes * 1e9)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    try:
        right, said = True, checked(name, method)
    except Exception as error:  # One family that fails must not stop the others.
        right, said = False, f"{type(error).__name__}: {str(error)[:300]}"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    return right, f"{'ok   ' if right else 'WRONG'}   {name} {method}: {said} ({peak:.1f} GB)"


def checked(name: str, method: str) -> str:
    """Check one family and method; return what was compared.

    Raises:
        Different: a key is not held, or a weight differs.
        AdapterkitError: the file is refused.
    """
    from adapterkit.core.adapter import Adapter, Step, Target
    from adapterkit.core.metadata import read_with
    from adapterkit.formats._image.deciding import FAMILY
    from adapterkit.naming.image import families

    family = next(each for each in families() if each.name == name)
    known, shapes = smaller(*key_map(*MODELS[name][-1]))
    # LyCORIS's files have the names of the model that was trained; ComfyUI reads those of the original model.
    original = "lycoris" in IMAGE_FORMATS.get(method, ())
    modules = modules_of(family, shapes, norms=method == "norm", original=original)
    recipe = (Step("read", {"format": "lycoris" if original else "diffusers"}),)
    found = dict[str, Held]()
    for part in parts(modules, method):
        updates = {Target(f"{family.component}.{path}"): (made(method, size),) for path, size in part.items()}
        adapter = read_with(Adapter(updates, recipe=recipe), {FAMILY: name})
        compare(adapter, name, method, known, shapes, found)
    return "; ".join(f"{image_format} {held}" for image_format, held in found.items()) or "no such modules"


@dataclass
class Held:
    """What ComfyUI held of the files of one format, and how far its changes were from the formula's."""

    weights: int = 0
    lost: int = 0
    worst: float = 0.0
    also: float | None = None
    refused: str = ""

    def __str__(self) -> str:
        if self.refused and not self.weights:
            return f"refused ({self.refused})"
        said = f"{self.weights} weights, {self.worst:.0e}"
        said += "" if self.also is None else f", {self.also:.0e} from diffusers' names"
        said += f", {self.lost} keys not held" if self.lost else ""
        return said + (f", some refused ({self.refused})" if self.refused else "")


def compare(
    adapter: Any,
    name: str,
    method: str,
    known: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    found: dict[str, Held],
) -> None:
    """Write an adapter in each format, and add to `found` what ComfyUI makes of the files.

    Raises:
        Different: a key is not held, or a weight differs.
        AdapterkitError: the file is refused.
    """
    import adapterkit as ak
    from adapterkit.errors import Unrepresentable

    with tempfile.TemporaryDirectory() as folder:
        theirs: dict[str, Any] = {}
        if method == "lora":
            ak.write(adapter, Path(folder, "diffusers.safetensors"), "diffusers")
            theirs, _ = patches(Path(folder, "diffusers.safetensors"), known)
        for image_format in IMAGE_FORMATS.get(method, ("comfyui",)):
            path, result = Path(folder, f"{image_format}.safetensors"), found.setdefault(image_format, Held())
            try:
                ak.write(adapter, path, image_format, on_loss="promote")
            except Unrepresentable as refusal:
                result.refused = str(refusal.items[0] if refusal.items else refusal)
                continue
            held, lost = patches(path, known)
            if lost and image_format == "comfyui":
                raise Different(f"{image_format}: {len(lost)} keys are not held: {sorted(lost)[:3]}")
            read = ak.read(path, family=name).load("cpu")
            for weight in sample(held, shapes):
                own = calculated(held[weight], weight, shapes, method)
                error = compared(own, formula(read, weight, shapes, known, method), weight)
                result.worst = max(result.worst, error)
                if weight in theirs:
                    error = compared(own, calculated(theirs[weight], weight, shapes, method), weight)
                    result.also = max(result.also or 0.0, error)
            result.weights += len(held)
            result.lost += len(lost)


def smaller(known: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Divide the outputs and inputs of ComfyUI's weights, and the rows of its parts, by BY where all of them allow it.

    No key and no order depends on the widths. With the published ones, a run over all families took hours.
    """
    edges: dict[str, set[int]] = {}
    for place in known.values():
        if not isinstance(place, str):
            edges.setdefault(place[0], set()).update(place[1][1:] if place[1] is not None else ())
    rows = {
        weight: all(edge % BY == 0 for edge in (shape[:1] or (1,)) + tuple(edges.get(weight, ())))
        for weight, shape in shapes.items()
    }
    sizes = {
        weight: tuple(
            size // BY if size % BY == 0 and size > BY and (axis == 1 or (axis == 0 and rows[weight])) else size
            for axis, size in enumerate(shape)
        )
        for weight, shape in shapes.items()
    }
    places = {}
    for key, place in known.items():
        if isinstance(place, str) or place[1] is None or sizes.get(place[0], (0,))[0] == shapes.get(place[0], (0,))[0]:
            places[key] = place
        else:
            axis, start, size = place[1]
            places[key] = (place[0], (axis, start // BY, size // BY), *place[2:])
    return places, sizes


def parts(modules: Mapping[str, Module], method: str) -> list[dict[str, tuple[int, ...]]]:
    """Split the modules into files of bounded size, parts of one weight together; return their names and shapes."""
    found: list[dict[str, tuple[int, ...]]] = []
    left, last = 0, ""
    for path, module in sorted(modules.items(), key=lambda pair: pair[1].weight):
        size = int(np.prod(module.shape)) if method in ("diff", "norm") else 0
        if not found or (module.weight != last and size > left):
            found.append({})
            left = VALUES
        found[-1][path], left, last = module.shape, left - size, module.weight
    return found


class Module(NamedTuple):
    """A module of a family: the shape of its weight, and ComfyUI's weight that has it."""

    shape: tuple[int, ...]
    weight: str


def modules_of(family: Any, shapes: Mapping[str, tuple[int, ...]], *, norms: bool, original: bool) -> dict[str, Module]:
    """Modules of the first two blocks that ComfyUI's model has, by diffusers' or its own names."""
    from adapterkit.naming.architectures import fill

    found: dict[str, Module] = {}
    wanted = family.wanted("comfyui")
    for weight in family.architecture.record.weights:
        place = family.architecture.place(weight, "diffusers")
        # Weights that a shape decides (`ratio`) are another module in the last block.
        others = (family.architecture.place(weight, each) for each in family.namings)
        cases = any(each is not None and each.ratio for each in others)
        if place is None or cases or (is_norm(place.name) or is_norm(weight)) != norms:
            continue
        for number in ("0", "1"):
            path = fill(place.name, {f"{{{hole}}}": number if hole == "n" else "0" for hole in "nmkej"})
            pieces = family.moves(path, "diffusers", wanted)
            keys = [f"diffusion_model.{piece.path}.weight" for piece in pieces]
            if not keys or any(key not in shapes for key in keys) or len(set(keys)) > 1:
                continue
            rows = sum(shapes[keys[0]][0] * piece.there.parts // piece.there.of for piece in pieces)
            if (len(shapes[keys[0]]) > 1) == norms:
                continue
            if original:
                own = keys[0].removeprefix("diffusion_model.").removesuffix(".weight")
                found[own] = Module(shapes[keys[0]], keys[0])
                continue
            if family.name in comfyui_keys.UNEVEN and any(not piece.there.whole for piece in pieces):
                continue
            found[path] = Module((rows, *shapes[keys[0]][1:]), keys[0])
    return found


def made(method: str, shape: tuple[int, ...]) -> Any:
    """Return an update of a weight of this shape."""
    from adapterkit.io.lazy import from_numpy
    from adapterkit.methods import METHODS as FORMULAS

    def leaf(*size: int) -> Any:
        return from_numpy((0.1 * RANDOM.normal(size=size)).astype("f4"))

    out, *rest = shape
    size = next(size for size in (8, 4, 2, 1) if out % size == 0)
    if method == "dora":
        # Parts of a fused weight can be one DoRA if they share A.
        A = 0.1 * np.random.default_rng(rest).normal(size=(2, *rest))
        magnitude = from_numpy((1 + RANDOM.random(out)).astype("f4"))
        return FORMULAS["dora"](A=from_numpy(A.astype("f4")), B=leaf(out, 2), magnitude=magnitude)
    if method == "oft" and size > 1:
        return FORMULAS["oft"](square=leaf(out // size, size, size), side="out")
    if method == "boft" and size > 1:
        factors = 2 if out // size % 2 == 0 else 1
        return FORMULAS["boft_outputs"](square=leaf(factors, out // size, size, size))
    if method == "glora":
        return FORMULAS["glora_products"](A1=leaf(rest[0], 2), A2=leaf(2, rest[0]), B1=leaf(out, 2), B2=leaf(2, *rest))
    if method == "norm":
        return FORMULAS["dense"](D=leaf(*shape))
    columns = int(np.prod(rest))
    if method == "loha":
        return FORMULAS["loha"](w1_a=leaf(out, 2), w1_b=leaf(2, columns), w2_a=leaf(out, 2), w2_b=leaf(2, columns))
    if method == "lokr" and out % 4 == 0 and columns % 4 == 0 and len(rest) == 1:
        return FORMULAS["lokr"](w1=leaf(4, 4), w2_a=leaf(out // 4, 2), w2_b=leaf(2, columns // 4))
    if method == "diff":
        return FORMULAS["dense"](D=leaf(*shape))
    if method == "diff_b":
        return FORMULAS["dense"](d=leaf(out))
    return FORMULAS["lora"](A=leaf(2, *rest), B=leaf(out, 2))


def patches(path: Path, known: Mapping[str, Any]) -> tuple[dict[str, Any], set[str]]:
    """Return ComfyUI's patches of a file by weight, each with its rows, and the keys that it does not hold."""
    import comfy.lora
    import comfy.lora_convert
    import comfy.utils

    state = comfy.lora_convert.convert_lora(comfy.utils.load_torch_file(str(path), safe_load=True))
    used = set[str]()
    found: dict[str, Any] = {}
    for key, patch in comfy.lora.load_lora(Watched(state, used), known, log_missing=False).items():
        weight, rows = (key, None) if isinstance(key, str) else (key[0], key[1])
        found.setdefault(weight, []).append((1.0, patch, 1.0, rows, None))
    return found, set(state) - used


class Watched(dict[str, Any]):
    """A state dict that notes which of its keys are read."""

    def __init__(self, state: Mapping[str, Any], used: set[str]) -> None:
        super().__init__(state)
        self.used = used

    def __getitem__(self, key: str) -> Any:
        self.used.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        if key in self:
            self.used.add(key)
        return super().get(key, default)


def sample(held: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Some of the weights, the same ones each time, none of them too large to compute."""
    small = [key for key in held if key in shapes and np.prod(shapes[key]) < 1 << 23]
    return sorted(small, key=lambda key: zlib.crc32(key.encode()))[:SAMPLE]


def base_weight(weight: str, shapes: Mapping[str, tuple[int, ...]], method: str) -> Any:
    """A random weight of the base, the same one each time; zeros, beside which nothing is rounded, for changes."""
    if method not in ("dora", "oft", "boft", "glora"):
        return np.zeros(shapes[weight], "f4")
    return np.random.default_rng(zlib.crc32(weight.encode())).normal(size=shapes[weight]).astype("f4")


def calculated(found: Any, weight: str, shapes: Mapping[str, tuple[int, ...]], method: str) -> Any:
    """The change that ComfyUI makes of a weight."""
    import comfy.lora
    import torch

    W = torch.from_numpy(base_weight(weight, shapes, method))
    return (comfy.lora.calculate_weight(found, W.clone(), weight) - W).double().numpy()


def formula(
    read: Any, weight: str, shapes: Mapping[str, tuple[int, ...]], known: Mapping[str, Any], method: str
) -> Any:
    """The change by the formulas of what adapterkit reads in the same file, at the rows that the targets say."""
    import torch

    is_bias = weight.endswith(".bias")
    module = weight.removesuffix(".bias") + ".weight" if is_bias else weight
    W = torch.from_numpy(base_weight(weight, shapes, method).astype("f8"))
    whole = np.zeros(shapes[weight])
    for target in read.updates:
        name = target.path.partition(".")[2]
        place = known.get("lora_unet_" + name.replace(".", "_"), known.get(f"diffusion_model.{name}", ""))
        if not isinstance(place, str) or place != module:
            continue
        for each in read.updates[target]:
            update = each.map(lambda leaf: leaf.double())
            if is_bias:
                whole += update.bias_delta().numpy()
            elif update.kind == "weight":
                whole += (told(update, W) - W).numpy()
            elif update.changes_weight:
                whole += update.delta(whole.shape).numpy()
    return whole


def told(update: Any, W: Any) -> Any:
    """The weight that ComfyUI makes by spec/loaders/comfyui.toml: for a DoRA, divided by the length of W."""
    if update.method != "dora":
        return update.new_weight(W)
    scale = (update.magnitude / W.flatten(1).norm(dim=1)).reshape(-1, *[1] * (W.ndim - 1))
    return (W + (update.scaling * update.B @ update.A.flatten(1)).reshape(W.shape)) * scale


def compared(own: Any, wanted: Any, weight: str) -> float:
    """The largest relative difference of two changes.

    Raises:
        Different: it is too large.
    """
    error = float(np.abs(own - wanted).max() / (np.abs(wanted).max() or 1.0))
    if not error <= TOLERANCE or not wanted.any():
        raise Different(f"{weight} differs by {error:.1e}, of {np.abs(wanted).max():.1e}")
    return error


if __name__ == "__main__":
    sys.exit(main())
