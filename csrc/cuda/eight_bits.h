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

// Sums and products of two numbers in a register.
template <typename T>
using Two = std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162>;
template <typename T>
__device__ uint32_t plus(uint32_t a, uint32_t b) {
  const Two<T> x = __hadd2(reinterpret_cast<const Two<T>&>(a), reinterpret_cast<const Two<T>&>(b));
  return reinterpret_cast<const uint32_t&>(x);
}
template <typename T>
__device__ uint32_t times(uint32_t a, uint32_t b) {
  const Two<T> x = __hmul2(reinterpret_cast<const Two<T>&>(a), reinterpret_cast<const Two<T>&>(b));
  return reinterpret_cast<const uint32_t&>(x);
}

// Four numbers as two pairs of T, in their order. Exact.
template <typename T, typename C>
__device__ uint2 widened(uint32_t x) {
  if constexpr (std::is_same_v<C, int8_t> && std::is_same_v<T, __half>) {
    x ^= 0x80808080;  // what is 128 too many is the low byte of 1024 and more
    return make_uint2(plus<T>(__byte_perm(x, 0x64646464, 0x4140), 0xe480e480),  // - 1152
                      plus<T>(__byte_perm(x, 0x64646464, 0x4342), 0xe480e480));
  } else if constexpr (std::is_same_v<C, int8_t>) {
    // Seven bits of 128 and more, and - 128 or, if the sign is set, - 256.
    const uint32_t a = __byte_perm(x, 0, 0x4140), b = __byte_perm(x, 0, 0x4342);
    return make_uint2(plus<T>((a & 0x007f007f) | 0x43004300, (a & 0x00800080) | 0xc300c300),
                      plus<T>((b & 0x007f007f) | 0x43004300, (b & 0x00800080) | 0xc300c300));
  } else if constexpr (std::is_same_v<T, __half>) {
    return make_uint2(halves_of_e4m3(x), halves_of_e4m3(x >> 16));
  } else {
    // Exponent and mantissa in their place, 2^120 too small; those of e4m3 without an exponent are such here as well.
    const uint32_t a = __byte_perm(x, 0, 0x1404), b = __byte_perm(x, 0, 0x3424);
    return make_uint2(times<T>((a & 0x80008000) | (a >> 4 & 0x07f007f0), 0x7b807b80),
                      times<T>((b & 0x80008000) | (b >> 4 & 0x07f007f0), 0x7b807b80));
  }
}

// Four numbers of a row as they are with its scale, rounded to T.
template <typename T, typename C>
__device__ uint2 scaled(uint32_t x, float scale) {
  const uint2 both = widened<__half, C>(x);
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

// What a row is to be multiplied by, NaN if a number is not finite. The lanes of a warp have the numbers, N each.
template <typename C, int N>
__device__ float scale_of(const float (&x)[N]) {
  float most = 0;
  bool is_finite = true;
#pragma unroll
  for (int i = 0; i < N; ++i) most = fmaxf(most, fabsf(x[i])), is_finite = is_finite && fabsf(x[i]) < INFINITY;
#pragma unroll
  for (int apart = 16; apart > 0; apart /= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, apart));
  return __any_sync(~0u, !is_finite) ? __uint_as_float(0x7fc00000) : most / LARGEST<C>;
}
// Such a number, 0 where the scale is 0 or NaN: as `quantised` of sinkattn/reference.py.
template <typename C>
__device__ uint8_t rounded(float x, float scale) {
  return scale > 0 ? nearest<C>(fminf(fmaxf(x / scale, -LARGEST<C>), LARGEST<C>)) : 0;
}

}  // namespace
}  // namespace sinkattn::cuda
