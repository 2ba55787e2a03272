// How fast this machine reads memory: what no step can beat.
#pragma once
#include "pool.h"
#include "simd.h"
#include "types.h"

namespace hocket {
namespace HOCKET_LEVEL {

static void read_memory(Member& me, const ReadArgs& a) {
  constexpr int64_t kPiece = 1 << 16;  // floats
  me.each(static_cast<int>(a.num_floats / kPiece), [&](int item) {
    const float* const from = a.data + item * kPiece;
    Vec sums[4] = {zero(), zero(), zero(), zero()};
    for (int64_t i = 0; i < kPiece; i += 4 * kLanes) {
      _mm_prefetch(reinterpret_cast<const char*>(from + i + 1024), _MM_HINT_T0);
      UNROLL for (int j = 0; j < 4; j++) sums[j] = add(sums[j], load(from + i + j * kLanes));
    }
    const float total = sum(add(add(sums[0], sums[1]), add(sums[2], sums[3])));
    if (total == 12345.f) *a.sink = total;
  });
}

}  // namespace HOCKET_LEVEL
}  // namespace hocket
