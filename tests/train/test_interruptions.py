"""Trainings that end early and go on from their checkpoints, bit for bit as if nothing had happened."""

import errno
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import time

import pytest
import torch

from spade_ext.cli import main
from spade_ext.train import Recipe, SpadeTrainer, checkpoint, train

# 15 batches an epoch make 8 steps, of which the last has one batch; 4.5 epochs. Steps of saves, evaluations and logs
# coincide at some places only.
RECIPE = """\
task: listops
data:
  directory: {folder}/data
  generate: {{train: 60, validation: 20, test: 10, min_length: 3, max_length: 30, workers: 1}}
model: {{hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2, intermediate_size: 32, window: [4, 4],
  ssm_d_state: 8, dropout: 0.1}}
training: {{output_dir: {folder}/run, max_steps: 36, per_device_train_batch_size: 4, gradient_accumulation_steps: 2,
  train_sampling_strategy: group_by_length, learning_rate: 1e-2, lr_scheduler_type: constant_with_warmup,
  warmup_steps: 5, weight_decay: 0.1, eval_strategy: steps, eval_steps: 6, logging_steps: 5, save_strategy: steps,
  save_steps: 4, save_total_limit: 2, metric_for_best_model: accuracy, report_to: none, use_cpu: true,
  disable_tqdm: true}}
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("interruptions")
    path = folder / "recipe.yaml"
    path.write_text(RECIPE.format(folder=folder))
    assert main(["data", str(path)]) == 0
    return path


@pytest.fixture(autouse=True)
def no_picture(monkeypatch):
    monkeypatch.setattr("spade_ext.train.run.plot_curves", lambda *args: None)


def outcome(run):
    """What a run ends with: its weights, its last checkpoint's optimizer and its history without durations."""
    history = json.loads((run / "training.json").read_text())["history"]
    entries = [
        {key: value for key, value in entry.items() if not key.endswith(("_runtime", "_per_second"))}
        for entry in history
        if "train_runtime" not in entry
    ]
    state = json.loads((run / "checkpoint-36/trainer_state.json").read_text())
    optimizer = torch.load(run / "checkpoint-36/optimizer.pt")["state"]
    return {
        "weights": (run / "model.safetensors").read_bytes(),
        "optimizer": [value.tolist() for moments in optimizer.values() for value in moments.values()],
        "history": entries,
        "best": (state["best_metric"], state["best_global_step"]),
    }


@pytest.fixture(scope="module")
def undisturbed(recipe):
    """The outcome of an uninterrupted training."""
    run = recipe.parent / "undisturbed"
    assert main(["train", str(recipe), f"training.output_dir={run}"]) == 0
    return outcome(run)


def train_until(recipe, run, step, *overrides):
    """Train in this process and break off in the middle of the step after `step`."""

    class Break(Exception):
        pass

    def training_step(self, *args, **kwargs):
        if self.state.global_step == step:
            raise Break
        return original(self, *args, **kwargs)

    original, SpadeTrainer.training_step = SpadeTrainer.training_step, training_step
    try:
        with pytest.raises(Break):
            train(Recipe.load(recipe, [f"training.output_dir={run}", *overrides]))
    finally:
        SpadeTrainer.training_step = original


@pytest.fixture(scope="module")
def interrupted(recipe):
    """The folder of a run that broke off at step 10, with checkpoints of steps 4 and 8."""
    run = recipe.parent / "interrupted"
    train_until(recipe, run, 10)
    return run


@pytest.fixture
def run(interrupted, tmp_path):
    return shutil.copytree(interrupted, tmp_path / "run")


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# Killed from outside. The children are forked from a server that has imported everything and done nothing else.

CHILD = """
import sys, torch
torch.set_num_threads(1)
sys.stdout = sys.stderr = open(log, "a", buffering=1)
exec(hook)
from spade_ext.cli import main
sys.exit(main(["train", recipe, f"training.output_dir={run}"]))
"""

# Makes `function` wait forever once `path` exists, and say so by the file `waits`.
WAIT = """
import importlib, os, time
module, _, name = {function!r}.rpartition(".")
module = importlib.import_module(module)
original = getattr(module, name)
def wait(*args, **kwargs):
    while os.path.exists({path!r}):
        open({waits!r}, "w").close()
        time.sleep(1)
    return original(*args, **kwargs)
setattr(module, name, wait)
"""


@pytest.fixture(scope="module")
def start(recipe):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["spade_ext.cli", "spade_ext.train", "accelerate.data_loader", "accelerate.optimizer"]
    )

    def start(run, hook=""):
        names = {"recipe": str(recipe), "run": str(run), "log": f"{run}.log", "hook": hook}
        process = context.Process(target=exec, args=(CHILD, names))
        process.start()
        return process

    return start


def wait_for(path, process):
    while not path.exists():
        assert process.is_alive(), f"ended with {process.exitcode}"
        time.sleep(0.005)


def finish(start, run):
    process = start(run)
    process.join()
    assert process.exitcode == 0, run.with_name(f"{run.name}.log").read_text()


@pytest.fixture(scope="module")
def duration(recipe, start):
    """Seconds that a training takes."""
    run = recipe.parent / "timed"
    process = start(run)
    wait_for(run / "recipe.yaml", process)
    begin = time.monotonic()
    process.join()
    return time.monotonic() - begin


@pytest.mark.parametrize("moment", range(10))
def test_killed_at_a_random_moment(start, duration, undisturbed, tmp_path, moment):
    delay = duration * random.uniform(0, 0.9)
    for attempt in range(5):  # a training that was faster than expected is killed earlier in its next attempt
        run = tmp_path / str(attempt)
        process = start(run)
        wait_for(run / "recipe.yaml", process)
        time.sleep(delay / 2**attempt)
        process.kill()
        process.join()
        if process.exitcode == -signal.SIGKILL:
            break
    assert process.exitcode == -signal.SIGKILL and not (run / "training.json").exists()
    finish(start, run)
    assert outcome(run) == undisturbed


@pytest.mark.parametrize(
    ("function", "place"),
    [
        ("torch.save", "checkpoint-8"),
        ("os.fsync", "checkpoint-8/recipe.yaml"),
        ("os.rename", "checkpoint-8/manifest.json"),
        ("shutil.rmtree", "pruned-checkpoint-4"),
    ],
)
def test_killed_during_a_save(start, undisturbed, tmp_path, function, place):
    run, waits = tmp_path / "run", tmp_path / "waits"
    path = run / checkpoint.STAGING / place
    process = start(run, WAIT.format(function=function, path=str(path), waits=str(waits)))
    wait_for(waits, process)
    process.kill()
    process.join()
    finish(start, run)
    assert outcome(run) == undisturbed
    log = (tmp_path / "run.log").read_text()
    pruning = place.startswith("pruned")
    assert ("checkpoint-8 was not saved to its end" in log) == (not pruning)
    assert f"training goes on from {run}/checkpoint-{12 if pruning else 4}\n" in log
    assert not (run / checkpoint.STAGING).exists()


# Broken off in this process


@pytest.mark.parametrize("step", [1, 9, 15, 35])
def test_broken_off(recipe, undisturbed, tmp_path, step):
    train_until(recipe, tmp_path, step)
    assert main(["train", str(recipe), f"training.output_dir={tmp_path}"]) == 0
    assert outcome(tmp_path) == undisturbed


def test_broken_off_again_and_again(recipe, undisturbed, tmp_path):
    for step in (6, 14, 33):
        train_until(recipe, tmp_path, step)
    assert main(["train", str(recipe), f"training.output_dir={tmp_path}"]) == 0
    assert outcome(tmp_path) == undisturbed
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == ["checkpoint-32", "checkpoint-36"]


STRATEGIES = {
    "random order": ["training.train_sampling_strategy=random"],
    "epochs": [f"training.{what}_strategy=epoch" for what in ("eval", "save", "logging")],
    "epochs end at saves": ["training.eval_strategy=epoch", "training.logging_strategy=epoch"],
    "best": ["training.save_strategy=best", "training.eval_steps=3"],
    "load best": ["training.eval_steps=4", "training.load_best_model_at_end=true"],
    "evaluated before": ["training.eval_on_start=true", "training.gradient_accumulation_steps=1"],
}


@pytest.mark.parametrize("overrides", STRATEGIES.values(), ids=STRATEGIES)
def test_strategies(recipe, tmp_path, overrides):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train(Recipe.load(recipe, [*overrides, f"training.output_dir={whole}"]))
    for step in (10, 26):
        train_until(recipe, broken, step, *overrides)
    train(Recipe.load(recipe, [*overrides, f"training.output_dir={broken}"]))
    results = []
    for folder in (whole, broken):
        metrics = json.loads((folder / "training.json").read_text())
        entries = [entry for entry in metrics["history"] if "train_runtime" not in entry]
        history = [{key: entry.get(key) for key in ("step", "loss", "eval_loss", "eval_accuracy")} for entry in entries]
        results.append(((folder / "model.safetensors").read_bytes(), history, metrics["eval_loss"], names(folder)))
    assert results[0] == results[1]


def fail_to_save_the_model(recipe, run, *overrides):
    """Train to the last checkpoint, and fail then."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(OSError, match="no more"):
        patch.setattr("spade_ext.train.run._save_model", fail)
        train(Recipe.load(recipe, [f"training.output_dir={run}", *overrides]))
    assert "checkpoint-36" in names(run) and "model.safetensors" not in names(run)


def fail(*args, **kwargs):
    raise OSError("no more")


def test_nothing_is_trained_after_the_last_step(recipe, undisturbed, tmp_path):
    fail_to_save_the_model(recipe, tmp_path)
    assert main(["train", str(recipe), f"training.output_dir={tmp_path}"]) == 0
    assert outcome(tmp_path) == undisturbed


# Damage


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = [
    ("model.safetensors", cut, "model.safetensors has {half:,} bytes, expected {size:,}"),
    ("optimizer.pt", flip_bit, "optimizer.pt is not what was written, by its checksum"),
    ("rng_state.pth", os.unlink, "rng_state.pth is missing"),
    ("manifest.json", cut, "manifest.json is not what was written"),
    ("manifest.json", os.unlink, "manifest.json is missing"),
]


@pytest.mark.parametrize(
    ("name", "damage", "words"), DAMAGES, ids=[f"{damage.__name__} {n}" for n, damage, _ in DAMAGES]
)
def test_a_damaged_checkpoint_is_left_aside(recipe, undisturbed, run, caplog, name, damage, words):
    size = (run / "checkpoint-8" / name).stat().st_size
    damage(run / "checkpoint-8" / name)
    words = words.format(size=size, half=size // 2)
    left = contents(run / "checkpoint-8")
    assert main(["train", str(recipe), f"training.output_dir={run}"]) == 0
    assert caplog.messages == [
        f"{run}/checkpoint-8 is not whole: {words}; it is left aside",
        f"training goes on from {run}/checkpoint-4",
    ]
    assert outcome(run) == undisturbed
    assert contents(run / "checkpoint-8.skipped") == left


def test_without_a_whole_checkpoint_training_starts_anew(recipe, undisturbed, run, caplog):
    for name in ("checkpoint-4", "checkpoint-8"):
        cut(run / name / "optimizer.pt")
    assert main(["train", str(recipe), f"training.output_dir={run}"]) == 0
    assert f"{run} holds no whole checkpoint, training starts from the beginning" in caplog.messages
    assert outcome(run) == undisturbed
    assert {"checkpoint-4.skipped", "checkpoint-8.skipped"} <= set(names(run))


@pytest.mark.parametrize(("damaged", "best"), [(False, 8), (True, 36)])
def test_the_best_checkpoint(recipe, tmp_path, caplog, monkeypatch, damaged, best):
    overrides = ["training.eval_steps=4", "training.load_best_model_at_end=true", f"training.output_dir={tmp_path}"]
    accuracies = iter([0.1, 0.5, 0.2, 0.1, 0.2, 0.3, 0.1, *(0.2, 0.3), 0.0])  # of steps 4, 8, ... 28; 32, 36; the end
    monkeypatch.setattr("spade_ext.train.run.accuracy", lambda prediction: {"accuracy": next(accuracies)})
    train_until(recipe, tmp_path, 30, *overrides)
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == ["checkpoint-8", "checkpoint-28"]
    if damaged:
        (tmp_path / "checkpoint-8/model.safetensors").unlink()
    assert main(["train", str(recipe), *overrides]) == 0
    sentence = (
        f"{tmp_path}/checkpoint-8, the best so far, is not whole: model.safetensors is missing; the best after it "
        "takes its place"
    )
    assert (sentence in caplog.messages) == damaged
    kept = tmp_path / f"checkpoint-{best}/model.safetensors"
    assert (tmp_path / "model.safetensors").read_bytes() == kept.read_bytes()


# Full disk


@pytest.mark.parametrize(
    ("function", "error"),
    [
        ("torch.save", OSError(errno.ENOSPC, "No space left on device")),
        ("torch.save", RuntimeError("PytorchStreamWriter failed writing file data/3: file write failed")),
        ("os.fsync", OSError(errno.ENOSPC, "No space left on device")),
    ],
)
def test_a_save_fails(recipe, undisturbed, tmp_path, capsys, monkeypatch, function, error):
    module, name = {"torch.save": (torch, "save"), "os.fsync": (os, "fsync")}[function]
    original = getattr(module, name)

    def fail(*args, **kwargs):
        if (tmp_path / checkpoint.STAGING / "checkpoint-8").exists():
            raise error
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(module, name, fail)
        assert main(["train", str(recipe), f"training.output_dir={tmp_path}"]) == 2
    message = capsys.readouterr().err
    reason = getattr(error, "strerror", None) or str(error)
    assert message.startswith(f"spade-ext: {tmp_path}: the checkpoint of step 8 could not be saved ({reason}; ")
    assert message.count("\n") == 1
    assert checkpoint.newest_whole(tmp_path) == (tmp_path / "checkpoint-4", [])
    assert main(["train", str(recipe), f"training.output_dir={tmp_path}"]) == 0
    assert outcome(tmp_path) == undisturbed


@pytest.mark.parametrize("checkpoints", [1.3, 1.7, 2.2, 2.7])
def test_a_full_disk(recipe, interrupted, undisturbed, tmp_path, capsys, checkpoints):
    """A disk with room for so many checkpoints, of which a run keeps two and saves a third."""
    disk = tmp_path / "disk"
    disk.mkdir()
    blocks = sum(-(-path.stat().st_size // 4096) for path in (interrupted / "checkpoint-8").iterdir())
    size = int(4 * blocks * checkpoints)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("only root can mount a small disk")
    try:
        run = disk / "run"
        arguments = ["train", str(recipe), f"training.output_dir={run}"]
        assert main(arguments) == 2
        message = capsys.readouterr().err
        assert message.startswith(f"spade-ext: {run}: the checkpoint of step ") and message.count("\n") == 1
        before = contents(run)
        whole, problems = checkpoint.newest_whole(run)
        assert whole and not problems
        assert main(arguments) == 2
        assert contents(run) == before
        subprocess.run(["mount", "-o", "remount,size=10m", disk], check=True)
        assert main(arguments) == 0
        assert outcome(run) == undisturbed
    finally:
        subprocess.run(["umount", disk], check=True)


# Other recipes, other checkpoints


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.hidden_size=32", "model.hidden_size is 32 instead of 16 in {checkpoint}, expected the same"),
        ("model.ssm_lr=1e-3", "model.ssm_lr is 0.001 instead of None in {checkpoint}, expected the same"),
        ("data.max_length=20", "data.max_length is 20 instead of 2000 in {checkpoint}, expected the same"),
        ("training.learning_rate=1", "training.learning_rate is 1 instead of 0.01 in {checkpoint}, expected the same"),
        ("training.seed=1", "training.seed is 1 instead of 42 in {checkpoint}, expected the same"),
    ],
)
def test_another_recipe_is_refused(recipe, run, capsys, override, message):
    before = contents(run)
    assert main(["train", str(recipe), f"training.output_dir={run}", override]) == 2
    error = capsys.readouterr().err
    expected = message.format(checkpoint=run / "checkpoint-8")
    assert error == f"spade-ext: {expected}, or another training.output_dir to start anew\n"
    assert contents(run) == before


def test_length_and_reports_may_change(recipe, run, caplog):
    changes = ["training.max_steps=12", "training.eval_steps=3", "model.causal=false"]
    assert main(["train", str(recipe), f"training.output_dir={run}", *changes]) == 0
    assert "training.max_steps is 12 instead of 36; training.eval_steps is 3 instead of 6" in caplog.text
    history = json.loads((run / "training.json").read_text())["history"]
    assert [entry["step"] for entry in history if "eval_loss" in entry] == [6, 9, 12]


def test_from_an_earlier_checkpoint(recipe, undisturbed, run, caplog):
    later = contents(run / "checkpoint-8")
    arguments = ["train", str(recipe), f"training.output_dir={run}"]
    assert main([*arguments, f"training.resume_from_checkpoint={run}/checkpoint-4"]) == 0
    assert outcome(run) == undisturbed
    assert contents(run / "checkpoint-8.skipped") == later


def test_a_given_checkpoint_must_be_whole(recipe, run, capsys):
    (run / "checkpoint-8/optimizer.pt").unlink()
    given = f"training.resume_from_checkpoint={run}/checkpoint-8"
    assert main(["train", str(recipe), f"training.output_dir={run}", given]) == 2
    assert capsys.readouterr().err == (
        f"spade-ext: training.resume_from_checkpoint is {run}/checkpoint-8, expected a whole checkpoint, but "
        "optimizer.pt is missing\n"
    )


def test_a_checkpoint_of_a_model_only_is_refused(recipe, tmp_path, capsys):
    train_until(recipe, tmp_path, 5, "training.save_only_model=true")
    assert main(["train", str(recipe), f"training.output_dir={tmp_path}"]) == 2
    assert capsys.readouterr().err == (
        f"spade-ext: {tmp_path}/checkpoint-4 holds a model only, expected one saved with "
        "training.save_only_model=false\n"
    )


def test_a_moved_run_keeps_its_best(recipe, tmp_path, monkeypatch):
    overrides = ["training.eval_steps=4", "training.load_best_model_at_end=true", "training.save_total_limit=1"]
    accuracies = iter([0.1, 0.5, *[0.2] * 9])
    monkeypatch.setattr("spade_ext.train.run.accuracy", lambda prediction: {"accuracy": next(accuracies)})
    before, moved = tmp_path / "before", tmp_path / "moved"
    fail_to_save_the_model(recipe, before, *overrides)
    before.rename(moved)
    train(Recipe.load(recipe, [*overrides, f"training.output_dir={moved}"]))
    assert [path.name for path in checkpoint.checkpoints(moved)] == ["checkpoint-8", "checkpoint-36"]
    assert (moved / "model.safetensors").read_bytes() == (moved / "checkpoint-8/model.safetensors").read_bytes()


# Pruning


@pytest.mark.parametrize(
    ("limit", "best", "kept"),
    [
        (None, None, [1, 2, 3, 10]),
        (0, None, [1, 2, 3, 10]),
        (1, None, [10]),
        (1, 2, [2, 10]),
        (3, 1, [1, 3, 10]),
        (3, 7, [2, 3, 10]),
        (9, None, [1, 2, 3, 10]),
    ],
)
def test_prune(tmp_path, limit, best, kept):
    for step in (1, 2, 3, 10):
        staged = tmp_path / checkpoint.STAGING / f"checkpoint-{step}"
        staged.mkdir(parents=True)
        (staged / "weights").write_text("w")
        checkpoint.publish(staged)
    (tmp_path / "checkpoint-5").mkdir()  # not whole: neither counted nor deleted
    checkpoint.prune(tmp_path, limit, best and tmp_path / f"checkpoint-{best}")
    assert names(tmp_path) == sorted(["checkpoint-5", *(f"checkpoint-{step}" for step in kept)])


def test_folders_in_a_checkpoint(tmp_path):
    staged = tmp_path / checkpoint.STAGING / "checkpoint-1"
    (staged / "shards/deep").mkdir(parents=True)
    (staged / "shards/deep/0").write_text("w")
    checkpoint.publish(staged)
    assert checkpoint.find_damage(tmp_path / "checkpoint-1") is None
    (tmp_path / "checkpoint-1/shards/deep/0").unlink()
    assert checkpoint.find_damage(tmp_path / "checkpoint-1") == "shards/deep/0 is missing"


def test_set_aside_overwrites_nothing(tmp_path):
    for _ in range(3):
        (tmp_path / "checkpoint-7").mkdir()
        checkpoint.set_aside(tmp_path, 6)
    (tmp_path / "checkpoint-6").mkdir()
    checkpoint.set_aside(tmp_path, 6)
    assert names(tmp_path) == [
        "checkpoint-6",
        "checkpoint-7.skipped",
        "checkpoint-7.skipped-2",
        "checkpoint-7.skipped-3",
    ]
