"""`attn_implementation="spade_local"`: local_attention in Hugging Face models. Importing this registers it::

    import spade_ext.models

    model = AutoModel.from_pretrained("answerdotai/ModernBERT-base", attn_implementation="spade_local")

For layers with a sliding window, chunks or full attention, with grouped queries, padding, packed documents
(`position_ids`), caches and dropout. Models whose scores are capped or biased, or whose softmax has sinks, are refused,
as are masks that are not made of an `attention_mask` (B, L).

A model asks the mask function once a forward for each kind of its layers, and hands what it returned to the attention
function of each layer. Here that is a `Band`, which says in O(B L) numbers what a dense mask says in O(B L L).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import causal_mask_function

from ..ops import local_attention

NAME = "spade_local"


@dataclass(frozen=True, eq=False)
class Band:
    """The keys that queries see, in the words of `spade_ext.ops.local_attention`; of kv_length keys those after the
    n_keys first are free places of a static cache."""

    kv_length: int
    n_keys: int
    window: tuple[int, int] | None
    causal: bool
    attention_mask: Tensor | None  # (B, n_keys)
    segment_ids: Tensor | None  # (B, n_keys)

    # transformers makes the masks of static caches before the forward, as if they were tensors.
    ndim = 4

    def contiguous(self) -> "Band":
        return self


def band(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Tensor] = causal_mask_function,
    attention_mask: Tensor | Band | None = None,
    local_size: int | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Band:
    """The mask function, see `transformers.masking_utils.sdpa_mask` for its arguments.

    A mask is a band, or a band in each document of a packed row, or chunks of a row, which are such documents. Asking
    whether tokens see their neighbours tells which, and where documents begin.
    """
    if isinstance(attention_mask, Band):
        return attention_mask
    if use_vmap:
        raise ValueError(f"{NAME}: the mask has a function of its own, expected a causal, sliding or full one")
    row, head = torch.arange(batch_size, device=device)[:, None], torch.zeros((), dtype=torch.long, device=device)
    key = torch.arange(kv_length, device=device)[None] + kv_offset

    def seen(query: Tensor, key: Tensor) -> Tensor:  # (B, n)
        return mask_function(row, head, query, key).expand(batch_size, -1)

    behind, ahead = seen(key[:, 1:], key[:, :-1]), seen(key[:, :-1], key[:, 1:])
    causal = kv_length > 1 and not ahead.any()
    window = None
    if local_size is not None:
        window = (max(local_size - 1, 0), 0) if causal else (local_size, local_size)
    beyond = kv_length if window is None else window[0] + 1
    if not (causal or torch.equal(ahead, behind)) or seen(key[:, beyond:], key[:, :-beyond]).any():
        raise ValueError(f"{NAME}: the mask is not the same for all tokens, expected a causal, sliding or full one")

    n_keys = kv_length
    if causal or window is not None:
        n_keys = int(q_offset) + q_length - kv_offset
    if n_keys > kv_length or (n_keys < kv_length and not causal):
        raise ValueError(f"{NAME}: queries end at key {n_keys} of {kv_length}, expected at the last one")
    if attention_mask is not None:
        attention_mask = pad(attention_mask, (-kv_offset, kv_offset + n_keys - attention_mask.size(1)))
    segment_ids = None if behind.all() else pad((~behind).cumsum(1), (1, 0))[:, :n_keys]
    return Band(kv_length, n_keys, window, causal, attention_mask, segment_ids)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Band | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function: query (B, H, Lq, D), key and value (B, Hkv, Lk, D); returns (B, Lq, H, D) and None.

    Layers of full attention run on `local_attention` as well, which is as fast as sdpa there and needs no mask for
    padding.
    """
    for name in ("softcap", "s_aux", "sinks", "position_bias", "indices", "block_indices", "cache"):
        if kwargs.get(name) is not None:
            raise ValueError(f"{NAME}: {name} is given, expected attention without it")
    if kwargs.get("output_attentions"):
        raise ValueError(f"{NAME}: output_attentions is True, expected False, as weights are never kept")
    if attention_mask is None and sliding_window is None:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        attention_mask = Band(key.size(2), key.size(2), None, causal, None, None)
    if not isinstance(attention_mask, Band):
        found = "None" if attention_mask is None else f"a tensor of shape {list(attention_mask.shape)}"
        raise ValueError(f"{NAME}: the mask is {found}, expected one that the model made of an attention_mask (B, L)")
    if key.size(2) != attention_mask.kv_length:
        raise ValueError(f"{NAME}: there are {key.size(2)} keys, expected {attention_mask.kv_length} as in the mask")
    n = attention_mask.n_keys
    q, k, v = (t.transpose(1, 2) for t in (query, key[:, :, :n], value[:, :, :n]))
    out = local_attention(
        q,
        k,
        v,
        window=attention_mask.window,
        causal=attention_mask.causal,
        attention_mask=attention_mask.attention_mask,
        segment_ids=attention_mask.segment_ids,
        scale=scaling,
        dropout_p=dropout,
        dropout_seed=torch.randint(2**62, ()) if dropout > 0 else None,
    )
    return out, None


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, band)
