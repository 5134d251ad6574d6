"""Hugging Face's layer of LongT5, the peer of nn.LocalAttention in local_attention.py."""

import torch
from torch import Tensor, nn
from transformers import LongT5Config
from transformers.models.longt5.modeling_longt5 import LongT5LocalAttention, _get_local_attention_mask

from spade_ext.nn import LocalAttention


class LongT5Layer(nn.Module):
    """Hugging Face's local self-attention of LongT5, with the weights of ours; its scores have no scale."""

    def __init__(self, ours: LocalAttention, L: int):
        super().__init__()
        D, H, radius = ours.d_model, ours.n_heads, ours.window[0]
        config = LongT5Config(d_model=D, num_heads=H, d_kv=D // H, local_radius=radius, dropout_rate=0.0)
        self.layer = LongT5LocalAttention(config, has_relative_attention_bias=True)
        self.mask = _get_local_attention_mask(torch.ones(1, L), radius + 1, torch.device("cpu"))
        with torch.no_grad():
            q, k, v = ours.qkv.weight.chunk(3)
            for name, weight in {"q": q * (D // H) ** -0.5, "k": k, "v": v, "o": ours.o.weight}.items():
                getattr(self.layer, name).weight.copy_(weight)
            self.layer.relative_attention_bias.weight.copy_(ours.position.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, self.mask)[0]
