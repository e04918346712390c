// sinkattn::decode_cuda, prefill_cuda, attend_pages_cuda, linear and those of a patched model's steps for CUDA tensors:
// checks, unpacking, stream. LibTorch's stable ABI is all that is used, so one library serves every torch from 2.10 on.
// Schemas are defined in sinkattn/schemas.py.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <array>
#include <optional>
#include <tuple>
#include <vector>

#include "../arguments.h"
#include "decode.h"
#include "linear.h"
#include "prefill.h"
#include "stack.h"
#include "step.h"

// Only torch builds for CUDA have it, and this library must link without one.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**);

namespace sinkattn::cuda {
namespace {

void check(cudaError_t error, const char* what) {
  STD_TORCH_CHECK(error == cudaSuccess, "sinkattn: ", what, ": ", cudaGetErrorString(error));
}

const Device& properties_of(int index) {
  static std::array<Device, 64> devices = {};
  STD_TORCH_CHECK(index >= 0 && index < int(devices.size()), "sinkattn: no room for device ", index);
  Device& device = devices[index];
  if (device.compute_major == 0) {  // threads that meet here write the same
    Device found;
    found.index = index;
    check(cudaDeviceGetAttribute(&found.multiprocessors, cudaDevAttrMultiProcessorCount, index), "device");
    check(cudaDeviceGetAttribute(&found.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, index), "device");
    check(cudaDeviceGetAttribute(&found.compute_major, cudaDevAttrComputeCapabilityMajor, index), "device");
    device = found;
  }
  return device;
}

// To 16 bytes, of numbers of 16 or 8 bits.
bool is_aligned(const Tensor& x) {
  auto sizes = x.sizes(), strides = x.strides();
  const int64_t numbers = in_8_bits(x) ? 16 : 8;
  bool aligned = reinterpret_cast<uintptr_t>(x.data_ptr()) % 16 == 0;
  for (int dim = 0; dim < 3; ++dim) aligned = aligned && (strides[dim] % numbers == 0 || sizes[dim] < 2);
  return aligned;
}

void check_dtype(const Tensor& q) {
  STD_TORCH_CHECK(q.scalar_type() == ScalarType::Half || q.scalar_type() == ScalarType::BFloat16,
                  "sinkattn: the CUDA C++ ops take float16 and bfloat16");
}

void take_sizes(Call& c, const Sizes& sizes) {
  c.sink_size = int(sizes.sink_size), c.window_size = int(sizes.window_size), c.interleaved = sizes.interleaved;
  const double LOG2E = 1.4426950408889634, by = sizes.softcap > 0 ? 2 * sizes.scale / sizes.softcap : sizes.scale;
  c.query_scale = float(LOG2E * by), c.softcap = float(sizes.softcap);
}
void take_rotation(Call& c, const std::optional<Tensor>& rotation, const Sizes& sizes, std::vector<Tensor>& copies) {
  if (!rotation) return;
  c.rotary_start = int(sizes.rotary_start);
  c.rotary_half = int(rotation->size(rotation->dim() - 1));
  if (c.rotary_half > 0) c.rotation = data_of<float>(*rotation, ScalarType::Float, copies);
}

bool is_of(const Tensor& x, ScalarType dtype, std::initializer_list<int64_t> shape) {
  return has_shape(x, shape) && x.scalar_type() == dtype && x.is_contiguous();
}

// Unpacks the arguments. What is refused is refused before anything is launched.
Tensor unpack(const Tensors& x, const Sizes& sizes, Call& c, std::vector<Tensor>& copies) {
  check(x, sizes);
  const auto& [q, k, v, k_cache, v_cache, lengths, counts, rotation, learned_logits, alibi_slopes, k_scales,
               v_scales] = x;
  STD_TORCH_CHECK(q.is_cuda(), "sinkattn: all tensors must be on one device");
  check_dtype(q);
  const int64_t batch = q.size(0), num_heads = q.size(1), tokens = q.size(2), head_dim = q.size(3);
  const int64_t num_kv_heads = v.size(1), v_dim = v.size(3), slots = k_cache.size(2), limit = 1 << 29;
  STD_TORCH_CHECK(tokens < limit && slots < limit, "sinkattn: the CUDA C++ ops take less than 2^29 tokens and slots");
  STD_TORCH_CHECK(is_aligned(k_cache) && is_aligned(v_cache), "sinkattn: the cache must be aligned to 16 bytes");
  take_sizes(c, sizes);
  take_rotation(c, rotation, sizes, copies);

  c.q = q.data_ptr(), c.k = k.data_ptr(), c.v = v.data_ptr();
  c.k_cache = k_cache.data_ptr(), c.v_cache = v_cache.data_ptr();
  c.q_row = q.stride(0), c.q_head = q.stride(1), c.k_row = k.stride(0), c.k_head = k.stride(1);
  c.v_row = v.stride(0), c.v_head = v.stride(1);
  c.k_cache_row = k_cache.stride(0), c.k_cache_head = k_cache.stride(1), c.k_cache_slot = k_cache.stride(2);
  c.v_cache_row = v_cache.stride(0), c.v_cache_head = v_cache.stride(1), c.v_cache_slot = v_cache.stride(2);
  if (in_8_bits(k_cache)) {
    c.stored = k_cache.scalar_type() == ScalarType::Char ? Stored::int8 : Stored::e4m3;
    c.k_scales = static_cast<float*>(k_scales->data_ptr()), c.v_scales = static_cast<float*>(v_scales->data_ptr());
    c.k_scale_row = k_scales->stride(0), c.k_scale_head = k_scales->stride(1), c.k_scale_slot = k_scales->stride(2);
    c.v_scale_row = v_scales->stride(0), c.v_scale_head = v_scales->stride(1), c.v_scale_slot = v_scales->stride(2);
  }
  c.lengths = data_of<int64_t>(lengths, ScalarType::Long, copies);
  if (counts) c.counts = data_of<int64_t>(*counts, ScalarType::Long, copies);
  if (learned_logits) c.learned_logits = data_of<float>(*learned_logits, ScalarType::Float, copies);
  c.batch = int(batch), c.num_kv_heads = int(num_kv_heads), c.group = int(num_heads / num_kv_heads);
  c.tokens = int(tokens), c.head_dim = int(head_dim), c.v_dim = int(v_dim);
  c.ring_size = int(slots) - c.sink_size, c.is_bfloat16 = q.scalar_type() == ScalarType::BFloat16;
  Tensor out = empty_like(q, {batch, tokens, num_heads, v_dim});
  c.out = out.data_ptr();
  return out;
}

cudaStream_t stream_of(int index) {
  void* stream = nullptr;
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream && !aoti_torch_get_current_cuda_stream(index, &stream),
                  "sinkattn: this torch has no CUDA stream");
  return static_cast<cudaStream_t>(stream);
}

// Counters of pairs, zero between launches: those that were given, or new ones, which a launch of its own makes zero.
int* arrivals_of(const std::optional<Tensor>& given, const Tensor& like, int64_t pairs, cudaStream_t stream,
                 std::vector<Tensor>& copies) {
  if (given) {
    STD_TORCH_CHECK(given->scalar_type() == ScalarType::Int && given->is_contiguous() && given->numel() >= pairs &&
                        device_of(*given) == device_of(like),
                    "sinkattn: arrivals must be int32 on the cache's device, ", pairs, " of them or more");
    return static_cast<int*>(given->data_ptr());
  }
  copies.push_back(empty(like, {pairs}, aoti_torch_dtype_int32()));
  check(cudaMemsetAsync(copies.back().data_ptr(), 0, pairs * sizeof(int), stream), "counters");
  return static_cast<int*>(copies.back().data_ptr());
}

// Decode, into `out`. like: a tensor on its device.
void launch_decode(const Tensor& like, Params& p, const std::optional<Tensor>& arrivals, bool overlap, int64_t splits,
                   bool cluster, std::vector<Tensor>& copies) {
  const int index = like.get_device_index();
  const Device& device = properties_of(index);
  torch::stable::accelerator::DeviceGuard guard(index);
  const Sharing sharing =
      splits >= 0 ? Sharing{int(std::min<int64_t>(splits, 1 << 30)), cluster} : sharing_of(p, device);
  STD_TORCH_CHECK(serves(p, sharing, device), "sinkattn: the CUDA C++ decode does not take head_dim ", p.head_dim,
                  ", v_head_dim ", p.v_dim, ", groups of ", p.group, ", ", p.batch, " rows of ", p.tokens,
                  " tokens, a ring of ", p.ring_size, p.stored == Stored::same ? "" : " in 8 bits",
                  " for a window of ", p.window_size, " and ", sharing.splits,
                  sharing.cluster ? " splits in a cluster" : " splits", " on this GPU");
  if (p.batch == 0 || p.tokens == 0) return;
  p.overlap = overlap;
  const cudaStream_t stream = stream_of(index);
  if (const int64_t floats = partial_floats(p, sharing)) {
    copies.push_back(empty(like, {floats}, aoti_torch_dtype_float32()));
    p.partials = static_cast<float*>(copies.back().data_ptr());
    p.arrivals = arrivals_of(arrivals, like, rows_of(p) * p.num_kv_heads, stream, copies);
  }
  check(decode(p, sharing, device, stream), "launch of decode");
}

// The same of one token a row or a few. p: unpacked, as far as prefill has it too.
void run_decode(const Tensors& x, Params& p, const std::optional<Tensor>& arrivals, bool overlap, int64_t splits,
                bool cluster, std::vector<Tensor>& copies) {
  p.q_token = x.q.stride(2), p.k_token = x.k.stride(2), p.v_token = x.v.stride(2);
  if (x.alibi_slopes) p.alibi_slopes = data_of<float>(*x.alibi_slopes, ScalarType::Float, copies);
  launch_decode(x.q, p, arrivals, overlap, splits, cluster, copies);
}

using OptionalTensor = std::optional<Tensor>;

Tensor decode_op(const Tensors& x, const Sizes& sizes, OptionalTensor joined_values, OptionalTensor joined_logits,
                 OptionalTensor arrivals, bool overlap, int64_t splits, bool cluster) {
  STD_TORCH_CHECK(x.q.dim() == 4 && x.q.size(2) == 1, "sinkattn: decode takes one token a row");
  std::vector<Tensor> copies;
  Params p = {};
  Tensor out = unpack(x, sizes, p, copies);
  const Joined joined = joined_of(x, joined_values, joined_logits, copies);
  p.joined_values = joined.values, p.joined_logits = joined.logits, p.joined_parts = joined.parts;
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(p.joined_values) % 16 == 0, "sinkattn: joined must be aligned to 16 bytes");
  run_decode(x, p, arrivals, overlap, splits, cluster, copies);
  return out;
}

// One token of each text, at most, over pages.
Tensor attend_pages_op(const Paged& x, const Sizes& sizes, int64_t max_tokens, OptionalTensor arrivals, bool overlap,
                       int64_t splits, bool cluster) {
  check(x, sizes, max_tokens);
  const auto& [q, k, v, k_pages, v_pages, starts, lengths, block_table, rotation] = x;
  const int64_t tokens = q.size(0), num_heads = q.size(1), texts = lengths.size(0), limit = 1 << 29;
  STD_TORCH_CHECK(q.is_cuda() && max_tokens == 1, "sinkattn: on a GPU attend_pages takes one token a text (max_tokens)");
  check_dtype(q);
  STD_TORCH_CHECK(is_aligned(k_pages) && is_aligned(v_pages), "sinkattn: pages must be aligned to 16 bytes");
  STD_TORCH_CHECK(tokens < limit && k_pages.size(2) < limit && sizes.sink_size < limit && sizes.window_size < limit,
                  "sinkattn: the CUDA C++ ops take less than 2^29 tokens");
  std::vector<Tensor> copies;
  Params p = {};
  take_sizes(p, sizes);
  take_rotation(p, rotation, sizes, copies);
  p.q = q.data_ptr(), p.k = k.data_ptr(), p.v = v.data_ptr(), p.k_cache = k_pages.data_ptr(), p.v_cache = v_pages.data_ptr();
  p.q_row = q.stride(0), p.q_head = q.stride(1), p.k_row = k.stride(0), p.k_head = k.stride(1);
  p.v_row = v.stride(0), p.v_head = v.stride(1);
  p.k_cache_row = k_pages.stride(0), p.k_cache_head = k_pages.stride(1), p.k_cache_slot = k_pages.stride(2);
  p.v_cache_row = v_pages.stride(0), p.v_cache_head = v_pages.stride(1), p.v_cache_slot = v_pages.stride(2);
  p.batch = int(texts), p.tokens = 1, p.all_tokens = int(tokens);
  p.num_kv_heads = int(v.size(1)), p.group = int(num_heads / v.size(1));
  p.head_dim = int(q.size(2)), p.v_dim = int(v.size(2)), p.is_bfloat16 = q.scalar_type() == ScalarType::BFloat16;
  p.ring_size = PAGED_RING - p.sink_size, p.page_size = int(k_pages.size(2));
  p.starts = data_of<int>(starts, ScalarType::Int, copies), p.text_lengths = data_of<int>(lengths, ScalarType::Int, copies);
  p.table = static_cast<const int*>(block_table.data_ptr()), p.table_row = block_table.stride(0);
  Tensor out = empty_like(q, {tokens, num_heads, p.v_dim});
  p.out = out.data_ptr();
  if (tokens == 0) return out;
  if (texts == 0) {
    torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
    check(cudaMemsetAsync(p.out, 0, out.numel() * out.element_size(), stream_of(q.get_device_index())), "padding");
  }
  launch_decode(q, p, arrivals, overlap, splits, cluster, copies);
  return out;
}

// What the prefill of sm90 does not take about a call; null if it takes it.
const char* refused_by_prefill(const Tensors& x, const Prefill& p, const Device& device) {
  if (!is_aligned(x.q) || !is_aligned(x.k) || !is_aligned(x.v)) return "q, k or v that are not aligned to 16 bytes";
  if (reinterpret_cast<uintptr_t>(p.rotation) % 16 != 0) return "a rotation that is not aligned to 16 bytes";
  if (p.rotary_start % 4 != 0 || p.rotary_half % 4 != 0) return "an r / 2 or a rotary_start that is no multiple of 4";
  if (p.v_dim != p.head_dim || !serves(p)) return "these head dims, or so many sinks";
  return device.compute_major == 9 ? nullptr : "GPUs but those of compute capability 9.0";
}

Tensor prefill_op(const Tensors& x, const Sizes& sizes, int64_t dense_window, OptionalTensor arrivals, bool overlap) {
  STD_TORCH_CHECK(dense_window >= 0, "sinkattn: dense_window must not be negative");
  std::vector<Tensor> copies;
  Prefill p = {};
  Tensor out = unpack(x, sizes, p, copies);
  const int index = x.q.get_device_index();
  const Device& device = properties_of(index);
  const char* refused = refused_by_prefill(x, p, device);

  Params few = {};
  static_cast<Call&>(few) = p;
  const bool is_faster = p.tokens <= SURELY_FEW || int64_t(p.batch) * p.num_kv_heads <= device.multiprocessors;
  if (dense_window == 0 && (refused || is_faster) && serves(few, {1, false}, device)) {
    run_decode(x, few, arrivals, overlap, -1, false, copies);
    return out;
  }
  STD_TORCH_CHECK(!refused, "sinkattn: the CUDA C++ prefill does not take ", refused);
  p.q_token = x.q.stride(2), p.k_token = x.k.stride(2), p.v_token = x.v.stride(2);
  const int64_t reach = dense_window > 0 ? dense_window : sizes.window_size;
  p.reach = int(std::min(reach, sizes.window_size + p.tokens));  // beyond, nothing is
  p.furthest = dense_window > 0 ? 1 << 30 : p.sink_size + p.window_size - 1;
  if (x.alibi_slopes) p.alibi_slopes = data_of<float>(*x.alibi_slopes, ScalarType::Float, copies);
  if (p.batch == 0 || p.tokens == 0) return out;
  torch::stable::accelerator::DeviceGuard guard(index);
  Tensor scratch = empty_like(x.q, {scratch_elements(p)});
  p.scratch = scratch.data_ptr();
  check(prefill(p, device.multiprocessors, stream_of(index)), "launch of prefill");
  return out;
}

Tensor linear_op(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                 const std::optional<Tensor>& norm_weight, double norm_eps, double norm_shift,
                 const std::optional<Tensor>& residual, int64_t activation) {
  const ScalarType dtype = x.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Half || dtype == ScalarType::BFloat16,
                  "sinkattn: the CUDA C++ linear takes float16 and bfloat16");
  STD_TORCH_CHECK(x.dim() == 2 && weight.dim() == 2 && x.size(1) == weight.size(1) && x.size(0) <= MAX_LINEAR_ROWS &&
                      x.size(1) > 0 && x.size(1) % 8 == 0 && x.size(1) < (1 << 28) && weight.size(0) < (1 << 28),
                  "sinkattn: linear takes x (up to 64 rows, in_features) and weight (out_features, in_features), "
                  "in_features a multiple of 8");
  Linear p = {};
  p.rows = int(x.size(0)), p.in_features = int(x.size(1)), p.out_features = int(weight.size(0));
  p.activation = activation_of(activation);
  const int64_t halves = p.activation == Activation::none ? 1 : 2, outputs = weight.size(0) / halves;
  STD_TORCH_CHECK(weight.size(0) % halves == 0, "sinkattn: a gated weight needs an even number of rows");
  const int index = x.get_device_index();
  auto is_here = [&](const Tensor& tensor) { return tensor.is_cuda() && tensor.get_device_index() == index; };
  auto pointer = [&](const Tensor& tensor, std::initializer_list<int64_t> shape, uintptr_t alignment) {
    STD_TORCH_CHECK(is_here(tensor), "sinkattn: all tensors must be on one device");
    STD_TORCH_CHECK(is_of(tensor, dtype, shape),
                    "sinkattn: the tensors of linear must fit, be contiguous and have one dtype");
    STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(tensor.data_ptr()) % alignment == 0,
                    "sinkattn: x, weight and norm_weight must be aligned to 16 bytes");
    return tensor.data_ptr();
  };
  p.x = pointer(x, {p.rows, p.in_features}, 16);
  if (bias) p.bias = pointer(*bias, {p.out_features}, 2);
  if (norm_weight) p.norm_weight = pointer(*norm_weight, {p.in_features}, 16);
  if (residual) p.residual = pointer(*residual, {p.rows, outputs}, 2);
  STD_TORCH_CHECK(is_here(weight), "sinkattn: all tensors must be on one device");
  STD_TORCH_CHECK(weight.scalar_type() == dtype && weight.stride(1) == 1 && weight.stride(0) % 8 == 0 &&
                      reinterpret_cast<uintptr_t>(weight.data_ptr()) % 16 == 0,
                  "sinkattn: weight must have the dtype of x and contiguous rows, aligned to 16 bytes");
  p.weight = weight.data_ptr(), p.weight_row = weight.stride(0);
  p.norm_eps = float(norm_eps), p.norm_shift = float(norm_shift), p.is_bfloat16 = dtype == ScalarType::BFloat16;
  Tensor out = empty_like(x, {p.rows, outputs});
  if (p.rows == 0 || outputs == 0) return out;
  p.out = out.data_ptr();

  const Device& device = properties_of(index);
  STD_TORCH_CHECK(p.rows <= MAX_NARROW_ROWS || device.compute_major == 9, "sinkattn: linear takes more than ",
                  MAX_NARROW_ROWS, " rows on GPUs of compute capability 9.0 alone");
  torch::stable::accelerator::DeviceGuard guard(index);
  check(linear(p, device, stream_of(index)), "launch of linear");
  return out;
}

// The sizes of a stack, laid out in `memory`; the bytes of that.
int64_t lay_out_stack(Stack& p, const Tensor& x, int64_t inner, int64_t num_heads, int64_t num_kv_heads, int64_t head_dim,
                      int64_t layers, int64_t slots, void* memory, const Device& device) {
  const ScalarType dtype = x.scalar_type();
  STD_TORCH_CHECK(x.dim() == 2 && x.is_cuda() && x.is_contiguous() && x.size(0) <= MAX_STACK_ROWS && num_kv_heads > 0 &&
                      num_heads % num_kv_heads == 0 && (dtype == ScalarType::Half || dtype == ScalarType::BFloat16),
                  "sinkattn: stack takes contiguous x (1 or 2 rows, hidden) on a GPU, float16 or bfloat16");
  Call& c = p.call;
  c.batch = int(x.size(0)), c.num_kv_heads = int(num_kv_heads), c.group = int(num_heads / num_kv_heads), c.tokens = 1;
  c.head_dim = c.v_dim = int(head_dim), c.is_bfloat16 = dtype == ScalarType::BFloat16;
  p.hidden = int(x.size(1)), p.inner = int(inner), p.num_layers = int(layers);
  return lay_out(p, int(slots), memory, device);
}

// What a stack keeps between launches, zero at first; nothing for sizes that are not served.
Tensor stack_state_op(const Tensor& x, int64_t inner, int64_t num_heads, int64_t num_kv_heads, int64_t head_dim,
                      int64_t layers, int64_t slots) {
  const int index = x.get_device_index();
  const Device& device = properties_of(index);
  torch::stable::accelerator::DeviceGuard guard(index);
  Stack p = {};
  const int64_t bytes = lay_out_stack(p, x, inner, num_heads, num_kv_heads, head_dim, layers, slots, nullptr, device);
  if (!serves(p, device)) return empty(x, {0}, aoti_torch_dtype_int32());
  Tensor state = empty(x, {bytes / 4}, aoti_torch_dtype_int32());
  check(cudaMemsetAsync(state.data_ptr(), 0, bytes, stream_of(index)), "state of a stack");
  return state;
}

// What the last layer gives, and logits, (rows, vocabulary), of none without a head.
std::tuple<Tensor, Tensor> stack_op(const Tensor& x, const Tensor& table, const OptionalTensor& logits_norm,
                                    const OptionalTensor& logits_weight, const Tensor& lengths,
                                    const OptionalTensor& counts, const OptionalTensor& rotation, const Tensor& state,
                                    int64_t inner, int64_t num_heads, int64_t num_kv_heads, int64_t head_dim,
                                    int64_t slots, double scale, int64_t rotary_start, bool interleaved, double norm_eps,
                                    double norm_shift, double head_eps, double head_shift, int64_t activation) {
  STD_TORCH_CHECK(table.dim() == 2 && table.size(1) == int64_t(sizeof(StackLayer) / 8) && table.is_contiguous() &&
                      table.scalar_type() == ScalarType::Long && state.scalar_type() == ScalarType::Int &&
                      state.is_contiguous() && reinterpret_cast<uintptr_t>(state.data_ptr()) % 16 == 0 &&
                      reinterpret_cast<uintptr_t>(x.data_ptr()) % 16 == 0,
                  "sinkattn: table must be int64 (layers, entries), state int32, all aligned to 16 bytes");
  for (const auto* tensor : {&table, &lengths, &state, counts ? &*counts : &x, rotation ? &*rotation : &x})
    STD_TORCH_CHECK(device_of(*tensor) == device_of(x), "sinkattn: all tensors must be on one device");
  const int index = x.get_device_index();
  const Device& device = properties_of(index);
  torch::stable::accelerator::DeviceGuard guard(index);
  std::vector<Tensor> copies;
  Stack p = {};
  const int64_t bytes = lay_out_stack(p, x, inner, num_heads, num_kv_heads, head_dim, table.size(0), slots,
                                      state.data_ptr(), device);
  STD_TORCH_CHECK(serves(p, device) && state.numel() * 4 == bytes, "sinkattn: state is not that of such a stack");
  Call& c = p.call;
  c.interleaved = interleaved, c.query_scale = float(1.4426950408889634 * scale);
  STD_TORCH_CHECK(has_shape(lengths, {c.batch}) && (!counts || has_shape(*counts, {c.batch})),
                  "sinkattn: lengths and counts must be (rows,)");
  c.lengths = data_of<int64_t>(lengths, ScalarType::Long, copies);
  if (counts) c.counts = data_of<int64_t>(*counts, ScalarType::Long, copies);
  if (rotation) {
    STD_TORCH_CHECK(rotation->dim() == 5 && has_shape(*rotation, {c.batch, 1, 2, 2, rotation->size(4)}),
                    "sinkattn: rotation must be (rows, 1, 2, 2, r / 2)");
    c.rotary_start = int(rotary_start), c.rotary_half = int(rotation->size(4));
    if (c.rotary_half > 0) c.rotation = data_of<float>(*rotation, ScalarType::Float, copies);
  }
  p.layers = static_cast<const StackLayer*>(table.data_ptr()), p.activation = activation_of(activation);
  p.norm_eps = float(norm_eps), p.norm_shift = float(norm_shift), p.head_eps = float(head_eps);
  p.head_shift = float(head_shift);
  if (logits_weight) {
    p.vocabulary = logits_weight->dim() == 2 ? int(logits_weight->size(0)) : 0;
    STD_TORCH_CHECK(p.vocabulary > 0 && p.vocabulary % 2 == 0 && logits_norm &&
                        is_of(*logits_weight, x.scalar_type(), {p.vocabulary, p.hidden}) &&
                        is_of(*logits_norm, x.scalar_type(), {p.hidden}) && device_of(*logits_weight) == device_of(x) &&
                        device_of(*logits_norm) == device_of(x) &&
                        reinterpret_cast<uintptr_t>(logits_weight->data_ptr()) % 16 == 0 &&
                        reinterpret_cast<uintptr_t>(logits_norm->data_ptr()) % 16 == 0,
                    "sinkattn: a head must be (even vocabulary, hidden), its norm (hidden,), as x, aligned to 16 bytes");
    p.logits_weight = logits_weight->data_ptr(), p.logits_norm = logits_norm->data_ptr();
  }
  Tensor out = empty_like(x, {c.batch, p.hidden}), logits = empty_like(x, {c.batch, p.vocabulary});
  p.x = x.data_ptr(), p.out = out.data_ptr(), p.logits = p.vocabulary ? logits.data_ptr() : nullptr;
  check(stack(p, device, stream_of(index)), "launch of stack");
  return {out, logits};
}

// Angles of the last tokens of rows, (rows, tokens, 2, 2, half) float32.
Tensor angles_op(const Tensor& lengths, const OptionalTensor& counts, const Tensor& frequencies, int64_t tokens,
                 int64_t capacity) {
  const int64_t rows = lengths.numel(), half = frequencies.numel();
  for (const auto* tensor : {&lengths, counts ? &*counts : &lengths})
    STD_TORCH_CHECK(is_of(*tensor, ScalarType::Long, {rows}) && device_of(*tensor) == device_of(frequencies),
                    "sinkattn: lengths and counts must be int64 (rows,), where the frequencies are");
  STD_TORCH_CHECK(is_of(frequencies, ScalarType::Double, {half}), "sinkattn: frequencies must be float64 (r / 2,)");
  STD_TORCH_CHECK(tokens >= 0 && rows * tokens * half < int64_t(1) << 31, "sinkattn: no room for so many angles");
  Tensor out = empty(lengths, {rows, tokens, 2, 2, half}, aoti_torch_dtype_float32());
  Angles p = {};
  p.lengths = static_cast<const int64_t*>(lengths.data_ptr());
  p.counts = counts ? static_cast<const int64_t*>(counts->data_ptr()) : nullptr;
  p.frequencies = static_cast<const double*>(frequencies.data_ptr()), p.out = static_cast<float*>(out.data_ptr());
  p.rows = int(rows), p.tokens = int(tokens), p.half = int(half), p.capacity = capacity;
  const int index = lengths.get_device_index();
  torch::stable::accelerator::DeviceGuard guard(index);
  check(angles(p, stream_of(index)), "launch of angles");
  return out;
}

// A token a row goes into lengths, digests and known ids.
void note_op(const Tensor& ids, const OptionalTensor& counts, const Tensor& lengths, const Tensor& digests,
             const Tensor& known, int64_t base, int64_t sink_size) {
  const int64_t rows = lengths.numel(), columns = known.dim() == 2 ? known.size(1) : 0;
  for (const auto* tensor : {&ids, counts ? &*counts : &lengths, &lengths, &digests})
    STD_TORCH_CHECK(is_of(*tensor, ScalarType::Long, {rows}) && device_of(*tensor) == device_of(known),
                    "sinkattn: ids, counts, lengths and digests must be int64 (rows,), on one device");
  STD_TORCH_CHECK(is_of(known, ScalarType::Long, {rows, columns}) && sink_size >= 0 && sink_size + 1 < columns &&
                      columns < int64_t(1) << 31,
                  "sinkattn: known must be int64 (rows, sinks, ring and one more)");
  Note p = {};
  p.ids = static_cast<const int64_t*>(ids.data_ptr());
  p.counts = counts ? static_cast<const int64_t*>(counts->data_ptr()) : nullptr;
  p.lengths = static_cast<int64_t*>(lengths.data_ptr()), p.digests = static_cast<int64_t*>(digests.data_ptr());
  p.known = static_cast<int64_t*>(known.data_ptr()), p.known_row = columns, p.base = base;
  p.rows = int(rows), p.sink_size = int(sink_size), p.ring_size = int(columns - sink_size - 1);
  const int index = known.get_device_index();
  torch::stable::accelerator::DeviceGuard guard(index);
  check(note(p, stream_of(index)), "launch of note");
}

// The first of each row's largest numbers, (rows,) int64.
Tensor likeliest_op(const Tensor& scores) {
  const ScalarType dtype = scores.scalar_type();
  const bool is_wide = dtype == ScalarType::Float;
  STD_TORCH_CHECK(scores.dim() == 2 && scores.size(1) > 0 && scores.size(1) < int64_t(1) << 31 &&
                      (scores.size(1) == 1 || scores.stride(1) == 1) &&
                      (is_wide || dtype == ScalarType::Half || dtype == ScalarType::BFloat16),
                  "sinkattn: scores must be (rows, vocabulary), float32, float16 or bfloat16, the last dim of stride 1");
  Tensor ids = empty(scores, {scores.size(0)}, aoti_torch_dtype_int64());
  Likeliest p = {};
  p.scores = scores.data_ptr(), p.row = scores.stride(0), p.ids = static_cast<int64_t*>(ids.data_ptr());
  p.rows = int(scores.size(0)), p.vocabulary = int(scores.size(1));
  p.kind = is_wide ? Scores::float32 : dtype == ScalarType::Half ? Scores::float16 : Scores::bfloat16;
  const int index = scores.get_device_index();
  torch::stable::accelerator::DeviceGuard guard(index);
  check(likeliest(p, stream_of(index)), "launch of likeliest");
  return ids;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sinkattn, CUDA, m) {
  m.impl("angles", TORCH_BOX(&angles_op));
  m.impl("note", TORCH_BOX(&note_op));
  m.impl("likeliest", TORCH_BOX(&likeliest_op));
  m.impl("stack", TORCH_BOX(&stack_op));
  m.impl("stack_state", TORCH_BOX(&stack_state_op));
  m.impl("decode_cuda", TORCH_BOX((&with_arguments<decode_op, OptionalTensor, OptionalTensor, OptionalTensor, bool, int64_t, bool>)));
  m.impl("prefill_cuda", TORCH_BOX((&with_arguments<prefill_op, int64_t, OptionalTensor, bool>)));
  m.impl("attend_pages_cuda",
         TORCH_BOX((&with_pages<attend_pages_op, int64_t, OptionalTensor, bool, int64_t, bool>)));
  m.impl("linear", TORCH_BOX(&linear_op));
}

// Whether the driver runs what this CUDA compiled. For ctypes.
extern "C" __attribute__((visibility("default"))) int sinkattn_cuda_runs() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess && version / 1000 >= CUDART_VERSION / 1000;
}

}  // namespace sinkattn::cuda
