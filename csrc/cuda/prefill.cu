// A chunk of new tokens per row, for Hopper (sm_90a), in two launches: gather keys and append, attend.
//
// Floor: 4 * head_dim FLOPs for each query head and visible pair of query and key, at the speed of the tensor cores.
// What it takes to get near it:
//
// * Keys come in the order of the text. The first launch turns those of the chunk and puts what the ring holds, and the
//   sinks, in order and without what is empty into scratch: after that a band is all there is, and no value is NaN.
//   Nothing else reads the ring, so whoever has copied what a slot held also writes what the chunk leaves there.
// * A block keeps a multiprocessor and takes tiles of 128 queries, one after the other. One warp asks the copy engine
//   for tiles of 128 keys and values, seven turn queries by both angles ahead of their use, and two warpgroups of 64
//   queries multiply: both products by wgmma, weights as registers.
// * While one product runs, the softmax of the one before is worked out, in the same warpgroup and in the other one:
//   they take turns in asking for products. The first scores of a tile are asked for before the tile before is put
//   away.
// * Only tiles that an edge of the band goes through take a mask. Sinks are 16 keys at a time, in products of that size.
#include "hopper.h"
#include "launch.h"
#include "prefill.h"

namespace sinkattn::cuda {
namespace {

constexpr int QUERIES = 128, KEYS = 128, SINKS = 16;  // of a tile
constexpr int STAGES = 2;
constexpr int HELPERS = 256, TURNERS = HELPERS - 32, CONSUMERS = 2, THREADS = HELPERS + 128 * CONSUMERS;
constexpr int MOVERS = 256;         // threads of a block that gathers
constexpr int HEADS = 4, TURNS = 8;  // heads of a slot, or of a token of the chunk, that each of them takes

// softcap * tanh(x / softcap) in base 2, from 2 x / softcap in base 2, as tanh(y) = 2 / (1 + exp(-2 y)) - 1.
__device__ float capped(float score, float softcap) {
  return softcap * LOG2E * (2 * __fdividef(1, 1 + exp2_fast(-score)) - 1);
}

__device__ void copy_in(char* shared, const CUtensorMap& map, int dim, int token, int head, int row,
                        uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %5}], "
      "[%6];" ::"r"(shared_address(shared)),
      "l"(&map), "r"(dim), "r"(token), "r"(head), "r"(row), "r"(shared_address(barrier))
      : "memory");
}
__device__ void copy_out(const CUtensorMap& map, int dim, int token, int head, int row, const char* shared) {
  asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group [%0, {%1, %2, %3, %4}], [%5];" ::"l"(&map),
               "r"(dim), "r"(token), "r"(head), "r"(row), "r"(shared_address(shared))
               : "memory");
}

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

// What lies in scratch, each (batch, num_kv_heads, tokens or rows, dim): the chunk's keys, turned, if there is a
// rotation; the window before the chunk, in the order of the text, up to its last token; the sinks. Of the last two,
// what is not there is zero.
__host__ __device__ int ring_rows(const Prefill& p) {
  return p.window_size < 2 ? KEYS : (p.window_size + KEYS - 2) / KEYS * KEYS;
}
__host__ __device__ int sink_rows(const Prefill& p) {
  return p.sink_size == 0 ? SINKS : (p.sink_size + SINKS - 1) / SINKS * SINKS;
}

template <typename T>
struct Scratch {
  T *turned, *ring_k, *ring_v, *sink_k, *sink_v, *end;
  __host__ __device__ explicit Scratch(const Prefill& p) {
    const int64_t heads = int64_t(p.batch) * p.num_kv_heads * p.head_dim;
    turned = static_cast<T*>(p.scratch);
    ring_k = turned + (p.rotation ? heads * p.tokens : 0), ring_v = ring_k + heads * ring_rows(p);
    sink_k = ring_v + heads * ring_rows(p), sink_v = sink_k + heads * sink_rows(p), end = sink_v + heads * sink_rows(p);
  }
};

__device__ int count_of(const Prefill& p, int64_t row) { return p.counts ? int(p.counts[row]) : p.tokens; }

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

// The key of a token of the chunk to scratch, or zeros to the output of one that is padding.
template <typename T, int DIM>
__device__ void gather_token(const Prefill& p, int token, int64_t row, int first_head, const Fours& at, int job) {
  const int heads = min(p.num_kv_heads - first_head, TURNS);
  if (token >= p.tokens) return;
  if (token < p.tokens - count_of(p, row)) {  // nobody else writes what padding gives
    const int per_token = p.num_kv_heads * p.group * DIM;
    T* out = static_cast<T*>(p.out) + (row * p.tokens + token) * per_token + first_head * p.group * DIM + job * 8;
    for (int head = 0; head < heads * p.group; ++head)
      *reinterpret_cast<uint4*>(out + head * DIM) = make_uint4(0, 0, 0, 0);
    return;
  }
  if (!p.rotation) return;
  Part<T, TURNS> k;
  k.load(p.k, row * p.k_row + token * p.k_token + first_head * p.k_head, p.k_head, heads, at);
  k.turned(p, row, token, at);
  k.store(Scratch<T>(p).turned, ((row * p.num_kv_heads + first_head) * p.tokens + token) * DIM, int64_t(p.tokens) * DIM,
          heads, at);
}

__host__ __device__ int ring_units(const Prefill& p) {
  const int rows = ring_rows(p);
  return p.ring_size > rows ? p.ring_size : rows;
}

// What is seen of a slot of the ring to scratch, and what the chunk leaves there to the slot: whoever has a slot copies
// it before it is written, and nobody else reads or writes it, in this launch or the next. Then the same for sinks.
template <typename T, int DIM>
__device__ void gather_slot(const Prefill& p, int unit, int64_t row, int first_head, const Fours& at) {
  const int heads = min(p.num_kv_heads - first_head, HEADS);
  const int padding = p.tokens - count_of(p, row);
  const int64_t length = p.lengths[row];
  const Scratch<T> to(p);
  // A token, a slot of the cache and a row of scratch, -1 for none; whether the slot holds what is seen.
  int token = -1, slot = -1, target = -1;
  bool holds;
  const bool is_ring = unit < ring_units(p);
  if (is_ring) {
    const int age = unit;  // 0 is the slot written last; rows of scratch may be older than slots get
    const int64_t written = max(length - p.sink_size, int64_t(0));
    const int seen = int(min(written, int64_t(p.window_size - 1)));
    holds = age < seen;
    if (age / KEYS * KEYS < seen) target = ring_rows(p) - 1 - age;  // else in a tile that nobody takes
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
    const int rows = is_ring ? ring_rows(p) : sink_rows(p);
    const int64_t begin = ((row * p.num_kv_heads + first_head) * rows + target) * DIM, head = int64_t(rows) * DIM;
    k.store(is_ring ? to.ring_k : to.sink_k, begin, head, heads, at);
    v.store(is_ring ? to.ring_v : to.sink_v, begin, head, heads, at);
  };
  auto k_slot = [&] { return row * p.k_cache_row + slot * p.k_cache_slot + first_head * p.k_cache_head; };
  auto v_slot = [&] { return row * p.v_cache_row + slot * p.v_cache_slot + first_head * p.v_cache_head; };
  const bool is_new = token >= 0 && !is_ring;  // whether scratch gets the token, and not what the slot holds, or zeros
  if (target >= 0 && !is_new) {
    k = v = {};
    if (holds) {
      k.load(p.k_cache, k_slot(), p.k_cache_head, heads, at);
      v.load(p.v_cache, v_slot(), p.v_cache_head, heads, at);
    }
    to_scratch();
  }
  if (token < 0) return;
  k.load(p.k, row * p.k_row + token * p.k_token + first_head * p.k_head, p.k_head, heads, at);
  v.load(p.v, row * p.v_row + token * p.v_token + first_head * p.v_head, p.v_head, heads, at);
  k.turned(p, row, token, at);
  if (is_new) to_scratch();
  k.store(p.k_cache, k_slot(), p.k_cache_head, heads, at);
  v.store(p.v_cache, v_slot(), p.v_cache_head, heads, at);
}

// Blocks for slots come first, as they have most to wait for: `slot_blocks` for each HEADS of the TURNS heads.
template <typename T, int DIM>
__global__ void __launch_bounds__(MOVERS, 4) gather_kernel(const __grid_constant__ Prefill p, int slot_blocks) {
  let_next_launch();
  constexpr int JOBS = DIM / 8, UNITS = MOVERS / JOBS;
  const int block = blockIdx.x, unit = threadIdx.x / JOBS, job = threadIdx.x % JOBS;
  const int first_head = blockIdx.z * TURNS, slots = slot_blocks * (TURNS / HEADS);
  const Fours at = fours_of(p, job);
  if (block >= slots) {
    gather_token<T, DIM>(p, (block - slots) * UNITS + unit, blockIdx.y, first_head, at, job);
  } else {
    const int head = first_head + block / slot_blocks * HEADS;
    if (head < p.num_kv_heads) gather_slot<T, DIM>(p, block % slot_blocks * UNITS + unit, blockIdx.y, head, at);
  }
}

// A tile of queries, and the tiles of keys that it sees. Queries and keys are counted from the row's first token in
// this chunk: 0, 1, ...; what the cache holds goes back -1, -2, ...
struct Tile {
  int number, total;
  int row, head, padding;
  int first;   // query
  int held;    // sinks in the cache
  int oldest;  // key, no sink, that the row has
  int begin, end;
  __device__ explicit Tile(const Prefill& p) : number(blockIdx.x) {
    total = (p.tokens + QUERIES - 1) / QUERIES * p.batch * p.num_kv_heads * p.group;
    find(p);
  }
  __device__ bool exists() const { return number < total; }
  __device__ void advance(const Prefill& p) { number += gridDim.x, find(p); }

 private:
  __device__ void find(const Prefill& p) {  // from here on; the longest come first
    const int heads = p.num_kv_heads * p.group;
    for (; number < total; number += gridDim.x) {
      const int pair = number % (p.batch * heads);
      first = (total - 1 - number) / (p.batch * heads) * QUERIES;
      head = pair % heads, row = pair / heads;
      const int count = count_of(p, row);
      if (first >= count) continue;
      const int64_t length = p.lengths[row], written = length - p.sink_size;
      padding = p.tokens - count;
      held = int(min(length, int64_t(p.sink_size)));
      oldest = written < 0 ? int(-written) : -int(min(written, int64_t(p.window_size - 1)));
      const int low = max(oldest, first - p.reach + 1), high = min(first + QUERIES, count);
      begin = min(low, high - 1) >> 7, end = ((high - 1) >> 7) + 1;
      return;
    }
  }
};

struct Maps {
  CUtensorMap keys, values, ring_keys, ring_values, sink_keys, sink_values, out;
};

// Where one is in a row of buffers that is gone through again and again.
struct Turnstile {
  int stage = 0, phase = 0;
  __device__ void advance(int stages) {
    if (++stage == stages) stage = 0, phase ^= 1;
  }
};

struct Barriers {
  uint64_t queries_in[2], queries_out[2], sink_queries_in, sink_queries_out;
  uint64_t keys_in[STAGES], keys_out[STAGES], values_in[STAGES], values_out[STAGES];
};

template <int DIM>
struct Shape {
  // In bytes: a column of 64 dims and 128 rows, and all columns. Those of 16 sinks.
  static constexpr int COLUMNS = DIM / 64, COLUMN = 128 * 128, TILE = COLUMNS * COLUMN, SINK_COLUMN = SINKS * 128;
  static constexpr int SHARED = TILE * (3 + 2 * STAGES) + int(sizeof(Barriers));
};

// The queries of a tile, turned by both angles: the share of one of so many threads.
template <typename T, int DIM>
__device__ void turn_queries(const Prefill& p, const Tile& tile, int thread, int threads, char* to,
                             char* sink_queries) {
  constexpr int JOBS = DIM / 8, AT_ONCE = 1;  // jobs whose loads are in flight
  const int start = tile.padding + tile.first;
  const T* q = static_cast<const T*>(p.q) + tile.row * p.q_row + tile.head * p.q_head + start * p.q_token;
  const float* angles = p.rotation + (int64_t(tile.row) * p.tokens + start) * 4 * p.rotary_half;
#pragma unroll 1
  for (int begin = thread; begin < QUERIES * JOBS; begin += threads * AT_ONCE) {
    uint2 first[AT_ONCE], second[AT_ONCE];
    float4 cos[AT_ONCE][2], sin[AT_ONCE][2];
#pragma unroll
    for (int i = 0; i < AT_ONCE; ++i) {
      const int query = (begin + i * threads) / JOBS;
      const Fours fours = fours_of(p, (begin + i * threads) % JOBS);
      const bool inside = query < QUERIES && start + query < p.tokens;
      const uint2* x = reinterpret_cast<const uint2*>(q + query * p.q_token);
      first[i] = inside ? __ldg(x + fours.first) : make_uint2(0, 0);
      second[i] = inside ? __ldg(x + fours.second) : make_uint2(0, 0);
      const bool turns = inside && p.rotation && fours.angle >= 0;
      const float* angle = angles + query * 4 * p.rotary_half + fours.angle;
#pragma unroll
      for (int which = 0; which < 2; ++which) {
        const float4* from = reinterpret_cast<const float4*>(angle + which * 2 * p.rotary_half);
        cos[i][which] = turns ? __ldg(from) : make_float4(1, 1, 1, 1);
        sin[i][which] = turns ? __ldg(from + p.rotary_half / 4) : make_float4(0, 0, 0, 0);
      }
    }
#pragma unroll
    for (int i = 0; i < AT_ONCE; ++i) {
      const int query = (begin + i * threads) / JOBS;
      const Fours fours = fours_of(p, (begin + i * threads) % JOBS);
      if (query >= QUERIES) break;
      auto place = [&](int four) {
        return four / 16 * Shape<DIM>::COLUMN + query * 128 + (four / 2 % 8 ^ query % 8) * 16 + four % 2 * 8;
      };
      const int first_place = place(fours.first), second_place = place(fours.second);
#pragma unroll
      for (int which = 0; which < 2; ++which) {
        uint2 x = first[i], y = second[i];
        turn<T>(x, y, cos[i][which], sin[i][which], p.interleaved);
        char* there = which == 0 ? to : sink_queries;
        *reinterpret_cast<uint2*>(there + first_place) = x;
        *reinterpret_cast<uint2*>(there + second_place) = y;
      }
    }
  }
}

template <typename T, int DIM, bool CAPPED>
__global__ void __launch_bounds__(THREADS, 1)
    attend_kernel(const __grid_constant__ Prefill p, const __grid_constant__ Maps maps) {
  using S = Shape<DIM>;
  extern __shared__ __align__(1024) char shared[];
  char *queries = shared, *sink_queries = queries + 2 * S::TILE, *keys = sink_queries + S::TILE;
  char* values = keys + STAGES * S::TILE;
  Barriers& at = *reinterpret_cast<Barriers*>(values + STAGES * S::TILE);
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    for (int i = 0; i < 2; ++i) open_barrier(&at.queries_in[i], TURNERS), open_barrier(&at.queries_out[i], CONSUMERS);
    open_barrier(&at.sink_queries_in, TURNERS), open_barrier(&at.sink_queries_out, CONSUMERS * 4);
    for (int i = 0; i < STAGES; ++i) {
      open_barrier(&at.keys_in[i], 1), open_barrier(&at.keys_out[i], CONSUMERS * 4);
      open_barrier(&at.values_in[i], 1), open_barrier(&at.values_out[i], CONSUMERS * 4);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();

  // The queries of the first tile are turned by all.
  if (warp > 0) {
    if (const Tile tile(p); tile.exists())
      turn_queries<T, DIM>(p, tile, threadIdx.x - 32, THREADS - 32, queries, sink_queries);
    publish();
    meet(5, THREADS - 32);
  }
  if (warp < HELPERS / 32) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 48;");
    if (warp == 0) {
      if (lane > 0) return;
      wait_for_launch();
      // Keys are needed a step before values.
      Turnstile key_at, value_at;
      constexpr int OF_SINKS = 1 << 30;
      int row = 0, head = 0, padding = 0, before = 0;  // what the values that are still to be asked for belong to
      bool is_open = false;
      auto ask = [&](const CUtensorMap& map, const CUtensorMap& ring, const CUtensorMap& sinks, int n, int padding,
                     int head, int row, char* tile, uint64_t* barrier) {
        if (n == OF_SINKS) {
          const int blocks = sink_rows(p) / SINKS;
          expect_bytes(barrier, blocks * S::COLUMNS * S::SINK_COLUMN);
          for (int i = 0; i < blocks * S::COLUMNS; ++i)
            copy_in(tile + i * S::SINK_COLUMN, sinks, i % S::COLUMNS * 64, i / S::COLUMNS * SINKS, head, row, barrier);
          return;
        }
        expect_bytes(barrier, S::TILE);
#pragma unroll
        for (int i = 0; i < S::COLUMNS; ++i) {
          if (n < 0)
            copy_in(tile + i * S::COLUMN, ring, i * 64, ring_rows(p) + n * KEYS, head, row, barrier);
          else
            copy_in(tile + i * S::COLUMN, map, i * 64, padding + n * KEYS, head, row, barrier);
        }
      };
      auto ask_values = [&] {
        wait(&at.values_out[value_at.stage], value_at.phase ^ 1);
        ask(maps.values, maps.ring_values, maps.sink_values, before, padding, head, row,
            values + value_at.stage * S::TILE, &at.values_in[value_at.stage]);
        value_at.advance(STAGES);
      };
      for (Tile tile(p); tile.exists(); tile.advance(p)) {
        for (int n = tile.end; n >= tile.begin; --n) {
          wait(&at.keys_out[key_at.stage], key_at.phase ^ 1);
          const int item = n == tile.end ? OF_SINKS : n;
          ask(maps.keys, maps.ring_keys, maps.sink_keys, item, tile.padding, tile.head / p.group, tile.row,
              keys + key_at.stage * S::TILE, &at.keys_in[key_at.stage]);
          key_at.advance(STAGES);
          if (is_open) ask_values();
          row = tile.row, head = tile.head / p.group, padding = tile.padding, before = item, is_open = true;
        }
      }
      if (is_open) ask_values();
      key_at.advance(STAGES);  // past what would be sinks
      wait(&at.keys_out[key_at.stage], key_at.phase ^ 1);
      arrive(&at.keys_in[key_at.stage]);
    } else {
      Turnstile query_at, sink_query_at;
      Tile tile(p);
      for (bool turned = true;; turned = false) {
        if (!turned) {
          wait(&at.queries_out[query_at.stage], query_at.phase ^ 1);
          wait(&at.sink_queries_out, sink_query_at.phase ^ 1);
          if (tile.exists())
            turn_queries<T, DIM>(p, tile, threadIdx.x - 32, TURNERS, queries + query_at.stage * S::TILE, sink_queries);
          publish();
        }
        arrive(&at.queries_in[query_at.stage]);
        arrive(&at.sink_queries_in);
        if (!tile.exists()) break;
        query_at.advance(2), sink_query_at.advance(1), tile.advance(p);
      }
    }
    return;
  }

  asm volatile("setmaxnreg.inc.sync.aligned.u32 208;");
  const int group = (warp - HELPERS / 32) / 4, g = lane / 4, c = lane % 4;
  const bool is_leader = threadIdx.x % 128 == 0;
  const int upper = group * 64;  // first query of the warpgroup in the tile
  // Barriers of threads: 1 and 2 for a warpgroup's turn to multiply, 3 and 4 for a warpgroup alone.
  const int turn_of_ours = 1 + group, turn_of_others = 2 - group, ours = 3 + group;
  if (group == 1) pass(turn_of_others, 256);
  Turnstile query_at, sink_query_at, key_at, value_at;
  Tile tile(p);
  if (!tile.exists()) return;
  float top[2], total[2], fade[2];
  float few[SINKS / 2], score[KEYS / 2], sum[DIM / 2];
  uint32_t few_weights[SINKS / 4], weight[KEYS / 4];
  const float scale = CAPPED ? 1 : p.query_scale;

  auto query = [&] { return tile.first + upper + warp % 4 * 16; };  // first of the warp

  // Scores of the rows g and g + 8 of the warp to weights; `fade` is what everything before is worth now.
  auto soften = [&](auto& x) {
    constexpr int N = sizeof(x) / sizeof(float);
    if (CAPPED) {
#pragma unroll
      for (int i = 0; i < N; ++i) x[i] = x[i] == -INFINITY ? x[i] : capped(x[i] * p.query_scale, p.softcap);
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float high = x[2 * r];
#pragma unroll
      for (int i = 0; i < N; i += 4) high = fmaxf(high, fmaxf(x[i + 2 * r], x[i + 2 * r + 1]));
      high = fmaxf(high, __shfl_xor_sync(~0u, high, 1));
      high = fmaxf(high, __shfl_xor_sync(~0u, high, 2));
      high = fmaxf(top[r], high * scale);
      fade[r] = exp2_fast(top[r] - high);
      top[r] = high;
      float more = 0;
#pragma unroll
      for (int i = 0; i < N; i += 4) {
        x[i + 2 * r] = exp2_fast(fmaf(x[i + 2 * r], scale, -high));
        x[i + 2 * r + 1] = exp2_fast(fmaf(x[i + 2 * r + 1], scale, -high));
        more += x[i + 2 * r] + x[i + 2 * r + 1];
      }
      total[r] = total[r] * fade[r] + more;
    }
  };
  auto fade_sum = [&] {
#pragma unroll
    for (int i = 0; i < DIM / 2; i += 4)
      sum[i] *= fade[0], sum[i + 1] *= fade[0], sum[i + 2] *= fade[1], sum[i + 3] *= fade[1];
  };
  auto release = [&](uint64_t* barrier) {
    if (lane == 0) arrive(barrier);
  };

  // 16 sinks from number `first` on.
  auto ask_few_scores = [&](int first) {
    const char* from = keys + key_at.stage * S::TILE + first / SINKS * S::COLUMNS * S::SINK_COLUMN;
    hold(few);
    open_products();
#pragma unroll
    for (int k = 0; k < DIM / 16; ++k)
      multiply<T>(few, describe(sink_queries + upper * 128 + k / 4 * S::COLUMN + k % 4 * 32, 16),
                  describe(from + k / 4 * S::SINK_COLUMN + k % 4 * 32, 16), k > 0);
    commit_products();
  };
  auto soften_few = [&](int first) {
#pragma unroll
    for (int i = 0; i < SINKS / 2; ++i) {
      const int slot = first + i / 4 * 8 + c * 2 + i % 2, row = query() + g + i % 4 / 2 * 8;
      if (slot >= p.sink_size || slot - tile.held > row) few[i] = -INFINITY;
    }
    soften(few);
    fade_sum();
#pragma unroll
    for (int i = 0; i < SINKS / 4; ++i) few_weights[i] = pack<T>(few[2 * i], few[2 * i + 1]);
  };
  auto ask_few_sum = [&](int first) {
    hold(sum), hold(few_weights);
    open_products();
    const char* from = values + value_at.stage * S::TILE + first / SINKS * S::COLUMNS * S::SINK_COLUMN;
    multiply<T>(sum, few_weights, describe(from, S::SINK_COLUMN));
    commit_products();
  };
  auto ask_scores = [&](int stage) {
    const uint64_t our_queries = describe(queries + query_at.stage * S::TILE + upper * 128, 16);
    const uint64_t tile_of_keys = describe(keys + stage * S::TILE, 16);
    hold(score);
    open_products();
#pragma unroll
    for (int k = 0; k < DIM / 16; ++k)
      multiply<T>(score, further(our_queries, k / 4 * S::COLUMN + k % 4 * 32),
                  further(tile_of_keys, k / 4 * S::COLUMN + k % 4 * 32), k > 0);
    commit_products();
  };
  auto ask_sum = [&] {
    const uint64_t tile_of_values = describe(values + value_at.stage * S::TILE, S::COLUMN);
    hold(sum), hold(weight);
    open_products();
#pragma unroll
    for (int k = 0; k < KEYS / 16; ++k) multiply<T>(sum, weight + 4 * k, further(tile_of_values, k * 16 * 128));
    commit_products();
  };
  auto mask = [&](int n) {
    const int key = n * KEYS;
    if (key + KEYS - 1 <= query() && key > query() + 15 - p.reach && key >= tile.oldest) return;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = query() + g + 8 * r, low = max(row - p.reach + 1, tile.oldest);
      const unsigned seen = max(row - low + 1, 0);
      const int before = low - key - 2 * c;
#pragma unroll
      for (int i = 0; i < KEYS / 2; i += 4)
#pragma unroll
        for (int e = 0; e < 2; ++e)
          if (unsigned(i * 2 + e - before) >= seen) score[i + 2 * r + e] = -INFINITY;
    }
  };
  auto pack_weights = [&] {
#pragma unroll
    for (int i = 0; i < KEYS / 4; ++i) weight[i] = pack<T>(score[2 * i], score[2 * i + 1]);
  };

  // What a tile begins with: scores of the last keys, which come second.
  auto open_tile = [&] {
    wait(&at.queries_in[query_at.stage], query_at.phase);
    Turnstile second = key_at;
    second.advance(STAGES);
    wait(&at.keys_in[second.stage], second.phase);
    ask_scores(second.stage);
  };

  open_tile();
  for (bool is_first = true;; is_first = false) {
    top[0] = top[1] = LOWEST, total[0] = total[1] = 0;
    if (p.learned_logits) {
      top[0] = top[1] = p.learned_logits[tile.head] * LOG2E;
      if (c == 0) total[0] = total[1] = 1;  // threads of a row add up in the end
    }
#pragma unroll
    for (int i = 0; i < DIM / 2; ++i) sum[i] = 0;

    wait(&at.sink_queries_in, sink_query_at.phase);
    wait(&at.keys_in[key_at.stage], key_at.phase);
    ask_few_scores(0);
    wait_for_products<0>();
    hold(few), hold(score);
    release(&at.keys_out[key_at.stage ^ 1]);
    wait(&at.values_in[value_at.stage], value_at.phase);
    for (int first = 0;;) {
      const bool is_last = first + SINKS >= p.sink_size;
      if (is_last) release(&at.keys_out[key_at.stage]), release(&at.sink_queries_out);
      soften_few(first);
      ask_few_sum(first);
      if (is_last) break;
      first += SINKS;
      wait_for_products<0>();
      hold(sum), hold(few_weights);
      ask_few_scores(first);
      wait_for_products<0>();
      hold(few);
    }
    key_at.advance(STAGES), key_at.advance(STAGES), sink_query_at.advance(1);
    if (is_leader && !is_first) {  // what the tile before gave has been read
      asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
      arrive(&at.queries_out[query_at.stage ^ 1]);
    }
    mask(tile.end - 1);
    soften(score);
    wait_for_products<0>();
    hold(sum), hold(few_weights);
    release(&at.values_out[value_at.stage]);
    value_at.advance(STAGES);
    fade_sum();
    pack_weights();
#pragma unroll 1
    for (int n = tile.end - 2; n >= tile.begin; --n) {
      wait(&at.keys_in[key_at.stage], key_at.phase);
      meet(turn_of_ours, 256);
      ask_scores(key_at.stage);
      wait(&at.values_in[value_at.stage], value_at.phase);
      ask_sum();
      pass(turn_of_others, 256);
      wait_for_products<1>();
      hold(score);
      release(&at.keys_out[key_at.stage]);
      key_at.advance(STAGES);
      mask(n);
      soften(score);
      wait_for_products<0>();
      hold(sum), hold(weight);
      release(&at.values_out[value_at.stage]);
      value_at.advance(STAGES);
      fade_sum();
      pack_weights();
    }
    wait(&at.values_in[value_at.stage], value_at.phase);
    ask_sum();

    // The next tile is begun before this one is put away. After the last one it is not there, and nothing comes of it:
    // the compiler does not follow products that go on in one branch only.
    char* place = queries + query_at.stage * S::TILE + upper * 128;
    const int token = tile.padding + tile.first + upper, head = tile.head, row = tile.row;
    uint64_t* values_out = &at.values_out[value_at.stage];
    value_at.advance(STAGES), query_at.advance(2);
    tile.advance(p);
    open_tile();
    wait_for_products<1>();
    hold(sum), hold(weight);
    release(values_out);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      total[r] += __shfl_xor_sync(~0u, total[r], 1);
      total[r] += __shfl_xor_sync(~0u, total[r], 2);
      total[r] = __fdividef(1, total[r]);
    }
    // Out, by way of where the queries were.
    meet(ours, 128);
#pragma unroll
    for (int i = 0; i < DIM / 2; i += 2) {
      const int piece = i / 4, r = i % 4 / 2, at_row = warp % 4 * 16 + g + 8 * r;
      *reinterpret_cast<uint32_t*>(place + piece / 8 * S::COLUMN + at_row * 128 + (piece % 8 ^ g) * 16 + c * 4) =
          pack<T>(sum[i] * total[r], sum[i + 1] * total[r]);
    }
    publish();
    meet(ours, 128);
    if (is_leader) {
#pragma unroll
      for (int i = 0; i < S::COLUMNS; ++i) copy_out(maps.out, i * 64, token, head, row, place + i * S::COLUMN);
      asm volatile("cp.async.bulk.commit_group;" ::: "memory");
    }
    if (!tile.exists()) break;
  }
  wait_for_products<0>();
  if (is_leader) asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}

// How the copy engine reads, or writes, (batch, heads, tokens or rows, dim): columns of 64 dims and `box_rows` rows.
template <typename T>
bool map_of(CUtensorMap& map, const Prefill& p, const void* x, int heads, int rows, int64_t row, int64_t head,
            int64_t token, int box_rows) {
  const auto encode = map_encoder();
  const cuuint64_t sizes[4] = {cuuint64_t(p.head_dim), cuuint64_t(rows), cuuint64_t(heads), cuuint64_t(p.batch)};
  // Strides of dims of size 1 may be anything.
  const cuuint64_t strides[3] = {cuuint64_t(rows > 1 ? token : 8) * 2, cuuint64_t(heads > 1 ? head : 8) * 2,
                                 cuuint64_t(p.batch > 1 ? row : 8) * 2};
  const cuuint32_t box[4] = {64, cuuint32_t(box_rows), 1, 1}, steps[4] = {1, 1, 1, 1};
  return encode &&
         !encode(&map, MAP_TYPE<T>, 4, const_cast<void*>(x), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                 CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
}

template <typename T, int DIM, bool CAPPED>
cudaError_t launch(const Prefill& p, int multiprocessors, cudaStream_t stream) {
  const Scratch<T> scratch(p);
  const int kv_heads = p.num_kv_heads, heads = kv_heads * p.group;
  cudaLaunchAttribute overlap = {};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  auto configured = [&](dim3 grid, int threads, int bytes, bool overlaps) {
    cudaLaunchConfig_t config = {};
    config.gridDim = grid, config.blockDim = dim3(threads), config.dynamicSmemBytes = bytes, config.stream = stream;
    config.attrs = &overlap, config.numAttrs = overlaps ? 1 : 0;
    return config;
  };

  // What the copy engine needs is written down while the first kernel runs.
  constexpr int UNITS = MOVERS / (DIM / 8);
  const int slot_blocks = (ring_units(p) + sink_rows(p) + UNITS - 1) / UNITS;
  const int token_blocks = p.rotation || p.counts ? (p.tokens + UNITS - 1) / UNITS : 0;
  const dim3 grid(slot_blocks * (TURNS / HEADS) + token_blocks, p.batch, (kv_heads + TURNS - 1) / TURNS);
  const auto gather = configured(grid, MOVERS, 0, false);
  cudaError_t error = cudaLaunchKernelEx(&gather, gather_kernel<T, DIM>, p, slot_blocks);
  if (error != cudaSuccess) return error;

  Maps maps;
  auto packed = [&](CUtensorMap& map, const void* x, int rows, int box_rows) {
    const int64_t head = int64_t(rows) * DIM;
    return map_of<T>(map, p, x, kv_heads, rows, kv_heads * head, head, DIM, box_rows);
  };
  bool mapped =
      packed(maps.ring_keys, scratch.ring_k, ring_rows(p), KEYS) &&
      packed(maps.ring_values, scratch.ring_v, ring_rows(p), KEYS) &&
      packed(maps.sink_keys, scratch.sink_k, sink_rows(p), SINKS) &&
      packed(maps.sink_values, scratch.sink_v, sink_rows(p), SINKS) &&
      map_of<T>(maps.values, p, p.v, kv_heads, p.tokens, p.v_row, p.v_head, p.v_token, KEYS) &&
      map_of<T>(maps.out, p, p.out, heads, p.tokens, int64_t(p.tokens) * heads * DIM, DIM, int64_t(heads) * DIM, 64);
  mapped =
      mapped && (p.rotation ? packed(maps.keys, scratch.turned, p.tokens, KEYS)
                            : map_of<T>(maps.keys, p, p.k, kv_heads, p.tokens, p.k_row, p.k_head, p.k_token, KEYS));
  if (!mapped) return cudaErrorInvalidValue;

  const auto kernel = attend_kernel<T, DIM, CAPPED>;
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Shape<DIM>::SHARED);
  if (error != cudaSuccess) return error;
  const int64_t tiles = int64_t(p.tokens + QUERIES - 1) / QUERIES * p.batch * heads;
  const auto attend =
      configured(dim3(tiles < multiprocessors ? tiles : multiprocessors), THREADS, Shape<DIM>::SHARED, true);
  return cudaLaunchKernelEx(&attend, kernel, p, maps);
}

template <typename T>
cudaError_t launch_as(const Prefill& p, int multiprocessors, cudaStream_t stream) {
  const auto chosen = p.head_dim == 64 ? (p.softcap > 0 ? launch<T, 64, true> : launch<T, 64, false>)
                                       : (p.softcap > 0 ? launch<T, 128, true> : launch<T, 128, false>);
  return chosen(p, multiprocessors, stream);
}

}  // namespace

bool serves(const Prefill& p) {
  const int64_t tiles = int64_t(p.tokens + QUERIES - 1) / QUERIES * p.batch * p.num_kv_heads * p.group;
  return (p.head_dim == 64 || p.head_dim == 128) && p.sink_size <= MAX_SINKS && p.batch <= 65535 && tiles < (1 << 30);
}

int64_t scratch_elements(const Prefill& p) {
  Prefill from_zero = p;
  from_zero.scratch = nullptr;
  const Scratch<char> scratch(from_zero);
  return reinterpret_cast<intptr_t>(scratch.end);
}

cudaError_t prefill(const Prefill& p, int multiprocessors, cudaStream_t stream) {
  return (p.is_bfloat16 ? launch_as<__nv_bfloat16> : launch_as<__half>)(p, multiprocessors, stream);
}

}  // namespace sinkattn::cuda
