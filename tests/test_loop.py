"""`generate` by the loop of sinkattn beside transformers' own: the same text, the same cache, the same errors."""

import contextlib

import pytest
import torch
import transformers
from transformers.generation import BaseStreamer

from helpers import GPU, left_padded, random_ids
from sinkattn import SinkCache, models, patch
from test_interrupts import anywhere
from tiny import tiny

S, W = 4, 10
C = S + W
N = 3 * C  # tokens of an answer
WAYS = ["run", "replayed", pytest.param("gpu", marks=pytest.mark.gpu)]


@pytest.fixture
def loops(monkeypatch):
    """How often our own loop ran; `theirs()` is a context in which transformers' runs instead."""

    class Loops:
        ran = 0

        @contextlib.contextmanager
        def theirs(self):
            with monkeypatch.context() as patched:
                patched.setattr("sinkattn.generation.serves", lambda *_: False)
                yield

    import sinkattn.generation

    loops, text_of = Loops(), sinkattn.generation.text_of

    def counted(*args):
        loops.ran += 1
        return text_of(*args)

    monkeypatch.setattr(sinkattn.generation, "text_of", counted)
    return loops


@pytest.fixture(params=WAYS)
def device(request):
    """Where to run: steps on a CPU as they are, steps there that take the way of captured ones, and captured ones."""
    if request.param == "replayed":
        request.getfixturevalue("repeated")
    return GPU if request.param == "gpu" else "cpu"


class Heard(BaseStreamer):
    """A streamer that keeps what it is given; `end` is None."""

    def __init__(self):
        self.ids = []

    def put(self, value):
        assert value.device.type == "cpu"
        self.ids.append(value.clone())

    def end(self):
        self.ids.append(None)


class Criterion(transformers.StoppingCriteria):
    """Ends row i behind the token whose sum with all before it is divisible by 5 + i, and keeps what it is given."""

    def __init__(self):
        self.given = []

    def __call__(self, input_ids, scores, **kwargs):
        assert scores is None and input_ids.is_contiguous()
        self.given.append(input_ids.cpu())
        return input_ids.sum(1) % torch.arange(5, 5 + len(input_ids), device=input_ids.device) == 0


class Processor(transformers.LogitsProcessor):
    """Makes tokens that are even likelier where the last one is odd, in place, and keeps what it has made."""

    def __init__(self):
        self.given = []

    def __call__(self, input_ids, scores):
        assert scores.dtype == torch.float32
        scores[:, ::2] += 0.3 * (input_ids[:, -1:] % 2)
        self.given.append(scores)
        return scores


def state(cache):
    """What there is of a text in a cache, besides rings."""
    unfed = cache.unfed.named() | {"columns": cache.unfed.columns} if cache.unfed is not None else {}
    rows = {name: getattr(cache.rows, name).tolist() for name in ("lengths", "digest")}
    rows["ids"] = cache.rows.in_order().tolist()
    unfed = {name: x.tolist() if isinstance(x, torch.Tensor) else x for name, x in unfed.items()}
    return rows | unfed | dict(seen=cache.seen, ended=cache.ended, torn=cache.is_torn, known=cache.all_known)


def told(model, ids, make, **how):
    """What `generate` returns and leaves behind: ids, the cache, what was heard, the next random number, and a second
    turn. make: of nothing, further arguments.
    """
    torch.manual_seed(5)
    cache, streamer, more = SinkCache(model), Heard(), make()
    text = model.generate(ids, past_key_values=cache, streamer=streamer, **how, **more)
    found = [text, state(cache), streamer.ids, torch.rand(1, device=ids.device)]
    found += [x.given for name in ("stopping_criteria", "logits_processor") for x in more.get(name, [])]
    new = torch.cat((text, (text[:, -3:] + 1).clamp(max=96)), dim=1)
    mask = torch.nn.functional.pad(how["attention_mask"], (0, new.shape[1] - ids.shape[1]), value=1)
    mask[:, ids.shape[1] : text.shape[1]] *= text[:, ids.shape[1] :] != 0  # pads of rows that had ended
    order = mask.argsort(dim=1, stable=True)
    again = dict(past_key_values=cache, max_new_tokens=6, do_sample=False)
    found += [model.generate(new.gather(1, order), attention_mask=mask.gather(1, order), **again), state(cache)]
    mask = torch.ones(len(ids), cache.seen + 3, dtype=torch.int64, device=ids.device)  # new ones alone
    return [*found, model.generate(new[:, -3:], attention_mask=mask, **again), state(cache)]


def same(a, b):
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


DRAWN = dict(do_sample=True, top_k=0)
ASKED = {
    "greedy": lambda: dict(do_sample=False),
    "repetition": lambda: dict(do_sample=False, repetition_penalty=1.4),
    "no_repeat_ngram": lambda: dict(do_sample=False, no_repeat_ngram_size=2),
    "bad words": lambda: dict(do_sample=False, bad_words_ids=[[5], [6, 7]]),
    "processor": lambda: dict(do_sample=False, logits_processor=[Processor()]),
    "drawn": lambda: DRAWN,
    "drawn by all": lambda: dict(
        do_sample=True, temperature=1.7, top_k=30, top_p=0.9, min_p=0.01, repetition_penalty=1.2
    ),
    "drawn by a processor": lambda: dict(DRAWN, logits_processor=[Processor()]),
    "criterion": lambda: dict(DRAWN, stopping_criteria=[Criterion()]),
    "max_time": lambda: dict(do_sample=False, max_time=-1.0),
    "min_new_tokens": lambda: dict(DRAWN, min_new_tokens=N - 3),
}


@pytest.mark.parametrize("name", ["llama", "falcon_h1"])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("asked", list(ASKED))
def test_the_same_text_and_the_same_cache(asked, rows, name, device, loops):
    """With left padding, without an end and with ends that rows meet at different steps."""
    model = tiny(name).to(device)
    ids, mask = left_padded(random_ids(rows, 25, device))
    common = dict(attention_mask=mask, max_new_tokens=N, pad_token_id=0, suppress_tokens=[0])
    with patch(model, S, W):
        torch.manual_seed(5)
        plain = model.generate(ids, **common, **{**ASKED[asked](), "min_new_tokens": None})[:, 25:]
        ends = sorted({row[4 + 7 * i] for i, row in enumerate(plain.tolist()) if len(row) > 4 + 7 * i}) or [1]
        for eos in (None, ends):
            if asked == "min_new_tokens" and eos is None:
                continue
            ran = loops.ran
            ours = told(model, ids, ASKED[asked], eos_token_id=eos, **common)
            assert loops.ran >= ran + 2
            with loops.theirs():
                ran = loops.ran
                theirs = told(model, ids, ASKED[asked], eos_token_id=eos, **common)
                assert loops.ran == ran
            assert same(ours, theirs)
            answer = ours[0][:, 25:]
            if eos is not None and asked not in ("max_time", "min_new_tokens", "criterion"):
                assert answer.shape[1] < N and bool(torch.isin(answer, torch.tensor(ends, device=device)).any(1).all())
            if asked == "max_time":
                assert answer.shape[1] == 1


@pytest.mark.parametrize("returned", [True, False])
def test_what_is_returned(returned, device, loops):
    model, ids = tiny("llama").to(device), random_ids(2, 20, device)
    with patch(model, S, W):
        cache = SinkCache(model)
        how = dict(past_key_values=cache, max_new_tokens=5, do_sample=False, return_dict_in_generate=returned)
        ours = model.generate(ids, **how)
        assert loops.ran == 1
        cache.reset()
        with loops.theirs():
            theirs = model.generate(ids, **how)
        assert type(ours) is type(theirs)
        if returned:
            assert ours.keys() == theirs.keys() and all(a is b or torch.equal(a, b) for a, b in zip(
                ours.values(), theirs.values(), strict=True
            ))  # fmt: skip
            assert any(x is cache for x in ours.values())
        twice = model.generate(ids, do_sample=True, num_return_sequences=2, max_new_tokens=4)
        assert twice.shape == (4, 24) and loops.ran == 2


def test_what_transformers_loop_serves(model, loops):
    """Whatever asks for more than the next token of each row, or for what a loop is not given."""
    ids, greedy = random_ids(1, 20), dict(max_new_tokens=6, do_sample=False, eos_token_id=0, suppress_tokens=[0])
    expected = model.generate(ids, **greedy)
    assert loops.ran == 1
    tokenizer = transformers.AutoTokenizer.from_pretrained(models.MODEL)
    scored = model.generate(ids, return_dict_in_generate=True, output_scores=True, output_logits=True, **greedy)
    assert len(scored.scores) == len(scored.logits) == 6 and torch.equal(scored.sequences, expected)
    shown = model.generate(ids, return_dict_in_generate=True, output_hidden_states=True, **greedy)
    assert len(shown.hidden_states) == 6 and torch.equal(shown.sequences, expected)
    assert torch.equal(model.generate(ids, use_cache=False, **greedy), expected)
    assert torch.equal(model.generate(ids, tokenizer=tokenizer, stop_strings=["\0no\0"], **greedy), expected)
    assert model.generate(ids, num_beams=2, **greedy).shape == (1, 26)
    assert torch.equal(model.generate(ids, prompt_lookup_num_tokens=2, **greedy), expected)
    embeds = model.get_input_embeddings()(ids)
    assert torch.equal(model.generate(inputs_embeds=embeds, **greedy), expected[:, 20:])
    asked = []

    def custom(model, input_ids, **kwargs):
        asked.append(kwargs)
        return input_ids

    assert torch.equal(model.generate(ids, custom_generate=custom, **greedy), ids) and len(asked) == 1
    assert loops.ran == 1
    assert torch.equal(model.generate(ids, transformers.GenerationConfig(**greedy), custom_generate=None), expected)
    assert loops.ran == 2


class Spoils(transformers.LogitsProcessor):
    """Gives the last row no distribution at the n-th choice, from 0 on."""

    def __init__(self, n, value):
        self.left, self.value = n, value

    def __call__(self, input_ids, scores):
        self.left -= 1
        if self.left == -1:
            scores[-1] = self.value
        return scores


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("n", [0, 7])
def test_logits_that_cannot_be_drawn_from(n, value, repeated, loops):
    """The error of torch.multinomial, and the cache as it is there. A GPU's own says the same, and is lost with it."""
    model, ids = tiny("llama"), random_ids(3, 20)
    found = []
    with patch(model, S, W):
        for loop in (contextlib.nullcontext, loops.theirs):
            torch.manual_seed(5)
            cache, criterion = SinkCache(model), transformers.EosTokenCriteria(96)
            with loop(), pytest.raises(RuntimeError) as error:
                model.generate(
                    ids, past_key_values=cache, logits_processor=[Spoils(n, value)], stopping_criteria=[criterion],
                    do_sample=True, max_new_tokens=20, suppress_tokens=[96],
                )  # fmt: skip
            found.append((str(error.value), state(cache)))
    assert found[0] == found[1] and loops.ran == 1


def test_a_step_is_launched_before_the_host_looks(repeated, monkeypatch):
    """At the end of all texts that is one step more, which nothing is left of."""
    model, ids = tiny("llama"), random_ids(2, 20)
    with patch(model, S, W):
        caches = [SinkCache(model) for _ in range(3)]  # all of them are there till the end: each has a step of its own
        how = dict(do_sample=False, max_new_tokens=30, repetition_penalty=1.5)
        text = model.generate(ids, past_key_values=caches[0], **how)
        before, ends = len(repeated), [int(text[0, 33]), int(text[1, 38])]
        found = model.generate(ids, past_key_values=caches[1], eos_token_id=ends, **how)
        fed = found.shape[1] - 20 - 1  # steps that fed something, of which the first runs before it can be captured
        assert len(repeated) - before == fed - 1 + (found.shape[1] < 50)
        assert caches[1].seen == 20 + fed and not caches[1].is_torn and caches[1].unfed is not None
        before, given = len(repeated), []
        monkeypatch.setattr(Heard, "put", lambda self, ids: given.append(len(repeated) - before))
        model.generate(ids, past_key_values=caches[2], max_new_tokens=6, do_sample=False, streamer=Heard())
    assert given == [0, 0, 1, 2, 3, 4, 4]  # the prompt; a step that runs; those that are launched ahead; none


@pytest.mark.gpu
@pytest.mark.parametrize("how", [dict(do_sample=False), dict(do_sample=True, top_k=20, temperature=0.8)])
def test_the_host_waits_for_no_more_than_its_event(how, loops):
    class Forbids(transformers.LogitsProcessor):
        calls = 0

        def __call__(self, input_ids, scores):
            self.calls += 1
            torch.cuda.set_sync_debug_mode("error" if 5 < self.calls < N - 5 else "default")
            return scores

    model, ids, forbids = tiny("llama").to(GPU), random_ids(2, 20, GPU), Forbids()
    with patch(model, S, W):
        try:
            model.generate(ids, max_new_tokens=N, min_new_tokens=N, eos_token_id=96, logits_processor=[forbids], **how)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert forbids.calls == N and loops.ran == 1


@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt])
def test_a_streamer_that_fails(error, device):
    """What it was given belongs to the text."""

    class Fails(Heard):
        def put(self, value):
            super().put(value)
            if len(self.ids) > 6:
                raise error

    model, ids = tiny("llama").to(device), random_ids(1, 20, device)
    how = dict(do_sample=False, suppress_tokens=[0])
    with patch(model, S, W):
        expected = model.generate(ids, max_new_tokens=20, **how)
        cache, streamer = SinkCache(model), Fails()
        with pytest.raises(error):
            model.generate(ids, past_key_values=cache, max_new_tokens=20, streamer=streamer, **how)
        given = torch.cat([x.view(1, -1) for x in streamer.ids], dim=1).to(device)
        assert torch.equal(given, expected[:, :26]) and cache.lengths.item() in (25, 26)
        assert torch.equal(model.generate(given, past_key_values=cache, max_new_tokens=14, **how), expected)


def test_ctrl_c_anywhere(device):
    """The cache holds the beginning of the text and counts it, or says that it is torn."""
    model, ids = tiny("llama", num_hidden_layers=2).to(device), random_ids(1, 12, device)
    outcomes = set()
    with patch(model, S, W), torch.no_grad():
        how = dict(do_sample=False, max_new_tokens=12, repetition_penalty=1.3, suppress_tokens=[0])
        text = model.generate(ids, **how)
        end = next((x for x in text[0, 17:].tolist() if x not in text[0, :17]), 96)
        expected = model.generate(ids, eos_token_id=end, **how)
        more = (expected[:, -5:] + 1).clamp(max=96)
        whole = torch.cat((expected, more), dim=1)
        answer = model.generate(whole, max_new_tokens=4, do_sample=False)

        def run(ctrl_c):
            cache = SinkCache(model)
            with ctrl_c:
                model.generate(ids, past_key_values=cache, eos_token_id=end, **how)
            if cache.is_torn:
                outcomes.add("torn")
                with pytest.raises(ValueError, match="half-way"):
                    model.generate(whole, past_key_values=cache, max_new_tokens=4, do_sample=False)
                return
            length = 0 if cache.lengths is None else cache.lengths.item()
            outcomes.add(length)
            assert cache.seen == length and length in (0, *range(12, expected.shape[1]))
            if cache.unfed is not None:
                assert cache.unfed.ids.item() == expected[0, length] and length + cache.unfed.columns >= 13
            assert torch.equal(model.generate(whole, past_key_values=cache, max_new_tokens=4, do_sample=False), answer)

        anywhere(run, times=60)
    assert len(outcomes) > 3
