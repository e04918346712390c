// The ops decode, prefill and linear for CPU tensors: checks, unpacking, threads. LibTorch's stable ABI is all that is
// used, so one library serves every torch from 2.10 on. Schemas are defined in sinkattn/ops.py, which loads this.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "../tensors.h"
#include "params.h"

namespace sinkattn {
namespace {

constexpr int64_t MAX_LINEAR_ROWS = 64;  // as in sinkattn/ops.py

// Whether the processor multiplies tiles of bfloat16 and Linux lets this process keep them, which it has to ask for.
[[maybe_unused]] bool may_use_amx() {
#if defined(__x86_64__) && defined(__linux__)
  constexpr unsigned AMX_BF16 = 1u << 22, AMX_TILE = 1u << 24;
  constexpr long ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & AMX_BF16) && (d & AMX_TILE) &&
         syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
#else
  return false;
#endif
}

// The fastest that this machine runs, or the one that the environment variable SINKATTN_CPU_ISA names if it runs here.
const Kernels& kernels() {
  static const Kernels& chosen = []() -> const Kernels& {
    const char* wanted = std::getenv("SINKATTN_CPU_ISA");
    [[maybe_unused]] auto allowed = [wanted](const Kernels& k) { return !wanted || !std::strcmp(wanted, k.name); };
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq")) {
      if (__builtin_cpu_supports("avx512bf16")) {
        if (allowed(amx::kernels) && may_use_amx()) return amx::kernels;
        // Intel's take two products in pairs no faster than one by one.
        if (allowed(avx512_bf16::kernels) && (wanted || __builtin_cpu_is("amd"))) return avx512_bf16::kernels;
      }
      if (allowed(avx512::kernels)) return avx512::kernels;
    }
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

Rows rows_of(const Tensor& x) { return {x.data_ptr(), x.stride(0), x.stride(1), x.stride(2)}; }

struct alignas(64) Line {
  float floats[16];
};

// Tasks for a thread at the least: it should have 2^16 multiplications to do. work: a task's.
int64_t grain_of(int64_t work) { return std::max<int64_t>(1, (1 << 16) / std::max<int64_t>(1, work)); }

void run(const Params& p) {
  const Kernels& isa = kernels();
  const int64_t pairs = p.batch * p.num_kv_heads, tasks = pairs * p.blocks_per_pair;
  auto attend = [&](int64_t begin, int64_t end) {
    std::unique_ptr<Line[]> scratch(new Line[isa.scratch_floats(p) / 16 + 1]);
    isa.attend(p, begin, end, scratch[0].floats);
  };
  int64_t keys = *std::max_element(p.lengths, p.lengths + p.batch) + p.tokens;
  if (p.dense_window <= 0) keys = std::min(keys, p.sink_size + p.window_size + p.block_tokens);
  const int64_t grain = grain_of(p.block_tokens * p.group * keys * (p.head_dim + p.v_dim));
  if (p.tokens == 1) {  // a task is all that is done to its pair, and what the token overwrites is seen no more
    torch::stable::parallel_for(0, pairs, grain, [&](int64_t begin, int64_t end) {
      if (p.rotation) isa.rotate_keys(p, begin, end);
      isa.append(p, begin, end);
      attend(begin, end);
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
               const std::optional<Tensor>& learned_logits, const std::optional<Tensor>& alibi_slopes,
               int64_t sink_size, int64_t window_size, double scale, double softcap, int64_t rotary_start,
               bool interleaved, int64_t dense_window) {
  // sinkattn/ops.py calls this first and words the error where it refuses, so what is refused there has to be refused
  // here, before anything is written: but gradients, which it asks for itself.
  for (const Tensor* x : {&q, &k, &v, &k_cache, &v_cache}) {
    STD_TORCH_CHECK(x->dim() == 4 && (x->size(3) < 2 || x->stride(3) == 1),
                    "sinkattn: q, k, v, k_cache and v_cache must have 4 dims, the last of stride 1");
    STD_TORCH_CHECK(x->scalar_type() == q.scalar_type(), "sinkattn: q, k, v, k_cache and v_cache must have one dtype");
  }
  for (const Tensor* x : {&k, &v, &k_cache, &v_cache, &lengths})
    STD_TORCH_CHECK(x->is_cpu(), "sinkattn: all tensors must be on the CPU");
  for (const auto* x : {&counts, &rotation, &learned_logits, &alibi_slopes})
    STD_TORCH_CHECK(!*x || (*x)->is_cpu(), "sinkattn: all tensors must be on the CPU");
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
  STD_TORCH_CHECK(scale > 0, "sinkattn: scale must be positive");
  STD_TORCH_CHECK(has_shape(lengths, {p.batch}) && lengths.scalar_type() == ScalarType::Long &&
                      (!counts || (has_shape(*counts, {p.batch}) && counts->scalar_type() == ScalarType::Long)),
                  "sinkattn: lengths and counts must be int64 (batch,)");
  for (const auto* x : {&learned_logits, &alibi_slopes})
    STD_TORCH_CHECK(!*x || has_shape(**x, {p.num_heads}), "sinkattn: what is per head must be (num_heads,)");
  std::vector<Tensor> copies;
  if (rotation) {
    p.rotary_half = rotation->dim() == 5 ? rotation->size(4) : 0;
    STD_TORCH_CHECK(has_shape(*rotation, {p.batch, p.tokens, 2, 2, p.rotary_half}) && rotary_start >= 0 &&
                        rotary_start + 2 * p.rotary_half <= p.head_dim,
                    "sinkattn: rotation must be (batch, tokens, 2, 2, r / 2), r dims from rotary_start");
    STD_TORCH_CHECK(rotation->scalar_type() == ScalarType::Float || rotation->scalar_type() == ScalarType::Double,
                    "sinkattn: rotation must be float32");
    if (p.rotary_half > 0) p.rotation = data_of<float>(*rotation, ScalarType::Float, copies);
  }
  Tensor out = empty_like(q, {p.batch, p.tokens, p.num_heads, p.v_dim});
  if (p.batch * p.num_heads * p.tokens == 0) return out;

  p.lengths = data_of<int64_t>(lengths, ScalarType::Long, copies);
  STD_TORCH_CHECK(*std::min_element(p.lengths, p.lengths + p.batch) >= 0, "sinkattn: lengths must not be negative");
  if (counts) {
    p.counts = data_of<int64_t>(*counts, ScalarType::Long, copies);
    auto [least, most] = std::minmax_element(p.counts, p.counts + p.batch);
    STD_TORCH_CHECK(*least >= 0 && *most <= p.tokens, "sinkattn: counts must lie between 0 and the number of tokens");
  }
  if (learned_logits) p.learned_logits = data_of<float>(*learned_logits, ScalarType::Float, copies);
  if (alibi_slopes) p.alibi_slopes = data_of<float>(*alibi_slopes, ScalarType::Float, copies);
  p.q = rows_of(q), p.k = rows_of(k), p.v = rows_of(v), p.k_cache = rows_of(k_cache), p.v_cache = rows_of(v_cache);
  p.out = {out.data_ptr(), out.stride(0), out.stride(2), out.stride(1)};
  p.rotated_k = p.k;
  std::unique_ptr<std::byte[]> rotated;
  if (p.rotation) {
    rotated.reset(new std::byte[k.numel() * k.element_size()]);
    const int64_t head_stride = p.tokens * p.head_dim;
    p.rotated_k = {rotated.get(), p.num_kv_heads * head_stride, head_stride, p.head_dim};
  }
  p.group = p.num_heads / p.num_kv_heads;
  p.block_tokens = std::min(p.tokens, std::max<int64_t>(1, kernels().task_rows / p.group));
  p.blocks_per_pair = (p.tokens + p.block_tokens - 1) / p.block_tokens;
  run(p);
  return out;
}

Tensor decode(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& k_cache, const Tensor& v_cache,
              const Tensor& lengths, const std::optional<Tensor>& counts, const std::optional<Tensor>& rotation,
              const std::optional<Tensor>& learned_logits, const std::optional<Tensor>& alibi_slopes, int64_t sink_size,
              int64_t window_size, double scale, double softcap, int64_t rotary_start, bool interleaved) {
  STD_TORCH_CHECK(q.dim() == 4 && q.size(2) == 1, "sinkattn: decode takes one token a row");
  return prefill(q, k, v, k_cache, v_cache, lengths, counts, rotation, learned_logits, alibi_slopes, sink_size,
                 window_size, scale, softcap, rotary_start, interleaved, 0);
}

Tensor linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
              const std::optional<Tensor>& norm_weight, double norm_eps, double norm_shift,
              const std::optional<Tensor>& residual, const std::string& activation) {
  static const std::array<const char*, 4> names = {"", "silu", "gelu_tanh", "gelu"};  // in the order of Activation
  const auto name = std::find(names.begin(), names.end(), activation);
  STD_TORCH_CHECK(name != names.end(), "sinkattn: unknown activation ", activation);
  STD_TORCH_CHECK(x.dim() == 2 && weight.dim() == 2 && x.size(1) == weight.size(1) && x.size(0) <= MAX_LINEAR_ROWS,
                  "sinkattn: linear takes x (up to 64 rows, in_features) and weight (out_features, in_features)");
  Linear p{};
  p.activation = Activation(name - names.begin()), p.dtype = dtype_of(x);
  const int64_t halves = p.activation == Activation::none ? 1 : 2;
  p.rows = x.size(0), p.in_features = x.size(1), p.outputs = weight.size(0) / halves;
  STD_TORCH_CHECK(weight.size(0) % halves == 0, "sinkattn: a gated weight needs an even number of rows");
  STD_TORCH_CHECK(weight.is_cpu() && weight.scalar_type() == x.scalar_type() && weight.stride(1) == 1,
                  "sinkattn: weight must be on the CPU, have the dtype of x and contiguous rows");
  std::vector<Tensor> copies;
  auto pointer = [&](const Tensor& tensor, std::initializer_list<int64_t> shape) {
    STD_TORCH_CHECK(tensor.is_cpu() && has_shape(tensor, shape) && tensor.scalar_type() == x.scalar_type(),
                    "sinkattn: the tensors of linear must fit, be on the CPU and have one dtype");
    return data_of<void>(tensor, x.scalar_type(), copies);
  };
  p.x = pointer(x, {p.rows, p.in_features});
  p.weight = weight.data_ptr(), p.weight_stride = weight.stride(0);
  if (bias) p.bias = pointer(*bias, {weight.size(0)});
  if (norm_weight) p.norm_weight = pointer(*norm_weight, {p.in_features});
  if (residual) p.residual = pointer(*residual, {p.rows, p.outputs});
  p.norm_eps = float(norm_eps), p.norm_shift = float(norm_shift);
  Tensor out = empty_like(x, {p.rows, p.outputs});
  if (p.rows == 0 || p.outputs == 0) return out;
  p.out = out.data_ptr();

  const Kernels& isa = kernels();
  p.h_stride = (p.in_features + 31) / 32 * 32;  // whole vectors of any type
  std::unique_ptr<Line[]> h(new Line[p.rows * p.h_stride / 16]);
  p.h = h.get();
  isa.normalize(p);
  constexpr int64_t outputs = 16;  // of a task: the lanes of the widest vector
  const int64_t grain = grain_of(outputs * p.rows * p.in_features);
  torch::stable::parallel_for(0, (p.outputs + outputs - 1) / outputs, grain, [&](int64_t begin, int64_t end) {
    isa.multiply(p, outputs * begin, std::min(outputs * end, p.outputs));
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sinkattn, CPU, m) {
  m.impl("decode", TORCH_BOX(&decode));
  m.impl("prefill", TORCH_BOX(&prefill));
  m.impl("linear", TORCH_BOX(&linear));
}

// "amx", "avx512_bf16", "avx512", "avx2" or "portable": what runs here. For ctypes.
extern "C" __attribute__((visibility("default"))) const char* sinkattn_cpu_isa() { return kernels().name; }

}  // namespace sinkattn
