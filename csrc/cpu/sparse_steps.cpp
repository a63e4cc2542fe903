// With enough KV heads for the threads a task does all three steps for one of them; otherwise the
// steps are tasks of their own, which wait for what they need. Both ways run the same functions
// over the same splits: the bits do not depend on the choice.
#include "cpu/sparse_steps.h"

#include <algorithm>
#include <limits>

namespace quest {
namespace {

constexpr int64_t kScoreTaskPages = 512;

enum class Step { kWhole, kScore, kSelect, kAttend };

struct Task {
  Step step;
  int64_t index;  // of a group (kWhole, kScore), select (kSelect) or work (kAttend)
  int64_t count;  // of groups (kWhole) or works (kAttend) that differ in the query alone
  int64_t part;   // of the scores, or split of the works
};

// How many groups from `first` on differ in the query alone.
int64_t count_queries(const SparseCall& call, int64_t first) {
  const Group& group = call.groups[first];
  int64_t end = first + 1;
  while (end < call.num_groups && call.groups[end].kv_head == group.kv_head &&
         call.groups[end].row / call.q_len() == group.row / call.q_len()) {
    ++end;
  }
  return end - first;
}

class Runner {
 public:
  Runner(SparseCall& call, Scratch& scratch) : call_(call), scratch_(scratch) {}

  // Tasks for the first num_whole groups as wholes, and for the others step by step.
  void plan(int64_t num_whole);
  void run(int64_t bytes) const;

 private:
  void take_tasks(int64_t count);
  void add(Step step, int64_t index, int64_t count, int64_t num_parts) {
    for (int64_t part = 0; part < num_parts; ++part) {
      tasks_[num_tasks_++] = {step, index, count, part};
    }
  }
  void add_dense();

  int64_t num_complete(const Group& group) const {
    return group.seq_len / call_.selection.page_size;
  }
  void score(const Group& group, int64_t first, int64_t last) const;
  void select(Select& select, Scratch& scratch) const;
  Work plan(const Select& select, int64_t i) const;

  void run_whole(int64_t index, Scratch& scratch) const;
  void run_score(int64_t index, int64_t part) const;
  void run_select(int64_t index, Scratch& scratch) const;
  void run_attend(int64_t index, int64_t split, Scratch& scratch) const;

  SparseCall& call_;
  Scratch& scratch_;
  Task* tasks_ = nullptr;
  int64_t num_tasks_ = 0;
  Countdown* pending_scores_ = nullptr;   // [num_groups]
  Countdown* pending_selects_ = nullptr;  // [num_selects]
  Countdown* pending_splits_ = nullptr;   // [num_works]
};

void Runner::score(const Group& group, int64_t first, int64_t last) const {
  score_page_range(call_.scoring, group.row, group.kv_head, group.tokens, first, last, group.scores,
                   call_.max_pages);
}

void Runner::select(Select& select, Scratch& scratch) const {
  const Group& group = call_.groups[select.group];
  const int64_t place = (&select - call_.selects) % call_.selects_per_group;
  float* scores = group.scores + place * call_.max_pages;
  if (call_.selection.group_reduce == GroupReduce::kSoftmax) {
    float* shares = scratch.take<float>(call_.max_pages);
    join_scores(call_.scoring, call_.a.mask, group.row, group.kv_head, num_complete(group), scores,
                call_.max_pages, shares, scratch);
    scores = shares;
  }
  std::fill(scores + num_complete(group), scores + call_.max_pages,
            -std::numeric_limits<float>::infinity());
  const uint8_t* live = group.live;
  if (call_.a.mask.head_stride) {
    uint8_t* own = scratch.take<uint8_t>(ceil_div(group.seq_len, call_.selection.page_size));
    find_live_pages(call_.a.mask, call_.q_len(), group.row, select.first_head,
                    call_.heads_per_select, call_.selection.page_size, group.seq_len, own);
    live = own;
  }
  select.num_pages =
      choose_pages(call_.selection, group.seq_len, scores, live, select.pages, scratch);
}

// Work i of a select.
Work Runner::plan(const Select& select, int64_t i) const {
  const Group& group = call_.groups[select.group];
  const int64_t num_heads = heads_per_unit(call_.a, call_.heads_per_select);
  const Unit unit = make_unit(call_.a, group.row, select.first_head + i * num_heads, num_heads);
  return plan_pages(unit, group.seq_len, select.pages, select.num_pages, call_.selection.page_size);
}

void Runner::run_whole(int64_t index, Scratch& scratch) const {
  Group& group = call_.groups[index];
  group.scores = scratch.take<float>(call_.scoring.heads_scored() * call_.max_pages);
  score(group, 0, num_complete(group));
  for (int64_t s = 0; s < call_.selects_per_group; ++s) {
    Select& each = call_.selects[index * call_.selects_per_group + s];
    select(each, scratch);
    for (int64_t i = 0; i < call_.works_per_select(); ++i) {
      Work work = plan(each, i);
      attend_unit(call_.a, work, call_.out, scratch);
    }
  }
}

void Runner::run_score(int64_t index, int64_t part) const {
  const Group& group = call_.groups[index];
  const int64_t first = part * kScoreTaskPages;
  score(group, first, std::min(first + kScoreTaskPages, num_complete(group)));
  finish_one(pending_scores_[index]);
}

void Runner::run_select(int64_t index, Scratch& scratch) const {
  Select& each = call_.selects[index];
  wait_for_zero(pending_scores_[each.group]);
  select(each, scratch);
  for (int64_t i = 0; i < call_.works_per_select(); ++i) {
    Work& work = call_.works[call_.num_dense_works + index * call_.works_per_select() + i];
    const Partials partials = work.partials;
    work = plan(each, i);
    work.partials = partials;
  }
  finish_one(pending_selects_[index]);
}

void Runner::run_attend(int64_t index, int64_t split, Scratch& scratch) const {
  if (index >= call_.num_dense_works) {
    wait_for_zero(pending_selects_[(index - call_.num_dense_works) / call_.works_per_select()]);
  }
  const Work& work = call_.works[index];
  if (index < call_.num_dense_works && split >= work.num_splits) return;
  if (split < work.num_splits) attend_split(call_.a, work, split, scratch);
  if (finish_one(pending_splits_[index])) combine_splits(call_.a, work, call_.out);
}

void Runner::take_tasks(int64_t count) {
  for (int64_t i = 0; i < call_.num_dense_works; ++i) count += call_.works[i].num_splits;
  tasks_ = scratch_.take<Task>(count);
  pending_splits_ = scratch_.take<Countdown>(call_.num_works);
}

void Runner::add_dense() {
  for (int64_t i = 0; i < call_.num_dense_works; ++i) {
    Work& work = call_.works[i];
    take_partials(call_.a, work, work.num_splits, scratch_);
    new (&pending_splits_[i]) Countdown(static_cast<int32_t>(work.num_splits));
  }
  for (int64_t i = 0, count; i < call_.num_dense_works; i += count) {
    count = count_queries(call_.a, call_.works, i, call_.num_dense_works);
    int64_t splits = 0;
    for (int64_t j = i; j < i + count; ++j) splits = std::max(splits, call_.works[j].num_splits);
    add(Step::kAttend, i, count, splits);
  }
}

void Runner::plan(int64_t num_whole) {
  const int64_t first_select = num_whole * call_.selects_per_group;
  const int64_t num_selects = call_.num_selects();
  const int64_t max_parts = ceil_div(call_.max_pages, kScoreTaskPages);
  const int64_t splits =
      std::max<int64_t>(1, max_page_splits(call_.selection.page_budget, call_.selection.page_size));
  take_tasks(call_.num_groups * max_parts + num_selects + call_.num_works * splits);
  for (int64_t i = 0, count; i < num_whole; i += count) {
    count = count_queries(call_, i);
    add(Step::kWhole, i, count, 1);
  }
  add_dense();

  pending_scores_ = scratch_.take<Countdown>(call_.num_groups);
  pending_selects_ = scratch_.take<Countdown>(num_selects);
  for (int64_t i = num_whole; i < call_.num_groups; ++i) {
    Group& group = call_.groups[i];
    group.scores = scratch_.take<float>(call_.scoring.heads_scored() * call_.max_pages);
    const int64_t parts = ceil_div(num_complete(group), kScoreTaskPages);
    new (&pending_scores_[i]) Countdown(static_cast<int32_t>(parts));
    add(Step::kScore, i, 1, parts);
  }
  for (int64_t i = first_select; i < num_selects; ++i) {
    new (&pending_selects_[i]) Countdown(1);
    add(Step::kSelect, i, 1, 1);
  }
  for (int64_t i = call_.num_dense_works + first_select * call_.works_per_select();
       i < call_.num_works; ++i) {
    Work& work = call_.works[i];
    work.unit.num_heads = heads_per_unit(call_.a, call_.heads_per_select);
    take_partials(call_.a, work, splits, scratch_);
    new (&pending_splits_[i]) Countdown(static_cast<int32_t>(splits));
    add(Step::kAttend, i, 1, splits);
  }
}

void Runner::run(int64_t bytes) const {
  run_tasks(num_tasks_, bytes, [this](int64_t i) {
    const Task& task = tasks_[i];
    Scratch& scratch = task_scratch();
    for (int64_t index = task.index; index < task.index + task.count; ++index) {
      scratch.reset();
      switch (task.step) {
        case Step::kWhole:
          run_whole(index, scratch);
          break;
        case Step::kScore:
          run_score(index, task.part);
          break;
        case Step::kSelect:
          run_select(index, scratch);
          break;
        case Step::kAttend:
          run_attend(index, task.part, scratch);
          break;
      }
    }
  });
}

// How many groups to take as wholes, from the first on: a whole group needs no waiting, but tasks
// as large as that leave threads idle where they are few or at the end.
int64_t count_whole(const SparseCall& call) {
  int64_t num_tasks = 0;
  for (int64_t i = 0; i < call.num_groups; i += count_queries(call, i)) ++num_tasks;
  const int64_t num_threads = torch::stable::get_num_threads();
  const int64_t rounds = ceil_div(num_tasks, num_threads);
  if (4 * num_tasks < 3 * rounds * num_threads) return 0;
  // Queries that share a task share what is read.
  if (num_threads == 1 || rounds < 2 || num_tasks < call.num_groups) return call.num_groups;
  return (rounds - 1) * num_threads;
}

}  // namespace

void run_sparse_call(SparseCall& call, int64_t bytes, Scratch& scratch) {
  Runner runner(call, scratch);
  runner.plan(count_whole(call));
  runner.run(bytes);
}

}  // namespace quest
