// Products of up to 16 rows with a weight, the norm before and the gate and residual after, in one launch.
//
// Floor: the bytes of the weight, read once. What it takes to get there:
//
// * Warps share the columns of the weight in chunks of KC. A warp asks for its chunks of 16 or 32 rows by cp.async,
//   whole lines of memory, well ahead, in a ring in shared memory of its own: it waits for nobody. x and the norm's
//   weight come in the same chunks, so any size fits, and every warp normalises what it multiplies.
// * Products don't mind the order of what they sum over, so 16 bytes of a row are fragments of the tensor cores as they
//   lie in memory. The weight is the operand of 16 rows, x the one of 8. Warps meet once for each group of rows.
// * Blocks, one for each multiprocessor, share the rows of the weight evenly, and let the kernel behind them launch at
//   once: where one ends the next asks for its first chunks, and only then waits for what all of them write. So the
//   weight must not be what the kernel ahead writes.
#include <algorithm>

#include "../activate.h"
#include "../launch.h"
#include "linear_parts.h"

namespace sinkattn::cuda {
namespace {

constexpr int WARPS = 16, THREADS = WARPS * 32;
// Rows of the weight that a block multiplies at a time, with an activation half of them gates.
template <int TILES>
constexpr int ROWS = 16 * TILES;
template <int TILES>
constexpr int SUMS = ROWS<TILES> + 4;  // how far sums for a row of x lie apart, so that lanes meet different banks

// Phase `fetch`: what a warp asks for next, 16 bytes a lane, ROWS_AT_A_TIME rows at a time: chunk after chunk of group
// after group of rows. A stage of its ring has the rows of the weight, those of x, and the norm's weight.
template <int ROWS>
struct Chunks {
  const Linear& p;
  const int warp, stage_size, pieces, chunks, most, size, end;  // rows from the one it enters at to `end`, `size` at a time
  const bool has_norm, gated;
  uint4* const ring;
  const uint64_t once;
  const int first_row, lane_piece;
  const int64_t row_bytes, jump;  // jump: from gates to the rest
  const unsigned lane_place;
  int first, chunk;
  const char* line;

  __device__ void enter(int at) {
    first = at, chunk = warp;
    line = static_cast<const char*>(p.weight) + (first + first_row) * row_bytes + lane_piece * 16;
  }
  __device__ void advance() {
    chunk += WARPS;
    if (chunk >= chunks) enter(first + size);
  }
  __device__ void fetch_weight(int stage) const {
    const int limit = min(size, end - first), limit_of_rest = gated ? limit + most : limit;
    if (limit <= 0 || chunk * PIECES + lane_piece >= pieces) return;
    fetch_rows<ROWS>(lane_place + stage * stage_size * 16, line + chunk * (KC * 2), first_row, limit, limit_of_rest,
                     row_bytes, jump, once);
    if (has_norm && first_row == 0)
      copy(shared_address(ring + stage * stage_size + place(ROWS + p.rows, lane_piece)),
           static_cast<const uint4*>(p.norm_weight) + chunk * PIECES + lane_piece);
  }
  __device__ void fetch_x(int stage) const {
    if (first < end && chunk * PIECES + lane_piece < pieces) {
      const uint4* x = static_cast<const uint4*>(p.x) + chunk * PIECES + lane_piece;
      for (int row = first_row; row < p.rows; row += ROWS_AT_A_TIME)
        copy(lane_place + (stage * stage_size + (ROWS + row - first_row) * PIECES) * 16, x + row * pieces);
    }
    end_of_copies();
  }
};

// Phase `norm`: 1 / rms of the rows of x that a lane multiplies, 8 n + g.
template <typename T, int COLUMNS>
__device__ __forceinline__ void find_scales(const Linear& p, int pieces, int g, float (&scale)[COLUMNS],
                                            float (&squares)[WARPS][MAX_NARROW_ROWS]) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  float total[8 * COLUMNS] = {};
  const uint4* x = static_cast<const uint4*>(p.x);
#pragma unroll 2
  for (int i = threadIdx.x; i < pieces; i += THREADS) {
#pragma unroll
    for (int row = 0; row < 8 * COLUMNS; ++row) {
      if (row >= p.rows) break;
      const uint4 piece = x[row * pieces + i];
      const T* a = reinterpret_cast<const T*>(&piece);
#pragma unroll
      for (int j = 0; j < 8; ++j) total[row] += to_float(a[j]) * to_float(a[j]);
    }
  }
#pragma unroll
  for (int row = 0; row < 8 * COLUMNS; ++row) {
    if (row >= p.rows) break;
#pragma unroll
    for (int apart = 16; apart > 0; apart /= 2) total[row] += __shfl_xor_sync(~0u, total[row], apart);
    if (lane == 0) squares[warp][row] = total[row];
  }
  __syncthreads();
#pragma unroll
  for (int n = 0; n < COLUMNS; ++n) {
    float sum = 0;
    if (n * 8 + g < p.rows)
      for (int w = 0; w < WARPS; ++w) sum += squares[w][n * 8 + g];
    scale[n] = rsqrtf(sum / p.in_features + p.norm_eps);
  }
}

// Phase `multiply`: one chunk of a stage. A lane has rows g and g + 8 of each tile of the weight, row g of each of x.
template <typename T, int TILES, int COLUMNS>
__device__ __forceinline__ void multiply_chunk(const Linear& p, const uint4* rows, int first_piece, int pieces,
                                               bool has_norm, const float (&scale)[COLUMNS],
                                               float (&products)[TILES][COLUMNS][4]) {
  constexpr int ROWS = cuda::ROWS<TILES>;
  const int lane = threadIdx.x % 32, g = lane / 4, c = lane % 4;
#pragma unroll
  for (int k = 0; k < PIECES; k += 4) {
    const bool inside = first_piece + k + c < pieces;
    uint4 x[COLUMNS];
#pragma unroll
    for (int n = 0; n < COLUMNS; ++n) {
      x[n] = make_uint4(0, 0, 0, 0);
      if (inside && n * 8 + g < p.rows) {
        x[n] = rows[place(ROWS + n * 8 + g, k + c)];
        if (has_norm) x[n] = normal<T>(x[n], rows[place(ROWS + p.rows, k + c)], scale[n], p.norm_shift);
      }
    }
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
      uint4 a = make_uint4(0, 0, 0, 0), b = a;  // rows g and g + 8
      if (inside) a = rows[place(tile * 16 + g, k + c)], b = rows[place(tile * 16 + 8 + g, k + c)];
#pragma unroll
      for (int n = 0; n < COLUMNS; ++n) {
        multiply<T>(products[tile][n], a.x, b.x, a.y, b.y, x[n].x, x[n].y);
        multiply<T>(products[tile][n], a.z, b.z, a.w, b.w, x[n].z, x[n].w);
      }
    }
  }
}

// Phase `meet`: what a warp found, (rows, SUMS), to shared memory. Columns 2 c and 2 c + 1 of a product are rows of x.
template <int TILES, int COLUMNS>
__device__ __forceinline__ void store_products(const float (&products)[TILES][COLUMNS][4], int rows, float* sums) {
  const int lane = threadIdx.x % 32, g = lane / 4, c = lane % 4;
#pragma unroll
  for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
    for (int n = 0; n < COLUMNS; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = n * 8 + c * 2 + i % 2;
        if (row < rows) sums[row * SUMS<TILES> + tile * 16 + g + i / 2 * 8] = products[tile][n][i];
      }
}

// Blocks share the results evenly, `size` at a time. TILES of 16 rows of the weight, COLUMNS of 8 rows of x.
template <typename T, int TILES, int COLUMNS>
__global__ void __launch_bounds__(THREADS) linear_kernel(const __grid_constant__ Linear p, int stages) {
  constexpr int ROWS = cuda::ROWS<TILES>, SUMS = cuda::SUMS<TILES>;
  extern __shared__ __align__(128) uint4 shared[];
  __shared__ float squares[WARPS][MAX_NARROW_ROWS];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const bool has_norm = p.norm_weight != nullptr, gated = p.activation != Activation::none;
  const int stage_size = (ROWS + p.rows + has_norm) * PIECES;
  const int pieces = p.in_features / 8, chunks = (pieces + PIECES - 1) / PIECES;
  uint4* ring = shared + warp * stages * stage_size;
  float* sums = reinterpret_cast<float*>(shared + WARPS * stages * stage_size);  // (WARPS, rows, SUMS)

  // The results of the block, and how many it takes at a time.
  const int count = gated ? p.out_features / 2 : p.out_features, most = gated ? ROWS / 2 : ROWS;
  const int begin = int64_t(count) * blockIdx.x / gridDim.x, end = int64_t(count) * (blockIdx.x + 1) / gridDim.x;
  const int groups = (end - begin + most - 1) / most, size = groups ? (end - begin + groups - 1) / groups : 1;

  const int64_t row_bytes = p.weight_row * 2;
  Chunks<ROWS> next = {p, warp, stage_size, pieces, chunks, most, size, end, has_norm, gated, ring, read_once(),
                       lane / PIECES, lane % PIECES, row_bytes, gated ? (count - most) * row_bytes : 0,
                       shared_address(ring + place(lane / PIECES, lane % PIECES))};
  // Not all of the ring is asked for before the kernel ahead is done: what that wrote would queue behind it.
  const int start = warp < chunks ? begin : end, early = max(1, stages - 1);
  next.enter(start);
  for (int stage = 0; stage < early; ++stage) next.fetch_weight(stage), next.advance();
  let_next_launch();
  wait_for_launch();

  float scale[COLUMNS] = {};
  if (has_norm) find_scales<T>(p, pieces, lane / 4, scale, squares);

  next.enter(start);
  for (int stage = 0; stage < early; ++stage) next.fetch_x(stage), next.advance();
  for (int stage = early; stage < stages; ++stage) next.fetch_weight(stage), next.fetch_x(stage), next.advance();
  int stage = 0;
  for (int first = begin; first < end; first += size) {
    // What is added to the results, asked for before it is needed.
    constexpr int MOST = (ROWS * 8 * COLUMNS + THREADS - 1) / THREADS;
    const int limit = min(size, end - first);
    T residual[MOST], bias[MOST][2];
#pragma unroll
    for (int i = 0; i < MOST; ++i) {
      const int number = threadIdx.x + i * THREADS, row = number / most, output = number % most;
      if (row >= p.rows || output >= limit) continue;
      if (p.residual) residual[i] = static_cast<const T*>(p.residual)[int64_t(row) * count + first + output];
      if (p.bias) {
        bias[i][0] = static_cast<const T*>(p.bias)[first + output];
        if (gated) bias[i][1] = static_cast<const T*>(p.bias)[count + first + output];
      }
    }
    float products[TILES][COLUMNS][4] = {};
    for (int chunk = warp; chunk < chunks; chunk += WARPS) {
      wait_for_copies(stages - 1);
      __syncwarp();
      multiply_chunk<T>(p, ring + stage * stage_size, chunk * PIECES, pieces, has_norm, scale, products);
      __syncwarp();
      next.fetch_weight(stage), next.fetch_x(stage), next.advance();
      if (++stage == stages) stage = 0;
    }
    store_products(products, p.rows, sums + warp * p.rows * SUMS);
    __syncthreads();
#pragma unroll
    for (int i = 0; i < MOST; ++i) {
      const int number = threadIdx.x + i * THREADS, row = number / most, output = number % most;
      if (row >= p.rows || output >= limit) continue;
      auto sum = [&](int number) {
        float total = 0;
#pragma unroll
        for (int w = 0; w < WARPS; ++w) total += sums[(w * p.rows + row) * SUMS + number];
        return total;
      };
      float y[1] = {sum(output) + (p.bias ? to_float(bias[i][0]) : 0)};
      if (gated) {
        activate(y, p.activation);
        y[0] *= sum(most + output) + (p.bias ? to_float(bias[i][1]) : 0);
      }
      if (p.residual) y[0] += to_float(residual[i]);
      static_cast<T*>(p.out)[int64_t(row) * count + first + output] = from_float<T>(y[0]);
    }
    __syncthreads();
  }
}

// Stages of a ring that fit, and shared memory in bytes.
template <int TILES>
int stages_of(const Linear& p, const Device& device, int* bytes) {
  const int stage_bytes = WARPS * (ROWS<TILES> + p.rows + (p.norm_weight != nullptr)) * KC * 2;
  const int sums_bytes = WARPS * p.rows * SUMS<TILES> * 4;
  const int stages = std::min((device.shared_bytes - 2048 - sums_bytes) / stage_bytes, MAX_STAGES);
  *bytes = stages * stage_bytes + sums_bytes;
  return stages;
}

template <typename T, int TILES, int COLUMNS>
cudaError_t launch(const Linear& p, const Device& device, cudaStream_t stream) {
  const auto kernel = linear_kernel<T, TILES, COLUMNS>;
  int bytes = 0;
  const int stages = stages_of<TILES>(p, device, &bytes);
  if (stages < 1) return cudaErrorInvalidConfiguration;
  Grid grid(dim3(device.multiprocessors), THREADS, bytes, stream);
  if (device.compute_major >= 9) grid.overlap();
  if (const cudaError_t error = grid.allow_shared(kernel)) return error;
  return cudaLaunchKernelEx(&grid.config, kernel, p, stages);
}

template <typename T>
cudaError_t launch(const Linear& p, const Device& device, cudaStream_t stream) {
  int bytes = 0;
  const bool wide = p.rows > 8;
  if (p.out_features > 16 * device.multiprocessors && stages_of<2>(p, device, &bytes) > 0)
    return (wide ? launch<T, 2, 2> : launch<T, 2, 1>)(p, device, stream);
  return (wide ? launch<T, 1, 2> : launch<T, 1, 1>)(p, device, stream);
}

}  // namespace

cudaError_t linear(const Linear& p, const Device& device, cudaStream_t stream) {
  if (device.compute_major == 9 && p.rows > FEW_ROWS) return linear_wide(p, device, stream);
  return (p.is_bfloat16 ? launch<__nv_bfloat16> : launch<__half>)(p, device, stream);
}

}  // namespace sinkattn::cuda
