// The kernels of this instruction-set level, for csrc/cpu/dispatch.cpp.
#include "cpu/kernels/vec.h"
#include "params.h"

namespace quest {
namespace QUEST_ISA {

void summarise_pages(const PageSummaryParams& p);
bool pages_are_current(const PageSummaryParams& p);
void score_pages(const ScoreParams& p);
void share_scores(const ShareParams& p);
int32_t select_pages(const SelectParams& p);
void attend(const AttendParams& p);
void combine(const CombineParams& p);
void prepare_linear(const LinearParams& p);
void linear(const LinearParams& p);
void prefill(const PrefillParams& p);

#define QUEST_STRING_(x) #x
#define QUEST_STRING(x) QUEST_STRING_(x)

extern const KernelTable kKernels;
const KernelTable kKernels = {QUEST_STRING(QUEST_ISA),
                              summarise_pages,
                              pages_are_current,
                              score_pages,
                              share_scores,
                              select_pages,
                              attend,
                              combine,
                              prepare_linear,
                              linear,
                              prefill};

}  // namespace QUEST_ISA
}  // namespace quest
