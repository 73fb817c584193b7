// The command line of the reader, as README, section 16, asks: one line of JSON for each path, exit code 0.
//
//     node cli.mjs check FILE...           node cli.mjs base FOLDER...          node cli.mjs compute ADAPTER BASE

import { readFileSync, readdirSync } from "node:fs";
import { join } from "node:path";
import * as ak from "./adapterkit.mjs";

const { AdapterError, DTYPES, FORMULAS, array, matmul, part, product, readAdapter, readBase, readSafetensors, reshape } = ak;
const { fieldsOf, mergeTarget, numeric, stack, transposed, viewed } = ak;

const methods = JSON.parse(readFileSync(new URL("../../1.1/methods.json", import.meta.url), "utf-8"));
const bytesOf = (path) => new Uint8Array(readFileSync(path));
const told = (error) => {
  if (!(error instanceof AdapterError)) throw error;
  return { ok: false, error: error.error, where: error.where };
};

// What the layers of the vectors compute (README, section 15).
function layerOf(W, b, layout) {
  const kernel = W.shape.slice(2);
  return (x) => {
    if (x.dtype && DTYPES.get(x.dtype).whole) {
      const y = array([...x.shape, W.shape[0]]);
      x.data.forEach((token, i) => {
        for (let o = 0; o < W.shape[0]; o++) y.data[i * W.shape[0] + o] = W.data[o * W.shape[1] + token] + (b ? b.data[o] : 0);
      });
      return y;
    }
    if (W.shape.length === 1) return array(x.shape, x.data.map((v, i) => v * W.data[i % W.shape[0]] + (b ? b.data[i % W.shape[0]] : 0)));
    if (kernel.length) return convolved(x, W, b, kernel, layout === "in out *k");
    const y = matmul(reshape(x, [product(x.shape.slice(0, -1)), x.shape.at(-1)]), transposed(W));
    if (b) y.data.forEach((_, i) => (y.data[i] += b.data[i % W.shape[0]]));
    return reshape(y, [...x.shape.slice(0, -1), W.shape[0]]);
  };
}

// Stride 1, no padding, any number of kernel axes; in groups where W reads fewer channels than x has.
function convolved(x, W, b, kernel, transposedLayer) {
  const [batch, channels, ...size] = x.shape;
  const [outs, ins] = W.shape;
  const groups = channels / ins;
  const sizes = size.map((n, axis) => (transposedLayer ? n + kernel[axis] - 1 : n - kernel[axis] + 1));
  const y = array([batch, outs, ...sizes]);
  const places = product(sizes);
  const unravel = (index, shape) => shape.map((n, axis) => Math.floor(index / product(shape.slice(axis + 1))) % n);
  const ravel = (at, shape) => at.reduce((sum, n, axis) => sum * shape[axis] + n, 0);
  for (let p = 0; p < product(transposedLayer ? size : sizes); p++) {
    for (let k = 0; k < product(kernel); k++) {
      const step = unravel(k, kernel);
      const here = unravel(p, transposedLayer ? size : sizes);
      const there = here.map((n, axis) => n + step[axis]);
      const [from, to] = transposedLayer ? [ravel(here, size), ravel(there, sizes)] : [ravel(there, size), ravel(here, sizes)];
      for (let n = 0; n < batch; n++) {
        for (let o = 0; o < outs; o++) {
          const first = Math.floor(o / (outs / groups)) * ins;
          for (let c = 0; c < ins; c++) {
            const value = x.data[(n * channels + first + c) * product(size) + from];
            y.data[(n * outs + o) * places + to] += value * W.data[(o * ins + c) * product(kernel) + k];
          }
        }
      }
    }
  }
  return b ? array(y.shape, y.data.map((value, i) => value + b.data[Math.floor(i / places) % outs])) : y;
}

// What must come out of a vector (README, section 15): target -> {name: array}, or an error for methods without a formula.
function compute(adapter, base) {
  const found = {};
  for (const entry of adapter.targets) {
    const { target, updates } = entry;
    const at = (name) => base.get(`${target.path || "(model)"}.${name}`);
    const unknown = updates.find(({ method }) => !FORMULAS[method.name]);
    if (unknown) {
      found[target.path] = new AdapterError("Unsupported", target.name, `no formula of ${unknown.method.name}`);
      continue;
    }
    const [weight, bias, x] = ["weight", "bias", "x"].map((name) => at(name) && numeric(at(name)));
    if (updates[0].method.kind === "output") {
      const { t, a } = fieldsOf(updates[0]);
      const beside = Object.fromEntries(["added", "norm_weight", "norm_bias"].map((n) => [n, at(n) && numeric(at(n))]));
      found[target.path] = { y: FORMULAS[updates[0].method.name].output(x, layerOf(viewed(weight, target.layout), bias, target.layout), t, a, beside) };
      continue;
    }
    const merged = mergeTarget(entry, weight, bias);
    const W = viewed(merged.weight, target.layout);
    const y = target.stacked
      ? stack(Array.from({ length: W.shape[0] }, (_, e) => layerOf(part(W, e), merged.bias && part(merged.bias, e), target.layout)(part(x, e))))
      : layerOf(W, merged.bias, target.layout)(x);
    found[target.path] = { "merged.weight": merged.weight, ...(merged.bias && { "merged.bias": merged.bias }), y };
  }
  return found;
}

async function check(path) {
  const adapter = readAdapter(bytesOf(path), methods);
  adapter.checkValues();
  const version = adapter.record.get("version");
  return { ok: true, version, targets: adapter.targets.map(({ target }) => target.name), digest: await adapter.digest() };
}

async function base(path) {
  const { tensors } = readBase(readdirSync(path).sort(), (name) => bytesOf(join(path, name)));
  return { ok: true, tensors: Object.fromEntries([...tensors].map(([name, t]) => [name, [t.dtype, t.shape]])) };
}

async function computed(adapterPath, basePath) {
  const adapter = readAdapter(bytesOf(adapterPath), methods);
  const found = compute(adapter, readSafetensors(bytesOf(basePath)).tensors);
  const plain = (a) => ({ shape: a.shape, values: [...a.data] });
  const outputs = Object.entries(found).map(([path, arrays]) => {
    if (arrays instanceof AdapterError) return [path, told(arrays)];
    return [path, Object.fromEntries(Object.entries(arrays).map(([name, a]) => [name, plain(a)]))];
  });
  return { ok: true, outputs: Object.fromEntries(outputs) };
}

const [verb, ...paths] = process.argv.slice(2);
const runs = verb === "compute" ? [() => computed(...paths)] : paths.map((path) => () => ({ check, base })[verb](path));
for (const [i, run] of runs.entries()) {
  let line;
  try {
    line = await run();
  } catch (error) {
    line = told(error);
  }
  console.log(JSON.stringify({ path: paths[i], ...line }));
}
