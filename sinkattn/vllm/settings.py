"""What a server of vLLM is asked for: sizes. And what it is refused, by name, before a model is loaded."""

import os
from dataclasses import dataclass
from typing import Any

from vllm.config import get_current_vllm_config
from vllm.logger import init_logger
from vllm.utils.torch_utils import is_quantized_kv_cache

from ..rope import UnsupportedModelError

logger = init_logger("vllm.sinkattn")

DEFAULTS = {"sink_size": 4, "window_size": 1020}


@dataclass(frozen=True)
class Sizes:
    """Tokens: `sink_size` from 0 on, `window_size` from 1 on, which counts the current one."""

    sink_size: int
    window_size: int

    @property
    def capacity(self) -> int:
        return self.sink_size + self.window_size


def sizes_of(vllm_config) -> Sizes | None:
    """The sizes that a configuration asks for, None if it does not name sinkattn. Raises ValueError for wrong ones."""
    config = vllm_config.additional_config
    config = config if isinstance(config, dict) else {}
    meant = [key for key in config if str(key).lower().replace("_", "").replace("-", "") == "sinkattn"]
    if meant not in ([], ["sinkattn"]):
        raise ValueError(f"--additional-config: 'sinkattn' is the name, not {meant[-1]!r}")
    given = config.get("sinkattn")
    if given is None:
        return None
    if not isinstance(given, dict) or not given.keys() <= DEFAULTS.keys():
        raise ValueError(f"--additional-config: sinkattn takes sink_size and window_size, not {given!r}")
    sizes = DEFAULTS | given
    for name, least in (("sink_size", 0), ("window_size", 1)):
        if type(sizes[name]) is not int or sizes[name] < least:
            raise ValueError(f"sinkattn's {name} is a whole number from {least} on, not {sizes[name]!r}")
    return Sizes(**sizes)


def current_sizes() -> Sizes | None:
    """`sizes_of` of the configuration for which vLLM builds a model just now."""
    return sizes_of(get_current_vllm_config())


def take_environment(vllm_config) -> None:
    """Write what `SINKATTN_SINK_SIZE` and `SINKATTN_WINDOW_SIZE` say, if either is set, into a configuration.

    What the configuration says itself counts more. Its processes read the configuration alone.
    """
    names = {name: f"SINKATTN_{name.upper()}" for name in DEFAULTS}
    try:
        given = {name: int(os.environ[variable]) for name, variable in names.items() if os.environ.get(variable)}
    except ValueError as error:
        raise ValueError(f"{' and '.join(names.values())} are whole numbers: {error}") from None
    if not given:
        return
    if not isinstance(vllm_config.additional_config, dict):
        raise ValueError(f"{' and '.join(names.values())} need an --additional-config that is a dictionary")
    own = vllm_config.additional_config.get("sinkattn")
    own = {} if own is None else own
    vllm_config.additional_config["sinkattn"] = given | own if isinstance(own, dict) else own


def reasons_against(vllm_config) -> list[str]:
    """Why sinkattn does not serve a configuration, in words; none if it does."""
    model, cache = vllm_config.model_config, vllm_config.cache_config
    dtypes = "auto", str(model.dtype).removeprefix("torch.")
    other_dtype = cache.cache_dtype not in dtypes and not is_quantized_kv_cache(cache.cache_dtype)
    parallel, attention = vllm_config.parallel_config, vllm_config.attention_config
    found: list[tuple[Any, str]] = [
        (model.runner_type != "generate", "it does not generate text (pooling, embeddings)"),
        (model.use_mla, "its attention is latent (MLA)"),
        (model.is_attention_free, "it has no attention"),
        (model.is_hybrid or model.has_inner_state, "some of its layers have a state instead of keys (hybrid, Mamba)"),
        (model.is_encoder_decoder, "it is an encoder and a decoder"),
        (model.uses_mrope, "its tokens have several positions each (M-RoPE)"),
        (model.is_mm_prefix_lm, "its pictures are attended in both directions"),
        (model.uses_alibi, "its positions are ALiBi's"),
        (vllm_config.speculative_config is not None, "speculative decoding is on"),
        (vllm_config.kv_transfer_config is not None, "a KV connector is on"),
        (cache.kv_offloading_size is not None, "KV offloading is on"),
        (cache.kv_sharing_fast_prefill, "--kv-sharing-fast-prefill is on"),
        (is_quantized_kv_cache(cache.cache_dtype), f"the KV cache is quantized ({cache.cache_dtype})"),
        (other_dtype, f"the KV cache is {cache.cache_dtype} and the model {dtypes[1]}"),
        (parallel.decode_context_parallel_size > 1, "decode context parallelism is on"),
        (parallel.prefill_context_parallel_size > 1, "prefill context parallelism is on"),
        (parallel.use_ubatching, "batches are split in two (dual batch overlap)"),
        (attention.backend is not None or attention.backend_per_kind, "an attention backend is asked for by name"),
        (not model.enforce_eager, "compiled models and CUDA graphs are not served yet: pass --enforce-eager"),
    ]
    return [words for is_so, words in found if is_so]


def check(vllm_config) -> None:
    """Raise UnsupportedModelError with all `reasons_against` a configuration, if there are any."""
    if reasons := reasons_against(vllm_config):
        raise UnsupportedModelError(
            f"sinkattn cannot serve {vllm_config.model_config.model} here: {'; '.join(reasons)}"
        )


def register(platform: type) -> None:
    """Have vLLM's platform check configurations that name sinkattn, and choose its attention for them."""
    own_check, choose = platform.check_and_update_config, platform.get_attn_backend_cls

    def check_and_update_config(cls, vllm_config) -> None:
        own_check(vllm_config)
        if vllm_config.model_config is None:
            return
        take_environment(vllm_config)
        sizes = sizes_of(vllm_config)
        if sizes is None:
            return
        check(vllm_config)
        cache = vllm_config.cache_config
        if cache.prefix_cache_retention_interval == 0:  # vLLM's default: of a window the ends of prompts alone are kept
            cache.prefix_cache_retention_interval = None
        logger.info_once("sinkattn: %d sinks and a window of %d tokens", sizes.sink_size, sizes.window_size)

    def get_attn_backend_cls(cls, selected_backend, attn_selector_config, num_heads=None) -> str:
        sizes = current_sizes()
        if sizes is None:
            return choose(selected_backend, attn_selector_config, num_heads)
        return f"sinkattn.vllm.backend.SinkBackend_{sizes.sink_size}_{sizes.window_size}"

    platform.check_and_update_config = classmethod(check_and_update_config)
    platform.get_attn_backend_cls = classmethod(get_attn_backend_cls)
