"""Applies an adapter's formula to the layers of a graph by the onnx package alone: an expectation for changed graphs.

Weights are computed by onnxruntime from what the graph stores, dequantized where they are packed. The formulas of LoRA,
DoRA and IA3 are written here in numpy, in float64. After each node of a layer, a copy of the node with the change as
its weight is added; recurrent nodes get the changed weight. Nothing here uses adapterkit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import NodeProto, helper, numpy_helper

WEIGHTED = {
    "MatMul": 1, "Gemm": 1, "Conv": 1, "ConvTranspose": 1, "Gather": 0, "MatMulInteger": 1, "ConvInteger": 1,
    "DynamicQuantizeMatMul": 1,
}  # fmt: skip
"""Operator -> position of its weight; a MatMul may have it on the left."""

RECURRENT = {"LSTM": (0, 3, 1, 2), "GRU": (1, 0, 2), "RNN": (0,)}
"""Operator -> torch's blocks of rows (i f g o; r z n) in the order of ONNX (i o f c; z r h)."""


@dataclass(slots=True)
class Used:
    """A node that uses a layer's weight: its graph, its position of the weight, and where the change is added.

    Attributes:
        graph: the graph or subgraph of the node.
        node: the node.
        position: the position of the weight among the inputs.
        x: the name of the layer's input in floating point.
        y: the name of the output to which the change is added.
        back: the direction of a recurrent node.
    """

    graph: Any
    node: NodeProto
    position: int
    x: str
    y: str
    back: int = 0


@dataclass(slots=True)
class Weighted:
    """A layer: its weight as formulas see it, `[out, in, *k]`, its bias, and the nodes that use it."""

    weight: np.ndarray
    bias: np.ndarray | None
    used: list[Used] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Formula:
    """The tensors of LoRA, DoRA or IA3 at one layer."""

    method: str
    tensors: Mapping[str, np.ndarray]

    def change(self, W: np.ndarray) -> Any:
        """Return how much the weight changes."""
        t = {name: each.astype("f8") for name, each in self.tensors.items()}
        if self.method == "ia3":
            return (t["l"] - 1).reshape(-1, *[1] * (W.ndim - 1)) * W
        D = (t["B"] @ t["A"].reshape(len(t["A"]), -1)).reshape(W.shape)
        if self.method == "lora":
            return D
        V = (W + D).reshape(len(W), -1)
        return (V * (t["magnitude"] / np.sqrt((V * V).sum(1)))[:, None]).reshape(W.shape) - W

    def bias_change(self, b: np.ndarray | None) -> Any:
        """Return how much the bias changes; None if it does not."""
        return None if b is None or self.method != "ia3" else (self.tensors["l"].astype("f8") - 1) * b


class Reference:
    """A graph whose layers can be changed by a formula.

    Args:
        path: the graph.
    """

    def __init__(self, path: Path) -> None:
        self.model = onnx.load(str(path))
        self.opset = next(one.version for one in self.model.opset_import if one.domain in ("", "ai.onnx"))

    def layers(self) -> Iterator[tuple[str, str, Weighted]]:
        """Yield the first output and the operator of each node with a weight, and its layer; recurrent nodes twice."""
        known = Constants(self.model)
        for graph, node in list(walked(self.model.graph)):
            if node.op_type in RECURRENT:
                yield from self._recurrent(known, graph, node)
            elif node.op_type in WEIGHTED and (found := self._layer(known, graph, node)) is not None:
                yield node.output[0], node.op_type, found

    def _layer(self, known: Constants, graph: Any, node: NodeProto) -> Weighted | None:
        at = WEIGHTED[node.op_type]
        if node.op_type == "MatMul" and not known.is_constant(node.input[1]):
            at = 0
        if not known.is_constant(node.input[at]):
            return None
        W, x, y = known.value(node.input[at]), node.input[1 - at], node.output[0]
        if node.op_type == "MatMul" and at == 1 and known.is_constant(x):
            return None
        if node.op_type in ("MatMulInteger", "ConvInteger", "DynamicQuantizeMatMul"):
            opened = self._integer(known, graph, node, W)
            if opened is None:
                return None
            W, x, y = opened
        if W.dtype.kind != "f" or W.ndim < 2 or (node.op_type == "Gather" and attributes(node).get("axis", 0) != 0):
            return None
        lead = W.shape[:-2] if "MatMul" in node.op_type else ()
        if any(size != 1 for size in lead):
            return None
        W = W.reshape(W.shape[len(lead) :]).astype("f8")
        W = W.swapaxes(0, 1) if self._turns(node, at) else W
        return Weighted(W, self._bias(known, graph, node, y, len(W)), [Used(graph, node, at, x, y)])

    @staticmethod
    def _turns(node: NodeProto, at: int) -> bool:
        if node.op_type == "Gemm":
            return not attributes(node).get("transB", 0)
        return ("Conv" not in node.op_type and at == 1) or node.op_type in ("ConvTranspose", "Gather")

    def _integer(
        self, known: Constants, graph: Any, node: NodeProto, W: np.ndarray
    ) -> tuple[np.ndarray, str, str] | None:
        """Return the dequantized weight, the input before it is rounded, and the output in floating point."""
        if node.op_type == "DynamicQuantizeMatMul":
            zero = known.value(node.input[3]) if len(node.input) > 3 and node.input[3] else 0
            return (W.astype("f8") - np.asarray(zero, "f8")) * known.value(node.input[2]), node.input[0], node.output[0]
        made = {out: one for one in graph.node for out in one.output}
        source = made.get(node.input[0])
        cast = readers(graph, node.output[0])
        if source is None or source.op_type != "DynamicQuantizeLinear" or [one.op_type for one in cast] != ["Cast"]:
            return None
        product = readers(graph, cast[0].output[0])
        if [one.op_type for one in product] != ["Mul"]:
            return None
        other = next(name for name in product[0].input if name != cast[0].output[0])
        scales = made.get(other)
        if scales is None or scales.op_type != "Mul":
            return None
        scale = next((known.value(name) for name in scales.input if known.is_constant(name)), None)
        if scale is None:
            return None
        zero = known.value(node.input[3]) if len(node.input) > 3 and node.input[3] else np.zeros((), W.dtype)
        if node.op_type == "ConvInteger":
            scale, zero = (v.reshape(-1, *[1] * (W.ndim - 1)) if v.size > 1 else v for v in (scale, zero))
        return (W.astype("f8") - zero.astype("f8")) * scale, source.input[0], product[0].output[0]

    @staticmethod
    def _bias(known: Constants, graph: Any, node: NodeProto, y: str, outputs: int) -> np.ndarray | None:
        """Return the vector that the node, or an Add after it, adds."""
        if node.op_type in ("Gemm", "Conv", "ConvTranspose"):
            held = known.value(node.input[2]) if len(node.input) > 2 and node.input[2] else None
            if held is not None:
                return held.astype("f8").reshape(-1)
        after = readers(graph, y)
        while "Conv" in node.op_type and [one.op_type in ("Slice", "Squeeze") for one in after] == [True]:
            after = readers(graph, after[0].output[0])
        if "MatMul" in node.op_type and [one.op_type for one in after] == ["Reshape"]:
            after = readers(graph, after[0].output[0])  # Dense layers of TensorFlow; the vector is along the last axis.
        if node.op_type == "Gather" or [one.op_type for one in after] != ["Add"]:
            return None
        other = next((name for name in after[0].input if known.is_constant(name)), y)
        held = known.value(other) if known.is_constant(other) else None
        if held is None or held.size != outputs or (held.shape[-1] != outputs and "Conv" not in node.op_type):
            return None
        return held.astype("f8").reshape(-1)

    def _recurrent(self, known: Constants, graph: Any, node: NodeProto) -> Iterator[tuple[str, str, Weighted]]:
        if not all(known.is_constant(node.input[at]) for at in (1, 2)):
            return
        order = [int(at) for at in np.argsort(RECURRENT[node.op_type])]
        B = known.value(node.input[3]) if len(node.input) > 3 and node.input[3] else None
        for at, kind in ((1, "ih"), (2, "hh")):
            for back, W in enumerate(known.value(node.input[at])):
                bias = None if B is None else np.split(B[back], 2)[at - 1]
                used = Used(graph, node, at, node.input[0], node.output[0], back)
                own = None if bias is None else in_blocks(bias, order)
                layer = Weighted(in_blocks(W, order).astype("f8"), own, [used])
                yield next(filter(None, node.output)), f"{kind}{'_reverse' if back else ''}", layer

    def change(self, layer: Weighted, formula: Formula, replaced: bool = False) -> None:
        """Apply a formula to a layer; `replaced` gives packed nodes a floating-point weight."""
        D, b = formula.change(layer.weight), formula.bias_change(layer.bias)
        for used in layer.used:
            if used.node.op_type in RECURRENT:
                self._change_recurrent(used, D, b)
            else:
                self._change(used, layer.weight, D, b, replaced)

    def _change(self, used: Used, W: np.ndarray, D: np.ndarray, b: np.ndarray | None, replaced: bool) -> None:
        node, graph = used.node, used.graph
        plain = {"MatMulInteger": "MatMul", "DynamicQuantizeMatMul": "MatMul", "ConvInteger": "Conv"}.get(node.op_type)
        turned = (W + D if replaced and plain else D).swapaxes(0, 1) if self._turns(node, used.position) else (
            W + D if replaced and plain else D)  # fmt: skip
        name = f"reference.{len(graph.node)}.{used.y}"
        kind = np.float32
        graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(turned.astype(kind)), f"{name}.D"))
        inputs = [used.x, f"{name}.D"] if used.position == 1 else [f"{name}.D", used.x]
        added = NodeProto(op_type=plain or node.op_type, name=name, input=inputs, output=[f"{name}.d"])
        added.attribute.extend(each for each in node.attribute if each.name != "beta")
        made, total = [added], f"{name}.d"
        if b is not None:
            shaped = b.reshape(-1, *[1] * (D.ndim - 2)) if "Conv" in added.op_type else b
            shaped = shaped.reshape(-1, 1) if used.position == 0 and node.op_type == "MatMul" else shaped
            graph.initializer.append(numpy_helper.from_array(shaped.astype(kind), f"{name}.b"))
            made.append(helper.make_node("Add", [total, f"{name}.b"], [f"{name}.db"]))
            total = f"{name}.db"
        maker = next(one for one in graph.node if used.y in one.output)
        before = f"{name}.before"
        maker.output[list(maker.output).index(used.y)] = before
        if replaced and plain:
            made.append(helper.make_node("Identity", [total], [used.y]))
        else:
            made.append(helper.make_node("Add", [before, total], [used.y]))
        at = next(at for at, one in enumerate(graph.node) if one is maker or before in one.output) + 1
        for one in reversed(made):
            graph.node.insert(at, one)  # Keeps the objects of the other nodes, which layers hold.

    def _change_recurrent(self, used: Used, D: np.ndarray, b: np.ndarray | None) -> None:
        node, order = used.node, RECURRENT[used.node.op_type]
        known = Constants(self.model)
        held = known.value(node.input[used.position]).copy()
        held[used.back] += in_blocks(D, order)
        self._given(used, used.position, held)
        if b is not None:
            bias = known.value(node.input[3]).copy()
            half = bias.shape[1] // 2
            bias[used.back, (used.position - 1) * half : used.position * half] += in_blocks(b, order)
            self._given(used, 3, bias)

    @staticmethod
    def _given(used: Used, position: int, array: np.ndarray) -> None:
        name = f"reference.{used.node.output[0] or used.node.output[1]}.{position}"
        for old in [one for one in used.graph.initializer if one.name == name]:
            used.graph.initializer.remove(old)
        used.graph.initializer.append(numpy_helper.from_array(array.astype("f4"), name))
        used.node.input[position] = name


class Constants:
    """Values that a graph computes from what it stores; found by running these nodes in onnxruntime."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model, self.known = model, dict[str, np.ndarray]()
        self.stored: dict[str, Any] = {}
        self.made: dict[str, NodeProto] = {}
        for graph in graphs_of(model.graph):
            self.stored |= {one.name: one for one in graph.initializer}
            self.made |= {out: one for one in graph.node for out in one.output if out}
        self.told = dict[str, bool]()

    def is_constant(self, name: str) -> bool:
        """Whether a value does not depend on the model's inputs."""
        if name in self.told:
            return self.told[name]
        self.told[name] = False
        if name in self.stored:
            answer = True
        else:
            node = self.made.get(name)
            answer = node is not None and (
                node.op_type == "Constant"
                or (bool(node.input) and node.op_type not in ("If", "Loop", "Scan", "RandomNormal")
                    and all(not each or self.is_constant(each) for each in node.input))
            )  # fmt: skip
        self.told[name] = answer
        return answer

    def value(self, name: str) -> np.ndarray:
        """Return a constant value."""
        if name in self.stored:
            found: np.ndarray = numpy_helper.to_array(self.stored[name])
            return found
        if name not in self.known:
            nodes: list[NodeProto] = []
            self._needed(name, nodes, set())
            used = {each for node in nodes for each in node.input}
            graph = helper.make_graph(
                nodes, "constant", [], [onnx.ValueInfoProto(name=name)],
                [self.stored[each] for each in used if each in self.stored],
            )  # fmt: skip
            model = helper.make_model(graph, opset_imports=self.model.opset_import, ir_version=self.model.ir_version)
            self.known[name] = session(model).run(None, {})[0]
        return self.known[name]

    def _needed(self, name: str, nodes: list[NodeProto], seen: set[str]) -> None:
        node = self.made.get(name)
        if node is None or name in seen:
            return
        for each in node.input:
            self._needed(each, nodes, seen)
        if not any(out in seen for out in node.output):
            nodes.append(node)
        seen |= set(node.output)


def graphs_of(graph: Any) -> Iterator[Any]:
    """Yield a graph and its subgraphs."""
    yield graph
    for node in graph.node:
        for each in node.attribute:
            for inner in [*([each.g] if each.HasField("g") else []), *each.graphs]:
                yield from graphs_of(inner)


def walked(graph: Any) -> Iterator[tuple[Any, NodeProto]]:
    """Yield each node of a graph and its subgraphs, with the graph that it is in."""
    for each in graphs_of(graph):
        for node in each.node:
            yield each, node


def readers(graph: Any, name: str) -> list[NodeProto]:
    """Return the nodes that read a value."""
    return [node for node in graph.node if name in node.input]


def attributes(node: NodeProto) -> dict[str, Any]:
    """Return a node's attributes by name."""
    return {each.name: helper.get_attribute_value(each) for each in node.attribute}


def in_blocks(array: np.ndarray, order: Sequence[int]) -> np.ndarray:
    """Return the rows of gates in another order of gates."""
    parts = np.split(array, len(order))
    return np.concatenate([parts[each] for each in order])


def session(model: onnx.ModelProto | Path, optimized: bool = False) -> ort.InferenceSession:
    """Start a session, by default without optimizations."""
    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, 1
    if not optimized:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    given = str(model) if isinstance(model, Path) else model.SerializeToString()
    return ort.InferenceSession(given, options, providers=["CPUExecutionProvider"])
