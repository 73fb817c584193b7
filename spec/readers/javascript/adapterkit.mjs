// A reader of adapterkit files in one file of JavaScript, without dependencies, for node and browsers.
//
// It is a second implementation of spec/README.md, written from its text: container, record, digest, base folders, and
// the formulas of the methods in FORMULAS below. The tables of methods are data: pass what spec/1.1/methods.json holds.
//
//     const adapter = readAdapter(bytes, methods)        // throws AdapterError with .error and .where
//     adapter.checkValues()
//     adapter.digest()                                   // a promise of the sha256
//     mergeTarget(adapter.targets[0], weight, bias)      // W' and b' in 64 bits
//
// merge.mjs beside it rounds to the stored types, formulas.mjs adds the other formulas; run.mjs and cli.mjs run the vectors.

export const SPEC = [1, 1];

export class AdapterError extends Error {
  // error: Malformed, ShapeMismatch, Unsupported or UsageError (README, section 13); where: the place inside the file.
  constructor(error, where, why) {
    super(`${where ? `${where}: ` : ""}${why}`);
    this.error = error;
    this.where = where;
  }
}

const malformed = (where, why) => new AdapterError("Malformed", where, why);

// ---- JSON (README, section 4). JSON.parse hides repeated keys, and that 3.0 is not an integer. Here objects are Maps,
// integers are BigInts, and all other numbers are Numbers.

const MAX_DEPTH = 100;
const MAX_DIGITS = 4300;
const MAX_CONTAINERS = 2 ** 21; // objects and lists; 90 MB of `{},` would take gigabytes
const NUMBER = /-?(?:0|[1-9][0-9]*)(\.[0-9]+)?([eE][-+]?[0-9]+)?/y;

// Lenient, as configurations are read: NaN and infinities pass, and of equal keys the last counts.
export function parseJSON(text, lenient = false) {
  let [at, containers] = [0, 0];
  const fail = (why) => {
    throw new SyntaxError(`${why} at character ${at}`);
  };
  const space = () => {
    while (at < text.length && " \t\n\r".includes(text[at])) at++;
  };
  const word = (literal, value) => {
    if (!text.startsWith(literal, at)) fail("unexpected text");
    at += literal.length;
    return value;
  };
  const string = () => {
    const start = at++;
    for (; text[at] !== '"'; at += text[at] === "\\" ? 2 : 1) {
      if (at >= text.length || text[at] < " ") fail("a string that does not end, or a control character");
    }
    const out = JSON.parse(text.slice(start, ++at)); // it knows the escapes
    if (/[\ud800-\udbff](?![\udc00-\udfff])|(?<![\ud800-\udbff])[\udc00-\udfff]/.test(out)) fail("half of a surrogate pair");
    return out;
  };
  const number = () => {
    NUMBER.lastIndex = at;
    const found = NUMBER.exec(text);
    if (!found) fail("no value");
    at += found[0].length;
    if (found[1] === undefined && found[2] === undefined) {
      if (found[0].replace("-", "").length > MAX_DIGITS) fail("an integer of too many digits");
      return BigInt(found[0]);
    }
    const value = Number(found[0]);
    if (!Number.isFinite(value) && !lenient) fail("a number too large for 64 bits");
    return value;
  };
  const value = (depth) => {
    space();
    const c = text[at];
    if ((c === "{" || c === "[") && (depth >= MAX_DEPTH || ++containers > MAX_CONTAINERS)) fail("nested too deeply, or too much");
    if (c === "{") return sequence(new Map(), "}", (found) => pair(found, depth + 1));
    if (c === "[") return sequence([], "]", (found) => found.push(value(depth + 1)));
    if (c === '"') return string();
    const words = { t: ["true", true], f: ["false", false], n: ["null", null] };
    if (Object.hasOwn(words, c ?? "")) return word(...words[c]);
    if (lenient && c === "N") return word("NaN", NaN);
    if (lenient && /^-?I/.test(text.slice(at, at + 2))) return c === "-" ? word("-Infinity", -Infinity) : word("Infinity", Infinity);
    return number();
  };
  const pair = (found, depth) => {
    if (text[at] !== '"') fail("no key");
    const key = string();
    if (found.has(key) && !lenient) fail(`key ${key} twice`);
    space();
    if (text[at++] !== ":") fail("no colon");
    found.set(key, value(depth));
  };
  const sequence = (found, end, item) => {
    at++;
    space();
    if (text[at] === end) return at++, found;
    for (;;) {
      space();
      item(found);
      space();
      if (text[at] === end) return at++, found;
      if (text[at++] !== ",") fail("no comma");
    }
  };
  const result = value(0);
  space();
  if (at !== text.length) fail("more than one value");
  return result;
}

// Canonical JSON (README, section 4): what a digest is computed over.
export function canonical(value) {
  if (value === null || typeof value === "boolean") return String(value);
  if (typeof value === "bigint") return value.toString();
  if (typeof value === "number") return canonicalFloat(value);
  if (typeof value === "string") return JSON.stringify(value);
  if (Array.isArray(value)) return `[${value.map(canonical).join(",")}]`;
  const keys = [...value.keys()].sort(byCodePoint);
  return `{${keys.map((key) => `${JSON.stringify(key)}:${canonical(value.get(key))}`).join(",")}}`;
}

function canonicalFloat(value) {
  if (Object.is(value, -0)) return "-0.0";
  let [digits, exponent] = value.toExponential().split("e"); // the fewest digits that read back, as d.ddde+n
  exponent = Number(exponent);
  const sign = digits.startsWith("-") ? "-" : "";
  digits = digits.replace("-", "").replace(".", "");
  if (exponent < -4 || exponent >= 16) {
    const fraction = digits.length > 1 ? `.${digits.slice(1)}` : "";
    return `${sign}${digits[0]}${fraction}e${exponent < 0 ? "-" : "+"}${String(Math.abs(exponent)).padStart(2, "0")}`;
  }
  if (exponent < 0) return `${sign}0.${"0".repeat(-exponent - 1)}${digits}`;
  const padded = digits.padEnd(exponent + 1, "0");
  return `${sign}${padded.slice(0, exponent + 1)}.${padded.slice(exponent + 1) || "0"}`;
}

function byCodePoint(a, b) {
  const [one, other] = [a, b].map((text) => [...text].map((c) => c.codePointAt(0)));
  const at = one.findIndex((code, i) => code !== other[i]);
  return at < 0 ? one.length - other.length : at < other.length ? one[at] - other[at] : 1;
}

// ---- Element types (README, section 5): bytes an element, and how an element is read as a 64-bit number.

export function smallFloat(bits, exponentBits, mantissaBits, bias, special) {
  // special: "ieee" has infinities and NaNs, "fn" one NaN a sign (all ones), "fnuz" a single NaN (negative zero).
  const mantissa = bits & ((1 << mantissaBits) - 1);
  const exponent = (bits >> mantissaBits) & ((1 << exponentBits) - 1);
  const sign = bits >> (mantissaBits + exponentBits) ? -1 : 1;
  const top = exponent === (1 << exponentBits) - 1;
  if (special === "fnuz" && sign < 0 && exponent === 0 && mantissa === 0) return NaN;
  if (special === "ieee" && top) return mantissa ? NaN : sign * Infinity;
  if (special === "fn" && top && mantissa === (1 << mantissaBits) - 1) return NaN;
  const scale = 2 ** ((exponent || 1) - bias - mantissaBits);
  return sign * (mantissa + (exponent ? 1 << mantissaBits : 0)) * scale;
}

// Name -> bytes an element, and a function (DataView, offset) -> number. Those of DataView's own types are little-endian.
// Types that are not: name -> bits, bits of the exponent, bits of the significand, bias, special values.
export const SMALL = {
  F8_E5M2: [8, 5, 2, 15, "ieee"], F8_E4M3: [8, 4, 3, 7, "fn"], F8_E4M3FNUZ: [8, 4, 3, 8, "fnuz"],
  F8_E5M2FNUZ: [8, 5, 2, 16, "fnuz"], F16: [16, 5, 10, 15, "ieee"], BF16: [16, 8, 7, 127, "ieee"],
};
const small = (bits, ...how) => [bits / 8, (v, i) => smallFloat(v[`getUint${bits}`](i, true), ...how)];
const plainType = (name) => [parseInt(name.match(/\d+$/)[0]) / 8, (v, i) => v[`get${name}`](i, true)];
const whole = { U8: "Uint8", I8: "Int8", I16: "Int16", U16: "Uint16", I32: "Int32", U32: "Uint32", I64: "BigInt64", U64: "BigUint64" };
const real = {
  ...Object.fromEntries(Object.entries(SMALL).map(([name, how]) => [name, small(...how)])),
  F8_E8M0: [1, (v, i) => (v.getUint8(i) === 255 ? NaN : 2 ** (v.getUint8(i) - 127))],
  F32: plainType("Float32"), F64: plainType("Float64"),
};
export const DTYPES = new Map([
  ["BOOL", { size: 1, get: (v, i) => v.getUint8(i) }],
  ["C64", { size: 8, get: (v, i) => v.getFloat32(i, true) }],
  ...Object.entries(real).map(([name, [size, get]]) => [name, { size, get, real: true }]),
  ...Object.entries(whole).map(([name, type]) => [name, plainType(type)]).map(([n, [size, get]]) => [n, { size, get, whole: true }]),
]);

// ---- Container (README, section 3).

const MAX_HEADER = 100_000_000n;
const MAX_AXES = 64;

// The tensors and the metadata of a safetensors file: name -> {dtype, shape, bytes, numbers()}; Map of text to text.
export function readSafetensors(bytes) {
  const size = BigInt(bytes.length);
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.length);
  if (size < 8n) throw malformed("header length", "too few bytes");
  const length = view.getBigUint64(0, true);
  if (length > MAX_HEADER || 8n + length > size) throw malformed("header length", "more than the file holds");
  const start = 8n + length;
  let fields;
  try {
    const text = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(bytes.subarray(8, Number(start)));
    fields = parseJSON(text);
  } catch (error) {
    throw malformed("header", error.message);
  }
  if (!(fields instanceof Map)) throw malformed("header", "not an object");
  const metadata = fields.get("__metadata__") ?? new Map();
  fields.delete("__metadata__");
  if (!(metadata instanceof Map) || ![...metadata.values()].every((v) => typeof v === "string")) {
    throw malformed("__metadata__", "does not map text to text");
  }
  const entries = [...fields].map(([name, spec]) => entryOf(name, spec));
  entries.sort((a, b) => (a.from === b.from ? Number(a.to - b.to) : a.from < b.from ? -1 : 1));
  let end = 0n;
  for (const entry of entries) {
    if (entry.from !== end) throw malformed(entry.name, "overlaps the tensor before it, or leaves a hole");
    end = entry.to;
  }
  if (start + end !== size) throw malformed(`byte ${start + end < size ? start + end : size}`, "cut short, or trailing bytes");
  const tensors = new Map();
  for (const { name, dtype, shape, from, to } of entries) {
    tensors.set(name, tensorOf(dtype, shape, bytes.subarray(Number(start + from), Number(start + to))));
  }
  return { tensors, metadata };
}

function entryOf(name, spec) {
  const known = ["dtype", "shape", "data_offsets"];
  if (!(spec instanceof Map) || spec.size !== 3 || !known.every((key) => spec.has(key))) {
    throw malformed(name, "needs exactly dtype, shape and data_offsets");
  }
  const [dtype, shape, offsets] = known.map((key) => spec.get(key));
  if (typeof dtype !== "string" || !DTYPES.has(dtype)) throw malformed(name, `unknown dtype ${dtype}`);
  if (!isSizes(shape) || !isSizes(offsets) || offsets.length !== 2) throw malformed(name, "sizes are not whole numbers");
  const nbytes = shape.reduce((product, n) => product * n, BigInt(DTYPES.get(dtype).size));
  if (offsets[1] - offsets[0] !== nbytes) throw malformed(name, "offsets do not agree with dtype and shape");
  return { name, dtype, shape, from: offsets[0], to: offsets[1] };
}

const isCount = (n) => typeof n === "bigint" && n >= 0n;
const isSize = (n) => isCount(n) && n < 1n << 63n;
const isSizes = (value) => Array.isArray(value) && value.length <= MAX_AXES && value.every(isSize);

// `sizes` and `integers` are BigInts: an axis and a position may be larger than a Number holds exactly.
function tensorOf(dtype, sizes, bytes) {
  const { size, get } = DTYPES.get(dtype);
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.length);
  const numbers = () => Float64Array.from({ length: bytes.length / size }, (_, i) => Number(get(view, i * size)));
  const integers = () => Array.from({ length: bytes.length / size }, (_, i) => BigInt(get(view, i * size)));
  return { dtype, shape: sizes.map(Number), sizes, bytes, numbers, integers };
}

// ---- Record (README, sections 6 and 7).

const KEY = "adapterkit";
const LAYOUTS = ["out *in", "in out *k", "e out *in", "e in out *k"];
const isText = (v) => typeof v === "string";
const isObject = (v) => v instanceof Map;
const isTexts = (v) => isObject(v) && [...v.values()].every(isText);
const orNull = (test) => (v) => v === null || test(v);
const isPair = (v) => Array.isArray(v) && v.length === 2;
// Field -> [test, whether it is required, fields inside an object or inside the objects of a list, or test of items].
const BASE = { id: [orNull(isText)], revision: [orNull(isText)], config_hash: [orNull(isText)] };
const STEP = { op: [isText, true], args: [isObject, true] };
const FOREIGN = { format: [isText, true], data: [isObject, true], tensors: [isTexts, true] };
const TARGET = { path: [isText, true], layout: [isText], rows: [orNull(isPair), false, isCount] };
const UPDATE = {
  target: [isObject, true, TARGET],
  method: [(v) => isText(v) && v.length > 0, true],
  version: [(v) => typeof v === "bigint" && v >= 1n, true],
  tensors: [isTexts, true],
  attributes: [isObject, true],
};
const RECORD = {
  version: [isText, true],
  updates: [(v) => Array.isArray(v) && v.length > 0, true, UPDATE],
  requires: [Array.isArray, false, isText],
  recipe: [Array.isArray, false, STEP],
  base: [orNull(isObject), false, BASE],
  foreign: [orNull(isObject), false, FOREIGN],
  extensions: [isObject],
};

// In the order of the document, each field with all that is in it; then what is missing.
function checkFields(value, fields, where) {
  const single = fields instanceof Function;
  if (!(single ? fields : isObject)(value)) throw malformed(where, "not of its type");
  for (const [key, found] of single ? [] : value) {
    if (!Object.hasOwn(fields, key)) throw malformed(where, `unknown field ${key}`);
    const [test, , inside] = fields[key];
    const place = `${where}.${key}`;
    if (!test(found)) throw malformed(place, "not of its type");
    if (inside && Array.isArray(found)) found.forEach((item, i) => checkFields(item, inside, `${place}[${i}]`));
    else if (inside && found !== null) checkFields(found, inside, place);
  }
  if (!single && Object.keys(fields).some((key) => fields[key][1] && !value.has(key))) throw malformed(where, "lacks a field");
}

// The adapter in the bytes of a file; `methods` are the entries of spec/1.1/methods.json by name.
export function readAdapter(bytes, methods) {
  const { tensors, metadata } = readSafetensors(bytes);
  if (!metadata.has(KEY)) throw malformed("__metadata__", `no key ${KEY}`);
  const record = parseRecord(metadata.get(KEY));
  const adapter = new Adapter(decodeUpdates(record, tensors, methods), record);
  adapter.validate();
  return adapter;
}

function parseRecord(text) {
  const place = `metadata ${KEY}`;
  let record;
  try {
    record = parseJSON(text);
  } catch (error) {
    throw malformed(place, error.message);
  }
  if (!isObject(record)) throw malformed(place, "not an object");
  const version = record.get("version");
  const found = isText(version) && /^(0|[1-9][0-9]{0,3})\.(0|[1-9][0-9]{0,3})$/.exec(version);
  if (!found) throw malformed(`${place}: version`, "not MAJOR.MINOR");
  if (Number(found[1]) !== SPEC[0]) throw new AdapterError("Unsupported", "version", `spec ${version}`);
  if (Number(found[2]) > SPEC[1]) keepUnknown(record, place);
  checkFields(record, RECORD, place);
  if (record.get("requires")?.length) throw new AdapterError("Unsupported", "requires", record.get("requires").join(", "));
  return record;
}

// Unknown fields of a newer MINOR go to `extensions`.
function keepUnknown(record, place) {
  const kept = record.get("extensions") ?? new Map();
  const unknown = [...record.keys()].filter((key) => !Object.hasOwn(RECORD, key));
  if (record.get("extensions") === null || !isObject(kept) || unknown.some((key) => kept.has(key))) {
    throw malformed(`${place}.extensions`, "not an object, or a field beside it is in it too");
  }
  for (const key of unknown) kept.set(key, record.get(key)) && record.delete(key);
  record.set("extensions", kept);
}

function decodeUpdates(record, tensors, methods) {
  const unused = new Set(tensors.keys());
  const take = (name, where) => {
    if (!tensors.has(name)) throw malformed(where, `no tensor ${name}`);
    unused.delete(name);
    return tensors.get(name);
  };
  const targets = new Map();
  let last;
  record.get("updates").forEach((entry, position) => {
    const target = targetOf(entry.get("target"));
    const place = `updates[${position}] (${target.name})`;
    if (targets.has(target.key) && last !== target.key) throw malformed(place, "updates of one target stand apart");
    last = target.key;
    if (!targets.has(target.key)) targets.set(target.key, { target, updates: [] });
    targets.get(target.key).updates.push(decodeUpdate(entry, take, place, methods));
  });
  for (const [name, key] of record.get("foreign")?.get("tensors") ?? []) take(key, `foreign.${name}`);
  if (unused.size) throw malformed([...unused][0], "a tensor that nothing refers to");
  return [...targets.values()];
}

function targetOf(record) {
  const [path, layout, rows] = [record.get("path"), record.get("layout") ?? LAYOUTS[0], record.get("rows") ?? null];
  const name = (path || "(model)") + (rows ? `[${rows[0]}:${rows[1]}]` : "");
  return { path, layout, rows, name, key: canonical([path, layout, rows]), stacked: layout.startsWith("e ") };
}

function decodeUpdate(entry, take, place, methods) {
  const [name, version] = [entry.get("method"), entry.get("version")];
  if (!Object.hasOwn(methods, name)) throw new AdapterError("Unsupported", place, `unknown method ${name}`);
  const method = methods[name];
  if (version > BigInt(method.version)) throw new AdapterError("Unsupported", `${place}: version`, `${name} ${version}`);
  const fields = new Map(method.tensors.map((field) => [field.name, field]));
  const known = (method.attributes ?? []).filter((a) => BigInt(a.since ?? 1) <= version);
  const [tensors, attributes] = [new Map(), new Map()];
  const checkNames = (what, given, names, required) => {
    const fault = [...given.keys()].find((each) => !names.includes(each)) ?? required.find((each) => !given.has(each));
    if (fault !== undefined) throw malformed(`${place}: ${what}`, `unknown or missing name ${fault}`);
  };
  const namesOf = (list) => list.map((each) => each.name);
  checkNames("tensors", entry.get("tensors"), [...fields.keys()], namesOf(method.tensors.filter((t) => !t.optional)));
  checkNames("attributes", entry.get("attributes"), namesOf(known), namesOf(known.filter((a) => a.default === undefined)));
  for (const [field, key] of entry.get("tensors")) tensors.set(field, take(key, `${place}: ${field}`));
  const given = entry.get("attributes");
  for (const a of method.attributes ?? []) attributes.set(a.name, given.has(a.name) ? given.get(a.name) : plain(a, a.default));
  const ordered = method.tensors.filter((t) => tensors.has(t.name)).map((t) => [t.name, tensors.get(t.name)]);
  return { method, tensors: new Map(ordered), attributes };
}

// ---- Checks (README, sections 8, 9 and 13).

export class Adapter {
  constructor(targets, record) {
    this.targets = targets; // [{target, updates: [{method, tensors, attributes}]}], in order
    this.record = record;
  }

  validate() {
    for (const { target, updates } of this.targets) {
      checkTarget(target, updates);
      const together = new Map(target.rows ? [["out", target.rows[1] - target.rows[0]]] : []);
      for (const update of updates) {
        within(target, update, () => {
          checkAttributes(update);
          checkForms(update);
          if (!update.tensors.size) throw malformed("", "no tensor at all");
          update.dims = solve(update, target.stacked);
          applyRules(update, target.stacked);
          const shared = [...update.dims].filter(([axis]) => ["out", "in", "e"].includes(axis));
          if (update.dims.get("rest")?.length) shared.push(["in", update.dims.get("rest")[0]]);
          for (const [axis, size] of shared) {
            if ((together.get(axis) ?? size) !== size) throw mismatch("", `${axis} differs among the target's updates`);
            together.set(axis, size);
          }
        });
      }
    }
  }

  checkValues() {
    for (const { target, updates } of this.targets) {
      for (const update of updates) within(target, update, () => checkValues(update));
    }
  }

  // The sha256, in hexadecimal, of README, section 11.
  async digest() {
    const parts = [];
    const say = (value) => parts.push(new TextEncoder().encode(canonical(value)));
    const sorted = this.targets.toSorted((a, b) => byCodePoint(a.target.name, b.target.name));
    for (const { target, updates } of sorted) {
      for (const update of updates) {
        const version = statedVersion(update);
        const attributes = new Map(
          (update.method.attributes ?? [])
            .filter((a) => (a.since ?? 1) <= version)
            .map((a) => [a.name, a.type === "float" ? Number(update.attributes.get(a.name)) : update.attributes.get(a.name)]),
        );
        say([target.path, target.layout, target.rows, update.method.name, BigInt(version), attributes]);
        for (const [field, tensor] of update.tensors) {
          say([field, tensor.dtype, tensor.sizes]);
          parts.push(tensor.bytes);
        }
      }
    }
    const hash = await crypto.subtle.digest("SHA-256", await new Blob(parts).arrayBuffer());
    return [...new Uint8Array(hash)].map((byte) => byte.toString(16).padStart(2, "0")).join("");
  }
}

// The oldest version of a method that has all attributes that an update uses.
function statedVersion({ method, attributes }) {
  // 1 equals 1.0, and 0.0 equals -0.0: not canonical JSON, but numbers are compared.
  const used = (method.attributes ?? []).filter((a) => a.since > 1 && attributes.get(a.name) != plain(a, a.default));
  return Math.max(method.since.findIndex(Boolean) + 1, ...used.map((a) => a.since));
}

const plain = (attribute, value) => (attribute.type === "int" ? BigInt(value) : value);
const mismatch = (where, why) => new AdapterError("ShapeMismatch", where, why);

function within(target, update, check) {
  try {
    return check();
  } catch (error) {
    if (!(error instanceof AdapterError)) throw error;
    const inside = error.where ? `.${error.where}` : "";
    throw new AdapterError(error.error, `${target.name}: ${update.method.name}${inside}`, error.message);
  }
}

function checkTarget(target, updates) {
  const kinds = updates.map(({ method }) => method.kind);
  if (!target.path && !updates.every(({ method }) => method.kind === "context" || method.of_model)) {
    throw malformed("path", "an update of a module without a path");
  }
  if (kinds.includes("context") && (target.layout !== LAYOUTS[0] || target.rows)) {
    throw malformed(`${target.name}: layout`, "context has no layout and no rows");
  }
  const output = kinds.indexOf("output");
  if (output >= 0 && kinds.slice(output).some((kind) => kind === "additive" || kind === "weight")) {
    throw malformed(target.name, "an update of the weight after one of the output");
  }
  if (!LAYOUTS.includes(target.layout)) throw malformed(`${target.name}: layout`, target.layout);
  if (target.rows && target.rows[0] >= target.rows[1]) throw malformed(`${target.name}: rows`, "no start before a stop");
}

function checkAttributes({ method, attributes }) {
  for (const a of method.attributes ?? []) {
    const value = attributes.get(a.name);
    const types = { bool: ["boolean"], str: ["string"], int: ["bigint"], float: ["bigint", "number"] }[a.type];
    if (!types.includes(typeof value)) throw malformed(a.name, `not of type ${a.type}`);
    if (a.type === "float" && !(value >= -Number.MAX_VALUE && value <= Number.MAX_VALUE)) throw malformed(a.name, "not finite");
    if (a.among && !a.among.some((word) => word == value)) throw new AdapterError("Unsupported", a.name, `${value}`);
    if (a.least !== undefined && value < a.least) throw malformed(a.name, `below ${a.least}`);
    if (a.positive && !(value > 0)) throw malformed(a.name, "not above 0");
    if (a.most !== undefined && value > a.most) throw malformed(a.name, `above ${a.most}`);
  }
}

function checkForms({ method, tensors }) {
  for (const group of method.one_of ?? []) {
    const present = new Set(group.flat().filter((name) => tensors.has(name)));
    const fits = group.some((names) => names.length === present.size && names.every((name) => present.has(name)));
    if (!fits) throw malformed("", "not exactly one of the method's forms");
  }
}

// Sizes of all named axes (README, section 8): BigInts, and lists of them for starred names.
function solve(update, stacked) {
  const dims = new Map();
  const fields = update.method.tensors.filter(({ name }) => update.tensors.has(name));
  for (const { name, integer } of fields) {
    const dtype = DTYPES.get(update.tensors.get(name).dtype);
    if (!(integer ? dtype.whole : dtype.real)) throw mismatch(name, `${integer ? "whole" : "real"} numbers belong here`);
  }
  // Twice: products and quotients may wait for an axis that a later tensor tells.
  for (let round = 0; round < 2; round++) {
    for (const { name, shape } of fields) bindShape(stacked ? `e ${shape}` : shape, update.tensors.get(name).sizes, dims, name);
  }
  return dims;
}

function bindShape(text, shape, dims, field) {
  const axes = text.split(/\s+/);
  const extra = shape.length - axes.filter((axis) => !axis.startsWith("*")).length;
  const starred = axes.some((axis) => axis.startsWith("*"));
  if (extra < 0 || (extra > 0 && !starred)) throw mismatch(field, `[${shape}] is not [${text}]`);
  let at = 0;
  for (const axis of axes) {
    let fits;
    if (axis.startsWith("*")) {
      const sizes = shape.slice(at, at + extra);
      if (!dims.has(axis.slice(1))) dims.set(axis.slice(1), sizes);
      fits = canonical(dims.get(axis.slice(1))) === canonical(sizes);
      at += extra;
    } else fits = bindAxis(axis, shape[at++], dims);
    if (!fits) throw mismatch(field, `[${shape}] is not [${text}]`);
  }
}

function bindAxis(axis, size, dims) {
  if (/^[a-z_]\w*$/i.test(axis)) {
    if (!dims.has(axis)) dims.set(axis, size);
    return dims.get(axis) === size;
  }
  const unknown = axis.match(/[a-z_]\w*/gi)?.filter((name) => !dims.has(name)) ?? [];
  if (unknown.length > 1) return true;
  if (!unknown.length) return evaluateAxis(axis, dims) === size;
  const [above, below] = fraction(axis, new Map([...dims, [unknown[0], 1n]]));
  const most = (n) => (n > 1n ? n : 1n);
  for (const trial of [(size * below) / most(above), above / most(size * below)]) {
    if (trial > 0n && evaluateAxis(axis, new Map([...dims, [unknown[0], trial]])) === size) {
      dims.set(unknown[0], trial);
      return true;
    }
  }
  return false;
}

function fraction(axis, dims) {
  let [above, below] = [1n, 1n];
  for (const [, operator, part] of `*${axis}`.matchAll(/([*/])(\w+)/g)) {
    const value = /^\d/.test(part) ? BigInt(part) : dims.get(part);
    if (operator === "*") above *= value;
    else below *= value;
  }
  return [above, below];
}

function evaluateAxis(axis, dims) {
  const [above, below] = fraction(axis, dims);
  return below && above % below === 0n ? above / below : -1n;
}

function applyRules(update, stacked) {
  const { method, dims } = update;
  const scope = { update, dims, stacked };
  for (const rule of method.rules ?? []) {
    if (rule.when && !evaluateRule(rule.when, scope)) continue;
    if (rule.define) {
      const size = evaluateRule(rule.value, scope);
      if (!dims.has(rule.define)) dims.set(rule.define, size);
      if (dims.get(rule.define) !== size || typeof size !== "bigint" || size < 0n) throw mismatch(rule.where ?? "", `${rule.define} is not ${rule.value}`);
    } else if (!evaluateRule(rule.require, scope)) {
      throw new AdapterError(rule.error, rule.where ?? "", `${rule.require} does not hold`);
    }
  }
}

// The value of an expression of a rule (README, section 9): an integer, a text, or undefined where a part has none.
// `scope`: name(word) -> integer, text or undefined; axes(tensor) -> its number of axes, undefined where it is absent.
export function valueOf(text, scope) {
  const tokens = text.match(/\w+|'[^']*'|\/\/|\*\*|[<>=!]=|[-+*%()<>,]/g);
  let at = 0;
  const next = (...words) => (words.includes(tokens[at]) ? tokens[at++] : undefined);
  const numbers = (f, ...values) => (values.every((value) => typeof value === "bigint") ? f(...values) : undefined);
  const atom = () => {
    const token = tokens[at++];
    if (token === "(") return [either(), at++][0];
    if (/^\d/.test(token)) return BigInt(token);
    if (token[0] === "'") return token.slice(1, -1);
    if (tokens[at] !== "(") return scope.name(token);
    const word = tokens[at + 1];
    at += 3;
    if (token === "has") return BigInt(scope.axes(word) !== undefined);
    return token === "axes" ? scope.axes(word) : numbers(blockOfPairs, scope.name(word));
  };
  const raised = (a, b) => (b >= 0n && b <= 63n ? a ** b : undefined);
  const power = (base = atom()) => (next("**") ? numbers(raised, base, power()) : base);
  const floor = (a, b) => a / b - (a % b !== 0n && a < 0n !== b < 0n ? 1n : 0n);
  const operators = {
    "+": (a, b) => a + b, "-": (a, b) => a - b, "*": (a, b) => a * b, "<": (a, b) => BigInt(a < b), ">": (a, b) => BigInt(a > b),
    "//": (a, b) => (b ? floor(a, b) : undefined), "%": (a, b) => (b ? a - floor(a, b) * b : undefined),
    "<=": (a, b) => BigInt(a <= b), ">=": (a, b) => BigInt(a >= b), "==": (a, b) => BigInt(a === b), "!=": (a, b) => BigInt(a !== b),
  };
  const chain = (inner, ...words) => () => {
    let value = inner();
    for (let word; (word = next(...words)); ) value = numbers(operators[word], value, inner());
    return value;
  };
  const sum = chain(chain(power, "*", "//", "%"), "+", "-");
  const comparison = () => {
    const one = sum();
    const word = next("==", "!=", "<", "<=", ">", ">=");
    if (!word) return one;
    const other = sum();
    const texts = (word === "==" || word === "!=") && [one, other].every(isText);
    return texts ? operators[word](one, other) : numbers(operators[word], one, other);
  };
  const inverted = (value) => (value === undefined ? undefined : BigInt(!value));
  const negated = () => (next("not") ? inverted(negated()) : comparison());
  // Every part is computed, since its tokens have to be consumed; the first that decides or has no value counts.
  const joined = (inner, word, stop) => () => {
    const parts = [inner()];
    while (next(word)) parts.push(inner());
    const value = parts.at(parts.findIndex((each) => each === undefined || Boolean(each) === stop)); // the last where none
    return parts.length === 1 || value === undefined ? value : BigInt(Boolean(value));
  };
  const either = joined(joined(negated, "and", false), "or", true);
  return either();
}

// The positive b with b (b - 1) / 2 = p, or 0: by Newton's method from above.
function blockOfPairs(p) {
  if (p < 0n) return 0n;
  let b = p + 1n;
  while (b * (b - 1n) > 2n * p) b = (b * b + 2n * p) / (2n * b - 1n);
  return b * (b - 1n) === 2n * p ? b : 0n;
}

function evaluateRule(text, { update, dims, stacked }) {
  const type = (word) => (update.method.attributes ?? []).find((a) => a.name === word)?.type;
  const of = (word) => (dims.has(word) ? dims.get(word) : type(word) === "float" ? undefined : update.attributes.get(word));
  const plainOf = (value) => (Array.isArray(value) ? undefined : typeof value === "boolean" ? BigInt(value) : value);
  const name = (word) => plainOf(of(word));
  const axes = (word) => (update.tensors.has(word) ? BigInt(update.tensors.get(word).shape.length - (stacked ? 1 : 0)) : undefined);
  return valueOf(text, { name, axes }) ?? false;
}

function checkValues({ method, tensors, dims }) {
  for (const { name } of method.tensors.filter((t) => tensors.has(t.name))) {
    const tensor = tensors.get(name);
    if (DTYPES.get(tensor.dtype).real && !tensor.numbers().every(Number.isFinite)) throw malformed(name, "not finite");
  }
  const placed = method.tensors.filter((t) => t.below && tensors.has(t.name));
  for (const field of placed) {
    for (const [row, part] of rowsOf(field, tensors.get(field.name)).entries()) {
      const bound = sizeOf(field.below[row], dims);
      if (part.some((n) => n < 0n || (bound !== undefined && n >= bound))) throw malformed(field.name, "a position outside");
    }
  }
  for (const field of placed.filter((t) => t.distinct)) {
    const tensor = tensors.get(field.name);
    const last = tensor.shape.at(-1) ?? 1;
    const rows = rowsOf(field, tensor);
    for (let start = 0; start < rows[0].length; start += last) {
      const seen = new Set();
      for (let i = start; i < start + last; i++) seen.add(rows.map((row) => row[i]).join());
      if (seen.size !== last) throw malformed(field.name, "the same position twice");
    }
  }
}

// The positions of a field, for each axis that they are on: pairs are two rows, of which experts may have several.
function rowsOf(field, tensor) {
  const numbers = tensor.integers();
  if (field.below.length === 1) return [numbers];
  const last = tensor.shape.at(-1);
  return [0, 1].map((row) => numbers.filter((_, i) => Math.floor(i / last) % 2 === row));
}

function sizeOf(axis, dims) {
  const names = axis.match(/[a-z_]\w*/gi) ?? [];
  return names.every((name) => dims.has(name)) ? evaluateAxis(axis, dims) : undefined;
}

// ---- Arrays of 64-bit numbers in C order, as few operations as the formulas need.

export const product = (shape) => shape.reduce((a, b) => a * b, 1);
export const array = (shape, data = new Float64Array(product(shape))) => ({ shape, data });
export const reshape = (a, shape) => array(shape, a.data);
export const map = (a, f) => array(a.shape, a.data.map(f));
const zip = (a, b, f) => array(a.shape, a.data.map((value, i) => f(value, b.data[i])));
export const scale = (a, s) => map(a, (value) => value * s);
export const add = (a, b) => zip(a, b, (x, y) => x + y);
export const subtract = (a, b) => zip(a, b, (x, y) => x - y);
export const multiply = (a, b) => zip(a, b, (x, y) => x * y);
export const flatten = (a) => reshape(a, [a.shape[0], product(a.shape.slice(1))]);
export const slice = (a, start, stop) => {
  const step = product(a.shape.slice(1));
  return array([stop - start, ...a.shape.slice(1)], a.data.slice(start * step, stop * step));
};
export const stack = (parts) => {
  const out = array([parts.length, ...parts[0].shape]);
  parts.forEach((part, i) => out.data.set(part.data, i * part.data.length));
  return out;
};
export const part = (a, i) => reshape(slice(a, i, i + 1), a.shape.slice(1));

export const identity = (n) => map(array([n, n]), (_, at) => Number(at % (n + 1) === 0));

export function swapped(a, first) {
  // Axes `first` and `first` + 1 in each other's place.
  const [before, m, n] = [product(a.shape.slice(0, first)), a.shape[first], a.shape[first + 1]];
  const inner = product(a.shape.slice(first + 2));
  const out = array([...a.shape.slice(0, first), n, m, ...a.shape.slice(first + 2)]);
  for (let at = 0; at < before * m * n; at++) {
    const [b, i, j] = [Math.floor(at / n / m), Math.floor(at / n) % m, at % n];
    out.data.set(a.data.subarray(at * inner, (at + 1) * inner), ((b * n + j) * m + i) * inner);
  }
  return out;
}

export const transposed = (a) => swapped(a, 0);

export function matmul(a, b) {
  const [m, k, n] = [a.shape[0], a.shape[1], b.shape[1]];
  const out = array([m, n]);
  for (let i = 0; i < m; i++) {
    for (let p = 0; p < k; p++) {
      const value = a.data[i * k + p];
      for (let j = 0; j < n; j++) out.data[i * n + j] += value * b.data[p * n + j];
    }
  }
  return out;
}

export function inverse(a) {
  // Gauss and Jordan beside the identity, with the largest pivot of each column.
  const n = a.shape[0];
  const rows = Array.from({ length: n }, (_, i) => [a, identity(n)].flatMap(({ data }) => [...data.subarray(i * n, i * n + n)]));
  for (let c = 0; c < n; c++) {
    let best = c;
    for (let r = c + 1; r < n; r++) if (Math.abs(rows[r][c]) > Math.abs(rows[best][c])) best = r;
    [rows[c], rows[best]] = [rows[best], rows[c]];
    const pivot = (rows[c] = rows[c].map((value, _, row) => value / row[c]));
    for (let r = 0; r < n; r++) if (r !== c && rows[r][c]) rows[r] = rows[r].map((value, k, row) => value - row[c] * pivot[k]);
  }
  return array([n, n], Float64Array.from(rows.flatMap((row) => row.slice(n))));
}

// ---- Formulas (the entries of methods/): (W [out, in, *k], t: tensors, a: attributes) -> W'; of the bias under `bias`.

export const perOutput = (W, f) => map(W, (value, i) => f(value, Math.floor(i / (W.data.length / W.shape[0]))));
export const plus = (W, D, scaling = 1) => map(W, (value, i) => value + scaling * D.data[i]);
export const lowRank = (B, A) => matmul(B, flatten(A));

// tn[p, q, *k] between left [out, p] and right [q, in]: [out, in * k].
function tucker(core, left, right) {
  const kernel = product(core.shape.slice(2));
  const [r, q, n] = [core.shape[0], core.shape[1], right.shape[1]];
  const inner = array([r, n, kernel]);
  inner.data.forEach((_, at) => {
    const [p, i, k] = [Math.floor(at / kernel / n), Math.floor(at / kernel) % n, at % kernel];
    for (let j = 0; j < q; j++) inner.data[at] += core.data[(p * q + j) * kernel + k] * right.data[j * n + i];
  });
  return matmul(left, flatten(inner));
}

function loha(W, t, a) {
  const side = (n) => (t[`t${n}`] ? tucker(t[`t${n}`], t[`w${n}_a`], t[`w${n}_in`]) : matmul(t[`w${n}_a`], t[`w${n}_b`]));
  return plus(W, multiply(side(1), side(2)), a.scaling);
}

function lokr(W, t, a) {
  const w1 = t.w1 ?? matmul(t.w1_a, t.w1_b);
  const w2 = t.w2 ? flatten(t.w2) : t.t2 ? tucker(t.t2, t.w2_a, t.w2_in) : matmul(t.w2_a, t.w2_b);
  if (!a.stacked) return plus(W, kron(w1, w2), a.scaling);
  const inner = [t.w2.shape[1], product(t.w2.shape.slice(2))];
  return plus(W, stack(Array.from({ length: w2.shape[0] }, (_, i) => kron(w1, reshape(part(w2, i), inner)))), a.scaling);
}

export function kron(one, other) {
  const [[a, c], [m, n]] = [one.shape, other.shape];
  return map(array([a * m, c * n]), (_, at) => {
    const [row, column] = [Math.floor(at / (c * n)), at % (c * n)];
    return one.data[Math.floor(row / m) * c + Math.floor(column / n)] * other.data[(row % m) * n + (column % n)];
  });
}

export function skew(pairs, b) {
  const above = (i, j) => pairs[(i * (2 * b - i - 1)) / 2 + j - i - 1];
  const entry = (i, j) => (i === j ? 0 : i < j ? above(i, j) : -above(j, i));
  return map(array([b, b]), (_, at) => entry(Math.floor(at / b), at % b));
}

export const cayley = (Q) => matmul(subtract(identity(Q.shape[0]), Q), inverse(add(identity(Q.shape[0]), Q)));

export function series(Q, terms, doubled) {
  const last = doubled ? terms - 1 : terms > 2 ? Math.max(terms, 4) - 1 : terms - 1;
  let [R, power] = [identity(Q.shape[0]), Q];
  for (let n = 1; n <= last; n++) {
    R = add(R, scale(power, n === last && n > 1 && !doubled ? 1 : 2));
    power = matmul(power, Q);
  }
  return R;
}

// blockdiag(rotations) times the rows of M; one block is repeated as often as fits.
export function turnRows(M, rotations) {
  const b = rotations[0].shape[0];
  const out = array(M.shape);
  const width = M.shape[1];
  for (let block = 0; block * b < M.shape[0]; block++) {
    const turned = matmul(rotations[block % rotations.length], slice(M, block * b, block * b + b));
    out.data.set(turned.data, block * b * width);
  }
  return out;
}

const blockOf = (pairs) => Math.round((1 + Math.sqrt(1 + 8 * pairs)) / 2);

function oft(W, t, a) {
  const blocks = t.square ?? t.pairs;
  const n = blocks.shape[0];
  const b = t.square ? t.square.shape[1] : blockOf(t.pairs.shape[1]);
  let Q = Array.from({ length: n }, (_, i) => {
    const own = part(blocks, i);
    return t.square ? subtract(transposed(own), own) : skew(own.data, b);
  });
  const norm = (blocks) => Math.sqrt(blocks.reduce((sum, q) => sum + q.data.reduce((s, v) => s + v * v, 0), 0));
  if (a.coft) Q = Q.map((q) => (norm([q]) > a.eps / Math.sqrt(n) ? scale(q, a.eps / Math.sqrt(n) / norm([q])) : q));
  if (a.constraint > 0 && norm(Q) + 1e-8 > a.constraint) {
    const share = a.constraint / (norm(Q) + 1e-8);
    Q = Q.map((q) => scale(q, share));
  }
  const R = Q.map((q) => (a.terms ? series(q, a.terms, a.doubled) : cayley(q)));
  const flat = flatten(W);
  const turned = a.side === "in" ? transposed(turnRows(transposed(flat), R)) : turnRows(flat, R.map(transposed));
  const new_ = reshape(turned, W.shape);
  return t.rescale ? perOutput(new_, (value, o) => value * t.rescale.data[o]) : new_;
}

function boft(W, t) {
  const [m, n, b] = t.R.shape;
  const width = n * b;
  const pick = (M, places) => stack(places.map((place) => part(M, place)));
  let X = transposed(flatten(W)); // inputs are rows here
  for (let i = 0; i < m; i++) {
    // order[j]: which input stands at place j once P_i has parted even chunks from odd ones; back: its inverse.
    const [run, chunk] = m > 1 ? [b * 2 ** i, b / 2] : [width, width];
    const key = (at) => Math.floor(at / run) * 2 * width + (Math.floor((at % run) / chunk) % 2) * width + at;
    const order = Array.from({ length: width }, (_, at) => at).sort((x, y) => key(x) - key(y));
    const back = order.map((_, at) => order.indexOf(at));
    const rotations = Array.from({ length: n }, (_, j) => {
      const R = part(part(t.R, i), j);
      return cayley(scale(subtract(R, transposed(R)), 0.5));
    });
    X = pick(turnRows(pick(X, back), rotations), order); // M_i = P_i C P_i^T, applied to the inputs
  }
  return perOutput(reshape(transposed(X), W.shape), (value, o) => value * t.s.data[o]);
}

function fourierft(W, t, a) {
  const [outputs, inputs] = W.shape;
  const count = t.spectrum.shape[0];
  const D = map(array(W.shape), (_, at) => {
    const [o, i] = [Math.floor(at / inputs), at % inputs];
    let sum = 0;
    for (let n = 0; n < count; n++) {
      // The angle is reduced before the cosine: products of whole numbers are exact.
      const turns = ((t.index.data[n] * o) % outputs) / outputs + ((t.index.data[count + n] * i) % inputs) / inputs;
      sum += t.spectrum.data[n] * Math.cos(2 * Math.PI * turns);
    }
    return sum;
  });
  return plus(W, D, a.scaling / (outputs * inputs));
}

// The 32-bit word number n mod 4 of Philox4x32-10, as a number in [-1, 1).
function uniform(seed, stream, i, n) {
  const wide = (x, y) => BigInt(x) * BigInt(y);
  let [a, b, c, d] = [Math.floor(n / 4) >>> 0, i >>> 0, stream >>> 0, 0];
  const unsigned = BigInt.asUintN(64, seed);
  let [k, m] = [Number(unsigned & 0xffffffffn), Number(unsigned >> 32n)];
  for (let round = 0; round < 10; round++) {
    const [one, other] = [wide(0xd2511f53, a), wide(0xcd9e8d57, c)];
    const [hi, lo] = [(p) => Number(p >> 32n), (p) => Number(p & 0xffffffffn)];
    [a, b, c, d] = [(hi(other) ^ b ^ k) >>> 0, lo(other), (hi(one) ^ d ^ m) >>> 0, lo(one)];
    k = (k + 0x9e3779b9) >>> 0;
    m = (m + 0xbb67ae85) >>> 0;
  }
  return [a, b, c, d][n % 4] / 2 ** 31 - 1;
}

function nola(W, t, a) {
  const columns = product(W.shape.slice(1));
  const mixed = (coefficients, bases, start, shape, random) => {
    const out = array(shape, start ? start.data.slice() : undefined);
    const root = Math.sqrt(Math.max(coefficients.shape[0], 1));
    coefficients.data.forEach((coefficient, i) => {
      for (let at = 0; at < out.data.length; at++) {
        const number = bases ? bases.data[i * out.data.length + at] : random(i, at);
        out.data[at] += (coefficient * number) / root;
      }
    });
    return out;
  };
  const r = t.seeds ? t.seeds.shape[0] : t.B_bases.shape[2];
  const A = mixed(t.alpha, t.A_bases, t.A0, [r, columns], (i, at) => uniform(t.seeds.whole[Math.floor(at / columns)], 0, i, at % columns));
  const B = mixed(t.beta, t.B_bases, t.B0, [W.shape[0], r], (i, at) => uniform(t.seeds.whole[at % r], 1, i, Math.floor(at / r)));
  return plus(W, matmul(B, A), a.scaling);
}

function vera(W, t) {
  const [outs, ins] = W.shape;
  const r = t.d.shape[0];
  const A = array([r, ins]);
  for (let p = 0; p < r; p++) for (let i = 0; i < ins; i++) A.data[p * ins + i] = t.d.data[p] * t.A.data[p * t.A.shape[1] + i];
  return plus(W, perOutput(matmul(slice(t.B, 0, outs), A), (value, o) => value * t.b.data[o]));
}

function dora(W, t, a) {
  const V = plus(W, lowRank(t.B, t.A), a.scaling);
  const inner = V.data.length / V.shape[0];
  const norms = Array.from({ length: V.shape[0] }, (_, o) => Math.hypot(...V.data.subarray(o * inner, o * inner + inner)));
  return perOutput(V, (value, o) => (t.magnitude.data[o] * value) / norms[o]);
}

function ia3(W, t) {
  if (t.l) return perOutput(W, (value, o) => value * t.l.data[o]);
  const kernel = product(W.shape.slice(2));
  return array(W.shape, W.data.map((value, i) => value * t.l_in.data[Math.floor(i / kernel) % W.shape[1]]));
}

function rows(W, t) {
  const inner = product(W.shape.slice(2));
  const places = new Map([...t.index.data].map((token, j) => [token, j]));
  return map(W, (value, at) => {
    const [o, token] = [Math.floor(at / inner / W.shape[1]), Math.floor(at / inner) % W.shape[1]];
    return places.has(token) ? t.values.data[places.get(token) * W.shape[0] + o] : value;
  });
}

const biasPlus = (field) => (b, t, a) => (t[field] ? plus(b, t[field], a.scaling) : b);

export const FORMULAS = {
  boft: { weight: boft },
  dense: { weight: (W, t, a) => (t.D ? plus(W, t.D, a.scaling) : W), bias: biasPlus("d") },
  dora: { weight: dora },
  fourierft: { weight: fourierft },
  ia3: { weight: ia3, bias: (b, t) => (t.l ? multiply(b, t.l) : b) },
  loha: { weight: loha },
  lokr: { weight: lokr },
  lora: { weight: (W, t, a) => plus(W, lowRank(t.B, t.A), a.scaling), bias: biasPlus("bias") },
  nola: { weight: nola },
  oft: {
    weight: oft,
    bias: (b, t, a) => (a.on_output ? reshape(oft(reshape(b, [b.shape[0], 1]), t, a), b.shape) : b),
  },
  replacement: { weight: (W, t) => (t.weight ? reshape(t.weight, W.shape) : W), bias: (b, t) => t.bias ?? b },
  rows: { weight: rows },
  vera: { weight: vera },
  bottleneck: { output: bottleneck },
};

// ---- Weights as formulas see them (README, section 8), and merging.

export const numeric = ({ shape, numbers, dtype }) => ({ ...array(shape, numbers()), dtype });

// Where the axes of inputs and outputs are stored the other way; a weight of one axis, or [e, out], has no inputs.
const turnedAt = (shape, layout) => ["in out *k", "e in out *k"].findIndex((each, at) => each === layout && shape.length >= at + 2);
const viewedShape = (shape, layout, at = turnedAt(shape, layout)) => (at < 0 ? shape : shape.toSpliced(at, 2, shape[at + 1], shape[at]));
// Stored to [out, in, *k] or [e, out, in, *k], and back.
export const viewed = (W, layout, at = turnedAt(W.shape, layout)) => (at < 0 ? W : swapped(W, at));

export function fieldsOf({ tensors, attributes }, expert) {
  const t = {};
  for (const [name, tensor] of tensors) {
    const all = numeric(tensor);
    t[name] = expert === undefined ? all : part(all, expert);
    const step = t[name].data.length;
    // Seeds have 64 bits, more than a Number holds.
    if (DTYPES.get(tensor.dtype).whole) t[name].whole = tensor.integers().slice((expert ?? 0) * step, ((expert ?? 0) + 1) * step);
  }
  const a = Object.fromEntries([...attributes].map(([name, value]) => [name, typeof value === "bigint" ? Number(value) : value]));
  return { t, a };
}

function applied(updates, W, b, rows, expert) {
  const [start, stop] = rows ? rows.map(Number) : [0, (W ?? b).shape[0]];
  let [own, ownBias] = [W && slice(W, start, stop), b && slice(b, start, stop)];
  for (const update of updates) {
    const formula = FORMULAS[update.method.name];
    const { t, a } = fieldsOf(update, expert);
    if (ownBias && formula.bias) ownBias = formula.bias(ownBias, t, a, own);
    if (own) own = formula.weight(own, t, a);
  }
  const put = (whole, piece) => {
    const from = start * product(whole.shape.slice(1));
    return map(whole, (value, at) => piece.data[at - from] ?? value);
  };
  return [W && put(W, own), b && put(b, ownBias)];
}

const withoutOnes = (kernel) => kernel.slice(0, kernel.findLastIndex((size) => size !== 1n) + 1);
const big = (size) => (Array.isArray(size) ? size.map(BigInt) : BigInt(size));
const same = (a, b) => canonical(a) === canonical(b);

// Whether the weight, and whether the bias of a target changes (README, R-10.6).
export const changesOf = ({ target, updates }) => {
  const holds = (update, text) => evaluateRule(text, { update, dims: update.dims, stacked: target.stacked });
  updates = updates.filter(({ method }) => method.kind !== "output");
  return [["changes_weight", "1"], ["changes_bias", "0"]].map(([field, or]) => updates.some((u) => holds(u, u.method[field] ?? or)));
};

// Refuses updates that the stored weight and bias do not fit, in the order of README, R-13.2, step 6.
export function checkFit({ target, updates }, weight, bias) {
  if (!weight && !bias) throw new AdapterError("TargetNotFound", target.name, "not in the base");
  const [lead, axes] = [Number(target.stacked), weight && viewedShape(weight.shape, target.layout)];
  const [start, stop] = (target.rows ?? [0, axes?.[lead] ?? bias?.shape.at(-1)]).map(Number);
  const [out, rest] = [stop - start, axes?.slice(lead + 1) ?? []];
  const unfit = (test, why) => {
    if (test) throw mismatch("", why);
  };
  for (const update of updates) {
    const [{ method, dims, tensors }, [changesWeight, changesBias]] = [update, changesOf({ target, updates: [update] })];
    within(target, update, () => {
      if (!weight && changesWeight) throw new AdapterError("TargetNotFound", "", "the base has no weight there");
      const kernel = dims.has("in") ? { k: big(rest.slice(1)) } : {};
      const sizes = { ...(lead && axes && { e: axes[0] }), out, in: rest[0] ?? -1, columns: product(rest), rest, ...kernel };
      const trimmed = (axis, size) => (axis === "k" ? withoutOnes(size) : big(size));
      const other = ([axis, size]) => dims.has(axis) && !same(trimmed(axis, dims.get(axis)), trimmed(axis, size));
      unfit(weight && (axes.length <= lead || stop > axes[lead] || Object.entries(sizes).some(other)), "not made for the base's weight");
      unfit(weight && method.axes && method.axes.split(" ").length !== rest.length + 1, `only for weights [${method.axes}]`);
      if (changesBias && !bias && method.needs_bias) throw new AdapterError("NotMergeable", "", "the base has no bias");
      const [last, ...before] = bias ? big(bias.shape).toReversed() : [];
      const room = target.rows ? last >= stop : [dims.get("out"), weight && big(out)].every((n) => last === (n ?? last));
      unfit(changesBias && bias && !(room && same(before, lead ? [dims.get("e")] : [])), "not made for the base's bias");
      if (!weight) return;
      const bounds = new Map([...dims, ["out", big(out)], ["in", big(rest[0] ?? 0)], ["columns", big(product(rest))], ["kernel", BigInt(Math.max(rest.length - 1, 0))]]);
      const holds = (text) => evaluateRule(text, { update, dims: bounds, stacked: target.stacked });
      unfit((method.fits ?? []).some((fit) => (!fit.when || holds(fit.when)) && !holds(fit.require)), "its parts do not fill the weight");
      for (const field of method.tensors.filter(({ name, below }) => below && tensors.has(name))) {
        const parts = rowsOf(field, tensors.get(field.name)).map((part, row) => [part, sizeOf(field.below[row], bounds)]);
        unfit(parts.some(([part, bound]) => part.some((n) => n < 0n || n >= (bound ?? n + 1n))), "a position outside of the weight");
      }
    });
  }
}

// W' and b' as they are stored, for a target whose methods all change weights; a part that is absent stays so.
export function mergeTarget(entry, weight, bias) {
  const { target, updates } = entry;
  checkFit(entry, weight, bias);
  const W = weight && viewed(weight, target.layout);
  if (!target.stacked) {
    const [newW, newB] = applied(updates, W, bias, target.rows);
    return { weight: newW && viewed(newW, target.layout), bias: newB };
  }
  const pairs = Array.from({ length: (W ?? bias).shape[0] }, (_, e) => applied(updates, W && part(W, e), bias && part(bias, e), target.rows, e));
  return { weight: W && viewed(stack(pairs.map(([w]) => w)), target.layout), bias: bias && stack(pairs.map(([, b]) => b)) };
}

const ERF = (x) => {
  // erf by its series for small x and by the continued fraction of erfc for large x: both to the last digits.
  const z = Math.abs(x);
  if (z < 2.5) {
    let [term, sum] = [z, z];
    for (let n = 1; n < 80; n++) {
      term *= (-z * z) / n;
      sum += term / (2 * n + 1);
    }
    return (Math.sign(x) * 2 * sum) / Math.sqrt(Math.PI);
  }
  let tail = 0;
  for (let n = 120; n > 0; n--) tail = n / 2 / (z + tail);
  return Math.sign(x) * (1 - Math.exp(-z * z) / Math.sqrt(Math.PI) / (z + tail));
};
const gelu = (x) => (x * (1 + ERF(x / Math.SQRT2))) / 2;
const geluTanh = (x) => (x * (1 + Math.tanh(Math.sqrt(2 / Math.PI) * (x + 0.044715 * x ** 3)))) / 2;
const leaky = (x) => (x < 0 ? x / 100 : x);
export const sigmoid = (x) => 1 / (1 + Math.exp(-x));
const silu = (x) => x * sigmoid(x);
const softplus = (x) => Math.max(x, 0) + Math.log1p(Math.exp(-Math.abs(x)));
const clamp = (x, low, high) => Math.min(Math.max(x, low), high);
export const ACTIVATIONS = {
  linear: (x) => x, relu: (x) => Math.max(x, 0), relu2: (x) => Math.max(x, 0) ** 2, relu6: (x) => clamp(x, 0, 6),
  leaky_relu: leaky, leakyrelu: leaky, elu: (x) => (x < 0 ? Math.expm1(x) : x), sigmoid, tanh: Math.tanh, softplus,
  silu, swish: silu, quick_gelu: (x) => x * sigmoid(1.702 * x), mish: (x) => x * Math.tanh(softplus(x)),
  gelu, gelu_python: gelu, gelu_10: (x) => clamp(gelu(x), -10, 10), gelu_tanh: geluTanh, gelu_new: geluTanh,
  gelu_fast: geluTanh, gelu_accurate: geluTanh, gelu_python_tanh: geluTanh, gelu_pytorch_tanh: geluTanh,
  laplace: (x) => (1 + ERF((x - 0.707107) / (0.282095 * Math.SQRT2))) / 2,
};

// Bottleneck adapters, computed over [rows, places, channels]. `beside`: the residual, and the weight and bias of the norm
// after it, where there are any. `inside`: what comes before them, which another update behind this one reads.
function bottleneck(x, layer, t, a, beside, inside) {
  const places = (h) => {
    const [n, ...rest] = h.shape;
    if (beside.convolves) return swapped(reshape(h, [n, rest[0], product(rest.slice(1))]), 1); // an image
    return reshape(h, [n, product(rest.slice(0, -1)), rest.at(-1)]);
  };
  const output = (layer.inside ?? layer)(x);
  const [hidden, added] = [places(output), beside.added && places(beside.added)];
  const mix = (h, w, b) => {
    const y = matmul(reshape(h, [h.shape[0] * h.shape[1], h.shape[2]]), transposed(w));
    return array([h.shape[0], h.shape[1], w.shape[0]], y.data.map((value, i) => value + (b ? b.data[i % w.shape[0]] : 0)));
  };
  const normed = (h, gain, shift) => {
    const [y, channels] = [array(h.shape), h.shape[2]];
    for (let at = 0; at < h.data.length; at += channels) {
      const own = h.data.subarray(at, at + channels);
      const mean = own.reduce((sum, value) => sum + value / channels, 0);
      const root = Math.sqrt(own.reduce((sum, value) => sum + (value - mean) ** 2 / channels, 0) + 1e-5);
      own.forEach((value, c) => (y.data[at + c] = ((value - mean) / root) * gain.data[c] + (shift ? shift.data[c] : 0)));
    }
    return y;
  };
  const total = (h) => (added ? add(h, added) : h);
  const closed = (h) => (beside.norm_weight ? normed(total(h), beside.norm_weight, beside.norm_bias) : total(h));
  const adapted = (h) => {
    const read = t.norm_before ? normed(h, t.norm_before, t.norm_before_bias) : h;
    const change = mix(map(mix(read, t.down, t.down_bias), ACTIVATIONS[a.non_linearity]), t.up, t.up_bias);
    const [rows, count, channels] = change.shape;
    const gates = t.gate && map(mix(h, t.gate, t.gate_bias), sigmoid).data; // [rows, places, 1]
    const shares = Array.from({ length: rows }, (_, n) => gates?.subarray(n * count, (n + 1) * count).reduce((sum, gate) => sum + gate / count, 0) ?? 1);
    const factor = (i) => (t.channel_scaling?.data[i % channels] ?? 1) * shares[Math.floor(i / channels / count)];
    return map(change, (value, i) => value * a.scaling * (t.scaling_factor?.data[0] ?? 1) * factor(i));
  };
  const after = (h) => (t.norm_after ? normed(h, t.norm_after, t.norm_after_bias) : h);
  let new_;
  if (a.parallel) new_ = add(hidden, after(adapted(added ?? places(x))));
  else {
    const read = a.original_ln_before ? closed(hidden) : hidden;
    const skip = { true: hidden, false: read, post_add: a.original_ln_before ? total(hidden) : hidden }[a.residual_before_ln];
    new_ = a.adapter_residual_before_ln ? after(add(adapted(read), skip)) : add(after(adapted(read)), skip);
  }
  if (a.original_ln_after && !inside) new_ = closed(new_);
  return reshape(beside.convolves ? swapped(new_, 1) : new_, output.shape);
}

// ---- Base folders (README, section 12). `files`: the names of the folder's files; `read(name)`: the bytes of one.

const SINGLE = "model.safetensors";
const INDEX = "model.safetensors.index.json";

export function readBase(files, read) {
  const usage = (why) => new AdapterError("UsageError", "", why);
  let [names, index] = [[], undefined];
  if (files.includes(INDEX)) {
    if (files.includes(SINGLE)) throw usage(`both ${SINGLE} and ${INDEX}`);
    index = indexOf(read(INDEX));
    names = [...new Set(index.values())].sort(byCodePoint);
    names.forEach(checkShardName);
    for (const name of names) if (!files.includes(name)) throw malformed("weight_map", `${name} is not there`);
  } else if (files.includes(SINGLE)) names = [SINGLE];
  else {
    names = files.filter((name) => name.endsWith(".safetensors") && !name.includes("/"));
    if (names.length !== 1) throw usage(`${names.length} safetensors files and no ${INDEX}`);
  }
  const [tensors, home] = [new Map(), new Map()];
  for (const name of names) {
    for (const [key, tensor] of readSafetensors(read(name)).tensors) {
      if (tensors.has(key)) throw malformed(key, `in ${home.get(key)} and in ${name}`);
      tensors.set(key, tensor);
      home.set(key, name);
    }
  }
  for (const [key, name] of index ?? []) if (home.get(key) !== name) throw malformed(key, `the index says ${name}`);
  for (const key of index ? home.keys() : []) if (!index.has(key)) throw malformed(key, "the index does not list it");
  return { tensors, config: files.includes("config.json") ? jsonFile(read("config.json"), true) : undefined };
}

function jsonFile(bytes, lenient) {
  try {
    const value = parseJSON(new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(bytes), lenient);
    if (isObject(value)) return value;
  } catch (error) {
    throw malformed("", error.message);
  }
  throw malformed("", "not a JSON object");
}

function indexOf(bytes) {
  const index = jsonFile(bytes);
  const names = index.get("weight_map");
  if (!isTexts(names) || !names.size) throw malformed("weight_map", "no object of file names");
  if (![undefined, null].includes(index.get("metadata")) && !isObject(index.get("metadata"))) throw malformed("metadata", "not an object");
  return names;
}

function checkShardName(name) {
  const bytes = (text) => new TextEncoder().encode(text).length;
  const strange = /[\\\0:]/.test(name) || name.split("/").some((part) => ["", ".", ".."].includes(part) || bytes(part) > 255);
  if (strange) throw malformed(name, "not the plain name of a file inside the folder");
}
