"""Writes spec/vectors/formats/{lycoris,kohya,diffusers,xlabs,bfl_control}: files of real tools for image models.

    python tools/foreign/image_vectors.py [DEST]

lycoris: networks that lycoris-lora saved, on a tiny U-Net of diffusers. diffusers: adapters that diffusers' models and
pipelines saved, and one that its converter converted to kohya's names. Beside each file are

    expected.native.safetensors   the adapter, built by hand from what the tool's modules hold
    forward.safetensors           of each module: weight W, bias b, input x, and the tool's own output y

kohya/flux, xlabs and bfl_control: random tensors with the keys of these tools, which cannot be installed;
converted.safetensors beside them is the result of diffusers' converter. Run it in an environment with lycoris-lora
4.1.3 and diffusers 0.42.1.
"""

from __future__ import annotations

import copy
import inspect
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.loaders import lora_conversion_utils as converters
from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_kohya
from lycoris import LycorisNetwork
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn

import adapterkit as ak
from adapterkit.methods import METHODS

DEST = Path(__file__).resolve().parents[2] / "spec" / "vectors" / "formats"

Q = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
V = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_v"
FF = "down_blocks.0.attentions.0.transformer_blocks.0.ff.net.2"
CONV = "down_blocks.0.resnets.0.conv1"
NORM = "down_blocks.0.attentions.0.transformer_blocks.0.norm1"

Updates = dict[str, list[Any]]


def unet() -> nn.Module:
    """A small U-Net with attention in its outer level."""
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=4, block_out_channels=(8, 16), layers_per_block=2, cross_attention_dim=12, attention_head_dim=2,
        norm_num_groups=4, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip


LYCORIS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "locon": ({"algo": "lora", "linear_dim": 3, "linear_alpha": 2, "conv_dim": 2, "conv_alpha": 1.5}, [Q, FF, CONV]),
    "locon_tucker": (
        {"algo": "lora", "linear_dim": 3, "linear_alpha": 2, "conv_dim": 2, "conv_alpha": 3, "use_tucker": True},
        [Q, CONV],
    ),
    "locon_rs": ({"algo": "lora", "linear_dim": 3, "linear_alpha": 2, "rs_lora": True}, [Q, V]),
    "locon_half": ({"algo": "lora", "linear_dim": 3, "linear_alpha": 0.3}, [Q, V]),
    "dora": ({"algo": "lora", "linear_dim": 2, "linear_alpha": 3, "conv_dim": 2, "dora_wd": True}, [Q, V, CONV]),
    "dora_inputs": (
        {"algo": "lora", "linear_dim": 2, "linear_alpha": 3, "conv_dim": 2, "dora_wd": True, "wd_on_out": False},
        [Q, V, CONV],
    ),
    "loha_dora": (
        {"algo": "loha", "linear_dim": 2, "linear_alpha": 1, "conv_dim": 2, "conv_alpha": 1, "dora_wd": True},
        [Q, FF, CONV],
    ),
    "loha_dora_inputs": (
        {"algo": "loha", "linear_dim": 2, "linear_alpha": 1, "conv_dim": 2, "dora_wd": True, "wd_on_out": False},
        [Q, CONV],
    ),
    "lokr_dora": (
        {
            "algo": "lokr",
            "linear_dim": 1,
            "linear_alpha": 2,
            "conv_dim": 1,
            "conv_alpha": 3,
            "factor": 2,
            "dora_wd": True,
        },
        [Q, FF, CONV],
    ),
    "lokr_dora_inputs": (
        {"algo": "lokr", "linear_dim": 1000, "linear_alpha": 1, "factor": 2, "dora_wd": True, "wd_on_out": False},
        [Q, FF],
    ),
    "loha": ({"algo": "loha", "linear_dim": 2, "linear_alpha": 1, "conv_dim": 2, "conv_alpha": 1}, [Q, FF, CONV]),
    "loha_tucker": (
        {"algo": "loha", "linear_dim": 2, "linear_alpha": 1, "conv_dim": 2, "conv_alpha": 1, "use_tucker": True},
        [Q, CONV],
    ),
    "lokr": (
        {"algo": "lokr", "linear_dim": 1, "linear_alpha": 2, "conv_dim": 1, "conv_alpha": 3, "factor": 2},
        [Q, FF, CONV],
    ),
    "lokr_both": ({"algo": "lokr", "linear_dim": 1, "linear_alpha": 2, "factor": 4, "decompose_both": True}, [Q, FF]),
    "lokr_whole": ({"algo": "lokr", "linear_dim": 1000, "linear_alpha": 1, "factor": 2}, [Q, FF]),
    "lokr_tucker": (
        {
            "algo": "lokr",
            "linear_dim": 1,
            "linear_alpha": 1,
            "conv_dim": 1,
            "conv_alpha": 2,
            "factor": 2,
            "use_tucker": True,
        },
        [CONV],
    ),
    "diag_oft": ({"algo": "diag-oft", "linear_dim": 4, "conv_dim": 4}, [Q, FF, CONV]),
    "diag_oft_constraint": (
        {"algo": "diag-oft", "linear_dim": 4, "conv_dim": 4, "constraint": 0.01, "rescaled": True},
        [Q, CONV],
    ),
    "boft": ({"algo": "boft", "linear_dim": 4, "conv_dim": 2}, [Q, FF, CONV]),
    "boft_constraint": ({"algo": "boft", "linear_dim": 4, "constraint": 0.01, "rescaled": True}, [Q]),
    "glora": ({"algo": "glora", "linear_dim": 2, "linear_alpha": 1, "conv_dim": 2, "conv_alpha": 1}, [Q, FF]),
    "ia3": ({"algo": "ia3"}, [Q, FF, CONV]),
    "ia3_inputs": ({"algo": "ia3", "train_on_input": True}, [Q, FF]),
    "full": ({"algo": "full"}, [Q, FF, CONV]),
    "norms": ({"algo": "lora", "linear_dim": 2, "linear_alpha": 1, "train_norm": True}, [Q, NORM]),
    "tlora": ({"algo": "tlora", "linear_dim": 2, "linear_alpha": 1}, [Q]),
}
"""Case -> settings of the network, and the modules that it is applied to."""

REFUSED = {"tlora"}
"""Cases that adapterkit refuses, so that they have no native form."""

HALF = {"locon_half"}
"""Cases that are saved in half precision, alpha and all."""


def lycoris(dest: Path) -> None:
    """Networks of lycoris-lora, saved by it."""
    for name, (settings, modules) in LYCORIS.items():
        model = unet()
        prefix = "lora_unet" if name != "locon_rs" else "lycoris"
        LycorisNetwork.apply_preset({"target_module": [], "target_name": modules, "lora_prefix": prefix})
        network = LycorisNetwork(model, 1.0, **_network(settings))
        network.apply_to()
        base = unet()
        torch.manual_seed(1)
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data + 0.3 * torch.randn(parameter.shape)
        if name in HALF:
            network.half().float()
            for lora in network.loras:
                lora.scale = float(lora.alpha) / lora.lora_dim
        # Files of LoCon alone have the very keys of kohya's.
        kind = "kohya" if name.startswith(("locon", "dora")) and prefix == "lora_unet" else "lycoris"
        folder = _fresh(dest / kind / name)
        dtype = torch.float16 if name in HALF else None
        network.save_weights(
            str(folder / "adapter.safetensors"),
            dtype,
            {"ss_network_module": "lycoris.kohya", "ss_network_args": json.dumps(settings)},
        )
        loras = {
            path: lora
            for path in modules
            for lora in network.loras
            if lora.lora_name == f"{prefix}_{path}".replace(".", "_")
        }
        assert len(loras) == len(modules) == len(network.loras), (name, [x.lora_name for x in network.loras])
        _forward(folder, {f"unet.{path}": (base.get_submodule(path), lora) for path, lora in loras.items()})
        if name not in REFUSED:
            _native(
                folder,
                {f"unet.{path}": _updates(lora, base.get_submodule(path), dtype) for path, lora in loras.items()},
            )


def _network(settings: dict[str, Any]) -> dict[str, Any]:
    given = {"conv_dim": 1, "conv_alpha": 1, "linear_alpha": 1, "linear_dim": 1, **settings}
    names = {
        "linear_dim": "lora_dim",
        "linear_alpha": "alpha",
        "conv_dim": "conv_lora_dim",
        "algo": "network_module",
        "dora_wd": "weight_decompose",
    }
    return {names.get(k, k): v for k, v in given.items()}


def _updates(lora: Any, layer: Any, dtype: Any) -> list[Any]:
    """One module of LyCORIS' in native form; norms that are not LoRA's of outputs are an update of their own."""
    update = _update(lora, layer, dtype)
    if not getattr(lora, "wd", False) or update.method == "dora":
        return [update]
    norms = {"out" if lora.wd_on_out else "into": _as(lora.dora_scale, dtype).flatten()}
    return [update, METHODS["weight_norm"](**norms, eps=torch.finfo(torch.float32).eps)]


def _update(lora: Any, layer: Any, dtype: Any) -> Any:
    """The change of one module."""
    at = lambda n: _as(getattr(lora, n), dtype)  # noqa: E731
    kind = type(lora).__name__
    alpha = float(_as(lora.alpha, dtype)) if hasattr(lora, "alpha") else 1.0
    if kind == "LoConModule":
        A, B = _as(lora.lora_down.weight, dtype), _as(lora.lora_up.weight, dtype)
        rank = len(A)
        if lora.tucker:
            A = torch.einsum("pqxy,qi->pixy", lora.lora_mid.weight.double(), A.flatten(1).double()).float()
        fields = {"A": A, "B": B.flatten(1), "scaling": alpha / rank}
        if lora.wd and lora.wd_on_out:
            return METHODS["dora"](**fields, magnitude=at("dora_scale").flatten())
        return METHODS["lora"](**fields)
    if kind == "LohaModule":
        fields = {}
        for n in (1, 2):
            a, b = at(f"hada_w{n}_a"), at(f"hada_w{n}_b")
            fields |= (
                {f"w{n}_a": a.T, f"w{n}_in": b, f"t{n}": at(f"hada_t{n}")}
                if lora.tucker
                else {f"w{n}_a": a, f"w{n}_b": b}
            )
        return METHODS["loha"](**fields, scaling=alpha / lora.lora_dim)
    if kind == "LokrModule":
        fields = {
            n: at(f"lokr_{n}") for n in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2") if hasattr(lora, f"lokr_{n}")
        }
        if "t2" in fields:
            fields |= {"w2_a": fields["w2_a"].T, "w2_in": fields.pop("w2_b")}
        whole = {"w1", "w2"} <= fields.keys()
        return METHODS["lokr"](**fields, scaling=1.0 if whole else alpha / lora.lora_dim)
    if kind == "DiagOFTModule":
        rescale = {"rescale": at("rescale").flatten()} if lora.rescaled else {}
        return METHODS["oft"](square=at("oft_blocks"), side="out", constraint=alpha * lora.dim, **rescale)
    if kind == "ButterflyOFTModule":
        rescale = {"rescale": at("rescale").flatten()} if lora.rescaled else {}
        return METHODS["boft_outputs"](square=at("oft_blocks"), constraint=alpha * lora.dim, **rescale)
    if kind == "GLoRAModule":
        fields = {n.upper(): getattr(lora, n).weight.detach().clone() for n in ("a1", "a2", "b1", "b2")}
        return METHODS["glora_products"](**fields, scaling=alpha / lora.lora_dim)
    if kind == "IA3Module":
        return METHODS["ia3_weights"](**{"w_in" if lora.train_input else "w": at("weight").flatten()})
    if kind == "FullModule":
        # Its parameters are the whole weights until they are saved as differences.
        diff = {"D": lora.weight.detach() - layer.weight.detach()}
        if lora.bias is not None:
            diff["d"] = lora.bias.detach() - layer.bias.detach()
        return METHODS["dense"](**diff)
    assert kind == "NormModule", kind
    return METHODS["dense"](D=at("w_norm"), d=at("b_norm"))


def _as(value: Tensor, dtype: Any) -> Tensor:
    return value.detach().clone() if dtype is None else value.detach().to(dtype)


def diffusers(dest: Path) -> None:
    """Adapters of diffusers' models, saved by its pipelines and converters."""
    folder = dest / "diffusers"
    plain = LoraConfig(r=3, lora_alpha=3, target_modules=[Q, V, CONV])
    scaled = LoraConfig(
        r=3, lora_alpha=2, use_rslora=True, target_modules=[Q, V, FF], rank_pattern={FF: 2}, alpha_pattern={V: 5}
    )
    for name, config in {
        "plain": plain, "scaled": scaled,
        "dora": LoraConfig(r=2, lora_alpha=3, use_dora=True, target_modules=[Q, CONV]),
        "biased": LoraConfig(r=2, lora_alpha=2, lora_bias=True, target_modules=[Q, FF]),
    }.items():  # fmt: skip
        model, base = _adapted(config), unet()
        state = get_peft_model_state_dict(model)
        there = _fresh(folder / name)
        metadata = None if name == "plain" else model.peft_config["default"].to_dict()
        StableDiffusionPipeline.save_lora_weights(there, unet_lora_layers=state, unet_lora_adapter_metadata=metadata)
        _pipeline(there, model, base)
    model, base = _adapted(plain), unet()
    state = {f"unet.{k}": v for k, v in get_peft_model_state_dict(model).items()}
    there = _fresh(folder / "second")
    save_file(convert_state_dict_to_diffusers(state), there / "pytorch_lora_weights.safetensors", {"format": "pt"})
    _pipeline(there, model, base)
    there = _fresh(folder / "first")
    names = {".lora_A.": "_lora.down.", ".lora_B.": "_lora.up."}
    first = {_once(k.replace(".to_", ".processor.to_"), names): v for k, v in state.items() if "attn" in k}
    save_file(first, there / "pytorch_lora_weights.safetensors")
    _pipeline(there, model, base, {Q, V})
    there = _fresh(dest / "kohya" / "from_diffusers")
    kohya = convert_state_dict_to_kohya(state)
    save_file(
        {k.replace("unet_", "lora_unet_", 1) if k.startswith("unet_") else k: v for k, v in kohya.items()},
        there / "adapter.safetensors",
    )
    _pipeline(there, model, base)


def _once(text: str, words: dict[str, str]) -> str:
    for old, new in words.items():
        text = text.replace(old, new)
    return text


def _adapted(config: LoraConfig) -> Any:
    model: Any = unet()
    model.add_adapter(config)
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data + 0.3 * torch.randn(parameter.shape)
    return model


def _pipeline(folder: Path, model: Any, base: nn.Module, only: set[str] | None = None) -> None:
    layers = {n: m for n, m in model.named_modules() if hasattr(m, "lora_A") and (only is None or n in only)}
    _forward(folder, {f"unet.{n}": (base.get_submodule(n), m) for n, m in layers.items()})
    _native(folder, {f"unet.{n}": _lora(m) for n, m in layers.items()})


def _lora(layer: Any) -> Any:
    """One layer of PEFT's in native form."""
    A, B = layer.lora_A["default"], layer.lora_B["default"]
    fields = {
        "A": A.weight.detach().clone(),
        "B": B.weight.detach().flatten(1).clone(),
        "scaling": layer.scaling["default"],
    }
    if layer.use_dora["default"]:
        return METHODS["dora"](
            **fields, magnitude=layer.lora_magnitude_vector["default"].weight.detach().flatten().clone()
        )
    return METHODS["lora"](**fields, bias=None if B.bias is None else B.bias.detach().clone())


def converted(dest: Path) -> None:
    """Files of the FLUX formats, and what diffusers' converters make of them."""
    torch.manual_seed(3)
    h = 8
    sizes = {
        "double_blocks.0.img_attn.qkv": (h, 3 * h), "double_blocks.0.txt_attn.qkv": (h, 3 * h),
        "double_blocks.0.img_attn.proj": (h, h), "double_blocks.0.img_mlp.0": (h, 4 * h),
        "double_blocks.0.txt_mlp.2": (4 * h, h), "double_blocks.0.img_mod.lin": (h, 6 * h),
        "single_blocks.1.linear1": (h, 7 * h), "single_blocks.1.linear2": (5 * h, h),
        "single_blocks.1.modulation.lin": (h, 3 * h),
    }  # fmt: skip
    kohya: dict[str, Tensor] = {}
    for name, (i, o) in sizes.items():
        stem = "lora_unet_" + name.replace(".", "_")
        kohya |= {
            f"{stem}.lora_down.weight": torch.randn(2, i),
            f"{stem}.lora_up.weight": torch.randn(o, 2),
            f"{stem}.alpha": torch.tensor(1.0),
        }
    # split_qkv: one LoRA for each of q, k, v, saved as a block-diagonal one.
    stem = "lora_unet_double_blocks_1_img_attn_qkv"
    up = torch.block_diag(*(torch.randn(h, 2) for _ in range(3)))
    kohya |= {
        f"{stem}.lora_down.weight": torch.randn(6, h),
        f"{stem}.lora_up.weight": up,
        f"{stem}.alpha": torch.tensor(3.0),
    }
    _converted(dest / "kohya" / "flux", kohya, _kohya_flux)

    xlabs: dict[str, Tensor] = {}
    for name, (i, o) in {
        "double_blocks.0.processor.qkv_lora1": (h, 3 * h), "double_blocks.0.processor.proj_lora1": (h, h),
        "double_blocks.0.processor.qkv_lora2": (h, 3 * h), "double_blocks.0.processor.proj_lora2": (h, h),
        "single_blocks.1.processor.proj_lora": (5 * h, h), "single_blocks.1.processor.qkv_lora": (h, 3 * h),
    }.items():  # fmt: skip
        xlabs |= {f"{name}.down.weight": torch.randn(2, i), f"{name}.up.weight": torch.randn(o, 2)}
    _converted(dest / "xlabs" / "flux", xlabs, converters._convert_xlabs_flux_lora_to_diffusers)

    control: dict[str, Tensor] = {}
    for name, (i, o) in {**sizes, "img_in": (2 * 4, h)}.items():
        control |= {
            f"{name}.lora_A.weight": torch.randn(2, i),
            f"{name}.lora_B.weight": torch.randn(o, 2),
            f"{name}.lora_B.bias": torch.randn(o),
        }
    control["double_blocks.0.img_attn.norm.key_norm.scale"] = torch.randn(4)
    _save(dest / "bfl_control" / "flux", control)


def turned(dest: Path) -> None:
    """FLUX's OFT as sd-scripts' `networks/oft_flux.py` saves it, two blocks a part, and the parts as they turn."""
    torch.manual_seed(6)
    h, alpha = 8, torch.tensor(0.0625)
    parts = {
        "double_blocks.0.img_attn.qkv": [h, h, h], "double_blocks.0.img_attn.proj": [h],
        "single_blocks.1.linear1": [h, h, h, 4 * h],
    }  # fmt: skip
    state: dict[str, Tensor] = {}
    updates: dict[ak.Target, Any] = {}
    for name, sizes in parts.items():
        stem, start = "oft_unet_" + name.replace(".", "_"), 0
        state[f"{stem}.alpha"] = alpha.clone()
        for number, size in enumerate(sizes):
            blocks = torch.randn(2, size // 2, size // 2)
            state[f"{stem}.oft_blocks.{number}"] = blocks
            rows = (start, start + size) if len(sizes) > 1 else None
            own = METHODS["oft"](square=blocks, side="out", constraint=float(alpha) * size)
            updates[ak.Target(f"transformer.{name}", rows=rows)] = own
            start += size
    _save(dest / "kohya" / "oft_flux", state)
    ak.write(
        ak.Adapter({target: (update,) for target, update in updates.items()}),
        dest / "kohya" / "oft_flux" / "expected.native.safetensors",
    )


def _kohya_flux(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """diffusers' converter, with the sizes of these tensors in the place of FLUX's own, which it has as numbers."""
    source = inspect.getsource(converters._convert_kohya_flux_lora_to_diffusers)
    small: dict[str, Any] = {}
    exec(source.replace("12288", "32").replace("3072", "8"), vars(converters), small)
    return small["_convert_kohya_flux_lora_to_diffusers"](state)


def _converted(
    folder: Path, state: dict[str, Tensor], convert: Callable[[dict[str, Tensor]], dict[str, Tensor]]
) -> None:
    _save(folder, state)
    made = convert(copy.deepcopy(state))
    save_file({k: v.clone().contiguous() for k, v in made.items()}, folder / "converted.safetensors")


def _save(folder: Path, state: dict[str, Tensor]) -> None:
    save_file(state, _fresh(folder) / "adapter.safetensors", {"format": "pt"})


def _forward(folder: Path, layers: dict[str, tuple[Any, Callable[[Tensor], Tensor]]]) -> None:
    held: dict[str, Tensor] = {}
    torch.manual_seed(4)
    for name, (layer, tool) in layers.items():
        W = layer.weight.detach()
        x = torch.randn(2, W.shape[1], 5, 5) if W.ndim == 4 else torch.randn(2, W.shape[-1])
        with torch.no_grad():
            y = tool(x)
            held |= {f"{name}|W": W.clone(), f"{name}|x": x, f"{name}|y": y.float().clone()}
        if layer.bias is not None:
            held[f"{name}|b"] = layer.bias.detach().clone()
    save_file(held, folder / "forward.safetensors")


def _native(folder: Path, updates: dict[str, Any]) -> None:
    ak.write(
        ak.Adapter(
            {ak.Target(p): tuple(found) if isinstance(found, list) else (found,) for p, found in updates.items()}
        ),
        folder / "expected.native.safetensors",
    )


def _fresh(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


if __name__ == "__main__":
    there = Path(sys.argv[1]) if len(sys.argv) > 1 else DEST
    lycoris(there)
    diffusers(there)
    converted(there)
    turned(there)
