// Whether a sparse step is one kernel, and with which clusters.
#include <algorithm>
#include <atomic>
#include <iterator>
#include <mutex>
#include <vector>

#include "cuda/plan.h"

namespace quest {
namespace cuda {
namespace {

std::atomic<DecodeForm> wanted_form{DecodeForm::kAuto};

// In the order of DecodeForm.
constexpr struct {
  DecodeForm form;
  const char* name;
} kForms[] = {{DecodeForm::kAuto, "auto"},
              {DecodeForm::kTwoKernels, "two_kernels"},
              {DecodeForm::kCluster, "cluster"}};

// active_clusters, which asks the driver, once per instance and size.
int32_t known_active_clusters(const ClusterCall& call, const Device& device) {
  struct Known {
    int64_t key[7];
    int count;
  };
  static std::mutex mutex;
  static std::vector<Known> all;
  const Known wanted = {
      {device.index, device.num_sms, device.shared_bytes, static_cast<int64_t>(call.attend.dtype),
       std::max(call.attend.rows.head_dim, call.attend.rows.value_dim), call.size,
       cluster_bytes(call)},
      0};
  const std::lock_guard<std::mutex> lock(mutex);
  for (const Known& known : all) {
    if (std::equal(known.key, known.key + 7, wanted.key)) return known.count;
  }
  all.push_back(wanted);
  const int error = active_clusters(call, &all.back().count);
  if (error) all.pop_back();
  check_launch(error, "clusters");
  return all.back().count;
}

// With clusters of call.size CTAs; false: that is not possible.
bool set_size(ClusterCall& call, const Device& device) {
  AttendCall& attend = call.attend;
  attend.num_splits = call.size / (attend.selects_per_group * attend.tiles_per_select);
  if (attend.num_splits == 0) return false;
  call.score.num_parts = call.size;
  return choose_stages(attend, device, [&] { return cluster_bytes(call); });
}

}  // namespace

std::string set_decode_form(StringHandle name) {
  const std::string wanted = take_string(name);
  const auto* found = std::find_if(std::begin(kForms), std::end(kForms),
                                   [&](const auto& each) { return wanted == each.name; });
  QUEST_CHECK(found != std::end(kForms), "form: expected 'auto', 'two_kernels' or 'cluster', got '",
              wanted, "'");
  return kForms[static_cast<int>(wanted_form.exchange(found->form))].name;
}

bool plan_cluster(ClusterCall& call, const Device& device) {
  const DecodeForm form = wanted_form;
  const AttendCall& attend = call.attend;
  const SummaryKind kind = call.score.summaries.rows.format.kind;
  const bool has_bounds = kind == SummaryKind::kMinMax || kind == SummaryKind::kMinMaxInt8;
  const bool is_possible = device.has_clusters && has_bounds && !attend.kept.scored_at &&
                           attend.choice.top_p == 1 && attend.attended == Attended::kSelected &&
                           attend.rows.q_len == 1 && attend.num_pages <= kMaxSharedOrder &&
                           attend.choice.page_budget <= kMaxSharedList;
  const int64_t num_clusters = static_cast<int64_t>(attend.rows.batch) * attend.rows.num_kv_heads;
  if (!is_possible || num_clusters > kMaxClusters || form == DecodeForm::kTwoKernels) return false;
  choose_steps(call.score, device);
  for (call.size = kMaxClusterSize; call.size >= kMinClusterSize; call.size /= 2) {
    // All at once, on most of the SMs: otherwise the two kernels share out the work better.
    const int64_t num_ctas = num_clusters * call.size;
    if (form == DecodeForm::kAuto && (num_ctas > device.num_sms || 3 * num_ctas < device.num_sms)) {
      continue;
    }
    if (!set_size(call, device)) continue;
    const int32_t num_active = known_active_clusters(call, device);
    if (num_active >= (form == DecodeForm::kAuto ? num_clusters : 1)) return true;
  }
  return false;
}

}  // namespace cuda
}  // namespace quest
