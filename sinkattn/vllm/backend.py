"""Attention as vLLM calls it: one call of `ops.attend_pages` a layer, over what all layers of a step share."""

import functools
import re
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionImpl,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.kv_cache_interface import AttentionSpec

from .. import ops
from ..rope import UnsupportedModelError
from .blocks import SinkWindowSpec, spec_of
from .rotary import Rotation, check_embedding, expect_attention, taken
from .settings import Sizes, check, current_sizes


@dataclass
class Batch:
    """What the layers of one step share.

    positions: (tokens,) int64, in their own texts, without padding. starts, lengths, block_table, max_tokens: as
    `ops.attend_pages` takes them, as arrivals are, on a GPU.
    """

    positions: Tensor
    starts: Tensor
    lengths: Tensor
    block_table: Tensor
    max_tokens: int
    arrivals: Tensor | None
    sizes: Sizes
    _tables: dict[Rotation, Tensor] = field(default_factory=dict)

    def table(self, rotation: Rotation) -> Tensor:
        """``[text | sink][cos | sin]`` of the tokens, once for all layers: (tokens, 2, 2, r / 2) float32."""
        if rotation not in self._tables:
            sink = self.positions.clamp(max=self.sizes.capacity - 1)
            self._tables[rotation] = rotation.table(torch.stack((self.positions, sink), dim=-1))
        return self._tables[rotation]


class SinkBuilder(AttentionMetadataBuilder[Batch]):
    """Makes a `Batch` of what vLLM has scheduled."""

    def __init__(self, kv_cache_spec: AttentionSpec, layer_names, vllm_config, device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        layers = vllm_config.compilation_config.static_forward_context
        for name, layer in layers.items():
            if hasattr(layer, "get_attn_backend") and not issubclass(layer.get_attn_backend(), SinkBackend):
                raise UnsupportedModelError(f"{name}: {type(layer).__name__} is a layer that sinkattn cannot serve")
        if not isinstance(kv_cache_spec, SinkWindowSpec):
            raise UnsupportedModelError(f"vLLM turned the KV cache of {layer_names[0]} into {kv_cache_spec}")
        check(vllm_config)  # again: vLLM settles some things behind the first time
        check_embedding()
        self.sizes = Sizes(kv_cache_spec.sink_size, kv_cache_spec.sliding_window)
        most = vllm_config.scheduler_config.max_num_seqs * kv_cache_spec.num_kv_heads
        self.arrivals = torch.zeros(most, dtype=torch.int32, device=device) if device.type == "cuda" else None

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> Batch:
        given = common_attn_metadata
        if given.causal is not True:
            raise UnsupportedModelError("sinkattn is causal, and vLLM asks for a batch that is not")
        texts = given.num_reqs
        tokens, starts = int(given.query_start_loc_cpu[texts]), given.query_start_loc[: texts + 1]
        counts = starts.diff()
        lengths = given.seq_lens[:texts] - counts
        offsets = (lengths - starts[:-1]).repeat_interleave(counts, output_size=tokens)
        positions = torch.arange(tokens, device=starts.device) + offsets
        table = given.block_table_tensor[:texts]
        return Batch(positions, starts, lengths, table, given.max_query_len, self.arrivals, self.sizes)


class SinkAttention(AttentionImpl[Batch]):
    """The attention of one layer."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int,
        alibi_slopes: list[float] | None,
        sliding_window: int | None,
        kv_cache_dtype: str,
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        **others,
    ) -> None:
        sizes = current_sizes()
        reasons = (
            (sizes is None, "the configuration does not name sinkattn"),
            (alibi_slopes is not None, "its positions are ALiBi's"),
            (attn_type != AttentionType.DECODER, f"it is not a decoder's ({attn_type})"),
            (kv_sharing_target_layer_name is not None, "it uses the keys of another layer"),
            (any(x is not None for x in others.values()), f"it is given {', '.join(others)}"),
            (
                sizes is not None and sliding_window is not None and sliding_window < sizes.capacity,
                f"its own window of {sliding_window} tokens is below sinks and window together",
            ),
        )
        if found := [words for is_so, words in reasons if is_so]:
            raise UnsupportedModelError(f"sinkattn cannot serve an attention: {'; '.join(found)}")
        self.num_heads, self.head_size, self.num_kv_heads = num_heads, head_size, num_kv_heads
        self.scale, self.softcap = scale, logits_soft_cap or 0.0
        self.rotation: Rotation | None = None
        expect_attention()

    def forward(
        self,
        layer,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Batch | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Append the batch's keys and values, and attend.

        query, key, value: (tokens or more, heads, dim), not turned. kv_cache: (blocks, num_kv_heads, block_size, both
        dims), keys and values. attn_metadata: None in a run to warm up. output: (tokens or more, heads, v_head_dim),
        **written**.
        """
        if output_scale is not None or output_block_scale is not None:
            raise UnsupportedModelError(f"{layer.layer_name}: sinkattn does not quantize what attention gives")
        self.rotation = taken(layer.layer_name, query, key, self.rotation)
        if attn_metadata is None:
            return output.fill_(0)
        batch, rope, tokens = attn_metadata, self.rotation.rope, len(attn_metadata.positions)
        output[:tokens] = ops.attend_pages(
            *(x[:tokens] for x in (query, key, value)),
            *kv_cache.split((self.head_size, kv_cache.shape[3] - self.head_size), dim=-1),
            batch.starts,
            batch.lengths,
            batch.block_table,
            batch.table(self.rotation),
            sink_size=batch.sizes.sink_size,
            window_size=batch.sizes.window_size,
            scale=self.scale,
            softcap=self.softcap,
            rotary_start=rope.start,
            interleaved=rope.interleaved,
            max_tokens=batch.max_tokens,
            arrivals=batch.arrivals,
            overlap=True,  # what all layers share was written before the first, the pages a step ago
        )
        return output


class SinkBackend(AttentionBackend):
    """sinkattn in vLLM's list of attentions. The same on CPUs and GPUs."""

    sizes: ClassVar[Sizes]

    supported_dtypes = [torch.float16, torch.bfloat16, torch.float32]

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec=None) -> list[int | MultipleOf]:
        return [MultipleOf(16)]

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"  # the one name that vLLM keeps for others

    @staticmethod
    def get_impl_cls() -> type[SinkAttention]:
        return SinkAttention

    @staticmethod
    def get_builder_cls() -> type[SinkBuilder]:
        return SinkBuilder

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True  # of layers whose window is no smaller than sinks and window together

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        return spec if isinstance(spec, SinkWindowSpec) else spec_of(spec, cls.sizes)


@functools.cache
def __getattr__(name: str) -> type[SinkBackend]:
    """``SinkBackend_S_W``, of S sinks and a window of W.

    vLLM knows a backend by the path to a class, and asks it for specs while no configuration is current.
    """
    if not (found := re.fullmatch(r"SinkBackend_(\d+)_(\d+)", name)):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return type(name, (SinkBackend,), {"sizes": Sizes(*map(int, found.groups())), "__module__": __name__})
