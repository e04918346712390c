// Numbers of 16 bits, scores in base 2. No torch in here.
#pragma once

#include "instructions.h"

namespace sinkattn::cuda {
namespace {

constexpr float LOG2E = 1.4426950408889634f;
constexpr float LOWEST = -1e30f;  // a maximum before the first score: finite, as -inf - -inf is NaN

// Two numbers in a register, the first in the low half.
template <typename T>
__device__ uint32_t pack(float low, float high) {
  if constexpr (std::is_same_v<T, __half>) {
    const __half2 x = __floats2half2_rn(low, high);
    return reinterpret_cast<const uint32_t&>(x);
  } else {
    const __nv_bfloat162 x = __floats2bfloat162_rn(low, high);
    return reinterpret_cast<const uint32_t&>(x);
  }
}
template <typename T>
__device__ float2 unpack(uint32_t x) {
  if constexpr (std::is_same_v<T, __half>)
    return __half22float2(reinterpret_cast<const __half2&>(x));
  else
    return make_float2(__uint_as_float(x << 16), __uint_as_float(x & 0xffff0000));
}

__device__ float to_float(__half x) { return __half2float(x); }
__device__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
template <typename T>
__device__ T from_float(float x) {
  if constexpr (std::is_same_v<T, __half>)
    return __float2half_rn(x);
  else
    return __float2bfloat16_rn(x);
}

}  // namespace
}  // namespace sinkattn::cuda
