// csrc/cuda/sm80/stack.cu, emulated, for ctypes.
#include "cuda/sm80/stack.cu"

using namespace sinkattn;
using namespace sinkattn::cuda;

namespace {

// sizes: rows, hidden, inner, heads, key heads, head dim, layers, slots, blocks at most.
Device device_of(const int64_t* sizes) {
  Device device;
  device.multiprocessors = int(sizes[8]), device.shared_bytes = emulated::SHARED_BYTES, device.compute_major = 9;
  return device;
}
Stack stack_of(const int64_t* sizes) {
  Stack p = {};
  Call& c = p.call;
  c.batch = int(sizes[0]), c.num_kv_heads = int(sizes[4]), c.group = int(sizes[3] / sizes[4]), c.tokens = 1;
  c.head_dim = c.v_dim = int(sizes[5]);
  p.hidden = int(sizes[1]), p.inner = int(sizes[2]), p.num_layers = int(sizes[6]);
  return p;
}

}  // namespace

extern "C" int64_t state_bytes(const int64_t* sizes) {
  Stack p = stack_of(sizes);
  const Device device = device_of(sizes);
  const int64_t bytes = lay_out(p, int(sizes[7]), nullptr, device);
  return serves(p, device) ? bytes : 0;
}

// more: first rotated dim, rotated dims / 2, interleaved, bfloat16, activation, seed, vocabulary. numbers: scale, eps and
// shift of norms and of heads' norms.
extern "C" int run_stack(const int64_t* sizes, const int64_t* more, const double* numbers, const void* table, const void* x,
                         void* out, void* state, const int64_t* lengths, const int64_t* counts, const float* rotation,
                         const void* logits_norm, const void* logits_weight, void* logits) {
  Stack p = stack_of(sizes);
  const Device device = device_of(sizes);
  lay_out(p, int(sizes[7]), state, device);
  Call& c = p.call;
  c.rotary_start = int(more[0]), c.rotary_half = int(more[1]), c.interleaved = more[2], c.is_bfloat16 = more[3];
  c.lengths = lengths, c.counts = counts, c.rotation = more[1] > 0 ? rotation : nullptr;
  c.query_scale = float(1.4426950408889634 * numbers[0]);
  p.activation = Activation(more[4]), emulated::seed = unsigned(more[5]);
  p.norm_eps = float(numbers[1]), p.norm_shift = float(numbers[2]);
  p.head_eps = float(numbers[3]), p.head_shift = float(numbers[4]);
  p.layers = static_cast<const StackLayer*>(table), p.x = x, p.out = out, p.vocabulary = int(more[6]);
  p.logits_norm = logits_norm, p.logits_weight = logits_weight, p.logits = logits;
  return stack(p, device, nullptr);
}
