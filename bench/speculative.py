"""Proposed tokens: python bench/speculative.py --output-dir bench/results/h200

Two questions, each with a table of its own.

real: SmolLM2-135M-Instruct (tests/real.py) as its own draft, with a smaller window over the same weights, and by
lookup in its own text; greedy, over English prose, past the wrap of both windows. Is the text that of the model alone,
by Stream and by generate, and how many proposals are right? In float32, where two orders of rounding seldom choose
different tokens.

shapes (a GPU): what a right proposal is worth. A model and a draft of real shapes with random weights in bfloat16, so
that no proposal is right by itself: each is taken with a stated chance, whatever the model says. Everything runs that
would run, the draft's steps too. Beside it the same Stream without proposals.

Writes speculative_real.csv, speculative_shapes.csv (ms_per_token: over the tokens that the median row was given),
speculative.json.
"""

import contextlib
import sys
from pathlib import Path
from typing import Annotated

import generate
import torch
import typer
from common import (
    RESULTS,
    SINKS,
    Output,
    console,
    default_device,
    free,
    median,
    now,
    print_table,
    record,
    track,
    write_csv,
    write_json,
)

import sinkattn
from sinkattn import speculate, stream

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import real  # noqa: E402

REAL = ("how", "proposals", "tokens", "same_text", "rounds", "taken", "ms_per_token", "alone_ms")
SHAPES = ("model", "draft", "batch", "proposals", "chance", "ms_per_token", "alone_ms", "times")
DEVICE = torch.device(default_device())


class Stated(speculate.Rounds):
    """Rounds in which each proposal is taken with a stated chance, whatever the model says."""

    chance = 0.8

    def next(self):
        self.draws.uniform_(generator=self.generator)
        return super().next()

    def _agrees(self, said):
        return self.draws < self.chance


def seconds(steps, most: int | None = None) -> tuple[list[torch.Tensor], float]:
    """All steps, or the first so many, and the seconds they took."""
    begin, found = now(DEVICE), []
    for ids in steps:
        found.append(ids)
        if len(found) == most:
            break
    return found, now(DEVICE) - begin


def rows_of(steps: list[torch.Tensor]) -> list[list[int]]:
    return [row[row >= 0].tolist() for row in torch.cat([x.view(len(x), -1) for x in steps], dim=1)]


def real_text(tokens: int, window: int, draft_window: int) -> list[dict]:
    """SmolLM2 by Stream and by generate, alone and with proposals."""
    model = real.real_model(torch.float32).to(DEVICE)
    draft = real.over_the_same_weights(model)
    ids, rows = real.prose(300).to(DEVICE), []
    with sinkattn.patch(model, SINKS, window), sinkattn.patch(draft, SINKS, draft_window):

        def text_of(**how) -> tuple[list[torch.Tensor], float]:
            """All steps, and milliseconds a token of those that were timed."""
            text = sinkattn.Stream(model)
            text.append(ids)
            steps = text.generate(tokens, repetition_penalty=1.1, eos_token_id=[], **how)
            begun, _ = seconds(steps, min(8, tokens // 2))  # compiled and captured
            rest, took = seconds(steps)
            return begun + rest, 1e3 * took / sum(int((x >= 0).sum()) for x in rest)

        alone, alone_ms = text_of()
        expected = rows_of(alone)
        ways = [("draft", n, dict(draft=draft, num_assistant_tokens=n)) for n in (2, 4, 8)]
        ways += [("lookup", 4, dict(prompt_lookup_num_tokens=4))]
        for name, n, how in track(ways, "real"):
            steps, ms = text_of(**how)
            given = sum(int((x >= 0).sum()) for x in steps)
            rows.append(
                dict(
                    how=f"Stream, {name}", proposals=n, tokens=given, same_text=rows_of(steps) == expected,
                    rounds=len(steps), taken=round((given - len(steps)) / (n * (len(steps) - 1)), 3),
                    ms_per_token=round(ms, 2), alone_ms=round(alone_ms, 2),
                )
            )  # fmt: skip
        asked = dict(do_sample=False, repetition_penalty=1.1, eos_token_id=None, attention_mask=torch.ones_like(ids))

        def timed(**how) -> tuple[torch.Tensor, float]:
            model.generate(ids, max_new_tokens=8, **asked, **how)  # compiled and captured
            begin = now(DEVICE)
            found = model.generate(ids, max_new_tokens=tokens, **asked, **how)
            return found, 1e3 * (now(DEVICE) - begin) / tokens

        expected, alone_ms = timed()
        draft.generation_config.num_assistant_tokens = 4
        for name, how in (("draft", dict(assistant_model=draft)), ("lookup", dict(prompt_lookup_num_tokens=4))):
            found, ms = timed(**how)
            rows.append(
                dict(
                    how=f"generate, {name}", proposals=4, tokens=tokens, same_text=torch.equal(found, expected),
                    ms_per_token=round(ms, 2), alone_ms=round(alone_ms, 2),
                )
            )  # fmt: skip
    return rows


def of_shape(name: str, draft_name: str, batch: int, counts, chances, tokens: int) -> list[dict]:
    """One model of a real shape, with and without proposals. draft_name: "" for lookups."""
    model, draft = generate.make(name), generate.make(draft_name) if draft_name else None
    if draft is not None and draft.config.vocab_size != model.config.vocab_size:
        draft.resize_token_embeddings(model.config.vocab_size)
    with contextlib.ExitStack() as patches:
        patches.enter_context(sinkattn.patch(model, SINKS, 1020))
        if draft is not None:
            patches.enter_context(sinkattn.patch(draft, SINKS, 252))
        rows = of_patched(model, draft, batch, counts, chances, tokens)
    return [dict(model=name, draft=draft_name or "lookup", batch=batch, **row) for row in rows]


def of_patched(model, draft, batch: int, counts, chances, tokens: int) -> list[dict]:
    ids, rows = torch.randint(3, 100, (batch, 1024), device=DEVICE), []

    def timed(most: int, **how) -> tuple[list[torch.Tensor], float]:
        text = sinkattn.Stream(model)
        text.append(ids)
        steps = text.generate(None, do_sample=False, eos_token_id=[], **how)
        seconds(steps, 8)  # captured
        return seconds(steps, most)

    alone = 1e3 * timed(tokens)[1] / tokens
    for count in counts:
        how = dict(prompt_lookup_num_tokens=count)
        if draft is not None:
            how = dict(draft=draft, num_assistant_tokens=count)
        for Stated.chance in chances:
            steps, took = timed(max(tokens * 2 // (count + 2), 8), **how)
            given = median(int((x >= 0).sum()) for x in torch.cat(steps, dim=1))  # of a row
            ms = 1e3 * took / given
            rows.append(
                dict(
                    proposals=count, chance=Stated.chance, ms_per_token=round(ms, 3), alone_ms=round(alone, 3),
                    times=round(alone / ms, 2),
                )
            )  # fmt: skip
    return rows


def main(
    output_dir: Output = RESULTS,
    parts: Annotated[str, typer.Option(help="real, shapes, by commas.")] = "real,shapes",
    tokens: Annotated[int, typer.Option(help="Tokens of the real text.")] = 2000,
    window: Annotated[int, typer.Option(help="W of the real model, tokens.")] = 508,
    draft_window: Annotated[int, typer.Option(help="W of its draft, tokens.")] = 124,
    models: Annotated[str, typer.Option(help="Shapes of bench/generate.py, by commas.")] = "llama-3-8b",
    drafts: Annotated[str, typer.Option(help="Their drafts, by commas; 'lookup' for none.")] = "smollm2-135m,lookup",
    batches: Annotated[str, typer.Option(help="Rows, by commas.")] = "1,8",
    steps: Annotated[int, typer.Option(help="Tokens of a row that are timed.")] = 200,
) -> None:
    """Run the parts; print the tables, write CSV."""
    if "real" in parts:
        rows = real_text(tokens, window, draft_window)
        print_table(REAL, rows, "SmolLM2-135M-Instruct, float32")
        write_csv(output_dir / "speculative_real.csv", REAL, rows)
    if "shapes" in parts and DEVICE.type == "cuda":
        stream.Rounds, rows = Stated, []
        for model in models.split(","):
            for draft in drafts.split(","):
                for batch in map(int, batches.split(",")):
                    name = "" if draft == "lookup" else draft
                    rows += of_shape(model, name, batch, (2, 4, 7), (0.6, 0.8), steps)
                    free(DEVICE)
                    console.print(rows[-1])
        print_table(SHAPES, rows, "Random weights, bfloat16")
        write_csv(output_dir / "speculative_shapes.csv", SHAPES, rows)
    write_json(output_dir / "speculative.json", record(DEVICE) | dict(window=window, draft_window=draft_window))


if __name__ == "__main__":
    typer.run(main)
