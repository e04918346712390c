// csrc/cuda/instructions.h, emulated.
#pragma once

#include "gpu.h"

namespace sinkattn::cuda {
namespace {

__device__ float exp2_fast(float x) { return exp2f(x); }
__device__ float larger(float a, float b) { return a != a ? a : b != b || b > a ? b : a; }

// Addresses in shared memory count from the block's.
__device__ unsigned shared_address(const void* x) { return unsigned(static_cast<const char*>(x) - emulated::shared); }
inline void* at(unsigned address) { return emulated::shared + int32_t(address); }

__device__ uint2 halves_of_e4m3(uint32_t x) {
  uint32_t both[2] = {};
  for (int i = 0; i < 4; ++i) {
    const unsigned bits = x >> 8 * i & 255, exponent = bits >> 3 & 15, mantissa = bits & 7;
    float y = exponent > 0 ? ldexpf(8 + mantissa, int(exponent) - 10) : ldexpf(mantissa, -9);
    if ((bits & 127) == 127) y = NAN;
    const __half half = __float2half_rn(bits & 128 ? -y : y);
    uint16_t as_bits;
    memcpy(&as_bits, &half, 2);
    both[i / 2] |= uint32_t(as_bits) << i % 2 * 16;
  }
  return make_uint2(both[0], both[1]);
}

inline float value_of(__half x) { return __half2float(x); }
inline float value_of(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
__device__ void multiply(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  const auto all = emulated::exchange(std::array<uint32_t, 6>{a0, a1, a2, a3, b0, b1});
  auto half = [](uint32_t both, int k) {
    const uint16_t bits = uint16_t(both >> k % 2 * 16);
    T x;
    memcpy(&x, &bits, 2);
    return value_of(x);
  };
  const int g = emulated::lane() / 4, q = emulated::lane() % 4;
  for (int i = 0; i < 4; ++i) {
    const int row = g + i / 2 * 8, column = q * 2 + i % 2;
    for (int k = 0; k < 16; ++k) {
      const float a = half(all[row % 8 * 4 + k % 8 / 2][(row >= 8) + 2 * (k >= 8)], k);
      const float b = half(all[column * 4 + k % 8 / 2][4 + (k >= 8)], k);
      c[i] += a * b;
    }
  }
}
__device__ void multiply(int (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  const auto all = emulated::exchange(std::array<uint32_t, 6>{a0, a1, a2, a3, b0, b1});
  const int g = emulated::lane() / 4, q = emulated::lane() % 4;
  for (int i = 0; i < 4; ++i) {
    const int row = g + i / 2 * 8, column = q * 2 + i % 2;
    for (int k = 0; k < 32; ++k) {
      const uint32_t a = all[row % 8 * 4 + k % 16 / 4][(row >= 8) + 2 * (k >= 16)];
      const uint32_t b = all[column * 4 + k % 16 / 4][4 + (k >= 16)];
      c[i] += int(int8_t(a >> k % 4 * 8)) * int(int8_t(b >> k % 4 * 8));
    }
  }
}

}  // namespace
}  // namespace sinkattn::cuda
