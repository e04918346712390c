// The arguments of decode and prefill, as the schema in sinkattn/schemas.py has them, and what both backends refuse.
#pragma once

#include <optional>

#include "tensors.h"

namespace sinkattn {

struct Tensors {
  const Tensor &q, &k, &v, &k_cache, &v_cache, &lengths;
  const std::optional<Tensor>&counts, &rotation, &learned_logits, &alibi_slopes, &k_scales, &v_scales;
};
// What the queries of a decode have found among other keys, in parts.
struct Joined {
  const float *values = nullptr, *logits = nullptr;  // (parts, batch, num_heads, v_dim), (parts, batch, num_heads)
  int parts = 0;
};
// Those of attend_pages.
struct Paged {
  const Tensor &q, &k, &v, &k_pages, &v_pages, &starts, &lengths, &block_table;
  const std::optional<Tensor>& rotation;
};
struct Sizes {
  int64_t sink_size, window_size;
  double scale, softcap;
  int64_t rotary_start;
  bool interleaved;
};

// `run` with the arguments of the schema, and what follows them.
template <auto run, class... More>
Tensor with_arguments(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& k_cache, const Tensor& v_cache,
                      const Tensor& lengths, const std::optional<Tensor>& counts, const std::optional<Tensor>& rotation,
                      const std::optional<Tensor>& learned_logits, const std::optional<Tensor>& alibi_slopes,
                      const std::optional<Tensor>& k_scales, const std::optional<Tensor>& v_scales,
                      int64_t sink_size, int64_t window_size, double scale, double softcap, int64_t rotary_start,
                      bool interleaved, More... more) {
  return run({q, k, v, k_cache, v_cache, lengths, counts, rotation, learned_logits, alibi_slopes, k_scales, v_scales},
             {sink_size, window_size, scale, softcap, rotary_start, interleaved}, more...);
}

// The same of attend_pages.
template <auto run, class... More>
Tensor with_pages(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& k_pages, const Tensor& v_pages,
                  const Tensor& starts, const Tensor& lengths, const Tensor& block_table,
                  const std::optional<Tensor>& rotation, int64_t sink_size, int64_t window_size, double scale,
                  double softcap, int64_t rotary_start, bool interleaved, More... more) {
  return run({q, k, v, k_pages, v_pages, starts, lengths, block_table, rotation},
             {sink_size, window_size, scale, softcap, rotary_start, interleaved}, more...);
}

inline bool in_8_bits(const Tensor& x) {
  return x.scalar_type() == ScalarType::Char || x.scalar_type() == ScalarType::Float8_e4m3fn;
}

// sinkattn/ops.py calls the ops first and words the error where they refuse, so what is refused there has to be refused
// here, before anything is written: but gradients, which it asks for itself.
inline void check(const Tensors& x, const Sizes& sizes) {
  const auto& [q, k, v, k_cache, v_cache, lengths, counts, rotation, learned_logits, alibi_slopes, k_scales,
               v_scales] = x;
  for (const Tensor* tensor : {&q, &k, &v, &k_cache, &v_cache}) {
    STD_TORCH_CHECK(tensor->dim() == 4 && (tensor->size(3) < 2 || tensor->stride(3) == 1),
                    "sinkattn: q, k, v, k_cache and v_cache must have 4 dims, the last of stride 1");
    const bool is_cache = tensor == &k_cache || tensor == &v_cache;
    STD_TORCH_CHECK(tensor->scalar_type() == (is_cache && in_8_bits(k_cache) ? k_cache : q).scalar_type(),
                    "sinkattn: q, k, v, k_cache and v_cache must have one dtype, or both caches one of 8 bits");
  }
  const auto device = device_of(q);
  for (const Tensor* tensor : {&k, &v, &k_cache, &v_cache, &lengths})
    STD_TORCH_CHECK(device_of(*tensor) == device, "sinkattn: all tensors must be on one device");
  for (const auto* tensor : {&counts, &rotation, &learned_logits, &alibi_slopes, &k_scales, &v_scales})
    STD_TORCH_CHECK(!*tensor || device_of(**tensor) == device, "sinkattn: all tensors must be on one device");

  const int64_t batch = q.size(0), num_heads = q.size(1), tokens = q.size(2), head_dim = q.size(3);
  const int64_t num_kv_heads = v.size(1), v_dim = v.size(3), slots = k_cache.size(2);
  STD_TORCH_CHECK(num_kv_heads > 0 && num_heads % num_kv_heads == 0 &&
                      has_shape(k, {batch, num_kv_heads, tokens, head_dim}) &&
                      has_shape(v, {batch, num_kv_heads, tokens, v_dim}) &&
                      has_shape(k_cache, {batch, num_kv_heads, slots, head_dim}) &&
                      has_shape(v_cache, {batch, num_kv_heads, slots, v_dim}),
                  "sinkattn: the shapes of q, k, v, k_cache and v_cache do not fit");
  STD_TORCH_CHECK(sizes.sink_size >= 0 && sizes.window_size >= 1 && sizes.sink_size <= slots &&
                      sizes.window_size <= slots - sizes.sink_size,
                  "sinkattn: sink_size and window_size do not fit the cache");
  STD_TORCH_CHECK(sizes.scale > 0, "sinkattn: scale must be positive");
  for (const auto* tensor : {&x.lengths, counts ? &*counts : &x.lengths})
    STD_TORCH_CHECK(has_shape(*tensor, {batch}) && tensor->scalar_type() == ScalarType::Long,
                    "sinkattn: lengths and counts must be int64 (batch,)");
  for (const auto* tensor : {&learned_logits, &alibi_slopes})
    STD_TORCH_CHECK(!*tensor || has_shape(**tensor, {num_heads}), "sinkattn: what is per head must be (num_heads,)");
  for (const auto* tensor : {&k_scales, &v_scales})
    STD_TORCH_CHECK(tensor->has_value() == in_8_bits(k_cache) &&
                        (!*tensor || (has_shape(**tensor, {batch, num_kv_heads, slots}) &&
                                      (*tensor)->scalar_type() == ScalarType::Float)),
                    "sinkattn: caches in 8 bits, and they alone, have scales, float32 (batch, num_kv_heads, slots)");
  if (!rotation) return;
  const int64_t half = rotation->dim() == 5 ? rotation->size(4) : 0;
  STD_TORCH_CHECK(has_shape(*rotation, {batch, tokens, 2, 2, half}) && sizes.rotary_start >= 0 &&
                      sizes.rotary_start <= head_dim - 2 * half,
                  "sinkattn: rotation must be (batch, tokens, 2, 2, r / 2), r dims from rotary_start");
  STD_TORCH_CHECK(rotation->scalar_type() == ScalarType::Float || rotation->scalar_type() == ScalarType::Double,
                  "sinkattn: rotation must be float32");
}

inline void check(const Paged& x, const Sizes& sizes, int64_t max_tokens) {
  const auto& [q, k, v, k_pages, v_pages, starts, lengths, block_table, rotation] = x;
  for (const Tensor* tensor : {&q, &k, &v, &k_pages, &v_pages}) {
    const int64_t dims = tensor == &k_pages || tensor == &v_pages ? 4 : 3;
    STD_TORCH_CHECK(tensor->dim() == dims && (tensor->size(dims - 1) < 2 || tensor->stride(dims - 1) == 1) &&
                        tensor->scalar_type() == q.scalar_type() && device_of(*tensor) == device_of(q),
                    "sinkattn: q, k and v must have 3 dims, pages 4, all one dtype and device, the last dim of stride 1");
  }
  const int64_t tokens = q.size(0), num_heads = q.size(1), head_dim = q.size(2), num_kv_heads = v.size(1);
  const int64_t blocks = k_pages.size(0), block_size = k_pages.size(2), v_dim = v.size(2);
  STD_TORCH_CHECK(num_kv_heads > 0 && num_heads % num_kv_heads == 0 && has_shape(k, {tokens, num_kv_heads, head_dim}) &&
                      has_shape(v, {tokens, num_kv_heads, v_dim}) && block_size > 0 && block_size % 16 == 0 &&
                      has_shape(k_pages, {blocks, num_kv_heads, block_size, head_dim}) &&
                      has_shape(v_pages, {blocks, num_kv_heads, block_size, v_dim}),
                  "sinkattn: the shapes of q, k, v and the pages do not fit");
  STD_TORCH_CHECK(sizes.sink_size >= 0 && sizes.window_size >= 1 && sizes.scale > 0 && max_tokens >= 0,
                  "sinkattn: sink_size, window_size, scale and max_tokens do not fit");
  STD_TORCH_CHECK(lengths.dim() == 1 && block_table.dim() == 2, "sinkattn: lengths or block_table do not fit");
  const int64_t texts = lengths.size(0), columns = block_table.size(1);
  STD_TORCH_CHECK(has_shape(starts, {texts + 1}) && has_shape(block_table, {texts, columns}) &&
                      (columns < 2 || block_table.stride(1) == 1),
                  "sinkattn: starts must be (texts + 1,), lengths (texts,), block_table (texts, n)");
  for (const Tensor* tensor : {&starts, &lengths, &block_table})
    STD_TORCH_CHECK(tensor->scalar_type() == ScalarType::Int && device_of(*tensor) == device_of(q),
                    "sinkattn: starts, lengths and block_table must be int32, on the device of q");
  if (!rotation) return;
  const int64_t half = rotation->dim() == 4 ? rotation->size(3) : 0;
  STD_TORCH_CHECK(has_shape(*rotation, {tokens, 2, 2, half}) && sizes.rotary_start >= 0 &&
                      sizes.rotary_start <= head_dim - 2 * half && device_of(*rotation) == device_of(q),
                  "sinkattn: rotation must be (tokens, 2, 2, r / 2), r dims from rotary_start");
  STD_TORCH_CHECK(rotation->scalar_type() == ScalarType::Float || rotation->scalar_type() == ScalarType::Double,
                  "sinkattn: rotation must be float32");
}

inline Joined joined_of(const Tensors& x, const std::optional<Tensor>& values, const std::optional<Tensor>& logits,
                        std::vector<Tensor>& copies) {
  STD_TORCH_CHECK(values.has_value() == logits.has_value(), "sinkattn: joined values need logits, and those values");
  if (!values) return {};
  const int64_t parts = values->dim() == 4 ? values->size(0) : 0, batch = x.q.size(0), num_heads = x.q.size(1);
  STD_TORCH_CHECK(parts > 0 && parts < 1 << 20 && has_shape(*values, {parts, batch, num_heads, x.v.size(3)}) &&
                      has_shape(*logits, {parts, batch, num_heads}) && values->scalar_type() == ScalarType::Float &&
                      logits->scalar_type() == ScalarType::Float && device_of(*values) == device_of(x.q) &&
                      device_of(*logits) == device_of(x.q),
                  "sinkattn: joined must be float32 (parts, batch, num_heads, v_dim) and (parts, batch, num_heads)");
  return {data_of<float>(*values, ScalarType::Float, copies), data_of<float>(*logits, ScalarType::Float, copies),
          int(parts)};
}

}  // namespace sinkattn
