// csrc/cuda/sm90/hopper.h, emulated: barriers that count bytes, the copy engine, products of a warpgroup.
//
// Copies are there as soon as they are asked for, and products are worked out as late as may be, when they are waited
// for: who writes what a product still reads spoils it.
#pragma once

#include <map>

#include "cuda/numbers.h"

using cuuint32_t = uint32_t;
using cuuint64_t = uint64_t;
struct CUtensorMap {
  const char* x;
  uint64_t sizes[4], strides[4];  // strides in bytes
  uint32_t box[4];
};
enum {
  CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
  CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE, CU_TENSOR_MAP_DATA_TYPE_FLOAT16, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
};

namespace emulated {

struct Barrier {
  int expected, missing, bytes = 0;
  long number = 0;
  void look() {
    if (missing == 0 && bytes == 0) missing = expected, ++number;
  }
};
inline thread_local std::map<uint64_t*, Barrier> barriers;
inline thread_local std::array<Meeting, 16> named;
using Products = std::vector<std::function<void()>>;
inline thread_local std::map<int, std::vector<Products>> products;  // of each thread, in groups; the last is still open

inline int encode(CUtensorMap* map, int, int, void* x, const uint64_t* sizes, const uint64_t* strides,
                  const uint32_t* box, const uint32_t*, int, int, int, int) {
  *map = {static_cast<const char*>(x), {}, {2, strides[0], strides[1], strides[2]}, {}};
  for (int i = 0; i < 4; ++i) map->sizes[i] = sizes[i], map->box[i] = box[i];
  for (int i = 0; i < 3; ++i)
    if (strides[i] % 16 != 0) return 1;
  return reinterpret_cast<uintptr_t>(x) % 16 != 0 || box[0] * 2 > 128;
}

}  // namespace emulated

namespace sinkattn::cuda {
namespace {

inline auto map_encoder() { return &emulated::encode; }
template <typename T>
constexpr int MAP_TYPE = CU_TENSOR_MAP_DATA_TYPE_FLOAT16;

__device__ void open_barrier(uint64_t* barrier, int arrivals) { emulated::barriers[barrier] = {arrivals, arrivals}; }
__device__ void arrive(uint64_t* barrier) { --emulated::barriers.at(barrier).missing, emulated::barriers[barrier].look(); }
__device__ void expect_bytes(uint64_t* barrier, int bytes) {
  emulated::barriers.at(barrier).bytes += bytes;
  arrive(barrier);
}
__device__ void wait(uint64_t* barrier, int phase) {
  while (emulated::barriers.at(barrier).number % 2 == phase) emulated::yield();
}
__device__ void publish_barriers() {}
__device__ void publish() {}

__device__ void meet(int barrier, int threads) { emulated::meet(emulated::named[barrier], threads); }
__device__ void pass(int barrier, int threads) {
  emulated::Meeting& meeting = emulated::named[barrier];
  if (++meeting.arrived == threads) meeting.arrived = 0, ++meeting.number;
}

inline uint32_t swizzled(uint32_t address) { return address ^ (address >> 3 & 0x70); }

__device__ void copy_in(char* shared, const CUtensorMap& map, int dim, int token, int head, int row,
                        uint64_t* barrier) {
  const int64_t first[4] = {dim, token, head, row};
  for (uint32_t r = 0; r < map.box[1]; ++r)
    for (uint32_t d = 0; d < map.box[0]; ++d) {
      bool inside = true;
      int64_t at = 0;
      for (int i = 0; i < 4; ++i) {
        const int64_t index = first[i] + (i == 0 ? d : i == 1 ? r : 0);
        inside = inside && index >= 0 && index < int64_t(map.sizes[i]);
        at += index * int64_t(map.strides[i]);
      }
      uint16_t x = 0;
      if (inside) memcpy(&x, map.x + at, 2);
      memcpy(sinkattn::cuda::at(swizzled(shared_address(shared) + r * 128 + d * 2)), &x, 2);
    }
  emulated::barriers.at(barrier).bytes -= int(map.box[0] * map.box[1] * 2);
  emulated::barriers[barrier].look();
}

template <int COUNT>
__device__ void leave_registers() {}
template <int COUNT>
__device__ void take_registers() {}

__device__ uint64_t describe(const char* tile, int columns_apart) {
  return (shared_address(tile) & 0x3ffff) >> 4 | uint64_t(columns_apart >> 4) << 16 | uint64_t(1024 >> 4) << 32;
}
__device__ uint64_t further(uint64_t tile, int bytes) {
  return (tile & 0xffffffff00000000) | uint32_t(uint32_t(tile) + bytes / 16);
}
template <typename T>
float number_at(uint64_t tile, int offset) {
  T x;
  memcpy(&x, at(swizzled(uint32_t(tile & 0x3fff) * 16 + offset)), 2);
  return to_float(x);
}
// Number k, of what is summed over, of a row, where such numbers lie side by side, and where they are rows themselves.
template <typename T>
float in_row(uint64_t tile, int row, int k) { return number_at<T>(tile, row / 8 * 1024 + row % 8 * 128 + k * 2); }
template <typename T>
float in_column(uint64_t tile, int column, int k) {
  const int apart = int(tile >> 16 & 0x3fff) * 16;
  return number_at<T>(tile, column / 64 * apart + k / 8 * 1024 + k % 8 * 128 + column % 64 * 2);
}

inline std::vector<emulated::Products>& products() { return emulated::products[emulated::current]; }
__device__ void open_products() {
  if (products().empty()) products().emplace_back();
}
__device__ void commit_products() { products().emplace_back(); }
template <int PENDING>
__device__ void wait_for_products() {
  auto& groups = products();
  while (int(groups.size()) > PENDING + 1) {
    const emulated::Products group = groups.front();
    groups.erase(groups.begin());
    for (const auto& product : group) product();
  }
}
template <int N>
__device__ void hold(float (&)[N]) {}
template <int N>
__device__ void hold(uint32_t (&)[N]) {}

template <typename T, int N>
__device__ void multiply(float (&c)[N], uint64_t a, uint64_t b, bool more) {
  const int lane = emulated::lane(), first = emulated::current / 32 % 4 * 16 + lane / 4;
  products().back().push_back([=, &c] {
    for (int i = 0; i < N; ++i) {
      const int row = first + i % 4 / 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
      float sum = more ? c[i] : 0;
      for (int k = 0; k < 16; ++k) sum += in_row<T>(a, row, k) * in_row<T>(b, column, k);
      c[i] = sum;
    }
  });
}
template <typename T, int N>
__device__ void multiply(float (&c)[N], const uint32_t* a, uint64_t b) {
  const int lane = emulated::lane();
  products().back().push_back([=, &c] {
    const auto all = emulated::exchange(std::array<uint32_t, 4>{a[0], a[1], a[2], a[3]});
    float rows[2][16];
    for (int r = 0; r < 2; ++r)
      for (int k = 0; k < 16; ++k) {
        const uint16_t bits = uint16_t(all[lane / 4 * 4 + k % 8 / 2][r + k / 8 * 2] >> k % 2 * 16);
        T x;
        memcpy(&x, &bits, 2);
        rows[r][k] = to_float(x);
      }
    for (int i = 0; i < N; ++i)
      for (int k = 0; k < 16; ++k) c[i] += rows[i % 4 / 2][k] * in_column<T>(b, i / 4 * 8 + lane % 4 * 2 + i % 2, k);
  });
}

}  // namespace
}  // namespace sinkattn::cuda
