// csrc/cuda/sm90/gather.cu, prefill.cu and round.cu, emulated, for ctypes.
#include "cuda/sm90/gather.cu"
#include "cuda/sm90/prefill.cu"
#include "cuda/sm90/round.cu"

using namespace sinkattn;
using namespace sinkattn::cuda;

// sizes: batch, heads, key heads, tokens, head dim, S, R, W, first rotated dim, rotated dims / 2, interleaved, bfloat16,
// dense window, multiprocessors, seed. All tensors are contiguous, q, k and v (batch, heads, tokens, dim). Returns the
// elements of scratch where that is null, -1 where the call is not served.
extern "C" int64_t run_prefill(const int64_t* sizes, const double* scale, const void* q, const void* k, const void* v,
                               void* k_cache, void* v_cache, void* out, const int64_t* lengths, const int64_t* counts,
                               const float* rotation, const float* learned_logits, const float* alibi_slopes,
                               void* scratch) {
  Prefill p = {};
  p.batch = int(sizes[0]), p.num_kv_heads = int(sizes[2]), p.group = int(sizes[1] / sizes[2]), p.tokens = int(sizes[3]);
  p.head_dim = p.v_dim = int(sizes[4]), p.sink_size = int(sizes[5]), p.ring_size = int(sizes[6]);
  p.window_size = int(sizes[7]), p.rotary_start = int(sizes[8]), p.rotary_half = int(sizes[9]), p.interleaved = sizes[10];
  p.is_bfloat16 = sizes[11], emulated::seed = unsigned(sizes[14]);
  p.reach = int(min(sizes[12] > 0 ? sizes[12] : sizes[7], sizes[7] + sizes[3]));
  p.furthest = sizes[12] > 0 ? 1 << 30 : p.sink_size + p.window_size - 1;
  p.q = q, p.k = k, p.v = v, p.k_cache = k_cache, p.v_cache = v_cache, p.out = out, p.scratch = scratch;
  p.lengths = lengths, p.counts = counts, p.rotation = p.rotary_half > 0 ? rotation : nullptr;
  p.learned_logits = learned_logits, p.alibi_slopes = alibi_slopes;
  p.q_token = p.k_token = p.v_token = p.head_dim;
  p.q_head = p.k_head = p.v_head = p.tokens * p.head_dim;
  p.q_row = sizes[1] * p.q_head, p.k_row = p.v_row = sizes[2] * p.k_head;
  p.k_cache_slot = p.v_cache_slot = p.head_dim;
  p.k_cache_head = p.v_cache_head = int64_t(p.sink_size + p.ring_size) * p.head_dim;
  p.k_cache_row = p.v_cache_row = sizes[2] * p.k_cache_head;
  const double LOG2E = 1.4426950408889634;
  p.softcap = float(scale[1]), p.query_scale = float(LOG2E * (scale[1] > 0 ? 2 * scale[0] / scale[1] : scale[0]));
  if (!serves(p)) return -1;
  if (!scratch) return scratch_elements(p);
  return int(prefill(p, int(sizes[13]), nullptr));
}
