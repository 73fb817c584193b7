# ruff: noqa: F811, ARG001 - a fixture is imported and then named
"""Pushing to a hub: one commit, nothing overwritten silently, and what was pushed is what others load."""

import contextlib
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import record, run
from hub_repository import base_files, hub, laid, lay, peft_files  # noqa: F401 - a fixture
from hub_server import TOKEN, Fault, HubServer
from huggingface_hub import HfApi
from huggingface_hub.errors import RepositoryNotFoundError
from safetensors.numpy import save

import adapterkit as ak
from adapterkit.errors import NetworkError, StorageError, UnknownFormat
from adapterkit.hub import reading

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content:DeprecationWarning")
"""huggingface_hub's own, where it uploads a file by its HTTP stack."""


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    return lay(tmp_path / "lora", peft_files())


def test_what_was_pushed_is_pulled_again(hub: HubServer, lora: Path, tmp_path: Path) -> None:
    pushed = ak.hub.push(lora, "hf://org/new", tag="v1")
    assert pushed.created
    assert pushed.commit == hub.repos["org/new"].tags["v1"]
    ak.hub.pull("hf://org/new@v1", tmp_path / "back")
    back = laid(tmp_path / "back")
    assert {name: back[name] for name in peft_files()} == peft_files()
    assert ak.read(tmp_path / "back").digest() == ak.read(lora).digest()
    assert len(hub.asked("/commit/")) == 1
    again = ak.hub.push(tmp_path / "back", "org/new")
    assert (again.added, again.replaced, again.commit) == ((), (), pushed.commit)
    assert len(hub.asked("/commit/")) == 1


def test_the_native_form_and_a_merged_model(hub: HubServer, lora: Path, tmp_path: Path) -> None:
    ak.hub.push(lora, "org/native", format="adapterkit")
    assert ak.read("org/native").digest() == ak.read(lora).digest()
    hub.add("org/base", base_files())
    ak.merge("org/base", lora, tmp_path / "merged")
    pushed = ak.hub.push(tmp_path / "merged", "org/merged")
    assert "base_model: org/base" in (pushed.card or "")
    assert run("verify", "org/merged", "--base", "org/base", "--adapter", lora).exit_code == 0


def test_peft_loads_what_was_pushed_in_its_form(
    hub: HubServer, lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from peft import PeftModel

    native = tmp_path / "native.safetensors"
    ak.write(ak.read(lora), native)
    ak.hub.push(native, "org/peft", format="peft")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf"))
    base = torch.nn.Module()
    base.layers = torch.nn.ModuleList([torch.nn.ModuleDict({"q": torch.nn.Linear(4, 8, bias=False)})])
    weight = base.layers[0]["q"].weight.detach().clone()
    merged = PeftModel.from_pretrained(base, "org/peft", cache_dir=str(tmp_path / "hf")).merge_and_unload()
    delta = ak.read(lora).delta("layers.0.q")
    torch.testing.assert_close(merged.layers[0]["q"].weight, weight + delta)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_transformers_loads_a_merged_model_that_was_pushed(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf"))
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=32, num_key_value_heads=2, **sizes)).eval()
    model.save_pretrained(tmp_path / "base")
    tuned = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)).eval()
    tuned.save_pretrained(tmp_path / "adapter")
    ak.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    ak.hub.push(tmp_path / "merged", "org/merged")
    loaded = AutoModelForCausalLM.from_pretrained("org/merged", cache_dir=str(tmp_path / "hf")).eval()
    words = torch.arange(8)[None]
    torch.testing.assert_close(loaded(words).logits, tuned(words).logits)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("single", [True, False], ids=["one file", "shards"])
def test_weight_files_that_are_too_large_are_parted(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, single: bool
) -> None:
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf"))
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, num_key_value_heads=2, **sizes)).eval()
    here = tmp_path / "model"
    model.save_pretrained(here, max_shard_size="1GB" if single else "12KB")
    lay(here, {"README.md": b"mine", "tokenizer.json": b"{}"})
    pushed = record("push", here, "hf://org/parted", "--shard-size", "8KB")
    assert pushed["card"] is None
    there = hub.files("org/parted")
    assert there["README.md"] == b"mine"
    weights = {name: data for name, data in there.items() if name.endswith(".safetensors")}
    assert len(weights) > 2
    assert all(len(data) < 10_000 for data in weights.values()), "headers aside"
    assert sorted(there.keys() - weights.keys() - {".gitattributes"}) == sorted(
        {*(laid(here).keys() - {name for name in laid(here) if "safetensors" in name}), "model.safetensors.index.json"}
    )
    loaded = AutoModelForCausalLM.from_pretrained("org/parted", cache_dir=str(tmp_path / "hf")).eval()
    words = torch.arange(8)[None]
    torch.testing.assert_close(loaded(words).logits, model(words).logits, rtol=0, atol=0)
    assert record("push", here, "hf://org/parted", "--shard-size", "8KB")["added"] == [], "the same again"
    assert record("push", here, "hf://org/whole", "--shard-size", "1GB")["added"] == sorted(laid(here))
    assert [path.name for path in (tmp_path / "cache" / "scratch").iterdir()] == ["lock"]


def test_a_parted_merged_model_is_still_what_it_was(hub: HubServer, lora: Path, tmp_path: Path) -> None:
    two = {"layers.0.q.weight": np.ones((8, 4), np.float32), "layers.0.k.weight": np.ones((8, 4), np.float32)}
    hub.add("org/base", base_files() | {"model.safetensors": save(two, {"format": "pt"})})
    ak.merge("org/base", lora, tmp_path / "merged", checksums=True)
    ak.hub.push(tmp_path / "merged", "org/merged", shard_size=128)
    assert "model-00002-of-00002.safetensors" in hub.files("org/merged")
    assert run("verify", "org/merged", "--base", "org/base", "--adapter", lora).exit_code == 0
    assert run("verify", "org/merged").exit_code == 2, "sums of files that are not there are none"
    assert b"base_model: org/base" in hub.files("org/merged")["README.md"]


def test_an_adapter_is_not_parted(hub: HubServer, lora: Path) -> None:
    for more in ((), ("--to", "adapterkit")):
        assert record("push", lora, "org/new", "--shard-size", "1KB", *more, code=2)["error"]["code"] == "usage"
    assert hub.repos == {}


def test_nothing_is_overwritten_silently(hub: HubServer, lora: Path) -> None:
    hub.add("org/lora", peft_files("org/another"))
    before = hub.files("org/lora")
    with pytest.raises(StorageError, match=r"adapter_config\.json"):
        ak.hub.push(lora, "org/lora")
    assert hub.files("org/lora") == before
    pushed = ak.hub.push(lora, "org/lora", overwrite=True)
    assert pushed.replaced == ("adapter_config.json",)
    assert hub.files("org/lora")["adapter_config.json"] == peft_files()["adapter_config.json"]


def test_a_dry_run_writes_nothing(hub: HubServer, lora: Path) -> None:
    told = record("push", lora, "org/new", "--dry-run")
    assert told["added"] == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    assert told["created"]
    assert hub.repos == {}
    assert {method for method, _, _ in hub.requests} == {"GET"}


def test_private_a_branch_and_a_folder(hub: HubServer, lora: Path) -> None:
    assert run("push", lora, "org/new", "--private", "--revision", "trial").exit_code == 0
    repo = hub.repos["org/new"]
    assert repo.private
    assert set(hub.files("org/new", "trial")) > set(peft_files())
    assert set(hub.files("org/new", "main")) == {".gitattributes"}
    ak.hub.push(lora, "hf://org/new/sub")
    assert {name for name in hub.files("org/new") if name.startswith("sub/")} == {f"sub/{n}" for n in peft_files()}
    assert ak.read("hf://org/new/sub").digest() == ak.read(lora).digest()


def test_hidden_files_and_what_is_no_model_stay_here(hub: HubServer, lora: Path, tmp_path: Path) -> None:
    lay(lora, {".env": b"SECRET=1", ".git/config": b"x"})
    ak.hub.push(lora, "org/new")
    assert not {name for name in hub.files("org/new") if "env" in name or name.startswith(".git/")}
    with pytest.raises(UnknownFormat):
        ak.hub.push(lay(tmp_path / "letters", {"a.txt": b"dear"}), "org/letters")
    assert "org/letters" not in hub.repos


@pytest.mark.parametrize(
    ("match", "kind", "value"),
    [
        ("/commit/", "status", 503), ("/commit/", "status", 429), ("/commit/", "drop", None),
        ("/commit/", "after", None), ("/preupload/", "drop", None), ("/api/repos/create", "status", 503),
        ("/api/repos/create", "drop", None), ("/tag/", "status", 503), ("batch", "drop", None),
        ("/tag/", "after", None),
    ],
)  # fmt: skip
def test_faults_of_the_moment_are_overcome(
    hub: HubServer, lora: Path, match: str, kind: str, value: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)
    hub.faults = [Fault(match, kind, 2 if kind == "status" else 1, value, {"Retry-After": "0"})]
    pushed = ak.hub.push(lora, "org/new", tag="v1")
    assert hub.faults[0].times == 0
    assert hub.files("org/new", "v1")["adapter_model.safetensors"] == peft_files()["adapter_model.safetensors"]
    assert len(hub.repos["org/new"].commits) == 2, "the first, and one of ours"
    assert pushed.commit == hub.repos["org/new"].branches["main"]


def test_a_tag_that_is_on_something_else_stays_there(hub: HubServer, lora: Path, tmp_path: Path) -> None:
    first = ak.hub.push(lora, "org/new", tag="v1")
    assert ak.hub.push(lora, "org/new", tag="v1").tag == "v1", "the same again is no change"
    other = lay(tmp_path / "other", peft_files("org/another"))
    answer = record("push", other, "org/new", "--overwrite", "--tag", "v1", code=6)["error"]
    assert (answer["why"], answer["cure"]) == ("the tag exists and points to another commit", "Choose another tag")
    assert hub.repos["org/new"].tags["v1"] == first.commit


def test_somebody_who_pushed_meanwhile_is_not_overwritten(
    hub: HubServer, lora: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from adapterkit.hub.hubs import hf as _committing

    hub.add("org/lora", {"theirs": b"1"})
    real = _committing.head_of

    def head(remote: object) -> str:
        found = real(remote)
        hub.repos["org/lora"].commit({"theirs": b"2"})
        return found

    monkeypatch.setattr(_committing, "head_of", head)
    with pytest.raises(NetworkError, match="in the meantime"):
        ak.hub.push(lora, "org/lora")
    assert hub.files("org/lora") == {"theirs": b"2"}


def test_an_observer_never_sees_half_of_it(hub: HubServer, lora: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = frozenset({".gitattributes"})
    seen: set[frozenset[str]] = set()
    done, looked = threading.Event(), threading.Event()

    def watch() -> None:
        api = HfApi(endpoint=hub.url, token=TOKEN)
        while not done.is_set():
            with contextlib.suppress(RepositoryNotFoundError):
                seen.add(frozenset(api.list_repo_files("org/new")))
            if first in seen:
                looked.set()

    commit = HfApi.create_commit

    def after_a_look(*args: Any, **more: Any) -> Any:
        """On a busy machine, the whole push may take less time than the observer needs to begin."""
        assert looked.wait(60)
        return commit(*args, **more)

    monkeypatch.setattr(HfApi, "create_commit", after_a_look)
    observer = threading.Thread(target=watch)
    observer.start()
    try:
        ak.hub.push(lora, "org/new")
    finally:
        done.set()
        observer.join()
    seen.add(frozenset(hub.files("org/new")))
    assert seen <= {first, first | frozenset(peft_files()) | {"README.md"}}


def test_who_may_not_write_is_told_so(hub: HubServer, lora: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("org/lora", {"theirs": b"1"})
    monkeypatch.setenv("HF_TOKEN", "")
    answer = record("push", lora, "org/lora", code=5)["error"]
    assert answer["code"] == "access"
    assert "HF_TOKEN" in answer["cure"]
    assert hub.files("org/lora") == {"theirs": b"1"}


@pytest.mark.parametrize("status", [400, 403, 404, 412, 422])
def test_no_token_in_errors_or_reports(hub: HubServer, lora: Path, status: int) -> None:
    assert TOKEN not in run("push", lora, "org/fine", "--json").output
    hub.faults = [Fault("/commit/", "status", 99, status)]
    result = run("push", lora, "org/new", "--debug", "--json")
    assert result.exit_code == 5, result.output
    assert TOKEN not in result.output
    assert reading._seen == {}
