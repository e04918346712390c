"""A conversation as the text that a model reads: what every turn adds behind what its cache holds."""

import os
import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple, cast
from uuid import uuid4

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from . import saved
from .stream import Stream


class _Turn(NamedTuple):
    """Where a turn begins: how many messages, characters and ids are before it, and what ended the answer before; and
    how many characters and ids there are before its answer.
    """

    messages: int
    text: int
    ids: int
    end: str
    asked_text: int
    asked_ids: int


class Conversation:
    """What is said turn by turn, as the tokenizer's chat template writes it; without a template every turn is a line.

        conversation, ends = Conversation(tokenizer), ends_of(model, tokenizer)
        stream.append(conversation.ask("Who was Ada Lovelace?"))
        answer = torch.cat(list(stream.generate(eos_token_id=ends)))
        print(conversation.answer(answer.tolist(), ends))

    Every turn renders the whole conversation, with the answers as they were generated; the new ids are those behind
    what the cache holds. Nothing that the template puts behind the end of a turn is lost.

    system: a system prompt, or None.

    Attributes: messages (list of dicts, as chat templates take them), text (str, what the cache holds), ids (list of
    int, the same).
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, system: str | None = None):
        self.tokenizer = tokenizer
        self.messages = [] if system is None else [{"role": "system", "content": system}]
        self.text, self.ids = "", cast(list[int], [])
        self._end = ""  # the token that ended the last answer, as text
        self._turns: list[_Turn] = []

    def ask(self, said: str) -> Tensor:
        """Say something to the model: the ids to append to what the cache holds, (1, tokens) int64 on the CPU.

        said: the user's words. Raises ValueError if the template refuses the conversation, or does not show the answer
        before; the conversation is then as it was.
        """
        messages = [*self.messages, {"role": "user", "content": said}]
        new = self._lines(messages) if self.tokenizer.chat_template is None else self._rendered(messages)
        ids = self._ids(new)
        before = len(self.messages), len(self.text), len(self.ids), self._end
        self.messages, self.text, self.ids = messages, self.text + new, [*self.ids, *ids[0].tolist()]
        self._turns.append(_Turn(*before, len(self.text), len(self.ids)))
        return ids

    def answer(self, ids: Sequence[int], ends: Sequence[int]) -> str:
        """Take down what the model said; returns it without special tokens.

        ids: all that was generated, and is in the cache. ends: the ids that end an answer. If the last id is none of
        them, because the answer was cut, the next turn begins with what the template puts there.
        """
        said = self._decode(ids, skip_special_tokens=True)
        self.messages.append({"role": "assistant", "content": said})
        self.text += self._decode(ids)
        self.ids += ids
        self._end = self._decode(ids[-1:]) if ids and ids[-1] in ends else ""
        return said

    def take_back(self, answer_only: bool = False) -> str:
        """Take the last turn back, or its answer alone, as if it had not been; returns the user's words.

        `follow` lets the Stream do the same. Raises ValueError if there is no turn.
        """
        if not self._turns:
            raise ValueError("there is no turn yet that could be taken back")
        turn = self._turns[-1] if answer_only else self._turns.pop()
        said = self.messages[turn.messages]["content"]
        if answer_only:
            messages, text, ids = turn.messages + 1, turn.asked_text, turn.asked_ids
        else:
            messages, text, ids = turn[:3]
        self.messages, self.text, self.ids = self.messages[:messages], self.text[:text], self.ids[:ids]
        self._end = turn.end
        return said

    def as_json(self) -> dict[str, Any]:
        """All of it but the tokenizer, for JSON."""
        return dict(messages=self.messages, text=self.text, ids=self.ids, end=self._end, turns=self._turns)

    @classmethod
    def from_json(cls, tokenizer: PreTrainedTokenizerBase, found: Any) -> "Conversation":
        """What `as_json` gave. Raises ValueError for anything else."""
        made = cls(tokenizer)
        try:
            made.messages, made.text, made.ids, made._end = (found[x] for x in ("messages", "text", "ids", "end"))
            made._turns = [_Turn(*turn) for turn in found["turns"]]
            words = [made.text, made._end, *(turn.end for turn in made._turns)]
            words += [message[key] for message in made.messages for key in ("role", "content")]
            marks: list[tuple] = [(0, 0, 0)]
            for turn in made._turns:
                marks += [turn[:3], (turn.messages + 1, turn.asked_text, turn.asked_ids)]
            marks.append((len(made.messages), len(made.text), len(made.ids)))
            is_right = all(isinstance(x, str) for x in words) and all(type(x) is int for x in made.ids)
            is_right = is_right and all(x <= y for mark in pairwise(marks) for x, y in zip(*mark, strict=True))
        except (TypeError, KeyError) as error:
            raise ValueError(f"this is no conversation: {error!r}") from error
        if not is_right:
            raise ValueError("this is no conversation: its turns are not where they should be")
        return made

    def _decode(self, ids: Sequence[int], **options: bool) -> str:
        text = self.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False, **options)
        return cast(str, text)  # of one text

    def _rendered(self, messages: list[dict]) -> str:
        whole = self._render(messages)
        if whole.startswith(self.text):
            return whole[len(self.text) :]
        # The template writes earlier turns otherwise than they were: it leaves out reasoning, cuts blanks, moves the
        # system prompt. The cache keeps them as they were; what follows an answer is read off another one.
        return behind_end(self.behind_answer(messages[:-2], messages[-1:]), self._end)

    def behind_answer(self, before: list[dict], after: list[dict], add_generation_prompt: bool = True) -> str:
        """What the template writes behind an answer between these messages."""
        mark = str(uuid4().int)
        messages = [*before, {"role": "assistant", "content": mark}, *after]
        _, found, text = self._render(messages, add_generation_prompt).rpartition(mark)
        if not found:
            raise ValueError("the chat template does not show an answer before the last turn: it serves one turn only")
        return text

    def _render(self, messages: list[dict], add_generation_prompt: bool = True) -> str:
        from jinja2 import TemplateError

        try:
            text = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except TemplateError as error:
            raise ValueError(f"the chat template refuses this conversation: {error}") from error
        return cast(str, text)  # not tokenized

    def _lines(self, messages: list[dict]) -> str:
        new = messages[-1:] if self.text else messages
        begin = "" if not self.text or self._end or self.text.endswith("\n") else "\n"
        return begin + "".join(f"{message['content']}\n" for message in new)

    def _ids(self, new: str) -> Tensor:
        if not self.text:
            special = self.tokenizer.chat_template is None  # a template writes them itself
            return self.tokenizer(new, return_tensors="pt", add_special_tokens=special).input_ids
        # behind a token that ends a turn, as in the whole text: some tokenizers put a blank before a text's first word
        for before in (self._end or self.tokenizer.eos_token or "", ""):
            front, ids = (self.tokenizer(x, add_special_tokens=False).input_ids for x in (before, before + new))
            if ids[: len(front)] == front:
                break
        return torch.tensor([ids[len(front) :]])


def follow(stream: Stream, conversation: Conversation) -> bool:
    """Let a Stream of one text hold what is left of its conversation, after `Conversation.take_back`.

    Tokens are taken back where the cache still can (`Stream.rewind`). Else the text is read anew, from its first token
    on, which gives the same and takes as long as reading it takes. Returns whether it was.
    """
    if not conversation.ids:
        stream.reset()
        return False
    try:
        stream.rewind(int(cast(Tensor, stream.lengths)[0]) - len(conversation.ids))
    except ValueError:
        stream.reset()
        stream.append(conversation.ids)
        return True
    return False


def save(path: str | os.PathLike, stream: Stream, conversation: Conversation) -> None:
    """`Stream.save`, with the conversation that the Stream holds: `load` goes on with both."""
    texts = stream.texts()
    texts.about["conversation"] = conversation.as_json()
    saved.write(path, texts)


def load(
    path: str | os.PathLike, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> tuple[Stream, Conversation]:
    """A Stream and its conversation from a file that `save` has written. Raises what `Stream.load` raises."""
    stream, texts = Stream(model), saved.read(path, "stream", model)
    if "conversation" not in texts.about:
        raise ValueError(f"{path} holds no conversation, only texts: Stream.load goes on with them")
    conversation = Conversation.from_json(tokenizer, texts.about["conversation"])
    if texts.tensors["lengths"].tolist() != [len(conversation.ids)]:
        raise ValueError(f"{path} holds another text than its conversation")
    stream.become(texts)
    return stream, conversation


def behind_end(text: str, end: str) -> str:
    """What stands behind `end` in a text that begins with it, blanks not counted; the whole text if it does not."""
    found = re.match(rf"\s*{re.escape(end)}", text) if end else None
    return text[found.end() :] if found else text


def ends_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that end an answer: those of the model's generation_config, and the tokenizer's end-of-text token."""
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    return [end for end in dict.fromkeys((*ends, tokenizer.eos_token_id)) if end is not None]
