// The second launch of prefill with a cache in 8 bits, `round`, for Hopper (sm_90a): it turns the chunk's keys and
// rounds them and its values, to the cache and, as they are stored there, to scratch.
//
// Floor: the bytes of the chunk, read once and written once in 16 bits, and what the cache keeps of it in 8. A warp takes
// a token of a head, whose largest numbers it has to know; `gather` has copied what the slots held.
#include "../eight_bits.h"
#include "../launch.h"
#include "../turn.h"
#include "scratch.h"

namespace sinkattn::cuda {
namespace {

constexpr int WARPS = 8;  // of a block: tokens

// A row that a warp has, dims lane + 32 i a lane: as it is stored to `copies`, and to a cache and its scales, where there
// are such.
template <typename T, typename C, int N>
__device__ void store_row(const float (&x)[N], int dims, int lane, T* (&copies)[2], C* cache, float* scales) {
  const float scale = scale_of<C>(x);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const int dim = lane + i * 32;
    if (dim >= dims) break;
    const uint32_t number = rounded<C>(x[i], scale);
    const T stored = from_float<T>(unpack<__half>(widened<C>(number).x).x * scale);
    for (T* to : copies)
      if (to) to[dim] = stored;
    if (cache) reinterpret_cast<uint8_t*>(cache)[dim] = uint8_t(number);
  }
  if (cache && lane == 0) *scales = scale;
}

template <typename T, typename C, int N>
__global__ void __launch_bounds__(WARPS * 32) round_kernel(const __grid_constant__ Prefill p) {
  let_next_launch();
  const int lane = threadIdx.x % 32, token = blockIdx.x * WARPS + threadIdx.x / 32, head = blockIdx.y;
  const int64_t row = blockIdx.z, dims = p.head_dim;
  const int count = count_of(p, row), nth = token - (p.tokens - count);
  if (token >= p.tokens || nth < 0) return;
  const int64_t length = p.lengths[row], t = length + nth;
  const bool is_sink = t < p.sink_size, is_kept = is_sink || nth >= count - p.ring_size;
  const int64_t slot = is_sink ? t : p.sink_size + (t - p.sink_size) % p.ring_size;
  const Scratch<T> to(p);
  const int64_t pair = row * p.num_kv_heads + head, new_row = (pair * p.tokens + token) * dims;
  const int64_t sink_row = (pair * sink_rows(p) + t) * dims;
  T* keys[2] = {to.turned + new_row, is_sink ? to.sink_k + sink_row : nullptr};
  T* values[2] = {to.values + new_row, is_sink ? to.sink_v + sink_row : nullptr};
  C* k_cache = static_cast<C*>(p.k_cache) + row * p.k_cache_row + head * p.k_cache_head + slot * p.k_cache_slot;
  C* v_cache = static_cast<C*>(p.v_cache) + row * p.v_cache_row + head * p.v_cache_head + slot * p.v_cache_slot;
  float* k_scale = p.k_scales + row * p.k_scale_row + head * p.k_scale_head + slot * p.k_scale_slot;
  float* v_scale = p.v_scales + row * p.v_scale_row + head * p.v_scale_head + slot * p.v_scale_slot;

  const T* k = static_cast<const T*>(p.k) + row * p.k_row + head * p.k_head + token * p.k_token;
  const T* v = static_cast<const T*>(p.v) + row * p.v_row + head * p.v_head + token * p.v_token;
  float key[N], value[N];
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const int dim = lane + i * 32;
    key[i] = value[i] = 0;
    if (dim >= dims) continue;
    const Turn turn(p, row * p.tokens + token, dim);
    const T both[2] = {k[dim], k[turn.other]};
    key[i] = turn(both, 0), value[i] = to_float(v[dim]);
  }
  store_row<T, C>(key, dims, lane, keys, is_kept ? k_cache : nullptr, k_scale);
  store_row<T, C>(value, dims, lane, values, is_kept ? v_cache : nullptr, v_scale);
}

template <typename T, typename C>
cudaError_t launch_round(const Prefill& p, cudaStream_t stream) {
  const dim3 blocks((p.tokens + WARPS - 1) / WARPS, p.num_kv_heads, p.batch);
  const Grid grid(blocks, WARPS * 32, 0, stream);
  return cudaLaunchKernelEx(&grid.config, p.head_dim <= 128 ? round_kernel<T, C, 4> : round_kernel<T, C, 8>, p);
}

}  // namespace

cudaError_t round(const Prefill& p, cudaStream_t stream) {
  const auto of_int8 = p.is_bfloat16 ? launch_round<__nv_bfloat16, int8_t> : launch_round<__half, int8_t>;
  const auto of_e4m3 = p.is_bfloat16 ? launch_round<__nv_bfloat16, E4m3> : launch_round<__half, E4m3>;
  return (p.stored == Stored::int8 ? of_int8 : of_e4m3)(p, stream);
}

}  // namespace sinkattn::cuda
