#include "operator_arguments.h"

#include <algorithm>
#include <cmath>

namespace quest {
namespace {

// A double times this, rounded to float, is what kernels multiply scores with.
constexpr double kLog2e = 1.4426950408889634;

void check_shares(double budget_fraction, double top_p) {
  QUEST_CHECK(budget_fraction > 0 && budget_fraction <= 1,
              "budget_fraction: expected above 0 and up to 1, got ", budget_fraction);
  QUEST_CHECK(top_p > 0 && top_p <= 1, "top_p: expected above 0 and up to 1, got ", top_p);
}

// Of a score, to a logit: sums over a group are those of its mean query.
double score_scale_of(const Shape& shape, GroupReduce group_reduce, SummaryKind kind,
                      std::optional<double> scale) {
  if (kind == SummaryKind::kSketch) return 1;
  const double each = scale ? *scale : std::pow(static_cast<double>(shape.head_dim), -0.5);
  return group_reduce == GroupReduce::kSum ? each / static_cast<double>(shape.group_size) : each;
}

}  // namespace

float log2_scale(double score_scale) {
  QUEST_CHECK(std::isfinite(score_scale), "score_scale: expected a finite number, got ",
              score_scale);
  return static_cast<float>(score_scale * kLog2e);
}

int64_t page_budget_of(const Choice& choice, int64_t seq_len) {
  const double num_pages = static_cast<double>(ceil_div(seq_len, choice.page_size));
  const int64_t share = static_cast<int64_t>(std::ceil(choice.budget_fraction * num_pages));
  const int64_t smallest = choice.num_sink_pages + choice.num_recent_pages + 1;
  return std::min(choice.page_budget, std::max(smallest, share));
}

bool fits_budget(const Choice& choice, int64_t seq_len) {
  return ceil_div(seq_len, choice.page_size) <= page_budget_of(choice, seq_len);
}

UpdateArguments check_update(const Tensor& key_cache, const Tensor& cache_position,
                             const Tensor& page_summary, const Tensor& num_sealed,
                             const std::optional<Tensor>& channel_scale, SummaryFormat format) {
  UpdateArguments u;
  u.dtype = check_float_dtype(key_cache, "key_cache");
  CHECK_DIM(key_cache, 4, "[batch, num_kv_heads, max_seq_len, head_dim]");
  CHECK_LAST_DIM_CONTIGUOUS(key_cache);
  u.batch = key_cache.size(0);
  u.num_kv_heads = key_cache.size(1);
  u.max_seq_len = key_cache.size(2);
  u.head_dim = key_cache.size(3);
  u.page_size = format.page_size;
  check_head_dim(u.head_dim, "key_cache");
  u.key_cache = cache_pointers(key_cache);
  u.page_summary =
      check_page_summary(page_summary, channel_scale, format, key_cache, u.batch, u.num_kv_heads,
                         ceil_div(u.max_seq_len, u.page_size), u.head_dim);
  CHECK_DTYPE(num_sealed, ScalarType::Long);
  QUEST_CHECK(num_sealed.dim() == 1 && (num_sealed.size(0) == 1 || num_sealed.size(0) == 2),
              "num_sealed: expected shape [1] or [2], got ", to_string(num_sealed.sizes()));
  CHECK_SAME_DEVICE(num_sealed, key_cache);
  CHECK_SAME_DEVICE(cache_position, key_cache);
  CHECK_DTYPE(cache_position, ScalarType::Long);
  CHECK_DIM(cache_position, 1, "[number of positions]");
  u.positions = static_cast<const int64_t*>(cache_position.const_data_ptr());
  u.num_positions = cache_position.size(0);
  u.position_stride = cache_position.stride(0);
  QUEST_CHECK(u.num_positions >= 1, "cache_position: expected at least one position, got none");
  u.num_sealed = static_cast<int64_t*>(num_sealed.mutable_data_ptr());
  u.next_position = num_sealed.size(0) == 2 ? u.num_sealed + num_sealed.stride(0) : nullptr;
  return u;
}

ScoreArguments check_score(const Tensor& query, const Tensor& page_summary, const Tensor& seq_lens,
                           const std::optional<Tensor>& channel_scale, GroupReduce group_reduce,
                           SummaryFormat format, const std::optional<Tensor>& attn_mask,
                           std::optional<double> scale) {
  const DType dtype = check_float_dtype(query, "query");
  check_single_query(query);
  const Tensor owner = contiguous_query(query);
  QUEST_CHECK(page_summary.dim() >= 3,
              "page_summary: expected [batch, num_kv_heads, num_pages, ...], got ",
              to_string(page_summary.sizes()));
  const int64_t batch = query.size(0), num_q_heads = query.size(1), head_dim = query.size(3);
  const int64_t num_kv_heads = page_summary.size(1), num_pages = page_summary.size(2);
  QUEST_CHECK(num_kv_heads > 0 && num_q_heads > 0 && num_q_heads % num_kv_heads == 0,
              "query: expected a multiple of the ", num_kv_heads, " heads of page_summary, got ",
              num_q_heads);
  check_head_dim(head_dim, "query");
  const PageSummary rows = check_page_summary(page_summary, channel_scale, format, query, batch,
                                              num_kv_heads, num_pages, head_dim);
  check_seq_lens(seq_lens, query, batch);
  // Only sketches know single tokens and the sum of their exp.
  const bool is_sketch = format.kind == SummaryKind::kSketch;
  QUEST_CHECK(is_sketch || !attn_mask, "attn_mask: expected none but with summary 'sketch'");
  QUEST_CHECK(is_sketch || !scale, "scale: expected none but with summary 'sketch'");
  int64_t max_seq_len = num_pages * format.page_size;
  if (attn_mask) {
    CHECK_DIM(*attn_mask, 4, "broadcastable to [batch, num_q_heads, 1, max_seq_len]");
    const int64_t mask_len = attn_mask->size(3);
    QUEST_CHECK(mask_len == 1 || ceil_div(mask_len, format.page_size) == num_pages,
                "attn_mask: expected a last dimension of ", num_pages, " pages, got ", mask_len,
                " positions");
    if (mask_len > 1) max_seq_len = mask_len;
  }
  return {dtype,
          group_reduce,
          owner,
          query_pointers(owner),
          rows,
          batch,
          num_kv_heads,
          num_q_heads / num_kv_heads,
          head_dim,
          num_pages,
          max_seq_len,
          check_mask(attn_mask, query, batch, num_q_heads, 1, max_seq_len),
          check_scale(scale, head_dim)};
}

SelectArguments check_select(const Tensor& scores, const Tensor& seq_lens,
                             const std::optional<Tensor>& attn_mask, const Choice& choice) {
  CHECK_DTYPE(scores, ScalarType::Float);
  CHECK_DIM(scores, 3, "[batch, num_select_heads, num_pages]");
  check_page_size(choice.page_size);
  QUEST_CHECK(choice.page_budget >= 1 && choice.page_budget < INT32_MAX,
              "page_budget: expected at least 1, got ", choice.page_budget);
  check_page_budget(choice.page_budget, choice.num_sink_pages, choice.num_recent_pages);
  check_shares(choice.budget_fraction, choice.top_p);
  const int64_t batch = scores.size(0), num_heads = scores.size(1), num_pages = scores.size(2);
  QUEST_CHECK(num_heads >= 1, "scores: expected at least 1 head, got ", num_heads);
  check_seq_lens(seq_lens, scores, batch);
  Mask mask = {nullptr, 0, 0, 0, 0};
  int64_t group_size = 1, max_seq_len = num_pages * choice.page_size;
  if (attn_mask) {
    CHECK_DIM(*attn_mask, 4, "broadcastable to [batch, num_q_heads, 1, max_seq_len]");
    const int64_t mask_heads = attn_mask->size(1), mask_len = attn_mask->size(3);
    QUEST_CHECK(mask_heads == 1 || mask_heads % num_heads == 0,
                "attn_mask: expected 1 head or a multiple of ", num_heads, ", got ", mask_heads);
    QUEST_CHECK(mask_len == 1 || ceil_div(mask_len, choice.page_size) == num_pages,
                "attn_mask: expected a last dimension of ", num_pages, " pages, got ", mask_len,
                " positions");
    mask = check_mask(attn_mask, scores, batch, mask_heads, 1, mask_len);
    group_size = std::max<int64_t>(1, mask_heads / num_heads);
    if (mask_len > 1) max_seq_len = mask_len;
  }
  const Tensor owner = scores.stride(2) == 1 ? scores : torch::stable::contiguous(scores);
  return {choice,
          owner,
          static_cast<const float*>(owner.const_data_ptr()),
          owner.stride(0),
          owner.stride(1),
          batch,
          num_heads,
          num_pages,
          max_seq_len,
          mask,
          group_size};
}

int64_t check_page_indices(const Attention& a, const Tensor& page_indices) {
  CHECK_DTYPE(page_indices, ScalarType::Int);
  CHECK_DIM(page_indices, 3, "[batch, num_select_heads, page_budget]");
  CHECK_SAME_DEVICE(page_indices, a.query_owner);
  const int64_t num_select_heads = page_indices.size(1), num_q_heads = a.shape.num_q_heads;
  QUEST_CHECK(page_indices.size(0) == a.shape.batch &&
                  (num_select_heads == a.shape.num_kv_heads || num_select_heads == num_q_heads),
              "page_indices: expected shape [", a.shape.batch, ", ", a.shape.num_kv_heads,
              a.shape.num_kv_heads == num_q_heads ? "" : " or " + std::to_string(num_q_heads),
              ", page_budget], got ", to_string(page_indices.sizes()));
  return num_q_heads / num_select_heads;
}

SparseArguments check_sparse(const Tensor& query, const Tensor& key_cache,
                             const Tensor& value_cache, const Tensor& page_summary,
                             const Tensor& seq_lens, const std::optional<Tensor>& attn_mask,
                             const std::optional<Tensor>& channel_scale, int64_t budget,
                             int64_t num_sink_pages, int64_t num_recent_pages,
                             GroupReduce group_reduce, SummaryFormat format,
                             std::optional<double> scale, double budget_fraction, double top_p) {
  const int64_t page_size = format.page_size;
  const Attention attention = check_attention(query, key_cache, value_cache, attn_mask, scale);
  const Shape& shape = attention.shape;
  QUEST_CHECK(budget >= 1, "budget: expected at least 1, got ", budget);
  check_page_budget(budget / page_size, num_sink_pages, num_recent_pages);
  check_shares(budget_fraction, top_p);
  const int64_t num_pages = ceil_div(shape.max_seq_len, page_size);
  const PageSummary rows =
      check_page_summary(page_summary, channel_scale, format, query, shape.batch,
                         shape.num_kv_heads, num_pages, shape.head_dim);
  check_seq_lens(seq_lens, query, shape.batch);
  const Choice choice = {std::min(budget / page_size, num_pages),
                         page_size,
                         num_sink_pages,
                         num_recent_pages,
                         budget_fraction,
                         top_p,
                         log2_scale(score_scale_of(shape, group_reduce, format.kind, scale))};
  return {attention, rows, group_reduce, choice};
}

}  // namespace quest
