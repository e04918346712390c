// A chunk of new tokens per row, for Hopper (sm_90a), in two launches: `gather`, in gather.cu, and `attend`, here.
//
// Floor: 4 * head_dim FLOPs for each query head and visible pair of query and key, at the speed of the tensor cores.
// What it takes to get near it:
//
// * Keys come in the order of the text. The first launch turns those of the chunk and puts what the ring holds, and the
//   sinks, in order and without what is empty into scratch: after that a band is all there is, and no value is NaN.
// * A block keeps a multiprocessor and takes tiles of 128 queries, one after the other. One warp asks the copy engine
//   for tiles of 128 keys and values, seven turn queries by both angles ahead of their use, and two warpgroups of 64
//   queries multiply: both products by wgmma, weights as registers.
// * While one product runs, the softmax of the one before is worked out, in the same warpgroup and in the other one:
//   they take turns in asking for products. The first scores of a tile are asked for before the last one is put away.
// * Only tiles that an edge of the band goes through take a mask. Sinks come 16 at a time, in products of that size.
#include "../launch.h"
#include "prefill_attend.h"
#include "prefill_turn.h"

namespace sinkattn::cuda {
namespace {

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
    soften<CAPPED>(few, top, total, fade, scale, p);
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
    mask(score, tile.end - 1, p, tile, upper + warp % 4 * 16, g, c);
    soften<CAPPED>(score, top, total, fade, scale, p);
    wait_for_products<0>();
    hold(sum), hold(few_weights);
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
      mask(score, n, p, tile, upper + warp % 4 * 16, g, c);
      soften<CAPPED>(score, top, total, fade, scale, p);
      wait_for_products<0>();
      hold(sum), hold(weight);
      release(&at.values_out[value_at.stage]);
      value_at.advance(STAGES);
      fade_sum(sum, fade);
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
  const int64_t tiles = int64_t(p.tokens + QUERIES - 1) / QUERIES * p.batch * heads;
  Grid grid(dim3(tiles < multiprocessors ? tiles : multiprocessors), THREADS, Shape<DIM>::SHARED, stream);
  grid.overlap();
  cudaError_t error = grid.allow_shared(kernel);
  if (error == cudaSuccess) error = gather(p, stream);  // from here on the cache changes, and nothing is refused
  if (error == cudaSuccess) error = cudaLaunchKernelEx(&grid.config, kernel, p, maps);
  return error;
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
