# ruff: noqa: F811, ARG001 - fixtures are imported and then named
"""Adapters written to hubs by the commands that make them, and read from hubs by those that look at them."""

import json
from pathlib import Path

import numpy as np
import pytest
from bucket_server import bucket, server  # noqa: F401 - fixtures
from command_line import record, run
from hub_repository import base_files, hub, laid, lay, peft_files  # noqa: F401 - a fixture
from hub_server import Fault, HubServer
from oci_registry import registry  # noqa: F401 - a fixture
from safetensors.numpy import load, save

import adapterkit as ak
from adapterkit.formats import FORMATS

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content:DeprecationWarning")

VECTORS = Path(__file__).parents[2] / "spec" / "vectors" / "formats"
CARD = b"---\nlicense: apache-2.0\n---\nmine"


def tuned_files() -> dict[str, bytes]:
    weight = load(base_files()["model.safetensors"])["layers.0.q.weight"]
    tuned = {"layers.0.q.weight": weight + np.outer(np.arange(8), np.arange(4)).astype(np.float32)}
    return {**base_files(), "model.safetensors": save(tuned, {"format": "pt"})}


@pytest.fixture
def places(hub: HubServer) -> HubServer:
    """A base, a tuned base and two adapters on a hub."""
    hub.add("org/base", base_files())
    hub.add("org/tuned", tuned_files())
    hub.add("org/lora", peft_files() | {"README.md": CARD})
    hub.add("org/two", peft_files("org/another") | {"README.md": CARD})
    return hub


@pytest.fixture(params=["hf", "oci", "s3"])
def out(request: pytest.FixtureRequest) -> str:
    """A place of each kind where nothing is."""
    if request.param == "hf":
        return "hf://org/out"
    if request.param == "oci":
        return f"oci://{request.getfixturevalue('registry')}/outputs/{abs(hash(request.node.name)):x}:v1"
    return f"s3://{request.getfixturevalue('bucket')}/out"


MADE = [
    ("convert", "hf://org/lora", None, "--to", "adapterkit"),
    ("convert", "org/lora", None, "--to", "peft"),
    ("combine", "hf://org/lora", "org/two", "-o", None),
    ("combine", "hf://org/lora", "org/two", "--method", "ties", "-o", None, "--to", "adapterkit"),
    ("resize", "hf://org/lora", "--rank", "1", "-o", None),
    ("extract", "hf://org/tuned", "--base", "org/base", "--rank", "1", "-o", None),
]


@pytest.mark.parametrize("words", MADE, ids=lambda words: " ".join(word or "OUT" for word in words))
def test_what_a_command_makes_goes_to_a_hub(
    places: HubServer, out: str, tmp_path: Path, words: tuple[str | None, ...]
) -> None:
    local = tmp_path / "local"
    there = record(*(word or out for word in words))
    here = record(*(word or local for word in words))
    assert there.pop("out") == out
    del here["out"]
    assert there == here
    ak.hub.pull(out, tmp_path / "back")
    back = {name: data for name, data in laid(tmp_path / "back").items() if name != ".gitattributes"}
    card = back.pop("README.md").decode()
    assert back == laid(local) if local.is_dir() else {local.read_bytes()} <= set(back.values())
    assert ("license: apache-2.0" in card) == ("extract" not in words)
    assert not list((tmp_path / "cache" / "outgoing").iterdir())
    assert run("diff", out, local).exit_code == 0
    assert run("validate", out).exit_code == 0
    assert record("inspect", out)["totals"] == record("inspect", local)["totals"]


def test_nothing_there_is_overwritten_silently(places: HubServer, out: str) -> None:
    first = ["convert", "org/lora", out, "--to", "peft"]
    assert run(*first).exit_code == 0
    assert run(*first).exit_code == 0, "the same again is no change"
    digest = ak.read(out).digest()
    other = ["combine", "org/lora", "org/two", "--to", "peft", "--weight", "3", "--weight", "1", "-o", out]
    answer = record(*other, code=6)["error"]
    assert "overwrit" in answer["cure"]
    assert ak.read(out).digest() == digest
    assert run(*other, "--overwrite").exit_code == 0


def test_what_cannot_be_pushed_is_said_before_any_work(places: HubServer, tmp_path: Path) -> None:
    assert record("convert", "org/lora", "hf://org/lora", "--to", "mlx", code=2)["error"]["code"] == "usage"
    assert run("convert", "org/lora", "nowhere://x/y", "--to", "mlx").exit_code == 2
    assert run("convert", "org/lora", "oci://127.0.0.1:1/x/y:v1", "--to", "mlx").exit_code == 5
    assert run("convert", "org/lora", "memory://things/new", "--to", "mlx").exit_code == 3
    assert sorted(path.name for path in tmp_path.iterdir() if path.name not in ("hf", "cache")) == []
    assert not list((tmp_path / "cache" / "outgoing").rglob("*.safetensors"))


def test_the_next_command_goes_on_where_a_push_stopped(places: HubServer) -> None:
    command = ["convert", "org/lora", "hf://org/out", "--to", "peft"]
    places.faults = [Fault("/commit/", "status", 99, 503, {"Retry-After": "0"})]
    assert run(*command).exit_code == 5
    places.faults = []
    assert run("convert", "org/lora", "hf://org/out", "--to", "adapterkit").exit_code == 0
    assert set(places.files("org/out")) == {".gitattributes", "README.md", "adapter.safetensors"}


NATIVE = {path.parts[-3]: path for path in sorted(VECTORS.glob("*/*/*.native.safetensors"), reverse=True)}
"""Of each format, an adapter that it can say. NeMo's order of rows needs a base."""


@pytest.mark.parametrize("kind", [name for name in FORMATS if FORMATS[name].file and name in NATIVE.keys() - {"nemo"}])
def test_an_adapter_of_one_file_is_read_from_its_place(hub: HubServer, tmp_path: Path, kind: str) -> None:
    uri, native = f"hf://org/{kind.replace('_', '-')}", NATIVE[kind]
    assert run("convert", native, uri, "--to", kind).exit_code == 0
    assert ak.detect(uri) == kind
    ak.hub.pull(uri, tmp_path / "out")
    (file,) = (tmp_path / "out").glob(FORMATS[kind].file)
    assert ak.read(uri).digest() == ak.read(file).digest()
    assert record("inspect", uri)["format"] == kind


def test_a_place_is_copied_to_another(places: HubServer, registry: str, tmp_path: Path) -> None:
    uri = f"oci://{registry}/copies/lora:v1"
    assert run("push", "hf://org/lora", uri).exit_code == 0
    ak.hub.pull(uri, tmp_path / "back")
    assert laid(tmp_path / "back") == places.files("org/lora")
    assert run("push", uri, "hf://org/native", "--to", "adapterkit").exit_code == 0
    assert b"license: apache-2.0" in places.files("org/native")["README.md"]


def test_a_merged_model_has_a_card_of_its_own_and_its_bases_licence(places: HubServer) -> None:
    places.add("org/base", base_files() | {"README.md": b"---\nlicense: mit\n---\nI am the base"})
    assert run("merge", "hf://org/base", "hf://org/lora", "-o", "hf://org/merged").exit_code == 0
    card = places.files("org/merged")["README.md"].decode()
    assert "license: mit" in card
    assert "base_model: org/base" in card
    assert "I am the base" not in card


@pytest.mark.parametrize("base", ["hf://org/base", "hf://org/base/model.safetensors"])
def test_a_merged_model_is_verified_where_it_is(places: HubServer, registry: str, base: str) -> None:
    uri = f"oci://{registry}/merged/{len(base)}:v1"
    assert run("merge", base, "hf://org/lora", "-o", uri).exit_code == 0
    assert run("verify", uri, "--base", "hf://org/base", "--adapter", "hf://org/lora").exit_code == 0
    assert run("verify", uri, "--base", "hf://org/base", "--adapter", "hf://org/two", "--weight", "2").exit_code == 1
    assert json.dumps(record("inspect", uri)["files"]) == '["model.safetensors"]'


def test_a_graph_is_read_with_the_files_beside_it(hub: HubServer, tmp_path: Path) -> None:
    import onnx
    from onnx_graphs import built

    graph = built("gemm")[2]
    (tmp_path / "graph").mkdir()
    file = tmp_path / "graph" / "model.onnx"
    onnx.save_model(graph, file, save_as_external_data=True, location="model.onnx_data", size_threshold=100)
    key, draw = "base_model.model.0.lora_{}.weight", np.random.default_rng(5)
    factors = {key.format("A"): draw.normal(size=(2, 16)), key.format("B"): draw.normal(size=(8, 2))}
    saved = save({name: value.astype(np.float32) for name, value in factors.items()}, {"format": "pt"})
    lora = lay(tmp_path / "lora", peft_files() | {"adapter_model.safetensors": saved})
    hub.add("org/graph", laid(tmp_path / "graph") | {"other.onnx": b"not asked for"})
    there = "hf://org/graph/model.onnx"
    assert record("inspect", there)["totals"] == record("inspect", file)["totals"]
    result = run("merge", there, lora, "-o", tmp_path / "merged.onnx")
    assert result.exit_code == 0, result.output
    assert run("inject", there, lora, "-o", tmp_path / "injected.onnx").exit_code == 0
    assert not hub.asked("other.onnx")
    assert run("merge", there, lora, "-o", "hf://org/out").exit_code == 3
