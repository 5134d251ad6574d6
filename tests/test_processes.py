"""Ops called by several threads at once, and in a process forked after they ran in parallel."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from spade_ext import ops

from . import smoke
from .ops import sample_inputs

PUBLIC_OPS = [name for name in ops.__all__ if not name.endswith("_ref")]


def call(op):
    """Large enough to be cut into several tasks; made anew each time, for ops that change an argument."""
    samples = getattr(sample_inputs, f"{op}_samples")()
    sample = max(samples, key=lambda sample: sum(t.numel() for t in sample.args if isinstance(t, torch.Tensor)))
    return op, sample.args, sample.kwargs


def check_equal(actual, expected):
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a, e)


@pytest.mark.parametrize("op", PUBLIC_OPS)
def test_two_threads_at_once(op, set_threads):
    set_threads(2)
    expected, arguments = smoke.run(*call(op)), [call(op) for _ in range(20)]
    barrier = Barrier(2)

    def work(calls):
        barrier.wait()
        return [smoke.run(*arguments) for arguments in calls]

    with ThreadPoolExecutor(2) as pool:
        for results in pool.map(work, (arguments[:10], arguments[10:])):
            for actual in results:
                check_equal(actual, expected)


class Results(Dataset):
    """What every op gives in the process that reads it."""

    def __len__(self):
        return len(PUBLIC_OPS)

    def __getitem__(self, index):
        return smoke.run(*call(PUBLIC_OPS[index]))


def test_forked_data_loader_worker(set_threads):
    """OpenMP's threads do not survive a fork: a worker that waited for them would never answer."""
    set_threads(2)
    expected = list(Results())
    loader = DataLoader(
        Results(), batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=60, collate_fn=list
    )
    for actual, wanted in zip(loader, expected, strict=True):
        check_equal(actual, wanted)
