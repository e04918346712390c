// Phase `turn` of prefill: dims of a head and their partners by the angles of a token. No torch in here.
#pragma once

#include "../numbers.h"
#include "../prefill.h"

namespace sinkattn::cuda {
namespace {

// Four dims of a head, as they lie in memory, and the four that are turned with them, by which angles on: -1 for none.
struct Fours {
  int first, second, angle;
};
__device__ Fours fours_of(const Prefill& p, int job) {
  const int start = p.rotary_start / 4, pairs = p.rotary_half / 4;
  if (job < pairs && p.interleaved) return {start + 2 * job, start + 2 * job + 1, 4 * job};
  if (job < pairs) return {start + job, start + job + pairs, 4 * job};
  const int rest = 2 * (job - pairs);
  return {rest < start ? rest : rest + 2 * pairs, rest + 1 < start ? rest + 1 : rest + 1 + 2 * pairs, -1};
}

template <typename T>
__device__ void turn(uint32_t& x, uint32_t& y, float2 cos, float2 sin) {
  const float2 a = unpack<T>(x), b = unpack<T>(y);
  // Fused like this wherever it is inlined, so that a key has the same bits in scratch and in the cache.
  x = pack<T>(__fmaf_rn(a.x, cos.x, -__fmul_rn(b.x, sin.x)), __fmaf_rn(a.y, cos.y, -__fmul_rn(b.y, sin.y)));
  y = pack<T>(__fmaf_rn(b.x, cos.x, __fmul_rn(a.x, sin.x)), __fmaf_rn(b.y, cos.y, __fmul_rn(a.y, sin.y)));
}
template <typename T>
__device__ void turn(uint2& x, uint2& y, float4 cos, float4 sin, bool interleaved) {
  uint2 a = x, b = y;
  if (interleaved) {  // to first numbers of pairs and second ones
    a = make_uint2(__byte_perm(x.x, x.y, 0x5410), __byte_perm(y.x, y.y, 0x5410));
    b = make_uint2(__byte_perm(x.x, x.y, 0x7632), __byte_perm(y.x, y.y, 0x7632));
  }
  turn<T>(a.x, b.x, make_float2(cos.x, cos.y), make_float2(sin.x, sin.y));
  turn<T>(a.y, b.y, make_float2(cos.z, cos.w), make_float2(sin.z, sin.w));
  x = a, y = b;
  if (interleaved) {
    x = make_uint2(__byte_perm(a.x, b.x, 0x5410), __byte_perm(a.x, b.x, 0x7632));
    y = make_uint2(__byte_perm(a.y, b.y, 0x5410), __byte_perm(a.y, b.y, 0x7632));
  }
}

}  // namespace
}  // namespace sinkattn::cuda
