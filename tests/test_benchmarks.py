"""The scripts of benchmarks/ that the README does not name; those that it names are run by test_readme.py."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

COMPARE = Path(__file__).parents[1] / "benchmarks" / "compare_runs.py"


def write_run(folder, accuracies, test_accuracy):
    folder.mkdir()
    history = [{"step": 10 * step, "eval_accuracy": value} for step, value in enumerate(accuracies)]
    (folder / "training.json").write_text(json.dumps({"parameters": 1234, "history": [{"loss": 1.0}, *history]}))
    metrics = {"test_accuracy": test_accuracy, "baselines": {"majority class": 0.155}}
    (folder / "test_metrics.json").write_text(json.dumps(metrics))


def compare(picture, *folders):
    return subprocess.run([sys.executable, COMPARE, picture, *folders], capture_output=True, text=True)


def test_runs_are_compared(tmp_path):
    write_run(tmp_path / "spade-0", [0.1, 0.5], 0.6)
    write_run(tmp_path / "spade-1", [0.2, 0.4], 0.62)
    write_run(tmp_path / "window-only-0", [0.1, 0.2], 0.3)
    picture = tmp_path / "curves.png"
    run = compare(picture, tmp_path / "window-only-0", tmp_path / "spade-1", tmp_path / "spade-0")
    assert run.stdout.splitlines()[2:] == [
        "| spade | 1,234 | 60.0, 62.0 | 61.0 | 1.4 |",
        "| window-only | 1,234 | 30.0 | 30.0 |  |",
        "| majority class | 0 | | 15.5 | |",
    ]
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", ["training.json", "test_metrics.json"])
def test_an_unfinished_run_is_refused(tmp_path, name):
    write_run(tmp_path / "spade-0", [0.1], 0.6)
    (tmp_path / "spade-0" / name).unlink()
    run = compare(tmp_path / "curves.png", tmp_path / "spade-0")
    assert run.returncode == 1 and not (tmp_path / "curves.png").exists()
    assert run.stderr.startswith(f"{tmp_path / 'spade-0' / name} is missing, expected a run that")
