// Attention of stack.cu: a block's part of the slots, new tokens appended, and what all blocks found combined. No torch in
// here.
#pragma once

#include "decode_attend.h"
#include "../turn.h"
#include "stack_weights.h"

namespace sinkattn::cuda {
namespace {

constexpr int TILE = 96;          // slots at a time, a multiple of 16
constexpr int SCORES = TILE + 8;  // how far scores of two heads lie apart, so that lanes meet different banks

// What attention has in shared memory: keys and values, (TILE, DIM); queries, (text | sink, STACK_HEADS), each word of two
// dims beside what rounding left of it; scores, (STACK_HEADS, SCORES), and what hides slots, (TILE,); angles, (DIM,); of
// the new tokens the heads after their norms, (STACK_HEADS + 1, DIM), and the key and the value, (DIM,).
template <int DIM>
constexpr int QUERY_BYTES = DIM * 4 + 16;
template <int DIM>
constexpr int ATTENTION_BYTES = 2 * TILE * DIM * 2 + 2 * STACK_HEADS * QUERY_BYTES<DIM> + (STACK_HEADS * SCORES + TILE) * 4 +
                                DIM * int(sizeof(Turn)) + (STACK_HEADS + 3) * DIM * 2;

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

// Query heads are rows of matrices, for text 0 to 3 and for sinks 4 to 7; 8 rows on, what rounding left of them. A lane,
// g = lane / 4 and c = lane % 4, has row g of them, and columns 2 c and 2 c + 1.
template <typename T, int DIM>
struct Attend {
  static constexpr int DIMS = DIM / 32, PARTS = DIM / 8;  // of a lane that turns; pieces of 16 bytes of a key
  static constexpr int COLUMNS = DIM / 64;                // pieces of a value that a warp sums
  const Stack& p;
  unsigned key_tile, value_tile, queries;
  float *scores, *hides;
  T *normed, *new_key, *new_value;
  int warp, lane, g, c, slots, begin, end;
  Turn* turns;
  int64_t t;
  bool is_padding;
  Seen seen;
  T *keys, *values;

  __device__ Attend(const Stack& p, void* shared) : p(p) {
    key_tile = shared_address(shared), value_tile = key_tile + TILE * DIM * 2, queries = value_tile + TILE * DIM * 2;
    scores = reinterpret_cast<float*>(static_cast<char*>(shared) + 2 * TILE * DIM * 2 + 2 * STACK_HEADS * QUERY_BYTES<DIM>);
    hides = scores + STACK_HEADS * SCORES, turns = reinterpret_cast<Turn*>(hides + TILE);
    normed = reinterpret_cast<T*>(turns + DIM);
    new_key = normed + (STACK_HEADS + 1) * DIM, new_value = new_key + DIM;
    warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, c = lane % 4;
  }
  // Where a piece of a slot lies: lanes that read pieces of two slots, or one of eight, meet different banks.
  static __device__ int place_of(int i, int piece) { return (i * PARTS + (piece ^ ((i & 1) << 2 | (i >> 1 & 3)))) * 16; }
  __device__ int tile_slots(int first) const { return min(TILE, end - first); }
  // What does not depend on the layer.
  __device__ void begin_unit(const Unit& u) {
    t = p.call.lengths[u.row], is_padding = p.call.counts && p.call.counts[u.row] == 0;
    if (threadIdx.x < DIM) turns[threadIdx.x] = Turn(p.call, u.row, threadIdx.x);
  }
  // What does not depend on the step's products.
  __device__ void prepare(const Unit& u, const StackLayer& layer) {
    Call sizes = {};
    sizes.sink_size = int(layer.sink_size), sizes.ring_size = int(layer.ring_size);
    sizes.window_size = int(layer.window_size);
    seen = Seen(sizes, t), slots = seen.slots;
    const int each = (slots + p.splits - 1) / p.splits;
    begin = min(u.split * each, slots), end = min(begin + each, slots);
    if (t < slots) end = max(begin, min(end, int(t) + 1));  // further slots are empty
    const int64_t at = (int64_t(u.row) * p.call.num_kv_heads + u.head) * slots * DIM;
    keys = static_cast<T*>(layer.keys) + at, values = static_cast<T*>(layer.values) + at;
    fetch(begin, layer);
  }
  // Asks for a tile of slots. Of those that are not seen there are zeros, as their numbers may be NaN, which a weight of
  // zero would not undo. The new token's is left alone.
  __device__ void fetch(int first, const StackLayer& layer) {
    const int count = (tile_slots(first) + 15) / 16 * 16;
#pragma unroll 1
    for (int i = threadIdx.x; i < count * PARTS; i += THREADS) {
      const int in_tile = i / PARTS, piece = i % PARTS, slot = first + in_tile, place = place_of(in_tile, piece);
      const bool is_seen = slot < end && !seen.hides(slot, seen.age_of(slot, int(layer.ring_size)), slot < layer.sink_size);
      if (piece == 0) hides[in_tile] = is_seen ? 0 : -INFINITY;
      if (slot == seen.new_slot && slot < end) continue;
      if (is_seen) {
        const int64_t at = int64_t(slot) * DIM + piece * 8;
        copy(key_tile + place, keys + at), copy(value_tile + place, values + at);
      } else {
        write_shared(key_tile + place, make_uint4(0, 0, 0, 0)), write_shared(value_tile + place, make_uint4(0, 0, 0, 0));
      }
    }
    end_of_copies();
  }
  // The new token takes the place of what the tile and the cache held.
  __device__ void put(const T* from, unsigned tile, T* cache, int first, bool is_kept) {
    const int in_tile = seen.new_slot - first;
    if (in_tile < 0 || in_tile >= tile_slots(first) || lane >= PARTS) return;
    const uint4 x = reinterpret_cast<const uint4*>(from)[lane];
    write_shared(tile + place_of(in_tile, lane), x);
    if (is_kept) *reinterpret_cast<uint4*>(cache + int64_t(seen.new_slot) * DIM + lane * 8) = x;
  }
  // Queries, and the new key and value, normed and turned, into shared memory.
  __device__ void turn(const Unit& u, const StackLayer& layer, uint32_t epoch) {
    const Call& c = p.call;
    const int heads = c.group * c.num_kv_heads;
    const bool is_kept = u.first == 0 && !is_padding;
    const Handed* row = p.qkv + int64_t(u.row) * (heads + 2 * c.num_kv_heads) * (DIM / 2);
    auto numbers = [&](int head, uint32_t (&x)[DIMS / 2]) {
      const Handed* from = row + head * (DIM / 2) + lane * (DIMS / 2);
      if constexpr (DIMS == 2) {
        x[0] = wait_for(from, epoch);
      } else {
        uint4 two;
        do two = read_pairs(from);
        while (two.y != epoch || two.w != epoch);
        x[0] = two.x, x[1] = two.z;
      }
    };
    const bool is_key = warp == STACK_HEADS;
    if (warp < u.heads || is_key) {
      const T* weight = static_cast<const T*>(layer.head_norms[is_key]);
      T* place = normed + warp * DIM;
      uint32_t both[DIMS / 2];
      float by[DIMS];  // asked for before the numbers are there
#pragma unroll
      for (int i = 0; i < DIMS; ++i) by[i] = weight ? p.head_shift + to_float(weight[lane * DIMS + i]) : 1;
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
        for (int i = 0; i < DIMS; ++i) x[i] *= scale * by[i];
      }
#pragma unroll
      for (int i = 0; i < DIMS; ++i) place[lane * DIMS + i] = from_float<T>(x[i]);
      __syncwarp();
      float turned[2][DIMS];
#pragma unroll
      for (int i = 0; i < DIMS; ++i) {
        const Turn& turn = turns[lane * DIMS + i];
        const T pair[2] = {place[lane * DIMS + i], place[turn.other]};
        turned[0][i] = turn(pair, 0), turned[1][i] = turn(pair, 1);
      }
#pragma unroll
      for (int i = 0; i < DIMS; i += 2) {
        if (is_key) {
          reinterpret_cast<uint32_t*>(new_key)[lane * (DIMS / 2) + i / 2] = cuda::pack<T>(turned[0][i], turned[0][i + 1]);
          continue;
        }
#pragma unroll
        for (int angle = 0; angle < 2; ++angle) {
          const float a = turned[angle][i], b = turned[angle][i + 1];
          const uint32_t high = cuda::pack<T>(a, b);
          const float2 rounded = unpack<T>(high);
          write_shared(queries + (angle * STACK_HEADS + warp) * QUERY_BYTES<DIM> + (lane * (DIMS / 2) + i / 2) * 8,
                       make_uint2(high, cuda::pack<T>(a - rounded.x, b - rounded.y)));
        }
      }
      if (is_key) {
        __syncwarp();
        put(new_key, key_tile, keys, begin, is_kept);
      }
    } else if (warp == STACK_HEADS + 1) {
      uint32_t both[DIMS / 2];
      numbers(heads + c.num_kv_heads + u.head, both);
#pragma unroll
      for (int i = 0; i < DIMS / 2; ++i) reinterpret_cast<uint32_t*>(new_value)[lane * (DIMS / 2) + i] = both[i];
      __syncwarp();
      put(new_value, value_tile, values, begin, is_kept);
    }
    wait_for_copies<0>();
    meet<THREADS>();
  }
  // Scores of the tile's slots, eight of them a warp at a time, in base 2.
  __device__ void score(const Unit& u, int first, int sink_size) {
    uint4 query[DIM / 32][2];
#pragma unroll
    for (int h = 0; h < DIM / 32; ++h) {
#pragma unroll
      for (int j = 0; j < 2; ++j)
        query[h][j] = read_shared(queries + g * QUERY_BYTES<DIM> + (4 * h + c) * 32 + j * 16);
    }
    const int count = (tile_slots(first) + 15) / 16 * 16, head = g % STACK_HEADS;
#pragma unroll 1
    for (int eight = warp * 8; eight < count; eight += WARPS * 8) {
      float sums[2][4] = {};
#pragma unroll
      for (int h = 0; h < DIM / 32; ++h) {
        const uint4 key = read_shared(key_tile + place_of(eight + g, 4 * h + c));
        multiply<T>(sums[0], query[h][0].x, query[h][0].y, query[h][0].z, query[h][0].w, key.x, key.y);
        multiply<T>(sums[1], query[h][1].x, query[h][1].y, query[h][1].z, query[h][1].w, key.z, key.w);
      }
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int i = eight + 2 * c + e;
        const float score = (sums[0][e] + sums[1][e]) + (sums[0][2 + e] + sums[1][2 + e]);
        if ((first + i < sink_size) == (g >= STACK_HEADS) && head < u.heads)
          scores[head * SCORES + i] = score * p.call.query_scale + hides[i];
      }
    }
    meet<THREADS>();
  }
  // What the block's slots make of values, and what becomes the output of all blocks'.
  __device__ void attend(const Unit& u, const StackLayer& layer, uint32_t epoch) {
    const int sink_size = int(layer.sink_size);
    const bool is_head = g < u.heads;
    float sums[COLUMNS][4] = {}, top = LOWEST, total = 0;
#pragma unroll 1
    for (int first = begin; first < end && !is_padding; first += TILE) {
      if (first > begin) {
        meet<THREADS>();
        fetch(first, layer);
        if (warp == 0) put(new_key, key_tile, keys, first, u.first == 0);
        if (warp == 1) put(new_value, value_tile, values, first, u.first == 0);
        wait_for_copies<0>();
        meet<THREADS>();
      }
      score(u, first, sink_size);
      const int steps = (tile_slots(first) + 15) / 16;
      const float* mine = scores + g % STACK_HEADS * SCORES + 2 * c;
      float2 x[TILE / 16][2];
      float higher = top;
#pragma unroll
      for (int step = 0; step < TILE / 16; ++step) {
        if (step >= steps) break;
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          x[step][j] = is_head ? *reinterpret_cast<const float2*>(mine + step * 16 + j * 8)
                               : make_float2(-INFINITY, -INFINITY);
          higher = fmaxf(higher, fmaxf(x[step][j].x, x[step][j].y));
        }
      }
      higher = fmaxf(higher, __shfl_xor_sync(~0u, higher, 1)), higher = fmaxf(higher, __shfl_xor_sync(~0u, higher, 2));
      const float fade = exp2_fast(top - higher);
      top = higher, total *= fade;
#pragma unroll
      for (int j = 0; j < COLUMNS; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[j][i] *= fade;
      }
#pragma unroll
      for (int step = 0; step < TILE / 16; ++step) {
        if (step >= steps) break;
        uint32_t high[2], low[2];
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const float a = exp2_fast(x[step][j].x - top), b = exp2_fast(x[step][j].y - top);
          total += a + b, high[j] = cuda::pack<T>(a, b);
          const float2 rounded = unpack<T>(high[j]);
          low[j] = cuda::pack<T>(a - rounded.x, b - rounded.y);
        }
#pragma unroll
        for (int j = 0; j < COLUMNS; ++j) {
          const uint2 value = read_transposed(value_tile + place_of(step * 16 + lane % 16, warp * COLUMNS + j));
          multiply<T>(sums[j], high[0], low[0], high[1], low[1], value.x, value.y);
        }
      }
    }
    total += __shfl_xor_sync(~0u, total, 1), total += __shfl_xor_sync(~0u, total, 2);
    Handed* all_values = p.values + int64_t(u.pair) * p.splits * APART;
    Handed* all_tops = p.softmax + int64_t(u.pair) * p.splits * (STACK_HEADS * 2);
#pragma unroll
    for (int j = 0; j < COLUMNS; ++j) {
      const int column = g * DIM + (warp * COLUMNS + j) * 8 + 2 * c;
      const float a = sums[j][0] + sums[j][2], b = sums[j][1] + sums[j][3];
      if (!is_head) continue;
      if (p.splits == 1)
        write(u, epoch, column, a, b, total);
      else
        hand_two(all_values + u.split * APART + column, __float_as_uint(a), __float_as_uint(b), epoch);
    }
    if (p.splits == 1) return;
    if (is_head && warp == 0 && c == 0)
      hand_two(all_tops + (u.split * STACK_HEADS + g) * 2, __float_as_uint(top), __float_as_uint(total), epoch);
    // The unit's part of the pairs of columns: a thread for a pair and a split, so that lanes read what lies together, then
    // some for a pair. Where keys were nobody reads any more.
    const int pairs = u.heads * DIM / 2, from = pairs * u.split / p.splits, count = pairs * (u.split + 1) / p.splits - from;
#pragma unroll 1
    for (int i = threadIdx.x; i < count * p.splits; i += THREADS) {
      const int split = i / count, pair = from + i % count;
      const Handed *two_at = all_values + split * APART + pair * 2,
                   *soft_at = all_tops + (split * STACK_HEADS + pair * 2 / DIM) * 2;
      uint4 two, soft;
      do two = read_pairs(two_at), soft = read_pairs(soft_at);
      while (two.y != epoch || two.w != epoch || soft.y != epoch || soft.w != epoch);
      write_shared(key_tile + (i % count * p.splits + split) * 16, make_uint4(two.x, two.z, soft.x, soft.z));
    }
    meet<THREADS>();
    constexpr int TOGETHER = 16;  // threads of a pair
#pragma unroll 1
    for (int first = 0; first < count; first += THREADS / TOGETHER) {
      const int i = first + int(threadIdx.x) / TOGETHER;
      if (first + warp * (32 / TOGETHER) >= count) break;
      uint4 parts[MOST_SPLITS / TOGETHER];
      float highest = LOWEST, total = 0, a = 0, b = 0;
#pragma unroll
      for (int n = 0; n < MOST_SPLITS / TOGETHER; ++n) {
        const int split = threadIdx.x % TOGETHER + n * TOGETHER;
        parts[n] = make_uint4(0, 0, __float_as_uint(LOWEST), 0);
        if (split < p.splits) parts[n] = read_shared(key_tile + (min(i, count - 1) * p.splits + split) * 16);
        highest = fmaxf(highest, __uint_as_float(parts[n].z));
      }
#pragma unroll
      for (int apart = TOGETHER / 2; apart > 0; apart /= 2) highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, apart));
#pragma unroll
      for (int n = 0; n < MOST_SPLITS / TOGETHER; ++n) {
        const float gain = exp2_fast(__uint_as_float(parts[n].z) - highest);
        total += gain * __uint_as_float(parts[n].w);
        a += gain * __uint_as_float(parts[n].x), b += gain * __uint_as_float(parts[n].y);
      }
#pragma unroll
      for (int apart = TOGETHER / 2; apart > 0; apart /= 2) {
        total += __shfl_xor_sync(~0u, total, apart);
        a += __shfl_xor_sync(~0u, a, apart), b += __shfl_xor_sync(~0u, b, apart);
      }
      if (i < count && threadIdx.x % TOGETHER == 0) write(u, epoch, (from + i) * 2, a, b, total);
    }
  }
  // Two columns of the heads that the unit is for.
  __device__ void write(const Unit& u, uint32_t epoch, int column, float a, float b, float total) {
    const float share = total > 0 ? __fdividef(1, total) : 0;  // nothing is seen by padding
    const int64_t head = (int64_t(u.row) * p.call.num_kv_heads + u.head) * p.call.group + u.first;
    write_pair(p.attended + (head * DIM + column) / 2, cuda::pack<T>(a * share, b * share), epoch);
  }
  static constexpr int APART = STACK_HEADS * DIM;
};

}  // namespace
}  // namespace sinkattn::cuda
