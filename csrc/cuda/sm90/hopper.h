// What Hopper has (sm_90a): barriers that count bytes, the copy engine's maps, products of a warpgroup. No torch here.
#pragma once

#include <cuda.h>

#include "../numbers.h"

namespace sinkattn::cuda {
namespace {

// Barriers in shared memory, and the copy engine, which counts the bytes it brings at them.
__device__ void open_barrier(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
__device__ void expect_bytes(uint64_t* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}
__device__ void arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
__device__ void wait(uint64_t* barrier, int phase) {
  asm volatile(
      "{\n.reg .pred done;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@!done bra again;\n}" ::
          "r"(shared_address(barrier)),
      "r"(phase)
      : "memory");
}
__device__ void publish_barriers() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
// What was stored before is seen by the copy engine and the tensor cores.
__device__ void publish() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Barriers of threads: `meet` waits for all, `pass` lets others go on.
__device__ void meet(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
__device__ void pass(int barrier, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// A box of a map to shared memory, without what lies outside of the tensor: there it becomes zero.
__device__ void copy_in(char* shared, const CUtensorMap& map, int dim, int token, int head, int row,
                        uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %5}], "
      "[%6];" ::"r"(shared_address(shared)),
      "l"(&map), "r"(dim), "r"(token), "r"(head), "r"(row), "r"(shared_address(barrier))
      : "memory");
}

// Registers of a thread, for all warps of a warpgroup at once: others may have them from here on, or have left them.
template <int COUNT>
__device__ void leave_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}
template <int COUNT>
__device__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}

// Products of a warpgroup. Tiles in shared memory are columns of 64 dims, rows of 128 bytes, swizzled. `columns_apart`
// is for values, whose dims are not what is summed over.
__device__ uint64_t describe(const char* tile, int columns_apart) {
  return (shared_address(tile) & 0x3ffff) >> 4 | uint64_t(columns_apart >> 4) << 16 | uint64_t(1024 >> 4) << 32 |
         uint64_t(1) << 62;
}
// So many bytes further on, which never carries out of the address.
__device__ uint64_t further(uint64_t tile, int bytes) {
  return (tile & 0xffffffff00000000) | uint32_t(uint32_t(tile) + bytes / 16);
}
__device__ void open_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING>
__device__ void wait_for_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}
template <int N>
__device__ void hold(float (&c)[N]) {  // keeps the compiler from moving what is done to c across this
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(c[i])::"memory");
}
template <int N>
__device__ void hold(uint32_t (&a)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+r"(a[i])::"memory");
}

#define NAMES_8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define NAMES_16 NAMES_8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define NAMES_24 NAMES_16 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define NAMES_32 NAMES_24 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define NAMES_40 NAMES_32 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define NAMES_48 NAMES_40 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define NAMES_64 NAMES_48 ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define NAMES_96                                                                                                    \
  NAMES_64                                                                                                          \
      ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, " \
      "%85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define NAMES_128                                                                                                  \
  NAMES_96                                                                                                         \
      ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, " \
      "%114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define SUMS_8(i)                                                                                             \
  "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3]), "+f"(c[i + 4]), "+f"(c[i + 5]), "+f"(c[i + 6]), \
      "+f"(c[i + 7])
#define SUMS_16(i) SUMS_8(i), SUMS_8(i + 8)
#define SUMS_24(i) SUMS_16(i), SUMS_8(i + 16)
#define SUMS_32(i) SUMS_24(i), SUMS_8(i + 24)
#define SUMS_40(i) SUMS_32(i), SUMS_8(i + 32)
#define SUMS_48(i) SUMS_40(i), SUMS_8(i + 40)
#define SUMS_64(i) SUMS_32(i), SUMS_32(i + 32)
#define SUMS_96(i) SUMS_64(i), SUMS_32(i + 64)
#define SUMS_128(i) SUMS_64(i), SUMS_64(i + 64)
// COUNT is of a lane's sums, twice as many columns.
#define FROM_SHARED(TYPE, COUNT, COLUMNS, A, B, MORE)                                                             \
  asm volatile("{\n.reg .pred more;\nsetp.ne.b32 more, " MORE ", 0;\nwgmma.mma_async.sync.aligned.m64n" COLUMNS \
               "k16.f32." TYPE "." TYPE " {" NAMES_##COUNT "}, " A ", " B ", more, 1, 1, 0, 0;\n}"                \
               : SUMS_##COUNT(0)                                                                                  \
               : "l"(a), "l"(b), "r"(int(more)))
#define FROM_REGISTERS(TYPE, COUNT, COLUMNS, A, B, TURNED)                                                            \
  asm volatile("wgmma.mma_async.sync.aligned.m64n" COLUMNS "k16.f32." TYPE "." TYPE " {" NAMES_##COUNT "}, {" A "}, " \
               B ", 1, 1, 1, " TURNED ";"                                                                             \
               : SUMS_##COUNT(0)                                                                                      \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
#define OF_TYPE(PRODUCT, ...)              \
  if constexpr (std::is_same_v<T, __half>) \
    PRODUCT("f16", __VA_ARGS__);           \
  else                                     \
    PRODUCT("bf16", __VA_ARGS__)

// c (64, 2 N) of queries a and keys b, 16 dims; added to c where `more`.
template <typename T, int N>
__device__ void multiply(float (&c)[N], uint64_t a, uint64_t b, bool more) {
  static_assert(N == 8 || N == 24 || N == 64);
  if constexpr (N == 8) OF_TYPE(FROM_SHARED, 8, "16", "%8", "%9", "%10");
  if constexpr (N == 24) OF_TYPE(FROM_SHARED, 24, "48", "%24", "%25", "%26");
  if constexpr (N == 64) OF_TYPE(FROM_SHARED, 64, "128", "%64", "%65", "%66");
}
// c (64, 2 N) += weights a of 16 keys times their values b.
template <typename T, int N>
__device__ void multiply(float (&c)[N], const uint32_t* a, uint64_t b) {
  static_assert(N == 32 || N == 40 || N == 48 || N == 64 || N == 96 || N == 128);
  if constexpr (N == 32) OF_TYPE(FROM_REGISTERS, 32, "64", "%32, %33, %34, %35", "%36", "1");
  if constexpr (N == 40) OF_TYPE(FROM_REGISTERS, 40, "80", "%40, %41, %42, %43", "%44", "1");
  if constexpr (N == 48) OF_TYPE(FROM_REGISTERS, 48, "96", "%48, %49, %50, %51", "%52", "1");
  if constexpr (N == 64) OF_TYPE(FROM_REGISTERS, 64, "128", "%64, %65, %66, %67", "%68", "1");
  if constexpr (N == 96) OF_TYPE(FROM_REGISTERS, 96, "192", "%96, %97, %98, %99", "%100", "1");
  if constexpr (N == 128) OF_TYPE(FROM_REGISTERS, 128, "256", "%128, %129, %130, %131", "%132", "1");
}
// c (64, N) += rows a of 16 numbers times rows b of as many, N of them in a tile, in products of 64, 32 and 16 of them.
template <typename T, int N>
__device__ void multiply_rows(float* c, const uint32_t* a, uint64_t b) {
  static_assert(N % 16 == 0);
  constexpr int PART = N >= 64 ? 64 : N >= 32 ? 32 : 16;
  if constexpr (PART == 64) OF_TYPE(FROM_REGISTERS, 32, "64", "%32, %33, %34, %35", "%36", "0");
  if constexpr (PART == 32) OF_TYPE(FROM_REGISTERS, 16, "32", "%16, %17, %18, %19", "%20", "0");
  if constexpr (PART == 16) OF_TYPE(FROM_REGISTERS, 8, "16", "%8, %9, %10, %11", "%12", "0");
  if constexpr (N > PART) multiply_rows<T, N - PART>(c + PART / 2, a, further(b, PART * 128));
}

// Writes down how the copy engine reads or writes a tensor; null where the driver has no such thing.
inline auto map_encoder() {
  static const auto encode = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result;
    cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found);
  }();
  return encode;
}
template <typename T>
constexpr auto MAP_TYPE =
    std::is_same_v<T, __half> ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;

}  // namespace
}  // namespace sinkattn::cuda
