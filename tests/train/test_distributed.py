"""The command under torchrun, with two processes, against the same command with one."""

import itertools
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from spade_ext import cli
from spade_ext.cli import main
from spade_ext.models import SpadeConfig, SpadeForSequenceClassification
from spade_ext.train import Recipe

SCRIPTS = Path(sysconfig.get_path("scripts"))
LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
TORCHRUN = [*LAUNCH, "--no-python", SCRIPTS / "spade-ext"]

# 96 expressions are 6 steps an epoch, and 3 epochs; 21 are no multiple of any batch size.
RECIPE = """\
task: listops
data:
  directory: {folder}/data
  generate: {{train: 96, validation: 21, test: 11, min_length: 3, max_length: 30, workers: 1}}
model: {{hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2, intermediate_size: 32, window: [4, 4],
  ssm_d_state: 8, dropout: 0.0}}
training: {{output_dir: {folder}/run, max_steps: 18, per_device_train_batch_size: 8, gradient_accumulation_steps: 2,
  learning_rate: 3e-3, adam_epsilon: 1e-4, weight_decay: 0.1, eval_strategy: steps, eval_steps: 6, logging_steps: 1,
  save_strategy: steps, save_steps: 4, save_total_limit: 2, report_to: none, use_cpu: true, disable_tqdm: true}}
"""
HALF = "training.per_device_train_batch_size=4"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distributed")
    path = folder / "recipe.yaml"
    path.write_text(RECIPE.format(folder=folder))
    assert main(["data", str(path)]) == 0
    return path


def start(*arguments):
    """Two processes of the command, of one thread each: torchrun has no advice about threads to give."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*TORCHRUN, *arguments], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def run(*arguments, succeeds=True):
    """What two processes of the command print to stdout and to stderr."""
    process = start(*arguments)
    output, errors = process.communicate(timeout=300)
    assert (process.returncode == 0) == succeeds, errors
    return output, errors


def losses(folder):
    """Losses, norms of gradients and metrics, and the step of each."""
    history = json.loads((folder / "training.json").read_text())["history"]
    names = ("loss", "grad_norm", "eval_loss", "eval_accuracy")
    return {(entry["step"], name): entry[name] for entry in history for name in names if name in entry}


@pytest.fixture(scope="module")
def pair(recipe):
    """pair(name, *overrides) trains in one process and in two, and returns both folders and what the two printed."""

    def train(name, *overrides):
        one, two = (recipe.parent / f"{name}-{count}" for count in ("one", "two"))
        assert main(["train", str(recipe), f"training.output_dir={one}", *overrides]) == 0
        return one, two, run("train", recipe, f"training.output_dir={two}", HALF, *overrides)

    return train


@pytest.fixture(scope="module")
def by_length(pair):
    return pair("by-length", "training.train_sampling_strategy=group_by_length")


def check_equal(one, two):
    expected = losses(one)
    assert len(expected) == 18 * 2 + 3 * 2
    assert losses(two) == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(load_file(two / "model.safetensors"), load_file(one / "model.safetensors"))


def test_by_length_and_accumulated(by_length):
    check_equal(*by_length[:2])


def test_in_random_order(pair):
    check_equal(*pair("random", "training.gradient_accumulation_steps=1")[:2])


def test_the_first_process_speaks_alone(by_length):
    _, two, (output, errors) = by_length
    lines = output.splitlines()
    assert lines[-1] == f"picture:    {two / 'curves.png'}" and lines[-2] == f"checkpoint: {two}"
    assert all(line.startswith("{") for line in lines[:-3]) and len(set(lines)) == len(lines)
    assert errors == ""


def test_evaluate(by_length, tmp_path):
    one, two = (tmp_path / name for name in ("one", "two"))
    for copy in (one, two):
        shutil.copytree(by_length[1], copy)
    assert main(["evaluate", str(one)]) == 0
    output, _ = run("evaluate", two)
    assert output.count("SPADE") == output.count("majority class") == output.count("metrics: ") == 1
    metrics = [json.loads((folder / "test_metrics.json").read_text()) for folder in (one, two)]
    for name in ("test_loss", "test_accuracy", "baselines"):
        assert metrics[1][name] == pytest.approx(metrics[0][name], rel=1e-5)


def test_killed(recipe, tmp_path):
    """Killed and resumed, two processes end with the bits of two that were not interrupted."""
    overrides = [HALF, "training.train_sampling_strategy=group_by_length", "model.dropout=0.1"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run("train", recipe, f"training.output_dir={whole}", *overrides)

    arguments = ["train", recipe, f"training.output_dir={killed}", *overrides]
    process = start(*arguments)
    while not (killed / "checkpoint-4").exists():
        assert process.poll() is None
        time.sleep(0.005)
    torchrun = psutil.Process(process.pid)
    for one in [torchrun, *torchrun.children(recursive=True)]:
        one.kill()
    process.communicate(timeout=300)
    assert not (killed / "training.json").exists()

    _, errors = run(*arguments)
    assert errors.count("training goes on from ") == 1
    assert losses(killed) == losses(whole)
    assert (killed / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    states = [torch.load(folder / "checkpoint-18/optimizer.pt")["state"] for folder in (killed, whole)]
    torch.testing.assert_close(*states, rtol=0, atol=0)


def test_resumed_with_another_number_of_processes(by_length, recipe, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(by_length[1], folder)
    (folder / "training.json").unlink()
    assert main(["train", str(recipe), f"training.output_dir={folder}", HALF]) == 2
    assert capsys.readouterr().err == (
        f"spade-ext: {folder}/checkpoint-18 was saved by 2 processes, expected 1 as now, or another "
        "training.output_dir to start anew\n"
    )


# What goes wrong


def test_a_failing_save_ends_all(recipe, tmp_path):
    (tmp_path / ".saving").write_text("in the way of the folder")
    _, errors = run("train", recipe, f"training.output_dir={tmp_path}", succeeds=False)
    (sentence,) = [line for line in errors.splitlines() if line.startswith("spade-ext: ")]
    assert sentence.startswith(f"spade-ext: {tmp_path}: the checkpoint of step 4 could not be saved (")
    assert "Connection closed" not in errors


@pytest.mark.parametrize("rank", [0, 1])
def test_another_process_waits_before_it_reports(monkeypatch, capsys, rank):
    waits = []
    monkeypatch.setattr(cli.time, "sleep", waits.append)
    monkeypatch.setenv("RANK", str(rank))
    assert main(["train", "no.yaml"]) == 2
    assert capsys.readouterr().err.startswith("spade-ext: no.yaml is not a file")
    assert len(waits) == rank


@pytest.mark.parametrize("rank", [0, 1])
def test_the_first_process_makes_the_data(recipe, tmp_path, monkeypatch, capsys, rank):
    monkeypatch.setenv("RANK", str(rank))
    for command in ("data", "info"):
        assert main([command, str(recipe), f"data.directory={tmp_path}"]) == 0
        assert (capsys.readouterr().out == "") == (rank == 1)
    assert bool(list(tmp_path.iterdir())) == (rank == 0)


# Every parameter gets a gradient, so that DistributedDataParallel has none to search for.

VARIANTS = [
    *({"ssm_kind": kind, "ssm_combine": combine} for kind, combine in itertools.product(
        ("s4", "s4d", "ema"), ("concat", "add", "stack")
    )),
    *({"position": position, "position_shared": shared} for position, shared in itertools.product(
        ("t5", "alibi", "simple", "rotary", None), (False, True)
    )),
    *({"causal": True, "window": (3, 0), "pooling": pooling} for pooling in ("mean", "first", "last")),
    {"ssm_lr": 0.0},
    {"ssm_layers": ()},
    {"ssm_layers": (0, 1), "prenorm": False, "final_norm": True},
    {"pad_token_id": None},
]  # fmt: skip


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_every_parameter_is_used(options):
    sizes = {"vocab_size": 16, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = SpadeConfig(**{**sizes, "intermediate_size": 32, "window": (3, 3), "ssm_d_state": 8, **options})
    model = SpadeForSequenceClassification(config)
    model(torch.randint(1, 16, (2, 20)), labels=torch.tensor([0, 1])).loss.backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


def test_unused_parameters_are_not_searched_for(recipe):
    assert Recipe.load(recipe).training_arguments().ddp_find_unused_parameters is False
    searched = Recipe.load(recipe, ["training.ddp_find_unused_parameters=true"])
    assert searched.training_arguments().ddp_find_unused_parameters is True
