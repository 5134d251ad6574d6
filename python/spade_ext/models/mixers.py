# Copyright 2026 The spade-ext developers.
"""What mixes the tokens of a layer, by name, and the combination of a state space model with it (arXiv 2212.08136)."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from ..nn import EMA, S4, GatedAttention, Linear, LocalAttention
from ..nn.norm import build_norm
from ..nn.reach import Reach, Ring
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

    A causal mixer that has a method initial_state(batch_size) can be cached. It is then called with a state as well,
    tensors whose first dimension is B, in tuples or dicts, of constant size, and returns (y, the state after the
    tokens); it may overwrite the one it was given where gradients are not recorded.

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


def is_step(x: Tensor, module: nn.Module) -> bool:
    """Whether x (B, L, D) is a lone token to predict from, for which a state is updated in place."""
    return x.size(1) == 1 and not module.training and not torch.is_grad_enabled()


def token_of(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask[:, 0]


class ChoosesImplementation(Reach):
    """Attention by the op, or with attn_implementation="eager" by a dense matrix of weights."""

    config: "SpadeConfig"

    @property
    def has_steps(self) -> bool:
        return super().has_steps and self.config._attn_implementation != "eager"

    def attention(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, **options: Any) -> Tensor:
        if self.config._attn_implementation != "eager":
            return local_attention(q, k, v, bias, **options)
        return torch.einsum("bhij,bjhd->bihd", self.weights(q, k, bias, **options), v)


@register_mixer("full")
@register_mixer("chunk")
@register_mixer("window")
class AttentionMixer(ChoosesImplementation, LocalAttention):
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
        state: Ring | None = None,
        **context: Any,
    ) -> Tensor | tuple[Tensor, Ring]:
        if state is not None and is_step(x, self) and self.has_steps:
            return self.step(x[:, 0], state, position_bias, token_of(attention_mask))[:, None], state
        return super().forward(x, attention_mask, position_bias, segment_ids, state)


@register_mixer("mega")
class MegaMixer(ChoosesImplementation, GatedAttention):
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
        state: Any = None,
        **context: Any,
    ) -> Any:
        if state is not None and is_step(x, self) and self.has_steps:
            return self.update_token(x[:, 0], residual[:, 0], state, token_of(attention_mask))[:, None], state
        return self.update(x, residual, attention_mask, segment_ids, state)


@register_mixer("ssm")
class SsmMixer(nn.Module):
    """Mixes tokens by a state space model alone, and channels by a gated Linear (S4's block, arXiv 2111.00396)."""

    drops_out = False

    def __init__(self, config: "SpadeConfig", layer: int):
        super().__init__()
        self.ssm = build_ssm(config)
        self.activation = ACT2FN[config.hidden_act]
        self.output = Linear(config.hidden_size, 2 * config.hidden_size)

    def forward(self, x: Tensor, *, state: Tensor | None = None, **context: Any) -> Tensor | tuple[Tensor, Tensor]:
        mixed, state = run_ssm(self.ssm, x, state, context)
        y = nn.functional.glu(self.output(self.activation(mixed)), dim=-1)
        return y if state is None else (y, state)

    def initial_state(self, batch_size: int) -> Tensor:
        return self.ssm.initial_state(batch_size)


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
            self.aggregate = Linear(2 * width, width)

    def forward(
        self, x: Tensor, *, state: dict[str, Any] | None = None, **context: Any
    ) -> Tensor | tuple[Tensor, dict[str, Any]]:
        before, after, long = state or {}, {}, None
        if self.combine is not None:
            long, after["ssm"] = run_ssm(self.ssm, x, before.get("ssm"), context)
        x = long if self.combine == "stack" else x
        local, after["attention"] = run_mixer(self.attention, x, before.get("attention"), context)
        y = self.combined(long, local)
        return y if state is None else (y, after)

    def combined(self, long: Tensor | None, local: Tensor) -> Tensor:
        if self.combine in (None, "stack"):
            return local
        both = self.ssm_norm(long), self.attention_norm(local)
        if self.combine == "add":
            return self.ssm_weight * both[0] + (1 - self.ssm_weight) * both[1]
        return self.aggregate(torch.cat(both, dim=-1))

    def initial_state(self, batch_size: int) -> dict[str, Any]:
        state = {"attention": self.attention.initial_state(batch_size)}
        return state if self.combine is None else state | {"ssm": self.ssm.initial_state(batch_size)}


def run_mixer(mixer: nn.Module, x: Tensor, state: Any, context: dict[str, Any]) -> tuple[Tensor, Any]:
    """Its output for x (B, L, D), and the state after it, None without one before."""
    return (mixer(x, **context), None) if state is None else mixer(x, **context, state=state)


def run_ssm(ssm: StateSpaceLayer, x: Tensor, state: Tensor | None, context: dict[str, Any]) -> tuple[Tensor, Any]:
    """`run_mixer` of a state space layer."""
    mask = context["attention_mask"]
    if state is None:
        return ssm(x, mask, context["segment_ids"]), None
    if is_step(x, ssm):
        return ssm.step(x[:, 0], state, token_of(mask))[:, None], state
    return ssm(x, mask, context["segment_ids"], state)


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
