// Attention over sinks, window and the call's own tokens; compiled once per instruction set (SINKATTN_ISA names it).
//
// A task is a block of queries that share a key head. Its rows are, token by token, the query heads of the group. It
// walks over the keys that any of them sees, in blocks of consecutive positions, with a running softmax,
//
//     max' = max(max, scores)   weights = exp(scores - max')   sum' = f sum + sum(weights)   out' = f out + weights v
//     with f = exp(max - max')
//
// so a key or value is loaded once for all rows of the task, and scratch memory doesn't grow with the window. The order
// of all sums is fixed: the same call gives the same bits with any number of threads.
#include "amx.h"
#include "tile.h"

namespace sinkattn::SINKATTN_ISA {
namespace {

constexpr int64_t KEYS = 64;    // per block
constexpr int64_t VALUES = 32;  // that stay in the L1 cache until every column of the output has taken them
constexpr float INF = __builtin_inff();

template <typename Operand>
int64_t padded(int64_t dim) {  // the widest Vec has 16 lanes
  constexpr int64_t whole = 16 * PER_FLOAT<Operand>;
  return (dim + whole - 1) / whole * whole;
}

template <typename T>
T* at(const Rows& rows, int64_t row, int64_t head, int64_t token) {
  return static_cast<T*>(rows.data) + row * rows.batch_stride + head * rows.head_stride + token * rows.token_stride;
}

int64_t padding_of(const Params& p, int64_t row) { return p.counts ? p.tokens - p.counts[row] : 0; }

int64_t slot_of(const Params& p, int64_t position) {
  return position < p.sink_size ? position : p.sink_size + (position - p.sink_size) % p.ring_size;
}

int64_t page_of(const Params& p, int64_t text, int64_t position) {
  return p.block_table[text * p.table_stride + position / p.block_size];
}

// The first position after the sinks that a query at position t sees.
int64_t window_start(const Params& p, int64_t length, int64_t t) {
  int64_t oldest = t - p.window_size;  // exclusive
  if (p.dense_window > 0) oldest = greater(length - p.window_size, t - p.dense_window);
  return greater(p.sink_size, oldest + 1);
}

// Where the sinks see a query at position t: in a dense call it is counted on from where the row stood before.
int64_t sink_position(const Params& p, int64_t length, int64_t t) {
  const int64_t last = p.sink_size + p.window_size - 1;
  return p.dense_window > 0 ? t - length + lesser(length, last) : lesser(t, last);
}

// y = x with the rotary dims turned by the angles of cos and sin (half,). `angles` null: y = x.
template <typename T>
void rotate(const Params& p, const T* x, const float* angles, float* __restrict y) {
  convert(x, p.head_dim, y);
  if (!angles) return;
  const int64_t half = p.rotary_half;
  const float *cos = angles, *sin = angles + half;
  y += p.rotary_start;
  auto turn = [&](float& a, float& b, int64_t i) {
    const float left = a, right = b;
    a = left * cos[i] - right * sin[i];
    b = right * cos[i] + left * sin[i];
  };
  if (p.interleaved) {
    for (int64_t i = 0; i < half; ++i) turn(y[2 * i], y[2 * i + 1], i);
  } else {
    for (int64_t i = 0; i < half; ++i) turn(y[i], y[half + i], i);
  }
}

enum Angle { TEXT, SINK };
const float* angles_of(const Params& p, int64_t row, int64_t token, Angle angle) {
  return p.rotation ? p.rotation + ((row * p.tokens + token) * 2 + angle) * 2 * p.rotary_half : nullptr;
}

// out[r] += weights[r] . v for a tile of ROWS rows and COLUMNS vectors, for pairs of rows of v with its columns as
// interleave() leaves them; rows of weights are KEYS floats apart.
template <int ROWS, int COLUMNS, typename Operand, typename T, typename U>
void weigh_tile(const Operand* weights, const T* v, int64_t v_stride, int64_t count, float* out, int64_t out_stride,
                Ahead<U> ahead) {
  constexpr int TOGETHER = PER_FLOAT<Operand>;  // rows of v
  Vec sum[ROWS][COLUMNS] = {};
  for (int64_t n = 0; n < count; n += TOGETHER) {
    decltype(factors<Operand>(v)) value[COLUMNS];
#pragma GCC unroll 8
    for (int c = 0; c < COLUMNS; c += TOGETHER) {
      const T* x = v + n * v_stride + c * LANES;
      if constexpr (TOGETHER == 1)
        value[c] = load(x);
      else  // in want of a second row the first again, for its weight is 0
        interleave(load_pairs(x), load_pairs(n + 1 < count ? x + v_stride : x), value[c], value[c + 1]);
      for (int i = 0; i < TOGETHER; ++i) ahead.fetch(n + i, c * LANES, x + i * v_stride);
    }
    for (int r = 0; r < ROWS; ++r) {
      auto weight = repeated(weights + r * KEYS * TOGETHER + n);
      for (int c = 0; c < COLUMNS; ++c) sum[r][c] = fma(weight, value[c], sum[r][c]);
    }
  }
  for (int r = 0; r < ROWS; ++r) {
    for (int c = 0; c < COLUMNS; ++c) {
      float* o = out + r * out_stride + c * LANES;
      store(o, load(o) + sum[r][c]);
    }
  }
}

template <int ROWS, typename Operand, typename T, typename U>
void weigh_rows(const Operand* weights, const T* v, int64_t v_stride, int64_t count, float* out, int64_t out_stride,
                const Ahead<U>& ahead) {
  constexpr int COLUMNS = ROWS == 1 ? REGISTERS / 4 : REGISTERS / 8, FEW = PER_FLOAT<Operand>;
  for (int64_t n = 0; n < count; n += VALUES, v += VALUES * v_stride, weights += VALUES) {
    const int64_t some = lesser(VALUES, count - n);
    int64_t d = 0;
    for (; d + COLUMNS * LANES <= out_stride; d += COLUMNS * LANES)
      weigh_tile<ROWS, COLUMNS>(weights, v + d, v_stride, some, out + d, out_stride, ahead.at(n, n + some, d));
    for (; d < out_stride; d += FEW * LANES)
      weigh_tile<ROWS, FEW>(weights, v + d, v_stride, some, out + d, out_stride, ahead.at(n, n + some, d));
  }
}

// One query head of one token.
struct Row {
  int64_t position, window_start;  // of the token
  int64_t sink_position;           // where the sinks see it
  float max;                       // of its scores so far
  float slope;                     // ALiBi
};

// Queries of type T over keys and values of type Stored, multiplied as Operand.
template <typename T, typename Stored, typename Operand>
class Task {
  static constexpr bool in_pairs = PER_FLOAT<Operand> == 2, in_8_bits = sizeof(Stored) == 1;
  static constexpr bool takes_stored = !in_pairs || sizeof(Stored) == sizeof(Operand);  // as they lie there

 public:
  using Tiles = SINKATTN_ISA::Tiles<Operand>;

  Task(const Params& p, int64_t task, float* scratch)
      : p(p), group(p.group), dim(padded<Operand>(p.head_dim)), v_dim(padded<Operand>(p.v_dim)) {
    if (p.spans) {
      const Span& span = p.spans[task % p.num_spans];
      batch_row = 0, kv_head = task / p.num_spans, text = span.text;
      padding = first = span.first, last = span.last;  // as if what comes before were padding
      length = span.position, stored = length + last - first;
    } else {
      const int64_t pair = task / p.blocks_per_pair;
      batch_row = pair / p.num_kv_heads, kv_head = pair % p.num_kv_heads;
      padding = padding_of(p, batch_row), length = p.lengths[batch_row];
      stored = p.tokens == 1 ? length + 1 : length;
      first = task % p.blocks_per_pair * p.block_tokens;
      last = lesser(first + p.block_tokens, p.tokens);
    }
    const int64_t rows = p.block_tokens * group, tiled = rows + Tiles::ROWS - 1;
    auto take = [&scratch](int64_t floats) { return (scratch += floats) - floats; };
    auto take_operands = [&](int64_t n) { return reinterpret_cast<Operand*>(take(n / PER_FLOAT<Operand>)); };
    q[TEXT] = take_operands(tiled * dim), q[SINK] = take_operands(tiled * dim);
    out = take(rows * v_dim), scores = take(tiled * KEYS), sums = take(rows * LANES);
    keys = take_operands(KEYS * dim), values = take_operands(KEYS * v_dim);
    if (Tiles::ROWS > 1) {
      key_tiles = take_operands(KEYS * dim), value_tiles = take_operands(KEYS * v_dim);
      spare = take(Tiles::ROWS * v_dim);
    }
    key_scales = take(KEYS), value_scales = take(KEYS);
    state = reinterpret_cast<Row*>(take(rows * sizeof(Row) / sizeof(float)));
  }

  static int64_t scratch_floats(const Params& p) {
    const int64_t dim = padded<Operand>(p.head_dim), v_dim = padded<Operand>(p.v_dim);
    const int64_t rows = p.block_tokens * p.group, tiled = rows + Tiles::ROWS - 1;
    const int64_t block = KEYS * (dim + v_dim), packed = Tiles::ROWS > 1 ? block + Tiles::ROWS * v_dim : 0;
    return tiled * (2 * dim + KEYS) + rows * (v_dim + LANES + sizeof(Row) / sizeof(float)) + block + packed + 2 * KEYS;
  }

  void run() {
    for (int64_t token = first; token < lesser(last, padding); ++token)
      for (int64_t g = 0; g < group; ++g)
        memset(at<T>(p.out, batch_row, kv_head * group + g, token), 0, p.v_dim * sizeof(T));
    first = greater(first, padding);
    if (first >= last) return;

    start_rows();
    const int64_t t_first = position_of(first), t_last = position_of(last - 1);
    sinks_end = lesser(p.sink_size, t_last + 1), begin_text = window_start(p, length, t_first), end_text = t_last + 1;
    for (Block block = block_at(sinks_end > 0 ? 0 : begin_text); block.count > 0;) {
      const Block next = block_at(block.position + block.count);
      attend(block, next);
      block = next;
    }
    for (int64_t token = first, r = 0; token < last; ++token) {
      for (int64_t g = 0; g < group; ++g, ++r) {
        if constexpr (in_pairs)
          for (float* o = out + r * v_dim; o < out + (r + 1) * v_dim; o += 2 * LANES) sort<Operand>(o);
        T* result = at<T>(p.out, batch_row, kv_head * group + g, token);
        float sum = sum_lanes(load(sums + r * LANES));
        if (p.joined_parts > 0) sum = join(kv_head * group + g, r, sum);
        for (int64_t d = 0; d < p.v_dim; ++d) from_float(out[r * v_dim + d] / sum, result[d]);
      }
    }
  }

 private:
  int64_t position_of(int64_t token) const { return length + token - padding; }

  // Takes what a head's query has found elsewhere into its values, as if it were a key a part; returns the new sum.
  float join(int64_t head, int64_t r, float sum) {
    const int64_t apart = p.batch * p.num_heads, place = batch_row * p.num_heads + head;
    float max = state[r].max;  // finite: the token sees itself
    for (int part = 0; part < p.joined_parts; ++part) {
      const float logit = p.joined_logits[part * apart + place];
      max = logit > max ? logit : max;
    }
    const float fade = __builtin_expf(state[r].max - max);
    sum *= fade;
    for (int64_t d = 0; d < p.v_dim; ++d) out[r * v_dim + d] *= fade;
    for (int part = 0; part < p.joined_parts; ++part) {
      const int64_t at = part * apart + place;
      const float weight = __builtin_expf(p.joined_logits[at] - max);
      sum += weight;
      for (int64_t d = 0; d < p.v_dim; ++d) out[r * v_dim + d] += weight * p.joined_values[at * p.v_dim + d];
    }
    return sum;
  }

  void start_rows() {
    const int64_t rows = (last - first) * group;
    float turned[MAX_HEAD_DIM];
    memset(q[TEXT], 0, rows * dim * sizeof(Operand));  // dims from head_dim to dim stay 0
    memset(q[SINK], 0, rows * dim * sizeof(Operand));
    memset(out, 0, rows * v_dim * sizeof(float));
    memset(sums, 0, rows * LANES * sizeof(float));
    for (int64_t token = first, r = 0; token < last; ++token) {
      for (int64_t g = 0; g < group; ++g, ++r) {
        const int64_t head = kv_head * group + g, t = position_of(token);
        const T* query = at<T>(p.q, batch_row, head, token);
        for (int angle = TEXT; angle <= SINK; ++angle) {
          rotate(p, query, angles_of(p, batch_row, token, Angle(angle)), turned);
          convert(turned, p.head_dim, q[angle] + r * dim);
        }
        const float logit = p.learned_logits ? p.learned_logits[head] : -INF;  // as if a key without a value
        const float slope = p.alibi_slopes ? p.alibi_slopes[head] : 0;
        state[r] = {t, window_start(p, length, t), sink_position(p, length, t), logit, slope};
        if (logit != -INF) sums[r * LANES] = 1;
      }
    }
  }

  // Keys at the positions [position, position + count), contiguous in the cache, in a page or in the call's own tokens.
  struct Block {
    const Stored *k, *v;
    int64_t k_stride, v_stride, position, count;
    Angle angle;
    const float *k_scales, *v_scales;  // in 8 bits
    int64_t k_scales_stride, v_scales_stride;
  };

  // What begins at a position or, behind the sinks, with the first that any query sees. Without keys at the end.
  Block block_at(int64_t position) const {
    const Angle angle = position < sinks_end ? SINK : TEXT;
    if (angle == TEXT) position = greater(position, begin_text);
    int64_t count = lesser((angle == SINK ? sinks_end : end_text) - position, KEYS);
    if (count <= 0) return {};
    const bool is_new = position >= stored;
    const Rows &k = is_new ? p.new_k : p.k_cache, &v = is_new ? p.new_v : p.v_cache;
    int64_t holder = batch_row, row = position - length + padding;
    if (p.spans) {
      holder = page_of(p, text, position), row = position % p.block_size;
      count = lesser(count, p.block_size - row);
    } else if (!is_new) {
      row = slot_of(p, position);
      const int64_t wrap = angle == SINK ? p.sink_size : p.sink_size + p.ring_size;
      count = lesser(count, lesser(stored - position, wrap - row));
    }
    const Stored *key = at<Stored>(k, holder, kv_head, row), *value = at<Stored>(v, holder, kv_head, row);
    Block block = {key, value, k.token_stride, v.token_stride, position, count, angle};
    if constexpr (in_8_bits) {
      const Rows &ks = is_new ? p.new_k_scales : p.k_scales, &vs = is_new ? p.new_v_scales : p.v_scales;
      block.k_scales = at<float>(ks, batch_row, kv_head, row), block.k_scales_stride = ks.token_stride;
      block.v_scales = at<float>(vs, batch_row, kv_head, row), block.v_scales_stride = vs.token_stride;
    }
    return block;
  }

  // Positions and window starts grow from row to row, so the rows that see some of a block are neighbours.
  void attend(const Block& block, const Block& next) {
    int64_t begin = 0, end = (last - first) * group;
    while (begin < end && state[begin].position < block.position) ++begin;
    while (block.angle == TEXT && begin < end && state[end - 1].window_start >= block.position + block.count) --end;
    if (begin == end) return;

    if constexpr (in_8_bits) {
      for (int64_t n = 0; n < KEYS; ++n) {
        key_scales[n] = n < block.count ? UNIT<Stored> * block.k_scales[n * block.k_scales_stride] : 0;
        value_scales[n] = n < block.count ? UNIT<Stored> * block.v_scales[n * block.v_scales_stride] : 0;
      }
    }
    const Ahead<Stored> values_ahead = {block.v, block.v_stride, block.count};
    const Ahead<Stored> keys_ahead = next.count > 0 ? Ahead<Stored>{next.k, next.k_stride, next.count} : values_ahead;
    const bool aligned = p.head_dim == dim && p.v_dim == v_dim;
    if (takes_stored && aligned && (sizeof(Stored) == sizeof(Operand) || end - begin <= 2 * ROW_TILE)) {
      if constexpr (takes_stored)
        attend_rows(block.k, block.k_stride, block.v, block.v_stride, block, begin, end, values_ahead, keys_ahead);
    } else {  // widen once for all rows, which many pay for, and fill up to whole vectors
      for (int64_t n = 0; n < block.count; ++n) {
        convert(block.k + n * block.k_stride, p.head_dim, keys + n * dim);
        convert(block.v + n * block.v_stride, p.v_dim, values + n * v_dim);
        memset(keys + n * dim + p.head_dim, 0, (dim - p.head_dim) * sizeof(Operand));
        memset(values + n * v_dim + p.v_dim, 0, (v_dim - p.v_dim) * sizeof(Operand));
      }
      attend_rows(keys, dim, values, v_dim, block, begin, end, {}, keys_ahead);
    }
  }

  template <typename U>
  void attend_rows(const U* k, int64_t k_stride, const U* v, int64_t v_stride, const Block& block, int64_t begin,
                   int64_t end, const Ahead<Stored>& values_ahead, const Ahead<Stored>& keys_ahead) {
    if constexpr (Tiles::ROWS > 1)
      if (end - begin >= Tiles::ROWS) return attend_tiles(k, k_stride, v, v_stride, block, begin, end);
    const int64_t count = block.count;
    for_tiles(begin, end, [&](auto rows, int64_t r) {
      dot_rows<rows()>(q[block.angle] + r * dim, dim, k, k_stride, dim, count, scores + r * KEYS, KEYS,
                       r == begin ? values_ahead : Ahead<Stored>{});
    });
    for (int64_t r = begin; r < end; ++r) soften(block, r);
    for_tiles(begin, end, [&](auto rows, int64_t r) {
      weigh_rows<rows()>(reinterpret_cast<const Operand*>(scores + r * KEYS), v, v_stride, count, out + r * v_dim,
                         v_dim, r == begin ? keys_ahead : Ahead<Stored>{});
    });
  }

  // The same in tiles of rows. What the last one holds behind `end` is multiplied for nothing.
  template <typename U>
  void attend_tiles(const U* k, int64_t k_stride, const U* v, int64_t v_stride, const Block& block, int64_t begin,
                    int64_t end) {
    constexpr int64_t ROWS = Tiles::ROWS, DEPTH = Tiles::DEPTH, WHOLE = KEYS / ROWS;
    const int64_t count = block.count, depth = (count + DEPTH - 1) / DEPTH, columns = v_dim / ROWS;
    Tiles::pack_keys(k, k_stride, dim, count, WHOLE, key_tiles);
    Tiles::pack_values(v, v_stride, v_dim, count, depth, value_tiles);
    for (int64_t r = begin; r < end; r += ROWS) {
      const int64_t rows = lesser(ROWS, end - r);
      float* row_scores = scores + r * KEYS;
      Tiles::template multiply<WHOLE, false>(q[block.angle] + r * dim, dim, key_tiles, WHOLE * Tiles::SIZE, dim / DEPTH,
                                             row_scores, KEYS);
      auto* weights = reinterpret_cast<Operand*>(row_scores);
      constexpr int64_t apart = KEYS * PER_FLOAT<Operand>;
      for (int64_t i = 0; i < rows; ++i) {
        soften(block, r + i);
        if (count <= depth * DEPTH - LANES) store(weights + i * apart + depth * DEPTH - LANES, broadcast(0));
      }
      float* sums = out + r * v_dim;
      if (rows < ROWS) sums = static_cast<float*>(memcpy(spare, sums, rows * v_dim * sizeof(float)));
      int64_t c = 0;
      for (; c + 4 <= columns; c += 4)
        Tiles::template multiply<4, true>(weights, apart, value_tiles + c * Tiles::SIZE, columns * Tiles::SIZE, depth,
                                          sums + c * ROWS, v_dim);
      for (; c < columns; c += 2)
        Tiles::template multiply<2, true>(weights, apart, value_tiles + c * Tiles::SIZE, columns * Tiles::SIZE, depth,
                                          sums + c * ROWS, v_dim);
      if (rows < ROWS) memcpy(out + r * v_dim, spare, rows * v_dim * sizeof(float));
    }
  }

  // The scores of a row with a block's keys become weights. What a row does not see gets weight 0.
  void soften(const Block& block, int64_t r) {
    Row& row = state[r];
    const bool sinks = block.angle == SINK;
    const int64_t count = block.count, end = (count + LANES - 1) / LANES * LANES;  // <= KEYS
    const int64_t first = sinks ? 0 : lesser(greater(row.window_start - block.position, 0), count);
    const int64_t last = lesser(greater(row.position - block.position + 1, first), count);
    const bool is_seen = first == 0 && last == end;  // all of it
    const Vec scale = broadcast(p.scale), cap = broadcast(p.softcap), nothing = broadcast(-INF);
    const Vec from = broadcast(float(first)), to = broadcast(float(last)), slope = broadcast(row.slope);
    const Vec distance = broadcast(float((sinks ? row.sink_position : row.position) - block.position));
    float* row_scores = scores + r * KEYS;
    Vec block_max = nothing;
    for (int64_t n = 0; n < end; n += LANES) {
      const Vec key = broadcast(float(n)) + counting();
      Vec score = load(row_scores + n) * scale;
      if constexpr (in_8_bits) score = score * load(key_scales + n);
      if (p.softcap > 0) score = cap * tanh(score / cap);
      if (p.alibi_slopes) score = score - slope * (distance - key);
      if (!is_seen) score = key < from ? nothing : key < to ? score : nothing;
      store(row_scores + n, score);
      block_max = larger(block_max, score);
    }
    if (any_above(block_max, broadcast(row.max))) {  // seldom, once some blocks are done
      const float max = max_lanes(block_max);
      const Vec factor = exp_negative(broadcast(row.max - max));
      row.max = max;
      store(sums + r * LANES, load(sums + r * LANES) * factor);
      for (float* o = out + r * v_dim; o < out + (r + 1) * v_dim; o += LANES) store(o, load(o) * factor);
    }
    // All scores so far may be -inf: subtract 0 then, since -inf - -inf is NaN.
    const Vec subtract = broadcast(row.max == -INF ? 0 : row.max);
    auto* weights = reinterpret_cast<Operand*>(row_scores);
    Vec sum = load(sums + r * LANES);
    for (int64_t n = 0; n < end; n += LANES) {
      const Vec weight = exp_negative(load(row_scores + n) - subtract);
      store(weights + n, in_8_bits ? weight * load(value_scales + n) : weight);
      sum = sum + (in_8_bits ? weight : load(weights + n));  // as they are stored, rounded or not
    }
    store(sums + r * LANES, sum);
  }

  const Params& p;
  const int64_t group, dim, v_dim;  // dims are padded to whole vectors
  int64_t batch_row, kv_head, padding, length, text;
  int64_t stored;                           // positions before it are in the cache, the only token of a call as well
  int64_t first, last;                      // tokens
  int64_t sinks_end, begin_text, end_text;  // positions that any of them sees: [0, sinks_end), [begin_text, end_text)
  // Scratch: q by Angle (rows, dim), keys (KEYS, dim), values (KEYS, v_dim); out (rows, v_dim), scores (rows, KEYS),
  // sums of weights by lane (rows, LANES). For tiles: both packed, and outputs (ROWS, v_dim).
  Operand *q[2], *keys, *values, *key_tiles, *value_tiles;
  float *out, *scores, *sums, *spare, *key_scales, *value_scales;  // scales: (KEYS,) of a block in 8 bits
  Row* state;  // (rows,)
};

// f(a zero of the type of p's queries, one of the type of its caches).
template <typename F>
void with_dtypes(const Params& p, F f) {
  with_dtype(p.dtype, [&](auto zero) {
    if (p.stored == DType::int8) return f(zero, I8());
    if (p.stored == DType::float8) return f(zero, F8());
    f(zero, zero);
  });
}

template <typename T>
struct Of {
  using Type = T;
};
// f(Of<the type of p's tasks>).
template <typename F>
void with_task(const Params& p, F f) {
  with_dtypes(p, [&](auto zero, auto stored) {
    using T = decltype(zero);
    using Stored = decltype(stored);
    const int64_t rows = p.block_tokens * p.group;
    if constexpr (Tiles<T>::ROWS > 1)
      if (rows >= Tiles<T>::ROWS) return f(Of<Task<T, Stored, T>>());
    if constexpr (sizeof(Stored) == 1 && PER_FLOAT<typename Factor<T>::Type> == 2)
      if (rows <= 2 * ROW_TILE) return f(Of<Task<T, Stored, float>>());  // 8 bits become floats at once, not pairs
    f(Of<Task<T, Stored, typename Factor<T>::Type>>());
  });
}

// y = x / scale in 8 bits; returns the scale. What is not finite makes it NaN, and y 0.
template <typename Stored>
float quantise(const float* x, int64_t dim, Stored* y) {
  float most = 0, nothing = 0;
  for (int64_t d = 0; d < dim; ++d) {
    const float size = x[d] < 0 ? -x[d] : x[d];
    most = size > most ? size : most;
    nothing += x[d] * 0;
  }
  const float largest = LARGEST<Stored>, scale = most / largest + nothing;
  for (int64_t d = 0; d < dim; ++d) {
    const float number = scale > 0 ? x[d] / scale : 0;
    from_float(number > largest ? largest : number < -largest ? -largest : number, y[d]);
  }
  return scale;
}

// New keys and values as they are stored: rotated, in 8 bits.
template <typename T, typename Stored>
void prepare(const Params& p, int64_t begin, int64_t end) {
  float row_of[MAX_HEAD_DIM];
  for (int64_t pair = begin; pair < end; ++pair) {
    const int64_t row = pair / p.num_kv_heads, head = pair % p.num_kv_heads;
    for (int64_t token = padding_of(p, row); token < p.tokens; ++token) {
      rotate(p, at<T>(p.k, row, head, token), angles_of(p, row, token, TEXT), row_of);
      Stored* y = at<Stored>(p.new_k, row, head, token);
      if constexpr (sizeof(Stored) == 1) {
        *at<float>(p.new_k_scales, row, head, token) = quantise(row_of, p.head_dim, y);
        convert(at<T>(p.v, row, head, token), p.v_dim, row_of);
        *at<float>(p.new_v_scales, row, head, token) = quantise(row_of, p.v_dim, at<Stored>(p.new_v, row, head, token));
      } else {
        for (int64_t d = 0; d < p.head_dim; ++d) from_float(row_of[d], y[d]);
      }
    }
  }
}

template <typename T>
void append_to_pages(const Params& p, int64_t begin_head, int64_t end_head) {
  for (int64_t head = begin_head; head < end_head; ++head) {
    for (const Span* span = p.spans; span < p.spans + p.num_spans; ++span) {
      for (int64_t token = span->first; token < span->last; ++token) {
        const int64_t position = span->position + token - span->first, slot = position % p.block_size;
        const int64_t page = page_of(p, span->text, position);
        memcpy(at<T>(p.k_cache, page, head, slot), at<T>(p.new_k, 0, head, token), p.head_dim * sizeof(T));
        memcpy(at<T>(p.v_cache, page, head, slot), at<T>(p.new_v, 0, head, token), p.v_dim * sizeof(T));
      }
    }
  }
}

// Sinks, and what of the call's tokens is not overwritten by its own later ones.
template <typename Stored>
void append(const Params& p, int64_t begin, int64_t end) {
  if (p.spans) return append_to_pages<Stored>(p, begin, end);
  for (int64_t pair = begin; pair < end; ++pair) {
    const int64_t row = pair / p.num_kv_heads, head = pair % p.num_kv_heads;
    const int64_t padding = padding_of(p, row), length = p.lengths[row], total = length + p.tokens - padding;
    for (int64_t token = padding; token < p.tokens; ++token) {
      const int64_t position = length + token - padding;
      if (position >= p.sink_size && position < total - p.ring_size) continue;
      const int64_t slot = slot_of(p, position);
      auto copy = [&](const Rows& to, const Rows& from, int64_t bytes) {
        memcpy(at<Stored>(to, row, head, slot), at<Stored>(from, row, head, token), bytes);
      };
      copy(p.k_cache, p.new_k, p.head_dim * sizeof(Stored));
      copy(p.v_cache, p.new_v, p.v_dim * sizeof(Stored));
      if constexpr (sizeof(Stored) == 1) {
        *at<float>(p.k_scales, row, head, slot) = *at<float>(p.new_k_scales, row, head, token);
        *at<float>(p.v_scales, row, head, slot) = *at<float>(p.new_v_scales, row, head, token);
      }
    }
  }
}

}  // namespace

void normalize(const Linear&);  // linear.cpp
void multiply(const Linear&, int64_t begin, int64_t end);

// In the order of Kernels' members.
#define SINKATTN_STRING_(x) #x
#define SINKATTN_STRING(x) SINKATTN_STRING_(x)

extern const Kernels kernels = {
    SINKATTN_STRING(SINKATTN_ISA),
    Tiles<BF16>::ROWS > 1 ? 128 : 64,  // packing keys and values takes as long for any number
    [](const Params& p, int64_t begin, int64_t end) {
      with_dtypes(p, [&](auto zero, auto stored) { prepare<decltype(zero), decltype(stored)>(p, begin, end); });
    },
    [](const Params& p) {
      int64_t floats = 0;
      with_task(p, [&](auto of) { floats = decltype(of)::Type::scratch_floats(p); });
      return floats;
    },
    [](const Params& p, int64_t begin, int64_t end, float* scratch) {
      with_task(p, [&](auto of) {
        using Task = typename decltype(of)::Type;
        const typename Task::Tiles tiles{};
        for (int64_t task = begin; task < end; ++task) Task(p, task, scratch).run();
      });
    },
    [](const Params& p, int64_t begin, int64_t end) {
      with_dtypes(p, [&](auto, auto stored) { append<decltype(stored)>(p, begin, end); });
    },
    normalize,
    multiply,
};

}  // namespace sinkattn::SINKATTN_ISA
