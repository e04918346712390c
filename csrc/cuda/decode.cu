// One new token per row in one launch: rotate it, append it, attend over sinks and window.
//
// Floor: the bytes of the visible keys and values, read once. What it takes to get there:
//
// * A warp takes tiles of 16 slots, in the order in which they lie: the softmax does not mind. Which tiles depends on
//   nothing that is in memory, so the first loads are on their way before the length of the row is known. What is not
//   visible is masked afterwards.
// * Every warp keeps several tiles in flight (cp.async, 16 bytes a lane, whole rows) in shared memory of its own and waits
//   for nobody else. Products don't mind the order of what they sum over, so 16 bytes of a key are fragments of the tensor
//   cores as they lie in memory; values need their pairs swapped, which is one byte permutation per register.
// * Products have 16 rows. A group of up to 8 query heads fills the first 8; the others take what rounding leaves of
//   queries and weights, so that both are as good as float32 at no cost. Larger groups fill all 16 and round.
// * The warps of a block meet in shared memory, the blocks of a cluster in that of its first block, and blocks without
//   a cluster in memory, where the last to arrive combines what all found.
// * The next kernel may launch at once. Where `overlap` says that the cache is settled, its first tiles are asked for
//   before the kernel ahead is done.
#include <algorithm>
#include <atomic>

#include "decode.h"
#include "launch.h"
#include "numbers.h"

namespace sinkattn::cuda {
namespace {

// A tile is 16 rows of keys and 16 of values, in pieces of 16 bytes. Its columns are 8 pieces wide, and their rows are
// swizzled. Which row is number n in a product is free: with g = lane / 4 and c = lane % 4, a lane takes pieces 4 s + c of
// key number g (and g + 8), and pieces 8 j + g of values number 2 c, 2 c + 1 (and 8 more), and `row_of` is such that 8
// lanes, which read at a time, meet 32 different banks.
__device__ int row_of(int n) { return (n & 8) | ((n >> 2 ^ n) & 1) << 2 | (n & 2) | (n >> 2 & 1); }

template <int DIM>
struct Rows {
  static constexpr int PIECES = DIM / 8, COLUMNS = (DIM + 63) / 64, COLUMN = KEYS * 8, SIZE = COLUMNS * COLUMN;
  __device__ static int place(int row, int piece) { return piece / 8 * COLUMN + row * 8 + (piece % 8 ^ row % 8); }
};

// Large blocks come in clusters and have a multiprocessor each. Of small ones two share one, and while one of them
// starts or ends the other keeps the memory busy.
template <int HEAD_DIM, int V_DIM, bool LARGE>
struct Shape {
  static constexpr int WARPS = LARGE ? 8 : 4, THREADS = WARPS * 32;
  static constexpr int K_STEPS = (HEAD_DIM + 31) / 32, V_STEPS = (V_DIM + 63) / 64;
  static constexpr int TILE = Rows<HEAD_DIM>::SIZE + Rows<V_DIM>::SIZE;  // pieces, as all that follows
  // Tiles in flight per warp. With more, asking for them takes longer than they do.
  static constexpr int STAGES = LARGE ? (TILE <= 256 ? 4 : TILE <= 768 ? 2 : 1) : TILE <= 256 ? 6 : 3;
  static constexpr int WARP = STAGES * TILE, BLOCK = WARPS * WARP;
  static constexpr int QUERIES = K_STEPS * 64;  // of one angle: step, lane, (head g | its remainder or head g + 8)
};

// Dynamic shared memory in bytes: tiles, queries of both angles, the new key and value, then what blocks hand over.
template <int HEAD_DIM, int V_DIM, bool LARGE>
int shared_bytes(int splits, int group) {
  using S = Shape<HEAD_DIM, V_DIM, LARGE>;
  const int handed = LARGE && splits > 1 ? splits * group * (V_DIM + 2) * int(sizeof(float)) : 0;
  return (S::BLOCK + 2 * S::QUERIES) * 16 + (HEAD_DIM + V_DIM) * 2 + handed;
}

__device__ void copy_async(void* shared, const void* global) {
  const unsigned place = __cvta_generic_to_shared(shared);
  uint64_t once;  // it is read once a step, and need not stay in the L2
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(once));
  asm volatile("cp.async.cg.shared.global.L2::cache_hint.L2::128B [%0], [%1], 16, %2;" ::"r"(place), "l"(global),
               "l"(once)
               : "memory");
}

template <int PENDING>
__device__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// Two numbers in a register, the first in the low half.
template <typename T>
__device__ uint32_t pack(T low, T high) {
  return uint32_t(reinterpret_cast<uint16_t&>(low)) | uint32_t(reinterpret_cast<uint16_t&>(high)) << 16;
}

// softcap * tanh(x / softcap) in base 2, from 2 x / softcap in base 2, as tanh(y) = 2 / (1 + exp(-2 y)) - 1.
__device__ float capped(float score, float softcap) {
  return softcap > 0 ? softcap * LOG2E * (2 / (1 + exp2_fast(-score)) - 1) : score;
}

// Clusters, from sm_90 on. Blocks hand what they found to the first one by stores that count themselves in at a barrier
// in its shared memory: nobody but the first block waits.
__device__ void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
}
__device__ void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

// A barrier that the bytes of such stores open.
__device__ void expect_bytes(uint64_t* barrier, int bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(barrier)) : "memory");
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}
__device__ void wait_for_bytes(uint64_t* barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n.reg .pred done;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], 0;\n@!done bra again;\n}" ::"r"(
          shared_address(barrier))
      : "memory");
#endif
}
__device__ unsigned in_first_block(const void* x) {
  unsigned address = shared_address(x);
#if __CUDA_ARCH__ >= 900
  asm("mapa.shared::cluster.u32 %0, %0, 0;" : "+r"(address));
#endif
  return address;
}
__device__ void hand_over(unsigned place, float4 x, unsigned barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(place),
               "f"(x.x), "f"(x.y), "f"(x.z), "f"(x.w), "r"(barrier)
               : "memory");
#endif
}
__device__ void hand_over(unsigned place, float2 x, unsigned barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, %2}, [%3];" ::"r"(place),
               "f"(x.x), "f"(x.y), "r"(barrier)
               : "memory");
#endif
}

// Counts blocks in that have written what they found, and returns how many did before.
__device__ int count_in(int* arrivals) {
  int before;
  asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], 1;" : "=r"(before) : "l"(arrivals) : "memory");
  return before;
}

// A dim of the heads of a row, its partner in the rotation, and the angles for text and sinks. 1 and 0 turn nothing.
struct Turn {
  int other;
  float cos[2], sin[2];
  __device__ Turn() {}
  __device__ Turn(const Params& p, int64_t row, int dim) : other(dim), cos{1, 1}, sin{0, 0} {
    const int i = dim - p.rotary_start, half = p.rotary_half;
    if (!p.rotation || i < 0 || i >= 2 * half) return;
    const bool is_first = p.interleaved ? i % 2 == 0 : i < half;
    const int pair = p.interleaved ? i / 2 : is_first ? i : i - half, apart = p.interleaved ? 1 : half;
    const float* angles = p.rotation + row * (4 * half) + pair;
    other = dim + (is_first ? apart : -apart);
    cos[0] = angles[0], cos[1] = angles[2 * half];
    sin[0] = is_first ? -angles[half] : angles[half], sin[1] = is_first ? -angles[3 * half] : angles[3 * half];
  }
  template <typename T>
  __device__ float operator()(const T (&x)[2], int angle) const {  // a dim and its partner
    return to_float(x[0]) * cos[angle] + to_float(x[1]) * sin[angle];
  }
};

// Sums of weighted values, with the maximum and sum of the softmax they belong to.
struct Combined {
  float4 sum;
  float top, total;
};

// The same of `count` parts whose values and softmax lie so far apart, MOST at a time, in their order: the same bits
// every time.
template <int MOST>
__device__ Combined combine(int count, const float* values, int apart, const float* softmax, int softmax_apart) {
  Combined x = {make_float4(0, 0, 0, 0), LOWEST, 0};
  for (int first = 0; first < count; first += MOST, values += MOST * apart, softmax += MOST * softmax_apart) {
    float2 part[MOST];
    float4 value[MOST];
#pragma unroll
    for (int n = 0; n < MOST; ++n) {
      const bool there = first + n < count;
      part[n] = there ? *reinterpret_cast<const float2*>(softmax + n * softmax_apart) : make_float2(LOWEST, 0);
      value[n] = there ? *reinterpret_cast<const float4*>(values + n * apart) : make_float4(0, 0, 0, 0);
    }
    float top = x.top;
#pragma unroll
    for (int n = 0; n < MOST; ++n) top = fmaxf(top, part[n].x);
    const float fade = exp2_fast(x.top - top);
    x.top = top, x.total *= fade, x.sum.x *= fade, x.sum.y *= fade, x.sum.z *= fade, x.sum.w *= fade;
#pragma unroll
    for (int n = 0; n < MOST; ++n) {
      const float weight = exp2_fast(part[n].x - top);
      x.total += weight * part[n].y;
      x.sum.x += weight * value[n].x, x.sum.y += weight * value[n].y;
      x.sum.z += weight * value[n].z, x.sum.w += weight * value[n].w;
    }
  }
  return x;
}

template <typename T, int HEAD_DIM, int V_DIM, bool WIDE, bool LARGE>
__global__ void __launch_bounds__(Shape<HEAD_DIM, V_DIM, LARGE>::THREADS)
    decode_kernel(const __grid_constant__ Params p, int share) {  // share: tiles of a block
  using S = Shape<HEAD_DIM, V_DIM, LARGE>;
  constexpr int WARPS = S::WARPS, THREADS = S::THREADS;
  constexpr int ROWS = WIDE ? 2 : 1;                // softmax rows per lane: heads g and g + 8
  extern __shared__ __align__(128) uint4 shared[];  // a row of a tile's column is a line; across two, copies are slow
  __shared__ __align__(8) float softmax[WARPS][MAX_GROUP][2];  // maximum and sum
  __shared__ uint64_t arrived;
  __shared__ bool is_last;
  let_next_launch();
  const int rank = blockIdx.x, splits = gridDim.x, head = blockIdx.y;
  const bool clustered = LARGE && splits > 1;
  if (clustered) {
    if (rank == 0 && threadIdx.x == 0) expect_bytes(&arrived, splits * p.group * (V_DIM + 2) * 4);
    cluster_arrive();
  }
  const int64_t row = blockIdx.z;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, c = lane % 4;
  const int slots = p.sink_size + p.ring_size, begin = rank * share;
  const bool has_sinks = begin * KEYS < p.sink_size;
  int end = min(begin + share, (slots + KEYS - 1) / KEYS);

  uint4* staged = shared + warp * S::WARP;
  T* queries = reinterpret_cast<T*>(shared + S::BLOCK);  // text, then sink
  T* new_key = queries + 2 * S::QUERIES * 8;
  T* new_value = new_key + HEAD_DIM;
  float* handed = reinterpret_cast<float*>(new_value + V_DIM);  // (splits, group, V_DIM), (splits, group, 2)

  // Tiles, whatever the length of the row is.
  T* keys = static_cast<T*>(p.k_cache) + row * p.k_cache_row + head * p.k_cache_head;
  T* values = static_cast<T*>(p.v_cache) + row * p.v_cache_row + head * p.v_cache_head;
  auto copy_rows = [&](auto rows, const T* x, int64_t stride, int first, uint4* place) {
    using R = decltype(rows);
    if (first + KEYS <= slots) {
      x += (first + lane / R::PIECES) * stride + lane % R::PIECES * 8;
#pragma unroll
      for (int i = 0; i < KEYS * R::PIECES / 32; ++i) {
        const int before = i * 32 / R::PIECES, r = (lane + i * 32) / R::PIECES, piece = (lane + i * 32) % R::PIECES;
        if (32 % R::PIECES == 0)  // the same piece of rows further down
          copy_async(place + R::place(r, piece), x + before * stride);
        else
          copy_async(place + R::place(r, piece), x + (r - lane / R::PIECES) * stride + (piece - lane % R::PIECES) * 8);
      }
    } else {
#pragma unroll 1
      for (int i = lane; i < KEYS * R::PIECES; i += 32) {
        const int r = i / R::PIECES, piece = i % R::PIECES;
        if (first + r < slots) copy_async(place + R::place(r, piece), x + (first + r) * stride + piece * 8);
      }
    }
  };
  auto fetch = [&](int tile, int stage) {
    if (tile < end) {
      uint4 *key_rows = staged + stage * S::TILE, *value_rows = key_rows + Rows<HEAD_DIM>::SIZE;
      copy_rows(Rows<HEAD_DIM>(), keys, p.k_cache_slot, tile * KEYS, key_rows);
      copy_rows(Rows<V_DIM>(), values, p.v_cache_slot, tile * KEYS, value_rows);
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
  };
  const int early = p.overlap ? (S::STAGES > 1 ? S::STAGES - 1 : 1) : 0;  // what is small shall not wait for all
#pragma unroll 1
  for (int stage = 0; stage < early; ++stage) fetch(begin + warp + stage * WARPS, stage);
  wait_for_launch();
  const int64_t pair = row * p.num_kv_heads + head;
  if (!LARGE && splits > 1 && threadIdx.x == 0)  // into the L2, long before it is needed
    asm volatile("prefetch.global.L2 [%0];" ::"l"(p.arrivals + pair));

  // What is small is asked for at once, and ahead of tiles, as it would wait behind them: the row's state, its angles,
  // query, new key and value.
  const int64_t t = p.lengths[row];
  const int64_t count = p.counts ? p.counts[row] : 1;
  // A thread takes a dim (or two) of every SPREAD-th head.
  constexpr int SPREAD = THREADS >= HEAD_DIM ? THREADS / HEAD_DIM : 1, DIMS = (HEAD_DIM + THREADS - 1) / THREADS;
  constexpr int HEADS = (WIDE ? 16 : 8) / SPREAD + ((WIDE ? 16 : 8) % SPREAD > 0);
  const int first_head = DIMS > 1 ? 0 : threadIdx.x / HEAD_DIM, first_dim = threadIdx.x - first_head * HEAD_DIM;
  Turn turns[DIMS];
  T query[DIMS][HEADS][2], key[DIMS][2], value[DIMS];  // dims and their partners
  if (first_head < SPREAD) {
    const T* q = static_cast<const T*>(p.q) + row * p.q_row + int64_t(head) * p.group * p.q_head;
    const T* k = static_cast<const T*>(p.k) + row * p.k_row + head * p.k_head;
    const T* v = static_cast<const T*>(p.v) + row * p.v_row + head * p.v_head;
#pragma unroll
    for (int i = 0; i < DIMS; ++i) {
      const int dim = first_dim + i * THREADS;
      if (HEAD_DIM % THREADS && dim >= HEAD_DIM) break;
      turns[i] = Turn(p, row, dim);
      key[i][0] = k[dim], key[i][1] = k[turns[i].other];
      if (dim < V_DIM) value[i] = v[dim];
#pragma unroll
      for (int h = 0; h < HEADS; ++h) {
        const T* x = q + (first_head + h * SPREAD) * p.q_head;
        if (first_head + h * SPREAD < p.group) query[i][h][0] = x[dim], query[i][h][1] = x[turns[i].other];
      }
    }
  }
#pragma unroll 1
  for (int stage = early; stage < S::STAGES; ++stage) fetch(begin + warp + stage * WARPS, stage);

  // The queries as fragments: piece (step * 32 + lane) * 2 + half holds 8 dims of a row of the products.
  if (first_head < SPREAD) {
#pragma unroll
    for (int i = 0; i < DIMS; ++i) {
      const int dim = first_dim + i * THREADS;
      if (HEAD_DIM % THREADS && dim >= HEAD_DIM) break;
      if (first_head == 0) {
        new_key[dim] = from_float<T>(turns[i](key[i], 0));
        if (dim < V_DIM) new_value[dim] = value[i];
      }
      auto write = [&](float x, int h, T* fragments) {
        T* place = fragments + (dim / 32 * 32 + h % 8 * 4 + dim % 32 / 8) * 16 + dim % 8;
        const T rounded = from_float<T>(x);
        place[h / 8 * 8] = rounded;
        if (!WIDE) place[8] = from_float<T>(x - to_float(rounded));
      };
#pragma unroll
      for (int h = 0; h < HEADS; ++h) {
        const int member = first_head + h * SPREAD;
        if (member >= p.group) continue;
        const float scale = WIDE ? 1 : p.query_scale;  // what is rounded is not scaled before
        write(turns[i](query[i][h], 0) * scale, member, queries);
        if (has_sinks) write(turns[i](query[i][h], 1) * scale, member, queries + S::QUERIES * 8);
      }
    }
  }
  T* out = static_cast<T*>(p.out) + (row * p.num_kv_heads + head) * p.group * V_DIM;
  if (count == 0) {  // for all that share the key head
    if (rank == 0)
      for (int i = threadIdx.x; i < p.group * V_DIM; i += THREADS) out[i] = from_float<T>(0);
    wait_for_copies<0>();
    if (clustered) cluster_wait();
    return;
  }
  __syncthreads();

  // Ages count from the new token, which is 0, back around the ring.
  const bool in_ring = t >= p.sink_size;
  const int64_t written = t - p.sink_size;
  const int ring_slot = written >> 31 ? int(written % p.ring_size) : int(written) % p.ring_size;  // 64 bits take long
  const int new_slot = in_ring ? p.sink_size + ring_slot : int(t);
  const int reach = in_ring ? int(min(int64_t(p.window_size), written + 1)) : -slots;  // ages seen of the ring
  const int sinks = int(min(int64_t(p.sink_size), t + 1));
  const int seen_from = int(min(t, int64_t(p.sink_size + p.window_size - 1)));  // where the sinks see the query
  if (t < slots) end = min(end, int(t) / KEYS + 1);  // further tiles are empty
  const bool is_full = reach == p.ring_size;  // then all is visible

  const uint4* query_pieces = reinterpret_cast<uint4*>(queries) + lane * 2;
  auto query_piece = [&](int angle, int step, int half) {  // zero for heads that are not there, or past the last dim
    const bool inside = g + (WIDE ? 8 * half : 0) < p.group && (HEAD_DIM % 32 == 0 || step * 32 + c * 8 < HEAD_DIM);
    return inside ? query_pieces[angle * S::QUERIES + step * 64 + half] : make_uint4(0, 0, 0, 0);
  };
  constexpr bool KEEP = HEAD_DIM <= 128;  // the text query's in registers
  uint4 kept[KEEP ? S::K_STEPS : 1][2];
  if constexpr (KEEP) {
#pragma unroll
    for (int i = 0; i < 2 * S::K_STEPS; ++i) kept[i / 2][i % 2] = query_piece(0, i / 2, i % 2);
  }
  auto text_query = [&](int step, int half) {
    if constexpr (KEEP)
      return kept[step][half];
    else
      return query_piece(0, step, half);
  };
  auto sink_query = [&](int step, int half) { return query_piece(1, step, half); };

  float top[ROWS], total[ROWS], slope[ROWS], acc[S::V_STEPS * 8][4];
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    top[r] = LOWEST, total[r] = 0;
    const bool has_slope = p.alibi_slopes && g + 8 * r < p.group;
    slope[r] = has_slope ? p.alibi_slopes[head * p.group + g + 8 * r] * LOG2E : 0;
  }
#pragma unroll
  for (int i = 0; i < S::V_STEPS * 8; ++i) acc[i][0] = acc[i][1] = acc[i][2] = acc[i][3] = 0;

  // Where the lane's pieces are: of key number g, steps 0 and 1; of values number 2 c and 2 c + 1.
  const int key_at[2] = {Rows<HEAD_DIM>::place(row_of(g), c), Rows<HEAD_DIM>::place(row_of(g), 4 + c)};
  const int value_at[2] = {Rows<V_DIM>::place(row_of(2 * c), g), Rows<V_DIM>::place(row_of(2 * c + 1), g)};
  const bool is_plain = !(p.softcap > 0) && !p.alibi_slopes;

  int stage = 0;
#pragma unroll 1
  for (int tile = begin + warp; tile < end; tile += WARPS) {
    wait_for_copies<S::STAGES - 1>();
    uint4 *key_rows = staged + stage * S::TILE, *value_rows = key_rows + Rows<HEAD_DIM>::SIZE;
    const int first = tile * KEYS;

    // The home of the new token: it takes the place of what the slot held, here and in the cache.
    if (unsigned(new_slot - first) < KEYS) {
      __syncwarp();
      for (int i = lane; i < HEAD_DIM / 8; i += 32) {
        const uint4 piece = reinterpret_cast<uint4*>(new_key)[i];
        key_rows[Rows<HEAD_DIM>::place(new_slot - first, i)] = piece;
        *reinterpret_cast<uint4*>(keys + new_slot * p.k_cache_slot + i * 8) = piece;
      }
      for (int i = lane; i < V_DIM / 8; i += 32) {
        const uint4 piece = reinterpret_cast<uint4*>(new_value)[i];
        value_rows[Rows<V_DIM>::place(new_slot - first, i)] = piece;
        *reinterpret_cast<uint4*>(values + new_slot * p.v_cache_slot + i * 8) = piece;
      }
    }
    __syncwarp();

    // Scores: product j is of keys number 8 j ... + 7, of which a lane gets 2 c and 2 c + 1.
    auto products = [&](float(&score)[2][4], auto query) {
      float more[2][4] = {};  // sums of their own, as products wait for the sum they add to
#pragma unroll
      for (int s = 0; s < S::K_STEPS; ++s) {
        const uint4 a = query(s, 0), b = query(s, 1);
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const bool inside = HEAD_DIM % 32 == 0 || s * 32 + c * 8 < HEAD_DIM;
          const int place = key_at[s % 2] + s / 2 * Rows<HEAD_DIM>::COLUMN + j * 64;
          const uint4 key = inside ? key_rows[place] : make_uint4(0, 0, 0, 0);
          multiply<T>(score[j], a.x, b.x, a.y, b.y, key.x, key.y);
          multiply<T>(more[j], a.z, b.z, a.w, b.w, key.z, key.w);
        }
      }
#pragma unroll
      for (int i = 0; i < 8; ++i) score[i / 4][i % 4] += more[i / 4][i % 4];
    };
    float score[2][4] = {};
    products(score, text_query);
    if (first < p.sink_size) {
      float of_sinks[2][4] = {};
      products(of_sinks, sink_query);
#pragma unroll
      for (int j = 0; j < 2; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (first + row_of(j * 8 + c * 2 + i % 2) < p.sink_size) score[j][i] = of_sinks[j][i];
    }

    float x[ROWS][2][2];
#pragma unroll
    for (int j = 0; j < 2; ++j)
#pragma unroll
      for (int e = 0; e < 2; ++e)
#pragma unroll
        for (int r = 0; r < ROWS; ++r)
          x[r][j][e] = WIDE ? score[j][2 * r + e] * p.query_scale : score[j][e] + score[j][2 + e];
    const bool all = is_full && first + KEYS <= slots;
    bool hidden[2][2] = {};
    if (!all || !is_plain) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int slot = first + row_of(j * 8 + c * 2 + e);
          const bool is_sink = slot < p.sink_size;
          const int age = new_slot - slot + (slot > new_slot ? p.ring_size : 0);
          hidden[j][e] = is_sink ? slot >= sinks : age >= reach || slot >= slots;
#pragma unroll
          for (int r = 0; r < ROWS; ++r) {
            float& y = x[r][j][e];
            if (p.softcap > 0) y = capped(y, p.softcap);
            if (p.alibi_slopes) y -= slope[r] * float(is_sink ? seen_from - slot : age);
            if (hidden[j][e]) y = -INFINITY;
          }
        }
      }
    }

    // One step of the online softmax. A lane sums the weights of its own keys.
    uint32_t weights[4];
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      float higher = fmaxf(fmaxf(x[r][0][0], x[r][0][1]), fmaxf(x[r][1][0], x[r][1][1]));
      higher = fmaxf(higher, __shfl_xor_sync(~0u, higher, 1));
      higher = fmaxf(fmaxf(higher, __shfl_xor_sync(~0u, higher, 2)), top[r]);
      // A maximum that is a little too low does no harm: weights may reach 2^8.
      if (__any_sync(~0u, higher > top[r] + 8)) {
        const float fade = exp2_fast(top[r] - higher);
        total[r] *= fade, top[r] = higher;
#pragma unroll
        for (int i = 0; i < S::V_STEPS * 8; ++i) {
          acc[i][2 * r] *= fade, acc[i][2 * r + 1] *= fade;
          if (!WIDE) acc[i][2] *= fade, acc[i][3] *= fade;
        }
      }
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const float w0 = exp2_fast(x[r][j][0] - top[r]), w1 = exp2_fast(x[r][j][1] - top[r]);
        const T h0 = from_float<T>(w0), h1 = from_float<T>(w1);
        if (WIDE) {
          total[r] += to_float(h0) + to_float(h1);
        } else {
          total[r] += w0 + w1;
          weights[j * 2 + 1] = pack(from_float<T>(w0 - to_float(h0)), from_float<T>(w1 - to_float(h1)));
        }
        weights[j * 2 + r] = pack(h0, h1);
      }
    }

    // Values: what is not visible may hold NaN, which a weight of zero would not undo.
#pragma unroll
    for (int j = 0; j < S::V_STEPS; ++j) {
      uint4 rows[4];
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const bool inside = V_DIM % 64 == 0 || j * 64 + g * 8 < V_DIM;
        const int place = value_at[r % 2] + j * Rows<V_DIM>::COLUMN + r / 2 * 64;
        rows[r] = inside ? value_rows[place] : make_uint4(0, 0, 0, 0);
      }
      if (!all) {
#pragma unroll
        for (int r = 0; r < 4; ++r)
          if (hidden[r / 2][r % 2]) rows[r] = make_uint4(0, 0, 0, 0);
      }
      const uint32_t(*words)[4] = reinterpret_cast<uint32_t(*)[4]>(rows);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int odd = 0; odd < 2; ++odd) {
          const unsigned selector = odd ? 0x7632 : 0x5410;
          const uint32_t b0 = __byte_perm(words[0][i], words[1][i], selector);
          const uint32_t b1 = __byte_perm(words[2][i], words[3][i], selector);
          multiply<T>(acc[j * 8 + i * 2 + odd], weights[0], weights[1], weights[2], weights[3], b0, b1);
        }
      }
    }
    __syncwarp();  // all have read
    fetch(tile + S::STAGES * WARPS, stage);
    stage = stage + 1 == S::STAGES ? 0 : stage + 1;
  }
  wait_for_copies<0>();
  __syncwarp();  // for the lanes' copies are each other's place

  // What the warp found, (group, V_DIM), where its tiles were.
  float* found = reinterpret_cast<float*>(staged);
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    total[r] += __shfl_xor_sync(~0u, total[r], 1);
    total[r] += __shfl_xor_sync(~0u, total[r], 2);
    const int member = g + 8 * r;
    if (member >= p.group) continue;
    if (c == 0) softmax[warp][member][0] = top[r], softmax[warp][member][1] = total[r];
#pragma unroll
    for (int j = 0; j < S::V_STEPS; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int dim = j * 64 + c * 16 + e * 8;
        if (V_DIM % 64 && dim >= V_DIM) continue;
        float a[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const float* both = acc[j * 8 + i];
          a[i] = WIDE ? both[2 * r + e] : both[e] + both[2 + e];
        }
        float4* place = reinterpret_cast<float4*>(found + member * V_DIM + dim);
        place[0] = make_float4(a[0], a[1], a[2], a[3]), place[1] = make_float4(a[4], a[5], a[6], a[7]);
      }
    }
  }
  __syncthreads();

  // Columns, (group, V_DIM), are combined four at a time.
  const int columns = p.group * V_DIM;
  auto finish = [&](int i, const Combined& x) {
    float top = x.top, total = x.total, fade = 1;
    if (p.learned_logits) {
      const float logit = p.learned_logits[head * p.group + i / V_DIM] * LOG2E;
      top = fmaxf(top, logit), fade = exp2_fast(x.top - top), total = total * fade + exp2_fast(logit - top);
    }
    fade = __fdividef(fade, total);
    const T rounded[4] = {from_float<T>(x.sum.x * fade), from_float<T>(x.sum.y * fade), from_float<T>(x.sum.z * fade),
                          from_float<T>(x.sum.w * fade)};
    *reinterpret_cast<uint2*>(out + i) = make_uint2(pack(rounded[0], rounded[1]), pack(rounded[2], rounded[3]));
  };
  auto of_block = [&](int i) {
    return combine<WARPS>(WARPS, reinterpret_cast<float*>(shared) + i, S::WARP * 4, softmax[0][i / V_DIM],
                          MAX_GROUP * 2);
  };
  if (splits == 1) {
    for (int i = threadIdx.x * 4; i < columns; i += THREADS * 4) finish(i, of_block(i));
  } else if constexpr (LARGE) {
    float* handed_softmax = handed + splits * columns;
    const unsigned there = in_first_block(handed + rank * columns);
    const unsigned there_softmax = in_first_block(handed_softmax + rank * p.group * 2);
    const unsigned barrier = in_first_block(&arrived);
    cluster_wait();  // the first block of the cluster has started
    for (int i = threadIdx.x * 4; i < columns; i += THREADS * 4) {
      const Combined x = of_block(i);
      hand_over(there + i * 4, x.sum, barrier);
      if (i % V_DIM == 0) hand_over(there_softmax + i / V_DIM * 8, make_float2(x.top, x.total), barrier);
    }
    if (rank > 0) return;
    wait_for_bytes(&arrived);
    for (int i = threadIdx.x * 4; i < columns; i += THREADS * 4)
      finish(i, combine<MAX_CLUSTER>(splits, handed + i, columns, handed_softmax + i / V_DIM * 2, p.group * 2));
  } else {
    const int64_t pairs = int64_t(p.batch) * p.num_kv_heads;
    float* found_values = p.partials + pair * splits * columns;
    float* found_softmax = p.partials + pairs * splits * columns + pair * splits * p.group * 2;
    for (int i = threadIdx.x * 4; i < columns; i += THREADS * 4) {
      const Combined x = of_block(i);
      *reinterpret_cast<float4*>(found_values + rank * columns + i) = x.sum;
      if (i % V_DIM == 0)
        *reinterpret_cast<float2*>(found_softmax + (rank * p.group + i / V_DIM) * 2) = make_float2(x.top, x.total);
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      is_last = count_in(p.arrivals + pair) == splits - 1;
      if (is_last) p.arrivals[pair] = 0;  // for the next launch
    }
    __syncthreads();
    if (!is_last) return;
    for (int i = threadIdx.x * 4; i < columns; i += THREADS * 4)
      finish(i, combine<8>(splits, found_values + i, columns, found_softmax + i / V_DIM * 2, p.group * 2));
  }
}

// `clusters` asked for: launches nothing and says how many clusters run at a time.
template <typename T, int HEAD_DIM, int V_DIM, bool WIDE, bool LARGE>
cudaError_t launch(const Params& p, Sharing sharing, const Device& device, cudaStream_t stream, int* clusters) {
  const auto kernel = decode_kernel<T, HEAD_DIM, V_DIM, WIDE, LARGE>;
  const int bytes = shared_bytes<HEAD_DIM, V_DIM, LARGE>(sharing.splits, p.group);
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(sharing.splits, p.num_kv_heads, p.batch);
  config.blockDim = dim3(Shape<HEAD_DIM, V_DIM, LARGE>::THREADS);
  config.dynamicSmemBytes = bytes;
  config.stream = stream;
  cudaLaunchAttribute attributes[2] = {};
  config.attrs = attributes;
  if (device.compute_major >= 9 && !clusters) {
    attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[0].val.programmaticStreamSerializationAllowed = 1;
    config.numAttrs = 1;
  }
  if (sharing.cluster && sharing.splits > 1) {
    cudaLaunchAttribute& cluster = attributes[config.numAttrs++];
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim = {unsigned(sharing.splits), 1, 1};
  }
  if (clusters) return cudaOccupancyMaxActiveClusters(clusters, kernel, &config);
  const int tiles = (p.sink_size + p.ring_size + KEYS - 1) / KEYS;
  return cudaLaunchKernelEx(&config, kernel, p, (tiles + sharing.splits - 1) / sharing.splits);
}

// f(shape) for the head dims of the call; returns what it returns, or `otherwise` for dims that are not served.
template <int HEAD_DIM, int V_DIM>
struct Dims {
  static constexpr int head_dim = HEAD_DIM, v_dim = V_DIM;
};
template <typename F, typename R>
R with_dims(const Params& p, R otherwise, F f) {
  const int dims = p.head_dim * 1024 + p.v_dim;
  switch (dims) {
    case 64 * 1025: return f(Dims<64, 64>());
    case 80 * 1025: return f(Dims<80, 80>());
    case 96 * 1025: return f(Dims<96, 96>());
    case 128 * 1025: return f(Dims<128, 128>());
    case 192 * 1024 + 128: return f(Dims<192, 128>());
    case 192 * 1025: return f(Dims<192, 192>());
    case 256 * 1025: return f(Dims<256, 256>());
    default: return otherwise;
  }
}

template <typename T>
cudaError_t launch_as(const Params& p, Sharing sharing, const Device& device, cudaStream_t stream, int* clusters) {
  return with_dims(p, cudaErrorInvalidValue, [&](auto dims) {
    constexpr int K = decltype(dims)::head_dim, V = decltype(dims)::v_dim;
    const bool large = sharing.cluster;
    const auto chosen = p.group > 8 ? (large ? launch<T, K, V, true, true> : launch<T, K, V, true, false>)
                                    : (large ? launch<T, K, V, false, true> : launch<T, K, V, false, false>);
    return chosen(p, sharing, device, stream, clusters);
  });
}

cudaError_t launch_any(const Params& p, Sharing sharing, const Device& device, cudaStream_t stream, int* clusters) {
  return (p.is_bfloat16 ? launch_as<__nv_bfloat16> : launch_as<__half>)(p, sharing, device, stream, clusters);
}

// Clusters of so many blocks that run at a time, found once. GPUs of several kinds in one process share the finding.
int clusters_at_a_time(const Params& p, int size, const Device& device) {
  static std::atomic<int> found[2][MAX_HEAD_DIM / 16 + 1][MAX_GROUP + 1][MAX_CLUSTER + 1] = {};
  std::atomic<int>& clusters = found[p.is_bfloat16][p.head_dim / 16][p.group][size];
  if (clusters == 0) {
    int count = 0;
    clusters = launch_any(p, {size, true}, device, nullptr, &count) == cudaSuccess && count > 0 ? count : -1;
  }
  return clusters;
}

}  // namespace

bool serves(const Params& p, Sharing sharing, const Device& device) {
  if (p.group > MAX_GROUP || p.batch > 65535 || p.num_kv_heads > 65535) return false;
  if (sharing.splits < 1 || sharing.splits > (sharing.cluster ? MAX_CLUSTER : MAX_SPLITS)) return false;
  if (sharing.cluster && sharing.splits > 1 && device.compute_major < 9) return false;
  return with_dims(p, false, [&](auto dims) {
    constexpr int K = decltype(dims)::head_dim, V = decltype(dims)::v_dim;
    const auto of_shape = sharing.cluster ? shared_bytes<K, V, true> : shared_bytes<K, V, false>;
    return of_shape(sharing.splits, p.group) + 1024 + 128 <= device.shared_bytes;  // and what is not dynamic
  });
}

Sharing sharing_of(const Params& p, const Device& device) {
  const int64_t pairs = int64_t(p.batch) * p.num_kv_heads, tiles = (p.sink_size + p.ring_size + KEYS - 1) / KEYS;
  if (pairs == 0 || pairs > device.multiprocessors) return {1, false};
  int size = MAX_CLUSTER;
  while (size > 0 && (tiles <= 8 * (size - 1) || !serves(p, {size, true}, device) ||
                      pairs > clusters_at_a_time(p, size, device)))
    --size;
  // Clusters may leave multiprocessors without work, small blocks do not; but to meet in memory takes as long as a
  // multiprocessor needs for some 128 KB, and the last one has to read what all found.
  const int splits = int(std::min<int64_t>(2 * device.multiprocessors / pairs, MAX_SPLITS));
  const int64_t of_one = size > 0 ? tiles / size : 2 * tiles, tile_bytes = KEYS * (p.head_dim + p.v_dim) * 2;
  const int64_t found_bytes = int64_t(splits) * p.group * (p.v_dim + 2) * 4;
  if ((of_one - 2 * tiles / splits) * tile_bytes > 128 * 1024 + 6 * found_bytes) return {splits, false};
  return size > 0 ? Sharing{size, true} : Sharing{1, false};
}

cudaError_t decode(const Params& p, Sharing sharing, const Device& device, cudaStream_t stream) {
  return launch_any(p, sharing, device, stream, nullptr);
}

}  // namespace sinkattn::cuda
