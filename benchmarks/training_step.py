"""Where the time of a recipe's training step goes, by torch's profiler: its own time of every op, summed by kind.

The batch is one of the recipe's data where that is present, else of blank sequences of the recipe's length.
"""

import argparse
import statistics
import time
from collections import Counter
from collections.abc import Callable
from itertools import pairwise

import torch
from timing import cpu_name
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import spade_ext
from spade_ext.models import SpadeForSequenceClassification
from spade_ext.train import Recipe, parameter_groups

# By the start of an op's name.
KINDS = {
    "GEMM": ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::linear", "mkldnn::_linear"),
    "attention": ("spade_ext::local_attention",),
    "SSM": ("spade_ext::long_conv", "spade_ext::diagonal", "spade_ext::s4"),
    "optimizer": ("Optimizer.", "aten::_foreach", "aten::_fused_adam"),
}
PHASES = ("forward", "backward", "optimizer")


def make_batch(recipe: Recipe, size: int) -> tuple[dict[str, Tensor], str]:
    """A batch of random rows of the data, padded to the longest of them, and in words where it comes from."""
    task = recipe.make_task()
    try:
        dataset = task.dataset("train")
    except FileNotFoundError:
        return task.collator()([task.blank(task.length)] * size), "blank"
    chosen = torch.randperm(len(dataset))[:size].tolist()
    return task.collator()([dataset[index] for index in chosen]), "the recipe's data"


def make_step(recipe: Recipe, batch: dict[str, Tensor]) -> Callable[[], dict[str, float]]:
    """A training step without the Trainer, which returns the seconds of each phase."""
    arguments = recipe.training
    model = SpadeForSequenceClassification(recipe.model_config()).train()
    groups = parameter_groups(model, arguments.get("weight_decay", 0.0))
    optimizer = torch.optim.AdamW(groups, lr=arguments.get("learning_rate", 5e-5), fused=True)
    parameters = list(model.parameters())

    def step() -> dict[str, float]:
        times = [time.perf_counter()]
        loss = model(**batch).loss
        times.append(time.perf_counter())
        loss.backward()
        times.append(time.perf_counter())
        torch.nn.utils.clip_grad_norm_(parameters, arguments.get("max_grad_norm", 1.0))
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter())
        return {phase: end - start for phase, (start, end) in zip(PHASES, pairwise(times), strict=True)}

    return step


def kind_of(op: str) -> str:
    return next((kind for kind, starts in KINDS.items() if op.startswith(starts)), "rest")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="override a field of the recipe")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--keep-memory", action=argparse.BooleanOptionalAction, default=True, help="as the command does"
    )
    parser.add_argument("--quick", action="store_true", help="two sequences and few steps: does it work at all")
    options = parser.parse_intermixed_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    memory = "kept" if options.keep_memory and spade_ext.keep_memory() else "not kept"

    recipe = Recipe.load(options.recipe, options.overrides)
    size = 2 if options.quick else recipe.training.get("per_device_train_batch_size", 8)
    batch, source = make_batch(recipe, size)
    step = make_step(recipe, batch)
    warmup, runs = (1, 1) if options.quick else (3, 9)
    for _ in range(warmup):
        step()
    measured = [step() for _ in range(runs)]
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(1 if options.quick else 3):
            step()

    total = statistics.median(sum(seconds.values()) for seconds in measured)
    inputs = next(tensor for name, tensor in batch.items() if name.startswith("input"))
    tokens = size * inputs.shape[1]
    print(f"{options.recipe}: {size} sequences of {inputs.shape[1]:,} tokens, {source}")
    print(f"CPU: {cpu_name()}; threads: {options.threads}; torch {torch.__version__}; memory: {memory}")
    print(f"step: {1e3 * total:,.1f} ms, median of {runs}; {tokens / total:,.0f} tokens/s\n")
    print("| phase | ms | share |\n|---|---:|---:|")
    for phase in PHASES:
        seconds = statistics.median(seconds[phase] for seconds in measured)
        print(f"| {phase} | {1e3 * seconds:,.1f} | {seconds / total:.1%} |")

    times: Counter[str] = Counter()
    rest: Counter[str] = Counter()
    for event in profiler.key_averages():
        kind = kind_of(event.key)
        times[kind] += event.self_cpu_time_total
        if kind == "rest":
            rest[event.key] += event.self_cpu_time_total
    print("\n| kind | share of the profiled steps |\n|---|---:|")
    for kind in (*KINDS, "rest"):
        print(f"| {kind} | {times[kind] / times.total():.1%} |")
    largest = ", ".join(f"{op} {time / times.total():.1%}" for op, time in rest.most_common(6))
    print(f"\nlargest of the rest: {largest}")


if __name__ == "__main__":
    main()
