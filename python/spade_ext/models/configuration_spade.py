# Copyright 2026 The spade-ext developers.
"""The configuration of SPADE models."""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

from ..nn.hippo import DIAGONAL_INITS, DPLR_INITS, SMALLEST_RANK
from .mixers import MIXERS
from .presets import PRESETS, preset_options

BIAS_TABLES = ("t5", "alibi", "simple", "rotary")
ABSOLUTE_POSITIONS = ("learned", "sinusoidal")


@strict
class SpadeConfig(PreTrainedConfig):
    """Sizes and options of a SPADE model: local attention in every layer, a state space model in some.

    Args:
        vocab_size, hidden_size, num_hidden_layers, num_attention_heads, intermediate_size, hidden_act: as in BERT.
        input_size: numbers a token, for sequences of numbers such as grey values in place of `vocab_size` ids: a Linear
            embeds them. None for ids.
        dropout: after the embedding, each sublayer and, where activation_dropout is None, the activation of the
            feed-forward.
        attention_dropout: of the attention's weights.
        activation_dropout: of the activation of the feed-forward; None is `dropout`.
        mixer: "window", "chunk" or "full", attention in every layer; "mega", MEGA's gated attention, in a window, in
            chunks, or in full rows where there is neither; "ssm", a state space model alone in every layer, a baseline
            that has no use for `window`, `position`, `ssm_layers` and `ssm_combine`; or one that
            `spade_ext.models.register_mixer` added.
        window: (left, right), the tokens that a token attends to before and after itself; None is (128, 128) for the
            mixer "window", or (128, 0) where causal.
        chunk_size: tokens of a chunk.
        causal: no token sees a later one, in attention and in the state space model; a window whose right is 0 makes
            it True.
        position: relative position biases, "t5", "alibi", "simple" or "rotary", or "rope" (see
            `spade_ext.nn.LocalAttention`); "learned" or "sinusoidal" vectors that are added to the embedding; or None
            for none. "mega" knows "simple" and "rotary".
        position_shared: one bias table, that of layer 0, for all layers.
        position_num_buckets, position_max_distance: of "t5".
        max_position_embeddings: longest document of "learned" positions, and longest row of "simple" ones without a
            window and a chunk.
        mega_z_dim, mega_h_dim, mega_n_dim, mega_activation, mega_truncation: z_dim, h_dim (None is intermediate_size),
            n_dim, activation and truncation of `spade_ext.nn.GatedAttention`.
        ssm_layers: the layers with a state space model beside the mixer; the paper has it in layer 0.
        ssm_kind: "s4" and "s4d", see `spade_ext.nn.S4`; "ema", see `spade_ext.nn.EMA`.
        ssm_d_state: size of a state; None is 64, for "ema" 16.
        ssm_init, ssm_rank, ssm_n_ssm, ssm_l_max, ssm_disc, ssm_lr: see `spade_ext.nn.S4`; ssm_lr = 0 freezes A and B.
        ssm_combine: the SSM's output g beside the mixer's l: "concat", normalised apart, concatenated and
            projected back; "add", ssm_weight norm(g) + (1 - ssm_weight) norm(l); "stack", the mixer over g.
        ssm_weight: weight of the SSM in "add".
        ssm_init_scale: the weight that the SSM's norm starts from; 0 starts as the model without SSM, and training
            opens the branch.
        add_cross_attention: layers also attend to an encoder's output, between mixer and feed-forward.
        norm: "layernorm", "rmsnorm" or "scalenorm", of every norm.
        prenorm: a norm before each sublayer; otherwise after.
        final_norm: a norm after the last layer; None: where prenorm.
        embed_norm: a norm after the embedding.
        layer_norm_eps: epsilon of every norm.
        scale_embedding: embeddings are multiplied by sqrt(hidden_size).
        initializer_range: standard deviation of embeddings and Linear weights other than attention's.
        tie_word_embeddings: a language model's output weights are its embeddings.
        adaptive_cutoffs: the ids at which the bands of an adaptive input and softmax begin, whose ids are sorted by
            frequency; None for a plain embedding and head.
        adaptive_factor: each band is narrower than the one before by it.
        adaptive_dropout: before the adaptive softmax and in its tails.
        use_cache: evaluation returns a `spade_ext.models.SpadeCache`, from which generation goes on; None: where there
            can be one, which needs a causal model.
        pooling: how the classifier reads a sequence: the mean, the first or the last of its real tokens.
        classifier_dropout: before the classifier's last Linear.

    Source: SPADE (arXiv 2212.08136), section 3.
    """

    model_type = "spade"
    keys_to_ignore_at_inference = ["cache"]
    presets: ClassVar[dict[str, dict[str, Any]]] = PRESETS

    vocab_size: int = 32128
    input_size: int | None = None
    hidden_size: int = 512
    num_hidden_layers: int = 6
    num_attention_heads: int = 8
    intermediate_size: int = 2048
    hidden_act: str = "gelu"
    dropout: float | int = 0.1
    attention_dropout: float | int = 0.0
    activation_dropout: float | int | None = None
    mixer: str = "window"
    window: list[int] | tuple[int, ...] | None = None
    chunk_size: int | None = None
    causal: bool = False
    position: Literal["t5", "alibi", "simple", "rotary", "rope", "learned", "sinusoidal"] | None = "t5"
    position_shared: bool = False
    position_num_buckets: int = 32
    position_max_distance: int = 128
    max_position_embeddings: int = 1024
    mega_z_dim: int = 64
    mega_h_dim: int | None = None
    mega_n_dim: int = 16
    mega_activation: Literal["softmax", "relu2", "laplace"] = "softmax"
    mega_truncation: int | None = None
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
    ssm_init_scale: float | int = 1.0
    add_cross_attention: bool = False
    norm: Literal["layernorm", "rmsnorm", "scalenorm"] = "layernorm"
    prenorm: bool = True
    final_norm: bool | None = None
    embed_norm: bool = False
    layer_norm_eps: float = 1e-5
    scale_embedding: bool = False
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True
    adaptive_cutoffs: list[int] | tuple[int, ...] | None = None
    adaptive_factor: int = 4
    adaptive_dropout: float | int = 0.0
    use_cache: bool | None = None
    pooling: Literal["mean", "first", "last"] = "mean"
    classifier_dropout: float | int = 0.0
    pad_token_id: int | None = 0
    bos_token_id: int | None = None
    eos_token_id: int | None = None

    @classmethod
    def preset(cls, name: str, **options: Any) -> "SpadeConfig":
        """The model of a published experiment, such as "wikitext103"; `options` replace its fields.

        Names are those of `presets`.
        """
        return cls(**preset_options(cls.presets, name) | options)

    def __post_init__(self, **kwargs):
        if self.mixer == "window" and self.window is None:
            self.window = (128, 0 if self.causal else 128)
        if self.mixer != "ssm" and self.window is not None and len(self.window) == 2 and self.window[1] == 0:
            self.causal = True
        super().__post_init__(**kwargs)
        if self.use_cache is None:
            self.use_cache = self.why_no_cache() is None

    @property
    def has_relative_position(self) -> bool:
        return self.position is not None and self.position not in ABSOLUTE_POSITIONS

    def why_no_cache(self) -> str | None:
        """The field and value that a model with a cache cannot have, or None."""
        if not self.causal:
            return "causal = False"
        if self.mixer in MIXERS and not hasattr(MIXERS[self.mixer], "initial_state"):
            return f"mixer = {self.mixer!r}"
        if self.mixer == "mega" and self.mega_truncation is not None:
            return f"mega_truncation = {self.mega_truncation}"
        if (self.ssm_layers or self.mixer == "ssm") and self.ssm_kind == "s4d" and self.ssm_disc == "dss":
            return "ssm_disc = 'dss'"
        return None

    @property
    def has_constant_states(self) -> bool:
        """Whether the states of a cache do not grow with the tokens."""
        return self.mixer not in ("full", "mega") or self.window is not None or self.chunk_size is not None

    def validate_architecture(self):
        """Refuses combinations that cannot be built, when the configuration is made."""
        self._validate_sizes()
        self._validate_mixer()
        self._validate_position()
        self._validate_ssm()
        self._validate_vocabulary()
        self._check("use_cache", not (self.use_cache and self.why_no_cache()), f"False with {self.why_no_cache()}")

    def _check(self, name: str, fits: bool, expected: str) -> None:
        if not fits:
            raise ValueError(f"{name} is {getattr(self, name)!r}, expected {expected}")

    def _validate_sizes(self) -> None:
        check = self._check
        sizes = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
        for name in (*sizes, "max_position_embeddings", "mega_z_dim", "mega_n_dim", "adaptive_factor"):
            check(name, getattr(self, name) > 0, "at least 1")
        for name in ("input_size", "chunk_size", "mega_h_dim", "mega_truncation"):
            check(name, getattr(self, name) is None or getattr(self, name) > 0, "at least 1, or None")
        for name in ("dropout", "attention_dropout", "adaptive_dropout", "classifier_dropout", "activation_dropout"):
            check(name, 0 <= (getattr(self, name) or 0) <= 1, "0 to 1")
        check("attention_dropout", self.attention_dropout < 1, "less than 1")
        heads, width = self.num_attention_heads, self.hidden_size
        check("num_attention_heads", width % heads == 0, f"a divisor of hidden_size = {width}")
        check("hidden_act", self.hidden_act in ACT2FN, "an activation that transformers knows")

    def _validate_mixer(self) -> None:
        check, mixer = self._check, self.mixer
        check("mixer", mixer in MIXERS, f"one of {', '.join(sorted(MIXERS))}")
        if self.window is not None:
            check("window", len(self.window) == 2 and min(self.window) >= 0, "(left, right), both 0 or more")
            one_sided = mixer == "ssm" or not self.causal or self.window[1] == 0
            check("window", one_sided, "a right of 0, since causal is True")
        check("window", mixer not in ("chunk", "full") or self.window is None, f"None for the mixer {mixer!r}")
        check("chunk_size", mixer != "chunk" or self.chunk_size is not None, "at least 1 for the mixer 'chunk'")
        check("chunk_size", mixer not in ("window", "full") or self.chunk_size is None, f"None for the mixer {mixer!r}")
        both = mixer == "mega" and self.window is not None and self.chunk_size is not None
        check("chunk_size", not both, "None beside a window")
        if mixer == "mega":
            scores = self.window is None or self.mega_activation == "softmax"
            check("mega_activation", scores, "'softmax' in a window")
            check("position", self.position in ("simple", "rotary"), "'simple' or 'rotary' for the mixer 'mega'")
            check("position_shared", not self.position_shared, "False for the mixer 'mega'")
            check("mega_z_dim", self.position != "rotary" or self.mega_z_dim % 2 == 0, "an even number for 'rotary'")
            check("attention_dropout", self.attention_dropout == 0, "0 for the mixer 'mega', which has none")

    def _validate_position(self) -> None:
        check = self._check
        if self.mixer == "ssm":
            check("position", self.position not in ABSOLUTE_POSITIONS, "None for the mixer 'ssm'")
            return
        if self.position == "t5":
            buckets = self.position_num_buckets
            check("position_num_buckets", buckets >= 4 and buckets % 2 == 0, "an even number of at least 4")
            far_enough = self.position_max_distance >= buckets
            check("position_max_distance", far_enough, f"at least position_num_buckets = {buckets}")
        no_table = self.position is not None and self.position not in BIAS_TABLES
        shared = f"False for the position {self.position!r}, which has no bias table"
        check("position_shared", not (no_table and self.position_shared), shared)
        head_width = self.hidden_size // self.num_attention_heads
        rotates = self.position in ("rotary", "rope") and self.mixer != "mega"
        check("position", not rotates or head_width % 2 == 0, f"another one for heads of odd width {head_width}")
        even = self.position != "sinusoidal" or (self.hidden_size % 2 == 0 and self.hidden_size > 2)
        check("hidden_size", even, "an even number of at least 4 for the position 'sinusoidal'")

    def _validate_ssm(self) -> None:
        check, width, layers = self._check, self.hidden_size, self.num_hidden_layers
        check("ssm_layers", _distinct_indices(self.ssm_layers, layers), f"distinct layers from 0 to {layers - 1}")
        check("ssm_lr", self.ssm_lr is None or self.ssm_lr >= 0, "0 or more")
        check("ssm_weight", 0 <= self.ssm_weight <= 1, "0 to 1")
        beside = self.mixer != "ssm" and self.ssm_combine != "stack"
        check("ssm_init_scale", beside or self.ssm_init_scale == 1, "1 where nothing stands beside the SSM")
        check("ssm_d_state", self.ssm_d_state is None or self.ssm_d_state > 0, "at least 1")
        if self.ssm_kind == "ema":
            return
        inits = DPLR_INITS if self.ssm_kind == "s4" else DIAGONAL_INITS
        check("ssm_init", self.ssm_init in inits, f"one of {', '.join(inits)} for ssm_kind {self.ssm_kind!r}")
        check("ssm_d_state", (self.ssm_d_state or 64) % 2 == 0, "an even number")
        copies = self.ssm_n_ssm
        divides = copies is None or (copies > 0 and width % copies == 0)
        check("ssm_n_ssm", divides, f"a divisor of hidden_size = {width}")
        if self.ssm_init == "hippo":
            check("ssm_n_ssm", (copies or width) % 2 == 0, "an even number of copies for ssm_init 'hippo'")
        if self.ssm_kind == "s4":
            smallest = SMALLEST_RANK[self.ssm_init]
            check("ssm_rank", self.ssm_rank >= smallest, f"at least {smallest} for ssm_init {self.ssm_init!r}")
            check("ssm_l_max", self.ssm_l_max > 0, "at least 1")

    def _validate_vocabulary(self) -> None:
        check, pad = self._check, self.pad_token_id
        embedded = pad is None or self.input_size is not None or 0 <= pad < self.vocab_size
        check("pad_token_id", embedded, f"an id from 0 to {self.vocab_size - 1}, or None")
        if self.adaptive_cutoffs is None:
            return
        cutoffs = list(self.adaptive_cutoffs)
        rising = cutoffs == sorted(set(cutoffs)) and cutoffs and cutoffs[0] > 0 and cutoffs[-1] < self.vocab_size
        check("adaptive_cutoffs", bool(rising), f"rising ids from 1 to {self.vocab_size - 1}")
        narrowest = self.hidden_size // self.adaptive_factor ** len(cutoffs)
        check("adaptive_factor", narrowest > 0, f"a last band of at least 1 for hidden_size = {self.hidden_size}")
        check("tie_word_embeddings", self.tie_word_embeddings, "True with adaptive_cutoffs")
        check("pad_token_id", pad is None or pad < cutoffs[0], f"an id of the first band, below {cutoffs[0]}")
        check("input_size", self.input_size is None, "None with adaptive_cutoffs")


def _distinct_indices(indices: Sequence[int], size: int) -> bool:
    return len(set(indices)) == len(indices) and all(0 <= index < size for index in indices)
