// The first launch of prefill, `gather`, for Hopper (sm_90a): it turns the chunk's keys, appends them to the cache, and
// puts what ring and sinks held before into scratch, in the order of the text. Of a cache in 8 bits it puts that there
// in 16, and leaves the chunk to `round`.
//
// Floor: the bytes of what is copied, read once and written once. What it takes to get near it:
//
// * Nothing else reads the ring, so whoever has copied what a slot held also writes what the chunk leaves there: no
//   block waits for another. That key goes to scratch as well, so that none is read and turned twice.
// * A thread takes 8 dims of several heads, whose loads are in flight together.
#include "../eight_bits.h"
#include "../launch.h"
#include "scratch.h"
#include "turn.h"

namespace sinkattn::cuda {
namespace {

constexpr int MOVERS = 256;          // threads of a block
constexpr int HEADS = 4, TURNS = 8;  // heads of a slot, or of a token of the chunk, that each of them takes

// Two fours of so many of N heads that are `head` elements apart.
template <typename T, int N>
struct Part {
  uint2 first[N], second[N];

  __device__ void load(const void* x, int64_t begin, int64_t head, int heads, const Fours& at) {
    const T* from = static_cast<const T*>(x) + begin;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const uint2* fours = reinterpret_cast<const uint2*>(from + i * head);
      if (i < heads) first[i] = fours[at.first], second[i] = fours[at.second];
    }
  }
  // The same of a cache of C, in 8 bits multiplied by its scales.
  template <typename C>
  __device__ void load(const void* x, int64_t begin, int64_t head, const float* scales, int64_t scale_head, int heads,
                       const Fours& at) {
    if constexpr (!IN_8_BITS<C>) {
      load(x, begin, head, heads, at);
    } else {
      const C* from = static_cast<const C*>(x) + begin;
#pragma unroll
      for (int i = 0; i < N; ++i) {
        if (i >= heads) break;
        const uint32_t* fours = reinterpret_cast<const uint32_t*>(from + i * head);
        first[i] = scaled<T, C>(fours[at.first], scales[i * scale_head]);
        second[i] = scaled<T, C>(fours[at.second], scales[i * scale_head]);
      }
    }
  }
  __device__ void store(void* x, int64_t begin, int64_t head, int heads, const Fours& at) const {
    T* to = static_cast<T*>(x) + begin;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      uint2* fours = reinterpret_cast<uint2*>(to + i * head);
      if (i < heads) fours[at.first] = first[i], fours[at.second] = second[i];
    }
  }
  // By the angles of a token of a row.
  __device__ void turned(const Prefill& p, int64_t row, int token, const Fours& at) {
    if (!p.rotation || at.angle < 0) return;
    const float* angles = p.rotation + (row * p.tokens + token) * 4 * p.rotary_half + at.angle;
    const float4 cos = *reinterpret_cast<const float4*>(angles);
    const float4 sin = *reinterpret_cast<const float4*>(angles + p.rotary_half);
#pragma unroll
    for (int i = 0; i < N; ++i) turn<T>(first[i], second[i], cos, sin, p.interleaved);
  }
};

// The turned key of a token of the chunk to scratch.
template <typename T, int N>
__device__ void store_turned(const Prefill& p, const Part<T, N>& k, int token, int64_t row, int first_head, int heads,
                             const Fours& at) {
  const int64_t begin = ((row * p.num_kv_heads + first_head) * p.tokens + token) * p.head_dim;
  k.store(Scratch<T>(p).turned, begin, int64_t(p.tokens) * p.head_dim, heads, at);
}

// The key of a token of the chunk that gets no slot to scratch, or zeros to the output of one that is padding.
template <typename T, typename C>
__device__ void gather_token(const Prefill& p, int token, int64_t row, int first_head, const Fours& at, int job) {
  const int heads = min(p.num_kv_heads - first_head, TURNS);
  if (token >= p.tokens) return;
  const int padding = p.tokens - count_of(p, row);
  if (token < padding) {  // nobody else writes what padding gives
    const int per_head = p.group * p.head_dim;
    const int64_t begin = ((row * p.tokens + token) * p.num_kv_heads + first_head) * per_head + job * 8;
    for (int head = 0; head < heads * p.group; ++head)
      *reinterpret_cast<uint4*>(static_cast<T*>(p.out) + begin + head * p.head_dim) = make_uint4(0, 0, 0, 0);
    return;
  }
  if (!p.rotation || IN_8_BITS<C> || p.tokens - token <= p.ring_size) return;
  const int nth = token - padding;
  if (nth < p.sink_size && p.lengths[row] + nth < p.sink_size) return;
  Part<T, TURNS> k;
  k.load(p.k, row * p.k_row + token * p.k_token + first_head * p.k_head, p.k_head, heads, at);
  k.turned(p, row, token, at);
  store_turned(p, k, token, row, first_head, heads, at);
}

__host__ __device__ int ring_units(const Prefill& p) {
  const int rows = ring_rows(p);
  return p.ring_size > rows ? p.ring_size : rows;
}

// What is seen of a slot of the ring to scratch, and what the chunk leaves there to the slot: whoever has a slot copies
// it before it is written, and nobody else reads or writes it, in this launch or the next. Then the same for sinks.
template <typename T, typename C>
__device__ void gather_slot(const Prefill& p, int unit, int64_t row, int first_head, const Fours& at) {
  const int heads = min(p.num_kv_heads - first_head, HEADS);
  const int padding = p.tokens - count_of(p, row);
  const int64_t length = p.lengths[row];
  // A token, a slot of the cache and a row of scratch, -1 for none; whether the slot holds what is seen.
  int token = -1, slot = -1, target = -1;
  bool holds;
  const bool is_ring = unit < ring_units(p);
  if (is_ring) {
    const int age = unit;  // 0 is the slot written last; rows of scratch may be older than slots get
    const int64_t written = max(length - p.sink_size, int64_t(0));
    const int seen = int(min(written, int64_t(p.window_size - 1)));
    holds = age < seen;
    if (age - age % keys_of(p.head_dim) < seen) target = ring_rows(p) - 1 - age;  // else in a tile that nobody takes
    if (age < p.ring_size) {
      // Tokens that are no sinks come into slots of the ages R - 1, R - 2, ..., 0, R - 1, ...: the last for this one.
      const int first = padding + int(written + p.sink_size - length), count = max(p.tokens - first, 0);
      const int last = count - 1 - (count + age) % p.ring_size;
      if (last >= 0) token = first + last;
    }
    if (holds || token >= 0) {
      slot = int(written % p.ring_size) - 1 - age;
      slot += slot < 0 ? p.sink_size + p.ring_size : p.sink_size;
    }
  } else {
    target = unit - ring_units(p);
    if (target >= sink_rows(p)) return;
    if (target < p.sink_size) slot = target;
    holds = slot >= 0 && slot < length;
    if (slot >= 0 && !holds && padding + slot - length < p.tokens) token = int(padding + slot - length);
  }

  Part<T, HEADS> k, v;
  auto to_scratch = [&] {
    const Scratch<T> to(p);
    const int rows = is_ring ? ring_rows(p) : sink_rows(p);
    const int64_t head = int64_t(rows) * p.head_dim;
    const int64_t begin = (row * p.num_kv_heads + first_head) * head + target * p.head_dim;
    k.store(is_ring ? to.ring_k : to.sink_k, begin, head, heads, at);
    v.store(is_ring ? to.ring_v : to.sink_v, begin, head, heads, at);
  };
  auto k_slot = [&] { return row * p.k_cache_row + slot * p.k_cache_slot + first_head * p.k_cache_head; };
  auto v_slot = [&] { return row * p.v_cache_row + slot * p.v_cache_slot + first_head * p.v_cache_head; };
  const bool is_new = token >= 0 && !is_ring;  // whether scratch gets the token, and not what the slot holds, or zeros
  if (target >= 0 && !is_new) {
    k = v = {};
    if (holds) {
      const float* k_scales = p.k_scales + row * p.k_scale_row + slot * p.k_scale_slot + first_head * p.k_scale_head;
      const float* v_scales = p.v_scales + row * p.v_scale_row + slot * p.v_scale_slot + first_head * p.v_scale_head;
      k.template load<C>(p.k_cache, k_slot(), p.k_cache_head, k_scales, p.k_scale_head, heads, at);
      v.template load<C>(p.v_cache, v_slot(), p.v_cache_head, v_scales, p.v_scale_head, heads, at);
    }
    to_scratch();
  }
  if (token < 0 || IN_8_BITS<C>) return;
  k.load(p.k, row * p.k_row + token * p.k_token + first_head * p.k_head, p.k_head, heads, at);
  v.load(p.v, row * p.v_row + token * p.v_token + first_head * p.v_head, p.v_head, heads, at);
  k.turned(p, row, token, at);
  if (p.rotation) store_turned(p, k, token, row, first_head, heads, at);
  if (is_new) to_scratch();
  k.store(p.k_cache, k_slot(), p.k_cache_head, heads, at);
  v.store(p.v_cache, v_slot(), p.v_cache_head, heads, at);
}

// Blocks for slots come first, as they have most to wait for: `slot_blocks` for each HEADS of the TURNS heads.
template <typename T, typename C>
__global__ void __launch_bounds__(MOVERS, 4) gather_kernel(const __grid_constant__ Prefill p, int slot_blocks) {
  let_next_launch();
  const int jobs = p.head_dim / 8, units = MOVERS / jobs;
  const int block = blockIdx.x, unit = threadIdx.x / jobs, job = threadIdx.x % jobs;
  if (unit == units) return;  // a rest that is no unit
  const int first_head = blockIdx.z * TURNS, slots = slot_blocks * (TURNS / HEADS);
  const Fours at = fours_of(p, job);
  if (block >= slots) {
    gather_token<T, C>(p, (block - slots) * units + unit, blockIdx.y, first_head, at, job);
  } else {
    const int head = first_head + block / slot_blocks * HEADS;
    if (head < p.num_kv_heads) gather_slot<T, C>(p, block % slot_blocks * units + unit, blockIdx.y, head, at);
  }
}

template <typename T, typename C>
cudaError_t launch(const Prefill& p, cudaStream_t stream) {
  const int units = MOVERS / (p.head_dim / 8);
  const int slot_blocks = (ring_units(p) + sink_rows(p) + units - 1) / units;
  const int kept = p.tokens < p.ring_size ? p.tokens : p.ring_size;  // tokens at the end that have slots
  const int others = p.counts ? p.tokens : p.rotation ? p.tokens - kept : 0;
  const int token_blocks = (others + units - 1) / units;
  const dim3 blocks(slot_blocks * (TURNS / HEADS) + token_blocks, p.batch, (p.num_kv_heads + TURNS - 1) / TURNS);
  const Grid grid(blocks, MOVERS, 0, stream);
  return cudaLaunchKernelEx(&grid.config, gather_kernel<T, C>, p, slot_blocks);
}

template <typename T>
cudaError_t launch_as(const Prefill& p, cudaStream_t stream) {
  return (p.stored == Stored::same ? launch<T, T> : p.stored == Stored::int8 ? launch<T, int8_t> : launch<T, E4m3>)(p, stream);
}

}  // namespace

cudaError_t gather(const Prefill& p, cudaStream_t stream) {
  return (p.is_bfloat16 ? launch_as<__nv_bfloat16> : launch_as<__half>)(p, stream);
}

}  // namespace sinkattn::cuda
