// What products of few rows with a weight are made of: chunks of a warp's ring, and the norm before. No torch in here.
#pragma once

#include "../numbers.h"
#include "instructions.h"

namespace sinkattn::cuda {
namespace {

constexpr int KC = 64, PIECES = KC / 8, ROWS_AT_A_TIME = 32 / PIECES;  // of a warp's copy: 16 bytes a lane
constexpr int MAX_STAGES = 8;

// A lane's pieces of a chunk of ROWS rows of the weight, of which the first half goes up to `limit` and the other, `jump`
// bytes further on, up to `limit_of_rest`.
template <int ROWS>
__device__ __forceinline__ void fetch_rows(unsigned at, const char* from, int first_row, int limit, int limit_of_rest,
                                           int64_t row_bytes, int64_t jump, uint64_t once) {
#pragma unroll
  for (int row = 0; row < ROWS; row += ROWS_AT_A_TIME) {
    if (row == ROWS / 2) from += jump;
    if (row + first_row < (row < ROWS / 2 ? limit : limit_of_rest)) copy_once(at + row * PIECES * 16, from, once);
    from += ROWS_AT_A_TIME * row_bytes;
  }
}

__device__ float2 to_floats(__half2 x) { return __half22float2(x); }
__device__ float2 to_floats(__nv_bfloat162 x) { return __bfloat1622float2(x); }
template <typename T>
__device__ auto from_floats(float x, float y) {
  if constexpr (std::is_same_v<T, __half>)
    return __floats2half2_rn(x, y);
  else
    return __floats2bfloat162_rn(x, y);
}

// Two numbers of x, and 8 of them, normalised.
template <typename T>
__device__ void normalise(uint32_t& x, uint32_t weight, float scale, float shift) {
  using Two = decltype(from_floats<T>(0, 0));
  Two& a = reinterpret_cast<Two&>(x);
  const Two& w = reinterpret_cast<const Two&>(weight);
  const float2 n = to_floats(a);
  if (shift == 0) {
    a = __hmul2(w, from_floats<T>(n.x * scale, n.y * scale));
  } else {
    const float2 v = to_floats(w);
    a = from_floats<T>((shift + v.x) * (n.x * scale), (shift + v.y) * (n.y * scale));
  }
}
template <typename T>
__device__ uint4 normal(uint4 x, uint4 weight, float scale, float shift) {
  uint32_t* a = reinterpret_cast<uint32_t*>(&x);
  const uint32_t* w = reinterpret_cast<const uint32_t*>(&weight);
#pragma unroll
  for (int i = 0; i < 4; ++i) normalise<T>(a[i], w[i], scale, shift);
  return x;
}

// Where a piece of 16 bytes of a row lies in a stage of a ring, PIECES for each row. 8 lanes, which read 4 pieces of two
// neighbouring rows at a time, meet 32 different banks.
__device__ int place(int row, int piece) { return row * PIECES + (piece ^ (row & 1) << 2); }

}  // namespace
}  // namespace sinkattn::cuda
