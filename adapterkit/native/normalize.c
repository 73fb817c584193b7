/* The inner loop of a DoRA merge: reads rows of a weight, adds a low-rank change, scales each row to its magnitude,
 * rounds once, and writes the result.
 *
 * The norm of a row must be known before its first element can be written. So the rows of a tile are summed in float64
 * into memory that stays in a core's cache; then a second loop over this memory scales and rounds. numpy adds in
 * another order, so every float64 result has a bound on its distance from numpy's result. An element is settled if the
 * result minus the bound and the result plus the bound round to the same output. The few other elements, called open,
 * are counted, and the caller computes their block with numpy. So the bits equal those of numpy's code.
 *
 * On x86-64 this file is compiled twice, like merge.c.
 */

#include <fenv.h>
#include <stdlib.h>

#include "rounding.h"

enum { HALF = LANES / 2, PANEL = 16, PARTS = PANEL / HALF };
/* Rows of a tile: their sums for one panel fill half of the registers. */
#if defined(LANES_512)
enum { TALL = 4 };
#else
enum { TALL = 2 };
#endif

typedef double doubles __attribute__((vector_size(8 * HALF)));
typedef float singles __attribute__((vector_size(4 * HALF)));
typedef doubles loose_doubles __attribute__((aligned(8), may_alias));
typedef int64_t signs __attribute__((vector_size(8 * HALF)));

/* One update, as `merging/compiled.py` prepares it. Columns are filled up with zeros to a multiple of 16. */
typedef struct {
  const double *left;        /* [rows, rank] */
  const double *panels;      /* [width / 16, rank, 16] */
  const double *magnitude;   /* [rows] */
  const double *row_norm;    /* [rows]; row_norm[i] * column_norm[j] is at least the error of V's element i, j */
  const double *column_norm; /* [width] */
  double column_length;      /* the Euclidean norm of column_norm */
  double *change;            /* [rows], written: the squared norm of each row's change */
  int64_t rank;
} Normalized;

INLINE doubles magnitudes(doubles values) { return (doubles)((signs)values & 0x7fffffffffffffff); }

INLINE double summed(doubles values) {
  double total = 0;
  for (int lane = 0; lane < HALF; lane++) total += values[lane];
  return total;
}

/* Convert a vector of float32 to two of float64, and back. Intrinsics are used if compilers would go through memory. */
INLINE void parts_of(floats values, doubles out[2]) {
#if defined(LANES_512)
  out[0] = (doubles)_mm512_cvtps_pd(_mm512_castps512_ps256((__m512)values));
  out[1] = (doubles)_mm512_cvtps_pd(_mm512_extractf32x8_ps((__m512)values, 1));
#elif defined(__x86_64__)
  out[0] = (doubles)_mm256_cvtps_pd(_mm256_castps256_ps128((__m256)values));
  out[1] = (doubles)_mm256_cvtps_pd(_mm256_extractf128_ps((__m256)values, 1));
#else
  singles halves_of[2];
  memcpy(halves_of, &values, sizeof values);
  for (int part = 0; part < 2; part++) out[part] = __builtin_convertvector(halves_of[part], doubles);
#endif
}

INLINE floats joined(doubles low, doubles high) {
#if defined(LANES_512)
  __m512 first = _mm512_castps256_ps512(_mm512_cvtpd_ps((__m512d)low));
  return (floats)_mm512_insertf32x8(first, _mm512_cvtpd_ps((__m512d)high), 1);
#elif defined(__x86_64__)
  return (floats)_mm256_set_m128(_mm256_cvtpd_ps((__m256d)high), _mm256_cvtpd_ps((__m256d)low));
#else
  singles parts[2] = {__builtin_convertvector(low, singles), __builtin_convertvector(high, singles)};
  floats both;
  memcpy(&both, parts, sizeof both);
  return both;
#endif
}

/* Reads 16 elements as float64. */
INLINE void read_panel(int from, const char *weight, doubles out[PARTS]) {
  for (int part = 0; part < PARTS; part += 2)
    parts_of(widened(from, weight + part * HALF * (from == F32 ? 4 : 2)), out + part);
}

/* Whether the rounded value is an infinity or a NaN; numpy computes these. */
INLINE int strange(int to, uint16_t bits) {
  const uint16_t exponent = to == BF16 ? 0x7f80 : 0x7c00;
  return (bits & exponent) == exponent;
}

/* Rounds one value that has an error of at most `error`; returns 1 if the rounding is open. */
INLINE int settle(int to, double value, double error, uint16_t *out) {
  uint16_t low = rounded(to, value - error), high = rounded(to, value + error);
  /* Without an error, value - 0 and value + 0 would differ in the sign of a zero. */
  if (error == 0) low = high = rounded(to, value);
  *out = low;
  return low != high || strange(to, low);
}

/* Rounds 16 values; returns how many of the first `columns` are open. */
INLINE int64_t round_panel(int to, const doubles value[PARTS], const doubles error[PARTS], uint16_t *out,
                           int64_t columns) {
  const uint16_t exponent = to == BF16 ? 0x7f80 : 0x7c00;
  words any = {0};
#pragma GCC unroll 2
  for (int part = 0; part < PARTS; part += 2) {
    doubles below[2], above[2];
#pragma GCC unroll 2
    for (int b = 0; b < 2; b++) {
      /* Widen the interval by one float32 rounding: then a value whose nearest float32 is a tie is always open. */
      doubles reach = error[part + b] + magnitudes(value[part + b]) * 0x1p-23;
      below[b] = value[part + b] - reach;
      above[b] = value[part + b] + reach;
    }
    halves low = narrowed(to, joined(below[0], below[1])), high = narrowed(to, joined(above[0], above[1]));
    any |= __builtin_convertvector((low ^ high) | (halves)((high & exponent) == exponent), words);
    *(loose_halves *)(out + part * HALF) = high;
  }
  if (__builtin_expect(none(any), 1)) return 0;
  int64_t open = 0;
  for (int64_t at = 0; at < columns; at++)
    open += settle(to, value[at / HALF][at % HALF], error[at / HALF][at % HALF], out + at);
  return open;
}

/* Sums `tall` rows into `rows`, `[tall, padded]`, and their squares into `squares`. */
INLINE void sum_rows(int from, int tall, const char *weight, int64_t width, int64_t padded, const double *left,
                     const Normalized *n, double *rows, double squares[TALL]) {
  const int size = from == F32 ? 4 : 2;
  const int64_t rank = n->rank;
  doubles total[TALL] = {{0}};
  for (int64_t j = 0; j < width; j += PANEL) {
    const double *panel = n->panels + j * rank;
    doubles sum[TALL][PARTS];
#pragma GCC unroll 4
    for (int a = 0; a < tall; a++)
#pragma GCC unroll 4
      for (int part = 0; part < PARTS; part++) sum[a][part] = (doubles){0};
    for (int64_t k = 0; k < rank; k++) {
      doubles right[PARTS];
#pragma GCC unroll 4
      for (int part = 0; part < PARTS; part++) right[part] = *(const loose_doubles *)(panel + k * PANEL + part * HALF);
#pragma GCC unroll 4
      for (int a = 0; a < tall; a++) {
        double scale = left[a * rank + k];
#pragma GCC unroll 4
        for (int part = 0; part < PARTS; part++) sum[a][part] += scale * right[part];
      }
    }
#pragma GCC unroll 4
    for (int a = 0; a < tall; a++) {
      doubles given[PARTS];
      const char *here = weight + (a * width + j) * size;
      char whole[PANEL * 4] = {0};
      if (width - j < PANEL) here = memcpy(whole, here, (width - j) * size);
      read_panel(from, here, given);
#pragma GCC unroll 4
      for (int part = 0; part < PARTS; part++) {
        doubles value = given[part] + sum[a][part];
        *(loose_doubles *)(rows + a * padded + j + part * HALF) = value;
        total[a] += value * value;
      }
    }
  }
  for (int a = 0; a < tall; a++) squares[a] = summed(total[a]);
}

/* Scales one summed row, rounds and writes it; returns how many elements are open, or -1 if its norm is out of
 * range. */
INLINE int64_t write_row(int from, int to, const char *weight, uint16_t *out, int64_t width, double magnitude,
                         double squares, double row_norm, const Normalized *n, const double *row, double *change) {
  const int size = from == F32 ? 4 : 2;
  /* Outside of this range, squares lose digits or overflow. A NaN is outside of it, too. */
  if (!(squares > 0x1p-700 && squares < 0x1p700)) return -1;
  double norm = sqrt(squares), scale = magnitude / norm;
  /* The norm's relative error: from V's elements, from summing `width` squares in any order, from root and quotient. */
  double relative = row_norm * n->column_length / norm + (double)(width + 64) * 0x1p-52;
  double of_row = fabs(scale) * row_norm;
  doubles moved = {0};
  int64_t open = 0;
  for (int64_t j = 0; j < width; j += PANEL) {
    int64_t columns = width - j < PANEL ? width - j : PANEL;
    doubles value[PARTS], error[PARTS], given[PARTS];
    const char *here = weight + j * size;
    char whole[PANEL * 4] = {0};
    if (columns < PANEL) here = memcpy(whole, here, columns * size);
    read_panel(from, here, given);
#pragma GCC unroll 4
    for (int part = 0; part < PARTS; part++) {
      value[part] = *(const loose_doubles *)(row + j + part * HALF) * scale;
      error[part] = of_row * *(const loose_doubles *)(n->column_norm + j + part * HALF) +
                    magnitudes(value[part]) * relative;
      doubles step = value[part] - given[part];
      moved += step * step;
    }
    if (columns == PANEL) {
      open += round_panel(to, value, error, out + j, PANEL);
    } else {
      uint16_t made[PANEL];
      open += round_panel(to, value, error, made, columns);
      memcpy(out + j, made, columns * 2);
    }
  }
  *change = summed(moved);
  return open;
}

INLINE int64_t normalized(int from, int to, const char *weight, uint16_t *out, int64_t rows, int64_t width,
                          const Normalized *n) {
  const int size = from == F32 ? 4 : 2;
  const int64_t padded = (width + PANEL - 1) / PANEL * PANEL;
  double *sums = malloc(sizeof(double) * TALL * padded);
  if (!sums) return -1;
  int64_t open = 0;
  for (int64_t i = 0; i < rows && open >= 0;) {
    int tall = rows - i < TALL ? 1 : TALL;
    double squares[TALL];
    const char *here = weight + i * width * size;
    const double *left = n->left + i * n->rank;
    if (tall == TALL)
      sum_rows(from, TALL, here, width, padded, left, n, sums, squares);
    else
      sum_rows(from, 1, here, width, padded, left, n, sums, squares);
    for (int a = 0; a < tall; a++, i++) {
      int64_t more = write_row(from, to, weight + i * width * size, out + i * width, width, n->magnitude[i],
                               squares[a], n->row_norm[i], n, sums + a * padded, n->change + i);
      open = more < 0 || open < 0 ? -1 : open + more;
    }
  }
  free(sums);
  return open;
}

int64_t adapterkit_normalize_512(int32_t, int32_t, const char *, uint16_t *, int64_t, int64_t, const Normalized *);
extern int adapterkit_used_lanes;

#if defined(LANES_512)
#define NORMALIZE adapterkit_normalize_512
#else
#define NORMALIZE adapterkit_normalize
API
#endif
/* Writes magnitude * V / |V| by rows, V = weight + left @ right, to `out`, both `[rows, width]`; returns how many
 * elements are open, -1 if a row's norm is out of range. */
int64_t NORMALIZE(int32_t from, int32_t to, const char *weight, uint16_t *out, int64_t rows, int64_t width,
                  const Normalized *n) {
#if defined(__x86_64__) && !defined(LANES_512)
  if (adapterkit_used_lanes > LANES) return adapterkit_normalize_512(from, to, weight, out, rows, width, n);
#endif
  /* Disable flushing of small numbers to zero, which another library may have enabled; the bounds do not cover it. */
  fenv_t before;
  fegetenv(&before);
  fesetenv(FE_DFL_ENV);
  int64_t open = -1;
#define CASE(a, b) \
  if (from == a && to == b) open = normalized(a, b, weight, out, rows, width, n)
  EVERY_PAIR(CASE);
#undef CASE
  fesetenv(&before);
  return open;
}
