"""What is compiled for newer CPUs must not reach older ones."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / f"{sys.implementation.cache_tag}-torch-{torch.__version__}"
OBJECTS = sorted(BUILD.glob("CMakeFiles/level_*.dir/**/*.o"))


@pytest.mark.skipif(not OBJECTS, reason="the package was not built in this checkout")
@pytest.mark.skipif(shutil.which("nm") is None, reason="nm is not installed")
def test_level_objects_share_no_functions():
    """The linker keeps one of several weak symbols of a name, perhaps that of a level this CPU does not have."""
    for path in OBJECTS:
        level = path.relative_to(BUILD).parts[1].removeprefix("level_").removesuffix(".dir")
        symbols = subprocess.run(["nm", "--defined-only", path], capture_output=True, text=True, check=True).stdout
        names = [line.split()[-1] for line in symbols.splitlines()]
        assert any(f"{level}" in name and "row_products_float" in name for name in names)
        shared = [line for line in symbols.splitlines() if line.split()[-2] in "WVu"]
        assert all(level in line for line in shared), f"{path.name}: {shared}"
