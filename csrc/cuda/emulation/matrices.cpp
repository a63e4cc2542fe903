// Matrix instructions, in the layouts of PTX.
#include <stdlib.h>

#include "cuda/emulation/device.h"

namespace quest {
namespace cuda {

namespace {

uint16_t element(const LaneWords* rows, int matrix, int row, int column) {
  const char* p;
  memcpy(&p, &rows[matrix * 8 + row], sizeof(p));
  uint16_t x;
  memcpy(&x, p + 2 * column, sizeof(x));
  return x;
}

}  // namespace

void load_matrices(const void* row, uint32_t (&x)[4]) {
  if (reinterpret_cast<uintptr_t>(row) % 16) abort();
  const LaneWords* rows = exchange(&row, sizeof(row));
  const int lane = thread_index() % 32;
  for (int m = 0; m < 4; ++m) {
    x[m] = element(rows, m, lane / 4, lane % 4 * 2) |
           static_cast<uint32_t>(element(rows, m, lane / 4, lane % 4 * 2 + 1)) << 16;
  }
}

void load_transposed(const void* row, uint32_t (&x)[4]) {
  if (reinterpret_cast<uintptr_t>(row) % 16) abort();
  const LaneWords* rows = exchange(&row, sizeof(row));
  const int lane = thread_index() % 32;
  for (int m = 0; m < 4; ++m) {
    x[m] = element(rows, m, lane % 4 * 2, lane / 4) |
           static_cast<uint32_t>(element(rows, m, lane % 4 * 2 + 1, lane / 4)) << 16;
  }
}

void multiply_matrices_of(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                          float (*widen)(uint16_t)) {
  const uint32_t mine[6] = {a[0], a[1], a[2], a[3], b0, b1};
  const LaneWords* lanes = exchange(mine, sizeof(mine));
  const int lane = thread_index() % 32;
  const auto half = [&](int from, int word, int i) {
    uint32_t words[6];
    memcpy(words, &lanes[from], sizeof(words));
    return widen(static_cast<uint16_t>(words[word] >> 16 * i));
  };
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4, column = lane % 4 * 2 + i % 2;
    double sum = c[i];
    for (int k = 0; k < 16; ++k) {
      // a: words 0, 1 hold k 0 to 7 of rows `row` and row + 8, words 2, 3 the other k.
      const float x = half(row * 4 + k % 8 / 2, k / 8 * 2 + i / 2, k % 2);
      const float y = half(column * 4 + k % 8 / 2, 4 + k / 8, k % 2);
      sum += static_cast<double>(x) * y;
    }
    c[i] = static_cast<float>(sum);
  }
}

void multiply_bytes(int32_t (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const uint32_t mine[6] = {a[0], a[1], a[2], a[3], b0, b1};
  const LaneWords* lanes = exchange(mine, sizeof(mine));
  const int lane = thread_index() % 32;
  const auto byte = [&](int from, int word, int i) {
    uint32_t words[6];
    memcpy(words, &lanes[from], sizeof(words));
    return static_cast<int8_t>(words[word] >> 8 * i);
  };
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4, column = lane % 4 * 2 + i % 2;
    for (int k = 0; k < 32; ++k) {
      // a: words 0, 1 hold k 0 to 15 of rows `row` and row + 8, words 2, 3 the other k.
      c[i] += byte(row * 4 + k % 16 / 4, k / 16 * 2 + i / 2, k % 4) *
              byte(column * 4 + k % 16 / 4, 4 + k / 16, k % 4);
    }
  }
}

}  // namespace cuda
}  // namespace quest
