# Copyright 2026 The spade-ext developers.
"""The published names of our models, for `spade_ext.convert`."""

import torch
from torch import nn

from ..convert import (
    FROM_COLUMN,
    LEFT_ALONE,
    Derived,
    Rule,
    Rules,
    below,
    linears,
    rule,
    rules,
    same,
)
from .configuration_spade import SpadeConfig
from .mixers import MegaMixer, SpadeMixer
from .modeling_spade import SpadeForCausalLM, SpadeLayer, SpadeModel, SpadeValueEmbedding
from .vocabulary import AdaptiveEmbedding


@rules.register
def _(module: SpadeForCausalLM) -> Rules:
    """`spade_lm` and `mega_lm`."""
    _check_decoder(module.config)
    head = _adaptive_head(module) if hasattr(module, "adaptive_head") else _plain_head(module)
    return [
        Derived(("decoder.version",), make=lambda: torch.tensor([3.0])),
        *below("model.", "decoder.", _backbone(module.model)),
        *below("", "decoder.", head),
    ]


@rules.register
def _(module: SpadeModel) -> Rules:
    """`MegaLRAEncoder` in its model, or SPADE's layers alone."""
    if module.config.mixer == "mega":
        if module.config.causal:
            raise ValueError("causal is True, expected False: MEGA's encoder reads both ways")
        return below("", "encoder.encoder.", _backbone(module))
    if module.norm.state_dict():
        raise ValueError("final_norm is True, expected False: the layers alone have no final norm")
    outside = [Rule(name, (), LEFT_ALONE) for name in module.state_dict() if not name.startswith("layers.")]
    return [*outside, *below("layers.", "", _layers(module))]


def _check_decoder(config: SpadeConfig) -> None:
    known = {"mixer": ("window", "mega"), "norm": ("layernorm",), "position": ("t5", "sinusoidal", None)}
    if config.mixer == "mega":
        known = {"window": (None,)}
    elif config.position == "t5" and config.num_hidden_layers > 1:
        known["position_shared"] = (True,)
    for name, values in known.items():
        if (value := getattr(config, name)) not in values:
            raise ValueError(f"{name} is {value!r}, expected {' or '.join(map(repr, values))} as published")


def _backbone(module: SpadeModel) -> Rules:
    mega = module.config.mixer == "mega"
    embed_norm, final_norm = rules(module.embed_norm), rules(module.norm)
    if mega and module.config.causal:
        final_norm = _dispensable(final_norm)
    return [
        *_embeddings(module),
        *below("embed_norm.", "embed_norm.norm." if mega else "layernorm_embedding.", embed_norm),
        *below("layers.", "layers.", _layers(module)),
        *below("norm.", "final_norm.norm." if mega else "layer_norm.", final_norm),
    ]


def _dispensable(norm: Rules) -> Rules:
    """Those of a norm whose weights a file may lack: it then scales by 1 and shifts by 0."""
    return [Rule(r.ours, r.published, neutral=0.0 if r.ours == "bias" else 1.0) for r in norm]


def _embeddings(module: SpadeModel) -> Rules:
    if module.config.input_size is not None:
        return below("embed_values.", "embed_tokens.", rules(module.embed_values))
    position = [Derived(("embed_positions._float_tensor",))] if module.config.position == "sinusoidal" else []
    published = "embed_tokens." if module.config.causal else "embed_tokens.embed."
    return [*below("embed_tokens.", published, rules(module.embed_tokens)), *position]


@rules.register
def _(module: nn.Embedding) -> Rules:
    return same("weight")


@rules.register
def _(module: SpadeValueEmbedding) -> Rules:
    if module.in_features != 1:
        raise ValueError(f"input_size is {module.in_features}, expected 1: the published code embeds single numbers")
    return [rule("weight", "weight", FROM_COLUMN), *same("bias")]


@rules.register
def _(module: AdaptiveEmbedding) -> Rules:
    bands = []
    for index in range(len(module.bands)):
        bands.append(rule(f"bands.{index}.embedding.weight", f"embeddings.{index}.0.weight"))
        bands.append(rule(f"bands.{index}.projection.weight", f"embeddings.{index}.1.weight"))
    return [*bands, Derived(("_float_tensor",))]


def _adaptive_head(module: SpadeForCausalLM) -> Rules:
    def tied(ours: str, published: str) -> Rule:
        return rule(f"model.embed_tokens.bands.{ours}.weight", f"adaptive_softmax.{published}.weight", optional=True)

    tails = []
    for index in range(1, len(module.model.embed_tokens.bands)):
        tails.append(tied(f"{index}.projection", f"tail.{index - 1}.0"))
        tails.append(tied(f"{index}.embedding", f"tail.{index - 1}.2"))
    return [
        rule("adaptive_head.bands.weight", "adaptive_softmax.head.class_proj.weight"),
        tied("0.embedding", "head.word_proj"),
        *tails,
        Derived(("adaptive_softmax.head._float_tensor",)),
        Derived(("adaptive_softmax.version",), make=lambda: torch.tensor([1])),
    ]


def _plain_head(module: SpadeForCausalLM) -> Rules:
    head = [rule("lm_head.weight", "output_projection.weight")]
    if module.config.tie_word_embeddings:
        head.append(rule("model.embed_tokens.weight", "output_projection.weight"))
    return head


def _layers(module: SpadeModel) -> Rules:
    return [r for index, layer in enumerate(module.layers) for r in below(f"{index}.", f"{index}.", rules(layer))]


@rules.register
def _(module: SpadeLayer) -> Rules:
    mega = isinstance(getattr(module.mixer, "attention", None), MegaMixer)
    mixer_norm, feed_forward_norm = rules(module.mixer_norm), rules(module.feed_forward_norm)
    return [
        *below("mixer.", "mega_layer." if mega else "", rules(module.mixer)),
        *below("mixer_norm.", "mega_layer.norm.norm." if mega else "self_attn_layer_norm.", mixer_norm),
        *below("feed_forward.", "nffn." if mega else "", linears("fc1", "fc2")),
        *below("feed_forward_norm.", "nffn.norm.norm." if mega else "final_layer_norm.", feed_forward_norm),
    ]


@rules.register
def _(module: SpadeMixer) -> Rules:
    if isinstance(module.attention, MegaMixer):
        if module.combine is not None:
            raise ValueError("ssm_layers is not empty, expected () for the mixer 'mega': MEGA has no state space model")
        return below("attention.", "", rules(module.attention))
    found = below("attention.", "self_attn.", rules(module.attention))
    if module.combine is not None:
        found += below("ssm.", "s4_module.s4.", rules(module.ssm))
    if module.combine in ("concat", "add"):
        found += below("ssm_norm.", "norm_global.", rules(module.ssm_norm))
        found += below("attention_norm.", "norm_local.", rules(module.attention_norm))
    if module.combine == "concat":
        found += linears("aggregate")
    return found
