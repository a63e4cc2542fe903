#include "boxing.h"

namespace quest {
namespace {

// Not std::string: up to torch 2.15 the conversion of the stable ABI to it leaks.
std::string take_string(Stack& stack) {
  const StringHandle text = stack.take<StringHandle>();
  const char* data = nullptr;
  TORCH_ERROR_CODE_CHECK(torch_string_c_str(text, &data));
  std::string copy(data);
  TORCH_ERROR_CODE_CHECK(torch_delete_string(text));
  return copy;
}

GroupReduce to_group_reduce(const std::string& name) {
  if (name == "softmax") return GroupReduce::kSoftmax;
  if (name == "none") return GroupReduce::kNone;
  QUEST_CHECK(name == "sum", "group_reduce: expected 'softmax', 'none' or 'sum', got '", name, "'");
  return GroupReduce::kSum;
}

SummaryKind to_summary_kind(const std::string& name) {
  if (name == "minmax") return SummaryKind::kMinMax;
  QUEST_CHECK(name == "sketch", "summary: expected 'minmax' or 'sketch', got '", name, "'");
  return SummaryKind::kSketch;
}

// Errors unless the budget, which is the argument `budget`, is enough for the sinks and recents,
// and the shares are some.
void check_selection(const Selection& s, const char* budget) {
  QUEST_CHECK(s.num_sink_pages >= 0, "num_sink_pages: expected at least 0, got ", s.num_sink_pages);
  QUEST_CHECK(s.num_recent_pages >= 1, "num_recent_pages: expected at least 1, got ",
              s.num_recent_pages);
  QUEST_CHECK(s.page_budget >= 1 && s.num_sink_pages <= s.page_budget &&
                  s.num_recent_pages <= s.page_budget - s.num_sink_pages,
              budget, ": expected room for ", s.num_sink_pages, " sink and ", s.num_recent_pages,
              " recent pages, got ", s.page_budget, " pages");
  QUEST_CHECK(s.budget_fraction > 0 && s.budget_fraction <= 1,
              "budget_fraction: expected above 0 and up to 1, got ", s.budget_fraction);
  QUEST_CHECK(s.top_p > 0 && s.top_p <= 1, "top_p: expected above 0 and up to 1, got ", s.top_p);
}

}  // namespace

template <>
GroupReduce Stack::take() {
  return to_group_reduce(take_string(*this));
}

template <>
SummaryFormat Stack::take() {
  SummaryFormat format;
  format.page_size = take<int64_t>();
  const std::string summary = take_string(*this);
  format.sketch_bits = take<int64_t>();
  format.kind = to_summary_kind(summary);
  check_page_size(format.page_size);
  QUEST_CHECK(format.sketch_bits == 1 || format.sketch_bits == 2,
              "sketch_bits: expected 1 or 2, got ", format.sketch_bits);
  return format;
}

template <>
Selection Stack::take() {
  Selection selection;
  selection.page_budget = take<int64_t>();
  selection.num_sink_pages = take<int64_t>();
  selection.num_recent_pages = take<int64_t>();
  selection.budget_fraction = take<double>();
  selection.top_p = take<double>();
  const auto score_scale = take<std::optional<double>>();
  selection.page_size = take<int64_t>();
  selection.group_reduce = score_scale ? GroupReduce::kNone : GroupReduce::kSoftmax;
  selection.log2_scale = log2_scale(score_scale.value_or(1));
  check_page_size(selection.page_size);
  QUEST_CHECK(selection.page_budget >= 1 && selection.page_budget < INT32_MAX,
              "page_budget: expected at least 1, got ", selection.page_budget);
  check_selection(selection, "page_budget");
  return selection;
}

template <>
SparseSettings Stack::take() {
  SparseSettings settings;
  Selection& selection = settings.selection;
  const int64_t budget = take<int64_t>();
  selection.num_sink_pages = take<int64_t>();
  selection.num_recent_pages = take<int64_t>();
  const std::string group_reduce = take_string(*this);
  selection.budget_fraction = take<double>();
  selection.top_p = take<double>();
  settings.scale = take<std::optional<double>>();
  settings.format = take<SummaryFormat>();
  selection.group_reduce = to_group_reduce(group_reduce);
  QUEST_CHECK(budget >= 1, "budget: expected at least 1, got ", budget);
  selection.page_size = settings.format.page_size;
  selection.page_budget = budget / selection.page_size;
  check_selection(selection, "budget");
  return settings;
}

}  // namespace quest
