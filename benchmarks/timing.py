"""Times an op beside a named peer in one process and prints a Markdown table, with this machine's own rates.

Speeds are ratios of medians, the peer's time over ours: above 1 ours is the faster one. GFLOP/s counts the floating
point operations that README.md of the family gives, GB/s inputs, outputs and gradients once a pass.
"""

import argparse
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

import spade_ext

Op = Callable[..., Tensor]


def cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def status(field: str) -> int:
    """Bytes, of /proc/self/status."""
    return 1024 * int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def machine() -> str:
    capability = torch.backends.cpu.get_cpu_capability()
    return (
        f"{cpu_name()}, {os.cpu_count()} cores, {capability}; threads: {torch.get_num_threads()}; float32; "
        f"torch {torch.__version__}, spade_ext {spade_ext.__version__}"
    )


def forward_backward(op: Op, inputs: Sequence[Tensor], grad: Tensor) -> tuple[Tensor, ...]:
    y = op(*inputs)
    return y, *torch.autograd.grad(y, inputs, grad)


def training_step(module: nn.Module, x: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    """Output and gradients of x and of every parameter that is learned."""
    learned = [p for p in module.parameters() if p.requires_grad]
    return forward_backward(lambda x, *_: module(x), [x, *learned], grad)


def print_peak_memory(case: str, *arguments: object) -> None:
    """Prints the most memory that a process of this script takes which, given --train and the arguments, trains."""
    command = [sys.executable, sys.argv[0], "--train", *map(str, arguments)]
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    before, most = (1e-9 * int(number) for number in printed.split())
    print(f"- {case}: {most:.2f} GB, {before:.2f} GB of it before the first step")


def train(layer: nn.Module, x: Tensor) -> None:
    """Three steps of SGD, memory kept; prints the process's peak before and after them."""
    spade_ext.keep_memory()
    optimizer = torch.optim.SGD(layer.parameters(), lr=1e-3)
    print(status("VmHWM"))
    for _ in range(3):
        layer(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    print(status("VmHWM"))


def check(case: str, peer_name: str, ours: Sequence[Tensor], peer: Sequence[Tensor], tolerance: float) -> None:
    """Leaves unless the output and the gradients are the peer's. `tolerance`: how far any element may be from the
    peer's, relative to the largest."""
    for index, (a, b) in enumerate(zip(ours, peer, strict=True)):
        error = ((a - b).abs().max() / b.abs().max()).item()
        if not error <= tolerance:
            name = f"gradient {index - 1}" if index else "output"
            sys.exit(f"{case}: {name} is {error:.1e} from that of {peer_name}, expected at most {tolerance:.0e}")


class Benchmark:
    """One run: reads the options, measures the machine, then prints a row a comparison."""

    def __init__(self, description: str):
        parser = argparse.ArgumentParser(description=description)
        parser.add_argument("--threads", type=int, default=torch.get_num_threads())
        parser.add_argument("--quick", action="store_true", help="small shapes and few runs: does it work at all")
        options = parser.parse_args()
        self.quick = options.quick
        self.warmup, self.runs = (1, 3) if options.quick else (8, 9)
        memory = "kept on both sides" if spade_ext.keep_memory() else "not kept"
        self.set_threads(options.threads)
        torch.manual_seed(0)

        n = 256 if self.quick else 1024
        self.matrices = torch.randn(3, n, n)
        source, target = torch.randn(2, 64 * n * n)
        seconds = self.medians(copy=lambda: target.copy_(source))
        self.copy = 2 * source.nbytes / seconds["copy"] / 1e9

        print(f"{description}\n")
        print(f"CPU: {machine()}")
        print(f"medians of {self.runs} interleaved runs, fewer where they take more than 20 s; memory: {memory}")
        print(f"sgemm {n}: {self.sgemm:.1f} GFLOP/s, and anew for each row's share")
        print(f"copy of {source.nbytes >> 20} MiB: {self.copy:.1f} GB/s, reads and writes counted\n")
        print("| case | pass | ours, ms | peer | peer, ms | peer / ours | GFLOP/s | of sgemm | GB/s | of copy |")
        print("|---|---|---:|---|---:|---:|---:|---:|---:|---:|")

    def set_threads(self, threads: int) -> None:
        self.threads = threads
        torch.set_num_threads(threads)

    def multiply(self) -> None:
        a, b, out = self.matrices
        torch.mm(a, b, out=out)

    def medians(self, **calls: Callable[[], object]) -> dict[str, float]:
        """Seconds of each call; sets the rate of sgemm, which changes while a machine runs, to that between them."""
        calls["sgemm"] = self.multiply
        start = time.perf_counter()
        for _ in range(self.warmup):
            for call in calls.values():
                call()
            if time.perf_counter() - start > 5:
                break
        times: dict[str, list[float]] = {name: [] for name in calls}
        for run in range(self.runs):
            if run >= 3 and sum(map(sum, times.values())) > 20:
                break
            for name, call in calls.items():
                if not times[name] or times[name][-1] < 1:
                    call()  # the other one has filled the caches
                start = time.perf_counter()
                call()
                times[name].append(time.perf_counter() - start)
        seconds = {name: statistics.median(times[name]) for name in calls}
        self.sgemm = 2 * self.matrices.size(-1) ** 3 / seconds.pop("sgemm") / 1e9
        return seconds

    def compare(
        self,
        case: str,
        ours: Op,
        peer_name: str,
        peer: Op,
        inputs: Sequence[Tensor],
        flops: tuple[float, float],
        tolerance: float,
        backward: bool = True,
    ) -> None:
        """Prints ours against the peer. `flops`: of the forward and of the backward. `tolerance`: see `check`.
        `backward`: False for a peer that has none."""
        inputs = [t.detach().requires_grad_(backward) for t in inputs]
        with torch.no_grad():
            outputs = [[op(*inputs)] for op in (ours, peer)]
            grad = torch.randn_like(outputs[0][0])
        if backward:
            outputs = [forward_backward(op, inputs, grad) for op in (ours, peer)]
        check(case, peer_name, *outputs, tolerance)
        del outputs

        read, written = sum(t.nbytes for t in inputs), grad.nbytes
        with torch.no_grad():
            seconds = self.medians(ours=lambda: ours(*inputs), peer=lambda: peer(*inputs))
        self.row(case, "forward", seconds, peer_name, flops[0], read + written)
        if backward:
            seconds = self.medians(
                ours=lambda: forward_backward(ours, inputs, grad), peer=lambda: forward_backward(peer, inputs, grad)
            )
            self.row(case, "forward + backward", seconds, peer_name, sum(flops), 3 * read + 2 * written)

    def compare_modules(
        self,
        case: str,
        ours: nn.Module,
        peer_name: str,
        peer: nn.Module,
        x: Tensor,
        tolerance: float | None,
        flops: tuple[float, float] = (0, 0),
    ) -> None:
        """`compare`, with the gradients of parameters in the time; those of x are checked, unless tolerance is None."""
        modules = {"ours": ours, "peer": peer}
        x.requires_grad_()
        with torch.no_grad():
            grad = torch.randn_like(ours(x))
        if tolerance is not None:
            check(case, peer_name, *(forward_backward(module, [x], grad) for module in modules.values()), tolerance)
        with torch.no_grad():
            seconds = self.medians(**{side: partial(module, x) for side, module in modules.items()})
        self.row(case, "forward", seconds, peer_name, flops[0])

        seconds = self.medians(**{side: partial(training_step, module, x, grad) for side, module in modules.items()})
        self.row(case, "forward + backward", seconds, peer_name, sum(flops))

    def compare_threads(self, case: str, ours: Op, inputs: Sequence[Tensor]) -> None:
        """Prints ours on 2 threads against ours on 1."""
        inputs = [t.requires_grad_() for t in inputs]
        with torch.no_grad():
            grad = torch.randn_like(ours(*inputs))

        def forward() -> None:
            with torch.no_grad():
                ours(*inputs)

        both = {"forward": forward, "forward + backward": lambda: forward_backward(ours, inputs, grad)}
        threads = self.threads
        for name, call in both.items():
            seconds = {}
            for side, count in {"ours": 2, "peer": 1}.items():  # not interleaved: a changed count starts new threads
                self.set_threads(count)
                seconds |= self.medians(**{side: call})
            self.row(f"{case}, 2 threads", name, seconds, "ours, 1 thread")
        self.set_threads(threads)

    def row(
        self, case: str, name: str, seconds: dict[str, float], peer: str, flops: float = 0, moved: float = 0
    ) -> None:
        ours, theirs = seconds["ours"], seconds["peer"]
        cells = [case, name, f"{1e3 * ours:.2f}", peer, f"{1e3 * theirs:.2f}", f"{theirs / ours:.2f}"]
        for amount, rate in ((flops, self.sgemm), (moved, self.copy)):
            achieved = amount / ours / 1e9
            cells += [f"{achieved:.2f}", f"{achieved / rate:.1%}"] if amount else ["", ""]
        print("| " + " | ".join(cells) + " |", flush=True)
