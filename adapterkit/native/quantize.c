/* The nearest of sixteen levels, as `quant/bnb_4bit.py` finds it by numpy: the same comparisons of the same float32
 * numbers, and so the same bits. */

#include <math.h>
#include <stdint.h>

#if defined(_WIN32)
#define API __declspec(dllexport)
#else
#define API __attribute__((visibility("default")))
#endif

enum { TOGETHER = 16, LEVELS = 16 };

/* Divides each block of `size` finite numbers by its largest, and writes the index of the nearest level. `middles` are
 * the 15 numbers between ascending levels; `order` tells where each of the levels is stored. */
API void adapterkit_levels(const float *values, int64_t blocks, int64_t size, const float *middles,
                           const uint8_t *order, uint8_t *q, float *largest) {
  for (int64_t b = 0; b < blocks; b++, values += size, q += size) {
    float most = 0.0f;
    for (int64_t k = 0; k < size; k++) most = fabsf(values[k]) > most ? fabsf(values[k]) : most;
    float factor = most == 0.0f ? 0.0f : 1.0f / most;
    for (int64_t first = 0; first < size; first += TOGETHER) {
      int64_t count = size - first < TOGETHER ? size - first : TOGETHER;
      float scaled[TOGETHER] = {0};
      int32_t above[TOGETHER] = {0};
      for (int64_t k = 0; k < count; k++) {
        float value = values[first + k] * factor;
        scaled[k] = value < -1.0f ? -1.0f : value > 1.0f ? 1.0f : value;
      }
      for (int m = 0; m < LEVELS - 1; m++)
        for (int k = 0; k < TOGETHER; k++) above[k] += scaled[k] > middles[m];
      for (int64_t k = 0; k < count; k++) q[first + k] = order[above[k]];
    }
    largest[b] = most;
  }
}
