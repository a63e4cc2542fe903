// A query as sketches are scored with it.
#pragma once

#include "cpu/kernels/dot.h"
#include "cpu/kernels/rotate.h"
#include "numbers.h"

namespace quest {
namespace QUEST_ISA {

// In units of log2, the logit of a token is
// mean_factor * mean_scale * (mean . codes) + token_scale * (factor * (bits . codes) + offset),
// bits being 0 or 1 with one plane, 2 s + t with two.
struct SketchQuery {
  alignas(64) int8_t codes[kMaxHeadDim];   // 0 behind the last channel
  alignas(64) int16_t words[kMaxHeadDim];  // the same
  int32_t sum;                             // of the codes
  float mean_factor;
  float factor;
  float offset;
};

template <class T>
void prepare_query(const ScoreParams& p, int head, SketchQuery& out) {
  float row[kMaxHeadDim];
  widen_row(static_cast<const T*>(p.query) + head * p.query_stride, p.head_dim, row);
  const int num_groups = p.head_dim / 8;
  Float8 x[kMaxGroups];
  memcpy(x, row, p.head_dim * sizeof(float));
  rotate(x, num_groups);
  memcpy(row, x, p.head_dim * sizeof(float));
  float largest = 0, odd = 0;
  for (int d = 0; d < p.head_dim; ++d) {
    const float size = row[d] < 0 ? -row[d] : row[d];
    largest = size > largest ? size : largest;
    odd += size - size;  // NaN and infinity stay
  }
  float step = largest / 127.0f;
  step = step > kSketchMinScale ? step : kSketchMinScale;
  memset(&out, 0, sizeof(out));
  // A query with a NaN or infinity has NaN as the scores of all tokens.
  if (odd != 0) {
    out.offset = bit_cast<float>(0x7fc00000);
    return;
  }
  for (int d = 0; d < p.head_dim; ++d) {
    const int32_t code = static_cast<int32_t>(__builtin_rintf(row[d] / step));
    out.codes[d] = static_cast<int8_t>(code);
    out.words[d] = static_cast<int16_t>(code);
    out.sum += code;
  }
  const float factor = step * (p.scale * kLog2e<float> / rotation_size(p.head_dim));
  const float sum = static_cast<float>(out.sum);
  out.mean_factor = factor;
  const bool has_one_plane = sketch_row(p.head_dim, p.format).num_planes == 1;
  out.factor = has_one_plane ? 2 * factor : factor;
  out.offset = has_one_plane ? -factor * sum : -1.5f * factor * sum;
}

}  // namespace QUEST_ISA
}  // namespace quest
