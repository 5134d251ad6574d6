"""The tasks that a recipe can name: what a task's data is, and what an answer costs that costs nothing."""

import dataclasses
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

from torch.utils.data import Dataset

from ..data import listops


@dataclasses.dataclass
class ListOpsTask:
    """Long Range Arena ListOps.

    Args:
        directory: of the published files basic_train.tsv, basic_val.tsv and basic_test.tsv.
        max_length: tokens that are read of an expression.
        generate: options of `spade_ext.data.listops.generate` with which `spade-ext data` makes the files.
    """

    directory: str
    max_length: int = 2000
    generate: dict[str, Any] = dataclasses.field(default_factory=dict)

    model_options: ClassVar[dict[str, Any]] = {
        "vocab_size": listops.VOCAB_SIZE,
        "num_labels": listops.NUM_LABELS,
        "pad_token_id": listops.PAD_ID,
    }
    generate_options: ClassVar[dict[str, Any]] = {
        name: parameter.annotation
        for name, parameter in inspect.signature(listops.generate).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
    }
    splits: ClassVar[tuple[str, ...]] = tuple(listops.FILES)

    def make_data(self) -> None:
        """Generate the files, unless the directory already holds exactly them."""
        if not listops.matches(self.directory, **self.generate):
            listops.generate(self.directory, **self.generate)

    def dataset(self, split: str) -> Dataset:
        return listops.ListOps(Path(self.directory) / listops.FILES[split], max_length=self.max_length)

    def collator(self) -> Callable:
        return listops.Collator()

    def baselines(self, train: Dataset, test: Dataset) -> dict[str, float]:
        """Accuracies on `test`, 0 to 1, of answers that need no model but the labels of `train`."""
        return {
            "majority class": listops.majority_accuracy(train, test),
            "root operator": listops.root_operator_accuracy(train, test),
        }


TASKS = {"listops": ListOpsTask}
