/* Quantizes to the nearest of sixteen levels and back, and measures how much of a change remains. The loops do the same
 * operations on the same float32 numbers as `quant/bnb_4bit.py` with numpy, so they give the same bits.
 */

#include "lanes.h"

enum { LEVELS = 16, LONGEST = 4096 };

/* Maps sixteen indices of four bits by the table `order`, and packs them into eight bytes, the first in a high half. */
INLINE void pack_indices(const flags *above, const uint8_t *order, uint8_t *packed) {
#if defined(__x86_64__)
  __m128i four[2];
  for (int h = 0; h < 2; h++)
    four[h] = _mm_packs_epi32(_mm256_castsi256_si128((__m256i)above[h]), _mm256_extracti128_si256((__m256i)above[h], 1));
  __m128i found = _mm_shuffle_epi8(_mm_loadu_si128((const __m128i *)order), _mm_packus_epi16(four[0], four[1]));
  __m128i pairs = _mm_maddubs_epi16(found, _mm_set1_epi16(0x0110));
  _mm_storel_epi64((__m128i *)packed, _mm_packus_epi16(pairs, pairs));
#else
  for (int h = 0; h < 2; h++)
    for (int lane = 0; lane < LANES; lane += 2)
      *packed++ = (uint8_t)(order[above[h][lane]] << 4 | order[above[h][lane + 1]]);
#endif
}

/* Divides each block of `size` finite numbers by its largest magnitude, and writes the indices of the nearest levels,
 * two per byte, the first in the high half. `middles` are the 15 midpoints between ascending levels; `order` maps each
 * level to its stored index. `size` is a multiple of 16. Returns 1 if float32 has no reciprocal of a block's largest
 * number.
 */
API int32_t adapterkit_levels(const float *values, int64_t blocks, int64_t size, const float *middles,
                              const uint8_t *order, uint8_t *packed, float *largest) {
  for (int64_t b = 0; b < blocks; b++, values += size) {
    floats tops = all(0);
    for (int64_t k = 0; k < size; k += LANES)
      tops = higher_of((floats)((words)*(const loose_floats *)(values + k) & 0x7fffffffu), tops);
    float most = tops[0];
    for (int lane = 1; lane < LANES; lane++) most = tops[lane] > most ? tops[lane] : most;
    if (most > 0.0f && most < 0x1p-126f) return 1;
    const floats factor = all(most == 0.0f ? 0.0f : 1.0f / most);
    for (int64_t k = 0; k < size; k += 2 * LANES, packed += LANES) {
      flags above[2] = {{0}};
      floats scaled[2];
      for (int h = 0; h < 2; h++)
        scaled[h] = within(*(const loose_floats *)(values + k + LANES * h) * factor, all(-1), all(1));
      for (int m = 0; m < LEVELS - 1; m++)
        for (int h = 0; h < 2; h++) above[h] -= (flags)(scaled[h] > all(middles[m]));
      pack_indices(above, order, packed);
    }
    largest[b] = most;
  }
  return 0;
}

/* Does the same for 256 levels, with one index per byte; the last block may be shorter. `middles` are 255 numbers. */
API int32_t adapterkit_indices(const float *values, int64_t count, int64_t size, const float *middles,
                               const uint8_t *order, uint8_t *q, float *largest) {
  for (int64_t first = 0; first < count; first += size) {
    const int64_t stop = count - first < size ? count : first + size;
    float most = 0.0f;
    for (int64_t k = first; k < stop; k++) most = fabsf(values[k]) > most ? fabsf(values[k]) : most;
    if (most > 0.0f && most < 0x1p-126f) return 1;
    const float factor = most == 0.0f ? 0.0f : 1.0f / most;
    for (int64_t k = first; k < stop; k++) {
      const float value = values[k] * factor, scaled = value < -1.0f ? -1.0f : value > 1.0f ? 1.0f : value;
      int at = 0;
      for (int step = 128; step; step >>= 1) at += scaled > middles[at + step - 1] ? step : 0;
      q[k] = order[at];
    }
    *largest++ = most;
  }
  return 0;
}

/* Computes the numbers of whole blocks: each level times its block's scale, rounded to the type `to`. */
API void adapterkit_from_levels(const uint8_t *packed, int64_t blocks, int64_t size, const float *levels,
                                const float *scales, int32_t to, void *out) {
  typedef double pairs __attribute__((vector_size(32)));
  /* Combine the two levels of each byte into one number of eight bytes. */
  double table[256];
  for (int byte = 0; byte < 256; byte++) {
    const float both[2] = {levels[byte >> 4], levels[byte & 15]};
    memcpy(&table[byte], both, 8);
  }
  for (int64_t b = 0; b < blocks; b++)
    for (int64_t k = 0; k < size; k += LANES, packed += LANES / 2) {
      floats values = (floats)(pairs){table[packed[0]], table[packed[1]], table[packed[2]], table[packed[3]]};
      values *= all(scales[b]);
      const int64_t at = b * size + k;
      if (to == F32) {
        *(loose_floats *)((float *)out + at) = values;
        continue;
      }
      if (to == BF16) {
        /* Correct ties to the even number, as numpy rounds; `narrowed` rounds them away from zero. */
        words bits = (words)values;
        values = (floats)(bits + ((bits >> 16) & 1u) - 1u);
      }
      *(loose_halves *)((uint16_t *)out + at) = narrowed(to, values);
    }
}

/* Quantizes one group by a scale and a zero point; returns the sum of squared errors, added in order. */
INLINE double on_grid(const float *values, int64_t size, float scale, int32_t zero, float low, float high, int32_t *q) {
  double squares[LONGEST], sum = 0.0;
  for (int64_t k = 0; k < size; k++) {
    float value = scale == 0.0f ? 0.0f : values[k] / scale;
    double at = (double)rintf(value) + zero;
    at = at < low ? low : at > high ? high : at;
    q[k] = (int32_t)at;
    double error = (double)(q[k] - zero) * (double)scale - (double)values[k];
    squares[k] = error * error;
  }
  for (int64_t k = 0; k < size; k++) sum += squares[k];
  return sum;
}

/* Computes integers from `low` to `high` for groups of `size` finite numbers. Each group has two candidates for scale
 * and zero point, and uses the one with the smaller error, or the first if the errors are equal. `second` receives the
 * choice. Returns 1 if `size` is too large.
 */
API int32_t adapterkit_grids(const float *values, int64_t groups, int64_t size, const float *const scales[2],
                             const int32_t *const zeros[2], float low, float high, int32_t *q, uint8_t *second) {
  int32_t other[LONGEST];
  if (size > LONGEST) return 1;
  for (int64_t g = 0; g < groups; g++, values += size, q += size) {
    double one = on_grid(values, size, scales[0][g], zeros[0][g], low, high, q);
    double two = on_grid(values, size, scales[1][g], zeros[1][g], low, high, other);
    second[g] = two < one;
    if (second[g]) memcpy(q, other, size * sizeof *q);
  }
  return 0;
}

/* Computes the codes of the nearest 4-bit floats (a sign, two exponent bits, one mantissa bit); ties go to even
 * codes. */
API void adapterkit_e2m1(const float *values, int64_t count, uint8_t *q) {
  static const float middles[7] = {0.25f, 0.75f, 1.25f, 1.75f, 2.5f, 3.5f, 5.0f};
  for (int64_t k = 0; k < count; k++) {
    const float size = fabsf(values[k]);
    uint8_t code = 0;
    /* At a tie, keep the lower code if it is even. A NaN is above all numbers, as numpy sorts it. */
    for (int m = 0; m < 7; m++) code += m % 2 ? !(size < middles[m]) : !(size <= middles[m]);
    q[k] = (uint8_t)(code | (signbit(values[k]) ? 8 : 0));
  }
}

INLINE floats part(int kind, const void *from, int64_t at, int64_t count) {
  const int size = kind == F32 ? 4 : 2;
  if (count >= LANES) return widened(kind, (const char *)from + at * size);
  char few[LANES * 4] = {0};
  memcpy(few, (const char *)from + at * size, count * size);
  return widened(kind, few);
}

INLINE void added(double *sums, floats values) {
  for (int lane = 0; lane < LANES; lane++) sums[lane] += (double)values[lane] * (double)values[lane];
}

INLINE void damage(int kind, int stored, const void *merged, const void *old, const void *new, int64_t count,
                   double *squares) {
  double sums[4][LANES] = {{0}};
  for (int64_t k = 0; k < count; k += LANES) {
    floats M = part(kind, merged, k, count - k), W = part(stored, old, k, count - k), R = part(stored, new, k, count - k);
    added(sums[0], R - M);
    added(sums[1], M);
    added(sums[2], M - W);
    added(sums[3], R - W);
  }
  for (int at = 0; at < 4; at++)
    for (int lane = 0; lane < LANES; lane++) squares[at] += sums[at][lane];
}

/* Adds to `squares` the sums of (new - merged)^2, merged^2, (merged - old)^2 and (new - old)^2, with differences in
 * float32. `kind` is the type of `merged`; `stored` is the type of `old` and `new`. */
API void adapterkit_damage(int32_t kind, int32_t stored, const void *merged, const void *old, const void *new,
                           int64_t count, double *squares) {
#define CASE(a, b) \
  if (kind == a && stored == b) damage(a, b, merged, old, new, count, squares)
  CASE(BF16, BF16);
  CASE(BF16, F32);
  CASE(F16, F16);
  CASE(F16, F32);
  CASE(F32, BF16);
  CASE(F32, F16);
  CASE(F32, F32);
#undef CASE
}
