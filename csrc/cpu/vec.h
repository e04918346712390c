// A vector of LANES floats for the instruction set that this file is compiled for, and element types that load into it.
//
// Everything lives in namespace sinkattn::SINKATTN_ISA and nothing comes from std: a template that two object files
// share would be kept by the linker once, perhaps with instructions that this machine lacks. Operators (+, *, <, ?:)
// on Vec are the compiler's vector extensions. Compiled with -ffp-contract=off: a product and a sum are fused where
// fma() says so and nowhere else, for rotated keys have the bits that PyTorch gives them.
#pragma once

#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "params.h"

namespace sinkattn::SINKATTN_ISA {

inline int64_t lesser(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t greater(int64_t a, int64_t b) { return a > b ? a : b; }

struct F16 {
  uint16_t bits;
};
struct BF16 {
  uint16_t bits;
};
struct I8 {
  int8_t number;
};
struct F8 {  // e4m3fn
  uint8_t bits;
};
// Numbers of caches in 8 bits come as 1 / UNIT of what they are, and are LARGEST at most. UNIT goes with their scales.
template <typename T>
constexpr float UNIT = __is_same(T, F8) ? 256 : 1;
template <typename T>
constexpr float LARGEST = __is_same(T, I8) ? 127 : 448;

template <typename To, typename From>
inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

inline float to_float(float x) { return x; }
inline float to_float(BF16 x) { return bit_cast<float>(uint32_t(x.bits) << 16); }
inline float to_float(F16 x) {
#if defined(__F16C__)
  return _cvtsh_ss(x.bits);
#else
  uint32_t magnitude = uint32_t(x.bits & 0x7fff) << 13;
  uint32_t bits = bit_cast<uint32_t>(bit_cast<float>(magnitude) * 0x1p112f);  // subnormals too
  if (magnitude >= 0x0f800000) bits = magnitude | 0x7f800000;                 // infinity, NaN
  return bit_cast<float>(bits | uint32_t(x.bits & 0x8000) << 16);
#endif
}

inline float to_float(I8 x) { return x.number; }
// As F16, whose exponent has one bit more: its bias is 8 above e4m3's, subnormals fit.
inline float to_float(F8 x) { return to_float(F16{uint16_t((x.bits & 0x80) << 8 | (x.bits & 0x7f) << 7)}); }

// Rounded to nearest, ties to even. To 8 bits: within LARGEST.
inline void from_float(float x, float& y) { y = x; }
inline void from_float(float x, I8& y) { y.number = int8_t((x + 0x1.8p23f) - 0x1.8p23f); }
inline void from_float(float x, F8& y) {
  uint32_t bits = bit_cast<uint32_t>(x), sign = bits & 0x80000000;
  bits ^= sign;
  const bool is_subnormal = bits < 0x3c800000;  // 2^-6; the sum with 2^14 rounds to the last bit, 2^-9
  bits = is_subnormal ? bit_cast<uint32_t>(bit_cast<float>(bits) + 0x1p14f) - 0x46800000
                      : (bits - 0x3c000000 + 0x7ffff + (bits >> 20 & 1)) >> 20;
  y.bits = uint8_t(bits | sign >> 24);
}
inline void from_float(float x, BF16& y) {
  uint32_t bits = bit_cast<uint32_t>(x);
  y.bits = x != x ? 0x7fc0 : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline void from_float(float x, F16& y) {
#if defined(__F16C__)
  y.bits = _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT);
#else
  uint32_t bits = bit_cast<uint32_t>(x), sign = bits & 0x80000000, half;
  bits ^= sign;
  if (bits >= 0x47800000) {  // 2^16: infinity or NaN
    half = bits > 0x7f800000 ? 0x7e00 : 0x7c00;
  } else if (bits < 0x38800000) {  // 2^-14: subnormal; the sum with 0.5 rounds to its last bit
    half = bit_cast<uint32_t>(bit_cast<float>(bits) + 0.5f) - 0x3f000000;
  } else {
    half = (bits - 0x38000000 + 0xfff + (bits >> 13 & 1)) >> 13;
  }
  y.bits = uint16_t(half | sign >> 16);
#endif
}

#if defined(__AVX512F__)

constexpr int LANES = 16, REGISTERS = 32;
using Vec = __m512;
inline Vec load(const float* x) { return _mm512_loadu_ps(x); }
inline Vec load(const F16* x) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)x)); }
inline Vec load(const BF16* x) {
  __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)x));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
inline Vec load(const I8* x) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)x))); }
inline Vec load(const F8* x) {  // the sign comes twice
  const __m256i wide = _mm256_slli_epi16(_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)x)), 7);
  return _mm512_cvtph_ps(_mm256_and_si256(wide, _mm256_set1_epi16(int16_t(0xbfff))));
}
inline void store(float* x, Vec v) { _mm512_storeu_ps(x, v); }
inline Vec broadcast(float x) { return _mm512_set1_ps(x); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
inline Vec larger(Vec a, Vec b) { return _mm512_max_ps(a, b); }
inline float sum_lanes(Vec v) { return _mm512_reduce_add_ps(v); }
inline float max_lanes(Vec v) { return _mm512_reduce_max_ps(v); }
inline bool any_above(Vec a, Vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ) != 0; }
// (sum_lanes(v[0]), ..., sum_lanes(v[LANES - 1])): a tree that halves the number of vectors at every level.
inline Vec sums_of_lanes(const Vec* v) {
  Vec four[4];  // 128 bits four times: of v[4 i] to v[4 i + 3]
  for (int i = 0; i < 4; ++i, v += 4) {
    Vec a = _mm512_unpacklo_ps(v[0], v[1]) + _mm512_unpackhi_ps(v[0], v[1]);
    Vec b = _mm512_unpacklo_ps(v[2], v[3]) + _mm512_unpackhi_ps(v[2], v[3]);
    __m512d wide_a = _mm512_castps_pd(a), wide_b = _mm512_castps_pd(b);
    four[i] = (Vec)_mm512_unpacklo_pd(wide_a, wide_b) + (Vec)_mm512_unpackhi_pd(wide_a, wide_b);
  }
  Vec left = _mm512_shuffle_f32x4(four[0], four[1], 0x88) + _mm512_shuffle_f32x4(four[0], four[1], 0xdd);
  Vec right = _mm512_shuffle_f32x4(four[2], four[3], 0x88) + _mm512_shuffle_f32x4(four[2], four[3], 0xdd);
  return _mm512_shuffle_f32x4(left, right, 0x88) + _mm512_shuffle_f32x4(left, right, 0xdd);
}

#elif defined(__AVX2__)

constexpr int LANES = 8, REGISTERS = 16;
using Vec = __m256;
inline Vec load(const float* x) { return _mm256_loadu_ps(x); }
inline Vec load(const F16* x) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)x)); }
inline Vec load(const BF16* x) {
  __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)x));
  return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
inline Vec load(const I8* x) { return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)x))); }
inline Vec load(const F8* x) {  // the sign comes twice
  const __m128i wide = _mm_slli_epi16(_mm_cvtepi8_epi16(_mm_loadl_epi64((const __m128i*)x)), 7);
  return _mm256_cvtph_ps(_mm_and_si128(wide, _mm_set1_epi16(int16_t(0xbfff))));
}
inline void store(float* x, Vec v) { _mm256_storeu_ps(x, v); }
inline Vec broadcast(float x) { return _mm256_set1_ps(x); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
inline Vec larger(Vec a, Vec b) { return _mm256_max_ps(a, b); }
inline float sum_lanes(Vec v) {
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
inline float max_lanes(Vec v) {
  __m128 four = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}
inline bool any_above(Vec a, Vec b) { return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ)) != 0; }
inline Vec sums_of_lanes(const Vec* v) {
  Vec left = _mm256_hadd_ps(_mm256_hadd_ps(v[0], v[1]), _mm256_hadd_ps(v[2], v[3]));
  Vec right = _mm256_hadd_ps(_mm256_hadd_ps(v[4], v[5]), _mm256_hadd_ps(v[6], v[7]));
  return _mm256_permute2f128_ps(left, right, 0x20) + _mm256_permute2f128_ps(left, right, 0x31);
}

#else

constexpr int LANES = 4, REGISTERS = 16;
typedef float Vec __attribute__((vector_size(16)));
template <typename T>
inline Vec load(const T* x) {
  return Vec{to_float(x[0]), to_float(x[1]), to_float(x[2]), to_float(x[3])};
}
inline void store(float* x, Vec v) { memcpy(x, &v, sizeof(v)); }
inline Vec broadcast(float x) { return Vec{x, x, x, x}; }
inline Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
inline Vec larger(Vec a, Vec b) { return a > b ? a : b; }
inline float sum_lanes(Vec v) { return (v[0] + v[2]) + (v[1] + v[3]); }
inline float max_lanes(Vec v) {
  float a = v[0] > v[2] ? v[0] : v[2], b = v[1] > v[3] ? v[1] : v[3];
  return a > b ? a : b;
}
inline bool any_above(Vec a, Vec b) { return a[0] > b[0] || a[1] > b[1] || a[2] > b[2] || a[3] > b[3]; }
inline Vec sums_of_lanes(const Vec* v) {
  return Vec{sum_lanes(v[0]), sum_lanes(v[1]), sum_lanes(v[2]), sum_lanes(v[3])};
}

#endif

// What one factor of a product is held as, the query or the weights, where the other, keys or values, is of type T.
//
// As floats, LANES at a time, or in pairs of bfloat16 on processors that multiply these: a lane then takes two
// products, fma(a, b, c) = a[0] b[0] + a[1] b[1] + c. Those with AMX take no less time for it than one by one.
template <typename T>
struct Factor {
  using Type = float;
};

inline Vec repeated(const float* x) { return broadcast(*x); }

// Puts 2 * LANES sums that interleave()'s values went into in the order of i.
template <typename Operand>
void sort(float*) {}

#if defined(__AVX512BF16__)
#if !defined(__AMX_BF16__)
template <>
struct Factor<BF16> {
  using Type = BF16;
};
#endif
template <>
inline void sort<BF16>(float* x) {
  const __m512i lower = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  Vec a = load(x), b = load(x + LANES);
  store(x, _mm512_permutex2var_ps(a, lower, b));
  store(x + LANES, _mm512_permutex2var_ps(a, _mm512_add_epi32(lower, _mm512_set1_epi32(8)), b));
}

using Pairs = __m512bh;
inline Pairs load_pairs(const BF16* x) { return (Pairs)_mm512_loadu_si512(x); }
inline void store(BF16* x, Vec v) { _mm256_storeu_si256((__m256i*)x, (__m256i)_mm512_cvtneps_pbh(v)); }
inline Pairs repeated(const BF16* x) {
  uint32_t pair;
  memcpy(&pair, x, sizeof(pair));
  return (Pairs)_mm512_set1_epi32(pair);
}
inline Vec fma(Pairs a, Pairs b, Vec c) { return _mm512_dpbf16_ps(c, a, b); }
// Pairs (x[i], y[i]) of two rows: of i = 0 to 3, 8 to 11, 16 to 19 and 24 to 27 in the first, of the rest in the
// second.
inline void interleave(Pairs x, Pairs y, Pairs& first, Pairs& second) {
  first = (Pairs)_mm512_unpacklo_epi16((__m512i)x, (__m512i)y);
  second = (Pairs)_mm512_unpackhi_epi16((__m512i)x, (__m512i)y);
}
#endif

template <typename T>
constexpr int PER_FLOAT = sizeof(float) / sizeof(T);  // numbers in the place of a float

// What a product takes of a row at once.
template <typename Operand, typename T>
auto factors(const T* x) {
  if constexpr (PER_FLOAT<Operand> == 1)
    return load(x);
  else
    return load_pairs(x);
}

// y = x, rounded if need be.
template <typename T, typename U>
void convert(const T* x, int64_t dim, U* y) {
  int64_t i = 0;
  for (; i + LANES <= dim; i += LANES) store(y + i, load(x + i));
  for (; i < dim; ++i) from_float(to_float(x[i]), y[i]);
}

// f(a zero of the type that is named).
template <typename F>
void with_dtype(DType dtype, F f) {
  if (dtype == DType::float32) f(float());
  if (dtype == DType::float16) f(F16());
  if (dtype == DType::bfloat16) f(BF16());
}

typedef uint32_t Bits __attribute__((vector_size(sizeof(Vec))));

// (0, 1, ..., LANES - 1)
inline Vec counting() {
  static const float numbers[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return load(numbers);
}

// exp(x) = power * (1 + rest): x = n ln 2 + r with |r| <= ln(2) / 2, power = 2^n, rest = exp(r) - 1 by its Taylor
// series, whose first left-out term is 5e-9. For |x| < 87. NaN in, NaN out.
struct SplitExp {
  Vec power, rest;
};
inline SplitExp split_exp(Vec x) {
  const Vec shift = broadcast(0x1.8p23f);  // the sum's last bits are n
  Vec shifted = fma(x, broadcast(1.44269504f), shift);
  Vec n = shifted - shift;
  Vec r = fma(n, broadcast(-0.693359375f), x);  // ln 2 in two parts, n times the first is exact
  r = fma(n, broadcast(2.12194440e-4f), r);
  Vec series = broadcast(1.f / 5040);
  series = fma(series, r, broadcast(1.f / 720));
  series = fma(series, r, broadcast(1.f / 120));
  series = fma(series, r, broadcast(1.f / 24));
  series = fma(series, r, broadcast(1.f / 6));
  series = fma(series, r, broadcast(1.f / 2));
  return {(Vec)(((Bits)shifted << 23) + 0x3f800000u), fma(series, r * r, r)};
}

// For x <= 0: softmax has subtracted the largest. Below -87 the result, less than the smallest normal float, is 0.
inline Vec exp_negative(Vec x) {
  SplitExp e = split_exp(x);
  Vec zero = broadcast(0.f);
  return x < broadcast(-87.f) ? zero : fma(e.power, e.rest, e.power);
}

// (exp(2x) - 1) / (exp(2x) + 1), no digits lost near zero; at +-10 a float cannot tell it from +-1.
inline Vec tanh(Vec x) {
  const Vec limit = broadcast(10.f), one = broadcast(1.f);
  x = x > limit ? limit : x;
  x = x < -limit ? -limit : x;
  SplitExp e = split_exp(x + x);
  Vec difference = fma(e.power, e.rest, e.power - one);
  return difference / (difference + one + one);
}

}  // namespace sinkattn::SINKATTN_ISA
