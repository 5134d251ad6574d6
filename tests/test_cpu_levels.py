"""The library runs on any x86-64, and gives the same on each but for rounding."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from spade_ext import ops

from . import smoke
from .ops import sample_inputs

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / f"{sys.implementation.cache_tag}-torch-{torch.__version__}"
OBJECTS = sorted(BUILD.glob("CMakeFiles/level_*.dir/**/*.o"))
PUBLIC_OPS = [name for name in ops.__all__ if not name.endswith("_ref")]
LEVELS = ["DEFAULT", "AVX2", "AVX512"]
QEMU = shutil.which("qemu-x86_64")


@pytest.mark.skipif(not OBJECTS, reason="the package was not built in this checkout")
@pytest.mark.skipif(shutil.which("nm") is None, reason="nm is not installed")
def test_level_objects_share_no_functions():
    """The linker keeps one of several weak symbols of a name, perhaps that of a level this CPU does not have."""
    for path in OBJECTS:
        level = path.relative_to(BUILD).parts[1].removeprefix("level_").removesuffix(".dir")
        symbols = subprocess.run(["nm", "--defined-only", path], capture_output=True, text=True, check=True).stdout
        names = [line.split()[-1] for line in symbols.splitlines()]
        table = path.name.removesuffix("_level.cpp.o")
        assert any(level in name and table in name for name in names), f"{path.name} has no table {table}"
        shared = [line for line in symbols.splitlines() if line.split()[-2] in "WVu"]
        assert all(level in line for line in shared), f"{path.name}: {shared}"


@pytest.fixture(scope="module")
def calls(tmp_path_factory):
    """A file of calls of every op, in float32 and float64, and what they give here."""
    calls = []
    for op in PUBLIC_OPS:
        samples = getattr(sample_inputs, f"{op}_samples")()
        for dtype in (torch.float32, torch.float64):
            typed = [sample.to(dtype) for sample in samples]
            calls += [(op, sample.args, sample.kwargs) for sample in typed]
    path = tmp_path_factory.mktemp("smoke") / "calls"
    torch.save(calls, path)
    return path, [smoke.run(*call) for call in torch.load(path)]


def check_smoke(calls, command, environment, level):
    path, expected = calls
    results = path.with_name("results")
    command = [*command, sys.executable, smoke.__file__, path, results]
    printed = subprocess.run(
        command, env=os.environ | environment, check=True, stdout=subprocess.PIPE, text=True
    ).stdout
    assert printed.strip() == level
    for actual, wanted in zip(torch.load(results), expected, strict=True):
        # Some gradients are zero but for rounding: errors are relative to the largest number of a call.
        scale = max((w.abs().max().item() for w in wanted if w.is_floating_point() and w.numel()), default=0)
        for a, w in zip(actual, wanted, strict=True):
            tolerance = 1e-5 if w.dtype == torch.float32 else 1e-11
            torch.testing.assert_close(a, w, rtol=0, atol=scale * tolerance)


@pytest.mark.parametrize("level", LEVELS)
def test_level_that_the_environment_names(level, calls):
    native = LEVELS.index(torch.backends.cpu.get_cpu_capability())
    if LEVELS.index(level) > native:
        pytest.skip(f"this CPU has {LEVELS[native]} only")
    check_smoke(calls, [], {"ATEN_CPU_CAPABILITY": level.lower()}, level)


@pytest.mark.skipif(QEMU is None, reason="qemu-x86_64 (Debian's qemu-user) is not installed")
@pytest.mark.parametrize(("cpu", "level"), [("Nehalem", "DEFAULT"), ("Haswell", "AVX2"), ("max", "AVX2")])
def test_emulated_cpu(cpu, level, calls):
    check_smoke(calls, [QEMU, "-cpu", cpu], {}, level)
