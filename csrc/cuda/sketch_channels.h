// The scales of the channels that sketches are made with, from the keys of some pages, by a CTA.
#pragma once

#include "cuda/sketch_row.h"

namespace quest {
namespace cuda {

// Behind a change of `scale`, by the whole CTA.
QUEST_DEVICE void complete_channels(const Summaries& s, const SketchChannels& channels) {
  sync_cta();
  for (int d = thread_index(); d < s.head_dim; d += kThreads) {
    channels.inverse[d] = divide(1.0f, channels.scale[d]);
  }
  if (warp_index() == 0) {
    float sum = 0;
    for (int d = lane_index() % 8; d < s.head_dim; d += 8) sum += channels.scale[d];
    sum = sum_of_eight(sum);
    if (lane_index() == 0) *channels.sum = sum;
  }
  sync_cta();
}

// Far from the ends of float32; no channel gets less than 1/1024 of the largest.
QUEST_DEVICE float bounded_scale(float scale, float largest) {
  return fminf(fmaxf(fmaxf(scale, multiply(largest, 0x1p-10f)), 1e-12f), 1e12f);
}

// From up to kScalePages of the first num_pages, a power of two; `scratch`: of all warps
// (sketch_scratch_floats). Pages are averaged in their order: thread d has channel d.
template <class T>
QUEST_DEVICE void scale_sketch_channels(const Summaries& s, const Update& u, int batch_row,
                                        int kv_head, int64_t num_pages,
                                        const SketchChannels& channels, float* scratch,
                                        WarpValues& shared) {
  const int count = static_cast<int>(minimum<int64_t>(num_pages, kScalePages));
  const int stride = sketch_scratch_floats(s), d = thread_index();
  const bool has_channel = d < s.head_dim;
  float centre = 0, spread = 0, deviation = 0;
  int num_counted = 0;
#pragma unroll 1
  for (int pass = 0; pass < 2; ++pass) {
    num_counted = 0;
#pragma unroll 1
    for (int first = 0; first < count; first += kWarps) {
      const int i = first + warp_index();
      bool counts = false;
      if (i < count) {
        SketchPage<T> page(s, u, batch_row, kv_head, i * num_pages / count,
                           scratch + warp_index() * stride);
        page.read_mean();
        if (pass == 1) page.read_deviation();
        counts = page.has_finite();
      }
      if (lane_index() == 0) shared.values[warp_index()] = counts;
      sync_cta();
      for (int w = 0; w < kWarps; ++w) {
        if (!shared.values[w]) continue;
        ++num_counted;
        if (!has_channel) continue;
        const float mean = scratch[w * stride + d];
        if (pass == 0) {
          centre += mean;
        } else {
          spread += fabsf(mean - centre);
          deviation += scratch[w * stride + s.head_dim + d];
        }
      }
      sync_cta();
    }
    if (pass == 0) centre = divide(centre, static_cast<float>(maximum(num_counted, 1)));
  }
  const float divisor = static_cast<float>(maximum(num_counted, 1));
  spread = divide(spread, divisor);
  deviation = divide(deviation, divisor);
  const float most_spread = as_float(largest(has_channel ? as_bits(spread) : 0, shared));
  const float most_deviation = as_float(largest(has_channel ? as_bits(deviation) : 0, shared));
  if (has_channel) {
    channels.centre[d] = centre;
    channels.mean_scale[d] = bounded_scale(spread, most_spread);
    channels.scale[d] = bounded_scale(deviation, most_deviation);
  }
  complete_channels(s, channels);
}

}  // namespace cuda
}  // namespace quest
