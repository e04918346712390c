// Decoder layers, one after another, for one token of one row or two, in one launch: for each
//
//   qkv = W norm(x) | attend, append | x += W attended | gated = act(gate) up of norm(x) | x += W gated
//
// Floor: the bytes of all weights and of the visible keys and values, read once; and six times a layer what one block
// wrote has to reach all others, which takes 0.7 us. What it takes to get there:
//
// * One block a multiprocessor stays for all layers, and has an even share of the rows of every weight. What a warp will
//   multiply is known from the start: its ring in shared memory is refilled without regard to where one product ends and
//   the next begins, so that memory goes on working while blocks wait for each other. Chunks and fragments are those of
//   linear.cu.
// * There is no barrier of all blocks. What is handed from block to block has its layer's number beside it, in the same 8
//   bytes, which are written and read at once (as NCCL's LL protocol does it): whoever needs it looks until the number is
//   right, and has it. No fence waits for anybody's loads, and no flag has to be looked at first. Nobody overtakes
//   anybody: a block writes where it wrote a layer ago only once all blocks have handed on what they made of that.
// * All blocks are resident (a cooperative launch), or nothing is launched: so nobody waits for one that never comes.
// * Small layers take as long as their instructions do, and an instruction that a warp comes to for the first time in
//   some microseconds takes 5 cycles or more: so there are few warps, with all registers that they need (what is spilled
//   here does not stay in the L1), and what may be done early is done while a block waits: to ask for weights, for the
//   first keys and values, for angles and the row's length.
// * A block attends with up to 4 query heads of a row's key head to one part of the slots; a warp's lanes share a key,
//   whose products are those of float32. Blocks that share a key head combine what all of them found, each a part of the
//   columns.
#include <algorithm>

#include "../activate.h"
#include "../launch.h"
#include "../stack.h"
#include "decode_combine.h"
#include "decode_turn.h"
#include "linear_parts.h"

namespace sinkattn::cuda {
namespace {

constexpr int WARPS = 8, THREADS = WARPS * 32;
constexpr int ROWS = 16, STAGE = ROWS * PIECES;  // of the weight at a time, with an activation half of them gates
constexpr int SUMS = ROWS + 4;                   // how far sums for a row of x lie apart, so that lanes meet different banks
constexpr int MOST_STAGES = 12;                  // of a ring
constexpr int MOST_SPLITS = 64;
constexpr int AHEAD = 2;                         // keys and values of a lane that are on their way
constexpr int MOST_X_BYTES = 64 * 1024;          // of x in shared memory

// What attention has in shared memory: found (WARPS, STACK_HEADS, dim), its maximum and sum, queries for text and for
// sinks, and of the new tokens the heads after their norms, the key and the value.
template <int DIM>
constexpr int ATTENTION_BYTES = WARPS * STACK_HEADS * (DIM + 2) * 4 + 2 * STACK_HEADS * DIM * 4 + (STACK_HEADS + 3) * DIM * 2;

// Two numbers that are handed over at once; one is `write_pair`.
__device__ void hand_two(Handed* to, uint32_t first, uint32_t second, uint32_t epoch) {
  write_pairs(to, make_uint4(first, epoch, second, epoch));
}
__device__ uint32_t wait_for(const Handed* from, uint32_t epoch) {
  uint2 x;
  do x = read_pair(from);
  while (x.y != epoch);
  return x.x;
}

// The block's share of one kind of product: results from begin on, `size` at a time, all of them even.
struct Share {
  int begin, end, size, pieces, chunks, count;
  int64_t row_bytes, jump;  // jump: from gates to the rest
  bool gated;

  __device__ void plan(const Stack& p, int kind) {
    const Call& c = p.call;
    gated = kind == GATE_UP;
    const int heads = c.group * c.num_kv_heads * c.head_dim;
    const int in = kind == OUTPUT ? heads : kind == DOWN ? p.inner : p.hidden;
    count = kind == QKV ? heads + 2 * c.num_kv_heads * c.head_dim : gated ? p.inner : p.hidden;
    const int most = gated ? ROWS / 2 : ROWS, pairs = count / 2;
    begin = int64_t(pairs) * blockIdx.x / gridDim.x * 2, end = int64_t(pairs) * (blockIdx.x + 1) / gridDim.x * 2;
    const int groups = (end - begin + most - 1) / most;
    size = groups ? ((end - begin) / 2 + groups - 1) / groups * 2 : 2;
    pieces = in / 8, chunks = in / KC;
    row_bytes = int64_t(in) * 2, jump = gated ? (count - most) * row_bytes : 0;
  }
};

// A warp's way through all weights: what is asked for next, chunk after chunk, product after product, layer after layer.
struct Weights {
  const Share* shares;
  const StackLayer* layers;
  const uint4* ring;
  unsigned barriers, parity = 0;
  int stages, products, stage = 0, next_stage = 0, owed = 0;  // owed: chunks that were taken, in whose place none was asked for
  uint64_t once;
  int product, first, chunk, warp, first_row, lane_piece;
  // Of the product and the rows that are asked for next.
  Share share;
  int limit, limit_of_rest;
  const char* line;
  unsigned lane_place;

  __device__ Weights(const Share* shares, const StackLayer* layers, int num_layers, const uint4* ring, uint64_t* barriers,
                     int stages)
      : shares(shares), layers(layers), ring(ring), barriers(shared_address(barriers)), stages(stages),
        products(num_layers * PRODUCTS) {
    if (threadIdx.x % 32 < stages) begin_barrier(barriers + threadIdx.x % 32);
    __syncwarp();
    once = read_once();
    warp = threadIdx.x / 32, first_row = threadIdx.x % 32 / PIECES, lane_piece = threadIdx.x % PIECES;
    lane_place = shared_address(ring + place(first_row, lane_piece));
    enter(0);
    owed = stages;
    settle();
  }
  __device__ void begin(int at) {
    first = at, chunk = warp, limit = min(share.size, share.end - first);
    limit_of_rest = share.gated ? limit + ROWS / 2 : limit;
    const char* weight = static_cast<const char*>(layers[product / PRODUCTS].weights[product % PRODUCTS]);
    line = weight + (first + first_row) * share.row_bytes + lane_piece * 16 + chunk * (KC * 2);
  }
  __device__ void enter(int next) {  // the first product from there on that the warp has a part in
    for (product = next; product < products; ++product) {
      share = shares[product % PRODUCTS];
      if (warp < share.chunks) return begin(share.begin);
    }
  }
  __device__ void ask() {
    if (product < products) {
      fetch_rows<ROWS>(lane_place + next_stage * (STAGE * 16), line, first_row, limit, limit_of_rest, share.row_bytes,
                       share.jump, once);
      chunk += WARPS, line += WARPS * KC * 2;
      if (chunk >= share.chunks) {
        if (first + share.size < share.end)
          begin(first + share.size);
        else
          enter(product + 1);
      }
    }
    open_once_copied(barriers + next_stage * 8);
    if (++next_stage == stages) next_stage = 0;
  }
  // The chunk that is next to be multiplied. Its place is free once all lanes have read it.
  __device__ const uint4* take() {
    wait_for_barrier(barriers + stage * 8, parity);
    const uint4* rows = ring + stage * STAGE;
    ++owed;
    if (++stage == stages) stage = 0, parity ^= 1;
    return rows;
  }
  // Ask for what is owed, but for some: to ask takes time, which there is once the block has handed on what it found.
  __device__ void settle(int but = 0) {
    if (owed <= but) return;
    __syncwarp();
    for (; owed > but; --owed) ask();
  }
};

// How far rows of x lie apart in shared memory, in pieces of 16 bytes: lanes that have two rows meet different banks.
__host__ __device__ inline int apart_of(int pieces) { return pieces + (12 - pieces % 8) % 8; }

// x, (rows, columns), normalised if there is a norm, into shared memory. squares: (MAX_STACK_ROWS, WARPS). handed: from
// other blocks; null for x of the call. meanwhile: what a warp does until it is there.
template <typename T, int MOST, typename F>
__device__ __forceinline__ void gather(const Stack& p, const Handed* handed, uint32_t epoch, int pieces,
                                       const void* norm_weight, uint4* x, float* squares, F meanwhile) {
  const int rows = MOST == 1 ? 1 : p.call.batch, quads = pieces * 2, apart = apart_of(pieces) * 2;  // quads: of 4 numbers
  uint2* to = reinterpret_cast<uint2*>(x);
  const uint2* norm = static_cast<const uint2*>(norm_weight);
  uint2 by = make_uint2(0, 0);  // asked for before x is there
  if (norm && threadIdx.x < quads) by = __ldg(norm + threadIdx.x);
  float total[MOST] = {};
  constexpr int TOGETHER = 4;  // looked at at a time: quads of one row, or rows
  constexpr bool ONE = MOST == 1;
  uint4 two[TOGETHER];
  auto is_there = [&](int i, int first, int n) { return ONE ? i + n * THREADS < quads : i < quads && first + n < rows; };
  auto ask = [&](int i, int first, int n) {
    const int at = ONE ? i + n * THREADS : (first + n) * quads + i;
    if (handed) {
      two[n] = read_pairs(handed + at * 2);
    } else {
      const uint2 quad = static_cast<const uint2*>(p.x)[at];
      two[n] = make_uint4(quad.x, epoch, quad.y, epoch);
    }
  };
#pragma unroll
  for (int n = 0; n < TOGETHER; ++n)
    if (is_there(threadIdx.x, 0, n)) ask(threadIdx.x, 0, n);
  meanwhile();
#pragma unroll 1
  for (int i = threadIdx.x; i < quads; i += ONE ? TOGETHER * THREADS : THREADS) {
#pragma unroll
    for (int first = 0; first < MOST; first += TOGETHER) {
      if (first >= rows) break;
      if (i > threadIdx.x || first > 0) {
#pragma unroll
        for (int n = 0; n < TOGETHER; ++n)
          if (is_there(i, first, n)) ask(i, first, n);
      }
#pragma unroll
      for (int n = 0; n < TOGETHER; ++n) {
        if (!is_there(i, first, n)) break;
        while (two[n].y != epoch || two[n].w != epoch) ask(i, first, n);
        to[ONE ? i + n * THREADS : (first + n) * apart + i] = make_uint2(two[n].x, two[n].z);
        const float2 a = unpack<T>(two[n].x), b = unpack<T>(two[n].z);
        total[ONE ? 0 : first + n] += a.x * a.x + a.y * a.y + b.x * b.x + b.y * b.y;
      }
    }
  }
  if (norm) {
#pragma unroll
    for (int row = 0; row < MOST; ++row) {
      if (row >= rows) break;
#pragma unroll
      for (int apart = 16; apart > 0; apart /= 2) total[row] += __shfl_xor_sync(~0u, total[row], apart);
      if (threadIdx.x % 32 == 0) squares[row * WARPS + threadIdx.x / 32] = total[row];
    }
    __syncthreads();
#pragma unroll
    for (int row = 0; row < MOST; ++row) {
      if (row >= rows) break;
      float sum = 0;
#pragma unroll
      for (int w = 0; w < WARPS; ++w) sum += squares[row * WARPS + w];
      total[row] = rsqrtf(sum / (pieces * 8) + p.norm_eps);
    }
#pragma unroll 2
    for (int i = threadIdx.x; i < quads; i += THREADS) {
      if (i >= THREADS) by = __ldg(norm + i);
#pragma unroll
      for (int row = 0; row < MOST; ++row) {
        if (row >= rows) break;
        uint2 quad = to[row * apart + i];
        normalise<T>(quad.x, by.x, total[row], p.norm_shift), normalise<T>(quad.y, by.y, total[row], p.norm_shift);
        to[row * apart + i] = quad;
      }
    }
  }
  __syncthreads();
}

// What products leave: where it goes, and what is added.
struct Result {
  const void* bias;
  void* own;  // (rows, the block's share) of what goes from layer to layer, in shared memory; null if nothing is added
  Handed* to;
  void* out;  // of the last layer
};

// The block's share of one product of x in shared memory. sums: twice (WARPS, rows, SUMS).
template <typename T, int MOST>
__device__ __forceinline__ void multiply_share(const Stack& p, const Share& share, Weights& weights, const uint4* x,
                                               uint32_t epoch, const Result& result, float* sums) {
  const int rows = MOST == 1 ? 1 : p.call.batch, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int g = lane / 4, c = lane % 4, most = share.gated ? ROWS / 2 : ROWS, end = share.end, size = share.size;
  const uint4 zero = make_uint4(0, 0, 0, 0);
  float* next_sums = sums + WARPS * rows * SUMS;
  const int used = min(WARPS, share.chunks);
  int writer = threadIdx.x;  // warps take turns at what is done once for all
  const int here = place(g, c), there = here ^ 4;  // pieces c and 4 + c of row g of a chunk
  const uint4* mine = x + g * apart_of(share.pieces) + c;
  const T* bias = static_cast<const T*>(result.bias);
#pragma unroll 1
  for (int first = share.begin; first < end; first += size) {
    const int row = writer / most, output = writer % most;
    const bool writes = row < rows && output < min(size, end - first);
    T biases[2];  // asked for before they are needed
    if (writes && bias) {
      biases[0] = bias[first + output];
      if (share.gated) biases[1] = bias[share.count + first + output];
    }
    float products[2][4] = {};  // of pieces c, of pieces 4 + c
#pragma unroll 1
    for (int chunk = warp; chunk < share.chunks; chunk += WARPS) {
      uint4 y = zero, z = zero;  // row g of x
      if (g < rows) y = mine[chunk * PIECES], z = mine[chunk * PIECES + 4];
      const uint4* of_weight = weights.take();
      const uint4 a = of_weight[here], b = of_weight[here + 8 * PIECES];  // rows g and g + 8 of the weight
      const uint4 d = of_weight[there], e = of_weight[there + 8 * PIECES];
      multiply<T>(products[0], a.x, b.x, a.y, b.y, y.x, y.y);
      multiply<T>(products[1], d.x, e.x, d.y, e.y, z.x, z.y);
      multiply<T>(products[0], a.z, b.z, a.w, b.w, y.z, y.w);
      multiply<T>(products[1], d.z, e.z, d.w, e.w, z.z, z.w);
      weights.settle(weights.stages / 2);
    }
    // Warps meet. A lane has rows g and g + 8 of the weight, columns 2 c and 2 c + 1.
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (c * 2 + i % 2 < rows)
        sums[(warp * rows + c * 2 + i % 2) * SUMS + g + i / 2 * 8] = products[0][i] + products[1][i];
    __syncthreads();
    if (writer / 32 * 32 < rows * most) {
      float y[1] = {0};
      if (writes) {
        auto sum = [&](int number) {
          float total = 0;
#pragma unroll
          for (int w = 0; w < WARPS; ++w) total += w < used ? sums[(w * rows + row) * SUMS + number] : 0;
          return total;
        };
        y[0] = sum(output) + (bias ? to_float(biases[0]) : 0);
        if (share.gated) {
          activate(y, p.activation);
          y[0] *= sum(most + output) + (bias ? to_float(biases[1]) : 0);
        }
        if (result.own) {
          T& own = static_cast<T*>(result.own)[row * (end - share.begin) + first - share.begin + output];
          own = from_float<T>(y[0] + to_float(own)), y[0] = to_float(own);
        }
      }
      const float other = __shfl_xor_sync(~0u, y[0], 1);
      if (writes && output % 2 == 0) {
        const uint32_t both = pack<T>(y[0], other);
        const int64_t at = (int64_t(row) * share.count + first + output) / 2;
        write_pair(result.to + at, both, epoch);
        if (result.out) static_cast<uint32_t*>(result.out)[at] = both;
      }
    }
    // The next sums go beside these: whoever writes over these has met all warps after they were read.
    writer = (writer + 32) % THREADS;
    float* const read_last = sums;
    sums = next_sums, next_sums = read_last;
  }
}

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

// The most columns that x has in any product.
__host__ __device__ inline int most_columns(const Stack& p) {
  const int heads = p.call.group * p.call.num_kv_heads * p.call.head_dim, wide = p.hidden > p.inner ? p.hidden : p.inner;
  return wide > heads ? wide : heads;
}

template <typename T, int DIM, int HEADS, int MOST>
__global__ void __launch_bounds__(THREADS, 1) stack_kernel(const __grid_constant__ Stack p, int stages) {
  extern __shared__ uint4 shared[];
  __shared__ Share shares[PRODUCTS];
  __shared__ float squares[WARPS * MAX_STACK_ROWS];
  __shared__ __align__(8) uint64_t barriers[WARPS * MOST_STAGES];
  const Call& c = p.call;
  uint4* x = shared + WARPS * stages * STAGE;
  uint4* attention_memory = x + c.batch * apart_of(most_columns(p) / 8);
  float* sums = reinterpret_cast<float*>(attention_memory + (ATTENTION_BYTES<DIM> + 15) / 16);
  StackLayer* layers = reinterpret_cast<StackLayer*>(sums + 2 * WARPS * c.batch * SUMS);
  T* own = reinterpret_cast<T*>(layers + p.num_layers);

  const int64_t* table = reinterpret_cast<const int64_t*>(p.layers);
  for (int i = threadIdx.x; i < p.num_layers * int(sizeof(StackLayer) / 8); i += THREADS)
    reinterpret_cast<int64_t*>(layers)[i] = table[i];
  if (threadIdx.x < PRODUCTS) shares[threadIdx.x].plan(p, threadIdx.x);
  __syncthreads();
  Weights weights(shares, layers, p.num_layers, shared + threadIdx.x / 32 * stages * STAGE,
                  barriers + threadIdx.x / 32 * MOST_STAGES, stages);
  uint32_t epoch = *p.epoch;
  const int width = shares[DOWN].end - shares[DOWN].begin;
  for (int i = threadIdx.x; i < c.batch * width; i += THREADS)
    own[i] = static_cast<const T*>(p.x)[int64_t(i / width) * p.hidden + shares[DOWN].begin + i % width];

  const int units = c.batch * c.num_kv_heads * p.shares * p.splits;
  Attend<T, DIM, HEADS> attention(p, attention_memory);
  Unit unit(p, min(int(blockIdx.x), units - 1));
  attention.begin_unit(unit);
  const bool is_one = units <= gridDim.x;  // or none: its first keys and values are asked for a product early
#pragma unroll 1
  for (int product = 0; product < p.num_layers * PRODUCTS; ++product) {
    const StackLayer& layer = layers[product / PRODUCTS];
    const int kind = product % PRODUCTS;
    const bool has_norm = kind == QKV || kind == GATE_UP, is_last = product + 1 == p.num_layers * PRODUCTS;
    const uint32_t before = epoch;
    if (kind == QKV) ++epoch;
    if (kind == OUTPUT) {
      weights.settle();
#pragma unroll 1
      for (int number = blockIdx.x; number < units; number += gridDim.x) {
        if (!is_one) unit = Unit(p, number), attention.begin_unit(unit), attention.prepare(unit, layer);
        if (number != blockIdx.x) __syncthreads();
        attention.turn(unit, layer, epoch);
        attention.attend(unit, layer);
        attention.combine_all(unit, epoch);
      }
    }
    const Handed* from = kind == QKV      ? (product ? p.last : nullptr)
                         : kind == OUTPUT ? p.attended
                         : kind == DOWN   ? p.gated
                                          : p.middle;
    weights.settle(weights.owed / 2);
    gather<T, MOST>(p, from, kind == QKV ? before : epoch, shares[kind].pieces,
                    has_norm ? layer.norms[kind == GATE_UP] : nullptr, x, squares, [&] {
                      weights.settle();
                      if (kind == QKV && is_one && blockIdx.x < units) attention.prepare(unit, layer);
                    });
    const Result result = {layer.biases[kind], has_norm ? nullptr : own,
                           kind == QKV      ? p.qkv
                           : kind == OUTPUT ? p.middle
                           : kind == DOWN   ? p.last
                                            : p.gated,
                           is_last ? p.out : nullptr};
    multiply_share<T, MOST>(p, shares[kind], weights, x, epoch, result, sums);
  }
  // All blocks have started, and read it: without them this one would not be here.
  if (blockIdx.x == 0 && threadIdx.x == 0) *p.epoch = epoch;
}

// Bytes of shared memory behind the rings, as the kernel lays them out.
template <int DIM>
int behind_rings(const Stack& p) {
  const int own = (p.hidden / 2 / p.blocks + 1) * 2;
  return p.num_layers * int(sizeof(StackLayer)) / 16 * 16 + 16 + p.call.batch * apart_of(most_columns(p) / 8) * 16 +
         (ATTENTION_BYTES<DIM> + 15) / 16 * 16 + 2 * WARPS * p.call.batch * SUMS * 4 + (p.call.batch * own * 2 + 15) / 16 * 16;
}
template <int DIM>
int stages_of(const Stack& p, const Device& device) {
  return std::min((device.shared_bytes - 2048 - behind_rings<DIM>(p)) / (WARPS * STAGE * 16), MOST_STAGES);
}

template <typename T, int DIM, int HEADS>
cudaError_t launch(const Stack& p, const Device& device, cudaStream_t stream) {
  const auto kernel = p.call.batch == 1 ? stack_kernel<T, DIM, HEADS, 1> : stack_kernel<T, DIM, HEADS, MAX_STACK_ROWS>;
  const int stages = stages_of<DIM>(p, device);
  if (stages < 2) return cudaErrorInvalidConfiguration;
  Grid grid(dim3(p.blocks), THREADS, stages * WARPS * STAGE * 16 + behind_rings<DIM>(p), stream);
  grid.all_resident();
  if (const cudaError_t error = grid.allow_shared(kernel)) return error;
  return cudaLaunchKernelEx(&grid.config, kernel, p, stages);
}

template <typename T, int DIM>
cudaError_t launch_as(const Stack& p, const Device& device, cudaStream_t stream) {
  const int heads = (p.call.group + p.shares - 1) / p.shares;
  const auto chosen = heads == 1   ? launch<T, DIM, 1>
                      : heads == 2 ? launch<T, DIM, 2>
                      : heads == 3 ? launch<T, DIM, 3>
                                   : launch<T, DIM, STACK_HEADS>;
  return chosen(p, device, stream);
}

}  // namespace

bool serves(const Stack& p, const Device& device) {
  const Call& c = p.call;
  if (c.head_dim != 64 && c.head_dim != 128) return false;
  if (c.batch < 1 || c.batch > MAX_STACK_ROWS || p.blocks < 1) return false;
  if (p.hidden % KC || p.inner % KC || c.group * c.num_kv_heads * c.head_dim % KC) return false;  // whole chunks
  if (c.batch * most_columns(p) * 2 > MOST_X_BYTES) return false;
  return (c.head_dim == 128 ? stages_of<128> : stages_of<64>)(p, device) >= 2;
}

int64_t lay_out(Stack& p, int slots, void* memory, const Device& device) {
  const Call& c = p.call;
  const int heads = c.group * c.num_kv_heads * c.head_dim, width = heads + 2 * c.num_kv_heads * c.head_dim;
  p.blocks = std::min({device.multiprocessors, p.hidden / 2, p.inner / 2, width / 2});  // each has a part in all
  p.shares = (c.group + STACK_HEADS - 1) / STACK_HEADS;
  const int pairs = c.batch * c.num_kv_heads * p.shares;
  p.splits = std::max(1, std::min({p.blocks / std::max(pairs, 1), (slots + 31) / 32, MOST_SPLITS}));
  char* at = static_cast<char*>(memory);
  p.epoch = reinterpret_cast<uint32_t*>(at), at += 16;
  auto take = [&](int64_t count) {
    Handed* taken = reinterpret_cast<Handed*>(at);
    at += (count * int64_t(sizeof(Handed)) + 15) / 16 * 16;
    return taken;
  };
  p.qkv = take(c.batch * width / 2), p.attended = take(c.batch * heads / 2), p.gated = take(c.batch * p.inner / 2);
  p.middle = take(c.batch * p.hidden / 2), p.last = take(c.batch * p.hidden / 2);
  p.values = take(int64_t(pairs) * p.splits * STACK_HEADS * c.head_dim);
  p.softmax = take(int64_t(pairs) * p.splits * STACK_HEADS * 2);
  return at - static_cast<char*>(memory);
}

cudaError_t stack(const Stack& p, const Device& device, cudaStream_t stream) {
  const bool is_wide = p.call.head_dim == 128;
  if (p.call.is_bfloat16) return (is_wide ? launch_as<__nv_bfloat16, 128> : launch_as<__nv_bfloat16, 64>)(p, device, stream);
  return (is_wide ? launch_as<__half, 128> : launch_as<__half, 64>)(p, device, stream);
}

}  // namespace sinkattn::cuda
