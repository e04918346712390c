// csrc/cuda/sm80/instructions.h, emulated.
#pragma once

#include "instructions.h"

namespace sinkattn::cuda {
namespace {

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
