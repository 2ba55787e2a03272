// The dense slices of the Llama family: first, middle, last. Each is one stage of the pool.
#pragma once
#include "gemm.h"
#include "types.h"

namespace hocket {
namespace HOCKET_LEVEL {

INLINE Packed packed(const Matrix& m) { return {m.data, m.num_columns, m.depth}; }

// Root-mean-square norm (Zhang and Sennrich 2019).
template <class A>
INLINE void norm_row(const float* x, const float* weight, int size, float eps, A* out) {
  Vec squares = zero();
  for (int i = 0; i < size; i += kLanes) {
    const Vec value = load(x + i);
    squares = fma(value, value, squares);
  }
  const Vec factor = set1(1.f / __builtin_sqrtf(sum(squares) / static_cast<float>(size) + eps));
  for (int i = 0; i < size; i += kLanes) put(out + i, mul(mul(load(x + i), factor), load(weight + i)));
}

template <class Num>
INLINE bool norm(Member& me, const Llama& m, const Buffers& b, int num_tokens, const float* weight) {
  const int size = m.hidden_size;
  typename Num::A* const hidden = static_cast<typename Num::A*>(b.hidden);
  return me.each(num_tokens, [&](int t) {
    const int64_t at = static_cast<int64_t>(t) * size;
    norm_row(b.residual + at, weight, size, m.norm_eps, hidden + at);
  });
}

template <class Num>
INLINE bool add_product(Member& me, const Buffers& b, int num_tokens, const void* x,
                        const Packed& w, const Packed& following) {
  return gemm<Num>(me, static_cast<const typename Num::A*>(x), w.depth, num_tokens, w, following,
                   [&](int row, int panel, Vec first, Vec second) INLINE_LAMBDA {
    const int column = panel * kPanel;
    float* const to = b.residual + static_cast<int64_t>(row) * w.num_columns + column;
    store(to, add(load(to), first));
    if (column + kLanes < w.num_columns) store(to + kLanes, add(load(to + kLanes), second));
  });
}

// Norm, q, k, v, RoPE (Su et al. 2021) of one layer.
template <class Num>
INLINE bool project(Member& me, const Llama& m, const Buffers& b, int layer, int num_tokens) {
  using A = typename Num::A;
  const LlamaLayer& y = m.layers[layer];
  if (!norm<Num>(me, m, b, num_tokens, y.attention_norm)) return false;
  const int num_rotated = (m.num_heads + m.num_kv_heads) * m.head_dim;
  const int half = m.head_dim / 2;
  const Packed w = packed(y.qkv);
  A* const qkv = static_cast<A*>(b.qkv);
  return gemm<Num>(me, static_cast<const A*>(b.hidden), m.hidden_size, num_tokens, w, packed(y.out),
                   [&](int row, int panel, Vec first, Vec second) INLINE_LAMBDA {
    const Vec sums[2] = {first, second};
    UNROLL for (int j = 0; j < 2; j++) {
      const int column = panel * kPanel + j * kLanes;
      if (column >= w.num_columns) return;
      Vec value = sums[j];
      if (column < num_rotated) {
        const int64_t angle = b.positions[row] * half + column % m.head_dim / 2;
        const Vec sine = alternating(twice(m.sin + angle));
        value = fma(swapped(value), sine, mul(value, twice(m.cos + angle)));
      }
      put(qkv + static_cast<int64_t>(row) * w.num_columns + column, value);
    }
  });
}

// Output projection and MLP of one layer (SwiGLU, Shazeer 2020), each added to the residual.
template <class Num>
INLINE bool finish(Member& me, const Llama& m, const Buffers& b, const void* attended, int layer,
                   int num_tokens, const Packed& following) {
  using A = typename Num::A;
  const LlamaLayer& y = m.layers[layer];
  if (!add_product<Num>(me, b, num_tokens, attended, packed(y.out), packed(y.gate_up))) return false;
  if (!norm<Num>(me, m, b, num_tokens, y.mlp_norm)) return false;
  A* const mlp = static_cast<A*>(b.mlp);
  const int size = m.intermediate_size;
  const bool is_done = gemm<Num>(me, static_cast<const A*>(b.hidden), m.hidden_size, num_tokens,
                                 packed(y.gate_up), packed(y.down),
                                 [&](int row, int panel, Vec gate, Vec up) INLINE_LAMBDA {
    const Vec log2_e = set1(-1.44269504f);
    const Vec silu = div(gate, add(set1(1.f), exp2(mul(gate, log2_e))));
    put(mlp + static_cast<int64_t>(row) * size + panel * kLanes, mul(silu, up));
  });
  return is_done && add_product<Num>(me, b, num_tokens, b.mlp, packed(y.down), following);
}

template <class Num>
static void first(Member& me, const DenseArgs& a) {
  using W = typename Num::W;
  const Llama& m = *a.model;
  const int size = m.hidden_size;
  const bool is_done = me.each(a.num_tokens, [&](int t) {
    const W* const from = static_cast<const W*>(m.embedding) + a.buffers.token_ids[t] * size;
    float* const to = a.buffers.residual + static_cast<int64_t>(t) * size;
    for (int i = 0; i < size; i += kLanes) store(to + i, get(from + i));
  });
  if (is_done) project<Num>(me, m, a.buffers, 0, a.num_tokens);
}

template <class Num>
static void middle(Member& me, const DenseArgs& a) {
  if (!finish<Num>(me, *a.model, a.buffers, a.attended, a.layer - 1, a.num_tokens,
                   packed(a.model->layers[a.layer].qkv))) {
    return;
  }
  project<Num>(me, *a.model, a.buffers, a.layer, a.num_tokens);
}

template <class Num>
static void last(Member& me, const DenseArgs& a) {
  using A = typename Num::A;
  const Llama& m = *a.model;
  const Buffers& b = a.sampled;
  const int size = m.hidden_size, width = m.num_heads * m.head_dim;
  const int num = a.num_tokens;
  A* const attended = static_cast<A*>(b.qkv);  // read no more, and wide enough
  const bool is_gathered = me.each(num, [&](int s) {
    const int64_t row = a.rows[s];
    memcpy(b.residual + static_cast<int64_t>(s) * size, a.buffers.residual + row * size, size * sizeof(float));
    memcpy(attended + static_cast<int64_t>(s) * width,
           static_cast<const A*>(a.attended) + row * width, width * sizeof(A));
  });
  if (!is_gathered) return;
  if (!finish<Num>(me, m, b, attended, static_cast<int>(m.layers.size()) - 1, num, packed(m.head))) {
    return;
  }
  if (!norm<Num>(me, m, b, num, m.norm)) return;
  const int vocab = m.vocab_size;
  gemm<Num>(me, static_cast<const A*>(b.hidden), size, num, packed(m.head), packed(m.layers[0].qkv),
            [&](int row, int panel, Vec first, Vec second) INLINE_LAMBDA {
    const int column = panel * kPanel;
    float* const to = a.logits + static_cast<int64_t>(row) * vocab + column;
    store(to, first, min_of(kLanes, vocab - column));
    if (column + kLanes < vocab) store(to + kLanes, second, min_of(kLanes, vocab - column - kLanes));
  });
}

}  // namespace HOCKET_LEVEL
}  // namespace hocket
