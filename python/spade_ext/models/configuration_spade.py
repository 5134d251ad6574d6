# Copyright 2026 The spade-ext developers.
"""The configuration of SPADE models."""

from collections.abc import Sequence
from typing import Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

from ..nn.hippo import DIAGONAL_INITS


@strict
class SpadeConfig(PreTrainedConfig):
    """Sizes and options of a SPADE encoder: local attention in every layer, a state space model in some.

    Args:
        vocab_size, hidden_size, num_hidden_layers, num_attention_heads, intermediate_size, hidden_act: as in BERT.
        dropout: after the embedding, each sublayer and the activation of the feed-forward.
        window: (left, right), the tokens that a token attends to before and after itself.
        causal: no token sees a later one, in attention and in the state space model. window's right is 0 then.
        position: "t5" for learned relative position biases, None for none.
        position_shared: one bias table, that of layer 0, for all layers.
        position_num_buckets, position_max_distance: of the bias tables.
        ssm_layers: the layers with a state space model beside the attention; the paper has it in layer 0.
        ssm_kind: "s4d".
        ssm_init, ssm_d_state, ssm_n_ssm, ssm_disc, ssm_lr: see `spade_ext.nn.S4`; ssm_lr = 0 freezes A and B.
        prenorm: LayerNorm before each sublayer, and one after the last layer; otherwise after each sublayer.
        layer_norm_eps: epsilon of every LayerNorm.
        initializer_range: standard deviation of embeddings and Linear weights other than attention's.
        pooling: how the classifier reads a sequence: the mean, the first or the last of its real tokens.
        classifier_dropout: before the classifier's last Linear.

    Source: SPADE (arXiv 2212.08136), section 3.
    """

    model_type = "spade"

    vocab_size: int = 32128
    hidden_size: int = 512
    num_hidden_layers: int = 6
    num_attention_heads: int = 8
    intermediate_size: int = 2048
    hidden_act: str = "gelu"
    dropout: float | int = 0.1
    window: list[int] | tuple[int, ...] = (128, 128)
    causal: bool = False
    position: Literal["t5"] | None = "t5"
    position_shared: bool = False
    position_num_buckets: int = 32
    position_max_distance: int = 128
    ssm_layers: list[int] | tuple[int, ...] = (0,)
    ssm_kind: Literal["s4d"] = "s4d"
    ssm_init: str = "legs"
    ssm_d_state: int = 64
    ssm_n_ssm: int | None = None
    ssm_disc: Literal["zoh", "bilinear", "dss"] = "zoh"
    ssm_lr: float | int | None = None
    prenorm: bool = True
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    pooling: Literal["mean", "first", "last"] = "mean"
    classifier_dropout: float | int = 0.0
    pad_token_id: int | None = 0

    def validate_architecture(self):
        """Refuses combinations that cannot be built, when the configuration is made."""

        def check(name: str, fits: bool, expected: str) -> None:
            if not fits:
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected {expected}")

        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"):
            check(name, getattr(self, name) > 0, "at least 1")
        heads, width = self.num_attention_heads, self.hidden_size
        check("num_attention_heads", width % heads == 0, f"a divisor of hidden_size = {width}")
        check("window", len(self.window) == 2 and min(self.window) >= 0, "(left, right), both 0 or more")
        check("window", not self.causal or self.window[1] == 0, "a right of 0, since causal is True")
        check("hidden_act", self.hidden_act in ACT2FN, "an activation that transformers knows")
        layers = self.num_hidden_layers
        check("ssm_layers", _distinct_indices(self.ssm_layers, layers), f"distinct layers from 0 to {layers - 1}")
        check("ssm_init", self.ssm_init in DIAGONAL_INITS, f"one of {', '.join(DIAGONAL_INITS)}")
        check("ssm_d_state", self.ssm_d_state >= 2 and self.ssm_d_state % 2 == 0, "an even number of at least 2")
        copies = self.ssm_n_ssm
        check(
            "ssm_n_ssm", copies is None or (copies > 0 and width % copies == 0), f"a divisor of hidden_size = {width}"
        )


def _distinct_indices(indices: Sequence[int], size: int) -> bool:
    return len(set(indices)) == len(indices) and all(0 <= index < size for index in indices)
