// csrc/cuda/sm90/gather.cu and round.cu, the first launches of prefill, emulated, for ctypes.
#include "cuda/sm90/gather.cu"
#include "cuda/sm90/round.cu"

using namespace sinkattn;
using namespace sinkattn::cuda;

// sizes: batch, heads, key heads, tokens, head dim, S, R, W, first rotated dim, rotated dims / 2, interleaved, bfloat16, seed,
// what the cache holds (as Stored counts). All tensors are contiguous, k and v (batch, heads, tokens, dim). places: where in
// scratch turned, values, ring_k, ring_v, sink_k, sink_v begin, and its end, in numbers; without k nothing else is done.
extern "C" int run_gather(const int64_t* sizes, int64_t* places, const void* k, const void* v, void* k_cache, void* v_cache,
                          void* out, const int64_t* lengths, const int64_t* counts, const float* rotation, float* k_scales,
                          float* v_scales, void* scratch) {
  Prefill p = {};
  p.batch = int(sizes[0]), p.num_kv_heads = int(sizes[2]), p.group = int(sizes[1] / sizes[2]), p.tokens = int(sizes[3]);
  p.head_dim = p.v_dim = int(sizes[4]), p.sink_size = int(sizes[5]), p.ring_size = int(sizes[6]);
  p.window_size = int(sizes[7]), p.rotary_start = int(sizes[8]), p.rotary_half = int(sizes[9]), p.interleaved = sizes[10];
  p.is_bfloat16 = sizes[11], emulated::seed = unsigned(sizes[12]), p.stored = Stored(sizes[13]);
  p.k = k, p.v = v, p.k_cache = k_cache, p.v_cache = v_cache, p.out = out, p.lengths = lengths, p.counts = counts;
  p.rotation = p.rotary_half > 0 ? rotation : nullptr, p.k_scales = k_scales, p.v_scales = v_scales, p.scratch = scratch;
  const int64_t slots = p.sink_size + p.ring_size;
  p.k_token = p.v_token = p.head_dim, p.k_head = p.v_head = p.tokens * p.head_dim;
  p.k_row = p.v_row = sizes[2] * p.k_head;
  p.k_cache_slot = p.v_cache_slot = p.head_dim, p.k_cache_head = p.v_cache_head = slots * p.head_dim;
  p.k_cache_row = p.v_cache_row = sizes[2] * p.k_cache_head;
  p.k_scale_slot = p.v_scale_slot = 1, p.k_scale_head = p.v_scale_head = slots;
  p.k_scale_row = p.v_scale_row = sizes[2] * slots;
  const Scratch<uint16_t> at(p);
  const uint16_t* all[] = {at.turned, at.values, at.ring_k, at.ring_v, at.sink_k, at.sink_v, at.end};
  for (int i = 0; i < 7; ++i) places[i] = all[i] - static_cast<uint16_t*>(scratch);
  if (!k) return 0;
  const cudaError_t error = gather(p, nullptr);
  return error == cudaSuccess && p.stored != Stored::same ? int(round(p, nullptr)) : int(error);
}
