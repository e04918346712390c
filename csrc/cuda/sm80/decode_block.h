// A block of decode: which part of which key head it has, its memory, and phase `fetch`. No torch in here.
#pragma once

#include "decode_tile.h"

namespace sinkattn::cuda {
namespace {

// What a call is of: one token a row; several (FEW), of which a block takes `width`, whose query heads are rows of the same
// products (WIDE); or one token a text, over pages (PAGED).
enum class Form { one, few, pages };

// A lane of a warp, g = lane / 4 and c = lane % 4, has the rows g (and g + 8) of products: its members.
// C: what the cache holds, T or 8 bits.
template <typename T_, typename C_, int HEAD_DIM_, int V_DIM_, bool WIDE_, bool LARGE_, Form FORM>
struct Block {
  static_assert(WIDE_ || FORM != Form::few);
  using T = T_;
  using C = C_;
  using S = Shape<C, HEAD_DIM_, V_DIM_, WIDE_, LARGE_>;
  using KeyRows = Rows<HEAD_DIM_, sizeof(C)>;
  using ValueRows = Rows<V_DIM_, sizeof(C)>;
  using New = std::conditional_t<IN_8_BITS<C>, float, T>;  // of new keys and values, turned
  static constexpr int HEAD_DIM = HEAD_DIM_, V_DIM = V_DIM_, WARPS = S::WARPS, THREADS = S::THREADS;
  static constexpr bool WIDE = WIDE_, LARGE = LARGE_, FEW = FORM == Form::few, PAGED = FORM == Form::pages;
  static constexpr bool EIGHT_BITS = IN_8_BITS<C>;

  const Params& p;
  int rank, splits, head, number, row, warp, lane, g, c;
  int tokens, first_token, own, last_token;  // of a row; of the block: the first, how many, the last
  int group, members;                        // queries of the block at most, and those that are there
  int slots, begin, end;                     // tiles of the block
  bool has_sinks;
  int t, skipped;    // over pages: where the text's token stands; tiles between those of the sinks and of the window
  const int* table;  // the text's row
  int page, in_page;  // where a tile of this warp is, for each lane another one, of 32 that follow each other
  int64_t pair;
  // Shared memory: tiles of all warps, and those of this one; queries as fragments, text then sink; (tokens, HEAD_DIM),
  // (tokens, V_DIM); of all blocks of the cluster (splits, group, V_DIM), (splits, group, 2). In 8 bits queries, keys and
  // values are float32 until they are rounded where they are: a row of a key or value begins with its numbers and then
  // its scale, and what queries are to be multiplied by is in `units`, (angles, MAX_GROUP).
  uint4 *shared, *staged, *queries;
  float* units;
  New *new_keys, *new_values;
  float* handed;
  C *keys, *values;  // of the key head in the cache
  int64_t my_key, my_value;  // from a tile's first to what the lane copies first
  float* my_scale;       // of a key in the cache for the first 16 lanes of a warp, of a value for the others
  int64_t scale_stride;  // of slots

  __device__ __forceinline__ Block(const Params& p, uint4* shared, int share, int width) : p(p), shared(shared) {
    rank = blockIdx.x, splits = gridDim.x, head = blockIdx.y, number = blockIdx.z;
    warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, c = lane % 4;
    tokens = FEW ? p.tokens : 1;
    const int blocks = FEW ? (tokens + width - 1) / width : 1;
    row = FEW ? number / blocks : number, first_token = FEW ? number % blocks * width : 0;
    own = FEW ? min(width, tokens - first_token) : 1, last_token = first_token + own - 1;
    group = FEW ? width * p.group : p.group, members = own * p.group;
    pair = int64_t(number) * p.num_kv_heads + head;
    slots = p.sink_size + p.ring_size;
    if constexpr (!PAGED) {
      const int tiles = (slots + KEYS - 1) / KEYS;
      const int larger = tiles - share * splits;  // the last blocks take one more: the first ones have the sinks
      begin = rank * share + max(rank - (splits - larger), 0);
      end = begin + share + (rank >= splits - larger);
      has_sinks = begin * KEYS < p.sink_size;
    }

    staged = shared + warp * S::WARP;
    queries = shared + S::BLOCK, units = reinterpret_cast<float*>(queries + 2 * S::QUERIES);
    new_keys = reinterpret_cast<New*>(queries + 2 * S::QUERIES + S::UNITS);
    new_values = new_keys + tokens * HEAD_DIM;
    handed = reinterpret_cast<float*>(new_values + tokens * V_DIM);
    keys = static_cast<C*>(p.k_cache) + head * p.k_cache_head;
    values = static_cast<C*>(p.v_cache) + head * p.v_cache_head;
    if (!PAGED) keys += int64_t(row) * p.k_cache_row, values += int64_t(row) * p.v_cache_row;
    my_key = lane / KeyRows::PIECES * p.k_cache_slot + lane % KeyRows::PIECES * KeyRows::NUMBERS;
    my_value = lane / ValueRows::PIECES * p.v_cache_slot + lane % ValueRows::PIECES * ValueRows::NUMBERS;
    if constexpr (EIGHT_BITS) {
      my_scale = lane < KEYS ? p.k_scales + int64_t(row) * p.k_scale_row + head * p.k_scale_head
                             : p.v_scales + int64_t(row) * p.v_scale_row + head * p.v_scale_head;
      scale_stride = lane < KEYS ? p.k_scale_slot : p.v_scale_slot;
      my_scale += row_of(lane % KEYS) * scale_stride;
    }
  }

  __device__ bool is_clustered() const { return LARGE && splits > 1; }
  __device__ uint4* key_rows(int stage) const { return staged + stage * S::TILE; }
  __device__ uint4* value_rows(int stage) const { return key_rows(stage) + KeyRows::SIZE; }
  // In 8 bits a lane has the scale of key, or value, number lane % KEYS of a tile, in tile 0 my_scale.
  __device__ float* scale_rows(int stage) const { return reinterpret_cast<float*>(key_rows(stage) + S::ROWS); }

  // Over pages: what the text `number` has. Its tiles are those of its sinks, and `skipped` further on those of its window.
  __device__ __forceinline__ void find_text() {
    const bool is_there = number < p.batch;
    const int first = is_there ? p.starts[number] : 0, next = is_there ? p.starts[number + 1] : 0;
    t = is_there ? p.text_lengths[number] : 0, table = p.table + number * p.table_row;
    own = min(next - first, 1), row = own > 0 ? first : 0;
    const int of_sinks = (p.sink_size + KEYS - 1) / KEYS;
    skipped = max((t - p.window_size + 1) / KEYS - of_sinks, 0);
    const int tiles = own > 0 ? t / KEYS + 1 - skipped : 0;
    begin = rank * tiles / splits, end = (rank + 1) * tiles / splits;
    has_sinks = begin < of_sinks;
  }
  // The first slot of a tile. Over pages, where a slot is a position, a block's tiles are not all that there are.
  __device__ __forceinline__ int slot_of(int tile) const {
    return (PAGED && tile * KEYS >= p.sink_size ? tile + skipped : tile) * KEYS;
  }
  __device__ __forceinline__ void find_pages(int tile) {  // of the warp's next 32
    tile += lane * WARPS;
    const int slot = tile < end ? slot_of(tile) : 0;
    page = tile < end ? table[slot / p.page_size] : 0, in_page = slot % p.page_size;
  }
  // Where a slot's key and value lie.
  struct Place {
    C *key, *value;
  };
  __device__ __forceinline__ Place place_of(int slot) const {
    if constexpr (!PAGED) return {keys + slot * p.k_cache_slot, values + slot * p.v_cache_slot};
    const int64_t page = table[slot / p.page_size];
    const int in_page = slot % p.page_size;
    return {keys + page * p.k_cache_row + in_page * p.k_cache_slot,
            values + page * p.v_cache_row + in_page * p.v_cache_slot};
  }

  // Fetch: a tile, whatever the length of the row is. A page has whole tiles.
  __device__ __forceinline__ void fetch(int tile, int stage) {
    if (PAGED && tile < end) {
      const int nth = (tile - begin - warp) / WARPS % 32;
      if (nth == 0) find_pages(tile);  // nobody waits for more than one of 32
      const int64_t of_tile = __shfl_sync(~0u, page, nth), slot = __shfl_sync(~0u, in_page, nth);
      const Place place = {keys + of_tile * p.k_cache_row + slot * p.k_cache_slot,
                           values + of_tile * p.v_cache_row + slot * p.v_cache_slot};
      copy_rows<HEAD_DIM>(place.key, place.key + my_key, p.k_cache_slot, 0, KEYS, lane, key_rows(stage));
      copy_rows<V_DIM>(place.value, place.value + my_value, p.v_cache_slot, 0, KEYS, lane, value_rows(stage));
    } else if (tile < end) {
      copy_rows<HEAD_DIM>(keys, keys + my_key, p.k_cache_slot, tile * KEYS, slots, lane, key_rows(stage));
      copy_rows<V_DIM>(values, values + my_value, p.v_cache_slot, tile * KEYS, slots, lane, value_rows(stage));
      if constexpr (EIGHT_BITS) {
        if (tile * KEYS + row_of(lane % KEYS) < slots)
          copy_word(scale_rows(stage) + lane, my_scale + tile * KEYS * scale_stride);
      }
    }
    end_of_copies();
  }
  __device__ __forceinline__ void fetch_first(int from, int to) {  // of the warp's tiles
#pragma unroll 1
    for (int stage = from; stage < to; ++stage) fetch(begin + warp + stage * WARPS, stage);
  }

  // A member's query, counted over rows, tokens and heads.
  __device__ int64_t query_of(int member) const {
    if (PAGED) return (int64_t(row) * p.num_kv_heads + head) * p.group + member;
    if (!FEW) return pair * p.group + member;
    const int64_t token = int64_t(row) * tokens + first_token + member / p.group;
    return (token * p.num_kv_heads + head) * p.group + member % p.group;
  }
  // The output of padding, for all that share the key head. Over pages that is a token behind those of all texts.
  __device__ void write_zeros() const {
    if (rank > 0 || (PAGED && (number >= p.all_tokens || number < p.starts[p.batch]))) return;
    T* out = static_cast<T*>(p.out);
    for (int i = threadIdx.x; i < members * V_DIM; i += THREADS) {
      const int member = i / V_DIM;
      out[(PAGED ? pair * p.group + member : query_of(member)) * V_DIM + i % V_DIM] = from_float<T>(0);
    }
  }
};

}  // namespace
}  // namespace sinkattn::cuda
