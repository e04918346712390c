// sinkattn::decode and sinkattn::prefill for CPU tensors: checks, unpacking, threads. LibTorch's stable ABI is all that
// is used, so one library serves every torch from 2.10 on. Schemas are defined in sinkattn/ops.py, which loads this.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <optional>

#include "params.h"

namespace sinkattn {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The fastest that this machine runs, or the one that the environment variable SINKATTN_CPU_ISA names if it runs here.
const Kernels& kernels() {
  static const Kernels& chosen = []() -> const Kernels& {
    const char* wanted = std::getenv("SINKATTN_CPU_ISA");
    [[maybe_unused]] auto allowed = [wanted](const Kernels& k) { return !wanted || !std::strcmp(wanted, k.name); };
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq") && allowed(avx512::kernels))
      return avx512::kernels;
    // Every processor with AVX2 has F16C, which old compilers cannot ask for.
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && allowed(avx2::kernels)) return avx2::kernels;
#endif
    return portable::kernels;
  }();
  return chosen;
}

DType dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return DType::float32;
    case ScalarType::Half: return DType::float16;
    case ScalarType::BFloat16: return DType::bfloat16;
    default: STD_TORCH_CHECK(false, "sinkattn: q must be float16, bfloat16 or float32");
  }
}

bool has_shape(const Tensor& x, std::initializer_list<int64_t> shape) {
  auto sizes = x.sizes();
  return std::equal(sizes.begin(), sizes.end(), shape.begin(), shape.end());
}

Tensor with_contiguous_rows(const Tensor& x) {
  return x.size(3) > 1 && x.stride(3) != 1 ? torch::stable::contiguous(x) : x;
}

Rows rows_of(const Tensor& x) { return {x.data_ptr(), x.stride(0), x.stride(1), x.stride(2)}; }

Tensor contiguous_floats(const Tensor& x) {
  return torch::stable::contiguous(x.scalar_type() == ScalarType::Float ? x : torch::stable::to(x, ScalarType::Float));
}

struct alignas(64) Line {
  float floats[16];
};

void run(const Params& p) {
  const Kernels& isa = kernels();
  const int64_t pairs = p.batch * p.num_kv_heads, tasks = pairs * p.blocks_per_pair;
  auto attend = [&](int64_t begin, int64_t end) {
    std::unique_ptr<Line[]> scratch(new Line[isa.scratch_floats(p) / 16 + 1]);
    isa.attend(p, begin, end, scratch[0].floats);
  };
  // A thread should have 2^16 multiplications to do; a task has about this many.
  int64_t keys = *std::max_element(p.lengths, p.lengths + p.batch) + p.tokens;
  if (p.dense_window <= 0) keys = std::min(keys, p.sink_size + p.window_size + p.block_tokens);
  const int64_t work = p.block_tokens * p.group * keys * (p.head_dim + p.v_dim);
  const int64_t grain = std::max<int64_t>(1, (1 << 16) / std::max<int64_t>(1, work));
  if (p.tokens == 1) {  // a task is all that is done to its pair
    torch::stable::parallel_for(0, pairs, grain, [&](int64_t begin, int64_t end) {
      if (p.rotation) isa.rotate_keys(p, begin, end);
      attend(begin, end);
      isa.append(p, begin, end);
    });
  } else {  // the cache changes when nobody reads it any more
    auto rotate_keys = [&](int64_t begin, int64_t end) { isa.rotate_keys(p, begin, end); };
    auto append = [&](int64_t begin, int64_t end) { isa.append(p, begin, end); };
    if (p.rotation) torch::stable::parallel_for(0, pairs, grain, rotate_keys);
    torch::stable::parallel_for(0, tasks, grain, attend);
    torch::stable::parallel_for(0, pairs, grain, append);
  }
}

Tensor prefill(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& k_cache, const Tensor& v_cache,
               const Tensor& lengths, const std::optional<Tensor>& counts, const std::optional<Tensor>& rotation,
               const std::optional<Tensor>& learned_logits, const std::optional<Tensor>& alibi_slopes, int64_t sink_size,
               int64_t window_size, double scale, double softcap, int64_t rotary_start, bool interleaved,
               int64_t dense_window) {
  // sinkattn/ops.py checks with better messages; these keep a direct call from reading or writing out of bounds.
  for (const Tensor* x : {&q, &k, &v, &k_cache, &v_cache}) {
    STD_TORCH_CHECK(x->dim() == 4, "sinkattn: q, k, v, k_cache and v_cache must have 4 dims");
    STD_TORCH_CHECK(x->scalar_type() == q.scalar_type(), "sinkattn: q, k, v, k_cache and v_cache must have one dtype");
  }
  Params p{};
  p.dtype = dtype_of(q);
  p.batch = q.size(0), p.num_heads = q.size(1), p.tokens = q.size(2), p.head_dim = q.size(3);
  p.num_kv_heads = v.size(1), p.v_dim = v.size(3);
  p.sink_size = sink_size, p.window_size = window_size, p.dense_window = dense_window;
  p.ring_size = k_cache.size(2) - sink_size;
  p.scale = float(scale), p.softcap = float(softcap);
  p.rotary_start = rotary_start, p.interleaved = interleaved;
  const int64_t slots = k_cache.size(2);
  STD_TORCH_CHECK(p.num_kv_heads > 0 && p.num_heads % p.num_kv_heads == 0 &&
                      has_shape(k, {p.batch, p.num_kv_heads, p.tokens, p.head_dim}) &&
                      has_shape(v, {p.batch, p.num_kv_heads, p.tokens, p.v_dim}) &&
                      has_shape(k_cache, {p.batch, p.num_kv_heads, slots, p.head_dim}) &&
                      has_shape(v_cache, {p.batch, p.num_kv_heads, slots, p.v_dim}),
                  "sinkattn: the shapes of q, k, v, k_cache and v_cache do not fit");
  STD_TORCH_CHECK(p.head_dim <= MAX_HEAD_DIM && p.v_dim <= MAX_HEAD_DIM, "sinkattn: head_dim is above ", MAX_HEAD_DIM);
  STD_TORCH_CHECK(sink_size >= 0 && window_size >= 1 && window_size <= p.ring_size,
                  "sinkattn: sink_size and window_size do not fit the cache");

  Tensor out = torch::stable::new_empty(q, {p.batch, p.tokens, p.num_heads, p.v_dim});
  if (p.batch * p.num_heads * p.tokens == 0) return out;

  Tensor row_lengths = torch::stable::contiguous(lengths), row_counts = lengths, angles = q, logits = q, slopes = q;
  STD_TORCH_CHECK(has_shape(lengths, {p.batch}) && lengths.scalar_type() == ScalarType::Long,
                  "sinkattn: lengths must be int64 (batch,)");
  p.lengths = static_cast<const int64_t*>(row_lengths.data_ptr());
  STD_TORCH_CHECK(*std::min_element(p.lengths, p.lengths + p.batch) >= 0, "sinkattn: lengths must not be negative");
  if (counts) {
    STD_TORCH_CHECK(has_shape(*counts, {p.batch}) && counts->scalar_type() == ScalarType::Long,
                    "sinkattn: counts must be int64 (batch,)");
    row_counts = torch::stable::contiguous(*counts);
    p.counts = static_cast<const int64_t*>(row_counts.data_ptr());
    auto [least, most] = std::minmax_element(p.counts, p.counts + p.batch);
    STD_TORCH_CHECK(*least >= 0 && *most <= p.tokens, "sinkattn: counts must lie between 0 and the number of tokens");
  }
  if (rotation) {
    p.rotary_half = rotation->dim() == 5 ? rotation->size(4) : 0;
    STD_TORCH_CHECK(has_shape(*rotation, {p.batch, p.tokens, 2, 2, p.rotary_half}) && rotary_start >= 0 &&
                        rotary_start + 2 * p.rotary_half <= p.head_dim,
                    "sinkattn: rotation must be (batch, tokens, 2, 2, r / 2), r dims from rotary_start");
    angles = contiguous_floats(*rotation);
    if (p.rotary_half > 0) p.rotation = static_cast<const float*>(angles.data_ptr());
  }
  if (learned_logits) {
    STD_TORCH_CHECK(has_shape(*learned_logits, {p.num_heads}), "sinkattn: learned_logits must be (num_heads,)");
    logits = contiguous_floats(*learned_logits);
    p.learned_logits = static_cast<const float*>(logits.data_ptr());
  }
  if (alibi_slopes) {
    STD_TORCH_CHECK(has_shape(*alibi_slopes, {p.num_heads}), "sinkattn: alibi_slopes must be (num_heads,)");
    slopes = contiguous_floats(*alibi_slopes);
    p.alibi_slopes = static_cast<const float*>(slopes.data_ptr());
  }

  const Tensor q_rows = with_contiguous_rows(q), k_rows = with_contiguous_rows(k), v_rows = with_contiguous_rows(v);
  Tensor k_slots = with_contiguous_rows(k_cache), v_slots = with_contiguous_rows(v_cache);
  p.q = rows_of(q_rows), p.k = rows_of(k_rows), p.v = rows_of(v_rows);
  p.k_cache = rows_of(k_slots), p.v_cache = rows_of(v_slots);
  p.out = {out.data_ptr(), out.stride(0), out.stride(2), out.stride(1)};
  p.rotated_k = p.k;
  std::unique_ptr<std::byte[]> rotated;
  if (p.rotation) {
    rotated.reset(new std::byte[k.numel() * k.element_size()]);
    const int64_t head_stride = p.tokens * p.head_dim;
    p.rotated_k = {rotated.get(), p.num_kv_heads * head_stride, head_stride, p.head_dim};
  }
  constexpr int64_t rows_wanted = 64;  // of a task: enough to share what they load, few enough for the L2 cache
  p.group = p.num_heads / p.num_kv_heads;
  p.block_tokens = std::min(p.tokens, std::max<int64_t>(1, rows_wanted / p.group));
  p.blocks_per_pair = (p.tokens + p.block_tokens - 1) / p.block_tokens;
  run(p);

  Tensor cache = k_cache;
  if (k_slots.data_ptr() != k_cache.data_ptr()) torch::stable::copy_(cache, k_slots);
  cache = v_cache;
  if (v_slots.data_ptr() != v_cache.data_ptr()) torch::stable::copy_(cache, v_slots);
  return out;
}

Tensor decode(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& k_cache, const Tensor& v_cache,
              const Tensor& lengths, const std::optional<Tensor>& counts, const std::optional<Tensor>& rotation,
              const std::optional<Tensor>& learned_logits, const std::optional<Tensor>& alibi_slopes, int64_t sink_size,
              int64_t window_size, double scale, double softcap, int64_t rotary_start, bool interleaved) {
  return prefill(q, k, v, k_cache, v_cache, lengths, counts, rotation, learned_logits, alibi_slopes, sink_size,
                 window_size, scale, softcap, rotary_start, interleaved, 0);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sinkattn, CPU, m) {
  m.impl("decode", TORCH_BOX(&decode));
  m.impl("prefill", TORCH_BOX(&prefill));
}

// "avx512", "avx2" or "portable": what runs here. For ctypes.
extern "C" __attribute__((visibility("default"))) const char* sinkattn_cpu_isa() { return kernels().name; }

}  // namespace sinkattn
