"""A thousand chats over 64 rows: whoever is spoken to sits in a row, all others wait in host memory.

    python examples/many_chats.py --model HuggingFaceH4/zephyr-7b-beta
    python examples/many_chats.py --chats 20 --rows 4 --max-new-tokens 30   # the model that ships

A chat leaves its row by `Stream.take` when its answer ends, and comes back by `Stream.put` with the next question,
into whatever row is free. Nothing is read twice, and the other rows go on meanwhile.
"""

import time
from collections import deque
from collections.abc import Sequence
from typing import Annotated

import torch
import typer

import sinkattn
from sinkattn import models
from sinkattn.chat import Conversation, ends_of

QUESTIONS = ("import os\n", "def first(x):\n", "class Reader:\n")


def serve(stream: sinkattn.Stream, tokenizer, asked: list[Sequence[str]], rows: int, max_new_tokens: int) -> tuple:
    """Ask every chat its questions, one after another; returns the conversations, and their texts in host memory."""
    ends, queue = ends_of(stream.model, tokenizer), deque(range(len(asked)))  # chats that have a question
    chats, away, left = [Conversation(tokenizer) for _ in asked], [None] * len(asked), [deque(x) for x in asked]
    answers, seats = [[] for _ in asked], [None] * rows

    def seat(row: int) -> None:
        seats[row] = chat = queue.popleft() if queue else None
        if chat is not None:
            if away[chat] is not None:
                stream.put(away[chat], [row])
            stream.append(chats[chat].ask(left[chat].popleft()), rows=[row])

    stream.append(torch.zeros(rows, 1, dtype=torch.int64))  # this many rows, which then wait
    stream.reset(range(rows))
    for row in range(rows):
        seat(row)
    for ids in stream.generate(do_sample=False, eos_token_id=ends):
        for row, token in enumerate(ids.tolist()):
            if (chat := seats[row]) is None:
                continue
            answers[chat].append(token)
            if token in ends or len(answers[chat]) == max_new_tokens:
                chats[chat].answer(answers[chat], ends)
                away[chat], answers[chat] = stream.take([row]), []
                queue.extend([chat] * bool(left[chat]))
                seat(row)
    return chats, away


def main(
    model: Annotated[str, typer.Option(help='Folder, GGUF file, hub name, "smollm2" or "demo".')] = "demo",
    chats: int = 1000,
    rows: int = 64,
    turns: int = 3,
    window_size: Annotated[int | None, typer.Option(help="1020, or what the model was trained on.")] = None,
    max_new_tokens: int = 100,
    dtype: str = "auto",
) -> None:
    """Serve them all, and tell how fast and in how much memory."""
    network, tokenizer = models.load(model, dtype=dtype)
    sinkattn.patch(network, *models.sizes(network.config, None, window_size))
    asked = [[QUESTIONS[(chat + turn) % len(QUESTIONS)] for turn in range(turns)] for chat in range(chats)]
    stream, begin = sinkattn.Stream(network), time.perf_counter()
    served, away = serve(stream, tokenizer, asked, rows, max_new_tokens)
    seconds, tokens = time.perf_counter() - begin, sum(len(chat.ids) for chat in served)
    typer.echo(f"{chats:,} chats over {rows} rows: {tokens:,} tokens, {tokens / seconds:,.0f} a second")
    typer.echo(
        f"{stream.cache.nbytes / 2**20:,.1f} MiB of rows, {sum(x.nbytes for x in away) / 2**20:,.1f} MiB of chats"
    )


if __name__ == "__main__":
    typer.run(main)
