"""What the experiments share: models and texts, four ways of reading a text, and a plain definition.

dense       the unpatched model and its whole cache
window      the last C tokens, no sinks: patch(model, 0, C)
sinks       S sinks and the last W = C - S tokens: patch(model, S, W)
recompute   for every token the unpatched model anew, over what the tokenizer puts in front and the last tokens,
            C in all: what the paper calls sliding window with re-computation
"""

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
import typer
from common import default_device
from torch import Tensor, nn
from transformers import DynamicCache, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.llama.modeling_llama import LlamaAttention

from sinkattn import SinkCache, demo, patch
from sinkattn.models import find

EXPERIMENTS = ("dense", "window", "sinks", "recompute")
COLOURS = {"dense": "tab:red", "window": "tab:orange", "sinks": "tab:blue", "recompute": "tab:green"}
BLOCK = 1 << 16  # characters tokenized at a time


# ------------------------------------------------------------------------------------------------------------- models


class SinkAttention(LlamaAttention):
    """Llama's attention with one logit a head that joins the softmax's denominator: fixed at 0, or learned."""

    def __init__(self, config, layer_idx: int):
        super().__init__(config, layer_idx)
        self.sinks = nn.Parameter(torch.zeros(config.num_attention_heads), requires_grad=config.learns_sinks)

    def forward(self, *args, **kwargs):
        return super().forward(*args, s_aux=self.sinks, **kwargs)


class SinkLlama(LlamaForCausalLM):
    """A Llama whose layers have `SinkAttention`; config.learns_sinks says whether the logits are trained."""

    def __init__(self, config):
        super().__init__(config)
        for index, layer in enumerate(self.model.layers):
            layer.self_attn = SinkAttention(config, index)
        self.post_init()


def causal_attention(module, query, key, value, attention_mask, scaling=None, s_aux=None, **_) -> tuple[Tensor, None]:
    """Causal SDPA with no mask: transformers would build one inside torch.compile, and wait for the GPU outside it.

    s_aux: (num_heads,), a logit per head for one more key, with a value of zeros, that every query sees. It costs a row
    in front, and 8 more dims that carry the logit.
    """
    query, key = query.to(value.dtype), key.to(value.dtype)  # the rotation left them in float32
    if s_aux is None:
        output = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
    else:
        dim, logits = value.shape[-1], (s_aux / scaling).to(query.dtype)[None, :, None, None]
        query = F.pad(torch.cat((query, logits.expand(*query.shape[:3], 1)), dim=-1), (0, 7, 1, 0))
        key, value = F.pad(key, (0, 8, 1, 0)), F.pad(value, (0, 8, 1, 0))
        first = torch.zeros_like(key[:, :, :1])
        first[..., dim] = 1
        key = torch.cat((first, key[:, :, 1:]), dim=2)
        output = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
        output = output[:, :, 1:, :dim]
    return output.transpose(1, 2).contiguous(), None


def open_model(
    name: str, device: str | None, dtype: str, **kwargs
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, int]:
    """Model (eval mode), tokenizer, and how many tokens the tokenizer puts in front of a text.

    name: as in `sinkattn.models.find`: a folder, a hub name, a GGUF file, "demo", "smollm2". kwargs: of both
    `from_pretrained`.
    """
    kwargs = {**find(name), **kwargs}
    transformers.logging.set_verbosity_error()  # it would warn that the text gets longer than the context
    transformers.logging.disable_progress_bar()
    config = transformers.AutoConfig.from_pretrained(**kwargs)
    kind = SinkLlama if config.architectures == ["SinkLlama"] else transformers.AutoModelForCausalLM
    if kind is SinkLlama:
        transformers.AttentionInterface.register("causal_sdpa", causal_attention)
        kwargs = {**kwargs, "attn_implementation": "causal_sdpa"}
    model = kind.from_pretrained(dtype=dtype, **kwargs).to(device or default_device()).eval()
    kwargs.pop("attn_implementation", None)
    tokenizer = transformers.AutoTokenizer.from_pretrained(**kwargs)
    return model, tokenizer, len(tokenizer("").input_ids)


# -------------------------------------------------------------------------------------------------------------- texts


def text_blocks(
    text: Path | None, dataset: str | None = None, task: str | None = None, split: str = "test", column: str = "text"
) -> Iterator[str]:
    """The text in pieces that end with a line: a file, a dataset's rows, or the held-out modules of the demo."""
    if dataset is not None:
        try:
            from datasets import load_dataset
        except ImportError as error:
            raise typer.BadParameter("--dataset needs the datasets library: pip install datasets") from error
        for row in load_dataset(dataset, task, split=split, streaming=True):
            if column not in row:
                raise typer.BadParameter(f"--column {column}: the rows of {dataset} have {', '.join(row)}")
            yield row[column] + "\n"
    elif text is not None:
        with text.open(encoding="utf-8") as file:
            while block := file.read(BLOCK):
                yield block + file.readline(BLOCK)
    else:
        lines = demo.held_out_text().splitlines(keepends=True)
        while lines:
            yield "".join(lines[:1000])
            del lines[:1000]


def token_ids(tokenizer: PreTrainedTokenizerBase, blocks: Iterator[str]) -> Iterator[int]:
    """The ids of a text, block by block, with nothing in front: what is held is one block."""
    for block in blocks:
        yield from tokenizer(block, add_special_tokens=False).input_ids


def take(ids: Iterator[int], count: int, start: tuple[int, ...] = ()) -> list[int]:
    """`start`, and the next ids behind it, `count` in all."""
    taken = [*start, *(token for _, token in zip(range(count - len(start)), ids, strict=False))]
    if len(taken) < count:
        raise typer.BadParameter(f"the text ends after {len(taken)} tokens, {count} were asked for: give a longer one")
    return taken


def side_by_side(tokenizer: PreTrainedTokenizerBase, ids: Iterator[int], texts: int, tokens: int) -> Tensor:
    """(texts, tokens) int64: consecutive pieces of one stream, each with what the tokenizer puts in front."""
    start = tuple(tokenizer("").input_ids)
    return torch.tensor([take(ids, tokens, start) for _ in range(texts)])


class Text:
    """One text, piece by piece. last: the id that is fed next, for the one before it foretells it."""

    def __init__(self, ids: Iterator[int], device: torch.device):
        self.ids, self.device, self.last = ids, device, take(ids, 1)

    def next(self, count: int) -> tuple[Tensor, list[int]]:
        """(1, count) int64 ids to feed, and the `count` ids each of which follows one of them."""
        following = take(self.ids, count)
        fed, self.last = [*self.last, *following[:-1]], following[-1:]
        return torch.tensor([fed], device=self.device), following


# ------------------------------------------------------------------------------------------------------------ reading


class Reader:
    """One text, or several side by side, read by a model in one of the four ways.

    model: unpatched; `with Reader(...)` patches it where the way asks for it, and brings it back.
    experiment: one of EXPERIMENTS. sink_size, window_size: S and W, tokens; the other ways get C = S + W.
    front: tokens at the start that re-computation keeps in front of every window. batch: its windows at a time.
    """

    def __init__(
        self, model: PreTrainedModel, experiment: str, sink_size: int, window_size: int, front: int, batch: int = 16
    ):
        self.model, self.experiment, self.front, self.batch = model, experiment, front, batch
        self.capacity = sink_size + window_size
        self.sink_size = sink_size if experiment == "sinks" else 0
        self.handle = self.cache = None
        if experiment in ("window", "sinks"):
            self.handle = patch(model, self.sink_size, self.capacity - self.sink_size)
        self.reset()

    def reset(self) -> None:
        """Begin a new text."""
        if self.handle is not None:
            self.cache = SinkCache(self.model)
        elif self.experiment == "dense":
            self.cache = DynamicCache(config=self.model.config)
        self._ids, self._seen = None, 0  # the last C ids, and how many there were: of re-computation

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *_) -> None:
        if self.handle is not None:
            self.handle.remove()

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values held."""
        layers = () if self.cache is None else self.cache.layers
        return sum(x.nbytes for layer in layers if layer.is_initialized for x in (layer.keys, layer.values))

    @property
    def peak(self) -> int:
        """Bytes at the most since `forget_peak`, on a GPU; those of weights and cache on a CPU."""
        if self.model.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.model.device)
        return sum(x.nbytes for x in self.model.parameters()) + self.nbytes

    @torch.no_grad()
    def feed(self, ids: Tensor, columns: Tensor | None = None) -> Tensor:
        """Read on. ids: (rows, n) int64; columns: which of the n logits are asked for, all by default.

        Returns (rows, len(columns), vocabulary): what is expected after each of those tokens.
        """
        columns = torch.arange(ids.shape[1]) if columns is None else columns
        if self.cache is not None:
            logits = self.model(ids, past_key_values=self.cache, use_cache=True).logits
            return logits[:, columns.to(logits.device)]
        return self._recompute(ids, columns.to(ids.device))

    def _recompute(self, ids: Tensor, columns: Tensor) -> Tensor:
        held = 0 if self._ids is None else self._ids.shape[1]
        known = ids if self._ids is None else torch.cat((self._ids, ids), dim=1)
        if held == self._seen:  # nothing is forgotten yet
            self._first = known[:, : self.front]
        ends, early = columns + held + 1, columns + self._seen < self.capacity
        pieces = [known.new_zeros(len(ids), 0, self.model.config.vocab_size, dtype=self.model.dtype)]
        if early.any():  # all of them rows of one forward
            rows = ends[early] - 1
            pieces.append(self.model(known[:, : rows.max() + 1], use_cache=False).logits[:, rows])
        late = ends[~early]
        for part in late.split(self.batch) if len(late) else ():
            recent = [known[:, end - self.capacity + self.front : end] for end in part.tolist()]
            windows = torch.cat([torch.cat((self._first, window), dim=1) for window in recent])
            logits = self.model(windows, use_cache=False, logits_to_keep=1).logits
            pieces.append(logits.unflatten(0, (len(part), len(ids))).squeeze(2).transpose(0, 1))
        self._ids, self._seen = known[:, -self.capacity :], self._seen + ids.shape[1]
        return torch.cat(pieces, dim=1)


def ranges(tokens: int, first: int) -> list[tuple[int, int]]:
    """Position ranges that double: [0, first), [first, 2 first), ... up to `tokens`."""
    borders = [0, min(first, tokens)]
    while borders[-1] < tokens:
        borders.append(min(2 * borders[-1], tokens))
    return list(zip(borders, borders[1:], strict=False))


def losses(reader: Reader, ids: Tensor, chunk: int = 512, wanted: Tensor | None = None) -> Tensor:
    """Loss of every token after the first, or of those in the columns `wanted` alone.

    ids: (rows, T + 1) int64. wanted: (n,) int64, increasing, of 1 to T. Returns (rows, n) float32. Both on the CPU.
    """
    wanted, found = torch.arange(1, ids.shape[1]) if wanted is None else wanted, []
    for begin in range(0, ids.shape[1] - 1, chunk):
        end = min(begin + chunk, ids.shape[1] - 1)
        columns = wanted[(begin < wanted) & (wanted <= end)]
        logits = reader.feed(ids[:, begin:end], columns - 1 - begin)
        targets = ids[:, columns.to(ids.device)]
        found.append(F.cross_entropy(logits.mT.float(), targets, reduction="none").cpu())
    return torch.cat(found, dim=1)


# -------------------------------------------------------------------------------------------------- the definition


def rotate(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """RoPE, half-split. x (..., T, head_dim), positions (T,)."""
    half = x.shape[-1] // 2
    frequencies = theta ** (-torch.arange(half, device=x.device, dtype=torch.float64) / half)
    angles = positions[:, None] * frequencies
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def through_layers(
    model: LlamaForCausalLM, ids: Tensor, attend: Callable[[int, Tensor, Tensor, Tensor], Tensor]
) -> Tensor:
    """The last hidden states of a Llama, normalised: (B, T, hidden). Plain PyTorch on its weights, nothing of sinkattn.

    ids: (B, T) int64. attend: called with a layer's index and its q, k, v, each (B, heads, T, head_dim), not rotated, a
    key for every query head; returns what they attend to, of the same shape.
    """
    hidden = model.model.embed_tokens(ids)
    for index, layer in enumerate(model.model.layers):
        attention, states = layer.self_attn, layer.input_layernorm(hidden)
        q, k, v = (
            projection(states).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        hidden = hidden + attention.o_proj(attend(index, q, k, v).transpose(1, 2).flatten(2))
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return model.model.norm(hidden)


@torch.no_grad()
def plain_forward(
    model: LlamaForCausalLM,
    ids: Tensor,
    sink_size: int,
    window_size: int,
    positions: Tensor | None = None,
    watch: Callable[[int, int, Tensor, Tensor], None] | None = None,
    chunk: int = 256,
) -> Tensor:
    """`through_layers` with sinks + window by their definition.

    The query at t sees j < S at distance min(t, S + W - 1) - j and t - W < j <= t at distance t - j.

    ids: (B, T) int64. positions: (T,) int64, increasing, of each column in the text, 0, 1, 2, ... by default. Tokens
    may be left out between the sinks and a column: what follows it layers * (W - 1) tokens later does not know.
    watch: called with layer, first column of a chunk of queries, their shares of attention (B, heads, rows, keys), and
    the columns (keys,) of the keys.

    Returns the last hidden states, normalised: (B, T, hidden), in the dtype of the model.
    """
    theta = model.config.rope_parameters["rope_theta"]
    columns = torch.arange(ids.shape[1], device=ids.device)
    positions = columns if positions is None else positions

    def attend(index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        attention = model.model.layers[index].self_attn
        q_window, k = rotate(q, positions, theta), rotate(k, positions, theta)
        q_sink = rotate(q, positions.clamp(max=sink_size + window_size - 1), theta)
        outputs = []
        for start in range(0, ids.shape[1], chunk):
            rows = slice(start, start + chunk)
            first = max(0, start - window_size + 1)
            seen = torch.cat([columns[: min(sink_size, first)], columns[first : start + chunk]])
            t, j, keys = positions[rows, None], positions[seen], k[:, :, seen].mT
            scores = torch.where(j < sink_size, q_sink[:, :, rows] @ keys, q_window[:, :, rows] @ keys)
            visible = (j <= t) & ((j < sink_size) | (j > t - window_size))
            scores = (scores * attention.head_dim**-0.5).masked_fill(~visible, -math.inf)
            if hasattr(attention, "sinks"):
                logits = attention.sinks[None, :, None, None].expand(*scores.shape[:3], 1)
                scores = torch.cat((scores, logits.to(scores.dtype)), dim=-1)
            share = scores.softmax(-1)[..., : len(seen)]
            if watch is not None:
                watch(index, start, share, seen)
            outputs.append(share @ v[:, :, seen])
        return torch.cat(outputs, 2)

    return through_layers(model, ids, attend)
