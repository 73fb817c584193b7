"""Layouts of stacked experts' factors, against the change that each release of PEFT made itself.

tests/data/experts/RELEASE/CASE holds the base, the adapter that the release wrote, and the change it merged;
tools/foreign/expert_layouts.py wrote them with both releases.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import run
from peft import PeftModel
from safetensors.numpy import load_file, save_file

import adapterkit as ak
from adapterkit import ops
from adapterkit.core.adapter import Adapter, Target
from adapterkit.errors import Malformed, UsageError
from adapterkit.io.lazy import from_numpy
from adapterkit.methods import METHODS

DATA = Path(__file__).parents[1] / "data" / "experts"
RELEASES = ("peft-0.18.1", "peft-0.21.2")
CASES = ("pair", "square", "single", "lone_square")


def written(case, release="peft-0.21.2"):
    folder = DATA / release / case
    return folder, load_file(folder / "base.safetensors"), load_file(folder / "expected.safetensors")


def base_folder(tmp_path, tensors, **config):
    folder = tmp_path / "base"
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"model_type": "mixtral", **config}))
    return folder


def one_by_one(stacks):
    """The same weights as transformers 4 stores Mixtral's: w1 and w3 are gate and up, w2 is down."""
    tensors = {}
    for name, stack in stacks.items():
        prefix = name.replace("mlp.experts", "block_sparse_moe.experts").rpartition(".")[0]
        for e, weight in enumerate(stack):
            if name.endswith("gate_up_proj"):
                gate, up = np.split(weight, 2)
                tensors |= {f"{prefix}.{e}.w1.weight": gate, f"{prefix}.{e}.w3.weight": up}
            else:
                tensors[f"{prefix}.{e}.w2.weight"] = weight
    return {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}


def merged(adapter, base, tmp_path, **options):
    ak.merge(base, [adapter], tmp_path / "merged", **options)
    return load_file(tmp_path / "merged" / "model.safetensors")


def assert_changed(after, before, expected):
    assert after.keys() == before.keys() == expected.keys()
    for name, tensor in after.items():
        np.testing.assert_allclose(tensor - before[name], expected[name], atol=5e-6)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("release", RELEASES)
def test_both_releases_merge_into_a_stack_as_they_did_themselves(release, case, tmp_path):
    folder, before, expected = written(case, release)
    base = base_folder(tmp_path, before)
    assert_changed(merged(folder, base, tmp_path), before, expected)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("release", RELEASES)
def test_both_releases_merge_into_experts_stored_one_by_one(release, case, tmp_path):
    folder, before, expected = written(case, release)
    base = base_folder(tmp_path, one_by_one(before))
    assert_changed(merged(folder, base, tmp_path), one_by_one(before), one_by_one(expected))


@pytest.mark.parametrize("case", CASES[:2])
def test_a_pair_of_parameters_needs_no_base_to_tell_its_layout(case):
    folder, _, expected = written(case, "peft-0.18.1")
    adapter = ak.read(folder)
    for target in adapter.updates:
        np.testing.assert_allclose(adapter.delta(target.path), expected[target.path], atol=5e-6)


def test_a_lone_parameter_of_an_old_release_names_both_readings():
    folder, _, expected = written("single", "peft-0.18.1")
    with pytest.raises(UsageError, match=r"the columns of lora_A are inputs if .* but outputs if") as error:
        ak.read(folder)
    assert "peft_0.18 if they are outputs" in str(error.value)
    assert "base=" in str(error.value)
    adapter = ak.read(folder, experts_order="peft_0.18")
    (target,) = adapter.updates
    np.testing.assert_allclose(adapter.delta(target.path), expected[target.path], atol=5e-6)


@pytest.mark.parametrize("case", CASES)
def test_an_old_release_is_written_again_in_the_order_of_today(case, tmp_path):
    folder, before, expected = written(case, "peft-0.18.1")
    base = base_folder(tmp_path, before)
    ak.write(ak.read(folder, base=base), tmp_path / "new", format="peft", base=base)
    config = json.loads((tmp_path / "new" / "adapter_config.json").read_text())
    assert config["peft_version"] is None
    today = load_file(DATA / "peft-0.21.2" / case / "adapter_model.safetensors")
    new = load_file(tmp_path / "new" / "adapter_model.safetensors")
    assert {name: tensor.shape for name, tensor in new.items()} == {name: t.shape for name, t in today.items()}
    assert_changed(merged(tmp_path / "new", base, tmp_path), before, expected)


def grouped(folder, out, experts=3, **config):
    """The adapter as Unsloth's training read it until September 2026: the expert slowest in lora_B, too."""
    shutil.copytree(folder, out)
    tensors = load_file(out / "adapter_model.safetensors")
    for name, tensor in tensors.items():
        if "lora_B" in name:
            rows = len(tensor)
            tensors[name] = np.ascontiguousarray(tensor.reshape(rows, -1, experts).transpose(0, 2, 1).reshape(rows, -1))
    save_file(tensors, out / "adapter_model.safetensors", {"format": "pt"})
    said = json.loads((out / "adapter_config.json").read_text()) | config
    (out / "adapter_config.json").write_text(json.dumps(said))
    return out


@pytest.mark.parametrize("release", RELEASES)
def test_unsloths_mark_says_the_order(release, tmp_path):
    folder, before, expected = written("pair", release)
    base = base_folder(tmp_path, before)
    theirs = grouped(folder, tmp_path / "unsloth", lora_B_layout="grouped_by_expert")
    assert_changed(merged(theirs, base, tmp_path), before, expected)


def test_an_unknown_mark_is_refused(tmp_path):
    theirs = grouped(written("pair")[0], tmp_path / "unsloth", lora_B_layout="by_moonlight")
    with pytest.raises(Malformed, match="by_moonlight"):
        ak.read(theirs)


@pytest.mark.parametrize(
    "signs", [{"auto_mapping": {"unsloth_fixed": True}}, {"base_model_name_or_path": "unsloth/Qwen3-30B-A3B"}]
)
def test_a_file_of_unsloth_without_a_mark_names_both_readings(signs, tmp_path):
    folder, before, expected = written("pair")
    theirs = grouped(folder, tmp_path / "unsloth", **signs)
    with pytest.raises(UsageError, match=r"rank_major .* grouped_by_expert") as error:
        ak.read(theirs)
    assert "--experts-order grouped_by_expert" in str(error.value)
    assert "experts_order=" in str(error.value)
    base = base_folder(tmp_path, before)
    adapter = ak.read(theirs, experts_order="grouped_by_expert")
    assert_changed(merged(adapter, base, tmp_path), before, expected)
    # What is written from it is in PEFT's order, and says so to Unsloth.
    ak.write(adapter, tmp_path / "new", format="peft")
    assert json.loads((tmp_path / "new" / "adapter_config.json").read_text())["lora_B_layout"] == "rank_major"
    np.testing.assert_array_equal(
        *(
            load_file(f / "adapter_model.safetensors")["base_model.model.model.layers.0.mlp.experts.lora_B.weight"]
            for f in (tmp_path / "new", folder)
        )
    )


def test_a_rank_of_one_has_one_order(tmp_path):
    theirs = tmp_path / "unsloth"
    shutil.copytree(written("pair")[0], theirs)
    tensors = load_file(theirs / "adapter_model.safetensors")
    one = {n: np.ascontiguousarray(t[:3] if "lora_A" in n else t[:, :3]) for n, t in tensors.items()}
    save_file(one, theirs / "adapter_model.safetensors", {"format": "pt"})
    config = json.loads((theirs / "adapter_config.json").read_text())
    config |= {"r": 1, "base_model_name_or_path": "unsloth/x"}
    (theirs / "adapter_config.json").write_text(json.dumps(config))
    assert len(ak.read(theirs)) == 2


def test_an_unknown_order_is_refused():
    with pytest.raises(UsageError, match="sideways"):
        ak.read(written("pair")[0], experts_order="sideways")


def test_the_command_line_says_the_order(tmp_path):
    folder, before, expected = written("pair")
    theirs = grouped(folder, tmp_path / "unsloth", auto_mapping={"unsloth_fixed": True})
    base = base_folder(tmp_path, before)
    words = ["merge", str(base), str(theirs), "-o", str(tmp_path / "merged")]
    refused = run(*words)
    assert refused.exit_code == 2
    assert "--experts-order" in refused.output
    assert run(*words, "--experts-order", "grouped_by_expert").exit_code == 0
    assert_changed(load_file(tmp_path / "merged" / "model.safetensors"), before, expected)


NAMED = {
    "mixtral": ("model.layers.0.block_sparse_moe.experts.{e}.", "w1", "w3", "w2"),
    "qwen": ("model.layers.0.mlp.experts.{e}.", "gate_proj", "up_proj", "down_proj"),
}


def per_expert(case, naming, shift=0.0):
    """The adapter of PEFT 0.21 with one LoRA an expert, built here from the file's own numbers."""
    folder, _, _ = written(case)
    tensors = load_file(folder / "adapter_model.safetensors")
    stem = "base_model.model.model.layers.0.mlp.experts."
    pairs = {"down": "", "gate_up": "base_layer."} if case == "pair" else {"gate_up": ""}
    prefix, gate, up, down = NAMED[naming]
    updates = {}
    for parameter, wrapper in pairs.items():
        A, B = (tensors[f"{stem}{wrapper}lora_{name}.weight"] for name in "AB")
        A, B = A.reshape(3, 2, -1), B.reshape(len(B), 2, 3).transpose(2, 0, 1)
        for e in range(3):
            halves = dict(zip((gate, up), np.split(B[e], 2), strict=True)) if parameter == "gate_up" else {down: B[e]}
            for name, rows in halves.items():
                update = METHODS["lora"](
                    A=from_numpy(A[e]), B=from_numpy(np.ascontiguousarray(rows + shift)), scaling=2.0
                )
                updates[Target(prefix.replace("{e}", str(e)) + name)] = (update,)
    return Adapter(updates)


@pytest.mark.parametrize("naming", NAMED)
@pytest.mark.parametrize("case", ["pair", "single"])
@pytest.mark.parametrize("release", RELEASES)
def test_two_layouts_of_one_adapter_are_the_same_function_without_a_base(release, case, naming):
    order = "peft_0.18" if (release, case) == ("peft-0.18.1", "single") else None
    stacks = ak.read(written(case, release)[0], experts_order=order)
    single = per_expert(case, naming)
    if release == "peft-0.18.1":
        # Each release drew its own numbers; only the places can be compared.
        assert {t.target for t in ops.compare(stacks, single).targets} == {t.path for t in single.updates}
        return
    for pair in ((stacks, single), (single, stacks)):
        found = ops.compare(*pair)
        assert found.equal is True
        assert found.relative_error < 1e-6
    assert ops.compare(stacks, per_expert(case, naming, shift=0.1)).equal is False


def test_a_missing_expert_is_told():
    single = per_expert("pair", "qwen")
    fewer = single.replace(updates={t: u for t, u in single.updates.items() if ".2." not in t.path})
    with pytest.raises(UsageError, match="no target in common"):
        ops.compare(ak.read(written("pair")[0]), fewer)


def test_diff_on_the_command_line_compares_two_layouts(tmp_path):
    ak.write(per_expert("pair", "qwen"), tmp_path / "single", format="peft")
    result = run("diff", str(written("pair")[0]), str(tmp_path / "single"))
    assert result.exit_code == 0, result.output
    assert "the same change" in result.output


class Experts(torch.nn.Module):
    def __init__(self, stacks):
        super().__init__()
        for name, stack in stacks.items():
            setattr(self, name.rpartition(".")[2], torch.nn.Parameter(torch.from_numpy(stack)))


def merged_by_peft(folder, stacks):
    """What the installed release of PEFT adds to each stack."""
    root = torch.nn.Module()
    root.model = torch.nn.Module()
    layer = torch.nn.Module()
    layer.mlp = torch.nn.Module()
    layer.mlp.experts = Experts({name: stacks[name].copy() for name in sorted(stacks, reverse=True)})  # as declared
    root.model.layers = torch.nn.ModuleList([layer])
    after = PeftModel.from_pretrained(root, folder).merge_and_unload().state_dict()
    return {name: after[name].numpy() - stack for name, stack in stacks.items()}


def rows_of(single, stacks, naming):
    """The change of each stack, from one LoRA an expert, in float64."""
    prefix, gate, up, down = NAMED[naming]
    changes = {}
    for name, stack in stacks.items():
        changes[name] = np.zeros(stack.shape)
        for e in range(len(stack)):
            for i, part in enumerate((gate, up) if name.endswith("gate_up_proj") else (down,)):
                for target, updates in single.updates.items():
                    if target.path == prefix.replace("{e}", str(e)) + part:
                        (update,) = updates
                        rows = slice(i * update.B.shape[0], (i + 1) * update.B.shape[0])
                        product = update.B.numpy().astype("f8") @ update.A.numpy().astype("f8")
                        changes[name][e, rows] = update.scaling * product
    return changes


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["one A", "two As", "ranks", "scalings", "one expert less"])
def test_single_experts_are_written_as_peft_reads_stacks(kind, tmp_path):
    _, before, _ = written("pair")
    base = base_folder(tmp_path, before)
    rng = np.random.default_rng(3)
    updates = dict(per_expert("pair", "mixtral").updates)
    for position, (target, (update,)) in enumerate(list(updates.items())):
        if kind == "one expert less" and ".1." in target.path:
            del updates[target]
        elif kind == "two As":
            updates[target] = (update.replace(A=from_numpy(rng.normal(size=update.A.shape).astype("f4"))),)
        elif kind == "ranks":
            rank = 1 + position % 3
            A = rng.normal(size=(rank, update.A.shape[1])).astype("f4")
            B = rng.normal(size=(update.B.shape[0], rank)).astype("f4")
            updates[target] = (update.replace(A=from_numpy(A), B=from_numpy(B)),)
        elif kind == "scalings":
            updates[target] = (update.replace(scaling=1.0 + position),)
    single = Adapter(updates)
    ak.write(single, tmp_path / "single", format="peft")
    words = ["convert", tmp_path / "single", tmp_path / "out", "--to", "peft", "--base", base, "--match-base"]
    result = run(*words)
    assert result.exit_code == 0, result.output
    assert ("joined 2 LoRAs on rows" in result.output) == (kind in ("two As", "ranks"))
    expected = rows_of(single, before, "mixtral")
    found = merged_by_peft(tmp_path / "out", before)
    for name, change in expected.items():
        np.testing.assert_allclose(found[name], change, atol=1e-6 * np.abs(change).max() + 2e-6)


def test_stacks_are_written_as_vllm_reads_single_experts(tmp_path):
    folder, before, expected = written("pair")
    base = base_folder(tmp_path, one_by_one(before))
    words = ["convert", folder, tmp_path / "out", "--to", "peft", "--profile", "vllm"]
    refused = run(*words)
    assert refused.exit_code == 3
    assert "--match-base" in refused.output
    assert run(*words, "--base", base, "--match-base").exit_code == 0
    keys = load_file(tmp_path / "out" / "adapter_model.safetensors")
    stem = "base_model.model.model.layers.0.block_sparse_moe.experts"
    assert set(keys) == {
        f"{stem}.{e}.{name}.lora_{side}.weight" for e in range(3) for name in ("w1", "w2", "w3") for side in "AB"
    }
    changes = one_by_one(expected)
    for name, change in changes.items():
        A, B = (keys[f"base_model.model.{name.removesuffix('.weight')}.lora_{side}.weight"] for side in "AB")
        np.testing.assert_allclose(2.0 * B.astype("f8") @ A, change, atol=5e-6)


def test_a_router_that_all_linear_lists_by_name_is_read_without_a_base(tmp_path):
    """PEFT 0.21 writes `gate.weight` beside `gate_up_proj` and `down_proj`, which could be any module's."""
    stem, rank, experts, inputs, width = "base_model.model.model.layers.1.mlp.", 2, 3, 8, 5
    shapes = {
        "experts.base_layer": (experts * rank, inputs, 2 * width), "experts": (experts * rank, width, inputs),
        "gate": (rank, inputs, experts),
    }  # fmt: skip
    tensors = {}
    for module, (rows, into, out) in shapes.items():
        tensors[f"{stem}{module}.lora_A.weight"] = np.ones((rows, into), np.float32)
        tensors[f"{stem}{module}.lora_B.weight"] = np.ones((out, rows), np.float32)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA", "r": rank, "lora_alpha": 4, "target_modules": [], "peft_version": "0.21.2",
        "target_parameters": ["gate_up_proj", "gate.weight", "down_proj"],
    }  # fmt: skip
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    assert {target.path for target in ak.read(tmp_path).updates} == {
        "model.layers.1.mlp.experts.gate_up_proj", "model.layers.1.mlp.experts.down_proj",
        "model.layers.1.mlp.gate.weight",
    }  # fmt: skip
