// One new token per row in one launch, or a few: rotate, append, attend over sinks and window. For sm_80 and later.
//
// Floor: the bytes of the visible keys and values, read once. What it takes to get there:
//
// * A warp takes tiles of 16 slots, in the order in which they lie: the softmax does not mind. Which tiles depends on
//   nothing that is in memory, so the first loads are on their way before the length of the row is known. What is not
//   visible is masked afterwards.
// * Every warp keeps several tiles in flight (cp.async, 16 bytes a lane, whole rows) in shared memory of its own and waits
//   for nobody else. Products don't mind the order of what they sum over, so 16 bytes of a key are fragments of the tensor
//   cores as they lie in memory; values need their pairs swapped, which is one byte permutation per register.
// * Products have 16 rows. A group of up to 8 query heads fills the first 8; the others take what rounding leaves of
//   queries and weights, so that both are as good as float32 at no cost. Larger groups fill all 16 and round.
// * The warps of a block meet in shared memory, the blocks of a cluster in that of its first block, and blocks without
//   a cluster in memory, where the last to arrive combines what all found.
// * Of a few tokens a row, as many share a block as have 16 query heads: a tile is read once for all of them. The block
//   lays them and those before them over the tiles: nobody waits for what another one appends.
// * In 8 bits scores are multiplied by the scales of their keys, weights by those of the values: two numbers a key, for all
//   heads of a group. int8 keys are multiplied as they are, by queries of two int8 numbers a dim; those of e4m3, and all
//   values, become float16 in registers, which has them exactly.
// * The next kernel may launch at once. Where `overlap` says that the cache is settled, its first tiles are asked for
//   before the kernel ahead is done.
//
// The kernel is in decode_kernel.h, its phases in the other headers, its launch in decode_launch.h; this is how a key head
// is shared, and the launch for caches in 16 bits. decode_int8.cu and decode_e4m3.cu have those of the others, and
// decode_pages.cu that over pages.
#include <algorithm>
#include <atomic>

#include "decode_launch.h"

namespace sinkattn::cuda {

cudaError_t launch_16_bits(const Params& p, Sharing sharing, const Device& device, cudaStream_t stream, int* clusters) {
  const auto launch = p.is_bfloat16 ? launch_as<__nv_bfloat16, __nv_bfloat16> : launch_as<__half, __half>;
  return launch(p, sharing, device, stream, clusters);
}

namespace {

cudaError_t launch_stored(const Params& p, Sharing sharing, const Device& device, cudaStream_t stream, int* clusters) {
  if (p.starts) return launch_pages(p, sharing, device, stream, clusters);
  constexpr decltype(&launch_16_bits) launches[] = {launch_16_bits, launch_int8, launch_e4m3};  // in the order of Stored
  return launches[int(p.stored)](p, sharing, device, stream, clusters);
}

// Clusters of so many blocks that run at a time, found once for a GPU (or for every 8th, if there are more).
int clusters_at_a_time(const Params& p, int size, const Device& device) {
  static std::atomic<int> found[8][3][2][3][2][MAX_HEAD_DIM / 16 + 1][MAX_GROUP + 1][MAX_CLUSTER + 1] = {};
  const int members = width_of(p) * p.group;
  std::atomic<int>& clusters =
      found[device.index % 8][int(p.stored)][p.is_bfloat16][p.starts ? 2 : p.tokens > 1][p.v_dim == p.head_dim][p.head_dim / 16][members][size];
  if (clusters == 0) {
    int count = 0;
    clusters = launch_stored(p, {size, true}, device, nullptr, &count) == cudaSuccess && count > 0 ? count : -1;
  }
  return clusters;
}

// What a block takes of a multiprocessor: shared memory, what is not dynamic as well, and how many its registers allow.
struct Room {
  int bytes, blocks;
};
template <typename S>
Room room_of(const Params& p, int splits) {
  return {shared_bytes<S>(p, splits) + 1024 + 128, S::BLOCKS};
}
Room block_of(const Params& p, Sharing sharing) {
  return with_dims(p, Room{1 << 30, 0}, [&](auto dims) {
    constexpr int K = decltype(dims)::head_dim, V = decltype(dims)::v_dim;
    const auto of = [&](auto number, auto wide) {
      using C = decltype(number);
      constexpr bool WIDE = decltype(wide)::value;
      return sharing.cluster ? room_of<Shape<C, K, V, WIDE, true>>(p, sharing.splits)
                             : room_of<Shape<C, K, V, WIDE, false>>(p, sharing.splits);
    };
    const auto of_kind = [&](auto wide) {
      return p.stored == Stored::same   ? of(uint16_t(), wide)
             : p.stored == Stored::int8 ? of(int8_t(), wide)
                                        : of(E4m3(), wide);
    };
    return is_wide(p) ? of_kind(std::true_type()) : of_kind(std::false_type());
  });
}

// Blocks in 8 bits are too slow for some of them to keep the memory busy alone. If they come in waves, of which the last
// one is not full, parts of them fill it better; but each has to start, and to meet the others.
int splits_of_waves(const Params& p, int64_t pairs, const Device& device) {
  const Room room = block_of(p, {1, false});
  const int64_t at_once = device.multiprocessors * std::min<int64_t>(room.blocks, device.shared_bytes / room.bytes);
  const int64_t tile_bytes = KEYS * (p.head_dim + p.v_dim), found_bytes = width_of(p) * p.group * (p.v_dim + 2) * 4;
  const auto cost = [&](int splits) {
    const int64_t waves = (pairs * splits + at_once - 1) / std::max<int64_t>(at_once, 1);
    return waves * (tiles_of(p) * tile_bytes / splits + (splits > 1 ? 48 * 1024 + 2 * found_bytes : 16 * 1024));
  };
  int best = 1;
  for (int splits = 2; splits <= 8; ++splits)
    if (cost(splits) * 10 < cost(1) * 9 && cost(splits) < cost(best)) best = splits;
  return best;
}

}  // namespace

bool serves(const Params& p, Sharing sharing, const Device& device) {
  if (p.group > MAX_GROUP || p.num_kv_heads > 65535) return false;
  if (p.tokens > MAX_FEW || rows_of(p) > 65535) return false;
  if (p.starts && (p.tokens != 1 || p.stored != Stored::same)) return false;
  if (p.ring_size < p.window_size + p.tokens - 1) return false;
  if (sharing.splits < 1 || sharing.splits > (sharing.cluster ? MAX_CLUSTER : MAX_SPLITS)) return false;
  if (sharing.cluster && sharing.splits > 1 && device.compute_major < 9) return false;
  if (p.stored != Stored::same && device.compute_major < 9) return false;
  return block_of(p, sharing).bytes <= device.shared_bytes;
}

Sharing sharing_of(const Params& p, const Device& device) {
  const int64_t pairs = int64_t(p.batch) * blocks_of(p) * p.num_kv_heads;
  const int64_t tiles = tiles_of(p);
  if (pairs == 0) return {1, false};
  if (pairs > device.multiprocessors) return {p.stored == Stored::same ? 1 : splits_of_waves(p, pairs, device), false};
  int size = MAX_CLUSTER;
  while (size > 0 && (tiles <= 8 * (size - 1) || !serves(p, {size, true}, device) ||
                      pairs > clusters_at_a_time(p, size, device)))
    --size;
  // Clusters may leave multiprocessors without work, small blocks do not; but to meet in memory takes as long as a
  // multiprocessor needs for some 128 KB, and the last one has to read what all found.
  const int splits = int(std::min<int64_t>(2 * device.multiprocessors / pairs, MAX_SPLITS));
  const int64_t of_one = size > 0 ? tiles / size : 2 * tiles, number_bytes = p.stored == Stored::same ? 2 : 1;
  const int64_t tile_bytes = KEYS * (p.head_dim + p.v_dim) * number_bytes;
  const int64_t found_bytes = int64_t(splits) * width_of(p) * p.group * (p.v_dim + 2) * 4;
  if ((of_one - 2 * tiles / splits) * tile_bytes > 128 * 1024 + 6 * found_bytes) return {splits, false};
  return size > 0 ? Sharing{size, true} : Sharing{1, false};
}

cudaError_t decode(const Params& p, Sharing sharing, const Device& device, cudaStream_t stream) {
  return launch_stored(p, sharing, device, stream, nullptr);
}

}  // namespace sinkattn::cuda
