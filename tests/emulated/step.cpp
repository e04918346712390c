// csrc/cuda/sm80/step.cu, emulated, for ctypes.
#include "cuda/sm80/step.cu"

using namespace sinkattn::cuda;

// sizes: rows, tokens, angles of a token, C, seed.
extern "C" int run_angles(const int64_t* sizes, const int64_t* lengths, const int64_t* counts, const double* frequencies,
                          float* out) {
  emulated::seed = unsigned(sizes[4]);
  return angles({lengths, counts, frequencies, out, int(sizes[0]), int(sizes[1]), int(sizes[2]), sizes[3]}, nullptr);
}

// sizes: rows, columns of known, base, sinks and ring of known, seed.
extern "C" int run_note(const int64_t* sizes, const int64_t* ids, const int64_t* counts, int64_t* lengths, int64_t* digests,
                        int64_t* known) {
  emulated::seed = unsigned(sizes[5]);
  return note({ids, counts, lengths, digests, known, sizes[1], sizes[2], int(sizes[0]), int(sizes[3]), int(sizes[4])}, nullptr);
}

// sizes: rows, how far they lie apart, vocabulary, kind (as Scores counts), seed.
extern "C" int run_likeliest(const int64_t* sizes, const void* scores, int64_t* ids) {
  emulated::seed = unsigned(sizes[4]);
  return likeliest({scores, sizes[1], ids, int(sizes[0]), int(sizes[2]), Scores(sizes[3])}, nullptr);
}
