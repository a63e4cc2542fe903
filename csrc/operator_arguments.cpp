#include "operator_arguments.h"

#include <algorithm>
#include <cmath>

#include "numbers.h"

namespace quest {
namespace {

// Of a score, to a logit: sums over a group are those of its mean query.
double score_scale_of(GroupReduce group_reduce, SummaryKind kind, std::optional<double> scale,
                      int64_t head_dim, int64_t group_size) {
  if (scores_tokens(kind)) return 1;
  const double each = scale.value_or(std::pow(static_cast<double>(head_dim), -0.5));
  return group_reduce == GroupReduce::kSum ? each / static_cast<double>(group_size) : each;
}

void check_group_reduce(GroupReduce group_reduce, SummaryKind kind) {
  QUEST_CHECK(takes_sum(kind) || group_reduce != GroupReduce::kSum,
              "group_reduce: expected 'softmax' or 'none' with summary='sketch', got 'sum'");
}

// Positions of a mask for num_pages pages, and of the pages without one.
int64_t check_mask_len(const std::optional<Tensor>& attn_mask, int64_t num_pages,
                       int64_t page_size) {
  if (!attn_mask) return num_pages * page_size;
  CHECK_DIM(*attn_mask, 4, "broadcastable to [batch, num_q_heads, 1, max_seq_len]");
  const int64_t mask_len = attn_mask->size(3);
  QUEST_CHECK(mask_len == 1 || ceil_div(mask_len, page_size) == num_pages,
              "attn_mask: expected a last dimension of ", num_pages, " pages, got ", mask_len,
              " positions");
  return mask_len == 1 ? num_pages * page_size : mask_len;
}

}  // namespace

float log2_scale(double score_scale) {
  QUEST_CHECK(std::isfinite(score_scale), "score_scale: expected a finite number, got ",
              score_scale);
  return static_cast<float>(score_scale * kLog2e<double>);
}

UpdateArguments check_update(const Tensor& key_cache, const Tensor& cache_position,
                             const Tensor& page_summary, const Tensor& num_sealed,
                             SummaryFormat format) {
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
  u.page_summary = check_page_summary(page_summary, format, key_cache, u.batch, u.num_kv_heads,
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
                           const std::optional<Tensor>& attn_mask, GroupReduce group_reduce,
                           std::optional<double> scale, SummaryFormat format) {
  ScoreArguments s;
  s.dtype = check_float_dtype(query, "query");
  s.group_reduce = group_reduce;
  check_group_reduce(group_reduce, format.kind);
  check_single_query(query);
  s.query_owner = contiguous_query(query);
  s.query = query_pointers(s.query_owner);
  s.q_len = 1;
  QUEST_CHECK(page_summary.dim() >= 3,
              "page_summary: expected [batch, num_kv_heads, num_pages, ...], got ",
              to_string(page_summary.sizes()));
  const int64_t num_q_heads = query.size(1);
  s.batch = query.size(0);
  s.head_dim = query.size(3);
  s.num_kv_heads = page_summary.size(1);
  s.num_pages = page_summary.size(2);
  QUEST_CHECK(s.num_kv_heads > 0 && num_q_heads > 0 && num_q_heads % s.num_kv_heads == 0,
              "query: expected a multiple of the ", s.num_kv_heads, " heads of page_summary, got ",
              num_q_heads);
  s.group_size = num_q_heads / s.num_kv_heads;
  check_head_dim(s.head_dim, "query");
  s.page_summary = check_page_summary(page_summary, format, query, s.batch, s.num_kv_heads,
                                      s.num_pages, s.head_dim);
  check_seq_lens(seq_lens, query, s.batch);
  // Bounds know neither single tokens nor what a logit is.
  const bool takes_mask = scores_tokens(format.kind) || group_reduce == GroupReduce::kSoftmax;
  for (const auto& [name, is_given] :
       {std::pair("attn_mask", attn_mask.has_value()), std::pair("scale", scale.has_value())}) {
    QUEST_CHECK(takes_mask || !is_given, name,
                ": expected none but with summary 'sketch' or group_reduce 'softmax'");
  }
  s.max_seq_len = check_mask_len(attn_mask, s.num_pages, format.page_size);
  s.mask = check_mask(attn_mask, query, s.batch, num_q_heads, 1, s.max_seq_len);
  s.scale = check_scale(scale, s.head_dim);
  s.log2_scale =
      log2_scale(score_scale_of(group_reduce, format.kind, scale, s.head_dim, s.group_size));
  return s;
}

SelectArguments check_select(const Tensor& scores, const Tensor& seq_lens,
                             const std::optional<Tensor>& attn_mask, const Selection& selection) {
  CHECK_DTYPE(scores, ScalarType::Float);
  CHECK_DIM(scores, 3, "[batch, num_select_heads, num_pages]");
  SelectArguments s;
  s.selection = selection;
  s.batch = scores.size(0);
  s.num_heads = scores.size(1);
  s.num_pages = scores.size(2);
  QUEST_CHECK(s.num_heads >= 1, "scores: expected at least 1 head, got ", s.num_heads);
  check_seq_lens(seq_lens, scores, s.batch);
  s.max_seq_len = check_mask_len(attn_mask, s.num_pages, selection.page_size);
  const int64_t mask_heads = attn_mask ? attn_mask->size(1) : 1;
  QUEST_CHECK(mask_heads == 1 || mask_heads % s.num_heads == 0,
              "attn_mask: expected 1 head or a multiple of ", s.num_heads, ", got ", mask_heads);
  s.mask = check_mask(attn_mask, scores, s.batch, mask_heads, 1, s.max_seq_len);
  s.group_size = std::max<int64_t>(1, mask_heads / s.num_heads);
  s.owner = scores.stride(2) == 1 ? scores : torch::stable::contiguous(scores);
  s.scores = static_cast<const float*>(s.owner.const_data_ptr());
  s.batch_stride = s.owner.stride(0);
  s.head_stride = s.owner.stride(1);
  return s;
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
                             const SparseSettings& settings) {
  const auto& [selection, scale, format] = settings;
  check_group_reduce(selection.group_reduce, format.kind);
  SparseArguments s;
  s.attention = check_attention(query, key_cache, value_cache, attn_mask, scale);
  const Shape& shape = s.attention.shape;
  const int64_t num_pages = ceil_div(shape.max_seq_len, format.page_size);
  s.page_summary = check_page_summary(page_summary, format, query, shape.batch, shape.num_kv_heads,
                                      num_pages, shape.head_dim);
  check_seq_lens(seq_lens, query, shape.batch);
  s.selection = selection;
  s.selection.page_budget = std::min(selection.page_budget, num_pages);
  s.selection.log2_scale = log2_scale(
      score_scale_of(selection.group_reduce, format.kind, scale, shape.head_dim, shape.group_size));
  return s;
}

}  // namespace quest
