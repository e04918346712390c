"""Pictures in a text, of models that count in three (M-RoPE): in the prompt, in later turns, one after another."""

import copy

import pytest
import torch
import transformers

import sweep
from oracle import relative_error, streaming_logits
from sinkattn import SinkCache, patch
from tiny import spread

S, W = 4, 10
C = S + W
PICTURE, VIDEO, BEGIN, END = 95, 94, 93, 92
KINDS = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"]
GREEDY = dict(max_new_tokens=6, do_sample=False, suppress_tokens=[0, END, BEGIN, VIDEO, PICTURE, 96])
GRIDS = {"small": (1, 4, 4), "wide": (1, 4, 6), "tall": (1, 6, 4)}


def vision_model(kind: str):
    """Qwen2-VL, Qwen2.5-VL (sections of time, height, width one after another) or Qwen3-VL (interleaved), tiny."""
    text = {name: sweep.SMALL[name] for name in ("vocab_size", "hidden_size", "intermediate_size", "pad_token_id")}
    text |= dict(num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64)
    text["rope_parameters"] = dict(rope_type="default", rope_theta=1e4, mrope_section=[2, 3, 3])
    vision = dict(depth=2, num_heads=2, patch_size=4, hidden_size=64)
    ids = dict(image_token_id=PICTURE, video_token_id=VIDEO, vision_start_token_id=BEGIN, vision_end_token_id=END)
    if kind == "qwen2_vl":
        vision |= dict(embed_dim=32)
        classes = transformers.Qwen2VLConfig, transformers.Qwen2VLForConditionalGeneration
    elif kind == "qwen2_5_vl":
        vision |= dict(
            hidden_size=32, out_hidden_size=64, intermediate_size=32, window_size=16, fullatt_block_indexes=[1]
        )
        classes = transformers.Qwen2_5_VLConfig, transformers.Qwen2_5_VLForConditionalGeneration
    else:
        text |= dict(head_dim=16)
        text["rope_parameters"]["mrope_interleaved"] = True
        vision |= dict(hidden_size=32, out_hidden_size=64, intermediate_size=32)
        vision |= dict(deepstack_visual_indexes=[0], num_position_embeddings=16)
        classes = transformers.Qwen3VLConfig, transformers.Qwen3VLForConditionalGeneration
    torch.manual_seed(0)
    config = classes[0](text_config=text, vision_config=vision, attn_implementation="eager", **ids)
    model = classes[1](config).eval()
    spread(model)
    return model


def text(tokens):
    return torch.randint(3, 90, (1, tokens))


class Shown:
    """Text with pictures: ids (1, n) and what a processor gives for them."""

    def __init__(self, *parts):
        """parts: numbers of text tokens, and names of GRIDS."""
        made, grids = [], []
        for part in parts:
            if isinstance(part, int):
                made.append(text(part))
            else:
                grids.append(GRIDS[part])
                tokens = GRIDS[part][1] * GRIDS[part][2] // 4
                made.append(torch.tensor([[BEGIN, *[PICTURE] * tokens, END]]))
        self.ids, self.grids = torch.cat(made, dim=1), grids
        self.pixels = [torch.randn(h * w, 96) for _, h, w in grids]

    @classmethod
    def of(cls, *shown, ids=None):
        """Several one after another; ids: of all of them, if there is more between them."""
        joined = cls(1)
        joined.ids = torch.cat([x.ids for x in shown], dim=1) if ids is None else ids
        joined.grids, joined.pixels = [y for x in shown for y in x.grids], [y for x in shown for y in x.pixels]
        return joined

    @property
    def pictures(self) -> dict:
        if not self.grids:
            return {}
        types = (self.ids == PICTURE).int()
        return dict(
            pixel_values=torch.cat(self.pixels), image_grid_thw=torch.tensor(self.grids), mm_token_type_ids=types
        )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("parts", [(5, "wide", 40), (3, "wide", 4, "small", 30), (20, "tall", 17, "wide", 9)])
@torch.no_grad()
def test_exact(kind, parts):
    """The tokens of a picture have three positions each, and what follows goes on behind them, wherever it is cut."""
    model, shown = vision_model(kind), Shown(*parts)
    ids, pictures = shown.ids, shown.pictures
    twin, seen = copy.deepcopy(model), {}
    hook = twin.model.language_model.register_forward_pre_hook(
        lambda _, __, given: seen.update(given), with_kwargs=True
    )
    dense = twin(ids, **pictures, use_cache=False).logits
    hook.remove()
    embeds, places = seen["inputs_embeds"], seen["position_ids"][-3:]  # (1, n, width), (3, 1, n)
    assert (places[0] != places[1]).any()

    def oracle(t, length):
        """Sinks where they stand, the window moved so that token t stands where token C - 1 did."""
        at = torch.arange(length) if length > t else torch.cat((torch.arange(S), torch.arange(t - W + 1, t + 1)))
        moved = places[:, :, at].clone()
        moved[:, :, S:] += (places[:, :, [min(t, C - 1)]] - places[:, :, [t]]) if t >= C else 0
        held = twin.model.language_model(inputs_embeds=embeds[:, at], position_ids=moved, use_cache=False)
        return twin.lm_head(held.last_hidden_state)

    def pieces(size):
        """Runs of text cut into pieces, and of pictures whole: (ids, what they show)."""
        begin, number = 0, iter(range(len(shown.grids)))
        is_picture = (ids[0] == PICTURE).int().tolist() + [-1]
        for end in range(1, len(is_picture)):
            full = not is_picture[begin] and end - begin == size
            if is_picture[end] != is_picture[begin] or full:
                part = copy.copy(shown)
                part.ids, which = ids[:, begin:end], [next(number)] if is_picture[begin] else []
                part.grids, part.pixels = [shown.grids[i] for i in which], [shown.pixels[i] for i in which]
                yield part.ids, part.pictures
                begin = end

    def fed(size):
        cache = SinkCache(model)
        return torch.cat([model(x, **more, past_key_values=cache).logits for x, more in pieces(size)], dim=1)

    with patch(model, S, 70):
        assert relative_error(model(ids, **pictures).logits, dense) < 1e-4
        for size in (1, 7):
            assert relative_error(fed(size), dense) < 1e-4
    with patch(model, S, W):
        whole = model(ids, **pictures).logits
        if kind != "qwen3_vl":  # which adds to hidden states of pictures between layers, out of the oracle's sight
            assert relative_error(whole, streaming_logits(twin, ids, S, W, oracle)) < 1e-4
        for size in (1, 5, C):
            assert relative_error(fed(size), whole) < 1e-4
        greedy = model.generate(ids, **pictures, **GREEDY)
        longer = torch.nn.functional.pad(pictures["mm_token_type_ids"], (0, 6))
        logits = model(greedy, **{**pictures, "mm_token_type_ids": longer}).logits
        assert torch.equal(logits[:, ids.shape[1] - 1 : -1, 1:92].argmax(-1) + 1, greedy[:, ids.shape[1] :])
        text_alone = text(3 * C)
        assert relative_error(model(text_alone).logits, streaming_logits(twin, text_alone, S, W)) < 1e-4


TURNS = {  # what two turns show
    "a picture, then text": ((3, "wide", 2), (9,)),
    "text, then a picture": ((8,), (2, "small", 3)),
    "a picture each": ((2, "small", 3), (1, "tall", 4)),
    "two, then two": ((2, "small", "wide", 3), ("small", 2, "tall", 4)),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shows", list(TURNS))
@torch.no_grad()
def test_turns(kind, shows):
    """A conversation with pictures: the text of an unpatched model that reads it all from the beginning."""
    model = vision_model(kind)
    first, second = (Shown(*parts) for parts in TURNS[shows])
    answer = model.generate(first.ids, **first.pictures, **GREEDY)
    ids = torch.cat((answer, second.ids), dim=1)
    whole, new = Shown.of(first, second, ids=ids), Shown.of(second, ids=ids)
    expected = model.generate(ids, **whole.pictures, **GREEDY)[:, -6:]
    mask = torch.ones_like(ids)
    with patch(model, S, 90):
        for how in ("all again", "all ids, the new pictures", "new ids alone", "new ids, full mask", "forward"):
            cache = SinkCache(model)
            if how == "forward":
                model(first.ids, **first.pictures, past_key_values=cache)
                model(answer[:, first.ids.shape[1] : -1], past_key_values=cache)
            else:
                found = model.generate(first.ids, **first.pictures, past_key_values=cache, **GREEDY)
                assert torch.equal(found, answer)
            model.generate(text(5), **GREEDY)  # another text in between
            given = dict(input_ids=ids, **(whole if how == "all again" else new).pictures)
            if how not in ("all again", "all ids, the new pictures"):
                alone = Shown.of(second, ids=ids[:, cache.seen :])
                given = dict(input_ids=alone.ids, **alone.pictures)
            given |= dict(attention_mask=mask) if how == "new ids, full mask" else {}
            assert torch.equal(model.generate(**given, past_key_values=cache, **GREEDY)[:, -6:], expected), how
            third = text(7)
            more = torch.cat((ids, expected, third), dim=1)
            longer = Shown.of(first, second, ids=more)
            found = model.generate(more, past_key_values=cache, **GREEDY)[:, -6:]
            assert torch.equal(found, model.generate(more, **longer.pictures, **GREEDY)[:, -6:]), how


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("last", [5, 1])  # text behind the second picture of row 0; row 1's turn has 15 tokens
@torch.no_grad()
def test_rows_of_a_batch(kind, last):
    """Rows show different pictures, and in later turns too: each gives what it gives alone."""
    model = vision_model(kind)
    firsts, seconds = [Shown(9, "small", 2), Shown(1, "wide", 2)], [Shown(2, "tall", last), Shown(6, "small", 3)]

    def batch(rows):
        width = max(x.shape[1] for x in rows)
        ids = torch.cat([torch.nn.functional.pad(x, (width - x.shape[1], 0)) for x in rows])
        mask = torch.cat([torch.nn.functional.pad(torch.ones_like(x), (width - x.shape[1], 0)) for x in rows])
        return ids, mask

    with patch(model, S, W):
        alone = []
        for first, second in zip(firsts, seconds, strict=True):
            cache = SinkCache(model)
            answer = model.generate(first.ids, **first.pictures, past_key_values=cache, **GREEDY)
            ids = torch.cat((answer, second.ids), dim=1)
            found = model.generate(ids, **Shown.of(second, ids=ids).pictures, past_key_values=cache, **GREEDY)
            alone.append((answer[:, -6:], found[:, -6:]))
        ids, mask = batch([x.ids for x in firsts])
        cache, shown = SinkCache(model), Shown.of(*firsts, ids=ids)
        answer = model.generate(ids, attention_mask=mask, **shown.pictures, past_key_values=cache, **GREEDY)
        assert torch.equal(answer[:, -6:], torch.cat([x for x, _ in alone]))
        new = [torch.cat((answer[i : i + 1, -1:], x.ids), dim=1) for i, x in enumerate(seconds)]
        new, new_mask = batch(new)  # the answer's last token was not fed yet
        given = [(new, new_mask, Shown.of(*seconds, ids=new))]
        if new_mask.all():
            ids, mask = torch.cat((answer[:, :-1], new), dim=1), torch.nn.functional.pad(mask, (0, 21), value=1)
            pairs = [x for pair in zip(firsts, seconds, strict=True) for x in pair]
            given += [(ids, mask, Shown.of(*pairs, ids=ids)), (ids, mask, Shown.of(*seconds, ids=ids))]
        for ids, mask, shown in given:
            again = copy.deepcopy(cache)
            found = model.generate(ids, attention_mask=mask, **shown.pictures, past_key_values=again, **GREEDY)
            assert torch.equal(found[:, -6:], torch.cat([x for _, x in alone]))


@torch.no_grad()
def test_videos():
    """Their seconds per grid are counted too, and those of the history are left out."""
    model = vision_model("qwen2_5_vl")

    def shown(ids, *seconds):
        return dict(
            input_ids=ids, mm_token_type_ids=(ids == VIDEO).int() * 2, second_per_grid_ts=torch.tensor(seconds),
            video_grid_thw=torch.tensor([[2, 4, 4]] * len(seconds)), pixel_values_videos=pixels[-32 * len(seconds) :],
        )  # fmt: skip

    video, pixels = torch.tensor([[BEGIN, *[VIDEO] * 8, END]]), torch.randn(64, 96)
    first, second = torch.cat((text(4), video), dim=1), torch.cat((video, text(5)), dim=1)
    begin = {**shown(first, 0.25), "pixel_values_videos": pixels[:32]}
    ids = torch.cat((model.generate(**begin, **GREEDY), second), dim=1)
    expected = model.generate(**shown(ids, 0.25, 0.5), **GREEDY)[:, -6:]
    with patch(model, S, 90):
        for given in (shown(ids, 0.25, 0.5), shown(ids, 0.5), shown(ids[:, first.shape[1] + 5 :], 0.5)):
            cache = SinkCache(model)
            model.generate(**begin, past_key_values=cache, **GREEDY)
            assert torch.equal(model.generate(**given, past_key_values=cache, **GREEDY)[:, -6:], expected)


@torch.no_grad()
def test_what_does_not_fit_loses_nothing():
    model, shown = vision_model("qwen3_vl"), Shown(3, "wide", 4)
    ids, pictures, before = shown.ids, shown.pictures, text(20)
    places = model.model.get_rope_index(ids, pictures["mm_token_type_ids"], pictures["image_grid_thw"])[0]
    with patch(model, S, W):
        cache = SinkCache(model)
        model(before, past_key_values=cache)
        expected = model(ids, **pictures, past_key_values=copy.deepcopy(cache)).logits
        for change, message in (
            (dict(mm_token_type_ids=None), "without mm_token_type_ids"),
            (dict(image_grid_thw=torch.tensor([[1, 4, 4]])), "do not fit the text"),
            (dict(mm_token_type_ids=pictures["mm_token_type_ids"] * 2), "do not fit the text"),
            (dict(position_ids=places), "leave position_ids out"),
            (dict(position_ids=torch.arange(len(ids[0]))[None]), "leave position_ids out"),
        ):
            with pytest.raises(ValueError, match=message):
                model(ids, **{**pictures, **change}, past_key_values=cache)
        again = copy.deepcopy(cache)
        assert torch.equal(model(ids, **pictures, past_key_values=again).logits, expected)
        assert torch.equal(model(ids, **pictures, position_ids=places + 20, past_key_values=cache).logits, expected)


@torch.no_grad()
def test_a_row_that_starts_anew_counts_anew():
    model, shown, after = vision_model("qwen2_5_vl"), Shown(3, "wide", 4), text(3 * C)
    with patch(model, S, W):
        cache = SinkCache(model)
        model(
            shown.ids.expand(2, -1),
            **Shown.of(shown, shown, ids=shown.ids.expand(2, -1)).pictures,
            past_key_values=cache,
        )
        goes_on = model(after, past_key_values=cache.picked(torch.tensor([1]))).logits
        cache.forget(torch.tensor([0]))
        assert cache.top.tolist() == [-1, 11]
        found = torch.cat([model(x.expand(2, -1), past_key_values=cache).logits for x in after.split(11, dim=1)], dim=1)
        assert relative_error(found[:1], model(after).logits) < 1e-4
        assert relative_error(found[1:], goes_on) < 1e-4
