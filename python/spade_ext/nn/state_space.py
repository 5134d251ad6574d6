"""What state space layers share: padding, packed documents, states handed on, parameters that stay float32."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .mask import ends_are_real, ids_or_rows, matching_ids, real_token, real_tokens
from .packing import Documents

Value = TypeVar("Value")

# The most real numbers in the states of a channel, over both directions, with which a scan is not slower than a
# convolution by FFT (benchmarks/scan_or_fft.py).
SCAN_LIMIT = 16


def parameter_dtype() -> torch.dtype:
    """Of state space parameters, whatever the default dtype is: half-precision ones diverge."""
    return torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32


class StateSpaceLayer(nn.Module, ABC):
    """A causal or two-sided state space model in each channel.

    A state is a plain tensor (B, *state_size), float32 or float64 as the parameters: clone, detach, index_select
    or save it like any other. Two-sided layers have none.
    """

    d_model: int
    bidirectional: bool
    kernel_grows = True  # a longer kernel begins with the shorter one
    _reused: dict[Hashable, Any] | None = None

    @property
    @abstractmethod
    def state_size(self) -> tuple[int, ...]:
        """Shape of one row's state."""

    @property
    def can_scan(self) -> bool:
        """Whether `advance` gives what `convolve` does from a state of zeros, in both directions."""
        return False

    @property
    def scans(self) -> bool:
        """Whether the layer runs as a recurrence rather than as a convolution, because that is faster."""
        directions = 2 if self.bidirectional else 1
        return self.can_scan and directions * math.prod(self.state_size[1:]) <= SCAN_LIMIT

    @abstractmethod
    def convolution_kernel(self, length: int, **options) -> Tensor:
        """The kernels of all channels, `length` taps of them."""

    @abstractmethod
    def convolve(self, u: Tensor, kernel: Tensor, segment_ids: Tensor | None) -> Tensor:
        """(B, L, D) to (B, L, E) from zero states, by a kernel of L taps or more."""

    @abstractmethod
    def advance(
        self, u: Tensor, state: Tensor | None, segment_ids: Tensor | None = None, **options
    ) -> tuple[Tensor, Tensor]:
        """What `convolve` does, from `state`, None for zeros; also the state after the last token.

        With segment_ids state is None.
        """

    @abstractmethod
    def advance_token(self, u: Tensor, state: Tensor) -> Tensor:
        """`advance` and `activate` of one token, u (B, D) to (B, E), without gradients; the state in place."""

    def prepare_steps(self) -> None:
        """Compute what `reuse` keeps for steps."""

    @abstractmethod
    def initial_values(self) -> dict[str, Tensor]:
        """Fresh values of every parameter and buffer, on the CPU."""

    @torch.no_grad()
    def reset_parameters(self, copy_: Callable[[Tensor, Tensor], Any] = Tensor.copy_) -> None:
        """Start anew; `copy_` may leave out tensors that were loaded."""
        for name, value in self.initial_values().items():
            copy_(getattr(self, name), value)

    def activate(self, y: Tensor, x: Tensor, u: Tensor) -> Tensor:
        """What follows the state space model: y is its output, x its input and u that with zeros at padded tokens."""
        return y

    def run(
        self,
        x: Tensor,
        attention_mask: Tensor | None,
        segment_ids: Tensor | None,
        state: Tensor | None,
        **options,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The forward of every layer. Padded tokens count as zeros, each document starts from a zero state.

        Args:
            x: (B, L, D).
            attention_mask: (B, L), True or 1 at real tokens.
            segment_ids: (B, L), integers; a row's first document continues from `state`.
            state: (B, *state_size), the state before the first token; not changed.
            options: for `convolve` and `advance`.

        Returns:
            y (B, L, E) of x's dtype; where a state is given, also the state after each row's last real token.

        Raises:
            ValueError, TypeError: a shape or dtype that does not fit, or a state for a two-sided layer.
        """
        if x.dim() != 3 or x.size(-1) != self.d_model:
            raise ValueError(f"x has shape {list(x.shape)}, expected (B, L, {self.d_model})")
        mask, segment_ids = real_tokens(attention_mask, x), matching_ids(segment_ids, x)
        wide = self.widen(x)
        u = wide if mask is None else wide.masked_fill(~mask[..., None], 0)
        if state is not None:
            self.check_state(state, x.size(0))
            y, state = self._advance(u, mask, segment_ids, state, options)
            return self.activate(y, wide, u).to(x.dtype), state
        if self.kernel_grows or (segment_ids is None and mask is None):
            y = self._convolve(u, segment_ids, options)
        else:
            y = self._convolve_documents(u, Documents(ids_or_rows(segment_ids, mask), mask), options)
        return self.activate(y, wide, u).to(x.dtype)

    def _convolve(self, u: Tensor, segment_ids: Tensor | None, options: dict[str, Any]) -> Tensor:
        if self.scans:
            return self.advance(u, None, segment_ids, **options)[0]
        return self.convolve(u, self.convolution_kernel(u.size(1), **options), segment_ids)

    def _convolve_documents(self, u: Tensor, documents: Documents, options: dict[str, Any]) -> Tensor:
        """Each by the kernel of its own length."""
        if not len(documents.lengths):
            return self._convolve(u, None, options)
        return documents.scatter(
            [(group, self._convolve(documents.gather(u, group), None, options)) for group in documents.groups()]
        )

    def _advance(
        self, u: Tensor, mask: Tensor | None, segment_ids: Tensor | None, state: Tensor, options: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """`advance` from each row's first token to its last real one, anew at each document."""
        zero = not (state.requires_grad or torch.compiler.is_compiling() or bool(state.any()))
        if segment_ids is None and (mask is None or bool(mask.all()) or (zero and ends_are_real(mask))):
            return self.advance(u, None if zero else state, **options)
        documents = Documents(ids_or_rows(segment_ids, mask), mask)
        if not len(documents.lengths):
            return self._convolve(u, None, options), state.clone()
        continues = torch.ones_like(documents.row, dtype=torch.bool)
        continues[1:] = documents.row[1:] != documents.row[:-1]
        before = torch.where(continues.view(-1, *(1,) * len(self.state_size)), state[documents.row], 0)
        parts, order, after = [], [], []
        for group in documents.groups():
            y, states = self.advance(documents.gather(u, group), before[group], **options)
            parts.append((group, y))
            order.append(group)
            after.append(states)
        ends = torch.cat([continues[1:], continues[:1]])  # a row's last document; the first one continues its row
        states = torch.cat(after)[torch.cat(order).argsort()]
        return documents.scatter(parts), state.index_put((documents.row[ends],), states[ends])

    @torch.no_grad()
    def step(self, x: Tensor, state: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """One token, x (B, D): returns y (B, E) and updates state (B, *state_size) in place. No gradient.

        attention_mask: (B,), True or 1 at real tokens; others leave the state as it is.
        """
        if x.dim() != 2 or x.size(-1) != self.d_model:
            raise ValueError(f"x has shape {list(x.shape)}, expected (B, {self.d_model})")
        self.check_state(state, x.size(0))
        real = real_token(attention_mask, x)
        before = None if real is None else state.clone()
        y = self.advance_token(self.widen(x), state)
        if real is not None:
            state.copy_(torch.where(real.view(-1, *(1,) * len(self.state_size)), state, before))
        return y.to(x.dtype)

    @property
    def dtype(self) -> torch.dtype:
        """float32 or float64."""
        return next(self.parameters()).dtype

    def widen(self, x: Tensor) -> Tensor:
        """x in the dtype of the parameters."""
        if not x.is_floating_point():
            raise TypeError(f"x is {x.dtype}, expected a floating-point tensor")
        return x.to(self.dtype)

    def initial_state(self, batch_size: int) -> Tensor:
        """Zeros (batch_size, *state_size)."""
        self.check_has_states()
        parameter = next(self.parameters())
        return torch.zeros(batch_size, *self.state_size, dtype=parameter.dtype, device=parameter.device)

    def check_has_states(self) -> None:
        if self.bidirectional:
            raise ValueError("bidirectional is True, expected False for a state: a two-sided layer has none")

    def check_state(self, state: Tensor, batch_size: int) -> None:
        self.check_has_states()
        expected = (batch_size, *self.state_size)
        if state.shape != expected:
            raise ValueError(f"state has shape {list(state.shape)}, expected {list(expected)}")
        if state.dtype != self.dtype:
            raise TypeError(f"state is {state.dtype}, expected {self.dtype}, the dtype of the parameters")

    def reuse(self, key: Hashable, make: Callable[[], Value]) -> Value:
        """make(), or within `reuse_kernels` and without gradients what it gave the first time."""
        if self._reused is None or torch.is_grad_enabled():
            return make()
        if key not in self._reused:
            self._reused[key] = make()
        return self._reused[key]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "StateSpaceLayer":
        # Half-precision state space parameters diverge: they stay float32 in a half-precision model.
        def keep_precision(t: Tensor) -> Tensor:
            moved = fn(t)
            return moved if moved.dtype not in (torch.float16, torch.bfloat16) else t.to(moved.device)

        return super()._apply(keep_precision, recurse)


@contextmanager
def reuse_kernels(model: nn.Module, *, steps: bool = False) -> Iterator[None]:
    """Within it and torch.no_grad, state space layers of `model` compute once what depends on their parameters alone.

    For evaluation and generation: parameters that change meanwhile go unnoticed. What steps need is computed at once
    with `steps`, so that they can be compiled.
    """
    layers = [module for module in model.modules() if isinstance(module, StateSpaceLayer) and module._reused is None]
    for layer in layers:
        layer._reused = {}
        if steps:
            with torch.no_grad():
                layer.prepare_steps()
    try:
        yield
    finally:
        for layer in layers:
            layer._reused = None
