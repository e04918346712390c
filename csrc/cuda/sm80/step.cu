// The kernels of step.h. Floor: that of any kernel, some two microseconds a launch, which is why each is one where torch
// has several. They launch as torch's do, without overlap: attention that reads the cache early counts on it.
#include "../step.h"

#include <cmath>

#include "../launch.h"
#include "../numbers.h"

namespace sinkattn::cuda {
namespace {

constexpr int THREADS = 128, MANY = 1024, TOGETHER = 6;  // TOGETHER: pieces of 16 bytes that a thread asks for at a time

__global__ void __launch_bounds__(THREADS) angles_kernel(const __grid_constant__ Angles p) {
  const int64_t i = int64_t(blockIdx.x) * THREADS + threadIdx.x, token = i / (2 * p.half);
  if (token >= int64_t(p.rows) * p.tokens) return;
  const int row = int(token / p.tokens), angle = int(i / p.half % 2), pair = int(i % p.half);
  const int64_t unfed = p.counts ? p.tokens - p.counts[row] : 0;
  int64_t position = p.lengths[row] - unfed + token % p.tokens;
  if (angle == 1) position = min(position, p.capacity - 1);
  double sine, cosine;
  sincos(double(position) * p.frequencies[pair], &sine, &cosine);
  float* out = p.out + (token * 2 + angle) * (2 * p.half) + pair;
  out[0] = float(cosine), out[p.half] = float(sine);
}

__global__ void __launch_bounds__(THREADS) note_kernel(const __grid_constant__ Note p) {
  const int row = blockIdx.x * THREADS + threadIdx.x;
  if (row >= p.rows) return;
  const int64_t length = p.lengths[row], count = p.counts ? p.counts[row] : 1, id = p.ids[row];
  const int64_t slot = length < p.sink_size ? length : p.sink_size + (length - p.sink_size) % p.ring_size;
  p.known[row * p.known_row + slot] = id;
  if (count) p.digests[row] = int64_t(uint64_t(p.digests[row]) * uint64_t(p.base) + uint64_t(id));
  p.lengths[row] = length + count;
}

// Larger numbers have larger ones; 0 is below all, and both zeros are equal.
__device__ uint32_t order_of(float x) {
  if (x != x) return ~0u;
  const uint32_t bits = __float_as_uint(x + 0.0f);
  return bits >> 31 ? ~bits : bits | 1u << 31;
}

struct Best {
  uint32_t order = 0;
  unsigned where = ~0u;
  float number = NAN;
  __device__ void look(float x, unsigned i) {  // in rising order of i
    const uint32_t its = order_of(x);
    if (its > order) order = its, where = i, number = x;
  }
  // At several numbers from i on: few pieces have one that is larger than all before.
  template <int N>
  __device__ void look(const float (&x)[N], unsigned i) {
    float most = x[0];
#pragma unroll
    for (int n = 1; n < N; ++n) most = larger(most, x[n]);
    if (most <= number) return;
#pragma unroll
    for (int n = 0; n < N; ++n) look(x[n], i + n);
  }
  __device__ void of_warp() {
    const uint32_t highest = __reduce_max_sync(~0u, order);
    where = __reduce_min_sync(~0u, order == highest ? where : ~0u), order = highest;
  }
};

__device__ float number_of(float x) { return x; }
template <typename T>
__device__ float number_of(T x) {
  return to_float(x);
}

// A block a row. The L2 gives a multiprocessor some 64 bytes a clock: 100,000 numbers of 16 bits take 2 us.
template <typename T>
__global__ void __launch_bounds__(MANY) likeliest_kernel(const __grid_constant__ Likeliest p) {
  constexpr int SIZE = sizeof(T), NUMBERS = 16 / SIZE;  // of a piece
  __shared__ uint32_t orders[MANY / 32];  // of the warps' best
  __shared__ unsigned places[MANY / 32];
  const T* scores = static_cast<const T*>(p.scores) + blockIdx.x * p.row;
  const int apart = int(reinterpret_cast<uintptr_t>(scores) % 16), lane = threadIdx.x % 32;
  const int before = min(apart ? (16 - apart) / SIZE : 0, p.vocabulary);  // the first pieces' beginning
  const int pieces = (p.vocabulary - before) / NUMBERS, behind = before + pieces * NUMBERS;
  Best best;
  if (threadIdx.x < before) best.look(number_of(scores[threadIdx.x]), threadIdx.x);
#pragma unroll 1
  for (int first = threadIdx.x; first < pieces; first += TOGETHER * MANY) {
    uint4 x[TOGETHER];
#pragma unroll
    for (int n = 0; n < TOGETHER; ++n)
      if (first + n * MANY < pieces) x[n] = __ldg(reinterpret_cast<const uint4*>(scores + before) + first + n * MANY);
#pragma unroll
    for (int n = 0; n < TOGETHER; ++n) {
      if (first + n * MANY >= pieces) break;
      float numbers[NUMBERS];
#pragma unroll
      for (int i = 0; i < NUMBERS; ++i) numbers[i] = number_of(reinterpret_cast<const T*>(&x[n])[i]);
      best.look(numbers, before + (first + n * MANY) * NUMBERS);
    }
  }
  if (behind + threadIdx.x < p.vocabulary) best.look(number_of(scores[behind + threadIdx.x]), behind + threadIdx.x);
  best.of_warp();
  if (lane == 0) orders[threadIdx.x / 32] = best.order, places[threadIdx.x / 32] = best.where;
  __syncthreads();
  if (threadIdx.x >= 32) return;
  best.order = orders[lane], best.where = places[lane];
  best.of_warp();
  if (lane == 0) p.ids[blockIdx.x] = best.where;
}

cudaError_t launch(void (*kernel)(Likeliest), const Likeliest& p, cudaStream_t stream) {
  const Grid grid(dim3(p.rows), MANY, 0, stream);
  return cudaLaunchKernelEx(&grid.config, kernel, p);
}

}  // namespace

cudaError_t angles(const Angles& p, cudaStream_t stream) {
  const int64_t all = int64_t(p.rows) * p.tokens * 2 * p.half;
  if (all == 0) return cudaSuccess;
  const Grid grid(dim3(unsigned((all + THREADS - 1) / THREADS)), THREADS, 0, stream);
  return cudaLaunchKernelEx(&grid.config, angles_kernel, p);
}

cudaError_t note(const Note& p, cudaStream_t stream) {
  if (p.rows == 0) return cudaSuccess;
  const Grid grid(dim3((p.rows + THREADS - 1) / THREADS), THREADS, 0, stream);
  return cudaLaunchKernelEx(&grid.config, note_kernel, p);
}

cudaError_t likeliest(const Likeliest& p, cudaStream_t stream) {
  if (p.rows == 0) return cudaSuccess;
  if (p.kind == Scores::float32) return launch(likeliest_kernel<float>, p, stream);
  return launch(p.kind == Scores::float16 ? likeliest_kernel<__half> : likeliest_kernel<__nv_bfloat16>, p, stream);
}

}  // namespace sinkattn::cuda
