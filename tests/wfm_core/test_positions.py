import math

import pytest
import torch

from wfm_core.models.positions import (
    NATIVE_FPS,
    RopeConfig,
    attention_scale,
    axis_dims,
    frequencies,
    rotate,
    rotations,
    sinusoids,
)


def some(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def score(query: torch.Tensor, key: torch.Tensor, at: list[float], from_: list[float], fps: float = NATIVE_FPS):
    """What a query at one position makes of a key at another."""
    config = RopeConfig(theta=100.0)
    turned = [
        rotate(x, *(part.double() for part in rotations(torch.tensor(place), len(x), config, fps)))
        for x, place in ((query, at), (key, from_))
    ]
    return turned[0] @ turned[1]


def test_attention_sees_differences_of_position_along_each_axis():
    query, key = some(2, 20)
    here = score(query, key, [3.0, 2.0, 5.0], [1.0, 4.0, 1.0])
    torch.testing.assert_close(here, score(query, key, [9.0, 7.0, 5.0], [7.0, 9.0, 1.0]), rtol=1e-4, atol=1e-5)
    for other in ([4.0, 2.0, 5.0], [3.0, 3.0, 5.0], [3.0, 2.0, 6.0]):
        assert abs(here - score(query, key, other, [1.0, 4.0, 1.0])) > 0.05
    torch.testing.assert_close(score(query, key, [2.0, 2.0, 2.0], [2.0, 2.0, 2.0]), query @ key, rtol=1e-4, atol=1e-5)


def test_time_is_in_seconds_whatever_the_frame_rate():
    query, key = some(2, 20)
    slow = score(query, key, [4.0, 0.0, 0.0], [1.0, 0.0, 0.0])
    fast = score(query, key, [12.0, 0.0, 0.0], [3.0, 0.0, 0.0], fps=3 * NATIVE_FPS)
    torch.testing.assert_close(slow, fast, rtol=1e-4, atol=1e-5)
    space = [score(query, key, [0.0, 3.0, 1.0], [0.0, 0.0, 0.0], fps=fps) for fps in (2.0, 30.0)]
    torch.testing.assert_close(*space)
    with pytest.raises(ValueError, match="fps must be positive, got 0"):
        rotations(torch.zeros(3), 20, RopeConfig(), fps=0)


def test_a_turn_keeps_lengths_and_first_frequencies_are_one():
    x = some(7, 20)
    places = torch.rand(7, 3, generator=torch.Generator().manual_seed(1)) * 50
    turned = rotate(x, *(part.double() for part in rotations(places, 20, RopeConfig())))
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1), rtol=1e-5, atol=1e-5)
    assert axis_dims(20) == (8, 6, 6) and axis_dims(64) == (24, 20, 20) and axis_dims(128) == (44, 42, 42)
    for axis, dim in zip(frequencies(20, RopeConfig(theta=500.0)), (8, 6, 6), strict=True):
        torch.testing.assert_close(axis, torch.tensor([500.0 ** (-2 * i / dim) for i in range(dim // 2)]))
    for wrong in (7, 4):
        with pytest.raises(ValueError, match=f"even and at least 6, got {wrong}"):
            axis_dims(wrong)


def test_yarn_keeps_the_fast_pairs_and_stretches_the_slow_ones():
    plain = RopeConfig(theta=10_000.0, trained_frames=32)
    longer = RopeConfig(theta=10_000.0, trained_frames=32, extension=2.0)
    before, after = frequencies(128, plain), frequencies(128, longer)
    ratio = after[0] / before[0]
    turns = before[0] * 32 / (2 * math.pi)
    torch.testing.assert_close(ratio[turns > 4], torch.ones_like(ratio[turns > 4]))
    torch.testing.assert_close(ratio[turns < 1], torch.full_like(ratio[turns < 1], 0.5))
    between = ratio[(turns > 1) & (turns < 4)]
    assert len(between) > 1 and ((0.5 < between) & (between < 1)).all() and (between.diff() < 0).all()
    torch.testing.assert_close(before[1:], after[1:])  # space is as large as ever
    assert attention_scale(plain) == 1 and attention_scale(longer) == pytest.approx(1 + 0.1 * math.log(2))
    for changes, message in (({"extension": 0.5}, "at least 1, got 0.5"), ({"slow_turns": 5.0}, "slow_turns must lie")):
        with pytest.raises(ValueError, match=message):
            RopeConfig(**changes)


def test_sinusoids_tell_every_position():
    places = torch.stack(torch.meshgrid(*[torch.arange(4)] * 3, indexing="ij"), dim=-1).flatten(0, 2)
    codes = sinusoids(places, 24)
    assert codes.shape == (64, 24)
    apart = torch.cdist(codes, codes) + 9 * torch.eye(64)
    assert apart.min() > 0.1
    torch.testing.assert_close(codes[:, :8], sinusoids(places * torch.tensor([1, 0, 0]), 24)[:, :8])
    assert codes[0].tolist() == 3 * ([0.0] * 4 + [1.0] * 4)
    with pytest.raises(ValueError, match="multiple of 6, got 20"):
        sinusoids(places, 20)
