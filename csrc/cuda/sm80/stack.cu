// Decoder layers, one after another, for one token of one row or two, in one launch: for each
//
//   qkv = W norm(x) | attend, append | x += W attended | gated = act(gate) up of norm(x) | x += W gated
//
// and behind the last one, if asked, logits = W norm(x).
//
// Floor: the bytes of all weights and of the visible keys and values, read once; and six times a layer what one block
// wrote has to reach all others, which takes 0.7 us. What it takes to get there:
//
// * One block a multiprocessor stays for all layers, and has an even share of the rows of every weight. Some of its warps
//   do nothing but ask for weights, into rings of those that multiply, whatever product these are at: so memory goes on
//   working while blocks wait for each other, and no warp that something waits for spends its time on asking. Chunks and
//   fragments are those of linear.cu.
// * There is no barrier of all blocks. What is handed from block to block has its layer's number beside it, in the same 8
//   bytes, which are written and read at once (as NCCL's LL protocol does it): whoever needs it looks until the number is
//   right, and has it. No fence waits for anybody's loads, and no flag has to be looked at first. Nobody overtakes
//   anybody: a block writes where it wrote a layer ago only once all blocks have handed on what they made of that.
// * All blocks are resident (a cooperative launch), or nothing is launched: so nobody waits for one that never comes.
// * Small layers take as long as the instructions between two hand-overs do, one after another. So a warp looks for the
//   columns of x that it multiplies, and for no others; the norm's scale waits for the sums; and warps meet once a product,
//   where they add up. Those that look for the same ask for what lies together: the L2 takes long over many requests.
// * All blocks look for the same few lines, so whoever looks in vain holds up those who write there. The first look comes
//   late, and a second one is at all that was old.
// * A block attends with up to 4 query heads of a row's key head to one part of the slots, which are in shared memory
//   before the queries are there. Products are those of 16 bits, of queries and of weights in two parts each, which is as
//   good as float32. Blocks that share a key head combine what all of them found, each a part of the columns.
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

template <typename T, int DIM, int MOST>
__global__ void __launch_bounds__(THREADS + ASKING, 1) stack_kernel(const __grid_constant__ Stack p, int stages) {
  extern __shared__ __align__(128) uint4 shared[];  // a row of a stage is a line; across two, copies are slow
  __shared__ Share shares[PRODUCTS + 1];
  __shared__ float all_squares[MOST * WARPS];
  __shared__ __align__(8) uint64_t barriers[2 * WARPS * MOST_STAGES];
  const Call& c = p.call;
  uint4* x = shared + WARPS * stages * STAGE;
  uint4* attention_memory = x + c.batch * apart_of(most_columns(p) / 8);
  float* sums = reinterpret_cast<float*>(attention_memory + (ATTENTION_BYTES<DIM> + 15) / 16);
  StackLayer* layers = reinterpret_cast<StackLayer*>(sums + 2 * WARPS * c.batch * SUMS);
  T* own = reinterpret_cast<T*>(layers + p.num_layers);

  const int64_t* table = reinterpret_cast<const int64_t*>(p.layers);
  for (int i = threadIdx.x; i < p.num_layers * int(sizeof(StackLayer) / 8); i += THREADS + ASKING)
    reinterpret_cast<int64_t*>(layers)[i] = table[i];
  if (threadIdx.x <= LOGITS) shares[threadIdx.x].plan(p, threadIdx.x);
  const Ring ring(shared, barriers, stages);
  __syncthreads();
  if (threadIdx.x >= THREADS) return ask_for_all(shares, layers, p.num_layers, p.logits_weight, ring);

  // x is handed to all blocks as if a layer had made it.
  uint32_t epoch = *p.epoch + 1;
  const int width = shares[DOWN].end - shares[DOWN].begin;
  for (int i = threadIdx.x; i < c.batch * width / 2; i += THREADS) {
    const int at = i / (width / 2) * (p.hidden / 2) + shares[DOWN].begin / 2 + i % (width / 2);
    const uint32_t both = static_cast<const uint32_t*>(p.x)[at];
    reinterpret_cast<uint32_t*>(own)[i] = both, write_pair(p.last + at, both, epoch);
  }

  const int units = c.batch * c.num_kv_heads * p.shares * p.splits;
  Attend<T, DIM> attention(p, attention_memory);
  Unit unit(p, min(int(blockIdx.x), units - 1));
  attention.begin_unit(unit);
  const bool is_one = units <= gridDim.x;  // or none: its first keys and values are asked for a product early
  Place at = {};                           // in the warp's ring
  Memory memory = {shared_address(x), shared_address(sums), shared_address(sums + WARPS * c.batch * SUMS),
                   shared_address(all_squares), shared_address(own)};
#pragma unroll 1
  for (const StackLayer* layer = layers; layer < layers + p.num_layers; ++layer) {
    if (is_one && blockIdx.x < units) attention.prepare(unit, *layer);
    const bool is_last = layer + 1 == layers + p.num_layers;
#pragma unroll 1
    for (int kind = 0; kind < PRODUCTS + (is_last && p.logits); ++kind) {
      const bool has_norm = kind == QKV || kind == GATE_UP || kind == LOGITS;
      if (kind == OUTPUT) {
#pragma unroll 1
        for (int number = blockIdx.x; number < units; number += gridDim.x) {
          if (number != blockIdx.x) meet<THREADS>();
          if (!is_one) {
            unit = Unit(p, number), attention.begin_unit(unit), attention.prepare(unit, *layer);
            meet<THREADS>();
          }
          attention.turn(unit, *layer, epoch);
          attention.attend(unit, *layer, epoch);
        }
      }
      const Product product = {kind == OUTPUT    ? p.attended
                               : kind == GATE_UP ? p.middle
                               : kind == DOWN    ? p.gated
                                                 : p.last,
                               epoch,
                               kind == LOGITS ? p.logits_norm
                               : has_norm     ? layer->norms[kind == GATE_UP]
                                              : nullptr,
                               kind == LOGITS ? nullptr : layer->biases[kind],
                               has_norm,
                               kind == QKV      ? p.qkv
                               : kind == OUTPUT ? p.middle
                               : kind == DOWN   ? p.last
                               : kind == LOGITS ? nullptr
                                                : p.gated,
                               kind == LOGITS              ? p.logits
                               : kind == DOWN && is_last ? p.out
                                                           : nullptr};
      if (kind == QKV) ++epoch;
      multiply_share<T, MOST>(p, shares[kind], ring, at, memory, product, epoch);
    }
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

template <typename T, int DIM>
cudaError_t launch(const Stack& p, const Device& device, cudaStream_t stream) {
  const auto kernel = p.call.batch == 1 ? stack_kernel<T, DIM, 1> : stack_kernel<T, DIM, MAX_STACK_ROWS>;
  const int stages = stages_of<DIM>(p, device);
  if (stages < 2) return cudaErrorInvalidConfiguration;
  Grid grid(dim3(p.blocks), THREADS + ASKING, stages * WARPS * STAGE * 16 + behind_rings<DIM>(p), stream);
  grid.all_resident();
  if (const cudaError_t error = grid.allow_shared(kernel)) return error;
  return cudaLaunchKernelEx(&grid.config, kernel, p, stages);
}

}  // namespace

bool serves(const Stack& p, const Device& device) {
  const Call& c = p.call;
  if (c.head_dim != 64 && c.head_dim != 128) return false;
  if (c.batch < 1 || c.batch > MAX_STACK_ROWS || p.blocks < 1) return false;
  if (p.hidden > MOST_NORMED) return false;
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
  if (p.call.is_bfloat16) return (is_wide ? launch<__nv_bfloat16, 128> : launch<__nv_bfloat16, 64>)(p, device, stream);
  return (is_wide ? launch<__half, 128> : launch<__half, 64>)(p, device, stream);
}

}  // namespace sinkattn::cuda
