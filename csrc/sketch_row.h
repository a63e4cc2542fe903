// The row of a page sketch (quest_compile/ops/summaries/sketch.py), bytes:
//
//   plane of signs | mean, int8 [head_dim] | scale of each token, bfloat16 [16 * tiles] |
//   scale of the mean, float32 | zeros up to a whole line | with two bits a second plane
//
// Plane: [tiles of 16 tokens, blocks of 32 channels, 16 tokens, 4 bytes]; bit j of byte i is
// channel 32 * block + 4 * j + i. So the 32-bit word of a token and block, shifted right by j and
// masked with 0x01010101, holds channels 4 * j to 4 * j + 3 of the block, a byte each: what
// vpdpbusd and mma.m16n8k32 multiply.
#pragma once

#include <stdint.h>

#include "settings.h"

namespace quest {

constexpr int32_t kSketchTile = 16;   // tokens
constexpr int32_t kSketchBlock = 32;  // channels
constexpr int32_t kSketchLine = 64;   // bytes

constexpr float kSketchMaxKey = 1e11f;         // keys are clamped to it
constexpr float kSketchMinScale = 1e-30f;      // of a mean, and of a query
constexpr uint16_t kSketchNotFinite = 0x7fc0;  // scale of a token with a NaN or infinity

// Bytes from the start of a row.
struct SketchRow {
  int32_t plane_bytes;
  int32_t mean;
  int32_t token_scales;
  int32_t mean_scale;
  int32_t second_plane;
  int32_t row_bytes;
  int32_t num_planes;  // bits per channel
};

QUEST_EVERYWHERE constexpr SketchRow sketch_row(int32_t head_dim, const SummaryFormat& format) {
  const int32_t page_size = static_cast<int32_t>(format.page_size);
  const int32_t num_planes = static_cast<int32_t>(format.sketch_bits);
  const int32_t tiles = (page_size + kSketchTile - 1) / kSketchTile;
  const int32_t blocks = (head_dim + kSketchBlock - 1) / kSketchBlock;
  const int32_t plane_bytes = tiles * blocks * kSketchTile * 4;
  const int32_t token_scales = plane_bytes + head_dim;
  const int32_t mean_scale = token_scales + 2 * kSketchTile * tiles;
  const int32_t second_plane = (mean_scale + 4 + kSketchLine - 1) / kSketchLine * kSketchLine;
  const int32_t row_bytes = second_plane + (num_planes - 1) * plane_bytes;
  return {plane_bytes, plane_bytes, token_scales, mean_scale, second_plane, row_bytes, num_planes};
}

// Channels that are rotated together: the largest power of two that divides head_dim.
QUEST_EVERYWHERE constexpr int32_t rotation_size(int32_t head_dim) { return head_dim & -head_dim; }

// The sign of a channel before it is rotated: the sign bit of a float, or 0.
QUEST_EVERYWHERE constexpr uint32_t rotation_sign(int32_t channel) {
  uint32_t word = (static_cast<uint32_t>(channel) + 1) * 0x9E3779B1u;
  word = (word ^ (word >> 15)) * 0x85EBCA77u;
  return word & 0x80000000u;
}

}  // namespace quest
