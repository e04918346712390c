// Products of stack.cu: a warp's columns of x into shared memory, and the block's share of their product with a weight. No
// torch in here.
#pragma once

#include "../activate.h"
#include "stack_weights.h"

namespace sinkattn::cuda {
namespace {

// How far rows of x lie apart in shared memory, in pieces of 16 bytes: lanes that have two rows meet different banks.
__host__ __device__ inline int apart_of(int pieces) { return pieces + (12 - pieces % 8) % 8; }

constexpr int QUADS = KC / 4;                        // of 4 numbers, of a chunk: two chunks are a quad for every lane
constexpr int TOGETHER = 4;                          // quads of a row that a lane looks at, at a time
constexpr int TOO_EARLY = 300;                       // clocks: who looks before, in vain, delays those who write
constexpr int MOST_NORMED = TOGETHER * 2 * WARPS * KC;  // columns: all are looked at at once

// A power of two that makes numbers up to `most` fit into float16, as bits of its exponent.
__device__ int exponent_for_half(float most) { return 268 - max(int(__float_as_uint(most) >> 23), 64); }
__device__ float power_of_two(int exponent) { return __uint_as_float(uint32_t(exponent) << 23); }

// A warp's columns of x, (rows, columns), on their way into its part of shared memory: as they are handed over or, if
// there is a norm, times its weight. The norm scales whole rows, so that it can wait.
template <typename T, int MOST>
struct Gather {
  static constexpr int STEP = 2 * WARPS * QUADS;
  const Handed* from;
  unsigned to;
  int rows, apart, quads, mine;
  float shift;
  uint32_t epoch;
  bool has_norm;
  uint2 norm[TOGETHER];
  uint4 two[TOGETHER][MOST];

  __device__ __forceinline__ Gather(const Stack& p, const Handed* from, uint32_t epoch, int chunks, const void* norm_weight,
                                    unsigned x)
      : from(from), to(x), rows(MOST == 1 ? 1 : p.call.batch), apart(apart_of(chunks * PIECES) * 2),
        quads(chunks * QUADS), shift(p.norm_shift), epoch(epoch), has_norm(norm_weight) {
    const int lane = threadIdx.x % 32;
    mine = (threadIdx.x / 32 + lane / QUADS * WARPS) * QUADS + lane % QUADS;
#pragma unroll
    for (int n = 0; n < TOGETHER; ++n) {
      norm[n] = make_uint2(0, 0);
      if (has_norm && mine + n * STEP < quads) norm[n] = __ldg(static_cast<const uint2*>(norm_weight) + mine + n * STEP);
    }
    pause<TOO_EARLY>();
    ask(mine);
  }
  __device__ __forceinline__ bool is_old(int n, int row) const { return two[n][row].y != epoch || two[n][row].w != epoch; }
  __device__ __forceinline__ void look(int n, int row, int i) { two[n][row] = read_pairs(from + (row * quads + i) * 2); }
  __device__ __forceinline__ void ask(int first) {
#pragma unroll
    for (int n = 0; n < TOGETHER; ++n) {
#pragma unroll
      for (int row = 0; row < MOST; ++row) {
        two[n][row] = make_uint4(0, 0, 0, 0);
        if (first + n * STEP < quads && row < rows) look(n, row, first + n * STEP);
      }
    }
  }
  // Until it is there. squares: sums of what the lane has seen. unit: what makes the warp's products whole again.
  __device__ __forceinline__ void finish(float (&squares)[MOST], float (&unit)[MOST]) {
    constexpr bool FITS = std::is_same_v<T, __nv_bfloat16>;  // anything; float16 is made to, by a power of two
    float2 a[FITS ? 1 : TOGETHER][MOST], b[FITS ? 1 : TOGETHER][MOST];
    float most[MOST] = {};
#pragma unroll
    for (int row = 0; row < MOST; ++row) squares[row] = 0, unit[row] = 1;
#pragma unroll 1
    for (int first = mine; first < quads; first += TOGETHER * STEP) {
      if (first > mine) ask(first);
#pragma unroll
      for (int n = 0; n < TOGETHER; ++n) {
        const int i = first + n * STEP;
        if (i >= quads) break;
#pragma unroll
        for (int row = 0; row < MOST; ++row) {
          if (row >= rows) break;
          while (is_old(n, row)) {  // at all that is old, so that what comes at the same time is seen at the same time
#pragma unroll
            for (int m = n; m < TOGETHER; ++m)
              if (first + m * STEP < quads && is_old(m, row)) look(m, row, first + m * STEP);
          }
          uint2 quad = make_uint2(two[n][row].x, two[n][row].z);
          if (has_norm) {
            float2 y = unpack<T>(quad.x), z = unpack<T>(quad.y);
            squares[row] += y.x * y.x + y.y * y.y + z.x * z.x + z.y * z.y;
            const float2 v = unpack<T>(norm[n].x), w = unpack<T>(norm[n].y);
            y.x *= shift + v.x, y.y *= shift + v.y, z.x *= shift + w.x, z.y *= shift + w.y;
            if constexpr (FITS) {
              quad = make_uint2(pack<T>(y.x, y.y), pack<T>(z.x, z.y));
            } else {
              a[n][row] = y, b[n][row] = z;
              most[row] = fmaxf(most[row], fmaxf(fmaxf(fabsf(y.x), fabsf(y.y)), fmaxf(fabsf(z.x), fabsf(z.y))));
              continue;
            }
          }
          write_shared(to + (row * apart + i) * 8, quad);
        }
      }
    }
    if (!FITS && has_norm) {
      __syncwarp();
#pragma unroll
      for (int row = 0; row < MOST; ++row) {
        const int exponent = exponent_for_half(__uint_as_float(__reduce_max_sync(~0u, __float_as_uint(most[row]))));
        const float by = power_of_two(exponent);
        unit[row] = power_of_two(254 - exponent);
#pragma unroll
        for (int n = 0; n < (FITS ? 1 : TOGETHER); ++n) {
          if (mine + n * STEP >= quads || row >= rows) break;
          write_shared(to + (row * apart + mine + n * STEP) * 8,
                       make_uint2(pack<T>(a[n][row].x * by, a[n][row].y * by),
                                  pack<T>(b[n][row].x * by, b[n][row].y * by)));
        }
      }
    }
    __syncwarp();
  }
};

// What goes into a product, and what it leaves: where that goes, and what is added.
struct Product {
  const Handed* from;
  uint32_t epoch;  // of what goes in
  const void *norm, *bias;
  bool has_norm;  // if not, what goes from layer to layer is added
  Handed* to;  // null for logits
  void* out;   // of the last layer, or logits
};

// Which of the results from `first` on a lane writes, or whose gate, or what that opens.
struct Written {
  int number, output, row, side, column;
  bool is_there;
  __device__ Written(const Share& share, int first, unsigned writer, int rows) {
    const bool both = first + share.size < share.end;
    number = writer % ROWS, side = both ? writer / ROWS % 2 : 0, row = writer / ROWS >> both;
    output = share.gated ? number % (ROWS / 2) : number, column = first + side * share.size + output;
    is_there = row < rows && output < share.size && column < share.end;
  }
  template <typename T>
  __device__ float bias(const void* biases, const Share& share) const {
    if (!biases || !is_there) return 0;
    return to_float(static_cast<const T*>(biases)[number == output ? column : share.count + column]);
  }
};

// Places in shared memory: x, (rows, columns); what warps hand each other: sums, (WARPS, rows, SUMS), and the next ones,
// and squares, (MOST, WARPS); own, (rows, the block's share) of what goes from layer to layer.
struct Memory {
  unsigned x, sums, next_sums, squares, own;
};

// What each warp has left, so many bytes apart.
__device__ float sum_of_warps(unsigned from, int apart) {
  float x[WARPS];
#pragma unroll
  for (int w = 0; w < WARPS; ++w) x[w] = read_shared<float>(from + w * apart);
#pragma unroll
  for (int n = WARPS / 2; n > 0; n /= 2) {
#pragma unroll
    for (int w = 0; w < n; ++w) x[w] += x[w + n];
  }
  return x[0];
}

// The block's share of one product with a weight.
template <typename T, int MOST>
__device__ __forceinline__ void multiply_share(const Stack& p, const Share& share, const Ring& ring, Place& at,
                                               Memory& memory, const Product& product, uint32_t epoch) {
  const int rows = MOST == 1 ? 1 : p.call.batch, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int g = lane / 4, c = lane % 4, chunks = share.chunks, begin = share.begin, end = share.end, size = share.size;
  const bool gated = share.gated, has_norm = product.has_norm;
  Gather<T, MOST> gather(p, product.from, product.epoch, chunks, product.norm, memory.x);
  // Pieces c and 4 + c of row g of a chunk of the weight, and of x.
  const unsigned here = ring.rows + (warp * ring.stages * STAGE + place(g, c)) * 16, there = here + (g & 1 ? -64 : 64);
  const unsigned full = ring.full + warp * ring.stages * 8, empty = ring.empty + warp * ring.stages * 8;
  const unsigned mine = memory.x + (g * apart_of(chunks * PIECES) + c) * 16;
  // Warps take turns at what is done once for all, the last first. It is worked out, and biases are asked for, while
  // something else is waited for.
  unsigned writer = threadIdx.x ^ (WARPS - 1) * 32;
  Written written(share, begin, writer, rows);
  float squares[MOST], unit[MOST], bias = written.bias<T>(product.bias, share);
  gather.finish(squares, unit);
#pragma unroll 1
  for (int first = begin; first < end; first += 2 * size) {
    const bool both = first + size < end;
    const unsigned own = memory.own + (written.row * (end - begin) + written.column - begin) * 2;
    float before = 0;
    float products[2][2][4] = {};  // of one side and the other: of pieces c, of pieces 4 + c
#pragma unroll 1
    for (int chunk = warp; chunk < chunks; chunk += WARPS) {
      uint4 y = make_uint4(0, 0, 0, 0), z = y;  // row g of x
      if (g < rows) y = read_shared(mine + chunk * (PIECES * 16)), z = read_shared(mine + chunk * (PIECES * 16) + 64);
#pragma unroll
      for (int side = 0; side < 2; ++side) {
        if (side == 1 && !both) break;
        const int behind = at.stage * (STAGE * 16), half = STAGE / 2 * 16;  // rows g and g + 8 of the weight
        wait_for_barrier(full + at.stage * 8, at.parity);
        const uint4 a = read_shared(here + behind), b = read_shared(here + behind + half);
        const uint4 d = read_shared(there + behind), e = read_shared(there + behind + half);
        __syncwarp();
        if (lane == 0) arrive(empty + at.stage * 8);
        at.step(ring.stages);
        multiply<T>(products[side][0], a.x, b.x, a.y, b.y, y.x, y.y);
        multiply<T>(products[side][1], d.x, e.x, d.y, e.y, z.x, z.y);
        multiply<T>(products[side][0], a.z, b.z, a.w, b.w, y.z, y.w);
        multiply<T>(products[side][1], d.z, e.z, d.w, e.w, z.z, z.w);
      }
    }
    if (written.is_there && !has_norm) before = to_float(read_shared<T>(own));
    if (has_norm && first == begin) {
#pragma unroll
      for (int r = 0; r < MOST; ++r) {
#pragma unroll
        for (int apart = 16; apart > 0; apart /= 2) squares[r] += __shfl_xor_sync(~0u, squares[r], apart);
        if (lane == 0) write_shared(memory.squares + (r * WARPS + warp) * 4, squares[r]);
      }
    }
    // Warps meet. A lane has rows g and g + 8 of the weight, columns 2 c and 2 c + 1.
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i % 2 >= MOST || c * 2 + i % 2 >= rows) continue;
      const float scale = std::is_same_v<T, __half> ? unit[i % 2] : 1;  // c is 0
      const unsigned to = memory.sums + ((warp * rows + i % 2) * SUMS + g + i / 2 * 8) * 4;
      write_shared(to, (products[0][0][i] + products[0][1][i]) * scale);
      if (both) write_shared(to + ROWS * 4, (products[1][0][i] + products[1][1][i]) * scale);
    }
    meet<THREADS>();
    if (int(writer) / 32 * 32 < rows * ROWS << both) {
      float y[1] = {0};
      if (written.row < rows) {
        y[0] = sum_of_warps(memory.sums + (written.row * SUMS + written.side * ROWS + written.number) * 4, rows * SUMS * 4);
        if (has_norm)
          y[0] *= rsqrtf(sum_of_warps(memory.squares + written.row * WARPS * 4, 4) * share.inverse + p.norm_eps);
        y[0] += bias;
      }
      if (gated) {
        const float opened = __shfl_xor_sync(~0u, y[0], ROWS / 2);
        activate(y, p.activation);
        y[0] *= opened;
      }
      if (written.is_there && !has_norm) {
        const T after = from_float<T>(y[0] + before);
        write_shared(own, after), y[0] = to_float(after);
      }
      const float other = __shfl_xor_sync(~0u, y[0], 1);
      if (written.is_there && written.number == written.output && written.output % 2 == 0) {
        const uint32_t two = pack<T>(y[0], other);
        const int at = (written.row * share.count + written.column) / 2;
        if (product.to) write_pair(product.to + at, two, epoch);
        if (product.out) static_cast<uint32_t*>(product.out)[at] = two;
      }
    }
    // The next sums go beside these: whoever writes over these has met all warps after they were read.
    writer = (writer + 32) % THREADS;
    const unsigned read_last = memory.sums;
    memory.sums = memory.next_sums, memory.next_sums = read_last;
    if (first + 2 * size < end) {
      written = Written(share, first + 2 * size, writer, rows);
      bias = written.bias<T>(product.bias, share);
    }
  }
}

}  // namespace
}  // namespace sinkattn::cuda
