import platform
import subprocess
import sys

import pytest

from wfm_core.memory import keep_freed_memory

PAGE_FAULTS = """
import resource, sys
import torch
from wfm_core.memory import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
torch.set_num_threads(1)
x = torch.ones(12 << 20)
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        y = x * 2
        del y
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_freed_memory_is_used_again():
    """48 MB, more than glibc ever keeps by itself, made and freed 5 times: 60,000 pages when all are new."""

    def page_faults(how: str) -> int:
        run = subprocess.run([sys.executable, "-c", PAGE_FAULTS, how], capture_output=True, text=True, check=True)
        return int(run.stdout)

    assert page_faults("give back") > 50  # fewer than 60,000 where pages are large
    assert page_faults("keep") < 25


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert keep_freed_memory() is False
