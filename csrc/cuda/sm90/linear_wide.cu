// Products of up to 64 rows with a weight, the norm before and the gate and residual after, in one launch, for Hopper.
//
// Floor: the bytes of the weight, read once. What it takes to get near it, where linear.cu would be held up by x:
//
// * x is the operand of 64 rows, from registers, and rows of the weight are the other: a block takes TILE of them at a
//   time, so that it reads 64 rows of x for TILE of the weight. One warp asks the copy engine for chunks of KC columns
//   of both, two warpgroups take turns in multiplying what has come.
// * A weight with few rows is split by columns as well: blocks of a cluster have the same rows, and each finishes a
//   part of them, for which the others put what they found into its shared memory.
// * The norm scales rows of x, so it can wait: x is multiplied by the norm's weight as it comes, and what the squares
//   of the whole row say is applied to the results.
// * The weight does not depend on the kernel ahead: as much as there is room for is asked for before that is done.
// * Little code: what is run once in a block comes from memory, too.
#include <algorithm>

#include "../launch.h"
#include "linear_wide_parts.h"

namespace sinkattn::cuda {
namespace {

template <typename T, int TILE>
__global__ void __launch_bounds__(THREADS, 1)
    wide_kernel(const __grid_constant__ Linear p, const __grid_constant__ Maps maps, const Plan plan) {
  extern __shared__ char memory[];
  __shared__ Barriers at;
  __shared__ float squares[X_ROWS], squares_of_others[MAX_SPLIT - 1][X_ROWS];  // of x
  __shared__ float scale[X_ROWS];                                              // makes x normal
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const bool has_norm = p.norm_weight != nullptr, gated = p.activation != Activation::none;
  const int split = plan.split, stages = plan.stages;
  // Stages of the weight's rows and x, of 1024 bytes and their multiples; the norm's weight; sums of this block,
  // (X_ROWS, TILE); those of others for what this one finishes, (split - 1, X_ROWS, outputs), with gates twice as many.
  constexpr int STAGE = (TILE + X_ROWS) * KC * 2;
  char* ring = memory + (1024 - shared_address(memory) % 1024) % 1024;
  char* norms = ring + stages * STAGE;
  float* sums = reinterpret_cast<float*>(norms + stages * NORM_BYTES);
  float* of_others = sums + X_ROWS * apart(TILE);

  // The part of the columns of this block, in chunks, and its tiles.
  const int part = blockIdx.x % split, first_tile = blockIdx.x / split, step = gridDim.x / split;
  const int count = gated ? p.out_features / 2 : p.out_features, most = gated ? TILE / 2 : TILE;
  const int tiles = (count + most - 1) / most, outputs = most / split;
  const int all_chunks = (p.in_features + KC - 1) / KC;
  const int begin = all_chunks * part / split, chunks = all_chunks * (part + 1) / split - begin;

  // One thread of the last group asks for all that is read.
  uint64_t once;  // the weight is, in a step, and need not stay in the L2
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(once));
  const int total = (tiles - first_tile + step - 1) / step * chunks, early = min(total, stages);
  int asked_tile = first_tile, asked_chunk = 0;
  Place asked = {0, 0};
  auto advance = [&] {
    if (++asked_chunk == chunks) asked_chunk = 0, asked_tile += step;
    asked.advance(1, stages);
  };
  auto ask_weight = [&] {
    const unsigned to = shared_address(ring + asked.stage * STAGE);
    uint64_t* barrier = asked.came(at);
    const int column = (begin + asked_chunk) * KC, row = asked_tile * most;
    expect_bytes(barrier, (TILE + x_rows_of(p)) * KC * 2 + (has_norm ? NORM_BYTES : 0));
    copy_in_once(to, maps.weight, column, row, barrier, once);
    if (gated) copy_in_once(to + most * KC * 2, maps.weight, column, count + row, barrier, once);
    if (has_norm) copy_in(shared_address(norms + asked.stage * NORM_BYTES), maps.norm, column, 0, barrier);
  };
  auto ask_x = [&] {
    copy_in(shared_address(ring + asked.stage * STAGE) + TILE * KC * 2, maps.x, (begin + asked_chunk) * KC, 0,
            asked.came(at));
  };
  if (threadIdx.x == CONSUMERS) {
    for (int stage = 0; stage < stages; ++stage) {
      open_barrier(&at.in[0][stage], 1), open_barrier(&at.in[1][stage], 1);
      open_barrier(&at.out[stage], 4);  // warps
    }
    open_barrier(&at.found, 1);
    publish_barriers();
    publish();
    if (split > 1) expect_bytes(&at.found, (split - 1) * (p.rows * (TILE / split) + (has_norm ? X_ROWS : 0)) * 4);
#pragma unroll 1
    for (int i = 0; i < early; ++i) ask_weight(), advance();
  } else if (threadIdx.x == CONSUMERS + 32) {  // meanwhile
    for (const CUtensorMap* map : {&maps.weight, &maps.x, &maps.norm})
      asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
  }
  __syncwarp();
  let_next_launch();
  if (split > 1)
    asm volatile("barrier.cluster.arrive.relaxed;\nbarrier.cluster.wait.acquire;" ::: "memory");
  else
    __syncthreads();

  if (warp >= CONSUMERS / 32) {  // the others get its registers
    leave_registers<40>();
    wait_for_launch();
    if (threadIdx.x != CONSUMERS) return;
    asked_tile = first_tile, asked_chunk = 0, asked = {0, 0};
#pragma unroll 1
    for (int i = 0; i < early; ++i) ask_x(), advance();
#pragma unroll 1
    for (int i = early; i < total; ++i) {
      wait(&at.out[asked.stage], (asked.round - 1) & 1);  // the round before is read
      ask_weight(), ask_x(), advance();
    }
    return;
  }

  take_registers<232>();
  const int group = warp / 4, g = lane / 4, c = lane % 4, row = warp % 4 * 16 + g;  // rows of the lane: and row + 8
  const unsigned x_rows = shared_address(ring) + TILE * KC * 2 + warp % 4 * 16 * 128;
  Place tile_at = {0, 0};
  for (int tile = first_tile; tile < tiles; tile += step) {
    // Groups take every other chunk.
    float sum[TILE / 2] = {}, low[4] = {}, high[4] = {}, size[2] = {1, 1};
    uint32_t now[16], next[16];
    // Rows times themselves, lower and upper 8 of the warp: what counts is on the diagonals.
    auto squares_of = [&](int r) {
      const float even = r ? high[2] : low[0], odd = r ? high[3] : low[1];
      return __shfl_sync(~0u, g % 2 ? odd : even, lane / 4 * 4 + g / 2);
    };
    auto prepare = [&](uint32_t (&a)[16], int stage, bool is_first) {
      load(a, x_rows + stage * STAGE);
      if (!has_norm) return;
#pragma unroll
      for (int k = 0; k < 16; k += 4) {
        multiply<T>(low, a[k], a[k + 1], a[k + 2], a[k + 3], a[k], a[k + 2]);
        multiply<T>(high, a[k], a[k + 1], a[k + 2], a[k + 3], a[k + 1], a[k + 3]);
      }
      if (std::is_same_v<T, __half> && is_first) {  // bfloat16 has room for anything
#pragma unroll
        for (int r = 0; r < 2; ++r)  // a power of two, so that nothing is rounded
          size[r] = fminf(__int_as_float(__float_as_int(rsqrtf(squares_of(r) / KC)) & 0x7f800000), 4);
      }
      const uint32_t* weights = reinterpret_cast<const uint32_t*>(norms + stage * NORM_BYTES);
#pragma unroll
      for (int k = 0; k < 8; ++k) {
        const uint32_t w = weights[4 * k + c];
#pragma unroll
        for (int r = 0; r < 2; ++r) a[2 * k + r] = weighed<T>(a[2 * k + r], size[r], w, p.norm_shift);
      }
    };
    Place place = tile_at;
    place.advance(group, stages);
    if (group < chunks) {
      place.wait_in(at);
      prepare(now, place.stage, true);
    }
    for (int chunk = group; chunk < chunks; chunk += GROUPS) {
      const uint64_t rows_of_weight = describe(ring + place.stage * STAGE, 16);
      hold(sum), hold(now);
      open_products();
#pragma unroll
      for (int k = 0; k < 4; ++k) multiply_rows<T, TILE>(sum, now + 4 * k, further(rows_of_weight, k * 32));
      commit_products();
      uint64_t* done = &at.out[place.stage];
      place.advance(GROUPS, stages);
      if (chunk + GROUPS < chunks) {
        place.wait_in(at);
        prepare(next, place.stage, false);
      }
      wait_for_products<0>();
      hold(sum), hold(now);
      if (lane == 0) arrive(done);
#pragma unroll
      for (int i = 0; i < 16; ++i) now[i] = next[i];
    }
    const int behind = tile_at.stage + chunks;
    tile_at = {behind % stages, tile_at.round + behind / stages};

    // The groups meet, then the blocks that split the columns.
    meet(1, CONSUMERS);  // what was found for the tile before is read
    const float factor[2] = {1 / size[0], 1 / size[1]};
    float* to = sums + row * apart(TILE) + c * 2;
    auto add = [&](bool first) {
#pragma unroll
      for (int i = 0; i < TILE / 2; i += 2) {
        float2* place = reinterpret_cast<float2*>(to + i % 4 / 2 * 8 * apart(TILE) + i / 4 * 8);
        const float2 before = first ? make_float2(0, 0) : *place;
        const float by = factor[i % 4 / 2];
        *place = make_float2(fmaf(sum[i], by, before.x), fmaf(sum[i + 1], by, before.y));
      }
      if (!has_norm) return;
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float found = squares_of(r);
        if (c == 0) squares[row + 8 * r] = first ? found : squares[row + 8 * r] + found;
      }
    };
    if (group == 1) add(true);
    meet(1, CONSUMERS);
    if (group == 0) add(false);
    publish();
    meet(1, CONSUMERS);
    if (split > 1) {
#pragma unroll 1
      for (int i = threadIdx.x; i < (split - 1) * X_ROWS; i += CONSUMERS) {
        const int row = i % X_ROWS, place = i / X_ROWS, owner = (part + split - 1 - place) % split;
        const unsigned barrier = of_block(shared_address(&at.found), owner);
        if (has_norm) put(of_block(shared_address(&squares_of_others[place][row]), owner), squares[row], barrier);
        if (row >= p.rows) continue;
        const unsigned from = shared_address(sums + row * apart(TILE) + owner * outputs);
        const unsigned to = of_block(shared_address(of_others + (place * X_ROWS + row) * apart(TILE / split)), owner);
        put(to, from, outputs * 4, barrier);
        if (gated) put(to + outputs * 4, from + most * 4, outputs * 4, barrier);
      }
      wait(&at.found, 0);
      asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");  // all has come that others had to copy
    }
    if (threadIdx.x < X_ROWS && has_norm) {
      float total = squares[threadIdx.x];
      for (int other = 0; other < split - 1; ++other) total += squares_of_others[other][threadIdx.x];
      scale[threadIdx.x] = rsqrtf(total / p.in_features + p.norm_eps);
    }
    wait_for_launch();
    meet(1, CONSUMERS);

    Found found = {{sums + part * outputs, apart(TILE), gated ? most : 0},
                   {of_others, apart(TILE / split), outputs},
                   split - 1,
                   1};
    const int first = tile * most + part * outputs, limit = min(outputs, count - first);
    const bool whole = count % 8 == 0 && outputs % 8 == 0 &&
                       (reinterpret_cast<uintptr_t>(p.residual) | reinterpret_cast<uintptr_t>(p.bias)) % 16 == 0;
    const int width = whole ? 8 : 1, units = outputs / width;
    int at_row = threadIdx.x / units, unit = threadIdx.x % units;
    const int more_rows = CONSUMERS / units, more = CONSUMERS % units;
#pragma unroll 1
    while (at_row < p.rows) {
      const int at = unit * width;
      if (has_norm) found.scale = scale[at_row];
      if (at >= limit) {
      } else if (whole) {
        finish<T, 8>(p, found, count, at_row, first + at, at);
      } else {
        finish<T, 1>(p, found, count, at_row, first + at, at);
      }
      at_row += more_rows, unit += more;
      if (unit >= units) unit -= units, ++at_row;
    }
  }
  if (split > 1) asm volatile("barrier.cluster.wait.acquire;" ::: "memory");  // what they copy is still here
}

template <typename T>
bool map_of(CUtensorMap& map, const void* x, int columns, int rows, int64_t row, int box_rows, bool swizzled) {
  const auto encode = map_encoder();
  const cuuint64_t sizes[2] = {cuuint64_t(columns), cuuint64_t(rows)}, strides[1] = {cuuint64_t(row) * 2};
  const cuuint32_t box[2] = {KC, cuuint32_t(box_rows)}, steps[2] = {1, 1};
  return encode &&
         !encode(&map, MAP_TYPE<T>, 2, const_cast<void*>(x), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                 swizzled ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
                 CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
}

void measure(Plan& plan, const Device& device) {
  const int of_others = (plan.split - 1) * apart(plan.tile / plan.split);
  const int stage = (plan.tile + X_ROWS) * KC * 2 + NORM_BYTES, sums = X_ROWS * (apart(plan.tile) + of_others) * 4;
  plan.stages = std::min((device.shared_bytes - 4096 - sums) / stage, MAX_STAGES);
  plan.bytes = 1024 + plan.stages * stage + sums;
}

// The plan whose busiest multiprocessor reads least. x comes from the L2 and weighs half; to begin and end costs as
// much as FIXED bytes, another tile FIXED / 4. Of clusters of more than two blocks, seven of eight fit at a time. How
// many rows x has does not matter, so that a row gives the same bits among any others.
Plan plan_of(const Linear& p, const Device& device) {
  constexpr double FIXED = 128 * 1024;
  const bool gated = p.activation != Activation::none;
  const int count = gated ? p.out_features / 2 : p.out_features, chunks = (p.in_features + KC - 1) / KC;
  Plan best = {};
  double least = 0;
  for (int tile : {64, 96, 128, 144, 160, 176, 192, 224})
    for (int split = 1; split <= std::min(chunks, MAX_SPLIT); split *= 2) {
      Plan plan = {tile, split};
      measure(plan, device);
      const int most = gated ? tile / 2 : tile, tiles = (count + most - 1) / most;
      const int at_once = split > 2 ? device.multiprocessors * 7 / 8 : device.multiprocessors;
      const int rounds = (tiles + at_once / split - 1) / (at_once / split);
      if (plan.stages < MIN_STAGES || most / split % 4 != 0 || (split > 1 && rounds > 1)) continue;
      const double read = double((chunks + split - 1) / split) * (tile + X_ROWS / 2) * KC * 2;
      const double put = split > 1 ? X_ROWS * 4.0 * tile : 0;
      const double cost = rounds * (read + FIXED / 4) + FIXED + put;
      if (best.tile == 0 || cost < least) best = plan, least = cost;
    }
  return best;
}

template <typename T>
auto kernel_of(int tile) {
  void (*kernel)(Linear, Maps, Plan) = nullptr;
  switch (tile) {
    case 64: kernel = wide_kernel<T, 64>; break;
    case 96: kernel = wide_kernel<T, 96>; break;
    case 128: kernel = wide_kernel<T, 128>; break;
    case 144: kernel = wide_kernel<T, 144>; break;
    case 160: kernel = wide_kernel<T, 160>; break;
    case 176: kernel = wide_kernel<T, 176>; break;
    case 192: kernel = wide_kernel<T, 192>; break;
    case 224: kernel = wide_kernel<T, 224>; break;
  }
  return kernel;
}

template <typename T>
cudaError_t launch(const Linear& p, const Device& device, cudaStream_t stream) {
  const Plan plan = plan_of(p, device);
  const auto kernel = kernel_of<T>(plan.tile);
  if (kernel == nullptr) return cudaErrorInvalidConfiguration;
  const bool gated = p.activation != Activation::none;
  const int count = gated ? p.out_features / 2 : p.out_features, most = gated ? plan.tile / 2 : plan.tile;
  Maps maps;
  const bool mapped =
      map_of<T>(maps.x, p.x, p.in_features, p.rows, p.in_features, x_rows_of(p), true) &&
      map_of<T>(maps.weight, p.weight, p.in_features, p.out_features, p.weight_row, most, true) &&
      map_of<T>(maps.norm, p.norm_weight ? p.norm_weight : p.x, p.in_features, 1, p.in_features, 1, false);
  if (!mapped) return cudaErrorInvalidValue;

  const int tiles = (count + most - 1) / most;
  Grid grid(dim3(plan.split > 1 ? tiles * plan.split : std::min(tiles, device.multiprocessors)), THREADS, plan.bytes,
            stream);
  grid.overlap();
  if (plan.split > 1) grid.cluster(plan.split);
  if (const cudaError_t error = grid.allow_shared(kernel)) return error;
  return cudaLaunchKernelEx(&grid.config, kernel, p, maps, plan);
}

}  // namespace

cudaError_t linear_wide(const Linear& p, const Device& device, cudaStream_t stream) {
  return (p.is_bfloat16 ? launch<__nv_bfloat16> : launch<__half>)(p, device, stream);
}

}  // namespace sinkattn::cuda
