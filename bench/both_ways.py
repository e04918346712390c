"""What of sinks + window carries over to a model that looks both ways: python bench/both_ways.py --output-dir both_ways

A small encoder with rotary positions is trained on the corpus of train_model.py to fill in masked tokens, 512 tokens at
a time with <s> in front, and then reads held-out texts many times as long, at once, in three ways:

    full       everything sees everything
    window     a token sees those up to half a window away, on both sides
    global     that, and S global tokens in front: everything sees them, and they see everything (Longformer, BigBird)

A distance to or from a global token is counted as in the cache, at most the trained length; in the window it is that of
the text. Writes both_ways.json: the loss of the masked tokens by position. Everything is plain PyTorch: sinkattn serves
decoders, and refuses such a model.
"""

import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from common import RESULTS, Output, default_device, print_table, record, write_json
from experiments import ranges, rotate, through_layers
from torch import Tensor
from train_model import BOS, CONTEXT, EOS, PAD, batches, build_model, prepared, stdlib, train
from transformers import AttentionInterface, LlamaForCausalLM

MASKED = 0.15  # share of the tokens
WAYS = {"full": None, "window": 0, "global": 4}  # global tokens


def attention(module, query, key, value, attention_mask, scaling=None, **_) -> tuple[Tensor, None]:
    """transformers' attention function: everything sees everything."""
    query, key = query.to(value.dtype), key.to(value.dtype)
    output = F.scaled_dot_product_attention(query, key, value, scale=scaling, enable_gqa=True)
    return output.transpose(1, 2).contiguous(), None


def masked(rows: Tensor) -> Tensor:
    """rows (B, T) -> inputs with masked tokens, and targets, -100 where nothing was masked: (2, B, T)."""
    chosen = torch.rand(rows.shape, device=rows.device) < MASKED
    chosen[:, 0] = False  # <s>
    return torch.stack((rows.masked_fill(chosen, PAD), rows.masked_fill(~chosen, -100)))


def samples(stream: Tensor, batch_size: int) -> Iterator[Tensor]:
    for rows in batches(stream, batch_size):
        yield masked(F.pad(rows[:, : CONTEXT - 1], (1, 0), value=BOS))


def loss_of(model: LlamaForCausalLM, data: Tensor) -> Tensor:
    inputs, targets = data
    with torch.autocast("cuda", torch.bfloat16, enabled=inputs.is_cuda):
        logits = model(input_ids=inputs, use_cache=False).logits
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=-100)


@torch.no_grad()
def logits_of(model: LlamaForCausalLM, ids: Tensor, sink_size: int | None, chunk: int = 512) -> Tensor:
    """(B, T) ids -> (B, T, vocabulary). sink_size: global tokens in front, None for full attention."""
    theta = model.config.rope_parameters["rope_theta"]
    position = torch.arange(ids.shape[1], device=ids.device)
    near = position.clamp(max=CONTEXT - 1)

    def attend(_, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        (q_text, q_near), (k_text, k_near) = ((rotate(x, position, theta), rotate(x, near, theta)) for x in (q, k))
        outputs = []
        for rows in position.split(chunk):
            t, j = rows[:, None], position
            scores = q_text[:, :, rows] @ k_text.mT
            if sink_size is not None:
                of_global = torch.where(t < sink_size, q_text[:, :, rows] @ k_near.mT, q_near[:, :, rows] @ k_text.mT)
                is_global = (t < sink_size) | (j < sink_size)
                visible = is_global | ((t - j).abs() <= (CONTEXT - sink_size) // 2)
                scores = torch.where(is_global, of_global, scores).masked_fill(~visible, -torch.inf)
            outputs.append((scores * q.shape[-1] ** -0.5).softmax(-1) @ v)
        return torch.cat(outputs, 2)

    return model.lm_head(through_layers(model, ids, attend))


def main(
    output_dir: Output = RESULTS / "both_ways",
    corpus: Annotated[Path | None, typer.Option(help="As in train_model.py.")] = None,
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 5000,
    minutes: Annotated[float, typer.Option(help="Training ends, annealed, after this long at the latest.")] = 30.0,
    batch_size: Annotated[int, typer.Option(help="Samples of 512 tokens in a step.")] = 32,
    max_files: Annotated[int | None, typer.Option(help="Train on so many files at most.")] = None,
    tokens: Annotated[int, typer.Option(help="Length of a held-out text.")] = 4096,
    texts: Annotated[int, typer.Option(help="How many.")] = 8,
) -> None:
    """Train, and read long texts in every way."""
    device = default_device()
    random.seed(0)
    torch.manual_seed(0)
    begin = time.perf_counter()
    tokenizer, stream, about = prepared(corpus, max_files, 0, lambda name: None)
    AttentionInterface.register("both_ways", attention)
    model = build_model("token").to(device)
    model.set_attn_implementation("both_ways")
    stream = torch.from_numpy(stream.view("int16")).to(device)
    training = train(model, samples(stream, batch_size), steps, minutes, batch_size, loss_of)

    held_out = [(stdlib() / name).read_text("utf-8") for name in about["held_out"]]
    ids = [token for text in held_out for token in [*tokenizer.encode(text, add_special_tokens=False).ids, EOS]]
    rows = torch.tensor(ids[: texts * (tokens - 1)], device=device).view(texts, tokens - 1)
    inputs, targets = masked(F.pad(rows, (1, 0), value=BOS))
    with torch.no_grad():  # the forward below against the model's own
        own = model(input_ids=inputs[:1, :CONTEXT], use_cache=False).logits
    torch.testing.assert_close(logits_of(model, inputs[:1, :CONTEXT], None), own, atol=1e-2, rtol=1e-2)
    spans, losses = ranges(tokens, CONTEXT), {}
    for name, sink_size in WAYS.items():
        found = [
            F.cross_entropy(logits_of(model, x[None], sink_size)[0], y, ignore_index=-100, reduction="none")
            for x, y in zip(inputs, targets, strict=True)
        ]
        loss, counted = torch.stack(found), targets >= 0
        losses[name] = {f"{a}-{b}": (loss[:, a:b].sum() / counted[:, a:b].sum()).item() for a, b in spans}
    entry = {
        **record(device), "training": training, "texts": texts, "tokens": tokens, "loss": losses,
        "seconds": round(time.perf_counter() - begin, 1),
    }  # fmt: skip
    write_json(output_dir / "both_ways.json", entry)
    rows = [(name, *(f"{loss:.3f}" for loss in by_range.values())) for name, by_range in losses.items()]
    print_table(("masked tokens at", *(f"{a}-{b}" for a, b in spans)), rows, "mean loss on held-out texts")


if __name__ == "__main__":
    typer.run(main)
