// Merges with the reader beside it: computed in 64 bits, and each element rounded once to the stored type (README, R-10.4).

import "./formulas.mjs";
import { AdapterError, DTYPES, FORMULAS, SMALL, changesOf, checkFit, mergeTarget, numeric, smallFloat } from "./adapterkit.mjs";

// The bits of a number in a small type, to nearest, ties to even; undefined beyond the largest. Bits count units in the
// last place: after the last unit of one exponent comes the first of the next.
function smallBits(value, exponentBits, mantissaBits, bias, special) {
  const size = Math.abs(value);
  const lowest = 1 - bias;
  let exponent = Math.max(Math.floor(Math.log2(size)), lowest);
  if (2 ** exponent > size && exponent > lowest) exponent--; // the logarithm is rounded
  if (!Number.isFinite(value)) return undefined;
  const units = size / 2 ** (exponent - mantissaBits);
  const down = Math.floor(units);
  const up = units - down > 0.5 || (units - down === 0.5 && down % 2 === 1);
  const bits = (exponent - lowest) * 2 ** mantissaBits + down + (up ? 1 : 0);
  const sign = 2 ** (mantissaBits + exponentBits);
  if (bits >= sign || !Number.isFinite(smallFloat(bits, exponentBits, mantissaBits, bias, special))) return undefined;
  return value > 0 || Object.is(value, 0) || (special === "fnuz" && bits === 0) ? bits : sign + bits;
}

// The bytes of 64-bit numbers in an element type; `name` is the tensor's, for errors.
function rounded(data, dtype, name) {
  const { size } = DTYPES.get(dtype);
  const view = new DataView(new ArrayBuffer(data.length * size));
  data.forEach((value, i) => {
    let fits = true;
    if (SMALL[dtype]) {
      const [width, ...how] = SMALL[dtype];
      const bits = smallBits(value, ...how);
      fits = bits !== undefined;
      view[`setUint${width}`](i * size, bits ?? 0, true);
    } else {
      view[`setFloat${8 * size}`](i * size, value, true);
      fits = Number.isFinite(DTYPES.get(dtype).get(view, i * size));
    }
    if (!fits) throw new AdapterError("Malformed", name, `${value} is not a number of ${dtype}`);
  });
  return new Uint8Array(view.buffer);
}

// The names of a target's weight and bias in a base, where it has them (README, section 7).
export function namesOf(path, base) {
  const own = ["weight", "bias"].map((leaf) => `${path}.${leaf}`);
  if (own.some((name) => base.has(name))) return own.map((name) => (base.has(name) ? name : undefined));
  const at = path.lastIndexOf("weight");
  const bias = `${path.slice(0, Math.max(at, 0))}bias${path.slice(at + 6)}`;
  return [base.has(path) ? path : undefined, at >= 0 && base.has(path) && base.has(bias) ? bias : undefined];
}

export const canMerge = (dtype) => Boolean(SMALL[dtype]) || dtype === "F32" || dtype === "F64";

// The names of the tensors that change, in the order in which targets change them first; their types must be real.
function checkTypes(targets, base, names) {
  const changed = targets.flatMap((entry) => names(entry).filter((name, i) => base.has(name) && changesOf(entry)[i]));
  for (const name of changed) {
    const { dtype } = base.get(name);
    if (!canMerge(dtype)) throw new AdapterError("Unsupported", name, `no merges into ${dtype}`);
  }
  return new Set(changed);
}

// Name -> {dtype, shape, bytes}: all tensors of a base, merged where the adapter says. Faults in the order of.
export function merge(adapter, base) {
  const all = (test) => adapter.targets.forEach((entry) => test(entry, entry.target.name, namesOf(entry.target.path, base)));
  all(({ updates }, name) => {
    const kept = updates.find(({ method }) => method.kind === "output" || method.kind === "context");
    if (kept) throw new AdapterError("NotMergeable", name, `${kept.method.name} is not of weights`);
  });
  all((entry, name, names) => {
    if (names.every((each) => each === undefined)) throw new AdapterError("TargetNotFound", name, "not in the base");
  });
  all((entry, name, names) => checkFit(entry, ...names.map((each) => base.get(each))));
  const changed = checkTypes(adapter.targets, base, ({ target }) => namesOf(target.path, base));
  adapter.checkValues();
  all(({ updates }, name) => {
    const missing = updates.find(({ method }) => !FORMULAS[method.name]);
    if (missing) throw new AdapterError("Unsupported", name, `cannot merge ${missing.method.name}`);
  });
  const exact = new Map();
  all((entry, _, names) => {
    const { weight, bias } = mergeTarget(entry, ...names.map((name) => exact.get(name) ?? (base.has(name) ? numeric(base.get(name)) : undefined)));
    [weight, bias].forEach((tensor, i) => tensor && exact.set(names[i], tensor));
  });
  const written = [...base.keys()].filter((name) => changed.has(name)).map((name) => {
    const [{ shape, data }, { dtype }] = [exact.get(name), base.get(name)];
    return [name, { dtype, shape, bytes: rounded(data, dtype, name) }];
  });
  return new Map([...base, ...written]);
}
