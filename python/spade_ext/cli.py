"""The command `spade-ext`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

_EPILOG = "Fields of a recipe are overridden by KEY=VALUE, for example training.max_steps=100 model.window=[64,64]."


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="spade-ext", description="Train and evaluate SPADE models.", epilog=_EPILOG)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, positional: str, text: str, about: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=about, description=about, epilog=_EPILOG)
        command.add_argument(positional, type=Path, help=text)
        command.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="override a field of the recipe")
        return command

    add("data", "recipe", "a YAML recipe", "Make the data that a recipe names.")
    add("train", "recipe", "a YAML recipe", "Train a recipe's model; the run goes to training.output_dir.")
    evaluate = add("evaluate", "run", "a folder that `spade-ext train` wrote", "Evaluate a run's model.")
    evaluate.add_argument("--split", default="test", help="train, validation or test (default: %(default)s)")
    return parser


def _data(arguments: argparse.Namespace) -> None:
    from .train import Recipe

    task = Recipe.load(arguments.recipe, arguments.overrides).make_task()
    task.make_data()
    print(f"data: {task.directory}")


def _train(arguments: argparse.Namespace) -> None:
    from .train import Recipe, train
    from .train.run import CURVES_FILE

    recipe = Recipe.load(arguments.recipe, arguments.overrides)
    metrics = train(recipe)
    folder = Path(recipe.training["output_dir"])
    print(f"validation accuracy: {metrics['eval_accuracy']:.1%} after {metrics['train_runtime']:.0f} s of training")
    print(f"checkpoint: {folder}\npicture:    {folder / CURVES_FILE}")


def _evaluate(arguments: argparse.Namespace) -> None:
    from .train import evaluate

    split = arguments.split
    metrics = evaluate(arguments.run, split=split, overrides=arguments.overrides)
    rows = {"SPADE": metrics[f"{split}_accuracy"], **metrics["baselines"]}
    print(f"accuracy on the {split} split")
    for name, value in rows.items():
        print(f"  {name:16}{value:6.1%}")
    print(f"metrics: {arguments.run / f'{split}_metrics.json'}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; what a user got wrong is one sentence on stderr and exit code 2."""
    arguments = _parser().parse_args(argv)
    command = {"data": _data, "train": _train, "evaluate": _evaluate}[arguments.command]
    try:
        command(arguments)
    except (ValueError, FileNotFoundError, FileExistsError) as error:
        print(f"spade-ext: {error}", file=sys.stderr)
        return 2
    return 0
