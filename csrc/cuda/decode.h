// The function that launches decode. No torch in here.
#pragma once

#include "call.h"

namespace sinkattn::cuda {

constexpr int KEYS = 16;        // slots of a tile
constexpr int MAX_GROUP = 16;   // query heads that share a key head
constexpr int MAX_HEAD_DIM = 256;
constexpr int MAX_SPLITS = 8;   // blocks that share a key head of a row: one cluster

struct Params : Call {        // of one token a row
  const float* alibi_slopes;  // (num_heads,); null for none
};

// `splits` is how a key head of a row is shared: 0, a small block each, two to a multiprocessor; 1 to 8, as many large
// blocks in a cluster, which sm_90 has first.

// Whether the kernel takes these head dims, this group and so many splits on such a device.
bool serves(const Params&, int splits, const Device&);

// The most splits that still run all at once, on the current device.
int splits_of(const Params&, const Device&);

cudaError_t decode(const Params&, int splits, cudaStream_t);

}  // namespace sinkattn::cuda
