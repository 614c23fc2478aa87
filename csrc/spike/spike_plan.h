// How a convolution by events is cut up: pure functions of its geometry.
#pragma once

#include "simd/memory.h"
#include "spike/spike.h"

namespace iirsnn::sparse {

constexpr int kTile = 32;                 // outputs of a row
constexpr int64_t kRowBytes = kTile * 4;  // of a whole row
constexpr int64_t kCached = 24 << 10;     // bytes of rows to keep in the L1 cache
constexpr int64_t kChunk = 1024;          // output positions whose sums stay in the L2 cache
constexpr int64_t kGradBlock = kWord;     // channels of a block of the weight gradient

constexpr int64_t floor_div(int64_t a, int64_t b) { return a >= 0 ? a / b : -ceil_div(-a, b); }
constexpr int64_t mod(int64_t a, int64_t b) { return a - floor_div(a, b) * b; }

// A unit is a chunk of output positions and a part of the tiles of outputs.
struct ForwardPlan {
  int64_t block, blocks;         // channels of a block, blocks of a group
  int64_t images, image_chunks;  // images of a chunk
  int64_t rows, row_chunks;      // output rows of a chunk; all of them where images > 1
  int64_t tiles, tile_parts;     // tiles of all groups; parts that they are shared out in

  int64_t units() const { return image_chunks * row_chunks * tile_parts; }
};
ForwardPlan forward_plan(const Conv& conv, int64_t threads);

struct GradPlan {
  int64_t blocks;         // of kGradBlock channels of a group
  int64_t left, pitch;    // zero columns before a row of gradients; columns from row to row
  int64_t images, units;  // images whose events are listed together
  int64_t rows;           // output rows whose gradients are in the L1 cache together
  int64_t tiles;          // of a group
};
GradPlan grad_plan(const Conv& conv);

}  // namespace iirsnn::sparse
