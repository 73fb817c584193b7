// What a runner of the vectors asks of the reader beside it (README, section 16), on bytes: for node and for browsers.
// `methods`: what spec/1.1/methods.json holds. Each function returns an object, or throws AdapterError.

import * as ak from "./adapterkit.mjs";
import "./formulas.mjs";
import { canMerge, merge } from "./merge.mjs";

const { AdapterError, DTYPES, FORMULAS, array, matmul, part, product, readAdapter, readSafetensors, reshape } = ak;
const { checkFit, fieldsOf, mergeTarget, numeric, stack, transposed, viewed } = ak;

// An error as the one who asked is told it; other errors are faults of the reader, and thrown on.
export const told = (error) => {
  if (!(error instanceof AdapterError)) throw error;
  return { ok: false, error: error.error, where: error.where };
};

// What the layers of the vectors compute (README, section 16).
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

// Whether an input suits a layer (README, section 16): the table of layers, row by row. W is in the view [out, in, *k].
function suits(x, W, b, { layout, stacked }) {
  if (!x || !W) return false;
  const [lead, [out, ...inner]] = [W.shape.slice(0, Number(stacked)), W.shape.slice(Number(stacked))];
  const { whole, real } = DTYPES.get(x.dtype);
  const last = x.shape.at(-1);
  if ((b && !same(b.shape, [...lead, out])) || !(whole || real)) return false;
  if (stacked) return real && inner.length < 2 && x.shape.length === 3 && x.shape[0] === lead[0] && last === (inner[0] ?? out);
  if (whole) return inner.length === 1 && x.data.every((token) => token >= 0 && token < inner[0]);
  if (inner.length < 2) return last === (inner[0] ?? out);
  const [[ins, ...kernel], [, channels, ...places]] = [inner, x.shape];
  if (x.shape.length !== W.shape.length || [...W.shape, ...x.shape].includes(0)) return false;
  if (layout === "in out *k") return channels === ins;
  return channels % ins === 0 && out % (channels / ins) === 0 && places.every((n, axis) => n >= kernel[axis]);
}

const same = (one, other) => one.length === other.length && one.every((size, axis) => size === other[axis]);

// What stands beside an output update, as far as it suits the output `y` of the layer.
function besideOf(y, convolves, at) {
  const beside = { added: at("added"), norm_weight: at("norm_weight"), norm_bias: at("norm_bias") };
  const channels = convolves ? y.shape.slice(1, 2) : y.shape.slice(-1);
  for (const [name, shape] of [["added", y.shape], ["norm_weight", channels], ["norm_bias", channels]]) {
    const tensor = beside[name];
    if (tensor && !(DTYPES.get(tensor.dtype).real && same(tensor.shape, shape))) beside[name] = undefined;
  }
  const { added, norm_weight, norm_bias } = beside;
  return { ...(added && norm_weight && norm_bias ? beside : { added }), convolves };
}

// What an output update's formula reads of the model's call (README, section 16), as far as it suits: name -> array. The
// second value says whether something is lacking, the experts of a router among it.
function callOf({ method, tensors }, x, y, at) {
  const { whole, real } = { whole: (t) => DTYPES.get(t.dtype).whole, real: (t) => DTYPES.get(t.dtype).real };
  const given = (name, type, test) => {
    const tensor = at(`call.${name}`);
    return tensor && type(tensor) && test(tensor.shape) ? tensor : undefined;
  };
  const [rows, axes] = [x.shape[0], x.shape.length];
  const hidden = (tensors.get("first") ?? tensors.get("last"))?.shape.at(-1);
  const reads = {
    alora: () => ["input_ids", whole, (shape) => axes === 3 && shape.length === 2 && shape[0] === rows],
    poly: () => ["task_ids", whole, (shape) => axes > 0 && same(shape, [rows])],
    shadow: () => ["shadow", real, (shape) => same(shape, x.shape)],
    xlora: () => ["hidden_states", real, (shape) => axes === 3 && same(shape, [...x.shape.slice(0, 2), hidden])],
    reft: () => ["mask", ({ dtype }) => dtype !== "C64", (shape) => y.shape.length === 3 && same(shape, y.shape.slice(0, 2))],
  }[method.name]?.();
  const call = reads ? { [reads[0]]: given(...reads) } : {};
  const experts = ["arrow", "xlora"].includes(method.name) && !tensors.has("A");
  return [call, experts || (reads && method.name !== "reft" && !call[reads[0]])];
}

// Whether no formula says what comes out of an update for x. `plain`: what the layer alone gives for x.
function isUnanswered({ method: { name }, attributes, dims }, x, plain, W, layout, added) {
  const whole = Boolean(DTYPES.get(x.dtype).whole);
  const kernel = W.shape.length > 2;
  const channels = x.shape[kernel ? 1 : x.shape.length - 1];
  if (USES_X.has(name) || (name === "invertible" && attributes.get("reverse"))) if (whole) return true;
  if (RESIDUAL.has(name)) return attributes.get("parallel") && !added && (whole || !same(x.shape, plain.shape));
  if (name === "reft") return plain.shape.length > 3;
  if (name.startsWith("grouped_")) return (kernel && layout === "in out *k") || BigInt(channels) !== dims.get("inputs");
  if (name === "oft_patches") return kernel && (layout === "in out *k" || channels !== W.shape[1]);
  return name === "shadow" && kernel;
}

const RESIDUAL = new Set(["bottleneck", "compacter"]);
const USES_X = new Set(["alora", "arrow", "gated_lora", "grouped_dora", "grouped_lora", "lily", "oft_patches", "poly", "shadow", "xlora"]);

// What comes out of an update of kind `context`: its own faults come first (README, section 16, steps 7 and 8).
function contextOf(target, update, at) {
  const { method, tensors, dims } = update;
  const given = { update };
  const suited = (name, axes, test) => {
    const tensor = at(name);
    if (!tensor || !DTYPES.get(tensor.dtype).real || tensor.shape.length !== axes || !test(tensor.shape)) {
      throw new AdapterError("UsageError", target.name, `its formula needs ${name}`);
    }
    given[name] = tensor;
  };
  if (method.name.startsWith("gated_prefix")) suited("x", 3, ([, m, width]) => m > 0 && BigInt(width) === dims.get("width"));
  if (method.name === "adaption_prompt") {
    suited("q", 4, ([, heads]) => [1, heads].includes(tensors.get("gate").shape[0]));
    const [, heads, , d] = given.q.shape;
    for (const name of ["k", "v"]) suited(name, 3, (shape) => same(shape, [heads, tensors.get("P").shape[0], d]));
  }
  const { t, a } = fieldsOf(update);
  const arrays = FORMULAS[method.name].context(t, a, given);
  for (const [name, { data }] of Object.entries(arrays)) {
    if (!data.every(Number.isFinite)) throw new AdapterError("Malformed", `${target.name}.${name}`, "what comes out is no number");
  }
  return arrays;
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

// What must come out at one path of a vector (README, section 16): name -> array. `entries`: the targets of the path.
function outputsAt(path, entries, base) {
  const place = path || "(model)";
  const at = (name) => {
    const tensor = base.get(`${place}.${name}`);
    if (!tensor) return undefined;
    return { ...numeric(tensor), ...(DTYPES.get(tensor.dtype).whole && { whole: tensor.integers() }) };
  };
  const unknown = entries.flatMap(({ target, updates }) => updates.map((update) => [target, update])).find(([, { method }]) => !FORMULAS[method.name]);
  if (unknown) throw new AdapterError("Unsupported", unknown[0].name, `no formula of ${unknown[1].method.name}`);
  const context = entries.find(({ updates }) => updates.some(({ method }) => method.kind === "context"));
  if (context) {
    const [update, ...others] = entries.flatMap(({ updates }) => updates);
    if (others.length) throw new AdapterError("Unsupported", context.target.name, "a context is not alone there (R-13.4)");
    return contextOf(context.target, update, at);
  }
  const of = (kind, { updates }) => updates.filter(({ method }) => (method.kind === "output") === kind);
  let [weight, bias] = ["weight", "bias"].map(at);
  const changing = entries.map((entry) => ({ ...entry, updates: of(false, entry) })).filter(({ updates }) => updates.length);
  for (const entry of changing) ({ weight, bias } = mergeTarget(entry, weight, bias));
  for (const leaf of ["weight", "bias"].filter((leaf) => at(leaf))) {
    const { dtype } = base.get(`${place}.${leaf}`);
    if (!canMerge(dtype)) throw new AdapterError("Unsupported", `${place}.${leaf}`, `no merges into ${dtype}`);
  }
  for (const [leaf, tensor] of Object.entries({ weight, bias })) {
    if (!(tensor?.data ?? []).every(Number.isFinite)) throw new AdapterError("Malformed", `${place}.${leaf}`, "merging gives what is no number");
  }
  const { target: first, target: { layout, stacked } } = entries[0];
  const [W, x] = [weight && viewed(weight, layout), at("x")];
  const plain = (x) => {
    if (!stacked) return layerOf(W, bias, layout)(x);
    return stack(Array.from({ length: W.shape[0] }, (_, e) => layerOf(part(W, e), bias && part(bias, e), layout)(part(x, e))));
  };
  const suited = suits(x, W, bias, first);
  const outputs = entries.flatMap((entry) => of(true, entry));
  if (!outputs.length) {
    const y = suited ? plain(x) : undefined;
    return { "merged.weight": weight, "merged.bias": bias, y: y?.data.every(Number.isFinite) ? y : undefined };
  }
  const placed = entries.map((entry) => ({ ...entry, updates: of(true, entry) })).filter(({ updates }) => updates.length);
  const sliced = placed.find(({ target }) => target.rows || target.stacked);
  if (sliced) throw new AdapterError("Unsupported", sliced.target.name, "an output update of a slice, or of experts (R-10.10)");
  if (weight || bias) placed.forEach((entry) => checkFit(entry, weight, bias));
  if (outputs.some(({ attributes }) => attributes.get("norm") && !attributes.get("original_ln_after"))) {
    throw new AdapterError("Unsupported", entries[0].target.name, "leaves out a norm of the block around it (R-10.10)");
  }
  const y0 = suited ? plain(x) : undefined;
  const beside = suited ? besideOf(y0, W.shape.length > 2, at) : {};
  const calls = new Map();
  for (const { target, updates } of placed) {
    for (const update of updates) {
      const { attributes } = update;
      const [call, lacking] = suited ? callOf(update, x, y0, at) : [{}, true];
      if (lacking || (attributes.get("residual") && !beside.added) || (attributes.get("norm") && !beside.norm_weight)) {
        throw new AdapterError("UsageError", target.name, "its formula needs more than the base, or the call, has");
      }
      calls.set(update, call);
    }
  }
  const residual = outputs.filter(({ method }) => RESIDUAL.has(method.name));
  const blocks = new Set(residual.map(({ attributes }) => JSON.stringify(["residual", "norm"].map((name) => attributes.get(name)))));
  const mixed = beside.added && residual.some((update) => outputs.slice(0, outputs.indexOf(update)).some((each) => !residual.includes(each)));
  const unanswered = (update) => isUnanswered(update, x, y0, W, layout, beside.added);
  const strange = placed.find(({ target, updates }) => target.layout !== layout || y0.shape.length < 2 || updates.some(unanswered));
  if (strange || blocks.size > 1 || mixed) {
    throw new AdapterError("Unsupported", (strange ?? placed[0]).target.name, "no formula says what comes out (R-13.4)");
  }
  const kernel = W.shape.slice(2);
  const convolve = (x, A) => convolved(x, A, undefined, kernel, false);
  const layer = outputs.reduce((before, update) => {
    const { t, a } = fieldsOf(update);
    const here = { ...beside, call: calls.get(update), W, bias, kernel, convolve };
    const through = (inside) => (x) => FORMULAS[update.method.name].output(x, before, t, a, here, inside);
    return Object.assign(through(false), { inside: through(true) });
  }, plain);
  const y = layer(x);
  if (!y.data.every(Number.isFinite)) throw new AdapterError("Malformed", `${place}.y`, "what comes out is no number");
  return { y };
}

function compute(adapter, base) {
  const paths = new Map();
  for (const entry of adapter.targets) paths.set(entry.target.path, [...(paths.get(entry.target.path) ?? []), entry]);
  return [...paths].map(([path, entries]) => {
    try {
      return [path, outputsAt(path, entries, base)];
    } catch (error) {
      return [path, told(error)];
    }
  });
}

export async function check(bytes, methods) {
  const adapter = readAdapter(bytes, methods);
  adapter.checkValues();
  const version = adapter.record.get("version");
  return { ok: true, version, targets: adapter.targets.map(({ target }) => target.name), digest: await adapter.digest() };
}

// `files`: names of a folder's files, with `/` between parts; `read(name)`: the bytes of one.
export async function base(files, read) {
  return listed(ak.readBase(files.toSorted(), read).tensors);
}

// A base that is one file.
export const baseFile = async (bytes) => listed(readSafetensors(bytes).tensors);

const listed = (tensors) => ({ ok: true, tensors: Object.fromEntries([...tensors].map(([name, t]) => [name, [t.dtype, t.shape]])) });

// `readBase()`: the bytes of the base; it is opened after the adapter has been read.
export async function computed(adapterBytes, readBase, methods) {
  const adapter = readAdapter(adapterBytes, methods);
  const plain = (a) => ({ shape: a.shape, values: [...a.data] });
  const outputs = compute(adapter, readSafetensors(readBase()).tensors).map(([path, arrays]) => {
    if (arrays.error) return [path, arrays];
    return [path, Object.fromEntries(Object.entries(arrays).filter(([, a]) => a).map(([name, a]) => [name, plain(a)]))];
  });
  return { ok: true, outputs: Object.fromEntries(outputs) };
}

export async function merged(adapterBytes, readBase, methods) {
  const adapter = readAdapter(adapterBytes, methods);
  const hex = (bytes) => [...bytes].map((byte) => byte.toString(16).padStart(2, "0")).join("");
  const tensors = [...merge(adapter, readSafetensors(readBase()).tensors)];
  return { ok: true, tensors: Object.fromEntries(tensors.map(([name, t]) => [name, [t.dtype, t.shape, hex(t.bytes)]])) };
}

// The texts of JSON in a file, each as canonical JSON.
export async function canonicals(bytes) {
  const texts = JSON.parse(new TextDecoder().decode(bytes));
  return { ok: true, canonical: texts.map(({ json }) => ak.canonical(ak.parseJSON(json))) };
}

// The values of expressions of rules, for the axes, attributes and tensors that stand beside each, as canonical JSON.
export async function rules(bytes) {
  const cases = ak.parseJSON(new TextDecoder().decode(bytes));
  const values = cases.map((each) => {
    const given = new Map([...each.get("axes"), ...each.get("attributes")]);
    const name = (word) => (typeof given.get(word) === "boolean" ? BigInt(given.get(word)) : given.get(word));
    const known = (word) => (["bigint", "string"].includes(typeof name(word)) ? name(word) : undefined);
    return ak.valueOf(each.get("expression"), { name: known, axes: (tensor) => each.get("tensors").get(tensor) });
  });
  return { ok: true, values: values.map((value) => ak.canonical(value ?? null)) };
}
