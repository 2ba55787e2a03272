// The likeliest token of each row of logits.
#pragma once
#include "pool.h"
#include "simd.h"
#include "types.h"

namespace hocket {
namespace HOCKET_LEVEL {

static void argmax_row(const float* row, int size, float* peak_out, int64_t* id_out) {
  constexpr int kRun = 8 * kLanes;
  float best = -__builtin_inff();
  int at = 0;
  Vec poison = zero();  // stays 0, or becomes NaN: x - x is NaN for NaN and infinities
  int i = 0;
  for (; i + kRun <= size; i += kRun) {
    Vec top = load(row + i);
    poison = add(poison, sub(top, top));
    UNROLL for (int j = 1; j < 8; j++) {
      const Vec other = load(row + i + j * kLanes);
      top = max(top, other);
      poison = add(poison, sub(other, other));
    }
    const float value = peak(top);
    if (value > best) {
      best = value;
      at = i;
    }
  }
  const int run_end = i;
  float rest = 0.f;
  for (; i < size; i++) {
    rest += row[i] - row[i];
    if (row[i] > best) {
      best = row[i];
      at = i;
    }
  }
  if (at < run_end) {
    while (at + 1 < size && row[at] != best) at++;
  }
  const float spoiled = sum(poison) + rest;
  *peak_out = spoiled == 0.f ? best : spoiled;
  *id_out = at;
}

static void argmax(Member& me, const ArgmaxArgs& a) {
  me.each(a.num_rows, [&](int r) {
    argmax_row(a.logits + static_cast<int64_t>(r) * a.size, a.size, a.peaks + r, a.ids + r);
  });
}

}  // namespace HOCKET_LEVEL
}  // namespace hocket
