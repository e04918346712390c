// The ops decode, prefill, attend_pages and linear for CPU tensors: checks, unpacking, threads. LibTorch's stable ABI is
// all that is used, so one library serves every torch from 2.10 on. Schemas are defined in sinkattn/schemas.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "../arguments.h"
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

#if defined(__x86_64__)
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
bool has_amx() { return has_avx512_bf16() && may_use_amx(); }
// Every processor with AVX2 has F16C, which old compilers cannot ask for.
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
#endif
bool has_any() { return true; }

// Kernels of an instruction set, and whether the processor runs it.
struct InstructionSet {
  const Kernels& kernels;
  bool (*runs)();
};
const InstructionSet INSTRUCTION_SETS[] = {  // fastest first
#if defined(__x86_64__)
    {amx::kernels, has_amx},
    {avx512_bf16::kernels, has_avx512_bf16},
    {avx512::kernels, has_avx512},
    {avx2::kernels, has_avx2},
#endif
    {portable::kernels, has_any},
};

// The fastest that runs here or, where the environment variable SINKATTN_CPU_ISA is set, the one it names. If that does
// not run here, there are no kernels, but an error.
struct Choice {
  const Kernels* kernels = nullptr;
  std::string error;

  Choice() {
#if defined(__x86_64__)
    __builtin_cpu_init();
#endif
    const char* variable = std::getenv("SINKATTN_CPU_ISA");
    const std::string wanted = variable ? variable : "";
    for (const auto& [set, runs] : INSTRUCTION_SETS)
      if ((wanted.empty() ? is_fast(set) : wanted == set.name) && runs()) {
        kernels = &set;
        return;
      }
    std::string names, running;
    for (const auto& [set, runs] : INSTRUCTION_SETS) {
      names += (names.empty() ? "" : ", ") + std::string(set.name);
      if (runs()) running += (running.empty() ? "" : ", ") + std::string(set.name);
    }
    error = "SINKATTN_CPU_ISA=" + wanted + ": choose one of " + names + "; this processor runs " + running;
  }

 private:
  static bool is_fast(const Kernels& set) {
#if defined(__x86_64__)
    // Intel's take two products in pairs no faster than one by one.
    return &set != &avx512_bf16::kernels || __builtin_cpu_is("amd");
#else
    return true;
#endif
  }
};
const Choice& choice() {
  static const Choice chosen;
  return chosen;
}
const Kernels& kernels() {
  STD_TORCH_CHECK(choice().kernels, choice().error);
  return *choice().kernels;
}

DType dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return DType::float32;
    case ScalarType::Half: return DType::float16;
    case ScalarType::BFloat16: return DType::bfloat16;
    default: STD_TORCH_CHECK(false, "sinkattn: q must be float16, bfloat16 or float32");
  }
}

DType stored_of(const Tensor& x) { return x.scalar_type() == ScalarType::Char ? DType::int8 : DType::float8; }

Rows rows_of(const Tensor& x) { return {x.data_ptr(), x.stride(0), x.stride(1), x.stride(2)}; }

struct alignas(64) Line {
  float floats[16];
};

// Tasks for a thread at the least: it should have 2^16 multiplications to do. work: a task's.
int64_t grain_of(int64_t work) { return std::max<int64_t>(1, (1 << 16) / std::max<int64_t>(1, work)); }

// longest: tokens that a row or a text holds at most, with those of the call.
void run(const Params& p, int64_t longest) {
  const Kernels& isa = kernels();
  const int64_t pairs = p.batch * p.num_kv_heads;
  const int64_t tasks = p.spans ? p.num_spans * p.num_kv_heads : pairs * p.blocks_per_pair;
  auto attend = [&](int64_t begin, int64_t end) {
    std::unique_ptr<Line[]> scratch(new Line[isa.scratch_floats(p) / 16 + 1]);
    isa.attend(p, begin, end, scratch[0].floats);
  };
  int64_t keys = longest;
  if (p.dense_window <= 0) keys = std::min(keys, p.sink_size + p.window_size + p.block_tokens);
  const int64_t grain = grain_of(p.block_tokens * p.group * keys * (p.head_dim + p.v_dim));
  const bool prepares = p.new_k.data != p.k.data;
  if (p.tokens == 1 && !p.spans) {  // a task is all that is done to its pair, and what the token overwrites is seen no more
    torch::stable::parallel_for(0, pairs, grain, [&](int64_t begin, int64_t end) {
      if (prepares) isa.prepare(p, begin, end);
      isa.append(p, begin, end);
      attend(begin, end);
    });
  } else {  // a ring changes when nobody reads it any more; pages have room, and what is new is read there
    auto prepare = [&](int64_t begin, int64_t end) { isa.prepare(p, begin, end); };
    auto append = [&](int64_t begin, int64_t end) { isa.append(p, begin, end); };
    if (prepares) torch::stable::parallel_for(0, pairs, grain, prepare);
    if (p.spans) torch::stable::parallel_for(0, pairs, grain, append);
    torch::stable::parallel_for(0, tasks, grain, attend);
    if (!p.spans) torch::stable::parallel_for(0, pairs, grain, append);
  }
}

void take_sizes(Params& p, const Sizes& sizes) {
  p.sink_size = sizes.sink_size, p.window_size = sizes.window_size;
  p.scale = float(sizes.scale), p.softcap = float(sizes.softcap);
  p.rotary_start = sizes.rotary_start, p.interleaved = sizes.interleaved;
}
void take_rotation(Params& p, const std::optional<Tensor>& rotation, std::vector<Tensor>& copies) {
  if (!rotation) return;
  p.rotary_half = rotation->size(rotation->dim() - 1);
  if (p.rotary_half > 0) p.rotation = data_of<float>(*rotation, ScalarType::Float, copies);
}

Tensor attend(const Tensors& x, const Sizes& sizes, int64_t dense_window, const std::optional<Tensor>& joined_values,
              const std::optional<Tensor>& joined_logits) {
  check(x, sizes);
  const auto& [q, k, v, k_cache, v_cache, lengths, counts, rotation, learned_logits, alibi_slopes, k_scales,
               v_scales] = x;
  STD_TORCH_CHECK(q.is_cpu(), "sinkattn: all tensors must be on the CPU");
  Params p{};
  p.dtype = dtype_of(q), p.stored = k_scales ? stored_of(k_cache) : p.dtype;
  p.batch = q.size(0), p.num_heads = q.size(1), p.tokens = q.size(2), p.head_dim = q.size(3);
  p.num_kv_heads = v.size(1), p.v_dim = v.size(3);
  take_sizes(p, sizes);
  p.ring_size = k_cache.size(2) - p.sink_size, p.dense_window = dense_window;
  STD_TORCH_CHECK(p.head_dim <= MAX_HEAD_DIM && p.v_dim <= MAX_HEAD_DIM, "sinkattn: head_dim is above ", MAX_HEAD_DIM);
  std::vector<Tensor> copies;
  take_rotation(p, rotation, copies);
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
  const Joined joined = joined_of(x, joined_values, joined_logits, copies);
  p.joined_values = joined.values, p.joined_logits = joined.logits, p.joined_parts = joined.parts;
  p.q = rows_of(q), p.k = rows_of(k), p.v = rows_of(v), p.k_cache = rows_of(k_cache), p.v_cache = rows_of(v_cache);
  p.out = {out.data_ptr(), out.stride(0), out.stride(2), out.stride(1)};
  p.new_k = p.k, p.new_v = p.v;
  std::unique_ptr<std::byte[]> new_k, new_v;
  std::unique_ptr<float[]> new_scales;
  const int64_t new_rows = p.batch * p.num_kv_heads * p.tokens;
  auto packed = [&](void* data, int64_t dim) {
    return Rows{data, p.num_kv_heads * p.tokens * dim, p.tokens * dim, dim};
  };
  if (p.rotation || k_scales) {
    new_k.reset(new std::byte[new_rows * p.head_dim * k_cache.element_size()]);
    p.new_k = packed(new_k.get(), p.head_dim);
  }
  if (k_scales) {
    new_v.reset(new std::byte[new_rows * p.v_dim]), new_scales.reset(new float[2 * new_rows]);
    p.new_v = packed(new_v.get(), p.v_dim);
    p.new_k_scales = packed(new_scales.get(), 1), p.new_v_scales = packed(new_scales.get() + new_rows, 1);
    p.k_scales = rows_of(*k_scales), p.v_scales = rows_of(*v_scales);
  }
  p.group = p.num_heads / p.num_kv_heads;
  p.block_tokens = std::min(p.tokens, std::max<int64_t>(1, kernels().task_rows / p.group));
  p.blocks_per_pair = (p.tokens + p.block_tokens - 1) / p.block_tokens;
  run(p, *std::max_element(p.lengths, p.lengths + p.batch) + p.tokens);
  return out;
}

Tensor prefill(const Tensors& x, const Sizes& sizes, int64_t dense_window) {
  return attend(x, sizes, dense_window, {}, {});
}

using OptionalTensor = std::optional<Tensor>;

Tensor decode(const Tensors& x, const Sizes& sizes, OptionalTensor joined_values, OptionalTensor joined_logits) {
  STD_TORCH_CHECK(x.q.dim() == 4 && x.q.size(2) == 1, "sinkattn: decode takes one token a row");
  return attend(x, sizes, 0, joined_values, joined_logits);
}

// The tokens of each text in spans of block_tokens at most. Refuses whatever of starts, lengths and table leads elsewhere
// than into the tensors, before anything is written.
std::vector<Span> spans_of(const Paged& x, const Params& p, const int32_t* starts, const int32_t* lengths) {
  const int64_t texts = x.lengths.size(0), blocks = x.k_pages.size(0), columns = x.block_table.size(1);
  STD_TORCH_CHECK(starts[0] >= 0 && starts[texts] <= x.q.size(0), "sinkattn: starts leave the tokens");
  std::vector<Span> spans;
  for (int64_t text = 0; text < texts; ++text) {
    const int64_t begin = starts[text], end = starts[text + 1], length = lengths[text], total = length + end - begin;
    STD_TORCH_CHECK(begin <= end && length >= 0, "sinkattn: starts must not fall, and lengths not be negative");
    if (begin == end) continue;
    STD_TORCH_CHECK(total <= columns * p.block_size, "sinkattn: block_table is too short for a text of ", total, " tokens");
    const int32_t* pages = p.block_table + text * p.table_stride;
    const auto check_pages = [&](int64_t from, int64_t to) {  // positions
      for (int64_t i = from / p.block_size; i * p.block_size < to; ++i)
        STD_TORCH_CHECK(pages[i] >= 0 && pages[i] < blocks, "sinkattn: a text has page ", pages[i], " of ", blocks);
    };
    check_pages(0, std::min(p.sink_size, total));
    check_pages(std::max<int64_t>(length - p.window_size + 1, 0), total);
    for (int64_t first = begin; first < end; first += p.block_tokens)
      spans.push_back({text, first, std::min(first + p.block_tokens, end), length + first - begin});
  }
  return spans;
}

Tensor attend_pages(const Paged& x, const Sizes& sizes, int64_t max_tokens) {
  check(x, sizes, max_tokens);
  const auto& [q, k, v, k_pages, v_pages, starts, lengths, block_table, rotation] = x;
  STD_TORCH_CHECK(q.is_cpu(), "sinkattn: all tensors must be on the CPU");
  Params p{};
  take_sizes(p, sizes);
  p.dtype = p.stored = dtype_of(q);
  p.batch = 1, p.num_heads = q.size(1), p.head_dim = q.size(2), p.num_kv_heads = v.size(1), p.v_dim = v.size(2);
  STD_TORCH_CHECK(p.head_dim <= MAX_HEAD_DIM && p.v_dim <= MAX_HEAD_DIM, "sinkattn: head_dim is above ", MAX_HEAD_DIM);
  std::vector<Tensor> copies;
  take_rotation(p, rotation, copies);
  const int64_t texts = lengths.size(0);
  const int32_t* begins = data_of<int32_t>(starts, ScalarType::Int, copies);
  const int32_t* before = data_of<int32_t>(lengths, ScalarType::Int, copies);
  p.block_table = static_cast<const int32_t*>(block_table.data_ptr());
  p.table_stride = block_table.stride(0), p.block_size = k_pages.size(2);
  int64_t most = 1, longest = 1;
  for (int64_t text = 0; text < texts; ++text) {
    const int64_t count = int64_t(begins[text + 1]) - begins[text];
    most = std::max(most, count), longest = std::max(longest, before[text] + count);
  }
  STD_TORCH_CHECK(max_tokens == 0 || most <= max_tokens, "sinkattn: a text has ", most, " new tokens, not max_tokens=",
                  max_tokens, " at most");
  p.group = p.num_heads / p.num_kv_heads;
  p.block_tokens = std::min(most, std::max<int64_t>(1, kernels().task_rows / std::max<int64_t>(p.group, 1)));
  const std::vector<Span> spans = spans_of(x, p, begins, before);
  p.spans = spans.data(), p.num_spans = spans.size(), p.tokens = begins[texts];

  Tensor out = empty_like(q, {q.size(0), p.num_heads, p.v_dim});
  const auto clear = [&](int64_t begin, int64_t end) {
    const int64_t bytes = p.num_heads * p.v_dim * q.element_size();
    if (begin < end) std::memset(static_cast<char*>(out.data_ptr()) + begin * bytes, 0, (end - begin) * bytes);
  };
  clear(0, begins[0]), clear(p.tokens, q.size(0));
  if (spans.empty() || p.num_heads == 0) return out;
  const auto flat = [](const Tensor& tensor) { return Rows{tensor.data_ptr(), 0, tensor.stride(1), tensor.stride(0)}; };
  p.q = flat(q), p.k = p.new_k = flat(k), p.v = p.new_v = flat(v), p.out = flat(out);
  p.k_cache = rows_of(k_pages), p.v_cache = rows_of(v_pages);
  std::unique_ptr<std::byte[]> new_k;
  if (p.rotation) {
    new_k.reset(new std::byte[p.num_kv_heads * p.tokens * p.head_dim * q.element_size()]);
    p.new_k = {new_k.get(), 0, p.tokens * p.head_dim, p.head_dim};
  }
  run(p, longest);
  return out;
}

Tensor linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
              const std::optional<Tensor>& norm_weight, double norm_eps, double norm_shift,
              const std::optional<Tensor>& residual, int64_t activation) {
  STD_TORCH_CHECK(x.dim() == 2 && weight.dim() == 2 && x.size(1) == weight.size(1) && x.size(0) <= MAX_LINEAR_ROWS,
                  "sinkattn: linear takes x (up to 64 rows, in_features) and weight (out_features, in_features)");
  Linear p{};
  p.activation = activation_of(activation), p.dtype = dtype_of(x);
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
  m.impl("decode", TORCH_BOX((&with_arguments<decode, OptionalTensor, OptionalTensor>)));
  m.impl("prefill", TORCH_BOX((&with_arguments<prefill, int64_t>)));
  m.impl("attend_pages", TORCH_BOX((&with_pages<attend_pages, int64_t>)));
  m.impl("linear", TORCH_BOX(&linear));
}

// "amx", "avx512_bf16", "avx512", "avx2" or "portable": what runs here. Null where SINKATTN_CPU_ISA names what does
// not; then the other one says so. For ctypes.
extern "C" __attribute__((visibility("default"))) const char* sinkattn_cpu_isa() {
  return choice().kernels ? choice().kernels->name : nullptr;
}
extern "C" __attribute__((visibility("default"))) const char* sinkattn_cpu_isa_error() {
  return choice().error.c_str();
}

}  // namespace sinkattn
