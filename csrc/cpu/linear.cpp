// Few rows times a weight, RMSNorm before it, bias, gate and residual after it; compiled once per instruction set.
//
// The weight is streamed once. Its rows take the place of keys, x that of queries: tile.h. The same call gives the same
// bits with any number of threads.
#include "tile.h"

namespace sinkattn::SINKATTN_ISA {
namespace {

constexpr int64_t ROWS = 8;  // of x, while a weight is in the caches

template <typename T>
const T* at(const void* data, int64_t i) {
  return static_cast<const T*>(data) + i;
}

// y[r][n] = h[first + r] . w[n] for LANES rows of the weight, or fewer, of which `left` are still to come. y: ROWS
// rows.
template <typename T>
void dots(const Linear& p, int64_t first, int64_t rows, const T* w, int64_t count, int64_t left, float* y) {
  using Operand = typename Factor<T>::Type;
  constexpr int64_t step = LANES * PER_FLOAT<Operand>;
  const auto* h = static_cast<const Operand*>(p.h) + first * p.h_stride;
  const int64_t whole = p.in_features / step * step;
  const Ahead<T> next = {w + KEY_TILE * p.weight_stride, p.weight_stride, greater(left - KEY_TILE, 0)};
  for_tiles(0, rows, [&](auto tile, int64_t r) {
    dot_rows<tile()>(h + r * p.h_stride, p.h_stride, w, p.weight_stride, whole, count, y + r * LANES, LANES,
                     r == 0 ? next : Ahead<T>{});
  });
  for (int64_t r = 0; r < rows && whole < p.in_features; ++r)
    for (int64_t n = 0; n < count; ++n)
      for (int64_t d = whole; d < p.in_features; ++d)
        y[r * LANES + n] += to_float(h[r * p.h_stride + d]) * to_float(w[n * p.weight_stride + d]);
}

template <typename T>
Vec load_some(const T* x, int64_t count) {
  T some[LANES] = {};
  memcpy(some, x, count * sizeof(T));
  return load(some);
}

Vec activate(Vec x, Activation activation) {
  const Vec one = broadcast(1), half = broadcast(0.5f);
  if (activation == Activation::silu) {
    Vec zero = broadcast(0), e = exp_negative(x < zero ? x : -x);
    return x * (x < zero ? e : one) / (one + e);
  }
  if (activation == Activation::gelu_tanh)
    return half * x * (one + tanh(broadcast(0.79788456f) * (x + broadcast(0.044715f) * x * x * x)));
  Vec erf;
  for (int i = 0; i < LANES; ++i) erf[i] = __builtin_erff(x[i] * 0.70710678f);
  return half * x * (one + erf);
}

template <typename T>
void multiply_as(const Linear& p, int64_t begin, int64_t end) {
  const bool is_gated = p.activation != Activation::none;
  for (int64_t o = begin; o < end; o += LANES) {
    const int64_t count = lesser(LANES, end - o);
    for (int64_t first = 0; first < p.rows; first += ROWS) {
      const int64_t rows = lesser(ROWS, p.rows - first);
      float plain[ROWS * LANES] = {}, up[ROWS * LANES] = {};
      dots<T>(p, first, rows, at<T>(p.weight, o * p.weight_stride), count, end - o, plain);
      if (is_gated) dots<T>(p, first, rows, at<T>(p.weight, (p.outputs + o) * p.weight_stride), count, end - o, up);
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t to = (first + r) * p.outputs + o;
        auto with_bias = [&](const float* sums, int64_t i) {
          return p.bias ? load(sums + r * LANES) + load_some(at<T>(p.bias, i), count) : load(sums + r * LANES);
        };
        Vec y = with_bias(plain, o);
        if (is_gated) y = activate(y, p.activation) * with_bias(up, p.outputs + o);
        if (p.residual) y = y + load_some(at<T>(p.residual, to), count);
        for (int64_t i = 0; i < count; ++i) from_float(y[i], static_cast<T*>(p.out)[to + i]);
      }
    }
  }
}

// h = x or RMSNorm(x), rounded as LlamaRMSNorm and GemmaRMSNorm do.
template <typename T>
void normalize_as(const Linear& p) {
  using Operand = typename Factor<T>::Type;
  const auto* weight = static_cast<const T*>(p.norm_weight);
  for (int64_t r = 0; r < p.rows; ++r) {
    const T* x = at<T>(p.x, r * p.in_features);
    Operand* h = static_cast<Operand*>(p.h) + r * p.h_stride;
    memset(h, 0, p.h_stride * sizeof(Operand));
    if (!weight) {
      convert(x, p.in_features, h);
      continue;
    }
    Vec squares = broadcast(0);
    for (int64_t d = 0; d < p.in_features; d += LANES) {
      Vec some = d + LANES <= p.in_features ? load(x + d) : load_some(x + d, p.in_features - d);
      squares = fma(some, some, squares);
    }
    const float scale = 1 / __builtin_sqrtf(sum_lanes(squares) / p.in_features + p.norm_eps);
    for (int64_t d = 0; d < p.in_features; ++d) {
      T rounded;
      float normal = to_float(x[d]) * scale;
      if (p.norm_shift == 0) {
        from_float(normal, rounded);
        normal = to_float(rounded) * to_float(weight[d]);
      } else {
        normal = normal * (p.norm_shift + to_float(weight[d]));
      }
      from_float(normal, rounded);
      from_float(to_float(rounded), h[d]);
    }
  }
}

}  // namespace

void normalize(const Linear& p) {
  with_dtype(p.dtype, [&](auto zero) { normalize_as<decltype(zero)>(p); });
}

void multiply(const Linear& p, int64_t begin, int64_t end) {
  with_dtype(p.dtype, [&](auto zero) { multiply_as<decltype(zero)>(p, begin, end); });
}

}  // namespace sinkattn::SINKATTN_ISA
