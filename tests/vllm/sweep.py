"""Tiny models of every family of tests/tiny.py through vLLM with the plugin, beside the patched model of transformers.

    FOLDER/bin/python tests/vllm/sweep.py [NAME ...] [--ranks 2]    # FOLDER is what setup.sh made; minutes for all

Prints, for each, the greatest difference of log-probabilities over a prompt of 150 tokens in chunks of 32 and 50 tokens
behind it, at 3 + 13, or the words of the refusal. --ranks: tensor parallel, with a core for each.
"""

import argparse
import os
import sys
import tempfile
import traceback
from pathlib import Path

os.environ |= {
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",
}
sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

from sinkattn import UnsupportedModelError, patch
from tiny import FAMILIES, HYBRIDS, ROPES, tiny

S, W, PROMPT, TOKENS = 3, 13, 150, 50


def served(folder: str, prompt: list[int], ranks: int) -> tuple[list[int], list[float]]:
    """The text with what vLLM adds to it, and the log-probability of every token but the first."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        folder,
        dtype="float32",
        enforce_eager=True,
        skip_tokenizer_init=True,
        max_model_len=1000,
        max_num_batched_tokens=32,
        max_num_seqs=4,
        block_size=16,
        tensor_parallel_size=ranks,
        kv_cache_memory_bytes=1 << 24,
        additional_config={"sinkattn": {"sink_size": S, "window_size": W}},
    )
    asked = SamplingParams(
        temperature=0, max_tokens=TOKENS, ignore_eos=True, logprobs=1, prompt_logprobs=1, detokenize=False
    )
    (answer,) = llm.generate([{"prompt_token_ids": prompt}], asked)
    ids = prompt + list(answer.outputs[0].token_ids)
    found = [*answer.prompt_logprobs[1:], *answer.outputs[0].logprobs]
    return ids, [at[token].logprob for at, token in zip(found, ids[1:], strict=True)]


@torch.no_grad()
def check(name: str, ranks: int) -> str:
    model = tiny(name)
    prompt = torch.randint(2, 97, (PROMPT,)).tolist()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        try:
            ids, found = served(folder, prompt, ranks)
        except Exception as error:
            words = str(error) + str(error.__cause__ or "")
            if isinstance(error, UnsupportedModelError) or "sinkattn" in words:
                return "refused: " + next((x.strip() for x in words.splitlines() if "sinkattn" in x), words)
            traceback.print_exc()
            return "failed: " + words.splitlines()[-1]
    with patch(model, S, W):
        logits = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    expected = logits.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    return f"{(expected - torch.tensor(found)).abs().max():.1e}"


if __name__ == "__main__":
    torch.manual_seed(0)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=[*FAMILIES, *HYBRIDS, *ROPES])
    parser.add_argument("--ranks", type=int, default=1)
    given = parser.parse_args()
    if given.ranks > 1:
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "|".join(map(str, range(given.ranks))))
    for name in given.names:
        print(f"{name:16} {check(name, given.ranks)}", flush=True)
