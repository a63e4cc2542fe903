#include "cpu/selection.h"

#include <algorithm>
#include <cstring>
#include <limits>

#include "cpu/dispatch.h"

namespace quest {
namespace {

bool any_position(const uint8_t* mask, int64_t stride, int64_t begin, int64_t end) {
  int64_t t = begin;
  if (stride == 1) {
    for (; t + 8 <= end; t += 8) {
      uint64_t eight;
      std::memcpy(&eight, mask + t, sizeof(eight));
      if (eight) return true;
    }
  }
  for (; t < end; ++t) {
    if (mask[t * stride]) return true;
  }
  return false;
}

}  // namespace

bool find_live_pages(const Mask& mask, int64_t q_len, int64_t row, int64_t first_head,
                     int64_t num_heads, int64_t page_size, int64_t seq_len, uint8_t* live) {
  const int64_t num_pages = ceil_div(seq_len, page_size);
  std::memset(live, 0, num_pages);
  for (int64_t h = 0; h < (mask.head_stride ? num_heads : 1); ++h) {
    const uint8_t* positions = mask_of(mask, q_len, row, first_head + h);
    for (int64_t page = 0; page < num_pages; ++page) {
      const int64_t begin = page * page_size, end = std::min(begin + page_size, seq_len);
      if (!live[page]) live[page] = any_position(positions, mask.token_stride, begin, end);
    }
  }
  return std::find(live, live + num_pages, 0) == live + num_pages;
}

LiveTokens find_live_tokens(const Scoring& scoring, const Mask& mask, int64_t row, int64_t kv_head,
                            int64_t end, Scratch& scratch) {
  if (!scores_tokens(scoring.page_summary.format.kind) || !mask.data || end == 0) {
    return {nullptr, 0};
  }
  const int64_t num_heads = mask.head_stride ? scoring.group_size : 1;
  LiveTokens live = {mask_of(mask, scoring.q_len, row, kv_head * scoring.group_size),
                     mask.head_stride};
  if (mask.token_stride != 1) {
    uint8_t* copy = scratch.take<uint8_t>(num_heads * end);
    for (int64_t h = 0; h < num_heads; ++h) {
      const uint8_t* positions = live.data + h * live.head_stride;
      for (int64_t t = 0; t < end; ++t) copy[h * end + t] = positions[t * mask.token_stride];
    }
    live = {copy, mask.head_stride ? end : 0};
  }
  for (int64_t h = 0; h < num_heads; ++h) {
    if (std::memchr(live.data + h * live.head_stride, 0, end)) return live;
  }
  return {nullptr, 0};
}

void score_page_range(const Scoring& scoring, int64_t row, int64_t kv_head, LiveTokens live,
                      int64_t first_page, int64_t last_page, float* scores, int64_t scores_stride) {
  if (first_page >= last_page) return;
  const int64_t head = kv_head * scoring.group_size, batch_row = row / scoring.q_len;
  const Query& query = scoring.query;
  const PageSummary& summary = scoring.page_summary;
  ScoreParams p;
  p.dtype = scoring.dtype;
  p.group_reduce = scoring.group_reduce;
  p.group_size = static_cast<int32_t>(scoring.group_size);
  p.head_dim = static_cast<int32_t>(scoring.head_dim);
  p.query = query_of(query, scoring.dtype, scoring.q_len, row, head);
  p.query_stride = query.head_stride;
  p.format = summary.format;
  p.scale = scoring.scale;
  p.live = live.data;
  p.live_stride = live.head_stride;
  p.page_summary = row_of(summary, batch_row, kv_head);
  p.summary_stride = summary.page_stride;
  p.first_page = first_page;
  p.last_page = last_page;
  p.scores = scores;
  p.scores_stride = scores_stride;
  kernels().score_pages(p);
}

void join_scores(const Scoring& scoring, const Mask& mask, int64_t row, int64_t kv_head,
                 int64_t num_pages, float* scores, int64_t scores_stride, float* shares,
                 Scratch& scratch) {
  const SummaryFormat& format = scoring.page_summary.format;
  if (!scores_tokens(format.kind) && mask.data) {
    uint8_t* live = scratch.take<uint8_t>(num_pages);
    for (int64_t h = 0; h < scoring.group_size; ++h) {
      const int64_t head = kv_head * scoring.group_size + h;
      if (h == 0 || mask.head_stride) {
        find_live_pages(mask, scoring.q_len, row, head, 1, format.page_size,
                        num_pages * format.page_size, live);
      }
      for (int64_t page = 0; page < num_pages; ++page) {
        float& score = scores[h * scores_stride + page];
        score = live[page] ? score : -std::numeric_limits<float>::infinity();
      }
    }
  }
  ShareParams p;
  p.group_size = static_cast<int32_t>(scoring.group_size);
  p.num_pages = num_pages;
  p.scores = scores;
  p.scores_stride = scores_stride;
  p.log2_scale = scoring.log2_scale;
  p.shares = shares;
  kernels().share_scores(p);
}

int64_t choose_pages(const Selection& selection, int64_t seq_len, const float* scores,
                     const uint8_t* live, int32_t* page_indices, Scratch& scratch) {
  const int64_t num_pages = ceil_div(seq_len, selection.page_size);
  SelectParams p;
  p.scores = scores;
  p.live = live;
  p.num_pages = static_cast<int32_t>(num_pages);
  p.selection = selection;
  p.row_budget = static_cast<int32_t>(page_budget_of(selection, num_pages));
  p.weights = weighs_pages(selection) ? scratch.take<int32_t>(num_pages) : nullptr;
  p.keys = scratch.take<int32_t>(num_pages + kKeyPadding);
  p.page_indices = page_indices;
  return kernels().select_pages(p);
}

int64_t count_tokens(const int32_t* page_indices, int64_t num_pages, int64_t page_size,
                     int64_t seq_len) {
  if (num_pages == 0) return 0;
  const int64_t last = page_indices[num_pages - 1] * page_size;
  return (num_pages - 1) * page_size + std::min(page_size, seq_len - last);
}

int64_t summary_bytes(const Scoring& scoring, int64_t num_complete) {
  return num_complete * scoring.page_summary.row_bytes;
}

}  // namespace quest
