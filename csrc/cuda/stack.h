// The function that runs a stack of decoder layers, one token a row, in one launch. No torch in here.
#pragma once

#include "linear.h"

namespace sinkattn::cuda {

constexpr int MAX_STACK_ROWS = 2, STACK_HEADS = 4;  // of the batch; query heads that a block attends for at a time
enum Product { QKV, OUTPUT, GATE_UP, DOWN, PRODUCTS, LOGITS = PRODUCTS };  // of a layer, and behind the last

// A row of the table, 8 bytes an entry, as sinkattn/fuse/stack.py writes it. Biases and head norms may be null.
struct StackLayer {
  const void *weights[PRODUCTS], *biases[PRODUCTS];  // (out_features, in_features), contiguous; (out_features,)
  const void *norms[2], *head_norms[2];              // before QKV, GATE_UP: (hidden,); of queries, of keys: (head_dim,)
  void *keys, *values;                               // (rows, num_kv_heads, sink_size + ring_size, head_dim), contiguous
  int64_t sink_size, ring_size, window_size;
};

// What blocks hand each other: two numbers of 16 bits, or one of 32, and the layer's number beside them, so that whoever
// reads them knows whether they are the new ones.
struct Handed {
  uint32_t number, epoch;
};

struct Stack {
  Call call;  // of every layer but its cache and sizes
  const StackLayer* layers;
  int num_layers, hidden, inner;  // inner: columns between gate and down
  const void* x;                  // (rows, hidden)
  void* out;                      // as x
  // Of the last norm and the head, (hidden,) and (vocabulary, hidden); null for no logits, (rows, vocabulary).
  const void *logits_norm, *logits_weight;
  void* logits;
  int vocabulary;  // even
  // Zero at first, and nobody else's between launches. epoch: how many layers ran, and one more a launch.
  uint32_t* epoch;
  Handed *qkv, *attended, *middle, *gated, *last;  // (rows, columns / 2); middle and last: x behind attention, behind the layer
  Handed *values, *softmax;                        // (pairs, splits, STACK_HEADS, head_dim), (pairs, splits, STACK_HEADS, 2)
  float norm_eps, norm_shift, head_eps, head_shift;
  int blocks, shares, splits;  // of the grid; how query heads of a key head are shared among them, and how slots are
  Activation activation;
};

// Chooses `blocks`, `shares` and `splits`, and lays out `epoch` and what is handed from `memory` on, null to ask. Returns
// the bytes that takes.
int64_t lay_out(Stack&, int slots, void* memory, const Device&);
// Whether the sizes are served.
bool serves(const Stack&, const Device&);
// Refuses, before anything runs, what cannot be resident all at once.
cudaError_t stack(const Stack&, const Device&, cudaStream_t);

}  // namespace sinkattn::cuda
