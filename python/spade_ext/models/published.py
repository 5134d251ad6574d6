# Copyright 2026 The spade-ext developers.
"""The published decoder's layers, for `spade_ext.convert`."""

from torch import Tensor

from ..convert import Published, convert_module, prefixed
from .mixers import SpadeMixer
from .modeling_spade import SpadeLayer, SpadeModel


@convert_module.register
def _(module: SpadeModel, published: Published) -> dict[str, Tensor]:
    if module.norm.state_dict():
        raise ValueError("from_reference: final_norm is True, expected False: the published decoder has no final norm")
    converted = prefixed("embed_tokens.", module.embed_tokens.state_dict())
    for index, layer in enumerate(module.layers):
        converted |= prefixed(f"layers.{index}.", convert_module(layer, published.below(f"{index}.")))
    return converted


@convert_module.register
def _(module: SpadeLayer, published: Published) -> dict[str, Tensor]:
    feed_forward = published.take("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")
    return (
        prefixed("mixer.", convert_module(module.mixer, published))
        | prefixed("mixer_norm.", convert_module(module.mixer_norm, published.below("self_attn_layer_norm.")))
        | prefixed("feed_forward.", feed_forward)
        | prefixed("feed_forward_norm.", convert_module(module.feed_forward_norm, published.below("final_layer_norm.")))
    )


@convert_module.register
def _(module: SpadeMixer, published: Published) -> dict[str, Tensor]:
    converted = prefixed("attention.", convert_module(module.attention, published.below("self_attn.")))
    if module.combine is not None:
        converted |= prefixed("ssm.", convert_module(module.ssm, published.below("s4_module.s4.")))
    if module.combine in ("concat", "add"):
        converted |= prefixed("ssm_norm.", convert_module(module.ssm_norm, published.below("norm_global.")))
        converted |= prefixed("attention_norm.", convert_module(module.attention_norm, published.below("norm_local.")))
    if module.combine == "concat":
        converted |= prefixed("aggregate.", published.below("aggregate.").take("weight", "bias"))
    return converted
