/* The inner loop of a merge: reads a block of a weight, adds a low-rank change, rounds once, and writes the result.
 *
 * Each sum is computed in float32, with a bound on its error. An element is called settled if the sum minus the bound
 * and the sum plus the bound round to the same output. Rounding is monotonic, so the float64 sum, which is between the
 * two, rounds to the same output. The other elements, about one in a thousand, are called open. They are summed again
 * in float64, also with a bound. Elements that are still open are counted, and the caller computes their block with
 * numpy. So the result has the bits of numpy's float64 code, whatever the order in which the compiler adds.
 *
 * This file is plain C with the vector types of GCC and Clang, and includes no headers of Python. So one library serves
 * all versions of Python. On x86-64 this file is compiled twice: with AVX2, and with LANES_512 for processors that have
 * AVX-512.
 */

#include <fenv.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "rounding.h"

typedef double doubles __attribute__((vector_size(32)));
typedef doubles loose_doubles __attribute__((aligned(8), may_alias));

/* TALL is the number of rows of a tile: their sums fill the registers. The last rows of a block are computed in tiles
 * of three rows or of one row. A tile is two vectors wide. Columns of the right factor are stored in panels of 16, and
 * padded to 32. */
enum { WIDE = 2 * LANES, PANEL = 16, SHORT = 3, CHUNK = 16 };
#if defined(LANES_512)
enum { TALL = 7 };
#else
enum { TALL = 6 };
#endif
enum { VERSION = 11 };

/* The right factor is used in strips of this many bytes: a strip stays in a core's L2 cache for all rows. */
enum { STRIP = 192 << 10 };

/* One factor pair, as `merging/compiled.py` prepares it. */
typedef struct {
  const float *left;         /* [rows, rank] */
  const float *panels;       /* [width / 16, rank, 16]: columns in groups of 16, filled up with zeros to 32 */
  const float *row_bound;    /* [rows]; row_bound[i] * column_bound[j] is at least the error of element i, j */
  const float *column_bound; /* [width], padded with zeros like the panels */
  const double *left64;      /* [rows, rank] */
  const double *right64;     /* [width, rank]: transposed, so that a column is contiguous */
  const double *row_norm;    /* [rows]; row_norm[i] * column_norm[j] bounds the float64 error in the same way */
  const double *column_norm; /* [width] */
  int64_t rank;
} Factors;

/* Stores the upper halves of the words of two vectors. */
INLINE void store_upper(uint16_t *out, words one, words two) {
#if defined(LANES_512)
  _mm256_storeu_si256((__m256i *)out, _mm512_cvtepi32_epi16((__m512i)(one >> 16)));
  _mm256_storeu_si256((__m256i *)(out + LANES), _mm512_cvtepi32_epi16((__m512i)(two >> 16)));
#elif defined(__x86_64__)
  __m256i packed = _mm256_packus_epi32((__m256i)(one >> 16), (__m256i)(two >> 16));
  _mm256_storeu_si256((__m256i *)out, _mm256_permute4x64_epi64(packed, 0xd8));
#else
  *(loose_halves *)out = __builtin_convertvector(one >> 16, halves);
  *(loose_halves *)(out + LANES) = __builtin_convertvector(two >> 16, halves);
#endif
}

INLINE double element(int kind, const void *from, int64_t at) {
  if (kind == F32) return ((const float *)from)[at];
  uint16_t lanes[LANES] = {((const uint16_t *)from)[at]};
  return widened(kind, lanes)[0];
}

/* Sums one element in float64 and writes it; returns 1 if the rounding is still open. */
static int settle(int from, int to, const void *weight, uint16_t *out, int64_t at, const Factors *f, int64_t i,
                  int64_t j) {
  const double *left = f->left64 + i * f->rank, *right = f->right64 + j * f->rank;
  doubles sums[2] = {{0}, {0}};
  int64_t k = 0;
  for (; k + 8 <= f->rank; k += 8) {
    sums[0] += *(const loose_doubles *)(left + k) * *(const loose_doubles *)(right + k);
    sums[1] += *(const loose_doubles *)(left + k + 4) * *(const loose_doubles *)(right + k + 4);
  }
  sums[0] += sums[1];
  double change = (sums[0][0] + sums[0][1]) + (sums[0][2] + sums[0][3]);
  for (; k < f->rank; k++) change += left[k] * right[k];
  double value = element(from, weight, at) + change;
  double error = f->row_norm[i] * f->column_norm[j] + fabs(value) * 0x1p-51;
  uint16_t low = rounded(to, value - error), high = rounded(to, value + error);
  /* If the change is exactly zero, the sum is the weight, and its rounding is known. */
  if (f->row_norm[i] * f->column_norm[j] == 0.0) low = high = rounded(to, value);
  out[at] = low;
  return low != high || value != value;
}

/* Sums the marked elements of a tile in float64. Never inlined, so that the main sums keep the registers. */
static __attribute__((noinline)) int64_t settle_tile(int from, int to, int tall, words (*differ)[2],
                                                           const char *weight, uint16_t *out, int64_t stride,
                                                           const Factors *f, int64_t i, int64_t j, int64_t columns) {
  int64_t open = 0;
  for (int a = 0; a < tall; a++)
    for (int b = 0; b < 2; b++) {
      if (none(differ[a][b])) continue;
      for (int lane = 0; lane < LANES; lane++) {
        int64_t column = LANES * b + lane;
        if (differ[a][b][lane] && column < columns)
          open += settle(from, to, weight, out, a * stride + column, f, i + a, j + column);
      }
    }
  return open;
}

/* Computes a tile of `tall` rows and WIDE columns. All pointers (`weight`, `out`, `left`, `panel`) refer to its
 * start. */
INLINE int64_t tile(int from, int to, int tall, const char *weight, uint16_t *out, int64_t stride, const float *left,
                    const float *panel, const float *row_bound, const float *column_bound, const Factors *f, int64_t i,
                    int64_t j, int64_t columns) {
  const int size = from == F32 ? 4 : 2;
  const int64_t rank = f->rank;
  /* The second vector is the other half of the panel, or all of the next panel. */
  const float *second = panel + (LANES < PANEL ? LANES : PANEL * rank);
  floats sum[TALL][2] = {{{0}}}, part[TALL][2];
  /* Add up sums of at most CHUNK products, so that the bound grows with CHUNK + rank / CHUNK, not with the rank. */
  for (int64_t first = 0;; first += CHUNK) {
    int64_t last = rank - first < CHUNK ? rank : first + CHUNK;
#pragma GCC unroll 12
    for (int a = 0; a < tall; a++) part[a][0] = part[a][1] = (floats){0};
    for (int64_t k = first; k < last; k++) {
      floats right0 = *(const loose_floats *)(panel + PANEL * k);
      floats right1 = *(const loose_floats *)(second + PANEL * k);
#if defined(LANES_512)
      /* Keep both vectors in registers. Compilers would load them again for each row, which would limit the speed. */
      __asm__("" : "+v"(right0), "+v"(right1));
#endif
#pragma GCC unroll 12
      for (int a = 0; a < tall; a++) {
        float scale = left[a * rank + k];
        part[a][0] += scale * right0;
        part[a][1] += scale * right1;
      }
    }
#pragma GCC unroll 12
    for (int a = 0; a < tall; a++) {
      part[a][0] = sum[a][0] += part[a][0];
      part[a][1] = sum[a][1] += part[a][1];
    }
    if (last == rank) break;
  }
  words differ[TALL][2], any = {0};
#pragma GCC unroll 12
  for (int a = 0; a < tall; a++) {
    words upper[2];
#pragma GCC unroll 2
    for (int b = 0; b < 2; b++) {
      floats value = widened(from, weight + (a * stride + LANES * b) * size) + part[a][b];
      words size_of = (words)value & 0x7fffffffu;
      floats error = row_bound[a] * *(const loose_floats *)(column_bound + LANES * b) + (floats)size_of * 0x1.8p-23f;
      floats below = value - error, above = value + error;
      /* Leave NaN and infinity to numpy, which decides the bits of a NaN. */
      differ[a][b] = (words)((flags)size_of > 0x7f7fffff);
      if (to == BF16) {
        /* Both bounds round to the same bfloat16 if nothing above the sixteenth bit differs. */
        upper[b] = (words)above + 0x8000u;
        differ[a][b] |= (upper[b] ^ ((words)below + 0x8000u)) & 0xffff0000u;
      } else {
        halves low = narrowed(to, below), high = narrowed(to, above);
        *(loose_halves *)(out + a * stride + LANES * b) = high;
        differ[a][b] |= __builtin_convertvector(low ^ high, words);
      }
      any |= differ[a][b];
    }
    if (to == BF16) store_upper(out + a * stride, upper[0], upper[1]);
  }
  if (__builtin_expect(none(any), 1)) return 0;
  return settle_tile(from, to, tall, differ, weight, out, stride, f, i, j, columns);
}

/* Computes a tile at the right edge in a separate buffer, because the tile is wider than the rest of the weight. */
INLINE int64_t edge(int from, int to, int tall, const char *weight, uint16_t *out, int64_t stride, const float *left,
                    const float *panel, const float *row_bound, const float *column_bound, const Factors *f, int64_t i,
                    int64_t j, int64_t columns) {
  const int size = from == F32 ? 4 : 2;
  char given[TALL * WIDE * 4] = {0};
  uint16_t made[TALL * WIDE];
  for (int a = 0; a < tall; a++) memcpy(given + a * WIDE * size, weight + a * stride * size, columns * size);
  int64_t open = tile(from, to, tall, given, made, WIDE, left, panel, row_bound, column_bound, f, i, j, columns);
  for (int a = 0; a < tall; a++) memcpy(out + a * stride, made + a * WIDE, columns * 2);
  return open;
}

INLINE int64_t block(int from, int to, const char *weight, uint16_t *out, int64_t rows, int64_t width,
                     const Factors *f) {
  const int size = from == F32 ? 4 : 2;
  int64_t open = 0, strip = STRIP / (4 * f->rank) / WIDE * WIDE;
  if (strip < WIDE) strip = WIDE;
  for (int64_t start = 0; start < width; start += strip) {
    int64_t stop = width - start < strip ? width : start + strip;
    for (int64_t i = 0; i < rows;) {
      int tall = rows - i < SHORT ? 1 : rows - i < TALL ? SHORT : TALL;
      for (int64_t j = start; j < stop; j += WIDE) {
        const char *here = weight + (i * width + j) * size;
        uint16_t *there = out + i * width + j;
        const float *left = f->left + i * f->rank, *panel = f->panels + j * f->rank;
        int64_t columns = width - j;
#define AT(shape, tall) \
  shape(from, to, tall, here, there, width, left, panel, f->row_bound + i, f->column_bound + j, f, i, j, columns)
        if (columns >= WIDE)
          open += tall == TALL ? AT(tile, TALL) : tall == SHORT ? AT(tile, SHORT) : AT(tile, 1);
        else
          open += tall == TALL ? AT(edge, TALL) : tall == SHORT ? AT(edge, SHORT) : AT(edge, 1);
#undef AT
      }
      i += tall;
    }
  }
  return open;
}

/* `adapterkit_add` of this file, compiled with LANES_512. */
int64_t adapterkit_add_512(int32_t, int32_t, const char *, uint16_t *, int64_t, int64_t, const Factors *);

#if defined(LANES_512)
#define ADD adapterkit_add_512
#else
#define ADD adapterkit_add

/* Whether the processor has AVX-512 (F, DQ, BW, VL) and the system saves its registers. */
static int has_512(void) {
#if defined(__x86_64__)
  uint32_t eax, ebx, ecx, edx, low, high;
  const uint32_t wanted = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (low & 0xe6) == 0xe6 && __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && !(~ebx & wanted);
#else
  return 0;
#endif
}

/* All files that are compiled twice read this variable. */
int adapterkit_used_lanes = LANES;

/* Sets the number of elements per vector in `adapterkit_add`, at most `most`; returns this number. */
API int32_t adapterkit_lanes(int32_t most) {
  adapterkit_used_lanes = most >= 2 * LANES && has_512() ? 2 * LANES : LANES;
  return adapterkit_used_lanes;
}

/* Returns the library's version, for `native/__init__.py`; 0 if the processor lacks instructions that it uses. */
API int32_t adapterkit_runs(void) {
#if defined(__x86_64__)
  /* Do not use __builtin_cpu_supports: it needs a runtime library that not every compiler has. */
  uint32_t eax, ebx, ecx, edx, low, high;
  const uint32_t fma = 1u << 12, saved = 1u << 27, half = 1u << 29, avx2 = 1u << 5;
  if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx) || (~ecx & (fma | saved | half))) return 0;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  /* Check that the system saves the wide registers when it switches threads. */
  if ((low & 6) != 6 || !__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || !(ebx & avx2)) return 0;
#endif
  return VERSION;
}

#endif

#if !defined(LANES_512)
API
#endif
/* Writes `weight + left @ right` to `out`, both `[rows, width]`; returns the number of open elements. */
int64_t ADD(int32_t from, int32_t to, const char *weight, uint16_t *out, int64_t rows, int64_t width,
            const Factors *f) {
#if defined(__x86_64__) && !defined(LANES_512)
  if (adapterkit_used_lanes > LANES) return adapterkit_add_512(from, to, weight, out, rows, width, f);
#endif
  /* Disable flushing of small numbers to zero, which another library may have enabled; the bounds do not cover it. */
  fenv_t before;
  fegetenv(&before);
  fesetenv(FE_DFL_ENV);
  int64_t open = -1;
#define CASE(a, b) \
  if (from == a && to == b) open = block(a, b, weight, out, rows, width, f)
  EVERY_PAIR(CASE);
#undef CASE
  fesetenv(&before);
  return open;
}
