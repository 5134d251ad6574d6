# Copyright 2026 The spade-ext developers.
"""What mixes the tokens of a layer, by name, and the combination of a state space model with it (arXiv 2212.08136)."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from ..nn import EMA, S4, GatedAttention, LocalAttention
from ..nn.norm import build_norm
from ..nn.state_space import StateSpaceLayer
from ..ops import local_attention, local_attention_ref

if TYPE_CHECKING:
    from .configuration_spade import SpadeConfig

MIXERS: dict[str, type[nn.Module]] = {}

Mixer = TypeVar("Mixer", bound=type[nn.Module])


def register_mixer(name: str) -> Callable[[Mixer], Mixer]:
    """A decorator: makes a module the mixer of every `SpadeConfig(mixer=name)`, alone and beside a state space model.

    It is built from the configuration and a layer's number, and called with the layer's normalised input x (B, L, D)
    and, by name, with attention_mask (B, L), True at real tokens, and segment_ids (B, L) of packed rows, both or
    either None; residual (B, L, D), the layer's input; and position_bias, a table shared between layers. It returns
    (B, L, D), which is added to the residual. `docs/models.md` has an example.

    Weights other than those of Linears and norms are made by its `reset_parameters`, if it has one, with torch.nn.init,
    which leaves those of a checkpoint alone.
    """

    def register(cls: Mixer) -> Mixer:
        if name in MIXERS:
            raise ValueError(f"name is {name!r}, expected one that is not taken: {', '.join(MIXERS)}")
        MIXERS[name] = cls
        return cls

    return register


class AttentionWeights(nn.Module):
    """The weights (B, H, Lq, Lk) of `local_attention`, dense. A module, so that output_attentions can find them."""

    def forward(self, q: Tensor, k: Tensor, bias: Tensor | None, **options: Any) -> Tensor:
        B, Lk, H, _ = k.shape
        one = torch.eye(Lk, dtype=k.dtype, device=k.device)[None, :, None].expand(B, Lk, H, Lk)
        return local_attention_ref(q, k, one, bias, **options).transpose(1, 2)


class _ChoosesImplementation(nn.Module):
    """Attention by the op, or with attn_implementation="eager" by a dense matrix of weights."""

    config: "SpadeConfig"

    def attention(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, **options: Any) -> Tensor:
        if self.config._attn_implementation != "eager":
            return local_attention(q, k, v, bias, **options)
        return torch.einsum("bhij,bjhd->bihd", self.weights(q, k, bias, **options), v)


@register_mixer("full")
@register_mixer("chunk")
@register_mixer("window")
class AttentionMixer(_ChoosesImplementation, LocalAttention):
    """Multi-head attention in the configuration's window, chunks, or full rows where it has neither."""

    def __init__(self, config: "SpadeConfig", layer: int):
        owns_position = config.has_relative_position and (layer == 0 or not config.position_shared)
        super().__init__(
            config.hidden_size,
            config.num_attention_heads,
            window=config.window and tuple(config.window),
            chunk_size=config.chunk_size,
            causal=config.causal,
            position=config.position if owns_position else None,
            num_buckets=config.position_num_buckets,
            max_distance=config.position_max_distance,
            max_positions=config.max_position_embeddings,
            dropout=config.attention_dropout,
        )
        self.config = config
        self.weights = AttentionWeights()

    def forward(
        self,
        x: Tensor,
        *,
        attention_mask: Tensor | None = None,
        segment_ids: Tensor | None = None,
        position_bias: Tensor | None = None,
        **context: Any,
    ) -> Tensor:
        return super().forward(x, attention_mask, position_bias, segment_ids)


@register_mixer("mega")
class MegaMixer(_ChoosesImplementation, GatedAttention):
    """MEGA's gated attention in the configuration's window, chunks, or full rows where it has neither."""

    drops_out = True  # its values, moving average and h, so what it returns is not dropped out again

    def __init__(self, config: "SpadeConfig", layer: int):
        super().__init__(
            config.hidden_size,
            config.mega_z_dim,
            config.mega_h_dim or config.intermediate_size,
            config.mega_n_dim,
            chunk_size=config.chunk_size,
            window=config.window and tuple(config.window),
            causal=config.causal,
            activation=config.mega_activation,
            position=config.position,
            norm=None,
            truncation=config.mega_truncation,
            max_positions=config.max_position_embeddings,
            dropout=config.dropout,
        )
        self.config = config
        self.weights = AttentionWeights()

    def forward(
        self,
        x: Tensor,
        *,
        residual: Tensor,
        attention_mask: Tensor | None = None,
        segment_ids: Tensor | None = None,
        **context: Any,
    ) -> Tensor:
        return self.update(x, residual, attention_mask, segment_ids)


@register_mixer("ssm")
class SsmMixer(nn.Module):
    """Mixes tokens by a state space model alone, and channels by a gated Linear (S4's block, arXiv 2111.00396)."""

    drops_out = False

    def __init__(self, config: "SpadeConfig", layer: int):
        super().__init__()
        self.ssm = build_ssm(config)
        self.activation = ACT2FN[config.hidden_act]
        self.output = nn.Linear(config.hidden_size, 2 * config.hidden_size)

    def forward(
        self, x: Tensor, *, attention_mask: Tensor | None = None, segment_ids: Tensor | None = None, **context: Any
    ) -> Tensor:
        mixed = self.ssm(x, attention_mask=attention_mask, segment_ids=segment_ids)
        return nn.functional.glu(self.output(self.activation(mixed)), dim=-1)


class SpadeMixer(nn.Module):
    """A registered mixer, in the layers of `ssm_layers` combined with a state space model."""

    def __init__(self, config: "SpadeConfig", layer: int):
        super().__init__()
        width = config.hidden_size
        self.attention = MIXERS[config.mixer](config, layer)
        self.combine = config.ssm_combine if layer in config.ssm_layers else None
        self.ssm_weight, self.ssm_init_scale = config.ssm_weight, config.ssm_init_scale
        self.drops_out = self.combine in (None, "stack") and getattr(self.attention, "drops_out", False)
        if self.combine is not None:
            self.ssm = build_ssm(config)
        if self.combine in ("concat", "add"):
            self.ssm_norm = build_norm(config.norm, width, config.layer_norm_eps)
            self.attention_norm = build_norm(config.norm, width, config.layer_norm_eps)
        if self.combine == "concat":
            self.aggregate = nn.Linear(2 * width, width)

    def forward(self, x: Tensor, **context: Any) -> Tensor:
        tokens = {"attention_mask": context["attention_mask"], "segment_ids": context["segment_ids"]}
        if self.combine == "stack":
            x = self.ssm(x, **tokens)
        local = self.attention(x, **context)
        if self.combine in (None, "stack"):
            return local
        both = self.ssm_norm(self.ssm(x, **tokens)), self.attention_norm(local)
        if self.combine == "add":
            return self.ssm_weight * both[0] + (1 - self.ssm_weight) * both[1]
        return self.aggregate(torch.cat(both, dim=-1))


def build_mixer(config: "SpadeConfig", layer: int) -> nn.Module:
    """The mixer of a layer."""
    return SsmMixer(config, layer) if config.mixer == "ssm" else SpadeMixer(config, layer)


def build_ssm(config: "SpadeConfig") -> StateSpaceLayer:
    """The state space layer that a configuration names."""
    width, bidirectional = config.hidden_size, not config.causal
    if config.ssm_kind == "ema":
        return EMA(width, config.ssm_d_state or 16, bidirectional=bidirectional)
    return S4(
        width,
        config.ssm_d_state or 64,
        kernel=config.ssm_kind,
        init=config.ssm_init,
        rank=config.ssm_rank,
        n_ssm=config.ssm_n_ssm,
        bidirectional=bidirectional,
        l_max=config.ssm_l_max,
        disc=config.ssm_disc,
        lr=config.ssm_lr,
    )
