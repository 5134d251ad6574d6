"""Training and evaluation by recipes: what the command `spade-ext` does, as functions."""

from .recipe import Recipe
from .run import evaluate, train
from .trainer import SpadeTrainer, parameter_groups

__all__ = ["Recipe", "SpadeTrainer", "evaluate", "parameter_groups", "train"]
