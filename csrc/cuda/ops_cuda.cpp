// sinkattn::decode_cuda and prefill_cuda for CUDA tensors: checks, unpacking, stream. LibTorch's stable ABI is all that is
// used, so one library serves every torch from 2.10 on. Schemas are defined in sinkattn/ops.py, which loads this.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <array>
#include <optional>

#include "decode.h"
#include "prefill.h"

// Only torch builds for CUDA have it, and this library must link without one.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**);

namespace sinkattn::cuda {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

void check(cudaError_t error, const char* what) {
  STD_TORCH_CHECK(error == cudaSuccess, "sinkattn: ", what, ": ", cudaGetErrorString(error));
}

const Device& device_of(int index) {
  static std::array<Device, 64> devices = {};
  STD_TORCH_CHECK(index >= 0 && index < int(devices.size()), "sinkattn: no room for device ", index);
  Device& device = devices[index];
  if (device.compute_major == 0) {  // threads that meet here write the same
    Device found;
    check(cudaDeviceGetAttribute(&found.multiprocessors, cudaDevAttrMultiProcessorCount, index), "device");
    check(cudaDeviceGetAttribute(&found.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, index), "device");
    check(cudaDeviceGetAttribute(&found.compute_major, cudaDevAttrComputeCapabilityMajor, index), "device");
    device = found;
  }
  return device;
}

bool has_shape(const Tensor& x, std::initializer_list<int64_t> shape) {
  auto sizes = x.sizes();
  return std::equal(sizes.begin(), sizes.end(), shape.begin(), shape.end());
}

bool is_aligned(const Tensor& x) {
  bool aligned = reinterpret_cast<uintptr_t>(x.data_ptr()) % 16 == 0;
  for (int dim = 0; dim < 3; ++dim) aligned = aligned && (x.stride(dim) % 8 == 0 || x.size(dim) < 2);
  return aligned;
}

// As contiguous float32; `copy` keeps what had to be copied.
const float* floats_of(const Tensor& x, Tensor& copy) {
  copy = torch::stable::contiguous(x.scalar_type() == ScalarType::Float ? x : torch::stable::to(x, ScalarType::Float));
  return static_cast<const float*>(copy.data_ptr());
}

Tensor decode_op(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& k_cache, const Tensor& v_cache,
                 const Tensor& lengths, const std::optional<Tensor>& counts, const std::optional<Tensor>& rotation,
                 const std::optional<Tensor>& learned_logits, const std::optional<Tensor>& alibi_slopes,
                 int64_t sink_size, int64_t window_size, double scale, double softcap, int64_t rotary_start,
                 bool interleaved, int64_t splits) {
  // sinkattn/ops.py checks with better messages; these keep a direct call from reading or writing out of bounds.
  for (const Tensor* x : {&q, &k, &v, &k_cache, &v_cache}) {
    STD_TORCH_CHECK(x->dim() == 4 && (x->size(3) < 2 || x->stride(3) == 1),
                    "sinkattn: q, k, v, k_cache and v_cache must have 4 dims, the last of stride 1");
    STD_TORCH_CHECK(x->scalar_type() == q.scalar_type(), "sinkattn: q, k, v, k_cache and v_cache must have one dtype");
  }
  STD_TORCH_CHECK(q.scalar_type() == ScalarType::Half || q.scalar_type() == ScalarType::BFloat16,
                  "sinkattn: the CUDA C++ decode takes float16 and bfloat16");
  const int64_t batch = q.size(0), num_heads = q.size(1), head_dim = q.size(3);
  const int64_t num_kv_heads = v.size(1), v_dim = v.size(3), slots = k_cache.size(2);
  STD_TORCH_CHECK(q.size(2) == 1 && num_kv_heads > 0 && num_heads % num_kv_heads == 0 &&
                      has_shape(k, {batch, num_kv_heads, 1, head_dim}) &&
                      has_shape(v, {batch, num_kv_heads, 1, v_dim}) &&
                      has_shape(k_cache, {batch, num_kv_heads, slots, head_dim}) &&
                      has_shape(v_cache, {batch, num_kv_heads, slots, v_dim}),
                  "sinkattn: the shapes of q, k, v, k_cache and v_cache do not fit");
  STD_TORCH_CHECK(sink_size >= 0 && window_size >= 1 && sink_size + window_size <= slots && slots < (1 << 30),
                  "sinkattn: sink_size and window_size do not fit the cache");
  STD_TORCH_CHECK(is_aligned(k_cache) && is_aligned(v_cache), "sinkattn: the cache must be aligned to 16 bytes");
  Tensor out = torch::stable::new_empty(q, {batch, 1, num_heads, v_dim});
  if (batch == 0) return out;

  Params p = {};
  p.q = q.data_ptr(), p.k = k.data_ptr(), p.v = v.data_ptr();
  p.k_cache = k_cache.data_ptr(), p.v_cache = v_cache.data_ptr(), p.out = out.data_ptr();
  p.q_row = q.stride(0), p.q_head = q.stride(1), p.k_row = k.stride(0), p.k_head = k.stride(1);
  p.v_row = v.stride(0), p.v_head = v.stride(1);
  p.k_cache_row = k_cache.stride(0), p.k_cache_head = k_cache.stride(1), p.k_cache_slot = k_cache.stride(2);
  p.v_cache_row = v_cache.stride(0), p.v_cache_head = v_cache.stride(1), p.v_cache_slot = v_cache.stride(2);
  p.batch = int(batch), p.num_kv_heads = int(num_kv_heads), p.group = int(num_heads / num_kv_heads);
  p.head_dim = int(head_dim), p.v_dim = int(v_dim);
  p.sink_size = int(sink_size), p.ring_size = int(slots - sink_size), p.window_size = int(window_size);
  p.is_bfloat16 = q.scalar_type() == ScalarType::BFloat16, p.interleaved = interleaved;
  const double LOG2E = 1.4426950408889634;
  p.query_scale = float(LOG2E * (softcap > 0 ? 2 * scale / softcap : scale)), p.softcap = float(softcap);

  Tensor row_lengths = torch::stable::contiguous(lengths), row_counts = lengths, angles = q, logits = q, slopes = q;
  STD_TORCH_CHECK(has_shape(lengths, {batch}) && lengths.scalar_type() == ScalarType::Long,
                  "sinkattn: lengths must be int64 (batch,)");
  p.lengths = static_cast<const int64_t*>(row_lengths.data_ptr());
  if (counts) {
    STD_TORCH_CHECK(has_shape(*counts, {batch}) && counts->scalar_type() == ScalarType::Long,
                    "sinkattn: counts must be int64 (batch,)");
    row_counts = torch::stable::contiguous(*counts);
    p.counts = static_cast<const int64_t*>(row_counts.data_ptr());
  }
  if (rotation) {
    const int64_t half = rotation->dim() == 5 ? rotation->size(4) : 0;
    STD_TORCH_CHECK(has_shape(*rotation, {batch, 1, 2, 2, half}) && rotary_start >= 0 &&
                        rotary_start + 2 * half <= head_dim,
                    "sinkattn: rotation must be (batch, 1, 2, 2, r / 2), r dims from rotary_start");
    p.rotary_start = int(rotary_start), p.rotary_half = int(half);
    if (half > 0) p.rotation = floats_of(*rotation, angles);
  }
  for (const auto* x : {&learned_logits, &alibi_slopes})
    STD_TORCH_CHECK(!*x || has_shape(**x, {num_heads}), "sinkattn: what is per head must be (num_heads,)");
  if (learned_logits) p.learned_logits = floats_of(*learned_logits, logits);
  if (alibi_slopes) p.alibi_slopes = floats_of(*alibi_slopes, slopes);

  const int index = q.get_device_index();
  const Device& device = device_of(index);
  torch::stable::accelerator::DeviceGuard guard(index);
  const int chosen = splits >= 0 ? int(std::min<int64_t>(splits, 1 << 30)) : splits_of(p, device);
  STD_TORCH_CHECK(serves(p, chosen, device), "sinkattn: the CUDA C++ decode does not take head_dim ", head_dim,
                  ", v_head_dim ", v_dim, ", groups of ", p.group, ", ", batch, " rows and ", chosen,
                  " splits on this GPU");
  void* stream = nullptr;
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream && !aoti_torch_get_current_cuda_stream(index, &stream),
                  "sinkattn: this torch has no CUDA stream");
  check(decode(p, chosen, static_cast<cudaStream_t>(stream)), "launch of decode");
  return out;
}

Tensor prefill_op(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& k_cache, const Tensor& v_cache,
                  const Tensor& lengths, const std::optional<Tensor>& counts, const std::optional<Tensor>& rotation,
                  const std::optional<Tensor>& learned_logits, const std::optional<Tensor>& alibi_slopes,
                  int64_t sink_size, int64_t window_size, double scale, double softcap, int64_t rotary_start,
                  bool interleaved, int64_t dense_window) {
  for (const Tensor* x : {&q, &k, &v, &k_cache, &v_cache}) {
    STD_TORCH_CHECK(x->dim() == 4 && (x->size(3) < 2 || x->stride(3) == 1),
                    "sinkattn: q, k, v, k_cache and v_cache must have 4 dims, the last of stride 1");
    STD_TORCH_CHECK(x->scalar_type() == q.scalar_type(), "sinkattn: q, k, v, k_cache and v_cache must have one dtype");
    STD_TORCH_CHECK(is_aligned(*x), "sinkattn: q, k, v, k_cache and v_cache must be aligned to 16 bytes");
  }
  STD_TORCH_CHECK(q.scalar_type() == ScalarType::Half || q.scalar_type() == ScalarType::BFloat16,
                  "sinkattn: the CUDA C++ prefill takes float16 and bfloat16");
  const int64_t batch = q.size(0), num_heads = q.size(1), tokens = q.size(2), dim = q.size(3);
  const int64_t num_kv_heads = v.size(1), slots = k_cache.size(2);
  STD_TORCH_CHECK(num_kv_heads > 0 && num_heads % num_kv_heads == 0 && tokens < (1 << 29) &&
                      has_shape(k, {batch, num_kv_heads, tokens, dim}) &&
                      has_shape(v, {batch, num_kv_heads, tokens, dim}) &&
                      has_shape(k_cache, {batch, num_kv_heads, slots, dim}) &&
                      has_shape(v_cache, {batch, num_kv_heads, slots, dim}),
                  "sinkattn: the shapes of q, k, v, k_cache and v_cache do not fit");
  STD_TORCH_CHECK(sink_size >= 0 && window_size >= 1 && sink_size + window_size <= slots && slots < (1 << 29),
                  "sinkattn: sink_size and window_size do not fit the cache");
  STD_TORCH_CHECK(!alibi_slopes && dense_window >= 0, "sinkattn: the CUDA C++ prefill takes no ALiBi");
  Tensor out = torch::stable::new_empty(q, {batch, tokens, num_heads, dim});
  if (batch == 0 || tokens == 0) return out;

  Prefill p = {};
  p.q = q.data_ptr(), p.k = k.data_ptr(), p.v = v.data_ptr();
  p.k_cache = k_cache.data_ptr(), p.v_cache = v_cache.data_ptr(), p.out = out.data_ptr();
  p.q_row = q.stride(0), p.q_head = q.stride(1), p.q_token = q.stride(2);
  p.k_row = k.stride(0), p.k_head = k.stride(1), p.k_token = k.stride(2);
  p.v_row = v.stride(0), p.v_head = v.stride(1), p.v_token = v.stride(2);
  p.k_cache_row = k_cache.stride(0), p.k_cache_head = k_cache.stride(1), p.k_cache_slot = k_cache.stride(2);
  p.v_cache_row = v_cache.stride(0), p.v_cache_head = v_cache.stride(1), p.v_cache_slot = v_cache.stride(2);
  p.batch = int(batch), p.num_kv_heads = int(num_kv_heads), p.group = int(num_heads / num_kv_heads);
  p.tokens = int(tokens), p.head_dim = int(dim);
  p.sink_size = int(sink_size), p.ring_size = int(slots - sink_size), p.window_size = int(window_size);
  p.reach = int(std::min(dense_window > 0 ? dense_window : window_size, window_size + tokens));  // beyond, nothing is
  p.is_bfloat16 = q.scalar_type() == ScalarType::BFloat16, p.interleaved = interleaved;
  const double LOG2E = 1.4426950408889634;
  p.query_scale = float(LOG2E * (softcap > 0 ? 2 * scale / softcap : scale)), p.softcap = float(softcap);

  Tensor row_lengths = torch::stable::contiguous(lengths), row_counts = lengths, angles = q, logits = q;
  STD_TORCH_CHECK(has_shape(lengths, {batch}) && lengths.scalar_type() == ScalarType::Long,
                  "sinkattn: lengths must be int64 (batch,)");
  p.lengths = static_cast<const int64_t*>(row_lengths.data_ptr());
  if (counts) {
    STD_TORCH_CHECK(has_shape(*counts, {batch}) && counts->scalar_type() == ScalarType::Long,
                    "sinkattn: counts must be int64 (batch,)");
    row_counts = torch::stable::contiguous(*counts);
    p.counts = static_cast<const int64_t*>(row_counts.data_ptr());
  }
  if (rotation) {
    const int64_t half = rotation->dim() == 5 ? rotation->size(4) : 0;
    STD_TORCH_CHECK(has_shape(*rotation, {batch, tokens, 2, 2, half}) && rotary_start >= 0 &&
                        rotary_start + 2 * half <= dim && rotary_start % 4 == 0 && half % 4 == 0,
                    "sinkattn: rotation must be (batch, tokens, 2, 2, r / 2), r / 2 and rotary_start multiples of 4");
    p.rotary_start = int(rotary_start), p.rotary_half = int(half);
    if (half > 0) p.rotation = floats_of(*rotation, angles);
    STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(p.rotation) % 16 == 0, "sinkattn: rotation must be aligned to 16 bytes");
  }
  STD_TORCH_CHECK(!learned_logits || has_shape(*learned_logits, {num_heads}),
                  "sinkattn: what is per head must be (num_heads,)");
  if (learned_logits) p.learned_logits = floats_of(*learned_logits, logits);
  STD_TORCH_CHECK(serves(p), "sinkattn: the CUDA C++ prefill does not take head_dim ", dim, " and ", sink_size, " sinks");
  Tensor scratch = torch::stable::new_empty(q, {scratch_elements(p)});
  p.scratch = scratch.data_ptr();

  const int index = q.get_device_index();
  const Device& device = device_of(index);
  STD_TORCH_CHECK(device.compute_major == 9, "sinkattn: the CUDA C++ prefill takes GPUs of compute capability 9.0");
  torch::stable::accelerator::DeviceGuard guard(index);
  void* stream = nullptr;
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream && !aoti_torch_get_current_cuda_stream(index, &stream),
                  "sinkattn: this torch has no CUDA stream");
  check(prefill(p, device.multiprocessors, static_cast<cudaStream_t>(stream)), "launch of prefill");
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sinkattn, CUDA, m) {
  m.impl("decode_cuda", TORCH_BOX(&decode_op));
  m.impl("prefill_cuda", TORCH_BOX(&prefill_op));
}

// Whether the driver runs what this CUDA compiled. For ctypes.
extern "C" __attribute__((visibility("default"))) int sinkattn_cuda_runs() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess && version / 1000 >= CUDART_VERSION / 1000;
}

}  // namespace sinkattn::cuda
