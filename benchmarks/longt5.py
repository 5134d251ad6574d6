"""Hugging Face's LongT5 with the weights of ours: the peer of nn.LocalAttention and of an encoder of SPADE."""

import torch
from torch import Tensor, nn
from transformers import LongT5Config, LongT5EncoderModel
from transformers.models.longt5.modeling_longt5 import LongT5LocalAttention, _get_local_attention_mask

from spade_ext.models import SpadeModel
from spade_ext.nn import LocalAttention


def copy_attention(layer: LongT5LocalAttention, ours: LocalAttention) -> None:
    """Weights of ours; the scores of LongT5 have no scale."""
    q, k, v = ours.qkv.weight.chunk(3)
    q = q * (ours.d_model // ours.n_heads) ** -0.5
    for name, weight in {"q": q, "k": k, "v": v, "o": ours.o.weight}.items():
        getattr(layer, name).weight.copy_(weight)
    if layer.has_relative_attention_bias:
        layer.relative_attention_bias.weight.copy_(ours.position.weight)


class LongT5Layer(nn.Module):
    """Hugging Face's local self-attention of LongT5."""

    def __init__(self, ours: LocalAttention, L: int):
        super().__init__()
        D, H, radius = ours.d_model, ours.n_heads, ours.window[0]
        config = LongT5Config(d_model=D, num_heads=H, d_kv=D // H, local_radius=radius, dropout_rate=0.0)
        self.layer = LongT5LocalAttention(config, has_relative_attention_bias=True)
        self.mask = _get_local_attention_mask(torch.ones(1, L), radius + 1, torch.device("cpu"))
        with torch.no_grad():
            copy_attention(self.layer, ours)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, self.mask)[0]


class LongT5Encoder(nn.Module):
    """Hugging Face's encoder of LongT5, of the sizes of a SpadeModel whose position bias is shared and whose norms are
    RMSNorms; it has the weights of its attention and feed-forwards, which in LongT5 have no biases."""

    def __init__(self, ours: SpadeModel):
        super().__init__()
        config, dropout = ours.config, ours.config.dropout
        D, H = config.hidden_size, config.num_attention_heads
        sizes = {"d_model": D, "d_kv": D // H, "num_heads": H, "d_ff": config.intermediate_size, "vocab_size": 10}
        sizes |= {"num_layers": config.num_hidden_layers, "local_radius": config.window[0], "dropout_rate": dropout}
        norm = {"layer_norm_epsilon": config.layer_norm_eps}
        self.model = LongT5EncoderModel(LongT5Config(**sizes, **norm, feed_forward_proj=config.hidden_act))
        self.model.get_input_embeddings().requires_grad_(False)
        with torch.no_grad():
            for block, layer in zip(self.model.encoder.block, ours.layers, strict=True):
                attention, feed_forward = block.layer
                copy_attention(attention.LocalSelfAttention, layer.mixer.attention)
                feed_forward.DenseReluDense.wi.weight.copy_(layer.feed_forward.fc1.weight)
                feed_forward.DenseReluDense.wo.weight.copy_(layer.feed_forward.fc2.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(inputs_embeds=x).last_hidden_state
