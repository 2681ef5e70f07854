import platform
import subprocess
import sys

import pytest

from wfm_core.memory import keep_freed_memory

ASK = "from wfm_core.memory import keep_freed_memory; print(keep_freed_memory())"


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_glibc_takes_the_settings():
    """What that gains is for benchmarks/step_speed.py: how many pages a process faults on depends on its history."""
    run = subprocess.run([sys.executable, "-c", ASK], capture_output=True, text=True, check=True)
    assert run.stdout == "True\n"


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert keep_freed_memory() is False
