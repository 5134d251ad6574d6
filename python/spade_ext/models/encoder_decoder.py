# Copyright 2026 The spade-ext developers.
"""SPADE encoder-decoders: two `SpadeModel`, of which the decoder's layers also attend to the encoder's output."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import EncoderDecoderCache
from transformers.modeling_outputs import (
    BaseModelOutput,
    Seq2SeqLMOutput,
    Seq2SeqModelOutput,
    Seq2SeqSequenceClassifierOutput,
)
from transformers.utils import can_return_tuple
from transformers.utils.deprecation import deprecate_kwarg
from transformers.utils.output_capturing import OutputRecorder

from ..nn.mask import real_tokens
from .configuration_encoder_decoder import SpadeEncoderDecoderConfig
from .generation import SpadeGenerationMixin
from .mixers import AttentionWeights
from .modeling_spade import (
    SpadeClassificationHead,
    SpadeLanguageModel,
    SpadeLayer,
    SpadeModel,
    SpadePreTrainedModel,
    pool,
    refuse_packed_rows,
)
from .vocabulary import IGNORED


def shift_right(ids: Tensor, mask: Tensor | None, start: int, padding: int) -> Tensor:
    """A decoder's input (B, L): `start` at a row's first token, then the token before, where mask (B, L) is True."""
    shifted = nn.functional.pad(ids[:, :-1], (1, 0), value=start)
    if mask is None:
        return shifted
    return shifted.masked_fill(mask & (mask.cumsum(1) == 1), start).masked_fill(~mask, padding)


class SpadeDecoder(SpadeModel):
    """The decoder of a `SpadeEncoderDecoderModel`."""

    _can_record_outputs = {
        "hidden_states": SpadeLayer,
        "attentions": OutputRecorder(AttentionWeights, layer_name="mixer"),
        "cross_attentions": OutputRecorder(AttentionWeights, layer_name="cross_attention"),
    }


class SpadeEncoderModel(SpadePreTrainedModel):
    """The encoder of a `SpadeEncoderDecoderModel` alone."""

    config: SpadeEncoderDecoderConfig
    _keys_to_ignore_on_load_unexpected = [r"^(model\.)?decoder\."]

    def __init__(self, config: SpadeEncoderDecoderConfig):
        super().__init__(config)
        self.encoder = SpadeModel(config.encoder_config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.encoder.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.encoder.embed_tokens = value

    def forward(self, *args: Any, **kwargs: Any) -> BaseModelOutput:
        """See `SpadeModel.forward`."""
        return self.encoder(*args, **kwargs)


class SpadeEncoderDecoderModel(SpadePreTrainedModel):
    """Encoder and decoder, which share their embedding."""

    config: SpadeEncoderDecoderConfig
    _tied_weights_keys = {"decoder.embed_tokens.weight": "encoder.embed_tokens.weight"}

    def __init__(self, config: SpadeEncoderDecoderConfig):
        super().__init__(config)
        self.encoder = SpadeModel(config.encoder_config)
        self.decoder = SpadeDecoder(config.decoder_config)
        self.post_init()

    def get_expanded_tied_weights_keys(self, all_submodels: bool = False) -> dict[str, str]:
        if all_submodels:
            return super().get_expanded_tied_weights_keys(all_submodels=True)
        return self._tied_weights_keys.copy()  # tie_word_embeddings is of the head alone

    def get_input_embeddings(self) -> nn.Module:
        return self.encoder.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.encoder.embed_tokens = self.decoder.embed_tokens = value

    @can_return_tuple
    @deprecate_kwarg("past_key_values", "6.0.0", new_name="cache")
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: BaseModelOutput | tuple[Tensor, ...] | None = None,
        cache: EncoderDecoderCache | None = None,
        inputs_embeds: Tensor | None = None,
        decoder_inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> Seq2SeqModelOutput:
        """Run the encoder over a batch of sources and the decoder over their targets.

        Args:
            input_ids: (B, Lk), the sources' token ids; or
            inputs_embeds: (B, Lk, D), what the embedding would give; or
            encoder_outputs: what the encoder made of them, its last hidden state (B, Lk, D) first.
            attention_mask: (B, Lk), True or 1 at real tokens, which may be padded on either side.
            decoder_input_ids: (B, L), the targets' token ids, or decoder_inputs_embeds: (B, L, D).
            decoder_attention_mask: (B, L), as attention_mask; behind a cache of T tokens (B, T + L).
            cache: of the decoder's tokens before, and of the keys and values of the source.
            use_cache: whether to return a cache; None is as the configuration says.
            output_attentions: with attn_implementation="eager" only.

        Returns:
            Seq2SeqModelOutput with last_hidden_state (B, L, D) and encoder_last_hidden_state (B, Lk, D). What they hold
            at padded tokens means nothing.
        """
        refuse_packed_rows(kwargs)
        if decoder_input_ids is None and decoder_inputs_embeds is None:
            raise ValueError("decoder_input_ids is None, expected it or decoder_inputs_embeds")
        if encoder_outputs is None:
            encoder_outputs = self.encoder(input_ids, attention_mask, inputs_embeds, **kwargs)
        elif isinstance(encoder_outputs, (tuple, list)):
            encoder_outputs = BaseModelOutput(*encoder_outputs)
        decoder_outputs = self.decoder(
            decoder_input_ids,
            decoder_attention_mask,
            decoder_inputs_embeds,
            encoder_hidden_states=encoder_outputs.last_hidden_state,
            encoder_attention_mask=attention_mask,
            cache=cache,
            use_cache=use_cache,
            **kwargs,
        )
        return Seq2SeqModelOutput(
            last_hidden_state=decoder_outputs.last_hidden_state,
            cache=decoder_outputs.cache,
            decoder_hidden_states=decoder_outputs.hidden_states,
            decoder_attentions=decoder_outputs.attentions,
            cross_attentions=decoder_outputs.get("cross_attentions"),
            encoder_last_hidden_state=encoder_outputs.last_hidden_state,
            encoder_hidden_states=encoder_outputs.hidden_states,
            encoder_attentions=encoder_outputs.attentions,
        )


def beside_last_hidden_state(outputs: Seq2SeqModelOutput) -> dict[str, Any]:
    """What a head hands on of a model's output: all but the last hidden state."""
    return {name: value for name, value in outputs.items() if name != "last_hidden_state"}


class SpadeForConditionalGeneration(SpadeLanguageModel, SpadeGenerationMixin):
    """SPADE that makes a target of a source: a summary, a translation, an answer."""

    config: SpadeEncoderDecoderConfig
    _tied_weights_keys = {"lm_head.weight": "model.encoder.embed_tokens.weight"}
    needs_causal = False
    backbone = SpadeEncoderDecoderModel

    def prepare_decoder_input_ids_from_labels(self, labels: Tensor) -> Tensor:
        """The decoder's input for labels (B, L), which may be padded on either side by -100."""
        return self._shift_labels(labels)[0]

    def _shift_labels(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        real = (labels != IGNORED).cumsum(1) > 0  # from the first label on
        ids = labels.masked_fill(labels == IGNORED, self.config.pad_token_id)
        return shift_right(ids, real, self.config.decoder_start_token_id, self.config.pad_token_id), real

    @can_return_tuple
    @deprecate_kwarg("past_key_values", "6.0.0", new_name="cache")
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: BaseModelOutput | tuple[Tensor, ...] | None = None,
        cache: EncoderDecoderCache | None = None,
        inputs_embeds: Tensor | None = None,
        decoder_inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> Seq2SeqLMOutput:
        """Predict the token after each of the decoder's tokens.

        Args:
            input_ids, attention_mask, decoder_input_ids and others: see `SpadeEncoderDecoderModel.forward`.
            labels: (B, L), ids to predict; -100 asks for nothing. They are the decoder's input as well, shifted to the
                right, where none is given.
            num_items_in_batch: what the sum of losses is divided by; None is the number of labels that count.

        Returns:
            Seq2SeqLMOutput with logits (B, L, vocab_size), None where a model in training is given labels; and, given
            labels, the loss.
        """
        if labels is not None:
            use_cache = False
            if decoder_input_ids is None and decoder_inputs_embeds is None:
                decoder_input_ids, real = self._shift_labels(labels)
                decoder_attention_mask = real if decoder_attention_mask is None else decoder_attention_mask
        outputs = self.model(
            input_ids,
            attention_mask,
            decoder_input_ids,
            decoder_attention_mask,
            encoder_outputs,
            cache,
            inputs_embeds,
            decoder_inputs_embeds,
            use_cache,
            **kwargs,
        )
        x, loss, logits = outputs.last_hidden_state, None, None
        if labels is None or not self.training:
            logits = self.logits(x)
        if labels is not None:
            loss = self.token_loss(x, labels, num_items_in_batch)
        return Seq2SeqLMOutput(loss=loss, logits=logits, **beside_last_hidden_state(outputs))


class SpadeSeq2SeqClassificationHead(SpadeClassificationHead):
    """dropout, Linear, tanh, dropout, Linear."""

    def __init__(self, config: SpadeEncoderDecoderConfig):
        super().__init__(config)
        self.activation = nn.Tanh()

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.dropout(x))


class SpadeForSeq2SeqClassification(SpadePreTrainedModel):
    """An encoder-decoder with a classifier over the encoder's first or the decoder's last token.

    With pooling "first" there is no decoder; the weights of one in a checkpoint are left alone.
    """

    config: SpadeEncoderDecoderConfig
    # The Trainer divides the loss by the accumulation steps itself.
    accepts_loss_kwargs = False

    def __init__(self, config: SpadeEncoderDecoderConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.loss_type = "ForSequenceClassification"
        if config.pooling == "first":
            self.model = SpadeEncoderModel(config)
        else:
            self.model = SpadeEncoderDecoderModel(config)
        self.classifier = SpadeSeq2SeqClassificationHead(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Seq2SeqSequenceClassifierOutput:
        """Classify a batch of sequences.

        Args:
            input_ids, attention_mask: see `SpadeEncoderDecoderModel.forward`. With pooling "last" each row has at least
                one eos_token_id, and the decoder reads them, too, shifted to the right.
            inputs_embeds: in place of input_ids, with pooling "first".
            labels: as those of `SpadeForSequenceClassification`.

        Returns:
            Seq2SeqSequenceClassifierOutput with logits (B, num_labels) and, given labels, the loss.
        """
        refuse_packed_rows(kwargs)
        if self.config.pooling == "first":
            outputs = self.model(input_ids, attention_mask, inputs_embeds, **kwargs)
            pooled = pool(outputs.last_hidden_state, attention_mask, "first")
            beside = {f"encoder_{name}": value for name, value in outputs.items()}
        else:
            if input_ids is None:
                raise ValueError("input_ids is None, expected ids for pooling 'last', which looks for eos_token_id")
            mask = real_tokens(attention_mask, input_ids)
            ends = self._ends(input_ids, mask)
            shifted = shift_right(input_ids, mask, self.config.decoder_start_token_id, self.config.pad_token_id)
            outputs = self.model(input_ids, mask, shifted, mask, use_cache=False, **kwargs)
            pooled = pool(outputs.last_hidden_state, ends, "last")
            beside = beside_last_hidden_state(outputs)
        logits = self.classifier(pooled)
        loss = None
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config)
        return Seq2SeqSequenceClassifierOutput(loss=loss, logits=logits, **beside)

    def _ends(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        """(B, L): where the real eos_token_id are."""
        ends = ids == self.config.eos_token_id
        if mask is not None:
            ends = ends & mask
        if not torch.compiler.is_compiling() and not ends.any(1).all():
            row, eos = int((~ends.any(1)).nonzero()[0]), self.config.eos_token_id
            raise ValueError(f"input_ids has no eos_token_id = {eos} in row {row}, expected one or more in each row")
        return ends
