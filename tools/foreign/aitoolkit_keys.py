"""Writes spec/loaders/ai_toolkit.toml: the keys that ai-toolkit's network writes and loads.

    python tools/foreign/aitoolkit_keys.py CHECKOUT            write the file
    python tools/foreign/aitoolkit_keys.py CHECKOUT --check    compare; exits 1 on a difference

CHECKOUT is a folder with ai-toolkit's source; the script needs einops. The trainer's models are created with few blocks
and without memory for weights (torch's meta device). ai-toolkit's `LoRASpecialNetwork` adapts all modules. The keys of
its `get_state_dict`, which are those of its files, must be names in spec/architectures. A slot is listed if
`load_weights` restores it. Empty modules replace those imports of the trainer that no network needs.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import logging
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

from comfyui_keys import is_norm
from loader_tables import exceptions, quoted, write_or_compare
from trainer_keys import ABSENT, Absent

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / "spec" / "loaders" / "ai_toolkit.toml"
EXTENSIONS = "extensions_built_in"
TWO = {"num_layers": 2, "num_single_layers": 2}

Make = Callable[[], Any]


def _diffusers(name: str, **config: Any) -> Make:
    def make() -> Any:
        import diffusers

        return getattr(diffusers, name)(**config)

    return make


def _own(module: str, name: str, params: str = "", **config: Any) -> Make:
    """A class of the trainer, or one whose only argument is a record of parameters."""

    def make() -> Any:
        source = importlib.import_module(f"{EXTENSIONS}.{module}")
        if not params:
            return getattr(source, name)(**config)
        record = getattr(source, params)
        if isinstance(record, type):
            return getattr(source, name)(record(**config))
        import dataclasses

        return getattr(source, name)(dataclasses.replace(record, **config))

    return make


DEPTHS = {"depth": 2, "depth_single_blocks": 2}
KREA = {"features": 96, "tdim": 32, "txtdim": 32, "heads": 4, "multiplier": 4, "layers": 2, "patch": 2, "channels": 16,
        "txtheads": 4, "txtkvheads": 4, "txtlayers": 2}  # fmt: skip
HIDREAM = {"num_layers": 2, "num_single_layers": 2, "caption_channels": [32, 32], "num_routed_experts": 2,
           "num_activated_experts": 1, "llama_layers": [0, 1, 2, 3], "patch_size": 2}  # fmt: skip

MODELS: dict[str, tuple[str, Make, dict[str, Any]]] = {
    "sd3": ("", _diffusers("SD3Transformer2DModel", num_layers=3, dual_attention_layers=(0,)), {"is_v3": True}),
    "flux": ("", _diffusers("FluxTransformer2DModel", **TWO, guidance_embeds=True), {"is_flux": True}),
    "lumina2": ("", _diffusers("Lumina2Transformer2DModel", num_layers=2), {"is_lumina2": True}),
    "flux2": ("diffusion_models.flux2.flux2_model.Flux2Model",
              _own("diffusion_models.flux2.src.model", "Flux2", "Flux2Params", **DEPTHS), {}),
    "chroma": ("diffusion_models.chroma.chroma_model.ChromaModel",
               _own("diffusion_models.chroma.src.model", "Chroma", "chroma_params", **DEPTHS), {}),
    "qwen_image": ("diffusion_models.qwen_image.qwen_image.QwenImageModel",
                   _diffusers("QwenImageTransformer2DModel", num_layers=2), {}),
    "z_image": ("diffusion_models.z_image.z_image.ZImageModel", _diffusers("ZImageTransformer2DModel", n_layers=2), {}),
    "wan": ("toolkit.models.wan21.wan21.Wan21", _diffusers("WanTransformer3DModel", num_layers=2), {}),
    "hidream": ("diffusion_models.hidream.hidream_model.HidreamModel",
                _diffusers("HiDreamImageTransformer2DModel", **HIDREAM), {}),
    "ltx2": ("diffusion_models.ltx2.ltx2.LTX2Model", _diffusers("LTX2VideoTransformer3DModel", num_layers=2), {}),
    "krea2": ("diffusion_models.krea2.krea2.Krea2Model",
              _own("diffusion_models.krea2.src.mmdit", "SingleStreamDiT", "SingleMMDiTConfig", **KREA), {}),
    "ernie_image": ("diffusion_models.ernie_image.ernie_image.ErnieImageModel",
                    _own("diffusion_models.ernie_image.transformer", "ErnieImageTransformer2DModel", num_layers=2), {}),
    "cosmos": ("diffusion_models.anima.anima.AnimaModel", _diffusers("CosmosTransformer3DModel", num_layers=2), {}),
}  # fmt: skip
"""Family -> the trainer's model, if it converts keys; the transformer; the network's arguments."""

SPELLINGS = [("transformer.", "diffusers"), ("transformer.", "native"), ("diffusion_model.", "native"),
             ("diffusion_model.", "comfyui"), ("diffusion_model.", "diffusers")]  # fmt: skip
"""What keys begin with, and the naming that follows; the first one that has all names counts."""


def network(family: str, kind: str = "lora") -> tuple[Any, Any]:
    """The trainer's network on all modules of a model, and the model that converts its keys; both must be kept."""
    import torch

    special = importlib.import_module("toolkit.lora_special")
    config = importlib.import_module("toolkit.config_modules").NetworkConfig(type=kind, rank=2)
    where, make, flags = MODELS[family]
    with torch.device("meta"):
        transformer = make()
    base = None
    if where:
        module, _, name = where.rpartition(".")
        module = module if module.startswith("toolkit.") else f"{EXTENSIONS}.{module}"
        base = _converter(getattr(importlib.import_module(module), name))
    with torch.device("meta" if kind == "lora" else "cpu"), contextlib.redirect_stdout(io.StringIO()):
        made = special.LoRASpecialNetwork(
            [], transformer, lora_dim=config.linear, alpha=config.linear_alpha, train_text_encoder=False,
            network_type=kind, network_config=config, target_lin_modules=[type(transformer).__name__],
            is_transformer=bool(where), base_model=base, **flags,
        )  # fmt: skip
        made.apply_to([], transformer, False, True)
    return made, (transformer, base)


def _converter(model: Any) -> Any:
    """A model of the trainer that only converts keys."""
    base = object.__new__(model)
    base.use_old_lokr_format = False
    return base


def written(family: str) -> list[str]:
    """The names of all modules in a file of this family, with their prefix."""
    made, _kept = network(family)
    ends = (".lora_A.weight", ".lora_B.weight")
    with _on_meta():
        keys = [key for key in made.get_state_dict() if key.endswith(ends)]
    return list(dict.fromkeys(key.rpartition(".lora_")[0] for key in keys))


@contextlib.contextmanager
def _on_meta() -> Iterator[None]:
    """Let weights without memory go through `.to("cpu")`, as the trainer does with what it saves."""
    import torch

    to = torch.Tensor.to
    torch.Tensor.to = lambda self, *given, **named: self if self.is_meta else to(self, *given, **named)
    try:
        yield
    finally:
        torch.Tensor.to = to


def held() -> tuple[dict[tuple[str, str], dict[str, tuple[list[str], list[str]]]], dict[str, list[str]]]:
    """Spelling -> family -> its modules there, and those that no file has; family -> names that are not known."""
    from adapterkit.naming.image import families

    known = {family.name: family for family in families()}
    found: dict[tuple[str, str], dict[str, tuple[list[str], list[str]]]] = {}
    lost: dict[str, list[str]] = {}
    for name in MODELS:
        family, stems = known[name], written(name)
        left = set(stems)
        while left:
            # Of Wan, the trainer renames the modules of blocks alone.
            best = max(SPELLINGS, key=lambda spelling: len(_names(family, left, *spelling)))
            names = _names(family, left, *best)
            if not names:
                lost[name] = sorted(left)
                break
            prefix, naming = best
            wanted = family.wanted(naming)
            weights = family.architecture.record.weights
            here = {place.name for rest in names for _, place, _ in family.architecture.find(rest, wanted)}
            places = (family.architecture.place(weight, wanted) for weight in weights)
            every = list(dict.fromkeys(each.name for each in places if each and not is_norm(each.name)))
            found.setdefault(best, {})[name] = (every, [each for each in every if each not in here])
            left -= {prefix + rest for rest in names}
    return found, lost


def _names(family: Any, stems: set[str], prefix: str, naming: str) -> set[str]:
    """The stems that are this spelling of modules, without the prefix."""
    if family.wanted(naming) not in family.namings:
        return set()
    rests = {stem.removeprefix(prefix) for stem in stems if stem.startswith(prefix)}
    return {rest for rest in rests if rest in family.names(naming)}


def slots() -> list[str]:
    """Slots of a module that come back into the trainer's network from a file that it wrote."""
    import torch

    # The trainer asks whether a weight is one of these.
    for module in ("models.DoRA", "models.lokr", "network_mixins", "lora_special"):
        source = importlib.import_module(f"toolkit.{module}")
        for name in ("QTensor", "QBytesTensor", "AffineQuantizedTensor"):
            setattr(source, name, type(name, (), {}))
    back: dict[str, None] = {}
    special = importlib.import_module("toolkit.lora_special")
    config = importlib.import_module("toolkit.config_modules").NetworkConfig
    for kind, more in (("lora", {}), ("dora", {}), ("lokr", {}), ("lokr", {"lokr_full_rank": False})):
        settings = config(type=kind, rank=2, **more)
        block = type("Small", (torch.nn.Module,), {})()
        block.blocks = torch.nn.Linear(64, 64)
        given = {"lora_dim": settings.linear, "alpha": settings.linear_alpha, "train_text_encoder": False,
                 "network_type": kind, "network_config": settings, "target_lin_modules": ["Small"],
                 "is_transformer": True, "use_bias": True}  # fmt: skip
        with contextlib.redirect_stdout(io.StringIO()):
            first, second = (special.LoRASpecialNetwork([], block, **given) for _ in range(2))
            for each in (first, second):
                each.apply_to([], block, False, True)
            state = {key: torch.rand(value.shape) for key, value in first.state_dict().items()}
            first.load_state_dict(state)
            file = first.get_state_dict(dtype=torch.float32)
            second.load_weights(dict(file))
        for key, value in second.state_dict().items():
            slot = next(
                (each.rpartition("blocks.")[2] for each in file if each.replace("$$", ".") == _renamed(key)), ""
            )
            if slot and torch.equal(value.float(), state[key].float()):
                back[slot] = None
    return list(back)


def _renamed(key: str) -> str:
    return key.replace("$$", ".").replace("lora_down", "lora_A").replace("lora_up", "lora_B")


HEAD = """\
# Made by tools/foreign/aitoolkit_keys.py and reviewed. README.md beside this file says what each field means.
format = 1
title = "ai-toolkit"
url = "https://github.com/ostris/ai-toolkit"
version = "27a03a9 (2026)"
sources = ["toolkit/lora_special.py", "toolkit/network_mixins.py", "extensions_built_in/diffusion_models"]
convert = ["diffusers", "comfyui"]"""


def toml() -> str:
    """The file's text."""
    found, lost = held()
    for name, stems in lost.items():
        print(f"{name}: {len(stems)} names that spec/architectures lacks: {', '.join(stems[:4])}", file=sys.stderr)
    lines = [HEAD, f"slots = {quoted(slots())}", 'unread = "sets them aside without a message"', ""]
    for (prefix, naming), each in found.items():
        lines += ["[[keys]]", f'prefix = "{prefix}"', f'naming = "{naming}"', f"families = {quoted(each)}"]
        lines += exceptions(each)
    return "\n".join(lines)


def main() -> int:
    """Write or check the file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    sys.path[:0] = [str(ROOT), str(arguments.checkout)]
    # What the trainer imports of these must not find the empty modules.
    import diffusers  # noqa: F401
    from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel  # noqa: F401
    from transformers import CLIPTextModel, Gemma2Model, Qwen3Model, T5EncoderModel  # noqa: F401

    ABSENT.update({
        "torchaudio", "optimum", "torchao", "lpips", "k_diffusion", "controlnet_aux", "mutagen", "oyaml", "dotenv",
        "timm", "flatten_json", "pytorch_fid", "pytorch_wavelets", "hf_transfer", "librosa", "soundfile", "matplotlib",
        "torchcodec", "vector_quantize_pytorch",
    })  # fmt: skip
    sys.meta_path.insert(0, Absent())
    sys.modules["diffusers.pipelines.ltx2.export_utils"] = MagicMock()
    # The packages import all models; each is imported for itself here.
    for name in ("diffusion_models", "audio_models"):
        package = types.ModuleType(f"{EXTENSIONS}.{name}")
        package.__path__ = [str(arguments.checkout / EXTENSIONS / name)]
        sys.modules[package.__name__] = package
    return write_or_compare(OUT, toml(), check=arguments.check)


if __name__ == "__main__":
    sys.exit(main())
