"""Many requests that do not end through vLLM's server: tokens a second, blocks and memory, over time.

    SINKATTN_VLLM=FOLDER python tests/vllm/endless.py REQUESTS SECONDS [TOKENS] [--plain]

REQUESTS requests of prose, in a cache that holds 4 contexts of the model's 8,192 tokens. Each asks for TOKENS more
(1,000,000), and is cut off after SECONDS. --plain: the same server without the plugin, whose requests end at 8,192.
Tokens are also told by the second that the server computed for, which other work on the machine changes less.
"""

import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import real
from serving import BLOCK, serving

CONTEXTS, CONTEXT, LAYERS, ROW = 4, 8192, 30, 3 * 64 * 2 * 4  # of SmolLM2-135M: bytes of a token in a layer


def main(requests: int, seconds: float, tokens: int = 1_000_000, is_plain: bool = False) -> None:
    space = CONTEXTS * (CONTEXT + BLOCK) * LAYERS * ROW
    arguments = [f"--kv-cache-memory-bytes={space}", f"--max-num-seqs={requests}", "--max-num-batched-tokens=512"]
    arguments += ["--disable-uvicorn-access-log", *([] if is_plain else ["--max-model-len=2000000"])]
    text = real.prose(100 * requests + 64)[0].tolist()
    with (
        tempfile.TemporaryDirectory() as folder,
        serving(Path(folder), *arguments, **({"sizes": None} if is_plain else {})) as server,
    ):

        def ask(i: int) -> None:
            prompt = text[100 * i : 100 * i + 64]
            try:
                server.complete(prompt, CONTEXT - len(prompt) if is_plain else tokens)
            except OSError as error:  # cut off
                print(f"request {i}: {error}") if not done.is_set() else None

        done = threading.Event()
        for i in range(requests):
            threading.Thread(target=ask, args=(i,), daemon=True).start()
        start = last = time.monotonic()
        before, computed = 0.0, server.cpu_seconds()
        print("seconds  tokens  tokens/s  tokens/CPU s  running  waiting  preempted  blocks  MB", flush=True)
        while last - start < seconds:
            time.sleep(min(30, seconds))
            now, made = time.monotonic(), server.metric("generation_tokens_total")
            states = [
                server.metric(f"num_{name}") for name in ("requests_running", "requests_waiting", "preemptions_total")
            ]
            cpu = server.cpu_seconds()
            speeds = (made - before) / (now - last), (made - before) / (cpu - computed)
            row = [made, *speeds, *states, server.blocks_in_use(), server.resident_bytes() / 1e6]
            print(f"{now - start:7.0f} " + "  ".join(f"{x:.0f}" for x in row), flush=True)
            before, last, computed = made, now, cpu
        done.set()


if __name__ == "__main__":
    given = [int(x) for x in sys.argv[1:] if x != "--plain"]
    main(*given, is_plain="--plain" in sys.argv)
