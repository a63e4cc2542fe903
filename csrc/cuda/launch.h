// Launches of the kernels; results are values of cudaError_t, 0 for success. Known to the host
// code, which sees no CUDA header.
#pragma once

#include "cuda/calls.h"

namespace quest {
namespace cuda {

struct Device {
  int index;
  int num_sms;
  int64_t shared_bytes;  // that a CTA may have
  bool lets_next_begin;  // has griddepcontrol
};

int get_device(int index, Device* device);
const char* error_text(int error);

int launch_score(const ScoreCall& call, void* stream);
int launch_finish(const FinishCall& call, void* stream);
int launch_shares(const ShareCall& call, void* stream);
int launch_select(const SelectCall& call, void* stream);
int launch_attend(const AttendCall& call, int64_t num_works, void* stream);
// Of zeros.
int clear(void* memory, int64_t bytes, void* stream);

// Shared memory of a CTA of launch_attend, and the most query heads that it can attend.
int64_t attend_bytes(const AttendCall& call);
// Tokens that its warps attend at a time.
int attend_step(const AttendCall& call);
int max_heads(DType dtype);
// Of launch_score: shared memory of a CTA, and pages that a warp scores at a time.
int64_t score_bytes(const ScoreCall& call);
int pages_per_step(const Summaries& summaries);

}  // namespace cuda
}  // namespace quest
