// How the kernel of decode is launched, for every form of a call. A file for each kind of cache makes the kernels. No
// torch in here.
#pragma once

#include "decode_kernel.h"

namespace sinkattn::cuda {

// `clusters` asked for: they launch nothing and say how many clusters run at a time.
cudaError_t launch_16_bits(const Params&, Sharing, const Device&, cudaStream_t, int* clusters);
cudaError_t launch_int8(const Params&, Sharing, const Device&, cudaStream_t, int* clusters);
cudaError_t launch_e4m3(const Params&, Sharing, const Device&, cudaStream_t, int* clusters);
cudaError_t launch_pages(const Params&, Sharing, const Device&, cudaStream_t, int* clusters);

namespace {

bool is_wide(const Params& p) { return p.tokens > 1 || p.group > 8; }

// Dynamic shared memory in bytes: tiles, queries of both angles, new keys and values, then what blocks hand over.
template <typename S>
int shared_bytes(const Params& p, int splits) {
  const int group = width_of(p) * p.group, number_bytes = S::UNITS > 0 ? 4 : 2;
  const int handed = S::BLOCKS == 1 && splits > 1 ? splits * group * (p.v_dim + 2) * int(sizeof(float)) : 0;
  return (S::BLOCK + 2 * S::QUERIES + S::UNITS) * 16 + p.tokens * (p.head_dim + p.v_dim) * number_bytes + handed;
}

template <typename T, typename C, int HEAD_DIM, int V_DIM, bool WIDE, bool LARGE, Form FORM>
cudaError_t launch(const Params& p, Sharing sharing, const Device& device, cudaStream_t stream, int* clusters) {
  const auto kernel = decode_kernel<T, C, HEAD_DIM, V_DIM, WIDE, LARGE, FORM>;
  using S = Shape<C, HEAD_DIM, V_DIM, WIDE, LARGE>;
  const int bytes = shared_bytes<S>(p, sharing.splits);
  const dim3 blocks(sharing.splits, p.num_kv_heads, unsigned(rows_of(p)));
  Grid grid(blocks, S::THREADS, bytes, stream);
  if (device.compute_major >= 9 && !clusters) grid.overlap();
  if (sharing.cluster && sharing.splits > 1) grid.cluster(sharing.splits);
  if (const cudaError_t error = grid.allow_shared(kernel)) return error;
  if (clusters) return cudaOccupancyMaxActiveClusters(clusters, kernel, &grid.config);
  return cudaLaunchKernelEx(&grid.config, kernel, p, tiles_of(p) / sharing.splits, width_of(p));
}

// f(shape) for the head dims of the call; returns what it returns, or `otherwise` for dims that are not served.
template <int HEAD_DIM, int V_DIM>
struct Dims {
  static constexpr int head_dim = HEAD_DIM, v_dim = V_DIM;
};
template <typename F, typename R>
R with_dims(const Params& p, R otherwise, F f) {
  const int dims = p.head_dim * 1024 + p.v_dim;
  switch (dims) {
    case 64 * 1025: return f(Dims<64, 64>());
    case 80 * 1025: return f(Dims<80, 80>());
    case 96 * 1025: return f(Dims<96, 96>());
    case 128 * 1025: return f(Dims<128, 128>());
    case 192 * 1024 + 128: return f(Dims<192, 128>());
    case 192 * 1025: return f(Dims<192, 192>());
    case 256 * 1025: return f(Dims<256, 256>());
    default: return otherwise;
  }
}

template <typename T, typename C, Form ONE = Form::one>
cudaError_t launch_as(const Params& p, Sharing sharing, const Device& device, cudaStream_t stream, int* clusters) {
  return with_dims(p, cudaErrorInvalidValue, [&](auto dims) {
    constexpr int K = decltype(dims)::head_dim, V = decltype(dims)::v_dim;
    const auto of = [&](auto large) {
      constexpr bool LARGE = decltype(large)::value;
      if constexpr (ONE == Form::one)
        if (p.tokens > 1) return launch<T, C, K, V, true, LARGE, Form::few>;
      return is_wide(p) ? launch<T, C, K, V, true, LARGE, ONE> : launch<T, C, K, V, false, LARGE, ONE>;
    };
    const auto chosen = sharing.cluster ? of(std::true_type()) : of(std::false_type());
    return chosen(p, sharing, device, stream, clusters);
  });
}

}  // namespace
}  // namespace sinkattn::cuda
