# Copyright 2026 The spade-ext developers.
"""The configuration of SPADE encoder-decoders."""

from dataclasses import fields
from typing import Any, ClassVar, Literal

from huggingface_hub.dataclasses import strict

from .configuration_spade import SpadeConfig
from .presets import ENCODER_DECODER_PRESETS


@strict
class SpadeEncoderDecoderConfig(SpadeConfig):
    """Sizes and options of an encoder-decoder: the fields of `SpadeConfig` are those of its encoder.

    Args:
        decoder: "full", as published: full causal self-attention, learned positions and no state space model; or
            "local", the encoder's layers made causal, a SPADE of its own. Layers of both attend to all of the encoder's
            output, and have the encoder's width, heads, norms and dropout.
        num_decoder_layers: None is num_hidden_layers.
        decoder_window: the tokens before itself that a token of a "local" decoder attends to; None is window[0].
        max_position_embeddings: longest row of a "full" decoder, whose positions are learned.
        decoder_start_token_id: what a decoder's row begins with.
        pooling: how `SpadeForSeq2SeqClassification` reads a sequence: "first", the encoder's output at its first real
            token, as published; or "last", the decoder's at its last eos_token_id, as in BART and T5.
        classifier_dropout: before both Linears of the classifier.

    Defaults are those of the published classes.

    Source: SPADE (arXiv 2212.08136), section 4.3.
    """

    model_type = "spade_encoder_decoder"
    keys_to_ignore_at_inference = ["cache", "encoder_last_hidden_state"]
    presets: ClassVar[dict[str, dict[str, Any]]] = ENCODER_DECODER_PRESETS

    is_encoder_decoder: bool = True
    decoder: Literal["full", "local"] = "full"
    num_decoder_layers: int | None = None
    decoder_window: int | None = None
    hidden_act: str = "relu"
    attention_dropout: float | int = 0.1
    max_position_embeddings: int = 512
    ssm_l_max: int = 512
    ssm_lr: float | int | None = 0
    prenorm: bool = False
    final_norm: bool | None = False
    embed_norm: bool = True
    layer_norm_eps: float = 1e-6
    pooling: Literal["first", "last"] = "first"
    classifier_dropout: float | int = 0.1
    bos_token_id: int | None = 0
    pad_token_id: int | None = 1
    eos_token_id: int | None = 2
    decoder_start_token_id: int = 0

    @property
    def encoder_config(self) -> SpadeConfig:
        """Of the encoder, a `SpadeModel`."""
        return self._part(use_cache=False)

    @property
    def decoder_config(self) -> SpadeConfig:
        """Of the decoder, a causal `SpadeModel` with cross-attention."""
        layers = self.num_hidden_layers if self.num_decoder_layers is None else self.num_decoder_layers
        options: dict[str, Any] = {"causal": True, "add_cross_attention": True, "num_hidden_layers": layers}
        if self.decoder == "full":
            options |= {"mixer": "full", "window": None, "chunk_size": None, "ssm_layers": ()}
            options |= {"position": "learned", "position_shared": False}
        else:
            options["ssm_layers"] = [layer for layer in self.ssm_layers if layer < layers]
            if self.window is not None:
                options["window"] = (self.window[0] if self.decoder_window is None else self.decoder_window, 0)
        return self._part(**options)

    def _part(self, **options: Any) -> SpadeConfig:
        own = {field.name: getattr(self, field.name) for field in fields(SpadeConfig)}
        outputs = {"attn_implementation": self._attn_implementation, "output_attentions": self.output_attentions}
        return SpadeConfig(**own | outputs | {"is_encoder_decoder": False} | options)

    def why_no_cache(self) -> str | None:
        return self.decoder_config.why_no_cache()

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> SpadeConfig:
        """Of the decoder alone, such as for a cache with one entry a layer of it; otherwise this one."""
        return self.decoder_config if decoder and not encoder else self

    def validate_architecture(self):
        check = self._check
        one_sided = self.mixer != "ssm" and tuple(self.window or ())[1:] == (0,)
        check("window", not one_sided, "a right of 1 or more for an encoder")
        check("causal", not self.causal, "False for an encoder")
        check("add_cross_attention", not self.add_cross_attention, "False for an encoder")
        check("input_size", self.input_size is None, "None for an encoder-decoder")
        check("adaptive_cutoffs", self.adaptive_cutoffs is None, "None for an encoder-decoder")
        check("pad_token_id", self.pad_token_id is not None, "an id for an encoder-decoder")
        starts = 0 <= self.decoder_start_token_id < self.vocab_size
        check("decoder_start_token_id", starts, f"an id from 0 to {self.vocab_size - 1}")
        ends = self.pooling == "first" or self.eos_token_id is not None
        check("eos_token_id", ends, "an id for pooling 'last'")
        has_window = self.decoder == "local" and self.window is not None
        check("decoder_window", self.decoder_window is None or has_window, "None for a decoder without a window")
        for part in (self.encoder_config, self.decoder_config):
            part.validate_architecture()
