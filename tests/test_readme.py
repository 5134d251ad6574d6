"""The README's code and commands run."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from spade_ext.cli import main

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
COMMANDS = [
    shlex.split(line, comments=True)
    for block in re.findall(r"^```sh\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    for line in block.splitlines()
]
SMALL = {
    "data": ["data.generate={train: 50, validation: 10, test: 10, min_length: 3, max_length: 30, workers: 1}"],
    "train": ["training.max_steps=2", "training.use_cpu=true", "training.disable_tqdm=true"],
    "evaluate": [],
    "info": [],
}


def commands(*prefix: str) -> list[list[str]]:
    return [command for command in COMMANDS if tuple(command[: len(prefix)]) == prefix]


def test_every_command_is_of_a_kind_that_is_tested():
    assert {command[0] for command in COMMANDS} == {"make", "pip", "python", "spade-ext", "torchrun"}


@pytest.mark.parametrize("code", re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL))
def test_python(code):
    exec(code, {})


@pytest.mark.parametrize("command", commands("make"), ids=" ".join)
def test_make_target_exists(command):
    subprocess.run([*command, "--dry-run"], cwd=ROOT, check=True, capture_output=True)


@pytest.mark.parametrize("command", commands("pip"), ids=" ".join)
def test_pip_installs_what_the_project_declares(command):
    """A requirement of the build, or an extra of the project."""
    declared = (ROOT / "pyproject.toml").read_text()
    names = [word for word in command[2:] if not word.startswith("--")]
    assert names
    for name in names:
        extra = re.fullmatch(r"\.\[(\w+)\]", name)
        assert f"\n{extra[1]} = [" in declared if extra else f'"{name}"' in declared, name


@pytest.mark.parametrize("command", commands("python"), ids=" ".join)
def test_benchmark(command):
    subprocess.run(
        [sys.executable, *command[1:], "--quick"], cwd=ROOT, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )


def test_spade_ext(tmp_path, monkeypatch):
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    monkeypatch.chdir(tmp_path)
    assert commands("torchrun")[0][:5] == ["torchrun", "--standalone", "--nproc-per-node", "2", "--no-python"]
    for _, name, *arguments in [*commands("spade-ext"), *(command[5:] for command in commands("torchrun"))]:
        assert main([name, *arguments, *SMALL[name]]) == 0


@pytest.mark.parametrize("path", re.findall(r"\]\(([^)#:]+)\)", README))
def test_link(path):
    assert (ROOT / path).exists()
