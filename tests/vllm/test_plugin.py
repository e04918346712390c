"""The plugin inside vLLM, in the environment of setup.sh: `FOLDER/bin/python -m pytest tests/vllm/test_plugin.py`."""

import json
import math
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip(
    "vllm.v1", reason="vLLM is not installed here: tests/vllm/setup.sh makes an environment that has it"
)

from vllm.config import VllmConfig, set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers import rotary_embedding as vllm_ropes
from vllm.platforms import current_platform
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.single_type_kv_cache_manager import get_manager_for_kv_cache_spec
from vllm.v1.kv_cache_interface import ChunkedLocalAttentionSpec, FullAttentionSpec, SlidingWindowSpec

import sinkattn.vllm
from sinkattn import UnsupportedModelError
from sinkattn.vllm import blocks, rotary, settings

sinkattn.vllm.register()
sinkattn.vllm.register()  # a second time does nothing
S, W = 20, 40
ASKED = {"sinkattn": {"sink_size": S, "window_size": W}}
LLAMA = dict(
    model_type="llama",
    architectures=["LlamaForCausalLM"],
    hidden_size=64,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    vocab_size=256,
    max_position_embeddings=128,
)


def configuration(folder, config: dict = LLAMA, **arguments) -> VllmConfig:
    """What vLLM makes of a model's config.json and arguments."""
    (folder / "config.json").write_text(json.dumps(config))
    given = dict(enforce_eager=True, dtype="float32", additional_config=ASKED, skip_tokenizer_init=True) | arguments
    return EngineArgs(model=str(folder), **given).create_engine_config()


# Sizes.


def test_sizes(tmp_path, monkeypatch):
    def sizes(**arguments):
        return settings.sizes_of(configuration(tmp_path, **arguments))

    assert sizes() == settings.Sizes(S, W)
    assert sizes(additional_config={}) is None
    for interval, kept in ((0, None), (None, None), (64, 64)):  # 0 is the default, for which all blocks are kept
        cache = configuration(tmp_path, prefix_cache_retention_interval=interval, block_size=32).cache_config
        assert cache.prefix_cache_retention_interval == kept
    assert configuration(tmp_path, additional_config={}).cache_config.prefix_cache_retention_interval == 0
    assert sizes(additional_config={"sinkattn": {}}) == settings.Sizes(4, 1020)
    monkeypatch.setenv("SINKATTN_WINDOW_SIZE", "77")
    assert sizes(additional_config={}) == sizes(additional_config={"sinkattn": None}) == settings.Sizes(4, 77)
    assert sizes() == settings.Sizes(S, W)
    monkeypatch.setenv("SINKATTN_SINK_SIZE", "few")
    with pytest.raises(ValueError, match="whole numbers"):
        sizes()


@pytest.mark.parametrize(
    "wrong", [{"sinks": 4}, {"sink_size": -1}, {"window_size": 0}, {"window_size": True}, {"sink_size": 1.5}, 4]
)
def test_wrong_sizes(tmp_path, wrong):
    with pytest.raises(ValueError, match="sinkattn"):
        configuration(tmp_path, additional_config={"sinkattn": wrong})


def test_names_that_are_not_quite_it(tmp_path):
    for name in ("SinkAttn", "sink_attn", "sink-attn"):
        with pytest.raises(ValueError, match="'sinkattn' is the name"):
            configuration(tmp_path, additional_config={name: {}})


# What is refused, and that it is served where sinkattn is not asked for.

MAMBA = dict(
    model_type="mamba", architectures=["MambaForCausalLM"], hidden_size=64, num_hidden_layers=2, vocab_size=256
)
DEEPSEEK = LLAMA | dict(
    model_type="deepseek_v2",
    architectures=["DeepseekV2ForCausalLM"],
    kv_lora_rank=32,
    q_lora_rank=32,
    qk_nope_head_dim=16,
    qk_rope_head_dim=16,
    v_head_dim=16,
    first_k_dense_replace=2,
)
BLOOM = dict(
    model_type="bloom", architectures=["BloomForCausalLM"], hidden_size=64, n_layer=2, n_head=2, vocab_size=256
)
JAMBA = LLAMA | dict(model_type="jamba", architectures=["JambaForCausalLM"], num_experts=1, num_experts_per_tok=1)
QWEN_VL = LLAMA | {"rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]}}


@pytest.mark.parametrize(
    ("config", "arguments", "words"),
    [
        (MAMBA, {}, "no attention"),
        (JAMBA, {}, "state instead of keys"),
        (DEEPSEEK, {}, "latent"),
        (BLOOM, {}, "ALiBi"),
        (QWEN_VL, {}, "several positions"),
        (LLAMA, {"enforce_eager": False}, "--enforce-eager"),
        (LLAMA, {"kv_cache_dtype": "fp8"}, "quantized"),
        (LLAMA, {"kv_cache_dtype": "float16"}, "KV cache is float16 and the model float32"),
        (LLAMA, {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}}, "speculative"),
        (LLAMA, {"attention_config": {"backend": "CPU_ATTN"}}, "by name"),
        (LLAMA, {"runner": "pooling"}, "does not generate"),
        (LLAMA, {"kv_offloading_size": 1.0}, "offloading"),
    ],
    ids=[
        "mamba",
        "hybrid",
        "mla",
        "alibi",
        "mrope",
        "compiled",
        "fp8",
        "another dtype",
        "speculative",
        "backend",
        "pooling",
        "offloading",
    ],
)
def test_refused(tmp_path, config, arguments, words):
    with pytest.raises(ValueError, match=f"sinkattn cannot serve .*{words}"):
        configuration(tmp_path, config, **arguments)
    assert configuration(tmp_path, config, additional_config={}, **arguments) is not None


def test_other_versions_of_vllm(tmp_path):
    class Platform:
        @classmethod
        def check_and_update_config(cls, vllm_config):
            vllm_config.checked = True

    sinkattn.vllm._refuse(Platform, "this is 0.33")
    config = configuration(tmp_path, additional_config={})
    Platform.check_and_update_config(config)
    assert config.checked
    with pytest.raises(RuntimeError, match="this is 0.33"):
        Platform.check_and_update_config(configuration(tmp_path))


def test_backend(tmp_path):
    """vLLM's own where sinkattn is not asked for; a class that knows its sizes where it is."""
    from vllm.v1.attention.selector import get_attn_backend

    chosen = []
    for asked in ({}, ASKED):
        with set_current_vllm_config(configuration(tmp_path, additional_config=asked)):
            chosen.append(current_platform.get_attn_backend_cls(None, selector_config()))
    assert "sinkattn" not in chosen[0]
    assert chosen[1] == f"sinkattn.vllm.backend.SinkBackend_{S}_{W}"
    with set_current_vllm_config(configuration(tmp_path)):
        assert get_attn_backend(64, torch.float32, "auto").sizes == settings.Sizes(S, W)


def selector_config():
    from vllm.v1.attention.selector import AttentionSelectorConfig

    return AttentionSelectorConfig(64, torch.float32, "auto", None)


# Rotations.

OF_ALL = dict(
    head_size=32, rotary_dim=24, max_position_embeddings=64, base=10000.0, is_neox_style=True, dtype=torch.float32
)
ROPES = {
    "RotaryEmbedding": {},
    "Llama3RotaryEmbedding": dict(scaling_factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, orig_max_position=32),
    "YaRNScalingRotaryEmbedding": dict(scaling_factor=4.0),
    "LinearScalingRotaryEmbedding": dict(scaling_factors=2.0),
    "NTKScalingRotaryEmbedding": dict(scaling_factor=3.0, mixed_b=0.3),
}


@pytest.mark.parametrize("name", ROPES)
def test_rotations(tmp_path, name):
    """The table of the replaced module is vLLM's own; without sinkattn it is an object of vLLM's class."""
    kind, given = getattr(vllm_ropes, name), OF_ALL | ROPES[name]
    with set_current_vllm_config(configuration(tmp_path, additional_config={})):
        own = kind(**given)
    with set_current_vllm_config(configuration(tmp_path)):
        module = kind(**given)
    assert type(own) is kind and type(module) is not kind
    t = torch.arange(own.cos_sin_cache.shape[0])
    torch.testing.assert_close(module.rotation.table(t[:, None]).flatten(1), own.cos_sin_cache, rtol=0, atol=2e-5)
    assert set(ROPES) == {kind.__name__ for kind in rotary.REPLACED}
    if name != "YaRNScalingRotaryEmbedding":
        assert module.rotation.factor == 1
    far = module.rotation.table(torch.tensor([[2**31]]))[0, 0, 0]  # exact where float32 products are noise
    expected = [math.cos(math.fmod(2**31 * f, 2 * math.pi)) for f in module.rotation.rope.frequencies[0].tolist()]
    torch.testing.assert_close(far, module.rotation.factor * torch.tensor(expected), rtol=0, atol=1e-5)


def test_rotations_that_are_refused(tmp_path):
    with set_current_vllm_config(configuration(tmp_path)), pytest.raises(UnsupportedModelError, match="LinearScaling"):
        vllm_ropes.LinearScalingRotaryEmbedding(**OF_ALL, scaling_factors=[1.0, 2.0])


def test_way_to_attention(tmp_path, monkeypatch):
    """Queries and keys have to arrive as they left the embedding."""
    monkeypatch.setattr(rotary._Way, "given", None)
    monkeypatch.setattr(rotary._Way, "unchecked", 0)
    monkeypatch.setattr(rotary._Way, "has_embedding", False)
    with pytest.raises(UnsupportedModelError, match="no rotary embedding"):
        rotary.check_embedding()
    with set_current_vllm_config(configuration(tmp_path)):
        module, other = (vllm_ropes.RotaryEmbedding(**OF_ALL | {"base": base}) for base in (1e4, 1e5))
    rotary.check_embedding()
    t, q, k = torch.arange(3), torch.randn(3, 4 * 32), torch.randn(3, 2 * 32)

    def views():
        return q.view(3, 4, 32), k.view(3, 2, 32)

    rotary.expect_attention()
    assert all(x is y for x, y in zip(module(t, q, k), (q, k), strict=True))  # not turned
    assert rotary.taken("layer", *views(), None) is module.rotation
    module(t, q, k)
    assert rotary.taken("layer", *views(), module.rotation) is module.rotation
    other(t, q, k)
    with pytest.raises(UnsupportedModelError, match="not the one"):
        rotary.taken("layer", *views(), module.rotation)
    with pytest.raises(UnsupportedModelError, match="layer: no rotation"):
        rotary.taken("layer", *views(), None)
    module(t, q, k)
    with pytest.raises(UnsupportedModelError, match="changes the query between"):  # by 1, for now
        rotary.taken("layer", q.mul(1).view(3, 4, 32), k.view(3, 2, 32), module.rotation)
    for changed in (q, k):
        rotary.expect_attention()
        module(t, q, k)
        changed.mul_(2)
        with pytest.raises(UnsupportedModelError, match="between rotation and attention"):
            rotary.taken("layer", *views(), None)
    module(t, q, k)
    with pytest.raises(UnsupportedModelError, match="not followed by"):
        module(t, q, k)
    with pytest.raises(UnsupportedModelError, match="queries alone"):
        module(t, q)


# What the layers of a step share.


def test_batch():
    """Of a buffer for more requests than there are: one decodes, one is in a prompt, one waits, one begins."""
    from sinkattn.vllm import backend

    starts = torch.tensor([0, 1, 4, 4, 6, 6, 6], dtype=torch.int32)
    given = SimpleNamespace(
        causal=True, num_reqs=4, query_start_loc=starts, query_start_loc_cpu=starts, max_query_len=3,
        seq_lens=torch.tensor([100, 13, 7, 2, 0, 0], dtype=torch.int32),
        block_table_tensor=torch.arange(60, dtype=torch.int32).view(6, 10),
    )  # fmt: skip
    builder = object.__new__(backend.SinkBuilder)
    builder.sizes, builder.arrivals = settings.Sizes(S, W), None
    batch = builder.build(0, given)
    assert batch.positions.tolist() == [99, 10, 11, 12, 0, 1]
    assert batch.lengths.tolist() == [99, 10, 7, 0] and batch.starts.tolist() == [0, 1, 4, 4, 6]
    assert batch.lengths.dtype == batch.starts.dtype == batch.block_table.dtype == torch.int32
    assert batch.block_table.shape == (4, 10) and batch.max_tokens == 3 and batch.sizes.capacity == S + W


# Blocks.

SHAPE = dict(block_size=16, num_kv_heads=1, head_size=8, dtype=torch.float32)


def test_specs():
    sizes = settings.Sizes(S, W)
    for own in (FullAttentionSpec(**SHAPE), SlidingWindowSpec(**SHAPE, sliding_window=S + W)):
        spec = blocks.spec_of(own, sizes)
        assert (spec.sink_size, spec.sliding_window, spec.page_size_bytes) == (S, W, own.page_size_bytes)
        # 2 of sinks; 39 tokens and a chunk of 64 begin anywhere in a block: 7 + 1
        assert spec.max_admission_blocks_per_request(64, 10**6) == 2 + 8
    for other in (
        SlidingWindowSpec(**SHAPE, sliding_window=S + W - 1),
        ChunkedLocalAttentionSpec(**SHAPE, attention_chunk_size=64),
        FullAttentionSpec(**SHAPE, attention_chunk_size=64),
        FullAttentionSpec(**SHAPE, non_causal=True),
    ):
        with pytest.raises(UnsupportedModelError, match="cannot hold"):
            blocks.spec_of(other, sizes)


@pytest.mark.parametrize("chunk", [1, 7, 64])
@pytest.mark.parametrize("sink_size", [0, 1, 20])
def test_blocks_that_are_held(chunk, sink_size):
    """As vLLM's scheduler calls it: all that a step sees is there, no more than was admitted, nothing is lost."""
    spec = blocks.spec_of(FullAttentionSpec(**SHAPE), settings.Sizes(sink_size, W))
    pool = BlockPool(32, False, 16)
    cap = spec.max_admission_blocks_per_request(chunk, 10**6)
    manager = get_manager_for_kv_cache_spec(
        spec,
        max_in_flight_tokens=chunk,
        max_model_len=10**6,
        block_pool=pool,
        enable_caching=False,
        kv_cache_group_id=0,
        scheduler_block_size=16,
    )
    assert type(manager) is blocks.SinkWindowManager
    held, first = set(), []
    for done in range(0, 3000, chunk):
        manager.remove_skipped_blocks("a", done)
        manager.allocate_new_blocks("a", done + chunk, done + chunk)
        row = manager.req_to_blocks["a"]
        for t in (done, done + chunk - 1):
            assert all(not row[j // 16].is_null for j in range(t + 1) if j < sink_size or j > t - W)
        there = [block.block_id for block in row if not block.is_null]
        assert len(there) == len(set(there)) <= cap
        first = first or there[: -(-sink_size // 16)]
        assert there[: len(first)] == first
        held |= {len(there)} if done > 2 * W + chunk else set()
    assert max(held) - min(held) <= 1 + chunk // 16
    manager.free("a")
    assert pool.get_num_free_blocks() == 31
