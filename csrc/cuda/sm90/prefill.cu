// A chunk of new tokens per row, for Hopper (sm_90a), in two launches: `gather`, in gather.cu, and `attend`, here. With a
// cache in 8 bits `round`, in round.cu, comes between them, and nothing here knows.
//
// Floor: 4 * head_dim FLOPs for each query head and visible pair of query and key, at the speed of the tensor cores.
// What it takes to get near it:
//
// * Keys come in the order of the text. The first launch turns those of the chunk and puts what the ring holds, and the
//   sinks, in order and without what is empty into scratch: after that a band is all there is, and no value is NaN.
// * A block keeps a multiprocessor and takes tiles of 128 queries, one after the other. One warp asks the copy engine
//   for tiles of 128 keys and values, seven turn queries by both angles ahead of their use, and two warpgroups of 64
//   queries multiply: both products by wgmma, weights as registers.
// * A tile has the queries of up to four heads that share a key head: they need the same angles, which are four times
//   as many bytes as a query.
// * Heads wider than 128 meet 48 keys at a time, which is what fits beside the queries. With more than 192 dims there is
//   no room for the next tile's queries, nor registers for those who turn them: the warpgroups turn their own.
// * Heads are columns of 64 dims, of which products take as many as there are, in steps of 16. The copy engine fills a
//   column that the head does not with zeros.
// * While one product runs, the softmax of the one before is worked out, in the same warpgroup and in the other one:
//   they take turns in asking for products. The first scores of a tile are asked for before the last one is put away.
// * Only tiles that an edge of the band goes through take a mask. Sinks come 16 at a time, in products of that size,
//   unless they are keys like others: to the queries of a new text that see all of it, and turn by the same angles for
//   sinks, as who turns them finds.
#include "prefill_kernel.h"

namespace sinkattn::cuda {
namespace {

// How the copy engine reads (batch, heads, tokens or rows, dim): columns of 64 dims and `box_rows` rows.
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

template <typename T, int DIM, bool ADJUSTED>
cudaError_t launch(const Prefill& p, int multiprocessors, cudaStream_t stream) {
  const Scratch<T> scratch(p);
  constexpr int KEYS = Shape<DIM>::KEYS;
  const int kv_heads = p.num_kv_heads;

  Maps maps;
  auto packed = [&](CUtensorMap& map, const void* x, int rows, int box_rows) {
    const int64_t head = int64_t(rows) * p.head_dim;
    return map_of<T>(map, p, x, kv_heads, rows, kv_heads * head, head, p.head_dim, box_rows);
  };
  bool mapped =
      packed(maps.ring_keys, scratch.ring_k, ring_rows(p), KEYS) &&
      packed(maps.ring_values, scratch.ring_v, ring_rows(p), KEYS) &&
      packed(maps.sink_keys, scratch.sink_k, sink_rows(p), SINKS) &&
      packed(maps.sink_values, scratch.sink_v, sink_rows(p), SINKS) &&
      (p.stored != Stored::same
           ? packed(maps.values, scratch.values, p.tokens, KEYS)
           : map_of<T>(maps.values, p, p.v, kv_heads, p.tokens, p.v_row, p.v_head, p.v_token, KEYS));
  mapped =
      mapped && (p.rotation || p.stored != Stored::same
                     ? packed(maps.keys, scratch.turned, p.tokens, KEYS)
                     : map_of<T>(maps.keys, p, p.k, kv_heads, p.tokens, p.k_row, p.k_head, p.k_token, KEYS));
  if (!mapped) return cudaErrorInvalidValue;

  const auto kernel = attend_kernel<T, DIM, ADJUSTED>;
  const int64_t tiles = tiles_of(p);
  Grid grid(dim3(tiles < multiprocessors ? tiles : multiprocessors), Shape<DIM>::THREADS, Shape<DIM>::SHARED, stream);
  grid.overlap();
  cudaError_t error = grid.allow_shared(kernel);
  if (error == cudaSuccess) error = gather(p, stream);  // from here on the cache changes, and nothing is refused
  if (error == cudaSuccess && p.stored != Stored::same) error = round(p, stream);
  if (error == cudaSuccess) error = cudaLaunchKernelEx(&grid.config, kernel, p, maps);
  return error;
}

template <typename T, int DIM>
cudaError_t launch(const Prefill& p, int multiprocessors, cudaStream_t stream) {
  const bool adjusted = p.softcap > 0 || p.alibi_slopes;
  return (adjusted ? launch<T, DIM, true> : launch<T, DIM, false>)(p, multiprocessors, stream);
}

template <typename T>
cudaError_t launch_as(const Prefill& p, int multiprocessors, cudaStream_t stream) {
  const int dim = p.head_dim;
  const auto chosen = dim <= 64    ? launch<T, 64>
                      : dim <= 80  ? launch<T, 80>
                      : dim <= 96  ? launch<T, 96>
                      : dim <= 128 ? launch<T, 128>
                      : dim <= 192 ? launch<T, 192>
                                   : launch<T, 256>;
  return chosen(p, multiprocessors, stream);
}

}  // namespace

bool serves(const Prefill& p) {
  return p.head_dim > 0 && p.head_dim % 8 == 0 && p.head_dim <= 256 && p.sink_size <= keys_of(p.head_dim) &&
         p.batch <= 65535 && tiles_of(p) < (1 << 30);
}

int64_t scratch_elements(const Prefill& p) {
  Prefill from_zero = p;
  from_zero.scratch = nullptr;
  const Scratch<char> scratch(from_zero);
  return reinterpret_cast<intptr_t>(scratch.end);
}

cudaError_t prefill(const Prefill& p, int multiprocessors, cudaStream_t stream) {
  if (p.is_bfloat16) return launch_as<__nv_bfloat16>(p, multiprocessors, stream);
  return launch_as<__half>(p, multiprocessors, stream);
}

}  // namespace sinkattn::cuda
