"""Which floating-point type a device computes in."""

import time
from functools import cache

import torch


def compute_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the hardware is fast at it, else float32 (emulated bfloat16 is many times slower)."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    return torch.bfloat16 if _cpu_is_fast_at_bfloat16() else torch.float32


@cache
def _cpu_is_fast_at_bfloat16() -> bool:
    """Whether it multiplies bfloat16 faster than float32, on one thread: Xeons whose tiles are hidden do not."""
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    seconds = {torch.bfloat16: [], torch.float32: []}  # by factors of two or more apart, so that noise decides nothing
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for _ in range(6):  # the first one of each warms up
        for dtype, taken in seconds.items():
            ones = torch.ones(512, 512, dtype=dtype)
            started = time.perf_counter()
            torch.mm(ones, ones)
            taken.append(time.perf_counter() - started)
    torch.set_num_threads(threads)
    return min(seconds[torch.bfloat16]) < min(seconds[torch.float32])
