"""Endless requests through vLLM's OpenAI server: token for token what a patched model generates, at constant blocks.

    tests/vllm/setup.sh FOLDER
    SINKATTN_VLLM=FOLDER python -m pytest tests/vllm/test_server.py

Without `SINKATTN_VLLM` everything here is skipped. `SINKATTN_VLLM_TOKENS` (400) is how many each request generates. The
server is told that the model was made for 512 positions, so every request outlives its table of angles.
"""

import json
import os
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch

import real
from serving import BLOCK, S, W, environment, serving
from sinkattn import patch

if not environment():
    pytest.skip("SINKATTN_VLLM names no environment with vLLM: tests/vllm/setup.sh makes one", allow_module_level=True)

TOKENS = int(os.environ.get("SINKATTN_VLLM_TOKENS", "400"))
pytestmark = [pytest.mark.real, pytest.mark.slow]


def patched(prompts: list[list[int]], tokens: int) -> list[tuple[list[int], list[int]]]:
    """Prompts, and what a patched model adds to each by itself."""
    model, found = real.real_model(), []
    with patch(model, S, W):
        for prompt in prompts:
            ids = torch.tensor([prompt])
            ids = model.generate(ids, max_new_tokens=tokens, do_sample=False, eos_token_id=None, pad_token_id=0)
            found.append((prompt, ids[0, len(prompt) :].tolist()))
    assert all(len(added) == tokens for _, added in found)
    return found


@pytest.fixture(scope="module")
def expected() -> list[tuple[list[int], list[int]]]:
    """Three prompts, two of them longer than sinks and window, and what is to come behind each."""
    real.needed()
    text = real.prose(2000)[0].tolist()
    return patched([text[begin : begin + length] for begin, length in ((0, 9), (100, 300), (700, 731))], TOKENS)


EXAMPLE = Path(__file__).parents[2] / "examples/vllm_live.py"
CAPTURED = {"text": True, "capture_output": True, "timeout": 1200}
SHORT = ("--hf-overrides", '{"max_position_embeddings": 512}', "--kv-cache-memory-bytes", str(1 << 28))
CHUNKS = ("--max-model-len=1000000", "--max-num-batched-tokens=48")
WHOLE = ("--max-model-len=5000", "--no-enable-chunked-prefill", "--max-num-batched-tokens=5000")


def all_at_once(server, expected):
    with ThreadPoolExecutor(len(expected)) as pool:
        found = list(pool.map(lambda row: server.complete(row[0], len(row[1])), expected))
    for (prompt, added), ids in zip(expected, found, strict=True):
        assert ids == added, f"prompt of {len(prompt)}: differs at {first_difference(ids, added)}"


@pytest.mark.parametrize("arguments", [CHUNKS, (*WHOLE, "--no-enable-prefix-caching")], ids=["chunks", "whole prompts"])
def test_token_for_token(tmp_path, expected, arguments):
    """All three at once; then one after the other, and the blocks that each holds meanwhile."""
    with serving(tmp_path, *SHORT, *arguments) as server:
        all_at_once(server, expected)
        for row in expected:
            seen, done = [], threading.Event()

            def watch(seen=seen, done=done):
                while not done.wait(0.2):
                    seen.append(server.blocks_in_use())

            watcher = threading.Thread(target=watch)
            watcher.start()
            try:
                all_at_once(server, [row])
            finally:
                done.set()
                watcher.join()
            late = set(seen[len(seen) // 2 :])
            print(f"prompt of {len(row[0])}, blocks in use: {sorted(set(seen))}, in the second half {sorted(late)}")
            assert max(late) <= -(-S // BLOCK) + -(-(W - 1) // BLOCK) + 1  # the window begins anywhere in a block
        assert server.blocks_in_use() == 0


def test_preempted_and_shared(tmp_path, expected):
    """A cache for two requests and a half, so that vLLM takes blocks away and resumes. And prompts found in it."""
    system = expected[2][0][:650]
    short = system[:330] + expected[0][0] + expected[1][0]  # the window has long left what it shares
    others = patched([*(system + expected[1][0][at : at + 20] for at in (0, 30, 60)), short], 60)
    with serving(tmp_path, *SHORT, *CHUNKS, "--num-gpu-blocks-override=26") as server:
        all_at_once(server, [row for row in expected for _ in range(2)])
        preempted = server.metric("num_preemptions_total")
    with serving(tmp_path, *SHORT, *CHUNKS) as server:
        hits = []
        for row in (others[0], others[0], *others[1:]):
            before = server.metric("prefix_cache_hits_total")
            all_at_once(server, [row])
            hits.append(round(server.metric("prefix_cache_hits_total") - before))
    print(f"{preempted:.0f} preemptions; found in the prefix cache, of 670 tokens (the last: {len(short)}): {hits}")
    assert preempted > 0
    assert hits[0] == 0 and hits[1] > 600 and hits[3] > 600 and 330 - 2 * BLOCK < hits[4] <= 330


def test_one_request_in_pieces():
    """examples/vllm_live.py: what is expected behind each piece is what a patched model expects behind all so far."""
    real.needed()
    text, words, model = " ".join("\n".join(topics.values()).split()), real.tokenizer(), real.real_model()
    lines = [f"{text[400 * i : 400 * i + 400]}\n" for i in range(10)]
    command = [f"{environment()}/bin/python", str(EXAMPLE), str(real.folder()), "--dtype", "float32"]
    surroundings = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    ran = subprocess.run(
        [*command, f"--sink-size={S}", f"--window-size={W}"], input="".join(lines), env=surroundings, **CAPTURED
    )
    found = [json.loads(line)["id"] for line in ran.stdout.splitlines() if line.startswith('{"id"')]
    ids, expected = [], []
    with patch(model, S, W), torch.no_grad():
        for line in lines:
            ids += words.encode(line, add_special_tokens=False)
            expected.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    assert len(ids) > 3 * (S + W) and found == expected, ran.stderr[-2000:]


def first_difference(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
