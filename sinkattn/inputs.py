"""What a patched model's forward is given besides ids: the mask and positions, which have to be those of the text."""

import torch
from torch import Tensor

from .cache import SinkCache


def mask_of(attention_mask, batch: int, tokens: int, cache: SinkCache) -> Tensor | None:
    """The mask's columns of the new tokens, (batch, tokens), or None where nothing is padding."""
    if attention_mask is None:
        return None
    if not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2:
        raise ValueError(
            "attention_mask must be 2D, (batch, tokens): sinkattn decides what is seen, padding is up to you"
        )
    if attention_mask.shape[0] != batch or attention_mask.shape[1] not in (tokens, cache.seen + tokens):
        raise ValueError(
            f"attention_mask {tuple(attention_mask.shape)} does not fit {batch} rows of {tokens} new tokens after "
            f"{cache.seen}: give ({batch}, {tokens}) or ({batch}, {cache.seen + tokens})"
        )
    return attention_mask[:, -tokens:]


def check_ids(ids: Tensor, size: int) -> None:
    """Raise ValueError for ids without an embedding, of which there are `size`."""
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= size:
        raise ValueError(f"input_ids reach from {low} to {high}, the model embeds 0 to {size - 1}")


def check_values(tokens: int, mask, position_ids, places, cache: SinkCache) -> None:
    """Raise ValueError for right padding, and for positions that are not the text's."""
    if mask is not None and bool((mask[:, :-1] & ~mask[:, 1:]).any()):
        raise ValueError("attention_mask has zeros after ones: pad on the left (tokenizer.padding_side = 'left')")
    if position_ids is None:
        return
    new = torch.ones(1, tokens, dtype=torch.bool, device=position_ids.device) if mask is None else mask
    text, is_right = new.cumsum(-1) - 1, position_ids.shape[-1] == tokens
    if is_right and position_ids.dim() == 3:  # time, height and width, perhaps behind the count of tokens
        text = text + cache.top[:, None] + 1 if cache.seen else text
        is_text = bool((places == places[..., :1]).all())
        is_right = not bool(((position_ids[-3:] != (text if is_text else places.movedim(-1, 0))) & new).any())
    elif is_right:
        text = text + cache.lengths[:, None] if cache.seen else text
        is_right = not bool(((position_ids != text) & new).any())
    if not is_right:
        raise ValueError(
            "position_ids do not count each row's tokens from its first one on (packed texts, or padding "
            "counted): leave position_ids out, sinkattn counts them"
        )
