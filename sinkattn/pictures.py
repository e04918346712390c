"""Pictures in a text, of models that count in three (M-RoPE): where their tokens stand, and which of them are new."""

import inspect

import torch
from torch import Tensor, nn

from .cache import SinkCache

TEXT = {"input_ids", "attention_mask", "mm_token_type_ids"}  # what is counted besides pictures, column by column


class Pictures:
    """module: the part of a model that counts, see `introspect.counts_in_three`. names: arguments of pictures alone."""

    def __init__(self, module: nn.Module):
        takes = inspect.signature(module.get_rope_index).parameters.values()
        takes = [x for x in takes if x.kind is not inspect.Parameter.VAR_KEYWORD]
        self.module, self.takes = module, [x.name for x in takes]
        self.needs = [x.name for x in takes if x.default is inspect.Parameter.empty]
        self.names = {*self.takes, "pixel_values", "pixel_values_videos", "mm_encoder_outputs"} - TEXT

    def places_of(self, kwargs: dict, mask: Tensor | None, cache: SinkCache | None) -> Tensor | None:
        """Three positions of every new token, (batch, tokens, 3), where pictures give them (M-RoPE), else None.

        They go on after the largest that the row has had. Where not the pictures are given, but what has become of
        them, position_ids, (3 or 4, batch, tokens), say where they stand.
        """
        ids, said = kwargs.get("input_ids"), kwargs.get("position_ids")
        batch, tokens = (kwargs["inputs_embeds"] if ids is None else ids).shape[:2]
        if isinstance(said, Tensor) and said.dim() == 3 and said.shape[-1] == tokens:
            said = said[-3:].movedim(0, -1).expand(batch, -1, 3)
            if ids is None or kwargs.get("mm_encoder_outputs"):
                return said
        else:
            said = None
        places = self._counted(kwargs, mask)
        if places is None:
            return said
        return places + cache.top[:, None, None] + 1 if cache is not None and cache.seen else places

    def _counted(self, given: dict, mask: Tensor | None) -> Tensor | None:
        """Time, height and width of every token, (batch, tokens, 3) int64 from 0 on in each row; None without pictures.

        given: what a forward was given, of new tokens alone. mask: (batch, tokens) bool or None. Raises ValueError for
        arguments that do not fit each other.
        """
        if not any(isinstance(given.get(name), Tensor) for name in self.names):
            return None
        given = {name: given[name] for name in self.takes if given.get(name) is not None}
        if missing := [name for name in ("input_ids", *self.needs) if name not in given]:
            raise ValueError(f"pictures without {missing[0]}, by which their tokens are found: give them too")
        if "mm_token_type_ids" in given:
            given["mm_token_type_ids"] = given["mm_token_type_ids"][:, -given["input_ids"].shape[1] :]
        if mask is not None:
            given["attention_mask"] = mask.long()
        try:
            return self.module.get_rope_index(**given)[0][-3:].movedim(0, -1)
        except (StopIteration, TypeError, RuntimeError, IndexError) as error:
            names = ", ".join(sorted(given))
            raise ValueError(f"pictures do not fit the text: {names} contradict each other ({error!r})") from error

    def forget(self, given: dict, ids: Tensor, held: int) -> None:
        """Take the pictures of the first `held` columns out of arguments, if those of the whole text are given.

        ids: (batch, columns), the whole text. Pictures are in the order of rows, and of columns in them.
        """
        config = self.module.config
        for kind, pixels in (("image", "pixel_values"), ("video", "pixel_values_videos")):
            grid, token = given.get(f"{kind}_grid_thw"), getattr(config, f"{kind}_token_id", None)
            if grid is None or token is None:
                continue
            own = (ids == token).to(grid.device)
            patches, total, old = grid.prod(-1), own.sum(1), own[:, :held].sum(1)
            tokens = patches // config.vision_config.spatial_merge_size**2
            if not old.any() or tokens.sum() != total.sum():  # those of the new columns alone
                continue
            first, row_first = tokens.cumsum(0) - tokens, total.cumsum(0) - total
            row = (first[:, None] >= row_first).sum(1) - 1
            is_new = first - row_first[row] >= old[row]
            kept = {f"{kind}_grid_thw": is_new, pixels: is_new.repeat_interleave(patches)}
            if kind == "video":
                kept |= {name: is_new for name in ("second_per_grid_ts", "second_per_grids")}
            for name in kept.keys() & given.keys():
                if not is_new.any():
                    del given[name]
                elif given[name] is not None:
                    held_of = torch.as_tensor(given[name])
                    given[name] = held_of[kept[name].to(held_of.device)]
