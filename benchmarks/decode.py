"""Decoding of SpadeConfig.preset("wikitext103"), batch 1, a token at a time from a cache: how much of the time is that
of reading the weights at the machine's copy bandwidth, and whether it grows with the tokens before."""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from timing import machine

import spade_ext
from spade_ext.models import SpadeCache, SpadeConfig, SpadeForCausalLM
from spade_ext.nn import reuse_kernels

PROMPT, LATER = 100, 100_000  # tokens


def seconds(call: Callable[[], object], runs: int) -> float:
    times = []
    for _ in range(2 + runs):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])


def go_on_to(cache: SpadeCache, tokens: int) -> None:
    """As if there had been so many tokens: rings are full, and counters are theirs."""
    more = tokens - int(cache.tokens)
    cache.map(lambda t: t + more if t.dtype == torch.long else t)
    cache.tokens += more


def decode(config: SpadeConfig, dtype: torch.dtype, runs: int) -> float:
    """Prints the rows of a dtype and returns the seconds of a token."""
    torch.manual_seed(0)
    model = SpadeForCausalLM(config).eval().to(dtype)
    read = sum(parameter.nbytes for parameter in model.parameters())
    ids = torch.randint(3, config.vocab_size, (1, PROMPT))
    name = str(dtype).removeprefix("torch.")
    token = 0.0
    with torch.no_grad(), reuse_kernels(model, steps=True):
        cache = model(ids, logits_to_keep=1, use_cache=True).cache
        for tokens in (PROMPT, LATER):
            go_on_to(cache, tokens)
            source, target = torch.randn(2, 2**26)
            copy = 2 * source.nbytes / seconds(lambda: target.copy_(source), 9)  # noqa: B023
            token = seconds(lambda: model(ids[:, -1:], cache=cache), runs)
            share = read / copy / token
            cells = f"{name} | {tokens:,} | {cache.nbytes:,} | {1e3 * token:.1f} | {1 / token:.1f} | {read / 1e6:.0f}"
            print(f"| {cells} | {copy / 1e9:.1f} | {share:.0%} |", flush=True)
        whole = seconds(lambda: model(ids, logits_to_keep=1, use_cache=False), 3)
        cells = f"{name}, no cache | {PROMPT:,} | 0 | {1e3 * whole:.1f} | {1 / whole:.1f}"
        print(f"| {cells} | {read / 1e6:.0f} | | |", flush=True)
    return token


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a small model: does it work at all")
    quick = parser.parse_args().quick
    sizes = ("num_hidden_layers", 2), ("hidden_size", 64), ("num_attention_heads", 4), ("intermediate_size", 128)
    config = SpadeConfig.preset("wikitext103", **(dict(sizes) | {"ssm_n_ssm": 1} if quick else {}))
    spade_ext.keep_memory()
    print(f"{__doc__}\n\nCPU: {machine()}\n")
    columns = "tokens before", "cache, bytes", "a token, ms", "tokens a second", "weights, MB", "copy, GB/s", "share"
    print(f"| weights | {' | '.join(columns)} |\n|---|{'---:|' * len(columns)}")
    float32, bfloat16 = (decode(config, dtype, 3 if quick else 15) for dtype in (torch.float32, torch.bfloat16))
    print(f"\nbfloat16 weights: {float32 / bfloat16:.2f} x the speed of float32")


if __name__ == "__main__":
    main()
