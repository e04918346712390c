// Decoder layers, one after another, for one token of one row or two, in one launch: for each
//
//   qkv = W norm(x) | attend, append | x += W attended | gated = act(gate) up of norm(x) | x += W gated
//
// Floor: the bytes of all weights and of the visible keys and values, read once; and six times a layer what one block
// wrote has to reach all others, which takes 0.7 us. What it takes to get there:
//
// * One block a multiprocessor stays for all layers, and has an even share of the rows of every weight. What a warp will
//   multiply is known from the start: its ring in shared memory is refilled without regard to where one product ends and
//   the next begins, so that memory goes on working while blocks wait for each other. Chunks and fragments are those of
//   linear.cu.
// * There is no barrier of all blocks. What is handed from block to block has its layer's number beside it, in the same 8
//   bytes, which are written and read at once (as NCCL's LL protocol does it): whoever needs it looks until the number is
//   right, and has it. No fence waits for anybody's loads, and no flag has to be looked at first. Nobody overtakes
//   anybody: a block writes where it wrote a layer ago only once all blocks have handed on what they made of that.
// * All blocks are resident (a cooperative launch), or nothing is launched: so nobody waits for one that never comes.
// * Small layers take as long as their instructions do, and an instruction that a warp comes to for the first time in
//   some microseconds takes 5 cycles or more: so there are few warps, with all registers that they need (what is spilled
//   here does not stay in the L1), and what may be done early is done while a block waits: to ask for weights, for the
//   first keys and values, for angles and the row's length.
// * A block attends with up to 4 query heads of a row's key head to one part of the slots; a warp's lanes share a key,
//   whose products are those of float32. Blocks that share a key head combine what all of them found, each a part of the
//   columns.
//
// The kernel is the order of it; stack_weights.h, stack_multiply.h and stack_attend.h are its parts.
#include <algorithm>

#include "stack_attend.h"
#include "stack_multiply.h"

namespace sinkattn::cuda {
namespace {

// The most columns that x has in any product.
__host__ __device__ inline int most_columns(const Stack& p) {
  const int heads = p.call.group * p.call.num_kv_heads * p.call.head_dim, wide = p.hidden > p.inner ? p.hidden : p.inner;
  return wide > heads ? wide : heads;
}

template <typename T, int DIM, int HEADS, int MOST>
__global__ void __launch_bounds__(THREADS, 1) stack_kernel(const __grid_constant__ Stack p, int stages) {
  extern __shared__ uint4 shared[];
  __shared__ Share shares[PRODUCTS];
  __shared__ float squares[WARPS * MAX_STACK_ROWS];
  __shared__ __align__(8) uint64_t barriers[WARPS * MOST_STAGES];
  const Call& c = p.call;
  uint4* x = shared + WARPS * stages * STAGE;
  uint4* attention_memory = x + c.batch * apart_of(most_columns(p) / 8);
  float* sums = reinterpret_cast<float*>(attention_memory + (ATTENTION_BYTES<DIM> + 15) / 16);
  StackLayer* layers = reinterpret_cast<StackLayer*>(sums + 2 * WARPS * c.batch * SUMS);
  T* own = reinterpret_cast<T*>(layers + p.num_layers);

  const int64_t* table = reinterpret_cast<const int64_t*>(p.layers);
  for (int i = threadIdx.x; i < p.num_layers * int(sizeof(StackLayer) / 8); i += THREADS)
    reinterpret_cast<int64_t*>(layers)[i] = table[i];
  if (threadIdx.x < PRODUCTS) shares[threadIdx.x].plan(p, threadIdx.x);
  __syncthreads();
  Weights weights(shares, layers, p.num_layers, shared + threadIdx.x / 32 * stages * STAGE,
                  barriers + threadIdx.x / 32 * MOST_STAGES, stages);
  uint32_t epoch = *p.epoch;
  const int width = shares[DOWN].end - shares[DOWN].begin;
  for (int i = threadIdx.x; i < c.batch * width; i += THREADS)
    own[i] = static_cast<const T*>(p.x)[int64_t(i / width) * p.hidden + shares[DOWN].begin + i % width];

  const int units = c.batch * c.num_kv_heads * p.shares * p.splits;
  Attend<T, DIM, HEADS> attention(p, attention_memory);
  Unit unit(p, min(int(blockIdx.x), units - 1));
  attention.begin_unit(unit);
  const bool is_one = units <= gridDim.x;  // or none: its first keys and values are asked for a product early
#pragma unroll 1
  for (int product = 0; product < p.num_layers * PRODUCTS; ++product) {
    const StackLayer& layer = layers[product / PRODUCTS];
    const int kind = product % PRODUCTS;
    const bool has_norm = kind == QKV || kind == GATE_UP, is_last = product + 1 == p.num_layers * PRODUCTS;
    const uint32_t before = epoch;
    if (kind == QKV) ++epoch;
    if (kind == OUTPUT) {
      weights.settle();
#pragma unroll 1
      for (int number = blockIdx.x; number < units; number += gridDim.x) {
        if (!is_one) unit = Unit(p, number), attention.begin_unit(unit), attention.prepare(unit, layer);
        if (number != blockIdx.x) __syncthreads();
        attention.turn(unit, layer, epoch);
        attention.attend(unit, layer);
        attention.combine_all(unit, epoch);
      }
    }
    const Handed* from = kind == QKV      ? (product ? p.last : nullptr)
                         : kind == OUTPUT ? p.attended
                         : kind == DOWN   ? p.gated
                                          : p.middle;
    weights.settle(weights.owed / 2);
    gather<T, MOST>(p, from, kind == QKV ? before : epoch, shares[kind].pieces,
                    has_norm ? layer.norms[kind == GATE_UP] : nullptr, x, squares, [&] {
                      weights.settle();
                      if (kind == QKV && is_one && blockIdx.x < units) attention.prepare(unit, layer);
                    });
    const Result result = {layer.biases[kind], has_norm ? nullptr : own,
                           kind == QKV      ? p.qkv
                           : kind == OUTPUT ? p.middle
                           : kind == DOWN   ? p.last
                                            : p.gated,
                           is_last ? p.out : nullptr};
    multiply_share<T, MOST>(p, shares[kind], weights, x, epoch, result, sums);
  }
  // All blocks have started, and read it: without them this one would not be here.
  if (blockIdx.x == 0 && threadIdx.x == 0) *p.epoch = epoch;
}

// Bytes of shared memory behind the rings, as the kernel lays them out.
template <int DIM>
int behind_rings(const Stack& p) {
  const int own = (p.hidden / 2 / p.blocks + 1) * 2;
  return p.num_layers * int(sizeof(StackLayer)) / 16 * 16 + 16 + p.call.batch * apart_of(most_columns(p) / 8) * 16 +
         (ATTENTION_BYTES<DIM> + 15) / 16 * 16 + 2 * WARPS * p.call.batch * SUMS * 4 + (p.call.batch * own * 2 + 15) / 16 * 16;
}
template <int DIM>
int stages_of(const Stack& p, const Device& device) {
  return std::min((device.shared_bytes - 2048 - behind_rings<DIM>(p)) / (WARPS * STAGE * 16), MOST_STAGES);
}

template <typename T, int DIM, int HEADS>
cudaError_t launch(const Stack& p, const Device& device, cudaStream_t stream) {
  const auto kernel = p.call.batch == 1 ? stack_kernel<T, DIM, HEADS, 1> : stack_kernel<T, DIM, HEADS, MAX_STACK_ROWS>;
  const int stages = stages_of<DIM>(p, device);
  if (stages < 2) return cudaErrorInvalidConfiguration;
  Grid grid(dim3(p.blocks), THREADS, stages * WARPS * STAGE * 16 + behind_rings<DIM>(p), stream);
  grid.all_resident();
  if (const cudaError_t error = grid.allow_shared(kernel)) return error;
  return cudaLaunchKernelEx(&grid.config, kernel, p, stages);
}

template <typename T, int DIM>
cudaError_t launch_as(const Stack& p, const Device& device, cudaStream_t stream) {
  const int heads = (p.call.group + p.shares - 1) / p.shares;
  const auto chosen = heads == 1   ? launch<T, DIM, 1>
                      : heads == 2 ? launch<T, DIM, 2>
                      : heads == 3 ? launch<T, DIM, 3>
                                   : launch<T, DIM, STACK_HEADS>;
  return chosen(p, device, stream);
}

}  // namespace

bool serves(const Stack& p, const Device& device) {
  const Call& c = p.call;
  if (c.head_dim != 64 && c.head_dim != 128) return false;
  if (c.batch < 1 || c.batch > MAX_STACK_ROWS || p.blocks < 1) return false;
  if (p.hidden % KC || p.inner % KC || c.group * c.num_kv_heads * c.head_dim % KC) return false;  // whole chunks
  if (c.batch * most_columns(p) * 2 > MOST_X_BYTES) return false;
  return (c.head_dim == 128 ? stages_of<128> : stages_of<64>)(p, device) >= 2;
}

int64_t lay_out(Stack& p, int slots, void* memory, const Device& device) {
  const Call& c = p.call;
  const int heads = c.group * c.num_kv_heads * c.head_dim, width = heads + 2 * c.num_kv_heads * c.head_dim;
  p.blocks = std::min({device.multiprocessors, p.hidden / 2, p.inner / 2, width / 2});  // each has a part in all
  p.shares = (c.group + STACK_HEADS - 1) / STACK_HEADS;
  const int pairs = c.batch * c.num_kv_heads * p.shares;
  p.splits = std::max(1, std::min({p.blocks / std::max(pairs, 1), (slots + 31) / 32, MOST_SPLITS}));
  char* at = static_cast<char*>(memory);
  p.epoch = reinterpret_cast<uint32_t*>(at), at += 16;
  auto take = [&](int64_t count) {
    Handed* taken = reinterpret_cast<Handed*>(at);
    at += (count * int64_t(sizeof(Handed)) + 15) / 16 * 16;
    return taken;
  };
  p.qkv = take(c.batch * width / 2), p.attended = take(c.batch * heads / 2), p.gated = take(c.batch * p.inner / 2);
  p.middle = take(c.batch * p.hidden / 2), p.last = take(c.batch * p.hidden / 2);
  p.values = take(int64_t(pairs) * p.splits * STACK_HEADS * c.head_dim);
  p.softmax = take(int64_t(pairs) * p.splits * STACK_HEADS * 2);
  return at - static_cast<char*>(memory);
}

cudaError_t stack(const Stack& p, const Device& device, cudaStream_t stream) {
  const bool is_wide = p.call.head_dim == 128;
  if (p.call.is_bfloat16) return (is_wide ? launch_as<__nv_bfloat16, 128> : launch_as<__nv_bfloat16, 64>)(p, device, stream);
  return (is_wide ? launch_as<__half, 128> : launch_as<__half, 64>)(p, device, stream);
}

}  // namespace sinkattn::cuda
