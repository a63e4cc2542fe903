// From checked arguments to calls of kernels: what is launched, with how many CTAs and how much
// memory. It depends on shapes and on the device alone, never on values.
#pragma once

#include "cuda/device_guard.h"
#include "operator_arguments.h"

namespace quest {
namespace cuda {

Rows make_rows(const Attention& a, const Tensor& seq_lens);
void set_lens(Rows& rows, const Tensor& seq_lens);
Summaries make_summaries(const PageSummary& rows, DType dtype, int64_t batch, int64_t num_kv_heads,
                         int64_t num_pages, int64_t head_dim);
// What a bound or an estimate is multiplied with to be a score.
float score_scale(GroupReduce group_reduce, SummaryKind kind, float scale);
// Without scratch.
Update make_update(const UpdateArguments& u);

// A call that attends everything; `out` as new_output makes it.
AttendCall make_attend(const Attention& a, const Tensor& seq_lens, const Tensor& out);
// Sets what follows from the sizes of the call and the device. Returns the number of works.
int64_t plan_attend(AttendCall& call, const Device& device);
// Sets how the CTAs of launch_score share the pages of a (row, KV head) and read them.
void plan_score(ScoreCall& call, const Device& device);

// Memory of the kernels, from torch's allocator: it may be given back once they are launched.
class Workspace {
 public:
  explicit Workspace(const Tensor& like) : like_(like) {}
  template <class T>
  T* take(int64_t count) {
    if (count == 0) return nullptr;
    const int64_t num_words = (count * static_cast<int64_t>(sizeof(T)) + 3) / 4;
    tensors_.push_back(new_tensor(like_, {num_words}, ScalarType::Int));
    return static_cast<T*>(tensors_.back().mutable_data_ptr());
  }

 private:
  const Tensor& like_;
  std::vector<Tensor> tensors_;
};

// What kernel 1 leaves to the next one.
void take_scratch(Update& update, const Summaries& summaries, Workspace& workspace);
// Scratch of a planned call. Arrivals are taken but not cleared.
void take_scratch(AttendCall& call, int64_t num_works, Workspace& workspace);

}  // namespace cuda
}  // namespace quest
