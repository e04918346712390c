"""A model as hubs hold them beside their weights: it keeps to the `Cache` protocol and uses nothing else of a cache.

Its attention is its own, with rotary positions (tables it makes itself, pairs (2i, 2i + 1)) or ALiBi. Tests copy this
file next to a config and load it with ``trust_remote_code=True``.
"""

import math

import torch
from torch import nn
from transformers import DynamicCache, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast


class RemoteConfig(PreTrainedConfig):
    model_type = "remote_of_the_tests"

    def __init__(self, vocab_size=97, width=64, heads=4, num_hidden_layers=3, alibi=False, positions=64, **kwargs):
        self.vocab_size, self.width, self.heads, self.alibi, self.positions = vocab_size, width, heads, alibi, positions
        self.num_hidden_layers = num_hidden_layers
        super().__init__(**kwargs)


class RemoteAttention(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.heads, self.dim, self.layer_idx, self.alibi = (
            config.heads,
            config.width // config.heads,
            layer_idx,
            config.alibi,
        )
        self.qkv, self.out = nn.Linear(config.width, 3 * config.width), nn.Linear(config.width, config.width)
        self.positions = config.positions

    def turn(self, x, position_ids):  # (batch, heads, tokens, dim), the first 8 dims
        angles = torch.arange(self.positions, device=x.device)[:, None] / 10000 ** (torch.arange(0, 8, 2) / 8).to(
            x.device
        )
        cos, sin = torch.stack((angles.cos(), angles.sin()), dim=1).to(x.dtype)[position_ids][:, None].unbind(3)
        a, b = x[..., 0:8:2], x[..., 1:8:2]
        turned = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)
        return torch.cat((turned, x[..., 8:]), dim=-1)

    def forward(self, hidden_states, mask, position_ids, past_key_values):
        batch, tokens, width = hidden_states.shape
        q, k, v = self.qkv(hidden_states).view(batch, tokens, 3, self.heads, self.dim).permute(2, 0, 3, 1, 4)
        if not self.alibi:
            q, k = self.turn(q, position_ids), self.turn(k, position_ids)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        weights = torch.einsum("bhid,bhjd->bhij", q, k) / math.sqrt(self.dim)
        if self.alibi:
            slopes = 2.0 ** (-8 / self.heads * torch.arange(1, self.heads + 1, device=q.device))
            weights = weights + (slopes[:, None, None] * torch.arange(k.shape[2], device=q.device)).to(q.dtype)
        weights = weights.masked_fill(~mask, torch.finfo(weights.dtype).min).softmax(dim=-1)
        return self.out(torch.einsum("bhij,bhjd->bihd", weights, v).reshape(batch, tokens, width))


class RemoteBlock(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(config.width), RemoteAttention(config, layer_idx)
        self.mlp = nn.Sequential(
            nn.LayerNorm(config.width), nn.Linear(config.width, 96), nn.GELU(), nn.Linear(96, config.width)
        )

    def forward(self, hidden_states, *args):
        hidden_states = hidden_states + self.attention(self.norm(hidden_states), *args)
        return hidden_states + self.mlp(hidden_states)


class RemoteForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = RemoteConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.width)
        self.layers = nn.ModuleList(RemoteBlock(config, i) for i in range(config.num_hidden_layers))
        self.norm, self.head = nn.LayerNorm(config.width), nn.Linear(config.width, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.embed

    def forward(
        self, input_ids, attention_mask=None, position_ids=None, past_key_values=None, use_cache=True, **kwargs
    ):
        batch, tokens = input_ids.shape
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        if attention_mask is None:
            attention_mask = torch.ones(batch, past + tokens, dtype=torch.int64, device=input_ids.device)
        if position_ids is None:
            position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)[:, -tokens:]
        mask = torch.ones(past + tokens, past + tokens, dtype=torch.bool, device=input_ids.device).tril()[-tokens:]
        mask = mask & attention_mask[:, None, None].bool()
        hidden_states = self.embed(input_ids)
        for layer in self.layers:
            hidden_states = layer(hidden_states, mask, position_ids, past_key_values)
        return CausalLMOutputWithPast(logits=self.head(self.norm(hidden_states)), past_key_values=past_key_values)
