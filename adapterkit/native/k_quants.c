/* The searches of `io/ggml_k_blocks.py`: sums of the same float32 numbers in the order in which numpy adds them, and so
 * the same bits. Compiled without fused operations, which round once where numpy rounds twice.
 *
 * Runs of numbers are columns, as numpy has them there; sixteen are worked on at a time.
 */

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(_WIN32)
#define API __declspec(dllexport)
#else
#define API __attribute__((visibility("default")))
#endif

enum { TOGETHER = 16, LONGEST = 32, STRETCHES = 6 };

static const float stretches[STRETCHES] = {-0.6f, -0.3f, 0.0f, 0.3f, 0.6f, 0.9f};

static inline float divided(float value, float by) { return by == 0.0f ? 0.0f : value / by; }

static inline float clipped(float value, float low, float high) {
  return value < low ? low : value > high ? high : value;
}

static int64_t taken(float (*own)[TOGETHER], const float *x, int64_t size, int64_t runs, int64_t start) {
  int64_t count = runs - start < TOGETHER ? runs - start : TOGETHER;
  for (int64_t k = 0; k < size; k++) memcpy(own[k], x + k * runs + start, count * sizeof(float));
  return count;
}

/* For each column of `x` [size, runs], the scale with the least squared error for whole numbers from -most to most - 1. */
API void adapterkit_around_zero(const float *x, int64_t size, int64_t runs, float most, float *scale) {
  for (int64_t start = 0; start < runs; start += TOGETHER) {
    float own[LONGEST][TOGETHER] = {{0}}, largest[TOGETHER], best[TOGETHER], found[TOGETHER];
    int64_t count = taken(own, x, size, runs, start);
    for (int c = 0; c < TOGETHER; c++) {
      float top = own[0][c], bottom = own[0][c];
      for (int64_t k = 1; k < size; k++) {
        top = own[k][c] > top ? own[k][c] : top;
        bottom = own[k][c] < bottom ? own[k][c] : bottom;
      }
      largest[c] = top > -bottom ? top : bottom;
      best[c] = -1.0f;
      found[c] = 0.0f;
    }
    for (int s = 0; s < STRETCHES; s++) {
      float factor[TOGETHER], xq[TOGETHER] = {0}, qq[TOGETHER] = {0};
      for (int c = 0; c < TOGETHER; c++) factor[c] = divided(-most - stretches[s], largest[c]);
      for (int64_t k = 0; k < size; k++)
        for (int c = 0; c < TOGETHER; c++) {
          float q = clipped(rintf(own[k][c] * factor[c]), -most, most - 1.0f);
          xq[c] += own[k][c] * q;
          qq[c] += q * q;
        }
      for (int c = 0; c < TOGETHER; c++) {
        float fitted = divided(xq[c], qq[c]), gain = fitted * xq[c];
        /* numpy's maximum keeps a NaN. */
        if (gain > best[c]) found[c] = fitted;
        if (gain > best[c] || gain != gain) best[c] = gain;
      }
    }
    memcpy(scale + start, found, count * sizeof(float));
  }
}

/* Likewise the scale, and how far below zero a column begins, for whole numbers from 0 to most. */
API void adapterkit_with_least(const float *x, int64_t size, int64_t runs, float most, float *scale, float *least) {
  for (int64_t start = 0; start < runs; start += TOGETHER) {
    float own[LONGEST][TOGETHER] = {{0}}, above[LONGEST][TOGETHER];
    float low[TOGETHER], range[TOGETHER], total[TOGETHER], best[TOGETHER], slopes[TOGETHER], begins[TOGETHER];
    int64_t count = taken(own, x, size, runs, start);
    for (int c = 0; c < TOGETHER; c++) {
      float top = own[0][c], bottom = own[0][c], sum = own[0][c];
      for (int64_t k = 1; k < size; k++) {
        top = own[k][c] > top ? own[k][c] : top;
        bottom = own[k][c] < bottom ? own[k][c] : bottom;
        sum += own[k][c];
      }
      low[c] = bottom < 0.0f ? bottom : 0.0f;
      range[c] = top - low[c];
      total[c] = sum;
      best[c] = INFINITY;
      slopes[c] = 0.0f;
      begins[c] = -low[c];
    }
    for (int64_t k = 0; k < size; k++)
      for (int c = 0; c < TOGETHER; c++) above[k][c] = own[k][c] - low[c];
    float length = (float)size;
    for (int s = 0; s < STRETCHES; s++) {
      float factor[TOGETHER], sq[TOGETHER] = {0}, xq[TOGETHER] = {0}, qq[TOGETHER] = {0};
      for (int c = 0; c < TOGETHER; c++) factor[c] = divided(most + stretches[s], range[c]);
      for (int64_t k = 0; k < size; k++)
        for (int c = 0; c < TOGETHER; c++) {
          float q = clipped(rintf(above[k][c] * factor[c]), 0.0f, most);
          sq[c] += q;
          xq[c] += own[k][c] * q;
          qq[c] += q * q;
        }
      for (int c = 0; c < TOGETHER; c++) {
        float slope = divided(length * xq[c] - total[c] * sq[c], length * qq[c] - sq[c] * sq[c]);
        float begin = (slope * sq[c] - total[c]) / length;
        /* The stored minimum has no sign: a fit that begins above zero goes through zero instead. */
        if (begin < 0.0f) slope = divided(xq[c], qq[c]);
        begin = begin > 0.0f ? begin : 0.0f;
        float error = slope * slope * qq[c] + length * begin * begin -
                      2.0f * (slope * xq[c] + slope * begin * sq[c] - begin * total[c]);
        if (error < best[c] && slope >= 0.0f) slopes[c] = slope, begins[c] = begin, best[c] = error;
      }
    }
    memcpy(scale + start, slopes, count * sizeof(float));
    memcpy(least + start, begins, count * sizeof(float));
  }
}

/* Whole numbers from `low` to `high` nearest to x / scale, less `low`, one column after the other as bytes. */
API void adapterkit_rounded(const float *x, int64_t size, int64_t runs, const float *scales, float low, float high,
                            uint8_t *q) {
  for (int64_t start = 0; start < runs; start += TOGETHER) {
    float own[LONGEST][TOGETHER] = {{0}}, by[TOGETHER] = {0};
    int64_t count = taken(own, x, size, runs, start);
    memcpy(by, scales + start, count * sizeof(float));
    for (int64_t k = 0; k < size; k++)
      for (int c = 0; c < TOGETHER; c++) own[k][c] = clipped(rintf(divided(own[k][c], by[c])), low, high) - low;
    for (int64_t c = 0; c < count; c++)
      for (int64_t k = 0; k < size; k++) q[(start + c) * size + k] = (uint8_t)own[k][c];
  }
}
