// Which tokens a work attends.
#pragma once

#include "cuda/attend_work.h"
#include "cuda/shares.h"

namespace quest {
namespace cuda {

// Where the pages of a work are found, all of it shared memory.
struct ListMemory {
  SelectMemory& select;
  int32_t* list;  // [kMaxSharedList]
  OrderMemory order;
};

// The listed pages in use, in the order of the list.
QUEST_DEVICE int read_list(const AttendCall& p, const Work& work, int len, WarpValues& values,
                           int32_t* list, bool& is_every_page) {
  const int num_pages = row_pages(p.selection, len);
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

// What the pages of a work are chosen by.
QUEST_DEVICE const int32_t* find_order(const AttendCall& p, const Work& work, int len,
                                       int num_pages, const ListMemory& memory) {
  const OrderMemory& fast = memory.order;
  const int64_t select =
      static_cast<int64_t>(work.row) * p.rows.num_kv_heads * p.selects_per_group + work.select_head;
  if (p.selection.group_reduce != GroupReduce::kSoftmax) {
    return copy_order(p.order + select * p.num_pages, num_pages, fast);
  }
  const int num_heads = p.heads_per_select;
  const int32_t* order = p.order + select * num_heads * p.num_pages;
  int64_t stride = p.num_pages;
  int32_t* shared = num_pages > fast.size ? p.shared_order + select * p.num_pages : fast.words;
  if (static_cast<int64_t>(num_heads) * num_pages <= fast.size) {
    // Every thread the pages that it has in GroupShares.
#pragma unroll 1
    for (int head = 0; head < num_heads; ++head) {
      copy_order(order + head * stride, num_pages, {fast.words + head * num_pages, num_pages});
    }
    order = fast.words;
    stride = num_pages;
  }
  const GroupShares shares(order, stride, num_heads, len / static_cast<int>(p.selection.page_size),
                           reinterpret_cast<HeadSums*>(memory.list));
  shares.find(num_pages, shared);
#pragma unroll 1
  for (int page = thread_index(); page < num_pages; page += kThreads) {
    shared[page] = order_of_share(shared[page]);
  }
  return shared;
}

QUEST_DEVICE Tokens find_tokens(const AttendCall& p, const Work& work, int len,
                                const ListMemory& memory) {
  const int page_size = static_cast<int>(p.selection.page_size);
  Tokens tokens = {nullptr, page_size, len, len, nullptr, p.rows.mask.token_stride};
  if (p.rows.mask.data) tokens.mask = mask_of(p.rows, work.row, work.first_head);
  if (p.attended == Attended::kAll) return tokens;
  if (p.attended == Attended::kSelected && row_fits(p.selection, len)) return tokens;
  const int64_t capacity =
      p.attended == Attended::kSelected ? p.selection.page_budget : p.num_slots;
  int32_t* list = p.lists ? p.lists + work.index * capacity : memory.list;
  int count = 0;
  if (p.attended == Attended::kSelected) {
    const int num_pages = row_pages(p.selection, len);
    // The list is not written before the search is over.
    PageSelector selector(p.selection, find_order(p, work, len, num_pages, memory), num_pages,
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
