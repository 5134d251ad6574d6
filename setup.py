"""Drives CMake, the one description of the build; what can be declared stands in pyproject.toml.

CMAKE_ARGS in the environment is passed on, for example CMAKE_ARGS=-DSPADE_EXT_TESTS=ON.
"""

import importlib.metadata
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


def torch_version() -> str:
    """With its local part, such as 2.13.0+cpu."""
    try:
        return importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        sys.exit(
            "spade-ext: torch is not installed: run `pip install torch==2.13.0`, or build without --no-build-isolation"
        )


def find_program(name: str, *, install: str) -> str:
    return shutil.which(name) or sys.exit(f"spade-ext: no {name} was found: {install}")


class CMakeBuild(build_ext):
    # One folder a torch: what was compiled for one must not be linked for another.
    build_folder = ROOT / "build" / f"{sys.implementation.cache_tag}-torch-{torch_version()}"

    def build_extension(self, ext: Extension) -> None:
        find_program(
            shlex.split(os.environ.get("CXX") or "c++")[0],
            install="install g++ 11 or newer, or name a C++20 compiler in CXX",
        )
        include = sysconfig.get_path("include")
        if not Path(include, "Python.h").is_file():
            sys.exit(f"spade-ext: no Python.h was found in {include}: install Python's headers (python3-dev)")
        self.cmake = find_program("cmake", install="run `pip install cmake`")
        ninja = find_program("ninja", install="run `pip install ninja`")
        configure = [self.cmake, "-S", ROOT, "-B", self.build_folder, "-G", "Ninja"]
        # The cache keeps the path of a ninja that pip has deleted with its build environment: say it each time.
        configure += [f"-DPython_EXECUTABLE={sys.executable}", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        subprocess.run([*configure, *shlex.split(os.environ.get("CMAKE_ARGS", ""))], check=True)
        subprocess.run([self.cmake, "--build", self.build_folder], check=True)
        self.install_into(Path(self.get_ext_fullpath(ext.name)).parent)

    def copy_extensions_to_source(self) -> None:
        """An editable install keeps what CMake built beside the Python files."""
        self.install_into(ROOT / "python" / "spade_ext")

    def install_into(self, folder: Path) -> None:
        (folder / "_build.py").unlink(missing_ok=True)  # CMake takes one of the same second for its own
        install = [self.cmake, "--install", self.build_folder, "--component", "python", "--prefix", folder.resolve()]
        subprocess.run(install, check=True)


setup(
    ext_modules=[Extension("spade_ext._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
    install_requires=[f"torch=={torch_version().split('+')[0]}"],
)
