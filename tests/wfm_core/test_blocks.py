import math

import pytest
import torch

import wfm_core.models.blocks as blocks
from wfm_core.models.blocks import SpaceBlock, TimeBlock, attend


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def time_block() -> TimeBlock:
    torch.manual_seed(0)
    block = TimeBlock(8, 2, 2, window=3).double()
    torch.nn.init.normal_(block.distance_bias)
    return block


def test_attention_by_hand():
    q, k, v = random(2, 3, 4, 5), random(2, 3, 6, 5, seed=1), random(2, 3, 6, 5, seed=2)
    bias = random(1, 3, 4, 6, seed=3)
    bias[..., 2] = float("-inf")
    expected = torch.empty(2, 3, 4, 5, dtype=torch.float64)
    for b in range(2):
        for a in range(3):
            for i in range(4):
                weight = [math.exp(q[b, a, i] @ k[b, a, j] / math.sqrt(5) + bias[0, a, i, j]) for j in range(6)]
                expected[b, a, i] = sum(w * row for w, row in zip(weight, v[b, a], strict=True)) / sum(weight)
    torch.testing.assert_close(attend(q, k, v, bias), expected)
    torch.testing.assert_close(attend(q, k, v), attend(q, k, v, torch.zeros(1, 3, 4, 6)))
    with_gradients = [x.clone().requires_grad_() for x in (q, k, v)]
    torch.testing.assert_close(attend(*with_gradients, bias), expected)


@pytest.mark.parametrize("tiles", [True, False])
def test_attention_of_many_dimensions_is_that_of_each_row(monkeypatch, tiles):
    monkeypatch.setattr(blocks, "HAS_TILES", tiles)
    q, k, v = (random(2, 3, 5, 4, 6, seed=seed) for seed in range(3))
    bias = random(2, 1, 5, 4, 4, seed=3)
    together, biased = attend(q, k, v), attend(q, k, v, bias)
    for i in range(2):
        for j in range(3):
            torch.testing.assert_close(together[i, j], attend(q[i, j], k[i, j], v[i, j]))
            torch.testing.assert_close(biased[i, j], attend(q[i, j], k[i, j], v[i, j], bias[i, 0]))


def test_cells_of_a_frame_mix_and_frames_do_not():
    torch.manual_seed(0)
    block = SpaceBlock(8, 2, 4).double()
    x = random(2, 3, 5, 8)
    changed = x.clone()
    changed[1, 2, 4] = random(8, seed=4)
    different = (block(x) - block(changed)).abs().amax(dim=-1) > 1e-9
    assert different[1, 2].all() and different.sum() == 5
    order = torch.tensor([3, 1, 4, 0, 2])
    torch.testing.assert_close(block(x[..., order, :]), block(x)[..., order, :])  # cells are a set


def consecutive(batch: int, time: int) -> torch.Tensor:
    return torch.arange(time).expand(batch, time)


def stepped(block: TimeBlock, x: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Run a clip (B, T, n, 8) frame by frame; returns the outputs and the last cache."""
    outputs, cache = [], [torch.zeros(len(x), 2, x.shape[2], 2, 4, dtype=torch.float64)] * 3
    for t in range(x.shape[1]):
        before = [entry.clone() for entry in cache]
        out, following = block.step(x[:, t : t + 1], cache, torch.full((len(x),), t))
        assert all(map(torch.equal, cache, before))
        outputs.append(out)
        cache = following
    return torch.cat(outputs, dim=1), cache


def test_steps_with_a_cache_equal_the_whole_clip(time_block):
    x = random(2, 9, 4, 8)
    torch.testing.assert_close(stepped(time_block, x)[0], time_block(x, consecutive(2, 9)))


def test_rows_may_have_caches_of_different_ages(time_block):
    x = random(2, 6, 3, 8)
    old, fresh = time_block(x, consecutive(2, 6))[:1, 5:], time_block(x[1:, 5:], consecutive(1, 1))
    cache = stepped(time_block, x[:, :5])[1]
    out, following = time_block.step(x[:, 5:], cache, torch.tensor([5, 0]))
    torch.testing.assert_close(out, torch.cat([old, fresh]))
    assert torch.equal(following[0][0], cache[0][0])  # the old row keeps its anchor, the fresh one is one
    assert torch.equal(following[0][1], following[-1][1])


def test_the_future_and_what_left_the_window_do_not_matter_but_the_anchor_does(time_block):
    def reached(frame: int) -> list[int]:
        x = random(1, 8, 2, 8)
        changed = x.clone()
        changed[0, frame, 1] = random(8, seed=4)
        different = (time_block(x, consecutive(1, 8)) != time_block(changed, consecutive(1, 8))).any(dim=-1)[
            0
        ]  # (T, n)
        assert not different[:, 0].any()
        return different[:, 1].nonzero().flatten().tolist()

    assert reached(3) == [3, 4, 5]
    assert reached(0) == [0, 1, 2, 3, 4, 5, 6, 7]


def test_a_gap_after_the_anchor_hides_nothing_else(time_block):
    """Frames 0, 5, 6, 7 of a clip: 7 sees what it needs; 5 and 6 miss the frames in between."""
    x = random(1, 8, 2, 8)
    whole = time_block(x, consecutive(1, 8))
    kept = torch.tensor([0, 5, 6, 7])
    cut = time_block(x[:, kept], kept[None])
    torch.testing.assert_close(cut[:, [0, 3]], whole[:, [0, 7]])
    assert not torch.allclose(cut[:, 1], whole[:, 5]) and not torch.allclose(cut[:, 2], whole[:, 6])
    both = time_block(torch.cat([x[:, kept], x[:, :4]]), torch.stack([kept, torch.arange(4)]))  # rows have their times
    torch.testing.assert_close(both, torch.cat([cut, whole[:, :4]]))


def test_each_distance_has_its_own_bias(time_block):
    def seen_from_the_last(favoured: int) -> list[int]:
        with torch.no_grad():
            time_block.distance_bias.fill_(-1e9)
            time_block.distance_bias[:, favoured] = 0.0
        x = random(1, 7, 1, 8)
        last = time_block(x, consecutive(1, 7))[:, -1]
        seen = []
        for frame in range(6):
            changed = x.clone()
            changed[0, frame] = random(1, 8, seed=5)
            if (time_block(changed, consecutive(1, 7))[:, -1] != last).any():
                seen.append(frame)
        return seen

    assert seen_from_the_last(0) == []
    assert seen_from_the_last(1) == [5]
    assert seen_from_the_last(2) == [4]
    assert seen_from_the_last(3) == [0]  # the entry past the window is the anchor's
