"""In processes of their own: what the allocator is told cannot be taken back."""

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, torch, spade_ext
{call}
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.empty(2**24).fill_(1.0)  # 64 MB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
torch.set_num_threads(1)
for _ in range(10):
    last = faults()
print(last)
"""


def faults_of_a_large_tensor(call: str) -> int:
    command = [sys.executable, "-c", FAULTS.format(call=call)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_large_tensors_reuse_memory_only_when_told_to():
    huge_pages = 2**26 // 2**21  # the fewest faults that mapping it anew can take
    assert faults_of_a_large_tensor("assert spade_ext.keep_memory()") < huge_pages // 2
    assert faults_of_a_large_tensor("") >= huge_pages
