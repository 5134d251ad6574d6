"""One word names a family of ops everywhere: its folder, files, ops and row in the README."""

import inspect
import re
from collections import Counter
from pathlib import Path

import pytest
import torch

import spade_ext
from spade_ext import ops

ROOT = Path(__file__).resolve().parents[1]
FAMILIES = sorted(
    p.name for p in (ROOT / "spade_ext").iterdir() if p.is_dir() and p.name not in ("core", "__pycache__")
)
PUBLIC_OPS = [name for name in ops.__all__ if not name.endswith("_ref")]
REGISTERED_OPS = sorted(
    name.removeprefix("spade_ext::").split(".")[0]
    for name in torch._C._dispatch_get_all_op_names()
    if name.startswith("spade_ext::")
)


def family_of(op: str) -> str:
    """The family whose op, or whose op's forward or backward, has this name."""
    pattern = rf"({'|'.join(FAMILIES)})(_kernel|_scan|_state|_step)?(_forward|_backward)?"
    match = re.fullmatch(pattern, op)
    assert match, f"{op} is not named after one of {FAMILIES}"
    return match[1]


def test_families_are_found():
    assert {"diagonal", "local_attention", "long_conv"} <= set(FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "path",
    [
        "spade_ext/{family}/README.md",
        "spade_ext/{family}/{family}.h",
        "spade_ext/{family}/{family}.cpp",
        "python/spade_ext/ops/{family}.py",
        "tests/ops/test_{family}.py",
        "benchmarks/{family}.py",
    ],
)
def test_family_has_file(path, family):
    assert (ROOT / path.format(family=family)).is_file()


@pytest.mark.parametrize("family", FAMILIES)
def test_readme_has_a_row(family):
    assert re.search(rf"^\|.*\b{family}.*\|", (ROOT / "README.md").read_text(), re.MULTILINE)


def test_every_family_has_an_op_and_every_op_a_family():
    assert {family_of(op) for op in REGISTERED_OPS} == set(FAMILIES)


@pytest.mark.parametrize("op", PUBLIC_OPS)
def test_public_op(op):
    """It is registered, defined in its family's file, and followed by a reference of the same signature."""
    assert op in REGISTERED_OPS
    function, reference = getattr(ops, op), getattr(ops, f"{op}_ref")
    assert function.__module__ == reference.__module__ == f"spade_ext.ops.{family_of(op)}"
    assert inspect.signature(function) == inspect.signature(reference)


def test_every_registered_op_is_public_or_inner():
    inner = {f"{op}{suffix}" for op in PUBLIC_OPS for suffix in ("_forward", "_backward")}
    assert set(REGISTERED_OPS) <= inner | set(PUBLIC_OPS)


def test_every_source_is_listed_once():
    listed = Counter(re.findall(r"spade_ext/[\w/]+\.cpp", (ROOT / "CMakeLists.txt").read_text()))
    sources = {str(p.relative_to(ROOT)) for p in (ROOT / "spade_ext").rglob("*.cpp")}
    assert listed == dict.fromkeys(sources, 1)


def test_package_is_not_the_folder_of_cpp_files():
    """Without the installed package, `import spade_ext` at the root of the checkout finds a namespace package."""
    assert spade_ext.__file__ is not None
