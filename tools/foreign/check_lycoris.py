"""Reads networks of LyCORIS on each kind of layer with adapterkit, and compares the outputs with LyCORIS's forward.

    python tools/foreign/check_lycoris.py [-k WORD] [--json FILE] [--save FOLDER]

Run it in an environment with lycoris-lora 4.1.3. A case is one algorithm with one choice of options on one layer:

1. LyCORIS creates the module, and every trained tensor is changed; the module's forward gives the expected output.
2. LyCORIS saves the network; adapterkit reads the file, with the base.
3. The layer with the adapter injected, and the layer of the merged base, must give the same output within 1e-5 of its
   largest number.
4. Written back in LyCORIS's format, the file has the same tensors and the same metadata.
5. Written without the original file's extra data, and loaded by LyCORIS, the file gives the same output.

The script prints a table of algorithms and layers, and one line for each case that fails: WRONG with the error, REFUSED
with adapterkit's message, or LOADER if step 5 fails. `!` marks cases that LyCORIS cannot handle. The exit code is 1 if
a case is wrong, or is refused and not listed in LACKING.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from lycoris import LycorisNetwork, create_lycoris_from_weights
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import adapterkit as ak
from adapterkit.errors import AdapterkitError, NotMergeable, Unrepresentable

TOLERANCE = 1e-5

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(12, 16), (3, 12)),
    "wide linear": (lambda: nn.Linear(8, 24, bias=False), (2, 3, 8)),
    "conv1d k1": (lambda: nn.Conv1d(8, 12, 1), (2, 8, 7)),
    "conv1d k3": (lambda: nn.Conv1d(8, 12, 3, padding=1), (2, 8, 7)),
    "conv2d k1": (lambda: nn.Conv2d(8, 12, 1), (2, 8, 5, 6)),
    "conv2d k3": (lambda: nn.Conv2d(8, 12, 3, padding=1, stride=2), (2, 8, 5, 6)),
    "conv2d 2x3": (lambda: nn.Conv2d(8, 8, (2, 3), bias=False), (2, 8, 5, 6)),
    "conv2d dilated": (lambda: nn.Conv2d(8, 12, 3, dilation=2, padding=2), (2, 8, 6, 6)),
    "conv2d groups": (lambda: nn.Conv2d(8, 12, 3, groups=2), (2, 8, 5, 6)),
    "conv2d reflect": (lambda: nn.Conv2d(8, 12, 3, padding=1, padding_mode="reflect"), (2, 8, 5, 6)),
    "conv3d k3": (lambda: nn.Conv3d(4, 8, 3, padding=1), (1, 4, 4, 3, 5)),
}
"""Kind -> the layer, and the shape of its input."""

NORMS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "layer norm": (lambda: nn.LayerNorm(12), (3, 12)),
    "group norm": (lambda: nn.GroupNorm(4, 12), (2, 12, 5)),
}

_RANKS = {"lora_dim": 2, "alpha": 3.0, "conv_lora_dim": 2, "conv_alpha": 3.0}

ALGORITHMS: dict[str, dict[str, Any]] = {
    "lora": {},
    "lora bypass": {"bypass_mode": True},
    "lora tucker": {"use_tucker": True},
    "lora scalar": {"use_scalar": True},
    "lora rs": {"rs_lora": True},
    "lora alpha 0": {"alpha": 0, "conv_alpha": 0},
    "lora dropouts": {"dropout": 0.5, "rank_dropout": 0.5, "module_dropout": 0.5, "rank_dropout_scale": True},
    "lora dora": {"weight_decompose": True},
    "lora dora bypass": {"weight_decompose": True, "bypass_mode": True},
    "loha dora bypass": {"weight_decompose": True, "bypass_mode": True},
    "lora dora inputs": {"weight_decompose": True, "wd_on_out": False},
    "lora dora tucker scalar": {"weight_decompose": True, "use_tucker": True, "use_scalar": True},
    "lora dora rs": {"weight_decompose": True, "rs_lora": True},
    "loha": {},
    "loha bypass": {"bypass_mode": True},
    "loha tucker": {"use_tucker": True},
    "loha scalar": {"use_scalar": True},
    "loha rs": {"rs_lora": True},
    "loha dora": {"weight_decompose": True},
    "loha dora inputs": {"weight_decompose": True, "wd_on_out": False},
    "loha dora tucker": {"weight_decompose": True, "use_tucker": True},
    "lokr": {},
    "lokr rank 1": {"lora_dim": 1, "conv_lora_dim": 1, "factor": 2},
    "lokr bypass": {"bypass_mode": True, "lora_dim": 1, "conv_lora_dim": 1, "factor": 2},
    "lokr factor 4": {"factor": 4, "lora_dim": 1, "conv_lora_dim": 1},
    "lokr both": {"decompose_both": True, "factor": 4, "lora_dim": 1, "conv_lora_dim": 1},
    "lokr full matrix": {"full_matrix": True, "factor": 2},
    "lokr unbalanced": {"unbalanced_factorization": True, "lora_dim": 1, "conv_lora_dim": 1},
    "lokr tucker": {"use_tucker": True, "lora_dim": 1, "conv_lora_dim": 1, "factor": 2},
    "lokr scalar": {"use_scalar": True, "lora_dim": 1, "conv_lora_dim": 1, "factor": 2},
    "lokr rs": {"rs_lora": True, "lora_dim": 1, "conv_lora_dim": 1, "factor": 2},
    "lokr rs rank 2": {"rs_lora": True, "factor": 2},
    "lokr rs full matrix": {"rs_lora": True, "full_matrix": True},
    "lokr dora bypass": {"weight_decompose": True, "bypass_mode": True, "lora_dim": 1, "conv_lora_dim": 1, "factor": 2},
    "lokr dora": {"weight_decompose": True, "factor": 2, "lora_dim": 1, "conv_lora_dim": 1},
    "lokr dora inputs": {"weight_decompose": True, "wd_on_out": False, "factor": 2},
    "diag-oft": {"lora_dim": 4, "conv_lora_dim": 4},
    "diag-oft constraint": {"lora_dim": 4, "conv_lora_dim": 4, "constraint": 0.01},
    "diag-oft rescaled": {"lora_dim": 4, "conv_lora_dim": 4, "rescaled": True},
    "diag-oft bypass": {"lora_dim": 4, "conv_lora_dim": 4, "bypass_mode": True},
    "boft": {"lora_dim": 4, "conv_lora_dim": 4},
    "boft constraint": {"lora_dim": 4, "conv_lora_dim": 4, "constraint": 0.01, "rescaled": True},
    "boft bypass": {"lora_dim": 4, "conv_lora_dim": 4, "bypass_mode": True},
    "glora": {},
    "glora bypass": {"bypass_mode": True},
    "glora tucker": {"use_tucker": True},
    "glora scalar": {"use_scalar": True},
    "glora rs": {"rs_lora": True},
    "ia3": {},
    "ia3 inputs": {"train_on_input": True},
    "ia3 bypass": {"bypass_mode": True},
    "ia3 inputs bypass": {"train_on_input": True, "bypass_mode": True},
    "full": {},
    "norm": {"train_norm": True},
    "dylora": {"lora_dim": 8, "conv_lora_dim": 8, "block_size": 4},
    "tlora": {},
}
"""The algorithm, by its first word, and a choice of options -> what LyCORIS is given."""

REFLECT = "conv2d reflect"
"""The layer whose base reads other numbers around its input than LyCORIS's change, which reads zeros."""

LACKING: dict[str, str] = {
    "tlora": "the factors that training began with, whose product is subtracted",
    "lora dora bypass": "whether its convolutions are in groups, where LyCORIS goes by the magnitude",
    REFLECT: "a method that reads zeros around the input: only LoRA has one",
    "glora bypass, conv2d groups": "a weight: it mixes channels of all groups",
    "ia3 inputs bypass, conv2d groups": "a weight: it scales channels of all groups",
}
"""Algorithm, layer or case -> what it lacks, so that it is refused."""


VECTORS = (
    "lora, conv2d reflect", "lora dora bypass, linear", "loha dora bypass, conv2d k3", "lokr dora bypass, linear",
    "lokr rs full matrix, conv2d k3", "glora rs, linear", "glora rs, conv1d k3", "dylora, linear", "dylora, conv2d k3",
    "diag-oft bypass, linear", "diag-oft bypass, conv2d k3", "boft bypass, linear", "ia3 bypass, linear",
    "ia3 bypass, conv1d k3",
)  # fmt: skip
"""Cases that `--save` writes."""


class Refused(Exception):
    """LyCORIS cannot do it."""


def model_of(kind: str) -> tuple[nn.Module, Tensor]:
    """A model of one layer, the same each time, and an input of the layer."""
    make, size = (LAYERS | NORMS)[kind]
    torch.manual_seed(2)
    layer = make()
    for parameter in layer.parameters():
        parameter.data = torch.randn(parameter.shape) * 0.3
    return nn.ModuleDict({"block": nn.ModuleDict({"layer": layer})}), torch.randn(size)


def network_of(model: nn.Module, name: str) -> Any:
    """A network of LyCORIS over the layer.

    Raises:
        Refused: LyCORIS has no module for it.
    """
    algorithm = name.split()[0]
    LycorisNetwork.apply_preset({"target_module": [], "target_name": ["block.layer"], "lora_prefix": "lycoris"})
    torch.manual_seed(0)
    kind = "lora" if algorithm == "norm" else algorithm
    try:
        network = LycorisNetwork(model, 1.0, network_module=kind, **_RANKS | ALGORITHMS[name])
    except (RuntimeError, TypeError, ValueError, AssertionError) as error:
        raise Refused(str(error)) from error
    if len(network.loras) != 1 or network.loras[0].not_supported:
        raise Refused("no module")
    return network


@torch.no_grad()
def trained(model: nn.Module, name: str, x: Tensor, path: Path) -> Tensor:
    """What LyCORIS's forward gives with every trained tensor moved; the network is saved to `path`.

    Raises:
        Refused: LyCORIS cannot do it.
    """
    network = network_of(model, name)
    (lora,), layer = network.loras, model["block"]["layer"]  # type: ignore[index]
    network.apply_to()
    network.eval()
    torch.manual_seed(1)
    for parameter in lora.parameters():
        parameter.data = parameter.data + 0.3 * torch.randn(parameter.shape)
    try:
        if name.startswith(
            "dylora"
        ):  # Each call draws a rank, and a scale with it: this is the call that draws all of it.
            lora.get_random_rank_weight = lambda: lora.get_weight((lora.block_count - 1) * lora.block_size)
        y: Tensor = layer(x)
        network.save_weights(str(path), None, header(name))
    except (RuntimeError, TypeError, ValueError, AttributeError) as error:
        raise Refused(f"its forward: {error}") from error
    return y


def header(name: str) -> dict[str, str]:
    """The metadata that sd-scripts writes: the module, and its arguments as they stand on the command line."""
    words = {"weight_decompose": "dora_wd", "wd_on_out": "wd_on_output"}
    given = {"algo": name.split()[0].replace("norm", "lora"), **ALGORITHMS[name]}
    arguments = {words.get(key, key): str(value) for key, value in given.items() if "dim" not in key}
    return {"ss_network_module": "lycoris.kohya", "ss_network_args": json.dumps(arguments)}


@torch.no_grad()
def problems(kind: str, name: str, folder: Path) -> Iterator[str]:
    """What is not right about one case.

    Raises:
        Refused: LyCORIS cannot do it.
    """
    (model, x), path, base = model_of(kind), folder / "lycoris.safetensors", folder / "base.safetensors"
    save_file(model.state_dict(), base, {"format": "pt"})
    plain = model.block.layer(x)
    wanted = trained(model, name, x, path)
    if float((wanted - plain).abs().max()) < 1e-3 * float(plain.abs().max()):
        raise Refused("it changes next to nothing")
    try:
        adapter = ak.read(path, base=base)
        live = model_of(kind)[0]
        ak.torch.inject(live, adapter)
        yield from _compared("injected", live.block.layer(x), wanted)
        if kind != REFLECT:  # A file of weights does not tell how its convolutions pad.
            yield from _merged(kind, adapter, folder, x, wanted)
        ak.write(adapter, folder / "back.safetensors", "lycoris", base=base)
        yield from _same_files(path, folder / "back.safetensors")
        yield from _loaded(kind, adapter.replace(foreign=None), folder, x, wanted)
    except AdapterkitError as error:
        yield f"REFUSED {type(error).__name__}: {error}"


def save(folder: Path) -> None:
    """Write the files of VECTORS: of each the adapter, and the base beside an input and LyCORIS's own output."""
    folder.mkdir(parents=True, exist_ok=True)
    for case in VECTORS:
        name, kind = case.split(", ")
        (model, x), stem = model_of(kind), case.replace(", ", "-").replace(" ", "_")
        held = {**model.state_dict(), "x": x}
        y = trained(model, name, x, folder / f"{stem}.adapter.safetensors")
        save_file({**held, "y": y}, folder / f"{stem}.forward.safetensors", {"format": "pt", "layer": kind})


def _merged(kind: str, adapter: ak.Adapter, folder: Path, x: Tensor, wanted: Tensor) -> Iterator[str]:
    try:
        ak.merge(folder / "base.safetensors", adapter, folder / "merged.safetensors")
    except NotMergeable as error:
        yield f"REFUSED merge: {error}"
        return
    merged = model_of(kind)[0]
    merged.load_state_dict(load_file(folder / "merged.safetensors"))
    yield from _compared("merged", merged.block.layer(x), wanted)


def _compared(what: str, got: Tensor, wanted: Tensor) -> Iterator[str]:
    error = float((got.double() - wanted.double()).abs().max() / wanted.double().abs().max())
    if not error <= TOLERANCE:
        yield f"WRONG {what}: {error:.1e}"


def _same_files(one: Path, other: Path) -> Iterator[str]:
    with safe_open(one, "pt") as a, safe_open(other, "pt") as b:
        if a.metadata() != b.metadata():
            yield "WRONG written back: the metadata differ"
    a, b = load_file(one), load_file(other)
    same = {k for k in a.keys() & b.keys() if a[k].dtype == b[k].dtype and torch.equal(a[k], b[k])}
    differing = sorted((a.keys() | b.keys()) - same)
    if differing:
        yield f"WRONG written back: {', '.join(differing)} differ"


def _loaded(kind: str, adapter: ak.Adapter, folder: Path, x: Tensor, wanted: Tensor) -> Iterator[str]:
    """Whether LyCORIS computes the same with a file that adapterkit writes anew."""
    model, path = model_of(kind)[0], folder / "new.safetensors"
    try:
        ak.write(adapter, path, "lycoris", base=folder / "base.safetensors")
    except Unrepresentable as error:
        yield f"LOADER not written anew: {error.items[0]}"
        return
    try:
        network, _ = create_lycoris_from_weights(1.0, str(path), model)
        network.apply_to()
        network.eval()
        y = model.block.layer(x)
    except (RuntimeError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        yield f"LOADER of LyCORIS fails on it: {type(error).__name__}: {str(error)[:80]}"
        return
    for line in _compared("loaded by LyCORIS", y, wanted):
        yield line.replace("WRONG", "LOADER")


MARKS = {"": "ok", "REFUSED": "refused", "WRONG": "WRONG", "LOADER": "ok, but"}
"""First word of the worst line of a case -> what the table says."""


def main() -> int:
    """Runs every case; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-k", default="", help="only algorithms whose name contains this")
    parser.add_argument("--json", type=Path, help="write the failed cases to this file")
    parser.add_argument("--save", type=Path, help="only write the vectors of tests/data/lycoris to this folder")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    if args.save:
        save(args.save)
        return 0
    bad, rows, counts = {}, {}, dict.fromkeys((*MARKS.values(), "!"), 0)
    for name in ALGORITHMS:
        if args.k not in name:
            continue
        for kind in NORMS if name.startswith("norm") else LAYERS:
            with tempfile.TemporaryDirectory() as folder:
                try:
                    lines = list(problems(kind, name, Path(folder)))
                    words = {line.split()[0] for line in lines}
                    worst = next(word for word in ("WRONG", "REFUSED", "LOADER", "") if word in words or not word)
                    mark = MARKS[worst]
                except Refused as refused:
                    lines, mark = [f"! {refused}"], "!"
            counts[mark] += 1
            rows.setdefault(name, {})[kind] = mark
            if lines:
                bad[f"{name}, {kind}"] = lines
    for case, lines in bad.items():
        print(case, *lines, sep="\n    ")
    print()
    for name, row in rows.items():
        print(f"{name:26}", "  ".join(f"{kind}: {mark}" for kind, mark in row.items()))
    if args.json:
        args.json.write_text(json.dumps(bad, indent=1))
    print(f"\n{sum(counts.values())} cases:", ", ".join(f"{count} {mark}" for mark, count in counts.items()))
    wrong = [case for case, lines in bad.items() if any(line.startswith("WRONG") for line in lines)]
    refused = [case for case, lines in bad.items() if any(line.startswith("REFUSED") for line in lines)]
    return int(bool(wrong) or any(not {case, *case.split(", ")} & LACKING.keys() for case in refused))


if __name__ == "__main__":
    sys.exit(main())
