// Page sketches (quest_compile/ops/reference_sketch.py): the summary of a page as its mean in 8
// bits and the bits and the scale of what is left of each token. Layout of a row: params.h,
// kSketch.
#pragma once

#include "cpu/kernels/vec.h"
#include "params.h"

namespace quest {
namespace QUEST_ISA {

void sketch_page(const PageSummaryParams& p, int64_t page, char* row);
void score_sketches(const ScoreParams& p);

// Bytes from the start of a row.
struct SketchLayout {
  int plane;  // size of a plane
  int mean;
  int codes;
  int scales;
};

inline SketchLayout sketch_layout(int head_dim, int page_size, int sketch_bits) {
  const int plane = page_size * head_dim / 8, mean = sketch_bits * plane, codes = mean + head_dim;
  return {plane, mean, codes, codes + page_size};
}

}  // namespace QUEST_ISA
}  // namespace quest
