"""Noise of two kinds, and how samples are drawn out of it; pure functions.

Data x0 is seen through noise e as x = scale * x0 + level * e. With noise after EDM the scale is 1 and the level, sigma,
goes up to where no data is seen; on the straight paths of rectified flow the scale is 1 - level and the level is time.
Of both, what turns noise into data is the same differential equation, dx / dlevel = (x - x0(x, level)) / level, where
x0(x, level) is the mean of the data that may lie behind x. So both share the samplers.

Source: Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models" (NeurIPS 2022); Liu et al.,
"Flow Straight and Fast" (ICLR 2023).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

Denoise = Callable[[Tensor, float], Tensor]
"""Noisy data of any shape and its level, above 0 -> the mean of the data behind it, of that shape."""
Sampler = Callable[[Denoise, Tensor, Sequence[float]], Tensor]
"""What denoises, noise of unit variance, falling levels -> the sample at the last level."""


class Noising(NamedTuple):
    """How data is seen at some levels, and how a network of unit input and output denoises it there.

    Attributes:
        scale: of the data in x = scale * x0 + level * e.
        skip: x0 = skip * x + out * network(inner * x, told).
        out: see there.
        inner: see there.
        told: the level as the network is told of it, of the order of 1.
    """

    scale: Tensor
    skip: Tensor
    out: Tensor
    inner: Tensor
    told: Tensor


def edm(level: Tensor, sigma_data: float) -> Noising:
    """Noise at levels sigma (...) above 0, of data with the standard deviation `sigma_data`.

    Source: Karras et al. (2022), table 1.
    """
    total = (level.square() + sigma_data**2).sqrt()
    skip = (sigma_data / total).square()
    return Noising(torch.ones_like(level), skip, level * sigma_data / total, 1 / total, level.log() / 4)


def flow(level: Tensor) -> Noising:
    """Noise at times (...) in (0, 1], 1 all noise; the network gives the velocity, noise less data."""
    return Noising(1 - level, torch.ones_like(level), -level, torch.ones_like(level), level)


def karras_levels(num_steps: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> list[float]:
    """Levels of EDM, `num_steps` from `sigma_max` to `sigma_min` and then 0.

    Source: Karras et al. (2022), equation 5.

    Raises:
        ValueError: no step.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, got {num_steps}")
    top, bottom = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    return [(top + k / max(1, num_steps - 1) * (bottom - top)) ** rho for k in range(num_steps)] + [0.0]


def shifted_levels(num_steps: int, shift: float = 1.0) -> list[float]:
    """Levels of rectified flow, from 1 to 0 in `num_steps` steps; even, or with `shift` above 1 more of them high.

    Source: Esser et al., "Scaling Rectified Flow Transformers" (ICML 2024), equation 23.

    Raises:
        ValueError: no step.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, got {num_steps}")
    times = [1 - k / num_steps for k in range(num_steps)]
    return [shift * time / (1 + (shift - 1) * time) for time in times] + [0.0]


def euler(denoise: Denoise, noise: Tensor, levels: Sequence[float]) -> Tensor:
    """Follow the equation in straight steps (order 1, one evaluation a step)."""
    x = levels[0] * noise
    for level, after in pairwise(levels):
        x = _move(x, denoise(x, level), after / level)
    return x


def heun(denoise: Denoise, noise: Tensor, levels: Sequence[float]) -> Tensor:
    """Average the slopes at both ends of a step (order 2, two evaluations a step, one for a step to level 0).

    Source: Karras et al. (2022), algorithm 1.
    """
    x = levels[0] * noise
    for level, after in pairwise(levels):
        slope = (x - denoise(x, level)) / level
        ahead = x + (after - level) * slope
        if after > 0:
            slope = (slope + (ahead - denoise(ahead, after)) / after) / 2
            ahead = x + (after - level) * slope
        x = ahead
    return x


def multistep(denoise: Denoise, noise: Tensor, levels: Sequence[float]) -> Tensor:
    """Extrapolate what is denoised from the step before (order 2, one evaluation a step).

    Source: Lu et al., "DPM-Solver++" (2022), algorithm 2, with the logarithm of the level for the axis.
    """
    x, before = levels[0] * noise, None
    for level, after in pairwise(levels):
        denoised = aim = denoise(x, level)
        if before is not None and after > 0:
            last_level, last = before
            aim = denoised + math.log(level / after) / (2 * math.log(last_level / level)) * (denoised - last)
        x = _move(x, aim, after / level)
        before = level, denoised
    return x


SAMPLERS: Mapping[str, Sampler] = {"euler": euler, "heun": heun, "multistep": multistep}


def guided(told: Denoise, untold: Denoise, guidance: float) -> Denoise:
    """Go beyond (guidance above 1) what is denoised by who is told of a condition, away from who is not.

    Source: Ho and Salimans, "Classifier-Free Diffusion Guidance" (2022).
    """
    if guidance == 1:
        return told

    def denoise(x: Tensor, level: float) -> Tensor:
        plain = untold(x, level)
        return plain + guidance * (told(x, level) - plain)

    return denoise


def two_half_steps(
    velocity: Callable[[Tensor, Tensor, Tensor], Tensor], x: Tensor, level: Tensor, step: Tensor
) -> Tensor:
    """What one step along a flow must be to end where two of half its size do: the mean of their velocities.

    Args:
        velocity: x (B, T, h, w, C), levels and step sizes (B, T) to the mean velocity (B, T, h, w, C) over such steps.
        x: where they begin.
        level: see there.
        step: at most the level; where 0, nothing is to be read from the result.

    Source: Frans et al., "One Step Diffusion via Shortcut Models" (ICLR 2025), equation 5.
    """
    half = step / 2
    first = velocity(x, level, half)
    return (first + velocity(x - half[..., None, None, None] * first, level - half, half)) / 2


def _move(x: Tensor, aim: Tensor, kept: float) -> Tensor:
    """Go from x straight towards `aim` until the fraction `kept` of the way is left."""
    return aim + kept * (x - aim)
