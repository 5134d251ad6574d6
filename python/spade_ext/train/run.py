"""Train a recipe's model, and evaluate what a run left."""

import dataclasses
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoModelForSequenceClassification, PreTrainedModel, set_seed

from ..models import SpadeForSequenceClassification
from .curves import plot_curves
from .recipe import Recipe
from .trainer import SpadeTrainer, accuracy

RECIPE_FILE = "recipe.yaml"
CURVES_FILE = "curves.png"
MODEL_FILE = "model.safetensors"


def _write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def _make_trainer(**options: Any) -> SpadeTrainer:
    try:
        return SpadeTrainer(compute_metrics=accuracy, **options)
    except (ValueError, ImportError, RuntimeError) as error:  # such as a package of report_to that is not installed
        raise ValueError(f"training: {error}") from error


def train(recipe: Recipe) -> dict[str, Any]:
    """Train a recipe's model and write the run to training.output_dir.

    Training starts from scratch, or from the checkpoint training.resume_from_checkpoint. Of several processes, the
    first one writes. The folder then holds the model as save_pretrained writes it, recipe.yaml, the Trainer's
    checkpoints, training.json and curves.png.

    Returns:
        The content of training.json.

    Raises:
        FileExistsError: the folder already holds a run, and training.resume_from_checkpoint is not set.
    """
    folder = Path(recipe.training["output_dir"])
    task, arguments = recipe.make_task(), recipe.training_arguments()
    checkpoint, writes = arguments.resume_from_checkpoint, arguments.process_index == 0
    if writes and not checkpoint and (folder / RECIPE_FILE).exists():
        raise FileExistsError(f"training.output_dir is {folder}, which holds a run already, expected another folder")
    if checkpoint and not Path(checkpoint).is_dir():
        raise FileNotFoundError(f"training.resume_from_checkpoint is {checkpoint}, expected a checkpoint's folder")
    set_seed(arguments.seed)
    datasets = {split: task.dataset(split) for split in ("train", "validation")}
    model = SpadeForSequenceClassification(recipe.model_config())
    trainer = _make_trainer(
        model=model,
        args=arguments,
        data_collator=task.collator(),
        train_dataset=datasets["train"],
        eval_dataset=datasets["validation"],
    )
    if writes:
        folder.mkdir(parents=True, exist_ok=True)
        recipe.save(folder / RECIPE_FILE)
    result = trainer.train(resume_from_checkpoint=checkpoint)
    history = list(trainer.state.log_history)  # without the evaluation below
    trainer.save_model()
    metrics = {
        **result.metrics,
        **trainer.evaluate(),
        "parameters": model.num_parameters(),
        "history": history,
    }
    if writes:
        _write_json(folder / "training.json", metrics)
        plot_curves(history, task.baselines(datasets["train"], datasets["validation"]), folder / CURVES_FILE)
    return metrics


def _check_run(folder: Path) -> None:
    if not (folder / RECIPE_FILE).is_file():
        raise FileNotFoundError(f"{folder} holds no {RECIPE_FILE}, expected the output_dir of `spade-ext train`")
    if not (folder / MODEL_FILE).is_file():
        raise FileNotFoundError(f"{folder} holds no finished run: {MODEL_FILE} is missing, expected a trained model")


def _check_evaluation_overrides(overrides: Iterable[str]) -> None:
    for override in overrides:
        key = override.partition("=")[0]
        if key.partition(".")[0] in ("task", "model") or key in ("training", "training.output_dir"):
            raise ValueError(f"{key} is fixed by the run, expected only overrides of data and of other training fields")


def _load_model(folder: Path) -> PreTrainedModel:
    try:
        return AutoModelForSequenceClassification.from_pretrained(folder)
    except (OSError, ValueError, RuntimeError, SafetensorError, StrictDataclassError) as error:
        raise ValueError(f"{folder} holds no complete model: {error}") from error


def evaluate(folder: str | os.PathLike, *, split: str = "test", overrides: list[str] | None = None) -> dict[str, Any]:
    """Evaluate the model of a run, and write {split}_metrics.json beside it.

    Args:
        folder: what `train` wrote.
        split: "train", "validation" or "test".
        overrides: of the run's recipe, such as "data.directory=...". The model and training.output_dir are fixed.

    Returns:
        The content of the file: the model's loss and accuracy and, under "baselines", the accuracies of answers
        that cost nothing.

    Raises:
        FileNotFoundError: the folder holds no finished run.
        ValueError: the split, an override or the saved model is not as expected.
    """
    folder = Path(folder)
    overrides = overrides or []
    _check_run(folder)
    _check_evaluation_overrides(overrides)
    recipe = Recipe.load(folder / RECIPE_FILE, overrides)
    recipe = dataclasses.replace(recipe, training={**recipe.training, "output_dir": str(folder)})
    task = recipe.make_task()
    if split not in task.splits:
        raise ValueError(f"split is {split!r}, expected one of {', '.join(task.splits)}")
    dataset = task.dataset(split)
    trainer = _make_trainer(
        model=_load_model(folder),
        args=recipe.training_arguments(),
        data_collator=task.collator(),
        eval_dataset=dataset,
    )
    metrics = trainer.evaluate(metric_key_prefix=split)
    metrics["baselines"] = task.baselines(dataset if split == "train" else task.dataset("train"), dataset)
    if trainer.is_world_process_zero():
        _write_json(folder / f"{split}_metrics.json", metrics)
    return metrics
