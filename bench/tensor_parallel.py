"""Tensor parallelism beside one GPU:

    torchrun --standalone --nproc-per-node 2 bench/tensor_parallel.py --output-dir bench/results/h200

A model of Llama-3-8B's shape with random weights (`--layers` of its 32), patched with 4 sinks and a window of C - 4:
first on one GPU by the first process, then over all processes with ``tp_plan="auto"``. The logits of a text of twice
the window's length, in one piece and then token by token, are compared in float32 and in bfloat16; the decode step is
timed in bfloat16 over a full cache, launched by Python ("eager") and as `patch` leaves it, as a CUDA graph with its
all-reduces inside ("captured"). Times are medians over steps.

Writes tensor_parallel.csv (gpus, batch, capacity, mode, ms a step) and tensor_parallel.json (errors, device, versions).
"""

import gc
import os
import shutil
import tempfile
from pathlib import Path
from typing import Annotated

import torch
import torch.distributed as dist
import transformers
import typer
from common import SINKS, Output, device_name, free, median, now, print_table, write_csv, write_json

import sinkattn

TEXT = 32  # tokens that are fed one by one when logits are compared
COLUMNS = ("gpus", "batch", "capacity", "mode", "ms")


def config_of(size: str, layers: int) -> transformers.LlamaConfig:
    """Llama-3-8B's shape, or one small enough to try this file out on CPUs."""
    wide = dict(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0}, max_position_embeddings=8192,
    )  # fmt: skip
    small = dict(
        vocab_size=96, hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=64,
    )  # fmt: skip
    return transformers.LlamaConfig(**(wide if size == "8b" else small), num_hidden_layers=layers, eos_token_id=None)


@torch.no_grad()
def logits_of(model, capacity: int, device) -> torch.Tensor:
    """Logits of a text twice as long as the cache, all but its end at once: (1, TEXT + 1, vocabulary) float32."""
    torch.manual_seed(1)
    ids = torch.randint(3, 90, (1, 2 * capacity), device=device)
    cache = sinkattn.SinkCache(model)
    pieces = [model(ids[:, :-TEXT], past_key_values=cache, logits_to_keep=1).logits]
    pieces += [model(token, past_key_values=cache).logits for token in ids[:, -TEXT:].split(1, dim=1)]
    return torch.cat(pieces, dim=1).float().cpu()


@torch.no_grad()
def step_ms(model, batch: int, capacity: int, device, steps: int = 30) -> float:
    """Milliseconds of one decode step of `batch` rows over a full cache: the median of `steps`."""
    cache, token = sinkattn.SinkCache(model), torch.full((batch, 1), 5, device=device)
    for row in torch.full((batch, capacity), 7, device=device).split(256, dim=1):
        model(row, past_key_values=cache, logits_to_keep=1)
    times = []
    for _ in range(steps + 5):
        start = now(device)
        model(token, past_key_values=cache)
        times.append((now(device) - start) * 1e3)
    return median(times[5:])


def measure(load, capacity: int, batches: list[int], device) -> tuple[dict, list]:
    """Logits by dtype, and rows (batch, capacity, mode, ms), of a model that `load(dtype)` returns."""
    logits, rows = {}, []
    for dtype in (torch.float32, torch.bfloat16):
        model = load(dtype).eval()
        with sinkattn.patch(model, SINKS, capacity - SINKS):
            logits[dtype] = logits_of(model, capacity, device)
        for mode in ("eager", "captured") if dtype == torch.bfloat16 and device.type == "cuda" else ():
            with sinkattn.patch(model, SINKS, capacity - SINKS, cuda_graph=mode == "captured") as handle:
                rows += [(batch, capacity, mode, step_ms(model, batch, capacity, device)) for batch in batches]
                if mode == "captured" and handle.why_eager:
                    raise SystemExit(f"the step is not captured: {handle.why_eager}")
        del model
        free(device)
    return logits, rows


def main(
    output_dir: Output,
    size: Annotated[str, typer.Option(help="8b, or tiny to try this file out")] = "8b",
    layers: Annotated[int, typer.Option(help="of the 32")] = 32,
    capacity: Annotated[int, typer.Option(help="C, tokens")] = 1024,
    batches: Annotated[list[int] | None, typer.Option("--batch", help="rows of a step; default 1 and 32")] = None,
) -> None:
    """Compare logits over all processes with those of one device, and time steps of both."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = torch.device(f"cuda:{rank}" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = False
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    folder = [tempfile.mkdtemp()] if rank == 0 else [None]
    dist.broadcast_object_list(folder, 0)
    from_pretrained = transformers.AutoModelForCausalLM.from_pretrained
    batches = batches or [1, 32]
    try:
        if rank == 0:
            torch.manual_seed(0)
            with device:
                model = transformers.LlamaForCausalLM(config_of(size, layers))
            model.to(torch.bfloat16).save_pretrained(folder[0])
            del model
            gc.collect()
            alone = measure(lambda dtype: from_pretrained(folder[0], dtype=dtype).to(device), capacity, batches, device)
        dist.barrier()
        split = measure(
            lambda dtype: from_pretrained(folder[0], dtype=dtype, tp_plan="auto"), capacity, batches, device
        )
        if rank == 0:
            report(output_dir, world, alone, split, device, f"{size}, {layers} layers")
        dist.barrier()
        dist.destroy_process_group()
    finally:
        if rank == 0:
            shutil.rmtree(folder[0])


def report(output_dir: Path, world: int, alone: tuple, split: tuple, device, model: str) -> None:
    exact = alone[0][torch.float32].double()
    error = lambda x: ((x.double() - exact).square().mean().sqrt() / exact.std()).item()  # noqa: E731
    about = dict(
        model=f"Llama-3-8B's shape ({model}), random weights",
        device=device_name(device),
        gpus=world,
        torch=torch.__version__,
        transformers=transformers.__version__,
        error_of="root mean square of logits against one device in float32, relative to their spread",
        float32_split=error(split[0][torch.float32]),
        bfloat16_alone=error(alone[0][torch.bfloat16]),
        bfloat16_split=error(split[0][torch.bfloat16]),
    )
    write_json(output_dir / "tensor_parallel.json", about)
    rows = [(gpus, *row, f"{ms:.3f}") for gpus, (_, some) in ((1, alone), (world, split)) for *row, ms in some]
    write_csv(output_dir / "tensor_parallel.csv", COLUMNS, rows)
    print_table(("", ""), about.items())
    print_table(COLUMNS, rows)
    if about["float32_split"] > 1e-4:
        raise SystemExit("float32 logits over several devices are not those of one")


if __name__ == "__main__":
    typer.run(main)
