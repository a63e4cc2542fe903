#include "arguments.h"

#include <cmath>

namespace quest {

Tensor contiguous_query(const Tensor& query) {
  CHECK_DIM(query, 4, "[batch, num_q_heads, q_len, head_dim]");
  return query.stride(3) == 1 ? query : torch::stable::contiguous(query);
}

Query query_pointers(const Tensor& query) {
  return {query.const_data_ptr(), query.stride(0), query.stride(1), query.stride(2)};
}

Cache cache_pointers(const Tensor& cache) {
  return {cache.const_data_ptr(), cache.stride(0), cache.stride(1), cache.stride(2)};
}

Attention check_attention(const Tensor& query, const Tensor& key_cache, const Tensor& value_cache,
                          const std::optional<Tensor>& attn_mask, std::optional<double> scale) {
  const DType dtype = check_float_dtype(query, "query");
  CHECK_DIM(query, 4, "[batch, num_q_heads, q_len, head_dim]");
  CHECK_DIM(key_cache, 4, "[batch, num_kv_heads, max_seq_len, head_dim]");
  CHECK_DIM(value_cache, 4, "[batch, num_kv_heads, max_seq_len, value_dim]");
  Shape shape;
  shape.batch = query.size(0);
  shape.q_len = query.size(2);
  shape.num_q_heads = query.size(1);
  shape.num_kv_heads = key_cache.size(1);
  shape.head_dim = query.size(3);
  shape.value_dim = value_cache.size(3);
  shape.max_seq_len = key_cache.size(2);
  QUEST_CHECK(shape.q_len >= 1, "query: expected at least 1 query (dimension 2), got ",
              shape.q_len);
  QUEST_CHECK(shape.num_kv_heads > 0 && shape.num_q_heads > 0 &&
                  shape.num_q_heads % shape.num_kv_heads == 0,
              "query: expected a multiple of the ", shape.num_kv_heads, " heads of key_cache, got ",
              shape.num_q_heads);
  shape.group_size = shape.num_q_heads / shape.num_kv_heads;
  check_head_dim(shape.head_dim, "query");
  check_head_dim(shape.value_dim, "value_cache");
  const int64_t batch = shape.batch, num_kv_heads = shape.num_kv_heads,
                max_seq_len = shape.max_seq_len;
  const int64_t head_dim = shape.head_dim, value_dim = shape.value_dim;
  CHECK_SHAPE(key_cache, batch, num_kv_heads, max_seq_len, head_dim);
  CHECK_SHAPE(value_cache, batch, num_kv_heads, max_seq_len, value_dim);
  CHECK_DTYPE(key_cache, query.scalar_type());
  CHECK_DTYPE(value_cache, query.scalar_type());
  CHECK_SAME_DEVICE(key_cache, query);
  CHECK_SAME_DEVICE(value_cache, query);
  CHECK_LAST_DIM_CONTIGUOUS(key_cache);
  CHECK_LAST_DIM_CONTIGUOUS(value_cache);
  QUEST_CHECK(max_seq_len < INT32_MAX, "key_cache: expected max_seq_len below 2^31, got ",
              max_seq_len);
  Attention a;
  a.dtype = dtype;
  a.shape = shape;
  a.query_owner = contiguous_query(query);
  a.query = query_pointers(a.query_owner);
  a.key_cache = cache_pointers(key_cache);
  a.value_cache = cache_pointers(value_cache);
  a.mask = check_mask(attn_mask, query, batch, shape.num_q_heads, shape.q_len, max_seq_len);
  a.scale = check_scale(scale, head_dim);
  return a;
}

float check_scale(std::optional<double> scale, int64_t head_dim) {
  if (scale) QUEST_CHECK(std::isfinite(*scale), "scale: expected a finite number, got ", *scale);
  return static_cast<float>(scale ? *scale : 1 / std::sqrt(static_cast<double>(head_dim)));
}

void check_single_query(const Tensor& query) {
  CHECK_DIM(query, 4, "[batch, num_q_heads, 1, head_dim]");
  QUEST_CHECK(query.size(2) == 1, "query: expected q_len (dimension 2) 1, got ", query.size(2));
}

Mask check_mask(const std::optional<Tensor>& mask, const Tensor& query, int64_t batch,
                int64_t num_q_heads, int64_t q_len, int64_t max_seq_len) {
  if (!mask) return {nullptr, 0, 0, 0, 0};
  const Tensor& attn_mask = *mask;
  CHECK_DTYPE(attn_mask, ScalarType::Bool);
  CHECK_DIM(attn_mask, 4, "broadcastable to [batch, num_q_heads, q_len, max_seq_len]");
  CHECK_SAME_DEVICE(attn_mask, query);
  const auto fits = [&](int64_t dim, int64_t size) {
    return attn_mask.size(dim) == 1 || attn_mask.size(dim) == size;
  };
  QUEST_CHECK(fits(0, batch) && fits(1, num_q_heads) && fits(2, q_len) && fits(3, max_seq_len),
              "attn_mask: expected a shape broadcastable to ",
              to_string({batch, num_q_heads, q_len, max_seq_len}), ", got ",
              to_string(attn_mask.sizes()));
  const auto stride = [&](int64_t dim) {
    return attn_mask.size(dim) == 1 ? 0 : attn_mask.stride(dim);
  };
  return {static_cast<const uint8_t*>(attn_mask.const_data_ptr()), stride(0), stride(1), stride(2),
          stride(3)};
}

PageSummary check_page_summary(const Tensor& page_summary, SummaryFormat format, const Tensor& like,
                               int64_t batch, int64_t num_kv_heads, int64_t num_pages,
                               int64_t head_dim) {
  const DType dtype = check_float_dtype(like, "key_cache or query");
  PageSummary summary;
  summary.format = format;
  summary.element_size = row_element_size(format.kind, element_size(dtype));
  switch (format.kind) {
    case SummaryKind::kMinMax:
      summary.row_bytes = 2 * head_dim * summary.element_size;
      CHECK_SHAPE(page_summary, batch, num_kv_heads, num_pages, 2, head_dim);
      CHECK_DTYPE(page_summary, like.scalar_type());
      QUEST_CHECK(page_summary.stride(4) == 1 && page_summary.stride(3) == head_dim,
                  "page_summary: expected contiguous rows [2, head_dim], got strides ",
                  to_string(page_summary.strides()));
      break;
    case SummaryKind::kSketch:
      summary.row_bytes = sketch_row(static_cast<int32_t>(head_dim), format).row_bytes;
      CHECK_SHAPE(page_summary, batch, num_kv_heads, num_pages, summary.row_bytes);
      CHECK_DTYPE(page_summary, ScalarType::Byte);
      CHECK_LAST_DIM_CONTIGUOUS(page_summary);
      break;
  }
  CHECK_SAME_DEVICE(page_summary, like);
  summary.data = page_summary.mutable_data_ptr();
  summary.batch_stride = page_summary.stride(0);
  summary.head_stride = page_summary.stride(1);
  summary.page_stride = page_summary.stride(2);
  return summary;
}

void* row_of(const PageSummary& summary, int64_t batch_row, int64_t kv_head) {
  const int64_t index = batch_row * summary.batch_stride + kv_head * summary.head_stride;
  return static_cast<char*>(summary.data) + index * summary.element_size;
}

void check_seq_lens(const Tensor& seq_lens, const Tensor& query, int64_t batch) {
  const ScalarType dtype = seq_lens.scalar_type();
  QUEST_CHECK(dtype == ScalarType::Int || dtype == ScalarType::Long,
              "seq_lens: expected dtype int32 or int64, got ", dtype_name(dtype));
  QUEST_CHECK(seq_lens.dim() == 1 && (seq_lens.size(0) == 1 || seq_lens.size(0) == batch),
              "seq_lens: expected shape [1]", batch == 1 ? "" : " or " + to_string({batch}),
              ", got ", to_string(seq_lens.sizes()));
  CHECK_SAME_DEVICE(seq_lens, query);
}

void read_seq_lens(const Tensor& seq_lens, int64_t batch, int64_t max_seq_len, int64_t* lengths) {
  const void* data = seq_lens.const_data_ptr();
  const int64_t stride = seq_lens.size(0) == 1 ? 0 : seq_lens.stride(0);
  const bool is_long = seq_lens.scalar_type() == ScalarType::Long;
  for (int64_t b = 0; b < batch; ++b) {
    lengths[b] = is_long ? static_cast<const int64_t*>(data)[b * stride]
                         : static_cast<const int32_t*>(data)[b * stride];
    QUEST_CHECK(lengths[b] >= 1 && lengths[b] <= max_seq_len,
                "seq_lens: expected 1 <= length <= ", max_seq_len, ", got ", lengths[b], " in row ",
                b);
  }
}

namespace {

// Without a mask query i of q_len stands at position seq_len - q_len + i and attends what is
// before. With one, the mask says so: positions at the end that it forbids are left out, no more
// than those.
int64_t query_len(const Attention& a, int64_t row, int64_t seq_len) {
  const int64_t q_len = a.shape.q_len;
  const int64_t causal = seq_len - (q_len - 1 - row % q_len);
  if (!a.mask.data) return causal;
  const int64_t num_heads = a.mask.head_stride ? a.shape.num_q_heads : 1;
  int64_t end = causal;
  for (int64_t head = 0; head < num_heads; ++head) {
    const uint8_t* mask = mask_of(a.mask, q_len, row, head);
    int64_t last = seq_len;
    while (last > end && !mask[(last - 1) * a.mask.token_stride]) --last;
    end = last;
  }
  return end;
}

}  // namespace

void read_query_lens(const Attention& a, const Tensor& seq_lens, int64_t* lengths) {
  const Shape& shape = a.shape;
  const int64_t q_len = shape.q_len;
  // The lengths of the batch rows come to lie behind those of the queries before them.
  int64_t* seq_len = lengths + shape.num_rows() - shape.batch;
  read_seq_lens(seq_lens, shape.batch, shape.max_seq_len, seq_len);
  for (int64_t b = 0; b < shape.batch; ++b) {
    const int64_t end = seq_len[b];
    QUEST_CHECK(end >= q_len, "seq_lens: expected at least the ", q_len,
                " positions of the queries, got ", end, " in row ", b);
    for (int64_t i = 0; i < q_len; ++i) {
      lengths[b * q_len + i] = query_len(a, b * q_len + i, end);
    }
  }
}

int64_t element_size(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

const void* offset(const void* data, DType dtype, int64_t index) {
  return static_cast<const char*>(data) + index * element_size(dtype);
}

void* offset(void* data, DType dtype, int64_t index) {
  return static_cast<char*>(data) + index * element_size(dtype);
}

const void* query_of(const Query& query, DType dtype, int64_t q_len, int64_t row, int64_t head) {
  return offset(query.data, dtype,
                row / q_len * query.batch_stride + head * query.head_stride +
                    row % q_len * query.query_stride);
}

const void* cache_of(const Cache& cache, DType dtype, int64_t batch_row, int64_t kv_head) {
  return offset(cache.data, dtype, batch_row * cache.batch_stride + kv_head * cache.head_stride);
}

const uint8_t* mask_of(const Mask& mask, int64_t q_len, int64_t row, int64_t head) {
  return mask.data + row / q_len * mask.batch_stride + head * mask.head_stride +
         row % q_len * mask.query_stride;
}

Tensor new_tensor(const Tensor& like, std::initializer_list<int64_t> shape, ScalarType dtype) {
  int64_t strides[8];
  int64_t stride = 1;
  for (size_t i = shape.size(); i-- > 0;) {
    strides[i] = stride;
    stride *= shape.begin()[i];
  }
  return new_strided_tensor(like, {shape.begin(), shape.size()}, strides, dtype);
}

Tensor new_strided_tensor(const Tensor& like, Sizes shape, const int64_t* strides,
                          ScalarType dtype) {
  int32_t device_type = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      static_cast<int64_t>(shape.size()), shape.data(), strides,
      static_cast<int32_t>(torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype))),
      device_type, like.get_device_index(), &handle));
  return Tensor(handle);
}

Tensor new_output(const Attention& a) {
  const Shape& s = a.shape;
  const int64_t shape[4] = {s.batch, s.num_q_heads, s.q_len, s.value_dim};
  const int64_t query_stride = s.num_q_heads * s.value_dim;
  const int64_t strides[4] = {s.q_len * query_stride, s.value_dim, query_stride, 1};
  return new_strided_tensor(a.query_owner, {shape, 4}, strides, a.query_owner.scalar_type());
}

}  // namespace quest
