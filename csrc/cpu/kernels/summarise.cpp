// Page summaries: elementwise minimum and maximum of the keys of a page; sketches are in
// sketch_rows.cpp.
//
// Keys are compared as integers in the order of the floats, which needs no widening. A zero is
// written as +0: the same keys give the same bits, whatever the order they are read in.
#include "cpu/kernels/sketch.h"
#include "cpu/kernels/vec.h"
#include "params.h"

namespace quest {
namespace QUEST_ISA {
namespace {

// kBytes of columns of all the rows.
template <class Key, int kBytes>
void reduce_columns(const char* rows, int64_t row_bytes, int num_rows, char* minimum,
                    char* maximum) {
  typedef Key Keys __attribute__((vector_size(kBytes)));
  constexpr int kSignShift = 8 * sizeof(Key) - 1;
  constexpr Key kMagnitude = static_cast<Key>((1ull << kSignShift) - 1);
  Keys low, high;
  memcpy(&low, rows, kBytes);
  low ^= (low >> kSignShift) & kMagnitude;
  high = low;
  for (int r = 1; r < num_rows; ++r) {
    Keys x;
    memcpy(&x, rows + r * row_bytes, kBytes);
    x ^= (x >> kSignShift) & kMagnitude;
    low = x < low ? x : low;
    high = x > high ? x : high;
  }
  // The key of -0 is -1.
  low = low == -1 ? low + 1 : low;
  high = high == -1 ? high + 1 : high;
  low ^= (low >> kSignShift) & kMagnitude;
  high ^= (high >> kSignShift) & kMagnitude;
  memcpy(minimum, &low, kBytes);
  memcpy(maximum, &high, kBytes);
}

template <class Key, int kBytes>
void reduce_row_of(const char* rows, int64_t row_bytes, int num_rows, int size, char* minimum,
                   char* maximum) {
  int i = 0;
  for (; i + kBytes <= size; i += kBytes) {
    reduce_columns<Key, kBytes>(rows + i, row_bytes, num_rows, minimum + i, maximum + i);
  }
  if (i < size) {
    // The rest, together with columns done before.
    i = size - kBytes;
    reduce_columns<Key, kBytes>(rows + i, row_bytes, num_rows, minimum + i, maximum + i);
  }
}

// summary [2, head_dim]
template <class Key>
void reduce_page(const PageSummaryParams& p, int64_t page, Key* summary) {
  const char* rows = reinterpret_cast<const char*>(static_cast<const Key*>(p.key) +
                                                   page * p.format.page_size * p.key_stride);
  const int64_t row_bytes = p.key_stride * sizeof(Key);
  const int size = p.head_dim * static_cast<int>(sizeof(Key));
  const int num_rows = static_cast<int>(p.format.page_size);
  char* minimum = reinterpret_cast<char*>(summary);
  char* maximum = reinterpret_cast<char*>(summary + p.head_dim);
  constexpr int kVectorBytes = kWidth * 4;
  if (size >= kVectorBytes) {
    reduce_row_of<Key, kVectorBytes>(rows, row_bytes, num_rows, size, minimum, maximum);
  } else {
    reduce_row_of<Key, 16>(rows, row_bytes, num_rows, size, minimum, maximum);
  }
}

constexpr int kMaxRowBytes =
    sketch_row(kMaxHeadDim, {kMaxPageSize, SummaryKind::kSketch, 2}).row_bytes;
static_assert(kMaxRowBytes >= 2 * kMaxHeadDim * 4, "room for bounds in float32 as well");

// The summary of a page to `row`; returns its bytes.
template <class Key>
int64_t summarise_page(const PageSummaryParams& p, int64_t page, char* row) {
  switch (p.format.kind) {
    case SummaryKind::kMinMax:
      reduce_page(p, page, reinterpret_cast<Key*>(row));
      return 2 * p.head_dim * sizeof(Key);
    case SummaryKind::kSketch:
      sketch_page(p, page, row);
      return sketch_row(p.head_dim, p.format).row_bytes;
  }
  return 0;
}

template <class Key>
char* stored_row(const PageSummaryParams& p, int64_t page) {
  const int64_t size = row_element_size(p.format.kind, sizeof(Key));
  return static_cast<char*>(p.page_summary) + page * p.summary_stride * size;
}

template <class Key>
void summarise_pages_of(const PageSummaryParams& p) {
  for (int64_t page = p.first_page; page < p.last_page; ++page) {
    summarise_page<Key>(p, page, stored_row<Key>(p, page));
  }
}

template <class Key>
bool pages_are_current_of(const PageSummaryParams& p) {
  alignas(64) char row[kMaxRowBytes];
  for (int64_t page = p.first_page; page < p.last_page; ++page) {
    const int64_t bytes = summarise_page<Key>(p, page, row);
    if (memcmp(row, stored_row<Key>(p, page), bytes) != 0) return false;
  }
  return true;
}

}  // namespace

void summarise_pages(const PageSummaryParams& p) {
  switch (p.dtype) {
    case DType::kFloat32:
      return summarise_pages_of<int32_t>(p);
    case DType::kBFloat16:
    case DType::kFloat16:
      return summarise_pages_of<int16_t>(p);
  }
}

bool pages_are_current(const PageSummaryParams& p) {
  switch (p.dtype) {
    case DType::kFloat32:
      return pages_are_current_of<int32_t>(p);
    case DType::kBFloat16:
    case DType::kFloat16:
      return pages_are_current_of<int16_t>(p);
  }
  return false;
}

}  // namespace QUEST_ISA
}  // namespace quest
