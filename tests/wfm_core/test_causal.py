"""Layers that look back: against the whole clip, against what comes later, and against plain torch."""

import pytest
import torch
from torch.nn import functional as F

from wfm_core.tokenizers.causal import (
    ChannelNorm,
    Downsample,
    ResidualBlock,
    SpaceAttention,
    SpaceConv,
    TimeAttention,
    TimeConv,
    Upsample,
)

LAYERS = {
    "norm": lambda: ChannelNorm(8),
    "space": lambda: SpaceConv(8, 6),
    "time": lambda: TimeConv(8),
    "time, stride 2": lambda: TimeConv(8, stride=2),
    "residual": lambda: ResidualBlock(8, video=True),
    "space attention": lambda: SpaceAttention(8, 2),
    "time attention": lambda: TimeAttention(8, 2, 3),
    "down": lambda: Downsample(8, 6, time=True),
    "up": lambda: Upsample(8, 6, time=True),
}


def make(name: str) -> torch.nn.Module:
    """A layer whose weights are all random, in float64, so that equal means equal."""
    torch.manual_seed(0)
    layer = LAYERS[name]()
    for weight in layer.parameters():
        torch.nn.init.normal_(weight, std=0.5)
    return layer.double().requires_grad_(False)


def video(time: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(2, time, 8, 4, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("sizes", [(1, 2, 4, 2), (5, 4), (3, 2, 2, 2)])
@pytest.mark.parametrize("name", LAYERS)
def test_chunks_are_the_whole(name, sizes):
    layer, x, past = make(name), video(9), {}
    pieces = [layer(chunk, past) for chunk in x.split(sizes, dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), layer(x, {}))


@pytest.mark.parametrize("name", LAYERS)
def test_nothing_depends_on_what_comes_later(name):
    layer, x = make(name), video(9)
    other = torch.cat([x[:, :5], video(9, seed=1)[:, 5:]], dim=1)
    before, after = layer(x, {}), layer(other, {})
    same = (before == after).all(dim=-1).all(dim=-1).all(dim=-1).all(dim=0)
    kept = {9: 5, 5: 3, 17: 9}[len(same)]  # outputs that the first five frames make
    assert same.tolist() == [True] * kept + [False] * (len(same) - kept)


def test_convolution_in_time_is_a_padded_3d_convolution():
    layer, x = make("time"), video(7)
    weight = layer.mix.weight[..., 0, 0].unflatten(1, (3, 8)).transpose(1, 2)[..., None, None]  # (out, in, 3, 1, 1)
    volume = torch.cat([x[:, :1]] * 2 + [x], dim=1).transpose(1, 2)
    expected = F.conv3d(volume, weight).transpose(1, 2)
    torch.testing.assert_close(layer(x, {}), expected)
    torch.testing.assert_close(make("time, stride 2")(x, {}), expected[:, ::2])
    with pytest.raises(ValueError, match="larger than stride, got 2 and 2"):
        TimeConv(8, kernel=2, stride=2)


def test_a_video_layer_begins_close_to_an_image_layer():
    torch.manual_seed(0)
    layer, x = TimeConv(8), video(4).float()
    assert (layer(x, {}) - x).std() < 0.2


def test_attention_in_time_sees_its_window():
    layer, x = make("time attention"), video(6)
    for frame, reached in ((0, [0, 1, 2]), (3, [3, 4, 5])):
        other = x.clone()
        other[:, frame] += 1
        moved = (layer(other, {}) != layer(x, {})).flatten(2).any(dim=-1)[0]
        assert moved.nonzero().flatten().tolist() == reached


def test_attention_in_space_is_torchs():
    layer, x = make("space attention"), video(2)
    rows = layer.norm(x, {}).flatten(3).transpose(2, 3).flatten(0, 1)  # (B T, n, C)
    weights = (layer.qkv.weight, None, None, None, False, 0.0, layer.out.weight, None)
    expected, _ = F.multi_head_attention_forward(*(3 * [rows.transpose(0, 1)]), 8, 2, *weights)
    expected = expected.transpose(0, 1).unflatten(0, (2, 2)).transpose(2, 3).unflatten(3, (4, 6))
    torch.testing.assert_close(layer(x, {}), x + expected)
