# ruff: noqa: F811, ARG001 - fixtures are imported and then named
"""Model cards of what is pushed: what they say validates, what they show runs, and nobody's own is replaced."""

from pathlib import Path

import pytest
from command_line import run
from hub_repository import base_files, hub, laid, lay, peft_files  # noqa: F401 - a fixture
from hub_server import HubServer
from huggingface_hub import ModelCard
from oci_registry import registry  # noqa: F401 - a fixture

import adapterkit as ak

pytestmark = [
    pytest.mark.filterwarnings("ignore:Use 'content:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning"),
]

BASES = b"---\nlicense: other\nlicense_name: tiny-1\nlicense_link: LICENSE\nextra: [1]\n---\nI am the base"


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    return lay(tmp_path / "lora", peft_files())


@pytest.fixture
def merged(hub: HubServer, lora: Path, tmp_path: Path) -> Path:
    """A model that was merged here from a base on the hub, whose card came along."""
    hub.add("org/base", base_files() | {"README.md": BASES})
    ak.merge("org/base", lora, tmp_path / "merged")
    assert (tmp_path / "merged" / "README.md").read_bytes() == BASES
    return tmp_path / "merged"


def told_of(card: str | None) -> dict[str, object]:
    """The metadata of a card that the hub's own tool takes for one."""
    made = ModelCard(card or "")
    made.validate()
    return made.data.to_dict()


def test_the_card_is_one(hub: HubServer, lora: Path, tmp_path: Path) -> None:
    text = ak.hub.push(lora, "org/new", licence="apache-2.0").card or ""
    told = told_of(text)
    assert told["base_model"] == "org/base"
    assert (told["library_name"], told["license"]) == ("peft", "apache-2.0")
    hub.add("org/base", base_files())
    snippet = text.split("```python\n")[1].split("```")[0].replace('"merged"', repr(str(tmp_path / "merged")))
    exec(compile(snippet, "card", "exec"), {})
    assert (tmp_path / "merged" / "model.safetensors").exists()


def test_each_snippet_of_the_cards_runs(
    hub: HubServer, registry: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    for name in ("huggingface_hub.constants.HF_HUB_CACHE", "huggingface_hub.file_download.constants.HF_HUB_CACHE"):
        monkeypatch.setattr(name, str(tmp_path / "hf"))
    monkeypatch.chdir(tmp_path)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=32, num_key_value_heads=2, **sizes)).eval()
    model.save_pretrained(tmp_path / "base")
    ak.hub.push(tmp_path / "base", "hf://org/base", licence="mit")
    tuned = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)).eval()
    tuned.peft_config["default"].base_model_name_or_path = "org/base"
    tuned.save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / "README.md").unlink()
    words = torch.arange(8)[None]

    def run_all(text: str) -> None:
        told_of(text)
        said: dict[str, object] = {}
        for snippet in text.split("```python\n")[1:]:
            exec(compile(snippet.split("```")[0], "card", "exec"), said)
        torch.testing.assert_close(said["model"].eval()(words).logits, tuned(words).logits)  # type: ignore[attr-defined]

    run_all(ak.hub.push(tmp_path / "adapter", "hf://org/adapter@trial", licence="mit").card or "")
    merged = LlamaForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(merged(words).logits, tuned(words).logits)
    for place in ("hf://org/merged", "hf://org/other@trial", f"oci://{registry}/cards/merged:v1"):
        run_all(ak.hub.push(tmp_path / "merged", place).card or "")


def test_a_model_that_was_merged_here_gets_a_card_of_its_own(hub: HubServer, merged: Path) -> None:
    pushed = ak.hub.push(merged, "org/merged")
    text = hub.files("org/merged")["README.md"].decode()
    assert text == pushed.card
    told = told_of(text)
    assert told["base_model"] == "org/base"
    assert (told["base_model_relation"], told["library_name"]) == ("merge", "transformers")
    assert told["tags"] == ["adapterkit", "merge", "lora"]
    licence = {key: told[key] for key in ("license", "license_name", "license_link")}
    assert licence == {"license": "other", "license_name": "tiny-1", "license_link": "LICENSE"}
    assert "I am the base" not in text
    base, adapter = hub.repos["org/base"].branches["main"], ak.read(merged.parent / "lora")
    assert base in text, "the base's commit"
    assert f"| lora | lora | 2 | 1.0 | 1 | read | `{adapter.digest()[:16]}` |" in text
    assert (merged / "README.md").read_bytes() == BASES, "what is here stays as it is"
    assert "generated model card" in run("push", merged, "hf://org/again").output
    again = ak.hub.push(merged, "org/merged")
    assert (again.added, again.replaced, again.card) == ((), (), None)


def test_a_card_written_for_a_merged_model_is_left_alone(hub: HubServer, merged: Path) -> None:
    (merged / "README.md").write_bytes(BASES + b", and I am not")
    assert ak.hub.push(merged, "org/edited").card is None
    assert hub.files("org/edited")["README.md"] == BASES + b", and I am not"
    (merged / "README.md").unlink()
    assert "base_model: org/base" in (ak.hub.push(merged, "org/deleted").card or "")


def test_a_generated_card_does_not_outlive_what_it_is_of(
    hub: HubServer, registry: str, lora: Path, tmp_path: Path
) -> None:
    other = lay(tmp_path / "other", peft_files("org/another"))
    for place in ("hf://org/new", f"oci://{registry}/cards/new:v1"):
        first = ak.hub.push(lora, place, licence="mit").card or ""
        assert ak.hub.push(lora, place).replaced == (), "the same again is no change"
        pushed = ak.hub.push(other, place, overwrite=True)
        assert set(pushed.replaced) == {"README.md", "adapter_config.json"}
        assert told_of(first)["base_model"] == "org/base"
        told = told_of(pushed.card)
        assert (told["base_model"], told["license"]) == ("org/another", "mit")
    hub.repos["org/new"].commit(
        hub.files("org/new") | {"README.md": (pushed.card or "").encode() + b"and I wrote this"}
    )
    assert ak.hub.push(lora, "hf://org/new", overwrite=True).replaced == ("adapter_config.json",)
    assert hub.files("org/new")["README.md"].endswith(b"and I wrote this")


def test_where_the_base_lay_is_no_name_of_it(hub: HubServer, lora: Path, tmp_path: Path) -> None:
    base = lay(tmp_path / "somewhere", base_files())
    ak.merge(base, lora, tmp_path / "merged")
    (tmp_path / "merged" / "README.md").write_text("mine")
    assert ak.hub.push(tmp_path / "merged", "org/mine").card is None, "the base had none: it is one's own"
    (tmp_path / "merged" / "README.md").unlink()
    pushed = ak.hub.push(tmp_path / "merged", "org/merged")
    assert told_of(pushed.card)["base_model"] == "org/base", "as the adapter says"
    private = lay(tmp_path / "private", peft_files("/home/somebody/secret/base"))
    ak.merge(base, private, tmp_path / "again")
    ak.hub.push(tmp_path / "again", "org/private")
    assert not [data for data in hub.files("org/private").values() if b"somebody" in data]


def test_a_base_that_is_a_path_stays_out_of_the_card(hub: HubServer, tmp_path: Path) -> None:
    lora = lay(tmp_path / "lora", peft_files("/home/somebody/secret/base"))
    assert "somebody" not in (ak.hub.push(lora, "org/new").card or "")


def test_a_card_of_ones_own_is_left_alone(hub: HubServer, lora: Path) -> None:
    (lora / "README.md").write_text("---\nlicense: mit\n---\nmine")
    assert ak.hub.push(lora, "org/new").card is None
    assert hub.files("org/new")["README.md"].endswith(b"mine")
    (lora / "README.md").unlink()
    assert ak.hub.push(lora, "org/new").added == ()
    assert hub.files("org/new")["README.md"].endswith(b"mine")
