"""Train the small Llama that `sinkattn demo` runs, from the Python sources an installation has anyway, or its variants.

    python bench/train_model.py --output-dir sinkattn/demo_model                        # minutes on a large GPU
    python bench/train_model.py --output-dir /tmp/smoke --steps 20 --max-files 50 --batch-size 8 --eval-streams 1

The second is a smoke run for a CPU. It writes a bfloat16 checkpoint with its tokenizer, at most 8 MB in all, and
training.json: how it was made, which standard library files it has never seen, and its loss on them by position: dense,
with a window, and with a window and sinks.

The variants are those of the paper's study (arXiv 2309.17453, section 3.3), and gpt-oss's:

    --sinks token     every sample begins with <s>, a sink that is learned: the shipped model
    --sinks vanilla   samples are plain slices of text
    --sinks zero      so they are, and the softmax has 1 added to its denominator
    --sinks logits    so they are, and every head learns what is added (its logarithm)

`--mix recall` makes half of every batch the lines and questions of recall.py.
"""

from __future__ import annotations

import hashlib
import json
import math
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
import typer
from common import console, default_device, now, print_table, record
from experiments import SinkLlama, causal_attention, open_model, plain_forward
from recall import training_text
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from tqdm import tqdm
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

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
    """Byte-level BPE, from the first files (they are shuffled) up to sample_chars."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
    )  # fmt: skip
    total, sample = 0, []
    for text in texts:
        if (total := total + len(text)) > sample_chars:
            break
        sample.append(text)
    tokenizer.train_from_iterator(sample, trainer, length=len(sample))
    tokenizer.encode_special_tokens = True  # a "</s>" that a file spells out is text
    return tokenizer


def encode(tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    """The token ids of all texts, each followed by </s>, as one uint16 array; no <s>."""
    parts = []
    for start in tqdm(range(0, len(texts), 2048), "tokenize", mininterval=2):
        for encoding in tokenizer.encode_batch_fast(texts[start : start + 2048], add_special_tokens=False):
            parts += np.array(encoding.ids, np.uint16), np.array([EOS], np.uint16)
    return np.concatenate(parts)


def prepared(directory: Path | None, max_files: int | None, seed: int, lap: Callable[[str], None]) -> tuple:
    """Tokenizer, ids of the corpus, and what is known of it: read and tokenized, or kept in `directory` by others."""
    if directory is not None and (directory / "corpus.json").exists():
        about = json.loads((directory / "corpus.json").read_text("utf-8"))
        return Tokenizer.from_file(str(directory / "tokenizer.json")), np.load(directory / "tokens.npy"), about
    texts, held_out, left_out = read_corpus(max_files, seed)
    lap("corpus")
    tokenizer = train_tokenizer(texts)
    lap("tokenizer")
    tokens = encode(tokenizer, texts)
    lap("tokenize")
    size = sum(len(text.encode()) for text in texts)
    about = {"files": len(texts), "bytes": size, "tokens": len(tokens), "files_left_out": left_out}
    about = {"held_out": list(held_out), "corpus": about}
    if directory is not None:
        directory.mkdir(parents=True, exist_ok=True)
        tokenizer.save(str(directory / "tokenizer.json"))
        np.save(directory / "tokens.npy", tokens)
        (directory / "corpus.json").write_text(json.dumps(about), "utf-8")  # last: it says that the rest is whole
    return tokenizer, tokens, about


# ---------------------------------------------------------------------------------------------------------- training


def build_model(sinks: str) -> LlamaForCausalLM:
    AttentionInterface.register("causal_sdpa", causal_attention)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=192, intermediate_size=448, num_hidden_layers=8, num_attention_heads=6,
        num_key_value_heads=3, head_dim=32, max_position_embeddings=CONTEXT, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, bos_token_id=BOS, eos_token_id=EOS,
        pad_token_id=PAD, attn_implementation="causal_sdpa",
    )  # fmt: skip
    if sinks in ("token", "vanilla"):
        return LlamaForCausalLM(config)
    config.learns_sinks = sinks == "logits"
    return SinkLlama(config)


def batches(stream: Tensor, batch_size: int) -> Iterator[Tensor]:
    """(batch_size, CONTEXT + 1) slices of the tokens without end; each epoch cuts them elsewhere. Never syncs."""
    count = (len(stream) - CONTEXT - 1) // CONTEXT
    if count < batch_size:
        raise typer.BadParameter(f"{len(stream)} tokens make {count} samples, fewer than a batch of {batch_size}")
    span = torch.arange(CONTEXT + 1, device=stream.device)
    while True:
        starts = torch.randperm(count, device=stream.device) * CONTEXT + random.randrange(CONTEXT)
        for start in starts[: count - count % batch_size].split(batch_size):
            yield stream[start[:, None] + span].long()


def samples(streams: list[Tensor], batch_size: int, sinks: str) -> Iterator[Tensor]:
    """(batch_size, CONTEXT + 1) without end: equal shares of the streams; with sinks "token", <s> in front of each."""
    for parts in zip(*(batches(stream, batch_size // len(streams)) for stream in streams), strict=True):
        rows = torch.cat(parts)
        yield F.pad(rows[:, :-1], (1, 0), value=BOS) if sinks == "token" else rows


def sample_loss(model: LlamaForCausalLM, rows: Tensor) -> Tensor:
    """Mean loss of predicting every token of rows (batch, CONTEXT + 1) but the first from those before it."""
    with torch.autocast("cuda", torch.bfloat16, enabled=rows.is_cuda):
        logits = model(input_ids=rows[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten())


def train(
    model: LlamaForCausalLM,
    data: Iterator[Tensor],
    steps: int,
    minutes: float,
    batch_size: int,
    function: Callable[[LlamaForCausalLM, Tensor], Tensor] = sample_loss,
) -> dict:
    """Train in place until `steps` or `minutes` are over. The cosine follows the nearer of both: it always ends low."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    groups = [
        {"params": [weight for weight in weights if weight.ndim > 1], "weight_decay": 0.1},
        {"params": [weight for weight in weights if weight.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=3e-3, betas=(0.9, 0.95), fused=model.device.type == "cuda")
    device, clock, loss_of = model.device, time.perf_counter(), function
    if device.type == "cuda":
        loss_of = torch.compile(function)
        loss_of(model, next(data)).backward()
        model.zero_grad()
    compile_seconds = now(device) - clock

    curve, total, last, clock = [], torch.zeros((), device=device), 0, time.perf_counter()
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
        "steps": last, "planned_steps": steps, "tokens": last * batch_size * CONTEXT,
        "compiled": device.type == "cuda", "compile_seconds": round(compile_seconds, 1),
        "milliseconds_per_step": round(1000 * seconds / last, 2), "loss": curve,
    }  # fmt: skip


# -------------------------------------------------------------------------------------------------------- evaluation


@torch.no_grad()
def streaming_loss(
    model: LlamaForCausalLM, tokens: Tensor, sink_size: int, window_size: int
) -> tuple[Tensor, list[float]]:
    """Loss per position; per layer the attention on position 0 (mean over queries 256 to 511). tokens: (B, T + 1)."""
    on_first: dict[int, float] = {}

    def watch(layer: int, start: int, share: Tensor, seen: Tensor) -> None:
        if start == 256:
            on_first[layer] = share[..., 0].mean().item()

    hidden = plain_forward(model, tokens[:, :-1], sink_size, window_size, watch=watch)
    parts = zip(hidden.split(256, dim=1), tokens[:, 1:].split(256, dim=1), strict=True)
    losses = [F.cross_entropy(model.lm_head(states).mT, targets, reduction="none") for states, targets in parts]
    mass = [round(on_first.get(layer, 0.0), 4) for layer in range(len(model.model.layers))]
    return torch.cat(losses, 1).mean(0), mass


def held_out_streams(tokenizer: PreTrainedTokenizerFast, texts: dict[str, str], count: int | None) -> Tensor:
    """(count, length + 1): <s> if the model was trained with it, then from each held-out file on, round and round."""
    length = RANGES[-1][1]
    files = [tokenizer(text, add_special_tokens=False)["input_ids"] + [EOS] for text in texts.values()]
    starts = np.linspace(0, len(files), min(count or len(files), len(files)), endpoint=False).astype(int)
    front = tokenizer("")["input_ids"]
    streams = [
        (front + [token for file in files[start:] + files[:start] for token in file])[: length + 1] for start in starts
    ]
    return torch.tensor(streams)


def evaluate(directory: Path, held_out: dict[str, str], count: int | None, device: str) -> dict:
    """Load what was written and measure it in float32: loss by position for every policy."""
    model, tokenizer, front = open_model(str(directory), device, "float32")
    for text in held_out.values():
        ids = tokenizer(text)["input_ids"]
        assert ids[:front] == [BOS] * front and BOS not in ids[front:], "the tokenizer must write <s> in front at most"
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
    rows = [(name, *(f"{x:.2f}" for x in losses.values())) for name, losses in results["loss_by_position"].items()]
    print_table(("", *(f"{a}-{b}" for a, b in RANGES)), rows, "mean loss on held-out files, by position")
    console.print("attention on position 0, by layer:", *(f"{mass:.2f}" for mass in results["attention_on_first"]))
    rows = list(results["loss_by_position"].values())
    dense, window, sinks = (sum(row[f"{a}-{b}"] * (b - a) for a, b in RANGES[1:]) for row in rows)
    if not sinks < window < dense:
        console.print("[bold yellow]past the context the order is not sinks < window < dense: not fit for the demo")


# ------------------------------------------------------------------------------------------------------------- output


def save(model: LlamaForCausalLM, tokenizer: Tokenizer, sinks: str, directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    if sinks == "token":
        front = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", BOS)])
    else:
        front = processors.ByteLevel(trim_offsets=False)
    tokenizer.post_processor = front
    model.to(torch.bfloat16).save_pretrained(directory)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", split_special_tokens=True,
        clean_up_tokenization_spaces=False, model_max_length=10**9,  # the point is to go past the context
    )  # fmt: skip
    wrapped.save_pretrained(directory)
    path = directory / "tokenizer.json"  # written indented; half the size without
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")), ensure_ascii=False, separators=(",", ":")), "utf-8")


def check_size(directory: Path) -> None:
    size = sum(path.stat().st_size for path in directory.iterdir() if path.is_file())
    console.print(f"{directory}: {size:,} bytes")
    if size > SIZE_LIMIT:
        raise SystemExit(f"too large: the limit is {SIZE_LIMIT:,} bytes")


def main(
    output_dir: Annotated[Path, typer.Option(help="Where the checkpoint goes.")] = Path("sinkattn/demo_model"),
    steps: Annotated[int, typer.Option(help="Optimizer steps; 0 only prepares --corpus.")] = 14_000,
    minutes: Annotated[float, typer.Option(help="Training ends, annealed, after this long at the latest.")] = 30.0,
    batch_size: Annotated[int, typer.Option(help="Samples of 512 tokens in a step.")] = 64,
    max_files: Annotated[int | None, typer.Option(help="Train on so many files at most.")] = None,
    eval_streams: Annotated[int | None, typer.Option(help="Held-out texts to evaluate on; all by default.")] = None,
    sinks: Annotated[str, typer.Option(help="token, vanilla, zero or logits, see above.")] = "token",
    mix: Annotated[str | None, typer.Option(help='"recall": half of the samples are lines and questions.')] = None,
    corpus: Annotated[Path | None, typer.Option(help="Keep the tokenized corpus here, or take it from here.")] = None,
    seed: int = 0,
) -> None:
    """Train the demo's model, or a variant of it, and evaluate it past its context."""
    if sinks not in ("token", "vanilla", "zero", "logits") or mix not in (None, "recall"):
        raise typer.BadParameter(f"--sinks {sinks}, --mix {mix}: choose token, vanilla, zero or logits, and recall")
    device = default_device()
    random.seed(seed)
    torch.manual_seed(seed)
    begin, seconds = time.perf_counter(), {}

    def lap(name: str) -> None:
        seconds[name] = round(time.perf_counter() - begin - sum(seconds.values()), 1)
        console.print(f"{name}: {seconds[name]} s")

    tokenizer, tokens, about = prepared(corpus, max_files, seed, lap)
    console.print(about)
    if steps == 0:
        return
    streams = [tokens]
    if mix == "recall":
        streams.append(encode(tokenizer, training_text(lines=max(500, 120 * min(steps, 5000)), seed=seed)))
        lap("recall text")
    # ids fit, and int16 can be indexed on every device
    streams = [torch.from_numpy(stream.view(np.int16)).to(device) for stream in streams]
    model = build_model(sinks).to(device)
    console.print(f"{model.num_parameters():,} parameters on {device}")
    training = train(model, samples(streams, batch_size, sinks), steps, minutes, batch_size)
    lap("training")
    save(model, tokenizer, sinks, output_dir)
    held_out = {name: (stdlib() / name).read_text("utf-8") for name in about["held_out"]}
    evaluation = evaluate(output_dir, held_out, eval_streams, device)
    lap("evaluation")
    show(evaluation)

    entry = {**record(device), **about, "training": training, "evaluation": evaluation, "seconds": seconds}
    entry["versions"]["tokenizers"] = tokenizers.__version__
    (output_dir / "training.json").write_text(json.dumps(entry) + "\n", "utf-8")
    check_size(output_dir)


if __name__ == "__main__":
    typer.run(main)
