from dataclasses import replace

import pytest
import torch

from wfm_core.models.autoregressive import AutoregressiveConfig
from wfm_core.models.revealing import AutoregressiveModel
from wfm_core.models.transformer import Transformer
from wfm_core.models.transformer_config import PRESETS, TransformerConfig
from wfm_core.train import TrainConfig
from worldsim.training_cost import describe, training_figures

SMALL = TransformerConfig(
    levels=(5, 4, 3), groups=1, grid=(2, 2), width=64, head_dim=8, num_layers=2, num_heads=8, num_kv_heads=8,
    ffn_dim=16, window=3, parallel=0.0, decoding="raster",
)  # fmt: skip
LOOP = TrainConfig(bf16=False, accumulate=3)
SIZES = {"batch_size": 16, "clip_length": 4, "fused": False}


def test_figures_by_hand():
    figures = training_figures(Transformer(SMALL), LOOP, **SIZES)
    attention = 4 * 64 * 64  # query, key, value and out: large enough for Muon
    block = attention + 3 * 64 * 16 + 2 * 64 + 2 * 8  # the gated network and four norms
    action = 7 * 64 + 64 + 64 * 64 + 64
    rest = (5 + 4 + 3 + 3) * 64 + 2 * 64 + action + 64 + 60 * 64 + 64 + 15 * 64  # 3 dimensions of 5 words each
    total = 2 * block + rest
    assert figures["parameters"] == total == 49_888
    assert figures["weights"] == figures["gradients"] == figures["average"] == 4 * total
    assert figures["optimizer"] == 4 * (2 * (total - 2 * attention) + 2 * attention)  # Muon keeps one moment only
    length, scored = 4 * 5, 3 * 4  # slots of a clip, tokens that are predicted
    pairs = (1 + 2 + 3 + 4) * 5**2  # each frame's queries, and the keys of it and of those before it
    forward = 2 * (2 * length * (attention + 3 * 64 * 16) + 4 * pairs * 64)
    forward += 2 * length * 60 * 64 + 2 * (length + scored) * 64 * 15 + 2 * 3 * (7 * 64 + 64 * 64)  # words in and out
    assert figures["flops"] == pytest.approx(3 * forward * 16 * 3)
    kept = length * (4 * 64 + 3 * 64 + 4 * 64 + 4 * 16) + 8 * pairs
    assert figures["activations"] == 16 * 4 * (2 * kept + 2 * scored * 15)
    half = training_figures(Transformer(SMALL), replace(LOOP, bf16=True), **SIZES)
    assert half["activations"] == figures["activations"] / 2 and half["weights"] == figures["weights"]
    fused = training_figures(Transformer(SMALL), LOOP, **SIZES | {"fused": True})
    assert figures["activations"] - fused["activations"] == 16 * 4 * 2 * 8 * pairs


def test_the_largest_preset_takes_no_memory_to_look_at():
    with torch.device("meta"):
        model = Transformer(PRESETS["12b"])
    figures = training_figures(model, TrainConfig(), batch_size=1, clip_length=3, fused=True)
    assert figures["parameters"] == pytest.approx(12e9, rel=0.05)
    first, memory, flops = describe(figures).splitlines()
    assert first == f"{figures['parameters']:,} parameters"
    weights = figures["weights"] / 2**30
    assert f"weights {weights:.2f}, gradients {weights:.2f}, optimizer " in memory
    in_all = sum(size for name, size in figures.items() if name not in ("parameters", "flops")) / 2**30
    assert f"{in_all:.2f} in all" in memory and flops.startswith(f"{figures['flops']:.3g} ")


def test_text_costs_and_other_families_are_counted_as_far_as_they_go():
    reading = replace(SMALL, text_dim=256, text_encoder="bytes")
    more, less = (training_figures(Transformer(config), LOOP, **SIZES) for config in (reading, SMALL))
    assert all(more[name] > less[name] for name in ("parameters", "activations", "flops"))
    model = AutoregressiveModel(AutoregressiveConfig(width=64))
    figures = training_figures(model, LOOP, **SIZES)
    assert figures["parameters"] == sum(p.numel() for p in model.parameters())
    assert "estimated for dynamics.kind=transformer and diffusion only" in describe(figures)
