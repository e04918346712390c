// Numbers in 8 bits that caches hold: as 16 bits, which have all of them, for products, and rounded. No torch in here.
#pragma once

#include "numbers.h"

namespace sinkattn::cuda {
namespace {

struct E4m3 {  // float8_e4m3fn
  uint8_t bits;
};
template <typename C>
constexpr bool IN_8_BITS = sizeof(C) == 1;
template <typename C>
constexpr float LARGEST = std::is_same_v<C, int8_t> ? 127 : 448;

// Sums of two pairs of __half.
__device__ uint32_t plus(uint32_t a, uint32_t b) {
  const __half2 x = __hadd2(reinterpret_cast<const __half2&>(a), reinterpret_cast<const __half2&>(b));
  return reinterpret_cast<const uint32_t&>(x);
}
// Four numbers as two pairs of __half, which has all of them, in their order.
template <typename C>
__device__ uint2 widened(uint32_t x) {
  if constexpr (std::is_same_v<C, int8_t>) {
    x ^= 0x80808080;  // what is 128 too many is the low byte of 1024 and more
    return make_uint2(plus(__byte_perm(x, 0x64646464, 0x4140), 0xe480e480),  // - 1152
                      plus(__byte_perm(x, 0x64646464, 0x4342), 0xe480e480));
  } else {
    return halves_of_e4m3(x);
  }
}

// Four numbers of a row as they are with its scale, rounded to T.
template <typename T, typename C>
__device__ uint2 scaled(uint32_t x, float scale) {
  const uint2 both = widened<C>(x);
  const float2 low = unpack<__half>(both.x), high = unpack<__half>(both.y);
  return make_uint2(pack<T>(low.x * scale, low.y * scale), pack<T>(high.x * scale, high.y * scale));
}

// The nearest number, ties to even, of one within LARGEST.
template <typename C>
__device__ uint8_t nearest(float x) {
  if constexpr (std::is_same_v<C, int8_t>) {
    return uint8_t(int(rintf(x)));
  } else {
    // In steps of an eighth of its power of two, 2^-6 at least: the last bit of a sum with 1.5 * 2^20 as much.
    const float power = fmaxf(__uint_as_float(__float_as_uint(x) & 0x7f800000), 0.015625f), large = 1572864 * power;
    const uint32_t bits = pack<__half>(((x + large) - large) * 0.00390625f, 0);  // exponents of e4m3 are 8 less
    return uint8_t((bits >> 8 & 0x80) | (bits >> 7 & 0x7f));
  }
}

// The largest of the magnitudes that the lanes of a warp have, N each; NaN if a number is not finite.
template <int N>
__device__ float largest_of(const float (&x)[N]) {
  unsigned most = 0;  // as bits, which order them
#pragma unroll
  for (int i = 0; i < N; ++i) most = max(most, __float_as_uint(x[i]) & 0x7fffffff);
  most = __reduce_max_sync(~0u, most);
  return __uint_as_float(most < 0x7f800000 ? most : 0x7fc00000);
}
// What a row is to be multiplied by.
template <typename C, int N>
__device__ float scale_of(const float (&x)[N]) {
  return largest_of(x) / LARGEST<C>;
}
// Such a number, 0 where the scale is 0 or NaN: as `quantised` of sinkattn/reference.py.
template <typename C>
__device__ uint8_t rounded(float x, float scale) {
  return scale > 0 ? nearest<C>(fminf(fmaxf(x / scale, -LARGEST<C>), LARGEST<C>)) : 0;
}

}  // namespace
}  // namespace sinkattn::cuda
