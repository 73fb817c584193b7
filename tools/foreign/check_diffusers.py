"""Check files that adapterkit writes for diffusers with diffusers' loaders, for each kind of file that they load.

    python tools/foreign/check_diffusers.py [WORD...]      kinds whose names contain a WORD (default: all)
    python tools/foreign/check_diffusers.py --large ...    models of the published width are loaded, too (2 GB each)

For each kind in diffusers_kinds.toml, the script writes a file of random factors for a small random model of the kind's
class. diffusers (0.42.1) loads this file, and the file that `adapterkit convert --to diffusers` makes of it. The
changes of all modules must be the same within 1e-6, and every layer's output must be that of the formula within 1e-5.
The script prints a line for each kind, and exits with 1 if one differs or is refused.
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
import tempfile
import tomllib
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.loaders import lora_pipeline
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parents[1])]

import adapterkit as ak  # noqa: E402 - the checkout's own, installed or not
from adapterkit.formats._image.deciding import origin_of  # noqa: E402
from adapterkit.formats._image.translate import in_diffusers  # noqa: E402
from adapterkit.io.lazy import as_torch  # noqa: E402
from adapterkit.methods.lora import LoRA  # noqa: E402
from adapterkit.naming.image import ImageFamily, families  # noqa: E402

CHANGES, OUTPUTS = 1e-6, 1e-5
FAMILIES = {family.name: family for family in families()}
RANK = 4


@dataclass(frozen=True)
class Kind:
    """One kind of file; diffusers_kinds.toml says what each field means."""

    name: str
    loader: str
    model: str
    by: str = ""
    prefix: str = ""
    naming: str = "diffusers"
    ends: str = "peft"
    alpha: float | None = None
    only: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    form: str = "lora"
    fault: str = ""
    encoders: Mapping[str, str] = field(default_factory=dict)
    added: Mapping[str, str] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def mixin(self) -> Any:
        return getattr(lora_pipeline, f"{self.loader}LoraLoaderMixin")


def read_kinds() -> tuple[list[Kind], dict[str, dict[str, Any]], dict[str, list[str]]]:
    """Return the kinds, the models, and the slots by name."""
    data = tomllib.loads((HERE / "diffusers_kinds.toml").read_text())
    kinds = []
    for fields in data["kinds"]:
        unet = fields["model"].startswith("unet")
        whole = {"prefix": ("unet." if unet else "transformer."), **fields}
        kinds.append(Kind(**{key: tuple(v) if isinstance(v, list) else v for key, v in whole.items()}))
    return kinds, data["models"], data["ends"]


KINDS, MODELS, ENDS = read_kinds()


def main() -> int:
    """Run the kinds that were asked for; return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("words", nargs="*")
    parser.add_argument("--large", action="store_true")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    diffusers.logging.set_verbosity_error()
    failed = 0
    for kind in KINDS:
        if arguments.words and not any(word.lower() in kind.name.lower() for word in arguments.words):
            continue
        try:
            print(f"ok      {kind.name}: {checked(kind, large=arguments.large)}", flush=True)
        except Exception as error:  # One kind that fails must not stop the others.
            failed += 1
            print(f"WRONG   {kind.name}: {type(error).__name__}: {str(error)[:400]}", flush=True)
    return int(bool(failed))


class Different(Exception):
    """What was written is not what diffusers makes of the file."""


def checked(kind: Kind, *, large: bool = False) -> str:
    """Check one kind; return what was compared.

    Raises:
        Different: a module is missing, or another; a change or an output differs.
        AdapterkitError: the file is refused.
    """
    about = MODELS[kind.model]
    model = made(about)
    state = file_of(kind, model)
    with tempfile.TemporaryDirectory() as folder:
        path, there = Path(folder, "file.safetensors"), Path(folder, "out")
        save_file(state, path, dict(kind.metadata) or None)
        told = {"family": about["family"]} if about.get("name_it") else {}
        adapter = ak.read(path, **told)
        # A LoKr has no alpha in diffusers' files; diffusers multiplies a factor by it, which rounds.
        ak.write(adapter, there, format="diffusers", on_loss="fold" if kind.form == "lokr" else "refuse")
        theirs, ours = loaded(kind, path, model), loaded(kind, there, model)
        texts = f", {', '.join(kind.encoders.values())}" if kind.encoders else ""
        if kind.form == "bfl":
            texts += f", {check_back(there, state)} tensors back"
        read = read_changes(adapter, kind)
    worst = compared(state_changes(theirs, kind), state_changes(ours, kind))
    worst = max(worst, compared(state_changes(theirs, kind), read, all_of_them=False))
    if large and about.get("live"):
        # All blocks at their width take 48 GB; the first of each kind shows what the loader computes.
        about = MODELS[about["live"]]
        model = made(about)
        theirs, ours = first_blocks(theirs, model), first_blocks(ours, model)
    live = not about.get("meta") and (large or not about.get("large"))
    if not live:
        return f"{len(state_changes(theirs, kind))} modules, changes {worst:.0e}{texts}"
    one, _ = live_changes(kind, model, theirs)
    two, outputs = live_changes(kind, model, ours)
    worst = max(worst, compared(one, two))
    if outputs > OUTPUTS:
        raise Different(f"outputs differ from the formula by {outputs:.1e}")
    return f"{len(one)} layers, changes {worst:.0e}, outputs {outputs:.0e}{texts}"


def check_back(there: Path, state: Mapping[str, Tensor]) -> int:
    """Write what was written for diffusers in BFL's format again; return how many tensors are as they were.

    Raises:
        Different: a tensor is missing or another, or differs.
    """
    back = there.parent / "back.safetensors"
    ak.write(ak.read(there), back, format="bfl_control")
    held = load_file(back)
    odd = [key for key in held.keys() | state.keys() if key not in held or not torch.equal(held[key], state[key])]
    if odd:
        raise Different(f"{len(odd)} tensors come back otherwise, {sorted(odd)[:3]}")
    return len(held)


def first_blocks(found: Loaded, model: nn.Module) -> Loaded:
    """Return the LoRAs of the modules that a model with fewer blocks has."""
    modules = {path for path, _ in model.named_modules()}
    kept = {}
    for key, value in found.state.items():
        path, _, slot = key.removeprefix("transformer.").partition(".lora_")
        if slot and path in modules:
            kept[key] = value
    return Loaded(kept, found.alphas, found.metadata)


def made(about: Mapping[str, Any]) -> nn.Module:
    """Return a random model; on the device meta where only its shapes matter."""
    torch.manual_seed(0)
    kind = getattr(diffusers, about["class"])
    if about.get("meta"):
        with torch.device("meta"):
            return kind(**about["config"])  # type: ignore[no-any-return]
    return kind(**about["config"]).eval()  # type: ignore[no-any-return]


def file_of(kind: Kind, model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of a file of a kind."""
    rng = torch.Generator().manual_seed(1)
    modules = modules_of(kind, model)
    state = dict[str, Tensor]()
    for path, shape in modules.items():
        state |= tensors_of(kind, path, shape, rng)
    for prefix in kind.encoders:
        for path, (out, columns) in CLIP.items():
            stem = prefix + path.replace(".", "_")
            state |= pair(stem, ENDS[kind.ends], (out, columns), rng, kind.alpha)
    if kind.form == "bfl":
        for path, module in model.named_modules():
            for piece in FAMILIES["flux"].moves(path, "diffusers", "native") if path.endswith(NORMS) else ():
                state[f"{piece.path}.scale"] = torch.randn(module.weight.shape, generator=rng)
    for path in kind.added:
        state |= pair(path, ENDS[kind.ends], (8, 8), rng, kind.alpha)
    return state


NORMS = ("norm_q", "norm_k", "norm_added_q", "norm_added_k")

CLIP = {
    f"text_model.encoder.layers.0.{name}": shape
    for name, shape in {
        "self_attn.q_proj": (32, 32), "self_attn.k_proj": (32, 32), "self_attn.v_proj": (32, 32),
        "self_attn.out_proj": (32, 32), "mlp.fc1": (64, 32), "mlp.fc2": (32, 64),
    }.items()
}  # fmt: skip


def modules_of(kind: Kind, model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the modules of a file under their names there -> the shapes of their weights."""
    found = dict[str, tuple[int, ...]]()
    family = FAMILIES.get(MODELS[kind.model]["family"])
    unet = kind.model.startswith("unet")
    for path, module in model.named_modules():
        if not isinstance(module, (nn.Linear, nn.Conv2d) if unet else nn.Linear):
            continue
        shape = tuple(module.weight.shape)
        for name, whole in names_of(kind, family, path, shape):
            known = found.setdefault(name, whole)
            if known != whole:
                raise ValueError(f"{name} is {known} and {whole}")
    return {path: shape for path, shape in found.items() if held(kind, path)}


def names_of(
    kind: Kind, family: ImageFamily | None, path: str, shape: tuple[int, ...]
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the modules of the file's naming that hold a module of diffusers, each with the shape of its weight."""
    if kind.naming == "diffusers":
        yield path, shape
    else:
        assert family is not None
        for piece in family.moves(path, "diffusers", kind.naming, shape[0] / shape[1]):
            rows = shape[0] * piece.here.parts // piece.here.of
            yield piece.path, (rows * piece.there.of // piece.there.parts, *shape[1:])


def held(kind: Kind, path: str) -> bool:
    """Whether the function that converts a kind knows a module."""
    inside = not kind.only or any(re.search(each, path) for each in kind.only)
    return inside and not any(re.search(each, path) for each in kind.without)


def tensors_of(kind: Kind, path: str, shape: tuple[int, ...], rng: torch.Generator) -> dict[str, Tensor]:
    """Return the tensors of one module."""
    stem = kind.prefix + (path.replace(".", "_") if kind.prefix.endswith("_") else path)
    if kind.form == "lokr":
        return lokr(stem, shape, rng, kind.alpha)
    if kind.form == "xlabs":
        return xlabs(kind.prefix, path, shape, rng)
    if kind.form == "processors":
        found = re.fullmatch(r"(.*attn[12])\.(to_[qkv]|to_out)(\.0)?", stem)
        if found is None:
            return {}
        stem = f"{found[1]}.processor.{found[2]}_lora"
        return pair(stem, ["down.weight", "up.weight"], shape, rng, None)
    made = pair(stem, ENDS[kind.ends], shape, rng, kind.alpha)
    if kind.form == "biases":
        made[f"{stem}.diff_b"] = torch.randn(shape[0], generator=rng)
    if kind.form == "bfl":
        made[f"{stem}.lora_B.bias"] = torch.randn(shape[0], generator=rng)
    return made


def pair(
    stem: str, ends: list[str], shape: tuple[int, ...], rng: torch.Generator, alpha: float | None
) -> dict[str, Tensor]:
    """Return a LoRA of a module: A has the kernel of a convolution, B is 1 x 1 there."""
    ones = (1,) * (len(shape) - 2)
    made = {
        f"{stem}.{ends[0]}": torch.randn((RANK, *shape[1:]), generator=rng),
        f"{stem}.{ends[1]}": torch.randn((shape[0], RANK, *ones), generator=rng),
    }
    return made if alpha is None else {**made, f"{stem}.alpha": torch.tensor(alpha)}


def xlabs(prefix: str, path: str, shape: tuple[int, ...], rng: torch.Generator) -> dict[str, Tensor]:
    """Return a LoRA of an attention's projection under the names of XLabs' processors; nothing for other modules."""
    found = re.fullmatch(r"(double|single)_blocks\.(\d+)\.(?:(img|txt)_attn\.)?(qkv|proj|linear1)", path)
    if found is None:
        return {}
    if found[1] == "single":
        # The processor adds queries, keys and values alone, the first three of the seven parts.
        return pair(f"{prefix}single_blocks.{found[2]}.processor.qkv_lora", ["down.weight", "up.weight"],
                    (shape[0] // 7 * 3, shape[1]), rng, None)  # fmt: skip
    number = 1 if found[3] == "img" else 2
    stem = f"{prefix}double_blocks.{found[2]}.processor.{found[4]}_lora{number}"
    return pair(stem, ["down.weight", "up.weight"], shape, rng, None)


def lokr(stem: str, shape: tuple[int, ...], rng: torch.Generator, alpha: float | None) -> dict[str, Tensor]:
    """Return a LoKr of a module: the first factor is 4 x 4, the second of low rank."""
    made = {
        f"{stem}.lokr_w1": torch.randn((4, 4), generator=rng),
        f"{stem}.lokr_w2_a": torch.randn((shape[0] // 4, 2), generator=rng),
        f"{stem}.lokr_w2_b": torch.randn((2, shape[1] // 4), generator=rng),
    }
    return made if alpha is None else {**made, f"{stem}.alpha": torch.tensor(alpha)}


@dataclass
class Loaded:
    """What a loader makes of a file: its state dict, alphas beside it, and the header's config."""

    state: dict[str, Tensor]
    alphas: Any = None
    metadata: Any = None


def loaded(kind: Kind, path: Path, model: nn.Module) -> Loaded:
    """Return what diffusers' loader makes of a file or a folder."""
    loader = kind.mixin
    known = inspect.signature(loader.lora_state_dict).parameters
    asked: dict[str, Any] = {"return_lora_metadata": True}
    if "return_alphas" in known:
        asked["return_alphas"] = True
    if kind.model.startswith("unet") and hasattr(model.config, "layers_per_block"):
        asked["unet_config"] = model.config
    found = loader.lora_state_dict(str(path), **asked)
    if len(found) == 3:
        return Loaded(dict(found[0]), found[1], found[2])
    return Loaded(dict(found[0]), None, found[1])


def state_changes(made: Loaded, kind: Kind) -> dict[str, Tensor]:
    """Return module -> its change, as far as the state dict alone tells it, applied to a few vectors."""
    found = dict[str, Tensor]()
    for key, value in made.state.items():
        for a, b in (
            (".lora_A.weight", ".lora_B.weight"), (".lora.down.weight", ".lora.up.weight"),
            ("_lora.down.weight", "_lora.up.weight"),
            (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
        ):  # fmt: skip
            if key.endswith(a):
                module = key.removesuffix(a)
                up = made.state[module + b]
                scale = _scale(made, module, key, len(value))
                name = module.replace(".processor.", ".")
                name = f"{name}.0" if name.endswith(".to_out") and ".processor." in module else name
                found[name] = _probed(up.flatten(1).double(), value.flatten(1).double()) * scale
        if key.endswith((".lora_B.bias", "norm_q.weight", "norm_k.weight", "added_q.weight", "added_k.weight")):
            found[key] = value.double()
    return {_as_clip(n): change for n, change in found.items() if not (kind.fault and re.search(kind.fault, n))}


def _as_clip(name: str) -> str:
    """Return a text encoder's module under the name that diffusers' loader gives it before it loads it."""
    if not name.startswith("text_encoder"):
        return name
    for word, other in (("to_q", "q_proj"), ("to_k", "k_proj"), ("to_v", "v_proj"), ("to_out", "out_proj")):
        name = name.replace(f".self_attn.{word}", f".self_attn.{other}")
    return name


def read_changes(adapter: ak.Adapter, kind: Kind) -> dict[str, Tensor]:
    """Return the same by the formulas of what adapterkit read, of LoRAs in diffusers' names."""
    found = dict[str, Tensor]()
    for target, updates in in_diffusers(adapter.updates, (), origin_of(adapter, None))[0].items():
        for update in updates:
            if isinstance(update, LoRA) and not (kind.fault and re.search(kind.fault, target.path)):
                A, B = (as_torch(leaf).flatten(1).double() for leaf in (update.A, update.B))
                found[target.path] = _probed(B, A) * update.scaling
    return found


def _scale(made: Loaded, module: str, key: str, rank: int) -> float:
    alphas = made.alphas or {}
    names = (f"{module}.alpha", f"{key}.alpha", f"{key.removesuffix('.weight')}.alpha")
    alpha = next((alphas[name] for name in names if name in alphas), None)
    if alpha is None and made.metadata:
        part, _, name = module.partition(".")
        pattern = made.metadata.get(f"{part}.alpha_pattern") or {}
        own = next((value for word, value in pattern.items() if re.fullmatch(rf"(.*\.)?{word}", name)), None)
        alpha = made.metadata.get(f"{part}.lora_alpha") if own is None else own
    return 1.0 if alpha is None else float(alpha) / rank


def _probed(up: Tensor, down: Tensor) -> Tensor:
    """Return up @ down, or its products with a few vectors where it is large."""
    if up.shape[0] * down.shape[1] <= 1 << 20:
        return up @ down
    vectors = torch.randn((down.shape[1], 4), generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return up @ (down @ vectors)


def compared(theirs: Mapping[str, Tensor], ours: Mapping[str, Tensor], *, all_of_them: bool = True) -> float:
    """Return the largest relative difference of changes.

    Raises:
        Different: a module is missing or another, or a change differs.
    """
    if not theirs and not ours:
        return 0.0
    if not all_of_them:
        theirs = {name: change for name, change in theirs.items() if name in ours}
    if theirs.keys() != ours.keys():
        lacking, more = sorted(theirs.keys() - ours.keys()), sorted(ours.keys() - theirs.keys())
        raise Different(f"{len(lacking)} modules lack, {lacking[:3]}; {len(more)} are others, {more[:3]}")
    worst = 0.0
    for name, wanted in theirs.items():
        size = float(wanted.abs().max()) or 1.0
        error = float((ours[name] - wanted).abs().max()) / size
        if not error <= CHANGES:
            raise Different(f"{name} differs by {error:.1e}")
        worst = max(worst, error)
    return worst


def live_changes(kind: Kind, model: Any, made: Loaded) -> tuple[dict[str, Tensor], float]:
    """Load a state dict into the model; return module -> its change, and the largest error of an output."""
    fused = any(".to_qkv." in key or ".to_added_qkv." in key for key in made.state)
    if fused:
        model.fuse_qkv_projections()
    plain = {path: module for path, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))}
    _load(kind, model, made)
    found, worst = dict[str, Tensor](), 0.0
    for path, module in model.named_modules():
        if not isinstance(module, BaseTunerLayer):
            continue
        name = next(iter(module.active_adapters))
        change = module.get_delta_weight(name).detach().double()
        found[path] = change
        bias = getattr(module.lora_B[name], "bias", None) if hasattr(module, "lora_B") else None
        shift = None if bias is None else bias.detach().double() * module.scaling[name]
        if shift is not None:
            found[f"{path}.bias"] = shift
        worst = max(worst, _output_error(module, plain[path], change, shift))
    model.unload_lora()
    if fused:
        model.unfuse_qkv_projections()
    return found, worst


def _load(kind: Kind, model: Any, made: Loaded) -> None:
    loader, state = kind.mixin, dict(made.state)
    if kind.model.startswith("unet") and hasattr(loader, "load_lora_into_unet"):
        loader.load_lora_into_unet(state, network_alphas=made.alphas, unet=model, metadata=made.metadata)
        return
    known = inspect.signature(loader.load_lora_into_transformer).parameters
    more = {"network_alphas": made.alphas} if "network_alphas" in known else {}
    loader.load_lora_into_transformer(state, transformer=model, metadata=made.metadata, **more)


def _output_error(module: Any, base: Any, change: Tensor, shift: Tensor | None) -> float:
    """Return the relative error of a layer's output against W x + change x + shift."""
    torch.manual_seed(3)
    weight = base.weight.detach().double()
    size = (2, weight.shape[1], 5, 5) if weight.ndim == 4 else (3, weight.shape[1])
    x = torch.randn(size)
    bias = torch.zeros(len(weight)).double() if base.bias is None else base.bias.detach().double()
    bias = bias if shift is None else bias + shift
    with torch.no_grad():
        got = module(x).double()
        if weight.ndim == 4:
            wanted = nn.functional.conv2d(x.double(), weight + change, bias, base.stride, base.padding)
        else:
            wanted = nn.functional.linear(x.double(), weight + change, bias)
    return float((got - wanted).abs().max() / wanted.abs().max())


if __name__ == "__main__":
    sys.exit(main())
