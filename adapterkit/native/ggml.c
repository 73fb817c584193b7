/* Converts float32 to the bytes of ggml's block types, and back. The loops do the same float32 operations as
 * `io/ggml_blocks.py`, in numpy's order, so they give the same bits. They are compiled without fused operations, which
 * round once where numpy rounds twice.
 *
 * numpy computes whole arrays at each step; here, a few blocks go through all steps while they are in the cache. If the
 * bits depend on numpy's order of elements, as for NaN and for the sign of zero, the call returns 1 and numpy computes
 * the blocks.
 */

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "lanes.h"

enum { TOGETHER = 16, LONGEST = 32, STRETCHES = 6, PLAIN = 32, BLOCK = 256 };

/* The numbers by which ggml identifies the types. */
enum { Q4_0 = 2, Q4_1 = 3, Q5_0 = 6, Q5_1 = 7, Q8_0 = 8, Q2_K = 10, Q3_K = 11, Q4_K = 12, Q5_K = 13, Q6_K = 14 };

/* numpy computes blocks with larger values: their squares overflow, and numpy's order of comparisons then decides the
 * bits. */
static const float LARGEST = 1e15f;

static const float stretches[STRETCHES] = {-0.6f, -0.3f, 0.0f, 0.3f, 0.6f, 0.9f};

INLINE float divided(float value, float by) { return by == 0.0f ? 0.0f : value / by; }

INLINE float clipped(float value, float low, float high) { return value < low ? low : value > high ? high : value; }

INLINE uint16_t half_of(float value) {
#if defined(__x86_64__)
  return (uint16_t)_cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT);
#else
  __fp16 rounded = (__fp16)value;
  uint16_t bits;
  memcpy(&bits, &rounded, 2);
  return bits;
#endif
}

INLINE float float_of(uint16_t bits) {
#if defined(__x86_64__)
  return _cvtsh_ss(bits);
#else
  __fp16 value;
  memcpy(&value, &bits, 2);
  return (float)value;
#endif
}

INLINE float read_half(const uint8_t *from) {
  uint16_t bits;
  memcpy(&bits, from, 2);
  return float_of(bits);
}

INLINE void write_half(uint8_t *to, float value) {
  uint16_t bits = half_of(value);
  memcpy(to, &bits, 2);
}

/* Types of 32 numbers with one scale, with or without a minimum. */

INLINE int encode_plain(int bits, int offset, const float *x, uint8_t *out) {
  float inverse, scale;
  if (bits == 8) {
    float most = 0.0f;
    for (int k = 0; k < PLAIN; k++) most = fabsf(x[k]) > most ? fabsf(x[k]) : most;
    scale = most / 127.0f;
    inverse = scale == 0.0f ? 0.0f : 1.0f / scale;
    if (!isfinite(inverse)) return 1;
    write_half(out, scale);
    for (int k = 0; k < PLAIN; k++) {
      float scaled = x[k] * inverse;
      /* Round halves away from zero, like C's roundf. */
      out[2 + k] = (uint8_t)(int8_t)(int32_t)(scaled + copysignf(0.5f, scaled));
    }
    return 0;
  }
  float least = 0.0f, shift = 0.5f;
  if (offset) {
    float most = x[0];
    int plus = 0, minus = 0;
    least = x[0];
    for (int k = 0; k < PLAIN; k++) {
      least = x[k] < least ? x[k] : least;
      most = x[k] > most ? x[k] : most;
      plus |= x[k] == 0.0f && !signbit(x[k]);
      minus |= x[k] == 0.0f && signbit(x[k]);
    }
    /* numpy computes blocks with both zeros, because its order of comparisons decides which zero is the smallest. */
    if (least == 0.0f && plus && minus) return 1;
    scale = (most - least) / (float)((1 << bits) - 1);
  } else {
    float largest = x[0];
    for (int k = 1; k < PLAIN; k++) largest = fabsf(x[k]) > fabsf(largest) ? x[k] : largest;
    scale = largest / -(float)(1 << (bits - 1));
    shift = (float)(1 << (bits - 1)) + 0.5f;
  }
  inverse = scale == 0.0f ? 0.0f : 1.0f / scale;
  if (!isfinite(inverse)) return 1;
  write_half(out, scale);
  out += 2;
  if (offset) write_half(out, least), out += 2;
  uint8_t q[PLAIN];
  const float high = (float)((1 << bits) - 1);
  for (int k = 0; k < PLAIN; k++) {
    float value = (offset ? x[k] - least : x[k]) * inverse + shift;
    q[k] = (uint8_t)(int32_t)clipped(value, 0.0f, high);
  }
  if (bits == 5) {
    uint32_t fifth = 0;
    for (int k = 0; k < PLAIN; k++) fifth |= (uint32_t)(q[k] >> 4) << k;
    memcpy(out, &fifth, 4);
    out += 4;
  }
  for (int k = 0; k < 16; k++) out[k] = (uint8_t)((q[k] & 15) | (q[16 + k] << 4));
  return 0;
}

INLINE void decode_plain(int bits, int offset, const uint8_t *from, float *x) {
  float scale = read_half(from), least = 0.0f;
  from += 2;
  if (bits == 8) {
    for (int k = 0; k < PLAIN; k++) x[k] = (float)(int8_t)from[k] * scale;
    return;
  }
  if (offset) least = read_half(from), from += 2;
  uint32_t fifth = 0;
  if (bits == 5) memcpy(&fifth, from, 4), from += 4;
  const int32_t middle = offset ? 0 : 1 << (bits - 1);
  for (int k = 0; k < 16; k++) {
    int32_t low = from[k] & 15, high = from[k] >> 4;
    if (bits == 5) low |= (int32_t)(fifth >> k & 1) << 4, high |= (int32_t)(fifth >> (16 + k) & 1) << 4;
    x[k] = (float)(low - middle) * scale;
    x[16 + k] = (float)(high - middle) * scale;
  }
  if (offset)
    for (int k = 0; k < PLAIN; k++) x[k] += least;
}

/* k-quants: blocks of 256 numbers in runs of `size`, 16 or 32. Sixteen runs are processed together, as columns. */

/* Sixteen columns as two vectors. With arrays of single numbers, the sums below would not stay in registers. */
typedef floats Columns[LONGEST][2];

#define BOTH _Pragma("GCC unroll 2") for (int h = 0; h < 2; h++)

/* Computes, for each column, the scale with the least squared error for integers from -most to most - 1. */
INLINE void around_zero(const Columns own, int size, float most, floats *scale) {
  floats largest[2], best[2];
  BOTH {
    floats top = own[0][h], bottom = own[0][h];
    for (int k = 1; k < size; k++) top = higher_of(own[k][h], top), bottom = lower_of(own[k][h], bottom);
    largest[h] = chosen(top > -bottom, top, bottom);
    best[h] = all(-1);
    scale[h] = all(0);
  }
  const floats low = all(-most), high = all(most - 1);
  for (int s = 0; s < STRETCHES; s++) {
    floats factor[2], xq[2] = {{0}}, qq[2] = {{0}};
    BOTH factor[h] = over(all(-most - stretches[s]), largest[h]);
    for (int k = 0; k < size; k++) BOTH {
        floats q = within(nearest(own[k][h] * factor[h]), low, high);
        xq[h] += own[k][h] * q;
        qq[h] += q * q;
      }
    BOTH {
      floats fitted = over(xq[h], qq[h]), gain = fitted * xq[h];
      scale[h] = chosen(gain > best[h], fitted, scale[h]);
      /* Keep a NaN, like numpy's maximum. */
      best[h] = chosen((gain > best[h]) | (gain != gain), gain, best[h]);
    }
  }
}

/* Computes, for each column, the scale and the negated minimum with the least squared error for integers 0 to most. */
INLINE void with_least(const Columns own, int size, float most, floats *scale, floats *least) {
  Columns above;
  floats range[2], total[2], best[2];
  BOTH {
    floats top = own[0][h], bottom = own[0][h], sum = own[0][h];
    for (int k = 1; k < size; k++) {
      top = higher_of(own[k][h], top), bottom = lower_of(own[k][h], bottom);
      sum += own[k][h];
    }
    floats low = lower_of(bottom, all(0));
    for (int k = 0; k < size; k++) above[k][h] = own[k][h] - low;
    range[h] = top - low;
    total[h] = sum;
    best[h] = all(INFINITY);
    scale[h] = all(0);
    least[h] = -low;
  }
  const floats length = all((float)size), high = all(most);
  for (int s = 0; s < STRETCHES; s++) {
    floats factor[2], sq[2] = {{0}}, xq[2] = {{0}}, qq[2] = {{0}};
    BOTH factor[h] = over(all(most + stretches[s]), range[h]);
    for (int k = 0; k < size; k++) BOTH {
        floats q = within(nearest(above[k][h] * factor[h]), all(0), high);
        sq[h] += q;
        xq[h] += own[k][h] * q;
        qq[h] += q * q;
      }
    BOTH {
      floats slope = over(length * xq[h] - total[h] * sq[h], length * qq[h] - sq[h] * sq[h]);
      floats begin = (slope * sq[h] - total[h]) / length;
      /* The stored minimum has no sign. If the fit has a positive minimum, fit a line through zero instead. */
      slope = chosen(begin < all(0), over(xq[h], qq[h]), slope);
      begin = higher_of(begin, all(0));
      floats error = slope * slope * qq[h] + length * begin * begin -
                     all(2) * (slope * xq[h] + slope * begin * sq[h] - begin * total[h]);
      flags better = (error < best[h]) & (slope >= all(0));
      scale[h] = chosen(better, slope, scale[h]);
      least[h] = chosen(better, begin, least[h]);
      best[h] = chosen(better, error, best[h]);
    }
  }
}

/* Computes the stored unit of `count` non-negative values, and the values as multiples of this unit. Returns 1 if numpy
 * must compute them. */
INLINE int whole(const float *values, int count, float most, float *unit, float *times) {
  float largest = values[0];
  int signs = 0;
  for (int c = 0; c < count; c++) {
    if (!isfinite(values[c])) return 1;
    largest = values[c] > largest ? values[c] : largest;
    signs |= 1 << (signbit(values[c]) != 0);
  }
  if (largest == 0.0f && signs == 3) return 1;
  *unit = float_of(half_of(largest / most));
  for (int c = 0; c < count; c++) times[c] = clipped(rintf(divided(values[c], *unit)), 0.0f, most);
  return !isfinite(*unit);
}

/* Does the same for values of either sign, with multiples from -most to most - 1. */
INLINE int with_sign(const float *values, int count, float most, float *unit, float *times) {
  float largest = values[0];
  for (int c = 0; c < count; c++) {
    if (!isfinite(values[c])) return 1;
    largest = fabsf(values[c]) > fabsf(largest) ? values[c] : largest;
  }
  *unit = float_of(half_of(largest / -most));
  for (int c = 0; c < count; c++) times[c] = clipped(rintf(divided(values[c], *unit)), -most, most - 1.0f);
  return !isfinite(*unit);
}

/* Computes the integers from `low` to `high` nearest to (x + least) / scale, minus `low`, for 16 runs. */
INLINE int rounded(const float *x, int size, const float *scale, const float *least, float low, float high, uint8_t *q) {
  for (int c = 0; c < TOGETHER; c++, x += size, q += size) {
    if (!isfinite(scale[c])) return 1;
    const float by = scale[c], shift = least ? least[c] : 0.0f;
    for (int k = 0; k < size; k++) {
      float value = divided(least ? x[k] + shift : x[k], by);
      q[k] = (uint8_t)(int32_t)(clipped(rintf(value), low, high) - low);
    }
  }
  return 0;
}

/* Packs 256 numbers into bytes: within each run of `run` bytes, first all numbers at bit 0, then at bit `step`. */
INLINE void joined(const uint8_t *q, int shift, int mask, int step, int run, uint8_t *out) {
  const int parts = 8 / step;
  for (int first = 0; first < BLOCK; first += run * parts)
    for (int k = 0; k < run; k++) {
      uint8_t byte = 0;
      for (int part = 0; part < parts; part++)
        byte |= (uint8_t)((q[first + part * run + k] >> shift & mask) << (step * part));
      *out++ = byte;
    }
}

/* Encodes sixteen columns: one block of sixteen runs or two blocks of eight. Returns 1 if numpy must encode them. */
INLINE int encode_k(int kind, const float *x, uint8_t *out) {
  const int size = kind == Q4_K || kind == Q5_K ? 32 : 16;
  Columns own;
  floats columns[4];
  float scale[TOGETHER], least[TOGETHER], times[TOGETHER], below[TOGETHER], unit, lower;
  uint8_t q[TOGETHER * LONGEST];
  for (int c = 0; c < TOGETHER; c++)
    for (int k = 0; k < size; k++) ((float *)own[k])[c] = x[c * size + k];
  if (kind == Q6_K || kind == Q3_K) {
    const float most = kind == Q6_K ? 32.0f : 4.0f;
    around_zero(own, size, most, columns);
    memcpy(scale, columns, sizeof scale);
    if (with_sign(scale, TOGETHER, kind == Q6_K ? 128.0f : 32.0f, &unit, times)) return 1;
    for (int c = 0; c < TOGETHER; c++) scale[c] = unit * times[c];
    if (rounded(x, size, scale, NULL, -most, most - 1.0f, q)) return 1;
    if (kind == Q6_K) {
      joined(q, 0, 15, 4, 64, out);
      joined(q, 4, 3, 2, 32, out + 128);
      for (int c = 0; c < TOGETHER; c++) out[192 + c] = (uint8_t)(int8_t)times[c];
      write_half(out + 208, unit);
      return 0;
    }
    joined(q, 2, 1, 1, 32, out);
    joined(q, 0, 3, 2, 32, out + 32);
    uint8_t u[TOGETHER];
    for (int c = 0; c < TOGETHER; c++) u[c] = (uint8_t)(times[c] + 32.0f);
    for (int k = 0; k < 8; k++) out[96 + k] = (uint8_t)((u[k] & 15) | (u[8 + k] & 15) << 4);
    for (int k = 0; k < 4; k++)
      out[104 + k] = (uint8_t)(u[k] >> 4 | u[4 + k] >> 4 << 2 | u[8 + k] >> 4 << 4 | u[12 + k] >> 4 << 6);
    write_half(out + 108, unit);
    return 0;
  }
  const float most = kind == Q2_K ? 3.0f : kind == Q4_K ? 15.0f : 31.0f, finest = kind == Q2_K ? 15.0f : 63.0f;
  const int runs = kind == Q2_K ? 16 : 8;
  float units[2], lowers[2];
  with_least(own, size, most, columns, columns + 2);
  memcpy(scale, columns, sizeof scale);
  memcpy(least, columns + 2, sizeof least);
  for (int first = 0; first < TOGETHER; first += runs) {
    if (whole(scale + first, runs, finest, &unit, times + first)) return 1;
    if (whole(least + first, runs, finest, &lower, below + first)) return 1;
    units[first / runs] = unit, lowers[first / runs] = lower;
    for (int c = first; c < first + runs; c++) {
      scale[c] = unit * times[c];
      least[c] = lower * below[c];
    }
  }
  if (rounded(x, size, scale, least, 0.0f, most, q)) return 1;
  if (kind == Q2_K) {
    for (int c = 0; c < TOGETHER; c++) out[c] = (uint8_t)((uint8_t)times[c] | (uint8_t)below[c] << 4);
    joined(q, 0, 3, 2, 32, out + 16);
    write_half(out + 80, unit);
    write_half(out + 82, lower);
    return 0;
  }
  const int bytes = kind == Q4_K ? 144 : 176;
  for (int half = 0; half < 2; half++, out += bytes) {
    uint8_t s[8], m[8];
    for (int k = 0; k < 8; k++) s[k] = (uint8_t)times[8 * half + k], m[k] = (uint8_t)below[8 * half + k];
    write_half(out, units[half]);
    write_half(out + 2, lowers[half]);
    for (int k = 0; k < 4; k++) {
      out[4 + k] = (uint8_t)(s[k] | s[4 + k] >> 4 << 6);
      out[8 + k] = (uint8_t)(m[k] | m[4 + k] >> 4 << 6);
      out[12 + k] = (uint8_t)((s[4 + k] & 15) | m[4 + k] << 4);
    }
    uint8_t *rest = out + 16;
    if (kind == Q5_K) joined(q + BLOCK * half, 4, 1, 1, 32, rest), rest += 32;
    joined(q + BLOCK * half, 0, 15, 4, 32, rest);
  }
  return 0;
}

/* Reverses `joined`: reads numbers of `step` bits, shifts them left by `shift`, and adds them to those in `q`. */
INLINE void split(const uint8_t *from, int step, int run, int shift, uint8_t *q) {
  const int parts = 8 / step, mask = (1 << step) - 1;
  for (int first = 0; first < BLOCK; first += run * parts, from += run)
    for (int part = 0; part < parts; part++)
      for (int k = 0; k < run; k++) q[first + part * run + k] |= (uint8_t)((from[k] >> (step * part) & mask) << shift);
}

INLINE void decode_k(int kind, const uint8_t *from, float *x) {
  uint8_t q[BLOCK] = {0};
  float step[TOGETHER], lower[TOGETHER];
  if (kind == Q6_K || kind == Q3_K) {
    const float middle = kind == Q6_K ? 32.0f : 4.0f;
    if (kind == Q6_K) {
      const float d = read_half(from + 208);
      split(from, 4, 64, 0, q);
      split(from + 128, 2, 32, 4, q);
      for (int c = 0; c < TOGETHER; c++) step[c] = d * (float)(int8_t)from[192 + c];
    } else {
      const float d = read_half(from + 108);
      split(from + 32, 2, 32, 0, q);
      split(from, 1, 32, 2, q);
      for (int c = 0; c < TOGETHER; c++) {
        int low = from[96 + c % 8] >> (c / 8 * 4) & 15, high = from[104 + c % 4] >> (c / 4 * 2) & 3;
        step[c] = d * (float)((low | high << 4) - 32);
      }
    }
    for (int c = 0; c < TOGETHER; c++)
      for (int k = 0; k < 16; k++) x[16 * c + k] = step[c] * ((float)q[16 * c + k] - middle);
    return;
  }
  if (kind == Q2_K) {
    const float d = read_half(from + 80), least = read_half(from + 82);
    split(from + 16, 2, 32, 0, q);
    for (int c = 0; c < TOGETHER; c++) step[c] = d * (float)(from[c] & 15), lower[c] = least * (float)(from[c] >> 4);
    for (int c = 0; c < TOGETHER; c++)
      for (int k = 0; k < 16; k++) x[16 * c + k] = step[c] * (float)q[16 * c + k] - lower[c];
    return;
  }
  const float d = read_half(from), least = read_half(from + 2);
  const uint8_t *a = from + 4, *b = from + 8, *c = from + 12;
  for (int k = 0; k < 4; k++) {
    step[k] = d * (float)(a[k] & 63), lower[k] = least * (float)(b[k] & 63);
    step[4 + k] = d * (float)((c[k] & 15) | (a[k] >> 2 & 48));
    lower[4 + k] = least * (float)(c[k] >> 4 | (b[k] >> 2 & 48));
  }
  from += 16;
  if (kind == Q5_K) split(from, 1, 32, 4, q), from += 32;
  split(from, 4, 32, 0, q);
  for (int r = 0; r < 8; r++)
    for (int k = 0; k < 32; k++) x[32 * r + k] = step[r] * (float)q[32 * r + k] - lower[r];
}

INLINE int64_t encode(int kind, int bits, int offset, const float *x, int64_t blocks, uint8_t *out, int64_t size) {
  if (bits) {
    for (int64_t b = 0; b < blocks; b++)
      if (encode_plain(bits, offset, x + b * PLAIN, out + b * size)) return 1;
    return 0;
  }
  const int together = kind == Q4_K || kind == Q5_K ? 2 : 1;
  int64_t b = 0;
  for (; b + together <= blocks; b += together)
    if (encode_k(kind, x + b * BLOCK, out + b * size)) return 1;
  if (b < blocks) {
    float both[2 * BLOCK];
    uint8_t made[2 * 210];
    memcpy(both, x + b * BLOCK, sizeof both / 2);
    memcpy(both + BLOCK, both, sizeof both / 2);
    if (encode_k(kind, both, made)) return 1;
    memcpy(out + b * size, made, size);
  }
  return 0;
}

INLINE void decode(int kind, int bits, int offset, const uint8_t *from, int64_t blocks, float *x, int64_t size) {
  for (int64_t b = 0; b < blocks; b++)
    if (bits)
      decode_plain(bits, offset, from + b * size, x + b * PLAIN);
    else
      decode_k(kind, from + b * size, x + b * BLOCK);
}

/* Each type's bits and whether it has a minimum; k-quants have 0 here. */
#define EACH(DO) \
  DO(Q4_0, 4, 0) DO(Q4_1, 4, 1) DO(Q5_0, 5, 0) DO(Q5_1, 5, 1) DO(Q8_0, 8, 0) \
  DO(Q2_K, 0, 0) DO(Q3_K, 0, 0) DO(Q4_K, 0, 0) DO(Q5_K, 0, 0) DO(Q6_K, 0, 0)

/* Encodes whole blocks of `size` bytes. Returns 1 if numpy must encode them; `out` is then incomplete. */
API int32_t adapterkit_ggml_encode(int32_t kind, const float *x, int64_t blocks, uint8_t *out, int64_t size) {
  const int64_t count = blocks * (kind < Q2_K ? PLAIN : BLOCK);
  int large = 0;
  for (int64_t k = 0; k < count; k++) large |= !(fabsf(x[k]) < LARGEST);
  if (large) return 1;
  switch (kind) {
#define CASE(name, bits, offset) \
  case name: \
    return (int32_t)encode(name, bits, offset, x, blocks, out, size);
    EACH(CASE)
#undef CASE
  }
  return 1;
}

/* Decodes whole blocks; returns 1 if the type is unknown. */
API int32_t adapterkit_ggml_decode(int32_t kind, const uint8_t *from, int64_t blocks, float *x, int64_t size) {
  switch (kind) {
#define CASE(name, bits, offset) \
  case name: \
    decode(name, bits, offset, from, blocks, x, size); \
    return 0;
    EACH(CASE)
#undef CASE
  }
  return 1;
}
