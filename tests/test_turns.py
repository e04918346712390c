"""Turns over one cache: whatever `generate` is given, it writes what the whole text gives, or says what differs."""

import copy
import functools

import pytest
import torch
import transformers

from helpers import left_padded
from oracle import streaming_logits
from sinkattn import SinkCache, patch
from tiny import tiny

S, W = 4, 30
C = S + W
GREEDY = dict(do_sample=False, max_new_tokens=10, suppress_tokens=[0])  # answers without pad ids


plain = functools.cache(lambda: tiny("llama"))  # for the oracle


def random_ids(rows, tokens):
    """No two of a row are the same, so that every edit is one."""
    return torch.stack([torch.randperm(79)[:tokens] + 1 for _ in range(rows)])


def behind(text, tokens):
    """New ids, of which the first is neither the first of the text, by chance, nor its last."""
    while True:
        new = torch.randint(80, 97, (len(text), tokens))
        if not (new[:, 0] == text[:, -1]).any():
            return new


def follows(text, answer) -> bool:
    """Whether each id of an answer, (n,), is the oracle's likeliest, but for the pad id, behind a text, (m,)."""
    logits = streaming_logits(plain(), torch.cat((text, answer))[None], S, W)
    return torch.equal(logits[0, len(text) - 1 : -1, 1:].argmax(-1) + 1, answer)


def changed(ids, at):
    ids = ids.clone()
    ids[:, at] = ids[:, at] % 95 + 1
    return ids


@pytest.mark.parametrize("rows", [1, 3])
def test_history_or_new_ids(model, rows):
    """A second turn as the full history, however padded, or as new ids with or without the last of the answer."""
    ids, mask = left_padded(random_ids(rows, 20))
    cache = SinkCache(model)
    first = model.generate(ids, attention_mask=mask, past_key_values=cache, **GREEDY)
    assert cache.seen == first.shape[1] - 1
    turn = torch.cat((first, behind(first, 50)), dim=1)  # new ids are more than all that was seen
    mask = torch.cat((mask, torch.ones(rows, turn.shape[1] - 20, dtype=mask.dtype)), dim=1)
    answer = model.generate(turn, attention_mask=mask, **GREEDY)[:, -10:]
    assert all(follows(turn[row, mask[row].bool()], answer[row]) for row in range(rows))
    with_last, new = turn[:, cache.seen :], turn[:, first.shape[1] :]
    more = torch.nn.functional.pad(turn, (5, 0)), torch.nn.functional.pad(mask, (5, 0))
    for given in (
        dict(input_ids=turn, attention_mask=mask),
        dict(input_ids=more[0], attention_mask=more[1]),
        dict(input_ids=turn.int()),  # the pad token is padding
        dict(input_ids=with_last, attention_mask=mask),
        dict(input_ids=with_last, attention_mask=torch.ones_like(with_last)),
        dict(input_ids=with_last),
        dict(input_ids=new, attention_mask=mask),
        dict(input_ids=new, attention_mask=torch.ones_like(new).bool()),
        dict(input_ids=new),
        *(dict(inputs=x, prefill_chunk_size=7) for x in (turn, new)),
    ):
        again = copy.deepcopy(cache)
        ids = given.get("input_ids", given.get("inputs"))
        found = model.generate(**given, past_key_values=again, **GREEDY)
        assert torch.equal(found, torch.cat((ids, answer), dim=1))
        assert again.lengths.tolist() == [n + 9 for n in mask.sum(1).tolist()]


def test_many_turns(model):
    """Past the capacity: history, new ids with and without the last token, forwards, each behind the other."""
    cache, text = SinkCache(model), random_ids(1, 9)
    for turn in range(6):
        new = behind(text, 1 + turn * 3)
        if turn == 0:
            given, text = text, text
        elif turn % 3 == 0:
            given = text = torch.cat((text, new), dim=1)
        elif turn % 3 == 1:
            given, text = new, torch.cat((text, new), dim=1)
        else:
            given, text = torch.cat((text[:, -1:], new), dim=1), torch.cat((text, new), dim=1)
        answer = model.generate(given, past_key_values=cache, **GREEDY)[:, given.shape[1] :]
        assert follows(text[0], answer[0])
        text = torch.cat((text, answer), dim=1)
    with torch.no_grad():  # a forward feeds what it is given, and nothing else
        logits = model(text[:, -1:], past_key_values=cache).logits
    assert torch.allclose(logits[0, -1], streaming_logits(plain(), text, S, W)[0, -1], atol=1e-4)
    assert cache.seen == text.shape[1]


EDITS = {  # of a text of 60 ids and an answer of 10, the last of which is not fed; 4 + 30 are held
    "another first token": (lambda t: changed(t, 0), "from token 0 on"),
    "another sink": (lambda t: changed(t, 3), "from token 3 on"),
    "a token of the window": (lambda t: changed(t, -5), "from token 65 on"),
    "a token that is forgotten": (lambda t: changed(t, 20), "in what is forgotten"),
    "two that are forgotten, exchanged": (
        lambda t: torch.cat((t[:, :9], t[:, 10:11], t[:, 9:10], t[:, 11:]), dim=1),
        "in what is forgotten",
    ),
    "one that is forgotten and one of the window": (lambda t: changed(changed(t, 20), 65), "from token 65 on"),
    "some taken out": (lambda t: torch.cat((t[:, :50], t[:, 55:]), dim=1), "from token 50 on"),
    "another answer": (lambda t: torch.cat((changed(t, 60)[:, :61], random_ids(1, 24)), dim=1), "from token 60 on"),
    "no answer": (lambda t: t[:, :60], "from token 60 on"),
    "the prompt again": (lambda t: t[:, :60], "from token 60 on, where it ends"),
    "the beginning again": (lambda t: t[:, :3], "from token 3 on, where it ends"),
    "all but one again": (lambda t: t[:, :-2], "from token 68 on, where it ends"),
    "all again": (lambda t: t[:, :-1], None),
}
BACK = {"a token of the window": 4, "some taken out": 19, "another answer": 9, "no answer": 9, "the prompt again": 10,
        "all but one again": 2, "all again": 1}  # tokens to be taken back; the rest is out of reach  # fmt: skip


@pytest.mark.parametrize("slack", [0, 8, 18])
@pytest.mark.parametrize("kind", list(EDITS))
def test_an_edited_history_goes_on_or_is_refused_and_nothing_is_lost(kind, slack):
    """The first token after those that stay is fed anyhow, so that one more than the slack can be replaced."""
    (edit, message), model = EDITS[kind], tiny("llama")
    with patch(model, S, W, slack=slack):
        cache = SinkCache(model)
        text = model.generate(random_ids(1, 60), past_key_values=cache, **{**GREEDY, "suppress_tokens": [0, 80, 81]})
        new = torch.tensor([[80, 81, 80]])
        given = edit(text) if "again" in kind else torch.cat((edit(text), new), dim=1)
        for more in ({}, dict(attention_mask=torch.ones_like(given))):
            again = copy.deepcopy(cache)
            if BACK.get(kind, 99) > slack + 1:
                with pytest.raises(ValueError, match=message):
                    model.generate(given, past_key_values=again, **more, **GREEDY)
            else:
                for wrong in (dict(no_such_option=1), dict(max_new_tokens=-1)):
                    with pytest.raises(ValueError):
                        model.generate(given, past_key_values=again, **{**more, **GREEDY, **wrong})
                after = copy.deepcopy(again)
                answer = model.generate(given, past_key_values=after, **more, **GREEDY)[0, given.shape[1] :]
                assert follows(given[0], answer) and after.seen == given.shape[1] + len(answer) - 1
            answer = model.generate(new, past_key_values=again, **GREEDY)[0, 3:]
            assert follows(torch.cat((text, new), dim=1)[0], answer)


def test_edits_in_one_row(model):
    cache = SinkCache(model)
    text = model.generate(random_ids(3, 20), past_key_values=cache, **GREEDY)
    given = torch.cat((text, behind(text, 4)), dim=1)
    for at, is_near in ((17, True), (10, False)):  # 29 were fed, 16 can be taken back and one be exchanged
        edited, again = given.clone(), copy.deepcopy(cache)
        edited[1, at] = edited[1, at] % 95 + 1
        if is_near:
            found = model.generate(edited, past_key_values=again, **GREEDY)[:, 34:]
            assert all(follows(*texts) for texts in zip(edited, found, strict=True))
            assert again.lengths.tolist() == [43] * 3
        else:
            cache.rows.peak.fill_(1000)  # as if it had been longer
            with pytest.raises(
                ValueError, match="row 1 of input_ids differs .* what is forgotten cannot be taken back"
            ):
                model.generate(edited, past_key_values=cache, **GREEDY)


def test_new_ids_that_look_like_the_text(model):
    """They are kept where the mask says that they are new, the text tells nothing, or two tokens are the same."""
    blank, more = torch.full((1, 40), 5), torch.full((1, 60), 5)
    for text, new, said in (
        (blank, more, False),
        (blank, more[:, :20], False),
        (torch.tensor([[5, 6]] * 20).reshape(1, -1), torch.tensor([[5, 6]] * 30).reshape(1, -1), False),
        ((ids := random_ids(1, 40)), torch.cat((ids[:, :2], behind(ids, 9)), dim=1), False),
        (ids, torch.cat((ids, random_ids(1, 9)), dim=1), True),
        (ids, ids, True),
    ):
        cache = SinkCache(model)
        with torch.no_grad():
            model(text, past_key_values=cache)
        mask = dict(attention_mask=torch.ones(1, 40 + new.shape[1], dtype=torch.int64)) if said else {}
        answer = model.generate(new, past_key_values=cache, **mask, **GREEDY)[0, new.shape[1] :]
        assert follows(torch.cat((text, new), dim=1)[0], answer)


def test_a_prefix_fed_by_forward(model):
    """transformers' recipe: a system prompt is read once, its cache copied, and every conversation given in full."""
    prefix, cache = random_ids(2, 40), SinkCache(model)
    with torch.no_grad():
        model(prefix, past_key_values=cache)
    for _ in range(2):
        whole, again = torch.cat((prefix, random_ids(2, 6)), dim=1), copy.copy(cache)
        answer = model.generate(whole, past_key_values=again, attention_mask=torch.ones_like(whole), **GREEDY)[:, 46:]
        assert all(follows(whole[row], answer[row]) for row in range(2))


def test_ids_of_embeddings_are_not_known(model):
    text, cache = random_ids(1, 12), SinkCache(model)
    new = behind(text, 4)
    with torch.no_grad():
        model(inputs_embeds=model.get_input_embeddings()(text[:, :8]), past_key_values=cache)
        model(text[:, 8:], past_key_values=cache)
    whole = torch.cat((text, new), dim=1)
    again = model.generate(changed(whole, 3), past_key_values=copy.deepcopy(cache), **GREEDY)[0, 16:]
    assert follows(whole[0], again)
    edited = changed(whole, 9)
    again = model.generate(edited, past_key_values=copy.deepcopy(cache), **GREEDY)[0, 16:]
    assert follows(edited[0], again)
    embeds = model.get_input_embeddings()(new)
    for mask in ({}, dict(attention_mask=torch.ones(1, 16, dtype=torch.int64))):
        with pytest.raises(ValueError, match="inputs_embeds over a SinkCache that holds a text"):
            model.generate(inputs_embeds=embeds, past_key_values=cache, **mask, **GREEDY)
    assert follows(whole[0], model.generate(whole, past_key_values=cache, **GREEDY)[0, 16:])


@pytest.mark.parametrize("name", ["llama", "falcon_h1"])
def test_rows_that_end_early_are_fed_no_padding(name):
    """And go on from where each of them has ended: by new ids, by what `generate` returned, or padded on the left."""
    model = tiny(name)
    with patch(model, S, W):
        while True:
            prompt, options = random_ids(3, 25), dict(do_sample=False, suppress_tokens=[0], max_new_tokens=20)
            free = model.generate(prompt, eos_token_id=None, **options)[:, 25:]
            end = free[1, 4].item()
            stops = [row.index(end) + 1 if end in row else 20 for row in free.tolist()]
            if stops[1] == 5 and sorted(stops)[1] > 5:
                break
        cache = SinkCache(model)
        answer = model.generate(prompt, eos_token_id=end, past_key_values=cache, **options)
        texts = [torch.cat((prompt[row], free[row, :stop])) for row, stop in enumerate(stops)]
        last = answer.shape[1] - 25  # the last choice of rows that have not ended is not fed yet
        assert cache.lengths.tolist() == [len(text) - (stop == last) for text, stop in zip(texts, stops, strict=True)]
        new = behind(answer, 6)
        whole = [torch.cat((text, more)) for text, more in zip(texts, new, strict=True)]
        width = max(map(len, whole))
        padded = torch.stack([torch.nn.functional.pad(x, (width - len(x), 0)) for x in whole])
        expected = [model.generate(x[None], **options)[0, len(x) :] for x in whole]
        for given in (
            dict(input_ids=new),
            dict(input_ids=torch.cat((answer, new), dim=1)),
            dict(input_ids=padded),
            dict(input_ids=padded, attention_mask=(padded > 0).long()),
        ):
            again, ids = copy.deepcopy(cache), given["input_ids"]
            found = model.generate(**given, past_key_values=again, **options)
            assert torch.equal(found[:, : ids.shape[1]], ids)
            assert all(torch.equal(found[row, ids.shape[1] :], expected[row]) for row in range(3))
        whole = torch.cat((answer, new), dim=1)
        with pytest.raises(ValueError, match="attention_mask has zeros after ones, as behind a row that ended early"):
            model.generate(whole, attention_mask=(whole > 0).long(), past_key_values=cache, **options)


def test_pad_ids_in_a_prompt():
    """Without a mask they are padding wherever they stand, as unpatched; what was given is returned as it was."""
    model, ids = tiny("llama"), random_ids(3, 20)
    ids[0, 7] = ids[0, 9] = ids[2, :4] = ids[2, 11] = 0
    expected = model.generate(ids, **GREEDY)
    with patch(model, S, W):
        assert torch.equal(model.generate(ids, **GREEDY), expected)
        assert torch.equal(model.generate(input_ids=ids, **GREEDY), expected)
        mask = torch.ones_like(ids)
        assert not torch.equal(model.generate(ids, attention_mask=mask, **GREEDY), expected)
        found = model.generate(ids, num_beams=2, num_return_sequences=2, return_dict_in_generate=True, **GREEDY)
        assert torch.equal(found.sequences[:, :20], ids.repeat_interleave(2, 0))
        ids[1, -1] = 0
        with pytest.raises(ValueError, match="input_ids end with the pad token, 0"):
            model.generate(ids, **GREEDY)
        model.generate(ids, attention_mask=torch.ones_like(ids), **GREEDY)


def test_pad_ids_in_an_answer(model):
    """In a history they are padding, as unpatched, if they can be taken back; else they are tokens of the text."""
    always = [lambda ids, scores: scores.index_fill(1, torch.tensor([0]), 99.0)]
    for tokens in (1, 4):  # the last of which is not fed
        cache, prompt = SinkCache(model), random_ids(2, 20)
        options = dict(logits_processor=always, do_sample=False, max_new_tokens=tokens)
        text = model.generate(prompt, past_key_values=cache, **options)
        assert (text[:, 20:] == 0).all()
        whole = torch.cat((text, behind(text, 5)), dim=1)
        for is_near in (True, False):
            again = copy.deepcopy(cache)
            if not is_near:
                again.rows.peak.fill_(1000)
            found = model.generate(whole, past_key_values=again, **GREEDY)
            assert torch.equal(found[:, :-10], whole)
            texts = [row[row > 0] if is_near or tokens == 1 else row for row in whole]
            assert all(follows(texts[row], found[row, -10:]) for row in range(2))
            if is_near:  # the new ids alone
                again = copy.deepcopy(cache)
                found = model.generate(whole[:, -5:], past_key_values=again, **GREEDY)
                assert all(follows(texts[row], found[row, -10:]) for row in range(2))


class Interrupted(transformers.StoppingCriteria):
    """Ctrl-C behind the n-th choice, from 0 on."""

    def __init__(self, n):
        self.left, self.text = n, None

    def __call__(self, input_ids, scores, **kwargs):
        self.left, self.text = self.left - 1, input_ids[0].clone()
        if self.left < 0:
            raise KeyboardInterrupt
        return torch.zeros(1, dtype=torch.bool)


@pytest.mark.parametrize("n", [0, 1, 5])
def test_an_answer_that_was_interrupted(model, n):
    """What was chosen belongs to the text, fed or not: the next turn goes on behind it."""
    cache, ctrl_c = SinkCache(model), Interrupted(n)
    with pytest.raises(KeyboardInterrupt):
        model.generate(random_ids(1, 20), past_key_values=cache, stopping_criteria=[ctrl_c], **GREEDY)
    assert len(ctrl_c.text) == 20 + n + 1
    new = behind(ctrl_c.text[None], 5)
    text = torch.cat((ctrl_c.text, new[0]))
    assert follows(text, model.generate(new, past_key_values=copy.copy(cache), **GREEDY)[0, 5:])
    assert follows(text, model.generate(text[None], past_key_values=cache, **GREEDY)[0, len(text) :])


def test_reordered_rows_take_their_last_tokens_along(model):
    cache = SinkCache(model)
    text = model.generate(random_ids(2, 20), past_key_values=cache, **GREEDY)
    order = torch.tensor([1, 1, 0])
    new = behind(text[order], 4)
    cache.reorder_cache(order)
    answer = model.generate(new, past_key_values=cache, **GREEDY)[:, 4:]
    assert all(follows(torch.cat((text[order[row]], new[row])), answer[row]) for row in range(3))


def test_after_a_beam_search(model):
    """Its rows are beams and not what it returned: what goes on has tokens of theirs taken back."""
    cache = SinkCache(model)
    found = model.generate(random_ids(1, 20), past_key_values=cache, num_beams=3, num_return_sequences=3, **GREEDY)
    with pytest.raises(ValueError, match="beams of a search"):
        model.generate(random_ids(3, 5), past_key_values=cache, **GREEDY)
    given = torch.cat((found, behind(found, 2)), dim=1)
    answers = model.generate(given, past_key_values=cache, **GREEDY)[:, 32:]
    assert all(follows(*texts) for texts in zip(given, answers, strict=True))
    cache.reset()
    ids = random_ids(1, 20)
    assert follows(ids[0], model.generate(ids, past_key_values=cache, **GREEDY)[0, 20:])


CALLS = {
    "mask of another length": (
        dict(attention_mask=torch.ones(1, 9, dtype=torch.int64)),
        "attention_mask .* does not fit",
    ),
    "right padding": (dict(attention_mask=torch.tensor([[1] * 5 + [0]])), "zeros after ones"),
    "another batch": (dict(input_ids=torch.ones(2, 6, dtype=torch.int64)), "holds 1 rows and cannot go on with 2"),
    "positions": (dict(position_ids=torch.arange(6)[None]), "leave position_ids out"),
    "a typing error": (dict(attention_maks=1), "attention_maks"),
}


@pytest.mark.parametrize("kind", list(CALLS))
def test_bad_turns_lose_nothing(model, kind):
    """Each error speaks of what was given, and the text goes on as if the call had not been made."""
    change, message = CALLS[kind]
    cache = SinkCache(model)
    text = model.generate(random_ids(1, 20), past_key_values=cache, **GREEDY)
    new, seen = behind(text, 6), cache.seen
    for ids in (new, torch.cat((text, new), dim=1)):
        if kind == "right padding" and ids is not new:
            continue
        with pytest.raises(ValueError, match=message):
            model.generate(**{"input_ids": ids, "past_key_values": cache, **GREEDY, **change})
    assert cache.seen in (seen, seen + 1)  # the last token may have been fed
    answer = model.generate(torch.cat((text, new), dim=1), past_key_values=cache, **GREEDY)[0, -10:]
    assert follows(torch.cat((text, new), dim=1)[0], answer)


@pytest.mark.parametrize("rows", [1, 3])
def test_the_last_token_is_fed_once(model, rows):
    """A call that failed had fed it; new ids bring it all the same, or do not."""
    for brings in (False, True):
        while True:
            cache = SinkCache(model)
            text = model.generate(random_ids(rows, 20), past_key_values=cache, **GREEDY)
            if (text[:, 0] != text[:, -1]).all():  # else the last token alone looks like the text from its start
                break
        new, last = behind(text, 6), text[:, -1:]
        for wrong in (dict(max_new_tokens=0), dict(num_return_sequences=2)):
            with pytest.raises(ValueError, match="max_new_tokens|num_retur"):
                model.generate(new, past_key_values=cache, **{**GREEDY, **wrong})
        if brings:
            with pytest.raises(ValueError, match="give what comes behind it"):
                model.generate(last, past_key_values=cache, **GREEDY)
        given = torch.cat((last, new), dim=1) if brings else new
        answers = model.generate(given, past_key_values=cache, **GREEDY)[:, given.shape[1] :]
        for row, answer in enumerate(answers):
            assert follows(torch.cat((text, new), dim=1)[row], answer)
        assert cache.lengths.tolist() == [text.shape[1] + 6 + 9] * rows


def test_generate_batch_is_refused(model):
    with pytest.raises(ValueError, match="generate_batch brings a paged cache"):
        model.generate_batch([[1, 2, 3]], max_new_tokens=2)


def test_prompt_tuning():
    """PEFT replaces a method while it generates, and puts back what it found before the patch."""
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    model, ids = tiny("llama"), random_ids(2, 5)
    wrapped = peft.get_peft_model(model, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)).eval()
    given = dict(input_ids=ids, attention_mask=torch.ones_like(ids))
    expected, attributes = wrapped.generate(**given, **GREEDY), set(vars(model))
    embed, text = model.get_input_embeddings(), ids
    for _ in range(GREEDY["max_new_tokens"]):
        logits = model(inputs_embeds=torch.cat((wrapped.get_prompt(2), embed(text)), dim=1)).logits[:, -1]
        text = torch.cat((text, logits[:, 1:].argmax(-1, keepdim=True) + 1), dim=1)
    if not torch.equal(expected, text):
        pytest.skip(f"PEFT {peft.__version__} loses its prompt in transformers {transformers.__version__}, unpatched")
    handle = patch(wrapped, S, W)
    assert torch.equal(wrapped.generate(**given, **GREEDY), expected)
    handle.remove()
    assert set(vars(model)) == attributes and torch.equal(wrapped.generate(**given, **GREEDY), expected)
    with patch(wrapped, S, W) as handle:
        model.prepare_inputs_for_generation = lambda *args, **kwargs: {}
        with pytest.raises(RuntimeError, match="prepare_inputs_for_generation of the model was replaced"):
            handle.remove()
        del model.prepare_inputs_for_generation
    assert not hasattr(model, "_sinkattn")


@pytest.mark.parametrize("sinks", [0, 1, 2, 4])
def test_new_ids_that_begin_like_the_text(sinks):
    """A few tokens the same, as of a chat template: neither the text is lost nor theirs, an error asks which it is."""
    model = tiny("llama")
    with patch(model, sinks, W, slack=8):
        for length in (20, 60):
            ids = random_ids(1, length)
            for same in (1, 3, 7):
                cache = SinkCache(model)
                text = model.generate(ids, past_key_values=cache, **GREEDY)
                new = torch.cat((ids[:, :same], torch.tensor([[80, 81, 82]])), dim=1)
                before = cache.lengths.tolist()
                if same == 1:  # less than half of it, and less than three
                    model.generate(new, past_key_values=cache, **GREEDY)
                    brings_last = int(new[0, 0] == text[0, -1])  # by chance
                    assert cache.lengths.tolist() == [text.shape[1] + 4 + 9 - brings_last]
                    continue
                with pytest.raises(ValueError, match="If all ids are new, say so by an attention_mask"):
                    model.generate(new, past_key_values=cache, **GREEDY)
                assert cache.lengths.tolist() == before


def test_failing_calls_lose_nothing(model):
    """A search that does not fit, a row that has nothing, a step without a cache, a model cut short."""
    ids, new = random_ids(1, 12), torch.tensor([[80, 81, 82]])
    cache = SinkCache(model)
    text = model.generate(ids, past_key_values=cache, **GREEDY)
    for wrong, message in (
        (dict(num_beams=2), "holds 1 rows"),
        (dict(use_cache=False), "use_cache=False"),
        (dict(assistant_early_exit=1), "assistant_early_exit"),
        (dict(attention_mask=[[1, 1, 1]]), "attention_mask must be a tensor"),
    ):
        with pytest.raises(ValueError, match=message):
            model.generate(new, past_key_values=cache, **{**GREEDY, **wrong})
    answer = model.generate(new, past_key_values=cache, **GREEDY)[0, 3:]
    assert follows(torch.cat((text, new), dim=1)[0], answer)
    cache, ids = SinkCache(model), random_ids(1, 20)
    mask = torch.stack((torch.ones(20), torch.zeros(20))).long()
    with torch.no_grad():
        model(ids.expand(2, -1), attention_mask=mask, past_key_values=cache)
    given = torch.cat((ids[:, :17], torch.tensor([[80, 81, 82, 83]])), dim=1).expand(2, -1)
    with pytest.raises(ValueError, match="row 1 of input_ids has a text, and this SinkCache holds none for it"):
        model.generate(given, attention_mask=torch.ones_like(given), past_key_values=cache, **GREEDY)
    assert cache.lengths.tolist() == [20, 0] and cache.seen == 20
