// Phases `append` and `attend` of decode: new tokens in their slots, scores, the mask, the softmax, values. No torch in
// here.
//
// A lane of a warp, g = lane / 4 and c = lane % 4, has the rows g (and g + 8) of products: query heads, or one head and
// what rounding left of it. ROWS is how many softmax rows that makes: 1, or 2 of a group of more than 8.
#pragma once

#include "decode_block.h"

namespace sinkattn::cuda {
namespace {

// Two numbers in a register, the first in the low half.
template <typename T>
__device__ uint32_t pack(T low, T high) {
  return uint32_t(reinterpret_cast<uint16_t&>(low)) | uint32_t(reinterpret_cast<uint16_t&>(high)) << 16;
}

// softcap * tanh(x / softcap) in base 2, from 2 x / softcap in base 2, as tanh(y) = 2 / (1 + exp(-2 y)) - 1.
__device__ float capped(float score, float softcap) {
  return softcap > 0 ? softcap * LOG2E * (2 / (1 + exp2_fast(-score)) - 1) : score;
}

// What a token sees, of the position t that it stands at.
struct Seen {
  int slots, new_slot;
  int reach;  // ages of the ring, which count from the token, 0, back around the ring
  int sinks;  // that there are
  int from;   // where the sinks see the query

  __device__ Seen() {}
  __device__ Seen(const Call& p, int64_t t) : slots(p.sink_size + p.ring_size) {
    const bool in_ring = t >= p.sink_size;
    const int64_t written = t - p.sink_size;
    const int ring_slot = written >> 31 ? int(written % p.ring_size) : int(written) % p.ring_size;  // 64 bits take long
    new_slot = in_ring ? p.sink_size + ring_slot : int(t);
    reach = in_ring ? int(min(int64_t(p.window_size), written + 1)) : -slots;
    sinks = int(min(int64_t(p.sink_size), t + 1));
    from = int(min(t, int64_t(p.sink_size + p.window_size - 1)));
  }
  __device__ int age_of(int slot, int ring_size) const { return new_slot - slot + (slot > new_slot ? ring_size : 0); }
  __device__ bool hides(int slot, int age, bool is_sink) const {
    return is_sink ? slot >= sinks : age >= reach || slot >= slots;
  }
};

// Caps scores, takes ALiBi's share off them, and hides what is not visible. seen: of each softmax row, or of all (SEEN
// 1). hidden: what none of them sees, by `any`.
template <int ROWS, int SEEN>
__device__ __forceinline__ void mask(float (&x)[ROWS][2][2], bool (&hidden)[2][2], const float (&slope)[ROWS],
                                     const Params& p, const Seen (&seen)[SEEN], const Seen& any, int first, int c) {
#pragma unroll
  for (int j = 0; j < 2; ++j) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int slot = first + row_of(j * 8 + c * 2 + e);
      const bool is_sink = slot < p.sink_size;
      hidden[j][e] = any.hides(slot, any.age_of(slot, p.ring_size), is_sink);
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
        const Seen& by = seen[SEEN > 1 ? r : 0];
        const int age = by.age_of(slot, p.ring_size);
        float& y = x[r][j][e];
        if (p.softcap > 0) y = capped(y, p.softcap);
        if (p.alibi_slopes) y -= slope[r] * float(is_sink ? by.from - slot : age);
        if (SEEN > 1 ? by.hides(slot, age, is_sink) : hidden[j][e]) y = -INFINITY;
      }
    }
  }
}

// One step of the online softmax: scores to weights, of T. A lane sums the weights of its own keys. In 8 bits it then
// multiplies them by what the values have to be multiplied by (factors).
template <typename T, bool EIGHT_BITS, int ROWS, int N>
__device__ __forceinline__ void soften(const float (&x)[ROWS][2][2], const float (&factors)[2][2],
                                       uint32_t (&weights)[4], float (&top)[ROWS], float (&total)[ROWS],
                                       float (&acc)[N][4]) {
  constexpr bool WIDE = ROWS == 2;
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
      for (int i = 0; i < N; ++i) {
        acc[i][2 * r] *= fade, acc[i][2 * r + 1] *= fade;
        if (!WIDE) acc[i][2] *= fade, acc[i][3] *= fade;
      }
    }
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      float w0 = exp2_fast(x[r][j][0] - top[r]), w1 = exp2_fast(x[r][j][1] - top[r]);
      if (EIGHT_BITS) total[r] += w0 + w1, w0 *= factors[j][0], w1 *= factors[j][1];
      const T h0 = from_float<T>(w0), h1 = from_float<T>(w1);
      if (!EIGHT_BITS) total[r] += WIDE ? to_float(h0) + to_float(h1) : w0 + w1;
      if (!WIDE) weights[j * 2 + 1] = pack(from_float<T>(w0 - to_float(h0)), from_float<T>(w1 - to_float(h1)));
      weights[j * 2 + r] = pack(h0, h1);
    }
  }
}

// What a warp has found so far in its tiles. The block's text queries stay in registers where there is room.
template <typename B>
struct Attention {
  using T = typename B::T;
  using C = typename B::C;
  using S = typename B::S;
  using KeyRows = typename B::KeyRows;
  using ValueRows = typename B::ValueRows;
  using Eight = typename KeyRows::Eight;
  using W = std::conditional_t<B::EIGHT_BITS, __half, T>;  // in products, but for those of int8 queries and keys
  static constexpr int HEAD_DIM = B::HEAD_DIM, V_DIM = B::V_DIM;
  static constexpr int ROWS = B::WIDE ? 2 : 1;  // softmax rows of a lane: members g and g + 8
  static constexpr bool EIGHT_BITS = B::EIGHT_BITS, WIDE = B::WIDE, FEW = B::FEW;
  static constexpr bool INTEGERS = std::is_same_v<C, int8_t>;
  static constexpr int PARTS = INTEGERS && !WIDE ? 1 : 2;  // of a step's queries
  static constexpr bool KEEP = HEAD_DIM * PARTS <= (S::BLOCKS > 2 ? 128 : 256);

  const B& b;
  const Params& p;
  // Ages count from the last token of the block, or from the member's own, which is 0, back around the ring.
  const int64_t t;  // where the last token stands
  const int nth;    // of the new tokens of its row
  const Seen last;
  Seen seen[FEW ? ROWS : 1], any;
  const int new_slot, spread;  // ages of the block's own tokens, at most
  const bool wraps, is_plain;  // whether new tokens lie at both ends
  const uint4* query_pieces;
  uint4 kept[KEEP ? S::K_STEPS : 1][PARTS];
  float top[ROWS], total[ROWS], slope[ROWS], acc[S::V_STEPS * 8][4];
  float scale[ROWS];  // of products of queries and keys
  // In 8 bits acc is in this unit: about the largest scale of a value so far, so that float16 has weights by scales.
  float unit = 1e-30f, inverse = 1e30f;
  // Where the lane's eights are, in the steps of a line: of key number g; of values number 2 c and 2 c + 1.
  static constexpr int K_LINE = KeyRows::LINE / 4, V_LINE = ValueRows::LINE / 8;
  int key_at[K_LINE], value_at[V_LINE][2];

  __device__ __forceinline__ Attention(const B& b, int64_t t, int nth)
      : b(b), p(b.p), t(t), nth(nth), last(b.p, t), seen{last}, any(last), new_slot(last.new_slot),
        spread(FEW ? min(b.own - 1, nth) : 0), wraps(FEW && new_slot - nth < b.p.sink_size),
        is_plain(!(b.p.softcap > 0) && !b.p.alibi_slopes) {
    if constexpr (FEW) {
#pragma unroll
      for (int r = 0; r < ROWS; ++r) seen[r] = Seen(p, t - max(b.own - 1 - (b.g + 8 * r) / p.group, 0));
      if (any.reach > 0) any.reach = int(min(int64_t(p.window_size) + spread, t - p.sink_size + 1));
    }
    query_pieces = b.queries + (EIGHT_BITS ? b.g * S::QUERY_ROW : b.lane);
    if constexpr (KEEP) {
#pragma unroll
      for (int i = 0; i < S::K_STEPS; ++i) find_queries(kept[i], 0, i);
    }
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      top[r] = LOWEST, total[r] = 0, scale[r] = scale_of_queries(0, r);
      const int member = b.g + 8 * r;
      const bool has_slope = p.alibi_slopes && member < b.members;
      slope[r] = has_slope ? p.alibi_slopes[b.head * p.group + (FEW ? member % p.group : member)] * LOG2E : 0;
    }
#pragma unroll
    for (int i = 0; i < S::V_STEPS * 8; ++i) acc[i][0] = acc[i][1] = acc[i][2] = acc[i][3] = 0;
#pragma unroll
    for (int s = 0; s < K_LINE; ++s) key_at[s] = KeyRows::eight(row_of(b.g), 4 * s + b.c);
#pragma unroll
    for (int i = 0; i < 2 * V_LINE; ++i)
      value_at[i / 2][i % 2] = ValueRows::eight(row_of(2 * b.c + i % 2), i / 2 * 8 + b.g);
  }

  // Fragments of a step's queries, rows g and g + 8: of the first and of the last half of an eight of dims, or with int8
  // of the numbers and of what rounding left of them. Zero for heads that are not there, or past the last dim.
  __device__ __forceinline__ void find_queries(uint4 (&query)[PARTS], int angle, int step) const {
    const uint4* pieces = query_pieces + angle * S::QUERIES;
    const auto piece = [&](int half, int place) {
      const bool inside = b.g + 8 * half < b.members && (HEAD_DIM % 32 == 0 || step * 32 + b.c * 8 < HEAD_DIM);
      return inside ? pieces[half * 8 * S::QUERY_ROW + place] : make_uint4(0, 0, 0, 0);
    };
    if constexpr (!EIGHT_BITS) {
      const uint4 x = piece(0, step * 64);
      const uint4 y = WIDE ? piece(1, step * 64 + 32 - 8 * S::QUERY_ROW) : piece(0, step * 64 + 32);
      query[0] = make_uint4(x.x, y.x, x.y, y.y), query[1] = make_uint4(x.z, y.z, x.w, y.w);
    } else if constexpr (!WIDE) {
#pragma unroll
      for (int i = 0; i < PARTS; ++i) query[i] = piece(0, (step * 4 + b.c) * PARTS + i);
    } else if constexpr (INTEGERS) {
      const uint4 x = piece(0, step * 4 + b.c), y = piece(1, step * 4 + b.c);
      query[0] = make_uint4(x.x, y.x, x.z, y.z), query[1] = make_uint4(x.y, y.y, x.w, y.w);
    } else {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint4 x = piece(0, (step * 4 + b.c) * 2 + i), y = piece(1, (step * 4 + b.c) * 2 + i);
        query[i] = make_uint4(x.x, y.x, x.z, y.z);
      }
    }
  }
  __device__ __forceinline__ float scale_of_queries(int angle, int r) const {
    if (!EIGHT_BITS) return WIDE ? p.query_scale : 1;
    return b.g + 8 * r < b.members ? b.units[angle * MAX_GROUP + b.g + 8 * r] : 0;
  }

  // New tokens take the place of what their slots held, the block's own in the cache as well. What others append there
  // at this moment is hidden, or laid over like this.
  __device__ __forceinline__ void append(int first, uint4* key_rows, uint4* value_rows, float* scale_rows) const {
    const int before = FEW ? nth : 0;
    if (!((new_slot >= first && new_slot - before < first + KEYS) || wraps)) return;
    __syncwarp();
    for (int back = 0; back <= before; ++back) {
      int slot = new_slot - back;
      if (FEW && slot < p.sink_size && t - back >= p.sink_size) slot += p.ring_size;
      if (FEW && unsigned(slot - first) >= KEYS) continue;
      const auto *key = b.new_keys + (b.last_token - back) * HEAD_DIM, *value = b.new_values + (b.last_token - back) * V_DIM;
      const uint4 *new_key = reinterpret_cast<const uint4*>(key), *new_value = reinterpret_cast<const uint4*>(value);
      constexpr int NUMBERS = KeyRows::NUMBERS;
      const auto place = b.place_of(slot);
      for (int i = b.lane; i < KeyRows::PIECES; i += 32) {
        key_rows[KeyRows::place(slot - first, i)] = new_key[i];
        if (back < b.own) *reinterpret_cast<uint4*>(place.key + i * NUMBERS) = new_key[i];
      }
      for (int i = b.lane; i < ValueRows::PIECES; i += 32) {
        value_rows[ValueRows::place(slot - first, i)] = new_value[i];
        if (back < b.own) *reinterpret_cast<uint4*>(place.value + i * NUMBERS) = new_value[i];
      }
      if constexpr (EIGHT_BITS) {
        if (row_of(b.lane % KEYS) != slot - first) continue;
        scale_rows[b.lane] = b.lane < KEYS ? key[HEAD_DIM / 4] : value[V_DIM / 4];
        if (back < b.own) b.my_scale[first * b.scale_stride] = scale_rows[b.lane];
      }
    }
  }

  // Eight numbers of a key, as products of 16 bits take them.
  __device__ static uint4 numbers_of(const uint4& x) { return x; }
  __device__ static uint4 numbers_of(const uint2& x) {
    const uint2 low = widened<C>(x.x), high = widened<C>(x.y);
    return make_uint4(low.x, low.y, high.x, high.y);
  }

  // Products of the queries of an angle, 0 of text and 1 of sinks, with the tile's keys: product j is of keys number
  // 8 j ... + 7, of which a lane gets 2 c and 2 c + 1. N: of the second half of an eight, or of the second part of
  // queries, sums of their own, as products wait for the sum they add to.
  template <int ANGLE, typename N>
  __device__ __forceinline__ void multiply_keys(N (&sum)[2][4], N (&more)[2][4], const uint4* key_rows) const {
#pragma unroll
    for (int s = 0; s < S::K_STEPS; ++s) {
      uint4 query[PARTS];
      if constexpr (KEEP && ANGLE == 0) {
#pragma unroll
        for (int i = 0; i < PARTS; ++i) query[i] = kept[s][i];
      } else {
        find_queries(query, ANGLE, s);
      }
      const uint4 &a = query[0], &d = query[PARTS - 1];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const bool inside = HEAD_DIM % 32 == 0 || s * 32 + b.c * 8 < HEAD_DIM;
        const int place = key_at[s % K_LINE] + (s / K_LINE * KEYS + j * 8) * KeyRows::LINE;
        const Eight eight = inside ? reinterpret_cast<const Eight*>(key_rows)[place] : Eight{};
        if constexpr (INTEGERS) {
          multiply(sum[j], a.x, a.y, a.z, a.w, eight.x, eight.y);
          if (WIDE) multiply(more[j], d.x, d.y, d.z, d.w, eight.x, eight.y);
        } else {
          const uint4 key = numbers_of(eight);
          multiply<W>(sum[j], a.x, a.y, a.z, a.w, key.x, key.y);
          multiply<W>(more[j], d.x, d.y, d.z, d.w, key.z, key.w);
        }
      }
    }
  }
  template <int ANGLE>
  __device__ __forceinline__ void score_keys(float (&x)[ROWS][2][2], const float (&scale)[ROWS],
                                             const uint4* key_rows) const {
    using N = std::conditional_t<INTEGERS, int, float>;
    N sum[2][4] = {}, more[2][4] = {};
    multiply_keys<ANGLE>(sum, more, key_rows);
#pragma unroll
    for (int j = 0; j < 2; ++j)
#pragma unroll
      for (int e = 0; e < 2; ++e)
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
          const N first = sum[j][2 * r + e], last = INTEGERS ? 0 : more[j][2 * r + e];
          if (INTEGERS)
            x[r][j][e] = float(first * 256 + (WIDE ? more : sum)[j][WIDE ? 2 * r + e : 2 + e]) * scale[r];
          else if (WIDE)
            x[r][j][e] = (first + last) * scale[r];
          else
            x[r][j][e] = ((first + last) + (sum[j][2 + e] + more[j][2 + e])) * scale[r];
        }
  }
  __device__ __forceinline__ void score(float (&x)[ROWS][2][2], int first, const uint4* key_rows) const {
    score_keys<0>(x, scale, key_rows);
    if (first >= p.sink_size) return;
    float of_sinks[ROWS][2][2], by[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; ++r) by[r] = scale_of_queries(1, r);
    score_keys<1>(of_sinks, by, key_rows);
#pragma unroll
    for (int i = 0; i < ROWS * 4; ++i) {
      const int r = i / 4, j = i % 4 / 2, e = i % 2;
      if (first + row_of(j * 8 + b.c * 2 + e) < p.sink_size) x[r][j][e] = of_sinks[r][j][e];
    }
  }

  // Whether all of a tile is visible to all members: to the last token the oldest slot of its ring is, no age within it
  // begins anew, and the youngest slot is no younger than the first token. With a ring, sinks all are.
  __device__ __forceinline__ bool sees_all(int first) const {
    const int from = max(first, p.sink_size), oldest = last.age_of(from, p.ring_size);
    const bool anew = new_slot >= from && new_slot < first + KEYS - 1 && last.reach < p.ring_size;
    return first + KEYS <= b.slots && !anew && oldest < last.reach &&
           (!FEW || oldest - (first + KEYS - 1 - from) >= spread);
  }

  // In 8 bits: scores by the scales of the tile's keys, and what its weights are to be multiplied by.
  __device__ __forceinline__ void multiply_scores(float (&x)[ROWS][2][2], const float* scale_rows) const {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const float2 by = *reinterpret_cast<const float2*>(scale_rows + j * 8 + b.c * 2);
#pragma unroll
      for (int r = 0; r < ROWS; ++r) x[r][j][0] *= by.x, x[r][j][1] *= by.y;
    }
  }
  __device__ __forceinline__ void find_factors(float (&factors)[2][2], const float* scale_rows) {
    float largest = 0;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const float2 by = *reinterpret_cast<const float2*>(scale_rows + KEYS + j * 8 + b.c * 2);
      factors[j][0] = by.x, factors[j][1] = by.y;
      largest = fmaxf(largest, fmaxf(by.x, by.y));
    }
    largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 1));
    largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 2));
    if (largest > 16 * unit)  // the same in all lanes; weights reach 2^8, so 2^12 at most
      multiply_sums(__fdividef(unit, largest)), unit = largest, inverse = __fdividef(1, largest);
#pragma unroll
    for (int i = 0; i < 4; ++i) factors[i / 2][i % 2] *= inverse;
  }
  __device__ __forceinline__ void multiply_sums(float by) {
#pragma unroll
    for (int i = 0; i < S::V_STEPS * 32; ++i) acc[i / 4][i % 4] *= by;
  }

  // Numbers 2 n and 2 n + 1 of eights of two values, each with its like.
  __device__ static uint2 pairs_of(const uint4& x, const uint4& y, int n) {
    const uint32_t a = reinterpret_cast<const uint32_t*>(&x)[n], b = reinterpret_cast<const uint32_t*>(&y)[n];
    return make_uint2(__byte_perm(a, b, 0x5410), __byte_perm(a, b, 0x7632));
  }
  __device__ static uint2 pairs_of(const uint2& x, const uint2& y, int n) {
    const uint32_t a = n < 2 ? x.x : x.y, b = n < 2 ? y.x : y.y;
    return widened<C>(__byte_perm(a, b, n % 2 ? 0x7362 : 0x5140));
  }

  // Values that are not visible may hold NaN, which a weight of zero would not undo: they become zero.
  __device__ __forceinline__ void hide_values(uint4* value_rows, float* scale_rows, const bool (&hidden)[2][2]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (!hidden[i / 2][i % 2]) continue;
      const int number = i / 2 * 8 + b.c * 2 + i % 2, row = row_of(number);
      for (int piece = b.g; piece < ValueRows::PIECES; piece += 8)
        value_rows[ValueRows::place(row, piece)] = make_uint4(0, 0, 0, 0);
      if (EIGHT_BITS && b.g == 0) scale_rows[KEYS + number] = 0;
    }
    __syncwarp();
  }
  // Adds the tile's values.
  __device__ __forceinline__ void add_values(const uint32_t (&weights)[4], const uint4* value_rows) {
#pragma unroll
    for (int j = 0; j < S::V_STEPS; ++j) {
      Eight rows[4];
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const bool inside = V_DIM % 64 == 0 || j * 64 + b.g * 8 < V_DIM;
        const int place = value_at[j % V_LINE][r % 2] + (j / V_LINE * KEYS + r / 2 * 8) * ValueRows::LINE;
        rows[r] = inside ? reinterpret_cast<const Eight*>(value_rows)[place] : Eight{};
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint2 low = pairs_of(rows[0], rows[1], i), high = pairs_of(rows[2], rows[3], i);
        multiply<W>(acc[j * 8 + i * 2], weights[0], weights[1], weights[2], weights[3], low.x, high.x);
        multiply<W>(acc[j * 8 + i * 2 + 1], weights[0], weights[1], weights[2], weights[3], low.y, high.y);
      }
    }
  }

  // A tile that has come, its first slot `first`.
  __device__ __forceinline__ void take(int first, int stage) {
    uint4 *key_rows = b.key_rows(stage), *value_rows = b.value_rows(stage);
    float* scale_rows = b.scale_rows(stage);
    append(first, key_rows, value_rows, scale_rows);
    __syncwarp();
    float x[ROWS][2][2], factors[2][2];
    score(x, first, key_rows);
    if constexpr (EIGHT_BITS) multiply_scores(x, scale_rows);
    const bool all = sees_all(first);
    bool hidden[2][2] = {};
    if (!all || !is_plain) mask(x, hidden, slope, p, seen, any, first, b.c);
    if (!all) hide_values(value_rows, scale_rows, hidden);
    if constexpr (EIGHT_BITS) find_factors(factors, scale_rows);
    uint32_t weights[4];
    soften<W, EIGHT_BITS>(x, factors, weights, top, total, acc);
    add_values(weights, value_rows);
    __syncwarp();  // all have read
  }
};

}  // namespace
}  // namespace sinkattn::cuda
