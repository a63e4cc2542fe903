#include "cpu/scratch.h"

namespace quest {

Scratch& call_scratch() {
  static thread_local Scratch scratch;
  return scratch;
}

Scratch& task_scratch() {
  static thread_local Scratch scratch;
  return scratch;
}

}  // namespace quest
