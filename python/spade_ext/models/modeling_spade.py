# Copyright 2026 The spade-ext developers.
"""SPADE: layers of local attention, of which the bottom one also has a state space model (arXiv 2212.08136)."""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput, SequenceClassifierOutput
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from ..nn import EMA, S4, AlibiBias, LocalAttention, RelativePositionBias, RotaryBias, SimpleBias
from ..nn.mask import matching_ids, real_tokens
from ..nn.state_space import StateSpaceLayer
from .configuration_spade import SpadeConfig


def build_ssm(config: SpadeConfig) -> StateSpaceLayer:
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


class SpadeMixer(nn.Module):
    """Mixes tokens: local attention, in the layers of `ssm_layers` combined with a state space model."""

    def __init__(self, config: SpadeConfig, layer: int):
        super().__init__()
        width = config.hidden_size
        owns_position = config.position is not None and (layer == 0 or not config.position_shared)
        self.attention = LocalAttention(
            width,
            config.num_attention_heads,
            window=tuple(config.window),
            position=config.position if owns_position else None,
            num_buckets=config.position_num_buckets,
            max_distance=config.position_max_distance,
        )
        self.combine = config.ssm_combine if layer in config.ssm_layers else None
        self.ssm_weight = config.ssm_weight
        if self.combine is not None:
            self.ssm = build_ssm(config)
        if self.combine in ("concat", "add"):
            self.ssm_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
            self.attention_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        if self.combine == "concat":
            self.aggregate = nn.Linear(2 * width, width)

    def forward(
        self, x: Tensor, attention_mask: Tensor | None, segment_ids: Tensor | None, position_bias: Tensor | None
    ) -> Tensor:
        tokens = {"attention_mask": attention_mask, "segment_ids": segment_ids}
        if self.combine == "stack":
            x = self.ssm(x, **tokens)
        local = self.attention(x, position_bias=position_bias, **tokens)
        if self.combine in (None, "stack"):
            return local
        both = self.ssm_norm(self.ssm(x, **tokens)), self.attention_norm(local)
        if self.combine == "add":
            return self.ssm_weight * both[0] + (1 - self.ssm_weight) * both[1]
        return self.aggregate(torch.cat(both, dim=-1))


class SsmMixer(nn.Module):
    """Mixes tokens by a state space model alone, and channels by a gated Linear (S4's block, arXiv 2111.00396)."""

    def __init__(self, config: SpadeConfig):
        super().__init__()
        width = config.hidden_size
        self.ssm = build_ssm(config)
        self.activation = ACT2FN[config.hidden_act]
        self.output = nn.Linear(width, 2 * width)

    def forward(
        self, x: Tensor, attention_mask: Tensor | None, segment_ids: Tensor | None, position_bias: None
    ) -> Tensor:
        mixed = self.ssm(x, attention_mask=attention_mask, segment_ids=segment_ids)
        return nn.functional.glu(self.output(self.activation(mixed)), dim=-1)


class SpadeFeedForward(nn.Module):
    def __init__(self, config: SpadeConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.activation = ACT2FN[config.hidden_act]
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.dropout(self.activation(self.fc1(x))))


class SpadeLayer(GradientCheckpointingLayer):
    """A mixer and a feed-forward, each with a residual connection."""

    def __init__(self, config: SpadeConfig, layer: int):
        super().__init__()
        self.prenorm = config.prenorm
        self.mixer = SsmMixer(config) if config.mixer == "ssm" else SpadeMixer(config, layer)
        self.mixer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.feed_forward = SpadeFeedForward(config)
        self.feed_forward_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        segment_ids: Tensor | None = None,
        position_bias: Tensor | None = None,
    ) -> Tensor:
        x, context = hidden_states, (attention_mask, segment_ids, position_bias)
        if self.prenorm:
            x = x + self.dropout(self.mixer(self.mixer_norm(x), *context))
            return x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))
        x = self.mixer_norm(x + self.dropout(self.mixer(x, *context)))
        return self.feed_forward_norm(x + self.dropout(self.feed_forward(x)))


class SpadeValueEmbedding(nn.Linear):
    """Numbers to vectors. Its biases start as torch's, not at 0, where a LayerNorm would leave a lone number's sign."""


_OWN_INITIAL_VALUES = (LocalAttention, RelativePositionBias, AlibiBias, SimpleBias, RotaryBias, SpadeValueEmbedding)


class SpadePreTrainedModel(PreTrainedModel):
    config: SpadeConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["SpadeLayer"]
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": SpadeLayer}

    def __init__(self, config: SpadeConfig):
        super().__init__(config)
        self.main_input_name = "input_ids" if config.input_size is None else "input_values"

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # Attention's Linears are visited before their LocalAttention, which gives them the weights that stay.
        super()._init_weights(module)
        if isinstance(module, StateSpaceLayer):
            module.reset_parameters(init.copy_)
        elif isinstance(module, _OWN_INITIAL_VALUES):
            module.reset_parameters()


class SpadeModel(SpadePreTrainedModel):
    """The encoder: embedding, layers and, with `final_norm`, a last LayerNorm."""

    def __init__(self, config: SpadeConfig):
        super().__init__(config)
        if config.input_size is None:
            self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        else:
            self.embed_values = SpadeValueEmbedding(config.input_size, config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(SpadeLayer(config, layer) for layer in range(config.num_hidden_layers))
        final_norm = config.prenorm if config.final_norm is None else config.final_norm
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps) if final_norm else nn.Identity()
        self.gradient_checkpointing = False
        self.post_init()

    def _embed(self, input_ids: Tensor | None, inputs_embeds: Tensor | None, input_values: Tensor | None) -> Tensor:
        size = self.config.input_size
        inputs = {"input_ids": input_ids, "input_values": input_values, "inputs_embeds": inputs_embeds}
        given = [name for name, value in inputs.items() if value is not None]
        kind = "input_ids" if size is None else "input_values"
        if given == ["inputs_embeds"]:
            return inputs_embeds
        if given != [kind]:
            raise ValueError(f"given are {', '.join(given) or 'no inputs'}, expected either {kind} or inputs_embeds")
        if size is None:
            return self.embed_tokens(input_ids)
        if input_values.dim() != 3 or input_values.size(-1) != size:
            raise ValueError(f"input_values has shape {list(input_values.shape)}, expected (B, L, {size})")
        return self.embed_values(input_values)

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        input_values: Tensor | None = None,
        segment_ids: Tensor | None = None,
        **kwargs,
    ) -> BaseModelOutput:
        """Encode a batch of sequences.

        Args:
            input_ids: (B, L), token ids; or
            input_values: (B, L, input_size), where the configuration has an input_size; or
            inputs_embeds: (B, L, D), what the embedding would give.
            attention_mask: (B, L), True or 1 at real tokens, which may be padded on either side.
            segment_ids: (B, L), integers, of packed rows: a run of equal ids is a document, which sees only itself.
                Their number is data: with them, a state space model does not compile as a single graph.

        Returns:
            BaseModelOutput with last_hidden_state (B, L, D). What it holds at padded tokens means nothing.
        """
        x = self._embed(input_ids, inputs_embeds, input_values)
        attention_mask, segment_ids = real_tokens(attention_mask, x), matching_ids(segment_ids, x)
        x = self.dropout(x)
        shares = self.config.mixer == "window" and self.config.position_shared
        shared_bias = self.layers[0].mixer.attention.position_bias() if shares else None
        for layer in self.layers:
            x = layer(x, attention_mask, segment_ids, shared_bias)
        return BaseModelOutput(last_hidden_state=self.norm(x))


def pool(x: Tensor, attention_mask: Tensor | None, pooling: str) -> Tensor:
    """(B, L, D) to (B, D): the mean, the first or the last of a sequence's real tokens; 0 where there are none."""
    mask = real_tokens(attention_mask, x)
    if mask is None:
        mask = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
    if pooling == "mean":
        weights = mask / mask.sum(1, keepdim=True).clamp(min=1)
    else:
        rank = mask.cumsum(1) if pooling == "first" else mask.flip(1).cumsum(1).flip(1)
        weights = mask & (rank == 1)
    return torch.einsum("bl,bld->bd", weights.to(x.dtype), x.masked_fill(~mask[..., None], 0))


class SpadeClassificationHead(nn.Module):
    def __init__(self, config: SpadeConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.activation = ACT2FN[config.hidden_act]
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.out_proj = nn.Linear(config.hidden_size, config.num_labels)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_proj(self.dropout(self.activation(self.dense(x))))


class SpadeForSequenceClassification(SpadePreTrainedModel):
    """SPADE with a classifier over its pooled output."""

    # The Trainer divides the loss by the accumulation steps itself.
    accepts_loss_kwargs = False

    def __init__(self, config: SpadeConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = SpadeModel(config)
        self.classifier = SpadeClassificationHead(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        input_values: Tensor | None = None,
        **kwargs,
    ) -> SequenceClassifierOutput:
        """Classify a batch of sequences.

        Args:
            input_ids, attention_mask, inputs_embeds, input_values: see `SpadeModel.forward`.
            labels: (B,) int64 for classes; (B,) or (B, num_labels) floating point for regression, as
                `config.problem_type` says, or num_labels and the labels' dtype where it is None.

        Returns:
            SequenceClassifierOutput with logits (B, num_labels) and, given labels, the loss.
        """
        if kwargs.get("segment_ids") is not None:
            raise ValueError("segment_ids is given, expected none: a row is classified as one document")
        outputs = self.model(input_ids, attention_mask, inputs_embeds, input_values, **kwargs)
        logits = self.classifier(pool(outputs.last_hidden_state, attention_mask, self.config.pooling))
        loss = None
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config)
        return SequenceClassifierOutput(loss=loss, logits=logits, hidden_states=outputs.hidden_states)
