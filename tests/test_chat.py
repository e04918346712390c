"""Conversations: what every turn puts behind what the cache holds, by chat templates of all kinds; 50 real turns."""

import json
import random
import re
from pydoc_data import topics

import pytest
import tokenizers
import transformers
from typer.testing import CliRunner

import real
from sinkattn import Stream, cli, models, patch
from sinkattn.chat import Conversation, load, save

END = "<end>"
FOR = "{% for m in messages %}"
THEN = "{% endfor %}{% if add_generation_prompt %}"


def tokenizer_for(template: str | None) -> transformers.PreTrainedTokenizerBase:
    tokenizer = transformers.AutoTokenizer.from_pretrained(models.MODEL, split_special_tokens=False)
    tokenizer.add_special_tokens({"eos_token": END})
    tokenizer.chat_template = template
    return tokenizer


def held(tokenizer, turns: list[tuple[str, str]], system: str | None = None) -> str:
    """The text of all ids that a cache gets: what the turns add, and the answers, each ended if it says END."""
    conversation, ids = Conversation(tokenizer, system), []
    for said, answer in turns:
        ids += conversation.ask(said)[0].tolist()
        answered = tokenizer(answer, add_special_tokens=False).input_ids
        ids += answered
        assert conversation.answer(answered, [tokenizer.eos_token_id]) == answer.removesuffix(END)
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False).removeprefix("<s>") == conversation.text
    return conversation.text


def some_words() -> str:
    letters = "abcdefghijklmnopqrstuvwxyz 0123456789.,(){}[]<>\"'é\n"
    return "x" + "".join(random.choices(letters, k=random.randint(0, 12))) + "x"


CHATML = FOR + "<|{{ m.role }}|>\n{{ m.content }}<end>\n" + THEN + "<|assistant|>\n{% endif %}"


@pytest.mark.parametrize("system", [None, "Be brief."])
def test_the_cache_holds_what_the_template_says(system):
    """Behind an end of turn a newline, and what a template of one line a message would write, message by message."""
    turns = [(some_words(), some_words() + END) for _ in range(6)]
    expected = "" if system is None else f"<|system|>\n{system}<end>\n"
    expected += "\n".join(f"<|user|>\n{said}<end>\n<|assistant|>\n{answer}" for said, answer in turns)
    assert held(tokenizer_for(CHATML), turns, system) == expected


def test_a_cut_answer_is_closed():
    assert held(tokenizer_for(CHATML), [("a", "It is"), ("b", "Yes" + END)]) == (
        "<|user|>\na<end>\n<|assistant|>\nIt is<end>\n<|user|>\nb<end>\n<|assistant|>\nYes<end>"
    )


@pytest.mark.parametrize(
    ("template", "answers", "expected"),
    [
        pytest.param(  # as templates of reasoning models do
            FOR + "<{{ m.role }}>{{ m.content.split('~')[-1] }}<end>\n" + THEN + "<assistant>{% endif %}",
            ("think~Yes<end>", "hm~No<end>"),
            "<user>one<end>\n<assistant>think~Yes<end>\n<user>two<end>\n<assistant>hm~No<end>\n<user>three<end>\n<assistant>",
            id="reasoning is left out",
        ),
        pytest.param(
            FOR
            + "{% if m.role == 'assistant' and loop.last and not add_generation_prompt %}(A: think. {{ m.content }})"
            "{% else %}({{ m.role }}: {{ m.content }}){% endif %}" + THEN + "(assistant: {% endif %}",
            ("Yes", "No"),
            "(user: one)(assistant: Yes)(user: two)(assistant: No)(user: three)(assistant: ",
            id="the last answer differs",
        ),
        pytest.param(
            FOR + "[{{ m.role }}] {{ m.content | trim }} <end>|" + THEN + "[assistant]{% endif %}",
            (" Yes \n<end>", "No<end>"),
            "[user] one <end>|[assistant] Yes \n<end>|[user] two <end>|[assistant]No<end>|[user] three <end>|"
            "[assistant]",
            id="blanks are cut and put in",
        ),
        pytest.param(
            "{% set system = messages[0].content %}{% for m in messages[1:] %}{% if m.role == 'user' %}[INST] "
            "{% if loop.last %}{{ system }} {% endif %}{{ m.content }} [/INST]{% else %} {{ m.content }}<end>"
            "{% endif %}{% endfor %}",
            (" Yes<end>", " No<end>"),
            "[INST] Be brief. one [/INST] Yes<end>[INST] Be brief. two [/INST] No<end>[INST] Be brief. three [/INST]",
            id="the system prompt moves",
        ),
        pytest.param(
            FOR
            + "{% if m.role == 'assistant' %}> {% endif %}{{ m.content }}"
            + "{% if not m.content.endswith('.') %}.{% endif %}{{ '\n' }}"
            + THEN
            + "> {% endif %}",
            ("Yes.", "No"),
            "one.\n> Yes.\ntwo.\n> No.\nthree.\n> ",
            id="what follows depends on the answer",
        ),
    ],
)
def test_templates_that_write_earlier_turns_otherwise(template, answers, expected):
    """The cache keeps what it holds, and gets all of what follows the last answer."""
    tokenizer, system = tokenizer_for(template), "Be brief." if "system" in template else None
    conversation = Conversation(tokenizer, system)
    for said, answer in zip(("one", "two"), answers, strict=True):
        conversation.ask(said)
        conversation.answer(tokenizer(answer, add_special_tokens=False).input_ids, [tokenizer.eos_token_id])
    conversation.ask("three")
    assert conversation.text == expected


STRICT = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}<{{ m.role }}>{{ m.content }}<end>" + THEN
) + "<assistant>{% endif %}"


def test_templates_that_refuse():
    """The error says what the template says, and the conversation can go on."""
    turns = [("one", "Yes<end>"), ("two", "No<end>")]
    assert held(tokenizer_for(STRICT), turns) == ("<user>one<end><assistant>Yes<end><user>two<end><assistant>No<end>")
    with pytest.raises(ValueError, match="roles must alternate"):
        Conversation(tokenizer_for(STRICT), "Be brief.").ask("one")
    conversation = Conversation(tokenizer_for("{{ messages[-1].content }}: "))
    conversation.ask("one")
    conversation.answer([5, 6], [])
    before = conversation.text
    with pytest.raises(ValueError, match="one turn only"):
        conversation.ask("two")
    assert conversation.text == before and len(conversation.messages) == 2


def test_lines_where_there_is_no_template():
    tokenizer = tokenizer_for(None)
    assert held(tokenizer, [("one", "Yes"), ("two", "No\n"), ("three", "x<end>"), ("four", "y")], "Hello.") == (
        "Hello.\none\nYes\ntwo\nNo\nthree\nx<end>four\ny"
    )


@pytest.mark.parametrize("scheme", ["first", "always", "never"])
@pytest.mark.parametrize("space", ["", " "])
def test_ids_are_those_of_the_whole_text(scheme, space):
    """Tokenizers that put a blank in front of a text's first word put none in front of a later turn."""
    own = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="?"))
    own.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme=scheme)
    own.decoder = tokenizers.decoders.Metaspace(prepend_scheme=scheme)
    trainer = tokenizers.trainers.BpeTrainer(special_tokens=["?", "</s>"], vocab_size=200, show_progress=False)
    own.train_from_iterator(["one two three user assistant yes no : . >"], trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=own, eos_token="</s>", unk_token="?")
    tokenizer.chat_template = (
        FOR + "{% if m.role == 'user' %}" + space + "user: {{ m.content }} >{% else %} {{ m.content }}</s>{% endif %}"
        "{% endfor %}"
    )
    ids_of = lambda text: tokenizer(text, add_special_tokens=False).input_ids  # noqa: E731
    conversation, ids = Conversation(tokenizer), []
    for said in ("one", "two", "three"):
        ids += conversation.ask(said)[0].tolist()
        answer = ids_of("> yes</s>")[len(ids_of(">")) :]
        conversation.answer(answer, [tokenizer.eos_token_id])
        ids += answer
    whole = f"{space}user: one > yes</s>{space}user: two > yes</s>{space}user: three > yes</s>"
    assert ids == ids_of(whole)


# -------------------------------------------------------------------------------------------- turns that are taken back


@pytest.mark.parametrize("template", [CHATML, STRICT, None])
def test_a_turn_taken_back_has_not_been(template):
    """What a later turn adds is what it adds where the turn, or its answer, was never there; so it is in JSON."""
    tokenizer = tokenizer_for(template)
    ends, ids_of = [tokenizer.eos_token_id], lambda text: tokenizer(text, add_special_tokens=False).input_ids
    one, other = Conversation(tokenizer), Conversation(tokenizer)
    with pytest.raises(ValueError, match="no turn yet"):
        one.take_back()
    for said, answer in (("a", "It is"), ("b", "Yes<end>"), ("c", "")):
        for _ in range(2):
            one.ask("x")
            one.answer(ids_of("no<end>"), ends)
        assert one.take_back() == one.take_back() == "x"
        asked, again = one.ask(said), other.ask(said)
        assert asked.tolist() == again.tolist()
        one.answer(ids_of("wrong<end>"), ends)
        assert one.take_back(answer_only=True) == said
        for x in (one, other):
            x.answer(ids_of(answer), ends)
        assert one.as_json() == other.as_json()
        assert tokenizer.decode(one.ids, clean_up_tokenization_spaces=False).removeprefix("<s>") == one.text
        one = Conversation.from_json(tokenizer, json.loads(json.dumps(one.as_json())))


def chat(*lines: str, window: int = 400, options: tuple = ()) -> list[str]:
    """What is printed behind each line, of a chat with the model that ships."""
    result = CliRunner().invoke(
        cli.app,
        ["chat", "demo", "--max-new-tokens", "9", "--window-size", str(window), *options],
        input="\n".join((*lines, "", "")),
    )
    assert result.exit_code == 0, result.output
    said = result.output.split("you: ")
    assert len(said) == len(lines) + 2 and not said[0]
    return [x.strip("\n") for x in said[1:-1]]


@pytest.mark.parametrize("window", [400, 12])
def test_undo_and_retry(window):
    """Greedy answers are as if the turn had not been: where tokens are taken back, and where the text is read anew."""
    plain = chat("def f(x):", "import os", "class A:", window=window)
    found = chat("def f(x):", "x = [1, 2]", "/undo", "import os", "/retry", "class A:", window=window)
    assert [found[i] for i in (0, 3, 5)] == plain
    assert ("read anew" in found[2]) == (window == 12) and "read anew" not in found[4]  # of up to slack tokens
    assert "taken back: x = [1, 2]" in found[2] and found[4].endswith(plain[1])
    first = chat("x = [1, 2]", "/undo", "/undo", "def f(x):", "/reset", "/retry", "def f(x):", window=window)
    assert first[3] == plain[0] == first[6] and "no turn yet" in first[2] and "no turn yet" in first[5]


def test_retry_samples_anew():
    options = ("--temperature", "3", "--seed", "5")
    found = chat("def f(x):", "/retry", "/retry", options=options)
    assert len(set(found)) == 3 and chat("def f(x):", "/retry", "/retry", options=options) == found


@pytest.mark.parametrize("window", [400, 12])
def test_a_saved_conversation_goes_on(window, tmp_path):
    """In another chat as in the first one, sampled too; what was said there can be taken back here."""
    path, options = str(tmp_path / "a talk"), ("--temperature", "2")
    first = chat("def f(x):", "import os", f"/save {path}", "class A:", "x = 1", window=window, options=options)
    later = chat("y = 2", f"/load {path}", "class A:", "x = 1", window=window, options=options)
    assert later[2:] == first[3:]
    assert "".join(f"saved in {path}".split()) in "".join(first[2].split())  # wherever lines are broken
    assert "4 messages" in later[1]
    greedy = chat(f"/load {path}", "/undo", "/undo", "def f(x):", window=window)
    assert greedy[3] == chat("def f(x):", window=window)[0]


def test_commands_that_fail_end_nothing(tmp_path):
    (tmp_path / "damaged").write_bytes(b"?")
    lines = ("/save", "/nonesuch", "/reset all", f"/load {tmp_path / 'damaged'}", f"/load {tmp_path / 'nowhere'}",
             f"/save {tmp_path / 'x'}", f"/load {tmp_path}", "/usr/bin/env", "/help")  # fmt: skip
    found = chat(*lines)
    for text, part in zip(
        found[:7],
        (
            "say /save PATH",
            "/nonesuch is no command",
            "say /reset",
            "damaged holds no",
            "No such file",
            "is empty",
            "director",
        ),
        strict=True,
    ):
        assert text.startswith("error: ") and part in text and "\n" not in text
    assert not found[7].startswith("error") and all(f"/{x}" in found[8] for x in ("retry", "undo", "save PATH"))


def test_files_without_the_right_conversation(tmp_path):
    model, tokenizer = models.load("demo", "cpu", "float32")
    with patch(model, 4, 60):
        stream, conversation, path = Stream(model), Conversation(tokenizer), tmp_path / "x"
        stream.append(conversation.ask("def f(x):"))
        stream.save(path)
        with pytest.raises(ValueError, match="no conversation, only texts"):
            load(path, model, tokenizer)
        save(path, stream, conversation)
        assert load(path, model, tokenizer)[1].as_json() == conversation.as_json()
        for change in (
            lambda x: x.pop("ids"), lambda x: x.update(text=5), lambda x: x.update(messages=[{}]), lambda x: x.clear(),
            lambda x: x.update(turns=[[0, 0, 0, "", 10**9, 3]]), lambda x: x.update(turns=[[-1, 0, 0, "", 1, 1]]),
            lambda x: x.update(ids=["1"] * len(conversation.ids)), lambda x: x.update(turns=[3]),
        ):  # fmt: skip
            found = json.loads(json.dumps(conversation.as_json()))
            change(found)
            with pytest.raises(ValueError, match="this is no conversation"):
                Conversation.from_json(tokenizer, found)
        conversation.answer([5], [])
        save(path, stream, conversation)
        with pytest.raises(ValueError, match="another text than its conversation"):
            load(path, model, tokenizer)


# -------------------------------------------------------------------------------------------------------- a real model

PROMPTS = (
    "What is the capital of France?", "Say yes.", "Name a colour.", "Why is the sky blue?", "Tell me about whales.",
    "What did you just say?", "Write a line about rain.", "Who was Ada Lovelace?", "How do bicycles stay upright?",
    "Thank you! What should I cook tonight?",
)  # fmt: skip


@pytest.fixture(scope="module")
def smollm2():
    """SmolLM2-135M-Instruct in float32, and its tokenizer."""
    real.needed()
    return models.load(str(real.folder()), "cpu", "float32")


@pytest.mark.real
def test_50_turns_of_smollm2(smollm2, monkeypatch):
    """At the default sizes, beyond 1024 tokens: what is fed is what the whole conversation adds, and words come out."""
    tokenizer, fed, memory = smollm2[1], [], []
    append, generate = Stream.append, Stream.generate

    def appended(stream, ids):
        fed.append((ids[0].tolist(), []))
        append(stream, ids)
        memory.append([(x.data_ptr(), x.nbytes) for layer in stream.cache.layers for x in (layer.keys, layer.values)])
        assert (stream.cache.plan.sink_size, stream.cache.plan.window_size) == (4, 1020)

    def generated(*arguments, **options):
        for ids in generate(*arguments, **options):
            fed[-1][1].append(ids.item())
            yield ids

    monkeypatch.setattr(models, "load", lambda *_: smollm2)
    monkeypatch.setattr(Stream, "append", appended)
    monkeypatch.setattr(Stream, "generate", generated)
    said = [PROMPTS[turn % len(PROMPTS)] for turn in range(50)]
    result = CliRunner().invoke(cli.app, ["chat", str(real.folder()), "--max-new-tokens", "8"], input="\n".join(said))
    assert result.exit_code == 0, result.output
    text = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    ended, words, total = [], [], 0
    for prompt, (asked, answered) in zip(said, fed, strict=True):
        answer, total = tokenizer.decode(answered), total + len(asked) + len(answered)
        closing = "" if not ended else "\n" if ended[-1] else "<|im_end|>\n"
        text = (text if not ended else closing) + f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
        assert tokenizer.decode(asked) == text
        ended.append(answer.endswith("<|im_end|>"))
        words += re.findall(r"[a-z]+", answer.removesuffix("<|im_end|>").lower())
    assert total > 1100 and 0 < sum(ended) < 50  # beyond the cache; answers that were cut, and that were not
    assert all(at == memory[0] for at in memory)
    known = set(re.findall(r"[a-z]+", " ".join((*topics.topics.values(), *PROMPTS)).lower()))
    assert sum(word in known for word in words) > 0.7 * len(words) and len(words) > 200
