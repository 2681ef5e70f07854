"""Presets and costs against counted parameters, counted multiplications and what the backward pass really keeps."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from wfm_core.models.transformer import Transformer
from wfm_core.models.transformer_config import PRESETS, TransformerConfig, count_parameters, training_cost

SIZES = {
    "levels": (5, 3), "groups": 2, "grid": (3, 2), "num_cameras": 2, "width": 32, "head_dim": 8, "num_layers": 2,
    "num_heads": 4, "num_kv_heads": 2, "ffn_dim": 48, "window": 3,
}  # fmt: skip
VARIANTS = [
    {},
    {"factorised": False, "parallel": 0.0, "decoding": "raster"},
    {"num_draft_heads": 2, "text_dim": 10},
]
CLASSES = {
    "nano": 7e6, "small": 38e6, "base": 200e6, "1b": 1e9, "4b": 4e9, "5b": 5e9, "12b": 12e9, "13b": 13e9,
}  # fmt: skip


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_size_of_their_class(name):
    with torch.device("meta"):
        model = Transformer(PRESETS[name])
    total = sum(parameter.numel() for parameter in model.parameters())
    assert total == count_parameters(PRESETS[name])
    assert total == pytest.approx(CLASSES[name], rel=0.1)


def test_the_large_presets_follow_the_paper():
    for name, width, layers in (("4b", 4096, 16), ("12b", 5120, 40)):
        config = PRESETS[name]
        assert (config.width, config.num_layers, config.num_heads, config.head_dim) == (width, layers, 32, 128)
        assert (config.ffn_dim, config.num_words, config.num_parts, config.frame_tokens) == (14336, 64_000, 1, 2560)
    assert PRESETS["5b"].text_dim == PRESETS["13b"].text_dim == 1024


@pytest.mark.parametrize("changes", VARIANTS)
def test_parameters_are_counted(changes):
    config = TransformerConfig(**SIZES | changes)
    assert count_parameters(config) == sum(p.numel() for p in Transformer(config).parameters())
    assert training_cost(config, num_frames=3).parameters == count_parameters(config)


def training_batch(config: TransformerConfig, batch: int, time: int, text_words: int) -> dict[str, torch.Tensor]:
    cells = config.frame_tokens // config.groups
    data = {"tokens": torch.zeros(batch, time, cells, len(config.cell_levels), dtype=torch.uint8)}
    data |= {"action": torch.zeros(batch, time, 7), "seed": torch.tensor(0)}
    return data | ({"text": torch.ones(batch, text_words, config.text_dim)} if text_words else {})


@pytest.mark.parametrize("changes", VARIANTS)
def test_multiplications_are_counted(changes):
    config = TransformerConfig(**SIZES | changes)
    text_words = 3 if config.text_dim else 0
    with FlopCounterMode(display=False) as counter:
        Transformer(config)(training_batch(config, 1, 4, text_words))
    cost = training_cost(config, num_frames=4, text_words=text_words)
    assert counter.get_total_flops() == pytest.approx(3 * cost.frame_flops)
    assert cost.frame_flops == pytest.approx(config.frame_tokens * cost.token_flops)


@pytest.mark.parametrize("changes", VARIANTS)
def test_activations_are_about_what_the_backward_pass_keeps(changes):
    config = TransformerConfig(**SIZES | changes)
    model, text_words = Transformer(config), 3 if config.text_dim else 0
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        if x.untyped_storage().data_ptr() not in weights:
            kept[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        loss, _ = model(training_batch(config, 2, 4, text_words))
    total = sum(x.untyped_storage().nbytes() for x in kept.values())
    cost = training_cost(config, num_frames=4, batch_size=2, text_words=text_words, activation_width=4, fused=False)
    assert loss.requires_grad and cost.activation_bytes == pytest.approx(total, rel=0.25)
    fused = training_cost(config, num_frames=4, batch_size=2, text_words=text_words, activation_width=4)
    assert fused.activation_bytes < cost.activation_bytes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 3}, "multiple of num_kv_heads, got 3, 2"),
        ({"num_draft_heads": 24}, r"lie in \[0, 24\), got 24"),
        ({"parallel": 1.0}, r"parallel must lie in \[0, 1\), got 1.0"),
        ({"decoding": "beam"}, "one of .*got 'beam'"),
        ({"decoding": "speculative"}, "needs num_draft_heads above 0, got 0"),
        ({"parallel": 0.0}, "above 0, got 0"),
        ({"text_encoder": "bytes"}, "'bytes' needs its features' size as text_dim, got 0"),
        ({"levels": (8,) * 7, "factorised": False}, "make 2097152 words, above 1048576: set factorised=true"),
        ({"top_p": 0.0}, r"top_p must lie in \(0, 1\], got 0"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        TransformerConfig(**SIZES | changes)
