"""Tokens taken back: as if they had not been fed, at every edge of the cache, in any row, twice in a row."""

import copy

import pytest
import torch

from helpers import GPU, plain
from oracle import relative_error, streaming_logits
from sinkattn import SinkCache, Stream, ops, patch
from sinkattn.rollback import take_back
from tiny import FAMILIES, ROPES, tiny

S, W, SLACK = 4, 10, 5
C = S + W
EDGES = (1, S - 1, S, S + 1, C - 1, C, C + 1, 3 * C + 7)  # lengths at which tokens are taken back


def made(name: str, **more):
    with torch.random.fork_rng():
        return tiny(name, **more)


def ids_of(rows: int, tokens: int) -> torch.Tensor:
    return torch.randint(1, 97, (rows, tokens))


def fed(model, cache, ids: torch.Tensor, **more) -> torch.Tensor:
    """The logits of ids, fed in pieces and at last token by token."""
    pieces = [*ids[:, :-3].split(7, dim=1), *ids[:, -3:].split(1, dim=1)]
    return torch.cat([model(x, past_key_values=cache, **more).logits for x in pieces if x.shape[1]], dim=1)


@pytest.mark.parametrize("name", [*FAMILIES, *ROPES])
def test_as_if_it_had_not_been(name):
    """1 to slack tokens back, twice in a row, then 3 C further: the oracle's logits of a text without the detour."""
    model, ids = made(name), ids_of(1, 6 * C + 7)
    expected, straight = streaming_logits(made(name), ids, S, W), {}
    with patch(model, S, W, slack=SLACK), torch.no_grad():
        for end in EDGES:
            n = int(torch.randint(1, min(end, SLACK) + 1, ()))
            first = int(torch.randint(1, n + 1, ()))  # taken back, fed otherwise, and taken back with the rest
            cache = SinkCache(model)
            fed(model, cache, torch.cat((ids[:, : end - n], ids_of(1, n)), dim=1))
            cache.crop(-first)
            fed(model, cache, ids_of(1, first))
            cache.crop(-n)
            assert cache.seen == end - n and cache.lengths.tolist() == [end - n]
            part = ids[:, end - n : end + 3 * C]
            assert relative_error(fed(model, cache, part), expected[:, end - n : end + 3 * C]) < 1e-4
            straight = SinkCache(model)
            fed(model, straight, ids[:, : end + 3 * C])
            assert torch.equal(cache.rows.digest, straight.rows.digest)
            assert torch.equal(cache.rows.last(C), straight.rows.last(C))


BOTH = (torch.float32, torch.bfloat16)
WAYS = [(backend, "cpu", dtype) for backend in ("cpu", "triton", "reference") for dtype in BOTH]
WAYS.remove(("triton", "cpu", torch.bfloat16))  # Triton's interpreter multiplies it wrongly
WAYS += [
    pytest.param(backend, GPU, dtype, marks=pytest.mark.gpu)
    for backend in ("cuda", "triton")
    for dtype in (torch.bfloat16, torch.float16)
]


@pytest.mark.parametrize(("backend", "device", "dtype"), WAYS)
def test_every_backend(backend, device, dtype):
    """To the bit what the same backend gives without the detour, in the order of its own pieces."""
    if reason := ops.missing_backend(backend, torch.device(device).type):
        pytest.skip(reason)
    model = made("qwen3", num_hidden_layers=1, head_dim=64).to(device, dtype)
    ids = ids_of(1, 7 * C).to(device)
    with patch(model, S, W, slack=SLACK, backend=backend), torch.no_grad():
        for end in (S + 2, *(edge for edge in EDGES if edge > SLACK)):
            cache, straight = SinkCache(model), SinkCache(model)
            for used in (cache, straight):
                model(ids[:, : end - SLACK], past_key_values=used)
            for token in ids_of(SLACK, 1).to(device):
                model(token[None], past_key_values=cache)
            cache.crop(-SLACK)
            parts = ids[:, end - SLACK :].split([1, 2, 3 * C - 5, ids.shape[1] - end + SLACK - 3 * C + 2], dim=1)
            for part in parts:
                found, expected = (model(part, past_key_values=used).logits for used in (cache, straight))
                assert torch.equal(found, expected)


@pytest.mark.parametrize("name", ["llama", "gemma3", "deepseek_v3"])
def test_rows_go_back_by_different_counts(name):
    """Of a left-padded batch, beyond the wrap: each row as it is alone."""
    model, tokens = made(name), (40, 33, 9)
    texts = [ids_of(1, n + 2 * C) for n in tokens]
    expected = [streaming_logits(made(name), text, S, W) for text in texts]
    with patch(model, S, W, slack=SLACK), torch.no_grad():
        cache, back = SinkCache(model), torch.tensor([3, 5, 0])
        padded, mask = torch.zeros(3, 40, dtype=torch.int64), torch.zeros(3, 40, dtype=torch.int64)
        for row, (text, n) in enumerate(zip(texts, tokens, strict=True)):
            part = torch.cat((text[0, : n - back[row]], ids_of(1, int(back[row]))[0]))
            padded[row, 40 - n :], mask[row, 40 - n :] = part, 1
        model(padded, attention_mask=mask, past_key_values=cache)
        take_back(cache, back)
        assert cache.lengths.tolist() == [37, 28, 9]
        for step in range(2 * C - 5):
            now = cache.lengths.tolist()
            token = torch.stack([text[0, at] for text, at in zip(texts, now, strict=True)])[:, None]
            logits = model(token, past_key_values=cache).logits
            for row in range(3):
                assert relative_error(logits[row, 0], expected[row][0, now[row]]) < 1e-4, (row, step)


@pytest.mark.parametrize("slack", [0, 1, SLACK])
def test_more_than_can_be_taken_back(slack):
    """Says how many can be, and leaves everything as it was; an interrupted step counts as well."""
    model, ids = made("mistral-sliding"), ids_of(2, 60)
    with patch(model, S, W, slack=slack) as handle, torch.no_grad():
        assert handle.plan.slack == slack
        cache = SinkCache(model)
        with pytest.raises(ValueError, match="this SinkCache is empty"):
            cache.crop(-1)
        model(ids[:, :40], past_key_values=cache)
        before = copy.deepcopy(cache)
        with pytest.raises(ValueError, match=f"row 0 can take back {slack} of its 40 tokens now, not {slack + 1}"):
            cache.crop(-slack - 1)
        with pytest.raises(ValueError, match=f"slack={slack}"):
            cache.crop(-41)
        found, expected = (model(ids[:, 40:41], past_key_values=used).logits for used in (cache, before))
        assert torch.equal(found, expected)
        for n in range(slack, 0, -1):  # taken back once is not there to be taken back again
            again = copy.deepcopy(cache)
            again.crop(-n)
            with pytest.raises(ValueError, match=f"can take back {slack - n} "):
                again.crop(n - slack - 1)
            model(ids[:, 41:42], past_key_values=again)
            with pytest.raises(ValueError, match=f"can take back {slack - n + 1} "):
                again.crop(n - slack - 2)
        if slack:
            hook = model.lm_head.register_forward_pre_hook(lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                model(ids[:, 41:42], past_key_values=cache)
            hook.remove()
            with pytest.raises(ValueError, match=f"can take back {slack - 1} "):
                cache.crop(-slack)
        for wrong in (1.5, -1.5, None, "a", torch.tensor(-1.0)):
            with pytest.raises(TypeError, match="whole number"):
                cache.crop(wrong)
        cache.crop(torch.tensor(0))
        cache.crop(99)  # as it was once: columns that stay
        assert cache.seen == 41


def test_a_short_text_goes_back_to_any_token():
    """As long as nothing was overwritten; as was in transformers, a positive number is what stays."""
    model, ids = made("llama"), ids_of(1, C + SLACK)
    with patch(model, S, W, slack=SLACK), torch.no_grad():
        cache = SinkCache(model)
        model(ids, past_key_values=cache)
        expected = model(ids[:, 2:9], past_key_values=(SinkCache(model))).logits.shape
        cache.crop(2)
        found = model(ids[:, 2:], past_key_values=cache).logits
        assert expected[1] == 7 and relative_error(found, model(ids).logits[:, 2:]) < 5e-5
        model(ids[:, :1], past_key_values=cache)
        with pytest.raises(ValueError, match=f"can take back {SLACK} "):
            cache.crop(2)
        empty = SinkCache(model)
        model(ids, past_key_values=empty)
        empty.crop(-ids.shape[1])
        assert relative_error(model(ids, past_key_values=empty).logits, model(ids).logits) < 5e-5


def test_models_with_a_state_say_so():
    model = copy.deepcopy(plain("falcon_h1"))
    with patch(model, S, W), torch.no_grad():
        cache = SinkCache(model)
        model(ids_of(1, 9), past_key_values=cache)
        assert not cache.is_croppable
        for call in (lambda: cache.crop(-1), cache.activate_past_recording):
            with pytest.raises(ValueError, match="FalconH1Config has layers with a state of their own"):
                call()
        with pytest.raises(ValueError, match="stateful models|state of their own"):
            model.generate(ids_of(1, 9), prompt_lookup_num_tokens=3, max_new_tokens=5, do_sample=False)


def test_rewind():
    """A Stream goes on as if the tokens had not been: all rows, some, by one number or several, while it generates."""
    model, plain = made("llama"), made("llama")
    with patch(model, S, W, slack=SLACK):
        stream, texts = Stream(model), [row.tolist() for row in ids_of(3, 30)]
        stream.append(texts)

        def go_on(steps: int) -> None:
            for ids in stream.generate(steps, do_sample=False):
                for row, token in enumerate(ids.tolist()):
                    logits = streaming_logits(plain, torch.tensor([texts[row]]), S, W)[0, -1]
                    assert logits.argmax() == token
                    texts[row].append(token)

        go_on(2)
        for n, rows in ((3, None), (2, [1]), ([5, 1], [2, 0])):
            stream.rewind(n, rows)
            for at, row in enumerate(range(3) if rows is None else rows):
                del texts[row][-(n if isinstance(n, int) else n[at]) :]
            assert stream.lengths.tolist() == [len(text) for text in texts]
            new = ids_of(3, 6).tolist()  # beyond what was taken back
            stream.append(new)
            texts = [text + more for text, more in zip(texts, new, strict=True)]
            go_on(2)
        for step, ids in enumerate(stream.generate(4, do_sample=False)):
            for row, token in enumerate(ids.tolist()):
                texts[row].append(token)
            if step == 1:
                stream.rewind(2, [0])
                del texts[0][-2:]
        go_on(1)
        for n, rows, message in (
            (SLACK + 1, None, "can take back"), (1, [3], "rows="), (-1, None, "n=-1"), (1.0, None, "n=1.0"),
            ("a", None, "n='a'"), ([1, 1], [0], "2 numbers, for 1 rows"), (1000, [0], "row 0 holds"),
        ):  # fmt: skip
            with pytest.raises(ValueError, match=message):
                stream.rewind(n, rows)
        stream.rewind(0)
        for waits in (True, False):  # rows that lose nothing stay as they are: with no text, or at their end
            streams = [Stream(model), Stream(model)]
            for other in streams:
                other.append([texts[0][:9], texts[1][:9]])
            end = next(iter(streams[0].generate(1, eos_token_id=[])))[1].item()
            if waits:
                streams[1].reset([1])
            for step, ids in enumerate(streams[1].generate(4, eos_token_id=[end], pad_token_id=0)):
                assert ids[1] == (end if step == 0 and not waits else 0)
                if step == 0:
                    length = streams[1].lengths[1].item()
                    streams[1].rewind([1, 0])
            assert streams[1].lengths[1] == length
        stream.rewind(1, torch.tensor([False, True, False]))
        del texts[1][-1:]
        go_on(1)
        again = Stream(model)
        again.append(texts[0][:18])
        again.rewind(15)  # a token that was taken back is no repetition
        found = [ids.item() for ids in again.generate(4, repetition_penalty=5.0)]
        prompt = torch.tensor([texts[0][:3]])
        assert (
            found == model.generate(prompt, max_new_tokens=4, do_sample=False, repetition_penalty=5.0)[0, 3:].tolist()
        )
