# Copyright 2026 The spade-ext developers.
"""SPADE: layers of local attention, of which the bottom one also has a state space model (arXiv 2212.08136)."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    MaskedLMOutput,
    SequenceClassifierOutput,
)
from transformers.utils import can_return_tuple
from transformers.utils.deprecation import deprecate_kwarg
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from ..nn.linear import Linear
from ..nn.mask import matching_ids, padding_is_outside, real_tokens
from ..nn.norm import build_norm
from ..nn.state_space import StateSpaceLayer
from .cache import SpadeCache, states_of
from .configuration_spade import ABSOLUTE_POSITIONS, SpadeConfig
from .cross_attention import CrossAttention
from .generation import SpadeGenerationMixin
from .mixers import AttentionMixer, AttentionWeights, SpadeMixer, build_mixer, run_mixer
from .positions import SpadePositionEmbedding, check_position_ids, documents_of, positions_of
from .vocabulary import IGNORED, AdaptiveEmbedding, AdaptiveHead, sum_of_losses


class SpadeFeedForward(nn.Module):
    def __init__(self, config: SpadeConfig):
        super().__init__()
        self.fc1 = Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = Linear(config.intermediate_size, config.hidden_size)
        self.activation = ACT2FN[config.hidden_act]
        dropout = config.dropout if config.activation_dropout is None else config.activation_dropout
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.dropout(self.activation(self.fc1(x))))


class SpadeLayer(GradientCheckpointingLayer):
    """A mixer, in decoders attention to an encoder's output, and a feed-forward.

    Each has a residual connection, and a norm before or after it.
    """

    def __init__(self, config: SpadeConfig, layer: int):
        super().__init__()
        self.prenorm = config.prenorm
        self.mixer = build_mixer(config, layer)
        self.mixer_norm = build_norm(config.norm, config.hidden_size, config.layer_norm_eps)
        if config.add_cross_attention:
            self.cross_attention = CrossAttention(config, layer)
            self.cross_norm = build_norm(config.norm, config.hidden_size, config.layer_norm_eps)
        self.feed_forward = SpadeFeedForward(config)
        self.feed_forward_norm = build_norm(config.norm, config.hidden_size, config.layer_norm_eps)
        self.dropout = nn.Dropout(config.dropout)
        self.mixer_dropout = nn.Identity() if self.mixer.drops_out else nn.Dropout(config.dropout)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        segment_ids: Tensor | None = None,
        position_bias: Tensor | None = None,
        state: Any = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        cache: EncoderDecoderCache | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        x = hidden_states
        context = {"attention_mask": attention_mask, "segment_ids": segment_ids, "position_bias": position_bias}
        mixed, after = run_mixer(
            self.mixer, self.mixer_norm(x) if self.prenorm else x, state, {"residual": x, **context}
        )
        x = x + self.mixer_dropout(mixed)
        if not self.prenorm:
            x = self.mixer_norm(x)
        if encoder_hidden_states is not None:
            source = encoder_hidden_states, encoder_attention_mask, cache
            x = self.add(self.cross_attention, self.cross_norm, x, *source)
        x = self.add(self.feed_forward, self.feed_forward_norm, x)
        return x if state is None else (x, after)

    def add(self, sublayer: nn.Module, norm: nn.Module, x: Tensor, *context: Any) -> Tensor:
        """x and what a sublayer makes of it, normalised before or after."""
        if self.prenorm:
            return x + self.dropout(sublayer(norm(x), *context))
        return norm(x + self.dropout(sublayer(x, *context)))


class SpadeValueEmbedding(nn.Linear):
    """Numbers to vectors. Its biases start as torch's, not at 0, where a LayerNorm would leave a lone number's sign."""


class SpadePreTrainedModel(PreTrainedModel):
    config: SpadeConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["SpadeLayer"]
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": SpadeLayer, "attentions": AttentionWeights}

    def __init__(self, config: SpadeConfig):
        super().__init__(config)
        self.main_input_name = "input_ids" if config.input_size is None else "input_values"

    def get_correct_attn_implementation(self, requested_attention: str | None, is_init_check: bool = False) -> str:
        """ "spade_local", our op, unless "eager" asks for dense matrices of weights."""
        if requested_attention not in (None, "spade_local", "eager"):
            raise ValueError(f"attn_implementation is {requested_attention!r}, expected 'spade_local' or 'eager'")
        return requested_attention or "spade_local"

    def resize_token_embeddings(self, *args: Any, **options: Any) -> nn.Module:
        if self.config.adaptive_cutoffs is not None:
            cutoffs = self.config.adaptive_cutoffs
            raise ValueError(
                f"adaptive_cutoffs is {cutoffs}, expected None to resize embeddings: ids are sorted in bands"
            )
        embeddings = super().resize_token_embeddings(*args, **options)
        for module in self.modules():  # an encoder and a decoder have configurations of their own
            if isinstance(module, SpadePreTrainedModel):
                module.config.vocab_size = self.config.vocab_size
        return embeddings

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        # Of code outside of transformers, modules without parameters of their own would be left out.
        super()._initialize_weights(module)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # Linears are visited before the modules that hold them, which give some of them the weights that stay.
        super()._init_weights(module)
        if isinstance(module, StateSpaceLayer):
            module.reset_parameters(init.copy_)
        elif isinstance(module, SpadeMixer):
            if module.combine in ("concat", "add"):
                init.constant_(module.ssm_norm.weight, module.ssm_init_scale)
        elif isinstance(module, Linear) or type(module).__module__.startswith("torch.nn."):
            pass  # as transformers has made them
        elif hasattr(module, "reset_parameters"):
            module.reset_parameters()


class SpadeModel(SpadePreTrainedModel):
    """The backbone: embedding, layers and, with `final_norm`, a last norm."""

    def __init__(self, config: SpadeConfig):
        super().__init__(config)
        width = config.hidden_size
        if config.input_size is not None:
            self.embed_values = SpadeValueEmbedding(config.input_size, width)
        elif config.adaptive_cutoffs is not None:
            self.embed_tokens = AdaptiveEmbedding(config)
        else:
            self.embed_tokens = nn.Embedding(config.vocab_size, width, padding_idx=config.pad_token_id)
        if config.position in ABSOLUTE_POSITIONS:
            self.embed_positions = SpadePositionEmbedding(config)
        self.embed_norm = build_norm(config.norm, width, config.layer_norm_eps) if config.embed_norm else nn.Identity()
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(SpadeLayer(config, layer) for layer in range(config.num_hidden_layers))
        final_norm = config.prenorm if config.final_norm is None else config.final_norm
        self.norm = build_norm(config.norm, width, config.layer_norm_eps) if final_norm else nn.Identity()
        self._no_split_modules = ["SpadeLayer", *sorted({type(module).__name__ for module in self._sharded_apart()})]
        self.gradient_checkpointing = False
        self.post_init()

    def _embed(self, input_ids: Tensor | None, inputs_embeds: Tensor | None, input_values: Tensor | None) -> Tensor:
        size = self.config.input_size
        inputs = {"input_ids": input_ids, "input_values": input_values, "inputs_embeds": inputs_embeds}
        given = [name for name, value in inputs.items() if value is not None]
        kind = "input_ids" if size is None else "input_values"
        if given not in (["inputs_embeds"], [kind]):
            raise ValueError(f"given are {', '.join(given) or 'no inputs'}, expected either {kind} or inputs_embeds")
        name = given[0]
        width = {"input_ids": (), "input_values": (size,), "inputs_embeds": (self.config.hidden_size,)}[name]
        shape = inputs[name].shape
        if len(shape) < 2 or shape[2:] != width:
            expected = ", ".join(["B", "L", *map(str, width)])
            raise ValueError(f"{name} has shape {list(shape)}, expected ({expected})")
        if name == "inputs_embeds":
            return inputs_embeds
        return self.embed_tokens(input_ids) if size is None else self.embed_values(input_values)

    def _sharded_apart(self) -> Iterator[nn.Module]:
        """What FSDP2 must not shard together with its layer."""
        for module in self.modules():
            if isinstance(module, StateSpaceLayer):
                yield module  # float32 in half-precision models too, and sharded together are parameters of one dtype
        if self._table_owner is not None and self._table_owner.position is not None:
            yield self._table_owner.position  # all layers read it before its own runs

    @property
    def _table_owner(self) -> AttentionMixer | None:
        """The attention of layer 0, whose bias table is that of all layers, where they share one."""
        attention = getattr(self.layers[0].mixer, "attention", None)
        return attention if self.config.position_shared and isinstance(attention, AttentionMixer) else None

    def _shared_bias(self, length: int, cache: SpadeCache | None) -> Tensor | None:
        if (owner := self._table_owner) is None:
            return None
        return owner.position_bias(length, None if cache is None else cache.layers[0].state["attention"])

    def new_cache(self) -> SpadeCache | EncoderDecoderCache:
        """One of no tokens, beside that of an encoder's keys and values with add_cross_attention."""
        states = SpadeCache(self.config)
        if not self.config.add_cross_attention:
            return states
        return EncoderDecoderCache(states, DynamicCache(config=self.config))

    def _begin(self, cache: SpadeCache | None, x: Tensor) -> None:
        """Makes the states before the first token of x (B, L, D), or checks those that there are."""
        if cache is None:
            return
        if not isinstance(cache, SpadeCache):
            raise TypeError(f"cache is a {type(cache).__name__}, expected a SpadeCache, or None")
        if len(cache.layers) != len(self.layers):
            raise ValueError(f"cache has {len(cache.layers)} layers, expected {len(self.layers)}")
        if cache.positions is None:
            cache.positions = torch.zeros(x.size(0), dtype=torch.long, device=x.device)
            for layer, held in zip(self.layers, cache.layers, strict=True):
                held.state = layer.mixer.initial_state(x.size(0))
        elif len(cache.positions) != x.size(0):
            raise ValueError(f"cache has {len(cache.positions)} rows, expected {x.size(0)}")

    def _at_positions(
        self,
        x: Tensor,
        position_ids: Tensor | None,
        mask: Tensor | None,
        segment_ids: Tensor | None,
        cache: SpadeCache | None,
    ) -> Tensor:
        """The input of layer 0 from embeddings x (B, L, D)."""
        if self.config.scale_embedding:
            x = math.sqrt(self.config.hidden_size) * x
        if self.config.position in ABSOLUTE_POSITIONS:
            counted = position_ids is None
            positions = positions_of(x, mask, segment_ids) if counted else position_ids
            if counted and cache is not None:
                positions = positions + cache.positions[:, None]
            x = x + self.embed_positions(positions, counted and cache is None).to(x.dtype)
        return self.dropout(self.embed_norm(x))

    @merge_with_config_defaults
    @capture_outputs
    @deprecate_kwarg("past_key_values", "6.0.0", new_name="cache")
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        input_values: Tensor | None = None,
        segment_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        cache: SpadeCache | EncoderDecoderCache | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """Run over a batch of sequences, or over the next piece of them.

        Args:
            input_ids: (B, L), token ids; or
            input_values: (B, L, input_size), where the configuration has an input_size; or
            inputs_embeds: (B, L, D), what the embedding would give.
            attention_mask: (B, L), True or 1 at real tokens, which may be padded on either side. With a cache it may
                begin with the tokens before, (B, cache.tokens + L).
            segment_ids: (B, L), integers, of packed rows: a run of equal ids is a document, which sees only itself.
            position_ids: (B, L) or (1, L), integers: a document begins where they start again. Only "learned"
                positions, which must be below max_position_embeddings, and "sinusoidal" ones read their values; without
                position_ids a document's real tokens are counted from 0, or on from the cache.
            encoder_hidden_states: (B, Lk, D), an encoder's output that the layers attend to, with add_cross_attention.
            encoder_attention_mask: (B, Lk), True or 1 at its real tokens.
            cache: what a model kept of the tokens before, which is brought up to date. Rows are single documents. With
                add_cross_attention it also holds the encoder's keys and values.
            use_cache: make a cache where none is given; None is `config.use_cache`. Training makes none, nor do packed
                rows, rows with padding between real tokens, and compiled models.
            output_attentions: the attentions (B, H, L, L), with a cache those of all keys that it holds and then of
                the new ones; with attn_implementation="eager" only.

        Returns:
            BaseModelOutputWithPast with last_hidden_state (B, L, D) and the cache. What it holds at padded tokens means
            nothing.
        """
        if (encoder_hidden_states is not None) != (attends := self.config.add_cross_attention):
            given, expected = ("None", "a tensor") if attends else ("given", "None")
            raise ValueError(f"encoder_hidden_states is {given}, expected {expected}: add_cross_attention is {attends}")
        if kwargs.get("output_attentions") and self.config._attn_implementation != "eager":
            implementation = self.config._attn_implementation
            raise ValueError(f"output_attentions is True, expected attn_implementation 'eager', not {implementation!r}")
        x = self._embed(input_ids, inputs_embeds, input_values)
        whole, cache = cache, states_of(cache)
        self._begin(cache, x)
        mask, segment_ids = mask_of_new_tokens(attention_mask, x, cache), matching_ids(segment_ids, x)
        if position_ids is not None:
            position_ids = check_position_ids(position_ids, x)
            if segment_ids is None and not (cache is not None and torch.compiler.is_compiling()):
                segment_ids = documents_of(position_ids, mask)
        if segment_ids is not None and cache is not None:
            given = "position_ids start again" if position_ids is not None else "segment_ids is given"
            raise ValueError(f"{given}, expected rows of one document with a cache")
        cacheable = segment_ids is None and not (self.training or torch.compiler.is_compiling())
        if use_cache and cache is None and cacheable and (mask is None or padding_is_outside(mask)):
            whole = self.new_cache()
            cache = states_of(whole)
            self._begin(cache, x)
        x = self._at_positions(x, position_ids, mask, segment_ids, cache)
        shared_bias = self._shared_bias(x.size(1), cache)
        encoder_mask = None
        if encoder_hidden_states is not None:
            encoder_mask = real_tokens(encoder_attention_mask, encoder_hidden_states)
        # By place: reentrant activation checkpointing finds no gradient of what is passed by name.
        source = encoder_hidden_states, encoder_mask, whole if isinstance(whole, EncoderDecoderCache) else None
        for index, layer in enumerate(self.layers):
            if cache is None:
                x = layer(x, mask, segment_ids, shared_bias, None, *source)
            else:
                held = cache.layers[index]
                x, held.state = layer(x, mask, segment_ids, shared_bias, held.state, *source)
        if cache is not None:
            cache.positions = cache.positions + (x.size(1) if mask is None else mask.sum(1))
            cache.tokens += x.size(1)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(x), cache=whole)


def mask_of_new_tokens(attention_mask: Tensor | None, x: Tensor, cache: SpadeCache | None) -> Tensor | None:
    """Of attention_mask, which may begin with the tokens before, the part of x (B, L, D), as a bool tensor.

    None where, with a cache, there is no padding to step over.
    """
    L = x.size(1)
    has_mask = attention_mask is not None and cache is not None and attention_mask.dim() == 2
    if has_mask and attention_mask.size(1) != L:
        whole = cache.get_seq_length() + L
        if attention_mask.size(1) != whole:
            shape, B = list(attention_mask.shape), x.size(0)
            raise ValueError(
                f"attention_mask has shape {shape}, expected [{B}, {L}] or, with the tokens before, [{B}, {whole}]"
            )
        attention_mask = cache.mask_of_new_tokens(attention_mask, L)
    mask = real_tokens(attention_mask, x)
    if mask is None or cache is None or torch.compiler.is_compiling():
        return mask
    return None if mask.all() else mask


class SpadeLanguageModel(SpadePreTrainedModel):
    """What language models share: logits over the vocabulary, and a loss that never holds all of them.

    With labels, a model in training makes no logits; in evaluation it does, for metrics to read.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    needs_causal: bool
    backbone: type[SpadePreTrainedModel] = SpadeModel

    def __init__(self, config: SpadeConfig):
        if config.input_size is not None:
            raise ValueError(f"input_size is {config.input_size}, expected None for a language model")
        if config.causal != self.needs_causal:
            name = type(self).__name__
            raise ValueError(f"causal is {config.causal}, expected {self.needs_causal} for {name}")
        super().__init__(config)
        self.model = self.backbone(config)
        if config.adaptive_cutoffs is None:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        else:
            self._tied_weights_keys = {}  # the head reads the embedding's weights itself
            self.adaptive_head = AdaptiveHead(config)
        self.post_init()

    def logits(self, x: Tensor) -> Tensor:
        """(B, L, D) to (B, L, vocab_size); of an adaptive softmax they are log-probabilities."""
        if self.config.adaptive_cutoffs is None:
            return self.lm_head(x)
        return self.adaptive_head(x, self.model.embed_tokens)

    def token_loss(self, x: Tensor, labels: Tensor, num_items_in_batch: Tensor | int | None) -> Tensor:
        """Cross entropy of x (B, L, D) and labels (B, L): its sum over num_items_in_batch, None for labels not -100.

        0 where no label counts.
        """
        x, labels = x.flatten(0, 1), labels.flatten()
        if self.config.adaptive_cutoffs is None:
            loss = sum_of_losses(self.lm_head, x, labels, self.lm_head.out_features)
        else:
            loss = self.adaptive_head.loss(x, labels, self.model.embed_tokens)
        if num_items_in_batch is None:
            num_items_in_batch = (labels != IGNORED).sum()
        if isinstance(num_items_in_batch, Tensor):
            return loss / num_items_in_batch.to(loss.device).clamp(min=1)
        return loss / max(1, num_items_in_batch)


class SpadeForCausalLM(SpadeLanguageModel, SpadeGenerationMixin):
    """SPADE that predicts each next token."""

    needs_causal = True

    @deprecate_kwarg("past_key_values", "6.0.0", new_name="cache")
    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        segment_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        cache: SpadeCache | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Predict the token after each token of a batch of sequences.

        Args:
            input_ids, attention_mask, inputs_embeds, segment_ids, position_ids, cache, use_cache: see
                `SpadeModel.forward`.
            labels: (B, L), ids that input_ids may be; -100 asks for nothing. The model predicts labels[:, t + 1] at a
                real token t, unless another document begins there.
            shift_labels: (B, L), in place of labels the ids that follow each token, -100 where nothing is asked for.
                With it the pieces of a document that share a cache predict each other's first tokens.
            logits_to_keep: how many of the last tokens' logits, 0 for all; or which tokens' ones, indices. Where a loss
                alone is evaluated, 1 spares the memory of all.
            num_items_in_batch: what the sum of losses is divided by; None is the number of labels that count.

        Returns:
            CausalLMOutputWithPast with logits (B, L, vocab_size), None where a model in training is given labels; the
            cache; and, given labels, the loss.
        """
        shift_labels = kwargs.pop("shift_labels", None)  # not by name: the Trainer would want it of every batch
        if labels is not None and shift_labels is None:
            shift_labels = self._shifted(labels, attention_mask, segment_ids, position_ids)
        outputs = self.model(
            input_ids,
            attention_mask,
            inputs_embeds,
            segment_ids=segment_ids,
            position_ids=position_ids,
            cache=cache,
            use_cache=use_cache,
            **kwargs,
        )
        x, loss, logits = outputs.last_hidden_state, None, None
        if shift_labels is None or not self.training:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.logits(x[:, kept])
        if shift_labels is not None:
            loss = self.token_loss(x, shift_labels, num_items_in_batch)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            cache=outputs.cache,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    @staticmethod
    def _shifted(
        labels: Tensor, attention_mask: Tensor | None, segment_ids: Tensor | None, position_ids: Tensor | None
    ) -> Tensor:
        """The label (B, L) that follows each real token in its document, -100 where none does."""
        if attention_mask is not None and attention_mask.dim() == 2:  # behind a cache it has the tokens before, too
            attention_mask = attention_mask[:, max(0, attention_mask.size(1) - labels.size(1)) :]
        mask = real_tokens(attention_mask, labels)
        if segment_ids is None and position_ids is not None:
            segment_ids = documents_of(check_position_ids(position_ids, labels), mask)
        following = nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
        if mask is not None:
            following = following.masked_fill(~mask, IGNORED)
        if segment_ids is not None:
            ends = nn.functional.pad(segment_ids[:, 1:] != segment_ids[:, :-1], (0, 1), value=True)
            following = following.masked_fill(ends, IGNORED)
        return following


class SpadeForMaskedLM(SpadeLanguageModel):
    """SPADE that fills in masked tokens."""

    needs_causal = False

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs,
    ) -> MaskedLMOutput:
        """Predict tokens of a batch of sequences.

        Args:
            input_ids, attention_mask, inputs_embeds and others: see `SpadeModel.forward`.
            labels: (B, L), the ids to predict; -100 asks for nothing.
            num_items_in_batch: what the sum of losses is divided by; None is the number of labels that count.

        Returns:
            MaskedLMOutput with logits (B, L, vocab_size), None where a model in training is given labels; and, given
            labels, the loss.
        """
        outputs = self.model(input_ids, attention_mask, inputs_embeds, **kwargs)
        x, loss, logits = outputs.last_hidden_state, None, None
        if labels is None or not self.training:
            logits = self.logits(x)
        if labels is not None:
            loss = self.token_loss(x, labels, num_items_in_batch)
        return MaskedLMOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


def pool(x: Tensor, attention_mask: Tensor | None, pooling: str) -> Tensor:
    """(B, L, D) to (B, D): the mean, the first or the last of a sequence's real tokens; 0 where there are none."""
    mask = real_tokens(attention_mask, x)
    if mask is None:
        mask = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
    if pooling == "mean":
        wide = torch.promote_types(x.dtype, torch.float32)
        weights = mask.to(wide) / mask.sum(1, keepdim=True).clamp(min=1)
    else:
        rank = mask.cumsum(1) if pooling == "first" else mask.flip(1).cumsum(1).flip(1)
        weights = mask & (rank == 1)
    return torch.einsum("bl,bld->bd", weights.to(x.dtype), x.masked_fill(~mask[..., None], 0))


def refuse_packed_rows(inputs: dict[str, Any]) -> None:
    for name in ("segment_ids", "position_ids"):
        if inputs.get(name) is not None:
            raise ValueError(f"{name} has shape {list(inputs[name].shape)}, expected None: a row is one document")


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
        refuse_packed_rows(kwargs)
        kwargs["use_cache"] = False
        outputs = self.model(input_ids, attention_mask, inputs_embeds, input_values, **kwargs)
        logits = self.classifier(pool(outputs.last_hidden_state, attention_mask, self.config.pooling))
        loss = None
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config)
        return SequenceClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )
