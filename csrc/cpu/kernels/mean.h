// Mean and standard deviation of the keys of a page.
#pragma once

#include "params.h"

namespace quest {
namespace QUEST_ISA {

void mean_page(const PageSummaryParams& p, int64_t page, char* row);

}  // namespace QUEST_ISA
}  // namespace quest
