// Which tokens a work attends.
#pragma once

#include "cuda/attend_work.h"

namespace quest {
namespace cuda {

// Where the pages of a work are found, all of it shared memory.
struct ListMemory {
  SelectMemory& select;
  int32_t* list;   // [kMaxSharedList]
  int32_t* order;  // [kMaxSharedOrder]
};

// The listed pages in use, in the order of the list.
QUEST_DEVICE int read_list(const AttendCall& p, const Work& work, int len, WarpValues& values,
                           int32_t* list, bool& is_every_page) {
  const int num_pages = (len + p.choice.page_size - 1) / p.choice.page_size;
  const int32_t* slots =
      p.page_indices + work.row * p.indices_strides[0] + work.select_head * p.indices_strides[1];
  int count = 0;
  bool out_of_order = false;
#pragma unroll 1
  for (int first = 0; first < p.num_slots; first += kThreads) {
    const int i = first + thread_index();
    const int32_t page = i < p.num_slots ? slots[i * p.indices_strides[2]] : -1;
    const bool is_used = page >= 0 && page < num_pages;
    int total = 0;
    const int place = count + sum_before(is_used, values, total);
    if (is_used) list[place] = page;
    out_of_order = out_of_order || (is_used && page != place);
    count += total;
  }
  is_every_page = !any_in_cta(out_of_order) && count == num_pages;
  return count;
}

// `order`: what the pages are chosen by, a function of their number and of memory for them.
template <bool kHasTopP, class Order>
QUEST_DEVICE Tokens find_tokens(const AttendCall& p, const Work& work, int len,
                                const ListMemory& memory, const Order& order) {
  const int page_size = p.choice.page_size;
  Tokens tokens = {nullptr, page_size, len, len, nullptr, p.rows.mask.token_stride};
  if (p.rows.mask.data) tokens.mask = mask_of(p.rows, work.row, work.first_head);
  if (p.attended == Attended::kAll) return tokens;
  if (p.attended == Attended::kSelected && fits_budget(p.choice, len)) return tokens;
  const int capacity = p.attended == Attended::kSelected ? p.choice.page_budget : p.num_slots;
  int32_t* list = p.lists ? p.lists + static_cast<int64_t>(work.index) * capacity : memory.list;
  int count = 0;
  if (p.attended == Attended::kSelected) {
    const int num_pages = (len + page_size - 1) / page_size;
    // The list is not written before the search is over.
    PageSelector<kHasTopP> selector(p.choice, order(num_pages, memory.order), num_pages,
                                    memory.select, *reinterpret_cast<WeightMemory*>(memory.list));
    count = selector.select(list);
    tokens.num_slots = count * page_size;
    // The last page may be cut short by the end of the row.
    if (count > 0) tokens.num_slots -= maximum(0, (list[count - 1] + 1) * page_size - len);
  } else {
    bool is_every_page = false;
    count = read_list(p, work, len, memory.select.values, list, is_every_page);
    if (is_every_page) return tokens;  // the same bits as kAll
    tokens.num_slots = count * page_size;
  }
  tokens.pages = list;
  return tokens;
}

}  // namespace cuda
}  // namespace quest
