"""Which tokens a layer of attention sees, and how it goes on from those before: a window, chunks or whole rows."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from ..ops import local_attention, local_attention_step
from .mask import padding_is_outside

# Keys (B, slots, H, D) and values (B, slots, H, Dv) of the last tokens of each row, token p in slot p % slots, and how
# many tokens the row has had, (B,). Tensors that are cloned, moved, index_selected or saved like any others; see
# `spade_ext.ops.local_attention_step`.
Ring = tuple[Tensor, Tensor, Tensor]


class Reach(nn.Module):
    """A layer of attention, in which a token sees a window, its chunk or the whole row.

    Where no token sees a later one, the layer goes on from a ring of the keys and values before. It has left + 1
    slots, or those of a chunk; of whole rows it grows.
    """

    window: tuple[int, int] | None
    chunk_size: int | None
    causal: bool
    activation = "softmax"

    def set_reach(self, window: Sequence[int] | None, chunk_size: int | None, causal: bool) -> None:
        """A window, chunks, or neither for whole rows.

        Raises:
            ValueError: they are no such sizes, both are given, or the window does not fit `causal`.
        """
        if window is not None:
            sides = window if isinstance(window, (tuple, list)) else ()
            if len(sides) != 2 or not all(isinstance(side, int) and side >= 0 for side in sides):
                raise ValueError(f"window is {window}, expected (left, right), both ints of 0 or more")
            if causal and window[1] > 0:
                raise ValueError(f"window is {window}, expected a right of 0, since causal is True")
            if chunk_size is not None:
                raise ValueError(f"chunk_size is {chunk_size}, expected None beside a window")
            window = tuple(window)
        if chunk_size is not None and not (isinstance(chunk_size, int) and chunk_size >= 1):
            raise ValueError(f"chunk_size is {chunk_size}, expected an int of at least 1, or None")
        self.window, self.chunk_size = window, chunk_size
        self.causal = causal or (window is not None and window[1] == 0)

    attention = staticmethod(local_attention)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, **options: Any) -> Tensor:
        """`spade_ext.ops.local_attention` within this layer's reach."""
        reach = {"window": self.window, "chunk_size": self.chunk_size, "causal": self.causal}
        return self.attention(q, k, v, bias, activation=self.activation, **reach, **options)

    def attend_token(
        self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, ring: Ring, real: Tensor | None
    ) -> Tensor:
        """One token, q and k (B, H, D), v (B, H, Dv), with a bias like `attend`'s; the ring is updated in place.

        real: (B,), bool; a padded token leaves nothing behind.
        """
        keys, values, position = ring
        place = position
        if self.chunk_size is not None:
            place = position % self.chunk_size
            bias = None if bias is None else bias[:, : self.chunk_size]
        out = local_attention_step(q, k, v, bias, keys, values, place)
        # A padded token's slot is the one that the next real token takes, and that only tokens before it see.
        position += 1 if real is None else real.long()
        return out

    @property
    def has_steps(self) -> bool:
        """Whether a token at a time is `attend_token`: by softmax, within a ring that does not grow."""
        return self.activation == "softmax" and not (self.window is None and self.chunk_size is None)

    def check_has_states(self) -> None:
        if self.window is not None and self.window[1] > 0:
            raise ValueError(f"window is {self.window}, expected (left, 0) for a state")
        if not self.causal:
            raise ValueError("causal is False, expected True for a state")

    def check_goes_on(self, segment_ids: Tensor | None) -> None:
        """Refuses packed rows beside a state, and a state where there can be none."""
        self.check_has_states()
        if segment_ids is not None:
            raise ValueError("segment_ids is given, expected None where a state is")

    def check_has_steps(self) -> None:
        self.check_has_states()
        if not self.has_steps:
            reach = f"activation {self.activation!r}" if self.activation != "softmax" else "whole rows"
            raise ValueError(f"{reach} has no steps, expected forward with a state for a token")

    def initial_ring(self, batch_size: int, key: tuple[int, int], value: tuple[int, int], like: Tensor) -> Ring:
        """That before the first token, for keys (H, D) and values (H, Dv); under autocast of its type."""
        self.check_has_states()
        slots = self.chunk_size or (0 if self.window is None else self.window[0] + 1)
        device, dtype = like.device, like.dtype
        if torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
        keys, values = (torch.zeros(batch_size, slots, *size, dtype=dtype, device=device) for size in (key, value))
        return keys, values, torch.zeros(batch_size, dtype=torch.long, device=device)

    def continue_ring(
        self, ring: Ring, k: Tensor, v: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Ring]:
        """Keys and values (B, L, H, D) behind those of the ring, with the mask of both, and the ring after them.

        A row's tokens have numbers, from 0; those of the ring come right before the first real one of k and v.
        """
        keys, values, position = ring
        B, slots = keys.shape[:2]
        if k.shape != (B, k.size(1), *keys.shape[2:]) or keys.dtype != k.dtype:
            raise ValueError(
                f"state has keys {list(keys.shape)} of {keys.dtype}, expected [{k.size(0)}, {slots}, {k.size(2)}, "
                f"{k.size(3)}] of {k.dtype}"
            )
        row = torch.arange(B, device=k.device)[:, None]
        real = torch.ones(k.shape[:2], dtype=torch.bool, device=k.device) if mask is None else mask
        first = padding_before(real)
        count = real.sum(1, keepdim=True)
        place = torch.arange(slots + k.size(1), device=k.device)
        number = position[:, None] + place - slots - first  # (B, slots + L)
        new = place >= slots + first
        if not (mask is None or torch.compiler.is_compiling() or padding_is_outside(mask)):
            raise ValueError(
                "attention_mask has padding between real tokens, expected it at the ends of rows with a state"
            )
        begin = position - position % self.chunk_size if self.chunk_size else (position - slots).clamp(min=0)
        seen = (number >= begin[:, None]) & (~new | pad(real, (slots, 0)))
        source = torch.where(new, place, number % max(slots, 1))
        k, v = (torch.cat([old, t], dim=1)[row, source] for old, t in ((keys, k), (values, v)))

        after = position[:, None] + count
        if self.window is None and self.chunk_size is None:
            new_slots = max(after.flatten().tolist(), default=0)
        else:
            new_slots = slots
        slot = torch.arange(new_slots, device=k.device)
        last = after - 1 - (after - 1 - slot) % max(new_slots, 1)  # number of the token of each slot
        held = (last - position[:, None] + slots + first).clamp(min=0)
        return k, v, seen, (k[row, held], v[row, held], after.squeeze(1))


def padding_before(mask: Tensor) -> Tensor:
    """(B, 1): tokens before a row's first real one, all of them where there is none."""
    return (mask.cumsum(1) == 0).sum(1, keepdim=True)


def places_from_first(x: Tensor, mask: Tensor | None) -> Tensor:
    """(B, L) of x (B, L, ...): 0 at a row's first real token, negative before it."""
    places = torch.arange(x.size(1), device=x.device).expand(x.shape[:2])
    return places if mask is None else places - padding_before(mask)
