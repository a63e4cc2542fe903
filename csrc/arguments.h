// Tensor arguments, checked and as kernels take them. Device independent but for read_seq_lens.
#pragma once

#include "checks.h"

namespace quest {

struct Shape {
  int64_t batch;
  int64_t q_len;
  int64_t num_q_heads;
  int64_t num_kv_heads;
  int64_t group_size;
  int64_t head_dim;
  int64_t value_dim;
  int64_t max_seq_len;

  // A row is one query of one batch row: rows of a batch row follow each other.
  int64_t num_rows() const { return batch * q_len; }
};

// The arguments that all attention ops share.
struct Attention {
  DType dtype;
  Shape shape;
  Tensor query_owner;  // `query` itself, or a copy of it with a contiguous last dimension
  Query query;
  Cache key_cache;
  Cache value_cache;
  Mask mask;
  float scale;
};

Tensor contiguous_query(const Tensor& query);
Query query_pointers(const Tensor& query);
Cache cache_pointers(const Tensor& cache);

Attention check_attention(const Tensor& query, const Tensor& key_cache, const Tensor& value_cache,
                          const std::optional<Tensor>& attn_mask, std::optional<double> scale);
// Errors unless finite; 1 / sqrt(head_dim) by default.
float check_scale(std::optional<double> scale, int64_t head_dim);
void check_single_query(const Tensor& query);
Mask check_mask(const std::optional<Tensor>& attn_mask, const Tensor& device_of, int64_t batch,
                int64_t num_q_heads, int64_t q_len, int64_t max_seq_len);
// `like`: for dtype and device.
PageSummary check_page_summary(const Tensor& page_summary, SummaryFormat format, const Tensor& like,
                               int64_t batch, int64_t num_kv_heads, int64_t num_pages,
                               int64_t head_dim);
// Of one KV head.
void* row_of(const PageSummary& summary, int64_t batch_row, int64_t kv_head);
void check_seq_lens(const Tensor& seq_lens, const Tensor& device_of, int64_t batch);
// lengths [batch]: seq_lens of a CPU tensor, one per row. Errors unless 1 <= length <= max_seq_len.
void read_seq_lens(const Tensor& seq_lens, int64_t batch, int64_t max_seq_len, int64_t* lengths);
// lengths [num_rows]: of each query (quest_compile/ops/reference/positions.py, each_query). Errors
// as above, or if a row holds fewer positions than there are queries.
void read_query_lens(const Attention& a, const Tensor& seq_lens, int64_t* lengths);

int64_t element_size(DType dtype);
// data + index elements of dtype
const void* offset(const void* data, DType dtype, int64_t index);
void* offset(void* data, DType dtype, int64_t index);

const void* query_of(const Query& query, DType dtype, int64_t q_len, int64_t row, int64_t head);
const void* cache_of(const Cache& cache, DType dtype, int64_t batch_row, int64_t kv_head);
const uint8_t* mask_of(const Mask& mask, int64_t q_len, int64_t row, int64_t head);

// An uninitialised contiguous tensor like `like`, of another shape and perhaps dtype.
Tensor new_tensor(const Tensor& like, std::initializer_list<int64_t> shape, ScalarType dtype);
Tensor new_strided_tensor(const Tensor& like, Sizes shape, const int64_t* strides,
                          ScalarType dtype);
// [batch, num_q_heads, q_len, value_dim], [batch, q_len, num_q_heads, value_dim] in memory: what
// scaled_dot_product_attention gives for a query that is a transposed projection.
Tensor new_output(const Attention& a);

}  // namespace quest
