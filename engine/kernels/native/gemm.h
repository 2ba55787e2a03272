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
constexpr int kMaxTiles = 32;
constexpr int kFewRows = 2;  // are multiplied so fast that the next panel would come late
constexpr int kNear = 8192;  // bytes read ahead for them, into the L2 cache
constexpr int kNearest = 4096;  // bytes read ahead of a single tile, on into the L1 cache
constexpr int kSlice = 256;  // of the depth: 16 KiB of a bf16 panel, 12 KiB of a tile of rows

struct Packed {
  const void* data;
  int num_columns;  // N
  int depth;        // K
};

INLINE int num_panels(const Packed& w) { return (w.num_columns + kPanel - 1) / kPanel; }

// What to read into the caches while something else is computed: called once a step.
template <int kLines>
struct Ahead {  // one stretch of memory, `kLines` lines of 64 bytes a step
  const char* from;
  const char* own;  // what is multiplied: a single tile meets each line once, and takes all of them
  INLINE_LAMBDA void operator()(int k) const {
    if constexpr (kLines == 2) {
      UNROLL for (int i = 0; i < 2; i++) _mm_prefetch(own + (k * 2 + i) * 64 + kNearest, _MM_HINT_T0);
    }
    UNROLL for (int i = 0; i < kLines; i++) _mm_prefetch(from + (k * kLines + i) * 64, _MM_HINT_T1);
  }
};

template <class W, int J>
struct Alike {  // what lies elsewhere as that which is multiplied lies here
  const W* w[J ? J : 1];
  int64_t step;
  INLINE_LAMBDA void operator()(int k) const {
    UNROLL for (int j = 0; j < J; j++) _mm_prefetch(reinterpret_cast<const char*>(w[j] + k * step), _MM_HINT_T1);
  }
};

// sums[m][j] += x[m] . w[j], over `count` numbers; w[j] are 16 columns each, the next kPair rows
// of a column `step` numbers on.
template <class Num, int M, int J, class Fetch>
INLINE void accumulate(Vec (&sums)[M][J], const typename Num::A* x, int64_t x_stride,
                       const typename Num::W* const (&w)[J], int64_t step, int count,
                       const Fetch& ahead) {
  if constexpr (Num::kPair == 1) {
    for (int k = 0; k < count; k++) {
      ahead(k);
      Vec column[J];
      UNROLL for (int j = 0; j < J; j++) column[j] = load(w[j] + k * step);
      UNROLL for (int m = 0; m < M; m++) {
        const Vec one = set1(x[m * x_stride + k]);
        UNROLL for (int j = 0; j < J; j++) sums[m][j] = fma(column[j], one, sums[m][j]);
      }
    }
  } else {
    for (int k = 0; k < count / 2; k++) {
      ahead(k);
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

// The panel of one item: where its rows are, and what is done with their sums.
template <class Num, class Epilogue>
struct Panel {
  const typename Num::A* x;
  int64_t x_stride;
  const Packed& w;
  int number;
  const Epilogue& epilogue;
  float* kept;  // sums of the rows between slices, from row `first` on
  int first;
};

// Rows [row, row + M), numbers [begin, end) of the depth. Reads ahead what is multiplied next.
template <class Num, int M, int kLines, class Epilogue>
INLINE void tile(const Panel<Num, Epilogue>& p, int row, int begin, int end, const void* next) {
  using W = typename Num::W;
  const W* const data = static_cast<const W*>(p.w.data) +
                        (static_cast<int64_t>(p.number) * p.w.depth + begin) * kPanel;
  const W* const columns[2] = {data, data + kLanes * Num::kPair};
  float* const kept = p.kept + (row - p.first) * kPanel;
  Vec sums[M][2];
  UNROLL for (int m = 0; m < M; m++) {
    UNROLL for (int j = 0; j < 2; j++) {
      sums[m][j] = begin ? load(kept + m * kPanel + j * kLanes) : zero();
    }
  }
  const Ahead<kLines> ahead{static_cast<const char*>(next), reinterpret_cast<const char*>(data)};
  accumulate<Num, M, 2>(sums, p.x + row * p.x_stride + begin, p.x_stride, columns, kPanel * Num::kPair, end - begin, ahead);
  if (end == p.w.depth) {
    UNROLL for (int m = 0; m < M; m++) p.epilogue(row + m, p.number, sums[m][0], sums[m][1]);
  } else {
    UNROLL for (int m = 0; m < M; m++) {
      UNROLL for (int j = 0; j < 2; j++) store(kept + m * kPanel + j * kLanes, sums[m][j]);
    }
  }
}

template <class Num, int M, int kLines, class Epilogue>
static void tile_of(int num_rows, const Panel<Num, Epilogue>& p, int row, int begin, int end, const void* next) {
  if constexpr (M > 0) {
    if (num_rows == M) return tile<Num, M, kLines>(p, row, begin, end, next);
    tile_of<Num, M - 1, kLines>(num_rows, p, row, begin, end, next);
  }
}

// Where the panel lies that is multiplied after the last of this thread's own: the first of its own
// in the product that follows.
template <class Num>
INLINE const char* first_own(const Member& me, const Packed& w) {
  return static_cast<const char*>(w.data) +
         static_cast<int64_t>(me.first_of(num_panels(w))) * kPanel * w.depth * sizeof(typename Num::W);
}

// Calls epilogue(row, panel, sums of columns 0 to 15, of 16 to 31) for all rows and panels.
//
// Many rows take a panel slice by slice, so that the slice and a tile of rows lie in the L1 cache.
// The first tiles of a slice read the next one ahead, and those of a thread's last the first one of
// `following`, the product that comes after.
template <class Num, class Epilogue>
INLINE bool gemm(Member& me, const typename Num::A* x, int64_t x_stride, int num_rows,
                 const Packed& w, const Packed& following, const Epilogue& epilogue) {
  const int panels = num_panels(w);
  const int tiles = (num_rows + kTileRows - 1) / kTileRows;
  const int fitting = kRowBlockBytes / (w.depth * static_cast<int>(sizeof(typename Num::A)));
  const int most = min_of(kMaxTiles, max_of(1, fitting / kTileRows));
  const int blocks = (tiles + most - 1) / most;
  const int block = blocks ? (tiles + blocks - 1) / blocks * kTileRows : 0;
  const int num_items = blocks * panels;
  const int last_own = me.last_of(num_items);
  const char* const after = first_own<Num>(me, following);
  return me.each(num_items, [&](int item) {
    alignas(64) float kept[kMaxTiles * kTileRows * kPanel];
    const int first = item / panels * block, last = min_of(num_rows, first + block);
    const Panel<Num, Epilogue> panel{x, x_stride, w, item % panels, epilogue, kept, first};
    const int slice = last - first > kTileRows ? kSlice : w.depth;
    const char* next = static_cast<const char*>(w.data) +
                       static_cast<int64_t>(panel.number) * kPanel * w.depth * sizeof(typename Num::W);
    for (int begin = 0; begin < w.depth; begin += slice) {
      const int end = min_of(w.depth, begin + slice);
      const int num_lines = (end - begin) / Num::kPair;  // half of those of the slice
      next = end == w.depth && item == last_own ? after : next + num_lines * 128;
      if (last - first <= kFewRows) next += kNear - num_lines * 128;
      if (last - first <= kTileRows) {
        tile_of<Num, kTileRows, 2>(last - first, panel, first, begin, end, next);
        continue;
      }
      tile<Num, kTileRows, 1>(panel, first, begin, end, next);
      tile_of<Num, kTileRows, 1>(min_of(kTileRows, last - first - kTileRows), panel, first + kTileRows, begin, end, next + num_lines * 64);
      for (int row = first + 2 * kTileRows; row < last; row += kTileRows) {
        tile_of<Num, kTileRows, 0>(min_of(kTileRows, last - row), panel, row, begin, end, nullptr);
      }
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
