// Attention of stack.cu: a block's part of the slots, new tokens appended, and what all blocks found combined. No torch in
// here.
#pragma once

#include "decode_combine.h"
#include "decode_turn.h"
#include "stack_weights.h"

namespace sinkattn::cuda {
namespace {

// What attention has in shared memory: found (WARPS, STACK_HEADS, dim), its maximum and sum, queries for text and for
// sinks, and of the new tokens the heads after their norms, the key and the value.
template <int DIM>
constexpr int ATTENTION_BYTES = WARPS * STACK_HEADS * (DIM + 2) * 4 + 2 * STACK_HEADS * DIM * 4 + (STACK_HEADS + 3) * DIM * 2;

// What a block attends for: a part of the slots, for some query heads of a row's key head.
struct Unit {
  int row, head, first, heads, split, pair;  // pair: a row's key head and share of its query heads
  __device__ Unit(const Stack& p, int number) {
    const Call& c = p.call;
    split = number % p.splits, pair = number / p.splits;
    const int share = pair % p.shares;
    head = pair / p.shares % c.num_kv_heads, row = pair / p.shares / c.num_kv_heads;
    first = c.group * share / p.shares, heads = c.group * (share + 1) / p.shares - first;
  }
};

// HEADS: query heads at most.
template <typename T, int DIM, int HEADS>
struct Attend {
  static constexpr int LANES = DIM / 8, KEYS_AT_A_TIME = 32 / LANES, DIMS = DIM / 32;  // DIMS: of a lane that turns
  const Stack& p;
  float *found, *softmax, *queries;  // (WARPS, STACK_HEADS, DIM), (WARPS, STACK_HEADS, 2), (text | sink, STACK_HEADS, DIM)
  T *normed, *new_key, *new_value;   // (STACK_HEADS + 1, DIM), (DIM,), (DIM,)
  int warp, lane, slots, begin, end;
  uint4 key[AHEAD], value[AHEAD];
  Turn turns[DIMS];
  int64_t t;
  bool is_padding;
  Seen seen;
  T *keys, *values;

  __device__ Attend(const Stack& p, void* shared) : p(p) {
    found = static_cast<float*>(shared), softmax = found + WARPS * STACK_HEADS * DIM;
    queries = softmax + WARPS * STACK_HEADS * 2, normed = reinterpret_cast<T*>(queries + 2 * STACK_HEADS * DIM);
    new_key = normed + (STACK_HEADS + 1) * DIM, new_value = new_key + DIM;
    warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  }
  __device__ int slot_of(int i) const { return begin + (i * WARPS + warp) * KEYS_AT_A_TIME + lane / LANES; }
  __device__ void fetch(int i, int to) {
    const int slot = slot_of(i);
    if (slot >= end) return;
    const int64_t at = int64_t(slot) * DIM + lane % LANES * 8;
    key[to] = __ldcs(reinterpret_cast<const uint4*>(keys + at)), value[to] = __ldcs(reinterpret_cast<const uint4*>(values + at));
  }
  // What does not depend on the layer.
  __device__ void begin_unit(const Unit& u) {
    t = p.call.lengths[u.row], is_padding = p.call.counts && p.call.counts[u.row] == 0;
    if (warp <= STACK_HEADS) {
#pragma unroll
      for (int i = 0; i < DIMS; ++i) turns[i] = Turn(p.call, u.row, lane * DIMS + i);
    }
  }
  // What does not depend on the step's products.
  __device__ void prepare(const Unit& u, const StackLayer& layer) {
    Call sizes = {};
    sizes.sink_size = int(layer.sink_size), sizes.ring_size = int(layer.ring_size);
    sizes.window_size = int(layer.window_size);
    seen = Seen(sizes, t), slots = seen.slots;
    const int each = (slots + p.splits - 1) / p.splits;
    begin = min(u.split * each, slots), end = min(begin + each, slots);
    if (t < slots) end = min(end, int(t) + 1);  // further slots are empty
    const int64_t at = (int64_t(u.row) * p.call.num_kv_heads + u.head) * slots * DIM;
    keys = static_cast<T*>(layer.keys) + at, values = static_cast<T*>(layer.values) + at;
#pragma unroll
    for (int i = 0; i < AHEAD; ++i) key[i] = value[i] = make_uint4(0, 0, 0, 0), fetch(i, i);
  }
  // Queries, and the new key and value, normed and turned, into shared memory.
  __device__ void turn(const Unit& u, const StackLayer& layer, uint32_t epoch) {
    const Call& c = p.call;
    const int heads = c.group * c.num_kv_heads;
    const Handed* row = p.qkv + int64_t(u.row) * (heads + 2 * c.num_kv_heads) * (DIM / 2);
    auto numbers = [&](int head, uint32_t (&x)[DIMS / 2]) {
      const Handed* from = row + head * (DIM / 2) + lane * (DIMS / 2);
#pragma unroll
      for (int i = 0; i < DIMS / 2; ++i) x[i] = wait_for(from + i, epoch);
    };
    const bool is_key = warp == STACK_HEADS;
    if (warp < u.heads || is_key) {
      const T* weight = static_cast<const T*>(layer.head_norms[is_key]);
      T* place = normed + warp * DIM;
      uint32_t both[DIMS / 2];
      numbers(is_key ? heads + u.head : u.head * c.group + u.first + warp, both);
      float x[DIMS], squares = 0;
#pragma unroll
      for (int i = 0; i < DIMS / 2; ++i) {
        const float2 y = unpack<T>(both[i]);
        x[2 * i] = y.x, x[2 * i + 1] = y.y, squares += y.x * y.x + y.y * y.y;
      }
      if (weight) {
#pragma unroll
        for (int apart = 16; apart > 0; apart /= 2) squares += __shfl_xor_sync(~0u, squares, apart);
        const float scale = rsqrtf(squares / DIM + p.head_eps);
#pragma unroll
        for (int i = 0; i < DIMS; ++i) x[i] *= scale * (p.head_shift + to_float(weight[lane * DIMS + i]));
      }
#pragma unroll
      for (int i = 0; i < DIMS; ++i) place[lane * DIMS + i] = from_float<T>(x[i]);
      __syncwarp();
#pragma unroll
      for (int i = 0; i < DIMS; ++i) {
        const int dim = lane * DIMS + i;
        const T pair[2] = {place[dim], place[turns[i].other]};
        if (is_key) {
          new_key[dim] = from_float<T>(turns[i](pair, 0));
        } else {
          queries[warp * DIM + dim] = turns[i](pair, 0) * c.query_scale;
          queries[(STACK_HEADS + warp) * DIM + dim] = turns[i](pair, 1) * c.query_scale;
        }
      }
    } else if (warp == STACK_HEADS + 1) {
      uint32_t both[DIMS / 2];
      numbers(heads + c.num_kv_heads + u.head, both);
#pragma unroll
      for (int i = 0; i < DIMS / 2; ++i) reinterpret_cast<uint32_t*>(new_value)[lane * (DIMS / 2) + i] = both[i];
    }
    __syncthreads();
  }
  // Over the slots of the warp; what all warps of the block found is in shared memory then.
  __device__ void attend(const Unit& u, const StackLayer& layer) {
    const int piece = lane % LANES, sink_size = int(layer.sink_size), ring_size = int(layer.ring_size);
    float query[HEADS][8], acc[HEADS][8] = {}, top[HEADS], total[HEADS] = {};
#pragma unroll
    for (int h = 0; h < HEADS; ++h) {
      top[h] = LOWEST;
#pragma unroll
      for (int j = 0; j < 8; j += 4) {
        const float4 x = *reinterpret_cast<const float4*>(queries + h * DIM + piece * 8 + j);  // of no head: anything
        query[h][j] = x.x, query[h][j + 1] = x.y, query[h][j + 2] = x.z, query[h][j + 3] = x.w;
      }
    }
    const int count = is_padding ? 0 : (end - begin + WARPS * KEYS_AT_A_TIME - 1) / (WARPS * KEYS_AT_A_TIME);
#pragma unroll 1
    for (int first = 0; first < count; first += AHEAD) {
#pragma unroll
      for (int ahead = 0; ahead < AHEAD; ++ahead) {
        const int i = first + ahead, slot = slot_of(i);
        if (i >= count) break;
        const bool is_sink = slot < sink_size;
        if (slot == seen.new_slot && slot < end) {  // the new token takes the place of what it held, here and in the cache
          key[ahead] = reinterpret_cast<const uint4*>(new_key)[piece];
          value[ahead] = reinterpret_cast<const uint4*>(new_value)[piece];
          if (u.first == 0) {
            const int64_t at = int64_t(slot) * DIM + piece * 8;
            *reinterpret_cast<uint4*>(keys + at) = key[ahead], *reinterpret_cast<uint4*>(values + at) = value[ahead];
          }
        }
        const bool hidden = slot >= end || seen.hides(slot, seen.age_of(slot, ring_size), is_sink);
        const uint32_t* words = reinterpret_cast<const uint32_t*>(&key[ahead]);
        float score[HEADS] = {};
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const float2 k = unpack<T>(words[j]);
#pragma unroll
          for (int h = 0; h < HEADS; ++h) score[h] += query[h][2 * j] * k.x + query[h][2 * j + 1] * k.y;
        }
        if (__any_sync(~0u, is_sink)) {
#pragma unroll 1
          for (int h = 0; h < u.heads; ++h) {
            if (!is_sink) continue;
            const float* of_sinks = queries + (STACK_HEADS + h) * DIM + piece * 8;
            float sum = 0;
#pragma unroll
            for (int j = 0; j < 4; ++j) {
              const float2 k = unpack<T>(words[j]);
              sum += of_sinks[2 * j] * k.x + of_sinks[2 * j + 1] * k.y;
            }
#pragma unroll
            for (int n = 0; n < HEADS; ++n)
              if (n == h) score[n] = sum;
          }
          __syncwarp();
        }
        // Values: what is not visible may hold NaN, which a weight of zero would not undo.
        const uint4 shown = hidden ? make_uint4(0, 0, 0, 0) : value[ahead];
        const uint32_t* value_words = reinterpret_cast<const uint32_t*>(&shown);
#pragma unroll
        for (int h = 0; h < HEADS; ++h) {
#pragma unroll
          for (int apart = LANES / 2; apart > 0; apart /= 2) score[h] += __shfl_xor_sync(~0u, score[h], apart);
          const float x = hidden ? -INFINITY : score[h], higher = fmaxf(top[h], x);
          const float fade = exp2_fast(top[h] - higher), weight = exp2_fast(x - higher);
          top[h] = higher, total[h] = total[h] * fade + weight;
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            const float2 v = unpack<T>(value_words[j]);
            acc[h][2 * j] = acc[h][2 * j] * fade + weight * v.x;
            acc[h][2 * j + 1] = acc[h][2 * j + 1] * fade + weight * v.y;
          }
        }
        fetch(i + AHEAD, ahead);
      }
    }
    // Lanes that had other keys meet, then warps do.
#pragma unroll
    for (int h = 0; h < HEADS; ++h) {
#pragma unroll
      for (int apart = LANES; apart < 32; apart *= 2) {
        const float other = __shfl_xor_sync(~0u, top[h], apart), higher = fmaxf(top[h], other);
        const float fade = exp2_fast(top[h] - higher), gain = exp2_fast(other - higher);
        top[h] = higher, total[h] = total[h] * fade + __shfl_xor_sync(~0u, total[h], apart) * gain;
#pragma unroll
        for (int j = 0; j < 8; ++j) acc[h][j] = acc[h][j] * fade + __shfl_xor_sync(~0u, acc[h][j], apart) * gain;
      }
      if (lane < LANES) {
        float4* to = reinterpret_cast<float4*>(found + (warp * STACK_HEADS + h) * DIM + piece * 8);
        to[0] = make_float4(acc[h][0], acc[h][1], acc[h][2], acc[h][3]);
        to[1] = make_float4(acc[h][4], acc[h][5], acc[h][6], acc[h][7]);
        if (lane == 0) softmax[(warp * STACK_HEADS + h) * 2] = top[h], softmax[(warp * STACK_HEADS + h) * 2 + 1] = total[h];
      }
    }
    __syncthreads();
  }
  // Two columns of the heads that the unit is for.
  __device__ void write(const Unit& u, uint32_t epoch, int column, float a, float b, float total) {
    const float share = total > 0 ? __fdividef(1, total) : 0;  // nothing is seen by padding
    const int64_t head = (int64_t(u.row) * p.call.num_kv_heads + u.head) * p.call.group + u.first;
    write_pair(p.attended + (head * DIM + column) / 2, cuda::pack<T>(a * share, b * share), epoch);
  }
  // What warps and blocks found becomes the output.
  __device__ void combine_all(const Unit& u, uint32_t epoch) {
    const int columns = u.heads * DIM;
    constexpr int APART = STACK_HEADS * DIM;
    Handed* values = p.values + int64_t(u.pair) * p.splits * APART;
    Handed* tops = p.softmax + int64_t(u.pair) * p.splits * (STACK_HEADS * 2);
    for (int i = threadIdx.x * 4; i < columns; i += THREADS * 4) {
      const Combined x = combine<WARPS>(WARPS, found + i, APART, softmax + i / DIM * 2, STACK_HEADS * 2);
      if (p.splits == 1) {
        write(u, epoch, i, x.sum.x, x.sum.y, x.total), write(u, epoch, i + 2, x.sum.z, x.sum.w, x.total);
        continue;
      }
      const float y[4] = {x.sum.x, x.sum.y, x.sum.z, x.sum.w};
#pragma unroll
      for (int j = 0; j < 4; j += 2)
        hand_two(values + u.split * APART + i + j, __float_as_uint(y[j]), __float_as_uint(y[j + 1]), epoch);
      if (i % DIM == 0)
        hand_two(tops + (u.split * STACK_HEADS + i / DIM) * 2, __float_as_uint(x.top), __float_as_uint(x.total), epoch);
    }
    if (p.splits == 1) return;
    // The unit's part of the pairs of columns: a thread for a pair and a split, then one for a pair.
    const int pairs = columns / 2, from = pairs * u.split / p.splits, count = pairs * (u.split + 1) / p.splits - from;
    float4* parts = reinterpret_cast<float4*>(found);  // (pairs, splits)
    __syncthreads();
    for (int i = threadIdx.x; i < count * p.splits; i += THREADS) {
      const int split = i / count, column = (from + i % count) * 2;
      uint4 two, soft;
      do {
        two = read_pairs(values + split * APART + column);
        soft = read_pairs(tops + (split * STACK_HEADS + column / DIM) * 2);
      } while (two.y != epoch || two.w != epoch || soft.y != epoch || soft.w != epoch);
      parts[i % count * p.splits + split] = make_float4(__uint_as_float(two.x), __uint_as_float(two.z),
                                                       __uint_as_float(soft.x), __uint_as_float(soft.z));
    }
    __syncthreads();
    constexpr int TOGETHER = 8;  // threads of a pair
    for (int first = 0; first < count; first += THREADS / TOGETHER) {
      const int i = first + int(threadIdx.x) / TOGETHER;
      const float4* mine = parts + min(i, count - 1) * p.splits;
      float top = LOWEST, total = 0, a = 0, b = 0;
      for (int split = threadIdx.x % TOGETHER; split < p.splits; split += TOGETHER) {
        const float4 part = mine[split];
        const float higher = fmaxf(top, part.z), fade = exp2_fast(top - higher), weight = exp2_fast(part.z - higher);
        top = higher, total = total * fade + weight * part.w;
        a = a * fade + weight * part.x, b = b * fade + weight * part.y;
      }
      float highest = top;
#pragma unroll
      for (int apart = TOGETHER / 2; apart > 0; apart /= 2)
        highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, apart));
      const float fade = exp2_fast(top - highest);
      total *= fade, a *= fade, b *= fade;
#pragma unroll
      for (int apart = TOGETHER / 2; apart > 0; apart /= 2) {
        total += __shfl_xor_sync(~0u, total, apart);
        a += __shfl_xor_sync(~0u, a, apart), b += __shfl_xor_sync(~0u, b, apart);
      }
      if (i < count && threadIdx.x % TOGETHER == 0) write(u, epoch, (from + i) * 2, a, b, total);
    }
  }
};

}  // namespace
}  // namespace sinkattn::cuda
