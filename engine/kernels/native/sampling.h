// One token a row: temperature, min_p, top_k, top_p, then the largest score after Gumbel noise.
//
// The rules are those of engine/sampler.py and the words those of engine/philox.py; logarithms are
// this file's own, so a draw may differ from torch's where two tokens tie but for the last bits.
// Every sum is of integers, so a row's token depends on nothing but its row.
#pragma once
#include "argmax.h"
#include "pool.h"
#include "simd.h"
#include "types.h"

namespace hocket {
namespace HOCKET_LEVEL {

constexpr int kBlock = 64;          // tokens of sixteen counters
constexpr float kMostNoise = 22.9f;  // -log(-log1p(-2^-33)) is 22.87
constexpr float kDropped = -__builtin_inff();

// Philox4x32-10 (Salmon et al., SC'11, section 3.3), sixteen counters from `first` on.
INLINE void philox(uint32_t first, const DrawRow& row, uint32_t (&words)[4][kLanes]) {
  Words a = words_from(first), b = words1(static_cast<uint32_t>(row.position));
  Words c = words1(static_cast<uint32_t>(row.choice)), d = words1(0x486F6331);
  const Words multiplier0 = words1(0xD2511F53), multiplier1 = words1(0xCD9E8D57);
  uint32_t key0 = static_cast<uint32_t>(row.seed), key1 = static_cast<uint32_t>(row.seed >> 32);
  for (int round = 0; round < 10; round++) {
    const Words p_low = low_product(a, multiplier0), p_high = high_product(a, multiplier0);
    const Words q_low = low_product(c, multiplier1), q_high = high_product(c, multiplier1);
    a = q_high ^ b ^ words1(key0);
    c = p_high ^ d ^ words1(key1);
    b = q_low;
    d = p_low;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  store(words[0], a);
  store(words[1], b);
  store(words[2], c);
  store(words[3], d);
}

// log(x) of a normal positive number, to 1e-7 (the polynomial of Cephes' logf, Moshier 1989).
INLINE float logarithm(float x) {
  const uint32_t bits = bits_of(x);
  float m = float_of((bits & 0x7fffffu) | 0x3f000000u);
  float e = static_cast<float>(static_cast<int>(bits >> 23) - 126);
  const bool is_low = m < 0.70710678f;
  e = is_low ? e - 1.f : e;
  m = (is_low ? m + m : m) - 1.f;
  const float z = m * m;
  float y = 7.0376836292e-2f;
  y = y * m - 1.1514610310e-1f;
  y = y * m + 1.1676998740e-1f;
  y = y * m - 1.2420140846e-1f;
  y = y * m + 1.4249322787e-1f;
  y = y * m - 1.6668057665e-1f;
  y = y * m + 2.0000714765e-1f;
  y = y * m - 2.4999993993e-1f;
  y = y * m + 3.3333331174e-1f;
  y = y * m * z + e * -2.12194440e-4f - 0.5f * z;
  return m + y + e * 0.693359375f;
}

// Standard Gumbel noise of 64 tokens from 4 `first` on: -log(E) of a unit exponential E a word.
static void gumbel(uint32_t first, const DrawRow& row, float (&noise)[kBlock]) {
  uint32_t words[4][kLanes];
  philox(first, row, words);
  for (int w = 0; w < 4; w++) {
    float drawn[kLanes];
    for (int i = 0; i < kLanes; i++) {
      float v = (static_cast<float>(words[w][i]) + 0.5f) * 2.3283064365386963e-10f;
      v = v < 0.99999994f ? v : 0.99999994f;
      const float u = 1.f - v, rest = u - 1.f;
      // log1p(-v), by the quotient that mends the rounding of 1 - v (Kahan).
      const float unit = rest == 0.f ? v : logarithm(u) * (v / rest);
      drawn[i] = -logarithm(unit);
    }
    for (int i = 0; i < kLanes; i++) noise[4 * i + w] = drawn[i];
  }
}

// Drops all but the shortest run of tokens, by score and then by id, whose weight reaches `target`.
// The score at which it does is found digit by digit in histograms; `weight(i)` is an integer.
template <class Weight>
static void keep_head(float* scores, int size, uint64_t target, const Weight& weight) {
  uint32_t edge = 0, known = 0;  // bits of the magnitude at the edge, and which of them are known
  for (const int shift : {22, 11, 0}) {
    uint64_t histogram[2048];
    memset(histogram, 0, sizeof(histogram));
    for (int i = 0; i < size; i++) {
      const uint32_t rank = bits_of(scores[i]) & 0x7fffffffu;
      if ((rank & known) == edge) histogram[rank >> shift & 2047] += weight(i);
    }
    uint32_t digit = 0;
    while (digit < 2047 && histogram[digit] < target) target -= histogram[digit++];
    edge |= digit << shift;
    known |= 2047u << shift;
    known &= 0x7fffffffu;
  }
  for (int i = 0; i < size; i++) {
    const uint32_t rank = bits_of(scores[i]) & 0x7fffffffu;
    if (rank < edge) continue;
    if (rank == edge && target > 0) {
      const uint64_t mine = weight(i);
      target = mine < target ? target - mine : 0;
      continue;
    }
    scores[i] = kDropped;
  }
}

// `odds` is scratch: of each token against the likeliest.
static void filter(const DrawRow& row, float* scores, float* odds, int size) {
  const Vec log2_e = set1(1.44269504f);
  const int padded = (size + kLanes - 1) / kLanes * kLanes;
  for (int i = 0; i < padded; i += kLanes) store(odds + i, exp2(mul(load(scores + i), log2_e)));
  if (row.min_p > 0.f) {
    const float least = row.min_p < 1.f ? row.min_p : 1.f;
    for (int i = 0; i < size; i++) scores[i] = odds[i] >= least ? scores[i] : kDropped;
  }
  if (row.top_k > 0) {
    uint64_t num_kept = 0;
    for (int i = 0; i < size; i++) num_kept += scores[i] > kDropped;
    const uint64_t target = static_cast<uint64_t>(row.top_k);
    if (target < num_kept) keep_head(scores, size, target, [](int) { return uint64_t{1}; });
  }
  if (row.top_p < 1.f) {
    const auto mass = [&](int i) INLINE_LAMBDA {
      return scores[i] > kDropped ? static_cast<uint64_t>(odds[i] * 1099511627776.f) : 0;  // 2^40
    };
    uint64_t total = 0;
    for (int i = 0; i < size; i++) total += mass(i);
    const double wanted = __builtin_ceil(static_cast<double>(total) * static_cast<double>(row.top_p));
    const uint64_t target = wanted < 1.0 ? 1 : static_cast<uint64_t>(wanted);
    keep_head(scores, size, target < total ? target : total, mass);
  }
}

// Returns a token id. A row with NaN, +inf, or nothing but -inf gets some id of the vocabulary.
static int64_t draw(const float* logits, const DrawRow& row, int size, float* scores, float* odds) {
  float top = kDropped;
  int64_t likeliest;
  float peak_or_spoiled;
  argmax_row(logits, size, &peak_or_spoiled, &likeliest);
  top = logits[likeliest];
  if (!(top > kDropped && top < -kDropped)) return likeliest;
  // Below the peak instead of absolute: a low temperature makes logits large.
  for (int i = 0; i < size; i++) scores[i] = (logits[i] - top) / row.temperature;
  const int padded = (size + kBlock - 1) / kBlock * kBlock;
  for (int i = size; i < padded; i++) scores[i] = kDropped;
  if (row.min_p > 0.f || row.top_k > 0 || row.top_p < 1.f) filter(row, scores, odds, size);

  float best = kDropped;
  int64_t chosen = likeliest;
  const auto try_block = [&](int at) {
    float noise[kBlock];
    gumbel(static_cast<uint32_t>(at / 4), row, noise);
    Vec highest = set1(kDropped);
    for (int i = 0; i < kBlock; i += kLanes) {
      const Vec total = add(load(scores + at + i), load(noise + i));
      store(noise + i, total);
      highest = max(highest, total);
    }
    if (peak(highest) < best) return;
    for (int i = 0; i < kBlock; i++) {
      const float score = noise[i];
      if (score > best || (score == best && at + i < chosen && score > kDropped)) {
        best = score;
        chosen = at + i;
      }
    }
  };
  // The likeliest token first: what lies below the best by more than noise can be is not tried.
  const int first = static_cast<int>(likeliest / kBlock) * kBlock;
  try_block(first);
  for (int at = 0; at < padded; at += kBlock) {
    if (at == first) continue;
    Vec highest = load(scores + at);
    UNROLL for (int j = 1; j < kBlock / kLanes; j++) highest = max(highest, load(scores + at + j * kLanes));
    if (peak(highest) + kMostNoise >= best) try_block(at);
  }
  return chosen;
}

static void draw_rows(Member& me, const DrawArgs& a) {
  float* const scratch = a.scratch + me.id * a.scratch_stride;
  me.each(a.num_rows, [&](int r) {
    const DrawRow& row = a.rows[r];
    const float* const logits = a.logits + row.index * a.size;
    a.ids[row.index] = draw(logits, row, a.size, scratch, scratch + a.scratch_stride / 2);
  });
}

}  // namespace HOCKET_LEVEL
}  // namespace hocket
