// Products of a few rows with packed weights, the rows' sums taken in one order whatever their
// number: a row has the same bits in any company.
//
// A packed matrix [N, K] is panels of 32 columns, each [K / kPair][32][kPair], N padded with zeros.
#pragma once
#include "pool.h"
#include "simd.h"

namespace hocket {
namespace HOCKET_LEVEL {

constexpr int kPanel = 32;
#ifdef __AVX512F__
constexpr int kTileRows = 12;  // 24 sums, 4 weights, 2 inputs: 30 of 32 registers
#else
constexpr int kTileRows = 3;
#endif
// Bytes of rows that stay in a core's own cache while the panels pass.
constexpr int kRowBlockBytes = 1 << 20;

struct Packed {
  const void* data;
  int num_columns;  // N
  int depth;        // K
};

INLINE int num_panels(const Packed& w) { return (w.num_columns + kPanel - 1) / kPanel; }

// sums[m][j] += x[m] . w[j], over `count` numbers; w[j] are 16 columns each, the next kPair rows
// of a column `step` numbers on.
template <class Num, int M, int J, bool kFetch>
INLINE void accumulate(Vec (&sums)[M][J], const typename Num::A* x, int64_t x_stride,
                       const typename Num::W* const (&w)[J], int64_t step, int count) {
  using W = typename Num::W;
  if constexpr (Num::kPair == 1) {
    for (int k = 0; k < count; k++) {
      if constexpr (kFetch) _mm_prefetch(reinterpret_cast<const char*>(w[0] + (k + 16) * step), _MM_HINT_T0);
      Vec column[J];
      UNROLL for (int j = 0; j < J; j++) column[j] = load(w[j] + k * step);
      UNROLL for (int m = 0; m < M; m++) {
        const Vec one = set1(x[m * x_stride + k]);
        UNROLL for (int j = 0; j < J; j++) sums[m][j] = fma(column[j], one, sums[m][j]);
      }
    }
  } else {
    for (int k = 0; k < count / 2; k++) {
      const W* const here = w[0] + k * step;
      if constexpr (kFetch) {
        _mm_prefetch(reinterpret_cast<const char*>(here + 24 * step), _MM_HINT_T0);
        _mm_prefetch(reinterpret_cast<const char*>(here + 24 * step + 32), _MM_HINT_T0);
      }
#ifdef __AVX512BF16__
      UNROLL for (int m = 0; m < M; m++) {
        uint32_t pair;
        memcpy(&pair, x + m * x_stride + 2 * k, 4);
        UNROLL for (int j = 0; j < J; j++) sums[m][j] = dot(sums[m][j], w[j] + k * step, pair);
      }
#else
      Vec even[J], odd[J];
      UNROLL for (int j = 0; j < J; j++) {
        even[j] = even_bf16(w[j] + k * step);
        odd[j] = odd_bf16(w[j] + k * step);
      }
      UNROLL for (int m = 0; m < M; m++) {
        const Vec first = set1(x[m * x_stride + 2 * k]), second = set1(x[m * x_stride + 2 * k + 1]);
        UNROLL for (int j = 0; j < J; j++) sums[m][j] = fma(even[j], first, sums[m][j]);
        UNROLL for (int j = 0; j < J; j++) sums[m][j] = fma(odd[j], second, sums[m][j]);
      }
#endif
    }
  }
}

template <class Num, int M, class Epilogue>
INLINE void tile(const typename Num::A* x, int64_t x_stride, const Packed& w, int panel, int row,
                 const Epilogue& epilogue) {
  using W = typename Num::W;
  const W* const data = static_cast<const W*>(w.data) + static_cast<int64_t>(panel) * kPanel * w.depth;
  const W* const columns[2] = {data, data + kLanes * Num::kPair};
  Vec sums[M][2];
  UNROLL for (int m = 0; m < M; m++) sums[m][0] = sums[m][1] = zero();
  accumulate<Num, M, 2, (M <= kTileRows / 2)>(sums, x + row * x_stride, x_stride, columns, kPanel * Num::kPair, w.depth);
  UNROLL for (int m = 0; m < M; m++) epilogue(row + m, panel, sums[m][0], sums[m][1]);
}

template <class Num, int M, class Epilogue>
static void rows_of(int num_rows, const typename Num::A* x, int64_t x_stride, const Packed& w,
                    int panel, int row, const Epilogue& epilogue) {
  if constexpr (M > 0) {
    if (num_rows == M) return tile<Num, M>(x, x_stride, w, panel, row, epilogue);
    rows_of<Num, M - 1>(num_rows, x, x_stride, w, panel, row, epilogue);
  }
}

// Calls epilogue(row, panel, sums of columns 0 to 15, of 16 to 31) for all rows and panels.
template <class Num, class Epilogue>
INLINE bool gemm(Member& me, const typename Num::A* x, int64_t x_stride, int num_rows,
                 const Packed& w, const Epilogue& epilogue) {
  const int panels = num_panels(w);
  const int fitting = kRowBlockBytes / (w.depth * static_cast<int>(sizeof(typename Num::A)));
  const int most = max_of(1, fitting / kTileRows) * kTileRows;
  const int blocks = (num_rows + most - 1) / most;
  const int tiles = (num_rows + kTileRows - 1) / kTileRows;
  const int block = blocks ? (tiles + blocks - 1) / blocks * kTileRows : kTileRows;
  return me.each(blocks * panels, [&](int item) {
    const int panel = item % panels, first = item / panels * block;
    const int last = min_of(num_rows, first + block);
    for (int row = first; row < last; row += kTileRows) {
      rows_of<Num, kTileRows>(min_of(kTileRows, last - row), x, x_stride, w, panel, row, epilogue);
    }
  });
}

// Packs columns [16 panel .. ) of a row-major matrix [N, K]; those past N become zeros.
template <class Num>
static void pack_panel(const typename Num::W* matrix, int num_columns, int depth, int panel,
                       typename Num::W* packed) {
  constexpr int kPair = Num::kPair;
  typename Num::W* to = packed + static_cast<int64_t>(panel) * kPanel * depth;
  for (int k = 0; k < depth; k += kPair) {
    for (int column = 0; column < kPanel; column++) {
      const int n = panel * kPanel + column;
      for (int i = 0; i < kPair; i++) {
        *to++ = n < num_columns ? matrix[static_cast<int64_t>(n) * depth + k + i] : 0;
      }
    }
  }
}

}  // namespace HOCKET_LEVEL
}  // namespace hocket
