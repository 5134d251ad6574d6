"""Floating-point operations of the ops, of which torch's FlopCounterMode learns on import.

A multiplication and an addition are two operations. Elementwise work (softmax's exponentials) is not counted. A packed
row counts as one document. Sources: the sections "Cost" of spade_ext/*/README.md.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from .. import _C  # noqa: F401  # registers the ops

Shape = Sequence[int]

FORMULAS: dict[str, Callable[..., float]] = {}


def formula(function: Callable[..., float]) -> Callable[..., float]:
    """Register `function` for the op of its name. Its arguments are those of the op, tensors as shapes."""
    name = function.__name__
    op = getattr(torch.ops.spade_ext, name)
    names = [argument.name for argument in op.default._schema.arguments]

    @register_flop_formula(op)
    def count(*args: Any, out_shape: Any = None, **kwargs: Any) -> float:
        return function(**dict(zip(names, args, strict=False)), **kwargs)

    FORMULAS[name] = function
    return function


def attended_pairs(queries: int, keys: int, left: int, right: int, chunk_size: int | None = None) -> int:
    """Pairs of a query and a key in its window, and in its chunk; the last query stands at the last key."""
    chunk = chunk_size or keys
    pairs = 0
    for position in range(keys - queries, keys):
        start = position // chunk * chunk
        first, last = max(0, start, position - left), min(keys, start + chunk, position + right + 1)
        pairs += max(0, last - first)
    return pairs


def fft_length(least: int) -> int:
    """The smallest 2^a, 3 * 2^a or 5 * 2^a, a of 1 or more, that is at least `least`."""
    return min(factor << max(1, math.ceil(math.log2(least / factor))) for factor in (1, 3, 5))


def _attention(
    q: Shape, k: Shape, v: Shape, left: int, right: int, chunk_size: int | None = None, **rest: Any
) -> tuple[int, int, int]:
    B, Lq, H, D = q
    return B * H * attended_pairs(Lq, k[1], left, right, chunk_size), D, v[-1]


@formula
def local_attention_forward(**shapes: Any) -> int:
    pairs, D, Dv = _attention(**shapes)
    return (2 * D + 2 * Dv) * pairs


@formula
def local_attention_backward(**shapes: Any) -> int:
    """What is needed; the op forms the scores once more than that."""
    pairs, D, Dv = _attention(**shapes)
    return (6 * D + 4 * Dv) * pairs


def _convolution(u: Shape, k: Shape, k_reverse: Shape | None = None, **rest: Any) -> tuple[int, int, int, int, float]:
    B, H, L = u
    C = k[0] if len(k) == 3 else 1
    reach = max(min(k[-1], L) - 1, min(k_reverse[-1], L - 1) if k_reverse else 0)
    n = fft_length(L + reach)
    return B, C, H, n, 2.5 * n * math.log2(n)


@formula
def long_conv(**shapes: Any) -> float:
    B, C, H, n, transform = _convolution(**shapes)
    return H * ((B + C + B * C) * transform + 3 * n * B * C)


@formula
def long_conv_backward(**shapes: Any) -> float:
    B, C, H, n, transform = _convolution(**shapes)
    return H * ((2 * B + 2 * C + B * C) * transform + 6 * n * B * C)


@formula
def diagonal_kernel(c: Shape, length: int, **rest: Any) -> int:
    C, H, N, *pair = c
    return (4 if pair else 2) * C * H * N * length


@formula
def diagonal_kernel_backward(grad_k: Shape, c: Shape, **rest: Any) -> int:
    C, H, N, *pair = c
    return (8 if pair else 4) * C * H * N * grad_k[-1]


def _diagonal_scan(u: Shape, c: Shape, **rest: Any) -> tuple[int, int, int]:
    """Tokens of all systems, real numbers of a state, C."""
    C, H, N, *pair = c
    return u[0] * u[-1] * H, 2 * N if pair else N, C


@formula
def diagonal_scan(**shapes: Any) -> int:
    tokens, N, C = _diagonal_scan(**shapes)
    return tokens * ((2 + 2 * C) * N + 18 * C)


@formula
def diagonal_scan_backward(**shapes: Any) -> int:
    tokens, N, C = _diagonal_scan(**shapes)
    return tokens * ((8 + 4 * C) * N + 38 * C)


def _s4_kernel(p: Shape, b: Shape, c: Shape, length: int, nodes: int, rate: float) -> tuple[float, int]:
    """H N times the nodes that are evaluated, half of n by symmetry; the number of Cauchy sums at each."""
    R, M, (C, H, N, _) = p[0], b[0], c
    n = max(round(nodes / rate), 1)
    return H * N / 2 * (n + 1.5 * max(length - n, 0)), (C + R) * (M + R)


@formula
def s4_kernel(p: Shape, b: Shape, c: Shape, length: int, nodes: int, rate: float = 1.0, **rest: Any) -> float:
    evaluated, sums = _s4_kernel(p, b, c, length, nodes, rate)
    return evaluated * (14 + 8 * sums)


@formula
def s4_kernel_backward(grad_k: Shape, p: Shape, b: Shape, c: Shape, nodes: int, rate: float, **rest: Any) -> float:
    evaluated, sums = _s4_kernel(p, b, c, grad_k[-1], nodes, rate)
    return evaluated * (36 + 24 * sums)


@formula
def s4_state(u: Shape, p: Shape, **rest: Any) -> int:
    B, H, L = u
    R, _, N, _ = p
    return B * H * N * L * (12 + 8 * R)


@formula
def s4_step(u: Shape, p: Shape, c: Shape, **rest: Any) -> int:
    R, (C, H, N, _) = p[0], c
    return u[0] * H * N * (14 + 14 * R + 4 * C)


@formula
def diagonal_step(u: Shape, c: Shape, **rest: Any) -> int:
    return diagonal_scan(u=[*u, 1], c=c)


@formula
def local_attention_step(q: Shape, v: Shape, k_cache: Shape, **rest: Any) -> int:
    """Of a full ring."""
    B, H, D = q
    return 2 * (D + v[-1]) * B * H * k_cache[1]


@formula
def linear_step(x: Shape, weight: Shape, **rest: Any) -> int:
    return 2 * math.prod(x[:-1]) * math.prod(weight)
