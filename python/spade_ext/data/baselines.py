"""What an answer is worth that costs nothing."""

from torch.utils.data import Dataset


def majority_accuracy(train: Dataset, test: Dataset) -> float:
    """Accuracy on `test`, 0 to 1, of always answering the most frequent label of `train`.

    Both have `labels`, (N,) int64.
    """
    majority = train.labels.bincount().argmax()
    return (test.labels == majority).double().mean().item()
