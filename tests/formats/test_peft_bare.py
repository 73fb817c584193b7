"""PEFT state dicts without adapter_config.json, and checkpoints of DeepSpeed and FSDP."""

import copy
import json
import re
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import run
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

import adapterkit as ak
from adapterkit.errors import Malformed, ShapeMismatch, Unsupported, UsageError


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.up, self.down = torch.nn.Embedding(7, 6), torch.nn.Linear(6, 8), torch.nn.Linear(8, 6)


def trained(tmp_path: Path, **fields: object) -> tuple[PeftModel, dict[str, torch.Tensor]]:
    """A PEFT model, whose base is saved, and what PEFT merges it to."""
    torch.manual_seed(2)
    model = Model().eval()
    save_file(model.state_dict(), tmp_path / "base.safetensors", {"format": "pt"})
    config = {"r": 2, "lora_alpha": 6, "target_modules": ["up", "down"], **fields}
    wrapped = get_peft_model(copy.deepcopy(model), LoraConfig(**config))
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return wrapped, copy.deepcopy(wrapped).merge_and_unload().state_dict()


def check(adapter: object, wanted: dict[str, torch.Tensor], tmp_path: Path) -> None:
    out = tmp_path / "merged.safetensors"
    ak.merge(tmp_path / "base.safetensors", [adapter], out, overwrite=True)
    found = load_file(out)
    assert all(torch.allclose(found[name], wanted[name], atol=1e-6) for name in wanted)


def named(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same with the adapter's name in every key, as a live model has them."""
    return {re.sub(r"(\.lora_(?:[AB]|\w+))(?=$|\.(?:weight|bias)$)", r"\1.default", key): t for key, t in state.items()}


def bare(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key.removeprefix("base_model.model."): tensor for key, tensor in state.items()}


@pytest.mark.filterwarnings("ignore:Adapter 'default'")
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"use_dora": True},
        {"lora_bias": True},
        {"rank_pattern": {"down": 4}},
        {"target_modules": ["embed", "up"]},
    ],
)
def test_the_shapes_tell_the_rank_and_the_caller_alpha(fields: dict[str, object], tmp_path: Path) -> None:
    wrapped, merged = trained(tmp_path, **fields)
    state = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    for position, form in enumerate((state, named(state), bare(state), bare(named(state)))):
        file = tmp_path / f"{position}.safetensors"
        save_file(form, file, {"format": "pt"})
        check(ak.read(file, alpha=6), merged, tmp_path)
    for name in ("adapter_model.bin", "last.pt"):
        (tmp_path / name[0]).mkdir()
        torch.save(state, tmp_path / name[0] / name)
        check(ak.read(tmp_path / name[0], alpha=6), merged, tmp_path)


def test_without_alpha_it_is_refused(tmp_path: Path) -> None:
    wrapped, merged = trained(tmp_path)
    (tmp_path / "a").mkdir()
    state = get_peft_model_state_dict(wrapped)
    save_file(state, tmp_path / "a" / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(UsageError, match=r"--alpha A \(alpha=A"):
        ak.read(tmp_path / "a")
    for rank in (1, 3):
        with pytest.raises(ShapeMismatch, match=f"the file has rank 2, not {rank}"):
            ak.read(tmp_path / "a", alpha=6, rank=rank)
    read = ak.read(tmp_path / "a", alpha=6, rank=2)
    assert read.recipe[-1].args == {"format": "peft", "alpha": 6, "config": None}
    ak.write(read, tmp_path / "again", "peft")
    again = PeftModel.from_pretrained(wrapped.unload(), str(tmp_path / "again")).merge_and_unload().state_dict()
    assert all(torch.allclose(again[name], merged[name], atol=1e-6) for name in merged)
    with pytest.raises(UsageError, match=r"adapter_config.json states lora_alpha 6"):
        ak.read(tmp_path / "again", alpha=5)
    assert ak.read(tmp_path / "again", alpha=6, rank=2).digest() == read.digest()


def test_the_metadata_or_tensors_may_tell_alpha(tmp_path: Path) -> None:
    wrapped, merged = trained(tmp_path)
    state = get_peft_model_state_dict(wrapped)
    config = json.dumps({"transformer.lora_alpha": 6, "transformer.r": 2})
    for metadata in ({"lora_alpha": "6"}, {"ss_network_alpha": "6.0"}, {"lora_adapter_metadata": config}):
        save_file(state, tmp_path / "told.safetensors", metadata)
        check(ak.read(tmp_path / "told.safetensors"), merged, tmp_path)
        with pytest.raises(UsageError, match="states alpha 6, but --alpha"):
            ak.read(tmp_path / "told.safetensors", alpha=7)
    alphas = {key.replace("lora_A.weight", "alpha"): torch.tensor(6.0) for key in state if "lora_A" in key}
    save_file({**state, **alphas}, tmp_path / "told.safetensors")
    check(ak.read(tmp_path / "told.safetensors"), merged, tmp_path)


def test_the_commands_that_read_take_alpha(tmp_path: Path) -> None:
    wrapped, merged = trained(tmp_path)
    file = tmp_path / "lone.safetensors"
    save_file(get_peft_model_state_dict(wrapped), file)
    base, name = str(tmp_path / "base.safetensors"), str(file)
    refused = run("merge", base, name, "-o", str(tmp_path / "m.safetensors"))
    assert refused.exit_code == 2
    assert "--alpha" in refused.stderr
    for command in (
        ["inspect", name], ["validate", name], ["names", base, name], ["diff", name, name],
        ["convert", name, str(tmp_path / "c"), "--to", "peft"],
        ["combine", name, "-o", str(tmp_path / "d"), "--to", "adapterkit"],
        ["resize", name, "--rank", "1", "-o", str(tmp_path / "e")],
        ["merge", base, name, "-o", str(tmp_path / "m.safetensors"), "--rank", "2"],
    ):  # fmt: skip
        done = run(*command, "--alpha", "6")
        assert done.exit_code == 0, done.stderr
    found = load_file(tmp_path / "m.safetensors")
    assert all(torch.allclose(found[key], merged[key], atol=1e-6) for key in merged)
    other = run("convert", name, str(tmp_path / "c"), "--to", "peft", "--alpha", "7")
    assert other.exit_code != 0, "what alpha 6 made is not what alpha 7 would make"
    tells = run("inspect", str(tmp_path / "d"), "--alpha", "6")
    assert "takes no --alpha" in tells.stderr


def test_what_zero_3_saved_without_gathering_is_refused(tmp_path: Path) -> None:
    wrapped, _ = trained(tmp_path)
    save_file({key: torch.zeros(0) for key in get_peft_model_state_dict(wrapped)}, tmp_path / "empty.safetensors")
    with pytest.raises(Malformed, match="ZeRO-3"):
        ak.read(tmp_path / "empty.safetensors", alpha=6)


def test_the_state_dict_of_a_whole_model_does_not_tell_what_was_trained(tmp_path: Path) -> None:
    wrapped, _ = trained(tmp_path)
    torch.save(wrapped.state_dict(), tmp_path / "whole.pt")
    with pytest.raises(Malformed, match="get_peft_model_state_dict"):
        ak.read(tmp_path / "whole.pt", alpha=6)


def model_states(wrapped: PeftModel) -> dict[str, object]:
    """What DeepSpeed saves beside the optimizer: all weights, and the names of those that are trained."""
    shapes = OrderedDict((name, p.shape) for name, p in wrapped.named_parameters() if p.requires_grad)
    return {
        "module": OrderedDict(wrapped.state_dict()), "buffer_names": [], "optimizer": None, "param_shapes": [shapes],
        "frozen_param_shapes": None, "lr_scheduler": None, "sparse_tensor_module_names": {"embed"},
        "global_steps": 5, "dp_world_size": 2, "ds_config": {"zero_optimization": {"stage": 2}}, "ds_version": "0.16.4",
    }  # fmt: skip


def test_deepspeeds_model_states_are_read(tmp_path: Path) -> None:
    wrapped, merged = trained(tmp_path, use_dora=True)
    step = tmp_path / "checkpoint" / "global_step5"
    step.mkdir(parents=True)
    torch.save(model_states(wrapped), step / "mp_rank_00_model_states.pt")
    (step.parent / "latest").write_text("global_step5")
    for path in (step / "mp_rank_00_model_states.pt", step, step.parent):
        read = ak.read(path, alpha=6)
        assert {update.method for _, update in read} == {"dora"}
        check(read, merged, tmp_path)


@pytest.mark.filterwarnings("ignore:torch.distributed is")
def test_what_is_split_over_ranks_is_refused_with_the_command_that_joins_it(tmp_path: Path) -> None:
    from torch.distributed.checkpoint import save
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    wrapped, merged = trained(tmp_path)
    state = get_peft_model_state_dict(wrapped)
    save({"model": state}, checkpoint_id=tmp_path / "fsdp", no_dist=True)
    with pytest.raises(Unsupported, match="format_utils dcp_to_torch"):
        ak.read(tmp_path / "fsdp", alpha=6)
    dcp_to_torch_save(tmp_path / "fsdp", tmp_path / "adapter_model.bin")
    check(ak.read(tmp_path / "adapter_model.bin", alpha=6), merged, tmp_path)
    step = tmp_path / "zero" / "global_step5"
    step.mkdir(parents=True)
    torch.save({"module": None}, step / "zero_pp_rank_0_mp_rank_00_model_states.pt")
    for path in (step, step / "zero_pp_rank_0_mp_rank_00_model_states.pt"):
        with pytest.raises(Unsupported, match=r"zero_to_fp32\.py"):
            ak.read(path, alpha=6)


def sat_states(width: int = 8, rank: int = 2) -> dict[str, object]:
    """What SwissArmyTransformer saves of CogVideoX: its base, and a LoRA for each part of a fused weight."""
    import random

    module: dict[str, torch.Tensor] = {"first_stage_model.encoder.conv_in.weight": torch.zeros(2, 2)}
    for layer in range(2):
        start = f"model.diffusion_model.transformer.layers.{layer}.attention."
        for name, parts in (("query_key_value", 3), ("dense", 1)):
            module[f"{start}{name}.original.weight"] = torch.zeros(parts * width, width)
            for part in range(parts):
                module[f"{start}{name}.matrix_A.{part}"] = torch.randn(rank, width)
                module[f"{start}{name}.matrix_B.{part}"] = torch.randn(width, rank)
    shapes = {name: leaf.shape for name, leaf in module.items() if "matrix" in name}
    return {
        "module": module, "param_shapes": [shapes], "iteration": 3, "random_rng_state": random.getstate(),
        "np_rng_state": np.random.get_state(),  # noqa: NPY002 - what SAT saves
        "torch_rng_state": torch.get_rng_state(),
    }  # fmt: skip


@pytest.mark.parametrize("whole", [True, False])
def test_sats_model_states_are_read(whole: bool, tmp_path: Path) -> None:
    """Also those of its inference mode, which hold the module alone. Each part's B @ A is scaled by alpha / rank."""
    states = sat_states()
    module: Any = states["module"]
    (tmp_path / "1").mkdir()
    torch.save(states if whole else {"module": module}, tmp_path / "1" / "mp_rank_00_model_states.pt")
    (tmp_path / "latest").write_text("1")
    with pytest.raises(UsageError, match=r"lora_alpha with --alpha A \(alpha=A\)"):
        ak.read(tmp_path)
    adapter = ak.read(tmp_path, alpha=4)
    names = {
        "to_q": "query_key_value.0",
        "to_k": "query_key_value.1",
        "to_v": "query_key_value.2",
        "to_out.0": "dense.0",
    }
    assert len(adapter.updates) == 2 * len(names)
    for layer in range(2):
        for ours, theirs in names.items():
            name, part = theirs.split(".")
            start = f"model.diffusion_model.transformer.layers.{layer}.attention.{name}.matrix_"
            A, B = (module[f"{start}{letter}.{part}"].double().numpy() for letter in "AB")
            change = adapter.delta(f"transformer.transformer_blocks.{layer}.attn1.{ours}").numpy()
            np.testing.assert_allclose(change, 2 * (B @ A), rtol=1e-5, atol=1e-6)
    # Its names are also those of LTX and Sana: the file tells that it is CogVideoX.
    ak.write(adapter, tmp_path / "out.safetensors", "comfyui")
    assert "diffusion_model.blocks.0.attn_out.lora_down.weight" in load_file(tmp_path / "out.safetensors")


def test_sats_lora_of_another_model_is_refused_by_its_module(tmp_path: Path) -> None:
    held = {"transformer.layers.0.cross_attention.query.matrix_A.0": torch.zeros(2, 8)}
    torch.save({"module": held}, tmp_path / "mp_rank_00_model_states.pt")
    with pytest.raises(Unsupported, match="cogvideox does not have") as refusal:
        ak.read(tmp_path, alpha=1)
    assert "cross_attention.query.matrix_A.0" in str(refusal.value)
