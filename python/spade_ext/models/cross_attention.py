# Copyright 2026 The spade-ext developers.
"""Attention of a decoder's tokens to an encoder's output."""

import math
from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers.cache_utils import EncoderDecoderCache

from ..nn import Linear, LocalAttention
from .mixers import AttentionWeights, ChoosesImplementation, is_step

if TYPE_CHECKING:
    from .configuration_spade import SpadeConfig


class CrossAttention(ChoosesImplementation):
    """Multi-head attention to all of an encoder's real tokens, whose keys and values are made once a cache."""

    def __init__(self, config: "SpadeConfig", layer: int):
        super().__init__()
        self.set_reach(window=None, chunk_size=None, causal=False)
        width = config.hidden_size
        self.n_heads, self.layer, self.dropout = config.num_attention_heads, layer, config.attention_dropout
        self.q = Linear(width, width, bias=False)
        self.kv = Linear(width, 2 * width, bias=False)
        self.o = Linear(width, width, bias=False)
        self.config = config
        self.weights = AttentionWeights()

    def reset_parameters(self) -> None:
        """As those of `spade_ext.nn.LocalAttention`."""
        bound = math.sqrt(1.5 / self.q.in_features)
        for linear in (self.q, self.kv):
            nn.init.uniform_(linear.weight, -bound, bound)
        nn.init.xavier_uniform_(self.o.weight)

    def forward(
        self,
        x: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        cache: EncoderDecoderCache | None = None,
    ) -> Tensor:
        """(B, L, D) to (B, L, D), given (B, Lk, D) and (B, Lk), True at real tokens."""
        q = self.q(x).unflatten(-1, (self.n_heads, -1))
        k, v = self.keys_and_values(encoder_hidden_states, cache)
        if is_step(x, self) and self.config._attn_implementation != "eager":
            # A lone query reads every key once, in which the op's tiles are slower.
            mask = None if attention_mask is None else attention_mask[:, None, None]
            heads = (t.transpose(1, 2) for t in (q, k, v))
            out = scaled_dot_product_attention(*heads, attn_mask=mask).transpose(1, 2)
        else:
            out = self.attend(q, k, v, None, attention_mask=attention_mask, **self.dropout_options())
        return self.o(out.flatten(-2))

    def keys_and_values(self, source: Tensor, cache: EncoderDecoderCache | None) -> tuple[Tensor, Tensor]:
        """(B, Lk, H, D / H) each, those of the cache once it has them; its layout is (B, H, Lk, D / H)."""
        if cache is not None and cache.is_updated.get(self.layer):
            held = cache.cross_attention_cache.layers[self.layer]
            return held.keys.transpose(1, 2), held.values.transpose(1, 2)
        k, v = self.kv(source).unflatten(-1, (2, self.n_heads, -1)).unbind(2)
        if cache is None:
            return k, v
        k, v = cache.cross_attention_cache.update(k.transpose(1, 2), v.transpose(1, 2), self.layer)
        cache.is_updated[self.layer] = True
        return k.transpose(1, 2), v.transpose(1, 2)

    dropout_options = LocalAttention.dropout_options
