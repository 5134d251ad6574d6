import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

torch.set_num_threads(1)  # the workers of pytest-xdist share the cores

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(autouse=True)
def deterministic():
    """Seeds torch, and fills uninitialised memory with NaN, `at::empty` in C++ included."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def set_threads():
    """torch.set_num_threads for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def load_golden():
    """load_golden(name) returns the tensors and the configuration of a file of tests/golden."""

    def load(name):
        path = GOLDEN / f"{name}.safetensors"
        with safe_open(path, framework="pt") as file:
            config = json.loads(file.metadata()["config"])
        return load_file(path), config

    return load
