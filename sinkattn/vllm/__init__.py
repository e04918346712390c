"""A plugin for vLLM: sinks and a window for every request, endless, on vLLM's own scheduler and server.

    pip install "sinkattn[vllm]"
    vllm serve MODEL --enforce-eager --additional-config '{"sinkattn": {"sink_size": 4, "window_size": 1020}}'

A server that does not ask for it is vLLM as it is. docs/vllm.md says how it works and what is refused. Nothing here
imports vLLM before vLLM calls `register`, and nothing of sinkattn imports this.
"""

import os

VERSION = "0.32."  # of vLLM, whose inside changes from one to the next


def _refuse(platform, words: str) -> None:
    """Have vLLM's platform raise RuntimeError for configurations that ask for sinkattn, and leave others alone."""
    check = platform.check_and_update_config

    def check_and_update_config(cls, vllm_config) -> None:
        check(vllm_config)
        given = vllm_config.additional_config
        is_asked = isinstance(given, dict) and "sinkattn" in given
        if is_asked or any(os.environ.get(name) for name in ("SINKATTN_SINK_SIZE", "SINKATTN_WINDOW_SIZE")):
            raise RuntimeError(words)

    platform.check_and_update_config = classmethod(check_and_update_config)


def register() -> None:
    """Tell vLLM what it needs to know, in each of its processes: what the entry point `vllm.general_plugins` calls.

    Four places: the platform's check of a configuration (refuse, note the sizes), its choice of an attention backend
    (`backend.SinkBackend`), the kinds of KV caches (`blocks.SinkWindowSpec`) and the rotary embeddings (`rotary`). All
    four do what vLLM does where the configuration does not name sinkattn. May be called again.
    """
    from vllm import __version__ as version
    from vllm.platforms import current_platform

    platform = type(current_platform)
    if getattr(platform, "_sinkattn", False):
        return
    platform._sinkattn = True
    if not version.startswith(VERSION):
        return _refuse(platform, f"sinkattn's plugin is for vLLM {VERSION}*, and this is {version}")
    from . import blocks, rotary, settings

    blocks.register()
    rotary.register()
    settings.register(platform)
