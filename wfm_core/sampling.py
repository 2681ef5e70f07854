"""Random numbers as a function of (row seed, step, draw), and the choice of tokens from logits.

A row's numbers depend on its own seed and step count only, so they are the same whatever batch the row sits in, and a
state that carries (seed, step) can be copied, branched and restarted like any other tensor.
"""

import torch
from torch import Tensor


def row_uniform(seeds: Tensor, steps: Tensor, draw: int, size: int) -> Tensor:
    """Draw uniform numbers in (0, 1), a pure function of the arguments.

    Args:
        seeds: (B,) int64 row seeds.
        steps: (B,) int64 row step counts.
        draw: index of the draw within a step.
        size: how many numbers a row.

    Returns:
        (B, size) float32.

    Source: the mixer is the 64-bit finaliser of Steele et al., "Fast Splittable Pseudorandom Number Generators" (2014).
    """
    row = _mix(_mix(seeds + 0x632BE59B) ^ (steps * 1024 + draw))
    bits = _mix(row[:, None] + torch.arange(size, device=seeds.device)[None, :] * -0x61C8864680B583EB)
    return ((bits >> 41) & 0x7FFFFF).float().add(0.5) / 2**23  # one bit more would round up to 1


def row_normal(seeds: Tensor, steps: Tensor, draw: int, size: int) -> Tensor:
    """Draw normal numbers, a pure function of the arguments, which are as for `row_uniform`: (B, size) float32."""
    return torch.special.ndtri(row_uniform(seeds, steps, draw, size))


def _mix(x: Tensor) -> Tensor:
    """Scramble int64 values; logical shifts are masked because torch shifts signed integers arithmetically."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


def choose(logits: Tensor, temperature: float, uniform: Tensor | None, top_p: float = 1.0) -> Tensor:
    """Choose an index along the last dimension: the most likely at temperature 0, else a sample.

    Args:
        logits: (..., L).
        temperature: at least 0.
        uniform: (...,) numbers in (0, 1), needed when temperature > 0.
        top_p: in (0, 1]; sample from the likeliest indices alone, as few as together have this probability.

    Returns:
        (...,) int64.

    Source: Holtzman et al., "The Curious Case of Neural Text Degeneration" (ICLR 2020), section 3.1, for top_p.
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    if uniform is None:
        raise ValueError("sampling at a temperature above 0 needs uniform numbers, got None")
    probability = (logits.float() / temperature).softmax(dim=-1)
    if top_p < 1:
        ordered, order = probability.sort(dim=-1, descending=True)
        likelier = ordered.cumsum(dim=-1) - ordered
        probability = probability * torch.zeros_like(order, dtype=torch.bool).scatter(-1, order, likelier < top_p)
    cumulative = probability.cumsum(dim=-1)
    # Of the sum as it was rounded, or a number close to 1 would pick a level that cannot be.
    reached = uniform[..., None] * cumulative[..., -1:]
    return (cumulative < reached).sum(dim=-1)


def random_hidden(frames: tuple[int, int], num_tokens: int, generator: torch.Generator, device: torch.device) -> Tensor:
    """Draw which tokens a frame does not show in training: all of half of the frames, as at the first refinement step.

    Args:
        frames: (B, T).
        num_tokens: of a frame, S.
        generator: of the draws.
        device: where it is.

    Returns:
        (B, T, S) bool.
    """
    draws = torch.rand(*frames, 2, 1, generator=generator, device=device)
    ratio = torch.where(draws[:, :, 0] < 0.5, 1.0, torch.cos(draws[:, :, 1] * torch.pi / 2))
    return torch.rand(*frames, num_tokens, generator=generator, device=device) < ratio


def reveal_counts(total: int, num_steps: int) -> list[int]:
    """Split `total` tokens over refinement steps, few at first, all by the last (cosine schedule).

    Source: Chang et al., "MaskGIT" (CVPR 2022), section 3.3.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, got {num_steps}")
    fractions = 1 - torch.cos(torch.linspace(0, torch.pi / 2, num_steps + 1))
    reached = (fractions * total).round().long().tolist()
    return [after - before for before, after in zip(reached[:-1], reached[1:], strict=True)]
