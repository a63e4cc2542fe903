// Page sketches: the summary of a page as its mean in 8 bits, and one or two bits per channel of
// what is left of each token. Rows: sketch_row.h.
#pragma once

#include "params.h"

namespace quest {
namespace QUEST_ISA {

void sketch_page(const PageSummaryParams& p, int64_t page, char* row);
void score_sketches(const ScoreParams& p);

}  // namespace QUEST_ISA
}  // namespace quest
