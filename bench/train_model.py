"""Train the small Llama that `sinkattn demo` runs, from the Python sources an installation has anyway.

    python bench/train_model.py --output-dir sinkattn/demo_model                        # minutes on a large GPU
    python bench/train_model.py --output-dir /tmp/smoke --steps 20 --max-files 50 --batch-size 8 --eval-streams 1

The second is a smoke run for a CPU. It writes a bfloat16 checkpoint with its tokenizer, at most 8 MB in all, and
training.json: how it was made, which standard library files it has never seen, and its loss on them by position: dense,
with a window, and with a window and sinks.
"""

from __future__ import annotations

import hashlib
import json
import math
import platform
import random
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated

import numpy as np
import tokenizers
import torch
import torch.nn.functional as F
import transformers
import typer
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from tqdm import tqdm
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

# Modules of the standard library kept for evaluation and for the demo. All are single files in Python 3.10 to 3.14.
HELD_OUT = (
    "argparse.py", "calendar.py", "configparser.py", "difflib.py", "doctest.py", "fractions.py", "imaplib.py",
    "inspect.py", "ipaddress.py", "mailbox.py", "optparse.py", "pdb.py", "plistlib.py", "smtplib.py", "statistics.py",
    "tarfile.py", "textwrap.py", "turtle.py",
)  # fmt: skip
SIZE_LIMIT = 8_000_000
BOS, EOS, PAD = 0, 1, 2
VOCABULARY, CONTEXT, WARMUP, SHINGLE = 4096, 512, 200, 8
RANGES = ((0, 512), (512, 1024), (1024, 2048), (2048, 4096), (4096, 8192))
POLICIES = {  # name: sink_size, window_size
    "dense": (0, RANGES[-1][1]),
    "window 512": (0, 512),
    "sinks 4 + 508": (4, 508),
}
console = Console()


# ------------------------------------------------------------------------------------------------------------ corpus


def stdlib() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def source_files() -> list[Path]:
    """Every .py file of the standard library and of the site-packages in use, in a fixed order."""
    roots = {stdlib(), *(Path(sysconfig.get_path(name)) for name in ("purelib", "platlib"))}
    roots |= {Path(entry) for entry in sys.path if Path(entry).name in ("site-packages", "dist-packages")}
    return sorted({path.resolve() for root in roots if root.is_dir() for path in root.rglob("*.py") if path.is_file()})


def read_source(path: Path) -> str | None:
    """The text of a file worth training on: UTF-8, of sensible size, and not minified or generated data."""
    try:
        if not 200 <= path.stat().st_size <= 1_000_000:
            return None
        text = path.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    return text if len(text) <= 200 * (text.count("\n") + 1) else None


def significant_lines(text: str) -> list[str]:
    return [line for line in map(str.strip, text.splitlines()) if line]


def shingles(lines: list[str]) -> Iterator[tuple[str, ...]]:
    """Every run of SHINGLE neighbouring lines."""
    return zip(*(lines[start:] for start in range(SHINGLE)), strict=False)


def read_corpus(max_files: int | None, seed: int) -> tuple[list[str], dict[str, str], dict[str, int]]:
    """Texts to train on (shuffled), the held-out texts, and how many files were left out and why."""
    held_out = {name: (stdlib() / name).read_text("utf-8") for name in HELD_OUT if (stdlib() / name).is_file()}
    held_lines = {line for text in held_out.values() for line in significant_lines(text)}
    held_shingles = {shingle for text in held_out.values() for shingle in shingles(significant_lines(text))}

    def overlaps(text: str) -> bool:  # a vendored or backported copy: more than 20 % of its shingles are held out
        lines = significant_lines(text)
        limit = 0.2 * (len(lines) - SHINGLE + 1)
        if sum(line in held_lines for line in lines) <= limit:  # each shared shingle starts with a shared line
            return False
        return sum(shingle in held_shingles for shingle in shingles(lines)) > max(limit, 0)

    paths = source_files()
    random.Random(seed).shuffle(paths)
    texts, seen = [], set()
    left_out = dict.fromkeys(("held out by name", "unsuitable", "duplicate", "held out by content"), 0)
    with ThreadPoolExecutor(16) as pool:
        for path, text in zip(tqdm(paths, "read", mininterval=2), pool.map(read_source, paths), strict=False):
            if max_files and len(texts) == max_files:
                break
            if path.name in HELD_OUT:
                left_out["held out by name"] += 1
            elif text is None:
                left_out["unsuitable"] += 1
            elif (digest := hashlib.blake2b(text.encode(), digest_size=16).digest()) in seen:
                left_out["duplicate"] += 1
            elif overlaps(text):
                left_out["held out by content"] += 1
            else:
                seen.add(digest)
                texts.append(text)
    return texts, held_out, left_out


# --------------------------------------------------------------------------------------------------------- tokenizer


def train_tokenizer(texts: list[str], sample_chars: int = 20_000_000) -> Tokenizer:
    """Byte-level BPE, from the first files (they are shuffled) up to sample_chars; it writes <s> before every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    total, sample = 0, []
    for text in texts:
        if (total := total + len(text)) > sample_chars:
            break
        sample.append(text)
    tokenizer.train_from_iterator(sample, trainer, length=len(sample))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", BOS)]
    )
    tokenizer.encode_special_tokens = True  # a "</s>" that a file spells out is text
    return tokenizer


def encode(tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    """The token ids of all texts, each followed by </s>, as one uint16 array; no <s>."""
    parts = []
    for start in tqdm(range(0, len(texts), 2048), "tokenize", mininterval=2):
        for encoding in tokenizer.encode_batch_fast(texts[start : start + 2048], add_special_tokens=False):
            parts += np.array(encoding.ids, np.uint16), np.array([EOS], np.uint16)
    return np.concatenate(parts)


# ---------------------------------------------------------------------------------------------------------- training


def causal_attention(module, query, key, value, attention_mask, scaling=None, **_) -> tuple[Tensor, None]:
    """Causal SDPA with no mask: transformers would build one inside torch.compile, and wait for the GPU outside it."""
    query, key = query.to(value.dtype), key.to(value.dtype)  # the rotation left them in float32
    output = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
    return output.transpose(1, 2).contiguous(), None


def build_model() -> LlamaForCausalLM:
    AttentionInterface.register("causal_sdpa", causal_attention)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=192,
        intermediate_size=448,
        num_hidden_layers=8,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=32,
        max_position_embeddings=CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
        attn_implementation="causal_sdpa",
    )
    return LlamaForCausalLM(config)


def batches(stream: Tensor, batch_size: int) -> Iterator[Tensor]:
    """(batch_size, CONTEXT) slices of the token stream without end; each epoch cuts it elsewhere. Never syncs."""
    count = (len(stream) - CONTEXT) // CONTEXT
    if count < batch_size:
        raise typer.BadParameter(f"{len(stream)} tokens make {count} samples, fewer than a batch of {batch_size}")
    span = torch.arange(CONTEXT, device=stream.device)
    while True:
        starts = torch.randperm(count, device=stream.device) * CONTEXT + random.randrange(CONTEXT)
        for start in starts[: count - count % batch_size].split(batch_size):
            yield stream[start[:, None] + span].long()


def sample_loss(model: LlamaForCausalLM, targets: Tensor) -> Tensor:
    """Mean loss of predicting targets (batch, CONTEXT) from <s> and the targets before each."""
    inputs = F.pad(targets[:, :-1], (1, 0), value=BOS)
    with torch.autocast("cuda", torch.bfloat16, enabled=targets.is_cuda):
        logits = model(input_ids=inputs, use_cache=False).logits
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


def compile_loss(model: LlamaForCausalLM, targets: Tensor) -> tuple[Callable[[LlamaForCausalLM, Tensor], Tensor], bool]:
    """sample_loss, compiled and warmed up on a GPU, eager on a CPU or where that fails; and whether it is compiled."""
    if targets.is_cuda:
        try:
            compiled = torch.compile(sample_loss)
            compiled(model, targets).backward()
            torch.cuda.synchronize()
            return compiled, True
        except Exception as error:
            console.print(f"[bold red]torch.compile failed, training in eager mode, slower:[/] {type(error).__name__}")
            console.print(str(error)[:2000], markup=False)
        finally:
            model.zero_grad()
    return sample_loss, False


def train(model: LlamaForCausalLM, stream: Tensor, steps: int, minutes: float, batch_size: int) -> dict:
    """Train in place until `steps` or `minutes` are over. The cosine follows the nearer of both: it always ends low."""
    weights = list(model.parameters())
    groups = [
        {"params": [weight for weight in weights if weight.ndim > 1], "weight_decay": 0.1},
        {"params": [weight for weight in weights if weight.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=3e-3, betas=(0.9, 0.95), fused=stream.is_cuda)
    data = batches(stream, batch_size)
    clock = time.perf_counter()
    loss_of, compiled = compile_loss(model, next(data))
    compile_seconds = time.perf_counter() - clock

    curve, total, last, clock = [], torch.zeros((), device=stream.device), 0, time.perf_counter()
    bar = tqdm(range(1, steps + 1), "train", mininterval=2)
    for step in bar:
        share = max(step / steps, (time.perf_counter() - clock) / (60 * minutes))
        cosine = 0.05 + 0.95 * (1 + math.cos(math.pi * min(share, 1))) / 2
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * cosine * min(1, step / WARMUP)
        loss = loss_of(model, next(data))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        total += loss.detach()
        if step % 100 == 0 or step == steps or share >= 1:
            curve.append((step, round(total.item() / (step - last), 4)))  # the only wait for the GPU
            bar.set_postfix(loss=curve[-1][1], refresh=False)
            total.zero_()
            last = step
        if share >= 1:
            break
    seconds = time.perf_counter() - clock
    return {
        "steps": last,
        "planned_steps": steps,
        "tokens": last * batch_size * CONTEXT,
        "compiled": compiled,
        "compile_seconds": round(compile_seconds, 1),
        "milliseconds_per_step": round(1000 * seconds / last, 2),
        "loss": curve,
    }


# -------------------------------------------------------------------------------------------------------- evaluation


def rotate(x: Tensor, positions: Tensor, theta: float = 10000.0) -> Tensor:
    """RoPE, half-split. x (..., T, head_dim), positions (T,)."""
    half = x.shape[-1] // 2
    frequencies = theta ** (-torch.arange(half, device=x.device, dtype=torch.float64) / half)
    angles = positions[:, None] * frequencies
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


@torch.no_grad()
def streaming_loss(
    model: LlamaForCausalLM, tokens: Tensor, sink_size: int, window_size: int, chunk: int = 256
) -> tuple[Tensor, list[float]]:
    """Loss per position, and per layer the attention on position 0 (mean over queries 256 to 511). tokens (B, T + 1).

    The query at t sees j < S at distance min(t, S + W - 1) - j and t - W < j <= t at distance t - j. Plain PyTorch on
    the model's weights, each chunk of queries against the keys it can see: nothing shared with the package under test.
    """
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    positions = torch.arange(inputs.shape[1], device=tokens.device)
    starts = range(0, inputs.shape[1], chunk)
    hidden, mass = model.model.embed_tokens(inputs), []
    for layer in model.model.layers:
        attention, states = layer.self_attn, layer.input_layernorm(hidden)
        q, k, v = (
            projection(states).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)  # (B, heads, T, head_dim)
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (rotate(k, positions), v))
        q_window, q_sink = rotate(q, positions), rotate(q, positions.clamp(max=sink_size + window_size - 1))
        outputs, on_first = [], []
        for start in starts:
            t = positions[start : start + chunk, None]
            first = max(0, start - window_size + 1)
            j = torch.cat([positions[: min(sink_size, first)], positions[first : start + chunk]])
            rows, keys = slice(start, start + chunk), k[:, :, j].mT
            scores = torch.where(j < sink_size, q_sink[:, :, rows] @ keys, q_window[:, :, rows] @ keys)
            seen = (j <= t) & ((j < sink_size) | (j > t - window_size))
            share = (scores * attention.head_dim**-0.5).masked_fill(~seen, -math.inf).softmax(-1)
            outputs.append(share @ v[:, :, j])
            if 256 <= start < 512:
                on_first.append(share[..., 0].mean().item())
        hidden = hidden + attention.o_proj(torch.cat(outputs, 2).transpose(1, 2).flatten(2))
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        mass.append(round(sum(on_first) / max(len(on_first), 1), 4))
    hidden = model.model.norm(hidden)
    losses = [
        F.cross_entropy(model.lm_head(hidden[:, s : s + chunk]).mT, targets[:, s : s + chunk], reduction="none")
        for s in starts
    ]
    return torch.cat(losses, 1).mean(0), mass


def held_out_streams(tokenizer: PreTrainedTokenizerFast, texts: dict[str, str], count: int | None) -> Tensor:
    """(count, length + 1): <s>, then from each held-out file on, this file and those after it, round and round."""
    length = RANGES[-1][1]
    files = [tokenizer(text, add_special_tokens=False)["input_ids"] + [EOS] for text in texts.values()]
    starts = np.linspace(0, len(files), min(count or len(files), len(files)), endpoint=False).astype(int)
    streams = [[BOS] + [token for file in files[start:] + files[:start] for token in file][:length] for start in starts]
    return torch.tensor(streams)


def evaluate(directory: Path, held_out: dict[str, str], count: int | None, device: str) -> dict:
    """Load what was written and measure it in float32: loss by position for every policy."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).to(device).eval()
    for text in held_out.values():
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == BOS and BOS not in ids[1:], "the tokenizer must write <s> once, in front"
        assert tokenizer.decode(ids, skip_special_tokens=True) == text, "decoding must restore the text"
    streams = held_out_streams(tokenizer, held_out, count).to(device)

    with torch.no_grad():  # the forward below against the model's own
        head = streams[:1, : CONTEXT + 1]
        own = F.cross_entropy(model(input_ids=head[:, :-1], use_cache=False).logits[0], head[0, 1:], reduction="none")
        torch.testing.assert_close(streaming_loss(model, head, 0, CONTEXT)[0], own, atol=1e-3, rtol=1e-3)

    results = {"streams": len(streams), "length": streams.shape[1] - 1, "loss_by_position": {}}
    parts = streams.split(6 if device == "cuda" else 1)
    for name, (sink_size, window_size) in POLICIES.items():
        runs = [streaming_loss(model, part, sink_size, window_size) for part in tqdm(parts, name, mininterval=2)]
        losses = sum(loss * len(part) for (loss, _), part in zip(runs, parts, strict=True)) / len(streams)
        results["loss_by_position"][name] = {f"{a}-{b}": round(losses[a:b].mean().item(), 4) for a, b in RANGES}
        if name == "dense":
            weights = [len(part) / len(streams) for part in parts]
            per_layer = zip(*(mass for _, mass in runs), strict=True)
            results["attention_on_first"] = [
                round(sum(w * m for w, m in zip(weights, layer, strict=True)), 3) for layer in per_layer
            ]
    return results


def show(results: dict) -> None:
    table = Table("", *(f"{a}-{b}" for a, b in RANGES), title="mean loss on held-out files, by position")
    for name, losses in results["loss_by_position"].items():
        table.add_row(name, *(f"{loss:.2f}" for loss in losses.values()))
    console.print(table)
    console.print("attention on position 0, by layer:", *(f"{mass:.2f}" for mass in results["attention_on_first"]))
    rows = list(results["loss_by_position"].values())
    dense, window, sinks = (sum(row[f"{a}-{b}"] * (b - a) for a, b in RANGES[1:]) for row in rows)
    if not sinks < window < dense:
        console.print("[bold yellow]past the context the order is not sinks < window < dense: not fit for the demo")


# ------------------------------------------------------------------------------------------------------------- output


def save(model: LlamaForCausalLM, tokenizer: Tokenizer, directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16).save_pretrained(directory)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        clean_up_tokenization_spaces=False,
        split_special_tokens=True,
        model_max_length=10**9,  # the point is to go past the context
    )
    wrapped.save_pretrained(directory)
    path = directory / "tokenizer.json"  # written indented; half the size without
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")), ensure_ascii=False, separators=(",", ":")), "utf-8")


def check_size(directory: Path) -> None:
    sizes = {path.name: path.stat().st_size for path in sorted(directory.iterdir()) if path.is_file()}
    table = Table("file", "bytes", title=str(directory))
    for name, size in (*sizes.items(), ("total", sum(sizes.values()))):
        table.add_row(name, f"{size:,}")
    console.print(table)
    if sum(sizes.values()) > SIZE_LIMIT:
        console.print(f"[bold red]too large: the limit is {SIZE_LIMIT:,} bytes")
        raise typer.Exit(1)


def main(
    output_dir: Annotated[Path, typer.Option(help="Where the checkpoint goes.")] = Path("sinkattn/demo_model"),
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 14_000,
    minutes: Annotated[float, typer.Option(help="Training ends, annealed, after this long at the latest.")] = 30.0,
    batch_size: Annotated[int, typer.Option(help="Samples of 512 tokens in a step.")] = 64,
    max_files: Annotated[int | None, typer.Option(help="Train on so many files at most.")] = None,
    eval_streams: Annotated[int | None, typer.Option(help="Held-out texts to evaluate on; all by default.")] = None,
    seed: int = 0,
) -> None:
    """Train the demo's model and evaluate it past its context."""
    options = {"steps": steps, "minutes": minutes, "batch-size": batch_size, "max-files": max_files}
    options |= {"eval-streams": eval_streams, "seed": seed}
    given = [f"--{name} {value}" for name, value in options.items() if value is not None]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    random.seed(seed)
    torch.manual_seed(seed)
    begin, seconds = time.perf_counter(), {}

    def lap(name: str) -> None:
        seconds[name] = round(time.perf_counter() - begin - sum(seconds.values()), 1)
        console.print(f"{name}: {seconds[name]} s")

    texts, held_out, left_out = read_corpus(max_files, seed)
    lap("corpus")
    tokenizer = train_tokenizer(texts)
    lap("tokenizer")
    tokens = encode(tokenizer, texts)
    lap("tokenize")
    corpus = {"files": len(texts), "bytes": sum(len(text.encode()) for text in texts), "tokens": len(tokens)}
    console.print(corpus, "left out:", left_out)

    model = build_model().to(device)
    console.print(f"{model.num_parameters():,} parameters on {device}")
    stream = torch.from_numpy(tokens.view(np.int16)).to(device)  # ids fit, and int16 can be indexed on every device
    training = train(model, stream, steps, minutes, batch_size)
    lap("training")
    save(model, tokenizer, output_dir)
    evaluation = evaluate(output_dir, held_out, eval_streams, device)
    lap("evaluation")
    show(evaluation)

    record = {
        "command": " ".join(["python bench/train_model.py", *given]),
        "held_out": list(held_out),
        "corpus": corpus | {"files_left_out": left_out},
        "training": training,
        "evaluation": evaluation,
        "seconds": seconds,
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        },
    }
    (output_dir / "training.json").write_text(json.dumps(record) + "\n", "utf-8")
    check_size(output_dir)


if __name__ == "__main__":
    typer.run(main)
