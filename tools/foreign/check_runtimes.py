"""Runs the same graphs and adapters in several runtimes: `check_runtimes.py DIR OPENVINO GENAI MODULES`.

OPENVINO and GENAI are the interpreters of environments with OpenVINO and with onnxruntime-genai, both with safetensors.
MODULES is a `node_modules` folder with onnxruntime-node and onnxruntime-web. The graphs are written to DIR. Each
runtime opens each graph once and swaps adapters. onnxruntime-web runs in headless Chromium.

A small graph with an embedding, linear layers and a convolution gets its adapters from safetensors files; its outputs
are compared with float64 formulas. A language model, which onnxruntime-genai runs as well, gets its adapters from
`.onnx_adapter` files; see runtime_decoder.py. DIR/runtimes.tsv has a row for each case: runtime, graph, adapter,
result, difference.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "tests" / "shared"))

from runtime_decoder import Decoder  # noqa: E402 - beside this file
from runtime_steps import logits_of  # noqa: E402 - beside this file
from safetensors.numpy import load_file, save_file  # noqa: E402 - after the path

import adapterkit as ak  # noqa: E402 - this checkout's own
from adapterkit.core.adapter import Adapter, Target  # noqa: E402 - this checkout's own
from adapterkit.io.lazy import from_numpy  # noqa: E402 - this checkout's own
from adapterkit.methods import METHODS  # noqa: E402 - this checkout's own

LIMIT = 1e-5

VOCABULARY, WIDTH, HIDDEN, OUT = 12, 16, 24, 8

SHAPES = {"up": (HIDDEN, WIDTH), "conv": (HIDDEN, HIDDEN, 3), "down": (OUT, HIDDEN)}

IDS = np.array([[0, 3, 7, 1, 11], [5, 2, 2, 9, 4]])


def weights() -> dict[str, np.ndarray[Any, Any]]:
    """Return the base: an embedding, a linear layer, a convolution along positions, a linear layer."""
    rng = np.random.default_rng(0)
    held = {name: rng.normal(size=shape).astype("f4") / 4 for name, shape in SHAPES.items()}
    return {"embed": rng.normal(size=(VOCABULARY, WIDTH)).astype("f4"), **held}


def graph(path: Path) -> None:
    """Write the base's graph, with names as torch's older exporter gives them."""
    held = weights()
    stored = {
        "embed.weight": held["embed"], "up.weight": held["up"].T, "conv.weight": held["conv"],
        "down.weight": held["down"].T,
    }  # fmt: skip
    nodes = [
        helper.make_node("Gather", ["embed.weight", "ids"], ["e"], "/embed/Gather"),
        helper.make_node("MatMul", ["e", "up.weight"], ["u"], "/up/MatMul"),
        helper.make_node("Relu", ["u"], ["r"]),
        helper.make_node("Transpose", ["r"], ["t"], perm=[0, 2, 1]),
        helper.make_node("Conv", ["t", "conv.weight"], ["c"], "/conv/Conv", pads=[1, 1]),
        helper.make_node("Transpose", ["c"], ["b"], perm=[0, 2, 1]),
        helper.make_node("MatMul", ["b", "down.weight"], ["y"], "/down/MatMul"),
    ]
    ids = helper.make_tensor_value_info("ids", onnx.TensorProto.INT64, ["batch", "length"])
    y = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["batch", "length", OUT])
    tensors = [numpy_helper.from_array(np.ascontiguousarray(array), name) for name, array in stored.items()]
    made = helper.make_graph(nodes, "small", [ids], [y], tensors)
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)


def computed(held: dict[str, Any]) -> np.ndarray[Any, Any]:
    """Return the output, in float64."""
    e = held["embed"].astype("f8")[IDS]
    u = np.maximum(e @ held["up"].astype("f8").T, 0)
    padded = np.pad(u, ((0, 0), (1, 1), (0, 0)))
    c = sum(padded[:, at : at + IDS.shape[1]] @ held["conv"].astype("f8")[:, :, at].T for at in range(3))
    y: np.ndarray[Any, Any] = np.asarray(c) @ held["down"].astype("f8").T
    return y


def lora(name: str, rank: int, seed: int) -> tuple[Any, Any]:
    """Return a LoRA and its change of the weight."""
    rng, (out, *into) = np.random.default_rng(seed), SHAPES[name]
    A, B = rng.normal(size=(rank, *into)).astype("f4") / 4, rng.normal(size=(out, rank)).astype("f4") / 4
    change = 2.0 * np.tensordot(B.astype("f8"), A.astype("f8"), 1)
    return METHODS["lora"](A=from_numpy(A), B=from_numpy(B), scaling=2.0), change


def scale(name: str, seed: int) -> tuple[Any, Any]:
    """Return an IA3 and its change of the weight."""
    factors = np.random.default_rng(seed).uniform(0.5, 1.5, SHAPES[name][0]).astype("f4")
    change = weights()[name] * (factors.astype("f8") - 1).reshape(-1, *[1] * (len(SHAPES[name]) - 1))
    return METHODS["ia3"](l=from_numpy(factors)), change


def adapters() -> dict[str, dict[str, tuple[Adapter, np.ndarray[Any, Any]]]]:
    """Return method -> name -> an adapter, and the output that it should give."""
    made: dict[str, dict[str, Any]] = {}
    for method, names, change in (
        ("lora", {"rank 2": 2, "rank 5": 5}, lambda at, rank: lora(at, rank, rank)),
        ("ia3", {"first": 1, "second": 2}, scale),
    ):
        for name, number in names.items():
            found = {at: change(at, number) for at in SHAPES}
            held = weights()
            held |= {at: held[at] + D for at, (_, D) in found.items()}
            adapter = Adapter({Target(at): (update,) for at, (update, _) in found.items()})
            made.setdefault(method, {})[name] = adapter, computed(held)
    return made


def cases(home: Path) -> list[dict[str, Any]]:
    """Write graphs and adapter files; return each graph with the tensors to feed and the wanted output."""
    base, found = home / "base.onnx", list[dict[str, Any]]()
    graph(base)
    save_file({"ids": IDS}, home / "ids.safetensors")
    for method, known in adapters().items():
        first = [*known][-1]  # Of the larger rank, which the slots of a convolution keep.
        for mode in ("constant", "inputs"):
            ak.onnx.inject(base, known[first][0], home / f"{method}-{mode}.onnx", mode=mode)
        ak.onnx.merge(base, known[first][0], home / f"{method}-merged.onnx")
        for mode in ("constant", "merged"):
            found.append({"graph": f"{method}-{mode}.onnx", "adapter": first, "slots": None, "wanted": known[first][1]})
        swapped = home / f"{method}-inputs.onnx"
        neutral = f"{swapped.name}.neutral.safetensors"
        plain = {"graph": swapped.name, "adapter": "none", "slots": neutral, "wanted": computed(weights())}
        for name, (adapter, wanted) in known.items():
            file = home / f"{method}-{name.replace(' ', '-')}.safetensors"
            ak.onnx.write_adapter(swapped, adapter, file)
            found.append({"graph": swapped.name, "adapter": name, "slots": file.name, "wanted": wanted})
            found.append(plain)
    return found


Run = Callable[[Path, list[dict[str, Any]]], list[Any]]
"""Runs all cases in a runtime; returns the outputs. Cases of the decoder have its tokens."""


def by_onnxruntime(home: Path, asked: list[dict[str, Any]]) -> list[Any]:
    """Run all cases in onnxruntime."""
    import onnxruntime

    sessions: dict[str, Any] = {}
    outputs = []
    for case in asked:
        key = case["graph"]
        if key not in sessions:
            sessions[key] = onnxruntime.InferenceSession(str(home / key), providers=["CPUExecutionProvider"])
        session = sessions[key]
        if "steps" in case:
            feeds = {}
            if case["slots"] is not None:
                read = onnxruntime.AdapterFormat.read_adapter(str(home / case["slots"])).get_parameters()
                feeds = {name: value.numpy() for name, value in read.items()}
            outputs.append(logits_of(partial(_named, session), case, feeds))
            continue
        feeds = {} if case["slots"] is None else load_file(home / case["slots"])
        outputs.append(session.run(None, {"ids": IDS, **feeds})[0].ravel().tolist())
    return outputs


def _named(session: Any, feeds: dict[str, Any]) -> dict[str, Any]:
    """Return the outputs of onnxruntime by name."""
    names = [one.name for one in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


OPENVINO = """
import json, sys
import openvino
from runtime_steps import logits_of, read_adapter
from safetensors.numpy import load_file

core, models, outputs = openvino.Core(), {}, []
for case in json.load(open("cases.json")):
    if case["graph"] not in models:
        model = core.read_model(case["graph"])
        if "steps" in case:
            # OpenVINO reads an empty cache as one of an empty batch, unless the size of the batch is fixed.
            fixed = [one for one in model.inputs if ".lora." not in one.any_name and ".ia3." not in one.any_name]
            model.reshape({one.any_name: [1, *list(one.partial_shape)[1:]] for one in fixed})
        models[case["graph"]] = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    model = models[case["graph"]]
    if "steps" in case:
        run = lambda feeds: {one.any_name: array for one, array in model(feeds).items()}
        held = {} if case["slots"] is None else read_adapter(case["slots"])
        outputs.append(logits_of(run, case, held))
        continue
    feeds = load_file("ids.safetensors") | ({} if case["slots"] is None else load_file(case["slots"]))
    outputs.append(model(feeds)[0].ravel().tolist())
print(json.dumps(outputs))
"""


def by_openvino(python: str, home: Path, _: list[dict[str, Any]]) -> list[Any]:
    """Run all cases in OpenVINO, in its own environment."""
    return _by_python(python, OPENVINO, home)


GENAI = """
import json
import numpy as np
import onnxruntime_genai as og

models, adapters, outputs = {}, {}, []
for case in json.load(open("cases.json")):
    if "steps" not in case:
        outputs.append(None)
        continue
    folder = case["graph"].rpartition("/")[0]
    if folder not in models:
        models[folder] = og.Model(folder)
        adapters[folder] = og.Adapters(models[folder])
    params = og.GeneratorParams(models[folder])
    params.set_search_options(max_length=32)
    generator = og.Generator(models[folder], params)
    if case["slots"] is not None:
        try:
            adapters[folder].load(case["slots"], case["slots"])
        except Exception as error:
            if "already" not in str(error):
                raise
        generator.set_active_adapter(adapters[folder], case["slots"])
    told = []
    for tokens in case["steps"]:
        generator.append_tokens(np.array([tokens], dtype=np.int32))
        told += np.asarray(generator.get_output("logits"), dtype=np.float32).ravel().tolist()
    outputs.append(told)
print(json.dumps(outputs))
"""


def by_genai(python: str, home: Path, _: list[dict[str, Any]]) -> list[Any]:
    """Run the cases of the decoder in onnxruntime-genai, in its own environment; None for all other cases."""
    return _by_python(python, GENAI, home)


def _by_python(python: str, text: str, home: Path) -> list[Any]:
    """Run a program in another environment; return what its last line says."""
    own = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run([python, "-c", text], cwd=home, capture_output=True, text=True, check=False, env=own)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    outputs: list[Any] = json.loads(done.stdout.splitlines()[-1])
    return outputs


JAVASCRIPT = """
function tensors(ort, buffer) {
  const length = Number(new DataView(buffer).getBigUint64(0, true));
  const header = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 8, length)));
  const kinds = { F32: ["float32", Float32Array], I64: ["int64", BigInt64Array] };
  const found = {};
  for (const [name, entry] of Object.entries(header)) {
    if (name === "__metadata__") continue;
    const [kind, Numbers] = kinds[entry.dtype];
    const [start, stop] = entry.data_offsets;
    found[name] = new ort.Tensor(kind, new Numbers(buffer.slice(8 + length + start, 8 + length + stop)), entry.shape);
  }
  return found;
}
function readAdapter(ort, buffer) {
  const view = new DataView(buffer), u32 = (at) => view.getUint32(at, true);
  const field = (table, number) => table + view.getUint16(table - view.getInt32(table, true) + 4 + 2 * number, true);
  const follow = (at) => at + u32(at);
  const listed = follow(field(follow(0), 3)), found = {};
  for (let number = 0; number < u32(listed); number++) {
    const table = follow(listed + 4 + 4 * number);
    const [name, sizes, numbers] = [0, 1, 3].map((at) => follow(field(table, at)));
    if (view.getInt32(field(table, 2), true) !== 1) throw new Error("not float32");
    const shape = Array.from({ length: u32(sizes) }, (_, at) => Number(view.getBigInt64(sizes + 4 + 8 * at, true)));
    const array = new Float32Array(buffer.slice(numbers + 4, numbers + 4 + u32(numbers)));
    const key = new TextDecoder().decode(new Uint8Array(buffer, name + 4, u32(name)));
    found[key] = new ort.Tensor("float32", array, shape);
  }
  return found;
}
async function logits(ort, session, one, held) {
  const integers = (numbers) => new ort.Tensor("int64", BigInt64Array.from(numbers, BigInt), [1, numbers.length]);
  const count = (stop, start = 0) => Array.from({ length: stop - start }, (_, at) => start + at);
  let past = {}, seen = 0, told = [];
  const empty = () => new ort.Tensor("float32", new Float32Array(0), [1, one.heads, 0, one.size]);
  for (const name of one.past) past[name] = empty();
  for (const tokens of one.steps) {
    const feeds = { ...held, ...past, input_ids: integers(tokens) };
    feeds.position_ids = integers(count(seen + tokens.length, seen));
    seen += tokens.length;
    feeds.attention_mask = integers(count(seen).map(() => 1));
    const found = await session.run(feeds);
    told = told.concat(Array.from(found.logits.data));
    for (const name of one.past) past[name] = found[name.replace("past_key_values", "present")];
  }
  return told;
}
async function outputs(ort, read, cases) {
  const sessions = {}, found = [];
  for (const one of cases) {
    sessions[one.graph] ??= await ort.InferenceSession.create(new Uint8Array(await read(one.graph)));
    if (one.steps) {
      const held = one.slots === null ? {} : readAdapter(ort, await read(one.slots));
      found.push(await logits(ort, sessions[one.graph], one, held));
      continue;
    }
    const feeds = tensors(ort, await read("ids.safetensors"));
    if (one.slots !== null) Object.assign(feeds, tensors(ort, await read(one.slots)));
    found.push(Array.from((await sessions[one.graph].run(feeds)).y.data));
  }
  return found;
}
"""

NODE = """
const fs = require("fs"), ort = require(process.argv[2] + "/onnxruntime-node");
const read = async (name) => { const held = fs.readFileSync(name); return new Uint8Array(held).buffer; };
outputs(ort, read, JSON.parse(fs.readFileSync("cases.json"))).then((found) => console.log(JSON.stringify(found)));
"""

PAGE = """<!doctype html><script src="/modules/onnxruntime-web/dist/ort.wasm.min.js"></script><script>
ort.env.wasm.wasmPaths = "/modules/onnxruntime-web/dist/";
ort.env.wasm.numThreads = 1;
"""


def by_node(modules: Path, home: Path, _: list[dict[str, Any]]) -> list[Any]:
    """Run all cases in onnxruntime-node."""
    script = home / "run.cjs"
    script.write_text(JAVASCRIPT + NODE, encoding="utf-8")
    done = subprocess.run(["node", script, modules], cwd=home, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(next((line for line in done.stderr.splitlines() if "Error" in line), done.stderr[:200]))
    outputs: list[Any] = json.loads(done.stdout.splitlines()[-1])
    return outputs


def by_web(modules: Path, home: Path, _: list[dict[str, Any]]) -> list[Any]:
    """Run all cases in onnxruntime-web, in headless Chromium."""
    import chromium

    (home / "index.html").write_text(PAGE + JAVASCRIPT + "</script>", encoding="utf-8")
    link = home / "modules"
    if not link.exists():
        link.symlink_to(modules)
    read = "async (name) => (await fetch('/' + name)).arrayBuffer()"
    ask = f"(async () => JSON.stringify(await outputs(ort, {read}, await (await fetch('/cases.json')).json())))()"
    with _served(home) as address, chromium.page(home / "profile") as page:
        page.open(f"{address}/index.html")
        outputs: list[Any] = json.loads(page.evaluate(ask))
    return outputs


@contextmanager
def _served(home: Path) -> Iterator[str]:
    """Serve a folder on this machine, without a word on the console."""

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(home)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()


def main() -> int:
    """Run the command line; 1 if a case is wrong."""
    home, openvino, genai, modules = Path(sys.argv[1]).resolve(), *sys.argv[2:4], Path(sys.argv[4]).resolve()
    home.mkdir(parents=True, exist_ok=True)
    asked = [*cases(home), *Decoder(home).cases()]
    plain = [{key: value for key, value in case.items() if key != "wanted"} for case in asked]
    (home / "cases.json").write_text(json.dumps(plain), encoding="utf-8")
    tools: dict[str, Run] = {
        "onnxruntime": by_onnxruntime, "onnxruntime-genai": partial(by_genai, genai),
        "OpenVINO": partial(by_openvino, openvino),
        "onnxruntime-node": partial(by_node, modules), "onnxruntime-web": partial(by_web, modules),
    }  # fmt: skip
    rows, wrong = ["runtime\tgraph\tadapter\tresult\tdifference"], 0
    for name, run in tools.items():
        try:
            outputs = run(home, asked)
        except Exception as error:  # Whatever a runtime raises is what came of it.
            rows.append(f"{name}\t\t\tnot run: {error}\t")
            wrong += 1
            continue
        for case, output in zip(asked, outputs, strict=True):
            if output is None:
                continue
            wanted = case["wanted"]
            difference = float(abs(np.array(output).reshape(wanted.shape) - wanted).max() / abs(wanted).max())
            wrong += difference > LIMIT
            said = "right" if difference <= LIMIT else "wrong"
            rows.append(f"{name}\t{case['graph']}\t{case['adapter']}\t{said}\t{difference:.2g}")
    (home / "runtimes.tsv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    print("\n".join(rows))
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
