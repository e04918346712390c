// csrc/cuda/sm80/decode.cu and the files for caches in 8 bits and pages, emulated, for ctypes: without clusters.
#include "cuda/sm80/decode.cu"
#include "cuda/sm80/decode_e4m3.cu"
#include "cuda/sm80/decode_int8.cu"
#include "cuda/sm80/decode_pages.cu"

using namespace sinkattn;
using namespace sinkattn::cuda;

// sizes: batch, heads, key heads, tokens, head dim, v dim, S, R, W, first rotated dim, rotated dims / 2, interleaved,
// bfloat16, splits, early (whether the cache is read early), seed, what the cache holds (as Stored counts). All tensors are
// contiguous, q, k and v (batch, heads, tokens, dim); counters and partials as in csrc/cuda/decode.h.
extern "C" int run_decode(const int64_t* sizes, const double* scale, const void* q, const void* k, const void* v, void* k_cache,
                          void* v_cache, void* out, const int64_t* lengths, const int64_t* counts, const float* rotation,
                          const float* learned_logits, const float* alibi_slopes, float* k_scales, float* v_scales,
                          float* partials, int* arrivals) {
  Params p = {};
  p.batch = int(sizes[0]), p.num_kv_heads = int(sizes[2]), p.group = int(sizes[1] / sizes[2]), p.tokens = int(sizes[3]);
  p.head_dim = int(sizes[4]), p.v_dim = int(sizes[5]), p.sink_size = int(sizes[6]), p.ring_size = int(sizes[7]);
  p.window_size = int(sizes[8]), p.rotary_start = int(sizes[9]), p.rotary_half = int(sizes[10]), p.interleaved = sizes[11];
  p.is_bfloat16 = sizes[12], p.overlap = sizes[14], emulated::seed = unsigned(sizes[15]);
  p.q = q, p.k = k, p.v = v, p.k_cache = k_cache, p.v_cache = v_cache, p.out = out;
  p.lengths = lengths, p.counts = counts, p.rotation = p.rotary_half > 0 ? rotation : nullptr;
  p.learned_logits = learned_logits, p.alibi_slopes = alibi_slopes, p.partials = partials, p.arrivals = arrivals;
  p.q_token = p.k_token = p.head_dim, p.v_token = p.v_dim;
  p.q_head = p.k_head = p.tokens * p.head_dim, p.v_head = p.tokens * p.v_dim;
  p.q_row = sizes[1] * p.q_head, p.k_row = sizes[2] * p.k_head, p.v_row = sizes[2] * p.v_head;
  const int64_t slots = p.sink_size + p.ring_size;
  p.k_cache_slot = p.head_dim, p.k_cache_head = slots * p.head_dim, p.k_cache_row = sizes[2] * p.k_cache_head;
  p.v_cache_slot = p.v_dim, p.v_cache_head = slots * p.v_dim, p.v_cache_row = sizes[2] * p.v_cache_head;
  p.stored = Stored(sizes[16]), p.k_scales = k_scales, p.v_scales = v_scales;
  p.k_scale_slot = p.v_scale_slot = 1, p.k_scale_head = p.v_scale_head = slots;
  p.k_scale_row = p.v_scale_row = sizes[2] * slots;
  const double LOG2E = 1.4426950408889634;
  p.softcap = float(scale[1]), p.query_scale = float(LOG2E * (scale[1] > 0 ? 2 * scale[0] / scale[1] : scale[0]));
  Device device;
  device.multiprocessors = 16, device.shared_bytes = emulated::SHARED_BYTES, device.compute_major = 9;
  const Sharing sharing = {int(sizes[13]), false};
  return serves(p, sharing, device) ? int(decode(p, sharing, device, nullptr)) : -1;
}

// Over pages. sizes: texts, heads, key heads, tokens, head dim, v dim, S, W, slots of a page, entries of a text's row of the
// table, first rotated dim, rotated dims / 2, interleaved, bfloat16, splits, early, seed. q, k and v are contiguous, pages
// (blocks, key heads, slots, head dim + v dim).
extern "C" int run_pages(const int64_t* sizes, const double* scale, const void* q, const void* k, const void* v, void* pages,
                         void* out, const int* starts, const int* lengths, const int* table, const float* rotation,
                         float* partials, int* arrivals) {
  Params p = {};
  p.batch = int(sizes[0]), p.num_kv_heads = int(sizes[2]), p.group = int(sizes[1] / sizes[2]), p.tokens = 1;
  p.all_tokens = int(sizes[3]), p.head_dim = int(sizes[4]), p.v_dim = int(sizes[5]), p.sink_size = int(sizes[6]);
  p.window_size = int(sizes[7]), p.ring_size = PAGED_RING - p.sink_size, p.page_size = int(sizes[8]), p.table_row = sizes[9];
  p.rotary_start = int(sizes[10]), p.rotary_half = int(sizes[11]), p.interleaved = sizes[12], p.is_bfloat16 = sizes[13];
  p.overlap = sizes[15], emulated::seed = unsigned(sizes[16]);
  p.q = q, p.k = k, p.v = v, p.out = out, p.k_cache = pages, p.v_cache = static_cast<uint16_t*>(pages) + p.head_dim;
  p.starts = starts, p.text_lengths = lengths, p.table = table, p.rotation = p.rotary_half > 0 ? rotation : nullptr;
  p.partials = partials, p.arrivals = arrivals;
  p.q_head = p.k_head = p.head_dim, p.v_head = p.v_dim;
  p.q_row = sizes[1] * p.head_dim, p.k_row = sizes[2] * p.head_dim, p.v_row = sizes[2] * p.v_dim;
  p.k_cache_slot = p.v_cache_slot = p.head_dim + p.v_dim, p.k_cache_head = p.v_cache_head = p.page_size * p.k_cache_slot;
  p.k_cache_row = p.v_cache_row = sizes[2] * p.k_cache_head;
  const double LOG2E = 1.4426950408889634;
  p.softcap = float(scale[1]), p.query_scale = float(LOG2E * (scale[1] > 0 ? 2 * scale[0] / scale[1] : scale[0]));
  Device device;
  device.multiprocessors = 16, device.shared_bytes = emulated::SHARED_BYTES, device.compute_major = 8;
  const Sharing sharing = {int(sizes[14]), false};
  return serves(p, sharing, device) ? int(decode(p, sharing, device, nullptr)) : -1;
}
