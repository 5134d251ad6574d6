"""Compares runs of `spade-ext train` that were evaluated: folders NAME-SEED side by side.

Prints a Markdown table of test accuracies and draws the validation accuracy by step, the mean over the seeds and its
range.
"""

import argparse
import json
import statistics
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402

Run = dict[str, Any]


def read_run(folder: Path) -> Run:
    """What training.json and test_metrics.json say."""
    content: Run = {}
    for name in ("training.json", "test_metrics.json"):
        path = folder / name
        if not path.is_file():
            sys.exit(f"{path} is missing, expected a run that `spade-ext train` and `spade-ext evaluate` finished")
        content |= json.loads(path.read_text())
    return content


def read_groups(folders: Sequence[Path]) -> dict[str, list[Run]]:
    groups = defaultdict(list)
    for folder in sorted(folders):
        groups[folder.name.rpartition("-")[0]].append(read_run(folder))
    return dict(groups)


def print_table(groups: Mapping[str, Sequence[Run]]) -> None:
    print("| model | parameters | test accuracy by seed, % | mean, % | standard deviation |")
    print("|---|---:|---|---:|---:|")
    for name, runs in groups.items():
        accuracies = [100 * run["test_accuracy"] for run in runs]
        deviation = f"{statistics.stdev(accuracies):.1f}" if len(runs) > 1 else ""
        each = ", ".join(f"{accuracy:.1f}" for accuracy in accuracies)
        print(f"| {name} | {runs[0]['parameters']:,} | {each} | {statistics.mean(accuracies):.1f} | {deviation} |")
    for name, accuracy in next(iter(groups.values()))[0]["baselines"].items():
        print(f"| {name} | 0 | | {100 * accuracy:.1f} | |")


def plot(groups: Mapping[str, Sequence[Run]], path: Path) -> None:
    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for name, runs in groups.items():
        curves = [
            [(entry["step"], 100 * entry["eval_accuracy"]) for entry in run["history"] if "eval_accuracy" in entry]
            for run in runs
        ]
        steps = [step for step, _ in curves[0]]
        by_step = list(zip(*([accuracy for _, accuracy in curve] for curve in curves), strict=True))
        axes.plot(steps, [statistics.mean(values) for values in by_step], marker=".", label=name)
        axes.fill_between(steps, list(map(min, by_step)), list(map(max, by_step)), alpha=0.2)
    axes.set(xlabel="step", ylabel="validation accuracy (%)")
    axes.legend()
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("picture", type=Path, help="a PNG file to write")
    parser.add_argument("runs", type=Path, nargs="+", help="folders of runs, such as runs/compare/*-?")
    options = parser.parse_args()
    groups = read_groups(options.runs)
    print_table(groups)
    plot(groups, options.picture)


if __name__ == "__main__":
    main()
