"""Samplers against the exact solution where the data is Gaussian, and against the schedulers of diffusers."""

import math
from itertools import pairwise

import pytest
import torch

from wfm_core.samplers import (
    SAMPLERS,
    edm,
    euler,
    flow,
    guided,
    heun,
    karras_levels,
    multistep,
    shifted_levels,
    two_half_steps,
)

MEAN, STD = 0.7, 0.6  # of the Gaussian data
ORDERS = {"euler": 1, "heun": 2, "multistep": 2}


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def spread(level: float, scale: float) -> float:
    """Standard deviation of what is seen at a level."""
    return math.sqrt((scale * STD) ** 2 + level**2)


def gaussian(kind: str):
    """The best denoiser of Gaussian data, and where the exact path from x at one level is at another."""

    def scale(level: float) -> float:
        return 1.0 if kind == "edm" else 1 - level

    def denoise(x, level):
        a = scale(level)
        return MEAN + a * STD**2 / spread(level, a) ** 2 * (x - a * MEAN)

    def follow(x, level, to):
        a, b = scale(level), scale(to)
        return b * MEAN + spread(to, b) / spread(level, a) * (x - a * MEAN)

    return denoise, follow


@pytest.mark.parametrize("kind", ["edm", "flow"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers_reach_the_exact_path_at_their_order(kind, name):
    denoise, follow = gaussian(kind)
    e, errors = noise(50), []
    for num_steps in (40, 80, 160):
        flow_levels = [1 - 0.9 * k / num_steps for k in range(num_steps + 1)]
        levels = karras_levels(num_steps, sigma_min=0.05, sigma_max=20.0)[:-1] if kind == "edm" else flow_levels
        exact = follow(levels[0] * e, levels[0], levels[-1])
        errors.append((SAMPLERS[name](denoise, e, levels) - exact).abs().max().item())
    for coarse, fine in pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(ORDERS[name], abs=0.25)
    assert errors[-1] < (0.02 if ORDERS[name] == 1 else 4e-4)


@pytest.mark.parametrize("kind", ["edm", "flow"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers_go_all_the_way_to_the_data(kind, name):
    denoise, follow = gaussian(kind)
    levels = karras_levels(100) if kind == "edm" else shifted_levels(100, shift=2.0)
    sample = SAMPLERS[name](denoise, noise(50), levels)
    torch.testing.assert_close(sample, follow(levels[0] * noise(50), levels[0], 0.0), rtol=0, atol=0.06)


@pytest.mark.parametrize("name", SAMPLERS)
def test_samples_of_two_points_fall_on_either(name):
    points = torch.tensor([-1.0, 2.0], dtype=torch.float64)

    def denoise(x, level):
        return (-((x[:, None] - points) ** 2) / (2 * level**2)).softmax(dim=-1) @ points

    samples = SAMPLERS[name](denoise, noise(400), karras_levels(60))
    distance = (samples[:, None] - points).abs()
    assert distance.min(dim=1).values.max() < 0.02
    assert 0.4 < (distance.argmin(dim=1) == 0).double().mean() < 0.6


@pytest.mark.parametrize(("name", "evaluations"), [("euler", 6), ("heun", 11), ("multistep", 6)])
def test_evaluations_are_counted_and_the_last_is_what_comes_out(name, evaluations):
    seen = []

    def denoise(x, level):
        seen.append((level, x))
        return torch.full_like(x, 3.0)

    levels = karras_levels(6)
    assert torch.equal(SAMPLERS[name](denoise, noise(4), levels), torch.full((4,), 3.0, dtype=torch.float64))
    assert len(seen) == evaluations and all(level > 0 for level, _ in seen)
    assert torch.equal(seen[0][1], levels[0] * noise(4))


def test_levels_by_hand():
    levels = karras_levels(3, sigma_min=1.0, sigma_max=128.0)
    assert levels == pytest.approx([128.0, 1.5**7, 1.0, 0.0])
    assert karras_levels(1) == pytest.approx([80.0, 0.0]) and karras_levels(18)[-2] == pytest.approx(0.002)
    assert shifted_levels(4) == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert shifted_levels(2, shift=3.0) == [1.0, 0.75, 0.0]
    for levels in (karras_levels, shifted_levels):
        with pytest.raises(ValueError, match="num_steps must be at least 1, got 0"):
            levels(0)


@pytest.mark.parametrize("sigma_data", [0.5, 1.0])
def test_preconditioning_keeps_inputs_and_targets_at_unit_variance(sigma_data):
    """The identities that define it: Karras et al. (2022), appendix B.6."""
    level = torch.tensor([0.01, 0.3, 1.0, 40.0], dtype=torch.float64)
    made = edm(level, sigma_data)
    variance = made.scale**2 * sigma_data**2 + level**2
    one = torch.ones(4, dtype=torch.float64)
    torch.testing.assert_close(made.inner**2 * variance, one)
    # The target of the network is (x0 - skip * x) / out with x = x0 + level * e.
    target = ((1 - made.skip) ** 2 * sigma_data**2 + made.skip**2 * level**2) / made.out**2
    torch.testing.assert_close(target, one)
    # The weight of an error in x0 that makes every level count alike: lambda in equation 8.
    weight = (level**2 + sigma_data**2) / (level * sigma_data) ** 2
    torch.testing.assert_close(weight * made.out**2, one)
    torch.testing.assert_close(made.told, level.log() / 4)


def test_the_target_of_a_flow_is_its_velocity():
    level = torch.tensor([0.1, 0.5, 1.0], dtype=torch.float64)
    made, data, e = flow(level), noise(3), noise(6)[3:]
    x = made.scale * data + level * e
    torch.testing.assert_close((data - made.skip * x) / made.out, e - data)
    assert torch.equal(made.inner, torch.ones(3)) and torch.equal(made.told, level)


def test_guidance_goes_beyond_and_one_asks_the_told_alone():
    def told(x, level):
        return x + level

    def untold(x, level):
        return 0 * x

    x = noise(3)
    torch.testing.assert_close(guided(told, untold, 2.5)(x, 0.3), 2.5 * (x + 0.3))
    assert torch.equal(guided(told, untold, 0.0)(x, 0.3), 0 * x)
    assert guided(told, None, 1.0) is told


def test_on_a_straight_path_one_step_is_two_half_steps():
    point = noise(1, 1, 2, 2, 3)
    asked = []

    def velocity(x, level, step):
        asked.append((level, step))
        return (x - point) / level[..., None, None, None]  # of all data in one point

    level, step = torch.tensor([[1.0, 0.5]], dtype=torch.float64), torch.tensor([[0.5, 0.25]], dtype=torch.float64)
    x = noise(1, 2, 2, 2, 3)
    torch.testing.assert_close(two_half_steps(velocity, x, level, step), velocity(x, level, step))
    assert asked[0][0].tolist() == [[1.0, 0.5]] and asked[1][0].tolist() == [[0.75, 0.375]]
    assert asked[0][1].tolist() == asked[1][1].tolist() == [[0.25, 0.125]]

    def bent(x, level, step):
        return x

    expected = (x + (1 - step[..., None, None, None] / 2) * x) / 2
    torch.testing.assert_close(two_half_steps(bent, x, level, step), expected)


# --- the schedulers of diffusers -------------------------------------------------------------------------------------


def curve(x: torch.Tensor, level: float) -> torch.Tensor:
    """A denoiser that means nothing, and is no straight line."""
    return torch.tanh(x + 0.3) * 0.8 / (1 + 0.1 * level)


@pytest.mark.parametrize(
    ("name", "sampler"), [("EDMEulerScheduler", euler), ("EDMDPMSolverMultistepScheduler", multistep)]
)
def test_edm_samplers_are_those_of_diffusers(name, sampler):
    diffusers = pytest.importorskip("diffusers")
    scheduler = getattr(diffusers, name)(sigma_min=0.02, sigma_max=30.0, sigma_data=0.5, rho=7.0)
    scheduler.set_timesteps(12)
    levels = karras_levels(12, sigma_min=0.02, sigma_max=30.0)
    torch.testing.assert_close(scheduler.sigmas.double(), torch.tensor(levels, dtype=torch.float64), rtol=1e-5, atol=0)
    x = levels[0] * noise(20)
    for level, time in zip(levels, scheduler.timesteps, strict=False):
        scheduler.scale_model_input(x, time)
        made = edm(torch.tensor(level, dtype=torch.float64), 0.5)
        x = scheduler.step((curve(x, level) - made.skip * x) / made.out, time, x).prev_sample
    torch.testing.assert_close(sampler(curve, noise(20), levels), x.double(), rtol=1e-4, atol=1e-5)


def test_heun_is_that_of_diffusers():
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.HeunDiscreteScheduler(use_karras_sigmas=True, timestep_spacing="linspace")
    scheduler.set_timesteps(10)
    # Each level but the first and the last comes twice.
    levels = [scheduler.sigmas[0].item(), *scheduler.sigmas[1:-1:2].tolist(), 0.0]
    torch.testing.assert_close(
        torch.tensor(levels[:-1]), torch.tensor(karras_levels(10, levels[-2], levels[0])[:-1]), rtol=1e-4, atol=0
    )
    x = levels[0] * noise(20)
    for level, time in zip(scheduler.sigmas[:-1].tolist(), scheduler.timesteps, strict=True):
        x = scheduler.step((x - curve(x, level)) / level, time, x).prev_sample
    torch.testing.assert_close(heun(curve, noise(20), levels), x.double(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "sampler"), [("FlowMatchEulerDiscreteScheduler", euler), ("FlowMatchHeunDiscreteScheduler", heun)]
)
def test_flow_samplers_are_those_of_diffusers(name, sampler):
    diffusers = pytest.importorskip("diffusers")
    scheduler = getattr(diffusers, name)(shift=3.0)
    if sampler is euler:
        scheduler.set_timesteps(sigmas=[1 - k / 8 for k in range(8)])
        levels = shifted_levels(8, shift=3.0)
        torch.testing.assert_close(scheduler.sigmas, torch.tensor(levels), rtol=1e-6, atol=1e-7)
        evaluated = levels[:-1]
    else:
        scheduler.set_timesteps(8)
        levels = [scheduler.sigmas[0].item(), *scheduler.sigmas[1:-1:2].tolist(), 0.0]
        evaluated = [time.item() / 1000 for time in scheduler.timesteps]
    x = (levels[0] * noise(20)).float()
    for level, time in zip(evaluated, scheduler.timesteps, strict=True):
        x = scheduler.step((x - curve(x, level)) / level, time, x).prev_sample
    torch.testing.assert_close(sampler(curve, noise(20), levels), x.double(), rtol=1e-4, atol=1e-5)
