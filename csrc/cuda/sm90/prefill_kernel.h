// The second launch of prefill, `attend`: the order in which its phases come. No torch in here.
#pragma once

#include "../launch.h"
#include "prefill_attend.h"
#include "prefill_turn.h"

namespace sinkattn::cuda {
namespace {

// ADJUSTED: whether there may be a softcap or ALiBi's slopes.
template <typename T, int DIM, bool ADJUSTED>
__global__ void __launch_bounds__(Shape<DIM>::THREADS, 1)
    attend_kernel(const __grid_constant__ Prefill p, const __grid_constant__ Maps maps) {
  using S = Shape<DIM>;
  extern __shared__ __align__(1024) char shared[];
  char *queries = shared, *sink_queries = queries + S::QUERY_TILES * S::QUERY_TILE;
  char* keys = sink_queries + S::QUERY_TILE;
  char* values = keys + STAGES * S::TILE;
  Barriers& at = *reinterpret_cast<Barriers*>(values + STAGES * S::TILE);
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    for (int i = 0; i < S::QUERY_TILES; ++i)
      open_barrier(&at.queries_in[i], S::TURNERS), open_barrier(&at.queries_out[i], CONSUMERS * 4);
    open_barrier(&at.sink_queries_in, S::TURNERS), open_barrier(&at.sink_queries_out, CONSUMERS * 4);
    for (int i = 0; i < STAGES; ++i) {
      open_barrier(&at.keys_in[i], 1), open_barrier(&at.keys_out[i], CONSUMERS * 4);
      open_barrier(&at.values_in[i], 1), open_barrier(&at.values_out[i], CONSUMERS * 4);
    }
    at.differing[0] = at.differing[1] = 0;
    publish_barriers();
  }
  __syncthreads();

  // The queries of the first tile are turned by all.
  if (S::AHEAD && warp > 0) {
    if (const Tile<S::KEYS> tile(p); tile.exists())
      if (turn_queries<T, DIM, 1, 4>(p, tile, 0, tokens_of_tile(p), threadIdx.x - 32, S::THREADS - 32, queries,
                                     sink_queries))
        at.differing[0] = 1;
    publish();
    meet(5, S::THREADS - 32);
  }
  if (warp < S::HELPERS / 32) {
    leave_registers<S::FEW_REGISTERS>();
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
            copy_in(tile + i * S::COLUMN, ring, i * 64, ring_rows(p) + n * S::KEYS, head, row, barrier);
          else
            copy_in(tile + i * S::COLUMN, map, i * 64, padding + n * S::KEYS, head, row, barrier);
        }
      };
      auto ask_values = [&] {
        wait(&at.values_out[value_at.stage], value_at.phase ^ 1);
        ask(maps.values, maps.ring_values, maps.sink_values, before, padding, head, row,
            values + value_at.stage * S::TILE, &at.values_in[value_at.stage]);
        value_at.advance(STAGES);
      };
      for (Tile<S::KEYS> tile(p); tile.exists(); tile.advance(p)) {
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
    } else if (S::AHEAD) {
      Tile<S::KEYS> tile(p);
      for (int n = 0;; ++n) {
        const int stage = n % S::QUERY_TILES;
        if (n > 0) {  // the first tile is there
          wait(&at.queries_out[stage], n / S::QUERY_TILES % 2 ^ 1);
          wait(&at.sink_queries_out, n % 2 ^ 1);
          if (tile.exists())
            if (turn_queries<T, DIM, 1, 4>(p, tile, 0, tokens_of_tile(p), threadIdx.x - 32, S::TURNERS,
                                           queries + stage * S::QUERY_TILE, sink_queries))
              at.differing[stage] = n + 1;
          publish();
        }
        arrive(&at.queries_in[stage]);
        arrive(&at.sink_queries_in);
        if (!tile.exists()) break;
        tile.advance(p);
      }
    }
    return;
  }

  take_registers<S::MANY_REGISTERS>();
  const int group = (warp - S::HELPERS / 32) / 4, g = lane / 4, c = lane % 4;
  const int upper = group * 64;  // first query of the warpgroup in the tile
  // The warp's head, of the tile's, and its first token, from the tile's.
  const int heads = heads_of_tile(p), of_head = (warp - S::HELPERS / 32) % heads;
  const int of_warp = (warp - S::HELPERS / 32) / heads * 16;
  // Barriers of threads: 1 and 2 for a warpgroup's turn to multiply, 3 and 4 for a warpgroup alone.
  const int turn_of_ours = 1 + group, turn_of_others = 2 - group, ours = 3 + group;
  if (group == 1) pass(turn_of_others, 256);
  Turnstile query_at, sink_query_at, key_at, value_at;
  int nth_tile = 1;
  Tile<S::KEYS> tile(p);
  if (!tile.exists()) return;
  float top[2], total[2], fade[2];
  float few[SINKS / 2], score[S::KEYS / 2], sum[DIM / 2];
  uint32_t few_weights[SINKS / 4], weight[S::KEYS / 4];
  const float scale = ADJUSTED ? 1 : p.query_scale;
  float slope = 0;  // of the tile's head, in base 2

  auto query = [&] { return tile.first + of_warp; };  // the warp's first

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
      multiply<T>(few, describe(sink_queries + upper * 128 + k / 4 * S::QUERY_COLUMN + k % 4 * 32, 16),
                  describe(from + k / 4 * S::SINK_COLUMN + k % 4 * 32, 16), k > 0);
    commit_products();
  };
  auto soften_few = [&](int first) {
#pragma unroll
    for (int i = 0; i < SINKS / 2; ++i) {
      const int slot = first + i / 4 * 8 + c * 2 + i % 2, row = query() + g + i % 4 / 2 * 8;
      if (slot >= p.sink_size || slot - tile.held > row) few[i] = -INFINITY;
    }
    if (ADJUSTED) {
      const int row = tile.from + query() + g;  // distances are counted from the first sink
      const int from[2] = {min(row, p.furthest) - first, min(row + 8, p.furthest) - first};
      adjust(few, from, slope, p, c);
    }
    soften(few, top, total, fade, scale);
    fade_sum(sum, fade);
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
    const uint64_t our_queries = describe(queries + query_at.stage * S::QUERY_TILE + upper * 128, 16);
    const uint64_t tile_of_keys = describe(keys + stage * S::TILE, 16);
    hold(score);
    open_products();
#pragma unroll
    for (int k = 0; k < DIM / 16; ++k)
      multiply<T>(score, further(our_queries, k / 4 * S::QUERY_COLUMN + k % 4 * 32),
                  further(tile_of_keys, k / 4 * S::COLUMN + k % 4 * 32), k > 0);
    commit_products();
  };
  auto ask_sum = [&] {
    const uint64_t tile_of_values = describe(values + value_at.stage * S::TILE, S::COLUMN);
    hold(sum), hold(weight);
    open_products();
#pragma unroll
    for (int k = 0; k < S::KEYS / 16; ++k) multiply<T>(sum, weight + 4 * k, further(tile_of_values, k * 16 * 128));
    commit_products();
  };
  auto pack_weights = [&] {
#pragma unroll
    for (int i = 0; i < S::KEYS / 4; ++i) weight[i] = pack<T>(score[2 * i], score[2 * i + 1]);
  };
  auto soften_scores = [&](int n) {
    mask(score, n, tile, of_warp, g, c);
    if (ADJUSTED) {
      const int from[2] = {query() + g - n * S::KEYS, query() + g + 8 - n * S::KEYS};
      adjust(score, from, slope, p, c);
    }
    soften(score, top, total, fade, scale);
  };

  // What a tile begins with: scores of the last keys, which come second.
  auto open_tile = [&] {
    if (S::AHEAD) {
      wait(&at.queries_in[query_at.stage], query_at.phase);
    } else {
      meet(ours, 128);  // for who still reads the last tile's
      const int half = tokens_of_tile(p) / 2;  // the warpgroup's tokens, of all heads
      turn_queries<T, DIM, 4, 4>(p, tile, group * half, group * half + half, threadIdx.x % 128, 128, queries,
                                 sink_queries);
      publish();
      meet(ours, 128);
    }
    Turnstile second = key_at;
    second.advance(STAGES);
    wait(&at.keys_in[second.stage], second.phase);
    ask_scores(second.stage);
  };

  if (S::AHEAD) open_tile();
  while (true) {
    if (!S::AHEAD) open_tile();
    top[0] = top[1] = LOWEST, total[0] = total[1] = 0;
    if (p.learned_logits) {
      top[0] = top[1] = p.learned_logits[tile.head + of_head] * LOG2E;
      if (c == 0) total[0] = total[1] = 1;  // threads of a row add up in the end
    }
    if (ADJUSTED) slope = p.alibi_slopes ? p.alibi_slopes[tile.head + of_head] * LOG2E : 0;
#pragma unroll
    for (int i = 0; i < DIM / 2; ++i) sum[i] = 0;

    // Sinks are keys like others where text and sinks turn the tile's queries by the same angles.
    if (S::AHEAD) wait(&at.sink_queries_in, sink_query_at.phase);
    wait(&at.keys_in[key_at.stage], key_at.phase);
    const bool is_plain = S::AHEAD && tile.is_first && at.differing[query_at.stage] != nth_tile;
    if (is_plain) {
      tile.oldest = 0, tile.reach = 1 << 30;
      wait_for_products<0>();
      hold(score);
      release(&at.keys_out[key_at.stage ^ 1]);
      release(&at.keys_out[key_at.stage]);
      release(&at.sink_queries_out);
      wait(&at.values_in[value_at.stage], value_at.phase);
      soften_scores(tile.end - 1);
    } else {
      ask_few_scores(0);
      wait_for_products<0>();
      hold(few), hold(score);
      release(&at.keys_out[key_at.stage ^ 1]);
      wait(&at.values_in[value_at.stage], value_at.phase);
      for (int first = 0;;) {
        const bool is_last = first + SINKS >= p.sink_size;
        if (is_last) release(&at.keys_out[key_at.stage]);
        if (is_last && S::AHEAD) release(&at.sink_queries_out);
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
      soften_scores(tile.end - 1);
      wait_for_products<0>();
      hold(sum), hold(few_weights);
    }
    key_at.advance(STAGES), key_at.advance(STAGES), sink_query_at.advance(1), ++nth_tile;
    release(&at.values_out[value_at.stage]);
    value_at.advance(STAGES);
    fade_sum(sum, fade);
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
      soften_scores(n);
      wait_for_products<0>();
      hold(sum), hold(weight);
      release(&at.values_out[value_at.stage]);
      value_at.advance(STAGES);
      fade_sum(sum, fade);
      pack_weights();
    }
    if (S::AHEAD) release(&at.queries_out[query_at.stage]);
    wait(&at.values_in[value_at.stage], value_at.phase);
    ask_sum();

    // The next tile is begun before this one is put away, where its queries are turned by then. After the last one it is
    // not there, and nothing comes of it: the compiler does not follow products that go on in one branch only.
    const Tile<S::KEYS> done = tile;
    uint64_t* values_out = &at.values_out[value_at.stage];
    value_at.advance(STAGES), query_at.advance(S::QUERY_TILES);
    tile.advance(p);
    if (S::AHEAD) open_tile();
    wait_for_products<S::AHEAD ? 1 : 0>();
    hold(sum), hold(weight);
    release(values_out);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      total[r] += __shfl_xor_sync(~0u, total[r], 1);
      total[r] += __shfl_xor_sync(~0u, total[r], 2);
      total[r] = __fdividef(1, total[r]);
    }
    put_away<T, DIM>(sum, total, done.first + of_warp, done.head + of_head, done, p, g, c);
    if (!tile.exists()) break;
  }
  wait_for_products<0>();
}

}  // namespace
}  // namespace sinkattn::cuda
