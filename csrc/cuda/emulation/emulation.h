// The machine that is emulated.
#pragma once

#include <stdint.h>

namespace quest {
namespace cuda {

struct Settings {
  int num_sms = 4;
  int64_t shared_bytes = 227 << 10;
  unsigned seed = 0;  // of the order of warps and CTAs; 0: as they are numbered
  int64_t num_launches = 0;
};

Settings& emulation_settings();

}  // namespace cuda
}  // namespace quest
