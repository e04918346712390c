// A GPU on the host, slow and in random order: what kernels of csrc/cuda need of CUDA, so that their source can run as it
// is where there is none. Each block is a thread of the host, its threads take turns there, and warps come in random
// order; shared memory and registers hold what was there before, and no block writes behind what it has asked for.
#pragma once

#include <ucontext.h>

#include <array>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#define __device__
#define __host__
#define __global__
#define __forceinline__ inline
#define __shared__ static thread_local
#define __align__(n) __attribute__((aligned(n)))
#define __launch_bounds__(...)
#define __grid_constant__

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct uint2 { uint32_t x, y; };
struct alignas(16) uint4 { uint32_t x, y, z, w; };
struct float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

// Numbers of 16 bits.
struct __half { _Float16 x; };
struct __nv_bfloat16 { uint16_t x; };
struct __half2 { __half x, y; };
struct __nv_bfloat162 { __nv_bfloat16 x, y; };
inline float __half2float(__half a) { return float(a.x); }
inline __half __float2half_rn(float a) { return {_Float16(a)}; }
inline float __bfloat162float(__nv_bfloat16 a) {
  const uint32_t bits = uint32_t(a.x) << 16;
  float x;
  memcpy(&x, &bits, 4);
  return x;
}
inline __nv_bfloat16 __float2bfloat16_rn(float a) {
  uint32_t bits;
  memcpy(&bits, &a, 4);
  if (std::isnan(a)) return {0x7fff};
  return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
inline float2 __half22float2(__half2 a) { return {__half2float(a.x), __half2float(a.y)}; }
inline float2 __bfloat1622float2(__nv_bfloat162 a) { return {__bfloat162float(a.x), __bfloat162float(a.y)}; }
inline __half2 __floats2half2_rn(float a, float b) { return {__float2half_rn(a), __float2half_rn(b)}; }
inline __nv_bfloat162 __floats2bfloat162_rn(float a, float b) { return {__float2bfloat16_rn(a), __float2bfloat16_rn(b)}; }
inline __half2 __hadd2(__half2 a, __half2 b) {
  return __floats2half2_rn(__half2float(a.x) + __half2float(b.x), __half2float(a.y) + __half2float(b.y));
}
inline __half2 __hmul2(__half2 a, __half2 b) {
  return __floats2half2_rn(__half2float(a.x) * __half2float(b.x), __half2float(a.y) * __half2float(b.y));
}
inline __nv_bfloat162 __hmul2(__nv_bfloat162 a, __nv_bfloat162 b) {
  const float2 x = __bfloat1622float2(a), y = __bfloat1622float2(b);
  return __floats2bfloat162_rn(x.x * y.x, x.y * y.y);
}
inline uint32_t __float_as_uint(float x) {
  uint32_t y;
  memcpy(&y, &x, 4);
  return y;
}
inline float __uint_as_float(uint32_t x) {
  float y;
  memcpy(&y, &x, 4);
  return y;
}
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __expf(float x) { return std::exp(x); }
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
inline uint32_t __byte_perm(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = uint64_t(b) << 32 | a;
  uint32_t x = 0;
  for (int i = 0; i < 4; ++i) x |= uint32_t(bytes >> (selector >> 4 * i & 7) * 8 & 255) << 8 * i;
  return x;
}
using std::max;
using std::min;
template <typename T>
T __ldg(const T* x) { return *x; }
template <typename T>
T __ldcs(const T* x) { return *x; }

inline thread_local dim3 threadIdx, blockIdx;
inline dim3 gridDim;

namespace emulated {

constexpr int SHARED_BYTES = 232448, STACK_BYTES = 128 * 1024;

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  bool is_done = false;
};
struct Meeting {  // of the threads of a warp or of a block
  int arrived = 0;
  long number = 0;
};

inline thread_local ucontext_t scheduler;
inline thread_local std::vector<Fiber> fibers;
inline thread_local std::vector<Meeting> warps;
inline thread_local std::vector<std::array<std::array<char, 64>, 32>> boards;  // what lanes show each other
inline thread_local Meeting block;
inline thread_local int current, threads;
inline thread_local const std::function<void()>* body;
alignas(128) inline thread_local char shared[SHARED_BYTES];
inline unsigned seed = 0;
inline size_t dynamic_bytes = 0;  // that the launch has asked for
inline long most_turns = 1 << 22;  // of a block, before it hangs

inline void* dynamic_shared() { return shared; }
inline int lane() { return current % 32; }
inline void yield() {
  const int me = current;
  swapcontext(&fibers[me].context, &scheduler);
}
inline void meet(Meeting& meeting, int count) {
  const long number = meeting.number;
  if (++meeting.arrived == count) {
    meeting.arrived = 0, ++meeting.number;
    return;
  }
  while (meeting.number == number) yield();
}
// What every lane of the warp shows.
template <typename T>
std::array<T, 32> exchange(const T& mine) {
  static_assert(sizeof(T) <= 64);
  auto& board = boards[current / 32];
  memcpy(board[lane()].data(), &mine, sizeof mine);
  meet(warps[current / 32], 32);
  std::array<T, 32> all;
  for (int i = 0; i < 32; ++i) memcpy(&all[i], board[i].data(), sizeof mine);
  meet(warps[current / 32], 32);
  return all;
}

inline void enter() {
  (*body)();
  fibers[current].is_done = true;
  swapcontext(&fibers[current].context, &scheduler);
}
inline void run_block(dim3 place, int count, const std::function<void()>& f) {
  std::mt19937 random(seed * 7919 + (place.z * 131 + place.y) * 131 + place.x);
  blockIdx = place, threads = count, body = &f, block = {};
  for (char& x : shared) x = char(random());  // NaN among it
  const std::vector<char> behind(shared + dynamic_bytes, shared + SHARED_BYTES);
  fibers = std::vector<Fiber>(count), warps.assign(count / 32, {}), boards.resize(count / 32);
  for (Fiber& fiber : fibers) {
    fiber.stack.reset(new char[STACK_BYTES]);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get(), fiber.context.uc_stack.ss_size = STACK_BYTES;
    makecontext(&fiber.context, enter, 0);
  }
  int left = count;
  unsigned slow = 0;  // a warp that hardly gets on, for a while
  for (long turns = 0; left > 0; ++turns) {
    if (turns > most_turns) {
      fprintf(stderr, "block %u %u %u hangs\n", place.x, place.y, place.z);
      abort();
    }
    const unsigned warp = random() % (count / 32);
    if (turns % 1024 == 0) slow = warp;
    if (warp == slow && random() % 64 != 0) continue;
    if (random() % 64 == 0) std::this_thread::yield();
    for (int i = 0; i < 32; ++i) {
      current = warp * 32 + i;
      if (fibers[current].is_done) continue;
      threadIdx = dim3(current);
      swapcontext(&scheduler, &fibers[current].context);
      left -= fibers[current].is_done;
    }
  }
  if (memcmp(behind.data(), shared + dynamic_bytes, behind.size()) != 0) {
    fprintf(stderr, "block %u %u %u writes behind its shared memory\n", place.x, place.y, place.z);
    abort();
  }
}

}  // namespace emulated

inline void __syncthreads() { emulated::meet(emulated::block, emulated::threads); }
inline void __syncwarp() { emulated::meet(emulated::warps[emulated::current / 32], 32); }
template <typename T>
T __shfl_xor_sync(unsigned, T x, int apart) { return emulated::exchange(x)[emulated::lane() ^ apart]; }
template <typename T>
T __shfl_sync(unsigned, T x, int from) { return emulated::exchange(x)[from]; }
inline unsigned __reduce_max_sync(unsigned, unsigned x) {
  for (int apart = 16; apart > 0; apart /= 2) x = std::max(x, emulated::exchange(x)[emulated::lane() ^ apart]);
  return x;
}
inline unsigned __reduce_min_sync(unsigned mask, unsigned x) { return ~__reduce_max_sync(mask, ~x); }
inline bool __any_sync(unsigned, bool x) {
  for (bool y : emulated::exchange(x))
    if (y) return true;
  return false;
}

// Launches.
enum cudaError_t { cudaSuccess, cudaErrorInvalidValue, cudaErrorInvalidConfiguration };
using cudaStream_t = void*;
enum cudaLaunchAttributeID { cudaLaunchAttributeCooperative, cudaLaunchAttributeClusterDimension,
                             cudaLaunchAttributeProgrammaticStreamSerialization };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct { int cooperative, programmaticStreamSerializationAllowed; struct { unsigned x, y, z; } clusterDim; } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute, int bytes) {
  return bytes <= emulated::SHARED_BYTES ? cudaSuccess : cudaErrorInvalidValue;
}
template <typename Kernel>
cudaError_t cudaOccupancyMaxActiveClusters(int*, Kernel, const cudaLaunchConfig_t*) { return cudaErrorInvalidValue; }
template <typename... P, typename... A>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(P...), A... arguments) {
  ::gridDim = config->gridDim, emulated::dynamic_bytes = config->dynamicSmemBytes;
  const std::function<void()> body = [&] { kernel(arguments...); };
  std::vector<std::thread> blocks;
  const dim3 grid = config->gridDim;
  for (unsigned i = 0; i < grid.x * grid.y * grid.z; ++i)
    blocks.emplace_back(emulated::run_block, dim3(i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y),
                        int(config->blockDim.x), std::cref(body));
  for (std::thread& block : blocks) block.join();
  return cudaSuccess;
}
