// csrc/cuda/instructions.h and csrc/cuda/sm80/instructions.h, emulated.
#pragma once

#include "gpu.h"

namespace sinkattn::cuda {
namespace {

__device__ float exp2_fast(float x) { return exp2f(x); }

// Addresses in shared memory count from the block's.
__device__ unsigned shared_address(const void* x) { return unsigned(static_cast<const char*>(x) - emulated::shared); }
inline void* at(unsigned address) { return emulated::shared + int32_t(address); }

__device__ uint32_t halves_of_e4m3(uint32_t x) {
  uint32_t both = 0;
  for (int i = 0; i < 2; ++i) {
    const unsigned bits = x >> 8 * i & 255, exponent = bits >> 3 & 15, mantissa = bits & 7;
    float y = exponent > 0 ? ldexpf(8 + mantissa, int(exponent) - 10) : ldexpf(mantissa, -9);
    if ((bits & 127) == 127) y = NAN;
    const __half half = __float2half_rn(bits & 128 ? -y : y);
    uint16_t as_bits;
    memcpy(&as_bits, &half, 2);
    both |= uint32_t(as_bits) << 16 * i;
  }
  return both;
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

// Copies are there at once.
__device__ uint64_t read_once() { return 0; }
__device__ void copy_once(unsigned shared, const void* global, uint64_t) { memcpy(at(shared), global, 16); }
__device__ void copy(unsigned shared, const void* global) { memcpy(at(shared), global, 16); }
__device__ void copy_async(void* shared, const void* global) { memcpy(shared, global, 16); }
__device__ void copy_word(void* shared, const void* global) { memcpy(shared, global, 4); }
__device__ void end_of_copies() {}
__device__ void wait_for_copies(int) {}
template <int PENDING>
__device__ void wait_for_copies() {}

// A barrier is what lacks, and how often all have come.
__device__ void begin_barrier(uint64_t* barrier) { *barrier = 32; }
__device__ void open_once_copied(unsigned barrier) {
  uint32_t* parts = static_cast<uint32_t*>(at(barrier));
  if (--parts[0] == 0) parts[0] = 32, ++parts[1];
}
__device__ void wait_for_barrier(unsigned barrier, unsigned parity) {
  const volatile uint32_t* parts = static_cast<uint32_t*>(at(barrier));
  while (parts[1] % 2 == parity) emulated::yield();
}

__device__ void write_pair(void* to, uint32_t a, uint32_t b) {
  __atomic_store_n(static_cast<uint64_t*>(to), uint64_t(b) << 32 | a, __ATOMIC_RELAXED);
}
__device__ void write_pairs(void* to, uint4 x) {
  write_pair(to, x.x, x.y), write_pair(static_cast<uint64_t*>(to) + 1, x.z, x.w);
}
__device__ uint2 read_pair(const void* from) {
  emulated::yield();  // whoever looks for something lets others make it
  const uint64_t x = __atomic_load_n(static_cast<const uint64_t*>(from), __ATOMIC_RELAXED);
  return make_uint2(uint32_t(x), uint32_t(x >> 32));
}
__device__ uint4 read_pairs(const void* from) {
  const uint2 a = read_pair(from), b = read_pair(static_cast<const uint64_t*>(from) + 1);
  return make_uint4(a.x, a.y, b.x, b.y);
}

__device__ void prefetch(const void*) {}
__device__ int count_in(int* arrivals) { return __atomic_fetch_add(arrivals, 1, __ATOMIC_ACQ_REL); }

// Clusters are not emulated.
__device__ void cluster_arrive() { abort(); }
__device__ void cluster_wait() { abort(); }
__device__ void expect_bytes(uint64_t*, int) { abort(); }
__device__ void wait_for_bytes(uint64_t*) { abort(); }
__device__ unsigned in_first_block(const void*) { return 0; }
template <typename T>
__device__ void hand_over(unsigned, T, unsigned) { abort(); }

}  // namespace
}  // namespace sinkattn::cuda
