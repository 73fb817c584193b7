/* Drops random entries of changes, for DARE and DELLA. The loop computes the same as `ops/combiners/_entrywise.py` with
 * numpy, but works on one row after the other, which stays in the L1 cache. The loop uses the same random words and
 * comparisons, and one product and one quotient for each entry, so the result has the same bits. */

#include <stdlib.h>

#include "lanes.h"

enum { PER_COUNT = 8, DIGITS = 256, BITS = 11, PARTS = 1 << BITS };

/* A row is first sorted by 22 bits of each magnitude: 16 octaves below the largest, each divided into 2^18 parts. */
enum { OCTAVES = 16, MANTISSA = 52, LEADING = 34, PASSES = 2 };

/* Largest number of swaps of neighbouring keys per column; if more are needed, the keys are sorted by all bits. */
enum { MOVES = 4 };

/* Computes Philox4x64-10 (Salmon et al. 2011) for one counter: eight words of 32 bits, low words first. */
static inline void philox(uint64_t counter, uint64_t key, uint32_t *words) {
  uint64_t c0 = counter, c1 = 0, c2 = 0, c3 = 0, k0 = key, k1 = 0;
  for (int round = 0; round < 10; round++) {
    unsigned __int128 one = (unsigned __int128)0xD2E7470EE14C6C93u * c0;
    unsigned __int128 two = (unsigned __int128)0xCA5A826395121157u * c2;
    c0 = (uint64_t)(two >> 64) ^ c1 ^ k0;
    c2 = (uint64_t)(one >> 64) ^ c3 ^ k1;
    c1 = (uint64_t)two;
    c3 = (uint64_t)one;
    k0 += 0x9E3779B97F4A7C15u;
    k1 += 0xBB67AE8584CAA73Bu;
  }
  uint64_t made[4] = {c0, c1, c2, c3};
  for (int i = 0; i < 4; i++) {
    words[2 * i] = (uint32_t)made[i];
    words[2 * i + 1] = (uint32_t)(made[i] >> 32);
  }
}

/* Writes the words `first` to `first + count` of a stream. */
static void stream(uint64_t key, uint64_t first, int64_t count, uint32_t *words) {
  uint32_t some[PER_COUNT];
  uint64_t block = first / PER_COUNT;
  int64_t skipped = (int64_t)(first % PER_COUNT), done = 0;
  if (skipped) {
    philox(++block, key, some); /* numpy increments the counter before it draws */
    for (int64_t i = skipped; i < PER_COUNT && done < count; i++) words[done++] = some[i];
  }
  for (; done + PER_COUNT <= count; done += PER_COUNT) philox(++block, key, words + done);
  if (done < count) {
    philox(++block, key, some);
    memcpy(words + done, some, (size_t)(count - done) * sizeof *words);
  }
}

/* Sorts by digits of eight bits, from the lowest; a digit that is equal in all keys is skipped. */
static void radix(uint64_t *keys, uint64_t *other, int64_t count) {
  uint64_t *from = keys, *to = other;
  for (int shift = 0; shift < 64; shift += 8) {
    int64_t starts[DIGITS] = {0}, total = 0;
    for (int64_t i = 0; i < count; i++) starts[(from[i] >> shift) % DIGITS]++;
    if (starts[(from[0] >> shift) % DIGITS] == count) continue;
    for (int d = 0; d < DIGITS; d++) {
      int64_t here = starts[d];
      starts[d] = total;
      total += here;
    }
    for (int64_t i = 0; i < count; i++) to[starts[(from[i] >> shift) % DIGITS]++] = from[i];
    uint64_t *swap = from;
    from = to, to = swap;
  }
  if (from != keys) memcpy(keys, from, (size_t)count * sizeof *keys);
}

/* Buffers for one row: keys, sorted keys, probabilities and random words. `low` is the mask of the column's bits. */
typedef struct {
  uint64_t *keys, *sorted;
  double *chance;
  uint32_t *words;
  uint64_t low;
} Row;

static inline uint64_t leading(uint64_t key, uint64_t least) {
  return (key > least ? key - least : 0) >> LEADING;
}

/* Sorts the magnitudes of a row, with the column in the last bits of each key; equal magnitudes keep the order of their
 * columns. Two sorts by leading bits leave few keys out of order, so moving these keys rarely causes a branch
 * misprediction. This takes half the time of sorting small buckets, and half the time of numpy's sort. Returns the
 * sorted keys. */
static uint64_t *sort_row(const double *D, int64_t columns, Row *row) {
  uint64_t largest = 0, *from = row->keys, *to = row->sorted;
  for (int64_t j = 0; j < columns; j++) {
    uint64_t bits;
    memcpy(&bits, D + j, 8);
    bits = (bits & ~((uint64_t)1 << 63) & ~row->low) | (uint64_t)j;
    from[j] = bits;
    largest = bits > largest ? bits : largest;
  }
  uint64_t reach = ((uint64_t)OCTAVES << MANTISSA) - 1, least = largest > reach ? largest - reach : 0;
  int32_t starts[PASSES][PARTS] = {{0}};
  for (int64_t j = 0; j < columns; j++) {
    uint64_t bits = leading(from[j], least);
    for (int p = 0; p < PASSES; p++) starts[p][(bits >> BITS * p) % PARTS]++;
  }
  for (int p = 0; p < PASSES; p++) {
    int32_t total = 0;
    for (int d = 0; d < PARTS; d++) {
      int32_t here = starts[p][d];
      starts[p][d] = total;
      total += here;
    }
    for (int64_t j = 0; j < columns; j++) {
      uint64_t key = from[j];
      to[starts[p][(leading(key, least) >> BITS * p) % PARTS]++] = key;
    }
    uint64_t *swap = from;
    from = to, to = swap;
  }
  int64_t moves = MOVES * columns;
  for (int64_t i = 1; i < columns; i++) {
    uint64_t key = from[i];
    int64_t j = i;
    for (; j > 0 && from[j - 1] > key; j--) from[j] = from[j - 1];
    from[j] = key;
    moves -= i - j;
    if (moves < 0) {
      radix(from, to, columns);
      break;
    }
  }
  return from;
}

/* Drops entries of `rows` x `columns` numbers in place. Entry n of the block is kept if word `first + n` of the stream,
 * divided by 2^32, is below the entry's probability; if `inverse`, the entry is divided by the probability. The
 * probability is `chance`; if `slope` is not zero, `slope` times the entry's rank among its row's magnitudes is added.
 * Returns 0, or 1 if the memory for a row cannot be allocated. */
API int32_t adapterkit_drop(double *D, int64_t rows, int64_t columns, uint64_t key, uint64_t first, double chance,
                            double slope, int32_t inverse) {
  Row row = {0};
  int bits = 0, fails;
  while (bits < 62 && ((columns - 1 > 1 ? columns - 1 : 1) >> bits)) bits++;
  row.low = ((uint64_t)1 << bits) - 1;
  if (columns > INT32_MAX / 2) return 1;
  row.keys = malloc((size_t)columns * 8);
  row.sorted = malloc((size_t)columns * 8);
  row.chance = malloc((size_t)columns * 8);
  row.words = malloc((size_t)columns * 4);
  fails = !row.keys || !row.sorted || !row.chance || !row.words;
  double floor = chance > 2.2250738585072014e-308 ? chance : 2.2250738585072014e-308;
  for (int64_t i = 0; i < rows && !fails; i++, D += columns) {
    stream(key, first + (uint64_t)(i * columns), columns, row.words);
    if (slope == 0.0) {
      for (int64_t j = 0; j < columns; j++) {
        double kept = (double)row.words[j] * 0x1p-32 < chance ? 1.0 : 0.0;
        D[j] = inverse ? D[j] * kept / floor : D[j] * kept;
      }
      continue;
    }
    const uint64_t *sorted = sort_row(D, columns, &row);
    for (int64_t place = 0; place < columns; place++)
      row.chance[sorted[place] & row.low] = (double)place * slope + chance;
    for (int64_t j = 0; j < columns; j++) {
      double kept = (double)row.words[j] * 0x1p-32 < row.chance[j] ? 1.0 : 0.0;
      D[j] = inverse ? D[j] * kept / row.chance[j] : D[j] * kept;
    }
  }
  free(row.keys);
  free(row.sorted);
  free(row.chance);
  free(row.words);
  return fails;
}
