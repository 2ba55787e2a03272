// Sixteen floats, whatever the instructions: the only file that knows intrinsics.
//
// It is compiled once for each level, within a namespace of that level. Nothing here is a template
// of the standard library's: the linker keeps one copy of those, perhaps the one with instructions
// that the machine lacks.
#pragma once
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")
#define INLINE_LAMBDA __attribute__((always_inline))

namespace hocket {
namespace HOCKET_LEVEL {

constexpr int kLanes = 16;
// Where exp2 is 0: a masked score lies below this, and below the lowest maximum by as much again.
constexpr float kLowest = -1e30f;
constexpr float kMasked = -2e30f;

INLINE int min_of(int a, int b) { return a < b ? a : b; }
INLINE int max_of(int a, int b) { return a > b ? a : b; }
INLINE float float_of(uint32_t bits) { return __builtin_bit_cast(float, bits); }
INLINE uint32_t bits_of(float value) { return __builtin_bit_cast(uint32_t, value); }

// Round to nearest, ties to even. NaN stays NaN.
INLINE uint16_t to_bf16(float value) {
  const uint32_t bits = bits_of(value);
  if (value != value) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
INLINE float from_bf16(uint16_t value) { return float_of(static_cast<uint32_t>(value) << 16); }

#ifdef __AVX512F__

struct Vec {
  __m512 v;
};
INLINE Vec zero() { return {_mm512_setzero_ps()}; }
INLINE Vec set1(float x) { return {_mm512_set1_ps(x)}; }
INLINE Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
INLINE void store(float* p, Vec a) { _mm512_storeu_ps(p, a.v); }
INLINE void store(float* p, Vec a, int n) {
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), a.v);
}
INLINE Vec load_bf16(const uint16_t* p) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16))};
}
INLINE void store_bf16(uint16_t* p, Vec a) {
#ifdef __AVX512BF16__
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(a.v));
#else
  const __m512i bits = _mm512_castps_si512(a.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
  const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  const __m512i high = _mm512_srli_epi32(_mm512_mask_blend_epi32(nan, rounded, quiet), 16);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(high));
#endif
}
// The even and the odd ones of 32 bf16.
INLINE Vec even_bf16(const void* p) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_loadu_si512(p), 16))};
}
INLINE Vec odd_bf16(const void* p) {
  return {_mm512_castsi512_ps(
      _mm512_and_si512(_mm512_loadu_si512(p), _mm512_set1_epi32(static_cast<int>(0xffff0000))))};
}
INLINE Vec add(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
INLINE Vec sub(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
INLINE Vec mul(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
INLINE Vec div(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
INLINE Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
INLINE Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
INLINE float sum(Vec a) { return _mm512_reduce_add_ps(a.v); }
INLINE float peak(Vec a) { return _mm512_reduce_max_ps(a.v); }
INLINE Vec nearest(Vec a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
// a * 2^n for whole n: 0 where n is far below, at least 2^127 where it is far above.
INLINE Vec scale(Vec a, Vec n) { return {_mm512_scalef_ps(a.v, n.v)}; }
// The first n lanes of a, the others of b.
INLINE Vec head_of(Vec a, Vec b, int n) {
  return {_mm512_mask_blend_ps(static_cast<__mmask16>((1u << n) - 1), b.v, a.v)};
}
// Neighbours changed places.
INLINE Vec swapped(Vec a) { return {_mm512_permute_ps(a.v, 0xb1)}; }
// Eight floats, each twice; negated the first time with `alternating`.
INLINE Vec twice(const float* p) {
  const __m512i index = _mm512_set_epi32(7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0);
  return {_mm512_permutexvar_ps(index, _mm512_castps256_ps512(_mm256_loadu_ps(p)))};
}
INLINE Vec alternating(Vec a) {
  const __m512i sign = _mm512_set1_epi64(0x80000000ll);
  return {_mm512_castsi512_ps(_mm512_xor_si512(_mm512_castps_si512(a.v), sign))};
}
// Sixteen words of 32 bits.
struct Words {
  __m512i v;
};
INLINE Words words1(uint32_t x) { return {_mm512_set1_epi32(static_cast<int>(x))}; }
INLINE Words words_from(uint32_t x) {
  const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  return {_mm512_add_epi32(_mm512_set1_epi32(static_cast<int>(x)), lane)};
}
INLINE Words operator^(Words a, Words b) { return {_mm512_xor_si512(a.v, b.v)}; }
INLINE Words low_product(Words a, Words b) { return {_mm512_mullo_epi32(a.v, b.v)}; }
INLINE Words high_product(Words a, Words b) {
  const __m512i even = _mm512_srli_epi64(_mm512_mul_epu32(a.v, b.v), 32);
  const __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64(a.v, 32), _mm512_srli_epi64(b.v, 32));
  return {_mm512_mask_blend_epi32(0xaaaa, even, odd)};
}
INLINE void store(uint32_t* p, Words a) { _mm512_storeu_si512(p, a.v); }

#ifdef __AVX512BF16__
// c + a.even * b.even + a.odd * b.odd, of 32 bf16 and of one pair for all lanes.
INLINE Vec dot(Vec c, const void* pairs, uint32_t pair) {
  return {_mm512_dpbf16_ps(c.v, (__m512bh)_mm512_loadu_si512(pairs),
                           (__m512bh)_mm512_set1_epi32(static_cast<int>(pair)))};
}
#endif

#else  // AVX2: two halves

struct Vec {
  __m256 a, b;
};
INLINE Vec zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
INLINE Vec set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
INLINE Vec load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
INLINE void store(float* p, Vec x) {
  _mm256_storeu_ps(p, x.a);
  _mm256_storeu_ps(p + 8, x.b);
}
INLINE void store(float* p, Vec x, int n) {
  float all[16];
  store(all, x);
  memcpy(p, all, n * sizeof(float));
}
INLINE __m256 widen(__m128i half) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}
INLINE Vec load_bf16(const uint16_t* p) {
  return {widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))),
          widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8)))};
}
INLINE __m128i narrow(__m256 x) {
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  const __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
  const __m256i packed = _mm256_packus_epi32(high, high);
  return _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0xd8));
}
INLINE void store_bf16(uint16_t* p, Vec x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow(x.a));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8), narrow(x.b));
}
INLINE __m256 even_of(__m256i pairs) { return _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16)); }
INLINE __m256 odd_of(__m256i pairs) {
  return _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(static_cast<int>(0xffff0000))));
}
INLINE Vec even_bf16(const void* p) {
  const __m256i* q = static_cast<const __m256i*>(p);
  return {even_of(_mm256_loadu_si256(q)), even_of(_mm256_loadu_si256(q + 1))};
}
INLINE Vec odd_bf16(const void* p) {
  const __m256i* q = static_cast<const __m256i*>(p);
  return {odd_of(_mm256_loadu_si256(q)), odd_of(_mm256_loadu_si256(q + 1))};
}
INLINE Vec add(Vec x, Vec y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
INLINE Vec sub(Vec x, Vec y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
INLINE Vec mul(Vec x, Vec y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
INLINE Vec div(Vec x, Vec y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
INLINE Vec max(Vec x, Vec y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
INLINE Vec fma(Vec x, Vec y, Vec z) {
  return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
}
INLINE float sum(Vec x) {
  __m256 half = _mm256_add_ps(x.a, x.b);
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  four = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}
INLINE float peak(Vec x) {
  __m256 half = _mm256_max_ps(x.a, x.b);
  __m128 four = _mm_max_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  four = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(four, _mm_movehdup_ps(four)));
}
INLINE Vec nearest(Vec x) {
  constexpr int kMode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(x.a, kMode), _mm256_round_ps(x.b, kMode)};
}
INLINE __m256 scale_half(__m256 x, __m256 n) {
  const __m256 lowest = _mm256_set1_ps(-126.f);
  const __m256 clamped = _mm256_min_ps(_mm256_max_ps(n, lowest), _mm256_set1_ps(127.f));
  const __m256i whole = _mm256_cvtps_epi32(clamped);
  const __m256i power = _mm256_slli_epi32(_mm256_add_epi32(whole, _mm256_set1_epi32(127)), 23);
  const __m256 scaled = _mm256_mul_ps(x, _mm256_castsi256_ps(power));
  return _mm256_andnot_ps(_mm256_cmp_ps(n, lowest, _CMP_LT_OQ), scaled);
}
INLINE Vec scale(Vec x, Vec n) { return {scale_half(x.a, n.a), scale_half(x.b, n.b)}; }
INLINE Vec head_of(Vec x, Vec y, int n) {
  const __m256i lane = _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0);
  const __m256i in_a = _mm256_cmpgt_epi32(_mm256_set1_epi32(n), lane);
  const __m256i in_b = _mm256_cmpgt_epi32(_mm256_set1_epi32(n - 8), lane);
  return {_mm256_blendv_ps(y.a, x.a, _mm256_castsi256_ps(in_a)),
          _mm256_blendv_ps(y.b, x.b, _mm256_castsi256_ps(in_b))};
}
INLINE Vec swapped(Vec x) { return {_mm256_permute_ps(x.a, 0xb1), _mm256_permute_ps(x.b, 0xb1)}; }
INLINE Vec twice(const float* p) {
  const __m256 eight = _mm256_loadu_ps(p);
  const __m256i low = _mm256_set_epi32(3, 3, 2, 2, 1, 1, 0, 0);
  const __m256i high = _mm256_set_epi32(7, 7, 6, 6, 5, 5, 4, 4);
  return {_mm256_permutevar8x32_ps(eight, low), _mm256_permutevar8x32_ps(eight, high)};
}
INLINE Vec alternating(Vec x) {
  const __m256 sign = _mm256_castsi256_ps(_mm256_set1_epi64x(0x80000000ll));
  return {_mm256_xor_ps(x.a, sign), _mm256_xor_ps(x.b, sign)};
}

struct Words {
  __m256i a, b;
};
INLINE Words words1(uint32_t x) {
  const __m256i all = _mm256_set1_epi32(static_cast<int>(x));
  return {all, all};
}
INLINE Words words_from(uint32_t x) {
  const __m256i lane = _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0);
  return {_mm256_add_epi32(_mm256_set1_epi32(static_cast<int>(x)), lane),
          _mm256_add_epi32(_mm256_set1_epi32(static_cast<int>(x + 8)), lane)};
}
INLINE Words operator^(Words x, Words y) {
  return {_mm256_xor_si256(x.a, y.a), _mm256_xor_si256(x.b, y.b)};
}
INLINE Words low_product(Words x, Words y) {
  return {_mm256_mullo_epi32(x.a, y.a), _mm256_mullo_epi32(x.b, y.b)};
}
INLINE __m256i high_half(__m256i x, __m256i y) {
  const __m256i even = _mm256_srli_epi64(_mm256_mul_epu32(x, y), 32);
  const __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64(x, 32), _mm256_srli_epi64(y, 32));
  return _mm256_blend_epi32(even, odd, 0xaa);
}
INLINE Words high_product(Words x, Words y) { return {high_half(x.a, y.a), high_half(x.b, y.b)}; }
INLINE void store(uint32_t* p, Words x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x.a);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 8), x.b);
}

#endif

// 2^x. Relative error below 2e-7 (the Taylor terms of 2^f, |f| <= 1/2); 0 far below -126.
INLINE Vec exp2(Vec x) {
  const Vec n = nearest(x);
  const Vec f = sub(x, n);
  Vec p = set1(1.5252734e-5f);
  p = fma(p, f, set1(1.5403530e-4f));
  p = fma(p, f, set1(1.3333558e-3f));
  p = fma(p, f, set1(9.6181291e-3f));
  p = fma(p, f, set1(5.5504109e-2f));
  p = fma(p, f, set1(2.4022651e-1f));
  p = fma(p, f, set1(6.9314718e-1f));
  p = fma(p, f, set1(1.f));
  return scale(p, n);
}

// Numbers as they lie in memory: weights, keys and values in W, activations in A. Matrices are
// packed so that kPair numbers of one column are neighbours, 32 bits in all.
struct Float32 {
  using W = float;
  using A = float;
  static constexpr int kPair = 1;
};
struct BFloat16 {
  using W = uint16_t;
#ifdef __AVX512BF16__
  using A = uint16_t;
#else
  using A = float;  // bf16 weights widened as they are read, products in fp32
#endif
  static constexpr int kPair = 2;
};

// A number of vectors, for code that is compiled once for each.
template <int N>
struct Width {
  static constexpr int value = N;
};

INLINE void put(float* p, Vec a) { store(p, a); }
INLINE void put(uint16_t* p, Vec a) { store_bf16(p, a); }
INLINE Vec get(const float* p) { return load(p); }
INLINE Vec get(const uint16_t* p) { return load_bf16(p); }
INLINE float scalar(float x) { return x; }
INLINE float scalar(uint16_t x) { return from_bf16(x); }
template <class W>
INLINE W rounded(float x) {
  if constexpr (sizeof(W) == 2) {
    return to_bf16(x);
  } else {
    return x;
  }
}

}  // namespace HOCKET_LEVEL
}  // namespace hocket
