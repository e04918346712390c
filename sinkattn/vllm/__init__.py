"""A plugin for vLLM: sinks and a window for every request, endless, on vLLM's own scheduler and server.

    pip install "sinkattn[vllm]"
    vllm serve MODEL --enforce-eager --additional-config '{"sinkattn": {"sink_size": 4, "window_size": 1020}}'

A server that does not ask for it is vLLM as it is. docs/vllm.md says how it works and what is refused. Nothing here
imports vLLM before vLLM calls `register`, and nothing of sinkattn imports this.
"""


def register() -> None:
    """Tell vLLM what it needs to know, in each of its processes: what the entry point `vllm.general_plugins` calls.

    Four places: the platform's check of a configuration (refuse, note the sizes), its choice of an attention backend
    (`backend.SinkBackend`), the kinds of KV caches (`blocks.SinkWindowSpec`) and the rotary embeddings (`rotary`). All
    four do what vLLM does where the configuration does not name sinkattn. May be called again.
    """
    from vllm.platforms import current_platform

    from . import blocks, rotary, settings

    platform = type(current_platform)
    if getattr(platform, "_sinkattn", False):
        return
    platform._sinkattn = True
    blocks.register()
    rotary.register()
    settings.register(platform)
