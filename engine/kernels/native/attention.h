// Attention over blocks in place, for chunks and single tokens alike: grouped query heads, causal.
//
// Keys are taken in parts of 256 positions, from a multiple of 256 on, each part in segments of 64
// with a running maximum (Milakov and Gimelshein 2018; FlashAttention, Dao et al. 2022), and the
// parts of a row are merged in order (Flash-Decoding). So what a row becomes depends on its own
// query, keys and values alone, bit for bit: not on its chunk, its company, nor on who computed
// which part.
//
// Layout of a block, of one layer and key head: keys [D / kPair][16][kPair], values
// [16 / kPair][D][kPair]: both products read it as the panels of gemm.h.
#pragma once
#include "gemm.h"
#include "types.h"

namespace hocket {
namespace HOCKET_LEVEL {

constexpr int kSlots = 16;                           // tokens of a block
constexpr int kSegmentBlocks = 4;
constexpr int kSegment = kSegmentBlocks * kSlots;
constexpr int kSegmentsAhead = 2;  // read into the caches while one is attended to
constexpr int kPart = 256;
#ifdef __AVX512F__
constexpr int kScoreRows = 6;  // 24 sums
#else
constexpr int kScoreRows = 1;
#endif
constexpr int kItemRows = 48;  // query rows that share a segment while it is in the L1 cache
constexpr int kMaxGroup = 64;  // query heads of a key head: they are never divided

// One row of one part: the largest score (in powers of two), the sum of 2^(score - largest), and
// the weighted values. [max, sum, D values] in the scratch.
constexpr int kPartialHead = 2;

template <class Num>
static void write_token(const AttentionArgs& a, int token, int first_head, int last_head) {
  using A = typename Num::A;
  using W = typename Num::W;
  constexpr int kPair = Num::kPair;
  const int dim = a.head_dim;
  const int64_t slot = a.prepared->slots[token];
  const int at = static_cast<int>(slot % kSlots);
  W* const block = static_cast<W*>(a.cache.data) + slot / kSlots * a.cache.block_stride +
                   a.layer * a.cache.layer_stride;
  for (int head = first_head; head < last_head; head++) {
    const A* const key = static_cast<const A*>(a.key) + token * a.stride + head * dim;
    const A* const value = static_cast<const A*>(a.value) + token * a.stride + head * dim;
    W* const keys = block + head * a.cache.head_stride + at * kPair;
    W* const values = block + a.cache.value_offset + head * a.cache.head_stride +
                      at / kPair * dim * kPair + at % kPair;
    for (int d = 0; d < dim; d += kPair) {
      for (int i = 0; i < kPair; i++) keys[d * kSlots + i] = rounded<W>(scalar(key[d + i]));
    }
    for (int d = 0; d < dim; d++) values[d * kPair] = rounded<W>(scalar(value[d]));
  }
}

// The running state of an item's rows, in a thread's own memory.
template <class Num>
struct Scratch {
  typename Num::A* query;   // [rows][D]
  typename Num::A* weight;  // [kScoreRows][kSegment]
  float* max;               // [rows], of the part
  float* sums;              // [rows][16]
  float* out;               // [rows][D]
  float* whole;             // [rows][2 + D], merged so far
};

// Adds a part to what is merged: both are [max, sum, D values].
INLINE void merge_part(float* whole, float max, float sum, const float* out, int dim, bool is_first) {
  if (is_first) {
    whole[0] = max;
    whole[1] = sum;
    for (int d = 0; d < dim; d += kLanes) store(whole + kPartialHead + d, load(out + d));
    return;
  }
  const float largest = whole[0] > max ? whole[0] : max;
  float factors[kLanes];
  Vec gaps = head_of(set1(whole[0] - largest), set1(max - largest), 1);
  store(factors, exp2(gaps));
  const Vec old_factor = set1(factors[0]), new_factor = set1(factors[1]);
  whole[0] = largest;
  whole[1] = __builtin_fmaf(whole[1], factors[0], sum * factors[1]);
  for (int d = 0; d < dim; d += kLanes) {
    float* const to = whole + kPartialHead + d;
    store(to, fma(load(to), old_factor, mul(load(out + d), new_factor)));
  }
}

template <class Num>
INLINE void emit(const AttentionArgs& a, int token, int head, const float* whole) {
  using A = typename Num::A;
  A* const to = static_cast<A*>(a.out) + (static_cast<int64_t>(token) * a.num_heads + head) * a.head_dim;
  const Vec factor = set1(1.f / whole[1]);
  for (int d = 0; d < a.head_dim; d += kLanes) put(to + d, mul(load(whole + kPartialHead + d), factor));
  if (a.lse) {
    a.lse[static_cast<int64_t>(token) * a.num_heads + head] =
        0.69314718f * (whole[0] + __builtin_log2f(whole[1]));
  }
}

// The blocks of a segment, of one layer and head, and of the segment to read ahead.
template <class W>
struct Segment {
  const W* blocks[kSegmentBlocks];
  const W* ahead[kSegmentBlocks];
};

// Rows [row, row + M) of an item and one segment: scores, weights, weighted values.
template <class Num, int M, bool kFetch>
INLINE void attend_rows(const AttentionArgs& a, const Scratch<Num>& s, int row, const int* visible,
                        const Segment<typename Num::W>& segment) {
  using W = typename Num::W;
  using A = typename Num::A;
  const int dim = a.head_dim;
  Vec score[M][kSegmentBlocks];
  UNROLL for (int m = 0; m < M; m++) {
    UNROLL for (int j = 0; j < kSegmentBlocks; j++) score[m][j] = zero();
  }
  Alike<W, kFetch ? kSegmentBlocks : 0> keys_ahead;
  keys_ahead.step = kSlots * Num::kPair;
  if constexpr (kFetch) {
    UNROLL for (int j = 0; j < kSegmentBlocks; j++) keys_ahead.w[j] = segment.ahead[j];
  }
  accumulate<Num, M, kSegmentBlocks>(score, s.query + row * dim, dim, segment.blocks, kSlots * Num::kPair, dim, keys_ahead);
  const Vec factor = set1(a.scale * 1.44269504f);
  float shrink[M];
  UNROLL for (int m = 0; m < M; m++) {
    const int num_visible = visible[row + m];
    Vec largest = set1(kLowest);
    UNROLL for (int j = 0; j < kSegmentBlocks; j++) {
      score[m][j] = mul(score[m][j], factor);
      const int rest = num_visible - j * kSlots;
      if (rest < kSlots) score[m][j] = head_of(score[m][j], set1(kMasked), max_of(0, rest));
      largest = max(largest, score[m][j]);
    }
    const float before = s.max[row + m];
    const float now = peak(max(largest, set1(before)));
    s.max[row + m] = now;
    shrink[m] = before - now;
    const Vec top = set1(now);
    Vec total = zero();
    UNROLL for (int j = 0; j < kSegmentBlocks; j++) {
      const Vec weight = exp2(sub(score[m][j], top));
      total = add(total, weight);
      put(s.weight + m * kSegment + j * kSlots, weight);
    }
    float* const sums = s.sums + (row + m) * kLanes;
    const Vec scaling = exp2(set1(shrink[m]));
    store(sums, fma(load(sums), scaling, total));
  }
  const auto weigh = [&](auto width, int d) INLINE_LAMBDA {
    constexpr int J = decltype(width)::value;
    Vec out[M][J];
    UNROLL for (int m = 0; m < M; m++) {
      const Vec scaling = exp2(set1(shrink[m]));
      UNROLL for (int j = 0; j < J; j++) out[m][j] = mul(load(s.out + (row + m) * dim + d + j * kLanes), scaling);
    }
    for (int block = 0; block < kSegmentBlocks; block++) {
      const W* columns[J];
      Alike<W, kFetch ? J : 0> values_ahead;
      values_ahead.step = dim * Num::kPair;
      UNROLL for (int j = 0; j < J; j++) {
        const int64_t at = a.cache.value_offset + (d + j * kLanes) * Num::kPair;
        columns[j] = segment.blocks[block] + at;
        if constexpr (kFetch) values_ahead.w[j] = segment.ahead[block] + at;
      }
      const A* const weight = s.weight + block * kSlots;
      accumulate<Num, M, J>(out, weight, kSegment, columns, dim * Num::kPair, kSlots, values_ahead);
    }
    UNROLL for (int m = 0; m < M; m++) {
      UNROLL for (int j = 0; j < J; j++) store(s.out + (row + m) * dim + d + j * kLanes, out[m][j]);
    }
  };
  int d = 0;
  for (; d + 4 * kLanes <= dim; d += 4 * kLanes) weigh(Width<4>{}, d);
  for (; d < dim; d += kLanes) weigh(Width<1>{}, d);
}

template <class Num, int M>
static void attend_some(int num, const AttentionArgs& a, const Scratch<Num>& s, int row,
                        const int* visible, const Segment<typename Num::W>& segment) {
  if constexpr (M > 0) {
    if (num == M) {
      // The first rows read ahead for all.
      if (row == 0) return attend_rows<Num, M, true>(a, s, row, visible, segment);
      return attend_rows<Num, M, false>(a, s, row, visible, segment);
    }
    attend_some<Num, M - 1>(num, a, s, row, visible, segment);
  }
}

// The blocks of the segment that starts at `key`; past the end of the keys the last block, where
// all is masked.
template <class Num>
INLINE void find_blocks(const AttentionArgs& a, const AttentionItem& item, int key,
                        const typename Num::W* (&blocks)[kSegmentBlocks]) {
  using W = typename Num::W;
  const int32_t* const table = a.prepared->table.data() + static_cast<int64_t>(item.row) * a.prepared->table_width;
  const W* const layer = static_cast<const W*>(a.cache.data) + a.layer * a.cache.layer_stride +
                         item.head * a.cache.head_stride;
  const int last = (item.position + item.num_tokens - 1) / kSlots;
  for (int j = 0; j < kSegmentBlocks; j++) {
    blocks[j] = layer + table[min_of(key / kSlots + j, last)] * a.cache.block_stride;
  }
}

template <class Num>
static void attend_item(const AttentionArgs& a, const AttentionItem& item,
                        const AttentionItem& next_item, const Scratch<Num>& s) {
  using W = typename Num::W;
  using A = typename Num::A;
  const int dim = a.head_dim, group = a.num_heads / a.num_kv_heads;
  const int num_rows = item.num_tokens * group;
  const int end = item.position + item.num_tokens;  // of the keys that the last token sees
  for (int i = 0; i < item.num_tokens; i++) {
    const A* const from = static_cast<const A*>(a.query) + (item.token + i) * a.stride + item.head * group * dim;
    memcpy(s.query + i * group * dim, from, group * dim * sizeof(A));
  }
  int visible[kMaxGroup];
  const int last_end = min_of(end, (item.first_part + item.num_parts) * kPart);
  for (int part = item.first_part; part < item.first_part + item.num_parts; part++) {
    for (int r = 0; r < num_rows; r++) s.max[r] = kLowest;
    memset(s.sums, 0, num_rows * kLanes * sizeof(float));
    memset(s.out, 0, static_cast<int64_t>(num_rows) * dim * sizeof(float));
    const int part_end = min_of(end, (part + 1) * kPart);
    for (int key = part * kPart; key < part_end; key += kSegment) {
      Segment<W> segment;
      find_blocks<Num>(a, item, key, segment.blocks);
      const int ahead = key + kSegmentsAhead * kSegment;
      if (ahead < last_end) {
        find_blocks<Num>(a, item, ahead, segment.ahead);
      } else {
        const int begin = next_item.first_part * kPart;
        find_blocks<Num>(a, next_item, begin + (ahead - last_end) / kSegment * kSegment, segment.ahead);
      }
      for (int r = 0; r < num_rows; r++) visible[r] = max_of(0, item.position + r / group + 1 - key);
      for (int r = 0; r < num_rows; r += kScoreRows) {
        const int num = min_of(kScoreRows, num_rows - r);
        if (visible[r + num - 1] > 0) attend_some<Num, kScoreRows>(num, a, s, r, visible, segment);
      }
    }
    for (int r = 0; r < num_rows; r++) {
      if (item.position + r / group < part * kPart) continue;  // sees no key of this part
      const float total = sum(load(s.sums + r * kLanes));
      float* whole = s.whole + r * (kPartialHead + dim);
      const bool is_apart = item.partial >= 0;
      if (is_apart) {
        const int64_t index = item.partial + static_cast<int64_t>(part - item.first_part) * num_rows + r;
        whole = a.partial + index * (kPartialHead + dim);
      }
      merge_part(whole, s.max[r], total, s.out + r * dim, dim, is_apart || part == 0);
    }
  }
  if (item.partial >= 0) return;
  for (int r = 0; r < num_rows; r++) {
    emit<Num>(a, item.token + r / group, item.head * group + r % group, s.whole + r * (kPartialHead + dim));
  }
}

template <class Num>
static void attend(Member& me, const AttentionArgs& a) {
  using A = typename Num::A;
  const int dim = a.head_dim, group = a.num_heads / a.num_kv_heads;
  const bool writes_first = !a.are_single;
  if (writes_first && !me.each(a.num_tokens, [&](int t) { write_token<Num>(a, t, 0, a.num_kv_heads); })) {
    return;
  }
  const int rows = max_of(kItemRows, group);
  // On the stack: with 64 rows of 256 numbers, some 200 KiB.
  const int floats = rows * (3 * dim + kLanes + 3) + kScoreRows * kSegment + 64;
  float* at = static_cast<float*>(__builtin_alloca_with_align(floats * sizeof(float) + 64, 512));
  Scratch<Num> s;
  const auto take = [&](int num) INLINE_LAMBDA {
    float* const mine = at;
    at += num;
    return mine;
  };
  s.out = take(rows * dim);
  s.query = reinterpret_cast<A*>(take(rows * dim));
  s.sums = take(rows * kLanes);
  s.weight = reinterpret_cast<A*>(take(kScoreRows * kSegment));
  s.max = take(rows);
  s.whole = take(rows * (kPartialHead + dim));
  const bool is_attended = me.each(a.num_items, [&](int i) {
    const std::vector<AttentionItem>& items = a.prepared->items;
    const AttentionItem& item = items[i];
    const bool has_own_key = item.first_part + item.num_parts > item.position / kPart;
    if (!writes_first && has_own_key) write_token<Num>(a, item.token, item.head, item.head + 1);
    attend_item<Num>(a, item, items[min_of(i + 1, a.num_items - 1)], s);
  });
  if (!is_attended || !a.num_merges) return;
  me.each(a.num_merges, [&](int i) {
    const AttentionMerge& merge = a.prepared->merges[i];
    for (int n = 0; n < group; n++) {
      for (int part = 0; part < merge.num_parts; part++) {
        const float* const from = a.partial + (merge.partial + static_cast<int64_t>(part) * group + n) * (kPartialHead + dim);
        merge_part(s.whole, from[0], from[1], from + kPartialHead, dim, part == 0);
      }
      emit<Num>(a, merge.token, merge.head * group + n, s.whole);
    }
  });
}

}  // namespace HOCKET_LEVEL
}  // namespace hocket
