"""Local attention: every query sees a window of keys around its own position, its chunk, or its whole row."""

import math
from typing import Literal

import torch
from torch import Tensor

Activation = Literal["softmax", "relu2", "laplace"]


def local_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    *,
    window: tuple[int, int] | None = None,
    chunk_size: int | None = None,
    causal: bool = False,
    attention_mask: Tensor | None = None,
    segment_ids: Tensor | None = None,
    scale: float | None = None,
    activation: Activation = "softmax",
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
) -> Tensor:
    r"""Attention over a window, a chunk or a full row, with a relative position bias that gets a gradient.

    Query i stands at position p(i) = i + Lk - Lq. With a window it sees key j when p(i) - left <= j <= p(i) + right;
    with chunks of c keys when floor((j - o) / c) = floor((p(i) - o) / c), o the first real token of the row, or of the
    query's segment. Weights are the softmax of ``scale * q . k + bias[h, ...]``, or ``relu2`` or ``laplace`` of
    ``q . k / n + bias[h, ...]`` without normalisation, n the number of keys that the query sees (at least 1).
    A query that sees no key, or only scores of -inf, gives exactly 0 and gets no gradient.

    Args:
        q: (B, Lq, H, D), float64, float32, float16 or bfloat16, any strides (rows are copied unless contiguous).
        k: (B, Lk, Hkv, D); Hkv divides H, query head h reads key head h // (H / Hkv).
        v: (B, Lk, Hkv, Dv).
        bias: (H, left + right + 1), entry left + j - p(i); with chunks (H, 2 chunk_size - 1), entry
            chunk_size - 1 + j - p(i); in a full row (H, Lq + Lk - 1), entry Lk - 1 + j - p(i).
        window: (left, right), in tokens.
        chunk_size: c, in tokens; the last chunk may be short. Without a window and a chunk a query sees a full row.
        causal: no key after p(i). With a window its right must be 0, which says the same.
        attention_mask: (B, Lk), True or 1 at real tokens. Padding is never read.
        segment_ids: (B, Lk), integers, of packed documents. A segment is a run of equal ids (padding included: an id
            that comes again later is another segment). A query sees and reads only its own, that of position p(i);
            it sees nothing where p(i) < 0.
        scale: 1 / sqrt(D) unless given, which D = 0 needs; softmax only.
        activation: "softmax"; or, not with a window, "relu2", max(s, 0)^2, or "laplace",
            (1 + erf((s - 0.707107) / (0.282095 sqrt 2))) / 2.
        dropout_p: weights become weight * keep / (1 - dropout_p), 0 <= dropout_p < 1.
        dropout_seed: int64, 0-dim, on the CPU or on q's device; required with dropout, and fixes which weights stay:
            ``torch.randint(2**62, ())`` draws one.

    Returns:
        (B, Lq, H, Dv), contiguous. Memory and that of the backward is O(B L H D); work O(B L H D n).

    Raises:
        ValueError, TypeError: a shape, dtype, device or combination that does not fit, named in one sentence.

    Source: SPADE (arXiv 2212.08136), section 3.2; T5 (arXiv 1910.10683), section 2.1, for the bias; MEGA
    (arXiv 2209.10655) for chunks and the elementwise activations.
    """
    if window is not None and not (isinstance(window, (tuple, list)) and all(isinstance(side, int) for side in window)):
        raise TypeError(f"local_attention: window is {window!r}, expected (left, right), two ints, or None")
    if chunk_size is not None and not isinstance(chunk_size, int):
        raise TypeError(f"local_attention: chunk_size is {chunk_size!r}, expected an int or None")
    if attention_mask is not None and not attention_mask.is_floating_point():
        attention_mask = attention_mask.bool()
    return torch.ops.spade_ext.local_attention(
        q,
        k,
        v,
        bias,
        window=window,
        chunk_size=chunk_size,
        causal=causal,
        attention_mask=attention_mask,
        segment_ids=segment_ids,
        scale=scale,
        activation=activation,
        dropout_p=dropout_p,
        dropout_seed=dropout_seed,
    )


def local_attention_ref(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    *,
    window: tuple[int, int] | None = None,
    chunk_size: int | None = None,
    causal: bool = False,
    attention_mask: Tensor | None = None,
    segment_ids: Tensor | None = None,
    scale: float | None = None,
    activation: Activation = "softmax",
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
) -> Tensor:
    """`local_attention` by a dense (B, H, Lq, Lk) matrix of scores."""
    (B, Lq, H, D), (Lk, Hkv) = q.shape, k.shape[1:3]
    k, v = (t.repeat_interleave(H // Hkv, dim=2) for t in (k, v))
    key = torch.arange(Lk, device=q.device)
    position = (torch.arange(Lq, device=q.device) + Lk - Lq)[:, None]
    real = torch.ones(B, Lk, dtype=torch.bool, device=q.device) if attention_mask is None else attention_mask.bool()

    # seen (B, Lq, Lk)
    seen = real[:, None].expand(B, Lq, Lk)
    if causal:
        seen = seen & (key <= position)
    left, right = Lk - 1, Lq - 1
    if window is not None:
        left, right = window
        seen = seen & (key >= position - left) & (key <= position + right)
    segment = torch.zeros(B, Lk, dtype=torch.long, device=q.device)  # the number of a key's segment
    if segment_ids is not None:
        segment[:, 1:] = (segment_ids[:, 1:] != segment_ids[:, :-1]).cumsum(1)
    own = segment[:, position.clamp(min=0).squeeze(1)] if Lk else segment.new_zeros(B, Lq)  # that of a query
    if segment_ids is not None:
        seen = seen & (segment[:, None] == own[..., None]) & (position >= 0)
    if chunk_size is not None:
        left = right = chunk_size - 1
        in_segment = real[:, None] & (segment[:, None] == own[..., None])
        origin = torch.where(in_segment, key, Lk).amin(-1, keepdim=True) if Lk else position  # (B, Lq, 1)
        seen = seen & ((key - origin) // chunk_size == (position - origin) // chunk_size)
    seen = seen[:, None].expand(B, H, Lq, Lk)

    products = torch.einsum("bihd,bjhd->bhij", q, k)
    if activation == "softmax":
        scores = products * (D**-0.5 if scale is None else scale)
    else:
        scores = products / seen.sum(-1, keepdim=True).clamp(min=1)
    if bias is not None:
        scores = scores + bias[:, (left + key - position).clamp(0, bias.size(1) - 1)]
    seen = seen & (scores != -torch.inf)
    if activation == "softmax":
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    elif activation == "relu2":
        weights = scores.relu().square()
    else:
        weights = (1 + torch.erf((scores - 0.707107) / (0.282095 * 2**0.5))) / 2
    weights = weights.masked_fill(~seen, 0)
    if dropout_p > 0:
        weights = weights * _keep(dropout_seed, dropout_p, weights.shape).to(weights) / (1 - dropout_p)
    return torch.einsum("bhij,bjhd->bihd", weights, v)


def local_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    position: Tensor,
    *,
    scale: float | None = None,
) -> Tensor:
    r"""One token a row of `local_attention` with the window (left, 0), without gradients.

    The caches are rings that hold the last left + 1 keys and values of each row, however long it gets: slot
    ``p % (left + 1)`` those of position p. The token's own are written first, then every key is read once. A row of
    fewer tokens sees what there is; slots that it has not reached are not read.

    * After a prompt of L tokens the ring is ``keys[:, -(left + 1):].roll(L % (left + 1), dims=1)``, or, of a shorter
      prompt, has the keys in its first L slots. Where rows have n (B,) tokens, padding before them, slot s holds token
      ``n - 1 - (n - 1 - s) % (left + 1)`` where that is 0 or more.
    * Beams are reordered by index_select of caches and position.
    * Chunks of c tokens: a ring of c slots, ``bias[:, :c]`` and ``position % c``.

    Args:
        q: (B, H, D), float64, float32, float16 or bfloat16, any strides.
        k: (B, Hkv, D); Hkv divides H, query head h reads key head h // (H / Hkv).
        v: (B, Hkv, Dv).
        bias: (H, left + 1), entry left for the token itself.
        k_cache: (B, left + 1, Hkv, D), overwritten (by way of a copy where rows are not contiguous). In a function that
            is compiled with dynamic shapes pass a whole tensor: of a view that is taken there, torch writes the wrong
            part.
        v_cache: (B, left + 1, Hkv, Dv), likewise.
        position: (B,), int64: how many tokens the row had before this one. Where it is negative the row has not begun:
            it writes nothing and gives 0.
        scale: 1 / sqrt(D) unless given, which D = 0 needs.

    Returns:
        (B, H, Dv), contiguous.

    Raises:
        ValueError, TypeError: a shape, dtype or device that does not fit, named in one sentence.
        NotImplementedError: an argument requires a gradient while gradients are recorded.
    """
    return torch.ops.spade_ext.local_attention_step(q, k, v, bias, k_cache, v_cache, position, scale=scale)


def local_attention_step_ref(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    position: Tensor,
    *,
    scale: float | None = None,
) -> Tensor:
    """`local_attention_step` as attention to the keys in the order of their positions."""
    row, size = torch.arange(q.size(0), device=q.device)[:, None], k_cache.size(1)
    begun = position >= 0
    for cache, new in ((k_cache, k), (v_cache, v)):
        cache[row[begun, 0], position[begun] % size] = new[begun]
    positions = position[:, None] + torch.arange(1 - size, 1, device=q.device)
    seen = positions >= 0
    keys, values = (cache[row, positions % size].masked_fill(~seen[..., None, None], 0) for cache in (k_cache, v_cache))
    out = local_attention_ref(q[:, None], keys, values, bias, window=(size - 1, 0), attention_mask=seen, scale=scale)
    return out.squeeze(1)


def _keep(seed: Tensor, p: float, shape: torch.Size) -> Tensor:
    """Which weights dropout keeps: output number n of splitmix64, n the place in the tensor, is p 2^64 or more."""

    def mix(x: Tensor) -> Tensor:
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            x = (x ^ shift_right(x, shift)) * signed(factor)
        return x ^ shift_right(x, 31)

    def shift_right(x: Tensor, bits: int) -> Tensor:  # as if x were unsigned
        return (x >> bits) & (2 ** (64 - bits) - 1)

    def signed(x: int) -> int:
        return x - 2**64 if x >= 2**63 else x

    place = torch.arange(1, shape.numel() + 1, device=seed.device).view(shape)
    bits = mix(mix(seed) + place * signed(0x9E3779B97F4A7C15))
    return shift_right(bits, 11) >= math.ceil(p * 2**53)
