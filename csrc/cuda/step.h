// What surrounds the layers in a step: the angles of its tokens, what rows note of them, and the choice of the likeliest
// ids. No torch in here.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace sinkattn::cuda {

// [cos | sin] of position * frequency, in float64, rounded. The last of a row's tokens stands at lengths[row] + counts[row] - 1.
struct Angles {
  const int64_t *lengths, *counts;  // (rows,): before the step, and in it; counts null: all tokens count
  const double* frequencies;        // (half,), radians a token
  float* out;                       // (rows, tokens, text | sink, cos | sin, half)
  int rows, tokens, half;
  int64_t capacity;  // sinks see no query behind its last position
};

// A token a row: its id into the slot of its position, its digest, and one more in lengths. A row of count 0 keeps the
// id where its next one will be.
struct Note {
  const int64_t *ids, *counts;         // (rows,); counts 0 or 1, null: all 1
  int64_t *lengths, *digests, *known;  // (rows,), (rows,), (rows, known_row)
  int64_t known_row, base;             // base: digests are digest * base + id
  int rows, sink_size, ring_size;      // of known
};

// Where each row has the first of its largest numbers; NaN is larger than all.
enum class Scores { float32, float16, bfloat16 };
struct Likeliest {
  const void* scores;  // (rows, vocabulary), rows so many numbers apart
  int64_t row;
  int64_t* ids;  // (rows,)
  int rows, vocabulary;
  Scores kind;
};

cudaError_t angles(const Angles&, cudaStream_t);
cudaError_t note(const Note&, cudaStream_t);
cudaError_t likeliest(const Likeliest&, cudaStream_t);

}  // namespace sinkattn::cuda
