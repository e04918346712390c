// The function that launches decode, and prefill of few tokens. No torch in here.
#pragma once

#include <algorithm>

#include "call.h"

namespace sinkattn::cuda {

constexpr int KEYS = 16;        // slots of a tile
constexpr int MAX_GROUP = 16;   // query heads that share a key head
constexpr int MAX_HEAD_DIM = 256;
constexpr int MAX_SPLITS = 64;  // small blocks that share a key head of a row
constexpr int MAX_CLUSTER = 8;  // large ones
constexpr int MAX_FEW = 16;     // tokens of a row
constexpr int SURELY_FEW = 8;   // of more, prefill may be faster once rows fill the GPU

struct Params : Call {  // of one token a row, or a few: R >= W + tokens - 1, so that none takes a slot that another sees
  int64_t q_token, k_token, v_token;
  const float* alibi_slopes;  // (num_heads,); null for none
  // Of one token a row: what its queries have found elsewhere, (parts, batch, num_heads, v_dim), and the logits that this
  // weighs by, (parts, batch, num_heads).
  const float *joined_values, *joined_logits;
  int joined_parts;
  // Of several small blocks a key head: what each finds, (rows_of, num_kv_heads, splits, width_of * group, v_dim) and
  // (..., splits, width_of * group, 2), and how many have, (rows_of, num_kv_heads), zero between launches.
  float* partials;
  int* arrivals;
  // Of one token a text over pages, else null. Rows of the caches are pages of `page_size` slots; a text's row of the table
  // says which of them has the positions from i * page_size on. The batch is the texts; a slot is a position, for which
  // ring_size is PAGED_RING - S, and q, k, v, rotation and out have their rows by `starts`.
  const int *starts, *text_lengths, *table;  // (batch + 1,), (batch,), (batch, ...)
  int64_t table_row;
  int page_size, all_tokens;  // all_tokens: with padding, whose output is zero
  bool overlap;  // the cache may be read before the kernel ahead is done, and what says where its tokens are
};
constexpr int PAGED_RING = 0x7fffff80;  // beyond all positions, and a tile or two below the last number

// Tiles of slots, or of those that a token over pages sees at most.
inline int tiles_of(const Params& p) {
  const int of_sinks = (p.sink_size + KEYS - 1) / KEYS;
  return p.starts ? of_sinks + (p.window_size + KEYS - 2) / KEYS + 1 : (p.sink_size + p.ring_size + KEYS - 1) / KEYS;
}

// How a key head of a token, or of a few, is shared: by so many small blocks, several to a multiprocessor, that meet in
// memory, or by a cluster of large ones, a multiprocessor each, that meet faster. Clusters of more than one are sm_90's first.
struct Sharing {
  int splits;
  bool cluster;
};

// Whether the kernel takes these head dims, this group and this sharing on such a device.
bool serves(const Params&, Sharing, const Device&);

// What is fast, on the current device.
Sharing sharing_of(const Params&, const Device&);

// Tokens that a block takes at once, as many as their query heads fill the rows of a product, and blocks for all tokens.
inline int width_of(const Params& p) {
  const int most = p.group < MAX_GROUP ? MAX_GROUP / std::max(p.group, 1) : 1, blocks = (p.tokens + most - 1) / most;
  return (p.tokens + blocks - 1) / std::max(blocks, 1);
}
inline int blocks_of(const Params& p) { return p.tokens < 2 ? p.tokens : (p.tokens + width_of(p) - 1) / width_of(p); }

// Rows of blocks that are launched: those of tokens, or of texts and, over pages, of padding.
inline int64_t rows_of(const Params& p) { return std::max(int64_t(p.batch) * blocks_of(p), int64_t(p.all_tokens)); }

// Floats of `partials`; 0 for none.
inline int64_t partial_floats(const Params& p, Sharing sharing) {
  if (sharing.cluster || sharing.splits == 1) return 0;
  return rows_of(p) * p.num_kv_heads * sharing.splits * width_of(p) * p.group * (p.v_dim + 2);
}

cudaError_t decode(const Params&, Sharing, const Device&, cudaStream_t);

}  // namespace sinkattn::cuda
