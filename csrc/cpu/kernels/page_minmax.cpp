// Page summaries: elementwise minimum and maximum of the keys of a page.
//
// Compared as integers in the order of the floats, which needs no widening. A zero is written as
// +0: the same keys give the same bits, whatever the order they are read in.
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
void reduce_page(const PageMinMaxParams& p, int64_t page, Key* summary) {
  const char* rows = reinterpret_cast<const char*>(static_cast<const Key*>(p.key) +
                                                   page * p.page_size * p.key_stride);
  const int64_t row_bytes = p.key_stride * sizeof(Key);
  const int size = p.head_dim * static_cast<int>(sizeof(Key));
  char* minimum = reinterpret_cast<char*>(summary);
  char* maximum = reinterpret_cast<char*>(summary + p.head_dim);
  constexpr int kVectorBytes = kWidth * 4;
  if (size >= kVectorBytes) {
    reduce_row_of<Key, kVectorBytes>(rows, row_bytes, p.page_size, size, minimum, maximum);
  } else {
    reduce_row_of<Key, 16>(rows, row_bytes, p.page_size, size, minimum, maximum);
  }
}

template <class Key>
void reduce_pages(const PageMinMaxParams& p) {
  for (int64_t page = p.first_page; page < p.last_page; ++page) {
    reduce_page(p, page, static_cast<Key*>(p.page_summary) + page * p.summary_stride);
  }
}

template <class Key>
bool page_is_current(const PageMinMaxParams& p, int64_t page) {
  Key summary[2 * kMaxHeadDim];
  reduce_page(p, page, summary);
  const Key* stored = static_cast<const Key*>(p.page_summary) + page * p.summary_stride;
  return memcmp(summary, stored, 2 * p.head_dim * sizeof(Key)) == 0;
}

}  // namespace

void page_minmax(const PageMinMaxParams& p) {
  p.dtype == DType::kFloat32 ? reduce_pages<int32_t>(p) : reduce_pages<int16_t>(p);
}

bool pages_are_current(const PageMinMaxParams& p) {
  for (int64_t page = p.first_page; page < p.last_page; ++page) {
    const bool is_current = p.dtype == DType::kFloat32 ? page_is_current<int32_t>(p, page)
                                                       : page_is_current<int16_t>(p, page);
    if (!is_current) return false;
  }
  return true;
}

}  // namespace QUEST_ISA
}  // namespace quest
