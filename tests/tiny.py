"""Tiny random models, one entry a family: vocabulary 97, 3 to 4 layers, made from their configs."""

import torch
import transformers

COMMON = dict(
    vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, bos_token_id=1, eos_token_id=None, pad_token_id=0,
)  # fmt: skip
SLIDING = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
MIXED = dict(num_hidden_layers=4, layer_types=SLIDING, sliding_window=6, head_dim=16)

FAMILIES = {
    "llama": ("Llama", {}),
    "mistral": ("Mistral", dict(sliding_window=None)),
    "mistral-sliding": ("Mistral", dict(sliding_window=6)),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", dict(head_dim=24)),
    "phi3": ("Phi3", dict(sliding_window=None)),
    "gemma2": ("Gemma2", dict(MIXED, query_pre_attn_scalar=16, attn_logit_softcapping=2.0)),
    "gemma3": ("Gemma3", dict(MIXED, query_pre_attn_scalar=16)),
    "gpt_neox": ("GPTNeoX", dict(rotary_pct=0.25, num_key_value_heads=None)),
    "stablelm": ("StableLm", dict(partial_rotary_factor=0.25)),
    "cohere2": ("Cohere2", dict(MIXED)),
    "glm4": ("Glm4", dict(head_dim=16, partial_rotary_factor=0.5)),
    "olmo2": ("Olmo2", {}),
    "smollm3": ("SmolLM3", dict(num_hidden_layers=4, no_rope_layer_interval=2)),
    "deepseek_v3": (
        "DeepseekV3",
        dict(
            num_key_value_heads=4, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=16,
            v_head_dim=12, n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2, moe_intermediate_size=16,
            n_group=2, topk_group=1, first_k_dense_replace=1,
        ),
    ),
    "gpt_oss": (
        "GptOss",
        dict(
            MIXED, num_local_experts=4, num_experts_per_tok=2,
            rope_parameters={"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "beta_fast": 32.0,
                             "beta_slow": 1.0, "truncate": False, "original_max_position_embeddings": 16},
        ),
    ),
}  # fmt: skip
HYBRIDS = {  # attention beside layers with a state of their own
    "falcon_h1": (
        "FalconH1",
        dict(
            num_hidden_layers=2, mamba_d_ssm=64, mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8,
            mamba_chunk_size=16,
        ),
    ),
}  # fmt: skip

ROPES = {  # Llama with every rope type; the trained length of 10 lies inside the capacity of the tests
    "linear": dict(rope_type="linear", factor=4.0),
    "dynamic": dict(rope_type="dynamic", factor=4.0),
    "yarn": dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=10),
    "longrope": dict(
        rope_type="longrope", factor=4.0, original_max_position_embeddings=10,
        short_factor=[1.0 + 0.1 * i for i in range(8)], long_factor=[2.0 + 0.5 * i for i in range(8)],
    ),
    "llama3": dict(
        rope_type="llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=10,
    ),
}  # fmt: skip


def tiny(name: str, seed: int = 0, **more):
    """`drawn`, the same at every call; the test's own random data go on as if it had not been."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return drawn(name, **more)


def drawn(name: str, **more):
    """A random float32 model of a family, or of Llama with a rope type; `more` goes into its config."""
    family, settings = {**FAMILIES, **HYBRIDS}.get(name, ("Llama", {}))
    settings = {**COMMON, **settings}
    if name in ROPES:
        settings["rope_parameters"] = {"rope_theta": 10000.0, **ROPES[name]}
        settings["max_position_embeddings"] = 10 if name == "dynamic" else 40
    settings = {k: v for k, v in {**settings, **more}.items() if v is not None or k not in ("num_key_value_heads",)}
    config_class = getattr(transformers, f"{family}TextConfig" if family == "Gemma3" else f"{family}Config")
    config = config_class(**settings, attn_implementation="eager")  # sdpa leaves softcap out in some versions
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    spread(model)
    return model


def spread(model) -> None:
    """Spread the weights, so that attention has something to choose from, and move norms and biases off 1 and 0."""
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15)
        elif parameter.dim() == 1:
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
