// What one call of an op is about, unpacked from tensors, and the functions that compute it. No torch in here.
//
// Words as in sinkattn/reference.py: S = sink_size, R = ring_size, W = window_size, T = tokens; position, slot.
#pragma once

#include <cstdint>

#include "../activation.h"

namespace sinkattn {

constexpr int64_t MAX_HEAD_DIM = 256;  // as in sinkattn/backends.py

enum class DType { float32, float16, bfloat16, int8, float8 };

// A tensor (batch, heads, tokens or slots, dim) whose last dim is contiguous. Strides are in elements, not bytes.
struct Rows {
  void* data;
  int64_t batch_stride, head_stride, token_stride;
};

// Tokens [first, last) of a text, of a call over pages. The first stands at `position`.
struct Span {
  int64_t text, first, last, position;
};

struct Params {
  DType dtype;   // of q, k, v and out
  DType stored;  // of the caches: the same, or one of 8 bits
  int64_t batch, num_heads, num_kv_heads, tokens, head_dim, v_dim;
  int64_t sink_size, ring_size, window_size, dense_window;
  float scale, softcap;

  int64_t rotary_start, rotary_half;  // dims [start, start + 2 * half) are rotated
  bool interleaved;
  const float* rotation;  // (batch, T, text | sink, cos | sin, half), contiguous; null for none

  Rows q, k, v;           // k as it came, not rotated
  Rows new_k, new_v;      // as they are stored: written by prepare, read by the others; k and v if that changes nothing
  Rows k_cache, v_cache;  // slots in place of tokens
  Rows k_scales, v_scales, new_k_scales, new_v_scales;  // of caches in 8 bits: float, (batch, heads, tokens or slots)
  Rows out;               // (batch, T, num_heads, v_dim)

  const int64_t* lengths;       // (batch,)
  const int64_t* counts;        // (batch,); null: all T tokens of every row are its own
  const float* learned_logits;  // (num_heads,); null for none
  const float* alibi_slopes;    // (num_heads,); null for none
  // Of one token a row: what its queries have found elsewhere, (parts, batch, num_heads, v_dim), and how much that
  // weighs, (parts, batch, num_heads).
  const float *joined_values, *joined_logits;
  int joined_parts;

  // Of a call over pages, else null: its tokens, of all texts, one behind the other as if of one row. The caches' rows are
  // pages of block_size slots, and which one a text has for positions from i * block_size on is in its row of the table.
  const Span* spans;  // what a task takes of the tokens
  int64_t num_spans, block_size, table_stride;
  const int32_t* block_table;

  // A pair is a key head of a row of the batch, shared by `group` query heads. A task is a block of queries of a pair.
  int64_t group, block_tokens, blocks_per_pair;
};

// A product of few rows: out = act(gate) * up + residual with [gate | up] = RMSNorm(x) weight^T + bias. Null: left out.
struct Linear {
  DType dtype;  // of all but h
  int64_t rows, in_features, outputs, weight_stride, h_stride;
  const void *x, *norm_weight;  // (rows, in_features), (in_features,)
  const void *weight, *bias;    // (outputs, in_features), (outputs,), or twice as many of both with a gate
  const void* residual;         // (rows, outputs)
  void *h, *out;                // (rows, h_stride): what normalize() makes of x for multiply(); (rows, outputs)
  float norm_eps, norm_shift;
  Activation activation;
};

// attention.cpp and linear.cpp, compiled for one instruction set. Pairs, tasks and outputs are [begin, end).
struct Kernels {
  const char* name;
  int64_t task_rows;  // of queries, about: enough to share what they load, few enough for the L2 cache
  void (*prepare)(const Params&, int64_t begin_pair, int64_t end_pair);
  int64_t (*scratch_floats)(const Params&);  // size of attend's scratch memory, aligned to 64 bytes
  void (*attend)(const Params&, int64_t begin_task, int64_t end_task, float* scratch);
  void (*append)(const Params&, int64_t begin_pair, int64_t end_pair);
  void (*normalize)(const Linear&);
  void (*multiply)(const Linear&, int64_t begin_output, int64_t end_output);
};

namespace amx {
extern const Kernels kernels;
}
namespace avx512_bf16 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
namespace avx2 {
extern const Kernels kernels;
}
namespace portable {
extern const Kernels kernels;
}

}  // namespace sinkattn
