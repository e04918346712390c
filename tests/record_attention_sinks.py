"""Records what attention_sinks 0.4.0 answers, for test_attention_sinks.py: one file a family in data/attention_sinks.

It needs an environment of its own, the versions of that time:

    python -m venv peer
    peer/bin/pip install torch transformers==4.34.0 einops "numpy<2"
    peer/bin/pip install --no-deps attention_sinks==0.4.0
    peer/bin/python tests/record_attention_sinks.py

Recorded with torch 2.13.0 on Python 3.11. accelerate must not be installed: today's versions do not fit that old a
huggingface_hub. The same versions on the same kind of machine write the same bytes again.

Every file holds a tiny random float32 model, saved by transformers 4.34.0 and under its names, and these tensors:

    recorded.input_ids      (1, 60)
    recorded.logits         (1, 60, vocabulary): fed token by token from an empty cache
    recorded.prompt_logits  (1, 60, vocabulary): the first 30 tokens at once, the rest token by token (some families)

The metadata has one key, "recorded": JSON with the model's config, the sizes and the versions.
"""

import json
import logging
import tempfile
import warnings
from pathlib import Path

warnings.filterwarnings("ignore", category=FutureWarning)  # transformers 4.34.0 calls what torch has renamed since

import attention_sinks  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

SINK_SIZE, WINDOW_SIZE = 4, 10  # attention_sink_size, attention_sink_window_size
TOKENS, PROMPT, VOCABULARY = 60, 30, 61
WHERE = Path(__file__).parent / "data" / "attention_sinks"

COMMON = dict(vocab_size=VOCABULARY, bos_token_id=1, eos_token_id=2)
ROTARY = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
GROUPED = dict(ROTARY, num_key_value_heads=2, max_position_embeddings=64)
FALCON = dict(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=4, new_decoder_architecture=False, multi_query=True,
    parallel_attn=True, bias=False,
)  # fmt: skip

# family: (model, its config, whether a prompt is recorded as well)
FAMILIES = {
    "llama": ("Llama", dict(GROUPED, tie_word_embeddings=False), True),
    # trained on 12 tokens: the frequencies change while the cache of 15 fills up
    "llama-dynamic": (
        "Llama",
        dict(GROUPED, max_position_embeddings=12, rope_scaling={"type": "dynamic", "factor": 4.0}),
        False,
    ),
    "mistral": ("Mistral", dict(GROUPED, sliding_window=4096), True),
    "gpt_neox": (
        "GPTNeoX",
        dict(ROTARY, num_attention_heads=2, rotary_pct=0.25, max_position_embeddings=64, use_parallel_residual=True),
        True,
    ),
    # GPT-J's table of angles and MPT's longest text end before these 60 tokens do
    "gptj": ("GPTJ", dict(n_embd=32, n_layer=2, n_head=4, n_inner=48, rotary_dim=4, n_positions=32), False),
    "falcon": ("Falcon", dict(FALCON, alibi=False), False),
    "falcon-alibi": ("Falcon", dict(FALCON, alibi=True), False),
    "mpt": ("Mpt", dict(d_model=32, n_heads=4, n_layers=2, expansion_ratio=4, max_seq_len=32), False),
}


def random_model(family: str, settings: dict):
    """A model whose weights are spread, so that attention has something to choose from."""
    config = getattr(transformers, f"{family}Config")(**COMMON, **settings)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
        else:
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
    return model


@torch.no_grad()
def fed(folder: str, ids: torch.Tensor, first: int) -> torch.Tensor:
    """Logits of a model with attention sinks: `first` tokens at once, the others one by one."""
    model = attention_sinks.AutoModelForCausalLM.from_pretrained(
        folder, attention_sink_size=SINK_SIZE, attention_sink_window_size=WINDOW_SIZE
    ).eval()
    more = {}
    if getattr(model.config, "alibi", False):  # 0.4.0 asks Falcon's position_ids for their device, alibi or not
        more["position_ids"] = torch.zeros(1, 1, dtype=torch.int64)
    logits, past = [], None
    for piece in (ids[:, :first], *ids[:, first:].split(1, dim=1)):
        output = model(piece, past_key_values=past, use_cache=True, **more)
        past = output.past_key_values
        logits.append(output.logits)
    assert past[0][0].shape[2] == SINK_SIZE + WINDOW_SIZE
    return torch.cat(logits, dim=1)


def record(seed: int, name: str, family: str, settings: dict, with_prompt: bool) -> None:
    torch.manual_seed(seed)
    with tempfile.TemporaryDirectory() as folder:
        random_model(family, settings).save_pretrained(folder, safe_serialization=True)
        ids = torch.randint(0, VOCABULARY, (1, TOKENS))
        tensors = load_file(Path(folder) / "model.safetensors")
        tensors |= {"recorded.input_ids": ids, "recorded.logits": fed(folder, ids, 1)}
        if with_prompt:
            tensors["recorded.prompt_logits"] = fed(folder, ids, PROMPT)
        about = dict(
            config=json.loads((Path(folder) / "config.json").read_text()),
            sink_size=SINK_SIZE,
            window_size=WINDOW_SIZE,
            prompt=PROMPT,
            attention_sinks=attention_sinks.__version__,
            transformers=transformers.__version__,
            torch=torch.__version__.split("+")[0],
        )
    path = WHERE / f"{name}.safetensors"
    save_file(tensors, path, metadata={"recorded": json.dumps(about, sort_keys=True)})
    print(f"{path.name}: {path.stat().st_size:,} bytes, spread of the logits {tensors['recorded.logits'].std():.2f}")


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    WHERE.mkdir(parents=True, exist_ok=True)
    for seed, (name, entry) in enumerate(FAMILIES.items()):
        record(seed, name, *entry)
