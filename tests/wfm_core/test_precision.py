import time

import pytest
import torch

from wfm_core import precision
from wfm_core.precision import compute_dtype


@pytest.mark.parametrize("slow", [torch.bfloat16, torch.float32])
def test_computes_in_whichever_type_this_cpu_multiplies_faster(slow, monkeypatch):
    def product(a, b):
        time.sleep(0.01 if a.dtype == slow else 0.001)

    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    monkeypatch.setattr(torch, "mm", product)
    precision._cpu_is_fast_at_bfloat16.cache_clear()
    chosen = compute_dtype(torch.device("cpu"))
    precision._cpu_is_fast_at_bfloat16.cache_clear()
    assert chosen != slow
