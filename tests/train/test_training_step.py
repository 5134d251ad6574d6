"""The benchmark of a whole training step runs and accounts for all of its time."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("memory", ["--keep-memory", "--no-keep-memory"])
def test_shares(tmp_path, memory):
    arguments = ["recipes/quickstart/listops.yaml", f"data.directory={tmp_path}", "--quick", memory]
    command = [sys.executable, "benchmarks/training_step.py", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    output = subprocess.run(command, cwd=ROOT, check=True, env=environment, capture_output=True, text=True).stdout
    assert "2 sequences of 100 tokens, blank" in output
    assert f"memory: {'not ' if memory.startswith('--no') else ''}kept" in output
    phases = re.findall(r"^\| (forward|backward|optimizer) \| .* \| ([\d.]+)% \|$", output, re.MULTILINE)
    kinds = re.findall(r"^\| (GEMM|attention|SSM|optimizer|rest) \| ([\d.]+)% \|$", output, re.MULTILINE)
    for rows, count in ((phases, 3), (kinds, 5)):
        shares = [float(share) for _, share in rows]
        assert len(shares) == count and all(share > 0 for share in shares)
        assert sum(shares) == pytest.approx(100, abs=1)
