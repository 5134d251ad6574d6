"""State space layers: nn.S4 and nn.EMA against a convolution by torch.fft alone, and pieces with a state against the
whole sequence; last the memory of a process that trains a layer."""

import sys
from collections.abc import Callable

import torch
from timing import Benchmark, forward_backward, print_peak_memory, train
from torch import Tensor

from spade_ext import nn


def fft_convolution(u: Tensor, k: Tensor) -> Tensor:
    n = 2 * u.size(-1)
    return torch.fft.irfft(torch.fft.rfft(u, n) * torch.fft.rfft(k, n), n)[..., : u.size(-1)]


def gradients(call: Callable[..., Tensor], inputs: list[Tensor], grad: Tensor) -> Callable[[], object]:
    inputs = [t.requires_grad_() for t in inputs]
    return lambda: forward_backward(lambda *_: call(), inputs, grad)


def gradients_of_pieces(layer: torch.nn.Module, pieces: list[Tensor], grads: list[Tensor]) -> Callable[[], object]:
    """Of a sequence cut into pieces, through the states that are handed on."""
    inputs = [t.requires_grad_() for t in (*pieces, *layer.parameters())]

    def call() -> object:
        state, outputs = layer.initial_state(pieces[0].size(0)), []
        for piece in pieces:
            y, state = layer(piece, state=state)
            outputs.append(y)
        return torch.autograd.grad(outputs, inputs, grads)

    return call


def main() -> None:
    benchmark = Benchmark(__doc__)
    B, D, L = (2, 16, 128) if benchmark.quick else (8, 512, 4096)

    u, k = torch.randn(B, D, L), torch.randn(D, L)
    peer = gradients(lambda: fft_convolution(u, k), [u, k], torch.randn(B, D, L))
    for name, layer, rows in (
        ("S4, s4d, N 32", nn.S4(D, 64, kernel="s4d", n_ssm=1, l_max=L), B),
        ("S4, s4, N 32", nn.S4(D, 64, n_ssm=1, l_max=L), B),
        ("EMA causal, N 16", nn.EMA(D, 16), B // 2),
        ("EMA two-sided, N 16", nn.EMA(D, 16, bidirectional=True), B // 2),
    ):
        x = torch.randn(rows, L, D)
        ours = gradients(lambda layer=layer, x=x: layer(x), [x, *layer.parameters()], torch.randn_like(x))
        seconds = benchmark.medians(ours=ours, peer=peer)
        benchmark.row(f"{name}, B {rows} D {D} L {L}", "forward + backward", seconds, f"torch.fft, B {B}")

    for name, layer in {
        "EMA, N 16": nn.EMA(D, 16),
        "S4, s4d, N 32": nn.S4(D, 64, kernel="s4d", n_ssm=1),
        "S4, s4, N 32": nn.S4(D, 64, n_ssm=1),
    }.items():
        x, grad = torch.randn(2, B, L, D)
        cut = [[piece.contiguous() for piece in t.chunk(4, dim=1)] for t in (x, grad)]
        seconds = benchmark.medians(
            ours=gradients_of_pieces(layer, *cut),
            peer=gradients(lambda layer=layer, x=x: layer(x), [x, *layer.parameters()], grad),
        )
        benchmark.row(f"{name}, B {B} D {D} L {L}, 4 pieces", "forward + backward", seconds, "whole")

    print("\nPeak memory of a process that trains nn.S4, memory kept:\n")
    for kernel in ("s4d", "s4"):
        print_peak_memory(f"{kernel}, B {B} D {D} L {L}", kernel, B, D, L)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--train"]:
        B, D, L = map(int, sys.argv[3:])
        train(nn.S4(D, 64, kernel=sys.argv[2], n_ssm=1, l_max=L), torch.randn(B, L, D))
    else:
        main()
