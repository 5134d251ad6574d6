"""A picture of a training run."""

import os
from collections.abc import Iterable, Mapping
from itertools import cycle
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402


def _series(history: Iterable[Mapping[str, Any]], key: str) -> tuple[list[int], list[float]]:
    points = [(entry["step"], entry[key]) for entry in history if key in entry]
    return [step for step, _ in points], [value for _, value in points]


def plot_curves(history: Iterable[Mapping[str, Any]], baselines: Mapping[str, float], path: str | os.PathLike) -> None:
    """Loss and validation accuracy by step, from a Trainer's log history, as a PNG file."""
    history = list(history)
    figure, (loss_axes, accuracy_axes) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    loss_axes.plot(*_series(history, "loss"), label="training")
    loss_axes.plot(*_series(history, "eval_loss"), marker=".", label="validation")
    loss_axes.set(xlabel="step", ylabel="cross-entropy (nats)")
    loss_axes.legend()

    steps, accuracies = _series(history, "eval_accuracy")
    accuracy_axes.plot(steps, [100 * value for value in accuracies], marker=".", label="validation")
    for (name, value), style in zip(baselines.items(), cycle(("--", ":", "-.")), strict=False):
        accuracy_axes.axhline(100 * value, color="gray", linestyle=style, label=name)
    accuracy_axes.set(xlabel="step", ylabel="accuracy (%)")
    accuracy_axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
