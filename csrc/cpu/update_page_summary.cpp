#include <algorithm>

#include "counters.h"
#include "cpu/dispatch.h"
#include "cpu/ops.h"
#include "cpu/scratch.h"
#include "cpu/tasks.h"

namespace quest {
namespace {

constexpr int64_t kTaskPages = 256;
constexpr int64_t kSamples = 4;

struct Written {
  int64_t first;  // smallest position
  int64_t end;    // largest position + 1
};

Written read_positions(const UpdateArguments& u) {
  int64_t smallest = u.positions[0], largest = u.positions[0];
  for (int64_t i = 1; i < u.num_positions; ++i) {
    smallest = std::min(smallest, u.positions[i * u.position_stride]);
    largest = std::max(largest, u.positions[i * u.position_stride]);
  }
  QUEST_CHECK(smallest >= 0 && largest < u.max_seq_len, "cache_position: expected 0 <= position < ",
              u.max_seq_len, ", got ", smallest < 0 ? smallest : largest);
  return {smallest, largest + 1};
}

// Pages that are looked at for changes made by others: the last sealed one that is kept, and three
// that vary with the position.
void choose_samples(int64_t first_position, int64_t num_kept, int64_t* samples) {
  const int64_t hash =
      static_cast<int64_t>(static_cast<uint64_t>(first_position) * 2654435761u % (1ull << 32));
  samples[0] = num_kept - 1;
  for (int64_t j = 0; j + 1 < kSamples; ++j) samples[j + 1] = (hash + j * 40503) % num_kept;
}

// Asks for the samples of a head while those of the one before it are looked at.
void fetch_samples(const PageSummaryParams& p, const int64_t* samples, int64_t summary_bytes) {
  const int64_t row_bytes = p.head_dim * element_size(p.dtype);
  const int64_t element = row_element_size(p.format.kind, element_size(p.dtype));
  for (int64_t i = 0; i < kSamples; ++i) {
    const char* summary =
        static_cast<const char*>(p.page_summary) + samples[i] * p.summary_stride * element;
    for (int64_t byte = 0; byte < summary_bytes; byte += 64) {
      __builtin_prefetch(summary + byte, 0, 2);
    }
    for (int64_t t = 0; t < p.format.page_size; ++t) {
      const int64_t token = samples[i] * p.format.page_size + t;
      const char* row = static_cast<const char*>(offset(p.key, p.dtype, token * p.key_stride));
      for (int64_t byte = 0; byte < row_bytes; byte += 64) __builtin_prefetch(row + byte, 0, 2);
    }
  }
}

bool is_current(PageSummaryParams p, const int64_t* samples) {
  for (int64_t i = 0; i < kSamples; ++i) {
    p.first_page = samples[i];
    p.last_page = samples[i] + 1;
    if (!kernels().pages_are_current(p)) return false;
  }
  return true;
}

}  // namespace

void update(const UpdateArguments& u) {
  const int64_t num_kv_heads = u.num_kv_heads, page_size = u.page_size, head_dim = u.head_dim;
  const DType dtype = u.dtype;
  const PageSummary& summary = u.page_summary;
  const SummaryFormat format = summary.format;
  const Written written = read_positions(u);
  int64_t* sealed = u.num_sealed;
  QUEST_CHECK(*sealed >= 0, "num_sealed: expected at least 0, got ", *sealed);
  const int64_t end = written.end / page_size;
  int64_t start = std::min(*sealed, written.first / page_size);
  if (u.next_position) {
    int64_t& next = *u.next_position;
    if (next >= 0 && written.first != next) start = 0;
    if (next >= 0) next = written.end;
  }
  const int64_t num_heads = u.batch * num_kv_heads;
  const int64_t page_bytes = page_size * head_dim * element_size(dtype);
  Scratch& scratch = call_scratch();
  scratch.reset();
  bool* is_stale = scratch.take<bool>(num_heads);
  std::fill_n(is_stale, num_heads, false);
  const auto params = [&](int64_t head, int64_t first_page, int64_t last_page) {
    const int64_t row = head / num_kv_heads, kv_head = head % num_kv_heads;
    PageSummaryParams p;
    p.dtype = dtype;
    p.head_dim = static_cast<int32_t>(head_dim);
    p.format = format;
    p.key = cache_of(u.key_cache, dtype, row, kv_head);
    p.key_stride = u.key_cache.token_stride;
    p.page_summary = row_of(summary, row, kv_head);
    p.summary_stride = summary.page_stride;
    p.first_page = first_page;
    p.last_page = last_page;
    return p;
  };
  if (start > 0) {
    int64_t samples[kSamples];
    choose_samples(written.first, start, samples);
    run_tasks(num_heads, num_heads * kSamples * page_bytes, [&](int64_t head) {
      if (head + 1 < num_heads) fetch_samples(params(head + 1, 0, 0), samples, summary.row_bytes);
      is_stale[head] = !is_current(params(head, 0, 0), samples);
    });
  }

  const int64_t num_stale = std::count(is_stale, is_stale + num_heads, true);
  const int64_t num_pages = num_heads * (end - start) + num_stale * start;
  const int64_t parts = ceil_div(end, kTaskPages);
  run_tasks(num_pages > 0 ? num_heads * parts : 0, num_pages * page_bytes, [&](int64_t i) {
    const int64_t head = i / parts, first = i % parts * kTaskPages;
    const int64_t last = std::min(first + kTaskPages, end);
    const int64_t begin = is_stale[head] ? first : std::max(first, start);
    if (begin < last) kernels().summarise_pages(params(head, begin, last));
  });
  *sealed = end;

  count(Counter::kUpdateCalls, 1);
  count(Counter::kSummariesRebuilt, num_stale);
  count(Counter::kPagesSealed, num_pages);
}

void update_page_summary(Tensor key_cache, Tensor cache_position, Tensor page_summary,
                         Tensor num_sealed, SummaryFormat format) {
  update(check_update(key_cache, cache_position, page_summary, num_sealed, format));
}

}  // namespace quest
