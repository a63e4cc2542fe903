// The one-kernel form of a sparse step: the CTAs of a cluster do for one (row, KV head) what
// kernels 1 and 2 do with a launch and device memory in between. Orders of pages and partial
// results stay in shared memory, where the others read them.
#pragma once

#include "cuda/attend.h"
#include "cuda/score_share.h"

namespace quest {
namespace cuda {

// Orders of pages that a CTA keeps for one select head: RowPages::share at most.
QUEST_BOTH int64_t cluster_order_stride(const ClusterCall& p) {
  const int64_t share = (p.score.summaries.num_pages + p.size - 1) / p.size;
  return (share + 3) / 4 * 4;
}

QUEST_BOTH int works_per_cluster(const AttendCall& p) {
  return p.selects_per_group * p.tiles_per_select;
}

// Partial results that a CTA keeps.
QUEST_BOTH int64_t cluster_partial_floats(const AttendCall& p) {
  const int64_t num_units = (p.max_units + p.num_splits - 1) / p.num_splits;
  return num_units * p.heads_per_tile * (p.rows.value_dim + 2);
}

// What the other CTAs read before any of them attends.
struct ClusterMemory {
  int32_t differs;  // a sampled page has a summary that is not that of its keys
};

// Shared memory: ClusterMemory, orders, then what is needed for scores, later for attention.
template <class Warp>
QUEST_BOTH int64_t cluster_shared_bytes(const ClusterCall& p) {
  const int64_t orders = cluster_order_stride(p) * p.attend.selects_per_group * 4;
  const int64_t scoring = page_scorer_bytes(p.score);
  const int64_t attending =
      attend_shared_bytes<Warp>(p.attend) + cluster_partial_floats(p.attend) * 4 + 16;
  return sizeof(ClusterMemory) + 16 + orders + (scoring > attending ? scoring : attending);
}

#ifdef QUEST_HAS_CLUSTERS
// Updates the summaries of one (row, KV head) and leaves this CTA's share of the orders.
template <class Scorer>
QUEST_DEVICE void score_in_cluster(const ClusterCall& p, const RowPages& pages, int rank,
                                   int32_t* order, ClusterMemory& shared, WarpValues& values,
                                   SharedMemory memory) {
  const int index = cta_x() / p.size, num_kv_heads = p.score.summaries.num_kv_heads;
  ShareScorer<Scorer> scorer(p.score, pages, index / num_kv_heads, index % num_kv_heads, rank,
                             memory, values);
  scorer.set_order(order, cluster_order_stride(p));
  scorer.prepare(rank == 0);
  bool is_stale = false;
  const bool mine_differs = scorer.sample_differs(warp_index() * p.size + rank);
#pragma unroll 1
  for (;;) {
    scorer.run([&](int64_t page) { return scorer.row_of_page(page); });
    if (is_stale) break;
    const bool differs = any_in_cta(mine_differs);
    if (thread_index() == 0) shared.differs = differs;
    sync_cluster();
    const int peer = lane_index();
    is_stale = ballot(peer < p.size && load_peer(&shared.differs, peer)) != 0;
    if (!is_stale) return;
    // No CTA looks at samples or stored scales any more.
    scorer.start_again();
    if (rank == 0) scorer.store_scale(scorer.stored_scale());
  }
  sync_cluster();
}

// Brings together the orders that the CTAs of the cluster have `share` of each: in `all`.
QUEST_DEVICE const int32_t* gather_order(const int32_t* mine, int share, int num_pages,
                                         int32_t* all) {
#pragma unroll 4
  for (int i = thread_index() * 4; i < num_pages; i += kThreads * 4) {
    const Vector* orders = reinterpret_cast<const Vector*>(mine + i % share);
    *reinterpret_cast<Vector*>(all + i) = load_peer(orders, i / share);
  }
  return all;
}
#endif

// Grid: the CTAs of the clusters; clusters: (row, KV head).
template <class T, class Warp>
QUEST_KERNEL(kThreads, 1)
cluster_kernel(QUEST_PARAM ClusterCall p) {
#ifdef QUEST_HAS_CLUSTERS
  const int index = cta_x() / p.size, rank = cta_x() % p.size;
  SharedMemory memory;
  ClusterMemory& shared = *memory.take<ClusterMemory>(1);
  const int64_t order_stride = cluster_order_stride(p);
  int32_t* order = memory.take<int32_t>(order_stride * p.attend.selects_per_group);

  SharedMemory scoring = memory;
  WarpValues& values = *scoring.take<WarpValues>(1);
  const RowPages pages = find_pages<false>(p.score, index / p.score.summaries.num_kv_heads, values);
  if (pages.updates || pages.has_scores) {
    if (p.score.summaries.rows.format.kind == SummaryKind::kMinMaxInt8) {
      score_in_cluster<PageScorer<T, Int8, false>>(p, pages, rank, order, shared,
                                                                    values, scoring);
    } else {
      score_in_cluster<PageScorer<T, T, false>>(p, pages, rank, order, shared, values,
                                                              scoring);
    }
    // All CTAs of the cluster have read the state.
    if (pages.updates && rank == 0 && thread_index() == 0) {
      const int64_t num_clusters =
          static_cast<int64_t>(p.score.rows.batch) * p.score.summaries.num_kv_heads;
      if (is_last_at_state(p.score.update, num_clusters)) store_state(p.score.update, pages.span);
    }
  }

  // CTAs are shared out over the works of the KV head; there may be some without.
  const AttendCall& a = p.attend;
  const int split = rank % a.num_splits, number = rank / a.num_splits;
  const bool has_work = number < works_per_cluster(a);
  AttendMemory& attending = *memory.take<AttendMemory>(1);
  float* partials = memory.take<float>(cluster_partial_floats(a));
  const Work work = work_of(a, index * works_per_cluster(a) + (has_work ? number : 0), split);
  Attender<T, Warp> attender(a, work, attending, memory);
  if (has_work) {
    attender.load_query();
    attender.template find_share<false>(pages.len, [&](int num_pages, int32_t* all) {
      const int select = work.select_head % a.selects_per_group;
      const int32_t* mine = order + select * order_stride;
      return gather_order(mine, static_cast<int>(pages.share), num_pages, all);
    });
    if (attender.has_share()) attender.attend(partials, -attender.first_unit());
  }
  sync_cluster();
  if (has_work) attender.finish_in_cluster(partials, number * a.num_splits);
  sync_cluster();  // a CTA that has ended has no shared memory
#endif
}

}  // namespace cuda
}  // namespace quest
