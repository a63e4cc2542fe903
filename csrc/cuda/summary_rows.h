// Rows of page summaries in memory, whatever they hold.
#pragma once

#include "cuda/summary_state.h"

namespace quest {
namespace cuda {

QUEST_DEVICE char* row_of(const Summaries& s, int batch_row, int kv_head, int64_t page) {
  const int64_t index =
      batch_row * s.rows.batch_stride + kv_head * s.rows.head_stride + page * s.rows.page_stride;
  return static_cast<char*>(s.rows.data) + index * s.rows.element_size;
}

// Where sample i of a head is kept until the next kernel.
QUEST_DEVICE char* late_row(const Summaries& s, const Update& u, int64_t head, int i) {
  return u.late_rows + (head * kNumSamples + i) * s.rows.row_bytes;
}

// Lanes that share a row of `count` pieces: a power of two.
QUEST_BOTH int lanes_for(int count) {
  int lanes = 1;
  while (lanes < count && lanes < 32) lanes *= 2;
  return lanes;
}

// To a stored row, by a whole warp; `row` is aligned.
QUEST_DEVICE void store_row(const Summaries& s, const char* row, char* stored) {
  const int num_bytes = static_cast<int>(s.rows.row_bytes);
  if (s.has_aligned_rows) {
#pragma unroll 1
    for (int i = lane_index() * 16; i < num_bytes; i += 32 * 16) {
      *reinterpret_cast<Vector*>(stored + i) = *reinterpret_cast<const Vector*>(row + i);
    }
  } else {
#pragma unroll 1
    for (int i = lane_index(); i < num_bytes; i += 32) stored[i] = row[i];
  }
}

// Whether a stored row has other bits, for a whole warp.
QUEST_DEVICE bool row_differs(const Summaries& s, const char* row, const char* stored) {
  const int num_bytes = static_cast<int>(s.rows.row_bytes);
  bool differs = false;
  if (s.has_aligned_rows) {
#pragma unroll 1
    for (int i = lane_index() * 16; i < num_bytes; i += 32 * 16) {
      const Vector x = *reinterpret_cast<const Vector*>(row + i);
      const Vector y = *reinterpret_cast<const Vector*>(stored + i);
#pragma unroll
      for (int j = 0; j < 4; ++j) differs = differs || x.words[j] != y.words[j];
    }
  } else {
#pragma unroll 1
    for (int i = lane_index(); i < num_bytes; i += 32) differs = differs || row[i] != stored[i];
  }
  return ballot(differs) != 0;
}

}  // namespace cuda
}  // namespace quest
