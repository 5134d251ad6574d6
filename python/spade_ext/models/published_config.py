# Copyright 2026 The spade-ext developers.
"""The configuration of a published model, from the names and shapes of its tensors."""

from collections.abc import Mapping
from itertools import accumulate
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from torch import Size, Tensor

from .configuration_spade import SpadeConfig

SPADE_LM, MEGA_LM, MEGA_ENCODER = "spade_lm", "mega_lm", "lra"
FIRST_LAYERS = {
    SPADE_LM: "decoder.layers.0.self_attn.q.weight",
    MEGA_LM: "decoder.layers.0.mega_layer.v_proj.weight",
    MEGA_ENCODER: "encoder.encoder.layers.0.mega_layer.v_proj.weight",
}

# What the tensors do not tell: as the published code has it unless it is asked otherwise, or to be given.
TO_BE_GIVEN = object()
DICTIONARY = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
SPADE = {
    **DICTIONARY,
    "hidden_act": "relu",
    "prenorm": True,
    "scale_embedding": True,
    "window": TO_BE_GIVEN,
    "num_attention_heads": TO_BE_GIVEN,
}
MEGA = {
    **DICTIONARY,
    "hidden_act": "silu",
    "num_attention_heads": 1,
    "chunk_size": TO_BE_GIVEN,
    "mega_activation": TO_BE_GIVEN,
    "mega_truncation": TO_BE_GIVEN,
}


def published_kind(tensors: Mapping[str, Tensor]) -> str:
    """Which published model a state dict is of.

    Raises:
        ValueError: it is of none.
    """
    for kind, name in FIRST_LAYERS.items():
        if name in tensors:
            return kind
    expected = " or ".join(FIRST_LAYERS.values())
    raise ValueError(
        f"the tensors are of no model of SPADE or MEGA, expected {expected} among them; single modules are loaded by "
        "spade_ext.convert.load_reference"
    )


def published_config(tensors: Mapping[str, Tensor], **options: Any) -> SpadeConfig:
    """The configuration of the model whose published state dict is `tensors`.

    Args:
        tensors: of fairseq's `spade_lm` (microsoft/EfficientLongSequenceModeling), or of `mega_lm` or an encoder of
            `lra` (facebookresearch/mega).
        options: other fields of SpadeConfig. Those that the tensors do not tell and that have no usual value must be
            among them: window; chunk_size, mega_activation and mega_truncation of MEGA, None for none. Heads are told
            by a table of relative positions only. Others are as in fairseq unless given.

    Raises:
        ValueError: a missing option, a tensor that every such model has, or options that do not fit together.
    """
    kind = published_kind(tensors)
    shapes = Shapes(tensors, FIRST_LAYERS[kind].partition("layers.")[0])
    found = (_spade_options if kind == SPADE_LM else _mega_options)(shapes) | options
    for name, value in found.items():
        if value is TO_BE_GIVEN:
            raise ValueError(f"{name} is not told by the tensors, expected it among the options")
    try:
        return SpadeConfig(**found)
    except StrictDataclassError as error:
        raise ValueError(str(error.__cause__ or error)) from None


class Shapes:
    """The shapes of the tensors below a prefix."""

    def __init__(self, tensors: Mapping[str, Tensor], prefix: str):
        self.tensors, self.prefix = tensors, prefix

    def __contains__(self, name: str) -> bool:
        return self.prefix + name in self.tensors

    def tensor(self, name: str) -> Tensor:
        if name not in self:
            raise ValueError(f"tensors lacks {self.prefix}{name}, which every published model of its kind has")
        return self.tensors[self.prefix + name]

    def __getitem__(self, name: str) -> Size:
        return self.tensor(name).shape

    def count(self, prefix: str) -> int:
        """How many modules are numbered after `prefix`."""
        prefix = self.prefix + prefix
        return len({name.removeprefix(prefix).split(".")[0] for name in self.tensors if name.startswith(prefix)})


def _embedding_options(shapes: Shapes) -> dict[str, Any]:
    if "embed_tokens.embeddings.0.0.weight" not in shapes:
        return {"vocab_size": shapes["embed_tokens.weight"][0]}
    bands = range(shapes.count("embed_tokens.embeddings."))
    sizes, dims = zip(*(shapes[f"embed_tokens.embeddings.{band}.0.weight"] for band in bands), strict=True)
    *cutoffs, vocab_size = accumulate(sizes)
    return {"vocab_size": vocab_size, "adaptive_cutoffs": cutoffs, "adaptive_factor": dims[0] // dims[len(dims) > 1]}


def _head_options(shapes: Shapes) -> dict[str, Any]:
    """Whether a plain head is tied to the embedding."""
    if "output_projection.weight" not in shapes:
        return {}
    head, embedding = shapes.tensor("output_projection.weight"), shapes.tensor("embed_tokens.weight")
    return {"tie_word_embeddings": head.equal(embedding)}


def _spade_options(shapes: Shapes) -> dict[str, Any]:
    layers = shapes.count("layers.")
    intermediate_size, hidden_size = shapes["layers.0.fc1.weight"]
    options = {
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": layers,
        "causal": True,
        "position": "sinusoidal" if "embed_positions._float_tensor" in shapes else None,
        "embed_norm": "layernorm_embedding.weight" in shapes,
        "final_norm": "layer_norm.weight" in shapes,
        "ssm_layers": [layer for layer in range(layers) if f"layers.{layer}.s4_module.s4.D" in shapes],
    }
    if (table := "layers.0.self_attn.relative_attention_bias.weight") in shapes:
        buckets, heads = shapes[table]
        options |= {"position": "t5", "position_shared": True}
        options |= {"position_num_buckets": buckets, "num_attention_heads": heads}
    if options["ssm_layers"]:
        options |= _ssm_options(shapes, f"layers.{options['ssm_layers'][0]}.")
    return SPADE | _embedding_options(shapes) | _head_options(shapes) | options


def _ssm_options(shapes: Shapes, layer: str) -> dict[str, Any]:
    if f"{layer}aggregate.weight" in shapes:
        options = {"ssm_combine": "concat"}
    else:
        options = {"ssm_combine": "add" if f"{layer}norm_global.weight" in shapes else "stack"}
    kernel = f"{layer}s4_module.s4.kernel.kernel."
    *_, copies, half, _ = shapes[f"{kernel}B"]
    options |= {"ssm_n_ssm": copies, "ssm_d_state": 2 * half}
    if f"{kernel}P" not in shapes:
        return options | {"ssm_kind": "s4d", "ssm_init": "lin"}
    length = int(shapes.tensor(f"{kernel}L"))  # 0 where C is not truncated yet
    return options | {"ssm_rank": shapes[f"{kernel}P"][0], "ssm_l_max": length or TO_BE_GIVEN}


def _mega_options(shapes: Shapes) -> dict[str, Any]:
    layer = "layers.0.mega_layer."
    h_dim, hidden_size = shapes[f"{layer}v_proj.weight"]
    causal = shapes.prefix == "decoder."
    options = {
        "mixer": "mega",
        "ssm_layers": (),
        "hidden_size": hidden_size,
        "intermediate_size": shapes["layers.0.nffn.fc1.weight"][0],
        "num_hidden_layers": shapes.count("layers."),
        "causal": causal,
        "mega_h_dim": h_dim,
        "mega_z_dim": shapes[f"{layer}gamma"][1],
        "mega_n_dim": shapes[f"{layer}move.alpha"][1],
        "embed_norm": any(f"embed_norm.norm.{name}" in shapes for name in ("weight", "scalar")),
        "norm": _norm(shapes, f"{layer}norm.norm."),
        "position": "rotary",
    }
    table = f"{layer}rel_pos_bias.rel_pos_bias"
    if table in shapes:
        options |= {"position": "simple", "max_position_embeddings": (shapes[table][0] + 1) // 2}
    if causal:
        options |= {"scale_embedding": True, "prenorm": not options["embed_norm"]}
        return MEGA | _embedding_options(shapes) | _head_options(shapes) | options
    options["prenorm"] = any(f"final_norm.norm.{name}" in shapes for name in ("weight", "scalar"))
    if "embed_tokens.embed.weight" in shapes:
        return MEGA | options | {"vocab_size": shapes["embed_tokens.embed.weight"][0]}
    return MEGA | options | {"input_size": 1, "pad_token_id": None}


def _norm(shapes: Shapes, prefix: str) -> str:
    if f"{prefix}running_mean" in shapes:
        raise ValueError(f"{shapes.prefix}{prefix[:-1]} is a batch norm, expected a layernorm, rmsnorm or scalenorm")
    if f"{prefix}scalar" in shapes:
        return "scalenorm"
    return "layernorm" if f"{prefix}bias" in shapes else "rmsnorm"
