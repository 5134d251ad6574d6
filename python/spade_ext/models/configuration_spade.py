# Copyright 2026 The spade-ext developers.
"""The configuration of SPADE models."""

from collections.abc import Sequence
from typing import Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

from ..nn.hippo import DIAGONAL_INITS, DPLR_INITS, SMALLEST_RANK


@strict
class SpadeConfig(PreTrainedConfig):
    """Sizes and options of a SPADE encoder: local attention in every layer, a state space model in some.

    Args:
        vocab_size, hidden_size, num_hidden_layers, num_attention_heads, intermediate_size, hidden_act: as in BERT.
        input_size: numbers a token, for sequences of numbers such as grey values in place of `vocab_size` ids: a Linear
            embeds them. None for ids.
        dropout: after the embedding, each sublayer and the activation of the feed-forward.
        mixer: "window", local attention in every layer; or "ssm", a state space model alone in every layer, a
            baseline that has no use for `window`, `position`, `ssm_layers` and `ssm_combine`.
        window: (left, right), the tokens that a token attends to before and after itself.
        causal: no token sees a later one, in attention and in the state space model; the same as a window whose
            right is 0, which makes it True.
        position: relative position biases, "t5", "alibi", "simple" or "rotary" (see `spade_ext.nn.LocalAttention`),
            or None for none.
        position_shared: one bias table, that of layer 0, for all layers.
        position_num_buckets, position_max_distance: of "t5".
        ssm_layers: the layers with a state space model beside the attention; the paper has it in layer 0.
        ssm_kind: "s4" and "s4d", see `spade_ext.nn.S4`; "ema", see `spade_ext.nn.EMA`.
        ssm_d_state: size of a state; None is 64, for "ema" 16.
        ssm_init, ssm_rank, ssm_n_ssm, ssm_l_max, ssm_disc, ssm_lr: see `spade_ext.nn.S4`; ssm_lr = 0 freezes A and B.
        ssm_combine: the SSM's output g beside the attention's l: "concat", normalised apart, concatenated and
            projected back; "add", ssm_weight norm(g) + (1 - ssm_weight) norm(l); "stack", attention over g.
        ssm_weight: weight of the SSM in "add".
        prenorm: LayerNorm before each sublayer; otherwise after.
        final_norm: LayerNorm after the last layer; None: where prenorm.
        layer_norm_eps: epsilon of every LayerNorm.
        initializer_range: standard deviation of embeddings and Linear weights other than attention's.
        pooling: how the classifier reads a sequence: the mean, the first or the last of its real tokens.
        classifier_dropout: before the classifier's last Linear.

    Source: SPADE (arXiv 2212.08136), section 3.
    """

    model_type = "spade"

    vocab_size: int = 32128
    input_size: int | None = None
    hidden_size: int = 512
    num_hidden_layers: int = 6
    num_attention_heads: int = 8
    intermediate_size: int = 2048
    hidden_act: str = "gelu"
    dropout: float | int = 0.1
    mixer: Literal["window", "ssm"] = "window"
    window: list[int] | tuple[int, ...] = (128, 128)
    causal: bool = False
    position: Literal["t5", "alibi", "simple", "rotary"] | None = "t5"
    position_shared: bool = False
    position_num_buckets: int = 32
    position_max_distance: int = 128
    ssm_layers: list[int] | tuple[int, ...] = (0,)
    ssm_kind: Literal["s4", "s4d", "ema"] = "s4"
    ssm_init: str = "legs"
    ssm_d_state: int | None = None
    ssm_rank: int = 1
    ssm_n_ssm: int | None = None
    ssm_l_max: int = 1024
    ssm_disc: Literal["zoh", "bilinear", "dss"] = "zoh"
    ssm_lr: float | int | None = None
    ssm_combine: Literal["concat", "add", "stack"] = "concat"
    ssm_weight: float | int = 0.5
    prenorm: bool = True
    final_norm: bool | None = None
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    pooling: Literal["mean", "first", "last"] = "mean"
    classifier_dropout: float | int = 0.0
    pad_token_id: int | None = 0

    def __post_init__(self, **kwargs):
        if self.mixer == "window" and len(self.window) == 2 and self.window[1] == 0:
            self.causal = True
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        """Refuses combinations that cannot be built, when the configuration is made."""

        def check(name: str, fits: bool, expected: str) -> None:
            if not fits:
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected {expected}")

        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"):
            check(name, getattr(self, name) > 0, "at least 1")
        check("input_size", self.input_size is None or self.input_size > 0, "at least 1, or None")
        heads, width = self.num_attention_heads, self.hidden_size
        check("num_attention_heads", width % heads == 0, f"a divisor of hidden_size = {width}")
        check("window", len(self.window) == 2 and min(self.window) >= 0, "(left, right), both 0 or more")
        one_sided = self.mixer == "ssm" or not self.causal or self.window[1] == 0
        check("window", one_sided, "a right of 0, since causal is True")
        check("hidden_act", self.hidden_act in ACT2FN, "an activation that transformers knows")
        layers = self.num_hidden_layers
        check("ssm_layers", _distinct_indices(self.ssm_layers, layers), f"distinct layers from 0 to {layers - 1}")
        if self.position == "t5":
            buckets = self.position_num_buckets
            check("position_num_buckets", buckets >= 4 and buckets % 2 == 0, "an even number of at least 4")
            far_enough = self.position_max_distance >= buckets
            check("position_max_distance", far_enough, f"at least position_num_buckets = {buckets}")
        head_width = width // heads
        even = head_width % 2 == 0
        check("position", self.position != "rotary" or even, f"another one for heads of odd width {head_width}")
        check("ssm_lr", self.ssm_lr is None or self.ssm_lr >= 0, "0 or more")
        check("ssm_weight", 0 <= self.ssm_weight <= 1, "0 to 1")
        check("ssm_d_state", self.ssm_d_state is None or self.ssm_d_state > 0, "at least 1")
        if self.ssm_kind == "ema":
            return
        inits = DPLR_INITS if self.ssm_kind == "s4" else DIAGONAL_INITS
        check("ssm_init", self.ssm_init in inits, f"one of {', '.join(inits)} for ssm_kind {self.ssm_kind!r}")
        check("ssm_d_state", (self.ssm_d_state or 64) % 2 == 0, "an even number")
        copies = self.ssm_n_ssm
        check(
            "ssm_n_ssm", copies is None or (copies > 0 and width % copies == 0), f"a divisor of hidden_size = {width}"
        )
        if self.ssm_init == "hippo":
            check("ssm_n_ssm", (copies or width) % 2 == 0, "an even number of copies for ssm_init 'hippo'")
        if self.ssm_kind == "s4":
            smallest = SMALLEST_RANK[self.ssm_init]
            check("ssm_rank", self.ssm_rank >= smallest, f"at least {smallest} for ssm_init {self.ssm_init!r}")
            check("ssm_l_max", self.ssm_l_max > 0, "at least 1")


def _distinct_indices(indices: Sequence[int], size: int) -> bool:
    return len(set(indices)) == len(indices) and all(0 <= index < size for index in indices)
