"""Statically quantized graphs that clip as they do, but do not round; and an adapter put into their weights by hand.

A changed graph of static quantization differs from torch by what its calibrated ranges clip. This module computes what
the ranges alone do, without code of adapterkit: it reads the source graph, replaces each quantizer by a Clip at the
ends of its range, and changes only the weights and biases of the adapter's layers, by the formulas of the methods. A
graph that adapterkit changed, with its quantizers replaced in the same way, has to compute the same.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
from onnx import helper, numpy_helper
from safetensors.numpy import load_file

MOVES = {"Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Identity", "Gather", "Slice", "Concat", "Split",
         "Expand", "MaxPool", "DepthToSpace", "SpaceToDepth", "Tile", "Resize", "Pad"}  # fmt: skip

PAIRS = {"QLinearMatMul": "MatMul", "QLinearConv": "Conv", "QLinearAdd": "Add", "QLinearMul": "Mul"}
SINGLES = {"QLinearSigmoid": "Sigmoid", "QLinearLeakyRelu": "LeakyRelu", "QLinearSoftmax": "Softmax",
           "QLinearGlobalAveragePool": "GlobalAveragePool", "QLinearAveragePool": "AveragePool"}  # fmt: skip

DROPPED = ("channels_last", "opset")
"""Attributes of integer operators that their float forms lack."""


class Unfit(Exception):
    """No reference can be made of this graph."""


class Clipping:
    """A graph in floats: quantizers are Clips, and names of quantized values stand for floats.

    Args:
        path: a statically quantized graph.
    """

    def __init__(self, path: Path) -> None:
        self.model = onnx.load(path)
        graph = self.model.graph
        self.constants = {one.name: numpy_helper.to_array(one) for one in graph.initializer}
        for node in graph.node:
            if node.op_type == "Constant" and node.attribute[0].name == "value":
                self.constants[node.output[0]] = numpy_helper.to_array(node.attribute[0].t)
        self.same: dict[str, str] = {}
        self.floats: set[str] = set()
        self.steps: dict[str, tuple[float, int]] = {}
        self.nodes: list[onnx.NodeProto] = []
        for node in graph.node:
            self._changed(node)
        outputs = [one.name for one in graph.output if one.name in self.same]
        self.nodes += [helper.make_node("Identity", [self.name(name)], [name]) for name in outputs]

    def name(self, name: str) -> str:
        while name in self.same:
            name = self.same[name]
        return name

    def constant(self, array: Any) -> str:
        name = f"by hand {len(self.constants)}"
        self.constants[name] = np.array(array, np.float32, order="C")  # Keeps a scalar a scalar, which Clip asks for.
        return name

    def add(self, op: str, given: Sequence[str], out: str, **words: Any) -> None:
        self.nodes.append(helper.make_node(op, [self.name(one) for one in given], [out], **words))

    def _value(self, given: Sequence[str], at: int, axis: int) -> str:
        """Return the floats of an operand; its scale and zero point follow it."""
        name, scale, zero = given[at], given[at + 1], given[at + 2] if len(given) > at + 2 else ""
        if name not in self.constants:
            if self.name(name) not in self.floats:  # Rows of an embedding: integers that no node rounds.
                self.nodes.append(helper.make_node("DequantizeLinear", [name, scale, zero], [f"{name} floats"]))
                return f"{name} floats"
            return self.name(name)
        return self.constant(self._numbers(name, scale, zero, axis))

    def _numbers(self, name: str, scale: str, zero: str, axis: int) -> Any:
        q = self.constants[name].astype("f8")
        spread = [1] * q.ndim
        s, z = self.constants[scale].astype("f8"), self.constants[zero].astype("f8") if zero else np.zeros(1)
        if s.size > 1:
            spread[axis] = -1
            s, z = s.reshape(spread), z.reshape(spread) if z.size > 1 else z
        return (q - z.reshape(z.shape if z.size > 1 else ())) * (s if s.size > 1 else s.reshape(()))

    def _clip(self, x: str, out: str, scale: str, zero: str) -> None:
        if scale not in self.constants or self.constants[scale].size != 1:
            raise Unfit(f"{out} has no constant range")
        z = self.constants[zero].reshape(()) if zero else np.uint8(0)
        ends = np.iinfo(z.dtype)
        s = float(self.constants[scale].reshape(()))
        low, high = (self.constant(np.float32((end - int(z)) * s)) for end in (ends.min, ends.max))
        self.add("Clip", [x, low, high], out)
        self.floats.add(out)
        self.steps[out] = s, int(z)

    def _changed(self, node: onnx.NodeProto) -> None:
        op, given, out = node.op_type, list(node.input), node.output[0]
        words = {one.name: helper.get_attribute_value(one) for one in node.attribute if one.name not in DROPPED}
        if op == "QuantizeLinear":
            self._clip(given[0], out, given[1], given[2] if len(given) > 2 else "")
        elif op == "DequantizeLinear":
            if given[0] in self.constants:
                self.same[out] = self._value(given, 0, words.get("axis", 1))
            elif self.name(given[0]) in self.floats:
                self.same[out] = given[0]
            else:  # Rows of an embedding: integers that no node rounds.
                self.nodes.append(node)
        elif op in PAIRS:
            right = self._value(given, 3, 0 if op == "QLinearConv" else -1)
            both = [self._value(given, 0, -1), right]
            if len(given) > 8 and given[8]:
                both.append(self._bias(given, 8))
            self._computed(node, PAIRS[op], both, words, given[6:8])
        elif op == "QGemm":
            both = [self._value(given, 0, -1), self._value(given, 3, 0 if words.get("transB", 0) else 1)]
            if len(given) > 6 and given[6]:
                both.append(self._bias(given, 6))
            ends = len(given) > 7 and bool(given[7])
            self.add("Gemm", both, f"{out} free" if ends else out, **words)
            if ends:
                self._clip(f"{out} free", out, given[7], given[8])
        elif op in SINGLES:
            self._computed(node, SINGLES[op], [self._value(given, 0, -1)], words, given[3:5])
        elif op == "QLinearConcat":
            parts = [self._value(given, at, -1) for at in range(2, len(given), 3)]
            self.add("Concat", parts, f"{out} free", **words)
            self._clip(f"{out} free", out, given[0], given[1])
        elif "Integer" in op or op.startswith(("QLinear", "DynamicQuantize", "QAttention")):
            raise Unfit(f"{op} has no form that only clips")
        else:
            if any(self.name(one) in self.floats for one in given) and op in MOVES:
                self.floats.update(node.output)
                step, zero = self.steps.get(self.name(given[0]), (1.0, 0))
                self.steps.update(dict.fromkeys(node.output, (step, zero)))
                added = self.constants.get(given[2]) if op == "Pad" and len(given) > 2 else None
                if added is not None and added.dtype.kind in "iu":
                    given[2] = self.constant((added.astype("f8").reshape(()) - zero) * step)
            for at, one in enumerate(given):
                node.input[at] = self.name(one)
            self.nodes.append(node)

    def _computed(
        self, node: onnx.NodeProto, op: str, given: list[str], words: dict[str, Any], ends: list[str]
    ) -> None:
        """Add an operator in floats and the range of its output; onnxruntime may give images their channels last."""
        out = node.output[0]
        last = any(one.name == "channels_last" and one.i for one in node.attribute)
        if last:
            self.add("Transpose", given[:1], f"{out} input", perm=[0, 3, 1, 2])
            given = [f"{out} input", *given[1:]]
        self.add(op, given, f"{out} free", **words)
        self._clip(f"{out} free", f"{out} first" if last else out, *ends)
        if last:
            self.add("Transpose", [f"{out} first"], out, perm=[0, 2, 3, 1])
            self.floats.add(out)
            self.steps[out] = self.steps[f"{out} first"]

    def _bias(self, given: Sequence[str], at: int) -> str:
        steps = self.constants[given[1]].astype("f8") * self.constants[given[4]].astype("f8")
        return self.constant(self.constants[given[at]] * steps.reshape(-1))

    def save(self, path: Path) -> Path:
        """Write the graph."""
        graph = self.model.graph
        stored = {one.name for one in graph.initializer}
        for one in graph.initializer:
            one.CopyFrom(numpy_helper.from_array(np.asarray(self.constants[one.name]), one.name))
        for name, array in self.constants.items():
            if name.startswith("by hand ") and name not in stored:
                graph.initializer.append(numpy_helper.from_array(np.asarray(array), name))
        del graph.value_info[:], graph.node[:]
        graph.node.extend(self.nodes)
        onnx.save(self.model, path)
        return path


def _norm_scales(base: dict[str, Any]) -> list[Any]:
    """Return the factors of the base's batch norms; all have torch's epsilon."""
    names = [name.removesuffix("running_var") for name in base if name.endswith("running_var")]
    return [base[f"{n}weight"].astype("f8") / np.sqrt(base[f"{n}running_var"].astype("f8") + 1e-5) for n in names]


class Place(NamedTuple):
    """Where a layer's change is computed, and which ranges around the layer do not clip.

    A change beside a layer whose sum is free is added before the sum's range, which clips the result. If the product is
    free, the change is added to the clipped product, and the product's range clips the result again.
    """

    beside: bool = False
    input: bool = False
    product: bool = False
    sum: bool = False

    def __str__(self) -> str:
        free = "+".join(name for name in ("input", "product", "sum") if getattr(self, name))
        return f"{'beside' if self.beside else 'within'}, free: {free or 'none'}"


class Adapted(Clipping):
    """The source graph with an adapter in its weights.

    Args:
        path: a statically quantized graph.
        adapter: a folder of PEFT.
        weights: the weights of the torch model that the graph was made from.
        scaled: the place of the changes of layers whose bias is changed as well.
        others: the place of all other changes.
    """

    def __init__(self, path: Path, adapter: Path, weights: Path, scaled: Place, others: Place) -> None:
        super().__init__(path)
        self.scaled, self.others = scaled, others
        self.config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
        base, parts = load_file(weights), load_file(adapter / "adapter_model.safetensors")
        self.norms = _norm_scales(base)
        layers: dict[str, dict[str, Any]] = {}
        for key, array in parts.items():
            layer, _, kind = key.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".")
            layers.setdefault(layer, {})[kind] = array.astype("f8")
        for layer, tensors in layers.items():
            self._adapt(layer, tensors, base[f"{layer}.weight"].astype("f8"), base.get(f"{layer}.bias"))

    def _adapt(self, layer: str, tensors: dict[str, Any], W: Any, b: Any) -> None:
        nodes = [node for node in self.nodes if node.op_type in ("MatMul", "Gemm", "Conv")]
        near = []
        for node in nodes:
            held = self.constants.get(node.input[1])
            for turned in (False, True):
                if held is None or (turned and held.ndim != 2) or (held.T if turned else held).shape != W.shape:
                    continue
                V = (held.T if turned else held).astype("f8")
                rows, base = V.reshape(len(V), -1), W.reshape(len(V), -1)
                # Exporters fold the factors of a BatchNorm into convolutions.
                g = (rows * base).sum(1) / (base * base).sum(1) if node.op_type == "Conv" else np.ones(len(V))
                near.append((abs(rows - g[:, None] * base).max() / abs(base).max(), node, V, g, turned))
        near.sort(key=lambda one: float(one[0]))
        if not near or near[0][0] > 0.03 or (len(near) > 1 and near[1][0] < 4 * near[0][0]):
            raise Unfit(f"no weight of the graph is surely {layer}'s")
        _, node, V, g, turned = near[0]
        spread = np.ones([1] * W.ndim)
        norm = self._norm_of(g) if node.op_type == "Conv" and abs(g - 1).max() > 0.03 else None
        if norm is not None:
            # Few bits hold a norm's small factors badly, or not at all. The formulas see the base's weight.
            spread = norm.reshape(-1, *[1] * (W.ndim - 1))
        seen = V if norm is None else W
        changed, factor = self._formula(layer, tensors, seen)
        place = self.others if factor is None else self.scaled
        x, last, bias = self._around(node, b, place)
        change = (changed - seen) * spread
        wanted = change if place.beside else V + change
        given = [x, self.constant(wanted.T if turned else wanted)]
        shift = None
        if bias is not None and factor is not None and (norm is None or b is not None):
            reader, at = bias
            held = self.constants[reader.input[at]]
            # Behind a norm, the graph's vector is the norm's shift and the layer's scaled bias.
            more = (held if norm is None else (b * norm).reshape(held.shape)) * (factor - 1)
            if place.beside:
                shift = more.reshape(-1, *([1, 1] if node.op_type == "Conv" else []))
            else:
                reader.input[at] = self.constant(held + more)
        if not place.beside:
            node.input[:2] = given
            return
        end, at = last.output[0], self.nodes.index(last) + 1
        last.output[0] = f"{end} before"
        kept, self.nodes, tail = self.nodes[:at], [], self.nodes[at:]
        words = {one.name: helper.get_attribute_value(one) for one in node.attribute}
        self.add(node.op_type, given, f"{end} change", **words)
        self.add("Add", [f"{end} before", f"{end} change"], f"{end} changed")
        if shift is not None:
            self.add("Add", [f"{end} changed", self.constant(shift)], end)
        elif place.product and last.op_type == "Clip":
            self.add("Clip", [f"{end} changed", *last.input[1:]], end)
        else:
            self.add("Identity", [f"{end} changed"], end)
        self.nodes = [*kept, *self.nodes, *tail]

    def _norm_of(self, g: Any) -> Any:
        """Return the factors of the base's norm that are nearest to the factors of a weight in the graph."""
        fits = [scale for scale in self.norms if len(scale) == len(g)]
        best = min(fits, key=lambda scale: float(abs(scale - g).max()), default=None)
        if best is None or abs(best - g).max() > 0.03 * abs(g).max():
            raise Unfit("a convolution holds factors of no norm")
        return best

    def _formula(self, layer: str, tensors: dict[str, Any], V: Any) -> tuple[Any, Any]:
        """Return a changed weight, and the factor of the bias or None."""
        ones = [1] * (V.ndim - 1)
        if "ia3_l" in tensors:
            vector = tensors["ia3_l"].reshape(-1)
            if any(layer == one or layer.endswith(f".{one}") for one in self.config["feedforward_modules"]):
                return V * vector.reshape(1, -1, *ones[1:]), None
            return V * vector.reshape(-1, *ones), vector
        A, B = tensors["lora_A"], tensors["lora_B"]
        D = self.config["lora_alpha"] / self.config["r"] * (B.reshape(len(B), -1) @ A.reshape(len(A), -1))
        V = V + D.reshape(V.shape)
        if not self.config.get("use_dora"):
            return V, None
        norms = np.sqrt((V.reshape(len(V), -1) ** 2).sum(1))
        return V * (tensors["lora_magnitude_vector"].reshape(-1) / norms).reshape(-1, *ones), None

    def _around(
        self, node: onnx.NodeProto, b: Any, place: Place
    ) -> tuple[str, onnx.NodeProto, tuple[onnx.NodeProto, int] | None]:
        """Take away the ranges around a layer that do not clip; return its input, last node, and place of its bias."""
        makers = {one.output[0]: one for one in self.nodes}
        before = makers.get(node.input[0])
        x = before.input[0] if place.input and before is not None and before.op_type == "Clip" else node.input[0]
        bias = (node, 2) if len(node.input) > 2 else None
        last, free = node, place.product if bias is None else place.sum
        while True:
            readers = [one for one in self.nodes if last.output[0] in one.input]
            if len(readers) != 1:
                break
            (reader,) = readers
            if reader.op_type == "Clip" and any(not self.constants[end].any() for end in reader.input[1:3]):
                # The range may stand for a Relu, which comes after the change.
                if place.beside:
                    break
            elif reader.op_type == "Clip":
                if place.beside and place.sum and bias is not None:
                    break  # The change is added first; then the sum's range clips.
                if place.beside and place.product and bias is None:
                    last = reader
                    break
                if free:
                    reader.op_type = "Identity"
                    del reader.input[1:]
            elif reader.op_type == "Add" and bias is None and b is not None:
                held = [at for at, one in enumerate(reader.input) if one in self.constants]
                if len(held) != 1 or self.constants[reader.input[held[0]]].size != len(b):
                    break
                bias, free = (reader, held[0]), place.sum
            elif reader.op_type != "Identity":
                break
            last = reader
        return x, last, bias


def references(path: Path, adapter: Path, weights: Path, out: Path, apart: bool) -> Iterator[tuple[str, Path]]:
    """Yield graphs of an adapted source, with a name; they differ in what around the changed layers still clips.

    Args:
        path: a statically quantized graph.
        adapter: a folder of PEFT.
        weights: the weights of the torch model that the graph was made from.
        out: where to write each graph.
        apart: yield the many graphs in which layers whose bias is changed as well, as IA3 does, differ from the others.
    """
    places = [Place(*one) for one in product((False, True), repeat=4)]
    if not apart:
        for place in places:
            yield str(place), Adapted(path, adapter, weights, place, place).save(out)
    elif json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))["peft_type"] == "IA3":
        for scaled, others in product(places[::-1], places[::-1]):
            if scaled != others:
                name = f"{scaled}; without bias {others}"
                yield name, Adapted(path, adapter, weights, scaled, others).save(out)
