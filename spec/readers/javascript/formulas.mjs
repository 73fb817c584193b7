// Formulas of the methods that adapterkit.mjs has none of, from the text of spec/methods. Import this module for its
// effect: it adds them to FORMULAS, where merge.mjs and run.mjs look formulas up. Without it the reader still reads all.
//
// An entry has, by the kind of its method:
//     weight(W [out, in, *k], t: tensors, a: attributes) -> W', and bias(b, t, a, W) -> b' where the bias changes
//     output(x, layer, t, a, beside) -> y'; beside: {call: name -> array, W, bias, convolves, kernel}
//     context(t, a, given) -> name -> array; given: {update, x} or {q, k, v}
// `call` names what an output formula reads of the model's call, `given` what a context reads of the base.

import * as ak from "./adapterkit.mjs";

const { ACTIVATIONS, AdapterError, FORMULAS, add, array, flatten, identity, inverse, map, matmul, multiply, part, perOutput } = ak;
const { cayley, kron, lowRank, plus, product, reshape, scale, series, sigmoid, skew, slice, subtract, swapped } = ak;
const { transposed, turnRows } = ak;

const unsupported = (why) => new AdapterError("Unsupported", "", why);
const range = (n) => Array.from({ length: n }, (_, i) => i);
const norm = (values) => Math.sqrt(values.reduce((sum, value) => sum + value * value, 0));
const rowOf = (a, i) => part(a, i).data;
const stack = (all, shape) => (all.length ? ak.stack(all) : array([0, ...shape]));
const parts = (a) => range(a.shape[0]).map((i) => part(a, i));
const perColumn = (a, factors) => map(a, (value, i) => value * factors[i % factors.length]);
const perRow = (a, factors) => perOutput(a, (value, row) => value * factors[row]);
const lines = (a) => reshape(a, [product(a.shape.slice(0, -1)), a.shape.at(-1)]); // all axes but the last as one
const sum = (arrays, shape) => arrays.reduce(add, array(shape));
const products = (W, t, a, ...factors) => plus(W, factors.reduce(matmul), a.scaling ?? 1);
const column = (v) => reshape(v, [v.data.length, 1]);

// An array by its shape, from a function of the place on each axis.
function filled(shape, f) {
  const steps = shape.map((_, axis) => product(shape.slice(axis + 1)));
  return map(array(shape), (_, at) => f(...shape.map((size, axis) => Math.floor(at / steps[axis]) % size)));
}

function softmax(values) {
  const most = values.reduce((one, other) => Math.max(one, other), -Infinity);
  const powers = values.map((value) => Math.exp(value - most));
  const total = powers.reduce((one, other) => one + other, 0);
  return powers.map((power) => power / total);
}

// Places of the k largest, equal ones in the order of their positions.
const largest = (values, k) => range(values.length).sort((i, j) => values[j] - values[i] || i - j).slice(0, k);

// x @ M^T + b over the last axis.
function linear(x, M, b) {
  const y = matmul(lines(x), transposed(M));
  if (b) y.data.forEach((_, i) => (y.data[i] += b.data[i % M.shape[0]]));
  return reshape(y, [...x.shape.slice(0, -1), M.shape[0]]);
}

const rectified = (x, M, b) => map(linear(x, M, b), ACTIVATIONS.relu);

// ---- Factorizations.

// Singular values of M [m, n], largest first, with their vectors: [{value, left, right}], by one-sided Jacobi rotations.
// One of the vectors is as long as the value: their products add up to M.
function singular(M) {
  if (M.shape[0] < M.shape[1]) return singular(transposed(M)).map(({ value, left, right }) => ({ value, left: right, right: left }));
  const [m, n] = M.shape;
  const columns = parts(reshape(transposed(M), [n, m])).map(({ data }) => data);
  const turned = parts(identity(n)).map(({ data }) => data);
  const dot = (one, other) => one.reduce((total, value, i) => total + value * other[i], 0);
  const turn = (one, other, c, s) => one.forEach((value, i) => ([one[i], other[i]] = [c * value - s * other[i], s * value + c * other[i]]));
  for (let sweep = 0, off = 1; sweep < 60 && off > 1e-16; sweep++) {
    off = 0;
    for (let p = 0; p < n; p++) {
      for (let q = p + 1; q < n; q++) {
        const [alpha, beta, gamma] = [dot(columns[p], columns[p]), dot(columns[q], columns[q]), dot(columns[p], columns[q])];
        const share = Math.abs(gamma) / Math.sqrt(alpha * beta);
        if (gamma === 0 || share <= 1e-17) continue;
        off = Math.max(off, share);
        const zeta = (beta - alpha) / (2 * gamma);
        const tangent = (zeta >= 0 ? 1 : -1) / (Math.abs(zeta) + Math.sqrt(1 + zeta * zeta));
        const cosine = 1 / Math.sqrt(1 + tangent * tangent);
        turn(columns[p], columns[q], cosine, cosine * tangent);
        turn(turned[p], turned[q], cosine, cosine * tangent);
      }
    }
  }
  const all = columns.map((left, i) => ({ value: norm(left), left, right: turned[i] }));
  return all.sort((one, other) => other.value - one.value);
}

// The sum of left * right^T, each times `factor` of its value.
function composed(shape, triples, factor = () => 1) {
  const out = array(shape);
  for (const { value, left, right } of triples) {
    const f = factor(value);
    left.forEach((one, i) => right.forEach((other, j) => (out.data[i * shape[1] + j] += one * other * f)));
  }
  return out;
}

// Vectors made orthonormal in their order, by Gram and Schmidt, each twice for the last digits.
function orthonormal(vectors) {
  const basis = [];
  for (const vector of vectors) {
    const own = Float64Array.from(vector);
    for (const q of [...basis, ...basis]) {
      const along = q.reduce((total, value, i) => total + value * own[i], 0);
      q.forEach((value, i) => (own[i] -= along * value));
    }
    const length = norm(own);
    basis.push(own.map((value) => value / length));
  }
  return basis;
}

// The factor Q of P = Q R by Householder's reflections; a column that is zero below its diagonal has none.
function householder(P) {
  const [n, r] = P.shape;
  const columns = parts(transposed(P)).map(({ data }) => data);
  const reflect = (v, targets) => {
    const square = v.reduce((total, value) => total + value * value, 0);
    for (const target of targets) {
      const along = (2 * v.reduce((total, value, i) => total + value * target[i], 0)) / square;
      v.forEach((value, i) => (target[i] -= along * value));
    }
  };
  const reflections = columns.map((own, j) => {
    if (!own.subarray(j + 1).some((value) => value !== 0)) return undefined;
    const v = own.map((value, i) => (i < j ? 0 : value));
    v[j] += (v[j] < 0 ? -1 : 1) * norm(v);
    reflect(v, columns.slice(j));
    own.fill(0, j + 1);
    return v;
  });
  const Q = range(r).map((j) => Float64Array.from(range(n), (i) => Number(i === j)));
  for (const v of reflections.toReversed()) if (v) reflect(v, Q);
  return transposed(stack(Q.map((own) => array([n], own)), [n]));
}

// ---- Formulas of the weight.

const skewed = (square) => subtract(transposed(square), square);
const limited = (blocks, limit) => {
  const length = norm(blocks.flatMap(({ data }) => [...data]));
  return limit > 0 && length + 1e-8 > limit ? blocks.map((block) => scale(block, limit / (length + 1e-8))) : blocks;
};

function adamss(t) {
  const rows = range(t.B.shape[0]).map((o) => matmul(reshape(part(t.B, o), [1, t.B.shape[1]]), part(t.A, t.group.data[o])));
  return reshape(stack(rows, [1, t.A.shape[2]]), [rows.length, t.A.shape[2]]);
}

function bdlora(W, t, a) {
  const blocks = t.A_blocks ?? t.B_blocks;
  const [n, p, q] = blocks.shape;
  const whole = array([n * p, n * q]); // blockdiag(blocks)
  blocks.data.forEach((value, at) => (whole.data[Math.floor(at / q) * n * q + Math.floor(at / q / p) * q + (at % q)] = value));
  return t.A_blocks ? products(W, t, a, t.B, whole) : products(W, t, a, whole, flatten(t.A));
}

// Butterflies on the outputs: in each of m steps the halves of runs of b * 2^i are interleaved, turned, and put back.
function butterflies(M, t, a) {
  const [m, n, b] = t.square.shape;
  const width = n * b;
  const Q = limited(parts(reshape(t.square, [m * n, b, b])).map(skewed), a.constraint);
  let X = M;
  for (let i = 0; i < m; i++) {
    const run = b * 2 ** i;
    const from = range(width).map((at) => at - (at % run) + ((at % 2) * run) / 2 + Math.floor((at % run) / 2));
    const turned = turnRows(stack(from.map((place) => part(X, place)), [X.shape[1]]), Q.slice(i * n, i * n + n).map(cayley));
    const out = array(X.shape);
    from.forEach((place, at) => out.data.set(rowOf(turned, at), place * X.shape[1]));
    X = out;
  }
  return t.rescale ? perRow(X, t.rescale.data) : X;
}

function deft(W, t, a) {
  const Q = a.orthogonal ? householder(t.P) : t.P;
  const right = a.orthogonal ? Q : map(Q, (value) => Math.max(value, 0));
  const rest = subtract(W, matmul(Q, matmul(transposed(right), W)));
  return t.R ? plus(rest, matmul(Q, t.R), a.scaling) : rest;
}

function delora(W, t) {
  const r = t.B.shape[1];
  if (!r) return W;
  const A = perColumn(t.A, t.w_norm.data);
  const length = (values) => Math.max(norm(values), 1e-4);
  const lengths = range(r).map((k) => length(rowOf(t.A, k)) * length(rowOf(transposed(t.B), k)));
  return plus(W, matmul(t.B, perRow(A, lengths.map((each) => 1 / each))), t.strength.data[0] / r);
}

// The factor of each row: its magnitude over the norm of W + B @ A, without the scaling; or the factors themselves.
function doraFactors(W, t) {
  if (t.factors) return t.factors.data;
  const V = flatten(plus(W, lowRank(t.B, t.A)));
  return t.magnitude.data.map((value, o) => value / norm(rowOf(V, o)));
}

function pseudoinverse(M) {
  const full = (A) => range(A.shape[0]).filter((i) => rowOf(A, i).some((value) => value !== 0));
  const [rows, columns] = [full(M), full(transposed(M))];
  const inner = filled([rows.length, columns.length], (i, j) => M.data[rows[i] * M.shape[1] + columns[j]]);
  const square = rows.length === columns.length;
  const inverted = square ? inverse(inner) : transposed(composed(inner.shape, singular(inner).slice(0, Math.min(...inner.shape)), (s) => 1 / s ** 2));
  const out = array(M.shape.toReversed());
  columns.forEach((j, at) => rows.forEach((i, k) => (out.data[j * M.shape[0] + i] = inverted.data[at * rows.length + k])));
  return out;
}

function frod(W, t) {
  const n = W.shape[1];
  const VT = transposed(t.V);
  const G = transposed(matmul(W, pseudoinverse(VT)));
  const lengths = range(n).map((i) => norm(rowOf(G, i)));
  const U = transposed(perOutput(G, (value, i) => (lengths[i] <= 1e-12 ? 0 : value / lengths[i])));
  const S = filled([n, n], (i, j) => (i === j ? t.l.data[i] : 0));
  t.values.data.forEach((value, j) => (S.data[t.index.data[j] * n + t.index.data[t.values.data.length + j]] += value));
  return [U, S, VT].reduce(matmul);
}

// One of GLoRA's supports, in whichever form it has: a function of row and place.
function support(t, name) {
  if (t[`${name}_d`]) {
    const M = matmul(t[`${name}_d`], t[`${name}_u`]);
    return (_, at) => M.data[at];
  }
  return (o) => (t[name] ? t[name].data[o] : (t[`${name}_c`]?.data[0] ?? 0));
}

function glora(W, t) {
  const [A, B] = [support(t, "A"), support(t, "B")];
  return map(W, (value, at) => value + value * A(Math.floor(at / W.shape[1]), at) + B(Math.floor(at / W.shape[1]), at));
}

function gloraBias(b, t, a, W) {
  const C = t.C ?? (t.C_d && matmul(t.C_d, t.C_u));
  if (C && !W) throw unsupported("no weight to multiply by");
  const moved = C && matmul(W, column(C));
  const [D, E] = [support(t, "D"), support(t, "E")];
  return map(b, (value, o) => value + value * D(o) + E(o) + (moved?.data[o] ?? 0));
}

function gloraProducts(W, t, a) {
  const [outs, ins, ...kernel] = W.shape;
  const turned = matmul(t.A1, flatten(t.A2)); // [in, in], between the inputs of W and those of the change
  const moved = swapped(reshape(W, [outs, ins, product(kernel)]), 1);
  const change = swapped(reshape(matmul(lines(moved), turned), moved.shape), 1);
  return plus(W, add(flatten(change), lowRank(t.B1, t.B2)), a.scaling);
}

// Block (j, n) of the change is the product of the n-th slice of A and the j-th of B, by the ranks that the two share.
function gralora(W, t, a) {
  const [g, width, ranks] = t.A.shape;
  const [q, height] = [ranks / g, t.B.shape[2]];
  const D = filled(W.shape, (o, i) => {
    const [j, n] = [Math.floor(o / height), Math.floor(i / width)];
    let total = 0;
    for (let k = 0; k < q; k++) {
      total += t.A.data[(n * width + (i % width)) * ranks + j * q + k] * t.B.data[(j * ranks + n * q + k) * height + (o % height)];
    }
    return total;
  });
  return plus(W, t.A_whole ? add(D, matmul(t.B_whole, t.A_whole)) : D, a.scaling);
}

// Reflections of the rows of W at the columns of u, one behind the other.
function hra(W, t, a) {
  const columns = parts(transposed(t.u)).map(({ data }) => data);
  const vectors = a.gram_schmidt ? orthonormal(columns) : columns;
  return vectors.reduce((M, v) => {
    const square = a.gram_schmidt && !v.some(Number.isNaN) ? 1 : v.reduce((total, value) => total + value * value, 0);
    const along = matmul(flatten(M), column(array([v.length], v)));
    return map(M, (value, at) => value - ((2 * along.data[Math.floor(at / v.length)]) / square) * v[at % v.length]);
  }, W);
}

// W without its r smallest singular values, plus the trained product.
function kasa(W, t, a) {
  const r = t.diag.shape[0];
  const kept = r ? composed(W.shape, singular(W).slice(0, Math.min(...W.shape) - r)) : W;
  return products(kept, t, a, perColumn(t.B, t.diag.data), t.A);
}

function missBat(W, t) {
  const r = t.B.shape[1];
  return filled(W.shape, (o, i) => {
    const [block, from] = [Math.floor(o / r) * r * r, o * W.shape[1] + i - (i % r)];
    let total = W.data[o * W.shape[1] + i] + t.B.data[block + (o % r) * r + (i % r)];
    for (let k = 0; k < r; k++) total += W.data[from + k] * t.B.data[block + k * r + (i % r)];
    return total;
  });
}

function mtlLora(W, t, a) {
  const weights = softmax([...t.weights.data].map((value) => value / a.sharpness));
  const B = sum(parts(t.B).map((each, i) => scale(each, weights[i])), t.B.shape.slice(1));
  return products(W, t, a, perColumn(B, t.values.data), t.A);
}

// The part of W in the span of its first r columns gives way to the trained product.
function olora(W, t, a) {
  const r = t.B.shape[1];
  const basis = orthonormal(parts(slice(transposed(W), 0, r)).map(({ data }) => data));
  const Q = stack(basis.map((own) => array([own.length], own)), [W.shape[0]]);
  return products(plus(W, matmul(transposed(Q), matmul(Q, W)), -a.scaling), t, a, t.B, t.A);
}

function osf(W, t) {
  const triple = (U, S, V) => matmul(perColumn(U, S.data), V);
  const r = t.S.shape[0];
  if (!r) return t.U_own ? subtract(W, triple(t.U_own, t.S_own, t.V_own)) : W;
  if (!t.U_own && r !== Math.min(...W.shape)) throw unsupported("the singular values that are kept are those of a library");
  return add(t.U_own ? subtract(W, triple(t.U_own, t.S_own, t.V_own)) : array(W.shape), triple(t.U, t.S, t.V));
}

// A network over the columns of W: encoders, then decoders with the inputs of the encoders, last first, added.
function peanut(W, t, a) {
  const step = (M, h) => map(matmul(M, h), ACTIVATIONS[a.activation]);
  let h = step(t.A, W);
  const inputs = parts(t.encoders ?? array([0, 1])).map((encoder) => {
    const before = h;
    h = step(encoder, h);
    return before;
  });
  parts(t.decoders ?? array([0, 1])).forEach((decoder) => (h = add(step(decoder, h), inputs.pop())));
  return products(W, t, a, t.B, h);
}

function pissa(W, t, a) {
  return products(t.B.shape[1] ? subtract(W, composed(W.shape, singular(W).slice(0, t.B.shape[1]))) : W, t, a, t.B, t.A);
}

function psoft(W, t, a) {
  if (!t.A) throw unsupported("without A and B they are those of a library");
  const r = t.A.shape[0];
  const turned = () => {
    const Q = skew(t.pairs.data, r);
    const length = norm(Q.data);
    const short = a.eps > 0 && length > a.eps ? scale(Q, a.eps / length) : Q;
    return a.terms ? series(short, a.terms, false) : cayley(scale(short, -1));
  };
  const R = perRow(t.R ?? turned(), t.b?.data ?? Array(r).fill(1));
  return add(W, [t.B, subtract(t.a ? perColumn(R, t.a.data) : R, identity(r)), t.A].reduce(matmul));
}

function randlora(W, t, a) {
  const [[r, n], [bases, shorts], short] = [t.lam.shape, [t.B.shape[1], t.A.shape[2]], t.gamma.shape[1]];
  const wide = W.shape[1] > W.shape[0];
  const D = filled([Math.max(...W.shape), Math.min(...W.shape)], (l, s) => {
    let total = 0;
    for (let q = 0; q < n * r; q++) {
      const left = t.B.data[(l * bases + Math.floor(q / r)) * r + (q % r)] * t.lam.data[q];
      total += left * t.A.data[Math.floor(q / n) * shorts + s] * t.gamma.data[(q % n) * short + s];
    }
    return total;
  });
  return plus(W, wide ? transposed(D) : D, a.scaling);
}

// Pairs of outputs, half a group apart, are turned and stretched.
function road(M, t, a) {
  const [half, inner] = [a.group / 2, M.data.length / M.shape[0]];
  return map(M, (value, at) => {
    const [o, place] = [Math.floor(at / inner), Math.floor(at / inner) % a.group];
    const group = Math.floor(o / a.group);
    const own = { 1: group * half + (place % half), 2: o }[a.variant] ?? group * 2 * a.group + place;
    const other = a.variant < 3 ? own : own + a.group;
    const partner = M.data[at + (place < half ? half : -half) * inner];
    const [cosine, sine] = [t.alpha.data[own] * Math.cos(t.theta.data[own]), t.alpha.data[other] * Math.sin(t.theta.data[other])];
    return cosine * value + (place < half ? -1 : 1) * sine * partner;
  });
}

// Values added at places of W, given by pairs, or by their numbers in C order.
function scattered(W, places, values) {
  const out = map(W, (value) => value);
  values.data.forEach((value, j) => (out.data[places(j)] += value));
  return out;
}

// Vectors of a bank, mixed: of each piece of a factor the largest logits, or places and weights as they are.
function vblora(W, t, a) {
  const pieces = (name) => {
    const [logits, indices, weights] = [t[`logits_${name}`], t[`indices_${name}`], t[`weights_${name}`]];
    const [rows, columns, m] = (logits ?? indices).shape;
    return range(rows * columns).map((at) => {
      const of = ({ data }) => [...data.subarray(at * m, (at + 1) * m)];
      const chosen = logits ? largest(of(logits), a.topk) : of(indices);
      const shares = logits ? softmax(chosen.map((i) => of(logits)[i])) : of(weights);
      return sum(chosen.map((i, j) => scale(part(t.bank, i), shares[j])), [t.bank.shape[1]]);
    });
  };
  const [r, b] = [(t.logits_A ?? t.indices_A).shape[0], t.bank.shape[1]];
  const [A, B] = [pieces("A"), pieces("B")];
  const left = filled([W.shape[0], r], (o, p) => B[Math.floor(o / b) * r + p].data[o % b]);
  const right = filled([r, W.shape[1]], (p, i) => A[(p * W.shape[1]) / b + Math.floor(i / b)].data[i % b]);
  return add(W, matmul(left, right));
}

// A spectrum of wavelets: as it is, or through one step back of a transform by the filters.
function waveft(W, t, a) {
  const [outs, ins] = W.shape;
  const count = t.spectrum.shape[0];
  if (!t.low_pass) return scattered(W, (j) => t.index.data[j] * ins + t.index.data[count + j], scale(t.spectrum, a.scaling));
  const low = t.low_pass.data;
  const length = low.length;
  const high = low.map((_, at) => (at % 2 ? -1 : 1) * low[length - 1 - at]);
  const padded = (size) => size + length - 2 + ((size + length - 2) % 2);
  // Place in the padded spectrum, and half of its size: the places behind it are those of the high band.
  const placed = (size, at) => [at + Math.floor((padded(size) - size) / 2), padded(size) / 2];
  // The band of the columns chooses the filter of the rows, and the other way round.
  const filter = ([place, half], [across, border]) => {
    const shift = length - 2 - 2 * (place % half);
    return (i) => (across >= border ? high : low)[i + shift] ?? 0;
  };
  const D = array(W.shape);
  t.spectrum.data.forEach((value, j) => {
    const [u, v] = [placed(outs, t.index.data[j]), placed(ins, t.index.data[count + j])];
    const [f, g] = [filter(u, v), filter(v, u)];
    D.data.forEach((_, at) => (D.data[at] += value * f(Math.floor(at / ins)) * g(at % ins)));
  });
  return plus(W, D, a.scaling);
}

function weightNorm(W, t, a) {
  if (!t.out) return swapped(weightNorm(swapped(W, 0), { out: t.into }, a), 0);
  const lengths = range(W.shape[0]).map((o) => norm(rowOf(flatten(W), o)) + a.eps);
  return perOutput(W, (value, o) => (t.out.data[o] * value) / lengths[o]);
}

const perInput = (W, f) => {
  const kernel = product(W.shape.slice(2));
  return map(W, (value, at) => f(value, Math.floor(at / kernel) % W.shape[1]));
};
const onePlus = (factors) => (value, at) => value * (1 + factors.data[at]);
const veraOf = FORMULAS.vera.weight;

// ---- Formulas of outputs.

// Channels last, and back: of a convolution they are axis 1 (README, section 10).
const lastly = (x, convolves) => {
  if (!convolves) return x;
  const [n, c, ...places] = x.shape;
  return reshape(swapped(reshape(x, [n, c, product(places)]), 1), [n, ...places, c]);
};
const firstly = (x, convolves) => {
  if (!convolves) return x;
  const [n, places, c] = [x.shape[0], x.shape.slice(1, -1), x.shape.at(-1)];
  return reshape(swapped(reshape(x, [n, product(places), c]), 1), [n, c, ...places]);
};
const through = (x, t) => linear(linear(x, t.A), t.B); // x @ A^T @ B^T
const placesOf = (x) => product(x.shape.slice(1, -1));

// A LoRA from the last tokens of an invocation on, in each row that has it.
function alora(x, layer, t, a, { call }) {
  const [y, D] = [layer(x), through(x, t)];
  const [, places, outs] = y.shape;
  const [ids, invocation] = [call.input_ids, t.invocation.whole];
  const tokens = ids.shape[1];
  const starts = range(ids.shape[0]).map((row) => {
    const at = (start) => invocation.every((token, k) => ids.whole[row * tokens + start + k] === token);
    return range(Math.max(tokens - invocation.length + 1, 0)).findLast(at) ?? Infinity;
  });
  return map(y, (value, at) => {
    const [row, place, o] = [Math.floor(at / outs / places), Math.floor(at / outs) % places, at % outs];
    const active = place >= places - tokens + starts[row];
    return active ? value + a.scaling * (D.data[at] + (t.bias?.data[o] ?? 0)) : value;
  });
}

// Experts with shares that depend on the place.
function mixed(x, layer, t, a, sharesOf) {
  const y = layer(x);
  const shares = range(product(x.shape.slice(0, -1))).map(sharesOf);
  return parts(t.A).reduce((sum_, A, e) => {
    const change = through(x, { A, B: part(t.B, e) });
    return map(sum_, (value, at) => value + a.scaling * shares[Math.floor(at / y.shape.at(-1))][e] * t.strengths.data[e] * change.data[at]);
  }, y);
}

// The experts whose prototypes are most along x.
function arrow(x, layer, t, a) {
  const likeness = map(linear(x, t.prototypes), Math.abs);
  const count = t.prototypes.shape[0];
  return mixed(x, layer, t, a, (n) => {
    const own = likeness.data.subarray(n * count, (n + 1) * count);
    const chosen = largest(own, a.top_k);
    const shares = softmax(chosen.map((e) => own[e] / a.temperature));
    return range(count).map((e) => shares[chosen.indexOf(e)] ?? 0);
  });
}

// Shares from a network of the hidden states; `place` is the layer's number among those of the network's outputs.
function xlora(x, layer, t, a, { call }) {
  let h = call.hidden_states;
  if (t.first) h = rectified(h, t.first, t.first_bias);
  if (t.inner) parts(t.inner).forEach((M, i) => (h = rectified(h, M, part(t.inner_bias, i))));
  const logits = linear(h, t.last, t.last_bias);
  const [count, all] = [t.A.shape[0], t.last.shape[0]];
  return mixed(x, layer, t, a, (n) => {
    const from = n * all + a.place * count;
    let own = [...logits.data.subarray(from, from + count)];
    if (a.enable_softmax) own = softmax(own.map((value) => value / a.softmax_temperature));
    if (a.top_k > 0) {
      const kept = largest(own, a.top_k);
      own = own.map((value, e) => (kept.includes(e) ? value : 0));
    }
    if (!a.enable_softmax_topk) return own;
    const active = range(count).filter((e) => own[e] !== 0);
    const shares = softmax(active.map((e) => own[e]));
    return own.map((value, e) => shares[active.indexOf(e)] ?? value);
  });
}

// A LoRA times the mean of a gate over the places of the row.
function gatedLora(x, layer, t) {
  const [y, D, gates, places] = [layer(x), through(x, t), map(linear(x, t.gate, t.gate_bias), sigmoid), placesOf(x)];
  const shares = range(x.shape[0]).map((n) => gates.data.subarray(n * places, (n + 1) * places).reduce((total, gate) => total + gate, 0) / places);
  return map(y, (value, at) => value + shares[Math.floor(at / (y.data.length / y.shape[0]))] * D.data[at]);
}

// conv(x, A) over all channels, and of it for each group of outputs its own `share` ranks through B: channels last.
function grouped(x, t, { convolves, convolve }) {
  const [r, [outs, share]] = [t.A.shape[0], t.B.shape];
  const h = convolves ? lastly(convolve(x, t.A), true) : linear(x, t.A);
  const width = outs / (r / share); // outputs of a group
  return filled([...h.shape.slice(0, -1), outs], (...at) => {
    const o = at.at(-1);
    const row = at.slice(0, -1).reduce((place, n, axis) => place * h.shape[axis] + n, 0) * r + Math.floor(o / width) * share;
    let total = 0;
    for (let j = 0; j < share; j++) total += t.B.data[o * share + j] * h.data[row + j];
    return total;
  });
}

function groupedLora(x, layer, t, a, beside) {
  const h = grouped(x, t, beside);
  const shifted = t.bias ? map(h, (value, at) => value + t.bias.data[at % t.bias.shape[0]]) : h;
  return plus(layer(x), firstly(shifted, beside.convolves), a.scaling);
}

// The norms of the kernels over all channels; regrouped: of W and the product in the shape of W.
function groupedNorms(t, a, W) {
  const [[outs, ins, ...kernel], [r, channels], share] = [W.shape, t.A.shape, t.B.shape[1]];
  const [groups, size] = [r / share, product(kernel)];
  if (a.regrouped) {
    const D = matmul(reshape(t.B, [outs / groups, r]), flatten(t.A));
    const V = flatten(plus(W, D, a.scaling));
    return range(outs).map((o) => norm(rowOf(V, o)));
  }
  return range(outs).map((o) => {
    const group = Math.floor(o / (outs / groups));
    const A = flatten(slice(t.A, group * share, (group + 1) * share));
    const row = scale(matmul(reshape(part(t.B, o), [1, share]), A), a.scaling).data;
    const own = rowOf(flatten(W), o);
    const first = group * ins * size;
    return norm(row.map((value, at) => value + (at >= first && at < first + ins * size ? own[at - first] : 0)).subarray(0, channels * size));
  });
}

function groupedDora(x, layer, t, a, beside) {
  const V = plus(lastly(layer(x), beside.convolves), grouped(x, t, beside), a.scaling);
  const [norms, outs, b] = [groupedNorms(t, a, beside.W), t.magnitude.shape[0], beside.bias?.data];
  const scaled = map(V, (value, at) => {
    const [o, shift] = [at % outs, b ? b[at % outs] : 0];
    return (t.magnitude.data[o] / norms[o]) * (value - shift) + shift;
  });
  return firstly(scaled, beside.convolves);
}

// One mixture of experts B for all places, by the mean of a router's shares.
function lily(x, layer, t, a) {
  const h = lines(linear(x, t.A));
  const shares = parts(linear(h, t.router)).map(({ data }) => softmax([...data]));
  const share = (e) => shares.reduce((total, own) => total + own[e] / shares.length, 0);
  const B = sum(parts(t.B).map((each, e) => scale(each, share(e))), t.B.shape.slice(1));
  return plus(layer(x), matmul(h, B), a.scaling);
}

// Skills by the task of the row: each slice of the inputs, and of the outputs, has shares of its own.
function poly(x, layer, t, a, { call }) {
  const [y, [slices, skills, width, r], height] = [layer(x), t.A.shape, t.B.shape[3]];
  if (!r) return y;
  const [tasks, size] = [t.logits.shape[0], slices * skills];
  const changes = range(x.shape[0]).map((row) => {
    const task = Number(call.task_ids.data[row]);
    if (!(task >= 0 && task < tasks)) throw new AdapterError("UsageError", "", `no task ${task}`);
    const gates = map(reshape(array([size], t.logits.data.slice(task * size, (task + 1) * size)), [slices, skills]), sigmoid);
    const shares = perOutput(gates, (gate, s) => gate / (rowOf(gates, s).reduce((total, each) => total + each, 0) + 1e-12));
    const blend = (F, s) => sum(parts(part(F, s)).map((each, k) => scale(each, shares.data[s * skills + k])), F.shape.slice(2));
    const A = reshape(stack(range(slices).map((s) => blend(t.A, s)), [width, r]), [slices * width, r]);
    const B = reshape(swapped(stack(range(slices).map((s) => blend(t.B, s)), [r, height]), 0), [r, slices * height]);
    return [lines(part(x, row)), A, B].reduce(matmul);
  });
  return changes.length ? plus(y, stack(changes), 1 / r) : y;
}

// Halves of the channels, each plus a network of the other; reversed: before the layer, and taken away.
function invertible(x, layer, t, a) {
  const net = (name, h) => {
    const inner = map(linear(h, t[`${name}_down`], t[`${name}_down_bias`]), ACTIVATIONS[a.non_linearity]);
    return linear(inner, t[`${name}_up`], t[`${name}_up_bias`]);
  };
  const [first, second] = [t.F_up.shape[0], t.G_up.shape[0]];
  const cut = (h, from, count) => {
    const width = h.shape.at(-1);
    return filled([h.data.length / width || 0, count], (n, c) => h.data[n * width + from + c]);
  };
  const joined = (one, other, shape) => {
    const value = (n, c) => (c < first ? one.data[n * first + c] : other.data[n * second + c - first]);
    return reshape(filled([one.shape[0], first + second], value), shape);
  };
  const h = a.reverse ? x : layer(x);
  let [one, other] = [cut(h, 0, first), cut(h, first, second)];
  if (a.reverse) {
    other = subtract(other, net("G", one));
    one = subtract(one, net("F", other));
    return layer(joined(one, other, h.shape));
  }
  one = add(one, net("F", other));
  other = add(other, net("G", one));
  return joined(one, other, h.shape);
}

// The patches of x are turned; a channel's numbers are then read in another order, as PEFT does, and added at their places.
function oftPatches(x, layer, t, a, { kernel }) {
  const turn = (rows) => FORMULAS.oft.weight(rows, t, { ...a, side: "out" }); // M^T @ columns
  const turned = (patches) => transposed(turn(transposed(patches)));
  if (!kernel.length) return layer(reshape(turned(lines(x)), x.shape));
  const [batch, channels, height, width] = x.shape;
  const [h, w] = kernel;
  const [high, wide] = [height - h + 1, width - w + 1];
  const [count, size] = [high * wide, h * w];
  const place = (n, c, l, k) => ((n * channels + c) * height + Math.floor(l / wide) + Math.floor(k / w)) * width + (l % wide) + (k % w);
  const out = array(x.shape);
  for (let n = 0; n < batch; n++) {
    const p = turned(flatten(filled([count, channels, size], (l, c, k) => x.data[place(n, c, l, k)])));
    for (let c = 0; c < channels; c++) {
      for (let at = 0; at < count * size; at++) {
        const value = p.data[Math.floor(at / size) * channels * size + c * size + (at % size)];
        out.data[place(n, c, at % count, Math.floor(at / count))] += value;
      }
    }
  }
  return layer(out);
}

// A change within a few directions, at the first and last positions that are not masked.
function reft(x, layer, t, a, { call }) {
  const y = layer(x);
  const [places, channels] = y.shape.slice(-2);
  const directions = (R) => {
    const rows = parts(R).map(({ data }) => data);
    return a.orthogonality ? orthonormal(rows) : rows;
  };
  const prefix = { source: t.source, bias: t.source_bias, R: directions(t.projection) };
  const own = t.suffix_source && { source: t.suffix_source, bias: t.suffix_source_bias, R: directions(t.suffix_projection) };
  const out = map(y, (value) => value);
  for (const row of range(y.shape.length === 3 ? y.shape[0] : 1)) {
    const open = range(places).filter((p) => !call.mask || call.mask.data[row * places + p] !== 0);
    open.forEach((p, at) => {
      const used = at >= open.length - a.suffix_positions ? (own ?? prefix) : at < a.prefix_positions ? prefix : undefined;
      if (!used) return;
      const from = (row * places + p) * channels;
      const h = y.data.subarray(from, from + channels);
      const along = (v) => h.reduce((total, value, c) => total + value * v[c], 0);
      used.R.forEach((direction, i) => {
        const wanted = ACTIVATIONS[a.non_linearity](along(rowOf(used.source, i)) + (used.bias?.data[i] ?? 0));
        const change = a.subtract_projection ? wanted - along(direction) : wanted;
        direction.forEach((value, c) => (out.data[from + c] += change * value));
      });
    });
  }
  return out;
}

// Compacter's factors are sums of Kronecker products, which may have small factors themselves.
function compacter(x, layer, t, a, beside, inside) {
  const factor = (side) => {
    const [W, rule] = [t[`${side}_W`], t[`${side}_rule`]];
    const multiplied = (left, right) => stack(parts(left).map((each, i) => matmul(each, part(right, i))), [left.shape[1], right.shape[2]]);
    const weights = W ?? multiplied(t[`${side}_left`], t[`${side}_right`]);
    const rank = (factor, shape) => reshape(factor, [factor.shape[0], ...shape(factor.shape[0])]);
    const rules = rule ?? multiplied(rank(t[`${side}_rule_left`], (n) => [n, 1]), rank(t[`${side}_rule_right`], (n) => [1, n]));
    const [n, p, q] = weights.shape;
    return transposed(sum(range(n).map((i) => kron(part(rules, i), part(weights, i))), [n * p, n * q]));
  };
  return FORMULAS.bottleneck.output(x, layer, { ...t, down: factor("down"), up: factor("up") }, a, beside, inside);
}

// ---- Formulas of contexts.

// A perturbation, each row cut to its length.
function cpt({ E, D, epsilon }) {
  const lengths = parts(D).map(({ data }) => norm(data));
  const factors = lengths.map((length, i) => (length === 0 ? 0 : Math.min(1, epsilon.data[i] / length)));
  return { embeddings: add(E, perRow(D, factors)) };
}

function multitaskPrompt({ P, columns, rows }, { task, decoder }) {
  const all = multiply(P, matmul(part(columns, task), part(rows, task)));
  const half = P.shape[0] / 2;
  if (!decoder) return { embeddings: all };
  return { embeddings: slice(all, 0, half), decoder_embeddings: slice(all, half, 2 * half) };
}

// One layer of an LSTM, in both directions.
function lstm(rows, input, hidden, inputBias, hiddenBias) {
  const [n, H] = [rows.length, hidden.shape[2]];
  const out = rows.map(() => new Float64Array(2 * H));
  for (const way of [0, 1]) {
    let [h, c] = [array([1, H]), new Float64Array(H)];
    for (const step of range(n)) {
      const at = way ? n - 1 - step : step;
      const read = linear(array([1, rows[at].length], rows[at]), part(input, way), part(inputBias, way));
      const z = add(read, linear(h, part(hidden, way), part(hiddenBias, way))).data;
      c = c.map((value, i) => sigmoid(z[H + i]) * value + sigmoid(z[i]) * Math.tanh(z[2 * H + i]));
      h = array([1, H], c.map((value, i) => sigmoid(z[3 * H + i]) * Math.tanh(value)));
      out[at].set(h.data, way * H);
    }
  }
  return out;
}

function pTuningLstm(t) {
  const names = ["input", "hidden", "input_bias", "hidden_bias"];
  let rows = lstm(parts(t.E).map(({ data }) => data), ...names.map((name) => t[`first_${name}`]));
  for (const l of range(t.deeper_input?.shape[0] ?? 0)) rows = lstm(rows, ...names.map((name) => part(t[`deeper_${name}`], l)));
  const width = t.W1.shape[1];
  const h = array([rows.length, width]);
  rows.forEach((row, i) => h.data.set(row, i * width));
  return { embeddings: linear(rectified(h, t.W1, t.b1), t.W2, t.b2) };
}

// Pasts from a network of embeddings: [layers, 2, heads, n, d].
function past(t) {
  const [layers, two, heads, d, inner] = t.W2.shape;
  const h = map(linear(t.E, t.W1, t.b1), Math.tanh);
  const n = t.E.shape[0];
  const y = linear(h, reshape(t.W2, [layers * two * heads * d, inner]), t.b2); // [n, layers * 2 * heads * d]
  return reshape(swapped(reshape(y, [n, layers * two * heads, d]), 0), [layers, two, heads, n, d]);
}

// Keys and values of each batch row, times the mean of its gates.
function gatedPrefix(P, t, x) {
  const [batch, places] = x.shape;
  const gates = map(linear(x, t.gate, t.gate_bias), sigmoid);
  const count = t.gate.shape[0];
  const mean = (b, s) => range(places).reduce((total, m) => total + gates.data[(b * places + m) * count + s], 0) / places;
  const shares = range(batch).map((b) => range(count).map((s) => mean(b, s)));
  const shape = P.shape.slice(1);
  const half = product(shape.slice(1));
  const prefix = array([batch, ...shape]);
  prefix.data.forEach((_, at) => {
    const [b, place] = [Math.floor(at / half / 2), at % (2 * half)];
    prefix.data[at] = shares[b][Math.floor(place / half) % count] * P.data[place];
  });
  return { prefix };
}

// Attention to the prompt alone, times a gate.
function adaptionPrompt(t, a, { q, k, v }) {
  const [batch, heads, m, d] = q.shape;
  const attention = array(q.shape);
  for (const at of range(batch * heads)) {
    const [h, rows] = [at % heads, reshape(slice(reshape(q, [batch * heads, m, d]), at, at + 1), [m, d])];
    const scores = scale(linear(rows, part(k, h)), 1 / Math.sqrt(d));
    const shares = map(scores, () => 0);
    parts(scores).forEach(({ data }, row) => shares.data.set(softmax([...data]), row * scores.shape[1]));
    attention.data.set(scale(matmul(shares, part(v, h)), t.gate.data[h % t.gate.data.length]).data, at * m * d);
  }
  return { attention };
}

Object.assign(FORMULAS, {
  alora: { output: alora },
  arrow: { output: arrow },
  compacter: { output: compacter },
  gated_lora: { output: gatedLora },
  grouped_dora: { output: groupedDora },
  grouped_lora: { output: groupedLora },
  invertible: { output: invertible },
  lily: { output: lily },
  oft_patches: { output: oftPatches },
  poly: { output: poly },
  reft: { output: reft },
  // What a block reads is moved along its difference from a state.
  shadow: {
    output: (x, layer, t, a, { call }) => layer(plus(x, through(subtract(x, call.shadow), { A: t.down, B: t.up }), a.alpha)),
  },
  xlora: { output: xlora },
  adaption_prompt: { context: adaptionPrompt },
  cpt: { context: cpt },
  gated_prefix: { context: (t, a, { x }) => gatedPrefix(t.P, t, x) },
  gated_prefix_mlp: { context: (t, a, { x }) => gatedPrefix(past(t), t, x) },
  multitask_prompt: { context: multitaskPrompt },
  // Three linear layers, relu between them.
  p_tuning: { context: (t) => ({ embeddings: linear(rectified(rectified(t.E, t.W1, t.b1), t.W2, t.b2), t.W3, t.b3) }) },
  p_tuning_lstm: { context: pTuningLstm },
  // Layers in another order: the one at place i comes from i * step, modulo their number.
  prefix: {
    context: ({ P }, a, { update }) => {
      const count = BigInt(P.shape[0]);
      const layers = range(P.shape[0]).map((i) => part(P, Number((BigInt(i) * update.attributes.get("step")) % count)));
      return { past: stack(layers, P.shape.slice(1)) };
    },
  },
  prefix_mlp: { context: (t) => ({ past: past(t) }) },
  prompt: { context: ({ P }, { used }) => ({ embeddings: slice(P, 0, used || P.shape[0]) }) },
  textual_inversion: { context: ({ P }) => ({ vocabulary: P }) },
  // LoRA by singular values: B @ diag(E) @ A.
  adalora: { weight: (W, t, a) => products(W, t, a, t.B, perRow(flatten(t.A), t.E.data)) },
  // Each output has its own rows of a shared basis.
  adamss: {
    weight: (W, t) => add(W, matmul(adamss(t), t.basis)),
    bias: (b, t) => (t.basis_bias ? plus(b, matmul(adamss(t), column(t.basis_bias))) : b),
  },
  bdlora: { weight: bdlora }, // one of the factors is block diagonal
  // Butterflies of rotations on the outputs, of the bias too where it is turned with them.
  boft_outputs: {
    weight: (W, t, a) => reshape(butterflies(flatten(W), t, a), W.shape),
    bias: (b, t, a) => (a.on_output ? reshape(butterflies(column(b), t, a), b.shape) : b),
  },
  // Blocks that are circulants.
  c3a: {
    weight: (W, { kernel }) => {
      const [, columns, b] = kernel.shape;
      const at = (o, i) => (Math.floor(o / b) * columns + Math.floor(i / b)) * b + ((((i % b) - (o % b)) % b) + b) % b;
      return add(W, filled(W.shape, (o, i) => kernel.data[at(o, i)] / W.shape[1]));
    },
  },
  deft: { weight: deft }, // a projection takes a part of W away, and R comes in its place
  delora: { weight: delora }, // directions of length 1, times one strength
  // DoRA whose norms leave the scaling out; outputs are scaled, the bias with them.
  dora_outputs: {
    weight: (W, t, a) => perRow(plus(W, lowRank(t.B, t.A), a.scaling), doraFactors(W, t)),
    bias: (b, t, a, W) => perRow(b, doraFactors(W, t)),
  },
  frod: { weight: frod }, // a sparse core in a shared basis
  glora: { weight: glora, bias: gloraBias }, // W + W * A + B, and b + b * D + E + W @ C
  glora_products: { weight: gloraProducts }, // W + scaling (W @ A1 @ A2 + B1 @ B2)
  gralora: { weight: gralora }, // a product for each block of W
  hira: { weight: (W, t) => add(W, multiply(W, lowRank(t.B, t.A))) }, // W + W * (B @ A)
  hra: { weight: hra }, // reflections of the inputs
  // Rows or columns times 1 + w.
  ia3_weights: {
    weight: (W, t) => (t.w ? perOutput(W, onePlus(t.w)) : perInput(W, onePlus(t.w_in))),
    bias: (b, t, a) => (t.w && a.on_output ? perOutput(b, onePlus(t.w)) : b),
  },
  kasa: { weight: kasa },
  lora_xs: { weight: (W, t, a) => products(W, t, a, t.B, t.R, flatten(t.A)) }, // B @ R @ A
  // One small matrix, laid over W as tiles.
  miss: {
    weight: (W, t) => {
      const D = t.D ?? t.mini;
      const [r, m] = D.shape;
      return add(W, filled(W.shape, (o, i) => D.data[(i % r) * m + (o % m)]));
    },
  },
  miss_bat: { weight: missBat }, // W + W @ blocks + blocks
  mtl_lora: { weight: mtlLora }, // a mixture of several B, for one task
  olora: { weight: olora },
  osf: { weight: osf }, // a part of the singular values is trained
  peanut: { weight: peanut }, // what is added is a network of W
  pissa: { weight: pissa }, // the product in the place of the largest singular values
  psoft: { weight: psoft }, // B @ (R - I) @ A, R a rotation that is stretched
  pvera: { weight: veraOf }, // the mean of a random VeRA
  randlora: { weight: randlora }, // a sum of products of random matrices
  // A product, or a whole matrix, that is taken away.
  residual: { weight: (W, t, a) => plus(W, t.D ?? lowRank(t.B, t.A), -a.scaling) },
  road: { weight: road, bias: road },
  // Some elements of W.
  shira: { weight: (W, t) => scattered(W, (j) => t.index.data[j] * W.shape[1] + t.index.data[t.values.shape[0] + j], t.values) },
  supertuning: {
    weight: (W, t, a) => {
      const sparse = scattered(W, (j) => t.index.data[j], t.values);
      return t.A ? products(sparse, t, a, t.B, t.A) : sparse;
    },
  },
  // B @ (sum of v_i P_i) @ A.
  tinylora: {
    weight: (W, t) => add(W, [t.B, sum(parts(t.P).map((P, i) => scale(P, t.v.data[i])), t.P.shape.slice(1)), t.A].reduce(matmul)),
  },
  // All elements of both factors from one vector.
  unilora: {
    weight: (W, t) => {
      const [B, A] = ["B", "A"].map((side) => map(t[`scales_${side}`], (value, i) => t.theta.data[t[`indices_${side}`].data[i]] * value));
      return add(W, matmul(B, A));
    },
  },
  vblora: { weight: vblora },
  vera_matrices: { weight: (W, t, a) => products(W, t, a, t.E, t.B, t.D, t.A) }, // VeRA with whole matrices
  waveft: { weight: waveft },
  weight_norm: { weight: weightNorm }, // rows or columns of a norm that is trained
});
