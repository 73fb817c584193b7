/* Rounds sums with a bound on their error. An element is settled if the sum minus the bound and the sum plus the bound
 * round to the same output. Rounding is monotonic, so the exact sum, which is between the two, rounds to this
 * output. */

#pragma once

#include "lanes.h"

INLINE int none(words flags) {
#if defined(LANES_512)
  return _mm512_test_epi32_mask((__m512i)flags, (__m512i)flags) == 0;
#else
  uint64_t bits[4];
  memcpy(bits, &flags, 32);
  return (bits[0] | bits[1] | bits[2] | bits[3]) == 0;
#endif
}

/* Rounds float64 to 16 bits as numpy does: to bfloat16 by way of float32, to float16 directly. */
INLINE uint16_t rounded(int kind, double value) {
  float near = (float)value;
  uint32_t bits;
  memcpy(&bits, &near, 4);
  if (kind == BF16) return (uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
  /* Rounding to odd makes the second rounding harmless: an inexact float32 is never a tie of float16, and stays on
   * the side of each tie where the float64 value is. Boldo and Melquiond 2008, https://doi.org/10.1109/TC.2007.70819 */
  if (isfinite(near) && (double)near != value) bits = (bits - (fabs((double)near) > fabs(value))) | 1u;
  floats lanes = {0};
  memcpy(&lanes, &bits, 4);
  return narrowed(F16, lanes)[0];
}

/* All pairs of element types that the loops of a merge convert between. */
#define EVERY_PAIR(CASE) \
  CASE(BF16, BF16);      \
  CASE(F16, F16);        \
  CASE(F32, BF16);       \
  CASE(F32, F16);        \
  CASE(BF16, F16);       \
  CASE(F16, BF16)
