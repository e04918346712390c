"""Whether what a model writes is still language: text without end, and chat turns one after another, judged.

Both are tried in three ways, each a pair of S and W:

    dense     a window that holds the whole text, which is the unpatched model; its steps are CUDA graphs then, too
    window    the last C tokens, no sinks
    sinks     S sinks and the last C - S tokens

A piece of text is judged by
    known     share of its words that a list has; 0 where there are none. A word is what stands between blanks and
              dashes, without punctuation.
    variety   different words over words: little where it goes round in circles
    loss      nats a token behind the first HEAD, for the unpatched model that reads the piece alone

and is fluent if known >= KNOWN and variety >= VARIETY. (Pieces of 256 tokens of the novels have 0.89 to 1.00 known
words and a variety of 0.50 to 0.78.) attention_sinks calls an answer failed if it went on to the limit of tokens with
less than 26 different characters; that is noted too.
"""

import re
import statistics
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from sinkattn import SinkCache, patch
from sinkattn.chat import Conversation, ends_of

KNOWN, VARIETY = 0.8, 0.3
HEAD = 16  # tokens of a piece that its loss leaves out: there is nothing before them
TOP_P = 0.95  # tokens are drawn among the likeliest that make up this share
LOST = 3  # so many pieces in a row that are not fluent: fluency is lost
CHARACTERS = 26  # of attention_sinks' rule
STRIPPED = ".,;:!?\"'()[]{}*_`#“”‘’…"


def ways(capacity: int, sink_size: int, whole: int) -> dict[str, tuple[int, int]]:
    """S and W of each way. whole: tokens, at least those of the text."""
    return {"dense": (0, whole), "window": (0, capacity), "sinks": (sink_size, capacity - sink_size)}


@torch.no_grad()
def write(
    model: PreTrainedModel, cache: SinkCache, ids: Tensor, temperature: float, never: tuple[int, ...] = ()
) -> Iterator[Tensor]:
    """Read ids (rows, n) and go on, token by token, without end: (rows,) int64 a step, drawn by torch's own generator.

    A token that was yielded is in the cache once the next one is asked for. never: ids that are not drawn.
    """
    banned = torch.tensor(never, dtype=torch.int64, device=ids.device)
    while True:
        logits = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
        logits = logits.float().index_fill(1, banned, -torch.inf) / temperature
        shares, index = logits.softmax(-1).sort(descending=True)
        shares = shares.masked_fill(shares.cumsum(-1) - shares >= TOP_P, 0)
        drawn = (shares / torch.empty_like(shares).exponential_()).argmax(-1, keepdim=True)  # with these shares
        ids = index.gather(1, drawn)
        yield ids[:, 0]


def endless(
    model: PreTrainedModel, sizes: tuple[int, int], ids: Tensor, tokens: int, temperature: float, never: tuple[int, ...]
) -> Tensor:
    """What a model writes behind ids (rows, n): (rows, tokens) int64."""
    torch.manual_seed(0)
    with patch(model, *sizes):
        steps = write(model, SinkCache(model), ids, temperature, never)
        return torch.stack([next(steps) for _ in range(tokens)], dim=1)


def chat(
    model: PreTrainedModel, tokenizer, sizes: tuple[int, int], questions: list[str], limit: int, temperature: float
) -> Iterator[tuple[int, Tensor, str]]:
    """Ask one question after another through one cache: tokens before the answer, its ids (n,), and it as text.

    limit: tokens of an answer at the most.
    """
    torch.manual_seed(0)
    ends = ends_of(model, tokenizer)
    with patch(model, *sizes):
        conversation, cache, seen = Conversation(tokenizer), SinkCache(model), 0
        for question in questions:
            ids, answer, is_over = conversation.ask(question).to(model.device), [], False
            seen += ids.shape[1]
            steps = write(model, cache, ids, temperature)
            while len(answer) < limit and not is_over:
                answer.append(next(steps))
                is_over = answer[-1].item() in ends
            next(steps)  # reads the last one too
            answer = torch.cat(answer)
            yield seen, answer, conversation.answer(answer.tolist(), ends)
            seen += len(answer)


def words_of(text: str) -> list[str]:
    return [word for part in re.split(r"\s+|--+|[/—–-]", text) if (word := part.strip(STRIPPED).lower())]


def judged(text: str, known: set[str]) -> tuple[float, float]:
    """Known words, and different ones, over all words; 0 if there are none."""
    found = words_of(text)
    if not found:
        return 0.0, 0.0
    share = sum(word in known or word.removesuffix("'s") in known or word.isdigit() for word in found) / len(found)
    return share, len(set(found)) / len(found)


def is_fluent(known: float, variety: float) -> bool:
    return known >= KNOWN and variety >= VARIETY


def lost_at(fluent: list[bool]) -> int | None:
    """The first of LOST pieces in a row that are not fluent, or None."""
    return next((i for i in range(len(fluent) - LOST + 1) if not any(fluent[i : i + LOST])), None)


@torch.no_grad()
def loss_alone(model: PreTrainedModel, pieces: Tensor, batch: int = 64) -> list[float]:
    """Mean loss of each piece behind its first HEAD tokens, with nothing before it. pieces: (n, length) int64."""
    found = []
    for part in pieces.split(batch):
        logits = model(part, use_cache=False).logits[:, HEAD - 1 : -1].float()
        found += cross_entropy(logits.mT, part[:, HEAD:], reduction="none").mean(1).tolist()
    return found


def has_failed(text: str, tokens: int, limit: int) -> bool:
    """attention_sinks' rule: it went on to the limit with less than CHARACTERS different characters."""
    return tokens >= limit and len(set(text)) < CHARACTERS


def summary(fluent: list[list[bool]], length: int) -> dict:
    """Where several texts, each in pieces of `length` tokens, lost their fluency, and how much of them was fluent."""
    where = [lost_at(pieces) for pieces in fluent]
    tokens = [None if at is None else at * length for at in where]
    kept = [len(pieces) * length if at is None else at for at, pieces in zip(tokens, fluent, strict=True)]
    return {
        "lost_at": tokens,
        "median_kept": statistics.median(kept),
        "fluent": sum(map(sum, fluent)) / sum(map(len, fluent)),
    }
