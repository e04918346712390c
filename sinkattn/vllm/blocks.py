"""Which blocks of vLLM's KV cache a request holds: those of its sinks, and those that its window still touches.

Keys lie there turned to their own position, so a block means the same to every request with the same text before it.
The prefix cache works as it does for a sliding window, if the blocks of the sinks are found as well.
"""

from dataclasses import dataclass

from vllm.utils.math_utils import cdiv
from vllm.v1.core.kv_cache_utils import resolve_block_hashes
from vllm.v1.core.single_type_kv_cache_manager import SlidingWindowManager
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec, SlidingWindowSpec, replace_as
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from ..rope import UnsupportedModelError
from .settings import Sizes


@dataclass(frozen=True, kw_only=True)
class SinkWindowSpec(SlidingWindowSpec):
    """The keys and values that a layer holds of each request: `sink_size` first tokens, `sliding_window` last ones."""

    sink_size: int

    @property
    def sink_blocks(self) -> int:
        return cdiv(self.sink_size, self.block_size)

    def max_admission_blocks_per_request(self, max_in_flight_tokens: int, max_model_len: int) -> int:
        """Most blocks that a request holds, however long it gets: those of a sliding window, and the sinks'."""
        window = super().max_admission_blocks_per_request(max_in_flight_tokens, max_model_len)
        return min(self.sink_blocks + window, cdiv(max_model_len, self.block_size) + 1)


class SinkWindowManager(SlidingWindowManager):
    """Frees blocks behind the window while a request runs, but those of its sinks."""

    def __init__(self, kv_cache_spec: SinkWindowSpec, **kwargs) -> None:
        super().__init__(kv_cache_spec, **kwargs)
        self.sink_blocks = kv_cache_spec.sink_blocks

    def remove_skipped_blocks(self, request_id, processed_computed_tokens, num_prompt_tokens=None) -> None:
        skipped = self.get_num_skipped_tokens(processed_computed_tokens) // self.block_size
        self._remove_blocks_in_range(request_id, self.sink_blocks, skipped)

    # What the prefix cache holds.

    @classmethod
    def find_longest_cache_hit(cls, block_hashes, max_length, kv_cache_group_ids, block_pool, kv_cache_spec, **kwargs):
        """As of a sliding window. A hit that lacks a block of the sinks is none."""
        found, length = super().find_longest_cache_hit(
            block_hashes, max_length, kv_cache_group_ids, block_pool, kv_cache_spec, **kwargs
        )
        hashes = resolve_block_hashes(
            block_hashes,
            block_pool.hash_block_size,
            kv_cache_spec.block_size,
            supports_fine_grained_hash_lookup=cls.supports_fine_grained_hash_lookup,
            alignment_tokens=kwargs["alignment_tokens"],
        )
        for i in range(min(kv_cache_spec.sink_blocks, len(found[0]))):
            cached = block_pool.get_cached_block(hashes[i], kv_cache_group_ids)
            if not cached:
                return tuple([] for _ in found), 0
            for blocks, block in zip(found, cached, strict=True):
                blocks[i] = block
        return found, length

    @classmethod
    def reachable_block_mask(cls, start_block, end_block, alignment_tokens, kv_cache_spec, *args, **kwargs):
        """As of a sliding window: which blocks a later request may need. All may need those of the sinks."""
        mask = super().reachable_block_mask(start_block, end_block, alignment_tokens, kv_cache_spec, *args, **kwargs)
        if mask is not None:
            pinned = range(start_block, min(end_block, kv_cache_spec.sink_blocks))
            mask[: len(pinned)] = [True] * len(pinned)
        return mask

    def _skipped_sinks(self, new_computed_blocks, computed_tokens: int) -> list:
        """Of blocks found in the prefix cache: those of sinks that a sliding window alone would drop."""
        skipped = self.get_num_skipped_tokens(computed_tokens) // self.block_size
        return list(new_computed_blocks[: min(self.sink_blocks, skipped)])

    def get_num_blocks_to_allocate(
        self, request_id, num_tokens, new_computed_blocks, total_computed_tokens, *args, **kwargs
    ) -> int:
        """As of a sliding window; blocks of sinks that are free, though cached, count as they get taken."""
        needed = super().get_num_blocks_to_allocate(
            request_id, num_tokens, new_computed_blocks, total_computed_tokens, *args, **kwargs
        )
        return needed + self._get_num_evictable_blocks(self._skipped_sinks(new_computed_blocks, total_computed_tokens))

    def add_local_computed_blocks(
        self, request_id, new_computed_blocks, num_local_computed_tokens, num_external_computed_tokens
    ) -> None:
        """As of a sliding window, with the blocks of the sinks."""
        super().add_local_computed_blocks(
            request_id, new_computed_blocks, num_local_computed_tokens, num_external_computed_tokens
        )
        computed = num_local_computed_tokens + num_external_computed_tokens
        sinks = self._skipped_sinks(new_computed_blocks, computed)
        if sinks:
            self.block_pool.touch(sinks)
            self.req_to_blocks[request_id][: len(sinks)] = sinks


def spec_of(spec: AttentionSpec, sizes: Sizes) -> SinkWindowSpec:
    """What vLLM holds for a layer, with sinks and a window instead. Raises UnsupportedModelError where that fails."""
    own_window = getattr(spec, "sliding_window", None)
    is_plain = type(spec) is SlidingWindowSpec or (
        type(spec) is FullAttentionSpec and spec.attention_chunk_size is None and not spec.non_causal
    )
    if not is_plain or (own_window is not None and own_window < sizes.capacity):
        raise UnsupportedModelError(
            f"sinkattn cannot hold what a layer's {type(spec).__name__} holds"
            + (f" (its own window of {own_window} tokens is below sinks and window together)" if is_plain else "")
        )
    own = ("sliding_window", "attention_chunk_size", "non_causal", "extra_retained_tokens")
    drop = [name for name in own if hasattr(spec, name)]
    return replace_as(spec, SinkWindowSpec, drop=drop, sliding_window=sizes.window_size, sink_size=sizes.sink_size)


def register() -> None:
    """Make the kind known to vLLM."""
    KVCacheSpecRegistry._ensure_registered()  # else its own kinds would never be
    KVCacheSpecRegistry.register(SinkWindowSpec, SinkWindowManager, uniform_type_base_spec=SinkWindowSpec)
