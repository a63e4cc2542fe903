// Score, select, attend in one parallel region. With enough KV heads for the threads a task does
// all three for one of them; otherwise the three are tasks of their own, which wait for what they
// need. Both ways run the same functions over the same splits: the bits do not depend on the
// choice.
#include <algorithm>
#include <limits>

#include "counters.h"
#include "cpu/attention.h"
#include "cpu/ops.h"
#include "cpu/selection.h"

namespace quest {
namespace {

constexpr int64_t kScoreTaskPages = 512;

// A KV head of a row that exceeds the budget.
struct Group {
  int64_t row;
  int64_t kv_head;
  int64_t seq_len;
  float* scores;  // [selects, max_pages]
};

// A choice of pages: of a whole group, or with group_reduce "none" of one query head.
struct Select {
  int64_t group;
  int64_t first_head;
  int32_t* pages;  // [page_budget]
  int64_t num_pages;
};

enum class Step { kWhole, kScore, kSelect, kAttend };

struct Task {
  Step step;
  int64_t index;  // of a group (kWhole, kScore), select (kSelect) or work (kAttend)
  int64_t part;   // of the scores, or split of the work
};

struct Call {
  Attention a;
  Scoring scoring;
  Choice choice;
  Output out;
  int64_t selects_per_group;
  int64_t heads_per_select;
  int64_t max_pages;  // of a sparse row
  Group* groups;
  int64_t num_groups;
  Select* selects;  // [num_groups * selects_per_group]
  // Dense works, then those of the selects, which exist once their select is done.
  Work* works;
  int64_t num_dense_works;
  int64_t num_works;
  Countdown* pending_scores;   // [num_groups]
  Countdown* pending_selects;  // [num_groups * selects_per_group]
  Countdown* pending_splits;   // [num_works]

  int64_t num_selects() const { return num_groups * selects_per_group; }
  int64_t works_per_select() const {
    return heads_per_select / heads_per_unit(a, heads_per_select);
  }

  int64_t num_complete(const Group& group) const { return group.seq_len / choice.page_size; }

  void score(const Group& group, int64_t first, int64_t last) const {
    score_page_range(scoring, group.row, group.kv_head, first, last, group.scores, max_pages);
  }

  void select(Select& select, Scratch& scratch) const {
    const Group& group = groups[select.group];
    float* scores = group.scores + (&select - selects) % selects_per_group * max_pages;
    const int64_t complete = num_complete(group);
    std::fill(scores + complete, scores + ceil_div(group.seq_len, choice.page_size),
              -std::numeric_limits<float>::infinity());
    select.num_pages = choose_pages(choice, a.mask, group.row, select.first_head, heads_per_select,
                                    group.seq_len, scores, select.pages, scratch);
  }

  // Work i of a select.
  Work plan(const Select& select, int64_t i) const {
    const Group& group = groups[select.group];
    const int64_t num_heads = heads_per_unit(a, heads_per_select);
    const Unit unit = make_unit(a, group.row, select.first_head + i * num_heads, num_heads);
    return plan_pages(unit, group.seq_len, select.pages, select.num_pages, choice.page_size);
  }

  void run_whole(int64_t index, Scratch& scratch) const {
    Group& group = groups[index];
    group.scores = scratch.take<float>(selects_per_group * max_pages);
    score(group, 0, num_complete(group));
    for (int64_t s = 0; s < selects_per_group; ++s) {
      Select& each = selects[index * selects_per_group + s];
      select(each, scratch);
      for (int64_t i = 0; i < works_per_select(); ++i) {
        Work work = plan(each, i);
        attend_unit(a, work, out, scratch);
      }
    }
  }

  void run_score(int64_t index, int64_t part) const {
    const Group& group = groups[index];
    const int64_t first = part * kScoreTaskPages;
    score(group, first, std::min(first + kScoreTaskPages, num_complete(group)));
    finish_one(pending_scores[index]);
  }

  void run_select(int64_t index, Scratch& scratch) const {
    Select& each = selects[index];
    wait_for_zero(pending_scores[each.group]);
    select(each, scratch);
    for (int64_t i = 0; i < works_per_select(); ++i) {
      const int64_t w = num_dense_works + index * works_per_select() + i;
      const Partials partials = works[w].partials;
      works[w] = plan(each, i);
      works[w].partials = partials;
    }
    finish_one(pending_selects[index]);
  }

  void run_attend(int64_t index, int64_t split, Scratch& scratch) const {
    if (index >= num_dense_works)
      wait_for_zero(pending_selects[(index - num_dense_works) / works_per_select()]);
    const Work& work = works[index];
    if (split < work.num_splits) attend_split(a, work, split, scratch);
    if (finish_one(pending_splits[index])) combine_splits(a, work, out);
  }

  void run(const Task& task) const {
    Scratch& scratch = task_scratch();
    scratch.reset();
    switch (task.step) {
      case Step::kWhole:
        return run_whole(task.index, scratch);
      case Step::kScore:
        return run_score(task.index, task.part);
      case Step::kSelect:
        return run_select(task.index, scratch);
      case Step::kAttend:
        return run_attend(task.index, task.part, scratch);
    }
  }
};

// Whether tasks of a whole group leave few threads idle.
bool fills_threads(int64_t num_groups) {
  const int64_t num_threads = torch::stable::get_num_threads();
  return 4 * num_groups >= 3 * ceil_div(num_groups, num_threads) * num_threads;
}

class TaskList {
 public:
  TaskList(Scratch& scratch, int64_t capacity) : tasks_(scratch.take<Task>(capacity)) {}
  void add(Step step, int64_t index, int64_t num_parts) {
    for (int64_t part = 0; part < num_parts; ++part) tasks_[size_++] = {step, index, part};
  }
  const Task& operator[](int64_t i) const { return tasks_[i]; }
  int64_t size() const { return size_; }

 private:
  Task* tasks_;
  int64_t size_ = 0;
};

// Splits of dense works, which every way of running has.
void add_dense(Call& call, TaskList& tasks, Scratch& scratch) {
  for (int64_t i = 0; i < call.num_dense_works; ++i) {
    Work& work = call.works[i];
    take_partials(call.a, work, work.num_splits, scratch);
    new (&call.pending_splits[i]) Countdown(static_cast<int32_t>(work.num_splits));
    tasks.add(Step::kAttend, i, work.num_splits);
  }
}

int64_t count_dense_splits(const Call& call) {
  int64_t count = 0;
  for (int64_t i = 0; i < call.num_dense_works; ++i) count += call.works[i].num_splits;
  return count;
}

void run_by_group(Call& call, int64_t bytes, Scratch& scratch) {
  TaskList tasks(scratch, call.num_groups + count_dense_splits(call));
  for (int64_t i = 0; i < call.num_groups; ++i) tasks.add(Step::kWhole, i, 1);
  add_dense(call, tasks, scratch);
  run_tasks(tasks.size(), bytes, [&](int64_t i) { call.run(tasks[i]); });
}

void run_by_step(Call& call, int64_t bytes, Scratch& scratch) {
  const int64_t num_selects = call.num_selects(), num_works = call.num_works;
  const int64_t score_parts = ceil_div(call.max_pages, kScoreTaskPages);
  const int64_t splits =
      std::max<int64_t>(1, max_page_splits(call.choice.page_budget, call.choice.page_size));
  TaskList tasks(scratch, call.num_groups * score_parts + num_selects + num_works * splits +
                              count_dense_splits(call));
  call.pending_scores = scratch.take<Countdown>(call.num_groups);
  call.pending_selects = scratch.take<Countdown>(num_selects);
  for (int64_t i = 0; i < call.num_groups; ++i) {
    Group& group = call.groups[i];
    group.scores = scratch.take<float>(call.selects_per_group * call.max_pages);
    const int64_t parts = ceil_div(call.num_complete(group), kScoreTaskPages);
    new (&call.pending_scores[i]) Countdown(static_cast<int32_t>(parts));
    tasks.add(Step::kScore, i, parts);
  }
  add_dense(call, tasks, scratch);
  for (int64_t i = 0; i < num_selects; ++i) {
    new (&call.pending_selects[i]) Countdown(1);
    tasks.add(Step::kSelect, i, 1);
  }
  for (int64_t i = call.num_dense_works; i < num_works; ++i) {
    call.works[i].unit.num_heads = heads_per_unit(call.a, call.heads_per_select);
    take_partials(call.a, call.works[i], splits, scratch);
    new (&call.pending_splits[i]) Countdown(static_cast<int32_t>(splits));
    tasks.add(Step::kAttend, i, splits);
  }
  run_tasks(tasks.size(), bytes, [&](int64_t i) { call.run(tasks[i]); });
}

}  // namespace

Tensor sparse_decode(Tensor query, Tensor key_cache, Tensor value_cache, Tensor page_summary,
                     Tensor seq_lens, std::optional<Tensor> attn_mask, int64_t budget,
                     int64_t page_size, int64_t num_sink_pages, int64_t num_recent_pages,
                     StringHandle group_reduce, std::optional<double> scale) {
  const GroupReduce reduce = check_group_reduce(group_reduce);
  Call call;
  call.a = check_attention(query, key_cache, value_cache, attn_mask, scale);
  const Shape& shape = call.a.shape;
  const int64_t batch = shape.batch, num_q_heads = shape.num_q_heads,
                num_kv_heads = shape.num_kv_heads;
  check_page_size(page_size);
  QUEST_CHECK(budget >= 1, "budget: expected at least 1, got ", budget);
  call.choice = {std::min(budget / page_size, ceil_div(shape.max_seq_len, page_size)), page_size,
                 num_sink_pages, num_recent_pages};
  check_page_budget(budget / page_size, num_sink_pages, num_recent_pages);
  check_page_summary(page_summary, query, batch, num_kv_heads,
                     ceil_div(shape.max_seq_len, page_size), shape.head_dim);
  check_seq_lens(seq_lens, query, batch);
  Scratch& scratch = call_scratch();
  scratch.reset();
  int64_t* lengths = scratch.take<int64_t>(batch);
  read_seq_lens(seq_lens, batch, shape.max_seq_len, lengths);
  Tensor out = new_tensor(query, {batch, num_q_heads, 1, shape.value_dim}, query.scalar_type());

  call.scoring = {call.a.dtype,     reduce,        call.a.query, summary_pointers(page_summary),
                  shape.group_size, shape.head_dim};
  call.out = {out.mutable_data_ptr(), nullptr};
  call.selects_per_group = reduce == GroupReduce::kNone ? shape.group_size : 1;
  call.heads_per_select = shape.group_size / call.selects_per_group;
  call.max_pages = 0;
  call.groups = scratch.take<Group>(batch * num_kv_heads);
  call.num_groups = 0;
  call.works = scratch.take<Work>(batch * num_q_heads);
  call.num_dense_works = 0;
  const int64_t budget_tokens = call.choice.page_budget * page_size;
  int64_t bytes = 0, dense_bytes = 0;
  for (int64_t row = 0; row < batch; ++row) {
    if (lengths[row] <= budget_tokens) {
      call.num_dense_works +=
          plan_dense_row(call.a, row, lengths[row], call.works + call.num_dense_works);
      dense_bytes += num_kv_heads * cache_bytes(call.a, lengths[row]);
      continue;
    }
    for (int64_t kv_head = 0; kv_head < num_kv_heads; ++kv_head) {
      call.groups[call.num_groups++] = {row, kv_head, lengths[row], nullptr};
      bytes += summary_bytes(call.scoring, lengths[row] / page_size);
    }
    call.max_pages = std::max(call.max_pages, ceil_div(lengths[row], page_size));
  }
  const int64_t num_selects = call.num_selects();
  call.num_works = call.num_dense_works + num_selects * call.works_per_select();
  call.pending_splits = scratch.take<Countdown>(call.num_works);
  call.selects = scratch.take<Select>(num_selects);
  for (int64_t i = 0; i < num_selects; ++i) {
    const Group& group = call.groups[i / call.selects_per_group];
    const int64_t head = group.kv_head * shape.group_size + i % call.selects_per_group;
    call.selects[i] = {i / call.selects_per_group, head,
                       scratch.take<int32_t>(call.choice.page_budget), 0};
  }
  const int64_t bytes_bound =
      bytes + dense_bytes + num_selects * cache_bytes(call.a, budget_tokens);
  if (fills_threads(call.num_groups)) {
    run_by_group(call, bytes_bound, scratch);
  } else {
    run_by_step(call, bytes_bound, scratch);
  }

  int64_t tokens_attended = 0, most = 0;
  for (int64_t i = 0; i < num_selects; ++i) {
    const Select& select = call.selects[i];
    const int64_t tokens =
        count_tokens(select.pages, select.num_pages, page_size, call.groups[select.group].seq_len);
    bytes += cache_bytes(call.a, tokens);
    tokens_attended += tokens * call.heads_per_select;
    most = std::max(most, tokens);
  }
  count(call.num_groups ? Counter::kSparseCalls : Counter::kSparseCallsCovered, 1);
  count(Counter::kSparseRows, num_selects * call.heads_per_select);
  count(Counter::kTokensAttended, tokens_attended);
  count_maximum(Counter::kMaxTokensAttended, most);
  count(Counter::kBytesRead, bytes + dense_bytes);
  return out;
}

}  // namespace quest
