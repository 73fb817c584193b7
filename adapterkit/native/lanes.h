/* Vectors of eight float32 numbers (the vector types of GCC and Clang), and their conversions from and to 16 bits.
 * In a source that is compiled with LANES_512, a vector has sixteen numbers. */

#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#if defined(_WIN32)
#define API __declspec(dllexport)
#else
#define API __attribute__((visibility("default")))
#endif

#define INLINE static inline __attribute__((always_inline))

#if defined(LANES_512)
enum { LANES = 16 };
#else
enum { LANES = 8 };
#endif

typedef float floats __attribute__((vector_size(4 * LANES)));
typedef int32_t flags __attribute__((vector_size(4 * LANES)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));
typedef floats loose_floats __attribute__((aligned(4), may_alias));
typedef halves loose_halves __attribute__((aligned(2), may_alias));

/* Element types, by the numbers of `native/__init__.py`. */
enum { BF16, F16, F32 };

INLINE floats widened(int kind, const void *from) {
  if (kind == F32) return *(const loose_floats *)from;
#if defined(LANES_512)
  __m256i raw = _mm256_loadu_si256((const __m256i *)from);
  if (kind == F16) return (floats)_mm512_cvtph_ps(raw);
  return (floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16);
#elif defined(__x86_64__)
  __m128i raw = _mm_loadu_si128((const __m128i *)from);
  if (kind == F16) return (floats)_mm256_cvtph_ps(raw);
  return (floats)_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16);
#elif defined(__aarch64__)
  if (kind == F16) {
    float16x8_t raw = vreinterpretq_f16_u16(vld1q_u16((const uint16_t *)from));
    float32x4_t low = vcvt_f32_f16(vget_low_f16(raw)), high = vcvt_f32_f16(vget_high_f16(raw));
    floats both;
    memcpy(&both, &low, 16);
    memcpy((char *)&both + 16, &high, 16);
    return both;
  }
  return (floats)(__builtin_convertvector(*(const loose_halves *)from, words) << 16);
#endif
}

/* Rounds to nearest. Ties of bfloat16 go away from zero, which does not matter: `settled` accepts no tie. */
INLINE halves narrowed(int kind, floats values) {
#if defined(LANES_512)
  if (kind == F16) return (halves)_mm512_cvtps_ph((__m512)values, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  return (halves)_mm512_cvtepi32_epi16((__m512i)(((words)values + 0x8000u) >> 16));
#elif defined(__x86_64__)
  if (kind == F16) return (halves)_mm256_cvtps_ph((__m256)values, _MM_FROUND_TO_NEAREST_INT);
  __m256i bits = (__m256i)(((words)values + 0x8000u) >> 16);
  __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(bits, bits), 0xd8);
  return (halves)_mm256_castsi256_si128(packed);
#elif defined(__aarch64__)
  if (kind == F16) {
    float32x4_t low, high;
    memcpy(&low, &values, 16);
    memcpy(&high, (char *)&values + 16, 16);
    return (halves)vreinterpretq_u16_f16(vcombine_f16(vcvt_f16_f32(low), vcvt_f16_f32(high)));
  }
  return __builtin_convertvector(((words)values + 0x8000u) >> 16, halves);
#endif
}

#if !defined(LANES_512)
INLINE floats all(float value) { return (floats){value, value, value, value, value, value, value, value}; }

INLINE floats chosen(flags where, floats one, floats other) {
  return (floats)((where & (flags)one) | (~where & (flags)other));
}

/* a < b ? a : b, and a > b ? a : b, also for NaN. */
#if defined(__x86_64__)
INLINE floats lower_of(floats a, floats b) { return (floats)_mm256_min_ps((__m256)a, (__m256)b); }
INLINE floats higher_of(floats a, floats b) { return (floats)_mm256_max_ps((__m256)a, (__m256)b); }
INLINE floats nearest(floats a) {
  return (floats)_mm256_round_ps((__m256)a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
#else
INLINE floats lower_of(floats a, floats b) { return chosen(a < b, a, b); }
INLINE floats higher_of(floats a, floats b) { return chosen(a > b, a, b); }
INLINE floats nearest(floats a) {
  for (int lane = 0; lane < LANES; lane++) a[lane] = rintf(a[lane]);
  return a;
}
#endif

INLINE floats within(floats value, floats low, floats high) { return lower_of(high, higher_of(low, value)); }

INLINE floats over(floats value, floats by) { return chosen(by == all(0), all(0), value / by); }
#endif
