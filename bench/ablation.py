"""What the sinks do: the paper's tables on small models (arXiv 2309.17453, tables 1, 2, 3, 6 and figures 2, 7).

    python bench/ablation.py --model demo --output-dir bench/results/ablation
    python bench/ablation.py --model vanilla --model zero --model token --model logits    # of bench/train_model.py

ablation.csv holds a row a setting: the mean loss over the second half of held-out texts, which is many windows on, with
the least and most of the texts. Studies:

    sinks     0, 1, 2, 4, 8 sinks in a cache of the trained length, or of --capacity
    cache     4 sinks in caches of several sizes
    newline   the text's first 4 tokens replaced by line ends, with 0 and 4 sinks

attention.csv says by layer how much attention the first token gets, and how much goes to a sink logit, which is
nowhere (mean over queries in the second half of the trained length); attention.png shows where it goes in texts of 32
tokens. The maps are made for Llamas, by plain PyTorch.
"""

from pathlib import Path
from typing import Annotated

import torch
import typer
from common import RESULTS, Device, Output, TextFile, print_table, record, track, write_csv, write_json
from experiments import Reader, losses, open_model, plain_forward, side_by_side, text_blocks, token_ids
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from torch import Tensor
from transformers import LlamaForCausalLM

SINKS = (0, 1, 2, 4, 8)
COLUMNS = ("model", "study", "sink_size", "window_size", "loss", "least", "most")
MAP = 32  # tokens of the texts in the attention maps


def settings(capacity: int, sizes: list[int]) -> list[tuple[str, int, int]]:
    """(study, sink_size, window_size)."""
    found = [("sinks", sinks, capacity - sinks) for sinks in SINKS]
    found += [("cache", 4, size - 4) for size in sizes]
    return found + [("newline", 0, capacity), ("newline", 4, capacity - 4)]


def without_start(tokenizer, ids: Tensor) -> Tensor:
    """ids (texts, T) with line ends in place of the first 4 tokens."""
    newline = tokenizer("\n", add_special_tokens=False).input_ids[-1]
    return torch.cat((torch.full_like(ids[:, :4], newline), ids[:, 4:]), dim=1)


def pieces_of(ids: Tensor, length: int, count: int, front: int) -> Tensor:
    """About `count` pieces of `length` tokens from each text (texts, T), all with the first text's `front` tokens."""
    starts = range(0, ids.shape[1] - length, max((ids.shape[1] - length) // count, 1))
    pieces = torch.cat([ids[:, start : start + length] for start in starts])
    pieces[:, :front] = ids[:1, :front]
    return pieces


def second_half(model, ids: Tensor, sink_size: int, window_size: int) -> Tensor:
    """Mean loss over the second half of every text. ids: (texts, T + 1); returns (texts,)."""
    with Reader(model, "sinks", sink_size, window_size, 0) as reader:
        return losses(reader, ids, chunk=2048)[:, ids.shape[1] // 2 :].mean(1)


def attention(model: LlamaForCausalLM, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Where the attention goes: ids (texts, T) -> maps (layers, MAP, MAP), on the first token and nowhere (layers,).

    The maps are means over heads and texts of MAP tokens; the shares are those of the queries in the second half.
    """
    length, layers = ids.shape[1], len(model.model.layers)
    maps, shares = torch.zeros(layers, MAP, MAP), torch.zeros(2, layers)

    def draw(layer: int, start: int, share: Tensor, seen: Tensor) -> None:
        maps[layer] = share.mean((0, 1)).cpu()

    def weigh(layer: int, start: int, share: Tensor, seen: Tensor) -> None:
        late = share[:, :, length // 2 :]
        shares[:, layer] = torch.stack((late[..., 0].mean(), 1 - late.sum(-1).mean())).cpu()

    plain_forward(model, ids[:, :MAP], 0, length, watch=draw)
    plain_forward(model, ids, 0, length, watch=weigh, chunk=length)
    return maps, *shares


def draw_maps(maps: dict[str, Tensor], path: Path) -> None:
    layers = len(next(iter(maps.values())))
    figure = Figure(figsize=(1.5 * layers + 1, 1.6 * len(maps) + 0.6))
    grid = figure.subplots(len(maps), layers, squeeze=False)
    for row, (name, of_layers) in zip(grid, maps.items(), strict=True):
        for layer, (axes, share) in enumerate(zip(row, of_layers, strict=True)):
            image = axes.imshow(share.clamp_min(1e-3).numpy(), norm=LogNorm(1e-3, 1), cmap="magma")
            axes.set(xticks=[], yticks=[])
            if axes in grid[0]:
                axes.set_title(f"layer {layer}", fontsize=9)
        row[0].set_ylabel(name)
    figure.colorbar(image, ax=grid, label="share of attention", fraction=0.02)
    figure.supxlabel(f"keys across, queries down, of texts of {MAP} tokens; mean over heads and texts", fontsize=9)
    figure.savefig(path)


def main(
    model: Annotated[list[str], typer.Option(help="Hub names or local paths, one or several.")] = ("demo",),
    output_dir: Output = RESULTS / "ablation",
    text: TextFile = None,
    tokens: Annotated[int, typer.Option(help="Length of a text.")] = 8192,
    texts: Annotated[int, typer.Option(help="How many, side by side.")] = 8,
    capacity: Annotated[int | None, typer.Option(help="Sinks and window; the trained length by default.")] = None,
    sizes: Annotated[str, typer.Option(help="Capacities of the cache study.")] = "64,128,256,384,512,768,1024,2048",
    device: Device = None,
    dtype: str = "float32",
) -> None:
    """Run every study on every model."""
    rows, maps, shares, about = [], {}, [], {}
    for name in model:
        label = Path(name).name
        network, tokenizer, front = open_model(name, device, dtype)
        about = record(str(network.device))
        size = capacity or network.config.max_position_embeddings
        ids = side_by_side(tokenizer, token_ids(tokenizer, text_blocks(text)), texts, tokens + 1).to(network.device)
        changed = without_start(tokenizer, ids)
        cases = settings(size, [int(x) for x in sizes.split(",")])
        for study, sink_size, window_size in track(cases, label):
            loss = second_half(network, changed if study == "newline" else ids, sink_size, window_size)
            numbers = (f"{x.item():.4f}" for x in (loss.mean(), loss.min(), loss.max()))
            rows.append((label, study, sink_size, window_size, *numbers))
        if isinstance(network, LlamaForCausalLM):
            maps[label], first, nowhere = attention(network, pieces_of(ids[:, :-1], min(size, tokens), 8, front)[:64])
            shares += [(label, i, f"{a:.4f}", f"{b:.4f}") for i, (a, b) in enumerate(zip(first, nowhere, strict=True))]
    write_csv(output_dir / "ablation.csv", COLUMNS, rows)
    write_csv(output_dir / "attention.csv", ("model", "layer", "first", "nowhere"), shares)
    if maps:
        draw_maps(maps, output_dir / "attention.png")
    write_json(output_dir / "ablation.json", about | {"models": list(model), "tokens": tokens, "texts": texts})
    for study in dict.fromkeys(row[1] for row in rows):
        found: dict[str, dict] = {}
        for label, name, sink_size, window_size, loss, *_ in rows:
            if name == study:
                found.setdefault(label, {"model": label})[f"{sink_size} + {window_size}"] = loss
        columns = dict.fromkeys(column for row in found.values() for column in row)
        print_table(columns, found.values(), f"{study}: loss in the second half of {tokens} tokens, {texts} texts")


if __name__ == "__main__":
    typer.run(main)
