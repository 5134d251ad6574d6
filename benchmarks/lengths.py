"""Time and memory of each op and of a peer, forward + backward, over the length of the sequence.

Prints a Markdown table and writes a picture, docs/lengths.png. Each point is a process of its own, which keeps its
memory; its memory is the most it takes beyond its inputs. The extra memory, of a curve's last point, is what it takes
beyond inputs, outputs and gradients, in percent of these. A peer's curve ends where the next point would not fit into
the machine, or after a point of more than a second.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import matplotlib
import torch
from diagonal import vandermonde
from local_attention import dense_band, three_blocks
from long_conv import whole_tensor_fft
from s4 import cauchy
from timing import forward_backward, machine, status
from torch import Tensor

import spade_ext
from spade_ext import ops
from spade_ext.nn.hippo import dplr

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402

PICTURE = Path(__file__).parents[1] / "docs" / "lengths.png"
B, H, N, D, WINDOW = 1, 64, 16, 16, 127  # H channels, or H / D heads

Inputs = list[Tensor]
Op = Callable[..., Tensor]


def lazily(make: Callable[[], Op]) -> Op:
    """An op that is made when it is called first."""
    made = cache(make)
    return lambda *inputs: made()(*inputs)


def log_dt() -> Tensor:
    return torch.empty(H).uniform_(math.log(1e-3), math.log(1e-1))


def diagonal_system() -> tuple[Tensor, Tensor]:
    """w (H, N, 2) of S4D-Lin, c (1, H, N, 2)."""
    w = torch.stack((torch.full((H, N), -0.5), -math.pi * torch.arange(N).expand(H, N)), dim=-1)
    return w, torch.randn(1, H, N, 2)


def long_conv(L: int) -> tuple[Inputs, dict[str, Op]]:
    inputs = [torch.randn(B, L, H).transpose(1, 2), torch.randn(1, H, L), torch.randn(1, H)]
    return inputs, {"spade_ext": ops.long_conv, "torch.fft": whole_tensor_fft}


def s4_kernel(L: int) -> tuple[Inputs, dict[str, Op]]:
    w, p, b = (torch.view_as_real(z.resolve_conj()).float() for z in dplr("legs", 2 * N, rank=1))
    inputs = [w[None], p[:, None], b[None, None], torch.randn(1, H, N, 2), log_dt()]
    return inputs, {
        "spade_ext": lambda *t: ops.s4_kernel(*t, L, nodes=L),
        "Cauchy matrix": lambda *t: cauchy(*t, L),
    }


def diagonal_kernel(L: int) -> tuple[Inputs, dict[str, Op]]:
    return [*diagonal_system(), log_dt()], {
        "spade_ext": lambda *t: ops.diagonal_kernel(*t, L),
        "Vandermonde matrix": lambda *t: vandermonde(*t, L),
    }


def diagonal_scan(L: int) -> tuple[Inputs, dict[str, Op]]:
    w, c = diagonal_system()
    b = torch.stack((torch.ones(H, N), torch.zeros(H, N)), dim=-1)

    def scan(u: Tensor, w: Tensor, c: Tensor, log_dt: Tensor) -> Tensor:
        return ops.diagonal_scan(u, w, b, c, log_dt)[0]

    def convolution(u: Tensor, w: Tensor, c: Tensor, log_dt: Tensor) -> Tensor:
        return whole_tensor_fft(u, vandermonde(w, c, log_dt, L), torch.zeros(1, H))

    inputs = [torch.randn(B, L, H).transpose(1, 2), w, c, log_dt()]
    return inputs, {"spade_ext": scan, "Vandermonde, torch.fft": convolution}


def local_attention(L: int) -> tuple[Inputs, dict[str, Op]]:
    blocks, bias = three_blocks(L, WINDOW, WINDOW), torch.zeros(H // D, 2 * WINDOW + 1)
    return list(torch.randn(3, B, L, H // D, D)), {
        "spade_ext": lambda q, k, v: ops.local_attention(q, k, v, window=(WINDOW, WINDOW)),
        "three blocks": lambda q, k, v: blocks(q, k, v, bias),
        "SDPA, band mask": lazily(lambda: dense_band(L, WINDOW, WINDOW)),  # 34 GB at 65,536
    }


CASES = {case.__name__: case for case in (long_conv, s4_kernel, diagonal_kernel, diagonal_scan, local_attention)}


def prepare(case: str, name: str, L: int) -> tuple[Op, Inputs, Tensor]:
    inputs, peers = CASES[case](L)
    with torch.no_grad():
        grad = torch.randn_like(peers[name](*inputs))
    return peers[name], [t.requires_grad_() for t in inputs], grad


def measure(case: str, name: str, L: int) -> dict[str, float]:
    """Bytes of a call beyond its inputs, the share of them that is extra, and seconds where memory is kept, in this
    process."""
    forward_backward(*prepare(case, name, 16))  # loads libraries
    _, inputs, grad = point = prepare(case, name, L)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    before = status("VmRSS")
    forward_backward(*point)
    memory = max(0, status("VmHWM") - before)
    read, written = sum(t.nbytes for t in inputs), grad.nbytes
    extra = max(0, memory - read - written) / (2 * read + 2 * written)

    spade_ext.keep_memory()
    times: list[float] = []
    while len(times) < 4 or (len(times) < 20 and sum(times) < 0.5):
        start = time.perf_counter()
        forward_backward(*point)
        times.append(time.perf_counter() - start)
    return {"bytes": memory, "extra": extra, "seconds": statistics.median(times[2:])}


def measure_apart(case: str, name: str, L: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--point", case, name, str(L)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def curve(
    measure: Callable[[str, str, int], dict[str, float]], case: str, name: str, lengths: Sequence[int]
) -> list[dict[str, float]]:
    memory = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    points: list[dict[str, float]] = []
    for L in lengths:
        if points and (4 * points[-1]["bytes"] > memory or points[-1]["seconds"] > 1):
            break
        points.append(measure(case, name, L))
    return points


def plot(curves: dict[tuple[str, str], list[dict[str, float]]], lengths: Sequence[int], path: Path) -> None:
    figure, axes = pyplot.subplots(2, len(CASES), figsize=(4 * len(CASES), 7), layout="constrained", sharex=True)
    for (case, name), points in curves.items():
        column = list(CASES).index(case)
        axes[0, column].set_title(case)
        for row, key, scale in ((0, "seconds", 1e3), (1, "bytes", 1e-6)):
            values = [scale * point[key] for point in points]
            axes[row, column].loglog(lengths[: len(values)], values, marker=".", label=name)
    for column in range(len(CASES)):
        axes[0, column].legend()
        axes[1, column].set_xlabel("length")
    axes[0, 0].set_ylabel("forward + backward (ms)")
    axes[1, 0].set_ylabel("memory beyond inputs (MB)")
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--point", nargs=3, metavar=("OP", "PEER", "L"), help="measure this one, print JSON")
    parser.add_argument("--quick", action="store_true", help="two short lengths in this process, no picture")
    options = parser.parse_args()
    if options.point:
        case, name, L = options.point
        print(json.dumps(measure(case, name, int(L))))
        return
    lengths = [64, 128] if options.quick else [2**e for e in range(8, 17)]
    print("Time (ms) and memory beyond inputs (MB) of forward + backward, by length\n")
    print(f"{machine()}; B {B}, {H} channels, N {N}; attention with {H // D} heads, window ({WINDOW}, {WINDOW})\n")
    print(f"| op | by |{' | '.join(f'{L:,}' for L in lengths)} | extra |")
    print(f"|---|---|{'---:|' * len(lengths)}---:|")
    curves = {}
    for case in CASES:
        for name in CASES[case](16)[1]:
            points = curves[case, name] = curve(measure if options.quick else measure_apart, case, name, lengths)
            cells = [f"{1e3 * point['seconds']:.3g} / {point['bytes'] / 1e6:.3g}" for point in points]
            cells += [""] * (len(lengths) - len(cells)) + [f"{points[-1]['extra']:.0%}"]
            print(f"| {case} | {name} | {' | '.join(cells)} |", flush=True)
    if not options.quick:
        plot(curves, lengths, PICTURE)
        print(f"\n![time and memory by length]({PICTURE.name})")


if __name__ == "__main__":
    main()
