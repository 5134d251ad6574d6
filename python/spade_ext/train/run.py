"""Train a recipe's model, and evaluate what a run left."""

import json
import os
from pathlib import Path
from typing import Any

from transformers import AutoModelForSequenceClassification, set_seed

from ..models import SpadeForSequenceClassification
from .curves import plot_curves
from .recipe import Recipe
from .trainer import SpadeTrainer, accuracy

RECIPE_FILE = "recipe.yaml"
CURVES_FILE = "curves.png"


def _write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def train(recipe: Recipe) -> dict[str, Any]:
    """Train a recipe's model from scratch and write the run to training.output_dir.

    The folder then holds the model as save_pretrained writes it, recipe.yaml, the Trainer's checkpoints,
    train_metrics.json and curves.png.

    Returns:
        The content of train_metrics.json.

    Raises:
        FileExistsError: the folder already holds a run.
    """
    folder = Path(recipe.training["output_dir"])
    if (folder / RECIPE_FILE).exists():
        raise FileExistsError(f"training.output_dir is {folder}, which holds a run already, expected another folder")
    task, arguments = recipe.make_task(), recipe.training_arguments()
    set_seed(arguments.seed)
    datasets = {split: task.dataset(split) for split in ("train", "validation")}
    model = SpadeForSequenceClassification(recipe.model_config())
    folder.mkdir(parents=True, exist_ok=True)
    recipe.save(folder / RECIPE_FILE)

    trainer = SpadeTrainer(
        model=model,
        args=arguments,
        data_collator=task.collator(),
        train_dataset=datasets["train"],
        eval_dataset=datasets["validation"],
        compute_metrics=accuracy,
    )
    result = trainer.train()
    trainer.save_model()
    metrics = {
        **result.metrics,
        **trainer.evaluate(),
        "parameters": model.num_parameters(),
        "history": trainer.state.log_history,
    }
    _write_json(folder / "train_metrics.json", metrics)
    plot_curves(trainer.state.log_history, task.baselines("validation"), folder / CURVES_FILE)
    return metrics


def evaluate(folder: str | os.PathLike, *, split: str = "test", overrides: list[str] | None = None) -> dict[str, Any]:
    """Evaluate the model of a run, and write {split}_metrics.json beside it.

    Args:
        folder: what `train` wrote.
        split: "train", "validation" or "test".
        overrides: of the run's recipe, such as "data.directory=...".

    Returns:
        The content of the file: the model's loss and accuracy and, under "baselines", the accuracies of answers
        that cost nothing.

    Raises:
        FileNotFoundError: the folder holds no run.
    """
    folder = Path(folder)
    if not (folder / RECIPE_FILE).is_file():
        raise FileNotFoundError(f"{folder} holds no {RECIPE_FILE}, expected the output_dir of `spade-ext train`")
    recipe = Recipe.load(folder / RECIPE_FILE, overrides or ())
    task = recipe.make_task()
    if split not in task.splits:
        raise ValueError(f"split is {split!r}, expected one of {', '.join(task.splits)}")
    trainer = SpadeTrainer(
        model=AutoModelForSequenceClassification.from_pretrained(folder),
        args=recipe.training_arguments(),
        data_collator=task.collator(),
        eval_dataset=task.dataset(split),
        compute_metrics=accuracy,
    )
    metrics = trainer.evaluate(metric_key_prefix=split)
    metrics["baselines"] = task.baselines(split)
    _write_json(folder / f"{split}_metrics.json", metrics)
    return metrics
