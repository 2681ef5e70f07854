import math

import pytest
import torch

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
    torch.testing.assert_close(
        attend(q, k, v, bias), torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    )


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


def test_steps_with_a_cache_equal_the_whole_clip(time_block):
    x = random(2, 7, 4, 8)
    whole, keys_values = time_block(x)
    cache = torch.zeros(2, 2, 4, 2, 2, 4, dtype=torch.float64)
    for t in range(7):
        valid = (torch.arange(3) >= 2 - t).expand(2, 3)
        before = cache.clone()
        out, following = time_block.step(x[:, t : t + 1], cache, valid)
        assert torch.equal(cache, before)
        torch.testing.assert_close(out[:, 0], whole[:, t])
        cache = following
    torch.testing.assert_close(cache, keys_values[..., -2:, :].transpose(0, 1))


def test_rows_may_have_caches_of_different_ages(time_block):
    x = random(2, 4, 3, 8)
    old, fresh = time_block(x)[0][:1, 3], time_block(x[1:, 3:])[0][:, 0]
    cache = time_block(x[:, :3])[1][..., -2:, :].transpose(0, 1)
    out, _ = time_block.step(x[:, 3:], cache, torch.tensor([[True, True, True], [False, False, True]]))
    torch.testing.assert_close(out[:, 0], torch.cat([old, fresh]))


def test_the_future_and_what_left_the_window_do_not_matter(time_block):
    x = random(1, 8, 2, 8)
    changed = x.clone()
    changed[0, 3, 1] = random(8, seed=4)
    different = (time_block(x)[0] != time_block(changed)[0]).any(dim=-1)[0]  # (T, n)
    assert different.nonzero().tolist() == [[3, 1], [4, 1], [5, 1]]


def test_each_distance_has_its_own_bias(time_block):
    with torch.no_grad():
        time_block.distance_bias[:] = torch.tensor([-1e9, 0.0, -1e9])  # look at the previous frame only
    x = random(1, 5, 1, 8)
    changed = x.clone()
    changed[0, 1] = random(1, 8, seed=5)
    different = (time_block(x)[0] != time_block(changed)[0]).any(dim=-1)[0, :, 0]
    assert different.tolist() == [False, True, True, False, False]
