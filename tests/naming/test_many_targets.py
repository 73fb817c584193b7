"""What is done once for each target, once for each file, and once for all: told by counting, never by a clock."""

from __future__ import annotations

import gc
import json
import pathlib
import random
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from peft.utils.other import get_pattern_key
from safetensors.numpy import save_file

import adapterkit as ak
from adapterkit.cli import _render, adapterkit
from adapterkit.core.updates import Update
from adapterkit.errors import Corrupt, Malformed
from adapterkit.formats.peft import patterns
from adapterkit.io import inputs, lazy, safetensors
from adapterkit.io.checkpoint import fingerprint, open_checkpoint
from adapterkit.merging import plan
from adapterkit.methods.lora import LoRA
from adapterkit.naming import binding, resolver
from adapterkit.naming.moves import Move, Names
from adapterkit.naming.resolver import resolve
from adapterkit.ops import comparison

HIDDEN, INNER = 8, 6


def linears(experts: int) -> dict[str, tuple[int, int]]:
    """Path and `[out, in]` of the experts of two layers of a mixture of experts."""
    kinds = {"gate_proj": (INNER, HIDDEN), "up_proj": (INNER, HIDDEN), "down_proj": (HIDDEN, INNER)}
    return {
        f"model.layers.{layer}.mlp.experts.{expert}.{kind}": shape
        for layer in range(2)
        for expert in range(experts)
        for kind, shape in kinds.items()
    }


def write_base(folder: Path, experts: int, shards: int) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen3_moe", "tie_word_embeddings": False}))
    weights = {f"{path}.weight": np.ones(shape, np.float32) for path, shape in linears(experts).items()}
    files = {name: f"model-{at % shards:05}.safetensors" for at, name in enumerate(weights)}
    for file in set(files.values()):
        save_file({name: weights[name] for name in weights if files[name] == file}, folder / file, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    return folder


def write_adapter(folder: Path, experts: int, **config: Any) -> Path:
    folder.mkdir()
    tensors = {}
    for number, (path, (out, width)) in enumerate(linears(experts).items()):
        rng = np.random.default_rng(number)
        tensors[f"base_model.model.{path}.lora_A.weight"] = rng.standard_normal((2, width)).astype(np.float32)
        tensors[f"base_model.model.{path}.lora_B.weight"] = rng.standard_normal((out, 2)).astype(np.float32)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    names = ["gate_proj", "up_proj", "down_proj"]
    record = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": names, **config}
    (folder / "adapter_config.json").write_text(json.dumps(record))
    return folder


@pytest.fixture
def made(tmp_path: Path) -> Any:
    """experts -> (base, adapter) on disk, in as many shards as there are experts."""

    def make(experts: int) -> tuple[Path, Path]:
        base = write_base(tmp_path / f"base{experts}", experts, experts)
        return base, write_adapter(tmp_path / f"adapter{experts}", experts)

    return make


def counted(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> list[int]:
    """How often a function is called from now on."""
    calls, own = [0], getattr(owner, name)

    def counting(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        return own(*args, **kwargs)

    monkeypatch.setattr(owner, name, counting)
    return calls


@pytest.mark.parametrize("what", ["check", "dims"])
def test_updates_of_one_form_are_checked_once(made: Any, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    few, many = (ak.read(made(experts)[1]) for experts in (2, 20))
    calls = counted(monkeypatch, Update, what)
    few.validate()
    first = calls[0]
    many.validate()
    assert 0 < first == calls[0] - first


def test_an_update_of_another_form_is_still_checked(made: Any) -> None:
    adapter = ak.read(made(4)[1])
    last = list(adapter.updates)[-1]
    (update,) = adapter.updates[last]
    for damaged in (update.replace(scaling=float("nan")), update.replace(scaling=True), update.replace(scaling=[1.0])):
        with pytest.raises(Malformed, match="scaling") as caught:
            adapter.replace(updates={**adapter.updates, last: (damaged,)}).validate()
        assert str(last) in str(caught.value.where)


def test_binding_asks_once_for_each_form_and_shape(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    for experts in (2, 20):
        base, adapter = made(experts)
        checkpoint, read = open_checkpoint(base), ak.read(adapter)
        with monkeypatch.context() as patch:
            calls = counted(patch, binding, "check_site"), counted(patch, binding, "fits")
            bound = binding.bind(read, checkpoint)
        assert [site.weight for site in bound.sites] == [f"{target.path}.weight" for target in read.updates]
        asked.append([count[0] for count in calls])
    assert asked[0] == asked[1] != [0, 0]


def test_a_plan_compares_paths_of_files_once_a_file(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    for experts in (8, 32):
        base, adapter = made(experts)
        checkpoint, read = open_checkpoint(base), ak.read(adapter)
        with monkeypatch.context() as patch:
            calls = counted(patch, pathlib.PurePath, "__eq__")
            planned = plan(checkpoint, read)
        assert [len(file.outputs) for file in planned.files] == [6] * experts
        asked.append(calls[0])
    # Four times the files and the tensors: four times the comparisons, where each with each would be sixteen.
    assert asked[1] <= 5 * asked[0] + 20


def test_a_plan_reads_no_tensor(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    base, adapter = made(2)
    wanted = plan(base, adapter).record()
    monkeypatch.setattr(lazy, "read_span", lambda span: pytest.fail(f"{span} is read"))
    planned = plan(base, adapter).record(digests=False)
    unread = {"digest": None, "adapters": [{**each, "digest": None} for each in wanted["adapters"]]}
    assert planned | {"memory": 0} == wanted | unread | {"memory": 0}
    for flags in ([], ["--json"]):
        done = CliRunner().invoke(adapterkit, ["merge", str(base), str(adapter), "--plan", *flags])
        assert (done.exit_code, done.exception) == (0, None)


ACTS: dict[str, Any] = {
    "check_values": lambda case: case["adapter"].check_values(),
    "digest": lambda case: case["adapter"].digest(),
    "fingerprint": lambda case: fingerprint(case["base"]),
    "compare": lambda case: ak.ops.compare(case["adapter"], case["adapter"].replace(recipe=())),
    "merge": lambda case: ak.merge(case["base"], case["adapter"], case["out"]),
}


@pytest.mark.parametrize("act", ACTS)
def test_files_are_opened_once_not_once_a_tensor(
    made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, act: str
) -> None:
    experts = 20
    base, adapter = made(experts)
    checkpoint, read = open_checkpoint(base), ak.read(adapter)
    opened: Counter[str] = Counter()
    own = lazy.open_input

    def counting(path: Any, buffering: int = -1) -> Any:
        opened[str(path)] += 1
        return own(path, buffering)

    monkeypatch.setattr(lazy, "open_input", counting)
    ACTS[act]({"base": checkpoint, "adapter": read, "out": tmp_path / "out"})
    # A merge has its workers, the fingerprint and the digest, each of which opens a file for itself.
    assert 0 < max(opened.values()) < len(linears(experts)) // 2
    assert opened[str(adapter / "adapter_model.safetensors")] < len(linears(experts)) // 2


def test_a_file_is_read_anew_after_the_block_that_kept_it_open(tmp_path: Path) -> None:
    file = tmp_path / "x"
    file.write_bytes(b"before")
    span = lazy.Span(str(file), 0, 6)
    with lazy.files_kept_open():
        assert lazy.read_span(span) == b"before"
        with lazy.files_kept_open():
            assert lazy.read_span(span) == b"before"
        file.write_bytes(b"cut")
        with pytest.raises(Corrupt, match="3 of the 6 bytes"):
            lazy.read_span(span)
    file.unlink()
    file.write_bytes(b"behind")
    assert lazy.read_span(span) == b"behind"


def test_no_more_files_are_open_than_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[Any] = []
    own = lazy.open_input
    monkeypatch.setattr(lazy, "open_input", lambda *args, **more: held.append(own(*args, **more)) or held[-1])
    for number in range(2 * lazy.MOST_OPEN):
        (tmp_path / str(number)).write_bytes(bytes([number]))
    with lazy.files_kept_open():
        for number in range(2 * lazy.MOST_OPEN):
            assert lazy.read_span(lazy.Span(str(tmp_path / str(number)), 0, 1)) == bytes([number])
            assert sum(not file.closed for file in held) <= lazy.MOST_OPEN
    assert all(file.closed for file in held)


def test_binding_collects_no_garbage_and_leaves_collection_as_it_was(made: Any) -> None:
    base, adapter = made(40)
    checkpoint, read, rounds = open_checkpoint(base), ak.read(adapter), list[str]()
    thresholds = gc.get_threshold()
    gc.callbacks.append(lambda phase, _: rounds.append(phase))
    gc.set_threshold(10)
    try:
        binding.bind(read, checkpoint)
        assert gc.isenabled()
        during = len(rounds)
        gc.disable()
        binding.bind(read, checkpoint)
        assert not gc.isenabled()
    finally:
        gc.enable()
        gc.set_threshold(*thresholds)
        gc.callbacks.pop()
    assert during < 40  # Before and after, not within: each target makes several objects.


def test_reading_parses_the_header_of_an_adapter_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, seen, before = write_adapter(tmp_path / "lora", 2), Counter[str](), safetensors._read_header
    monkeypatch.setattr(safetensors, "_read_header", lambda path: seen.update([Path(path).name]) or before(path))
    ak.read(folder)
    assert seen["adapter_model.safetensors"] == 1


def test_commands_parse_the_header_of_an_adapter_once(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _, adapter = made(2)
    parsed: list[str] = []
    own = safetensors._parse

    def counting(raw: bytes, path: str) -> Any:
        parsed.append(path)
        return own(raw, path)

    monkeypatch.setattr(safetensors, "_parse", counting)
    for command in ("inspect", "validate"):
        assert CliRunner().invoke(adapterkit, [command, str(adapter)]).exit_code == 0
        assert parsed == [str(adapter / "adapter_model.safetensors")]
        parsed.clear()


def header(entries: str) -> bytes:
    return len(entries.encode()).to_bytes(8, "little") + entries.encode()


ONE = '"dtype":"F32","shape":[1],"data_offsets":'
"""What `@` stands for below."""


@pytest.mark.parametrize("entries", [
    '{"a":{@[0,4]},"a":{@[4,8]}}',
    '{"a":{"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":{@[4,8]}}',
    '{"__metadata__":{"k":"1","k":"2"},"a":{@[0,4]},"b":{@[4,8]}}',
    '{"__metadata__":{"k":"1"},"__metadata__":{},"a":{@[0,4]},"b":{@[4,8]}}',
    '{"a":{@[0,4]},"b":{"dtype":"F32","shape":[true],"data_offsets":[4,8]}}',
    '{"a":{@[0,4]},"b":{"dtype":"F32","shape":[1.0],"data_offsets":[4,8]}}',
    '{"a":{@[0,4]},"b":{"dtype":"F32","shape":{"1":1},"data_offsets":[4,8]}}',
    '{"a":{@[0,4]},"b":{"dtype":"F32","shape":["1"],"data_offsets":[4,8]}}',
    '{"a":{@[0,4]},"b":{"dtype":"F32","shape":[1],"data_offsets":["4","8"]}}',
    '{"a":{@[0,4]},"b":{"dtype":"F32","shape":[1],"data_offsets":[4,8],"x":1}}',
    '{"a":{@[0,4]},"b":{"dtype":["F32"],"shape":[1],"data_offsets":[4,8]}}',
    '{"a":{@[0,4]},"b":{@[4,9]}}',
], ids=[
    "tensor twice", "field twice", "note twice", "notes twice", "true", "1.0", "object", "text", "offsets",
    "field more", "dtype", "size",
])  # fmt: skip
def test_what_is_like_an_entry_that_passed_is_still_checked(tmp_path: Path, entries: str) -> None:
    """Entries of one dtype and shape are checked together, and keys are counted; nothing slips through."""
    file = tmp_path / "x.safetensors"
    file.write_bytes(header(entries.replace("@", ONE)) + bytes(8))
    with pytest.raises(Malformed):
        safetensors.read_header(file)


def test_a_scalar_is_not_taken_for_an_empty_text(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    scalar = '{"a":{"dtype":"F32","shape":[],"data_offsets":[0,4]},"b":{"dtype":"F32","shape":%s,"data_offsets":[4,8]}}'
    file.write_bytes(header(scalar % "[]") + bytes(8))
    assert [entry.shape for entry in safetensors.read_header(file).entries.values()] == [(), ()]
    for empty in ('""', "{}"):
        file.write_bytes(header(scalar % empty) + bytes(8))
        with pytest.raises(Malformed):
            safetensors.read_header(file)


def test_patterns_are_those_of_peft() -> None:
    draw = random.Random(0)
    words = ["q", "k_proj", "layers", "0", "11", "a-b", "mlp"]

    def name(*dots: str) -> str:
        return "".join(draw.choice(words) + draw.choice(dots) for _ in range(draw.randint(0, 4))) + draw.choice(words)

    fitted = 0
    for _ in range(2000):
        found = [name(".") for _ in range(draw.randint(1, 10))]
        wild = [(lambda p: p, 5), (lambda p: f".*{p}", 1), (lambda p: f"({p})|q", 1), (lambda p: f"^{p}$", 1)]
        shaped = [draw.choices([f for f, _ in wild], [w for _, w in wild])[0](pattern) for pattern in found]
        table = {pattern: pattern for pattern in shaped}
        for target in (name(".", ".", ".", "X", "-") for _ in range(5)):
            assert patterns.first_match(table, target, target) == get_pattern_key(list(table), target), (table, target)
            fitted += get_pattern_key(list(table), target) != target
    assert fitted > 500


@pytest.mark.parametrize("written", [str, patterns.exactly], ids=["as EVA writes it", "as it is written here"])
def test_a_rank_for_each_module_is_looked_up(monkeypatch: pytest.MonkeyPatch, written: Any) -> None:
    table = {written(path): number for number, path in enumerate(linears(200))}
    calls = counted(monkeypatch, patterns, "matches")
    compared = counted(monkeypatch, patterns, "_among")
    for number, path in enumerate(linears(200)):
        assert patterns.first_match(table, path, -1) == number
    assert calls == [0]
    assert compared[0] <= 20 * len(table)


def test_names_of_a_base_are_compared_with_its_family_once(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    base = open_checkpoint(made(4)[0])
    calls = counted(monkeypatch, resolver.FamilyNames, "__init__")
    for layer in range(2):
        shape = binding.fitting.live_shape(base, f"model.layers.{layer}.mlp.experts.gate_up_proj")
        assert shape == (4, 2 * INNER, HIDDEN)
    assert calls == [1]


@pytest.mark.parametrize("wrapped", [False, True])
def test_names_of_a_base_are_searched_for_wrappers_once(wrapped: bool) -> None:
    class Counting(set[str]):
        walks = 0

        def __iter__(self) -> Any:
            Counting.walks += 1
            return super().__iter__()

    word = "_orig_mod." if wrapped else ""
    names = Names(Counting(f"{word}{path}" for path in linears(4)))
    walks = []
    for path in linears(4):
        assert resolve([path], names).moves == {path: (Move(f"{word}{path}"),)}
        walks.append(Counting.walks)
    assert walks[-1] == walks[0]


def test_commands_ask_each_format_once_about_a_file(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _, adapter = made(2)
    calls = counted(monkeypatch, ak.formats.FORMATS["peft"], "sniff")
    for command in ("inspect", "validate"):
        calls[0] = 0
        assert CliRunner().invoke(adapterkit, [command, str(adapter)]).exit_code == 0
        assert calls == [1]


def test_a_comparison_takes_one_blas_thread(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from threadpoolctl import threadpool_info

    _, adapter = made(2)
    seen: set[int] = set()
    own = comparison._likeness

    def looking(*args: Any) -> Any:
        seen.update(pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas")
        return own(*args)

    monkeypatch.setattr(comparison, "_likeness", looking)
    assert ak.ops.compare(adapter, adapter).equal
    assert seen <= {1}


def test_large_results_are_the_json_that_small_ones_are(monkeypatch: pytest.MonkeyPatch) -> None:
    record = {
        "empty": [], "none": {}, "deep": [[], [{}], {"a": [1, -0.0, 1e-05, 1e22, None, True]}],
        "text": 'é \U0001f600 " \\ / \n\t', "nan": float("nan"), "": "", "path": Path("a/b"), "tuple": (1, 2),
    }  # fmt: skip
    small = _render.as_json(record)
    monkeypatch.setattr(_render, "_LARGE", 0)
    assert _render.as_json(record) == small == json.dumps(json.loads(small), indent=2)


def test_headers_are_kept_within_a_command_only(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    for width in (1, 2):
        save_file({"a": np.zeros(width, np.float32)}, file)
        with inputs.inputs_kept():
            assert safetensors.read_header(file).entries["a"].shape == (width,)


def test_injection_takes_as_many_steps_a_target_in_a_large_model() -> None:
    """Lines that are run, loops inside expressions included, not seconds."""
    steps = {}
    for experts in (16, 256):
        model = torch.nn.ModuleDict({str(n): torch.nn.Linear(2, 2, bias=False) for n in range(experts)})
        adapter = ak.Adapter({
            ak.Target(name): (LoRA(A=torch.zeros(1, 2), B=torch.zeros(2, 1)),) for name in model
        })  # fmt: skip
        ak.torch.inject(model, adapter, name="warm").remove()
        lines = [0]

        def tracing(_frame: Any, event: str, _argument: Any, lines: list[int] = lines) -> Any:
            lines[0] += event == "line"
            return tracing

        before = sys.gettrace()
        sys.settrace(tracing)
        try:
            ak.torch.inject(model, adapter)
        finally:
            sys.settrace(before)
        steps[experts] = lines[0] / experts
    assert steps[256] < 1.1 * steps[16], steps
