// The tiles of prefill: which there are, where they lie in shared memory, how they come and go. No torch in here.
#pragma once

#include "hopper.h"
#include "scratch.h"

namespace sinkattn::cuda {
namespace {

constexpr int QUERIES = 128;  // of a tile
constexpr int STAGES = 2, CONSUMERS = 2;
constexpr int64_t TOGETHER = 24 << 20;  // bytes of keys and values

struct Barriers {
  uint64_t queries_in[2], queries_out[2], sink_queries_in, sink_queries_out;
  uint64_t keys_in[STAGES], keys_out[STAGES], values_in[STAGES], values_out[STAGES];
  int differing[2];  // the last of the block's tiles, counted from 1, whose angles of text and sinks differ, by query tile
};

template <int DIM>  // a multiple of 16; a head may have less
struct Shape {
  static constexpr int KEYS = keys_of(DIM);  // of a tile
  // Whether warps of their own turn the queries of the tile that comes next, for which there is room.
  static constexpr bool AHEAD = DIM <= 192;
  static constexpr int QUERY_TILES = AHEAD ? 2 : 1;
  static constexpr int HELPERS = AHEAD ? 256 : 128, TURNERS = HELPERS - 32, THREADS = HELPERS + 128 * CONSUMERS;
  static constexpr int FEW_REGISTERS = AHEAD ? 56 : 24, MANY_REGISTERS = AHEAD ? 200 : 240;  // of helpers, of consumers
  static constexpr int REGISTERS = (1 << 16) / THREADS / 8 * 8;  // of a thread when the block starts
  // In bytes: a column of 64 dims, and all columns, of a tile of queries and of keys; a column of 16 sinks.
  static constexpr int COLUMNS = (DIM + 63) / 64, QUERY_COLUMN = QUERIES * 128, QUERY_TILE = COLUMNS * QUERY_COLUMN;
  static constexpr int COLUMN = KEYS * 128, TILE = COLUMNS * COLUMN, SINK_COLUMN = SINKS * 128;
  static constexpr int SHARED = (QUERY_TILES + 1) * QUERY_TILE + 2 * STAGES * TILE + int(sizeof(Barriers));
  static_assert(DIM % 16 == 0 && KEYS % 16 == 0 && SHARED <= 227 * 1024);
  // What the consumers ask for is what the helpers leave; they would wait forever for more.
  static_assert(HELPERS * FEW_REGISTERS + 128 * CONSUMERS * MANY_REGISTERS <= THREADS * REGISTERS);
};

// A tile's queries are those of some tokens and so many heads of one key head, for all of which an angle is read at
// once: 16 tokens of the first head, the same of the next, ..., then the next 16 tokens. A warp has 16 of one head.
__host__ __device__ int heads_of_tile(const Prefill& p) { return p.group % 4 == 0 ? 4 : p.group % 2 == 0 ? 2 : 1; }
__host__ __device__ int tokens_of_tile(const Prefill& p) { return QUERIES / heads_of_tile(p); }
__host__ __device__ int tiles_of_heads(const Prefill& p) { return (p.tokens + tokens_of_tile(p) - 1) / tokens_of_tile(p); }
__host__ __device__ int64_t heads_of_all(const Prefill& p) {  // so many at a time, of all rows
  return int64_t(p.batch) * p.num_kv_heads * (p.group / heads_of_tile(p));
}
__host__ __device__ int64_t tiles_of(const Prefill& p) { return heads_of_all(p) * tiles_of_heads(p); }
// How many of these have tiles next to each other: as many as the L2 keeps the keys and values for, as far as they are
// seen.
__host__ __device__ int heads_together(const Prefill& p) {
  const int64_t bytes = int64_t(min(p.tokens, p.reach)) * p.head_dim * 4, heads = p.group / heads_of_tile(p);
  return int(min(heads_of_all(p), max(TOGETHER / bytes, int64_t(1)) * heads));
}

// A tile of queries, and the tiles of keys that it sees. Tokens and keys are counted from the row's first token in
// this chunk: 0, 1, ...; what the cache holds goes back -1, -2, ... Tiles go down from the last: of heads that come
// together, those of the last tokens first, which are the longest.
template <int KEYS>
struct Tile {
  int number, together;
  int row, head, padding;  // its first head
  int first;   // its first token
  int held;    // sinks in the cache
  int from;    // where the sinks see query 0
  int oldest;  // key, no sink, that the row has
  int reach;   // keys that a query sees
  int begin, end;
  bool is_first;  // whether the text begins in the chunk, and its queries see all of it
  __device__ explicit Tile(const Prefill& p)
      : number(int(tiles_of(p)) - 1 - int(blockIdx.x)), together(heads_together(p)) {
    find(p);
  }
  __device__ bool exists() const { return number >= 0; }
  __device__ void advance(const Prefill& p) { number -= gridDim.x, find(p); }

 private:
  __device__ void find(const Prefill& p) {  // from here on
    const int tokens = tokens_of_tile(p), parts = p.num_kv_heads * p.group / heads_of_tile(p), tiles = tiles_of_heads(p);
    for (; number >= 0; number -= gridDim.x) {
      const int begin_together = number / (together * tiles) * together, rest = number - begin_together * tiles;
      const int count_together = min(together, p.batch * parts - begin_together);
      const int pair = begin_together + rest % count_together;
      first = rest / count_together * tokens;
      head = pair % parts * heads_of_tile(p), row = pair / parts;
      const int count = count_of(p, row);
      if (first >= count) continue;
      const int64_t length = p.lengths[row], written = length - p.sink_size;
      padding = p.tokens - count;
      held = int(min(length, int64_t(p.sink_size)));
      from = int(min(length, int64_t(p.sink_size + p.window_size - 1)));
      oldest = written < 0 ? int(-written) : -int(min(written, int64_t(p.window_size - 1)));
      const int low = max(oldest, first - p.reach + 1), high = min(first + tokens, count);
      reach = p.reach;
      is_first = length == 0 && p.sink_size < KEYS && high <= p.sink_size + p.reach;
      const int key = min(low, high - 1);
      begin = (key < 0 ? key - KEYS + 1 : key) / KEYS, end = (high - 1) / KEYS + 1;
      return;
    }
  }
};

struct Maps {
  CUtensorMap keys, values, ring_keys, ring_values, sink_keys, sink_values;
};

// Where one is in a row of buffers that is gone through again and again.
struct Turnstile {
  int stage = 0, phase = 0;
  __device__ void advance(int stages) {
    if (++stage == stages) stage = 0, phase ^= 1;
  }
};

}  // namespace
}  // namespace sinkattn::cuda
