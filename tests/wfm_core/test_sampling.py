import numpy as np
import pytest
import torch

from wfm_core import sampling
from wfm_core.sampling import choose, reveal_counts, row_normal, row_uniform

MASK = 2**64 - 1


def mixed(x: int) -> int:
    """The finaliser in unsigned arithmetic, as it is published."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def expected_uniform(seed: int, step: int, draw: int, index: int) -> float:
    row = mixed(mixed((seed + 0x632BE59B) & MASK) ^ (step * 1024 + draw))
    return ((mixed((row + index * 0x9E3779B97F4A7C15) & MASK) >> 41) + 0.5) / 2**23


def ids(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)


def test_numbers_are_those_of_the_published_generator():
    seeds, steps = (0, 7, -1, 2**62 + 5), (0, 3, 49, 12)
    got = row_uniform(ids(*seeds), ids(*steps), 2, 5)
    expected = [[expected_uniform(s, t, 2, i) for i in range(5)] for s, t in zip(seeds, steps, strict=True)]
    assert got.tolist() == expected and got.dtype == torch.float32


def test_golden_values():
    got = (row_uniform(ids(0, 1), ids(0, 5), 1, 2) * 2**23).floor().long()
    assert got.tolist() == [[102891, 7857095], [1018424, 1104737]]


def test_a_row_has_its_own_numbers_whatever_the_batch():
    together = row_uniform(ids(3, 8, 3), ids(0, 5, 0), 1, 40)
    assert torch.equal(together[0], together[2])
    assert torch.equal(row_uniform(ids(8), ids(5), 1, 40)[0], together[1])
    assert torch.equal(row_uniform(ids(8), ids(5), 1, 7)[0], together[1, :7])


def test_numbers_are_uniform_along_every_argument():
    """Kolmogorov-Smirnov distance within the 99.9% bound, and no correlation between neighbours."""
    count = 4096
    along_size = row_uniform(ids(11), ids(0), 0, count)[0]
    along_seed = row_uniform(torch.arange(count), ids(0).expand(count), 0, 1)[:, 0]
    along_step = row_uniform(ids(11).expand(count), torch.arange(count), 0, 1)[:, 0]
    along_draw = torch.cat([row_uniform(ids(11), ids(0), draw, 1)[0] for draw in range(512)])
    for numbers in (along_size, along_seed, along_step, along_draw):
        size = len(numbers)
        ordered, ranks = numbers.double().sort().values, torch.arange(size, dtype=torch.float64)
        distance = torch.maximum((ordered - ranks / size).abs().max(), (ordered - (ranks + 1) / size).abs().max())
        assert distance < 1.95 / size**0.5
        correlation = np.corrcoef(numbers[1:], numbers[:-1])[0, 1]
        assert abs(correlation) < 3.3 / size**0.5
    assert len({x for numbers in (along_size, along_seed, along_step) for x in numbers.tolist()}) > 3 * count - 20


@pytest.mark.parametrize("bits", [0, -1])
def test_numbers_lie_strictly_between_0_and_1(monkeypatch, bits):
    monkeypatch.setattr(sampling, "_mix", lambda x: torch.full_like(x, bits))
    number = row_uniform(ids(0), ids(0), 0, 1).item()
    assert 0 < number < 1 and number == pytest.approx(float(bits == -1), abs=1e-7)


def test_choices_have_the_probabilities_of_the_logits():
    probability = torch.tensor([0.5, 0.125, 0.0, 0.25, 0.125])
    count = 8000
    uniform = (torch.arange(count) + 0.5) / count  # an even grid: counts are exact up to rounding
    drawn = choose(probability.log().expand(count, -1), 1.0, uniform)
    np.testing.assert_allclose(drawn.bincount(minlength=5) / count, probability, atol=2 / count)
    cool = choose(probability.log().expand(count, -1), 0.5, uniform).bincount(minlength=5) / count
    np.testing.assert_allclose(cool, probability**2 / (probability**2).sum(), atol=2 / count)


def test_temperature_zero_is_the_most_likely():
    logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, 2.0, float("-inf")]])
    assert choose(logits, 0, None).tolist() == [1, 0]
    with pytest.raises(ValueError, match="needs uniform numbers"):
        choose(logits, 0.5, None)


def test_what_cannot_be_is_never_chosen():
    """The rounded sum of probabilities is often a little less than 1, and a number may lie above it."""
    logits = torch.randn(4000, 8, generator=torch.Generator().manual_seed(0))
    logits[:, 5:] = float("-inf")
    logits[:, 0] = float("-inf")
    sums = logits.softmax(dim=-1).cumsum(dim=-1)[:, -1]
    assert (sums < 1).any()
    for extreme in (torch.nextafter(torch.tensor(1.0), torch.tensor(0.0)), torch.tensor(2.0**-24)):
        drawn = choose(logits, 1.0, extreme.expand(4000))
        assert drawn.min() >= 1 and drawn.max() <= 4


@pytest.mark.parametrize("total", [1, 7, 64, 192, 3072])
@pytest.mark.parametrize("steps", [1, 2, 5, 8, 100])
def test_reveal_counts_add_up_and_grow(total, steps):
    counts = reveal_counts(total, steps)
    assert len(counts) == steps and sum(counts) == total and min(counts) >= 0
    reached = np.cumsum(counts)
    np.testing.assert_allclose(reached, total * (1 - np.cos(np.pi / 2 * np.arange(1, steps + 1) / steps)), atol=0.501)


def test_reveal_counts_by_hand():
    assert reveal_counts(100, 2) == [29, 71]
    assert reveal_counts(192, 1) == [192]
    with pytest.raises(ValueError, match="at least 1, got 0"):
        reveal_counts(10, 0)


@pytest.mark.parametrize(("top_p", "kept"), [(0.3, [2]), (0.41, [2, 4]), (0.84, [1, 2, 4]), (1.0, [0, 1, 2, 3, 4])])
def test_the_unlikely_are_left_out(top_p, kept):
    probability = torch.tensor([0.05, 0.2, 0.4, 0.1, 0.25])
    count = 20_000
    uniform = row_uniform(torch.arange(count), ids(0).expand(count), 0, 1)[:, 0]
    drawn = choose(probability.log().expand(count, -1), 1.0, uniform, top_p).bincount(minlength=5) / count
    expected = torch.zeros(5)
    expected[kept] = probability[kept] / probability[kept].sum()
    torch.testing.assert_close(drawn, expected, atol=0.015, rtol=0)
    assert (drawn > 0).tolist() == (expected > 0).tolist()


def test_normal_numbers_are_the_uniform_ones_through_the_inverse_of_their_distribution():
    got = row_normal(ids(3, 4), ids(0, 9), 2, 20_000)
    assert got.dtype == torch.float32 and got.isfinite().all()
    torch.testing.assert_close(
        (1 + torch.erf(got / 2**0.5)) / 2, row_uniform(ids(3, 4), ids(0, 9), 2, 20_000), rtol=0, atol=1e-6
    )
    assert torch.allclose(got.mean(dim=1), torch.zeros(2), atol=0.03) and (got.std(dim=1) - 1).abs().max() < 0.02
