// How a dim of a head turns, by the angles of its token. No torch in here.
#pragma once

#include "call.h"
#include "numbers.h"

namespace sinkattn::cuda {
namespace {

// A dim of the heads of a token, number row * tokens + token of all, its partner in the rotation, and the angles for
// text and sinks. 1 and 0 turn nothing.
struct Turn {
  int other;
  float cos[2], sin[2];
  __device__ Turn() {}
  __device__ Turn(const Call& p, int64_t token, int dim) : other(dim), cos{1, 1}, sin{0, 0} {
    const int i = dim - p.rotary_start, half = p.rotary_half;
    if (!p.rotation || i < 0 || i >= 2 * half) return;
    const bool is_first = p.interleaved ? i % 2 == 0 : i < half;
    const int pair = p.interleaved ? i / 2 : is_first ? i : i - half, apart = p.interleaved ? 1 : half;
    const float* angles = p.rotation + token * (4 * half) + pair;
    other = dim + (is_first ? apart : -apart);
    cos[0] = angles[0], cos[1] = angles[2 * half];
    sin[0] = is_first ? -angles[half] : angles[half], sin[1] = is_first ? -angles[3 * half] : angles[3 * half];
  }
  template <typename T>
  __device__ float operator()(const T (&x)[2], int angle) const {  // a dim and its partner
    return __fmaf_rn(to_float(x[0]), cos[angle], __fmul_rn(to_float(x[1]), sin[angle]));  // the same bits everywhere
  }
};

}  // namespace
}  // namespace sinkattn::cuda
