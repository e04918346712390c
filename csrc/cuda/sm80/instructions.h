// What GPUs from sm_80 on do and C++ has no name for. No torch in here, and nothing but such instructions: tests/emulated
// has its own.
#pragma once

#include "../instructions.h"

namespace sinkattn::cuda {
namespace {

// Copies into shared memory, 16 bytes each, or 4, that nobody waits for until they are needed.

// How the L2 keeps what is read once a step: not longer than it must.
__device__ uint64_t read_once() {
#if __CUDA_ARCH__ == 900  // what the other way gives there, known to the compiler
  return 0x12f0000000000000;
#else
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
#endif
}
__device__ void copy_once(unsigned shared, const void* global, uint64_t policy) {
  asm volatile("cp.async.cg.shared.global.L2::cache_hint.L2::128B [%0], [%1], 16, %2;" ::"r"(shared), "l"(global),
               "l"(policy)
               : "memory");
}
__device__ void copy(unsigned shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(global) : "memory");
}
__device__ void end_of_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until all but the last `pending` < 8 groups of copies are there.
__device__ void wait_for_copies(int pending) {
  switch (pending) {
    case 1: asm volatile("cp.async.wait_group 1;" ::: "memory"); break;
    case 2: asm volatile("cp.async.wait_group 2;" ::: "memory"); break;
    case 3: asm volatile("cp.async.wait_group 3;" ::: "memory"); break;
    case 4: asm volatile("cp.async.wait_group 4;" ::: "memory"); break;
    case 5: asm volatile("cp.async.wait_group 5;" ::: "memory"); break;
    case 6: asm volatile("cp.async.wait_group 6;" ::: "memory"); break;
    case 7: asm volatile("cp.async.wait_group 7;" ::: "memory"); break;
    default: asm volatile("cp.async.wait_group 0;" ::: "memory");
  }
}
__device__ void copy_async(void* shared, const void* global) {
  const unsigned place = __cvta_generic_to_shared(shared);
  const uint64_t once = read_once();
  asm volatile("cp.async.cg.shared.global.L2::cache_hint.L2::128B [%0], [%1], 16, %2;" ::"r"(place), "l"(global),
               "l"(once)
               : "memory");
}
__device__ void copy_word(void* shared, const void* global) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared_address(shared)), "l"(global) : "memory");
}

template <int PENDING>
__device__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// The first THREADS of a block meet.
template <int THREADS>
__device__ void meet() {
  asm volatile("bar.sync 1, %0;" ::"n"(THREADS) : "memory");
}

__device__ uint4 read_shared(unsigned from) {
  uint4 x;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "r"(from)
               : "memory");
  return x;
}
// A number, of 16 or 32 bits.
template <typename T>
__device__ T read_shared(unsigned from) {
  T x;
  if constexpr (sizeof(T) == 2)
    asm volatile("ld.shared.u16 %0, [%1];" : "=h"(reinterpret_cast<uint16_t&>(x)) : "r"(from) : "memory");
  else
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(reinterpret_cast<uint32_t&>(x)) : "r"(from) : "memory");
  return x;
}
template <typename T>
__device__ void write_shared(unsigned to, T x) {
  if constexpr (sizeof(T) == 2)
    asm volatile("st.shared.u16 [%0], %1;" ::"r"(to), "h"(reinterpret_cast<uint16_t&>(x)) : "memory");
  else
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(to), "r"(reinterpret_cast<uint32_t&>(x)) : "memory");
}
__device__ void write_shared(unsigned to, uint4 x) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w) : "memory");
}
__device__ void write_shared(unsigned to, uint2 x) {
  asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"(to), "r"(x.x), "r"(x.y) : "memory");
}
// Two matrices of 8 rows of 8 numbers of 16 bits, a row a lane of the first 16; a lane, g and c, gets rows 2 c and 2 c + 1
// of column g of both.
__device__ uint2 read_transposed(unsigned row) {
  uint2 x;
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(x.x), "=r"(x.y)
               : "r"(row)
               : "memory");
  return x;
}

// Barriers that copies open: each lane's arrive once those that it has asked for are there.
__device__ void begin_barrier(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
__device__ void arrive(unsigned barrier) {
  asm volatile("{\n.reg .b64 state;\nmbarrier.arrive.shared.b64 state, [%0];\n}" ::"r"(barrier) : "memory");
}
__device__ void open_once_copied(unsigned barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(barrier) : "memory");
}
__device__ void wait_for_barrier(unsigned barrier, unsigned parity) {
#if __CUDA_ARCH__ >= 900  // a warp may sleep meanwhile
  asm volatile(
      "{\n.reg .pred done;\nagain:\nmbarrier.try_wait.parity.shared.b64 done, [%0], %1;\n@!done bra again;\n}" ::"r"(barrier),
      "r"(parity)
      : "memory");
#else
  asm volatile(
      "{\n.reg .pred done;\nagain:\nmbarrier.test_wait.parity.shared.b64 done, [%0], %1;\n@!done bra again;\n}" ::"r"(barrier),
      "r"(parity)
      : "memory");
#endif
}

// Memory that other blocks write and read at the same time: pairs of 32 bits, which are written and read at once.
__device__ void write_pair(void* to, uint32_t a, uint32_t b) {
  asm volatile("st.relaxed.gpu.global.v2.u32 [%0], {%1, %2};" ::"l"(to), "r"(a), "r"(b) : "memory");
}
__device__ void write_pairs(void* to, uint4 x) {
  asm volatile("st.relaxed.gpu.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w)
               : "memory");
}
__device__ uint2 read_pair(const void* from) {
  uint2 x;
  asm volatile("ld.relaxed.gpu.global.v2.u32 {%0, %1}, [%2];" : "=r"(x.x), "=r"(x.y) : "l"(from) : "memory");
  return x;
}
__device__ uint4 read_pairs(const void* from) {
  uint4 x;
  asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "l"(from)
               : "memory");
  return x;
}

// For so many clocks, or a few more.
template <int CLOCKS>
__device__ void pause() {
  unsigned began, now;
  asm volatile("mov.u32 %0, %%clock;" : "=r"(began));
  do asm volatile("mov.u32 %0, %%clock;" : "=r"(now));
  while (now - began < CLOCKS);
}

__device__ void prefetch(const void* x) { asm volatile("prefetch.global.L2 [%0];" ::"l"(x)); }

// Clusters, from sm_90 on. Blocks hand what they found to the first one by stores that count themselves in at a barrier
// in its shared memory: nobody but the first block waits.
__device__ void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
}
__device__ void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

// A barrier that the bytes of such stores open.
__device__ void expect_bytes(uint64_t* barrier, int bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(barrier)) : "memory");
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}
__device__ void wait_for_bytes(uint64_t* barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n.reg .pred done;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], 0;\n@!done bra again;\n}" ::"r"(
          shared_address(barrier))
      : "memory");
#endif
}
__device__ unsigned in_first_block(const void* x) {
  unsigned address = shared_address(x);
#if __CUDA_ARCH__ >= 900
  asm("mapa.shared::cluster.u32 %0, %0, 0;" : "+r"(address));
#endif
  return address;
}
__device__ void hand_over(unsigned place, float4 x, unsigned barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(place),
               "f"(x.x), "f"(x.y), "f"(x.z), "f"(x.w), "r"(barrier)
               : "memory");
#endif
}
__device__ void hand_over(unsigned place, float2 x, unsigned barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, %2}, [%3];" ::"r"(place),
               "f"(x.x), "f"(x.y), "r"(barrier)
               : "memory");
#endif
}

// Counts blocks in that have written what they found, and returns how many did before.
__device__ int count_in(int* arrivals) {
  int before;
  asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], 1;" : "=r"(before) : "l"(arrivals) : "memory");
  return before;
}

}  // namespace
}  // namespace sinkattn::cuda
