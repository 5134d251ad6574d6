"""What a user reads when the installation does not fit."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import spade_ext

ROOT = Path(__file__).resolve().parents[1]
TORCH = torch.__version__.split("+")[0]


def last_line_of_error(*command, **options) -> str:
    result = subprocess.run([sys.executable, *command], capture_output=True, text=True, **options)
    assert result.returncode != 0
    return result.stderr.splitlines()[-1]


def import_error(folder: Path, build: str | None) -> str:
    """Imports a copy of the package that has no modules but `_build`."""
    package = folder / "spade_ext"
    package.mkdir()
    (package / "__init__.py").write_text(Path(spade_ext.__file__).read_text())
    if build is not None:
        (package / "_build.py").write_text(build)
    return last_line_of_error("-c", "import spade_ext", cwd=folder)


def test_import_with_another_torch(tmp_path):
    error = import_error(tmp_path, 'TORCH_VERSION = "1.0.0"\n')
    assert error.startswith(f"ImportError: spade_ext was built with torch 1.0.0, but torch {TORCH} is installed: run `")


def test_import_without_a_build(tmp_path):
    error = import_error(tmp_path, None)
    assert error == "ImportError: spade_ext is not built: run `pip install .` in its checkout"


def build_error(folder: Path, **environment) -> str:
    command = ["setup.py", "-q", "build_ext", "--build-lib", folder / "lib", "--build-temp", folder / "temp"]
    return last_line_of_error(*command, cwd=ROOT, env=os.environ | environment)


def test_build_without_a_compiler(tmp_path):
    error = build_error(tmp_path, CXX="/does/not/exist")
    assert error == (
        "spade-ext: no /does/not/exist was found: install g++ 11 or newer, or name a C++20 compiler in CXX"
    )


@pytest.mark.parametrize("program", ["cmake", "ninja"])
def test_build_without_a_build_tool(tmp_path, program):
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in {"c++", "cmake", "ninja"} - {program}:
        (tools / name).symlink_to("/bin/true")
    assert build_error(tmp_path, PATH=str(tools), CXX="") == (
        f"spade-ext: no {program} was found: run `pip install {program}`"
    )


def test_build_information():
    info = spade_ext.build_info()
    assert info["version"] == spade_ext.__version__
    assert info["torch"] == TORCH
    assert info["parallel"] == "OpenMP"


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch was built with CUDA")
def test_cpu_build_of_torch_gives_cpu_kernels():
    """An nvcc on the machine changes nothing."""
    assert spade_ext.build_info()["kernels"] == "CPU"
    assert torch._C._dispatch_has_kernel_for_dispatch_key("spade_ext::long_conv", "CPU")
    assert not torch._C._dispatch_has_kernel_for_dispatch_key("spade_ext::long_conv", "CUDA")
