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

template <int THREADS>
__device__ void meet() { emulated::meet(emulated::block, THREADS); }
__device__ uint4 read_shared(unsigned from) { return *static_cast<const uint4*>(at(from)); }
template <typename T>
__device__ T read_shared(unsigned from) { return *static_cast<const T*>(at(from)); }
template <typename T>
__device__ void write_shared(unsigned to, T x) { *static_cast<T*>(at(to)) = x; }
__device__ void write_shared(unsigned to, uint4 x) { *static_cast<uint4*>(at(to)) = x; }
__device__ void write_shared(unsigned to, uint2 x) { *static_cast<uint2*>(at(to)) = x; }
__device__ uint2 read_transposed(unsigned row) {
  const auto rows = emulated::exchange(row);
  const int g = emulated::lane() / 4, c = emulated::lane() % 4;
  uint32_t x[2];
  for (int i = 0; i < 2; ++i) {
    auto number = [&](int k) { return static_cast<const uint16_t*>(at(rows[i * 8 + 2 * c + k]))[g]; };
    x[i] = uint32_t(number(1)) << 16 | number(0);
  }
  return make_uint2(x[0], x[1]);
}

// A barrier is how many lack, how many have to come, and how often all have come.
struct Barrier {
  uint16_t lacking, all;
  uint32_t phase;
};
__device__ void begin_barrier(uint64_t* barrier, int arrivals) {
  *reinterpret_cast<Barrier*>(barrier) = {uint16_t(arrivals), uint16_t(arrivals), 0};
}
__device__ void arrive(unsigned barrier) {
  Barrier* x = static_cast<Barrier*>(at(barrier));
  if (--x->lacking == 0) x->lacking = x->all, ++x->phase;
}
__device__ void open_once_copied(unsigned barrier) { arrive(barrier); }
__device__ void wait_for_barrier(unsigned barrier, unsigned parity) {
  const volatile Barrier* x = static_cast<Barrier*>(at(barrier));
  while (x->phase % 2 == parity) emulated::yield();
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

template <int>
__device__ void pause() {}
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
